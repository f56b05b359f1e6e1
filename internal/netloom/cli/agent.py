"""``netloom agent <command>`` for people: on this host, or with ``--hosts`` on other hosts over SSH.

The five commands that also work over SSH share their login options, which ``also_remote`` adds (cli/login.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import typer

from netloom.agent.setup import install, selftest, uninstall
from netloom.cli import table
from netloom.cli.login import Remote, also_remote
from netloom.cli.progress import HostsDisplay, InstallDisplay
from netloom.cli.rows import echo_json, host_row, print_rows, worst_status
from netloom.errors import BadRequest, HostRefused, one_line
from netloom.program import build_id
from netloom.wire import Activation

agent = typer.Typer(
    help="The program on hosts: install, inspect, roll back, uninstall.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# Help texts are arguments of Typer, because the one file is compiled without docstrings.
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, for programs.")]


_HERE = "for this machine, leave the option out"


@agent.command("install", help="Install this program and start its agent. The first call of CloudStack does the same.")
@also_remote
def _install(remote: Remote | None, as_json: Json = False) -> None:
    if remote is None:
        _need_root()
        install.copy_program()
        print_rows([host_row("this host", 0, _run_installed())], as_json)
        return
    from netloom.extension.package import package
    from netloom.extension.remote import install_on  # asyncssh: twenty bare start-ups

    login, hosts = remote.login(), remote.names(_HERE)
    display = InstallDisplay(hosts)
    results = asyncio.run(install_on(hosts, login, package(), display))
    display.end()
    print_rows([host_row(it.host, it.status, it.answer, it.error) for it in results], as_json)


@agent.command("status", help="Show the builds, the agent, and the number of networks.")
@also_remote
def _status(
    remote: Remote | None,
    wait: Annotated[
        int,
        typer.Option("--wait", metavar="SECONDS", min=0, help="Wait until the agent has restored every network."),
    ] = 0,
    as_json: Json = False,
) -> None:
    if remote is not None:
        print_rows(_run_on(remote, ["status", *(["--wait", str(wait)] if wait else [])]), as_json)
    else:
        _need_root()
        now = install.status_when_restored(wait) if wait else install.status()
        print_rows([host_row("this host", 0, now)], as_json)


@agent.command(
    "selftest",
    help="Test what networks need from this host, in a temporary network.",
)
@also_remote
def _selftest(remote: Remote | None, as_json: Json = False) -> None:
    if remote is not None:
        rows = _run_on(remote, ["selftest"])
        if not as_json:
            for row in rows:
                typer.echo(f"{row['host']}:")
                try:
                    findings = msgspec.convert(row.get("answer") or [], list[selftest.Finding])
                except msgspec.ValidationError as error:
                    findings, row["error"] = [], one_line(f"its answer cannot be read: {error}")
                    row["status"] = row["status"] or HostRefused.exit_code
                _print_findings(findings, str(row["error"]))
            raise typer.Exit(worst_status(rows))
        print_rows(rows, as_json)
        return
    findings = selftest.run()
    if as_json:
        echo_json(findings)
    else:
        _print_findings(findings)
    if any(it.needed and not it.ok for it in findings):
        raise typer.Exit(3)


@agent.command(
    "rollback",
    help="Go back to the previous build, until a newer one is installed. The networks get their state from the time of "
    "the upgrade.",
)
@also_remote
def _rollback(
    remote: Remote | None,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Keep the current state of the networks, if that build can read it.")
    ] = False,
    as_json: Json = False,
) -> None:
    if remote is not None:
        print_rows(_run_on(remote, ["rollback", *(["--keep-state"] if keep_state else [])]), as_json)
    else:
        _need_root()
        print_rows([host_row("this host", 0, install.rollback(keep_state=keep_state))], as_json)


@agent.command("uninstall", help="Remove everything that netloom created on the host.")
@also_remote
def _uninstall(
    remote: Remote | None,
    networks: Annotated[
        Literal["refuse", "remove", "leave"],
        typer.Option(
            "--networks",
            metavar="refuse|remove|leave",
            help="If there are networks on the host: refuse, remove them first, or leave them running.",
        ),
    ] = "refuse",
    as_json: Json = False,
) -> None:
    if remote is not None:
        print_rows(_run_on(remote, ["uninstall", "--networks", networks]), as_json)
    else:
        _need_root()
        print_rows([host_row("this host", 0, _uninstalled(uninstall.uninstall(networks)))], as_json)


def _uninstalled(it: uninstall.Kept) -> dict[str, object]:
    if not it.kept:
        return {"outcome": "removed", "stays": it.files}
    return {"outcome": "removed in part", "stays": it.files, "kept": it.kept, "next": it.next}


# ------------------------------------------------------------------------------------------------- running on the hosts


def _need_root() -> None:
    if os.geteuid() != 0:
        raise BadRequest("on this machine only root can do that", hint="use sudo, or --hosts for other hosts")


def _run_on(remote: Remote, args: Sequence[str]) -> list[dict[str, object]]:
    from netloom.extension.remote import run_on  # asyncssh: twenty bare start-ups

    login, hosts = remote.login(), remote.names(_HERE)
    display = HostsDisplay(hosts)
    results = asyncio.run(run_on(hosts, login, args, display.answered))
    display.end()
    rows = []
    for result in results:
        answer = result.answer
        if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict) and "host" in answer[0]:
            answer = {key: value for key, value in answer[0].items() if key not in ("host", "status", "error")}
        rows.append(host_row(result.host, result.status, answer, result.error))
    return rows


def _run_installed() -> object:
    """Let the installed copy activate itself, so that its selftest tests the file that will run."""
    import subprocess  # for this command only

    # Older builds send and know --by-word, so the option keeps its name (agent/main.py).
    program = str(install.LIBEXEC / build_id() / install.PROGRAM)
    done = subprocess.run([program, "agent", "activate", "--by-word"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostRefused(done.stderr.strip().removeprefix("netloom agent: ") or f"status {done.returncode}")
    activation = msgspec.json.decode(done.stdout, type=Activation)
    if activation.build != build_id():
        raise HostRefused(activation.reason, hint="to go back to an older build: netloom agent rollback")
    return activation


# -------------------------------------------------------------------------------------------------------------- output


def _print_findings(findings: list[selftest.Finding], error: str = "") -> None:
    if error:
        typer.echo(error)
        return
    lines = []
    for it in findings:
        there = "yes" if it.ok else ("MISSING" if it.needed else "missing")
        lines.append([one_line(it.what), there, one_line(it.says), one_line(it.remedy)])
    typer.echo(table.render(["WHAT", "THERE", "SAYS", "REMEDY"], lines))
    missing = [one_line(it.what) for it in findings if it.needed and not it.ok]
    typer.echo(f"\nThis host lacks: {', '.join(missing)}." if missing else "\nThis host can carry networks.")
