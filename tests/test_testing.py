"""The tools that other tests rely on: pools that report what went wrong, routings, the gradient check."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from moe_ep.errors import PeerTimeoutError
from moe_ep.testing import (
    RankContext,
    RemoteError,
    distributed_gradcheck,
    make_routing,
    pool,
    run_ranks,
    uneven_tokens,
)

Ranks = Callable[..., list]


@dataclass(frozen=True)
class Shipped:
    """An argument whose class lives in this file."""

    value: int


class LocalError(Exception):
    """Does not pickle: its constructor takes more than its args hold."""

    def __init__(self, first: str, *, second: int) -> None:
        super().__init__(first)
        self.second = second


def sum_of_ranks(ctx: RankContext, shipped: Shipped) -> tuple[int, int]:
    total = torch.tensor([ctx.rank + shipped.value])
    dist.all_reduce(total, group=ctx.group)
    return os.getpid(), int(total)


def raise_on(ctx: RankContext, rank: int, kind: str) -> None:
    if ctx.rank != rank:
        return
    if kind == "own":
        raise PeerTimeoutError("rank 7 is missing", ranks=(7,))
    if kind == "local":
        raise LocalError("a text", second=2)
    if kind == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        sys.stdout.write("about to hang\n")
        time.sleep(60)
    if kind == "unmatched":
        dist.all_reduce(torch.tensor([1]), group=ctx.group, async_op=True)


def die_alone(ctx: RankContext) -> int:
    if ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx.rank


def never_exit(ctx: RankContext) -> None:
    if ctx.rank == 0:
        threading.Thread(target=time.sleep, args=(60,)).start()


def groups_of(ctx: RankContext) -> tuple[bool, int, bool]:
    pair = ctx.subgroup([0, 2])
    same = ctx.subgroup([0, 2]) is pair
    private = ctx.new_group()
    total = torch.tensor([1])
    dist.all_reduce(total, group=private)
    return same, int(total), pair is not None


def leave_state(ctx: RankContext) -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)


def read_state(ctx: RankContext) -> tuple[bool, torch.dtype, int]:
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_pool_returns_results_by_rank_and_keeps_its_processes(ranks: Ranks, num_ranks: int) -> None:
    first = ranks(num_ranks, sum_of_ranks, Shipped(10))
    second = ranks(num_ranks, sum_of_ranks, Shipped(0))
    assert [total for _, total in first] == [10 * num_ranks + num_ranks * (num_ranks - 1) // 2] * num_ranks
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == num_ranks


def test_pool_raises_the_original_type_with_the_remote_traceback(ranks: Ranks) -> None:
    with pytest.raises(PeerTimeoutError, match="rank 7 is missing") as caught:
        ranks(2, raise_on, 1, "own")
    assert caught.value.ranks == (7,)
    assert isinstance(caught.value.__cause__, RemoteError)
    assert "rank 1 raised" in str(caught.value.__cause__)
    assert "in raise_on" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("local", r"rank 1 raised:(.|\n)*LocalError: a text"), ("exit", "rank 1 died with exit code -9")],
)
def test_pool_tells_what_happened_and_is_replaced(ranks: Ranks, kind: str, text: str) -> None:
    before = ranks(2, sum_of_ranks, Shipped(0))
    with pytest.raises(RemoteError, match=text):
        ranks(2, raise_on, 1, kind)
    after = ranks(2, sum_of_ranks, Shipped(0))
    assert {pid for pid, _ in before}.isdisjoint(pid for pid, _ in after)


def test_pool_shows_where_a_rank_hangs() -> None:
    with pytest.raises(RemoteError, match=r"rank 0 did not answer in time(.|\n)*about to hang(.|\n)*in raise_on"):
        run_ranks(2, raise_on, 0, "hang", timeout=2)


def test_pool_notices_a_collective_that_only_one_rank_began(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SETTLE_SECONDS", 1.0)
    with pytest.raises(RemoteError, match="check_in_step"):
        ranks(2, raise_on, 0, "unmatched")


def test_throw_away_pool_returns_what_survivors_say() -> None:
    assert run_ranks(3, die_alone, fresh=True, expect_dead=(1,)) == [0, None, 2]


def test_throw_away_pool_insists_on_the_expected_deaths() -> None:
    with pytest.raises(RemoteError, match="rank 0 was expected to die"):
        run_ranks(2, die_alone, fresh=True, expect_dead=(0, 1))


def test_throw_away_pool_insists_on_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "EXIT_SECONDS", 2.0)
    with pytest.raises(RemoteError, match="rank 0 did not exit"):
        run_ranks(2, never_exit, fresh=True)


def test_pool_keeps_subgroups_and_drops_private_groups(ranks: Ranks) -> None:
    assert ranks(3, groups_of) == [(True, 3, True), (True, 3, False), (True, 3, True)]
    assert ranks(3, groups_of)[0] == (True, 3, True)


def test_pool_restores_global_state(ranks: Ranks) -> None:
    ranks(2, leave_state)
    assert ranks(2, read_state) == [(True, torch.float32, 1)] * 2


def test_pool_refuses_what_it_cannot_ship() -> None:
    with pytest.raises(ValueError, match="top level of a file"):
        run_ranks(2, lambda ctx: None)
    with pytest.raises(ValueError, match="needs fresh=True"):
        run_ranks(2, die_alone, expect_dead=(1,))


def test_interpreter_with_live_pools_exits() -> None:
    code = "from moe_ep.testing import run_ranks; from tests.test_testing import read_state; run_ranks(2, read_state)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one", "empty", "holes"])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(0, 2, 4), (17, 1, 1), (64, 4, 4), (200, 3, 12)])
def test_routing_is_valid_and_reproducible(kind: str, num_tokens: int, top_k: int, num_experts: int) -> None:
    topk_idx, topk_weights = make_routing(num_tokens, top_k, num_experts, kind=kind, seed=5)
    again, _ = make_routing(num_tokens, top_k, num_experts, kind=kind, seed=5)
    assert topk_idx.shape == topk_weights.shape == (num_tokens, top_k)
    assert (topk_idx.dtype, topk_weights.dtype) == (torch.int64, torch.float32)
    assert torch.equal(topk_idx, again)
    for row in topk_idx.tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(chosen) == len(set(chosen))
        assert all(expert < num_experts for expert in chosen)
    assert bool(((topk_weights == 0) == (topk_idx < 0)).all())
    if kind not in ("empty", "holes") and num_tokens:
        torch.testing.assert_close(topk_weights.sum(1), torch.ones(num_tokens))


def test_routing_kinds_differ_as_said() -> None:
    counts = {
        kind: torch.bincount(make_routing(4000, 2, 16, kind=kind, seed=1)[0].clamp(min=0).flatten(), minlength=16)
        for kind in ("uniform", "zipf", "one")
    }
    # 8000 choices over 16 experts: 500 each, five standard deviations are 110.
    assert counts["uniform"].min() > 390
    assert counts["zipf"].max() > 4 * counts["zipf"].min()
    assert counts["one"].tolist() == [0, 4000, 4000] + [0] * 13
    assert 0.25 < (make_routing(4000, 2, 16, kind="holes")[0] < 0).double().mean() < 0.35
    with pytest.raises(ValueError, match="kind='odd'"):
        make_routing(1, 1, 1, kind="odd")
    with pytest.raises(ValueError, match="top_k=3"):
        make_routing(1, 3, 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_uneven_tokens_keep_the_mean(num_ranks: int) -> None:
    counts = uneven_tokens(10, num_ranks, seed=num_ranks)
    assert len(counts) == num_ranks
    assert sum(counts) == 10 * num_ranks
    assert min(counts) == (10 if num_ranks == 1 else 0)


class _Scaled(torch.autograd.Function):
    """x^2 with a gradient that is right times a factor: the fault that the check must find."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * x * grad, None


