#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/arena.h"
#include "layout/plan.h"

namespace moe_ep {

// What a rank that waits, or whose peer waits, is doing; told in errors.
enum class Phase : int32_t { kOpening = 0, kArrival = 1, kRoom = 2 };

enum class Trouble : int32_t { kNone = 0, kTimeout = 1, kAborted = 2, kMismatch = 3, kTooManyTokens = 4 };

// Pinned host memory: what went wrong first. `trouble` is written last.
struct StatusWords {
    int64_t trouble;
    int64_t peer;
    int64_t phase;
    int64_t expected;
    int64_t seen;
    int64_t theirs[kHeaderWords];
    int64_t mine[kHeaderWords];
    int64_t overflowed;  // exchanges whose capacity did not hold, so far
    int64_t overflow_rank;
    int64_t overflow_needed;
    int64_t overflow_given;
};

// Pinned host memory: sizes of a dispatch; `ticket` is written last.
struct SizeWords {
    int64_t num_rows;      // layout rows
    int64_t num_received;  // rows as they arrive, one per token and source
    int64_t max_tokens;    // largest T of any rank
    int64_t most_rows;     // layout rows of the rank with most, where that was asked for
    int64_t ticket;
};

// Device memory of one rank, kept between exchanges and advanced by the kernels alone.
struct LinkState {
    uint64_t epoch;   // exchanges opened so far
    uint32_t failed;  // set by the first failure, and then no kernel waits or moves any more
    uint32_t blocks;  // of the kernel that opens an exchange, that have come so far
    // Pieces of an exchange's work that warps have taken; opening one clears the next one's.
    uint32_t tickets[2];
    uint64_t counting;  // number of the exchange that the latest plan is counted for
    // Number of the exchange that each block of its plan has counted for, and has numbered its tokens for.
    uint64_t counted[PlanGrid::kMaxBlocks], numbered[PlanGrid::kMaxBlocks];

    MOE_EP_HOST_DEVICE uint32_t* tickets_of(uint64_t exchange) { return tickets + exchange % 2; }
};

// Mistakes that a test build can make on purpose.
enum class Fault : int32_t {
    kNone = 0,
    kEarlyFlag = 1,    // a group's flag is raised 50 us before its rows are stored
    kWrongSlot = 2,    // rows are stored one slot further round the ring
    kSkippedRow = 3,   // one row of a group is not stored
    kSkippedRoom = 4,  // a later lap does not wait until its place has been read, which takes 50 us
    kEarlyExit = 5,    // a rank without tokens places nothing either
};

// Everything that stays the same from exchange to exchange.
struct Link {
    std::byte* arenas[kMaxNodeRanks];  // every rank's arena as mapped here
    int32_t rank;
    int32_t num_ranks;
    int64_t payload_bytes;  // ring of one source
    LinkState* state;
    StatusWords* status;
    uint64_t timeout_ns;
    Fault fault;  // read by test builds alone

    MOE_EP_HOST_DEVICE ArenaLayout arena(int of_rank) const {
        return ArenaLayout(arenas[of_rank], num_ranks, payload_bytes);
    }
};

enum class Layout : int32_t { kCompact = 0, kExpanded = 1, kSlab = 2 };

// The device's half of a plan, written when an exchange is opened. Local experts are those of this rank.
struct PlanTable {
    int32_t* source_tokens;      // [R] T of each rank
    int32_t* source_rows;        // [R + 1] first received row of each source; the last entry is their number
    int32_t* expert_rows;        // [R][e] layout row of each source's first choice of each local expert
    int32_t* tokens_per_expert;  // [e]
    int32_t* expert_ends;        // [e] end of each group, padding included
    int32_t* keep_choices;       // [E] of this rank's choices of each expert, how many stay when others are dropped
    int32_t* overflow;           // [1] whether outputs are to be poisoned
    int32_t* rank_rows;          // [R][R] rows that each rank receives from sources up to and with each, [source][rank]
    int32_t* most_tokens;        // [1] largest T of any rank
    int32_t* most_rows;          // [1] layout rows of the rank with most; this and the next only where asked for
    int32_t* direct_rows;        // [E] layout row, on its rank, of this rank's first choice of each expert

