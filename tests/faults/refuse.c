/* Preloaded: accept4 on the network's sockets and fork fail as often as a shared file says, without asking the kernel; and accept4
 * is entered, or comes back with a connection, late by so many milliseconds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* tests/faults/refusals.py writes the same. */
static struct { int accept_errno, accepts, fork_errno, forks, fork_pid, late, held; } *orders;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("REFUSE_FILE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *map = mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED)
        orders = map;
}

/* Whether this one is refused: each of the refusals is somebody's. */
static int refused(int *left)
{
    int now = __atomic_load_n(left, __ATOMIC_SEQ_CST);
    while (now > 0)
        if (__atomic_compare_exchange_n(left, &now, now - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return 1;
    return 0;
}

/* A signal that comes meanwhile does not end it: it is noted, and the interpreter's function for it runs when it has control again. */
static void wait_for(int milliseconds)
{
    struct timespec left = { milliseconds / 1000, milliseconds % 1000 * 1000000L };
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    static int (*real)(int, struct sockaddr *, socklen_t *, int);
    int domain = AF_UNIX, taken;
    socklen_t size = sizeof domain;
    if (!real)
        real = dlsym(RTLD_NEXT, "accept4");
    if (!orders || getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) || domain == AF_UNIX)
        return real(fd, address, length, flags);
    if (refused(&orders->accepts)) {
        errno = orders->accept_errno;
        return -1;
    }
    wait_for(orders->late);
    taken = real(fd, address, length, flags);
    if (taken >= 0)
        wait_for(orders->held);
    return taken;
}

pid_t fork(void)
{
    static pid_t (*real)(void);
    if (!real)
        real = dlsym(RTLD_NEXT, "fork");
    if (orders && orders->fork_pid == getpid() && refused(&orders->forks)) {
        errno = orders->fork_errno;
        return -1;
    }
    return real();
}
