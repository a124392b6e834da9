#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "host/cuda/event.h"
#include "layout/exchange.h"

namespace moe_ep {

// One rank's end of the exchanges of a group: the mapped arenas, and the state that kernels keep between exchanges.
class Channel {
public:
    Channel(const std::vector<std::byte*>& arenas, int rank, int64_t payload_bytes, int device, double timeout_s);
    ~Channel();
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;

    void open(const Opening& opening, void* stream);
    // Opens a dispatch. Returns a ticket for wait_sizes, 0 unless `tell_sizes`.
    int64_t count(const PlanParams& plan, OpenParams& params, bool tell_sizes, void* stream);
    void dispatch(DispatchParams& params, bool bulk, void* started, void* stream);
    void combine(CombineParams& params, bool bulk, void* started, void* stream);
    // Makes a stream wait for all that another one has been given so far.
    void order(uintptr_t first, uintptr_t then);
    void plant_fault(int fault) { link_.fault = static_cast<Fault>(fault); }

    // Layout rows, received rows, largest T of any rank, and layout rows of the rank with most where that was asked
    // for.
    using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;
    std::optional<Sizes> wait_sizes(int64_t ticket, double seconds) const;
    std::vector<int32_t> host_counts(int64_t ticket, int count) const;

    // What went wrong first since the last reset, and capacities that did not hold.
    StatusWords status() const;
    // Whether nothing went wrong, and no capacity but the first `overflows` times did not hold.
    bool is_quiet(int64_t overflows) const;
    uint64_t epoch() const;
    void reset(uint64_t epoch);
    // Ends all waits of kernels that run or will, as a failure does. Until a reset nothing moves.
    void abandon();

    int num_ranks() const { return link_.num_ranks; }
    int64_t payload_bytes() const { return link_.payload_bytes; }
    double timeout_s() const { return static_cast<double>(link_.timeout_ns) * 1e-9; }
    void set_timeout_s(double seconds);

private:
    // Writes device memory; kernels that are launched afterwards, on any stream, see it.
    static void write(void* to, const void* from, size_t num_bytes);

    // Dispatches whose sizes nobody has asked for yet.
    static constexpr int64_t kNumSizeSlots = 128;

    Link link_{};
    int device_;
    std::optional<Event> order_;
    SizeWords* sizes_ = nullptr;
    int32_t* counts_ = nullptr;  // [kNumSizeSlots][kMaxExperts]
    int64_t next_ticket_ = 1;
};

}  // namespace moe_ep
