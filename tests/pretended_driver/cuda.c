/* A pretended CUDA runtime and driver: libcuda.so.1 that knows devices, streams and events, and computes nothing.
 *
 * The devices are those of the file `gpus` in its own directory (nvml.c). The library holds the functions of the real
 * libcudart, too: loaded before torch, with its symbols global, it is asked in the runtime's stead. Memory on a device
 * is never given and no kernel starts: whatever needs one fails and says so. Streams and events are always done.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, NO_KERNEL = 209, NOT_SUPPORTED = 801 };
enum { MOST = 64, VERSION = 13000 };

static struct {
    unsigned long long mib;
    int major, minor;
    char name[96];
} gpus[MOST];
static int count = -1;
static _Thread_local int current, last;
static long handles = 0x1000;

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
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaEventCreate(void **event) { *event = (void *)++handles; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)++handles; return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 0; return 0; }

/* Memory of the host, and none of a device */
int cudaHostAlloc(void **at, size_t size, unsigned flags) { return (*at = malloc(size)) ? 0 : failed(OUT_OF_MEMORY); }
int cudaFreeHost(void *at) { free(at); return 0; }
int cudaHostRegister(void *at, size_t size, unsigned flags) { return 0; }
int cudaHostUnregister(void *at) { return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *at) { memset(a, 0, sizeof *a); return 0; }
int cudaMalloc(void **at, size_t size) { *at = NULL; return failed(OUT_OF_MEMORY); }
int cudaMallocAsync(void **at, size_t size, void *stream) { *at = NULL; return failed(OUT_OF_MEMORY); }
int cudaFree(void *at) { return 0; }
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { return failed(NOT_SUPPORTED); }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { return failed(NOT_SUPPORTED); }
int cudaIpcGetMemHandle(void *handle, void *at) { return failed(NOT_SUPPORTED); }
int cudaLaunchKernel() { return failed(NO_KERNEL); }
int cudaLaunchKernelExC() { return failed(NO_KERNEL); }

/* The driver, for whoever asks it directly */
int cuInit(unsigned flags) { return counted() ? 0 : NO_DEVICE; }
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDeviceGetCount(int *n) { *n = counted(); return 0; }
int cuDeviceGet(int *device, int i) { *device = i; return i < counted() ? 0 : INVALID_DEVICE; }
int cuDeviceGetAttribute(int *value, int what, int device) { return cudaDeviceGetAttribute(value, what, device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = cudaGetErrorString(error); return 0; }
static int absent() { return NOT_SUPPORTED; }
#define ABSENT(name) int name() { return NOT_SUPPORTED; }
ABSENT(cuCtxGetCurrent) ABSENT(cuCtxSetCurrent) ABSENT(cuDevicePrimaryCtxRetain) ABSENT(cuMemAddressFree)
ABSENT(cuMemAddressReserve) ABSENT(cuMemCreate) ABSENT(cuMemGetAllocationGranularity) ABSENT(cuMemMap)
ABSENT(cuMemRelease) ABSENT(cuMemSetAccess) ABSENT(cuMemUnmap) ABSENT(cuPointerGetAttribute)
ABSENT(cuTensorMapEncodeTiled)

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
