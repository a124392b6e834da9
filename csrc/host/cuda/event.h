#pragma once

#include <cstdint>

namespace moe_ep {

// A place in a stream of the current device, without a time. Streams are addresses.
class Event {
public:
    Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event();

    void record(uintptr_t stream);
    void wait(uintptr_t stream);
    bool query();
    void order(uintptr_t first, uintptr_t then) {
        record(first);
        wait(then);
    }

private:
    void* event_ = nullptr;
};

}  // namespace moe_ep
