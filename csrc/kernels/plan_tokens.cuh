#pragma once

#include <cstddef>
#include <cstdint>

#include "device/link.cuh"
#include "layout/plan.h"

// Every warp counts a chunk of tokens; the counts are summed over the warps before it, of its block in shared memory
// and of earlier blocks in global memory; then the same warps walk their tokens again, in order, and number them from
// there. Sums are of integers and places follow from token order alone, so that every run gives the same bits.
namespace moe_ep::planning {

using device::kAllLanes;
using device::kWarpSize;

static_assert(PlanShared::kGroupTokens == kWarpSize, "a lane holds one token of a group");

struct TokenRange {
    int64_t begin, end;
};

// Division by a number that the host knows, of numbers whose product with it is below 2^32.
struct Divisor {
    uint32_t factor;  // 0: by one

    explicit Divisor(int divisor)
        : factor(divisor == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor)) {}
    __device__ int quotient(int dividend) const {
        return factor == 0 ? dividend : static_cast<int>(__umulhi(static_cast<uint32_t>(dividend), factor));
    }
};

// Divisions are the host's: they take the GPU longer than the counting.
struct PlanLaunch {
    PlanParams params;
    int num_warps;  // of a block; further ones have no tokens
    int num_blocks;
    int64_t chunk_tokens;
    int64_t warp_bytes;
    int32_t* sums;  // [num_blocks][E + R]
    Divisor by_top_k, by_local_experts, by_ranks;

    explicit PlanLaunch(const PlanParams& params)
        : params(params),
          warp_bytes(PlanShared(nullptr, params).num_bytes),
          by_top_k(params.top_k > 0 ? params.top_k : 1),
          by_local_experts(params.num_experts / params.num_ranks),
          by_ranks(params.num_ranks) {
        const PlanGrid grid(params);
        num_warps = grid.num_warps;
        num_blocks = grid.num_blocks;
        chunk_tokens = grid.chunk_tokens;
        sums = PlanWorkspace(params.workspace, params).sums.ptr;
    }
    size_t shared_bytes() const { return static_cast<size_t>(num_warps * warp_bytes); }
};

__device__ inline int lane_idx() {
    return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ inline TokenRange chunk_range(const PlanLaunch& launch) {
    const int64_t chunk = static_cast<int64_t>(blockIdx.x) * launch.num_warps + threadIdx.x / kWarpSize;
    const int64_t begin = min(chunk * launch.chunk_tokens, launch.params.num_tokens);
    return {begin, min(begin + launch.chunk_tokens, launch.params.num_tokens)};
}

__device__ inline PlanShared shared_of(const PlanLaunch& launch, void* memory, int warp) {
    return {static_cast<std::byte*>(memory) + warp * launch.warp_bytes, launch.params};
}

// Returns the expert of one (token, choice), -1 for none and for ids outside 0 .. E - 1.
template <class Index>
__device__ inline int load_expert(const PlanParams& params, int64_t choice) {
    const Index expert = static_cast<const Index*>(params.topk_idx)[choice];
    return expert >= 0 && expert < params.num_experts ? static_cast<int>(expert) : -1;
}

// Visits the choices of a group of tokens, 32 at a time in (token, k) order, and notes the ranks each token goes to.
// `visit(choice, expert, in_range)` is called by all lanes together; expert is -1 for none.
template <class Index, class Visit>
__device__ inline void walk_choices(const PlanLaunch& launch, const PlanShared& shared, TokenRange group,
                                    Visit&& visit) {
    const PlanParams& params = launch.params;
    const int lane = lane_idx();
    shared.token_ranks[lane] = 0;
    __syncwarp();
    const int64_t first_choice = group.begin * params.top_k;
    const int num_choices = static_cast<int>(group.end - group.begin) * params.top_k;
    // Ids of several turns are on their way at once.
    constexpr int kAhead = 4;
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
                const int rank = launch.by_local_experts.quotient(experts[turn]);
                auto* halves = reinterpret_cast<uint32_t*>(&shared.token_ranks[launch.by_top_k.quotient(local)]);
                atomicOr(halves + rank / 32, 1u << rank % 32);
            }
        }
    }
    __syncwarp();
}

// Transposes the group's rank bits: afterwards bit t of rank_tokens[r] says whether token t goes to rank r.
__device__ inline void transpose_ranks(const PlanParams& params, const PlanShared& shared) {
    const uint64_t ranks = shared.token_ranks[lane_idx()];
#pragma unroll 1
    for (int rank = 0; rank < params.num_ranks; ++rank) {
        const uint32_t tokens = __ballot_sync(kAllLanes, (ranks >> rank & 1) != 0);
        if (lane_idx() == 0) shared.rank_tokens[rank] = tokens;
    }
    __syncwarp();
}

__device__ inline void advance_rank_counts(const PlanParams& params, const PlanShared& shared) {
#pragma unroll 1
    for (int rank = lane_idx(); rank < params.num_ranks; rank += kWarpSize) {
        shared.counts[params.num_experts + rank] += __popc(shared.rank_tokens[rank]);
    }
    __syncwarp();
}

