/* Areas: mapped files of cells, in plain C.  Which file, and who may use it, is decided above (backends/). */

#ifndef COHELD_SEGMENT_H
#define COHELD_SEGMENT_H

/* ==== 1. Includes ==== */

#include "_lock.h"

/* ==== 2. Mapping a file ==== */

enum { HEADER_SIZE = 4096, FIRST_CHUNK = 64 * 1024, LARGEST_CHUNK = 16 * 1024 * 1024 };

typedef struct {
    char *base; /* this and the next four: written by area_map only, before any other thread has the area */
    size_t length;
    dev_t device; /* which file fd is: a daemon that closes all its descriptors may have another behind the number */
    ino_t inode;
    uint32_t generation;   /* of the process that mapped it: an arena hands out cells in that process only */
    pthread_mutex_t guard; /* of the six below; leaf, held for no other code.  No child finds it taken: Python forks with
                              the GIL, or without one while all other threads stand still, and neither is given up here */
    int fd;
    size_t used;           /* bytes handed out, the header included */
    size_t reserved;       /* bytes that the file system has promised */
    uint32_t *free_cells;
    size_t free_count, free_room;
} Area;

/* Through an open file of its own: a mapping keeps the flock of the file that it was made from, and a process that is
 * about to end could not give up its share. */
static void *map_anew(int fd, size_t *length, size_t least) {
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return MAP_FAILED;
    void *base;
    while ((base = mmap(NULL, *length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0)) == MAP_FAILED
           && *length / 2 >= least)
        *length /= 2;
    int error = errno;
    close(file);
    errno = error;
    return base;
}

/* Map up to length bytes of the file, at least least.  Owns fd, also where it fails: -1 and errno. */
static int area_map(Area *a, int fd, size_t length, size_t least) {
    struct stat file = {0};
    fstat(fd, &file);
    void *base = map_anew(fd, &length, least);
    if (base == MAP_FAILED) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    *a = (Area){.base = base, .length = length, .fd = fd, .device = file.st_dev, .inode = file.st_ino};
    a->generation = process.generation;
    a->used = a->reserved = HEADER_SIZE;
    pthread_mutex_init(&a->guard, NULL);
    return 0;
}

/* Is the descriptor still that of the file?  Under the guard: it is not closed, and its number another's, meanwhile. */
static int area_file(const Area *a, struct stat *file) {
    return a->fd >= 0 && !fstat(a->fd, file) && file->st_ino == a->inode && file->st_dev == a->device;
}

static void area_close(Area *a) {
    struct stat file;
    pthread_mutex_lock(&a->guard);
    if (area_file(a, &file)) close(a->fd);
    a->fd = -1;
    pthread_mutex_unlock(&a->guard);
}

/* Does the file reach as far as a cell at that offset? */
static int area_reaches(Area *a, size_t offset) {
    struct stat file;
    pthread_mutex_lock(&a->guard);
    int there = area_file(a, &file) && file.st_size > CELL_SIZE && offset <= (size_t)file.st_size - CELL_SIZE;
    pthread_mutex_unlock(&a->guard);
    return there;
}

static void area_unmap(Area *a) {
    if (a->base) munmap(a->base, a->length);
    area_close(a);
    free(a->free_cells);
}

/* ==== 3. Handing out cells ==== */

static Cell *area_cell(const Area *a, size_t offset) {
    return offset % CELL_SIZE || offset > a->length - CELL_SIZE ? NULL : (Cell *)(a->base + offset);
}

/* Promise more pages: twice what is there, within bounds; a full file system gets a smaller wish before it says no.
 * An errno. */
static int area_grow(Area *a) {
    struct stat file;
    if (!area_file(a, &file)) return EBADF;
    size_t chunk = a->reserved < FIRST_CHUNK ? FIRST_CHUNK - a->reserved : a->reserved;
    if (chunk > LARGEST_CHUNK) chunk = LARGEST_CHUNK;
    int rc = ENOMEM;
    for (; chunk >= HEADER_SIZE; chunk /= 2) {
        if (a->reserved + chunk > a->length) continue;
        do rc = posix_fallocate(a->fd, (off_t)a->reserved, (off_t)chunk);
        while (rc == EINTR);
        if (rc != ENOSPC) break;
    }
    if (!rc) a->reserved += chunk & ~(size_t)(CELL_SIZE - 1);
    return rc;
}

/* A cell that was used before keeps its mutex; only our own words begin again. */
static void cell_reset(Cell *c) {
    memset((char *)c + offsetof(Cell, handoff), 0, offsetof(Cell, magic) - offsetof(Cell, handoff));
}

static int take_cell(Area *a, size_t *offset) {
    if (a->generation != process.generation) return EPERM;
    if (a->free_count) {
        *offset = (size_t)a->free_cells[--a->free_count] * CELL_SIZE;
        cell_reset((Cell *)(a->base + *offset));
        return 0;
    }
    int rc = a->used + CELL_SIZE > a->reserved ? area_grow(a) : 0;
    if (!rc) rc = cell_init((Cell *)(a->base + a->used));
    if (rc) return rc;
    *offset = a->used;
    a->used += CELL_SIZE;
    return 0;
}

/* A cell that nobody else has.  An errno; then nothing has changed. */
static int area_take(Area *a, size_t *offset) {
    pthread_mutex_lock(&a->guard);
    int rc = take_cell(a, offset);
    pthread_mutex_unlock(&a->guard);
    return rc;
}

/* Nobody can have this cell: take it back.  Out of memory for the list: the cell is lost until the process ends. */
static void area_give_back(Area *a, const Cell *c) {
    pthread_mutex_lock(&a->guard);
    if (a->free_count == a->free_room) {
        size_t room = a->free_room ? 2 * a->free_room : 64;
        uint32_t *grown = realloc(a->free_cells, room * sizeof *grown);
        if (grown) {
            a->free_cells = grown;
            a->free_room = room;
        }
    }
    if (a->free_count < a->free_room)
        a->free_cells[a->free_count++] = (uint32_t)(((const char *)c - a->base) / CELL_SIZE);
    pthread_mutex_unlock(&a->guard);
}

/* By the owner: this cell is not what its name means any more.  A new number for the same state: who only reads, and looks
 * at nothing else, looks again. */
static void cell_retire(Cell *c) {
    flags_up(c, REMOVED);
    __atomic_store_n(&c->version, c->version + 2, __ATOMIC_RELEASE);
}

/* A cell of before the last boot, in a file that nobody else uses meanwhile: who held it then is dead. */
static void cell_revive(Cell *c) {
    if (word_load(c)) __atomic_store_n(word_of(c), FUTEX_OWNER_DIED, __ATOMIC_SEQ_CST);
    c->waiters = c->waiting_since = 0;
    c->handoff = 0;
    c->task_nonce |= TASK_GONE;
    c->flags &= ~(uint32_t)WARDED; /* its number and start may be somebody else's since the boot */
}
#endif
