"""Every setting: its default, its type, its help, its validation. The one place where an option is added.

A field of `Config` is an option: ``max_workers`` in the TOML file, ``--max-workers`` on the command line,
``PREFORK_MAX_WORKERS`` in the environment, ``max_workers=`` of `prefork.Server`. Command line and keywords beat environment beats
file beats default. What a value may be is `prefork.values`' business.

The file is flat TOML, at most 1 MB (tomllib took 6.6 s for 10 MB, and the master reads it at a reload while it should be
supervising). Parsing asks nobody and opens nothing but that file.
"""

import codecs
import difflib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from socket import AF_UNIX
from typing import Any

from prefork import values
from prefork.errors import ConfigError, explained
from prefork.net.address import INHERITED, UNRESOLVED, Address, Claims
from prefork.printable import counted
from prefork.system import program, readable

FILE_LIMIT = 1_000_000
# What `prefork init` writes, and what is suggested where no file is named.
FILE = "prefork.toml"
# What some editors put before UTF-8 text; TOML 1.1 has it ignored.
_BOM = "\ufeff"
# tomllib's time grows with the square of a dotted key's length: 32 KB of "a.a.a." took it 3 s. No option has a dotted key. What is
# quoted is one part, or part of a value; the end of it is optional, so that a search does not begin again inside.
_QUOTED = re.compile(rb"""\"(?:[^\"\\\n]|\\.)*+\"?|'[^'\n]*+'?""")
_DEEP_KEY = re.compile(rb"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){20}")
# A slot number has to fit in 32 bits on the wire; a machine's pid_max is at most 2**22.
WORKERS_LIMIT = 1 << 20
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
# The environment variables that Kubernetes and Docker make in each container for a service named prefork, or prefork-...: "service
# links". PREFORK_PORT is one with a URL only.
_SERVICE_LINK = re.compile(
    r"PREFORK_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)=.*|"
    r"PREFORK_(?:\w+_)?PORT=(?:tcp|udp|sctp)://.*",
    re.DOTALL,
)
# Words for an option that are not like its name.
OTHER_WORDS = {"port": "bind", "host": "bind", "listen": "bind", "address": "bind"}


def _same(value: Any, _folder: str = "") -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Option:
    """How an option is read, explained and shown.

    ``parse`` takes text or a TOML value and raises ValueError with what would be right; ``plain`` makes of a parsed value what
    TOML can say and ``parse`` takes back; ``resolve`` makes the paths in it absolute, given the working directory's name.
    """

    parse: Callable[[Any], Any]
    help: str
    metavar: str
    reloadable: bool = True
    short: str | None = None
    multiple: bool = False
    plain: Callable[[Any], Any] = _same
    resolve: Callable[[Any, str], Any] = _same
    words: tuple[str, ...] = ()  # that a path may be instead

    @property
    def choices(self) -> tuple[str, ...]:
        """All values that there are; none where they can't be listed."""
        return tuple(self.metavar.split("|")) if "|" in self.metavar else ()

    @property
    def has_paths(self) -> bool:
        """Whether its values may hold paths."""
        return self.resolve is not _same


def _option(default: Any, parse: Callable[[Any], Any], help: str, metavar: str, **more: Any) -> Any:  # noqa: A002 - click's word
    return field(default=default, metadata={"option": Option(parse, help, metavar, **more)})


def _seconds(default: float, help: str, parse: Callable[[Any], float] = values.seconds) -> Any:  # noqa: A002
    return _option(default, parse, help, "SECONDS")


def _path(default: str, help: str, *words: str, metavar: str = "PATH", reloadable: bool = True) -> Any:  # noqa: A002
    parse, resolve = values.path(*words), values.resolve_path(*words)
    return _option(default, parse, help, metavar, resolve=resolve, reloadable=reloadable, words=words)


