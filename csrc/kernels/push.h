#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/arena.h"

namespace moe_ep {

// One stretch of bytes and where it goes: multiples of kPushAlignment, in this GPU's memory or a peer's as mapped here.
struct PushTarget {
    const std::byte* from;
    std::byte* to;
    int64_t num_bytes;
};

inline constexpr int64_t kPushAlignment = 16;

struct PushParams {
    PushTarget targets[kMaxNodeRanks];
    int num_targets;
    int64_t max_pieces;  // of the longest stretch, of a stage each
};

// Enqueues bulk copies of all targets from num_sms SMs on `stream` (a cudaStream_t) of the current device: the least
// that moving these bytes takes, without plan, flags or placing. Nobody is told when the bytes are there. Raises
// NotBuiltError on GPUs before Hopper, LibraryError when the launch fails.
void launch_push(PushParams params, int num_sms, void* stream);

}  // namespace moe_ep
