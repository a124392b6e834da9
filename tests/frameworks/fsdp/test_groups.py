"""parameter_groups: optimizers that update whole lists, the default on GPUs, as those that take single tensors."""

from collections.abc import Callable

import pytest
import torch

from moe_ep.integrations.fsdp import parameter_groups, wrap_ddp
from moe_ep.testing import RankContext
from tests.frameworks.fsdp.model import EXACT, Model, Ranks, batch, loss_of, make_mesh, sharded, whole

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": Model,
    "ddp": lambda: wrap_ddp(Model(), make_mesh((4,), ("ep",))),
    "ddp, copies": lambda: wrap_ddp(Model(), make_mesh((2, 2), ("replicate", "ep"))),
    "fsdp2": lambda: sharded(make_mesh((2, 2), ("efsdp", "ep")), unsharded_first=True),
    "fsdp2, one of each": lambda: sharded(make_mesh((1, 4), ("efsdp", "ep")), unsharded_first=True),
}


def train_both(ctx: RankContext, which: str) -> None:
    one, other = MODELS[which](), MODELS[which]()
    groups = parameter_groups(other)
    assert sum(len(group["params"]) for group in groups) == len(list(other.parameters()))
    optimizers = (
        torch.optim.AdamW(one.parameters(), lr=1e-2, foreach=False),
        torch.optim.AdamW(groups, lr=1e-2, foreach=True),
    )
    for step in range(2):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(batch(ctx.rank, step))).backward()
            optimizer.step()
    for ours, theirs in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.detach()), whole(theirs.detach()), **EXACT)


@pytest.mark.parametrize("which", MODELS)
def test_lists_are_updated_as_tensors_are(ranks: Ranks, which: str) -> None:
    ranks(4, train_both, which)


def train_without_groups(ctx: RankContext, way: str) -> None:
    model = MODELS["ddp"]()
    loss_of(model(batch(ctx.rank, 0))).backward()
    with pytest.raises(RuntimeError, match="mixed"):
        torch.optim.AdamW(model.parameters(), **{way: True}).step()


@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_ddp_needs_groups(ranks: Ranks, way: str) -> None:
    ranks(4, train_without_groups, way)
