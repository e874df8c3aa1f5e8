"""What an upgrade carries from one program to the next, and how it is written: the state's format. Pure but for types.

The state is one JSON object in a memfd, the plain form of `State`. Its first field is the number of the format, which counts up
with every change that an older or newer program could not read; the numbers of the scoreboard's layout and of the wire's records
stand beside it, because running fork servers and workers go on speaking those. A file of every format that was ever written stays
in tests/states.

What is read comes from another program: it is checked field by field, and what can't be is a StateError, never a crash.
"""

import dataclasses
import functools
import json
import types
import typing
from dataclasses import dataclass
from typing import Any

from prefork.errors import RefusedError
from prefork.log.files import CarriedLog
from prefork.net.address import Address
from prefork.pool import scoreboard, wire
from prefork.pool.episode import Episodes
from prefork.pool.scoreboard import Counts, Layout
from prefork.pool.state import Worker
from prefork.pool.tally import Death, LastReload, Trouble
from prefork.system.credentials import Credentials
from prefork.system.program import STATE_LIMIT, Program

FORMAT = 1
# Sums of what workers may have written in 8 bytes each.
_LARGEST = 1 << 100


class StateError(RefusedError):
    """A state that this program does not understand."""


@dataclass(frozen=True, slots=True)
class CarriedListener:
    """A listener; its descriptor is -1 when it is closed."""

    fd: int
    configured: Address
    address: Address
    inode: tuple[int, int] | None
    ours: bool


@dataclass(frozen=True, slots=True)
class CarriedFarewell:
    """A listener that is being closed."""

    listener: int
    seconds: float
    deadline: float
    begins: float
    begun: bool
    parted: bool


@dataclass(frozen=True, slots=True)
class CarriedLink:
    """The master's end of one fork server. ``pid`` is None once that has ended; closed descriptors are -1."""

    pid: int | None
    stopped: bool
    channel: int
    board: int
    orders: int
    gate: int
    stacks: int
    outbox: tuple[str, ...]  # hexadecimal


@dataclass(frozen=True, slots=True)
class CarriedPool:
    """The slots in use; ``unready`` and ``unborn`` are slots of them, oldest first."""

    workers: tuple[Worker, ...]
    unready: tuple[int, ...]
    unborn: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CarriedGeneration:
    """A generation. ``config`` has the options that differ from their defaults; ``listeners`` are places in the state's list.

    ``served``: the number and the begin of the connections that were known, by slot; others have begun since ``unseen_since``
    (0: any time), or will ring (None). ``unserved``: of workers that were killed the slot's count, and host and
    port of the client that it leaves out. ``registered``: its fork server has something to run after its last worker's end.
    """

    number: int
    config: dict[str, Any]
    listeners: tuple[int, ...]
    layout: Layout
    targets: tuple[int, ...]
    retired: tuple[int, ...]
    ready: bool
    committed: bool
    suspended: bool
    left: bool
    trouble: Trouble
    fork_trouble: Trouble
    gossip: int
    counted: dict[int, Counts]
    pool: CarriedPool
    link: CarriedLink
    episodes: tuple[Episodes, ...]
    served: dict[int, tuple[int, float]] = dataclasses.field(default_factory=dict)
    unseen_since: float | None = 0.0
    unserved: dict[int, tuple[int, str, int]] = dataclasses.field(default_factory=dict)
    registered: bool = False


@dataclass(frozen=True, slots=True)
class CarriedTally:
    """What has ended."""

    counts: Counts
    histogram: tuple[int, ...]
    forked: int
    exited: int
    saturated: float
    stalled: float
    deaths: tuple[Death, ...]


