#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/buffer.h"

namespace moe_ep {

// Sets of one kind take turns, so that a rank may send twice before its peers have read the first time.
inline constexpr int kNumLowLatencySets = 2;

// Payloads start at this many bytes, the unit of bulk copies.
inline constexpr int64_t kPayloadAlignment = 16;

struct LowLatencyDims {
    int64_t max_tokens;      // tokens per rank, at most
    int64_t dispatch_bytes;  // payload of one dispatched token, scales included, at most
    int64_t combine_bytes;   // payload of one partial sum, at most
    int64_t top_k;           // choices per token, at most
    int64_t num_ranks;
};

// One dispatched token on the wire: where it comes from, what it chose, and its row.
struct LowLatencyRecord {
    int32_t* source_token;  // [1] index of the token at its source
    int32_t* topk_idx;      // [K] expert ids local to the receiver, -1 where the choice is another rank's
    float* topk_weights;    // [K]
    std::byte* payload;     // [dispatch_bytes]
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE LowLatencyRecord(void* base, const LowLatencyDims& dims) {
        Cursor cursor(base);
        source_token = cursor.take<int32_t>(1, alignof(int32_t));
        topk_idx = cursor.take<int32_t>(dims.top_k, alignof(int32_t));
        topk_weights = cursor.take<float>(dims.top_k, alignof(float));
        payload = cursor.take<std::byte>(dims.dispatch_bytes, kPayloadAlignment);
        num_bytes = cursor.num_bytes(kPayloadAlignment);
    }
};

// One set of one kind: rows from every source, and the flags that say which epoch they belong to. The set is symmetric:
// a sender writes to the region of its own rank in the receiver's copy of it.
struct LowLatencyBuffer {
    AsymBuffer<std::byte> rows;     // [R][max_tokens] rows of row_bytes
    AsymBuffer<int32_t> num_rows;   // [R] rows of this epoch from each source
    AsymBuffer<uint64_t> arrived;   // [R] last epoch that each source has sent in full
    AsymBuffer<uint64_t> consumed;  // [R] last of this rank's epochs that each receiver has read
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE LowLatencyBuffer(void* base, int64_t num_ranks, int64_t max_tokens, int64_t row_bytes)
        : LowLatencyBuffer(Cursor(base), num_ranks, max_tokens, row_bytes) {}

private:
    MOE_EP_HOST_DEVICE LowLatencyBuffer(Cursor cursor, int64_t num_ranks, int64_t max_tokens, int64_t row_bytes)
        : rows(cursor, num_ranks, max_tokens, row_bytes),
          num_rows(cursor, num_ranks, 1),
          arrived(cursor, num_ranks, 1),
          consumed(cursor, num_ranks, 1),
          num_bytes(cursor.num_bytes()) {}
};

// All of a rank's memory for decoding: alternating sets of dispatch and of combine, with flags of their own, so that
// the two of different micro-batches overlap.
struct LowLatencyLayout {
    std::byte* base;
    LowLatencyDims dims;
    int64_t record_bytes, dispatch_set_bytes, combine_set_bytes, num_bytes;

    MOE_EP_HOST_DEVICE LowLatencyLayout(void* base, const LowLatencyDims& dims)
        : base(static_cast<std::byte*>(base)),
          dims(dims),
          record_bytes(LowLatencyRecord(nullptr, dims).num_bytes),
          dispatch_set_bytes(LowLatencyBuffer(nullptr, dims.num_ranks, dims.max_tokens, record_bytes).num_bytes),
          combine_set_bytes(LowLatencyBuffer(nullptr, dims.num_ranks, dims.max_tokens, dims.combine_bytes).num_bytes) {
        Cursor cursor(base);
        dispatch_sets_ = cursor.take<std::byte>(kNumLowLatencySets * dispatch_set_bytes);
        combine_sets_ = cursor.take<std::byte>(kNumLowLatencySets * combine_set_bytes);
        num_bytes = cursor.num_bytes();
    }

    // Epochs count from 0 and live in device memory; consecutive ones use different sets.
    MOE_EP_HOST_DEVICE LowLatencyBuffer dispatch_set(uint64_t epoch) const {
        std::byte* set = dispatch_sets_ + static_cast<int64_t>(epoch % kNumLowLatencySets) * dispatch_set_bytes;
        return LowLatencyBuffer(set, dims.num_ranks, dims.max_tokens, record_bytes);
    }
    MOE_EP_HOST_DEVICE LowLatencyBuffer combine_set(uint64_t epoch) const {
        std::byte* set = combine_sets_ + static_cast<int64_t>(epoch % kNumLowLatencySets) * combine_set_bytes;
        return LowLatencyBuffer(set, dims.num_ranks, dims.max_tokens, dims.combine_bytes);
    }

private:
    std::byte* dispatch_sets_;
    std::byte* combine_sets_;
};

}  // namespace moe_ep
