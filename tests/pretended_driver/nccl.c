/* A pretended NCCL for the threads of one process: a broadcast copies from rank 0 to the one other rank, in order.
 *
 * A rank waits in its broadcast until the other sends, or until its communicator is aborted: as a GPU's stream would.
 * Everything else succeeds and does nothing. The memory is a pretended GPU's (cuda.c), which the host can read.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char internal[128]; } Id;
typedef struct { int rank, aborted; } Comm;
typedef struct Part { struct Part *next; size_t bytes; char data[]; } Part;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Part *first, **end = &first;

int ncclGetVersion(int *version) { *version = 22907; return 0; }
const char *ncclGetErrorString(int error) { return error ? "the pretended NCCL failed" : "no error"; }
int ncclGetUniqueId(Id *id) { memset(id, 7, sizeof *id); return 0; }
int ncclCommInitRank(Comm **comm, int ranks, Id id, int rank) {
    *comm = calloc(1, sizeof **comm);
    (*comm)->rank = rank;
    return ranks != 2;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
    size_t size[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2}, bytes = count * size[type];
    int wrong = 0;
    pthread_mutex_lock(&lock);
    if (comm->rank == root) {
        Part *part = malloc(sizeof *part + bytes);
        part->next = NULL;
        part->bytes = bytes;
        memcpy(part->data, from, bytes);
        *end = part;
        end = &part->next;
        pthread_cond_broadcast(&changed);
    } else {
        while (!first && !comm->aborted) pthread_cond_wait(&changed, &lock);
        if (first && !comm->aborted) {
            Part *part = first;
            if (!(first = part->next)) end = &first;
            wrong = part->bytes != bytes; /* the two sides cut the weights at different places */
            if (!wrong) memcpy(to, part->data, bytes);
            free(part);
        }
    }
    pthread_mutex_unlock(&lock);
    return wrong;
}
int ncclCommAbort(Comm *comm) {
    pthread_mutex_lock(&lock);
    comm->aborted = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return 0;
}
#define SUCCEEDS(name) int name() { return 0; }
SUCCEEDS(ncclAllReduce) SUCCEEDS(ncclReduce) SUCCEEDS(ncclAllGather) SUCCEEDS(ncclReduceScatter) SUCCEEDS(ncclSend)
SUCCEEDS(ncclRecv) SUCCEEDS(ncclCommDestroy) SUCCEEDS(ncclCommSuspend) SUCCEEDS(ncclCommResume)
SUCCEEDS(ncclGroupStart) SUCCEEDS(ncclGroupEnd) SUCCEEDS(ncclCommWindowRegister) SUCCEEDS(ncclCommWindowDeregister)
SUCCEEDS(ncclCommQueryProperties)
