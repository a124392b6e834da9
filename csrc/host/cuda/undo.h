#pragma once

#include <exception>
#include <functional>
#include <utility>
#include <vector>

#include "host/errors.h"

namespace moe_ep {

// Steps that give back what was acquired, last acquired first, each taken once. A function that acquires several things
// keeps one of these until all is there, and then hands it to the owner: what fails in between leaves nothing behind.
class Undo {
public:
    Undo() = default;
    Undo(Undo&&) = default;
    Undo& operator=(Undo&&) = delete;
    ~Undo() {
        try {
            run();
        } catch (const Error&) {
            // Nobody can be told any more, and every step was taken.
        }
    }

    void add(std::function<void()> step) { steps_.push_back(std::move(step)); }

    void append(Undo&& other) {
        for (auto& step : other.steps_) steps_.push_back(std::move(step));
        other.steps_.clear();
    }

    // Takes all steps, then raises the first error that any of them met.
    void run() {
        std::exception_ptr first;
        while (!steps_.empty()) {
            const std::function<void()> step = std::move(steps_.back());
            steps_.pop_back();
            try {
                step();
            } catch (const Error&) {
                if (!first) first = std::current_exception();
            }
        }
        if (first) std::rethrow_exception(first);
    }

private:
    std::vector<std::function<void()>> steps_;
};

}  // namespace moe_ep
