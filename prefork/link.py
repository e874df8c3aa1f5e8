"""The master's end of one fork server: its process, the channel to it, what its workers share: boards, gate, pipe for stacks.

Effects only: what is sent and what a report means is `prefork.generation`'s business.
"""

import errno
import os
import signal
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from prefork import forkserver, log
from prefork.carried import CarriedLink
from prefork.config import Config
from prefork.net.listener import Listener
from prefork.pool import scoreboard, wire
from prefork.pool.scoreboard import Access, Layout, Scoreboard
from prefork.pool.state import Worker
from prefork.pool.wire import Command, Order, Report
from prefork.system import process, signals
from prefork.system.credentials import Credentials
from prefork.system.identity import Missing, identify
from prefork.system.stacks import Stacks

# Reports taken in one turn: a fork server that floods its channel must not hold the loop.
REPORTS_AT_ONCE = 256
# What does not fit into the channel, or into memory (unix(7)), is sent later.
_LATER = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Wiring:
    """Descriptors that all generations of a daemon share, and where and who the daemon is."""

    name: str
    folder: str
    doorbell_read: int
    doorbell_write: int
    devnull: int
    strangers: set[int] = field(default_factory=set)  # our children that no fork server has forked
    credentials: Credentials | None = None  # who the fork servers become; None: they stay who we are

    @property
    def runs_as_root(self) -> bool:
        """Whether handlers do."""
        return os.geteuid() == 0 and (self.credentials is None or self.credentials.uid == 0)


