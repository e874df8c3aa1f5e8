"""A worker: one process that blocks in accept(), serves one connection at a time, and says so on the scoreboard.

Read `Worker._prepare_to_live` for its life and `_prepare_to_serve` for the loop. What it must not do: poll, raise out of
accept(), or let the handler's mess reach the next client.

How a worker retires without losing a connection (signal(7), PEP 475; measured: 0 lost in 1,996 retirements under full load,
where a handler that raises lost one for every three): being asked is a byte on the master's orders, read before each accept,
and a signal. The signal's handler sets a flag and, unless a connection is being served, puts /dev/null in the listener's
place in this process' descriptor table. accept() is then retried by CPython, fails with ENOTSOCK, and the loop leaves; a
connection that the kernel had already handed over is served first. One window is left, a signal that lands just before the
system call is entered: whoever asked repeats it while the slot says IDLE.
"""

import _socket
import _thread
import gc
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import close, getpid, getppid, read, write
from time import monotonic_ns as now_ns
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn

from setproctitle import setproctitle

from prefork import log, request
from prefork.accepting import EXIT_BROKEN, EXIT_RETIRED, Accepting
from prefork.config import Config
from prefork.errors import HandlerError
from prefork.handler import Connection, Handler, Shape
from prefork.net.address import client_address, parts_text, peer_parts, peer_text
from prefork.net.handshakes import Looks
from prefork.net.listener import FAREWELL, Listener
from prefork.net.peer import has_gone, may_be_told_by_peer
from prefork.pool import scoreboard, wire
from prefork.pool.scoreboard import BUSY, IDLE, LEAVING, PARKED, PAUSED, Scoreboard
from prefork.system import finalizers, process, signals, stacks
from prefork.values import RLIMITS

# What handlers of the import are undone for: a worker is told by it, or (SIGPIPE) must not die of a reader that has gone.
SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signals.RETIRE, signals.PARENT_DIED, signal.SIGPIPE, *stacks.SIGNALS})
# The master has not looked for this long: ring, whatever the row of states says; it may be a stray writer's.
UNSEEN_NS = 1_000_000_000
TRACEBACKS_A_SECOND = 10
# A worker that has served its last connection waits so long for its replacement's fork, and looks as often whether it can be had.
RELEASE_PATIENCE, RELEASE_LOOK = 5.0, 0.02
EXIT_SIGNAL_HANDLER = 1
# How a connection ends that has not simply ended.
ERROR, REJECTED = "error", "rejected"
Steps = tuple[Callable[[], object], ...]


@dataclass(frozen=True, slots=True)
class Brief:
    """What a worker needs to know; the same for all of a listener's."""

    generation: int
    config: Config
    name: str
    master_pid: int
    fork_server_pid: int
    scoreboard: Scoreboard
    place: int  # the listener's, among all
    listener: Listener
    listener_stat: os.stat_result
    doorbell: int
    gate: int
    devnull: int
    devnull_stat: os.stat_result
    stacks: int
    reopen: Steps  # makes doorbell and stacks this process' own: no other worker can have it wait there
    offer: Callable[[], object] | None  # see `prefork.system.credentials.offering_to_the_oom_killer`
    part: Callable[[], object]  # see `prefork.system.process.parting`
    schedule: Callable[[], object] | None  # see `prefork.system.process.batch_scheduling`
    forget: Steps  # what the import has registered for the end, where it has
    private: frozenset[int]  # descriptors of the fork server's own: what the user's import has opened stays open


# Set in a process that has become a worker, and nowhere else.
_here: "Worker | None" = None


def main(worker: "Worker", slot: int) -> NoReturn:
    """Be this worker. Called in the child, with all signals blocked; never returns."""
    status = EXIT_BROKEN
    try:
        status = worker.live(slot)
    except BaseException as error:
        # A left-over alarm of the handler may still ring; nothing may unwind into the frames of the fork server and the master
        # below us, which would act for them on sockets that are shared.
        signals.block()
        if _is_a_signal_handlers(error):
            status = EXIT_SIGNAL_HANDLER
            log.event("signal_handler_raised", text=traceback.format_exc())
        else:
            log.event("bug", where="worker", text=traceback.format_exc())
    finally:
        os._exit(status)


