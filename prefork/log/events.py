"""The events: each is named once, here, with its level and its sentence. Nothing else in prefork words a log line.

A sentence names its fields, which are the keyword arguments of `prefork.log.event`; in JSON they stand beside the sentence under
their own names, so a name, once published, stays. RESERVED are the names that every line has. ``{count:line|lines}`` is "1 line" or
"2 lines", and ``{count:|is|are}`` only the word.
"""

import string
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from prefork.printable import counted


class Level(IntEnum):
    """How much a line matters."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


# What a line says besides its event's own fields.
RESERVED = frozenset({"time", "level", "event", "role", "process", "message", "text", "part", "parts"})
# Written whatever log_level says: somebody's code, or somebody's configuration, has asked for them.
ALWAYS = frozenset({"access", "output"})

# name: level, sentence. Fields are the keyword arguments of `event`; `text` (a traceback) follows the line, indented.
EVENTS: dict[str, tuple[Level, str]] = {
    # the daemon
    "serving": (
        Level.INFO,
        "prefork {version} serving {module} on {addresses}: {acceptors:acceptor|acceptors} each, name {name}, pid {pid}",
    ),
    "stopping": (Level.INFO, "stopping ({why}): {busy:connection has|connections have} {seconds:g} s to finish"),
    "interrupt_again": (Level.INFO, "Ctrl-C (SIGINT) once more stops at once, and cuts the connections that are left"),
    "stopping_quickly": (Level.INFO, "stopping at once ({why})"),
    "stopped": (Level.INFO, "stopped: {accepted:connection|connections} accepted, {killed} cut"),
    "left_behind": (Level.ERROR, "these processes can't be ended by us, and are left behind: {pids}"),
    "cut": (Level.WARNING, "worker {slot} of generation {generation} (pid {pid}) is killed, serving {peer}: {why}"),
    "log_may_wait": (Level.WARNING, "standard error can't be opened anew ({reason}): a reader that stops stops the daemon"),
    "dropped": (Level.WARNING, "{count:log line|log lines} could not be written"),
    "reopened": (Level.INFO, "log files opened again: {paths}"),
    "log_kept": (Level.WARNING, "{path} can't be opened again ({reason}): the file that is open is written on"),
    "log_writer_died": (Level.WARNING, "the process that writes {path} has ended ({cause}); another one takes its place"),
    "log_lost": (
        Level.ERROR,
        "{path} can't be written ({reason}); that is tried again, and lines that come meanwhile may be dropped",
    ),
    "not_batch": (Level.INFO, "workers keep the usual scheduling policy, another can't be had here: {reason}"),
    "unknown_variable": (Level.WARNING, "the environment variable {name} is no option: {remedy}"),
    "control_failed": (
        Level.WARNING,
        "no control socket, serving on without status, reload and stop: {reason}",
    ),
    "lock_failed": (
        Level.WARNING,
        "only its control socket keeps a second instance named {name} from starting, there is no place for a lock: {reason}",
    ),
    "name_restored": (Level.WARNING, "{path} was removed while the daemon runs: it is there again"),
    "control_refused": (Level.WARNING, "control client refused: {reason}"),
    "handlers_are_root": (Level.WARNING, "handlers run as root: give a user to run them as (--user)"),
    "orders_exposed": (
        Level.WARNING,
        "there is no /proc: C code of generation {generation}'s handlers can make writable what only the master should write",
    ),
    "capabilities_kept": (
        Level.WARNING,
        "handlers keep the capabilities that the daemon was given: giving them up is forbidden here ({reason}); allow capset(2)",
    ),
    "activated_unused": (Level.WARNING, "sockets of the service manager are not used, bind names others: {names}"),
    "address_kept": (Level.WARNING, "{address} stays as it was: {reason}"),
    "suspended": (Level.INFO, "suspended: nobody accepts, new clients wait in the queue; {busy:connection goes|connections go} on"),
    "resumed": (Level.INFO, "resumed: accepting again"),
    "control_crowded": (
        Level.WARNING,
        "more than {most} control clients at once: {count:that said nothing was|that said nothing were} let go",
    ),
    "listening": (Level.INFO, "listening on {address}"),
    "no_longer_listening": (Level.INFO, "no longer listening on {address}"),
    "farewell_failed": (Level.WARNING, "{address} is closed at once, with whoever waits there: {reason}"),
    "handshakes_unseen": (
        Level.WARNING,
        "handshakes under way can't be seen here ({reason}): clients that are not connected {seconds:g} s after a listener begins "
        "to close are reset; allow AF_NETLINK, or mount /proc",
    ),
    "listener_mended": (
        Level.WARNING,
        "a handler has changed the listening socket of {address}, which all share: {what} undone ({count} so far)",
    ),
    "listener_reopened": (
        Level.ERROR,
        "a handler has spoilt the listening socket of {address} ({reason}): it is opened anew; not again within {seconds:.1f} s",
    ),
    "listener_lost": (
        Level.ERROR,
        "a handler has spoilt the listening socket of {address} ({reason}), which is another program's: have that open it anew",
    ),
    "listener_swept": (
        Level.WARNING,
        "the path of {address} was removed while the daemon runs, no client finds it: the next reload makes it anew",
    ),
    "limit": (Level.WARNING, "{what} is {has}, {why} can need {needs}: {remedy}"),
    "bug": (Level.ERROR, "internal error in the {where}, please report it"),
    # reload
    "booting": (Level.DEBUG, "generation {generation} starts: {module}"),
    "committed": (Level.INFO, "generation {generation} serves {module} ({seconds:.3f} s)"),
    "canary": (
        Level.INFO,
        "generation {generation} is on trial for {seconds:g} s: {most:crash takes|crashes take} the reload back",
    ),
    "canary_passed": (Level.INFO, "generation {generation} has passed its trial, with {crashes:crash|crashes}"),
    "canary_lost": (Level.WARNING, "the fork server of generation {generation} died: the reload can't be taken back any more"),
    "rolled_back": (Level.ERROR, "{what} taken back, generation {generation} serves again in the place of {crashed}: {reason}"),
    "refused": (Level.ERROR, "{what} refused, generation {generation} keeps serving: {reason}"),
    "drained": (Level.DEBUG, "generation {generation} has ended"),
    "scaled": (Level.INFO, "workers: {workers:acceptor|acceptors} for each address, until the next reload ({why})"),
    "upgrading": (Level.INFO, "{what}: trying {program}"),
    "handing_over": (Level.INFO, "prefork {version} becomes what {program} runs now"),
    "upgraded": (Level.INFO, "prefork {version} goes on where prefork {before} was, pid {pid}"),
    "listening_left": (Level.WARNING, "the import has opened listening sockets, which every worker has: {sockets}"),
    "event_loops_left": (
        Level.WARNING,
        "the import has made event loops (epoll: {descriptors}), which wake each worker for the others' clients, too, unless their "
        "library renews them after a fork: make them in on_worker_start",
    ),
    "folder_gone": (Level.WARNING, "the working directory {folder} was removed: nothing is imported from there"),
    "reload_queued": (Level.INFO, "a reload or an upgrade is under way: another one follows it"),
    "ignored": (Level.INFO, "{what} ignored: {why}"),
    # processes
    "fork_server_died": (Level.ERROR, "the fork server of generation {generation} died ({cause}); its workers serve on"),
    "registered": (
        Level.INFO,
        "generation {generation} has registered for its end: {what}; its fork server stays until its last worker has ended",
    ),
    "import_processes": (
        Level.INFO,
        "generation {generation} has started processes in the import or on_boot, which end with it: {who}",
    ),
    "import_exit_failed": (Level.ERROR, "at the end of generation {generation}: {what}"),
    "import_unfinished": (
        Level.WARNING,
        "the fork server of generation {generation} has ended ({cause}): what its import has registered for the end was not run, "
        "or not to its end",
    ),
    "fork_server_hung": (Level.ERROR, "the fork server of generation {generation} does not answer: it is killed"),
    "restarting": (Level.WARNING, "a new fork server in {seconds:.1f} s: {reason}"),
    "worker_died": (Level.WARNING, "worker {slot} of generation {generation} (pid {pid}) died: {cause}, serving {peer}"),
    "hung": (
        Level.ERROR,
        "worker {slot} of generation {generation} (pid {pid}) has served {peer} for {duration:.1f} s: "
        "it is killed (timeout = {seconds:g} s)",
    ),
    "computing": (
        Level.WARNING,
        "worker {slot} of generation {generation} (pid {pid}) says that it waits, and computes, perhaps in a thread that keeps it "
        "from serving a client: it is asked to leave",
    ),
    "not_left": (
        Level.WARNING,
        "{count:worker|workers} of generation {generation} {count:|was|were} asked to leave and {count:|has|have} not left: {who}",
    ),
    "still_there": (
        Level.ERROR,
        "{count:worker|workers} of generation {generation} {count:|was|were} killed and {count:|has|have} not ended: {who}",
    ),
    "worker_ended": (Level.DEBUG, "worker {slot} of generation {generation} (pid {pid}) has left: {cause}"),
    "recycled": (
        Level.DEBUG,
        "worker {slot} of generation {generation} (pid {pid}) is recycled; "
        "its slot has served {connections:connection|connections}",
    ),
    "worker_early": (
        Level.ERROR,
        "worker {slot} of generation {generation} (pid {pid}) {what}: {cause}; {failures} in a row, next try in {seconds:.1f} s",
    ),
    "deaths_flood": (
        Level.WARNING,
        "workers of generation {generation} end by themselves again and again: at most {most} a second are replaced",
    ),
    "worker_exhausted": (
        Level.ERROR,
        "worker {slot} of generation {generation} (pid {pid}) could not accept any more and is replaced: {cause}; {count} so far",
    ),
    "flood": (Level.WARNING, "a flood of {what}: the master hears of it {rate} times a second as long as that goes on"),
    "deaf": (Level.ERROR, "can't hear {what} for now: {reason}; trying again every second"),
    "fork_failed": (Level.ERROR, "fork failed: {reason}; {failures} in a row, next try in {seconds:.1f} s"),
    "fork_again": (Level.INFO, "workers start again, after {failures:failure|failures}"),
    "ceiling_reached": (
        Level.INFO,
        "max_workers = {max_workers} reached: on {address} fewer than workers = {workers} can wait for clients",
    ),
    "ceiling_left": (Level.INFO, "{address} has all its acceptors again, after {seconds:.1f} s at the ceiling"),
    "saturated": (
        Level.WARNING,
        "max_workers = {max_workers} reached on {address}, and no acceptor is left: new clients wait in the queue",
    ),
    "unsaturated": (Level.INFO, "{address} has acceptors again, after {seconds:.1f} s without"),
    "stalled": (
        Level.WARNING,
        "no acceptor is left on {address}, and no worker can be forked ({reason}): new clients wait in the queue",
    ),
    "unstalled": (Level.INFO, "{address} has acceptors again, after {seconds:.1f} s in which none could be forked"),
    "gossip": (
        Level.WARNING,
        "{count:report|reports} from processes of generation {generation} made no sense and {count:|was|were} ignored",
    ),
    "spoilt_slot": (Level.WARNING, "worker {slot} of generation {generation} left impossible counters: put back"),
    "handlers_undone": (
        Level.WARNING,
        "handlers that the import or on_boot of {module} has installed for {signals} are undone, workers need these signals: "
        "look at conn.stopping, or give on_worker_exit",
    ),
    # in workers
    "handler_error": (Level.ERROR, "the handler raised, serving {peer}"),
    "handler_errors": (Level.ERROR, "{count:more traceback|more tracebacks} of the handler {count:|was|were} not logged"),
    "peer_gone": (Level.DEBUG, "{peer} ended the connection: {reason}"),
    "recycled_at_once": (
        Level.WARNING,
        "with its first connection this worker has {has} bytes of memory, more than max_memory = {max_memory}: it is recycled, and "
        "so may be each after one connection; raise max_memory",
    ),
    "accept_paused": (Level.ERROR, "accept failed: {reason}; trying again every {seconds:g} s"),
    "accept_again": (Level.INFO, "accept works again, after {count:failure|failures}"),
    "accept_broken": (Level.ERROR, "accept failed: {reason}; this worker ends and is replaced"),
    "accept_unblocked": (
        Level.WARNING,
        "a handler has set {what} on the listening socket, which all share: undone ({count} so far)",
    ),
    "signal_handler_raised": (Level.ERROR, "a signal handler raised while no client was served: this worker ends and is replaced"),
    "late_alarm": (Level.WARNING, "an alarm that the handler left behind rang after its end: {reason}"),
    "not_at_home": (Level.WARNING, "the handler left another working directory and no way back ({reason}): this worker ends"),
    "child_keeps": (Level.WARNING, "descriptor {descriptor} can't be closed in a handler's child: {reason}"),
    "exit_failed": (Level.ERROR, "ending this worker: {what}"),
    # lines of connections and of handlers
    "access": (Level.INFO, "{peer} {outcome} after {duration:.6f} s, worker {slot} of generation {generation} on {listener}"),
    "output": (Level.INFO, "{stream}: {line}"),
    "record": (Level.INFO, "{logger}: {line}"),
}


class _Formatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        match format_spec.split("|"):
            case [one, many]:
                return counted(value, one, many)
            case ["", one, many]:
                return one if value == 1 else many
        return super().format_field(value, format_spec)


class _Template(string.Formatter):
    def get_value(self, key: int | str, args: Any, kwargs: Any) -> str:  # noqa: ARG002 - the library calls it with them
        return f"{{{key}}}"

    def format_field(self, value: Any, format_spec: str) -> Any:
        *_, many = format_spec.split("|")
        return value if "|" not in format_spec else many if format_spec.startswith("|") else f"{value} {many}"


# str.format_map is ten times as fast.
_COUNTED = frozenset(name for name, (_, words) in EVENTS.items() if "|" in words)


def sentence(name: str, fields: Mapping[str, Any]) -> str:
    """What an event's line says."""
    words = EVENTS[name][1]
    return _Formatter().vformat(words, (), fields) if name in _COUNTED else words.format_map(fields)


def template(name: str) -> str:
    """The sentence with the fields' names in braces, for people."""
    return _Template().vformat(EVENTS[name][1], (), {})
