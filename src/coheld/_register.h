/* Registers: which processes are in, and how many times each.  Of a lock's readers, or of a semaphore's permits.
 *
 * A file beside the cell (backends/register.py): a head, then a record for each process.
 *
 *   what       who may write it                                       when
 *   value      its maker, before it has its name                      permits; 0: readers
 *   used       the owner of the mutex                                 goes up: so many records were ever somebody's
 *   room       the owner of the mutex                                 goes up, behind the file: so many records fit in it
 *   who        the owner of the mutex                                 where it was nobody's, or its process is gone
 *   count      readers: the threads of the process, in one atomic     a dead one's: the owner of the mutex
 *              step each, with the mutex or without
 *              permits: the owner of the mutex
 *   free       the owner of the mutex                                 permits: value without all counts
 *   wanted     a writer that owns the mutex                           it waits for the readers
 *   news       a reader that leaves and finds wanted; sleepers sleep on it
 *
 * Why no reader meets a writer.  A reader counts itself in, and looks at the lock after that: it is in where the word is
 * free and no task owns, else it counts itself out again and queues for the mutex, under which it counts itself in.  A
 * writer has the lock before it looks at the counts.  Between the two steps of each stands a full fence: one of them at
 * least sees the other.  What both saw of a third is no matter: the writer waits until each count was 0 once, or its
 * process dead, and whoever counts itself in after that look has seen the writer.
 *
 * Why nobody is stuck.  A writer waits with the mutex, so later readers queue behind it, and it waits for those of the
 * moment only.  It sleeps in bounded slices and looks at the lives of the others: nobody need be awake to tell of a death.
 * If it is killed, the word says so, and the next in the queue inherits, as after every owner's death; wanted stays up,
 * and costs each reader a wake until the next writer takes it down.  A reader that holds already does not queue: its
 * count is not 0, and the writer waits for it.  A child of a fork has another who, and is not in.
 *
 * Why no permit is lost.  All is written by the owner of the mutex, and a death in between is told to the next, who adds
 * the counts up again.  A dead process's count is taken back by whoever finds none free.
 */

#ifndef COHELD_REGISTER_H
#define COHELD_REGISTER_H

/* ==== 1. Includes and records ==== */

#include "_lock.h"

typedef struct {
    uint64_t who;
    uint32_t count;
    uint32_t reserved;
    uint64_t unused[6]; /* a cache line each: readers of different processes do not slow one another down */
} Entrant;

typedef struct {
    char head[80]; /* backends/register.py writes it and reads it */
    uint64_t value;
    uint64_t free;
    uint32_t used;
    uint32_t room;
    uint32_t wanted;
    uint32_t news;
    uint64_t unused[2];
    Entrant entrants[];
} Table;

_Static_assert(sizeof(Entrant) == 64 && sizeof(Table) == 128, "the layout of a register is a file format");

typedef struct {
    PyObject_HEAD
    Py_buffer buffer;
    Table *table;     /* in the buffer.  Once */
    uint32_t most;    /* records that the mapping could hold.  Once */
    uint64_t mine;    /* forks behind us << 32 | number of this process's record + 1.  Atomic; under the mutex */
} Register;

static inline uint32_t register_used(const Register *r) {
    uint32_t used = __atomic_load_n(&r->table->used, __ATOMIC_ACQUIRE);
    return used < r->most ? used : r->most;
}

/* This process's record, or NULL: it has none yet. */
static inline Entrant *register_mine(const Register *r) {
    uint64_t mine = LOAD(&r->mine);
    if (UNLIKELY(mine >> 32 != process.generation || !(uint32_t)mine)) return NULL;
    return &r->table->entrants[(uint32_t)mine - 1];
}

/* ==== 2. By the owner of the mutex ==== */

/* The number of this process's record, also of one that it claimed by a handle that it has dropped; used: it has none. */
static uint32_t register_find(const Register *r) {
    uint32_t used = register_used(r), at = 0;
    while (at < used && r->table->entrants[at].who != LOAD(&process.who)) at++;
    return at;
}

