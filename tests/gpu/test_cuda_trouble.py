"""What goes wrong between GPUs: ranks that err, differ, are late or die. Survivors say why and stay usable."""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import Any

import pytest
import torch

from moe_ep import Buffer, Capacity, TokenDispatcher
from moe_ep.errors import ExchangeMismatchError, MoeEpError, PeerAbortedError, PeerTimeoutError
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext

pytestmark = pytest.mark.gpu

TIMEOUT_S = 2.0
# With sizes that are known beforehand nobody waits for a host: rows are sent while counts are exchanged.
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "capacity": {"capacity": Capacity(per_expert=24), "max_tokens_per_rank": 12},
}


def make_dispatcher(
    ctx: RankContext, timeout_s: float = TIMEOUT_S, like: TokenDispatcher | None = None, **settings: Any
) -> TokenDispatcher:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    group = ctx.new_group() if like is None else like.group
    return TokenDispatcher(
        group,
        num_experts=2 * ctx.world_size,
        hidden_size=16,
        top_k=2,
        dtype=torch.float32,
        buffer=Buffer(group, backend="cuda", timeout_s=timeout_s) if like is None else like.buffer,
        **settings,
    )


def exchange(dispatcher: TokenDispatcher, hidden: int = 16) -> torch.Tensor:
    topk_idx, weights = make_routing(12, 2, dispatcher.num_experts, seed=dispatcher.rank)
    x = torch.ones(12, hidden, device="cuda")
    routed = dispatcher.dispatch(x, topk_idx.cuda(), torch.ones_like(weights).cuda())
    return dispatcher.combine(routed.x, routed.handle, routed.weights)


def assert_works(dispatcher: TokenDispatcher) -> None:
    assert torch.equal(exchange(dispatcher), torch.full((12, 16), 2.0, device="cuda"))


def err_alone(ctx: RankContext, warm: bool) -> str:
    dispatcher = make_dispatcher(ctx, timeout_s=20)
    if warm:
        assert_works(dispatcher)
    try:
        with torch.no_grad():
            exchange(dispatcher, hidden=32 if ctx.rank == 1 else 16)
    except (ValueError, MoeEpError) as error:
        text = f"{type(error).__name__}: {error}"
    if warm:
        with pytest.raises(MoeEpError, match=r"reset\(\)"):
            exchange(dispatcher)
        dispatcher.reset()
    # Before the first exchange ranks agree over the control plane, which an error leaves in step.
    assert_works(dispatcher)
    return text


@pytest.mark.parametrize("warm", [False, True])
def test_an_error_of_one_rank_reaches_the_others(warm: bool) -> None:
    texts = run_ranks(3, err_alone, warm)
    assert texts[1].startswith("ValueError: x has shape")
    for rank in (0, 2):
        assert texts[rank].startswith("PeerAbortedError: rank 1 raised instead"), texts[rank]
        assert "x has shape" in texts[rank]


def err_before_a_capacity_is_sized(ctx: RankContext) -> str:
    """The memory is there, and ranks still agree on the tokens that a factor is meant for."""
    sized = make_dispatcher(ctx, timeout_s=20)
    assert_works(sized)
    dispatcher = make_dispatcher(ctx, like=sized, capacity=Capacity(factor=4.0))
    with pytest.raises((ValueError, PeerAbortedError)) as caught, torch.no_grad():
        exchange(dispatcher, hidden=32 if ctx.rank == 1 else 16)
    # No kernel waits for a peer: nothing has to be reset.
    assert_works(dispatcher)
    return f"{caught.type.__name__}: {caught.value}"


def test_an_error_before_a_capacity_is_sized_reaches_the_others() -> None:
    texts = run_ranks(3, err_before_a_capacity_is_sized)
    assert texts[1].startswith("ValueError: x has shape")
    for rank in (0, 2):
        assert texts[rank].startswith("PeerAbortedError: rank 1 raised instead"), texts[rank]


