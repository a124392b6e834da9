#pragma once

#include <cuda_runtime_api.h>

#include "host/cuda_check.h"

namespace moe_ep {

// Makes `device` the calling thread's device while it lives, with a context, and lets this thread allocate and free
// while another captures a graph.
class DeviceScope {
public:
    explicit DeviceScope(int device) : device_(device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        if (previous_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
        cudaThreadExchangeStreamCaptureMode(&capture_mode_);
        const cudaError_t status = cudaFree(nullptr);
        if (status != cudaSuccess) leave();
        check_cuda(status, "cudaFree");
    }
    ~DeviceScope() { leave(); }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

private:
    void leave() {
        cudaThreadExchangeStreamCaptureMode(&capture_mode_);
        if (previous_ != device_) cudaSetDevice(previous_);
    }

    int device_, previous_ = 0;
    cudaStreamCaptureMode capture_mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace moe_ep
