"""Which releases of Megatron-Core the adapter is written for."""

from __future__ import annotations

import re

TESTED = (0, 16)
# NOTE: a later release may add stages to the dispatcher that would silently never run here.
NEWEST = (0, 20)
_PIN = "megatron-core==0.16.1"


def check_version(found: str) -> None:
    """Raise ImportError, naming the remedy, for a release that the adapter does not know.

    Args:
        found: ``megatron.core.__version__``.
    """
    numbers = re.match(r"(\d+)\.(\d+)", found)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not TESTED <= release <= NEWEST:
        raise ImportError(
            f"megatron-core {found} is not supported: moe_ep.integrations.megatron is written for "
            f"{_dotted(TESTED)} to {_dotted(NEWEST)} and tested with {_PIN}: pip install {_PIN}"
        )


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
