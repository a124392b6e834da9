#pragma once

#include "layout/plan.h"

namespace moe_ep {

// Raises ArgumentError unless sizes are within the limits of layout/plan.h.
void check_plan_dims(const PlanParams& params);

// Computes on the host, from host memory, what launch_plan computes on the GPU: the same values in every position.
void plan_on_host(const PlanParams& params);

}  // namespace moe_ep
