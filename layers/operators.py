"""The layers' operators ``moe_ep::*``: what a compiled graph must do as an eager forward does, when it runs.

Whether ranks exchange, and in which order, must not depend on which of them run a compiled graph: one may recompile, or
give up compiling, where another does not.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_ep.backends.control import Call
from moe_ep.buffer import Buffer, live_buffer
from moe_ep.untraced import untraced

_LIBRARY = torch.library.Library("moe_ep", "FRAGMENT")
for _schema in (
    "sum_over_ranks(Tensor numbers, int buffer) -> Tensor",
    "after(Tensor x, Tensor[] first) -> Tensor",
    "unless_repeated(Tensor counts) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"moe_ep::{_schema.split('(')[0]}", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)
_OPS = torch.ops.moe_ep
torch.fx.has_side_effect(_OPS.sum_over_ranks.default)


def sum_over_ranks(numbers: Tensor, buffer: Buffer) -> Tensor:
    """fp64 [n] summed in rank order: the same bits on all ranks. The host waits."""
    return _OPS.sum_over_ranks(numbers, buffer.number)


def after(x: Tensor, first: Iterable[Tensor]) -> Tensor:
    """``x``, which needs no gradient, in such a way that a compiled graph computes ``first`` before it is used.

    NOTE: give it to the next operator as it is. A compiler drops what it would do to a tensor without elements, and the
    order with it.
    """
    return _OPS.after(x, [tensor.detach() for tensor in first]) if torch.compiler.is_compiling() else x


def count(total: Tensor, counts: Tensor) -> None:
    """Adds what a forward counted; not again where activation checkpointing repeats the forward."""
    if torch.compiler.is_compiling():
        total += _OPS.unless_repeated(counts)
    elif not _in_backward():
        total += counts


@torch.library.impl(_LIBRARY, "sum_over_ranks", "CompositeExplicitAutograd")
@untraced
def _sum_over_ranks(numbers: Tensor, buffer: int) -> Tensor:
    ranks = live_buffer(buffer)
    # Headers carry integers from 0 to below 2**31: a double travels as four of 16 bits.
    words = numbers.view(torch.uint16).to("cpu", torch.int64)
    call = Call.of("settings", f"the sum of {numbers.numel()} numbers for the losses of a router")
    table = ranks.run(lambda: ranks.control.open(call, words))
    return table.to(torch.uint16).view(torch.float64).sum(0).to(numbers.device)


@torch.library.impl(_LIBRARY, "after", "CompositeExplicitAutograd")
def _after(x: Tensor, first: list[Tensor]) -> Tensor:
    # NOTE: an operator may not return its input.
    return x.clone()


@torch.library.impl(_LIBRARY, "unless_repeated", "CompositeExplicitAutograd")
def _unless_repeated(counts: Tensor) -> Tensor:
    return torch.zeros_like(counts) if _in_backward() else counts.clone()


def _in_backward() -> bool:
    """Whether this code runs inside a backward pass, as the recomputation of a checkpointed forward does."""
    return torch._C._current_graph_task_id() != -1
