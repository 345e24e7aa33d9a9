/* A stand-in for the CUDA driver, as far as export/engine asks it: the environment describes the
   GPU, and its memory is this process's. CUDA's runtime, which asks by cuGetProcAddress, finds no
   GPU: tritonserver has nothing to run on it. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) { return (int)flags; }
int cuDriverGetVersion(int* version) { return *version = number("FAKE_DRIVER", 13010), 0; }
int cuDeviceGet(int* device, int ordinal) {
  return *device = ordinal, number("FAKE_STATUS", 0);
}
int cuDeviceGetName(char* name, int size, int device) {
  return strncpy(name, "NVIDIA Fake", size), device;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = number("FAKE_CAPABILITY", 89);
  return *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1, device;
}

int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = NULL, device; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device; }
int cuCtxSetCurrent(void* context) { return context != NULL; }
int cuStreamCreate(void** stream, unsigned flags) { return *stream = NULL, (int)flags; }
int cuStreamSynchronize(void* stream) { return stream != NULL; }
int cuStreamDestroy_v2(void* stream) { return stream != NULL; }
int cuMemAlloc_v2(uintptr_t* address, size_t size) {
  return *address = (uintptr_t)malloc(size), *address == 0;
}
int cuMemFree_v2(uintptr_t address) { return free((void*)address), 0; }
int cuMemcpyHtoD_v2(uintptr_t to, const void* from, size_t size) {
  return memcpy((void*)to, from, size), 0;
}
int cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t size) {
  return memcpy(to, (const void*)from, size), 0;
}

static int no_device(void) { return 100; }
int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags,
                        int* found) {
  int is_version = strcmp(symbol, "cuDriverGetVersion") == 0;
  *function = is_version ? (void*)cuDriverGetVersion : (void*)no_device;
  if (found) *found = 0;
  return version < 0 || flags > 2;
}
int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
