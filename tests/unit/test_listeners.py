"""How a listener is closed: when, and what that does to the deadlines of those in its queue and of a stop's connections."""

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import psutil
import pytest

from prefork.config import Config
from prefork.daemon import Stop
from prefork.listeners import DRAIN_LOOK, Listeners
from prefork.net import address, handshakes
from prefork.net import listener as listener_module
from prefork.net.address import Address
from prefork.net.listener import EMPTY_LOOKS, Listener
from prefork.net.mending import SO_BINDTOIFINDEX
from prefork.stopping import Stopping

SO_ATTACH_FILTER = 26


class Handshakes:
    """Those under way, until ``end`` is past."""

    end: ClassVar[float] = 0.0
    told: ClassVar[list[tuple[bool, bool]]] = []

    def __init__(self, _sock: object, _looks: object, since: float, *, unseen: bool, hurried: bool) -> None:
        self.look_at = since
        self.told.append((unseen, hurried))

    def over(self, now: float) -> bool:
        self.look_at = now + 1.0
        return now >= self.end


class Closing:
    """A listener that is being closed from 100 on, with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 30.0) -> None:
        monkeypatch.setattr(listener_module, "Handshakes", Handshakes)
        self.handshakes_end(0.0)
        Handshakes.told = []
        sock = socket.create_server(("127.0.0.1", 0))
        where = Address(socket.AF_INET, *sock.getsockname())
        self.listener = Listener(where, where, sock)
        self.listeners = Listeners(current=[self.listener])
        self.listeners.cookies = cast("Any", SimpleNamespace(note=lambda _: None, lately=lambda _: False, readings=[]))
        self.listeners.say_farewell(self.listener, 100.0, seconds)
        self.retired: list[Listener] = []

    def handshakes_end(self, at: float) -> None:
        Handshakes.end = at

    def tend(self, now: float) -> bool:
        """Whether it is closed."""
        self.listeners.tend(now, self.retired.append, lambda _: False)
        return self.listener.fileno() == -1

    def closed_at(self, now: float) -> float:
        """When it is, looked at when a look is due."""
        while not self.tend(now):
            assert now < 300
            wake_at = self.listeners.wake_at(now)
            assert wake_at is not None
            assert wake_at > now, "it would be looked at for ever"
            now = wake_at
        return now

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.sock.getsockname())


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Closing]:
    made = Closing(monkeypatch)
    yield made
    made.listeners.close()


def test_a_quiet_listener_is_closed_after_its_looks(closing: Closing) -> None:
    assert closing.closed_at(100.0) == pytest.approx(100.0 + (EMPTY_LOOKS - 1) * DRAIN_LOOK)
    assert closing.retired == [closing.listener]
    assert Handshakes.told == [(False, False)]


def test_handshakes_under_way_keep_it_open_whatever_the_deadline_says(closing: Closing) -> None:
    closing.handshakes_end(105.0)
    closing.listeners.hurry(100.0, 100.0)
    assert not closing.tend(100.0)
    assert closing.listeners.settling
    assert not closing.tend(104.9)
    assert 105.0 <= closing.closed_at(104.9) < 107.0


def test_the_queue_is_looked_at_after_the_last_handshake_and_not_once_only(closing: Closing) -> None:
    closing.handshakes_end(100.5)
    for look in range(10):
        assert not closing.tend(100.0 + look * DRAIN_LOOK)
    assert not closing.tend(100.5), "a handshake that has ended may not be in the queue yet"
    assert closing.tend(100.505)


def test_who_waits_in_the_queue_has_all_of_its_time_after_the_handshakes(closing: Closing) -> None:
    closing.handshakes_end(105.0)
    with closing.connect():
        assert not closing.tend(100.0)
        assert not closing.tend(104.0)
        assert not closing.tend(105.0)
        assert not closing.listeners.settling
        assert not closing.tend(133.9)
        assert closing.tend(134.1)  # 30 s after the last look that has seen one


def test_a_stop_that_hurries_shortens_that(closing: Closing) -> None:
    closing.handshakes_end(105.0)
    with closing.connect():
        assert not closing.tend(100.0)
        closing.listeners.hurry(101.0, 103.0)
        assert not closing.tend(104.0)
        assert not closing.tend(105.0)
        assert closing.tend(106.1)


def test_one_whose_time_has_not_come_is_left_alone(closing: Closing) -> None:
    assert not closing.tend(99.9)
    assert not closing.listeners.settling
    assert closing.listeners.wake_at(99.0) == 100.0


def test_another_program_goes_on_where_this_one_was(closing: Closing, monkeypatch: pytest.MonkeyPatch) -> None:
    closing.handshakes_end(105.0)
    assert not closing.tend(100.0)
    closing.listeners.farewells[0].deadline = 123.0
    carried = closing.listeners.carry({closing.listener: 0})
    closing.listener.handshakes = None  # it is another process' object now
    successor = Listeners(current=[closing.listener])
    successor.cookies = closing.listeners.cookies
    successor.adopt(carried, [closing.listener])
    closing.listeners = successor
    assert successor.settling
    assert not closing.tend(104.0)
    assert closing.closed_at(105.0) < 107.0


def test_a_unix_socket_has_no_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = Closing(monkeypatch)
    closing.handshakes_end(200.0)
    closing.listener.address = Address(socket.AF_UNIX, "/nowhere")
    assert closing.closed_at(100.0) < 100.1


def test_one_that_others_have_opened_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = Closing(monkeypatch)
    closing.handshakes_end(200.0)
    closing.listener.ours = False
    with closing.connect():
        assert closing.closed_at(100.0) == 100.0
    closing.listener.sock.close()


class Powerless(socket.socket):
    """One whose process may put no filter on it, nor have it leave the interface that it is bound to."""

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        if level == socket.SOL_SOCKET and option in (SO_ATTACH_FILTER, SO_BINDTOIFINDEX):
            raise PermissionError(errno.EPERM, "not permitted")
        super().setsockopt(level, option, *value)


def powerless(closing: Closing) -> Listener:
    closing.listener.sock = Powerless(fileno=closing.listener.sock.detach())
    return closing.listener


def shut_down_and_connect(sock: socket.socket) -> None:
    """What a handler can do to a listener: ``listen`` fails of it (EINVAL)."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        sock.shutdown(socket.SHUT_RDWR)
        sock.connect(other.getsockname())


