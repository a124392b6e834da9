#pragma once

#include <string>

#include "host/cuda/device.h"

namespace moe_ep {

// What a GPU offers to processes that want to share its memory.
struct DeviceCapabilities {
    bool fd;   // memory can be exported as POSIX file descriptors
    bool ipc;  // memory can be exported as CUDA IPC handles
    DeviceProperties properties;
};

// Raises LibraryError where there is no driver or no GPU, ArgumentError for an index that no GPU has.
DeviceCapabilities device_capabilities(int device);

// Why the kernels of this build do not run on a device, as CUDA says it; empty where they do.
std::string find_kernel_problem(int device);

}  // namespace moe_ep
