#pragma once

#include "layout/plan.h"

namespace moe_ep {

// Loads the kernels: see prepare_kernels.
void prepare_plan();

// Enqueues the plan kernel on `stream` (a cudaStream_t) of the current device. Waits for nothing, allocates nothing,
// and may be captured. Raises LibraryError when a launch fails.
void launch_plan(const PlanParams& params, void* stream);

}  // namespace moe_ep
