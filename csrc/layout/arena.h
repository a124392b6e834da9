#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/buffer.h"
#include "layout/plan.h"

namespace moe_ep {

inline constexpr int kMaxNodeRanks = 16;

// Rows travel in groups: what one source's chunk of consecutive tokens sends to one rank. A group's place in the
// receiver's ring follows from the chunk alone, so senders need no prefix sums and flags need no shared counters.
inline constexpr int kChunkTokens = 4;

// Words of one rank's opening message: header, number of tokens, choices per expert, tokens per rank. Each travels with
// the low half of its exchange's number in one store, so that a word that has come says so itself.
inline constexpr int kHeaderWords = 8;
inline constexpr int kMaxOpeningWords = kHeaderWords + 1 + kMaxExperts + kMaxNodeRanks;

// Opening messages of consecutive exchanges use different sets: a peer may still read the one before.
inline constexpr int kNumOpeningSets = 2;

inline constexpr int64_t kMaxRingGroups = 1 << 14;

// One rank's memory as its peers see it. Region i of each part is what rank i stores there; all flags only ever grow.
struct ArenaLayout {
    AsymBuffer<uint64_t> opening_words;  // [sets * R][kMaxOpeningWords] number of the exchange << 32 | word
    AsymBuffer<uint64_t> arrived;        // [R][kMaxRingGroups] stamp of each group that a source has stored in full
    AsymBuffer<uint64_t> consumed;       // [R][kMaxRingGroups] stamp of each of this rank's groups that a peer has read
    AsymBuffer<std::byte> payload;       // [R][payload_bytes] ring of groups from each source
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE ArenaLayout(void* base, int num_ranks, int64_t payload_bytes)
        : ArenaLayout(Cursor(base), num_ranks, payload_bytes) {}

    MOE_EP_HOST_DEVICE uint64_t* opening_from(int rank, uint64_t epoch) const {
        return opening_words.from(rank).row(static_cast<int64_t>(epoch % kNumOpeningSets));
    }

private:
    MOE_EP_HOST_DEVICE ArenaLayout(Cursor cursor, int num_ranks, int64_t payload_bytes)
        : opening_words(cursor, num_ranks, kNumOpeningSets, kMaxOpeningWords),
          arrived(cursor, num_ranks, kMaxRingGroups),
          consumed(cursor, num_ranks, kMaxRingGroups),
          payload(cursor, num_ranks, 1, payload_bytes),
          num_bytes(cursor.num_bytes()) {}
};

// What one token brings along: its row, and 32-bit words about it.
struct RecordDims {
    int64_t row_bytes;
    int64_t meta_words;
};

// One group in a ring. Token i of the chunk uses row and words i, whether the others are sent or not.
struct GroupLayout {
    int32_t* header;         // [4] place of the group's first row among its source's rows, bit i: token i is sent
    Buffer<int32_t> meta;    // [kChunkTokens][meta_words]
    Buffer<std::byte> rows;  // [kChunkTokens][row_bytes]
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE GroupLayout(void* base, const RecordDims& dims) : GroupLayout(Cursor(base), dims) {}

private:
    MOE_EP_HOST_DEVICE GroupLayout(Cursor cursor, const RecordDims& dims)
        : header(cursor.take<int32_t>(4)),
          meta(cursor, kChunkTokens, dims.meta_words),
          rows(cursor, kChunkTokens, dims.row_bytes),
          num_bytes(cursor.num_bytes()) {}
};

// Groups that fit the ring of one source.
MOE_EP_HOST_DEVICE int64_t num_ring_groups(int64_t payload_bytes, const RecordDims& dims) {
    const int64_t groups = payload_bytes / GroupLayout(nullptr, dims).num_bytes;
    // A single rank has no rings, and nobody asks where in them a group is.
    if (groups < 1) return 1;
    return groups < kMaxRingGroups ? groups : kMaxRingGroups;
}

// How an exchange uses the payload of all sources together when rows are stored where they stay: groups of metadata
// from each source, every chunk of the rank with most tokens in a place of its own, and behind them this rank's rows.
struct DirectLayout {
    AsymBuffer<std::byte> groups;  // [R][num_groups] groups without rows
    Buffer<std::byte> rows;        // [num_rows][row_bytes] layout rows
    int64_t num_bytes;

    // `dims`: of rows and words as they would travel in a ring.
    MOE_EP_HOST_DEVICE DirectLayout(void* base, int num_ranks, int64_t num_groups, const RecordDims& dims,
                                    int64_t num_rows)
        : DirectLayout(Cursor(base), num_ranks, num_groups, dims, num_rows) {}

    MOE_EP_HOST_DEVICE static RecordDims group_dims(const RecordDims& dims) { return {0, dims.meta_words}; }

private:
    MOE_EP_HOST_DEVICE DirectLayout(Cursor cursor, int num_ranks, int64_t num_groups, const RecordDims& dims,
                                    int64_t num_rows)
        : groups(cursor, num_ranks, num_groups, GroupLayout(nullptr, group_dims(dims)).num_bytes),
          rows(cursor, num_rows, dims.row_bytes),
          num_bytes(cursor.num_bytes()) {}
};

// Whether the rows of an exchange can be stored where they stay. `num_rows`: layout rows of the rank with most.
MOE_EP_HOST_DEVICE bool fits_directly(int num_ranks, int64_t payload_bytes, int64_t num_groups, const RecordDims& dims,
                                      int64_t num_rows) {
    return num_groups <= kMaxRingGroups &&
           DirectLayout(nullptr, num_ranks, num_groups, dims, num_rows).num_bytes <= num_ranks * payload_bytes;
}

MOE_EP_HOST_DEVICE int64_t num_chunks(int64_t num_tokens) {
    return (num_tokens + kChunkTokens - 1) / kChunkTokens;
}

}  // namespace moe_ep
