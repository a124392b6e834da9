"""Modes of Megatron's MoE layer: expert tensor parallelism, capacity, shared experts, recomputation."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from moe_ep.testing import RankContext
from tests.frameworks.megatron.compare import (
    Case,
    assert_close,
    assert_same_bits,
    assert_unsharded,
    run_layer,
    run_sharded,
)
from tests.frameworks.megatron.models import layout, make_layer
from tests.frameworks.megatron.shim import on_cpu

Ranks = Callable[..., list]

SHARED = {"moe_shared_expert_intermediate_size": 40}
OVERLAP = {**SHARED, "moe_shared_expert_overlap": True}
DROP = {"moe_expert_capacity_factor": 0.75}
PAD = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@on_cpu
def against_unsharded(ctx: RankContext, case: Case) -> None:
    assert_unsharded(run_sharded(case, "moe_ep"), case)


@on_cpu
def against_stock(ctx: RankContext, case: Case) -> None:
    ours, stock = run_sharded(case, "moe_ep"), run_sharded(case, "native")
    assert_close(ours.tensors(), stock.tensors())


@on_cpu
def bits_of_stock(ctx: RankContext, case: Case) -> None:
    assert_same_bits(run_sharded(case, "moe_ep"), run_sharded(case, "native"))


# Tensor parallelism


@pytest.mark.parametrize(("etp", "tokens"), [(1, (8, 4)), (2, (8, 4)), (2, (2, 10))])
def test_tensor_and_expert_parallel(ranks: Ranks, etp: int, tokens: tuple[int, int]) -> None:
    """Two tensor-parallel pairs; experts are whole on a rank, or split over the ranks of a pair."""
    case = Case(tokens=tokens, tp=2, ep=2, etp=etp, changes={"num_moe_experts": 8})
    ranks(4, against_unsharded, case)
    if etp == 1:
        # gloo cannot gather the uneven parts that the stock dispatcher asks for with split experts.
        ranks(4, bits_of_stock, case)


def test_split_experts_alone(ranks: Ranks) -> None:
    ranks(2, against_unsharded, Case(tokens=(10,), tp=2, ep=1, etp=2))


def test_split_experts_with_capacity_and_shared_experts(ranks: Ranks) -> None:
    for changes in (DROP, PAD, OVERLAP):
        ranks(4, against_unsharded, Case(tokens=(8, 8), tp=2, ep=2, etp=2, changes=changes))


# Capacity


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("changes", [DROP, PAD], ids=["drop", "pad"])
def test_capacity(ranks: Ranks, changes: dict, policy: str) -> None:
    case = Case(tokens=(6, 6), favoured=(1, 2), changes={**changes, "moe_token_drop_policy": policy})
    ranks(2, against_unsharded, case)
    ranks(2, against_stock, case)


def test_capacity_drops_with_uneven_tokens(ranks: Ranks) -> None:
    ranks(2, bits_of_stock, Case(tokens=(7, 2), changes=DROP))


@on_cpu
def rows_of_experts(ctx: RankContext, case: Case) -> tuple[list[int], int]:
    with layout(ep=2):
        layer = make_layer("moe_ep", case.config())
        seen = []
        experts = layer.experts.forward

        def record(rows: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> tuple:
            seen.append((counts.tolist(), rows.shape[0]))
            assert probs.shape == rows.shape[:1]
            return experts(rows, counts, probs)

        with mock.patch.object(layer.experts, "forward", record):
            layer(case.x(ctx.rank, layer.config))
        return seen[0]


def test_padded_shapes_are_fixed(ranks: Ranks) -> None:
    # Capacity ceil(12 tokens * 2 choices / 4 experts) = 6 for each of two sources, two experts a rank.
    assert ranks(2, rows_of_experts, Case(tokens=(6, 6), changes=PAD)) == [([12, 12], 24)] * 2


@on_cpu
def decode_with_padding(ctx: RankContext, case: Case) -> None:
    """Megatron's inference switches padding on and off while it runs."""
    from megatron.core.inference import utils

    outputs = []
    with layout(ep=2), torch.no_grad():
        layer = make_layer("moe_ep", case.config()).eval()
        x = case.x(ctx.rank, layer.config)
        outputs.append(layer(x)[0])
        factor = layer.config.num_moe_experts / layer.config.moe_router_topk
        with mock.patch.object(utils, "moe_layer_cache", None):
            for padded in (True, False):
                utils.set_decode_expert_padding(layer, padded, factor if padded else None)
                outputs.append(layer(x)[0])
    # Nothing is dropped at this factor.
    assert_close({"padded": outputs[1], "again": outputs[2]}, {"padded": outputs[0], "again": outputs[0]})


def test_inference_switches_padding(ranks: Ranks) -> None:
    ranks(2, decode_with_padding, Case(tokens=(3, 3)))


# Shared experts


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("changes", [SHARED, OVERLAP], ids=["before", "overlapped"])
def test_shared_experts(ranks: Ranks, changes: dict, gate: bool) -> None:
    case = Case(changes={**changes, "moe_shared_expert_gate": gate})
    ranks(2, against_unsharded, case)
    ranks(2, against_stock, case)


