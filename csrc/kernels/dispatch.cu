#include <cstdint>
#include <type_traits>

#include "device/groups.cuh"
#include "device/pipe.cuh"
#include "device/rows.cuh"
#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/exchange.h"
#include "layout/plan.h"

// Senders walk this rank's chunks of tokens and store each row into the ring of every rank it goes to; placers walk the
// groups of all sources, as they arrive, and copy each row to its layout rows. This rank's own rows skip the ring.
namespace moe_ep {
namespace {

using device::kAllLanes;
using device::kWarpSize;
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
__device__ int load_expert(const DispatchParams& params, int64_t choice) {
    const int64_t expert = params.index_bytes == 4 ? static_cast<const int32_t*>(params.topk_idx)[choice]
                                                   : static_cast<const int64_t*>(params.topk_idx)[choice];
    return expert >= 0 && expert < params.rows.num_experts ? static_cast<int>(expert) : -1;
}

__device__ int32_t load_scale(const DispatchParams& params, int64_t token, int word) {
    return params.scales[token * params.scale_stride + word * params.scale_word_stride];
}

// Stores what travels beside the rows of one chunk to one rank. Called by a whole warp.
__device__ void send_meta(const DispatchParams& params, const GroupLayout& group, int64_t chunk, int peer,
                          device::ChunkPart part) {
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
        const int expert = load_expert(params, choice) - peer * local;
        const bool chosen = expert >= 0 && expert < local;
        int32_t* words = group.meta.row(idx);
        words[meta.id(k)] = chosen ? expert : -1;
        words[meta.place(k)] = chosen ? params.idx_in_expert[choice] : 0;
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

// Pieces that rows are cut into on their way through a pipe.
struct Pieces {
    int64_t row_bytes;
    int num_pieces;
    uint32_t piece_bytes;

    __device__ explicit Pieces(int64_t row_bytes) : row_bytes(row_bytes) {
        num_pieces = static_cast<int>((row_bytes + device::kPipeStageBytes - 1) / device::kPipeStageBytes);
        const int64_t even = (row_bytes + num_pieces - 1) / num_pieces;
        piece_bytes =
            static_cast<uint32_t>((even + device::kVectorBytes - 1) / device::kVectorBytes * device::kVectorBytes);
    }
    __device__ int64_t offset(int piece) const { return static_cast<int64_t>(piece) * piece_bytes; }
    __device__ uint32_t bytes(int piece) const {
        const int64_t left = row_bytes - offset(piece);
        return left < piece_bytes ? static_cast<uint32_t>(left) : piece_bytes;
    }
};

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
__device__ void send_rows_bulk(const DispatchParams& params, const WarpShared& shared, device::BulkPipe* pipe,
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
    bool good = true;
    for (int64_t chunk = first; chunk < sent_chunks.end && good; chunk += worker.stride) {
        const int64_t slot = chunk % ring_groups, lap = chunk / ring_groups;
        // NOTE: a peer may wait for the flags that are still pending before it makes room.
        if (lap > 0 && lane == 0) pending.flush(link, epoch, ring_groups);
        good = device::wait_for_room(link, epoch, slot, lap);
        if (!good) break;
        const device::ChunkPart part = device::read_chunk(params.rows, link.num_ranks, chunk);
        for (int peer = 0; peer < link.num_ranks; ++peer) {
            if (peer == link.rank) continue;
            const GroupLayout group = device::group_at(link, dims, peer, link.rank, slot);
            const device::ChunkPart sent{__shfl_sync(kAllLanes, part.mask, peer),
                                         __shfl_sync(kAllLanes, part.first, peer)};
            if (lane == 0) shared.targets[peer] = group.rows.ptr;
            send_meta(params, group, chunk, peer, sent);
        }
        __syncwarp();
        if (lane == 0) {
            // A freed place is written by the copy engine.
            if (lap > 0) ptx::fence_proxy_async_global();
            while (!store.is_done() && store.chunk() == chunk) {
                while (!load.is_done() && !pipe->is_full()) {
                    pipe->load(params.x + load.token() * pieces.row_bytes + pieces.offset(load.piece()),
                               pieces.bytes(load.piece()));
                    load.advance();
                }
                const std::byte* stage = pipe->front();
                const int64_t offset = store.idx_in_chunk() * pieces.row_bytes + pieces.offset(store.piece());
                for (uint32_t left = store.ranks(); left != 0; left &= left - 1) {
                    ptx::bulk_store(shared.targets[__ffs(left) - 1] + offset, stage, pieces.bytes(store.piece()));
                }
                pipe->pop();
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
    while (!pipe->is_empty()) {
        pipe->front();
        pipe->pop();
    }
    ptx::wait_bulk_stores<0>();
}

#endif

// Sends the rows of this warp's chunks by vector loads and stores, cast to fp8 where asked for.
template <class From>
__device__ void send_rows(const DispatchParams& params, Worker worker) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims);
    const SentChunks sent_chunks(params, ring_groups);
    const uint64_t epoch = link.state->epoch;
    for (int64_t chunk = sent_chunks.begin + worker.first; chunk < sent_chunks.end; chunk += worker.stride) {
        const int64_t slot = chunk % ring_groups, lap = chunk / ring_groups;
        if (!device::wait_for_room(link, epoch, slot, lap)) return;
        const device::ChunkPart part = device::read_chunk(params.rows, link.num_ranks, chunk);
        for (int peer = 0; peer < link.num_ranks; ++peer) {
            const device::ChunkPart sent{__shfl_sync(kAllLanes, part.mask, peer),
                                         __shfl_sync(kAllLanes, part.first, peer)};
            if (peer == link.rank) continue;
            send_meta(params, device::group_at(link, dims, peer, link.rank, slot), chunk, peer, sent);
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

__device__ Choice load_choice(const DispatchParams& params, const Incoming& incoming, int idx, int k) {
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

__device__ int32_t load_weight(const DispatchParams& params, const Incoming& incoming, int idx, int k, int word) {
    if (!incoming.own) return ptx::load_arena(incoming.group.meta.row(idx) + MetaLayout(params).weight(k, word));
    const int64_t choice = (incoming.chunk * kChunkTokens + idx) * params.rows.top_k + k;
    return params.topk_weights[choice * params.weight_words + word];
}

// Finds the layout rows of a group's choices, in the warp's table, and writes plan, weights and ids of a new plan.
__device__ void place_choices(const DispatchParams& params, const Incoming& incoming, const PlanTable& table,
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
__device__ void place_scales(const DispatchParams& params, const Incoming& incoming, int idx, const Targets& targets) {
    const MetaLayout meta(params);
    for (int word = threadIdx.x % kWarpSize; word < params.scale_words; word += kWarpSize) {
        const int32_t value = incoming.own ? load_scale(params, incoming.chunk * kChunkTokens + idx, word)
                                           : ptx::load_arena(incoming.group.meta.row(idx) + meta.scale(word));
        targets.for_each([&](int64_t row) { params.out_scales[row * params.scale_words + word] = value; });
    }
}

// Places one row by vector loads and stores. Called by a whole warp.
template <class From>
__device__ void place_row(const DispatchParams& params, const Incoming& incoming, int idx, const Targets& targets) {
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
__device__ void place_rows_bulk(const DispatchParams& params, const Incoming& incoming, const int32_t* positions,
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
__device__ bool receive_group(const DispatchParams& params, const RecordDims& dims, const PlanTable& table,
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
        incoming.first = ptx::load_arena(incoming.group.header);
        incoming.mask = static_cast<uint32_t>(ptx::load_arena(incoming.group.header + 1));
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
__device__ void place_rows(const DispatchParams& params, const WarpShared& shared, Pipe* pipe, Worker worker) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const PlanTable table(params.rows.table, link.num_ranks, params.rows.num_experts);
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims);
    const uint64_t epoch = link.state->epoch;
    const int lane = threadIdx.x % kWarpSize;
    for (int64_t item = worker.first; item < params.rows.max_chunks * link.num_ranks; item += worker.stride) {
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
            if (lane == 0) {
                // Rows that were acquired through a flag are read by the copy engine.
                ptx::fence_proxy_async_global();
                place_rows_bulk(params, incoming, shared.positions, *pipe);
            }
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
__device__ void fill_padding(const DispatchParams& params, Worker worker, int64_t out_row_bytes) {
    const Link& link = params.link;
    const int lane = threadIdx.x % kWarpSize, local = params.rows.num_experts / link.num_ranks;
    const PlanTable table(params.rows.table, link.num_ranks, params.rows.num_experts);
    if (params.layout == Layout::kCompact) {
        if (!params.with_plan || params.rows.top_k == 0) return;
        const int64_t first = static_cast<int64_t>(table.source_rows[link.num_ranks]) * params.rows.top_k;
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
__device__ void poison_rows(const DispatchParams& params, Worker worker, int64_t out_row_bytes) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_weights = params.layout == Layout::kCompact ? params.rows.top_k : 1;
    for (int64_t row = worker.first; row < params.num_rows; row += worker.stride) {
        auto* vectors = reinterpret_cast<uint4*>(params.out + row * out_row_bytes);
        for (int64_t idx = lane; idx < out_row_bytes / device::kVectorBytes; idx += kWarpSize) {
            vectors[idx] = make_uint4(~0u, ~0u, ~0u, ~0u);
        }
        if (params.out_weights == nullptr) continue;
        for (int64_t word = lane; word < num_weights * params.weight_words; word += kWarpSize) {
            params.out_weights[row * num_weights * params.weight_words + word] = -1;
        }
    }
}

template <bool kBulk, class From>
__global__ void __launch_bounds__((kBulk ? device::kPipeWarps : kVectorWarps) * kWarpSize)
    dispatch_rows(const __grid_constant__ DispatchParams params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (kBulk) return;
#endif
    constexpr int kWarps = kBulk ? device::kPipeWarps : kVectorWarps;
    extern __shared__ uint4 memory[];
    if (device::has_failed(params.link)) return;
    const int warp = threadIdx.x / kWarpSize, block = static_cast<int>(blockIdx.x);
    const int64_t warp_bytes = WarpShared(nullptr, kBulk, params.rows.top_k).num_bytes;
    const WarpShared shared(reinterpret_cast<std::byte*>(memory) + warp * warp_bytes, kBulk, params.rows.top_k);
    const bool sends = block < params.num_senders;
    const int role_block = sends ? block : block - params.num_senders;
    const int role_blocks = sends ? params.num_senders : params.num_placers;
    // Neighbouring chunks go to different SMs.
    const Worker worker{role_block + static_cast<int64_t>(warp) * role_blocks,
                        static_cast<int64_t>(role_blocks) * kWarps};
    const int64_t out_row_bytes =
        params.rows.row_bytes * (std::is_same_v<From, NoCast> ? 1 : static_cast<int64_t>(sizeof(From)));
    const PlanTable table(params.rows.table, params.link.num_ranks, params.rows.num_experts);
    if (*table.overflow != 0) {
        if (!sends) poison_rows(params, worker, out_row_bytes);
        return;
    }
    if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        device::BulkPipe* pipe = nullptr;
        alignas(device::BulkPipe) unsigned char place[sizeof(device::BulkPipe)];
        if (threadIdx.x % kWarpSize == 0) pipe = new (place) device::BulkPipe(shared.stages, shared.barriers);
        __syncwarp();
        if (sends) {
            send_rows_bulk(params, shared, pipe, worker);
        } else {
            fill_padding(params, worker, out_row_bytes);
            place_rows<true, From>(params, shared, pipe, worker);
            // Stores read shared memory, which must outlive them.
            ptx::wait_bulk_stores<0>();
        }
#endif
    } else {
        if (sends) {
            send_rows<From>(params, worker);
        } else {
            fill_padding(params, worker, out_row_bytes);
            place_rows<false, From, int>(params, shared, nullptr, worker);
        }
    }
}

template <bool kBulk, class From>
void launch(const DispatchParams& params, cudaStream_t stream) {
    constexpr int kWarps = kBulk ? device::kPipeWarps : kVectorWarps;
    const int64_t shared_bytes = kWarps * WarpShared(nullptr, kBulk, params.rows.top_k).num_bytes;
    const int num_blocks = params.num_senders + params.num_placers;
    dispatch_rows<kBulk, From><<<num_blocks, kWarps * kWarpSize, static_cast<size_t>(shared_bytes), stream>>>(params);
    check_cuda(cudaGetLastError(), "dispatch_rows");
}

// Loads a kernel and allows it the shared memory of the largest K.
template <bool kBulk, class From>
void prepare() {
    constexpr int kWarps = kBulk ? device::kPipeWarps : kVectorWarps;
    const int64_t shared_bytes = kWarps * WarpShared(nullptr, kBulk, kMaxTopK).num_bytes;
    check_cuda(cudaFuncSetAttribute(dispatch_rows<kBulk, From>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "cudaFuncSetAttribute(dispatch_rows)");
}

template <class Index>
__global__ void drop_choices(Index* topk_idx, const int32_t* idx_in_expert, const int32_t* keep_choices,
                             int64_t num_choices, int num_experts) {
    const int64_t choice = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (choice >= num_choices) return;
    const Index expert = topk_idx[choice];
    if (expert < 0 || expert >= num_experts || idx_in_expert[choice] >= keep_choices[expert]) topk_idx[choice] = -1;
}

}  // namespace

void prepare_dispatch() {
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    // Earlier GPUs have neither the copy engine's instructions nor that much shared memory.
    if (major >= 9) prepare<true, NoCast>();
    prepare<false, NoCast>();
    prepare<false, __nv_bfloat16>();
    prepare<false, __half>();
    prepare<false, float>();
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, drop_choices<int32_t>), "cudaFuncGetAttributes(drop_choices)");
    check_cuda(cudaFuncGetAttributes(&attributes, drop_choices<int64_t>), "cudaFuncGetAttributes(drop_choices)");
}

void launch_dispatch(const DispatchParams& params, bool bulk, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    switch (params.cast) {
        case Cast::kNone:
            return bulk ? launch<true, NoCast>(params, on) : launch<false, NoCast>(params, on);
        case Cast::kFromBf16:
            return launch<false, __nv_bfloat16>(params, on);
        case Cast::kFromHalf:
            return launch<false, __half>(params, on);
        case Cast::kFromFloat:
            return launch<false, float>(params, on);
    }
}

void launch_drop(void* topk_idx, int index_bytes, const int32_t* idx_in_expert, const int32_t* keep_choices,
                 int64_t num_choices, int num_experts, void* stream) {
    if (num_choices == 0) return;
    constexpr int kThreads = 256;
    const auto num_blocks = static_cast<unsigned>((num_choices + kThreads - 1) / kThreads);
    dispatch_value<4, 8>("index_bytes", index_bytes, [&](auto bytes) {
        using Index = std::conditional_t<bytes == 4, int32_t, int64_t>;
        drop_choices<<<num_blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<Index*>(topk_idx), idx_in_expert, keep_choices, num_choices, num_experts);
    });
    check_cuda(cudaGetLastError(), "drop_choices");
}

}  // namespace moe_ep
