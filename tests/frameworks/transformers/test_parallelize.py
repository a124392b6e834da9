"""``parallelize``: experts of a loaded model over ranks, under DDP."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_ep.errors import NotBuiltError
from moe_ep.integrations.fsdp import clip_grad_norm_
from moe_ep.integrations.transformers import (
    dispatchers,
    expert_parameters,
    gather_state_dict,
    ignore_experts_in_ddp,
    parallelize,
    save_pretrained,
)
from moe_ep.testing import RankContext
from tests.frameworks.transformers.faults import FAULTS, planted
from tests.frameworks.transformers.models import FAMILIES, loss_of, make_config, make_model, saved_model, whole
from tests.frameworks.transformers.spread import (
    gather_of,
    make_groups,
    router_bias,
    same_everywhere,
    spread_model,
    spread_run,
)
from tests.frameworks.transformers.training import (
    CLOSE,
    Run,
    assert_same,
    check_gradients_reach,
    ids_of,
    load,
    reference,
    train,
)


def check_unsharded(ctx: RankContext, theirs: list[Run], path: str, num_ranks: int | None = None) -> None:
    run = spread_run(ctx, path, num_ranks)
    check_gradients_reach(run)
    assert_same(run, theirs[ctx.rank], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_those_of_the_unsharded_model(ranks, family: str) -> None:
    path = saved_model(family, 3)
    ranks(2, check_unsharded, reference(path, 2), path)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_four_ranks_with_two_copies_of_each_expert_or_one(ranks, num_ranks: int) -> None:
    path = saved_model("qwen2_moe", 3)
    ranks(4, check_unsharded, reference(path, 4), path, num_ranks)


def check_recompute(ctx: RankContext, theirs: list[Run], path: str, reentrant: bool) -> None:
    model = load(path)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ddp = spread_model(ctx, model)
    run = train(model, lambda step: ids_of(ctx.rank, step), forward=ddp, gather=gather_of(model))
    assert_same(run, theirs[ctx.rank], **CLOSE)
    (dispatcher,) = next(iter(dispatchers(model).values()))
    # Per step: dispatch and combine, again under recomputation, and both backward.
    assert dispatcher.stats()["exchanges"] == 3 * 6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_recompute(ranks, family: str, reentrant: bool) -> None:
    path = saved_model(family, 3)
    ranks(2, check_recompute, reference(path, 2), path, reentrant)


def check_accumulation(ctx: RankContext, theirs: list[Run], path: str) -> None:
    """Each rank's batch in two backward passes of half the loss gives the gradients of one."""
    model = load(path)
    ddp = spread_model(ctx, model)
    with ddp.no_sync():
        (loss_of(ddp, ids_of(ctx.rank, 0)) / 2).backward()
    (loss_of(ddp, ids_of(ctx.rank, 0)) / 2).backward()
    grads = gather_of(model)({name: p.grad for name, p in model.named_parameters()})
    for name, grad in theirs[0].grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


def test_accumulated_micro_batches_are_scaled_once(ranks) -> None:
    path = saved_model("olmoe", 3)
    ranks(2, check_accumulation, reference(path, 2), path)


def check_starved(ctx: RankContext) -> None:
    """A router that never chooses the second half of the experts; fp32 and the loop over experts."""
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model = make_model("gpt_oss", 3, experts_implementation=implementation)
        for bias in router_bias(model):
            bias.data[4:] = -1e4
        ddp = spread_model(ctx, model)
        loss_of(ddp, ids_of(ctx.rank, 0)).backward()
        for _, parameter in expert_parameters(model):
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (ctx.rank == 0)


def test_a_rank_whose_experts_get_no_row(ranks) -> None:
    ranks(2, check_starved)


def save_and_reload(ctx: RankContext, path: str, folder: str) -> None:
    model = load(path, torch.float32)
    ddp = spread_model(ctx, model)
    run = train(model, lambda step: ids_of(ctx.rank, step), 1, forward=ddp, gather=gather_of(model))
    save_pretrained(ddp, folder)
    everywhere = gather_state_dict(ddp, everywhere=True)
    assert bool(gather_state_dict(model)) == (ctx.rank == 0)
    plain = load(folder, torch.float32)
    assert plain.config._experts_implementation == "grouped_mm"
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, run.parameters[name]), name
        assert torch.equal(parameter, everywhere[name]), name
    # And on with it, spread again.
    again = spread_model(ctx, plain)
    left, right = (loss_of(one, ids_of(ctx.rank, 1)).item() for one in (ddp, again))
    assert left == right


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_without_ranks(ranks, tmp_path: Path, family: str) -> None:
    ranks(2, save_and_reload, saved_model(family), str(tmp_path))


