/* A pretended CUDA driver, runtime and cuBLAS: libcuda.so.1 that knows devices, streams and events, computes nothing.
 *
 * The devices are those of the file `gpus` in its own directory (nvml.c). The functions of libcudart and libcublas are
 * those that torch and vLLM import: loaded before them, with its symbols global, this library is asked instead. Streams
 * and events are always done. Without PRETENDED_MEMORY in the environment a device gives no memory and runs no kernel:
 * both are errors. With it memory is the host's, mapped when written; copies are made, kernels return at once, so that
 * results are zeros.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, NO_KERNEL = 209, NOT_SUPPORTED = 801 };
enum { MOST = 64, VERSION = 13000, PAGE = 4096 };
static const size_t SPACE = 1ul << 46;

static struct {
    unsigned long long mib;
    int major, minor;
    char name[96];
} gpus[MOST];
static int count = -1;
static _Thread_local int current, last;
static long handles = 0x1000;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int counted(void) {
    Dl_info here;
    char path[4096], line[256];
    if (count >= 0) return count;
    count = 0;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int most = MOST;
    if (visible) {
        most = *visible ? 1 : 0;
        for (; *visible; visible++) most += *visible == ',';
    }
    dladdr((void *)counted, &here);
    char *slash = strrchr(here.dli_fname, '/');
    snprintf(path, sizeof path, "%.*s/gpus", (int)(slash - here.dli_fname), here.dli_fname);
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    if (fgets(line, sizeof line, f))
        while (count < most && count < MOST && fgets(line, sizeof line, f)) {
            int read = sscanf(line, "%llu %d %d %*d %95[^\n]", &gpus[count].mib, &gpus[count].major,
                              &gpus[count].minor, gpus[count].name);
            if (read == 4) count++;
        }
    fclose(f);
    return count;
}

static int failed(int error) { return last = error; }

/* Devices */
int cudaGetDeviceCount(int *n) { return (*n = counted()) ? 0 : failed(NO_DEVICE); }
int cudaGetDevice(int *device) { *device = current; return counted() ? 0 : failed(NO_DEVICE); }
int cudaSetDevice(int device) {
    if (device < 0 || device >= counted()) return failed(INVALID_DEVICE);
    current = device;
    return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device < 0 || device >= counted()) return failed(INVALID_DEVICE);
    memset(p, 0, sizeof *p);
    strcpy(p->name, gpus[device].name);
    memcpy(p->uuid.bytes, &device, sizeof device);
    p->totalGlobalMem = gpus[device].mib << 20;
    p->major = gpus[device].major;
    p->minor = gpus[device].minor;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    return 0;
}
int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
    struct cudaDeviceProp p;
    int error = cudaGetDeviceProperties(&p, device);
    *value = what == cudaDevAttrComputeCapabilityMajor       ? p.major
             : what == cudaDevAttrComputeCapabilityMinor     ? p.minor
             : what == cudaDevAttrMultiProcessorCount        ? p.multiProcessorCount
             : what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (int)p.sharedMemPerBlockOptin
                                                             : 0;
    return error;
}
int cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = counted() ? gpus[current].mib << 20 : 0;
    return counted() ? 0 : failed(NO_DEVICE);
}
int cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = a != b; return 0; }
int cudaDeviceEnablePeerAccess(int device, unsigned flags) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = VERSION; return 0; }

/* Errors */
int cudaGetLastError(void) { int error = last; last = 0; return error; }
int cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(int error) { return error ? "cudaErrorPretended" : "cudaSuccess"; }
const char *cudaGetErrorString(int error) {
    return error == 0               ? "no error"
           : error == OUT_OF_MEMORY ? "a pretended GPU gives no memory"
           : error == NO_KERNEL     ? "a pretended GPU runs no kernel"
           : error == NO_DEVICE     ? "no CUDA-capable device is detected"
                                    : "a pretended GPU cannot do this";
}

