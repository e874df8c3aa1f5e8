"""The control socket: one JSON line in, one JSON line out, over a Unix stream socket. Both ends of it.

The server is one more descriptor in the master's selector: no thread, no waiting. Requests are bounded, callers are checked
(SO_PEERCRED, unix(7): root or the daemon's own user), and a client that is slow or has gone is dropped. An answer may carry
descriptors (SCM_RIGHTS): `prefork status` gets the scoreboards and does its own sums, so that a look at 10,000 workers costs
the master nothing.
"""

import json
import os
import re
import selectors
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefork import log
from prefork.errors import RefusedError
from prefork.net.listener import inode_of, open_unix, remove

REQUEST_LIMIT = 4096
CLIENTS = 64
# So many may wait for an outcome: the other places are for commands that are answered at once or end the daemon, and for those
# who have not said yet what they want.
WAITING = 48
NEVER_REFUSED = ("status", "stop")
# A request is a line from a command on this machine: whoever needs longer for it, or for taking the answer, is not one.
PATIENCE = 10.0
# SCM_RIGHTS takes 253 descriptors (unix(7)).
DESCRIPTORS_LIMIT = 250
ACCEPT_PAUSE = 0.1
_UCRED = struct.Struct("3i")
_TIMEVAL = struct.Struct("@ll")
_SUFFIX = ".sock"


@dataclass(eq=False, slots=True)
class Client:
    """One connected command. ``deadline`` bounds reading and writing, not the wait."""

    sock: socket.socket
    deadline: float | None
    request: bytes = b""
    answer: bytes | None = None
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

    def accept(self, now: float) -> None:
        """Take a client in, or turn it away."""
        try:
            sock, _ = self.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the client waits in the queue, and asking again at once would spin.
            log.event("control_refused", reason=error.strerror)
            self.selector.unregister(self.sock)
            self.resume_at = now + ACCEPT_PAUSE
            return
        sock.setblocking(False)
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
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
        self.clients.add(client)
        self.selector.register(sock, selectors.EVENT_READ, lambda when: self._ready(client, when))

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
        if not newline:
            if len(client.request) > REQUEST_LIMIT:
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
            self.resume_at = None
            self.selector.register(self.sock, selectors.EVENT_READ, self.accept)
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
    sock.setblocking(False)
    server = ControlServer(sock, path, inode, selector, obey)
    selector.register(sock, selectors.EVENT_READ, server.accept)
    return server


# -- where the sockets are


def runtime_directory() -> Path:
    """The directory for control sockets, made if need be. Raises OSError when there is none that is safely ours."""
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    # After su or sudo it may name the directory of somebody who has not logged in.
    if (xdg := os.environ.get("XDG_RUNTIME_DIR")) and os.path.isdir(xdg):
        return _private(Path(xdg) / "prefork")
    if os.geteuid() == 0:
        return _private(Path("/run/prefork"))
    return _private(Path(f"/tmp/prefork-{os.geteuid()}"))  # noqa: S108 - checked to be ours, or refused


def _private(path: Path) -> Path:
    """The directory, 0700 and ours: in a world-writable place anybody may have made it before us, or made it a link."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass  # checked below, like one that we made
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{path} must be a directory of user {os.geteuid()} that nobody else can write to")
    return path


def instances() -> dict[str, str]:
    """Control sockets that exist, by instance name: in our runtime directory, and in those of systemd units and users."""
    places = [Path("/run/prefork"), *Path("/run/prefork").glob("*/"), *Path("/run/user").glob("*/prefork")]
    places.append(Path(f"/tmp/prefork-{os.geteuid()}"))  # noqa: S108 - only looked at
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        if given := os.environ.get(variable):
            places = [Path(given.split(":")[0]), Path(given) / "prefork", *places]
    found: dict[str, str] = {}
    for place in places:
        try:
            for path in sorted(place.glob("*" + _SUFFIX)):
                if _is_live(str(path)):
                    found.setdefault(path.name.removesuffix(_SUFFIX), str(path))
        except PermissionError:
            continue  # another user's
    return found


def _is_live(path: str) -> bool:
    """Whether somebody listens there; a daemon that was killed leaves its socket behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its queue is full
        except OSError:
            return False
    return True


def default_path(name: str) -> str:
    """The control socket of the instance ``name``. Raises OSError when there is no place for it."""
    return str(runtime_directory() / (name + _SUFFIX))


# -- the commands' end


def ask(path: str, command: str, patience: float | None, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
    """Send a command and wait for its outcome, ``patience`` seconds at most: the answer, and the descriptors with it.

    Raises RefusedError when nobody listens there, or the connection ends without an answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            # A socket with a time-out of Python's is told EAGAIN at once when the queue is full; a blocking one waits for its turn.
            if patience is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(patience), int(patience % 1 * 1e6)))
            sock.connect(path)
            sock.settimeout(patience)
            sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            data, descriptors, _, _ = socket.recv_fds(sock, 65536, DESCRIPTORS_LIMIT)
            while more := sock.recv(65536):
                data += more
        except (TimeoutError, BlockingIOError):
            raise RefusedError(f"{path}: no answer within {patience:g} s; is the daemon stopped?") from None
        except OSError as error:
            raise RefusedError(f"{path}: {error.strerror}; is the daemon running?") from None
    if not data.endswith(b"\n"):
        for fd in descriptors:
            os.close(fd)
        raise RefusedError(f"{path}: the daemon ended the connection without an answer; is it running?")
    answer: dict[str, Any] = json.loads(data)
    return answer, descriptors


def find(name: str | None, control: str | None) -> str:
    """The control socket to talk to: by path, by name, or the only one there is. Raises RefusedError naming what there is."""
    if control is not None:
        return control
    known = instances()
    if name is not None:
        if name in known:
            return known[name]
        raise RefusedError(f"no instance {name!r} is running; {_listed(known)}")
    if len(known) == 1:
        return next(iter(known.values()))
    raise RefusedError(f"which instance? {_listed(known)}" if known else "no instance is running, or its socket is another user's")


def _listed(known: dict[str, str]) -> str:
    return f"running: {', '.join(sorted(known))}" if known else "none is running"


VALID_SCALE = re.compile(r"([+-]?)([0-9]{1,7})")


def scaled(text: str, workers: int) -> int:
    """What ``N``, ``+K`` or ``-K`` makes of a number of workers. Raises ValueError."""
    match = VALID_SCALE.fullmatch(text)
    if match is None:
        raise ValueError(f"must be N, +K or -K, not {text!r}")
    number = int(match[2])
    return {"": number, "+": workers + number, "-": workers - number}[match[1]]
