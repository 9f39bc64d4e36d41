/* The Python types over the robust mutex of _lock.h and the areas of _segment.h, and the fast path of a locked call.
 *
 * Everything between the lock taken and the lock given back is C: no bytecode boundary of ours lies there, so an
 * interrupt cannot leave a lock held.  Ownership is per thread and lives in _lock.h; what an object has besides says
 * beside each field what protects it without the GIL.  "Once" means: before any other thread can have the object.
 */

/* ==== 1. Includes ==== */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "_segment.h"
#include "_state.h"
#include "_register.h"
#include "_table.h"

#if PY_VERSION_HEX < 0x030d0000
#define Py_IsFinalizing _Py_IsFinalizing
#endif

/* ==== 2. Module state and small helpers ==== */

/* Written when the module is imported, under the import lock, before there is a lock or a locked method.  A lockable.py
 * that is reloaded writes the last three again: what was there stays alive, as a thread may be in it. */
typedef struct {
    PyObject *segment_type;
    PyObject *mutex_base;      /* the C type */
    PyObject *view_type;
    PyObject *register_type;
    PyObject *in_task_type;
    PyTypeObject *mutex_type;  /* its subclass in backends/shm.py, whose calls go the short way */
    PyTypeObject *handle_type; /* the base of what a locked call accepts: locks of other backends are called by name */
    PyObject *not_initialized; /* function(obj): raises */
    PyObject *reduce_locked;   /* function(locked, protocol): how a locked method pickles */
    PyObject *name_lock;       /* "__lock__" */
    PyObject *running_loop;    /* function(): of asyncio; NULL: not loaded yet.  Atomic, always with the same value */
    PyObject *tasks;           /* function(loop), or before 3.12 the dict: the task that runs.  As running_loop, and before it */
} State;

static struct PyModuleDef module_def;

static State *state_of(PyObject *self) { /* self: an object of a subclass of one of our types */
    PyObject *module = PyType_GetModuleByDef(Py_TYPE(self), &module_def);
    return module ? PyModule_GetState(module) : NULL;
}

/* self.name(arg): -1 where it raises, else the truth of what it returns.  arg may be NULL. */
static int call_hook(void *self, const char *name, PyObject *arg) {
    PyObject *result = PyObject_CallMethod(self, name, arg ? "(O)" : NULL, arg);
    if (!result) return -1;
    int truth = PyObject_IsTrue(result);
    Py_DECREF(result);
    return truth;
}

/* Restore a fetched exception, if there was one; or it becomes the context of one that was raised since. */
static void restore_before(PyObject *type, PyObject *error, PyObject *trace) {
    PyObject *newer_type, *newer, *newer_trace;
    if (!type) return;
    PyErr_Fetch(&newer_type, &newer, &newer_trace);
    if (!newer_type) {
        PyErr_Restore(type, error, trace);
        return;
    }
    PyErr_NormalizeException(&newer_type, &newer, &newer_trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace) PyException_SetTraceback(error, trace);
    PyException_SetContext(newer, Py_NewRef(error));
    PyErr_Restore(newer_type, newer, newer_trace);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
}

/* A time-out in seconds as nanoseconds: None is FOREVER, and whatever is not above zero is 0: try once. */
static int parse_timeout(PyObject *timeout, uint64_t *ns) {
    *ns = FOREVER;
    if (!timeout || timeout == Py_None) return 0;
    if (!PyFloat_Check(timeout) && !PyIndex_Check(timeout) && !PyType_GetSlot(Py_TYPE(timeout), Py_nb_float)) {
        PyErr_Format(PyExc_TypeError, "timeout must be a number of seconds or None, not %.100s",
                     Py_TYPE(timeout)->tp_name);
        return -1;
    }
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) PyErr_SetString(PyExc_ValueError, "timeout is too large a number");
        return -1;
    }
    if (seconds != seconds) {
        PyErr_SetString(PyExc_ValueError, "timeout must not be NaN");
        return -1;
    }
    if (seconds < 9e9) *ns = seconds > 0 ? (uint64_t)(seconds * 1e9) : 0; /* 285 years and more: for ever */
    return 0;
}

/* ==== 3. Segment: a mapped file of cells ==== */

typedef struct {
    PyObject_HEAD
    Area area; /* see there */
} Segment;

/* Segment(fd, length, least): map up to length bytes of the file, at least least where address space is short.
 * Owns fd from then on, also where it fails. */
static PyObject *segment_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    int fd;
    Py_ssize_t length, least;
    if (!PyArg_ParseTuple(args, "inn:Segment", &fd, &length, &least)) return NULL;
    Area area = {0};
    if (area_map(&area, fd, (size_t)length, (size_t)least)) return PyErr_SetFromErrno(PyExc_OSError);
    Segment *self = (Segment *)type->tp_alloc(type, 0);
    if (self)
        self->area = area;
    else
        area_unmap(&area);
    return (PyObject *)self;
}

/* Close the descriptor, and with it this process's share of the flock; the mapping stays. */
static PyObject *segment_close(Segment *self, PyObject *Py_UNUSED(ignored)) {
    area_close(&self->area);
    Py_RETURN_NONE;
}

/* Unmapping is safe here: no Mutex refers to the segment, and one that was dropped while this process held its
 * cell has made the segment immortal (mutex_dealloc). */
static void segment_dealloc(Segment *self) {
    PyTypeObject *type = Py_TYPE(self);
    area_unmap(&self->area);
    type->tp_free(self);
    Py_DECREF(type);
}

/* take() -> int: the offset of a cell that nobody else has.  OSError (ENOSPC: the file system is full; ENOMEM: the
 * mapping is) leaves everything as it was. */
