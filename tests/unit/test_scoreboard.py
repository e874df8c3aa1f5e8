"""The scoreboard on real shared memory, with a second process where it matters."""

import ctypes
import errno
import faulthandler
import mmap
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefork.pool import scoreboard
from prefork.pool.scoreboard import BUSY, IDLE, NOTHING, Access, Counts, Layout, Scoreboard

WORD = 8
MS = 1_000_000


@contextmanager
def mapped(layout: Layout, *accesses: Access) -> Iterator[list[Scoreboard]]:
    """The same two boards, mapped once for each access."""
    board_fd, orders_fd = scoreboard.create("board", layout.board_bytes), scoreboard.create("orders", layout.orders_bytes)
    boards: list[Scoreboard] = []
    try:
        boards += [Scoreboard(board_fd, orders_fd, layout, access) for access in accesses]
        yield boards
    finally:
        for board in boards:
            board.close()
        os.close(board_fd)
        os.close(orders_fd)


def fork(child: Callable[[], object]) -> int:
    """A second process that runs ``child`` and nothing else of ours. Returns its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: the test process may have threads; the child uses none
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    return pid


# -- where things are


@given(listeners=st.integers(1, 5), capacity=st.integers(1, 20_000))
def test_the_regions_of_the_boards_are_aligned_and_do_not_overlap(listeners: int, capacity: int) -> None:
    layout = Layout(listeners, capacity)
    with mapped(layout, Access.MASTER) as [board]:
        last = layout.slots - 1
        words = [0, *(board.listener_word(listener, which) for listener in range(listeners) for which in range(2))]
        words += [scoreboard.STOPPING, scoreboard.LAST_LOOK]
        assert len(set(words)) == len(words)
        regions = [
            [(0, (max(words) + 1) * WORD)],
            [(layout.retire_at, layout.retire_at + layout.slots)],
            [(board.account_word(slot) * WORD, (board.account_word(slot) + 5) * WORD) for slot in {0, last // 2, last}],
        ]
        assert_apart([region for group in regions for region in sorted(group)], layout.orders_bytes)
        rows = [(at, at + layout.slots) for at in (board.row_start(0), layout.tired_at)]
        records = [(board.record(slot) * WORD, (board.record(slot) + scoreboard.RECORD_WORDS) * WORD) for slot in (0, last)]
        ring = (layout.recent_at, layout.recent_at + listeners * scoreboard.RECENT * WORD)
        assert_apart([(0, WORD), *rows, ring, *records[: layout.slots]], layout.board_bytes)


def assert_apart(regions: list[tuple[int, int]], size: int) -> None:
    assert all(start % WORD == 0 for start, _ in regions)
    assert all(end <= start for (_, end), (start, _) in pairwise(regions))
    assert regions[-1][1] == size


def test_the_fields_of_a_record_do_not_overlap() -> None:
    words = [scoreboard.PID, scoreboard.SINCE, scoreboard.BEGUN, scoreboard.OK, scoreboard.ERROR, scoreboard.REJECTED]
    words += [scoreboard.STARTED, scoreboard.PORT, *range(scoreboard.PEER, scoreboard.PEER + scoreboard.PEER_BYTES // WORD)]
    assert len(set(words)) == len(words)
    assert max(words) < scoreboard.HISTOGRAM
    four_years_ns = 4 * 366 * 86_400 * 10**9
    assert scoreboard.HISTOGRAM + (four_years_ns >> 10).bit_length() < scoreboard.RECORD_WORDS, "no worker lives longer"


def test_durations_of_more_than_the_last_bucket_are_counted_in_it() -> None:
    with mapped(Layout(1, 2), Access.MASTER) as [board]:
        first = board.record(0) + scoreboard.HISTOGRAM
        for took_ns in (1, 1024, 500_000, 10**15, 10**17):
            board.words[first + (took_ns >> 10).bit_length()] += 1
        histogram = board.histogram(0)
        assert len(histogram) == scoreboard.BUCKETS
        assert (histogram[0], histogram[1], histogram[-1], sum(histogram)) == (1, 1, 2, 5)
        assert sum(board.histogram(1)) == 0


@settings(max_examples=30)
@given(listeners=st.integers(1, 4), capacity=st.integers(1, 50))
def test_what_is_written_for_one_slot_is_seen_for_no_other(listeners: int, capacity: int) -> None:
    layout = Layout(listeners, capacity)
    with mapped(layout, Access.MASTER, Access.READER) as [writer, reader]:
        for slot in range(layout.slots):
            writer.states[slot] = IDLE if slot % 3 else BUSY
            writer.retire[slot] = slot % 2
            counts = Counts(4 * slot, slot, slot, slot, slot)
            writer.restore(slot, counts)
            writer.keep_account(slot, counts)
        for slot in range(layout.slots):
            assert reader.counts(slot) == reader.account(slot) == Counts(4 * slot, slot, slot, slot, slot)
            assert reader.retire[slot] == slot % 2
        for listener in range(listeners):
            own = range(listener * capacity, (listener + 1) * capacity)
            assert {layout.listener(slot) for slot in own} == {listener}
            assert list(reader.row(listener, capacity)) == [IDLE if slot % 3 else BUSY for slot in own]


# -- counters

counters = st.builds(Counts, *[st.integers(0, 10**6)] * 5)


@given(counters, counters)
def test_the_identity_holds_for_counts_and_for_their_sums(one: Counts, other: Counts) -> None:
    total = one + other
    assert total.ok + total.error + total.rejected + total.killed + total.serving == total.begun
    assert total.serving == one.serving + other.serving
    assert total + NOTHING == total


def count_flat_out(board_fd: int, orders_fd: int, layout: Layout) -> None:
    """A worker that serves as fast as none can: the next connection follows at once, each takes some 10 us."""
    board = Scoreboard(board_fd, orders_fd, layout, Access.WORKER)
    begun_at = board.record(1) + scoreboard.BEGUN
    ends = [0, 0, 0]
    begun, outcome, words = 0, 0, board.words
    until = time.monotonic() + 0.35
    while time.monotonic() < until:
        begun += 1
        words[begun_at] = begun
        for _ in range(300):
            pass
        ends[outcome] += 1
        words[begun_at + 1 + outcome] = ends[outcome]
        outcome = (outcome + 1) % 3
    words[begun_at] = begun + 1  # and it goes while it serves


def test_counters_read_while_another_process_counts_are_consistent_and_never_go_back() -> None:
    layout = Layout(1, 2)
    board_fd, orders_fd = scoreboard.create("board", layout.board_bytes), scoreboard.create("orders", layout.orders_bytes)
    board = Scoreboard(board_fd, orders_fd, layout, Access.MASTER)
    pid = fork(lambda: count_flat_out(board_fd, orders_fd, layout))
    try:
        readings = 0
        before, status = NOTHING, None
        while status is None:
            counts = board.counts(1)
            readings += 1
            assert counts.serving in (0, 1)
            assert counts.begun >= before.begun
            assert counts.ok >= before.ok
            assert counts.error >= before.error
            assert counts.rejected >= before.rejected
            before = counts
            if readings % 100 == 0:
                ended, code = os.waitpid(pid, os.WNOHANG)
                status = code if ended else None
        assert status == 0
        assert readings > 1000
        assert before.begun > 1000
        last = board.counts(1)
        assert last.serving == 1
        killed = replace(last, killed=1)
        board.keep_account(1, killed)
        assert board.counts(1) == killed
        assert board.counts(1).serving == 0
        assert board.counts(0) == NOTHING
    finally:
        board.close()
        os.close(board_fd)
        os.close(orders_fd)


# -- who may write what


def test_a_worker_can_read_the_orders_and_not_write_them() -> None:
    with mapped(Layout(1, 4), Access.MASTER, Access.WORKER) as [master, worker]:
        master.retire[2] = 1
        assert worker.retire[2] == 1
        with pytest.raises(TypeError):
            worker.retire[2] = 0
        with pytest.raises(TypeError):
            worker.order_words[scoreboard.STOPPING] = 1
        with pytest.raises(TypeError):
            worker.orders[0] = 0
        worker.states[2] = BUSY
        assert master.states[2] == BUSY


def test_no_mprotect_makes_the_orders_writable_where_they_were_opened_to_be_read() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    orders_fd = scoreboard.create("sealed-orders", 4096)
    reading = scoreboard.opened_read_only(orders_fd)
    found = []
    for fd in (orders_fd, reading):
        with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ):
            lines = Path("/proc/self/maps").read_text().splitlines()
            [at] = [int(line.partition("-")[0], 16) for line in lines if "prefork-sealed-orders" in line]
            done = libc.mprotect(at, 4096, mmap.PROT_READ | mmap.PROT_WRITE)
            found.append(0 if done == 0 else ctypes.get_errno())
        os.close(fd)
    assert found == [0, errno.EACCES]


def test_nobody_makes_a_board_smaller_under_who_reads_it() -> None:
    fd = scoreboard.create("board", 8192)
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_the_master_goes_on_with_its_own_orders_whatever_they_say() -> None:
    layout = Layout(1, 4)
    board_fd, orders_fd = scoreboard.create("board", layout.board_bytes), scoreboard.create("orders", layout.orders_bytes)
    os.pwrite(orders_fd, b"\xff" * layout.orders_bytes, 0)
    board = Scoreboard(board_fd, orders_fd, layout, Access.MASTER)
    board.keep_account(3, Counts(5, 1, 1, 1, 2))
    assert board.account(3) == Counts(5, 1, 1, 1, 2)
    board.close()
    os.close(board_fd)
    os.close(orders_fd)


def test_a_reader_can_write_nothing() -> None:
    with mapped(Layout(1, 4), Access.READER) as [reader]:
        with pytest.raises(TypeError):
            reader.states[0] = BUSY
        with pytest.raises(TypeError):
            reader.words[100] = 1
        with pytest.raises(TypeError):
            reader.retire[0] = 1


def test_the_masters_mapping_stays_with_the_master() -> None:
    def touch() -> None:
        faulthandler.disable()
        board.retire[0] = 1

    with mapped(Layout(1, 4), Access.MASTER) as [board]:
        _, status = os.waitpid(fork(touch), 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV
        assert board.retire[0] == 0


def test_a_memfd_is_its_owners_only_and_costs_nothing_until_it_is_used() -> None:
    fd = scoreboard.create("board", Layout(1, 1 << 20).board_bytes)
    try:
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert os.fstat(fd).st_blocks * 512 <= 4096
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("spoilt", "how"), [("orders", "magic"), ("orders", "size"), ("orders", "empty"), ("board", "size"), ("board", "empty")]
)
def test_what_is_no_scoreboard_of_this_version_is_refused(spoilt: str, how: str) -> None:
    layout = Layout(2, 100)
    sizes = {"board": layout.board_bytes, "orders": layout.orders_bytes}
    if how != "magic":
        sizes[spoilt] = 8 if how == "empty" else sizes[spoilt] - 1
    fds = {name: scoreboard.create(name, size) for name, size in sizes.items()}
    if how == "magic":
        os.pwrite(fds[spoilt], b"prefork\xff", 0)
    try:
        with pytest.raises(ValueError, match="not a prefork scoreboard of this version"):
            Scoreboard(fds["board"], fds["orders"], layout, Access.READER)
    finally:
        for fd in fds.values():
            os.close(fd)


def test_close_unmaps() -> None:
    with mapped(Layout(1, 4), Access.MASTER) as [board]:
        board.close()
        with pytest.raises(ValueError, match="mmap closed"):
            board.board[0]
        with pytest.raises(ValueError, match="released"):
            board.states[0]


# -- any content

largest = (1 << 64) - 1
words = st.sampled_from([0, 1, largest, 1 << 63, scoreboard.COUNT_LIMIT]) | st.integers(0, largest)


@contextmanager
def spoilt(layout: Layout, patterns: list[int]) -> Iterator[Scoreboard]:
    """A board that is full of these words, again and again."""
    with mapped(layout, Access.MASTER) as [board]:
        for at in range(len(board.words)):
            board.words[at] = patterns[at % len(patterns)]
        yield board


@example(patterns=[largest], account=NOTHING, second=3)
@given(st.lists(words, min_size=1, max_size=7), counters, st.integers(0, 1 << 40))
def test_no_content_of_a_board_makes_a_reader_raise(patterns: list[int], account: Counts, second: int) -> None:
    layout = Layout(2, 300)
    with spoilt(layout, patterns) as board:
        for slot in (0, 299, 300, 599):
            board.peer(slot)
            assert len(board.histogram(slot)) == scoreboard.BUCKETS
            board.keep_account(slot, account)
            for counts in (board.counts(slot), board.counts(slot, account)):
                assert counts == account or counts.follows(account, 1)
        for listener in (0, 1):
            first = 300 * listener
            assert board.recent(listener, 10**15, 50 * MS) <= set(range(first, first + 300))
            assert set(board.tired_slots(listener, 300)) <= set(range(first, first + 300))
            board.since(listener, 300)
            board.begun(listener, 300)
        for _ in range(12):
            board.may_log_traceback(second, 10)
        board.take_last_words()


@given(counters, counters, st.integers(0, 3))
def test_counters_are_believed_where_a_worker_can_have_come_to_them(before: Counts, more: Counts, serving: int) -> None:
    before = replace(before, begun=before.ended)
    after = Counts(0, before.ok + more.ok, before.error + more.error, before.rejected + more.rejected, before.killed)
    after = replace(after, begun=after.ended + serving)
    assert after.follows(before, 1) == (serving <= 1)
    assert not replace(after, ok=before.ok - 1).follows(before, 1)
    assert not replace(after, begun=after.ended - 1).follows(before, 1)
    far = scoreboard.COUNT_LIMIT
    assert not replace(after, begun=after.begun + far, ok=after.ok + far).follows(before, 1)


def test_tracebacks_are_logged_again_in_the_second_after_a_stray_write() -> None:
    with spoilt(Layout(1, 2), [largest]) as board:
        assert board.may_log_traceback(7, 2) in range(scoreboard.COUNT_LIMIT)
        assert [board.may_log_traceback(8, 2) for _ in range(3)] == [0, 0, None]


# -- gossip


def accepted(board: Scoreboard, slot: int, at_ns: int, listener: int) -> None:
    """What a worker notes in its listener's ring when it accepts."""
    ring = board.layout.recent_at // WORD + listener * scoreboard.RECENT
    when = at_ns >> scoreboard.RECENT_SHIFT
    board.words[ring + when % scoreboard.RECENT] = scoreboard.recent_entry(when, slot + 1)


