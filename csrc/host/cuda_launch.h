#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "host/cuda_check.h"

namespace moe_ep {

// Launches a kernel. `started`: a cudaEvent_t that is recorded once all of its blocks run, or null; null where launches
// do not tell their start.
template <class Params>
void launch_telling_start(const char* name, void (*kernel)(Params), int num_blocks, int num_threads,
                          int64_t shared_bytes, void* started, cudaStream_t stream, const Params& params) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(num_blocks));
    config.blockDim = dim3(static_cast<unsigned>(num_threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
#if CUDART_VERSION >= 12030
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeLaunchCompletionEvent;
    attribute.val.launchCompletionEvent.event = static_cast<cudaEvent_t>(started);
    attribute.val.launchCompletionEvent.flags = 0;
    config.attrs = &attribute;
    config.numAttrs = started == nullptr ? 0 : 1;
#endif
    check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace moe_ep
