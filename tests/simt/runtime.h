// The runtime calls that csrc/gpu/vendor.h uses, with the names of the vendor whose SIMT_RUNTIME(name) says. One
// device; streams and their events are in order anyway: a launch returns when the kernel is done, or throws.
#pragma once

#include <cstdlib>

using SIMT_RUNTIME(Stream_t) = void*;
using SIMT_RUNTIME(Event_t) = void*;
enum : unsigned { SIMT_RUNTIME(StreamNonBlocking), SIMT_RUNTIME(EventDisableTiming) };
enum SIMT_RUNTIME(Error_t) { SIMT_RUNTIME(Success) };
enum SIMT_RUNTIME(FuncAttribute) { SIMT_RUNTIME(FuncAttributeMaxDynamicSharedMemorySize) };

inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(GetLastError)() {
    return SIMT_RUNTIME(Success);
}
inline const char* SIMT_RUNTIME(GetErrorString)(SIMT_RUNTIME(Error_t)) {
    return "";
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(GetDeviceCount)(int* count) {
    *count = 1;
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(GetDevice)(int* device) {
    *device = 0;
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(FuncSetAttribute)(const void*, SIMT_RUNTIME(FuncAttribute), int) {
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t)
    SIMT_RUNTIME(OccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, const void*, int, size_t) {
    *blocks = 1;
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(DeviceGetStreamPriorityRange)(int*, int*) {
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(StreamCreateWithPriority)(SIMT_RUNTIME(Stream_t) * stream, unsigned, int) {
    *stream = nullptr;
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(EventCreateWithFlags)(SIMT_RUNTIME(Event_t) * event, unsigned) {
    *event = nullptr;
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(EventRecord)(SIMT_RUNTIME(Event_t), SIMT_RUNTIME(Stream_t)) {
    return SIMT_RUNTIME(Success);
}
inline SIMT_RUNTIME(Error_t) SIMT_RUNTIME(StreamWaitEvent)(SIMT_RUNTIME(Stream_t), SIMT_RUNTIME(Event_t), unsigned) {
    return SIMT_RUNTIME(Success);
}

namespace simt {

// Few multiprocessors, so that a persistent block takes many items.
inline constexpr int kMultiprocessors = 2;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
            const Arguments&... arguments) {
    block().run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace simt
