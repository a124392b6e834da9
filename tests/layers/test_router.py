import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_ep.layers import TopKRouter, set_loss_scale
from tests.layers import reference

H, E, K = 16, 8, 3


def tokens(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_softmax_routing_equals_plain_loops():
    router = TopKRouter(H, E, K, dtype=torch.float64)
    x = tokens(9, dtype=torch.float64)
    routing = router(x)
    ids, weights = reference.softmax_routing(x, router.weight, K)
    assert torch.equal(routing.topk_idx, ids)
    torch.testing.assert_close(routing.topk_weights, weights, rtol=1e-13, atol=0)
    assert routing.tokens_per_expert.tolist() == [(ids == i).sum().item() for i in range(E)]


@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_weights(normalize):
    router = TopKRouter(H, E, K, score_function="sigmoid", normalize_weights=normalize, weight_scale=2.5)
    x = tokens(7)
    routing = router(x)
    scores = (x @ router.weight.T).sigmoid().gather(1, routing.topk_idx)
    expected = 2.5 * (scores / scores.sum(1, keepdim=True) if normalize else scores)
    torch.testing.assert_close(routing.topk_weights, expected)


def test_input_and_parameters_below_fp32_are_computed_in_fp32():
    router = TopKRouter(H, E, K)
    x = tokens(50).bfloat16()
    expected = router(x.float())
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x.float())
    for routing in (plain, under_autocast):
        assert routing.topk_weights.dtype == torch.float32
        assert torch.equal(routing.topk_weights, expected.topk_weights)
    assert router.to(torch.bfloat16)(x).topk_weights.dtype == torch.float32
    assert router.double()(x.double()).topk_weights.dtype == torch.float64


@pytest.mark.parametrize(("num_experts", "top_k", "best"), [(8, 3, 1), (12, 4, 2), (16, 5, 2)])
def test_group_limit_keeps_choices_in_the_best_groups(num_experts, top_k, best):
    router = TopKRouter(H, num_experts, top_k, score_function="sigmoid", num_groups=4, topk_groups=2)
    x = tokens(40)
    scores = (x @ router.weight.T).sigmoid()
    for chosen, row in zip(router(x).topk_idx, scores, strict=True):
        # A group scores by the sum of its best K // topk_groups experts.
        totals = [sum(sorted(group.tolist())[-best:]) for group in row.chunk(4)]
        groups = sorted(range(4), key=lambda group: -totals[group])[:2]
        allowed = [i for i in range(num_experts) if i // (num_experts // 4) in groups]
        assert set(chosen.tolist()) == set(sorted(allowed, key=lambda i: -row[i])[:top_k])


def test_correction_bias_changes_choices_but_not_weights():
    router = TopKRouter(H, E, K, score_function="sigmoid", use_correction_bias=True, normalize_weights=False)
    x = tokens(20)
    router.correction_bias[5] = 10.0
    routing = router(x)
    assert (routing.topk_idx == 5).any(1).all()
    scores = (x @ router.weight.T).sigmoid()
    torch.testing.assert_close(routing.topk_weights, scores.gather(1, routing.topk_idx))


def test_bias_update_moves_by_the_sign_of_the_imbalance():
    router = TopKRouter(H, 4, 1, use_correction_bias=True, bias_update_rate=0.5)
    router.bias_counts.copy_(torch.tensor([4, 0, 2, 2]))
    router.update_bias()
    assert router.correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert router.bias_counts.tolist() == [0] * 4
    router.update_bias()
    assert router.correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_counted_again(use_reentrant):
    router = TopKRouter(H, E, K, use_correction_bias=True)
    x = tokens(6).requires_grad_()
    weights = checkpoint(lambda t: router(t).topk_weights, x, use_reentrant=use_reentrant)
    (weights**2).sum().backward()
    assert router.bias_counts.sum() == 6 * K
    router.eval()(x)
    assert router.bias_counts.sum() == 6 * K


def test_bias_stays_fp32_and_is_saved():
    router = TopKRouter(H, E, K, use_correction_bias=True)
    router.correction_bias += 1 + 1e-4
    kept = router.correction_bias.clone()
    assert torch.equal(router.to(torch.bfloat16).correction_bias, kept)
    assert set(router.state_dict()) == {"weight", "correction_bias"}


def test_forced_balance_is_even_and_differentiable():
    router = TopKRouter(H, E, K, force_balance=True)
    routing = router(tokens(E))
    assert routing.tokens_per_expert.tolist() == [K] * E
    assert all(len(set(row)) == K for row in routing.topk_idx.tolist())
    (routing.topk_weights**2).sum().backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False, None])
