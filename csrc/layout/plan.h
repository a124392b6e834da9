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

// Tokens are cut into chunks of consecutive ones, a warp each. More chunks fill the GPU, fewer keep the scan over them
// short.
struct PlanChunks {
    int64_t chunk_tokens;
    int64_t num_chunks;

    static constexpr int64_t kGroupTokens = 32;  // a warp takes this many tokens at a time
    static constexpr int64_t kMaxChunks = 512;

    MOE_EP_HOST_DEVICE explicit PlanChunks(int64_t num_tokens) {
        const int64_t num_groups = (num_tokens + kGroupTokens - 1) / kGroupTokens;
        chunk_tokens = (num_groups + kMaxChunks - 1) / kMaxChunks * kGroupTokens;
        num_chunks = chunk_tokens == 0 ? 0 : (num_tokens + chunk_tokens - 1) / chunk_tokens;
    }
};

// Device memory between the kernels: each chunk's counts, which the scan turns into the numbers that precede the chunk.
struct PlanWorkspace {
    Buffer<int32_t> counts;  // [num_chunks][E + R]
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE PlanWorkspace(void* base, const PlanParams& params) : PlanWorkspace(Cursor(base), params) {}

private:
    MOE_EP_HOST_DEVICE PlanWorkspace(Cursor cursor, const PlanParams& params)
        : counts(cursor, PlanChunks(params.num_tokens).num_chunks, params.num_experts + params.num_ranks),
          num_bytes(cursor.num_bytes()) {}
};

// Shared memory of one warp: running counts in the order of the workspace's columns, and the ranks that 32 tokens go
// to.
struct PlanShared {
    int32_t* counts;        // [E + R]
    uint64_t* token_ranks;  // [32] bit r of word t: token t of the group goes to rank r
    uint32_t* rank_tokens;  // [R] the same bits transposed
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE PlanShared(void* base, const PlanParams& params) {
        Cursor cursor(base);
        counts = cursor.take<int32_t>(params.num_experts + params.num_ranks);
        token_ranks = cursor.take<uint64_t>(PlanChunks::kGroupTokens);
        rank_tokens = cursor.take<uint32_t>(params.num_ranks);
        num_bytes = cursor.num_bytes();
    }
};

}  // namespace moe_ep
