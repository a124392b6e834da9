#include "host/cuda/driver.h"

#include <cuda_runtime_api.h>

#include <string>

#include "host/cuda_check.h"

namespace moe_ep {
namespace {

// Every function of the table has had its present signature since this version at the latest.
constexpr unsigned int kDriverVersion = 12000;

cudaError_t look_up(const char* name, void** entry, cudaDriverEntryPointQueryResult* found) {
#if CUDART_VERSION >= 12050
    return cudaGetDriverEntryPointByVersion(name, entry, kDriverVersion, cudaEnableDefault, found);
#elif CUDART_VERSION >= 12000
    return cudaGetDriverEntryPoint(name, entry, cudaEnableDefault, found);
#else
    *found = cudaDriverEntryPointSuccess;
    return cudaGetDriverEntryPoint(name, entry, cudaEnableDefault);
#endif
}

template <class Function>
void load(Function& function, const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check_cuda(look_up(name, &entry, &found), name);
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
        throw LibraryError(std::string(name) + ": this CUDA driver does not have it; CUDA 12.0 or newer does");
    }
    function = reinterpret_cast<Function>(entry);
}

Driver load_driver() {
    Driver table{};
    load(table.get_error_name, "cuGetErrorName");
    load(table.get_error_string, "cuGetErrorString");
    load(table.device_get_attribute, "cuDeviceGetAttribute");
    load(table.mem_get_allocation_granularity, "cuMemGetAllocationGranularity");
    load(table.mem_create, "cuMemCreate");
    load(table.mem_release, "cuMemRelease");
    load(table.mem_export, "cuMemExportToShareableHandle");
    load(table.mem_import, "cuMemImportFromShareableHandle");
    load(table.mem_address_reserve, "cuMemAddressReserve");
    load(table.mem_address_free, "cuMemAddressFree");
    load(table.mem_map, "cuMemMap");
    load(table.mem_unmap, "cuMemUnmap");
    load(table.mem_set_access, "cuMemSetAccess");
    return table;
}

}  // namespace

const Driver& driver() {
    static const Driver table = load_driver();
    return table;
}

void check_driver(CUresult status, const char* call) {
    if (status == CUDA_SUCCESS) return;
    const char *name = nullptr, *text = nullptr;
    driver().get_error_name(status, &name);
    driver().get_error_string(status, &text);
    throw LibraryError(std::string(call) + ": " + (name ? name : "CUDA error " + std::to_string(status)) + ", " +
                       (text ? text : "unknown to this driver"));
}

}  // namespace moe_ep
