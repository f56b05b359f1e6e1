"""A custom action is carried out once, whoever dies meanwhile: a hook counts its runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import processes
from crash.choice import chosen
from crash.effects import Effect, Tracer
from crash.host import CrashHost
from crash.points import Strike
from crash.sequences import ISOLATED, VLANS, action
from kernel.agent_host import done, wait_until
from netloom.wire import Call, Reply

RUNS, GO = "/run/hook.runs", "/run/hook.go"
# It waits for the test, so that it can die or lose its caller in the middle.
HOOK = f"""#!/bin/sh
echo run >> {RUNS}
while [ ! -e {GO} ]; do sleep 0.02; done
echo carried out
"""


@pytest.fixture(scope="module")
def host() -> Iterator[CrashHost]:
    tracer = Tracer()
    it = CrashHost(tracer, VLANS)
    try:
        it.start()
        done(it.repeated(ISOLATED.steps[0].call()))
        hook = it.path("/var/lib/netloom/hooks/custom-action-count.sh")
        hook.parent.mkdir(mode=0o755)
        hook.write_text(HOOK)
        hook.chmod(0o755)
        yield it
    finally:
        it.close()
        tracer.close()


def runs(host: CrashHost) -> int:
    file = host.path(RUNS)
    return len(file.read_text().splitlines()) if file.exists() else 0


def let_go(host: CrashHost, *, at_once: bool) -> None:
    host.path(RUNS).unlink(missing_ok=True)
    host.path(GO).unlink(missing_ok=True)
    if at_once:
        host.path(GO).touch()


def test_an_action_whose_connection_breaks_in_the_middle_runs_once(host: CrashHost) -> None:
    """The helper of the management server has died. Its successor sends the call again, under the same id."""
    let_go(host, at_once=False)
    call = action("count").call()
    with host.relay() as relay:
        relay.send(call)
        wait_until(lambda: runs(host) == 1)
        processes.kill(relay.process.pid)
    with host.relay() as relay:
        relay.send(call)
        host.path(GO).touch()
        reply = relay.reply()
    assert reply is not None
    assert done(reply).output == "carried out"
    assert runs(host) == 1
    assert done(host.repeated(call)).output == "carried out"
    assert runs(host) == 1


def struck(host: CrashHost, call: Call, after: int, *, cut: bool) -> tuple[Reply | None, list[Effect]]:
    """Send the call, and kill the process of an effect, or cut the connection before it. None: the reply was lost."""
    let_go(host, at_once=True)
    with host.relay() as relay:
        strike = Strike(after, relay.process.pid if cut else 0)
        with host.tracer.watching(strike) as effects:
            reply = relay.answer(call)
    return reply, effects


def test_an_action_runs_once_after_a_cut_before_each_of_its_effects(host: CrashHost) -> None:
    _, effects = struck(host, action("count").call(), 1 << 30, cut=True)
    for after in chosen(effects):
        call = action("count").call()
        struck(host, call, after, cut=True)
        assert done(host.repeated(call)).output == "carried out"
        assert runs(host) == 1, after


@pytest.mark.mutation("a-hook-runs-once")
def test_an_action_runs_at_most_once_after_a_kill_of_the_agent(host: CrashHost) -> None:
    """The next agent does not know what the hook has done. It says so, and does not run it again."""
    _, effects = struck(host, action("count").call(), 1 << 30, cut=False)
    refused = 0
    for after in range(len(effects) + 1):
        call = action("count").call()
        reply, _ = struck(host, call, after, cut=False)
        if reply is None:
            reply = host.repeated(call)
            refused += "may have been carried out" in reply.error
        assert reply.status or runs(host) == 1, after
        assert runs(host) <= 1, after
    assert refused
