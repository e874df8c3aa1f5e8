"""What a handler can be and ask: request handler classes, `prefork.current`, time-outs, detached sockets."""

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS

Start = Callable[..., Server]
Module = Callable[[str], Path]


def all_of(sock: socket.socket) -> bytes:
    """Everything until the end."""
    got = b""
    while data := sock.recv(4096):
        got += data
    return got


def ask(server: Server) -> Any:
    """The JSON that a connection is answered with."""
    with server.connect() as sock:
        return json.loads(all_of(sock))


# -- request handler classes


def test_a_stream_request_handler_serves_unchanged(prefork_server: Start) -> None:
    server = prefork_server("classes:Lines", folder=HANDLERS, workers=1)
    for _ in range(2):
        with server.connect() as sock:
            sock.sendall(b"one\ntwo\n")
            sock.shutdown(socket.SHUT_WR)
            assert all_of(sock) == b"ONE\nTWO\n"
    watch.until("both are counted", lambda: server.status()["totals"]["ok"] == 2)


def test_a_stream_request_handlers_settings_work(prefork_server: Start) -> None:
    server = prefork_server("classes:Tuned", folder=HANDLERS, socket_timeout=7, nodelay="off")
    with server.connect() as sock:
        assert all_of(sock) == b'[1, 0.2, "SocketIO", "BufferedWriter"] late'


def test_a_peer_that_has_gone_before_the_last_flush_is_no_error(prefork_server: Start, tmp_path: Path) -> None:
    server = prefork_server("classes:Flood", folder=HANDLERS, bind=f"unix:{tmp_path}/socket")
    server.connect().close()
    totals = watch.until("it is counted", lambda: (now := server.status()["totals"])["accepted"] and not now["serving"] and now)
    assert (totals["ok"], totals["error"]) == (1, 0)


def test_a_request_handler_finds_its_client_and_its_server(prefork_server: Start) -> None:
    server = prefork_server("classes:About", folder=HANDLERS, workers=1, max_workers=1, backlog=77)
    for served in (1, 2):
        with server.connect() as sock:
            told = json.loads(sock.recv(4096))
            mine = list(sock.getsockname())
        assert told["client_address"] == mine
        assert told["peer"] == f"{mine[0]}:{mine[1]}"
        assert told["server_address"] == list(server.address)
        assert told["server_port"] == server.address[1]
        assert told["server_name"] == socket.getfqdn("127.0.0.1")
        assert (told["family"], told["type"], told["is_class"]) == ("AF_INET", "SOCK_STREAM", True)
        assert (told["timeout"], told["queue"]) == (None, 77)
        assert told["refused"] == "self.server.serve_forever: prefork accepts connections and calls the handler; leave it out"
        # Its own attribute on the server stays: one object for each worker.
        assert told["served"] == served


