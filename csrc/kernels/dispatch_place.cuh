#pragma once

#include <cstdint>
#include <type_traits>

#include "device/rows.cuh"
#include "kernels/dispatch_incoming.cuh"

// The receiving half of a dispatch: groups of all sources, this rank's own included, become layout rows.
namespace moe_ep::dispatch {

// Tells the plan where a group's tokens come to lie, and which ones they are.
__device__ inline void note_group(const DispatchParams& params, const Incoming& incoming) {
    const int lane = threadIdx.x % kWarpSize;
    if (!params.with_plan) return;
    // Of a group in parts, the first one tells.
    if (lane == 0 && (incoming.tokens & 1) != 0) {
        int32_t* told = told_of(params, incoming);
        told[0] = incoming.source_first + incoming.first;
        told[1] = static_cast<int32_t>(incoming.mask);
    }
    if (params.out_source != nullptr && lane < kChunkTokens && incoming.has(lane)) {
        params.out_source[incoming.row(lane)] = static_cast<int32_t>(incoming.token(lane));
    }
}

// Finds the layout rows of a group's choices, in the warp's table, and writes plan, weights and ids of a new plan.
__device__ inline void place_choices(const DispatchParams& params, const Incoming& incoming, const PairAhead& ahead,
                                     int32_t* positions) {
    const int lane = threadIdx.x % kWarpSize, top_k = params.rows.top_k;
    const int local = params.rows.num_experts / params.link.num_ranks;
    const PlanTable table(params.rows.table, params.link.num_ranks, params.rows.num_experts);
    for (int pair = lane; pair < kChunkTokens * top_k; pair += kWarpSize) {
        const int idx = pair / top_k, k = pair % top_k;
        if (!incoming.has(idx)) continue;
        const bool known = pair < kWarpSize;
        const int64_t received = incoming.row(idx) * top_k + k;
        if (!params.with_plan) {
            if (params.layout != Layout::kCompact) {
                positions[pair] = known ? ahead.position : params.rows.positions[received];
            }
            continue;
        }
        const Choice choice = known ? ahead.choice : load_choice(params, incoming, idx, k);
        const bool chosen = choice.expert >= 0;
        int64_t target = received;
        if (params.layout == Layout::kCompact) {
            params.rows.positions[received] = choice.expert;
            if (params.out_topk_idx != nullptr) params.out_topk_idx[received] = choice.expert;
        } else {
            target = chosen ? table.expert_rows[incoming.source * local + choice.expert] + choice.place : -1;
            positions[pair] = static_cast<int32_t>(target);
            params.rows.positions[received] = static_cast<int32_t>(target);
        }
        if (target < 0) continue;
        if (known && params.weight_words == 1) {
            params.out_weights[target] = chosen ? ahead.weight : 0;
            continue;
        }
        for (int word = 0; word < params.weight_words; ++word) {
            params.out_weights[target * params.weight_words + word] =
                chosen ? load_weight(params, incoming, idx, k, word) : 0;
        }
    }
}

// Layout rows of one token of a group: one for compact rows, else one per choice of this rank.
struct Targets {
    const DispatchParams& params;
    const int32_t* positions;  // of the token's choices, in the warp's table
    int64_t received;
    bool has_first;  // whether the row is there already at the first of them

