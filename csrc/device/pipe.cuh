#pragma once

#include <cstdint>

#include "device/ptx.cuh"

// Rows on their way through shared memory: one thread loads pieces ahead and stores each to any number of places.
namespace moe_ep::device {

inline constexpr int kPipeStages = 4;

// What a block makes of its shared memory: a warp has a pipe. Long stages keep more of a warp's bytes on their way; of
// many pipes others go on while one waits for what it has to know of its next rows.
struct PipeShape {
    int num_warps;
    int stage_bytes;
};
inline constexpr PipeShape kFewPipes{7, 7168}, kManyPipes{14, 3584};

// Pieces of at most `max_bytes` that rows are cut into on their way through shared memory.
struct Pieces {
    int64_t row_bytes;
    int num_pieces;
    uint32_t piece_bytes;

    __device__ Pieces(int64_t row_bytes, int max_bytes) : row_bytes(row_bytes) {
        constexpr int kAlignment = 16;
        num_pieces = static_cast<int>((row_bytes + max_bytes - 1) / max_bytes);
        const int64_t even = (row_bytes + num_pieces - 1) / num_pieces;
        piece_bytes = static_cast<uint32_t>((even + kAlignment - 1) / kAlignment * kAlignment);
    }
    __device__ int64_t offset(int piece) const { return static_cast<int64_t>(piece) * piece_bytes; }
    __device__ uint32_t bytes(int piece) const {
        const int64_t left = row_bytes - offset(piece);
        return left < piece_bytes ? static_cast<uint32_t>(left) : piece_bytes;
    }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Belongs to one warp and is used by one of its threads alone. Made by all of them, so that its state is in registers.
class BulkPipe {
public:
    __device__ BulkPipe(std::byte* stages, uint64_t* barriers, int stage_bytes)
        : stages_(stages), barriers_(barriers), stage_bytes_(stage_bytes) {}

    // Called by the one thread before all else.
    __device__ void init() {
        for (int stage = 0; stage < kPipeStages; ++stage) ptx::barrier_init(barriers_ + stage, 1);
        ptx::fence_barrier_init();
    }

    __device__ bool is_full() const { return num_loading_ == kPipeStages - 1; }
    __device__ bool is_empty() const { return num_loading_ == 0; }

    // Begins to load a piece. The stage it takes was last stored from kPipeStages pieces ago.
    __device__ void load(const std::byte* source, uint32_t num_bytes) {
        // All but the latest store have left their stages; that one's is never taken, since one stage stays free.
        ptx::wait_bulk_reads<1>();
        ptx::barrier_expect_bytes(barriers_ + load_stage_, num_bytes);
        ptx::bulk_load(stages_ + load_stage_ * stage_bytes_, source, num_bytes, barriers_ + load_stage_);
        load_stage_ = load_stage_ + 1 == kPipeStages ? 0 : load_stage_ + 1;
        ++num_loading_;
    }

    // Waits for the oldest piece and returns where it is.
    __device__ const std::byte* front() const {
        while (!ptx::barrier_passed(barriers_ + store_stage_, parity_)) {
        }
        return stages_ + store_stage_ * stage_bytes_;
    }

    // All stores of the oldest piece are issued.
    __device__ void pop() {
        ptx::bulk_commit();
        store_stage_ = store_stage_ + 1 == kPipeStages ? 0 : store_stage_ + 1;
        if (store_stage_ == 0) parity_ ^= 1;
        --num_loading_;
    }

private:
    std::byte* stages_;
    uint64_t* barriers_;
    const int stage_bytes_;
    int load_stage_ = 0, store_stage_ = 0, num_loading_ = 0;
    uint32_t parity_ = 0;
};

#endif

}  // namespace moe_ep::device
