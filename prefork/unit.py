"""The systemd units: the files in systemd/ and what ``prefork unit`` prints are made here, of the same text.

``python -m prefork.unit systemd`` writes the former. Facts about systemd are from systemd.exec(5), systemd.service(5),
systemd.socket(5) and runs of systemd 252.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from socket import AF_INET6, AF_UNIX

from prefork.config import DEFAULTS, OPTIONS, Config, Sources, flag, variable
from prefork.errors import RefusedError
from prefork.net.address import INHERITED, Address
from prefork.system import process
from prefork.system.program import started

# What a stop may take beyond graceful_timeout: three tries at ending those whom SIGKILL has not ended, and the end itself.
STOP_MARGIN = 10
# Ports below are root's (net.ipv4.ip_unprivileged_port_start).
FIRST_FREE_PORT = 1024
# What ProtectHome= and PrivateTmp= hide.
HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # noqa: S108 - only compared with
FOLDER = "/etc/systemd/system"
# With a `user` of its own for the handler the master is root, with no more than it needs: to become that user, to signal what runs
# as it, and to give it the log files. Files that are others' it can neither read nor write where their modes do not let it.
MASTERS = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN")
_ROOT = ("root", "0")
LOW_PORTS = "CAP_NET_BIND_SERVICE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is filled in. ``instance`` is a name, or ``%i``; ``unit`` the file's name without its suffix."""

    unit: str
    instance: str
    program: tuple[str, ...]  # that runs prefork's commands
    arguments: tuple[str, ...]  # of its serve
    conf: Config = DEFAULTS
    folder: str = ""  # where it runs
    paired: bool = False  # the service can't do without its socket


TEMPLATE = Unit(
    unit="prefork@",
    instance="%i",
    program=("/opt/prefork/venv/bin/prefork",),
    arguments=("--config", "/etc/prefork/%i.toml", "--name", "%i"),
)
PLAIN = Unit(
    unit="prefork",
    instance="prefork",
    program=TEMPLATE.program,
    arguments=("--config", "/etc/prefork/prefork.toml", "--name", "prefork"),
)


def service(unit: Unit) -> str:
    """The .service file."""
    conf = unit.conf
    program = " ".join(map(_quoted, unit.program))
    start = f"{program} serve {' '.join(map(_quoted, unit.arguments))}"
    control = conf.control or f"/run/prefork/{unit.instance}/{unit.instance}.sock"
    reload = f"{program} reload --control {_quoted(control)}" if control != "off" else "kill -HUP $MAINPID"
    low_ports = [] if unit.paired or not any(map(_needs_privilege, conf.bind)) else [LOW_PORTS]
    place = _working_directory(unit.folder)
    walls = _two_users(unit, low_ports) if conf.user not in ("", *_ROOT) else _one_user(unit, low_ports)
    # What a socket unit passes is asked for by name; without one its addresses are bound here.
    needs = f"Requires={unit.unit}.socket\nAfter={unit.unit}.socket\n" if unit.paired else ""
    return f"""\
[Unit]
Description=prefork: {unit.instance}
After=network.target
{needs}# A crash, or an address that is taken, is tried again every second for ever; a socket unit starts the service at once for
# whoever waits. 11 starts in 10 s are what the first never comes to, and where the second ends if a start can't succeed.
StartLimitIntervalSec=10
StartLimitBurst=11

[Service]
# And not notify-reload (systemd 253), for which a refused reload has ended like any other: ExecReload= waits, and fails.
Type=notify
NotifyAccess=main
ExecStart={start}
ExecReload={reload}
{place}{walls.who}\
# Each instance has a directory of its own there: one that stops must not take the others' sockets away.
RuntimeDirectory=prefork/{unit.instance}
{walls.state}
LogsDirectory=prefork/{unit.instance}

# What a restart does not mend: usage (2), no permission (77), a configuration or handler that is unusable (78).
Restart=on-failure
RestartSec=1
RestartPreventExitStatus=2 77 78
# The master feeds it from its main loop.
WatchdogSec=30
# boot_timeout for the import and once more for the first workers; graceful_timeout. Where the configuration has longer ones the
# daemon asks for more time.
TimeoutStartSec={_seconds(2 * conf.boot_timeout + conf.canary + STOP_MARGIN)}
TimeoutStopSec={_seconds(conf.graceful_timeout + STOP_MARGIN)}
# The master alone hears of a stop and lets connections finish. If it is killed they are, too.
KillMode=mixed
# A worker that is killed for memory is replaced.
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=65536

{walls.capabilities}
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateMounts=yes
DevicePolicy=closed
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProcSubset=pid
PrivateIPC=yes
RemoveIPC=yes
KeyringMode=private
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallArchitectures=native
SystemCallFilter=@system-service
# @resources stays: nice and rlimit need it.
SystemCallFilter=~@privileged
{walls.calls}\
# And not SIGSYS: a handler's library that asks for more is told so, and goes on.
SystemCallErrorNumber=EPERM
UMask=0077

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class _Walls:
    """The lines in which a service of one user and one of two differ."""

    who: str
    state: str
    capabilities: str
    calls: str


def _one_user(unit: Unit, capabilities: list[str]) -> _Walls:
    """Master and handler are the same user, without any privilege."""
    conf = unit.conf
    who = f"User={conf.user}\n" if conf.user else "DynamicUser=yes\n"
    both = " ".join(capabilities)
    return _Walls(
        who=f"# To keep the handler from the master: prefork unit --user USER.\n{who}"
        + (f"Group={conf.group}\n" if conf.group else ""),
        state=f"StateDirectory=prefork/{unit.instance}",
        capabilities=f"""\
