#pragma once

#include <pybind11/pybind11.h>

// One function per binding file; bindings.cpp calls them.
namespace moe_ep {

void register_arena(pybind11::module_& module);
void register_build_info(pybind11::module_& module);
void register_channel(pybind11::module_& module);
void register_exchange_calls(pybind11::module_& module);
void register_event(pybind11::module_& module);
void register_layouts(pybind11::module_& module);
void register_plan(pybind11::module_& module);
void register_runtime(pybind11::module_& module);
void register_push(pybind11::module_& module);
void register_weigh(pybind11::module_& module);

}  // namespace moe_ep
