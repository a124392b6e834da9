"""Runs a job on many ranks: processes started here, or those torchrun has already started."""

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_ep.cli.bench.timing import Rank

# A job runs on every rank and returns what rank 0 reports; it must be a function at the top level of a module.
Job = Callable[..., list[dict]]


def under_torchrun() -> bool:
    """Whether this process is one of a world that torchrun (or the like) has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def pick_device(name: str, ranks: int) -> str:
    """``auto`` is ``cuda`` when there is a GPU for each rank, else ``cpu``.

    Raises:
        ValueError: ``cuda`` was asked for and there are fewer GPUs than ranks.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and num_gpus < ranks:
        raise ValueError(f"device=cuda needs one GPU per rank: {ranks} ranks, {num_gpus} GPUs; use fewer ranks or cpu")
    if name == "auto":
        return "cuda" if num_gpus >= ranks else "cpu"
    return name


def launch(ranks: int, device: str, job: Job, *args: Any) -> list[dict]:
    """Run ``job(rank, *args)`` on ``ranks`` new local processes and return what rank 0 got.

    Args:
        ranks: processes to start; with 1 there is no process group.
        device: ``cpu`` (gloo) or ``cuda`` (NCCL, one GPU per rank).
        job: see ``Job``; its result must be JSON.
        args: sent to every rank; must pickle.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the text holds its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="moe_ep_bench_") as folder:
        # One thread per core over all ranks: more would measure the scheduler.
        threads = max(1, _num_cores() // ranks)
        with _without_interrupts():
            processes = mp.spawn(
                _run_rank, args=(ranks, device, threads, folder, job, args), nprocs=ranks, join=False, daemon=True
            )
        try:
            while not processes.join():
                pass
        except BaseException:
            for process in processes.processes:
                process.terminate()
            for process in processes.processes:
                process.join()
            raise
        return json.loads(Path(folder, "result.json").read_text())


def run_in_world(device: str, job: Job, *args: Any) -> list[dict] | None:
    """Run ``job`` on the ranks that torchrun has started; the result is None on every rank but the first."""
    index = int(os.environ["RANK"])
    local = int(os.environ.get("LOCAL_RANK", index))
    with _group(device, local, init_method="env://") as rank:
        result = job(rank, *args)
    return result if index == 0 else None


def _run_rank(index: int, ranks: int, device: str, threads: int, folder: str, job: Job, args: Sequence[Any]) -> None:
    # Ctrl-C reaches every process of the terminal: ranks end at once and in silence, also inside a collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
    if ranks == 1:
        result = job(Rank(group=None, device=torch.device(device)), *args)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        rendezvous = f"file://{folder}/rendezvous"
        with _group(device, index, init_method=rendezvous, rank=index, world_size=ranks) as rank:
            result = job(rank, *args)
    if index == 0:
        Path(folder, "result.json").write_text(json.dumps(result))


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C until they ask for it: not every moment of their start can end cleanly."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _group(device: str, local: int, **where: Any) -> Iterator[Rank]:
    """The world's group, gone again afterwards."""
    place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", **where)
    try:
        assert dist.group.WORLD is not None
        yield Rank(group=dist.group.WORLD, device=place)
    finally:
        dist.destroy_process_group()


def _num_cores() -> int:
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
