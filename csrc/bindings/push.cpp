#include <pybind11/pybind11.h>

#include "bindings/register.h"
#if MOE_EP_WITH_CUDA
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "host/checks.h"
#include "kernels/push.h"
#endif

namespace py = pybind11;

namespace moe_ep {
#if MOE_EP_WITH_CUDA
namespace {

void push(const std::vector<uintptr_t>& sources, const std::vector<uintptr_t>& targets,
          const std::vector<int64_t>& num_bytes, int num_sms, uintptr_t stream) {
    check_argument(sources.size() == targets.size() && sources.size() == num_bytes.size(), "sources, targets and ",
                   "num_bytes have ", sources.size(), ", ", targets.size(), " and ", num_bytes.size(),
                   " entries: must be equally many");
    check_argument(targets.size() <= kMaxNodeRanks, "targets has ", targets.size(), " entries: must be at most ",
                   kMaxNodeRanks);
    check_argument(num_sms >= 1, "num_sms=", num_sms, ": must be positive");
    PushParams params{};
    params.num_targets = static_cast<int>(targets.size());
    for (size_t idx = 0; idx < targets.size(); ++idx) {
        const int64_t bytes = num_bytes[idx];
        check_argument(bytes >= 0 && bytes % kPushAlignment == 0, "num_bytes[", idx, "]=", bytes,
                       ": must be a multiple of ", kPushAlignment);
        params.targets[idx] = {
            .from = checked_pointer<const std::byte>("sources", sources[idx], bytes, kPushAlignment),
            .to = checked_pointer<std::byte>("targets", targets[idx], bytes, kPushAlignment),
            .num_bytes = bytes,
        };
    }
    launch_push(params, num_sms, reinterpret_cast<void*>(stream));
}

}  // namespace

void register_push(py::module_& module) {
    module.def(
        "push", &push, py::kw_only(), py::arg("sources"), py::arg("targets"), py::arg("num_bytes"), py::arg("num_sms"),
        py::arg("stream"),
        R"(Copies stretches of memory from num_sms SMs: what the links between GPUs can do at best, for benchmarks.

Waits for nothing and tells nobody. Addresses and sizes are multiples of 16; targets may be peers' memory that is mapped here.

Raises:
    ValueError: for lists that differ in length, more than 16 targets, or what is not a multiple of 16.
    NotBuiltError: on GPUs before Hopper.
    MoeEpError: when CUDA refuses the launch.)");
}

#else

void register_push(py::module_&) {}

#endif

}  // namespace moe_ep
