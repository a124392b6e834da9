#pragma once

// Layouts are used by kernels and by host code that no CUDA compiler sees.
#ifdef __CUDACC__
#define MOE_EP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOE_EP_HOST_DEVICE inline
#endif
