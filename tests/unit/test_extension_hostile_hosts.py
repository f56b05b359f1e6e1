"""A hostile or broken host: any answer of it is an error of one line, in bounded time and memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import asyncssh
import pytest
import typer

from netloom import program
from netloom.cli.rows import host_row, print_rows
from netloom.errors import HostUnreachable, NetloomError
from netloom.extension import ssh
from netloom.extension.agent_client import AgentClient
from netloom.extension.deploy import CannotInstall, Deployment, install_shell
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.package import Package
from netloom.extension.progress import Progress
from netloom.extension.ssh import AgentChannel, Login, SshConnection
from netloom.extension.step_shell import StepShell
from netloom.wire import Call, Hello, Registration, Reply, encode

PACKAGE = Package("/nonexistent", "0.1.0-abc", 1 << 20, "ff" * 32, "x86_64")
HOSTILE = "\x1b[2J\u202e\u009b\r\n{}"
CALL = Call(call_id="a", command="show", scope_id="net-1", registration=Registration(owner="o"))


def login(directory: Path) -> Login:
    return Login(trust=Trust((), KnownHosts(str(directory))))


# --- the answers of programs on a host


class HostileHost(SshConnection):
    """A host whose shell answers each step with one of ``answers``; ``begins``: what it prints before the first one."""

    def __init__(self, directory: Path, *answers: str, begins: str = "") -> None:
        super().__init__("h1", login(directory))
        self.answers = list(answers)
        self.begins = begins
        self.closed = False

    async def run(self, received: Callable[[bytes], None], argv: Sequence[str] = ()) -> AgentChannel:
        if self.begins:
            received(self.begins.encode())
        return HostileChannel(received, self)

    def close(self) -> None:
        self.closed = True


class HostileChannel(AgentChannel):
    """The channel to its shell."""

    def __init__(self, received: Callable[[bytes], None], host: HostileHost) -> None:
        super().__init__(received)
        self._host = host

    def write(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(
            self.received, self._host.answers.pop(0).encode("utf-8", "surrogateescape")
        )


def ended(answer: str, status: int = 0) -> str:
    """The output of a step."""
    return f"{answer}\nnetloom-end {status}\n"


def facts(**given: str) -> str:
    usual = {"system": "Linux", "machine": "x86_64", "installed": PACKAGE.sha256, "current": "x", **given}
    return "".join(f"netloom-{name} {value}\n" for name, value in usual.items())


@pytest.mark.mutation("an-activation-is-any-text")
@pytest.mark.parametrize(
    "answers",
    [
        ("netloom-\nnetloom-system\n",),
        (HOSTILE,),
        (facts(installed="", free="9" * 5000, part="-5", readonly="x"),),
        (facts(installed="", free=HOSTILE, part=HOSTILE, missing=HOSTILE),),
        (facts(machine=HOSTILE),),
        (facts(), "{" * 100_000),
        (facts(), '{"a":' * 100_000),
        (facts(), "{}"),
        (facts(), '{"outcome": 1, "build": []}'),
        (facts(), HOSTILE),
    ],
)
def test_any_answer_to_an_installation_is_an_error_of_one_line(answers: tuple[str, ...], tmp_path: Path) -> None:
    async def deploy() -> None:
        host = HostileHost(tmp_path, *map(ended, answers))
        await Deployment(host, PACKAGE, Progress(), install_shell(host, PACKAGE)).run()

    with pytest.raises(CannotInstall) as raised:
        asyncio.run(deploy())
    assert str(raised.value).isprintable()
    assert str(raised.value).isascii()
    assert str(raised.value).startswith("h1: ")


@pytest.mark.mutation("a-shorter-file-ends-the-upload")
def test_a_program_that_is_replaced_during_its_upload_is_an_error(tmp_path: Path) -> None:
    """The host would wait for the rest."""
    file = tmp_path / "netloom"
    file.write_bytes(b"short")
    package = replace(PACKAGE, path=str(file))

    async def deploy() -> None:
        host = HostileHost(tmp_path, ended(facts(installed="")), "", "")
        await asyncio.wait_for(Deployment(host, package, Progress(), install_shell(host, package)).run(), 5)

    with pytest.raises(CannotInstall, match="was changed while it was uploaded"):
        asyncio.run(deploy())


@pytest.mark.mutation("the-output-of-a-step-ends")
def test_a_step_that_prints_for_ever_is_given_up(tmp_path: Path) -> None:
    async def step() -> None:
        host = HostileHost(tmp_path, "x" * (2 << 20))
        shell = StepShell(host, ["sh"])
        with pytest.raises(HostUnreachable, match="h1: a command there printed more than 1 MiB"):
            await asyncio.wait_for(shell.step("look"), 5)
        assert host.closed

    asyncio.run(step())


def test_the_end_of_a_step_is_found_in_pieces(tmp_path: Path) -> None:
    async def step() -> None:
        shell = StepShell(HostileHost(tmp_path, ""), ["sh"])
        waiting = asyncio.ensure_future(shell.step("look"))
        await asyncio.sleep(0)
        text = ended('netloom-end 0\nnetloom-a b\n{"c": 1}\nit\nfailed', 65)
        for byte in text.encode():
            assert not waiting.done()
            shell._received(bytes([byte]))
        done = await waiting
        assert (done.status, done.complaint) == (65, "it failed")
        assert "netloom-a b" in done.out.splitlines()

    asyncio.run(step())


@pytest.mark.parametrize(
    ("begins", "relays"), [("\0\0\0\x10hello", True), ("\nWelcome!\n", True), (ended("", 1), False)]
)
def test_a_shell_becomes_the_relay_if_the_host_has_one(begins: str, relays: bool, tmp_path: Path) -> None:
    """All that is not the end of a step belongs to the relay, also what a login shell prints."""

    async def connect() -> None:
        received = bytearray()
        host = HostileHost(tmp_path, ended("here"), begins=begins)
        shell = StepShell(host, ["sh"])
        channel = await shell.connect(received.extend)
        assert (channel is not None) is relays
        assert received.decode() == (begins if relays else "")
        if channel is not None:
            channel.received(b"more")
            assert received.decode() == f"{begins}more"
        else:
            assert shell.is_open
            assert (await shell.step("look")).out == "here"

    asyncio.run(connect())


@pytest.mark.mutation("the-output-of-a-program-ends")
def test_a_program_that_prints_for_ever_is_given_up(tmp_path: Path) -> None:
    class Endless:
        read_bytes = 0

        async def read(self, size: int) -> bytes:
            self.read_bytes += size
            assert self.read_bytes < 1 << 23
            return b"x" * size

    stream = Endless()
    with pytest.raises(ssh.TooMuchOutput):
        asyncio.run(SshConnection("h1", login(tmp_path))._read(cast("asyncssh.SSHReader[bytes]", stream)))


# --- what operators see


@pytest.mark.mutation("a-row-names-its-host", instead="{**own, **plain}")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_host_cannot_change_the_rows_of_others_or_the_terminal(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"host": "h2", "status": 0, "error": "", "\x1b[31m\u202e": "\x9b2J\x7f\u202e\r\n", "did": ["\x1b", {}]}
    rows = [host_row("h1", 3, answer, "it failed"), host_row("h2", 0, {"did": []})]
    with pytest.raises(typer.Exit) as ended:
        print_rows(rows, as_json)
    assert ended.value.exit_code == 3
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.replace("\n", "").isprintable()
    if as_json:
        assert json.loads(printed) == rows
    assert [row["host"] for row in rows] == ["h1", "h2"]


# --- the messages of an agent


@pytest.mark.mutation("a-login-shell-that-reads-no-script")
def test_an_agent_behind_a_login_shell_that_reads_no_script_answers(tmp_path: Path) -> None:
    """csh refuses a quoted text of several lines. It executes the agent's command."""

    class Csh(HostileHost):
        async def open(self) -> None:
            pass

        async def run(self, received: Callable[[bytes], None], argv: Sequence[str] = ()) -> AgentChannel:
            channel = HostileChannel(received, self)
            if argv:
                channel.exit_status = 1
                channel.connection_lost(None)
            return channel

    async def opened() -> None:
        client = AgentClient("h1", login(tmp_path), PACKAGE, Progress())
        client.connection = Csh(tmp_path, HELLO.decode("utf-8", "surrogateescape"))
        await asyncio.wait_for(client.open(), 5)
        assert not client.is_broken
        client.close()

    asyncio.run(opened())


