"""`prefork check`: what `prefork serve` would make of a configuration. Validates it, imports the handler, and shows what holds.

The import happens in a child that is made like a fork server, so that it finds what it would find there, and can do here
whatever it likes: exit, crash, hang, fork. What it prints comes through a pipe: the import may run as another user, and has no
descriptor of the terminal that root has typed this on. What this must not do: bind, write a file, call a hook unless asked to,
leave a process behind.
"""

import codecs
import contextlib
import faulthandler
import gc
import os
import select
import signal
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

from prefork import __version__, carried, forkserver, handler, log, request
from prefork.carried import State
from prefork.config import (
    OPTIONS,
    Activated,
    Config,
    Sources,
    abandoned,
    document,
    is_unset,
    made,
    needs_restart,
    restored,
    with_activated,
)
from prefork.errors import ConfigError, HandlerError, PreforkError
from prefork.log import records
from prefork.net import left_open
from prefork.net.address import INHERITED, Address
from prefork.ops import instances
from prefork.printable import printable
from prefork.system import credentials, finalizers, limits, originals, process, program, signals, stacks, systemd
from prefork.system.credentials import Credentials

# Asked where it is, a process that hangs says so at once, or never (it may have blocked every signal).
LAST_WORDS = 1.0
# poll(2) takes at most 2**31 milliseconds, and boot_timeout may be longer.
LONGEST_POLL = 86400.0
# Of what the import's process has left for us; the import can make it as large as it likes.
SAID_LIMIT = 1 << 18
_WHERE = signal.SIGRTMIN + 2
# What the import's process has begun, said before it: each hook that it calls, by its label, and at last what the import has
# registered for the end. What was registered and started follows this, a line each.
_DONE = "imported"
# What a pipe holds (pipe(7)): as much may still be there when the import and all that it has started have ended.
_PIPE = 65536


def check(sources: Sources, state: bytes | None = None, *, call_hooks: bool = False) -> str:
    """The effective configuration as TOML, each value with where it came from. Raises PreforkError, with all mistakes at once.

    The handler is imported unless the configuration has values that can't be. With the ``state`` of a running daemon, whether this
    program could go on where that one is, too, which is proved to it at the end. Raises StateError.
    """
    running = carried.read(state) if state is not None else None
    folder = running.wiring.folder if running is not None else process.working_directory()
    program.resolve_python_path(folder)
    config, origins, mistakes = replace(sources, folder=folder).examine()
    if running is not None and not mistakes:
        _refuse_restart(running, config, origins)
    errors: list[PreforkError] = [*map(ConfigError, mistakes), *_caught(_of_this_machine(config))]
    if running is None:  # its files are open
        errors += map(ConfigError, _missing_folders(config, origins))
    found: list[str] = []
    try:
        who = credentials.wanted(config.user, config.group)
        if not mistakes:
            found = _try_import(config, who, folder, call_hooks=call_hooks)
    except PreforkError as error:
        errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else ConfigError("\n".join(map(str, errors)))
    notes = {
        key: origins.get(key) or (f"not set: {option.help}" if is_unset(config, key) else "default")
        for key, option in OPTIONS.items()
    }
    if running is not None:
        program.answer(running.upgrade.token)
    noted = "".join(f"# {line}\n" for line in found)
    called = f" Called were {', '.join(_labels(config))}." if call_hooks and _labels(config) else ""
    return f"# What prefork {__version__} serves with. {config.module} can be imported.{called}\n{noted}\n{document(config, notes)}"


def _of_this_machine(config: Config) -> Iterator[Callable[[], object]]:
    """What raises PreforkError where a value is wrong here."""
    for address in config.bind:
        if address.family == socket.AF_UNIX:
            yield partial(instances.refuse_mistakable, address.host)
        if address.user:
            yield partial(credentials.uid_of, address.user)
        if address.group:
            yield partial(credentials.gid_of, address.group)


def _caught(calls: Iterator[Callable[[], object]]) -> Iterator[PreforkError]:
    for call in calls:
        try:
            call()
        except PreforkError as error:
            yield error


