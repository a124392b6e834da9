"""FSDP2, DDP and distributed checkpoints around :class:`moe_ep.layers.MoELayer`; nothing but torch is needed.

    apply_ep(model, mesh)
    fully_shard(model, mesh=dense_mesh(mesh))

Experts become DTensors of all experts, ``Shard(0)`` over the mesh dimension ``ep``, so checkpoints are resharded by
``torch.distributed.checkpoint`` alone, and their gradients are those of the mean over all ranks' losses.
"""

from moe_ep.integrations.fsdp.clip import clip_grad_norm_
from moe_ep.integrations.fsdp.ddp import wrap_ddp
from moe_ep.integrations.fsdp.groups import parameter_groups
from moe_ep.integrations.fsdp.mesh import dense_mesh
from moe_ep.integrations.fsdp.shard import apply_ep

__all__ = ["apply_ep", "clip_grad_norm_", "dense_mesh", "parameter_groups", "wrap_ddp"]
