/* SemaphoreBase: acquire, release and with of a semaphore whose permits are counted in shared memory.
 *
 * Two locks: the mutex, held for moments by who takes or gives a permit; and the gate, held by the one that waits for a
 * permit.  Who finds none free, or the gate taken, goes through the gate: so one waits and the others queue behind it, as
 * they do for every lock, in its order and with its hand-off, whoever dies.  The one in the gate has looked under the
 * mutex, and has set GUARDED: the next release moves the epoch on and wakes it (see _lock.h, guards).  No release tells of
 * a process that has died with permits: the one in the gate looks for those itself, in bounded sleeps.
 * try-once looks at the permits alone, and passes those who wait.  A task tries for the mutex at once, or a thread that
 * waits for it makes the attempt in its stead: see lookout.py.
 *
 * A permit is in the record of its process (_register.h) or free; both change under the mutex.
 */

#ifndef COHELD_PERMITS_H
#define COHELD_PERMITS_H

/* ==== 1. Under the mutex ==== */

typedef struct {
    PyObject_HEAD
    Mutex *mutex; /* this and the next, as given by Python: once; NULL: of another backend, or __init__ has not run */
    Mutex *gate;
} Semaphore;

static const uint64_t MOMENTS = 100 * MS; /* who tries once waits so long for the mutex: its owner may be off the processor */

/* Give the mutex back.  told: a permit is free. */
static void permits_leave(Cell *c, int told) {
    if (UNLIKELY(!still_mine(c))) return; /* a hook has forked, and this is the child */
    if (UNLIKELY(LOAD(&c->owner.depth) > 1)) cell_back(c); /* in a signal's handler, which came in a hook */
    else if (told) cell_end(c);
    else cell_end_quietly(c);
}

/* How long who waits for a permit until that time waits for the mutex. */
static uint64_t moments_until(uint64_t deadline) {
    uint64_t now = deadline == FOREVER ? 0 : clock_ns(CLOCK_MONOTONIC);
    return deadline == FOREVER ? FOREVER : deadline > now + MOMENTS ? deadline - now : MOMENTS;
}

/* Take the mutex, for a moment.  1; 0: not within that time, which is about a microsecond at least; -1: raised. */
static int permits_enter(Semaphore *s, uint64_t wait) {
    Cell *taken = wait ? NULL : cell_of(s->mutex);
    for (int look = 0; taken && look < SPINS && word_load(taken) & FUTEX_TID_MASK; look++) RELAX();
    int rc = mutex_acquire_or_stop(s->mutex, NULL, &no_label, wait, NULL, 0);
    if (rc <= 0) return rc;
    Cell *c = cell_of(s->mutex);
    if (UNLIKELY(!s->mutex->readers)) {
        int opened = call_hook(s, "_open_register", NULL) >= 0;
        if (opened && !still_mine(c)) opened = call_hook(s->mutex, "_not_owner", NULL) >= 0; /* it has forked: the child */
        if (!opened) {
            permits_leave(c, 0);
            return -1;
        }
    }
    if (UNLIKELY(LOAD(&c->flags) & RECOVERING)) {
        register_recount(s->mutex->readers);
        flags_down(c, RECOVERING);
    }
    return 1;
}

/* A permit for this process, if one is free.  1; 0: none; -1: raised.  The record comes first: a signal's handler that
 * runs while the file grows may take the last permit. */
static int permit_grab(Semaphore *s) {
    Register *r = s->mutex->readers;
    Entrant *e = entrant_of(s->mutex, cell_of(s->mutex), r);
    if (UNLIKELY(!e)) return -1;
    if (UNLIKELY(!r->table->free)) register_reap(r);
    if (!r->table->free) return 0;
    r->table->free--;
    STORE(&e->count, LOAD(&e->count) + 1);
    return 1;
}

/* Take a permit.  1; 0: none is free; EBUSY: the mutex was not to be had within that time; -1: raised.  epoch: of the
 * mutex, which the next release moves on; or NULL. */
static int permit_try(Semaphore *s, uint64_t wait, uint32_t *epoch) {
    int rc = permits_enter(s, wait);
    if (rc <= 0) return rc ? rc : EBUSY;
    rc = permit_grab(s);
    Cell *c = cell_of(s->mutex);
    if (!rc && epoch) {
        *epoch = LOAD(&c->epoch);
        flags_up(c, GUARDED);
    }
    permits_leave(c, 0);
    return rc;
}

