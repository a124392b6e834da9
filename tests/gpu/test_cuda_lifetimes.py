"""Tensors of exchanges in flight are not reused: memory that the allocator gives away meanwhile is poisoned with NaN.

Every case holds the communication stream, launches an exchange, drops tensors of it and poisons what the allocator then
gives out. Planted faults show that the poison reaches the results when nobody keeps those tensors.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ep import Buffer, Capacity, TokenDispatcher
from moe_ep.autograd import CombineExchange, DispatchExchange
from moe_ep.backends.cuda_jobs import Flight
from moe_ep.backends.cuda_link import CudaLink
from moe_ep.backends.cuda_outputs import Outputs
from moe_ep.backends.types import Dispatch
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext

pytestmark = pytest.mark.gpu

# Tensors of 16 MiB and more have blocks of their own: one that is dropped is given out again as it was.
TOKENS, HIDDEN, TOP_K = 1024, 4096, 2
# More than the allocator may hold of one size beside the dropped one.
NUM_POISONED = 12
# About a second; poisoning takes a few milliseconds, and is checked to have ended before.
HOLD_CYCLES = 2_000_000_000
TIMEOUT_S = 120.0


class Run:
    """A dispatcher, input for it, and what exchanges give that nobody disturbs."""

    def __init__(self, ctx: RankContext, exact: bool) -> None:
        torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
        self.rank = ctx.rank
        # Where the rows of the last dispatch are written.
        self.written = 0
        self.num_rows = ctx.world_size * TOKENS * TOP_K
        self.dispatcher = TokenDispatcher(
            ctx.group,
            num_experts=2 * ctx.world_size,
            hidden_size=HIDDEN,
            top_k=TOP_K,
            dtype=torch.float32,
            capacity=None if exact else Capacity(rows=self.num_rows),
            max_tokens_per_rank=TOKENS,
            buffer=Buffer(ctx.group, backend="cuda", timeout_s=20),
        )
        self.link: CudaLink = self.dispatcher.buffer.backend.link
        topk_idx, weights = make_routing(TOKENS, TOP_K, 2 * ctx.world_size, seed=ctx.rank)
        self.topk_idx, self.weights = topk_idx.cuda(), weights.cuda()
        exchanger = self.dispatcher._exchanger
        routed = self.dispatcher.dispatch(self.tokens(), self.topk_idx, self.weights)
        self.handle, self.row_weights = routed.handle, routed.weights
        # Rows past the last group are undefined.
        self.num_valid = int(routed.expert_ends[-1])
        self.num_rows = routed.x.shape[0]
        plan = self.handle.plan
        self.expected = {
            "rows": routed.x[: self.num_valid].clone(),
            "out": self.dispatcher.combine(self.rows(), self.handle, self.row_weights),
            "row gradients": exchanger.replay(self.tokens(), plan).result()[: self.num_valid].clone(),
            "gradients": exchanger.combine_grads(self.rows(), self.row_weights, plan).result()[0],
        }
        del routed
        # Loads what poisoning and comparing launch.
        for shape in ((TOKENS, HIDDEN), (self.num_rows, HIDDEN)):
            assert bool(torch.isnan(torch.empty(shape, device="cuda").fill_(torch.nan)).all())
        torch.cuda.synchronize()
        gc.collect()

    def tokens(self) -> Tensor:
        return self._numbers(TOKENS)

    def rows(self) -> Tensor:
        return self._numbers(self.num_rows)

    def _numbers(self, count: int) -> Tensor:
        places = torch.arange(count * HIDDEN, dtype=torch.float32, device="cuda").view(count, HIDDEN)
        return places.add_(self.rank).sin_()

    def dispatch_async(self, x: Tensor) -> Any:
        return self.dispatcher.dispatch_async(x, self.topk_idx, self.weights)

    def hold(self) -> None:
        """Keep the communication stream busy from now on, as an exchange does that nobody has waited for."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.link.stream):
            torch.cuda._sleep(HOLD_CYCLES)
        self.link.end(self.link.here(), (), self.link.mark())

    def poison(self, num_rows: int, busy: torch.cuda.Stream | None = None) -> list[Tensor]:
        """NaN in all memory of a size that the current stream may have, while another stream is still busy."""
        gc.collect()
        blocks = [torch.empty(num_rows, HIDDEN, device="cuda").fill_(torch.nan) for _ in range(NUM_POISONED)]
        torch.cuda.current_stream().synchronize()
        assert not (busy or self.link.stream).query(), "poisoned too late to tell anything: hold the stream for longer"
        return blocks

    def equals(self, name: str, result: Tensor) -> bool:
        torch.cuda.synchronize()
        want = self.expected[name]
        return torch.equal(result[: want.shape[0]], want)


