/* What tasks need of a Mutex, for Python: the verbs of aio.py and lookout.py. */

#ifndef COHELD_ENTRUST_H
#define COHELD_ENTRUST_H

/* ==== 1. The owning task's name ==== */

/* _sit(memory, offset, place): by the owner. */
static PyObject *mutex_sit(Mutex *self, PyObject *args) {
    Py_buffer memory;
    Py_ssize_t offset;
    PyObject *place, *old = self->place;
    if (!PyArg_ParseTuple(args, "w*nO:_sit", &memory, &offset, &place)) return NULL;
    int fits = offset >= 0 && offset % (Py_ssize_t)sizeof(Slot) == 0 && offset <= memory.len - (Py_ssize_t)sizeof(Slot);
    self->seat = fits ? (Slot *)((char *)memory.buf + offset) : NULL;
    self->place = Py_NewRef(place);
    PyBuffer_Release(&memory);
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

/* Before the task owns it: its name is written where others find it.  0; -1: raised, and the thread holds it still; or it is
 * a child of a handler's, that does not. */
static int __attribute__((noinline)) name_task(Mutex *self, Cell *c, PyObject *task) {
    if (self->seated != process.generation + 1) {
        self->seat = NULL; /* its parent's */
        self->seated = process.generation + 1;
        if (call_hook(self, "_take_seat", NULL) < 0) return -1;
    }
    if (self->seat) seat_clear(self->seat);
    PyObject *name = self->seat ? PyObject_CallMethod(task, "get_name", NULL) : NULL;
    if (!still_mine(c)) {
        Py_XDECREF(name);
        return PyErr_Occurred() ? -1 : call_hook(self, "_not_owner", NULL);
    }
    if (!name) {
        if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear(); /* it is nobody's Task */
        return PyErr_Occurred() ? -1 : 0;
    }
    Py_ssize_t size;
    const char *text = PyUnicode_AsUTF8AndSize(name, &size);
    if (text)
        seat_write(self->seat, self->segment->area.inode, self->offset, task, text, (size_t)size);
    else
        PyErr_Clear(); /* no text that can be written */
    Py_DECREF(name);
    return 0;
}

/* Is it there already, of the task of that weak reference?  A task that has got another name since keeps the old one. */
static inline int is_named(const Mutex *self, const PyObject *task) {
    if (task != self->task || self->seated != process.generation + 1) return 0;
    return !self->seat || self->seat->inode == self->segment->area.inode;
}

/* What the calling thread holds, once, is the task's from now on, whose loop runs in thread tid.  The nonce; 0: raised, and
 * the thread still holds it. */
static uint64_t mutex_entrust(Mutex *self, Cell *c, PyObject *task, uint32_t tid) {
    PyObject *reference = PyWeakref_NewRef(task, NULL), *old;
    if (!reference) return 0;
    if (!is_named(self, reference) && name_task(self, c, task)) {
        Py_DECREF(reference);
        return 0;
    }
    Py_BEGIN_CRITICAL_SECTION(self);
    old = self->task;
    self->task = reference;
    Py_END_CRITICAL_SECTION();
    STORE(&self->task_nonce, LOAD(&c->acquisitions) * TASK_STEP);
    if (tid == me.tid) {
        STORE(&self->step, PyThreadState_Get()->context_ver);
        STORE(&self->step_thread, me.nonce);
    }
    uint64_t nonce = cell_entrust(c, tid, task);
    Py_XDECREF(old);
    return nonce;
}

/* ==== 2. Take and give ==== */

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

/* ==== 3. In the stead of a task ==== */

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
