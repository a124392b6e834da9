#include <pybind11/pybind11.h>

#include "bindings/register.h"
#if MOE_EP_WITH_CUDA
#include "host/cuda/event.h"
#endif

namespace py = pybind11;

namespace moe_ep {
#if MOE_EP_WITH_CUDA

void register_event(py::module_& module) {
    py::class_<Event>(module, "Event",
                      R"(A place in a stream of the current device, without a time. Streams are addresses.

Raises:
    MoeEpError: when CUDA refuses a call.)")
        .def(py::init<>())
        .def("record", &Event::record, py::arg("stream"), "Marks the end of what the stream has been given so far.")
        .def("wait", &Event::wait, py::arg("stream"), "Makes a stream wait for the place marked last.")
        .def("query", &Event::query, "Whether the place marked last has been passed. Not for places in a capture.")
        .def("order", &Event::order, py::arg("first"), py::arg("then"),
             "Makes a stream wait for all that another one has been given so far.")
        .def("follow", &Event::follow, py::arg("first"), py::arg("then"),
             "The same, but for what was given to first before a capture on then began.");
}

#else

void register_event(py::module_&) {}

#endif
}  // namespace moe_ep
