"""``ep_implementation="moe_ep"`` of ``DistributedConfig``, transformers 5.23 and later."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moe_ep.integrations.transformers.exchange import ExpertExchange
from moe_ep.integrations.transformers.experts import ATTRIBUTE


class MoeEpExperts(EPImplementation):
    """Brings the experts of one layer their tokens. Built by transformers, one per experts module.

    Args:
        experts: the module, whose parameters are this rank's already.
        ep_mesh: ranks that together hold all experts.
        tp_mesh: ranks that hold the same batch; each carries a slice of it.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.exchange = ExpertExchange(ep_mesh, self.num_local_experts * ep_mesh.size())
        setattr(experts, ATTRIBUTE, self)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Collective over ``ep_mesh``; arguments and result as in ``ExpertExchange``."""
        if self.tp_mesh.size() == 1:
            return self.exchange(self.experts_forward, hidden_states, top_k_index, top_k_weights)
        own = (_own_rows(t, self.tp_mesh) for t in (hidden_states, top_k_index, top_k_weights))
        return _all_rows(self.exchange(self.experts_forward, *own), hidden_states.shape[0], self.tp_mesh)


def _own_rows(shared: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of what all ranks of ``mesh`` hold; its gradient is gathered from them."""
    whole = DTensor.from_local(shared, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(0)]).to_local()


def _all_rows(own: Tensor, num_rows: int, mesh: DeviceMesh) -> Tensor:
    """The inverse of ``_own_rows``."""
    shape = torch.Size((num_rows, own.shape[1]))
    return DTensor.from_local(own, mesh, [Shard(0)], shape=shape, stride=(own.shape[1], 1)).full_tensor()


EPImplementationInterface.register("moe_ep", MoeEpExperts)
