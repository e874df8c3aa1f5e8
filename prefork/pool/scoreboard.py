"""The scoreboard: what every worker is doing, in memory that master and workers share. It is the truth; the pipe is a doorbell.

A generation has two boards, each a memfd:

* the *board*, written by workers: a dense row of state bytes (one C call counts 10,000 of them), a row that says who wants to be
  recycled, a ring of the latest accepts, and a record of 8-byte words for each slot;
* the *orders*, written by the master and mapped read-only by workers, so that a stray write in a handler's C code ends that
  worker (SIGSEGV) and does not silence the whole service. The fork server maps them from a file that is open for reading only, so
  that no mprotect(2) makes that mapping writable, and it closes every descriptor of it before user code is imported.

Rules, each from a measurement:

* Words are stored through a cast ``memoryview`` (one aligned 8-byte store). ``struct.pack_into`` on a shared mapping is not
  atomic: another process read half-written values in 6 to 14 % of reads.
* Counters belong to the slot, not to the worker: they are never zeroed, a new owner goes on from what the master has counted.
  So nothing is folded twice and nothing goes back.
* Any worker can write anything anywhere on the board. So a worker goes on from the account that the master keeps for its slot on
  the orders, keeps its own counts to itself and only stores them; a reader holds what it finds against that account
  (`Scoreboard.written`), and no content of the board makes a worker or a reader fail. The master reads nothing back of what it
  has written to the orders.
* ``accepted`` and ``serving`` are derived: a reader takes the endings, the beginnings, and the endings again, and repeats while
  they moved. ``ok + error + rejected + killed + serving = accepted`` then holds at every reading by construction.
* The state byte is written by the worker, and by the master only while no worker owns the slot (before its fork, after its wait).

The descriptors stay with the master (it hands them to `prefork status`); fork servers map and close them.
"""

import fcntl
import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from prefork.pool.wire import shortened

# A state byte. They are letters so that a dump of the row can be read.
FREE = 0
STARTING = ord("S")  # forked, or about to be
PARKED = ord("P")  # ready, waiting at the gate for its generation to be committed
IDLE = ord("I")  # in accept()
BUSY = ord("B")  # serving a connection
PAUSED = ord("E")  # accept() fails; sleeping before the next try. Keeps its place: another worker could not accept either
LEAVING = ord("L")  # has seen that it was asked to go
STATES = {
    FREE: "free",
    STARTING: "starting",
    PARKED: "starting",
    IDLE: "idle",
    BUSY: "busy",
    PAUSED: "paused",
    LEAVING: "retiring",
}

# A reader that is put off the CPU between two words has to read again; one that is put off so often has other troubles.
_TRIES = 100
_WORD = 8
# CPython makes an unsigned long digit by digit, and an unsigned long long by way of an array of bytes.
_WORD_FORMAT: Literal["L", "Q"] = "L" if struct.calcsize("L") == _WORD else "Q"
_PAGE = 4096
# Of the layout: running workers go on with theirs while the master becomes another program.
VERSION = 1
_MAGIC = int.from_bytes(b"prefork" + bytes([VERSION]), "little")
# Slot numbers have 32 bits on the wire.
SLOTS_LIMIT = 1 << 32
NO_SCOREBOARD = "not a prefork scoreboard of this version"
# No slot counts so far: a larger number was not counted. And a worker that goes on from below it does not pass 8 bytes.
COUNT_LIMIT = 1 << 62
_PORT_MASK = 0xFFFF

# The header page of the board, in words (word 0 is not used): how many tracebacks were logged in which second, and how many
# were not since.
TRACEBACK_SECOND, TRACEBACKS, SUPPRESSED = 1, 2, 3
# The rest of that page, in bytes: why the latest worker that could not start did not. Only ever shown.
_WORDS_AT, _WORDS_END = 64, _PAGE

# A slot's record, in words. PEER is a host, filled up with NUL; a PORT of 0 is a Unix client's, and that of a worker from before
# there was one, whose PEER has both.
PID, SINCE, BEGUN, OK, ERROR, REJECTED, STARTED, PORT = range(8)
PEER = 8
PEER_BYTES = 64  # enough for any: INET6_ADDRSTRLEN (46), a scope (16), brackets
HISTOGRAM = PEER + PEER_BYTES // _WORD
# Bucket k counts durations below 2**k * 1.024 us; the last one, everything from about 18 minutes: for readers. Workers have as many
# as a record has room for, four years and a half, so that they need not look whether it is the last.
BUCKETS = 32
RECORD_WORDS = 64

