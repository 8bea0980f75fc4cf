// A GPU thread on the CPU: a stack of its own, and a switch that costs a few nanoseconds because the operating system
// has no part in it. Cooperative: a fiber runs until it switches.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
  public:
    Fiber() = default;  // the caller's own stack
    Fiber(const Fiber&) = delete;
    ~Fiber();

    // Makes the next switch_to() call `entry`, on an empty stack. `entry` must not return.
    void prepare(void (*entry)());
    // Leaves `from`, which must be running, until somebody switches back to it.
    static void switch_fibers(Fiber& from, Fiber& to);
    // First in `entry`: tells AddressSanitizer that the switch is over.
    static void entered();

  private:
    void* stack_pointer_ = nullptr;
    unsigned char* stack_ = nullptr;  // lowest byte; below it is a page that may not be touched
    void* fake_stack_ = nullptr;      // AddressSanitizer's
    const void* bottom_ = nullptr;    // of the stack, as AddressSanitizer needs it
    size_t size_ = 0;
};

}  // namespace simt
