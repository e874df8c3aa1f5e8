"""What the master asks of a fork server and when, with a fork server of ours at the other end: real boards, real channel, a
clock that we turn.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from prefork.accepting import EXIT_CANT_ACCEPT
from prefork.config import Sources
from prefork.generation import DEATHS, DEATHS_A_SECOND, LIMBO, PATIENCE, Generation
from prefork.link import Wiring
from prefork.net import address
from prefork.net.listener import Settings, open_listener
from prefork.pool import policy, scoreboard, wire
from prefork.pool.episode import OVER_FOR
from prefork.pool.scoreboard import Counts
from prefork.pool.tally import Tally
from prefork.pool.wire import Command, Kind, Order, Report
from prefork.retiring import NAG_AGAIN, NAG_FIRST
from prefork.system import process
from prefork.system.credentials import Credentials
from tests.watch import until

NOBODY = 65534
PID = 4_000_000  # more than this kernel gives
STRANGER = 3_000_000


class Peer:
    """A generation, and the fork server's end of its channel in our hands."""

    def __init__(self, workers: int, who: Credentials | None = None, registered: int = 0, **options: object) -> None:
        config = Sources({"module": "echo:loop", "workers": workers, "bind": ["127.0.0.1:0"], "boot_timeout": 5, **options}).load()
        self.listener = open_listener(address.parse("127.0.0.1:0"), Settings(backlog=8))
        self.generation = Generation(1, config, [self.listener], Wiring("echo", "/", 0, 1, 2, {STRANGER}, who), Tally(), 0.0)
        self.end, self.gate = self.generation.link.prepare()
        self.generation.link.pid = os.getpid()
        self.end.setblocking(False)
        self.say(Report(Kind.READY, status=registered))

    def say(self, report: Report, now: float = 0.0) -> None:
        self.end.send(wire.pack_report(report))
        self.generation.receive(now)

    def asked(self) -> list[Command | None]:
        found = []
        while True:
            try:
                found.append(wire.read_command(self.end.recv(64)))
            except BlockingIOError:
                return found

    def boot(self, workers: int) -> None:
        """Let all be forked, and wait in accept()."""
        self.generation.tend(0.0, 0)
        assert self.asked() == [Command(Order.FORK, slot) for slot in range(workers)]
        for slot in range(workers):
            self.forked(slot)
            self.generation.board.words[self.generation.board.record(slot) + scoreboard.STARTED] = 1
            self.generation.board.states[slot] = scoreboard.IDLE
            assert self.generation.rang(wire.Doorbell(wire.Ring.READY, 1, slot, PID + slot), 0.0)
        assert not self.generation.board.order_words[scoreboard.COMMITTED], "workers wait at the gate"
        self.generation.commit(0.0)
        assert self.generation.board.order_words[scoreboard.COMMITTED], "those who come later need not"
        self.generation.tend(0.0, 0)
        self.generation.tend(0.5, 0)
        assert self.asked() == []

    def forked(self, slot: int = 0) -> None:
        self.say(Report(Kind.FORKED, slot, PID + slot))

    def close(self) -> None:
        self.generation.link.pid = None
        self.generation.close()
        os.close(self.gate)
        self.end.close()
        self.listener.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer(2)
    made.boot(2)
    yield made
    made.close()


def test_a_worker_that_waits_in_accept_is_signalled_until_it_has_seen_it(peer: Peer) -> None:
    generation = peer.generation
    generation.retire(0, 1.0, None)
    retire = [Command(Order.RETIRE, 0), Command(Order.RETIRE, 1)]
    assert peer.asked() == retire
    assert generation.wake_at() == 1.0 + NAG_FIRST
    now = 1.0 + NAG_FIRST
    for _ in range(3):
        generation.tend(now, 0)
        assert peer.asked() == retire
        now += NAG_AGAIN
    generation.board.states[0] = scoreboard.LEAVING
    generation.board.states[1] = scoreboard.BUSY
    generation.tend(now, 0)
    assert peer.asked() == []
    assert generation.wake_at() is None


def test_a_busy_worker_is_asked_by_the_word_alone(peer: Peer) -> None:
    generation = peer.generation
    generation.board.states[0] = scoreboard.BUSY
    generation.retire(0, 1.0, None)
    assert peer.asked() == [Command(Order.RETIRE, 1)]
    assert list(generation.board.retire[:2]) == [1, 1]


