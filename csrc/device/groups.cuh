#pragma once

#include <cstdint>

#include "device/faults.cuh"
#include "device/link.cuh"

// Groups of rows: which tokens of a chunk go where, and the places of their rows.
namespace moe_ep::device {

inline constexpr uint32_t kChunkMask = (1u << kChunkTokens) - 1;

// A role's warp among all warps of that role.
struct Worker {
    int64_t first, stride;
};

// How groups are cut where there are few of them, so that all warps have a part: into tokens, and rows into slices of
// equal width. Every unit is sent and flagged on its own. The same on all ranks.
struct Cut {
    static constexpr int kMaxUnits = 16;    // of a group
    static constexpr int kMinVectors = 64;  // of a slice

    int parts = 1, slices = 1;

    // `num_vectors`: of a row; 0 where rows stay whole. `wanted_in_laps`: units of a whole ring, 0 for whole groups.
    __device__ Cut(int64_t num_groups, int64_t ring_groups, int64_t num_vectors, int wanted_units,
                   int wanted_in_laps = 0) {
        if (num_groups > ring_groups) {
            num_groups = ring_groups;
            wanted_units = wanted_in_laps;
        }
        const int64_t most = min(static_cast<int64_t>(kMaxUnits), kMaxRingGroups / max(num_groups, int64_t{1}));
        while (num_groups * parts < wanted_units && parts < kChunkTokens && 2 * parts <= most) parts *= 2;
        while (num_groups * units() < wanted_units && 2 * units() <= most && num_vectors % (2 * slices) == 0 &&
               num_vectors >= 2 * slices * kMinVectors) {
            slices *= 2;
        }
    }

    __device__ int units() const { return parts * slices; }
    __device__ int part_tokens() const { return kChunkTokens / parts; }
    // The tokens of a chunk that a unit has, a bit each.
    __device__ uint32_t tokens(int unit) const {
        return ((1u << part_tokens()) - 1) << (unit / slices * part_tokens());
    }
    __device__ int slice(int unit) const { return unit % slices; }
};

// Hands out pieces of the current exchange's work on this GPU, each to one warp, in order; opening an exchange starts
// anew. What is done with a piece depends on its number alone, so that it does not matter to the bits who takes it. A
// warp may ask for its next piece before it works on one: pieces that it holds wait for none that come later.
class Tickets {
public:
    __device__ Tickets(const Link& link, uint64_t epoch) : counter_(link.state->tickets_of(epoch)) {}

    // The piece that was asked for last. Called by a whole warp.
    __device__ int64_t get() const { return __shfl_sync(kAllLanes, next_, 0); }

    __device__ void ask() {
        if (threadIdx.x % kWarpSize == 0) next_ = atomicAdd(counter_, 1u);
    }

private:
    uint32_t* counter_;
    uint32_t next_ = 0;
};

// What a chunk of this rank's tokens sends to one rank: bit i for its token i, and the first row's place there.
struct ChunkPart {
    uint32_t mask;
    int32_t first;
};

// Lane r returns what the chunk sends to rank r. Called by a whole warp.
__device__ inline ChunkPart read_chunk(const RowParams& rows, int num_ranks, int64_t chunk) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t token = chunk * kChunkTokens + lane;
    const bool in_range = lane < kChunkTokens && token < rows.num_tokens;
    ChunkPart part{0, 0};
    for (int rank = 0; rank < num_ranks; ++rank) {
        const int32_t place = in_range ? rows.idx_in_rank[token * num_ranks + rank] : -1;
        const uint32_t mask = __ballot_sync(kAllLanes, place >= 0);
        const int32_t first = __shfl_sync(kAllLanes, place, mask == 0 ? 0 : __ffs(mask) - 1);
        if (lane == rank) part = {mask, mask == 0 ? 0 : first};
    }
    return part;
}

// The places of one chunk's tokens at all ranks, asked for long before they are needed. With more than eight ranks they
// are read when they are.
class ChunkAhead {
public:
    __device__ ChunkAhead(const RowParams& rows, int num_ranks) : rows_(rows), num_ranks_(num_ranks) {}

    // Called by a whole warp; `end`: chunks from there on are not read.
    __device__ void ask(int64_t chunk, int64_t end) {
        if (!fits() || chunk >= end) return;
        const int64_t first = chunk * kChunkTokens * num_ranks_;
        const int lane = threadIdx.x % kWarpSize;
        const bool in_range = lane < kChunkTokens * num_ranks_ && first + lane < rows_.num_tokens * num_ranks_;
        place_ = in_range ? rows_.idx_in_rank[first + lane] : -1;
    }

    // What read_chunk returns for the chunk that was asked for.
    __device__ ChunkPart get(int64_t chunk) const {
        if (!fits()) return read_chunk(rows_, num_ranks_, chunk);
        const uint32_t pairs = __ballot_sync(kAllLanes, place_ >= 0);
        const int rank = static_cast<int>(threadIdx.x % kWarpSize);
        uint32_t mask = 0;
        for (int idx = 0; idx < kChunkTokens && rank < num_ranks_; ++idx) {
            mask |= (pairs >> (idx * num_ranks_ + rank) & 1) << idx;
        }
        const int holder = mask == 0 ? 0 : (__ffs(mask) - 1) * num_ranks_ + rank;
        const int32_t first = __shfl_sync(kAllLanes, place_, holder);
        return {mask, mask == 0 ? 0 : first};
    }

private:
    __device__ bool fits() const { return kChunkTokens * num_ranks_ <= kWarpSize; }

    const RowParams& rows_;
    const int num_ranks_;
    int32_t place_ = -1;
};

