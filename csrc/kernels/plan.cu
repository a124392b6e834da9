#include <cooperative_groups.h>

#include <cstdint>
#include <type_traits>

#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/plan.h"
#include "kernels/plan_tokens.cuh"

namespace moe_ep {
namespace {

using namespace planning;

template <class Index>
__global__ void __launch_bounds__(PlanGrid::kMaxWarps* kWarpSize)
    plan_tokens(const __grid_constant__ PlanLaunch launch) {
    extern __shared__ uint4 memory[];
    const PlanShared shared = shared_of(launch, memory, static_cast<int>(threadIdx.x) / kWarpSize);
    const TokenRange chunk = chunk_range(launch);
    clear_counts(launch.params, shared);
#pragma unroll 1
    for (bool places = false;; places = true) {
        walk_chunk<Index>(launch, shared, chunk, places);
        if (places) return;
        sum_warps(launch, memory, launch.num_blocks > 1);
        // A grid of one block is not launched cooperatively.
        if (launch.num_blocks > 1) cooperative_groups::this_grid().sync();
        add_blocks(launch, memory, static_cast<int>(blockIdx.x) == launch.num_blocks - 1);
    }
}

template <class Index>
void launch_kernel(const PlanParams& params, cudaStream_t stream) {
    PlanLaunch launch(params);
    const auto threads = static_cast<unsigned>(launch.num_warps * kWarpSize);
    if (launch.num_blocks == 1) {
        plan_tokens<Index><<<1, threads, launch.shared_bytes(), stream>>>(launch);
        check_cuda(cudaGetLastError(), "plan_tokens");
        return;
    }
    void* arguments[] = {&launch};
    check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(plan_tokens<Index>),
                                           dim3(static_cast<unsigned>(launch.num_blocks)), dim3(threads), arguments,
                                           launch.shared_bytes(), stream),
               "plan_tokens");
}

// Allows a kernel the shared memory of the largest sizes, and loads it.
template <class Index>
void prepare_kernel() {
    check_cuda(cudaFuncSetAttribute(plan_tokens<Index>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(PlanGrid::kMaxSharedBytes)),
               "cudaFuncSetAttribute(plan_tokens)");
}

}  // namespace

void prepare_plan() {
    prepare_kernel<int32_t>();
    prepare_kernel<int64_t>();
}

void launch_plan(const PlanParams& params, void* stream) {
    dispatch_value<4, 8>("index_bytes", params.index_bytes, [&](auto index_bytes) {
        launch_kernel<std::conditional_t<index_bytes == 4, int32_t, int64_t>>(params,
                                                                              static_cast<cudaStream_t>(stream));
    });
}

}  // namespace moe_ep
