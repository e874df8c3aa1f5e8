"""An upgrade's trial when the machine has no more of something."""

import errno
import os
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prefork import carried
from prefork.changeover import Changeover
from prefork.daemon import Daemon
from prefork.system import process, program
from prefork.system.program import Program
from prefork.upgrading import Upgrading

PID = 4_000_000  # more than this kernel gives


class Full:
    """A selector that takes nothing more (fs.epoll.max_user_watches)."""

    def register(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def get_map(self) -> dict[int, object]:
        return {}


def test_a_trial_that_can_not_be_heard_is_refused_and_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    signalled: list[tuple[int, int]] = []
    daemon = SimpleNamespace(
        stopping=None,
        current=SimpleNamespace(number=1),
        upgrade=None,
        control=None,
        pid_file=None,
        reloading=None,
        trying=False,
        now=100.0,
        config=SimpleNamespace(boot_timeout=5.0),
        selector=Full(),
        wiring=SimpleNamespace(strangers=set(), folder=os.getcwd()),
        tell=lambda _clients, answer: told.append(answer),
    )
    said, answer = (os.pipe() for _ in range(2))
    monkeypatch.setattr(Upgrading, "carry", lambda _self: None)
    monkeypatch.setattr(carried, "write", lambda _state: b"")
    monkeypatch.setattr(program, "identity", lambda _executable: ())
    monkeypatch.setattr(program, "keep_state", lambda _data: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(program, "try_out", lambda *_: (PID, said[0], answer[0]))
    monkeypatch.setattr(process, "signal_child", lambda *what: signalled.append(what))
    how = cast(Program, SimpleNamespace(executable="/usr/bin/python3", launcher=None, line=lambda _command: ["prefork", "serve"]))
    its = Upgrading(cast(Daemon, daemon), cast(Changeover, SimpleNamespace(wanted=None)), how)
    os.close(said[1])
    os.close(answer[1])
    its.upgrade("a test")
    assert (its.trial, its.ready, daemon.trying) == (None, False, False)
    upgrade = cast(Any, daemon.upgrade)
    assert (upgrade.result, upgrade.reason.partition(": see ")[0]) == (
        "refused",
        "/usr/bin/python3 can't be heard: No space left on device",
    )
    assert signalled == [(PID, signal.SIGTERM)], "it has to end what its import has started"
    its.ended(PID, 0)
    its.tend()
    assert not its.ready
    assert told == [{"ok": True, "upgrade": 1}], "the outcome is asked for later"
    assert "can't be heard" in capfd.readouterr().err
    for fd in (said[0], answer[0]):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
