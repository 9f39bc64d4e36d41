/* How a thread waits for a Mutex: between two sleeps it is Python's, for signals and for a word in the log. */

#ifndef COHELD_WAIT_H
#define COHELD_WAIT_H

/* ==== 1. What is done meanwhile ==== */

static uint64_t tell_after = 10000 * MS; /* atomic; FOREVER: never */

typedef struct {
    uint64_t begun;
    int told;
} Patience;

static Patience begin_patience(void) { return (Patience){.begun = clock_ns(CLOCK_MONOTONIC)}; }

/* Who has waited for long says so, once.  0; -1: raised. */
static int tell_of_patience(Mutex *self, Patience *p) {
    uint64_t waited = clock_ns(CLOCK_MONOTONIC) - p->begun;
    if (LIKELY(p->told || waited < LOAD(&tell_after))) return 0;
    p->told = 1;
    PyObject *seconds = PyFloat_FromDouble((double)waited / 1e9);
    int rc = seconds ? call_hook(self, "_waits_long", seconds) : -1;
    Py_XDECREF(seconds);
    return rc < 0 ? -1 : 0;
}

/* Run the handlers of signals.  0: wait on.  -1: one raised.  EALREADY: one has taken the lock, and kept it.  A child
 * that one of them forked, and that comes back, waits on its own account. */
static int run_handlers(Mutex *self, Cell *c, Waiter *w) {
    int rc = PyErr_CheckSignals();
    if (UNLIKELY(!me.tid)) {
        find_myself();
        *w = (Waiter){0};
    }
    return rc ? -1 : holds(self, c) ? EALREADY : 0;
}

/* ==== 2. The wait ==== */

/* Try, sleep, try again.  0 or EOWNERDEAD: held.  ETIMEDOUT.  -1: a signal's handler raised.  EALREADY: one has taken it,
 * begin again.  Else: the mutex is broken.
 * A woken waiter takes the GIL first and the lock then: the other way round, a thread would own the lock while it
 * queues for the GIL.  A wake that is consumed is always followed by a try, and who fails that try has met an
 * acquirer that saw it enrolled: no wake is lost by giving up.
 * stop: NULL, or a byte of whoever asked, who sets it to end the wait. */
static int mutex_wait(Mutex *self, Cell *c, uint64_t deadline, const char *stop, Record *dead) {
    Waiter w = {0};
    Patience p = begin_patience();
    int rc = 0;
    if (LOAD(&c->handoff)) {
        Py_BEGIN_ALLOW_THREADS
        rc = newcomer_stand_back(c, deadline);
        Py_END_ALLOW_THREADS
    }
    for (;;) {
        if (rc == EINTR && (rc = run_handlers(self, c, &w))) break;
        rc = cell_try(c, &w, dead);
        if (rc != EBUSY) break;
        if ((rc = tell_of_patience(self, &p)) || (rc = run_handlers(self, c, &w))) break; /* a signal that came before the sleep has not ended it */
        if (cell_tasked(c) && (rc = look_at_task(self, c, 1))) {
            if (rc < 0) break;
            if (!(word_load(c) & FUTEX_TID_MASK)) continue;
        }
        if ((stop && LOAD(stop)) || (deadline != FOREVER && clock_ns(CLOCK_MONOTONIC) >= deadline)) {
            rc = ETIMEDOUT;
            break;
        }
        Py_BEGIN_ALLOW_THREADS
        rc = waiter_sleep(c, &w, deadline);
        Py_END_ALLOW_THREADS
    }
    int owns = !rc || rc == EOWNERDEAD;
    waiter_leave(c, &w, owns);
    if (owns) STORE(&c->contended, LOAD(&c->contended) + 1);
    return rc;
}
#endif
