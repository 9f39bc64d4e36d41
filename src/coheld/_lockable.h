/* LockableBase: acquire, release and with, for the class Lockable; and how every call gets from an object to its lock. */

#ifndef COHELD_LOCKABLE_H
#define COHELD_LOCKABLE_H

/* ==== 1. The lock of an object ==== */

/* obj.__lock__, a new reference, without obj.__getattr__: a proxy must not lock its target. */
static inline PyObject *lock_of(State *state, PyObject *obj) {
    PyObject *lock = PyObject_GenericGetAttr(obj, state->name_lock);
    if (LIKELY(lock && (Py_TYPE(lock) == state->mutex_type || PyObject_TypeCheck(lock, state->handle_type))))
        return lock;
    Py_XDECREF(lock);
    if (lock || PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        Py_XDECREF(PyObject_CallOneArg(state->not_initialized, obj));
    }
    return NULL;
}

/* lock._take(obj, method, timeout): mutex_acquire of another backend's lock. */
static int take_by_name(PyObject *lock, PyObject *obj, const Label *method, uint64_t timeout) {
    PyObject *seconds = timeout == FOREVER ? Py_NewRef(Py_None) : PyFloat_FromDouble((double)timeout / 1e9);
    PyObject *result = seconds ? PyObject_CallMethod(lock, "_take", "(ONN)", obj, label_text(method), seconds) : NULL;
    int truth = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    return truth;
}

/* lock.release(): 0, or -1 and an exception.  One that is there already stays, and becomes the context of what a commit
 * raises; it takes the place of a NotOwnerError, which is the only AssertionError here. */
static int give_by_name(PyObject *lock) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *result = PyObject_CallMethod(lock, "release", NULL);
    if (type && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_AssertionError)) PyErr_Clear();
    restore_before(type, error, trace);
    Py_XDECREF(result);
    return PyErr_Occurred() ? -1 : 0;
}

static inline int lock_take(State *state, PyObject *lock, PyObject *obj, const Label *method, uint64_t timeout) {
    if (LIKELY(Py_TYPE(lock) == state->mutex_type)) return mutex_acquire((Mutex *)lock, obj, method, timeout);
    return take_by_name(lock, obj, method, timeout);
}

/* 0, or -1 and an exception.  One that is there already stays, but for what a commit raises. */
static inline int lock_give(State *state, PyObject *lock) {
    if (UNLIKELY(Py_TYPE(lock) != state->mutex_type)) return give_by_name(lock);
    int rc = mutex_release((Mutex *)lock);
    if (LIKELY(!rc)) return 0;
    if (!PyErr_Occurred()) call_hook(lock, "_not_owner", NULL);
    return -1;
}

/* ==== 2. The type ==== */

/* They are C because an interrupt that lands between two bytecodes of a Python __enter__ leaves the lock held.
 * The type adds nothing to the layout of an object, so that it mixes with dict, int, Exception and every other. */

/* What the thread has just taken, in a coroutine, is its task's.  1; -1: raised, not held. */
static int entrust_openly(State *state, Mutex *self) {
    Cell *c = cell_of(self);
    PyObject *task = LOAD(&c->owner.depth) == 1 && cell_mine(c) ? current_task(state) : NULL;
    if (!task) return 1;
    int made = mutex_entrust(self, c, task, me.tid) ? call_hook(self, "_entrusted", task) : -1;
    if (made < 0) mutex_release(self); /* a child that a handler has forked does not hold it */
    Py_DECREF(task);
    return made < 0 ? -1 : 1;
}

/* By acquire and with, which do not say when they end: in a coroutine it is the task that owns, not all of its thread's. */
static int lock_take_openly(State *state, PyObject *lock, PyObject *obj, uint64_t timeout) {
    if (UNLIKELY(Py_TYPE(lock) != state->mutex_type)) return take_by_name(lock, obj, &no_label, timeout);
    Mutex *self = (Mutex *)lock;
    int seen = UNLIKELY(LOAD(&observed)) != 0, rc;
    uint64_t begun;
    rc = UNLIKELY(seen) ? acquire_timed(self, obj, &no_label, timeout, &begun)
                        : mutex_acquire_or_stop(self, obj, &no_label, timeout, NULL, 0);
    if (rc > 0 && PyThreadState_Get()->context) rc = entrust_openly(state, self);
    return UNLIKELY(seen) ? tell_if_first(self, obj, rc, begun, !timeout) : rc;
}

