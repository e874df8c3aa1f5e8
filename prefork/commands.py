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
from prefork.master import Master
from prefork.net.listener import Listener
from prefork.ops import control
from prefork.ops.control import Client
from prefork.ops.instances import DESCRIPTORS_LIMIT
from prefork.values import SECONDS_LIMIT


def obey(master: Master, client: Client, request: dict[str, Any]) -> None:
    """Carry out one request."""
    match request["command"]:
        case "status":
            _status(master, client)
        case "reload":
            master.reload("reload", [client])
        case "scale":
            _scale(master, client, request.get("workers"))
        case "suspend" | "resume" as wanted:
            _suspend(master, client, wanted)
        case "stop":
            _stop(master, client, request)
        case unknown:
            master.tell([client], {"ok": False, "reason": f"unknown command {str(unknown)[:80]!r}"})


def _scale(master: Master, client: Client, wanted: object) -> None:
    current = master.current
    try:
        if current is None:
            raise ValueError("the daemon is starting or stopping")
        workers = control.scaled(str(wanted), current.targets[0])
    except ValueError as error:
        master.tell([client], {"ok": False, "reason": str(error)})
        return
    reason = master.scale(workers, "prefork scale")
    if reason is not None:
        master.tell([client], {"ok": False, "reason": reason})
        return

    def outcome(_: float) -> dict[str, Any] | None:
        # A fork server that is replaced meanwhile takes it over; a reload does not.
        current = master.current
        if current is None or current.targets[0] != workers:
            return {"ok": False, "reason": "a reload came between"}
        if not current.settled():
            return None
        return {"ok": True, "workers": workers, "saturated": current.saturated}

    master.tell_when(client, master.now + master.config.boot_timeout, outcome)


def _suspend(master: Master, client: Client, wanted: str) -> None:
    if master.current is None or master.stopping is not None:
        master.tell([client], {"ok": False, "reason": "the daemon is starting or stopping"})
        return
    if wanted == "suspend":
        master.suspend()
    else:
        master.resume()

    def outcome(_: float) -> dict[str, Any] | None:
        current, generations = master.current, master.generations()
        if current is None or master.suspended != (wanted == "suspend"):
            return {"ok": False, "reason": "another command came between"}
        done = not any(generation.accepts for generation in generations) if master.suspended else current.settled()
        return {"ok": True, "workers": current.targets[0], "busy": master.busy()} if done else None

    master.tell_when(client, master.now + master.config.boot_timeout, outcome)


def _stop(master: Master, client: Client, request: dict[str, Any]) -> None:
    timeout = request.get("timeout")
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 <= timeout <= SECONDS_LIMIT):
        master.tell([client], {"ok": False, "reason": f"timeout = {str(timeout)[:80]!r}: must be seconds, 0 or more"})
    elif request.get("quick") is True:
        master.stop_quickly("prefork stop --quick", client)
    else:
        master.stop("prefork stop", client, timeout)


def _status(master: Master, client: Client) -> None:
    generations = master.generations()
    most = DESCRIPTORS_LIMIT // 2
    ended = master.tally.counts
    for generation in generations[most:]:  # more than an answer can carry: their totals only
        ended += generation.accepted()
    generations = generations[:most]
    troubled = max(master.troubles(), key=lambda trouble: trouble.until)
    # While it starts, what it is about to listen on.
    listeners = master.listeners.current or (master.reloading.plan.listeners if master.reloading is not None else ())
    facts: dict[str, Any] = {
        "ok": True,
        "name": master.name,
        "module": master.config.module,
        "version": __version__,
        "pid": os.getpid(),
        "state": master.state,
        "started_at": master.started,
        "uptime": time.monotonic() - master.started_monotonic,  # the clock may have been set since
        "generation": master.current.number if master.current is not None else 0,
        "reload": master.last_reload,
        "backoff": {"until": time.time() + troubled.until - master.now, "reason": troubled.reason}
        if troubled.until > master.now
        else None,
        "max_workers": master.config.max_workers,
        "saturated_seconds": master.saturated_before + (master.current.saturated_for(master.now) if master.current else 0.0),
        "listeners": [_listener_facts(listener) for listener in listeners],
        "targets": master.current.targets if master.current is not None else [],
        "ended": asdict(ended),
        "histogram": master.tally.histogram,
        "forked": master.tally.forked,
        "exited": master.tally.exited,
        "deaths": [asdict(death) for death in master.tally.deaths],
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
    if master.control is not None:
        master.control.answer(client, facts, master.now, descriptors)


def _listener_facts(listener: Listener) -> dict[str, Any]:
    queue, limit = listener.queue() or (None, None)
    return {"address": str(listener.address), "queue": queue, "queue_limit": limit}
