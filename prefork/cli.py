"""The commands: each parses, calls one function, prints. Options of `serve` are made from `prefork.config.Config`.

Help is the one text about the commands: the man page (`prefork.manual`) is made of it. In it a block that begins with ``\\b``
and a title (Examples:) is a list, a term and what it means with three spaces or more between them.
"""

import contextlib
import functools
import json
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from prefork import __version__, log, values
from prefork.config import DEFAULTS, OPTIONS, OTHER_WORDS, Option, Sources, environment, flag, unknown_variables, variable
from prefork.errors import PreforkError, RefusedError, explained
from prefork.ops.instances import ask, closest, find, instances, nearest, process_of, shares_pids
from prefork.printable import counted, printable

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# An answer that only needs the master's loop to turn once; one that tells of an outcome, which boot_timeout, canary or
# graceful_timeout may put off; and what is left of a process that has told of its end.
PROMPT, OUTCOME, GONE = 10.0, 86400.0, 60.0
# Completed by shells, and otherwise text: whether it can be used is for those to say who use it.
_PATH = click.Path(readable=False)
_FOLDER = click.Path(readable=False, file_okay=False)


def tell(error: Exception) -> NoReturn:
    """Tell of it in one line (and the traceback that belongs to it), and end with its exit code."""
    if isinstance(error, PreforkError):
        text = f"{click.style('prefork:', fg='red', bold=True)} {printable(str(error))}"
        click.echo(text, err=True, color=_colours())
        sys.exit(error.exit_code)
    if isinstance(error, OSError):
        with contextlib.suppress(OSError):  # standard error may be what is full
            _say(f"prefork: {explained(error)}" + (f": {error.filename}" if error.filename else ""), err=True)
        os._exit(RefusedError.exit_code)  # an ordinary exit would try to flush what can't be written
    text = "".join(traceback.format_exception(error))
    _say(f"prefork: internal error, please report it\n{text}", err=True)
    sys.exit(PreforkError.exit_code)


def _say(text: str, *, err: bool = False) -> None:
    """Print what holds words of others: of the daemon that has answered, of user code, of file names."""
    click.echo(printable(text), err=err)


def _colours() -> bool | None:
    return None if log.colours_wanted() else False  # None: on a terminal only