static PyObject *segment_take(Segment *self, PyObject *Py_UNUSED(ignored)) {
    size_t offset = 0;
    errno = area_take(&self->area, &offset);
    return errno ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSize_t(offset);
}

/* The place of a cell, or NULL and an exception. */
static Cell *segment_place(Segment *self, PyObject *number) {
    size_t offset = PyLong_AsSize_t(number);
    if (offset == (size_t)-1 && PyErr_Occurred()) return NULL;
    Cell *c = area_cell(&self->area, offset);
    if (!c) PyErr_Format(PyExc_ValueError, "no cell at offset %zu", offset);
    return c;
}

/* holds(offset): does the file reach so far?  Beyond its end there is no memory behind the mapping. */
static PyObject *segment_holds(Segment *self, PyObject *arg) {
    size_t offset = PyLong_AsSize_t(arg);
    if (offset == (size_t)-1 && PyErr_Occurred()) return NULL;
    return PyBool_FromLong(area_reaches(&self->area, offset));
}

/* make(offset): initialise a cell of a file that is not published yet. */
static PyObject *segment_make(Segment *self, PyObject *arg) {
    Cell *c = segment_place(self, arg);
    if (!c) return NULL;
    cell_init(c);
    Py_RETURN_NONE;
}

/* revive(offset): a cell of before the last boot; nobody uses the file meanwhile.  Who held it then is dead. */
static PyObject *segment_revive(Segment *self, PyObject *arg) {
    Cell *c = segment_place(self, arg);
    if (!c) return NULL;
    cell_revive(c);
    Py_RETURN_NONE;
}

/* The whole mapping, for Python to read and write; it stays as long as the buffer is in use. */
static int segment_getbuffer(Segment *self, Py_buffer *view, int flags) {
    return PyBuffer_FillInfo(view, (PyObject *)self, self->area.base, (Py_ssize_t)self->area.length, 0, flags);
}

static PyMemberDef segment_members[] = {
    {"generation", T_UINT, offsetof(Segment, area.generation), READONLY, "Forks behind the process that mapped it."},
    {"length", T_PYSSIZET, offsetof(Segment, area.length), READONLY, "Bytes mapped."},
    {NULL},
};

static PyMethodDef segment_methods[] = {
    {"take", (PyCFunction)segment_take, METH_NOARGS, "take() -> offset of a cell that nobody else has."},
    {"holds", (PyCFunction)segment_holds, METH_O, "holds(offset) -> does the file reach so far?"},
    {"make", (PyCFunction)segment_make, METH_O, "make(offset): initialise a cell of an unpublished file."},
    {"revive", (PyCFunction)segment_revive, METH_O, "revive(offset): a cell of before the last boot."},
    {"close", (PyCFunction)segment_close, METH_NOARGS, "close(): close the descriptor; the mapping stays."},
    {NULL},
};

static PyType_Slot segment_slots[] = {
    {Py_tp_doc, "Segment(fd, length, least): a mapped file of cells; owns fd."},
    {Py_tp_new, segment_new},
    {Py_tp_dealloc, segment_dealloc},
    {Py_tp_members, segment_members},
    {Py_tp_methods, segment_methods},
    {Py_bf_getbuffer, segment_getbuffer},
    {0},
};

static PyType_Spec segment_spec = {"coheld._native.Segment", sizeof(Segment), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, segment_slots};

/* ==== 4. Mutex: one handle per resource and process ==== */

typedef struct {
    PyObject_HEAD
    Cell *cell;           /* atomic.  NULL: not attached (yet).  Replaced only where it is marked REMOVED, and such a cell
                             is held by nobody: so whoever holds a cell releases the one that it took */
    Segment *segment;     /* strong; keeps the cell mapped.  Atomic; written under the guard of the handles (base.py), and
                             one that is replaced is never freed, so that a borrowed reference stays good */
    size_t offset;        /* of the cell in the segment.  Once: another segment of the name has it in the same place */
    PyObject *resource;   /* what it is and how to attach, for base.py.  Once */
    PyObject *weakrefs;   /* the interpreter's */
    View *view;           /* of the shared state; NULL: not looked at yet.  Replaced only by one that refers to its siblings.
                             Atomic; one that is replaced is not freed while the handle lives */
    View *pending;        /* borrowed: the view, where the owner may have changed something; else NULL.  By the owner only,
                             as the next four are */
    int atomic;           /* how many atomic calls it is in */
    char guarding;        /* it is in a guard, and may not write */
    char creating;        /* it is in __create__, and may not let others in */
    char told;            /* observers have heard that it has the lock, see _observe.h */
    uint64_t next_check;  /* when to look again whether the file still has its name, ns; FOREVER: it has none.  Atomic */
    Register *readers;    /* of the cell; NULL: not opened yet.  Atomic; one that is replaced is never freed */
    PyObject *task;       /* weak reference to the owning task, or to the last; under the handle's critical section */
    Slot *seat;           /* in the table, for the name of the owning task, or of the last; NULL: there is none.  By the owner
                             only, as the next two are */
    PyObject *place;      /* keeps the seat */
    uint32_t seated;      /* 1 + the process's generation when it asked for the seat; 0: never */
    char queued;          /* tasks of this process wait for it in a queue.  Under the guard of that, see lookout.py */
    uint64_t task_nonce;  /* of the same.  Atomic */
    uint64_t step_thread, step; /* this thread, in this version of its context, was seen to run that task.  Atomic */
    uint32_t forks;       /* of this process when the handle was made: a child may have the cell of an older one.  Once */
    char shared;          /* others may have the cell, by pickle or by name: it is never reused.  Goes up, never down, by
                             one who has the handle; read when nobody has it any more */
} Mutex;

