"""SM budgets: while an exchange is in flight on a GPU, torch's GEMMs leave SMs to the kernels of the exchange."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from moe_ep.events import Job, Waitable

Result = TypeVar("Result")


class Carveout:
    """The number of SMs that torch's GEMMs leave alone: the largest that any exchange in flight asks for.

    Args:
        get: the present number, None for none.
        set_: sets it.
    """

    def __init__(self, get: Callable[[], int | None], set_: Callable[[int | None], object]) -> None:
        self._get = get
        self._set = set_
        self._held: list[int] = []
        self._before: int | None = None
        # Exchanges of backward begin and end on threads of autograd.
        self._lock = threading.RLock()

    def begin(self, num_sms: int) -> None:
        """An exchange is in flight."""
        with self._lock:
            if not self._held:
                self._before = self._get()
            self._held.append(num_sms)
            self._apply()

    def end(self, num_sms: int) -> None:
        """One that began with this number has been waited for, or dropped."""
        with self._lock:
            self._held.remove(num_sms)
            self._apply()

    def _apply(self) -> None:
        # What the caller had set stays the least, and comes back.
        self._set(max([*self._held, self._before or 0]) if self._held else self._before)


# NOTE: one for the process, as torch's own setting is.
_TORCH = Carveout(torch._C._get_sm_carveout_experimental, torch._C._set_sm_carveout_experimental)


class HeldJob(Job[Result]):
    """An exchange in flight with an SM budget, which ends where it is waited for, or when nobody can any more."""

    def __init__(self, job: Job[Result], carveout: Carveout, num_sms: int) -> None:
        self._job: Job[Result] | None = None
        carveout.begin(num_sms)
        self._job, self._carveout, self._num_sms = job, carveout, num_sms

    def result(self) -> Result:
        """Wait for the exchange; raises what it raised."""
        job = self._job
        assert job is not None, "an exchange is waited for once"
        try:
            return job.result()
        finally:
            self._end()
            # As in Job.result.
            del self, job

    def done(self) -> bool:
        """Whether it is complete."""
        return self._job is None or self._job.done()

    def event(self) -> Waitable:
        """Its completion as an event, which leaves the budget as it is."""
        assert self._job is not None, "an exchange is waited for once"
        return self._job.event()

    def _end(self) -> None:
        if self._job is not None:
            self._job = None
            self._carveout.end(self._num_sms)

    def __del__(self) -> None:
        self._end()


class SmBudget:
    """The budget of one dispatcher.

    Args:
        num_sms: SMs to keep free of GEMMs; None or 0 changes nothing.
        carveout: how.
        device_type: where it has an effect.
    """

    def __init__(self, num_sms: int | None, carveout: Carveout = _TORCH, device_type: str = "cuda") -> None:
        self.num_sms = num_sms
        self._carveout = carveout
        self._device_type = device_type

    def hold(self, job: Job[Result], device: torch.device) -> Job[Result]:
        """The launched exchange, in flight until its ``result()``."""
        if not self.num_sms or device.type != self._device_type:
            return job
        return HeldJob(job, self._carveout, self.num_sms)


def check_sm_budget(sm_budget: int | None) -> None:
    """Raise ValueError for what is no number of SMs."""
    if sm_budget is None:
        return
    if not isinstance(sm_budget, int) or isinstance(sm_budget, bool) or sm_budget < 0:
        raise ValueError(f"sm_budget={sm_budget!r} must be an int of 0 or more, a number of SMs, or None")
