#pragma once

#include <pybind11/pybind11.h>

#include "host/errors.h"

namespace moe_ep {

// Raises each C++ error as its Python class. The classes are looked up when one is raised: loading a module imports
// nothing.
inline void register_errors() {
    pybind11::register_local_exception_translator([](std::exception_ptr pending) {
        const auto raise = [](const char* name, const char* text) {
            pybind11::set_error(pybind11::module_::import("moe_ep.errors").attr(name), text);
        };
        try {
            if (pending) std::rethrow_exception(pending);
        } catch (const ArgumentError& error) {
            pybind11::set_error(PyExc_ValueError, error.what());
        } catch (const NotBuiltError& error) {
            raise("NotBuiltError", error.what());
        } catch (const Error& error) {
            raise("MoeEpError", error.what());
        }
    });
}

}  // namespace moe_ep
