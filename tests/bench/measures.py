"""What is measured of prefork alone. Each gives its figures by name; units are in the names.

Moments are seen on the scoreboard, mapped read-only as `prefork status` does it, and looked at every 0.1 ms or so: that costs the
daemon nothing, and a part of the second core. Whoever was killed does not count, whatever his state still says.
"""

import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefork.ops.instances import ask
from prefork.pool import scoreboard
from prefork.pool.scoreboard import BUSY, IDLE, Access, Layout, Scoreboard
from prefork.testing import Server
from tests import watch
from tests.bench.cpu import clock_ns
from tests.bench.goals import ACCEPTORS
from tests.bench.load import BenchError, Seen
from tests.bench.peers import PEERS, Running, Wish
from tests.bench.sources.handlers import COMPUTE
from tests.bench.workloads import DEFAULTS, NoMemoryError, Place, available, hold

WORKERS = 8
# A look takes a processor from the daemon for 30 us, and a later one only adds to what is measured: with looks every 0.1 ms the
# median after a SIGKILL was 5.0 ms, with these 4.7.
GLANCE = 250e-6
DEADLINE = 30.0
# Who waits in accept() is asleep a moment after the board says so.
PAUSE = 0.02
MASTER_AND_FORK_SERVER = 2
STEADY_AFTER = 2.0
# Of a core.
AT_REST = 0.0005
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """``run`` measures; it may say what it could not in the second part of what it gives."""

    what: str
    run: Callable[[Place], tuple[Figures, list[str]]]


class Board:
    """A daemon's scoreboard. There must be one generation only while it is looked at."""

    def __init__(self, daemon: Server) -> None:
        facts, descriptors = ask(daemon.control, "status", DEADLINE)
        try:
            (board,) = facts["boards"]
            self.layout = Layout(*board["layout"])
            self._board = Scoreboard(descriptors[0], descriptors[1], self.layout, Access.READER)
        finally:
            for fd in descriptors:
                os.close(fd)

    def close(self) -> None:
        """Unmap it."""
        self._board.close()

    def count(self, state: int) -> int:
        """How many workers say that."""
        return self._board.row(0, self.layout.capacity).count(state)

    def idle(self) -> set[int]:
        """The pids of those who say that they wait in accept()."""
        row = self._board.row(0, self.layout.capacity)
        found, slot = set(), row.find(IDLE)
        while slot >= 0:
            found.add(self._board.words[self._board.record(slot) + scoreboard.PID])
            slot = row.find(IDLE, slot + 1)
        return found


def glance_until(what: str, look: Callable[[], bool]) -> None:
    """Look every 0.3 ms or so until it is true. BenchError when it takes too long."""
    end = time.monotonic() + DEADLINE
    while not look():
        if time.monotonic() > end:
            raise BenchError(f"not so after {DEADLINE:g} s: {what}")
        time.sleep(GLANCE)


@contextmanager
def daemon(place: Place, wish: Wish = DEFAULTS) -> Iterator[tuple[Running, Server, Board]]:
    """The daemon with the echo handler, all acceptors waiting."""
    with PEERS["prefork"].running(place.folder, wish) as running:
        assert running.daemon is not None
        with closing(Board(running.daemon)) as board:
            glance_until("all acceptors wait", lambda: board.count(IDLE) == wish.workers)
            yield running, running.daemon, board


