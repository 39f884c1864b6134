/* libcuda.so.1 of the stub: modules load, kernels launch into nothing, segments of memory are address space. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define OK return CUDA_SUCCESS
/* Of runtime.c, which is preloaded. */
extern void stub_count(const char *name);
extern int stub_capability(void);
extern int stub_devices(void);
extern void *stub_reserve(size_t size);
extern void stub_own(void *start, size_t size);
extern int stub_charge(size_t size, int device);
extern void stub_release(size_t size, int device);
extern int cudaGetDevice(int *device);
extern int cudaDeviceGetAttribute(int *value, int attribute, int device);

static int context;

CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; OK; }
CUresult cuDeviceGetCount(int *count) { *count = stub_devices(); OK; }
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

/* Modules and kernels of Triton. ptxas writes into the cubin, an ELF file, for which GPU it is, and the registers and the
 * stack of each kernel. Triton's kernels have no arrays in local memory, so a stack holds registers that were spilled. */

#define MAX_CUBIN_KERNELS 16
enum { REGISTERS = 0x2f, FRAME = 0x11, WITH_SIZE = 4 }; /* attributes in .nv.info, and a format of them */
typedef struct { const char *name; unsigned registers, frame; } Kernel;
typedef struct { int count; Kernel kernels[MAX_CUBIN_KERNELS]; } Module;

static Kernel *kernel_of(Module *it, const char *name) {
    for (int i = 0; i < it->count; i++)
        if (strcmp(it->kernels[i].name, name) == 0) return &it->kernels[i];
    if (it->count == MAX_CUBIN_KERNELS) abort(); /* else the attributes of two kernels would mix */
    it->kernels[it->count].name = strdup(name);
    return &it->kernels[it->count++];
}

static void read_attributes(Module *it, const char *at, size_t size, const Elf64_Sym *symbols, const char *names) {
    for (const char *end = at + size; at + 4 <= end;) {
        uint16_t length;
        uint32_t value[2]; /* a symbol and its number */
        memcpy(&length, at + 2, sizeof length);
        if (at[0] == WITH_SIZE && length == sizeof value && (at[1] == REGISTERS || at[1] == FRAME)) {
            memcpy(value, at + 4, sizeof value);
            Kernel *kernel = kernel_of(it, names + symbols[value[0]].st_name);
            *(at[1] == REGISTERS ? &kernel->registers : &kernel->frame) = value[1];
        }
        at += 4 + (at[0] == WITH_SIZE ? length : 0);
    }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    const char *start = image;
    const Elf64_Ehdr *header = image;
    Module *it = calloc(1, sizeof *it);
    *module = (CUmodule)it;
    if (memcmp(start, ELFMAG, SELFMAG) != 0) OK; /* not a cubin */
    char text[32];
    int shift = header->e_ident[EI_ABIVERSION] >= 8 ? 8 : 0; /* of newer releases of ptxas */
    snprintf(text, sizeof text, "cubin sm_%u", header->e_flags >> shift & 255);
    stub_count(text);
    const Elf64_Shdr *sections = (const void *)(start + header->e_shoff);
    const char *names = start + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++)
        if (strcmp(names + sections[i].sh_name, ".nv.info") == 0) {
            const Elf64_Shdr *table = &sections[sections[i].sh_link];
            read_attributes(it, start + sections[i].sh_offset, sections[i].sh_size,
                            (const void *)(start + table->sh_offset), start + sections[table->sh_link].sh_offset);
        }
    OK;
}
CUresult cuModuleLoad(CUmodule *module, const char *path) { /* so does torch's launcher of Triton's kernels */
    int file = open(path, O_RDONLY);
    struct stat about;
    if (file < 0 || fstat(file, &about) != 0) return CUDA_ERROR_FILE_NOT_FOUND;
    void *image = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (image == MAP_FAILED) return CUDA_ERROR_FILE_NOT_FOUND;
    CUresult result = cuModuleLoadData(module, image);
    munmap(image, about.st_size);
    return result;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule module) { OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)kernel_of((Module *)module, name);
    OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    const Kernel *kernel = (const Kernel *)function;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->frame; break;
    default: *value = 0;
    }
    OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache configuration) { OK; }
static CUresult launched(CUfunction function) {
    const Kernel *kernel = (const Kernel *)function;
    stub_count("launch");
    stub_count(kernel->name);
    if (!kernel->registers) stub_count("no attributes"); /* then a spill would not be seen, either */
    if (kernel->frame) {
        char text[512];
        snprintf(text, sizeof text, "spill in %s", kernel->name);
        stub_count(text);
    }
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
