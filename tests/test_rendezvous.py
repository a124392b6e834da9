"""Constructors that fail on some ranks of a group, and are called again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from moe_ep import Buffer
from moe_ep.backends import rendezvous
from moe_ep.errors import PeerTimeoutError
from moe_ep.testing import RankContext
from tests.buffer_checks import exchange_with

Ranks = Callable[..., list]


def construct_again(ctx: RankContext, moment: str) -> tuple[int, ...]:
    """Rank 2 fails to construct, or does not try, while the others do; then all of them try."""
    group, named = ctx.new_group(), ()
    exchange_with(Buffer(group, timeout_s=20), ctx)
    usual, connect = rendezvous._CONNECT_SECONDS, rendezvous.Rendezvous.connect
    rendezvous._CONNECT_SECONDS = 1.0

    def fail(self: rendezvous.Rendezvous, attempt: int) -> None:
        raise PeerTimeoutError("no descriptors left", ranks=(2,))

    try:
        if ctx.rank == 2 and moment == "before connecting":
            rendezvous.Rendezvous.connect = fail
        for _ in range(2 if moment == "twice" else 1):
            if ctx.rank != 2 or moment == "before connecting":
                with pytest.raises(PeerTimeoutError) as caught:
                    Buffer(group, timeout_s=0.5)
                named = caught.value.ranks
    finally:
        rendezvous._CONNECT_SECONDS, rendezvous.Rendezvous.connect = usual, connect
    dist.barrier(group=ctx.group)
    exchange_with(Buffer(group, timeout_s=20), ctx)
    exchange_with(Buffer.for_group(group, timeout_s=20), ctx)
    return named


@pytest.mark.parametrize("moment", ["before all", "twice", "before connecting"])
def test_a_constructor_that_failed_on_some_ranks_can_be_called_again(ranks: Ranks, moment: str) -> None:
    for named in ranks(3, construct_again, moment)[:2]:
        assert named == (2,)
