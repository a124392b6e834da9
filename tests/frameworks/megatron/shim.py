"""What lets Megatron-Core 0.16.1 run where torch has no CUDA: stand-ins for the CUDA calls that it makes.

Nothing here changes what Megatron computes. Streams and events do nothing, since work on a CPU is complete when a call
returns; devices named "cuda" become the CPU; what a missing TransformerEngine leaves undefined is set to None.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from moe_ep.integrations import deep_ep


class FakeEvent:
    """An event that is always reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class FakeStream:
    """A stream on which everything is complete."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "FakeStream") -> None:
        pass

    def wait_event(self, event: FakeEvent) -> None:
        pass

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return event or FakeEvent()

    def synchronize(self) -> None:
        pass


class CudaMeansCpu(torch.overrides.TorchFunctionMode):
    """Sends what asks for a CUDA device to the CPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") == "cuda":
            return args[0]
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return func(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


_STREAM = FakeStream()


def _cuda_calls() -> dict[str, Any]:
    # NOTE: each a function of its own: torch keeps tables of what torch.cuda holds, in which nothing may be twice.
    return {
        "Stream": FakeStream,
        "Event": FakeEvent,
        # Used as device=... throughout.
        "current_device": lambda: "cpu",
        "current_stream": lambda *args: _STREAM,
        "default_stream": lambda *args: _STREAM,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "synchronize": lambda *args: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda *args: None,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
    }


def _import_megatron() -> None:
    """Import what decides at that time: whether to compile, and whether there is a deep_ep."""
    if "megatron.core.transformer.moe.fused_a2a" in sys.modules:
        return
    deep_ep.install()
    # Compiled code would not see the mode that sends tensors to the CPU.
    with mock.patch.object(torch, "compile", _uncompiled):
        importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    deep_ep.uninstall()


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # On a GPU this gives what collectives take as sizes; Megatron's own leaves CPU tensors as they are.
    return tensor.cpu().numpy() if torch.is_tensor(tensor) and as_numpy else tensor


def _without_transformer_engine(stack: contextlib.ExitStack) -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    names = ("te_general_gemm", "fused_permute", "fused_permute_with_probs", "fused_unpermute")
    chunks = ("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs")
    for name in (*names, *chunks):
        if not hasattr(moe_utils, name):
            stack.enter_context(mock.patch.object(moe_utils, name, None, create=True))
    for module in (moe_utils, token_dispatcher):
        stack.enter_context(mock.patch.object(module, "maybe_move_tensor_to_cpu", _to_cpu))
    state = {"_get_cuda_rng_state": _get_rng_state, "_set_cuda_rng_state": _set_rng_state}
    stack.enter_context(mock.patch.multiple(random, **state))


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _record_stream(tensor: torch.Tensor, stream: FakeStream) -> None:
    pass


def _uncompiled(function: Callable | None = None, **kwargs: Any) -> Callable:
    return function or (lambda inner: inner)


@contextlib.contextmanager
def cpu_megatron() -> Iterator[None]:
    """Megatron-Core can be imported and run inside; outside nothing is changed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_cuda_calls()))
        ranges = {"range_push": lambda *args: 0, "range_pop": lambda: 0, "range": contextlib.nullcontext}
        stack.enter_context(mock.patch.multiple(torch.cuda.nvtx, **ranges))
        stack.enter_context(mock.patch.multiple(torch.Tensor, record_stream=_record_stream))
        _import_megatron()
        _without_transformer_engine(stack)
        stack.enter_context(CudaMeansCpu())
        yield


def on_cpu(function: Callable) -> Callable:
    """Run a function inside :func:`cpu_megatron`; it stays one that worker processes can look up."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with cpu_megatron():
            return function(*args, **kwargs)

    return run
