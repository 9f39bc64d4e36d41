/* The robust mutex: a plain C lock that knows no Python, so that a small C program can drive it.
 *
 * pthread owns, we wait: ownership, recursion and the kernel's clean-up belong to one pthread_mutex_t
 * (process-shared, robust, recursive); blocking is ours, by futex on its lock word.
 *
 * The words of a cell, what they mean, and who may change them:
 *
 *   mutex word      0                    free
 *                   TID                  held by that thread
 *                   TID | WAITERS        held; the unlocker must wake one sleeper
 *                   OWNER_DIED [| W]     the owner is gone; the next trylock gets EOWNERDEAD and the lock
 *                   WAITERS              damage: as OWNER_DIED (cell_try_busy)
 *                   glibc and the kernel write it.  Ours are three changes: a waiter or the owner ORs WAITERS in,
 *                   and whoever finds the owner gone swaps TID for OWNER_DIED (cell_bury).
 *   waiters         epoch << 32 | count of enrolled waiters of that epoch; waiters add and take off themselves;
 *                   a newcomer that found nobody alive behind the count starts a new epoch with count 0.
 *   waiting_since   when the oldest wait that we know of began, ns; 0: none.  A hint: it only times the hand-off.
 *   handoff         1: somebody has waited long, newcomers let them pass.  Set by an unlocking owner, cleared by
 *                   every acquirer and by a newcomer that slept in vain.
 *   flags           RECOVERING: an owner died, __recover__ has not returned since.  REMOVED: this cell is no longer
 *                   what its name means, attach anew.  CREATED: __create__ has returned.  WARDED: a process works on
 *                   behalf of the owner, and must be gone before another's body runs.  GUARDED: somebody may be waiting
 *                   for a guard, tell them at the next release.  TASKED: a task owns.  READERS: there have been reading
 *                   calls, see _register.h.  Every change of them is one atomic
 *                   step; by the owner only, but for TASKED, which is set by the thread that holds the mutex.
 *   task words      who (process) and nonce of the owning task; the futex counts the releases by tasks.  See below.
 *   epoch           counts the releases that found GUARDED; who waits for a guard sleeps on it.  Written by the owner.
 *   version         the shared state, see _state.h.  Written by the owner.
 *   owner record    nonce, since, who (process), tid, method, depth: written by the owner only, a task or a thread.  Truth to the owner
 *                   itself (the nonce is unlike any other thread's, ever), hints to everyone else.  depth is the
 *                   last written at entry and the first cleared at exit: where it is 0 no body is running, and where who is
 *                   0 nobody's name is written.
 *   counters        written by the owner only.
 *
 * Why no sleeper is lost.  A waiter sleeps only on a word that it has seen with WAITERS set, and the kernel compares
 * again.  An unlock swaps in 0 and wakes one if the bit was set.  The bit is then gone though more may sleep: so
 * every acquirer that sees enrolled waiters, or has slept itself, ORs it back, and the next unlock wakes the next one.
 * Enrolment comes before the bit, and the acquirer read the word after the unlocker that consumed the bit, so it sees
 * them.  What remains is death: an unlocker killed between its store and its wake, or a woken waiter killed before its
 * trylock.  There the next acquirer's OR, or the end of a bounded sleep, is what wakes.  tests/models searches all of
 * this, every interleaving of it, and finds what each rule is there for.
 *
 * Why no guard is forgotten.  A guard is found false by the owner, who then reads epoch, sets GUARDED, unlocks and sleeps
 * on the epoch that it has read.  Whatever makes the guard true is done by a later owner, whose release finds GUARDED,
 * takes it down, moves epoch on, unlocks, and wakes all: each that still waits sets it again, under the lock.  So nobody is
 * counted, and who was killed or gave up costs one wake in vain.  A releaser that dies before its wake has moved epoch on,
 * or has left the word to say OWNER_DIED: both are looked at between the bounded sleeps (guard_sleep).
 *
 * A task owns without the mutex: the threads that run its loop would own it for all tasks at once.  A thread takes the
 * mutex as ever, writes the record, sets the task's nonce and TASKED, and gives the mutex back (cell_entrust): the lock is
 * held.  Whoever gets the mutex from then on and sees TASKED gives it back at once, untouched (cell_try), and sleeps on
 * task_futex.  The task needs no mutex to release (cell_end_task): it is the only one that takes TASKED off, and all else
 * that it writes comes before.  What the nonce (a multiple of 4, unlike every other of the cell) says:
 *
 *   n               owned
 *   n + 2           being released: by the one that made n into it, in one step
 *   n or n + 2, + 1 its process is gone, or in it the task: told by whoever found that out.  The next who gets the mutex
 *                   takes TASKED off, and has the lock as after every other death.
 *
 * n becomes n + 1 or n + 2, never both: a task that was thought to be gone and releases after all is no owner any more.
 * A sleeper on task_futex has read it before it saw TASKED, and a release moves it after TASKED is off, so the kernel's
 * comparison finds what came between; it enrols before it looks, and the release looks for waiters after TASKED is off.
 * One is woken, the others are moved to the lock word, where each acquirer that sees them enrolled sets the bit as ever.
 * A process that dies on the way leaves its sleepers for TASK_SLICE.
 */

