"""A person's word carried to hosts, all of them at the same time, over SSH: installed there, or run there.

No deadline is given here: whoever waits may press Ctrl-C.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec

from netloom.errors import BadRequest, HostRefused, NetloomError
from netloom.extension.deploy import DIRECTORY, Deployment
from netloom.extension.ssh import Connection, Login, Ran

PROGRAM = f"{DIRECTORY}/current/netloom"


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one host: the exit status, what it answered, and one line when it failed."""

    host: str
    status: int = 0
    answer: object = None
    error: str = ""


async def install_on(hosts: Sequence[str], login: Login, tell: Callable[[str, str], None]) -> list[Visit]:
    """Brings this program to every host; ``tell`` hears host and progress. An operator's word: what was taken back
    there is installed again."""
    package = login.package
    if package is None:
        raise BadRequest("a checkout cannot be installed", hint="use the one file that make build makes")

    async def one(connection: Connection) -> Visit:
        host = connection.host
        line = f"agent being installed on {host}, "
        deployment = Deployment(
            connection, package, lambda what: tell(host, what.removeprefix(line)), lambda line: None, by_word=True
        )
        outcome = await deployment.carry_out()
        assert outcome is not None
        if outcome.build != package.build:
            raise HostRefused(f"{host}: {outcome.reason}", hint="netloom agent rollback on that host goes back")
        return Visit(host=host, answer={"outcome": outcome.outcome, "build": outcome.build})

    return await _visit(hosts, login, one)


async def run_on(hosts: Sequence[str], login: Login, words: Sequence[str]) -> list[Visit]:
    """``netloom agent <words> --json`` on every host that has netloom; what each printed, decoded."""

    async def one(connection: Connection) -> Visit:
        ran = await connection.execute([PROGRAM, "agent", *words, "--json"])
        answer = None
        with suppress(msgspec.DecodeError):
            answer = msgspec.json.decode(ran.out)
        if ran.status != 0 and answer is None:
            raise _failure(connection.host, ran)
        return Visit(host=connection.host, status=ran.status or 0, answer=answer)

    return await _visit(hosts, login, one)


def _failure(host: str, ran: Ran) -> NetloomError:
    if ran.status in (126, 127) or "command not found" in ran.complaint:
        return HostRefused(f"{host}: netloom is not installed there", hint=f"netloom agent install --hosts {host}")
    return HostRefused(f"{host}: {ran.complaint.removeprefix('netloom: ')}")


async def _visit(hosts: Sequence[str], login: Login, one: Callable[[Connection], Awaitable[Visit]]) -> list[Visit]:
    async def visit(host: str) -> Visit:
        connection = Connection(host, login)
        try:
            await connection.open()
            return await one(connection)
        except NetloomError as error:
            return Visit(host=host, status=error.exit_code, error=str(error))
        finally:
            connection.close()

    return list(await asyncio.gather(*(visit(host) for host in hosts)))
