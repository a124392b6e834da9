"""A MoE layer forward and backward: which share of its four exchanges disappears behind its GEMMs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.cli.bench.cases import Case
from moe_ep.cli.bench.gpu.context import Context, make_row
from moe_ep.cli.bench.gpu.exchange import BF16
from moe_ep.cli.bench.gpu.overlap import hidden_share
from moe_ep.cli.bench.gpu.timer import Captured
from moe_ep.cli.bench.gpu.traffic import count_traffic
from moe_ep.config import Capacity
from moe_ep.layers import MoELayer

# Ways differ in the order of sums of bf16 values alone.
_MOST_DIFFERENCE = 0.02


def measure_layer(context: Context) -> None:
    """The layer in one and more chunks, and with a capacity as one graph. Collective.

    A single rank has nothing to hide.
    """
    if context.rank.size == 1:
        return
    settings = context.settings
    num_rows = _measure(context, settings.chunks, None)
    torch.cuda.empty_cache()
    _measure(context, settings.chunks[:1], num_rows)


def _measure(context: Context, chunks: Sequence[int], num_rows: int | None) -> int:
    """One way to size exchanges; returns the rows that the fullest rank received.

    Args:
        context: of the run.
        chunks: numbers of chunks.
        num_rows: capacity, whose steps are captured; None for exact sizes.
    """
    trial = LayerTrial(context, num_rows)
    watch, settings = context.watch, context.settings
    prepare: Callable[[Callable[[], Any]], Callable[[], Any]] = Captured if num_rows else lambda call: call
    trial.compute_alone()
    compute = watch.time(prepare(trial.compute_alone))
    exchanges = []
    for call in trial.exchanges():
        call()
        exchanges.append(watch.time(prepare(call)))
    exchange_us = sum(timing.max_us for timing in exchanges)
    wanted = trial.step(chunks[0])
    watch.require(_difference(wanted[0], trial.forward_in_steps()) <= _MOST_DIFFERENCE, "the MoE layer")
    for num_chunks in chunks:
        trial.step(num_chunks)
        step: Callable[[], Any] = prepare(functools.partial(trial.step, num_chunks))
        got = step()
        if isinstance(step, Captured):
            got = step.result
        near = all(_difference(a, b) <= _MOST_DIFFERENCE for a, b in zip(got, wanted, strict=True))
        watch.require(near, f"the MoE layer in {num_chunks} chunks")
        del got
        timing = watch.time(step)
        shape = settings.layer
        case = Case(
            ranks=context.rank.size, tokens=settings.curve_tokens, shape=shape, dtype="bfloat16", routing="router"
        )
        row = make_row(
            case,
            trial.traffic,
            op="moe_layer",
            layout="expanded",
            mode="capacity" if num_rows else "exact",
            timing=timing,
            num_sms=max(context.num_sms(op, "expanded") for op in ("dispatch", "combine")),
            num_chunks=num_chunks,
            exchange_us=exchange_us,
            compute_us=compute.max_us,
            hidden_share=hidden_share(timing.max_us, compute.max_us, exchange_us),
            with_rates=False,
        )
        context.rows.append(row)
    return max(trial.traffic.expanded)


class LayerTrial:
    """One layer with its input, its exchanges, and its computation without them. Collective.

    Args:
        context: of the run.
        num_rows: capacity of a rank, None for exact sizes.
    """

    def __init__(self, context: Context, num_rows: int | None) -> None:
        settings, rank = context.settings, context.rank
        shape = settings.layer
        # Weights drawn on the GPU: the layer's own are drawn on the CPU, the same on every machine, which takes long.
        layer = MoELayer(
            rank.group,
            hidden_size=shape.hidden,
            intermediate_size=settings.intermediate,
            num_experts=shape.experts,
            top_k=shape.top_k,
            shared_intermediate_size=settings.intermediate,
            late_wgrad=True,
            capacity=Capacity(rows=num_rows) if num_rows else None,
            max_tokens_per_rank=settings.curve_tokens if num_rows else None,
            backend="cuda",
            device="meta",
            dtype=BF16,
        )
        self.layer = layer.to_empty(device=rank.device)
        self.layer.router.reset_parameters()
        self.layer.reset_stats()
        generator = torch.Generator(rank.device).manual_seed(1 + rank.rank)
        with torch.no_grad():
            for part in (self.layer.experts, self.layer.shared_expert):
                assert part is not None
                for weight in part.parameters():
                    weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
        size = (settings.curve_tokens, shape.hidden)
        self.x, self.grad = (torch.randn(size, dtype=BF16, device=rank.device, generator=generator) for _ in range(2))
        self.x.requires_grad_()
        with torch.no_grad():
            routing = self.layer.router(self.x, group=self.layer.dispatcher.group)
            self.topk_idx, self.topk_weights = routing.topk_idx, routing.topk_weights
            self.routed = self._dispatch()
            self.y = self.layer._experts(self.routed, self.layer.experts.weights(BF16))
        self.traffic = count_traffic(_gather(self.topk_idx, rank.group), shape.experts, 1)

    def step(self, num_chunks: int) -> tuple[Tensor, Tensor]:
        """Forward and backward; returns the output and the gradient of the input."""
        self.layer.num_chunks = num_chunks
        self._drop_grads()
        with torch.enable_grad():
            out = self.layer(self.x)
        out.backward(self.grad)
        assert self.x.grad is not None
        return out.detach(), self.x.grad

    @torch.no_grad()
    def forward_in_steps(self) -> Tensor:
        """What forward must give: exchange, experts and shared expert one after the other."""
        assert self.layer.shared_expert is not None
        return self.layer.dispatcher.combine(self.y, self.routed.handle) + self.layer.shared_expert(self.x)

    def compute_alone(self) -> None:
        """The same forward and backward of router, experts and shared expert, on rows that are already there."""
        self._drop_grads()
        layer, routed = self.layer, self.routed
        rows = routed.x.detach().requires_grad_()
        row_weights = routed.weights.detach().requires_grad_()
        assert layer.shared_expert is not None
        with torch.enable_grad():
            routing = layer.router(self.x, group=layer.dispatcher.group)
            y = layer.experts(rows, routed.expert_ends, row_weights, weights=layer.experts.weights(BF16))
            shared = layer.shared_expert(self.x)
        torch.autograd.backward([y, shared, routing.topk_weights], [rows.detach(), self.grad, self.topk_weights])

    def exchanges(self) -> list[Any]:
        """The four exchanges of a step, each alone."""
        exchanger, plan = self.layer.dispatcher._live(), self.routed.handle.plan
        handle, weights = self.routed.handle, self.routed.weights
        return [
            torch.no_grad()(self._dispatch),
            torch.no_grad()(lambda: self.layer.dispatcher.combine(self.y, handle)),
            lambda: exchanger.replay(self.grad, plan).result(),
            lambda: exchanger.combine_grads(self.y, weights, plan).result(),
        ]

    def _dispatch(self) -> Any:
        return self.layer.dispatcher.dispatch(self.x.detach(), self.topk_idx, self.topk_weights)

    def _drop_grads(self) -> None:
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    if group is None:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
