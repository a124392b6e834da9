#include "host/cuda/capabilities.h"

#include <unistd.h>

#include "host/cuda/arena.h"
#include "host/cuda/device_scope.h"
#include "host/cuda/driver.h"
#include "kernels/exchange.h"

namespace moe_ep {
namespace {

bool has(CUdevice_attribute attribute, int device) {
    int value = 0;
    check_driver(driver().device_get_attribute(&value, attribute, device), "cuDeviceGetAttribute");
    return value != 0;
}

// Drivers in containers may announce file descriptors and then refuse them: only trying tells.
bool can_export_fd(int device) {
    if (!has(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) ||
        !has(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device)) {
        return false;
    }
    try {
        close(Arena(1, device, "fd").export_fd());
        return true;
    } catch (const LibraryError&) {
        return false;
    }
}

}  // namespace

DeviceCapabilities device_capabilities(int device) {
    check_device("device", device);
    const DeviceProperties found = device_properties(device);
    return {.fd = can_export_fd(device), .ipc = found.unified_addressing && !found.integrated, .properties = found};
}

std::string find_kernel_problem(int device) {
    try {
        const DeviceScope scope(device);
        return kernel_problem();
    } catch (const LibraryError& error) {
        return error.what();
    }
}

}  // namespace moe_ep
