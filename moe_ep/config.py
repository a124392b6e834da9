"""Settings of exchanges: what a caller may choose, checked once, the same on every rank."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import zlib

import torch

# Metadata that travels with a row at most: source token, 64 choices with id and weight, rounded up.
_METADATA_BYTES = 1024
_ALIGNMENT_BYTES = 128
# SMs assumed by the size hints when a Config leaves them open: the largest count that the training kernels use.
_HINT_NUM_SMS = 24
_RANKS_PER_NODE = 8

HALF_DTYPES = (torch.bfloat16, torch.float16)
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8_DTYPE = torch.float8_e4m3fn
FP8_GROUP = 128
MAX_TOP_K = 64
MAX_NUM_EXPERTS = 4096
LAYOUTS = ("expanded", "compact", "slab")
WEIGHT_PLACES = ("combine", "experts")
OVERFLOW_POLICIES = ("raise", "drop")


def check_int(name: str, value: object, least: int, remedy: str = "") -> None:
    """Raise ValueError unless a value is an integer of at least ``least``; ``remedy`` says what else may be given."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}{remedy and ', ' + remedy}")


def check_num_sms(num_sms: object) -> None:
    """Raise ValueError unless SMs come in pairs, or are left open."""
    if num_sms is None:
        return
    if not isinstance(num_sms, numbers.Integral) or isinstance(num_sms, bool) or num_sms <= 0 or num_sms % 2:
        raise ValueError(f"num_sms={num_sms!r} must be positive and even, or None for the measured default")