#ifndef COHELD_LOCK_H
#define COHELD_LOCK_H

/* ==== 1. Includes ==== */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if !defined(__linux__) || !defined(__GLIBC__)
#error "the native mutex needs Linux and glibc"
#endif

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

/* ==== 2. Words and cells ==== */

enum {
    LAYOUT_VERSION = 1,
    CELL_SIZE = 256,
    CELL_MAGIC = 0x6c6c6543, /* "Cell" */
    LABEL_SIZE = 32,
    SPINS = 60,
    HELD_LIMIT = 2000, /* the kernel walks 2,048 robust locks of a dead thread, and forgets the others */
};

#define MS UINT64_C(1000000)
#define FOREVER UINT64_MAX
static const uint64_t HANDOFF_AGE = MS / 2;   /* a wait older than this is handed the lock */
static const uint64_t HANDOFF_SLEEP = 10 * MS; /* how long a newcomer lets others pass: more than the 5 ms for which a
                                                 woken thread may have to queue for the GIL */
static const uint64_t EXAMINE_AFTER = 200 * MS; /* the same owner for so long: is it alive? */
static const uint64_t SLICE = 1000 * MS; /* no sleep is longer; in a queue that takes longer the order is not kept */

static const uint64_t TASK_SLICE = 12 * MS; /* of a sleep behind a task: no kernel says that its process has died */

enum { RECOVERING = 1, REMOVED = 2, CREATED = 4, WARDED = 8, GUARDED = 16, TASKED = 32, READERS = 64 };
enum { TASK_GONE = 1, TASK_LEAVING = 2, TASK_STEP = 4 }; /* of the nonce */

typedef struct {
    char text[LABEL_SIZE]; /* the method's name, cut and padded with zeros */
} Label;

/* Process number and start (clock ticks since boot) in one word: 22 bits, as many as Linux gives out, and 42. */
#define PID_BITS 22
#define WHO(pid, start) ((uint64_t)(start) << PID_BITS | (pid))

typedef struct {
    uint64_t who;
    uint32_t tid;
    uint32_t depth;
    Label method;
} Record;

typedef struct {
    pthread_mutex_t mutex; /* the lock word is its first int: checked by lock_check */
    uint32_t handoff;
    uint32_t flags;
    uint64_t waiters;
    uint64_t acquisitions;
    uint64_t nonce; /* of the owning thread; an uncontended call ends with this second cache line */
    uint64_t since; /* CLOCK_MONOTONIC_COARSE, ns */
    Record owner;
    uint64_t waiting_since;
    uint64_t contended;
    uint32_t recoveries;
    uint32_t epoch;
    uint64_t task_who;
    uint64_t task_nonce;
    uint64_t task_address; /* in its process: which of the waiting tasks there it is */
    uint32_t class_number; /* of an anonymous lock: where its class stands in the header's page, see backends/classes.py */
    uint32_t task_futex;
    Record dead; /* whose work __recover__ has to look at; meant while RECOVERING is up */
    uint64_t reserved_last;
    uint64_t version;
    uint32_t magic;
    uint32_t kind; /* pthread's word for robust, shared, recursive, as lock_check read it */
} Cell;

