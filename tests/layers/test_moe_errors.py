"""The layer when one rank errs, is late, or does something else: all ranks end and say why."""

import time

import pytest
import torch
from torch import nn

from moe_ep.errors import ExchangeMismatchError, PeerAbortedError, PeerTimeoutError
from moe_ep.layers import TopKRouter
from tests.layers.test_moe import Case, E, H, K
from tests.layers.test_moe_modes import own_batch

GROUP_LOSS = {"aux_loss_coef": 0.5, "scope": "group"}


class OwnRouter(nn.Module):
    """Not a TopKRouter, so that its losses take an all-reduce of the group, as on a GPU."""

    def __init__(self):
        super().__init__()
        self.inner = TopKRouter(H, E, K, seed=5, dtype=torch.float64, **GROUP_LOSS)

    def forward(self, x, *, group, return_losses):
        return self.inner(x, group=group, return_losses=return_losses)


def refuse(*_args, **_kwargs):
    raise RuntimeError("no room for scores")


def err_on_one(ctx, fault, options, own_router):
    case = Case(options | ({"router": OwnRouter()} if own_router else {}), uneven=False)
    layer, (x, _) = case.layer(ctx.group), own_batch(ctx, case)
    given = x
    if ctx.rank == 1:
        given = {"dtype": x.float(), "shape": x[:, :8], "no tensor": x.tolist()}.get(fault, x)
        if fault == "router":
            layer.router._choose = refuse
    caught = None
    try:
        layer(given)
    # Whatever it is: peers must learn of it.
    except Exception as error:
        caught = error
    vars(layer.router).pop("_choose", None)
    # Nothing is lost: the next forward of the same layer works.
    assert torch.equal(layer(x), case.layer(ctx.group)(x))
    return caught


FAULTS = {
    "dtype": (ValueError, "x is torch.float32 but the experts are torch.float64"),
    "shape": (ValueError, "hidden_size=16"),
    "no tensor": (ValueError, "x is list: pass a tensor"),
    "router": (RuntimeError, "no room for scores"),
}


def check_told(results, fault):
    kind, text = FAULTS[fault]
    own = results[1]
    assert type(own) is kind
    assert text in str(own)
    for error in (result for rank, result in enumerate(results) if rank != 1):
        assert isinstance(error, PeerAbortedError)
        assert error.rank == 1
        assert error.reason == f"{kind.__name__}: {own}"


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("losses", [{}, GROUP_LOSS], ids=["plain", "group_loss"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_one_rank_before_the_exchange_ends_all(ranks, fault, losses, num_chunks):
    check_told(ranks(3, err_on_one, fault, {"num_chunks": num_chunks, **losses}, False), fault)


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("fault", ["dtype", "shape"])
def test_peers_in_an_all_reduce_of_losses_are_released(ranks, fault, num_chunks):
    # A forgotten rank would keep them until the timeout of the group, which outlasts this one.
    check_told(ranks(2, err_on_one, fault, {"num_chunks": num_chunks}, True, timeout=60), fault)


def come_late(ctx):
    case = Case({**GROUP_LOSS, "timeout_s": 2})
    layer, (x, _) = case.layer(ctx.new_group()), own_batch(ctx, case)
    out, named = layer(x), None
    if ctx.rank == 2:
        # Until the others have given up.
        time.sleep(7)
    try:
        layer(x)
    except PeerTimeoutError as error:
        named = error.ranks
    layer.dispatcher.reset()
    assert torch.equal(layer(x), out)
    return named


def test_a_rank_late_for_the_losses_is_named_and_all_go_on_after_reset(ranks):
    # What the others had sent may still serve the late rank, so it alone need not fail.
    assert ranks(3, come_late)[:2] == [(2,), (2,)]


def differ_in_mode(ctx):
    case = Case(GROUP_LOSS)
    layer, (x, _) = case.layer(ctx.group), own_batch(ctx, case)
    layer.train(ctx.rank != 1)
    with pytest.raises(ExchangeMismatchError, match="for the losses of a router") as caught:
        layer(x)
    assert "dispatch" in str(caught.value)
    layer.train()
    assert torch.equal(layer(x), case.layer(ctx.group)(x))


def test_ranks_of_which_one_computes_no_losses_are_told(ranks):
    ranks(2, differ_in_mode)