/* A record for this process: its own, a dead one's, or a new one.  0; ENOSPC: the file is full. */
static int register_claim(Register *r) {
    Table *t = r->table;
    uint32_t used = register_used(r), at = register_find(r);
    uint64_t who = LOAD(&process.who);
    for (uint32_t i = 0; at == used && i < used; i++)
        if (process_gone(t->entrants[i].who)) at = i;
    if (at == used && (used >= r->most || used >= t->room)) return ENOSPC;
    Entrant *e = &t->entrants[at];
    if (e->who != who) {
        t->free += t->value ? e->count : 0;
        STORE(&e->count, 0);
        STORE(&e->who, who);
    }
    if (at == used) __atomic_store_n(&t->used, used + 1, __ATOMIC_RELEASE);
    STORE(&r->mine, (uint64_t)process.generation << 32 | (at + 1));
    return 0;
}

/* What dead processes have is nobody's. */
static void register_reap(Register *r) {
    Table *t = r->table;
    for (uint32_t i = 0, used = register_used(r); i < used; i++) {
        Entrant *e = &t->entrants[i];
        uint32_t count = LOAD(&e->count);
        if (!count || e->who == LOAD(&process.who) || !process_gone(e->who)) continue;
        if (t->value) t->free += count;
        STORE(&e->count, 0);
    }
}

/* After an owner's death. */
static void register_recount(Register *r) {
    uint64_t held = 0;
    for (uint32_t i = 0, used = register_used(r); i < used; i++) held += r->table->entrants[i].count;
    r->table->free = held < r->table->value ? r->table->value - held : 0;
}

/* Is anybody in, but for ours of this process's? */
static int register_busy(const Register *r) {
    for (uint32_t i = 0, used = register_used(r); i < used; i++)
        if (__atomic_load_n(&r->table->entrants[i].count, __ATOMIC_SEQ_CST)) return 1;
    return 0;
}

/* ==== 3. By a reader ==== */

/* What is loaded after these, SEQ_CST as well, is loaded after them: on x86 their lock prefix is the fence. */
static inline void reader_in(Entrant *e) { __atomic_fetch_add(&e->count, 1, __ATOMIC_SEQ_CST); }

static inline void reader_out(Table *t, Entrant *e) {
    __atomic_fetch_sub(&e->count, 1, __ATOMIC_SEQ_CST);
    if (LIKELY(!__atomic_load_n(&t->wanted, __ATOMIC_SEQ_CST))) return;
    __atomic_fetch_add(&t->news, 1, __ATOMIC_SEQ_CST);
    futex_wake(&t->news, INT_MAX);
}

/* ==== 4. The type ==== */

/* Register(memory): of a mapped file. */
static PyObject *register_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *memory;
    if (!PyArg_ParseTuple(args, "O:Register", &memory)) return NULL;
    Register *self = (Register *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    if (PyObject_GetBuffer(memory, &self->buffer, PyBUF_WRITABLE)) {
        Py_DECREF(self);
        return NULL;
    }
    if ((size_t)self->buffer.len < sizeof(Table) + sizeof(Entrant)) {
        Py_DECREF(self);
        return PyErr_Format(PyExc_ValueError, "a register is larger than that");
    }
    self->table = self->buffer.buf;
    self->most = (uint32_t)(((size_t)self->buffer.len - sizeof(Table)) / sizeof(Entrant));
    return (PyObject *)self;
}

static void register_dealloc(Register *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->buffer.obj) PyBuffer_Release(&self->buffer);
    type->tp_free(self);
    Py_DECREF(type);
}

/* counts() -> [(pid, start, count), …]: of the processes that are in, as far as can be seen without the lock. */
static PyObject *register_counts(Register *self, PyObject *Py_UNUSED(ignored)) {
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0, used = register_used(self); list && i < used; i++) {
        Entrant *e = &self->table->entrants[i];
        uint64_t who = LOAD(&e->who);
        uint32_t count = LOAD(&e->count);
        if (!count) continue;
        PyObject *one = Py_BuildValue("IKI", (unsigned)(who & ((1u << PID_BITS) - 1)), (unsigned long long)(who >> PID_BITS), count);
        if (!one || PyList_Append(list, one)) Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

static PyMethodDef register_methods[] = {
    {"counts", (PyCFunction)register_counts, METH_NOARGS, "counts() -> [(pid, start, count), …] of those that are in."},
    {NULL},
};

static PyType_Slot register_slots[] = {
    {Py_tp_doc, "Register(memory): which processes are in, and how many times each."},
    {Py_tp_new, register_new},
    {Py_tp_dealloc, register_dealloc},
    {Py_tp_methods, register_methods},
    {0},
};

static PyType_Spec register_spec = {"coheld._native.Register", sizeof(Register), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, register_slots};
#endif