class _Command(click.Command):
    """Suggests the nearest option for a mistyped one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # Without their dashes, which all have in common.
            known = {name.lstrip("-"): name for parameter in self.params for name in parameter.opts}
            known |= {word: flag(key) for word, key in OTHER_WORDS.items() if flag(key) in known.values()}
            meant = "".join(f" Did you mean {known[name]!r}?" for name in closest(error.option_name.lstrip("-"), known))
            # Not a NoSuchOption: newer versions of click pass over a word that is not like the option's name.
            raise click.UsageError(f"No such option {error.option_name!r}.{meant}", ctx) from None


# Commands of other programs, and what does here what they do there. Without that `top` would be a mistyped `stop`.
OTHER_COMMANDS = {
    "top": "status",
    "stack": "status --json",
    "stats": "status",
    "ps": "status",
    "list": "status",
    "start": "serve",
    "run": "serve",
    "restart": "upgrade",
    "kill": "stop --quick",
    "quit": "stop",
    "shutdown": "stop",
    "test": "check",
    "validate": "check",
    "help": "--help",
    "version": "--version",
}


class _Commands(click.Group):
    """For a command that is not there: the one that was meant, or all that are."""

    command_class = _Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            if name in OTHER_COMMANDS:
                meant = f"There is: prefork {OTHER_COMMANDS[name]}"
            else:
                meant = nearest(name, self.commands).strip().capitalize() or f"There are {', '.join(self.commands)}."
            ctx.fail(f"No such command {name!r}. {meant}")
        return super().resolve_command(ctx, args)


def _duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds, as everywhere in the configuration."""
    try:
        return None if value is None else values.seconds(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None


_EPILOG = """
\b
Exit codes:
  0    stopped as asked, or the command has succeeded
  1    the command was refused, or failed
  2    usage
  69   an address can't be bound; the message names who has it
  70   an internal error, a bug in prefork
  77   not permitted: a low port, a user
  78   the configuration or the handler is unusable

\b
Environment:
  PREFORK_MAX_WORKERS, ...   an option of serve (--max-workers); PREFORK_CONFIG: --config
  RUNTIME_DIRECTORY          where control sockets are; systemd sets it
  NO_COLOR                   set and not empty: no colours; TERM=dumb: the same

\b
Files:
  $XDG_RUNTIME_DIR/prefork/NAME.sock   the control socket of the instance NAME
  /run/prefork/NAME.sock               the same, of root's, without that variable
  /run/prefork/NAME/NAME.sock          the same, of a systemd unit
  /tmp/prefork-UID/NAME.sock           the same, of anybody else's
  NAME.sock.lock, beside it            held as long as that instance runs
"""


@click.group(cls=_Commands, context_settings=_CONTEXT, epilog=_EPILOG)
@click.version_option(__version__, prog_name="prefork", message="%(prog)s %(version)s")
def main() -> None:
    """Run a blocking Python network handler in production.

    You write loop(sock); `prefork serve echo:loop` is everything between the socket and that function.

    \b
    Examples:
      prefork serve echo:loop            the bundled echo server, on 127.0.0.1:7000
      prefork serve mymodule:loop -b :7000 -w 16   your own, on every address
      prefork status                     one look at it
      prefork reload                     new code, no lost connection
      prefork stop                       let connections finish, then end
    """
    click.get_current_context().color = _colours()


def _default_text(key: str) -> str:
    default = OPTIONS[key].plain(getattr(DEFAULTS, key))
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return ", ".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _configured(command: Callable[..., None]) -> Callable[..., Any]:
    """A command with --config and every option, called with where the configuration comes from."""

    @functools.wraps(command)
    def call(file: str | None, handler: str | None, **given: Any) -> None:
        if handler is not None:
            if given["module"] is not None:
                raise click.UsageError(f"two handlers are given, {handler} and --module {given['module']}: leave out one")
            if ":" not in handler and os.path.isfile(handler):
                raise click.UsageError(f"{handler} is a file, and a handler is MODULE:ATTR, like echo:loop{_meant_by(handler)}")
            given["module"] = handler
        others = {key: given.pop(key) for key in given.keys() - OPTIONS.keys()}
        command_line = {
            key: list(value) if isinstance(value, tuple) else value for key, value in given.items() if value not in (None, ())
        }
        command(Sources(command_line, environment(), file), **others)

    text = "A flat TOML file with the options below."
    named = click.option("--config", "file", metavar="FILE", envvar=variable("config"), help=text, type=_PATH)
    return click.argument("handler", metavar="[MODULE:ATTR]", required=False)(named(_with_options(call)))


def _meant_by(file: str) -> str:
    """Of a file that stands where a handler should: what is given instead."""
    name, dot, suffix = file.rpartition(".")
    if suffix == "py" and name.isidentifier():
        return f": {name}:ATTR"
    return f"; a configuration is given by --config {file}" if dot and suffix == "toml" else ""


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for key, option in reversed(OPTIONS.items()):
        default = _default_text(key)
        names = [flag(key), key, *([option.short] if option.short else [])]
        text = option.help + (f"  [default: {default}]" if default else "") + ("" if option.reloadable else "  [restart]")
        more: dict[str, Any] = {"metavar": option.metavar, "multiple": option.multiple, "shell_complete": _completing(option)}
        command = click.option(*names, help=text, **more)(command)
    return command


def _completing(option: Option) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What a shell completes: a choice, or a path beside the words that can stand for one."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        kind = {"PATH": _PATH, "DIR": _FOLDER}.get(option.metavar)
        found = kind.shell_complete(ctx, parameter, incomplete) if kind is not None else []
        # After the path: bash takes a file name only where there are no words.
        words = [word for word in (*option.words, *option.choices) if word.startswith(incomplete)]
        return [*found, *map(CompletionItem, words)]

    return complete


@main.command()
@_configured
def serve(sources: Sources) -> None:
    """Run the daemon in the foreground.

    Every option can stand in the --config file (max_workers = 64) or in the environment (PREFORK_MAX_WORKERS=64); the command
    line beats the environment, which beats the file. MODULE:ATTR by itself is what --module MODULE:ATTR is. Durations are seconds
    (1.5) or 30s, 5m, 1h. A path that is not absolute counts from the working directory. A reload takes changed values, but for
    those marked [restart].

    \b
    Signals:
      TERM, INT    stop; connections may finish
      INT twice, QUIT   stop at once
      HUP          read configuration and code again, without losing a connection; of a terminal that is closed: stop
      USR1         open the log files again
      USR2         upgrade: become the prefork and the Python that are installed now, under the same pid
      TTIN, TTOU   one acceptor more, one fewer

    \b
    Examples:
      prefork serve echo:loop
      prefork serve mymodule:loop --bind 0.0.0.0:7000 --bind unix:/run/my.sock?mode=0660 --workers 16
      prefork serve --config /etc/prefork/echo.toml
    """
    click.get_current_context().obj(sources)


@main.command()
@click.option("--adopt", type=int, hidden=True)  # the descriptor of a running daemon's state: what an upgrade asks first
@click.option("--hooks", is_flag=True, help="Call the hooks, too: each once, one after the other, in the process of the import.")
@_configured
def check(sources: Sources, adopt: int | None, *, hooks: bool) -> None:
    """Validate the configuration, import the handler, print what holds.

    Takes what serve takes, and binds nothing. All mistakes of the configuration are told at once. What it prints is a
    configuration file: every option with the value that it has, and where that comes from. The import happens in a process of its
    own; what it prints goes to standard error. Hooks are imported, and called only with --hooks. An import, or a hook, that has not
    ended after boot_timeout is told with the line where it hangs.

    \b
    Examples:
      prefork check --config /etc/prefork/echo.toml
      prefork check mymodule:loop > prefork.toml
      prefork check --config /etc/prefork/echo.toml --hooks   to see where a hook hangs
    """
    from prefork.check import check as checked
    from prefork.system import process, program

    process.open_standard_descriptors()
    text = checked(sources, program.read_state(adopt) if adopt is not None else None, call_hooks=hooks)
    for name, remedy in unknown_variables(sources.environment):
        _say(f"prefork: the environment variable {name} is no option: {remedy}", err=True)
    click.echo(text, nl=False)


def _running(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in sorted(instances()) if name.startswith(incomplete)]


_control = click.option("--control", metavar="PATH", type=_PATH, help="Pick the instance by its control socket.")


def _instance(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("name", required=False, shell_complete=_running)(_control(command))


def _answer(
    name: str | None, path: str | None, command: str, patience: float = OUTCOME, **arguments: Any
) -> tuple[dict[str, Any], list[int]]:
    answer, descriptors = ask(find(name, path), command, patience, **arguments)
    return _granted(answer, command), descriptors


def _granted(answer: dict[str, Any], command: str) -> dict[str, Any]:
    if not answer.get("ok"):
        kept = ", the old code keeps serving" if command in ("reload", "upgrade") else ""
        raise RefusedError(f"{command} refused{kept}: {answer.get('reason')}")
    return _Answer(answer)


class _Answer(dict[str, Any]):
    """What a daemon has answered, of another version perhaps."""

    def __missing__(self, key: str) -> NoReturn:
        raise RefusedError(f"the answer has no {key!r}: another version of prefork, or none")


@main.command()
@_instance
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys are documented and stable.")
def status(name: str | None, control: str | None, *, as_json: bool) -> None:
    """Show one look at a running daemon: listeners, workers, totals.

    NAME is the instance's name; with one instance running it can be left out.

    \b
    Examples:
      prefork status               of the only instance
      prefork status echo --json   of the instance echo, for programs
    """
    from prefork.ops import status as status_page

    path = find(name, control)
    facts, descriptors = _answer(None, path, "status", PROMPT)
    try:
        found = status_page.assemble(facts, descriptors, usage=shares_pids(path, facts["pid"]))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError) as error:
        raise RefusedError(f"the status makes no sense: another version of prefork, or none: {error}") from None
    click.echo(json.dumps(found) if as_json else status_page.table(found))


@main.command()
@_instance
def reload(name: str | None, control: str | None) -> None:
    """Read configuration and code again; wait until the new code serves.

    Exits with 1, and the reason (the handler's traceback included), when it is refused: the old code then keeps serving.

    \b
    Examples:
      prefork reload echo   the instance echo takes its new code
    """
    path = find(name, control)
    answer, _ = _answer(None, path, "reload")
    if "upgrade" in answer:  # one is under way, and reloads, too
        answer = _outcome(path, answer["upgrade"], "reload")
    _say(f"reloaded: {_serves(answer)}")


def _serves(answer: dict[str, Any]) -> str:
    return f"generation {answer['generation']} {'is suspended' if answer.get('suspended') else 'serves'}"


@main.command()
@_instance
def upgrade(name: str | None, control: str | None) -> None:
    """Become the prefork and the Python that are installed now; wait until the new code serves.

    The pid stays, and so do addresses, connections and counters. What is installed now is tried first: when its check fails,
    exits with 1 and the reason, and nothing has changed. The daemon is started again as it was (same command line, same
    environment), so a virtual environment's link to another Python is followed.

    \b
    Examples:
      prefork upgrade echo   after pip install -U . in a checkout of prefork, or pip install -U prefork-2.0.0-py3-none-any.whl
    """
    path = find(name, control)
    answer, _ = _answer(None, path, "upgrade")
    answer = _outcome(path, answer["upgrade"], "upgrade")
    _say(f"upgraded: prefork {answer['version']}, {_serves(answer)}")


def _outcome(path: str, number: int, command: str) -> dict[str, Any]:
    """Of an upgrade: the daemon becomes another program meanwhile."""
    answer, _ = ask(path, "outcome", OUTCOME, upgrade=number)
    return _granted(answer, command)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, metavar="[NAME] N|+K|-K", shell_complete=_running)
