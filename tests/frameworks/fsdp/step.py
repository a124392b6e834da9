"""One training step of a MoELayer under FSDP2 or DDP, to be timed."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_ep.integrations.fsdp import apply_ep, wrap_ddp
from moe_ep.layers import MoELayer


def make_step(
    dispatcher: str, tokens: int, hidden: int, top_k: int, *, num_experts: int = 16, dtype: torch.dtype = torch.float32
) -> Callable[[], float]:
    """Build a layer; the callable runs forward, backward and an optimizer step. Collective over WORLD, as every call.

    Args:
        dispatcher: "fsdp2" or "ddp".
        tokens: T of each rank.
        hidden: H; the experts' inner size is the same.
        top_k: K.
        num_experts: E, over all ranks.
        dtype: of parameters and tokens.

    Returns:
        A callable that returns the loss of this rank.

    Raises:
        ValueError: for another ``dispatcher``.
    """
    wrappers = {"fsdp2": apply_ep, "ddp": wrap_ddp}
    if dispatcher not in wrappers:
        raise ValueError(f"dispatcher={dispatcher!r} must be one of {', '.join(map(repr, wrappers))}")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    layer = MoELayer(
        mesh, hidden_size=hidden, intermediate_size=hidden, num_experts=num_experts, top_k=top_k, dtype=dtype
    )
    model = wrappers[dispatcher](layer, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(x.requires_grad_()).float() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
