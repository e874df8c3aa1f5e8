"""What is told once and counted: the times are given."""

from hypothesis import given
from hypothesis import strategies as st

from prefork.pool.episode import OVER_FOR, Episode

steps = st.lists(st.tuples(st.booleans(), st.floats(0.0, 3.0)), max_size=40)


@given(steps)
def test_the_seconds_are_exact_and_begin_and_end_are_told_in_turn(taken: list[tuple[bool, float]]) -> None:
    episode, now, expected, told, was = Episode(), 10.0, 0.0, [], False
    for is_so, seconds in taken:
        expected += seconds if was else 0.0
        now += seconds
        if is_so:
            told += ["begun"] if episode.begin(now) else []
        elif (lasted := episode.end(now)) is not None:
            assert lasted <= expected + 1e-6
            told.append("over")
        was = is_so
        assert abs(episode.seconds(now) - expected) < 1e-6
        assert (episode.since is not None) == is_so
    assert told == (["begun", "over"] * len(told))[: len(told)]


def test_that_it_is_over_is_told_when_it_has_been_for_a_while() -> None:
    episode = Episode()
    assert episode.begin(1.0)
    assert episode.end(3.0) is None
    assert episode.end(3.0 + OVER_FOR / 2) is None
    assert not episode.begin(3.0 + OVER_FOR / 2), "the log says so already"
    assert episode.end(6.0) is None
    assert episode.over_at == 6.0 + OVER_FOR
    assert episode.end(episode.over_at) == 2.0 + 3.0 - OVER_FOR / 2
