#include "host/plan.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "host/checks.h"

namespace moe_ep {

void check_plan_dims(const PlanParams& params) {
    const auto& p = params;
    check_argument(p.num_tokens >= 0, "num_tokens=", p.num_tokens, ": must not be negative");
    check_argument(p.top_k >= 1 && p.top_k <= kMaxTopK, "top_k=", p.top_k, ": must be 1 to ", kMaxTopK);
    check_argument(p.num_experts >= 1 && p.num_experts <= kMaxExperts, "num_experts=", p.num_experts, ": must be 1 to ",
                   kMaxExperts);
    check_argument(p.num_ranks >= 1 && p.num_ranks <= kMaxRanks, "num_ranks=", p.num_ranks, ": must be 1 to ",
                   kMaxRanks);
    check_argument(p.num_experts % p.num_ranks == 0, "num_experts=", p.num_experts,
                   ": must be a multiple of num_ranks=", p.num_ranks);
    // Positions are 32-bit; offsets into [T, K] and [T, R] are 64-bit everywhere.
    check_argument(p.num_tokens <= std::numeric_limits<int32_t>::max() / p.top_k, "num_tokens=", p.num_tokens,
                   ": num_tokens * top_k must be below 2**31, top_k=", p.top_k);
}

namespace {

template <class Index>
void plan_tokens(const PlanParams& params) {
    const auto* topk_idx = static_cast<const Index*>(params.topk_idx);
    const int64_t num_ranks = params.num_ranks;
    const int64_t experts_per_rank = params.num_experts / params.num_ranks;
    for (int64_t token = 0; token < params.num_tokens; ++token) {
        uint8_t* in_rank = params.is_token_in_rank + token * num_ranks;
        std::fill_n(in_rank, num_ranks, uint8_t{0});
        for (int64_t choice = token * params.top_k; choice < (token + 1) * params.top_k; ++choice) {
            const int64_t expert = topk_idx[choice];
            const bool chosen = expert >= 0 && expert < params.num_experts;
            params.idx_in_expert[choice] = chosen ? params.choices_per_expert[expert]++ : -1;
            if (chosen) in_rank[expert / experts_per_rank] = 1;
        }
        if (params.token_ranks != nullptr) {
            uint32_t ranks = 0;
            for (int64_t rank = 0; rank < num_ranks; ++rank) ranks |= static_cast<uint32_t>(in_rank[rank]) << rank;
            params.token_ranks[token] = ranks;
        }
        for (int64_t rank = 0; rank < num_ranks; ++rank) {
            params.idx_in_rank[token * num_ranks + rank] = in_rank[rank] ? params.tokens_per_rank[rank]++ : -1;
        }
    }
}

}  // namespace

void plan_on_host(const PlanParams& params) {
    std::fill_n(params.choices_per_expert, params.num_experts, 0);
    std::fill_n(params.tokens_per_rank, params.num_ranks, 0);
    dispatch_value<4, 8>("index_bytes", params.index_bytes, [&](auto index_bytes) {
        plan_tokens<std::conditional_t<index_bytes == 4, int32_t, int64_t>>(params);
    });
}

}  // namespace moe_ep
