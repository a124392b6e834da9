"""The bound runtime object of the CUDA backend says what its torch twin says; without a GPU."""

from __future__ import annotations

import pytest
import torch

from moe_ep.backends.runtime import TorchRuntime

_C = pytest.importorskip("moe_ep._C", reason="moe_ep._C is not built")
pytestmark = pytest.mark.skipif(not _C.build_info()["cuda"], reason="moe_ep._C is built without CUDA")


def make_runtime(rank: int, num_ranks: int, ranks_per_node: int, memory: object = (None, 0, 0)) -> object:
    return _C.Buffer(
        rank=rank, num_ranks=num_ranks, ranks_per_node=ranks_per_node, device=1, stream="stream", memory=lambda: memory
    )


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(1, 1), (4, 4), (4, 2), (6, 1)])
def test_places_equal_those_of_the_twin(num_ranks: int, ranks_per_node: int) -> None:
    for rank in range(num_ranks):
        runtime, twin = (
            make_runtime(rank, num_ranks, ranks_per_node),
            TorchRuntime(rank, num_ranks, ranks_per_node, 0, 0),
        )
        for name in ("get_num_rdma_ranks", "get_rdma_rank", "get_local_ipc_handle", "get_local_nvshmem_unique_id"):
            assert getattr(runtime, name)() == getattr(twin, name)(), name
        for everywhere in (True, False):
            assert runtime.get_root_rdma_rank(everywhere) == twin.get_root_rdma_rank(everywhere)
        assert runtime.is_internode_available() == (ranks_per_node < num_ranks)
        assert (runtime.get_local_device_id(), runtime.get_comm_stream()) == (1, "stream")
        runtime.sync([0] * num_ranks, [b""] * num_ranks, b"")


def test_it_is_available_until_its_memory_is_released() -> None:
    assert make_runtime(0, 1, 1).is_available()
    assert not make_runtime(0, 2, 1, memory=None).is_available()
    assert not make_runtime(0, 2, 1, memory=None).is_internode_available()


def test_every_method_of_the_twin_is_bound() -> None:
    methods = {name for name in vars(TorchRuntime) if not name.startswith("_")}
    assert methods == {name for name in vars(_C.Buffer) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": "float32"}, "dtype='float32' must be a torch.dtype"),
        ({"dtype": torch.uint8, "size": 1}, "do not lie in the buffer of 0 bytes"),
        ({"dtype": torch.float32, "offset": -4}, "offset=-4 must be an int"),
        ({"dtype": torch.uint8, "size": 1, "use_rdma_buffer": True}, "do not lie in the buffer of 0 bytes"),
    ],
    ids=str,
)
def test_memory_outside_of_the_buffer_is_refused(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_runtime(0, 2, 2).get_local_buffer_tensor(**arguments)


@pytest.mark.parametrize("place", [(2, 2, 2), (-1, 2, 2), (0, 3, 2), (0, 2, 0)])
def test_impossible_places_are_refused(place: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        make_runtime(*place)