@_control
def scale(arguments: tuple[str, ...], control: str | None) -> None:
    """Change the number of acceptors now, until the next reload; wait until it is so.

    \b
    Examples:
      prefork scale 16        sixteen acceptors for each address
      prefork scale echo +4   four more, of the instance echo
    """
    if not 1 <= len(arguments) <= 2:
        raise click.UsageError("give a number of workers: N, +K or -K")
    answer, _ = _answer(arguments[0] if len(arguments) == 2 else None, control, "scale", workers=arguments[-1])
    later = "; max_workers is reached, the missing start as connections end" if answer["at_ceiling"] else ""
    _say(f"scaled: {counted(answer['workers'], 'acceptor', 'acceptors')} for each address{later}{_overdue(answer)}")


@main.command()
@_instance
def suspend(name: str | None, control: str | None) -> None:
    """Stop accepting; wait until nobody accepts.

    The addresses stay bound: new clients wait in the kernel's queue, as many as `backlog` says, and are served after `prefork
    resume`. Connections that are being served go on. A reload leaves the daemon suspended; a stop serves those who wait.

    \b
    Examples:
      prefork suspend echo   before its database goes away for a moment
    """
    answer, _ = _answer(name, control, "suspend")
    _say(f"suspended: nobody accepts, {counted(answer['busy'], 'connection goes', 'connections go')} on{_overdue(answer)}")


