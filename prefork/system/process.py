"""Processes: fork, wait, signals to others, prctl, titles. Thin effects, no decisions (Linux: prctl(2), wait(2), proc(5))."""

import contextlib
import ctypes
import errno
import functools
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from setproctitle import setproctitle

from prefork.errors import ConfigError
from prefork.system import signals

# The most that kernel.pid_max can be (proc(5)).
PID_LIMIT = 1 << 22
# Reaped in one go: an end takes 3 us, and so does a stop, but a child can be stopped and continued as fast as it is asked about.
ENDS_AT_ONCE, CHANGES_AT_ONCE = 1024, 32
_PR_SET_PDEATHSIG = 1
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_SET_CHILD_SUBREAPER = 36
# fs.nr_open, unless an administrator has raised it (proc_sys_fs(5)).
_DESCRIPTORS_LIMIT = 1 << 20
_UCRED = struct.Struct("3i")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that was reaped: its wait status and what it had used."""

    pid: int
    status: int
    utime: float
    stime: float
    max_rss_kib: int


@dataclass(frozen=True, slots=True)
class Changed:
    """A child that was stopped or continued by a signal."""

    pid: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a Unix socket."""

    pid: int
    uid: int


def prctl(option: int, argument: int) -> None:
    """Ask the kernel for something of this process, with one argument (prctl(2)). Raises OSError."""
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_standard_descriptors() -> None:
    """Put /dev/null where standard input, output or error are closed, so that no descriptor of ours takes their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)


def become_subreaper() -> None:
    """Descendants whose parent dies become our children, not init's. Survives exec."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def become_private() -> None:
    """Let no other process of our user trace this one or take its descriptors (ptrace(2), pidfd_getfd(2)).

    A core is not left either, and what /proc/self has is root's. Children inherit it; an exec or another user ends it.
    """
    prctl(_PR_SET_DUMPABLE, 0)


@contextlib.contextmanager
def private() -> Iterator[None]:
    """A private process in the block; afterwards it is what it was."""
    before = _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    become_private()
    try:
        yield
    finally:
        if before == 1:
            prctl(_PR_SET_DUMPABLE, 1)


def becoming_public() -> Callable[[], object]:
    """What makes a child of a private process like any other one of its user."""
    return functools.partial(_libc.prctl, _PR_SET_DUMPABLE, ctypes.c_ulong(1), 0, 0, 0)


def signal_when_orphaned(signo: int) -> None:
    """Get ``signo`` when the parent dies, and again for each new parent. Cleared when credentials change: call it after."""
    prctl(_PR_SET_PDEATHSIG, signo)


def signalling_when_orphaned(signo: int) -> Callable[[], object]:
    """What does that in a child of this process, which may do it itself."""
    return functools.partial(_libc.prctl, _PR_SET_PDEATHSIG, ctypes.c_ulong(signo), 0, 0, 0)


def parting() -> Callable[[], object]:
    """What takes a child of this process out of its group, so that a killpg, or the terminal's Ctrl-C, reaches no other process.

    Out of its session too where that has a terminal: a group alone would be stopped when it reads from it (SIGTTIN). Where there is
    none the session stays, for two reasons. Sessions are scheduling groups (sched(7), autogroup), and workers in one each cost 4 %
    of a short connection where caches are cold. And the kernel hangs up a group with somebody stopped in it once no member has a
    parent elsewhere in the session (setpgid(2)): so it must not be without the master.
    """
    stat = _stat("self").split(maxsplit=5)  # whatever namespace /proc is of
    return os.setpgrp if len(stat) > 5 and stat[_TERMINAL] == b"0" else os.setsid


def batch_scheduling() -> Callable[[], object] | None:
    """What makes a child of this process one that interrupts nobody when it wakes (SCHED_BATCH, sched(7)).

    None when this process was given another policy than the usual one: that is somebody's wish. Raises OSError where it can't be
    had, which is tried here, so that nobody's birth can fail of it.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return None
    usual = os.sched_param(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, usual)
    os.sched_setscheduler(0, os.SCHED_OTHER, usual)
    return functools.partial(_libc.sched_setscheduler, 0, os.SCHED_BATCH, ctypes.byref(ctypes.c_int(0)))


def allow_limit(which: int, value: int) -> None:
    """Make sure that our children may set this limit to ``value``: root raises the hard limit. Raises PermissionError."""
    soft, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY and (value == resource.RLIM_INFINITY or value > hard):
        try:
            resource.setrlimit(which, (soft, value))
        except ValueError:  # what Python makes of EPERM here (setrlimit(2))
            raise PermissionError(f"the hard limit is {hard}, less than {value}") from None


def peer_of(sock: socket.socket) -> Peer:
    """Who connected to us, or for who connects: who listens (SO_PEERCRED, unix(7))."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)