static inline Cell *cell_of(Mutex *self) { return __atomic_load_n(&self->cell, __ATOMIC_ACQUIRE); }

static int mutex_bind_cell(Mutex *self, Segment *segment, size_t offset) {
    Cell *c = area_cell(&segment->area, offset);
    if (!c || !cell_sane(c)) {
        PyErr_Format(PyExc_ValueError, "no lock at offset %zu", offset);
        return -1;
    }
    /* A segment that is replaced stays mapped for ever: a thread may still be on its way out of the old cell. */
    STORE(&self->offset, offset);
    __atomic_store_n(&self->segment, (Segment *)Py_NewRef(segment), __ATOMIC_RELEASE);
    __atomic_store_n(&self->view, NULL, __ATOMIC_RELEASE); /* of the cell before: stays, for the same reason */
    __atomic_store_n(&self->readers, NULL, __ATOMIC_RELEASE);
    __atomic_store_n(&self->cell, c, __ATOMIC_RELEASE);
    return 0;
}

/* Mutex(resource, segment=None, offset=0, class_number=0): that number, if there is one, is written into a cell of one's own. */
static PyObject *mutex_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *resource, *segment = Py_None;
    Py_ssize_t offset = 0;
    unsigned class_number = 0;
    if (!PyArg_ParseTuple(args, "O|OnI:Mutex", &resource, &segment, &offset, &class_number)) return NULL;
    PyObject *module = PyType_GetModuleByDef(type, &module_def);
    State *state = module ? PyModule_GetState(module) : NULL;
    Mutex *self = state ? (Mutex *)type->tp_alloc(type, 0) : NULL;
    if (!self) return NULL;
    self->resource = Py_NewRef(resource);
    self->next_check = FOREVER;
    self->forks = LOAD(&process.forks);
    if (segment == Py_None) return (PyObject *)self;
    if (!PyObject_TypeCheck(segment, (PyTypeObject *)state->segment_type))
        PyErr_SetString(PyExc_TypeError, "segment must be a Segment");
    else if (!mutex_bind_cell(self, (Segment *)segment, (size_t)offset)) {
        if (class_number) STORE(&self->cell->class_number, class_number);
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return NULL;
}

/* The files beside a cell go before that is somebody else's.  What is raised here is nobody's. */
static void mutex_drop_files(Mutex *self) {
    PyObject *type, *error, *trace;
    int stated = self->view && LOAD(&self->cell->version);
    if (!stated && !self->readers) return;
    PyErr_Fetch(&type, &error, &trace);
    if (stated && hook_of(self->view, "_unlink", "()")) PyErr_WriteUnraisable((PyObject *)self->view);
    if (self->readers && call_hook(self->readers, "unlink", NULL) < 0) PyErr_WriteUnraisable((PyObject *)self->readers);
    PyErr_Restore(type, error, trace);
}

/* A cell goes back to its arena only if no other process can know it and nobody holds it.  Held by a thread of this
 * process: its memory must stay what it is until that thread ends, so the segment is never unmapped. */
static void mutex_dealloc(Mutex *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->weakrefs) PyObject_ClearWeakRefs((PyObject *)self);
    if (self->cell) {
        Cell *c = self->cell;
        if (word_load(c) & FUTEX_TID_MASK) {
            if (LOAD(&c->owner.who) == LOAD(&process.who)) Py_INCREF(self->segment);
        } else if (self->forks == LOAD(&process.forks) && !self->shared) {
            mutex_drop_files(self);
            __atomic_store_n(word_of(c), 0, __ATOMIC_RELEASE); /* the death of an owner before is no news to the next */
            area_give_back(&self->segment->area, c);
        }
    }
    Py_XDECREF(self->view);
    Py_XDECREF(self->readers);
    Py_XDECREF(self->segment);
    Py_XDECREF(self->resource);
    Py_XDECREF(self->task);
    Py_XDECREF(self->place);
    type->tp_free(self);
    Py_DECREF(type);
}

/* What an owner of this process had not committed never was: it died, or was given up by what it called. */
static void __attribute__((noinline)) mutex_discard(Mutex *self) {
    View *view = self->pending;
    self->pending = NULL;
    view_discard(view);
}

/* Give one level back, without a commit. */
static void mutex_abandon(Mutex *self, Cell *c) {
    if (self->pending) mutex_discard(self);
    cell_release(c);
}

/* Do I hold it?  Also in a child that a hook or a signal's handler has forked, which does not know itself yet. */
static int still_mine(Cell *c) {
    if (UNLIKELY(!me.tid)) find_myself();
    return cell_mine(c);
}

/* The calling thread's first acquire: others are to know its name, so it gets a slot in the table, if there is one to be
 * had.  Nothing is held or waited for yet.  0; -1: a signal's handler has raised meanwhile. */
static int __attribute__((noinline)) introduce_myself(Mutex *self) {
    if (!me.tid) find_myself();
    me.known = 1; /* first: the hook may take locks, and is not asked again */
    if (Py_IsFinalizing()) return 0; /* the modules that the hook needs are being taken down */
    if (call_hook(self, "_enlist", NULL) >= 0) return 0;
    me.known = 0;
    return -1;
}

#include "_task.h"
#include "_wait.h"

static Label label_of(const char *text, Py_ssize_t size) {
    Label label = {{0}};
    memcpy(label.text, text, (size_t)(size < LABEL_SIZE ? size : LABEL_SIZE));
    return label;
}

static PyObject *label_text(const Label *label) {
    Label copy = *label;
    return PyUnicode_DecodeUTF8(copy.text, (Py_ssize_t)strnlen(copy.text, LABEL_SIZE), "ignore");
}