def test_a_request_handler_of_a_unix_socket_sees_what_socketserver_shows(prefork_server: Start, tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    server = prefork_server("classes:About", folder=HANDLERS, bind=f"unix:{path}")
    with server.connect() as sock:
        told = json.loads(sock.recv(4096))
    assert (told["client_address"], told["server_address"], told["family"]) == ("", path, "AF_UNIX")


def test_a_request_handler_sees_a_mapped_client_as_an_ipv4_pair_and_an_ipv6_one_whole(prefork_server: Start) -> None:
    server = prefork_server("classes:About", folder=HANDLERS, bind=":0")
    for host in ("127.0.0.1", "::1"):
        with connect((host, server.address[1])) as sock:
            told = json.loads(sock.recv(4096))
            assert told["client_address"] == list(sock.getsockname())
            assert told["server_address"][0] == "::"


def test_a_request_handler_learns_that_it_should_finish(prefork_server: Start) -> None:
    server = prefork_server("classes:About", folder=HANDLERS, workers=1)
    with server.connect() as sock:
        assert json.loads(sock.recv(4096))["served"] == 1
        sock.sendall(b"?")
        assert sock.recv(64) == b"false\n"
        assert server.command("reload")["ok"]
        sock.sendall(b"?")
        assert sock.recv(64) == b"true\n"


def test_a_request_handler_may_close_through_its_server(prefork_server: Start) -> None:
    server = prefork_server("classes:Closing", folder=HANDLERS, workers=1, max_workers=1)
    for _ in range(2):
        with server.connect() as sock:
            assert all_of(sock) == b"bye"
    watch.until("both are counted", lambda: server.status()["totals"]["ok"] == 2)


def test_a_request_handler_that_raises_is_an_error_with_its_traceback(prefork_server: Start) -> None:
    server = prefork_server("classes:Raising", folder=HANDLERS, workers=1)
    with server.connect() as sock:
        assert all_of(sock) == b""
    log = watch.logged(server, "RuntimeError: raised in a class")
    assert "worker.py" not in log
    watch.until("it is counted", lambda: server.status()["totals"]["error"] == 1)


def test_a_partial_of_a_request_handler_is_one(prefork_server: Start) -> None:
    server = prefork_server("classes:files", folder=HANDLERS)
    with server.connect() as sock:
        sock.sendall(b"GET /tiny.py HTTP/1.0\r\n\r\n")
        head, _, body = all_of(sock).partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert body == (HANDLERS / "tiny.py").read_bytes()


def test_socketserver_is_not_loaded_for_a_function(prefork_server: Start, module: Module) -> None:
    source = "import sys\ndef loop(sock):\n    sock.sendall(repr('socketserver' in sys.modules).encode())\n"
    server = prefork_server("mine:loop", folder=module(source))
    with server.connect() as sock:
        assert all_of(sock) == b"False"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("classes:Datagrams", "classes:Datagrams: a DatagramRequestHandler answers datagrams"),
        ("classes:Choosy", r"it is called with \(request, client_address, server\), as socketserver does"),
        ("classes:Other", r"a class of another kind; a handler is a function loop\(sock\) or a socketserver.BaseRequestHandler"),
    ],
)
def test_a_class_that_can_not_be_served_is_refused(target: str, message: str) -> None:
    with pytest.raises(StartError, match=message) as caught, serve(target, folder=HANDLERS):
        pass
    assert caught.value.exit_status == 78


def test_a_partial_that_gives_the_rest_makes_the_same_class_usable(prefork_server: Start) -> None:
    server = prefork_server("classes:rooted", folder=HANDLERS)
    server.connect().close()
    watch.until("it is served", lambda: server.status()["totals"]["ok"] == 1)


# -- current()


def test_current_is_the_connection_that_the_handler_is_given_and_is_its_threads_alone(prefork_server: Start) -> None:
    told = ask(prefork_server("classes:same", folder=HANDLERS))
    assert told[0] is True
    assert "this is not the handler's thread" in told[1]


def test_current_is_one_object_for_a_connection_and_another_for_the_next(prefork_server: Start) -> None:
    server = prefork_server("classes:deep", folder=HANDLERS, workers=1, max_workers=1)
    for number in (1, 2):
        with server.connect() as sock:
            mine = sock.getsockname()
            told = json.loads(all_of(sock))
        assert told == [True, f"1.0.{number}", f"127.0.0.1:{mine[1]}", f"127.0.0.1:{server.address[1]}"]


def test_current_of_a_socket_that_the_handler_has_closed_tells_the_listener_as_local(prefork_server: Start) -> None:
    server = prefork_server("classes:late", folder=HANDLERS)
    assert ask(server) == [f"127.0.0.1:{server.address[1]}"]


def test_current_outside_of_a_worker_says_so() -> None:
    with pytest.raises(RuntimeError, match="this process is not a worker of prefork"):
        prefork.current()


