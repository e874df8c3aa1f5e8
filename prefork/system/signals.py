"""Signals to ourselves: how a loop receives them, and how a fork gets the dispositions of a fresh process.

A child inherits the parent's Python handlers until it installs its own: so block everything, fork, install, unblock
(measured: between exec or fork and installation each handled signal killed the process, or was swallowed by the parent's
handler). In loops a handler does nothing: the number arrives through ``set_wakeup_fd``, and the loop reads it.
"""

import _signal  # type: ignore[import-not-found]
import faulthandler
import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# Ours: nobody's user code knows it, so a handler that replaces TERM does not hide the death of a parent.
PARENT_DIED = signal.SIGRTMIN + 2
TIMERS = {
    signal.ITIMER_REAL: signal.SIGALRM,
    signal.ITIMER_VIRTUAL: signal.SIGVTALRM,
    signal.ITIMER_PROF: signal.SIGPROF,
}
BLOCKABLE = frozenset(map(int, signal.valid_signals())) - {signal.SIGKILL, signal.SIGSTOP}
# What `signal` wraps in enums: sixty of them for each mask, which cost more than a fork server's whole turn, and memory that each
# worker would have of its own (a page is copied when a reference to an object in it is counted).
handle: Callable[[int, Any], Any] = _signal.signal  # knows 0 and 1 as the default action and ignoring
_set_mask: Callable[[int, Iterable[int]], set[int]] = _signal.pthread_sigmask
# As it was before `watch`.
_set_wakeup_fd: Callable[..., int] = signal.set_wakeup_fd
_cancel_dump: Callable[[], None] = faulthandler.cancel_dump_traceback_later
# What CPython itself sets at start: everything else has the default action.
_IGNORED_BY_PYTHON = frozenset({signal.SIGPIPE, signal.SIGXFSZ})


def _note(signo: int, frame: object) -> None:
    """Nothing: the wakeup descriptor has it."""


class Inbox:
    """The signals that a loop handles, readable from ``fileno()``. The main thread's; one for each process."""

    def __init__(self, handled: Iterable[int]) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # The wakeup descriptor first: a signal between the two would be handled and not told.
        _set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for signo in handled:
            signal.signal(signo, _note)

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        """Hear nothing any more."""
        if _set_wakeup_fd(-1) != self._write:
            raise RuntimeError("another inbox hears the signals")
        os.close(self._read)
        os.close(self._write)

    def descriptors(self) -> tuple[int, int]:
        """Both ends, for a list of what to keep open."""
        return self._read, self._write

    def take(self) -> set[int]:
        """The signals that have arrived since the last call. They are levels: two of a kind may be one."""
        try:
            return set(os.read(self._read, 4096))
        except BlockingIOError:
            return set()


@contextmanager
def blocked() -> Iterator[None]:
    """Hold every signal back. A fork inside must leave with `fresh`, or never."""
    mask = _set_mask(signal.SIG_BLOCK, BLOCKABLE)
    try:
        yield
    finally:
        _set_mask(signal.SIG_SETMASK, mask)


@contextmanager
def kept(handled: Iterable[int]) -> Iterator[None]:
    """Put the handlers of these signals, the wakeup descriptor and the mask back at the end of the block.

    One that has come and waits behind the mask was meant for the block, and does not outlive it.
    """
    before = {signo: signal.getsignal(signo) for signo in handled}
    mask = _set_mask(signal.SIG_BLOCK, ())
    wakeup = _set_wakeup_fd(-1)
    try:
        yield
    finally:
        _set_wakeup_fd(wakeup)
        while signal.sigtimedwait(before, 0) is not None:
            pass
        for signo, action in before.items():
            if action is not None:  # None is C code's own
                signal.signal(signo, action)
        _set_mask(signal.SIG_SETMASK, mask)


def freshening() -> list[Callable[[], object]]:
    """What gives a child of this process, as it is now, the dispositions of a process that has just started."""
    steps: list[Callable[[], object]] = [functools.partial(_set_wakeup_fd, -1)]
    for signo in BLOCKABLE:
        now = signal.getsignal(signo)
        if now is None or 32 <= signo < signal.SIGRTMIN:
            continue  # the C library's own
        action: Any = int(signal.SIG_IGN if signo in _IGNORED_BY_PYTHON else signal.SIG_DFL)
        if signo == signal.SIGINT:
            action = signal.default_int_handler
        if now != action:
            steps.append(functools.partial(handle, signo, action))
    return steps


def fresh() -> None:
    """The dispositions of a process that has just started, with everything still blocked; then install, then `unblock`."""
    for step in freshening():
        step()


def block() -> None:
    """Hold every signal back until `unblock`."""
    _set_mask(signal.SIG_BLOCK, BLOCKABLE)


# Let every signal in.
unblock: Callable[[], object] = functools.partial(_set_mask, int(signal.SIG_SETMASK), ())


def name(signo: int) -> str:
    """The signal's name, as people write it."""
    try:
        return signal.Signals(signo).name
    except ValueError:
        return f"signal {signo}"


changes: list[bool] = []  # not empty: user code has changed something since the last `forget`
_replaced: dict[int, Any] = {}  # handlers that were there before
_wakeups: list[int] = []  # the wakeup descriptor that was there before


def _marking(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mark()
        return function(*args, **kwargs)

    return call


def watch() -> None:
    """From now on notice when user code changes handlers, mask, timers (faulthandler's, too) or wakeup descriptor: cheaper than
    asking after each connection.

    Called before the user's module is imported, so that ``from signal import alarm`` is noticed too.
    """
    for changing in ("setitimer", "alarm", "pthread_sigmask", "siginterrupt"):
        setattr(signal, changing, _marking(getattr(signal, changing)))
    faulthandler.dump_traceback_later = _marking(faulthandler.dump_traceback_later)
    signal.signal = _remembering(signal.signal)
    signal.set_wakeup_fd = _remembering_wakeup(signal.set_wakeup_fd)


def stop_timers() -> None:
    """No alarm rings any more that user code has set, nor does faulthandler end the process later."""
    for timer in TIMERS:
        signal.setitimer(timer, 0)
    _cancel_dump()


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(signo: int, action: Any) -> Any:
        mark()
        before = function(signo, action)
        _replaced.setdefault(int(signo), before)
        return before

    return call


def _remembering_wakeup(function: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> int:
        mark()
        before = function(*args, **kwargs)
        _wakeups.append(before)
        return before

    return call


def mark() -> None:
    """Have `changes` say that something was changed."""
    if not changes:
        changes.append(True)


def replaced() -> frozenset[int]:
    """The signals whose handlers user code has replaced since `forget` was called last."""
    return frozenset(_replaced)


def put_back() -> None:
    """Install the handlers and the wakeup descriptor again that were there when `forget` was called last."""
    if _wakeups:
        try:
            _set_wakeup_fd(_wakeups[0], warn_on_full_buffer=False)
        except (OSError, ValueError):  # user code has closed it: the number may be a client's by now
            _set_wakeup_fd(-1)
    for signo, before in list(_replaced.items()):
        if before is not None:  # None is the C library's own
            signal.signal(signo, before)


def keep() -> None:
    """The handlers and the wakeup descriptor that are there now are the right ones."""
    _replaced.clear()
    _wakeups.clear()


def forget() -> None:
    """What there is now is as it should be."""
    for step in forgetting:
        step()


forgetting: tuple[Callable[[], object], ...] = (changes.clear, _replaced.clear, _wakeups.clear)
