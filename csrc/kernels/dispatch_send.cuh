#pragma once

#include <cstdint>
#include <type_traits>

#include "device/rows.cuh"
#include "kernels/dispatch_common.cuh"

// The sending half of a dispatch: this rank's chunks of tokens go into the rings of the ranks that they chose.
namespace moe_ep::dispatch {

// One choice of each lane's token, asked for long before it is needed: of a chunk's first 32 pairs of token and choice.
struct ChoiceAhead {
    int expert = -1;
    int32_t place = 0, weight = 0;

    __device__ void ask(const DispatchParams& params, int64_t chunk, int64_t end) {
        if (!params.with_plan || chunk >= end) return;
        const int lane = threadIdx.x % kWarpSize, top_k = params.rows.top_k;
        const int64_t choice = chunk * kChunkTokens * top_k + lane;
        if (lane >= kChunkTokens * top_k || choice >= params.rows.num_tokens * top_k) return;
        expert = load_expert(params, choice);
        place = params.idx_in_expert[choice];
        if (params.weight_words == 1) weight = params.topk_weights[choice];
    }
};

// Finds where the rows of a chunk go at each rank: into the group or, on a direct route, to the layout row of the
// token's first choice there. All members are called by a whole warp.
template <class Route>
class Aim {
public:
    __device__ Aim(const DispatchParams& params, const Route& route, const WarpShared& shared)
        : params_(params),
          route_(route),
          shared_(shared),
          table_(params.rows.table, params.link.num_ranks, params.rows.num_experts) {
        const int lane = threadIdx.x % kWarpSize, rank = params.link.rank, num_ranks = params.link.num_ranks;
        if (!sends_own() || rank == 0 || lane >= num_ranks) return;
        rows_before_ = table_.rank_rows[(rank - 1) * num_ranks + lane];
    }

    // Whether this rank's own rows are sent as well: compact ones need not be moved again.
    __device__ bool sends_own() const { return route_.is_direct() && params_.layout == Layout::kCompact; }

    __device__ void at(int peer, const GroupLayout& group, int64_t chunk, device::ChunkPart part,
                       const ChoiceAhead& ahead) const {
        const int lane = threadIdx.x % kWarpSize;
        if (!route_.is_direct()) {
            if (lane < kChunkTokens) shared_.target(lane, peer) = group.rows.row(lane);
        } else if (params_.layout == Layout::kCompact) {
            const int64_t first = __shfl_sync(kAllLanes, rows_before_, peer) + part.first;
            if (lane < kChunkTokens) {
                shared_.target(lane, peer) = route_.row(peer, first + __popc(part.mask & ((1u << lane) - 1)));
            }
        } else {
            aim_at_first_choices(peer, chunk, part, ahead);
        }
    }

private:
    __device__ void aim_at_first_choices(int peer, int64_t chunk, device::ChunkPart part,
                                         const ChoiceAhead& ahead) const {
        const int lane = threadIdx.x % kWarpSize, top_k = params_.rows.top_k;
        const int local = params_.rows.num_experts / params_.link.num_ranks, num_pairs = kChunkTokens * top_k;
        uint32_t found = 0;  // bit i: of token i, among the pairs before
        for (int begin = 0; begin < num_pairs; begin += kWarpSize) {
            const int pair = begin + lane, idx = pair / top_k;
            const int64_t choice = chunk * kChunkTokens * top_k + pair;
            const bool known = begin == 0, in_range = pair < num_pairs && (part.mask >> idx & 1) != 0;
            const int expert = !in_range ? -1 : known ? ahead.expert : load_expert(params_, choice);
            const bool chosen = expert >= peer * local && expert < (peer + 1) * local;
            const int first_lane = max(idx * top_k - begin, 0);
            const uint32_t before = __ballot_sync(kAllLanes, chosen) & ptx::lanes_below();
            if (chosen && before >> first_lane == 0 && (found >> idx & 1) == 0) {
                const int32_t place = known ? ahead.place : params_.idx_in_expert[choice];
                shared_.target(idx, peer) = route_.row(peer, table_.direct_rows[expert] + place);
            }
            found |= __reduce_or_sync(kAllLanes, chosen ? 1u << idx : 0u);
        }
    }

