"""An errand finds its host: ask who holds the scope, then send the command there, or to everybody."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from netloom.commands.table import row_of
from netloom.errors import BadRequest, HostUnreachable
from netloom.extension.deadline import Deadline
from netloom.extension.directory import persistent
from netloom.extension.hostkeys import KnownHosts, Trust, parse_pins
from netloom.extension.hosts import Hosts, find, tell_all
from netloom.extension.outcome import ensured, failure, printed
from netloom.extension.placement import Fail, Situation, Unplaced, preferred_order
from netloom.extension.ssh import AGENT, Login
from netloom.protocol.envelope import PhysicalDetails
from netloom.secret import Secret

if TYPE_CHECKING:
    from netloom.extension.call import Story
    from netloom.extension.work import Errand

LOCATE = "locate"

# The end of a scope: told to every candidate that answers, for the ensure before it came with {} and may have named
# another host than the one where something was left (protocol section 3, destroy-network).
TO_EVERYBODY = frozenset({"destroy-network", "destroy-vpc"})


def login(details: PhysicalDetails, environ: Mapping[str, str]) -> Login:
    """How the registration says to log in. Raises NoDirectory when host keys can be kept nowhere, and BadRequest for a
    NETLOOM_AGENT that is no command."""
    agent = environ.get("NETLOOM_AGENT") or AGENT
    try:
        words = shlex.split(agent)
    except ValueError:
        words = []
    if not words:
        raise BadRequest(f"NETLOOM_AGENT is no command: {agent[:100]!r}", hint="quote it as a shell would want it")
    return Login(
        trust=Trust(parse_pins(details.hostkeys), KnownHosts(persistent(environ))),
        username=str(details.username),
        port=int(details.port),
        sshkey=details.sshkey or Secret(),
        password=details.password or Secret(),
        agent=agent,
    )


async def dispatch(errand: Errand, deadline: Deadline, environ: Mapping[str, str], story: Story) -> str:
    """Carry out a checked errand; what to print. Raises NetloomError."""
    hosts = Hosts(login(errand.envelope.details, environ), deadline)
    situation = Situation(
        scope_id=errand.scope_id,
        order=preferred_order(errand.scope_id.partition("-")[2], errand.envelope.details.candidates),
        stored=errand.stored.host,
    )
    try:
        if errand.call.command in TO_EVERYBODY:
            return await _everybody(errand, situation, hosts, story)
        return await _one(errand, situation, hosts, story)
    finally:
        hosts.close()


async def _one(errand: Errand, situation: Situation, hosts: Hosts, story: Story) -> str:
    call = errand.call
    locate = msgspec.structs.replace(call, call_id=f"{call.call_id}-{LOCATE}", command=LOCATE, payload=b"{}")
    decision = await find(situation, hosts, locate)
    if isinstance(decision, Fail):
        raise decision.error
    if isinstance(decision, Unplaced) and row_of(call.command).kind == "removes":
        return ""  # nobody has it: there is nothing to take away
    story.host = decision.host
    if call.command == "ensure-network-device":
        return ensured(errand.stored, decision.host, errand.scope_id)
    story.doing = f"waiting for {decision.host}"
    reply = await hosts.call(decision.host, call)
    if error := failure(decision.host, reply):
        raise error
    return printed(call.command, reply)


async def _everybody(errand: Errand, situation: Situation, hosts: Hosts, story: Story) -> str:
    decision, replies = await tell_all(situation, hosts, errand.call)
    story.host = ",".join(replies) or "-"
    failures = [error for host in replies if (error := failure(host, replies[host]))]
    if failures:
        raise failures[0]
    if isinstance(decision, Fail):
        raise HostUnreachable(decision.error.message, hint=decision.error.hint) from decision.error
    return ""