def differ(ctx: RankContext, sizes: str) -> str:
    dispatcher = make_dispatcher(ctx, timeout_s=20, **SETTINGS[sizes])
    assert_works(dispatcher)
    topk_idx, weights = make_routing(12, 2, dispatcher.num_experts, seed=1)
    routed = dispatcher.dispatch(torch.ones(12, 16, device="cuda"), topk_idx.cuda(), weights.cuda())
    with pytest.raises(ExchangeMismatchError) as caught:  # noqa: PT012
        if ctx.rank == 0:
            dispatcher.dispatch(torch.ones(12, 16, device="cuda"), topk_idx.cuda(), weights.cuda())
        else:
            dispatcher.combine(routed.x, routed.handle, routed.weights)
        torch.cuda.synchronize()
        dispatcher.buffer.backend.link.check()
    dispatcher.reset()
    assert_works(dispatcher)
    return str(caught.value)


@pytest.mark.parametrize("sizes", SETTINGS)
def test_different_exchanges_are_told_on_both_sides(sizes: str) -> None:
    for rank, text in enumerate(run_ranks(2, differ, sizes)):
        kinds = ("dispatch", "combine of plan")
        assert f"rank {rank}: {kinds[rank]}" in text, text
        assert f"rank {1 - rank}: {kinds[1 - rank]}" in text, text


def come_late(ctx: RankContext, sizes: str) -> str:
    dispatcher = make_dispatcher(ctx, **SETTINGS[sizes])
    assert_works(dispatcher)
    text = "on time"
    try:
        if ctx.rank == 1:
            time.sleep(2.5 * TIMEOUT_S)
        exchange(dispatcher)
        torch.cuda.synchronize()
        dispatcher.buffer.backend.link.check()
    except MoeEpError as error:
        text = f"{type(error).__name__} {getattr(error, 'ranks', ())}: {error}"
    assert float(torch.ones(4, device="cuda").sum()) == 4.0
    dispatcher.reset()
    assert_works(dispatcher)
    return text


@pytest.mark.parametrize("sizes", SETTINGS)
def test_a_late_rank_is_named_and_reset_goes_on(sizes: str) -> None:
    texts = run_ranks(3, come_late, sizes)
    for rank in (0, 2):
        assert texts[rank].startswith("PeerTimeoutError (1,)"), texts[rank]
        assert "waited 2 s for rank 1 to open exchange" in texts[rank]


def die(ctx: RankContext, during: str, sizes: str) -> str:
    dispatcher = make_dispatcher(ctx, **SETTINGS[sizes])
    assert_works(dispatcher)
    if ctx.rank == 1 and during == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(2000):
            exchange(dispatcher)
            if ctx.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        torch.cuda.synchronize()
        dispatcher.buffer.backend.link.check()
    except PeerTimeoutError as error:
        # The context still computes.
        return f"{error.ranks} {float(torch.ones(1024, device='cuda').sum())} {error}"
    return "nothing happened"


@pytest.mark.parametrize("sizes", SETTINGS)
@pytest.mark.parametrize("during", ["before", "between"])
def test_survivors_of_a_killed_rank_name_it(during: str, sizes: str) -> None:
    answers = run_ranks(3, die, during, sizes, fresh=True, expect_dead=[1])
    for rank in (0, 2):
        assert answers[rank].startswith("(1,) 1024.0"), answers[rank]
        assert "for rank 1" in answers[rank], answers[rank]


def abort_when_peers_wait(ctx: RankContext) -> float:
    """Peers that wait on the GPU learn at once, not at the timeout."""
    dispatcher = make_dispatcher(ctx, timeout_s=60)
    assert_works(dispatcher)
    start = time.monotonic()
    with pytest.raises((ValueError, PeerAbortedError)):
        exchange(dispatcher, hidden=24 if ctx.rank == 0 else 16)
    return time.monotonic() - start


def test_an_abort_arrives_at_once() -> None:
    assert max(run_ranks(2, abort_when_peers_wait)) < 10


def abort_and_go(ctx: RankContext) -> str:
    """The kernel that tells the peers is yet to run when its Buffer goes."""
    dispatcher = make_dispatcher(ctx, timeout_s=60)
    assert_works(dispatcher)
    start = time.monotonic()
    if ctx.rank == 0:
        torch.cuda._sleep(500_000_000)
    with pytest.raises((ValueError, PeerAbortedError)) as caught:
        exchange(dispatcher, hidden=24 if ctx.rank == 0 else 16)
    del dispatcher
    caught.value.__traceback__ = None
    text = f"{type(caught.value).__name__} {time.monotonic() - start < 10}"
    del caught
    gc.collect()
    # The context is still good.
    return f"{text} {float(torch.ones(8, device='cuda').sum())}"