/* (pid, start, tid, method) */
static PyObject *record_tuple(const Record *r) {
    uint64_t who = LOAD(&r->who);
    return Py_BuildValue("IKIN", (unsigned)(who & ((1u << PID_BITS) - 1)), (unsigned long long)(who >> PID_BITS),
                         LOAD(&r->tid), label_text(&r->method));
}

#include "_reading.h"

/* A hook that the owner calls.  What it returns, or -1: it raised, or it forked and we are the child. */
static int settle_by(Mutex *self, Cell *c, const char *name, PyObject *arg) {
    int rc = arg ? call_hook(self, name, arg) : -1;
    if (rc < 0 || still_mine(c)) return rc;
    call_hook(self, "_not_owner", NULL);
    return -1;
}

/* The rare duties of a new owner: 1, go on; 0, the cell is retired and left, begin again; -1, raised and left;
 * ETIMEDOUT, left: who worked on behalf of a dead owner is still there, or somebody reads. */
static int mutex_settle(Mutex *self, Cell *c, PyObject *obj, const Record *dead, uint64_t deadline, const char *stop,
                        int reads) {
    int rc;
    if (!obj) obj = Py_None;
    if (dead) {
        PyObject *who = record_tuple(dead);
        rc = settle_by(self, c, "_owner_died", who);
        Py_XDECREF(who);
        if (rc < 0) goto failed;
    }
    if (LOAD(&c->flags) & WARDED) {
        PyObject *until = PyFloat_FromDouble(deadline == FOREVER ? Py_HUGE_VAL : (double)deadline / 1e9);
        int gone = settle_by(self, c, "_await_ward", until);
        Py_XDECREF(until);
        if (gone < 0) goto failed;
        if (!gone) {
            mutex_abandon(self, c);
            return ETIMEDOUT;
        }
    }
    if (LOAD(&c->since) >= LOAD(&self->next_check)) {
        STORE(&self->next_check, LOAD(&c->since) + SLICE);
        int linked = settle_by(self, c, "_look", obj);
        if (linked < 0) goto failed;
        if (!linked) cell_retire(c);
    }
    if (LOAD(&c->flags) & REMOVED) {
        PyObject *left = PyLong_FromVoidPtr(c);
        mutex_abandon(self, c);
        int attached = left ? call_hook(self, "_attach", left) : -1;
        Py_XDECREF(left);
        return attached < 0 ? -1 : 0;
    }
    if (LOAD(&c->flags) & READERS && (!reads || LOAD(&c->flags) & RECOVERING)) {
        if ((rc = await_readers(self, c, deadline, stop)) < 0) goto failed;
        if (rc) {
            mutex_abandon(self, c);
            return ETIMEDOUT;
        }
    }
    if (LOAD(&c->flags) & RECOVERING && settle_by(self, c, "_recover", obj) < 0) goto failed;
    return 1;
failed:
    if (still_mine(c)) mutex_abandon(self, c);
    return -1;
}

/* As mutex_acquire.  reads: to count a reader in, with the others who read. */
static int mutex_acquire_or_stop(Mutex *self, PyObject *obj, const Label *method, uint64_t timeout, const char *stop,
                                 int reads) {
    uint64_t deadline = 0;
    for (;;) {
        Cell *c = cell_of(self);
        Record dead;
        int rc;
        if (UNLIKELY(!c)) {
            if (call_hook(self, "_attach", NULL) < 0) return -1;
            continue;
        }
        if (UNLIKELY(!me.known)) { /* who is known has found itself, too */
            if (introduce_myself(self)) return -1;
            continue; /* a handler may have forked, and this be the child */
        }
        if (cell_mine(c)) {
            rc = cell_again(c);
            return rc ? call_hook(self, "_too_deep", NULL) : 1;
        }
        if (cell_tasked(c) && task_mine(self, c)) return task_again(self, c);
        if (UNLIKELY(me.held >= HELD_LIMIT)) return call_hook(self, "_too_many", NULL);
        rc = UNLIKELY(LOAD(&c->handoff)) && timeout ? EBUSY : cell_try(c, NULL, &dead);
        if (UNLIKELY(rc == EBUSY)) {
            if (cell_tasked(c) && !LOAD(&c->handoff) && (rc = look_at_task(self, c, timeout != 0))) {
                if (rc < 0) return -1;
                if (!(word_load(c) & FUTEX_TID_MASK)) continue;
            }
            if (!timeout) return 0;
            if (UNLIKELY(self->readers != NULL) && refuse_to_wait(self)) return -1;
            if (!deadline) deadline = timeout == FOREVER ? FOREVER : clock_ns(CLOCK_MONOTONIC) + timeout;
            rc = cell_spin(c, &dead);
            if (rc == EBUSY) rc = mutex_wait(self, c, deadline, stop, method, &dead);
            if (rc == EALREADY) continue;
        }
        if (UNLIKELY(rc && rc != EOWNERDEAD)) {
            if (rc > 0 && rc != ETIMEDOUT) rc = call_hook(self, "_broken", NULL);
            return rc < 0 ? -1 : 0;
        }
        cell_begin(c, method);
        self->atomic = self->guarding = self->creating = self->told = 0;
        if (UNLIKELY(self->pending != NULL)) mutex_discard(self); /* of a thread that ended here, or before the fork */
        if (LIKELY(!rc && !(LOAD(&c->flags) & (RECOVERING | REMOVED | WARDED | READERS)) && LOAD(&c->since) < LOAD(&self->next_check)))
            return 1;
        if (!deadline) deadline = timeout == FOREVER ? FOREVER : clock_ns(CLOCK_MONOTONIC) + timeout;
        rc = mutex_settle(self, c, obj, rc ? &dead : NULL, deadline, stop, reads);
        if (rc) return rc == ETIMEDOUT ? 0 : rc;
    }
}