class Link:
    """One fork server. ``pid`` is None before `start` and after `ended`; ``stopped``: by somebody's signal; ``killed``: by us;
    ``hung_up``: nothing is sent to it or heard of it any more.
    """

    def __init__(self, number: int, layout: Layout, wiring: Wiring) -> None:
        self.number = number
        self.layout = layout
        self.wiring = wiring
        self.pid: int | None = None
        self.stopped = False
        self.killed = False
        self.hung_up = False
        self._outbox: deque[bytes] = deque()
        self._ordered: dict[int, float] = {}  # when the latest fork for a slot was ordered
        self._resources = ExitStack()
        self._gate = -1

    def prepare(self) -> tuple[socket.socket, int]:
        """Make boards, stacks, gate and channel. Returns the fork server's ends of channel and gate."""
        layout, keep = self.layout, self._resources
        self.board_fd = scoreboard.create(f"board-{self.number}", layout.board_bytes)
        keep.callback(os.close, self.board_fd)
        self.orders_fd = scoreboard.create(f"orders-{self.number}", layout.orders_bytes)
        keep.callback(os.close, self.orders_fd)
        self._map_boards()
        self._read_stacks(Stacks())
        gate, self._gate = os.pipe2(os.O_CLOEXEC)
        keep.callback(self.open_gate)
        try:
            channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(gate)
            raise
        self._talk(channel)
        return theirs, gate

    def _map_boards(self) -> None:
        self.board = Scoreboard(self.board_fd, self.orders_fd, self.layout, Access.MASTER)
        self._resources.callback(self.board.close)

    def _read_stacks(self, stacks: Stacks) -> None:
        self.stacks = stacks
        self._resources.callback(stacks.close)

    def _talk(self, channel: socket.socket) -> None:
        self.channel = channel
        self._resources.callback(channel.close)
        channel.setblocking(False)

    def carry(self) -> CarriedLink:
        """What another program has to know to go on with it (`adopt`)."""
        if self.pid is not None:
            self.flush()
        return CarriedLink(
            pid=self.pid,
            stopped=self.stopped,
            channel=self.channel.fileno() if self.pid is not None else -1,
            board=self.board_fd,
            orders=self.orders_fd,
            gate=self._gate,
            stacks=self.stacks.read_end,
            outbox=tuple(message.hex() for message in self._outbox),
        )

    def adopt(self, carried: CarriedLink) -> None:
        """Go on with a fork server that another program of this process has started. Raises OSError and ValueError."""
        self.pid, self.stopped = carried.pid, carried.stopped
        self.board_fd, self.orders_fd, self._gate = carried.board, carried.orders, carried.gate
        self._map_boards()
        self._read_stacks(Stacks(carried.stacks))
        for fd in (self.board_fd, self.orders_fd):
            self._resources.callback(os.close, fd)
        self._resources.callback(self.open_gate)
        if self.pid is not None:
            self._talk(socket.socket(fileno=carried.channel))
            self._outbox.extend(bytes.fromhex(message) for message in carried.outbox)

    def start(self, config: Config, listeners: Sequence[Listener]) -> None:
        """Fork the fork server. Raises OSError when the machine does not let us."""
        wiring = self.wiring
        theirs, gate = self.prepare()
        orders = self._orders_to_read()
        try:
            with signals.blocked():
                master_pid = os.getpid()
                pid = os.fork()
                if pid == 0:
                    forkserver.main(
                        forkserver.Brief(
                            generation=self.number,
                            config=config,
                            credentials=wiring.credentials,
                            name=wiring.name,
                            folder=wiring.folder,
                            master_pid=master_pid,
                            listeners=tuple(listeners),
                            layout=self.layout,
                            board_fd=self.board_fd,
                            orders_fd=orders,
                            channel=theirs,
                            doorbell=wiring.doorbell_write,
                            gate=gate,
                            devnull=wiring.devnull,
                            stacks=self.stacks.write_end,
                        )
                    )
        finally:
            self.stacks.close_write_end()
            theirs.close()
            os.close(gate)
            os.close(orders)
        self.pid = pid
        wiring.strangers.add(pid)
        log.event("booting", generation=self.number, module=config.module)

    def _orders_to_read(self) -> int:
        """A descriptor of the orders for the fork server."""
        try:
            return scoreboard.opened_read_only(self.orders_fd)
        except FileNotFoundError:
            log.event("orders_exposed", generation=self.number)
            return os.dup(self.orders_fd)

    def send(self, order: Order, slot: int = 0) -> None:
        """Give an order, after those that still wait."""
        if order is Order.FORK:
            self._ordered[slot] = process.clock_of_starts()
        if not self.hung_up:
            self._outbox.append(wire.pack_command(Command(order, slot)))
            self.flush()

    def signal(self, worker: Worker, order: Order) -> None:
        """RETIRE, KILL or DUMP a worker through whoever is its parent: only that may signal it, a pid may be a stranger's."""
        if self.pid is not None:
            self.send(order, worker.slot)
        elif order is Order.KILL:
            self.kill_adopted(worker)
        elif self.has_adopted(worker.slot, worker.pid):
            process.signal_child(worker.pid, forkserver.SIGNALS[order])

    # -- whose processes they are

    def has_forked(self, slot: int, pid: int) -> bool | None:
        """Whether the kernel says that this fork server has forked this process, with the credentials that it was given.

        None when the process has gone, or the kernel does not tell. The children of a fork server that has ended are the master's,
        and so are orphans of others, which are older than the order, or another user's.
        """
        found, who = identify(pid), self.wiring.credentials
        if isinstance(found, Missing):
            return None
        # A handler that is root may have become another user, as an ftpd does.
        if who is not None and who.uid != 0 and (found.uids != {who.uid} or found.gids != {who.gid}):
            return False
        if found.parent == self.pid:
            return True
        if found.parent != os.getpid() or not self._has_ended():
            return False
        started = process.started_at(pid)
        return started is None or started > self._ordered.get(slot, 0.0) - process.TICK

    def has_adopted(self, slot: int, pid: int) -> bool:
        """Whether this is a worker that is the master's child by now, and may be signalled by it."""
        if not process.is_child(pid) or pid in self.wiring.strangers:
            return False
        forked = self.has_forked(slot, pid)
        # Where the kernel does not tell, one of our own user is all that it can be: root takes no such chance with another's.
        return forked if forked is not None else self.wiring.credentials is None

    def still_runs(self, pid: int) -> bool:
        """Whether a process that the fork server says to have reaped is there nevertheless."""
        found = identify(pid)
        if isinstance(found, Missing):
            return found is Missing.HIDDEN
        return found.parent == self.pid or (found.parent == os.getpid() and self._has_ended())

    def kill_adopted(self, worker: Worker) -> None:
        """Kill a worker that is the master's child by now. What is not, or not any more, is left alone."""
        if self.has_adopted(worker.slot, worker.pid):
            forkserver.kill(self.board, worker.slot, worker.pid)

    def _has_ended(self) -> bool:
        return self.pid is None or process.has_ended(self.pid)

    # -- orders and reports

    def flush(self) -> None:
        """Send what the channel takes; it holds 278 small messages, the rest waits."""
        while self._outbox:
            try:
                self.channel.send(self._outbox[0])
            except OSError as error:
                if error.errno not in _LATER:
                    self._outbox.clear()  # it is dead, which SIGCHLD tells
                return
            self._outbox.popleft()

    @property
    def has_mail(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outbox)

    def receive(self) -> tuple[list[Report | None], bool]:
        """The next reports (None for a message that is none), and whether the other end is still open."""
        reports: list[Report | None] = []
        for _ in range(REPORTS_AT_ONCE):
            try:
                message = self.channel.recv(wire.MESSAGE_LIMIT)
            except BlockingIOError:
                break
            except ConnectionResetError:
                return reports, False
            if not message:
                return reports, False
            reports.append(wire.read_report(message))
        return reports, True

    def open_gate(self) -> None:
        """Let the workers that wait there go to accept(). For ever."""
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1

    def hang_up(self) -> None:
        """It has closed its end, or talks nonsense: send nothing more, and kill it."""
        self.hung_up = True
        self._outbox.clear()
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the fork server; its workers become the master's."""
        if self.pid is not None:
            self.killed = True
            process.signal_child(self.pid, signal.SIGKILL)

    def ended(self) -> None:
        """It was reaped."""
        self.pid = None
        self._outbox.clear()
        self.channel.close()

    def close(self) -> None:
        """Let go of boards, stacks, gate and channel."""
        self._resources.close()
