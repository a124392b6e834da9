from typing import TypedDict

REGION_ALIGNMENT: int

class BuildInfo(TypedDict):
    cuda: bool
    cuda_version: str
    cuda_archs: list[str]
    nvshmem_version: str
    not_built: str

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
