"""The daemon's own names in the file system: control socket, lock, pid file. Made at the start, removed at the end.

A cleaner of temporary files may remove them meanwhile. A reload and an upgrade bring them back, or are refused where that can't be
done: no command would find the daemon.

Whether an instance is running is what the lock says. A control socket that has lost its name does not say it.
"""

import os
from collections.abc import Callable
from typing import Any

from prefork import log
from prefork.daemon import Daemon
from prefork.errors import ConfigError, InUseError, NotPermittedError, RefusedError, explained
from prefork.ops import control, instances
from prefork.ops.control import Client
from prefork.system import pidfile
from prefork.system.pidfile import PidFile


def make(daemon: Daemon, obey: Callable[[Client, dict[str, Any]], None]) -> None:
    """Make them. Raises AddressError when a running daemon has them, ConfigError when the pid file can't be written."""
    conf = daemon.config
    if conf.control != "off":
        _open_control(daemon, obey)
    if conf.pid_file:
        daemon.pid_file = _write_pid_file(conf.pid_file)


def _write_pid_file(path: str) -> PidFile:
    try:
        return pidfile.write(path)
    except InUseError as error:
        raise InUseError(f"{error}: stop it, or name another path") from None


def _open_control(daemon: Daemon, obey: Callable[[Client, dict[str, Any]], None]) -> None:
    try:
        path = _control_path(daemon)
        daemon.lock = _lock(daemon, path)
        daemon.control = control.serve(path, daemon.selector, obey)
    except InUseError as error:
        raise InUseError(f"{error}: an instance named {daemon.name} is running, give this one another --name") from None
    except (OSError, ConfigError, NotPermittedError) as error:
        _let_go_of_the_lock(daemon)  # no command finds anything by that name
        reason = str(error)
        if isinstance(error, OSError):
            reason = (f"{error.filename}: " if error.filename else "") + explained(error, "give another path (control)")
        log.event("control_failed", reason=reason)


def _control_path(daemon: Daemon) -> str:
    return daemon.config.control or instances.default_path(daemon.name)


def _lock(daemon: Daemon, control_path: str) -> PidFile | None:
    """The lock; None where there is no place for it. Raises OSError when there is none for the control socket either."""
    os.stat(os.path.join(os.path.dirname(control_path), ""))
    try:
        path = instances.lock_path(control_path)
    except OSError as error:
        log.event("lock_failed", name=daemon.name, reason=explained(error, "have the control socket in a folder of its own"))
        return None
    return pidfile.write(path, mode=pidfile.LOCK_MODE, what="lock", other="control socket")


def restore(daemon: Daemon) -> None:
    """Bring back what was removed. Raises PreforkError when that can't be done."""
    try:
        if daemon.control is not None:
            _restore_control(daemon, daemon.control)
        if daemon.pid_file is not None and daemon.pid_file.is_swept:
            daemon.pid_file = _written_anew(daemon.pid_file, _write_pid_file(daemon.pid_file.path))
    except OSError as error:
        where = f"{error.filename} " if error.filename else ""
        why = explained(error, "make the folder again, or restart")
        raise RefusedError(f"{where}was removed while this daemon runs, and can't be made again: {why}") from None


def _restore_control(daemon: Daemon, server: control.ControlServer) -> None:
    is_swept, lock = server.is_swept, daemon.lock
    path = _control_path(daemon) if is_swept else server.path
    if lock is None or lock.is_swept:
        fresh = _lock(daemon, path)
        daemon.lock = fresh if lock is None or fresh is None else _written_anew(lock, fresh)
    if is_swept:
        server.listen_anew(path, daemon.now)
        log.event("name_restored", path=path)


def _written_anew(swept: PidFile, fresh: PidFile) -> PidFile:
    swept.remove()
    log.event("name_restored", path=fresh.path)
    return fresh


def _let_go_of_the_lock(daemon: Daemon) -> None:
    if daemon.lock is not None:
        daemon.lock.remove()
        daemon.lock = None


def remove(daemon: Daemon) -> None:
    """Remove what is still ours."""
    if daemon.control is not None:
        daemon.control.close()
    _let_go_of_the_lock(daemon)
    if daemon.pid_file is not None:
        daemon.pid_file.remove()
