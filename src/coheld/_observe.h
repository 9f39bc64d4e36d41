/* What observing.py hears of a Mutex: who has taken its first level, and who has given the last one back. */

#ifndef COHELD_OBSERVE_H
#define COHELD_OBSERVE_H

/* ==== 1. By the owner, and by who was it ==== */

static int observed; /* atomic: somebody is to be told */

/* The caller, thread or task, owns its first level.  0; -1: raised, and it is still held. */
static int tell_taken(Mutex *self, PyObject *obj, double waited, int once) {
    self->told = 1; /* first: what one observer has heard of, all may hear the end of */
    PyObject *done = PyObject_CallMethod((PyObject *)self, "_tell_taken", "OdO", obj ? obj : Py_None, waited,
                                         once ? Py_True : Py_False);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* The same, after an acquire that has come to rc and began at that time; 0: it did not wait.  One that has waited in vain is
 * told, too.  As mutex_acquire. */
static int __attribute__((noinline)) tell_if_first(Mutex *self, PyObject *obj, int rc, uint64_t begun, int once) {
    if (!rc && !once && call_hook(self, "_tell_timed_out", NULL) < 0) return -1;
    if (rc <= 0 || LOAD(&cell_of(self)->owner.depth) > 1) return rc;
    rc = tell_taken(self, obj, begun ? (double)(clock_ns(CLOCK_MONOTONIC) - begun) / 1e9 : 0.0, once);
    if (!rc && holds(self, cell_of(self))) return 1;
    if (!rc) return call_hook(self, "_not_owner", NULL); /* an observer has forked, and this is the child */
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    mutex_release(self);
    restore_before(type, error, trace);
    return -1;
}

/* The caller has given the last level back, which has come to rc; an exception that is there already stays.  0; -2: raised. */
static int __attribute__((noinline)) tell_given(Mutex *self, int rc) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (call_hook(self, "_tell_given", NULL) < 0) rc = -2;
    restore_before(type, error, trace);
    return rc;
}

/* The end of mutex_release, of what was told.  After the release, self->told is the next owner's. */
static int __attribute__((noinline)) release_and_tell(Mutex *self, Cell *c, int rc) {
    int last = LOAD(&c->owner.depth) == 1;
    cell_release(c);
    return last ? tell_given(self, rc) : rc;
}

/* ==== 2. An acquire that is heard of ==== */

/* As mutex_acquire, and nothing is told yet.  begun: when it found that it had to wait; 0: it had not.  A try first, as
 * every acquire begins with one; but not past those who have waited for long. */
static int __attribute__((noinline)) acquire_timed(Mutex *self, PyObject *obj, const Label *method, uint64_t timeout,
                                                   uint64_t *begun) {
    Cell *c = cell_of(self);
    int later = timeout && c && LOAD(&c->handoff) && !holds(self, c);
    int rc = later ? 0 : mutex_acquire_or_stop(self, obj, method, 0, NULL, 0);
    *begun = 0;
    if (rc || !timeout) return rc;
    *begun = clock_ns(CLOCK_MONOTONIC);
    return mutex_acquire_or_stop(self, obj, method, timeout, NULL, 0);
}

static int __attribute__((noinline)) acquire_and_tell(Mutex *self, PyObject *obj, const Label *method, uint64_t timeout) {
    uint64_t begun;
    int rc = acquire_timed(self, obj, method, timeout, &begun);
    return tell_if_first(self, obj, rc, begun, !timeout);
}

/* 1: held.  0: not within the time.  -1: raised, not held.  obj: whose __recover__ may run; NULL: nobody's. */
static inline int mutex_acquire(Mutex *self, PyObject *obj, const Label *method, uint64_t timeout) {
    if (UNLIKELY(LOAD(&observed))) return acquire_and_tell(self, obj, method, timeout);
    return mutex_acquire_or_stop(self, obj, method, timeout, NULL, 0);
}

/* _observe(obj, waited): the running task owns it by way of a thread that has waited in its stead. */
static PyObject *mutex_observe(Mutex *self, PyObject *args) {
    PyObject *obj;
    double waited;
    if (!PyArg_ParseTuple(args, "Od:_observe", &obj, &waited)) return NULL;
    return tell_taken(self, obj, waited, 0) ? NULL : Py_NewRef(Py_None);
}

/* observe(on): from now on observers are told, or not. */
static PyObject *native_observe(PyObject *Py_UNUSED(module), PyObject *on) {
    int truth = PyObject_IsTrue(on);
    if (truth < 0) return NULL;
    STORE(&observed, truth);
    Py_RETURN_NONE;
}
#endif
