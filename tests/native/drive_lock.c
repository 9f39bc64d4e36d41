/* Drives the plain C lock of _lock.h without Python: threads (for a race detector) or processes of which some die.
 *
 *     drive_lock threads N ROUNDS     N threads, ROUNDS times each: take, count, give back
 *     drive_lock deaths N ROUNDS      the same with N processes; every seventh round its process dies as the owner
 *     drive_lock unlocked N ROUNDS    N threads that do not take it: what a race detector must complain of
 *
 * With -DVALGRIND its detectors are told which words are atomic by design: valgrind cannot tell a C11 atomic from a plain
 * load or store, as ThreadSanitizer can, which therefore has the last word on them.  All others, which only the owner
 * may touch, they check.
 *
 * Ends with 0 if every call was counted and none overlapped, and prints what it counted.
 */
#include "_lock.h"

#include <sys/wait.h>

#ifdef VALGRIND
#include <valgrind/drd.h>
#include <valgrind/helgrind.h>
#define ATOMIC(var)                                           \
    do {                                                      \
        VALGRIND_HG_DISABLE_CHECKING(&(var), sizeof(var));    \
        DRD_IGNORE_VAR(var);                                  \
    } while (0)
#else
#define ATOMIC(var) ((void)(var))
#endif

typedef struct {
    Cell cell;
    long inside; /* plain on purpose: the lock is what protects them */
    long count;
    long overlaps;
} Shared;

static Shared *shared;
static long rounds;

/* As mutex_wait of _native.c, without the GIL. */
static int take(Cell *c) {
    static const Label label = {"drive"};
    Record dead;
    if (!me.tid) find_myself();
    int rc = LOAD(&c->handoff) ? EBUSY : cell_try(c, NULL, &dead);
    Waiter w = {0};
    if (rc == EBUSY && LOAD(&c->handoff)) newcomer_stand_back(c, FOREVER);
    while (rc == EBUSY) {
        rc = cell_try(c, &w, &dead);
        if (rc == EBUSY) waiter_sleep(c, &w, FOREVER);
    }
    waiter_leave(c, &w, 1);
    cell_begin(c, &label);
    return rc;
}

static void body(void) {
    if (shared->inside) shared->overlaps++;
    shared->inside = 1;
    shared->count++;
    shared->inside = 0;
}

static void *work(void *unused) {
    for (long i = 0; i < rounds; i++) {
        take(&shared->cell);
        if (i % 3 == 0 && !cell_again(&shared->cell)) cell_back(&shared->cell);
        body();
        cell_release(&shared->cell);
    }
    return unused;
}

static void *work_unlocked(void *unused) {
    for (long i = 0; i < rounds; i++) body();
    return unused;
}

static int run_threads(int n, void *(*worker)(void *)) {
    pthread_t threads[64];
    for (int i = 0; i < n; i++)
        if (pthread_create(&threads[i], NULL, worker, NULL)) return 2;
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
    return shared->count != n * rounds;
}

static void one_life(void) { /* up to seven calls, the last of which is not given back */
    for (int i = 0; i < 7; i++) {
        take(&shared->cell);
        body();
        if (i < 6) cell_release(&shared->cell);
    }
    _exit(0);
}

static int run_deaths(int n) {
    long lives = rounds / 7 * n;
    for (long started = 0; started < lives;) {
        int now = lives - started < n ? (int)(lives - started) : n;
        for (int i = 0; i < now; i++) {
            pid_t pid = fork();
            if (pid < 0) return 2;
            if (!pid) one_life();
        }
        for (int i = 0; i < now; i++) wait(NULL);
        started += now;
    }
    int rc = take(&shared->cell);
    cell_release(&shared->cell);
    return rc != EOWNERDEAD || shared->count != lives * 7 || (long)shared->cell.recoveries != lives;
}

static int run(const char *mode, int n) {
    if (!strcmp(mode, "deaths")) return run_deaths(n);
    return run_threads(n, strcmp(mode, "unlocked") ? work : work_unlocked);
}

static void tell_detectors(Cell *c) {
    ATOMIC(c->mutex.__data.__lock); /* the word that we look at, and sleep on */
    ATOMIC(c->handoff);
    ATOMIC(c->waiters);
    ATOMIC(c->waiting_since);
    ATOMIC(c->nonce); /* a waiter looks whether the owner has changed */
    ATOMIC(process.who);
}

int main(int argc, char **argv) {
    int n = argc > 2 ? atoi(argv[2]) : 0;
    if (argc != 4 || n < 1 || n > 64) return 2;
    rounds = atol(argv[3]);
    pthread_atfork(count_fork, NULL, forget_parent);
    if (!lock_check()) return 3;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || cell_init(&shared->cell) || !cell_sane(&shared->cell)) return 3;
    tell_detectors(&shared->cell);
    int rc = run(argv[1], n);
    printf("%ld calls, %ld overlaps, %llu recoveries\n", shared->count, shared->overlaps,
           (unsigned long long)shared->cell.recoveries);
    return rc || shared->overlaps;
}
