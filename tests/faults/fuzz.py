"""``python -m tests.faults.fuzz [TARGET ...] [--seconds S]``: whatever reads what others have written, for as long as you say.

A target draws an input, reads it, and checks what was read: only the errors that are documented may come out, within LONGEST.
Inputs are hypothesis', which makes a failing one small before it is shown. A reader is put here by the `target` decorator.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from prefork import carried, config
from prefork.carried import StateError
from prefork.config import OPTIONS, Sources, variable
from prefork.errors import ConfigError
from prefork.net import address
from prefork.ops import control
from prefork.pool import wire
from prefork.pool.wire import Command, Doorbell, Kind, Order, Report, Ring
from tests import states

# CPU seconds that a reader may take for one input: the master reads while it should be supervising.
LONGEST = 2.0
# Inputs of one run of hypothesis, which are its memory: then it begins anew with another seed.
AT_ONCE = 400

Read = Callable[[Any], None]
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Read]] = {}


def target(inputs: st.SearchStrategy[Any]) -> Callable[[Read], Read]:
    """A decorator: this function reads such inputs, and raises when it finds something wrong."""

    def register(read: Read) -> Read:
        TARGETS[read.__name__] = (inputs, read)
        return read

    return register


class HangError(AssertionError):
    """A reader has taken too long."""


def _too_long(_signo: int, _frame: object) -> NoReturn:
    raise HangError(f"more than {LONGEST:g} s of CPU for one input")


def fuzz(name: str, seconds: float, first_seed: int = 0) -> dict[str, Any]:
    """Read inputs for so long, and AT_ONCE of them however long that takes: what these find does not hang on the machine.

    Returns how many; raises what a reader has raised, with the input that made it do so.
    """
    inputs, read = TARGETS[name]
    number, figures = first_seed, {"inputs": 0, "slowest": 0.0}
    before = signal.signal(signal.SIGVTALRM, _too_long)
    try:
        end = time.monotonic() + seconds
        _run(inputs, read, number, figures)
        while time.monotonic() < end:
            number += 1
            _run(inputs, read, number, figures)
    finally:
        signal.signal(signal.SIGVTALRM, before)
    return figures


def _run(inputs: st.SearchStrategy[Any], read: Read, number: int, figures: dict[str, Any]) -> None:
    @seed(number)
    @settings(
        max_examples=AT_ONCE,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(value: Any) -> None:
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
        try:
            read(value)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        figures["inputs"] += 1
        figures["slowest"] = max(figures["slowest"], time.process_time() - begun)

    one()


# -- the records

_u32, _u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
_rings = st.builds(lambda why, *numbers: wire.doorbell_of(why, numbers[0])(*numbers[1:]), st.sampled_from(Ring), _u32, _u32, _u32)
_magic = wire.doorbell_of(Ring.READY, 0)(0, 0)[:2]
_plain = st.sampled_from([kind for kind in Kind if kind is not Kind.FAILED])
_reports = st.builds(Report, _plain, _u32, _u32, st.integers(-(2**31), 2**31 - 1), _u64, _u64, _u64).map(wire.pack_report)
_failures = st.text().map(lambda text: wire.pack_report(Report(Kind.FAILED, text=text)))
_commands = st.builds(Command, st.sampled_from(Order), _u32).map(wire.pack_command)


def spoilt(good: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Good bytes, bytes that were good but for one, pieces of them, and any bytes."""

    def change(draw: tuple[bytes, int, int]) -> bytes:
        data, at, byte = draw
        at %= max(1, len(data))
        return data[:at] + bytes([byte]) + data[at + 1 :]

    cut = st.tuples(good, st.integers(0, 64)).map(lambda draw: draw[0][: draw[1]])
    return good | st.tuples(good, st.integers(0, 1 << 16), st.integers(0, 255)).map(change) | cut | st.binary(max_size=80)


@target(st.lists(spoilt(_rings) | st.just(_magic), max_size=40).map(b"".join))
def doorbells(data: bytes) -> None:
    """Every byte is a ring's or counted, and nothing is invented."""
    rings, stray = wire.read_doorbells(data)
    assert len(rings) * wire.DOORBELL_SIZE + stray == len(data)
    at = 0
    for ring in rings:
        at = data.index(_packed(ring), at) + wire.DOORBELL_SIZE


def _packed(ring: Doorbell) -> bytes:
    return wire.doorbell_of(ring.why, ring.generation)(ring.slot, ring.pid)


@target(spoilt(_reports | _failures))
def reports(message: bytes) -> None:
    """What is taken for a report is one: packed again it reads the same."""
    found = wire.read_report(message)
    if found is not None:
        assert wire.read_report(wire.pack_report(found)) == found


