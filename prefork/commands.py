"""What the master does for each command that comes over the control socket, and what it answers when.

One function a command. Each asks the master for one of its verbs and says how the outcome is known; the answer goes out when it
is. Requests come from outside: every field is checked here. What `status` needs beyond the master's own facts are the boards,
whose descriptors go with the answer; `prefork.ops.status` does the sums in the process that asks.
"""

import os
import time
from dataclasses import asdict
from typing import Any

from prefork import __version__
from prefork.daemon import Daemon
from prefork.master import Master
from prefork.net.listener import Listener
from prefork.ops import control
from prefork.ops.control import Client
from prefork.ops.instances import DESCRIPTORS_LIMIT
from prefork.upgrading import START
from prefork.values import SECONDS_LIMIT

# So many workers that should have gone are named in a status; a mount that is away may have thousands wait.
OVERDUE = 64


def obey(master: Master, client: Client, request: dict[str, Any]) -> None:
    """Carry out one request."""
    match request["command"]:
        case "status":
            _status(master.daemon, client)
        case "reload":
            master.changeover.reload("reload", [client])
        case "upgrade":
            master.upgrading.upgrade("upgrade", client)
        case "outcome":
            _outcome(master, client, request.get("upgrade"))
        case "scale":
            _scale(master, client, request.get("workers"))
        case "suspend" | "resume" as wanted:
            _suspend(master.daemon, client, wanted)
        case "stop":
            _stop(master, client, request)
        case unknown:
            master.daemon.tell([client], {"ok": False, "reason": f"unknown command {str(unknown)[:80]!r}"})


def _outcome(master: Master, client: Client, number: object) -> None:
    if not isinstance(number, int):
        master.daemon.tell([client], {"ok": False, "reason": "of which upgrade? a number"})
        return
    conf = master.daemon.config
    # The trial and the reload may each take boot_timeout, and then there may be a canary.
    deadline = master.daemon.now + 2 * (conf.boot_timeout + START) + conf.canary
    master.daemon.tell_when(client, deadline, lambda _: master.upgrading.outcome(number))


def _scale(master: Master, client: Client, wanted: object) -> None:
    daemon = master.daemon
    current = daemon.current
    try:
        if current is None:
            raise ValueError("the daemon is starting or stopping")
        workers = control.scaled(str(wanted), current.targets[0])
    except ValueError as error:
        daemon.tell([client], {"ok": False, "reason": str(error)})
        return
    reason = master.scale(workers, "prefork scale")
    if reason is not None:
        daemon.tell([client], {"ok": False, "reason": reason})
        return

    def outcome(now: float) -> dict[str, Any] | None:
        # A fork server that is replaced meanwhile takes it over; a reload does not.
        current = daemon.current
        if current is None or current.targets[0] != workers:
            return {"ok": False, "reason": "a reload came between"}
        if not current.settled():
            return None
        return {"ok": True, "workers": workers, "at_ceiling": current.at_ceiling, "overdue": len(current.overdue(now))}

    daemon.tell_when(client, daemon.now + daemon.config.boot_timeout, outcome)


def _suspend(daemon: Daemon, client: Client, wanted: str) -> None:
    if daemon.current is None or daemon.stopping is not None:
        daemon.tell([client], {"ok": False, "reason": "the daemon is starting or stopping"})
        return
    if wanted == "suspend":
        daemon.suspend()
    else:
        daemon.resume()

    def outcome(now: float) -> dict[str, Any] | None:
        current, generations = daemon.current, daemon.generations()
        if current is None or daemon.suspended != (wanted == "suspend"):
            return {"ok": False, "reason": "another command came between"}
        done = not any(generation.accepts for generation in generations) if daemon.suspended else current.settled()
        overdue = sum(len(generation.overdue(now)) for generation in generations)
        return {"ok": True, "workers": current.targets[0], "busy": daemon.busy(), "overdue": overdue} if done else None

    daemon.tell_when(client, daemon.now + daemon.config.boot_timeout, outcome)


def _stop(master: Master, client: Client, request: dict[str, Any]) -> None:
    timeout = request.get("timeout")
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 <= timeout <= SECONDS_LIMIT):
        master.daemon.tell([client], {"ok": False, "reason": f"timeout = {str(timeout)[:80]!r}: must be seconds, 0 or more"})
    elif request.get("quick") is True:
        master.stopping.stop_quickly("prefork stop --quick", client)
    else:
        master.stopping.stop("prefork stop", client, timeout)


def _status(daemon: Daemon, client: Client) -> None:
    generations = daemon.generations()
    for generation in generations:
        generation.tell()
    most = DESCRIPTORS_LIMIT // 2
    ended = daemon.tally.counts
    for generation in generations[most:]:  # more than an answer can carry: their totals only
        ended += generation.accepted()
    generations = generations[:most]
    troubled = max(daemon.troubles(), key=lambda trouble: trouble.until)
    # While it starts, what it is about to listen on.
    listeners = daemon.listeners.current or (daemon.reloading.plan.listeners if daemon.reloading is not None else ())
    facts: dict[str, Any] = {
        "ok": True,
        "name": daemon.name,
        "module": daemon.config.module,
        "version": __version__,
        "pid": os.getpid(),
        "state": daemon.state,
        "started_at": daemon.started,
        "uptime": time.monotonic() - daemon.began,  # the clock may have been set since
        "generation": daemon.current.number if daemon.current is not None else 0,
        "reload": asdict(daemon.last_reload) if daemon.last_reload is not None else None,
        "backoff": {"until": time.time() + troubled.until - daemon.now, "reason": troubled.reason}
        if troubled.until > daemon.now
        else None,
        "max_workers": daemon.config.max_workers,
        **daemon.waits(),
        "listeners": [_listener_facts(listener) for listener in listeners],
        "targets": daemon.current.targets if daemon.current is not None else [],
        "ended": asdict(ended),
        "histogram": daemon.tally.histogram,
        "forked": daemon.tally.forked,
        "exited": daemon.tally.exited,
        "overdue": [asdict(late) for generation in daemon.generations() for late in generation.overdue(daemon.now)][:OVERDUE],
        "deaths": [asdict(death) for death in daemon.tally.deaths],
        "boards": [
            {
                "generation": generation.number,
                "layout": [generation.layout.listeners, generation.layout.capacity],
                "high": generation.pool.high,
                "listeners": [str(listener.address) for listener in generation.listeners],
            }
            for generation in generations
        ],
    }
    descriptors = [fd for generation in generations for fd in (generation.link.board_fd, generation.link.orders_fd)]
    if daemon.control is not None:
        daemon.control.answer(client, facts, daemon.now, descriptors)


def _listener_facts(listener: Listener) -> dict[str, Any]:
    queue, limit = listener.queue() or (None, None)
    return {"address": str(listener.address), "queue": queue, "queue_limit": limit}
