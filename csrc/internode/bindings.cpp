#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "bindings/errors.h"
#include "internode/runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_internode, module) {
    using moe_ep::NvshmemRuntime;
    using ReleaseGil = py::call_guard<py::gil_scoped_release>;
    module.doc() = "What moe_ep needs of NVSHMEM. Loading it touches no GPU.";
    moe_ep::register_errors();
    module.def(
        "build_info",
        [] {
            return py::dict(py::arg("nvshmem_built") = NvshmemRuntime::version_built(),
                            py::arg("nvshmem_found") = NvshmemRuntime::version_found());
        },
        "Versions of the NVSHMEM that this module was compiled against, and of the library found at run time.");
    module.def(
        "make_unique_id", [] { return py::bytes(NvshmemRuntime::make_unique_id()); },
        "Bytes that rank 0 makes and every rank passes to NvshmemRuntime.");
    py::class_<NvshmemRuntime>(module, "NvshmemRuntime", R"(NVSHMEM in this process: joined once, left once.

Args:
    unique_id: what make_unique_id returned on rank 0.
    rank: of this process among num_ranks, which all join together.

Raises:
    ValueError: for a wrong id or rank, or when this process joined before.
    MoeEpError: when CUDA or NVSHMEM refuses.)")
        .def(py::init([](const py::bytes& unique_id, int rank, int num_ranks) {
                 const std::string id = unique_id;
                 py::gil_scoped_release release;
                 return std::make_unique<NvshmemRuntime>(id, rank, num_ranks);
             }),
             py::arg("unique_id"), py::kw_only(), py::arg("rank"), py::arg("num_ranks"))
        .def_property_readonly("my_pe", &NvshmemRuntime::my_pe, "This process among num_pes.")
        .def_property_readonly("num_pes", &NvshmemRuntime::num_pes, "Processes in the world.")
        .def("allocate", &NvshmemRuntime::allocate, py::arg("num_bytes"), ReleaseGil(),
             "Collective: the address of zeroed symmetric memory, a multiple of 128.")
        .def("free", &NvshmemRuntime::free, py::arg("address"), ReleaseGil(),
             "Collective: gives memory of allocate back.")
        .def("barrier", &NvshmemRuntime::barrier, ReleaseGil(),
             "Collective: waits for every process and its transfers.")
        .def("ring_exchange", &NvshmemRuntime::ring_exchange, py::kw_only(), py::arg("num_words") = 4096,
             py::arg("timeout_s") = 30.0, ReleaseGil(),
             "Collective self-test: every process puts words with a signal to the next and checks those it gets.")
        .def("finalize", &NvshmemRuntime::finalize, ReleaseGil(),
             "Collective: leaves the world; a second call does nothing.");
}
