#pragma once

#include "layout/plan.h"

namespace moe_ep {

// Enqueues the plan kernels on `stream` (a cudaStream_t) of the current device. Waits for nothing, allocates nothing,
// and may be captured. Raises LibraryError when a launch fails.
void launch_plan(const PlanParams& params, void* stream);

}  // namespace moe_ep
