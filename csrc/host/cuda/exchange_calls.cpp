#include "host/cuda/exchange_calls.h"

#include "host/checks.h"
#include "kernels/exchange.h"
#include "kernels/plan.h"

namespace moe_ep {
namespace {

void* stream_of(uintptr_t stream) {
    return reinterpret_cast<void*>(stream);
}

void fill_header(int32_t* words, const Header& header) {
    check_argument(header.size() == kHeaderWords, "header has ", header.size(), " words: must have ", kHeaderWords);
    for (int word = 0; word < kHeaderWords; ++word) words[word] = header[word];
}

// Begins an exchange without counts, behind what the current stream has been given. Returns how the kernel that moves
// its rows opens it: one that is launched when another has opened it would find its SMs taken by what runs beside it.
Opening begin_plainly(Channel& channel, const Header& header, Streams streams) {
    Opening opening{};
    opening.opens = 1;
    fill_header(opening.header, header);
    channel.order(streams.current, streams.queue);
    return opening;
}

// Launches on the queue, by `launch(event)`, where the event is to be recorded once all blocks have their SMs; null
// where nobody waits for that.
template <class Launch>
void launch_beside(Streams streams, Launch&& launch) {
    if (!streams.beside || streams.current == streams.queue || !launches_tell_start()) {
        launch(nullptr);
        return;
    }
    Event started;
    launch(started.handle(streams.queue));
    started.wait(streams.current);
    if (started.is_captured()) launch_nothing(stream_of(streams.current));
}

// The end of what the queue has been given, where somebody asks for it.
std::unique_ptr<Event> end_of(Streams streams) {
    if (!streams.told) return nullptr;
    auto event = std::make_unique<Event>();
    event->record(streams.queue);
    return event;
}

RowParams kept_rows(const Channel& channel, const KeptPlan& plan, int64_t row_bytes, int64_t meta_words) {
    const PlanParams dims{.num_tokens = plan.num_tokens, .num_ranks = channel.num_ranks()};
    const SourcePlan source(plan.source, dims, plan.num_experts);
    const ReceivedPlan received(plan.received, channel.num_ranks(), plan.max_chunks, 0, 0);
    return {.row_bytes = row_bytes,
            .meta_words = meta_words,
            .top_k = plan.top_k,
            .num_experts = plan.num_experts,
            .max_chunks = plan.max_chunks,
            .table = source.table,
            .groups = received.groups,
            .positions = received.positions,
            .token_ranks = source.token_ranks,
            .idx_in_rank = source.idx_in_rank,
            .num_tokens = plan.num_tokens};
}

}  // namespace

DispatchCall::DispatchCall(const CountSettings& settings, int64_t num_tokens, std::byte* topk_idx, std::byte* source,
                           int32_t* told_choices, int32_t* told_tokens, int32_t* told_ends, uint8_t* told_overflow)
    : settings_(settings) {
    const int num_ranks = settings.num_ranks;
    plan_ = {.topk_idx = topk_idx,
             .index_bytes = settings.index_bytes,
             .num_tokens = num_tokens,
             .top_k = settings.by_mask ? num_ranks : settings.top_k,
             .num_experts = settings.by_mask ? num_ranks : settings.num_experts,
             .num_ranks = num_ranks};
    const SourcePlan own(source, plan_, settings.num_experts);
    plan_.choices_per_expert = own.choices_per_expert;
    plan_.tokens_per_rank = own.tokens_per_rank;
    plan_.is_token_in_rank = own.is_token_in_rank;
    plan_.idx_in_expert = own.idx_in_expert;
    plan_.idx_in_rank = own.idx_in_rank;
    plan_.token_ranks = own.token_ranks;
    plan_.workspace = own.workspace;
    open_.choices_per_expert = told_choices == nullptr ? own.choices_per_expert : told_choices;
    open_.tokens_per_rank = own.tokens_per_rank;
    open_.num_tokens = num_tokens;
    open_.num_experts = settings.num_experts;
    open_.alignment = settings.alignment;
    open_.layout = settings.layout;
    open_.table = own.table;
    open_.told_tokens = told_tokens;
    open_.told_ends = told_ends;
    open_.told_overflow = told_overflow;
    params_.rows.top_k = settings.top_k;
    params_.rows.num_experts = settings.num_experts;
    params_.rows.table = own.table;
    params_.rows.token_ranks = own.token_ranks;
    params_.rows.idx_in_rank = own.idx_in_rank;
    params_.rows.num_tokens = num_tokens;
    params_.with_plan = 1;
    params_.layout = settings.layout;
    params_.topk_idx = settings.by_mask ? nullptr : topk_idx;
    params_.index_bytes = settings.index_bytes;
    params_.idx_in_expert = own.idx_in_expert;
}

void DispatchCall::set_capacity(int64_t max_tokens, int64_t rows, int64_t per_expert) {
    open_.max_tokens = max_tokens;
    open_.capacity = {rows, per_expert, settings_.drop};
}

void DispatchCall::lend(int64_t num_groups) {
    count_direct();
    params_.lends = 1;
    params_.direct_groups = num_groups;
}

bool DispatchCall::is_direct(const Channel& channel, int64_t max_tokens, int64_t most_rows) const {
    if (params_.lends == 0 || params_.direct_groups > 0) return params_.lends != 0;
    const RecordDims dims{params_.rows.row_bytes, params_.rows.meta_words};
    return fits_directly(channel.num_ranks(), channel.payload_bytes(), num_chunks(max_tokens), dims, most_rows);
}

void DispatchCall::set_rows(const RowSettings& settings, const std::byte* x, const int32_t* topk_weights,
                            const int32_t* scales, int64_t scale_stride, int64_t scale_word_stride) {
    row_settings_ = settings;
    params_.rows.row_bytes = settings.row_bytes;
    params_.rows.meta_words = (2 + settings.weight_words) * settings_.top_k + settings.scale_words;
    params_.cast = settings.cast;
    params_.weight_words = settings.weight_words;
    params_.scale_words = settings.scale_words;
    params_.x = x;
    params_.topk_weights = topk_weights;
    params_.scales = scales;
    params_.scale_stride = scale_stride;
    params_.scale_word_stride = scale_word_stride;
    // Counts that are used again may be used for rows of either kind.
    params_.lends = 0;
    params_.direct_groups = 0;
}

void DispatchCall::set_output(std::byte* received, int64_t max_chunks, int64_t num_received, std::byte* out,
                              int64_t num_rows, int32_t* out_weights, int32_t* out_scales, int64_t* out_topk_idx,
                              int32_t* out_source) {
    const ReceivedPlan plan(received, settings_.num_ranks, max_chunks, num_received, settings_.top_k);
    params_.rows.max_chunks = max_chunks;
    params_.rows.groups = plan.groups;
    params_.rows.positions = plan.positions;
    params_.out = out;
    params_.num_rows = num_rows;
    params_.out_weights = out_weights;
    params_.out_scales = out_scales;
    params_.out_topk_idx = out_topk_idx;
    params_.out_source = out_source;
    params_.zero_padding = settings_.layout == Layout::kExpanded;
}

void DispatchCall::count(Channel& channel, const Header& header, Streams streams) {
    params_.opening = {};
    fill_header(open_.header, header);
    channel.order(streams.current, streams.queue);
    void* const stream = stream_of(streams.queue);
    if (settings_.drop) {
        // What the experts keep follows from all choices; what is sent is then planned anew.
        OpenParams all = open_;
        all.received_total = nullptr;
        channel.count(plan_, all, false, stream);
        const PlanTable table(open_.table, settings_.num_ranks, settings_.num_experts);
        launch_drop(const_cast<void*>(plan_.topk_idx), plan_.index_bytes, plan_.idx_in_expert, table.keep_choices,
                    plan_.num_tokens * plan_.top_k, settings_.num_experts, stream);
    }
    ticket_ = channel.count(plan_, open_, tells_sizes(), stream);
}

void DispatchCall::launch(Channel& channel, int num_senders, int num_placers, Laps laps, Streams streams) {
    if (num_senders + num_placers == 0) return;
    params_.num_senders = num_senders;
    params_.num_placers = num_placers;
    params_.laps = laps;
    launch_beside(streams, [&](void* started) {
        channel.dispatch(params_, row_settings_.bulk, started, stream_of(streams.queue));
    });
}

void DispatchCall::send(Channel& channel, const Header& header, Streams streams) {
    count(channel, header, streams);
    counted_.emplace().record(streams.queue);
    const int senders = row_settings_.num_senders + (sends_all() ? row_settings_.num_placers : 0);
    launch(channel, senders, 0, Laps::kFirst, streams);
}

std::unique_ptr<Event> DispatchCall::place(Channel& channel, Streams streams, uintptr_t place_queue, int64_t num_laps) {
    const int senders = row_settings_.num_senders, placers = row_settings_.num_placers;
    // NOTE: the sizes that this host has seen come before other blocks have numbered their tokens. Later laps are sent
    // and placed by one launch, so that senders never wait for placers that are not there.
    counted_->wait(place_queue);
    const Streams placing{streams.current, place_queue, streams.beside, streams.told};
    if (num_laps > 1) {
        launch(channel, senders, placers, Laps::kLater, placing);
    } else {
        launch(channel, 0, senders + placers, Laps::kLater, placing);
    }
    // Later exchanges come after this one's rows are placed.
    channel.order(place_queue, streams.queue);
    return end_of(streams);
}

std::unique_ptr<Event> DispatchCall::run(Channel& channel, const Header& header, Streams streams, bool counted) {
    params_.num_counting = 0;
    if (counted) {
        params_.opening = begin_plainly(channel, header, streams);
    } else {
        count(channel, header, streams);
        // An early launch holds SMs while peers are late, which computation beside the exchange may want.
        const bool alone = streams.current == streams.queue;
        if (row_settings_.bulk && params_.lends == 0 && alone && launches_tell_start()) {
            params_.num_counting = PlanGrid(plan_).num_blocks;
            fill_header(params_.opening.header, header);
        }
    }
    const int senders = row_settings_.num_senders, placers = row_settings_.num_placers;
    // NOTE: blocks that all send take one lap alone: in further ones they would wait for placers.
    const bool all_send = sends_all() && params_.direct_groups > 0;
    launch(channel, all_send ? senders + placers : senders, all_send ? 0 : placers, Laps::kAll, streams);
    return end_of(streams);
}

std::vector<int32_t> DispatchCall::host_counts(const Channel& channel) const {
    return channel.host_counts(ticket_, settings_.num_experts / settings_.num_ranks);
}

std::unique_ptr<Event> replay(Channel& channel, const RowSettings& settings, const KeptPlan& plan, const Header& header,
                              const std::byte* x, const int32_t* scales, int64_t scale_stride,
                              int64_t scale_word_stride, std::byte* out, int32_t* out_scales, Streams streams) {
    DispatchParams params{};
    params.rows = kept_rows(channel, plan, settings.row_bytes, settings.scale_words);
    params.opening = begin_plainly(channel, header, streams);
    params.num_senders = settings.num_senders;
    params.num_placers = settings.num_placers;
    params.laps = Laps::kAll;
    params.with_plan = 0;
    params.layout = plan.layout;
    params.cast = Cast::kNone;
    params.x = x;
    params.index_bytes = 8;
    params.scale_words = settings.scale_words;
    params.scales = scales;
    params.scale_stride = scale_stride;
    params.scale_word_stride = scale_word_stride;
    params.out = out;
    params.num_rows = plan.num_rows;
    params.out_scales = out_scales;
    params.zero_padding = plan.zero_padding;
    launch_beside(streams,
                  [&](void* started) { channel.dispatch(params, settings.bulk, started, stream_of(streams.queue)); });
    return end_of(streams);
}

std::unique_ptr<Event> combine(Channel& channel, const CombineSettings& settings, const KeptPlan& plan,
                               const Header& header, int top_k, const std::byte* y, const int32_t* row_weights,
                               const int32_t* values, std::byte* out, const std::byte* bias_0, const std::byte* bias_1,
                               int32_t* out_values, Streams streams) {
    const int64_t element_bytes = settings.element == Element::kDouble                        ? 8
                                  : settings.element == Element::kFloat || settings.wide_wire ? 4
                                                                                              : 2;
    CombineParams params{};
    params.rows = kept_rows(channel, plan, settings.hidden * element_bytes, top_k * settings.value_words);
    params.opening = begin_plainly(channel, header, streams);
    params.num_senders = settings.num_senders;
    params.num_reducers = settings.num_reducers;
    params.layout = plan.layout;
    params.element = settings.element;
    params.wide_wire = settings.wide_wire;
    params.hidden = settings.hidden;
    params.y = y;
    params.row_weights = row_weights;
    params.weight_words = settings.weight_words;
    params.values = values;
    params.value_words = settings.value_words;
    params.only_own_values = settings.only_own_values;
    params.out = out;
    params.bias[0] = bias_0;
    params.bias[1] = bias_1;
    params.out_values = out_values;
    params.rows.top_k = top_k;
    launch_beside(streams,
                  [&](void* started) { channel.combine(params, settings.bulk, started, stream_of(streams.queue)); });
    return end_of(streams);
}

}  // namespace moe_ep
