#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the fibers of the GPU emulator are written for x86-64"
#endif

// Saves what the ABI wants kept (System V psABI, 3.2.1) on the stack that is left and takes it from the one entered.
extern "C" void simt_switch_stacks(void** left, void* entered);
asm(R"(
.text
.p2align 4
.type simt_switch_stacks, @function
simt_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch_stacks, .-simt_switch_stacks
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;  // the largest kernel's frames take 20 KB under AddressSanitizer
constexpr size_t kLastFrames = 4 << 10;   // of `entry`, which it never leaves: their red zones stay behind
constexpr size_t kSavedRegisters = 6;

Fiber* left = nullptr;  // by the switch that is under way

}  // namespace

Fiber::~Fiber() {
    if (stack_) munmap(stack_ - getpagesize(), kStackBytes + getpagesize());
}

void Fiber::prepare(void (*entry)()) {
    if (!stack_) {
        const size_t guard = getpagesize();
        void* map = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED || mprotect(map, guard, PROT_NONE) != 0) throw std::bad_alloc();
        stack_ = static_cast<unsigned char*>(map) + guard;
        bottom_ = stack_;
        size_ = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);  // a failed kernel's frames may have been here
#endif
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_ + kStackBytes - kLastFrames, kLastFrames);
#endif
    // As if `entry` had been interrupted at its first instruction: 16 n + 8 is what the ABI wants there.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
    top[-1] = nullptr;  // no caller
    top[-2] = reinterpret_cast<void*>(entry);
    std::memset(top - 2 - kSavedRegisters, 0, kSavedRegisters * sizeof(void*));
    stack_pointer_ = top - 2 - kSavedRegisters;
    fake_stack_ = nullptr;
}

void Fiber::switch_fibers(Fiber& from, Fiber& to) {
    left = &from;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
    simt_switch_stacks(&from.stack_pointer_, to.stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack_, &left->bottom_, &left->size_);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &left->bottom_, &left->size_);
#endif
}

}  // namespace simt
