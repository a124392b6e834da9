#include <algorithm>
#include <cstdint>

#include "device/rows.cuh"
#include "host/cuda_check.h"
#include "kernels/weigh.h"

// A warp takes a row at a time: what is read of it and of its gradient is used for both results.
namespace moe_ep {
namespace {

using device::kAllLanes;
using device::kWarpSize;

constexpr int kWarps = 8;
constexpr int kUnroll = 4;

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize) weigh_rows(const __grid_constant__ WeighParams params) {
    using Sum = device::SumOf<T>;
    constexpr int kCount = device::ElementsOf<T>::kCount;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t num_vectors = params.hidden / kCount;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; row < params.num_rows;
         row += stride) {
        const auto* grads = reinterpret_cast<const uint4*>(params.grads) + row * num_vectors;
        const auto* rows = reinterpret_cast<const uint4*>(params.rows) + row * num_vectors;
        auto* out = reinterpret_cast<uint4*>(params.out_rows) + row * num_vectors;
        const Sum weight = reinterpret_cast<const Sum*>(params.weights)[row];
        Sum sum = 0;
        for (int64_t first = lane; first < num_vectors; first += kUnroll * kWarpSize) {
            device::Vector<T> grad[kUnroll], value[kUnroll];
#pragma unroll
            for (int step = 0; step < kUnroll; ++step) {
                const int64_t at = first + step * kWarpSize;
                if (at >= num_vectors) break;
                grad[step].words = ptx::load_once(grads + at);
                value[step].words = ptx::load_once(rows + at);
            }
#pragma unroll
            for (int step = 0; step < kUnroll; ++step) {
                const int64_t at = first + step * kWarpSize;
                if (at >= num_vectors) break;
                Sum weighted[kCount];
#pragma unroll
                for (int idx = 0; idx < kCount; ++idx) {
                    const Sum one = device::to_float(grad[step].elements[idx]);
                    weighted[idx] = one * weight;
                    sum += one * device::to_float(value[step].elements[idx]);
                }
                out[at] = device::pack<T>(weighted);
            }
        }
#pragma unroll
        for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane == 0) reinterpret_cast<Sum*>(params.out_weights)[row] = sum;
    }
}

template <class T>
void launch(const WeighParams& params, cudaStream_t stream) {
    // A few rows per warp: enough in flight for the memory of any GPU, and no row waits for many.
    constexpr int64_t kMostBlocks = 2048;
    const int64_t blocks = std::min((params.num_rows + kWarps - 1) / kWarps, kMostBlocks);
    weigh_rows<T><<<static_cast<unsigned>(blocks), kWarps * kWarpSize, 0, stream>>>(params);
    check_cuda(cudaGetLastError(), "weigh_rows");
}

}  // namespace

void launch_weigh(const WeighParams& params, void* stream) {
    if (params.num_rows == 0) return;
    const auto on = static_cast<cudaStream_t>(stream);
    switch (params.element) {
        case Element::kBf16:
            return launch<__nv_bfloat16>(params, on);
        case Element::kHalf:
            return launch<__half>(params, on);
        case Element::kFloat:
            return launch<float>(params, on);
        case Element::kDouble:
            return launch<double>(params, on);
    }
}

}  // namespace moe_ep
