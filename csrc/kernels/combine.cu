#include <cstdint>
#include <type_traits>

#include "device/groups.cuh"
#include "device/rows.cuh"
#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/exchange.h"

// Senders sum each received token's layout rows on this rank and store the sum into the ring of the token's source;
// reducers walk this rank's own tokens and add the sums of all ranks, in rank order, as their groups arrive. Rows of
// this rank's own tokens skip the ring. The order of every sum is fixed, so that two runs give the same bits.
namespace moe_ep {
namespace {

using device::kAllLanes;
using device::kWarpSize;
using device::Worker;

constexpr int kWarps = 16;
constexpr int kUnroll = 4;
constexpr int kMaxTerms = 64 + kMaxNodeRanks;

// One row of a sum.
struct Term {
    const std::byte* row;
    double factor;
    bool in_arena;
};

__device__ double load_factor(const CombineParams& params, int64_t row) {
    if (params.row_weights == nullptr) return 1.0;
    const int32_t* words = params.row_weights + row * params.weight_words;
    return params.weight_words == 1 ? __int_as_float(words[0]) : __hiloint2double(words[1], words[0]);
}

// Rows that make up one output row, in a warp's shared memory; the order is that of the sum.
struct Terms {
    Term* terms;
    int count;

    // Adds a received token's layout rows, in the order of its choices. Called by a whole warp.
    __device__ void add_choices(const CombineParams& params, int64_t received) {
        const int lane = threadIdx.x % kWarpSize;
        const int64_t row_bytes = params.hidden * element_bytes(params);
        if (params.layout == Layout::kCompact) {
            if (lane == 0) terms[count] = {params.y + received * row_bytes, 1.0, false};
            ++count;
            return;
        }
        for (int first = 0; first < params.rows.top_k; first += kWarpSize) {
            const int k = first + lane;
            const int32_t row = k < params.rows.top_k ? params.rows.positions[received * params.rows.top_k + k] : -1;
            const uint32_t present = __ballot_sync(kAllLanes, row >= 0);
            if (row >= 0) {
                const std::byte* from = params.y + row * row_bytes;
                terms[count + __popc(present & ptx::lanes_below())] = {from, load_factor(params, row), false};
            }
            count += __popc(present);
        }
    }

    // Adds what a peer has summed.
    __device__ void add_arrived(const std::byte* row) {
        if (threadIdx.x % kWarpSize == 0) terms[count] = {row, 1.0, true};
        ++count;
    }