_Static_assert(sizeof(pthread_mutex_t) == 40 && sizeof(Cell) == CELL_SIZE, "the layout of a cell is a file format");
_Static_assert(offsetof(Cell, nonce) == 64 && offsetof(Cell, waiting_since) == 128, "two cache lines for a call");

/* Who I am.  Each thread's own.  Initial-exec TLS: one load.  A forked child's only thread gets a new identity
 * (forget_parent). */
static __thread struct {
    uint64_t nonce;
    uint32_t tid;  /* 0: not asked for yet */
    uint32_t held; /* robust locks that this thread holds here */
    void *slot;    /* in the table of waiters, see _table.h; NULL: it has none (yet) */
    char known;    /* it has asked for one, and where it has none gets none */
    char keeps;    /* its next wait is of one that must have the lock, whatever comes */
    char waits;    /* for a lock: what it takes meanwhile, a signal's handler does */
} me __attribute__((tls_model("initial-exec")));

/* The process.  forks: a handle that is made between the count and the fork itself would be taken for younger than the
 * child, but there is none: who forks has the GIL, or without one all other threads stand still. */
static struct {
    uint64_t who;        /* 0: not asked for yet.  Atomic: written by the first thread that asks, with the same value by any
                            other; anew in a child, by its only thread */
    uint32_t generation; /* forks behind us: what an older generation made is not mine to hand out.  Written in a child, by
                            its only thread */
    uint32_t forks;      /* behind us and by us: what was there before the last one, a child may have too.  Atomic */
} process;

static int expected_kind; /* written by lock_check, at import, always with the same value */

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Start of a process or thread in clock ticks since boot (field 22 of its stat file), and its state, a letter; 0: cannot
 * be read. */
static uint64_t look_up(uint32_t id, char *state) {
    char path[40], text[512];
    *state = 0;
    snprintf(path, sizeof path, "/proc/%u/stat", id);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return 0;
    text[n] = 0;
    char *p = strrchr(text, ')'); /* the name before it may contain anything */
    if (p && p[1] == ' ') *state = p[2];
    for (int field = 2; p && field < 22; field++) p = strchr(p + 1, ' ');
    return p ? strtoull(p + 1, NULL, 10) : 0;
}

static uint64_t start_of(uint32_t id) {
    char state;
    return look_up(id, &state);
}

static void count_fork(void) { __atomic_fetch_add(&process.forks, 1, __ATOMIC_RELAXED); } /* before each fork */

static void forget_parent(void) {
    memset(&me, 0, sizeof me);
    process.who = 0;
    process.generation++;
}

static void __attribute__((noinline)) find_myself(void) {
    uint32_t pid = (uint32_t)getpid();
    if (!LOAD(&process.who)) STORE(&process.who, WHO(pid, start_of(pid)));
    if (getrandom(&me.nonce, sizeof me.nonce, GRND_NONBLOCK) != sizeof me.nonce)
        me.nonce = clock_ns(CLOCK_BOOTTIME) * 0x9E3779B97F4A7C15u ^ (uint64_t)(uintptr_t)&me;
    me.nonce |= 1; /* never the 0 of a fresh cell */
    me.tid = (uint32_t)syscall(SYS_gettid);
}

static inline int *word_of(Cell *c) { return &c->mutex.__data.__lock; }

static inline uint32_t word_load(Cell *c) { return (uint32_t)__atomic_load_n(word_of(c), __ATOMIC_ACQUIRE); }