// Numbers 32 choices: those of one expert take consecutive places in lane order.
__device__ inline void place_choices(const PlanParams& params, const PlanShared& shared, int64_t choice, int expert,
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
__device__ inline void place_tokens(const PlanLaunch& launch, const PlanShared& shared, TokenRange group) {
    const PlanParams& params = launch.params;
    const int num_pairs = static_cast<int>(group.end - group.begin) * params.num_ranks;
#pragma unroll 1
    for (int pair = lane_idx(); pair < num_pairs; pair += kWarpSize) {
        const int token = launch.by_ranks.quotient(pair), rank = pair - token * params.num_ranks;
        const uint32_t tokens = shared.rank_tokens[rank];
        const bool in_rank = tokens >> token & 1;
        const int place = shared.counts[params.num_experts + rank] + __popc(tokens & ((1u << token) - 1));
        const int64_t output = group.begin * params.num_ranks + pair;
        params.is_token_in_rank[output] = in_rank;
        params.idx_in_rank[output] = in_rank ? place : -1;
    }
    __syncwarp();
}

__device__ inline void clear_counts(const PlanParams& params, const PlanShared& shared) {
    const int num_columns = params.num_experts + params.num_ranks;
#pragma unroll 1
    for (int column = lane_idx(); column < num_columns; column += kWarpSize) shared.counts[column] = 0;
    __syncwarp();
}

// Walks a warp's tokens: counts them or, with `places`, numbers them from the counts there are. One function for both,
// called in one place: kernels of few tokens take as long as their code takes to load.
template <class Index>
__device__ inline void walk_chunk(const PlanLaunch& launch, const PlanShared& shared, TokenRange chunk, bool places) {
    const PlanParams& params = launch.params;
#pragma unroll 1
    for (int64_t token = chunk.begin; token < chunk.end; token += kWarpSize) {
        const TokenRange group{token, min(token + kWarpSize, chunk.end)};
        walk_choices<Index>(launch, shared, group, [&](int64_t choice, int expert, bool in_range) {
            if (places) {
                place_choices(params, shared, choice, expert, in_range);
            } else if (expert >= 0) {
                atomicAdd(&shared.counts[expert], 1);
            }
        });
        transpose_ranks(params, shared);
        if (places) {
            if (params.token_ranks != nullptr && group.begin + lane_idx() < group.end) {
                params.token_ranks[group.begin + lane_idx()] = static_cast<uint32_t>(shared.token_ranks[lane_idx()]);
            }
            place_tokens(launch, shared, group);
        }
        advance_rank_counts(params, shared);
    }
}

__device__ inline void write_total(const PlanParams& params, int column, int32_t total) {
    if (column < params.num_experts) {
        params.choices_per_expert[column] = total;
    } else {
        params.tokens_per_rank[column - params.num_experts] = total;
    }
}

// Replaces the counts of each warp of this block by the sum over the warps of the block before it, and writes the sums
// of the whole block: for others that add them, or, of the only block, as the totals. Called by whole blocks.
__device__ inline void sum_warps(const PlanLaunch& launch, void* memory, bool others_add) {
    const int num_columns = launch.params.num_experts + launch.params.num_ranks;
    int32_t* own = launch.sums + static_cast<int64_t>(blockIdx.x) * num_columns;
    __syncthreads();
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x); column < num_columns; column += static_cast<int>(blockDim.x)) {
        int32_t sum = 0;
#pragma unroll 4
        for (int warp = 0; warp < launch.num_warps; ++warp) {
            int32_t& count = shared_of(launch, memory, warp).counts[column];
            const int32_t before = sum;
            sum += count;
            count = before;
        }
        if (others_add) {
            own[column] = sum;
        } else {
            write_total(launch.params, column, sum);
        }
    }
}

// Adds the sums of the blocks before, which must have told them. With `totals`, all blocks have, and their sums are
// written. Called by whole blocks.
__device__ inline void add_blocks(const PlanLaunch& launch, void* memory, bool totals) {
    __syncthreads();
    if (launch.num_blocks == 1) return;
    const PlanParams& params = launch.params;
    const int num_columns = params.num_experts + params.num_ranks, block = static_cast<int>(blockIdx.x);
    const int num_blocks = totals ? launch.num_blocks : block;
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x); column < num_columns; column += static_cast<int>(blockDim.x)) {
        int32_t before = 0, total = 0;
#pragma unroll 8
        for (int other = 0; other < num_blocks; ++other) {
            const int32_t sum = __ldcg(launch.sums + other * num_columns + column);
            total += sum;
            before += other < block ? sum : 0;
        }
#pragma unroll 4
        for (int warp = 0; warp < launch.num_warps; ++warp) shared_of(launch, memory, warp).counts[column] += before;
        if (totals) write_total(params, column, total);
    }
    __syncthreads();
}

}  // namespace moe_ep::planning
