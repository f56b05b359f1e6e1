"""``netloom <command>`` for people: prints tables, or JSON for programs with ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from netloom import __version__
from netloom.cli import table
from netloom.cli.agent import agent
from netloom.cli.placement import add_commands
from netloom.commands.table import TABLE
from netloom.errors import NetloomError
from netloom.extension.directory import persistent
from netloom.extension.hostkeys import Known, KnownHosts
from netloom.program import build_id
from netloom.wire import PROTOCOL_VERSION

app = typer.Typer(
    name="netloom",
    help="Guest networks for Apache CloudStack on plain Linux hosts.",
    epilog="CloudStack itself calls: <command> <payload-file> <timeout-seconds>.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
hosts = typer.Typer(
    help="The SSH host keys that were remembered on first use.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(hosts, name="hosts")
app.add_typer(agent, name="agent")
add_commands(app)

# Help texts are arguments of Typer, because the one file is compiled without docstrings.
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, for programs.")]


def _print_version(asked: bool = True) -> None:
    if asked:
        typer.echo(f"netloom {__version__} (build {build_id()}, speaks protocol {PROTOCOL_VERSION} to its hosts)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the same as the command version.", callback=_print_version)
    ] = False,
) -> None:
    """Options before a command."""


@app.command("version", help="Print the version, the build and the protocol version.")
def _version(as_json: Json = False) -> None:
    if as_json:
        _print_json({"version": __version__, "build": build_id(), "wire": PROTOCOL_VERSION})
    else:
        _print_version()


@app.command("help", help="Print the usage of a command. Example: netloom help agent install.")
def _help(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]...", help="The command. Default: list all commands.")
    ] = None,
) -> None:
    app(args=[*(words or []), "--help"], prog_name="netloom", standalone_mode=False)


@app.command("commands", help="List the commands of CloudStack, with their kinds.")
def _list_commands(as_json: Json = False) -> None:
    if as_json:
        _print_json([{"command": row.name, "kind": row.kind} for row in TABLE.values()])
    else:
        typer.echo(table.render(["COMMAND", "KIND"], [[row.name, row.kind] for row in TABLE.values()]))


@hosts.command("list", help="List the remembered keys, with their file and line.")
def _list_hosts(as_json: Json = False) -> None:
    known_hosts = _known_hosts()
    known = known_hosts.all()
    if as_json:
        _print_json([_as_json(entry) for entry in known])
    elif known:
        typer.echo(table.render(["HOST", "KEY", "FINGERPRINT", "LINE"], [_as_row(entry) for entry in known]))
        typer.echo(f"\n{known_hosts.path}")
    else:
        typer.echo(f"No host key is remembered yet ({known_hosts.path}).")


@hosts.command(
    "forget",
    help="Forget the keys of a host that was installed anew. Its next key is remembered.",
)
def _forget_host(
    host: Annotated[
        str, typer.Argument(metavar="HOST", help="The host as in the list: a name, an address, or '[name]:port'.")
    ],
    as_json: Json = False,
) -> None:
    known_hosts = _known_hosts()
    forgotten = known_hosts.forget(host)
    if as_json:
        _print_json([_as_json(entry) for entry in forgotten])
    if not forgotten:
        typer.echo(f"netloom: no key of {host} is remembered in {known_hosts.path}", err=True)
        raise typer.Exit(1)
    if not as_json:
        for entry in forgotten:
            typer.echo(f"Forgotten: {entry.name} {entry.key.kind} {entry.key.fingerprint}")


def run(args: Sequence[str]) -> int:
    """Run a command for people; the exit status. An error is one line on stderr."""
    try:
        status = app(args=list(args), prog_name="netloom", standalone_mode=True)
    except NetloomError as error:
        sys.stderr.write(f"netloom: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"netloom: {error}\n")
        return 1
    return int(status or 0)


def _known_hosts() -> KnownHosts:
    return KnownHosts(persistent())


def _as_row(known: Known) -> list[str]:
    return [known.name, known.key.kind, known.key.fingerprint, str(known.line)]


def _as_json(known: Known) -> dict[str, object]:
    return {"host": known.name, "type": known.key.kind, "fingerprint": known.key.fingerprint, "line": known.line}


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
