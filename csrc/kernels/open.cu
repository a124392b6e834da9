#include <cstdint>

#include "device/link.cuh"
#include "host/cuda_check.h"
#include "kernels/exchange.h"
#include "kernels/plan.h"

// One block opens an exchange: every rank stores its header and counts into every peer, waits for theirs, compares, and
// derives from the count matrix what all ranks must agree on. Peers that have come here have finished the exchange
// before, so its ring may be written again.
namespace moe_ep {
namespace {

using device::kAllLanes;
using device::kWarpSize;

constexpr int kThreads = 512;

// Words of one rank's opening message behind the header.
struct OpeningWords {
    const int32_t* words;
    int num_experts;

    __device__ int32_t num_tokens() const { return ptx::load_arena(words + kHeaderWords); }
    __device__ int32_t choices(int expert) const { return ptx::load_arena(words + kHeaderWords + 1 + expert); }
    __device__ int32_t rows_to(int rank) const {
        return ptx::load_arena(words + kHeaderWords + 1 + num_experts + rank);
    }
};

__device__ int32_t opening_word(const OpenParams& params, int word) {
    if (word < kHeaderWords) return params.header[word];
    word -= kHeaderWords;
    if (word == 0) return static_cast<int32_t>(params.num_tokens);
    word -= 1;
    if (word < params.num_experts) return params.choices_per_expert[word];
    return params.tokens_per_rank[word - params.num_experts];
}

// Stores this rank's message into every arena, its own included, and then the epoch.
__device__ void send_opening(const OpenParams& params, uint64_t epoch) {
    const Link& link = params.link;
    const int num_words =
        kHeaderWords + (params.choices_per_expert == nullptr ? 0 : 1 + params.num_experts + link.num_ranks);
    for (int word = threadIdx.x; word < num_words; word += kThreads) {
        const int32_t value = opening_word(params, word);
        for (int peer = 0; peer < link.num_ranks; ++peer) {
            link.arena(peer).opening_from(link.rank, epoch)[word] = value;
        }
    }
    __syncthreads();
    if (threadIdx.x < link.num_ranks) {
        // All threads' words come before the flag: the barrier makes them observed here, the fence carries them on.
        ptx::fence_acq_rel_sys();
        ptx::store_relaxed_sys(link.arena(threadIdx.x).opening_epoch.from(link.rank).ptr, epoch);
    }
}

// Waits for every peer's message and compares headers. Returns on all threads whether the exchange goes on.
__device__ bool receive_openings(const OpenParams& params, uint64_t epoch) {
    const Link& link = params.link;
    const ArenaLayout own = link.arena(link.rank);
    bool good = true;
    if (threadIdx.x < link.num_ranks) {
        const int peer = static_cast<int>(threadIdx.x);
        good = device::wait_for(link, own.opening_epoch.from(peer).ptr, epoch, peer, Phase::kOpening);
        if (good) {
            const int32_t* theirs = own.opening_from(peer, epoch);
            bool equal = true;
            for (int word = 0; word < kHeaderWords; ++word) {
                const bool compared = word != kHeaderStatus && word != kHeaderNote;
                equal = equal && (!compared || ptx::load_arena(theirs + word) == params.header[word]);
            }
            const bool aborted = ptx::load_arena(theirs + kHeaderStatus) != 0;
            good = equal && !aborted;
            if (!good) {
                device::report(link, aborted ? Trouble::kAborted : Trouble::kMismatch, peer, Phase::kOpening, epoch,
                               epoch, theirs, params.header);
            }
        }
    }
    return __syncthreads_and(good) != 0;
}

// Exclusive sums over up to kThreads * n values, in place in shared memory; returns the total on all threads.
__device__ int32_t exclusive_sums(int32_t* values, int count) {
    __shared__ int32_t warp_sums[kThreads / kWarpSize];
    __shared__ int32_t carry;
    if (threadIdx.x == 0) carry = 0;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    for (int first = 0; first < count; first += kThreads) {
        const int idx = first + static_cast<int>(threadIdx.x);
        const int32_t own = idx < count ? values[idx] : 0;
        const int32_t sum = device::inclusive_sum(own);
        if (lane == kWarpSize - 1) warp_sums[warp] = sum;
        __syncthreads();
        int32_t before = carry;
        for (int other = 0; other < warp; ++other) before += warp_sums[other];
        if (idx < count) values[idx] = before + sum - own;
        __syncthreads();
        if (threadIdx.x == kThreads - 1) carry = before + sum;
        __syncthreads();
    }
    return carry;
}

struct Need {
    int32_t rank, needed, given;
};

// Checks every rank's capacity against the count matrix, the same on all ranks. `wanted` holds [E] choices of all
// ranks, and afterwards how many of them each expert keeps. Returns the first rank in need, or rank -1.
__device__ Need fit_capacity(const OpenParams& params, const ArenaLayout& own, uint64_t epoch, int32_t* wanted) {
    __shared__ int32_t needed[kMaxNodeRanks], choices[kMaxNodeRanks];
    __shared__ Need need;
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    if (threadIdx.x < num_ranks) needed[threadIdx.x] = choices[threadIdx.x] = 0;
    if (threadIdx.x == 0) need = {-1, 0, 0};
    __syncthreads();
    const bool per_expert = params.capacity.per_expert > 0;
    if (!per_expert && params.capacity.rows == 0) return need;
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        const int rank = expert / local, count = wanted[expert];
        atomicAdd(&choices[rank], count);
        if (per_expert) {
            atomicMax(&needed[rank], count);
        } else if (params.layout != Layout::kCompact) {
            atomicAdd(&needed[rank], (count + params.alignment - 1) / params.alignment * params.alignment);
        }
    }
    if (!per_expert && params.layout == Layout::kCompact && threadIdx.x < num_ranks) {
#pragma unroll 4
        for (int source = 0; source < num_ranks; ++source) {
            needed[threadIdx.x] +=
                OpeningWords{own.opening_from(source, epoch), params.num_experts}.rows_to(threadIdx.x);
        }
    }
    __syncthreads();
    const int64_t limit = per_expert ? params.capacity.per_expert : params.capacity.rows;
    if (threadIdx.x == 0) {
        for (int rank = num_ranks - 1; rank >= 0; --rank) {
            if (needed[rank] > limit) need = {rank, needed[rank], static_cast<int32_t>(limit)};
        }
    }
    // Room for padding first, so that the kept groups fit however their sizes round up.
    const int64_t usable = limit - static_cast<int64_t>(local) * (params.alignment - 1);
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        const int rank = expert / local;
        if (per_expert) {
            wanted[expert] = min(wanted[expert], static_cast<int32_t>(limit));
        } else if (needed[rank] > limit) {
            wanted[expert] = static_cast<int32_t>(usable * wanted[expert] / max(choices[rank], 1));
        }
    }
    __syncthreads();
    return need;
}