@target(spoilt(_commands))
def commands(message: bytes) -> None:
    """The same for orders."""
    found = wire.read_command(message)
    if found is not None:
        assert wire.read_command(wire.pack_command(found)) == found


# -- what users write

_scraps = [
    *("unix:", "/", "/run/x", "?", "mode=", "0660", "user=", "&", "%", "www-data", "fd:", "systemd:", "[", "]", "::", "::1", ":"),
    *("127.0.0.1", "localhost", "0.0.0.0", "65535", "65536", "7000", "-1", "*", ".", "0x", "é", "\0", "\n", " ", "%25", "%eth0"),
]
_addresses = st.lists(st.sampled_from(_scraps) | st.text(max_size=4), max_size=8).map("".join)


@target(_addresses | st.text())
def addresses(text: str) -> None:
    """ValueError, or an address that is written back as one that means the same."""
    try:
        found = address.parse(text)
    except ValueError:
        return
    assert address.parse(found.text) == found, found


_words = st.sampled_from(
    ["echo:loop", "on", "off", "debug", "json", "1.5", "30s", "1h", "256M", "8", "0", "-1", "nobody", "027", "nofile=64,as=1G", ""]
)
_texts = _words | _addresses | st.text(max_size=12)
_keys = st.sampled_from([*OPTIONS]) | st.text(max_size=6)
_plain_values = _texts | st.integers() | st.floats() | st.booleans() | st.none() | st.datetimes()
_values = st.recursive(
    _plain_values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=5
)


def loaded(sources: Sources) -> None:
    """ConfigError, or a configuration that is written as TOML and read back as the same."""
    try:
        found = sources.load()
    except ConfigError as error:
        assert str(error)
        return
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(config.document(found, dict.fromkeys(OPTIONS, "why")))
        file.flush()
        assert Sources(file=file.name).load() == found


def _read_text(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        loaded(Sources({"module": "echo:loop"}, file=file.name))


def _toml(value: Any) -> str:
    """A value as it may stand in a file: JSON's way of writing is TOML's for most of them."""
    return json.dumps(value, default=str, ensure_ascii=False)


_lines = st.tuples(_keys, st.sampled_from([" = ", "=", " ", ".", " = ["]), _values).map(lambda p: f"{p[0]}{p[1]}{_toml(p[2])}\n")
_pieces = st.sampled_from(
    [
        "a.",
        "'a'.",
        "[",
        "]",
        "{",
        "}",
        "[a]\n",
        "[[a]]\n",
        "'",
        '"',
        '"""',
        "'''",
        "\\",
        "#",
        "=",
        ",",
        "0",
        "1_",
        "a",
        "\n",
        " ",
        "a={b=",
    ]
)
# A megabyte of something: what is quadratic shows.
_long = st.tuples(st.text(max_size=3), st.lists(_pieces, min_size=1, max_size=3).map("".join), st.integers(1, 60_000)).map(
    lambda parts: (parts[0] + parts[1] * parts[2])[:900_000]
)


@target(
    st.lists(_lines | _pieces, max_size=8).map("".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | _long.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=200)
)
def toml(data: bytes) -> None:
    """A configuration file of whatever bytes."""
    _read_text(data)


@target(st.dictionaries(_keys.map(variable), _texts, max_size=6))
def environment(variables: dict[str, str]) -> None:
    """Variables of the environment, among them names that are no options."""
    for _, remedy in config.unknown_variables(variables):
        assert remedy
    known = {name: text for name, text in variables.items() if name.removeprefix("PREFORK_").lower() in OPTIONS}
    loaded(Sources({"module": "echo:loop"}, known))


@target(st.dictionaries(_keys, _texts | st.lists(_texts, max_size=3).map(tuple) | _values, max_size=6))
def command_line(options: dict[str, Any]) -> None:
    """Values of the command line and keywords of prefork.Server."""
    loaded(Sources(options))
    loaded(Sources({"module": "echo:loop"}, keywords=options))


@target(st.text() | st.from_regex(control.VALID_SCALE))
def scale(text: str) -> None:
    """What prefork scale takes."""
    with suppress(ValueError):
        assert isinstance(control.scaled(text, 8), int)
        assert re.fullmatch(r"[+-]?[0-9]+", text)


@target(states.spoilt())
def state(data: bytes) -> None:
    """What an upgrade carries."""
    try:
        found = carried.read(data)
    except StateError:
        return
    assert carried.read(carried.write(found)) == found


def main() -> int:
    """Fuzz the targets named (all without any), each for so long, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz")
    parser.add_argument("target", nargs="*", choices=[*TARGETS, []], help="all of them when none is named")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long each is fuzzed")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="where to begin; else anywhere")
    given_ = parser.parse_args()
    for name in given_.target or TARGETS:
        print(json.dumps({"target": name, "seed": given_.seed, **fuzz(name, given_.seconds, given_.seed)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
