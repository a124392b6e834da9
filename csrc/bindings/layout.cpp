#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "bindings/register.h"
#include "host/checks.h"
#include "layout/buffer.h"
#include "layout/low_latency.h"

namespace py = pybind11;

namespace moe_ep {
namespace {

// The layouts over an area that starts at `base`, told as addresses: what the tests of the memory maps look at.
template <class T>
uintptr_t address(const T* ptr) {
    return reinterpret_cast<uintptr_t>(ptr);
}

void* as_pointer(uintptr_t base) {
    check_argument(base % kRegionAlignment == 0, "base=", base, ": must be a multiple of ", kRegionAlignment);
    return reinterpret_cast<void*>(base);
}

template <class T>
py::dict describe(const Buffer<T>& buffer) {
    py::dict told;
    told["address"] = address(buffer.ptr);
    told["num_bytes"] = buffer.num_rows * buffer.row_elements * static_cast<int64_t>(sizeof(T));
    told["row_bytes"] = buffer.row_elements * static_cast<int64_t>(sizeof(T));
    return told;
}

template <class T>
py::list describe(const AsymBuffer<T>& buffer, int64_t num_peers) {
    py::list regions;
    for (int64_t peer = 0; peer < num_peers; ++peer) regions.append(describe(buffer.from(peer)));
    return regions;
}

void check_dims(int64_t num_peers, int64_t rows_per_peer, int64_t row_elements) {
    check_argument(num_peers >= 1, "num_peers=", num_peers, ": must be at least 1");
    check_argument(rows_per_peer >= 0, "rows_per_peer=", rows_per_peer, ": must not be negative");
    check_argument(row_elements >= 1, "row_elements=", row_elements, ": must be at least 1");
}

py::dict asym_layout(uintptr_t base, int64_t num_peers, int64_t rows_per_peer, int64_t row_elements) {
    check_dims(num_peers, rows_per_peer, row_elements);
    Cursor cursor(as_pointer(base));
    const AsymBuffer<float> buffer(cursor, num_peers, rows_per_peer, row_elements);
    py::dict told;
    told["regions"] = describe(buffer, num_peers);
    told["num_bytes"] = cursor.num_bytes();
    return told;
}

template <bool kDecoupled>
py::dict sym_layout(uintptr_t base, int64_t num_peers, int64_t rows_per_peer, int64_t row_elements) {
    Cursor cursor(as_pointer(base));
    const SymBuffer<float, kDecoupled> buffer(cursor, num_peers, rows_per_peer, row_elements);
    py::dict told;
    told["send"] = describe(buffer.send, num_peers);
    told["receive"] = describe(buffer.receive, num_peers);
    told["num_bytes"] = cursor.num_bytes();
    return told;
}

py::dict describe(const LowLatencyBuffer& set, int64_t num_ranks) {
    py::dict told;
    told["rows"] = describe(set.rows, num_ranks);
    told["num_rows"] = describe(set.num_rows, num_ranks);
    told["arrived"] = describe(set.arrived, num_ranks);
    told["consumed"] = describe(set.consumed, num_ranks);
    told["num_bytes"] = set.num_bytes;
    return told;
}

py::dict low_latency_layout(uintptr_t base, int64_t max_tokens, int64_t dispatch_bytes, int64_t combine_bytes,
                            int64_t top_k, int64_t num_ranks) {
    const LowLatencyDims dims{max_tokens, dispatch_bytes, combine_bytes, top_k, num_ranks};
    check_dims(num_ranks, max_tokens, dispatch_bytes);
    check_argument(combine_bytes >= 1 && top_k >= 1, "combine_bytes=", combine_bytes, ", top_k=", top_k,
                   ": must be positive");
    const LowLatencyLayout layout(as_pointer(base), dims);
    const LowLatencyRecord record(nullptr, dims);
    py::dict told;
    py::list dispatch_sets, combine_sets;
    for (int set = 0; set < kNumLowLatencySets; ++set) {
        dispatch_sets.append(describe(layout.dispatch_set(set), num_ranks));
        combine_sets.append(describe(layout.combine_set(set), num_ranks));
    }
    told["dispatch_sets"] = dispatch_sets;
    told["combine_sets"] = combine_sets;
    told["record"] =
        py::dict(py::arg("source_token") = address(record.source_token), py::arg("topk_idx") = address(record.topk_idx),
                 py::arg("topk_weights") = address(record.topk_weights), py::arg("payload") = address(record.payload),
                 py::arg("num_bytes") = record.num_bytes);
    told["num_bytes"] = layout.num_bytes;
    return told;
}

}  // namespace

void register_layouts(py::module_& module) {
    module.attr("REGION_ALIGNMENT") = kRegionAlignment;
    module.def("asym_layout", &asym_layout, py::kw_only(), py::arg("base"), py::arg("num_peers"),
               py::arg("rows_per_peer"), py::arg("row_elements"),
               "Addresses of an AsymBuffer of float32 rows: one one-way region per peer.");
    module.def(
        "sym_layout",
        [](uintptr_t base, int64_t num_peers, int64_t rows_per_peer, int64_t row_elements, bool decoupled) {
            check_dims(num_peers, rows_per_peer, row_elements);
            return decoupled ? sym_layout<true>(base, num_peers, rows_per_peer, row_elements)
                             : sym_layout<false>(base, num_peers, rows_per_peer, row_elements);
        },
        py::kw_only(), py::arg("base"), py::arg("num_peers"), py::arg("rows_per_peer"), py::arg("row_elements"),
        py::arg("decoupled"), "Addresses of a SymBuffer of float32 rows: a send and a receive region per peer.");
    module.def("low_latency_layout", &low_latency_layout, py::kw_only(), py::arg("base"), py::arg("max_tokens"),
               py::arg("dispatch_bytes"), py::arg("combine_bytes"), py::arg("top_k"), py::arg("num_ranks"),
               "Addresses of the alternating sets for decoding, and the offsets inside one dispatched record.");
}

}  // namespace moe_ep
