/* The Python faces of shared state: View, and Field, the descriptor of a shared field. The part over _state.h that needs
 * to know of Mutex. */

#ifndef COHELD_FIELD_H
#define COHELD_FIELD_H

/* ==== 1. View: what Python does with it ==== */

/* View(lock, schema, kinds: bytes, limit): the lock is attached. */
static PyObject *view_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *module = PyType_GetModuleByDef(type, &module_def), *lock, *schema;
    State *state = module ? PyModule_GetState(module) : NULL;
    const char *kinds;
    Py_ssize_t size;
    unsigned long long limit;
    if (!state || !PyArg_ParseTuple(args, "O!Oy#K:View", state->mutex_base, &lock, &schema, &kinds, &size, &limit))
        return NULL;
    if (!((Mutex *)lock)->cell) return not_attached();
    View *self = (View *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    size_t count = (size_t)size;
    self->cell = ((Mutex *)lock)->cell;
    self->segment = Py_NewRef(((Mutex *)lock)->segment);
    self->schema = Py_NewRef(schema);
    self->count = size;
    self->limit = limit;
    self->inside = PyMem_Calloc(2 * count + 1, sizeof(Seen));
    self->kinds = PyMem_Calloc(2 * count + 1, 1);
    if (!self->inside || !self->kinds) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    self->outside = self->inside + count;
    self->marks = self->kinds + count;
    memcpy(self->kinds, kinds, count);
    return (PyObject *)self;
}

static int view_traverse(View *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->schema);
    Py_VISIT(self->dict);
    for (Py_ssize_t i = 0; self->inside && i < 2 * self->count; i++) Py_VISIT(self->inside[i].value);
    return 0;
}

static int view_clear(View *self) {
    Py_CLEAR(self->dict);
    for (Py_ssize_t i = 0; self->inside && i < 2 * self->count; i++) Py_CLEAR(self->inside[i].value);
    return 0;
}

static void unmap(Mapped *m) {
    if (m->buffer.obj) PyBuffer_Release(&m->buffer);
    *m = (Mapped){0};
}

static void view_dealloc(View *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    view_clear(self);
    unmap(&self->in);
    unmap(&self->out);
    Py_XDECREF(self->segment);
    Py_XDECREF(self->schema);
    PyMem_Free(self->inside);
    PyMem_Free(self->kinds);
    type->tp_free(self);
    Py_DECREF(type);
}

/* The index of a field, checked. */
static int parse_index(View *self, PyObject *args, const char *format, Py_ssize_t *i, PyObject **a, unsigned long long *b,
                       unsigned long long *c) {
    if (!PyArg_ParseTuple(args, format, i, a, b, c)) return -1;
    if (*i >= 0 && *i < self->count) return 0;
    PyErr_SetString(PyExc_IndexError, "no such field");
    return -1;
}

/* _word(): the word, now; what was read before the call is not younger. */
static PyObject *view_py_word(View *self, PyObject *Py_UNUSED(ignored)) {
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return PyLong_FromUnsignedLongLong(view_word(self));
}

/* _begin(): what is not live may be overwritten from here on. */
static PyObject *view_py_begin(View *self, PyObject *Py_UNUSED(ignored)) {
    __atomic_thread_fence(__ATOMIC_RELEASE);
    return PyLong_FromUnsignedLongLong(LOAD(&self->cell->version));
}

/* _flip(word): the commit.  By the owner. */
static PyObject *view_py_flip(View *self, PyObject *word) {
    uint64_t next = PyLong_AsUnsignedLongLong(word);
    if (PyErr_Occurred()) return NULL;
    if (!still_mine(self->cell) && !cell_tasked(self->cell)) {
        PyErr_SetString(PyExc_RuntimeError, "a commit without the lock");
        return NULL;
    }
    __atomic_store_n(&self->cell->version, next, __ATOMIC_RELEASE); /* view_refresh looks which values are of that */
    Py_RETURN_NONE;
}