class _SumOverRanks(torch.autograd.Function):
    """all_reduce, whose gradient is all_reduce; the anchor makes it have one on every rank."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, anchor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None, None


def check_gathered(ctx: RankContext, factor_on_last: float) -> str:
    # Ranks hold different numbers of elements; rank 0 has nothing to perturb.
    factor = factor_on_last if ctx.rank == ctx.world_size - 1 else 1.0
    x = (torch.arange(4, dtype=torch.float64) + ctx.rank + 1).requires_grad_(ctx.rank > 0)
    scale = torch.rand(ctx.rank, dtype=torch.float64).requires_grad_()

    def gathered(x: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        anchor = torch.zeros((), requires_grad=True)
        total = _SumOverRanks.apply(_Scaled.apply(x, factor), anchor, ctx.group)
        return [total * total / 1e3, scale * 3]

    try:
        distributed_gradcheck(gathered, [x, scale], group=ctx.group)
    except AssertionError as error:
        return str(error)
    return "passed"


def test_gradcheck_passes_right_gradients_and_finds_wrong_ones(ranks: Ranks) -> None:
    assert ranks(3, check_gathered, 1.0) == ["passed"] * 3
    texts = ranks(3, check_gathered, 1.01)
    assert all("4 gradients are wrong" in text and "rank 2, input 0" in text for text in texts)


def test_gradcheck_alone() -> None:
    x = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert distributed_gradcheck(torch.sin, [x], max_elements=2)
    with pytest.raises(AssertionError, match="rank 0, input 0"):
        distributed_gradcheck(lambda x: _Scaled.apply(x, 0.5), [x])
    with pytest.raises(ValueError, match="float64"):
        distributed_gradcheck(torch.sin, [x.detach().float().requires_grad_()])
