/* Which task runs, and does it own?  The part of _native.c between a lock's thread and the loop that runs in it. */

#ifndef COHELD_TASK_H
#define COHELD_TASK_H

/* ==== 1. The running task ==== */

static int find_asyncio(State *state) {
    PyObject *name = PyUnicode_FromString("asyncio.tasks"), *module = name ? PyImport_GetModule(name) : NULL;
    PyObject *events = module ? PyObject_GetAttrString(module, "events") : NULL;
#if PY_VERSION_HEX < 0x030c0000
    const char *tasks_name = "_current_tasks";
#else
    const char *tasks_name = "current_task";
#endif
    PyObject *tasks = events ? PyObject_GetAttrString(module, tasks_name) : NULL;
    PyObject *loop = tasks ? PyObject_GetAttrString(events, "_get_running_loop") : NULL;
    Py_XDECREF(name);
    Py_XDECREF(module);
    Py_XDECREF(events);
    PyErr_Clear(); /* it is being imported: nothing runs in it yet */
    if (!loop) {
        Py_XDECREF(tasks);
        return 0;
    }
    state->tasks = tasks; /* written twice, by two threads, the former stays: another may be in it */
    __atomic_store_n(&state->running_loop, loop, __ATOMIC_RELEASE);
    return 1;
}

static PyObject *ask_for_task(State *state) {
    PyObject *loop, *task = NULL;
    if (!__atomic_load_n(&state->running_loop, __ATOMIC_ACQUIRE) && !find_asyncio(state)) return NULL;
    loop = PyObject_CallNoArgs(state->running_loop);
    if (loop && loop != Py_None) {
#if PY_VERSION_HEX < 0x030c0000
        task = Py_XNewRef(PyDict_GetItemWithError(state->tasks, loop));
#else
        task = PyObject_CallOneArg(state->tasks, loop);
#endif
    }
    Py_XDECREF(loop);
    PyErr_Clear();
    if (task == Py_None) Py_CLEAR(task);
    return task;
}

/* What this thread ran in that version of its context.  A step of a task enters a context and leaves it, and either moves
 * the version, so the task is there as long as the version is; a child of a fork runs no loop. */
static __thread struct {
    const PyThreadState *thread;
    uint64_t version;
    uint32_t generation;
    PyObject *task; /* borrowed */
} step __attribute__((tls_model("initial-exec")));

/* The asyncio task that this thread runs, a new reference; NULL, without an exception: none. */
static PyObject *current_task(State *state) {
    const PyThreadState *thread = PyThreadState_Get();
    if (!thread->context) return NULL;
    if (step.thread != thread || step.version != thread->context_ver || step.generation != process.generation) {
        PyObject *task = ask_for_task(state);
        step.thread = thread;
        step.version = thread->context_ver;
        step.generation = process.generation;
        step.task = task;
        return task;
    }
    return Py_XNewRef(step.task);
}

/* ==== 2. The owning task ==== */

/* Does a task of this process own it, by this handle? */
static inline int task_owns(const Mutex *self, Cell *c) {
    return LOAD(&c->task_who) == LOAD(&process.who) && LOAD(&c->task_nonce) == LOAD(&self->task_nonce) && cell_tasked(c);
}

static PyObject *owning_task(Mutex *self) {
    PyObject *reference, *task;
    Py_BEGIN_CRITICAL_SECTION(self);
    reference = Py_XNewRef(self->task);
    Py_END_CRITICAL_SECTION();
    task = reference ? PyObject_CallNoArgs(reference) : NULL;
    Py_XDECREF(reference);
    return task;
}

/* A thread runs one task until the version of its context moves. */
static int __attribute__((noinline)) task_is_current(Mutex *self, const PyThreadState *thread) {
    State *state = state_of((PyObject *)self);
    uint64_t version = thread->context_ver;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *task = state ? current_task(state) : NULL, *owner = task ? owning_task(self) : NULL;
    int same = task && task == owner;
    Py_XDECREF(task);
    Py_XDECREF(owner);
    PyErr_Restore(type, error, trace);
    if (same) {
        STORE(&self->step, version);
        STORE(&self->step_thread, me.nonce);
    }
    return same;
}

/* Does the running task own it? */
static inline int task_mine(Mutex *self, Cell *c) {
    if (LIKELY(!task_owns(self, c))) return 0;
    if (UNLIKELY(!me.tid)) find_myself();
    const PyThreadState *thread = PyThreadState_Get();
    if (LOAD(&self->step_thread) == me.nonce && LOAD(&self->step) == thread->context_ver) return 1;
    return task_is_current(self, thread);
}

/* Does the caller hold it, thread or task? */
static inline int holds(Mutex *self, Cell *c) { return still_mine(c) || (cell_tasked(c) && task_mine(self, c)); }

/* One level more for the owning task. */
static int task_again(Mutex *self, Cell *c) {
    if (LOAD(&c->owner.depth) == UINT32_MAX) return call_hook(self, "_too_deep", NULL);
    STORE(&c->owner.depth, LOAD(&c->owner.depth) + 1);
    return 1;
}

/* Another's task owns it.  1: it is gone, try again.  0: it lives.  -1: waits, and would for ever: raised. */
static int look_at_task(Mutex *self, Cell *c, int waits) {
    if (!task_owns(self, c)) return LOAD(&c->task_who) != LOAD(&process.who) && task_orphaned(c);
    uint64_t nonce = LOAD(&self->task_nonce);
    int mine = LOAD(&c->owner.tid) == me.tid, gone = call_hook(self, "_task_is_gone", NULL);
    if (gone > 0) cell_bury_task(c, nonce);
    return !gone && mine && waits ? call_hook(self, "_stuck", NULL) : gone;
}
#endif
