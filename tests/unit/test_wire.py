"""Every byte between our processes: what is packed is read back, and nothing that anybody writes makes a reader raise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.pool import wire
from prefork.pool.wire import Command, Doorbell, Kind, Order, Report, Ring

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
rings = st.builds(Doorbell, st.sampled_from(Ring), u32, u32, u32)
plain_kinds = st.sampled_from([kind for kind in Kind if kind is not Kind.FAILED])
reports = st.builds(Report, plain_kinds, u32, u32, st.integers(-(2**31), 2**31 - 1), u64, u64, u64)
MAGIC = wire.doorbell_of(Ring.READY, 0)(0, 0)[:2]
# Bytes, and pieces that look like the beginning of something.
pieces = st.binary(max_size=40) | st.just(MAGIC) | st.just(MAGIC + b"\1\0") | rings.map(lambda ring: packed(ring)[:9])
rubbish = st.lists(pieces).map(b"".join)


def packed(ring: Doorbell) -> bytes:
    return wire.doorbell_of(ring.why, ring.generation)(ring.slot, ring.pid)


# -- the doorbell


@given(st.lists(rings, max_size=20))
def test_rings_are_read_as_they_were_written(written: list[Doorbell]) -> None:
    assert wire.read_doorbells(b"".join(map(packed, written))) == (written, 0)


@given(st.lists(rings.map(packed) | rubbish).map(b"".join))
def test_every_byte_on_the_doorbell_is_a_ring_or_counted_as_stray(data: bytes) -> None:
    found, stray = wire.read_doorbells(data)
    assert len(found) * wire.DOORBELL_SIZE + stray == len(data)
    at = 0
    for ring in found:  # nothing is invented: each is in the data, one after the other
        at = data.index(packed(ring), at) + wire.DOORBELL_SIZE


@given(st.lists(st.tuples(st.binary(max_size=50).map(lambda noise: noise.replace(MAGIC[:1], b"")), rings), max_size=10))
def test_whole_rings_are_found_between_garbage(parts: list[tuple[bytes, Doorbell]]) -> None:
    found, stray = wire.read_doorbells(b"".join(noise + packed(ring) for noise, ring in parts))
    assert found == [ring for _, ring in parts]
    assert stray == sum(len(noise) for noise, _ in parts)


def test_a_magic_number_in_garbage_does_not_hide_the_ring_after_it() -> None:
    ring = Doorbell(Ring.ACCEPTED, 1, 2, 3)
    assert wire.read_doorbells(MAGIC * 3 + packed(ring)) == ([ring], 6)


def test_a_doorbell_can_be_written_atomically_to_a_full_pipe() -> None:
    assert wire.DOORBELL_SIZE <= 512, "POSIX: PIPE_BUF is at least 512"
    assert wire.PIPE_READ % wire.DOORBELL_SIZE == 0, "a read of a full pipe must not cut a record"


def test_a_generation_number_that_outgrows_its_field_still_packs() -> None:
    [ring], _ = wire.read_doorbells(wire.doorbell_of(Ring.READY, 2**32 + 5)(1, 2))
    assert ring.generation == 5


# -- commands and reports


@given(st.builds(Command, st.sampled_from(Order), u32))
def test_commands_are_read_as_they_were_written(command: Command) -> None:
    assert wire.read_command(wire.pack_command(command)) == command


@given(reports)
def test_reports_are_read_as_they_were_written(report: Report) -> None:
    assert wire.read_report(wire.pack_report(report)) == report


COMMAND_SIZE = len(wire.pack_command(Command(Order.QUIT)))
REPORT_SIZE = len(wire.pack_report(Report(Kind.READY)))


@given(st.binary(max_size=60) | st.binary(min_size=COMMAND_SIZE, max_size=COMMAND_SIZE))
def test_a_message_is_a_known_order_of_the_right_size_or_no_command(message: bytes) -> None:
    known = len(message) == COMMAND_SIZE and message[0] in set(Order)
    assert (wire.read_command(message) is not None) == known


@given(st.binary(max_size=60) | st.binary(min_size=REPORT_SIZE, max_size=REPORT_SIZE))
def test_a_message_is_a_known_report_of_the_right_size_or_none(message: bytes) -> None:
    failed = message[:1] == bytes([Kind.FAILED])
    known = failed or (len(message) == REPORT_SIZE and message[0] in set(Kind))
    report = wire.read_report(message)
    assert (report is not None) == known
    assert report is None or report.kind == message[0]


# -- the text of a failure


@given(st.text())
def test_a_traceback_arrives_as_it_was_sent(text: str) -> None:
    assert wire.read_report(wire.pack_report(Report(Kind.FAILED, text=text))) == Report(Kind.FAILED, text=text)


def test_the_longest_text_that_fits_is_not_cut() -> None:
    text = "x" * wire.TEXT_LIMIT
    message = wire.pack_report(Report(Kind.FAILED, text=text))
    assert len(message) == wire.MESSAGE_LIMIT
    assert wire.read_report(message) == Report(Kind.FAILED, text=text)


@pytest.mark.parametrize("filler", ["x", "é", "€", "😀"])
def test_a_text_too_long_is_cut_in_the_middle(filler: str) -> None:
    message = wire.pack_report(Report(Kind.FAILED, text="Traceback of\n" + filler * wire.TEXT_LIMIT + "\nValueError: why"))
    assert len(message) <= wire.MESSAGE_LIMIT
    report = wire.read_report(message)
    assert report is not None
    assert report.text.startswith("Traceback of\n" + filler * 100)
    assert report.text.endswith(filler * 100 + "\nValueError: why")
    assert "cut" in report.text


def test_a_file_name_that_is_no_utf8_does_not_stop_the_report() -> None:
    report = wire.read_report(wire.pack_report(Report(Kind.FAILED, text="in /tmp/\udcff.py: no")))
    assert report is not None
    assert report.text.endswith(".py: no")
