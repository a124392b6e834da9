#include "host/cuda/event.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <unordered_map>
#include <vector>

#include "host/cuda_check.h"

namespace moe_ep {

namespace {

cudaStream_t stream_of(uintptr_t stream) {
    return reinterpret_cast<cudaStream_t>(stream);
}
cudaEvent_t event_of(void* event) {
    return static_cast<cudaEvent_t>(event);
}

// Events that nobody uses, by device. They are never destroyed: a process that ends may have taken the context down.
struct Pool {
    std::mutex mutex;
    std::unordered_map<int, std::vector<cudaEvent_t>> free;
};

Pool& pool() {
    static Pool* const pool = new Pool;
    return *pool;
}

// Whether a stream is capturing; `beside` for the default stream while another one is.
bool is_capturing(cudaStream_t stream, bool beside) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
    // The next launch's check must not find the error.
    cudaGetLastError();
    return beside;
}

}  // namespace

Event::Event() {
    check_cuda(cudaGetDevice(&device_), "cudaGetDevice");
    {
        const std::lock_guard<std::mutex> lock(pool().mutex);
        std::vector<cudaEvent_t>& free = pool().free[device_];
        if (!free.empty()) {
            event_ = free.back();
            free.pop_back();
            return;
        }
    }
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    event_ = event;
}

// Nobody is told of errors here: a process that ends may have taken the context down before.
Event::~Event() {
    if (captured_) {
        cudaEventDestroy(event_of(event_));
        return;
    }
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().free[device_].push_back(event_of(event_));
}

void Event::record(uintptr_t stream) {
    captured_ = captured_ || is_capturing(stream_of(stream), true);
    check_cuda(cudaEventRecord(event_of(event_), stream_of(stream)), "cudaEventRecord");
}

void* Event::handle(uintptr_t stream) {
    captured_ = captured_ || is_capturing(stream_of(stream), true);
    return event_;
}

void Event::wait(uintptr_t stream) {
    check_cuda(cudaStreamWaitEvent(stream_of(stream), event_of(event_), 0), "cudaStreamWaitEvent");
}

void Event::follow(uintptr_t first, uintptr_t then) {
    if (is_capturing(stream_of(then), false) && !is_capturing(stream_of(first), false)) return;
    order(first, then);
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
