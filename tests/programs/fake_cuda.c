/* A driver's library (libcuda.so.1) that finds as many GPUs as the environment says: what asks the driver runs on a
 * machine without one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) { return number("FAKE_INIT", number("FAKE_GPUS", 1) ? 0 : 100); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_DRIVER", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = number("FAKE_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index < number("FAKE_GPUS", 1) ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Fake %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)5 << 30; return 0; }
int cuGetErrorString(int code, const char **text) {
    *text = code == 802 ? "system not yet initialized" : NULL;
    return *text ? 0 : 1;
}
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    memset(uuid, 0xa0, 16);
    uuid[15] = (unsigned char)device;
    return 0;
}
