#pragma once

#include <cstdint>
#include <type_traits>

#include "device/pipe.cuh"
#include "kernels/combine_common.cuh"

// Two ways to make a batch of sums: by vector loads and stores, and through the copy engine. Both add in the same order
// and round alike.
namespace moe_ep::combine {

// One lane's part of a row: vectors lane, lane + 32, ... of a piece.
template <class T, int kVectors>
struct Sums {
    static constexpr int kCount = device::ElementsOf<T>::kCount;
    device::SumOf<T> values[kVectors][kCount];

    __device__ void clear() {
#pragma unroll
        for (int step = 0; step < kVectors; ++step) {
#pragma unroll
            for (int idx = 0; idx < kCount; ++idx) values[step][idx] = 0;
        }
    }
    // Adds four fp32 partial sums to a quarter or half of a vector.
    __device__ void add_wide(int step, int part, uint4 words) {
        values[step][part * 4] += __uint_as_float(words.x);
        values[step][part * 4 + 1] += __uint_as_float(words.y);
        values[step][part * 4 + 2] += __uint_as_float(words.z);
        values[step][part * 4 + 3] += __uint_as_float(words.w);
    }
    __device__ uint4 wide(int step, int part) const {
        const auto* four = &values[step][part * 4];
        return make_uint4(__float_as_uint(four[0]), __float_as_uint(four[1]), __float_as_uint(four[2]),
                          __float_as_uint(four[3]));
    }
};

struct Nothing {
    __device__ void operator()() const {}
};

// Sums by vector loads and stores, which are complete when a batch is done.
template <class T>
class VectorSums {
public:
    static constexpr int kWarps = 16;
    static constexpr int kPendingStores = 1;
    static constexpr bool kBulk = false;
    MOE_EP_HOST_DEVICE static constexpr int64_t shared_bytes() { return 0; }

    __device__ VectorSums(std::byte*, const CombineParams& params, const Cut& cut)
        : num_vectors_(params.hidden / cut.slices / Part::kCount) {}

    template <class Stored = Nothing>
    __device__ void run(const Batch<T>& batch, int num_tokens, bool wide_targets, Stored&& = {}) {
        for (int token = 0; token < num_tokens; ++token) {
            const int lane = threadIdx.x % kWarpSize;
            for (int64_t first = lane; first - lane < num_vectors_; first += kUnroll * kWarpSize) {
                Part sums;
                add_terms(batch, token, first, sums);
                store(sums, wide_targets, batch.targets[token], first);
            }
        }
    }

    __device__ void drain() { __syncwarp(); }
    template <int kStores>
    __device__ static void wait_older() {}
    __device__ static void fence_arena() { __syncwarp(); }

private:
    static constexpr int kUnroll = 4;
    using Part = Sums<T, kUnroll>;

    __device__ void load(const Term<T>& term, int64_t first, uint4* vectors) const {
        const auto* from = reinterpret_cast<const uint4*>(term.row);
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int64_t at = first + step * kWarpSize;
            // Rows may be in the arena, which is never read through the non-coherent path.
            if (at < num_vectors_) vectors[step] = ptx::load_arena(from + at);
        }
    }

    __device__ void add_wide(const Term<T>& term, int64_t first, Part& sums) const {
        const auto* from = reinterpret_cast<const uint4*>(term.row);
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int64_t at = first + step * kWarpSize;
            if (at >= num_vectors_) continue;
#pragma unroll
            for (int part = 0; part < Part::kCount / 4; ++part) {
                sums.add_wide(step, part, ptx::load_arena(from + at * (Part::kCount / 4) + part));
            }
        }
    }

    // The next term's vectors are on their way while one is added.
    __device__ void add_terms(const Batch<T>& batch, int token, int64_t first, Part& sums) const {
        sums.clear();
        const int begin = batch.first_term[token], end = batch.first_term[token + 1];
        uint4 next[kUnroll] = {};
        if (begin < end && !batch.terms[begin].wide) load(batch.terms[begin], first, next);
        for (int idx = begin; idx < end; ++idx) {
            const Term<T> term = batch.terms[idx];
            uint4 vectors[kUnroll];
#pragma unroll
            for (int step = 0; step < kUnroll; ++step) vectors[step] = next[step];
            if (idx + 1 < end && !batch.terms[idx + 1].wide) load(batch.terms[idx + 1], first, next);
            if constexpr (sizeof(T) == 2) {
                if (term.wide) {
                    add_wide(term, first, sums);
                    continue;
                }
            }
#pragma unroll
            for (int step = 0; step < kUnroll; ++step) {
                device::accumulate<T>(sums.values[step], vectors[step], term.factor);
            }
        }
    }

    __device__ void store(const Part& sums, bool wide, std::byte* row, int64_t first) const {
        auto* to = reinterpret_cast<uint4*>(row);
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int64_t at = first + step * kWarpSize;
            if (at >= num_vectors_) continue;
            if constexpr (sizeof(T) == 2) {
                if (wide) {
#pragma unroll
                    for (int part = 0; part < Part::kCount / 4; ++part) {
                        to[at * (Part::kCount / 4) + part] = sums.wide(step, part);
                    }
                    continue;
                }
            }
            to[at] = device::pack<T>(sums.values[step]);
        }
    }

    const int64_t num_vectors_;
};

