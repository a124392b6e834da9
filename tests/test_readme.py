"""The examples of the documentation run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_first_example(page: str, folder: Path) -> str:
    """Run the first Python block of a page on two processes and return what it prints."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)[0]
    script = folder / "example.py"
    script.write_text(example)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme(tmp_path: Path) -> None:
    output = run_first_example("README.md", tmp_path)
    for rank in range(2):
        assert f"rank {rank}: 4 of 8 experts, y ({100 + rank}, 64), dx " in output


def test_training_page(tmp_path: Path) -> None:
    output = run_first_example("docs/training.md", tmp_path)
    for rank in range(2):
        first, last = map(float, re.findall(rf"rank {rank}: (\d+\.\d) -> (\d+\.\d)", output)[0])
        assert last < 0.7 * first
