"""``DistributedConfig(ep_implementation="moe_ep")``: transformers shards the model, moe_ep carries the tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ep.testing import RankContext
from tests.frameworks.transformers.faults import FAULTS, planted
from tests.frameworks.transformers.models import FAMILIES, loss_of, make_ids, saved_model, whole
from tests.frameworks.transformers.training import (
    STEPS,
    Run,
    assert_same,
    assert_within_rounding,
    check_gradients_reach,
    ids_of,
    load,
    load_sharded,
    reference,
    stable_sorts,
    train,
    unsharded,
)

FSDP = {"fsdp_size": 2, "ep_size": 2}


def sharded_run(
    ctx: RankContext,
    path: str,
    implementation: str,
    sizes: dict,
    *,
    sgd: bool = False,
    checkpointing: bool | None = None,
    batch: Callable[[int, int], Tensor] = ids_of,
) -> tuple[Run, int]:
    """Trains in fp32; returns what this rank saw and which data it had."""
    model = load_sharded(ctx, path, implementation, sizes)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    data_rank = ctx.rank // sizes.get("tp_size", 1)
    with stable_sorts():
        run = train(model, lambda step: batch(data_rank, step), sgd=sgd)
    if implementation == "moe_ep":
        check_dispatchers(model, checkpointing is not None)
    return run, data_rank


def check_dispatchers(model: torch.nn.Module, recomputed: bool) -> None:
    from moe_ep.integrations.transformers import dispatchers

    by_layer = dispatchers(model)
    assert by_layer
    assert all(len(one) == 1 for one in by_layer.values())
    assert len({id(one.buffer) for (one,) in by_layer.values()}) == 1
    # Per step: dispatch and combine, once more under recomputation, and both backward.
    assert {one.stats()["exchanges"] for (one,) in by_layer.values()} == {STEPS * (6 if recomputed else 4)}


def check_unsharded(ctx: RankContext, theirs: list[Run], path: str, sizes: dict, **options: Any) -> None:
    run, data_rank = sharded_run(ctx, path, "moe_ep", sizes, sgd=True, **options)
    assert_within_rounding(run, theirs[data_rank])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_those_of_all_to_all_bit_for_bit(ranks, family: str) -> None:
    # Two choices: a sum of two terms has one order, and every other sum has the framework's.
    ours, theirs = (
        ranks(2, sharded_run, saved_model(family), implementation, FSDP) for implementation in ("moe_ep", "all_to_all")
    )
    for (own, _), (other, _) in zip(ours, theirs, strict=True):
        check_gradients_reach(own)
        assert_same(own, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_those_of_the_unsharded_model(ranks, family: str) -> None:
    path = saved_model(family, 3)
    ranks(2, check_unsharded, reference(path, 2, torch.float32), path, FSDP)


@pytest.mark.parametrize(
    ("num_ranks", "family", "sizes"),
    [
        (2, "qwen2_moe", {"tp_size": 2, "ep_size": 2}),
        (4, "mixtral", {"fsdp_size": 4, "ep_size": 2}),
        (4, "gpt_oss", {"fsdp_size": 4, "ep_size": 4}),
        (4, "qwen3_moe", {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}),
        (4, "deepseek_v3", {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}),
    ],
)
def test_layouts(ranks, num_ranks: int, family: str, sizes: dict) -> None:
    path = saved_model(family, 3)
    data_ranks = num_ranks // sizes.get("tp_size", 1)
    ranks(num_ranks, check_unsharded, reference(path, data_ranks, torch.float32), path, sizes)


def odd_ids(data_rank: int, step: int) -> Tensor:
    """Five or three tokens, which two ranks that hold the same batch cannot halve."""
    return make_ids(data_rank, step, batch=1, length=(5, 3)[(data_rank + step) % 2])


@pytest.mark.parametrize(
    ("num_ranks", "family", "sizes"),
    [
        (2, "qwen2_moe", {"tp_size": 2, "ep_size": 2}),
        (4, "qwen3_moe", {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}),
    ],
)
def test_tokens_that_tensor_parallel_ranks_do_not_divide(ranks, num_ranks: int, family: str, sizes: dict) -> None:
    path = saved_model(family, 3)
    theirs = unsharded(load(path, torch.float32), num_ranks // 2, sgd=True, batch=odd_ids)
    ranks(num_ranks, check_odd_tokens, theirs, path, sizes)


def check_odd_tokens(ctx: RankContext, theirs: list[Run], path: str, sizes: dict) -> None:
    check_unsharded(ctx, theirs, path, sizes, batch=odd_ids)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_recompute(ranks, family: str, reentrant: bool) -> None:
    path = saved_model(family, 3)
    ranks(2, check_recompute, reference(path, 2, torch.float32), path, reentrant)


def check_recompute(ctx: RankContext, theirs: list[Run], path: str, reentrant: bool) -> None:
    check_unsharded(ctx, theirs, path, FSDP, checkpointing=reentrant)


def save_and_reload(ctx: RankContext, path: str, folder: str, sizes: dict) -> None:
    model = load_sharded(ctx, path, "moe_ep", sizes)
    run = train(model, lambda step: ids_of(ctx.rank // sizes.get("tp_size", 1), step), steps=1)
    model.save_pretrained(folder)
    torch.distributed.barrier()
    plain = load(folder, torch.float32)
    expected = run.parameters | {name: whole(buffer) for name, buffer in model.named_buffers()}
    found = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("family", "sizes"), [*((family, FSDP) for family in FAMILIES), ("qwen2_moe", {"tp_size": 2, "ep_size": 2})]
)
def test_a_saved_model_loads_without_ranks(ranks, tmp_path: Path, family: str, sizes: dict) -> None:
    ranks(2, save_and_reload, saved_model(family), str(tmp_path), sizes)


def starve(path: str) -> str:
    """A copy of a GPT-OSS checkpoint whose router never chooses the second half of the experts."""
    model = load(path, torch.float32)
    for layer in model.model.layers:
        layer.mlp.router.bias.data[4:] = -1e4
    folder = tempfile.mkdtemp(prefix="starved_", dir=Path(path).parent)
    model.save_pretrained(folder)
    return folder


def test_a_rank_whose_experts_get_no_row(ranks) -> None:
    path = starve(saved_model("gpt_oss", 3))
    expected = reference(path, 2, torch.float32)
    unused = expected[0].grads["model.layers.0.mlp.experts.down_proj"][4:]
    assert not unused.any()
    ranks(2, check_unsharded, expected, path, FSDP)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ranks, fault: str) -> None:
    path = saved_model("mixtral", 3)
    ranks(2, check_fault, reference(path, 2, torch.float32), path, fault)


def check_fault(ctx: RankContext, theirs: list[Run], path: str, fault: str) -> None:
    with planted(fault), pytest.raises(AssertionError, match="differ"):
        check_unsharded(ctx, theirs, path, FSDP)


def under_autocast(ctx: RankContext, path: str, implementation: str) -> list[float]:
    model = load_sharded(ctx, path, implementation, FSDP)
    with torch.autocast("cpu", torch.bfloat16), stable_sorts():
        loss = loss_of(model, ids_of(ctx.rank, 0))
    loss.backward()
    return [loss.item(), *(p.grad.to_local().double().sum().item() for p in model.parameters())]


def test_autocast_changes_no_bit_of_what_the_framework_computes(ranks) -> None:
    path = saved_model("mixtral")
    assert ranks(2, under_autocast, path, "moe_ep") == ranks(2, under_autocast, path, "all_to_all")


def generate(ctx: RankContext, path: str, sizes: dict) -> list[int]:
    model = load_sharded(ctx, path, "moe_ep", sizes).eval()
    return model.generate(ids_of(0, 0)[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()


def test_generation_with_a_shared_batch_of_one_token(ranks) -> None:
    path = saved_model("qwen2_moe")
    model = load(path, torch.float32).eval()
    plain = model.generate(ids_of(0, 0)[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
    assert ranks(2, generate, path, {"tp_size": 2, "ep_size": 2}) == [plain, plain]


def parallelize_twice(ctx: RankContext, path: str) -> None:
    from moe_ep.integrations.transformers import gather_state_dict, parallelize

    model = load_sharded(ctx, path, "moe_ep", FSDP)
    with pytest.raises(ValueError, match="spread over ranks already"):
        parallelize(model)
    with pytest.raises(ValueError, match="save_pretrained gathers it itself"):
        gather_state_dict(model)
    with pytest.raises(ValueError, match='is a DTensor.*ep_implementation="moe_ep"'):
        parallelize(load_sharded(ctx, path, "all_to_all", FSDP))


def test_a_sharded_model_is_not_parallelized(ranks) -> None:
    ranks(2, parallelize_twice, saved_model("mixtral"))


def test_the_name_is_registered() -> None:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

    import moe_ep.integrations.transformers  # noqa: F401

    assert issubclass(EPImplementationInterface()["moe_ep"], EPImplementation)
    assert not issubclass(EPImplementationInterface()["moe_ep"], moe_ep.TokenDispatcher)
