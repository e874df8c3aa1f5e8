"""User code that puts functions of its own into the standard library's modules: supervision and the accept loop keep theirs."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork.testing import Server
from tests import watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

ECHO = """
def loop(sock):
    prefork.current()
    while data := sock.recv(64):
        sock.sendall(data)
"""
# What the import system needs is what it has: it has bound posix's functions itself.
EVERY_FUNCTION = """
import os, select, signal, socket, sys, threading, time
import prefork
def broken(*args, **kwargs):
    caller = sys._getframe(1)
    os_write(2, f"a replaced function was called: {caller.f_code.co_filename}:{caller.f_lineno}\\n".encode())
    os_exit(9)
os_write, os_exit = os.write, os._exit
for module in (os, select, signal, socket, threading, time):
    for name in dir(module):
        if callable(getattr(module, name)) and name[0].islower() and name not in ("fspath", "error"):
            setattr(module, name, broken)
"""
# gevent takes select.poll away as well.
NO_POLL = "\nimport select\ndel select.poll, select.epoll\n"
SOURCES = {
    "every-function": EVERY_FUNCTION,
    "no-poll": "import prefork" + NO_POLL,
    "in-a-hook": "import prefork\ndef start():\n" + "\n".join(f"    {line}" for line in EVERY_FUNCTION.splitlines()),
}


def echoes(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(b"hello")
        assert sock.recv(64) == b"hello"


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_workers_are_served_watched_replaced_and_stopped(prefork_server: Start, module: Module, source: str) -> None:
    hook = {"on_worker_start": "mine:start"} if "def start" in source else {}
    folder = module(source + ECHO)
    server = prefork_server("mine:loop", folder=folder, workers=2, max_connections=8, timeout=30, **hook)
    echoes(server)
    victim = watch.workers(server, "idle")[0]["pid"]
    os.kill(victim, signal.SIGKILL)
    watch.until("its death is told", lambda: [death for death in server.status()["deaths"] if death["pid"] == victim])
    watch.settled(server, 2)
    for _ in range(20):  # more than one worker may serve
        echoes(server)
    assert server.command("reload")["ok"]
    assert server.command("scale", workers=3)["ok"]
    echoes(server)
    watch.settled(server, 3)
    totals = watch.quiet(server)
    assert (totals["ok"], totals["error"], totals["killed"]) == (22, 0, 0)
    server.stop()
    assert "replaced function" not in server.log()
    assert server.process.returncode == 0
