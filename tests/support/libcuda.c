/* As much of the CUDA driver as export/engine/gpu.py asks; the environment says what GPU it is. */
#include <stdlib.h>
#include <string.h>

static int number(const char* name) { return atoi(getenv(name)); }

int cuInit(unsigned flags) { return (int)flags; }
int cuDriverGetVersion(int* version) { return *version = number("FAKE_DRIVER"), 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, number("FAKE_STATUS"); }
int cuDeviceGetName(char* name, int size, int device) {
  return strncpy(name, "NVIDIA Fake", size), device;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = number("FAKE_CAPABILITY");
  return *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1, device;
}