/* The changes so far become the last commit.  0, or -1: raised, the last commit stands.  An exception that is there
 * already stays, or becomes the context of the new one. */
static int __attribute__((noinline)) mutex_commit(Mutex *self) {
    PyObject *type, *error, *trace;
    int rc = 0;
    PyErr_Fetch(&type, &error, &trace);
    while (self->pending && !rc) { /* again, if a signal's handler has changed more meanwhile */
        rc = view_commit(self->pending);
        if (self->pending && (rc || !view_marked(self->pending))) self->pending = NULL; /* before: a child forks with it */
    }
    restore_before(type, error, trace);
    return rc;
}

static int task_release(Mutex *self, Cell *c, uint64_t nonce);
static int tell_given(Mutex *self, int rc);
static int release_and_tell(Mutex *self, Cell *c, int rc);

/* One level back.  0.  -1: not mine, nothing changed; the caller says so.  -2: given back, and the commit has raised. */
static inline int mutex_release(Mutex *self) {
    Cell *c = cell_of(self);
    int rc = 0;
    if (UNLIKELY(!c)) return -1;
    if (UNLIKELY(!still_mine(c))) return task_mine(self, c) ? task_release(self, c, LOAD(&self->task_nonce)) : -1;
    if (UNLIKELY(self->pending != NULL) && LOAD(&c->owner.depth) == 1) {
        rc = mutex_commit(self) ? -2 : 0;
        if (UNLIKELY(!still_mine(c))) return rc ? rc : -1; /* a handler has forked, and this is the child */
    }
    if (UNLIKELY(self->told)) return release_and_tell(self, c, rc);
    cell_release(c);
    return rc;
}

/* A level of the task of that nonce is given back, whoever runs: one that is destroyed is not what runs.  As mutex_release. */
static int task_release(Mutex *self, Cell *c, uint64_t nonce) {
    int rc = 0;
    if (!task_owns(self, c) || nonce != LOAD(&self->task_nonce)) return -1;
    if (LOAD(&c->owner.depth) > 1) {
        STORE(&c->owner.depth, LOAD(&c->owner.depth) - 1);
        return 0;
    }
    if (UNLIKELY(self->pending != NULL)) rc = mutex_commit(self) ? -2 : 0;
    if (!task_owns(self, c)) return rc ? rc : -1; /* a handler has forked, and this is the child */
    STORE(&self->step_thread, 0);
    int told = self->told;
    if (!cell_end_task(c, nonce, 1)) return -1;
    return UNLIKELY(told) ? tell_given(self, rc) : rc;
}

#include "_observe.h"

static const Label no_label = {{0}};

/* The arguments of acquire: how long to wait, ns. */
static int parse_acquire(PyObject *args, PyObject *kwargs, uint64_t *timeout) {
    static char *names[] = {"blocking", "timeout", "block", NULL};
    PyObject *blocking = Py_True, *seconds = NULL, *block = NULL;
    *timeout = FOREVER;
    if (LIKELY(!PyTuple_GET_SIZE(args) && !kwargs)) return 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO$O:acquire", names, &blocking, &seconds, &block)) return -1;
    int truth = PyObject_IsTrue(block ? block : blocking);
    if (truth < 0 || parse_timeout(seconds, timeout)) return -1;
    if (!truth) *timeout = 0;
    return 0;
}

static PyObject *release_or_raise(Mutex *self) {
    int rc = mutex_release(self);
    if (UNLIKELY(rc == -1)) call_hook(self, "_not_owner", NULL);
    return rc ? NULL : Py_NewRef(Py_None);
}

#define ACQUIRE_DOC                                                                                                  \
    "acquire(blocking=True, timeout=None)\n--\n\n"                                                                   \
    "Take the lock; True if it is held now, False if it could not be had.\n\n"                                       \
    "Blocks the calling thread for at most timeout seconds (None: for ever; zero or less: tries once), on the\n"     \
    "monotonic clock; with blocking=False it tries once and timeout is not looked at. The owner may take it again\n" \
    "and must release it as often. A signal's handler runs at once; if it raises, the lock is not held."
#define RELEASE_DOC                                          \
    "release()\n--\n\n"                                      \
    "Give one level of the lock back; never blocks.\n\n"     \
    "Raises NotOwnerError, an AssertionError and a RuntimeError, if the calling thread does not hold it."

