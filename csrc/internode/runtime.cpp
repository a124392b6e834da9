#include "internode/runtime.h"

#include <cuda_runtime_api.h>
#include <nvshmem_host.h>

#include <cmath>
#include <cstring>
#include <memory>

#include "host/checks.h"
#include "host/cuda_check.h"
#include "internode/ring_exchange.h"

namespace moe_ep {
namespace {

// NVSHMEM can be joined and left once in a process.
bool joined_before = false;

std::string dotted(int major, int minor, int patch) {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

void check_nvshmem(int status, const char* call) {
    if (status != 0) throw LibraryError(std::string(call) + ": NVSHMEM status " + std::to_string(status));
}

struct SymmetricFree {
    void operator()(void* ptr) const { nvshmem_free(ptr); }
};

void* allocate_symmetric(int64_t num_bytes) {
    void* ptr = nvshmem_align(kRegionAlignment, static_cast<size_t>(num_bytes));
    if (ptr == nullptr) {
        throw LibraryError("nvshmem_align: no " + std::to_string(num_bytes) +
                           " bytes of symmetric memory; NVSHMEM_SYMMETRIC_SIZE sets how much there is");
    }
    check_cuda(cudaMemset(ptr, 0, static_cast<size_t>(num_bytes)), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    // Zeros must stand everywhere before anybody's first put.
    nvshmem_barrier_all();
    return ptr;
}

}  // namespace

std::string NvshmemRuntime::version_built() {
    return dotted(NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION);
}

std::string NvshmemRuntime::version_found() {
    int major = 0, minor = 0, patch = 0;
    nvshmemx_vendor_get_version_info(&major, &minor, &patch);
    return dotted(major, minor, patch);
}

std::string NvshmemRuntime::make_unique_id() {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    check_nvshmem(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid");
    return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

NvshmemRuntime::NvshmemRuntime(const std::string& unique_id, int rank, int num_ranks) {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    check_argument(unique_id.size() == sizeof(id), "unique_id has ", unique_id.size(), " bytes: must be the ",
                   sizeof(id), " bytes that make_unique_id returned on rank 0");
    check_argument(num_ranks >= 1, "num_ranks=", num_ranks, ": must be at least 1");
    check_argument(rank >= 0 && rank < num_ranks, "rank=", rank, ": must be 0 to ", num_ranks - 1);
    check_argument(!joined_before,
                   "NVSHMEM was initialised in this process before: reuse that runtime, one process has one");
    std::memcpy(&id, unique_id.data(), sizeof(id));
    // Without this NVSHMEM itself would end the process where there is no GPU or no driver.
    check_cuda(cudaFree(nullptr), "cudaFree");
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    check_nvshmem(nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &id, &attributes),
                  "nvshmemx_set_attr_uniqueid_args");
    // NOTE: nvshmemx_init_attr is this same call, but ends the process when it fails.
    const nvshmemi_version_t version{NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                                     NVSHMEM_VENDOR_PATCH_VERSION};
    int provided = 0;
    check_nvshmem(
        nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID, &attributes, version),
        "nvshmemx_init_attr");
    joined_before = joined_ = true;
}

NvshmemRuntime::~NvshmemRuntime() = default;

int NvshmemRuntime::my_pe() const {
    require_joined();
    return nvshmem_my_pe();
}

int NvshmemRuntime::num_pes() const {
    require_joined();
    return nvshmem_n_pes();
}

uintptr_t NvshmemRuntime::allocate(int64_t num_bytes) {
    require_joined();
    check_argument(num_bytes > 0, "num_bytes=", num_bytes, ": must be positive");
    return reinterpret_cast<uintptr_t>(allocate_symmetric(num_bytes));
}

void NvshmemRuntime::free(uintptr_t address) {
    require_joined();
    check_argument(nvshmem_ptr(reinterpret_cast<void*>(address), nvshmem_my_pe()) != nullptr, "address=", address,
                   ": must be one that allocate returned");
    nvshmem_free(reinterpret_cast<void*>(address));
}

void NvshmemRuntime::barrier() {
    require_joined();
    nvshmem_barrier_all();
}

void NvshmemRuntime::ring_exchange(int64_t num_words, double timeout_seconds) {
    require_joined();
    check_argument(num_words > 0, "num_words=", num_words, ": must be positive");
    check_argument(timeout_seconds > 0 && std::isfinite(timeout_seconds), "timeout_seconds=", timeout_seconds,
                   ": must be a positive number of seconds");
    const std::unique_ptr<void, SymmetricFree> symmetric(allocate_symmetric(RingLayout(nullptr, num_words).num_bytes));
    const std::unique_ptr<void, SymmetricFree> result(allocate_symmetric(sizeof(int64_t)));
    launch_ring_exchange({.symmetric = symmetric.get(),
                          .num_words = num_words,
                          .my_pe = nvshmem_my_pe(),
                          .num_pes = nvshmem_n_pes(),
                          .timeout_nanoseconds = static_cast<uint64_t>(timeout_seconds * 1e9),
                          .result = static_cast<int64_t*>(result.get())},
                         nullptr);
    int64_t num_wrong = 0;
    check_cuda(cudaMemcpy(&num_wrong, result.get(), sizeof(num_wrong), cudaMemcpyDeviceToHost), "cudaMemcpy");
    if (num_wrong == kRingTimeout) {
        throw LibraryError("ring exchange: nothing came from the rank before within " +
                           std::to_string(timeout_seconds) + " s");
    }
    if (num_wrong != 0) throw LibraryError("ring exchange: " + std::to_string(num_wrong) + " wrong words");
}

void NvshmemRuntime::finalize() {
    if (!joined_) return;
    joined_ = false;
    nvshmem_finalize();
}

void NvshmemRuntime::require_joined() const {
    check_argument(joined_, "this NVSHMEM runtime has been finalized: nothing can be done with it any more");
}

}  // namespace moe_ep
