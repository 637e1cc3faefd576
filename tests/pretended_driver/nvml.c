/* A pretended NVIDIA driver: libnvidia-ml.so.1 that answers from the file `gpus` in its own directory.
 *
 * First line: what nvmlInit returns, driver version, CUDA version (13000 is 13.0), whether GPUs have NVLink.
 * Each further line is a GPU: MiB, compute capability (two numbers), whether MIG is on, name. Of 0 MiB: one that only
 * another job may open; of 1 MiB: one that shares the memory of the CPU.
 * The file is read again whenever a process opens NVML. A function that is not here is absent, as in an old driver.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, TOO_SMALL = 7, UNKNOWN = 999 };
enum { MOST = 64, P2P_NVLINK = 2, P2P_NOT_SUPPORTED = 5, TOPOLOGY_HOST = 30, NVLINKS = 18 };

typedef struct {
    unsigned long long mib;
    int major, minor, mig;
    char name[96];
} Gpu;
typedef const Gpu *Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory_v2;

static Gpu gpus[MOST];
static unsigned count;
static int nvlink, cuda;
static char driver[81];

static int read_table(void) {
    Dl_info here;
    char path[4096];
    int answer = UNKNOWN;
    if (!dladdr((void *)read_table, &here)) return UNKNOWN;
    char *slash = strrchr(here.dli_fname, '/');
    snprintf(path, sizeof path, "%.*s/gpus", (int)(slash - here.dli_fname), here.dli_fname);
    FILE *f = fopen(path, "r");
    if (!f) return UNKNOWN;
    if (fscanf(f, "%d %80s %d %d", &answer, driver, &cuda, &nvlink) != 4) answer = UNKNOWN;
    for (count = 0; count < MOST; count++) {
        Gpu *g = &gpus[count];
        if (fscanf(f, "%llu %d %d %d %95[^\n]", &g->mib, &g->major, &g->minor, &g->mig, g->name) != 5) break;
    }
    fclose(f);
    return answer;
}

static int copy(char *to, unsigned room, const char *text) {
    if (strlen(text) >= room) return TOO_SMALL;
    strcpy(to, text);
    return SUCCESS;
}

static int is_gpu(Device d) { return d >= gpus && d < gpus + count; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; return read_table(); }
int nvmlInit_v2(void) { return read_table(); }
int nvmlInit(void) { return read_table(); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : code == 18 ? "Driver/library version mismatch" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *to, unsigned room) { return copy(to, room, driver); }
int nvmlSystemGetNVMLVersion(char *to, unsigned room) { return copy(to, room, driver); }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = cuda; return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = cuda; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = count; return SUCCESS; }
int nvmlDeviceGetCount(unsigned *n) { *n = count; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned i, Device *d) {
    if (i >= count) return INVALID_ARGUMENT;
    if (!gpus[i].mib) return NO_PERMISSION;
    *d = gpus + i;
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device d, char *to, unsigned room) {
    char text[64];
    if (!is_gpu(d)) return INVALID_ARGUMENT;
    snprintf(text, sizeof text, "GPU-%08x-0000-0000-0000-000000000000", (unsigned)(d - gpus));
    return copy(to, room, text);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device *d) {
    unsigned i;
    if (sscanf(uuid, "GPU-%8x-", &i) != 1 || i >= count) return NOT_FOUND;
    *d = gpus + i;
    return SUCCESS;
}

int nvmlDeviceGetIndex(Device d, unsigned *i) { *i = d - gpus; return is_gpu(d) ? SUCCESS : INVALID_ARGUMENT; }
int nvmlDeviceGetName(Device d, char *to, unsigned room) { return is_gpu(d) ? copy(to, room, d->name) : INVALID_ARGUMENT; }

int nvmlDeviceGetCudaComputeCapability(Device d, int *major, int *minor) {
    if (!is_gpu(d)) return INVALID_ARGUMENT;
    *major = d->major;
    *minor = d->minor;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device d, Memory *m) {
    if (!is_gpu(d)) return INVALID_ARGUMENT;
    if (d->mib == 1) return NOT_SUPPORTED;
    m->total = m->free = d->mib << 20;
    m->used = 0;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Device d, Memory_v2 *m) {
    if (!is_gpu(d)) return INVALID_ARGUMENT;
    m->total = m->free = d->mib << 20;
    m->reserved = m->used = 0;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device d, unsigned *now, unsigned *pending) {
    if (!is_gpu(d)) return INVALID_ARGUMENT;
    if (d->major < 8) return NOT_SUPPORTED;
    *now = *pending = d->mig;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(Device d, unsigned link, unsigned *active) {
    if (!is_gpu(d)) return INVALID_ARGUMENT;
    if (!nvlink || link >= NVLINKS) return NOT_SUPPORTED;
    *active = 1;
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(Device a, Device b, int what, int *status) {
    if (!is_gpu(a) || !is_gpu(b)) return INVALID_ARGUMENT;
    *status = what == P2P_NVLINK && !nvlink ? P2P_NOT_SUPPORTED : 0;
    return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(Device a, Device b, int *level) {
    if (!is_gpu(a) || !is_gpu(b)) return INVALID_ARGUMENT;
    *level = TOPOLOGY_HOST;
    return SUCCESS;
}
