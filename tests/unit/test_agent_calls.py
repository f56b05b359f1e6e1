"""What the agent remembers of calls: a call that is repeated gets the same reply, unless it was not executed."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from fakehost import REGISTRATION
from netloom.agent.serve import _Calls
from netloom.wire import Call, Reply

CALL = Call(call_id="c1", command="assign-ip", scope_id="net-204", registration=REGISTRATION, payload=b"")
DONE = Reply(call_id="c1", revision=7)


class NoClaims:
    async def learn(self, call: Call) -> None:
        """Calls bring public keys; these bring none."""


class Scripted:
    """Answers each execution with the next reply."""

    def __init__(self, *replies: Reply) -> None:
        self.left = list(replies)

    async def execute(self, call: Call) -> Reply:
        return self.left.pop(0)


def answers(*replies: Reply) -> list[Reply]:
    """The answers to a call that is sent twice."""

    async def twice() -> list[Reply]:
        prepared = asyncio.Event()
        prepared.set()
        calls = _Calls(cast(Any, Scripted(*replies)), cast(Any, None), cast(Any, None), cast(Any, NoClaims()), prepared)
        return [await calls.answer(CALL), await calls.answer(CALL)]

    return asyncio.run(twice())


@pytest.mark.parametrize("reply", [DONE, Reply(call_id="c1", status=3, error="no such bridge", gate="open")])
def test_a_call_that_is_repeated_is_not_executed_twice(reply: Reply) -> None:
    assert answers(reply, Reply(call_id="c1", error="executed again")) == [reply, reply]


@pytest.mark.mutation("a-call-may-come-back-after-a-move")
@pytest.mark.parametrize("where", [{"moved_to": "h2"}, {"gate": "incoming"}, {"gate": "passive"}])
def test_a_call_that_was_sent_to_another_host_and_comes_back_is_executed(where: dict[str, Any]) -> None:
    refused = Reply(call_id="c1", status=3, error="net-204 was moved to h2", **where)
    assert answers(refused, DONE) == [refused, DONE]
