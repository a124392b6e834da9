#pragma once

#include <stdexcept>
#include <string>

namespace moe_ep {

// Classes of their own on this side of the border; bindings/errors.h names the Python class of each.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A wrong argument: the text holds the argument, its value and the rule.
struct ArgumentError : Error {
    using Error::Error;
};

// What was called is not part of this build; the text says how to get it.
struct NotBuiltError : Error {
    using Error::Error;
};

// A call to CUDA or NVSHMEM failed; the text holds the call and the library's own word.
struct LibraryError : Error {
    using Error::Error;
};

}  // namespace moe_ep
