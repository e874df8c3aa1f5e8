"""What `prefork status` shows: the master's facts and the scoreboards, put together by the command that asks.

The master hands over descriptors of its boards and sums up nothing, so that a look at 10,000 workers costs it nothing. Memory
and CPU of workers come from /proc, read here. A generation that ends meanwhile changes nothing: its boards stay readable.
"""

import fcntl
import os
import time
from collections.abc import Sequence
from typing import Any

import click

from prefork.accepting import PAUSE
from prefork.pool import scoreboard
from prefork.pool.scoreboard import BUSY, FREE, LEAVING, STATES, Access, Counts, Layout, Scoreboard
from prefork.printable import counted, one_line

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
# As many as a machine can have processes (PID_MAX_LIMIT): no true answer names more.
_SLOTS_LIMIT = 1 << 22
# What is on its way somewhere, and what serves a client; idle is as it should be.
_COLOURS = {
    "running": "green",
    "busy": "green",
    **dict.fromkeys(("starting", "reloading", "upgrading", "suspended", "stopping", "retiring"), "yellow"),
    "paused": "red",
}
_WAITS = ("saturated_seconds", "saturated_since", "stalled_seconds", "stalled_since", "ceiling_since")
_WORKER_STATES = ("starting", "idle", "busy", "retiring", "paused")


def assemble(facts: dict[str, Any], descriptors: Sequence[int], *, usage: bool = True) -> dict[str, Any]:
    """The status as documented, from an answer of the master and its descriptors, which are closed.

    ``usage``: read memory and CPU of each worker from /proc, which has to have the daemon's pids. Raises an error of some kind when
    it is no daemon's of this version.
    """
    workers: list[dict[str, Any]] = []
    try:
        totals = Counts(**facts["ended"])
        histogram: list[int] = list(facts["histogram"])
        if sum(abs(top) for board_facts in facts["boards"] for top in board_facts["high"]) > _SLOTS_LIMIT:
            raise ValueError(f"more than {_SLOTS_LIMIT} slots")
        for fd in descriptors:
            _refuse_strange(fd)
        for place, board_facts in enumerate(facts["boards"]):
            layout = Layout(*board_facts["layout"])
            board = Scoreboard(descriptors[2 * place], descriptors[2 * place + 1], layout, Access.READER)
            for slot in _slots(layout, board_facts["high"]):
                durations = board.histogram(slot)  # before the counters, see there
                counts = board.counts(slot)
                totals += counts
                if sum(durations) <= counts.orderly:  # else they were overwritten
                    histogram = [a + b for a, b in zip(histogram, durations, strict=True)]
                if (state := board.states[slot]) != FREE:
                    listener = board_facts["listeners"][layout.listener(slot)]
                    workers.append(_worker(board, slot, state, counts, board_facts["generation"], listener, usage=usage))
            board.close()
    finally:
        for fd in descriptors:
            os.close(fd)
    return {
        **{key: facts[key] for key in ("name", "module", "version", "pid", "state", "started_at", "uptime")},
        **{key: facts[key] for key in ("generation", "reload")},
        "backoff": facts["backoff"] or _pause_of(workers),
        **{key: facts[key] for key in ("max_workers", *_WAITS)},
        "listeners": [
            {**listener, "workers": _summary(workers, listener["address"], target)}
            for listener, target in zip(facts["listeners"], facts["targets"] or [0] * len(facts["listeners"]), strict=True)
        ],
        "totals": {
            "accepted": totals.begun,
            "serving": totals.serving,
            "ok": totals.ok,
            "error": totals.error,
            "killed": totals.killed,
            "rejected": totals.rejected,
            "forked": facts["forked"],
            "exited": facts["exited"],
        },
        "duration": {f"p{percent}": _percentile(histogram, percent / 100) for percent in (50, 90, 99)},
        "workers": workers,
        "overdue": facts["overdue"],
        "deaths": facts["deaths"],
    }


