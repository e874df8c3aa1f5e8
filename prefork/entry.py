"""The program `prefork`: who reads the command line, and who becomes the master.

What the master has imported is copied for each worker, page by page, and torn down with it. So the command line of `prefork serve`
is read by a child, and click stays there with what it imports: a sixth of the memory, 0.4 ms of the 5 until somebody who was killed
is replaced. Meanwhile the master imports its own part, so the start is no slower.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import NoReturn

from prefork.config import Sources
from prefork.errors import PreforkError
from prefork.system import guard, process, program


def entry() -> NoReturn:
    """Carry out the command line. Whatever goes wrong is told, and has its exit code."""
    if sys.argv[1:2] == ["serve"]:
        try:
            _become_master(_read_by_a_child)
        except KeyboardInterrupt:  # before there is a master, which hears it as a signal; the child says so
            sys.exit(1)
    from prefork import cli

    cli.entry(lambda sources: _become_master(lambda: sources))


def _become_master(read: Callable[[], Sources]) -> NoReturn:
    is_successor = program.is_successor(os.environ)
    try:
        # Handlers of our own user must not take the master's descriptors. After an exec it has to be done anew, first of all.
        process.become_private()
        process.open_standard_descriptors()
        sources = read()
        from prefork.commands import obey
        from prefork.master import Master

        master = Master(sources, obey, program.started("serve"))
        master.start()
        is_successor = False
        status = master.run()
    except Exception as error:
        if is_successor:
            raise  # below is who becomes the old program again, and tells this
        from prefork import cli

        cli.tell(error)
    sys.exit(status)


def _read_by_a_child() -> Sources:
    """What `serve` is given. SystemExit, with the child's exit code, when there is nothing to serve: it has said why, or helped."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it hears of no exit code
    left, _ = signal.getitimer(signal.ITIMER_REAL)  # until an upgrade is given up
    with ExitStack() as opened:
        try:
            reading, writing = os.pipe()
            opened.callback(os.close, reading)
            opened.callback(os.close, writing)
            pid = os.fork()
        except OSError:  # no room for a pipe or a process: an upgrade must not end a daemon for that
            return _read_here()
        opened.pop_all()
    if pid == 0:
        os.close(reading)
        guard.arm(left)  # timers are not inherited, and the old program would not know of this process
        _send_to(writing)
    os.close(writing)
    from prefork import commands, master  # noqa: F401 - they take as long as the child does

    with open(reading, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # somebody has killed it, the kernel for want of memory perhaps
        return _read_here()
    if not sent:
        sys.exit(code)
    return Sources(**json.loads(sent))


def _read_here() -> Sources:
    """The same at the price of click's memory."""
    from prefork import cli

    found: list[Sources] = []
    try:
        cli.entry(found.append)
    except SystemExit:
        if not found:
            raise
    return found[0]


def _send_to(writing: int) -> NoReturn:
    """The child's part. Nothing may unwind into the frames below, which would go back to another program in the master's name."""
    status = PreforkError.exit_code

    def send(sources: Sources) -> None:
        given = {"command_line": sources.command_line, "environment": sources.environment, "file": sources.file}
        with open(writing, "w") as pipe:
            json.dump(given, pipe)

    try:
        from prefork import cli

        cli.entry(send)
    except SystemExit as ending:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        status = ending.code if isinstance(ending.code, int) else 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)
