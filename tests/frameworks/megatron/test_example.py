"""The example runs as it is, on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def test_example() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.frameworks.megatron.run_on_cpu", str(ROOT / "examples" / "megatron_gpt.py")]
    command += ["--device", "cpu", "--steps", "60", "--shared-expert"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = re.search(r"2 MoE layers, 8 experts on 2 ranks: loss (\d+\.\d+) -> (\d+\.\d+)", done.stdout)
    assert found, done.stdout + done.stderr
    # An even guess among 32 letters costs log(32) = 3.47.
    assert 3.0 < float(found[1]) < 5.0
    assert float(found[2]) < 0.7 * float(found[1])
