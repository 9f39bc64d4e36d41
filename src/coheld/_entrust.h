/* What tasks need of a Mutex, for Python: the verbs of aio.py and lookout.py. */

#ifndef COHELD_ENTRUST_H
#define COHELD_ENTRUST_H

/* ==== 1. Take and give ==== */

static int task_takes(Mutex *self, PyObject *task, PyObject *obj, const Label *method, int patient) {
    Cell *c = cell_of(self);
    if (UNLIKELY(self->queued) && !(c && cell_tasked(c) && task_mine(self, c))) return 0;
    if (patient && c && LOAD(&c->handoff) && !holds(self, c)) return 0; /* somebody has waited for long */
    if (c && still_mine(c)) return call_hook(self, "_stuck", NULL); /* its thread holds it, around the loop */
    int rc = mutex_acquire_or_stop(self, obj, method, 0, NULL, 0);
    if (rc <= 0 || !cell_mine(c = cell_of(self))) return rc; /* one level more of its own */
    if (mutex_entrust(self, c, task, me.tid)) return UNLIKELY(LOAD(&observed)) ? tell_if_first(self, obj, 1, 0, !patient) : 1;
    mutex_release(self);
    return -1;
}

/* The running task takes it: 1.  0: it is not free, or others wait; patient: also one that waits for long, elsewhere.
 * -1: raised. */
static int task_take(Mutex *self, State *state, PyObject *obj, const Label *method, int patient) {
    PyObject *task = current_task(state);
    if (!task) return call_hook(self, "_no_task", NULL);
    int rc = task_takes(self, task, obj, method, patient);
    Py_DECREF(task);
    return rc;
}

/* _task_take(obj, method: bytes, patient: bool) -> got: for the running task; False: it is not free. */
static PyObject *mutex_task_take(Mutex *self, PyObject *args) {
    PyObject *obj;
    const char *text;
    Py_ssize_t size;
    int patient;
    if (!PyArg_ParseTuple(args, "Oy#p:_task_take", &obj, &text, &size, &patient)) return NULL;
    State *state = state_of((PyObject *)self);
    if (!state) return NULL;
    Label method = label_of(text, size);
    int rc = task_take(self, state, obj, &method, patient);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

/* _task_give(): one level is given back, by the task; or by whoever unwinds one that is gone. */
static PyObject *mutex_task_give(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    int ours = c && task_owns(self, c), may = ours ? task_mine(self, c) || call_hook(self, "_task_is_gone", NULL) : 0;
    if (PyErr_Occurred()) return NULL;
    int rc = may ? task_release(self, c, LOAD(&self->task_nonce)) : -1;
    if (rc == -1) call_hook(self, "_not_owner", NULL);
    return rc ? NULL : Py_NewRef(Py_None);
}

/* _task_deepen(levels): the running task, which owns it, has so many levels more. */
static PyObject *mutex_task_deepen(Mutex *self, PyObject *arg) {
    unsigned long levels = PyLong_AsUnsignedLong(arg);
    Cell *c = cell_of(self);
    if (PyErr_Occurred()) return NULL;
    if (!c || !task_mine(self, c)) return call_hook(self, "_not_owner", NULL), NULL;
    STORE(&c->owner.depth, LOAD(&c->owner.depth) + (uint32_t)levels);
    Py_RETURN_NONE;
}

/* ==== 2. In the stead of a task ==== */

/* _wait_turn(stop: bytearray, reads) -> got: blocks the calling thread until it holds the lock, or somebody sets the byte
 * and nudges.  reads: it is to count a reader in, and others may read. */
static PyObject *mutex_wait_turn(Mutex *self, PyObject *args) {
    PyObject *stop;
    int reads;
    Py_buffer byte;
    if (!PyArg_ParseTuple(args, "Op:_wait_turn", &stop, &reads) || PyObject_GetBuffer(stop, &byte, PyBUF_SIMPLE)) return NULL;
    int rc = mutex_acquire_or_stop(self, NULL, &no_label, FOREVER, byte.buf, reads);
    PyBuffer_Release(&byte);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

/* _entrust(task, tid, method: bytes): what the calling thread holds is the task's, whose loop runs in thread tid. */
static PyObject *mutex_py_entrust(Mutex *self, PyObject *args) {
    PyObject *task;
    unsigned tid;
    const char *text;
    Py_ssize_t size;
    Cell *c = cell_of(self);
    if (!PyArg_ParseTuple(args, "OIy#:_entrust", &task, &tid, &text, &size)) return NULL;
    if (!c || !still_mine(c)) return call_hook(self, "_not_owner", NULL), NULL;
    c->owner.method = label_of(text, size);
    return mutex_entrust(self, c, task, tid) ? Py_NewRef(Py_None) : NULL;
}

static PyObject *mutex_nudge(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    if (c) wake_all(c);
    Py_RETURN_NONE;
}

/* _task_bury(task): if it is the owner, it is gone, and the next who comes inherits. */
static PyObject *mutex_task_bury(Mutex *self, PyObject *task) {
    Cell *c = cell_of(self);
    uint64_t nonce = LOAD(&self->task_nonce);
    PyObject *owner = c && task_owns(self, c) ? owning_task(self) : NULL;
    if (owner == task && task != Py_None) cell_bury_task(c, nonce);
    Py_XDECREF(owner);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *mutex_get_task(Mutex *self, void *Py_UNUSED(closure)) {
    Cell *c = cell_of(self);
    PyObject *task = c && task_owns(self, c) ? owning_task(self) : NULL;
    return task || PyErr_Occurred() ? task : Py_NewRef(Py_None);
}
#endif