def test_attached_losses_equal_returned_ones(use_reentrant):
    options = {"aux_loss_coef": 0.1, "seq_aux_loss_coef": 0.2, "z_loss_coef": 0.3, "dtype": torch.float64}
    router = TopKRouter(H, E, K, **options)
    other = copy.deepcopy(router)
    set_loss_scale(router, 7.0)
    x = tokens(2, 5, dtype=torch.float64).requires_grad_()
    if use_reentrant is None:
        routing = router(x)
        weights = routing.topk_weights
        assert not any(loss.requires_grad for loss in routing.losses.values())
    else:
        weights = checkpoint(lambda t: router(t).topk_weights, x, use_reentrant=use_reentrant)
    (weights**2).sum().backward()
    attached, x.grad = x.grad, None
    routing = other(x, return_losses=True)
    ((routing.topk_weights**2).sum() + 7 * sum(routing.losses.values())).backward()
    torch.testing.assert_close(attached, x.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(router.weight.grad, other.weight.grad, rtol=1e-12, atol=1e-14)


def test_evaluation_computes_losses_only_when_asked():
    router = TopKRouter(H, E, K, aux_loss_coef=0.1).eval()
    assert router(tokens(4)).losses == {}
    assert set(router(tokens(4), return_losses=True).losses) == {"aux_loss"}


@pytest.mark.parametrize("shape", [(0,), (), (0, 3), (2, 0), (2, 3, 4)])
def test_any_number_of_tokens(shape):
    router = TopKRouter(H, E, K, aux_loss_coef=0.1, seq_aux_loss_coef=0.1, z_loss_coef=0.1)
    routing = router(tokens(*shape), return_losses=True)
    num_tokens = torch.Size(shape).numel()
    assert routing.topk_idx.shape == routing.topk_weights.shape == (num_tokens, K)
    assert all(loss.isfinite() and (loss != 0) == (num_tokens > 0) for loss in routing.losses.values())


def test_parameters_depend_on_seed_and_layer_alone():
    first = TopKRouter(H, E, K, seed=3, layer_idx=1)
    torch.manual_seed(99)
    again = TopKRouter(H, E, K, seed=3, layer_idx=1, device="meta").to_empty(device="cpu")
    again.reset_parameters()
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, TopKRouter(H, E, K, seed=3, layer_idx=2).weight)
    assert not torch.equal(first.weight, TopKRouter(H, E, K, seed=4, layer_idx=1).weight)


def test_compiles_without_a_break():
    router = TopKRouter(H, E, K, aux_loss_coef=0.1, use_correction_bias=True, num_groups=4, topk_groups=3)
    x = tokens(5)
    expected = router(x)
    routing = torch.compile(router, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(routing.topk_idx, expected.topk_idx)
    torch.testing.assert_close(routing.topk_weights, expected.topk_weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k is 9"),
        ({"score_function": "tanh"}, "score_function is 'tanh'"),
        ({"scope": "world"}, "scope is 'world'"),
        ({"num_groups": 3}, "num_groups is 3"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups is 5"),
        ({"num_groups": 4, "topk_groups": 1}, "raise topk_groups"),
        ({"aux_loss_coef": -1.0}, "aux_loss_coef is -1.0"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"hidden_size": H, "num_experts": E, "top_k": K} | changes
    with pytest.raises(ValueError, match=message):
        TopKRouter(**arguments)
