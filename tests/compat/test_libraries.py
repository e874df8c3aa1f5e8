"""Each library serves, is reloaded twice under load, and stops; what its clients count is what the daemon counts.

What somebody who uses the library has to know stands in its handler (`tests/compat/handlers`).
"""

import functools
import itertools
import os
import signal
import sys
import xmlrpc.client
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from prefork.testing import Server, StartError, serve
from tests import watch
from tests.compat.conftest import POSTGRES, package
from tests.compat.programs import Programs, output
from tests.load import Load

Start = Callable[..., Server]

HERE = Path(__file__).parent
HANDLERS = HERE / "handlers"

pytestmark = pytest.mark.slow


def lives(server: Server, load: Load | Programs, each: int) -> None:
    """Serve, reload twice in the middle of it, stop; ``each`` connections at least from one to the next."""
    with load:
        for generation in (2, 3, 4):
            goal = load.connections + each
            watch.until(f"{goal} connections", functools.partial(reached, load, goal), 2 * watch.DEADLINE)
            if generation < 4:
                outcome = server.command("reload")
                assert outcome["ok"], outcome
    assert load.failures == []
    assert getattr(load, "refused", 0) == 0
    try:
        totals = server.wait_for_totals(accepted=load.connections, ok=load.connections)
    except TimeoutError as error:
        raise AssertionError(f"{error}:\n{server.log()}") from None
    assert totals["error"] == totals["killed"] == totals["rejected"] == 0
    for worker in watch.workers(server, "idle"):
        with suppress(psutil.NoSuchProcess):  # a surplus acceptor has left meanwhile
            assert psutil.Process(worker["pid"]).num_threads() == 1, "no thread of a connection stays with its worker"
    assert server.stop() == 0
    assert "Traceback" not in server.log(), server.log()


def reached(load: Load | Programs, goal: int) -> bool:
    return load.connections >= goal or bool(load.failures)


def url(server: Server) -> str:
    return "http://{}:{}".format(*server.address)


# -- libraries that replace the standard library's functions


@pytest.mark.parametrize("name", ["gevent", "eventlet"])
def test_green_threads(prefork_server: Start, name: str) -> None:
    package(name)
    server = prefork_server(f"{name}_handler:loop", folder=HANDLERS, workers=3, max_connections=50, spare_timeout=1)
    victim = watch.workers(server, "idle")[0]["pid"]
    os.kill(victim, signal.SIGKILL)
    watch.until("its death is told", lambda: [death for death in server.status()["deaths"] if death["pid"] == victim])
    watch.settled(server, 3)
    lives(server, Load(server.address, 4), 200)
    assert "event loops" not in server.log(), "each worker has its own"


# -- functions


def test_paramiko_with_openssh(prefork_server: Start, tmp_path: Path) -> None:
    package("paramiko")
    ssh, keygen = (watch.program(name, "openssh-client") for name in ("ssh", "ssh-keygen"))
    for name in ("host", "client"):
        output(keygen, "-q", "-t", "ed25519", "-N", "", "-f", f"{tmp_path}/{name}")
    (tmp_path / "known_hosts").write_text("prefork " + (tmp_path / "host.pub").read_text())
    environment = {"SSH_HOST_KEY": f"{tmp_path}/host", "SSH_AUTHORIZED_KEYS": f"{tmp_path}/client.pub"}
    server = prefork_server("paramiko_handler:loop", folder=HANDLERS, workers=3, environment=environment)
    host, port = server.address
    options = ["BatchMode=yes", "IdentitiesOnly=yes", f"IdentityFile={tmp_path}/client", "HostKeyAlias=prefork"]
    options += ["GlobalKnownHostsFile=none", f"UserKnownHostsFile={tmp_path}/known_hosts", "StrictHostKeyChecking=yes"]
    command = [ssh, "-F", "none", "-p", str(port), *(f"-o{option}" for option in options), host]
    numbers = itertools.count()

    def say() -> int:
        number = next(numbers)
        if output(*command, f"hello {number}") != f"HELLO {number}":
            raise ValueError("another client's answer")
        return 1

    lives(server, Programs(say, 3), 6)


def test_rpyc(prefork_server: Start) -> None:
    package("rpyc")
    server = prefork_server("rpyc_handler:loop", folder=HANDLERS, workers=3)
    lives(server, Programs(script("rpyc_client.py", server, 40)), 80)


def script(name: str, server: Server, connections: int) -> Callable[[], int]:
    """A client that is a Python program of ours around the library's own client, in a process of its own."""

    def use() -> int:
        output(sys.executable, str(HERE / "clients" / name), server.address[0], str(server.address[1]), str(connections))
        return connections

    return use


