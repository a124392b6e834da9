"""Rows that are their caller's until the next exchange of a Buffer is launched, and how later use of them is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moe_ep.errors import MoeEpError
from moe_ep.events import Job, Waitable

Result = TypeVar("Result")


class Lease:
    """What the callers of one Buffer hold for now: at most the rows of its latest exchange.

    Attributes:
        number: of exchanges that were launched.
        memory: where rows are lent from, when it is always the same; None where each exchange has memory of its own.
    """

    def __init__(self) -> None:
        self.number = 0
        self.memory: Tensor | None = None
        self._rows: Tensor | None = None

    def end(self) -> None:
        """An exchange is launched: rows that were lent are over. What autograd has saved of them raises from now on."""
        self.number += 1
        rows, self._rows = self._rows, None
        # Tensors of inference mode have no versions, and cannot be saved.
        if rows is not None and not rows.is_inference():
            torch.autograd.graph.increment_version(rows)

    def grant(self, number: int, rows: Tensor) -> None:
        """Lend the rows of the exchange that was the latest at ``number``.

        Raises:
            MoeEpError: when there was another one since.
        """
        if number != self.number:
            raise MoeEpError(
                'the rows of this dispatch with out="arena" are over: another exchange of its Buffer was launched '
                'before wait(); wait first, or use out="private"'
            )
        # NOTE: a reference, not a weak one: views of it may be held where it is not.
        self._rows = rows

    def check(self, name: str, tensor: object) -> None:
        """Raise ValueError for rows to be sent that lie where the exchange that sends them writes."""
        if (self._rows is None and self.memory is None) or not isinstance(tensor, Tensor):
            return
        lent = [rows for rows in (self._rows, self.memory) if rows is not None]
        if tensor.device == lent[0].device and any(_share_memory(tensor, rows) for rows in lent):
            raise ValueError(
                f'{name} lies in rows of a dispatch with out="arena", which are over when this exchange is launched: '
                f"pass a tensor with memory of its own, such as {name}.clone()"
            )


class LentJob(Job[Result], Generic[Result]):
    """A dispatch whose rows are lent to whoever waits for it.

    Args:
        job: the dispatch, launched just now.
        lease: of its Buffer.
        rows_of: its rows.
    """

    def __init__(self, job: Job[Result], lease: Lease, rows_of: Callable[[Result], Tensor]) -> None:
        self._job = job
        self._lease = lease
        self._rows_of = rows_of
        self._number = lease.number

    def result(self) -> Result:
        """Wait for the dispatch; raises what it raised."""
        try:
            result = self._job.result()
            self._lease.grant(self._number, self._rows_of(result))
            return result
        finally:
            # As in Job.result.
            del self

    def done(self) -> bool:
        """Whether it is complete."""
        return self._job.done()

    def event(self) -> Waitable:
        """Its completion as an event."""
        return self._job.event()


def _share_memory(left: Tensor, right: Tensor) -> bool:
    address = left.untyped_storage().data_ptr()
    return address != 0 and address == right.untyped_storage().data_ptr()
