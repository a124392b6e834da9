#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "host/cuda/channel.h"
#include "host/cuda/event.h"
#include "layout/exchange.h"

// Whole exchanges in few calls: what Python would launch piece by piece costs it more time than the GPU needs for them.
namespace moe_ep {

using Header = std::vector<int32_t>;

// What dispatches with equal settings have in common before rows come in.
struct CountSettings {
    int num_ranks;
    int top_k;
    int num_experts;
    int index_bytes;
    int alignment;
    Layout layout;
    bool drop;     // whether choices beyond a capacity are dropped
    bool by_mask;  // whether topk_idx holds ranks instead of experts, one column each; top_k is 0 then
};

// How rows travel.
struct RowSettings {
    int64_t row_bytes;  // as they travel
    int weight_words;   // per choice
    int scale_words;    // per token
    Cast cast;
    int num_senders;
    int num_placers;
    bool bulk;
};

// A plan that is replayed, as addresses and sizes.
struct KeptPlan {
    int64_t num_tokens;
    int top_k;
    int num_experts;
    Layout layout;
    bool zero_padding;
    int64_t num_rows;
    int64_t max_chunks;
    std::byte* source;
    std::byte* received;
};

// The streams of an exchange: what the current one has been given so far comes first, but for placing, which comes
// behind the counting. `beside`: what it is given next is to run beside the exchange, and waits until that has its SMs.
// `told`: whether the end is told by an event; otherwise calls return null, and the queue is the current stream.
struct Streams {
    uintptr_t current;
    uintptr_t queue;
    bool beside;
    bool told;
};

// One dispatch that makes a plan. Constructing it launches nothing. The channel is given to each call anew: it may have
// been replaced by one with more memory since the tokens were counted.
class DispatchCall {
public:
    // `source`: memory of a SourcePlan. `told_choices`: [E] as the caller counts them, null for the plan's own.
    DispatchCall(const CountSettings& settings, int64_t num_tokens, std::byte* topk_idx, std::byte* source,
                 int32_t* told_choices, int32_t* told_tokens, int32_t* told_ends, uint8_t* told_overflow);

    void set_capacity(int64_t max_tokens, int64_t rows, int64_t per_expert);
    void set_total(int64_t* received_total) { open_.received_total = received_total; }
    // What rows need that are stored where they stay is counted too, whoever sends them.
    void count_direct() { open_.direct = 1; }
    // The rows that were set may stay in the arena. `num_groups`: of each source, where that is known to fit; 0 where
    // the sizes decide.
    void lend(int64_t num_groups);
    void set_rows(const RowSettings& settings, const std::byte* x, const int32_t* topk_weights, const int32_t* scales,
                  int64_t scale_stride, int64_t scale_word_stride);
    void set_output(std::byte* received, int64_t max_chunks, int64_t num_received, std::byte* out, int64_t num_rows,
                    int32_t* out_weights, int32_t* out_scales, int64_t* out_topk_idx, int32_t* out_source);

    // Counts and opens; the sizes are told without a capacity.
    void count(Channel& channel, const Header& header, Streams streams);
    // Counts, opens and, without waiting for any peer's placers, sends what fits the rings once.
    void send(Channel& channel, const Header& header, Streams streams);
    // Sends what is left and places all; the output was set after the sizes had come, in memory that is free for what
    // comes behind the opening.
    std::unique_ptr<Event> place(Channel& channel, Streams streams, uintptr_t place_queue, int64_t num_laps);
    // A whole dispatch whose output was set before.
    std::unique_ptr<Event> run(Channel& channel, const Header& header, Streams streams, bool counted);

    std::optional<Channel::Sizes> wait_sizes(const Channel& channel, double seconds) const {
        return channel.wait_sizes(ticket_, seconds);
    }
    // Whether rows that may stay in the arena do, by the sizes that were told.
    bool is_direct(const Channel& channel, int64_t max_tokens, int64_t most_rows) const;
    std::vector<int32_t> host_counts(const Channel& channel) const;
    bool tells_sizes() const { return open_.max_tokens == 0; }

private:
    // Whether senders leave no rows to be moved, so that all blocks send.
    bool sends_all() const { return params_.lends != 0 && params_.layout == Layout::kCompact; }
    void launch(Channel& channel, int num_senders, int num_placers, Laps laps, Streams streams);

    CountSettings settings_;
    RowSettings row_settings_{};
    PlanParams plan_{};
    OpenParams open_{};
    DispatchParams params_{};
    int64_t ticket_ = 0;
    std::optional<Event> counted_;  // the end of counting, which the host's sight of the sizes precedes
};

// Sends other rows along a plan. Scales travel where the settings say so.
std::unique_ptr<Event> replay(Channel& channel, const RowSettings& settings, const KeptPlan& plan, const Header& header,
                              const std::byte* x, const int32_t* scales, int64_t scale_stride,
                              int64_t scale_word_stride, std::byte* out, int32_t* out_scales, Streams streams);

// What combines with equal settings have in common.
struct CombineSettings {
    Element element;
    int64_t hidden;
    bool wide_wire;
    int weight_words;
    int value_words;
    bool only_own_values;
    int num_senders;
    int num_reducers;
    bool bulk;
};

// `top_k`: columns of values, which for plans by a mask have some though the plan has none.
std::unique_ptr<Event> combine(Channel& channel, const CombineSettings& settings, const KeptPlan& plan,
                               const Header& header, int top_k, const std::byte* y, const int32_t* row_weights,
                               const int32_t* values, std::byte* out, const std::byte* bias_0, const std::byte* bias_1,
                               int32_t* out_values, Streams streams);

}  // namespace moe_ep