    __device__ bool is_compact() const { return params.layout == Layout::kCompact; }
    template <class Visit>
    __device__ void for_each(Visit&& visit) const {
        if (is_compact()) {
            visit(received);
            return;
        }
        bool skips = has_first;
        for (int k = 0; k < params.rows.top_k; ++k) {
            if (positions[k] < 0) continue;
            if (!skips) visit(static_cast<int64_t>(positions[k]));
            skips = false;
        }
    }
    __device__ int64_t first() const {
        int k = 0;
        while (positions[k] < 0) ++k;
        return positions[k];
    }
};

// Finds the tokens of a group whose rows have more copies here than the one that is where it stays. Called by a whole
// warp.
__device__ inline uint32_t find_further_copies(const DispatchParams& params, const Incoming& incoming,
                                               const int32_t* positions) {
    const int lane = threadIdx.x % kWarpSize;
    int num_copies = 0;
    if (lane < kChunkTokens && incoming.has(lane)) {
        for (int k = 0; k < params.rows.top_k; ++k) num_copies += positions[lane * params.rows.top_k + k] >= 0;
    }
    return __ballot_sync(kAllLanes, num_copies > 1);
}

// Scales of a group's rows go to every layout row of their token. Called by a whole warp.
__device__ inline void place_scales(const DispatchParams& params, const Incoming& incoming, const int32_t* positions) {
    if (params.scale_words == 0 || params.out_scales == nullptr) return;
    const int lane = threadIdx.x % kWarpSize;
    const MetaLayout meta(params);
    for (int word = lane; word < params.scale_words; word += kWarpSize) {
        // Those of all tokens are on their way at once.
        int32_t values[kChunkTokens];
#pragma unroll
        for (int idx = 0; idx < kChunkTokens; ++idx) {
            if (!incoming.has(idx)) continue;
            values[idx] = incoming.own ? load_scale(params, incoming.token(idx), word)
                                       : ptx::load_arena(incoming.group.meta.row(idx) + meta.scale(word));
        }
#pragma unroll
        for (int idx = 0; idx < kChunkTokens; ++idx) {
            if (!incoming.has(idx)) continue;
            const Targets targets{params, positions + idx * params.rows.top_k, incoming.row(idx), false};
            targets.for_each([&](int64_t row) { params.out_scales[row * params.scale_words + word] = values[idx]; });
        }
    }
}

// Places one row by vector loads and stores. Called by a whole warp.
template <class From>
__device__ inline void place_row(const DispatchParams& params, const Incoming& incoming, int idx,
                                 const Targets& targets) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row_bytes = params.rows.row_bytes, token = incoming.token(idx);
    if constexpr (std::is_same_v<From, NoCast>) {
        const std::byte* source = incoming.has_first ? params.out + targets.first() * row_bytes
                                  : incoming.own     ? params.x + token * row_bytes
                                                     : incoming.group.rows.row(idx);
        const auto* from = reinterpret_cast<const uint4*>(source);
        constexpr int kUnroll = 4;
        for (int64_t first = lane; first < row_bytes / device::kVectorBytes; first += kUnroll * kWarpSize) {
            uint4 vectors[kUnroll];
#pragma unroll
            for (int step = 0; step < kUnroll; ++step) {
                const int64_t at = first + step * kWarpSize;
                if (at >= row_bytes / device::kVectorBytes) continue;
                vectors[step] = incoming.own ? ptx::load_once(from + at) : ptx::load_arena(from + at);
            }
            targets.for_each([&](int64_t row) {
                auto* to = reinterpret_cast<uint4*>(params.out + row * row_bytes);
#pragma unroll
                for (int step = 0; step < kUnroll; ++step) {
                    const int64_t at = first + step * kWarpSize;
                    if (at < row_bytes / device::kVectorBytes) to[at] = vectors[step];
                }
            });
        }
    } else {
        const int64_t hidden = row_bytes, out_bytes = hidden * static_cast<int64_t>(sizeof(From));
        const auto store = [&](int64_t vector, uint64_t bytes, float scale) {
            const uint4 value = device::uncast<From>(bytes, scale);
            targets.for_each(
                [&](int64_t row) { reinterpret_cast<uint4*>(params.out + row * out_bytes)[vector] = value; });
        };
        if (incoming.own) {
            device::cast_row<From>(params.x + token * out_bytes, hidden, store);
            return;
        }
        const MetaLayout meta(params);
        constexpr int kCount = device::ElementsOf<From>::kCount;
        for (int64_t vector = lane; vector < hidden / kCount; vector += kWarpSize) {
            const int group = static_cast<int>(vector * kCount / device::kFp8Group);
            const float scale = __int_as_float(ptx::load_arena(incoming.group.meta.row(idx) + meta.scale(group)));
            store(vector, device::load_cast<From>(incoming.group.rows.row(idx), vector), scale);
        }
    }
}

// Walks the groups of all sources in the order in which they are sent, and places their rows by vector loads and
// stores.
template <class From, class Route>
__device__ inline void place_rows(const DispatchParams& params, const Route& route, uint64_t epoch,
                                  const WarpShared& shared) {
    GroupWalk<Route> walk(params, route, epoch);
    Incoming incoming;
    PairAhead pairs;
    while (walk.receive(true, incoming, pairs)) {
        walk.ask_next();
        note_group(params, incoming);
        place_choices(params, incoming, pairs, shared.positions);
        __syncwarp();
        // Rows that were cast for the wire are placed without their scales.
        if constexpr (std::is_same_v<From, NoCast>) place_scales(params, incoming, shared.positions);
        if (incoming.has_first && params.layout != Layout::kCompact) {
            incoming.moved = find_further_copies(params, incoming, shared.positions);
        }
        for (uint32_t left = incoming.moved; left != 0; left &= left - 1) {
            const int idx = __ffs(left) - 1;
            place_row<From>(
                params, incoming, idx,
                {params, shared.positions + idx * params.rows.top_k, incoming.row(idx), incoming.has_first});
        }
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) walk.release(incoming);
    }
}