static PyObject *base_acquire(PyObject *self, PyObject *args, PyObject *kwargs) {
    State *state = state_of(self);
    PyObject *lock = state ? lock_of(state, self) : NULL;
    uint64_t timeout;
    int rc = lock && !parse_acquire(args, kwargs, &timeout) ? lock_take_openly(state, lock, self, timeout) : -1;
    Py_XDECREF(lock);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

static PyObject *base_release(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    State *state = state_of(self);
    PyObject *lock = state ? lock_of(state, self) : NULL;
    int rc = lock ? lock_give(state, lock) : -1;
    Py_XDECREF(lock);
    return rc ? NULL : Py_NewRef(Py_None);
}

static PyObject *base_enter(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    State *state = state_of(self);
    PyObject *lock = state ? lock_of(state, self) : NULL;
    int rc = lock ? lock_take_openly(state, lock, self, FOREVER) : -1;
    Py_XDECREF(lock);
    return rc < 0 ? NULL : Py_NewRef(self);
}

static PyMethodDef base_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))base_acquire, METH_VARARGS | METH_KEYWORDS, ACQUIRE_DOC},
    {"release", base_release, METH_NOARGS, RELEASE_DOC},
    {"__enter__", base_enter, METH_NOARGS, "Take the lock; blocks until it is held."},
    {"__exit__", base_release, METH_VARARGS, "Release the lock."},
    {NULL},
};

static PyType_Slot base_slots[] = {
    {Py_tp_doc, "acquire, release and with of Lockable."},
    {Py_tp_methods, base_methods},
    {0},
};

static PyType_Spec base_spec = {"coheld._native.LockableBase", 0, 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, base_slots};

/* ==== 3. For Python: an object and its lock ==== */

/* hang(obj, lock): obj.__lock__ = lock, past any __setattr__ (frozen dataclasses, proxies). */
static PyObject *native_hang(PyObject *module, PyObject *args) {
    State *state = PyModule_GetState(module);
    PyObject *obj, *lock;
    if (!PyArg_ParseTuple(args, "OO:hang", &obj, &lock) || PyObject_GenericSetAttr(obj, state->name_lock, lock))
        return NULL;
    Py_RETURN_NONE;
}

/* peek(obj): what its __lock__ is, or None; without its __getattr__ and without making its __dict__. */
static PyObject *native_peek(PyObject *module, PyObject *obj) {
    State *state = PyModule_GetState(module);
    PyObject *lock = PyObject_GenericGetAttr(obj, state->name_lock);
    if (lock || !PyErr_ExceptionMatches(PyExc_AttributeError)) return lock;
    PyErr_Clear();
    Py_RETURN_NONE;
}

/* lock_of(obj): its lock, or NotInitializedError. */
static PyObject *native_lock_of(PyObject *module, PyObject *obj) {
    return lock_of(PyModule_GetState(module), obj);
}

/* task_enter(obj, method: bytes) -> its lock, which the running task has taken; None: it is not free. */
static PyObject *native_task_enter(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    State *state = PyModule_GetState(module);
    if (count != 2 || !PyBytes_Check(args[1])) return PyErr_Format(PyExc_TypeError, "task_enter() takes an object and bytes");
    PyObject *lock = lock_of(state, args[0]);
    if (!lock) return NULL;
    int rc;
    if (Py_TYPE(lock) == state->mutex_type) {
        Label method = label_of(PyBytes_AS_STRING(args[1]), PyBytes_GET_SIZE(args[1]));
        rc = task_take((Mutex *)lock, state, args[0], &method, 1);
    } else {
        PyObject *taken = PyObject_CallMethod(lock, "_task_take", "OOO", args[0], args[1], Py_True);
        rc = taken ? PyObject_IsTrue(taken) : -1;
        Py_XDECREF(taken);
    }
    if (rc > 0) return lock;
    Py_DECREF(lock);
    return rc ? NULL : Py_NewRef(Py_None);
}
#endif
