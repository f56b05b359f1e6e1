"""What an agent has just said of a scope is not asked again."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import asyncssh
import pytest
from msgspec.structs import replace

from netloom.extension import dispatch as dispatching
from netloom.extension.agent_client import HEARD_S, AgentClient
from netloom.extension.deadline import Deadline
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.hosts import Hosts
from netloom.extension.pool import Pool
from netloom.extension.progress import Progress
from netloom.extension.record import CallRecord
from netloom.extension.request import check
from netloom.extension.ssh import Login
from netloom.wire import Call, Registration, Reply, encode

OWNER, SCOPE = "net/p", "net-42"
CALL = Call(call_id="a", command="locate", scope_id=SCOPE, registration=Registration(owner=OWNER))
SERVED = Reply(call_id="a", holds=True, gate="open", epoch=3, revision=7)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


async def client_after(*replies: Reply, calls: tuple[Call, ...] = (CALL,)) -> AgentClient:
    """The client of an agent that has answered these calls in turn with these replies."""
    client = AgentClient("h1", Login(trust=Trust((), KnownHosts("/nonexistent"))), None, Progress())
    client._send = lambda message: None  # type: ignore[method-assign]  # there is no channel
    client._head = None
    for at, reply in enumerate(replies):
        call = replace(calls[at % len(calls)], call_id=str(at))
        waiting = asyncio.ensure_future(client.call(call))
        await asyncio.sleep(0)
        client._received(encode(replace(reply, call_id=call.call_id)))
        await waiting
    return client


def remembered_after(*replies: Reply) -> Reply | None:
    return asyncio.run(client_after(*replies)).remembered(OWNER, SCOPE)


def test_a_served_scope_is_remembered_without_the_output_of_the_call() -> None:
    said = remembered_after(replace(SERVED, output="text", data=b"d", note="disk full"))
    assert said == replace(SERVED, call_id="0")


@pytest.mark.mutation("only-a-served-scope-is-remembered", instead="True")
@pytest.mark.parametrize(
    "last",
    [
        replace(SERVED, holds=False, gate=""),
        replace(SERVED, gate="closed"),
        replace(SERVED, gate="standby"),
        replace(SERVED, status=3, error="failed"),
        replace(SERVED, moved_to="h2"),
        replace(SERVED, about_to_move=True),
    ],
)
def test_anything_else_is_asked_again(last: Reply) -> None:
    assert remembered_after(SERVED, last) is None


def test_another_owner_and_another_scope_are_asked_for() -> None:
    client = asyncio.run(client_after(SERVED))
    assert client.remembered("net/q", SCOPE) is None
    assert client.remembered(OWNER, "net-43") is None


def test_after_a_second_the_host_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    client = asyncio.run(client_after(SERVED))
    clock.now += HEARD_S
    assert client.remembered(OWNER, SCOPE) is not None
    clock.now += 0.1
    assert client.remembered(OWNER, SCOPE) is None


def test_nothing_is_remembered_of_a_broken_channel() -> None:
    async def scenario() -> None:
        client = await client_after(SERVED)
        client._greeted.add_done_callback(lambda done: done.exception())
        client._received(b"\0\0\0\1\xc1")
        assert client.is_broken
        assert client.remembered(OWNER, SCOPE) is None

    asyncio.run(scenario())


# ------------------------------------------------------------------------------------------------------- the calls


class Calls:
    """Calls of a network on h1, which remembers ``said``. ``asked``: the commands that h1 got in the last call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.said: Reply | None = SERVED
        self.asked: list[str] = []
        self.stored = {"host": "h1", "namespace": "cs-net-42", "epoch": 3}
        self._environ = {"NETLOOM_DIR": str(directory)}
        calls = self

        class FakeHosts(Hosts):
            def is_open(self, host: str) -> bool:
                return True

            def remembered(self, host: str, owner: str, scope_id: str) -> Reply | None:
                return calls.said if (host, owner, scope_id) == ("h1", OWNER, SCOPE) else None

            async def call(self, host: str, call: Call, *, installs: bool = True) -> Reply:
                calls.asked.append(call.command)
                return replace(SERVED, call_id=call.call_id, epoch=4)

        monkeypatch.setattr(dispatching, "Hosts", FakeHosts)
        monkeypatch.setattr(dispatching, "package", lambda: None)

    def call(self, command: str) -> str:
        key = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
        payload = {"network_id": "42", "network_state": "implemented", "current_details": json.dumps(self.stored)}
        file = {
            "physical-network-extension-details": {"hosts": "h1", "sshkey": key, "physicalnetworkname": "p"},
            "network-extension-details": self.stored,
            "payload": payload,
        }
        self.asked.clear()
        record = CallRecord(time.monotonic())
        request = check(command, json.dumps(file).encode(), "/ext/net/net.sh", record.call_id)
        deadline = Deadline(60, time.monotonic())
        return asyncio.run(dispatching.dispatch(request, deadline, self._environ, record, Pool(resident=True)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    tmp_path.chmod(0o700)
    return Calls(monkeypatch, tmp_path)


def test_ensure_network_device_of_a_served_network_asks_nobody(calls: Calls) -> None:
    assert json.loads(calls.call("ensure-network-device")) == calls.stored
    assert calls.asked == []


def test_ensure_network_device_asks_if_nothing_is_remembered(calls: Calls) -> None:
    calls.said = None
    assert json.loads(calls.call("ensure-network-device")) == calls.stored | {"epoch": 4}
    assert calls.asked == ["locate"]


@pytest.mark.mutation("no-older-placement-is-remembered", instead="remembered is not None")
def test_an_older_placement_than_cloudstack_remembers_is_asked_for(calls: Calls) -> None:
    calls.stored = calls.stored | {"epoch": 4}
    assert json.loads(calls.call("ensure-network-device")) == calls.stored
    assert calls.asked == ["locate"]


def test_a_command_is_always_sent(calls: Calls) -> None:
    calls.call("shutdown-network")
    assert calls.asked == ["shutdown-network"]
