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
    __device__ int32_t choices_before(int end, int expert) const {
        int32_t sum = 0;
#pragma unroll 4
        for (int source = 0; source < end; ++source) sum += choices(source, expert);
        return sum;
    }

    // Waits for the rest of the messages whose headers have come. Called by a whole block; returns on all threads
    // whether they have.
    __device__ bool receive() const {
        const Link& link = params_.link;
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

// Stores what of this rank's message is known beforehand into every arena, its own included: rows may come to this rank
// from then on. Called by a whole block.
__device__ inline void send_header(const OpenParams& params, uint64_t epoch) {
    const Link& link = params.link;
    device::send_header(link, params.header, epoch);
    if (threadIdx.x >= link.num_ranks) return;
    device::store_opening_word(link, static_cast<int>(threadIdx.x), kHeaderWords,
                               static_cast<int32_t>(params.num_tokens), epoch);
}

__device__ __noinline__ inline int32_t round_up_by_division(int32_t count, int32_t alignment) {
    return (count + alignment - 1) / alignment * alignment;
}

__device__ inline int32_t round_up(int32_t count, int32_t alignment) {
    const bool is_power = (alignment & (alignment - 1)) == 0;
    return is_power ? (count + alignment - 1) & -alignment : round_up_by_division(count, alignment);
}

// Sums over the values of the threads before this one, one value of each thread after the other. Called by a whole
// block.
class BlockSums {
public:
    // `total`: of all threads.
    __device__ int32_t exclusive(int32_t value, int32_t& total) {
        __shared__ int32_t warp_sums[2][kThreads / kWarpSize];
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        // What the last sums were made of may still be read.
        turn_ ^= 1;
        const int32_t sum = device::inclusive_sum(value);
        if (lane == kWarpSize - 1) warp_sums[turn_][warp] = sum;
        __syncthreads();
        const int32_t of_warp = lane < kThreads / kWarpSize ? warp_sums[turn_][lane] : 0;
        total = __reduce_add_sync(kAllLanes, of_warp);
        return __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0) + sum - value;
    }

private:
    int turn_ = 0;
};

// What every rank needs of its capacity, and its choices, the same on all ranks; shared memory of a block.
struct Needs {
    int32_t needed[kMaxNodeRanks], choices[kMaxNodeRanks];
};

__device__ inline bool is_limited(const CapacityRule& capacity) {
    return capacity.per_expert > 0 || capacity.rows > 0;
}

// Whether a capacity is of rows as they arrive, of which the matrix tells the number.
__device__ inline bool limits_arrivals(const OpenParams& params) {
    return params.capacity.per_expert == 0 && params.layout == Layout::kCompact;
}

// Called by a whole block.
__device__ inline void find_needs(const OpenParams& params, const CountMatrix& counts, Needs& needs) {
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    if (threadIdx.x < num_ranks) {
        int32_t rows = 0;
        for (int source = 0; source < num_ranks; ++source) rows += counts.rows(source, static_cast<int>(threadIdx.x));
        needs.needed[threadIdx.x] = limits_arrivals(params) ? rows : 0;
        needs.choices[threadIdx.x] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int expert = static_cast<int>(threadIdx.x); expert < params.num_experts; expert += kThreads) {
        const int32_t count = counts.choices_before(num_ranks, expert);
        const int rank = expert / local;
        if (params.capacity.per_expert > 0) {
            atomicMax(&needs.needed[rank], count);
        } else if (!limits_arrivals(params)) {
            atomicAdd(&needs.needed[rank], round_up(count, params.alignment));
        }
        if (params.capacity.drop) atomicAdd(&needs.choices[rank], count);
    }
    __syncthreads();
}

