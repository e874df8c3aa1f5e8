"""The commands: each parses, calls one function, prints. Options of `serve` are made from `prefork.config.Config`."""

import contextlib
import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import click

from prefork import __version__
from prefork.config import DEFAULTS, OPTIONS, Sources, environment, flag, variable
from prefork.errors import PreforkError, RefusedError
from prefork.ops.instances import ask, find

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# An answer that only needs the master's loop to turn once.
PROMPT = 10.0


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors of ours in one line (and the traceback that belongs to it), with their exit code."""
    try:
        yield
    except PreforkError as error:
        click.echo(f"prefork: {error}", err=True)
        sys.exit(error.exit_code)


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="prefork", message="%(prog)s %(version)s")
def main() -> None:
    """Run a blocking Python network handler in production.

    You write loop(sock); `prefork serve --module echo:loop` is everything between the socket and that function.

    \b
    Examples:
      prefork serve --module echo:loop                    the bundled echo server on 127.0.0.1:7000
      prefork serve --module mymodule:loop -b :7000 -w 16       your own, on every address
      prefork status                                      one look at it
      prefork reload                                      new code, no lost connection
      prefork stop                                        let connections finish, then end
    """


def _default_text(key: str) -> str:
    default = OPTIONS[key].plain(getattr(DEFAULTS, key))
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return ", ".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for key, option in reversed(OPTIONS.items()):
        default = _default_text(key)
        names = [flag(key), key, *([option.short] if option.short else [])]
        text = option.help + (f"  [default: {default}]" if default else "") + ("" if option.reloadable else "  [restart]")
        command = click.option(*names, metavar=option.metavar, help=text, multiple=option.multiple)(command)
    return command


@main.command()
@click.option("--config", "file", metavar="FILE", envvar=variable("config"), help="A flat TOML file with the options below.")
@_with_options
def serve(file: str | None, **given: Any) -> None:
    """Run the daemon in the foreground.

    Every option can stand in the --config file (max_workers = 64) or in the environment (PREFORK_MAX_WORKERS=64); the command
    line beats the environment, which beats the file. Durations are seconds (1.5) or 30s, 5m, 1h. A reload takes changed
    values, but for those marked [restart].

    \b
    Signals: TERM, INT  stop, connections may finish (INT twice, QUIT: at once)
             HUP        read configuration and code again, without losing a connection
             TTIN, TTOU one acceptor more, one fewer

    \b
    Examples:
      prefork serve --module echo:loop
      prefork serve --module mymodule:loop --bind 0.0.0.0:7000 --bind unix:/run/my.sock?mode=0660 --workers 16
      prefork serve --config /etc/prefork/echo.toml
    """
    from prefork.system import process

    process.open_standard_descriptors()
    from prefork.master import Master

    command_line = {
        key: list(value) if isinstance(value, tuple) else value for key, value in given.items() if value not in (None, ())
    }
    with _errors():
        sys.exit(Master(Sources(command_line, environment(), file)).run())


def _instance(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--control", metavar="PATH", help="Pick the instance by its control socket.")(command)
    return click.argument("name", required=False)(command)


def _answer(
    name: str | None, path: str | None, command: str, patience: float | None, **arguments: Any
) -> tuple[dict[str, Any], list[int]]:
    answer, descriptors = ask(find(name, path), command, patience, **arguments)
    if not answer.get("ok"):
        raise RefusedError(f"{command} refused: {answer.get('reason')}")
    return answer, descriptors


@main.command()
@_instance
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys are documented and stable.")
def status(name: str | None, control: str | None, *, as_json: bool) -> None:
    """Show one look at a running daemon: listeners, workers, totals.

    NAME is the instance's name; with one instance running it can be left out.
    """
    from prefork.ops import status as status_page

    with _errors():
        facts, descriptors = _answer(name, control, "status", PROMPT)
        found = status_page.assemble(facts, descriptors)
    click.echo(json.dumps(found) if as_json else status_page.table(found))


@main.command()
@_instance
def reload(name: str | None, control: str | None) -> None:
    """Read configuration and code again; wait until the new code serves.

    Exits with 1, and the reason (the handler's traceback included), when it is refused: the old code then keeps serving.
    """
    with _errors():
        answer, _ = _answer(name, control, "reload", None)
    click.echo(f"reloaded: generation {answer['generation']} serves")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, metavar="[NAME] N|+K|-K")
@click.option("--control", metavar="PATH", help="Pick the instance by its control socket.")
def scale(arguments: tuple[str, ...], control: str | None) -> None:
    """Change the number of acceptors now, until the next reload; wait until it is so.

    \b
    Examples:
      prefork scale 16        sixteen acceptors for each address
      prefork scale echo +4   four more, of the instance echo
    """
    if not 1 <= len(arguments) <= 2:
        raise click.UsageError("give a number of workers: N, +K or -K")
    with _errors():
        answer, _ = _answer(arguments[0] if len(arguments) == 2 else None, control, "scale", None, workers=arguments[-1])
    later = "; max_workers is reached, the missing start as connections end" if answer["saturated"] else ""
    click.echo(f"scaled: {answer['workers']} acceptors for each address{later}")


@main.command()
@_instance
@click.option("--quick", is_flag=True, help="Cut connections instead of letting them finish.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="How long they may finish; else graceful_timeout.")
def stop(name: str | None, control: str | None, *, quick: bool, timeout: float | None) -> None:
    """Stop the daemon; wait until it has gone."""
    with _errors():
        path = find(name, control)
        facts, descriptors = _answer(None, path, "status", PROMPT)
        for fd in descriptors:
            os.close(fd)
        process = os.pidfd_open(facts["pid"])
        answer, _ = _answer(None, path, "stop", None, quick=quick, timeout=timeout)
        # It has answered and is about to end: gone is when the process is.
        select.select([process], [], [])
        os.close(process)
    click.echo(f"stopped: {answer['accepted']} connections accepted, {answer['killed']} cut")


def entry() -> None:
    """The program: `main`, with whatever it raises told in one line and an exit code."""
    try:
        main()
    except OSError as error:
        with contextlib.suppress(OSError):  # standard error may be what is full
            click.echo(f"prefork: {error.strerror}" + (f": {error.filename}" if error.filename else ""), err=True)
        os._exit(RefusedError.exit_code)  # an ordinary exit would try to flush what can't be written
    except Exception:
        click.echo(f"prefork: internal error, please report it\n{traceback.format_exc()}", err=True)
        sys.exit(PreforkError.exit_code)
