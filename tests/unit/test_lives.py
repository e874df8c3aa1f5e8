"""Processes with short lives: what is a failure, and what is only replaced."""

from hypothesis import given
from hypothesis import strategies as st

from prefork.pool import policy
from prefork.pool.lives import SHORT, TOLERATED, WINDOW, ForkServerLives, WorkerLives
from prefork.pool.tally import EPISODE, Trouble

# Ends: after how many milliseconds, whether a client was served before, and how many workers still accept.
ENDS = st.lists(st.tuples(st.integers(0, 700), st.booleans(), st.integers(0, 2)), max_size=60)


def at(milliseconds: int) -> float:
    return milliseconds / 1000


@given(ENDS, st.integers(1, 20))
def test_a_failure_is_more_than_workers_short_lives_in_a_window_with_no_client_served(
    ends: list[tuple[int, bool, int]], workers: int
) -> None:
    lives, now, begun = WorkerLives(), 0, 0
    row: list[int] = []
    for wait, served, acceptors in ends:
        now += wait
        if served:
            begun += 1
            row.clear()
        row.append(now)
        in_window = [end for end in row if now - end < WINDOW * 1000]
        failed = lives.ended(at(now), begun, acceptors, workers)
        if failed:
            assert len(in_window) > workers
            row.clear()
        elif len(in_window) > workers:
            assert len(in_window) <= TOLERATED, "with acceptors left or not, so many are a failure"


@given(st.integers(1, 40), st.integers(0, 900))
def test_workers_that_end_together_and_leave_no_acceptor_are_one_failure(workers: int, wait: int) -> None:
    lives, now, rounds = WorkerLives(), 0, 0
    while True:
        rounds += 1
        # The last of them leaves nobody; the others are not known to be dead yet when the first is.
        if any(lives.ended(at(now), 0, left, workers) for left in reversed(range(workers))):
            break
        now += wait if workers > 1 else wait // 2
        assert rounds < 3, "the second time at the latest, and a third where the first is out of the window"


@given(st.integers(2, 64), st.lists(st.integers(90, 110), min_size=600, max_size=600))
def test_a_kill_every_100_ms_is_no_failure_while_others_accept(workers: int, waits: list[int]) -> None:
    lives, now = WorkerLives(), 0
    for wait in waits:
        now += wait
        assert not lives.ended(at(now), 0, workers - 1, workers)


def test_a_generation_that_serves_has_no_failure_of_short_lives() -> None:
    lives = WorkerLives()
    assert not any(lives.ended(n / 100, n, 0, 1) for n in range(1, 500))


def test_the_second_fork_server_in_a_row_with_a_short_life_is_the_first_failure() -> None:
    lives = ForkServerLives()
    assert [lives.ended(0.01, served=False) for _ in range(4)] == [0, 1, 2, 3]
    assert lives.ended(SHORT, served=False) == 0, "it has lived"
    assert lives.ended(0.01, served=False) == 0
    assert lives.ended(0.01, served=True) == 0, "its generation has served"
    assert [lives.ended(0.01, served=False) for _ in range(2)] == [0, 1]


def test_failures_of_workers_that_have_not_served_stay_a_row_whatever_else_fails() -> None:
    trouble = Trouble()
    trouble.add(0.0, "a worker ended before it served anybody", until_served=True)
    trouble.add(trouble.until, "a worker died before it was ready")
    assert (trouble.failures, trouble.until_served) == (2, True)


def test_a_failure_long_after_the_last_one_is_the_first_of_another_row() -> None:
    trouble = Trouble()
    for _ in range(3):
        trouble.add(trouble.until, "it ended", until_served=True)
    assert trouble.failures == 3
    trouble.add(trouble.until + EPISODE, "another thing")
    assert (trouble.failures, trouble.until_served) == (1, False)
    assert EPISODE > policy.BACKOFF_LIMIT, "or the longest wait would end its own row"
