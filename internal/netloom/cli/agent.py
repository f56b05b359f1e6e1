"""``netloom agent <command>`` for people: on this host, or with ``--hosts`` on other hosts over SSH.

The five commands that also work over SSH share their login options, which the decorator ``_also_remote`` adds.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import msgspec
import typer

from netloom.agent.setup import install, selftest, uninstall
from netloom.cli import table
from netloom.commands.actions import printable_ascii
from netloom.errors import BadRequest, HostRefused, one_line
from netloom.extension.progress import Installing, Progress
from netloom.program import build_id
from netloom.secret import Secret
from netloom.wire import Activation

if TYPE_CHECKING:
    from netloom.extension.ssh import Login

agent = typer.Typer(
    help="The program on hosts: install, inspect, roll back, uninstall.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# Help texts are arguments of Typer, because the one file is compiled without docstrings.
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, for programs.")]


@dataclass(frozen=True)
class Remote:
    """The options of a command that works on other hosts: which hosts, and how to log in."""

    hosts: Annotated[
        str, typer.Option("--hosts", metavar="HOST,...", help="Run on these hosts over SSH. Default: on this machine.")
    ]
    username: Annotated[
        str, typer.Option("--username", metavar="USER", help="Log in as this user. Users other than root use sudo -n.")
    ] = "root"
    port: Annotated[int, typer.Option("--port", metavar="NUMBER", min=1, max=65535, help="Use this SSH port.")] = 22
    sshkey: Annotated[
        str,
        typer.Option(
            "--sshkey",
            metavar="FILE",
            help="Use the private key in this file. Default: the SSH agent and your own keys.",
        ),
    ] = ""
    ask_password: Annotated[bool, typer.Option("--ask-password", help="Ask for the login password.")] = False
    password_file: Annotated[
        str,
        typer.Option(
            "--password-file",
            metavar="FILE",
            help="Use the password in this file: a line NETLOOM_PASSWORD=..., or the first line.",
        ),
    ] = ""
    hostkeys: Annotated[
        str,
        typer.Option("--hostkeys", metavar="PINS", help="Accept only these host keys, written as in the registration."),
    ] = ""

    def names(self) -> list[str]:
        """The hosts, without duplicates. Raises BadRequest when there is none."""
        names = [host.strip() for host in self.hosts.split(",") if host.strip()]
        if not names:
            raise BadRequest("--hosts names no host", hint="for this machine, leave the option out")
        return list(dict.fromkeys(names))

    def login(self) -> Login:
        """The login of these options. May ask for the password. Raises BadRequest when a file cannot be read."""
        from netloom.extension.directory import home_of, persistent  # asyncssh: twenty bare start-ups
        from netloom.extension.hostkeys import KnownHosts, Trust, parse_pins
        from netloom.extension.ssh import Login

        return Login(
            trust=Trust(parse_pins(self.hostkeys), KnownHosts(persistent())),
            username=self.username,
            port=self.port,
            sshkey=Secret(_read(self.sshkey)) if self.sshkey else Secret(),
            password=self._password(),
            home=home_of(os.environ, os.geteuid()),
            ssh_auth_sock=os.environ.get("SSH_AUTH_SOCK", ""),
        )

    def _password(self) -> Secret:
        if self.password_file:
            lines = _read(self.password_file).splitlines() or [""]
            named = [line.partition("=")[2] for line in lines if line.startswith("NETLOOM_PASSWORD=")]
            return Secret((named or lines)[0])
        return Secret(typer.prompt("Password", hide_input=True, err=True)) if self.ask_password else Secret()


def _also_remote(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ``Remote`` to a command. Its first parameter gets them; None without ``--hosts``.

    Typer reads the options from the signature of a function, so the returned function gets a signature of its own.
    """
    remote_types = get_type_hints(Remote, include_extras=True)
    own_types = get_type_hints(command, include_extras=True, localns={"Remote": Remote})
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.name == "hosts" else field.default,
            annotation=remote_types[field.name],
        )
        for field in fields(Remote)
    ]
    own = [
        parameter.replace(annotation=own_types[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in list(inspect.signature(command).parameters.items())[1:]
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        values = {field.name: given.pop(field.name) for field in fields(Remote)}
        command(None if values["hosts"] is None else Remote(**values), **given)

    with_options.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*options, *own]}
    return with_options


@agent.command("install", help="Install this program and start its agent. The first call of CloudStack does the same.")
@_also_remote
def _install(remote: Remote | None, as_json: Json = False) -> None:
    if remote is None:
        _need_root()
        install.copy_program()
        print_rows([host_row("this host", 0, _run_installed())], as_json)
        return
    from netloom.extension.package import package
    from netloom.extension.remote import install_on  # asyncssh: twenty bare start-ups

    login, hosts = remote.login(), remote.names()
    display = _ProgressDisplay(hosts)
    results = asyncio.run(install_on(hosts, login, package(), display))
    display.end()
    print_rows([host_row(it.host, it.status, it.answer, it.error) for it in results], as_json)


@agent.command("status", help="Show the builds, the agent, and the number of networks.")
@_also_remote
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
@_also_remote
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
            raise typer.Exit(_worst(rows))
        print_rows(rows, as_json)
        return
    findings = selftest.run()
    if as_json:
        _echo_json(findings)
    else:
        _print_findings(findings)
    if any(it.needed and not it.ok for it in findings):
        raise typer.Exit(3)


@agent.command(
    "rollback",
    help="Go back to the previous build, until a newer one is installed. The networks get their state from the time of "
    "the upgrade.",
)
@_also_remote
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
@_also_remote
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


def _read(file: str) -> str:
    try:
        with open(file) as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file}: {getattr(error, 'strerror', None) or 'not a text file'}") from error


