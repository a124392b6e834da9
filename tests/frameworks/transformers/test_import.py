"""The adapter imports with releases of transformers that it was written for, and names the remedy for others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
from importlib import metadata

installed = metadata.version
for release in ("4.57.6", "6.0.0"):
    metadata.version = lambda name: release if name == "transformers" else installed(name)
    try:
        import moe_ep.integrations.transformers
    except ImportError as error:
        print(error)
"""


def test_other_releases_are_refused_with_the_command_that_mends_it() -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert [line.partition(";")[0] for line in refusals] == ["transformers is 4.57.6", "transformers is 6.0.0"]
    assert all(line.endswith('pip install "transformers>=5.0.0,<6"') for line in refusals)
