"""The master's loop: what it has heard when it looks at the time."""

import os
import selectors
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from prefork.config import Sources
from prefork.master import Master


class Stopped(selectors.DefaultSelector):
    """The process is stopped while it sleeps or has just woken: time passes and things happen that this call does not tell of."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is there already; the rest comes after it."""
        events = super().select(0)
        if timeout != 0:
            self._meanwhile()
        return events


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("woken", [False, True], ids=["asleep", "just woken"])
@pytest.mark.parametrize("late", [0.0, 0.01, 5.0])
def test_what_came_before_a_deadline_is_heard_before_it_is_found_to_be_over(
    resources: ExitStack, monkeypatch: pytest.MonkeyPatch, late: float, *, woken: bool
) -> None:
    master = Master(Sources({}), lambda *_: None)
    daemon, time = master.daemon, [1000.0]
    monkeypatch.setattr(daemon, "clock", lambda: time[0] - daemon.lost)
    monkeypatch.setattr(master, "_wake_at", lambda: 1002.0)
    monkeypatch.setattr(master, "inbox", object(), raising=False)
    heard: list[str] = []
    pipes = {}
    for name in ("before", "meanwhile"):
        pipes[name] = os.pipe()
        for fd in pipes[name]:
            resources.callback(os.close, fd)

    def meanwhile() -> None:
        os.write(pipes["meanwhile"][1], b"!")
        time[0] += 2.0 + late

    daemon.now = daemon.clock()
    daemon.selector = resources.enter_context(Stopped(meanwhile))
    for name, (read, _) in pipes.items():
        daemon.selector.register(read, selectors.EVENT_READ, lambda _, name=name: heard.append(name))
    if woken:
        os.write(pipes["before"][1], b"!")
    assert not master._sleep()
    assert daemon.now >= 1002.0
    assert heard == ["before", "meanwhile"][not woken :]