# To bind a port below {FIRST_FREE_PORT} without the socket unit both are {LOW_PORTS}; with SystemCallFilter=capset after
# the others handlers do not have it, and the master alone keeps it.
CapabilityBoundingSet={both}
AmbientCapabilities={both}""",
        calls="# By which fork servers lose the capability before they import the handler.\nSystemCallFilter=capset\n"
        if both
        else "",
    )


def _two_users(unit: Unit, capabilities: list[str]) -> _Walls:
    """The master is root, and the handler the configuration's user, who can't reach it."""
    return _Walls(
        who=f"# The master is root, shut in as below; fork servers and workers are {unit.conf.user}, for good.\n",
        # systemd would give it to root, recursively, at each start.
        state=f"""\
# The handler's own, if there is one: install -d -o {unit.conf.user} /var/lib/prefork/{unit.instance}
ReadWritePaths=-/var/lib/prefork/{unit.instance}""",
        capabilities=f"""\
# To become the user, to signal its processes, to give it the log files. To bind a port below {FIRST_FREE_PORT} without the socket
# unit also {LOW_PORTS}.
CapabilityBoundingSet={" ".join([*MASTERS, *capabilities])}
AmbientCapabilities=""",
        calls="SystemCallFilter=@setuid @chown\n",
    )


def socket_unit(unit: Unit) -> str:
    """The .socket file. Raises RefusedError for addresses that one can't have."""
    lines = "\n".join(_socket_lines(unit.conf))
    unbound = (
        "" if unit.paired else "# The service takes it; a `bind` in its configuration gives the same address, or is left out.\n"
    )
    return f"""\
[Unit]
Description=Sockets of prefork: {unit.instance}

[Socket]
# Stays open while the service restarts: clients wait in its queue.
{unbound}{lines}
FileDescriptorName={unit.instance}
Backlog={unit.conf.backlog}

[Install]
WantedBy=sockets.target
"""


def _socket_lines(conf: Config) -> Iterator[str]:
    for address in conf.bind:
        if address.family == INHERITED:
            raise RefusedError(
                f"bind = {address}: who passes that socket knows its address: give the address itself (--bind), or --no-socket"
            )
        if address.family != AF_UNIX and address.port == 0:
            raise RefusedError(f"bind = {address}: a socket unit needs a port, not 0: give one (--bind), or --no-socket")
        yield f"ListenStream={_listen_stream(address).replace('%', '%%')}"
    six = [address for address in conf.bind if address.family == AF_INET6]
    if len({address.host == "" for address in six}) > 1:
        raise RefusedError("bind: a socket unit can't have both IPv6 alone and IPv4 with it: give one of them, or --no-socket")
    if six:
        yield f"BindIPv6Only={'both' if six[0].host == '' else 'ipv6-only'}"
    unix = [address for address in conf.bind if address.family == AF_UNIX]
    if len({(address.mode, address.user, address.group) for address in unix}) > 1:
        raise RefusedError(
            "bind: the Unix sockets of one socket unit have the same mode, user and group: make it so, or --no-socket"
        )
    if unix:
        yield f"SocketMode={unix[0].mode:04o}"
        yield from (f"Socket{key}={value}" for key, value in (("User", unix[0].user), ("Group", unix[0].group)) if value)
        yield "RemoveOnStop=yes"


def _listen_stream(address: Address) -> str:
    if address.family == AF_INET6 and address.host == "":
        return f"[::]:{address.port}"
    if address.family == AF_INET6 and "%" in address.host:  # systemd.socket(5) has the interface last
        host, _, interface = address.host.partition("%")
        return f"[{host}]:{address.port}%{interface}"
    return address.host if address.family == AF_UNIX else str(address)


