#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "host/cuda/undo.h"

namespace moe_ep {

// How other processes of this node come to the memory.
enum class Way {
    kFd,     // a POSIX file descriptor: mappings keep the memory alive when its owner closes it or dies
    kIpc,    // a CUDA IPC handle
    kLocal,  // not at all
};

// One rank's memory on one GPU, and the memories of its peers as they are mapped for that GPU. Member functions may be
// called from any thread. Every one that touches the device raises LibraryError when CUDA refuses.
class Arena {
public:
    // Allocates at least `num_bytes` zeroed bytes; zeros stand in memory when this returns.
    Arena(int64_t num_bytes, int device, const std::string& way);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Address of the memory, a multiple of kRegionAlignment; 0 once closed.
    uintptr_t base() const;
    // Size of the memory: what was asked for, rounded up to what the way needs.
    int64_t num_bytes() const { return num_bytes_; }
    int device() const { return device_; }
    const char* way() const;

    // Returns what a peer opens: a file descriptor that the caller closes, or the bytes of an IPC handle.
    int export_fd();
    std::string export_ipc();

    // Returns the address at which this device sees a peer's memory of num_bytes, until close(). owner_device is the
    // peer's GPU as this process counts them, -1 when it does not see that GPU. The descriptor stays the caller's.
    uintptr_t open_fd(int fd, int64_t num_bytes, int owner_device);
    uintptr_t open_ipc(const std::string& handle, int64_t num_bytes, int owner_device);

    // Returns the address of `num_bytes` at `offset` in the own memory, after checking that they lie there.
    uintptr_t locate(int64_t offset, int64_t num_bytes) const;
    // Returns `address`, after checking that so many bytes there lie in one peer's memory.
    uintptr_t locate_peer(uintptr_t address, int64_t num_bytes) const;

    // Gives up all mappings and the own memory. A second call does nothing. Waits for no peer, so no work that uses
    // them may be pending on this device.
    // NOTE: memory that was exported as an IPC handle stays allocated until the process ends: a peer may still store.
    void close();

private:
    struct Span {
        uintptr_t base;
        int64_t num_bytes;
    };

    void require(Way way, const char* call) const;
    void check_owner(int owner_device) const;
    uintptr_t keep(Undo&& undo, uintptr_t base, int64_t num_bytes);

    const Way way_;
    const int device_;
    int64_t num_bytes_ = 0;
    uintptr_t base_ = 0;
    uint64_t shareable_handle_ = 0;
    bool is_ipc_exported_ = false;
    std::vector<Span> peers_;
    mutable std::mutex mutex_;
    Undo undo_;
};

}  // namespace moe_ep