// For each expert, how many of this rank's choices are among those it keeps: the first ones by (source, token).
__device__ inline void write_kept(const OpenParams& params, const CountMatrix& counts, const Needs& needs,
                                  const PlanTable& table) {
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    const int64_t fixed = params.capacity.per_expert, limit = params.capacity.rows;
    // Room for padding first, so that the kept groups fit however their sizes round up.
    const int64_t usable = limit - static_cast<int64_t>(local) * (params.alignment - 1);
#pragma unroll 1
    for (int expert = static_cast<int>(threadIdx.x); expert < params.num_experts; expert += kThreads) {
        int32_t keep = counts.choices_before(num_ranks, expert);
        const int rank = expert / local;
        if (fixed > 0) {
            keep = min(keep, static_cast<int32_t>(fixed));
        } else if (limit > 0 && needs.needed[rank] > limit) {
            keep = static_cast<int32_t>(usable * keep / max(needs.choices[rank], 1));
        }
        table.keep_choices[expert] = max(keep - counts.choices_before(params.link.rank, expert), 0);
    }
}

// For every expert, the layout row of this rank's first choice, on the expert's rank; by the arithmetic of
// lay_out_groups. Of rows that are not compact. Called by a whole block; returns on all threads the layout rows of the
// rank with most.
__device__ inline int32_t write_direct_rows(const OpenParams& params, const CountMatrix& counts, const PlanTable& table,
                                            BlockSums& sums) {
    __shared__ int32_t first_rows[kMaxNodeRanks], most;
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    const auto fixed = static_cast<int32_t>(params.capacity.per_expert);
    if (threadIdx.x == 0) most = fixed * local;
    int32_t before = 0;
#pragma unroll 1
    for (int begin = 0; begin < params.num_experts; begin += kThreads) {
        const int expert = begin + static_cast<int>(threadIdx.x), rank = expert / local, idx = expert - rank * local;
        const bool in_range = expert < params.num_experts;
        const int32_t count = in_range && fixed == 0 ? counts.choices_before(num_ranks, expert) : 0;
        const int32_t rows = in_range && fixed == 0 ? round_up(count, params.alignment) : 0;
        int32_t total;
        const int32_t row = before + sums.exclusive(rows, total);
        before += total;
        if (in_range && idx == 0) first_rows[rank] = row;
        __syncthreads();
        if (!in_range) continue;
        const int32_t in_rank = fixed > 0 ? idx * fixed : row - first_rows[rank];
        table.direct_rows[expert] = in_rank + counts.choices_before(params.link.rank, expert);
        if (fixed == 0 && idx == local - 1) atomicMax(&most, in_rank + rows);
    }
    __syncthreads();
    return most;
}

// Lays out this rank's groups. Called by a whole block; returns the number of layout rows on all threads. `rehearses`:
// see plan_dispatch.
__device__ inline int32_t lay_out_groups(const OpenParams& params, const CountMatrix& counts, const PlanTable& table,
                                         BlockSums& sums, bool rehearses) {
    const int num_ranks = params.link.num_ranks, local = params.num_experts / num_ranks;
    const int first_expert = params.link.rank * local;
    const auto fixed = static_cast<int32_t>(params.layout == Layout::kCompact ? 0 : params.capacity.per_expert);
    int32_t before = 0;
#pragma unroll 1
    for (int first = 0; first < local; first += kThreads) {
        const int expert = first + static_cast<int>(threadIdx.x);
        const bool in_range = expert < local;
        const int32_t count = in_range ? counts.choices_before(num_ranks, first_expert + expert) : 0;
        const int32_t rows = !in_range ? 0 : fixed > 0 ? fixed : round_up(count, params.alignment);
        int32_t total;
        int32_t row = before + sums.exclusive(rows, total);
        before += total;
        if (!in_range) continue;
        table.tokens_per_expert[expert] = count;
        params.told_tokens[expert] = count;
        // A slab's rows behind the last real one are nobody's: its groups end where its choices do.
        table.expert_ends[expert] = row + rows;
        params.told_ends[expert] = row + rows;
#pragma unroll 1
        for (int source = 0; source < num_ranks; ++source) {
            table.expert_rows[source * local + expert] = row;
            row += counts.choices(source, first_expert + expert);
        }
        if (rehearses) continue;
        if (params.received_total != nullptr) {
            // Nobody else writes it; the sum is made by the memory, so that nothing here waits for it.
            atomicAdd(reinterpret_cast<unsigned long long*>(params.received_total + expert),
                      static_cast<unsigned long long>(count));
        }
        if (params.host_counts != nullptr) params.host_counts[expert] = count;
    }
    return before;
}