def spread(name: str, values: list[float]) -> Figures:
    """Median, 99th percentile and the worst of it."""
    ordered = sorted(values)
    return {
        f"{name} median": statistics.median(ordered),
        f"{name} p99": ordered[max(0, -(-99 * len(ordered) // 100) - 1)],
        f"{name} max": ordered[-1],
    }


# -- acceptors that are missing


def restored(place: Place) -> tuple[Figures, list[str]]:
    """From the kill, or from the connect of a client that is silent, until as many wait in accept() as before."""
    count = place.settings.restored
    killed: list[float] = []
    blocked: list[float] = []
    with daemon(place) as (_, _, board):
        for _ in range(count):
            time.sleep(PAUSE)
            killed.append(_killed(board))
    with daemon(place, Wish(max_workers=count + 2 * WORKERS)) as (running, _, board), ExitStack() as clients:
        for number in range(count):
            time.sleep(PAUSE)
            took, sock = _blocked(board, running.port, number)
            clients.enter_context(sock)
            blocked.append(took)
    return spread("after a SIGKILL, ms", killed) | spread("after a blocking accept, ms", blocked), []


def _killed(board: Board) -> float:
    """Kill one of WORKERS idle workers: milliseconds until there are as many as before."""
    glance_until("all acceptors wait", lambda: len(board.idle()) == WORKERS)
    victim = min(board.idle())
    begun = time.monotonic_ns()
    os.kill(victim, signal.SIGKILL)
    glance_until("a killed acceptor is replaced", lambda: len(board.idle() - {victim}) == WORKERS)
    return (time.monotonic_ns() - begun) / 1e6


def _blocked(board: Board, port: int, busy: int) -> tuple[float, socket.socket]:
    """Connect and be silent, the ``busy`` + 1st to do so: milliseconds until the acceptor is replaced."""
    glance_until("all acceptors wait", lambda: board.count(IDLE) == WORKERS)
    begun = time.monotonic_ns()
    sock = socket.create_connection(("127.0.0.1", port))
    try:
        glance_until("a busy acceptor is replaced", lambda: board.count(BUSY) == busy + 1 and board.count(IDLE) == WORKERS)
    except BenchError:
        sock.close()
        raise
    return (time.monotonic_ns() - begun) / 1e6, sock


# -- ten thousand


def ten_thousand(place: Place) -> tuple[Figures, list[str]]:
    """Workers grow tenfold by tenfold; at each size the master's CPU per event, at the last one memory, silence, a new client.

    It ends at a smaller size where there is no memory for more, and says so. How the CPU has grown is measured then, beside another
    daemon of the first size, in turn: between the first and the last minutes go by, in which the machine's speed changes.
    """
    settings, figures, notes = place.settings, Figures(), list[str]()
    sizes = sorted({size for size in (10, 100, 1000) if size < settings.held} | {settings.held})
    before, there = available(), 0
    wish = Wish(max_workers=settings.held + settings.events + 100, spare_timeout=settings.spare_timeout)
    with daemon(place, wish) as (running, server, board), ExitStack() as held:
        for size in sizes:
            try:
                figures[f"{size - there} more held after, s"] = hold(place, running.port, size - there, held)
            except NoMemoryError as error:
                notes.append(f"FAILED: {error}")
                there += error.held
                break
            there = size
            _settled(board, size)
            figures[_per_event("killed", size)] = _replaced(settings.events, server, board)
            figures[_per_event("taken", size)] = _taken(settings.events, running, server, board)
        _settled(board, there)
        # Spare workers that have seen that they are to go are still about to.
        processes = there + WORKERS + MASTER_AND_FORK_SERVER
        glance_until("spare workers have gone", lambda: len(running.account.pids()) == processes)
        figures["master at rest after, s"] = _at_rest(settings.watch_seconds / 10, server)
        figures[f"memory of everything at {there}, GB"] = (before - available()) / 1e9
        figures |= _silent(there, settings.watch_seconds, running, server)
        seen = place.generator.run(running.port, clients=1, connections=settings.size(200))
        figures[f"a new client's first echo at {there} median, ms"] = seen.latency["p50"] / 1e3
        figures[f"a new client's first echo at {there} p99, ms"] = seen.latency["p99"] / 1e3
        with daemon(place, wish) as (few_running, few_server, few_board), ExitStack() as few:
            hold(place, few_running.port, sizes[0], few)
            pair = (sizes[0], few_running, few_server, few_board), (there, running, server, board)
            figures |= _growth(settings.rounds, settings.events, *pair)
    return figures, notes + _errors(seen)


_Held = tuple[int, Running, Server, Board]


def _growth(rounds: int, events: int, few: _Held, many: _Held) -> Figures:
    """The master's CPU per event with many held, to that with a few: medians of the rounds' ratios."""
    ratios: dict[str, list[float]] = {"taken": [], "killed": []}
    for number in range(rounds):
        used: dict[tuple[str, int], float] = {}
        for size, _, _, board in (few, many):
            _settled(board, size)
        turns = (few, many) if number % 2 else (many, few)
        for size, _, server, board in turns:
            used["killed", size] = _replaced(events, server, board)
        for size, running, server, board in turns:
            used["taken", size] = _taken(events, running, server, board)
        for what, found in ratios.items():
            found.append(used[what, many[0]] / used[what, few[0]])
    name = "master's CPU per acceptor {}, at {} / at {}"
    return {name.format(what, many[0], few[0]): statistics.median(found) for what, found in ratios.items()}


def _per_event(what: str, size: int) -> str:
    return f"master's CPU per acceptor {what} at {size}, us"


def _settled(board: Board, busy: int) -> None:
    """Wait until nobody is served but who is held, and spare workers have gone: then each event costs a fork."""
    glance_until(f"{busy} are held, {WORKERS} wait", lambda: (board.count(BUSY), board.count(IDLE)) == (busy, WORKERS))


def _taken(events: int, running: Running, server: Server, board: Board) -> float:
    """The master's CPU, in microseconds, for each silent client that takes an acceptor for itself."""
    busy = board.count(BUSY)
    with ExitStack() as clients:
        used = clock_ns(server.pid)
        for number in range(events):
            clients.enter_context(_blocked(board, running.port, busy + number)[1])
        return (clock_ns(server.pid) - used) / 1e3 / events


def _replaced(events: int, server: Server, board: Board) -> float:
    """The master's CPU, in microseconds, for each acceptor that is killed."""
    used = clock_ns(server.pid)
    for _ in range(events):
        _killed(board)
    return (clock_ns(server.pid) - used) / 1e3 / events


def _at_rest(look: float, server: Server) -> float:
    """Wait until the master has done what events have left it to do: it uses less than AT_REST. Returns the seconds until then."""
    begun = time.monotonic()
    while time.monotonic() - begun < DEADLINE:
        used, at = clock_ns(server.pid), time.monotonic()
        time.sleep(look)
        if clock_ns(server.pid) - used < AT_REST * look * 1e9:
            return at - begun
    return time.monotonic() - begun


def _silent(size: int, seconds: float, running: Running, server: Server) -> Figures:
    """The master's and everybody's CPU while nothing happens."""
    master, tree = clock_ns(server.pid), running.account.usage_ns()
    time.sleep(seconds)
    return {
        f"master's CPU with {size} silent, % of a core": (clock_ns(server.pid) - master) / seconds / 1e7,
        f"everybody's CPU with {size} silent, % of a core": (running.account.usage_ns() - tree) / seconds / 1e7,
    }


# -- under a steady load


def workers(place: Place) -> tuple[Figures, list[str]]:
    """Worker processes while 4 clients saturate it."""
    with daemon(place) as (running, _, _):
        counts = []
        with _loaded(place, running, place.settings.watch_seconds, clients=4) as load:
            while load.running():
                counts.append(len(running.account.pids()) - MASTER_AND_FORK_SERVER)
                time.sleep(PAUSE)
    return {"worker processes, at most": max(counts), "worker processes median": statistics.median(counts)}, _errors(load.seen())


def forks(place: Place) -> tuple[Figures, list[str]]:
    """Forks once a steady load has run for two seconds."""
    figures, notes = Figures(), []
    for name, load in (("saturated", {"clients": 4}), ("paced", {"clients": 4, "rate": 3000})):
        with (
            daemon(place) as (running, server, _),
            _loaded(place, running, STEADY_AFTER + place.settings.steady_seconds, **load) as clients,
        ):
            time.sleep(STEADY_AFTER)
            before = server.status()["totals"]["forked"]
            time.sleep(max(0.0, place.settings.steady_seconds - 0.2))
            figures[f"forks, {name}"] = server.status()["totals"]["forked"] - before
            if not clients.running():
                raise BenchError("the load has ended too early")
        notes += _errors(clients.seen())
    return figures, notes


class _Load:
    """A load that runs meanwhile."""

    def __init__(self, thread: threading.Thread, results: list[Seen]) -> None:
        self._thread, self._results = thread, results

    def running(self) -> bool:
        return self._thread.is_alive()

    def seen(self) -> Seen:
        self._thread.join()
        if not self._results:
            raise BenchError("the load generator has failed")
        return self._results[0]


@contextmanager
def _loaded(place: Place, running: Running, seconds: float, **options: float) -> Iterator[_Load]:
    results: list[Seen] = []
    thread = threading.Thread(target=lambda: results.append(place.generator.run(running.port, seconds=seconds, **options)))
    thread.start()
    try:
        yield _Load(thread, results)
    finally:
        thread.join()


def _errors(seen: Seen) -> list[str]:
    return [f"clients that failed: {seen.errors}"] if seen.errors else []


def scheduling(place: Place) -> tuple[Figures, list[str]]:
    """What a client waits while a handler computes on each core, and what a connection costs without them, by that option."""
    policies, notes = ("batch", "inherit"), []
    turns: dict[str, list[float]] = {}
    for number in range(place.settings.rounds):
        for policy in policies if number % 2 else policies[::-1]:
            with daemon(place, Wish(handler="computing", scheduling=policy)) as (running, _, board), ExitStack() as clients:
                seen, used = _with_cost(place, running, clients=4)
                turns.setdefault(f"{policy}: CPU for each connection of 4 clients, us", []).append(used)
                notes += _errors(seen)
                glance_until("the load has gone", lambda: board.count(BUSY) == 0)
                for _ in range(os.cpu_count() or 1):
                    sock = clients.enter_context(socket.create_connection(("127.0.0.1", running.port)))
                    sock.sendall(COMPUTE)
                    sock.recv(1)  # it begins
                seen = place.generator.run(running.port, clients=4, rate=500, seconds=place.settings.seconds)
                for part in ("p50", "p99"):
                    turns.setdefault(f"{policy}: latency beside handlers that compute, {part}, ms", []).append(
                        seen.latency[part] / 1e3
                    )
                notes += _errors(seen)
    return {name: statistics.median(values) for name, values in turns.items()}, notes


def _with_cost(place: Place, running: Running, **load: float) -> tuple[Seen, float]:
    """A load, and the microseconds that each connection of it cost the server."""
    used = running.account.usage_ns()
    seen = place.generator.run(running.port, seconds=place.settings.seconds, **load)
    return seen, (running.account.usage_ns() - used) / 1e3 / (seen.connections or 1)


# -- idle


def idle(place: Place) -> tuple[Figures, list[str]]:
    """A daemon that nobody asks anything: CPU of its whole tree, and how often its workers wake up."""
    seconds, notes = place.settings.idle_seconds, []
    with daemon(place, Wish(workers=ACCEPTORS)) as (running, _, board):
        pids = sorted(board.idle())
        time.sleep(PAUSE)
        used, switches = running.account.usage_ns(), sum(map(_switches, pids))
        time.sleep(seconds)
        figures = {
            "CPU of the whole tree, ms": (running.account.usage_ns() - used) / 1e6,
            "wake-ups of workers by their context switches": sum(map(_switches, pids)) - switches,
        }
        if shutil.which("strace"):
            figures["system calls of workers by strace"] = _system_calls(pids, seconds, place.folder / "strace")
        else:
            notes.append("strace is not installed")
    return figures, notes


def _switches(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(number) for number in re.findall(r"ctxt_switches:\s*(\d+)", text))


def _system_calls(pids: list[int], seconds: float, out: Path) -> int:
    """How many system calls ended while strace watched. The one in which it finds them, accept(), goes on."""
    command = ["strace", "-f", "-c", "-o", str(out), "-p", ",".join(map(str, pids))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for _ in pids:
            line = process.stderr.readline()
            if "attached" not in line:
                process.kill()
                raise BenchError(f"strace: {line}{process.stderr.read()}")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    total = re.search(r"^100\.00 +\S+ +\S+ +(\d+) ", out.read_text(), re.MULTILINE)
    return int(total[1]) if total else 0


# -- start, reload, memory


def start(place: Place) -> tuple[Figures, list[str]]:
    """From the exec to READY=1; from the command `reload` to its answer, when the new generation serves."""
    ready = [_start_once() for _ in range(place.settings.starts)]
    reload = []
    with daemon(place) as (_, server, _):
        for _ in range(place.settings.starts):
            begun = time.monotonic()
            answer = server.command("reload")
            reload.append(time.monotonic() - begun)
            if not answer["ok"]:
                raise BenchError(f"a reload was refused: {answer}")
            watch.settled(server, WORKERS)
    return spread("start to ready, s", ready) | spread("reload to committed, s", reload), []


def _start_once() -> float:
    with tempfile.TemporaryDirectory(prefix="prefork-") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"{folder}/notify")
        ready.settimeout(DEADLINE)
        command = [
            sys.executable,
            "-P",
            "-m",
            "prefork",
            "serve",
            "--module=echo:loop",
            f"--workers={WORKERS}",
            "--bind=127.0.0.1:0",
        ]
        with open(f"{folder}/log", "wb") as log:
            begun = time.monotonic()
            process = subprocess.Popen(
                [*command, f"--control={folder}/control"],
                cwd=folder,
                env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            while b"READY=1" not in ready.recv(4096).split(b"\n"):
                pass
            return time.monotonic() - begun
        except TimeoutError:
            raise BenchError(f"not ready after {DEADLINE:g} s:\n{Path(folder, 'log').read_text()}") from None
        finally:
            process.terminate()
            process.wait()


def memory(place: Place) -> tuple[Figures, list[str]]:
    """Proportional set sizes, which share out what several have: so an idle worker's is smaller the more there are."""
    figures = Figures()
    for count in (WORKERS, ACCEPTORS):
        with daemon(place, Wish(workers=count)) as (_, server, board):
            time.sleep(PAUSE)
            idle = board.idle()
            figures[f"master of {count}, MB"] = _mb(watch.pss_kib(server.pid))
            figures[f"fork server of {count}, MB"] = _mb(watch.pss_kib(watch.fork_server(server)))
            figures[f"idle worker of {count}, MB"] = _mb(statistics.median(map(watch.pss_kib, idle)))
            figures[f"idle worker of {count}, what nobody else has, MB"] = _mb(statistics.median(map(_private_kib, idle)))
    return figures, []


def _mb(kib: float) -> float:
    return kib * 1024 / 1e6


def _private_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


MEASURES = {
    "workers": Measure("worker processes under 4 saturating clients, workers = 8", workers),
    "restored": Measure("the acceptors' number is restored, echo, workers = 8", restored),
    "ten_thousand": Measure("{held:,} connections held, a process each", ten_thousand),
    "scheduling": Measure("the option scheduling: short connections, and the same beside handlers that compute", scheduling),
    "idle": Measure("100 acceptors, nobody comes", idle),
    "start": Measure("start to ready, reload to committed, echo, workers = 8", start),
    "memory": Measure("own memory (PSS), echo, 8 workers and 100", memory),
    "forks": Measure("forks under a steady load of short connections, 4 clients, after 2 s, in 60 s", forks),
}
