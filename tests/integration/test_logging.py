"""The log of a real daemon: its shape, its files, and that nothing that happens to it stops anybody."""

import fcntl
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.testing import Server, StartError, serve
from tests import log_schema, watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

HANDLER = """
import faulthandler, logging, os, subprocess, sys

print("imported")
print("begun at import", end="")
logging.basicConfig(format="%(name)s said %(message)s")


def loop(sock):
    word = sock.recv(4096).decode()
    if word == "raise":
        raise RuntimeError("as told")
    if word == "die":
        os.kill(os.getpid(), 9)
    if word == "print":
        print("printed", os.getpid())
        print("warned", file=sys.stderr)
        print("ended with the worker", end="", flush=True)
    if word == "log":
        logging.getLogger("mine").error("something")
    if word == "lines":
        for number in range(500):
            print(f"line {number}", "x" * 60)
    if word == "shell":
        subprocess.run(["sh", "-c", "echo from a subprocess; echo and an error >&2"])
    if word == "dump":
        faulthandler.dump_traceback()
    if word == "hold":
        sock.sendall(b"held")
        sock.recv(1)
        print("let go")
    sock.sendall(b"done")
"""


def ask(server: Server, word: str) -> bytes:
    """Send a word, read to the end."""
    with server.connect() as sock:
        sock.sendall(word.encode())
        answer = b""
        try:
            while data := sock.recv(4096):
                answer += data
        except ConnectionResetError:
            return answer
        return answer


def holds(path: Path, text: str, times: int = 1) -> str:
    """Wait until a file holds the text. Returns all of it."""
    watch.until(f"{text!r} in {path}", lambda: path.exists() and path.read_text().count(text) >= times)
    return path.read_text()


@contextmanager
def daemon(module: Path, scratch: Path, stderr: int, *flags: str, **environment: str) -> Iterator[Server]:
    """`prefork serve` with this descriptor as standard error; stopped at the end."""
    path = str(scratch / "control")
    command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--bind=127.0.0.1:0", f"--control={path}", *flags]
    settings = {**os.environ, **environment}
    with subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, cwd=module, env=settings) as process:
        try:
            watch.until("it listens", lambda: os.path.exists(path))
            server = Server(None, process.pid, path, scratch / "none", process)
            status = watch.until("it runs", lambda: (found := server.status())["state"] == "running" and found)
            host, _, port = status["listeners"][0]["address"].rpartition(":")
            yield Server((host, int(port)), process.pid, path, scratch / "none", process)
        finally:
            process.terminate()
            try:
                assert process.wait(watch.DEADLINE) == 0
            finally:
                process.kill()


# -- what is in it


def test_every_line_of_a_daemons_json_log_has_the_documented_shape(module: Module) -> None:
    folder = module(HANDLER)
    with serve("mine:loop", folder=folder, workers=2, log_format="json", log_level="debug", access_log="-") as server:
        for word in ("raise", "die", "log", "print"):
            ask(server, word)
        watch.logged(server, '"killed"')
        assert server.command("reload")["ok"]
        with server.connect() as held:
            held.sendall(b"hold")
            assert held.recv(4) == b"held"
            server.stop(signal.SIGQUIT)
        entries = list(log_schema.read(server.log()))
    events = {entry["event"] for entry in entries}
    assert {"booting", "serving", "output", "access", "handler_error", "worker_died", "committed", "stopped"} <= events
    printed = {entry["message"]: entry for entry in entries if entry["event"] == "output"}
    imported = [entry["role"] for entry in entries if entry["message"] in ("imported", "begun at import")]
    assert imported == ["gen 1", "gen 1", "gen 2", "gen 2"]
    assert (printed["warned"]["level"], printed["warned"]["stream"]) == ("warning", "stderr")
    assert printed["ended with the worker"]["role"].startswith("gen 1 worker ")
    assert "mine said something" in printed
    [own] = [message for message in printed if message.startswith("printed ")]
    assert own == f"printed {printed[own]['process']}"
    [raised] = [entry for entry in entries if entry["event"] == "handler_error"]
    assert raised["text"].startswith("Traceback (most recent call last):\n")
    assert raised["text"].endswith("RuntimeError: as told")
    told = [(entry["outcome"], entry["role"].split()[0]) for entry in entries if entry["event"] == "access"]
    assert sorted(told) == [("error", "gen"), ("killed", "master"), ("killed", "master"), ("ok", "gen"), ("ok", "gen")]


