"""What the README and the help say is so."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from prefork.cli import main
from prefork.config import OPTIONS, Config
from prefork.testing import Server, serve
from tests import watch

README = (Path(__file__).parents[2] / "README.md").read_text()


def commands() -> Iterator[tuple[str, str]]:
    """Every ``prefork ...`` line in the README and in the help texts, and where it stands."""
    texts = {"README": README, **{name: command.help or "" for name, command in main.commands.items()}, "prefork": main.help or ""}
    for where, text in texts.items():
        for found in re.findall(rf"(?:^\s+|bin/|`)prefork ((?:{'|'.join(main.commands)})(?: [^`\n]*)?)", text, re.MULTILINE):
            yield where, re.split(r"\s{3,}| [|>]", found)[0]


@pytest.mark.parametrize(("where", "line"), sorted(set(commands())))
def test_every_command_that_is_shown_can_be_parsed(where: str, line: str) -> None:
    name, *arguments = shlex.split(re.sub(r"\\\||\[|\]|N\|\+K\|-K", " ", line).replace(" NAME", " echo"))
    command = main.commands[name]
    context = command.make_context(name, arguments, resilient_parsing=False)
    assert isinstance(context, click.Context)


def test_the_table_of_options_is_that_of_the_program() -> None:
    rows = re.findall(r"^\| (\w+)(?:, -\w)? \|([^|]*)\|", README, re.MULTILINE)
    told = {key: default.strip() for key, default in rows if key in OPTIONS}
    assert list(told) == list(OPTIONS)
    for key, default in told.items():
        value = getattr(Config(), key)
        if isinstance(value, bool):
            assert default == ("on" if value else "off"), key
        elif isinstance(value, int | float):
            assert float(default) == value, key
        elif isinstance(value, tuple) and value:
            assert default == ", ".join(map(str, value))
        elif value:
            assert default == value


def test_the_status_of_the_readme_is_that_of_a_daemon(prefork_server: Callable[..., Server]) -> None:
    block = re.search(r'^(    {"name", "module", "version".*?})$', README, re.MULTILINE | re.DOTALL)
    assert block is not None
    status = prefork_server("echo:loop", workers=1).status()

    def keys(of: object) -> list[str]:
        """All of them, in the order in which they are written."""
        entries = of.items() if isinstance(of, dict) else ()
        return [name for key, value in entries for name in (key, *keys(value[0] if isinstance(value, list) and value else value))]

    # What is null or empty in a daemon at rest.
    empty = r'(?<="reload": ){.*?}|(?<="backoff": ){.*?}|(?<="overdue": )\[{.*?}\]|(?<="deaths": )\[{.*?}\]'
    told = re.findall(r'"(\w+)"', re.sub(rf': "[^"]*"|{empty}', "", block[1]))
    assert told == keys(status)


def test_the_readme_answers_in_the_order_of_the_questions() -> None:
    assert re.findall(r"^## (.*)", README, re.MULTILINE) == [
        "What you get",
        "Configuration",
        "Signals",
        "Handlers",
        "Testing your handler",
        "As a service",
        "Operating",
        "Logging",
        "Speed",
        "Limits and non-goals",
    ]


EXAMPLES = re.findall(r"^\| `(\w+)`.*? \| `prefork serve (.*?)` \| `(.*)` \|$", README, re.MULTILINE)
ANSWERS = {"echo": "hello", "static": "README", "policy": "action=", "kv": "1"}


@pytest.mark.parametrize(("name", "options", "command"), EXAMPLES)
def test_the_examples_of_the_readme_answer_as_shown(name: str, options: str, command: str, tmp_path: Path) -> None:
    client = re.findall(r"(socat|curl|redis-cli)", command)[-1]
    if shutil.which(client) is None:
        assert os.environ.get("CI") != "true", f"CI has {client}"
        pytest.skip(f"{client} is not installed")
    (tmp_path / "README").write_text("to be listed")
    with serve("", folder=tmp_path, arguments=tuple(shlex.split(options))) as server:
        shown = command.replace("\\|", "|").replace("7000", str(server.address[1]))
        done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=False, timeout=30)
    assert ANSWERS[name] in done.stdout, done


def test_every_example_is_in_the_readme() -> None:
    assert [name for name, _, _ in EXAMPLES] == list(ANSWERS)


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with every module that the README shows: those blocks whose first line is their file's name."""
    for block in BLOCKS:
        if name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_python_block_of_the_readme_is_a_module_or_a_test() -> None:
    assert all(block.startswith("# ") or "def test_" in block for block in BLOCKS)


