"""The control socket: one JSON line in, one JSON line out, over a Unix stream socket. The daemon's end of it.

The commands' end is `prefork.ops.instances`. The server is one more descriptor in the master's selector: no thread, no
waiting. Requests are bounded, callers are checked (SO_PEERCRED, unix(7): root or the daemon's own user), and a client that is
slow or has gone is dropped. An answer may carry descriptors (SCM_RIGHTS): `prefork status` gets the scoreboards and does its
own sums, so that a look at 10,000 workers costs the master nothing.
"""

import json
import os
import re
import selectors
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prefork import log
from prefork.errors import explained
from prefork.net.unix import inode_of, open_unix, remove
from prefork.pool.throttle import REGISTER_AGAIN, Throttle
from prefork.system import process, replacing

REQUEST_LIMIT = 4096
CLIENTS = 64
# So many may wait for an outcome: the other places are for commands that are answered at once or end the daemon, and for those
# who have not said yet what they want.
WAITING = 48
NEVER_REFUSED = ("status", "stop")
# A request is a line from a command on this machine: whoever needs longer for it, or for taking the answer, is not one.
PATIENCE = 10.0
ACCEPT_PAUSE = 0.1
# What clients may have the master do: so many turns at once and so many a second. A status takes two, 0.3 ms together.
TURNS, TURNS_A_SECOND = 300, 100
# A command sends its line in one piece.
PIECES = 16


@dataclass(eq=False, slots=True)
class Client:
    """One connected command. ``deadline`` bounds reading and writing, not the wait."""

    sock: socket.socket
    deadline: float | None
    request: bytes = b""
    answer: bytes | None = None
    pieces: int = 0  # of the request, so far
    descriptors: Sequence[int] = ()


# Asked with the time: the answer, or None as long as it is not known.
Outcome = Callable[[float], dict[str, Any] | None]


