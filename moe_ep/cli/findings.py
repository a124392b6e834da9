"""What ``moe-ep doctor`` reports: one finding per thing looked for."""

import subprocess
from dataclasses import dataclass

COMMAND_SECONDS = 20
REBUILD = "pip install -e . (in the source tree)"
REBUILD_CUDA = "MOE_EP_WITH_CUDA=1 " + REBUILD
# Without --force-reinstall pip keeps the torch that is there, whatever it was built for.
REINSTALL_TORCH = "pip install torch --force-reinstall"
REINSTALL_CUDA_TORCH = REINSTALL_TORCH + " --index-url https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        part: what it belongs to: python, torch, gpu, extensions, tools, packages, backend, notes.
        name: the thing looked for.
        state: ``ok``, ``absent`` (not there, and nothing needs it), ``broken`` (there, and does not work), ``note``.
        found: what was found, or why it is broken.
        cost: what its absence costs; empty when nothing is missing.
        remedy: the command or setting that mends it, or that nothing is needed; empty when nothing is missing.
    """

    part: str
    name: str
    state: str
    found: str
    cost: str = ""
    remedy: str = ""


def run_command(command: list[str]) -> str:
    """Output of a command; empty when it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def one_line(error: BaseException) -> str:
    """Type and text of an error, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