@dataclass(frozen=True, slots=True)
class CarriedWiring:
    """What all generations share."""

    folder: str
    doorbell_read: int
    doorbell_write: int
    devnull: int
    logs: tuple[CarriedLog, ...]
    strangers: tuple[int, ...]
    credentials: Credentials | None


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """A file of the daemon's own in the file system: the control socket, its lock, the pid file."""

    path: str
    fd: int
    inode: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Upgrade:
    """An upgrade under way, or the last one; ``result`` is "" until it is known."""

    number: int
    at: float  # seconds since the epoch
    what: str  # how it was asked for
    version: str  # of the program that was upgraded
    token: str  # that the successor's check has read the state it proves by this (`program.answer`)
    result: str = ""
    reason: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """Everything. Times are seconds of the daemon's clock (monotonic, less ``lost``) unless said otherwise."""

    version: str  # of prefork, for people
    pid: int
    program: Program
    upgrade: Upgrade
    name: str
    started: float  # since the epoch
    began: float  # the same moment, on the system's monotonic clock
    lost: float
    left: float  # when this was written
    suspended: bool
    next_number: int
    last_reload: LastReload | None
    reload_wanted: bool
    inherited: tuple[int, ...]
    activated: tuple[tuple[str, int], ...]
    wiring: CarriedWiring
    control: CarriedFile | None
    pid_file: CarriedFile | None
    listeners: tuple[CarriedListener, ...]
    current_listeners: tuple[int, ...]
    farewells: tuple[CarriedFarewell, ...]
    cookies: tuple[tuple[float, int | None], ...]  # readings of the kernel's counter of SYN cookies
    generations: tuple[CarriedGeneration, ...]  # the current one first
    tally: CarriedTally
    lock: CarriedFile | None = None
    format: int = FORMAT
    board: int = scoreboard.VERSION
    wire: int = wire.VERSION

    def descriptors(self) -> list[int]:
        """Every descriptor that has to outlive the exec."""
        wiring = self.wiring
        found = [wiring.doorbell_read, wiring.doorbell_write, wiring.devnull, *self.inherited]
        found += [fd for file in wiring.logs for fd in (file.write_end, file.read_end, file.control)]
        found += [file.fd for file in (self.control, self.lock, self.pid_file) if file is not None]
        found += [listener.fd for listener in self.listeners]
        for generation in self.generations:
            link = generation.link
            found += [link.channel, link.board, link.orders, link.gate, link.stacks]
        return [fd for fd in found if fd != -1]


def write(state: State) -> bytes:
    """The state as bytes. ``kept`` is for who can't make anything of the rest, and goes back (`prefork.system.guard`)."""
    return json.dumps({**_plain(state), "kept": state.descriptors()}).encode()


def read(data: bytes) -> State:
    """The state in a file. Raises StateError when it is none, or not one that this program can go on from."""
    if len(data) > STATE_LIMIT:
        raise StateError(f"the state has more than {STATE_LIMIT} bytes")
    try:
        plain = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise StateError(f"the state is no JSON: {error}") from None
    if not isinstance(plain, dict):
        raise StateError("the state is no JSON object")
    for name, known in (("format", FORMAT), ("board", scoreboard.VERSION), ("wire", wire.VERSION)):
        if plain.get(name) != known or isinstance(plain.get(name), bool):
            whose = f"prefork {plain['version']}" if isinstance(plain.get("version"), str) else "the running prefork"
            raise StateError(
                f"{whose} writes {name} {str(plain.get(name))[:20]}, and this one reads {name} {known}: it takes a restart"
            )
    plain.pop("kept", None)
    try:
        state: State = _restore(State, plain, "state")
        _check(state)
    except (ValueError, RecursionError) as error:
        raise StateError(f"the state makes no sense: {error}") from None
    return state


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check(state: State) -> None:
    """Raise ValueError where fields do not fit each other."""
    _within(state.current_listeners, len(state.listeners), "a listener")
    _within((farewell.listener for farewell in state.farewells), len(state.listeners), "a listener")
    if not state.generations:
        raise ValueError("no generation")
    if len({generation.number for generation in state.generations}) != len(state.generations):
        raise ValueError("two generations of one number")
    for generation in state.generations:
        _check_generation(generation, len(state.listeners))
    if len(state.tally.histogram) != scoreboard.BUCKETS:
        raise ValueError(f"{len(state.tally.histogram)} buckets")
    descriptors = state.descriptors()
    if len(set(descriptors) - set(state.inherited)) + len(state.inherited) != len(descriptors):
        raise ValueError("a descriptor twice")
    if not all(0 <= fd < 1 << 31 for fd in descriptors):
        raise ValueError("no descriptor")


