/* A driver whose device memory is the host's, for tests of scripts that call the real one through ctypes.

   Copies are checked against allocations. STANDIN_DEVICES and STANDIN_SM say what is installed; STANDIN_INIT is what
   cuInit returns. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, ROOM = 1024 };
static struct { uint64_t address; size_t size; } allocations[ROOM];
static struct timespec events[2];

static int setting(const char *name, int usual) { const char *text = getenv(name); return text ? atoi(text) : usual; }

static int holds(uint64_t address, size_t size) {
  for (int i = 0; i < ROOM; i++)
    if (allocations[i].address && address >= allocations[i].address &&
        address + size <= allocations[i].address + allocations[i].size)
      return 1;
  return 0;
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : setting("STANDIN_INIT", 0); }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = setting("STANDIN_DEVICES", 1); return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int room, int device) { snprintf(name, room, "Stand-in %d", device); return 0; }
int cuDeviceGetPCIBusId(char *name, int room, int device) { snprintf(name, room, "0000:0%d:00.0", device); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int sm = setting("STANDIN_SM", 87);
  (void)device;
  if (attribute == 75) *value = sm / 10;
  else if (attribute == 76) *value = sm % 10;
  else return INVALID_VALUE;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = events; return 0; }
int cuCtxSetCurrent(void *context) { return context == events ? 0 : INVALID_VALUE; }

int cuMemAlloc_v2(uint64_t *address, size_t size) {
  for (int i = 0; i < ROOM; i++)
    if (!allocations[i].address) {
      void *memory = calloc(size, 1);
      if (!memory || !size) return OUT_OF_MEMORY;
      allocations[i].address = (uint64_t)(uintptr_t)memory;
      allocations[i].size = size;
      *address = allocations[i].address;
      return 0;
    }
  return OUT_OF_MEMORY;
}
int cuMemFree_v2(uint64_t address) {
  for (int i = 0; i < ROOM; i++)
    if (allocations[i].address == address && address) {
      free((void *)(uintptr_t)address);
      allocations[i].address = 0;
      return 0;
    }
  return INVALID_VALUE;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
  if (!stream || !holds(to, size)) return INVALID_VALUE;
  memcpy((void *)(uintptr_t)to, from, size);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
  if (!stream || !holds(from, size)) return INVALID_VALUE;
  memcpy(to, (void *)(uintptr_t)from, size);
  return 0;
}

int cuStreamCreate(void **stream, unsigned flags) { *stream = malloc(1); return flags > 1 ? INVALID_VALUE : 0; }
int cuStreamSynchronize(void *stream) { return stream ? 0 : INVALID_VALUE; }
int cuEventCreate(void **event, unsigned flags) {
  static int made;
  *event = &events[made++ % 2];
  return flags ? INVALID_VALUE : 0;
}
int cuEventRecord(void *event, void *stream) {
  return stream ? clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event) : INVALID_VALUE;
}
int cuEventElapsedTime(float *milliseconds, void *start, void *end) {
  const struct timespec *a = start, *b = end;
  *milliseconds = (float)((b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6);
  return 0;
}
int cuStreamBeginCapture_v2(void *stream, int mode) { return stream && mode == 1 ? setting("STANDIN_CAPTURE", 0) : 1; }
int cuStreamEndCapture(void *stream, void **graph) { *graph = events; return stream ? 0 : INVALID_VALUE; }
int cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags) {
  *executable = graph;
  return flags ? INVALID_VALUE : 0;
}
int cuGraphLaunch(void *executable, void *stream) { return executable && stream ? 0 : INVALID_VALUE; }
int cuGetErrorName(int error, const char **name) {
  static const char *names[] = {"CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_OUT_OF_MEMORY"};
  if (error == 100) *name = "CUDA_ERROR_NO_DEVICE";
  else if (error == 900) *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
  else if (error >= 0 && error <= 2) *name = names[error];
  else return INVALID_VALUE;
  return 0;
}
