"""The log: events are named once, here, with their level and their sentence; this is the one place that turns them into lines.

Code says ``log.event("worker_died", slot=3, ...)``. A line is written with one ``write(2)`` to standard error, so lines of
many processes do not mix (POSIX: up to PIPE_BUF on a pipe). A line that can't be written is counted, and the count is told
with the next one that can: the log never stops the daemon.
"""

import os
import signal
import stat
import time
from enum import IntEnum
from typing import Any


class Level(IntEnum):
    """How much a line matters."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


# name: level, sentence. Fields are the keyword arguments of `event`; `text` (a traceback) follows the line, indented.
EVENTS: dict[str, tuple[Level, str]] = {
    # the daemon
    "serving": (
        Level.INFO,
        "prefork {version} serving {module} on {addresses}: {acceptors} acceptors each, name {name}, pid {pid}",
    ),
    "stopping": (Level.INFO, "stopping ({why}): {busy} connections have {seconds:g} s to finish"),
    "stopping_quickly": (Level.INFO, "stopping at once ({why})"),
    "stopped": (Level.INFO, "stopped: {accepted} connections accepted, {killed} cut"),
    "cut": (Level.WARNING, "worker {slot} of generation {generation} (pid {pid}) is killed, serving {peer}: {why}"),
    "log_may_wait": (Level.WARNING, "standard error can't be opened anew ({reason}): a reader that stops stops the daemon"),
    "unknown_variable": (Level.WARNING, "the environment variable {name} is no option: {remedy}"),
    "control_failed": (Level.WARNING, "no control socket, serving on without: {reason}"),
    "control_refused": (Level.WARNING, "control client refused: {reason}"),
    "handlers_are_root": (Level.WARNING, "handlers run as root: give a user to run them as (--user)"),
    "activated_unused": (Level.WARNING, "sockets of the service manager are not used, bind names others: {names}"),
    "address_kept": (Level.WARNING, "{address} stays as it was: {reason}"),
    "suspended": (Level.INFO, "suspended: nobody accepts, new clients wait in the queue; {busy} connections go on"),
    "resumed": (Level.INFO, "resumed: accepting again"),
    "control_crowded": (Level.WARNING, "more than {most} control clients at once: {count} that said nothing were let go"),
    "listening": (Level.INFO, "listening on {address}"),
    "no_longer_listening": (Level.INFO, "no longer listening on {address}"),
    "limit": (Level.WARNING, "{what} is {has}, {why} can need {needs}: {remedy}"),
    "bug": (Level.ERROR, "internal error in the {where}, please report it"),
    # reload
    "booting": (Level.DEBUG, "generation {generation} starts: {module}"),
    "committed": (Level.INFO, "generation {generation} serves {module} ({seconds:.3f} s)"),
    "refused": (Level.ERROR, "{what} refused, generation {generation} keeps serving: {reason}"),
    "drained": (Level.DEBUG, "generation {generation} has ended"),
    "scaled": (Level.INFO, "workers: {workers} acceptors for each address, until the next reload ({why})"),
    "reload_queued": (Level.INFO, "a reload is under way: another one follows it"),
    "ignored": (Level.INFO, "{what} ignored: {why}"),
    # processes
    "fork_server_died": (Level.ERROR, "the fork server of generation {generation} died ({cause}); its workers serve on"),
    "fork_server_hung": (Level.ERROR, "the fork server of generation {generation} does not answer: it is killed"),
    "restarting": (Level.WARNING, "a new fork server in {seconds:.1f} s: {reason}"),
    "worker_died": (Level.WARNING, "worker {slot} of generation {generation} (pid {pid}) died: {cause}, serving {peer}"),
    "worker_ended": (Level.DEBUG, "worker {slot} of generation {generation} (pid {pid}) has left: {cause}"),
    "recycled": (
        Level.DEBUG,
        "worker {slot} of generation {generation} (pid {pid}) is recycled; its slot has served {connections} connections",
    ),
    "worker_early": (
        Level.ERROR,
        "worker {slot} of generation {generation} (pid {pid}) {what}: {cause}; {failures} in a row, next try in {seconds:.1f} s",
    ),
    "fork_failed": (Level.ERROR, "fork failed: {reason}; {failures} in a row, next try in {seconds:.1f} s"),
    "fork_again": (Level.INFO, "workers start again, after {failures} failures"),
    "saturated": (Level.WARNING, "max_workers = {max_workers} reached on {address}: new clients wait in the queue"),
    "unsaturated": (Level.INFO, "{address} has acceptors again, after {seconds:.1f} s at the ceiling"),
    "gossip": (Level.WARNING, "{count} reports from processes of generation {generation} made no sense and were ignored"),
    "spoilt_slot": (Level.WARNING, "worker {slot} of generation {generation} left impossible counters: put back"),
    # in workers
    "handler_error": (Level.ERROR, "the handler raised, serving {peer}"),
    "handler_errors": (Level.ERROR, "{count} more tracebacks of the handler were not logged"),
    "peer_gone": (Level.DEBUG, "{peer} ended the connection: {reason}"),
    "accept_paused": (Level.ERROR, "accept failed {count} times: {reason}; trying again every {seconds:g} s"),
    "accept_again": (Level.INFO, "accept works again, after {count} failures"),
    "accept_broken": (Level.ERROR, "accept failed: {reason}; this worker ends and is replaced"),
    "accept_unblocked": (Level.WARNING, "somebody made the listening socket non-blocking: blocking again"),
    "late_alarm": (Level.WARNING, "an alarm that the handler left behind rang after its end: {reason}"),
    "not_at_home": (Level.WARNING, "the handler left another working directory and no way back ({reason}): this worker ends"),
    "exit_failed": (Level.ERROR, "ending this worker: {what} raised"),
}

_level = Level.INFO
_role = "master"
_fd = 2
_shielded = False
_dropped = 0
# Taken before anybody wraps it.
_mask = signal.pthread_sigmask
# What write(2) puts into a pipe in one piece (pipe(7)).
_PIPE_BUF = 4096


def configure(*, level: str | None = None, role: str | None = None) -> None:
    """Set the least level that is written, and what this process is called in its lines."""
    global _level, _role
    _level = Level[level.upper()] if level is not None else _level
    _role = role if role is not None else _role


def never_wait() -> None:
    """Make writing to a pipe that nobody empties fail instead of waiting. Once, by the master; its children inherit it.

    O_NONBLOCK belongs to the open file, which others share: so the pipe is opened anew.
    """
    global _fd, _shielded
    # From the background of a terminal with TOSTOP a write raises SIGTTOU, which the master handles: the write would be
    # interrupted and tried again for ever. With the signal blocked it goes through (tcsetattr(3), tty_ioctl(4)).
    _shielded = os.isatty(2)
    if _fd == 2 and stat.S_ISFIFO(os.fstat(2).st_mode):
        try:
            _fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            event("log_may_wait", reason=error.strerror)


def descriptors() -> set[int]:
    """What a process must keep open to be heard."""
    return {1, 2, _fd}


def event(name: str, /, *, text: str = "", **fields: Any) -> None:
    """Log the event ``name``. Raises KeyError when it, or one of its fields, is unknown: that is a bug of ours."""
    level, sentence = EVENTS[name]
    if level >= _level:
        _write(level, sentence.format_map(fields), text)


def _write(level: Level, message: str, text: str) -> None:
    global _dropped
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03d}"
    head = f"{stamp} {level.name} {_role}[{os.getpid()}]: "
    lines = [head + _printable(message), *("    " + _printable(line) for line in text.splitlines())]
    if _dropped:
        lines.insert(0, f"{head}{_dropped} log lines could not be written")
    for piece in _pieces([(line + "\n").encode("utf-8", "backslashreplace") for line in lines]):
        blocked = _mask(signal.SIG_BLOCK, {signal.SIGTTOU}) if _shielded else None
        try:
            os.write(_fd, piece)
        except OSError:
            _dropped += 1
            return
        finally:
            if blocked is not None:
                _mask(signal.SIG_SETMASK, blocked)
    _dropped = 0


def _pieces(lines: list[bytes]) -> list[bytes]:
    """Whole lines, joined as long as the pieces are written in one go."""
    pieces = [b""]
    for line in lines:
        if pieces[-1] and len(pieces[-1]) + len(line) > _PIPE_BUF:
            pieces.append(b"")
        pieces[-1] += line
    return pieces


def _printable(line: str) -> str:
    """What comes from users' code or clients must not forge lines or steer a terminal."""
    return line if line.isprintable() else "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line)
