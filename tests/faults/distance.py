"""The lossless promises over a line with a delay: clients connect all the time, while the daemon reloads, gives an address up, is
upgraded, stopped and killed. A client whose ``connect()`` has returned is answered in full.

``python -m tests.faults.distance`` is the inside of it, in a network namespace with a line (`tests.line`); `measure` runs it.
"""

import argparse
import asyncio
import ctypes
import errno
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from prefork.errors import PreforkError
from prefork.system import process
from prefork.testing import Server, serve
from tests import line, watch
from tests.faults.arena import HANDLERS, Fault, Figures, Rounds

STAYS, COMES = line.FLOODED, line.FLOODED + 1
SIZE = 64
# Connections a second; of each delay (ms there and back) the promise is held to so many by hand.
RATE, COUNT = 300.0, 200_000
DELAYS, UNIT = (1, 30, 100, 300), " ms"
LOSS = 0.01
STRIKES = ("stop", "remove", "reload", "upgrade", "roll_back", "kill", "kill_both")
KILLS = ("kill", "kill_both")
# A killed master's address is free within a second, so over a longer line handshakes may be cut. Where the fork server is dead as
# well, workers do not choose the moment, and a lost segment may cost a client.
LONGEST_FOR_KILL = 100
# A client that is not answered for so long is lost: at 1 % loss segments are sent again after 0.2, 0.6, 1.4, 3, 6.2 s.
PATIENCE = 30.0
CONNECT_PATIENCE = 10.0
# A stop takes no longer, but for what is served: handshakes have 7.5 s. On a machine with other things to do twice as long will do.
LONGEST_STOP, LONGEST_STOP_BESIDE_OTHERS = 8.0, 16.0
WORKERS = 4
# Three of a canary's workers take it back; workers of others may be hit as well.
MOST_CRASHES = 20
# linux/prctl.h, linux/capability.h, linux/filter.h, linux/seccomp.h
_PR_CAPBSET_DROP, _CAP_NET_ADMIN, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 24, 12, 38, 22, 2
_BPF_LOAD, _BPF_JUMP_EQUAL, _BPF_RETURN, _SECCOMP_ERRNO, _SECCOMP_ALLOW = 0x20, 0x15, 0x06, 0x50000, 0x7FFF0000
_libc = ctypes.CDLL(None, use_errno=True)
OUTSIDE = Path(__file__).parents[2]


