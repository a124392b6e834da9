"""An exchange beside a large GEMM: which share of its time disappears."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from moe_ep.cli.bench.gpu.context import Context, poisoned
from moe_ep.cli.bench.gpu.exchange import BF16, LAYOUTS, expert_outputs, has_sums, is_right, time_captured
from moe_ep.cli.bench.gpu.inputs import Inputs
from moe_ep.cli.bench.gpu.timer import Captured, Timing
from moe_ep.dispatcher import TokenDispatcher


def measure_overlap(context: Context) -> None:
    """Dispatch and combine launched first, then a GEMM; with and without SMs that the GEMM leaves free. Collective.

    Fewer SMs take longer for an exchange, and leave the GEMM more: which is better beside it is what the rows tell.
    """
    size, watch = context.settings.gemm, context.watch
    inputs = context.inputs(context.settings.curve_tokens, "uniform")
    a, b = (torch.randn(size, size, dtype=BF16, device=context.rank.device) for _ in range(2))
    c = torch.empty_like(a)

    def gemm() -> None:
        torch.mm(a, b, out=c)

    alone = watch.time(gemm, ahead=True)
    for layout, asked, with_capacity, with_budget in itertools.product(
        LAYOUTS, context.settings.overlap_sms, (False, True), (False, True)
    ):
        budget = context.num_sms("dispatch", layout, asked) if with_budget else None
        dispatcher = context.dispatcher(inputs, layout, with_capacity=with_capacity, num_sms=asked, sm_budget=budget)
        mode = "capacity" if with_capacity else "exact"
        common: dict[str, Any] = {"layout": layout, "mode": mode, "sm_budget": budget}
        for pending in (dispatch_async(dispatcher, inputs), combine_async(dispatcher, inputs, layout)):
            num_sms = context.num_sms(pending.op, layout, asked)
            _measure(context, inputs, pending, gemm, alone, {**common, "num_sms": num_sms})


def hidden_share(together_us: float, other_us: float, exchange_us: float) -> float:
    """Share of an exchange's time that does not show in the time of both."""
    return 1.0 - (together_us - other_us) / exchange_us


class Pending:
    """An exchange to launch, what it must give, and its place in the results."""

    def __init__(self, op: str, launch: Callable[[], Any], check: Callable[[Any], bool]) -> None:
        self.op = op
        self.launch = launch
        self.check = check


def dispatch_async(dispatcher: TokenDispatcher, inputs: Inputs) -> Pending:
    """A dispatch of a case."""
    return Pending(
        "dispatch",
        lambda: dispatcher.dispatch_async(inputs.x, inputs.topk_idx, inputs.topk_weights),
        lambda routed: is_right(inputs, routed, dispatcher.layout),
    )


def combine_async(dispatcher: TokenDispatcher, inputs: Inputs, layout: str) -> Pending:
    """A combine of what experts might have made."""
    routed = dispatcher.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)
    y, weights = expert_outputs(inputs, routed, layout)
    handle = routed.handle
    return Pending(
        "combine",
        lambda: dispatcher.combine_async(y, handle, weights),
        lambda out: has_sums(inputs, out, layout),
    )


def _measure(
    context: Context,
    inputs: Inputs,
    pending: Pending,
    gemm: Callable[[], None],
    alone: Timing,
    common: dict[str, Any],
) -> None:
    watch = context.watch

    def both() -> Any:
        launched = pending.launch()
        gemm()
        return launched.wait()

    def exchange_alone() -> Any:
        return pending.launch().wait()

    what = f"{pending.op} of {common['layout']} rows beside a GEMM on {common['num_sms']} SMs"
    watch.require(pending.check(poisoned(both)), what)
    if common["mode"] == "capacity":
        exchange = watch.time(Captured(exchange_alone))
        together = time_captured(context, Captured(both), pending.check, what)
    else:
        exchange, together = watch.time(exchange_alone), watch.time(both)
    context.add(
        inputs,
        op=f"{pending.op}_beside_gemm",
        timing=together,
        exchange_us=exchange.max_us,
        compute_us=alone.max_us,
        hidden_share=hidden_share(together.max_us, alone.max_us, exchange.max_us),
        with_rates=False,
        **common,
    )
