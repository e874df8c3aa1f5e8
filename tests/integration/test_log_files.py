"""The processes that write log files: what they write, what ends them, and that nobody else waits for a disk."""

import array
import errno
import fcntl
import os
import re
import resource
import select
import selectors
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork import log
from prefork.config import Config
from prefork.errors import ConfigError
from prefork.log import Level, Output, Sink, files, pipe, writer
from prefork.log.files import LogFile, Says
from prefork.log.writer import Ask
from prefork.testing import Server
from tests import log_schema, watch
from tests.integration.test_logging import HANDLER, ask, holds

Start = Callable[..., Server]
Module = Callable[[str], Path]


def messages(path: Path) -> list[str]:
    """The lines of a file, without what every line begins with."""
    return [line.partition("]: ")[2] or line for line in path.read_text().splitlines()]


# -- the log of this process


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """A log of this process' own, and its children that write files."""
    plain, found = Sink(), set[int]()
    state = {"_role": "master", "_sinks": {"": plain}, "_output": Output(Level.INFO, "text", plain, None), "_files": {}}
    for name, value in {**state, "_strangers": found, "_owner": None, "_selector": None}.items():
        monkeypatch.setattr(log, name, value)
    yield found
    log.finish()
    assert not found, "all have been reaped"


def use(**settings: Any) -> None:
    log.use(Config(module="echo:loop", **settings))


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda path: path.mkdir(), "is a directory: give the path of a file"),
        (lambda path: path.write_text("a file"), None),
        (os.mkfifo, "a socket, or a FIFO that nobody reads: give the path of a file"),
    ],
)
def test_a_file_that_can_not_be_opened_is_named_with_a_remedy(
    strangers: set[int], tmp_path: Path, make: Any, remedy: str | None
) -> None:
    path = tmp_path / "log"
    make(path)
    place = str(path if remedy else path / "below")
    remedy = remedy or f"{path} is no directory: make it, or give another path"
    before = watch.descriptors(os.getpid())
    for key, settings in (("log_file", {"log_file": place}), ("access_log", {"access_log": place})):
        with pytest.raises(ConfigError) as caught:
            use(**settings)
        assert str(caught.value) == f"{key} = {place!r}: {remedy}"
    assert not strangers
    assert watch.descriptors(os.getpid()) == before


def test_a_file_system_that_does_not_open_a_file_is_no_place_for_it(
    strangers: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.Writer, "_open", lambda _: signal.pause())
    with pytest.raises(ConfigError, match=r"its file system has not opened it in 0\.05 s: give another path"):
        log.open_for(Config(module="echo:loop", log_file=str(tmp_path / "log")), 0.05)
    assert not strangers


def test_a_writer_that_can_not_begin_is_told_with_its_traceback(
    strangers: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.Writer, "_open", lambda _: 1 / 0)
    with pytest.raises(ConfigError, match="the process that writes it has ended"):
        use(log_file=str(tmp_path / "log"))
    assert not strangers


def test_files_that_are_not_asked_for_any_more_are_let_go_of(strangers: set[int], tmp_path: Path) -> None:
    wanted, other = Config(log_file=str(tmp_path / "a")), Config(access_log=str(tmp_path / "b"))
    log.use(wanted)
    kept = set(strangers)
    log.open_for(other)
    [left] = strangers - kept
    opened = [sink.fd for path, sink in log._sinks.items() if path]
    log.keep_only([wanted])
    assert [os.path.exists(f"/proc/self/fd/{fd}") for fd in opened] == [True, False]
    assert log.descriptors() == {1, 2, opened[0]}
    assert os.waitpid(left, 0) == (left, 0), "nobody is left who could log to it"
    strangers.discard(left)