static PyObject *mutex_py_acquire(Mutex *self, PyObject *args, PyObject *kwargs) {
    uint64_t timeout;
    int rc = parse_acquire(args, kwargs, &timeout) ? -1 : mutex_acquire(self, NULL, &no_label, timeout);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

static PyObject *mutex_py_release(Mutex *self, PyObject *Py_UNUSED(ignored)) { return release_or_raise(self); }

static PyObject *mutex_enter(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    return mutex_acquire(self, NULL, &no_label, FOREVER) < 0 ? NULL : Py_NewRef(self);
}

static PyObject *mutex_exit(Mutex *self, PyObject *Py_UNUSED(args)) { return release_or_raise(self); }

static PyObject *mutex_bind(Mutex *self, PyObject *args) {
    PyObject *segment;
    Py_ssize_t offset;
    State *state = state_of((PyObject *)self);
    if (!state || !PyArg_ParseTuple(args, "O!n:bind", state->segment_type, &segment, &offset)) return NULL;
    if (mutex_bind_cell(self, (Segment *)segment, (size_t)offset)) return NULL;
    self->shared = 1;
    Py_RETURN_NONE;
}

static PyObject *mutex_watch(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    STORE(&self->next_check, 0); /* at the next acquire, and then once a second */
    Py_RETURN_NONE;
}

static PyObject *not_attached(void) { return PyErr_Format(PyExc_RuntimeError, "not attached to a lock"); }

/* _flag(bit, up): the caller holds the lock. */
static PyObject *mutex_flag(Mutex *self, PyObject *args) {
    unsigned bit;
    int up;
    if (!PyArg_ParseTuple(args, "Ip:_flag", &bit, &up)) return NULL;
    Cell *c = cell_of(self);
    if (!c) return not_attached();
    if (!holds(self, c)) return call_hook(self, "_not_owner", NULL), NULL;
    if (up && bit & REMOVED) cell_retire(c);
    if (up)
        flags_up(c, bit);
    else
        flags_down(c, bit);
    Py_RETURN_NONE;
}

/* _record() -> (depth, since_ns, (pid, start, tid, method)): the owner, or where depth is 0 the last one. */
static PyObject *mutex_record(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    if (!c) return not_attached();
    unsigned depth = word_load(c) & FUTEX_TID_MASK || cell_tasked(c) ? __atomic_load_n(&c->owner.depth, __ATOMIC_ACQUIRE) : 0;
    return Py_BuildValue("IKN", depth, (unsigned long long)LOAD(&c->since), record_tuple(&c->owner));
}

/* _task_address() of the owning task, in its process; 0: a thread has it, or nobody. */
static PyObject *mutex_task_address(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    return PyLong_FromUnsignedLongLong(c && cell_tasked(c) ? LOAD(&c->task_address) : 0);
}

/* _dead() -> (pid, start, tid, method) of the owner whose work __recover__ has to look at. */
static PyObject *mutex_dead(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    return c ? record_tuple(&c->dead) : not_attached();
}

/* _counters() -> (acquisitions, contended, recoveries, waiters) */
static PyObject *mutex_counters(Mutex *self, PyObject *Py_UNUSED(ignored)) {
    Cell *c = cell_of(self);
    if (!c) return not_attached();
    return Py_BuildValue("KKII", (unsigned long long)LOAD(&c->acquisitions), (unsigned long long)LOAD(&c->contended),
                         LOAD(&c->recoveries), cell_waiting(c));
}

static PyObject *mutex_get_flags(Mutex *self, void *Py_UNUSED(closure)) {
    Cell *c = cell_of(self);
    return c ? PyLong_FromUnsignedLong(LOAD(&c->flags)) : not_attached();
}

static PyObject *mutex_get_offset(Mutex *self, void *Py_UNUSED(closure)) {
    return cell_of(self) ? PyLong_FromSize_t(LOAD(&self->offset)) : not_attached();
}

static PyObject *mutex_get_place(Mutex *self, void *Py_UNUSED(closure)) { return PyLong_FromVoidPtr(cell_of(self)); }
static PyObject *mutex_get_attached(Mutex *self, void *Py_UNUSED(closure)) { return PyBool_FromLong(!!cell_of(self)); }

#include "_shared.h"
#include "_entrust.h"

static PyMethodDef mutex_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))mutex_py_acquire, METH_VARARGS | METH_KEYWORDS, ACQUIRE_DOC},
    {"release", (PyCFunction)mutex_py_release, METH_NOARGS, RELEASE_DOC},
    {"__enter__", (PyCFunction)mutex_enter, METH_NOARGS, "Take the lock; blocks until it is held."},
    {"__exit__", (PyCFunction)mutex_exit, METH_VARARGS, "Release the lock."},
    {"bind", (PyCFunction)mutex_bind, METH_VARARGS, "bind(segment, offset): this cell from now on."},
    {"watch", (PyCFunction)mutex_watch, METH_NOARGS, "watch(): ask _look() about once a second."},
    {"_flag", (PyCFunction)mutex_flag, METH_VARARGS, "_flag(bit, up): by the owner only."},
    {"_mine", (PyCFunction)mutex_mine, METH_NOARGS, "_mine(): does the calling thread hold it?"},
    {"_adopt", (PyCFunction)mutex_adopt, METH_VARARGS, "_adopt(view, former) -> is it settled which view is used?"},
    {"_put", (PyCFunction)mutex_put, METH_VARARGS, "_put(index, value, mark): the owner's value of a field."},
    {"_commit", (PyCFunction)mutex_py_commit, METH_NOARGS, "_commit(): the owner's changes become the last commit."},
    {"_discard", (PyCFunction)mutex_py_discard, METH_NOARGS, "_discard(): the owner's changes are dropped."},
    {"_suspend", (PyCFunction)mutex_suspend, METH_O, "_suspend(loud) -> epoch: the owner gives all levels back."},
    {"_sleep", (PyCFunction)mutex_sleep, METH_VARARGS, "_sleep(epoch, until, method, timed) -> news."},
    {"_resume", (PyCFunction)mutex_resume, METH_VARARGS, "_resume(obj, method, levels, deadline, keep) -> got."},
    {"_task_take", (PyCFunction)mutex_task_take, METH_VARARGS, "_task_take(obj, method, patient) -> got, for the running task."},
    {"_task_give", (PyCFunction)mutex_task_give, METH_NOARGS, "_task_give(): one level of the task's is given back."},
    {"_task_deepen", (PyCFunction)mutex_task_deepen, METH_O, "_task_deepen(levels): the running task has so many more."},
    {"_wait_turn", (PyCFunction)mutex_wait_turn, METH_VARARGS, "_wait_turn(stop, reads) -> got, by a thread for a task."},
    {"_sit", (PyCFunction)mutex_sit, METH_VARARGS, "_sit(memory, offset, place): its owning tasks' seat in the table."},
    {"_entrust", (PyCFunction)mutex_py_entrust, METH_VARARGS, "_entrust(task, tid, method): what the thread has is its."},
    {"_nudge", (PyCFunction)mutex_nudge, METH_NOARGS, "_nudge(): all that wait look again."},
    {"_read", (PyCFunction)mutex_py_read, METH_VARARGS, "_read(obj, method, again) -> how a task is in, or None."},
    {"_read_on", (PyCFunction)mutex_read_on, METH_NOARGS, "_read_on() -> register: the owner counts a reader in."},
    {"_keep_register", (PyCFunction)mutex_keep_register, METH_O, "_keep_register(register): that of its readers."},
    {"_task_bury", (PyCFunction)mutex_task_bury, METH_O, "_task_bury(task): if that owned it, it is gone."},
    {"_observe", (PyCFunction)mutex_observe, METH_VARARGS, "_observe(obj, waited): the running task owns it now."},
    {"_record", (PyCFunction)mutex_record, METH_NOARGS, "_record(): (depth, since_ns, (pid, start, tid, method))."},
    {"_task_address", (PyCFunction)mutex_task_address, METH_NOARGS, "_task_address(): of the owning task; 0: none."},
    {"_dead", (PyCFunction)mutex_dead, METH_NOARGS, "_dead(): (pid, start, tid, method)."},
    {"_counters", (PyCFunction)mutex_counters, METH_NOARGS, "_counters(): (acquisitions, contended, recoveries, waiters)."},
    {NULL},
};

