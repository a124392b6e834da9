#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/register.h"
#include "host/checks.h"
#include "host/errors.h"
#include "layout/exchange.h"
#if MOE_EP_WITH_CUDA
#include "host/cuda/capabilities.h"
#include "host/cuda/channel.h"
#endif

namespace py = pybind11;

namespace moe_ep {
namespace {

py::dict table_layout(int num_ranks, int num_experts) {
    check_argument(num_ranks >= 1 && num_ranks <= kMaxNodeRanks, "num_ranks=", num_ranks, ": must be 1 to ",
                   kMaxNodeRanks);
    check_argument(num_experts >= 1 && num_experts % num_ranks == 0, "num_experts=", num_experts,
                   ": must be a positive multiple of num_ranks=", num_ranks);
    int32_t* const base = nullptr;
    const PlanTable table(base, num_ranks, num_experts);
    const auto word = [&](const int32_t* ptr) {
        return static_cast<int64_t>(reinterpret_cast<uintptr_t>(ptr) / sizeof(int32_t));
    };
    py::dict told;
    told["source_tokens"] = word(table.source_tokens);
    told["source_rows"] = word(table.source_rows);
    told["expert_rows"] = word(table.expert_rows);
    told["tokens_per_expert"] = word(table.tokens_per_expert);
    told["expert_ends"] = word(table.expert_ends);
    told["keep_choices"] = word(table.keep_choices);
    told["overflow"] = word(table.overflow);
    told["rank_rows"] = word(table.rank_rows);
    told["num_words"] = PlanTable::num_words(num_ranks, num_experts);
    return told;
}

int64_t arena_bytes(int num_ranks, int64_t payload_bytes) {
    check_argument(num_ranks >= 1 && num_ranks <= kMaxNodeRanks, "num_ranks=", num_ranks, ": must be 1 to ",
                   kMaxNodeRanks);
    check_argument(payload_bytes >= 0 && payload_bytes % kRegionAlignment == 0, "payload_bytes=", payload_bytes,
                   ": must be a multiple of ", kRegionAlignment);
    return ArenaLayout(nullptr, num_ranks, payload_bytes).num_bytes;
}

py::dict group_layout(int64_t row_bytes, int64_t meta_words) {
    const RecordDims dims{row_bytes, meta_words};
    const GroupLayout group(nullptr, dims);
    py::dict told;
    told["meta"] = reinterpret_cast<uintptr_t>(group.meta.ptr);
    told["rows"] = reinterpret_cast<uintptr_t>(group.rows.ptr);
    told["num_bytes"] = group.num_bytes;
    told["max_ring_groups"] = kMaxRingGroups;
    return told;
}

#if MOE_EP_WITH_CUDA

template <class T>
T* device_pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::unique_ptr<Channel> make_channel(const std::vector<uintptr_t>& arenas, int rank, int64_t payload_bytes, int device,
                                      double timeout_s) {
    std::vector<std::byte*> pointers;
    for (const uintptr_t arena : arenas) pointers.push_back(reinterpret_cast<std::byte*>(arena));
    return std::make_unique<Channel>(pointers, rank, payload_bytes, device, timeout_s);
}

void fill_header(int32_t* words, const std::vector<int32_t>& header) {
    check_argument(header.size() == kHeaderWords, "header has ", header.size(), " words: must have ", kHeaderWords);
    for (int word = 0; word < kHeaderWords; ++word) words[word] = header[word];
}

void open_exchange(Channel& channel, const std::vector<int32_t>& header, uintptr_t stream) {
    OpenParams params{};
    fill_header(params.header, header);
    channel.open(params, device_pointer<void>(stream));
}

int64_t open_dispatch(Channel& channel, const std::vector<int32_t>& header, uintptr_t choices_per_expert,
                      uintptr_t tokens_per_rank, int64_t num_tokens, int64_t max_tokens, int num_experts, int alignment,
                      int layout, int64_t capacity_rows, int64_t capacity_per_expert, bool drop, uintptr_t table,
                      uintptr_t received_total, bool tell_sizes, uintptr_t stream) {
    OpenParams params{};
    fill_header(params.header, header);
    params.choices_per_expert = device_pointer<int32_t>(choices_per_expert);
    params.tokens_per_rank = device_pointer<int32_t>(tokens_per_rank);
    params.num_tokens = num_tokens;
    params.max_tokens = max_tokens;
    params.num_experts = num_experts;
    params.alignment = alignment;
    params.layout = static_cast<Layout>(layout);
    params.capacity = {capacity_rows, capacity_per_expert, drop};
    params.table = device_pointer<int32_t>(table);
    params.received_total = device_pointer<int64_t>(received_total);
    return channel.open_dispatch(params, tell_sizes, device_pointer<void>(stream));
}

RowParams make_rows(int64_t row_bytes, int64_t meta_words, int top_k, int num_experts, int64_t max_chunks,
                    uintptr_t table, uintptr_t groups, uintptr_t positions, uintptr_t token_ranks,
                    uintptr_t idx_in_rank, int64_t num_tokens) {
    return {.row_bytes = row_bytes,
            .meta_words = meta_words,
            .top_k = top_k,
            .num_experts = num_experts,
            .max_chunks = max_chunks,
            .table = device_pointer<int32_t>(table),
            .groups = device_pointer<int32_t>(groups),
            .positions = device_pointer<int32_t>(positions),
            .token_ranks = device_pointer<uint32_t>(token_ranks),
            .idx_in_rank = device_pointer<int32_t>(idx_in_rank),
            .num_tokens = num_tokens};
}

struct DispatchArguments {
    DispatchParams params{};
};

py::object trouble(const Channel& channel) {
    const StatusWords status = channel.status();
    if (status.trouble == 0) return py::none();
    py::dict told;
    told["kind"] = status.trouble;
    told["peer"] = status.peer;
    told["phase"] = status.phase;
    told["expected"] = status.expected;
    told["seen"] = status.seen;
    told["theirs"] = std::vector<int64_t>(status.theirs, status.theirs + kHeaderWords);
    told["mine"] = std::vector<int64_t>(status.mine, status.mine + kHeaderWords);
    return told;
}

py::tuple overflow(const Channel& channel) {
    const StatusWords status = channel.status();
    return py::make_tuple(status.overflowed, status.overflow_rank, status.overflow_needed, status.overflow_given);
}

#endif

}  // namespace

void register_channel(py::module_& module) {
    module.attr("CHUNK_TOKENS") = kChunkTokens;
    module.attr("HEADER_WORDS") = kHeaderWords;
    module.attr("MAX_NODE_RANKS") = kMaxNodeRanks;
    module.def("table_layout", &table_layout, py::kw_only(), py::arg("num_ranks"), py::arg("num_experts"),
               "First int32 word of each part of the table that a dispatch's plan keeps on the device, and num_words.");
    module.def("arena_bytes", &arena_bytes, py::kw_only(), py::arg("num_ranks"), py::arg("payload_bytes"),
               "Bytes of one rank's arena whose rings hold payload_bytes per source.");
    module.def("group_layout", &group_layout, py::kw_only(), py::arg("row_bytes"), py::arg("meta_words"),
               "Offsets and size of one group of rows in a ring.");
#if MOE_EP_WITH_CUDA
    module.def("kernel_problem", &find_kernel_problem, py::arg("device"),
               "Why the kernels of this build do not run on a device, as CUDA says it; empty where they do.");
    py::class_<DispatchArguments>(module, "DispatchArguments", "What Channel.dispatch moves, as addresses and sizes.")
        .def(
            py::init([](int64_t row_bytes, int64_t meta_words, int top_k, int num_experts, int64_t max_chunks,
                        uintptr_t table, uintptr_t groups, uintptr_t positions, uintptr_t token_ranks,
                        uintptr_t idx_in_rank, int64_t num_tokens, bool with_plan, int layout, int cast, uintptr_t x,
                        uintptr_t topk_idx, int index_bytes, int weight_words, int scale_words, uintptr_t idx_in_expert,
                        uintptr_t topk_weights, uintptr_t scales, int64_t scale_stride, int64_t scale_word_stride) {
                auto arguments = std::make_unique<DispatchArguments>();
                DispatchParams& params = arguments->params;
                params.rows = make_rows(row_bytes, meta_words, top_k, num_experts, max_chunks, table, groups, positions,
                                        token_ranks, idx_in_rank, num_tokens);
                params.with_plan = with_plan;
                params.layout = static_cast<Layout>(layout);
                params.cast = static_cast<Cast>(cast);
                params.x = device_pointer<std::byte>(x);
                params.topk_idx = device_pointer<void>(topk_idx);
                params.index_bytes = index_bytes;
                params.weight_words = weight_words;
                params.scale_words = scale_words;
                params.idx_in_expert = device_pointer<int32_t>(idx_in_expert);
                params.topk_weights = device_pointer<int32_t>(topk_weights);
                params.scales = device_pointer<int32_t>(scales);
                params.scale_stride = scale_stride;
                params.scale_word_stride = scale_word_stride;
                return arguments;
            }),
            py::kw_only(), py::arg("row_bytes"), py::arg("meta_words"), py::arg("top_k"), py::arg("num_experts"),
            py::arg("max_chunks") = 0, py::arg("table"), py::arg("groups") = 0, py::arg("positions") = 0,
            py::arg("token_ranks"), py::arg("idx_in_rank"), py::arg("num_tokens"), py::arg("with_plan"),
            py::arg("layout"), py::arg("cast") = 0, py::arg("x"), py::arg("topk_idx") = 0, py::arg("index_bytes") = 8,
            py::arg("weight_words") = 0, py::arg("scale_words") = 0, py::arg("idx_in_expert") = 0,
            py::arg("topk_weights") = 0, py::arg("scales") = 0, py::arg("scale_stride") = 0,
            py::arg("scale_word_stride") = 0)
        .def(
            "set_output",
            [](DispatchArguments& arguments, int64_t max_chunks, uintptr_t groups, uintptr_t positions, uintptr_t out,
               int64_t num_rows, uintptr_t out_weights, uintptr_t out_scales, uintptr_t out_topk_idx,
               uintptr_t out_source, bool zero_padding) {
                DispatchParams& params = arguments.params;
                params.rows.max_chunks = max_chunks;
                params.rows.groups = device_pointer<int32_t>(groups);
                params.rows.positions = device_pointer<int32_t>(positions);
                params.out = device_pointer<std::byte>(out);
                params.num_rows = num_rows;
                params.out_weights = device_pointer<int32_t>(out_weights);
                params.out_scales = device_pointer<int32_t>(out_scales);
                params.out_topk_idx = device_pointer<int64_t>(out_topk_idx);
                params.out_source = device_pointer<int32_t>(out_source);
                params.zero_padding = zero_padding;
            },
            py::kw_only(), py::arg("max_chunks"), py::arg("groups"), py::arg("positions"), py::arg("out"),
            py::arg("num_rows"), py::arg("out_weights") = 0, py::arg("out_scales") = 0, py::arg("out_topk_idx") = 0,
            py::arg("out_source") = 0, py::arg("zero_padding") = false,
            "Says where placed rows go; not needed to send.");
    py::class_<Channel>(module, "Channel", R"(Exchanges rows with the peers whose arenas are mapped here.

All calls enqueue work on a stream and wait for nothing, unless they say so. Arguments are device addresses.

Args:
    arenas: every rank's arena as mapped here, of arena_bytes(num_ranks, payload_bytes) each, zeroed once.
    rank: of this process.
    payload_bytes: ring of each source.
    device: the GPU.
    timeout_s: bound of every wait for a peer.)")
        .def(py::init(&make_channel), py::kw_only(), py::arg("arenas"), py::arg("rank"), py::arg("payload_bytes"),
             py::arg("device"), py::arg("timeout_s"))
        .def("open", &open_exchange, py::arg("header"), py::arg("stream"),
             "Compares a header with all peers; an exchange without counts follows.")
        .def("open_dispatch", &open_dispatch, py::kw_only(), py::arg("header"), py::arg("choices_per_expert"),
             py::arg("tokens_per_rank"), py::arg("num_tokens"), py::arg("max_tokens"), py::arg("num_experts"),
             py::arg("alignment"), py::arg("layout"), py::arg("capacity_rows"), py::arg("capacity_per_expert"),
             py::arg("drop"), py::arg("table"), py::arg("received_total") = 0, py::arg("tell_sizes"), py::arg("stream"),
             "As open, with counts; returns a ticket for wait_sizes, 0 unless tell_sizes.")
        .def("drop", &Channel::drop, py::kw_only(), py::arg("topk_idx"), py::arg("index_bytes"),
             py::arg("idx_in_expert"), py::arg("keep_choices"), py::arg("num_choices"), py::arg("num_experts"),
             py::arg("stream"), "Turns choices that their experts do not keep into -1, in place.")
        .def("host_counts", &Channel::host_counts, py::arg("ticket"), py::arg("count"),
             "Received choices of each of the first count local experts, once wait_sizes has returned; until later "
             "tickets take its place.")
        .def("wait_sizes", &Channel::wait_sizes, py::arg("ticket"), py::arg("seconds"),
             py::call_guard<py::gil_scoped_release>(),
             "Waits for (rows, received rows, largest T); None when they did not come in time or the exchange failed.")
        .def(
            "dispatch",
            [](Channel& channel, DispatchArguments& arguments, int num_senders, int num_placers, int laps, bool bulk,
               uintptr_t stream) {
                arguments.params.num_senders = num_senders;
                arguments.params.num_placers = num_placers;
                arguments.params.laps = static_cast<Laps>(laps);
                channel.dispatch(arguments.params, bulk, device_pointer<void>(stream));
            },
            py::arg("arguments"), py::kw_only(), py::arg("num_senders"), py::arg("num_placers"), py::arg("laps") = 0,
            py::arg("bulk"), py::arg("stream"), "Sends and places rows of an opened exchange.")
#ifdef MOE_EP_PLANTED_FAULTS
        .def("plant_fault", &Channel::plant_fault, py::arg("fault"), "Makes exchanges wrong on purpose, from now on.")
#endif
        .def(
            "combine",
            [](Channel& channel, int64_t row_bytes, int64_t meta_words, int top_k, int num_experts, int64_t max_chunks,
               uintptr_t table, uintptr_t groups, uintptr_t positions, uintptr_t token_ranks, int64_t num_tokens,
               int num_senders, int num_reducers, bool bulk, int layout, int element, bool wide_wire, int64_t hidden,
               uintptr_t y, uintptr_t row_weights, int weight_words, uintptr_t values, int value_words,
               bool only_own_values, uintptr_t out, uintptr_t bias_0, uintptr_t bias_1, uintptr_t out_values,
               uintptr_t stream) {
                CombineParams params{};
                params.rows = make_rows(row_bytes, meta_words, top_k, num_experts, max_chunks, table, groups, positions,
                                        token_ranks, 0, num_tokens);
                params.num_senders = num_senders;
                params.num_reducers = num_reducers;
                params.layout = static_cast<Layout>(layout);
                params.element = static_cast<Element>(element);
                params.wide_wire = wide_wire;
                params.hidden = hidden;
                params.y = device_pointer<std::byte>(y);
                params.row_weights = device_pointer<int32_t>(row_weights);
                params.weight_words = weight_words;
                params.values = device_pointer<int32_t>(values);
                params.value_words = value_words;
                params.only_own_values = only_own_values;
                params.out = device_pointer<std::byte>(out);
                params.bias[0] = device_pointer<std::byte>(bias_0);
                params.bias[1] = device_pointer<std::byte>(bias_1);
                params.out_values = device_pointer<int32_t>(out_values);
                channel.combine(params, bulk, device_pointer<void>(stream));
            },
            py::kw_only(), py::arg("row_bytes"), py::arg("meta_words"), py::arg("top_k"), py::arg("num_experts"),
            py::arg("max_chunks"), py::arg("table"), py::arg("groups"), py::arg("positions"), py::arg("token_ranks"),
            py::arg("num_tokens"), py::arg("num_senders"), py::arg("num_reducers"), py::arg("bulk"), py::arg("layout"),
            py::arg("element"), py::arg("wide_wire") = false, py::arg("hidden"), py::arg("y"),
            py::arg("row_weights") = 0, py::arg("weight_words") = 0, py::arg("values") = 0, py::arg("value_words") = 0,
            py::arg("only_own_values") = false, py::arg("out"), py::arg("bias_0") = 0, py::arg("bias_1") = 0,
            py::arg("out_values") = 0, py::arg("stream"), "Sums layout rows home along a plan, in an opened exchange.")
        .def("trouble", &trouble,
             "What went wrong first since the last reset, as a dict; None for nothing. Waits for nothing.")
        .def("overflow", &overflow,
             "(times, rank, needed, given): how often a capacity did not hold, and the last time's numbers.")
        .def("epoch", &Channel::epoch, py::call_guard<py::gil_scoped_release>(),
             "Exchanges opened so far; waits for the device.")
        .def("reset", &Channel::reset, py::arg("epoch"), py::call_guard<py::gil_scoped_release>(),
             "Goes on after a failure with an epoch that no rank has used; waits for the device. All ranks together.")
        .def_property("timeout_s", &Channel::timeout_s, &Channel::set_timeout_s, "Bound of every wait for a peer.");
#endif
}

}  // namespace moe_ep
