#pragma once

#include <cstdint>

#include "kernels/dispatch_place.cuh"

// Placing through the copy engine. Rows of the next group are loaded while those of one are stored, so that neither
// what has to be known of a group before its rows can move, nor the way of its first and last rows, leaves a pipe
// empty.
namespace moe_ep::dispatch {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// How far a walk over the pieces of a group's rows has come.
struct PieceCursor {
    uint32_t past = 0;  // bit i: all pieces of token i are behind
    int piece = 0;      // of the first token that is left

    __device__ uint32_t left(const Incoming& incoming) const { return incoming.moved & ~past; }
};

// Moves rows of groups through a warp's pipe, in order. All members are called by its first lane.
class RowMover {
public:
    __device__ RowMover(const DispatchParams& params, const int32_t* positions, device::BulkPipe& pipe)
        : params_(params), positions_(positions), pipe_(pipe), pieces_(params.rows.row_bytes, params.stage_bytes) {}

    // Begins to load pieces of a group while there is room. Returns whether none are left.
    __device__ bool load(const Incoming& incoming, PieceCursor& cursor) {
        const std::byte* rows =
            incoming.own ? params_.x + incoming.token(0) * pieces_.row_bytes : incoming.group.rows.ptr;
        while (!pipe_.is_full()) {
            const uint32_t left = cursor.left(incoming);
            if (left == 0) return true;
            const int idx = __ffs(left) - 1;
            const std::byte* row = incoming.has_first ? params_.out + targets(incoming, idx).first() * pieces_.row_bytes
                                                      : rows + idx * pieces_.row_bytes;
            pipe_.load(row + pieces_.offset(cursor.piece), pieces_.bytes(cursor.piece));
            advance(cursor, idx);
        }
        return cursor.left(incoming) == 0;
    }

    // Stores the oldest piece, the next one of a group, to all of its layout rows. Returns false when none is left.
    __device__ bool store(const Incoming& incoming, PieceCursor& cursor) {
        const uint32_t left = cursor.left(incoming);
        if (left == 0) return false;
        const int idx = __ffs(left) - 1;
        const std::byte* stage = pipe_.front();
        targets(incoming, idx).for_each([&](int64_t row) {
            ptx::bulk_store(params_.out + row * pieces_.row_bytes + pieces_.offset(cursor.piece), stage,
                            pieces_.bytes(cursor.piece));
        });
        pipe_.pop();
        advance(cursor, idx);
        return true;
    }

private:
    __device__ Targets targets(const Incoming& incoming, int idx) const {
        return {params_, positions_ + idx * params_.rows.top_k, incoming.row(idx), incoming.has_first};
    }
    __device__ void advance(PieceCursor& cursor, int idx) const {
        if (++cursor.piece < pieces_.num_pieces) return;
        cursor.piece = 0;
        cursor.past |= 1u << idx;
    }

    const DispatchParams& params_;
    const int32_t* positions_;
    device::BulkPipe& pipe_;
    const Pieces pieces_;
};

// Walks the groups of all sources in the order in which they are sent, and places their rows. A group whose turn has
// not come is only looked for: a warp waits for none while it holds one that it has not released, which peers may wait
// for.
template <class Route>
__device__ inline void place_rows_bulk(const DispatchParams& params, const Route& route, uint64_t epoch,
                                       const WarpShared& shared, device::BulkPipe& pipe) {
    const int lane = threadIdx.x % kWarpSize;
    GroupWalk<Route> walk(params, route, epoch);
    RowMover mover(params, shared.positions, pipe);
    Incoming next;
    PieceCursor loaded;  // of the next group
    PairAhead pairs;     // of the next group
    bool came = false;
    for (;;) {
        if (!came && !walk.receive(true, next, pairs)) return;
        // Rows that were acquired through a flag are read by the copy engine.
        ptx::fence_proxy_async_global();
        Incoming incoming = next;
        walk.ask_next();
        note_group(params, incoming);
        place_choices(params, incoming, pairs, shared.positions);
        __syncwarp();
        // Loading such rows begins with their group's turn: where they are was not known before.
        if (incoming.has_first) incoming.moved = find_further_copies(params, incoming, shared.positions);
        PieceCursor stored;
        if (lane == 0) {
            while (!mover.load(incoming, loaded)) mover.store(incoming, stored);
        }
        __syncwarp();
        // The pipe is full or holds all that is left of this group; what the next one needs is on its way meanwhile.
        came = walk.receive(false, next, pairs);
        ptx::fence_proxy_async_global();
        loaded = {};
        place_scales(params, incoming, shared.positions);
        if (lane == 0) {
            while (mover.store(incoming, stored)) {
                if (came) mover.load(next, loaded);
            }
            if (came) mover.load(next, loaded);
        }
        __syncwarp();
        if (lane == 0) walk.release(incoming);
    }
}

#endif

}  // namespace moe_ep::dispatch
