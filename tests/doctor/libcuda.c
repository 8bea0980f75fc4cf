// A driver of CUDA 12.8 with two GPUs, as far as the doctor asks it. FAKE_GPUS: how many it shows; FAKE_CUINIT: what
// cuInit returns.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int from(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) {
    return flags ? 1 : from("FAKE_CUINIT", 0);
}

int cuDriverGetVersion(int* version) {
    return *version = 12080, 0;
}

int cuDeviceGetCount(int* count) {
    return *count = from("FAKE_GPUS", 2), 0;
}

int cuDeviceGetName(char* name, int size, int device) {
    return snprintf(name, size, "NVIDIA FAKE %d", device), 0;
}

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    return *bytes = (size_t)(device + 1) << 36, 0;
}

int cuDeviceGetPCIBusId(char* text, int size, int device) {
    return snprintf(text, size, "0000:0%d:00.0", device), 0;
}

int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    return memset(uuid, 0xa0 + device, 16), 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? device : -1;  // compute capability 9.0, 9.1
    return 0;
}
