/* A CUDA runtime without a GPU: eight devices whose kernels do nothing.
 *
 * Preloaded before libcudart, it defines the functions of the runtime that PyTorch's CUDA build calls. Device memory is
 * address space of the host that nothing touches, so a model of 80 GB takes no memory here; the host reads zeros from it.
 * Launches, copies and waits are counted and named.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define OK return cudaSuccess
#define DEVICES 8
#define MEMORY 85029158912ull /* bytes of a card */
#define LARGEST_COPY (1u << 20) /* bytes that the host reads: the destination of a larger copy stays as it is */

static __thread int current = 0;

/* ---- counters: how often each call was made, and each kernel launched, by name ---------------------------------- */

#define MAX_NAMES 65536
static struct { const char *name; long count; } counted[MAX_NAMES];
static int names = 0;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void stub_count(const char *name) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < names && counted[i].name != name && strcmp(counted[i].name, name) != 0) i++;
    if (i == names && names < MAX_NAMES) counted[names++].name = strdup(name);
    if (i < names) counted[i].count++;
    pthread_mutex_unlock(&lock);
}

int stub_names(void) { return names; }
const char *stub_name(int i) { return counted[i].name; }
long stub_calls(int i) { return counted[i].count; }
void stub_reset(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < names; i++) counted[i].count = 0;
    pthread_mutex_unlock(&lock);
}

/* ---- devices ---------------------------------------------------------------------------------------------------- */

/* Compute capability times 10: FLIP_STUB_CAPABILITY, 90 (H100) by default. */
int stub_capability(void) {
    const char *text = getenv("FLIP_STUB_CAPABILITY");
    return text ? atoi(text) : 90;
}

/* The devices that CUDA_VISIBLE_DEVICES names, or all. As in CUDA, the variable counts at the first call. */
int stub_devices(void) {
    static int count = -1;
    if (count >= 0) return count;
    const char *names = getenv("CUDA_VISIBLE_DEVICES");
    count = names ? 0 : DEVICES;
    for (int within = 0; names && *names; names++) {
        if (*names == ',') within = 0;
        else if (!within++) count++;
    }
    return count;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = stub_devices();
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) { *device = current; OK; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= stub_devices()) return cudaErrorInvalidDevice;
    current = device;
    OK;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaDeviceSynchronize(void) { stub_count("wait cudaDeviceSynchronize"); OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; OK; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; OK; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { snprintf(text, size, "0000:%02x:00.0", device); OK; }
cudaError_t cudaProfilerStart(void) { OK; }
cudaError_t cudaProfilerStop(void) { OK; }
cudaError_t cudaGetLastError(void) { OK; }
cudaError_t cudaPeekAtLastError(void) { OK; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorOfStub" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "an error of the stub" : "no error";
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *it, int device) {
    memset(it, 0, sizeof *it);
    const char *name = getenv("FLIP_STUB_NAME");
    snprintf(it->name, sizeof it->name, "%s", name ? name : "NVIDIA H100 80GB HBM3");
    it->uuid.bytes[0] = device + 1;
    it->major = stub_capability() / 10;
    it->minor = stub_capability() % 10;
    it->totalGlobalMem = MEMORY;
    it->totalConstMem = 65536;
    it->multiProcessorCount = 132;
    it->warpSize = 32;
    it->maxThreadsPerBlock = 1024;
    it->maxThreadsPerMultiProcessor = 2048;
    it->maxBlocksPerMultiProcessor = 32;
    it->regsPerBlock = it->regsPerMultiprocessor = 65536;
    it->sharedMemPerBlock = 49152;
    it->sharedMemPerBlockOptin = 232448;
    it->sharedMemPerMultiprocessor = 233472;
    it->reservedSharedMemPerBlock = 1024;
    it->l2CacheSize = 52428800;
    it->maxGridSize[0] = 2147483647;
    it->maxGridSize[1] = it->maxGridSize[2] = 65535;
    it->maxThreadsDim[0] = it->maxThreadsDim[1] = 1024;
    it->maxThreadsDim[2] = 64;
    it->unifiedAddressing = it->canMapHostMemory = it->concurrentKernels = it->managedMemory = 1;
    it->asyncEngineCount = 3;
    it->textureAlignment = it->surfaceAlignment = 512;
    it->memoryBusWidth = 5120;
    it->pciBusID = device;
    OK;
}

/* CUB reads the grid's limits and divides by the processors: with zeros its scan never ends. */
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp it;
    cudaGetDeviceProperties(&it, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = it.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = it.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = it.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = it.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = it.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = it.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = it.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrL2CacheSize: *value = it.l2CacheSize; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrTextureAlignment: *value = 512; break;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrConcurrentKernels: case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrCanMapHostMemory: case cudaDevAttrHostRegisterSupported: *value = 1; break;
    default: *value = 0;
    }
    OK;
}