// Sums the choices of all ranks for every expert.
__device__ void sum_choices(const OpenParams& params, const ArenaLayout& own, uint64_t epoch, int32_t* wanted) {
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        int32_t sum = 0;
#pragma unroll 4
        for (int source = 0; source < params.link.num_ranks; ++source) {
            sum += OpeningWords{own.opening_from(source, epoch), params.num_experts}.choices(expert);
        }
        wanted[expert] = sum;
    }
    __syncthreads();
}

// For each expert, how many of this rank's choices are among those it keeps: the first ones by (source, token).
__device__ void write_kept(const OpenParams& params, const ArenaLayout& own, uint64_t epoch, const int32_t* keep,
                           const PlanTable& table) {
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        int32_t before = 0;
#pragma unroll 4
        for (int source = 0; source < params.link.rank; ++source) {
            before += OpeningWords{own.opening_from(source, epoch), params.num_experts}.choices(expert);
        }
        table.keep_choices[expert] = max(keep[expert] - before, 0);
    }
}

// Running sums over sources of the rows that every rank receives.
__device__ void write_rank_rows(const OpenParams& params, const ArenaLayout& own, uint64_t epoch,
                                const PlanTable& table) {
    const int num_ranks = params.link.num_ranks;
    if (threadIdx.x >= num_ranks) return;
    int32_t received = 0;
    for (int source = 0; source < num_ranks; ++source) {
        received += OpeningWords{own.opening_from(source, epoch), params.num_experts}.rows_to(threadIdx.x);
        table.rank_rows[source * num_ranks + threadIdx.x] = received;
    }
}

