"""A client whose connect() has returned is served, over a line with a delay: a stop, a removed address, a killed master."""

import pytest

from tests import line
from tests.faults.arena import Rounds
from tests.faults.distance import DELAYS, KILLS, LONGEST_STOP_BESIDE_OTHERS, STRIKES, UNIT, WITHOUT, measure, over_a_line


@pytest.fixture(autouse=True)
def _needs_a_line() -> None:
    line.needed()


def test_a_stop_loses_no_client_that_is_about_to_be_connected() -> None:
    figures = measure(0.1, "stop")
    assert figures["connections"] > 0
    assert not figures["failures"], figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strike", "delay"), [(strike, delay) for strike in STRIKES for delay in (0.03, 0.1, 0.3) if strike not in KILLS or delay < 0.3]
)
def test_nor_does_anything_else_that_closes_a_listener(strike: str, delay: float) -> None:
    figures = measure(delay, strike)
    assert not figures["failures"], figures


@pytest.mark.slow
@pytest.mark.parametrize("right", WITHOUT)
@pytest.mark.parametrize("strike", ["stop", "remove", "kill"])
def test_nor_without_netlink_and_without_the_right_to_a_filter(right: str, strike: str) -> None:
    figures = measure(0.1, strike, without=right)
    assert not figures["failures"], figures


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("delay", DELAYS)
def test_nor_do_all_of_them_where_one_packet_of_a_hundred_is_lost(delay: int) -> None:
    over_a_line(Rounds(2000), f"{delay}{UNIT}")


@pytest.mark.slow
def test_a_stop_under_a_flood_of_syns_ends_and_loses_nobody_whom_a_cookie_has_answered() -> None:
    figures = measure(0.1, "stop", flood=2000)  # in a second more than fit the backlog
    assert figures["worst"] < LONGEST_STOP_BESIDE_OTHERS, figures
    assert not figures["failures"], figures