@example(now=2**32 << scoreboard.RECENT_SHIFT, ages={1: 0, 2: MS, 3: 40 * MS})  # the upper half of an entry comes round
@given(now=st.integers(10**9, 10**18), ages=st.dictionaries(st.integers(0, 9), st.integers(0, 66 * MS), max_size=10))
def test_recent_tells_who_accepted_lately(now: int, ages: dict[int, int]) -> None:
    entry = 1 << scoreboard.RECENT_SHIFT
    with mapped(Layout(1, 10), Access.MASTER) as [board]:
        for slot, age in ages.items():
            accepted(board, slot, now - age, 0)
        found = board.recent(0, now, 50 * MS)
        assert not any(ages.get(slot, 10**9) > 50 * MS + entry for slot in found)
        taken = [(now - age) // entry for age in ages.values()]
        lately = {slot for slot, age in ages.items() if age <= 50 * MS and taken.count((now - age) // entry) == 1}
        assert lately <= found, "each that has an entry of its own"


def test_recent_tells_of_no_other_listeners_workers_and_believes_no_nonsense() -> None:
    now = 10**12
    with mapped(Layout(3, 4), Access.MASTER) as [board]:
        for offset, slot in enumerate([3, 4, 7, 8, 2**31]):  # of listener 1 only 4 to 7
            accepted(board, slot, now - offset * MS, 1)
        assert board.recent(1, now, 50 * MS) == {4, 7}
        assert board.recent(0, now, 50 * MS) == set()
        assert board.recent(2, now, 50 * MS) == set()


@given(st.sets(st.integers(0, 49)), st.sets(st.integers(0, 49)), st.integers(0, 50))
def test_the_tired_are_found_among_one_listeners_slots_in_use(ours: set[int], others: set[int], high: int) -> None:
    with mapped(Layout(2, 50), Access.MASTER) as [board]:
        for slot in ours:
            board.tired[50 + slot] = 1
        for slot in others:
            board.tired[slot] = 1
        assert board.tired_slots(1, high) == [50 + slot for slot in sorted(ours) if slot < high]


def test_nothing_is_left_of_a_longer_peer() -> None:
    with mapped(Layout(1, 2), Access.MASTER) as [board]:
        at, port_at = board.peer_start(0), board.record(0) + scoreboard.PORT
        place = slice(at, at + scoreboard.PEER_BYTES)
        longest = "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff%fifteen-letters]"
        for host, port, text in ((longest, 65535, f"{longest}:65535"), ("10.0.0.1", 5, "10.0.0.1:5"), ("unix", 0, "unix")):
            board.board[place] = host.encode().ljust(scoreboard.PEER_BYTES, b"\0")
            board.words[port_at] = port
            assert board.peer(0) == text
        board.board[place], board.words[port_at] = b"\xff" * scoreboard.PEER_BYTES, 0
        assert board.peer(0) == "\ufffd" * scoreboard.PEER_BYTES
        assert (board.peer(1), board.histogram(0)) == ("", [0] * scoreboard.BUCKETS)


# -- last words


def test_last_words_are_read_once_and_disturb_nothing_else() -> None:
    with mapped(Layout(1, 4), Access.MASTER, Access.WORKER) as [master, worker]:
        worker.may_log_traceback(7, 1)
        worker.states[0] = IDLE
        before = bytes(master.board[:64]), bytes(master.board[4096:])
        worker.leave_last_words("Traceback\nRuntimeError: ö")
        assert (bytes(master.board[:64]), bytes(master.board[4096:])) == before
        assert master.take_last_words() == "Traceback\nRuntimeError: ö"
        assert master.take_last_words() == ""


@given(text=st.text(max_size=6000))
@settings(max_examples=50)
def test_last_words_of_any_length_keep_their_beginning_and_end(text: str) -> None:
    with mapped(Layout(1, 4), Access.MASTER, Access.WORKER) as [master, worker]:
        before = bytes(master.board[:64]), bytes(master.board[4096:])
        worker.leave_last_words("first " + text + " last")
        assert (bytes(master.board[:64]), bytes(master.board[4096:])) == before
        told = master.take_last_words()
    assert told.startswith("first ")
    assert told.endswith(" last")
    assert len(told.encode()) <= 4032


def test_last_words_that_a_stray_write_has_made_are_still_text() -> None:
    with mapped(Layout(1, 4), Access.MASTER) as [master]:
        master.board[64:4096] = b"\xff" * 4032
        assert set(master.take_last_words()) == {"\N{REPLACEMENT CHARACTER}"}