def _missing_folders(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """Of what the daemon makes, that for which there is no folder. One below /run is a service manager's to make at the start."""
    for key, path in made(config):
        folder = os.path.dirname(path)
        try:
            is_there = stat.S_ISDIR(os.stat(folder).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            is_there = os.path.realpath(folder).startswith("/run/")
        except OSError:  # not for this user to see, and perhaps for the daemon's
            continue
        if not is_there:
            by_unit = " (a unit's LogsDirectory= does, at its first start)" if folder.startswith("/var/log/prefork/") else ""
            yield f"{key} = {path!r} {origins[key]}: {folder} is no directory: make it{by_unit}, or give another path"


def _labels(config: Config) -> list[str]:
    """The hooks as their user wrote them, in the order in which they are called."""
    return [f"{option} = {hook}" for option in handler.HOOKS if (hook := getattr(config, option))]


def _listens_at(running: State, fd: int) -> Address | None:
    """Where a socket listens that was passed to the daemon, and not to us; None when the daemon does not use it."""
    inherited = (each for each in running.listeners if each.configured.family == INHERITED and each.configured.port == fd)
    return next((each.address for each in inherited), None)


def _refuse_restart(running: State, config: Config, origins: Mapping[str, str]) -> None:
    # All are tried: the program that goes on has to understand every one.
    current, *_ = [restored(generation.config, config.bind) for generation in running.generations]
    by = limits.socket_unit(os.environ)
    sockets = [Activated(name, fd, _listens_at(running, fd), by) for name, fd in running.activated]
    bound = replace(current, bind=tuple(running.listeners[place].configured for place in running.current_listeners))
    changed = needs_restart(current, config) or abandoned(bound, with_activated(config, origins, sockets), sockets)
    if changed is not None:
        raise ConfigError(changed)


def _try_import(config: Config, who: Credentials | None, folder: str, *, call_hooks: bool) -> list[str]:
    """Import the handler and its hooks in a child; no process is left when this returns. Raises HandlerError.

    Returns what the import has registered for the end and started, in sentences.
    """
    outcome = os.memfd_create("outcome")
    printed, printing = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(printed, False)
    # Whoever the import starts becomes our child once its own parent has ended. Children that we have had before the exec of
    # this program are somebody else's.
    process.become_subreaper()
    strangers = process.children()
    for signo in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signo, signal.default_int_handler)  # so that the clean-up below is done
    with signals.blocked():
        us = os.getpid()
        pid = os.fork()
        if pid == 0:
            _import_and_exit(config, who, folder, us, outcome, printing, call_hooks=call_hooks)
    os.close(printing)
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    try:
        status = _wait(pid, config.boot_timeout, printed, decoder)
    finally:
        _end_all_but(strangers)
        _take(printed, decoder, last=True)
        os.close(printed)
    try:
        said = os.pread(outcome, min(os.fstat(outcome).st_size, SAID_LIMIT), 0)
    finally:
        os.close(outcome)
    begun, text = _last_begun(said.decode(errors="replace"), [*(_labels(config) if call_hooks else ()), _DONE])
    if status is None:
        what = "what the import has registered for the end" if begun == _DONE else begun
        late = f"{config.module}: {what} has not ended after boot_timeout = {config.boot_timeout:g} s"
        raise HandlerError(late + _where(text))
    crash = ""
    if os.WIFSIGNALED(status):
        text, mark, stack = text.partition(stacks.CRASH.decode())
        crash = mark + stack
    if (not text and begun != _DONE) or (crash and begun == _DONE):
        what = "what the import has registered for the end" if begun == _DONE else begun
        where = "\n" + stacks.without_ours(crash) if crash else ""
        raise HandlerError(f"{config.module}: {what} ended its process: {process.describe(status)}{where}")
    if begun != _DONE or "\0" in text:  # the import has written there, too
        raise HandlerError(text)
    return printable(text).splitlines()


def _last_begun(said: str, steps: Sequence[str]) -> tuple[str, str]:
    """Which of these the child has said last that it begins, and what it has said since."""
    begun = "the import"
    for step in steps:
        if not said.startswith(f"{step}\0"):
            break
        begun, said = step, said.removeprefix(f"{step}\0")
    return begun, said


def _wait(pid: int, seconds: float, printed: int, decoder: codecs.IncrementalDecoder) -> int | None:
    """The wait status of our child; None when it has not ended in time, and was asked where it is."""
    ended = os.pidfd_open(pid)
    try:
        if _listen(ended, seconds, printed, decoder):
            return os.waitpid(pid, 0)[1]
        os.kill(pid, _WHERE)
        _listen(ended, LAST_WORDS, printed, decoder)
    finally:
        os.close(ended)
    return None


def _listen(ended: int, seconds: float, printed: int, decoder: codecs.IncrementalDecoder) -> bool:
    """Pass on what the import prints until it has ended. False when it has not in time, whatever it still prints."""
    deadline = time.monotonic() + seconds
    watched = select.poll()
    for fd in (ended, printed):
        watched.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in watched.poll(1000 * min(LONGEST_POLL, max(0.0, deadline - time.monotonic())))}
        if ended in ready:
            return True
        if time.monotonic() >= deadline:
            return False
        if printed in ready and not _take(printed, decoder):
            watched.unregister(printed)  # it has closed its standard streams


def _take(printed: int, decoder: codecs.IncrementalDecoder, *, last: bool = False) -> bool:
    """Pass on what has come. False at the end of it, and when nothing has."""
    try:
        data = os.read(printed, _PIPE)
    except BlockingIOError:
        data = b""
    with contextlib.suppress(OSError):  # as if the import had found its standard error full, or closed
        os.write(2, printable(decoder.decode(data, last)).encode())
    return data != b""


def _end_all_but(strangers: set[int]) -> None:
    """Kill and reap our other children, and theirs, who become ours."""
    while ours := process.children() - strangers:
        for pid in ours:
            if not process.signal_child(pid, signal.SIGKILL):
                strangers.add(pid)  # it runs as another user by now
                continue
            os.waitpid(pid, 0)


