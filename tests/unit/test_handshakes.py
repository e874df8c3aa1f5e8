"""Handshakes under way: what the kernel says of them, in both of its ways, and when nobody waits for one any more."""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.net import handshakes
from prefork.net.handshakes import (
    COOKIES_EVERY,
    COOKIES_LAST,
    FIRST_LOOK,
    LATE,
    LONGEST,
    LOOK_EVERY,
    PAUSE_RATIO,
    PROC_LOOK_EVERY,
    UNSEEN,
    Cookies,
    Handshakes,
    Looks,
    Request,
    answered,
    cookies_in,
    listed,
    question,
)

# As Linux 6.18 has said it.
PROC = b"""\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100090A:1B59 00000000:0000 0A 00000000:00000003 00:00000000 00000000     0        0 7044 1 0000000000000000 100 0 0 10 0
   1: 0100090A:1B59 090A080A:E0B2 03 00000000:00000000 01:00000064 00000001     0        0 0 1 0000000000000000
   2: 0100090A:1B59 090A080A:E0B4 01 00000000:00000000 00:00000000 00000000     0        0 7060 1 0000000000000000 20 4 30 10 -1
"""
PROC6 = b"""\
   5: 0000000000000000FFFF00000100007F:1B59 0000000000000000FFFF00000100007F:0302 03 00000000:00000000 01:00000013 00000004     0
"""
NETSTAT = b"TcpExt: SyncookiesSent SyncookiesRecv\nTcpExt: 17 3\nIpExt: InNoRoutes\nIpExt: 0\n"


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 0, 0) + body


def entry(host: str, port: int, retransmissions: int, state: int = 3) -> bytes:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = socket.inet_pton(family, host).ljust(16, b"\0")
    return message(
        20,
        struct.pack("=BBBB", family, state, 1, retransmissions)
        + struct.pack("!HH", port, 9)
        + where
        + bytes(28)
        + struct.pack("=I", 500)
        + bytes(16),
    )


DONE = message(3, bytes(4))
A = socket.inet_aton("10.9.0.1")


