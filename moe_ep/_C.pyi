from collections.abc import Callable
from typing import Any, TypedDict

import torch

REGION_ALIGNMENT: int

class BuildInfo(TypedDict):
    cuda: bool
    cuda_version: str
    cuda_archs: list[str]
    nvshmem_version: str
    not_built: str

class Capabilities(TypedDict):
    fd: bool
    ipc: bool
    uuid: str
    compute_capability: tuple[int, int]
    sms: int

# Missing in a build without CUDA.
class Arena:
    def __init__(self, *, num_bytes: int, device: int, way: str) -> None: ...
    @property
    def base(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def way(self) -> str: ...
    @property
    def device(self) -> int: ...
    def export_fd(self) -> int: ...
    def export_ipc(self) -> bytes: ...
    def open_fd(self, fd: int, num_bytes: int, owner_device: int) -> int: ...
    def open_ipc(self, handle: bytes, num_bytes: int, owner_device: int) -> int: ...
    def view(self, offset: int, num_bytes: int) -> object: ...
    def peer_view(self, address: int, num_bytes: int) -> object: ...
    def close(self) -> None: ...
    @staticmethod
    def capabilities(device: int) -> Capabilities: ...
    @staticmethod
    def peer_access(device: int, peer: int) -> bool: ...
    @staticmethod
    def device_uuids() -> list[str]: ...

# Missing in a build without CUDA.
class Buffer:
    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        ranks_per_node: int,
        device: int,
        stream: object,
        memory: Callable[[], tuple[Arena | None, int, int] | None],
    ) -> None: ...
    def is_available(self) -> bool: ...
    def is_internode_available(self) -> bool: ...
    def get_num_rdma_ranks(self) -> int: ...
    def get_rdma_rank(self) -> int: ...
    def get_root_rdma_rank(self, global_: bool) -> int: ...
    def get_local_device_id(self) -> int: ...
    def get_local_ipc_handle(self) -> bytes: ...
    def get_local_nvshmem_unique_id(self) -> bytes: ...
    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: int | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> torch.Tensor: ...
    def get_comm_stream(self) -> torch.cuda.Stream: ...
    def sync(self, device_ids: list[int], all_gathered_handles: list[bytes], root_unique_id: bytes) -> None: ...

class PlanParams:
    def __init__(
        self,
        *,
        topk_idx: int,
        index_bytes: int,
        num_tokens: int,
        top_k: int,
        num_experts: int,
        num_ranks: int,
        choices_per_expert: int,
        tokens_per_rank: int,
        is_token_in_rank: int,
        idx_in_expert: int,
        idx_in_rank: int,
        token_ranks: int = 0,
    ) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...

def build_info() -> BuildInfo: ...
def plan_host(params: PlanParams) -> None: ...
def plan_cuda(params: PlanParams, *, workspace: int, workspace_bytes: int, stream: int) -> None: ...
def asym_layout(*, base: int, num_peers: int, rows_per_peer: int, row_elements: int) -> dict: ...
def sym_layout(*, base: int, num_peers: int, rows_per_peer: int, row_elements: int, decoupled: bool) -> dict: ...
def low_latency_layout(
    *, base: int, max_tokens: int, dispatch_bytes: int, combine_bytes: int, top_k: int, num_ranks: int
) -> dict: ...

# Missing in a build without CUDA.
def push(*, sources: list[int], targets: list[int], num_bytes: list[int], num_sms: int, stream: int) -> None: ...
def weigh(
    grads: int,
    rows: int,
    weights: int,
    out_rows: int,
    out_weights: int,
    num_rows: int,
    hidden: int,
    element: int,
    stream: int,
) -> None: ...

CHUNK_TOKENS: int
HEADER_WORDS: int
MAX_NODE_RANKS: int

def table_layout(*, num_ranks: int, num_experts: int) -> dict[str, int]: ...
def arena_bytes(*, num_ranks: int, payload_bytes: int) -> int: ...
def group_layout(*, row_bytes: int, meta_words: int) -> dict[str, int]: ...
def direct_layout(
    *, num_ranks: int, num_groups: int, row_bytes: int, meta_words: int, num_rows: int
) -> dict[str, Any]: ...
def fits_directly(
    *, num_ranks: int, payload_bytes: int, num_groups: int, row_bytes: int, meta_words: int, num_rows: int
) -> bool: ...
def source_plan_room(top_k: int, num_experts: int, num_ranks: int, by_mask: bool) -> tuple[int, int, int, int, int]: ...
def source_plan_layout(
    num_tokens: int, top_k: int, num_experts: int, num_ranks: int, by_mask: bool
) -> dict[str, int]: ...
def received_plan_words(num_ranks: int, max_chunks: int, num_received: int, top_k: int) -> int: ...

