"""Recorded states of upgrades, one of each format, and ways to spoil one."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from prefork import carried

FILES = sorted(Path(__file__).parent.glob("*.json"))
LATEST = (Path(__file__).parent / f"{carried.FORMAT}.json").read_bytes()
PLAIN: dict[str, Any] = json.loads(LATEST)
Way = tuple[Any, ...]


def places(plain: Any, way: Way = ()) -> Iterator[Way]:
    """The way to everything in it."""
    yield way
    entries = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in entries:
        yield from places(value, (*way, key))


WAYS = [way for way in places(PLAIN) if way and way[0] != "kept"]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def changed(*changes: tuple[Way, Any]) -> bytes:
    """The latest one with other values in these places, as far as these are there."""
    plain = copy.deepcopy(PLAIN)
    for way, value in changes:
        inner = plain
        try:
            for key in way[:-1]:
                inner = inner[key]
            inner[way[-1]] = value
        except (LookupError, TypeError):
            continue  # another change has taken that place away
    return json.dumps(plain).encode()


def spoilt() -> st.SearchStrategy[bytes]:
    """States with a few values changed, and bytes that are none."""
    changes = st.lists(st.tuples(st.sampled_from(WAYS), _JSON), min_size=1, max_size=3)
    cut = st.integers(0, len(LATEST)).map(lambda end: LATEST[:end])
    return changes.map(lambda made: changed(*made)) | cut | st.binary(max_size=200)
