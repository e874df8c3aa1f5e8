/* Preloaded before libfaketime (0.9.10), which answers EINVAL for a sleep until a moment of a clock that it was told not to fake:
 * Python's time.sleep is one. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *request, struct timespec *left)
{
    return syscall(SYS_clock_nanosleep, clock, flags, request, left) ? errno : 0;
}