def refuse_slices(ctx: RankContext, folder: str) -> None:
    model = parallelize(make_model("mixtral"))
    with pytest.raises(ValueError, match="slice of the experts.*save_pretrained"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="one rank's slice"):
        model.save_pretrained(folder, state_dict=model.state_dict())
    with pytest.raises(TypeError, match="does not pickle"):
        torch.save(model, f"{folder}/model.pt")


def test_a_slice_is_not_saved_as_a_checkpoint(ranks, tmp_path: Path) -> None:
    ranks(2, refuse_slices, str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


def check_clipping(ctx: RankContext, theirs: list[Run], path: str) -> None:
    model = load(path)
    ddp = spread_model(ctx, model, 2)
    loss_of(ddp, ids_of(ctx.rank, 0)).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1, group=make_groups(ctx, 2)[0])
    expected = math.sqrt(sum(grad.square().sum().item() for grad in theirs[0].grads.values()))
    assert norm.item() == pytest.approx(expected, rel=CLOSE["rtol"])
    assert same_everywhere(ctx, norm)
    grads = gather_of(model)({name: p.grad for name, p in model.named_parameters()})
    for name, grad in theirs[0].grads.items():
        # Clipping adds 1e-6 to the norm before it divides.
        clipped = grad * (0.1 / (expected + 1e-6))
        torch.testing.assert_close(grads[name], clipped, **CLOSE, msg=name)


def test_clipping_by_one_norm(ranks) -> None:
    path = saved_model("glm4_moe", 3)
    ranks(4, check_clipping, reference(path, 4), path)


def check_copy(ctx: RankContext, theirs: list[Run], path: str) -> None:
    """A copy of a model that has trained trains like the first, and apart from it."""
    model = load(path)
    ddp = spread_model(ctx, model)
    loss_of(ddp, ids_of(ctx.rank, 0)).backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    run = train(
        twin, lambda step: ids_of(ctx.rank, step), forward=DistributedDataParallel(twin), gather=gather_of(twin)
    )
    assert_same(run, theirs[ctx.rank], **CLOSE)
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))


def test_a_copy_trains_by_itself(ranks) -> None:
    path = saved_model("mixtral", 3)
    ranks(2, check_copy, reference(path, 2), path)


def check_frozen(ctx: RankContext, theirs: list[Run], path: str) -> None:
    """Experts that were frozen when they were spread learn once they are not, by the same gradients."""
    model = load(path)
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    for parameter in experts:
        parameter.requires_grad_(False)
    ddp = spread_model(ctx, model)
    loss_of(ddp, ids_of(ctx.rank, 0)).backward()
    assert all(parameter.grad is None for parameter in experts)
    model.zero_grad()
    for parameter in experts:
        parameter.requires_grad_()
    loss_of(ddp, ids_of(ctx.rank, 0)).backward()
    grads = gather_of(model)({name: p.grad for name, p in model.named_parameters()})
    for name, grad in theirs[0].grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


def test_frozen_experts_pass_gradients_on(ranks) -> None:
    path = saved_model("qwen3_moe", 3)
    ranks(2, check_frozen, reference(path, 2), path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ranks, fault: str) -> None:
    path = saved_model("mixtral", 3)
    ranks(2, check_fault, reference(path, 2), path, fault)


def check_fault(ctx: RankContext, theirs: list[Run], path: str, fault: str) -> None:
    # One step: DDP itself refuses another where parameters were left without gradients.
    with planted(fault):
        run = spread_run(ctx, path, steps=1)
    with pytest.raises(AssertionError, match="grads"):
        assert_same(
            run._replace(losses=theirs[ctx.rank].losses, parameters={}),
            theirs[ctx.rank]._replace(parameters={}),
            **CLOSE,
        )


def check_independence(ctx: RankContext) -> None:
    """Models that share a configuration are not changed, and the framework's choice of implementation is kept."""
    config = make_config("mixtral")
    first, second = (transformers.MixtralForCausalLM(config) for _ in range(2))
    parallelize(first)
    loss_of(second, ids_of(0, 0)).backward()
    assert first.config._experts_implementation == second.config._experts_implementation == "grouped_mm"
    names = [name for name, _ in expert_parameters(first)]
    assert sorted(names) == sorted(name for name, _ in first.named_parameters() if ".experts." in name)
    loss_of(first, ids_of(ctx.rank, 0)).backward()
    buffers = {id(one.buffer) for made in dispatchers(first).values() for one in made}
    assert len(buffers) == 1
    assert list(dispatchers(first)) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


def test_other_models_are_left_alone(ranks) -> None:
    ranks(2, check_independence)


