"""Import this as ``moe_ep.layers``: the folder is linked into the package."""

if __name__ == "layers":
    raise ImportError(
        "import moe_ep.layers, not the top-level folder layers: run from elsewhere or install the package"
    )

from moe_ep.layers.experts import GroupedExperts
from moe_ep.layers.moe import MoELayer
from moe_ep.layers.router import Routing, TopKRouter, set_loss_scale
from moe_ep.layers.shared import SharedExpert
from moe_ep.layers.state import (
    expert_parameters,
    gather_full_state_dict,
    ignore_experts_in_ddp,
    load_full_state_dict,
    reshard,
    scale_expert_gradients,
)

__all__ = [
    "GroupedExperts",
    "MoELayer",
    "Routing",
    "SharedExpert",
    "TopKRouter",
    "expert_parameters",
    "gather_full_state_dict",
    "ignore_experts_in_ddp",
    "load_full_state_dict",
    "reshard",
    "scale_expert_gradients",
    "set_loss_scale",
]
