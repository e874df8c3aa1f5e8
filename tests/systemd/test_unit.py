"""The units under a real systemd: what they promise, the protocol, sockets, restarts, and how far they are shut in."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prefork.testing import connect
from prefork.unit import files
from tests import watch
from tests.load import Load
from tests.systemd import campaign
from tests.systemd.machine import UNITS, VENV, Machine, Service

Handler = Callable[[str], None]

pytestmark = pytest.mark.slow  # each boots a service manager

EXPOSURE = 1.5
# With a master that is root.
EXPOSURE_OF_TWO = 2.5
WHO = "www-data"
CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE = 0, 5, 6, 7, 10  # capability(7)
# Of a unit that binds a low port: it may give the capability up again, by a system call that systemd counts among the privileged.
EXPOSURE_OF_BINDING = 1.6
LOGROTATE = Path(__file__).parents[2] / "conf" / "logrotate"
ECHO = "def loop(sock):\n    while data := sock.recv(64):\n        sock.sendall(data)\n"
# As many megabytes as the client says.
HUNGRY = """
def loop(sock):
    word = sock.recv(64)
    if word.isdigit():
        eaten = bytearray(b"x") * (int(word) << 20)
    sock.sendall(word)
"""


def test_the_files_are_what_the_program_makes() -> None:
    assert {path.name: path.read_text() for path in UNITS.iterdir()} == files()


def test_systemd_finds_nothing_to_complain_of(machine: Machine) -> None:
    for name in files():
        done = machine.run(f"systemd-analyze verify /etc/systemd/system/{name}")
        assert done.stdout + done.stderr == "", name


def test_a_start_is_over_when_it_serves_and_the_status_line_tells(service: Service) -> None:
    service.systemctl("start")
    assert service.says() == b"hello"
    told = service.machine.said(f"systemctl status {service.unit}")
    assert re.search('Status: "(.*)"', told)[1] == "2 acceptors, 0 busy, 0.0 connections/s"  # type: ignore[index]
    assert "Active: active (running)" in told
    assert service.show("Type", "NotifyAccess", "WatchdogUSec") == ["notify", "main", "30s"]
    assert service.status()["name"] == service.name
    # As root sees it without saying which: by the name of the instance.
    assert f"{service.name}  running  echo:loop" in service.prefork("status").stdout


def test_a_reload_waits_and_the_main_pid_stays(service: Service, handler: Handler) -> None:
    handler(ECHO)
    service.configure(module="mine:loop", bind=[f"127.0.0.1:{service.port}"])
    service.systemctl("start")
    master = service.show("MainPID")
    handler("import os, time\nwhile not os.path.exists('/run/prefork-tests-go'):\n    time.sleep(0.01)\n" + ECHO)
    done = threading.Thread(target=service.systemctl, args=("reload",))
    done.start()
    service.becomes("reloading")
    assert service.says() == b"hello"
    assert done.is_alive()
    service.machine.write("/run/prefork-tests-go", "")
    done.join(watch.DEADLINE)
    assert service.show("ActiveState", "MainPID", "NRestarts") == ["active", *master, "0"]
    assert service.status()["generation"] == 2


def test_a_refused_reload_fails_and_can_be_seen(service: Service, handler: Handler) -> None:
    handler(ECHO)
    service.configure(module="mine:loop", bind=[f"127.0.0.1:{service.port}"])
    service.systemctl("start")
    handler("1 / 0\n")
    assert service.systemctl("reload", check=False).returncode == 1
    told = service.machine.said(f"systemctl status {service.unit}")
    assert "last reload refused: mine:loop: the import raised ZeroDivisionError: division by zero" in told
    assert "Active: active (running)" in told
    assert service.says() == b"hello"
    handler(ECHO)
    service.systemctl("reload")
    watch.until("it is not told any more", lambda: "refused" not in service.status_text)
    # By a signal, too, systemd hears of both ends.
    handler("1 / 0\n")
    service.machine.run(f"systemctl kill --kill-whom=main --signal=HUP {service.unit}")
    watch.until("it is told", lambda: "last reload refused" in service.status_text)
    service.becomes("active")


def test_an_upgrade_keeps_the_main_pid_inside_all_walls(service: Service) -> None:
    service.systemctl("start")
    master = service.show("MainPID")
    with service.connect() as held, Load(("127.0.0.1", service.port), clients=2) as load:
        held.sendall(b"before")
        assert held.recv(64) == b"before"
        for generation in (2, 3):
            done = service.prefork("upgrade")
            assert f"generation {generation} serves" in done.stdout
        held.sendall(b"after")
        assert held.recv(64) == b"after"
    assert (load.failures, load.refused) == ([], 0)
    assert service.show("ActiveState", "MainPID", "NRestarts") == ["active", *master, "0"]
    service.systemctl("reload")
    assert service.status()["generation"] == 4


def test_a_refused_upgrade_can_be_seen(service: Service) -> None:
    service.systemctl("start")
    package = next(service.machine.root.glob("opt/prefork/venv/lib/python*/site-packages")) / "click"
    package.rename(package.with_name("away"))
    try:
        os.kill(service.master, signal.SIGUSR2)
        watch.until("it is told", lambda: "last upgrade refused" in service.status_text)
    finally:
        package.with_name("away").rename(package)
    assert service.says() == b"hello"
    service.becomes("active")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("sys.exit(0)", "70"),
        pytest.param("signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.raise_signal(signal.SIGALRM)", "14"),
    ],
    ids=["they end with 0", "they hang"],
)
def test_an_upgrade_that_neither_program_survives_is_restarted(service: Service, text: str, status: str) -> None:
    service.systemctl("start")
    before = service.show("MainPID")
    entry = next(service.machine.root.glob("opt/prefork/venv/lib/python*/site-packages")) / "prefork/entry.py"
    good = entry.read_text()
    entry.write_text(f"import os, signal, sys\nif 'PREFORK_STATE' in os.environ:\n    {text}\n{good}")
    try:
        assert service.prefork("upgrade", check=False).returncode == 1
        watch.until("it was restarted", lambda: service.show("NRestarts", "ActiveState") == ["1", "active"])
    finally:
        entry.write_text(good)
    assert service.show("MainPID") != before
    assert service.says() == b"hello"
    told = service.machine.said(f"journalctl --no-pager -u {service.unit}")
    assert re.search(f"Main process exited, code=(exited|killed|dumped), status={status}/", told), told


def test_a_master_that_stands_still_is_killed_by_the_watchdog_and_restarted(service: Service) -> None:
    service.drop_in("service", "[Service]\nWatchdogSec=1\n")
    service.systemctl("start")
    before = service.master
    os.kill(before, signal.SIGSTOP)
    watch.until("it was restarted", lambda: service.show("NRestarts", "ActiveState") == ["1", "active"])
    assert service.master != before
    assert service.says() == b"hello"
    assert "Watchdog timeout" in service.machine.said(f"journalctl --no-pager -u {service.unit}")


def test_one_that_runs_is_not(service: Service) -> None:
    service.drop_in("service", "[Service]\nWatchdogSec=1\n")
    service.systemctl("start")
    service.systemctl("reload")
    service.prefork("upgrade")
    fed = {""}

    def is_fed() -> bool:
        fed.update(service.show("WatchdogTimestampMonotonic"))
        return len(fed) > 5

    watch.until("it is fed", is_fed)
    assert service.show("NRestarts", "ActiveState") == ["0", "active"]


# -- sockets


def test_the_first_client_starts_the_service(service: Service) -> None:
    service.configure()
    service.with_socket()
    assert service.show("ActiveState") == ["inactive"]
    assert service.says() == b"hello"
    service.becomes("active")
    assert [each["address"] for each in service.status()["listeners"]] == [f"127.0.0.1:{service.port}"]


def test_tcp_and_unix_sockets_and_several_units_by_name(service: Service) -> None:
    service.configure(bind=["systemd:more", f"systemd:{service.name}"])
    more = f"prefork-{service.name}-more.socket"
    path, port = f"/run/{service.name}.sock", watch.free_port()
    text = f"[Socket]\nListenStream=[::1]:{port}\nFileDescriptorName=more\nService={service.unit}\n"
    service.machine.write(f"/etc/systemd/system/{more}", text)
    service.drop_in("service", f"[Service]\nSockets=prefork@{service.name}.socket {more}\n")
    service.with_socket(f"ListenStream={path}\nSocketMode=0600\n")
    service.machine.run(f"systemctl start {more}")
    try:
        for where in (("127.0.0.1", service.port), ("::1", port), f"{service.machine.root}{path}"):
            with connect(where) as sock:
                sock.sendall(b"hello")
                assert sock.recv(64) == b"hello"
        assert len(service.status()["listeners"]) == 3
        service.systemctl("reload")
        service.prefork("upgrade")
        assert len(service.status()["listeners"]) == 3
        assert service.says() == b"hello"
    finally:
        service.machine.run(f"systemctl stop {more}")
        (service.machine.root / "etc/systemd/system" / more).unlink()


def test_a_bind_that_gives_the_sockets_address_is_that_socket(service: Service) -> None:
    service.configure(bind=[f"127.0.0.1:{service.port}"])
    service.with_socket()
    assert service.says() == b"hello"
    service.becomes("active")
    for restart in ("reload", "restart", "reload"):
        service.systemctl(restart)
        assert service.says() == b"hello"
    assert [each["address"] for each in service.status()["listeners"]] == [f"127.0.0.1:{service.port}"]
    other = watch.free_port()
    service.configure(bind=[f"127.0.0.1:{other}"])
    assert service.systemctl("reload", check=False).returncode == 1
    told = f"bind = 127.0.0.1:{other} leaves out 127.0.0.1:{service.port}, which was passed by the .socket unit of {service.unit}"
    assert told in service.status_text
    assert service.says() == b"hello"


def test_a_bind_that_the_socket_is_in_the_way_of_is_told_with_the_unit(service: Service) -> None:
    service.configure(bind=[f":{service.port}"])
    service.with_socket()
    assert service.systemctl("start", check=False).returncode == 1
    service.becomes("failed")
    held = f"127.0.0.1:{service.port} was passed by the .socket unit of {service.unit}, which holds it"
    assert f"bind = :{service.port} can't be bound: {held}: give that address" in service.status_text
    assert service.show("ExecMainStatus") == ["78"]


@pytest.mark.parametrize("how", ["printed", "shipped"])
def test_what_init_writes_works_with_the_units(machine: Machine, how: str) -> None:
    port = watch.free_port()
    init = f"mkdir -p /srv/first && cd /srv/first && rm -f * && {VENV}/bin/prefork init >/dev/null"
    machine.run(f"{init} && sed -i s/7000/{port}/ prefork.toml")
    unit = Service(machine, "mine", port)
    files: list[str] = []
    try:
        if how == "printed":
            command = f"cd /srv/first && {VENV}/bin/prefork unit --config prefork.toml"
            files = machine.said(command + " | awk '/^# .etc/{file = $2; print file} {print > file}'").splitlines()
            machine.run("systemctl daemon-reload && systemctl start prefork@mine.socket")
        else:
            machine.run("mkdir -p /etc/prefork && cp /srv/first/prefork.toml /etc/prefork/mine.toml")
            unit.drop_in("service", "[Service]\nWorkingDirectory=/srv/first\n")
            unit.with_socket()
        assert unit.says() == b"hello"
        unit.systemctl("reload")
        assert [each["address"] for each in unit.status()["listeners"]] == [f"127.0.0.1:{port}"]
        assert unit.says() == b"hello"
    finally:
        unit.remove()
        machine.run(f"rm -f {' '.join(files)} /etc/prefork/mine.toml; systemctl daemon-reload", check=False)


# -- names


def test_a_control_socket_that_was_swept_away_comes_back(service: Service) -> None:
    service.systemctl("start")
    folder = f"/run/prefork/{service.name}"
    service.machine.run(f"rm {folder}/{service.name}.sock")
    assert service.systemctl("reload", check=False).returncode == 1, "no command finds it"
    service.machine.run(f"systemctl kill -s HUP --kill-who=main {service.unit}")
    watch.until("it is found again", lambda: service.prefork("status", check=False).returncode == 0)
    service.systemctl("reload")
    assert service.says() == b"hello"


def test_systemds_own_cleaner_leaves_socket_and_lock_alone(service: Service) -> None:
    folder = f"/run/prefork/{service.name}"
    service.configure(bind=[f"127.0.0.1:{service.port}", f"unix:{folder}/clients"])
    service.systemctl("start")
    service.machine.write("/etc/tmpfiles.d/tests.conf", f"e {folder} - - - 0\n")
    try:
        service.machine.run(f"touch {folder}/other && systemd-tmpfiles --clean /etc/tmpfiles.d/tests.conf")
        left = service.machine.said(f"ls {folder}").split()
        assert left == ["clients", f"{service.name}.sock", f"{service.name}.sock.lock"]
    finally:
        (service.machine.root / "etc/tmpfiles.d/tests.conf").unlink()


def test_reloads_upgrades_and_restarts_under_load_lose_nobody(service: Service) -> None:
    service.configure(workers=4)
    service.with_socket()
    figures = campaign.run(service, reloads=3, upgrades=2, restarts=3)
    assert (figures.failures, figures.refused) == ({}, 0), figures
    assert figures.connections > 100


# -- stops and ends


def test_a_stop_lets_connections_finish_and_cuts_them_when_their_time_is_over(service: Service) -> None:
    service.configure(bind=[f"127.0.0.1:{service.port}"], graceful_timeout=1)
    service.systemctl("start")
    with service.connect() as held:
        held.sendall(b"x")
        assert held.recv(1) == b"x"
        begun = time.monotonic()
        service.systemctl("stop")
        assert time.monotonic() - begun >= 1
        assert held.recv(1) == b""
    assert service.show("Result", "ActiveState") == ["success", "inactive"]


def test_connections_may_take_longer_than_the_unit_knows(service: Service) -> None:
    service.drop_in("service", "[Service]\nTimeoutStopSec=1\n")
    service.systemctl("start")
    with service.connect() as held:
        held.sendall(b"x")
        assert held.recv(1) == b"x"
        stop = threading.Thread(target=service.systemctl, args=("stop",))
        stop.start()
        service.becomes("deactivating")
        # Not an event: TimeoutStopSec has to pass.
        assert not watch.readable(held, 2.0)
        held.sendall(b"y")
        assert held.recv(1) == b"y"
    stop.join(watch.DEADLINE)
    assert service.show("Result", "ActiveState") == ["success", "inactive"]


def test_a_start_may_take_longer_than_the_unit_knows(service: Service, handler: Handler) -> None:
    handler("import time\ntime.sleep(6)\n" + ECHO)
    service.drop_in("service", "[Service]\nTimeoutStartSec=4\n")
    service.configure(module="mine:loop", bind=[f"127.0.0.1:{service.port}"])
    service.systemctl("start")
    assert service.show("NRestarts") == ["0"]


def test_a_crash_is_restarted(service: Service) -> None:
    service.systemctl("start")
    os.kill(service.master, signal.SIGKILL)
    watch.until("it was restarted", lambda: service.show("NRestarts", "ActiveState") == ["1", "active"])
    assert service.says() == b"hello"


def test_what_a_restart_does_not_mend_is_not(service: Service) -> None:
    service.configure(wokers=3)
    assert service.systemctl("start", check=False).returncode == 1
    service.becomes("failed")
    assert service.show("ExecMainStatus", "NRestarts", "Result") == ["78", "0", "exit-code"]
    assert "the start failed: unknown option 'wokers'" in service.status_text


def test_an_address_that_is_taken_is_tried_again(service: Service) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the test has reserved it
        taken.bind(("127.0.0.1", service.port))
        taken.listen()
        assert service.systemctl("start", check=False).returncode == 1
        watch.until("it is tried again", lambda: int(service.show("NRestarts")[0]) >= 1)
    service.becomes("active")
    assert service.says() == b"hello"


def test_a_socket_whose_service_can_not_start_gives_up(service: Service) -> None:
    service.configure(wokers=3)
    # The unit's figures are for a machine that starts a Python faster than once a second.
    service.drop_in("service", "[Unit]\nStartLimitIntervalSec=600\nStartLimitBurst=3\n")
    service.with_socket()
    with service.connect():
        watch.until(
            "it has given up",
            lambda: service.machine.show(f"prefork@{service.name}.socket", "ActiveState")["ActiveState"] == "failed",
        )
    assert service.show("ExecMainStatus") == ["78"]


def test_a_worker_that_is_killed_for_memory_is_replaced_and_the_service_stays(service: Service, handler: Handler) -> None:
    handler(HUNGRY)
    service.configure(module="mine:loop", bind=[f"127.0.0.1:{service.port}"])
    service.drop_in("service", "[Service]\nMemoryMax=100M\n")
    service.systemctl("start")
    assert service.says(b"1") == b"1"
    before = service.show("MainPID")
    workers = {worker["pid"] for worker in service.status()["workers"]}
    with service.connect() as sock:
        sock.sendall(b"400")
        assert sock.recv(64) == b""
    watch.until("it is counted", lambda: service.status()["totals"]["killed"] == 1)
    # The kernel may take another process before the first has given its memory back: each that it took is in `deaths`.
    kills = oom_kills(service)
    watch.until("all are known", lambda: len(service.status()["deaths"]) >= kills)
    deaths = service.status()["deaths"]
    assert {death["cause"] for death in deaths} == {"signal 9 (SIGKILL)"}
    [served] = [death for death in deaths if death["peer"]]
    assert served["pid"] in workers
    # The kernel names the control group whose limit it was.
    group = f"prefork@{service.name}.service"
    killed = [
        line for line in service.machine.said("journalctl --no-pager -k").splitlines() if "oom_memcg=" in line and group in line
    ]
    assert killed
    assert all(re.search(r"constraint=CONSTRAINT_MEMCG.*,oom_memcg=\S*" + re.escape(group), line) for line in killed)
    assert service.says(b"2") == b"2"
    assert service.show("ActiveState", "MainPID", "NRestarts") == ["active", *before, "0"]


def oom_kills(service: Service) -> int:
    """How many processes the limit of the service's control group has killed."""
    group = service.show("ControlGroup")[0]
    for file in (f"memory{group}/memory.oom_control", f"unified{group}/memory.events", f"{group}/memory.events"):
        path = service.machine.root / "sys/fs/cgroup" / file.lstrip("/")
        if path.exists():
            return int(dict(line.split() for line in path.read_text().splitlines())["oom_kill"])
    raise AssertionError(f"no memory controller for {group}")