def test_a_busy_worker_whose_input_is_to_end_is_signalled_once() -> None:
    peer = Peer(2, drain="eof")
    peer.boot(2)
    generation = peer.generation
    generation.board.states[0] = scoreboard.BUSY
    generation.announce_stop()
    assert peer.asked() == [Command(Order.RETIRE, 0)]
    assert list(generation.board.retire[:2]) == [0, 0], "the queue is served first"
    generation.retire(0, 1.0, None)
    assert peer.asked() == [Command(Order.RETIRE, 0), Command(Order.RETIRE, 1)]
    generation.tend(1.0 + NAG_FIRST, 0)
    generation.tend(1.0 + NAG_FIRST + NAG_AGAIN, 0)
    assert set(peer.asked()) == {Command(Order.RETIRE, 1)}
    generation.retiring.ask_again(2.0)
    assert peer.asked() == [Command(Order.RETIRE, 0)], "a dead fork server may have taken it with it"
    peer.close()


def test_only_busy_workers_are_killed_at_their_deadline(peer: Peer) -> None:
    generation = peer.generation
    generation.board.states[0] = scoreboard.BUSY
    generation.retire(0, 1.0, 2.0)
    peer.asked()
    generation.tend(2.0, 0)
    assert Command(Order.KILL, 0) in peer.asked()
    generation.tend(3.0, 0)
    assert Command(Order.KILL, 1) not in peer.asked()


def test_a_worker_that_ends_is_replaced_at_once_and_its_slot_used_again(peer: Peer) -> None:
    peer.say(Report(Kind.EXITED, 0, PID, status=9), 1.0)
    peer.generation.tend(1.0, 0)
    assert peer.asked() == [Command(Order.FORK, 0)]


def test_a_death_is_logged_after_its_replacement_was_ordered_or_before_it_is_told_otherwise(
    peer: Peer, capfd: pytest.CaptureFixture[str]
) -> None:
    peer.say(Report(Kind.EXITED, 0, PID, status=9), 1.0)
    assert "died" not in capfd.readouterr().err
    peer.generation.tell()
    assert "died: signal 9 (SIGKILL)" in capfd.readouterr().err
    peer.generation.tend(1.0, 0)
    assert "died" not in capfd.readouterr().err, "once"


@pytest.mark.parametrize(
    "lie",
    [
        Report(Kind.EXITED, 0, 1),
        Report(Kind.EXITED, 77, PID),
        Report(Kind.FORKED, 0, 1),
        Report(Kind.FORKED, 1 << 31, 1),
        Report(Kind.FORK_FAILED, 1, status=11),
        Report(Kind.STOPPED, 0, 1),
        Report(Kind.READY),
        Report(Kind.FAILED, text="after READY"),
    ],
)
def test_a_fork_server_that_lies_changes_nothing(peer: Peer, lie: Report) -> None:
    before = dict(peer.generation.pool.workers)
    peer.say(lie, 1.0)
    assert peer.generation.pool.workers == before
    assert peer.generation.gossip == 1
    assert peer.generation.failure is None


def test_a_child_that_no_fork_server_has_forked_is_no_worker(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID, status=9), 1.0)
    generation.tend(1.0, 0)
    generation.board.words[generation.board.record(0) + scoreboard.PID] = STRANGER
    generation.tend(1.0 + generation.config.boot_timeout, 0)
    peer.say(Report(Kind.FORKED, 0, STRANGER), 1.0)
    assert generation.gossip == 1
    assert generation.pool.by_pid(STRANGER) is None
    generation.link.wiring.strangers.discard(STRANGER)  # it has ended, and the number is given again
    peer.say(Report(Kind.FORKED, 0, STRANGER), 1.0)
    assert generation.pool.by_pid(STRANGER) is not None


@contextmanager
def living(uid: int | None = None) -> Iterator[int]:
    """A child of the fork server, which is this process in these tests."""
    with subprocess.Popen(["sleep", "60"], user=uid, group=uid, extra_groups=None if uid is None else []) as child:
        yield child.pid
        child.kill()


