/* Shared state: two slots and a word, the cache of it in this process, and the commit of short values.
 *
 * The state of a resource is a file beside it, made by the first commit.  The word `version` of the cell says all:
 *
 *   version     0                              nothing was committed: everybody reads defaults
 *               generation << 49 | created << 48 | number, whose low bit is the index of the live slot
 *   file        one per generation; its header and its schema never change.  A slot has an Entry for each field:
 *               when it was committed, its length, and its bytes, or where they lie in the heap of the same file.
 *
 *   what                                   who may write it                when
 *   the word                               the owner of the mutex          one store, release: that is the commit
 *   the live slot, and what it refers to   nobody
 *   the other slot, the rest of the heap   the owner                       after a release fence; whatever is in there is
 *                                                                          garbage to the next owner, too
 *                                                                          (a cell that is retired gets the number after
 *                                                                          next: the same slot is live, and readers look)
 *   a file of another generation           the owner, aside, then renamed  nobody has opened it: the word never said so
 *
 * Why a crash tears nothing: all that the word leads to is finished before the word is, and stays as it is until the
 * word leads elsewhere.  A dead owner leaves garbage where garbage is expected; nothing is undone.  A file that the word
 * does not lead to is replaced or removed by the next one that grows the state.
 *
 * Why a reader sees no mixture: it reads the word (acquire), copies what it needs from the slot that the word names and
 * from the heap, and reads the word again behind an acquire fence.  A writer overwrites only what was live one word or
 * more ago, and its release fence stands between the store of the present word and the first such write: a reader that
 * has copied a byte of it finds a word that is not the one it began with.  Lengths and places are checked before
 * they are followed, and nothing is decoded before the second look.
 * tests/models/state_model.py searches these steps, and finds what each rule is there for.
 *
 * In this process one View per resource has two caches.  inside belongs to the thread that owns the mutex: values, and
 * marks of what it may have changed.  outside is for everybody else: values as they were committed, containers frozen,
 * each with the word at which it was last seen to be current.  Readers change it under the GIL, or their View's critical
 * section where there is none.
 */

#ifndef COHELD_STATE_H
#define COHELD_STATE_H

/* ==== 1. Includes, words and entries ==== */

#include "_lock.h"

#ifndef Py_BEGIN_CRITICAL_SECTION /* before 3.13 the GIL is always there */
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

enum { SHORT = 20 };

typedef struct {
    uint64_t stamp; /* the number of the commit that wrote it */
    uint32_t length;
    unsigned char data[SHORT]; /* the bytes if there are so few, else 8 bytes: where in the file they are */
} Entry;

_Static_assert(sizeof(Entry) == 32, "the layout of an entry is a file format");

#define NUMBER_BITS 48
#define NUMBER(word) ((word) & ((UINT64_C(1) << NUMBER_BITS) - 1))
#define GENERATION(word) ((word) >> (NUMBER_BITS + 1))
#define MADE (UINT64_C(1) << NUMBER_BITS) /* __create__ has returned, and this or an earlier commit was its */

/* ==== 2. Short values: MessagePack, as msgspec writes it ==== */

enum { IS_NONE = 1, IS_BOOL = 2, IS_INT = 4, IS_FLOAT = 8, IS_STR = 16, IS_BYTES = 32, MUTABLE = 64, COPIED = 128 };

/* What a value is, of what we can write here; 0: something else, or a subclass. */
static inline int kind_of(PyObject *value) {
    PyTypeObject *type = Py_TYPE(value);
    if (type == &PyLong_Type) return IS_INT;
    if (type == &PyUnicode_Type) return IS_STR;
    if (type == &PyFloat_Type) return IS_FLOAT;
    if (type == &PyBool_Type) return IS_BOOL;
    if (value == Py_None) return IS_NONE;
    return type == &PyBytes_Type ? IS_BYTES : 0;
}

static void put_big_endian(Entry *e, unsigned char tag, uint64_t bits, int bytes) {
    e->data[0] = tag;
    for (int i = 0; i < bytes; i++) e->data[1 + i] = (unsigned char)(bits >> (8 * (bytes - 1 - i)));
    e->length = (uint32_t)(1 + bytes);
}

static uint64_t get_big_endian(const unsigned char *from, uint32_t bytes) {
    uint64_t bits = 0;
    for (uint32_t i = 0; i < bytes; i++) bits = bits << 8 | from[i];
    return bits;
}

