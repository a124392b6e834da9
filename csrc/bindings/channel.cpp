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
    told["most_tokens"] = word(table.most_tokens);
    told["most_rows"] = word(table.most_rows);
    told["direct_rows"] = word(table.direct_rows);
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

py::dict direct_layout(int num_ranks, int64_t num_groups, int64_t row_bytes, int64_t meta_words, int64_t num_rows) {
    check_argument(num_ranks >= 1 && num_ranks <= kMaxNodeRanks, "num_ranks=", num_ranks, ": must be 1 to ",
                   kMaxNodeRanks);
    const RecordDims dims{row_bytes, meta_words};
    const DirectLayout layout(nullptr, num_ranks, num_groups, dims, num_rows);
    py::list groups;
    for (int source = 0; source < num_ranks; ++source) {
        groups.append(reinterpret_cast<uintptr_t>(layout.groups.from(source).ptr));
    }
    py::dict told;
    told["groups"] = groups;
    told["rows"] = reinterpret_cast<uintptr_t>(layout.rows.ptr);
    told["num_bytes"] = layout.num_bytes;
    return told;
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
    Opening opening{};
    opening.opens = 1;
    fill_header(opening.header, header);
    channel.open(opening, device_pointer<void>(stream));
}

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
    module.def("direct_layout", &direct_layout, py::kw_only(), py::arg("num_ranks"), py::arg("num_groups"),
               py::arg("row_bytes"), py::arg("meta_words"), py::arg("num_rows"),
               "Offsets in the rings of all sources together, and size, of each source's groups and of the layout rows "
               "of an exchange that stores rows where they stay.");
    module.def(
        "fits_directly",
        [](int num_ranks, int64_t payload_bytes, int64_t num_groups, int64_t row_bytes, int64_t meta_words,
           int64_t num_rows) {
            return fits_directly(num_ranks, payload_bytes, num_groups, {row_bytes, meta_words}, num_rows);
        },
        py::kw_only(), py::arg("num_ranks"), py::arg("payload_bytes"), py::arg("num_groups"), py::arg("row_bytes"),
        py::arg("meta_words"), py::arg("num_rows"),
        "Whether rings of payload_bytes have room for such an exchange; num_rows of the rank with most.");
#if MOE_EP_WITH_CUDA
    module.def("kernel_problem", &find_kernel_problem, py::arg("device"),
               "Why the kernels of this build do not run on a device, as CUDA says it; empty where they do.");
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
#ifdef MOE_EP_PLANTED_FAULTS
        .def("plant_fault", &Channel::plant_fault, py::arg("fault"), "Makes exchanges wrong on purpose, from now on.")
#endif
        .def("trouble", &trouble,
             "What went wrong first since the last reset, as a dict; None for nothing. Waits for nothing.")
        .def("is_quiet", &Channel::is_quiet, py::arg("overflows"),
             "Whether nothing went wrong, and no capacity but the first so many times did not hold. Waits for nothing.")
        .def("overflow", &overflow,
             "(times, rank, needed, given): how often a capacity did not hold, and the last time's numbers.")
        .def("epoch", &Channel::epoch, py::call_guard<py::gil_scoped_release>(),
             "Exchanges opened so far; waits for the device.")
        .def("reset", &Channel::reset, py::arg("epoch"), py::call_guard<py::gil_scoped_release>(),
             "Goes on after a failure with an epoch that no rank has used; waits for the device. All ranks together.")
        .def("abandon", &Channel::abandon, py::call_guard<py::gil_scoped_release>(),
             "Ends all waits of kernels that run or will, as a failure does, until a reset.")
        .def_property("timeout_s", &Channel::timeout_s, &Channel::set_timeout_s, "Bound of every wait for a peer.");
#endif
}

}  // namespace moe_ep