static PyMemberDef mutex_members[] = {
    {"resource", T_OBJECT_EX, offsetof(Mutex, resource), READONLY, "What it locks, and how to attach to it."},
    {"segment", T_OBJECT, offsetof(Mutex, segment), READONLY, "Where its cell is mapped, or None."},
    {"shared", T_BOOL, offsetof(Mutex, shared), 0, "It left this process: its cell is not reused."},
    {"atomic", T_INT, offsetof(Mutex, atomic), 0, "How many atomic calls the owner is in."},
    {"queued", T_BOOL, offsetof(Mutex, queued), 0, "Tasks of this process wait for it, and a newcomer does not pass them."},
    {"guarding", T_BOOL, offsetof(Mutex, guarding), 0, "The owner is in a guard."},
    {"creating", T_BOOL, offsetof(Mutex, creating), 0, "The owner is in __create__."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Mutex, weakrefs), READONLY, NULL},
    {NULL},
};

static PyGetSetDef mutex_getset[] = {
    {"task", (getter)mutex_get_task, NULL, "The task of this process that owns it, or None.", NULL},
    {"readers", (getter)mutex_get_readers, NULL, "The register of its readers, or None: not opened here.", NULL},
    {"version", (getter)mutex_get_version, NULL, "The word of the shared state; 0: none was committed.", NULL},
    {"pending", (getter)mutex_get_pending, NULL, "Has the owner touched what may be changed now?", NULL},
    {"view", (getter)mutex_get_view, NULL, "The View of the shared state, or None.", NULL},
    {"flags", (getter)mutex_get_flags, NULL, "RECOVERING | REMOVED | CREATED | WARDED.", NULL},
    {"offset", (getter)mutex_get_offset, NULL, "Where the cell is in its segment, bytes.", NULL},
    {"place", (getter)mutex_get_place, NULL, "Where the cell is in this process; 0: there is none.", NULL},
    {"attached", (getter)mutex_get_attached, NULL, "Is there a cell?", NULL},
    {NULL},
};

static PyType_Slot mutex_slots[] = {
    {Py_tp_doc, "Mutex(resource, segment=None, offset=0): a robust, re-entrant lock in shared memory."},
    {Py_tp_new, mutex_new},
    {Py_tp_dealloc, mutex_dealloc},
    {Py_tp_methods, mutex_methods},
    {Py_tp_members, mutex_members},
    {Py_tp_getset, mutex_getset},
    {0},
};

static PyType_Spec mutex_spec = {"coheld._native.Mutex", sizeof(Mutex), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                                 mutex_slots};

/* ==== 5. LockableBase, Field and LockedMethod ==== */

#include "_lockable.h"
#include "_field.h"
#include "_locked.h"
#include "_permits.h"

/* ==== 6. Module ==== */

static PyObject *native_install(PyObject *module, PyObject *args) {
    State *state = PyModule_GetState(module);
    PyObject *handle_type, *not_initialized, *reduce_locked;
    if (!PyArg_ParseTuple(args, "O!OO:install", &PyType_Type, &handle_type, &not_initialized, &reduce_locked))
        return NULL;
    state->handle_type = (PyTypeObject *)Py_NewRef(handle_type);
    state->not_initialized = Py_NewRef(not_initialized);
    state->reduce_locked = Py_NewRef(reduce_locked);
    Py_RETURN_NONE;
}

/* hasten(mutex_type): a subclass of Mutex whose methods none overrides; locked calls need not look them up. */
static PyObject *native_hasten(PyObject *module, PyObject *type) {
    State *state = PyModule_GetState(module);
    if (!PyType_Check(type) || !PyType_IsSubtype((PyTypeObject *)type, (PyTypeObject *)state->mutex_base))
        return PyErr_Format(PyExc_TypeError, "hasten() takes a subclass of Mutex");
    state->mutex_type = (PyTypeObject *)Py_NewRef(type);
    Py_RETURN_NONE;
}

/* tell_after(seconds): how long a wait is before it is told of; infinite: never. */
static PyObject *native_tell_after(PyObject *Py_UNUSED(module), PyObject *given) {
    double seconds = PyFloat_AsDouble(given);
    if (seconds == -1.0 && PyErr_Occurred()) return NULL;
    STORE(&tell_after, deadline_of(seconds));
    Py_RETURN_NONE;
}

