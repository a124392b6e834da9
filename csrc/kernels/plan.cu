#include <cstdint>
#include <type_traits>

#include "device/ptx.cuh"
#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/plan.h"

// Three kernels: every chunk of tokens is counted by a warp of its own; the counts are summed over the chunks before
// each; then the same warps walk their tokens again, in order, and number them from there. Sums are of integers and
// places follow from token order alone, so that every run gives the same bits.
namespace moe_ep {
namespace {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kScanColumns = 32;
constexpr int kScanSections = 16;

static_assert(PlanChunks::kGroupTokens == kWarpSize, "a lane holds one token of a group");

struct TokenRange {
    int64_t begin, end;
};

__device__ TokenRange chunk_range(const PlanParams& params) {
    const int64_t chunk_tokens = PlanChunks(params.num_tokens).chunk_tokens;
    const int64_t begin = blockIdx.x * chunk_tokens;
    return {begin, min(begin + chunk_tokens, params.num_tokens)};
}

// Returns the expert of one (token, choice), -1 for none and for ids outside 0 .. E - 1.
template <class Index>
__device__ int load_expert(const PlanParams& params, int64_t choice) {
    const Index expert = static_cast<const Index*>(params.topk_idx)[choice];
    return expert >= 0 && expert < params.num_experts ? static_cast<int>(expert) : -1;
}

// Visits the choices of a group of tokens, 32 at a time in (token, k) order, and notes the ranks each token goes to.
// `visit(choice, expert, in_range)` is called by all lanes together; expert is -1 for none.
template <class Index, class Visit>
__device__ void walk_choices(const PlanParams& params, const PlanShared& shared, TokenRange group, Visit&& visit) {
    const int lane = threadIdx.x;
    const int experts_per_rank = params.num_experts / params.num_ranks;
    shared.token_ranks[lane] = 0;
    __syncwarp();
    const int64_t first_choice = group.begin * params.top_k;
    const int num_choices = static_cast<int>(group.end - group.begin) * params.top_k;
    // Ids of several turns are on their way at once.
    constexpr int kAhead = 8;
    for (int begin = 0; begin < num_choices; begin += kAhead * kWarpSize) {
        int experts[kAhead];
#pragma unroll
        for (int turn = 0; turn < kAhead; ++turn) {
            const int local = begin + turn * kWarpSize + lane;
            experts[turn] = local < num_choices ? load_expert<Index>(params, first_choice + local) : -1;
        }
#pragma unroll
        for (int turn = 0; turn < kAhead; ++turn) {
            const int first = begin + turn * kWarpSize, local = first + lane;
            if (first >= num_choices) break;
            visit(first_choice + local, experts[turn], local < num_choices);
            if (experts[turn] >= 0) {
                // Which lane is first does not matter to the bits: no place is taken here. Halves, since shared memory
                // has no atomics of 64 bits but loops.
                const int rank = experts[turn] / experts_per_rank;
                auto* halves = reinterpret_cast<uint32_t*>(&shared.token_ranks[local / params.top_k]);
                atomicOr(halves + rank / 32, 1u << rank % 32);
            }
        }
    }
    __syncwarp();
}

// Transposes the group's rank bits: afterwards bit t of rank_tokens[r] says whether token t goes to rank r.
__device__ void transpose_ranks(const PlanParams& params, const PlanShared& shared) {
    const uint64_t ranks = shared.token_ranks[threadIdx.x];
    for (int rank = 0; rank < params.num_ranks; ++rank) {
        const uint32_t tokens = __ballot_sync(kAllLanes, (ranks >> rank & 1) != 0);
        if (threadIdx.x == 0) shared.rank_tokens[rank] = tokens;
    }
    __syncwarp();
}

__device__ void advance_rank_counts(const PlanParams& params, const PlanShared& shared) {
    for (int rank = threadIdx.x; rank < params.num_ranks; rank += kWarpSize) {
        shared.counts[params.num_experts + rank] += __popc(shared.rank_tokens[rank]);
    }
    __syncwarp();
}

// Numbers 32 choices: those of one expert take consecutive places in lane order.
__device__ void place_choices(const PlanParams& params, const PlanShared& shared, int64_t choice, int expert,
                              bool in_range) {
    const uint32_t peers = __match_any_sync(kAllLanes, expert);
    const int place = __popc(peers & ptx::lanes_below());
    const int first = expert >= 0 ? shared.counts[expert] : 0;
    // All lanes have read the count before the first lane of each expert moves it on.
    __syncwarp();
    if (expert >= 0 && place == 0) shared.counts[expert] = first + __popc(peers);
    __syncwarp();
    if (in_range) params.idx_in_expert[choice] = expert >= 0 ? first + place : -1;
}

// Numbers the group's tokens within each rank; lanes take neighbouring (token, rank) pairs, so that stores are
// coalesced.
__device__ void place_tokens(const PlanParams& params, const PlanShared& shared, TokenRange group) {
    const int num_pairs = static_cast<int>(group.end - group.begin) * params.num_ranks;
    for (int pair = threadIdx.x; pair < num_pairs; pair += kWarpSize) {
        const int token = pair / params.num_ranks, rank = pair % params.num_ranks;
        const uint32_t tokens = shared.rank_tokens[rank];
        const bool in_rank = tokens >> token & 1;
        const int place = shared.counts[params.num_experts + rank] + __popc(tokens & ((1u << token) - 1));
        const int64_t output = group.begin * params.num_ranks + pair;
        params.is_token_in_rank[output] = in_rank;
        params.idx_in_rank[output] = in_rank ? place : -1;
    }
    __syncwarp();
}

template <class Index>
__global__ void __launch_bounds__(kWarpSize) count_chunk(const __grid_constant__ PlanParams params) {
    extern __shared__ uint4 memory[];
    const PlanShared shared(memory, params);
    const int num_columns = params.num_experts + params.num_ranks;
    for (int column = threadIdx.x; column < num_columns; column += kWarpSize) shared.counts[column] = 0;
    __syncwarp();
    const TokenRange chunk = chunk_range(params);
    for (int64_t token = chunk.begin; token < chunk.end; token += kWarpSize) {
        walk_choices<Index>(params, shared, {token, min(token + kWarpSize, chunk.end)}, [&](int64_t, int expert, bool) {
            if (expert >= 0) atomicAdd(&shared.counts[expert], 1);
        });
        transpose_ranks(params, shared);
        advance_rank_counts(params, shared);
    }
    int32_t* counts = PlanWorkspace(params.workspace, params).counts.row(blockIdx.x);
    for (int column = threadIdx.x; column < num_columns; column += kWarpSize) counts[column] = shared.counts[column];
}

// Replaces the counts of each chunk by the sum over the chunks before it, and writes the totals. A block takes 32
// columns, and cuts the chunks into sections that are summed beside each other.
__global__ void __launch_bounds__(kScanColumns* kScanSections) scan_chunks(const __grid_constant__ PlanParams params) {
    __shared__ int32_t section_sums[kScanSections][kScanColumns];
    const PlanWorkspace workspace(params.workspace, params);
    const int column = blockIdx.x * kScanColumns + threadIdx.x;
    const bool in_range = column < params.num_experts + params.num_ranks;
    const int64_t section_chunks = (workspace.counts.num_rows + kScanSections - 1) / kScanSections;
    const int64_t begin = min(threadIdx.y * section_chunks, workspace.counts.num_rows);
    const int64_t end = min(begin + section_chunks, workspace.counts.num_rows);
    int32_t sum = 0;
    if (in_range) {
#pragma unroll 8
        for (int64_t chunk = begin; chunk < end; ++chunk) sum += workspace.counts.row(chunk)[column];
    }
    section_sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (!in_range) return;
    int32_t before = 0;
    for (int section = 0; section < threadIdx.y; ++section) before += section_sums[section][threadIdx.x];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        int32_t& count = workspace.counts.row(chunk)[column];
        const int32_t own = count;
        count = before;
        before += own;
    }
    if (threadIdx.y != kScanSections - 1) return;
    if (column < params.num_experts) {
        params.choices_per_expert[column] = before;
    } else {
        params.tokens_per_rank[column - params.num_experts] = before;
    }
}

template <class Index>
__global__ void __launch_bounds__(kWarpSize) place_chunk(const __grid_constant__ PlanParams params) {
    extern __shared__ uint4 memory[];
    const PlanShared shared(memory, params);
    const int32_t* counts = PlanWorkspace(params.workspace, params).counts.row(blockIdx.x);
    const int num_columns = params.num_experts + params.num_ranks;
    for (int column = threadIdx.x; column < num_columns; column += kWarpSize) shared.counts[column] = counts[column];
    __syncwarp();
    const TokenRange chunk = chunk_range(params);
    for (int64_t token = chunk.begin; token < chunk.end; token += kWarpSize) {
        const TokenRange group{token, min(token + kWarpSize, chunk.end)};
        walk_choices<Index>(params, shared, group, [&](int64_t choice, int expert, bool in_range) {
            place_choices(params, shared, choice, expert, in_range);
        });
        transpose_ranks(params, shared);
        if (params.token_ranks != nullptr && group.begin + threadIdx.x < group.end) {
            params.token_ranks[group.begin + threadIdx.x] = static_cast<uint32_t>(shared.token_ranks[threadIdx.x]);
        }
        place_tokens(params, shared, group);
        advance_rank_counts(params, shared);
    }
}

template <class Index>
void launch_kernels(const PlanParams& params, cudaStream_t stream) {
    const auto num_chunks = static_cast<unsigned>(PlanChunks(params.num_tokens).num_chunks);
    const auto shared_bytes = static_cast<size_t>(PlanShared(nullptr, params).num_bytes);
    const int num_columns = params.num_experts + params.num_ranks;
    const unsigned scan_blocks = (num_columns + kScanColumns - 1) / kScanColumns;
    if (num_chunks > 0) count_chunk<Index><<<num_chunks, kWarpSize, shared_bytes, stream>>>(params);
    check_cuda(cudaGetLastError(), "count_chunk");
    scan_chunks<<<scan_blocks, dim3(kScanColumns, kScanSections), 0, stream>>>(params);
    check_cuda(cudaGetLastError(), "scan_chunks");
    if (num_chunks > 0) place_chunk<Index><<<num_chunks, kWarpSize, shared_bytes, stream>>>(params);
    check_cuda(cudaGetLastError(), "place_chunk");
}

}  // namespace

void launch_plan(const PlanParams& params, void* stream) {
    dispatch_value<4, 8>("index_bytes", params.index_bytes, [&](auto index_bytes) {
        launch_kernels<std::conditional_t<index_bytes == 4, int32_t, int64_t>>(params,
                                                                               static_cast<cudaStream_t>(stream));
    });
}

}  // namespace moe_ep