# So many slots of a listener are looked at one by one, and where there were more, the lowest: they are used first.
FEW, LOWEST = 256, 32
# Of the others there is a ring of latest accepts: entry ``(now >> RECENT_SHIFT) % RECENT`` holds ``now >> RECENT_SHIFT`` in its
# upper half, so that old ones are told at once, and slot + 1 in its lower one. One entry is 131 us, the ring 67 ms. A look at the
# pool needs the workers that accepted in the last 50 ms, whichever of 10,000 they are; two accepts in one entry lose one of them,
# which costs at most a look at one worker fewer.
RECENT = 512
RECENT_SHIFT = 17

_SLOT_MASK = 0xFFFFFFFF

# The orders' words: the generation's (word 0 is the magic), each listener's, then rows.
# FORKS: a worker's replacement can be forked, as far as the master knows. COMMITTED spares a worker the gate.
STOPPING, LAST_LOOK, FORKS, COMMITTED = 1, 2, 3, 4
_GENERATION_WORDS = 8
_LISTENER_WORDS = 8
RING_BELOW, HIGH = 0, 1
# A slot's account on the orders, in words: what the master had counted of it when its last worker ended, in the order of `Counts`.
_ACCOUNT_WORDS = 5


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a generation's boards: ``capacity`` slots for each of ``listeners``.

    Slots of listener i are i * capacity up to (i + 1) * capacity, so that one slice of the row is one listener's.
    """

    listeners: int
    capacity: int

    @property
    def slots(self) -> int:
        return self.listeners * self.capacity

    def listener(self, slot: int) -> int:
        """The listener that a slot belongs to."""
        return slot // self.capacity

    # The board: header page, row of states, row of tired bytes, rings, records.
    @property
    def tired_at(self) -> int:
        return _PAGE + _round_up(self.slots)

    @property
    def recent_at(self) -> int:
        return self.tired_at + _round_up(self.slots)

    @property
    def records_at(self) -> int:
        return self.recent_at + self.listeners * RECENT * _WORD

    @property
    def board_bytes(self) -> int:
        return self.records_at + self.slots * RECORD_WORDS * _WORD

    # The orders: header page with the generation's and the listeners' words, row of retire bytes, accounts.
    @property
    def accounts_at(self) -> int:
        return self.retire_at + _round_up(self.slots)

    @property
    def retire_at(self) -> int:
        return _round_up((_GENERATION_WORDS + self.listeners * _LISTENER_WORDS) * _WORD)

    @property
    def orders_bytes(self) -> int:
        return self.accounts_at + self.slots * _ACCOUNT_WORDS * _WORD


def _round_up(size: int) -> int:
    return (size + _PAGE - 1) // _PAGE * _PAGE


@dataclass(frozen=True, slots=True)
class Counts:
    """A slot's counters at one moment."""

    begun: int
    ok: int
    error: int
    rejected: int
    killed: int

    @property
    def ended(self) -> int:
        return self.ok + self.error + self.rejected + self.killed

    @property
    def serving(self) -> int:
        return self.begun - self.ended

    @property
    def orderly(self) -> int:
        """Connections that a worker has ended itself."""
        return self.ok + self.error

    def follows(self, before: "Counts", serving: int) -> bool:
        """Whether a slot that had counted ``before`` can come to this, with at most so many connections being served."""
        grown = self.begun >= before.begun and self.ok >= before.ok and self.error >= before.error
        return grown and self.rejected >= before.rejected and self.begun < COUNT_LIMIT and 0 <= self.serving <= serving

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.begun + other.begun,
            self.ok + other.ok,
            self.error + other.error,
            self.rejected + other.rejected,
            self.killed + other.killed,
        )


NOTHING = Counts(0, 0, 0, 0, 0)


class Access(Enum):
    """Who maps the scoreboard: what it may write."""

    MASTER = (True, True)
    WORKER = (True, False)
    READER = (False, False)


