// One name per runtime call and intrinsic, so that the kernels do not know whose GPU they run on: csrc/gpu is compiled
// by nvcc for NVIDIA's and as HIP for AMD's. What differs by more than a prefix is in vendor_cuda.h and vendor_hip.h,
// with the same names in both.
#pragma once

#if defined(__HIP__)
#include "gpu/vendor_hip.h"
#define BATCHINFER_RUNTIME(name) hip##name
#else
#include "gpu/vendor_cuda.h"
#define BATCHINFER_RUNTIME(name) cuda##name
#endif

namespace batchinfer::gpu {

using gpuError_t = BATCHINFER_RUNTIME(Error_t);
using gpuEvent_t = BATCHINFER_RUNTIME(Event_t);

inline constexpr gpuError_t gpuSuccess = BATCHINFER_RUNTIME(Success);

inline gpuError_t gpuGetLastError() {
    return BATCHINFER_RUNTIME(GetLastError)();
}
inline const char* gpuGetErrorString(gpuError_t error) {
    return BATCHINFER_RUNTIME(GetErrorString)(error);
}
inline gpuError_t gpuGetDeviceCount(int* count) {
    return BATCHINFER_RUNTIME(GetDeviceCount)(count);
}
inline gpuError_t gpuGetDevice(int* device) {
    return BATCHINFER_RUNTIME(GetDevice)(device);
}
inline gpuError_t gpuAllowSharedMemory(const void* kernel, int bytes) {
    return BATCHINFER_RUNTIME(FuncSetAttribute)(kernel, BATCHINFER_RUNTIME(FuncAttributeMaxDynamicSharedMemorySize),
                                                bytes);
}
inline gpuError_t gpuBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, int shared_bytes) {
    return BATCHINFER_RUNTIME(OccupancyMaxActiveBlocksPerMultiprocessor)(blocks, kernel, threads, shared_bytes);
}
// Waits for no other stream, and its blocks are placed before those of others.
inline gpuError_t gpuStreamCreateUrgent(gpuStream_t* stream) {
    int least = 0, greatest = 0;
    const gpuError_t error = BATCHINFER_RUNTIME(DeviceGetStreamPriorityRange)(&least, &greatest);
    if (error != gpuSuccess) return error;
    return BATCHINFER_RUNTIME(StreamCreateWithPriority)(stream, BATCHINFER_RUNTIME(StreamNonBlocking), greatest);
}
inline gpuError_t gpuEventCreateUntimed(gpuEvent_t* event) {
    return BATCHINFER_RUNTIME(EventCreateWithFlags)(event, BATCHINFER_RUNTIME(EventDisableTiming));
}
inline gpuError_t gpuEventRecord(gpuEvent_t event, gpuStream_t stream) {
    return BATCHINFER_RUNTIME(EventRecord)(event, stream);
}
inline gpuError_t gpuStreamWaitEvent(gpuStream_t stream, gpuEvent_t event) {
    return BATCHINFER_RUNTIME(StreamWaitEvent)(stream, event, 0);
}

}  // namespace batchinfer::gpu

#undef BATCHINFER_RUNTIME