def _overdue(answer: dict[str, Any]) -> str:
    """What a command did not wait for."""
    if not answer["overdue"]:
        return ""
    who = counted(answer["overdue"], "worker should have gone and has", "workers should have gone and have")
    return f"; {who} not, see prefork status"


@main.command()
@_instance
def resume(name: str | None, control: str | None) -> None:
    """Accept again after `prefork suspend`; wait until it is so.

    \b
    Examples:
      prefork resume echo
    """
    answer, _ = _answer(name, control, "resume")
    _say(f"resumed: {counted(answer['workers'], 'acceptor', 'acceptors')} for each address")


@main.command()
@_instance
@click.option("--quick", is_flag=True, help="Cut connections instead of letting them finish.")
@click.option(
    "--timeout", callback=_duration, metavar="SECONDS", help="How long they may finish (5, 30s, 5m); else graceful_timeout."
)
def stop(name: str | None, control: str | None, *, quick: bool, timeout: float | None) -> None:
    """Stop the daemon; wait until it has gone.

    \b
    Examples:
      prefork stop echo --timeout 5m   connections have five minutes to finish
      prefork stop echo --quick        they are cut
    """
    if quick and timeout is not None:
        raise click.UsageError("--quick gives connections no time: leave out --timeout, or --quick")
    path = find(name, control)
    process = process_of(path)
    answer, _ = _answer(None, path, "stop", quick=quick, timeout=timeout)
    stopped = f"stopped: {counted(answer['accepted'], 'connection', 'connections')} accepted, {answer['killed']} cut"
    if process is not None:  # it has answered and is about to end: gone is when the process is
        watched = select.poll()
        watched.register(process, select.POLLIN)
        ended = watched.poll(1000 * GONE)
        os.close(process)
        if not ended:
            raise RefusedError(f"{path}: the daemon has said that it stops, and is still there after {GONE:g} s")
    _say(stopped)


