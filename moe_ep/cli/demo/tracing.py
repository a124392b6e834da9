"""What a rank did when, within one training step: collected from module, tensor and dispatcher hooks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_ep.cli.demo.model import Attention, LanguageModel
from moe_ep.layers import MoELayer, SharedExpert

COMPUTE = "compute"
EXCHANGE = "exchange"
_EXCHANGES = ("dispatch", "combine", "backward_dispatch", "backward_combine")


@dataclass(frozen=True, kw_only=True)
class Span:
    """One interval of a step.

    Attributes:
        lane: "compute", or "exchange" for the time from an exchange's launch until its rows are ready.
        name: "attention", "router", "experts", "shared expert", "dispatch", "combine", ...
        backward: it belongs to the backward pass.
        start, end: seconds since the step began.
    """

    lane: str
    name: str
    backward: bool
    start: float
    end: float


class _Clock:
    """Points in time: of the host on the CPU, of the current stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start

    def settle(self) -> None:
        """Wait until every point has happened."""
        if self._on_gpu:
            torch.cuda.synchronize()


class StepTracer:
    """Collects the spans of each step; outside ``begin_step`` .. ``end_step`` its hooks do nothing.

    Backward passes of a module are found by hooks on the tensors that enter and leave it: the gradient of its output
    is there when its backward begins, that of its input when it has ended.
    """

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        self._clock = _Clock(device)
        self._on = False
        self._began: Any = None
        self._open: dict[tuple[Any, ...], Any] = {}
        self._marks: list[tuple[str, str, bool, Any, Any]] = []
        for module in model.modules():
            if isinstance(module, Attention):
                self._watch(module, "attention")
            elif isinstance(module, MoELayer):
                self._watch_moe(module)
        self._watch(model.head, "head")

    def begin_step(self) -> None:
        """Start collecting; time zero of the spans."""
        self._marks.clear()
        self._open.clear()
        self._on = True
        self._began = self._clock.now()

    def end_step(self) -> list[Span]:
        """Stop collecting and return the spans in the order they ended. Waits for the GPU, where there is one."""
        self._on = False
        self._clock.settle()
        return [
            Span(
                lane=lane,
                name=name,
                backward=backward,
                start=self._clock.seconds(self._began, start),
                end=self._clock.seconds(self._began, end),
            )
            for lane, name, backward, start, end in self._marks
        ]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Collect the body as one span of the compute lane."""
        start = self._clock.now()
        yield
        if self._on:
            self._marks.append((COMPUTE, name, False, start, self._clock.now()))

    def _begin(self, *key: Any) -> None:
        if self._on:
            self._open[key] = self._clock.now()

    def _end(self, lane: str, name: str, backward: bool, *key: Any) -> None:
        start = self._open.pop(key, None)
        if self._on and start is not None:
            self._marks.append((lane, name, backward, start, self._clock.now()))

    def _watch(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _module, args: self._enter(name, module, args))
        module.register_forward_hook(lambda _module, _args, output: self._leave(name, module, output))

    def _watch_moe(self, moe: MoELayer) -> None:
        self._watch(moe.router, "router")
        self._watch(moe.experts, "experts")
        self._watch_shared_expert(moe.shared_expert)
        for exchange in _EXCHANGES:
            self._watch_exchange(moe, exchange)

    def _watch_shared_expert(self, shared: SharedExpert | None) -> None:
        # Its halves are called one by one, beside the exchanges, so module hooks do not see them.
        if shared is not None:
            for half in ("first_half", "second_half"):
                setattr(shared, half, self._watched("shared expert", (shared, half), getattr(shared, half)))

    def _watched(self, name: str, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            output = function(*self._enter(name, key, args))
            self._leave(name, key, output)
            return output

        return call

    def _enter(self, name: str, key: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._begin(key)
        place = next((i for i, value in enumerate(args) if _differentiable(value)), None)
        if not self._on or place is None:
            return args
        # An alias of its own: the tensor itself may have other users, whose gradients its hook would wait for.
        alias = args[place].view_as(args[place])
        alias.register_hook(lambda _gradient: self._end(COMPUTE, name, True, key, "backward"))
        return (*args[:place], alias, *args[place + 1 :])

    def _leave(self, name: str, key: Any, output: Any) -> None:
        self._end(COMPUTE, name, False, key)
        # Of a router's result, only the weights have a gradient.
        output = getattr(output, "topk_weights", output)
        if self._on and _differentiable(output):
            output.register_hook(lambda _gradient: self._begin(key, "backward"))

    def _watch_exchange(self, moe: MoELayer, exchange: str) -> None:
        backward, name = exchange.startswith("backward_"), exchange.removeprefix("backward_")
        register = moe.dispatcher.register_hook
        register(f"{exchange}_launched", lambda event: self._begin(moe, exchange, event.seq))
        register(f"{exchange}_ready", lambda event: self._end(EXCHANGE, name, backward, moe, exchange, event.seq))


def exchange_share(spans: list[Span], seconds: float) -> float:
    """Share of a step of ``seconds`` in which an exchange was under way."""
    return sum(span.end - span.start for span in spans if span.lane == EXCHANGE) / seconds


def _differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
