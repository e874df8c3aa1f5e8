"""Looks at listeners that a worker can't accept from: how much a look costs, and what is kept of listeners that are gone."""

import errno
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from prefork.mending import LOOK_AGAIN, Mending
from prefork.net.listener import Listener


class Counted(list[Any]):
    """A list that counts how often all of it is gone through."""

    times: ClassVar[int] = 0

    def __iter__(self) -> Iterator[Any]:
        Counted.times += 1
        return super().__iter__()

    def __contains__(self, sought: object) -> bool:
        Counted.times += 1
        return super().__contains__(sought)


class Shop:
    """A daemon with so many listeners, which are somebody else's."""

    def __init__(self, number: int) -> None:
        self.mended = 0
        self.fails = False
        self.listeners = SimpleNamespace(current=Counted(), farewells=[], accepts_at=lambda _: True, mend=self.mend)
        self.daemon = SimpleNamespace(now=100.0, stopping=None, listeners=self.listeners, config=None)
        self.mending = Mending(cast("Any", self.daemon), cast("Any", None))
        self.commit(number)

    def commit(self, number: int) -> None:
        self.listeners.current = Counted(self.Theirs() for _ in range(number))

    class Theirs:
        """As little of a listener as is needed."""

        ours = False
        address = "fd:3"

    def mend(self, _listener: Listener, _conf: object) -> None:
        self.mended += 1
        if self.fails:
            raise OSError(errno.ESHUTDOWN, "it was shut down")

    def look_at_all(self) -> None:
        for place in range(len(self.listeners.current)):
            self.mending.look(self.listeners.current[place])


def test_a_look_at_one_goes_through_no_others() -> None:
    shop = Shop(300)
    Counted.times = 0
    for _ in range(2):
        shop.look_at_all()
        shop.daemon.now += LOOK_AGAIN
    assert shop.mended == 600
    assert Counted.times <= 1, "once after each commit"


def test_each_is_looked_at_so_often_at_most() -> None:
    shop = Shop(3)
    for _ in range(5):
        shop.look_at_all()
    assert shop.mended == 3
    shop.daemon.now += LOOK_AGAIN
    shop.look_at_all()
    assert shop.mended == 6


def test_nothing_is_kept_of_listeners_that_are_gone(capfd: pytest.CaptureFixture[str]) -> None:
    shop = Shop(3)
    shop.fails = True
    for _ in range(2):
        shop.look_at_all()
        shop.daemon.now += LOOK_AGAIN
    assert capfd.readouterr().err.count("another program's") == 3
    before = [weakref.ref(listener) for listener in list(shop.listeners.current)]
    shop.commit(1)
    shop.look_at_all()
    gc.collect()
    assert [kept() for kept in before] == [None] * 3
