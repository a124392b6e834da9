"""Which releases of a framework an adapter was written for."""

import re
from importlib import metadata


def require(package: str, *, at_least: str, below: str) -> None:
    """Raise unless ``package`` is installed in a supported release.

    Args:
        package: name of the distribution.
        at_least: the oldest release that the adapter's tests run with.
        below: the first release that is not promised to work.

    Raises:
        ImportError: names what is installed and the command that mends it.
    """
    remedy = f'pip install "{package}>={at_least},<{below}"'
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed: {remedy}") from None
    if not _numbers(at_least) <= _numbers(found) < _numbers(below):
        raise ImportError(
            f"{package} is {found}; this adapter relies on interfaces of {at_least} and later, below {below}: {remedy}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Major, minor and micro; what follows them (``rc1``, ``+cu126``) does not count."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return tuple(int(part) for part in (found.group() if found else "0").split("."))