def _target(help: str) -> Any:  # noqa: A002
    return _option("", values.target, help, "MODULE:ATTR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The effective configuration. Durations are seconds, sizes bytes. Made by `Sources.load`; every value has been validated.

    Empty text, no entries and None mean that an option was not given and has no default.
    """

    module: str = _target("The handler: MODULE:ATTR, imported with the working directory first on the path.")
    bind: tuple[Address, ...] = _option(
        (Address(2, "127.0.0.1", 7000),),
        values.addresses,
        "Where to listen: HOST:PORT, :PORT, [IPV6]:PORT, unix:/path?mode=0660&user=U&group=G, fd:N or systemd:NAME. "
        "Repeatable, up to 1,024 times; port 0 is a free port.",
        "ADDRESS",
        short="-b",
        multiple=True,
        plain=lambda value: [address.text for address in value],
        resolve=values.resolve_addresses,
    )
    workers: int = _option(
        8, values.whole(1, WORKERS_LIMIT), "Processes kept waiting in accept(), for each listener.", "N", short="-w"
    )
    max_workers: int = _option(
        256, values.whole(1, WORKERS_LIMIT), "Ceiling on worker processes of this daemon; at it, clients wait in the queue.", "N"
    )
    spare_timeout: float = _seconds(
        10.0, "Surplus acceptors that nobody has needed for so long, 0.1 s at least, are retired.", values.positive_seconds
    )
    backlog: int = _option(
        2048, values.whole(1, (1 << 31) - 1), "The listen queue (the kernel cuts it to net.core.somaxconn).", "N"
    )
    max_connections: int = _option(
        0, values.whole(0, 999_999_999), "Connections that a worker serves before it is recycled; 0 is no limit.", "N"
    )
    max_connections_jitter: int = _option(
        0, values.whole(0, 999_999_999), "A random 0 to N more of them, so that workers do not all go at once.", "N"
    )
    max_memory: int = _option(
        0,
        values.size,
        "A worker with a larger resident set (256M) is recycled after its connection; 0 is no limit.",
        "SIZE",
        plain=lambda value: values.size_text(value) if value else 0,
    )
    max_lifetime: float = _seconds(0.0, "A worker that is older is recycled after its connection; 0 is no limit.")
    timeout: float = _seconds(
        0.0, "A connection may take this long; then its stack is logged and its worker killed; 0 is no limit."
    )
    socket_timeout: float = _seconds(0.0, "sock.settimeout() for each connection; 0 is none.")
    boot_timeout: float = _seconds(
        60.0, "How long the handler's import and hooks, and a worker's start, may take.", values.positive_seconds
    )
    drain_timeout: float = _seconds(
        0.0, "How long workers retired by a reload, scaling or recycling may finish; 0 is as long as they take."
    )
    graceful_timeout: float = _seconds(30.0, "How long connections may finish at stop.")
    drain: str = _option(
        "finish",
        values.choice("finish", "eof"),
        "What a connection sees of its worker being asked to leave: nothing (finish), or the end of its input (eof).",
        "finish|eof",
    )
    canary: float = _seconds(
        0.0, "Crashes of new workers take a reload back for so long, and prefork reload waits for the end of it; 0 is not at all."
    )
    user: str = _option(
        "", values.account, "Who runs the handler: fork servers and workers give up root for good.", "USER", reloadable=False
    )
    group: str = _option("", values.account, "Their group; the user's own groups unless said.", "GROUP", reloadable=False)
    umask: int | None = _option(
        None,
        values.umask,
        "Their umask, octal; as started unless said.",
        "OCTAL",
        plain=lambda value: "" if value is None else f"{value:03o}",
    )
    chdir: str = _path("", "Their working directory, first on the import path; as started unless said.", metavar="DIR")
    nice: int = _option(0, values.whole(-39, 39), "How much nicer they are than the master (nice(2)); less than 0 takes root.", "N")
    scheduling: str = _option(
        "batch",
        values.choice("batch", "inherit"),
        "Workers' scheduling policy: batch (SCHED_BATCH: one that wakes interrupts nobody), or inherit, as prefork was started.",
        "batch|inherit",
    )
    rlimit: tuple[tuple[str, int], ...] = _option(
        (), values.rlimits, "Limits of each worker: nofile=1024,as=512M,cpu=60.", "LIMITS", plain=values.rlimits_text
    )
    nodelay: bool = _option(True, values.switch, "TCP_NODELAY: small answers are sent at once.", "on|off")
    keepalive: bool = _option(False, values.switch, "SO_KEEPALIVE: the kernel asks silent peers whether they live.", "on|off")
    shared_connections: str = _option(
        "refuse",
        values.choice("refuse", "allow"),
        "A connection that the import or on_boot leaves open, which all workers share: refuse it, or allow it.",
        "refuse|allow",
    )
    on_boot: str = _target("A hook: called once in the fork server, after the import.")
    on_worker_start: str = _target("A hook: called in each worker before it accepts.")
    on_worker_exit: str = _target("A hook: called in each worker that leaves.")
    name: str = _option("", values.name, "The instance's name; the handler's module unless said.", "NAME", reloadable=False)
    control: str = _option(
        "",
        values.socket_path,
        "Path of the control socket; off for none; in the runtime directory unless said.",
        "PATH",
        reloadable=False,
        resolve=values.resolve_socket_path,
        words=("off",),
    )
    pid_file: str = _path("", "Where the master's pid is written, for those who need it.", reloadable=False)
    log_level: str = _option(
        "info", values.choice(*LOG_LEVELS), f"The least that is logged: {', '.join(LOG_LEVELS)}.", "|".join(LOG_LEVELS)
    )
    log_format: str = _option(
        "text", values.choice(*LOG_FORMATS), "Lines for people (text) or for machines (json).", "|".join(LOG_FORMATS)
    )
    log_file: str = _path("stderr", "Where the log goes; SIGUSR1 opens the file again.", "stderr")
    access_log: str = _path("off", "A line for each connection, to a file or to the log (-).", "off", "-")

    @property
    def instance(self) -> str:
        """The instance's name."""
        return self.name or self.module.partition(":")[0]


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(Config)}
DEFAULTS = Config()


