"""The interface that MoE frameworks call ``deep_ep``, served by moe_ep.

``install()`` makes ``import deep_ep`` give this module, and a framework that knows that name uses moe_ep unchanged:

    from moe_ep.integrations import deep_ep
    deep_ep.install()       # before the framework is imported

What the classes do is said where they are defined: ``moe_ep.Buffer``, whose handles live longer here, ``Config``,
``EventOverlap``, ``EventHandle``.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch

from moe_ep.config import Config
from moe_ep.events import EventHandle, EventOverlap
from moe_ep.integrations.deep_ep import buffer, utils
from moe_ep.integrations.deep_ep.buffer import Buffer

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "install", "topk_idx_t", "uninstall", "utils"]

topk_idx_t = torch.int64

_NAME = "deep_ep"
# What looks for deep_ep while it is imported, and keeps the answer.
_DECIDED_AT_IMPORT = ("megatron.core.transformer.moe.fused_a2a",)


def install(*, replace: bool = False) -> ModuleType:
    """Make ``import deep_ep`` and ``import deep_ep.utils`` give this module, in this process.

    Args:
        replace: whether to take the place of a ``deep_ep`` that is installed or already imported.

    Returns:
        This module. A second call changes nothing.

    Raises:
        ImportError: when another ``deep_ep`` would be shadowed, or when a framework that looks for it has already been
            imported and would not notice.

    Example:
        >>> module = install()
        >>> import deep_ep
        >>> deep_ep is module
        True
        >>> uninstall()
    """
    this = sys.modules[__name__]
    if sys.modules.get(_NAME) is this:
        return this
    if not replace and (origin := _other()) is not None:
        raise ImportError(f"deep_ep is already here ({origin}): uninstall it, or call install(replace=True) first")
    for module in _DECIDED_AT_IMPORT:
        if module in sys.modules:
            raise ImportError(
                f"{module} has been imported already and will not look for deep_ep again: call install() before it is"
            )
    sys.modules.update(_modules())
    return this


def uninstall() -> None:
    """Undo :func:`install`: the next ``import deep_ep`` finds what is installed. Who imported this module keeps it."""
    if sys.modules.get(_NAME) is sys.modules[__name__]:
        for name in _modules():
            sys.modules.pop(name, None)


def _modules() -> dict[str, ModuleType]:
    return {_NAME: sys.modules[__name__], f"{_NAME}.buffer": buffer, f"{_NAME}.utils": utils}


def _other() -> str | None:
    """Where another ``deep_ep`` comes from, None where there is none."""
    if _NAME in sys.modules:
        return str(getattr(sys.modules[_NAME], "__file__", "imported"))
    found = importlib.util.find_spec(_NAME)
    return None if found is None else str(found.origin)