// How sums are made through the copy engine: of few rows; of many, with more warps; or, with as many, in laps round the
// rings, where warps that wait for room help to make it.
enum class Mode { kFew, kMany, kLaps };

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Sums through the copy engine: pieces of rows are loaded ahead, all lanes add them up in registers and put the rounded
// sums into shared memory, from where they are stored. Stores are complete only after a wait for them. `kMany`: with
// more warps, for many rows; where there are few, a warp is faster with larger stages.
template <class T, bool kMany>
class BulkSums {
public:
    static constexpr int kWarps = kMany ? 16 : 8;
    static constexpr int kPendingStores = kMany ? 4 : 2;
    static constexpr bool kBulk = true;
    MOE_EP_HOST_DEVICE static constexpr int64_t shared_bytes() {
        return (kStages + kOuts) * kStageBytes + kStages * static_cast<int64_t>(sizeof(uint64_t));
    }

    __device__ BulkSums(std::byte* shared, const CombineParams& params, const Cut& cut)
        : stages_(shared),
          outs_(shared + kStages * kStageBytes),
          barriers_(reinterpret_cast<uint64_t*>(shared + (kStages + kOuts) * kStageBytes)),
          // Pieces that arrive or leave as fp32 are twice as large.
          pieces_(params.hidden / cut.slices * static_cast<int64_t>(sizeof(T)),
                  params.wide_wire ? kStageBytes / 2 : kStageBytes) {
        if (threadIdx.x % kWarpSize == 0) {
            for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(barriers_ + stage, 1);
            ptx::fence_barrier_init();
        }
        __syncwarp();
    }

    // `stored` is called by lane 0 after each store that it has issued.
    template <class Stored = Nothing>
    __device__ void run(const Batch<T>& batch, int num_tokens, bool wide_targets, Stored&& stored = {}) {
        LoadQueue queue(batch, num_tokens, pieces_);
        for (int ahead = 0; ahead < kStages; ++ahead) load_next(queue);
        for (int token = 0; token < num_tokens; ++token) {
            const int begin = batch.first_term[token], end = batch.first_term[token + 1];
            for (int piece = 0; piece < pieces_.num_pieces; ++piece) {
                Part sums;
                sums.clear();
                for (int idx = begin; idx < end; ++idx) {
                    add_stage(batch.terms[idx].factor, batch.terms[idx].wide, sums);
                    load_next(queue);
                }
                store(sums, wide_targets, batch.targets[token], piece);
                if (threadIdx.x % kWarpSize == 0) stored();
            }
        }
    }

    // Lane 0 waits until all stores but the last kStores are complete.
    template <int kStores>
    __device__ static void wait_older() {
        ptx::wait_bulk_stores<kStores>();
    }
    // After the acquire of a flag by a lane and before copies of what it guards by any. Called by a whole warp.
    __device__ static void fence_arena() {
        __syncwarp();
        ptx::fence_proxy_async_global();
    }

    // Waits until all stores are complete. Called by a whole warp.
    __device__ void drain() {
        if (threadIdx.x % kWarpSize == 0) ptx::wait_bulk_stores<0>();
        __syncwarp();
    }

private:
    static constexpr int kStages = 4, kOuts = 2, kStageBytes = kMany ? 2048 : 4096;
    static constexpr int kVectors = kStageBytes / device::kVectorBytes / kWarpSize;
    using Part = Sums<T, kVectors>;

    // Pieces of a batch in the order in which they are added: by token, piece, term. Each lane works out every 32nd of
    // them, so that none is late for the arithmetic of another.
    class LoadQueue {
    public:
        __device__ LoadQueue(const Batch<T>& batch, int num_tokens, const device::Pieces& pieces)
            : batch_(batch),
              num_tokens_(num_tokens),
              pieces_(pieces),
              num_loads_(batch.first_term[num_tokens] * pieces.num_pieces) {
            work_out();
        }

        __device__ bool is_done() const { return next_ == num_loads_; }
        // Issues the next load; called by the whole warp.
        __device__ void issue(std::byte* stage, uint64_t* barrier) {
            const int turn = next_ % kWarpSize;
            if (threadIdx.x % kWarpSize == turn) {
                ptx::barrier_expect_bytes(barrier, num_bytes_);
                ptx::bulk_load(stage, source_, num_bytes_, barrier);
            }
            ++next_;
            if (turn == kWarpSize - 1) work_out();
        }