static void encode_int(int64_t n, Entry *e) {
    if (n >= 0) {
        if (n < 128) put_big_endian(e, (unsigned char)n, 0, 0);
        else if (n <= UINT8_MAX) put_big_endian(e, 0xcc, (uint64_t)n, 1);
        else if (n <= UINT16_MAX) put_big_endian(e, 0xcd, (uint64_t)n, 2);
        else if (n <= UINT32_MAX) put_big_endian(e, 0xce, (uint64_t)n, 4);
        else put_big_endian(e, 0xcf, (uint64_t)n, 8);
    } else if (n >= -32) put_big_endian(e, (unsigned char)n, 0, 0);
    else if (n >= INT8_MIN) put_big_endian(e, 0xd0, (uint64_t)n, 1);
    else if (n >= INT16_MIN) put_big_endian(e, 0xd1, (uint64_t)n, 2);
    else if (n >= INT32_MIN) put_big_endian(e, 0xd2, (uint64_t)n, 4);
    else put_big_endian(e, 0xd3, (uint64_t)n, 8);
}

static int encode_text(const char *text, Py_ssize_t size, int is_bytes, Entry *e) {
    int head = is_bytes ? 2 : 1;
    if (!text || size + head > SHORT) return 0;
    e->data[0] = is_bytes ? 0xc4 : (unsigned char)(0xa0 | size);
    if (is_bytes) e->data[1] = (unsigned char)size;
    memcpy(e->data + head, text, (size_t)size);
    e->length = (uint32_t)(size + head);
    return 1;
}

/* 1: written to the entry.  0: not short, or not of these kinds; never raises. */
static int encode_short(PyObject *value, Entry *e) {
    int overflow = 0;
    Py_ssize_t size = 0;
    const char *text;
    double number;
    uint64_t bits;
    switch (kind_of(value)) {
    case IS_INT:
        bits = (uint64_t)PyLong_AsLongLongAndOverflow(value, &overflow);
        if (!overflow) encode_int((int64_t)bits, e);
        return !overflow;
    case IS_FLOAT:
        number = PyFloat_AS_DOUBLE(value);
        memcpy(&bits, &number, sizeof bits);
        put_big_endian(e, 0xcb, bits, 8);
        return 1;
    case IS_BOOL: put_big_endian(e, value == Py_True ? 0xc3 : 0xc2, 0, 0); return 1;
    case IS_NONE: put_big_endian(e, 0xc0, 0, 0); return 1;
    case IS_STR:
        text = PyUnicode_AsUTF8AndSize(value, &size);
        if (!text) PyErr_Clear();
        return encode_text(text, size, 0, e);
    case IS_BYTES: return encode_text(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), 1, e);
    default: return 0;
    }
}

static PyObject *decode_number(const unsigned char *d, uint32_t size, int kinds) {
    unsigned char tag = d[0];
    uint64_t bits = get_big_endian(d + 1, size - 1);
    double number;
    if (tag == 0xcb && size == 9 && kinds & IS_FLOAT) {
        memcpy(&number, &bits, sizeof number);
        return PyFloat_FromDouble(number);
    }
    if (!(kinds & IS_INT)) return NULL;
    if (size == 1 && tag < 128) return PyLong_FromLong(tag);
    if (size == 1 && tag >= 0xe0) return PyLong_FromLong((signed char)tag);
    if (tag >= 0xcc && tag <= 0xcf && size == 1 + (1u << (tag - 0xcc))) return PyLong_FromUnsignedLongLong(bits);
    if (tag < 0xd0 || tag > 0xd3 || size != 1 + (1u << (tag - 0xd0))) return NULL;
    unsigned unused = 64 - 8 * (size - 1);
    return PyLong_FromLongLong((int64_t)(bits << unused) >> unused);
}

/* The value of a short entry; NULL without an exception: of another kind, or damaged, let msgspec say what it is. */
static PyObject *decode_short(const Entry *e, int kinds) {
    const unsigned char *d = e->data;
    uint32_t size = e->length;
    if (!size || size > SHORT) return NULL;
    if ((d[0] & 0xe0) == 0xa0)
        return kinds & IS_STR && size == 1u + (d[0] & 0x1f) ? PyUnicode_DecodeUTF8((const char *)d + 1, size - 1, NULL) : NULL;
    if (d[0] == 0xc4)
        return kinds & IS_BYTES && size >= 2 && size == 2u + d[1] ? PyBytes_FromStringAndSize((const char *)d + 2, size - 2) : NULL;
    if (size == 1 && d[0] == 0xc0) return kinds & IS_NONE ? Py_NewRef(Py_None) : NULL;
    if (size == 1 && (d[0] & 0xfe) == 0xc2) return kinds & IS_BOOL ? PyBool_FromLong(d[0] & 1) : NULL;
    return decode_number(d, size, kinds);
}

