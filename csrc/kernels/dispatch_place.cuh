#pragma once

#include <cstdint>
#include <type_traits>

#include "device/rows.cuh"
#include "kernels/dispatch_common.cuh"

// The receiving half of a dispatch: groups of all sources, this rank's own included, become layout rows.
namespace moe_ep::dispatch {

// A group to be placed: of a peer in this rank's arena, or of this rank's own tokens.
struct Incoming {
    int source;
    int64_t chunk;
    bool own;
    uint32_t mask;
    int32_t first;  // received row of the first token
    GroupLayout group;

    // Received row of token `idx` of the chunk.
    __device__ int64_t row(int idx) const { return first + __popc(mask & ((1u << idx) - 1)); }
};

// One choice of a received token.
struct Choice {
    int32_t expert;  // local id, -1 = another rank's
    int32_t place;   // among its source's choices of that expert
};

__device__ inline Choice load_choice(const DispatchParams& params, const Incoming& incoming, int idx, int k) {
    const MetaLayout meta(params);
    if (!incoming.own) {
        const int32_t* words = incoming.group.meta.row(idx);
        return {ptx::load_arena(words + meta.id(k)), ptx::load_arena(words + meta.place(k))};
    }
    const int local = params.rows.num_experts / params.link.num_ranks;
    const int64_t choice = (incoming.chunk * kChunkTokens + idx) * params.rows.top_k + k;
    const int expert = load_expert(params, choice) - params.link.rank * local;
    const bool chosen = expert >= 0 && expert < local;
    return {chosen ? expert : -1, chosen ? params.idx_in_expert[choice] : 0};
}

__device__ inline int32_t load_weight(const DispatchParams& params, const Incoming& incoming, int idx, int k,
                                      int word) {
    if (!incoming.own) return ptx::load_arena(incoming.group.meta.row(idx) + MetaLayout(params).weight(k, word));
    const int64_t choice = (incoming.chunk * kChunkTokens + idx) * params.rows.top_k + k;
    return params.topk_weights[choice * params.weight_words + word];
}

// Finds the layout rows of a group's choices, in the warp's table, and writes plan, weights and ids of a new plan.
__device__ inline void place_choices(const DispatchParams& params, const Incoming& incoming, const PlanTable& table,
                                     int32_t* positions) {
    const int lane = threadIdx.x % kWarpSize, top_k = params.rows.top_k;
    const int local = params.rows.num_experts / params.link.num_ranks;
    for (int pair = lane; pair < kChunkTokens * top_k; pair += kWarpSize) {
        const int idx = pair / top_k, k = pair % top_k;
        if ((incoming.mask >> idx & 1) == 0) continue;
        const int64_t received = incoming.row(idx) * top_k + k;
        if (!params.with_plan) {
            if (params.layout != Layout::kCompact) positions[pair] = params.rows.positions[received];
            continue;
        }
        const Choice choice = load_choice(params, incoming, idx, k);
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

    __device__ bool is_compact() const { return params.layout == Layout::kCompact; }
    template <class Visit>
    __device__ void for_each(Visit&& visit) const {
        if (is_compact()) {
            visit(received);
            return;
        }
        for (int k = 0; k < params.rows.top_k; ++k) {
            if (positions[k] >= 0) visit(static_cast<int64_t>(positions[k]));
        }
    }
};

// Scales of a group's rows go to every layout row of the token. Called by a whole warp.
__device__ inline void place_scales(const DispatchParams& params, const Incoming& incoming, int idx,
                                    const Targets& targets) {
    const MetaLayout meta(params);
    for (int word = threadIdx.x % kWarpSize; word < params.scale_words; word += kWarpSize) {
        const int32_t value = incoming.own ? load_scale(params, incoming.chunk * kChunkTokens + idx, word)
                                           : ptx::load_arena(incoming.group.meta.row(idx) + meta.scale(word));
        targets.for_each([&](int64_t row) { params.out_scales[row * params.scale_words + word] = value; });
    }
}

// Places one row by vector loads and stores. Called by a whole warp.
template <class From>
__device__ inline void place_row(const DispatchParams& params, const Incoming& incoming, int idx,
                                 const Targets& targets) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row_bytes = params.rows.row_bytes, token = incoming.chunk * kChunkTokens + idx;
    if constexpr (std::is_same_v<From, NoCast>) {
        const std::byte* source = incoming.own ? params.x + token * row_bytes : incoming.group.rows.row(idx);
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

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Places the rows of one group through a pipe. Called by one thread.
__device__ inline void place_rows_bulk(const DispatchParams& params, const Incoming& incoming, const int32_t* positions,
                                       device::BulkPipe& pipe) {
    const Pieces pieces(params.rows.row_bytes);
    const int64_t first_token = incoming.chunk * kChunkTokens;
    uint32_t to_load = incoming.mask, to_store = incoming.mask;
    int load_piece = 0, store_piece = 0;
    while (to_store != 0) {
        while (to_load != 0 && !pipe.is_full()) {
            const int idx = __ffs(to_load) - 1;
            const std::byte* row =
                incoming.own ? params.x + (first_token + idx) * pieces.row_bytes : incoming.group.rows.row(idx);
            pipe.load(row + pieces.offset(load_piece), pieces.bytes(load_piece));
            if (++load_piece == pieces.num_pieces) {
                load_piece = 0;
                to_load &= to_load - 1;
            }
        }
        const int idx = __ffs(to_store) - 1;
        const std::byte* stage = pipe.front();
        const Targets targets{params, positions + idx * params.rows.top_k, incoming.row(idx)};
        targets.for_each([&](int64_t row) {
            ptx::bulk_store(params.out + row * pieces.row_bytes + pieces.offset(store_piece), stage,
                            pieces.bytes(store_piece));
        });
        pipe.pop();
        if (++store_piece == pieces.num_pieces) {
            store_piece = 0;
            to_store &= to_store - 1;
        }
    }
}

#endif

// Finds the next group's tokens; waits for it when it comes from a peer. Returns false when it never came.
__device__ inline bool receive_group(const DispatchParams& params, const RecordDims& dims, const PlanTable& table,
                                     uint64_t epoch, int64_t ring_groups, Incoming& incoming) {
    const Link& link = params.link;
    const int64_t chunk = incoming.chunk, slot = chunk % ring_groups;
    int32_t* told = params.rows.groups + (incoming.source * params.rows.max_chunks + chunk) * 2;
    if (!incoming.own) {
        if (!device::wait_for_group(link, epoch, incoming.source, slot, chunk / ring_groups)) return false;
        incoming.group = device::group_at(link, dims, link.rank, incoming.source, slot);
    }
    if (!params.with_plan) {
        incoming.first = told[0];
        incoming.mask = static_cast<uint32_t>(told[1]);
        return true;
    }
    if (incoming.own) {
        const device::ChunkPart part = device::read_chunk(params.rows, link.num_ranks, chunk);
        incoming.mask = __shfl_sync(kAllLanes, part.mask, link.rank);
        incoming.first = __shfl_sync(kAllLanes, part.first, link.rank);
    } else {
        const uint4 header = ptx::load_arena(reinterpret_cast<const uint4*>(incoming.group.header));
        incoming.first = static_cast<int32_t>(header.x);
        incoming.mask = header.y;
    }
    incoming.first += table.source_rows[incoming.source];
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) {
        told[0] = incoming.first;
        told[1] = static_cast<int32_t>(incoming.mask);
    }
    if (params.out_source != nullptr && lane < kChunkTokens && (incoming.mask >> lane & 1) != 0) {
        params.out_source[incoming.row(lane)] = static_cast<int32_t>(chunk * kChunkTokens + lane);
    }
    return true;
}

// Walks the groups of all sources in the order in which they are sent, and places their rows.
template <bool kBulk, class From, class Pipe>
__device__ inline void place_rows(const DispatchParams& params, const WarpShared& shared, Pipe* pipe) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const PlanTable table(params.rows.table, link.num_ranks, params.rows.num_experts);
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims);
    const uint64_t epoch = link.state->epoch;
    const int lane = threadIdx.x % kWarpSize;
    device::Tickets tickets(link);
    const int64_t num_items = device::most_chunks(params.rows, table, link.num_ranks) * link.num_ranks;
    for (int64_t item = tickets.take(); item < num_items; item = tickets.take()) {
        const int source = static_cast<int>((item + link.rank) % link.num_ranks);
        const int64_t chunk = item / link.num_ranks, total = num_chunks(table.source_tokens[source]);
        if (chunk >= total) continue;
        Incoming incoming{source, chunk, source == link.rank, 0, 0, GroupLayout(nullptr, dims)};
        if (!receive_group(params, dims, table, epoch, ring_groups, incoming)) return;
        place_choices(params, incoming, table, shared.positions);
        __syncwarp();
        if (params.scale_words > 0 && params.out_scales != nullptr) {
            for (uint32_t left = incoming.mask; left != 0; left &= left - 1) {
                const int idx = __ffs(left) - 1;
                place_scales(params, incoming, idx,
                             {params, shared.positions + idx * params.rows.top_k, incoming.row(idx)});
            }
        }
        if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
            if (lane == 0) {
                // Rows that were acquired through a flag are read by the copy engine.
                ptx::fence_proxy_async_global();
                place_rows_bulk(params, incoming, shared.positions, *pipe);
            }
#endif
        } else {
            for (uint32_t left = incoming.mask; left != 0; left &= left - 1) {
                const int idx = __ffs(left) - 1;
                place_row<From>(params, incoming, idx,
                                {params, shared.positions + idx * params.rows.top_k, incoming.row(idx)});
            }
        }
        __syncwarp();
        if (lane == 0 && !incoming.own) {
            device::release_group(link, epoch, source, chunk, total, ring_groups);
        }
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
