"""Send a checked request to its host: find the host that holds the scope, or send it to all candidates."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from netloom.errors import HostUnreachable
from netloom.extension.deadline import Deadline
from netloom.extension.directory import home_of, persistent
from netloom.extension.hostkeys import KnownHosts, Trust, parse_pins
from netloom.extension.hosts import HESITATES_S, Hosts, Inquiry, tell_all
from netloom.extension.log import note
from netloom.extension.outcome import ensured, error_in, printed
from netloom.extension.package import package
from netloom.extension.placement import Fail, HostAnswer, Situation, Unplaced, Use, preferred_order
from netloom.extension.pool import Pool
from netloom.extension.progress import Installing, Progress
from netloom.extension.record import CallRecord
from netloom.extension.request import Request
from netloom.extension.ssh import Login, agent_of
from netloom.extension.standby import with_standby
from netloom.protocol.envelope import PhysicalDetails
from netloom.secret import Secret
from netloom.wire import Call, Reply

ENSURE = "ensure-network-device"

ACTION = "custom-action"

# These commands end a scope and go to every candidate that answers. CloudStack calls ensure-network-device with {}
# before them, so the stored host may be another one than the host where something was left (protocol section 3,
# destroy-network).
TO_ALL_HOSTS = frozenset({"destroy-network", "destroy-vpc", "shutdown-vpc"})


class _CallProgress(Progress):
    """Progress of one call: the current step goes into its record, the log lines into the log."""

    def __init__(self, record: CallRecord, environ: Mapping[str, str]) -> None:
        self._record = record
        self._environ = environ

    def installing(self, now: Installing) -> None:
        self._record.doing = str(now)

    def log(self, line: str) -> None:
        note(line, self._environ)


def login(details: PhysicalDetails, environ: Mapping[str, str]) -> Login:
    """The login that the registration describes.

    Raises NoDirectory when there is no directory for host keys, and BadRequest when NETLOOM_AGENT is not a command.
    """
    return Login(
        trust=Trust(parse_pins(details.hostkeys), KnownHosts(persistent(environ))),
        username=str(details.username),
        port=int(details.port),
        sshkey=details.sshkey or Secret(),
        password=details.password or Secret(),
        agent=agent_of(environ),
        home=home_of(environ, os.geteuid()),
        ssh_auth_sock=environ.get("SSH_AUTH_SOCK", ""),
    )


async def dispatch(
    request: Request, deadline: Deadline, environ: Mapping[str, str], record: CallRecord, pool: Pool
) -> str:
    """Run a checked request; returns what to print. Raises NetloomError."""
    credentials = login(request.details, environ)
    brought = None if environ.get("NETLOOM_AGENT") else package()  # an agent of one's own is never replaced by ours
    hosts = Hosts(credentials, brought, deadline, pool, _CallProgress(record, environ), installs=request.installs)
    situation = Situation(
        scope_id=request.scope_id,
        order=preferred_order(request.scope_id.partition("-")[2], request.details.candidates),
        stored=request.stored.host,
        epoch=request.stored.epoch,
        previous=(*request.stored.previous, *filter(None, [request.stored.standby])),
        standby=request.stored.standby,
        removes=request.only_removes or request.ends,
    )
    if request.call.command in TO_ALL_HOSTS:
        return await _to_all(request, situation, hosts, record)
    return await _to_one(request, situation, hosts, record)


async def _to_one(request: Request, situation: Situation, hosts: Hosts, record: CallRecord) -> str:
    inquiry = Inquiry(hosts, request.call, from_memory=request.call.command == ENSURE)
    host, now = situation.stored, situation
    reply: Reply | None = None
    decision: Use | Unplaced | Fail | None = None
    if request.call.command not in (ENSURE, ACTION) and host in situation.order and hosts.is_open(host):
        record.host = host
        reply, decision, now = await _to_stored(request.call, situation, inquiry, hosts, record)
    # A scope can move between the question and the command, and then the command was refused. Of an action that failed
    # it is not known whether it ran before the move: it is not sent again.
    for _ in range(1 + len(situation.order)):
        if reply is not None and not reply.elsewhere:
            break
        if reply is not None and request.call.command == ACTION:  # guard: an-action-is-not-sent-twice
            break
        decision = decision or await inquiry.find(now)
        if isinstance(decision, Fail):
            raise decision.error
        if isinstance(decision, Unplaced) and request.only_removes:
            return ""  # no host has the scope, so there is nothing to remove
        host = record.host = decision.host
        if request.call.command == ENSURE:
            standby = ""
            if isinstance(decision, Use):
                decision, standby = await with_standby(request, decision, now, inquiry, hosts, record)
            return ensured(request.stored, decision, request.scope_id, standby)
        record.doing = f"waiting for {host}"
        call = msgspec.structs.replace(request.call, epoch=decision.epoch)  # guard: a-command-names-its-placement
        sent = await _send(call, host, situation, inquiry, hosts)  # guard: a-command-is-one-channel
        reply, decision = (None, sent) if isinstance(sent, Use) else (sent, None)
        if reply is not None:
            now = await _after(reply, host, situation, inquiry)
    assert reply is not None
    record.note = reply.note
    if error := error_in(host, reply):
        raise error
    return printed(request, reply)


async def _to_stored(
    call: Call, situation: Situation, inquiry: Inquiry, hosts: Hosts, record: CallRecord
) -> tuple[Reply | None, Use | None, Situation]:
    """Send the call to the stored host at once, without ``locate`` first: ``placement`` would choose this host, unless
    it says that the scope is elsewhere, and then it does not execute the call.

    The reply, or None when the host fails; the host that has taken over then, if that is known; and the situation with
    what the host said, so that it is not asked again.
    """
    host = situation.stored
    record.doing = f"waiting for {host}"
    try:
        sent = await _send(call, host, situation, inquiry, hosts)
    except HostUnreachable as error:
        if not hosts.deadline.remaining_s():
            raise
        answers = {host: HostAnswer(failure=str(error))}
        return None, None, replace(situation, asked=frozenset((host,)), answers=answers)
    if isinstance(sent, Use):
        return None, sent, situation
    return sent, None, await _after(sent, host, situation, inquiry)


async def _send(call: Call, host: str, situation: Situation, inquiry: Inquiry, hosts: Hosts) -> Reply | Use:
    """The reply of ``host`` to the call. If it lets us wait, and another host has taken over: that one.

    The call may be sent to that one then: ``host`` has no lease any more, so it executes nothing, and what it executed
    before can be repeated. An action cannot. Raises HostUnreachable.
    """
    if not situation.standby or call.command == ACTION:  # guard: an-action-stays-where-it-was-sent
        return await hosts.call(host, call)
    replying = asyncio.ensure_future(hosts.call(host, call))
    pause_s = HESITATES_S
    try:
        while True:
            await asyncio.wait([replying], timeout=pause_s)
            if replying.done():
                return replying.result()
            finding = asyncio.ensure_future(inquiry.find(situation))
            try:
                await asyncio.wait([replying, finding], return_when=asyncio.FIRST_COMPLETED)
                if replying.done():
                    return replying.result()
                found = finding.result()
            finally:
                finding.cancel()
            if (
                isinstance(found, Use)
                and found.host != host
                and found.epoch > max(call.epoch, situation.epoch)  # guard: a-call-is-sent-again-after-a-take-over
            ):
                return found
            pause_s *= 2  # a command may take long
    finally:
        replying.cancel()


async def _after(reply: Reply, host: str, situation: Situation, inquiry: Inquiry) -> Situation:
    """The situation in which the scope is looked for after this reply. What the stored host said is not asked again."""
    if host != situation.stored or not reply.elsewhere:
        return situation
    answers = {host: await inquiry.answer(situation, host, reply)}
    return replace(situation, asked=frozenset((host,)), answers=answers)


async def _to_all(request: Request, situation: Situation, hosts: Hosts, record: CallRecord) -> str:
    decision, replies = await tell_all(situation, hosts, request.call)
    record.host = ",".join(replies) or "-"
    failures = [error for host, reply in replies.items() if not reply.moved_to and (error := error_in(host, reply))]
    if failures:
        raise failures[0]
    if isinstance(decision, Fail):
        raise decision.error
    if decision.left:  # guard: what-is-left-behind-is-logged
        record.note = f"{request.scope_id} may be left on {', '.join(decision.left)}, which did not answer"
    return ""
