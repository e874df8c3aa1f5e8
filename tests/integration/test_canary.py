"""Canary reloads: new code that crashes is taken back by itself, and who asked for it is told."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prefork.testing import Server, connect
from tests import watch
from tests.load import Load

Start = Callable[..., Server]
Module = Callable[[str], Path]

GOOD = "def loop(sock):\n    sock.sendall(b{!r})\n"
CRASHES = "import ctypes\ndef loop(sock):\n    if sock.recv(1) == b'!':\n        ctypes.string_at(0)\n    sock.sendall(b'new')\n"


def says(address: Any, said: bytes = b"") -> bytes:
    with connect(address) as sock:
        if said:
            sock.sendall(said)
        return sock.recv(64)


def on_ports(prefork_server: Start, folder: Path, *ports: int, canary: float) -> tuple[Server, Callable[..., None]]:
    """A daemon on these ports of 127.0.0.1, and what writes others into its configuration."""
    file = folder / "prefork.toml"

    def bind(*ports: int) -> None:
        file.write_text(f"bind = {[f'127.0.0.1:{port}' for port in ports]}\ncanary = {canary}\n")

    bind(*ports)
    return prefork_server("mine:loop", folder=folder, bind=[], workers=1, arguments=("--config", str(file))), bind


def on_trial(server: Server, generation: int = 2) -> None:
    watch.logged(server, f"generation {generation} is on trial")
    watch.until(
        "only the new accepts", lambda: all(w["generation"] == generation for w in watch.workers(server, "idle", "retiring"))
    )


def crash(server: Server, times: int) -> None:
    for _ in range(times):
        assert says(server.address, b"!") == b""


def test_new_code_that_crashes_is_taken_back_and_who_asked_is_told(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(GOOD.format("old")), workers=2, canary=60)
    module(CRASHES)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.command, "reload")
        on_trial(server)
        status = server.status()
        assert (status["state"], status["generation"]) == ("reloading", 2)
        assert says(server.address, b"?") == b"new"
        crash(server, 2)  # all of the first acceptors
        answer = asked.result()
    assert not answer["ok"]
    assert "rolled back to generation 1: 2 of its workers crashed within canary = 60 s" in answer["reason"]
    assert "SIGSEGV" in answer["reason"]
    status = watch.settled(server, 2)
    assert (status["state"], status["generation"]) == ("running", 1)
    assert status["reload"]["result"] == "rolled back"
    assert "SIGSEGV" in status["reload"]["reason"]
    assert "reload taken back, generation 1 serves again in the place of 2" in server.log()
    assert says(server.address) == b"old"
    watch.family_of(server.pid, 3, "generation 2 has gone")
    # The next one is a reload like any other.
    module(GOOD.format("mended"))
    os.kill(server.pid, signal.SIGHUP)
    on_trial(server, 3)
    assert says(server.address) == b"mended"


def test_the_service_manager_is_told_in_its_status_line(tmp_path: Path, module: Module) -> None:
    heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(watch.DEADLINE)

        def hears(text: bytes) -> None:
            while text not in heard.recv(4096):
                pass

        folder, told = module(CRASHES), {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = [
            sys.executable,
            "-m",
            "prefork",
            "serve",
            "--module=mine:loop",
            "--workers=1",
            "--canary=60",
            "--bind=127.0.0.1:0",
        ]
        with watch.running([*command, "--canary=60"], folder, tmp_path, environment=told) as server:
            hears(b"READY=1")
            os.kill(server.pid, signal.SIGHUP)
            on_trial(server)
            host, _, port = server.status()["listeners"][0]["address"].rpartition(":")
            assert says((host, int(port)), b"!") == b""
            hears(b"; last reload rolled back: 1 of its workers crashed within canary = 60 s")
            module("1 / 0\n")
            os.kill(server.pid, signal.SIGHUP)
            hears(b"; last reload refused: mine:loop: the import raised")


def test_fewer_crashes_are_no_reason(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(CRASHES), workers=4, canary=1)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.command, "reload")
        on_trial(server)
        crash(server, 2)
        assert not asked.done()
        assert asked.result() == {"ok": True, "generation": 2, "suspended": False}
    assert server.status()["reload"]["result"] == "ok"
    watch.logged(server, "generation 2 has passed its trial, with 2 crashes")
    watch.family_of(server.pid, 5, "generation 1 has gone")


def test_connections_of_the_old_code_go_on_through_trial_and_return(prefork_server: Start, module: Module) -> None:
    code = "def loop(sock):\n    while data := sock.recv(64):\n        sock.sendall(data)\n"
    server = prefork_server("mine:loop", folder=module(code), workers=2, canary=60)
    with connect(server.address) as held, Load(server.address, clients=1, rate=300) as load:
        module("import os\nfirst = True\n" + code.replace("while", "if os.path.exists('bad'):\n        os.abort()\n    while"))
        os.kill(server.pid, signal.SIGHUP)
        on_trial(server)
        before = load.connections
        watch.until("new code serves", lambda: load.connections > before + 20)
        assert load.failures == []
        (Path(module(code)) / "bad").touch()
        watch.logged(server, "taken back")
        after = load.connections
        watch.until("old code serves again", lambda: load.connections > after + 20)
        held.sendall(b"still here")
        assert held.recv(64) == b"still here"
    # Who was with a worker that crashed, and nobody else; between the second crash and the return of the old code others may crash.
    crashed = server.log().count("SIGABRT")
    assert len(load.failures) <= crashed


def test_addresses_come_back_too(prefork_server: Start, module: Module) -> None:
    folder = module(GOOD.format("old"))
    stays, goes, comes = (("127.0.0.1", watch.free_port()) for _ in range(3))
    file = folder / "prefork.toml"

    def bind(*addresses: tuple[str, int]) -> None:
        file.write_text(f"bind = {[f'{host}:{port}' for host, port in addresses]}\ncanary = 60\nworkers = 1\n")

    bind(stays, goes)
    server = prefork_server("mine:loop", folder=folder, bind=[], arguments=("--config", str(file)))
    bind(stays, comes)
    module(CRASHES)
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, "on trial")
    assert says(comes, b"?") == b"new"
    # What a reload on trial drops is still there, and served by the old code.
    assert says(goes) == b"old"
    for _ in range(2):
        assert says(comes, b"!") == b""
    watch.logged(server, f"no longer listening on 127.0.0.1:{comes[1]}")
    assert watch.is_free(comes[1])
    assert [listener["address"] for listener in server.status()["listeners"]] == [f"127.0.0.1:{p}" for _, p in (stays, goes)]
    assert says(goes) == says(stays) == b"old"


def test_after_the_trial_what_was_dropped_is_closed(prefork_server: Start, module: Module) -> None:
    folder = module(GOOD.format("old"))
    stays, goes = watch.free_port(), watch.free_port()
    server, bind = on_ports(prefork_server, folder, stays, goes, canary=0.5)
    bind(stays)
    assert server.command("reload")["ok"]
    watch.logged(server, f"no longer listening on 127.0.0.1:{goes}")
    assert watch.is_free(goes)


def test_while_suspended_nobody_accepts_on_trial_either(prefork_server: Start, module: Module) -> None:
    folder = module(GOOD.format("old"))
    stays, goes = watch.free_port(), watch.free_port()
    server, bind = on_ports(prefork_server, folder, stays, goes, canary=3)
    assert server.command("suspend")["ok"]
    bind(stays)
    with connect(("127.0.0.1", goes)) as waiting:
        os.kill(server.pid, signal.SIGHUP)
        watch.logged(server, "is on trial")
        # Those of the new generation were ready, and leave.
        watch.until("nobody accepts", lambda: not watch.workers(server))
        assert "has passed its trial" not in server.log()
        # Who waits where nobody will accept any more is served before it closes.
        assert waiting.recv(64) == b"old"
        assert "has passed its trial" in server.log()
    watch.logged(server, f"no longer listening on 127.0.0.1:{goes}")


def test_a_suspend_during_the_trial_is_one_where_only_the_old_code_accepts_too(prefork_server: Start, module: Module) -> None:
    folder = module(GOOD.format("old"))
    stays, goes = watch.free_port(), watch.free_port()
    server, bind = on_ports(prefork_server, folder, stays, goes, canary=60)
    bind(stays)
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, "is on trial")
    assert says(("127.0.0.1", goes)) == b"old"
    assert server.command("suspend")["ok"]
    watch.until("nobody accepts", lambda: not watch.workers(server))
    with connect(("127.0.0.1", goes)) as waiting:
        waiting.setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting.recv(64)
        assert not watch.workers(server)
        assert server.command("resume")["ok"]
        waiting.settimeout(watch.DEADLINE)
        assert waiting.recv(64) == b"old"


def test_who_waits_at_an_address_that_a_trial_had_added_is_served_when_it_is_taken_back(
    prefork_server: Start, module: Module
) -> None:
    folder = module(GOOD.format("old"))
    stays, comes = watch.free_port(), watch.free_port()
    server, bind = on_ports(prefork_server, folder, stays, canary=60)
    module(CRASHES)
    bind(stays, comes)
    os.kill(server.pid, signal.SIGHUP)
    on_trial(server)
    with connect(("127.0.0.1", stays)) as one, connect(("127.0.0.1", comes)) as two:
        watch.until("both are served", lambda: len(watch.workers(server, "busy")) == 2)
        assert server.command("suspend")["ok"]
        with connect(("127.0.0.1", comes)) as waits:
            for sock in (one, two):
                sock.sendall(b"!")
                assert sock.recv(64) == b""
            watch.logged(server, "(SIGHUP) taken back")
            waits.sendall(b"?")
            assert waits.recv(64) == b"new"
    watch.logged(server, f"no longer listening on 127.0.0.1:{comes}")


def test_a_path_whose_new_owner_was_on_trial_has_its_old_one_again(prefork_server: Start, module: Module) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket to somebody else")
    folder = module(GOOD.format("old"))
    path, file = folder / "path", folder / "prefork.toml"
    file.write_text(f"bind = ['unix:{path}?user=daemon&mode=0660']\ncanary = 60\n")
    server = prefork_server("mine:loop", folder=folder, bind=[], workers=1, arguments=("--config", str(file)))
    before = path.stat()
    module(CRASHES)
    file.write_text(f"bind = ['unix:{path}?user=nobody&mode=0600']\ncanary = 60\n")
    os.kill(server.pid, signal.SIGHUP)
    on_trial(server)
    assert path.stat().st_uid != before.st_uid
    assert says(str(path), b"!") == b""
    watch.logged(server, "(SIGHUP) taken back")
    now = path.stat()
    assert (now.st_ino, now.st_uid, now.st_gid, now.st_mode) == (before.st_ino, before.st_uid, before.st_gid, before.st_mode)


def test_a_stop_while_suspended_serves_who_waits_where_the_trial_had_dropped_an_address(
    prefork_server: Start, module: Module
) -> None:
    folder = module(GOOD.format("old"))
    stays, goes = watch.free_port(), watch.free_port()
    server, bind = on_ports(prefork_server, folder, stays, goes, canary=60)
    assert server.command("suspend")["ok"]
    bind(stays)
    with connect(("127.0.0.1", goes)) as waiting:
        os.kill(server.pid, signal.SIGHUP)
        watch.logged(server, "is on trial")
        with watch.soon("the stop"):
            assert server.stop() == 0
        assert waiting.recv(64) == b"old"


def test_a_reload_during_the_trial_follows_it(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(GOOD.format("one")), workers=1, canary=0.3)
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, "on trial")
    module(GOOD.format("two"))
    assert server.command("reload")["generation"] == 3
    assert says(server.address) == b"two"
    assert "another one follows it" in server.log()


def test_a_new_fork_server_that_dies_on_trial_is_not_replaced_but_taken_back(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(GOOD.format("old")), workers=2, canary=60)
    module(GOOD.format("new"))
    os.kill(server.pid, signal.SIGHUP)
    on_trial(server)
    os.kill(watch.fork_server(server, 2), signal.SIGKILL)
    watch.logged(server, "its fork server died within canary = 60 s")
    watch.settled(server, 2)
    assert says(server.address) == b"old"
    assert server.status()["generation"] == 1


def test_when_both_fork_servers_die_the_new_code_is_imported_again(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(GOOD.format("old")), workers=2, canary=60)
    module(GOOD.format("new"))
    os.kill(server.pid, signal.SIGHUP)
    on_trial(server)
    pids = [watch.fork_server(server, generation) for generation in (1, 2)]
    os.kill(server.pid, signal.SIGSTOP)  # so that it hears of both at once
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.kill(server.pid, signal.SIGCONT)
    watch.logged(server, "generation 3 serves")
    watch.settled(server, 2)
    assert says(server.address) == b"new"
    assert server.status()["state"] == "running"


def test_without_the_old_fork_server_there_is_no_way_back(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(GOOD.format("old")), workers=2, canary=60)
    module(GOOD.format("new"))
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.command, "reload")
        on_trial(server)
        os.kill(watch.fork_server(server, 1), signal.SIGKILL)
        assert asked.result()["ok"]
    watch.logged(server, "can't be taken back any more")
    assert says(server.address) == b"new"


def test_an_upgrade_whose_new_code_crashes_on_trial_is_told_so(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(GOOD.format("old")), workers=2, canary=60)
    module(CRASHES)
    number = server.command("upgrade")["upgrade"]
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.command, "outcome", upgrade=number)
        on_trial(server)
        assert says(server.address, b"?") == b"new"
        crash(server, 2)
        answer = asked.result()
    assert not answer["ok"]
    assert "runs, but its reload was rolled back: 2 of its workers crashed within canary = 60 s" in answer["reason"]
    watch.settled(server, 2)
    # Its fork server is the old program's, and forks for the new one.
    assert says(server.address) == b"old"


def test_a_stop_ends_the_trial(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2, canary=60)
    with ThreadPoolExecutor() as pool, Load(server.address, clients=1) as load:
        asked = pool.submit(server.command, "reload")
        on_trial(server)
        assert server.stop() == 0
        load.stop()
        assert asked.result() == {"ok": False, "reason": "the daemon is stopping"}
    assert not [kind for kind in load.classes if not kind.startswith("connect")]


def test_the_time_at_the_ceiling_is_counted_once(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(CRASHES), workers=1, max_workers=1, canary=60)
    with connect(server.address):
        watch.until("at the ceiling for a while", lambda: server.status()["saturated_seconds"] > 1.0)
    watch.settled(server, 1)
    before = server.status()["saturated_seconds"]
    os.kill(server.pid, signal.SIGHUP)
    on_trial(server)
    crash(server, 1)
    watch.logged(server, "taken back")
    watch.settled(server, 1)
    assert before <= server.status()["saturated_seconds"] < 2 * before