static int word_swap(Cell *c, uint32_t old, uint32_t new) {
    int expected = (int)old;
    return __atomic_compare_exchange_n(word_of(c), &expected, (int)new, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

/* Sleep while *word is value, until the CLOCK_MONOTONIC time, at most.  0, ETIMEDOUT, EINTR or EAGAIN. */
static int futex_sleep(void *word, uint32_t value, uint64_t until) {
    struct timespec t = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    long rc = syscall(SYS_futex, word, FUTEX_WAIT_BITSET, value, &t, NULL, FUTEX_BITSET_MATCH_ANY);
    return rc ? errno : 0;
}

static void futex_wake(void *word, int count) { syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0); }

/* Make the mutex of a cell that nobody else can see yet (zeroed memory). */
static int cell_init(Cell *c) {
    pthread_mutexattr_t a;
    int rc = pthread_mutexattr_init(&a);
    if (!rc) rc = pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
    if (!rc) rc = pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    if (!rc) rc = pthread_mutexattr_settype(&a, PTHREAD_MUTEX_RECURSIVE);
    if (!rc) rc = pthread_mutex_init(&c->mutex, &a);
    c->kind = (uint32_t)c->mutex.__data.__kind;
    c->magic = CELL_MAGIC;
    return rc;
}

/* Is this what cell_init made?  Memory from a file that somebody else wrote must not reach pthread unchecked. */
static int cell_sane(Cell *c) {
    return c->magic == CELL_MAGIC && c->kind == (uint32_t)expected_kind && c->mutex.__data.__kind == expected_kind;
}

/* Does this libc's mutex work as section 2 assumes?  Once, at import, on a scratch mutex. */
static int lock_check(void) {
    Cell c = {0};
    if (cell_init(&c)) return 0;
    expected_kind = c.mutex.__data.__kind;
    uint32_t tid = (uint32_t)syscall(SYS_gettid);
    int ok = !pthread_mutex_trylock(&c.mutex) && word_load(&c) == tid;
    ok = ok && !pthread_mutex_trylock(&c.mutex) && !pthread_mutex_unlock(&c.mutex) && word_load(&c) == tid;
    __atomic_fetch_or(word_of(&c), (int)FUTEX_WAITERS, __ATOMIC_SEQ_CST);
    ok = ok && !pthread_mutex_unlock(&c.mutex) && word_load(&c) == 0;
    __atomic_store_n(word_of(&c), FUTEX_OWNER_DIED, __ATOMIC_SEQ_CST);
    ok = ok && pthread_mutex_trylock(&c.mutex) == EOWNERDEAD && !pthread_mutex_consistent(&c.mutex);
    return ok && word_load(&c) == tid && !pthread_mutex_unlock(&c.mutex) && word_load(&c) == 0;
}

/* Put OWNER_DIED where a dead owner's TID stands that the kernel did not mark.  Fails, harmlessly, if the word
 * has changed; between the finding and the swap the same TID could only come back by a whole round of the
 * system's thread numbers. */
static void cell_bury(Cell *c, uint32_t word) {
    if (word_swap(c, word, (word & FUTEX_WAITERS) | FUTEX_OWNER_DIED)) futex_wake(word_of(c), 1);
}

/* Do I hold it?  My TID alone is no proof: numbers are reused, and some deaths leave the word as it was. */
static inline int cell_mine(Cell *c) {
    uint32_t word = word_load(c);
    if (LIKELY((word & FUTEX_TID_MASK) != me.tid)) return 0;
    if (LIKELY(LOAD(&c->nonce) == me.nonce)) return 1;
    cell_bury(c, word); /* an earlier thread of my number: nobody but me can have it, and I do not hold it */
    return 0;
}

static inline void flags_up(Cell *c, uint32_t bits) { __atomic_fetch_or(&c->flags, bits, __ATOMIC_SEQ_CST); }
static inline void flags_down(Cell *c, uint32_t bits) { __atomic_fetch_and(&c->flags, ~bits, __ATOMIC_SEQ_CST); }
static inline int cell_tasked(Cell *c) { return UNLIKELY(__atomic_load_n(&c->flags, __ATOMIC_SEQ_CST) & TASKED) != 0; }

static inline uint32_t cell_waiting(Cell *c) { return (uint32_t)__atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST); }

/* What a dead owner left.  The marks come in this order so that a death at any point of it is found again: the
 * word says OWNER_DIED until pthread knows, then says my TID, and my death marks it once more; the record of the
 * dead is copied before mine overwrites it, and only if no earlier death is still to be recovered: it is that one's
 * work that is half done. */
static void cell_inherit(Cell *c, Record *dead) {
    STORE(&c->owner.depth, 0);
    *dead = c->owner;
    if (!(LOAD(&c->flags) & RECOVERING)) c->dead = c->owner;
    flags_up(c, RECOVERING);
    STORE(&c->recoveries, LOAD(&c->recoveries) + 1);
    flags_down(c, TASKED);
}

