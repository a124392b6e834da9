#include <cstdint>

#include "device/pipe.cuh"
#include "host/cuda_check.h"
#include "kernels/push.h"

// Every warp copies pieces through its own pipe; neighbouring pieces go to different targets, so that all links are
// busy from the first piece to the last.
namespace moe_ep {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = device::kFewPipes.num_warps, kStageBytes = device::kFewPipes.stage_bytes;
constexpr int kPipeBytes = device::kPipeStages * kStageBytes;
constexpr int kBarrierBytes = kWarps * device::kPipeStages * static_cast<int>(sizeof(uint64_t));
constexpr int kSharedBytes = kWarps * kPipeBytes + kBarrierBytes;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Walks the pieces of one warp, skipping those behind the end of a shorter target.
class PieceCursor {
public:
    __device__ PieceCursor(const PushParams& params, int64_t first, int64_t stride)
        : params_(params), item_(first), stride_(stride), end_(params.max_pieces * params.num_targets) {
        find_piece();
    }

    __device__ bool is_done() const { return item_ >= end_; }
    __device__ const std::byte* from() const { return target().from + offset(); }
    __device__ std::byte* to() const { return target().to + offset(); }
    __device__ uint32_t num_bytes() const {
        const int64_t left = target().num_bytes - offset();
        return static_cast<uint32_t>(left < kStageBytes ? left : kStageBytes);
    }
    __device__ void advance() {
        item_ += stride_;
        find_piece();
    }

private:
    __device__ const PushTarget& target() const { return params_.targets[item_ % params_.num_targets]; }
    __device__ int64_t offset() const { return item_ / params_.num_targets * kStageBytes; }
    __device__ void find_piece() {
        while (!is_done() && offset() >= target().num_bytes) item_ += stride_;
    }

    const PushParams& params_;
    int64_t item_;
    const int64_t stride_, end_;
};

// Loads run ahead of stores by all stages but one. Called by one thread of a warp.
__device__ void push_pieces(const PushParams& params, device::BulkPipe& pipe, int64_t first, int64_t stride) {
    PieceCursor load(params, first, stride), store = load;
    while (!store.is_done()) {
        while (!load.is_done() && !pipe.is_full()) {
            pipe.load(load.from(), load.num_bytes());
            load.advance();
        }
        ptx::bulk_store(store.to(), pipe.front(), store.num_bytes());
        pipe.pop();
        store.advance();
    }
    ptx::wait_bulk_stores<0>();
}

#endif

__global__ void __launch_bounds__(kWarps* kWarpSize) push(const __grid_constant__ PushParams params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) std::byte memory[];
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (threadIdx.x % kWarpSize != 0) return;
    auto* barriers = reinterpret_cast<uint64_t*>(memory + kWarps * kPipeBytes);
    device::BulkPipe pipe(memory + warp * kPipeBytes, barriers + warp * device::kPipeStages, kStageBytes);
    pipe.init();
    // Neighbouring pieces go to different SMs.
    push_pieces(params, pipe, blockIdx.x + static_cast<int64_t>(warp) * gridDim.x,
                static_cast<int64_t>(gridDim.x) * kWarps);
#endif
}

}  // namespace

void launch_push(PushParams params, int num_sms, void* stream) {
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    if (major < 9) throw NotBuiltError("push: bulk copies need a GPU since Hopper (compute capability 9.0)");
    params.max_pieces = 0;
    for (int idx = 0; idx < params.num_targets; ++idx) {
        const int64_t pieces = (params.targets[idx].num_bytes + kStageBytes - 1) / kStageBytes;
        if (pieces > params.max_pieces) params.max_pieces = pieces;
    }
    if (params.max_pieces == 0) return;
    check_cuda(cudaFuncSetAttribute(push, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "cudaFuncSetAttribute(push)");
    push<<<num_sms, kWarps * kWarpSize, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(params);
    check_cuda(cudaGetLastError(), "push");
}

}  // namespace moe_ep
