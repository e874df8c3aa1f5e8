"""Readers of what others have written, fuzzed for a moment; `python -m tests.faults.fuzz` does it for as long as you like."""

from typing import Any

import pytest
from hypothesis import strategies as st

from tests.faults import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_reader_takes_whatever_there_is(name: str) -> None:
    assert fuzz.fuzz(name, seconds=0)["inputs"] >= fuzz.AT_ONCE


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_reader_takes_whatever_there_is_for_longer(name: str) -> None:
    assert fuzz.fuzz(name, seconds=20, first_seed=1)["inputs"] >= fuzz.AT_ONCE


def wrong(number: int) -> None:
    assert number < 1000


def hangs(number: int) -> None:
    while number > 1000:
        pass


@pytest.mark.parametrize(("read", "error"), [(wrong, AssertionError), (hangs, fuzz.HangError)])
def test_a_reader_that_fails_or_hangs_is_found(read: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "LONGEST", 0.02)
    monkeypatch.setitem(fuzz.TARGETS, "bad", (st.integers(), read))
    with pytest.raises(error):
        fuzz.fuzz("bad", seconds=10)
