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

// Stores what travels beside the rows of one chunk to one rank. Called by a whole warp.
__device__ inline void send_meta(const DispatchParams& params, const GroupLayout& group, int64_t chunk, int peer,
                                 device::ChunkPart part, const ChoiceAhead& ahead) {
    const int lane = threadIdx.x % kWarpSize, top_k = params.rows.top_k;
    const int local = params.rows.num_experts / params.link.num_ranks;
    const MetaLayout meta(params);
    if (lane == 0 && params.with_plan) {
        group.header[0] = part.first;
        group.header[1] = static_cast<int32_t>(part.mask);
    }
    for (int pair = lane; params.with_plan && pair < kChunkTokens * top_k; pair += kWarpSize) {
        const int idx = pair / top_k, k = pair % top_k;
        if ((part.mask >> idx & 1) == 0) continue;
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
        if ((part.mask >> idx & 1) == 0) continue;
        group.meta.row(idx)[meta.scale(word)] = load_scale(params, chunk * kChunkTokens + idx, word);
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Walks the pieces of a worker's rows that leave this rank, in order.
class SendCursor {
public:
    __device__ SendCursor(const RowParams& rows, uint32_t peers, int64_t first, int64_t end, int64_t stride,
                          const Pieces& pieces)
        : rows_(rows), peers_(peers), end_(end), stride_(stride), pieces_(pieces), chunk_(first), idx_(-1) {
        find_token();
    }

    __device__ bool is_done() const { return chunk_ >= end_; }
    __device__ int64_t chunk() const { return chunk_; }
    __device__ int idx_in_chunk() const { return idx_; }
    __device__ int64_t token() const { return chunk_ * kChunkTokens + idx_; }
    __device__ int piece() const { return piece_; }
    __device__ uint32_t ranks() const { return ranks_; }

    __device__ void advance() {
        if (++piece_ == pieces_.num_pieces) find_token();
    }

private:
    __device__ void find_token() {
        piece_ = 0;
        for (;;) {
            if (++idx_ == kChunkTokens) {
                idx_ = 0;
                chunk_ += stride_;
            }
            if (is_done()) return;
            ranks_ = token() < rows_.num_tokens ? rows_.token_ranks[token()] & peers_ : 0;
            if (ranks_ != 0) return;
        }
    }

    const RowParams& rows_;
    const uint32_t peers_;
    const int64_t end_, stride_;
    const Pieces& pieces_;
    int64_t chunk_;
    int idx_, piece_ = 0;
    uint32_t ranks_ = 0;
};

// Chunks whose stores are under way while those of the next begin: their flags follow once the stores are complete.
struct PendingFlags {
    static constexpr int kPieces = 4;  // of the next chunk that are stored before this one is waited for
    int64_t chunk = -1;
    int num_pieces = 0;

    __device__ void count_piece(const Link& link, uint64_t epoch, int64_t ring_groups) {
        if (chunk >= 0 && ++num_pieces == kPieces) {
            ptx::wait_bulk_stores<kPieces>();
            raise(link, epoch, ring_groups);
        }
    }
    __device__ void flush(const Link& link, uint64_t epoch, int64_t ring_groups) {
        if (chunk < 0) return;
        ptx::wait_bulk_stores<0>();
        raise(link, epoch, ring_groups);
    }
    __device__ void raise(const Link& link, uint64_t epoch, int64_t ring_groups) {
        device::flag_groups(link, epoch, chunk % ring_groups, chunk / ring_groups);
        chunk = -1;
        num_pieces = 0;
    }
};

// Sends the rows of this warp's chunks through its pipe; loads run ahead of chunks.
__device__ inline void send_rows_bulk(const DispatchParams& params, const WarpShared& shared, device::BulkPipe& pipe,
                                      Worker worker) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims);
    const SentChunks sent_chunks(params, ring_groups);
    const uint64_t epoch = link.state->epoch;
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t peers = ~(1u << link.rank);
    const Pieces pieces(params.rows.row_bytes);
    const int64_t first = sent_chunks.begin + worker.first;
    SendCursor load(params.rows, peers, first, sent_chunks.end, worker.stride, pieces), store = load;
    PendingFlags pending;
    device::ChunkAhead places(params.rows, link.num_ranks);
    ChoiceAhead choices;
    places.ask(first, sent_chunks.end);
    choices.ask(params, first, sent_chunks.end);
    bool good = true;
    for (int64_t chunk = first; chunk < sent_chunks.end && good; chunk += worker.stride) {
        const int64_t slot = chunk % ring_groups, lap = chunk / ring_groups;
        if (!device::has_room(link, epoch, slot, lap)) {
            // NOTE: a peer may wait for the flags that are still pending before it makes room.
            if (lane == 0) pending.flush(link, epoch, ring_groups);
            good = device::wait_for_room(link, epoch, slot, lap);
            if (!good) break;
        }
        if (lane == 0 && device::has_fault(link, Fault::kEarlyFlag)) {
            device::flag_groups(link, epoch, slot, lap);
            device::delay_fault();
        }
        const device::ChunkPart part = places.get(chunk);
        for (int peer = 0; peer < link.num_ranks; ++peer) {
            if (peer == link.rank) continue;
            const GroupLayout group =
                device::group_at(link, dims, peer, link.rank, device::sent_slot(link, slot, ring_groups));
            const device::ChunkPart sent{__shfl_sync(kAllLanes, part.mask, peer),
                                         __shfl_sync(kAllLanes, part.first, peer)};
            if (lane == 0) shared.targets[peer] = group.rows.ptr;
            send_meta(params, group, chunk, peer, sent, choices);
        }
        places.ask(chunk + worker.stride, sent_chunks.end);
        choices.ask(params, chunk + worker.stride, sent_chunks.end);
        __syncwarp();
        if (lane == 0) {
            // A place that a peer has freed is written by the copy engine; on the first lap there was nothing to wait
            // for.
            ptx::fence_proxy_async_global();
            while (!store.is_done() && store.chunk() == chunk) {
                while (!load.is_done() && !pipe.is_full()) {
                    pipe.load(params.x + load.token() * pieces.row_bytes + pieces.offset(load.piece()),
                              pieces.bytes(load.piece()));
                    load.advance();
                }
                const std::byte* stage = pipe.front();
                const int64_t offset = store.idx_in_chunk() * pieces.row_bytes + pieces.offset(store.piece());
                const bool skipped = device::has_fault(link, Fault::kSkippedRow) && store.idx_in_chunk() == 0;
                for (uint32_t left = skipped ? 0 : store.ranks(); left != 0; left &= left - 1) {
                    ptx::bulk_store(shared.targets[__ffs(left) - 1] + offset, stage, pieces.bytes(store.piece()));
                }
                pipe.pop();
                pending.count_piece(link, epoch, ring_groups);
                store.advance();
            }
            pending.flush(link, epoch, ring_groups);
            pending.chunk = chunk;
        }
        __syncwarp();
    }
    if (lane != 0) return;
    if (good) pending.flush(link, epoch, ring_groups);
    // Nothing may be under way in shared memory when the block ends.
    while (!pipe.is_empty()) {
        pipe.front();
        pipe.pop();
    }
    ptx::wait_bulk_stores<0>();
}

