#include <nvshmem.h>
#include <nvshmemx.h>

#include "device/ptx.cuh"
#include "host/cuda_check.h"
#include "internode/ring_exchange.h"

namespace moe_ep {
namespace {

constexpr int kNumThreads = 256;

// Any two ranks and positions differ, so that a word of another rank or place is found out.
__device__ uint64_t word_of(int pe, int64_t word_idx) {
    return (static_cast<uint64_t>(pe + 1) << 40) + word_idx;
}

__device__ void send_words(const RingParams& params, const RingLayout& layout) {
    const Buffer<uint64_t> send = layout.words.send_to(0);
    for (int64_t i = threadIdx.x; i < params.num_words; i += kNumThreads) send[i] = word_of(params.my_pe, i);
    __syncthreads();
    nvshmemx_putmem_signal_nbi_block(layout.words.received_from(0).ptr, send.ptr, params.num_words * sizeof(uint64_t),
                                     layout.arrived.ptr, 1, NVSHMEM_SIGNAL_SET, (params.my_pe + 1) % params.num_pes);
}

// Tells whether the words came in time.
__device__ bool wait_for_words(const RingParams& params, const RingLayout& layout) {
    const uint64_t deadline = ptx::global_nanoseconds() + params.timeout_nanoseconds;
    while (nvshmem_signal_fetch(layout.arrived.ptr) == 0) {
        if (ptx::global_nanoseconds() > deadline) return false;
    }
    return true;
}

__global__ void __launch_bounds__(kNumThreads) exchange(const __grid_constant__ RingParams params) {
    __shared__ bool in_time;
    const RingLayout layout(params.symmetric, params.num_words);
    send_words(params, layout);
    if (threadIdx.x == 0) {
        in_time = wait_for_words(params, layout);
        // Acquire: the words were made visible before the flag, and are read after it by all threads of the block.
        __threadfence_system();
        if (!in_time) *params.result = kRingTimeout;
    }
    __syncthreads();
    if (!in_time) return;
    const int source = (params.my_pe + params.num_pes - 1) % params.num_pes;
    const Buffer<uint64_t> received = layout.words.received_from(0);
    for (int64_t first = 0; first < params.num_words; first += kNumThreads) {
        const int64_t i = first + threadIdx.x;
        const int num_wrong = __syncthreads_count(i < params.num_words && received[i] != word_of(source, i));
        if (threadIdx.x == 0) *params.result += num_wrong;
    }
    // The source of the put is this rank's own memory: nobody may free it before the transfer has left it.
    if (threadIdx.x == 0) nvshmem_quiet();
}

}  // namespace

void launch_ring_exchange(const RingParams& params, void* stream) {
    exchange<<<1, kNumThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    check_cuda(cudaGetLastError(), "ring exchange");
}

}  // namespace moe_ep
