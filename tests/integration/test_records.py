"""What user code gives to `logging`: entries of the log with their own level, whoever has configured what."""

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.testing import Server
from tests import log_schema, watch
from tests.integration.test_logging import ask

Start = Callable[..., Server]
Module = Callable[[str], Path]

HANDLER = """
import logging, os, threading
{setup}
log = logging.getLogger("mine.part")
log.info("imported")


def fail():
    try:
        [][0]
    except IndexError:
        log.exception("it failed\\n2026-01-01 00:00:00.000 INFO master[1]: forged")


def loop(sock):
    word = sock.recv(4096).decode()
    if word == "levels":
        for level in (10, 20, 25, 30, 40, 50):
            log.log(level, "level %d", level)
    if word == "root":
        logging.info("of the root logger")
    if word == "fail":
        fail()
    if word == "fork":
        child = os.fork()
        if child == 0:
            log.warning("from a child")
            os._exit(0)
        os.waitpid(child, 0)
    if word == "thread":
        thread = threading.Thread(target=log.warning, args=("from a thread",))
        thread.start()
        thread.join()
    sock.sendall(b"done")
"""
DICT_CONFIG = """
import logging.config
logging.config.dictConfig({
    "version": 1,
    "formatters": {"own": {"format": "<%(message)s>"}},
    "handlers": {
        "log": {"class": "prefork.LogHandler", "formatter": "own"},
        "file": {"class": "logging.FileHandler", "filename": "own"},
    },
    "loggers": {"mine": {"handlers": ["log"], "level": "DEBUG"}, "mine.quiet": {"handlers": ["file"], "propagate": False}},
})
logging.getLogger("mine.quiet").error("in the file only")
logging.getLogger("other").error("by default")
"""


def records(server: Server) -> list[dict[str, Any]]:
    return [entry for entry in log_schema.read(server.log()) if entry["event"] == "record"]


def start(prefork_server: Start, module: Module, setup: str = "", **options: Any) -> Server:
    return prefork_server("mine:loop", folder=module(HANDLER.replace("{setup}", setup)), workers=1, **options)


@pytest.mark.parametrize(
    ("log_level", "told"),
    [
        ("debug", ["debug", "info", "info", "warning", "error", "error"]),
        ("info", ["info", "info", "warning", "error", "error"]),
        ("error", ["error", "error"]),
    ],
)
def test_a_record_has_its_own_level_and_log_level_decides(
    prefork_server: Start, module: Module, log_level: str, told: list[str]
) -> None:
    server = start(prefork_server, module, log_format="json", log_level=log_level)
    ask(server, "levels")
    server.stop()
    found = [entry for entry in records(server) if entry["message"] != "imported"]
    assert [entry["level"] for entry in found] == told
    assert {(entry["logger"], entry["role"][:12]) for entry in found} == {("mine.part", "gen 1 worker")}
    assert "output" not in server.log()


def test_a_module_that_configures_nothing_is_heard_from_its_import_on(prefork_server: Start, module: Module) -> None:
    server = start(prefork_server, module, log_format="json")
    for word in ("root", "fork", "thread"):
        assert ask(server, word) == b"done"
    server.stop()
    assert [(entry["role"].rstrip(" 0123456789"), entry["logger"], entry["message"]) for entry in records(server)] == [
        ("gen", "mine.part", "imported"),
        ("gen 1 worker", "root", "of the root logger"),
        ("gen 1 worker", "mine.part", "from a child"),
        ("gen 1 worker", "mine.part", "from a thread"),
    ]
    assert "output" not in server.log()


def test_a_traceback_is_whole_in_one_entry_which_forges_no_line(prefork_server: Start, module: Module) -> None:
    server = start(prefork_server, module, log_format="json")
    ask(server, "fail")
    server.stop()
    [entry] = [entry for entry in records(server) if entry["level"] == "error"]
    assert entry["message"] == "it failed"
    assert entry["text"].startswith("2026-01-01 00:00:00.000 INFO master[1]: forged\nTraceback (most recent call last):\n")
    assert entry["text"].endswith("IndexError: list index out of range")