#endif

// Sends the rows of this warp's chunks by vector loads and stores, cast to fp8 where asked for.
template <class From>
__device__ inline void send_rows(const DispatchParams& params, Worker worker) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims);
    const SentChunks sent_chunks(params, ring_groups);
    const uint64_t epoch = link.state->epoch;
    for (int64_t chunk = sent_chunks.begin + worker.first; chunk < sent_chunks.end; chunk += worker.stride) {
        const int64_t slot = chunk % ring_groups, lap = chunk / ring_groups;
        if (!device::wait_for_room(link, epoch, slot, lap)) return;
        const device::ChunkPart part = device::read_chunk(params.rows, link.num_ranks, chunk);
        ChoiceAhead choices;
        choices.ask(params, chunk, sent_chunks.end);
        for (int peer = 0; peer < link.num_ranks; ++peer) {
            const device::ChunkPart sent{__shfl_sync(kAllLanes, part.mask, peer),
                                         __shfl_sync(kAllLanes, part.first, peer)};
            if (peer == link.rank) continue;
            send_meta(params, device::group_at(link, dims, peer, link.rank, slot), chunk, peer, sent, choices);
        }
        for (int idx = 0; idx < kChunkTokens; ++idx) {
            const int64_t token = chunk * kChunkTokens + idx;
            if (token >= params.rows.num_tokens) break;
            const uint32_t ranks = params.rows.token_ranks[token] & ~(1u << link.rank);
            if (ranks == 0) continue;
            const auto nth_group = [&](int which) {
                uint32_t left = ranks;
                for (; which > 0; --which) left &= left - 1;
                return device::group_at(link, dims, __ffs(left) - 1, link.rank, slot);
            };
            const int num_targets = __popc(ranks);
            if constexpr (std::is_same_v<From, NoCast>) {
                device::copy_row(params.x + token * dims.row_bytes, dims.row_bytes, num_targets, false,
                                 [&](int which) { return nth_group(which).rows.row(idx); });
            } else {
                const MetaLayout meta(params);
                const std::byte* source = params.x + token * dims.row_bytes * static_cast<int64_t>(sizeof(From));
                device::cast_row<From>(source, dims.row_bytes, [&](int64_t vector, uint64_t bytes, float scale) {
                    constexpr int kCount = device::ElementsOf<From>::kCount;
                    const int64_t element = vector * kCount;
                    for (int which = 0; which < num_targets; ++which) {
                        const GroupLayout group = nth_group(which);
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
        if (threadIdx.x % kWarpSize == 0) device::flag_groups(link, epoch, slot, lap);
    }
}

}  // namespace moe_ep::dispatch
