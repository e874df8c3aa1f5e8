"""Comparisons: who takes part, and what is not begun."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import workloads
from tests.bench.load import Generator, Held
from tests.bench.settings import SMOKE
from tests.bench.workloads import NoMemoryError, Place, hold


class Memory:
    """A machine with 10 GB, of which each held connection takes 1 MB."""

    def __init__(self) -> None:
        self.free = 10_000_000_000

    @contextmanager
    def holding(self, connections: int) -> Iterator[Held]:
        self.free -= connections * 1_000_000
        yield Held(0, 0.5)
        self.free += connections * 1_000_000


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> Place:
    memory = Memory()
    monkeypatch.setattr(workloads, "available", lambda: memory.free)
    monkeypatch.setattr(Generator, "holding", lambda _, __, connections: memory.holding(connections))
    return Place(Path(), Generator(Path()), SMOKE, print)


def test_what_there_is_memory_for_is_held(where: Place) -> None:
    with ExitStack() as stack:
        assert hold(where, 1, 2500, stack) == 1.5


def test_no_more_is_held_than_there_is_memory_for(where: Place) -> None:
    # 2 GiB are not to be touched, and 7 times 1 GB are there.
    with ExitStack() as stack, pytest.raises(NoMemoryError, match=r"7000 have taken 7\.0 GB, 3\.0 GB are left") as raised:
        hold(where, 1, 10_000, stack)
    assert raised.value.held == 7000


def test_prefork_and_those_who_can_take_part() -> None:
    place = Place(Path(), Generator(Path()), replace(SMOKE, peers=("floor", "asyncio", "forking")), print)
    assert [peer.name for peer in place.peers()] == ["prefork", "floor", "asyncio", "forking"]
    assert [peer.name for peer in place.peers(holding=500)] == ["prefork", "asyncio"]
    assert [peer.name for peer in place.peers("late")] == ["prefork"]
