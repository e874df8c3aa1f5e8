"""Every byte that crosses between prefork's own processes; nothing else packs bytes.

Three channels:

* worker → master, the *doorbell* pipe: `Doorbell`, 16 bytes, one non-blocking write (at most PIPE_BUF, so atomic: pipe(7)). It
  is gossip: lost, late, repeated or forged records change nothing, because the scoreboard is the truth.
* master → fork server, a SOCK_SEQPACKET pair: `Command`.
* fork server → master, the same pair: `Report`, and `FAILED` with its text.

Readers never raise on bad input: they return what was whole and valid, and how many records were not.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

# Of all records: running fork servers and workers go on with theirs while the master becomes another program.
VERSION = 1

_DOORBELL = struct.Struct("<HHIII")
_COMMAND = struct.Struct("<BxxxI")
_REPORT = struct.Struct("<BxxxIIiQQQ")

DOORBELL_MAGIC = 0x7066
DOORBELL_SIZE = _DOORBELL.size
# One read takes all that a default pipe holds: a doorbell wakes the master once, not once for each record.
PIPE_READ = 65536
# A SEQPACKET message is whole or not at all; a traceback longer than this is cut in the middle.
TEXT_LIMIT = 65536
MESSAGE_LIMIT = TEXT_LIMIT + 1


class Ring(IntEnum):
    """Why a worker rings."""

    ACCEPTED = 1
    READY = 2
    TIRED = 3
    LISTENER = 4


_MAGIC_BYTES = struct.pack("<H", DOORBELL_MAGIC)
_RINGS = {int(why): why for why in Ring}


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A worker's word: this slot of this generation has accepted, is ready, wants to be recycled, or has a listener that fails."""

    why: Ring
    generation: int
    slot: int
    pid: int


class Order(IntEnum):
    """What the master asks of a fork server."""

    FORK = 1
    RETIRE = 2
    KILL = 3
    LEAVE = 4
    QUIT = 5
    DUMP = 7


@dataclass(frozen=True, slots=True)
class Command:
    """One order; ``slot`` is 0 where the order is for the fork server itself."""

    order: Order
    slot: int = 0


class Kind(IntEnum):
    """What a fork server tells its master."""

    READY = 1
    FAILED = 2
    FORKED = 3
    FORK_FAILED = 4
    EXITED = 5
    STOPPED = 6
    CONTINUED = 7


@dataclass(frozen=True, slots=True)
class Report:
    """One report. ``status`` is a wait status (EXITED) or an errno (FORK_FAILED); CPU in microseconds, memory in KiB."""

    kind: Kind
    slot: int = 0
    pid: int = 0
    status: int = 0
    utime_us: int = 0
    stime_us: int = 0
    max_rss_kib: int = 0
    text: str = ""


def doorbell_of(why: Ring, generation: int) -> Callable[[int, int], bytes]:
    """What makes the record that a worker writes of its slot and its pid."""
    return partial(_DOORBELL.pack, DOORBELL_MAGIC, int(why), generation & 0xFFFFFFFF)


def read_doorbells(data: bytes) -> tuple[list[Doorbell], int]:
    """The rings that one read of the pipe holds, and how many bytes in it are a stray writer's.

    After garbage the stream is out of step, so each record is searched for by its magic number.
    """
    rings: list[Doorbell] = []
    at = data.find(_MAGIC_BYTES)
    while 0 <= at <= len(data) - DOORBELL_SIZE:
        _, why, generation, slot, pid = _DOORBELL.unpack_from(data, at)
        if why in _RINGS:
            rings.append(Doorbell(_RINGS[why], generation, slot, pid))
            at += DOORBELL_SIZE
        else:
            at += len(_MAGIC_BYTES)
        at = data.find(_MAGIC_BYTES, at)
    return rings, len(data) - len(rings) * DOORBELL_SIZE


def pack_command(command: Command) -> bytes:
    """One SEQPACKET message."""
    return _COMMAND.pack(command.order, command.slot)


def read_command(message: bytes) -> Command | None:
    """The order in a message, or None when it is not one."""
    if len(message) != _COMMAND.size:
        return None
    order, slot = _COMMAND.unpack(message)
    try:
        return Command(Order(order), slot)
    except ValueError:
        return None


def shortened(text: bytes, most: int) -> bytes:
    """At most so many bytes: its beginning and its end."""
    half = most // 2 - 16
    return text if len(text) <= most else text[:half] + b"\n[... cut ...]\n" + text[-half:]


def pack_report(report: Report) -> bytes:
    """One SEQPACKET message; a long text keeps its beginning and its end."""
    if report.kind is Kind.FAILED:
        return bytes([Kind.FAILED]) + shortened(report.text.encode("utf-8", "replace"), TEXT_LIMIT)
    return _REPORT.pack(report.kind, report.slot, report.pid, report.status, report.utime_us, report.stime_us, report.max_rss_kib)


def read_report(message: bytes) -> Report | None:
    """The report in a message, or None when it is not one. What it claims is still only the sender's word."""
    if message[:1] == bytes([Kind.FAILED]):
        return Report(Kind.FAILED, text=message[1:].decode("utf-8", "replace"))
    if len(message) != _REPORT.size:
        return None
    kind, *fields = _REPORT.unpack(message)
    try:
        return Report(Kind(kind), *fields)
    except ValueError:
        return None
