import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe_ep.layers import GroupedExperts
from tests.layers.reference import gated_mlp

H, WIDTH = 16, 24
COUNTS = [5, 0, 7, 1]
ENDS = torch.tensor(COUNTS, dtype=torch.int32).cumsum(0, dtype=torch.int32)
TOTAL = sum(COUNTS)
NAN = float("nan")


def make_experts(dtype=torch.float64, **options):
    return GroupedExperts(len(COUNTS), hidden_size=H, intermediate_size=WIDTH, dtype=dtype, **options)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def looped(experts, rows, weights=None, act=F.silu):
    outs = []
    for i, own in enumerate(rows.split(COUNTS)):
        outs.append(gated_mlp(own, experts.w_gate_up[i], experts.w_down[i], act))
    out = torch.cat(outs)
    # Weights before the second GEMM or after it: a linear map.
    return out if weights is None else out * weights[:, None]


def gradients(out, probe, *inputs):
    return torch.autograd.grad((out * probe).sum(), inputs)


def assert_equal_within(ours, theirs, dtype):
    # Sums of at most H + WIDTH + TOTAL + 2 = 55 terms of size at most about 4, twice in a row.
    bound = 2 * 55 * 4 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "custom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expanded_rows_equal_plain_loops(dtype, activation, late):
    act = {"swiglu": F.silu, "geglu": F.gelu, "custom": torch.tanh}[activation]
    if activation == "custom":
        activation = lambda h: torch.tanh(h[..., :WIDTH]) * h[..., WIDTH:]  # noqa: E731
    experts = make_experts(dtype, activation=activation)
    rows, weights = draw(TOTAL, H, dtype=dtype).requires_grad_(), draw(TOTAL, seed=1).abs().to(dtype).requires_grad_()
    given = experts.weights(dtype).late() if late else None
    out = experts(rows, ENDS, weights, weights=given)
    expected = looped(experts, rows, weights, act)
    assert_equal_within([out], [expected], dtype)
    probe, inputs = draw(TOTAL, H, seed=2).to(dtype), (rows, weights, *experts.parameters())
    assert_equal_within(gradients(out, probe, *inputs), gradients(expected, probe, *inputs), dtype)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_computes_every_product_that_it_takes(monkeypatch, dtype, late):
    multiply, calls = F.grouped_mm, []

    def spy(*args, **options):
        calls.append(options["offs"].tolist())
        return multiply(*args, **options)

    monkeypatch.setattr(F, "grouped_mm", spy)
    experts = make_experts(dtype)
    rows = draw(TOTAL, H, dtype=dtype).requires_grad_()
    out = experts(rows, ENDS, weights=experts.weights(dtype).late() if late else None)
    # Two products forward; backward for each of them the gradients of its rows and of its weight.
    assert calls == [ENDS.tolist()] * 2
    out.sum().backward()
    assert calls == [ENDS.tolist()] * 6


def test_widths_that_grouped_mm_refuses():
    experts = GroupedExperts(len(COUNTS), hidden_size=17, intermediate_size=5, dtype=torch.float32)
    rows = draw(TOTAL, 17, dtype=torch.float32).requires_grad_()
    out, expected = experts(rows, ENDS), looped(experts, rows)
    assert_equal_within([out], [expected], torch.float32)
    probe, inputs = torch.ones_like(out), (rows, *experts.parameters())
    assert_equal_within(gradients(out, probe, *inputs), gradients(expected, probe, *inputs), torch.float32)


def test_low_precision_rounds_only_at_kept_tensors():
    experts = make_experts(torch.bfloat16)
    rows, weights = draw(TOTAL, H, dtype=torch.bfloat16), draw(TOTAL, seed=1).abs().float().requires_grad_()
    out = experts(rows, ENDS, weights)
    expected = looped(copy.deepcopy(experts).double(), rows.double(), weights.double())
    # hidden, activation, product, weighted product and output are rounded to 2^-9 each; values below 4.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5 * 4 * 2**-9)
    out.float().sum().backward()
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_undefined_rows_past_the_last_group_reach_nothing(dtype, late):
    experts = make_experts(dtype)
    rows, weights = draw(TOTAL, H, dtype=dtype), draw(TOTAL, seed=1, dtype=dtype)
    padded, padded_weights = rows.new_full((TOTAL + 4, H), NAN), rows.new_full((TOTAL + 4,), NAN)
    padded[:TOTAL], padded_weights[:TOTAL] = rows, weights
    padded.requires_grad_()
    out = experts(padded, ENDS, padded_weights, weights=experts.weights(dtype).late() if late else None)
    expected = looped(experts, rows, weights)
    assert_equal_within([out[:TOTAL]], [expected], dtype)
    probe = torch.full_like(out, NAN)
    probe[:TOTAL] = 1
    (padded_grad, *ours) = torch.autograd.grad(out, (padded, *experts.parameters()), probe)
    theirs = torch.autograd.grad(expected.sum(), tuple(experts.parameters()))
    assert_equal_within(ours, theirs, dtype)
    assert not padded_grad[:TOTAL].isnan().any()


