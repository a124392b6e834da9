#pragma once

#include <cstdint>

#include "device/groups.cuh"
#include "device/pipe.cuh"
#include "kernels/exchange.h"

// What both roles of a dispatch share: a warp's shared memory, where rows go, and what travels beside them.
namespace moe_ep::dispatch {

using device::Cut;
using device::kAllLanes;
using device::kWarpSize;
using device::Pieces;
using device::Worker;

constexpr int kVectorWarps = 16;
constexpr int kWantedUnits = 128;

struct NoCast {};

// Shared memory of one warp.
struct WarpShared {
    std::byte* stages;    // of the pipe
    uint64_t* barriers;   // of the pipe
    std::byte** targets;  // [kChunkTokens][kMaxNodeRanks] where each row of the current chunk goes at each rank
    int32_t* positions;   // [kChunkTokens][max(K, 1)] layout rows of the current group
    int64_t num_bytes;

    // `stage_bytes`: of the pipe's stages; 0 without a pipe.
    MOE_EP_HOST_DEVICE WarpShared(void* base, int stage_bytes, int top_k) {
        Cursor cursor(base);
        stages = cursor.take<std::byte>(device::kPipeStages * stage_bytes);
        barriers = cursor.take<uint64_t>(stage_bytes > 0 ? device::kPipeStages : 0, alignof(uint64_t));
        targets = cursor.take<std::byte*>(kChunkTokens * kMaxNodeRanks, alignof(std::byte*));
        positions = cursor.take<int32_t>(kChunkTokens * (top_k > 0 ? top_k : 1), alignof(int32_t));
        num_bytes = cursor.num_bytes();
    }

    __device__ std::byte*& target(int idx, int rank) const { return targets[idx * kMaxNodeRanks + rank]; }
};

// Where the groups of an exchange lie in every arena, and how its rows come there: in their groups, which are read and
// used again, or, in launches that may lend and where all of it fits, directly to the layout rows that they stay in.
// The same on all ranks.
template <bool kLends>
class Route {
public:
    __device__ Route(const DispatchParams& params, const PlanTable& table)
        : link_(params.link),
          dims_{params.rows.row_bytes, params.rows.meta_words},
          ring_groups_(num_ring_groups(params.link.payload_bytes, dims_)) {
        if constexpr (!kLends) return;
        num_direct_ = params.direct_groups;
        if (num_direct_ == 0) {
            num_direct_ = num_chunks(*table.most_tokens);
            direct_ = fits_directly(link_.num_ranks, link_.payload_bytes, num_direct_, dims_, *table.most_rows);
        } else {
            direct_ = true;
        }
        // Nobody asks for places where no rank has tokens.
        if (direct_) ring_groups_ = num_direct_ == 0 ? 1 : num_direct_;
    }

    __device__ bool is_direct() const { return kLends && direct_; }
    // Groups of a source that have places of their own.
    __device__ int64_t ring_groups() const { return ring_groups_; }

    // The group that `source` sends to `owner`, in the owner's arena.
    __device__ GroupLayout group(int owner, int source, int64_t slot) const {
        if (!is_direct()) return device::group_at(link_, dims_, owner, source, slot);
        return GroupLayout(direct_layout(owner).groups.from(source).row(slot), DirectLayout::group_dims(dims_));
    }

    // A layout row on a direct route.
    __device__ std::byte* row(int owner, int64_t row) const { return direct_layout(owner).rows.row(row); }

private:
    __device__ DirectLayout direct_layout(int owner) const {
        return DirectLayout(link_.arena(owner).payload.all.ptr, link_.num_ranks, num_direct_, dims_, 0);
    }

    const Link& link_;
    const RecordDims dims_;
    int64_t ring_groups_;
    int64_t num_direct_ = 0;
    bool direct_ = false;
};

// How groups are cut: rows stay whole.
template <class Route>
__device__ inline Cut cut_groups(const Route& route, int64_t most_tokens) {
    return Cut(num_chunks(most_tokens), route.ring_groups(), 0, kWantedUnits);
}

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

// This rank's chunks of some laps, and their units.
struct SentChunks {
    int64_t end, begin_unit, end_unit;

    __device__ SentChunks(const DispatchParams& params, Laps laps, int64_t ring_groups, const Cut& cut) {
        const int64_t total = num_chunks(params.rows.num_tokens);
        end = laps == Laps::kFirst ? min(ring_groups, total) : total;
        begin_unit = (laps == Laps::kLater ? min(ring_groups, total) : 0) * cut.parts;
        end_unit = end * cut.parts;
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