// Walks the groups of compact rows that are all where they stay, and places what came beside them.
template <class Route>
__device__ inline void place_meta(const DispatchParams& params, const Route& route, uint64_t epoch) {
    GroupWalk<Route> walk(params, route, epoch);
    Incoming incoming;
    PairAhead pairs;
    while (walk.receive(true, incoming, pairs)) {
        walk.ask_next();
        note_group(params, incoming);
        // No layout rows are asked for, so that there is no table of them.
        place_choices(params, incoming, pairs, nullptr);
        place_scales(params, incoming, nullptr);
    }
}

// Zeroes the padding of this rank's groups, and what follows the last of a fixed number of compact rows.
__device__ inline void fill_padding(const DispatchParams& params, Worker worker, int64_t out_row_bytes) {
    const Link& link = params.link;
    const int lane = threadIdx.x % kWarpSize, local = params.rows.num_experts / link.num_ranks;
    const PlanTable table(params.rows.table, link.num_ranks, params.rows.num_experts);
    if (params.layout == Layout::kCompact) {
        if (!params.with_plan) return;
        const int64_t num_received = table.source_rows[link.num_ranks], first = num_received * params.rows.top_k;
        if (params.out_source != nullptr) {
            for (int64_t row = num_received + worker.first * kWarpSize + lane; row < params.num_rows;
                 row += worker.stride * kWarpSize) {
                params.out_source[row] = -1;
            }
        }
        for (int64_t at = first + worker.first * kWarpSize + lane; at < params.num_rows * params.rows.top_k;
             at += worker.stride * kWarpSize) {
            if (params.out_topk_idx != nullptr) params.out_topk_idx[at] = -1;
            for (int word = 0; word < params.weight_words; ++word) {
                params.out_weights[at * params.weight_words + word] = 0;
            }
        }
        return;
    }
    if (!params.zero_padding) return;
    for (int expert = static_cast<int>(worker.first); expert < local; expert += static_cast<int>(worker.stride)) {
        const int32_t begin = table.expert_rows[expert] + table.tokens_per_expert[expert];
        for (int32_t row = begin; row < table.expert_ends[expert]; ++row) {
            device::zero_row(params.out + row * out_row_bytes, out_row_bytes);
            if (params.with_plan && lane < params.weight_words)
                params.out_weights[row * params.weight_words + lane] = 0;
            if (params.out_scales == nullptr) continue;
            for (int word = lane; word < params.scale_words; word += kWarpSize) {
                params.out_scales[static_cast<int64_t>(row) * params.scale_words + word] = 0;
            }
        }
    }
}

// Makes outputs NaN after an overflow: all bits set is one in every format. Weights are 32- or 64-bit floats.
__device__ inline void poison_rows(const DispatchParams& params, Worker worker, int64_t out_row_bytes) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_weights = params.layout == Layout::kCompact ? params.rows.top_k : 1;
    for (int64_t row = worker.first; row < params.num_rows; row += worker.stride) {
        auto* vectors = reinterpret_cast<uint4*>(params.out + row * out_row_bytes);
        for (int64_t idx = lane; idx < out_row_bytes / device::kVectorBytes; idx += kWarpSize) {
            vectors[idx] = make_uint4(~0u, ~0u, ~0u, ~0u);
        }
        if (params.layout == Layout::kCompact && params.with_plan) {
            // Ids are read as numbers of experts, so that they must be some.
            for (int k = lane; params.out_topk_idx != nullptr && k < params.rows.top_k; k += kWarpSize) {
                params.out_topk_idx[row * params.rows.top_k + k] = -1;
            }
            if (params.out_source != nullptr && lane == 0) params.out_source[row] = -1;
        }
        if (params.out_weights == nullptr) continue;
        for (int64_t word = lane; word < num_weights * params.weight_words; word += kWarpSize) {
            params.out_weights[row * num_weights * params.weight_words + word] = -1;
        }
    }
}

}  // namespace moe_ep::dispatch