@dataclass(slots=True)
class ControlServer:
    """The master's end. ``obey(client, request)`` is called once for each request, and answers with `answer`, now or later."""

    sock: socket.socket
    path: str
    inode: tuple[int, int]
    selector: selectors.BaseSelector
    obey: Callable[[Client, dict[str, Any]], None]
    clients: set[Client] = field(default_factory=set)
    resume_at: float | None = None
    crowded: int = 0  # clients that were let go, or not let in, because there were too many
    waiting: list[tuple[Client, float, Outcome]] = field(default_factory=list)
    turns: Throttle = field(default_factory=lambda: Throttle(TURNS_A_SECOND, TURNS))

    def accept(self, now: float) -> None:
        """Take a client in, or turn it away."""
        try:
            sock, _ = self.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the client waits in the queue, and asking again at once would spin.
            log.event("control_refused", reason=explained(error))
            self._pause(now + ACCEPT_PAUSE)
            return
        self._took_a_turn(now)
        if self.turns.is_paused(now):
            self._pause(self.turns.until)  # those that are connected are answered
        sock.setblocking(False)
        uid = process.peer_of(sock).uid
        reason = None
        if uid not in (0, os.geteuid()):
            reason = f"user {uid} is neither root nor this daemon's"
        elif len(self.clients) >= CLIENTS and not self._make_room():
            reason = f"{CLIENTS} clients are connected already"
        if reason is not None:
            log.event("control_refused", reason=reason)
            sock.close()
            return
        client = Client(sock, now + PATIENCE)
        try:
            self.selector.register(sock, selectors.EVENT_READ, lambda when: self._ready(client, when))
        except OSError as error:  # fs.epoll.max_user_watches, or memory
            log.event("control_refused", reason=explained(error))
            sock.close()
            return
        self.clients.add(client)

    def _pause(self, until: float) -> None:
        """Take nobody in for a while: clients wait in the queue."""
        self.selector.unregister(self.sock)
        self.resume_at = until

    def _resume(self, now: float) -> None:
        try:
            self.selector.register(self.sock, selectors.EVENT_READ, self.accept)
        except OSError as error:
            log.event("control_refused", reason=explained(error))
            self.resume_at = now + REGISTER_AGAIN
        else:
            self.resume_at = None

    def _took_a_turn(self, now: float) -> None:
        if self.turns.spend(now):
            log.event("flood", what="control clients", rate=TURNS_A_SECOND)

    def _make_room(self) -> bool:
        """Let go of who has been silent for longest: a command says at once what it wants, and must not be kept out by a crowd."""
        silent = [(client.deadline, id(client), client) for client in self.clients if client.deadline and client.answer is None]
        if not silent:
            return False
        self.drop(min(silent)[2])
        self.crowded += 1
        if self.crowded & (self.crowded - 1) == 0:  # 1, 2, 4, 8, ...: a crowd must not fill the log
            log.event("control_crowded", count=self.crowded, most=CLIENTS)
        return True

    def _ready(self, client: Client, now: float) -> None:
        self._took_a_turn(now)
        request = None
        try:
            if client.answer is not None:
                self._write(client)
            else:
                request = self._read(client, now)
        except OSError:
            self.drop(client)  # it has gone; nobody is left to tell
        if request is None:
            return
        if request["command"] not in NEVER_REFUSED and sum(c.deadline is None for c in self.clients) > WAITING:
            self.answer(client, {"ok": False, "reason": f"{WAITING} commands are waiting for their outcome already"}, now)
            return
        self.obey(client, request)

    def _read(self, client: Client, now: float) -> dict[str, Any] | None:
        """The request, once it is whole."""
        data = client.sock.recv(REQUEST_LIMIT + 1)
        if not data or client.deadline is None:
            # The end, or more after a whole request: a command sends one line and then only listens.
            self.drop(client)
            return None
        client.request += data
        line, newline, _ = client.request.partition(b"\n")
        client.pieces += 1
        if not newline:
            if client.pieces >= PIECES:
                self.answer(client, {"ok": False, "reason": f"a request comes in fewer than {PIECES} pieces"}, now)
            elif len(client.request) > REQUEST_LIMIT:
                self.answer(client, {"ok": False, "reason": f"a request has at most {REQUEST_LIMIT} bytes"}, now)
            return None
        try:
            request = json.loads(line[: REQUEST_LIMIT + 1])
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            self.answer(client, {"ok": False, "reason": 'a request is one line of JSON with a "command"'}, now)
            return None
        client.deadline = None
        return request

    def answer(self, client: Client, answer: dict[str, Any], now: float, descriptors: Sequence[int] = ()) -> None:
        """Answer and close. Nothing happens when the client has gone meanwhile."""
        if client not in self.clients or client.answer is not None:
            return
        client.answer = json.dumps(answer).encode() + b"\n"
        client.descriptors = descriptors
        client.deadline = now + PATIENCE
        try:
            self._write(client)
        except OSError:
            self.drop(client)

    def answer_when(self, client: Client, deadline: float, outcome: Outcome) -> None:
        """Answer as soon as the outcome is known; by the deadline, that it is not."""
        self.waiting.append((client, deadline, outcome))

    def _write(self, client: Client) -> None:
        while client.answer:
            try:
                if client.descriptors:
                    sent = socket.send_fds(client.sock, [client.answer], client.descriptors)
                    client.descriptors = ()
                else:
                    sent = client.sock.send(client.answer)
            except BlockingIOError:
                self.selector.modify(client.sock, selectors.EVENT_WRITE, lambda when: self._ready(client, when))
                return
            client.answer = client.answer[sent:]
        self.drop(client)

    def drop(self, client: Client) -> None:
        """Close the connection to a client."""
        if client in self.clients:
            self.clients.remove(client)
            self.selector.unregister(client.sock)
            client.sock.close()

    def tend(self, now: float) -> None:
        """Tell outcomes that are known now, drop those who take too long, accept again after a pause."""
        if self.resume_at is not None and self.resume_at <= now:
            self._resume(now)
        for entry in list(self.waiting):
            client, deadline, outcome = entry
            answer = outcome(now) if client in self.clients else None
            if answer is None and deadline <= now:
                answer = {"ok": False, "reason": "it takes longer than it should; see the log"}
            if answer is not None or client not in self.clients:
                self.waiting.remove(entry)
                self.answer(client, answer or {}, now)
        for client in [c for c in self.clients if c.deadline is not None and c.deadline <= now]:
            self.drop(client)

    def wake_at(self) -> float | None:
        """When to `tend`."""
        times = [c.deadline for c in self.clients] + [deadline for _, deadline, _ in self.waiting] + [self.resume_at]
        return min((at for at in times if at is not None), default=None)

    @property
    def is_swept(self) -> bool:
        """Whether the path was removed, or is something else's by now."""
        return replacing.is_swept(self.path, self.inode)

    def listen_anew(self, path: str, now: float) -> None:
        """Listen on another socket, which has a path. Raises AddressError and OSError as `serve`; the old one serves on then.

        A command that waits in the old one's queue is reset there, and asks once more.
        """
        sock, inode = open_unix(path, 0o600, CLIENTS)
        if self.resume_at is None:
            self._pause(now)
        self.sock.close()
        sock.setblocking(False)
        self.sock, self.path, self.inode = sock, path, inode

    def dismiss(self, reason: str, now: float) -> None:
        """Tell everybody that there will be no answer; ``again`` that nothing was done, so that it can be asked once more."""
        for client in list(self.clients):
            unheard = client.deadline is not None and client.answer is None
            if unheard:
                with suppress(OSError):  # nothing has come, or it has gone
                    client.sock.recv(REQUEST_LIMIT)  # closed with this unread, the answer would be lost
            self.answer(client, {"ok": False, "again": unheard, "reason": reason}, now)

    def close(self) -> None:
        """Take no more commands; the path goes only if it is still ours."""
        for client in list(self.clients):
            self.drop(client)
        if self.resume_at is None:
            self.selector.unregister(self.sock)
        self.sock.close()
        if inode_of(self.path) == self.inode:
            remove(self.path)


def serve(path: str, selector: selectors.BaseSelector, obey: Callable[[Client, dict[str, Any]], None]) -> ControlServer:
    """Open the control socket at ``path``, mode 0600. Raises AddressError when a live daemon has it, OSError for the rest."""
    sock, inode = open_unix(path, 0o600, CLIENTS)
    return adopt(sock, path, inode, selector, obey)


def adopt(
    sock: socket.socket,
    path: str,
    inode: tuple[int, int],
    selector: selectors.BaseSelector,
    obey: Callable[[Client, dict[str, Any]], None],
) -> ControlServer:
    """Serve a control socket that is open already."""
    sock.setblocking(False)
    server = ControlServer(sock, path, inode, selector, obey)
    selector.register(sock, selectors.EVENT_READ, server.accept)
    return server


VALID_SCALE = re.compile(r"([+-]?)([0-9]{1,7})")


def scaled(text: str, workers: int) -> int:
    """What ``N``, ``+K`` or ``-K`` makes of a number of workers. Raises ValueError."""
    match = VALID_SCALE.fullmatch(text)
    if match is None:
        raise ValueError(f"must be N, +K or -K, not {text!r}")
    number = int(match[2])
    return {"": number, "+": workers + number, "-": workers - number}[match[1]]