    __device__ static int64_t element_bytes(const CombineParams& params) {
        return params.element == Element::kDouble ? 8 : params.element == Element::kFloat ? 4 : 2;
    }
};

template <class T>
struct Sums {
    static constexpr int kCount = device::ElementsOf<T>::kCount;
    device::SumOf<T> values[kUnroll][kCount];
};

// The kUnroll vectors of a row that one lane takes, from vector `first` on.
__device__ __forceinline__ void load_vectors(const Term& term, int64_t first, int64_t num_vectors, uint4* vectors) {
    const auto* from = reinterpret_cast<const uint4*>(term.row);
#pragma unroll
    for (int step = 0; step < kUnroll; ++step) {
        const int64_t at = first + step * kWarpSize;
        if (at < num_vectors) vectors[step] = term.in_arena ? ptx::load_arena(from + at) : ptx::load_once(from + at);
    }
}

// Adds fp32 sums that arrived: two vectors of them for one of 16-bit elements.
template <class T>
__device__ __forceinline__ void add_wide(const Term& term, int64_t first, int64_t num_vectors, Sums<T>& sums) {
    constexpr int kCount = device::ElementsOf<T>::kCount;
    const auto* from = reinterpret_cast<const uint4*>(term.row);
#pragma unroll
    for (int step = 0; step < kUnroll; ++step) {
        const int64_t at = first + step * kWarpSize;
        if (at >= num_vectors) continue;
#pragma unroll
        for (int part = 0; part < kCount / 4; ++part) {
            const uint4 words = ptx::load_arena(from + at * (kCount / 4) + part);
            sums.values[step][part * 4] += __uint_as_float(words.x);
            sums.values[step][part * 4 + 1] += __uint_as_float(words.y);
            sums.values[step][part * 4 + 2] += __uint_as_float(words.z);
            sums.values[step][part * 4 + 3] += __uint_as_float(words.w);
        }
    }
}

// Adds up the terms; the next one's vectors are on their way while one is added.
template <class T>
__device__ void add_terms(const Terms& terms, bool weighted, bool wide, int64_t first, int64_t num_vectors,
                          Sums<T>& sums) {
#pragma unroll
    for (int step = 0; step < kUnroll; ++step) {
#pragma unroll
        for (int idx = 0; idx < Sums<T>::kCount; ++idx) sums.values[step][idx] = 0;
    }
    uint4 next[kUnroll] = {};
    if (terms.count > 0) load_vectors(terms.terms[0], first, num_vectors, next);
    for (int idx = 0; idx < terms.count; ++idx) {
        const Term term = terms.terms[idx];
        uint4 vectors[kUnroll];
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) vectors[step] = next[step];
        if (idx + 1 < terms.count) load_vectors(terms.terms[idx + 1], first, num_vectors, next);
        if constexpr (sizeof(T) == 2) {
            if (wide && term.in_arena) {
                add_wide<T>(term, first, num_vectors, sums);
                continue;
            }
        }
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            device::accumulate<T>(sums.values[step], vectors[step], static_cast<device::SumOf<T>>(term.factor),
                                  weighted && !term.in_arena);
        }
    }
}

// Stores one lane's sums as row elements, or as fp32.
template <class T>
__device__ void store_sums(const Sums<T>& sums, bool wide, std::byte* row, int64_t first, int64_t num_vectors) {
    constexpr int kCount = Sums<T>::kCount;
    auto* to = reinterpret_cast<uint4*>(row);
#pragma unroll
    for (int step = 0; step < kUnroll; ++step) {
        const int64_t at = first + step * kWarpSize;
        if (at >= num_vectors) continue;
        if constexpr (sizeof(T) == 2) {
            if (wide) {
#pragma unroll
                for (int part = 0; part < kCount / 4; ++part) {
                    const auto* values = &sums.values[step][part * 4];
                    to[at * (kCount / 4) + part] = make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                                                              __float_as_uint(values[2]), __float_as_uint(values[3]));
                }
                continue;
            }
        }
        to[at] = device::pack<T>(sums.values[step]);
    }
}

// Value of one choice of a received token on this rank.
__device__ int32_t load_value(const CombineParams& params, int64_t received, int k, int word) {
    int64_t at = received * params.rows.top_k + k;
    if (params.layout != Layout::kCompact) {
        at = params.rows.positions[at];
    } else if (params.only_own_values && params.rows.positions[at] < 0) {
        at = -1;
    }
    return at < 0 ? 0 : params.values[at * params.value_words + word];
}