def test_current_in_a_hook_and_in_a_handlers_child_says_that_there_is_none(prefork_server: Start, module: Module) -> None:
    source = """
import os, prefork

def ask():
    try:
        return prefork.current().peer
    except RuntimeError as error:
        return str(error)

def start():
    print("hook:", ask(), flush=True)

def loop(sock):
    if os.fork() == 0:
        sock.sendall(ask().encode())
        os._exit(0)
    os.wait()
"""
    server = prefork_server("mine:loop", folder=module(source), on_worker_start="mine:start", workers=1)
    watch.logged(server, "hook: prefork.current(): this worker serves no connection now")
    with server.connect() as sock:
        assert b"a child that the handler forked" in all_of(sock)


# -- what a fork copies

LOCKS = """
import logging, os, signal, sys, threading

held = logging.StreamHandler(sys.stdout)
logging.getLogger().addHandler(held)

def loop(sock):
    taken, done = threading.Event(), threading.Event()

    def hold():
        logging.warning("a thread of the worker")  # waits for ever where the worker was born with the lock
        held.acquire()
        taken.set()
        done.wait()
        held.release()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    if os.fork() == 0:
        signal.alarm(10)
        logging.warning("a child of the handler")  # waits for ever where it has the thread's lock
        sock.sendall(b"free")
        os._exit(0)
    os.wait()
    done.set()
    holder.join()
"""


def test_locks_are_free_in_a_worker_and_in_what_its_handler_forks(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(LOCKS), workers=1)
    with server.connect() as sock:
        assert all_of(sock) == b"free"


HOOKED = """
import logging, os, signal, threading

held = logging.StreamHandler()
held.lock = None  # logging's own fork hook raises at this

def mark(signo, frame):
    pass

os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGUSR1, mark))

def loop(sock):
    if sock.recv(1) == b"f" and os.fork() == 0:
        return  # back into the worker's loop
    sock.sendall(f"{os.getpid()} {signal.getsignal(signal.SIGUSR1) is mark}".encode())
"""


def test_what_user_codes_fork_hooks_do_stays_and_one_that_raises_makes_no_second_worker(
    prefork_server: Start, module: Module
) -> None:
    server = prefork_server("mine:loop", folder=module(HOOKED), workers=1, max_workers=1)

    def told(first: bytes) -> bytes:
        with server.connect() as sock:
            sock.sendall(first)
            return all_of(sock)

    [worker] = server.status()["workers"]
    assert {told(first) for first in (b"f", b"g", b"f", b"g")} == {f"{worker['pid']} True".encode()}


def test_every_worker_draws_its_own_random_numbers(prefork_server: Start, module: Module) -> None:
    source = "import random\ndef loop(sock):\n    sock.sendall(str(random.random()).encode())\n    sock.recv(1)\n"
    server = prefork_server("mine:loop", folder=module(source), workers=4)
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(4)]
        assert len({client.recv(100) for client in clients}) == 4


# -- time-outs and detached sockets

TIMEOUT = """
import socket
def loop(sock):
    socket.setdefaulttimeout(30)
    told = repr(sock.gettimeout()).encode()
    try:
        sock.recv(1)
    except TimeoutError:
        told += b" late"
    sock.sendall(told)
"""


def test_socket_timeout_is_that_of_every_connection_whatever_default_is_left_behind(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(TIMEOUT), workers=1, max_workers=1, socket_timeout=0.05)
    for _ in range(2):
        with server.connect() as sock:
            assert all_of(sock) == b"0.05 late"


DETACHING = """
import os, socket
kept = []
def loop(sock):
    what = sock.recv(16)
    if what == b"keep":
        kept.append(sock.detach())
    else:
        os.write(kept[0], what)
"""


def test_a_detached_connection_stays_open_until_its_worker_leaves(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(DETACHING), workers=1, max_workers=1)
    with server.connect() as first:
        first.sendall(b"keep")
        watch.until("the handler has returned", lambda: server.status()["totals"]["ok"] == 1)
        with server.connect() as second:
            second.sendall(b"to the first")
            assert first.recv(64) == b"to the first"
            assert second.recv(1) == b""
        assert server.status()["totals"]["serving"] == 0
        assert server.command("reload")["ok"]
        assert first.recv(1) == b""


