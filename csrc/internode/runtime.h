#pragma once

#include <cstdint>
#include <string>

namespace moe_ep {

// NVSHMEM in this process, which knows one world only: initialised once over the ranks that ask for it, ended once.
// Every member function but my_pe and num_pes is collective over that world.
class NvshmemRuntime {
public:
    // The version compiled against, and that of the library found at run time, such as "3.4.5".
    static std::string version_built();
    static std::string version_found();

    // Returns the bytes that rank 0 makes and that every rank passes to the constructor.
    static std::string make_unique_id();

    // Joins a world of `num_ranks` on the current CUDA device. Raises LibraryError when NVSHMEM or CUDA refuses,
    // ArgumentError for a wrong id or rank, or when this process has joined before.
    NvshmemRuntime(const std::string& unique_id, int rank, int num_ranks);
    ~NvshmemRuntime();
    NvshmemRuntime(const NvshmemRuntime&) = delete;
    NvshmemRuntime& operator=(const NvshmemRuntime&) = delete;

    int my_pe() const;
    int num_pes() const;

    // Returns zeroed symmetric memory of this many bytes on every rank, at an address that is a multiple of 128.
    uintptr_t allocate(int64_t num_bytes);
    void free(uintptr_t address);
    void barrier();

    // Sends `num_words` words to the next rank and checks those of the one before, all from a kernel. Returns nothing
    // when they are right. Raises LibraryError when they are wrong or do not come within the timeout.
    void ring_exchange(int64_t num_words, double timeout_seconds);

    // Leaves the world; the destructor does it too, without waiting for anybody, when it was not done.
    void finalize();

private:
    void require_joined() const;

    bool joined_ = false;
};

}  // namespace moe_ep
