"""What the README and the help say is so."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from prefork.cli import main
from prefork.config import OPTIONS, Config
from prefork.testing import serve

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


def test_the_examples_of_the_readme_run(module: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    handler, example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(module(handler))
    names: dict[str, Callable[[], None]] = {}
    exec(example, names)  # our own README
    names["test_echo"]()
    with serve("mine:loop") as server:
        assert server.status()["module"] == "mine:loop"


def test_the_minimal_configuration_runs_as_it_stands() -> None:
    file = Path(__file__).parents[2] / "conf" / "minimal.toml"
    # Only the port is another one: the default may be taken here.
    with serve("", arguments=("--config", str(file))) as server:
        assert server.status()["module"] == "echo:loop"


def test_every_command_has_help_with_a_sentence() -> None:
    for name in main.commands:
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0
        assert done.output.count(".") >= 1, name
