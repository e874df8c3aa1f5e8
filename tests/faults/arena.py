"""Where faults strike: a daemon under a load whose clients are counted, and the checks that all is as before once they are over.

    with arena("mixed", workers=4) as ring:
        for _ in rounds:
            strikes.hup(ring)
            ring.recovered()
    return ring.figures

The block's end is the check: the clients stop, nobody is served any more, the acceptors are back to their number, the failures
of clients are at most those that the strikes have permitted, each is one of a worker that died, clients and daemon have counted
the same, and processes, slots, descriptors and memory are what they were at the start. AssertionError names what is not.
"""

import math
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from prefork.testing import Server, serve
from tests import watch
from tests.load import Failure, Load, name_of

Figures = dict[str, Any]
HANDLERS = Path(__file__).parents[1] / "handlers"
# What the clients do: short connections at a steady rate, connections that they hold, both; and short ones as fast as they can.
WORKLOADS = ("short", "long", "mixed")
AND_FULL = ("short", "long", "full", "mixed")
RATE = 1000.0  # short connections a second
# What a module says that serves; a strike puts something that does not in front of it.
MODULE = "from target import loop\n"
FORK_SERVER = re.compile(r" gen (\d+)$")  # its title
WARM = 50  # short connections
# How long a strike's own client waits for its answer; crowds may be before it in the queue.
OWN_PATIENCE = 60.0
# How much more memory of its own a master may have after a fault.
MASTER_MAY_GROW_KIB = 2048