# Each case returns whether a block of a dropped tensor was given out again, and whether the results are right.
Outcome = tuple[bool, bool]


def given_again(address: int, blocks: list[Tensor]) -> bool:
    return any(block.data_ptr() == address for block in blocks)


def drop_dispatch_input(run: Run) -> Outcome:
    x = run.tokens()
    address = x.data_ptr()
    run.hold()
    pending = run.dispatch_async(x)
    del x
    blocks = run.poison(TOKENS)
    return given_again(address, blocks), run.equals("rows", pending.wait().x)


def drop_combine_input(run: Run) -> Outcome:
    y = run.rows()
    address = y.data_ptr()
    run.hold()
    pending = run.dispatcher.combine_async(y, run.handle, run.row_weights)
    del y
    blocks = run.poison(run.num_rows)
    return given_again(address, blocks), run.equals("out", pending.wait())


def drop_gradient_of_combine(run: Run) -> Outcome:
    """As backward of Wait does, whose gradient nobody holds when it returns."""
    grad, exchange = run.tokens(), CombineExchange(run.dispatcher._exchanger, run.handle)
    address = grad.data_ptr()
    run.hold()
    exchange.launch_backward(grad, list(run.handle.tensors))
    del grad
    blocks = run.poison(TOKENS)
    return given_again(address, blocks), run.equals("row gradients", exchange.wait_backward())


def drop_gradient_of_dispatch(run: Run) -> Outcome:
    grads, exchange = run.rows(), DispatchExchange(run.dispatcher._exchanger)
    address = grads.data_ptr()
    run.hold()
    exchange.launch_backward(grads, run.row_weights, list(run.handle.tensors))
    del grads
    blocks = run.poison(run.num_rows)
    return given_again(address, blocks), run.equals("gradients", exchange.wait_backward()[0])


def drop_pending(run: Run) -> Outcome:
    """Nobody waits for it: its outputs must not be written to memory that belongs to others by then."""
    x = run.tokens()
    run.hold()
    pending = run.dispatch_async(x)
    del pending
    blocks = run.poison(run.num_rows)
    run.link.synchronize()
    return given_again(run.written, blocks), all(bool(torch.isnan(block).all()) for block in blocks)


def wait_elsewhere(run: Run) -> Outcome:
    """Another stream waits: that tells nothing to the stream of the input's memory."""
    x, side = run.tokens(), torch.cuda.Stream()
    address = x.data_ptr()
    run.hold()
    pending = run.dispatch_async(x)
    del x
    with torch.cuda.stream(side):
        routed = pending.wait()
    blocks = run.poison(TOKENS)
    return given_again(address, blocks), run.equals("rows", routed.x)


def read_elsewhere(run: Run) -> Outcome:
    """Another stream waits, and reads late what was allocated on this one; the exchange is over by then."""
    x, side = run.tokens(), torch.cuda.Stream()
    pending = run.dispatch_async(x)
    with torch.cuda.stream(side):
        routed = pending.wait()
        torch.cuda._sleep(HOLD_CYCLES)
        rows = routed.x[: run.num_valid].clone()
    del routed, pending
    run.link.synchronize()
    # As the next exchange does, before it is launched.
    run.link.begin()
    blocks = run.poison(run.num_rows, busy=side)
    return given_again(run.written, blocks), run.equals("rows", rows)


CASES: dict[str, Callable[[Run], Outcome]] = {
    case.__name__: case
    for case in (
        drop_dispatch_input,
        drop_combine_input,
        drop_gradient_of_combine,
        drop_gradient_of_dispatch,
        drop_pending,
        wait_elsewhere,
        read_elsewhere,
    )
}


def small_ones(kept: object) -> object:
    """What a flight keeps, without large tensors: kernels read the small ones as addresses and sizes."""
    if isinstance(kept, Dispatch):
        return kept.plan, kept.row_weights
    if type(kept) is tuple:
        return tuple(small_ones(one) for one in kept)
    if isinstance(kept, Tensor):
        return kept if kept.numel() < TOKENS * HIDDEN else None
    return None if isinstance(kept, Outputs) else kept


def land_anywhere(self: CudaLink, flight: Flight, *outputs: Tensor | None) -> None:
    """A wait by any stream lets tensors go."""
    flight.event.wait(self.here())
    self._flights.remove(flight)


