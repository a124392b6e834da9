#pragma once

#include <cstdint>

#include "device/opening.cuh"
#include "kernels/exchange.h"

// What a dispatch tells its peers when it opens, and what follows from what they tell: the plan's table, and the sizes.
namespace moe_ep::opening {

using device::kAllLanes;
using device::kWarpSize;

constexpr int kThreads = 512;

__device__ inline int num_count_words(const OpenParams& params) {
    return 1 + params.num_experts + params.link.num_ranks;
}

// What all ranks have told: number of tokens, choices per expert, tokens per rank. Kept in shared memory where it fits,
// else read where it came; one way of reading serves both, as little code as may be.
class CountMatrix {
public:
    // `shared`: null where there is no room.
    __device__ CountMatrix(const OpenParams& params, uint64_t epoch, int32_t* shared)
        : params_(params), own_(params.link.arena(params.link.rank)), epoch_(epoch), shared_(shared) {
        if (shared != nullptr) {
            words_ = shared;
            source_stride_ = num_count_words(params);
            word_stride_ = 1;
            return;
        }
        const uint64_t* first = own_.opening_from(0, epoch);
        const int64_t between = params.link.num_ranks > 1 ? own_.opening_from(1, epoch) - first : 0;
        // The lower half of a word that has come is the number.
        words_ = reinterpret_cast<const int32_t*>(first + kHeaderWords);
        source_stride_ = 2 * between;
        word_stride_ = 2;
    }

    static int64_t num_shared_bytes(const OpenParams& params) {
        const int64_t words = 1 + params.num_experts + params.link.num_ranks;
        return params.link.num_ranks * words * static_cast<int64_t>(sizeof(int32_t));
    }

    __device__ int32_t num_tokens(int source) const { return at(source, 0); }
    __device__ int32_t choices(int source, int expert) const { return at(source, 1 + expert); }
    __device__ int32_t rows(int source, int rank) const { return at(source, 1 + params_.num_experts + rank); }
    // Choices of an expert by the ranks before `end`.
    __device__ __noinline__ int32_t choices_before(int end, int expert) const {
        int32_t sum = 0;
#pragma unroll 4
        for (int source = 0; source < end; ++source) sum += choices(source, expert);
        return sum;
    }

    // Waits for the messages of all peers. Called by a whole block; returns on all threads whether the exchange goes
    // on.
    __device__ bool receive() const {
        const Link& link = params_.link;
        // Headers first: a peer that is elsewhere tells no counts.
        if (!device::receive_headers(link, params_.header, epoch_)) return false;
        // Most words have come by now, and those of several peers are on their way at once.
        const int num_words = num_count_words(params_), end = link.num_ranks * num_words;
        bool good = true;
        int missing = end;
        for (int at = static_cast<int>(threadIdx.x), peer = 0, word = at; at < end; at += kThreads, word += kThreads) {
            for (; word >= num_words; word -= num_words) ++peer;
            const uint64_t stamped = ptx::load_relaxed_sys(own_.opening_from(peer, epoch_) + kHeaderWords + word);
            if (shared_ != nullptr) shared_[at] = static_cast<int32_t>(stamped);
            if (!device::is_of_exchange(stamped, epoch_)) missing = min(missing, at);
        }
#pragma unroll 1
        for (int at = missing; at < end && good; at += kThreads) {
            int32_t value;
            good = device::wait_for_opening(link, at / num_words, kHeaderWords + at % num_words, epoch_, value);
            if (shared_ != nullptr) shared_[at] = value;
        }
        return __syncthreads_and(good) != 0;
    }

private:
    __device__ int32_t at(int source, int word) const { return words_[source * source_stride_ + word * word_stride_]; }

    const OpenParams& params_;
    const ArenaLayout own_;
    const uint64_t epoch_;
    int32_t* const shared_;
    const volatile int32_t* words_;  // peers have written them while this kernel ran
    int64_t source_stride_;
    int word_stride_;
};

// Stores this rank's message into every arena, its own included. Called by a whole block that has seen the counts.
__device__ inline void send_counts(const OpenParams& params, uint64_t epoch) {
    const Link& link = params.link;
    const int num_words = kHeaderWords + num_count_words(params);
    // What this rank has read of its arena before comes first.
    ptx::fence_acq_rel_sys();
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < num_words; at += kThreads) {
        const int count = at - kHeaderWords;
        int32_t value = static_cast<int32_t>(params.num_tokens);
        if (count < 0) {
            value = params.header[at];
        } else if (count > params.num_experts) {
            value = params.tokens_per_rank[count - 1 - params.num_experts];
        } else if (count > 0) {
            value = params.choices_per_expert[count - 1];
        }
        for (int peer = 0; peer < link.num_ranks; ++peer) device::store_opening_word(link, peer, at, value, epoch);
    }
}

