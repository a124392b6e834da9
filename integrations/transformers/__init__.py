"""Hugging Face transformers with moe_ep carrying tokens to the ranks of their experts.

Importing this registers ``"moe_ep"`` with transformers. With 5.23 and later a model is sharded as it is loaded:
``DistributedConfig(ep_size=..., ep_implementation="moe_ep")``. With 5.0 and later, under DDP, accelerate, ``Trainer``
and PEFT, ``parallelize(model, group)`` shards a model that is loaded.
"""

from moe_ep.integrations.versions import require

require("transformers", at_least="5.0.0", below="6")

# NOTE: below the check, so that a version without these names is named by it and not by a failing import.
from moe_ep.integrations.transformers.checkpoint import gather_state_dict, save_pretrained  # noqa: E402
from moe_ep.integrations.transformers.experts import (  # noqa: E402
    dispatchers,
    expert_parameters,
    ignore_experts_in_ddp,
)
from moe_ep.integrations.transformers.parallelize import parallelize  # noqa: E402
from moe_ep.integrations.transformers.versions import has_ep_registry  # noqa: E402

# Earlier releases have no registry of ways to reach experts, and refuse an ep_implementation themselves.
if has_ep_registry():
    import moe_ep.integrations.transformers.registry  # noqa: F401

__all__ = [
    "dispatchers",
    "expert_parameters",
    "gather_state_dict",
    "ignore_experts_in_ddp",
    "parallelize",
    "save_pretrained",
]
