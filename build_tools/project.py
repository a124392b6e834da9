"""What pyproject.toml and the environment say is needed to build, install, test and lint the package."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ImportError:
        # A new venv of Python 3.10 holds nothing but pip, which carries the same parser.
        from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def read_pyproject() -> dict:
    """Returns pyproject.toml as nested dicts."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def nvshmem_requirements() -> list[str]:
    """Returns the wheel that ``MOE_EP_WITH_NVSHMEM=cu12|cu13`` asks for.

    It is the oldest that the extra of that name allows at run time: newer libraries serve what older ones built.

    Raises:
        ValueError: for a value outside cu12, cu13, 0 and 1 (0: do not build against NVSHMEM, 1: one must be found).
    """
    choice = os.environ.get("MOE_EP_WITH_NVSHMEM", "")
    if choice in ("", "0", "1"):
        return []
    if choice not in ("cu12", "cu13"):
        raise ValueError(
            f"MOE_EP_WITH_NVSHMEM={choice!r}: must be cu12, cu13, 0 or 1; leave it unset to use what is found"
        )
    (allowed,) = read_pyproject()["project"]["optional-dependencies"][choice]
    return [re.sub(r">=([\d.]+).*", r"==\1", allowed)]


def requirements(extras: list[str]) -> list[str]:
    """Returns what an install with the given extras needs, without the package itself, and what building it needs."""
    pyproject = read_pyproject()
    project = pyproject["project"]
    found = [*pyproject["build-system"]["requires"], *nvshmem_requirements(), *project["dependencies"]]
    for extra in extras:
        found.extend(_expand(project["optional-dependencies"], extra))
    return list(dict.fromkeys(found))


def _expand(optional: dict[str, list[str]], extra: str) -> Iterator[str]:
    for requirement in optional[extra]:
        inner = re.fullmatch(r"moe_ep\[(\w+)\]", requirement)
        if inner:
            yield from _expand(optional, inner[1])
        else:
            yield requirement


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(sys.argv[1:])) + "\n")
