"""The state that an upgrade carries: every format ever written is read or refused, and nonsense is told, whatever it is."""

import copy
import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from prefork import carried
from prefork.carried import State, StateError
from tests import states
from tests.states import LATEST, PLAIN, WAYS, Way


def test_a_file_of_every_format_stays() -> None:
    assert [path.name for path in states.FILES] == [f"{number}.json" for number in range(1, carried.FORMAT + 1)]


@pytest.mark.parametrize("path", states.FILES, ids=lambda path: path.name)
def test_what_an_older_prefork_has_written_is_understood(path: Path) -> None:
    """Recorded from a daemon with two addresses, a connection of an older generation, and a worker that was killed.

    What no daemon has all at once was written into it: a fork that has failed, a log file, a listener that is being closed.
    """
    state = carried.read(path.read_bytes())
    assert [generation.number for generation in state.generations] == [2, 1]
    assert len(state.current_listeners) == 2
    assert [worker.retiring for worker in state.generations[1].pool.workers] == [True]
    assert state.tally.deaths[0].cause == "signal 9 (SIGKILL)"


def test_what_is_written_is_read_back() -> None:
    state = carried.read(LATEST)
    assert carried.read(carried.write(state)) == state
    assert json.loads(carried.write(state)) == PLAIN, "this format is not the one that was recorded: count FORMAT up, and record it"


def kinds(kind: Any) -> Iterator[type]:
    """The dataclasses that a value of this type can hold."""
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from kinds(hint)
    for inner in typing.get_args(kind):
        yield from kinds(inner)


def held(value: Any) -> Iterator[Any]:
    """The dataclass instances in a value."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from held(getattr(value, field.name))
    elif isinstance(value, dict | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from held(inner)


def test_no_field_of_the_latest_recorded_state_is_empty_everywhere() -> None:
    """What is null or an empty list in the file says nothing of its fields: they could be renamed, and no test would know."""
    filled = {
        (type(value), field.name)
        for value in held(carried.read(LATEST))
        for field in dataclasses.fields(value)
        if getattr(value, field.name) not in (None, (), {})
    }
    known = {(kind, field.name) for kind in kinds(State) for field in dataclasses.fields(kind) if field.init}
    assert known - filled == set()


@pytest.mark.parametrize("name", sorted({field.name for kind in kinds(State) for field in dataclasses.fields(kind) if field.init}))
def test_a_field_of_another_name_is_refused_wherever_it_stands(name: str) -> None:
    ways = [way for way in WAYS if way[-1] == name and "config" not in way[:-1]]
    assert ways
    for way in ways:
        plain = copy.deepcopy(PLAIN)
        inner = plain
        for key in way[:-1]:
            inner = inner[key]
        inner["renamed"] = inner.pop(name)
        with pytest.raises(StateError, match=r"unknown 'renamed'|writes (format|board|wire) None"):
            carried.read(json.dumps(plain).encode())


@pytest.mark.parametrize("name", ["format", "board", "wire"])
@pytest.mark.parametrize("number", [0, 2, -1, 10**30, "1", None, True, 1.5])
def test_another_format_is_refused_by_its_number(name: str, number: object) -> None:
    with pytest.raises(StateError, match=f"writes {name} .*, and this one reads {name} 1: it takes a restart"):
        carried.read(json.dumps({**PLAIN, name: number}).encode())


@pytest.mark.parametrize("way", [way for way in WAYS if isinstance(way[-1], str) and "config" not in way and len(way) < 4], ids=str)
def test_a_field_of_another_type_is_told_with_its_place(way: Way) -> None:
    with pytest.raises(StateError, match=r"makes no sense: state|writes (format|board|wire)"):
        carried.read(states.changed((way, [[{}]])))


@pytest.mark.parametrize(
    ("way", "value", "what"),
    [
        (("current_listeners", 0), 7, "7 is not a listener"),
        (("generations", 1, "number"), 2, "two generations of one number"),
        (("generations",), [], "no generation"),
        (("generations", 0, "pool", "workers", 0, "slot"), 10**6, "is not a slot"),
        (("generations", 0, "pool", "workers", 0, "slot"), PLAIN["generations"][0]["pool"]["workers"][1]["slot"], "two workers"),
        (("generations", 0, "layout", "capacity"), 0, "a board of another shape"),
        (("generations", 0, "layout", "capacity"), 1 << 40, "a board of another shape"),
        (("generations", 0, "targets"), [1], "not one target for each listener"),
        (("generations", 0, "link", "board"), -1, "no descriptor"),
        (("generations", 0, "link", "outbox"), ["xy"], "non-hexadecimal"),
        (("wiring", "devnull"), PLAIN["wiring"]["doorbell_read"], "a descriptor twice"),
        (("wiring", "devnull"), 1 << 31, "no descriptor"),
        (("tally", "histogram"), [0], "1 buckets"),
        (("pid",), 1 << 100, "no number of 100 bits"),
        (("started",), True, "state.started is no float"),
        (("unheard",), 1, "unknown 'unheard'"),
    ],
)
def test_fields_that_do_not_fit_are_told(way: Way, value: object, what: str) -> None:
    with pytest.raises(StateError, match=what):
        carried.read(states.changed((way, value)))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": 1e999}', b'{"format": NaN}'])
def test_what_is_no_state_at_all_is_told(data: bytes) -> None:
    with pytest.raises(StateError):
        carried.read(data)


@given(states.spoilt())
def test_anything_is_read_or_told(data: bytes) -> None:
    try:
        state = carried.read(data)
    except StateError:
        return
    assert carried.read(carried.write(state)) == state