def test_what_the_import_prints_without_ending_the_line_is_told_once(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=4)
    for _ in range(8):
        assert ask(server, "nothing") == b"done"
    server.stop()
    assert server.log().count("begun at import") == 1


def test_repeated_tracebacks_come_at_a_bounded_rate_in_json_too(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=1, log_format="json")
    raised = 0

    def raise_one() -> bool:
        nonlocal raised
        ask(server, "raise")
        raised += 1
        return raised >= 40 and "handler_errors" in server.log()

    watch.until("the missing ones are told of", raise_one)
    watch.until("all are counted", lambda: server.status()["totals"]["error"] == raised)
    entries = list(log_schema.read(server.log()))
    shown = [entry for entry in entries if entry["event"] == "handler_error"]
    seconds = {entry["time"][:19] for entry in shown}
    assert len(shown) <= 10 * (len(seconds) + 1)
    assert len(shown) + sum(entry["count"] for entry in entries if entry["event"] == "handler_errors") <= raised
    assert len(shown) < raised


def test_the_access_log_tells_who_how_long_and_how_it_ended(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "access"
    server = prefork_server(
        "mine:loop", folder=module(HANDLER), workers=2, log_format="json", access_log=str(path), log_level="error"
    )
    with server.connect() as sock:
        me = f"127.0.0.1:{sock.getsockname()[1]}"
        sock.sendall(b"hold")
        assert sock.recv(4) == b"held"
        holder = watch.workers(server, "busy")[0]
        sock.sendall(b"x")
        assert sock.recv(4) == b"done"
    ask(server, "die")
    holds(path, '"killed"')
    entries = list(log_schema.read(holds(path, "\n", times=2)))
    [mine] = [entry for entry in entries if entry["peer"] == me]
    assert (mine["slot"], mine["generation"], mine["listener"]) == (holder["slot"], 1, holder["listener"])
    assert 0 < mine["duration"] < watch.DEADLINE
    assert mine["outcome"] == "ok"
    assert '"access"' not in server.log()


def test_lines_of_many_processes_do_not_mix(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=4, log_file=str(path))
    threads = [threading.Thread(target=ask, args=(server, "lines")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.stop()
    found: dict[str, list[int]] = {}
    for line in path.read_text().splitlines():
        if "stdout: line" in line:
            match = re.fullmatch(r"\d{4}-\S+ \S+ INFO gen 1 worker \d+\[(\d+)\]: stdout: line (\d+) x{60}", line)
            assert match, line
            found.setdefault(match[1], []).append(int(match[2]))
    numbers = [number for one in found.values() for number in one]
    assert sorted(numbers) == sorted([*range(500)] * 4)


@pytest.mark.parametrize("source", ["print('x' * 1_000_000)", "for n in range(20_000): print(f'number {n:>40}')"])
def test_a_megabyte_printed_at_import_is_no_hindrance(module: Module, tmp_path: Path, source: str) -> None:
    read, write = os.pipe()  # which nobody reads
    with os.fdopen(read, "rb"), os.fdopen(write, "wb"), watch.soon("starting, serving and stopping"):
        folder = module(f"{source}\ndef loop(sock): sock.sendall(b'done')\n")
        with daemon(folder, tmp_path, write, "--workers=2") as server:
            assert ask(server, "anything") == b"done"


def test_a_megabyte_printed_at_import_is_all_in_the_log(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    folder = module("print('é' * 500_000 + 'end')\ndef loop(sock): pass\n")
    prefork_server("mine:loop", folder=folder, workers=1, log_file=str(path), log_format="json")
    lines = [entry["message"] for entry in log_schema.read(holds(path, '"serving"')) if entry["event"] == "output"]
    assert "".join(lines) == "é" * 500_000 + "end"
    assert max(map(len, lines)) < 16384


# -- its files


@pytest.mark.parametrize("key", ["log_file", "access_log"])
@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/", "is a directory: give the path of a file"),
        ("/nowhere/at/all", "/nowhere/at is no directory: make it, or give another path"),
        ("/sys/prefork.log", "let user"),
    ],
)
def test_a_log_file_that_can_not_be_opened_is_an_error_at_the_start(key: str, path: str, remedy: str) -> None:
    options: dict[str, Any] = {key: path}
    with pytest.raises(StartError, match=re.escape(remedy)) as caught, serve("echo:loop", **options):
        pass
    assert caught.value.exit_status == 78
    assert f"prefork: {key} = '{path}': " in str(caught.value)


def test_a_reload_to_a_log_file_that_can_not_be_opened_changes_nothing(prefork_server: Start, tmp_path: Path) -> None:
    file, path = tmp_path / "prefork.toml", tmp_path / "log"
    file.write_text(f'module = "echo:loop"\nworkers = 1\nlog_file = "{path}"\n')
    server = prefork_server("", arguments=("--config", str(file)))
    before = watch.descriptors(server.pid)
    file.write_text(
        f'module = "echo:loop"\nworkers = 1\nlog_file = "{tmp_path}/new"\naccess_log = "{tmp_path}/no/such"\nlog_format = "json"\n'
    )
    answer = server.command("reload")
    assert answer["reason"].startswith(f"access_log = '{tmp_path}/no/such': {tmp_path}/no is no directory")
    holds(path, "refused, generation 1 keeps serving")
    assert watch.descriptors(server.pid) == before
    assert server.status()["generation"] == 1


def test_a_reload_moves_the_log_for_new_code_at_once_and_for_old_code_never(
    prefork_server: Start, module: Module, tmp_path: Path
) -> None:
    file, old, new = tmp_path / "prefork.toml", tmp_path / "old", tmp_path / "new"
    folder = module(HANDLER)
    file.write_text(f'module = "mine:loop"\nworkers = 1\nlog_file = "{old}"\n')
    server = prefork_server("", folder=folder, arguments=("--config", str(file)))
    with server.connect() as held:
        held.sendall(b"hold")
        assert held.recv(4) == b"held"
        file.write_text(f'module = "mine:loop"\nworkers = 1\nlog_file = "{new}"\nlog_format = "json"\nlog_level = "warning"\n')
        assert server.command("reload")["ok"]
        assert ask(server, "print") == b"done"
        held.sendall(b"x")
        assert held.recv(4) == b"done"
    assert holds(old, "let go").endswith("stdout: let go\n")
    printed = [entry["message"] for entry in log_schema.read(holds(new, "warned"))]
    assert "imported" in printed
    assert "let go" not in printed
    watch.until("the old file is let go of", lambda: str(old) not in watch.descriptors(server.pid).values())
    server.stop()
    assert "stopped" not in old.read_text() + new.read_text()  # below the new level


def test_usr1_opens_the_files_again(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    log, access = tmp_path / "log", tmp_path / "access"
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=2, log_file=str(log), access_log=str(access))
    ask(server, "print")
    holds(log, "warned")
    holds(access, " ok after ")
    for path in (log, access):
        path.rename(f"{path}.1")
    os.kill(server.pid, signal.SIGUSR1)
    holds(log, f"log files opened again: {log}\n")
    holds(log, f"log files opened again: {access}\n")
    assert ask(server, "shell") == b"done"
    holds(log, "\nfrom a subprocess\nand an error\n")
    holds(access, " ok after ")
    assert "imported" in Path(f"{log}.1").read_text()
    assert [path.stat().st_mode & 0o777 for path in (log, access)] == [0o600, 0o600]
    opened = {
        child.pid: set(watch.descriptors(child.pid).values()) & {str(log), f"{log}.1", str(access), f"{access}.1"}
        for child in [psutil.Process(server.pid), *watch.family(server.pid)]
    }
    assert sorted(map(sorted, filter(None, opened.values()))) == [[str(access)], [str(log)]], (
        "each by who writes it, and nobody else"
    )
    assert server.log() == ""


def test_files_that_can_not_be_opened_again_are_written_on(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=1, log_file=str(folder / "log"))
    folder.rename(tmp_path / "away")
    os.kill(server.pid, signal.SIGUSR1)
    old = tmp_path / "away" / "log"
    holds(old, f"{folder}/log can't be opened again (No such file or directory): the file that is open is written on")
    assert ask(server, "print") == b"done"
    assert "printed" in holds(old, "warned")
    assert "opened again:" not in old.read_text()


def test_usr1_without_a_file_is_ignored_and_says_so(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    os.kill(server.pid, signal.SIGUSR1)
    watch.logged(server, "SIGUSR1 ignored: the log goes to standard error")
    assert server.status()["state"] == "running"


def test_rotations_under_load_lose_no_line(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    access = tmp_path / "access"
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=3, access_log=str(access), log_format="json")
    rotations = 10
    for number in range(rotations):
        for _ in range(10):
            assert ask(server, "nothing") == b"done"
        access.rename(f"{access}.{number}")
        os.kill(server.pid, signal.SIGUSR1)
        watch.logged(server, "log files opened again", times=number + 1)
    server.stop()
    files = [access, *(Path(f"{access}.{number}") for number in range(rotations))]
    assert sum(len(list(log_schema.read(path.read_text()))) for path in files) == 10 * rotations


# -- what may happen to it


def test_handlers_tools_that_write_to_the_descriptor_still_work(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=1)
    ask(server, "dump")
    watch.logged(server, "most recent call first")
    ask(server, "shell")
    watch.logged(server, "from a subprocess\n")
    ask(server, "log")
    watch.logged(server, "stderr: mine said something\n")
    assert re.search(r" WARNING gen 1 worker \d+\[\d+\]: stderr: mine said something\n", server.log())


def test_a_pipe_whose_reader_stops_and_goes_on_costs_whole_lines_which_are_counted(module: Module, tmp_path: Path) -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(read, False)
    with os.fdopen(read, "rb", buffering=0) as end:
        with os.fdopen(write, "wb"):
            folder = module(HANDLER)
            # One worker, which drops and tells: what another had dropped would be told by that one, at its next line.
            flags = ("--workers=1", "--max-workers=1", "--log-format=json", "--access-log=-")
            with daemon(folder, tmp_path, write, *flags) as server:
                watch.settled(server, 1)
                assert ask(server, "lines") == b"done"
                assert ask(server, "raise") == b""
                watch.until("it is counted", lambda: server.status()["totals"]["error"] == 1)
                early = end.read(1 << 20) or b""
                assert ask(server, "nothing") == b"done"
                watch.until("it is counted", lambda: server.status()["totals"]["ok"] == 2)
        late = end.readall() or b""
    entries = list(log_schema.read((early + late).decode()))
    worker = [entry for entry in entries if entry["role"].startswith("gen 1 worker")]
    dropped = [entry["count"] for entry in worker if entry["event"] == "dropped"]
    printed = [entry for entry in worker if entry["event"] == "output" and entry["message"].startswith("line")]
    # 500 prints, three connections, one traceback.
    others = [entry for entry in worker if entry["event"] in ("access", "handler_error")]
    assert sum(dropped) + len(printed) + len(others) == 504


def test_a_reader_that_dies_stops_nobody(module: Module, tmp_path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "wb"), daemon(module(HANDLER), tmp_path, write, "--workers=2") as server:
        os.close(read)
        for word in ("print", "raise", "die", "print"):
            ask(server, word)
        assert server.command("reload")["ok"]
        assert ask(server, "print") == b"done"
        watch.settled(server, 2)


def test_a_disk_that_is_full_stops_nobody(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=2, log_file="/dev/full", access_log="/dev/full")
    for word in ("print", "raise", "die", "print"):
        ask(server, word)
    assert server.command("reload")["ok"]
    os.kill(server.pid, signal.SIGUSR1)
    assert ask(server, "print") == b"done"
    assert server.stop() == 0


def test_a_disk_that_is_full_and_then_has_room_again(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=1, log_file=str(path))
    watch.settled(server, 1)
    writer = watch.log_writer(server, path)
    whole = holds(path, "handlers run as root" if os.geteuid() == 0 else " serving ")
    # The limit of a file's size is to a writer what a full disk is: first a short write, then none (setrlimit(2)).
    resource.prlimit(writer, resource.RLIMIT_FSIZE, (len(whole) + 30, resource.RLIM_INFINITY))
    assert server.command("scale", workers=2)["ok"]
    assert ask(server, "print") == b"done"
    watch.settled(server, 2)
    assert server.command("scale", workers=1)["ok"]
    watch.until("the other has left", lambda: len(watch.workers(server)) == 1)
    watch.until("it is full", lambda: path.stat().st_size == len(whole) + 30)
    torn = path.read_text()
    assert torn.startswith(whole)
    resource.prlimit(writer, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert server.command("scale", workers=2)["ok"]
    text = holds(path, " could not be written\n")
    assert text.startswith(torn + "\n")
    late = text.removeprefix(torn + "\n").splitlines()
    assert any("workers: 2 acceptors for each address" in line for line in late)
    assert re.fullmatch(r"\S+ \S+ WARNING master\[\d+\]: \d+ log lines? could not be written", late[-1])


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_journal_gets_priorities_and_stops_nobody_when_it_is_stopped(module: Module, tmp_path: Path, log_format: str) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    found = os.fstat(theirs.fileno())
    heard = b""
    with ours, theirs:
        stream = f"{found.st_dev}:{found.st_ino}"
        flags = ("--workers=1", "--max-workers=1", "--access-log=-", f"--log-format={log_format}")
        with daemon(module(HANDLER), tmp_path, theirs.fileno(), *flags, JOURNAL_STREAM=stream) as server:
            ask(server, "print")
            ask(server, "raise")
            watch.until("it is counted", lambda: server.status()["totals"]["error"] == 1)
            heard += ours.recv(1 << 20)
            for _ in range(8):
                assert ask(server, "lines") == b"done"
            watch.until("it is counted", lambda: server.status()["totals"]["ok"] == 9)
            heard += drain(ours)
            assert ask(server, "nothing") == b"done"
            watch.until("it is counted", lambda: server.status()["totals"]["ok"] == 10)
        heard += drain(ours)
    lines = heard.decode().splitlines()
    assert {line[:3] for line in lines} == {"<3>", "<4>", "<6>"}
    if log_format == "json":
        entries = list(log_schema.read("".join(line[3:] + "\n" for line in lines)))
        assert {"dropped", "output", "handler_error"} <= {entry["event"] for entry in entries}
    else:
        assert "<3>    RuntimeError: as told" in lines
        assert any(re.fullmatch(r"<4>gen 1 worker 0\[\d+\]: \d+ log lines? could not be written", line) for line in lines)
        assert any(re.fullmatch(r"<6>gen 1 worker 0\[\d+\]: stdout: printed \d+", line) for line in lines)


def drain(end: socket.socket) -> bytes:
    found = b""
    while True:
        try:
            data = end.recv(1 << 20)
        except BlockingIOError:
            return found
        if not data:
            return found
        found += data


def test_the_readme_shows_lines_as_they_are(prefork_server: Start, module: Module) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [shown] = log_schema.read(
        " ".join(re.findall(r'^    ({"time".*?})$', readme, re.MULTILINE | re.DOTALL)).replace("\n", "") + "\n"
    )
    fields = {
        field for row in re.findall(r"^\| ([a-z, ]+) \| (?:every|some|many|`)", readme, re.MULTILINE) for field in row.split(", ")
    }
    assert {*shown, *log_schema.ALWAYS, "text", "stream", "count", "pid"} <= fields
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=1, log_format="json", access_log="-")
    ask(server, "nothing")
    watch.logged(server, '"access"')
    [real] = [entry for entry in log_schema.read(server.log()) if entry["event"] == "access"]
    assert list(shown) == list(real)
