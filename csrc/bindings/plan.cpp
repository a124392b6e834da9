#include "host/plan.h"

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

#include "bindings/register.h"
#include "host/checks.h"
#include "host/errors.h"
#if MOE_EP_WITH_CUDA
#include "kernels/plan.h"
#endif

namespace py = pybind11;

namespace moe_ep {
namespace {

PlanParams make_params(uintptr_t topk_idx, int index_bytes, int64_t num_tokens, int top_k, int num_experts,
                       int num_ranks, uintptr_t choices_per_expert, uintptr_t tokens_per_rank,
                       uintptr_t is_token_in_rank, uintptr_t idx_in_expert, uintptr_t idx_in_rank,
                       uintptr_t token_ranks) {
    PlanParams params{.index_bytes = index_bytes,
                      .num_tokens = num_tokens,
                      .top_k = top_k,
                      .num_experts = num_experts,
                      .num_ranks = num_ranks};
    check_plan_dims(params);
    dispatch_value<4, 8>("index_bytes", index_bytes, [](auto) {});
    const int64_t num_choices = num_tokens * top_k, num_pairs = num_tokens * num_ranks;
    params.topk_idx = checked_pointer<std::byte>("topk_idx", topk_idx, num_choices, index_bytes);
    params.choices_per_expert = checked_pointer<int32_t>("choices_per_expert", choices_per_expert, num_experts);
    params.tokens_per_rank = checked_pointer<int32_t>("tokens_per_rank", tokens_per_rank, num_ranks);
    params.is_token_in_rank = checked_pointer<uint8_t>("is_token_in_rank", is_token_in_rank, num_pairs);
    params.idx_in_expert = checked_pointer<int32_t>("idx_in_expert", idx_in_expert, num_choices);
    params.idx_in_rank = checked_pointer<int32_t>("idx_in_rank", idx_in_rank, num_pairs);
    check_argument(token_ranks == 0 || num_ranks <= 32, "num_ranks=", num_ranks,
                   ": must be at most 32 with token_ranks");
    if (token_ranks != 0) params.token_ranks = checked_pointer<uint32_t>("token_ranks", token_ranks, num_tokens);
    return params;
}

void plan_cuda(PlanParams params, uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
#if MOE_EP_WITH_CUDA
    const int64_t needed = PlanWorkspace(nullptr, params).num_bytes;
    check_argument(workspace_bytes >= needed, "workspace_bytes=", workspace_bytes, ": must be at least ", needed,
                   ", see workspace_bytes of the params");
    params.workspace = checked_pointer<std::byte>("workspace", workspace, needed, alignof(int32_t));
    // Once is enough for a process with one GPU, and costs little elsewhere.
    prepare_plan();
    launch_plan(params, reinterpret_cast<void*>(stream));
#else
    static_cast<void>(params), static_cast<void>(workspace), static_cast<void>(workspace_bytes),
        static_cast<void>(stream);
    throw NotBuiltError("plan_cuda: this moe_ep was built without CUDA; reinstall it where nvcc is found");
#endif
}

}  // namespace

void register_plan(py::module_& module) {
    py::class_<PlanParams>(module, "PlanParams", R"(Input and outputs of the routing plan of one rank, as addresses.

T tokens with K choices each among E experts on R ranks, E / R consecutive experts per rank. K <= 64, E <= 4096, R <= 64.

Args:
    topk_idx: [T, K] integers of index_bytes (4 or 8) bytes; -1, or anything outside 0 .. E - 1, is no choice.
    choices_per_expert: int32 [E].
    tokens_per_rank: int32 [R]; a token counts once per rank, however many of its experts live there.
    is_token_in_rank: bool [T, R].
    idx_in_expert: int32 [T, K], position among the choices of that expert in (token, k) order, -1 for no choice.
    idx_in_rank: int32 [T, R], position among the tokens of that rank in token order, -1 when the token does not go there.
    token_ranks: int32 [T], bit r says whether the token goes to rank r; 0 where not wanted.

Raises:
    ValueError: for a size outside the limits, or an address that is null or not aligned.)")
        .def(py::init(&make_params), py::kw_only(), py::arg("topk_idx"), py::arg("index_bytes"), py::arg("num_tokens"),
             py::arg("top_k"), py::arg("num_experts"), py::arg("num_ranks"), py::arg("choices_per_expert"),
             py::arg("tokens_per_rank"), py::arg("is_token_in_rank"), py::arg("idx_in_expert"), py::arg("idx_in_rank"),
             py::arg("token_ranks") = 0)
        .def_property_readonly(
            "workspace_bytes", [](const PlanParams& params) { return PlanWorkspace(nullptr, params).num_bytes; },
            "Bytes of device memory that plan_cuda needs beside the outputs.");
    module.def(
        "plan_workspace_bytes",
        [](int64_t num_tokens, int top_k, int num_experts, int num_ranks) {
            const PlanParams params{
                .num_tokens = num_tokens, .top_k = top_k, .num_experts = num_experts, .num_ranks = num_ranks};
            check_plan_dims(params);
            return PlanWorkspace(nullptr, params).num_bytes;
        },
        py::kw_only(), py::arg("num_tokens"), py::arg("top_k"), py::arg("num_experts"), py::arg("num_ranks"),
        "The same before there are outputs. Raises ValueError for a size outside the limits.");
    module.def("plan_host", &plan_on_host, py::arg("params"), py::call_guard<py::gil_scoped_release>(),
               "Computes the plan on the host; all addresses are host memory. The same values as plan_cuda, in every "
               "position.");
    module.def("plan_cuda", &plan_cuda, py::arg("params"), py::kw_only(), py::arg("workspace"),
               py::arg("workspace_bytes"), py::arg("stream"),
               R"(Enqueues the plan on a stream of the current device; all addresses are device memory.

Waits for nothing and may be captured in a graph. The workspace needs no initial content and is free when the stream is through.

Raises:
    ValueError: when the workspace is too small.
    NotBuiltError: without CUDA kernels in this build.
    MoeEpError: when CUDA refuses a launch.)");
}

}  // namespace moe_ep
