#include <pybind11/pybind11.h>

#include "bindings/register.h"
#if MOE_EP_WITH_CUDA
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "bindings/dlpack.h"
#include "host/checks.h"
#include "host/cuda/arena.h"
#endif

namespace py = pybind11;

namespace moe_ep {
#if MOE_EP_WITH_CUDA
namespace {

// What a Buffer says of its place in the group and of its memory, to those who ask as they would ask the ecosystem's
// communication object.
class Runtime {
public:
    Runtime(int rank, int num_ranks, int ranks_per_node, int device, py::object stream, py::object memory)
        : rank_(rank),
          num_ranks_(num_ranks),
          ranks_per_node_(ranks_per_node),
          device_(device),
          stream_(std::move(stream)),
          memory_(std::move(memory)) {
        check_argument(num_ranks >= 1 && rank >= 0 && rank < num_ranks, "rank=", rank, ": must be 0 to ",
                       num_ranks - 1);
        check_argument(ranks_per_node >= 1 && num_ranks % ranks_per_node == 0, "ranks_per_node=", ranks_per_node,
                       ": must divide num_ranks=", num_ranks);
    }

    bool is_available() const { return !memory_().is_none(); }
    bool is_internode_available() const { return is_available() && num_ranks_ > ranks_per_node_; }
    int num_nodes() const { return num_ranks_ / ranks_per_node_; }
    int node() const { return rank_ / ranks_per_node_; }
    int root(bool global) const { return global ? 0 : node() * ranks_per_node_; }
    int device() const { return device_; }
    py::object stream() const { return stream_; }

    py::bytes ipc_handle() const {
        const Memory memory = find_memory();
        if (memory.arena == nullptr || std::string(memory.arena->way()) != "ipc") return {};
        return memory.arena->export_ipc();
    }

    py::object local_tensor(const py::object& dtype, const py::object& size, const py::object& offset,
                            bool use_rdma_buffer) const {
        const Memory memory = use_rdma_buffer ? Memory{} : find_memory();
        const auto [first, num_bytes] = py::module_::import("moe_ep.backends.runtime")
                                            .attr("view_bytes")(memory.num_bytes, dtype, size, offset)
                                            .cast<std::pair<int64_t, int64_t>>();
        const py::module_ torch = py::module_::import("torch");
        if (num_bytes == 0) {
            return torch.attr("empty")(0, py::arg("dtype") = dtype,
                                       py::arg("device") = "cuda:" + std::to_string(device_));
        }
        const uintptr_t address = memory.arena->locate(memory.offset + first, num_bytes);
        const py::capsule bytes = dlpack::make_capsule(address, num_bytes, memory.arena->device(), memory.arena);
        return torch.attr("from_dlpack")(bytes).attr("view")(dtype);
    }

private:
    // Where rows from all sources lie; nothing until it is reserved.
    struct Memory {
        std::shared_ptr<Arena> arena;
        int64_t offset = 0;
        int64_t num_bytes = 0;
    };

    Memory find_memory() const {
        const py::object told = memory_();
        if (told.is_none()) return {};
        const auto parts = told.cast<py::tuple>();
        return {parts[0].cast<std::shared_ptr<Arena>>(), parts[1].cast<int64_t>(), parts[2].cast<int64_t>()};
    }

    int rank_, num_ranks_, ranks_per_node_, device_;
    py::object stream_, memory_;
};

}  // namespace

void register_runtime(py::module_& module) {
    py::class_<Runtime>(module, "Buffer", R"(What ``moe_ep.Buffer.runtime`` is on the CUDA backend.

Args:
    rank: of this process.
    num_ranks: R.
    ranks_per_node: ranks that share a scale-up domain.
    device: index of the GPU.
    stream: the communication stream.
    memory: called for (Arena or None, offset, bytes) of the memory for rows on their way; None once it was released.)")
        .def(py::init<int, int, int, int, py::object, py::object>(), py::kw_only(), py::arg("rank"),
             py::arg("num_ranks"), py::arg("ranks_per_node"), py::arg("device"), py::arg("stream"), py::arg("memory"))
        .def("is_available", &Runtime::is_available, "Whether exchanges can run: until the Buffer is destroyed.")
        .def("is_internode_available", &Runtime::is_internode_available, "Whether ranks of several nodes can exchange.")
        .def("get_num_rdma_ranks", &Runtime::num_nodes, "Number of nodes.")
        .def("get_rdma_rank", &Runtime::node, "Index of this rank's node.")
        .def("get_root_rdma_rank", &Runtime::root, py::arg("global_"),
             "First rank of the job (global) or index of this node's first rank.")
        .def("get_local_device_id", &Runtime::device, "Index of the GPU.")
        .def("get_local_ipc_handle", &Runtime::ipc_handle,
             "Bytes by which a peer opens this rank's memory; empty where it is not shared in this way, or not yet.")
        .def(
            "get_local_nvshmem_unique_id", [](const Runtime&) { return py::bytes(); },
            "Empty: NVSHMEM is not used inside a node.")
        .def("get_local_buffer_tensor", &Runtime::local_tensor, py::arg("dtype"), py::arg("size") = py::none(),
             py::arg("offset") = 0, py::arg("use_rdma_buffer") = false,
             R"(A view of the memory for rows on their way, which exchanges overwrite.

Args:
    dtype: of the view.
    size: elements; None for all that follow ``offset``.
    offset: first byte.
    use_rdma_buffer: the buffer for scale-out instead, which is empty here.

Raises:
    ValueError: when the view does not lie in the buffer.)")
        .def("get_comm_stream", &Runtime::stream, "The communication stream.")
        .def(
            "sync", [](const Runtime&, const py::object&, const py::object&, const py::object&) {},
            py::arg("device_ids"), py::arg("all_gathered_handles"), py::arg("root_unique_id"),
            "Nothing: ranks map each other's memory when it is reserved.");
}

#else

void register_runtime(py::module_&) {}

#endif

}  // namespace moe_ep
