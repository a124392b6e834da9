#include <pybind11/pybind11.h>

#include "bindings/register.h"
#if MOE_EP_WITH_CUDA
#include <cstdint>

#include "host/checks.h"
#include "kernels/weigh.h"
#endif

namespace py = pybind11;

namespace moe_ep {
#if MOE_EP_WITH_CUDA
namespace {

void weigh(uintptr_t grads, uintptr_t rows, uintptr_t weights, uintptr_t out_rows, uintptr_t out_weights,
           int64_t num_rows, int64_t hidden, int element, uintptr_t stream) {
    const auto kind = static_cast<Element>(element);
    const int64_t element_bytes = kind == Element::kDouble ? 8 : kind == Element::kFloat ? 4 : 2;
    const int64_t sum_bytes = kind == Element::kDouble ? 8 : 4;
    check_argument(num_rows >= 0 && hidden >= 0 && hidden * element_bytes % kWeighAlignment == 0, "hidden=", hidden,
                   ": rows must have a multiple of ", kWeighAlignment, " bytes");
    const auto at = [&](const char* name, uintptr_t address) {
        return checked_pointer<std::byte>(name, address, num_rows * hidden, kWeighAlignment);
    };
    WeighParams params{};
    params.grads = at("grads", grads);
    params.rows = at("rows", rows);
    params.weights = checked_pointer<std::byte>("weights", weights, num_rows, sum_bytes);
    params.out_rows = at("out_rows", out_rows);
    params.out_weights = checked_pointer<std::byte>("out_weights", out_weights, num_rows, sum_bytes);
    params.num_rows = num_rows;
    params.hidden = hidden;
    params.element = kind;
    launch_weigh(params, reinterpret_cast<void*>(stream));
}

}  // namespace

void register_weigh(py::module_& module) {
    module.def("weigh", &weigh, py::arg("grads"), py::arg("rows"), py::arg("weights"), py::arg("out_rows"),
               py::arg("out_weights"), py::arg("num_rows"), py::arg("hidden"), py::arg("element"), py::arg("stream"),
               R"(Gradients of rows [N, H] and of their weights [N], from those of the weighted rows.

Addresses of device memory; rows are contiguous and begin at multiples of 16 bytes. element: 0 bf16, 1 fp16, 2 fp32, 3 fp64;
weights are fp32, fp64 for fp64 rows. Only enqueues.

Raises:
    ValueError: for rows whose size is not a multiple of 16 bytes.
    MoeEpError: when CUDA refuses the launch.)");
}

#else

void register_weigh(py::module_&) {}

#endif

}  // namespace moe_ep
