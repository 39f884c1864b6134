/* libcuda.so.1 of the stub: modules load, kernels launch into nothing, segments of memory are address space. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define OK return CUDA_SUCCESS
/* Of runtime.c, which is preloaded. */
extern void stub_count(const char *name);
extern int stub_capability(void);
extern void *stub_reserve(size_t size);
extern void stub_own(void *start, size_t size);
extern int stub_charge(size_t size, int device);
extern void stub_release(size_t size, int device);
extern int cudaGetDevice(int *device);
extern int cudaDeviceGetAttribute(int *value, int attribute, int device);

static int context;
static uintptr_t handles = 1 << 20;

CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; OK; }
CUresult cuDeviceGetCount(int *count) { *count = 8; OK; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; OK; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) { strncpy(name, "NVIDIA H100 80GB HBM3", size); OK; }
/* Attributes have the numbers of the runtime's. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    if (attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) {
        *value = 1;
        OK;
    }
    return cudaDeviceGetAttribute(value, attribute, device);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *it, CUdevice device) { *it = (CUcontext)&context; OK; }
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { OK; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    OK;
}
CUresult cuCtxGetCurrent(CUcontext *it) { *it = (CUcontext)&context; OK; }
CUresult cuCtxSetCurrent(CUcontext it) { OK; }
CUresult cuCtxGetDevice(CUdevice *device) { return cudaGetDevice(device); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { OK; }
CUresult cuCtxSynchronize(void) { stub_count("wait cuCtxSynchronize"); OK; }
CUresult cuStreamSynchronize(CUstream stream) { stub_count("wait cuStreamSynchronize"); OK; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = error ? "an error of the stub" : "no error"; OK; }
CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }

/* Modules and kernels of Triton. */
CUresult cuModuleLoad(CUmodule *module, const char *file) { *module = (CUmodule)++handles; OK; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)++handles; OK; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule module) { OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name); /* so that a launch can name it */
    OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache configuration) { OK; }
static CUresult launched(CUfunction function) {
    stub_count("launch");
    stub_count((const char *)function);
    OK;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **values, void **more) {
    return launched(function);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *configuration, CUfunction function, void **values, void **more) {
    return launched(function);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void **values) {
    return launched(function);
}
CUresult cuLinkCreate(unsigned count, CUjit_option *options, void **values, CUlinkState *state) { OK; }
CUresult cuLinkAddData(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name, unsigned count,
                       CUjit_option *options, void **values) { OK; }
CUresult cuLinkComplete(CUlinkState state, void **cubin, size_t *size) { OK; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int block, size_t shared) {
    *count = 2;
    OK;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *configuration) {
    *count = 16;
    OK;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = pointer;
    else
        *(int *)value = 0;
    OK;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *start,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) { OK; }

/* Expandable segments: an address range, and pieces of memory that are mapped into it. A handle is its size. */
CUresult cuMemAddressReserve(CUdeviceptr *start, size_t size, size_t alignment, CUdeviceptr at, unsigned long long flags) {
    void *memory = stub_reserve(size);
    stub_own(memory, size);
    *start = (CUdeviceptr)memory;
    return memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr start, size_t size) { OK; }
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags option) {
    *size = 2 << 20;
    OK;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *piece, size_t size, const CUmemAllocationProp *prop,
                     unsigned long long flags) {
    if (!stub_charge(size, prop->location.id)) return CUDA_ERROR_OUT_OF_MEMORY;
    *piece = size << 4 | (unsigned)prop->location.id;
    OK;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle piece) {
    stub_release(piece >> 4, piece & 15);
    OK;
}
CUresult cuMemMap(CUdeviceptr start, size_t size, size_t offset, CUmemGenericAllocationHandle piece,
                  unsigned long long flags) { OK; }
CUresult cuMemUnmap(CUdeviceptr start, size_t size) {
    madvise((void *)start, size, MADV_DONTNEED);
    OK;
}
CUresult cuMemSetAccess(CUdeviceptr start, size_t size, const CUmemAccessDesc *access, size_t count) { OK; }
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *status) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
