"""How a daemon stops: turn new clients away, serve the queue, let connections finish, and end. Quickly: cut them."""

from prefork import log
from prefork.changeover import Changeover
from prefork.daemon import Daemon, Stop
from prefork.ops.control import Client
from prefork.upgrading import Upgrading

# A stop's last word: who is still there after SIGKILL, so often and each time for so long, is not waited for.
QUICK_LIMIT, QUICK_TRIES = 1.0, 2
_WHY = "the daemon is stopping"


class Stopping:
    """The stop of a daemon; ``finished`` once nothing is left to wait for."""

    def __init__(self, daemon: Daemon, changeover: Changeover, upgrading: Upgrading) -> None:
        self.daemon = daemon
        self.changeover = changeover
        self.upgrading = upgrading
        self.finished = False

    def stop(self, why: str, client: Client | None = None, timeout: float | None = None) -> None:
        """Stop gracefully; connections may finish for ``timeout`` seconds (graceful_timeout unless said). Again: hurry."""
        daemon = self.daemon
        clients = [client] if client is not None else []
        if daemon.stopping is not None:
            daemon.stopping.clients += clients
            if timeout is not None and not daemon.stopping.killed:
                self._hurry(daemon.stopping, daemon.now + timeout)
            return
        seconds = daemon.config.graceful_timeout if timeout is None else timeout
        stop = daemon.stopping = Stop(why, daemon.now, daemon.now + seconds, clients, seconds, killed_before=daemon.killed())
        self.upgrading.drop(_WHY)
        if daemon.reloading is None or not daemon.reloading.is_restart:
            self.changeover.drop(_WHY)
        self.changeover.ensure_fork_server()
        log.event("stopping", why=why, busy=daemon.busy(), seconds=seconds)
        # Who waits in the queue has been connected by the kernel: a stop serves them.
        daemon.resume()
        for generation in daemon.generations():
            generation.announce_stop()
        for listener in daemon.listeners.current:
            daemon.listeners.say_farewell(listener, daemon.now, seconds)
        self._hurry(stop, stop.deadline)

    def _hurry(self, stop: Stop, deadline: float) -> None:
        """Nothing that ends may take longer than this stop."""
        stop.deadline = min(stop.deadline, deadline)
        stop.seconds = min(stop.seconds, max(0.0, deadline - self.daemon.now))
        self.daemon.listeners.hurry(self.daemon.now, stop.deadline)

    def stop_quickly(self, why: str, client: Client | None = None) -> None:
        """Stop at once: connections are cut."""
        daemon = self.daemon
        clients = [client] if client is not None else []
        if daemon.stopping is not None:
            clients += daemon.stopping.clients
            before = daemon.stopping.killed_before
        else:
            before = daemon.killed()
        if daemon.failure is None:
            log.event("stopping_quickly", why=why)
        daemon.stopping = Stop(why, daemon.now, daemon.now + QUICK_LIMIT, clients, killed=True, killed_before=before, quick=True)
        self.upgrading.drop(_WHY)
        self.changeover.drop(_WHY)
        for generation in daemon.generations():
            generation.announce_stop()
        daemon.listeners.close()
        for generation in daemon.generations():
            generation.quit(daemon.now)

    def tend(self) -> None:
        """Do what is due."""
        daemon, stop = self.daemon, self.daemon.stopping
        if stop is None:
            return
        if daemon.listeners.farewells:
            if daemon.listeners.settling:
                # Handshakes have a time of their own: what comes of them is served, and has as long as any connection.
                stop.deadline = max(stop.deadline, daemon.now + stop.seconds)
            return
        self.changeover.drop(_WHY)
        if daemon.current is not None:
            daemon.draining.append(daemon.current)
            daemon.current = None
        for generation in daemon.draining:
            generation.retire_all(daemon.now, None)  # the stop's own deadline is below
        if not daemon.draining:
            self.finished = True
        elif self._only_finishing():
            return
        elif stop.deadline <= daemon.now or (not stop.killed and self._only_the_killed_are_left()):
            self._end(stop)

    def wake_at(self) -> float | None:
        """When to `tend`; when a listener is closed there is a turn anyway."""
        stop = self.daemon.stopping
        return None if stop is None or self.daemon.listeners.farewells or self._only_finishing() else stop.deadline

    def _only_finishing(self) -> bool:
        """Whether only fork servers are left, which run what their imports have registered: a graceful stop waits for them."""
        stop = self.daemon.stopping
        draining = self.daemon.draining
        return stop is not None and not stop.quick and bool(draining) and all(generation.finishes for generation in draining)

    def _only_the_killed_are_left(self) -> bool:
        """Whether there is no connection any more that might end: a worker that SIGKILL has not ended is not waited for."""
        workers = [worker for generation in self.daemon.draining for worker in generation.pool.workers.values()]
        return bool(workers) and all(worker.killed for worker in workers)

    def _end(self, stop: Stop) -> None:
        """Its time is over. The listeners are out of use: nobody can be lost any more by killing one who does not leave."""
        daemon = self.daemon
        if not stop.killed:
            stop.killed, stop.deadline = True, daemon.now + QUICK_LIMIT
            for generation in daemon.draining:
                generation.retiring.kill_all(daemon.now, f"still there at the end of graceful_timeout ({stop.why})")
        elif stop.tries < QUICK_TRIES:
            stop.tries += 1
            stop.deadline = daemon.now + QUICK_LIMIT
            for generation in daemon.draining:
                generation.quit(daemon.now)
                if stop.tries == QUICK_TRIES:
                    generation.link.kill()  # its workers are ours then, and are killed by us
        else:
            log.event("left_behind", pids=", ".join(str(pid) for generation in daemon.draining for pid in generation.pids()))
            self.finished = True