    // Carves a table out of `num_words` int32 words.
    MOE_EP_HOST_DEVICE PlanTable(int32_t* words, int num_ranks, int num_experts) {
        const int64_t local = num_experts / num_ranks;
        source_tokens = words;
        source_rows = source_tokens + num_ranks;
        expert_rows = source_rows + num_ranks + 1;
        tokens_per_expert = expert_rows + num_ranks * local;
        expert_ends = tokens_per_expert + local;
        keep_choices = expert_ends + local;
        overflow = keep_choices + num_experts;
        rank_rows = overflow + 1;
        most_tokens = rank_rows + num_ranks * num_ranks;
        most_rows = most_tokens + 1;
        direct_rows = most_rows + 1;
    }
    MOE_EP_HOST_DEVICE static int64_t num_words(int num_ranks, int num_experts) {
        const int64_t ranks = num_ranks, local = num_experts / num_ranks;
        return ranks + (ranks + 1) + ranks * local + 2 * local + num_experts + 1 + ranks * ranks + 2 + num_experts;
    }
};

// Alignment of the parts of a plan's blocks.
inline constexpr int64_t kPlanAlignment = 16;

// The source's half of a plan and what making it takes, in one block of device memory. Replays need what comes first.
struct SourcePlan {
    int32_t* table;               // PlanTable
    uint32_t* token_ranks;        // [T]
    int32_t* idx_in_rank;         // [T, R]
    int32_t* idx_in_expert;       // [T, K]
    int32_t* choices_per_expert;  // [E]
    int32_t* tokens_per_rank;     // [R]
    uint8_t* is_token_in_rank;    // [T, R]
    std::byte* workspace;
    int64_t num_bytes;

    // `dims`: sizes as the plan kernels count them, where rows go by a mask with ranks in place of experts.
    MOE_EP_HOST_DEVICE SourcePlan(void* base, const PlanParams& dims, int num_experts) {
        Cursor cursor(base);
        const int64_t pairs = dims.num_tokens * dims.num_ranks;
        table = cursor.take<int32_t>(PlanTable::num_words(dims.num_ranks, num_experts), kPlanAlignment);
        token_ranks = cursor.take<uint32_t>(dims.num_tokens, kPlanAlignment);
        idx_in_rank = cursor.take<int32_t>(pairs, kPlanAlignment);
        idx_in_expert = cursor.take<int32_t>(dims.num_tokens * dims.top_k, kPlanAlignment);
        choices_per_expert = cursor.take<int32_t>(dims.num_experts, kPlanAlignment);
        tokens_per_rank = cursor.take<int32_t>(dims.num_ranks, kPlanAlignment);
        is_token_in_rank = cursor.take<uint8_t>(pairs, kPlanAlignment);
        workspace = cursor.take<std::byte>(PlanWorkspace(nullptr, dims).num_bytes, kPlanAlignment);
        num_bytes = cursor.num_bytes(kPlanAlignment);
    }
};

// Room for the source's half, whatever the number of tokens T, as a formula that also tracers of Python can follow, to
// whom T is a symbol: fixed_words + ceil(token_bytes * T / 4) + block_words * min(max_blocks, 1 + T / block_tokens).
struct SourcePlanRoom {
    int64_t fixed_words;
    int64_t token_bytes;
    int64_t block_words;
    int64_t block_tokens;
    int64_t max_blocks;

    // `dims` as those of SourcePlan; their number of tokens counts for nothing.
    SourcePlanRoom(PlanParams dims, int num_experts) {
        constexpr int64_t kWord = sizeof(int32_t), kParts = 8;
        const PlanGrid grid(dims);
        dims.num_tokens = 0;
        // Where T is not a multiple, every part is moved on by less than the alignment.
        fixed_words = (SourcePlan(nullptr, dims, num_experts).num_bytes + kParts * kPlanAlignment) / kWord;
        token_bytes = kWord * (1 + dims.num_ranks + dims.top_k) + dims.num_ranks;
        block_words = dims.num_experts + dims.num_ranks;
        block_tokens = grid.min_block_tokens();
        max_blocks = grid.max_blocks;
    }
};

// The destination's half.
struct ReceivedPlan {
    int32_t* groups;     // [R][max_chunks][2]
    int32_t* positions;  // [N, K]
    int64_t num_bytes;

