#pragma once

#include <cstdint>

#include "layout/buffer.h"

namespace moe_ep {

inline constexpr int kMaxTopK = 64;
inline constexpr int kMaxExperts = 4096;
// One bit per rank fits a 64-bit word.
inline constexpr int kMaxRanks = 64;

// What the plan kernels and their host twin take. Device addresses for the kernels, host addresses for the twin.
// Expert j lives on rank j / (E / R). Ids outside 0 .. E - 1 are no choice: nothing is counted or written out of
// bounds.
struct PlanParams {
    const void* topk_idx = nullptr;  // [T, K] signed integers of index_bytes bytes; -1 = no choice
    int index_bytes = 0;             // 4 or 8
    int64_t num_tokens = 0;
    int top_k = 0;
    int num_experts = 0;
    int num_ranks = 0;

    int32_t* choices_per_expert = nullptr;  // [E]
    int32_t* tokens_per_rank = nullptr;     // [R] a token counts once per rank, however many of its experts live there
    uint8_t* is_token_in_rank = nullptr;    // [T, R] 0 or 1
    int32_t* idx_in_expert =
        nullptr;  // [T, K] position among the choices of that expert in (token, k) order, -1 = no choice
    int32_t* idx_in_rank =
        nullptr;  // [T, R] position among the tokens of that rank in token order, -1 = not one of them
    uint32_t* token_ranks = nullptr;  // [T] bit r: the token goes to rank r; null where not wanted, R <= 32 otherwise

    void* workspace = nullptr;  // PlanWorkspace of the kernels; the twin needs none
};

// Shared memory of one warp: running counts of experts and ranks, and the ranks that 32 tokens go to.
struct PlanShared {
    int32_t* counts;        // [E + R]
    uint64_t* token_ranks;  // [32] bit r of word t: token t of the group goes to rank r
    uint32_t* rank_tokens;  // [R] the same bits transposed
    int64_t num_bytes;

    static constexpr int kGroupTokens = 32;  // a warp takes at most this many tokens at a time

    MOE_EP_HOST_DEVICE PlanShared(void* base, const PlanParams& params) {
        Cursor cursor(base);
        counts = cursor.take<int32_t>(params.num_experts + params.num_ranks);
        token_ranks = cursor.take<uint64_t>(kGroupTokens);
        rank_tokens = cursor.take<uint32_t>(params.num_ranks);
        num_bytes = cursor.num_bytes();
    }
};

// Tokens are cut into chunks of consecutive ones, a warp each. More blocks fill the GPU; every block adds up the counts
// of those before it, which bounds their number where there are many experts.
struct PlanGrid {
    int num_warps;  // per block
    int num_blocks;
    int64_t max_blocks;  // of any number of tokens
    int64_t chunk_tokens;

    static constexpr int kMaxWarps = 16;
    static constexpr int kMinTokens = 8, kFewBlocks = 16;
    static constexpr int64_t kMinBlocks = 8, kMaxBlocks = 64;
    static constexpr int64_t kMaxSums = 1 << 15;
    static constexpr int64_t kMaxSharedBytes = 96 << 10;  // of a block, on all GPUs

    MOE_EP_HOST_DEVICE explicit PlanGrid(const PlanParams& params) {
        const int64_t warp_bytes = PlanShared(nullptr, params).num_bytes;
        num_warps = kMaxWarps;
        while (num_warps > 1 && num_warps * warp_bytes > kMaxSharedBytes) num_warps /= 2;
        max_blocks = kMaxSums / (params.num_experts + params.num_ranks);
        max_blocks = max_blocks < kMinBlocks ? kMinBlocks : max_blocks > kMaxBlocks ? kMaxBlocks : max_blocks;
        // Chunks of fewer tokens take less time, as long as there are not many blocks to add up.
        int64_t group_tokens = kMinTokens;
        const int64_t few_blocks = max_blocks < kFewBlocks ? max_blocks : kFewBlocks;
        while (group_tokens < PlanShared::kGroupTokens && params.num_tokens > group_tokens * num_warps * few_blocks) {
            group_tokens *= 2;
        }
        const int64_t groups = (params.num_tokens + group_tokens - 1) / group_tokens;
        const int64_t max_chunks = max_blocks * num_warps;
        const int64_t chunk_groups = groups <= max_chunks ? 1 : (groups + max_chunks - 1) / max_chunks;
        chunk_tokens = chunk_groups * group_tokens;
        const int64_t chunks = (groups + chunk_groups - 1) / chunk_groups;
        num_blocks = chunks <= num_warps ? 1 : static_cast<int>((chunks + num_warps - 1) / num_warps);
    }
    // There is no more than one block, up to max_blocks, for every so many tokens, and one.
    MOE_EP_HOST_DEVICE int64_t min_block_tokens() const { return kMinTokens * num_warps; }
};

// Device memory of the kernel: what each block counts.
struct PlanWorkspace {
    Buffer<int32_t> sums;  // [num_blocks][E + R]
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE PlanWorkspace(void* base, const PlanParams& params) : PlanWorkspace(Cursor(base), params) {}

private:
    MOE_EP_HOST_DEVICE PlanWorkspace(Cursor cursor, const PlanParams& params)
        : sums(cursor, PlanGrid(params).num_blocks, params.num_experts + params.num_ranks),
          num_bytes(cursor.num_bytes()) {}
};

}  // namespace moe_ep
