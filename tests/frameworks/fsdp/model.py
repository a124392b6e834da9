"""A model with MoE layers, unsharded and on meshes of four ranks, and a training run that both must agree on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moe_ep.integrations.fsdp import apply_ep, dense_mesh, parameter_groups
from moe_ep.layers import MoELayer
from moe_ep.testing import RankContext

Ranks = Callable[..., list]
H, E = 16, 8
# Uneven, one rank without any.
TOKENS = (5, 0, 9, 3)
# fp64: sums of at most 17 tokens, 8 experts and widths of 16, of terms of magnitude one; three optimizer steps.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


class Model(nn.Module):
    """Two blocks of a dense and an MoE layer; the same parameters for every group."""

    def __init__(self, group: object = None, *, recompute: str = "", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        dtype = options.setdefault("dtype", torch.float64)
        sizes = {"hidden_size": H, "intermediate_size": 8, "num_experts": E, "top_k": 2, "shared_intermediate_size": 8}
        self.recompute = recompute
        self.dense = nn.ModuleList(nn.Linear(H, H, dtype=dtype, device=options.get("device")) for _ in range(2))
        self.moe = nn.ModuleList(MoELayer(group, **{**sizes, **options}, layer_idx=i) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for dense, moe in zip(self.dense, self.moe, strict=True):
            x = dense(x)
            if self.recompute:
                x = x + checkpoint(moe, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = x + moe(x)
        return x


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def sharded(
    mesh: DeviceMesh, *, unsharded_first: bool = False, fsdp: dict[str, Any] | None = None, **options: Any
) -> Model:
    """The model under apply_ep and fully_shard, block by block."""
    model = Model(None if unsharded_first else mesh["ep"] if mesh.ndim > 1 else mesh, **options)
    fsdp = fsdp or {}
    apply_ep(model, mesh, **fsdp)
    dense = dense_mesh(mesh)
    for layer in model.dense:
        fully_shard(layer, mesh=dense, **fsdp)
    return fully_shard(model, mesh=dense, **fsdp)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(TOKENS[rank], H, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(out: Tensor) -> Tensor:
    return out.square().sum() / 5


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model), lr=1e-2)


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference_steps(
    model: nn.Module, clip: Callable[[nn.Module], Tensor], steps: int = 3
) -> Iterator[tuple[float, Tensor, list[Tensor], list[Tensor]]]:
    """Loss, norm, clipped gradients and parameters after every step of the mean over ranks' losses."""
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([loss_of(model(batch(rank, step))) for rank in range(len(TOKENS))]).mean()
        loss.backward()
        norm = clip(model)
        optimizer.step()
        yield loss.item(), norm, [p.grad for p in model.parameters()], [p.detach() for p in model.parameters()]


def check_training(
    ctx: RankContext,
    model: nn.Module,
    clip: Callable[[nn.Module], Tensor],
    *,
    reference_clip: Callable[[nn.Module], Tensor] | None = None,
    steps: int = 3,
) -> None:
    """Several steps of ``model`` equal those of the unsharded one: losses, norms, gradients and parameters."""
    plain = Model()
    optimizer = optimizer_of(model)
    for step, (loss, norm, grads, parameters) in enumerate(
        reference_steps(plain, reference_clip or (lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.5)), steps)
    ):
        optimizer.zero_grad()
        own = loss_of(model(batch(ctx.rank, step)))
        own.backward()
        total = own.detach().clone()
        dist.all_reduce(total)
        assert abs(total.item() / ctx.world_size - loss) < 1e-11 * max(1, abs(loss))
        torch.testing.assert_close(clip(model), norm, **EXACT)
        # Clipping must have done something, or it is not tested.
        assert norm > 0.5
        for ours, theirs in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(whole(ours.grad), theirs, **EXACT)
        optimizer.step()
        for ours, theirs in zip(model.parameters(), parameters, strict=True):
            torch.testing.assert_close(whole(ours.detach()), theirs, **EXACT)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors by name."""
    return {name: whole(value).clone() for name, value in copy.copy(model.state_dict()).items()}
