#pragma once

#include <cstdint>

#include "kernels/dispatch_common.cuh"

// What a placing warp knows of the groups that it takes, and how it comes by them.
namespace moe_ep::dispatch {

// A group to be placed, or some of its tokens: of a peer in this rank's arena, or of this rank's own tokens.
struct Incoming {
    int source = 0;
    bool own = false;
    int64_t chunk = 0;
    int64_t num_chunks = 0;    // of the source
    int32_t source_first = 0;  // received row that `first` counts from
    int32_t first = 0;         // place of the group's first row
    uint32_t mask = 0;         // of the chunk's tokens that come here
    uint32_t tokens = 0;       // of the chunk's tokens that are to be placed, if they come
    uint32_t moved = 0;        // of those whose rows are moved here
    bool has_first = false;    // whether the first of a row's copies is where it stays
    GroupLayout group{nullptr, RecordDims{}};

    __device__ bool has(int idx) const { return (mask & tokens) >> idx & 1; }
    // Received row of token `idx` of the chunk.
    __device__ int64_t row(int idx) const { return source_first + first + __popc(mask & ((1u << idx) - 1)); }
    // Its index at the source.
    __device__ int64_t token(int idx) const { return chunk * kChunkTokens + idx; }
};

// What the plan keeps of a group: first received row, mask of tokens.
__device__ inline int32_t* told_of(const DispatchParams& params, const Incoming& incoming) {
    return params.rows.groups + (incoming.source * params.rows.max_chunks + incoming.chunk) * 2;
}

// One choice of a received token.
struct Choice {
    int32_t expert;  // local id, -1 = another rank's
    int32_t place;   // among its source's choices of that expert, where it is this rank's
};

__device__ inline Choice load_choice(const DispatchParams& params, const Incoming& incoming, int idx, int k) {
    const MetaLayout meta(params);
    if (!incoming.own) {
        const int32_t* words = incoming.group.meta.row(idx);
        return {ptx::load_arena(words + meta.id(k)), ptx::load_arena(words + meta.place(k))};
    }
    const int local = params.rows.num_experts / params.link.num_ranks;
    const int64_t choice = incoming.token(idx) * params.rows.top_k + k;
    const int32_t place = params.idx_in_expert[choice];
    const int expert = load_expert(params, choice) - params.link.rank * local;
    return {expert >= 0 && expert < local ? expert : -1, place};
}

__device__ inline int32_t load_weight(const DispatchParams& params, const Incoming& incoming, int idx, int k,
                                      int word) {
    if (!incoming.own) return ptx::load_arena(incoming.group.meta.row(idx) + MetaLayout(params).weight(k, word));
    const int64_t choice = incoming.token(idx) * params.rows.top_k + k;
    return params.topk_weights[choice * params.weight_words + word];
}

// One pair of token and choice of a group in each lane, of its first 32, asked for before the group's turn. Pairs of
// tokens that did not come are loaded as well, and not used: which ones came may not be known yet.
struct PairAhead {
    Choice choice{-1, 0};
    int32_t weight = 0;
    int32_t position = -1;  // of a replayed plan

    __device__ void ask(const DispatchParams& params, const Incoming& incoming) {
        const int lane = threadIdx.x % kWarpSize, top_k = params.rows.top_k;
        if (lane >= kChunkTokens * top_k) return;
        const int idx = lane / top_k, k = lane % top_k;
        if (!params.with_plan) {
            if (params.layout == Layout::kCompact || !incoming.has(idx)) return;
            position = params.rows.positions[incoming.row(idx) * top_k + k];
            return;
        }
        if (incoming.own && incoming.token(idx) >= params.rows.num_tokens) return;
        if (params.weight_words == 1) weight = load_weight(params, incoming, idx, k, 0);
        choice = load_choice(params, incoming, idx, k);
    }
};

// Hands a warp the groups of all sources in the order in which they are sent. All members but release are called by the
// whole warp.
template <class Route>
class GroupWalk {
public:
    __device__ GroupWalk(const DispatchParams& params, const Route& route, uint64_t epoch)
        : params_(params),
          route_(route),
          epoch_(epoch),
          tickets_(params.link, epoch),
          cut_(cut_groups(route, *table_of(params).most_tokens)) {
        tickets_.ask();
        const int lane = threadIdx.x % kWarpSize, num_ranks = params.link.num_ranks;
        const PlanTable table = table_of(params);
        num_items_ = device::most_chunks(params.rows, table, num_ranks) * num_ranks * cut_.parts;
        if (lane >= num_ranks) return;
        source_tokens_ = table.source_tokens[lane];
        source_first_ = table.source_rows[lane];
    }