// Sums the rows of the groups that go to peers, and stores them there.
template <class T>
__device__ void send_sums(const CombineParams& params, Term* memory, Worker worker) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const PlanTable table(params.rows.table, link.num_ranks, params.rows.num_experts);
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims);
    const int64_t num_vectors = params.hidden / Sums<T>::kCount;
    const uint64_t epoch = link.state->epoch;
    const int lane = threadIdx.x % kWarpSize, num_peers = link.num_ranks - 1;
    const int64_t num_items = device::most_chunks(params.rows, table, link.num_ranks) * num_peers;
    for (int64_t item = worker.first; item < num_items; item += worker.stride) {
        const int peer = static_cast<int>((link.rank + 1 + item % num_peers) % link.num_ranks);
        const int64_t chunk = item / num_peers, slot = chunk % ring_groups, lap = chunk / ring_groups;
        if (chunk >= num_chunks(table.source_tokens[peer])) continue;
        int good = 1;
        if (lap > 0 && lane == 0) {
            good = device::wait_for(link, device::consumed_flag(link, peer, link.rank, slot),
                                    device::group_stamp(epoch, lap - 1), peer, Phase::kRoom);
        }
        if (__shfl_sync(kAllLanes, good, 0) == 0) return;
        const int32_t* told = params.rows.groups + (peer * params.rows.max_chunks + chunk) * 2;
        const auto mask = static_cast<uint32_t>(told[1]);
        const GroupLayout group = device::group_at(link, dims, peer, link.rank, slot);
        for (uint32_t left = mask; left != 0; left &= left - 1) {
            const int idx = __ffs(left) - 1;
            const int64_t received = told[0] + __popc(mask & ((1u << idx) - 1));
            Terms terms{memory, 0};
            terms.add_choices(params, received);
            __syncwarp();
            for (int64_t first = lane; first - lane < num_vectors; first += kUnroll * kWarpSize) {
                Sums<T> sums;
                add_terms(terms, params.row_weights != nullptr, false, first, num_vectors, sums);
                store_sums(sums, params.wide_wire != 0, group.rows.row(idx), first, num_vectors);
            }
            for (int word = lane; word < params.rows.top_k * params.value_words; word += kWarpSize) {
                group.meta.row(idx)[word] =
                    load_value(params, received, word / params.value_words, word % params.value_words);
            }
            __syncwarp();
        }
        __syncwarp();
        if (lane == 0) device::flag_group(link, epoch, peer, slot, lap);
    }
}

// Adds up values of one of this rank's tokens over the ranks that it went to: 32-bit floats, or 64-bit ones.
__device__ void add_values(const CombineParams& params, const RecordDims& dims, int64_t token, int idx, uint32_t ranks,
                           int64_t received, int64_t slot) {
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
__device__ bool wait_for_groups(const Link& link, uint64_t epoch, int64_t slot, int64_t lap) {
    const int lane = threadIdx.x % kWarpSize;
    bool good = true;
    if (lane < link.num_ranks && lane != link.rank) {
        good = device::wait_for(link, device::arrived_flag(link, link.rank, lane, slot),
                                device::group_stamp(epoch, lap), lane, Phase::kArrival);
    }
    return __all_sync(kAllLanes, good) != 0;
}

// Adds bias and rounds once.
template <class T>
__device__ void add_bias(const CombineParams& params, int64_t token, int64_t first, int64_t num_vectors,
                         Sums<T>& sums) {
    for (const std::byte* bias : params.bias) {
        if (bias == nullptr) continue;
        const Term term{bias + token * params.hidden * static_cast<int64_t>(sizeof(T)), 1.0, false};
        uint4 vectors[kUnroll] = {};
        load_vectors(term, first, num_vectors, vectors);
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            device::accumulate<T>(sums.values[step], vectors[step], 1.0f, false);
        }
    }
}

