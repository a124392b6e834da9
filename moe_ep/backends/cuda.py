"""The CUDA backend: the only module that loads ``moe_ep._C``, and only when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.distributed as dist

from moe_ep.errors import NotBuiltError


def load_extension() -> ModuleType:
    """The extension module ``moe_ep._C``.

    Raises:
        NotBuiltError: when it was not built, or cannot be loaded.
    """
    try:
        return importlib.import_module("moe_ep._C")
    except ImportError as error:
        raise NotBuiltError(
            f'backend="cuda" needs the extension module moe_ep._C, which cannot be imported here ({error}): install '
            'from source with nvcc on the PATH (pip install .), or use backend="torch"; `moe-ep doctor` shows more'
        ) from error


def why_not_cuda() -> str | None:
    """Why this process cannot use the CUDA backend; None where it can."""
    try:
        require_cuda()
    except NotBuiltError as error:
        return str(error)
    return None


def why_not_by_itself(group: dist.ProcessGroup | None) -> str | None:
    """Why the CUDA backend is not chosen unless it is asked for: nothing says that rows are on GPUs."""
    asked = 'ask for backend="cuda" to exchange rows on GPUs'
    if group is None:
        return f"without a process group nothing says where rows are; {asked}"
    # "cpu:gloo,cuda:nccl", or one of these.
    carriers = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(",") if ":" in entry)
    if carriers.get("cuda") != "nccl":
        return f"the process group moves tensors of GPUs by {carriers.get('cuda', 'nothing')}, not by nccl; {asked}"
    return None


def require_cuda() -> None:
    """Raise NotBuiltError where this process cannot use the CUDA backend."""
    if not torch.cuda.is_available():
        raise NotBuiltError(
            'backend="cuda" needs a GPU, and torch sees none here: use backend="torch" or "auto"; '
            "`moe-ep doctor` shows what is missing"
        )
    extension = load_extension()
    if not extension.build_info()["cuda"]:
        raise NotBuiltError(
            'backend="cuda" needs CUDA kernels, and moe_ep._C was built without: install from source where nvcc is '
            'found, or use backend="torch"'
        )
    device = torch.cuda.current_device()
    problem = extension.kernel_problem(device)
    if problem:
        major, minor = torch.cuda.get_device_capability(device)
        raise NotBuiltError(
            f'backend="cuda": kernels built for {" ".join(extension.build_info()["cuda_archs"])} do not run on GPU '
            f"{device}, of compute capability {major}.{minor} ({problem}): reinstall with "
            f'MOE_EP_CUDA_ARCHS={major}{minor}, or use backend="torch"'
        )