/* _marked(storing) -> [(index, mark, value)]; storing: for a commit, which then says _keep or _drop. */
static PyObject *view_py_marked(View *self, PyObject *storing) {
    unsigned char more = storing == Py_True ? STORING : 0;
    PyObject *list = PyList_New(0);
    for (Py_ssize_t i = 0; list && i < self->count; i++) {
        if (!self->marks[i]) continue;
        PyObject *one = Py_BuildValue("niO", i, self->marks[i] & ~STORING, self->inside[i].value);
        self->marks[i] |= more;
        if (!one || PyList_Append(list, one)) Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

/* _keep(index, value, stamp) -> bool: clean from now on, unless it was touched since the commit looked at it. */
static PyObject *view_py_keep(View *self, PyObject *args) {
    Py_ssize_t i;
    PyObject *value;
    unsigned long long stamp;
    if (parse_index(self, args, "nOK:_keep", &i, &value, &stamp, NULL)) return NULL;
    if (!(self->marks[i] & STORING)) Py_RETURN_FALSE;
    PyObject *old = self->inside[i].value;
    self->marks[i] = CLEAN;
    self->inside[i].value = Py_NewRef(value);
    self->inside[i].stamp = stamp;
    Py_XDECREF(old); /* last: its __del__ may come back here */
    Py_RETURN_TRUE;
}

/* _drop(index, always): clean, and to be loaded when it is wanted; not always: as _keep. */
static PyObject *view_py_drop(View *self, PyObject *args) {
    Py_ssize_t i;
    PyObject *always;
    if (parse_index(self, args, "nO:_drop", &i, &always, NULL, NULL)) return NULL;
    if (always == Py_True || self->marks[i] & STORING) view_forget(self, i);
    Py_RETURN_NONE;
}

static PyObject *view_py_discard(View *self, PyObject *Py_UNUSED(ignored)) {
    view_discard(self);
    Py_RETURN_NONE;
}

/* _peek(index): the value inside, by the owner; it is not handed out. */
static PyObject *view_py_peek(View *self, PyObject *args) {
    Py_ssize_t i;
    if (parse_index(self, args, "n:_peek", &i, NULL, NULL, NULL)) return NULL;
    if (view_refresh(self) || (!self->inside[i].value && view_load(self, i))) return NULL;
    return Py_NewRef(self->inside[i].value);
}

/* _current_value(index): the value of the last commit. */
static PyObject *view_py_outside(View *self, PyObject *args) {
    Py_ssize_t i;
    if (parse_index(self, args, "n:_current_value", &i, NULL, NULL, NULL)) return NULL;
    return view_outside(self, i);
}

/* _publish(index, value, stamp, word): what a reader found. */
static PyObject *view_py_publish(View *self, PyObject *args) {
    Py_ssize_t i;
    PyObject *value, *old;
    unsigned long long stamp, word;
    if (parse_index(self, args, "nOKK:_publish", &i, &value, &stamp, &word)) return NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    Seen *f = &self->outside[i];
    old = f->value;
    *f = (Seen){Py_NewRef(value), stamp, word};
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(old); /* last: in its __del__ another thread may publish what is older, and must not get these words */
    Py_RETURN_NONE;
}

/* _map(outside, file, generation, first, second): where the slots are in the buffer; file None: it is of another schema. */
static PyObject *view_py_map(View *self, PyObject *args) {
    int outside;
    PyObject *file;
    unsigned long long generation;
    Py_ssize_t first, second, size = self->count * (Py_ssize_t)sizeof(Entry);
    Mapped fresh = {0}, old;
    if (!PyArg_ParseTuple(args, "pOKnn:_map", &outside, &file, &generation, &first, &second)) return NULL;
    if (file != Py_None) {
        if (PyObject_GetBuffer(file, &fresh.buffer, PyBUF_WRITABLE)) return NULL;
        if (first < 0 || second < 0 || (first | second) % 8 || first + size > fresh.buffer.len
            || second + size > fresh.buffer.len) {
            PyBuffer_Release(&fresh.buffer);
            PyErr_SetString(PyExc_ValueError, "the slots do not lie in the file");
            return NULL;
        }
        fresh.slots[0] = (Entry *)((char *)fresh.buffer.buf + first);
        fresh.slots[1] = (Entry *)((char *)fresh.buffer.buf + second);
    }
    fresh.generation = generation;
    Mapped *place = outside ? &self->out : &self->in;
    Py_BEGIN_CRITICAL_SECTION(self);
    old = *place;
    *place = fresh;
    Py_END_CRITICAL_SECTION();
    unmap(&old);
    Py_RETURN_NONE;
}

static PyMemberDef view_members[] = {
    {"schema", T_OBJECT, offsetof(View, schema), READONLY, "The fields."},
    {"remote", T_BOOL, offsetof(View, remote), 0, "A store has the state, and this is a copy of it."},
    {"__dictoffset__", T_PYSSIZET, offsetof(View, dict), READONLY, NULL},
    {NULL},
};

static PyMethodDef view_methods[] = {
    {"_word", (PyCFunction)view_py_word, METH_NOARGS, "_word(): the word; what was read before is not younger."},
    {"_begin", (PyCFunction)view_py_begin, METH_NOARGS, "_begin() -> word: what is not live may be overwritten now."},
    {"_flip", (PyCFunction)view_py_flip, METH_O, "_flip(word): the commit; by the owner."},
    {"_marked", (PyCFunction)view_py_marked, METH_O, "_marked(storing) -> [(index, mark, value)]."},
    {"_keep", (PyCFunction)view_py_keep, METH_VARARGS, "_keep(index, value, stamp) -> is it clean now?"},
    {"_drop", (PyCFunction)view_py_drop, METH_VARARGS, "_drop(index, always): clean, and to be loaded."},
    {"_discard", (PyCFunction)view_py_discard, METH_NOARGS, "_discard(): what was not committed never was."},
    {"_peek", (PyCFunction)view_py_peek, METH_VARARGS, "_peek(index): the owner's value, not handed out."},
    {"_current_value", (PyCFunction)view_py_outside, METH_VARARGS, "_current_value(index)."},
    {"_publish", (PyCFunction)view_py_publish, METH_VARARGS, "_publish(index, value, stamp, word): for readers."},
    {"_map", (PyCFunction)view_py_map, METH_VARARGS, "_map(outside, file, generation, first, second)."},
    {NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_doc, "View(lock, schema, kinds, limit): what this process knows of the state of a resource."},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_traverse, view_traverse},
    {Py_tp_clear, view_clear},
    {Py_tp_members, view_members},
    {Py_tp_methods, view_methods},
    {Py_tp_new, view_new},
    {0},
};

static PyType_Spec view_spec = {"coheld._native.View", sizeof(View), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, view_slots};

/* ==== 2. Field: what shared(...) becomes in its class ==== */

/* Without the GIL: all is written before another thread can have the object, but for dict, which is the interpreter's. */
typedef struct {
    PyObject_HEAD
    State *state; /* of the module, which the type keeps alive */
    PyObject *schema;
    PyObject *name;
    PyObject *dict;
    Py_ssize_t index;
    unsigned char kinds;
} Field;

/* The View of the object's lock, if it is of this field's schema; else NULL, without an exception: go the long way. */
static inline View *field_view(const Field *self, PyObject *lock) {
    if (UNLIKELY(Py_TYPE(lock) != self->state->mutex_type)
        && !PyObject_TypeCheck(lock, (PyTypeObject *)self->state->mutex_base))
        return NULL;
    View *v = (View *)__atomic_load_n(&((Mutex *)lock)->view, __ATOMIC_ACQUIRE);
    return LIKELY(v && v->schema == self->schema && v->cell == ((Mutex *)lock)->cell) ? v : NULL;
}

/* By the owner.  A guard looks at what was committed; in a nested call, where there may be more, at that, and at a copy
 * of what could be changed. */
static inline PyObject *field_inside(Field *self, Mutex *lock, View *v) {
    int changes;
    if (UNLIKELY(lock->guarding)) {
        if (!lock->pending) return view_outside(v, self->index);
        if (v->kinds[self->index] & MUTABLE) return PyObject_CallMethod((PyObject *)v, "_seen_by_owner", "n", self->index);
    }
    PyObject *value = view_inside(v, self->index, &changes);
    if (UNLIKELY(!value)) return NULL;
    if (changes) lock->pending = v;
    return Py_NewRef(value);
}

static PyObject *field_get(Field *self, PyObject *obj, PyObject *Py_UNUSED(type)) {
    if (!obj || obj == Py_None) return Py_NewRef(self);
    PyObject *lock = lock_of(self->state, obj), *value;
    if (UNLIKELY(!lock)) return NULL;
    View *v = field_view(self, lock);
    if (UNLIKELY(!v))
        value = PyObject_CallMethod(self->schema, "_get", "OnO", lock, self->index, obj);
    else if (holds((Mutex *)lock, v->cell))
        value = field_inside(self, (Mutex *)lock, v);
    else
        value = view_outside(v, self->index);
    Py_DECREF(lock);
    return value;
}

/* Exact types that are what the field says, and fit: all other values are looked at, or converted, by Python. */
static inline int field_takes(const Field *self, PyObject *value) {
    int kind = kind_of(value) & self->kinds, overflow = 0;
    if (kind == IS_INT) PyLong_AsLongLongAndOverflow(value, &overflow);
    if (kind == IS_STR && !PyUnicode_IS_COMPACT_ASCII(value)) return 0;
    return kind && !overflow;
}

static int field_set(Field *self, PyObject *obj, PyObject *value) {
    if (!value) {
        PyErr_Format(PyExc_AttributeError, "the shared field %R cannot be deleted", self->name);
        return -1;
    }
    PyObject *lock = lock_of(self->state, obj);
    if (UNLIKELY(!lock)) return -1;
    View *v = field_view(self, lock);
    int rc = 0;
    if (LIKELY(v && holds((Mutex *)lock, v->cell) && !((Mutex *)lock)->guarding && field_takes(self, value))) {
        rc = view_assign(v, self->index, value);
        if (!rc) ((Mutex *)lock)->pending = v;
    } else {
        PyObject *result = PyObject_CallMethod(self->schema, "_set", "OnOO", lock, self->index, value, obj);
        Py_XDECREF(result);
        rc = result ? 0 : -1;
    }
    Py_DECREF(lock);
    return rc;
}

/* Field(schema, index, name, kinds) */
static PyObject *field_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *schema, *name;
    Py_ssize_t index;
    unsigned char kinds;
    if (!PyArg_ParseTuple(args, "OnUB:Field", &schema, &index, &name, &kinds)) return NULL;
    PyObject *module = PyType_GetModuleByDef(type, &module_def);
    Field *self = module ? (Field *)type->tp_alloc(type, 0) : NULL;
    if (!self) return NULL;
    self->state = PyModule_GetState(module);
    self->schema = Py_NewRef(schema);
    self->name = Py_NewRef(name);
    self->index = index;
    self->kinds = kinds & (IS_NONE | IS_BOOL | IS_INT | IS_FLOAT | IS_STR | IS_BYTES);
    return (PyObject *)self;
}