/* The short way, where the mutex is free and has no duties, and this process has its record: nothing of Python runs until
 * it is given back, so no owner's name is written down, and no level counted.  The cell; NULL: go the long way. */
static inline Cell *permits_slip_in(const Semaphore *s) {
    Mutex *m = s->mutex;
    Cell *c = cell_of(m);
    Record dead;
    if (UNLIKELY(!c || !me.tid || !m->readers || !register_mine(m->readers))) return NULL;
    uint64_t check = LOAD(&m->next_check);
    if (check != FOREVER && clock_ns(CLOCK_MONOTONIC_COARSE) >= check) return NULL;
    if (UNLIKELY(LOAD(&c->handoff)) || (word_load(c) & FUTEX_TID_MASK) == me.tid) return NULL;
    int rc = cell_try(c, NULL, &dead);
    if (UNLIKELY(rc && rc != EOWNERDEAD)) return NULL;
    if (LIKELY(!(LOAD(&c->flags) & (RECOVERING | REMOVED | WARDED)))) return c;
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

static inline void permits_slip_out(Cell *c, int told) {
    int guarded = told && UNLIKELY(LOAD(&c->flags) & GUARDED) != 0;
    if (guarded) cell_tell(c);
    if (UNLIKELY(cell_waiting(c))) cell_offer(c);
    pthread_mutex_unlock(&c->mutex);
    if (guarded) futex_wake(&c->epoch, INT_MAX);
}

/* 1: taken.  0: go the long way. */
static inline int permit_take_quickly(const Semaphore *s) {
    Cell *c = permits_slip_in(s);
    if (UNLIKELY(!c)) return 0;
    Register *r = s->mutex->readers;
    Entrant *e = register_mine(r);
    int free = r->table->free > 0;
    if (LIKELY(free)) {
        r->table->free--;
        STORE(&e->count, LOAD(&e->count) + 1);
    }
    permits_slip_out(c, 0);
    return free;
}

/* 1: given back.  0: go the long way. */
static inline int permits_give_quickly(const Semaphore *s, uint32_t count) {
    Cell *c = permits_slip_in(s);
    if (UNLIKELY(!c)) return 0;
    Register *r = s->mutex->readers;
    Entrant *e = register_mine(r);
    uint32_t held = LOAD(&e->count);
    int enough = held >= count;
    if (LIKELY(enough)) {
        STORE(&e->count, held - count);
        r->table->free += count;
    }
    permits_slip_out(c, enough);
    return enough;
}

/* ==== 2. Wait ==== */

/* In the gate: a permit by the deadline.  1; 0; -1: raised. */
static int permit_await(Semaphore *s, uint64_t deadline, Patience *p) {
    Waiter w = {0};
    uint32_t epoch = 0;
    for (;;) {
        int rc = permit_try(s, moments_until(deadline), &epoch);
        uint64_t now = clock_ns(CLOCK_MONOTONIC), until = now + TASK_SLICE;
        if (rc == EBUSY) return 0;
        if (rc || now >= deadline) return rc;
        Cell *c = cell_of(s->mutex);
        Py_BEGIN_ALLOW_THREADS
        guard_sleep(c, &w, epoch, until < deadline ? until : deadline);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() || look_why(s->mutex, p)) return -1;
        if (UNLIKELY(!me.tid)) find_myself();
    }
}

static int permit_wait(Semaphore *s, uint64_t timeout, uint64_t deadline) {
    Patience p = begin_patience(0, 0); /* here: in the queue for the gate nothing is said, see base.py */
    int rc = mutex_acquire_or_stop(s->gate, NULL, &no_label, timeout, NULL, 0);
    if (rc <= 0) return rc;
    Outer outer;
    rc = wait_begins(s->mutex, FOR_PERMIT | (timeout == FOREVER ? 0 : TIMED), &no_label, &outer);
    if (!rc) rc = permit_await(s, deadline, &p);
    wait_withdraw(&outer);
    Cell *c = cell_of(s->gate);
    if (still_mine(c)) cell_release(c); /* else a signal's handler has forked, and this is the child */
    return rc;
}

