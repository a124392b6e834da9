#pragma once

#include <cstdint>

// One wrapper per instruction, named by what it means.
namespace moe_ep::ptx {

// Bits of the lanes below this one.
__device__ __forceinline__ uint32_t lanes_below() {
    uint32_t mask;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
    return mask;
}

// Nanoseconds of a clock that all GPUs of a host share; it may advance in steps of a microsecond.
__device__ __forceinline__ uint64_t global_nanoseconds() {
    uint64_t nanoseconds;
    // NOTE: volatile, since a loop that waits reads it anew each time.
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}

}  // namespace moe_ep::ptx
