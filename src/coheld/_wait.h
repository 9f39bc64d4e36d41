/* How a thread waits for a Mutex: between two sleeps it is Python's, for signals and for a word in the log. */

#ifndef COHELD_WAIT_H
#define COHELD_WAIT_H

/* ==== 1. What others are told ==== */


/* The calling thread waits from now on, and says so in the table.  0; -1: raised. */
static int wait_begins(Mutex *self, uint32_t kind, const Label *method, Outer *outer) {
    *outer = (Outer){0};
    if (UNLIKELY(!me.known) && introduce_myself(self)) return -1; /* a handler has forked: this is the child */
    if (!me.slot) return 0;
    Slot wait = {.inode = self->segment->area.inode, .offset = self->offset, .kind = kind, .method = *method};
    wait.since = clock_ns(CLOCK_MONOTONIC);
    wait_publish(&wait, outer);
    return 0;
}

/* enlist(memory, offset): the slot there is the calling thread's; its process keeps the memory for ever.  enlist(): this
 * thread has none, and is shown to nobody. */
static PyObject *native_enlist(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer memory = {0};
    Py_ssize_t offset = 0;
    if (!PyArg_ParseTuple(args, "|w*n:enlist", &memory, &offset)) return NULL;
    int fits = offset >= 0 && offset % (Py_ssize_t)sizeof(Slot) == 0 && offset <= memory.len - (Py_ssize_t)sizeof(Slot);
    if (UNLIKELY(!me.tid)) find_myself();
    me.slot = memory.buf && fits ? (char *)memory.buf + offset : NULL;
    me.known = 1;
    if (memory.buf) PyBuffer_Release(&memory);
    Py_RETURN_NONE;
}

/* delist(memory, offset): that slot is the calling thread's no longer, if it was; it is shown to nobody from then on. */
static PyObject *native_delist(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer memory;
    Py_ssize_t offset;
    if (!PyArg_ParseTuple(args, "w*n:delist", &memory, &offset)) return NULL;
    if (me.slot && me.slot == (void *)((char *)memory.buf + offset)) {
        me.slot = NULL;
    }
    PyBuffer_Release(&memory);
    Py_RETURN_NONE;
}

/* ==== 2. What is done meanwhile ==== */

static uint64_t tell_after = 10000 * MS; /* atomic; FOREVER: never */

typedef struct {
    uint64_t begun;
    uint64_t next; /* when it is to be looked at again why the wait lasts; FOREVER: never */
    int searches;  /* for a cycle of waits that it is part of */
    int told;
} Patience;

/* quiet: who waits in another's stead, which says it itself. */
static Patience begin_patience(int quiet, int searches) {
    uint64_t now = clock_ns(CLOCK_MONOTONIC), first = quiet ? FOREVER : LOAD(&tell_after);
    if (searches && first > EXAMINE_AFTER) first = EXAMINE_AFTER;
    return (Patience){.begun = now, .next = first == FOREVER ? FOREVER : now + first, .searches = searches};
}

/* Who has waited for long says so, once, and looks whether the wait can end at all.  0; -1: raised. */
static int look_why(Mutex *self, Patience *p) {
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    if (LIKELY(now < p->next)) return 0;
    PyObject *next = PyObject_CallMethod((PyObject *)self, "_waits_on", "dii", (double)(now - p->begun) / 1e9,
                                         p->told, p->searches);
    double seconds = next ? PyFloat_AsDouble(next) : -1.0;
    Py_XDECREF(next);
    if (seconds == -1.0 && PyErr_Occurred()) return -1;
    p->told |= now - p->begun >= LOAD(&tell_after);
    p->next = seconds < 9e9 ? p->begun + (uint64_t)(seconds * 1e9) : FOREVER;
    return 0;
}

/* Run the handlers of signals.  0: wait on.  -1: one raised.  EALREADY: one has taken the lock, and kept it.  A child
 * that one of them forked, and that comes back, waits on its own account. */