def working_directory() -> str:
    """Where we are, by the name it was entered by: a deploy may switch what the name stands for, and a reload must follow.

    Raises ConfigError when it was removed.
    """
    try:
        real = os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory was removed: start prefork in one that exists") from None
    name = os.environ.get("PWD", "")
    try:
        return name if name.startswith("/") and os.path.samefile(name, real) else real
    except OSError:
        return real


def is_nowhere() -> bool:
    """Whether our working directory was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def set_title(title: str) -> None:
    """What ps(1) shows."""
    setproctitle(title)


def reap(*, stops: bool = False) -> list[Ended | Changed]:
    """Everything that wait4(2) has to tell, without waiting, and of a flood as much as is worth a turn.

    Then a SIGCHLD to ourselves says that there is more. Ends do not wait behind stops: the kernel tells of the oldest child first,
    and one that is stopped and continued without end would hide those that were forked after it.
    """
    found: list[Ended | Changed] = []
    options = os.WNOHANG | (os.WUNTRACED | os.WCONTINUED if stops else 0)
    ends, changes = ENDS_AT_ONCE, CHANGES_AT_ONCE
    while ends:
        try:
            pid, status, usage = os.wait4(-1, options)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            found.append(Changed(pid, os.WIFSTOPPED(status)))
            changes -= 1
            if not changes:
                options = os.WNOHANG
        else:
            found.append(Ended(pid, status, usage.ru_utime, usage.ru_stime, usage.ru_maxrss))
            ends -= 1
    if not (ends and changes):
        signal.raise_signal(signal.SIGCHLD)
    return found


def children() -> set[int]:
    """Our children, also those that have ended and were not reaped."""
    # Not /proc/self/task/*/children: it may leave out living ones when others end meanwhile (proc_pid_task(5)). Nor psutil, which
    # reads /proc/stat for it: a service with ProcSubset=pid has none.
    us = str(os.getpid()).encode()
    return {int(name) for name in os.listdir("/proc") if name.isdigit() and _stat(int(name)).split(maxsplit=2)[1:2] == [us]}


def started_by_us() -> dict[int, str]:
    """Our children that run, each by its number and its command in words. Not the process by which multiprocessing tracks its
    resources: it ends by itself, with the last process that has them.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return {}  # to look through all processes takes a while where there are many
    tracker = getattr(getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None), "_pid", None)
    return {pid: f"{pid} ({_command(pid)})" for pid in sorted(children()) if pid != tracker and state(pid) not in (b"", b"Z")}


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            words = file.read(256).rstrip(b"\0").replace(b"\0", b" ")
    except OSError:
        words = b""
    return words.decode(errors="backslashreplace") or "unnamed"


def end_children(pids: Iterable[int], seconds: float) -> None:
    """SIGTERM to these children of ours, and SIGKILL to those that are there after ``seconds``. Ends when the last has ended."""
    ours = [pid for pid in pids if signal_child(pid, signal.SIGTERM)]
    deadline = time.monotonic() + seconds
    for pid in ours:
        fd = os.pidfd_open(pid)  # a child: it is there until it is reaped
        try:
            ended = select.poll()
            ended.register(fd, select.POLLIN)
            if not ended.poll(1000 * max(0.0, deadline - time.monotonic())):
                signal_child(pid, signal.SIGKILL)
        finally:
            os.close(fd)


def inherited_children() -> set[int]:
    """Children from before the exec of this program, when asked before the first fork; none where the kernel doesn't tell."""
    before = None
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
                found = file.read()
        except OSError:  # a kernel without it, or no /proc
            return set()
        # It may leave living ones out while others end (proc_pid_task(5)).
        if found == before:
            return set(map(int, found.split()))
        before = found


def is_child(pid: int) -> bool:
    """Whether ``pid`` is a child of ours that was not reaped yet. Any number may be asked about."""
    if not 1 < pid <= PID_LIMIT:
        return False
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def has_ended(pid: int) -> bool:
    """Whether a child of ours has ended, reaped or not."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def clock_of_starts() -> float:
    """The time now in seconds, as `started_at` has it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started_at(pid: int) -> float | None:
    """When a process was forked, to the next lower tick of `TICK` seconds; None when that can't be read."""
    stat = _stat(pid).split()
    return int(stat[_STARTED]) * TICK if len(stat) > _STARTED else None


def signal_child(pid: int, signo: int) -> bool:
    """Send a signal to a child of ours that was not reaped yet, and to nobody else: the pid may come from user code's memory.

    False when ``pid`` is not our child, or can't be signalled by us.
    """
    if not is_child(pid):
        return False
    try:
        os.kill(pid, signo)
    except PermissionError:
        return False  # it runs as another user by now: a set-user-ID program
    return True