    private:
        __device__ void work_out() {
            const int load = next_ + static_cast<int>(threadIdx.x % kWarpSize);
            if (load >= num_loads_) return;
            int token = 0;
            while (token + 1 < num_tokens_ && batch_.first_term[token + 1] * pieces_.num_pieces <= load) ++token;
            const int first = batch_.first_term[token], count = batch_.first_term[token + 1] - first;
            const int within = load - first * pieces_.num_pieces;
            const int piece = within / count;
            const Term<T>& term = batch_.terms[first + within % count];
            const int scale = term.wide ? 4 / static_cast<int>(sizeof(T)) : 1;
            source_ = term.row + pieces_.offset(piece) * scale;
            num_bytes_ = pieces_.bytes(piece) * scale;
        }

        const Batch<T>& batch_;
        const int num_tokens_;
        const device::Pieces& pieces_;
        const int num_loads_;
        int next_ = 0;
        const std::byte* source_ = nullptr;
        uint32_t num_bytes_ = 0;
    };

    __device__ void load_next(LoadQueue& queue) {
        if (queue.is_done()) return;
        queue.issue(stages_ + load_stage_ * kStageBytes, barriers_ + load_stage_);
        load_stage_ = load_stage_ + 1 == kStages ? 0 : load_stage_ + 1;
    }

    // Adds the oldest piece that was loaded, and gives its stage back. What lies behind the piece's end is added as
    // well, to sums that nobody stores.
    __device__ void add_stage(device::SumOf<T> factor, bool wide, Part& sums) {
        while (!ptx::barrier_passed(barriers_ + add_stage_, parity_)) {
        }
        const auto* from = reinterpret_cast<const uint4*>(stages_ + add_stage_ * kStageBytes);
        const int lane = threadIdx.x % kWarpSize;
        if (sizeof(T) == 2 && wide) {
            if constexpr (sizeof(T) == 2) {
                // Half a stage's elements fill it.
#pragma unroll
                for (int step = 0; step < kVectors / 2; ++step) {
                    sums.add_wide(step, 0, from[2 * (lane + step * kWarpSize)]);
                    sums.add_wide(step, 1, from[2 * (lane + step * kWarpSize) + 1]);
                }
            }
        } else {
            uint4 vectors[kVectors];
#pragma unroll
            for (int step = 0; step < kVectors; ++step) vectors[step] = from[lane + step * kWarpSize];
#pragma unroll
            for (int step = 0; step < kVectors; ++step) {
                device::accumulate<T>(sums.values[step], vectors[step], factor);
            }
        }
        // All lanes have read the stage before it is loaded again.
        __syncwarp();
        if (++add_stage_ == kStages) {
            add_stage_ = 0;
            parity_ ^= 1;
        }
    }

    __device__ void store(const Part& sums, bool wide, std::byte* target, int piece) {
        const int lane = threadIdx.x % kWarpSize;
        // What was stored from this memory before has left it.
        if (lane == 0) ptx::wait_bulk_reads<kOuts - 1>();
        __syncwarp();
        std::byte* out = outs_ + out_stage_ * kStageBytes;
        auto* to = reinterpret_cast<uint4*>(out);
        const bool is_wide = sizeof(T) == 2 && wide;
        if (is_wide) {
            if constexpr (sizeof(T) == 2) {
#pragma unroll
                for (int step = 0; step < kVectors / 2; ++step) {
                    to[2 * (lane + step * kWarpSize)] = sums.wide(step, 0);
                    to[2 * (lane + step * kWarpSize) + 1] = sums.wide(step, 1);
                }
            }
        } else {
#pragma unroll
            for (int step = 0; step < kVectors; ++step) {
                to[lane + step * kWarpSize] = device::pack<T>(sums.values[step]);
            }
        }
        // Each lane's words are made known to the copy engine before one lane asks it to store them.
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (lane == 0) {
            const int scale = is_wide ? 2 : 1;
            ptx::bulk_store(target + pieces_.offset(piece) * scale, out, pieces_.bytes(piece) * scale);
            ptx::bulk_commit();
        }
        out_stage_ = out_stage_ + 1 == kOuts ? 0 : out_stage_ + 1;
    }

    std::byte* stages_;
    std::byte* outs_;
    uint64_t* barriers_;
    const device::Pieces pieces_;
    int load_stage_ = 0, add_stage_ = 0, out_stage_ = 0;
    uint32_t parity_ = 0;
};

// Terms of 64-bit sums leave no shared memory for more warps.
template <class T, bool kBulk, Mode kMode>
using SummerOf = std::conditional_t<kBulk, BulkSums<T, kMode != Mode::kFew && sizeof(T) < 8>, VectorSums<T>>;

#else

// Earlier GPUs have no copy engine for rows; what asks for it does nothing there.
template <class T, bool kBulk, Mode kMode>
using SummerOf = VectorSums<T>;

#endif

}  // namespace moe_ep::combine