/* ---- memory: reserved address space, limited to the card's -------------------------------------------------------- */

#define MAX_BLOCKS 65536
static struct { char *start; size_t size; int device; } blocks[MAX_BLOCKS];
static int block_count = 0;
static size_t used[DEVICES];

/* Reserve memory without backing; shared with driver.c, whose allocator maps segments. */
void *stub_reserve(size_t size) {
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

void stub_own(void *start, size_t size) {
    pthread_mutex_lock(&lock);
    if (block_count < MAX_BLOCKS) {
        blocks[block_count].start = start;
        blocks[block_count].size = size;
        blocks[block_count++].device = current;
    }
    pthread_mutex_unlock(&lock);
}

static int block_of(const void *pointer) {
    for (int i = 0; i < block_count; i++)
        if (blocks[i].start <= (const char *)pointer && (const char *)pointer < blocks[i].start + blocks[i].size) return i;
    return -1;
}

int stub_charge(size_t size, int device) { /* 0 if the card has no room */
    pthread_mutex_lock(&lock);
    int fits = used[device] + size <= MEMORY;
    if (fits) used[device] += size;
    pthread_mutex_unlock(&lock);
    return fits;
}

void stub_release(size_t size, int device) { used[device] -= size; }

cudaError_t cudaMalloc(void **pointer, size_t size) {
    *pointer = NULL;
    if (!stub_charge(size, current)) return cudaErrorMemoryAllocation;
    *pointer = stub_reserve(size);
    stub_own(*pointer, size);
    OK;
}

cudaError_t cudaFree(void *pointer) {
    pthread_mutex_lock(&lock);
    int i = block_of(pointer);
    if (i >= 0) {
        munmap(blocks[i].start, blocks[i].size);
        used[blocks[i].device] -= blocks[i].size;
        blocks[i] = blocks[--block_count];
    }
    pthread_mutex_unlock(&lock);
    OK;
}

cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { return cudaMalloc(pointer, size); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = MEMORY;
    *free_bytes = MEMORY - used[current];
    OK;
}

/* Page-locked memory, by address; what is neither here nor on a device is pageable. */
static struct { char *start; size_t size; } locked[MAX_BLOCKS];
static int locked_count = 0;

static void lock_pages(void *start, size_t size) {
    pthread_mutex_lock(&lock);
    if (locked_count < MAX_BLOCKS) {
        locked[locked_count].start = start;
        locked[locked_count++].size = size;
    }
    pthread_mutex_unlock(&lock);
}
static int is_locked(const void *pointer) {
    for (int i = 0; i < locked_count; i++)
        if (locked[i].start <= (const char *)pointer && (const char *)pointer < locked[i].start + locked[i].size) return 1;
    return 0;
}
static void unlock_pages(void *start, int unmap) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < locked_count; i++)
        if (locked[i].start == start) {
            if (unmap) munmap(locked[i].start, locked[i].size);
            locked[i] = locked[--locked_count];
            break;
        }
    pthread_mutex_unlock(&lock);
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = stub_reserve(size ? size : 1);
    if (!*pointer) return cudaErrorMemoryAllocation;
    lock_pages(*pointer, size ? size : 1);
    OK;
}
cudaError_t cudaFreeHost(void *pointer) { unlock_pages(pointer, 1); OK; }
cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) { lock_pages(pointer, size); OK; }
cudaError_t cudaHostUnregister(void *pointer) { unlock_pages(pointer, 0); OK; }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { *device = host; OK; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *it, const void *pointer) {
    memset(it, 0, sizeof *it);
    int i = block_of(pointer);
    if (i >= 0) {
        it->type = cudaMemoryTypeDevice;
        it->device = blocks[i].device;
        it->devicePointer = (void *)pointer;
    } else if (is_locked(pointer)) {
        it->type = cudaMemoryTypeHost;
        it->hostPointer = it->devicePointer = (void *)pointer;
    } else {
        it->type = cudaMemoryTypeUnregistered;
        it->hostPointer = (void *)pointer;
    }
    OK;
}

