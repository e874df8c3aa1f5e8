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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

# What the master obeys. A process manager may send it to every process of the daemon (a control group's KillSignal, `systemctl
# kill`), and to the others it means nothing.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
MASTERS = (
    *_ENDING,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
# How a worker is told to leave, and what the kernel sends for the death of its parent. An exec undoes handlers: a handler that has
# become another program gets both with their default action, which for these is to be ignored (signal(7)). SIGCHLD and SIGCONT are
# ignored so, too: user code handles the one, and the other would let a worker go on that somebody has stopped.
RETIRE = signal.SIGURG
PARENT_DIED = signal.SIGWINCH
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


def freshening(handlers: Mapping[int, Any] = MappingProxyType({})) -> list[Callable[[], object]]:
    """What gives a child of this process, as it is now, these handlers and else the dispositions of one that has just started.

    A handler that is here already is left alone: C code's (faulthandler's) may be in its place, which Python does not see.
    """
    steps: list[Callable[[], object]] = [functools.partial(_set_wakeup_fd, -1)]
    for signo, now in _actions().items():
        action = handlers.get(signo, _first_action(signo))
        if now != action:
            steps.append(functools.partial(handle, signo, action))
    return steps


def fresh(handlers: Mapping[int, Any] = MappingProxyType({})) -> None:
    """What `freshening` gives, in this process, with everything still blocked; then `unblock`."""
    for step in freshening(handlers):
        step()


def _actions() -> dict[int, Any]:
    """The dispositions that there are now, without those that C code had set before Python began, and the C library's own."""
    actions = {signo: signal.getsignal(signo) for signo in BLOCKABLE if not 32 <= signo < signal.SIGRTMIN}
    return {signo: action for signo, action in actions.items() if action is not None}


def _first_action(signo: int) -> Any:
    """The disposition in a process that has just started."""
    if signo == signal.SIGINT:
        return signal.default_int_handler
    return int(signal.SIG_IGN if signo in _IGNORED_BY_PYTHON else signal.SIG_DFL)


def passing_over(more: Iterable[int] = ()) -> dict[int, Any]:
    """Handlers that do nothing, for MASTERS and more. An exec undoes them, as it would not undo that signals are ignored."""
    return dict.fromkeys((*MASTERS, *more), _note)


def hear_again(ours: Iterable[int] = ()) -> None:
    """In a child that user code has forked: what is passed over, and ends a process elsewhere, ends this one, too.

    ``ours``: signals that have handlers of ours.
    """
    for signo in {*ours, *(signo for signo in _ENDING if signal.getsignal(signo) is _note)}:
        handle(signo, _first_action(signo))


def installed() -> dict[int, Any]:
    """What user code has changed since this process was `fresh` and passed MASTERS over: actions, as `handle` takes them."""
    changed = {signo: action for signo, action in _actions().items() if action not in (_note, _first_action(signo))}
    return {signo: action if callable(action) else int(action) for signo, action in changed.items()}


def block() -> None:
    """Hold every signal back until `unblock`."""
    _set_mask(signal.SIG_BLOCK, BLOCKABLE)


def let_in_all_but(*signos: int) -> None:
    """Hold back these signals and no others, whatever was held back before."""
    _set_mask(signal.SIG_SETMASK, signos)


# Let every signal in.
unblock: Callable[[], object] = functools.partial(_set_mask, int(signal.SIG_SETMASK), ())


def name(signo: int) -> str:
    """The signal's name, as people write it."""
    try:
        return signal.Signals(signo).name
    except ValueError:
        return f"SIGRTMIN{signo - signal.SIGRTMIN:+d}" if 32 <= signo < signal.SIGRTMAX else "unnamed"


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
