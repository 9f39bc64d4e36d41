/* LockedMethod: what @Lockable.locked makes of a function. */

#ifndef COHELD_LOCKED_H
#define COHELD_LOCKED_H

/* ==== 1. The call ==== */

/* Without the GIL: all is written before another thread can have the object, but for the two that the interpreter
 * protects, and func, which only the garbage collector clears. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    State *state; /* of the module, which the type keeps alive */
    PyObject *func;
    PyObject *timeout; /* as given, seconds or None */
    PyObject *guard;   /* or None */
    char atomic;
    char exclusive;
    PyObject *dict; /* PyObject_GenericGetDict and _GenericSetDict lock the object */
    PyObject *weakrefs;
    uint64_t timeout_ns;
    Label label;
} LockedMethod;

/* An exception (of a signal's handler) has come where an atomic call was about to begin, or to be undone: undone too much
 * is better than half of it committed. */
static void break_atomic(State *state, PyObject *lock, int level) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (!PyObject_TypeCheck(lock, (PyTypeObject *)state->mutex_base)) {
        PyObject *done = PyObject_CallMethod(lock, "_break_atomic", "i", level);
        Py_XDECREF(done); /* what it raises gives way */
    } else if (holds((Mutex *)lock, ((Mutex *)lock)->cell)) {
        ((Mutex *)lock)->atomic = level;
        if (((Mutex *)lock)->pending) mutex_discard((Mutex *)lock);
    }
    PyErr_Restore(type, error, trace);
}

/* How many atomic calls the lock is in already; -1: raised. */
static int atomic_level(State *state, PyObject *lock) {
    if (PyObject_TypeCheck(lock, (PyTypeObject *)state->mutex_base)) return ((Mutex *)lock)->atomic;
    PyObject *level = PyObject_GetAttrString(lock, "atomic");
    long value = level ? PyLong_AsLong(level) : -1;
    Py_XDECREF(level);
    return (int)value;
}

/* The call, with a guard or atomic; the lock is held. */
static PyObject *careful_call(LockedMethod *self, PyObject *lock, uint64_t begun, PyObject *const *args, size_t nargsf,
                              PyObject *kwnames) {
    PyObject *done, *saved, *result;
    if (self->guard != Py_None) {
        double deadline = self->timeout_ns == FOREVER ? Py_HUGE_VAL : (double)(begun + self->timeout_ns) / 1e9;
        done = PyObject_CallMethod(lock, "_await_guard", "OOdO", self->guard, args[0], deadline, self->timeout);
        Py_XDECREF(done);
        if (!done) return NULL;
    }
    if (!self->atomic) return PyObject_Vectorcall(self->func, args, nargsf, kwnames);
    int level = atomic_level(self->state, lock);
    if (level < 0) return NULL;
    if (!(saved = PyObject_CallMethod(lock, "_enter_atomic", NULL))) {
        break_atomic(self->state, lock, level);
        return NULL;
    }
    result = PyObject_Vectorcall(self->func, args, nargsf, kwnames);
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    done = PyObject_CallMethod(lock, "_leave_atomic", "OO", saved, result ? Py_True : Py_False);
    if (!done) {
        Py_CLEAR(result);
        break_atomic(self->state, lock, level);
    }
    restore_before(type, error, trace);
    Py_XDECREF(done);
    Py_DECREF(saved);
    return result;
}

/* Lock, call, unlock, with no bytecode of ours between.  An exception of the call is what the caller sees, also
 * where the lock was not ours to give back (a forked child that returns from its parent's call). */
static PyObject *locked_call(LockedMethod *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    if (UNLIKELY(!PyVectorcall_NARGS(nargsf)))
        return PyErr_Format(PyExc_TypeError, "%R must be called with its instance as the first argument", self);
    PyObject *obj = args[0];
    PyObject *lock = lock_of(self->state, obj);
    if (UNLIKELY(!lock)) return NULL;
    PyObject *result = NULL;
    uint64_t begun = UNLIKELY(self->atomic || self->guard != Py_None) ? clock_ns(CLOCK_MONOTONIC) : 0;
    int rc = lock_take(self->state, lock, obj, &self->label, self->timeout_ns);
    if (LIKELY(rc > 0)) {
        result = UNLIKELY(begun) ? careful_call(self, lock, begun, args, nargsf, kwnames)
                                 : PyObject_Vectorcall(self->func, args, nargsf, kwnames);
        if (UNLIKELY(lock_give(self->state, lock))) Py_CLEAR(result);
    } else if (!rc) {
        call_hook(lock, "_timed_out", self->timeout);
    }
    Py_DECREF(lock);
    return result;
}

/* lock._read(…) of another backend's lock, which says how to end it; NULL as of thread_reads.  A new reference. */
static PyObject *read_by_name(PyObject *lock, PyObject *obj, const Label *method, uint64_t timeout) {
    PyObject *seconds = timeout == FOREVER ? Py_NewRef(Py_None) : PyFloat_FromDouble((double)timeout / 1e9);
    PyObject *how = seconds ? PyObject_CallMethod(lock, "_thread_reads", "(ONN)", obj, label_text(method), seconds) : NULL;
    if (how == Py_None) Py_CLEAR(how);
    return how;
}

/* how.leave(), with the exception that is there already kept. */
static int leave_by_name(PyObject *how) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    int rc = call_hook(how, "leave", NULL);
    restore_before(type, error, trace);
    return rc < 0 ? -1 : 0;
}