static int field_traverse(Field *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->schema);
    Py_VISIT(self->dict);
    return 0;
}

static int field_clear(Field *self) {
    Py_CLEAR(self->schema);
    Py_CLEAR(self->dict);
    return 0;
}

static void field_dealloc(Field *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    field_clear(self);
    Py_XDECREF(self->name);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *field_repr(Field *self) { return PyUnicode_FromFormat("<shared field %U>", self->name); }

static PyMemberDef field_members[] = {
    {"schema", T_OBJECT, offsetof(Field, schema), READONLY, "The fields that it is one of."},
    {"index", T_PYSSIZET, offsetof(Field, index), READONLY, "Its place among them."},
    {"__name__", T_OBJECT, offsetof(Field, name), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(Field, dict), READONLY, NULL},
    {NULL},
};

static PyType_Slot field_slots[] = {
    {Py_tp_doc, "A field whose value all copies of the object share."},
    {Py_tp_new, field_new},
    {Py_tp_dealloc, field_dealloc},
    {Py_tp_traverse, field_traverse},
    {Py_tp_clear, field_clear},
    {Py_tp_descr_get, field_get},
    {Py_tp_descr_set, field_set},
    {Py_tp_repr, field_repr},
    {Py_tp_members, field_members},
    {0},
};

static PyType_Spec field_spec = {"coheld._native.Field", sizeof(Field), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                                 field_slots};
#endif
