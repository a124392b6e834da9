#include <pybind11/pybind11.h>

#include "bindings/register.h"
#if MOE_EP_WITH_CUDA
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>

#include "bindings/dlpack.h"
#include "host/cuda/arena.h"
#include "host/cuda/capabilities.h"
#include "host/cuda/device.h"
#endif

namespace py = pybind11;

namespace moe_ep {
#if MOE_EP_WITH_CUDA
namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// Freeing memory may wait for the device. A view's last reference may end on a thread, or at a time, without Python.
void delete_arena(Arena* arena) {
    if (Py_IsInitialized() && PyGILState_Check()) {
        py::gil_scoped_release release;
        delete arena;
    } else {
        delete arena;
    }
}

std::shared_ptr<Arena> make_arena(int64_t num_bytes, int device, const std::string& way) {
    py::gil_scoped_release release;
    return {new Arena(num_bytes, device, way), delete_arena};
}

py::bytes export_ipc(Arena& arena) {
    std::string handle;
    {
        py::gil_scoped_release release;
        handle = arena.export_ipc();
    }
    return handle;
}

uintptr_t open_ipc(Arena& arena, const py::bytes& handle, int64_t num_bytes, int owner_device) {
    const std::string its = handle;
    py::gil_scoped_release release;
    return arena.open_ipc(its, num_bytes, owner_device);
}

py::capsule view(const std::shared_ptr<Arena>& arena, int64_t offset, int64_t num_bytes) {
    return dlpack::make_capsule(arena->locate(offset, num_bytes), num_bytes, arena->device(), arena);
}

py::capsule peer_view(const std::shared_ptr<Arena>& arena, uintptr_t address, int64_t num_bytes) {
    return dlpack::make_capsule(arena->locate_peer(address, num_bytes), num_bytes, arena->device(), arena);
}

py::dict capabilities(int device) {
    DeviceCapabilities found;
    {
        py::gil_scoped_release release;
        found = device_capabilities(device);
    }
    const DeviceProperties& device_is = found.properties;
    return py::dict(py::arg("fd") = found.fd, py::arg("ipc") = found.ipc, py::arg("uuid") = device_is.uuid,
                    py::arg("compute_capability") = py::make_tuple(device_is.major, device_is.minor),
                    py::arg("sms") = device_is.num_sms);
}

}  // namespace

void register_arena(py::module_& module) {
    py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena",
                                              R"(One rank's memory on a GPU that peers of this node map.

The memory is zeroed when the constructor returns, which waits for that, but not for other work on the device.

Args:
    num_bytes: at least so many bytes; the property of this name says how many.
    device: index of the GPU as this process counts them.
    way: "fd" (a POSIX file descriptor goes to the peers), "ipc" (a CUDA IPC handle), "local" (not shared).

Raises:
    ValueError: for a size, device or way that cannot be.
    MoeEpError: when CUDA refuses, naming the call.)")
        .def(py::init(&make_arena), py::kw_only(), py::arg("num_bytes"), py::arg("device"), py::arg("way"))
        .def_property_readonly("base", &Arena::base, "Address of the memory, a multiple of 128; 0 once closed.")
        .def_property_readonly("num_bytes", &Arena::num_bytes, "Bytes: what was asked for, rounded up.")
        .def_property_readonly("way", &Arena::way, "\"fd\", \"ipc\" or \"local\".")
        .def_property_readonly("device", &Arena::device, "Index of the GPU.")
        .def("export_fd", &Arena::export_fd, ReleaseGil(),
             "A new file descriptor for peers' open_fd; the caller closes it.")
        .def("export_ipc", &export_ipc,
             "The bytes for peers' open_ipc. From then on close() keeps the memory until the process ends, because a "
             "peer may still store there.")
        .def("open_fd", &Arena::open_fd, py::arg("fd"), py::arg("num_bytes"), py::arg("owner_device"), ReleaseGil(),
             R"(Maps a peer's memory for this device, until close().

Args:
    fd: what the peer's export_fd returned, passed between the processes; stays the caller's to close.
    num_bytes: of the peer's arena.
    owner_device: index of the peer's GPU as this process counts them, -1 when it does not see that GPU.

Returns:
    The address.)")
        .def("open_ipc", &open_ipc, py::arg("handle"), py::arg("num_bytes"), py::arg("owner_device"),
             "Maps a peer's memory for this device, until close(); as open_fd, with the bytes of export_ipc.")
        .def("view", &view, py::arg("offset"), py::arg("num_bytes"),
             "A DLPack capsule of uint8 [num_bytes] in the own memory. It, and tensors made from it, keep the arena "
             "alive; after close() they must not be used.")
        .def("peer_view", &peer_view, py::arg("address"), py::arg("num_bytes"),
             "A DLPack capsule of uint8 [num_bytes] in a peer's memory, at an address that open_fd or open_ipc "
             "returned or behind it; as view.")
        .def("close", &Arena::close, ReleaseGil(),
             R"(Unmaps the peers' memory and releases the own; a second call does nothing.

Waits for no peer. No work that uses the memory may be pending on this device. Peers that have mapped it may go on storing.

Raises:
    MoeEpError: when CUDA refuses a step; all others were taken.)")
        .def_static("capabilities", &capabilities, py::arg("device"),
                    R"(What a GPU offers: {"fd": bool, "ipc": bool, "uuid": "GPU-...", "compute_capability": (major,
minor), "sms": int}. Makes a context on it, because only trying tells about "fd".

Raises:
    MoeEpError: without a driver or a GPU.)")
        .def_static("peer_access", &peer_access, py::arg("device"), py::arg("peer"), ReleaseGil(),
                    "Whether kernels of one GPU reach the memory of another; true for itself.")
        .def_static("device_uuids", &device_uuids, ReleaseGil(),
                    "The uuid of every GPU that this process sees, by index.");
}

#else

void register_arena(py::module_&) {}

#endif

}  // namespace moe_ep
