#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "host/errors.h"

namespace moe_ep {

// Raises LibraryError naming the call, unless it succeeded.
inline void check_cuda(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    // What is raised here must not be found again by the next launch's check.
    cudaGetLastError();
    throw LibraryError(std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

}  // namespace moe_ep
