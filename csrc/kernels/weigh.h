#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/exchange.h"

namespace moe_ep {

// The gradients of a weighted sum of expert rows, from the gradient of each weighted row.
struct WeighParams {
    const std::byte* grads;    // [N, H] gradients of weighted rows
    const std::byte* rows;     // [N, H] the rows that were weighted
    const std::byte* weights;  // [N] fp32, fp64 for fp64 rows
    std::byte* out_rows;       // [N, H] grads times weight
    std::byte* out_weights;    // [N] grads times rows, summed over H
    int64_t num_rows;
    int64_t hidden;  // a multiple of 16 bytes
    Element element;
};

inline constexpr int64_t kWeighAlignment = 16;

// Enqueues it on `stream` (a cudaStream_t) of the current device. Sums are taken in fp32 (fp64 for fp64 rows), in an
// order that depends on H alone. Raises LibraryError when the launch fails.
void launch_weigh(const WeighParams& params, void* stream);

}  // namespace moe_ep
