#include <pybind11/pybind11.h>

#include "bindings/errors.h"
#include "bindings/register.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Host code and CUDA kernels of moe_ep. Tensors come as addresses: nothing here knows torch.";
    moe_ep::register_errors();
    moe_ep::register_arena(module);
    moe_ep::register_build_info(module);
    moe_ep::register_channel(module);
    moe_ep::register_event(module);
    moe_ep::register_exchange_calls(module);
    moe_ep::register_layouts(module);
    moe_ep::register_plan(module);
    moe_ep::register_runtime(module);
    moe_ep::register_push(module);
    moe_ep::register_weigh(module);
}