// For every expert, the layout row of this rank's first choice, on the expert's rank; by the arithmetic of
// lay_out_groups. `counts` holds [E] choices of all ranks, and is used up. Returns on all threads the layout rows of
// the rank with most.
__device__ int32_t write_direct_rows(const OpenParams& params, const ArenaLayout& own, uint64_t epoch,
                                     const PlanTable& table, int32_t* counts) {
    __shared__ int32_t most;
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    if (threadIdx.x == 0) most = 0;
    if (params.layout == Layout::kCompact) {
        __syncthreads();
        if (threadIdx.x < num_ranks) atomicMax(&most, table.rank_rows[(num_ranks - 1) * num_ranks + threadIdx.x]);
        __syncthreads();
        return most;
    }
    const auto fixed = static_cast<int32_t>(params.capacity.per_expert);
    int32_t total = fixed * local;
    if (fixed == 0) {
        for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
            counts[expert] = (counts[expert] + params.alignment - 1) / params.alignment * params.alignment;
        }
        __syncthreads();
        total = exclusive_sums(counts, params.num_experts);
        if (threadIdx.x < num_ranks) {
            const int rank = static_cast<int>(threadIdx.x);
            const int32_t end = rank + 1 < num_ranks ? counts[(rank + 1) * local] : total;
            atomicMax(&most, end - counts[rank * local]);
        }
        __syncthreads();
        total = most;
    }
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        const int first = expert / local * local;
        int32_t row = fixed > 0 ? (expert - first) * fixed : counts[expert] - counts[first];
#pragma unroll 4
        for (int source = 0; source < params.link.rank; ++source) {
            row += OpeningWords{own.opening_from(source, epoch), params.num_experts}.choices(expert);
        }
        table.direct_rows[expert] = row;
    }
    __syncthreads();
    return total;
}

// Lays out this rank's groups; returns the number of layout rows on all threads.
__device__ int32_t lay_out_groups(const OpenParams& params, const ArenaLayout& own, uint64_t epoch,
                                  const PlanTable& table, int32_t* starts) {
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    const int first_expert = params.link.rank * local;
    const int64_t fixed = params.layout == Layout::kCompact ? 0 : params.capacity.per_expert;
    for (int expert = threadIdx.x; expert < local; expert += kThreads) {
        int32_t count = 0;
#pragma unroll 4
        for (int source = 0; source < num_ranks; ++source) {
            count += OpeningWords{own.opening_from(source, epoch), params.num_experts}.choices(first_expert + expert);
        }
        table.tokens_per_expert[expert] = count;
        params.told_tokens[expert] = count;
        if (params.received_total != nullptr) params.received_total[expert] += count;
        if (params.host_counts != nullptr) params.host_counts[expert] = count;
        starts[expert] = fixed > 0 ? static_cast<int32_t>(fixed)
                                   : (count + params.alignment - 1) / params.alignment * params.alignment;
        table.expert_ends[expert] = starts[expert];
    }
    __syncthreads();
    const int32_t num_rows = exclusive_sums(starts, local);
    for (int expert = threadIdx.x; expert < local; expert += kThreads) {
        int32_t row = starts[expert];
        // A slab's rows behind the last real one are nobody's: its groups end where its choices do.
        table.expert_ends[expert] += row;
        params.told_ends[expert] = table.expert_ends[expert];
#pragma unroll 4
        for (int source = 0; source < num_ranks; ++source) {
            table.expert_rows[source * local + expert] = row;
            row += OpeningWords{own.opening_from(source, epoch), params.num_experts}.choices(first_expert + expert);
        }
    }
    return num_rows;
}

