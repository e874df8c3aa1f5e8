"""The manual page prefork(1), in roff (man(7), groff_man(7)), made of what ``--help`` says, and of the log's events."""

import inspect
import re
from collections.abc import Iterable, Iterator

import click

from prefork import __version__
from prefork.log import EVENTS
from prefork.log.events import template

SEE_ALSO = "prefork status --json is described in the README. accept(2), signal(7), socket(7), unix(7), systemd.service(5)"
# Titles of lists in help that become sections of their own.
SECTIONS = {
    "Signals": "SIGNALS",
    "Exit codes": "EXIT STATUS",
    "Environment": "ENVIRONMENT",
    "Files": "FILES",
    "Examples": "EXAMPLES",
}


def page(group: click.Group, server: click.Command) -> str:
    """The page of a program with these commands; the options of ``server`` have a section of their own."""
    top = click.Context(group, info_name="prefork")
    first, *more = _paragraphs(group.help)
    commands = {name: click.Context(command, top, name) for name, command in group.commands.items()}
    general = _options(click.Context(server, top, "serve"))
    texts = [group.help, group.epilog, *(command.help for command in group.commands.values())]
    lines = [
        f'.TH PREFORK 1 "" "prefork {__version__}" "User Commands"',
        *_section("NAME", [f"prefork \\- {_text(first[0].lower() + first[1:].rstrip('.'))}"]),
        *_section("SYNOPSIS", [line for context in commands.values() for line in (_usage(context), ".br")][:-1]),
        *_section("DESCRIPTION", _prose(more)),
        *_section("COMMANDS", []),
    ]
    for context in commands.values():
        own = [record for record in _options(context) if record not in general]
        lines += [f'.SS "{_text(context.command_path)}"', *_prose(_paragraphs(context.command.help)), *_items(own)]
    lines += _section("OPTIONS OF SERVE AND CHECK", _items(general))
    lines += _section("OTHER OPTIONS", _items(record for p in group.get_params(top) if (record := p.get_help_record(top))))
    for title, heading in SECTIONS.items():
        found: dict[str, str] = {}
        for term, meaning in (item for text in texts for item in _list(text, title)):
            found.setdefault(term, meaning)
        lines += _section(heading, _items(found.items()))
    events = ((name, f"({level.name.lower()}) {template(name)}") for name, (level, _) in EVENTS.items())
    lines += _section("LOG EVENTS", ["What stands in braces is a field of its own in the JSON format.", *_items(events)])
    lines += _section("SEE ALSO", [_text(SEE_ALSO)])
    return "\n".join(lines) + "\n"


def _section(heading: str, lines: list[str]) -> list[str]:
    return [f'.SH "{heading}"', *lines]


def _options(context: click.Context) -> list[tuple[str, str]]:
    """The options of a command as its help has them: how they are written, what they mean."""
    own = [p for p in context.command.params if isinstance(p, click.Option)]
    return [record for p in own if (record := p.get_help_record(context))]


def _usage(context: click.Context) -> str:
    pieces = " ".join(context.command.collect_usage_pieces(context))
    return f"\\fB{_text(context.command_path)}\\fP {_text(pieces)}".rstrip()


def _blocks(text: str | None) -> Iterator[list[str]]:
    """The paragraphs of a help text, as lines."""
    for block in inspect.cleandoc(text or "").split("\n\n"):
        yield block.strip("\n").splitlines()


def _paragraphs(text: str | None) -> list[str]:
    """Those that are prose, each in one line."""
    return [" ".join(lines) for lines in _blocks(text) if lines and lines[0] != "\b"]


def _list(text: str | None, title: str) -> Iterator[tuple[str, str]]:
    """The items of the list with this title: a term and what it means."""
    for lines in _blocks(text):
        if lines[:2] == ["\b", f"{title}:"]:
            for line in lines[2:]:
                term, _, meaning = line.strip().partition("   ")
                yield term, meaning.strip()


def _prose(paragraphs: list[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in (".PP", _text(paragraph))]


def _items(items: Iterable[tuple[str, str]]) -> list[str]:
    lines: list[str] = []
    for term, meaning in items:
        lines += (
            [".TP", f"\\fB{_text(term)}\\fP", _text(" ".join(meaning.split()))] if meaning else [".PP", f"\\fB{_text(term)}\\fP"]
        )
    return lines


def _text(text: str) -> str:
    """Text that means itself: man(7) takes - for a hyphen, ' and ` for quotation marks, and a line's first . or ' for a request."""
    for character, escape in {"\\": "\\(rs", "-": "\\-", "'": "\\(aq", '"': "\\(dq", "~": "\\(ti", "^": "\\(ha"}.items():
        text = text.replace(character, escape)
    text = re.sub("`([^`]*)`", r"\\fB\1\\fP", text)
    return "\\&" + text if text.startswith(".") else text
