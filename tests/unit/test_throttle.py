"""How often a source of events is heard."""

from hypothesis import given
from hypothesis import strategies as st

from prefork.pool.throttle import Throttle


@given(st.floats(1, 1000), st.integers(101, 500), st.floats(0.0001, 0.1), st.floats(1, 100))
def test_of_an_endless_flood_no_more_is_heard_than_the_burst_and_the_rate(
    rate: float, burst: int, step: float, seconds: float
) -> None:
    throttle, now, heard, floods = Throttle(rate, burst, longest=1000), 0.0, 0, 0
    for _ in range(2000):
        now += step
        if not throttle.is_paused(now):
            heard += 1
            floods += throttle.spend(now)
        if now > seconds:
            break
    assert heard <= burst + rate * now + 2
    assert floods <= 1, "what does not end is told once"


@given(st.floats(1, 1000), st.integers(1, 500), st.integers(1, 300))
def test_who_stays_below_the_rate_is_never_paused(rate: float, burst: int, count: int) -> None:
    throttle = Throttle(rate, burst)
    for n in range(count):
        assert not throttle.spend(n * 1.01 / rate)
        assert not throttle.is_paused(n * 1.01 / rate)


def test_a_flood_that_comes_again_after_a_calm_is_told_again() -> None:
    throttle = Throttle(rate=10, burst=2)
    assert [throttle.spend(0.0) for _ in range(4)] == [False, False, True, False]
    assert throttle.until == 0.2
    assert not throttle.spend(0.35), "it was not calm in between"
    assert [throttle.spend(10.0) for _ in range(3)] == [False, False, True]


def test_a_pause_has_an_end_however_much_has_come_at_once() -> None:
    throttle = Throttle(rate=10, burst=2, longest=3.0)
    assert throttle.spend(0.0, 1_000_000)
    assert throttle.until == 3.0
    assert throttle.is_paused(2.9)
    assert not throttle.is_paused(3.0)
