"""`prefork serve`: what it serves, where, and what it says."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import prefork
from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS

Start = Callable[..., Server]


def ask(sock: socket.socket, line: bytes) -> bytes:
    """Send, close our side, and read to the end."""
    sock.sendall(line)
    sock.shutdown(socket.SHUT_WR)
    got = b""
    while data := sock.recv(4096):
        got += data
    return got


def test_prefork_is_the_one_that_the_wheel_installed() -> None:
    wanted = os.environ.get("WHEEL_INSTALLED_IN")
    if wanted is None:
        assert os.environ.get("CI") != "true", "CI tests the wheel: WHEEL_INSTALLED_IN names where it was installed"
        pytest.skip("WHEEL_INSTALLED_IN is not set: only .ci/run builds and installs a wheel")
    assert Path(prefork.__file__).is_relative_to(wanted)


def test_the_bundled_echo_answers(prefork_server: Start) -> None:
    with prefork_server("echo:loop").connect() as sock:
        assert ask(sock, b"hello" * 10_000) == b"hello" * 10_000


def test_the_start_line_names_version_module_addresses_acceptors_and_pid(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=3)
    line = next(line for line in server.log().splitlines() if "serving" in line)
    port = server.address[1]
    assert port != 0
    assert f"prefork {prefork.__version__} serving echo:loop on 127.0.0.1:{port}: 3 acceptors each" in line
    assert line.endswith(f"pid {server.pid}")


KILLED_ONCE = """
import os, signal, sys
here = os.path.dirname(__file__)
if os.path.exists(here + "/once"):
    os.unlink(here + "/once")
    os.kill(os.getpid(), signal.SIGKILL)
