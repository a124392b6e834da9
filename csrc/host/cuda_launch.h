#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "host/cuda_check.h"

namespace moe_ep {

struct LaunchOptions {
    // A cudaEvent_t that is recorded once all blocks run, or null; null where launches do not tell their start.
    void* started = nullptr;
    // Whether the kernel may begin once all blocks of the one before it in the stream have said so. Not with the above:
    // the event would only come when the kernel has ended.
    bool early = false;
};

template <class Params>
void launch_with(LaunchOptions options, const char* name, void (*kernel)(Params), int num_blocks, int num_threads,
                 int64_t shared_bytes, cudaStream_t stream, const Params& params) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(num_blocks));
    config.blockDim = dim3(static_cast<unsigned>(num_threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
#if CUDART_VERSION >= 12030
    cudaLaunchAttribute attribute{};
    if (options.started != nullptr) {
        attribute.id = cudaLaunchAttributeLaunchCompletionEvent;
        attribute.val.launchCompletionEvent.event = static_cast<cudaEvent_t>(options.started);
        attribute.val.launchCompletionEvent.flags = 0;
    } else {
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = options.started != nullptr || options.early ? 1 : 0;
#endif
    check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace moe_ep