def test_psycopg_with_postgresql(prefork_server: Start, postgresql: str) -> None:
    psql = watch.program("psql", "postgresql", POSTGRES)

    def ask(query: str) -> str:
        return output(psql, postgresql, "--no-psqlrc", "--tuples-only", "--no-align", "--command", query).strip()

    hooks = {"on_boot": "create", "on_worker_start": "connect", "on_worker_exit": "disconnect"}
    server = prefork_server(
        "psycopg_handler:loop",
        folder=HANDLERS,
        workers=3,
        max_workers=16,
        environment={"DSN": postgresql},
        **{hook: f"psycopg_handler:{name}" for hook, name in hooks.items()},
    )
    load = Load(server.address, 4)
    lives(server, load, 200)
    assert ask("SELECT count(*) FROM visits") == str(load.connections)
    assert int(ask("SELECT count(DISTINCT backend) FROM visits")) >= 3 * 3, "each worker has its own, in three generations"
    others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    watch.until("no connection is left", lambda: ask(others) == "0")


def test_a_connection_of_psycopg_that_the_import_makes_is_refused(module: Callable[[str], Path], postgresql: str) -> None:
    folder = module("import os, psycopg\ndatabase = psycopg.connect(os.environ['DSN'])\ndef loop(sock): pass\n")
    with (
        pytest.raises(StartError, match=r"\(descriptor \d+ to unix:.*connect in on_worker_start") as refused,
        serve("mine:loop", folder=folder, environment={"DSN": postgresql}),
    ):
        raise AssertionError("it serves")
    assert refused.value.exit_status == 78


# -- servers


@pytest.mark.parametrize("name", ["wsgiref", "werkzeug"])
def test_wsgi_with_curl(prefork_server: Start, name: str) -> None:
    package(name)
    curl = watch.program("curl", "curl")
    server = prefork_server(f"{name}_handler:server", folder=HANDLERS, workers=3)

    def get() -> int:
        paths = "".join(f"/page/{number}" for number in range(1, 51))
        if output(curl, "--silent", "--show-error", "--fail", "--noproxy", "*", f"{url(server)}/page/[1-50]") != paths:
            raise ValueError("not the pages' text")
        return 50

    lives(server, Programs(get), 100)


def test_xmlrpc(prefork_server: Start) -> None:
    server = prefork_server("xmlrpc_handler:server", folder=HANDLERS, workers=3)

    def call() -> int:
        with xmlrpc.client.ServerProxy(url(server)) as proxy:
            if proxy.upper("hello") != "HELLO":
                raise ValueError("not the answer")
        return 1

    lives(server, Programs(call, 4), 100)


def test_dnslib_with_dig(prefork_server: Start) -> None:
    package("dnslib")
    dig = watch.program("dig", "bind9-dnsutils")
    server = prefork_server("dnslib_handler:server", folder=HANDLERS, workers=3)
    host, port = server.address
    names = [f"host{number}.example" for number in range(20)]

    def look_up() -> int:
        # A query that is lost is an error: none is repeated.
        options = ["+tcp", "+tries=1", "+retry=0", "+time=10", "+noall", "+answer"]
        found = output(dig, "-r", f"@{host}", "-p", str(port), *options, *names)
        if [line.split() for line in found.splitlines()] != [[f"{name}.", "60", "IN", "A", "192.0.2.1"] for name in names]:
            raise ValueError(found)
        return len(names)

    lives(server, Programs(look_up), 100)


def test_fakeredis_with_redis_benchmark(prefork_server: Start) -> None:
    package("fakeredis")
    benchmark = watch.program("redis-benchmark", "redis-tools")
    server = prefork_server("fakeredis_handler:server", folder=HANDLERS, workers=3)
    host, port = server.address
    clients, requests = 4, 100

    def set_some() -> int:
        for kept in ("0", "1"):
            counts = ["-c", str(clients), "-n", str(requests), "-k", kept]
            shown = output(benchmark, "-h", host, "-p", str(port), "-t", "set", "--csv", *counts)
            if '"SET","' not in shown:
                raise ValueError(shown)
        # The first is that which asks for CONFIG. Without -k it opens one more for each request but the last.
        return (1 + clients + requests - 1) + (1 + clients)

    lives(server, Programs(set_some), 200)


def test_umodbus(prefork_server: Start) -> None:
    package("umodbus")
    server = prefork_server("umodbus_handler:server", folder=HANDLERS, workers=3)
    lives(server, Programs(script("umodbus_client.py", server, 40)), 80)