// What concerns whole ranks. Called by one warp. `num_rows`: layout rows here; `most_rows`: of the rank with most,
// where they follow from groups.
__device__ inline void plan_ranks(const OpenParams& params, const CountMatrix& counts, const PlanTable& table,
                                  const Needs& needs, int32_t num_rows, int32_t most_rows, bool rehearses) {
    const Link& link = params.link;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, num_ranks = link.num_ranks;
    const bool compact = params.layout == Layout::kCompact;
    int32_t tokens = 0, own = 0, arrivals = 0;
    if (lane < num_ranks) {
        tokens = counts.num_tokens(lane);
        own = counts.rows(lane, link.rank);
        table.source_tokens[lane] = tokens;
        // Running sums over sources of the rows that every rank receives.
        for (int source = 0; source < num_ranks; ++source) {
            arrivals += counts.rows(source, lane);
            table.rank_rows[source * num_ranks + lane] = arrivals;
        }
        if (params.max_tokens > 0 && tokens > params.max_tokens && !rehearses) {
            device::report(link, Trouble::kTooManyTokens, lane, Phase::kOpening,
                           static_cast<uint64_t>(params.max_tokens), static_cast<uint64_t>(tokens));
        }
    }
    const int32_t received = device::inclusive_sum(own), most_tokens = __reduce_max_sync(kAllLanes, tokens);
    if (lane < num_ranks) table.source_rows[lane + 1] = received;
    if (lane == 0) table.source_rows[0] = 0;
    if (compact && params.direct) most_rows = __reduce_max_sync(kAllLanes, arrivals);
    // The first rank in need is told.
    int32_t needed = 0;
    int64_t given = 0;
    if (is_limited(params.capacity) && lane < num_ranks) {
        needed = limits_arrivals(params) ? arrivals : needs.needed[lane];
        given = params.capacity.per_expert > 0 ? params.capacity.per_expert : params.capacity.rows;
    }
    const uint32_t in_need = __ballot_sync(kAllLanes, needed > given);
    const bool poisoned = in_need != 0 && params.capacity.drop == 0;
    const int32_t num_received = __shfl_sync(kAllLanes, received, num_ranks - 1);
    if (lane == 0) {
        *table.most_tokens = most_tokens;
        *table.most_rows = most_rows;
        *table.overflow = poisoned;
        *params.told_overflow = poisoned;
    }
    if (rehearses) return;
    if (poisoned && lane == __ffs(in_need) - 1) {
        volatile StatusWords* status = link.status;
        status->overflow_rank = lane;
        status->overflow_needed = needed;
        status->overflow_given = given;
        __threadfence_system();
        status->overflowed = status->overflowed + 1;
    }
    if (params.sizes == nullptr || lane != 0) return;
    volatile SizeWords* sizes = params.sizes;
    sizes->num_rows = compact ? num_received : num_rows;
    sizes->num_received = num_received;
    sizes->max_tokens = most_tokens;
    sizes->most_rows = most_rows;
    __threadfence_system();
}

// `rehearses`: whether counts are of no exchange; then only what is written again by the real call is written. Called
// by a whole block.
__device__ inline void plan_dispatch(const OpenParams& params, const CountMatrix& counts, bool rehearses) {
    __shared__ Needs needs;
    const PlanTable table(params.table, params.link.num_ranks, params.num_experts);
    const bool drops = params.capacity.drop != 0;
    if (is_limited(params.capacity) && (drops || !limits_arrivals(params))) find_needs(params, counts, needs);
    if (drops) write_kept(params, counts, needs, table);
    BlockSums sums;
    const bool direct = params.direct != 0 && params.layout != Layout::kCompact;
    const int32_t most_rows = direct ? write_direct_rows(params, counts, table, sums) : 0;
    const int32_t num_rows = lay_out_groups(params, counts, table, sums, rehearses);
    if (threadIdx.x >= kWarpSize) return;
    plan_ranks(params, counts, table, needs, num_rows, most_rows, rehearses);
}

}  // namespace moe_ep::opening
