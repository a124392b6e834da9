"""The compilers: which g++ and nvcc are used, and which GPU architectures this nvcc can compile for."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DEFAULT_ARCHS = "80+PTX 90a 100f"

# First nvcc that knows each kind of target, beside the number itself: "a" targets one chip, "f" its family.
_FIRST_NVCC = {"": (11, 0), "a": (12, 0), "f": (12, 9)}


@dataclass(frozen=True)
class Arch:
    """One GPU target: compute capability (90 is 9.0), suffix "", "a" or "f", and whether PTX goes along."""

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def name(self) -> str:
        """Returns the target as ``MOE_EP_CUDA_ARCHS`` spells it, such as 90a."""
        return f"{self.number}{self.suffix}"

    def gencode(self, *, ptx: bool) -> list[str]:
        """Returns nvcc's flags for this target; PTX is left out of relocatable code, which no driver links."""
        code = f"-gencode=arch=compute_{self.name},code="
        return [f"{code}sm_{self.name}", *([f"{code}compute_{self.name}"] if self.ptx and ptx else [])]


@dataclass(frozen=True)
class Nvcc:
    """One CUDA compiler."""

    path: str

    @cached_property
    def version(self) -> tuple[int, int]:
        """Returns the toolkit's (major, minor)."""
        text = subprocess.run([self.path, "--version"], check=True, capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", text)
        if not found:
            raise RuntimeError(f"{self.path} --version names no release: {text.strip()!r}")
        return int(found[1]), int(found[2])

    @cached_property
    def numbers(self) -> frozenset[int]:
        """Returns the compute capabilities that this compiler makes machine code for."""
        text = subprocess.run([self.path, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
        return frozenset(int(number) for number in re.findall(r"sm_(\d+)", text))

    def knows(self, arch: Arch) -> bool:
        """Tells whether this compiler has the target."""
        return arch.number in self.numbers and self.version >= _FIRST_NVCC[arch.suffix]


def parse_archs(text: str) -> list[Arch]:
    """Reads targets such as ``80+PTX;90a`` (separated by blanks, commas or semicolons).

    Raises:
        ValueError: when nothing is named, or a name is not a number with an optional a or f and an optional +PTX.
    """
    archs = []
    for name in re.split(r"[\s,;]+", text.strip()):
        found = re.fullmatch(r"(\d{2,3})([af]?)(\+PTX)?", name)
        if not found:
            raise ValueError(f"MOE_EP_CUDA_ARCHS={text!r}: {name!r} is no target; write e.g. '80+PTX 90a 100f'")
        archs.append(Arch(int(found[1]), found[2], found[3] is not None))
    return archs


def select_archs(environ: Mapping[str, str], nvcc: Nvcc) -> list[Arch]:
    """Returns the targets to compile: those of ``MOE_EP_CUDA_ARCHS``, else the default ones that ``nvcc`` knows.

    Raises:
        ValueError: when a target that was asked for is unknown to this compiler.
    """
    asked = environ.get("MOE_EP_CUDA_ARCHS", "").strip()
    archs = parse_archs(asked or DEFAULT_ARCHS)
    unknown = [arch.name for arch in archs if not nvcc.knows(arch)]
    if not asked:
        archs = [arch for arch in archs if nvcc.knows(arch)]
    if unknown and (asked or not archs):
        version, numbers = "{}.{}".format(*nvcc.version), ", ".join(map(str, sorted(nvcc.numbers)))
        raise ValueError(
            f"MOE_EP_CUDA_ARCHS={asked or DEFAULT_ARCHS!r}: nvcc {version} does not know {', '.join(unknown)}; it "
            f"compiles for {numbers} (with the suffix a from 12.0 on, f from 12.9 on)"
        )
    return archs


def find_nvcc(environ: Mapping[str, str]) -> Nvcc | None:
    """Returns the compiler of ``CUDA_HOME`` or ``CUDA_PATH``, else the one on PATH, else that of /usr/local/cuda."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    for candidate in [*(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]:
        path = shutil.which(candidate, path=environ.get("PATH"))
        if path:
            return Nvcc(path)
    return None


def host_compiler(environ: Mapping[str, str]) -> list[str]:
    """Returns the C++ compiler's command: ``CXX``, else the C++ driver that belongs to ``CC``, else g++."""
    if environ.get("CXX"):
        return shlex.split(environ["CXX"])
    if environ.get("CC"):
        *launcher, compiler = shlex.split(environ["CC"])
        folder, name = os.path.split(compiler)
        for c_name, cxx_name in (("clang", "clang++"), ("gcc", "g++")):
            if c_name in name and cxx_name not in name:
                return [*launcher, os.path.join(folder, name.replace(c_name, cxx_name))]
        return [*launcher, compiler]
    return ["g++"]


def nvcc_host_compiler(environ: Mapping[str, str]) -> list[str]:
    """Returns nvcc's ``-ccbin`` flags: ``NVCC_CCBIN``, else the compiler that ``CXX`` or ``CC`` name, else none."""
    if environ.get("NVCC_CCBIN"):
        return ["-ccbin", environ["NVCC_CCBIN"]]
    if environ.get("CXX") or environ.get("CC"):
        return ["-ccbin", host_compiler(environ)[-1]]
    return []
