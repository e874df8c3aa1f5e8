"""What a line of a JSON log is, as the README promises it: https://json-schema.org, draft 2020-12."""

import json
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator

WHOLE = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
SECONDS = {"type": "number", "minimum": 0}

ALWAYS = {
    # RFC 3339, with milliseconds and offset
    "time": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d$"},
    "level": {"enum": ["debug", "info", "warning", "error"]},
    "event": {"type": "string", "pattern": r"^[a-z_]+$"},
    "role": {"type": "string", "pattern": r"^(master|gen \d+( worker \d+)?)$"},
    "process": {"type": "integer", "minimum": 1},
    "message": TEXT,
}
SOMETIMES = {
    "text": {"type": "string", "minLength": 1},
    "part": {"type": "integer", "minimum": 1},
    "parts": {"type": "integer", "minimum": 2},
}
# Fields of events whose type people rely on, wherever they stand.
FIELDS = {
    **dict.fromkeys(["slot", "generation", "pid", "count", "failures", "acceptors", "workers", "busy", "max_workers"], WHOLE),
    **dict.fromkeys(["accepted", "killed", "backlog", "limit"], WHOLE),
    **dict.fromkeys(["seconds", "duration"], SECONDS),
    **dict.fromkeys(
        ["peer", "listener", "logger", "address", "addresses", "cause", "why", "what", "name", "module", "version", "paths"], TEXT
    ),
    "outcome": {"enum": ["ok", "error", "killed", "rejected"]},
    "stream": {"enum": ["stdout", "stderr"]},
}
REQUIRED = {
    "access": ["peer", "duration", "outcome", "slot", "generation", "listener"],
    "output": ["stream"],
    "record": ["logger"],
    "handler_error": ["peer", "text"],
    "worker_died": ["slot", "generation", "pid", "cause", "peer"],
    "dropped": ["count"],
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": list(ALWAYS),
    "properties": {**ALWAYS, **SOMETIMES, **FIELDS},
    "propertyNames": {"pattern": "^[a-z_]+$"},
    "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
    "dependentRequired": {"part": ["parts", "text"], "parts": ["part"]},
    "allOf": [{"if": {"properties": {"event": {"const": name}}}, "then": {"required": keys}} for name, keys in REQUIRED.items()],
}
# Every event and the fields of its sentence. They are an interface: a change here breaks somebody's dashboard.
EVENT_FIELDS = {
    "serving": ["version", "module", "addresses", "acceptors", "name", "pid"],
    "stopping": ["why", "busy", "seconds"],
    "interrupt_again": [],
    "stopping_quickly": ["why"],
    "stopped": ["accepted", "killed"],
    "left_behind": ["pids"],
    "cut": ["slot", "generation", "pid", "peer", "why"],
    "log_may_wait": ["reason"],
    "dropped": ["count"],
    "reopened": ["paths"],
    "log_kept": ["path", "reason"],
    "log_writer_died": ["path", "cause"],
    "log_lost": ["path", "reason"],
    "unknown_variable": ["name", "remedy"],
    "control_failed": ["reason"],
    "control_refused": ["reason"],
    "lock_failed": ["name", "reason"],
    "name_restored": ["path"],
    "handlers_are_root": [],
    "orders_exposed": ["generation"],
    "capabilities_kept": ["reason"],
    "activated_unused": ["names"],
    "address_kept": ["address", "reason"],
    "suspended": ["busy"],
    "resumed": [],
    "control_crowded": ["most", "count"],
    "listening": ["address"],
    "no_longer_listening": ["address"],
    "farewell_failed": ["address", "reason"],
    "handshakes_unseen": ["reason", "seconds"],
    "listener_mended": ["address", "what", "count"],
    "listener_reopened": ["address", "reason", "seconds"],
    "listener_lost": ["address", "reason"],
    "listener_swept": ["address"],
    "limit": ["what", "has", "why", "needs", "remedy"],
    "bug": ["where"],
    "booting": ["generation", "module"],
    "committed": ["generation", "module", "seconds"],
    "canary": ["generation", "seconds", "most"],
    "canary_passed": ["generation", "crashes"],
    "canary_lost": ["generation"],
    "rolled_back": ["what", "generation", "crashed", "reason"],
    "refused": ["what", "generation", "reason"],
    "drained": ["generation"],
    "scaled": ["workers", "why"],
    "upgrading": ["what", "program"],
    "handing_over": ["version", "program"],
    "upgraded": ["version", "before", "pid"],
    "folder_gone": ["folder"],
    "listening_left": ["sockets"],
    "event_loops_left": ["descriptors"],
    "not_batch": ["reason"],
    "reload_queued": [],
    "ignored": ["what", "why"],
    "fork_server_died": ["generation", "cause"],
    "fork_server_hung": ["generation"],
    "registered": ["generation", "what"],
    "import_processes": ["generation", "who"],
    "import_exit_failed": ["generation", "what"],
    "import_unfinished": ["generation", "cause"],
    "restarting": ["seconds", "reason"],
    "worker_died": ["slot", "generation", "pid", "cause", "peer"],
    "hung": ["slot", "generation", "pid", "peer", "duration", "seconds"],
    "computing": ["slot", "generation", "pid"],
    "not_left": ["count", "generation", "who"],
    "still_there": ["count", "generation", "who"],
    "worker_ended": ["slot", "generation", "pid", "cause"],
    "recycled": ["slot", "generation", "pid", "connections"],
    "worker_exhausted": ["slot", "generation", "pid", "cause", "count"],
    "worker_early": ["slot", "generation", "pid", "what", "cause", "failures", "seconds"],
    "deaths_flood": ["generation", "most"],
    "flood": ["what", "rate"],
    "deaf": ["what", "reason"],
    "fork_failed": ["reason", "failures", "seconds"],
    "fork_again": ["failures"],
    "ceiling_reached": ["max_workers", "address", "workers"],
    "ceiling_left": ["address", "seconds"],
    "saturated": ["max_workers", "address"],
    "unsaturated": ["address", "seconds"],
    "stalled": ["address", "reason"],
    "unstalled": ["address", "seconds"],
    "gossip": ["count", "generation"],
    "spoilt_slot": ["slot", "generation"],
    "handlers_undone": ["module", "signals"],
    "handler_error": ["peer"],
    "handler_errors": ["count"],
    "peer_gone": ["peer", "reason"],
    "recycled_at_once": ["has", "max_memory"],
    "accept_paused": ["reason", "seconds"],
    "accept_again": ["count"],
    "accept_broken": ["reason"],
    "accept_unblocked": ["what", "count"],
    "signal_handler_raised": [],
    "late_alarm": ["reason"],
    "not_at_home": ["reason"],
    "child_keeps": ["descriptor", "reason"],
    "exit_failed": ["what"],
    "access": ["peer", "outcome", "duration", "slot", "generation", "listener"],
    "output": ["stream", "line"],
    "record": ["logger", "line"],
}
Draft202012Validator.check_schema(SCHEMA)
_validator = Draft202012Validator(SCHEMA)


def read(log: str) -> Iterator[dict[str, Any]]:
    """The lines of a JSON log, each of which has to be what the schema says."""
    for line in log.split("\n")[:-1]:
        entry = json.loads(line)
        _validator.validate(entry)
        yield entry
