/* What shared state and guards need of a Mutex, for Python; the part of _native.c that is off every fast path. */

#ifndef COHELD_SHARED_H
#define COHELD_SHARED_H

/* ==== 1. State ==== */

/* _mine(): does the calling thread hold it? */
static PyObject *mutex_mine(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    return PyBool_FromLong(c && holds(self, c));
}

/* _commit(): the owner's changes so far become the last commit. */
static PyObject *mutex_py_commit(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    return mutex_commit(self) ? NULL : Py_NewRef(Py_None);
}

/* _discard(): the owner's changes since the last commit are dropped. */
static PyObject *mutex_py_discard(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    if (self->pending) mutex_discard(self);
    Py_RETURN_NONE;
}

static PyObject *mutex_get_version(Mutex *self, void *Py_UNUSED(closure)) {
    Cell *c = cell_of(self);
    if (!c) return not_attached();
    return PyLong_FromUnsignedLongLong(__atomic_load_n(&c->version, __ATOMIC_ACQUIRE));
}

static PyObject *mutex_get_pending(Mutex *self, void *Py_UNUSED(closure)) { return PyBool_FromLong(self->pending != NULL); }

static PyObject *mutex_get_view(Mutex *self, void *Py_UNUSED(closure)) {
    View *view = __atomic_load_n(&self->view, __ATOMIC_ACQUIRE);
    return Py_NewRef(view ? (PyObject *)view : Py_None);
}

/* _adopt(view, former) -> bool: for this cell, the view from now on, if that is still the former one; False: begin again.
 * The first comer's becomes it.  After that the owner alone changes it: under his hands it must not become that of another
 * class, in which his changes are not; who only reads another class's fields does so by that one's view itself.
 * Readers may be in the former one, which stays: the views of a lock refer to each other. */
static PyObject *mutex_adopt(Mutex *self, PyObject *args) {
    State *state = state_of((PyObject *)self);
    PyObject *view, *former;
    int fits = 0;
    if (!state || !PyArg_ParseTuple(args, "O!O:_adopt", state->view_type, &view, &former)) return NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    View *old = self->view;
    fits = ((View *)view)->cell == self->cell && (old ? (PyObject *)old : Py_None) == former;
    if (fits && (!old || holds(self, self->cell))) {
        __atomic_store_n(&self->view, (View *)Py_NewRef(view), __ATOMIC_RELEASE);
        Py_XDECREF(old);
    }
    Py_END_CRITICAL_SECTION();
    return PyBool_FromLong(fits);
}

/* _put(index, value, mark): the owner's value of a field of its view. */
static PyObject *mutex_put(Mutex *self, PyObject *args) {
    Py_ssize_t i;
    PyObject *value;
    unsigned char mark;
    if (!PyArg_ParseTuple(args, "nOb:_put", &i, &value, &mark)) return NULL;
    if (!self->view || i < 0 || i >= self->view->count || !holds(self, self->view->cell)) {
        PyErr_SetString(PyExc_RuntimeError, "no such field, or not the owner");
        return NULL;
    }
    if (view_assign(self->view, i, value)) return NULL;
    self->view->marks[i] = mark;
    self->pending = self->view;
    Py_RETURN_NONE;
}

/* ==== 2. Guards ==== */

/* _suspend(loud) -> epoch: the owner gives all levels back, and is told of the next release; loud: this is one. */
static PyObject *mutex_suspend(Mutex *self, PyObject *loud) {
    Cell *c = self->cell;
    int tell = PyObject_IsTrue(loud) && LOAD(&c->flags) & GUARDED;
    if (!holds(self, c)) {
        call_hook(self, "_not_owner", NULL);
        return NULL;
    }
    if (tell) cell_tell(c);
    uint32_t epoch = LOAD(&c->epoch);
    flags_up(c, GUARDED);
    int told = self->told;
    if (!still_mine(c)) {
        STORE(&self->step_thread, 0);
        cell_end_task(c, LOAD(&self->task_nonce), 0);
    } else {
        while (LOAD(&c->owner.depth) > 1) cell_back(c);
        cell_end_quietly(c);
    }
    if (tell) futex_wake(&c->epoch, INT_MAX);
    if (UNLIKELY(told) && tell_given(self, 0)) return NULL;
    return PyLong_FromUnsignedLong(epoch);
}

static uint64_t deadline_of(double seconds) { return seconds < 9e9 ? (uint64_t)(seconds > 0 ? seconds * 1e9 : 0) : FOREVER; }

/* _sleep(epoch, until, method, timed) -> news: there was a release or a death since; False: time.monotonic() says until.
 * timed: the wait has a deadline. */
static PyObject *mutex_sleep(Mutex *self, PyObject *args) {
    unsigned epoch;
    double seconds;
    const char *text;
    Py_ssize_t size;
    int timed;
    if (!PyArg_ParseTuple(args, "Ids#p:_sleep", &epoch, &seconds, &text, &size, &timed)) return NULL;
    uint64_t until = deadline_of(seconds);
    Label method = label_of(text, size);
    Waiter w = {0};
    Outer outer;
    int rc = wait_begins(self, FOR_GUARD | (timed ? TIMED : 0), &method, &outer);
    while (rc >= 0 && rc != 1 && clock_ns(CLOCK_MONOTONIC) < until) {
        if (PyErr_CheckSignals()) {
            rc = -1;
            break;
        }
        Py_BEGIN_ALLOW_THREADS
        rc = guard_sleep(self->cell, &w, epoch, until);
        Py_END_ALLOW_THREADS
    }
    wait_withdraw(&outer);
    return rc < 0 ? NULL : PyBool_FromLong(rc == 1);
}

/* _resume(obj, method, levels, deadline, keep) -> got: takes so many levels, until time.monotonic() says deadline.  keep: it
 * must be had, whatever comes: this is nobody's victim. */
static PyObject *mutex_resume(Mutex *self, PyObject *args) {
    PyObject *obj;
    const char *text;
    Py_ssize_t size;
    unsigned levels;
    double seconds;
    int keep;
    if (!PyArg_ParseTuple(args, "Os#Idp:_resume", &obj, &text, &size, &levels, &seconds, &keep)) return NULL;
    Label method = label_of(text, size);
    uint64_t deadline = deadline_of(seconds), now = clock_ns(CLOCK_MONOTONIC);
    me.keeps = (char)keep;
    int rc = mutex_acquire(self, obj, &method, deadline == FOREVER ? FOREVER : deadline > now ? deadline - now : 0);
    me.keeps = 0;
    for (unsigned level = 1; rc > 0 && level < levels; level++) cell_again(self->cell);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}
#endif