class Outer(nn.Module):
    """A module around a model, as training code has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: object) -> object:
        return self.model(**inputs)


def check_outer_module(ctx: RankContext) -> None:
    outer = Outer(parallelize(make_model("mixtral")))
    wrong = DistributedDataParallel(outer)
    with pytest.raises(ValueError, match=r"averages model\.model\.layers.*ignore_experts_in_ddp"):
        loss_of(wrong, ids_of(ctx.rank, 0))
    outer = Outer(parallelize(make_model("mixtral")))
    assert ignore_experts_in_ddp(outer)
    loss_of(DistributedDataParallel(outer), ids_of(ctx.rank, 0)).backward()


def test_ddp_around_an_outer_module_is_told_or_refused(ranks) -> None:
    ranks(2, check_outer_module)


class Undecorated(nn.Module):
    """Stacked experts that transformers' interface does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.zeros(4, 8, 8))


def refuse(ctx: RankContext) -> None:
    model = make_model("mixtral")
    with pytest.raises(ValueError, match="use a group whose size divides 9"):
        parallelize(make_model("mixtral", num_local_experts=9))
    with pytest.raises(ValueError, match="no stacked experts"):
        parallelize(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="use_experts_implementation"):
        parallelize(Undecorated())
    with pytest.raises(ValueError, match="data_parallel_size=0"):
        parallelize(model, data_parallel_size=0)
    with pytest.raises(ValueError, match="parallelize it first"):
        parallelize(DistributedDataParallel(make_model("mixtral")))
    with torch.device("meta"):
        empty = transformers.MixtralForCausalLM(make_config("mixtral"))
    with pytest.raises(ValueError, match="on meta: load the model whole"):
        parallelize(empty)
    quantized = make_model("mixtral")
    quantized.is_quantized = True
    with pytest.raises(ValueError, match="quantization_config"):
        parallelize(quantized)
    parallelize(model)
    with pytest.raises(ValueError, match="spread over ranks already"):
        parallelize(model)


def refuse_half_a_world(ctx: RankContext) -> None:
    pair, _ = make_groups(ctx, 2)
    with pytest.raises(ValueError, match="pass as replica_group"):
        parallelize(make_model("mixtral"), pair)
    parallelize(make_model("mixtral"), pair, data_parallel_size=2)


def test_refusals_name_the_remedy(ranks) -> None:
    ranks(2, refuse)
    ranks(4, refuse_half_a_world)
    with pytest.raises(ValueError, match="init_process_group"):
        parallelize(make_model("mixtral"))


def named_backends(ctx: RankContext) -> None:
    model = parallelize(make_model("mixtral"), backend="cuda")
    with pytest.raises(NotBuiltError, match='backend="cuda"'):
        loss_of(model, ids_of(ctx.rank, 0))
    copied = copy.deepcopy(model)
    with pytest.raises(NotBuiltError, match='backend="cuda"'):
        loss_of(copied, ids_of(ctx.rank, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where the backend is missing")
def test_the_named_backend_is_used(ranks) -> None:
    ranks(2, named_backends)


def test_the_experts_function_needs_a_parallelized_model() -> None:
    model = make_model("mixtral")
    model.config._experts_implementation = "moe_ep"
    with pytest.raises(ValueError, match=r"parallelize\(model, group\)"):
        loss_of(model, ids_of(0, 0))


def replaced(ctx: RankContext) -> None:
    """What replaces parameters, as wrappers that shard do, is noticed before a wrong gradient exists."""
    model = parallelize(make_model("mixtral"))
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().clone())
    with pytest.raises(ValueError, match="replaced or added after parallelize.*ignored_params"):
        loss_of(model, ids_of(ctx.rank, 0))
    dist.barrier()


def test_replaced_parameters_are_noticed(ranks) -> None:
    ranks(2, replaced)


def check_fsdp(ctx: RankContext, theirs: list[Run], path: str) -> None:
    """FSDP2 around everything but experts; around experts too, which would mix different ones, it is refused."""
    model = parallelize(load(path))
    gather = gather_of(model)
    own = dict(expert_parameters(model))
    fully_shard(model, mesh=DeviceMesh.from_group(ctx.group, "cpu"), ignored_params=set(own.values()))
    loss_of(model, ids_of(ctx.rank, 0)).backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    for name, grad in gather(grads).items():
        torch.testing.assert_close(grad, theirs[0].grads[name], **CLOSE, msg=name)
    wrong = fully_shard(parallelize(load(path)), mesh=DeviceMesh.from_group(ctx.group, "cpu"))
    with pytest.raises(ValueError, match="replaced or added after parallelize"):
        loss_of(wrong, ids_of(ctx.rank, 0))


def test_fsdp_around_everything_but_experts(ranks) -> None:
    path = saved_model("mixtral", 3)
    ranks(2, check_fsdp, reference(path, 2), path)