__device__ void plan_dispatch(const OpenParams& params, uint64_t epoch, int32_t* shared_counts) {
    const Link& link = params.link;
    const ArenaLayout own = link.arena(link.rank);
    const PlanTable table(params.table, link.num_ranks, params.num_experts);
    sum_choices(params, own, epoch, shared_counts);
    const Need need = fit_capacity(params, own, epoch, shared_counts);
    if (threadIdx.x < link.num_ranks && params.max_tokens > 0) {
        const int32_t tokens = OpeningWords{own.opening_from(threadIdx.x, epoch), params.num_experts}.num_tokens();
        if (tokens > params.max_tokens) {
            device::report(link, Trouble::kTooManyTokens, static_cast<int>(threadIdx.x), Phase::kOpening,
                           static_cast<uint64_t>(params.max_tokens), static_cast<uint64_t>(tokens));
        }
    }
    write_kept(params, own, epoch, shared_counts, table);
    write_rank_rows(params, own, epoch, table);
    __syncthreads();
    const int32_t most_rows = params.direct == 0 ? 0 : write_direct_rows(params, own, epoch, table, shared_counts);
    const bool poisoned = need.rank >= 0 && params.capacity.drop == 0;
    const int32_t num_rows = lay_out_groups(params, own, epoch, table, shared_counts);
    if (threadIdx.x >= kWarpSize) return;
    const int lane = static_cast<int>(threadIdx.x);
    int32_t tokens = 0, rows = 0;
    if (lane < link.num_ranks) {
        const OpeningWords words{own.opening_from(lane, epoch), params.num_experts};
        tokens = words.num_tokens();
        rows = words.rows_to(link.rank);
        table.source_tokens[lane] = tokens;
    }
    const int32_t received = device::inclusive_sum(rows), most = __reduce_max_sync(kAllLanes, tokens);
    if (lane < link.num_ranks) table.source_rows[lane + 1] = received;
    if (lane == 0) table.source_rows[0] = 0;
    if (lane != link.num_ranks - 1) return;
    *table.most_tokens = most;
    *table.most_rows = most_rows;
    *table.overflow = poisoned;
    *params.told_overflow = poisoned;
    if (poisoned) {
        volatile StatusWords* status = link.status;
        status->overflow_rank = need.rank;
        status->overflow_needed = need.needed;
        status->overflow_given = need.given;
        __threadfence_system();
        status->overflowed = status->overflowed + 1;
    }
    if (params.sizes == nullptr) return;
    volatile SizeWords* sizes = params.sizes;
    sizes->num_rows = params.layout == Layout::kCompact ? received : num_rows;
    sizes->num_received = received;
    sizes->max_tokens = most;
    sizes->most_rows = most_rows;
    __threadfence_system();
}

__global__ void __launch_bounds__(kThreads) open_exchange(const __grid_constant__ OpenParams params) {
    extern __shared__ int32_t shared_counts[];
    const Link& link = params.link;
    if (device::has_failed(link)) return;
    const uint64_t epoch = link.state->epoch + 1;
    send_opening(params, epoch);
    const bool good = receive_openings(params, epoch);
    const bool plans = good && params.choices_per_expert != nullptr;
    if (plans) plan_dispatch(params, epoch, shared_counts);
    // What all threads have written, for the host and for kernels that it launches when it knows, comes before the
    // ticket: each makes its own words seen, the barrier gathers them.
    if (plans && params.sizes != nullptr) __threadfence_system();
    __syncthreads();
    if (threadIdx.x != 0) return;
    link.state->ticket = 0;
    link.state->epoch = epoch;
    if (!plans || params.sizes == nullptr) return;
    __threadfence_system();
    // The host reads the sizes, and launches what places rows on a stream of its own, once it has seen its ticket.
    *const_cast<volatile int64_t*>(&params.sizes->ticket) = params.ticket;
}

}  // namespace

void prepare_open() {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, open_exchange), "cudaFuncGetAttributes(open_exchange)");
}

std::string kernel_problem() {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, open_exchange);
    if (status == cudaSuccess) return "";
    // What is told here must not be found again by the next launch's check.
    cudaGetLastError();
    return cudaGetErrorString(status);
}

void prepare_kernels() {
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    // Earlier GPUs have neither the copy engine's instructions nor that much shared memory.
    const bool bulk = major >= 9;
    prepare_plan();
    prepare_open();
    prepare_dispatch(bulk);
    prepare_combine(bulk);
}

void launch_open(const OpenParams& params, void* stream) {
    const size_t shared_bytes = params.choices_per_expert == nullptr ? 0 : params.num_experts * sizeof(int32_t);
    open_exchange<<<1, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    check_cuda(cudaGetLastError(), "open_exchange");
}

}  // namespace moe_ep