def to_slab(rows, fill, size=9):
    slab = rows.new_full((len(COUNTS), size, *rows.shape[1:]), fill)
    for i, own in enumerate(rows.split(COUNTS)):
        slab[i, : len(own)] = own
    return slab


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slab_with_undefined_rows(dtype, late):
    experts = make_experts(dtype)
    rows, weights = draw(TOTAL, H, dtype=dtype), draw(TOTAL, seed=1, dtype=dtype)
    slab, slab_weights = to_slab(rows, NAN).requires_grad_(), to_slab(weights, NAN).requires_grad_()
    counts = torch.tensor(COUNTS, dtype=torch.int32)
    given = experts.weights(dtype).late() if late else None
    out = experts(slab, ENDS, slab_weights, tokens_per_expert=counts, weights=given)
    expected = looped(experts, rows, weights)
    probe = to_slab(torch.ones_like(rows), NAN)
    (_, weights_grad, *ours) = torch.autograd.grad(out, (slab, slab_weights, *experts.parameters()), probe)
    assert_equal_within([torch.cat([s[:n] for s, n in zip(out, COUNTS, strict=True)])], [expected], dtype)
    assert_equal_within(ours, torch.autograd.grad(expected.sum(), tuple(experts.parameters())), dtype)
    assert not weights_grad.isnan().any()
    with pytest.raises(ValueError, match="tokens_per_expert is None"):
        experts(slab, ENDS)


def test_fixed_groups_run_as_one_batched_product():
    experts = make_experts()
    rows, weights = draw(TOTAL, H), draw(TOTAL, seed=1)
    padded, padded_weights = to_slab(rows, 0.0).flatten(0, 1), to_slab(weights, 0.0).flatten()
    out = experts(padded, ENDS, padded_weights, rows_per_expert=9)
    unpadded = torch.cat([s[:n] for s, n in zip(out.unflatten(0, (-1, 9)), COUNTS, strict=True)])
    assert_equal_within([unpadded], [looped(experts, rows, weights)], torch.float64)