def test_a_traceback_is_below_its_line_in_text(prefork_server: Start, module: Module) -> None:
    server = start(prefork_server, module)
    ask(server, "fail")
    server.stop()
    head, *rest = server.log().partition("mine.part: it failed\n")[2].splitlines()
    assert head == "    2026-01-01 00:00:00.000 INFO master[1]: forged"
    assert rest[0] == "    Traceback (most recent call last):"
    assert "    IndexError: list index out of range" in rest


def test_dict_config_names_the_handler_and_no_record_comes_twice(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    server = start(prefork_server, module, DICT_CONFIG, log_format="json", log_level="debug")
    ask(server, "fail")
    server.stop()
    found = [(entry["logger"], entry["level"], entry["message"]) for entry in records(server)]
    assert found == [
        ("other", "error", "by default"),
        ("mine.part", "info", "<imported>"),
        ("mine.part", "error", "<it failed"),
    ]
    assert (tmp_path / "own").read_text() == "in the file only\n"


def test_a_handler_of_the_modules_own_is_left_alone(prefork_server: Start, module: Module) -> None:
    setup = 'logging.basicConfig(format="%(name)s said %(message)s")'
    server = start(prefork_server, module, setup, log_format="json", log_level="debug")
    ask(server, "levels")
    server.stop()
    printed = [entry["message"] for entry in log_schema.read(server.log()) if entry["event"] == "output"]
    assert printed == [f"mine.part said level {level}" for level in (30, 40, 50)]  # Python's level, not that of the log
    assert records(server) == []


def test_a_worker_that_configures_logging_is_obeyed(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    hook = "\n\ndef begin():\n    logging.basicConfig(filename='own', level='DEBUG')\n"
    server = start(prefork_server, module, hook, log_format="json", on_worker_start="mine:begin")
    ask(server, "root")
    server.stop()
    assert (tmp_path / "own").read_text() == "INFO:root:of the root logger\n"
    assert [entry["message"] for entry in records(server)] == ["imported"]


def test_http_servers_own_messages_are_no_warnings(prefork_server: Start, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    server = prefork_server("static:Files", folder=tmp_path, workers=1, log_format="json")
    assert server.address is not None
    url = f"http://127.0.0.1:{server.address[1]}"
    with urllib.request.urlopen(f"{url}/there", timeout=watch.DEADLINE) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/gone%1b", timeout=watch.DEADLINE)
    server.stop()
    found = [(entry["level"], entry["logger"], entry["message"].partition(" - ")[2]) for entry in records(server)]
    assert found == [
        ("info", "http.server", '"GET /there HTTP/1.1" 200 -'),
        ("warning", "http.server", "code 404, message File not found"),
        ("info", "http.server", '"GET /gone%1b HTTP/1.1" 404 -'),
    ]
    assert "output" not in server.log()


OWN_MESSAGES = """
import http.server


class Own(http.server.BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        print("own", format % args)

    def do_GET(self):
        self.send_error(418)
"""


def test_messages_of_a_subclass_are_its_own(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:Own", folder=module(OWN_MESSAGES), workers=1, log_format="json", log_level="warning")
    assert ask(server, "GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 418 ")
    server.stop()
    printed = [entry["message"] for entry in log_schema.read(server.log()) if entry["event"] == "output"]
    assert printed == ['own "GET / HTTP/1.0" 418 -']
    assert [(entry["level"], entry["message"].partition(" - ")[2]) for entry in records(server)] == [
        ("warning", "code 418, message I'm a Teapot")
    ]


def test_records_that_nobody_reads_keep_no_worker_waiting(prefork_server: Start, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "log"
    setup = "log = logging.getLogger()\nfor _ in range(400): log.error('x' * 5000)"
    server = start(prefork_server, module, setup, log_file=str(path), log_format="json")
    [writer] = [child for child in watch.family(server.pid) if " ".join(child.cmdline()).startswith("prefork: log ")]
    writer.send_signal(signal.SIGSTOP)
    try:
        with watch.soon("a thousand records that find no room"):
            for _ in range(3):
                assert ask(server, "levels") == b"done"
    finally:
        writer.send_signal(signal.SIGCONT)


def test_check_imports_with_the_same_handler_and_shows_what_is_logged(module: Module) -> None:
    folder = module(HANDLER.replace("{setup}", "assert logging.root.handlers"))
    command = [sys.executable, "-m", "prefork", "check", "--module=mine:loop"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "imported\n")