def _is_a_signal_handlers(error: BaseException) -> bool:
    """Whether a handler of user code's has raised it, for a signal that came between two connections."""
    handlers = [action for signo, action in signals.installed().items() if signo not in SIGNALS]
    codes = {code for action in handlers if (code := getattr(action, "__code__", None)) is not None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def role(generation: int) -> str:
    """What this process is called in the log: a fork server, or the worker that it has become."""
    return f"gen {generation}" if _here is None else f"gen {generation} worker {_here.slot}"


def connection_here() -> Connection | None:
    """The connection that this process serves; None where it is no worker. Raises RuntimeError when a worker serves none."""
    return None if _here is None else _here.connection()


def after_fork() -> None:
    """In a child that the handler forked: it has no slot, and must neither accept nor keep the port."""
    if _here is not None:
        _here.be_a_child()


class Worker:
    """One worker process, from its birth to its end. Made before the fork, for each listener, with all that can be known there."""

    def __init__(
        self,
        brief: Brief,
        handler: Handler,
        bound: Mapping[str, Any] | None = None,
        handlers: Mapping[int, Any] = MappingProxyType({}),
    ) -> None:
        """``bound``: what a server that is the handler has become; ``handlers``: user code's own, of signals."""
        self.brief = brief
        self.handler = handler
        self._bound = bound  # of a server that is the handler: what it is where it listens here
        self.board = brief.scoreboard
        self.slot = -1
        self.pid = 0
        self.retiring = False
        self.farewell_ends: float | None = None  # without master and fork server: until when this process accepts
        self.forked = False
        self.sock: socket.socket  # the latest connection
        # What accept() said of the peer, when that was, and the slot's count, while a connection is served. What this process knows
        # of itself it does not look up on the board, where any worker can write.
        self.serving: tuple[Any, int, int] | None = None
        self.parked = False
        self.input: tuple[int, os.stat_result] | None = None  # with drain = "eof": the latest connection's descriptor
        self._connection: Connection | None = None
        self._clients_end: BaseException | None = None  # what a handler's server raised of a client that had gone by then
        self._ready, self._accepted, self._worn, listener_spoilt = (
            wire.doorbell_of(why, brief.generation)
            for why in (wire.Ring.READY, wire.Ring.ACCEPTED, wire.Ring.TIRED, wire.Ring.LISTENER)
        )
        self._ring = self._prepare_to_ring()
        self._accepting = Accepting(
            brief.scoreboard,
            brief.listener.sock,
            lambda: self._asked_to_leave() or self._is_orphan(),
            ring_vacant=lambda: self._ring(self._worn),
            ring_spoilt=lambda: self._ring(listener_spoilt),
        )
        # The first two are for people; prefork itself sends what a handler that has become another program does not end by.
        self._handlers = (
            (signal.SIGTERM, self._on_retire),
            (signal.SIGINT, self._on_retire),
            (signals.RETIRE, self._on_retire),
            (signals.PARENT_DIED, self._on_parent_died),
        )
        self._users_handlers = handlers
        self._tie_to_parent = process.signalling_when_orphaned(signals.PARENT_DIED)
        self.live = self._prepare_to_live(self._prepare_to_serve())

    # -- its life

    def _prepare_to_live(self, serve: Callable[[int], int]) -> Callable[[int], int]:
        """What is a worker's life: given its slot, it becomes a process of its own, serves, cleans up, and returns the exit status.

        The order matters: signals are still blocked, and are let in when everything is ours.
        """
        brief, board = self.brief, self.board
        words, states, order_words, committed = board.words, board.states, board.order_words, scoreboard.COMMITTED
        records_at, record_words = board.record(0), scoreboard.RECORD_WORDS
        pid_at, started_at = records_at + scoreboard.PID, records_at + scoreboard.STARTED
        title = f"prefork: {brief.name} gen {brief.generation} worker "
        parents = (brief.fork_server_pid, brief.master_pid)
        gate, ring, ready = brief.gate, self._ring, self._ready
        starts, exits = (option in self.handler.hooks for option in ("on_worker_start", "on_worker_exit"))
        first: Steps = (
            *signals.freshening({**signals.passing_over(), **self._users_handlers, **dict(self._handlers)}),
            *brief.forget,
            brief.part,
            self._tie_to_parent,
        )
        then: Steps = (
            *(partial(close, fd) for fd in brief.private),
            process.becoming_public(),  # nothing of the fork server's is left in it; the next steps need it
            *brief.reopen,
            *(step for step in (brief.offer, brief.schedule) if step is not None),
            *(partial(resource.setrlimit, RLIMITS[name], (limit, limit)) for name, limit in brief.config.rlimit),
            signals.unblock,
            *signals.forgetting,
            *([partial(vars(self.handler.call).update, self._bound)] if self._bound is not None else ()),
        )

        def live(slot: int) -> int:
            global _here
            self.slot, self.pid, _here = slot, getpid(), self
            # First of all: the master must be able to know this process, should the fork server die before it could tell.
            words[pid_at + slot * record_words] = self.pid
            for step in first:
                step()
            if getppid() not in parents:
                return EXIT_RETIRED  # the parent died before it could be told to signal
            setproctitle(title + str(slot))
            for step in then:
                step()
            if starts and (failed := self._start_hook()) is not None:
                return failed
            words[started_at + slot * record_words] = now_ns()
            try:
                if not order_words[committed]:
                    self.parked = True
                    states[slot] = PARKED
                    ring(ready)
                    # Ends when the master opens the gate, when it dies, and when a signal puts /dev/null here.
                    read(gate, 1)
                    self.parked = False
                close(gate)
            except OSError:
                if not self.retiring:  # else `_put_devnull` has left nothing there
                    raise
                self.parked = False
            states[slot] = IDLE
            ring(ready)
            try:
                status = serve(slot)
            finally:
                states[slot] = LEAVING
            if exits:
                self._exit_hook()
            self._clean_up()
            return status

        return live

    def _prepare_to_ring(self) -> Callable[[Callable[[int, int], bytes]], None]:
        doorbell = self.brief.doorbell

        def ring(why: Callable[[int, int], bytes]) -> None:
            try:
                write(doorbell, why(self.slot, self.pid))
            except (BlockingIOError, BrokenPipeError):
                # Full: the master has something to read and will look. Broken: it is dead, which the kernel tells.
                pass

        return ring

    def _start_hook(self) -> int | None:
        """Run it. The exit status when it failed."""
        try:
            self._run_hook("on_worker_start")
        except HandlerError as error:
            self.board.leave_last_words(str(error))
            self._clean_up()
            return error.exit_code
        return None

    def _exit_hook(self) -> None:
        try:
            self._run_hook("on_worker_exit")
        except HandlerError as error:
            what, _, text = str(error).partition("\n")
            log.event("exit_failed", what=what, text=text)

    def _prepare_to_serve(self) -> Callable[[int], int]:
        """What accepts, serves, and again: the exit status once this worker was asked to leave or can't accept any more."""
        board, listener, conf, place = self.board, self.brief.listener, self.brief.config, self.brief.place
        recent_at, recent_mask, recent_shift = board.recent_word(place), scoreboard.RECENT - 1, scoreboard.RECENT_SHIFT
        log_access = self._log_access if log.access_is_logged() else None
        limited, wears = bool(conf.max_connections), bool(conf.max_lifetime or conf.max_memory)
        ends_input, more = conf.drain == "eof", log_access is not None or wears or limited
        accept_one: Callable[[], tuple[int, Any]] = listener.sock._accept  # type: ignore[attr-defined]
        boards = board.words, board.order_words, board.board, board.orders
        indices = (
            board.listener_word(place, scoreboard.RING_BELOW),
            board.listener_word(place, scoreboard.HIGH),
            board.row_start(place),
        )
        # Of slot 0; from one slot to the next a byte, or a record.
        firsts = board.row_start(0), board.layout.retire_at, board.record(0), board.peer_start(0)
        lengths = scoreboard.RECORD_WORDS, board.peer_start(1) - board.peer_start(0), scoreboard.PEER_BYTES
        offsets = (scoreboard.SINCE, scoreboard.BEGUN, scoreboard.PORT, scoreboard.OK, scoreboard.ERROR, scoreboard.REJECTED)
        histogram, below_limit, account = scoreboard.HISTOGRAM, scoreboard.COUNT_LIMIT - 1, board.account
        # The C method: the descriptor is closed even when a file made of the socket is still referred to.
        calls = accept_one, self._call(), _socket.socket.close, close, now_ns, sys.getrefcount
        sockets = socket.socket, socket.getdefaulttimeout
        kinds = int(listener.sock.family), int(listener.sock.type), listener.sock.proto, conf.socket_timeout or None
        constants = IDLE, BUSY, bytes([IDLE]), scoreboard.FEW, listener.sock.family == socket.AF_INET, signals.changes, slice

        def serve(slot: int) -> int:
            # Where clients are few, caches are cold, and what counts is how many cache lines are touched: 1,280 by a connection
            # outside the kernel, the echo included. So: local variables (one of the function around us is a line more), bytes of
            # the boards by their mappings (a view is four lines more), few different functions of C. And what is called or looked
            # up before the first accept() is a page of memory that each worker has of its own: nearly all of it was done above.
            words, order_words, row, orders = boards
            ring_at, high_at, row_at = indices
            first_state, first_retire, first_record, first_peer = firsts
            record_words, record_bytes, peer_bytes = lengths
            to_since, to_begun, to_port, to_ok, to_error, to_rejected = offsets
            accept, call, close_socket, close_fd, now, references = calls
            new_socket, default_timeout = sockets
            family, kind, protocol, timeout = kinds
            idle, busy, one_idle, few, is_ipv4, changes, piece = constants
            state_at, retire_at, record = first_state + slot, first_retire + slot, first_record + slot * record_words
            since_at, begun_at, port_at = record + to_since, record + to_begun, record + to_port
            ok_at, error_at, rejected_at, histogram_at = record + to_ok, record + to_error, record + to_rejected, record + histogram
            peer_at = first_peer + slot * record_bytes
            peer, our_row, known_high = piece(peer_at, peer_at + peer_bytes), piece(0), 0
            # Of this slot's counters the board has copies only, which a stray write can't make wrong for longer than a connection.
            counted, mask = account(slot), below_limit
            begun, ended_ok, ended_error, ended_rejected = counted.begun, counted.ok, counted.error, counted.rejected
            first_begun = begun
            # `me` is for every connection, `self` for what is rare.
            me, slot_number, unseen_at, failing = self, slot + 1, 0, False
            last = self._last_connection(begun) if limited else -1
            worn = self._worn_out() if wears else None
            sock: Any = None
            kept_fd, known = -1, 0  # of a connection's object that waits for the next one; references to one that nobody else knows

            while True:
                row[state_at] = idle
                me.serving = None
                if orders[retire_at] or me.retiring:
                    status = EXIT_RETIRED
                    break
                try:
                    fd, address = accept()
                except OSError as error:
                    verdict = self._accepting.failed(error, slot, has_served=begun > first_begun)
                    if verdict is None:
                        failing = True
                        continue
                    status = verdict
                    break
                if failing:
                    failing = False
                    self._accepting.succeeded()
                words[since_at] = since = now()
                host, port = address if is_ipv4 else peer_parts(family, address)
                row[peer] = host.encode().ljust(peer_bytes, b"\0")
                words[port_at] = port
                begun += 1
                words[begun_at] = begun
                me.serving = address, since, begun
                row[state_at] = busy
                high = order_words[high_at]
                if high != known_high:
                    known_high, our_row = high, piece(row_at, row_at + high)
                if high > few:
                    entry = since >> recent_shift
                    words[recent_at + (entry & recent_mask)] = scoreboard.recent_entry(entry, slot_number)
                below = order_words[ring_at]
                if below and row[our_row].count(one_idle) < below:
                    self._ring(self._accepted)
                elif since > unseen_at:
                    unseen_at = order_words[scoreboard.LAST_LOOK] + UNSEEN_NS
                    if since > unseen_at:
                        self._ring(self._accepted)
                if begun == last:
                    self._tire()
                if fd != kept_fd:
                    if kept_fd >= 0:
                        sock.detach()  # the number is somebody else's now
                    me.sock = sock = new_socket(family, kind, protocol, fd)
                    if default_timeout() is not timeout:
                        sock.settimeout(timeout)
                    known = references(sock) if timeout is None and not hasattr(sock, "__dict__") else 0
                kept_fd = -1
                if ends_input:
                    self._note_input(fd)
                outcome = None
                try:
                    try:
                        call(sock)
                    finally:
                        if changes:
                            self._put_back()
                except BaseException as error:
                    outcome = self._outcome_of(error, fd, parts_text(host, port))
                if me.forked:
                    os._exit(EXIT_RETIRED)  # a child that the handler forked has come back here: the slot is its parent's
                try:
                    if references(sock) == known and sock.__weakref__ is None and sock.fileno() == fd and sock.gettimeout() is None:
                        # Nobody else knows the object, and it is as it was: it is the next connection's, if that gets the same
                        # number. To make one costs 180 cache lines (and a getsockname(2)), which was 6 % at 3,000/s.
                        kept_fd = fd
                        close_fd(fd)
                    else:
                        close_socket(sock)
                except OSError as error:
                    log.event("peer_gone", peer=parts_text(host, port), reason=error)
                took = now() - since
                if outcome is None:
                    ended_ok += 1
                else:
                    ended_error += outcome == ERROR
                    ended_rejected += outcome == REJECTED
                words[begun_at], words[ok_at], words[error_at], words[rejected_at] = begun, ended_ok, ended_error, ended_rejected
                if outcome is not REJECTED:  # what was rejected was not served: it has no duration
                    bucket_at = histogram_at + (took >> 10).bit_length()
                    words[bucket_at] = words[bucket_at] + 1 & mask
                if more:
                    if log_access is not None:
                        log_access(parts_text(host, port), took, outcome or "ok")
                    if worn is not None and worn():
                        self._tire()
                    if begun == last and self._is_released():
                        status = EXIT_RETIRED
                        break

            words[begun_at], words[ok_at], words[error_at], words[rejected_at] = begun, ended_ok, ended_error, ended_rejected
            return status

        return serve

    # -- recycling

    def _tire(self) -> None:
        """Ask to be recycled: to be told to leave once somebody else accepts in this place."""
        if self.board.tired[self.slot] != 1:
            self.board.tired[self.slot] = 1
            self._ring(self._worn)

    def _last_connection(self, begun: int) -> int:
        """The slot's count at the last connection that is for this worker."""
        conf = self.brief.config
        # Not `random`: user code may have seeded it, and then all workers would go at once.
        return begun + conf.max_connections + int.from_bytes(os.urandom(8)) % (conf.max_connections_jitter + 1)

    def _is_released(self) -> bool:
        """Whether this worker may leave after its last connection. False: none can be forked in its place, so it serves on.

        Until then it accepts nothing. A worker that serves once leaves in any case: its process may be another user's by now.
        """
        board = self.board
        if self.brief.config.max_connections == 1:
            return True
        board.states[self.slot] = PAUSED
        end = time.monotonic() + RELEASE_PATIENCE
        signals.block()
        try:
            while not self._asked_to_leave() and board.order_words[scoreboard.FORKS] and time.monotonic() < end:
                if signal.sigtimedwait({signal.SIGTERM, signals.RETIRE}, RELEASE_LOOK) is not None:
                    self.retiring = True
        finally:
            signals.unblock()
        return self._asked_to_leave()

    def _worn_out(self) -> Callable[[], bool]:
        """What tells, after a connection, whether this process has become too old or too large."""
        conf, born = self.brief.config, time.monotonic()
        served = 0

        def worn() -> bool:
            nonlocal served
            served += 1
            if conf.max_lifetime and time.monotonic() - born > conf.max_lifetime:
                return True
            try:
                size = process.resident_memory() if conf.max_memory else 0
            except OSError:
                return True  # a handler has left no descriptor to look with
            if size <= conf.max_memory:
                return False
            if served == 1:
                self._note_size(size)
            return True

        return worn

    def _note_size(self, size: int) -> None:
        """One connection has made this worker too large, and each may: tell it of the slot's 1st, 2nd, 4th, 8th, ... connection."""
        _, _, begun = self._served()
        if begun & (begun - 1) == 0:
            log.event("recycled_at_once", has=size, max_memory=self.brief.config.max_memory)

    def _asked_to_leave(self) -> bool:
        return self.retiring or bool(self.board.retire[self.slot]) or bool(self.board.order_words[scoreboard.STOPPING])

    # -- the handler

    def _call(self) -> Callable[[socket.socket], Any]:
        """The handler as something that takes only a socket."""
        call, brief = self.handler.call, self.brief
        match self.handler.shape:
            case Shape.SOCKET:
                return call
            case Shape.CONNECTION:
                return lambda sock: call(sock, self.connection())
            case Shape.REQUEST:
                server = request.RequestServer(brief.listener, call, brief.config.backlog)
                return lambda sock: call(sock, client_address(self._served()[0]), server)
            case Shape.SERVER:
                return request.serving(call, lambda: client_address(self._served()[0]), self._note_clients_end)

    def connection(self) -> Connection:
        """The connection being served, made when first asked for. Raises RuntimeError when there is none."""
        brief = self.brief
        if self.forked:
            raise RuntimeError(
                "prefork.current(): a child that the handler forked has no connection of its own; ask before the fork"
            )
        address, since, begun = self._served()
        number = f"{brief.generation}.{self.slot}.{begun}"
        if self._connection is None or self._connection.id != number:
            self._connection = Connection(
                id=number,
                peer=peer_text(brief.listener.address.family, address),
                client_address=client_address(address),
                local=self._local(),
                listener=str(brief.listener.address),
                worker=self.slot,
                generation=brief.generation,
                accepted_at=since / 1e9,
                asked_to_stop=self._asked_to_leave,
            )
        return self._connection

    def _served(self) -> tuple[Any, int, int]:
        if self.serving is None:
            raise RuntimeError("prefork.current(): this worker serves no connection now; hooks and exit functions have none")
        return self.serving

    def _local(self) -> str:
        sock, listener = self.sock, self.brief.listener.address
        if listener.family == socket.AF_UNIX:
            return str(listener)
        try:
            return peer_text(listener.family, sock.getsockname())
        except OSError:  # the handler has closed or detached it
            return str(listener)

    def _run_hook(self, option: str) -> None:
        """Raises HandlerError. A hook's children end here, like a handler's; what it changes of its process stays."""
        try:
            self.handler.run_hook(option)
        finally:
            if self.forked:
                os._exit(EXIT_RETIRED)
            if signals.changes:
                process.settle()
                self._put_back(signals.keep)

    def _outcome_of(self, error: BaseException, fd: int, peer: str) -> str | None:
        """How a connection has ended whose handler has raised this; None where it has just ended, because its client has gone."""
        if type(error) is request.RejectedError:
            return REJECTED
        self._put_back()
        noted, self._clients_end = self._clients_end, None
        if error is noted or self._is_clients_end(error, fd):
            log.event("peer_gone", peer=peer, reason=_in_words(error))
            return None
        self._handler_raised(error, peer)
        return ERROR

    def _note_clients_end(self, error: BaseException, fd: int) -> None:
        self._clients_end = error if self._is_clients_end(error, fd) else None

    def _is_clients_end(self, error: BaseException, fd: int) -> bool:
        sock = self.brief.listener.sock
        return may_be_told_by_peer(error) and has_gone(fd, sock.fileno(), int(sock.family), self._served()[0])

    def _handler_raised(self, error: BaseException, peer: str) -> None:
        if isinstance(error, BlockingIOError):  # of a blocking socket: its time-out is the listener's, where a handler has set one
            self._accepting.unblock()
        suppressed = self.board.may_log_traceback(int(time.monotonic()), TRACEBACKS_A_SECOND)
        if suppressed is None:
            return
        if suppressed:
            log.event("handler_errors", count=suppressed)
        tb: TracebackType | None = error.__traceback__
        while tb is not None and tb.tb_frame.f_code.co_filename in (__file__, request.__file__):
            tb = tb.tb_next
        log.event("handler_error", peer=peer, text="".join(traceback.format_exception(type(error), error, tb)))

    def _log_access(self, peer: str, took_ns: int, outcome: str) -> None:
        brief = self.brief
        log.event(
            "access",
            peer=peer,
            duration=took_ns / 1e9,
            outcome=outcome,
            slot=self.slot,
            generation=brief.generation,
            listener=str(brief.listener.address),
        )

    def _put_back(self, handlers: Callable[[], None] = signals.put_back) -> None:
        """User code changed signals, the working directory or credentials: put back what retiring and the next client depend on."""
        while True:
            try:
                signals.block()
                signals.stop_timers()
                handlers()
                if not stacks.SIGNALS.isdisjoint(signals.replaced()):
                    stacks.tell_again()
                self._take_signals()
                signals.unblock()
                signals.forget()
            except BaseException as error:  # an alarm that had rung before its timer was stopped; it can't ring for ever
                log.event("late_alarm", reason=error)
            else:
                break
        try:
            process.go_home()
        except OSError as error:  # it has closed the way back: the next connection is for another worker
            log.event("not_at_home", reason=error.strerror)
            self.retiring = True
        if not self.forked:
            # The kernel forgets it when credentials change, and of a parent that has died meanwhile it has not told.
            self._tie_to_parent()
            self._on_parent_died(signals.PARENT_DIED, None)

    def be_a_child(self) -> None:
        """Of a handler's fork: no worker any more."""
        self.forked = True
        signals.hear_again(signo for signo, _ in self._handlers)
        stacks.be_silent()
        for fd in (self.brief.listener.fileno(), self.brief.doorbell, self.brief.stacks):
            try:
                os.close(fd)
            except OSError as error:
                log.event("child_keeps", descriptor=fd, reason=error.strerror)

    # -- leaving

    def _take_signals(self) -> None:
        for signo, handler in self._handlers:
            signals.handle(signo, handler)

    def _on_retire(self, _signo: int, _frame: object) -> None:
        """Never raises: it runs between any two steps of the user's code."""
        self.retiring = True
        if self.parked:
            self._unplug(self.brief.gate, None)
        elif self.serving is None:
            self._unplug(self.brief.listener.sock.fileno(), self.brief.listener_stat)
        elif self.brief.config.drain == "eof":
            self._end_input()

    def _note_input(self, fd: int) -> None:
        """A connection was accepted, whose input may have to be ended."""
        self.input = fd, os.fstat(fd)
        if self.retiring:  # the signal came before there was anything to end
            self._end_input()

    def _end_input(self) -> None:
        """Let the handler see the end of its connection's input, unless user code has put something else at the descriptor."""
        if self.input is None:
            return
        fd, accepted = self.input
        try:
            if os.path.samestat(os.fstat(fd), accepted):
                process.end_input(fd)
        except OSError:
            # Closed or detached by user code, or the peer has gone: then there is no input to end.
            return

    def _on_parent_died(self, signo: int, frame: object) -> None:
        """A dead fork server leaves us to the master, and we serve on. With anybody else as parent the master is gone too."""
        if not self._is_orphan():
            return  # user code has sent it
        # A worker that was asked to leave has a successor, whose fork server may be letting the queue be served; one that has not
        # been let in was to be one.
        if self._asked_to_leave() or not self.board.order_words[scoreboard.COMMITTED] or not self._serves_farewell():
            self._on_retire(signo, frame)

    def _is_orphan(self) -> bool:
        return os.getppid() not in (self.brief.fork_server_pid, self.brief.master_pid)

    def _serves_farewell(self) -> bool:
        """No process is left that could close the listener: turn new clients away, and serve on for FAREWELL. False afterwards.

        A thread waits meanwhile, and not a timer, which is user code's. It looks at nothing: each worker has one.
        """
        if self.farewell_ends is None and self._has_listener():
            self.farewell_ends = time.monotonic() + FAREWELL
            try:
                self.brief.listener.turn_away(time.monotonic(), Looks(), cookies=False)
            except OSError:
                pass  # a path that another user has to remove
            try:
                with signals.blocked():  # and in that thread for good: signals have to interrupt accept()
                    _thread.start_new_thread(self._end_farewell, (_thread.get_ident(),))
            except RuntimeError:  # no room for a thread
                self.farewell_ends = 0.0
                self._free_address()
        return self.farewell_ends is not None and time.monotonic() < self.farewell_ends

    def _end_farewell(self, main_thread: int) -> None:
        time.sleep(FAREWELL)
        self._free_address()
        signal.pthread_kill(main_thread, signals.PARENT_DIED)

    def _free_address(self) -> None:
        """No process will accept there any more, and no other is left to say so: clients are refused, and the address is free."""
        try:
            if self._has_listener():
                self.brief.listener.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Shut down by another worker, or closed by user code.
            return

    def _has_listener(self) -> bool:
        """Whether the listener is ours, and still where it was: user code may have closed and reopened everything."""
        listener = self.brief.listener
        try:
            return listener.ours and os.path.samestat(os.fstat(listener.fileno()), self.brief.listener_stat)
        except OSError:
            return False

    def _unplug(self, fd: int, expected: os.stat_result | None) -> None:
        """Put /dev/null where ``fd`` is, but only if both are still ours: user code may have closed and reopened everything."""
        try:
            if expected is not None and not os.path.samestat(os.fstat(fd), expected):
                return
            if os.path.samestat(os.fstat(self.brief.devnull), self.brief.devnull_stat):
                self._put_devnull(fd)
        except OSError:
            # Closed by user code: then accept() fails by itself, and there is nothing to unplug.
            return

    def _put_devnull(self, fd: int) -> None:
        try:
            os.dup2(self.brief.devnull, fd, inheritable=False)
        except OSError:
            # User code, or `rlimit`, has set RLIMIT_NOFILE so low that nothing can be put at this number (dup2(2)), which is open
            # all the same. Closed will do: no thread of user code can open anything there.
            if fd < resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                raise
            os.close(fd)

    def _clean_up(self) -> None:
        """What an interpreter does at its end, without waiting for threads that a handler left behind."""
        finalizers.finish(_exit_failed)
        try:
            _flush()
        except BaseException:
            _exit_failed("flush")


def _exit_failed(what: str) -> None:
    log.event("exit_failed", what=f"{what} raised", text=traceback.format_exc())


def _in_words(error: BaseException) -> str:
    """What it says; user code's may fail at saying it."""
    try:
        return str(error)
    except BaseException:
        return type(error).__name__


def _flush() -> None:
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    finally:
        log.finish_prints()


def freeze() -> None:
    """Before the first fork: everything that exists now is left alone by the collector, so that its pages stay shared."""
    gc.collect()
    gc.freeze()