/* Does nobody wait? */
static inline int gate_idle(Semaphore *s) {
    Cell *c = cell_of(s->gate);
    return c && !word_load(c) && !cell_tasked(c) && !s->gate->queued;
}

/* Its permits are another backend's. */
static int take_permit_by_name(Semaphore *s, uint64_t timeout) {
    PyObject *seconds = PyFloat_FromDouble(timeout == FOREVER ? Py_HUGE_VAL : (double)timeout / 1e9);
    int rc = seconds ? call_hook(s, "_take", seconds) : -1;
    Py_XDECREF(seconds);
    return rc;
}

static int give_permits_by_name(Semaphore *s, uint32_t count) {
    PyObject *number = PyLong_FromUnsignedLong(count);
    int rc = number ? call_hook(s, "_give", number) : -1;
    Py_XDECREF(number);
    return rc < 0 ? -1 : 0;
}

/* 1: taken.  0: not within the time.  -1: raised. */
static int semaphore_take(Semaphore *s, uint64_t timeout) {
    if (UNLIKELY(!s->mutex)) return take_permit_by_name(s, timeout);
    int straight = !timeout || gate_idle(s);
    if (LIKELY(straight && permit_take_quickly(s))) return 1;
    uint64_t deadline = timeout && timeout != FOREVER ? clock_ns(CLOCK_MONOTONIC) + timeout : timeout;
    if (straight) {
        int rc = permit_try(s, moments_until(deadline), NULL);
        if (rc == EBUSY) rc = 0;
        if (LIKELY(rc || !timeout)) return rc;
    }
    return permit_wait(s, timeout, deadline);
}

/* 1: given back.  0: the mutex was not to be had within that time.  -1: raised.  Nothing has changed then. */
static int semaphore_give_within(Semaphore *s, uint32_t count, uint64_t wait) {
    if (LIKELY(permits_give_quickly(s, count))) return 1;
    int rc = permits_enter(s, wait);
    if (rc <= 0) return rc;
    Register *r = s->mutex->readers;
    if (!register_mine(r) && register_find(r) < register_used(r)) register_claim(r);
    Entrant *e = register_mine(r);
    uint32_t held = e ? LOAD(&e->count) : 0;
    if (UNLIKELY(held < count)) {
        permits_leave(cell_of(s->mutex), 0);
        PyObject *counts = Py_BuildValue("II", held, count);
        if (counts) call_hook(s, "_not_held", counts);
        Py_XDECREF(counts);
        return -1;
    }
    STORE(&e->count, held - count);
    r->table->free += count;
    permits_leave(cell_of(s->mutex), 1);
    return 1;
}

/* 0; -1: raised, and nothing has changed. */
static inline int semaphore_give(Semaphore *s, uint32_t count) {
    if (UNLIKELY(!s->mutex)) return give_permits_by_name(s, count);
    return semaphore_give_within(s, count, FOREVER) < 0 ? -1 : 0;
}

/* ==== 3. The type ==== */

static PyObject *semaphore_acquire(Semaphore *self, PyObject *args, PyObject *kwargs) {
    uint64_t timeout;
    int rc = parse_acquire(args, kwargs, &timeout) ? -1 : semaphore_take(self, timeout);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

static PyObject *semaphore_release(Semaphore *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"n", NULL};
    Py_ssize_t count = 1;
    int given = PyTuple_GET_SIZE(args) || kwargs;
    if (UNLIKELY(given) && !PyArg_ParseTupleAndKeywords(args, kwargs, "|n:release", names, &count)) return NULL;
    if (count < 1) return PyErr_Format(PyExc_ValueError, "n must be one or more, not %zd", count);
    uint32_t many = count > INT_MAX ? INT_MAX : (uint32_t)count;
    return semaphore_give(self, many) ? NULL : Py_NewRef(Py_None);
}

static PyObject *semaphore_enter(Semaphore *self, PyObject *Py_UNUSED(ignored)) {
    return semaphore_take(self, FOREVER) < 0 ? NULL : Py_NewRef((PyObject *)self);
}

static PyObject *semaphore_exit(Semaphore *self, PyObject *Py_UNUSED(args)) {
    return semaphore_give(self, 1) ? NULL : Py_NewRef(Py_None);
}