__device__ __noinline__ inline int32_t round_up(int32_t count, int32_t alignment) {
    return (count + alignment - 1) / alignment * alignment;
}

// Exclusive sums over up to kThreads * n values, in place in shared memory; returns the total on all threads.
__device__ __noinline__ inline int32_t exclusive_sums(int32_t* values, int count) {
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
        const int32_t of_warp = lane < kThreads / kWarpSize ? warp_sums[lane] : 0;
        const int32_t before = carry + __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
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
__device__ inline Need fit_capacity(const OpenParams& params, const CountMatrix& counts, int32_t* wanted) {
    __shared__ int32_t needed[kMaxNodeRanks], choices[kMaxNodeRanks];
    __shared__ Need need;
    const bool per_expert = params.capacity.per_expert > 0, compact = params.layout == Layout::kCompact;
    if (!per_expert && params.capacity.rows == 0) return {-1, 0, 0};
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll 1
    for (int rank = warp; rank < num_ranks; rank += kThreads / kWarpSize) {
        int32_t sum = 0, most = 0, rows = 0;
#pragma unroll 1
        for (int expert = lane; expert < local; expert += kWarpSize) {
            const int32_t count = wanted[rank * local + expert];
            sum += count;
            most = max(most, count);
            rows += round_up(count, params.alignment);
        }
        if (!per_expert && compact) rows = lane < num_ranks ? counts.rows(lane, rank) : 0;
        sum = __reduce_add_sync(kAllLanes, sum);
        most = __reduce_max_sync(kAllLanes, most);
        rows = __reduce_add_sync(kAllLanes, rows);
        if (lane != 0) continue;
        choices[rank] = sum;
        needed[rank] = per_expert ? most : rows;
    }
    __syncthreads();
    const int64_t limit = per_expert ? params.capacity.per_expert : params.capacity.rows;
    if (threadIdx.x == 0) {
        need = {-1, 0, 0};
        for (int rank = num_ranks - 1; rank >= 0; --rank) {
            if (needed[rank] > limit) need = {rank, needed[rank], static_cast<int32_t>(limit)};
        }
    }
    // Room for padding first, so that the kept groups fit however their sizes round up.
    const int64_t usable = limit - static_cast<int64_t>(local) * (params.alignment - 1);
#pragma unroll 1
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        if (per_expert) {
            wanted[expert] = min(wanted[expert], static_cast<int32_t>(limit));
            continue;
        }
        const int rank = expert / local;
        if (needed[rank] > limit) {
            wanted[expert] = static_cast<int32_t>(usable * wanted[expert] / max(choices[rank], 1));
        }
    }
    __syncthreads();
    return need;
}

// For each expert, how many of this rank's choices are among those it keeps: the first ones by (source, token).
__device__ inline void write_kept(const OpenParams& params, const CountMatrix& counts, const int32_t* keep,
                                  const PlanTable& table) {
#pragma unroll 1
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        table.keep_choices[expert] = max(keep[expert] - counts.choices_before(params.link.rank, expert), 0);
    }
}

// Running sums over sources of the rows that every rank receives.
__device__ inline void write_rank_rows(const OpenParams& params, const CountMatrix& counts, const PlanTable& table) {
    const int num_ranks = params.link.num_ranks;
    if (threadIdx.x >= num_ranks) return;
    int32_t received = 0;
    for (int source = 0; source < num_ranks; ++source) {
        received += counts.rows(source, static_cast<int>(threadIdx.x));
        table.rank_rows[source * num_ranks + threadIdx.x] = received;
    }
}

// For every expert, the layout row of this rank's first choice, on the expert's rank; by the arithmetic of
// lay_out_groups. `wanted` holds [E] choices of all ranks, and is used up. Returns on all threads the layout rows of
// the rank with most.
__device__ inline int32_t write_direct_rows(const OpenParams& params, const CountMatrix& counts, const PlanTable& table,
                                            int32_t* wanted) {
    __shared__ int32_t most;
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    if (threadIdx.x == 0) most = 0;
    if (params.layout == Layout::kCompact) {
        __syncthreads();
        if (threadIdx.x < num_ranks) {
            int32_t received = 0;
            for (int source = 0; source < num_ranks; ++source) {
                received += counts.rows(source, static_cast<int>(threadIdx.x));
            }
            atomicMax(&most, received);
        }
        __syncthreads();
        return most;
    }
    const auto fixed = static_cast<int32_t>(params.capacity.per_expert);
    int32_t total = fixed * local;
    if (fixed == 0) {
#pragma unroll 1
        for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
            wanted[expert] = round_up(wanted[expert], params.alignment);
        }
        __syncthreads();
        total = exclusive_sums(wanted, params.num_experts);
        if (threadIdx.x < num_ranks) {
            const int rank = static_cast<int>(threadIdx.x);
            const int32_t end = rank + 1 < num_ranks ? wanted[(rank + 1) * local] : total;
            atomicMax(&most, end - wanted[rank * local]);
        }
        __syncthreads();
        total = most;
    }
