/* Yardstick in C: the all-reduce of R buffers in place, by the mean, and a pass that only touches them.
 *
 * c_probe.py compiles it with the C compiler of the machine, for vectors of 64, 32 or 16 bytes.
 * Threads are kept between passes: each has a contiguous share of every buffer, so that it finds its
 * lines in its own cache. The sums are kept in registers; the number of buffers is known to the
 * compiler for 2, 3, 4 and 8 of them.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int word_vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
enum { LINES = 2 }; /* vectors of each buffer in turn: two chains of additions */

typedef struct {
    float **buffers;
    int num_buffers, only_touches;
    size_t length;
} call;

enum { MOST_THREADS = 256 };

typedef struct {
    call current;
    int num_threads;
    atomic_int num_begun, posted, finished, is_over;
    pthread_t helpers[MOST_THREADS];
} yardstick;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static inline __attribute__((always_inline)) void
reduce(float **given, const int num_buffers, size_t first, size_t last) {
    float *buffers[num_buffers];
    memcpy(buffers, given, sizeof buffers);
    const float scale = 1.0f / num_buffers;
    for (size_t i = first; i < last; i += LINES * LANES) {
        vector sums[LINES];
        for (int k = 0; k < LINES; k++)
            sums[k] = *(vector *)(buffers[0] + i + k * LANES);
        for (int r = 1; r < num_buffers; r++)
            for (int k = 0; k < LINES; k++)
                sums[k] += *(vector *)(buffers[r] + i + k * LANES);
        for (int k = 0; k < LINES; k++)
            sums[k] *= scale;
        for (int r = 0; r < num_buffers; r++)
            for (int k = 0; k < LINES; k++)
                *(vector *)(buffers[r] + i + k * LANES) = sums[k];
    }
}

static void touch(float **buffers, int num_buffers, size_t first, size_t last) {
    int zero = 0;
    __asm__ volatile("" : "+r"(zero)); /* the compiler no longer knows it */
    for (int r = 0; r < num_buffers; r++)
        for (size_t i = first; i < last; i += LANES)
            *(word_vector *)(buffers[r] + i) += zero;
}

static void work(const call *it, int rank, int size) {
    size_t step = LINES * LANES, num_steps = it->length / step;
    size_t first = num_steps * rank / size * step, last = num_steps * (rank + 1) / size * step;
    if (it->only_touches)
        touch(it->buffers, it->num_buffers, first, last);
    else
        switch (it->num_buffers) {
        case 2: reduce(it->buffers, 2, first, last); break;
        case 3: reduce(it->buffers, 3, first, last); break;
        case 4: reduce(it->buffers, 4, first, last); break;
        case 8: reduce(it->buffers, 8, first, last); break;
        default: reduce(it->buffers, it->num_buffers, first, last);
        }
}

static void *help(void *argument) {
    yardstick *it = argument;
    int rank = 1 + atomic_fetch_add(&it->num_begun, 1);
    for (int seen = 0;;) {
        for (int spins = 0; atomic_load(&it->posted) == seen; spins++) {
            if (atomic_load(&it->is_over))
                return 0;
            pause_briefly();
            if (spins > 20000)
                sched_yield();
        }
        seen++;
        work(&it->current, rank, it->num_threads);
        atomic_fetch_add(&it->finished, 1);
    }
}

int vector_nbytes(void) { return 4 * LANES; }
size_t state_nbytes(void) { return sizeof(yardstick); }

void end(yardstick *it) {
    atomic_store(&it->is_over, 1);
    for (int k = 0; k < it->num_threads - 1; k++)
        pthread_join(it->helpers[k], 0);
}

/* Returns 0, or -1 where the threads could not be started. */
int begin(yardstick *it, int num_threads) {
    memset(it, 0, sizeof *it);
    num_threads = num_threads < MOST_THREADS ? num_threads : MOST_THREADS;
    for (it->num_threads = 1; it->num_threads < num_threads; it->num_threads++)
        if (pthread_create(&it->helpers[it->num_threads - 1], 0, help, it)) {
            end(it);
            return -1;
        }
    return 0;
}

/* ``length`` is a multiple of 64: no element is left over by the vectors. */
void run(yardstick *it, float **buffers, int num_buffers, size_t length, int only_touches, int passes) {
    for (int k = 0; k < passes; k++) {
        int expected = atomic_load(&it->finished) + it->num_threads - 1;
        it->current = (call){buffers, num_buffers, only_touches, length};
        atomic_fetch_add(&it->posted, 1);
        work(&it->current, 0, it->num_threads);
        while (atomic_load(&it->finished) != expected)
            pause_briefly();
    }
}