/* ==== 3. View: what this process knows of one resource's state ==== */

/* What the owner may have changed.  STORING is beside one of the others: a commit has looked at the value, and the field
 * becomes clean if nobody (a signal's handler, a __del__) asks for it or assigns it before the commit is done. */
enum { CLEAN, HANDED, ASSIGNED, STORING = 4 };

typedef struct {
    PyObject *value;
    uint64_t stamp; /* of the entry that it was made from; 0: a default */
    uint64_t word;  /* outside: the cell's word when the value was last seen to be current */
} Seen;

typedef struct {
    Py_buffer buffer;
    uint64_t generation; /* 0: none */
    Entry *slots[2];     /* NULL: a file of another schema, that Python reads */
} Mapped;

typedef struct {
    PyObject_HEAD
    Cell *cell;         /* this and the next two: once, before anybody else has the view */
    PyObject *segment;  /* keeps the cell mapped */
    PyObject *schema;
    PyObject *dict;     /* the interpreter's */
    Py_ssize_t count;   /* of fields.  Once, as kinds, limit, and where the four arrays are */
    unsigned char *kinds;
    unsigned char *marks; /* by the owner of the mutex, as inside, in and word */
    Seen *inside;
    Seen *outside;      /* in the view's critical section, as out */
    Mapped in, out;     /* the owner's, and the readers' */
    uint64_t word;      /* inside is of this */
    uint64_t limit;     /* of the encodings of all fields, bytes: max_state */
    char remote;        /* a store has the state, and this machine a copy: reads outside, and commits, are Python's.  Once */
} View;

static inline uint64_t view_word(const View *v) { return __atomic_load_n(&v->cell->version, __ATOMIC_ACQUIRE); }

static void view_forget(View *v, Py_ssize_t i) {
    v->marks[i] = CLEAN;
    Py_CLEAR(v->inside[i].value);
}

/* What was not committed never was. */
static void view_discard(View *v) {
    for (Py_ssize_t i = 0; i < v->count; i++)
        if (v->marks[i]) view_forget(v, i);
}

static int view_marked(const View *v) {
    for (Py_ssize_t i = 0; i < v->count; i++)
        if (v->marks[i]) return 1;
    return 0;
}

