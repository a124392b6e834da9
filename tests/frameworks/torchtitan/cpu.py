"""torchtitan on a machine without a GPU; import this before torchtitan, or run a script with it.

``python -m tests.frameworks.torchtitan.cpu SCRIPT`` runs a script that itself knows nothing of this.
"""

import importlib.util
import runpy
import sys
from types import ModuleType
from unittest import mock

import torch

_KERNELS = "torchtitan.distributed.minimal_async_ep"
_NAMES = ("combine_op", "dispatch_op", "init_buffer", "MinimalAsyncEPDispatchMetadata")


def _missing(*_: object, **__: object) -> None:
    raise RuntimeError("MinimalAsyncEP's kernels need triton")


def install() -> None:
    """Stand in for triton's kernels where triton is missing, and name the CPU as torchtitan's device."""
    if importlib.util.find_spec("triton") is None and _KERNELS not in sys.modules:
        package, api = ModuleType(_KERNELS), ModuleType(f"{_KERNELS}.api")
        for name in _NAMES:
            setattr(package, name, _missing)
        # Fills the configs of that dispatcher alone, of which there are none.
        api.maybe_update_minimal_async_ep_config = lambda *_: None
        sys.modules[_KERNELS], sys.modules[api.__name__] = package, api
    if not torch.cuda.is_available():
        # It takes the name "cuda" where torch names no accelerator, and keeps it from its import on.
        with mock.patch.object(torch._utils, "_get_available_device_type", return_value="cpu"):
            import torchtitan.tools.utils  # noqa: F401


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