class Scoreboard:
    """A generation's two boards, mapped. The descriptors are not kept.

    Raises ValueError when the descriptors are not a scoreboard of this version, of at least this size. The master, whose own it
    is, asks for the size only: no byte there may keep it from going on.
    """

    def __init__(self, board_fd: int, orders_fd: int, layout: Layout, access: Access) -> None:
        write_board, write_orders = access.value
        # Only on the orders, where no worker can write: a spoilt board must still be read.
        if access is not Access.MASTER and os.pread(orders_fd, _WORD, 0) != _MAGIC.to_bytes(_WORD, "little"):
            raise ValueError(NO_SCOREBOARD)
        self.layout = layout
        self._first_record = layout.records_at // _WORD
        self.board = _map(board_fd, layout.board_bytes, writable=write_board)
        self.orders = _map(orders_fd, layout.orders_bytes, writable=write_orders)
        if access is Access.MASTER:
            # A fork server maps for itself, read-only what is read-only: the master's own mappings stay with the master.
            self.board.madvise(mmap.MADV_DONTFORK)
            self.orders.madvise(mmap.MADV_DONTFORK)
        self.words = memoryview(self.board).cast(_WORD_FORMAT)
        self.states = memoryview(self.board)[_PAGE : _PAGE + layout.slots]
        self.tired = memoryview(self.board)[layout.tired_at : layout.tired_at + layout.slots]
        self.order_words = memoryview(self.orders).cast(_WORD_FORMAT)
        self.retire = memoryview(self.orders)[layout.retire_at : layout.retire_at + layout.slots]

    def close(self) -> None:
        """Unmap both boards."""
        for view in (self.words, self.states, self.tired, self.order_words, self.retire):
            view.release()
        self.board.close()
        self.orders.close()

    def record(self, slot: int) -> int:
        """Index in `words` of the slot's first word."""
        return self._first_record + slot * RECORD_WORDS

    def listener_word(self, listener: int, which: int) -> int:
        """Index in `order_words` of a listener's word (RING_BELOW, HIGH)."""
        return _GENERATION_WORDS + listener * _LISTENER_WORDS + which

    def account_word(self, slot: int) -> int:
        """Index in `order_words` of the first word of the slot's account."""
        return self.layout.accounts_at // _WORD + slot * _ACCOUNT_WORDS

    def account(self, slot: int) -> Counts:
        """What the master had counted of the slot when its last worker ended."""
        at = self.account_word(slot)
        return Counts(*self.order_words[at : at + _ACCOUNT_WORDS])

    def keep_account(self, slot: int, counts: Counts) -> None:
        """Write down what the master has counted of a slot that has no worker now."""
        at = self.account_word(slot)
        for offset, value in enumerate((counts.begun, counts.ok, counts.error, counts.rejected, counts.killed)):
            self.order_words[at + offset] = value

    def row(self, listener: int, high: int) -> bytes:
        """The states of a listener's first ``high`` slots."""
        start = self.row_start(listener)
        return self.board[start : start + high]

    def tired_slots(self, listener: int, high: int) -> list[int]:
        """Of a listener's first ``high`` slots those whose workers want to be recycled: gossip, until their master knows them."""
        first = listener * self.layout.capacity
        at = self.layout.tired_at + first
        row = self.board[at : at + high]
        found: list[int] = []
        place = row.find(1)
        while place >= 0:
            found.append(first + place)
            place = row.find(1, place + 1)
        return found

    def row_start(self, listener: int) -> int:
        """Index in `board` of the listener's first state byte."""
        return _PAGE + listener * self.layout.capacity

    def recent_word(self, listener: int) -> int:
        """Index in `words` of the listener's ring of latest accepts."""
        return self.layout.recent_at // _WORD + listener * RECENT

    def peer_start(self, slot: int) -> int:
        """Index in `board` of the slot's peer."""
        return (self.record(slot) + PEER) * _WORD

    def since(self, listener: int, high: int) -> list[int]:
        """When each of a listener's first ``high`` slots last accepted, in nanoseconds of the monotonic clock."""
        first = self.record(listener * self.layout.capacity) + SINCE
        return self.words[first : first + high * RECORD_WORDS : RECORD_WORDS].tolist()

    def recent(self, listener: int, now_ns: int, age_ns: int) -> set[int]:
        """Slots that accepted within the last ``age_ns``, unless others did since: gossip, to be checked against their records."""
        first = self.recent_word(listener)
        ring = self.words[first : first + RECENT].tolist()
        newest = now_ns >> RECENT_SHIFT
        since = recent_entry(newest - min(_SLOT_MASK >> 1, age_ns >> RECENT_SHIFT), 0)
        until = recent_entry(newest + 1, 0)
        if since < until:
            found = [entry for entry in ring if since <= entry < until]
        else:  # the upper half has come round: once in six days
            found = [entry for entry in ring if since <= entry or entry < until]
        low = listener * self.layout.capacity
        return {slot - 1 for entry in found if low < (slot := entry & _SLOT_MASK) <= low + self.layout.capacity}

    def peer(self, slot: int) -> str:
        """The peer of the connection being served, or of the last one.

        While the worker lives it may accept the next one between the two parts: then host and port are of two clients.
        """
        at, port = self.peer_start(slot), self.words[self.record(slot) + PORT] & _PORT_MASK
        host = self.board[at : at + PEER_BYTES].split(b"\0", 1)[0].decode("utf-8", "replace")
        return f"{host}:{port}" if port else host

    def put_peer(self, slot: int, host: str, port: int) -> None:
        """Name the peer of a connection that a worker has not begun, and that has gone. It began now, as far as is known."""
        at, record = self.peer_start(slot), self.record(slot)
        self.board[at : at + PEER_BYTES] = host.encode()[:PEER_BYTES].ljust(PEER_BYTES, b"\0")
        self.words[record + PORT], self.words[record + SINCE] = port, time.monotonic_ns()

    def histogram(self, slot: int) -> list[int]:
        """Durations of the slot's connections, by bucket.

        Where they were read before its counters, there are never more of them than of connections that ended orderly: a worker
        counts a connection first, and its duration then.
        """
        record = self.record(slot)
        counts = self.words[record + HISTOGRAM : record + RECORD_WORDS].tolist()
        return [*counts[: BUCKETS - 1], sum(counts[BUCKETS - 1 :])]

    def clear_histogram(self, slot: int) -> None:
        """Forget the durations of a slot: they were overwritten."""
        record = self.record(slot)
        for word in range(record + HISTOGRAM, record + RECORD_WORDS):
            self.words[word] = 0

    def begun(self, listener: int, high: int) -> int:
        """Connections that a listener's first ``high`` slots have begun, for a rate: quick, and what a worker says of itself."""
        first = self.record(listener * self.layout.capacity) + BEGUN
        return sum(self.words[first : first + high * RECORD_WORDS : RECORD_WORDS])

    def counts(self, slot: int, account: Counts | None = None) -> Counts:
        """The slot's counters; what the account says where a worker can't have written them.

        ``account``: what the master remembers of it. A reader takes it from the orders.
        """
        if account is not None:
            return self.written(slot, account) or account
        for _ in range(_TRIES):
            account = self.account(slot)
            counts = self.written(slot, account) or account
            if account == self.account(slot):
                break
        return counts

    def written(self, slot: int, account: Counts) -> Counts | None:
        """The counters that stand on the board, consistent unless the worker ended connections during each of so many readings.

        None when a worker that went on from ``account`` can't have written them.
        """
        begun_at = self.record(slot) + BEGUN
        words, most = self.words, 1
        for _ in range(_TRIES):
            ends = words[begun_at + 1 : begun_at + 4].tolist()
            begun = words[begun_at]
            if ends == words[begun_at + 1 : begun_at + 4].tolist():
                break
        else:
            most = _TRIES  # so many may have begun since the endings were read
        ok, error, rejected = ends
        counts = Counts(begun, ok, error, rejected, account.killed)
        return counts if counts.follows(account, most) else None

    def may_log_traceback(self, second: int, most: int) -> int | None:
        """Whether one more traceback may be logged in this second, by any worker of the generation.

        None when not; else how many were not logged before. Workers race for it without locks: a few more or fewer do not matter.
        """
        words = self.words
        if words[TRACEBACK_SECOND] != second:
            words[TRACEBACK_SECOND], words[TRACEBACKS] = second, 0
        logged, suppressed = words[TRACEBACKS], words[SUPPRESSED] % COUNT_LIMIT
        if logged >= most:
            words[SUPPRESSED] = suppressed + 1
            return None
        words[TRACEBACKS], words[SUPPRESSED] = logged + 1, 0
        return suppressed

    def leave_last_words(self, text: str) -> None:
        """Say why this worker ends before it was ready. Workers that do so at once write over each other."""
        data = shortened(text.encode("utf-8", "replace").replace(b"\0", b"?"), _WORDS_END - _WORDS_AT - 1)
        self.board[_WORDS_AT : _WORDS_AT + len(data) + 1] = data + b"\0"

    def take_last_words(self) -> str:
        """What was left, once; an empty text when nothing was. Gossip: to be shown and nothing else."""
        data = self.board[_WORDS_AT:_WORDS_END].split(b"\0", 1)[0]
        self.board[_WORDS_AT] = 0
        return data.decode("utf-8", "replace")

    def restore(self, slot: int, counts: Counts) -> None:
        """Put back counters that a worker's stray write has spoilt."""
        begun_at = self.record(slot) + BEGUN
        for offset, value in enumerate((counts.begun, counts.ok, counts.error, counts.rejected)):
            self.words[begun_at + offset] = value


def recent_entry(when: int, slot_number: int) -> int:
    """An entry of the ring of latest accepts: the time in units of its entries, and slot + 1."""
    return (when & _SLOT_MASK) << 32 | slot_number


def create(name: str, size: int) -> int:
    """A memfd of ``size`` bytes that only its owner may open: sparse, so slots that were never used cost nothing.

    It keeps its size: a look at what was cut off would end the master (SIGBUS).
    """
    fd = os.memfd_create(f"prefork-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        os.pwrite(fd, _MAGIC.to_bytes(_WORD, "little"), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def opened_read_only(fd: int) -> int:
    """The same file, opened anew to be read only: no process can make its mapping of that writable (EACCES, mprotect(2)).

    A process that maps it has to close the descriptor, too: it can be opened anew for writing by the file's owner. Raises OSError
    where there is no /proc.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _map(fd: int, size: int, *, writable: bool) -> mmap.mmap:
    if os.fstat(fd).st_size < size:
        raise ValueError(NO_SCOREBOARD)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
