"""Send a checked request to its host: find the host that holds the scope, or send it to all candidates."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from netloom.errors import BadRequest, HostUnreachable
from netloom.extension.deadline import Deadline
from netloom.extension.directory import home_of, persistent
from netloom.extension.hostkeys import KnownHosts, Trust, parse_pins
from netloom.extension.hosts import Hosts, find, tell_all
from netloom.extension.log import note
from netloom.extension.outcome import ensured, error_in, printed
from netloom.extension.package import package
from netloom.extension.placement import Fail, HostAnswer, Situation, Unplaced, preferred_order
from netloom.extension.pool import Pool
from netloom.extension.progress import Installing, Progress
from netloom.extension.record import CallRecord
from netloom.extension.request import Request
from netloom.extension.ssh import AGENT, Login
from netloom.protocol.envelope import PhysicalDetails
from netloom.secret import Secret
from netloom.wire import Call, Reply

LOCATE = "locate"
ENSURE = "ensure-network-device"

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
    agent = environ.get("NETLOOM_AGENT") or AGENT
    try:
        argv = shlex.split(agent)
    except ValueError:
        argv = []
    if not argv:
        raise BadRequest(f"NETLOOM_AGENT is not a command: {agent[:100]!r}", hint="quote it as a shell would want it")
    return Login(
        trust=Trust(parse_pins(details.hostkeys), KnownHosts(persistent(environ))),
        username=str(details.username),
        port=int(details.port),
        sshkey=details.sshkey or Secret(),
        password=details.password or Secret(),
        agent=agent,
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
    )
    if request.call.command in TO_ALL_HOSTS:
        return await _to_all(request, situation, hosts, record)
    return await _to_one(request, situation, hosts, record)


async def _to_one(request: Request, situation: Situation, hosts: Hosts, record: CallRecord) -> str:
    call, reply = request.call, None
    if call.command != ENSURE and situation.stored in situation.order and hosts.is_open(situation.stored):
        reply, situation = await _to_stored(call, situation, hosts, record)
    if reply is None:
        locate = msgspec.structs.replace(call, call_id=f"{call.call_id}-{LOCATE}", command=LOCATE, payload=b"{}")
        decision = await find(situation, hosts, locate)
        if isinstance(decision, Fail):
            raise decision.error
        if isinstance(decision, Unplaced) and request.only_removes:
            return ""  # no host has the scope, so there is nothing to remove
        record.host = decision.host
        if call.command == ENSURE:
            return ensured(request.stored, decision.host, request.scope_id)
        record.doing = f"waiting for {decision.host}"
        reply = await hosts.call(decision.host, call)  # guard: a-command-is-one-channel
    record.note = reply.note
    if error := error_in(record.host, reply):
        raise error
    return printed(request, reply)


async def _to_stored(
    call: Call, situation: Situation, hosts: Hosts, record: CallRecord
) -> tuple[Reply | None, Situation]:
    """Send the call to the stored host at once, without ``locate`` first: ``placement`` would choose this host anyway,
    because it is a candidate, whatever it answers.

    The reply; or None when the host fails, and the situation with its failure, so that it is not asked again.
    """
    host = situation.stored
    record.host, record.doing = host, f"waiting for {host}"
    try:
        return await hosts.call(host, call), situation
    except HostUnreachable as error:
        if not hosts.deadline.remaining_s():
            raise
        return None, replace(situation, asked=frozenset((host,)), answers={host: HostAnswer(failure=str(error))})


async def _to_all(request: Request, situation: Situation, hosts: Hosts, record: CallRecord) -> str:
    decision, replies = await tell_all(situation, hosts, request.call)
    record.host = ",".join(replies) or "-"
    failures = [error for host in replies if (error := error_in(host, replies[host]))]
    if failures:
        raise failures[0]
    if isinstance(decision, Fail):
        raise HostUnreachable(decision.error.message, hint=decision.error.hint) from decision.error
    return ""
