"""What the installed transformers offers."""

import importlib
import importlib.util


def has_ep_registry() -> bool:
    """Whether others may register how experts get their tokens: 5.23 and later."""
    name = "transformers.distributed.expert_parallel"
    if importlib.util.find_spec("transformers.distributed") is None or importlib.util.find_spec(name) is None:
        return False
    return hasattr(importlib.import_module(name), "EPImplementationInterface")
