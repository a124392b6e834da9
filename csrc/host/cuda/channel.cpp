#include "host/cuda/channel.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "host/checks.h"
#include "host/cuda_check.h"
#include "kernels/exchange.h"
#include "layout/plan.h"

namespace moe_ep {
namespace {

// Kernels write pinned memory at any time, so every read is from memory.
int64_t read_word(const int64_t& word) {
    return *const_cast<const volatile int64_t*>(&word);
}

}  // namespace

Channel::Channel(const std::vector<std::byte*>& arenas, int rank, int64_t payload_bytes, int device, double timeout_s)
    : device_(device) {
    const auto num_ranks = static_cast<int>(arenas.size());
    check_argument(num_ranks >= 1 && num_ranks <= kMaxNodeRanks, "arenas has ", num_ranks, " entries: must have 1 to ",
                   kMaxNodeRanks);
    check_argument(rank >= 0 && rank < num_ranks, "rank=", rank, ": must be 0 to ", num_ranks - 1);
    set_timeout_s(timeout_s);
    for (int peer = 0; peer < num_ranks; ++peer) link_.arenas[peer] = arenas[peer];
    link_.rank = rank;
    link_.num_ranks = num_ranks;
    link_.payload_bytes = payload_bytes;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&link_.state), sizeof(LinkState)), "cudaMalloc(LinkState)");
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&link_.status), sizeof(StatusWords), cudaHostAllocMapped),
               "cudaHostAlloc(StatusWords)");
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&sizes_), kNumSizeSlots * sizeof(SizeWords), cudaHostAllocMapped),
               "cudaHostAlloc(SizeWords)");
    std::memset(sizes_, 0, kNumSizeSlots * sizeof(SizeWords));
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&counts_), kNumSizeSlots * kMaxExperts * sizeof(int32_t),
                             cudaHostAllocMapped),
               "cudaHostAlloc(counts)");
    order_.emplace();
    prepare_kernels();
    reset(0);
}

Channel::~Channel() {
    // Kernels of a stream that is still busy would write to freed memory; the caller has waited, or the process ends.
    cudaFree(link_.state);
    cudaFreeHost(link_.status);
    cudaFreeHost(sizes_);
    cudaFreeHost(counts_);
}

void Channel::set_timeout_s(double seconds) {
    check_argument(seconds > 0 && seconds < 1e9, "timeout_s=", seconds, ": must be positive");
    link_.timeout_ns = static_cast<uint64_t>(seconds * 1e9);
}

void Channel::open(const Opening& opening, void* stream) {
    launch_open(link_, opening, stream);
}

int64_t Channel::count(const PlanParams& plan, OpenParams& params, bool tell_sizes, void* stream) {
    params.link = link_;
    if (tell_sizes) {
        params.ticket = next_ticket_++;
        params.sizes = sizes_ + params.ticket % kNumSizeSlots;
        params.host_counts = counts_ + params.ticket % kNumSizeSlots * kMaxExperts;
    }
    launch_count(plan, params, stream);
    return params.ticket;
}

void Channel::dispatch(DispatchParams& params, bool bulk, void* started, void* stream) {
    params.link = link_;
    launch_dispatch(params, bulk, started, stream);
}

void Channel::combine(CombineParams& params, bool bulk, void* started, void* stream) {
    params.link = link_;
    launch_combine(params, bulk, started, stream);
}

void Channel::order(uintptr_t first, uintptr_t then) {
    if (first != then) order_->order(first, then);
}

std::optional<Channel::Sizes> Channel::wait_sizes(int64_t ticket, double seconds) const {
    const SizeWords& words = sizes_[ticket % kNumSizeSlots];
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    for (int turn = 0; read_word(words.ticket) != ticket; ++turn) {
        if (read_word(link_.status->trouble) != 0) return std::nullopt;
        if (turn % 64 == 63 && std::chrono::steady_clock::now() > end) return std::nullopt;
        if (turn > 100000) std::this_thread::yield();
    }
    // The sizes were written before the ticket.
    std::atomic_thread_fence(std::memory_order_acquire);
    return Sizes{read_word(words.num_rows), read_word(words.num_received), read_word(words.max_tokens),
                 read_word(words.most_rows)};
}

std::vector<int32_t> Channel::host_counts(int64_t ticket, int count) const {
    const int32_t* counts = counts_ + ticket % kNumSizeSlots * kMaxExperts;
    return {counts, counts + count};
}

StatusWords Channel::status() const {
    StatusWords copy;
    // What is written last is read first.
    copy.trouble = read_word(link_.status->trouble);
    copy.overflowed = read_word(link_.status->overflowed);
    std::atomic_thread_fence(std::memory_order_acquire);
    const int64_t trouble = copy.trouble, overflowed = copy.overflowed;
    std::memcpy(&copy, link_.status, sizeof(copy));
    copy.trouble = trouble;
    copy.overflowed = overflowed;
    return copy;
}

bool Channel::is_quiet(int64_t overflows) const {
    return read_word(link_.status->trouble) == 0 && read_word(link_.status->overflowed) == overflows;
}

uint64_t Channel::epoch() const {
    LinkState state{};
    check_cuda(cudaSetDevice(device_), "cudaSetDevice");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check_cuda(cudaMemcpy(&state, link_.state, sizeof(state), cudaMemcpyDeviceToHost), "cudaMemcpy(LinkState)");
    return state.epoch;
}

void Channel::write(void* to, const void* from, size_t num_bytes) {
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    // NOTE: a plain cudaMemcpy of so few bytes may return before they have arrived, and streams that do not block are
    // not ordered behind it.
    const cudaError_t copied = cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyHostToDevice, stream);
    const cudaError_t arrived = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check_cuda(copied, "cudaMemcpyAsync");
    check_cuda(arrived, "cudaStreamSynchronize");
}

void Channel::abandon() {
    check_cuda(cudaSetDevice(device_), "cudaSetDevice");
    const uint32_t failed = 1;
    write(&link_.state->failed, &failed, sizeof(failed));
}

void Channel::reset(uint64_t epoch) {
    check_cuda(cudaSetDevice(device_), "cudaSetDevice");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    LinkState state{};
    state.epoch = epoch;
    write(link_.state, &state, sizeof(state));
    const int64_t overflowed = read_word(link_.status->overflowed);
    std::memset(link_.status, 0, sizeof(StatusWords));
    link_.status->overflowed = epoch == 0 ? 0 : overflowed;
}

}  // namespace moe_ep
