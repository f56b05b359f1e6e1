"""The login options that commands on other hosts share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from netloom.errors import BadRequest
from netloom.secret import Secret

if TYPE_CHECKING:
    from netloom.extension.ssh import Login

# Help texts are arguments of Typer, because the one file is compiled without docstrings.


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

    def names(self, hint: str = "names or addresses, as in the registration") -> list[str]:
        """The hosts, without duplicates. Raises BadRequest, with this hint, when there is none."""
        names = [host.strip() for host in self.hosts.split(",") if host.strip()]
        if not names:
            raise BadRequest("--hosts names no host", hint=hint)
        return list(dict.fromkeys(names))

    def login(self) -> Login:
        """The login of these options. May ask for the password. Raises BadRequest when a file cannot be read."""
        from netloom.extension.directory import home_of, persistent  # asyncssh: twenty bare start-ups
        from netloom.extension.hostkeys import KnownHosts, Trust, parse_pins
        from netloom.extension.ssh import Login, agent_of

        return Login(
            trust=Trust(parse_pins(self.hostkeys), KnownHosts(persistent())),
            username=self.username,
            port=self.port,
            sshkey=Secret(read_file(self.sshkey)) if self.sshkey else Secret(),
            password=self._password(),
            agent=agent_of(os.environ),
            home=home_of(os.environ, os.geteuid()),
            ssh_auth_sock=os.environ.get("SSH_AUTH_SOCK", ""),
        )

    def _password(self) -> Secret:
        if self.password_file:
            lines = read_file(self.password_file).splitlines() or [""]
            named = [line.partition("=")[2] for line in lines if line.startswith("NETLOOM_PASSWORD=")]
            return Secret((named or lines)[0])
        return Secret(typer.prompt("Password", hide_input=True, err=True)) if self.ask_password else Secret()


def also_remote(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ``Remote`` to a command. Its first parameter gets them; None without ``--hosts``."""
    return _with_options(command, hosts=_option("hosts", default=None))


def remote_only(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ``Remote`` to a command. Its first parameter gets them; ``--hosts`` is required."""
    every = typer.Option("--hosts", metavar="HOST,...", help="All hosts of the registration, written as there.")
    return _with_options(command, hosts=_option("hosts", annotation=Annotated[str, every]))


def _option(name: str, *, default: object = inspect.Parameter.empty, annotation: object = None) -> inspect.Parameter:
    """The parameter for a field of ``Remote``."""
    annotation = annotation or get_type_hints(Remote, include_extras=True)[name]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_options(command: Callable[..., None], hosts: inspect.Parameter) -> Callable[..., None]:
    """Typer reads options from the signature of a function, so the returned function gets a signature of its own."""
    own_types = get_type_hints(command, include_extras=True, localns={"Remote": Remote})
    others = [_option(field.name, default=field.default) for field in fields(Remote) if field.name != "hosts"]
    own = [
        parameter.replace(annotation=own_types[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in list(inspect.signature(command).parameters.items())[1:]
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        values = {field.name: given.pop(field.name) for field in fields(Remote)}
        command(None if values["hosts"] is None else Remote(**values), **given)

    with_options.__signature__ = inspect.Signature([hosts, *own, *others])  # type: ignore[attr-defined]
    with_options.__annotations__ = {it.name: it.annotation for it in [hosts, *own, *others]}
    return with_options


def read_file(file: str) -> str:
    """The text of a file. Raises BadRequest."""
    try:
        with open(file) as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