/* Streams and events */
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)++handles; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = (void *)++handles; return 0; }
int cudaStreamCreate(void **stream) { *stream = (void *)++handles; return 0; }
int cudaStreamDestroy(void *stream) { return 0; }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
static int capturing; /* one graph at a time */
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
    *status = capturing;
    if (id) *id = 1;
    return 0;
}
int cudaStreamBeginCapture(void *stream, int mode) { return capturing++; }
int cudaStreamEndCapture(void *stream, void **graph) { *graph = (void *)++handles; return --capturing; }
int cudaGraphInstantiateWithFlags(void **exec) { *exec = (void *)++handles; return 0; }
int cudaGraphGetNodes(void *graph, void *nodes, size_t *n) { *n = 1; return 0; }
int cudaGraphLaunch(void *exec, void *stream) { return 0; }
int cudaGraphDestroy(void *graph) { return 0; }
int cudaGraphExecDestroy(void *exec) { return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaEventCreate(void **event) { *event = (void *)++handles; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)++handles; return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 0; return 0; }

/* Memory */
static int works(void) {
    static int answer = -1;
    return answer < 0 ? answer = getenv("PRETENDED_MEMORY") != NULL : answer;
}
static int launch(void) { return works() ? 0 : failed(NO_KERNEL); }
static int copy(void *to, const void *from, size_t n) {
    if (!works()) return failed(NOT_SUPPORTED);
    memmove(to, from, n);
    return 0;
}
static int fill(void *at, int value, size_t n) {
    if (!works()) return failed(NOT_SUPPORTED);
    memset(at, value, n);
    return 0;
}
static char *memory, *unused; /* of all devices; no address is given twice */
static int on_device(const void *at) { return memory && (char *)at >= memory && (char *)at < unused; }
int cudaMalloc(void **at, size_t size) {
    *at = NULL;
    if (!works()) return failed(OUT_OF_MEMORY);
    pthread_mutex_lock(&lock);
    if (!memory)
        memory = unused = mmap(NULL, SPACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    *(size_t *)unused = size = (size + 2 * PAGE - 1) / PAGE * PAGE; /* in a page of its own */
    *at = unused + PAGE;
    unused += size;
    pthread_mutex_unlock(&lock);
    return 0;
}
int cudaFree(void *at) {
    char *start = (char *)at - PAGE;
    return at ? madvise(start, *(size_t *)start, MADV_DONTNEED) : 0;
}
int cudaMallocAsync(void **at, size_t size, void *stream) { return cudaMalloc(at, size); }
int cudaHostAlloc(void **at, size_t size, unsigned flags) { return (*at = malloc(size)) ? 0 : failed(OUT_OF_MEMORY); }
int cudaFreeHost(void *at) { free(at); return 0; }
int cudaHostRegister(void *at, size_t size, unsigned flags) { return 0; }
int cudaHostUnregister(void *at) { return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *at) {
    memset(a, 0, sizeof *a);
    if (on_device(at)) {
        a->type = cudaMemoryTypeDevice;
        a->device = current;
        a->devicePointer = (void *)at;
    }
    return 0;
}
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { return copy(to, from, n); }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { return copy(to, from, n); }
int cudaMemset(void *at, int value, size_t n) { return fill(at, value, n); }
int cudaMemsetAsync(void *at, int value, size_t n, void *stream) { return fill(at, value, n); }
/* what one process shares with itself */
int cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *at) { memcpy(handle, &at, sizeof at); return 0; }
int cudaIpcOpenMemHandle(void **at, cudaIpcMemHandle_t handle, unsigned flags) { memcpy(at, &handle, sizeof *at); return 0; }
int cudaIpcCloseMemHandle(void *at) { return 0; }
int cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, void *event) { memcpy(handle, &event, sizeof event); return 0; }
int cudaIpcOpenEventHandle(void **event, cudaIpcEventHandle_t handle) { memcpy(event, &handle, sizeof *event); return 0; }
int cudaGetSymbolAddress(void **at, const void *symbol) { return (*at = calloc(1, 4096)) ? 0 : failed(OUT_OF_MEMORY); }
int cudaMemcpyToSymbol() { return launch(); }

