"""The examples of transformers, Megatron-Core, deep_ep, FSDP2 and DDP over the CUDA backend: losses of CPU runs.

Both runs start from the same fp32 weights, drawn on the CPU, and read the same texts; TF32 is off. What is left is the
order of sums:

- ``FIRST``: the first loss knows only the forward. A sum of n products errs by sqrt(n) units of 2**-24 where roundings
  are independent; with n up to 256, four such sums per layer, two layers and a mean over all tokens, 1e-5 of the loss
  leaves room for ten times that.
- ``LATER``: gradients add up over 1,000 to 1,500 tokens, so they err by about sqrt(1500) * 2**-24 = 2.3e-6 of their
  size, which Adam makes a larger part of the steps of small ones, and a near tie of the router may fall otherwise. With
  noise of 3e-6 of their root mean square added to all gradients, and of 2**-23 of all weights, losses of these runs
  moved on two CPU ranks by up to 4e-6 within six steps; one more token that falls otherwise moves a mean of 1,000 by
  up to its own part of that. 1e-4 covers both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST, LATER = 1e-5, 1e-4
STEPS = 6
TIMEOUT_S = 100


class Example(NamedTuple):
    """A script, what it imports beside torch, its options, more of them on CPUs, and the module that runs it there."""

    script: str
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    cpu_options: tuple[str, ...] = ()
    cpu_runner: str | None = None


EXAMPLES = {
    "transformers": Example(
        "transformers_finetune.py", needs=("transformers", "accelerate"), options=("--learning-rate", "1e-3")
    ),
    "megatron": Example(
        "megatron_gpt.py",
        needs=("megatron.core", "numpy", "packaging"),
        options=("--shared-expert",),
        cpu_options=("--device", "cpu"),
        cpu_runner="tests.frameworks.megatron.run_on_cpu",
    ),
    "deep_ep": Example("deep_ep_moe.py"),
    "fsdp2": Example("fsdp_train.py"),
    "ddp": Example("fsdp_train.py", options=("--wrapper", "ddp")),
}


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of ``packages`` that cannot be found; nothing is imported but parents."""
    found = []
    for package in packages:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            found.append(package)
    return found


def run(example: Example, num_ranks: int, folder: Path, backend: str) -> dict[str, Any]:
    """Losses, device and backends of a run; on CPUs unless the backend is ``cuda``."""
    on_cpu = backend != "cuda"
    report = folder / f"{backend}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    if on_cpu and example.cpu_runner:
        command += ["-m", example.cpu_runner]
    command += [str(ROOT / "examples" / example.script), "--steps", str(STEPS), "--json", str(report)]
    command += ["--backend", backend, *example.options, *(example.cpu_options if on_cpu else ())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    # Compiling costs more than these steps take, and sums in other orders once more.
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment["NVIDIA_TF32_OVERRIDE"] = "0"
    # A rank that waits for one that failed says so within the bound of this run.
    environment["MOE_EP_TIMEOUT_S"] = "60"
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # Its ranks, too: they would go on waiting for each other.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{example.script} with {backend} took more than {TIMEOUT_S} s:\n{output[-4000:]}")
    assert process.returncode == 0, output[-8000:]
    return json.loads(report.read_text())


def compare(expected: list[float], got: list[float]) -> None:
    assert len(expected) == len(got) == STEPS
    apart = [abs(have - want) / want for want, have in zip(expected, got, strict=True)]
    print("relative distance of losses:", " ".join(f"{one:.1e}" for one in apart))  # noqa: T201
    assert apart[0] <= FIRST, (expected, got)
    assert max(apart) <= LATER, (expected, got)
    # The bound is far below what the steps do.
    assert max(abs(loss - expected[0]) for loss in expected) > 20 * LATER * expected[0]


@pytest.mark.parametrize(
    "num_ranks",
    [pytest.param(2, marks=pytest.mark.multi_gpu(2)), pytest.param(4, marks=pytest.mark.multi_gpu(4))],
)
@pytest.mark.parametrize("name", EXAMPLES)
def test_losses_equal_those_of_the_cpu(name: str, num_ranks: int, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    lacking = missing(example.needs)
    if lacking:
        pytest.skip(f"{', '.join(lacking)} cannot be imported")
    expected = run(example, num_ranks, tmp_path, "torch")
    assert (expected["device"], expected["backends"]) == ("cpu", ["torch"])
    got = run(example, num_ranks, tmp_path, "cuda")
    assert (got["device"], got["backends"]) == ("cuda", ["cuda"])
    compare(expected["losses"], got["losses"])
