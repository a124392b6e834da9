#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/exchange.h"
#include "kernels/open_counts.cuh"
#include "kernels/plan_tokens.cuh"

// Plans this rank's tokens and opens their exchange in one launch. Blocks count chunks of tokens, tell their sums, and
// number the tokens once those before have told theirs. The last block has no tokens: it adds up the sums, tells all
// peers, and derives from the count matrix what all ranks must agree on. Blocks wait for those before them alone, which
// have started before them: none waits for one that does not run. A dispatch that is launched early sends from when all
// have numbered their tokens.
namespace moe_ep {
namespace {

using namespace opening;
using namespace planning;

// Called by whole blocks that have written their sums.
__device__ void tell_counted(const Link& link, uint64_t epoch) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    ptx::store_relaxed_gpu(&link.state->counted[blockIdx.x], epoch);
}

// Waits until the first blocks have told their sums. Called by whole blocks; returns on all threads whether they have.
__device__ bool wait_for_counts(const Link& link, uint64_t epoch, int num_blocks) {
    bool good = true;
    if (static_cast<int>(threadIdx.x) < num_blocks) {
        good = device::wait_for_block(link, &link.state->counted[threadIdx.x], epoch);
    }
    return __syncthreads_and(good) != 0;
}

__device__ inline void store_everywhere(const Link& link, int word, int32_t value, uint64_t epoch) {
    for (int peer = 0; peer < link.num_ranks; ++peer) device::store_opening_word(link, peer, word, value, epoch);
}

// Adds up what all blocks have counted, keeps the totals, and stores them into every arena as the rest of this rank's
// message. Called by a whole block.
__device__ void send_counts(const PlanLaunch& plan, const OpenParams& open, uint64_t epoch) {
    const int num_columns = plan.params.num_experts + plan.params.num_ranks;
    // Where rows go by a mask, the caller has counted for the experts.
    const bool has_choices = open.choices_per_expert == plan.params.choices_per_expert;
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x); column < num_columns; column += kThreads) {
        int32_t total = 0;
#pragma unroll 8
        for (int block = 0; block < plan.num_blocks; ++block) {
            total += __ldcg(plan.sums + block * num_columns + column);
        }
        write_total(plan.params, column, total);
        const int rank = column - plan.params.num_experts;
        if (rank < 0 && !has_choices) continue;
        store_everywhere(open.link, kHeaderWords + 1 + (rank < 0 ? column : open.num_experts + rank), total, epoch);
    }
    if (has_choices) return;
#pragma unroll 1
    for (int expert = static_cast<int>(threadIdx.x); expert < open.num_experts; expert += kThreads) {
        store_everywhere(open.link, kHeaderWords + 1 + expert, open.choices_per_expert[expert], epoch);
    }
}

// Opens the exchange and derives its plan, or says why not. Called by the last block.
__device__ void open_dispatch(const PlanLaunch& plan, const OpenParams& open, uint64_t epoch, void* memory,
                              bool keeps_matrix) {
    const Link& link = open.link;
    int32_t* matrix = keeps_matrix ? static_cast<int32_t*>(memory) : nullptr;
    const CountMatrix counts(open, epoch, matrix);
    const int num_words = keeps_matrix ? link.num_ranks * num_count_words(open) : 0;
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word < num_words; word += kThreads) matrix[word] = 0;
    __syncthreads();
    // Code that has not run for long takes longer to load than to run: while tokens are counted, the planning runs once
    // without effect.
    bool good = true;
#pragma unroll 1
    for (bool rehearses = true;; rehearses = false) {
        if (!rehearses) {
            // Headers first: a peer that is elsewhere tells no counts.
            good = device::receive_headers(link, open.header, epoch);
            if (good) {
                if (!wait_for_counts(link, epoch, plan.num_blocks)) return;
                send_counts(plan, open, epoch);
                good = counts.receive();
            }
        }
        if (good) plan_dispatch(open, counts, rehearses);
        if (!rehearses) break;
    }
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
__global__ void __launch_bounds__(kThreads)
    count_tokens(const __grid_constant__ PlanLaunch plan, const __grid_constant__ OpenParams open,
                 const __grid_constant__ bool keeps_matrix) {
    extern __shared__ uint4 memory[];
    const Link& link = open.link;
    if (device::has_failed_for_block(link)) return;
    const uint64_t epoch = link.state->epoch + 1;
    const bool opens = static_cast<int>(blockIdx.x) == plan.num_blocks;
    if (opens) send_header(open, epoch);
    device::note_counting(link, epoch);
    if (opens) return open_dispatch(plan, open, epoch, memory, keeps_matrix);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const bool has_tokens = warp < plan.num_warps;
    const PlanShared shared = shared_of(plan, memory, has_tokens ? warp : 0);
    const TokenRange chunk = chunk_range(plan);
    if (has_tokens) clear_counts(plan.params, shared);
#pragma unroll 1
    for (bool places = false;; places = true) {
        if (has_tokens) walk_chunk<Index>(plan, shared, chunk, places);
        if (places) break;
        sum_warps(plan, memory, true);
        tell_counted(link, epoch);
        if (!wait_for_counts(link, epoch, static_cast<int>(blockIdx.x))) return;
        add_blocks(plan, memory, false);
    }
    device::note_numbered(link, epoch);
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
    const auto matrix_bytes = static_cast<size_t>(CountMatrix::num_shared_bytes(open));
    const bool keeps_matrix = matrix_bytes <= PlanGrid::kMaxSharedBytes;
    const size_t shared_bytes = std::max(plan.shared_bytes(), keeps_matrix ? matrix_bytes : 0);
    dispatch_value<4, 8>("index_bytes", params.index_bytes, [&](auto index_bytes) {
        using Index = std::conditional_t<index_bytes == 4, int32_t, int64_t>;
        const auto num_blocks = static_cast<unsigned>(plan.num_blocks + 1);
        count_tokens<Index>
            <<<num_blocks, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(plan, open, keeps_matrix);
    });
    check_cuda(cudaGetLastError(), "count_tokens");
}

}  // namespace moe_ep