static int run_handlers(Mutex *self, Cell *c, Waiter *w, Outer *outer) {
    int rc = PyErr_CheckSignals();
    wait_goes_on(outer);
    if (UNLIKELY(!me.tid)) {
        find_myself();
        *w = (Waiter){0};
    }
    return rc ? -1 : holds(self, c) ? EALREADY : 0;
}

/* ==== 3. The wait ==== */

/* May the calling thread be part of a cycle of waits?  It holds something, or runs a task that may. */
static int may_be_waited_for(Mutex *self) {
    State *state = me.held ? NULL : state_of((PyObject *)self);
    PyObject *task = state ? current_task(state) : NULL;
    Py_XDECREF(task);
    return me.held || task;
}

/* Try, sleep, try again.  0 or EOWNERDEAD: held.  ETIMEDOUT.  -1: raised.  EALREADY: a signal's handler has taken it,
 * begin again.  Else: the mutex is broken.
 * A woken waiter takes the GIL first and the lock then: the other way round, a thread would own the lock while it
 * queues for the GIL.  A wake that is consumed is always followed by a try, and who fails that try has met an
 * acquirer that saw it enrolled: no wake is lost by giving up.
 * nap: who cannot be part of a cycle does not get up for the search, as that costs its place among the sleepers. */
static int wait_for_lock(Mutex *self, Cell *c, uint64_t deadline, const char *stop, Patience *p, Outer *outer, Waiter *w,
                         Record *dead) {
    int nap = p->searches && may_be_waited_for(self), rc = 0;
    if (LOAD(&c->handoff)) {
        Py_BEGIN_ALLOW_THREADS
        rc = newcomer_stand_back(c, deadline);
        Py_END_ALLOW_THREADS
    }
    for (;;) {
        if (rc == EINTR && (rc = run_handlers(self, c, w, outer))) return rc;
        rc = cell_try(c, w, dead);
        if (rc != EBUSY) return rc;
        if ((rc = look_why(self, p)) || (rc = run_handlers(self, c, w, outer))) return rc; /* no signal before the sleep ends that */
        if (cell_tasked(c) && (rc = look_at_task(self, c, 1))) {
            if (rc < 0) return rc;
            if (!(word_load(c) & FUTEX_TID_MASK)) continue;
        }
        if ((stop && LOAD(stop)) || (deadline != FOREVER && clock_ns(CLOCK_MONOTONIC) >= deadline)) return ETIMEDOUT;
        uint64_t until = nap && p->next < deadline ? p->next : deadline;
        Py_BEGIN_ALLOW_THREADS
        rc = waiter_sleep(c, w, until);
        Py_END_ALLOW_THREADS
    }
}

/* The same, and what goes with it.  stop: NULL, or a byte of whoever asked, who sets it to end the wait; it is not the calling
 * thread's own then. */
static int mutex_wait(Mutex *self, Cell *c, uint64_t deadline, const char *stop, const Label *method, Record *dead) {
    Waiter w = {0};
    Outer outer;
    char keeps = me.keeps, waits = me.waits;
    me.keeps = 0; /* an inner wait, of a handler, is another one */
    uint32_t kind = FOR_LOCK | (deadline == FOREVER ? 0 : TIMED) | (keeps ? KEEPS : 0);
    Patience p = begin_patience(stop != NULL, !stop && kind == FOR_LOCK);
    int rc = wait_begins(self, kind, method, &outer);
    me.waits = 1;
    if (!rc) rc = wait_for_lock(self, c, deadline, stop, &p, &outer, &w, dead);
    me.waits = waits;
    wait_withdraw(&outer);
    int owns = !rc || rc == EOWNERDEAD;
    waiter_leave(c, &w, owns);
    if (owns) STORE(&c->contended, LOAD(&c->contended) + 1);
    return rc;
}
#endif
