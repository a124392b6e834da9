"""The low-latency family of ``Buffer``, which this version refuses by name."""

from __future__ import annotations

from typing import Any, NoReturn

from moe_ep.errors import NotBuiltError

_REMEDY = (
    "needs the low-latency family, which this version does not have: use dispatch and combine with num_worst_tokens, "
    "or TokenDispatcher with a capacity, which CUDA graphs capture, for decoding as well"
)


def refuse_low_latency(what: str) -> NoReturn:
    """Raise NotBuiltError that says what to use instead."""
    raise NotBuiltError(f"{what} {_REMEDY}")


class LowLatencyCalls:
    """Methods of ``Buffer`` for decoding. All of them raise NotBuiltError, on every backend, before anything moves."""

    @staticmethod
    def get_low_latency_rdma_size_hint(*args: Any, **kwargs: Any) -> int:  # noqa: ANN401
        """Bytes that the low-latency family would need."""
        refuse_low_latency("get_low_latency_rdma_size_hint")

    def clean_low_latency_buffer(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Make the buffer fit for low-latency use."""
        refuse_low_latency("clean_low_latency_buffer")

    def low_latency_dispatch(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        """Send tokens to their experts' slabs."""
        refuse_low_latency("low_latency_dispatch")

    def low_latency_combine(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        """Send weighted sums home."""
        refuse_low_latency("low_latency_combine")

    def get_next_low_latency_combine_buffer(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        """Memory to write what a zero-copy combine sends."""
        refuse_low_latency("get_next_low_latency_combine_buffer")

    def low_latency_update_mask_buffer(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Mask a rank, or unmask it."""
        refuse_low_latency("low_latency_update_mask_buffer")

    def low_latency_query_mask_buffer(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Which ranks are masked."""
        refuse_low_latency("low_latency_query_mask_buffer")

    def low_latency_clean_mask_buffer(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Unmask all ranks."""
        refuse_low_latency("low_latency_clean_mask_buffer")