@dataclass(slots=True)
class Rounds:
    """How much of a fault: ``count`` strikes, or as many as there is time for (monotonic). ``done`` are those that were.

    ``alone``: a campaign by hand, on a machine that does nothing else: only then waits and memory are held to their bounds.
    """

    count: int
    deadline: float = math.inf
    seed: int = 0
    alone: bool = False
    done: int = 0

    def __iter__(self) -> Iterator[int]:
        # At least one: nothing is shown by none.
        while self.done == 0 or (self.done < self.count and time.monotonic() < self.deadline):
            yield self.done
            self.done += 1


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault with its counts: ``run(rounds, workload)`` strikes and checks. ``full``: by hand; ``small``: in the suite, 0
    where that has tests of its own for it.
    """

    run: Callable[[Rounds, str], Figures]
    full: int
    small: int = 1
    workloads: tuple[str, ...] = WORKLOADS

    def share(self, count: int) -> int:
        """Each workload's share of ``count``."""
        return -(-count // len(self.workloads))


class Blow(NamedTuple):
    """A strike that was: from when to when (monotonic)."""

    begun: float
    ended: float
    name: str


@dataclass(frozen=True, slots=True)
class Strike:
    """Something bad that is done to a running daemon, once. ``permits``: so many clients may fail of it.

    It waits for nothing that the daemon does, so that others can strike meanwhile: who wants to see it recover calls
    `Arena.recovered`.
    """

    name: str
    hit: "Callable[[Arena], None]"
    permits: int = 0

    def __call__(self, ring: "Arena") -> None:
        """Strike."""
        ring.struck.append(self)
        begun = time.monotonic()
        try:
            self.hit(ring)
        finally:
            ring.history.append(Blow(begun, time.monotonic(), self.name))


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a daemon has of the machine. Of memory only what the master has allocated is held to a limit: its proportional set grows
    when other programs end.
    """

    acceptors: int
    slots: int
    processes: int
    zombies: int
    master_fds: int
    worker_fds: tuple[int, ...]
    fork_server_fds: int
    master_pss_kib: int = field(compare=False)
    master_anonymous_kib: int = field(compare=False)


@dataclass(slots=True)
class Arena:
    """A daemon under load. ``figures`` is complete after the block."""

    server: Server
    folder: Path
    workers: int
    loads: list[Load]
    chance: random.Random
    before: Holdings
    struck: list[Strike] = field(default_factory=list)
    history: list[Blow] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)  # connections that strikes made themselves: whether they were answered
    lost: list[str] = field(default_factory=list)  # those of them that should have been, by their own address
    silent: int = 0  # those that said nothing, and were not answered: the kernel has accepted them
    victims: list[int] = field(default_factory=list)  # pids of workers that were killed
    figures: Figures = field(default_factory=dict)
    exact: bool = True  # whether the daemon's counts have to be the clients'
    access: Path | None = None  # the log of connections, when it is a file
    alone: bool = False  # whether waits and memory are held to their bounds
    module: str = MODULE
    module_lock: threading.Lock = field(default_factory=threading.Lock)  # one strike at a time spoils the module

    @property
    def connections(self) -> int:
        """Those that were answered in full."""
        return sum(load.connections for load in self.loads)

    @property
    def permitted(self) -> int:
        """So many clients may fail."""
        return sum(strike.permits for strike in self.struck)

    def write_module(self, first: str = "", last: str | None = None) -> None:
        """Change the handler's module: these lines, then what serves, or ``last``."""
        (self.folder / "mine.py").write_text(first + (self.module if last is None else last))

    def end_load(self) -> None:
        """Stop all clients, and wait until the daemon serves nobody."""
        for load in self.loads:
            load.stop()
        watch.quiet(self.server)

    def log(self) -> str:
        """Everything that was logged: to standard error, which is a file, and has each line as soon as it is logged."""
        return self.server.log()

    def rotate(self) -> None:
        """Have the log of connections written to a new file. On a small disk the old one is gone."""
        if self.access is not None:
            with suppress(FileNotFoundError):  # the last rotation is not done yet
                if self.access.parent == self.folder:
                    self.access.rename(f"{self.access}.{time.monotonic_ns()}")
                else:
                    self.access.unlink()
        self.server.process.send_signal(signal.SIGUSR1)

    def accesses(self) -> str:
        """The log of connections, with what was rotated."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("access*")))

    def generation(self) -> int:
        """The number of the generation that serves."""
        return int(self.server.status()["generation"])

    def replaced(self, generation: int) -> None:
        """Wait until a later one serves."""
        watch.until(f"a generation after {generation}", lambda: self.generation() > generation, 2 * watch.DEADLINE)

    def serves(self, more: int) -> None:
        """Wait until more than so many clients were answered from now on."""
        before = self.connections
        watch.until(f"{more} more clients are served", lambda: self.connections > before + more)

    def permit(self, why: str, clients: int) -> None:
        """So many more clients may fail, of something that no strike knew of before."""
        self.struck.append(Strike(why, lambda _: None, permits=clients))

    def ask(self, said: bytes, *, may_be_cut: bool = False) -> bytes:
        """Be a client that says this once. What it is answered: nothing when its handler has ended with its worker, which is
        a failure, unless it was asked to.
        """
        peer, answer = self.converse(said)
        if not answer and not may_be_cut:
            self.lost.append(peer)
        return answer

    def converse(self, said: bytes) -> tuple[str, bytes]:
        """The same, and who said it. What it means when there is no answer is for the caller to say."""
        with self.server.connect(timeout=OWN_PATIENCE) as sock:
            peer = name_of(sock)
            try:
                sock.sendall(said)
                answer = sock.recv(4096)
            except (ConnectionResetError, BrokenPipeError):
                answer = b""  # as the kernel ends a dead process' connection
        self.own.append(answer != b"")
        return peer, answer

    def logged(self, text: str, times: int = 1) -> None:
        """Wait until this was logged so often."""
        watch.until(f"{text!r} in the log", lambda: self.log().count(text) >= times)

    def worker(self) -> int | None:
        """The pid of a random worker, if there is one just now."""
        workers = self.worker_pids()
        return self.chance.choice(workers) if workers else None

    def worker_pids(self) -> list[int]:
        """The pids of workers that accept or serve, and are the daemon's: what a spoilt board says may be anybody."""
        shown = [worker["pid"] for worker in watch.workers(self.server, "idle", "busy")]
        family = {process.pid for process in watch.family(self.server.pid)} - {self.fork_server()}
        return [pid for pid in shown if pid in family]

    def fork_server(self) -> int | None:
        """The pid of the newest generation's fork server, if there is one just now."""
        return fork_server(self.server)

    def recovered(self) -> dict[str, Any]:
        """Wait until the daemon has recovered. Returns the status."""
        return recovered(self.server, self.loads)


def fork_server(server: Server) -> int | None:
    """The pid of the newest generation's fork server, if there is one just now."""
    found = []
    for child in psutil.Process(server.pid).children():
        with suppress(psutil.NoSuchProcess):
            if generation := FORK_SERVER.search((child.cmdline() or [""])[0]):
                found.append((int(generation[1]), child.pid))
    return max(found)[1] if found else None


def recovered(server: Server, loads: list[Load]) -> dict[str, Any]:
    """Wait until a daemon has a fork server and all its acceptors, and nothing is under way. Returns the status."""
    held = sum(load.clients for load in loads if load.held)

    def look() -> dict[str, Any] | None:
        status = server.status()
        workers = status["listeners"][0]["workers"]
        # Who serves a short connection is about to be back.
        back = workers["idle"] + max(0, workers["busy"] - held) >= workers["target"] and not workers["starting"]
        return status if back and status["state"] == "running" and fork_server(server) is not None else None

    return watch.until("it has recovered", look, 3 * watch.DEADLINE)


@contextmanager
def arena(
    workload: str,
    *,
    rounds: Rounds,
    workers: int = 4,
    first: str = "",
    module: str = MODULE,
    place: Path | None = None,
    logged: bool = False,
    exact: bool = True,
    patience: float = 10.0,
    **options: Any,
) -> Iterator[Arena]:
    """A daemon with this load, and the checks at the end. Options are the daemon's.

    ``rounds`` gives the seed, and is told in the figures. ``first``: see `Arena.write_module`; ``module``: what follows it.
    ``place``: where the daemon's folder is, for everybody to read. ``logged``: connections are, in that folder. With ``exact`` off
    the daemon need not have counted what the clients have, nor know whom who died has served. ``patience``: how long clients wait
    for their answer.
    """
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        if place is not None:
            folder.chmod(0o755)
        for handler in ("target.py", "bad.py", "hostile.py", "spoiling.py", "floods.py", "everything.py"):
            shutil.copy(HANDLERS / handler, folder)
        (folder / "mine.py").write_text(first + module)
        settings = {"spare_timeout": 0.5, "boot_timeout": 10, **options}
        if logged:
            settings["access_log"] = f"{folder}/access"
        with serve("mine:loop", folder=folder, workers=workers, **settings) as server:
            watch.settled(server, workers)
            before = holdings(server)
            with ExitStack() as stack:
                loads = stack.enter_context(clients(server.address, workload, patience))
                ring = Arena(server, folder, workers, loads, random.Random(rounds.seed), before, exact=exact, module=module)
                ring.alone = rounds.alone
                access = Path(settings.get("access_log", "-"))
                ring.access = None if access == Path("-") or access.is_fifo() else access
                ring.figures["workload"] = workload
                with _told(ring):
                    serving(server, loads)
                    yield ring
                    ring.figures["count"] = rounds.done
                    stack.close()
                    check(ring)


@contextmanager
def _told(ring: Arena) -> Iterator[None]:
    """What fails is told with what had been done to the daemon, in order, and with all of its log."""
    zero = time.monotonic()
    try:
        yield
    except Exception as error:
        blows = [f"{blow.begun - zero:8.3f} to {blow.ended - zero:8.3f} s: {blow.name}" for blow in sorted(ring.history)]
        strikes = "\n".join(blows)
        now = f"{zero:.3f} (monotonic), failed {time.monotonic() - zero:.3f} s later"
        what = f"{type(error).__name__}: {error}"
        family = "\n".join(map(str, watch.family(ring.server.pid)))
        raise AssertionError(
            f"{what}\n{ring.figures}\nstrikes from {now}:\n{strikes}\nits processes:\n{family}\nthe log:\n{ring.log()}"
        ) from error


@contextmanager
def clients(address: Any, workload: str, timeout: float = 10.0, connect_timeout: float | None = None) -> Iterator[list[Load]]:
    """The clients of a workload, until the block ends."""
    loads = []
    if workload != "long":
        rate = None if workload == "full" else RATE
        loads.append(Load(address, clients=4, rate=rate, timeout=timeout, connect_timeout=connect_timeout))
    if workload in ("long", "mixed"):
        loads.append(Load(address, clients=4, held=True, timeout=timeout, connect_timeout=connect_timeout))
    with ExitStack() as stack:
        for load in loads:
            stack.enter_context(load)
        yield loads
        for load in loads:
            load.end_soon()


def serving(server: Server, loads: list[Load]) -> None:
    """Wait until the load is at its full height, and the daemon has what it needs for it."""
    held = sum(load.clients for load in loads if load.held)
    watch.until(
        "the load runs",
        lambda: server.status()["totals"]["serving"] >= held and all(load.held or load.connections > WARM for load in loads),
    )
    recovered(server, loads)


def holdings(server: Server) -> Holdings:
    """What this daemon has now, when nobody is served."""
    status = server.status()
    family = watch.family(server.pid)
    titles = {}
    zombies = 0
    for process in family:
        with suppress(psutil.NoSuchProcess):
            zombies += process.status() == psutil.STATUS_ZOMBIE
            titles[process.pid] = (process.cmdline() or [""])[0]
    pids = [worker["pid"] for worker in status["workers"]]
    fork_servers = [pid for pid, title in titles.items() if FORK_SERVER.search(title)]
    return Holdings(
        acceptors=status["listeners"][0]["workers"]["idle"],
        slots=len(pids),
        processes=len(family) + 1,
        zombies=zombies,
        master_fds=_descriptors(server.pid),
        worker_fds=tuple(sorted({_descriptors(pid) for pid in pids})),
        fork_server_fds=sum(map(_descriptors, fork_servers)),
        master_pss_kib=watch.pss_kib(server.pid),
        master_anonymous_kib=watch.anonymous_kib(server.pid),
    )


def _descriptors(pid: int) -> int:
    try:
        # libfaketime opens one more at each exec.
        return sum(not what.startswith("/dev/shm/faketime") for what in watch.descriptors(pid).values())
    except FileNotFoundError:
        return 0  # it has gone meanwhile


def figures_of_ends(workload: str) -> Figures:
    """What is counted of daemons that end under their load."""
    zero = {"count": 0, "connections": 0, "failures": {}, "permitted": 0, "refused": 0, "turned_away": 0, "worst": 0.0}
    return {"workload": workload, **zero}


def note_end(figures: Figures, loads: list[Load]) -> None:
    """A daemon has ended under these clients: nobody whom the kernel had connected was cut."""
    for load in loads:
        load.stop()
        figures["turned_away"] += len(never_connected(load))
        figures["connections"] += load.connections
        figures["refused"] += load.refused
        figures["worst"] = max(figures["worst"], round(load.worst, 4))
    figures["count"] += 1


def never_connected(load: Load) -> list[Failure]:
    """The failures of clients that the kernel turned away in the handshake; there must not be others."""
    lost = [failure for failure in load.failures if not failure.kind.startswith("connect")]
    assert not lost, lost
    return load.failures


def check(ring: Arena) -> None:
    """What is promised of a daemon after any fault, once the clients have stopped. Fills in the figures."""
    server, figures = ring.server, ring.figures
    ring.recovered()
    # Signals coalesce: nobody knows how many acceptors a storm of TTIN and TTOU has left wanted.
    assert server.command("scale", workers=str(ring.workers))["ok"]
    totals = watch.quiet(server)
    watch.settled(server, ring.workers)
    failures = [failure for load in ring.loads for failure in load.failures]
    figures |= {
        "strikes": dict(Counter(strike.name for strike in ring.struck)),
        "connections": ring.connections,
        "failures": dict(Counter(failure.kind for failure in failures)),
        "permitted": ring.permitted,
        "worst": round(max(load.worst for load in ring.loads), 4),
        "totals": totals,
    }
    assert sum(load.refused for load in ring.loads) == 0, figures
    log = ring.log()
    assert "report it" not in log, log
    raised = re.findall(r"the handler raised, serving (\S+)$", log, re.MULTILINE)
    lost = [peer for peer in ring.lost if peer not in raised]
    _compare_counts(ring, len(failures) + len(lost), totals)
    if ring.exact:
        _attribute(log, [failure.peer for failure in failures] + lost)
    figures["before"], figures["after"] = asdict(ring.before), asdict(_as_before(ring))


def _compare_counts(ring: Arena, failed: int, totals: dict[str, int]) -> None:
    """What the clients counted is what the daemon counted."""
    assert watch.identity_holds(totals), totals
    assert failed <= ring.permitted, ring.figures
    if not ring.exact:
        return
    least = ring.connections + ring.own.count(True) + max(0, ring.silent - ring.permitted)
    most = ring.connections + len(ring.own) + ring.silent
    if ring.permitted == 0:
        assert totals["accepted"] == most, (ring.figures, ring.own)
        assert totals["ok"] >= ring.connections, (ring.figures, ring.own)
    else:
        # A killed worker may have answered somebody and not counted it yet, or accepted somebody and not said so yet.
        assert least <= totals["accepted"] <= most + failed, (ring.figures, ring.own)


def _attribute(log: str, peers: list[str]) -> None:
    """Each failure is of a worker that died serving this peer, or else of one that died between its accept and its word of it."""
    served = re.findall(r"\) died: .*, serving (\S+)$", log, re.MULTILINE)
    unnamed = [peer for peer in peers if peer not in served]
    # Who ends by itself has lost nobody between the two.
    nobody = len(re.findall(r"\) died: (?!exit status).*, serving nobody$", log, re.MULTILINE))
    assert len(unnamed) <= nobody, f"served by no worker that died: {unnamed}"


def _as_before(ring: Arena) -> Holdings:
    def look() -> Holdings | None:
        found = holdings(ring.server)
        return found if found == ring.before else None

    try:
        after = watch.until("all is as before", look)
    except AssertionError as error:
        opened = watch.descriptors(ring.server.pid)
        raise AssertionError(f"{error}: {ring.before}, now {holdings(ring.server)}; the master's: {opened}") from None
    grown = after.master_anonymous_kib - ring.before.master_anonymous_kib
    # How many processes and commands there were at once, which is the load's doing, decides over some megabytes.
    assert grown < MASTER_MAY_GROW_KIB or not ring.alone, f"the master has grown by {grown} KiB"
    return after