    // Receives the next group, which stays the next one until ask_next; with `wait`, waits for it when it comes from a
    // peer. Returns false when there is none, it never came or, without `wait`, is not there yet.
    __device__ bool receive(bool wait, Incoming& incoming, PairAhead& pairs) {
        if (!find(incoming)) return false;
        if (!params_.with_plan) {
            const int32_t* told = told_of(params_, incoming);
            incoming.source_first = 0;
            incoming.first = told[0];
            incoming.mask = static_cast<uint32_t>(told[1]);
        }
        if (!incoming.own) {
            const Link& link = params_.link;
            const int64_t ring_groups = route_.ring_groups(), ring_units = ring_groups * cut_.parts;
            const int64_t flag = unit_ % ring_units, lap = unit_ / ring_units;
            const bool came = wait ? device::wait_for_group(link, epoch_, incoming.source, flag, lap)
                                   : device::has_group(link, epoch_, incoming.source, flag, lap);
            if (!came) return false;
            incoming.group = route_.group(link.rank, incoming.source, incoming.chunk % ring_groups);
        }
        if (!params_.with_plan) {
            pairs.ask(params_, incoming);
        } else {
            read_tokens(incoming, pairs);
        }
        // Compact rows are all where they stay, this rank's own too; of others the choices tell which have more copies.
        const bool stays = route_.is_direct() && (!incoming.own || params_.layout == Layout::kCompact);
        incoming.has_first = stays;
        incoming.moved = stays ? 0 : incoming.mask & incoming.tokens;
        return true;
    }

    // Takes the received group; asks for the next one's ticket meanwhile.
    __device__ void ask_next() { tickets_.ask(); }

    // After all reads of a group. Called by one thread.
    __device__ void release(const Incoming& incoming) const {
        if (incoming.own) return;
        device::release_group(params_.link, epoch_, incoming.source, incoming.chunk, incoming.num_chunks,
                              route_.ring_groups());
    }

private:
    __device__ static PlanTable table_of(const DispatchParams& params) {
        return PlanTable(params.rows.table, params.link.num_ranks, params.rows.num_experts);
    }

    // Finds whose group is next. Returns false behind the last one.
    __device__ bool find(Incoming& incoming) {
        const Link& link = params_.link;
        for (;; tickets_.ask()) {
            const int64_t item = tickets_.get();
            if (item >= num_items_) return false;
            incoming.source = static_cast<int>((item + link.rank) % link.num_ranks);
            incoming.own = incoming.source == link.rank;
            unit_ = item / link.num_ranks;
            incoming.chunk = unit_ / cut_.parts;
            incoming.tokens = cut_.tokens(static_cast<int>(unit_ % cut_.parts));
            incoming.num_chunks = num_chunks(__shfl_sync(kAllLanes, source_tokens_, incoming.source));
            if (incoming.chunk < incoming.num_chunks) return true;
        }
    }

    // Asks for all that is known of a new group's tokens. What lies in the arena is on its way on return.
    __device__ void read_tokens(Incoming& incoming, PairAhead& pairs) const {
        incoming.source_first = __shfl_sync(kAllLanes, source_first_, incoming.source);
        if (!incoming.own) {
            incoming.first = ptx::load_arena(incoming.group.header);
            incoming.mask = static_cast<uint32_t>(ptx::load_arena(incoming.group.header + 1));
            pairs.ask(params_, incoming);
            return;
        }
        const int lane = threadIdx.x % kWarpSize, rank = params_.link.rank;
        const int64_t token = incoming.token(lane);
        const bool in_range = lane < kChunkTokens && token < params_.rows.num_tokens;
        const int32_t place = in_range ? params_.rows.idx_in_rank[token * params_.link.num_ranks + rank] : -1;
        pairs.ask(params_, incoming);
        incoming.mask = __ballot_sync(kAllLanes, place >= 0);
        const int32_t first = __shfl_sync(kAllLanes, place, incoming.mask == 0 ? 0 : __ffs(incoming.mask) - 1);
        incoming.first = incoming.mask == 0 ? 0 : first;
    }

    const DispatchParams& params_;
    const Route& route_;
    const uint64_t epoch_;
    device::Tickets tickets_;
    const Cut cut_;
    int64_t num_items_;
    int64_t unit_ = 0;
    int32_t source_tokens_ = 0, source_first_ = 0;  // of the source that the lane is number of
};

}  // namespace moe_ep::dispatch
