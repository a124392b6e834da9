"""What cannot work is refused before anything is sharded, with what to do instead."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_ep.integrations.fsdp import apply_ep, dense_mesh, wrap_ddp
from moe_ep.testing import RankContext
from tests.frameworks.fsdp.model import Model, Ranks, make_mesh


def apply_twice(ctx: RankContext) -> None:
    mesh = make_mesh((2, 2), ("efsdp", "ep"))
    apply_ep(apply_ep(Model(), mesh), mesh)


def apply_after_fsdp(ctx: RankContext) -> None:
    mesh = make_mesh((2, 2), ("efsdp", "ep"))
    apply_ep(fully_shard(Model(), mesh=dense_mesh(mesh)), mesh)


def indivisible(ctx: RankContext) -> None:
    apply_ep(Model(num_experts=6), make_mesh((4,), ("ep",)))


def of_another_group(ctx: RankContext) -> None:
    apply_ep(Model(make_mesh((4,), ("all",))), make_mesh((2, 2), ("efsdp", "ep")))


def without_experts(ctx: RankContext) -> None:
    apply_ep(nn.Linear(2, 2), make_mesh((4,), ("ep",)))


def without_ep(ctx: RankContext) -> None:
    apply_ep(Model(), make_mesh((2, 2), ("dp", "tp")))


def in_another_order(ctx: RankContext) -> None:
    dense_mesh(make_mesh((2, 2), ("ep", "efsdp")))


def only_shards(ctx: RankContext) -> None:
    apply_ep(Model(), make_mesh((4,), ("efsdp",)))


def not_a_mesh(ctx: RankContext) -> None:
    apply_ep(Model(), ctx.group)  # type: ignore[arg-type]


def smaller_dense_mesh(ctx: RankContext) -> None:
    mesh = make_mesh((2, 2), ("efsdp", "ep"))
    apply_ep(Model(), mesh, dp_mesh=mesh["efsdp"])


def ddp_with_shards(ctx: RankContext) -> None:
    wrap_ddp(Model(), make_mesh((2, 2), ("efsdp", "ep")))


def ddp_with_a_group(ctx: RankContext) -> None:
    wrap_ddp(Model(), make_mesh((4,), ("ep",)), process_group=ctx.group)


CASES: dict[Callable[[RankContext], None], tuple[str, ...]] = {
    apply_twice: ("layer 'moe.0' is sharded already", "before fully_shard"),
    apply_after_fsdp: ("layer 'moe.0' is sharded already", "before fully_shard"),
    indivisible: ("layer 'moe.0' has 6 experts: 4 ranks of mesh['ep'] cannot share them evenly",),
    of_another_group: ("over ranks [0, 1, 2, 3], mesh['ep'] over", "group=mesh['ep']"),
    without_experts: ("model is a Linear without a moe_ep.layers.MoELayer",),
    without_ep: ("mesh has dimensions ['dp', 'tp']", 'mesh_dim_names=("efsdp", "ep")'),
    in_another_order: ("mesh has dimensions ['ep', 'efsdp']", 'mesh_dim_names=("efsdp", "ep")'),
    only_shards: ("mesh has dimensions ['efsdp']", 'mesh_dim_names=("efsdp", "ep")'),
    not_a_mesh: ("it must be a DeviceMesh", "init_device_mesh"),
    smaller_dense_mesh: ("dp_mesh has 2 ranks and mesh 4",),
    ddp_with_shards: ("DDP shards nothing", "use apply_ep"),
    ddp_with_a_group: ("process_group is given: leave it out",),
}


def text_of(ctx: RankContext, call: Callable[[RankContext], None]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(ctx)
    return str(caught.value)


@pytest.mark.parametrize("call", CASES, ids=lambda call: call.__name__)
def test_refused_with_a_remedy(ranks: Ranks, call: Callable[[RankContext], None]) -> None:
    for text in ranks(4, text_of, call):
        for part in CASES[call]:
            assert part in text


def refuse_and_go_on(ctx: RankContext) -> None:
    """A refusal leaves the model as it was."""
    model = nn.ModuleList([Model(), Model(num_experts=6)])
    before = copy.deepcopy(model.state_dict())
    mesh = make_mesh((4,), ("ep",))
    with pytest.raises(ValueError, match="layer '1.moe.0' has 6 experts"):
        apply_ep(model, mesh)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    apply_ep(model[0], mesh)


def test_a_refusal_leaves_the_model_alone(ranks: Ranks) -> None:
    ranks(4, refuse_and_go_on)