#pragma unroll 1
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        const int first = expert / local * local;
        const int32_t row = fixed > 0 ? (expert - first) * fixed : wanted[expert] - wanted[first];
        table.direct_rows[expert] = row + counts.choices_before(params.link.rank, expert);
    }
    __syncthreads();
    return total;
}

// Lays out this rank's groups; returns the number of layout rows on all threads. `starts`: [E] words.
__device__ inline int32_t lay_out_groups(const OpenParams& params, const CountMatrix& counts, const PlanTable& table,
                                         int32_t* starts) {
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    const int first_expert = params.link.rank * local;
    const int64_t fixed = params.layout == Layout::kCompact ? 0 : params.capacity.per_expert;
    const auto group_rows = [&](int32_t count) {
        return fixed > 0 ? static_cast<int32_t>(fixed) : round_up(count, params.alignment);
    };
#pragma unroll 1
    for (int expert = threadIdx.x; expert < local; expert += kThreads) {
        const int32_t count = counts.choices_before(num_ranks, first_expert + expert);
        table.tokens_per_expert[expert] = count;
        params.told_tokens[expert] = count;
        if (params.received_total != nullptr) {
            // Nobody else writes it; the sum is made by the memory, so that nothing here waits for it.
            atomicAdd(reinterpret_cast<unsigned long long*>(params.received_total + expert),
                      static_cast<unsigned long long>(count));
        }
        if (params.host_counts != nullptr) params.host_counts[expert] = count;
        starts[expert] = group_rows(count);
    }
    __syncthreads();
    const int32_t num_rows = exclusive_sums(starts, local);
#pragma unroll 1
    for (int expert = threadIdx.x; expert < local; expert += kThreads) {
        const int32_t begin = starts[expert];
        int32_t row = begin;
#pragma unroll 1
        for (int source = 0; source < num_ranks; ++source) {
            table.expert_rows[source * local + expert] = row;
            row += counts.choices(source, first_expert + expert);
        }
        // A slab's rows behind the last real one are nobody's: its groups end where its choices do.
        const int32_t end = begin + group_rows(row - begin);
        table.expert_ends[expert] = end;
        params.told_ends[expert] = end;
    }
    return num_rows;
}

// `wanted`: [E] words of shared memory.
__device__ inline void plan_dispatch(const OpenParams& params, const CountMatrix& counts, int32_t* wanted) {
    const Link& link = params.link;
    const PlanTable table(params.table, link.num_ranks, params.num_experts);
#pragma unroll 1
    for (int expert = threadIdx.x; expert < params.num_experts; expert += kThreads) {
        wanted[expert] = counts.choices_before(link.num_ranks, expert);
    }
    __syncthreads();
    const Need need = fit_capacity(params, counts, wanted);
    if (threadIdx.x < link.num_ranks && params.max_tokens > 0) {
        const int32_t tokens = counts.num_tokens(static_cast<int>(threadIdx.x));
        if (tokens > params.max_tokens) {
            device::report(link, Trouble::kTooManyTokens, static_cast<int>(threadIdx.x), Phase::kOpening,
                           static_cast<uint64_t>(params.max_tokens), static_cast<uint64_t>(tokens));
        }
    }
    write_kept(params, counts, wanted, table);
    write_rank_rows(params, counts, table);
    __syncthreads();
    const int32_t most_rows = params.direct == 0 ? 0 : write_direct_rows(params, counts, table, wanted);
    const bool poisoned = need.rank >= 0 && params.capacity.drop == 0;
    const int32_t num_rows = lay_out_groups(params, counts, table, wanted);
    if (threadIdx.x >= kWarpSize) return;
    const int lane = static_cast<int>(threadIdx.x);
    int32_t tokens = 0, rows = 0;
    if (lane < link.num_ranks) {
        tokens = counts.num_tokens(lane);
        rows = counts.rows(lane, link.rank);
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

}  // namespace moe_ep::opening
