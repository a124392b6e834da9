#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>

// The part of DLPack's C interface (version 0.8, an ABI that its later versions keep) that one row of bytes on a GPU
// needs.
namespace moe_ep::dlpack {

struct Device {
    int32_t type;
    int32_t index;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t num_dims;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

inline constexpr int32_t kCuda = 2;
inline constexpr uint8_t kUnsigned = 1;
inline constexpr const char* kCapsuleName = "dltensor";

// Owns what a consumer sees of one view, and what keeps its memory alive.
struct BytesOnCuda {
    ManagedTensor managed;
    int64_t num_bytes;
    int64_t stride = 1;
    std::shared_ptr<void> owner;
};

// Returns a capsule of uint8 [num_bytes] on a GPU; the memory's owner lives as long as any tensor made from it.
inline pybind11::capsule make_capsule(uintptr_t address, int64_t num_bytes, int device, std::shared_ptr<void> owner) {
    auto view = std::make_unique<BytesOnCuda>();
    view->num_bytes = num_bytes;
    view->owner = std::move(owner);
    view->managed = {.tensor = {.data = reinterpret_cast<void*>(address),
                                .device = {kCuda, device},
                                .num_dims = 1,
                                .dtype = {kUnsigned, 8, 1},
                                .shape = &view->num_bytes,
                                .strides = &view->stride,
                                .byte_offset = 0},
                     .context = view.get(),
                     .deleter = [](ManagedTensor* managed) { delete static_cast<BytesOnCuda*>(managed->context); }};
    pybind11::capsule capsule(&view->managed, kCapsuleName, [](PyObject* object) {
        // A consumer renames the capsule and takes the tensor over.
        if (!PyCapsule_IsValid(object, kCapsuleName)) return;
        auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(object, kCapsuleName));
        managed->deleter(managed);
    });
    view.release();
    return capsule;
}

}  // namespace moe_ep::dlpack