@pytest.mark.skipif(sys.byteorder != "little", reason="words are as the machine has them, and these are from a little-endian one")
def test_request_sockets_in_proc_are_told_by_state_with_address_and_retransmissions() -> None:
    assert list(listed(PROC)) == [Request(A, 7001, 1, 1.0)]
    assert list(listed(PROC6)) == [Request(socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.1"), 7001, 4, 0.19)]


def test_an_answer_is_read_to_its_end() -> None:
    data = entry("10.9.0.1", 7001, 2) + entry("fe80::1", 80, 0) + entry("10.9.0.1", 7001, 0, state=1)
    expected = [Request(A, 7001, 2, 0.5), Request(socket.inet_pton(socket.AF_INET6, "fe80::1"), 80, 0, 0.5)]
    assert answered(data) == (expected, False)
    assert answered(data + DONE + b"anything") == (expected, True)
    assert answered(b"") == ([], False)


def test_a_refusal_is_its_error() -> None:
    with pytest.raises(OSError, match="No such file") as raised:
        answered(message(2, struct.pack("=i", -errno.ENOENT) + bytes(16)))
    assert raised.value.errno == errno.ENOENT


@given(st.binary(max_size=300) | st.tuples(st.integers(0, 80), st.binary(max_size=40)).map(lambda cut: DONE[: cut[0]] + cut[1]))
def test_an_answer_of_anything_is_read_or_an_error(data: bytes) -> None:
    try:
        found, _ = answered(data)
    except OSError:
        return
    assert all(len(request.host) in (4, 16) and 0 <= request.port < 1 << 16 for request in found)


@given(
    st.binary(max_size=300)
    | st.tuples(st.integers(0, 400), st.integers(0, 400), st.binary(max_size=9)).map(
        lambda cut: PROC[: cut[0]] + cut[2] + PROC[cut[1] :]
    )
)
def test_lines_of_anything_are_read(text: bytes) -> None:
    assert all(len(request.host) in (4, 16) for request in listed(text))


def test_the_counter_of_cookies_is_found_by_its_name() -> None:
    assert cookies_in(NETSTAT) == 17
    assert cookies_in(NETSTAT.replace(b"SyncookiesSent", b"Another")) is None
    assert cookies_in(NETSTAT.replace(b" 17", b"")) is None


@given(st.binary(max_size=200) | st.integers(0, 60).map(lambda end: NETSTAT[:end]))
def test_a_counter_in_anything_is_a_number_or_unknown(text: bytes) -> None:
    sent = cookies_in(text)
    assert sent is None or sent >= 0


def test_the_kernel_understands_the_question_and_has_nothing_to_tell_of_a_quiet_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()):
        found = list(handshakes._by_sock_diag(socket.AF_INET, listening.getsockname()[1]))
        assert found
        assert not any(found)
        # Asked for what is connected, the same question has an answer.
        asked = question(socket.AF_INET, listening.getsockname()[1]).replace(struct.pack("=I", 1 << 3), struct.pack("=I", 1 << 1))
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:
            netlink.sendto(asked, (0, 0))
            said = netlink.recv(65536)
        assert len(said) > len(DONE)
        assert said[4:6] == struct.pack("=H", 20)
        assert not any(handshakes._by_proc(socket.AF_INET, listening.getsockname()[1]))


# -- when it is over


class Kernel:
    """What is seen at each look, in both ways; a way that is an error is not to be had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[list[Request]] = [[]]
        self.errors: dict[str, int] = {}
        self.looks: list[str] = []
        self.ports: set[int] = set()
        self.open = 0  # looks that have not ended
        self.used, self.step = 0.0, 0.0  # CPU, and what each piece of an answer takes of it
        # Looks cost nothing but that, on a busy machine, too.
        monkeypatch.setattr(handshakes, "time", SimpleNamespace(monotonic=lambda: 0.0, thread_time=lambda: self.used))
        for name in ("_by_sock_diag", "_by_proc"):
            monkeypatch.setattr(handshakes, name, self.way(name))

    def way(self, name: str) -> object:
        def ask(_family: int, port: int) -> Iterator[list[Request]]:
            self.ports.add(port)
            if name in self.errors:
                raise OSError(self.errors[name], os.strerror(self.errors[name]))
            self.looks.append(name)
            self.open += 1
            try:
                for found in self.seen:
                    self.used += self.step
                    yield [replace(one, port=port) if one.port == ANY_PORT else one for one in found]
            finally:
                self.open -= 1

        return ask


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def until_over(watched: Handshakes, since: float, latest: float = 100.0) -> float:
    """How long it took, looked at when a look is due."""
    now = since
    while not watched.over(now):
        assert now < since + latest
        assert watched.look_at > now, "it would be looked at for ever"
        now = watched.look_at
    return now - since


# Of the listener that is asked for, whichever that is.
ANY_PORT = 1


def request(retransmissions: int = 0, host: str = "127.0.0.1", expires: float = 0.5) -> Request:
    return Request(socket.inet_aton(host), ANY_PORT, retransmissions, expires)


def test_where_there_is_none_one_look_is_enough(kernel: Kernel, listening: socket.socket) -> None:
    assert until_over(Handshakes(listening, Looks(), 5.0, unseen=False), 5.0) == pytest.approx(FIRST_LOOK)
    assert kernel.looks == ["_by_sock_diag"]


def test_one_that_stays_is_waited_for_but_not_for_ever(kernel: Kernel, listening: socket.socket) -> None:
    kernel.seen = [[request(LATE)], [request(LATE - 1)]]
    took = until_over(Handshakes(listening, Looks(), 5.0, unseen=False), 5.0)
    assert LONGEST <= took < LONGEST + 1
    assert len(kernel.looks) <= LONGEST / LOOK_EVERY


def test_late_ones_and_those_of_another_address_are_not_waited_for(kernel: Kernel, listening: socket.socket) -> None:
    kernel.seen = [[request(LATE), request(LATE + 2), request(0, "127.0.0.2")]]
    assert until_over(Handshakes(listening, Looks(), 5.0, unseen=False), 5.0) == pytest.approx(FIRST_LOOK)


def test_a_listener_of_every_address_waits_for_all(kernel: Kernel) -> None:
    kernel.seen = [[request(0, "127.0.0.2")]]
    with socket.create_server(("0.0.0.0", 0)) as sock:
        assert not Handshakes(sock, Looks(), 0.0, unseen=False).over(FIRST_LOOK)
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        assert not Handshakes(sock, Looks(), 0.0, unseen=False).over(FIRST_LOOK)


def test_cookies_have_a_second_and_no_look_more(kernel: Kernel, listening: socket.socket) -> None:
    assert until_over(Handshakes(listening, Looks(), 5.0, unseen=True), 5.0) == pytest.approx(UNSEEN)
    assert len(kernel.looks) == 1


def test_without_netlink_proc_is_looked_at_ten_times_a_second(kernel: Kernel, listening: socket.socket) -> None:
    kernel.errors, kernel.seen = {"_by_sock_diag": errno.EAFNOSUPPORT}, [[request()]]
    until_over(Handshakes(listening, Looks(), 0.0, unseen=False), 0.0)
    assert set(kernel.looks) == {"_by_proc"}
    assert 10 < len(kernel.looks) <= LONGEST / PROC_LOOK_EVERY


def test_where_nothing_can_be_seen_they_have_a_second(kernel: Kernel, listening: socket.socket) -> None:
    kernel.errors = {"_by_sock_diag": errno.EAFNOSUPPORT, "_by_proc": errno.ENOENT}
    told: list[OSError] = []
    looks = Looks(told.append)
    for _ in range(2):
        assert until_over(Handshakes(listening, looks, 5.0, unseen=False), 5.0) == pytest.approx(UNSEEN)
    assert [error.errno for error in told] == [errno.ENOENT]


def test_where_nothing_can_be_seen_for_a_moment_it_is_looked_again(kernel: Kernel, listening: socket.socket) -> None:
    looks = Looks()
    for scarce in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        kernel.errors, kernel.looks = {"_by_sock_diag": scarce, "_by_proc": scarce}, []
        watched = Handshakes(listening, looks, 5.0, unseen=False)
        for _ in range(5):
            assert not watched.over(watched.look_at)
        kernel.errors, kernel.seen = {}, [[request()]]
        for _ in range(5):
            assert not watched.over(watched.look_at)
        kernel.seen = [[]]
        until_over(watched, watched.look_at, 1.0)
        looks._families.clear()  # what one listener has seen is of use to the next
    until_over(Handshakes(listening, looks, 20.0, unseen=False), 20.0)
    assert kernel.looks[-1] == "_by_sock_diag", "the better way is taken again"


def test_one_way_that_fails_again_and_again_leaves_the_other_its_turn(kernel: Kernel, listening: socket.socket) -> None:
    kernel.errors = {"_by_sock_diag": errno.EMFILE}
    assert until_over(Handshakes(listening, Looks(), 5.0, unseen=False), 5.0) == pytest.approx(FIRST_LOOK + LOOK_EVERY)
    assert kernel.looks == ["_by_proc"]


def test_in_a_hurry_those_count_that_have_just_been_answered(kernel: Kernel, listening: socket.socket) -> None:
    watched = Handshakes(listening, Looks(), 0.0, unseen=False, hurried=True)
    for expires, over in ((0.99, False), (0.71, False), (0.69, True), (0.06, True), (0.04, False)):
        kernel.seen = [[request(expires=expires)]]
        assert watched.over(watched.look_at) is over
    kernel.seen = [[request(1, expires=1.99)]]
    assert not watched.over(watched.look_at), "it has been sent again, and its client may be connected by now"
    kernel.seen = [[request(1, expires=1.69)]]
    assert watched.over(watched.look_at)


def test_one_look_serves_all_listeners(kernel: Kernel) -> None:
    looks = Looks()
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as other:
        watched = [Handshakes(sock, looks, 0.0, unseen=False) for sock in (first, other, first, other)]
        kernel.seen = [[Request(socket.inet_aton("127.0.0.1"), other.getsockname()[1], 0, 0.5)]]
        assert [one.over(0.01) for one in watched] == [True, False, True, False]
        assert len(kernel.looks) == 1
        assert kernel.ports == {handshakes.EVERY_PORT}
        kernel.seen = [[]]
        later = max(one.look_at for one in watched)  # when that is depends on what the look has cost
        assert [one.over(later) for one in watched] == [True] * 4
        assert len(kernel.looks) == 2


def test_a_look_that_takes_long_goes_on_in_a_later_turn(
    kernel: Kernel, listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "MOST_AT_ONCE", 0.0)
    kernel.seen = [[], [], [request()]]
    watched = Handshakes(listening, Looks(), 0.0, unseen=False)
    for _ in range(3):
        assert not watched.over(watched.look_at)
    assert len(kernel.looks) == 1
    kernel.seen = [[]]
    until_over(watched, watched.look_at, 1.0)
    assert len(kernel.looks) == 2


@pytest.mark.parametrize("step", [0.004, 0.024])
def test_a_look_in_pieces_takes_ten_times_its_cpu_in_all(
    kernel: Kernel, listening: socket.socket, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    monkeypatch.setattr(handshakes, "MOST_AT_ONCE", 0.0)
    kernel.seen, kernel.step = [[]] * 20, step
    took = until_over(Handshakes(listening, Looks(), 0.0, unseen=False), 0.0)
    assert took == pytest.approx(FIRST_LOOK + PAUSE_RATIO * 20 * step)
    assert kernel.used == pytest.approx(20 * step)


def test_the_next_look_comes_after_ten_times_the_cpu_of_this_one(kernel: Kernel, listening: socket.socket) -> None:
    kernel.seen, kernel.step = [[request()]], 0.1
    watched = Handshakes(listening, Looks(), 0.0, unseen=False)
    assert not watched.over(watched.look_at)
    assert watched.look_at == pytest.approx(FIRST_LOOK + PAUSE_RATIO * 0.1)


def test_a_look_that_no_listener_needs_any_more_leaves_nothing_open(
    kernel: Kernel, listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "MOST_AT_ONCE", 0.0)
    kernel.seen = [[], [], []]
    looks = Looks()
    watched: Handshakes | None = Handshakes(listening, looks, 0.0, unseen=False)
    assert watched is not None
    assert not watched.over(FIRST_LOOK)
    looks.rest()
    assert kernel.open == 1
    watched = None  # its time is over
    looks.rest()
    assert kernel.open == 0
    until_over(Handshakes(listening, looks, 10.0, unseen=False), 10.0)


# -- cookies


def cookies(monkeypatch: pytest.MonkeyPatch, sent: dict[str, int | None]) -> Cookies:
    monkeypatch.setattr(handshakes, "cookies_in", lambda _: sent["now"])
    return Cookies()


def test_cookies_sent_long_ago_are_not_late_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, int | None] = {"now": 1000}
    watched = cookies(monkeypatch, sent)
    watched.note(0.0)
    assert not watched.lately(1.0)
    sent["now"] = 1001
    assert watched.lately(2.0)
    for now in range(3, 62):
        watched.note(float(now))
        assert watched.lately(now + 0.5)
    for now in range(62, 62 + int(COOKIES_LAST + COOKIES_EVERY)):
        watched.note(float(now))
    assert not watched.lately(62 + COOKIES_LAST + COOKIES_EVERY)


def test_readings_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = cookies(monkeypatch, {"now": 1})
    for now in range(10_000):
        watched.note(now / 10)
    assert len(watched.readings) <= COOKIES_LAST / COOKIES_EVERY + 2


def test_a_counter_that_can_not_be_read_may_have_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, int | None] = {"now": None}
    watched = cookies(monkeypatch, sent)
    watched.note(0.0)
    sent["now"] = 3
    assert watched.lately(1.0)