    const DispatchParams& params_;
    const Route& route_;
    const WarpShared& shared_;
    const PlanTable table_;
    int32_t rows_before_ = 0;  // of earlier sources, at the rank that the lane is number of
};

// Stores what travels beside the rows of some tokens of a chunk, a bit each, to one rank. Called by a whole warp.
__device__ inline void send_meta(const DispatchParams& params, const GroupLayout& group, int64_t chunk, int peer,
                                 device::ChunkPart part, uint32_t tokens, const ChoiceAhead& ahead) {
    const int lane = threadIdx.x % kWarpSize, top_k = params.rows.top_k;
    const int local = params.rows.num_experts / params.link.num_ranks;
    const MetaLayout meta(params);
    tokens &= part.mask;
    if (lane == 0 && params.with_plan) {
        group.header[0] = part.first;
        group.header[1] = static_cast<int32_t>(part.mask);
    }
    for (int pair = lane; params.with_plan && pair < kChunkTokens * top_k; pair += kWarpSize) {
        const int idx = pair / top_k, k = pair % top_k;
        if ((tokens >> idx & 1) == 0) continue;
        const int64_t choice = chunk * kChunkTokens * top_k + pair;
        const bool known = pair < kWarpSize;
        const int expert = (known ? ahead.expert : load_expert(params, choice)) - peer * local;
        const bool chosen = expert >= 0 && expert < local;
        int32_t* words = group.meta.row(idx);
        words[meta.id(k)] = chosen ? expert : -1;
        words[meta.place(k)] = !chosen ? 0 : known ? ahead.place : params.idx_in_expert[choice];
        if (known && params.weight_words == 1) {
            words[meta.weight(k, 0)] = chosen ? ahead.weight : 0;
            continue;
        }
        for (int word = 0; word < params.weight_words; ++word) {
            words[meta.weight(k, word)] = chosen ? params.topk_weights[choice * params.weight_words + word] : 0;
        }
    }
    // With a cast the scales come with the rows.
    if (params.scales == nullptr) return;
    for (int pair = lane; pair < kChunkTokens * params.scale_words; pair += kWarpSize) {
        const int idx = pair / params.scale_words, word = pair % params.scale_words;
        if ((tokens >> idx & 1) == 0) continue;
        group.meta.row(idx)[meta.scale(word)] = load_scale(params, chunk * kChunkTokens + idx, word);
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Walks the pieces of a worker's rows that leave this rank, in order. A unit is one or more of a chunk's tokens.
class SendCursor {
public:
    __device__ SendCursor(const RowParams& rows, uint32_t peers, int64_t first, int64_t end, int64_t stride,
                          int unit_tokens, const Pieces& pieces)
        : rows_(rows),
          peers_(peers),
          end_(end),
          stride_(stride),
          unit_tokens_(unit_tokens),
          pieces_(pieces),
          unit_(first),
          idx_(-1) {
        find_token();
    }

    __device__ bool is_done() const { return unit_ >= end_; }
    __device__ int64_t unit() const { return unit_; }
    __device__ int64_t token() const { return unit_ * unit_tokens_ + idx_; }
    __device__ int idx_in_chunk() const { return static_cast<int>(token() % kChunkTokens); }
    __device__ int piece() const { return piece_; }
    __device__ uint32_t ranks() const { return ranks_; }

    __device__ void advance() {
        if (++piece_ == pieces_.num_pieces) find_token();
    }

private:
    __device__ void find_token() {
        piece_ = 0;
        for (;;) {
            if (++idx_ == unit_tokens_) {
                idx_ = 0;
                unit_ += stride_;
            }
            if (is_done()) return;
            ranks_ = token() < rows_.num_tokens ? rows_.token_ranks[token()] & peers_ : 0;
            if (ranks_ != 0) return;
        }
    }

    const RowParams& rows_;
    const uint32_t peers_;
    const int64_t end_, stride_;
    const int unit_tokens_;
    const Pieces& pieces_;
    int64_t unit_;
    int idx_, piece_ = 0;
    uint32_t ranks_ = 0;
};

// Units whose stores are under way while those of the next begin: their flags follow once the stores are complete.
struct PendingFlags {
    static constexpr int kPieces = 4;  // of the next unit that are stored before this one is waited for
    int64_t unit = -1;
    int num_pieces = 0;

    __device__ void count_piece(const Link& link, uint64_t epoch, int64_t ring_units) {
        if (unit >= 0 && ++num_pieces == kPieces) {
            ptx::wait_bulk_stores<kPieces>();
            raise(link, epoch, ring_units);
        }
    }
    __device__ void flush(const Link& link, uint64_t epoch, int64_t ring_units) {
        if (unit < 0) return;
        ptx::wait_bulk_stores<0>();
        raise(link, epoch, ring_units);
    }
    __device__ void raise(const Link& link, uint64_t epoch, int64_t ring_units) {
        device::flag_groups(link, epoch, unit % ring_units, unit / ring_units);
        unit = -1;
        num_pieces = 0;
    }
};

// Sends the rows of this warp's chunks through its pipe, those of some laps; loads run ahead of chunks.
template <class Route>
__device__ inline void send_rows_bulk(const DispatchParams& params, const Route& route, uint64_t epoch,
                                      const WarpShared& shared, device::BulkPipe& pipe, Worker worker, Laps laps,
                                      int64_t most_tokens) {
    const Link& link = params.link;
    const int64_t ring_groups = route.ring_groups();
    const Cut cut = cut_groups(route, most_tokens);
    const int64_t ring_units = ring_groups * cut.parts;
    const SentChunks sent_chunks(params, laps, ring_groups, cut);
    const int lane = threadIdx.x % kWarpSize;
    const Aim<Route> aim(params, route, shared);
    const uint32_t peers = aim.sends_own() ? ~0u : ~(1u << link.rank);
    const Pieces pieces(params.rows.row_bytes, params.stage_bytes);
    const int64_t first = sent_chunks.begin_unit + worker.first, end = sent_chunks.end_unit;
    SendCursor load(params.rows, peers, first, end, worker.stride, cut.part_tokens(), pieces), store = load;
    PendingFlags pending;
    device::ChunkAhead places(params.rows, link.num_ranks);
    ChoiceAhead choices;
    places.ask(first / cut.parts, sent_chunks.end);
    choices.ask(params, first / cut.parts, sent_chunks.end);
    bool good = true;
    for (int64_t unit = first; unit < end && good; unit += worker.stride) {
        const int64_t chunk = unit / cut.parts, slot = chunk % ring_groups, lap = chunk / ring_groups;
        if (!device::has_room(link, epoch, slot, lap)) {
            // NOTE: a peer may wait for the flags that are still pending before it makes room.
            if (lane == 0) pending.flush(link, epoch, ring_units);
            good = device::wait_for_room(link, epoch, slot, lap);
            if (!good) break;
        }
        if (lane == 0 && device::has_fault(link, Fault::kEarlyFlag)) {
            device::flag_groups(link, epoch, unit % ring_units, unit / ring_units);
            device::delay_fault();
        }
        const device::ChunkPart part = places.get(chunk);
        const uint32_t tokens = cut.tokens(static_cast<int>(unit % cut.parts));
        for (int peer = 0; peer < link.num_ranks; ++peer) {
            if (peer == link.rank && !aim.sends_own()) continue;
            const GroupLayout group = route.group(peer, link.rank, device::sent_slot(link, slot, ring_groups));
            const device::ChunkPart sent{__shfl_sync(kAllLanes, part.mask, peer),
                                         __shfl_sync(kAllLanes, part.first, peer)};
            aim.at(peer, group, chunk, sent, choices);
            if (peer != link.rank) send_meta(params, group, chunk, peer, sent, tokens, choices);
        }
        places.ask((unit + worker.stride) / cut.parts, sent_chunks.end);
        choices.ask(params, (unit + worker.stride) / cut.parts, sent_chunks.end);
        __syncwarp();
        if (lane == 0) {
            // A place that a peer has freed is written by the copy engine; on the first lap there was nothing to wait
            // for.
            ptx::fence_proxy_async_global();
            while (!store.is_done() && store.unit() == unit) {
                while (!load.is_done() && !pipe.is_full()) {
                    pipe.load(params.x + load.token() * pieces.row_bytes + pieces.offset(load.piece()),
                              pieces.bytes(load.piece()));
                    load.advance();
                }
                const std::byte* stage = pipe.front();
                const int64_t offset = pieces.offset(store.piece());
                const bool skipped = device::has_fault(link, Fault::kSkippedRow) && store.idx_in_chunk() == 0;
                for (uint32_t left = skipped ? 0 : store.ranks(); left != 0; left &= left - 1) {
                    ptx::bulk_store(shared.target(store.idx_in_chunk(), __ffs(left) - 1) + offset, stage,
                                    pieces.bytes(store.piece()));
                }
                pipe.pop();
                pending.count_piece(link, epoch, ring_units);
                store.advance();
            }
            pending.flush(link, epoch, ring_units);
            pending.unit = unit;
        }
        __syncwarp();
    }
    if (lane != 0) return;
    if (good) pending.flush(link, epoch, ring_units);
    // Nothing may be under way in shared memory when the block ends.
    while (!pipe.is_empty()) {
        pipe.front();
        pipe.pop();
    }
    ptx::wait_bulk_stores<0>();
}

#endif

// Sends the rows of this warp's chunks by vector loads and stores, cast to fp8 where asked for.
template <class From, class Route>
__device__ inline void send_rows(const DispatchParams& params, const Route& route, uint64_t epoch,
                                 const WarpShared& shared, Worker worker, Laps laps, int64_t most_tokens) {
    const Link& link = params.link;
    const int64_t row_bytes = params.rows.row_bytes, ring_groups = route.ring_groups();
    const Aim<Route> aim(params, route, shared);
    const uint32_t peers = aim.sends_own() ? ~0u : ~(1u << link.rank);
    const Cut cut = cut_groups(route, most_tokens);
    const int64_t ring_units = ring_groups * cut.parts;
    const SentChunks sent_chunks(params, laps, ring_groups, cut);
    for (int64_t unit = sent_chunks.begin_unit + worker.first; unit < sent_chunks.end_unit; unit += worker.stride) {
        const int64_t chunk = unit / cut.parts, slot = chunk % ring_groups, lap = chunk / ring_groups;
        const uint32_t tokens = cut.tokens(static_cast<int>(unit % cut.parts));
        if (!device::wait_for_room(link, epoch, slot, lap)) return;
        const device::ChunkPart part = device::read_chunk(params.rows, link.num_ranks, chunk);
        ChoiceAhead choices;
        choices.ask(params, chunk, sent_chunks.end);
        for (int peer = 0; peer < link.num_ranks; ++peer) {
            const device::ChunkPart sent{__shfl_sync(kAllLanes, part.mask, peer),
                                         __shfl_sync(kAllLanes, part.first, peer)};
            if (peer == link.rank && !aim.sends_own()) continue;
            const GroupLayout group = route.group(peer, link.rank, slot);
            aim.at(peer, group, chunk, sent, choices);
            if (peer != link.rank) send_meta(params, group, chunk, peer, sent, tokens, choices);
        }
        __syncwarp();
        for (int idx = 0; idx < kChunkTokens; ++idx) {
            const int64_t token = chunk * kChunkTokens + idx;
            if (token >= params.rows.num_tokens) break;
            if ((tokens >> idx & 1) == 0) continue;
            const uint32_t ranks = params.rows.token_ranks[token] & peers;
            if (ranks == 0) continue;
            const auto nth_rank = [&](int which) {
                uint32_t left = ranks;
                for (; which > 0; --which) left &= left - 1;
                return __ffs(left) - 1;
            };
            const int num_targets = __popc(ranks);
            if constexpr (std::is_same_v<From, NoCast>) {
                device::copy_row(params.x + token * row_bytes, row_bytes, num_targets, false,
                                 [&](int which) { return shared.target(idx, nth_rank(which)); });
            } else {
                const MetaLayout meta(params);
                const std::byte* source = params.x + token * row_bytes * static_cast<int64_t>(sizeof(From));
                device::cast_row<From>(source, row_bytes, [&](int64_t vector, uint64_t bytes, float scale) {
                    constexpr int kCount = device::ElementsOf<From>::kCount;
                    const int64_t element = vector * kCount;
                    for (int which = 0; which < num_targets; ++which) {
                        const GroupLayout group = route.group(nth_rank(which), link.rank, slot);
                        std::byte* row = group.rows.row(idx) + element;
                        if constexpr (kCount == 8) {
                            *reinterpret_cast<uint64_t*>(row) = bytes;
                        } else {
                            *reinterpret_cast<uint32_t*>(row) = static_cast<uint32_t>(bytes);
                        }
                        if (element % device::kFp8Group == 0) {
                            group.meta.row(idx)[meta.scale(static_cast<int>(element / device::kFp8Group))] =
                                __float_as_int(scale);
                        }
                    }
                });
            }
        }
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) device::flag_groups(link, epoch, unit % ring_units, unit / ring_units);
    }
}

}  // namespace moe_ep::dispatch