def test_the_tests_of_the_readme_pass(folder: Path) -> None:
    ran = []
    for block in BLOCKS:
        names: dict[str, Callable[[], None]] = {}
        if "def test_" in block:
            exec(block, names)  # our own README
        for name, function in names.items():
            if name.startswith("test_"):
                function()
                ran.append(name)
    assert ran == ["test_echo"]


def test_the_program_of_the_readme_serves_and_stops(folder: Path) -> None:
    port, control = watch.free_port(), folder / "control"
    program = (folder / "main.py").read_text()
    assert 'bind=":7000"' in program
    (folder / "main.py").write_text(program.replace('":7000"', f'"127.0.0.1:{port}"'))
    settings = {**os.environ, "PREFORK_CONTROL": str(control)}
    process = subprocess.Popen([sys.executable, "main.py"], env=settings, stderr=subprocess.DEVNULL)
    server = Server(("127.0.0.1", port), process.pid, str(control), folder / "log", process)
    try:
        watch.until("it is there", control.exists)
        watch.settled(server, 16)
        with server.connect() as sock:
            sock.sendall(b"hello")
            assert sock.recv(64) == b"hello"
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("bind", "source", "code", "says"),
    [
        ("nowhere", "", 78, "prefork: bind = 'nowhere' of prefork.Server: "),
        ("192.0.2.1:7000", "def loop(sock): pass\n", 69, "prefork: 192.0.2.1:7000: "),
        ("127.0.0.1:0", "1 / 0\n", 78, "prefork: mine:loop: the import raised\nTraceback "),
    ],
)
def test_the_program_of_the_readme_ends_as_the_command_line_does(
    folder: Path, bind: str, source: str, code: int, says: str
) -> None:
    program = (folder / "main.py").read_text()
    (folder / "main.py").write_text(program.replace('":7000"', repr(bind)))
    (folder / "mine.py").write_text(source)
    settings = {**os.environ, "PREFORK_CONTROL": "off"}
    done = subprocess.run([sys.executable, "main.py"], env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert says in done.stderr
    command = [sys.executable, "-P", "-m", "prefork", "serve", "mine:loop", f"--bind={bind}"]
    assert subprocess.run(command, env=settings, capture_output=True, timeout=60, check=False).returncode == code


def test_nothing_says_that_prefork_is_on_pypi() -> None:
    texts = [README, *(command.help or "" for command in main.commands.values())]
    assert not re.search(r"pip install (?:-\S+ )?'?prefork\b(?![-/])", "\n".join(texts))


def test_the_request_handler_of_the_readme_answers(folder: Path) -> None:
    with serve("shout:Shout") as server, server.connect() as sock:
        sock.sendall(b"hello\n")
        assert sock.recv(64) == b"HELLO\n"


def test_the_database_of_the_readme_survives_a_reload_and_a_killed_worker(folder: Path) -> None:
    line = re.search(r"^    prefork serve (--module visits.*)$", README, re.MULTILINE)
    assert line is not None
    with serve("", workers=2, spare_timeout=1, arguments=tuple(shlex.split(line[1]))) as server:

        def visit() -> bytes:
            with server.connect() as sock:
                sock.sendall(b"hello\n")
                return sock.recv(64)

        assert [visit(), visit()] == [b"visit 1\n", b"visit 2\n"]
        assert server.command("reload")["ok"]
        assert visit() == b"visit 3\n"
        killed = [worker["pid"] for worker in watch.settled(server, 2)["workers"]]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        watch.until("they are gone", lambda: all(map(watch.is_gone, killed)))
        watch.until("others have taken their places", lambda: not {w["pid"] for w in watch.workers(server)} & set(killed))
        watch.settled(server, 2)
        assert visit() == b"visit 4\n"
        assert "raised" not in server.log()


def test_the_minimal_configuration_runs_as_it_stands() -> None:
    file = Path(__file__).parents[2] / "conf" / "minimal.toml"
    # Only the port is another one: the default may be taken here.
    with serve("", arguments=("--config", str(file))) as server:
        assert server.status()["module"] == "echo:loop"


def test_every_command_has_help_with_a_sentence() -> None:
    for name in main.commands:
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0
        sentence = (main.commands[name].help or "").partition("\n")[0]
        assert sentence.endswith("."), name
        assert sentence[:40] in done.output
