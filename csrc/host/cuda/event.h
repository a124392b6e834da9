#pragma once

#include <cstdint>

namespace moe_ep {

// A place in a stream of the current device, without a time. Streams are addresses. Events of the driver are used
// again: making one takes longer than recording it.
class Event {
public:
    Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event();

    void record(uintptr_t stream);
    void wait(uintptr_t stream);
    // For a launch on a stream that records it: the cudaEvent_t.
    void* handle(uintptr_t stream);
    bool is_captured() const { return captured_; }
    bool query();
    void order(uintptr_t first, uintptr_t then) {
        record(first);
        wait(then);
    }
    // The same for streams that a capture may have left behind: what was given to one before a capture on the other
    // began is none of the graph's.
    void follow(uintptr_t first, uintptr_t then);

private:
    void* event_ = nullptr;
    int device_ = 0;
    // A capture may still refer to it.
    bool captured_ = false;
};

}  // namespace moe_ep