/* Kernels */
int cudaLaunchKernel() { return launch(); }
int __cudaLaunchKernel() { return launch(); }
int cudaLaunchKernelExC() { return launch(); }
int cudaLaunchCooperativeKernel() { return launch(); }
int cudaFuncSetAttribute() { return 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *a) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->ptxVersion = a->binaryVersion = 90;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 8; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { *n = 8; return 0; }

/* cuBLAS */
#define LAUNCHES(name) int name() { return launch() ? 13 : 0; }
#define SUCCEEDS(name) int name() { return 0; }
#define GIVES_A_HANDLE(name) int name(void **handle) { *handle = (void *)++handles; return 0; }
LAUNCHES(cublasGemmEx) LAUNCHES(cublasGemmStridedBatchedEx) LAUNCHES(cublasSgemm_v2) LAUNCHES(cublasSgemmStridedBatched)
LAUNCHES(cublasLtMatmul)
GIVES_A_HANDLE(cublasCreate_v2) GIVES_A_HANDLE(cublasLtMatmulDescCreate)
GIVES_A_HANDLE(cublasLtMatmulPreferenceCreate) GIVES_A_HANDLE(cublasLtMatrixLayoutCreate)
SUCCEEDS(cublasDestroy_v2) SUCCEEDS(cublasSetStream_v2) SUCCEEDS(cublasSetWorkspace_v2) SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2) SUCCEEDS(cublasLtMatmulDescDestroy) SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy) SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy) SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(
    void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, void *results, int *found) {
    *found = 1;
    return 0;
}

/* The driver, for Triton and vLLM's allocator of sleep mode */
int cuInit(unsigned flags) { return counted() ? 0 : NO_DEVICE; }
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDeviceGetCount(int *n) { *n = counted(); return 0; }
int cuDeviceGet(int *device, int i) { *device = i; return i < counted() ? 0 : INVALID_DEVICE; }
int cuDeviceGetAttribute(int *value, int what, int device) { return cudaDeviceGetAttribute(value, what, device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = cudaGetErrorString(error); return 0; }
int cuCtxGetLimit(size_t *limit) { *limit = 0; return 0; }
int cuCtxGetDevice(int *device) { return cudaGetDevice(device); }
int cuFuncGetAttribute(int *value, int what) { *value = what ? 0 : 1024; return 0; } /* 0: threads of a block */
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 8; return 0; }
int cuPointerGetAttribute(void **value, int what, void *at) {
    if (!on_device(at)) return 1;
    if (what == 3) *value = at; /* as the device sees it */
    else *(unsigned *)value = what == 2 ? 2 : 0; /* type: of a device */
    return 0;
}
GIVES_A_HANDLE(cuCtxGetCurrent) GIVES_A_HANDLE(cuDevicePrimaryCtxRetain) GIVES_A_HANDLE(cuModuleLoad)
GIVES_A_HANDLE(cuModuleLoadData) GIVES_A_HANDLE(cuModuleGetFunction) GIVES_A_HANDLE(cuMemCreate)
SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuCtxSetLimit) SUCCEEDS(cuFuncSetAttribute) SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload) SUCCEEDS(cuMemRelease) SUCCEEDS(cuMemSetAccess)
SUCCEEDS(cuTensorMapEncodeTiled)
int cuLaunchKernel() { return launch(); }
int cuLaunchKernelEx() { return launch(); }
int cuMemGetAllocationGranularity(size_t *n) { *n = 2 << 20; return 0; }
int cuMemAddressReserve(void **at, size_t n) { return cudaMalloc(at, n); }
int cuMemAddressFree(void *at, size_t n) { return cudaFree(at); }
/* what is unmapped is lost, and whoever touches it ends the process */
int cuMemMap(void *at, size_t n) { return mprotect(at, n, PROT_READ | PROT_WRITE); }
int cuMemUnmap(void *at, size_t n) { return madvise(at, n, MADV_DONTNEED) || mprotect(at, n, PROT_NONE); }

static int absent() { return NOT_SUPPORTED; }
static void *entry(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    return found ? found : (void *)absent;
}
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    *function = entry(name);
    if (status) *status = 0;
    return 0;
}
int cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
    return cuGetProcAddress_v2(name, function, version, flags, status);
}
