"""Where NVSHMEM is, without importing it: inside pip's isolated build an import fails though it is installed."""

import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Nvshmem:
    """One NVSHMEM to build against."""

    root: Path

    @property
    def include(self) -> Path:
        """Returns the folder of nvshmem.h."""
        return self.root / "include"

    @property
    def lib(self) -> Path:
        """Returns the folder of the host library and the device library."""
        return self.root / "lib"

    @cached_property
    def version(self) -> str:
        """Returns the version its headers state, such as 3.4.5."""
        text = (self.include / "non_abi" / "nvshmem_version.h").read_text(encoding="utf-8")
        numbers = [re.search(rf"NVSHMEM_VENDOR_{part}_VERSION (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
        return ".".join(found[1] for found in numbers if found)

    def missing(self) -> list[str]:
        """Returns the files that building needs and that are not there."""
        needed = ["include/nvshmem.h", "lib/libnvshmem_device.a", "lib/libnvshmem_host.so.3"]
        return [name for name in needed if not (self.root / name).exists()]


def find_nvshmem(environ: Mapping[str, str]) -> Nvshmem | None:
    """Returns the NVSHMEM of ``MOE_EP_NVSHMEM_DIR``, else the wheel of the build environment or of this interpreter.

    Raises:
        ValueError: when ``MOE_EP_NVSHMEM_DIR`` is set and the folder lacks a file that building needs.
    """
    asked = environ.get("MOE_EP_NVSHMEM_DIR", "")
    if asked:
        found = Nvshmem(Path(asked).resolve())
        if found.missing():
            raise ValueError(
                f"MOE_EP_NVSHMEM_DIR={asked!r}: lacks {', '.join(found.missing())}; name NVSHMEM's own folder"
            )
        return found
    # pip's build environment stands on sys.path; the interpreter's own packages are hidden there but stay in purelib.
    for folder in [*sys.path, sysconfig.get_path("purelib")]:
        found = Nvshmem(Path(folder or os.curdir) / "nvidia" / "nvshmem")
        if not found.missing():
            return found
    return None


def runtime_paths(found: Nvshmem) -> list[str]:
    """Returns where the extension looks for the host library: beside the installed package, then where it was built."""
    beside = "$ORIGIN/../nvidia/nvshmem/lib"
    installed = Path(sysconfig.get_path("purelib")) / "nvidia" / "nvshmem" / "lib"
    # A wheel in pip's build environment is gone after the build.
    folders = [installed] if "pip-build-env-" in str(found.lib) else [found.lib, installed]
    return list(dict.fromkeys([beside, *map(str, folders)]))