// Chunks of the rank that has most, as far as the plan has room for them. Called by a whole warp.
__device__ inline int64_t most_chunks(const RowParams& rows, const PlanTable& table, int num_ranks) {
    const int lane = threadIdx.x % kWarpSize;
    int32_t most = lane < num_ranks ? table.source_tokens[lane] : 0;
    for (int step = kWarpSize / 2; step > 0; step /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    return min(num_chunks(most), rows.max_chunks);
}

// The group that `source` sends to `owner` for one chunk, in the owner's arena.
__device__ inline GroupLayout group_at(const Link& link, const RecordDims& dims, int owner, int source, int64_t slot) {
    std::byte* ring = link.arena(owner).payload.from(source).ptr;
    return GroupLayout(ring + slot * GroupLayout(nullptr, dims).num_bytes, dims);
}

__device__ __forceinline__ uint64_t* arrived_flag(const Link& link, int owner, int source, int64_t slot) {
    return link.arena(owner).arrived.from(source).ptr + slot;
}

// The flag in `source`'s arena by which `owner` says that it has read a group.
__device__ __forceinline__ uint64_t* consumed_flag(const Link& link, int owner, int source, int64_t slot) {
    return link.arena(source).consumed.from(owner).ptr + slot;
}

// What follows orders the other lanes behind the one that has acquired a flag; votes and shuffles alone do not.

// Lane r waits until rank r has read what lay in the ring where this chunk's group goes. Called by a whole warp;
// returns whether all have.
__device__ inline bool wait_for_room(const Link& link, uint64_t epoch, int64_t slot, int64_t lap) {
    if (has_fault(link, Fault::kSkippedRoom)) return true;
    if (lap == 0) return true;  // opening the exchange was the wait: peers have left the one before
    const int lane = threadIdx.x % kWarpSize;
    bool good = true;
    if (lane < link.num_ranks && lane != link.rank) {
        good =
            wait_for(link, consumed_flag(link, lane, link.rank, slot), group_stamp(epoch, lap - 1), lane, Phase::kRoom);
    }
    good = __all_sync(kAllLanes, good) != 0;
    __syncwarp();
    return good;
}

// Lane r looks once whether rank r has; otherwise as above.
__device__ inline bool has_room(const Link& link, uint64_t epoch, int64_t slot, int64_t lap) {
    if (has_fault(link, Fault::kSkippedRoom) || lap == 0) return true;
    const int lane = threadIdx.x % kWarpSize;
    bool good = true;
    if (lane < link.num_ranks && lane != link.rank) {
        good = ptx::load_acquire_sys(consumed_flag(link, lane, link.rank, slot)) >= group_stamp(epoch, lap - 1);
    }
    good = __all_sync(kAllLanes, good) != 0;
    __syncwarp();
    return good;
}

// Lane 0 waits for a group of `source`; the whole warp may read it afterwards. Returns whether it came.
__device__ inline bool wait_for_group(const Link& link, uint64_t epoch, int source, int64_t slot, int64_t lap) {
    int good = 1;
    if (threadIdx.x % kWarpSize == 0) {
        good = wait_for(link, arrived_flag(link, link.rank, source, slot), group_stamp(epoch, lap), source,
                        Phase::kArrival);
    }
    if (has_fault(link, Fault::kSkippedRoom)) delay_fault();
    good = __shfl_sync(kAllLanes, good, 0);
    __syncwarp();
    return good != 0;
}

// Lane 0 looks once whether a group of `source` has come; if so, the whole warp may read it afterwards.
__device__ inline bool has_group(const Link& link, uint64_t epoch, int source, int64_t slot, int64_t lap) {
    int came = 0;
    if (threadIdx.x % kWarpSize == 0) {
        came = ptx::load_acquire_sys(arrived_flag(link, link.rank, source, slot)) >= group_stamp(epoch, lap);
    }
    came = __shfl_sync(kAllLanes, came, 0);
    __syncwarp();
    if (came != 0 && has_fault(link, Fault::kSkippedRoom)) delay_fault();
    return came != 0;
}

// Tells `source` that its group, or one of its units, has been read, where a later lap of the ring needs its place.
// Called by one thread after all reads of it.
__device__ inline void release_group(const Link& link, uint64_t epoch, int source, int64_t chunk, int64_t num_chunks,
                                     int64_t ring_groups, int unit = 0, int units = 1) {
    if (chunk + ring_groups >= num_chunks) return;
    const int64_t slot = chunk % ring_groups, lap = chunk / ring_groups;
    ptx::fence_acq_rel_sys();
    ptx::store_relaxed_sys(consumed_flag(link, link.rank, source, slot * units + unit), group_stamp(epoch, lap));
}

// Slot that a sender stores a group into.
__device__ inline int64_t sent_slot(const Link& link, int64_t slot, int64_t ring_groups) {
    return has_fault(link, Fault::kWrongSlot) ? (slot + 1) % ring_groups : slot;
}

// Tells every peer that its group of this chunk is complete. Called by one thread that has observed all stores.
__device__ inline void flag_groups(const Link& link, uint64_t epoch, int64_t slot, int64_t lap) {
    ptx::fence_acq_rel_sys();
    for (int step = 1; step < link.num_ranks; ++step) {
        const int peer = (link.rank + step) % link.num_ranks;
        ptx::store_relaxed_sys(arrived_flag(link, peer, link.rank, slot), group_stamp(epoch, lap));
    }
}

__device__ __forceinline__ void flag_group(const Link& link, uint64_t epoch, int peer, int64_t slot, int64_t lap) {
    ptx::fence_acq_rel_sys();
    ptx::store_relaxed_sys(arrived_flag(link, peer, link.rank, slot), group_stamp(epoch, lap));
}

}  // namespace moe_ep::device
