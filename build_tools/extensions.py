"""What there is to build, and with which commands: moe_ep._C always, moe_ep._C_internode where NVSHMEM is."""

import os
import platform
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from build_tools.compiler import Builder, CompileError, Step
from build_tools.nvshmem import Nvshmem, find_nvshmem, runtime_paths
from build_tools.project import ROOT, nvshmem_requirements
from build_tools.toolkit import Arch, Nvcc, find_nvcc, host_compiler, nvcc_host_compiler, select_archs

_CXX_FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
_NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# Nothing of the static CUDA run time may be seen by torch's own copy, and the other way round.
_LINK_FLAGS = ["--exclude-libs,ALL", "--as-needed", "-z,relro,-z,now"]


@dataclass(frozen=True)
class BuildPlan:
    """What this machine and its environment allow.

    Attributes:
        nvcc: compiler of the CUDA sources, None without them.
        archs: targets of the CUDA sources.
        nvshmem: what ``_C_internode`` is built against, None without it.
        notes: per part that is left out, why, and how to get it.
    """

    nvcc: Nvcc | None = None
    archs: list[Arch] = field(default_factory=list)
    nvshmem: Nvshmem | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Returns the one line that says what is built and what is not."""
        built = "moe_ep._C"
        if self.nvcc:
            names = " ".join(arch.name + ("+PTX" if arch.ptx else "") for arch in self.archs)
            built += " with the CUDA {}.{} kernels".format(*self.nvcc.version) + f" for {names}"
        if self.nvshmem:
            built += f", moe_ep._C_internode with NVSHMEM {self.nvshmem.version}"
        left_out = "; ".join(f"{part} ({reason})" for part, reason in self.notes.items())
        return f"moe_ep: built {built}; not built: {left_out or 'nothing'}"


def make_plan(environ: Mapping[str, str]) -> BuildPlan:
    """Decides what to build.

    Raises:
        ValueError: when the environment asks for what cannot be built here, or holds a value that is not known.
    """
    with_cuda = _switch(environ, "MOE_EP_WITH_CUDA", ("0", "1", "auto"))
    with_nvshmem = environ.get("MOE_EP_WITH_NVSHMEM", "")
    must_have_nvshmem = bool(nvshmem_requirements()) or with_nvshmem == "1"
    nvcc = None if with_cuda == "0" else find_nvcc(environ)
    if nvcc is None:
        reason = "MOE_EP_WITH_CUDA=0" if with_cuda == "0" else "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda"
        if with_cuda == "1" or must_have_nvshmem:
            asked = f"MOE_EP_WITH_NVSHMEM={with_nvshmem}" if must_have_nvshmem else "MOE_EP_WITH_CUDA=1"
            raise ValueError(f"{asked} asks for CUDA sources, but there is no compiler for them: {reason}")
        return BuildPlan(
            notes={"the CUDA kernels": f"{reason}; the torch backend serves", "moe_ep._C_internode": "needs CUDA"}
        )
    archs = select_archs(environ, nvcc)
    if with_nvshmem == "0":
        return BuildPlan(nvcc, archs, notes={"moe_ep._C_internode": "MOE_EP_WITH_NVSHMEM=0"})
    nvshmem = find_nvshmem(environ)
    if nvshmem is None:
        reason = "NVSHMEM not found: set MOE_EP_NVSHMEM_DIR, or MOE_EP_WITH_NVSHMEM=cu{}".format(nvcc.version[0])
        if must_have_nvshmem:
            raise ValueError(f"MOE_EP_WITH_NVSHMEM={with_nvshmem}: {reason}")
        return BuildPlan(nvcc, archs, notes={"moe_ep._C_internode": reason})
    return BuildPlan(nvcc, archs, nvshmem)


def build(plan: BuildPlan, environ: Mapping[str, str]) -> dict[str, Path]:
    """Compiles and links what the plan holds; returns the file of each extension module by its name."""
    commands = Commands(plan, environ)
    jobs = int(environ.get("MAX_JOBS") or os.cpu_count() or 1)
    builder = Builder(ROOT / "build" / "objects", root=ROOT, aliases=commands.aliases, jobs=jobs)
    core, internode = commands.core_sources(), commands.internode_sources()
    # One pool for both modules, CUDA sources first: they take longest.
    sources = sorted([*core, *internode], key=lambda source: source.suffix != ".cu")
    objects = dict(zip(sources, builder.run(commands.compile(source) for source in sources), strict=True))
    modules = {"moe_ep._C": [objects[source] for source in core]}
    if internode:
        modules["moe_ep._C_internode"] = [objects[source] for source in internode]
    linked = builder.run(commands.link(name, inputs) for name, inputs in modules.items())
    return dict(zip(modules, linked, strict=True))


class Commands:
    """The command lines of one build plan."""

    def __init__(self, plan: BuildPlan, environ: Mapping[str, str]) -> None:
        import pybind11

        self._plan = plan
        self._cxx = host_compiler(environ)
        self._ccbin = nvcc_host_compiler(environ)
        self._user_flags = environ.get("CXXFLAGS", "").split()
        pybind_include = pybind11.get_include()
        self._includes = [f"-I{ROOT / 'csrc'}", "-isystem", pybind_include, "-isystem", sysconfig.get_path("include")]
        self.aliases = {pybind_include: f"pybind11-{pybind11.__version__}"}
        self._cxx_version = f"{_first_line([*self._cxx, '--version'])} {platform.machine()}"
        self._cuda_version = self._cxx_version
        if plan.nvcc:
            flags = [environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
            self._cuda_version += " nvcc {}.{} {} {}".format(*plan.nvcc.version, *flags)
        self._internode_version = f"{self._cuda_version} nvshmem {plan.nvshmem.version if plan.nvshmem else ''}"

    def core_sources(self) -> list[Path]:
        """Returns the sources of ``_C``: host code always, with nvcc what includes CUDA's headers and CUDA sources."""
        sources = _sources("*.cpp", ".", "host", "bindings")
        return sources + _sources("*.cpp", "host/cuda") + _sources("*.cu", "kernels") if self._plan.nvcc else sources

    def internode_sources(self) -> list[Path]:
        """Returns the sources of ``_C_internode``: none without NVSHMEM."""
        return _sources("*.cpp", "internode") + _sources("*.cu", "internode") if self._plan.nvshmem else []

    def compile(self, source: Path) -> Step:
        """Returns the command that compiles one source."""
        internode = source.parent.name == "internode"
        name = f"{source.parent.name}_{source.stem}.o"
        nvshmem = ["-isystem", str(self._nvshmem.include)] if internode else []
        if source.suffix == ".cu":
            flags = [*_NVCC_FLAGS, *self._ccbin, *self._gencode(relocatable=internode), f"-I{ROOT / 'csrc'}", *nvshmem]
            flags += ["-rdc=true"] if internode else []
            version = self._internode_version if internode else self._cuda_version
            return Step(name, [self._nvcc.path, *flags, "-c"], [source], version, "-MMD")
        flags = [
            *_CXX_FLAGS,
            *self._user_flags,
            *self._includes,
            f"-DMOE_EP_WITH_CUDA={int(self._plan.nvcc is not None)}",
        ]
        flags += self._build_info() if source.stem == "build_info" else []
        if internode or source.parent.name == "cuda":
            flags += [*nvshmem, "-isystem", str(self._cuda_include)]
            version = self._internode_version if internode else self._cuda_version
        else:
            version = self._cxx_version
        return Step(name, [*self._cxx, *flags, "-c"], [source], version, "-MMD")

    def link(self, module: str, objects: list[Path]) -> Step:
        """Returns the command that links one extension module."""
        name = module.rpartition(".")[2] + ".so"
        if self._plan.nvcc is None:
            flags = [f"-Wl,{flag}" for flag in _LINK_FLAGS]
            return Step(name, [*self._cxx, "-shared", *flags], objects, self._cxx_version)
        # nvcc knows where its run time and, for relocatable code, its device linker's library are.
        relocatable = module == "moe_ep._C_internode"
        flags = ["-shared", "--cudart=static", *self._ccbin, *self._gencode(relocatable=relocatable)]
        flags += [f"-Xlinker={flag}" for flag in _LINK_FLAGS]
        if relocatable:
            flags += ["-rdc=true", f"-L{self._nvshmem.lib}", "-lnvshmem_device", "-l:libnvshmem_host.so.3"]
            flags += [f"-Xlinker=-rpath,{path}" for path in runtime_paths(self._nvshmem)]
        return Step(name, [self._nvcc.path, *flags], objects, self._internode_version)

    @property
    def _nvcc(self) -> Nvcc:
        assert self._plan.nvcc is not None
        return self._plan.nvcc

    @property
    def _nvshmem(self) -> Nvshmem:
        assert self._plan.nvshmem is not None
        return self._plan.nvshmem

    def _gencode(self, *, relocatable: bool) -> list[str]:
        return [flag for arch in self._plan.archs for flag in arch.gencode(ptx=not relocatable)]

    @cached_property
    def _cuda_include(self) -> Path:
        # NOTE: nvcc may be a wrapper script far from its toolkit, so the compiler itself is asked where it stands.
        command = [self._nvcc.path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True).stderr
        top = next((line.split("=", 1)[1].strip() for line in text.splitlines() if line.startswith("#$ TOP=")), None)
        return Path(top) / "include" if top else Path(self._nvcc.path).resolve().parents[1] / "include"

    def _build_info(self) -> list[str]:
        plan = self._plan
        texts = {
            "CUDA_ARCHS": " ".join(arch.name + ("+PTX" if arch.ptx else "") for arch in plan.archs),
            "CUDA_VERSION": "{}.{}".format(*plan.nvcc.version) if plan.nvcc else "",
            "NVSHMEM_VERSION": plan.nvshmem.version if plan.nvshmem else "",
            "BUILD_NOTES": "; ".join(f"{part}: {reason}" for part, reason in plan.notes.items()),
        }
        return [f'-DMOE_EP_{name}="{text}"' for name, text in texts.items()]


def _sources(pattern: str, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / "csrc" / folder).glob(pattern))


def _switch(environ: Mapping[str, str], name: str, values: tuple[str, ...]) -> str:
    value = environ.get(name, "") or "auto"
    if value not in values:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(values)}")
    return value


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(
            f"{command[0]} is no working C++ compiler ({error}): install g++, or name one in CXX"
        ) from error
