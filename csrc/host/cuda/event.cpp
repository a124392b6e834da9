#include "host/cuda/event.h"

#include <cuda_runtime_api.h>

#include "host/cuda_check.h"

namespace moe_ep {

namespace {

cudaStream_t stream_of(uintptr_t stream) {
    return reinterpret_cast<cudaStream_t>(stream);
}
cudaEvent_t event_of(void* event) {
    return static_cast<cudaEvent_t>(event);
}

}  // namespace

Event::Event() {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    event_ = event;
}

// Nobody is told of errors here: a process that ends may have taken the context down before.
Event::~Event() {
    cudaEventDestroy(event_of(event_));
}

void Event::record(uintptr_t stream) {
    check_cuda(cudaEventRecord(event_of(event_), stream_of(stream)), "cudaEventRecord");
}

void Event::wait(uintptr_t stream) {
    check_cuda(cudaStreamWaitEvent(stream_of(stream), event_of(event_), 0), "cudaStreamWaitEvent");
}

bool Event::query() {
    const cudaError_t status = cudaEventQuery(event_of(event_));
    if (status == cudaErrorNotReady) {
        // No error, but the next launch's check would find it.
        cudaGetLastError();
        return false;
    }
    check_cuda(status, "cudaEventQuery");
    return true;
}

}  // namespace moe_ep
