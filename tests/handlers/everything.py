"""Echo, with the deeds of `bad` and the orders of `hostile`, and what `spoiling` and `floods` do to what all share: what all faults
together strike at. They serve copies of these.
"""

import importlib
import os
import resource
import signal
import socket
import threading
import time
from contextlib import suppress

from prefork import worker
from prefork.pool import scoreboard

bad, hostile, spoiling, floods = (
    importlib.import_module(name)  # beside this copy
    for name in ("bad", "hostile", "spoiling", "floods")
)
# What a worker that leaks descriptors has of them, and those that it has leaked.
FEW = 64
leaked: list[int] = []


def loop(sock: socket.socket) -> None:
    """Send back everything that arrives on ``sock``; an order is carried out first, and answered with what it returns."""
    while data := sock.recv(4096):
        if data.startswith(hostile.ORDER):
            name, *arguments = data.removeprefix(hostile.ORDER).decode().split()
            data = (hostile.DEEDS.get(name) or DEEDS[name])(*arguments).encode()
        elif deed := bad.DEEDS.get(line := data.decode("latin-1")) or WANTS.get(line):
            deed(sock)
            if sock.fileno() == -1:
                return
        sock.sendall(data)


def leaks_every_descriptor(sock: socket.socket) -> None:
    """Open files until there is no number for another one, and keep the connection's, too, when it was answered."""
    _limit(FEW)
    with suppress(OSError):
        while True:
            leaked.append(os.open(os.devnull, os.O_RDONLY))
    sock.sendall(b"leaked")
    sock.shutdown(socket.SHUT_WR)
    leaked.append(sock.detach())


def opens_nothing_more(sock: socket.socket) -> None:
    """As sandboxes do; but with a limit of 0 poll(2) fails, by which a socket with a time-out waits, this connection's, too."""
    _limit(1)


def _limit(soft: int) -> None:
    # Strikes that have lowered it for a moment raise it again.
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def spoil_listener(how: str) -> str:
    """A deed of `spoiling`."""
    try:
        getattr(spoiling, how)()
    except (OSError, LookupError) as error:
        return f"not spoilt: {error}"  # another strike has left no descriptor, or no listener
    return "spoilt"


def wait_in_vfork(fifo: str) -> str:
    """Be in state D until there is a writer (`stuck.waits_in_vfork`)."""
    opening = (os.POSIX_SPAWN_OPEN, 0, fifo, os.O_RDONLY, 0)
    try:
        child = os.posix_spawn("/bin/true", ["true"], {}, file_actions=[opening])
    except OSError as error:
        return f"not started: {error}"  # another strike has left no descriptor, or no process
    os.waitpid(child, 0)
    return "over"


def rings_in_heaps(seconds: str) -> str:
    """That of `floods`, for so long."""
    floods.rings_in_heaps(float(seconds))
    return "rung"


WANTS = {deed.__name__.replace("_", " "): deed for deed in (leaks_every_descriptor, opens_nothing_more)}
DEEDS = {deed.__name__: deed for deed in (spoil_listener, wait_in_vfork, rings_in_heaps)}


def start() -> None:
    """The hook on_worker_start: as long as there is the file ``fleeting`` no worker stays."""
    if os.path.exists("fleeting"):
        threading.Thread(target=_leave, daemon=True).start()


def _leave() -> None:
    """10 ms after it could accept, and without the client that it may serve by then, as when it is asked to."""
    here, main = worker._here, threading.main_thread().ident
    assert here is not None
    assert main is not None
    while here.board.states[here.slot] != scoreboard.IDLE:
        time.sleep(0.001)
    while True:  # a signal just before accept() is entered does not interrupt it
        time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGTERM)
