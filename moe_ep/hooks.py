"""Hooks: functions that are told when an exchange is launched or ready."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

PHASES = tuple(
    prefix + phase
    for prefix in ("", "backward_")
    for phase in ("dispatch_launched", "dispatch_ready", "combine_launched", "combine_ready")
)


@dataclasses.dataclass(frozen=True)
class PhaseEvent:
    """What a hook is told.

    Attributes:
        phase: one of ``PHASES``; ``backward_dispatch_*`` is the reversed exchange of dispatch.
        layer: the dispatcher's ``layer``.
        seq: number of the exchange among those of this dispatcher, the same on every rank.
        stream: the communication stream, or None on a CPU.
        recompute: whether a forward phase runs again under activation checkpointing.
    """

    phase: str
    layer: int | str | None
    seq: int
    stream: object | None
    recompute: bool


Hook = Callable[[PhaseEvent], Any]


class HookHandle:
    """Removes its hook."""

    def __init__(self, hooks: dict[int, Hook], key: int) -> None:
        self._hooks = hooks
        self._key = key

    def remove(self) -> None:
        """Take the hook out; doing so twice is fine."""
        self._hooks.pop(self._key, None)


class Hooks:
    """The hooks of one dispatcher, by phase."""

    def __init__(self) -> None:
        self._by_phase: dict[str, dict[int, Hook]] = {phase: {} for phase in PHASES}
        self._next = 0

    def register(self, phase: str, fn: Hook) -> HookHandle:
        """Call ``fn(PhaseEvent)`` on the host whenever ``phase`` is reached.

        Raises:
            ValueError: for an unknown phase.
        """
        if phase not in self._by_phase:
            raise ValueError(f"phase={phase!r} must be one of {', '.join(PHASES)}")
        self._next += 1
        self._by_phase[phase][self._next] = fn
        return HookHandle(self._by_phase[phase], self._next)

    def any(self, phase: str) -> bool:
        """Whether a phase has hooks."""
        return bool(self._by_phase[phase])

    def fire(self, phase: str, layer: int | str | None, seq: int, stream: object | None) -> None:
        """Run the hooks of a phase in the order of their registration; what they raise is raised here."""
        # A forward exchange inside a running backward is one that checkpointing repeats.
        recompute = not phase.startswith("backward_") and torch._C._current_graph_task_id() != -1
        event = PhaseEvent(phase, layer, seq, stream, recompute)
        for fn in list(self._by_phase[phase].values()):
            fn(event)