static int hook_of(View *v, const char *name, const char *format, ...) {
    va_list args;
    va_start(args, format);
    PyObject *list = Py_VaBuildValue(format, args), *method = list ? PyObject_GetAttrString((PyObject *)v, name) : NULL;
    va_end(args);
    PyObject *result = method ? PyObject_CallObject(method, list) : NULL;
    Py_XDECREF(list);
    Py_XDECREF(method);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* By the owner: the word has moved.  Values whose entry is another than the one they were made from are dropped. */
static int __attribute__((noinline)) view_move(View *v, uint64_t word) {
    if (GENERATION(word) != v->in.generation && hook_of(v, "_enter", "(K)", (unsigned long long)word)) return -1;
    const Entry *live = v->in.slots[word & 1];
    for (Py_ssize_t i = 0; i < v->count; i++)
        if (!v->marks[i] && (!live || v->inside[i].stamp != live[i].stamp)) Py_CLEAR(v->inside[i].value);
    v->word = word;
    return 0;
}

static inline int view_refresh(View *v) {
    uint64_t word = LOAD(&v->cell->version); /* only the owner changes it, and that is us */
    return LIKELY(word == v->word) ? 0 : view_move(v, word);
}

/* By the owner: the value of the last commit into its cache. */
static int __attribute__((noinline)) view_load(View *v, Py_ssize_t i) {
    const Entry *live = v->in.slots[v->word & 1];
    uint64_t stamp = live ? live[i].stamp : 0;
    PyObject *value = live && live[i].length <= SHORT ? decode_short(&live[i], v->kinds[i]) : NULL;
    if (!value && PyErr_Occurred()) PyErr_Clear(); /* no UTF-8: damaged, let Python say so */
    if (!value && !(value = PyObject_CallMethod((PyObject *)v, "_load", "n", i))) return -1;
    if (v->inside[i].value) { /* a signal's handler was here meanwhile */
        Py_DECREF(value);
        return 0;
    }
    v->inside[i].value = value;
    v->inside[i].stamp = stamp;
    return 0;
}

/* By the owner: the value as it is in the critical section, borrowed.  *changes: may it be changed by who gets it? */
static inline PyObject *view_inside(View *v, Py_ssize_t i, int *changes) {
    if (UNLIKELY(view_refresh(v))) return NULL;
    if (UNLIKELY(!v->inside[i].value) && view_load(v, i)) return NULL;
    *changes = v->kinds[i] & MUTABLE;
    if (*changes) v->marks[i] = v->marks[i] & ASSIGNED ? ASSIGNED : HANDED;
    return v->inside[i].value;
}

/* By the owner: a new value. */
static inline int view_assign(View *v, Py_ssize_t i, PyObject *value) {
    if (UNLIKELY(view_refresh(v))) return -1;
    v->marks[i] = ASSIGNED;
    Py_XSETREF(v->inside[i].value, Py_NewRef(value));
    return 0;
}

/* 1: committed, or nothing had changed.  0: more than short values of a file that is there; nothing was done. */
static int commit_short(View *v) {
    uint64_t word = LOAD(&v->cell->version), next = word + 1;
    Entry *live = v->in.slots[word & 1], *spare = v->in.slots[next & 1];
    int changed = 0;
    uint64_t size = 0;
    if (!live || GENERATION(word) != v->in.generation || v->remote) return 0;
    __atomic_thread_fence(__ATOMIC_RELEASE); /* behind the store of the present word, before the slot is overwritten */
    memcpy(spare, live, (size_t)v->count * sizeof(Entry));
    for (Py_ssize_t i = 0; i < v->count; i++) {
        Entry e = {.stamp = NUMBER(next)};
        if (!v->marks[i]) continue;
        if (v->marks[i] & HANDED || v->kinds[i] & MUTABLE) return 0; /* Python notes what it is compared with later */
        if (!encode_short(v->inside[i].value, &e)) return 0;
        if (e.length == live[i].length && !memcmp(e.data, live[i].data, e.length)) continue;
        spare[i] = e;
        changed = 1;
    }
    for (Py_ssize_t i = 0; i < v->count; i++) size += spare[i].length;
    if (changed && size > v->limit) return 0; /* Python says so */
    if (changed) {
        __atomic_store_n(&v->cell->version, next, __ATOMIC_RELEASE);
        v->word = next;
    }
    for (Py_ssize_t i = 0; i < v->count; i++) {
        if (!v->marks[i]) continue;
        v->marks[i] = CLEAN;
        v->inside[i].stamp = (changed ? spare : live)[i].stamp;
    }
    return 1;
}

/* By the owner.  0: committed, or nothing to do.  -1: raised; the last commit stands. */
static int __attribute__((noinline)) view_commit(View *v) {
    int rc = view_refresh(v) ? -1 : commit_short(v) ? 0 : hook_of(v, "_commit", "()");
    if (rc) view_discard(v);
    return rc;
}

/* A value of the last commit, for everybody: a new reference, or NULL: ask Python (or an exception is set). */
static PyObject *outside_now(View *v, Py_ssize_t i, uint64_t word) {
    Seen *f = &v->outside[i];
    if (UNLIKELY(v->remote)) return NULL;
    if (LIKELY(f->value && f->word == word)) return Py_NewRef(f->value);
    if (LOAD(&v->cell->flags) & REMOVED) return NULL; /* set before the word was moved: whoever sees that sees this */
    if (!v->out.slots[0] || GENERATION(word) != v->out.generation) return NULL;
    Entry e = v->out.slots[word & 1][i];
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (LOAD(&v->cell->version) != word) return NULL;
    if (!f->value || f->stamp != e.stamp) {
        PyObject *value = e.length <= SHORT ? decode_short(&e, v->kinds[i]) : NULL;
        if (!value) {
            PyErr_Clear();
            return NULL;
        }
        Py_XSETREF(f->value, value);
        f->stamp = e.stamp;
    }
    f->word = word;
    return Py_NewRef(f->value);
}

static inline PyObject *view_outside(View *v, Py_ssize_t i) {
    PyObject *value;
    Py_BEGIN_CRITICAL_SECTION(v);
    value = outside_now(v, i, view_word(v));
    Py_END_CRITICAL_SECTION();
    return LIKELY(value) ? value : PyObject_CallMethod((PyObject *)v, "_read", "n", i);
}
#endif
