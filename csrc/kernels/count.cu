#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/exchange.h"
#include "kernels/open_counts.cuh"
#include "kernels/plan_tokens.cuh"

// Plans this rank's tokens and opens their exchange in one launch. The block that is the last to have counted tells all
// peers, numbers its own tokens while the messages are on their way, and then derives from the count matrix what all
// ranks must agree on. Other blocks wait for those before them alone, which have started before them: none waits for
// one that does not run.
namespace moe_ep {
namespace {

using namespace opening;
using namespace planning;

// Called by whole blocks that have told their sums; returns on all threads whether all blocks have.
__device__ bool tell_counted(const Link& link, uint64_t epoch) {
    __shared__ int last;
    __syncthreads();
    if (gridDim.x == 1) return true;
    if (threadIdx.x == 0) {
        __threadfence();
        ptx::store_relaxed_gpu(&link.state->counted[blockIdx.x], epoch);
        last = device::is_last_block(link) ? 1 : 0;
    }
    __syncthreads();
    return last != 0;
}

// Waits until the blocks before have told their sums. Called by whole blocks; returns on all threads whether they have.
__device__ bool wait_for_counts(const Link& link, uint64_t epoch) {
    bool good = true;
    if (threadIdx.x < blockIdx.x) {
        const uint64_t start = ptx::global_nanoseconds();
        uint64_t counted;
        while ((counted = ptx::load_acquire_gpu(&link.state->counted[threadIdx.x])) != epoch && good) {
            good = !device::has_failed(link);
            if (ptx::global_nanoseconds() - start <= link.timeout_ns) continue;
            device::report(link, Trouble::kTimeout, link.rank, Phase::kOpening, epoch, counted);
            good = false;
        }
    }
    return __syncthreads_and(good) != 0;
}

template <class Index>
__global__ void __launch_bounds__(kThreads)
    count_tokens(const __grid_constant__ PlanLaunch plan, const __grid_constant__ OpenParams open,
                 const __grid_constant__ bool keeps_matrix) {
    extern __shared__ uint4 memory[];
    const Link& link = open.link;
    if (device::has_failed(link)) return;
    const uint64_t epoch = link.state->epoch + 1;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const bool has_tokens = warp < plan.num_warps;
    const PlanShared shared = shared_of(plan, memory, has_tokens ? warp : 0);
    const TokenRange chunk = chunk_range(plan);
    if (has_tokens) clear_counts(plan.params, shared);
    bool opens = false;
#pragma unroll 1
    for (bool places = false;; places = true) {
        if (has_tokens) walk_chunk<Index>(plan, shared, chunk, places);
        if (places) break;
        sum_warps(plan, memory);
        opens = tell_counted(link, epoch);
        if (!opens && !wait_for_counts(link, epoch)) return;
        add_blocks(plan, memory, opens);
        if (opens) send_counts(open, epoch);
    }
    if (!opens) return;
    // The plan's counts in shared memory are used up.
    auto* wanted = reinterpret_cast<int32_t*>(memory);
    const CountMatrix counts(open, epoch, keeps_matrix ? wanted + open.num_experts : nullptr);
    __syncthreads();
    const bool good = counts.receive();
    if (good) plan_dispatch(open, counts, wanted);
    // What this block has written, for the host and for kernels that it launches when it knows, comes before the
    // ticket: each thread makes its own words seen, the barrier gathers them. Other blocks may still number their
    // tokens.
    const bool tells = good && open.sizes != nullptr;
    if (tells) __threadfence_system();
    __syncthreads();
    if (threadIdx.x != 0) return;
    device::note_opened(link, epoch);
    if (!tells) return;
    __threadfence_system();
    // The host reads the sizes, and launches what places rows on a stream of its own, once it has seen its ticket.
    *const_cast<volatile int64_t*>(&open.sizes->ticket) = open.ticket;
}

template <class Index>
void prepare_kernel() {
    check_cuda(cudaFuncSetAttribute(count_tokens<Index>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(PlanGrid::kMaxSharedBytes)),
               "cudaFuncSetAttribute(count_tokens)");
}

}  // namespace

void prepare_counting() {
    prepare_kernel<int32_t>();
    prepare_kernel<int64_t>();
}

void launch_count(const PlanParams& params, const OpenParams& open, void* stream) {
    const PlanLaunch plan(params);
    // The opening block keeps a word per expert there, and those of a mask are none of the plan's.
    const size_t expert_bytes = open.num_experts * sizeof(int32_t);
    const size_t matrix_bytes = expert_bytes + static_cast<size_t>(CountMatrix::num_shared_bytes(open));
    const bool keeps_matrix = matrix_bytes <= PlanGrid::kMaxSharedBytes;
    const size_t shared_bytes = std::max(plan.shared_bytes(), keeps_matrix ? matrix_bytes : expert_bytes);
    dispatch_value<4, 8>("index_bytes", params.index_bytes, [&](auto index_bytes) {
        using Index = std::conditional_t<index_bytes == 4, int32_t, int64_t>;
        const auto num_blocks = static_cast<unsigned>(plan.num_blocks);
        count_tokens<Index>
            <<<num_blocks, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(plan, open, keeps_matrix);
    });
    check_cuda(cudaGetLastError(), "count_tokens");
}

}  // namespace moe_ep
