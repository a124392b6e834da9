import pytest
import torch

import moe_ep
from moe_ep.layers import TopKRouter
from moe_ep.layers.losses import balance_loss, count_choices
from tests.layers import reference

H, E, K = 16, 12, 3
COEFS = {"aux_loss_coef": 0.5, "seq_aux_loss_coef": 0.25, "z_loss_coef": 0.125}
# Sequences per rank, each of 5 tokens: uneven, and one rank without any.
NUM_SEQS = {1: [3], 2: [4, 1], 3: [2, 0, 3], 4: [1, 2, 0, 2]}


def batch(num_seqs):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_seqs, 5, H, generator=generator, dtype=torch.float64)


def make_router(scope, score_function="softmax"):
    return TopKRouter(H, E, K, scope=scope, score_function=score_function, dtype=torch.float64, **COEFS)


def expected_losses(x, weight, score_function="softmax"):
    """The three losses of a batch [B, S, H], sequence by sequence."""
    logits = [seq @ weight.T for seq in x]
    scores = [(logit.softmax(1) if score_function == "softmax" else logit.sigmoid()) for logit in logits]
    probs = [score / score.sum(1, keepdim=True) for score in scores]
    ids = [score.topk(K, dim=1).indices for score in scores]
    per_seq = [reference.switch_loss(p, i) for p, i in zip(probs, ids, strict=True)]
    return {
        "aux_loss": 0.5 * reference.switch_loss(torch.cat(probs), torch.cat(ids)),
        "seq_aux_loss": 0.25 * torch.stack(per_seq).mean(),
        "z_loss": 0.125 * reference.z_loss(torch.cat(logits)),
    }


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_losses_equal_plain_loops(score_function):
    router, x = make_router("rank", score_function), batch(3)
    losses = router(x, return_losses=True).losses
    expected = expected_losses(x, router.weight, score_function)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-12, atol=0)
        ours, theirs = (torch.autograd.grad(t[name], router.weight, retain_graph=True) for t in (losses, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def rank_losses(ctx, scope, attached, through_buffer=False):
    x = batch(sum(NUM_SEQS[ctx.world_size])).split(NUM_SEQS[ctx.world_size])[ctx.rank].requires_grad_()
    router = make_router(scope)
    group = moe_ep.Buffer.for_group(ctx.group, timeout_s=20) if through_buffer else ctx.group
    routing = router(x, group=group, return_losses=not attached)
    if attached:
        (0 * routing.topk_weights).sum().backward()
    else:
        sum(routing.losses.values()).backward()
    return {name: loss.detach() for name, loss in routing.losses.items()}, x.grad, router.weight.grad


@pytest.mark.parametrize("through_buffer", [False, True])
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_group_scope_is_the_loss_of_the_whole_batch(ranks, num_ranks, attached, through_buffer):
    results = ranks(num_ranks, rank_losses, "group", attached, through_buffer)
    x = batch(sum(NUM_SEQS[num_ranks])).requires_grad_()
    router = make_router("rank")
    expected = expected_losses(x, router.weight)
    sum(expected.values()).backward()
    for losses, _, _ in results:
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name].detach(), rtol=1e-12, atol=0)
    # The convention: gradients averaged over ranks are exact, also those that flow on into x.
    weight_grad = sum(grad for _, _, grad in results) / num_ranks
    torch.testing.assert_close(weight_grad, router.weight.grad, rtol=1e-10, atol=1e-13)
    x_grad = torch.cat([grad for _, grad, _ in results]) / num_ranks
    torch.testing.assert_close(x_grad, x.grad, rtol=1e-10, atol=1e-13)


def test_rank_scope_sees_its_own_batch_only(ranks):
    results = ranks(3, rank_losses, "rank", False)
    x = batch(sum(NUM_SEQS[3])).split(NUM_SEQS[3])
    for (losses, _, _), own in zip(results, x, strict=True):
        weight = make_router("rank").weight.detach()
        expected = expected_losses(own, weight) if len(own) else dict.fromkeys(losses, 0)
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(float(expected[name]), rel=1e-12)


def update_bias(ctx):
    router = TopKRouter(H, 4, 1, use_correction_bias=True, bias_update_rate=1.0)
    # Balanced over the group of two, though not on either rank.
    router.bias_counts.copy_(torch.tensor([3, 1, 2, 0] if ctx.rank == 0 else [1, 3, 2, 0]))
    router.update_bias(ctx.group)
    return router.correction_bias.tolist()


def test_bias_update_counts_the_whole_group(ranks):
    assert ranks(2, update_bias) == [[-1.0, -1.0, -1.0, 1.0]] * 2


def test_balance_loss_is_one_when_even_and_largest_when_all_agree():
    even = torch.full((E,), 6)
    assert balance_loss(even, even.double() / K, 24, K).item() == pytest.approx(1.0)
    agreed = torch.zeros(E).index_fill(0, torch.arange(K), 24)
    assert balance_loss(agreed, agreed.double() / K, 24, K).item() == pytest.approx(E / K)
    assert balance_loss(agreed * 0, agreed.double() * 0, 0, K).item() == 0


def test_count_choices_leaves_out_holes():
    idx = torch.tensor([[0, 2, -1, 2], [-1, -1, 1, 0]])
    assert count_choices(idx, 3).tolist() == [[1, 0, 2], [1, 1, 0]]
    assert count_choices(idx[:, :0], 3).tolist() == [[0, 0, 0]] * 2