@main.command()
@click.argument("folder", metavar="[DIR]", default=".", type=_FOLDER)
def init(folder: str) -> None:
    """Write a configuration and a handler to begin with into DIR, by default the working directory.

    Nothing is overwritten.

    \b
    Examples:
      prefork init myserver   makes myserver/prefork.toml and myserver/mine.py
    """
    from prefork import starter

    _say(starter.start(folder))


@main.command()
@click.option("--socket/--no-socket", default=True, help="Have systemd open the addresses (the default), or the daemon itself.")
@_configured
def unit(sources: Sources, *, socket: bool) -> None:
    """Print a systemd service and socket for what serve would do.

    Takes what serve takes. Each file comes after a comment line with its name: the service is hardened, watched, reloads and
    upgrades without losing a connection, and with its socket restarts so, too. Without `user` all of it runs as one user, whom
    systemd makes. With `user` the handler runs as that one and can't reach the master, which is root with four capabilities.

    \b
    Examples:
      prefork unit --config /etc/prefork/echo.toml
      prefork unit --config /etc/prefork/echo.toml | awk '/^# .etc/{file = $2} {print > file}'   writes both files
      prefork unit mymodule:loop --bind :443 --no-socket
      prefork unit mymodule:loop --user www-data   the handler can't reach the master
    """
    from prefork import unit as units

    text = units.units(sources, with_socket=socket)
    unseen = units.hidden(sources)
    for path in unseen:
        _say(f"prefork: {path} can't be seen by the service (ProtectHome, PrivateTmp): have it elsewhere, as in /opt", err=True)
    click.echo(text, nl=False)


@main.command()
@click.argument("shell", metavar="[bash|zsh|fish]", type=click.Choice(["bash", "zsh", "fish"]), required=False)
def completion(shell: str | None) -> None:
    """Print a script that teaches a shell to complete prefork's commands, options, their values, and instances.

    By default that of $SHELL. bash and zsh take it in ~/.bashrc or ~/.zshrc by: eval "$(prefork completion bash)"

    \b
    Examples:
      prefork completion fish > ~/.config/fish/completions/prefork.fish
      prefork completion bash > /etc/bash_completion.d/prefork
    """
    from click.shell_completion import get_completion_class

    shell = shell or os.path.basename(os.environ.get("SHELL", ""))
    kind = get_completion_class(shell) if shell in ("bash", "zsh", "fish") else None
    if kind is None:
        raise click.UsageError(f"which shell? there are bash, zsh and fish, and SHELL is {os.environ.get('SHELL', '')!r}")
    click.echo(kind(main, {}, "prefork", "_PREFORK_COMPLETE").source(), nl=False)


@main.command()
def man() -> None:
    """Print the manual page prefork(1), made from these helps.

    \b
    Examples:
      prefork man | man -l -
      prefork man > /usr/local/share/man/man1/prefork.1
    """
    from prefork import manual

    click.echo(manual.page(main, serve), nl=False)


def entry(serving: Callable[[Sources], object]) -> NoReturn:
    """Carry out the command line; whatever is raised is told. ``serving`` is called with what `serve` is given."""
    try:
        main(obj=serving)
    except Exception as error:
        tell(error)
    sys.exit()