def _run_on(remote: Remote, args: Sequence[str]) -> list[dict[str, object]]:
    from netloom.extension.remote import run_on  # asyncssh: twenty bare start-ups

    login = remote.login()
    rows = []
    for result in asyncio.run(run_on(remote.names(), login, args)):
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


def host_row(host: str, status: int, answer: object, error: str = "") -> dict[str, object]:
    """One host's row. Its answer cannot replace the three columns that are ours."""
    plain = msgspec.to_builtins(answer)
    own = {"host": host, "status": status, "error": error}
    return {**own, **(plain if isinstance(plain, dict) else {"answer": plain}), **own}  # guard: a-row-names-its-host


def _echo_json(value: object) -> None:
    """Print JSON in printable ASCII: the texts are those of hosts."""
    typer.echo(printable_ascii(msgspec.json.format(msgspec.json.encode(value)).decode()))


def print_rows(rows: list[dict[str, object]], as_json: bool) -> None:
    """Print the hosts' rows as a table or as JSON. Raises typer.Exit with the highest status unless that is 0."""
    if as_json:
        _echo_json(rows)
    else:
        columns = [
            key
            for key in _columns(rows)
            if (key in _ALWAYS and key in rows[0]) or any(row.get(key) not in ("", None, [], ()) for row in rows)
        ]
        lines = [[_text(row.get(key)) for key in columns] for row in rows]
        typer.echo(table.render([one_line(column.upper(), 100) for column in columns], lines))
    if worst := _worst(rows):
        raise typer.Exit(worst)


_ALWAYS = ("current", "serves")  # columns that are shown even if all their cells are empty


def _columns(rows: list[dict[str, object]]) -> list[str]:
    found = list(dict.fromkeys(key for row in rows for key in row))
    return [*(key for key in found if key not in ("status", "error", "did")), "did", "error"]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        items = [str(it) for it in value]
        return one_line(("; " if any(" " in it for it in items) else " ").join(items)) or "-"
    return "-" if value in (None, "") else one_line(str(value))


def _worst(rows: list[dict[str, object]]) -> int:
    return max(status for row in rows if isinstance(status := row["status"], int))


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


class _ProgressDisplay(Progress):
    """Shows the progress of each host on stderr.

    A terminal has one line per host, which is redrawn. Elsewhere each change is a new line.
    """

    _BAR = 20

    def __init__(self, hosts: Sequence[str]) -> None:
        self._shown: dict[str, str] = {}  # host -> the text of its last line, if stderr is no terminal
        self._state = dict.fromkeys(hosts, "connecting")
        self._width = max(map(len, hosts))
        self._drawn = False
        self._terminal = sys.stderr.isatty()
        self._draw()

    def installing(self, now: Installing) -> None:
        if self._terminal:
            self._state[now.host] = now.state if now.percent is None else self._bar(now.percent)
            self._draw()
            return
        news = now.state if now.percent is None else f"{now.percent // 10}"
        if news != self._shown.get(now.host):  # a percentage is written only when its tens change
            self._shown[now.host] = news
            sys.stderr.write(f"{now.host}: {now.state}\n")

    def end(self) -> None:
        for host in self._state:
            self._state[host] = "ended"
        self._draw()

    def _draw(self) -> None:
        if not self._terminal:
            return
        up = f"\x1b[{len(self._state)}A" if self._drawn else ""
        lines = [f"\r\x1b[K{host:<{self._width}}  {state}\n" for host, state in self._state.items()]
        sys.stderr.write(up + "".join(lines))
        sys.stderr.flush()
        self._drawn = True

    def _bar(self, percent: int) -> str:
        full = percent * self._BAR // 100
        return f"[{'#' * full}{'.' * (self._BAR - full)}] {percent:>3} %"