class Config:
    """How many SMs an exchange uses and in which pieces rows travel.

    Args:
        num_sms: SMs of a kernel, even and positive; None takes the measured default of the operation and GPU.
        num_max_nvl_chunked_send_tokens: rows sent per step inside a node.
        num_max_nvl_chunked_recv_tokens: rows that a receiver buffers per channel inside a node.
        num_max_rdma_chunked_send_tokens: rows sent per step between nodes.
        num_max_rdma_chunked_recv_tokens: rows that a receiver buffers per channel between nodes.

    Raises:
        ValueError: for an odd or non-positive ``num_sms``, or a send chunk too large for its receive chunk.

    Example:
        >>> Config(num_sms=16).get_nvl_buffer_size_hint(hidden_bytes=4096, num_ranks=4) % 128
        0
    """

    def __init__(
        self,
        num_sms: int | None = None,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        check_num_sms(num_sms)
        chunks = {
            "num_max_nvl_chunked_send_tokens": num_max_nvl_chunked_send_tokens,
            "num_max_nvl_chunked_recv_tokens": num_max_nvl_chunked_recv_tokens,
            "num_max_rdma_chunked_send_tokens": num_max_rdma_chunked_send_tokens,
            "num_max_rdma_chunked_recv_tokens": num_max_rdma_chunked_recv_tokens,
        }
        for name, value in chunks.items():
            check_int(name, value, 1, "a number of rows")
        if num_max_nvl_chunked_send_tokens >= num_max_nvl_chunked_recv_tokens:
            raise ValueError(
                f"num_max_nvl_chunked_send_tokens={num_max_nvl_chunked_send_tokens} must be smaller than "
                f"num_max_nvl_chunked_recv_tokens={num_max_nvl_chunked_recv_tokens}: send less per step or buffer more"
            )
        if num_max_rdma_chunked_send_tokens > num_max_rdma_chunked_recv_tokens // 2:
            raise ValueError(
                f"num_max_rdma_chunked_send_tokens={num_max_rdma_chunked_send_tokens} must be at most half of "
                f"num_max_rdma_chunked_recv_tokens={num_max_rdma_chunked_recv_tokens}: send less or buffer more"
            )
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes in which one round of ``num_max_nvl_chunked_recv_tokens * num_sms / 2`` rows per source fits.

        Args:
            hidden_bytes: bytes of one row, hidden size times bytes per element.
            num_ranks: ranks of the group.

        Returns:
            A multiple of 128. Anything from 64 rows per source upward works, in more rounds.
        """
        channels = (self.num_sms or _HINT_NUM_SMS) // 2
        return num_ranks * self.num_max_nvl_chunked_recv_tokens * channels * record_bytes(hidden_bytes)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of the rings between nodes of 8 ranks: one to send and one to receive per node and channel.

        Args:
            hidden_bytes: bytes of one row.
            num_ranks: ranks of the group.

        Returns:
            A multiple of 128; 0 where all ranks fit one node.
        """
        num_nodes = math.ceil(num_ranks / _RANKS_PER_NODE)
        if num_nodes == 1:
            return 0
        channels = (self.num_sms or _HINT_NUM_SMS) // 2
        return 2 * num_nodes * self.num_max_rdma_chunked_recv_tokens * channels * record_bytes(hidden_bytes)

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


def record_bytes(hidden_bytes: int) -> int:
    """Bytes that one row takes in an arena: payload and metadata, rounded up to 128."""
    return math.ceil((hidden_bytes + _METADATA_BYTES) / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Room for received rows, so that no size has to reach the host. Give exactly one field.

    Attributes:
        rows: rows of ``Dispatched.x`` on each rank, shared by its experts.
        per_expert: rows of each expert, whose groups then start at fixed places.
        factor: as ``per_expert = ceil(factor * R * max_tokens * K / E)``, the share of an expert under even routing
            times this factor (the capacity factor of GShard and Switch Transformer). Without ``max_tokens_per_rank``
            the largest T of the first exchange is taken, and a larger one later is a ValueError on all ranks.

    Raises:
        ValueError: unless exactly one field is given and positive.

    Example:
        >>> Capacity(per_expert=64)
        Capacity(rows=None, per_expert=64, factor=None)
    """

    rows: int | None = None
    per_expert: int | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Capacity got {sorted(given) or 'nothing'}: give exactly one of rows, per_expert, factor")
        ((name, value),) = given.items()
        if name != "factor" and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"Capacity {name}={value!r} must be an int, a number of rows")
        if not 0 < value < math.inf:
            raise ValueError(f"Capacity {name}={value} must be positive and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeSpec:
    """What all ranks must agree on before rows can move. Sizes as in the documentation: E, H, K, R."""

    num_experts: int
    hidden_size: int
    top_k: int
    num_ranks: int
    dtype: torch.dtype
    layout: str = "expanded"
    alignment: int = 1
    weights: str = "combine"
    capacity: Capacity | None = None
    on_overflow: str = "raise"
    max_tokens_per_rank: int | None = None
    wire_dtype: torch.dtype | None = None
    combine_dtype: torch.dtype | None = None

    @property
    def num_local_experts(self) -> int:
        """e = E / R."""
        return self.num_experts // self.num_ranks

    @property
    def wide_sums(self) -> bool:
        """Whether sums of one rank's rows of a token travel in fp32 though rows have 16 bits."""
        return self.combine_dtype is not None and self.dtype in HALF_DTYPES

    @functools.cached_property
    def per_choice(self) -> bool:
        """Whether rows cross the wire once per choice rather than once per (token, rank)."""
        return self.layout != "compact" and wire_per_choice(self.num_ranks, self.num_experts, self.top_k)

    @property
    def static_rows(self) -> int | None:
        """Layout rows per rank where settings alone fix them, else None."""
        if self.layout == "slab":
            return self.num_local_experts * self.num_ranks * (self.max_tokens_per_rank or 0)
        if self.capacity is None or self.capacity.factor is not None:
            return None
        return self.capacity.rows or (self.capacity.per_expert or 0) * self.num_local_experts

    def __hash__(self) -> int:
        # NOTE: fields are hashed once: settings are looked up at every exchange.
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def describe(self) -> str:
        """The settings in one line, for errors that show both sides."""
        return self._description

    @functools.cached_property
    def _description(self) -> str:
        names = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def digest(self) -> int:
        """31-bit hash of the settings, equal on all ranks that agree."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> int:
        return zlib.crc32(self.describe().encode()) & 0x7FFFFFFF

    def check(self) -> None:
        """Raise ValueError, naming argument, value, rule and remedy, for settings that cannot work."""
        _check_sizes(self)
        _check_choices(self)
        _check_capacity(self)


def expected_ranks_per_token(num_ranks: int, num_experts: int, top_k: int) -> float:
    """Expected number of distinct ranks that a token visits when its K experts are drawn evenly without replacement."""
    per_rank = num_experts // num_ranks
    return num_ranks * (1.0 - math.comb(num_experts - per_rank, top_k) / math.comb(num_experts, top_k))


def wire_per_choice(num_ranks: int, num_experts: int, top_k: int) -> bool:
    """Whether one row per choice beats one row per (token, rank): when hardly any rows would be saved by sharing."""
    if num_ranks == 1:
        return True
    return expected_ranks_per_token(num_ranks, num_experts, top_k) > 0.75 * top_k


def check_row_bytes(hidden_size: int, dtype: torch.dtype, name: str = "hidden_size") -> None:
    """Raise ValueError unless rows are whole multiples of 16 bytes, the unit in which they are moved."""
    row_bytes = hidden_size * dtype.itemsize
    if row_bytes % 16:
        step = 16 // math.gcd(16, dtype.itemsize)
        raise ValueError(
            f"{name}={hidden_size} makes rows of {row_bytes} bytes in {dtype}; rows must be multiples of 16 bytes: "
            f"use a multiple of {step}"
        )


def check_limits(num_experts: int, top_k: int, names: tuple[str, str] = ("num_experts", "top_k")) -> None:
    """Raise ValueError for more experts, or choices per token, than any backend takes; ``names`` are the arguments'."""
    for name, value, most in ((names[0], num_experts, MAX_NUM_EXPERTS), (names[1], top_k, MAX_TOP_K)):
        if value > most:
            raise ValueError(f"{name}={value} must be at most {most}, which is what every backend takes")


def _check_sizes(spec: ExchangeSpec) -> None:
    for name in ("num_experts", "hidden_size", "top_k", "alignment"):
        value = getattr(spec, name)
        check_int(name, value, 1)
    if spec.num_experts % spec.num_ranks:
        lower = spec.num_experts - spec.num_experts % spec.num_ranks
        raise ValueError(
            f"num_experts={spec.num_experts} must be divisible by the {spec.num_ranks} ranks of the group: "
            f"use {max(lower, spec.num_ranks)} or {lower + spec.num_ranks}, or another group size"
        )
    check_limits(spec.num_experts, spec.top_k)
    if spec.top_k > spec.num_experts:
        raise ValueError(
            f"top_k={spec.top_k} must be at most num_experts={spec.num_experts}: a token chooses an expert once"
        )
    if spec.max_tokens_per_rank is not None:
        check_int("max_tokens_per_rank", spec.max_tokens_per_rank, 1, "or None")


def _check_choices(spec: ExchangeSpec) -> None:
    if spec.dtype not in ROW_DTYPES:
        raise ValueError(f"dtype={spec.dtype} must be one of {', '.join(map(str, ROW_DTYPES))}")
    for name, allowed in (("layout", LAYOUTS), ("weights", WEIGHT_PLACES), ("on_overflow", OVERFLOW_POLICIES)):
        if getattr(spec, name) not in allowed:
            raise ValueError(f"{name}={getattr(spec, name)!r} must be one of {', '.join(map(repr, allowed))}")
    check_row_bytes(spec.hidden_size, spec.dtype)
    if spec.wire_dtype is not None:
        if spec.wire_dtype != FP8_DTYPE:
            raise ValueError(f"wire_dtype={spec.wire_dtype} must be {FP8_DTYPE}, or None to send rows as they are")
        if spec.hidden_size % FP8_GROUP:
            raise ValueError(
                f"hidden_size={spec.hidden_size} must be a multiple of {FP8_GROUP} with wire_dtype={FP8_DTYPE}: "
                f"one scale covers {FP8_GROUP} channels"
            )
    if spec.combine_dtype is not None:
        if spec.combine_dtype != torch.float32 or spec.dtype == torch.float64:
            raise ValueError(
                f"combine_dtype={spec.combine_dtype} must be torch.float32, for rows of at most 32 bits, or None for "
                f"dtype={spec.dtype}"
            )
        if spec.layout == "compact":
            raise ValueError(
                'combine_dtype cannot be used with layout="compact": there experts sum a token\'s rows, and combine '
                "sends what they return"
            )
    if spec.layout == "compact" and spec.weights == "combine":
        raise ValueError(
            'weights="combine" cannot be used with layout="compact": one row there serves all choices of a token on '
            'a rank, so only the experts can weight them: pass weights="experts"'
        )
    if spec.layout != "expanded" and spec.alignment != 1:
        raise ValueError(f'alignment={spec.alignment} needs layout="expanded": only its groups are padded')


def _check_capacity(spec: ExchangeSpec) -> None:
    if spec.layout == "slab":
        if spec.max_tokens_per_rank is None:
            raise ValueError(
                'max_tokens_per_rank is missing: layout="slab" has R * max_tokens_per_rank rows per expert'
            )
        if spec.capacity is not None:
            raise ValueError('capacity must be None with layout="slab": a slab always holds every row')
    if spec.capacity is None:
        return
    if not isinstance(spec.capacity, Capacity):
        raise ValueError(f"capacity={spec.capacity!r} must be a moe_ep.Capacity or None")
    per_expert = spec.capacity.per_expert
    if per_expert is not None and per_expert % spec.alignment:
        raise ValueError(f"Capacity per_expert={per_expert} must be a multiple of alignment={spec.alignment}")
    least = spec.num_local_experts * (spec.alignment - 1) + 1
    if spec.capacity.rows is not None and spec.capacity.rows < least:
        raise ValueError(
            f"Capacity rows={spec.capacity.rows} must be at least {least}: {spec.num_local_experts} experts per rank, "
            f"each padded to alignment={spec.alignment}"
        )
