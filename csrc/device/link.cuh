#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "layout/exchange.h"

// Waiting for peers, always within bounds, and telling the host what went wrong.
namespace moe_ep::device {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Sum over the lanes up to this one. Called by a whole warp.
__device__ inline int32_t inclusive_sum(int32_t sum) {
    const int lane = threadIdx.x % kWarpSize;
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int32_t below = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += below;
    }
    return sum;
}

// Stamp of the group of one chunk: later laps round the ring and later exchanges have larger ones.
__device__ __forceinline__ uint64_t group_stamp(uint64_t epoch, int64_t lap) {
    return (epoch << 24) + static_cast<uint64_t>(lap) + 1;
}

__device__ __forceinline__ bool has_failed(const Link& link) {
    return ptx::load_relaxed_gpu(&link.state->failed) != 0;
}

// The same for all threads of a block, whoever fails meanwhile: those that go on meet at barriers. Called by a whole
// block.
__device__ __forceinline__ bool has_failed_for_block(const Link& link) {
    return __syncthreads_or(threadIdx.x == 0 && has_failed(link)) != 0;
}

// A message of an opening exchange comes word by word, each with the low half of the exchange's number.
__device__ __forceinline__ bool is_of_exchange(uint64_t stamped, uint64_t epoch) {
    return static_cast<uint32_t>(stamped >> 32) == static_cast<uint32_t>(epoch);
}

// What is rarely run is kept out of line: kernels of few rows take as long as their code takes to load.

// Stops this rank's kernels; the first to come here tells the host. `theirs`: words of an opening message.
__device__ __noinline__ inline void report(const Link& link, Trouble trouble, int peer, Phase phase, uint64_t expected,
                                           uint64_t seen, const uint64_t* theirs = nullptr,
                                           const int32_t* mine = nullptr) {
    if (atomicExch(&link.state->failed, 1u) != 0) return;
    volatile StatusWords* status = link.status;
    status->peer = peer;
    status->phase = static_cast<int64_t>(phase);
    status->expected = static_cast<int64_t>(expected);
    status->seen = static_cast<int64_t>(seen);
#pragma unroll 1
    for (int word = 0; word < kHeaderWords; ++word) {
        status->theirs[word] = theirs == nullptr ? 0 : static_cast<int32_t>(ptx::load_relaxed_sys(theirs + word));
        status->mine[word] = mine == nullptr ? 0 : mine[word];
    }
    // The host reads the rest once it has seen the trouble.
    __threadfence_system();
    status->trouble = static_cast<int64_t>(trouble);
}

// The number of the exchange that a word of an opening message belongs to: of halves that are near each other, since
// what was there before is of an exchange not long ago.
__device__ inline uint64_t exchange_of(uint64_t stamped, uint64_t epoch) {
    const uint32_t behind = static_cast<uint32_t>(epoch) - static_cast<uint32_t>(stamped >> 32);
    return behind > epoch ? 0 : epoch - behind;
}

// Bounds a wait for one flag.
class Patience {
public:
    // Called after each look at the flag that found it too low. Returns whether to look again: not once the exchange
    // has failed, here or elsewhere on this GPU.
    __device__ bool lasts(const Link& link, uint64_t expected, uint64_t seen, int peer, Phase phase) {
        if (++turn_ % 32 != 0) return true;
        if (has_failed(link)) return false;
        if (ptx::global_nanoseconds() - start_ <= link.timeout_ns) return true;
        report(link, Trouble::kTimeout, peer, phase, expected, seen);
        return false;
    }

private:
    uint64_t start_ = ptx::global_nanoseconds();
    uint32_t turn_ = 0;
};

// Goes on waiting; see wait_for. While an exchange is opened, `flag` is a word of a message.
__device__ __noinline__ inline bool wait_longer(const Link& link, const uint64_t* flag, uint64_t expected, int peer,
                                                Phase phase) {
    Patience patience;
    for (;;) {
        uint64_t seen = ptx::load_acquire_sys(flag);
        if (phase == Phase::kOpening) seen = exchange_of(seen, expected);
        if (seen >= expected) return true;
        if (!patience.lasts(link, expected, seen, peer, phase)) return false;
    }
}

// Waits until a flag has reached a value; what was stored before it may then be read. Returns false when the exchange
// has failed, here or elsewhere on this GPU.
__device__ __forceinline__ bool wait_for(const Link& link, const uint64_t* flag, uint64_t expected, int peer,
                                         Phase phase) {
    return ptx::load_acquire_sys(flag) >= expected || wait_longer(link, flag, expected, peer, phase);
}

}  // namespace moe_ep::device
