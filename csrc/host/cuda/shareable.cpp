#include "host/cuda/shareable.h"

#include <fcntl.h>

#include "host/cuda/driver.h"

namespace moe_ep {
namespace {

CUmemLocation on_device(int device) {
    CUmemLocation location{};
    location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = device;
    return location;
}

CUmemAllocationProp shareable_properties(int device) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = on_device(device);
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    return properties;
}

void release_when_undone(CUmemGenericAllocationHandle handle, Undo& undo) {
    undo.add([handle] { check_driver(driver().mem_release(handle), "cuMemRelease"); });
}

}  // namespace

int64_t shareable_granularity(int device) {
    const CUmemAllocationProp properties = shareable_properties(device);
    size_t granularity = 0;
    check_driver(
        driver().mem_get_allocation_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "cuMemGetAllocationGranularity");
    return static_cast<int64_t>(granularity);
}

CUmemGenericAllocationHandle create_shareable(int64_t num_bytes, int device, Undo& undo) {
    const CUmemAllocationProp properties = shareable_properties(device);
    CUmemGenericAllocationHandle handle{};
    check_driver(driver().mem_create(&handle, static_cast<size_t>(num_bytes), &properties, 0), "cuMemCreate");
    release_when_undone(handle, undo);
    return handle;
}

int export_shareable(CUmemGenericAllocationHandle handle) {
    int fd = -1;
    check_driver(driver().mem_export(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                 "cuMemExportToShareableHandle");
    // A program that this process starts would keep the memory alive.
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return fd;
}

CUmemGenericAllocationHandle import_shareable(int fd, Undo& undo) {
    CUmemGenericAllocationHandle handle{};
    void* const os_handle = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
    check_driver(driver().mem_import(&handle, os_handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                 "cuMemImportFromShareableHandle");
    release_when_undone(handle, undo);
    return handle;
}

uintptr_t map_shareable(CUmemGenericAllocationHandle handle, int64_t num_bytes, int device, Undo& undo) {
    const auto size = static_cast<size_t>(num_bytes);
    CUdeviceptr address = 0;
    check_driver(driver().mem_address_reserve(&address, size, 0, 0, 0), "cuMemAddressReserve");
    undo.add([=] { check_driver(driver().mem_address_free(address, size), "cuMemAddressFree"); });
    check_driver(driver().mem_map(address, size, 0, handle, 0), "cuMemMap");
    undo.add([=] { check_driver(driver().mem_unmap(address, size), "cuMemUnmap"); });
    CUmemAccessDesc access{};
    access.location = on_device(device);
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    check_driver(driver().mem_set_access(address, size, &access, 1), "cuMemSetAccess");
    return static_cast<uintptr_t>(address);
}

}  // namespace moe_ep
