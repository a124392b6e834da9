#include <cooperative_groups.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device/ptx.cuh"
#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/plan.h"

// Every warp counts a chunk of tokens; the counts are summed over the warps before it, of its block in shared memory
// and of earlier blocks behind a barrier of the grid; then the same warps walk their tokens again, in order, and number
// them from there. Sums are of integers and places follow from token order alone, so that every run gives the same
// bits.
namespace moe_ep {
namespace {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

static_assert(PlanShared::kGroupTokens == kWarpSize, "a lane holds one token of a group");

struct TokenRange {
    int64_t begin, end;
};

// Divisions are the host's: they take the GPU longer than the counting.
struct PlanLaunch {
    PlanParams params;
    int64_t chunk_tokens;
    int64_t warp_bytes;
    int32_t* sums;  // [num_blocks][E + R]
};

__device__ int lane_idx() {
    return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ TokenRange chunk_range(const PlanLaunch& launch) {
    const int64_t chunk = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
    const int64_t begin = min(chunk * launch.chunk_tokens, launch.params.num_tokens);
    return {begin, min(begin + launch.chunk_tokens, launch.params.num_tokens)};
}

__device__ PlanShared shared_of(const PlanLaunch& launch, void* memory, int warp) {
    return {static_cast<std::byte*>(memory) + warp * launch.warp_bytes, launch.params};
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
    const int lane = lane_idx();
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
    const uint64_t ranks = shared.token_ranks[lane_idx()];
    for (int rank = 0; rank < params.num_ranks; ++rank) {
        const uint32_t tokens = __ballot_sync(kAllLanes, (ranks >> rank & 1) != 0);
        if (lane_idx() == 0) shared.rank_tokens[rank] = tokens;
    }
    __syncwarp();
}

__device__ void advance_rank_counts(const PlanParams& params, const PlanShared& shared) {
    for (int rank = lane_idx(); rank < params.num_ranks; rank += kWarpSize) {
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
    for (int pair = lane_idx(); pair < num_pairs; pair += kWarpSize) {
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
__device__ void count_chunk(const PlanParams& params, const PlanShared& shared, TokenRange chunk) {
    const int num_columns = params.num_experts + params.num_ranks;
    for (int column = lane_idx(); column < num_columns; column += kWarpSize) shared.counts[column] = 0;
    __syncwarp();
    for (int64_t token = chunk.begin; token < chunk.end; token += kWarpSize) {
        walk_choices<Index>(params, shared, {token, min(token + kWarpSize, chunk.end)}, [&](int64_t, int expert, bool) {
            if (expert >= 0) atomicAdd(&shared.counts[expert], 1);
        });
        transpose_ranks(params, shared);
        advance_rank_counts(params, shared);
    }
}

// Replaces the counts of each warp of this block by the sum over the warps before it, of earlier blocks too; the last
// block writes the totals. Called by whole blocks.
__device__ void add_up_counts(const PlanLaunch& launch, void* memory) {
    const PlanParams& params = launch.params;
    const int num_columns = params.num_experts + params.num_ranks, num_warps = blockDim.x / kWarpSize;
    const int block = static_cast<int>(blockIdx.x), num_blocks = static_cast<int>(gridDim.x);
    int32_t* own = launch.sums + block * num_columns;
    __syncthreads();
    for (int column = threadIdx.x; column < num_columns; column += blockDim.x) {
        int32_t sum = 0;
        for (int warp = 0; warp < num_warps; ++warp) {
            int32_t& count = shared_of(launch, memory, warp).counts[column];
            const int32_t before = sum;
            sum += count;
            count = before;
        }
        own[column] = sum;
    }
    // A grid of one block is not launched cooperatively.
    if (num_blocks > 1) cooperative_groups::this_grid().sync();
    for (int column = threadIdx.x; column < num_columns; column += blockDim.x) {
        int32_t before = 0;
#pragma unroll 8
        for (int other = 0; other < block; ++other) before += __ldcg(launch.sums + other * num_columns + column);
        for (int warp = 0; warp < num_warps; ++warp) shared_of(launch, memory, warp).counts[column] += before;
        if (block != num_blocks - 1) continue;
        const int32_t total = before + own[column];
        if (column < params.num_experts) {
            params.choices_per_expert[column] = total;
        } else {
            params.tokens_per_rank[column - params.num_experts] = total;
        }
    }
    __syncthreads();
}

template <class Index>
__device__ void place_chunk(const PlanParams& params, const PlanShared& shared, TokenRange chunk) {
    for (int64_t token = chunk.begin; token < chunk.end; token += kWarpSize) {
        const TokenRange group{token, min(token + kWarpSize, chunk.end)};
        walk_choices<Index>(params, shared, group, [&](int64_t choice, int expert, bool in_range) {
            place_choices(params, shared, choice, expert, in_range);
        });
        transpose_ranks(params, shared);
        if (params.token_ranks != nullptr && group.begin + lane_idx() < group.end) {
            params.token_ranks[group.begin + lane_idx()] = static_cast<uint32_t>(shared.token_ranks[lane_idx()]);
        }
        place_tokens(params, shared, group);
        advance_rank_counts(params, shared);
    }
}

template <class Index>
__global__ void __launch_bounds__(PlanGrid::kMaxWarps* kWarpSize)
    plan_tokens(const __grid_constant__ PlanLaunch launch) {
    extern __shared__ uint4 memory[];
    const PlanShared shared = shared_of(launch, memory, static_cast<int>(threadIdx.x) / kWarpSize);
    const TokenRange chunk = chunk_range(launch);
    count_chunk<Index>(launch.params, shared, chunk);
    add_up_counts(launch, memory);
    place_chunk<Index>(launch.params, shared, chunk);
}

template <class Index>
void launch_kernel(const PlanParams& params, cudaStream_t stream) {
    const PlanGrid grid(params);
    PlanLaunch launch{params, grid.chunk_tokens, PlanShared(nullptr, params).num_bytes,
                      PlanWorkspace(params.workspace, params).sums.ptr};
    const auto threads = static_cast<unsigned>(grid.num_warps * kWarpSize);
    const auto shared_bytes = static_cast<size_t>(grid.num_warps * launch.warp_bytes);
    if (grid.num_blocks == 1) {
        plan_tokens<Index><<<1, threads, shared_bytes, stream>>>(launch);
        check_cuda(cudaGetLastError(), "plan_tokens");
        return;
    }
    void* arguments[] = {&launch};
    check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(plan_tokens<Index>),
                                           dim3(static_cast<unsigned>(grid.num_blocks)), dim3(threads), arguments,
                                           shared_bytes, stream),
               "plan_tokens");
}

// Allows a kernel the shared memory of the largest sizes, and loads it.
template <class Index>
void prepare_kernel() {
    check_cuda(cudaFuncSetAttribute(plan_tokens<Index>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(PlanGrid::kMaxSharedBytes)),
               "cudaFuncSetAttribute(plan_tokens)");
}

}  // namespace

void prepare_plan() {
    prepare_kernel<int32_t>();
    prepare_kernel<int64_t>();
}

void launch_plan(const PlanParams& params, void* stream) {
    dispatch_value<4, 8>("index_bytes", params.index_bytes, [&](auto index_bytes) {
        launch_kernel<std::conditional_t<index_bytes == 4, int32_t, int64_t>>(params,
                                                                              static_cast<cudaStream_t>(stream));
    });
}

}  // namespace moe_ep
