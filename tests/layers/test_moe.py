"""The layer on 1 to 4 ranks against the unsharded layer, written as plain loops."""

from dataclasses import dataclass, field

import pytest
import torch

import moe_ep
from moe_ep.errors import CapacityError
from moe_ep.layers import MoELayer, Routing, TopKRouter
from moe_ep.layers.losses import count_choices
from moe_ep.testing import uneven_tokens
from tests.layers import reference

H, WIDTH, E, K = 16, 24, 12, 3
TOKENS = 9  # per rank on average
Grads = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Options of a layer, and how the batch is divided."""

    options: dict = field(default_factory=dict)
    uneven: bool = True
    dtype: torch.dtype = torch.float64
    fault: str = ""

    def sizes(self, num_ranks: int) -> list[int]:
        return uneven_tokens(TOKENS, num_ranks, seed=1) if self.uneven else [TOKENS] * num_ranks

    def batch(self, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' tokens and the gradient of the loss with respect to the output."""
        generator = torch.Generator().manual_seed(11)
        x, probe = (torch.randn(TOKENS * num_ranks, H, generator=generator, dtype=torch.float64) for _ in range(2))
        return x.to(self.dtype), probe.to(self.dtype)

    def layer(self, group, **options) -> MoELayer:
        common = {"hidden_size": H, "intermediate_size": WIDTH, "num_experts": E, "top_k": K, "seed": 5}
        return MoELayer(group, **{**common, "timeout_s": 20, "dtype": self.dtype, **self.options, **options})


@dataclass(frozen=True)
class Result:
    out: torch.Tensor
    grads: Grads
    counts: torch.Tensor


SLAB = {"layout": "slab", "max_tokens_per_rank": 4 * TOKENS}
SHARED = {"shared_intermediate_size": 20, "shared_gate": True}
CASES = {
    "expanded": Case(),
    "even": Case(uneven=False),
    "combine": Case({"weights": "combine", "alignment": 4}),
    "geglu": Case({"activation": "geglu", "alignment": 8}),
    "compact": Case({"layout": "compact"}),
    "slab": Case(SLAB),
    "slab_combine": Case({**SLAB, "weights": "combine"}),
    "shared": Case(SHARED),
    "late": Case({**SHARED, "late_wgrad": True}),
    "chunks": Case({**SHARED, "num_chunks": 3}),
    "many_chunks": Case({"num_chunks": 40, "late_wgrad": True}),
    "chunks_compact": Case({"num_chunks": 2, "layout": "compact", "late_wgrad": True}),
    "chunks_slab": Case({"num_chunks": 4, "weights": "combine", **SLAB}),
    "rows": Case({"capacity": moe_ep.Capacity(rows=150)}),
    "rows_chunks": Case({"capacity": moe_ep.Capacity(rows=150), "num_chunks": 2, "late_wgrad": True}),
    "rows_compact": Case({"capacity": moe_ep.Capacity(rows=60), "layout": "compact"}),
    "per_expert": Case({"capacity": moe_ep.Capacity(per_expert=40)}),
    "factor": Case({"capacity": moe_ep.Capacity(factor=6.0), "max_tokens_per_rank": 4 * TOKENS}),
    "fp32": Case({**SHARED, "num_chunks": 2, "late_wgrad": True}, dtype=torch.float32),
    "fp32_compact": Case({"layout": "compact"}, dtype=torch.float32),
    "fp32_slab": Case(SLAB, dtype=torch.float32),
}


def plant(layer: MoELayer, fault: str) -> None:
    """Breaks the layer on one rank."""
    run = layer.experts.forward

    def broken(rows, ends, row_weights=None, **options):
        if fault == "swapped_weight":
            row_weights = row_weights.roll(1)
        out = run(rows, ends, row_weights, **options)
        return out * (torch.arange(len(out)) > 0).unsqueeze(-1) if fault == "dropped_row" else out

    layer.experts.forward = broken
    if fault == "skipped_weight_gradient":
        layer.experts.w_down.register_hook(torch.zeros_like)


def run_layer(ctx, case: Case) -> Result:
    num_ranks, rank = (ctx.world_size, ctx.rank) if ctx else (1, 0)
    layer = case.layer(ctx.group if ctx else None)
    if case.fault and rank == num_ranks - 1:
        plant(layer, case.fault)
    x, probe = (t.split(case.sizes(num_ranks))[rank] for t in case.batch(num_ranks))
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * probe).sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return Result(out.detach(), grads | {"x": x.grad}, layer.tokens_per_expert)