static void __attribute__((noinline)) cell_end_handoff(Cell *c) {
    __atomic_store_n(&c->handoff, 0, __ATOMIC_SEQ_CST);
    futex_wake(&c->handoff, INT_MAX);
}

/* One wait, from the first failed try to the lock or to giving up. */
typedef struct {
    uint64_t epoch;
    uint64_t seen_at;    /* since when the owner was the one of seen_word and seen_nonce */
    uint64_t seen_nonce;
    uint64_t boot_ticks; /* seen_at on the clock of start_of */
    uint32_t seen_tid;
    int enrolled;
    int slept;
    int examined;
} Waiter;

/* May others sleep behind the bit that the last unlock consumed?  If somebody else is enrolled; and always for one that
 * has slept itself: a waiter that a new epoch has forgotten may have been on its way to sleep just then. */
static inline int cell_crowded(Cell *c, const Waiter *w) {
    uint64_t waiters = __atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST);
    uint32_t myself = w && w->enrolled && waiters >> 32 == w->epoch;
    return (uint32_t)waiters > myself || (w && w->slept);
}

/* The mutex is mine; its last owner has died, or a task owns the lock.  EOWNERDEAD: I inherit it.  0: it is the task's, and
 * the mutex is given back: who died had that for a moment only. */
static int __attribute__((noinline)) cell_enter_after(Cell *c, int rc, Record *dead) {
    if (rc) pthread_mutex_consistent(&c->mutex);
    if (cell_tasked(c) && !(LOAD(&c->task_nonce) & TASK_GONE)) {
        pthread_mutex_unlock(&c->mutex);
        return 0;
    }
    cell_inherit(c, dead);
    return EOWNERDEAD;
}

/* WAITERS alone is neither free nor anybody's: neither we nor glibc nor the kernel ever leave it, but a damaged file may,
 * and pthread would find it taken for ever.  It is as if its owner had died. */
static int __attribute__((noinline)) cell_try_busy(Cell *c) {
    if (word_load(c) != FUTEX_WAITERS) return EBUSY;
    cell_bury(c, FUTEX_WAITERS);
    return pthread_mutex_trylock(&c->mutex);
}

/* One try; never blocks.  w: my wait; NULL: I do not wait.  0: held now; EOWNERDEAD: held now, and dead is who had it;
 * EBUSY; else the mutex is broken. */
static inline int cell_try(Cell *c, const Waiter *w, Record *dead) {
    int rc = pthread_mutex_trylock(&c->mutex);
    if (UNLIKELY(rc == EBUSY)) rc = cell_try_busy(c);
    if (UNLIKELY(rc && rc != EOWNERDEAD)) return rc;
    if (UNLIKELY(cell_crowded(c, w))) __atomic_fetch_or(word_of(c), (int)FUTEX_WAITERS, __ATOMIC_SEQ_CST);
    if (UNLIKELY(rc || cell_tasked(c)) && !(rc = cell_enter_after(c, rc, dead))) return EBUSY;
    if (UNLIKELY(__atomic_load_n(&c->handoff, __ATOMIC_RELAXED))) cell_end_handoff(c);
    return rc;
}

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() __asm__ __volatile__("" ::: "memory")
#endif

/* A newcomer that found it taken looks again for about a microsecond: a short call is over by then, and a sleep costs two
 * system calls and a turn of the scheduler.  It stops where somebody sleeps or is to have the lock: nobody is passed over
 * for longer than by one who comes at that moment.  As cell_try. */
static int cell_spin(Cell *c, Record *dead) {
    for (int look = 0; look < SPINS; look++) {
        uint32_t word = word_load(c);
        if (word & FUTEX_WAITERS || __atomic_load_n(&c->handoff, __ATOMIC_RELAXED) || cell_tasked(c)) break;
        int rc = word & FUTEX_TID_MASK ? EBUSY : cell_try(c, NULL, dead);
        if (rc != EBUSY) return rc;
        RELAX();
    }
    return EBUSY;
}

