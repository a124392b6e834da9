"""The torch backend's twin of the bound C++ runtime object: the same methods, answered by plain host memory."""

from __future__ import annotations

import torch
from torch import Tensor


def view_bytes(total: int, dtype: torch.dtype, size: int | None, offset: int) -> tuple[int, int]:
    """First byte and number of bytes of a view of a buffer.

    Args:
        total: bytes of the buffer.
        dtype: of the view.
        size: elements; None for all that follow ``offset``.
        offset: first byte.

    Raises:
        ValueError: when the view does not lie in the buffer.
    """
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} must be a torch.dtype, like torch.bfloat16")
    for name, value in (("size", 0 if size is None else size), ("offset", offset)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r} must be an int of 0 or more; size=None takes all behind offset")
    count = (total - offset) // dtype.itemsize if size is None else size
    if offset > total or offset % dtype.itemsize or offset + count * dtype.itemsize > total:
        raise ValueError(
            f"offset={offset}, size={size} of {dtype} do not lie in the buffer of {total} bytes: "
            "construct the Buffer with more bytes, or ask for less"
        )
    return offset, count * dtype.itemsize


class TorchRuntime:
    """What ``Buffer.runtime`` is on the torch backend.

    Args:
        rank: rank in the group.
        num_ranks: R.
        ranks_per_node: ranks that share a scale-up domain.
        num_nvl_bytes: size of the local buffer.
        num_rdma_bytes: size of the local buffer for scale-out.
    """

    def __init__(self, rank: int, num_ranks: int, ranks_per_node: int, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._ranks_per_node = ranks_per_node
        self._sizes = {False: num_nvl_bytes, True: num_rdma_bytes}
        self._memory: dict[bool, Tensor] = {}

    def is_available(self) -> bool:
        """Whether exchanges can run."""
        return True

    def is_internode_available(self) -> bool:
        """Whether ranks of several nodes can exchange: over torch.distributed they always can."""
        return True

    def get_num_rdma_ranks(self) -> int:
        """Number of nodes."""
        return -(-self._num_ranks // self._ranks_per_node)

    def get_rdma_rank(self) -> int:
        """Index of this rank's node."""
        return self._rank // self._ranks_per_node

    def get_root_rdma_rank(self, global_: bool) -> int:
        """First rank of the job (global) or index of this node's first rank."""
        return 0 if global_ else self.get_rdma_rank() * self._ranks_per_node

    def get_local_device_id(self) -> int:
        """Index of the local device; 0 on a CPU."""
        return torch.cuda.current_device() if torch.cuda.is_initialized() else 0

    def get_local_ipc_handle(self) -> bytes:
        """Empty: no memory is shared between processes here."""
        return b""

    def get_local_nvshmem_unique_id(self) -> bytes:
        """Empty: NVSHMEM is not used here."""
        return b""

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: int | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """A view of the local buffer.

        Args:
            dtype: of the view.
            size: elements; None for all that follow ``offset``.
            offset: first byte.
            use_rdma_buffer: the buffer for scale-out instead.

        Raises:
            ValueError: when the view does not lie in the buffer.
        """
        total = self._sizes[use_rdma_buffer]
        first, num_bytes = view_bytes(total, dtype, size, offset)
        if use_rdma_buffer not in self._memory:
            self._memory[use_rdma_buffer] = torch.zeros(total, dtype=torch.uint8, device="cpu")
        return self._memory[use_rdma_buffer][first : first + num_bytes].view(dtype)

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """None: exchanges run on a host thread."""
        return None

    def sync(self, device_ids: list[int], all_gathered_handles: list[bytes], root_unique_id: bytes) -> None:
        """Nothing to map."""