sys.path.remove(here)
del sys.modules["click"]
import click
"""


def test_a_start_goes_on_when_the_process_that_reads_its_command_line_is_killed(prefork_server: Start, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(KILLED_ONCE)
    (tmp_path / "once").touch()
    server = prefork_server("echo:loop", workers=1, environment={"PYTHONPATH": str(tmp_path)})
    assert not (tmp_path / "once").exists()
    assert server.status()["module"] == "echo:loop"


def test_an_echo_of_ones_own_in_the_working_directory_wins(prefork_server: Start, tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text("def loop(sock):\n    while sock.recv(9):\n        pass\n    sock.sendall(b'mine')\n")
    with prefork_server("echo:loop", folder=tmp_path).connect() as sock:
        assert ask(sock, b"hello") == b"mine"


def test_several_addresses_of_every_kind_are_served_at_once(prefork_server: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = prefork_server("echo:loop", workers=2, bind=["127.0.0.1:0", "[::1]:0", ":0", f"unix:{path}?mode=0660"])
    listeners = server.status()["listeners"]
    for listener in listeners:
        host, _, port = listener["address"].removeprefix("unix:").rpartition(":")
        address = (host.strip("[]") or "127.0.0.1", int(port)) if port.isdigit() else path
        with connect(address) as sock:
            assert ask(sock, b"hello") == b"hello"
        assert listener["workers"]["target"] == 2
    assert os.stat(path).st_mode & 0o777 == 0o660
    assert listeners[3]["queue"] is None
    assert listeners[0]["queue_limit"] == 2048
    assert server.stop() == 0
    assert not os.path.exists(path)


def test_a_mapped_peer_is_shown_as_ipv4(prefork_server: Start) -> None:
    server = prefork_server("tiny:about", folder=HANDLERS, bind=":0")
    with connect(("127.0.0.1", server.address[1])) as sock:
        assert f'"peer": "127.0.0.1:{sock.getsockname()[1]}"' in sock.recv(4096).decode()


def test_a_stale_unix_socket_is_replaced_and_a_live_one_refused(prefork_server: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    server = prefork_server("echo:loop", bind=f"unix:{path}")
    assert os.stat(path).st_mode & 0o777 == 0o600
    with (
        pytest.raises(StartError, match=rf"is in use by .*\(pid {server.pid}\)") as caught,
        serve("echo:loop", bind=f"unix:{path}"),
    ):
        pass
    assert caught.value.exit_status == 69
    with server.connect() as sock:
        assert ask(sock, b"still mine") == b"still mine"


def test_a_unix_socket_that_is_not_ours_any_more_is_left_alone(prefork_server: Start, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = prefork_server("echo:loop", bind=f"unix:{path}")
    path.unlink()
    path.write_text("somebody else's")
    assert server.stop() == 0
    assert path.read_text() == "somebody else's"


def test_an_address_in_use_names_who_holds_it(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", name="first")
    host, port = server.address
    with (
        pytest.raises(StartError, match=rf"{host}:{port} is in use by .*\(pid {server.pid}\)") as caught,
        serve("echo:loop", bind=f"{host}:{port}"),
    ):
        pass
    assert caught.value.exit_status == 69


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"module": "tiny:not_callable"}, 78, "int is not callable"),
        ({"module": "tiny:too_many"}, 78, r"loop\(sock\) or loop\(sock, conn\)"),
        ({"module": "tiny"}, 78, "must be MODULE:ATTR"),
        ({"workers": 0}, 78, r"workers = '0' on the command line \(--workers\): must be a whole number from 1"),
        ({"workers": 300}, 78, "raise max_workers to at least 300"),
        ({"bind": "here"}, 78, "an address is HOST:PORT"),
    ],
)
def test_a_start_that_can_not_be_ends_with_its_exit_code_and_a_remedy(options: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(StartError, match=message) as caught, serve("", folder=HANDLERS, **{"module": "tiny:who", **options}):
        pass
    assert caught.value.exit_status == status


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nosuch", "No module named 'nosuch'"),
        ("def loop(sock) return", "SyntaxError"),
    ],
)
def test_an_import_that_fails_ends_the_start_with_its_traceback(module: Callable[[str], Path], source: str, message: str) -> None:
    with pytest.raises(StartError, match=message) as caught, serve("mine:loop", folder=module(source)):
        pass
    assert caught.value.exit_status == 78
    assert "importlib" not in str(caught.value)


def test_process_titles_name_role_generation_and_slot(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2, name="titled")
    titles = [p.cmdline()[0] for p in [psutil.Process(server.pid), *watch.family(server.pid)]]
    assert sorted(titles) == [
        "prefork: master titled",
        "prefork: titled gen 1",
        "prefork: titled gen 1 worker 0",
        "prefork: titled gen 1 worker 1",
    ]


def test_the_master_has_one_thread_and_runs_no_user_code(prefork_server: Start, module: Callable[[str], Path]) -> None:
    folder = module("import os\nopen('ran', 'a').write(f'{os.getpid()}\\n')\ndef loop(sock): pass\n")
    server = prefork_server("mine:loop", folder=folder)
    assert psutil.Process(server.pid).num_threads() == 1
    assert (folder / "ran").read_text() == f"{watch.fork_server(server)}\n"


def test_a_toml_file_gives_the_options_and_the_command_line_beats_it(prefork_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "echo.toml"
    file.write_text('module = "echo:loop"\nworkers = 5\nmax_workers = 17\nname = "fromfile"\n')
    server = prefork_server("", workers=2, arguments=("--config", str(file)), environment={"PREFORK_MAX_WORKERS": "18"})
    status = server.status()
    assert (status["name"], status["max_workers"], status["listeners"][0]["workers"]["target"]) == ("fromfile", 18, 2)


def test_an_unknown_key_in_the_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "echo.toml"
    file.write_text('module = "echo:loop"\nworker = 5\n')
    with (
        pytest.raises(StartError, match=r"unknown option 'worker' in .*echo\.toml: did you mean 'workers'\?") as caught,
        serve("", arguments=("--config", str(file))),
    ):
        pass
    assert caught.value.exit_status == 78


def test_help_teaches_every_option() -> None:
    done = subprocess.run([sys.executable, "-m", "prefork", "serve", "--help"], capture_output=True, text=True, check=True)
    for option in ("--module", "--bind", "--workers", "--max-workers", "--spare-timeout", "--control", "--config", "--log-level"):
        assert re.search(rf"{option}\b", done.stdout)
    assert "Examples:" in done.stdout
    usage = subprocess.run([sys.executable, "-m", "prefork", "serve", "--nosuch"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2


def test_a_port_that_a_connection_holds_names_whose_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        client.connect(listener.getsockname())
        host, port = client.getsockname()
        with pytest.raises(StartError, match=rf"in use by .*\(pid {os.getpid()}\)"), serve("echo:loop", bind=f"{host}:{port}"):
            pass
