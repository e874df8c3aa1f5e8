"""`drain = eof`: a connection whose worker is asked to leave sees the end of its input, and nothing else of it is lost."""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefork.testing import Server, StartError, serve
from tests import watch
from tests.conftest import HANDLERS
from tests.integration.test_addresses import SERVE, answers, listening, started

Start = Callable[..., Server]
Module = Callable[[str], Path]


def hold(server: Server, stack: ExitStack) -> socket.socket:
    """A connection that a worker serves, and whose first line was answered."""
    sock = stack.enter_context(server.connect())
    assert int(sock.recv(64))
    sock.sendall(b"one\n")
    assert sock.recv(64) == b"one\n"
    return sock


def rest(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()


def test_at_a_reload_handlers_see_the_end_of_input_and_may_still_answer(prefork_server: Start) -> None:
    server = prefork_server("stuck:lines", folder=HANDLERS, workers=2, drain="eof")
    with ExitStack() as stack:
        held = [hold(server, stack) for _ in range(6)]
        assert server.command("reload")["ok"]
        assert [rest(sock) for sock in held] == [b"goodbye\n"] * 6
    totals = watch.quiet(server)
    assert (totals["ok"], totals["killed"], totals["error"]) == (6, 0, 0)


def test_the_request_being_served_and_those_that_have_arrived_are_answered(prefork_server: Start, module: Module) -> None:
    source = (
        "def loop(sock):\n"
        "    with sock.makefile('rwb') as file:\n"
        "        for line in file:\n"
        "            if line == b'slow\\n':\n"
        "                open('fifo').read()\n"
        "            file.write(line)\n"
    )
    folder = module(source)
    os.mkfifo(folder / "fifo")
    server = prefork_server("mine:loop", folder=folder, workers=1, drain="eof")
    with server.connect() as sock:
        sock.sendall(b"slow\n")
        with open(folder / "fifo", "w"):
            sock.sendall(b"next\n")
            assert server.command("reload")["ok"]
        assert rest(sock) == b"slow\nnext\n"


def test_without_it_a_reload_is_not_seen(prefork_server: Start) -> None:
    server = prefork_server("stuck:lines", folder=HANDLERS, workers=1)
    with ExitStack() as stack:
        sock = hold(server, stack)
        assert server.command("reload")["ok"]
        sock.sendall(b"two\n")
        assert sock.recv(64) == b"two\n"


def test_a_handler_can_ask_whether_it_was_that(prefork_server: Start, module: Module) -> None:
    source = (
        "import prefork\n"
        "def loop(sock):\n"
        "    while data := sock.recv(64):\n"
        "        sock.sendall(data)\n"
        "    sock.sendall(b'stopping' if prefork.current().stopping else b'bye')\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=1, drain="eof")
    with server.connect() as sock, server.connect() as other:
        for one in (sock, other):
            one.sendall(b"x")
            assert one.recv(64) == b"x"
        other.shutdown(socket.SHUT_WR)
        assert rest(other) == b"bye"
        assert server.command("reload")["ok"]
        assert rest(sock) == b"stopping"


def test_at_a_stop_it_comes_at_once_and_makes_room_for_those_in_the_queue(prefork_server: Start) -> None:
    server = prefork_server("stuck:lines", folder=HANDLERS, workers=2, max_workers=2, drain="eof", graceful_timeout=60)
    with ExitStack() as stack:
        held = [hold(server, stack) for _ in range(2)]
        queued = [stack.enter_context(server.connect()) for _ in range(4)]
        for sock in queued:
            sock.sendall(b"served\n")
            sock.shutdown(socket.SHUT_WR)
        with watch.soon("a stop whose connections end when they are told to"):
            assert server.stop() == 0
        assert [rest(sock) for sock in held] == [b"goodbye\n"] * 2
        assert [rest(sock).partition(b"\n")[2] for sock in queued] == [b"served\ngoodbye\n"] * 4
    assert "stopped: 6 connections accepted, 0 cut" in server.log()


def test_recycling_ends_input_too(prefork_server: Start) -> None:
    # Whichever worker it is: surplus acceptors have not served anybody yet.
    server = prefork_server("stuck:lines", folder=HANDLERS, workers=1, drain="eof", max_connections=1)
    with server.connect() as sock:
        pid, last = rest(sock).splitlines()  # both may come at once
        assert int(pid)
        assert last == b"goodbye"


def test_a_descriptor_that_user_code_has_given_another_meaning_is_left_alone(prefork_server: Start, module: Module) -> None:
    source = (
        "import os, socket\n"
        "def loop(sock):\n"
        "    fd = sock.fileno()\n"
        "    away = os.dup(fd)\n"
        "    ours, theirs = socket.socketpair()\n"
        "    os.dup2(ours.fileno(), fd)\n"
        "    os.write(away, b'ready')\n"
        "    while os.read(away, 64) != b'end':\n"
        "        theirs.sendall(b'ping')\n"
        "        os.write(away, os.read(fd, 64))\n"
        "    os.close(away)\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=1, drain="eof")
    with server.connect() as sock:
        assert sock.recv(64) == b"ready"
        assert server.command("reload")["ok"]
        sock.sendall(b"?")
        assert sock.recv(64) == b"ping"
        sock.sendall(b"end")
    assert watch.quiet(server)["ok"] == 1


def test_a_tls_layer_stays(prefork_server: Start, module: Module) -> None:
    # ssl.wrap_socket detaches the socket that was accepted: only the descriptor is the same.
    source = (
        "import socket\n"
        "class Layer(socket.socket):\n"
        "    def shutdown(self, how):\n"
        "        raise RuntimeError('the layer is gone')\n"
        "def loop(sock):\n"
        "    with Layer(fileno=sock.detach()) as layer:\n"
        "        layer.sendall(b'ready')\n"
        "        while layer.recv(64):\n"
        "            pass\n"
        "        layer.sendall(b'goodbye')\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=1, drain="eof")
    with server.connect() as sock:
        assert sock.recv(64) == b"ready"
        assert server.command("reload")["ok"]
        assert rest(sock) == b"goodbye"
    totals = watch.quiet(server)
    assert (totals["ok"], totals["error"]) == (1, 0)


def test_a_signal_that_comes_before_the_connection_can_be_ended_is_not_lost(prefork_server: Start, module: Module) -> None:
    # The socket object is made between "this worker is busy" and "this is its connection".
    source = (
        "import os, signal, socket, sys\n"
        "def retire(frame, event, arg):\n"
        "    if event == 'call' and frame.f_code is socket.socket.__init__.__code__:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.setprofile(retire)\n"
        "def loop(sock):\n"
        "    while sock.recv(64):\n"
        "        pass\n"
        "    sock.sendall(b'goodbye')\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=1, drain="eof")
    with server.connect() as sock:
        assert rest(sock) == b"goodbye"


def test_a_unix_socket_is_refused_whoever_has_opened_it(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with (
        pytest.raises(StartError, match=r"drain = eof .* does not work for unix:"),
        serve("echo:loop", drain="eof", bind=f"unix:{path}"),
    ):
        raise AssertionError("it serves")
    with listening(socket.AF_UNIX, path) as ours:
        command = [*SERVE, f"--bind=fd:{ours.fileno()}", "--drain=eof"]
        with started(tmp_path, command, (ours.fileno(),)) as server:
            assert server.process.wait() == 78
            assert f"drain = eof does not work for fd:{ours.fileno()}, a Unix socket" in server.log()


def test_a_reload_that_asks_for_it_on_a_unix_socket_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "prefork.toml"
    with listening(socket.AF_UNIX, str(tmp_path / "sock")) as ours:
        file.write_text(f"bind = ['fd:{ours.fileno()}']")
        with started(tmp_path, [*SERVE, f"--config={file}"], (ours.fileno(),)) as server:
            file.write_text(f"bind = ['fd:{ours.fileno()}']\ndrain = 'eof'")
            assert "a Unix socket" in server.command("reload")["reason"]
            assert answers(str(tmp_path / "sock"))