def kill_child(pid: int, *, group: bool) -> None:
    """SIGKILL to a child of ours that was not reaped yet; with ``group`` also to the process group that it has made.

    That group's number is the child's own pid, which no other process or group can have before the child is reaped. Where the
    child is now is user code's word: it may have joined another group.
    """
    if not is_child(pid):
        return
    signal_child(pid, signal.SIGKILL)
    if group:
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # there is no such group (any more), or only programs that have become other users are left in it


def state(pid: int) -> bytes:
    """The process's state as proc_pid_stat(5) has it: R (runs, or waits for a CPU), T (stopped), ...; nothing when it has gone."""
    return _stat(pid)[:1]


# Of what `_stat` gives, the number of the controlling terminal, and when the process was forked.
_TERMINAL, _STARTED = 4, 19
TICK = 1 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int | str) -> bytes:
    """State, parent and what else proc_pid_stat(5) has after the command's name; nothing of one that has gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        stat = os.read(fd, 512)
    except ProcessLookupError:
        return b""
    finally:
        os.close(fd)
    # The name is in parentheses and may hold anything.
    return stat[stat.rfind(b")") + 2 :]


def end_input(fd: int) -> None:
    """Shut down the reading side of a socket, by its descriptor: an SSLSocket's shutdown() drops the TLS layer. Raises OSError."""
    if _libc.shutdown(fd, socket.SHUT_RD) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def resident_memory() -> int:
    """Bytes of memory that this process has in RAM, what it shares included: what ps(1) calls RSS (proc_pid_statm(5))."""
    with open("/proc/self/statm", "rb", buffering=0) as statm:
        return int(statm.read(128).split()[1]) * _PAGE


def memory_parts() -> tuple[int, int]:
    """Bytes in RAM that are this process' own, and those of files and shared memory (proc_pid_statm(5))."""
    with open("/proc/self/statm", "rb", buffering=0) as statm:
        resident, shared = map(int, statm.read(128).split()[1:3])
    return (resident - shared) * _PAGE, shared * _PAGE


def pipe_to_share() -> tuple[int, int]:
    """A pipe that neither end waits for, whose writing end each of those who get it can open anew (`reopening`)."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.fchmod(write_end, 0o222)  # they may be another user
    return read_end, write_end


def reopening(fd: int) -> Callable[[], object]:
    """What makes the writing end of a pipe at ``fd`` this process' own one.

    O_NONBLOCK belongs to the open file that all share who have inherited it (open(2)): any of them can have the others wait for
    ever in write(2). Nothing is to be done where it is no pipe (any more), and nothing can be without /proc.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return _nothing
    path, flags = f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
    open_file, dup2, close = os.open, os.dup2, os.close

    def reopen() -> None:
        try:
            own = open_file(path, flags)
        except OSError:  # no /proc, or no descriptor to be had: it is shared
            return
        dup2(own, fd, False)
        close(own)

    return reopen


def _nothing() -> None:
    """Nothing."""


def descriptors() -> list[int]:
    """The descriptors that are open."""
    try:
        candidates = [int(name) for name in os.listdir("/proc/self/fd")]
    except FileNotFoundError:  # no /proc
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        candidates = list(range(_DESCRIPTORS_LIMIT if soft == resource.RLIM_INFINITY else min(soft, _DESCRIPTORS_LIMIT)))
    found = []
    for fd in candidates:
        try:
            os.fstat(fd)
        except OSError:
            continue  # listdir's own
        found.append(fd)
    return found


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor that is not in ``keep``: what was inherited by a fork and is not needed must not live on in it."""
    for fd in descriptors():
        if fd not in keep:
            os.close(fd)


# A descriptor of where we were before user code went elsewhere; or that it did not, or that none was left to remember it by.
_AT_HOME, _NO_WAY_BACK = -1, -2
_home = _AT_HOME


def watch_folder(mark: Callable[[], None]) -> None:
    """From now on remember where user code comes from that changes the working directory, and tell ``mark``."""
    for changing in ("chdir", "fchdir"):
        setattr(os, changing, _leaving(getattr(os, changing), mark))


def _leaving(function: Callable[..., None], mark: Callable[[], None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        global _home
        if _home == _AT_HOME:
            try:
                _home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:  # a call that needs no descriptor must not fail of ours
                _home = _NO_WAY_BACK
        mark()
        function(*args, **kwargs)

    return call


def go_home() -> None:
    """Back to the working directory that we had at the last `settle`. Raises OSError when user code has closed the way."""
    if _home == _NO_WAY_BACK:
        raise OSError(errno.EMFILE, "no descriptor was left to come back by")
    if _home != _AT_HOME:
        os.fchdir(_home)
    settle()


def settle() -> None:
    """The working directory that we have now is the right one."""
    global _home
    if _home >= 0:
        os.close(_home)
    _home = _AT_HOME


def describe(status: int) -> str:
    """A wait status in words, whatever number it is."""
    if not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        return f"wait status {status:#x}"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    return f"signal {-code} ({signals.name(-code)})"
