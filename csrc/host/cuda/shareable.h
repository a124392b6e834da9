#pragma once

#include <cuda.h>

#include <cstdint>

#include "host/cuda/undo.h"

// Memory of the driver's virtual memory management, which another process maps by a file descriptor. Every mapping
// keeps it alive, whoever made it.
namespace moe_ep {

// Returns the unit of sizes and mappings on this device.
int64_t shareable_granularity(int device);

// Returns a handle on new physical memory; num_bytes is a multiple of the granularity.
CUmemGenericAllocationHandle create_shareable(int64_t num_bytes, int device, Undo& undo);

// Returns a file descriptor that the caller closes.
int export_shareable(CUmemGenericAllocationHandle handle);

// Returns a handle on the memory behind a peer's file descriptor, which stays the caller's.
CUmemGenericAllocationHandle import_shareable(int fd, Undo& undo);

// Returns the address at which `device` reads and stores the memory.
uintptr_t map_shareable(CUmemGenericAllocationHandle handle, int64_t num_bytes, int device, Undo& undo);

}  // namespace moe_ep
