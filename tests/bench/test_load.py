"""The load generator sees what servers do wrong, and counts what they do right."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import watch
from tests.bench import load
from tests.bench.load import BenchError, Generator

Handler = Callable[[socket.socket], None]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load.build(tmp_path_factory.mktemp("load"))


@contextmanager
def serving(handler: Handler) -> Iterator[int]:
    """A server with a thread for each connection; gives its port."""
    threads: list[threading.Thread] = []

    def serve(sock: socket.socket) -> None:
        with sock:
            handler(sock)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            if over.is_set():
                sock.close()
                return
            threads.append(threading.Thread(target=serve, args=(sock,)))
            threads[-1].start()

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield port
        finally:
            over.set()
            socket.create_connection(("127.0.0.1", port)).close()
            for thread in (acceptor, *threads):
                thread.join()


def echo(sock: socket.socket) -> None:
    while data := sock.recv(4096):
        sock.sendall(data)


def wrong(sock: socket.socket) -> None:
    data = sock.recv(64)
    sock.sendall(data[:-1] + bytes([data[-1] ^ 1]))


def more(sock: socket.socket) -> None:
    sock.sendall(sock.recv(64) + b"x")
    sock.recv(1)


def cut(sock: socket.socket) -> None:
    sock.sendall(sock.recv(64)[:-1])


def reset(sock: socket.socket) -> None:
    sock.recv(64)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent(sock: socket.socket) -> None:
    while sock.recv(4096):
        pass


@pytest.mark.parametrize(
    ("handler", "error"),
    [(wrong, "wrong bytes"), (more, "more than sent"), (cut, "cut"), (reset, "reset"), (silent, "timeout")],
)
def test_what_a_server_does_wrong_is_counted_by_its_class(program: Path, handler: Handler, error: str) -> None:
    with serving(handler) as port:
        seen = Generator(program).run(port, clients=2, connections=6, timeout=0.2)
    assert seen.errors == {error: 6}
    assert seen.connections == 0


def test_nobody_there_is_refused_and_not_tried_for_ever(program: Path) -> None:
    seen = Generator(program).run(watch.free_port(), clients=2, seconds=60)
    assert list(seen.errors) == ["refused"]


@pytest.mark.parametrize("options", [{}, {"trips": 20}, {"size": 1 << 20}, {"rate": 200.0}, {"keep": True}])
def test_connections_that_are_served_are_counted_and_their_latencies_ordered(program: Path, options: dict[str, float]) -> None:
    with serving(echo) as port:
        seen = Generator(program).run(port, clients=4, connections=20, **options)
    assert (seen.connections, seen.errors) == (20, {})
    assert seen.trips == 20 * options.get("trips", 1)
    assert 0 < seen.latency["p50"] <= seen.latency["p90"] <= seen.latency["p99"] <= seen.latency["max"]
    assert sum(seen.slices) == 20
    assert seen.cpu > 0


def test_a_pace_is_kept_and_a_latency_counts_from_when_the_connection_was_due(program: Path) -> None:
    def slow(sock: socket.socket) -> None:
        time.sleep(0.05)
        echo(sock)

    with serving(slow) as port:
        paced = Generator(program).run(port, clients=64, connections=50, rate=200)
        # Two at a time make 40 a second of the 200 that are due: the last is late by most of a second.
        late = Generator(program).run(port, clients=2, connections=40, rate=200)
    assert paced.seconds >= 49 / 200
    assert late.latency["max"] > 0.5e6
    assert late.late["p99"] > 0.4e6


@pytest.mark.parametrize("by_reset", [False, True])
def test_clients_close_as_they_are_told(program: Path, by_reset: bool) -> None:
    ends = []

    def note(sock: socket.socket) -> None:
        sock.sendall(sock.recv(64))
        try:
            ends.append(sock.recv(1) == b"")
        except ConnectionResetError:
            ends.append(False)

    with serving(note) as port:
        Generator(program, reset=by_reset).run(port, connections=5)
    assert ends == [not by_reset] * 5


def test_held_connections_are_all_there_and_are_served_once_more_at_the_end(program: Path) -> None:
    served = []

    def count(sock: socket.socket) -> None:
        while data := sock.recv(4096):
            served.append(sock)  # before the client knows
            sock.sendall(data)

    with serving(count) as port:
        with Generator(program).holding(port, 30, clients=7) as held:
            assert len(set(served)) == len(served) == 30
        assert held.seen is not None
        assert held.seen.connections == 30
        assert held.seen.errors == {}
    assert len(served) == 60


def test_a_held_connection_that_ends_is_an_error(program: Path) -> None:
    def leave(sock: socket.socket) -> None:
        sock.sendall(sock.recv(64))
        sock.close()
        gone.append(sock)

    gone: list[socket.socket] = []
    with serving(leave) as port, pytest.raises(BenchError, match="'cut': 3"), Generator(program).holding(port, 3):
        watch.until("the server has left", lambda: len(gone) == 3)


def answer(status: str, body: Callable[[bytes], bytes]) -> Handler:
    def respond(sock: socket.socket) -> None:
        path = sock.recv(4096).split()[1]
        sock.sendall(b"HTTP/1.1 " + status.encode() + b"\r\nX: y\r\n\r\n" + body(path[1:]))

    return respond


def test_answers_of_http_have_to_repeat_what_was_asked(program: Path) -> None:
    def errors(status: str, body: Callable[[bytes], bytes]) -> dict[str, int]:
        with serving(answer(status, body)) as port:
            return Generator(program).run(port, clients=2, connections=4, http=True).errors

    assert errors("200 OK", lambda path: path) == {}
    assert errors("500 No", lambda path: path) == {"wrong bytes": 4}
    assert errors("200 OK", lambda path: path[::-1]) == {"wrong bytes": 4}
    assert errors("200 OK", lambda path: path + b"x") == {"wrong bytes": 4}


def test_options_that_make_no_sense_are_told(program: Path) -> None:
    with pytest.raises(BenchError, match="no sense"):
        Generator(program).run(1)