/* The calling thread takes a lock in the middle of a wait for another, and can give it back though that goes on.  So as long
 * as the handler runs that does it, it does not wait: its number in the table moves on, before the owner record says that
 * it has the lock. */
static void __attribute__((noinline)) wait_pauses(void) {
    uint64_t *number = me.slot;
    if (number && *number & 1) __atomic_store_n(number, *number + 1, __ATOMIC_SEQ_CST);
}

/* Write the owner record; depth last. */
static inline void cell_begin(Cell *c, const Label *method) {
    if (UNLIKELY(me.waits)) wait_pauses();
    STORE(&c->nonce, me.nonce);
    STORE(&c->owner.who, LOAD(&process.who));
    STORE(&c->owner.tid, me.tid);
    STORE(&c->since, clock_ns(CLOCK_MONOTONIC_COARSE));
    c->owner.method = *method;
    STORE(&c->acquisitions, LOAD(&c->acquisitions) + 1);
    __atomic_store_n(&c->owner.depth, 1, __ATOMIC_RELEASE);
    me.held++;
}

static void __attribute__((noinline)) cell_offer(Cell *c) {
    uint64_t since = LOAD(&c->waiting_since), now = clock_ns(CLOCK_MONOTONIC);
    if (!since)
        STORE(&c->waiting_since, now); /* counted, but killed or overtaken before it wrote this: its wait begins here */
    else if (now - since > HANDOFF_AGE)
        __atomic_store_n(&c->handoff, 1, __ATOMIC_SEQ_CST);
}

/* One level more, and one less, of a lock that is mine. */
static inline int cell_again(Cell *c) {
    int rc = pthread_mutex_trylock(&c->mutex);
    if (!rc) STORE(&c->owner.depth, LOAD(&c->owner.depth) + 1);
    return rc;
}

static inline void cell_back(Cell *c) {
    STORE(&c->owner.depth, LOAD(&c->owner.depth) - 1);
    pthread_mutex_unlock(&c->mutex);
}

/* Somebody may wait for a guard: from here on, what it has read of epoch is old. */
static void __attribute__((noinline)) cell_tell(Cell *c) {
    flags_down(c, GUARDED);
    __atomic_store_n(&c->epoch, LOAD(&c->epoch) + 1, __ATOMIC_SEQ_CST);
}

/* Give the outermost level back, and tell no guard. */
static inline void cell_end_quietly(Cell *c) {
    if (UNLIKELY(cell_waiting(c))) cell_offer(c);
    __atomic_store_n(&c->owner.depth, 0, __ATOMIC_RELEASE);
    STORE(&c->owner.who, 0); /* a death before the next owner has written its name must not be blamed on me */
    me.held--;
    pthread_mutex_unlock(&c->mutex);
}

static inline void cell_end(Cell *c) {
    int guarded = UNLIKELY(LOAD(&c->flags) & GUARDED) != 0;
    if (UNLIKELY(guarded)) cell_tell(c);
    cell_end_quietly(c);
    if (UNLIKELY(guarded)) futex_wake(&c->epoch, INT_MAX);
}

/* The thread that holds it has taken it for a task, whose loop runs in thread tid.  The task's nonce. */
static uint64_t cell_entrust(Cell *c, uint32_t tid, const void *task) {
    uint64_t nonce = LOAD(&c->acquisitions) * TASK_STEP;
    STORE(&c->owner.tid, tid);
    STORE(&c->task_address, (uint64_t)(uintptr_t)task);
    STORE(&c->task_who, LOAD(&process.who));
    __atomic_store_n(&c->task_nonce, nonce, __ATOMIC_RELEASE);
    flags_up(c, TASKED);
    me.held--;
    pthread_mutex_unlock(&c->mutex);
    return nonce;
}