# The method of the link that a planted fault breaks.
FAULTS = {name: {"wait_elsewhere": "land", "read_elsewhere": "lend"}.get(name, "end") for name in CASES}


@contextlib.contextmanager
def watched(run: Run, fault: str | None) -> Iterator[None]:
    """Note where dispatches write; with a fault, let go what must be kept."""
    end, land, lend = CudaLink.end, CudaLink.land, CudaLink.lend

    def watch(self: CudaLink, current: int, keep: tuple[Any, ...], *marked: Any) -> Flight:
        for kept in keep:
            if isinstance(kept, Dispatch):
                run.written = kept.rows.data_ptr()
        return end(self, current, tuple(small_ones(kept) for kept in keep) if fault == "end" else keep, *marked)

    CudaLink.end = watch  # type: ignore[method-assign]
    if fault == "land":
        CudaLink.land = land_anywhere  # type: ignore[method-assign]
    if fault == "lend":
        CudaLink.lend = lambda self, outputs, stream: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.cuda.synchronize()
        CudaLink.end, CudaLink.land, CudaLink.lend = end, land, lend  # type: ignore[method-assign]


def run_case(ctx: RankContext, name: str, exact: bool, fault: str | None) -> tuple[Outcome, bool]:
    """The outcome of a case, and whether later exchanges are right and leave nothing in flight."""
    with torch.no_grad():
        run = Run(ctx, exact)
        with watched(run, fault):
            outcome = CASES[name](run)
        gc.collect()
        again = run.dispatch_async(run.tokens()).wait()
        intact = run.equals("rows", again.x)
        run.link.begin()
        return outcome, intact and not run.link._flights


@pytest.mark.parametrize("name", CASES)
def test_what_is_in_flight_is_kept(name: str) -> None:
    assert run_ranks(2, run_case, name, False, None, timeout=TIMEOUT_S) == [((False, True), True)] * 2


def test_input_is_kept_until_sizes_are_known() -> None:
    outcomes = run_ranks(2, run_case, "drop_dispatch_input", True, None, timeout=TIMEOUT_S)
    assert outcomes == [((False, True), True)] * 2


@pytest.mark.parametrize(("name", "fault"), FAULTS.items())
def test_poison_reaches_what_nobody_keeps(name: str, fault: str) -> None:
    """The planted faults: the block is given out again, and the results show it."""
    assert run_ranks(2, run_case, name, False, fault, timeout=TIMEOUT_S) == [((True, False), True)] * 2


def read_late(ctx: RankContext, fault: str | None) -> Outcome:
    """Rows of an exact dispatch lie in memory of the placing stream; this one reads them late, and they are dropped."""
    with torch.no_grad():
        run = Run(ctx, exact=True)
        with watched(run, fault):
            # Behind another exchange sizes are not waited for at once, which would give rows memory of this stream.
            run.hold()
            pending = run.dispatch_async(run.tokens())
            routed = pending.wait()
            torch.cuda._sleep(HOLD_CYCLES)
            rows, address = routed.x[: run.num_valid].clone(), routed.x.data_ptr()
            del routed, pending
            run.link.begin()
            with torch.cuda.stream(run.link.place_stream):
                blocks = run.poison(run.num_rows, busy=torch.cuda.default_stream())
            return given_again(address, blocks), run.equals("rows", rows)


def test_rows_of_the_placing_stream_are_kept_for_their_reader() -> None:
    assert run_ranks(2, read_late, None, timeout=TIMEOUT_S) == [(False, True)] * 2


def test_poison_reaches_rows_of_the_placing_stream() -> None:
    """The planted fault: the allocator is not told of the reader."""
    assert run_ranks(2, read_late, "lend", timeout=TIMEOUT_S) == [(True, False)] * 2


def drop_unplaced(ctx: RankContext) -> bool:
    """A dispatch that waits for its sizes is dropped: the next exchange places its rows, and both end."""
    with torch.no_grad():
        run = Run(ctx, exact=True)
        run.hold()
        pending = run.dispatch_async(run.tokens())
        del pending
        run.poison(TOKENS)
        again = run.dispatch_async(run.tokens()).wait()
        right = run.equals("rows", again.x)
        run.link.begin()
        return right and not run.link._flights and not run.link._unplaced


def test_a_dropped_dispatch_without_sizes_is_placed_by_the_next() -> None:
    assert run_ranks(2, drop_unplaced, timeout=TIMEOUT_S) == [True, True]
