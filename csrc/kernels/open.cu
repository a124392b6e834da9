#include <cstdint>

#include "device/opening.cuh"
#include "host/cuda_check.h"
#include "kernels/exchange.h"
#include "kernels/plan.h"

// One block opens an exchange that has nothing to count.
namespace moe_ep {
namespace {

constexpr int kThreads = kMaxNodeRanks * kHeaderWords;

__global__ void __launch_bounds__(kThreads)
    open_exchange(const __grid_constant__ Link link, const __grid_constant__ Opening opening) {
    if (device::has_failed_for_block(link)) return;
    uint64_t epoch;
    device::join_exchange(link, opening, epoch);
}

__global__ void do_nothing() {}

}  // namespace

void prepare_open() {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, open_exchange), "cudaFuncGetAttributes(open_exchange)");
    check_cuda(cudaFuncGetAttributes(&attributes, do_nothing), "cudaFuncGetAttributes(do_nothing)");
}

std::string kernel_problem() {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, open_exchange);
    if (status == cudaSuccess) return "";
    // What is told here must not be found again by the next launch's check.
    cudaGetLastError();
    return cudaGetErrorString(status);
}

void prepare_kernels() {
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    // Earlier GPUs have neither the copy engine's instructions nor that much shared memory.
    const bool bulk = major >= 9;
    prepare_plan();
    prepare_open();
    prepare_counting();
    prepare_dispatch(bulk);
    prepare_combine(bulk);
}

void launch_open(const Link& link, const Opening& opening, void* stream) {
    open_exchange<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(link, opening);
    check_cuda(cudaGetLastError(), "open_exchange");
}

bool launches_tell_start() {
    constexpr int kFirstVersion = 12030;
    static const bool told = [] {
        int version = 0;
        return CUDART_VERSION >= kFirstVersion && cudaDriverGetVersion(&version) == cudaSuccess &&
               version >= kFirstVersion;
    }();
    return told;
}

void launch_nothing(void* stream) {
    do_nothing<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>();
    check_cuda(cudaGetLastError(), "do_nothing");
}

}  // namespace moe_ep