static int nonce_swap(Cell *c, uint64_t old, uint64_t new) {
    return __atomic_compare_exchange_n(&c->task_nonce, &old, new, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

static void wake_behind_task(Cell *c) {
    __atomic_fetch_add(&c->task_futex, 1, __ATOMIC_SEQ_CST);
    if (!cell_waiting(c)) return;
    long woken = syscall(SYS_futex, &c->task_futex, FUTEX_REQUEUE, 1, (void *)INT_MAX, word_of(c), 0);
    if (woken <= 0) futex_wake(word_of(c), 1);
}

/* A task gives its last level back; told: whoever waits for a guard.  0: it is not the owner (any more). */
static int cell_end_task(Cell *c, uint64_t nonce, int tell) {
    if (!nonce_swap(c, nonce, nonce | TASK_LEAVING)) return 0;
    int guarded = tell && LOAD(&c->flags) & GUARDED;
    if (guarded) cell_tell(c);
    if (cell_waiting(c)) cell_offer(c);
    STORE(&c->owner.depth, 0);
    STORE(&c->owner.who, 0);
    flags_down(c, TASKED);
    wake_behind_task(c);
    if (guarded) futex_wake(&c->epoch, INT_MAX);
    return 1;
}

/* Say that the task of that nonce is gone, unless somebody else owns by now. */
static void cell_bury_task(Cell *c, uint64_t nonce) {
    if (!(nonce & TASK_GONE) && nonce_swap(c, nonce, nonce | TASK_GONE)) wake_behind_task(c);
}

/* Give one level back. */
static inline void cell_release(Cell *c) {
    if (LOAD(&c->owner.depth) > 1)
        cell_back(c);
    else
        cell_end(c);
}

/* Count me among the waiters of this epoch, if I am not: a new epoch has forgotten everyone. */
static void waiter_enrol(Cell *c, Waiter *w, uint64_t now) {
    uint64_t old = __atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST);
    do {
        if (w->enrolled && old >> 32 == w->epoch) return;
        w->epoch = old >> 32;
    } while (!__atomic_compare_exchange_n(&c->waiters, &old, old + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    w->enrolled = 1;
    if ((uint32_t)old == 0) STORE(&c->waiting_since, now);
}

/* Leave, with the lock (owns) or without it. The others' wait is young again where I got it: without that, calls
 * that overlap without a gap would keep the first wait's age for ever, and hand every call over in turn. */
static void waiter_leave(Cell *c, Waiter *w, int owns) {
    if (!w->enrolled) return;
    w->enrolled = 0;
    uint64_t old = __atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST);
    do {
        if (old >> 32 != w->epoch || !(uint32_t)old) return;
    } while (!__atomic_compare_exchange_n(&c->waiters, &old, old - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    if (owns) STORE(&c->waiting_since, (uint32_t)old == 1 ? 0 : clock_ns(CLOCK_MONOTONIC));
}

/* The thread that the word names: is it gone, or younger than my sight of it?  (start_of counts in ticks of the
 * boot clock; one tick of doubt counts as alive.)  A zombie is gone, though nobody has waited for it, as its own parent
 * may be the one who waits here: the kernel has walked its list before it became one, and not found this lock. */
static int owner_gone(const Waiter *w) {
    if (syscall(SYS_tkill, w->seen_tid, 0) && errno == ESRCH) return 1;
    char state;
    uint64_t start = look_up(w->seen_tid, &state);
    return state == 'Z' || state == 'X' || start > w->boot_ticks + 1;
}

/* Has the process ended?  That of a zombie has, though nobody has waited for it. */
static int process_gone(uint64_t who) {
    uint32_t pid = (uint32_t)(who & ((1u << PID_BITS) - 1));
    char state;
    if (!pid || (kill((pid_t)pid, 0) && errno == ESRCH)) return 1;
    uint64_t start = look_up(pid, &state);
    return state == 'Z' || state == 'X' || (start && start != who >> PID_BITS);
}

/* Has the process of the owning task ended?  Then it is said. */
static int task_orphaned(Cell *c) {
    uint64_t nonce = __atomic_load_n(&c->task_nonce, __ATOMIC_ACQUIRE);
    if (nonce & TASK_GONE) return 1;
    if (!process_gone(LOAD(&c->task_who))) return 0;
    cell_bury_task(c, nonce);
    return 1;
}

static void waiter_look(Cell *c, Waiter *w, uint32_t word, uint64_t now) {
    uint32_t tid = word & FUTEX_TID_MASK;
    uint64_t nonce = LOAD(&c->nonce);
    if (tid != w->seen_tid || nonce != w->seen_nonce) {
        w->seen_tid = tid;
        w->seen_nonce = nonce;
        w->seen_at = now;
        w->boot_ticks = clock_ns(CLOCK_BOOTTIME) / (1000000000u / (uint64_t)sysconf(_SC_CLK_TCK));
        w->examined = 0;
    } else if (now - w->seen_at >= EXAMINE_AFTER) {
        w->examined = 1;
        if (owner_gone(w)) cell_bury(c, word);
    }
}

static int sleep_behind_task(Cell *c, Waiter *w, uint32_t releases, uint64_t now, uint64_t deadline) {
    uint64_t until = now + TASK_SLICE;
    int rc = futex_sleep(&c->task_futex, releases, until < deadline ? until : deadline);
    if (rc != EAGAIN) w->slept = 1;
    return rc == EINTR ? EINTR : 0;
}

/* One bounded sleep of an enrolled waiter, without the GIL; the caller tries again whatever comes back.
 * 0, or EINTR: a signal is there, run its handlers. */
static int waiter_sleep(Cell *c, Waiter *w, uint64_t deadline) {
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    waiter_enrol(c, w, now);
    uint32_t releases = __atomic_load_n(&c->task_futex, __ATOMIC_SEQ_CST);
    if (cell_tasked(c)) return sleep_behind_task(c, w, releases, now, deadline);
    uint32_t word = word_load(c);
    if (!(word & FUTEX_TID_MASK)) return 0; /* free, or its owner died: try */
    waiter_look(c, w, word, now);
    if (!(word & FUTEX_WAITERS) && !word_swap(c, word, word | FUTEX_WAITERS)) return 0;
    int alone = cell_waiting(c) <= 1; /* who is not, loses its place among the sleepers when its sleep ends */
    uint64_t until = now + (alone && !w->examined ? EXAMINE_AFTER : SLICE);
    if (until > deadline) until = deadline;
    int rc = futex_sleep(word_of(c), word | FUTEX_WAITERS, until);
    if (rc != EAGAIN) w->slept = 1;
    return rc == EINTR ? EINTR : 0;
}

/* One bounded sleep of one that waits for a guard, who does not hold the lock.  1: look again; ETIMEDOUT: slept; EINTR. */
static int guard_sleep(Cell *c, Waiter *w, uint32_t epoch, uint64_t deadline) {
    uint64_t now = clock_ns(CLOCK_MONOTONIC), until = now + EXAMINE_AFTER;
    uint32_t word = word_load(c);
    if (__atomic_load_n(&c->epoch, __ATOMIC_SEQ_CST) != epoch || word & FUTEX_OWNER_DIED) return 1;
    if (!(LOAD(&c->flags) & GUARDED)) return 1; /* told a moment ago; or not the cell that the epoch was read from */
    if (word & FUTEX_TID_MASK) waiter_look(c, w, word, now);
    if (cell_tasked(c) && task_orphaned(c)) return 1;
    int rc = futex_sleep(&c->epoch, epoch, until < deadline ? until : deadline);
    return rc == EINTR || rc == ETIMEDOUT ? rc : 1;
}

/* All that sleep look again. */
static void wake_all(Cell *c) {
    futex_wake(word_of(c), INT_MAX);
    futex_wake(&c->task_futex, INT_MAX);
    futex_wake(&c->handoff, INT_MAX);
}

/* A newcomer lets those pass who have waited long.  If nobody took the lock in that time, whoever was counted is
 * dead or stopped: forget them (the live ones enrol again when woken, and all are woken now). */
static int newcomer_stand_back(Cell *c, uint64_t deadline) {
    uint64_t until = clock_ns(CLOCK_MONOTONIC) + HANDOFF_SLEEP;
    int capped = until > deadline;
    int rc = futex_sleep(&c->handoff, 1, capped ? deadline : until);
    uint32_t one = 1;
    if (rc != ETIMEDOUT || capped) return rc == EINTR ? EINTR : 0;
    if (!__atomic_compare_exchange_n(&c->handoff, &one, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return 0;
    uint64_t old = __atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST);
    uint64_t new = ((old >> 32) + 1) << 32;
    __atomic_compare_exchange_n(&c->waiters, &old, new, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    wake_all(c);
    return 0;
}
#endif