REMEMBERING = """
import json, os, socket, sys, warnings, weakref
made, numbers, warned = [], [], []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *more: warned.append(str(message))
sys.addaudithook(lambda event, args: made.append(event) if event == "socket.__new__" else None)
kept, known = [], weakref.WeakKeyDictionary()
def loop(sock):
    what = sock.recv(16).decode()
    told = {"made": len(made), "timeout": sock.gettimeout(), "known": known.get(sock), "closed": [old.fileno() for old in kept]}
    told |= {"peer": sock.getpeername()[1], "number": sock.fileno(), "warned": warned}
    match what:
        case "keep":
            kept.append(sock)
        case "file":
            kept.append(sock.makefile("rb"))
        case "know":
            known[sock] = "of another client"
        case "timeout":
            sock.settimeout(9)
        case "raise":
            raise ValueError
        case "cycle":
            knot = [sock]
            knot.append(knot)
        case "free":
            os.close(numbers.pop())
    sock.sendall(json.dumps(told).encode())
    match what:
        case "close":
            sock.close()
        case "occupy":
            sock.shutdown(socket.SHUT_RDWR)
            numbers.append(sock.detach())
"""


def remembered(server: Server, what: str) -> dict[str, Any]:
    """Tell the handler to do that; what it says of the connection, which is this one."""
    with server.connect() as sock:
        sock.sendall(what.encode())
        told = all_of(sock) or b"{}"
        facts: dict[str, Any] = json.loads(told)
        assert facts.pop("peer", sock.getsockname()[1]) == sock.getsockname()[1]
        return facts


def test_nothing_that_a_handler_did_to_a_connections_object_is_the_next_clients(prefork_server: Start, module: Module) -> None:
    """The object is used again where nobody can tell, and only there."""
    server = prefork_server("mine:loop", folder=module(REMEMBERING), workers=1, max_workers=1)
    fresh: dict[str, Any] = {"timeout": None, "known": None, "warned": []}
    plain = remembered(server, "look")
    made = plain["made"]
    fresh["number"] = plain["number"]
    assert plain == {"made": made, "closed": [], **fresh}
    for _ in range(3):
        assert remembered(server, "look") == plain, "an object that nobody knows is made once"
    for what in ("know", "timeout", "cycle", "close"):
        assert remembered(server, what)["made"] == made
        made += 1
        assert remembered(server, "look") == {"made": made, "closed": [], **fresh}, f"after {what!r} a new one is made"
    for closed, what in enumerate(("keep", "file"), 1):
        assert remembered(server, what)["made"] == made
        made += 1
        assert remembered(server, "look") == {"made": made, "closed": [-1] * closed, **fresh}, "who is kept is closed"
    assert remembered(server, "raise") == {}
    assert remembered(server, "look")["timeout"] is None


def test_a_connection_with_another_number_than_the_last_one_is_itself(prefork_server: Start, module: Module) -> None:
    """A handler occupies the number of a connection that it has detached, and frees it later."""
    server = prefork_server("mine:loop", folder=module(REMEMBERING), workers=1, max_workers=1)
    told = [remembered(server, what) for what in ("occupy", "look", "free", "look", "look")]
    first, other, *numbers = [facts["number"] for facts in told]
    assert first != other
    assert numbers == [other, first, first]
    assert told[-1]["warned"] == [], "an object that is of no use any more lets go of its number, which may be somebody else's"
    made = [facts["made"] - told[0]["made"] for facts in told]
    assert made == [0, 1, 1, 2, 2], "one object is used while the number is the same"


HANDING = """
import os, socket
def loop(sock):
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(os.environ["OTHER"])
        socket.send_fds(other, [b"x"], [sock.fileno()])
    os.close(sock.detach())
"""