def test_files_are_given_to_who_runs_the_handler_but_links_and_devices_are_not(strangers: set[int], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    made, named_twice = tmp_path / "made", tmp_path / "twice"
    log.of_master(strangers, 12345)
    log.open_for(Config(log_file=str(made), access_log="/dev/null"))
    assert made.stat().st_uid == 12345
    assert os.stat("/dev/null").st_uid == 0
    (tmp_path / "link").symlink_to(made)
    named_twice.touch()
    (tmp_path / "second").hardlink_to(named_twice)
    for path, why in ((tmp_path / "link", "a symbolic link"), (named_twice, "the file has several names")):
        with pytest.raises(ConfigError, match=why):
            log.open_for(Config(log_file=str(path)))
    assert named_twice.stat().st_uid == 0


def test_a_descriptor_that_user_code_has_closed_and_used_again_is_not_written_to(strangers: set[int], tmp_path: Path) -> None:
    path, theirs = tmp_path / "log", tmp_path / "theirs"
    use(log_file=str(path))
    [file] = log._files.values()
    kept = os.dup(file.pipe.fd)
    log.event("listening", address="one")
    file.ask(Ask.FLUSH)
    file.flushed(time.monotonic() + watch.DEADLINE)
    number = file.pipe.fd
    os.close(number)
    try:
        with theirs.open("w") as opened:
            assert opened.fileno() == number
            log.event("listening", address="two")
        assert theirs.read_text() == ""
        assert messages(path) == ["listening on one", "listening on two"]
    finally:
        os.dup2(kept, number, inheritable=False)
        os.close(kept)


def test_the_last_line_is_in_the_file_when_all_is_finished(
    strangers: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    use(log_file=str(path))
    [file] = log._files.values()
    waits = LogFile.flushed

    def goes_on(file: LogFile, deadline: float) -> None:
        os.kill(file.pid, signal.SIGCONT)
        waits(file, deadline)

    monkeypatch.setattr(log, "FLUSH", watch.DEADLINE)
    monkeypatch.setattr(LogFile, "flushed", goes_on)
    with stopped(file.pid):
        log.event("listening", address="one")
        log.finish()
        assert messages(path) == ["listening on one"]


# -- a writer by itself


@pytest.fixture
def told() -> list[tuple[str, dict[str, Any]]]:
    """The events of `file`."""
    return []


@pytest.fixture
def file(tmp_path: Path, told: list[tuple[str, dict[str, Any]]]) -> Iterator[LogFile]:
    """A file, its process, and its pipe."""
    says = Says(lambda name, **fields: told.append((name, fields)), lambda _, count: b"%d are missing\n" % count)
    log_file = LogFile(str(tmp_path / "log"), None, says, set())
    log_file.open(watch.DEADLINE)
    yield log_file
    log_file.flush()
    log_file.flushed(time.monotonic() + watch.DEADLINE)
    log_file.end(time.monotonic() + watch.DEADLINE)
    assert log_file.pid == 0


def written(file: LogFile) -> str:
    """What is in the file when all that was logged is."""
    file.flush()
    file.flushed(time.monotonic() + watch.DEADLINE)
    return Path(file.path).read_text()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does not go on, as one whose disk hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        watch.until("it is stopped", lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_a_pipe_that_is_full_drops_whole_lines_at_once_for_the_master(file: LogFile) -> None:
    line = b"x" * 99 + b"\n"
    with stopped(file.pid):
        lost = sum(file.pipe.write([line]) for _ in range(20_000))
        assert pipe.unread(file.pipe.fd) == (20_000 - lost) * len(line)
    assert 0 < lost < 20_000
    assert written(file) == line.decode() * (20_000 - lost)


@pytest.mark.parametrize("size", [100, 9_999])
def test_who_may_wait_waits_once_for_a_disk_that_hangs(file: LogFile, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(pipe, "PATIENCE", 0.01)
    file.pipe.begin_to_wait()
    line, lost = b"x" * (size - 1) + b"\n", 0
    with stopped(file.pid):
        while not lost:
            lost = file.pipe.write([line])
        monkeypatch.setattr(pipe, "PATIENCE", 10_000.0)
        file.pipe.begin_to_wait()
        with monkeypatch.context() as known:
            known.setattr(time, "sleep", lambda _: pytest.fail("it is known that nothing is read, and this waits"))
            assert file.pipe.write([line] * 300) > 0
    watch.until("there is room", lambda: pipe.unread(file.pipe.fd) == 0)
    assert file.pipe.write([line] * 300) == 0, "and so is that it is read again"
    assert set(written(file).split()) == {line.decode().strip()}


def test_a_burst_of_who_may_wait_is_written_whole(file: LogFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "PATIENCE", 10_000.0)
    file.pipe.begin_to_wait()
    lines = [b"%d " % number + b"x" * (number * 37 % 16_000) + b"\n" for number in range(1_000)]
    for at in range(0, len(lines), 50):
        assert file.pipe.write(lines[at : at + 50]) == 0
    assert written(file).encode() == b"".join(lines)


def test_lines_that_come_in_pieces_are_one_and_one_that_is_not_ended_is_ended(file: LogFile) -> None:
    for piece in (b"one", b" line\nand", b" another"):
        os.write(file.pipe.fd, piece)
    assert written(file) == "one line\nand another\n"
    os.write(file.pipe.fd, b"a prompt: ")
    assert holds(Path(file.path), "a prompt: \n")
    for _ in range(48):
        watch.until("there is room", lambda: pipe.unread(file.pipe.fd) == 0)
        os.write(file.pipe.fd, b"z" * (writer.LONGEST // 16))
    assert written(file).count("z") == 3 * writer.LONGEST


def test_what_is_sent_to_everybody_does_not_end_it(file: LogFile) -> None:
    pid = file.pid
    for signo in (1, 2, 3, 10, 12, 15, 21, 22):
        os.kill(pid, signo)
    os.write(file.pipe.fd, b"a line\n")
    assert written(file) == "a line\n"
    assert file.pid == pid, "it is no other one"


def test_it_is_there_until_nobody_can_log_any_more(tmp_path: Path) -> None:
    log_file = LogFile(str(tmp_path / "log"), None, Says(lambda _: None, lambda *_: b""), set())
    log_file.open(watch.DEADLINE)
    kept = os.dup(log_file.pipe.fd)
    log_file.close()
    os.write(kept, b"the master has gone\n")
    holds(tmp_path / "log", "the master has gone\n")
    os.write(kept, b"the end")
    os.close(kept)
    assert os.waitpid(log_file.pid, 0) == (log_file.pid, 0)
    assert (tmp_path / "log").read_text() == "the master has gone\nthe end\n"


def end(file: LogFile, now: float) -> None:
    """Reap the process, as the master does."""
    pid, status = os.waitpid(file.pid, 0)
    file.ended(pid, status, now)


def test_one_that_is_killed_is_replaced_and_what_waited_is_written(file: LogFile, told: list[Any]) -> None:
    with stopped(file.pid):
        for number in range(100):
            file.pipe.write([b"line %d\n" % number])
        os.kill(file.pid, signal.SIGKILL)
    end(file, 50.0)
    assert told == [("log_writer_died", {"path": file.path, "cause": "signal 9 (SIGKILL)"})]
    waits = [file.wake_at(0.0)]
    file.tend(51.4)
    assert file.pid == 0
    file.tend(51.5)
    assert written(file) == "".join(f"line {number}\n" for number in range(100))
    for _ in range(2):
        os.kill(file.pid, signal.SIGKILL)
        end(file, 50.0)
        waits.append(file.wake_at(0.0))
        file.tend(100.0)
        assert written(file)
    assert waits == [51.5, 52.25, 53.375]


def test_one_that_lived_long_is_replaced_at_once(file: LogFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SETTLED", 0.0)
    os.kill(file.pid, signal.SIGKILL)
    end(file, 50.0)
    assert file.wake_at(0.0) == 50.0
    file.tend(50.0)
    assert written(file) == ""


def test_one_that_can_not_open_the_file_drops_and_counts_until_it_can(
    file: LogFile, told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY", 0.0)
    os.kill(file.pid, signal.SIGKILL)
    end(file, 1.0)
    path = Path(file.path)
    path.rename(tmp_path / "old")
    path.mkdir()
    file.tend(10.0)
    for _ in range(3):
        file.pipe.write([b"lost\n"])
        file.flush()
        file.flushed(time.monotonic() + watch.DEADLINE)
    assert [name for name, _ in told] == ["log_writer_died", "log_lost"]
    assert told[1][1]["reason"] == os.strerror(errno.EISDIR)
    path.rmdir()
    file.pipe.write([b"a line\n"])
    assert written(file) == "a line\n3 are missing\n"
    assert told[2:] == [("reopened", {"paths": file.path})]


def test_one_that_was_asked_to_leave_is_replaced_in_silence(file: LogFile, told: list[Any]) -> None:
    before = file.pid
    assert file.ask(Ask.LEAVE)
    end(file, 1.0)
    file.tend(1.0)
    assert file.pid != before
    file.pipe.write([b"a line\n"])
    assert written(file) == "a line\n"
    assert not told


def leave(file: LogFile) -> None:
    """Ask the process to, and wait until it has heard it."""
    assert file.ask(Ask.LEAVE)
    unheard = array.array("i", [1])

    def is_heard() -> bool:
        assert file._control is not None
        fcntl.ioctl(file._control, termios.TIOCOUTQ, unheard)
        return unheard[0] == 0

    watch.until("it has heard it", is_heard)


def test_what_has_begun_and_what_is_missing_outlive_who_leaves(file: LogFile) -> None:
    file.pipe.write([b"0123456789\n"])
    written(file)
    resource.prlimit(file.pid, resource.RLIMIT_FSIZE, (11, resource.RLIM_INFINITY))
    file.pipe.write([b"lost\n", b"lost\n"])
    os.write(file.pipe.fd, b"half a ")
    watch.until("it has that", lambda: pipe.unread(file.pipe.fd) == 0)
    leave(file)
    os.write(file.pipe.fd, b"line\nwhole\n")
    end(file, 1.0)
    file.tend(1.0)
    file.pipe.write([b"there is room\n"])
    assert written(file) == "0123456789\nthere is room\n4 are missing\n"


def test_a_stop_starts_another_one_for_what_waits(file: LogFile) -> None:
    os.kill(file.pid, signal.SIGKILL)
    file.pipe.write([b"a line\n"])
    watch.until("it has ended", lambda: watch.is_gone(file.pid))
    file.flush()
    file.flushed(time.monotonic() + watch.DEADLINE)
    assert Path(file.path).read_text() == "a line\n"


def test_a_master_that_goes_with_something_unheard_does_not_end_it(tmp_path: Path) -> None:
    log_file = LogFile(str(tmp_path / "log"), None, Says(lambda *_, **__: None, lambda *_: b""), set())
    log_file.open(watch.DEADLINE)
    kept = os.dup(log_file.pipe.fd)
    assert log_file.ask(Ask.REOPEN)
    assert log_file._control is not None
    poll = select.poll()
    poll.register(log_file._control, select.POLLIN)
    assert poll.poll(1000 * watch.DEADLINE)
    log_file.pipe.close()
    os.close(log_file._read_end)
    log_file._hang_up()
    os.write(kept, b"a line\n")
    os.close(kept)
    assert os.waitpid(log_file.pid, 0) == (log_file.pid, 0)
    assert (tmp_path / "log").read_text() == "a line\n"


def test_a_pipe_that_a_handler_has_made_small_is_large_again(file: LogFile) -> None:
    size = fcntl.fcntl(file.pipe.fd, fcntl.F_GETPIPE_SZ)
    fcntl.fcntl(file.pipe.fd, fcntl.F_SETPIPE_SZ, 4096)
    file.pipe.write([b"a line\n"])
    assert written(file) == "a line\n"
    assert fcntl.fcntl(file.pipe.fd, fcntl.F_GETPIPE_SZ) == size
    fcntl.fcntl(file.pipe.fd, fcntl.F_SETPIPE_SZ, 4096)
    assert pipe.Pipe(file.path, file.pipe.fd).capacity == size, "the next program does not take that for its size"


def test_what_never_fits_is_not_waited_for(file: LogFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "PATIENCE", 10_000.0)
    file.pipe.begin_to_wait()
    assert file.pipe.write([b"x" * (2 * file.pipe.capacity) + b"\n"]) == 1
    assert file.pipe.write([b"a line\n"]) == 0
    assert written(file) == "a line\n"


def test_many_who_wait_get_room_in_turn(file: LogFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "PATIENCE", 10_000.0)
    file.pipe.begin_to_wait()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            lost = 1
            try:
                lost = sum(file.pipe.write([b"x" * 3_900 + b"\n"]) for _ in range(300))
            finally:
                os._exit(lost != 0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8
    assert written(file) == ("x" * 3_900 + "\n") * 2400


def test_long_lines_are_whole(file: LogFile) -> None:
    lines = [b"%d" % number * 100_000 + b"\n" for number in range(1, 9)]
    file.pipe.begin_to_wait()
    for line in lines:
        assert file.pipe.write([line]) == 0
    assert written(file).encode() == b"".join(lines)


def test_a_selector_that_can_not_watch_is_tried_again(file: LogFile, told: list[Any]) -> None:
    class Full(selectors.DefaultSelector):
        def register(self, *_: Any, **__: Any) -> selectors.SelectorKey:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Full() as full, selectors.DefaultSelector() as selector:
        file.watch(full)
        assert [name for name, _ in told] == ["deaf"]
        assert file.wake_at(5.0) == 5.0 + files.WATCH_AGAIN
        file._selector = selector
        file._watch_at = 0.0
        file.tend(0.0)
        assert [key.fileobj for key in selector.get_map().values()] == [file._control]
        assert file.wake_at(5.0) is None
        os.kill(file.pid, signal.SIGKILL)
        hear_until(file, lambda: not selector.get_map())
        file._selector = None


def test_one_that_nobody_could_take_the_place_of_does_not_leave(file: LogFile, tmp_path: Path) -> None:
    (tmp_path / "log").rename(tmp_path / "away")
    leave(file)
    file.pipe.write([b"a line\n"])
    file.ask(Ask.FLUSH)
    file.flushed(time.monotonic() + watch.DEADLINE)
    assert (tmp_path / "away").read_text() == "a line\n"
    (tmp_path / "away").rename(tmp_path / "log")


@pytest.mark.parametrize("dead", [False, True])
def test_a_file_is_opened_again_by_who_writes_it_or_who_comes_next(
    file: LogFile, told: list[Any], tmp_path: Path, *, dead: bool
) -> None:
    path = Path(file.path)
    file.pipe.write([b"old\n"])
    written(file)
    path.rename(tmp_path / "old")
    if dead:
        os.kill(file.pid, signal.SIGKILL)
        end(file, 1.0)
    assert file.ask(Ask.REOPEN)
    file.tend(100.0)
    hear_until(file, lambda: ("reopened", {"paths": file.path}) in told)
    file.pipe.write([b"new\n"])
    assert written(file) == "new\n"
    assert path.stat().st_mode & 0o777 == 0o600


def hear_until(file: LogFile, true: Callable[[], object]) -> None:
    """Hear the process until something has been told."""

    def look() -> object:
        file.hear()
        return true()

    watch.until("that is told", look)


def test_a_file_that_can_not_be_opened_again_is_written_on(file: LogFile, told: list[Any], tmp_path: Path) -> None:
    path = Path(file.path)
    path.rename(tmp_path / "old")
    path.mkdir()
    assert file.ask(Ask.REOPEN)
    hear_until(file, lambda: told)
    assert told == [("log_kept", {"path": file.path, "reason": os.strerror(errno.EISDIR)})]
    path.rmdir()
    (tmp_path / "old").rename(path)
    file.pipe.write([b"a line\n"])
    assert written(file) == "a line\n"


def test_what_the_disk_does_not_take_is_counted_and_told(file: LogFile, told: list[Any]) -> None:
    file.pipe.write([b"a line\n"])
    before = written(file)
    # The limit of a file's size is to a writer what a full disk is: first a short write, then none (setrlimit(2)).
    resource.prlimit(file.pid, resource.RLIMIT_FSIZE, (len(before) + 10, resource.RLIM_INFINITY))
    file.pipe.write([b"0123\n", b"torn and not whole\n", b"lost\n"])
    assert written(file) == "a line\n0123\ntorn "
    file.pipe.write([b"lost, too\n"])
    assert written(file) == "a line\n0123\ntorn "
    # There is room for a line, and not for the one that tells of the others: it is told of later.
    resource.prlimit(file.pid, resource.RLIMIT_FSIZE, (len(before) + 10 + 12, resource.RLIM_INFINITY))
    file.pipe.write([b"some room\n"])
    assert written(file) == "a line\n0123\ntorn \nsome room\n3"
    resource.prlimit(file.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    file.pipe.write([b"there is room\n"])
    assert written(file) == "a line\n0123\ntorn \nsome room\n3\nthere is room\n3 are missing\n"
    file.pipe.write([b"another\n"])
    assert written(file).endswith("\n3 are missing\nanother\n")


def test_a_flood_does_not_keep_it_from_saying_what_is_written(file: LogFile) -> None:
    ended = threading.Event()

    def flood() -> None:
        while not ended.is_set():
            file.pipe.write([b"x" * 1000 + b"\n"] * 16)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(10):
            written(file)
    finally:
        ended.set()
        thread.join()


# -- in a daemon


def test_a_daemon_whose_log_hangs_counts_what_it_dropped(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    options = {"workers": 1, "max_workers": 1, "log_format": "json", "log_file": str(path), "access_log": "-"}
    server = prefork_server("mine:loop", folder=module(HANDLER), **options)
    watch.settled(server, 1)
    asked = 40
    with stopped(watch.log_writer(server, path)):
        for _ in range(asked):
            assert ask(server, "lines") == b"done"
        full = path.stat().st_size
    watch.until("the pipe is read", lambda: path.stat().st_size > full)
    assert ask(server, "nothing") == b"done"
    watch.until("it is counted", lambda: server.status()["totals"]["ok"] == asked + 1)
    server.stop()
    entries = [entry for entry in log_schema.read(path.read_text()) if entry["role"].startswith("gen 1 worker")]
    dropped = sum(entry["count"] for entry in entries if entry["event"] == "dropped")
    printed = sum(entry["event"] in ("output", "access") for entry in entries)
    assert dropped > 0
    assert dropped + printed == asked * 501 + 1


@pytest.mark.slow
def test_a_daemon_whose_log_hangs_serves_reloads_upgrades_and_ends(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    options = {"workers": 2, "log_file": str(path), "access_log": str(tmp_path / "access")}
    server = prefork_server("mine:loop", folder=module(HANDLER), **options)
    pids = [watch.log_writer(server, path), watch.log_writer(server, tmp_path / "access")]
    with stopped(pids[0]), stopped(pids[1]):
        for _ in range(16):
            assert ask(server, "lines") == b"done"
        os.kill(server.pid, signal.SIGUSR1)
        assert server.command("reload")["ok"]
        assert ask(server, "lines") == b"done"
        assert server.command("upgrade")["ok"]
        assert server.command("scale", workers=3)["ok"]
        watch.settled(server, 3)
        assert ask(server, "lines") == b"done"
        assert server.stop() == 0
    watch.until("who wrote has ended", lambda: all(map(watch.is_gone, pids)))
    assert " serving " in path.read_text()


def test_lines_of_a_killed_masters_workers_are_written_to_the_last(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=2, log_file=str(path), access_log="-")
    pid = watch.log_writer(server, path)
    with server.connect() as sock:
        sock.sendall(b"hold")
        assert sock.recv(4) == b"held"
        server.process.kill()
        server.process.wait()
        sock.sendall(b"x")
        assert sock.recv(4) == b"done"
    watch.until("who wrote has ended", lambda: watch.is_gone(pid))
    assert "let go" in path.read_text()
    assert " ok after " in path.read_text()


def test_a_killed_writer_costs_a_daemon_no_line(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    server = prefork_server("mine:loop", folder=module(HANDLER), workers=2, log_file=str(path), access_log="-")
    pid, asked = watch.log_writer(server, path), 20
    with stopped(pid):
        for _ in range(asked):
            assert ask(server, "nothing") == b"done"
        watch.until("all are counted", lambda: server.status()["totals"]["ok"] == asked)
        os.kill(pid, signal.SIGKILL)
    holds(path, " ok after ", asked)
    assert (
        path.read_text().count(f"the process that writes {path} has ended (signal 9 (SIGKILL)); another one takes its place") == 1
    )
    assert server.stop() == 0


def test_who_has_closed_every_descriptor_is_still_heard(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    closes = (
        "import os\n\ndef loop(sock):\n    first = int(sock.recv(1))\n    sock.sendall(b'done')\n    os.closerange(first, 99)\n"
    )
    for first in ("3", "0"):
        server = prefork_server("mine:loop", folder=module(closes), workers=1, log_file=str(path), access_log="-")
        assert ask(server, first) == b"done"
        holds(path, " ok after ")
        path.unlink()
        server.stop()


@pytest.mark.slow
def test_a_log_on_a_file_system_that_is_frozen_stops_nobody(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount and freeze a file system")
    watch.needs("fsfreeze")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["truncate", "--size=16M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        path = disk / "log"
        server = prefork_server("mine:loop", folder=module(HANDLER), workers=2, log_file=str(path), access_log="-")
        subprocess.run(["fsfreeze", "--freeze", disk], check=True)
        try:
            for _ in range(20):
                assert ask(server, "lines") == b"done"
            watch.until(
                "the disk is waited for",
                lambda: psutil.Process(watch.log_writer(server, path)).status() == psutil.STATUS_DISK_SLEEP,
            )
            assert server.command("reload")["ok"]
            assert ask(server, "nothing") == b"done"
            pid = watch.log_writer(server, path)
            assert server.stop() == 0
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
        watch.until("who wrote has ended", lambda: watch.is_gone(pid))
        assert path.read_text().count(" ok after ") > 0
        assert re.search(r"stdout: line 499 x{60}\n", path.read_text())
    finally:
        subprocess.run(["umount", disk], check=True)