# What follows is missing in a build without CUDA.
class Event:
    def record(self, stream: int) -> None: ...
    def wait(self, stream: int) -> None: ...
    def query(self) -> bool: ...
    def order(self, first: int, then: int) -> None: ...
    def follow(self, first: int, then: int) -> None: ...

class Channel:
    timeout_s: float
    def __init__(self, *, arenas: list[int], rank: int, payload_bytes: int, device: int, timeout_s: float) -> None: ...
    def open(self, header: list[int], stream: int) -> None: ...
    def trouble(self) -> dict | None: ...
    def is_quiet(self, overflows: int) -> bool: ...
    def overflow(self) -> tuple[int, int, int, int]: ...
    def epoch(self) -> int: ...
    def reset(self, epoch: int) -> None: ...
    def abandon(self) -> None: ...

class CountSettings:
    def __init__(
        self,
        *,
        num_ranks: int,
        top_k: int,
        num_experts: int,
        index_bytes: int,
        alignment: int,
        layout: int,
        drop: bool,
        by_mask: bool,
    ) -> None: ...

class RowSettings:
    def __init__(
        self,
        *,
        row_bytes: int,
        weight_words: int,
        scale_words: int,
        cast: int,
        num_senders: int,
        num_placers: int,
        bulk: bool,
    ) -> None: ...

class CombineSettings:
    def __init__(
        self,
        *,
        element: int,
        hidden: int,
        wide_wire: bool,
        weight_words: int,
        value_words: int,
        only_own_values: bool,
        num_senders: int,
        num_reducers: int,
        bulk: bool,
    ) -> None: ...

class KeptPlan:
    def __init__(
        self,
        num_tokens: int,
        top_k: int,
        num_experts: int,
        layout: int,
        zero_padding: bool,
        num_rows: int,
        max_chunks: int,
        source: int,
        received: int,
        /,
    ) -> None: ...

class DispatchCall:
    def __init__(
        self,
        settings: CountSettings,
        num_tokens: int,
        topk_idx: int,
        source: int,
        told_choices: int,
        told_tokens: int,
        told_ends: int,
        told_overflow: int,
        /,
    ) -> None: ...
    @property
    def tells_sizes(self) -> bool: ...
    def set_capacity(self, max_tokens: int, rows: int, per_expert: int) -> None: ...
    def set_total(self, received_total: int) -> None: ...
    def count_direct(self) -> None: ...
    def lend(self, num_groups: int) -> None: ...
    def is_direct(self, channel: Channel, max_tokens: int, most_rows: int) -> bool: ...
    def set_rows(
        self,
        settings: RowSettings,
        x: int,
        topk_weights: int,
        scales: int,
        scale_stride: int,
        scale_word_stride: int,
        /,
    ) -> None: ...
    def set_output(
        self,
        received: int,
        max_chunks: int,
        num_received: int,
        out: int,
        num_rows: int,
        out_weights: int,
        out_scales: int,
        out_topk_idx: int,
        out_source: int,
        /,
    ) -> None: ...
    def count(self, channel: Channel, header: list[int], current: int, queue: int, /) -> None: ...
    def send(self, channel: Channel, header: list[int], current: int, queue: int, beside: bool, /) -> None: ...
    def place(
        self, channel: Channel, current: int, queue: int, place_queue: int, num_laps: int, beside: bool, told: bool, /
    ) -> Event | None: ...
    def run(
        self, channel: Channel, header: list[int], current: int, queue: int, counted: bool, beside: bool, told: bool, /
    ) -> Event | None: ...
    def wait_sizes(self, channel: Channel, seconds: float) -> tuple[int, int, int, int] | None: ...
    def host_counts(self, channel: Channel) -> list[int]: ...

def replay(
    channel: Channel,
    settings: RowSettings,
    plan: KeptPlan,
    header: list[int],
    x: int,
    scales: int,
    scale_stride: int,
    scale_word_stride: int,
    out: int,
    out_scales: int,
    current: int,
    queue: int,
    beside: bool,
    told: bool,
    /,
) -> Event | None: ...
def combine(
    channel: Channel,
    settings: CombineSettings,
    plan: KeptPlan,
    header: list[int],
    top_k: int,
    y: int,
    row_weights: int,
    values: int,
    out: int,
    bias_0: int,
    bias_1: int,
    out_values: int,
    current: int,
    queue: int,
    beside: bool,
    told: bool,
    /,
) -> Event | None: ...
