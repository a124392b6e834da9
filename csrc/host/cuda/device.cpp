#include "host/cuda/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <cstdio>

#include "host/checks.h"
#include "host/cuda_check.h"

namespace moe_ep {
namespace {

int num_devices() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess) return count;
    cudaGetLastError();
    throw LibraryError(std::string("this process can use no GPU: cudaGetDeviceCount: ") + cudaGetErrorName(status) +
                       ", " + cudaGetErrorString(status));
}

std::string format_uuid(const cudaUUID_t& uuid) {
    std::string text = "GPU";
    for (int byte = 0; byte < 16; ++byte) {
        if (byte == 0 || byte == 4 || byte == 6 || byte == 8 || byte == 10) text += '-';
        std::array<char, 3> digits{};
        std::snprintf(digits.data(), digits.size(), "%02x", static_cast<unsigned char>(uuid.bytes[byte]));
        text += digits.data();
    }
    return text;
}

}  // namespace

void check_device(const char* name, int device) {
    const int count = num_devices();
    check_argument(device >= 0 && device < count, name, "=", device, ": must be 0 to ", count - 1,
                   ", the GPUs that this process sees");
}

DeviceProperties device_properties(int device) {
    cudaDeviceProp found{};
    check_cuda(cudaGetDeviceProperties(&found, device), "cudaGetDeviceProperties");
    return {.uuid = format_uuid(found.uuid),
            .major = found.major,
            .minor = found.minor,
            .num_sms = found.multiProcessorCount,
            .unified_addressing = found.unifiedAddressing != 0,
            .integrated = found.integrated != 0};
}

std::vector<std::string> device_uuids() {
    std::vector<std::string> uuids;
    const int count = num_devices();
    for (int device = 0; device < count; ++device) uuids.push_back(device_properties(device).uuid);
    return uuids;
}

bool peer_access(int device, int peer) {
    check_device("device", device);
    check_device("peer", peer);
    int can = device == peer;
    if (!can) check_cuda(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
    return can != 0;
}

}  // namespace moe_ep
