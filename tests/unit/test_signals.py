"""What signals are called, and which handlers are ours to undo."""

import os
import signal
from collections.abc import Iterator

import pytest

from prefork.system import process, signals


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    with signals.kept(signals.MASTERS):
        yield


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exit status 0"),
        (9, "signal 9 (SIGKILL)"),
        (32, "signal 32 (SIGRTMIN-2)"),
        (34, "signal 34 (SIGRTMIN)"),
        (36, "signal 36 (SIGRTMIN+2)"),
        (63, "signal 63 (SIGRTMIN+29)"),
        (64, "signal 64 (SIGRTMAX)"),
        (65, "signal 65 (unnamed)"),
    ],
)
def test_every_signal_that_ends_a_process_has_a_name(status: int, words: str) -> None:
    assert process.describe(status) == words


def test_what_is_passed_over_is_no_handler_of_user_code() -> None:
    handlers = signals.passing_over()
    for signo, handler in handlers.items():
        signals.handle(signo, handler)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    found = signals.installed()
    assert found.keys() & handlers.keys() == {signal.SIGUSR2}
    assert found[signal.SIGUSR2] == 1
    for signo in handlers:
        os.kill(os.getpid(), signo)


def test_in_a_child_of_user_code_only_our_handlers_are_undone() -> None:
    for signo, handler in signals.passing_over().items():
        signals.handle(signo, handler)
    signal.signal(signal.SIGHUP, lambda *_: None)
    theirs = signal.getsignal(signal.SIGHUP)
    signals.hear_again()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGHUP) is theirs
