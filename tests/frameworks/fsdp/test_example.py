"""The example runs as it is, learns, and goes on from its checkpoint on another number of ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import run_first_example

ROOT = Path(__file__).resolve().parents[3]


def run(ranks: int, *arguments: str) -> tuple[str, float, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "fsdp_train.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\w+, \d+ experts over \d of \d ranks, \w+): loss (\d\.\d+) -> (\d\.\d+)", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1], float(found[2]), float(found[3])


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    title, first, last = run(4, "--ep", "2", "--steps", "40", "--save", str(tmp_path))
    assert title == "fsdp2, 8 experts over 2 of 4 ranks, cpu"
    # An even guess among 32 letters costs log(32) = 3.47.
    assert 3.0 < first < 4.5
    assert last < 0.8 * first
    title, again, _ = run(2, "--load", str(tmp_path), "--wrapper", "ddp", "--steps", "1")
    assert title == "ddp, 8 experts over 2 of 2 ranks, cpu"
    # Other texts, the same model.
    assert again < 1.2 * last


@pytest.mark.slow
def test_page(tmp_path: Path) -> None:
    output = run_first_example("docs/fsdp.md", tmp_path)
    for rank in range(2):
        first, last = map(float, re.findall(rf"rank {rank}: (\d+\.\d) -> (\d+\.\d), w_down \(8, 64, 96\)", output)[0])
        assert last < 0.7 * first