def test_one_that_a_handler_has_connected_elsewhere_is_closed_like_any_other(closing: Closing) -> None:
    shut_down_and_connect(powerless(closing).sock)
    assert closing.closed_at(100.0) == 100.0
    assert Handshakes.told == [], "there are none"


def test_one_that_is_connected_elsewhere_while_it_turns_clients_away_is_closed_too(
    closing: Closing, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, accepts = powerless(closing), Listener.accepts

    def accepts_once(self: Listener) -> bool:
        monkeypatch.setattr(Listener, "accepts", accepts)
        shut_down_and_connect(self.sock)
        return True

    monkeypatch.setattr(Listener, "accepts", accepts_once)
    listener.turn_away(100.0, closing.listeners.looks, cookies=False)
    assert not listener.accepts()


def test_a_farewell_that_fails_holds_up_no_other(closing: Closing, monkeypatch: pytest.MonkeyPatch) -> None:
    good = closing.listener
    sock = socket.create_server(("127.0.0.1", 0))
    bad = Listener(Address(socket.AF_INET, *sock.getsockname()), Address(socket.AF_INET, *sock.getsockname()), sock)
    closing.listeners.farewells.clear()
    for listener in (bad, good):
        closing.listeners.say_farewell(listener, 100.0, 30.0)
    drained = Listener.drained

    def fails(self: Listener) -> bool:
        if self is bad:
            raise OSError(errno.EIO, "it is broken")
        return drained(self)

    monkeypatch.setattr(Listener, "drained", fails)
    closing.closed_at(100.0)
    assert bad.fileno() == -1
    assert closing.listeners.farewells == []
    assert set(closing.retired) == {bad, good}


def test_a_stop_that_becomes_a_quick_one_leaves_no_look_open(closing: Closing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "Handshakes", handshakes.Handshakes)
    monkeypatch.setattr(handshakes, "MOST_AT_ONCE", 0.0)
    before = len(os.listdir("/proc/self/fd"))
    assert not closing.tend(100.0)
    assert not closing.tend(100.0 + handshakes.FIRST_LOOK)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    closing.listeners.close()
    closing.tend(100.1)
    assert len(os.listdir("/proc/self/fd")) == before - 1


# -- what stays when others come


@pytest.fixture
def open_one() -> Iterator[Listeners]:
    """One listener, of a configuration whose queue holds 100."""
    listeners, conf = Listeners(), Config(bind=(address.parse("127.0.0.1:0"),), backlog=100)
    listeners.commit(listeners.prepare(conf, conf), conf)
    yield listeners
    listeners.close()


def test_a_queue_has_its_new_limit_when_the_reload_is_for_good(open_one: Listeners) -> None:
    (listener,) = open_one.current
    in_force = Config(bind=(listener.configured,), backlog=100)
    wanted = replace(in_force, backlog=3)
    plan = open_one.prepare(wanted, in_force)
    assert plan.listeners == (listener,)
    assert listener.queue() == (0, 100)
    plan.drop()  # the import has failed
    assert listener.queue() == (0, 100)
    open_one.commit(open_one.prepare(wanted, in_force), wanted)
    assert listener.queue() == (0, 3)


def test_one_that_is_shut_down_as_it_is_opened_anew_is_opened_anew(open_one: Listeners, monkeypatch: pytest.MonkeyPatch) -> None:
    (spoilt,) = open_one.current

    def accepts(self: Listener) -> bool:
        self.sock.shutdown(socket.SHUT_RDWR)  # by a handler, right after the look
        return True

    monkeypatch.setattr(Listener, "accepts", accepts)
    conf = Config(bind=(spoilt.configured,))
    (fresh,) = open_one.reopened(spoilt, [spoilt], conf).opened
    monkeypatch.undo()
    assert fresh.address == spoilt.address
    assert fresh.accepts()
    fresh.close()


class Stopped:
    """A stop from 100 on, whose connections have ten seconds."""

    def __init__(self, listeners: object) -> None:
        self.daemon = SimpleNamespace(now=100.0, stopping=Stop("", 100.0, 110.0, [], 10.0), listeners=listeners)
        self.stopping = Stopping(cast("Any", self.daemon), cast("Any", None), cast("Any", None))

    def deadline(self, now: float) -> float:
        self.daemon.now = now
        self.stopping.tend()
        return cast("float", self.daemon.stopping.deadline)


def test_handshakes_do_not_shorten_what_connections_have_at_a_stop() -> None:
    listeners = SimpleNamespace(farewells=[1], settling=True)
    stopped = Stopped(listeners)
    assert stopped.deadline(107.0) == 117.0
    assert stopped.stopping.wake_at() is None, "the listeners say when"
    listeners.settling = False  # the queue is served: in that time
    assert stopped.deadline(112.0) == 117.0


class Unreadable(psutil.Process):
    """A process whose parent can't be read: another user's, where /proc hides what is not ours."""

    def parent(self) -> psutil.Process:
        raise psutil.AccessDenied(self.pid)


def test_who_holds_a_port_is_named_though_its_parent_can_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "Process", Unreadable)
    with socket.create_server(("127.0.0.1", 0)) as held:
        holder = listener_module._holder(Address(int(socket.AF_INET), *held.getsockname()))
    assert holder == " by this daemon itself, for something else"