def _lose_net_admin() -> None:
    """No program that is executed from now on has CAP_NET_ADMIN: a filter takes it, on some kernels."""
    if _libc.prctl(_PR_CAPBSET_DROP, _CAP_NET_ADMIN, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")


def _lose_netlink() -> None:
    """No netlink sockets from now on, as RestrictAddressFamilies has it: socket(2) of that family fails with EAFNOSUPPORT."""
    steps = [
        (_BPF_LOAD, 0, 0, 0),  # the system call's number
        (_BPF_JUMP_EQUAL, 0, 3, {"x86_64": 41, "aarch64": 198}[os.uname().machine]),
        (_BPF_LOAD, 0, 0, 16),  # the lower half of its first argument
        (_BPF_JUMP_EQUAL, 0, 1, socket.AF_NETLINK),
        (_BPF_RETURN, 0, 0, _SECCOMP_ERRNO | errno.EAFNOSUPPORT),
        (_BPF_RETURN, 0, 0, _SECCOMP_ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_FILTER, described, 0, 0)):
        if _libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {call[0]}")


WITHOUT = {"net_admin": _lose_net_admin, "netlink": _lose_netlink}


class Clients:
    """Connections at a steady pace to both ports, until the block ends. The first byte says whether there is more to come."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.ports: tuple[int, ...] = (STAYS,)
        self.answered = 0
        self.not_connected: Counter[str] = Counter()
        self.lost: list[str] = []
        self.ended = False
        self._connecting: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.end_soon()
        self._thread.join()

    def end_soon(self) -> None:
        """Have no more clients come. Those that are not connected yet give up."""
        self.ended = True

    async def _run(self) -> None:
        begun, number = time.monotonic(), 0
        tasks: set[asyncio.Task[None]] = set()
        while not self.ended:
            due = int((time.monotonic() - begun) * self.rate)
            while number < due:
                number += 1
                task = asyncio.create_task(self._one(self.ports[number % len(self.ports)], more=number % 10 == 0))
                tasks.add(task)
                self._connecting.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.002)
        for task in self._connecting:  # who is not connected yet can't be lost any more
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, port: int, *, more: bool) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with socket.socket() as sock:
            sock.setblocking(False)
            try:
                async with asyncio.timeout(CONNECT_PATIENCE):
                    await loop.sock_connect(sock, (line.FAR, port))
            except (OSError, TimeoutError) as error:
                self.not_connected[type(error).__name__] += 1
                return
            finally:
                self._connecting.discard(task)
            begun = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    for first in (b"m", b".") if more else (b".",):
                        await _round_trip(loop, sock, first + os.urandom(SIZE - 1))
            except (OSError, TimeoutError, EOFError) as error:
                name = "{}:{}".format(*sock.getsockname()[:2])
                self.lost.append(f"{type(error).__name__} at {port} for {name}, {begun:.3f} to {time.monotonic():.3f}")
            else:
                self.answered += 1


async def _round_trip(loop: asyncio.AbstractEventLoop, sock: socket.socket, said: bytes) -> None:
    await loop.sock_sendall(sock, said)
    got = b""
    while len(got) < SIZE:
        data = await loop.sock_recv(sock, SIZE)
        if not data:
            raise EOFError
        got += data
    assert got == said, "wrong bytes"


class Distant:
    """A daemon that is far away, and what is done to it."""

    def __init__(self, folder: Path, clients: Clients, delay: float) -> None:
        self.folder, self.clients, self.delay = folder, clients, delay
        self.file = folder / "prefork.toml"
        self.stack = ExitStack()
        self.server: Server
        self.history: list[str] = []
        self.stops: list[float] = []

    def start(self, *ports: int) -> None:
        """Start it, and have clients come."""
        self._write(*ports)
        self.server = self.stack.enter_context(
            serve("distant:loop", folder=self.folder, bind=[], arguments=("--config", str(self.file)), graceful_timeout=60)
        )
        self.clients.ports = ports

    def _write(self, *ports: int, options: Sequence[str] = ()) -> None:
        addresses = [f"{line.HERE}:{port}" for port in ports]
        self.file.write_text("\n".join([f"bind = {json.dumps(addresses)}", f"workers = {WORKERS}", *options]))

    def _note(self, what: str) -> None:
        self.history.append(f"{time.monotonic():.3f} {what}")

    def serves(self) -> None:
        """Wait until clients are answered again, and all kinds of them are under way."""
        before = self.clients.answered
        watch.until("clients are answered", lambda: self.clients.answered > before + 10)
        time.sleep(2 * self.delay)

    def stop(self) -> None:
        """SIGTERM, and another daemon."""
        self._note("stop")
        ports = self.clients.ports
        begun = time.monotonic()
        self.server.process.send_signal(signal.SIGTERM)
        assert self.server.process.wait(60) == 0, self.server.log()
        self.stops.append(time.monotonic() - begun)
        log = self.server.log()
        assert "report it" not in log, log
        assert ", 0 cut" in log, log
        self.stack.close()
        if not self.clients.ended:
            self.start(*ports)

    def kill(self) -> None:
        """SIGKILL for the master, and another daemon once the address is free."""
        self._note("kill")
        self._kill()

    def kill_both(self) -> None:
        """The same with the fork server dead, before there can be another."""
        self._note("kill_both")
        fork_server = watch.fork_server(self.server)
        self.server.process.send_signal(signal.SIGSTOP)
        os.kill(fork_server, signal.SIGKILL)
        watch.until("the fork server is dead", lambda: watch.is_gone(fork_server))
        self._kill()

    def _kill(self) -> None:
        ports = self.clients.ports
        begun = time.monotonic()
        self.server.process.kill()
        self.server.process.wait()
        watch.until("the addresses are free", lambda: all(map(_is_free, ports)))
        self.stops.append(time.monotonic() - begun)
        self.stack.close()
        self.start(*ports)

    def reload(self) -> None:
        """SIGHUP, with nothing changed."""
        self._note("reload")
        assert self.server.command("reload")["ok"]

    def remove(self) -> None:
        """A reload takes an address away under its clients."""
        self._add()
        self._note("remove")
        with self._gone():
            self._write(STAYS)
            assert self.server.command("reload")["ok"]

    def upgrade(self) -> None:
        """An upgrade does."""
        self._add()
        self._note("upgrade")
        generation = self.server.status()["generation"]

        def ended() -> bool:
            # While it becomes another program nobody answers.
            with suppress(OSError, ValueError, PreforkError):
                status = self.server.status()
                return bool(status["generation"] > generation and status["state"] == "running")
            return False

        with self._gone():
            self._write(STAYS)
            self.server.process.send_signal(signal.SIGUSR2)
            watch.until("the upgrade has ended", ended, 60.0)

    def roll_back(self) -> None:
        """A reload that has added it takes itself back, because workers crash."""
        self._add("canary = 3600")  # whose answer comes at the canary's end
        self._note("roll_back")
        with self._gone():
            taken_back, killed, crashes = " taken back, generation ", self._killed(), 0
            before = self.server.log().count(taken_back)
            # As many as it takes: right after the commit an idle worker of the last generation may get one.
            while crashes < MOST_CRASHES and self.server.log().count(taken_back) == before:
                self._crash()
                crashes += 1
            # A stop that follows cuts nobody.
            watch.until("all are counted", lambda: self._killed() >= killed + crashes)
            self._write(STAYS)

    def _killed(self) -> int:
        return int(self.server.status()["totals"]["killed"])

    def _crash(self) -> None:
        with socket.create_connection((line.HERE, STAYS)) as sock:
            sock.sendall(b"crash".ljust(SIZE))
            assert not sock.recv(SIZE)

    def _add(self, *options: str) -> None:
        self._note("add")
        generation = self.server.status()["generation"]
        self._write(STAYS, COMES, options=options)
        self.server.process.send_signal(signal.SIGHUP)
        watch.until("the address is added", lambda: self.server.status()["generation"] > generation)
        self.clients.ports = (STAYS, COMES)
        self.serves()

    @contextmanager
    def _gone(self) -> Iterator[None]:
        """In the block the address is closed."""
        gone = f"no longer listening on {line.HERE}:{COMES}"
        times = self.server.log().count(gone) + 1
        begun = time.monotonic()
        yield
        watch.logged(self.server, gone, times)
        self.stops.append(time.monotonic() - begun)
        self.clients.ports = (STAYS,)


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((line.HERE, port))  # and not listen: a client that came now would be lost by us
        except OSError:
            return False
        return True


def strike(
    delay: float,
    strikes: Sequence[str],
    *,
    loss: float = 0.0,
    count: int = 0,
    rate: float = RATE,
    seconds: float = math.inf,
    seed: int = 0,
    flood: float = 0.0,
    without: str = "",
) -> Figures:
    """One strike after the other, until so many clients were answered or the time is over: each at least once.

    Called in a network namespace of one's own.
    """
    process.become_subreaper()  # what a killed master leaves is seen
    done: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name, line.line(delay, loss=loss, seed=seed, flood=flood), Clients(rate) as clients:
        if without:
            WITHOUT[without]()
        folder = Path(name)
        shutil.copy(HANDLERS / "distant.py", folder)
        daemon = Distant(folder, clients, delay)
        try:
            daemon.start(STAYS)
            while True:
                what = strikes[done.total() % len(strikes)]
                daemon.serves()
                getattr(daemon, what)()
                done[what] += 1
                if done.total() >= len(strikes) and (clients.answered >= count or time.monotonic() > deadline):
                    break
            clients.ports = (STAYS,)
            clients.end_soon()
            if daemon.server.process.poll() is None:
                daemon.stop()
        finally:
            clients.end_soon()
            daemon.stack.close()
    watch.until("no process is left", lambda: not process.reap(stops=False) and not watch.children())
    return {
        "strikes": dict(done),
        "connections": clients.answered,
        "not_connected": dict(clients.not_connected),
        "failures": dict(Counter(one.partition(" ")[0] for one in clients.lost)),
        "lost": clients.lost,
        "history": daemon.history if clients.lost else [],
        "worst": round(max(daemon.stops), 3),
    }


def measure(delay: float, *strikes: str, without: str = "", **given: float) -> Figures:
    """`strike` in a network namespace of its own. ``without``: a right that is taken from the daemon."""
    options = [f"--{name}={value}" for name, value in given.items()] + ([f"--without={without}"] if without else [])
    command = [*line.OWN, sys.executable, "-m", "tests.faults.distance", str(delay), *strikes, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=OUTSIDE)
    assert done.returncode == 0, done.stdout + done.stderr
    figures: Figures = json.loads(done.stdout)
    return figures


def over_a_line(rounds: Rounds, workload: str) -> Figures:
    """As many connections as there are rounds, over a line of so many milliseconds there and back that loses 1 % of all packets."""
    delay = int(workload.removesuffix(UNIT))
    # A killed master's clients have 0.8 s, and whether a segment of theirs is lost in it is luck: that is for campaigns by hand.
    kills = ["kill"] if rounds.alone and delay <= LONGEST_FOR_KILL else []
    strikes = [what for what in STRIKES if what not in KILLS] + kills
    seconds = max(0.0, rounds.deadline - time.monotonic())
    figures = measure(delay / 1000, *strikes, loss=LOSS, count=rounds.count, seconds=seconds, seed=rounds.seed)
    figures |= {"workload": workload, "count": figures["connections"], "permitted": 0}
    assert not figures["failures"], figures
    assert figures["worst"] < (LONGEST_STOP if rounds.alone else LONGEST_STOP_BESIDE_OTHERS), figures
    return figures


FAULTS = {"line": Fault(over_a_line, COUNT * len(DELAYS), 0, tuple(f"{delay}{UNIT}" for delay in DELAYS))}


def main() -> None:
    """The figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.distance")
    parser.add_argument("delay", type=float)
    parser.add_argument("strikes", nargs="*", choices=STRIKES)
    parser.add_argument("--without", choices=WITHOUT)
    for name, kind in (("loss", float), ("count", int), ("rate", float), ("seconds", float), ("seed", int), ("flood", float)):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    print(json.dumps(strike(given.pop("delay"), given.pop("strikes"), **given)))


if __name__ == "__main__":
    main()
