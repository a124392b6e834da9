#pragma once

#include <cstdint>

#include "device/groups.cuh"
#include "device/pipe.cuh"
#include "kernels/exchange.h"

// What both roles of a dispatch share: a warp's shared memory, and what travels beside the rows.
namespace moe_ep::dispatch {

using device::kAllLanes;
using device::kWarpSize;
using device::Pieces;
using device::Worker;

constexpr int kVectorWarps = 16;

struct NoCast {};

// Shared memory of one warp.
struct WarpShared {
    std::byte* stages;    // of the pipe
    uint64_t* barriers;   // of the pipe
    std::byte** targets;  // [kMaxNodeRanks] rows of the current group at each rank
    int32_t* positions;   // [kChunkTokens][max(K, 1)] layout rows of the current group
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE WarpShared(void* base, bool bulk, int top_k) {
        Cursor cursor(base);
        stages = cursor.take<std::byte>(bulk ? device::kPipeBytes : 0);
        barriers = cursor.take<uint64_t>(bulk ? device::kPipeStages : 0, alignof(uint64_t));
        targets = cursor.take<std::byte*>(kMaxNodeRanks, alignof(std::byte*));
        positions = cursor.take<int32_t>(kChunkTokens * (top_k > 0 ? top_k : 1), alignof(int32_t));
        num_bytes = cursor.num_bytes();
    }
};

// Words that travel with a token: ids, places among the expert's choices, weights, scales.
struct MetaLayout {
    int top_k, weight_words, scale_words;

    // Replayed rows bring nothing but scales: the plan knows the rest.
    __device__ explicit MetaLayout(const DispatchParams& params)
        : top_k(params.with_plan ? params.rows.top_k : 0),
          weight_words(params.with_plan ? params.weight_words : 0),
          scale_words(params.scale_words) {}

    __device__ int id(int choice) const { return choice; }
    __device__ int place(int choice) const { return top_k + choice; }
    __device__ int weight(int choice, int word) const { return 2 * top_k + choice * weight_words + word; }
    __device__ int scale(int word) const { return (2 + weight_words) * top_k + word; }
};

// This rank's chunks that a launch sends.
struct SentChunks {
    int64_t begin, end;

    __device__ SentChunks(const DispatchParams& params, int64_t ring_groups) {
        const int64_t total = num_chunks(params.rows.num_tokens);
        begin = params.laps == Laps::kLater ? min(ring_groups, total) : 0;
        end = params.laps == Laps::kFirst ? min(ring_groups, total) : total;
    }
};

// Returns the expert of one choice of this rank's tokens, -1 for none.
__device__ inline int load_expert(const DispatchParams& params, int64_t choice) {
    const int64_t expert = params.index_bytes == 4 ? static_cast<const int32_t*>(params.topk_idx)[choice]
                                                   : static_cast<const int64_t*>(params.topk_idx)[choice];
    return expert >= 0 && expert < params.rows.num_experts ? static_cast<int>(expert) : -1;
}

__device__ inline int32_t load_scale(const DispatchParams& params, int64_t token, int word) {
    return params.scales[token * params.scale_stride + word * params.scale_word_stride];
}

}  // namespace moe_ep::dispatch