def after(directory: Path, *messages: bytes, calls: int = 0) -> AgentClient:
    """The client of an agent that has sent these bytes, after ``calls`` calls."""

    async def received() -> AgentClient:
        client = AgentClient("h1", login(directory), None, Progress())
        client._send = lambda message: None  # type: ignore[method-assign]  # there is no channel
        client._greeted.add_done_callback(lambda done: done.exception())
        waiting = [asyncio.ensure_future(client.call(CALL)) for _ in range(calls)]
        await asyncio.sleep(0)
        for data in messages:
            client._received(data)
        await asyncio.gather(*waiting, return_exceptions=True)
        return client

    return asyncio.run(received())


HELLO = encode(Hello(version="1", build="b"))
REPLY = encode(Reply(call_id="a"))


@pytest.mark.mutation("a-host-only-answers")
@pytest.mark.parametrize(
    "messages",
    [
        (HELLO, REPLY),
        (HELLO, HELLO),
        (HELLO, encode(CALL)),
        (HELLO, b"\0\0\0\0"),
        (HELLO * 2,),
        (HELLO, b"\0\0\0\1\xc1"),
    ],
)
def test_a_message_that_nothing_asked_for_ends_the_connection(messages: tuple[bytes, ...], tmp_path: Path) -> None:
    broken = after(tmp_path, *messages)._broken
    assert isinstance(broken, HostUnreachable)
    assert str(broken).startswith("h1: ")


def test_as_many_replies_as_calls_are_received_in_pieces_of_any_size(tmp_path: Path) -> None:
    data = HELLO + REPLY
    client = after(tmp_path, *(data[at : at + 1] for at in range(len(data))), calls=1)
    assert not client.is_broken
    assert isinstance(after(tmp_path, HELLO, REPLY, REPLY, calls=1)._broken, NetloomError)


@pytest.mark.mutation("a-hosts-build-is-any-text", instead="1 << 20")
@pytest.mark.parametrize(
    "build", ["9" * 60_000, "1.0-" + "9" * 60_000 + "-x", HOSTILE, "", "-" * 60_000, "\u0663" * 60_000]
)
def test_a_host_may_claim_any_build(build: str) -> None:
    assert program.is_newer("0.1.0-a", than=build) in (True, False)
