#pragma once

#include <cuda.h>

namespace moe_ep {

// Entry points of the driver, looked up at run time: nothing links libcuda, so the module loads where there is none.
struct Driver {
    decltype(&cuGetErrorName) get_error_name;
    decltype(&cuGetErrorString) get_error_string;
    decltype(&cuDeviceGetAttribute) device_get_attribute;
    decltype(&cuMemGetAllocationGranularity) mem_get_allocation_granularity;
    decltype(&cuMemCreate) mem_create;
    decltype(&cuMemRelease) mem_release;
    decltype(&cuMemExportToShareableHandle) mem_export;
    decltype(&cuMemImportFromShareableHandle) mem_import;
    decltype(&cuMemAddressReserve) mem_address_reserve;
    decltype(&cuMemAddressFree) mem_address_free;
    decltype(&cuMemMap) mem_map;
    decltype(&cuMemUnmap) mem_unmap;
    decltype(&cuMemSetAccess) mem_set_access;
};

// Raises LibraryError when there is no driver, or one without these.
const Driver& driver();

// Raises LibraryError naming the call, unless it succeeded.
void check_driver(CUresult status, const char* call);

}  // namespace moe_ep
