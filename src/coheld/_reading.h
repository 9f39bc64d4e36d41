/* Reading calls: any number together, never with an exclusive one.  The protocol is in _register.h. */

#ifndef COHELD_READING_H
#define COHELD_READING_H

/* ==== 1. Which locks this thread reads ==== */

/* Greenlets of one thread come and go in any order: so counts, and no stack.  A child of a fork reads nothing. */
typedef struct {
    Mutex *lock; /* borrowed: of a call that is running */
    uint32_t depth;
} Reading;

enum { FEW = 4 };

static __thread struct {
    uint32_t generation;
    uint32_t count, room;
    Reading few[FEW];
    Reading *more; /* NULL where there are few; freed with the last: who ends its calls leaves nothing */
} reads __attribute__((tls_model("initial-exec")));

static inline Reading *reads_of(uint32_t i) { return reads.more ? &reads.more[i] : &reads.few[i]; }

static Reading *reads_find(const Mutex *lock) {
    if (LIKELY(!reads.count) || reads.generation != process.generation) return NULL;
    for (uint32_t i = 0; i < reads.count; i++)
        if (reads_of(i)->lock == lock) return reads_of(i);
    return NULL;
}

static int __attribute__((noinline)) reads_grow(void) {
    uint32_t room = 4 * (reads.more ? reads.room : FEW);
    Reading *grown = realloc(reads.more, room * sizeof *grown);
    if (!grown) return -1;
    if (!reads.more) memcpy(grown, reads.few, sizeof reads.few);
    reads.more = grown;
    reads.room = room;
    return 0;
}

/* 0; -1: no memory. */
static inline int reads_add(Mutex *lock) {
    Reading *r = reads_find(lock);
    if (UNLIKELY(reads.generation != process.generation)) {
        reads.generation = process.generation;
        reads.count = 0;
    }
    if (r) {
        r->depth++;
        return 0;
    }
    if (UNLIKELY(reads.count >= (reads.more ? reads.room : FEW)) && reads_grow()) return -1;
    *reads_of(reads.count++) = (Reading){lock, 1};
    return 0;
}

static inline void reads_take_off(const Mutex *lock) {
    Reading *r = reads_find(lock);
    if (!r || --r->depth) return;
    *r = *reads_of(--reads.count);
    if (UNLIKELY(reads.more && !reads.count)) {
        free(reads.more);
        reads.more = NULL;
    }
}

/* ==== 2. By who owns, or is about to wait ==== */

/* The register of the lock's readers; opened if this process has not yet.  Borrowed; NULL: raised. */
static Register *mutex_register(Mutex *self) {
    Register *r = __atomic_load_n(&self->readers, __ATOMIC_ACQUIRE);
    if (UNLIKELY(!r) && call_hook(self, "_open_register", NULL) >= 0)
        r = __atomic_load_n(&self->readers, __ATOMIC_ACQUIRE);
    return r;
}

/* This thread, or a task of the loop that it runs, reads; a wait would be for itself, for ever.  0; -1: raised. */
static int refuse_to_wait(Mutex *self) {
    Register *r = __atomic_load_n(&self->readers, __ATOMIC_ACQUIRE);
    Entrant *mine = r ? register_mine(r) : NULL;
    if (!mine || !LOAD(&mine->count)) return 0;
    return call_hook(self, "_reads_itself", reads_find(self) ? Py_True : Py_False);
}