def _needs_privilege(address: Address) -> bool:
    return address.family not in (AF_UNIX, INHERITED) and 0 < address.port < FIRST_FREE_PORT


def _seconds(value: float) -> str:
    return f"{value:g}"


def _working_directory(folder: str) -> str:
    """The lines; systemd enters a link's target and tells nobody the link's name, as a shell does by PWD."""
    text = folder.replace("%", "%%")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    name = f'# A link, and what it names may change: a reload follows.\nEnvironment="PWD={quoted}"\n'
    return (f"WorkingDirectory={text}\n" + (name if os.path.realpath(folder) != folder else "")) if folder else ""


def _quoted(word: str) -> str:
    """A word of a command line (systemd.service(5)): quoted where need be, % and $ doubled, but for our own specifier."""
    text = re.sub("%(?!i\\b)", "%%", word).replace("$", "$$")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$?&\[\]-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# -- prefork unit


def units(sources: Sources, *, with_socket: bool) -> str:
    """A service, and its socket, for what ``prefork serve`` would do with this configuration, here. Raises PreforkError."""
    sources = _here(sources)
    conf = sources.load()
    name = conf.instance
    filled = Unit(
        unit=f"prefork@{name}",
        instance=name,
        program=_program(),
        arguments=tuple(_arguments(sources, name, with_socket=with_socket)),
        conf=conf,
        folder=_folder(sources, conf),
        paired=with_socket,
    )
    parts = [("service", service(filled)), *([("socket", socket_unit(filled))] if with_socket else [])]
    return "\n".join(f"# {FOLDER}/{filled.unit}.{kind}\n{text}" for kind, text in parts)


def hidden(sources: Sources) -> list[str]:
    """What such a service needs and can't see, by its name or by what that stands for."""
    sources = _here(sources)
    conf = sources.load()
    needed = [*_program(), sources.file or "", _folder(sources, conf), conf.chdir]
    paths = [path for path in needed if path.startswith("/")]
    return [path for path in paths if f"{path}/".startswith(HIDDEN) or f"{os.path.realpath(path)}/".startswith(HIDDEN)]


def _here(sources: Sources) -> Sources:
    """With every path as it is named here: the service is started elsewhere."""
    folder = process.working_directory()
    file = None if sources.file is None else os.path.join(folder, sources.file)
    return replace(sources, file=file, folder=folder)


def _program() -> tuple[str, ...]:
    """The words that run this program again."""
    how = started("unit")
    if how is None:
        return sys.executable, "-m", "prefork"
    if len(how.prefix) == 1 and os.access(how.prefix[0], os.X_OK):
        return how.prefix
    return how.executable, *how.prefix


def _arguments(sources: Sources, name: str, *, with_socket: bool) -> Iterator[str]:
    """What was given here, for a command line: the environment is another one there."""
    if sources.file is not None:
        yield f"--config={sources.file}"
    given = {key: raw for key in OPTIONS if (raw := sources.environment.get(variable(key))) is not None}
    for key, raw in {**given, **sources.command_line, "name": name}.items():
        if key == "bind" and with_socket:
            continue
        option = OPTIONS[key]
        if option.has_paths:
            raw = option.plain(option.resolve(option.parse(raw), sources.folder))  # noqa: PLW2901
        several = raw.split(",") if option.multiple and isinstance(raw, str) else [raw]
        yield from (f"{flag(key)}={one}" for one in (raw if isinstance(raw, list) else several))
    if with_socket:
        yield f"{flag('bind')}=systemd:{name}"


def _folder(sources: Sources, conf: Config) -> str:
    """Where the service has to run to find the handler, and what its file names by relative paths; empty when that is not here."""
    module = conf.module.partition(":")[0].partition(".")[0]
    is_here = any(os.path.exists(path) for path in (f"{module}.py", module))
    is_relative = sources.file is not None and replace(sources, folder=f"{sources.folder}/.").load() != conf
    return sources.folder if is_relative or (is_here and not conf.chdir) else ""


def files() -> dict[str, str]:
    """The files in systemd/, by their names."""
    found: dict[str, str] = {}
    for unit in (PLAIN, TEMPLATE):
        found |= {f"{unit.unit}.service": service(unit), f"{unit.unit}.socket": socket_unit(unit)}
    return found


if __name__ == "__main__":
    for file_name, text in files().items():
        Path(sys.argv[1], file_name).write_text(text)