def flag(key: str) -> str:
    """The option's name on the command line."""
    return "--" + key.replace("_", "-")


def variable(key: str) -> str:
    """The option's name in the environment."""
    return "PREFORK_" + key.upper()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where settings are read from: kept by the master, so that a reload reads the same places again.

    ``keywords`` are those of `prefork.Server`; the command line has none, and it has no command line. Every path that is not
    absolute counts from ``folder``: the working directory by its name, which a deploy may give to another directory.
    """

    command_line: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""  # not known yet: where this process is

    def load(self) -> Config:
        """The effective configuration. Raises ConfigError naming key, value, place and remedy."""
        return self.trace()[0]

    def trace(self) -> tuple[Config, dict[str, str]]:
        """The effective configuration, and for each option that was given where it comes from.

        Raises ConfigError, which has a line for each mistake.
        """
        config, origins, mistakes = self.examine()
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        return config, origins

    def examine(self) -> tuple[Config, dict[str, str], list[str]]:
        """The same with all mistakes, in sentences; a value that can't be is not in it. Raises ConfigError for an unusable file."""
        parsed: dict[str, Any] = {}
        origins: dict[str, str] = {}
        mistakes: list[str] = []
        wrong: set[str] = set()
        for key, raw, place in self._given():
            try:
                parsed[key], origins[key] = _parse(key, raw, place, self.folder), place
            except ConfigError as error:
                mistakes.append(str(error))
                wrong.add(key)
        config = Config(**parsed)
        # Of a wrong value the default stands in `config`, which contradicts nothing that was given.
        mistakes += [text for keys, text in _contradictions(config, origins, self._ways_to_a_handler()) if wrong.isdisjoint(keys)]
        return config, origins, mistakes

    def _ways_to_a_handler(self) -> str:
        if self.file is None and os.path.isfile(os.path.join(self.folder, FILE)):
            return f"--config {FILE}, which is here, or MODULE:ATTR, like echo:loop"
        return _WAYS_TO_A_HANDLER

    def _given(self) -> Iterator[tuple[str, Any, str]]:
        """Everything that was given, the weakest first: key, value as it stands there, and where."""
        if self.file is not None:
            named = f" (named by {variable('config')})" if self.environment.get(variable("config")) == self.file else ""
            for key, raw in _read_file(os.path.join(self.folder, self.file), named).items():
                yield key, raw, f"in {self.file}"
        for key in OPTIONS:
            if (raw := self.environment.get(variable(key))) is not None:
                yield key, raw, f"in the environment ({variable(key)})"
        for key, raw in self.command_line.items():
            # The handler may stand there by itself.
            yield key, raw, "on the command line" if key == "module" else f"on the command line ({flag(key)})"
        for key, raw in self.keywords.items():
            yield key, raw, "of prefork.Server"


