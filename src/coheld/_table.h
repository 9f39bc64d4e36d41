/* The table of a process's waiters, which others read: who waits for which cell.  backends/waiters.py is its twin in Python,
 * and makes the file.
 *
 * A slot is one thread's, or one waiting task's, or the seat of a lock that a task owns.  Only its thread writes it (that of
 * a task: the loop's, or before that wakes it the one that waits in its stead; a seat: whoever has the lock's mutex), so
 * nobody races but a reader:
 *
 *   number      even: it does not wait.  Odd: it waits, and the rest of the slot says for what.  Moved on to an even one
 *               before the rest is written and to an odd one after it; never the same again.  Who finds an odd number
 *               twice has seen one wait, and its thread has not run a line of its caller's in between.
 *
 * Names.  Who holds a lock stands in its cell, by number; this table says what that one is called, as long as it has a slot:
 * a thread's has its tid and task 0, from its first lock to its end; a seat, which never waits, has the cell and the task's
 * address, written before the cell says that it owns, and tid 0, so that it is no thread's while the task is 0.  A slot that
 * is given back has no name.  All hints: a name that does not fit what the cell says is passed over, and without room for
 * one there is a number only.
 *
 * A thread that waits in a signal's handler, in the middle of another wait, has the slot for that one meanwhile; then the
 * outer wait is there again, by a new number.  One that takes a lock there at once does not wait until the handler has
 * come to its end (wait_pauses).  A killed process leaves its file, whose name says whose it was.  A forked
 * child forgets its slot (forget_parent), and never writes its parent's. */

#ifndef COHELD_TABLE_H
#define COHELD_TABLE_H

/* ==== 1. Slots ==== */

enum { NAME_SIZE = 48 };
enum { FOR_LOCK = 1, FOR_GUARD = 2, FOR_READERS = 3, FOR_PERMIT = 4, TIMED = 8, KEEPS = 16 }; /* KEEPS: whoever waits must have it */

typedef struct {
    uint64_t number; /* atomic */
    uint64_t inode, offset; /* of the cell */
    uint64_t since; /* CLOCK_MONOTONIC, ns */
    uint64_t task;  /* its address; 0: the thread waits */
    uint32_t tid, kind;
    Label method;
    char name[NAME_SIZE]; /* of the thread or task; written by whoever hands the slot out */
} Slot;

_Static_assert(sizeof(Slot) == 128, "the layout of a slot is a file format");

/* Write a wait into the slot; waits: else only that there is none. */
static void slot_write(Slot *s, const Slot *wait, int waits) {
    uint64_t even = (LOAD(&s->number) | 1) + 1;
    __atomic_store_n(&s->number, even, __ATOMIC_SEQ_CST);
    if (!waits) return;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    s->inode = wait->inode;
    s->offset = wait->offset;
    s->since = wait->since;
    s->task = 0;
    s->tid = me.tid;
    s->kind = wait->kind;
    s->method = wait->method;
    __atomic_store_n(&s->number, even + 1, __ATOMIC_SEQ_CST);
}

/* The seat of a lock that tasks of this process own is nobody's: task 0 and tid 0. */
static void seat_clear(Slot *s) {
    s->tid = 0;
    __atomic_store_n(&s->task, 0, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* That task's, from now on; it was nobody's. */
static void seat_write(Slot *s, uint64_t inode, uint64_t offset, const void *task, const char *name, size_t size) {
    s->inode = inode;
    s->offset = offset;
    memset(s->name, 0, NAME_SIZE);
    memcpy(s->name, name, size < NAME_SIZE ? size : NAME_SIZE);
    __atomic_store_n(&s->task, (uint64_t)(uintptr_t)task, __ATOMIC_SEQ_CST);
}

/* ==== 2. The calling thread's waits ==== */

/* What it waited for before, which is the outer wait of one in a signal's handler. */
typedef struct {
    Slot *slot; /* NULL: nothing was published */
    Slot before, wait;
} Outer;

static void wait_publish(const Slot *wait, Outer *outer) {
    Slot *s = me.slot;
    if (!s) return;
    outer->slot = s;
    outer->before = *s;
    outer->wait = *wait;
    slot_write(s, wait, 1);
}

/* A signal's handler has come to its end: if it has taken locks, the wait begins here, behind those that it has kept. */
static void wait_goes_on(Outer *outer) {
    if (LIKELY(!outer->slot || outer->slot != me.slot || LOAD(&outer->slot->number) & 1)) return;
    outer->wait.since = clock_ns(CLOCK_MONOTONIC);
    slot_write(me.slot, &outer->wait, 1);
}

/* Also by a child that a handler has forked: the slot was not its own. */
static void wait_withdraw(const Outer *outer) {
    if (outer->slot && outer->slot == me.slot) slot_write(me.slot, &outer->before, outer->before.number & 1);
}
#endif
