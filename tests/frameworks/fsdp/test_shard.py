"""apply_ep: training on any mesh equals training without one."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moe_ep.integrations.fsdp import apply_ep, clip_grad_norm_, dense_mesh, shard
from moe_ep.layers import load_full_state_dict, scale_expert_gradients
from moe_ep.testing import RankContext
from tests.frameworks.fsdp.model import (
    EXACT,
    E,
    Model,
    Ranks,
    batch,
    check_training,
    loss_of,
    make_mesh,
    sharded,
    state_of,
    whole,
)

MESHES = [
    ((2, 2), ("efsdp", "ep")),
    ((4,), ("ep",)),
    ((1, 4), ("efsdp", "ep")),
    ((4, 1), ("efsdp", "ep")),
    ((2, 2), ("replicate", "ep")),
    ((2, 1, 2), ("replicate", "efsdp", "ep")),
    ((1, 2, 2), ("replicate", "efsdp", "ep")),
]
EP2 = ((2, 2), ("efsdp", "ep"))


def clip(model: torch.nn.Module) -> torch.Tensor:
    return clip_grad_norm_(model.parameters(), 0.5)


def train(ctx: RankContext, mesh: tuple, options: dict[str, Any]) -> None:
    check_training(ctx, sharded(make_mesh(*mesh), **options), clip)


@pytest.mark.parametrize("unsharded_first", [False, True])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_training_equals_the_unsharded_model(ranks: Ranks, mesh: tuple, unsharded_first: bool) -> None:
    ranks(4, train, mesh, {"unsharded_first": unsharded_first})


def train_without_two_meshes(ctx: RankContext, mesh: tuple) -> None:
    with mock.patch.object(shard, "_missing", ImportError("ShardPlacementResult")):
        model = sharded(make_mesh(*mesh), unsharded_first=True)
    check_training(ctx, model, clip)


@pytest.mark.parametrize("mesh", [((4,), ("ep",)), ((1, 4), ("efsdp", "ep")), ((4, 1), ("efsdp", "ep"))], ids=str)
def test_experts_on_one_rank_each_work_before_torch_2_13(ranks: Ranks, mesh: tuple) -> None:
    ranks(4, train_without_two_meshes, mesh)


def refuse_without_two_meshes(ctx: RankContext) -> None:
    with mock.patch.object(shard, "_missing", ImportError("ShardPlacementResult")):
        with pytest.raises(ImportError, match="experts that several ranks hold takes torch 2.13, or spread"):
            sharded(make_mesh(*EP2))
        with pytest.raises(ImportError, match="mixed precision takes torch 2.13"):
            sharded(make_mesh((4,), ("ep",)), fsdp={"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)})


def test_sharded_experts_take_torch_2_13(ranks: Ranks) -> None:
    ranks(4, refuse_without_two_meshes)


@pytest.mark.parametrize(
    "options",
    [
        {"num_chunks": 2, "late_wgrad": True},
        {"layout": "compact"},
        {"fsdp": {"reshard_after_forward": False}},
        {"fsdp": {"reshard_after_forward": True}, "num_chunks": 2},
        {"recompute": "reentrant"},
        {"recompute": "not reentrant", "late_wgrad": True},
    ],
    ids=str,
)
def test_options_of_the_layer_change_nothing(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks(4, train, EP2, options)


def train_with_fault(ctx: RankContext, fault: str) -> str:
    model, fault_clip = sharded(make_mesh(*EP2)), clip
    if fault == "experts are not divided":
        for layer in model.moe:
            layer.experts.gradient_scale = 1.0
    elif fault == "one layer is not averaged":
        model.moe[1].set_gradient_divide_factor(1.0)
    else:

        def fault_clip(model: torch.nn.Module) -> torch.Tensor:
            return torch.nn.utils.get_total_norm([p.grad.to_local() for p in model.parameters()])

    try:
        check_training(ctx, model, fault_clip, steps=1)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fault", ["experts are not divided", "one layer is not averaged", "norm of own shards"])
def test_a_planted_fault_is_caught(ranks: Ranks, fault: str) -> None:
    assert all(ranks(4, train_with_fault, fault)), fault


def accumulate(ctx: RankContext, mesh: tuple) -> None:
    model, plain = sharded(make_mesh(*mesh)), Model()
    for step in range(3):
        # Gradients of the first two stay on their rank until the third.
        model.set_requires_gradient_sync(step == 2)
        loss_of(model(batch(ctx.rank, step))).backward()
        for rank in range(ctx.world_size):
            (loss_of(plain(batch(rank, step))) / ctx.world_size).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad, **EXACT)


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
def test_gradients_accumulate(ranks: Ranks, mesh: tuple) -> None:
    ranks(4, accumulate, mesh)


def from_meta(ctx: RankContext, mesh: tuple, unsharded_first: bool) -> None:
    model = sharded(make_mesh(*mesh), unsharded_first=unsharded_first, device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for layer in model.moe:
        layer.reset_parameters()
    expected = state_of(Model())
    for name, value in state_of(model).items():
        if name.startswith("moe."):
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("unsharded_first", [False, True])
@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[1], MESHES[4]], ids=str)
def test_parameters_of_a_model_made_on_meta(ranks: Ranks, mesh: tuple, unsharded_first: bool) -> None:
    ranks(4, from_meta, mesh, unsharded_first)


def whole_states(ctx: RankContext, mesh: tuple) -> list[str]:
    model, plain = sharded(make_mesh(*mesh)), Model()
    layer, expected = model.moe[1], plain.moe[1].state_dict()
    found = layer.gather_full_state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = {name: value + 1 for name, value in expected.items()}
    layer.load_full_state_dict(other)
    found = layer.gather_full_state_dict()
    assert all(torch.equal(found[name], other[name]) for name in expected)
    load_full_state_dict(model, plain.state_dict(), layer.dispatcher.group)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in state_of(model).items())
    texts = []
    for call in (
        lambda: scale_expert_gradients(model, 4),
        lambda: layer.load_full_state_dict({name: value[:1] for name, value in other.items()}),
    ):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            texts.append(str(error))
    return texts


@pytest.mark.parametrize("mesh", MESHES[:5], ids=str)
def test_whole_states_are_gathered_and_loaded(ranks: Ranks, mesh: tuple) -> None:
    for scale, load in ranks(4, whole_states, mesh) if mesh[0][-1] > 1 else []:
        assert "leave this call out" in scale
        assert "cannot share them evenly" in load or "size mismatch" in load


def in_bfloat16(ctx: RankContext, mesh: tuple) -> list[torch.Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = make_mesh(*mesh)
    model = apply_ep(Model(dtype=torch.float32), mesh, mp_policy=policy)
    fully_shard(model, mesh=dense_mesh(mesh), mp_policy=policy)
    seen = set()
    for layer in model.moe:
        layer.router.register_forward_pre_hook(lambda m, _: seen.add(("router", m.weight.dtype)))
        layer.experts.register_forward_pre_hook(lambda m, args: seen.add(("rows", args[0].dtype)))
    for _ in range(2):
        model.zero_grad()
        out = model(batch(ctx.rank, 0, torch.float32))
        out.float().square().sum().backward()
    assert seen == {("router", torch.float32), ("rows", torch.bfloat16)}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    return [out.detach().float(), *(whole(p.grad) for p in model.parameters())]


def test_mixed_precision_leaves_routers_alone(ranks: Ranks) -> None:
    plain = ranks(4, in_bfloat16, ((4, 1), ("efsdp", "ep")))
    for mesh in MESHES[:2]:
        for ours, theirs in zip(ranks(4, in_bfloat16, mesh), plain, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                # Partial sums of ranks are rounded to 8 bits of mantissa, in another order: a few units of the
                # largest element, through two layers and back.
                scale = other.abs().max().item() if other.numel() else 0.0
                torch.testing.assert_close(one, other, rtol=0, atol=8 * 2**-8 * scale)


def placements(ctx: RankContext, num_experts: int, width: int) -> list[int]:
    model = Model(num_experts=num_experts, intermediate_size=width)
    apply_ep(model, make_mesh(*EP2))
    weights = [model.moe[0].experts.w_gate_up, model.moe[0].experts.w_down]
    assert all(isinstance(weight, DTensor) and weight.shape[0] == num_experts for weight in weights)
    x = batch(ctx.rank, 0)
    # The whole model runs, whatever shards what.
    model.moe[0](x).sum().backward()
    plain = Model(num_experts=num_experts, intermediate_size=width)
    sum(plain.moe[0](batch(rank, 0)).sum() / ctx.world_size for rank in range(ctx.world_size)).backward()
    for ours, theirs in zip(model.moe[0].parameters(), plain.moe[0].parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad, **EXACT)
    return [weight.placements[0].dim for weight in weights]


# Two experts per shard; one expert whose rows can be divided; one whose rows cannot, for only one of the matrices.
@pytest.mark.parametrize(("num_experts", "expected"), [(E, [0, 0]), (2, [1, 1]), (6, [1, 1])])
def test_whole_experts_are_sharded_where_they_can_be(ranks: Ranks, num_experts: int, expected: list[int]) -> None:
    assert ranks(4, placements, num_experts, 8) == [expected] * 4