def joined(results: list[Result]) -> Result:
    """What the ranks make together: rows in rank order, experts in rank order, sums of all other gradients."""
    grads = {}
    for name in results[0].grads:
        parts = [result.grads[name] for result in results]
        grads[name] = torch.cat(parts) if name == "x" or name.startswith("experts.") else sum(parts)
    counts = sum(result.counts for result in results)
    return Result(torch.cat([result.out for result in results]), grads, counts)


def expected(case: Case, num_ranks: int) -> Result:
    """The unsharded layer, in fp64 whatever the case's dtype."""
    params = case.layer(None).double().state_dict()
    params = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    x, probe = (t.double() for t in case.batch(num_ranks))
    x.requires_grad_()
    act = torch.nn.functional.gelu if case.options.get("activation") == "geglu" else torch.nn.functional.silu
    out = reference.moe(x, params, K, act)
    (out * probe).sum().backward()
    ids, _ = reference.softmax_routing(x, params["router.weight"], K)
    grads = {name: value.grad for name, value in params.items()}
    return Result(out.detach(), grads | {"x": x.grad}, torch.stack([(ids == i).sum() for i in range(E)]))


def check(ours: Result, theirs: Result, dtype: torch.dtype) -> None:
    """fp64 within 1e-12. fp32 within the error of the longest chain of sums.

    A value passes through sums of H, WIDTH, K, H, WIDTH, E and, for parameters, 4 * TOKENS terms; each sum of n terms
    errs by at most n * eps times the sum of their sizes, and no tensor on the way exceeds about 8 times the largest
    result, since inputs are normal and weights are at most 1/4 in size.
    """
    assert torch.equal(ours.counts, theirs.counts)
    assert ours.grads.keys() == theirs.grads.keys()
    terms = 2 * H + 2 * WIDTH + K + E + 4 * TOKENS
    for name, value in {"out": ours.out, **ours.grads}.items():
        target = theirs.out if name == "out" else theirs.grads[name]
        bound = 1e-12 if dtype == torch.float64 else terms * 8 * torch.finfo(dtype).eps * target.abs().max().item()
        torch.testing.assert_close(value.double(), target, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_layer_equals_the_unsharded_one(ranks, name, num_ranks):
    case = CASES[name]
    results = ranks(num_ranks, run_layer, case) if num_ranks > 1 else [run_layer(None, case)]
    check(joined(results), expected(case, num_ranks), case.dtype)


@pytest.mark.parametrize("fault", ["swapped_weight", "dropped_row", "skipped_weight_gradient"])
def test_planted_faults_are_found(ranks, fault):
    case = Case(fault=fault, uneven=False)
    with pytest.raises(AssertionError):
        check(joined(ranks(2, run_layer, case)), expected(case, 2), case.dtype)


def group_of_one(ctx) -> Result:
    x, probe = Case().batch(1)
    layer = Case(SHARED).layer(ctx.subgroup([ctx.rank]))
    x.requires_grad_()
    (layer(x) * probe).sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return Result(layer(x).detach(), grads | {"x": x.grad}, layer.tokens_per_expert // 2)


def test_a_group_of_one_rank(ranks):
    case = Case(SHARED)
    for result in ranks(2, group_of_one):
        check(result, expected(case, 1), case.dtype)


def attached_group_loss(ctx) -> Result:
    options = {"scope": "group", "aux_loss_coef": 0.5, "z_loss_coef": 0.25}
    return run_layer(ctx, Case({**SHARED, "num_chunks": 2, **options}))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_group_losses_enter_the_gradient_by_themselves(ranks, num_ranks):
    ours = joined(ranks(num_ranks, attached_group_loss))
    case = Case(SHARED)
    plain = expected(case, num_ranks)
    params = case.layer(None).state_dict()
    weight, (x, _) = params["router.weight"].clone().requires_grad_(), case.batch(num_ranks)
    x.requires_grad_()
    ids, _ = reference.softmax_routing(x, weight, K)
    logits = x @ weight.T
    loss = 0.5 * reference.switch_loss(logits.softmax(1), ids) + 0.25 * reference.z_loss(logits)
    # Averaged over ranks the loss counts once, so summed over ranks it counts num_ranks times.
    x_grad, weight_grad = (num_ranks * g for g in torch.autograd.grad(loss, (x, weight)))
    grads = {**plain.grads, "x": plain.grads["x"] + x_grad, "router.weight": plain.grads["router.weight"] + weight_grad}
    check(ours, Result(plain.out, grads, plain.counts), torch.float64)


def returned_losses(ctx) -> list[tuple]:
    case = Case({"aux_loss_coef": 0.5, "scope": "group"})
    x, probe = (t.split(case.sizes(ctx.world_size))[ctx.rank] for t in case.batch(ctx.world_size))
    grads = []
    for returned in (True, False):
        layer = case.layer(ctx.group)
        out = layer(x, return_losses=returned)
        out, losses = out if returned else (out, {})
        ((out * probe).sum() + sum(losses.values())).backward()
        grads.append(layer.router.weight.grad)
    return grads


def test_returned_losses_give_the_gradient_of_attached_ones(ranks):
    for returned, attached in ranks(2, returned_losses):
        torch.testing.assert_close(returned, attached, rtol=0, atol=1e-13)


def test_sequences_are_told_apart_for_the_loss_over_each():
    layer = Case({"seq_aux_loss_coef": 0.5}).layer(None)
    x = Case().batch(2)[0].view(2, TOKENS, H)
    _, losses = layer(x, return_losses=True)
    weight, per_seq = layer.router.weight, []
    for seq in x:
        ids, _ = reference.softmax_routing(seq, weight, K)
        per_seq.append(0.5 * reference.switch_loss((seq @ weight.T).softmax(1), ids))
    # fp64: sums of at most TOKENS * E terms of one sign.
    torch.testing.assert_close(losses["seq_aux_loss"], sum(per_seq) / 2, rtol=1e-12, atol=0)


def test_input_shapes_and_errors():
    layer = MoELayer(None, hidden_size=H, intermediate_size=WIDTH, num_experts=E, top_k=K)
    for shape in ((H,), (5, H), (2, 3, H), (2, 2, 2, H), (0, H), (2, 0, H)):
        assert layer(torch.randn(shape)).shape == shape
    strided = torch.randn(6, 3, H)[::2, 0]
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    with pytest.raises(ValueError, match="hidden_size=16"):
        layer(torch.randn(3, H + 1))
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 but the experts are torch.float32"):
        layer(torch.randn(3, H).bfloat16())
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match="num_chunks is 0"):
        Case({"num_chunks": 0}).layer(None)
    with pytest.raises(ValueError, match="are both given"):
        Case({"router": layer.router, "aux_loss_coef": 0.1}).layer(None)


@pytest.mark.parametrize(("name", "value"), [("hidden_size", 8), ("num_experts", 6), ("top_k", 2)])
def test_a_router_of_other_sizes_is_refused(name, value):
    router = TopKRouter(**{"hidden_size": H, "num_experts": E, "top_k": K} | {name: value})
    with pytest.raises(ValueError, match=rf"router has {name}={value}: it must be the layer's {name}=.*pass {name}"):
        Case({"router": router}).layer(None)


class UnknownSizes(torch.nn.Module):
    """A router that does not say its sizes, and leaves out every second choice."""

    def forward(self, x, *, group, return_losses):
        ids = torch.arange(K).repeat(len(x), 1)
        ids[:, 1] = -1
        return Routing(topk_idx=ids, topk_weights=x[:, :K].clone(), tokens_per_expert=count_choices(ids.flatten(), E))


def test_a_router_may_keep_its_sizes_to_itself():
    layer = Case({"router": UnknownSizes()}).layer(None)
    layer(Case().batch(1)[0])
    assert layer.tokens_per_expert[:K].tolist() == [TOKENS, 0, TOKENS]


def test_without_gradients():
    layer, (x, _) = Case({**SHARED, "num_chunks": 2}).layer(None), Case().batch(1)
    expected_out = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = layer(x)
        assert torch.equal(out, expected_out)
        assert not out.requires_grad


@pytest.mark.parametrize("capacity", [moe_ep.Capacity(rows=8), moe_ep.Capacity(per_expert=1)])
def test_overflow_raises_or_drops(capacity):
    x, _ = Case().batch(1)
    layer = Case({"capacity": capacity}).layer(None)
    with pytest.raises(CapacityError):
        layer(x)
    layer = Case({"capacity": capacity, "on_overflow": "drop"}).layer(None)
    out = layer(x)
    out.sum().backward()
    assert (out == 0).all(1).any()
    assert not (out == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_hooks_are_told_the_layer():
    layer, seen = Case().layer(None, layer_idx=7), []
    layer.dispatcher.register_hook("dispatch_ready", lambda event: seen.append(event.layer))
    layer(Case().batch(1)[0])
    assert seen == [7]


def test_statistics_count_until_they_are_reset():
    layer = Case().layer(None)
    x, _ = Case().batch(1)
    layer(x)
    layer.eval()(x)
    assert layer.tokens_per_expert.sum() == 2 * TOKENS * K
    assert "tokens_per_expert" not in layer.state_dict()
    layer.reset_stats()
    assert layer.tokens_per_expert.sum() == 0
