"""The example runs as it is shipped, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.frameworks.deepspeed.without_shm", str(ROOT / "examples/deepspeed_train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=170, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output: str) -> dict[tuple[int, int], float]:
    """By rank and step. Two ranks may write to one line."""
    found = re.findall(r"rank (\d): step (\d+): loss (\d+\.\d+)", output)
    return {(int(rank), int(step)): float(loss) for rank, step, loss in found}


def test_example():
    found = losses(run("--steps", "60"))
    assert found.keys() == {(0, 0), (1, 0), (0, 59), (1, 59)}
    for rank in range(2):
        assert found[rank, 59] < 0.2 * found[rank, 0]