/* Device memory has no values: the host reads zeros, of large copies nothing, so that no memory is touched. */
static void read_zeros(void *to, size_t size) {
    if (size <= LARGEST_COPY && block_of(to) < 0) memset(to, 0, size);
}
/* The host waits for a copy from or to pageable memory. */
static void count_copy(const void *to, const void *from) {
    int to_device = block_of(to) >= 0, from_device = block_of(from) >= 0;
    if (to_device && from_device)
        stub_count("copy on the device");
    else if (!is_locked(to_device ? from : to))
        stub_count(to_device ? "wait copy from pageable memory" : "wait copy to pageable memory");
    else
        stub_count(to_device ? "copy to the device" : "copy to the host");
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    stub_count("wait cudaMemcpy");
    read_zeros(to, size);
    OK;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    count_copy(to, from);
    read_zeros(to, size);
    OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t size, cudaStream_t stream) { OK; }
cudaError_t cudaMemcpy2DAsync(void *to, size_t pitch, const void *from, size_t other, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) { OK; }
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) { OK; }
cudaError_t cudaMemset(void *to, int value, size_t size) { OK; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) { OK; }
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    static char memory[1 << 16];
    *pointer = memory;
    OK;
}

/* ---- streams and events: everything has happened ------------------------------------------------------------------ */

static uintptr_t handles = 0;
static void *handle(void) { return (void *)(__sync_add_and_fetch(&handles, 1)); }

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = handle(); OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = handle(); OK; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { *stream = handle(); OK; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { OK; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { stub_count("wait cudaStreamSynchronize"); OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; OK; }
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) { *flags = cudaStreamNonBlocking; OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
    call(stream, cudaSuccess, data);
    OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) { call(data); OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (count) *count = 0;
    OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { OK; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = handle(); OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = handle(); OK; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { OK; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { OK; }
cudaError_t cudaEventQuery(cudaEvent_t event) { OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { stub_count("wait cudaEventSynchronize"); OK; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) { *milliseconds = 1; OK; }

/* ---- kernels: registered by name, launched into nothing ------------------------------------------------------------ */

#define MAX_KERNELS 262144
static struct { const void *host; const char *name; } kernels[MAX_KERNELS]; /* open addressing by address */

static int slot_of(const void *host) {
    unsigned i = (unsigned)(((uintptr_t)host >> 4) * 2654435761u) % MAX_KERNELS;
    while (kernels[i].host && kernels[i].host != host) i = (i + 1) % MAX_KERNELS;
    return i;
}
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *)); }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
char __cudaInitModule(void **binary) { return 1; }
void __cudaRegisterVar(void **binary, char *host, char *device, const char *name, int external, size_t size, int constant,
                       int global) {}
void __cudaRegisterFunction(void **binary, const char *host, char *device, const char *name, int limit, void *tid,
                            void *bid, void *block, void *grid, int *size) {
    int slot = slot_of(host);
    kernels[slot].host = host;
    kernels[slot].name = name;
}
static void launched(const void *host) {
    int slot = slot_of(host);
    stub_count("launch");
    stub_count(kernels[slot].name ? kernels[slot].name : "kernel without a name");
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; OK; }
static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    OK;
}
cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **values, size_t shared, cudaStream_t stream) {
    launched(host);
    OK;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **values, size_t shared,
                               cudaStream_t stream) {
    launched(kernel);
    OK;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *host, void **values) {
    launched(host);
    OK;
}
cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 grid, dim3 block, void **values, size_t shared,
                                        cudaStream_t stream) {
    launched(host);
    OK;
}
cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute attribute, int value) { OK; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value, int device) {
    OK;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *it, const void *host) {
    memset(it, 0, sizeof *it);
    it->maxThreadsPerBlock = 1024;
    it->numRegs = 32;
    it->ptxVersion = it->binaryVersion = stub_capability();
    it->maxDynamicSharedSizeBytes = 232448;
    OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *host, int block, size_t shared,
                                                                   unsigned flags) {
    *count = 2;
    OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *host, int block, size_t shared) {
    *count = 2;
    OK;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *options, void **values,
                                unsigned count, enum cudaLibraryOption *more, void **others, unsigned number) {
    *library = handle();
    OK;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) { *kernel = handle(); OK; }
cudaError_t cudaLibraryUnload(cudaLibrary_t library) { OK; }

/* torch takes the functions of the driver from here: those of driver.c, and for all others one that refuses. */
static int unsupported(void) { return 801; /* CUDA_ERROR_NOT_SUPPORTED */ }
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    static void *driver = NULL;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *function = driver ? dlsym(driver, symbol) : NULL;
    if (!*function) *function = (void *)unsupported;
    if (status) *status = cudaDriverEntryPointSuccess;
    OK;
}