/* As locked_call, together with others that read. */
static PyObject *reading_call(LockedMethod *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    if (UNLIKELY(!PyVectorcall_NARGS(nargsf)))
        return PyErr_Format(PyExc_TypeError, "%R must be called with its instance as the first argument", self);
    PyObject *obj = args[0], *result = NULL, *how;
    PyObject *lock = lock_of(self->state, obj);
    if (UNLIKELY(!lock)) return NULL;
    int native = Py_TYPE(lock) == self->state->mutex_type;
    how = native ? Py_XNewRef(thread_reads((Mutex *)lock, obj, &self->label, self->timeout_ns))
                 : read_by_name(lock, obj, &self->label, self->timeout_ns);
    if (LIKELY(how != NULL)) {
        result = PyObject_Vectorcall(self->func, args, nargsf, kwnames);
        if (how == lock) {
            if (lock_give(self->state, lock)) Py_CLEAR(result);
        } else if (native) {
            thread_has_read((Mutex *)lock, (Register *)how);
        } else if (leave_by_name(how)) {
            Py_CLEAR(result);
        }
        Py_DECREF(how);
    } else if (!PyErr_Occurred()) {
        call_hook(lock, "_timed_out", self->timeout);
    }
    Py_DECREF(lock);
    return result;
}

/* ==== 2. The type ==== */

/* LockedMethod(func, timeout, label: bytes, guard=None, atomic=False, exclusive=True) */
static PyObject *locked_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *func, *timeout, *guard = Py_None;
    int atomic = 0, exclusive = 1;
    const char *label;
    Py_ssize_t size;
    uint64_t ns;
    if (!PyArg_ParseTuple(args, "OOy#|Opp:LockedMethod", &func, &timeout, &label, &size, &guard, &atomic, &exclusive)
        || parse_timeout(timeout, &ns))
        return NULL;
    LockedMethod *self = (LockedMethod *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->vectorcall = (vectorcallfunc)(exclusive ? locked_call : reading_call);
    self->state = PyType_GetModuleState(type);
    self->func = Py_NewRef(func);
    self->timeout = Py_NewRef(timeout);
    self->guard = Py_NewRef(guard);
    self->atomic = (char)atomic;
    self->exclusive = (char)exclusive;
    self->timeout_ns = ns;
    memcpy(self->label.text, label, (size_t)(size < LABEL_SIZE ? size : LABEL_SIZE));
    return (PyObject *)self;
}

static int locked_traverse(LockedMethod *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->func);
    Py_VISIT(self->guard);
    Py_VISIT(self->dict);
    return 0;
}

static int locked_clear(LockedMethod *self) {
    Py_CLEAR(self->func);
    Py_CLEAR(self->guard);
    Py_CLEAR(self->dict);
    return 0;
}

static void locked_dealloc(LockedMethod *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->weakrefs) PyObject_ClearWeakRefs((PyObject *)self);
    locked_clear(self);
    Py_XDECREF(self->timeout);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *locked_get(PyObject *self, PyObject *obj, PyObject *Py_UNUSED(type)) {
    return obj && obj != Py_None ? PyMethod_New(self, obj) : Py_NewRef(self);
}

/* What the callable does not have itself, it has from the function: __code__, __annotations__, __closure__ …; but it
 * does not claim to be a function: what ships functions by value would then ship the method without its lock. */
static PyObject *locked_getattr(LockedMethod *self, PyObject *name) {
    PyObject *value = PyObject_GenericGetAttr((PyObject *)self, name);
    if (value || !self->func || !PyErr_ExceptionMatches(PyExc_AttributeError)) return value;
    PyErr_Clear();
    return PyObject_GetAttr(self->func, name);
}

static PyObject *locked_repr(LockedMethod *self) { return PyUnicode_FromFormat("<locked %R>", self->func); }

static PyObject *locked_reduce(PyObject *self, PyObject *protocol) {
    State *state = PyType_GetModuleState(Py_TYPE(self));
    return PyObject_CallFunctionObjArgs(state->reduce_locked, self, protocol, NULL);
}

static PyMethodDef locked_methods[] = {
    {"__reduce_ex__", locked_reduce, METH_O, "By name, or by value for what pickles functions by value."},
    {NULL},
};

static PyMemberDef locked_members[] = {
    {"timeout", T_OBJECT, offsetof(LockedMethod, timeout), READONLY, "Seconds to wait for the lock, or None."},
    {"when", T_OBJECT, offsetof(LockedMethod, guard), READONLY, "What must hold before the call, or None."},
    {"atomic", T_BOOL, offsetof(LockedMethod, atomic), READONLY, "Does an exception undo what the call changed?"},
    {"exclusive", T_BOOL, offsetof(LockedMethod, exclusive), READONLY, "Alone, or together with others that read?"},
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(LockedMethod, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(LockedMethod, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(LockedMethod, weakrefs), READONLY, NULL},
    {NULL},
};

static PyGetSetDef locked_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL},
};

static PyType_Slot locked_slots[] = {
    {Py_tp_doc, "LockedMethod(func, timeout, label): func, called under the lock of its first argument."},
    {Py_tp_new, locked_new},
    {Py_tp_dealloc, locked_dealloc},
    {Py_tp_traverse, locked_traverse},
    {Py_tp_clear, locked_clear},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, locked_get},
    {Py_tp_getattro, locked_getattr},
    {Py_tp_repr, locked_repr},
    {Py_tp_methods, locked_methods},
    {Py_tp_members, locked_members},
    {Py_tp_getset, locked_getset},
    {0},
};

static PyType_Spec locked_spec = {
    "coheld._native.LockedMethod", sizeof(LockedMethod), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR, locked_slots};
#endif
