#include "host/cuda/arena.h"

#include <cuda_runtime_api.h>

#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "host/checks.h"
#include "host/cuda/device.h"
#include "host/cuda/device_scope.h"
#include "host/cuda/shareable.h"
#include "host/cuda_check.h"
#include "layout/cursor.h"

namespace moe_ep {
namespace {

// Smaller allocations share a block with others, and an IPC handle gives the whole block away.
constexpr int64_t kIpcGranularity = int64_t{2} << 20;

constexpr std::array<std::pair<Way, const char*>, 3> kWays{
    {{Way::kFd, "fd"}, {Way::kIpc, "ipc"}, {Way::kLocal, "local"}}};

Way parse_way(const std::string& name) {
    for (const auto& [way, its_name] : kWays) {
        if (name == its_name) return way;
    }
    throw ArgumentError("way=\"" + name + "\": must be one of fd, ipc, local");
}

int64_t granularity_of(Way way, int device) {
    if (way == Way::kFd) return shareable_granularity(device);
    return way == Way::kIpc ? kIpcGranularity : kRegionAlignment;
}

int64_t round_up(int64_t num_bytes, int64_t granularity) {
    check_argument(num_bytes >= 1 && num_bytes <= std::numeric_limits<int64_t>::max() - granularity,
                   "num_bytes=", num_bytes, ": must be positive, and fit a GPU");
    return (num_bytes + granularity - 1) / granularity * granularity;
}

// On a stream of its own: work that waits for peers may be pending on the others.
void fill_zeros(uintptr_t base, int64_t num_bytes) {
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    Undo undo;
    undo.add([stream] { check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy"); });
    check_cuda(cudaMemsetAsync(reinterpret_cast<void*>(base), 0, static_cast<size_t>(num_bytes), stream),
               "cudaMemsetAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

bool lies_in(uintptr_t address, int64_t num_bytes, uintptr_t base, int64_t size) {
    return num_bytes >= 0 && num_bytes <= size && address >= base &&
           address - base <= static_cast<uintptr_t>(size - num_bytes);
}

}  // namespace

Arena::Arena(int64_t num_bytes, int device, const std::string& way) : way_(parse_way(way)), device_(device) {
    check_device("device", device);
    const DeviceScope scope(device);
    Undo undo;
    num_bytes_ = round_up(num_bytes, granularity_of(way_, device));
    if (way_ == Way::kFd) {
        shareable_handle_ = create_shareable(num_bytes_, device, undo);
        base_ = map_shareable(shareable_handle_, num_bytes_, device, undo);
    } else {
        void* ptr = nullptr;
        check_cuda(cudaMalloc(&ptr, static_cast<size_t>(num_bytes_)), "cudaMalloc");
        undo.add([this, ptr] {
            if (!is_ipc_exported_) check_cuda(cudaFree(ptr), "cudaFree");
        });
        base_ = reinterpret_cast<uintptr_t>(ptr);
    }
    fill_zeros(base_, num_bytes_);
    undo_.append(std::move(undo));
}

Arena::~Arena() {
    try {
        close();
    } catch (const Error&) {
        // A destructor has nobody to tell; close() has.
    }
}

uintptr_t Arena::base() const {
    const std::lock_guard lock(mutex_);
    return base_;
}

const char* Arena::way() const {
    for (const auto& [way, name] : kWays) {
        if (way_ == way) return name;
    }
    return "";
}

int Arena::export_fd() {
    const std::lock_guard lock(mutex_);
    require(Way::kFd, "export_fd");
    const DeviceScope scope(device_);
    return export_shareable(shareable_handle_);
}

std::string Arena::export_ipc() {
    const std::lock_guard lock(mutex_);
    require(Way::kIpc, "export_ipc");
    const DeviceScope scope(device_);
    cudaIpcMemHandle_t handle{};
    check_cuda(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(base_)), "cudaIpcGetMemHandle");
    is_ipc_exported_ = true;
    return std::string(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

uintptr_t Arena::open_fd(int fd, int64_t num_bytes, int owner_device) {
    const std::lock_guard lock(mutex_);
    require(Way::kFd, "open_fd");
    check_argument(fd >= 0, "fd=", fd, ": must be an open file descriptor");
    check_owner(owner_device);
    const DeviceScope scope(device_);
    Undo undo;
    const int64_t granularity = shareable_granularity(device_);
    check_argument(num_bytes > 0 && num_bytes % granularity == 0, "num_bytes=", num_bytes,
                   ": must be the peer's num_bytes, a multiple of ", granularity);
    uintptr_t base = 0;
    {
        Undo handle_undo;
        base = map_shareable(import_shareable(fd, handle_undo), num_bytes, device_, undo);
    }
    return keep(std::move(undo), base, num_bytes);
}

uintptr_t Arena::open_ipc(const std::string& handle, int64_t num_bytes, int owner_device) {
    const std::lock_guard lock(mutex_);
    require(Way::kIpc, "open_ipc");
    cudaIpcMemHandle_t its{};
    check_argument(handle.size() == sizeof(its), "handle has ", handle.size(), " bytes: must be the ", sizeof(its),
                   " bytes of export_ipc");
    check_argument(num_bytes > 0, "num_bytes=", num_bytes, ": must be the peer's num_bytes");
    check_owner(owner_device);
    std::memcpy(&its, handle.data(), sizeof(its));
    const DeviceScope scope(device_);
    Undo undo;
    void* ptr = nullptr;
    check_cuda(cudaIpcOpenMemHandle(&ptr, its, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    undo.add([ptr] { check_cuda(cudaIpcCloseMemHandle(ptr), "cudaIpcCloseMemHandle"); });
    return keep(std::move(undo), reinterpret_cast<uintptr_t>(ptr), num_bytes);
}

uintptr_t Arena::locate(int64_t offset, int64_t num_bytes) const {
    const std::lock_guard lock(mutex_);
    check_argument(base_ != 0, "this arena is closed: it has no memory to view");
    check_argument(offset >= 0 && offset <= num_bytes_ && num_bytes >= 0 && num_bytes <= num_bytes_ - offset,
                   "offset=", offset, ", num_bytes=", num_bytes, ": must lie in the arena of ", num_bytes_, " bytes");
    return base_ + static_cast<uintptr_t>(offset);
}

uintptr_t Arena::locate_peer(uintptr_t address, int64_t num_bytes) const {
    const std::lock_guard lock(mutex_);
    for (const Span& peer : peers_) {
        if (lies_in(address, num_bytes, peer.base, peer.num_bytes)) return address;
    }
    throw ArgumentError("address=" + std::to_string(address) + ", num_bytes=" + std::to_string(num_bytes) +
                        ": must lie in a peer's memory that this arena has opened");
}

void Arena::close() {
    const std::lock_guard lock(mutex_);
    if (base_ == 0) return;
    Undo undo(std::move(undo_));
    base_ = 0;
    peers_.clear();
    const DeviceScope scope(device_);
    undo.run();
}

void Arena::require(Way way, const char* call) const {
    check_argument(base_ != 0, call, ": this arena is closed");
    check_argument(way_ == way, call, ": this arena's way is ", this->way(), ", which has no such call");
}

void Arena::check_owner(int owner_device) const {
    if (owner_device == -1) return;
    check_argument(peer_access(device_, owner_device), "owner_device=", owner_device, ": GPU ", device_,
                   " has no peer access to it");
}

uintptr_t Arena::keep(Undo&& undo, uintptr_t base, int64_t num_bytes) {
    undo_.append(std::move(undo));
    peers_.push_back({base, num_bytes});
    return base;
}

}  // namespace moe_ep
