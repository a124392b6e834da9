"""Checks of ``Buffer``'s tuple interface: each error names the argument, its value, the rule and the remedy."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moe_ep.config import FP8_DTYPE, Capacity, ExchangeSpec, check_int, check_limits
from moe_ep.errors import CapacityError, StaleHandleError
from moe_ep.events import EventOverlap
from moe_ep.handle import BufferHandle, CudaPlan, Overflow, Plan
from moe_ep.plan import tokens_in_rank
from moe_ep.validate import check_routing, check_row_dtype, check_rows, check_tensor

Rows = Tensor | tuple[Tensor, Tensor]
# For replays, whose settings follow from their rows.
UNSPECIFIED = ExchangeSpec(num_experts=1, hidden_size=8, top_k=1, num_ranks=1, dtype=torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked arguments of a fresh dispatch."""

    rows: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    in_rank: Tensor
    per_expert: Tensor
    spec: ExchangeSpec

    def describe(self) -> str:
        """What all ranks must agree on, in words."""
        parts = {"topk": self.topk_idx, "weights": self.topk_weights, "scales": self.scales}
        carried = ", ".join(f"{name}={None if value is None else value.dtype}" for name, value in parts.items())
        return f"{self.spec.describe()}, {carried}"


def check_request(
    num_ranks: int,
    x: Rows,
    per_rank: Tensor | None,
    in_rank: Tensor | None,
    per_expert: Tensor | None,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    num_worst_tokens: int,
    expert_alignment: int,
    check_values: bool,
) -> Request:
    """Check the arguments of a fresh dispatch; see ``Buffer.dispatch``.

    Args:
        check_values: whether to read ids and layout; on a GPU this waits for the device.
    """
    rows = x[0] if isinstance(x, tuple) and x else x
    rows = check_tensor("x", rows, shape=(None, None))
    check_row_dtype("x", rows)
    in_rank = check_tensor(
        "is_token_in_rank",
        in_rank,
        shape=(rows.shape[0], num_ranks),
        dtypes=(torch.bool,),
        device=rows.device,
    )
    integers = (torch.int32, torch.int64)
    per_rank = check_tensor("num_tokens_per_rank", per_rank, shape=(num_ranks,), dtypes=integers)
    per_expert = check_tensor("num_tokens_per_expert", per_expert, shape=(None,), dtypes=integers)
    if per_expert.numel() % num_ranks or not per_expert.numel():
        raise ValueError(
            f"num_tokens_per_expert has {per_expert.numel()} experts; it must be a multiple of the "
            f"{num_ranks} ranks of the group"
        )
    check_limits(per_expert.numel(), 1, ("num_tokens_per_expert.numel()", ""))
    if check_values and not torch.equal(in_rank.sum(0).cpu(), per_rank.cpu().to(torch.int64)):
        raise ValueError("num_tokens_per_rank differs from the column sums of is_token_in_rank: pass one layout's")
    check_int("num_worst_tokens", num_worst_tokens, 0, "0 for as many rows as come")
    check_int("expert_alignment", expert_alignment, 1)
    if topk_idx is None and (topk_weights is not None or num_worst_tokens > 0):
        raise ValueError("topk_weights and num_worst_tokens need topk_idx: pass it as well")
    if topk_idx is not None:
        topk_idx = check_tensor("topk_idx", topk_idx, shape=(rows.shape[0], None))
        check_limits(1, topk_idx.shape[1], ("", "topk_idx.shape[1]"))
    spec = ExchangeSpec(
        num_experts=per_expert.numel(),
        hidden_size=rows.shape[1],
        top_k=1 if topk_idx is None else topk_idx.shape[-1],
        num_ranks=num_ranks,
        dtype=rows.dtype,
        layout="compact",
        weights="experts",
        capacity=Capacity(rows=num_worst_tokens) if num_worst_tokens else None,
    )
    rows, scales = check_rows("x", x, spec)
    if topk_idx is not None:
        check_routing(rows, topk_idx, topk_weights, spec, spec.num_experts, rows.device.type == "cpu")
        if check_values and not torch.equal(in_rank, tokens_in_rank(topk_idx, spec.num_experts, spec.num_ranks)):
            raise ValueError("is_token_in_rank does not belong to topk_idx: pass get_dispatch_layout's results for it")
    return Request(rows, scales, topk_idx, topk_weights, in_rank, per_expert, spec)