// Adds up, for each of this rank's tokens, what all ranks have summed.
template <class T>
__device__ void reduce_tokens(const CombineParams& params, Term* memory, Worker worker) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims), total = num_chunks(params.rows.num_tokens);
    const int64_t num_vectors = params.hidden / Sums<T>::kCount;
    const uint64_t epoch = link.state->epoch;
    const int lane = threadIdx.x % kWarpSize;
    for (int64_t chunk = worker.first; chunk < total; chunk += worker.stride) {
        const int64_t slot = chunk % ring_groups, lap = chunk / ring_groups;
        if (!wait_for_groups(link, epoch, slot, lap)) return;
        const int32_t* told = params.rows.groups + (link.rank * params.rows.max_chunks + chunk) * 2;
        const auto own_mask = static_cast<uint32_t>(told[1]);
        for (int idx = 0; idx < kChunkTokens && chunk * kChunkTokens + idx < params.rows.num_tokens; ++idx) {
            const int64_t token = chunk * kChunkTokens + idx;
            const uint32_t ranks = params.rows.token_ranks[token];
            const int64_t received = told[0] + __popc(own_mask & ((1u << idx) - 1));
            Terms terms{memory, 0};
            for (uint32_t left = ranks; left != 0; left &= left - 1) {
                const int rank = __ffs(left) - 1;
                if (rank == link.rank) {
                    terms.add_choices(params, received);
                } else {
                    terms.add_arrived(device::group_at(link, dims, link.rank, rank, slot).rows.row(idx));
                }
            }
            __syncwarp();
            for (int64_t first = lane; first - lane < num_vectors; first += kUnroll * kWarpSize) {
                Sums<T> sums;
                add_terms(terms, params.row_weights != nullptr, params.wide_wire != 0, first, num_vectors, sums);
                add_bias(params, token, first, num_vectors, sums);
                store_sums(sums, false, params.out + token * params.hidden * static_cast<int64_t>(sizeof(T)), first,
                           num_vectors);
            }
            if (params.out_values != nullptr) add_values(params, dims, token, idx, ranks, received, slot);
            __syncwarp();
        }
        if (lane < link.num_ranks && lane != link.rank) {
            device::release_group(link, epoch, lane, chunk, total, ring_groups);
        }
    }
}

// Makes outputs NaN after an overflow: all bits set is one in every format.
__device__ void poison_tokens(const CombineParams& params, Worker worker) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_vectors = params.hidden * Terms::element_bytes(params) / device::kVectorBytes;
    const int64_t num_words = static_cast<int64_t>(params.rows.top_k) * params.value_words;
    for (int64_t token = worker.first; token < params.rows.num_tokens; token += worker.stride) {
        auto* row = reinterpret_cast<uint4*>(params.out) + token * num_vectors;
        for (int64_t at = lane; at < num_vectors; at += kWarpSize) row[at] = make_uint4(~0u, ~0u, ~0u, ~0u);
        if (params.out_values == nullptr) continue;
        for (int64_t word = lane; word < num_words; word += kWarpSize) params.out_values[token * num_words + word] = -1;
    }
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize) combine_rows(const __grid_constant__ CombineParams params) {
    __shared__ Term memory[kWarps][kMaxTerms];
    if (device::has_failed(params.link)) return;
    const int warp = threadIdx.x / kWarpSize, block = static_cast<int>(blockIdx.x);
    const bool sends = block < params.num_senders;
    const int role_block = sends ? block : block - params.num_senders;
    const int role_blocks = sends ? params.num_senders : params.num_reducers;
    // Neighbouring chunks go to different SMs.
    const Worker worker{role_block + static_cast<int64_t>(warp) * role_blocks,
                        static_cast<int64_t>(role_blocks) * kWarps};
    const PlanTable table(params.rows.table, params.link.num_ranks, params.rows.num_experts);
    if (*table.overflow != 0) {
        if (!sends) poison_tokens(params, worker);
    } else if (sends) {
        send_sums<T>(params, memory[warp], worker);
    } else {
        reduce_tokens<T>(params, memory[warp], worker);
    }
}

template <class T>
void launch(const CombineParams& params, cudaStream_t stream) {
    const int num_blocks = params.num_senders + params.num_reducers;
    combine_rows<T><<<num_blocks, kWarps * kWarpSize, 0, stream>>>(params);
    check_cuda(cudaGetLastError(), "combine_rows");
}

template <class T>
void prepare() {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, combine_rows<T>), "cudaFuncGetAttributes(combine_rows)");
}

}  // namespace

void prepare_combine() {
    prepare<__nv_bfloat16>();
    prepare<__half>();
    prepare<float>();
    prepare<double>();
}

void launch_combine(const CombineParams& params, void* stream) {
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
