"""The CUDA backend: the only module that loads ``moe_ep._C``, and only when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

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