static PyObject *native_generation(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    return PyLong_FromUnsignedLong(process.generation);
}

static PyMethodDef module_methods[] = {
    {"install", native_install, METH_VARARGS, "install(handle_type, not_initialized, reduce_locked): once, by lockable."},
    {"hasten", native_hasten, METH_O, "hasten(mutex_type): locked calls of these locks go the short way."},
    {"hang", native_hang, METH_VARARGS, "hang(obj, lock): set obj.__lock__ past any __setattr__."},
    {"peek", native_peek, METH_O, "peek(obj): what its __lock__ is, or None."},
    {"lock_of", native_lock_of, METH_O, "lock_of(obj): its lock; NotInitializedError if it has none."},
    {"task_enter", (PyCFunction)(void (*)(void))native_task_enter, METH_FASTCALL, "task_enter(obj, method) -> its lock, taken, or None."},
    {"tell_after", native_tell_after, METH_O, "tell_after(seconds): a wait that is longer is told of, once."},
    {"enlist", native_enlist, METH_VARARGS, "enlist(memory, offset): a slot in the table of waiters, for this thread; enlist(): none."},
    {"delist", native_delist, METH_VARARGS, "delist(memory, offset): that slot is this thread's no longer."},
    {"observe", native_observe, METH_O, "observe(on): observers are to be told."},
    {"generation", native_generation, METH_NOARGS, "generation(): how many forks are behind this process."},
    {NULL},
};

static int module_exec(PyObject *module) {
    State *state = PyModule_GetState(module);
    PyObject *base = NULL, *locked = NULL, *field = NULL, *semaphore = NULL;
    int ok = (state->name_lock = PyUnicode_InternFromString("__lock__"))
        && (state->segment_type = PyType_FromModuleAndSpec(module, &segment_spec, NULL))
        && (state->mutex_base = PyType_FromModuleAndSpec(module, &mutex_spec, NULL))
        && (state->view_type = PyType_FromModuleAndSpec(module, &view_spec, NULL))
        && (state->register_type = PyType_FromModuleAndSpec(module, &register_spec, NULL))
        && (state->in_task_type = PyType_FromModuleAndSpec(module, &in_task_spec, NULL))
        && (field = PyType_FromModuleAndSpec(module, &field_spec, NULL))
        && (base = PyType_FromModuleAndSpec(module, &base_spec, NULL))
        && (semaphore = PyType_FromModuleAndSpec(module, &semaphore_spec, NULL))
        && (locked = PyType_FromModuleAndSpec(module, &locked_spec, NULL))
        && !PyModule_AddType(module, (PyTypeObject *)state->segment_type)
        && !PyModule_AddType(module, (PyTypeObject *)state->mutex_base)
        && !PyModule_AddType(module, (PyTypeObject *)state->register_type)
        && !PyModule_AddType(module, (PyTypeObject *)state->view_type) && !PyModule_AddType(module, (PyTypeObject *)field)
        && !PyModule_AddType(module, (PyTypeObject *)semaphore) && !PyModule_AddType(module, (PyTypeObject *)base) && !PyModule_AddType(module, (PyTypeObject *)locked)
        && !PyModule_AddIntMacro(module, RECOVERING) && !PyModule_AddIntMacro(module, REMOVED)
        && !PyModule_AddIntMacro(module, TASKED) && !PyModule_AddIntMacro(module, READERS)
        && !PyModule_AddIntMacro(module, WARDED) && !PyModule_AddIntMacro(module, GUARDED)
        && !PyModule_AddIntMacro(module, CREATED) && !PyModule_AddIntMacro(module, CELL_SIZE)
        && !PyModule_AddIntMacro(module, HEADER_SIZE) && !PyModule_AddIntMacro(module, LAYOUT_VERSION)
        && !PyModule_AddIntMacro(module, HELD_LIMIT) && !PyModule_AddStringConstant(module, "LIBC", "glibc")
        && !PyModule_AddObjectRef(module, "SUPPORTED", lock_check() ? Py_True : Py_False);
    Py_XDECREF(base);
    Py_XDECREF(field);
    Py_XDECREF(semaphore);
    Py_XDECREF(locked);
    return ok ? 0 : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    State *state = PyModule_GetState(module);
    Py_VISIT(state->segment_type);
    Py_VISIT(state->mutex_base);
    Py_VISIT(state->view_type);
    Py_VISIT(state->register_type);
    Py_VISIT(state->in_task_type);
    Py_VISIT(state->mutex_type);
    Py_VISIT(state->handle_type);
    Py_VISIT(state->not_initialized);
    Py_VISIT(state->reduce_locked);
    return 0;
}

static int module_clear(PyObject *module) {
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->segment_type);
    Py_CLEAR(state->mutex_base);
    Py_CLEAR(state->view_type);
    Py_CLEAR(state->register_type);
    Py_CLEAR(state->in_task_type);
    Py_CLEAR(state->mutex_type);
    Py_CLEAR(state->handle_type);
    Py_CLEAR(state->not_initialized);
    Py_CLEAR(state->reduce_locked);
    Py_CLEAR(state->name_lock);
    Py_CLEAR(state->running_loop);
    Py_CLEAR(state->tasks);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "coheld._native", "The robust mutex and the fast path of a locked call.",
    sizeof(State), module_methods, module_slots, module_traverse, module_clear, module_free,
};

PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC PyInit__native(void) {
    static int prepared; /* importing twice, from another interpreter, must not register twice */
    if (!prepared) prepared = !pthread_atfork(count_fork, NULL, forget_parent);
    return PyModuleDef_Init(&module_def);
}
