#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "layout/exchange.h"

// Mistakes that tests plant to see that they are caught. Only builds with MOE_EP_PLANTED_FAULTS know them; elsewhere
// they cost nothing.
namespace moe_ep::device {

__device__ __forceinline__ bool has_fault([[maybe_unused]] const Link& link, [[maybe_unused]] Fault fault) {
#ifdef MOE_EP_PLANTED_FAULTS
    return link.fault == fault;
#else
    return false;
#endif
}

// Widens the gap in which a mistake shows.
__device__ inline void delay_fault() {
    constexpr uint64_t kNanoseconds = 50'000;
    const uint64_t start = ptx::global_nanoseconds();
    while (ptx::global_nanoseconds() - start < kNanoseconds) {
    }
}

}  // namespace moe_ep::device