@on_cpu
def shared_calls(ctx: RankContext) -> list[str]:
    """Calls on the overlapped shared expert and phases of exchanges, in their order."""
    calls: list[str] = []
    with layout(ep=2):
        layer = make_layer("moe_ep", Case(changes=OVERLAP).config())
        for name in ("pre_forward_comm", "linear_fc1_forward_and_act", "linear_fc2_forward", "post_forward_comm"):
            layer.shared_experts.__dict__[name] = _recorded(calls, name, getattr(layer.shared_experts, name))
        layer.shared_experts.__dict__["get_output"] = _recorded(calls, "get_output", layer.shared_experts.get_output)
        exchange = layer.token_dispatcher._exchange
        hooks = [
            exchange.register_hook(f"{way}{phase}", lambda event: calls.append(event.phase))
            for way in ("", "backward_")
            for phase in ("dispatch_launched", "dispatch_ready", "combine_launched", "combine_ready")
        ]
        run_layer(layer, Case().x(ctx.rank, layer.config))
        for hook in hooks:
            hook.remove()
    return calls


def _recorded(calls: list[str], name: str, real: Callable) -> Callable:
    def call(*args: object) -> object:
        calls.append(name)
        return real(*args)

    return call


def test_shared_experts_run_beside_the_exchanges(ranks: Ranks) -> None:
    expected = ["pre_forward_comm", "dispatch_launched", "linear_fc1_forward_and_act", "dispatch_ready"]
    expected += ["combine_launched", "linear_fc2_forward", "post_forward_comm", "combine_ready", "get_output"]
    expected += [f"backward_{name}" for name in ("combine_launched", "combine_ready")]
    expected += [f"backward_{name}" for name in ("dispatch_launched", "dispatch_ready")]
    assert ranks(2, shared_calls) == [expected] * 2


@on_cpu
def without_shared_experts(ctx: RankContext) -> bool:
    """Whether the comparison notices a dispatcher that leaves out the shared experts it was given."""
    from moe_ep.integrations.megatron import EPTokenDispatcher

    case = Case(changes=OVERLAP)
    stock = run_sharded(case, "native")
    with mock.patch.object(EPTokenDispatcher, "set_shared_experts"), layout(ep=2):
        layer = make_layer("moe_ep", case.config())
        out, _ = layer(case.x(ctx.rank, layer.config))
    try:
        assert_close({"out": out}, {"out": stock.out})
    except AssertionError:
        return True
    return False


def test_shared_experts_cannot_vanish_unseen(ranks: Ranks) -> None:
    assert ranks(2, without_shared_experts) == [True, True]


# Recomputation


@pytest.mark.parametrize("changes", [{}, OVERLAP, PAD], ids=["plain", "shared", "pad"])
def test_recomputed_layer(ranks: Ranks, changes: dict) -> None:
    ranks(2, recomputed, Case(tokens=(5, 5), changes=changes))


@on_cpu
def recomputed(ctx: RankContext, case: Case) -> None:
    again = run_sharded(case, "moe_ep", **RECOMPUTE)
    assert again.layer.moe_layer_recompute
    assert_same_bits(again, run_sharded(case, "moe_ep"))


# Padding for quantised experts


@on_cpu
def padded_groups(ctx: RankContext, case: Case) -> list[int]:
    # The setting belongs to fp8 and fp4, which need TransformerEngine; what it asks of the dispatcher does not.
    def with_padding(self: Case, **more: object) -> object:
        config = real(self, **more)
        config.moe_router_padding_for_quantization = True
        return config

    real = Case.config
    with mock.patch.object(Case, "config", with_padding):
        ours = run_sharded(case, "moe_ep")
        counts, rows = rows_of_experts.__wrapped__(ctx, case)
    assert_unsharded(ours, case)
    assert sum(counts) == rows
    return counts


def test_groups_are_padded_to_multiples(ranks: Ranks) -> None:
    for counts in ranks(2, padded_groups, Case(tokens=(7, 4))):
        # 44 choices among 4 experts, none of which is full by itself or left out.
        assert all(count in (16, 32) for count in counts)


# The dispatcher by itself


@on_cpu
def without_tokens(ctx: RankContext) -> None:
    """Rank 0 has no tokens at all, which Megatron's router does not take; all of rank 1's go to rank 0."""
    with layout(ep=2):
        dispatcher = make_layer("moe_ep", Case().config()).token_dispatcher
        tokens = 0 if ctx.rank == 0 else 3
        hidden = torch.arange(tokens * 2 * 16, dtype=torch.float64).view(tokens, 2, 16).requires_grad_()
        routing = torch.tensor([True, True, False, False]).expand(2 * tokens, 4)
        probs = torch.linspace(0.1, 0.9, 2 * tokens * 4, dtype=torch.float64).view(-1, 4).requires_grad_()
        rows, counts, weights = dispatcher.dispatch_postprocess(
            *dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing, probs))
        )
        assert counts.tolist() == ([6, 6] if ctx.rank == 0 else [0, 0])
        out = dispatcher.combine_postprocess(
            dispatcher.token_combine(dispatcher.combine_preprocess(rows * weights.unsqueeze(1)))
        )
        out.sum().backward()
        expected = (probs * routing).sum(1, keepdim=True).view(tokens, 2, 1)
        assert_close({"out": out}, {"out": hidden * expected})
        assert_close({"dx": hidden.grad}, {"dx": expected.expand(tokens, 2, 16)})
        assert_close({"dprobs": probs.grad}, {"dprobs": routing * hidden.detach().view(-1, 16).sum(1, keepdim=True)})


def test_a_rank_without_tokens(ranks: Ranks) -> None:
    ranks(2, without_tokens)


@on_cpu
def too_many_choices(ctx: RankContext) -> None:
    with layout(ep=2):
        dispatcher = make_layer("moe_ep", Case().config()).token_dispatcher
        hidden = torch.zeros(1, 1, 16, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="moe_router_topk=2"):
            dispatcher.dispatch_preprocess(hidden, torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4))


def test_choices_beyond_top_k_are_refused(ranks: Ranks) -> None:
    ranks(2, too_many_choices)
