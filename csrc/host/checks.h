#pragma once

#include <cstdint>
#include <sstream>
#include <type_traits>
#include <utility>

#include "host/errors.h"

namespace moe_ep {

// Raises ArgumentError with the parts joined, unless the condition holds.
template <class... Parts>
void check_argument(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream text;
    (text << ... << parts);
    throw ArgumentError(text.str());
}

// Turns an address from Python into a pointer to `num_elements` values of T; null is allowed for none.
template <class T>
T* checked_pointer(const char* name, uintptr_t address, int64_t num_elements, int64_t alignment = alignof(T)) {
    check_argument(address != 0 || num_elements == 0, name, "=0: must be the address of ", num_elements, " elements");
    check_argument(address % alignment == 0, name, "=", address, ": must be a multiple of ", alignment);
    return reinterpret_cast<T*>(address);
}

// Calls body(std::integral_constant) with the one of kValues that equals `value`, so that code is compiled for each of
// them.
template <auto... kValues, class Value, class Body>
void dispatch_value(const char* name, Value value, Body&& body) {
    const bool found =
        ((value == kValues && (body(std::integral_constant<decltype(kValues), kValues>{}), true)) || ...);
    if (found) return;
    std::ostringstream text;
    text << name << "=" << value << ": compiled for";
    ((text << " " << kValues), ...);
    throw ArgumentError(text.str());
}

}  // namespace moe_ep