def _pause_of(workers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Workers that wait until accept() works again are backed off from, which is not the master's doing."""
    paused = sum(worker["state"] == "paused" for worker in workers)
    if not paused:
        return None
    reason = (
        f"accept fails in {counted(paused, 'worker, which tries', 'workers, which try')} again every {PAUSE:g} s: the log tells how"
    )
    return {"until": time.time() + PAUSE, "reason": reason}


def _refuse_strange(fd: int) -> None:
    """Raise when it is no board: to read another file may take for ever (a FUSE), or end us (SIGBUS) when it is cut off.

    Only files in memory have seals (F_GET_SEALS, fcntl(2): else EINVAL).
    """
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError(scoreboard.NO_SCOREBOARD)


def _slots(layout: Layout, high: Sequence[int]) -> list[int]:
    return [listener * layout.capacity + offset for listener, top in enumerate(high) for offset in range(top)]


def _worker(
    board: Scoreboard, slot: int, state: int, counts: Counts, generation: int, listener: str, *, usage: bool
) -> dict[str, Any]:
    record = board.record(slot)
    pid = board.words[record + scoreboard.PID]
    since_ns = board.words[record + (scoreboard.SINCE if state == BUSY else scoreboard.STARTED)]
    ago_ns = time.monotonic_ns() - since_ns
    rss, cpu = _usage(pid) if usage else (None, None)
    name = STATES.get(state, "starting")
    return {
        "pid": pid,
        "slot": slot,
        "listener": listener,
        "generation": generation,
        "state": "retiring" if state != BUSY and (board.retire[slot] or state == LEAVING) else name,
        "since": time.time() - ago_ns / 1e9 if since_ns and ago_ns >= 0 else None,
        "connections": counts.begun,
        "peer": board.peer(slot) if state == BUSY else None,
        "rss": rss,
        "cpu": cpu,
    }


def _summary(workers: list[dict[str, Any]], address: str, target: int) -> dict[str, int]:
    counted = dict.fromkeys(_WORKER_STATES, 0)
    for worker in workers:
        if worker["listener"] == address:
            counted[worker["state"]] += 1
    return {"target": target, **counted}


def _usage(pid: int) -> tuple[int | None, float | None]:
    """Resident memory in bytes and CPU seconds of a process; None and None when it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()
    except OSError:
        return None, None
    return int(values[21]) * _PAGE, (int(values[11]) + int(values[12])) / _TICKS


def _percentile(histogram: Sequence[int], share: float) -> float | None:
    """Seconds below which this share of connections ended, within its power of two; None when there were none."""
    total = sum(histogram)
    if total == 0:
        return None
    wanted = share * total
    below = 0
    for bucket, count in enumerate(histogram):
        if count and below + count >= wanted:
            low = (1 << bucket >> 1) * 1.024e-6
            high = (1 << bucket) * 1.024e-6
            return low + (high - low) * (wanted - below) / count
        below += count
    return (1 << scoreboard.BUCKETS) * 1.024e-6


def table(status: dict[str, Any]) -> str:
    """The status for people, with the colours of a terminal where something matters.

    Names of peers, reasons and whatever else user code may have chosen are text here, whatever they hold.
    """
    status = _shown(status)
    parts = [_head(status), _listeners(status)]
    parts += [_workers(status)] if status["workers"] else []
    parts += [_deaths(status)] if status["deaths"] else []
    return "\n\n".join("\n".join(lines) for lines in parts)


def _shown(value: Any) -> Any:
    """A document whose texts are one line each and steer no terminal. Of a reason, which may hold a traceback, the first one."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if isinstance(value, dict):
        return {key: _shown(one.partition("\n")[0] if key == "reason" and one else one) for key, one in value.items()}
    return value


def _head(status: dict[str, Any]) -> list[str]:
    totals, duration, reload = status["totals"], status["duration"], status["reload"]
    lines = [
        f"{status['name']}  {_state(status['state'])}  {status['module']}  generation {status['generation']}  pid {status['pid']}  "
        f"prefork {status['version']}  up {_span(status['uptime'])}",
        f"connections: {totals['accepted']} accepted = {totals['ok']} ok + {_bad(totals['error'], 'error')} + "
        f"{_bad(totals['killed'], 'killed')} + {totals['rejected']} rejected + {totals['serving']} being served",
        f"processes: {counted(len(status['workers']), 'worker', 'workers')}, at most {status['max_workers']}; "
        f"{totals['forked']} forked, {totals['exited']} ended",
    ]
    if duration["p50"] is not None:
        lines.append("duration: " + "  ".join(f"{key} {_span(value)}" for key, value in duration.items()))
    lines += _waits(status)
    if status["backoff"]:
        lines.append(f"{click.style('backing off', fg='red')}: {status['backoff']['reason']}")
    if status["overdue"]:
        who = ", ".join(f"{late['pid']} ({late['what']} {_span(late['seconds'])} ago)" for late in status["overdue"])
        lines.append(f"{click.style('should have gone', fg='red')}: {who}")
    if reload and reload["result"] != "ok":
        when = f"{_span(time.time() - reload['at'])} ago"
        lines.append(f"last reload {click.style(reload['result'], fg='red')} {when}: {reload['reason']}")
    return lines


def _waits(status: dict[str, Any]) -> list[str]:
    """Whether clients wait now because no acceptor is left, and for how long they have."""
    now, lines = time.time(), []
    for key, why in (("saturated", "max_workers is reached"), ("stalled", "no worker can be forked")):
        since, seconds = status[f"{key}_since"], status[f"{key}_seconds"]
        if since is not None:
            lines.append(f"{click.style(key, fg='red')} for {_span(now - since)}: {why}, and clients wait; {_span(seconds)} in all")
        elif seconds:
            lines.append(f"{key}: not now, {_span(seconds)} in all")
    if status["ceiling_since"] is not None and status["saturated_since"] is None:
        lines.append(f"at the ceiling for {_span(now - status['ceiling_since'])}: fewer than workers can wait for clients")
    return lines


def _listeners(status: dict[str, Any]) -> list[str]:
    rows = [["LISTENER", "QUEUE", "TARGET", "STARTING", "IDLE", "BUSY", "RETIRING", "PAUSED"]]
    for listener in status["listeners"]:
        queue = "-" if listener["queue"] is None else f"{listener['queue']}/{listener['queue_limit']}"
        counted = listener["workers"]
        rows.append([listener["address"], queue, *[str(counted[key]) for key in ("target", *_WORKER_STATES)]])
    return _columns(rows)


def _workers(status: dict[str, Any]) -> list[str]:
    rows = [["PID", "GEN", "SLOT", "STATE", "SINCE", "CONNECTIONS", "RSS", "CPU", "PEER"]]
    now = time.time()
    for worker in status["workers"]:
        rss = "-" if worker["rss"] is None else f"{worker['rss'] / 1048576:.1f}M"
        cpu = "-" if worker["cpu"] is None else f"{worker['cpu']:.2f}s"
        since = "-" if worker["since"] is None else _span(now - worker["since"])
        state = _state(worker["state"])
        shown = [worker["pid"], worker["generation"], worker["slot"], state, since, worker["connections"], rss, cpu]
        rows.append([*map(str, shown), worker["peer"] or ""])
    return _columns(rows)


def _deaths(status: dict[str, Any]) -> list[str]:
    rows = [["DIED", "PID", "GEN", "SLOT", "CAUSE", "PEER"]]
    now = time.time()
    for death in status["deaths"]:
        cause = click.style(death["cause"], fg="red")
        shown = [f"{_span(now - death['at'])} ago", death["pid"], death["generation"], death["slot"], cause, death["peer"] or ""]
        rows.append([*map(str, shown)])
    return _columns(rows)


def _state(state: str) -> str:
    return click.style(state, fg=_COLOURS[state]) if state in _COLOURS else state


def _bad(count: int, what: str) -> str:
    return click.style(f"{count} {what}", fg="red") if count else f"{count} {what}"


def _columns(rows: list[list[str]]) -> list[str]:
    # Colours take no place on a terminal.
    widths = [max(len(click.unstyle(cell)) for cell in column) for column in zip(*rows, strict=True)]
    padded = [[cell + " " * (width - len(click.unstyle(cell))) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in padded]


def _span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f}ms"
    if seconds < 120:
        return f"{seconds:.1f}s"
    minutes = int(seconds // 60)
    return f"{minutes}m" if minutes < 120 else f"{minutes // 60}h" if minutes < 48 * 60 else f"{minutes // 1440}d"