def _read_file(path: str, named: str) -> dict[str, Any]:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path}: can't read the configuration: not a regular file")
            data = os.read(fd, FILE_LIMIT + 1)
        finally:
            os.close(fd)
        if len(data) > FILE_LIMIT:
            raise ConfigError(f"{path}: larger than {FILE_LIMIT} bytes; a configuration is a few lines of TOML")
        if _DEEP_KEY.search(_QUOTED.sub(b"q", data)):
            raise ConfigError(f"{path}: a key of more than 20 parts; the configuration is flat: each option is a line of its own")
        import tomllib  # noqa: PLC0415 - 0.5 MB that each worker would have a copy of; most have no file

        return tomllib.loads(data.decode().removeprefix(_BOM))
    except OSError as error:
        hidden = readable.hidden_by(path)
        why = explained(error) if hidden is None else f"{error.strerror}: {hidden}"
        raise ConfigError(f"{path}{named}: can't read the configuration: {why}") from None
    except UnicodeDecodeError as error:
        is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        what = "UTF-16, not UTF-8" if is_utf_16 else f"not UTF-8 (byte {error.start})"
        raise ConfigError(f"{path}: {what}; TOML is UTF-8 text: save it as that") from None
    except ValueError as error:  # TOMLDecodeError is one; a number of thousands of digits is another
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; the configuration is flat") from None


def _parse(key: str, raw: Any, place: str, folder: str = "") -> Any:
    option = OPTIONS.get(key)
    if option is None:
        if isinstance(raw, dict):
            raise ConfigError(
                f"unknown option {key!r} {place}: the file is flat, without [tables]: each option is a line of its own"
            )
        near = _nearest(key)
        remedy = f"did you mean {near!r}?" if near else f"known are {', '.join(OPTIONS)}"
        raise ConfigError(f"unknown option {key!r} {place}: {remedy}")
    try:
        return option.resolve(option.parse(raw), folder)
    except ValueError as error:
        raise ConfigError(f"{key} = {_shown(raw)} {place}: {error}") from None


def _shown(raw: Any) -> str:
    try:
        text = repr(raw)
    except (ValueError, RecursionError):  # a number of thousands of digits, a table thousands deep
        return f"(a huge {type(raw).__name__})"
    return text if len(text) <= 200 else text[:200] + "..."


def check(config: Config, origins: Mapping[str, str]) -> None:
    """Raise ConfigError for values that are right by themselves and impossible together. ``origins``: as from `Sources.trace`."""
    if found := [text for _, text in _contradictions(config, origins)]:
        raise ConfigError("\n".join(found))


_WAYS_TO_A_HANDLER = "MODULE:ATTR, like echo:loop, or module in the configuration file"