def _where(text: str) -> str:
    """The frames of user code in what faulthandler wrote, which begins with the innermost one. Nothing before the import."""
    frames: list[str] = []
    for line in text.splitlines():
        if handler.__file__ in line or finalizers.__file__ in line:
            return "; it was here (most recent call first)\n" + "\n".join(frames) if frames else ""
        if line.startswith("  File ") and "importlib" not in line:
            frames.append(line)
    return ""


# -- in the child


def _import_and_exit(
    config: Config, who: Credentials | None, folder: str, parent: int, outcome: int, printing: int, *, call_hooks: bool
) -> NoReturn:
    """Be what `prefork.forkserver` is until its handler is imported. Called with all signals blocked; never returns."""
    us = os.getpid()
    status = PreforkError.exit_code
    try:
        _become_like_a_fork_server(parent, outcome, printing)
        try:
            forkserver.settle(config, who, folder)
            _end_with(parent)  # once more: the kernel has forgotten it if credentials have changed
            sockets, mapped = left_open.sockets(), handler.files_in_memory(config)
            records.install(log.Level[config.log_level.upper()])
            loaded = handler.load(config)
            call = partial(_call, loaded.hooks if call_hooks else {}, us, outcome, config.module)
            call("on_boot")
            if loaded.shape is handler.Shape.SERVER:
                binding = partial(request.bind, loaded.call, *request.name_at(config.bind[0]))
                handler.run(f"{config.module}: {request.BINDING}", binding)
            handler.refuse_threads(config.module)
            left = handler.refuse_connections(config, sockets)
            if left.listening:
                _warn(f"{config.module}: the import opens listening sockets, which every worker has: {', '.join(left.listening)}")
            if left.event_loops:
                _warn(
                    f"{config.module}: the import makes event loops (epoll: {', '.join(left.event_loops)}), which wake each worker "
                    "for the others' clients, too, unless their library renews them after a fork: make them in on_worker_start"
                )
            gc.collect()  # as a fork server does
            handler.refuse_size(config, mapped)
            said = ""
        except PreforkError as error:
            said = str(error)
        if os.getpid() == us:  # and no child that the import forked and that has come back here
            aside, started = finalizers.set_aside(_exit_failed), process.started_by_us()
            if not said:
                try:
                    call("on_worker_start")
                    call("on_worker_exit")
                except HandlerError as error:
                    said = str(error)
            found = _for_the_end(aside.registered, started.values())
            _say(outcome, said or f"{_DONE}\0{found}", config.module)
            forkserver.finish_import(aside, started, _exit_failed)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _exit_failed(_what: str) -> None:
    traceback.print_exc()


def _become_like_a_fork_server(parent: int, outcome: int, printing: int) -> None:
    os.setsid()
    signals.fresh()
    systemd.forget(os.environ)
    _end_with(parent)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    for number in (1, 2):  # standard output is for the configuration
        os.dup2(printing, number)
    process.close_all_but({0, 1, 2, outcome})
    finalizers.begin()
    os.register_at_fork(after_in_parent=_count_fork, after_in_child=stacks.be_silent)
    # The default action follows, which ends the process.
    faulthandler.register(_WHERE, file=outcome, all_threads=False, chain=True)
    stacks.tell_of_import(outcome)
    signals.watch()
    originals.keep()
    signals.unblock()


def _end_with(parent: int) -> None:
    process.signal_when_orphaned(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _call(hooks: Mapping[str, handler.Hook], us: int, outcome: int, module: str, option: str) -> None:
    """Call a hook, if there is one. Raises HandlerError. A child that the hook forks ends here, as in a worker."""
    if (hook := hooks.get(option)) is not None:
        _write(outcome, f"{hook.label}\0", module)
        try:
            handler.run(hook.label, hook.call)
        finally:
            if os.getpid() != us:
                os._exit(0)


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


def _for_the_end(registered: Collection[str], started: Collection[str]) -> str:
    """What the import has registered for the end, and which processes it has started."""
    said = ""
    if registered:
        said += f"Run once, when a generation's last worker has ended, until when its fork server stays: {', '.join(registered)}\n"
    if started:
        said += f"Started by the import, and ended with each generation: {', '.join(started)}\n"
    return said


def _say(outcome: int, said: str, module: str) -> None:
    with contextlib.suppress(Exception):  # whatever the import has put in its place
        sys.stdout.flush()
    if _forks:
        _warn(f"{module}: the import forks: a child that returns from it is ended, any other runs on beside the fork server")
    if undone := forkserver.handlers_undone(signals.installed()):
        _warn(f"{module}: handlers that the import has installed for {undone} are undone, workers need these signals")
    _write(outcome, said, module)


def _write(outcome: int, said: str, module: str) -> None:
    try:
        os.write(outcome, said.encode(errors="backslashreplace"))
    except OSError:
        _warn(f"{module}: the import closed descriptors that were not its own")
        os._exit(PreforkError.exit_code)


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):  # standard error may be what was closed
        os.write(2, f"prefork: {text}\n".encode())