def check_combine(x: Tensor, plan: Plan | CudaPlan, topk_weights: Tensor | None, biases: tuple[Tensor, ...]) -> None:
    """Check the arguments of a combine; see ``Buffer.combine``."""
    check_tensor("x", x, shape=(plan.num_rows, None))
    check_row_dtype("x", x)
    if x.dtype == FP8_DTYPE:
        raise ValueError(f"x has dtype {x.dtype}; sums are returned in x's dtype: combine bf16 or wider rows")
    if x.device != plan.device:
        raise StaleHandleError(f"x is on {x.device} but the handle was made on {plan.device}")
    if topk_weights is not None:
        check_tensor(
            "topk_weights",
            topk_weights,
            shape=(plan.num_rows, plan.top_k or None),
            dtypes=(torch.float32, torch.float64),
            device=x.device,
        )
    if len(biases) > 2:
        raise ValueError(f"bias has {len(biases)} tensors; at most two are added")
    for bias in biases:
        check_tensor("bias", bias, shape=(plan.num_tokens, x.shape[1]), dtypes=(x.dtype,), device=x.device)


def check_layout(topk_idx: object, num_experts: int, num_ranks: int) -> Tensor:
    """Check what a layout is asked for, except the ids; see ``Buffer.get_dispatch_layout``."""
    ids = check_tensor("topk_idx", topk_idx, shape=(None, None), dtypes=(torch.int64,))
    check_int("num_experts", num_experts, 1)
    if num_experts % num_ranks:
        raise ValueError(f"num_experts={num_experts} must be divisible by the {num_ranks} ranks of the group")
    check_limits(num_experts, ids.shape[1], ("num_experts", "topk_idx.shape[1]"))
    return ids


def check_no_layout(layout: tuple[Tensor | None, ...]) -> None:
    """Check the other arguments of a replay."""
    if any(argument is not None for argument in layout):
        raise ValueError("handle was given together with layout or topk arguments: pass None for those")


def describe_rows(rows: Tensor, scales: Tensor | None) -> str:
    """Rows of a replay, in words that all ranks must agree on."""
    return f"{rows.shape[1]}, {rows.dtype}, scales={None if scales is None else scales.dtype}"


def describe_combine(x: Tensor, topk_weights: Tensor | None) -> str:
    """Rows on their way home, in words that all ranks must agree on."""
    width = None if topk_weights is None else f"{topk_weights.shape[1]} {topk_weights.dtype}"
    return f"{x.shape[1]}, {x.dtype}, weights={width}"


def as_biases(bias: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """One bias, several or none as a tuple."""
    return () if bias is None else (bias if isinstance(bias, tuple) else (bias,))


def align_counts(counts: list[int], alignment: int) -> list[int]:
    """Counts rounded up to multiples."""
    return [-(-count // alignment) * alignment for count in counts]


def check_call(
    handle: object, needs_handle: bool, previous_event: EventOverlap | None, async_finish: bool, on_comm_stream: bool
) -> ValueError | None:
    """What no exchange can begin with; see ``Buffer.dispatch``."""
    try:
        check_events(previous_event, async_finish, on_comm_stream)
    except ValueError as error:
        return error
    if not isinstance(handle, BufferHandle) and (needs_handle or handle is not None):
        return ValueError(f"handle is {type(handle).__name__}; pass the handle that dispatch returned")
    return None


def overflow_error(overflow: Overflow) -> CapacityError:
    """The error of an earlier exchange whose ``num_worst_tokens`` did not suffice."""
    return CapacityError(
        f"rank {overflow.rank} had to receive {overflow.needed} rows, num_worst_tokens={overflow.given}: "
        "raise num_worst_tokens; outputs since then are NaN",
        rank=overflow.rank,
        needed=overflow.needed,
        given=overflow.given,
    )


def check_again(x: Rows, plan: Plan | CudaPlan) -> tuple[Tensor, Tensor | None]:
    """Check rows that replay a plan: (rows, scales or None)."""
    rows = x[0] if isinstance(x, tuple) and x else x
    rows = check_tensor("x", rows, shape=(plan.num_tokens, None))
    check_row_dtype("x", rows)
    if rows.device != plan.device:
        raise StaleHandleError(f"x is on {rows.device} but the handle was made on {plan.device}")
    spec = dataclasses.replace(UNSPECIFIED, hidden_size=rows.shape[1], dtype=rows.dtype)
    return check_rows("x", x, spec, plan.num_tokens)


def check_events(previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    if allocate_on_comm_stream and (previous_event is None or not async_finish):
        raise ValueError("allocate_on_comm_stream=True needs previous_event and async_finish=True")
