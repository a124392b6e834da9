#pragma once

#include <string>
#include <vector>

namespace moe_ep {

// Raises LibraryError where there is no driver or no GPU, ArgumentError for an index that no GPU has.
void check_device(const char* name, int device);

// What a GPU is.
struct DeviceProperties {
    std::string uuid;  // "GPU-..." as nvidia-smi prints it
    int major, minor;  // compute capability
    int num_sms;
    bool unified_addressing;  // with the host and other GPUs
    bool integrated;          // shares its memory with the host
};

// Makes no context.
DeviceProperties device_properties(int device);

// Returns the uuid of every GPU that this process sees, by index. Makes no context.
std::vector<std::string> device_uuids();

// Whether kernels of `device` can read and store memory of `peer`; true for itself. Makes no context.
bool peer_access(int device, int peer);

}  // namespace moe_ep
