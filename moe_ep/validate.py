"""Checks of arguments, shared by all backends: each error names the argument, its value, the rule and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ep.config import FP8_DTYPE, FP8_GROUP, ROW_DTYPES, ExchangeSpec, check_num_sms, check_row_bytes
from moe_ep.errors import StaleHandleError
from moe_ep.handle import CudaPlan, Plan

# Below this K all pairs of a token's choices are compared; above, sorting is cheaper.
_PAIRWISE_TOP_K = 16


def check_tensor(
    name: str,
    value: object,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> Tensor:
    """Check one tensor argument.

    Args:
        name: of the argument.
        value: what was passed.
        shape: wanted sizes, None for any.
        dtypes: allowed dtypes.
        device: wanted device.
        contiguous: whether it must be contiguous.

    Returns:
        The value, now known to be a tensor.

    Raises:
        ValueError: when a rule is broken.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {type(value).__name__}; it must be a tensor")
    if shape is not None and not _fits(value.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be [{wanted}]")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {value.dtype}; it must be {allowed}: convert it with .to({dtypes[0]})")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}, like x: move it with .to(x.device)")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}; it must be contiguous: call .contiguous() first")
    return value


def _fits(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(rule is None or size == rule for size, rule in zip(shape, wanted, strict=True))


def check_rows(name: str, x: object, spec: ExchangeSpec, num_rows: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Check rows [T, H], or fp8 rows with their scales.

    Returns:
        (rows, scales or None).
    """
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ValueError(
                f"{name} is a tuple of {len(x)}; fp8 rows are given as (e4m3 rows [T, H], scales [T, H/128])"
            )
        rows = check_tensor(f"{name}[0]", x[0], shape=(num_rows, spec.hidden_size), dtypes=(FP8_DTYPE,))
        if spec.hidden_size % FP8_GROUP:
            raise ValueError(f"{name}[0] has H={spec.hidden_size}; fp8 rows need a multiple of {FP8_GROUP}")
        scales = check_tensor(
            f"{name}[1]",
            x[1],
            shape=(rows.shape[0], spec.hidden_size // FP8_GROUP),
            dtypes=(torch.float32, torch.int32),
            device=rows.device,
            contiguous=False,
        )
        return rows, scales
    return check_tensor(name, x, shape=(num_rows, spec.hidden_size), dtypes=(spec.dtype,)), None


def check_row_dtype(name: str, x: Tensor) -> None:
    """Check the dtype and row size of rows whose settings are not fixed beforehand."""
    if x.dtype not in (*ROW_DTYPES, FP8_DTYPE):
        allowed = ", ".join(str(dtype) for dtype in (*ROW_DTYPES, FP8_DTYPE))
        raise ValueError(f"{name} has dtype {x.dtype}; it must be one of {allowed}")
    check_row_bytes(x.shape[1], x.dtype, f"{name}.shape[1]")


def check_routing(
    x: Tensor, topk_idx: object, topk_weights: object, spec: ExchangeSpec, num_ids: int, check_values: bool
) -> None:
    """Check router outputs against the rows that they belong to.

    Args:
        x: [T, H] rows.
        topk_idx: wanted [T, K] int64, -1 = no choice.
        topk_weights: wanted [T, K] fp32 (fp64 for fp64 rows), or None.
        spec: the settings.
        num_ids: ids lie in -1 <= id < num_ids.
        check_values: whether to read the ids; on a GPU this waits for the device.
    """
    shape = (x.shape[0], spec.top_k)
    ids = check_tensor("topk_idx", topk_idx, shape=shape, dtypes=(torch.int64,), device=x.device)
    if topk_weights is not None:
        wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
        check_tensor("topk_weights", topk_weights, shape=shape, dtypes=(wanted,), device=x.device)
    if spec.max_tokens_per_rank is not None and x.shape[0] > spec.max_tokens_per_rank:
        raise ValueError(
            f"x has {x.shape[0]} tokens; at most max_tokens_per_rank={spec.max_tokens_per_rank} fit: "
            "construct with a larger max_tokens_per_rank"
        )
    if check_values:
        check_ids(ids, num_ids)


def check_chunk(topk_idx: object, spec: ExchangeSpec, num_ids: int, check_values: bool) -> None:
    """Check ``topk_idx`` [T, K] by itself, before the rows that it belongs to are known."""
    ids = check_tensor("topk_idx", topk_idx, shape=(None, spec.top_k), dtypes=(torch.int64,))
    if check_values:
        check_ids(ids, num_ids)


def check_ids(topk_idx: Tensor, num_ids: int) -> None:
    """Raise ValueError for ids outside -1 <= id < num_ids, or an expert chosen twice by a token."""
    if not topk_idx.numel():
        return
    low, high = (int(value) for value in torch.aminmax(topk_idx))
    if low < -1 or high >= num_ids:
        bad = ((topk_idx < -1) | (topk_idx >= num_ids)).nonzero()[0].tolist()
        raise ValueError(
            f"topk_idx[{bad[0]}, {bad[1]}]={int(topk_idx[bad[0], bad[1]])} is out of range; ids must satisfy "
            f"-1 <= id < {num_ids}, with -1 for no choice"
        )
    if low >= 0 and _all_differ(topk_idx):
        return
    repeated = _repeated_choices(topk_idx)
    if repeated.any():
        token = int(repeated.nonzero()[0, 0])
        raise ValueError(
            f"topk_idx[{token}]={topk_idx[token].tolist()} repeats an expert; a token may choose an expert only once: "
            "set the repeat to -1 and add its weight to the first"
        )


def _all_differ(topk_idx: Tensor) -> bool:
    """Whether no token repeats an id, in few steps."""
    num_tokens, top_k = topk_idx.shape
    if top_k > _PAIRWISE_TOP_K:
        return False
    ids = topk_idx.t().contiguous()
    return int(torch.count_nonzero(ids.unsqueeze(0) == ids.unsqueeze(1))) == num_tokens * top_k


def _repeated_choices(topk_idx: Tensor) -> Tensor:
    """[T] bool: whether a token repeats an expert."""
    top_k = topk_idx.shape[1]
    if top_k <= _PAIRWISE_TOP_K:
        ids = topk_idx.to(torch.int32).t().contiguous()
        hits = torch.zeros(topk_idx.shape[0], dtype=torch.bool, device=topk_idx.device)
        for step in range(1, top_k):
            hits |= ((ids[step:] == ids[:-step]) & (ids[step:] >= 0)).any(0)
        return hits
    ordered = topk_idx.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)


def wrong_out(out: object, spec: ExchangeSpec, has_grad: bool, is_tracing: bool) -> ValueError | None:
    """What is wrong with the place that rows of a dispatch are asked for in; None for nothing.

    Args:
        out: what was passed.
        spec: the settings.
        has_grad: whether autograd is on.
        is_tracing: whether torch.compile is at work.
    """
    if out == "private":
        return None
    if out != "arena":
        return ValueError(f'out={out!r} must be "private" or "arena"')
    if has_grad:
        return ValueError(
            'out="arena" cannot be used in grad mode: the next exchange writes over rows that backward would read; '
            'dispatch under torch.no_grad(), or use out="private"'
        )
    if spec.wire_dtype is not None:
        return ValueError(
            f'out="arena" cannot be used with wire_dtype={spec.wire_dtype}: rows are stored as they travel; pass rows '
            'and scales in fp8, or use out="private"'
        )
    if is_tracing:
        return ValueError(
            'out="arena" cannot be used under torch.compile: graphs own what they make; use out="private", or dispatch '
            "outside of the graph"
        )
    return None


def check_layout_rows(
    name: str, y: object, plan: Plan | CudaPlan, spec: ExchangeSpec, *, contiguous: bool = True
) -> Tensor:
    """Check expert outputs against the plan: [num_rows, H], or [e, R * max_tokens, H] for slabs."""
    shape: tuple[int, ...] = (plan.num_rows, spec.hidden_size)
    if spec.layout == "slab":
        shape = (spec.num_local_experts, plan.num_rows // spec.num_local_experts, spec.hidden_size)
    device = plan.device
    rows = check_tensor(name, y, shape=shape, dtypes=(spec.dtype,), contiguous=contiguous)
    if rows.device != device:
        raise StaleHandleError(
            f"{name} is on {rows.device} but the handle was made on {device}: combine rows where they were dispatched"
        )
    return rows


def check_row_weights(weights: object, plan: Plan | CudaPlan, spec: ExchangeSpec) -> None:
    """Check the weights given to a combine: required exactly where combine multiplies."""
    if spec.weights == "experts":
        if weights is not None:
            raise ValueError(
                'weights were given to combine, but this dispatcher has weights="experts": the experts multiply, '
                "combine only sums; pass weights=None"
            )
        return
    if weights is None:
        raise ValueError('weights are missing: with weights="combine" pass combine(y, routed.handle, routed.weights)')
    shape: tuple[int, ...] = (plan.num_rows,)
    if spec.layout == "slab":
        shape = (spec.num_local_experts, plan.num_rows // spec.num_local_experts)
    dtype = torch.float64 if plan.weight_bytes == 8 else torch.float32
    check_tensor("weights", weights, shape=shape, dtypes=(dtype,), device=plan.device)


def check_dispatcher(spec: ExchangeSpec, expert_map: Tensor | None, num_sms: int | None) -> None:
    """Check the settings of a dispatcher."""
    spec.check()
    check_num_sms(num_sms)
    if expert_map is None:
        return
    if not isinstance(expert_map, Tensor) or expert_map.dtype != torch.int32 or expert_map.dim() != 2:
        raise ValueError("expert_map must be an int32 tensor [E_logical, max_replicas]")
    if not expert_map.numel():
        raise ValueError(f"expert_map has shape {list(expert_map.shape)}: give at least one expert and one replica")
    if int(expert_map.max()) >= spec.num_experts or int(expert_map.min()) < -1:
        raise ValueError(f"expert_map has ids up to {int(expert_map.max())}; physical ids are below {spec.num_experts}")
    if bool((expert_map[:, 0] < 0).any()):
        raise ValueError("expert_map has an expert without a replica: its first column must hold ids >= 0")
    if bool(((expert_map[:, 1:] >= 0) & (expert_map[:, :-1] < 0)).any()):
        raise ValueError("expert_map has a replica behind a -1: put -1 after the last replica of each expert")
    ids, counts = expert_map[expert_map >= 0].unique(return_counts=True)
    if bool((counts > 1).any()):
        raise ValueError(
            f"expert_map holds id {int(ids[counts > 1][0])} more than once: give each replica an id of its own"
        )