def _check_generation(generation: CarriedGeneration, listeners: int) -> None:
    layout, pool = generation.layout, generation.pool
    _within(generation.listeners, listeners, "a listener")
    if layout.listeners != len(generation.listeners) or not 0 < layout.slots <= scoreboard.SLOTS_LIMIT or layout.capacity < 1:
        raise ValueError("a board of another shape")
    if not all(host.isascii() and 0 <= port < 1 << 16 for _, host, port in generation.unserved.values()):
        raise ValueError("no peer")
    if not len(generation.targets) == len(pool.high) == len(generation.episodes) == layout.listeners:
        raise ValueError("not one target for each listener")
    _within(generation.retired, layout.listeners, "a listener")
    _within(pool.high, layout.capacity + 1, "a slot")
    _within([*generation.counted, *generation.served, *generation.unserved], layout.slots, "a slot")
    slots = [worker.slot for worker in pool.workers]
    _within(slots, layout.slots, "a slot")
    pids = [worker.pid for worker in pool.workers if worker.pid]
    if len(set(slots)) != len(slots) or len(set(pids)) != len(pids):
        raise ValueError("two workers in one slot, or of one pid")
    for worker in pool.workers:
        if worker.listener != layout.listener(worker.slot) or worker.slot % layout.capacity >= pool.high[worker.listener]:
            raise ValueError(f"slot {worker.slot} is not where it should be")
    if not (set(pool.unready) | set(pool.unborn)) <= set(slots):
        raise ValueError("a slot that is not in use")
    link = generation.link
    if link.pid is None and link.channel != -1:
        raise ValueError("a channel to nobody")
    if min(link.board, link.orders, link.stacks, link.channel if link.pid else 0) < 0:
        raise ValueError("no descriptor")
    for message in link.outbox:
        bytes.fromhex(message)


def _within(numbers: typing.Iterable[int], limit: int, what: str) -> None:
    for number in numbers:
        if not 0 <= number < limit:
            raise ValueError(f"{number} is not {what}")


# -- values as JSON has them, and back


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _restore(kind: Any, plain: Any, where: str) -> Any:
    """The value of type ``kind`` that ``plain`` stands for. Raises ValueError saying where it is not one."""
    if kind is Any:
        return plain
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        (wanted,) = [one for one in typing.get_args(kind) if one is not type(None)]
        return None if plain is None else _restore(wanted, plain, where)
    if origin is tuple:
        return _restore_tuple(typing.get_args(kind), plain, where)
    if origin is dict:
        _expect(dict, plain, where)
        key_kind, value_kind = typing.get_args(kind)
        return {_key(key_kind, key, where): _restore(value_kind, one, f"{where}.{key[:20]}") for key, one in plain.items()}
    if dataclasses.is_dataclass(kind):
        return _restore_dataclass(kind, plain, where)
    return _restore_scalar(kind, plain, where)


def _restore_tuple(kinds: tuple[Any, ...], plain: Any, where: str) -> tuple[Any, ...]:
    _expect(list, plain, where)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(plain)
    if len(kinds) != len(plain):
        raise ValueError(f"{where} has {len(plain)} entries, not {len(kinds)}")
    return tuple(_restore(kind, one, f"{where}[{place}]") for place, (kind, one) in enumerate(zip(kinds, plain, strict=True)))


def _restore_dataclass(kind: Any, plain: Any, where: str) -> Any:
    _expect(dict, plain, where)
    hints = _hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind) if f.init}
    if unknown := plain.keys() - known.keys():
        raise ValueError(f"{where} has an unknown {min(unknown)[:40]!r}")
    missing = [
        name
        for name, f in known.items()
        if name not in plain and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}")
    return kind(**{name: _restore(hints[name], one, f"{where}.{name}") for name, one in plain.items()})


def _restore_scalar(kind: Any, plain: Any, where: str) -> Any:
    if kind is float and type(plain) is int:
        plain = float(plain) if abs(plain) < _LARGEST else plain
    _expect(kind, plain, where)
    if kind is int and abs(plain) >= _LARGEST:
        raise ValueError(f"{where} is no number of 100 bits")
    return plain


def _expect(kind: type, plain: Any, where: str) -> None:
    if type(plain) is not kind:
        raise ValueError(f"{where} is no {kind.__name__}")


def _key(kind: type, key: str, where: str) -> Any:
    if kind is not int:
        return key
    if not key.isdecimal() or not key.isascii() or len(key) > 10:
        raise ValueError(f"{where} has {key[:20]!r} for a number")
    return int(key)
