"""The strikes: each does something bad to a running daemon once, and says how many clients may fail of it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.faults.arena import Arena, Strike

# How long a process is stopped: a fork server that stays stopped for 2 s is replaced.
BRIEFLY, LONGER_THAN_PATIENCE = 0.3, 2.5
# What a handler may do to its worker (`tests.handlers.bad`) that keeps it from leaving or serving, unless somebody sees to it.
SPOILT = (b"blocks sigterm", b"replaces sigterm", b"leaves an alarm", b"closes every descriptor")
# Of these: the connection is closed, too, or the alarm rings before the answer is sent.
UNANSWERED = (b"leaves an alarm", b"closes every descriptor")
# Code that crashes at each connection.
CRASHES = "import os\nloop = lambda sock: os.abort()\n"
# Fork servers in a row that do not live: of the second short life nobody would be told, the third is backed off from.
SHORT_LIVES, LONGEST_ROW = 3, 4.0
STRIKES: dict[str, Strike] = {}


def strike(permits: int = 0) -> Callable[[Callable[[Arena], None]], Strike]:
    """A decorator: this is a strike of which so many clients may fail."""

    def register(hit: Callable[[Arena], None]) -> Strike:
        name = hit.__name__
        STRIKES[name] = Strike(name, hit, permits)
        return STRIKES[name]

    return register


def _kill(pid: int | None, signo: int) -> bool:
    """Send a signal, unless there is nobody to send it to. Whether it was sent."""
    if pid is None:
        return False
    try:
        os.kill(pid, signo)
    except ProcessLookupError:
        return False  # it has left meanwhile
    return True


def _stop(pid: int | None, seconds: float) -> None:
    if _kill(pid, signal.SIGSTOP):
        time.sleep(seconds)  # the fault is time itself
        _kill(pid, signal.SIGCONT)


@strike()
def hup(ring: Arena) -> None:
    """A reload."""
    os.kill(ring.server.pid, signal.SIGHUP)


@strike()
def usr2(ring: Arena) -> None:
    """An upgrade."""
    os.kill(ring.server.pid, signal.SIGUSR2)


@strike()
def usr1(ring: Arena) -> None:
    """The log is rotated."""
    ring.rotate()


@strike()
def ttin(ring: Arena) -> None:
    """An acceptor more."""
    os.kill(ring.server.pid, signal.SIGTTIN)


@strike()
def ttou(ring: Arena) -> None:
    """An acceptor fewer."""
    os.kill(ring.server.pid, signal.SIGTTOU)


@strike()
def import_error(ring: Arena) -> None:
    """A reload whose import raises."""
    _refused(ring, "raise ImportError('as told')\n")


@strike()
def import_hangs(ring: Arena) -> None:
    """A reload whose import never returns."""
    _refused(ring, "import time\ntime.sleep(600)\n")


@strike(permits=40)
def crashing_code(ring: Arena) -> None:
    """A reload to code that crashes at each connection: with a canary it takes itself back after the first few.

    Mostly four clients fail. A dying worker is busy until the kernel has written its core, and others are forked meanwhile, so
    there may be more; the arena sees to it that each was served by one that died.
    """
    _refused(ring, CRASHES, last="")


def _refused(ring: Arena, first: str, last: str | None = None) -> None:
    with ring.module_lock:
        ring.write_module(first, last)
        answer = reload(ring)
        ring.write_module()
    assert not answer["ok"], answer


def reload(ring: Arena) -> dict[str, Any]:
    """Have it reload, and wait for what becomes of it."""
    answer = ring.server.command("reload")
    if "upgrade" in answer:  # one was under way, and has taken this along
        answer = ring.server.command("outcome", upgrade=answer["upgrade"])
    return answer


@strike(permits=1)
def kill_worker(ring: Arena) -> None:
    """SIGKILL to a worker."""
    victim = ring.worker()
    if victim is not None and _kill(victim, signal.SIGKILL):
        ring.victims.append(victim)


@strike()
def segfault(ring: Arena) -> None:
    """A client whose handler runs into a segmentation fault: it fails, and nobody else."""
    assert ring.ask(b"segfaults", may_be_cut=True) == b""


@strike()
def spoil_worker(ring: Arena) -> None:
    """A client whose handler leaves its worker in a state in which it would not leave or not serve."""
    deed = ring.chance.choice(SPOILT)
    ring.ask(deed, may_be_cut=deed in UNANSWERED)


@strike()
def stop_worker(ring: Arena) -> None:
    """SIGSTOP to a worker, and SIGCONT after a while: it ends what it was doing."""
    _stop(ring.worker(), BRIEFLY)


@strike()
def stop_and_continue_worker(ring: Arena) -> None:
    """SIGSTOP and SIGCONT to a worker, as fast as can be, while a reload goes on."""
    pid = ring.worker()
    os.kill(ring.server.pid, signal.SIGHUP)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):  # it may leave at any time
        worker = os.pidfd_open(pid)  # the number may be given again
        try:
            end = time.monotonic() + BRIEFLY
            while time.monotonic() < end:
                signal.pidfd_send_signal(worker, signal.SIGSTOP)
                signal.pidfd_send_signal(worker, signal.SIGCONT)
                time.sleep(0)  # so that this process' clients go on, too
        finally:
            os.close(worker)


@strike()
def kill_fork_server(ring: Arena) -> None:
    """SIGKILL to the fork server."""
    _kill(ring.fork_server(), signal.SIGKILL)


@strike()
def kill_new_fork_servers(ring: Arena) -> None:
    """SIGKILL to the fork server, and to the next ones as soon as their generations serve."""
    end = time.monotonic() + LONGEST_ROW
    for _ in range(SHORT_LIVES):
        generation = ring.generation()
        _kill(ring.fork_server(), signal.SIGKILL)
        while ring.generation() == generation:
            if time.monotonic() > end:
                return
            time.sleep(0.01)


@strike()
def segv_fork_server(ring: Arena) -> None:
    """SIGSEGV to the fork server."""
    _kill(ring.fork_server(), signal.SIGSEGV)


@strike()
def stop_fork_server(ring: Arena) -> None:
    """The fork server is stopped for less than the master's patience."""
    _stop(ring.fork_server(), BRIEFLY)


@strike()
def stop_fork_server_for_long(ring: Arena) -> None:
    """The fork server is stopped until the master has replaced it."""
    _stop(ring.fork_server(), LONGER_THAN_PATIENCE)


@strike()
def stop_master(ring: Arena) -> None:
    """The master is stopped for a moment."""
    _stop(ring.server.pid, BRIEFLY)
