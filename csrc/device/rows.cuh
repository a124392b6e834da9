#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "device/link.cuh"

// Rows by vector loads and stores of a whole warp, and the arithmetic on them.
namespace moe_ep::device {

inline constexpr int kVectorBytes = 16;
inline constexpr int kFp8Group = 128;

template <class T>
struct ElementsOf {
    static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
};

__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(__half value) {
    return __half2float(value);
}
__device__ __forceinline__ float to_float(float value) {
    return value;
}
__device__ __forceinline__ double to_float(double value) {
    return value;
}

template <class T, class Sum>
__device__ __forceinline__ T from_float(Sum value) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(value);
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(value);
    } else {
        return static_cast<T>(value);
    }
}

// What a sum of T is kept in.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
union Vector {
    uint4 words;
    T elements[ElementsOf<T>::kCount];
};

// Adds a vector of row elements, times a factor that is 1 for rows as they are, to running sums.
template <class T>
__device__ __forceinline__ void accumulate(SumOf<T>* sums, uint4 words, SumOf<T> factor) {
    Vector<T> vector;
    vector.words = words;
#pragma unroll
    for (int idx = 0; idx < ElementsOf<T>::kCount; ++idx) sums[idx] += to_float(vector.elements[idx]) * factor;
}

template <class T>
__device__ __forceinline__ uint4 pack(const SumOf<T>* sums) {
    Vector<T> vector;
#pragma unroll
    for (int idx = 0; idx < ElementsOf<T>::kCount; ++idx) vector.elements[idx] = from_float<T>(sums[idx]);
    return vector.words;
}

// Copies one row to several places, named by `target(i)` for i in 0 .. num_targets - 1.
template <class Target>
__device__ __forceinline__ void copy_row(const std::byte* source, int64_t num_bytes, int num_targets, bool in_arena,
                                         Target&& target) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_vectors = num_bytes / kVectorBytes;
    const auto* from = reinterpret_cast<const uint4*>(source);
    constexpr int kUnroll = 4;
    for (int64_t first = lane; first < num_vectors; first += kUnroll * kWarpSize) {
        uint4 vectors[kUnroll];
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int64_t idx = first + step * kWarpSize;
            if (idx < num_vectors) vectors[step] = in_arena ? ptx::load_arena(from + idx) : ptx::load_once(from + idx);
        }
        for (int which = 0; which < num_targets; ++which) {
            auto* to = reinterpret_cast<uint4*>(target(which));
#pragma unroll
            for (int step = 0; step < kUnroll; ++step) {
                const int64_t idx = first + step * kWarpSize;
                if (idx < num_vectors) to[idx] = vectors[step];
            }
        }
    }
}

__device__ __forceinline__ void zero_row(std::byte* row, int64_t num_bytes) {
    const int lane = threadIdx.x % kWarpSize;
    for (int64_t idx = lane; idx < num_bytes / kVectorBytes; idx += kWarpSize) {
        reinterpret_cast<uint4*>(row)[idx] = uint4{};
    }
}

// Casts one row to e4m3 with a scale per 128 elements: scale = max(amax, 1e-4) / 448. A half-warp takes a group of
// 16-bit elements, a warp one of floats. `store(idx, bytes, scale)` takes eight (floats: four) bytes at that vector
// index and the scale of their group.
template <class T, class Store>
__device__ __forceinline__ void cast_row(const std::byte* source, int64_t hidden, Store&& store) {
    constexpr int kCount = ElementsOf<T>::kCount, kLanes = kFp8Group / kCount;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_vectors = hidden / kCount;
    for (int64_t first = 0; first < num_vectors; first += kWarpSize) {
        const int64_t idx = first + lane;
        const bool in_range = idx < num_vectors;
        Vector<T> vector;
        vector.words = in_range ? ptx::load_once(reinterpret_cast<const uint4*>(source) + idx) : uint4{};
        float most = 0.0f;
#pragma unroll
        for (int element = 0; element < kCount; ++element) {
            most = fmaxf(most, fabsf(to_float(vector.elements[element])));
        }
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
        const float scale = __fdiv_rn(fmaxf(most, 1e-4f), 448.0f);
        uint64_t bytes = 0;
#pragma unroll
        for (int element = 0; element < kCount; ++element) {
            const float value = __fdiv_rn(to_float(vector.elements[element]), scale);
            const uint64_t byte = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
            bytes |= byte << (8 * element);
        }
        if (in_range) store(idx, bytes, scale);
    }
}

// Turns as many e4m3 bytes as a vector of T has elements back, times their scale.
template <class T>
__device__ __forceinline__ uint4 uncast(uint64_t bytes, float scale) {
    Vector<T> vector;
#pragma unroll
    for (int element = 0; element < ElementsOf<T>::kCount; ++element) {
        const auto byte = static_cast<__nv_fp8_storage_t>(bytes >> (8 * element) & 0xff);
        const float value = __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
        vector.elements[element] = from_float<T>(value * scale);
    }
    return vector.words;
}

// Loads what cast_row stored at one vector index of an arena row.
template <class T>
__device__ __forceinline__ uint64_t load_cast(const std::byte* source, int64_t idx) {
    const auto* words = reinterpret_cast<const int32_t*>(source);
    if constexpr (ElementsOf<T>::kCount == 4) return static_cast<uint32_t>(ptx::load_arena(words + idx));
    const auto low = static_cast<uint32_t>(ptx::load_arena(words + 2 * idx));
    const auto high = static_cast<uint32_t>(ptx::load_arena(words + 2 * idx + 1));
    return static_cast<uint64_t>(high) << 32 | low;
}

}  // namespace moe_ep::device
