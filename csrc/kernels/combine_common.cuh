#pragma once

#include <cstdint>

#include "device/groups.cuh"
#include "device/rows.cuh"
#include "kernels/exchange.h"
#include "layout/plan.h"

// What both roles of a combine share: the rows that sums are made of, and the words that travel beside them.
namespace moe_ep::combine {

using device::Cut;
using device::kAllLanes;
using device::kWarpSize;
using device::Worker;

// One row of a sum.
template <class T>
struct Term {
    const std::byte* row;
    device::SumOf<T> factor;
    bool wide;  // fp32 partial sums rather than row elements
};

// Sums that a warp makes one after another: its tokens' terms, in the order of addition, and where each sum goes.
template <class T>
struct Batch {
    static constexpr int kMaxTerms = 96;  // the largest K, one partial sum of each rank, and two rows of bias
    static_assert(kMaxTerms >= kMaxTopK + kMaxNodeRanks + 2);

    Term<T> terms[kMaxTerms];
    std::byte* targets[kChunkTokens];
    int first_term[kChunkTokens + 1];
};

template <class T>
__device__ device::SumOf<T> load_factor(const CombineParams& params, int64_t row) {
    if (params.row_weights == nullptr) return 1;
    const int32_t* words = params.row_weights + row * params.weight_words;
    return params.weight_words == 1 ? static_cast<device::SumOf<T>>(__int_as_float(words[0]))
                                    : static_cast<device::SumOf<T>>(__hiloint2double(words[1], words[0]));
}

// Fills a warp's batch with one slice of rows. All members are called by the whole warp.
template <class T>
class BatchFiller {
public:
    __device__ BatchFiller(const CombineParams& params, Batch<T>& batch, const Cut& cut)
        : params_(params), batch_(batch), slice_elements_(params.hidden / cut.slices) {}

    // Of the rows that follow; the batch is empty.
    __device__ void set_slice(int slice) { first_element_ = slice * slice_elements_; }

    __device__ int num_tokens() const { return num_tokens_; }
    // Whether a further token may not fit.
    __device__ bool is_full() const {
        return num_tokens_ == kChunkTokens ||
               num_terms_ + params_.rows.top_k + params_.link.num_ranks + 2 > Batch<T>::kMaxTerms;
    }

    // `wide`: whether the target takes fp32.
    __device__ void begin_token(std::byte* target, bool wide) {
        if (threadIdx.x % kWarpSize == 0) {
            batch_.targets[num_tokens_] = target + offset(wide);
            batch_.first_term[num_tokens_] = num_terms_;
        }
        ++num_tokens_;
    }

    // Adds a received token's layout rows, in the order of its choices.
    __device__ void add_choices(int64_t received) {
        const int lane = threadIdx.x % kWarpSize;
        const int64_t row_bytes = params_.hidden * static_cast<int64_t>(sizeof(T));
        if (params_.layout == Layout::kCompact) {
            add_row(params_.y + received * row_bytes, false);
            return;
        }
        for (int first = 0; first < params_.rows.top_k; first += kWarpSize) {
            const int k = first + lane;
            const int32_t row = k < params_.rows.top_k ? params_.rows.positions[received * params_.rows.top_k + k] : -1;
            const uint32_t present = __ballot_sync(kAllLanes, row >= 0);
            if (row >= 0) {
                batch_.terms[num_terms_ + __popc(present & ptx::lanes_below())] = {
                    params_.y + row * row_bytes + offset(false), load_factor<T>(params_, row), false};
            }
            num_terms_ += __popc(present);
        }
    }

    // Adds a row as it is.
    __device__ void add_row(const std::byte* row, bool wide) {
        if (threadIdx.x % kWarpSize == 0) batch_.terms[num_terms_] = {row + offset(wide), 1, wide};
        ++num_terms_;
    }

    // Afterwards all lanes may read the batch.
    __device__ void finish() {
        if (threadIdx.x % kWarpSize == 0) batch_.first_term[num_tokens_] = num_terms_;
        __syncwarp();
    }

    // After all lanes have read the batch.
    __device__ void clear() {
        __syncwarp();
        num_tokens_ = num_terms_ = 0;
    }

private:
    __device__ int64_t offset(bool wide) const {
        return first_element_ * (wide ? static_cast<int64_t>(sizeof(float)) : static_cast<int64_t>(sizeof(T)));
    }

    const CombineParams& params_;
    Batch<T>& batch_;
    const int64_t slice_elements_;
    int64_t first_element_ = 0;
    int num_tokens_ = 0, num_terms_ = 0;
};

// Value of one choice of a received token on this rank.
__device__ inline int32_t load_value(const CombineParams& params, int64_t received, int k, int word) {
    int64_t at = received * params.rows.top_k + k;
    if (params.layout != Layout::kCompact) {
        at = params.rows.positions[at];
    } else if (params.only_own_values && params.rows.positions[at] < 0) {
        at = -1;
    }
    return at < 0 ? 0 : params.values[at * params.value_words + word];
}

// Adds up values of one of this rank's tokens over the ranks that it went to: 32-bit floats, or 64-bit ones.
__device__ inline void add_values(const CombineParams& params, const RecordDims& dims, int64_t token, int idx,
                                  uint32_t ranks, int64_t received, int64_t slot) {
    const Link& link = params.link;
    for (int k = threadIdx.x % kWarpSize; k < params.rows.top_k; k += kWarpSize) {
        double sum = 0.0;
        for (uint32_t left = ranks; left != 0; left &= left - 1) {
            const int rank = __ffs(left) - 1;
            int32_t words[2] = {0, 0};
            for (int word = 0; word < params.value_words; ++word) {
                words[word] = rank == link.rank
                                  ? load_value(params, received, k, word)
                                  : ptx::load_arena(device::group_at(link, dims, link.rank, rank, slot).meta.row(idx) +
                                                    k * params.value_words + word);
            }
            const double value =
                params.value_words == 1 ? __int_as_float(words[0]) : __hiloint2double(words[1], words[0]);
            sum = params.value_words == 1 ? static_cast<float>(sum) + static_cast<float>(value) : sum + value;
        }
        int32_t* out = params.out_values + (token * params.rows.top_k + k) * params.value_words;
        if (params.value_words == 1) {
            out[0] = __float_as_int(static_cast<float>(sum));
        } else {
            out[0] = __double2loint(sum);
            out[1] = __double2hiint(sum);
        }
    }
}

// Lane r waits for the group of rank r. Called by a whole warp; returns whether all came.
__device__ inline bool wait_for_groups(const Link& link, uint64_t epoch, int64_t slot, int64_t lap) {
    const int lane = threadIdx.x % kWarpSize;
    bool good = true;
    if (lane < link.num_ranks && lane != link.rank) {
        good = device::wait_for(link, device::arrived_flag(link, link.rank, lane, slot),
                                device::group_stamp(epoch, lap), lane, Phase::kArrival);
    }
    return __all_sync(kAllLanes, good) != 0;
}

// Lane r looks once for it.
__device__ inline bool have_groups(const Link& link, uint64_t epoch, int64_t slot, int64_t lap) {
    const int lane = threadIdx.x % kWarpSize;
    bool came = true;
    if (lane < link.num_ranks && lane != link.rank) {
        came =
            ptx::load_acquire_sys(device::arrived_flag(link, link.rank, lane, slot)) >= device::group_stamp(epoch, lap);
    }
    return __all_sync(kAllLanes, came) != 0;
}

}  // namespace moe_ep::combine