/* By the owner: until nobody reads.  0.  ETIMEDOUT.  -1: raised, or a signal's handler has forked, and we are the child. */
static int await_readers(Mutex *self, Cell *c, uint64_t deadline, const char *stop) {
    Register *r = mutex_register(self);
    if (!r) return -1;
    Table *t = r->table;
    Patience p = begin_patience(stop != NULL, 0);
    Outer outer = {0};
    int rc = 0, listed = stop != NULL;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* behind the lock, before the counts */
    while (!rc && register_busy(r)) {
        STORE(&t->wanted, 1);
        uint32_t news = __atomic_load_n(&t->news, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        register_reap(r);
        if (!register_busy(r)) break;
        uint64_t now = clock_ns(CLOCK_MONOTONIC), until = now + TASK_SLICE;
        if ((stop && LOAD(stop)) || now >= deadline) rc = ETIMEDOUT;
        else if ((rc = refuse_to_wait(self)) || (rc = look_why(self, &p))) break;
        else if (!listed) {
            listed = 1;
            rc = wait_begins(self, FOR_READERS | (deadline == FOREVER ? 0 : TIMED), &c->owner.method, &outer);
        } else {
            Py_BEGIN_ALLOW_THREADS
            futex_sleep(&t->news, news, until < deadline ? until : deadline);
            Py_END_ALLOW_THREADS
            rc = PyErr_CheckSignals();
            if (!still_mine(c)) return rc ? -1 : call_hook(self, "_not_owner", NULL);
        }
    }
    wait_withdraw(&outer);
    STORE(&t->wanted, 0);
    return rc;
}

/* By the owner of the mutex: this process's record, claimed if it has none.  NULL: raised; or a signal's handler has forked
 * in a hook, and this is the child, who owns nothing. */
static Entrant *entrant_of(Mutex *self, Cell *c, Register *r) {
    if (LIKELY(register_mine(r) != NULL)) return register_mine(r);
    for (int grown = 0;; grown = 1) {
        if (!still_mine(c)) return call_hook(self, "_not_owner", NULL), NULL;
        errno = register_claim(r);
        if (!errno) return register_mine(r);
        if (grown) return PyErr_SetFromErrno(PyExc_OSError), NULL;
        if (call_hook(r, "grow", NULL) < 0) return NULL;
    }
}

/* By the owner of the mutex: this process has one reader more.  The register; NULL: raised. */
static Register *read_from_now_on(Mutex *self, Cell *c) {
    Register *r = mutex_register(self);
    Entrant *e = r ? entrant_of(self, c, r) : NULL;
    if (!e) return NULL;
    reader_in(e);
    flags_up(c, READERS);
    return r;
}

/* ==== 3. A reading call ==== */

/* What entering came to: the register by which it is in, or the lock itself, where the caller has that already; NULL: not
 * in: raised, or (no exception) not within the time. */

/* Is the lock free, with nothing for an owner to do first? */
static inline int open_to_readers(const Mutex *self, Cell *c) {
    if (__atomic_load_n(word_of(c), __ATOMIC_SEQ_CST) & (int)(FUTEX_TID_MASK | FUTEX_OWNER_DIED)) return 0;
    if (__atomic_load_n(&c->flags, __ATOMIC_SEQ_CST) & (TASKED | RECOVERING | REMOVED | WARDED)) return 0;
    uint64_t check = LOAD(&self->next_check);
    return check == FOREVER || clock_ns(CLOCK_MONOTONIC_COARSE) < check;
}

/* In without the mutex: 1; 0: it has to be asked for. */
static inline int reader_passes(Mutex *self, Cell *c, Register *r, int again) {
    Entrant *e = register_mine(r);
    if (UNLIKELY(!e)) return 0;
    reader_in(e);
    if (LIKELY(again || open_to_readers(self, c))) return 1;
    reader_out(r->table, e);
    return 0;
}

static int mutex_acquire_or_stop(Mutex *, PyObject *, const Label *, uint64_t, const char *, int);

/* By way of the mutex, behind whoever waits for it. */
static PyObject *reader_queues(Mutex *self, PyObject *obj, const Label *method, uint64_t timeout) {
    if (mutex_acquire_or_stop(self, obj, method, timeout, NULL, 1) <= 0) return NULL;
    Cell *c = cell_of(self);
    Register *r = read_from_now_on(self, c);
    if (still_mine(c)) mutex_abandon(self, c);
    return (PyObject *)r;
}

/* again: the caller is in already, whatever this thread does. */
static PyObject *mutex_read(Mutex *self, PyObject *obj, const Label *method, uint64_t timeout, int again) {
    Cell *c = cell_of(self);
    if (LIKELY(c != NULL)) {
        if (UNLIKELY(!me.tid)) find_myself();
        if (holds(self, c)) return mutex_acquire_or_stop(self, obj, method, timeout, NULL, 0) > 0 ? (PyObject *)self : NULL;
        Register *r = __atomic_load_n(&self->readers, __ATOMIC_ACQUIRE);
        if (LIKELY(r && reader_passes(self, c, r, again))) return (PyObject *)r;
        if (UNLIKELY(r && register_mine(r) && LOAD(&register_mine(r)->count))) { /* of another thread, or a task */
            int task = call_hook(self, "_task_reads", NULL);
            if (task > 0 && reader_passes(self, c, r, 1)) return (PyObject *)r;
            if (task < 0 || (timeout && refuse_to_wait(self))) return NULL;
        }
    }
    return reader_queues(self, obj, method, timeout);
}

/* By a thread, for a call of its own.  Borrowed: the lock keeps its registers. */
static PyObject *thread_reads(Mutex *self, PyObject *obj, const Label *method, uint64_t timeout) {
    PyObject *how = mutex_read(self, obj, method, timeout, reads_find(self) != NULL);
    if (!how || how == (PyObject *)self || LIKELY(!reads_add(self))) return how;
    reader_out(((Register *)how)->table, register_mine((Register *)how));
    return PyErr_NoMemory();
}

/* The end of that. */
static void thread_has_read(Mutex *self, Register *r) {
    Entrant *e = register_mine(r);
    if (UNLIKELY(!e || !reads_find(self))) return; /* a child of a fork, that is not in */
    reads_take_off(self);
    reader_out(r->table, e);
}

/* ==== 4. For tasks ==== */

/* A reading call of a task, which is counted out when nobody refers to it any more: so an interrupt that comes between two
 * steps of Python, wherever, leaves nobody in.  Made before the call is counted in. */
typedef struct {
    PyObject_HEAD
    PyObject *weakrefs;
    Register *in; /* NULL: not in yet, or out again */
    uint32_t generation;
} InTask;

static InTask *in_task_new(Mutex *self) {
    State *state = state_of((PyObject *)self);
    PyTypeObject *type = state ? (PyTypeObject *)state->in_task_type : NULL;
    return type ? (InTask *)type->tp_alloc(type, 0) : NULL;
}

/* It is counted in by that. */
static PyObject *in_task_enter(InTask *in, Register *r) {
    in->generation = process.generation;
    in->in = (Register *)Py_NewRef(r);
    return (PyObject *)in;
}

/* Once; in a child of a fork, that is not in: nothing. */
static void in_task_end(InTask *in) {
    Register *r = __atomic_exchange_n(&in->in, NULL, __ATOMIC_ACQ_REL);
    Entrant *e = r && in->generation == process.generation ? register_mine(r) : NULL;
    if (e) reader_out(r->table, e);
    Py_XDECREF(r);
}

static PyObject *in_task_leave(InTask *self, PyObject *Py_UNUSED(ignored)) {
    in_task_end(self);
    Py_RETURN_NONE;
}

static void in_task_dealloc(InTask *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->weakrefs) PyObject_ClearWeakRefs((PyObject *)self);
    in_task_end(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef in_task_methods[] = {
    {"leave", (PyCFunction)in_task_leave, METH_NOARGS, "leave(): the end of it; again: nothing."},
    {NULL},
};

static PyMemberDef in_task_members[] = {
    {"register", T_OBJECT, offsetof(InTask, in), READONLY, "By which it is in, or None."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(InTask, weakrefs), READONLY, NULL},
    {NULL},
};

static PyType_Slot in_task_slots[] = {
    {Py_tp_doc, "A reading call of a task, as long as somebody refers to it."},
    {Py_tp_dealloc, in_task_dealloc},
    {Py_tp_methods, in_task_methods},
    {Py_tp_members, in_task_members},
    {0},
};

static PyType_Spec in_task_spec = {"coheld._native.InTask", sizeof(InTask), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, in_task_slots};

/* _keep_register(register): of its readers, from now on; by the owner. */
static PyObject *mutex_keep_register(Mutex *self, PyObject *given) {
    State *state = state_of((PyObject *)self);
    if (!state || !PyObject_TypeCheck(given, (PyTypeObject *)state->register_type))
        return PyErr_Format(PyExc_TypeError, "a register, not %R", given);
    __atomic_store_n(&self->readers, (Register *)Py_NewRef(given), __ATOMIC_RELEASE); /* the former one, if any, stays */
    Py_RETURN_NONE;
}

/* _read(obj, method: bytes, again: bool) -> how a task is in, or the lock, of which the caller, who owns it, has a level
 * more; None: not now. */
static PyObject *mutex_py_read(Mutex *self, PyObject *args) {
    PyObject *obj;
    const char *text;
    Py_ssize_t size;
    int again;
    if (!PyArg_ParseTuple(args, "Oy#p:_read", &obj, &text, &size, &again)) return NULL;
    Label method = label_of(text, size);
    if (self->queued && !again && !(self->cell && holds(self, self->cell))) Py_RETURN_NONE;
    InTask *in = in_task_new(self);
    PyObject *how = in ? mutex_read(self, obj, &method, 0, again) : NULL;
    if (how && how != (PyObject *)self) return in_task_enter(in, (Register *)how);
    Py_XDECREF(in);
    return how ? Py_NewRef(how) : PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* _read_on() -> how a task is in: the owner of the mutex counts a reader of this process in. */
static PyObject *mutex_read_on(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    if (!c || !still_mine(c)) return call_hook(self, "_not_owner", NULL), NULL;
    InTask *in = in_task_new(self);
    Register *r = in ? read_from_now_on(self, c) : NULL;
    if (r) return in_task_enter(in, r);
    Py_XDECREF(in);
    return NULL;
}

static PyObject *mutex_get_readers(Mutex *self, void *Py_UNUSED(closure)) {
    Register *r = __atomic_load_n(&self->readers, __ATOMIC_ACQUIRE);
    return Py_NewRef(r ? (PyObject *)r : Py_None);
}
#endif
