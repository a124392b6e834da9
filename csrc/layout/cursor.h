#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace moe_ep {

// Regions start at this many bytes: what bulk copies, and flags that share no cache line with rows, ask for.
inline constexpr int64_t kRegionAlignment = 128;

// Walks a memory area and hands out its regions one behind the other. Over nullptr it measures: pointers are then
// offsets.
class Cursor {
public:
    MOE_EP_HOST_DEVICE explicit Cursor(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

    // Returns room for `num_elements` values of T; the area's base must have the alignment too.
    template <class T>
    MOE_EP_HOST_DEVICE T* take(int64_t num_elements, int64_t alignment = kRegionAlignment) {
        num_bytes_ = (num_bytes_ + alignment - 1) / alignment * alignment;
        T* region = reinterpret_cast<T*>(base_ + static_cast<uintptr_t>(num_bytes_));
        num_bytes_ += num_elements * static_cast<int64_t>(sizeof(T));
        return region;
    }

    // Returns the bytes handed out so far, rounded up so that another such area can follow directly.
    MOE_EP_HOST_DEVICE int64_t num_bytes(int64_t alignment = kRegionAlignment) const {
        return (num_bytes_ + alignment - 1) / alignment * alignment;
    }

private:
    uintptr_t base_;
    int64_t num_bytes_ = 0;
};

}  // namespace moe_ep
