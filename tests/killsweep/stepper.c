/* Trace a forked child, instruction by instruction.  A child that wants to be traced calls stepper_trace_me and then
 * stops itself by signals; the tracer is its parent.  Statuses are those of waitpid; -1 with errno on failure. */

#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>

#if defined(__x86_64__)
#define POINTER rip
static const unsigned long BREAK = 0xcc, BREAK_MASK = 0xff; /* int3 */
#elif defined(__aarch64__)
#define POINTER pc
static const unsigned long BREAK = 0xd4200000, BREAK_MASK = 0xffffffff; /* brk #0 */
#else
#error "say here where this machine keeps its instruction pointer, and how it breaks"
#endif

enum { MOST = 50 };

int stepper_trace_me(void) { return (int)ptrace(PTRACE_TRACEME, 0, NULL, NULL); }

static int wait_for(pid_t pid) {
    int status;
    pid_t got;
    do got = waitpid(pid, &status, __WALL);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -1 : status;
}

/* Wait for the first stop of a child; from then on it is killed if its tracer dies. */
int stepper_adopt(pid_t pid) {
    int status = wait_for(pid);
    if (status >= 0 && WIFSTOPPED(status) && ptrace(PTRACE_SETOPTIONS, pid, NULL, (void *)PTRACE_O_EXITKILL)) return -1;
    return status;
}

/* Let it run, without the signal that it stopped at, and do not wait for it. */
int stepper_release(pid_t pid) { return (int)ptrace(PTRACE_CONT, pid, NULL, NULL); }

/* Let it run to its next stop, or its end. */
int stepper_resume(pid_t pid) { return stepper_release(pid) ? -1 : wait_for(pid); }

static int registers(enum __ptrace_request request, pid_t pid, struct user_regs_struct *of) {
    struct iovec place = {of, sizeof *of};
    return (int)ptrace(request, pid, (void *)NT_PRSTATUS, &place);
}

/* The instruction that a stopped child executes next; 0 if it cannot be read. */
uint64_t stepper_pointer(pid_t pid) {
    struct user_regs_struct now;
    return registers(PTRACE_GETREGSET, pid, &now) ? 0 : now.POINTER;
}

static int set_pointer(pid_t pid, uint64_t pointer) {
    struct user_regs_struct now;
    if (registers(PTRACE_GETREGSET, pid, &now)) return -1;
    now.POINTER = pointer;
    return registers(PTRACE_SETREGSET, pid, &now);
}

static int poke(pid_t pid, uint64_t address, unsigned long word) {
    return (int)ptrace(PTRACE_POKETEXT, pid, (void *)address, (void *)word);
}

/* Let it run until it would execute the instruction at an address (a stop with SIGTRAP), or to an earlier stop. */
int stepper_run_to(pid_t pid, uint64_t address) {
    errno = 0;
    unsigned long word = (unsigned long)ptrace(PTRACE_PEEKTEXT, pid, (void *)address, NULL);
    if (errno || poke(pid, address, (word & ~BREAK_MASK) | BREAK)) return -1;
    int status = stepper_resume(pid);
    if (status < 0 || !WIFSTOPPED(status)) return status;
    if (poke(pid, address, word)) return -1;
    if (WSTOPSIG(status) == SIGTRAP && set_pointer(pid, address)) return -1;
    return status;
}

/* How long an instruction is that copies or fills byte after byte, a step each; 0 if it is none of those. */
static uint64_t repeats(pid_t pid, uint64_t address) {
#if defined(__x86_64__)
    unsigned long word = (unsigned long)ptrace(PTRACE_PEEKTEXT, pid, (void *)address, NULL) & 0xffff;
    return word == 0xa4f3 || word == 0xaaf3 ? 2 : 0; /* rep movsb, rep stosb */
#else
    return 0;
#endif
}

/* Execute up to limit instructions, and note each before it is executed (pointers may be NULL), and then what two words
 * are that the child shares with us (seen may be NULL).  How many were executed: fewer if the child stopped for something
 * else, a signal of its own or its end; *status tells what.  Where they are noted, what copies a long value is stepped
 * for the first MOST bytes, and executed to its end then. */
long stepper_walk(pid_t pid, long limit, uint64_t *pointers, const volatile uint32_t *low, const volatile uint32_t *high,
                  uint64_t *seen, int *status) {
    uint64_t length;
    for (long n = 0; n < limit; n++) {
        if (pointers) pointers[n] = stepper_pointer(pid);
        if (pointers && n >= MOST && pointers[n - MOST] == pointers[n] && (length = repeats(pid, pointers[n]))) {
            *status = stepper_run_to(pid, pointers[n] + length);
            if (*status < 0) return -1;
            if (!WIFSTOPPED(*status) || WSTOPSIG(*status) != SIGTRAP) return n;
            pointers[n] += length;
        }
        if (seen) seen[n] = *low | (uint64_t)*high << 32;
        if (ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL)) return -1;
        *status = wait_for(pid);
        if (*status < 0) return -1;
        if (!WIFSTOPPED(*status) || WSTOPSIG(*status) != SIGTRAP) return n;
    }
    return limit;
}