# -- walls


def test_the_exposure_is_small_and_the_service_works(service: Service) -> None:
    service.systemctl("start")
    assert service.says() == b"hello"
    verdict = service.machine.said(f"systemd-analyze security {service.unit}").splitlines()[-1]
    found = re.search(r"([\d.]+) ", verdict.partition(": ")[2])
    assert found is not None
    assert float(found[1]) <= EXPOSURE, verdict


def test_every_process_is_a_user_of_its_own_without_any_privilege(service: Service) -> None:
    service.systemctl("start")
    folder = service.machine.root / "run/prefork" / service.name
    uid = folder.stat().st_uid
    assert 61184 <= uid <= 65519  # systemd.exec(5), DynamicUser
    family = [service.master, *(process.pid for process in watch.family(service.master))]
    assert len(family) == 4
    for pid in family:
        told = dict(line.partition(":")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert told["Uid"].split() == [str(uid)] * 4
        assert {int(told[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert (told["NoNewPrivs"].strip(), told["Seccomp"].strip()) == ("1", "2")
    # Memory that is short is taken of workers first.
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in family]
    assert scores == [0, 0, 200, 200]


def test_instances_do_not_take_one_anothers_folders(service: Service, machine: Machine) -> None:
    other = Service(machine, f"{service.name}-other", watch.free_port())
    other.configure(bind=[f"127.0.0.1:{other.port}"])
    try:
        service.systemctl("start")
        other.systemctl("start")
        other.systemctl("stop")
        folders = machine.root / "run/prefork"
        assert not (folders / other.name).exists()
        assert (folders / service.name / f"{service.name}.sock").is_socket()
        assert service.prefork("reload").returncode == 0
    finally:
        other.remove()


def test_the_options_of_processes_work_inside_the_walls(service: Service, handler: Handler) -> None:
    handler(
        "import os, resource, time\n"
        "def loop(sock):\n"
        "    if sock.recv(64) == b'hang':\n        time.sleep(600)\n"
        "    sock.sendall(b'%d %d' % (os.nice(0), resource.getrlimit(resource.RLIMIT_NOFILE)[0]))\n"
    )
    bind = [f"127.0.0.1:{service.port}", f"unix:/run/prefork/{service.name}/clients?mode=0666"]
    service.configure(module="mine:loop", bind=bind, nice=5, rlimit="nofile=512", umask="007", timeout=1, max_connections=3)
    service.systemctl("start")
    for _ in range(8):
        assert service.says() == b"5 512"
    with connect(f"{service.machine.root}/run/prefork/{service.name}/clients") as sock:
        sock.sendall(b"x")
        assert sock.recv(64) == b"5 512"
    assert service.says(b"hang") == b""
    assert "time.sleep" in service.status()["deaths"][0]["stack"] or "loop" in service.status()["deaths"][0]["stack"]
    service.systemctl("stop")
    assert service.show("Result") == ["success"]


def test_the_service_without_an_instance(machine: Machine) -> None:
    port = watch.free_port()
    machine.write("/etc/prefork/prefork.toml", f'module = "echo:loop"\nbind = ["127.0.0.1:{port}"]\nworkers = 1\n')
    machine.run("systemctl start prefork")
    try:
        with connect(("127.0.0.1", port)) as sock:
            sock.sendall(b"hello")
            assert sock.recv(64) == b"hello"
        assert "prefork  running" in machine.said(f"{VENV}/bin/prefork status prefork")
        machine.run("systemctl reload prefork")
    finally:
        machine.run("systemctl stop prefork")


# -- prefork unit


SHOUTS = """
def loop(sock):
    with open("/proc/self/status") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    sock.sendall(sock.recv(64).upper() + effective.encode())
"""


@pytest.mark.parametrize("flags", ["", "--no-socket"])
def test_what_the_command_prints_can_be_started(machine: Machine, flags: str) -> None:
    port = watch.free_port(range(900, 1000))
    machine.write("/srv/mine/shout.py", SHOUTS)
    machine.write("/srv/mine/conf.toml", f'module = "shout:loop"\nbind = ["127.0.0.1:{port}"]\nworkers = 1\ngraceful_timeout = 7\n')
    command = f"cd /srv/mine && {VENV}/bin/prefork unit --config conf.toml {flags}"
    files = machine.said(command + " | awk '/^# .etc/{file = $2; print file} {print > file}'").splitlines()
    assert files == [f"/etc/systemd/system/prefork@shout.{kind}" for kind in (["service"] if flags else ["service", "socket"])]
    try:
        assert machine.run(f"systemd-analyze verify {' '.join(files)}").stderr == ""
        machine.run("systemctl daemon-reload && systemctl start prefork@shout")
        with connect(("127.0.0.1", port)) as sock:
            sock.sendall(b"hello")
            assert sock.recv(64) == b"HELLO" + b"0" * 16, "a handler has no capability"
        machine.run("systemctl reload prefork@shout && systemctl restart prefork@shout")
        shown = machine.show("prefork@shout", "TimeoutStopUSec", "AmbientCapabilities", "CapabilityBoundingSet", "NRestarts")
        assert shown["TimeoutStopUSec"] == "17s"
        # Only who binds it needs the right to.
        assert shown["AmbientCapabilities"] == shown["CapabilityBoundingSet"] == ("cap_net_bind_service" if flags else "")
        verdict = machine.said("systemd-analyze security prefork@shout").splitlines()[-1]
        assert float(re.findall(r"[\d.]+", verdict.partition(": ")[2])[0]) <= (EXPOSURE_OF_BINDING if flags else EXPOSURE), verdict
    finally:
        machine.run(
            f"systemctl stop prefork@shout.service prefork@shout.socket; rm -f {' '.join(files)}; systemctl daemon-reload",
            check=False,
        )


def test_a_service_that_was_made_in_a_link_follows_it(machine: Machine) -> None:
    port = watch.free_port()
    for number in (1, 2):
        machine.write(f"/srv/releases/{number}/release.py", f"def loop(sock):\n    sock.sendall(b'{number}')\n")
        text = f'module = "release:loop"\nbind = ["127.0.0.1:{port}"]\nworkers = {number}\n'
        machine.write(f"/srv/releases/{number}/conf.toml", text)
    machine.run("ln -sfn releases/1 /srv/current")
    command = f"cd /srv/current && {VENV}/bin/prefork unit --config conf.toml --no-socket"
    [file] = machine.said(command + " | awk '/^# .etc/{file = $2; print file} {print > file}'").splitlines()
    unit = Service(machine, "release", port)
    try:
        assert machine.run(f"systemd-analyze verify {file}").stderr == ""
        machine.run("systemctl daemon-reload && systemctl start prefork@release")
        assert (unit.says(), unit.status()["listeners"][0]["workers"]["target"]) == (b"1", 1)
        machine.run("ln -sfn releases/2 /srv/current && rm -rf /srv/releases/1 && systemctl reload prefork@release")
        assert (unit.says(), unit.status()["listeners"][0]["workers"]["target"]) == (b"2", 2)
        machine.run("systemctl restart prefork@release")
        assert unit.says() == b"2"
    finally:
        machine.run(f"systemctl stop prefork@release; rm -f {file}; systemctl daemon-reload", check=False)


# What a client asks for is tried, and told: a signal to that process, or a file.
TRIES = """
import os
def loop(sock):
    while word := sock.recv(64):
        try:
            if word.isdigit():
                os.kill(int(word), 9)
            else:
                os.close(os.open(word, os.O_WRONLY | os.O_CREAT))
            sock.sendall(b"done")
        except OSError as error:
            sock.sendall(type(error).__name__.encode())
"""


@pytest.mark.parametrize("flags", ["", "--no-socket"])
def test_with_a_user_the_master_is_root_out_of_the_handlers_reach(machine: Machine, flags: str) -> None:
    port = watch.free_port(range(900, 1000))
    machine.write("/srv/tries/tries.py", TRIES)
    state, log = "/var/lib/prefork/tries", "/var/log/prefork/tries/log"
    machine.run(f"install -d -o {WHO} {state}")
    options = f"--module tries:loop --user {WHO} --bind 127.0.0.1:{port} --workers 1 --spare-timeout 0.2"
    options += f" --pid-file /run/prefork/tries/pid --log-file {log}"
    command = f"cd /srv/tries && {VENV}/bin/prefork unit {flags} {options}"
    files = machine.said(command + " | awk '/^# .etc/{file = $2; print file} {print > file}'").splitlines()
    unit = Service(machine, "tries", port)
    try:
        assert machine.run(f"systemd-analyze verify {' '.join(files)}").stderr == ""
        machine.run("systemctl daemon-reload && systemctl start prefork@tries")
        verdict = machine.said("systemd-analyze security prefork@tries").splitlines()[-1]
        assert float(re.findall(r"[\d.]+", verdict.partition(": ")[2])[0]) <= EXPOSURE_OF_TWO, verdict

        def has(pid: int) -> tuple[frozenset[str], int, int]:
            told = dict(line.partition(":")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            return frozenset(told["Uid"].split()), int(told["CapEff"], 16), int(told["CapPrm"], 16)

        may = 1 << CAP_CHOWN | 1 << CAP_KILL | 1 << CAP_SETGID | 1 << CAP_SETUID | (1 << CAP_NET_BIND_SERVICE if flags else 0)
        master = unit.master
        assert has(master) == (frozenset({"0"}), may, may)
        user = str((machine.root / state.lstrip("/")).stat().st_uid)
        writes = watch.named(master, "prefork: log ")
        assert {has(process.pid) for process in watch.family(master) if process.pid not in writes} == {(frozenset({user}), 0, 0)}
        assert {has(pid) for pid in writes} == {has(master)}, "who runs no code of the user's"

        scores = [int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in watch.family(master)]
        assert sorted(scores) == [0, 0, 200], "who writes the log, fork server and worker"

        def tries(word: str) -> bytes:
            return unit.says(word.encode())

        assert tries(unit.show("MainPID")[0]) == b"PermissionError"
        assert tries("/run/prefork/tries/x") == b"PermissionError"
        assert tries(f"{state}/x") == b"done"
        # Log files are the user's, a new one as well.
        machine.run(f"mv {log} {log}.1 && systemctl kill --kill-whom=main --signal=USR1 prefork@tries")
        made = machine.root / log.lstrip("/")
        watch.until("there is a new one", made.exists)
        watch.until("it is the user's", lambda: str(made.stat().st_uid) == user)
        machine.run("systemctl reload prefork@tries")
        for generation in (3, 4):
            assert f"generation {generation} serves" in unit.prefork("upgrade").stdout
        with unit.connect() as held:
            held.sendall(b"/dev/null")
            assert held.recv(64) == b"done"
            busy = next(worker["pid"] for worker in unit.status()["workers"] if worker["state"] == "busy")
            # Its workers are the master's, who may signal them.
            os.kill(psutil.Process(machine.outside(busy)).ppid(), signal.SIGKILL)
            machine.run("systemctl reload prefork@tries")
            assert unit.show("MainPID", "NRestarts") == [str(unit.status()["pid"]), "0"]
            unit.prefork("stop --quick")
            assert held.recv(64) == b""
        watch.until("all have gone", lambda: watch.is_gone(master))
        assert not (machine.root / "run/prefork/tries/pid").exists()
        machine.run("systemctl restart prefork@tries")
        assert tries("/dev/null") == b"done"
    finally:
        machine.run(
            f"systemctl stop prefork@tries.service prefork@tries.socket; rm -rf {' '.join(files)} {state}; systemctl daemon-reload",
            check=False,
        )


# -- the log


def entries(service: Service) -> list[dict[str, str]]:
    """What the journal has of the service's own."""
    said = service.machine.said(f"journalctl --no-pager -o json -u {service.unit} SYSLOG_IDENTIFIER=prefork")
    return [json.loads(line) for line in said.splitlines()]


def test_the_journal_gets_priorities_and_fields(service: Service, handler: Handler) -> None:
    handler(
        "import sys\ndef loop(sock):\n    sock.recv(9)\n    print('low on spoons', file=sys.stderr)\n    raise KeyError('spoon')\n"
    )
    service.configure(module="mine:loop", bind=[f"127.0.0.1:{service.port}"], access_log="-")
    service.systemctl("start")
    assert service.says() == b""
    watch.until("it is logged", lambda: any(entry.get("PREFORK_EVENT") == "access" for entry in entries(service)))
    found = {entry["PREFORK_EVENT"]: entry for entry in entries(service) if "PREFORK_EVENT" in entry}
    assert found["serving"]["PRIORITY"] == "6"
    assert found["serving"]["PREFORK_ADDRESSES"] == f"127.0.0.1:{service.port}"
    error = found["handler_error"]
    assert (error["PRIORITY"], error["PREFORK_ROLE"][:13]) == ("3", "gen 1 worker ")
    # A traceback is one entry, of the process that has written it.
    assert error["MESSAGE"].splitlines()[-1] == "    KeyError: 'spoon'"
    assert service.machine.outside(int(error["_PID"])) in {process.pid for process in watch.family(service.master)}
    assert (found["output"]["PRIORITY"], found["output"]["PREFORK_STREAM"], found["output"]["PREFORK_LINE"]) == (
        "4",
        "stderr",
        "low on spoons",
    )
    access = found["access"]
    assert (access["PREFORK_OUTCOME"], access["PREFORK_LISTENER"]) == ("error", f"127.0.0.1:{service.port}")
    assert access["PREFORK_PEER"].startswith("127.0.0.1:")
    # As people look at it.
    assert "low on spoons" in service.machine.said(f"journalctl --no-pager -p warning -u {service.unit}")
    assert "outcome" not in service.machine.said(f"journalctl --no-pager -u {service.unit} PREFORK_EVENT=handler_error")


def test_after_an_upgrade_the_journal_gets_them_too(service: Service) -> None:
    service.systemctl("start")
    service.prefork("upgrade")
    watch.until("it is told", lambda: any(entry.get("PREFORK_EVENT") == "upgraded" for entry in entries(service)))


def test_logrotate_rotates_with_the_file_that_is_shipped(service: Service) -> None:
    watch.needs("/usr/sbin/logrotate")
    machine = service.machine
    place = f"/var/log/prefork/{service.name}"
    service.configure(bind=[f"127.0.0.1:{service.port}"], log_file=f"{place}/prefork.log", access_log=f"{place}/access.log")
    machine.write("/etc/logrotate.d/prefork", LOGROTATE.read_text())
    service.systemctl("start")
    assert service.says() == b"hello"
    folder = machine.root / "var/log/private/prefork" / service.name

    def has(name: str, text: str) -> bool:
        return (folder / name).exists() and text in (folder / name).read_text()

    watch.until("the access is logged", lambda: has("access.log", " ok after "))
    done = machine.run("/usr/sbin/logrotate --force --verbose /etc/logrotate.d/prefork")
    assert "error" not in done.stderr, done.stderr
    watch.until("the old files have other names", lambda: has("access.log.1", " ok after ") and has("prefork.log.1", " serving "))
    watch.until("the new ones are written", lambda: has("prefork.log", "log files opened again"))
    assert service.says() == b"hello"
    watch.until("by workers, too", lambda: has("access.log", " ok after "))
    uid = (machine.root / "run/prefork" / service.name).stat().st_uid
    assert {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in folder.glob("*.log")} == {(uid, 0o600)}
    # Once more: what was renamed before is compressed now.
    machine.run("/usr/sbin/logrotate --force /etc/logrotate.d/prefork")
    assert {path.name for path in folder.iterdir()} >= {"access.log.1", "access.log.2.gz", "prefork.log.2.gz"}