def test_a_connection_can_be_handed_to_another_process(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{tmp_path}/other")
        other.listen()
        server = prefork_server("mine:loop", folder=module(HANDING), environment={"OTHER": f"{tmp_path}/other"})
        with server.connect() as client:
            taken, _ = other.accept()
            with taken:
                _, fds, _, _ = socket.recv_fds(taken, 1, 1)
            watch.until("the worker is done with it", lambda: server.status()["totals"]["ok"] == 1)
            os.write(fds[0], b"from another process")
            os.close(fds[0])
            assert all_of(client) == b"from another process"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine:A.loop", "mine:A.loop: loop is a method of A, and there is no object to call it on"),
        ("mine:lop", "has no 'lop'; did you mean 'loop'?"),
        ("mien:loop", " or on the Python path; did you mean 'mine'?"),
        ("mine.py:loop", " or on the Python path; did you mean 'mine'?"),
        ("ecoh:loop", " or on the Python path; did you mean 'echo'?"),
        ("json:loop", "json.py is hidden by it, which prefork has loaded before: rename yours"),
    ],
)
def test_a_target_that_is_meant_otherwise_says_how(module: Module, target: str, message: str) -> None:
    folder = module(
        "class A:\n    def loop(self, sock): pass\n    @staticmethod\n    def other(sock): pass\ndef loop(sock): pass\n"
    )
    (folder / "json.py").write_text("def loop(sock): pass\n")
    with pytest.raises(StartError, match=re.escape(message)), serve(target, folder=folder):
        pass
    (folder / "mine.py").write_text("class A:\n    @staticmethod\n    def other(sock): pass\nclass B(A): pass\n")
    with serve("mine:B.other", folder=folder, workers=1):
        pass


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("globals()[1] = 2\n__file__ = 3\ndef loop(sock): pass\n", "has no 'lop'; did you mean 'loop'?"),
        ("class Odd:\n    def __str__(self): return 5\nraise ModuleNotFoundError('odd', name=Odd())\n", "the import raised\n"),
        ("import sys\ndef __getattr__(name):\n    raise AttributeError(name=5, obj=sys.modules[__name__])\n", "has no 'lop'"),
    ],
    ids=["names that are none", "a module without a name", "an attribute without a name"],
)
def test_a_near_name_is_looked_for_whatever_the_module_has_made_of_itself(module: Module, source: str, message: str) -> None:
    with pytest.raises(StartError, match=re.escape(message)) as caught, serve("mine:lop", folder=module(source)):
        pass
    assert caught.value.exit_status == 78
    assert "internal error" not in str(caught.value)


def test_a_folder_that_can_be_entered_and_not_read_is_named(module: Module) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads any folder")
    folder = module("def loop(sock): pass\n")
    folder.chmod(0o300)
    try:
        with (
            pytest.raises(StartError, match=r"no module 'mine' in .*; user [0-9]+ can't read") as caught,
            serve("mine:loop", folder=folder),
        ):
            pass
    finally:
        folder.chmod(0o700)
    assert f"can't read {folder}, which the Python path leads to" in str(caught.value)


LEAVES_A_WAKEUP = """
import signal

signal.signal(signal.SIGUSR1, lambda *_: None)

def loop(sock):
    if sock.recv(64) == b"leave":
        sock.setblocking(False)
        signal.set_wakeup_fd(sock.fileno(), warn_on_full_buffer=False)
        sock.setblocking(True)
    else:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.raise_signal(signal.SIGUSR1)
    sock.sendall(b"done")
"""


def test_a_wakeup_descriptor_that_a_handler_leaves_behind_writes_to_no_other_client(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(LEAVES_A_WAKEUP), workers=1, max_workers=1)
    for said in (b"leave", b"signal"):
        with server.connect() as sock:
            sock.sendall(said)
            assert sock.makefile("rb").read() == b"done"