def test_a_worker_that_lives_has_not_ended_whatever_its_fork_server_says(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    generation.tend(1.0, 0)
    with living() as pid:
        peer.say(Report(Kind.FORKED, 0, pid), 1.0)
        peer.say(Report(Kind.EXITED, 0, pid), 1.0)
        assert generation.gossip == 1
        assert generation.pool.by_pid(pid) is not None
    peer.say(Report(Kind.EXITED, 0, pid), 1.0)
    assert generation.gossip == 1
    assert generation.pool.by_pid(pid) is None


def test_a_worker_that_runs_is_not_stopped_whatever_its_fork_server_says(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    generation.tend(1.0, 0)
    found = []
    with living() as pid:
        peer.say(Report(Kind.FORKED, 0, pid), 1.0)
        peer.say(Report(Kind.STOPPED, 0, pid), 1.0)
        found.append(generation.pool.workers[0].stopped)
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        peer.say(Report(Kind.STOPPED, 0, pid), 1.0)
        found.append(generation.pool.workers[0].stopped)
    assert found == [False, True]
    peer.say(Report(Kind.EXITED, 0, pid), 1.0)


def test_a_process_that_another_one_has_forked_is_no_worker(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    generation.tend(1.0, 0)
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        peer.say(Report(Kind.FORKED, 0, pid), 1.0)
        os.kill(pid, signal.SIGKILL)
    assert generation.gossip == 1
    assert generation.pool.by_pid(pid) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give its children another user")
def test_a_worker_has_the_credentials_that_its_fork_server_was_given() -> None:
    peer = Peer(2, Credentials(NOBODY, NOBODY, (NOBODY,)))
    generation = peer.generation
    generation.tend(0.0, 0)
    with living() as ours, living(NOBODY) as theirs:
        until("it is another user", lambda: psutil.Process(theirs).uids() == (NOBODY,) * 3)
        peer.say(Report(Kind.FORKED, 0, ours), 1.0)
        peer.say(Report(Kind.FORKED, 1, theirs), 1.0)
        assert generation.gossip == 1
        assert [generation.pool.by_pid(pid) is not None for pid in (ours, theirs)] == [False, True]
    peer.close()


def test_an_orphan_that_is_older_than_the_order_is_not_what_a_dead_fork_server_has_forked(peer: Peer) -> None:
    generation = peer.generation
    with living() as older:
        started = process.started_at(older) or 0.0  # to a tick
        until("an order would be younger", lambda: process.clock_of_starts() > started + 2 * process.TICK)
        for slot in (0, 1):
            peer.say(Report(Kind.EXITED, slot, PID + slot), 1.0)
        generation.tend(1.0, 0)
        with living() as younger:
            generation.link.pid = None
            for slot, pid in enumerate((older, younger)):
                generation.board.words[generation.board.record(slot) + scoreboard.PID] = pid
            generation.fork_server_ended(1.0)
            generation.tend(1.0, 0)
            assert [generation.pool.by_pid(pid) is not None for pid in (older, younger)] == [False, True]
            generation.quit(1.0)
            generation.tend(1.0 + LIMBO, 0)
            assert os.waitid(os.P_PID, younger, os.WEXITED | os.WNOWAIT) is not None
            assert os.waitid(os.P_PID, older, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
            generation.exited(1, younger, 9, 0.0, 0, 1.0)


def test_no_byte_of_boards_and_orders_ends_the_master_or_keeps_it_from_going_on(peer: Peer) -> None:
    generation, link = peer.generation, peer.generation.link
    generation.tally.counts = Counts(4, 4, 0, 0, 0)
    listener = {peer.listener: 0}

    def spoil() -> None:
        for fd, size in ((link.board_fd, generation.layout.board_bytes), (link.orders_fd, generation.layout.orders_bytes)):
            os.pwrite(fd, b"\xff" * size, 0)

    spoil()
    generation.announce_stop()
    peer.say(Report(Kind.EXITED, 0, PID, status=9), 1.0)
    generation.tend(1.0, 0)
    generation.rang(wire.Doorbell(wire.Ring.ACCEPTED, 1, 1, PID + 1), 1.0)
    spoil()
    for now in (1.1, 2.0, 4.0):
        generation.tend(now, 0)
    assert generation.accepted() == generation._counted[0] == Counts(0, 0, 0, 0, 0)
    # What another program of this process does with the same descriptors.
    carried = generation.carry(listener)
    carried = replace(
        carried,
        link=replace(
            carried.link,
            channel=os.dup(carried.link.channel),
            board=os.dup(carried.link.board),
            orders=os.dup(carried.link.orders),
            stacks=os.dup(carried.link.stacks),
            gate=-1,
        ),
    )
    again = Generation.adopted(carried, generation.config, [peer.listener], link.wiring, Tally(), 5.0)
    again.tend(5.0, 0)
    again.retire_all(5.0, None)
    again.link.pid = None
    for worker in list(again.pool.workers.values()):
        again.pool.fork_failed(worker.slot)
        again.pool.exited(worker.slot, worker.pid)
    again.close()
    assert again.tally.counts == Counts(0, 0, 0, 0, 0)


def test_garbage_on_the_channel_is_counted(peer: Peer) -> None:
    for message in (b"x", b"\x63" * 200, b"\0" * 40):
        peer.end.send(message)
    assert peer.generation.receive(1.0)
    assert peer.generation.gossip == 3


def test_impossible_counters_are_put_back_when_their_worker_ends(peer: Peer) -> None:
    board = peer.generation.board
    record = board.record(0)
    board.words[record + scoreboard.BEGUN] = board.words[record + scoreboard.OK] = 7
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    peer.generation.tend(1.0, 0)
    peer.say(Report(Kind.FORKED, 0, PID + 7), 1.0)
    board.words[record + scoreboard.OK] = 1 << 60
    peer.say(Report(Kind.EXITED, 0, PID + 7), 1.0)
    counts = board.counts(0)
    assert (counts.begun, counts.ok, counts.serving) == (7, 7, 0)


def test_a_connection_that_ends_with_its_worker_is_counted_as_killed(peer: Peer) -> None:
    board = peer.generation.board
    board.words[board.record(0) + scoreboard.BEGUN] = 1
    peer.say(Report(Kind.EXITED, 0, PID, status=11), 1.0)
    counts = board.counts(0)
    assert (counts.begun, counts.killed, counts.serving) == (1, 1, 0)


def test_acceptors_that_do_not_exist_are_struck_off(peer: Peer) -> None:
    generation, board = peer.generation, peer.generation.board
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    board.states[0] = scoreboard.IDLE  # a stray write, or a lie: nobody is there
    generation.tend(1.0, 0)
    assert board.states[0] == scoreboard.STARTING
    assert peer.asked() == [Command(Order.FORK, 0)]


def test_a_worker_that_comes_after_its_dead_fork_server_was_given_up_may_not_accept(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 1, PID + 1), 1.0)
    generation.tend(1.0, 0)
    assert peer.asked() == [Command(Order.FORK, 1)]
    generation.pool.exited(0, PID)  # nobody's child in this test
    generation.fork_server_ended(1.0)
    generation.retire_all(1.0, None)
    gone = []
    for at in (1.0 + LIMBO / 2, 1.0 + LIMBO):
        generation.tend(at, 0)
        gone.append(generation.gone)
    assert gone == [False, True]
    assert generation.board.retire[1] == 1


def test_a_worker_that_has_come_and_gone_and_whose_dead_fork_server_never_told_is_told_with_its_connection(peer: Peer) -> None:
    generation, board = peer.generation, peer.generation.board
    peer.say(Report(Kind.EXITED, 1, PID + 1), 1.0)
    generation.tend(1.0, 0)
    assert peer.asked() == [Command(Order.FORK, 1)]
    record = board.record(1)
    board.words[record + scoreboard.PID] = PID + 2
    board.words[record + scoreboard.STARTED] = 1
    board.words[record + scoreboard.BEGUN] += 1
    board.board[board.peer_start(1) : board.peer_start(1) + 6] = b"a:1234"
    generation.fork_server_ended(1.0)
    generation.tend(1.0 + LIMBO, 0)
    death = generation.tally.deaths[-1]
    assert (death.pid, death.cause, death.peer) == (PID + 2, "not told by its dead fork server", "a:1234")
    assert (board.counts(1).killed, generation.tally.forked, board.retire[1]) == (1, 3, 1)


def test_a_fork_that_fails_backs_off_and_says_when(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    generation.tend(1.0, 0)
    assert peer.asked() == [Command(Order.FORK, 0)]
    peer.say(Report(Kind.FORK_FAILED, 0, status=11), 1.0)
    generation.tend(1.003, 0)
    assert peer.asked() == []
    assert generation.fork_trouble.until == generation.wake_at() == 1.0 + policy.fork_backoff(1)
    generation.tend(1.16, 0)
    generation.tend(1.164, 0)
    assert peer.asked() == [Command(Order.FORK, 0)]
    peer.say(Report(Kind.FORKED, 0, PID), 1.164)
    assert (generation.fork_trouble.failures, generation.fork_trouble.until) == (0, 0.0)


def test_a_fork_that_fails_late_is_tried_again_too(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    generation.tend(1.0, 0)
    generation.tend(1.003, 0)  # nobody is missing: one is about to start
    generation.tend(1.004, 0)
    assert peer.asked() == [Command(Order.FORK, 0)]
    peer.say(Report(Kind.FORK_FAILED, 0, status=11), 1.1)
    generation.tend(1.1, 0)
    assert generation.wake_at() == 1.1 + policy.fork_backoff(1)


def test_forks_that_fail_together_are_one_failure_and_who_was_forked_with_them_proves_nothing() -> None:
    peer = Peer(4)
    generation = peer.generation
    generation.tend(0.0, 0)
    assert len(peer.asked()) == 4
    peer.say(Report(Kind.FORK_FAILED, 0, status=11), 1.0)
    peer.say(Report(Kind.FORK_FAILED, 1, status=11), 1.01)
    peer.say(Report(Kind.FORKED, 2, PID), 1.02)
    peer.say(Report(Kind.FORK_FAILED, 3, status=11), 1.03)
    assert (generation.fork_trouble.failures, generation.fork_trouble.until) == (1, 1.0 + policy.fork_backoff(1))
    peer.close()


def test_a_failed_fork_shortens_no_back_off_of_workers_that_do_not_start(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID), 1.0)
    generation.tend(1.0, 0)
    assert peer.asked() == [Command(Order.FORK, 0)]
    generation.trouble.add(1.0, "a worker died before it was ready")
    peer.say(Report(Kind.FORK_FAILED, 0, status=11), 1.0)
    generation.tend(1.2, 0)
    assert peer.asked() == []
    assert generation.wake_at() == 2.5


def test_a_burst_of_orders_waits_for_the_channel_and_none_is_lost() -> None:
    peer = Peer(2)
    peer.generation.tend(0.0, 0)
    peer.asked()
    peer.generation.link.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for slot in range(500):
        peer.generation.link.send(Order.KILL, slot)
    found = peer.asked()
    assert len(found) < 500
    while len(found) < 500:
        peer.generation.link.flush()
        found += peer.asked()
    assert not peer.generation.link.has_mail
    assert found == [Command(Order.KILL, slot) for slot in range(500)]
    peer.close()


def test_a_worker_that_does_not_become_ready_is_killed_at_boot_timeout() -> None:
    peer = Peer(1)
    peer.generation.tend(0.0, 0)
    peer.say(Report(Kind.FORKED, 0, PID), 1.0)
    assert peer.asked() == [Command(Order.FORK, 0)]
    peer.generation.tend(2.0, 0)
    assert peer.generation.wake_at() == 5.0
    peer.generation.tend(5.0, 0)
    assert peer.asked() == [Command(Order.KILL, 0)]
    peer.close()


@pytest.mark.parametrize("ring_first", [True, False])
def test_a_worker_has_come_when_its_fork_was_told_and_it_has_rung_in_whichever_order(ring_first: bool) -> None:
    peer = Peer(1)
    generation = peer.generation
    generation.trouble.add(0.0, "a worker died before it was ready")
    generation.tend(generation.trouble.until, 0)

    def ring() -> None:
        generation.board.words[generation.board.record(0) + scoreboard.STARTED] = 1
        assert generation.rang(wire.Doorbell(wire.Ring.READY, 1, 0, PID), 3.0)

    for step in (ring, peer.forked) if ring_first else (peer.forked, ring):
        assert generation.trouble.failures == 1
        step()
    assert generation.trouble.failures == 0, "the trouble is over"
    assert not generation.pool.unready
    peer.close()


def test_a_fork_server_that_is_late_with_an_order_is_killed_once() -> None:
    peer = Peer(1)
    peer.generation.tend(0.0, 0)
    peer.generation.tend(2.0, 0)
    assert (peer.generation.wake_at(), peer.generation.link.killed) == (5.0, False)
    peer.generation.tend(5.0, 0)
    # Until it has gone there is nothing to wake for.
    assert (peer.generation.wake_at(), peer.generation.link.killed) == (None, True)
    peer.close()


def test_a_fork_server_that_was_killed_is_not_waited_for_again_and_again(peer: Peer) -> None:
    generation = peer.generation
    before = generation.wake_at()
    generation.note_stop(os.getpid(), 1.0, stopped=True)
    assert generation.wake_at() == 1.0 + PATIENCE
    generation.link.kill()  # in state D it is not reaped
    assert generation.wake_at() == before
    generation.note_stop(os.getpid(), 1.0, stopped=False)


def test_a_saturation_that_comes_and_goes_is_told_once_and_its_seconds_are_exact(
    peer: Peer, capfd: pytest.CaptureFixture[str]
) -> None:
    generation, acceptors, now = peer.generation, peer.generation._acceptors[0], 10.0
    for _ in range(100):
        for saturated in (True, False):
            acceptors.memory = replace(acceptors.memory, at_ceiling=saturated, saturated=saturated)
            generation._note_episodes(acceptors, now)
            now += 0.25
    assert acceptors.episodes.saturated.seconds(now) == 25.0
    assert acceptors.look_at is not None, "the end has to be told without an event"
    said = capfd.readouterr().err
    assert (said.count("no acceptor is left"), said.count("acceptors again")) == (1, 0)
    assert said.count("fewer than workers = 2 can wait") == 1
    generation._note_episodes(acceptors, now - 0.25 + OVER_FOR)
    assert "has acceptors again, after 25.0 s without" in capfd.readouterr().err
    acceptors.memory = replace(acceptors.memory, saturated=True)
    generation._note_episodes(acceptors, now + 2)
    assert "no acceptor is left" in capfd.readouterr().err


def test_acceptors_that_are_taken_while_the_fork_server_is_dead_are_told_and_counted(
    peer: Peer, capfd: pytest.CaptureFixture[str]
) -> None:
    generation, board, stalled = peer.generation, peer.generation.board, peer.generation._acceptors[0].episodes.stalled
    board.states[0] = scoreboard.BUSY
    generation._look_without_forks(generation._acceptors[0], 1.0, 0.0)
    assert stalled.since is None
    assert board.order_words[board.listener_word(0, scoreboard.RING_BELOW)] == 1, "whoever takes the last one rings"
    board.states[1] = scoreboard.BUSY
    generation.fork_trouble.add(2.0, "fork failed: Cannot allocate memory")
    for now in (2.0, 3.0):
        generation._look_without_forks(generation._acceptors[0], now, 0.0)
    assert stalled.seconds(3.0) == 1.0
    said = capfd.readouterr().err
    assert said.count("no worker can be forked (fork failed: Cannot allocate memory): new clients wait") == 1
    board.states[0] = scoreboard.IDLE
    generation._look_without_forks(generation._acceptors[0], 4.0, 0.0)
    generation._look_without_forks(generation._acceptors[0], 4.0 + OVER_FOR, 0.0)
    assert stalled.seconds(9.0) == 2.0
    assert "has acceptors again, after 2.0 s in which none could be forked" in capfd.readouterr().err


def test_a_suspended_daemon_is_not_at_its_ceiling(peer: Peer) -> None:
    generation, acceptors = peer.generation, peer.generation._acceptors[0]
    acceptors.memory = replace(acceptors.memory, at_ceiling=True, saturated=True)
    generation._note_episodes(acceptors, 1.0)
    generation.suspend(3.0)
    assert not generation.at_ceiling
    assert acceptors.episodes.saturated.seconds(9.0) == 2.0


def test_of_many_workers_the_latest_are_the_lowest_and_those_that_the_ring_dates() -> None:
    peer = Peer(1, max_workers=400)
    generation, board = peer.generation, peer.generation.board
    now = time.monotonic_ns()

    def accepted(slot: int, ago: float, *, in_ring: bool = True) -> None:
        at = now - int(ago * 1e9)
        board.words[board.record(slot) + scoreboard.SINCE] = at
        if in_ring:
            entry = at >> scoreboard.RECENT_SHIFT
            board.words[board.recent_word(0) + entry % scoreboard.RECENT] = scoreboard.recent_entry(entry, slot + 1)

    accepted(3, 0.001, in_ring=False)
    accepted(4, 0.1, in_ring=False)
    accepted(300, 0.002)
    accepted(301, 0.1)
    row = bytes(scoreboard.FEW + 100)
    seen = generation._acceptors[0].latest(row, now - int(0.05 * 1e9))
    assert [slot for slot, _ in sorted(seen)] == [3, 300]
    seen = generation._acceptors[0].latest(row, now - int(0.2 * 1e9))
    assert [slot for slot, _ in sorted(seen)] == [3, 4, 300, 301], "older than the ring is long, and still in it"
    peer.close()


@pytest.mark.parametrize("accepted", [True, False])
def test_while_a_load_goes_on_the_master_looks_and_no_worker_rings(peer: Peer, *, accepted: bool) -> None:
    generation, board = peer.generation, peer.generation.board
    acceptors = generation._acceptors[0]
    generation.look_soon(0, 5.0)
    generation.tend(5.0, 0)
    if accepted:
        board.words[board.record(1) + scoreboard.SINCE] = time.monotonic_ns()
    generation.look_soon(0, 6.0)
    generation.tend(6.0, 0)
    assert (acceptors.look_at is not None, acceptors.ring_below == 0) == (accepted, accepted)


def test_a_look_that_finds_somebody_served_ends_the_trouble_of_those_who_were_not(peer: Peer) -> None:
    generation = peer.generation
    peer.say(Report(Kind.EXITED, 0, PID, status=70 << 8), now=1.0)
    assert generation.trouble.failures == 1
    quiet_until = generation.trouble.until
    generation.tend(quiet_until, 0)
    assert generation.trouble.failures == 1, "nobody has accepted since"
    # A load that goes on has the master look, and nobody rings.
    generation.board.words[generation.board.record(1) + scoreboard.SINCE] = time.monotonic_ns()
    generation.look_soon(0, quiet_until + 1)
    generation.tend(quiet_until + 1, 0)
    assert (generation.trouble.failures, generation.trouble.until) == (0, 0.0)


@pytest.mark.parametrize("state", [scoreboard.BUSY, scoreboard.IDLE])
def test_a_worker_to_be_recycled_that_changes_between_two_reads_of_the_board_is_asked_to_leave_all_the_same(
    monkeypatch: pytest.MonkeyPatch, state: int
) -> None:
    peer = Peer(2, max_connections=1)
    peer.boot(2)
    generation, board = peer.generation, peer.generation.board
    board.states[0], board.tired[0] = state, 1
    generation.rang(wire.Doorbell(wire.Ring.TIRED, 1, 0, PID), 1.0)
    generation.tend(1.0, 0)
    assert peer.asked() == [Command(Order.FORK, 2)]
    peer.forked(2)
    board.words[board.record(2) + scoreboard.STARTED], board.states[2] = 1, scoreboard.IDLE
    if state == scoreboard.BUSY:  # one that serves leaves for the one that has come, and one in accept() would be missed
        board.states[1] = scoreboard.BUSY
    acceptors = generation._acceptors[0]
    true_row = acceptors.true_row

    def row_of_a_moment_ago() -> bytes:
        row = true_row()
        board.states[0] = scoreboard.IDLE if state == scoreboard.BUSY else scoreboard.BUSY
        return row

    monkeypatch.setattr(acceptors, "true_row", row_of_a_moment_ago)
    generation.rang(wire.Doorbell(wire.Ring.READY, 1, 2, PID + 2), 2.0)
    generation.tend(2.0, 0)
    assert list(board.retire[:3]) == [1, 0, 0]
    peer.close()


def test_a_worker_that_accepts_after_the_row_was_read_is_idle_and_not_about_to_be_back_besides(peer: Peer) -> None:
    generation, board = peer.generation, peer.generation.board
    row = board.row(0, 2)  # both idle; then one accepts, and is seen by the times of the latest accepts
    board.words[board.record(0) + scoreboard.SINCE] = time.monotonic_ns()
    board.states[0] = scoreboard.BUSY
    acceptors = generation._acceptors[0]
    acceptors.target = 3
    view = acceptors.view(8, row)
    assert (view.idle, view.busy, view.returning) == (2, 0, 0)


def test_surplus_workers_are_chosen_by_the_row_that_found_them(peer: Peer) -> None:
    generation, board = peer.generation, peer.generation.board
    acceptors = generation._acceptors[0]
    row = bytes([scoreboard.IDLE, scoreboard.BUSY])
    board.states[0], board.states[1] = scoreboard.BUSY, scoreboard.IDLE
    generation._retire_some(acceptors, row, 1, 1.0)
    assert list(board.retire[:2]) == [1, 0]


def _is_ready(peer: Peer, slot: int, pid: int, now: float) -> None:
    """The fork that was ordered last is there, and waits in accept()."""
    board = peer.generation.board
    peer.say(Report(Kind.FORKED, slot, pid), now)
    board.words[board.record(slot) + scoreboard.STARTED] = time.monotonic_ns()
    board.states[slot] = scoreboard.IDLE
    assert peer.generation.rang(wire.Doorbell(wire.Ring.READY, 1, slot, pid), now)


@pytest.mark.parametrize("status", [0, 1 << 8, 11], ids=["exit 0", "exit 1", "SIGSEGV"])
def test_workers_that_end_when_they_were_ready_are_one_failure(peer: Peer, status: int) -> None:
    generation, now, pid, forks = peer.generation, 10.0, PID + 10, 0
    pids = [PID, PID + 1]
    for round_ in range(1, 5):
        tried = now
        while not generation.trouble.failures >= round_:
            for slot in range(2):
                peer.say(Report(Kind.EXITED, slot, pids[slot], status=status), now)
            if generation.trouble.failures >= round_:
                break
            generation.tend(now, 0)
            for command in peer.asked():
                assert command is not None
                assert command.order is Order.FORK
                forks, pid = forks + 1, pid + 1
                pids[command.slot] = pid
                _is_ready(peer, command.slot, pid, now + 0.005)
            now += 0.02
            assert now < tried + 1
        generation.tend(now, 0)
        assert peer.asked() == [], "not before the wait is over"
        assert generation.trouble.until == now + policy.backoff(round_)
        now = generation.trouble.until
        generation.tend(now, 0)
        for command in peer.asked():
            assert command is not None
            forks, pid = forks + 1, pid + 1
            pids[command.slot] = pid
            _is_ready(peer, command.slot, pid, now)
    assert forks <= 16


def test_one_that_lived_is_replaced_at_once_and_so_is_one_whose_generation_serves(peer: Peer) -> None:
    generation, board, pid = peer.generation, peer.generation.board, PID
    for n in range(200):
        now = 10.0 + n * 0.02
        if n % 2:  # it has served nothing itself, but another one has
            words, begun = board.words, board.record(1) + scoreboard.BEGUN
            words[begun] += 1
            words[board.record(1) + scoreboard.OK] += 1
        else:  # ready two seconds ago
            board.words[board.record(0) + scoreboard.STARTED] = time.monotonic_ns() - 2_000_000_000
            generation.pool.workers[0].since = now - 3
        peer.say(Report(Kind.EXITED, 0, pid, status=11), now)
        generation.tend(now, 0)
        assert peer.asked() == [Command(Order.FORK, 0)]
        pid = PID + 10 + n
        _is_ready(peer, 0, pid, now)


def test_a_worker_that_claims_to_be_older_than_its_fork_is_not_believed(peer: Peer) -> None:
    generation, board, pid, now, deaths = peer.generation, peer.generation.board, PID, 10.0, 0
    board.states[1] = scoreboard.BUSY
    while not generation.trouble.failures:
        board.words[board.record(0) + scoreboard.STARTED] = 1
        peer.say(Report(Kind.EXITED, 0, pid, status=11), now)
        deaths, pid, now = deaths + 1, PID + 10 + deaths, now + 0.02
        assert deaths < 10
        generation.tend(now, 0)
        if Command(Order.FORK, 0) in peer.asked():
            _is_ready(peer, 0, pid, now)


@pytest.mark.parametrize("status", [11, EXIT_CANT_ACCEPT << 8], ids=["SIGSEGV", "no descriptor left"])
def test_deaths_without_end_are_replaced_so_many_a_second(peer: Peer, capfd: pytest.CaptureFixture[str], status: int) -> None:
    generation, board, pid, now, forks = peer.generation, peer.generation.board, PID, 10.0, 0
    while now < 70.0:
        board.words[board.record(0) + scoreboard.BEGUN] += 1  # it says that it has served, and dies
        board.words[board.record(0) + scoreboard.OK] += 1
        if 0 in generation.pool.workers:
            peer.say(Report(Kind.EXITED, 0, pid, status=status), now)
        generation.tend(now, 0)
        if Command(Order.FORK, 0) in peer.asked():
            forks, pid = forks + 1, PID + 10 + forks
            _is_ready(peer, 0, pid, now)
        now += 0.005
    assert DEATHS_A_SECOND * 55 < forks <= DEATHS_A_SECOND * 60 + DEATHS + generation.config.max_workers + 1
    assert capfd.readouterr().err.count("again and again") == 1


def test_deaths_that_are_not_replaced_at_once_are_told_as_a_reason_to_back_off(peer: Peer) -> None:
    generation = peer.generation
    assert max(trouble.until for trouble in generation.troubles()) == 0.0
    generation._deaths.spend(1.0, 1000)
    latest = max(generation.troubles(), key=lambda trouble: trouble.until)
    assert latest.until > 1.0
    assert latest.reason == "workers end by themselves again and again"


@pytest.fixture
def registered() -> Iterator[Peer]:
    made = Peer(2, registered=1)
    made.boot(2)
    yield made
    made.close()


def is_killed_at(generation: Generation, at: float) -> bool:
    """Whether the fork server is killed then, and not before."""
    generation.tend(at - 0.01, 0)
    before = generation.link.killed
    generation.tend(at, 0)
    return generation.link.killed and not before


def test_a_fork_server_whose_import_registered_something_leaves_after_its_last_worker(registered: Peer) -> None:
    generation, board = registered.generation, registered.generation.board
    board.states[0] = board.states[1] = scoreboard.LEAVING
    generation.retire(0, 1.0, None)
    generation.tend(1.0 + NAG_FIRST, 0)
    for slot in range(2):
        generation.let_go(2.0)
        assert registered.asked() == []
        assert not generation.finishes
        assert generation.exited(slot, PID + slot, 0, 0.0, 0, 2.0)
    generation.let_go(3.0)
    assert registered.asked() == [Command(Order.LEAVE)]
    assert generation.finishes
    assert is_killed_at(generation, 3.0 + generation.config.boot_timeout), "what it runs may take as long as the import"
    assert not generation.finishes


def test_one_that_is_given_up_with_its_workers_has_as_long(registered: Peer) -> None:
    generation = registered.generation
    generation.abandon(1.0)
    assert registered.asked()[-1] == Command(Order.QUIT)
    for slot in range(2):
        generation.exited(slot, PID + slot, signal.SIGKILL, 0.0, 0, 1.0)
    generation.quit(4.0)
    assert is_killed_at(generation, 1.0 + generation.config.boot_timeout)


def test_an_upgrade_knows_that_a_fork_server_stays(registered: Peer) -> None:
    generation = registered.generation
    carried, wiring = generation.carry({registered.listener: 0}), generation.link.wiring
    link = carried.link
    board, orders, stacks, channel = (os.dup(fd) for fd in (link.board, link.orders, link.stacks, link.channel))
    carried = replace(carried, link=replace(link, board=board, orders=orders, stacks=stacks, channel=channel, gate=-1))
    successor = Generation.adopted(carried, generation.config, [registered.listener], wiring, Tally(), 1.0)
    successor.board.states[0] = successor.board.states[1] = scoreboard.LEAVING
    successor.retire(0, 1.0, None)
    successor.tend(2.0, 0)
    for slot in range(2):
        successor.let_go(2.0)
        assert registered.asked() == []
        successor.exited(slot, PID + slot, 0, 0.0, 0, 2.0)
    successor.let_go(2.0)
    assert registered.asked() == [Command(Order.LEAVE)]
    successor.link.pid = None
    successor.close()
