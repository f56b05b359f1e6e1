"""Run an operator's command on many hosts in parallel over SSH: install, or any ``netloom agent`` command.

There is no deadline: the operator may press Ctrl-C.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec

from netloom.errors import BadRequest, HostRefused, NetloomError
from netloom.extension.deploy import DIRECTORY, Deployment, install_shell
from netloom.extension.package import Package
from netloom.extension.progress import Progress
from netloom.extension.ssh import CompletedCommand, Login, SshConnection

PROGRAM = f"{DIRECTORY}/current/netloom"


class HostResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one host: exit status, its answer (decoded JSON), and one line when it failed."""

    host: str
    status: int = 0
    answer: object = None
    error: str = ""


async def install_on(
    hosts: Sequence[str], login: Login, package: Package | None, progress: Progress
) -> list[HostResult]:
    """Install ``package`` on every host, even where an operator went back from this build."""
    if package is None:
        raise BadRequest("a checkout cannot be installed", hint="use the one file that make build makes")

    async def install(connection: SshConnection) -> HostResult:
        host = connection.host
        shell = install_shell(connection, package)
        activation = await Deployment(connection, package, progress, shell, forced_by_operator=True).run()
        assert activation is not None
        if activation.build != package.build:
            raise HostRefused(f"{host}: {activation.reason}", hint="netloom agent rollback on that host goes back")
        return HostResult(host=host, answer={"outcome": activation.outcome, "build": activation.build})

    return await _on_each(hosts, login, install)


async def run_on(
    hosts: Sequence[str], login: Login, args: Sequence[str], answered: Callable[[str], None]
) -> list[HostResult]:
    """Run ``netloom agent <args> --json`` on every host; the answers are the decoded outputs.

    ``answered`` is called with each host that has answered or failed.
    """

    async def run(connection: SshConnection) -> HostResult:
        done = await connection.execute([PROGRAM, "agent", *args, "--json"])
        answer = None
        with suppress(msgspec.MsgspecError, RecursionError):
            answer = msgspec.json.decode(done.out)
        if done.status != 0 and answer is None:
            raise _failure(connection.host, done)
        return HostResult(host=connection.host, status=done.status or 0, answer=answer)

    return await _on_each(hosts, login, run, answered)


def _failure(host: str, done: CompletedCommand) -> NetloomError:
    if done.status in (126, 127) or "command not found" in done.complaint:
        return HostRefused(f"{host}: netloom is not installed there", hint=f"netloom agent install --hosts {host}")
    return HostRefused(f"{host}: {done.complaint.removeprefix('netloom: ')}")


async def _on_each(
    hosts: Sequence[str],
    login: Login,
    work: Callable[[SshConnection], Awaitable[HostResult]],
    answered: Callable[[str], None] = lambda host: None,
) -> list[HostResult]:
    async def one(host: str) -> HostResult:
        connection = SshConnection(host, login)
        try:
            await connection.open()
            return await work(connection)
        except NetloomError as error:
            return HostResult(host=host, status=error.exit_code, error=str(error))
        finally:
            connection.close()
            answered(host)

    return list(await asyncio.gather(*(one(host) for host in hosts)))
