"""What ``moe-ep doctor`` looks at outside this package: torch, GPUs, the CUDA compiler, NVSHMEM."""

import ctypes
import os
import re
import shutil
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist

from moe_ep.cli.findings import (
    REBUILD_CUDA,
    REINSTALL_CUDA_TORCH,
    REINSTALL_TORCH,
    Finding,
    one_line,
    run_command,
)


def examine_torch() -> list[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    findings = [Finding(part="torch", name="torch", state="ok", found=f"{torch.__version__}, built for {build}")]
    if not dist.is_available():
        missing = Finding(
            part="torch",
            name="torch.distributed",
            state="absent",
            found="this torch is built without it",
            cost="one process only: dispatchers work with group=None",
            remedy=REINSTALL_TORCH,
        )
        return [*findings, missing]
    backends = (
        ("gloo", dist.is_gloo_available(), "groups of CPU processes", REINSTALL_TORCH),
        (
            "nccl",
            dist.is_nccl_available(),
            "the torch backend over several GPUs, and the control plane frameworks use there",
            "nothing where there are no NVIDIA GPUs, else " + REINSTALL_CUDA_TORCH,
        ),
        (
            "mpi",
            dist.is_mpi_available(),
            "process groups of the backend mpi",
            "nothing: groups of gloo or nccl do the same, also under mpirun",
        ),
    )
    for name, available, use, remedy in backends:
        if available:
            version = f"NCCL {_nccl_version()}" if name == "nccl" else "available"
            findings.append(Finding(part="torch", name=name, state="ok", found=version))
        else:
            findings.append(
                Finding(part="torch", name=name, state="absent", found="not in this torch", cost=use, remedy=remedy)
            )
    return findings


def examine_gpus() -> list[Finding]:
    """GPUs, their driver, and which of them reach each other's memory."""
    driver, smi = driver_version(), run_command(["nvidia-smi", "-L"])
    listed = len(re.findall(r"^GPU \d+", smi, re.MULTILINE))
    if driver is None and not listed:
        return [
            Finding(
                part="gpu",
                name="GPUs",
                state="absent",
                found="no NVIDIA driver",
                cost="the torch backend serves, on the CPU",
                remedy="nothing where there are no NVIDIA GPUs, else install their driver until nvidia-smi lists them",
            )
        ]
    findings = [Finding(part="gpu", name="driver", state="ok", found=f"supports CUDA {driver or 'unknown'}")]
    if torch.version.cuda is None:
        absent = Finding(
            part="gpu",
            name="GPUs",
            state="absent",
            found=f"{listed} here, but this torch is built for the CPU only",
            cost="no GPU can be used",
            remedy=REINSTALL_CUDA_TORCH,
        )
        return [*findings, absent]
    return findings + _examine_cuda(listed)


def _examine_cuda(listed: int) -> list[Finding]:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        state = "note" if hidden in ("", "-1") or not listed else "broken"
        remedy = (
            "a newer driver, or a torch built for the CUDA version the driver supports" if state == "broken" else ""
        )
        return [
            Finding(
                part="gpu", name="GPUs", state=state, found=f"CUDA does not start: {one_line(error)}", remedy=remedy
            )
        ]
    count = torch.cuda.device_count()
    findings = []
    for index in range(count):
        props = torch.cuda.get_device_properties(index)
        found = (
            f"{props.name}, compute capability {props.major}.{props.minor}, {props.multi_processor_count} SMs, "
            f"{props.total_memory / 2**30:.0f} GiB"
        )
        findings.append(Finding(part="gpu", name=f"GPU {index}", state="ok", found=found))
    if count > 1:
        findings.append(_examine_peer_access(count))
    return findings


def _examine_peer_access(count: int) -> Finding:
    blocked = [
        f"{a}-{b}" for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if not blocked:
        return Finding(part="gpu", name="peer access", state="ok", found=f"all {count} GPUs reach each other")
    return Finding(
        part="gpu",
        name="peer access",
        state="absent",
        found=f"none between {', '.join(blocked)}",
        cost="the cuda backend cannot span those pairs; the torch backend over NCCL serves them",
        remedy="GPUs joined by NVLink, or PCIe peer-to-peer allowed (`nvidia-smi topo -p2p r` shows it)",
    )


def examine_tools() -> list[Finding]:
    """The CUDA compiler and NVSHMEM: needed to build, the latter also to run between nodes."""
    nvcc = shutil.which("nvcc") or next(
        (str(path) for path in (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc",) if path.exists()),
        None,
    )
    if nvcc is None:
        compiler = Finding(
            part="tools",
            name="nvcc",
            state="absent",
            found="not on PATH, in CUDA_HOME or in /usr/local/cuda",
            cost="the CUDA kernels cannot be built here",
            remedy="install the CUDA toolkit, or set CUDA_HOME to it, then " + REBUILD_CUDA,
        )
    else:
        release = re.search(r"release ([\d.]+)", run_command([nvcc, "--version"]))
        found = f"CUDA {release[1]} at {nvcc}" if release else f"{nvcc} does not say its version"
        compiler = Finding(part="tools", name="nvcc", state="ok" if release else "broken", found=found)
    return [compiler, examine_nvshmem()]


def examine_nvshmem() -> Finding:
    """The NVSHMEM that would be found at run time, in ``MOE_EP_NVSHMEM_DIR`` or among the installed packages."""
    asked = os.environ.get("MOE_EP_NVSHMEM_DIR")
    root = Path(asked) if asked else Path(sysconfig.get_path("purelib"), "nvidia", "nvshmem")
    libraries = sorted(root.glob("lib/libnvshmem_host.so*"))
    if libraries:
        return Finding(part="tools", name="nvshmem", state="ok", found=f"{_nvshmem_version(root)} in {root}")
    if asked:
        return Finding(
            part="tools",
            name="nvshmem",
            state="broken",
            found=f"MOE_EP_NVSHMEM_DIR={asked} holds no lib/libnvshmem_host.so",
            remedy="name NVSHMEM's own folder, or unset MOE_EP_NVSHMEM_DIR",
        )
    return Finding(
        part="tools",
        name="nvshmem",
        state="absent",
        found="no nvidia-nvshmem package",
        cost="the CUDA kernels between nodes",
        remedy="pip install 'moe_ep[cu13]' (cu12 for CUDA 12), then build moe_ep._C_internode",
    )


def driver_version() -> str | None:
    """Newest CUDA version the installed driver supports, such as ``13.0``; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _nvshmem_version(root: Path) -> str:
    header = root / "include" / "non_abi" / "nvshmem_version.h"
    if header.exists():
        text = header.read_text()
        numbers = [re.search(rf"NVSHMEM_VENDOR_{part}_VERSION (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
        return ".".join(number[1] for number in numbers if number)
    return "version unknown (no headers)"


def _nccl_version() -> str:
    version = torch.cuda.nccl.version()
    return ".".join(str(part) for part in version) if isinstance(version, tuple) else str(version)