def test_an_abort_arrives_though_its_buffer_goes_at_once() -> None:
    assert run_ranks(2, abort_and_go) == ["ValueError True 8.0", "PeerAbortedError True 8.0"]


def go_alone(ctx: RankContext) -> tuple[bool, float]:
    """A Buffer goes while its exchange waits for a peer that never comes: it does not wait for the time limit."""
    dispatcher = make_dispatcher(ctx, timeout_s=60, **SETTINGS["capacity"])
    assert_works(dispatcher)
    start = time.monotonic()
    if ctx.rank == 0:
        with torch.no_grad():
            exchange(dispatcher)
    del dispatcher
    gc.collect()
    torch.cuda.synchronize()
    return time.monotonic() - start < 20, float(torch.ones(8, device="cuda").sum())


def test_a_buffer_goes_without_its_peers() -> None:
    assert run_ranks(2, go_alone) == [(True, 8.0)] * 2


class OutOfMemory:
    """The extension on a GPU without room for an arena."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    def Arena(self, **sizes: Any) -> None:  # noqa: N802
        raise RuntimeError(f"out of memory: {sizes['num_bytes']} bytes")


def grow_without_memory(ctx: RankContext) -> list[str]:
    """One rank finds no memory for larger rings: all raise, and go on once there is some."""
    dispatcher = make_dispatcher(ctx, timeout_s=20)
    assert_works(dispatcher)
    make_dispatcher(ctx, timeout_s=20, like=dispatcher, capacity=Capacity(per_expert=1024), max_tokens_per_rank=512)
    link = dispatcher.buffer.backend.link
    extension, errors = link.extension, []
    if ctx.rank == 1:
        link.extension = OutOfMemory(extension)
    for _ in range(2):
        with pytest.raises((RuntimeError, MoeEpError)) as caught, torch.no_grad():
            exchange(dispatcher)
        errors.append(f"{type(caught.value).__name__} {'out of memory' in str(caught.value)}")
    link.extension = extension
    assert_works(dispatcher)
    return errors


def test_memory_that_one_rank_lacks_raises_on_all() -> None:
    assert run_ranks(2, grow_without_memory) == [["PeerAbortedError True"] * 2, ["RuntimeError True"] * 2]


def refuse_combine(ctx: RankContext) -> list[str]:
    """A combine is refused while larger rings are due, which are made for dispatches alone; later all make them."""
    dispatcher = make_dispatcher(ctx, timeout_s=20)
    assert_works(dispatcher)
    topk_idx, weights = make_routing(12, 2, dispatcher.num_experts, seed=ctx.rank)
    given = torch.ones(12, 16, device="cuda"), topk_idx.cuda(), torch.ones_like(weights).cuda()
    errors = []
    with torch.no_grad():
        routed = dispatcher.dispatch(*given)
        larger = make_dispatcher(
            ctx, timeout_s=20, like=dispatcher, capacity=Capacity(per_expert=1024), max_tokens_per_rank=512
        )
        start = time.monotonic()

        def combine(y: torch.Tensor) -> None:
            dispatcher.combine(y, routed.handle, routed.weights)
            torch.cuda.synchronize()
            dispatcher.check()

        with pytest.raises((ValueError, MoeEpError)) as caught:
            combine(routed.x if ctx.rank == 1 else routed.x[:, :8])
        errors.append(f"{type(caught.value).__name__} {time.monotonic() - start < 10}")
        dispatcher.reset()
        # A dispatch is refused where all would make them.
        with pytest.raises((ValueError, MoeEpError)) as caught:
            exchange(dispatcher, hidden=24 if ctx.rank == 0 else 16)
        errors.append(type(caught.value).__name__)
        for one in (dispatcher, larger):
            assert_works(one)
    return errors


def test_a_refused_combine_makes_no_rings() -> None:
    assert run_ranks(2, refuse_combine) == [
        ["ValueError True", "ValueError"],
        ["PeerAbortedError True", "PeerAbortedError"],
    ]