    MOE_EP_HOST_DEVICE ReceivedPlan(void* base, int num_ranks, int64_t max_chunks, int64_t num_received, int top_k) {
        Cursor cursor(base);
        groups = cursor.take<int32_t>(num_ranks * max_chunks * 2, kPlanAlignment);
        positions = cursor.take<int32_t>(num_received * top_k, kPlanAlignment);
        num_bytes = cursor.num_bytes(kPlanAlignment);
    }
};

// A capacity, or none: which rows there are, and what happens to more.
struct CapacityRule {
    int64_t rows;        // of this rank's output; 0 where not limited
    int64_t per_expert;  // fixed size of every group; 0 where groups are packed
    int32_t drop;        // whether choices beyond are dropped rather than outputs poisoned
};

// A kernel that opens its exchange itself: all of its blocks wait for all peers. Others follow the kernel that has
// counted for a dispatch, or an opening without rows.
struct Opening {
    int32_t opens;
    int32_t header[kHeaderWords];
};

// Opens an exchange: headers are compared on the GPU, counts exchanged with them, and all sizes follow.
struct OpenParams {
    Link link;
    int32_t header[kHeaderWords];  // kind, digest, serial, status, ...: the same on all ranks unless one is in trouble
    // The rest is used by dispatches only; choices_per_expert is null otherwise.
    const int32_t* choices_per_expert;  // [E]
    const int32_t* tokens_per_rank;     // [R]
    int64_t num_tokens;
    int64_t max_tokens;  // of any rank, that this rank's plan has room for; 0 where it is sized afterwards
    int32_t num_experts;
    int32_t alignment;
    Layout layout;
    CapacityRule capacity;
    int32_t direct;           // whether it is told where rows of this rank come to lie at all others
    int32_t* table;           // PlanTable
    int32_t* told_tokens;     // [e] as tokens_per_expert of the table, for the caller
    int32_t* told_ends;       // [e] as expert_ends
    uint8_t* told_overflow;   // [1] as overflow
    int64_t* received_total;  // [e] running count of received choices; null where nobody counts
    int32_t* host_counts;     // [e] pinned, as tokens_per_expert; null where no host waits
    SizeWords* sizes;         // null where no host waits
    int64_t ticket;
};

// Header words that are not compared: whether the rank raises instead of taking part, and where its reason can be read.
inline constexpr int kHeaderStatus = 3;
inline constexpr int kHeaderNote = 5;

// What both halves of an exchange know of its rows.
struct RowParams {
    int64_t row_bytes;   // as they travel
    int64_t meta_words;  // as they travel
    int32_t top_k;       // K of the plan; 0 for rows planned by a mask alone
    int32_t num_experts;
    int64_t max_chunks;  // groups per source that the plan has room for
    int32_t* table;      // PlanTable
    int32_t* groups;     // [R][max_chunks][2] of each source's group: first received row, mask of tokens
    int32_t* positions;  // [N, K] layout row of each received choice (compact rows: local id), -1 = another rank's
    const uint32_t* token_ranks;  // [T] bit r: the token goes to rank r
    const int32_t* idx_in_rank;   // [T, R] place of the token among its rank's; -1 = not one of them
    int64_t num_tokens;           // T
};

// Which laps round the rings a launch sends: the first one needs no room to be made by peers, and so never waits. That
// launch places nothing.
enum class Laps : int32_t { kAll = 0, kFirst = 1, kLater = 2 };

enum class Cast : int32_t { kNone = 0, kFromBf16 = 1, kFromHalf = 2, kFromFloat = 3 };

struct DispatchParams {
    Link link;
    RowParams rows;
    int32_t num_senders;  // blocks that send; they come first
    int32_t num_placers;  // blocks that place
    int32_t num_pipes;    // warps of a block with a pipe each, where there are pipes; chosen by the launch
    int32_t stage_bytes;  // of each pipe's stages
    Laps laps;
    Opening opening;
    // Blocks that count for this dispatch in the kernel before, beside which this one runs: senders begin as soon as
    // tokens are numbered. 0 where the kernel before has ended. The opening's header is theirs.
    int32_t num_counting;
    int32_t with_plan;      // metadata travels and the plan is written; otherwise it is replayed
    int32_t lends;          // whether rows of a new plan may be stored where they stay, in the arena of their rank
    int64_t direct_groups;  // groups of each source then, where they are known to fit; 0 where that follows from sizes
    Layout layout;
    Cast cast;  // to fp8 for the wire, and back
    // Sending
    const std::byte* x;    // [T] rows; of the dtype behind the cast
    const void* topk_idx;  // [T, K] int32 or int64
    int32_t index_bytes;
    int32_t weight_words;          // per choice, 0 without weights
    int32_t scale_words;           // per token, 0 without scales
    const int32_t* idx_in_expert;  // [T, K]
    const int32_t* topk_weights;   // [T, K] words
    const int32_t* scales;         // [T, scale_words], strided
    int64_t scale_stride, scale_word_stride;
    // Placing
    std::byte* out;  // [num_rows] layout rows
    int64_t num_rows;
    int32_t* out_weights;   // [num_rows] words, or [num_rows, K] for compact rows
    int32_t* out_scales;    // [num_rows, scale_words]
    int64_t* out_topk_idx;  // [num_rows, K] local ids (compact rows)
    int32_t* out_source;    // [N] token index at the source; [num_rows] for compact rows, -1 behind the last
    int32_t zero_padding;   // whether rows between a group's last and its end become zero
};

enum class Element : int32_t { kBf16 = 0, kHalf = 1, kFloat = 2, kDouble = 3 };

struct CombineParams {
    Link link;
    RowParams rows;
    int32_t num_senders;
    int32_t num_reducers;
    Opening opening;
    Layout layout;
    Element element;
    int32_t wide_wire;           // partial sums travel as fp32
    int64_t hidden;              // elements of a row
    const std::byte* y;          // [num_rows] layout rows
    const int32_t* row_weights;  // [num_rows] factors as words, or null
    int32_t weight_words;        // per factor: fp32 or, with 64-bit rows, fp64
    const int32_t* values;       // words that travel home beside the rows, in the shape of weights; or null
    int32_t value_words;         // per choice
    int32_t only_own_values;     // whether values of compact rows count for this rank's choices alone
    std::byte* out;              // [T] rows
    const std::byte* bias[2];    // [T] rows, or null
    int32_t* out_values;         // [T, K] words
};

}  // namespace moe_ep
