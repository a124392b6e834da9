"""NVSHMEM joins, sends with put-with-signal from relocatable device code, and leaves: on one GPU, and between two."""

import subprocess
import sys

import pytest

pytest.importorskip("moe_ep._C_internode", reason="moe_ep._C_internode is not built: it needs NVSHMEM")

# A process of NVSHMEM joins one world and never another, so every rank is a new process.
RANK = """
import sys
import torch
from moe_ep import _C_internode as internode

rank, num_ranks = map(int, sys.argv[1:])
torch.cuda.set_device(rank)
if rank == 0:
    unique_id = internode.make_unique_id()
    print(unique_id.hex(), flush=True)
else:
    unique_id = bytes.fromhex(sys.stdin.readline())
runtime = internode.NvshmemRuntime(unique_id, rank=rank, num_ranks=num_ranks)
assert (runtime.my_pe, runtime.num_pes) == (rank, num_ranks)
address = runtime.allocate(1000)
assert address % 128 == 0
runtime.barrier()
runtime.free(address)
for num_words in (1, 4096, 100_000):
    runtime.ring_exchange(num_words=num_words, timeout_s=20)
runtime.finalize()
runtime.finalize()
try:
    runtime.barrier()
except ValueError as error:
    assert "finalized" in str(error)
else:
    raise AssertionError("a finalized runtime still works")
"""


def run_ranks(num_ranks: int) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(num_ranks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        unique_id = processes[0].stdout.readline()
        # Every rank has the id before anybody is waited for: none goes on without all.
        for process in processes:
            process.stdin.write(unique_id)
            process.stdin.flush()
        outcomes = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(processes, outcomes, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {errors}"


@pytest.mark.gpu
def test_one_rank():
    run_ranks(1)


@pytest.mark.multi_gpu(2)
def test_two_ranks():
    run_ranks(2)
