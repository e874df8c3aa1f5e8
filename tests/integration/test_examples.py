"""The bundled examples, each with a client that we did not write."""

import os
import re
import shutil
import smtplib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import prefork.examples
from prefork.testing import Server
from tests import watch

Start = Callable[..., Server]

EXAMPLES = sorted(Path(prefork.examples.__path__[0]).glob("*.py"))
# Postfix keeps its daemons out of everybody's path.
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/lib/postfix/sbin"])


def client(name: str, package: str) -> str:
    """The program's path; without it the test is skipped, and fails in CI."""
    return watch.program(name, package, PLACES)


def run(*command: str, text: str = "") -> str:
    """Run a client with that standard input; what it has written."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("example", [example.name for example in EXAMPLES])
def test_an_example_has_fewer_than_sixty_lines(example: str) -> None:
    assert len((EXAMPLES[0].parent / example).read_text().splitlines()) < 60


def test_an_example_is_whole_by_itself() -> None:
    for example in EXAMPLES:
        assert "prefork.examples" not in example.read_text(), "to be copied, it has to do without its neighbours"


def test_no_example_hides_a_module_of_python_itself() -> None:
    assert not {example.stem for example in EXAMPLES} & sys.stdlib_module_names


def test_echo_with_socat(prefork_server: Start) -> None:
    socat = client("socat", "socat")
    host, port = prefork_server("echo:loop").address
    text = "hello\n" * 20_000
    assert run(socat, "-t", "30", "-", f"TCP:{host}:{port}", text=text) == text


# -- static files


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    for number in range(1, 4):
        (folder / f"{number}.txt").write_text(f"file {number}\n" * 10_000)
    return folder


@pytest.mark.parametrize("kind", ["TCP", "Unix"])
def test_static_files_with_curl(prefork_server: Start, tmp_path: Path, site: Path, kind: str) -> None:
    path = f"{tmp_path}/socket"
    bind = "127.0.0.1:0" if kind == "TCP" else f"unix:{path}"
    server = prefork_server("static:Files", bind=bind, environment={"STATIC_ROOT": str(site)})
    curl = [client("curl", "curl"), "--silent", "--show-error", "--noproxy", "*"]
    curl += [] if kind == "TCP" else ["--unix-socket", path]
    base = f"http://127.0.0.1:{server.address[1]}" if kind == "TCP" else "http://localhost"
    assert run(*curl, f"{base}/1.txt") == (site / "1.txt").read_text()
    assert run(*curl, "--output", "/dev/null", "--write-out", "%{http_code}", f"{base}/nosuch") == "404"
    head = run(*curl, "--head", f"{base}/2.txt")
    assert head.startswith("HTTP/1.1 200 OK")
    assert f"Content-Length: {(site / '2.txt').stat().st_size}" in head
    assert 'href="3.txt"' in run(*curl, f"{base}/")
    before = server.status()["totals"]["accepted"]
    assert run(*curl, f"{base}/[1-3].txt") == "".join((site / f"{n}.txt").read_text() for n in (1, 2, 3))
    assert server.status()["totals"]["accepted"] == before + 1, "three requests on one connection"
    totals = watch.until("all have ended", lambda: (now := server.status()["totals"])["serving"] == 0 and now)
    assert (totals["error"], totals["ok"]) == (0, 5)
    watch.logged(server, '"GET /nosuch HTTP/1.1" 404')


def test_a_static_server_that_reloads_asks_its_clients_to_come_again(prefork_server: Start, site: Path) -> None:
    server = prefork_server("static:Files", environment={"STATIC_ROOT": str(site)})

    def head(sock: socket.socket) -> bytes:
        sock.sendall(b"HEAD /1.txt HTTP/1.1\r\nHost: x\r\n\r\n")
        return sock.recv(4096)

    with server.connect() as sock:
        assert b"Connection: close" not in head(sock)
        assert server.command("reload")["ok"]
        assert b"Connection: close" in head(sock)
        assert sock.recv(1) == b""


# -- the policy service


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter: pytest's are private, and Postfix has a user of its own."""
    with tempfile.TemporaryDirectory(prefix="prefork-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def postfix(folder: Path, policy: str) -> Iterator[int]:
    """A Postfix of our own in ``folder``, which asks ``policy``. Gives its port."""
    master, command = client("master", "postfix"), client("postfix", "postfix")
    if os.geteuid() != 0:
        pytest.skip("only root can start a Postfix")
    for name in ("etc", "spool", "data"):
        (folder / name).mkdir()
    shutil.chown(folder / "data", "postfix")
    port = watch.free_port()
    (folder / "etc" / "main.cf").write_text(f"""
compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/data
maillog_file = {folder}/data/log
maillog_file_prefixes = {folder}
inet_interfaces = loopback-only
inet_protocols = ipv4
myhostname = mail.invalid
mydestination = example.test
mynetworks =
local_recipient_maps =
alias_maps =
alias_database =
smtpd_peername_lookup = no
smtpd_error_sleep_time = 0
smtpd_recipient_restrictions = reject_unauth_destination, check_policy_service {policy}
""")
    (folder / "etc" / "master.cf").write_text(f"""
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
rewrite unix - - n - - trivial-rewrite
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
""")
    run(command, "-c", f"{folder}/etc", "check")
    # Its end is sent to its process group.
    process = subprocess.Popen([master, "-c", f"{folder}/etc", "-d"], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(30)


def send(port: int, sender: str) -> tuple[int, bytes]:
    """Send a mail; the server's answer to the recipient, or 250."""
    try:
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as smtp:
            smtp.sendmail(sender, ["somebody@example.test"], "Subject: hello\n\nhello\n")
    except smtplib.SMTPRecipientsRefused as refused:
        return refused.recipients["somebody@example.test"]
    return 250, b""


@pytest.mark.slow
def test_a_real_postfix_greylists_by_the_policy_service(prefork_server: Start, tmp_path: Path, open_folder: Path) -> None:
    server = prefork_server(
        "policy:loop",
        on_boot="policy:create",
        on_worker_start="policy:connect",
        workers=2,
        environment={"GREYLIST_FILE": f"{tmp_path}/greylist.db", "GREYLIST_SECONDS": "2"},
    )
    host, port = server.address
    with postfix(open_folder, f"inet:{host}:{port}") as smtp_port:
        watch.until("Postfix listens", lambda: answers(smtp_port))
        code, text = send(smtp_port, "stranger@elsewhere.test")
        assert code == 450
        assert b"greylisted for" in text
        watch.until("the stranger's mail is taken", lambda: send(smtp_port, "stranger@elsewhere.test")[0] == 250)
        assert send(smtp_port, "stranger@elsewhere.test")[0] == 250
        assert send(smtp_port, "another@elsewhere.test")[0] == 450
        assert server.command("reload")["ok"]
        assert send(smtp_port, "stranger@elsewhere.test")[0] == 250
    assert server.status()["totals"]["error"] == 0


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 60) as sock:
            return sock.recv(64).startswith(b"220 ")
    except ConnectionRefusedError:
        return False


def test_a_policy_client_that_talks_nonsense_ends_only_its_connection(prefork_server: Start, tmp_path: Path) -> None:
    environment = {"GREYLIST_FILE": f"{tmp_path}/greylist.db"}
    hooks = {"on_boot": "policy:create", "on_worker_start": "policy:connect"}
    server = prefork_server("policy:loop", workers=1, max_workers=1, environment=environment, **hooks)
    for nonsense in (b"x" * 5000, b"\xff=\xff\n" * 3, b"a\n" * 1000, b"name=value"):
        with server.connect() as sock:
            sock.sendall(nonsense)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    with server.connect() as sock:
        sock.sendall(b"request=smtpd_access_policy\nsender=a=b@c\n\n")
        assert sock.recv(4096).startswith(b"action=DEFER_IF_PERMIT greylisted")
    assert server.status()["totals"]["error"] == 0


# -- the key-value server


@pytest.fixture
def kv(prefork_server: Start, tmp_path: Path) -> Server:
    environment = {"KV_FILE": f"{tmp_path}/kv.db"}
    return prefork_server("kv:loop", on_worker_start="kv:connect", workers=4, environment=environment)


def redis(server: Server, *lines: str) -> list[str]:
    """What redis-cli shows for each line."""
    cli = client("redis-cli", "redis-tools")
    port = str(server.address[1])
    return [run(cli, "-p", port, "--no-raw", *line.split()).strip() for line in lines]


def test_redis_cli_can_use_the_key_value_server(kv: Server) -> None:
    dialogue = [
        ("PING", "PONG"),
        ("GET a", "(nil)"),
        ("SET a 1", "OK"),
        ("GET a", '"1"'),
        ("INCR a", "(integer) 2"),
        ("INCR fresh", "(integer) 1"),
        ("SET word x", "OK"),
        ("INCR word", "(nil)"),
        ("GET word", '"x"'),
        ("DEL word", "(integer) 1"),
        ("del word", "(integer) 0"),
        ("GET word", "(nil)"),
    ]
    lines = [line for line, _ in dialogue]
    assert list(zip(lines, redis(kv, *lines), strict=True)) == dialogue
    assert redis(kv, "NOSUCH")[0].startswith("(error) ERR KeyError")
    assert redis(kv, "GET")[0].startswith("(error) ERR ProgrammingError: Incorrect number of bindings")
    assert kv.status()["totals"]["error"] == 0


def test_redis_benchmark_finishes_and_no_increment_is_lost_between_workers(kv: Server) -> None:
    benchmark = client("redis-benchmark", "redis-tools")
    port = str(kv.address[1])
    shown = run(benchmark, "-p", port, "-t", "ping,set,get,incr", "-n", "400", "-c", "4", "-P", "4", "--csv")
    assert re.findall(r'^"(\w+)","[\d.]+"', shown, re.MULTILINE) == ["PING_INLINE", "PING_MBULK", "SET", "GET", "INCR"]
    assert redis(kv, "GET counter:__rand_int__") == ['"400"']
    totals = watch.until("all have ended", lambda: (now := kv.status()["totals"])["serving"] == 0 and now)
    assert totals["error"] == 0


def test_what_was_set_is_there_after_a_reload(kv: Server) -> None:
    assert redis(kv, "SET a 1") == ["OK"]
    assert kv.command("reload")["ok"]
    assert redis(kv, "GET a") == ['"1"']


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"*1\r\n$99999999\r\n", b"-ERR Protocol error"),
        (b"*1\r\n$-5\r\n", b"-ERR Protocol error"),
        (b"*99999999999\r\n" + b"$0\r\n\r\n" * 20, b"-ERR Protocol error"),
        (b"*x\r\n", b"-ERR invalid literal"),
        (b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$9\r\nhalf", b"-ERR Protocol error"),
        (b"SET a half", b""),
        (b"x" * (1 << 20), b""),
        (b"SET a 1 EX 5\r\n", b"-ERR ProgrammingError"),
    ],
)
def test_bad_input_ends_its_connection_and_changes_nothing(kv: Server, sent: bytes, answer: bytes) -> None:
    with kv.connect() as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        got = b""
        while data := sock.recv(4096):
            got += data
    assert got.startswith(answer)
    assert bool(got) == bool(answer)
    with kv.connect() as sock:
        sock.sendall(b"GET a\r\n")
        assert sock.recv(64) == b"$-1\r\n"
    assert kv.status()["totals"]["error"] == 0
