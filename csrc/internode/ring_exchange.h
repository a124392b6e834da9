#pragma once

#include <cstdint>

#include "layout/buffer.h"

namespace moe_ep {

// Symmetric memory of the ring: words for the next rank, words from the one before, and the flag that says they are
// there.
struct RingLayout {
    SymBuffer<uint64_t> words;  // one region of num_words either way
    Buffer<uint64_t> arrived;   // [1]
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE RingLayout(void* base, int64_t num_words) : RingLayout(Cursor(base), num_words) {}

private:
    MOE_EP_HOST_DEVICE RingLayout(Cursor cursor, int64_t num_words)
        : words(cursor, 1, num_words), arrived(cursor, 1), num_bytes(cursor.num_bytes()) {}
};

struct RingParams {
    void* symmetric;  // RingLayout, zeroed
    int64_t num_words;
    int my_pe, num_pes;
    uint64_t timeout_nanoseconds;
    int64_t* result;  // [1] words that differ, kRingTimeout when none came
};

inline constexpr int64_t kRingTimeout = -1;

// Enqueues the exchange on `stream` (a cudaStream_t). Raises LibraryError when the launch fails.
void launch_ring_exchange(const RingParams& params, void* stream);

}  // namespace moe_ep