@pytest.mark.parametrize("host_count", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compact_rows_serve_all_their_choices(dtype, host_count):
    experts = make_experts(dtype)
    topk_idx = torch.tensor([[0, -1, 2], [-1, -1, 3], [2, 0, 3], [-1, -1, -1], [3, 2, -1]])
    rows = draw(5, H, dtype=dtype).requires_grad_()
    weights = draw(5, 3, seed=1, dtype=dtype).masked_fill(topk_idx < 0, NAN).requires_grad_()
    counts = torch.tensor([2, 0, 3, 3], dtype=torch.int32)
    num_copies = 8 if host_count else None
    options = {"topk_idx": topk_idx, "tokens_per_expert": counts, "num_copies": num_copies}
    out = experts(rows, ENDS, weights, **options)
    expected = torch.zeros_like(rows)
    for n, k in (topk_idx >= 0).nonzero().tolist():
        i = topk_idx[n, k]
        y = gated_mlp(rows[n : n + 1], experts.w_gate_up[i], experts.w_down[i]) * weights[n, k]
        expected = expected + F.pad(y, (0, 0, n, 4 - n))
    assert_equal_within([out], [expected], dtype)
    probe, inputs = draw(5, H, seed=2, dtype=dtype), (rows, weights, *experts.parameters())
    assert_equal_within(gradients(out, probe, *inputs), gradients(expected, probe, *inputs), dtype)
    with pytest.raises(ValueError, match="row_weights is None"):
        experts(rows, ENDS, **options)


def test_zero_rows():
    experts = make_experts(torch.float32)
    ends, none = torch.zeros(4, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int64)
    rows = torch.zeros(0, H, requires_grad=True)
    for out in (
        experts(rows, ends, torch.zeros(0)),
        experts(rows, ends, torch.zeros(0, 2), topk_idx=none, tokens_per_expert=ends),
        experts(rows.new_zeros(4, 0, H), ends, torch.zeros(4, 0), tokens_per_expert=ends),
    ):
        assert out.shape[-1] == H
        assert out.numel() == 0
        grads = torch.autograd.grad(out.sum(), tuple(experts.parameters()))
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("late", [False, True])
def test_frozen_experts_pass_gradients_on(late):
    experts, rows = make_experts(), draw(TOTAL, H).requires_grad_()
    expected = torch.autograd.grad(looped(experts, rows).sum(), (rows, experts.w_down))
    experts.w_gate_up.requires_grad_(False)
    out = experts(rows, ENDS, weights=experts.weights(torch.float64).late() if late else None)
    assert_equal_within(torch.autograd.grad(out.sum(), (rows, experts.w_down)), expected, torch.float64)
    experts.w_down.requires_grad_(False)
    out = experts(rows, ENDS, weights=experts.weights(torch.float64).late() if late else None)
    assert_equal_within(torch.autograd.grad(out.sum(), rows), expected[:1], torch.float64)


def test_late_gradients_accumulate_over_two_uses_and_backwards():
    experts, rows = make_experts(), draw(TOTAL, H)
    for seed in (0, 1):
        out = sum(experts(rows, ENDS, weights=experts.weights(torch.float64).late()) for _ in range(2))
        (out * draw(TOTAL, H, seed=seed)).sum().backward()
    late = [p.grad.clone() for p in experts.parameters()]
    experts.zero_grad()
    for seed in (0, 1):
        (2 * experts(rows, ENDS) * draw(TOTAL, H, seed=seed)).sum().backward()
    assert_equal_within(late, [p.grad for p in experts.parameters()], torch.float64)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_late_gradients_under_checkpointing(use_reentrant):
    experts, rows = make_experts(), draw(TOTAL, H).requires_grad_()

    def run(rows):
        return experts(rows, ENDS, weights=experts.weights(torch.float64).late())

    checkpoint(run, rows, use_reentrant=use_reentrant).sum().backward()
    expected = torch.autograd.grad(looped(experts, rows).sum(), (rows, *experts.parameters()))
    assert_equal_within([rows.grad, *(p.grad for p in experts.parameters())], expected, torch.float64)


def test_second_derivatives_raise():
    experts, rows = make_experts(), draw(TOTAL, H).requires_grad_()
    (grad,) = torch.autograd.grad(experts(rows, ENDS).pow(2).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_parameters_are_the_same_for_every_number_of_ranks():
    torch.manual_seed(5)
    whole = GroupedExperts(6, hidden_size=H, intermediate_size=WIDTH, seed=3, layer_idx=2)
    half = GroupedExperts(3, hidden_size=H, intermediate_size=WIDTH, seed=3, layer_idx=2, first_expert=3, device="meta")
    half.to_empty(device="cpu").reset_parameters()
    assert torch.equal(whole.w_gate_up[3:], half.w_gate_up)
    assert torch.equal(whole.w_down[3:], half.w_down)
    other = GroupedExperts(6, hidden_size=H, intermediate_size=WIDTH, seed=3, layer_idx=1)
    assert not torch.equal(whole.w_down, other.w_down)
    assert len({value.item() for value in whole.w_down.flatten()}) > 0.99 * whole.w_down.numel()


@pytest.mark.parametrize("change", ["none", "deepcopy", "pickle", "to_empty", "to_dtype"])
def test_parameters_stay_marked_as_this_rank_s_own(change):
    experts = make_experts(device="meta" if change == "to_empty" else None)
    changes = {
        "none": lambda: experts,
        "deepcopy": lambda: copy.deepcopy(experts),
        "pickle": lambda: pickle.loads(pickle.dumps(experts)),
        "to_empty": lambda: experts.to_empty(device="cpu"),
        "to_dtype": lambda: experts.to(torch.bfloat16),
    }
    assert [p.allreduce for p in changes[change]().parameters()] == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiles_without_a_break(dtype):
    experts, rows = make_experts(dtype), draw(TOTAL, H, dtype=dtype).requires_grad_()
    weights = draw(TOTAL, seed=1).abs().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    inputs = (rows, weights, *experts.parameters())
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(rows, ENDS, weights), experts(rows, ENDS, weights)
    # The same products; only the activation's roundings may differ.
    close = {"rtol": 0, "atol": 300 * torch.finfo(dtype).eps}
    torch.testing.assert_close(ours, theirs, **close)
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **close | {"atol": 300 * torch.finfo(dtype).eps})


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="activation is 'relu'"):
        make_experts(activation="relu")
    with pytest.raises(ValueError, match="num_local_experts is 0"):
        GroupedExperts(0, hidden_size=H, intermediate_size=WIDTH)
    with pytest.raises(ValueError, match=r"activation returned shape \[13, 48\]"):
        make_experts(activation=torch.relu)(draw(TOTAL, H), ENDS)
