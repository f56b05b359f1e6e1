"""``netloom agent <word>`` for people: on the host itself, or with ``--hosts`` on as many as are named."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from netloom.agent.setup import install as place
from netloom.agent.setup import selftest as trial
from netloom.agent.setup import uninstall as removal
from netloom.cli import table
from netloom.errors import BadRequest, HostRefused
from netloom.program import build_id
from netloom.secret import Secret

if TYPE_CHECKING:
    from netloom.extension.ssh import Login

agent = typer.Typer(
    help="The program on the hosts: install, look, go back, remove.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# Help is given here and not by docstrings, which the one file is compiled without.
Hosts = Annotated[
    str | None,
    typer.Option("--hosts", metavar="HOST,...", help="Hosts, separated by commas. Without it: this machine."),
]
User = Annotated[str, typer.Option("--username", metavar="USER", help="Another user than root goes through sudo -n.")]
Port = Annotated[int, typer.Option("--port", metavar="NUMBER", min=1, max=65535, help="The port of SSH.")]
Key = Annotated[
    str,
    typer.Option(
        "--sshkey", metavar="FILE", help="File with the private key. Else the SSH agent and the caller's own keys."
    ),
]
Ask = Annotated[bool, typer.Option("--ask-password", help="Log in by password; it is asked for.")]
PasswordFile = Annotated[
    str,
    typer.Option(
        "--password-file",
        metavar="FILE",
        help="Log in by the password in this file: NETLOOM_PASSWORD=..., or a line.",
    ),
]
Pins = Annotated[str, typer.Option("--hostkeys", metavar="PINS", help="Pinned host keys, as in the registration.")]
Json = Annotated[bool, typer.Option("--json", help="For programs: JSON instead of a table.")]


@agent.command("install", help="Install this program, and start its agent. CloudStack's first call does the same.")
def _install(
    hosts: Hosts = None,
    username: User = "root",
    port: Port = 22,
    sshkey: Key = "",
    ask_password: Ask = False,
    password_file: PasswordFile = "",
    hostkeys: Pins = "",
    as_json: Json = False,
) -> None:
    if hosts is None:
        _need_root()
        place.place()
        outcome = _run_installed()
        _answer([_row("this host", 0, outcome)], as_json)
        return
    from netloom.extension.remote import install_on  # asyncssh: twenty bare start-ups

    login = _login(username, port, sshkey, ask_password, password_file, hostkeys)
    named = _names(hosts)
    progress = _Progress(named)
    visits = asyncio.run(install_on(named, login, progress.tell))
    progress.end()
    _answer([_row(it.host, it.status, it.answer, it.error) for it in visits], as_json)


@agent.command("status", help="What is installed, what serves, how many networks live there.")
def _status(
    hosts: Hosts = None,
    username: User = "root",
    port: Port = 22,
    sshkey: Key = "",
    ask_password: Ask = False,
    password_file: PasswordFile = "",
    hostkeys: Pins = "",
    as_json: Json = False,
) -> None:
    if hosts is not None:
        login = _login(username, port, sshkey, ask_password, password_file, hostkeys)
        _answer(_run_on(hosts, login, ["status"]), as_json)
    else:
        _need_root()
        _answer([_row("this host", 0, place.status())], as_json)


@agent.command(
    "selftest",
    help="Try what networks need of this host. It is done in a scratch network that goes again.",
)
def _selftest(
    hosts: Hosts = None,
    username: User = "root",
    port: Port = 22,
    sshkey: Key = "",
    ask_password: Ask = False,
    password_file: PasswordFile = "",
    hostkeys: Pins = "",
    as_json: Json = False,
) -> None:
    if hosts is not None:
        login = _login(username, port, sshkey, ask_password, password_file, hostkeys)
        rows = _run_on(hosts, login, ["selftest"])
        if not as_json:
            for row in rows:
                typer.echo(f"{row['host']}:")
                _print_findings(msgspec.convert(row.get("answer") or [], list[trial.Finding]), str(row["error"]))
            raise typer.Exit(_worst(rows))
        _answer(rows, as_json)
        return
    findings = trial.run()
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(findings)).decode())
    else:
        _print_findings(findings)
    if any(it.needed and not it.ok for it in findings):
        raise typer.Exit(3)


@agent.command(
    "rollback",
    help="Go back to the previous build. Networks get their states of then; it stays until a newer build comes.",
)
def _rollback(
    hosts: Hosts = None,
    username: User = "root",
    port: Port = 22,
    sshkey: Key = "",
    ask_password: Ask = False,
    password_file: PasswordFile = "",
    hostkeys: Pins = "",
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Networks keep their state of now, where that build reads it.")
    ] = False,
    as_json: Json = False,
) -> None:
    if hosts is not None:
        login = _login(username, port, sshkey, ask_password, password_file, hostkeys)
        _answer(_run_on(hosts, login, ["rollback", *(["--keep-state"] if keep_state else [])]), as_json)
    else:
        _need_root()
        _answer([_row("this host", 0, place.rollback(keep_state=keep_state))], as_json)


@agent.command("uninstall", help="Leave the host as it was found.")
def _uninstall(
    hosts: Hosts = None,
    username: User = "root",
    port: Port = 22,
    sshkey: Key = "",
    ask_password: Ask = False,
    password_file: PasswordFile = "",
    hostkeys: Pins = "",
    networks: Annotated[
        Literal["refuse", "remove", "leave"],
        typer.Option(
            "--networks",
            metavar="refuse|remove|leave",
            help="That live there: refuse to go on, remove them, or leave them as they stand.",
        ),
    ] = "refuse",
    as_json: Json = False,
) -> None:
    if hosts is not None:
        login = _login(username, port, sshkey, ask_password, password_file, hostkeys)
        _answer(_run_on(hosts, login, ["uninstall", "--networks", networks]), as_json)
    else:
        _need_root()
        stays = removal.uninstall(networks)
        _answer([_row("this host", 0, {"outcome": "removed", "stays": stays})], as_json)


# ------------------------------------------------------------------------------------------------------------- reaching


def _need_root() -> None:
    if os.geteuid() != 0:
        raise BadRequest("on this machine only root can do that", hint="sudo, or name hosts by --hosts")


def _names(hosts: str) -> list[str]:
    named = [host.strip() for host in hosts.split(",") if host.strip()]
    if not named:
        raise BadRequest("--hosts names no host", hint="leave it out for this machine")
    return list(dict.fromkeys(named))


def _login(username: str, port: int, sshkey: str, ask: bool, password_file: str, hostkeys: str) -> Login:
    from netloom.extension.deploy import package  # asyncssh: twenty bare start-ups
    from netloom.extension.directory import home_of, persistent
    from netloom.extension.hostkeys import KnownHosts, Trust, parse_pins
    from netloom.extension.ssh import Login

    return Login(
        trust=Trust(parse_pins(hostkeys), KnownHosts(persistent())),
        username=username,
        port=port,
        sshkey=Secret(_read(sshkey)) if sshkey else Secret(),
        password=_password(ask, password_file),
        package=package(),
        home=home_of(os.environ, os.geteuid()),
        ssh_auth_sock=os.environ.get("SSH_AUTH_SOCK", ""),
    )


def _password(ask: bool, file: str) -> Secret:
    if file:
        lines = _read(file).splitlines() or [""]
        told = [line.partition("=")[2] for line in lines if line.startswith("NETLOOM_PASSWORD=")]
        return Secret((told or lines)[0])
    return Secret(typer.prompt("Password", hide_input=True, err=True)) if ask else Secret()


def _read(file: str) -> str:
    try:
        with open(file) as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file}: {getattr(error, 'strerror', None) or 'not a text file'}") from error


def _run_on(hosts: str, login: Login, words: Sequence[str]) -> list[dict[str, object]]:
    from netloom.extension.remote import run_on  # loaded by now

    rows = []
    for visit in asyncio.run(run_on(_names(hosts), login, words)):
        answer = visit.answer
        if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict) and "host" in answer[0]:
            answer = {key: value for key, value in answer[0].items() if key not in ("host", "status", "error")}
        rows.append(_row(visit.host, visit.status, answer, visit.error))
    return rows


def _run_installed() -> object:
    """The installed copy puts itself in use: what serves is what lies in its place, whoever copied it there."""
    import subprocess  # for this word only

    program = str(place.LIBEXEC / build_id() / place.PROGRAM)
    done = subprocess.run([program, "agent", "activate", "--by-word"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostRefused(done.stderr.strip().removeprefix("netloom agent: ") or f"status {done.returncode}")
    outcome = msgspec.json.decode(done.stdout, type=place.Outcome)
    if outcome.build != build_id():
        raise HostRefused(outcome.reason, hint="netloom agent rollback goes back")
    return outcome


# -------------------------------------------------------------------------------------------------------------- telling


def _row(host: str, status: int, answer: object, error: str = "") -> dict[str, object]:
    told = msgspec.to_builtins(answer)
    return {"host": host, "status": status, "error": error, **(told if isinstance(told, dict) else {"answer": told})}


def _answer(rows: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
    else:
        columns = [
            key
            for key in _columns(rows)
            if (key in _ALWAYS and key in rows[0]) or any(row.get(key) not in ("", None, [], ()) for row in rows)
        ]
        lines = [[_text(row.get(key)) for key in columns] for row in rows]
        typer.echo(table.render([column.upper() for column in columns], lines))
    if worst := _worst(rows):
        raise typer.Exit(worst)


_ALWAYS = ("current", "serves")  # that there is none is news, too


def _columns(rows: list[dict[str, object]]) -> list[str]:
    found = list(dict.fromkeys(key for row in rows for key in row))
    return [*(key for key in found if key not in ("status", "error", "did")), "did", "error"]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    return "-" if value in (None, "") else str(value)


def _worst(rows: list[dict[str, object]]) -> int:
    return max(status for row in rows if isinstance(status := row["status"], int))


def _print_findings(findings: list[trial.Finding], error: str = "") -> None:
    if error:
        typer.echo(error)
        return
    lines = [
        [it.what, "yes" if it.ok else ("MISSING" if it.needed else "missing"), it.says, it.remedy] for it in findings
    ]
    typer.echo(table.render(["WHAT", "THERE", "SAYS", "REMEDY"], lines))
    lacks = [it.what for it in findings if it.needed and not it.ok]
    typer.echo(f"\nThis host lacks: {', '.join(lacks)}." if lacks else "\nThis host can carry networks.")


class _Progress:
    """How far every host is, on stderr: a line for each, redrawn on a terminal; elsewhere a line for each news."""

    _BAR = 20

    def __init__(self, hosts: Sequence[str]) -> None:
        self._state = dict.fromkeys(hosts, "connecting")
        self._width = max(map(len, hosts))
        self._drawn = False
        self._terminal = sys.stderr.isatty()
        self._draw()

    def tell(self, host: str, what: str) -> None:
        before, self._state[host] = self._state[host], what
        if self._terminal:
            self._draw()
        elif _tens(what) != _tens(before):
            sys.stderr.write(f"{host}: {what}\n")

    def end(self) -> None:
        for host in self._state:
            self._state[host] = "ended"
        self._draw()

    def _draw(self) -> None:
        if not self._terminal:
            return
        up = f"\x1b[{len(self._state)}A" if self._drawn else ""
        lines = [f"\r\x1b[K{host:<{self._width}}  {self._bar(what)}\n" for host, what in self._state.items()]
        sys.stderr.write(up + "".join(lines))
        sys.stderr.flush()
        self._drawn = True

    def _bar(self, what: str) -> str:
        if not what.endswith(" %"):
            return what
        full = int(what[:-2]) * self._BAR // 100
        return f"[{'#' * full}{'.' * (self._BAR - full)}] {what:>5}"


def _tens(what: str) -> str:
    """The same text for news that are not worth a line of their own."""
    return f"{what[:-2].zfill(3)[:2]}" if what.endswith(" %") else what