def _contradictions(
    config: Config, origins: Mapping[str, str], ways_to_a_handler: str = _WAYS_TO_A_HANDLER
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong, and the options whose values make it so."""

    def given(key: str, text: object) -> str:
        return f"{key} = {text} ({origins.get(key, 'default')})"

    if not config.module:
        yield ("module",), f"no handler: give {ways_to_a_handler}"
    least = config.workers * len(config.bind)
    if config.max_workers < least:
        yield (
            ("max_workers", "workers", "bind"),
            f"{given('max_workers', config.max_workers)} is less than {given('workers', config.workers)} x "
            f"{counted(len(config.bind), 'listener', 'listeners')}: raise max_workers to at least {least}, or lower workers",
        )
    if config.max_connections_jitter and not config.max_connections:
        yield (
            ("max_connections_jitter", "max_connections"),
            f"{given('max_connections_jitter', config.max_connections_jitter)} adds to max_connections, which is not set: set it, "
            "or drop the jitter",
        )
    unix = [str(address) for address in config.bind if address.family == AF_UNIX]
    if config.drain == "eof" and unix:
        yield (
            ("drain", "bind"),
            f"{given('drain', config.drain)} does not work for {unix[0]}: on a Unix socket the client's next send fails at once; "
            "listen on TCP, or take drain = finish",
        )
    taken: dict[str, str] = {}
    for key, path in made(config):
        if path in taken and {key, taken[path]} != {"log_file", "access_log"}:
            yield (key, taken[path]), f"{given(key, path)} is the path of {taken[path]}, too: give it another one"
        taken[path] = key


def made(config: Config) -> Iterator[tuple[str, str]]:
    """The files and sockets that the daemon makes."""
    yield from (("bind", address.host) for address in config.bind if address.family == AF_UNIX)
    files = ("control", "pid_file", "log_file", "access_log")
    yield from ((key, path) for key in files if (path := getattr(config, key)).startswith("/"))


@dataclass(frozen=True, slots=True)
class Activated:
    """A socket that a service manager has passed: its name, our descriptor, and where it listens (None: it does not).

    ``by``: who has passed it, for messages.
    """

    name: str
    fd: int
    address: Address | None
    by: str

    @property
    def inherited(self) -> Address:
        """As an entry of ``bind``."""
        return Address(INHERITED, f"systemd:{self.name}", self.fd)


def with_activated(config: Config, origins: Mapping[str, str], sockets: Sequence[Activated]) -> Config:
    """The configuration with the sockets that a service manager has passed.

    ``systemd:NAME`` stands for each of that name, and an address for each that listens there; when no ``bind`` was given anywhere,
    all of them are used. Raises ConfigError.
    """
    if not sockets and not any(address.port == UNRESOLVED for address in config.bind):
        return config
    found: list[Address] = []
    for address in config.bind if "bind" in origins else ():
        passed = [socket.inherited for socket in sockets if _is_meant(socket, address)]
        if not passed and address.port == UNRESOLVED:
            names = ", ".join(sorted({socket.name for socket in sockets}))
            there = f"it has passed {names}" if names else "it has passed none: is there a .socket unit?"
            raise ConfigError(f"bind = {address}: the service manager has passed no socket of that name; {there}")
        if not passed:
            _refuse_collision(address, sockets)
        found += [one for one in passed or [address] if one not in found]
    if "bind" not in origins:
        # Those of one name side by side.
        first = {socket.name: place for place, socket in reversed(list(enumerate(sockets)))}
        found = [socket.inherited for socket in sorted(sockets, key=lambda socket: first[socket.name])]
    config = replace(config, bind=tuple(found))
    check(config, origins)
    return config


def _is_meant(socket: Activated, address: Address) -> bool:
    """Whether an entry of ``bind`` names that socket, or where it listens."""
    if address.port == UNRESOLVED:
        return address.host == socket.inherited.host
    return socket.address is not None and socket.address.place == address.place


def _refuse_collision(address: Address, sockets: Sequence[Activated]) -> None:
    """Raise ConfigError for an address that can't be bound beside those that were passed."""
    for socket in sockets:
        claims = Claims()
        if socket.address is not None:
            claims.add(socket.address)
        if claims.add(address) is not None:
            raise ConfigError(
                f"bind = {address} can't be bound: {socket.address} was passed by {socket.by}, which holds it: give that address, "
                f"or systemd:{socket.name}, or no bind"
            )


def abandoned(before: Config, after: Config, sockets: Iterable[Activated]) -> str | None:
    """Which passed socket would not be accepted from any more, in a sentence; None when there is none such."""
    kept = {address.port for address in after.bind if address.family == INHERITED}
    used = {address.port for address in before.bind if address.family == INHERITED} - kept
    for socket in sockets:
        if socket.fd in used:
            return (
                f"bind = {', '.join(map(str, after.bind))} leaves out {socket.address}, which was passed by {socket.by}: its "
                f"clients would wait for ever; keep systemd:{socket.name} in bind, or stop the .socket unit and restart the service"
            )
    return None


def document(config: Config, notes: Mapping[str, str]) -> str:
    """The configuration as TOML that `Sources` reads back: each option with its note above it.

    An option that was not given and has no default stands there in a comment.
    """
    lines: list[str] = []
    for key, option in OPTIONS.items():
        value = option.plain(getattr(config, key))
        line = f'#{key} = "{option.metavar}"' if is_unset(config, key) else f"{key} = {_toml(value)}"
        lines += [f"# {_one_line(notes[key])}", line, ""]
    return "\n".join(lines)


def plain(config: Config) -> dict[str, Any]:
    """The options that differ from their defaults, as JSON can say them; `restored` takes them back. Without ``bind``."""
    return {
        key: option.plain(getattr(config, key))
        for key, option in OPTIONS.items()
        if key != "bind" and getattr(config, key) != getattr(DEFAULTS, key)
    }


def restored(given: Mapping[str, Any], bind: tuple[Address, ...]) -> Config:
    """The configuration that another version of this program had; options that this one does not know are left out.

    Raises ConfigError.
    """
    known = {key: _parse(key, raw, "in the state") for key, raw in given.items() if key in OPTIONS and key != "bind"}
    return Config(bind=bind, **known)


def is_unset(config: Config, key: str) -> bool:
    """Whether an option was not given and has no default."""
    return OPTIONS[key].plain(getattr(config, key)) in ("", [], None)


def _one_line(note: str) -> str:
    # A file's name may hold anything, a line break too.
    return note if note.isprintable() else repr(note)[1:-1]


def _toml(plain: Any) -> str:
    if isinstance(plain, list):
        return f"[{', '.join(map(_toml, plain))}]"
    if isinstance(plain, float):
        return values.seconds_text(plain)
    # A JSON string is a TOML string but for DEL, which TOML wants escaped; numbers, true and false are the same. What else can't be
    # printed is escaped for the terminal that `prefork check` writes to.
    return "".join(c if c.isprintable() else _escaped(c) for c in json.dumps(plain, ensure_ascii=False))


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def needs_restart(old: Config, new: Config) -> str | None:
    """What a reload can't change and that differs, in a sentence; None when a reload will do."""
    for key, option in OPTIONS.items():
        before, after = getattr(old, key), getattr(new, key)
        if not option.reloadable and before != after:
            return f"{key} = {after!r} was {before!r} at the start: that needs a restart"
    return None


def unknown_variables(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names in the environment that look like options and are none, each with what may have been meant."""
    known = [variable(key) for key in (*OPTIONS, "config")]
    for name, value in variables.items():
        if name not in known and not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            near = _nearest(name.removeprefix("PREFORK_").lower(), "config")
            yield name, f"did you mean {variable(near)}?" if near else "prefork serve --help shows all"


def _nearest(word: str, *others: str) -> str | None:
    """The option that may have been meant, if any is like it."""
    near = [OTHER_WORDS[word]] if word in OTHER_WORDS else difflib.get_close_matches(word, [*OPTIONS, *others], 1)
    return near[0] if near else None


def environment() -> dict[str, str]:
    """The part of this process's environment that is configuration."""
    return {key: value for key, value in os.environ.items() if key.startswith("PREFORK_") and key != program.VARIABLE}


def reference() -> str:
    """Every option with its default, as the file conf/prefork.toml has it: ``python -m prefork.config > conf/prefork.toml``."""
    notes = {key: option.help + ("" if option.reloadable else " Needs a restart.") for key, option in OPTIONS.items()}
    head = (
        "# Every option of prefork with its default; one that has none stands in a comment. `prefork check` shows what holds.\n\n"
    )
    return head + document(Config(module="echo:loop"), notes)


if __name__ == "__main__":
    sys.stdout.write(reference())