/* _open(): its register is mapped from here on. */
static PyObject *semaphore_open(Semaphore *self, PyObject *Py_UNUSED(ignored)) {
    if (permits_enter(self, FOREVER) < 0) return NULL;
    permits_leave(cell_of(self->mutex), 0);
    Py_RETURN_NONE;
}

/* _try() -> None: a permit is taken; the epoch that the next release moves on: none was free; False: another has the
 * mutex.  Never waits. */
static PyObject *semaphore_try(Semaphore *self, PyObject *Py_UNUSED(ignored)) {
    uint32_t epoch = 0;
    int rc = permit_try(self, 0, &epoch);
    if (rc == EBUSY) Py_RETURN_FALSE;
    return rc < 0 ? NULL : rc ? Py_NewRef(Py_None) : PyLong_FromUnsignedLong(epoch);
}

/* _give_at_once() -> given: one permit; False: another has the mutex.  Never waits. */
static PyObject *semaphore_give_at_once(Semaphore *self, PyObject *Py_UNUSED(ignored)) {
    int rc = semaphore_give_within(self, 1, 0);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

static PyObject *semaphore_idle(Semaphore *self, PyObject *Py_UNUSED(ignored)) {
    return PyBool_FromLong(self->gate && gate_idle(self));
}

/* _bind(mutex, gate): once, before anybody else has it; never: another backend has its permits. */
static PyObject *semaphore_bind(Semaphore *self, PyObject *args) {
    State *state = state_of((PyObject *)self);
    PyObject *mutex, *gate;
    if (!state || !PyArg_ParseTuple(args, "O!O!:_bind", state->mutex_base, &mutex, state->mutex_base, &gate)) return NULL;
    Py_XSETREF(self->mutex, (Mutex *)Py_NewRef(mutex));
    Py_XSETREF(self->gate, (Mutex *)Py_NewRef(gate));
    Py_RETURN_NONE;
}

static void semaphore_dealloc(Semaphore *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->mutex);
    Py_XDECREF(self->gate);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef semaphore_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))semaphore_acquire, METH_VARARGS | METH_KEYWORDS,
     "acquire(blocking=True, timeout=None)\n--\n\n"
     "Take a permit; True if this process has one more now, False if none was to be had.\n\n"
     "Blocks the calling thread for at most timeout seconds (None: for ever; zero or less: tries once), on the\n"
     "monotonic clock; with blocking=False it tries once and timeout is not looked at. Those who wait have their turn.\n"
     "A signal's handler runs at once; if it raises, no permit was taken."},
    {"release", (PyCFunction)(void (*)(void))semaphore_release, METH_VARARGS | METH_KEYWORDS,
     "release(n=1)\n--\n\n"
     "Give n of this process's permits back; any thread or task of it may. Never waits for another's work.\n\n"
     "Raises PermitError, a ValueError, if this process holds fewer; nothing has changed then."},
    {"__enter__", (PyCFunction)semaphore_enter, METH_NOARGS, "Take a permit; blocks until there is one."},
    {"__exit__", (PyCFunction)semaphore_exit, METH_VARARGS, "Give it back."},
    {"_open", (PyCFunction)semaphore_open, METH_NOARGS, "_open(): its register is mapped from here on."},
    {"_try", (PyCFunction)semaphore_try, METH_NOARGS, "_try() -> None: taken; the epoch: none is free; False: busy."},
    {"_give_at_once", (PyCFunction)semaphore_give_at_once, METH_NOARGS, "_give_at_once() -> given; False: busy."},
    {"_idle", (PyCFunction)semaphore_idle, METH_NOARGS, "_idle(): does nobody wait?"},
    {"_bind", (PyCFunction)semaphore_bind, METH_VARARGS, "_bind(mutex, gate): its locks."},
    {NULL},
};

static PyType_Slot semaphore_slots[] = {
    {Py_tp_doc, "acquire, release and with of Semaphore."},
    {Py_tp_dealloc, semaphore_dealloc},
    {Py_tp_methods, semaphore_methods},
    {0},
};

static PyType_Spec semaphore_spec = {"coheld._native.SemaphoreBase", sizeof(Semaphore), 0,
                                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, semaphore_slots};
#endif
