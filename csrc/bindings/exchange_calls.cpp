#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "bindings/register.h"
#include "host/checks.h"
#include "layout/exchange.h"
#if MOE_EP_WITH_CUDA
#include "host/cuda/exchange_calls.h"
#endif

namespace py = pybind11;

namespace moe_ep {
namespace {

// Sizes as the plan kernel counts them.
PlanParams plan_dims(int64_t num_tokens, int top_k, int num_experts, int num_ranks, bool by_mask) {
    return {.num_tokens = num_tokens,
            .top_k = by_mask ? num_ranks : top_k,
            .num_experts = by_mask ? num_ranks : num_experts,
            .num_ranks = num_ranks};
}

py::tuple source_plan_room(int top_k, int num_experts, int num_ranks, bool by_mask) {
    const SourcePlanRoom room(plan_dims(0, top_k, num_experts, num_ranks, by_mask), num_experts);
    return py::make_tuple(room.fixed_words, room.token_bytes, room.block_words, room.block_tokens, room.max_blocks);
}

py::dict source_plan_layout(int64_t num_tokens, int top_k, int num_experts, int num_ranks, bool by_mask) {
    const PlanParams dims = plan_dims(num_tokens, top_k, num_experts, num_ranks, by_mask);
    const SourcePlan plan(nullptr, dims, num_experts);
    const auto at = [](const void* ptr) { return reinterpret_cast<uintptr_t>(ptr); };
    py::dict told;
    told["table"] = at(plan.table);
    told["token_ranks"] = at(plan.token_ranks);
    told["idx_in_rank"] = at(plan.idx_in_rank);
    told["idx_in_expert"] = at(plan.idx_in_expert);
    told["choices_per_expert"] = at(plan.choices_per_expert);
    told["tokens_per_rank"] = at(plan.tokens_per_rank);
    told["is_token_in_rank"] = at(plan.is_token_in_rank);
    told["workspace"] = at(plan.workspace);
    told["num_bytes"] = plan.num_bytes;
    return told;
}

int64_t received_plan_words(int num_ranks, int64_t max_chunks, int64_t num_received, int top_k) {
    return ReceivedPlan(nullptr, num_ranks, max_chunks, num_received, top_k).num_bytes /
           static_cast<int64_t>(sizeof(int32_t));
}

#if MOE_EP_WITH_CUDA

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void register_settings(py::module_& module) {
    py::class_<CountSettings>(module, "CountSettings", "What dispatches with equal settings have in common.")
        .def(py::init([](int num_ranks, int top_k, int num_experts, int index_bytes, int alignment, int layout,
                         bool drop, bool by_mask) {
                 check_argument(index_bytes == 4 || index_bytes == 8, "index_bytes=", index_bytes, ": must be 4 or 8");
                 return CountSettings{
                     num_ranks, top_k, num_experts, index_bytes, alignment, static_cast<Layout>(layout), drop, by_mask};
             }),
             py::kw_only(), py::arg("num_ranks"), py::arg("top_k"), py::arg("num_experts"), py::arg("index_bytes"),
             py::arg("alignment"), py::arg("layout"), py::arg("drop"), py::arg("by_mask"));
    py::class_<RowSettings>(module, "RowSettings", "How rows of a dispatch travel, and on how many SMs.")
        .def(py::init([](int64_t row_bytes, int weight_words, int scale_words, int cast, int num_senders,
                         int num_placers, bool bulk) {
                 return RowSettings{row_bytes,   weight_words, scale_words, static_cast<Cast>(cast),
                                    num_senders, num_placers,  bulk};
             }),
             py::kw_only(), py::arg("row_bytes"), py::arg("weight_words"), py::arg("scale_words"), py::arg("cast"),
             py::arg("num_senders"), py::arg("num_placers"), py::arg("bulk"));
    py::class_<CombineSettings>(module, "CombineSettings", "What combines with equal settings have in common.")
        .def(py::init([](int element, int64_t hidden, bool wide_wire, int weight_words, int value_words,
                         bool only_own_values, int num_senders, int num_reducers, bool bulk) {
                 return CombineSettings{static_cast<Element>(element),
                                        hidden,
                                        wide_wire,
                                        weight_words,
                                        value_words,
                                        only_own_values,
                                        num_senders,
                                        num_reducers,
                                        bulk};
             }),
             py::kw_only(), py::arg("element"), py::arg("hidden"), py::arg("wide_wire"), py::arg("weight_words"),
             py::arg("value_words"), py::arg("only_own_values"), py::arg("num_senders"), py::arg("num_reducers"),
             py::arg("bulk"));
    py::class_<KeptPlan>(module, "KeptPlan", "A plan that is replayed, as sizes and addresses of its two blocks.")
        .def(py::init([](int64_t num_tokens, int top_k, int num_experts, int layout, bool zero_padding,
                         int64_t num_rows, int64_t max_chunks, uintptr_t source, uintptr_t received) {
            return KeptPlan{num_tokens,
                            top_k,
                            num_experts,
                            static_cast<Layout>(layout),
                            zero_padding,
                            num_rows,
                            max_chunks,
                            pointer<std::byte>(source),
                            pointer<std::byte>(received)};
        }));
}

// Arguments stand in the order of the class's own; addresses come as integers, streams too.
void register_dispatch(py::module_& module) {
    py::class_<DispatchCall>(module, "DispatchCall",
                             R"(One dispatch that makes a plan. Constructing it launches nothing.

Calls that launch take the channel, a header, and streams. All but wait_sizes only enqueue work, behind what the stream
current has been given so far; place behind send. With beside, what current is given next waits until the exchange has its
SMs, and runs beside it. Without told, their end is not told by an event: they return None. Memory is the caller's and
outlives the launches: topk_idx [T, K]; source, a block as source_plan_room says; told_choices int32 [E] or 0 for those
of topk_idx; told_tokens and told_ends int32 [e]; told_overflow one byte.)")
        .def(py::init([](const CountSettings& settings, int64_t num_tokens, uintptr_t topk_idx, uintptr_t source,
                         uintptr_t told_choices, uintptr_t told_tokens, uintptr_t told_ends, uintptr_t told_overflow) {
            return std::make_unique<DispatchCall>(settings, num_tokens, pointer<std::byte>(topk_idx),
                                                  pointer<std::byte>(source), pointer<int32_t>(told_choices),
                                                  pointer<int32_t>(told_tokens), pointer<int32_t>(told_ends),
                                                  pointer<uint8_t>(told_overflow));
        }))
        .def("set_capacity", &DispatchCall::set_capacity, py::arg("max_tokens"), py::arg("rows"), py::arg("per_expert"),
             "Largest T of any rank, and rows of this rank's output or of every group; 0 where not limited or fixed.")
        .def(
            "set_total",
            [](DispatchCall& call, uintptr_t received_total) { call.set_total(pointer<int64_t>(received_total)); },
            py::arg("received_total"), "Where a running count of received choices is kept: int64 [e].")
        .def("count_direct", &DispatchCall::count_direct,
             "Also count what rows need that are stored where they stay, by this call or by one with its counts.")
        .def("lend", &DispatchCall::lend, py::arg("num_groups"),
             "Rows may stay in the arena; num_groups of each source where that is known to fit, 0 where sizes decide.")
        .def("is_direct", &DispatchCall::is_direct, py::arg("channel"), py::arg("max_tokens"), py::arg("most_rows"),
             "Whether rows that may stay in the arena do, by the sizes that were told.")
        .def(
            "set_rows",
            [](DispatchCall& call, const RowSettings& settings, uintptr_t x, uintptr_t topk_weights, uintptr_t scales,
               int64_t scale_stride, int64_t scale_word_stride) {
                call.set_rows(settings, pointer<std::byte>(x), pointer<int32_t>(topk_weights), pointer<int32_t>(scales),
                              scale_stride, scale_word_stride);
            },
            "What travels.")
        .def(
            "set_output",
            [](DispatchCall& call, uintptr_t received, int64_t max_chunks, int64_t num_received, uintptr_t out,
               int64_t num_rows, uintptr_t out_weights, uintptr_t out_scales, uintptr_t out_topk_idx,
               uintptr_t out_source) {
                call.set_output(pointer<std::byte>(received), max_chunks, num_received, pointer<std::byte>(out),
                                num_rows, pointer<int32_t>(out_weights), pointer<int32_t>(out_scales),
                                pointer<int64_t>(out_topk_idx), pointer<int32_t>(out_source));
            },
            "Where it goes.")
        .def(
            "count",
            [](DispatchCall& call, Channel& channel, const Header& header, uintptr_t current, uintptr_t queue) {
                call.count(channel, header, {current, queue, false, true});
            },
            "Plans, and opens an exchange with the counts.")
        .def(
            "send",
            [](DispatchCall& call, Channel& channel, const Header& header, uintptr_t current, uintptr_t queue,
               bool beside) { call.send(channel, header, {current, queue, beside, false}); },
            "As count, and sends what fits the rings.")
        .def(
            "place",
            [](DispatchCall& call, Channel& channel, uintptr_t current, uintptr_t queue, uintptr_t place_queue,
               int64_t num_laps, bool beside,
               bool told) { return call.place(channel, {current, queue, beside, told}, place_queue, num_laps); },
            "Sends what is left, and places all; returns its end. The output was set after the sizes had come, in "
            "memory that is free for what comes behind the opening.")
        .def(
            "run",
            [](DispatchCall& call, Channel& channel, const Header& header, uintptr_t current, uintptr_t queue,
               bool counted, bool beside,
               bool told) { return call.run(channel, header, {current, queue, beside, told}, counted); },
            "A whole dispatch whose output was set before; returns its end.")
        .def("wait_sizes", &DispatchCall::wait_sizes, py::arg("channel"), py::arg("seconds"),
             py::call_guard<py::gil_scoped_release>(),
             "Waits for (rows, received rows, largest T, most rows of any rank where that is counted); None when they "
             "did not come in time or the exchange failed.")
        .def("host_counts", &DispatchCall::host_counts, py::arg("channel"),
             "Received choices of each local expert, once wait_sizes has returned; until later dispatches take its "
             "place.")
        .def_property_readonly("tells_sizes", &DispatchCall::tells_sizes, "Whether the host is told sizes.");
}

void register_replays(py::module_& module) {
    module.def(
        "replay",
        [](Channel& channel, const RowSettings& settings, const KeptPlan& plan, const Header& header, uintptr_t x,
           uintptr_t scales, int64_t scale_stride, int64_t scale_word_stride, uintptr_t out, uintptr_t out_scales,
           uintptr_t current, uintptr_t queue, bool beside, bool told) {
            return replay(channel, settings, plan, header, pointer<std::byte>(x), pointer<int32_t>(scales),
                          scale_stride, scale_word_stride, pointer<std::byte>(out), pointer<int32_t>(out_scales),
                          {current, queue, beside, told});
        },
        "Sends other rows along a plan, behind what the stream current has been given; returns its end.");
    module.def(
        "combine",
        [](Channel& channel, const CombineSettings& settings, const KeptPlan& plan, const Header& header, int top_k,
           uintptr_t y, uintptr_t row_weights, uintptr_t values, uintptr_t out, uintptr_t bias_0, uintptr_t bias_1,
           uintptr_t out_values, uintptr_t current, uintptr_t queue, bool beside, bool told) {
            return combine(channel, settings, plan, header, top_k, pointer<std::byte>(y), pointer<int32_t>(row_weights),
                           pointer<int32_t>(values), pointer<std::byte>(out), pointer<std::byte>(bias_0),
                           pointer<std::byte>(bias_1), pointer<int32_t>(out_values), {current, queue, beside, told});
        },
        "Sums layout rows home along a plan, behind what the stream current has been given; returns its end.");
}

#endif

}  // namespace

void register_exchange_calls(py::module_& module) {
    module.def("source_plan_room", &source_plan_room, py::arg("top_k"), py::arg("num_experts"), py::arg("num_ranks"),
               py::arg("by_mask"), "Int32 words of the source's half of a plan, as the terms of SourcePlanRoom.");
    module.def("source_plan_layout", &source_plan_layout, py::arg("num_tokens"), py::arg("top_k"),
               py::arg("num_experts"), py::arg("num_ranks"), py::arg("by_mask"), "Offsets of its parts, in bytes.");
    module.def("received_plan_words", &received_plan_words, py::arg("num_ranks"), py::arg("max_chunks"),
               py::arg("num_received"), py::arg("top_k"), "Int32 words of the destination's half of a plan.");
#if MOE_EP_WITH_CUDA
    register_settings(module);
    register_dispatch(module);
    register_replays(module);
#endif
}

}  // namespace moe_ep
