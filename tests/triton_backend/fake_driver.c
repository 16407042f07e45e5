/* The driver of a GPU as far as Triton's launcher sees it: takes every module, and notes launches.

   With -DHIP it is AMD's, with the headers that come with Triton; without, NVIDIA's. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { kArguments = 32 };

/* What the last launch was given; the test says first how many arguments there are, and how long.
 */
struct Launch {
  int64_t launches, module_starts_with, grid[3], block[3], stream;
  int64_t sizes[kArguments];
  uint64_t arguments[kArguments];
} noted;

static int note(const unsigned grid[3], const unsigned block[3], void* stream, void** arguments) {
  for (int i = 0; i < 3; i++) {
    noted.grid[i] = grid[i];
    noted.block[i] = block[i];
  }
  noted.launches++;
  noted.stream = (int64_t)stream;
  for (int i = 0; i < kArguments && noted.sizes[i]; i++) {
    noted.arguments[i] = 0;
    memcpy(&noted.arguments[i], arguments[i], (size_t)noted.sizes[i]);
  }
  return 0;
}

static int load(void** module, const void* image) {
  memcpy(&noted.module_starts_with, image, 4);
  *module = (void*)0x1000;
  return 0;
}

static int get_function(void** function, void* module, const char* name) {
  (void)module, (void)name;
  *function = (void*)0x2000;
  return 0;
}

static const char* text(void) { return "an error of the fake driver"; }

#ifdef HIP

#define __HIP_PLATFORM_AMD__
#include <hip/hip_runtime_api.h>

static int properties(hipDeviceProp_t* found, int device) {
  (void)device;
  memset(found, 0, sizeof *found);
  found->sharedMemPerBlock = 65536;
  found->warpSize = 64;
  strcpy(found->gcnArchName, "gfx942:sramecc+:xnack-");
  return 0;
}

static int load_ex(void** module, const void* image, unsigned n, void* options, void* values) {
  (void)n, (void)options, (void)values;
  return load(module, image);
}

static int attribute(int* value, int which, void* function) {
  (void)function;
  *value = which == HIP_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}

static int launch(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                  unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
  (void)function, (void)shared;
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return extra ? 1 : note(grid, block, stream, arguments);
}

static int accept(void) { return 0; }
static int refuse(void) { return 1; }

int fake_driver_version(int* version) __asm__("hipDriverGetVersion");
int fake_driver_version(int* version) {
  *version = 60300000;
  return 0;
}

int fake_get_address(const char* name, void** address, int version, uint64_t flags,
                     void* status) __asm__("hipGetProcAddress");
int fake_get_address(const char* name, void** address, int version, uint64_t flags, void* status) {
  (void)version, (void)flags, (void)status;
  const struct {
    const char* name;
    void* address;
  } known[] = {
      {"hipGetErrorString", text},
      {"hipGetLastError", text},
      {"hipGetDeviceProperties", properties},
      {"hipModuleLoadDataEx", load_ex},
      {"hipModuleGetFunction", get_function},
      {"hipFuncGetAttribute", attribute},
      {"hipModuleLaunchKernel", launch},
      {"hipModuleUnload", accept},
  };
  *address = refuse;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    if (strcmp(name, known[i].name) == 0) *address = known[i].address;
  }
  return 0;
}

#else

struct Config {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned n_attributes;
};

int cuLaunchKernelEx(const struct Config* c, void* function, void** arguments, void** extra) {
  (void)function;
  return extra || c->n_attributes ? 1 : note(c->grid, c->block, c->stream, arguments);
}

int cuModuleLoadData(void** module, const void* image) { return load(module, image); }

int cuModuleGetFunction(void** function, void* module, const char* name) {
  return get_function(function, module, name);
}

int cuFuncGetAttribute(int* value, int which, void* function) {
  (void)function;
  *value = which == 0 ? 1024 : 0; /* threads of a block */
  return 0;
}

int cuDeviceGetAttribute(int* value, int which, int device) {
  (void)which, (void)device;
  *value = 65536; /* bytes of shared memory; nobody asks for anything else that matters */
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = (void*)0x3000;
  return 0;
}

int cuGetErrorString(int error, const char** message) {
  (void)error;
  *message = text();
  return 0;
}

#define REFUSED(name) \
  int name(void) { return 1; }
REFUSED(cuInit)
REFUSED(cuCtxGetDevice)
REFUSED(cuCtxGetLimit)
REFUSED(cuCtxSetCurrent)
REFUSED(cuCtxSetLimit)
REFUSED(cuDeviceGet)
REFUSED(cuDevicePrimaryCtxRetain)
REFUSED(cuDriverGetVersion)
REFUSED(cuFuncSetAttribute)
REFUSED(cuFuncSetCacheConfig)
REFUSED(cuPointerGetAttribute)
REFUSED(cuPointerGetAttributes)
REFUSED(cuStreamIsCapturing)

int cuModuleUnload(void* module) {
  (void)module;
  return 0;
}

#endif
