"""An errand finds its host: ask who holds the scope, then send the command there, or to everybody."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from netloom.commands.table import row_of
from netloom.errors import BadRequest, HostUnreachable
from netloom.extension.deadline import Deadline
from netloom.extension.deploy import package
from netloom.extension.directory import home_of, persistent
from netloom.extension.hostkeys import KnownHosts, Trust, parse_pins
from netloom.extension.hosts import Hosts, Pool, find, tell_all
from netloom.extension.log import note
from netloom.extension.outcome import ensured, failure, printed
from netloom.extension.placement import Fail, Heard, Situation, Unplaced, preferred_order
from netloom.extension.ssh import AGENT, Login
from netloom.protocol.envelope import PhysicalDetails
from netloom.secret import Secret
from netloom.wire import Call, Reply

if TYPE_CHECKING:
    from netloom.extension.call import Story
    from netloom.extension.work import Errand

LOCATE = "locate"
ENSURE = "ensure-network-device"

# The end of a scope: told to every candidate that answers, for the ensure before it came with {} and may have named
# another host than the one where something was left (protocol section 3, destroy-network).
TO_EVERYBODY = frozenset({"destroy-network", "destroy-vpc", "shutdown-vpc"})


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
        package=None if environ.get("NETLOOM_AGENT") else package(),
        home=home_of(environ, os.geteuid()),
        ssh_auth_sock=environ.get("SSH_AUTH_SOCK", ""),
    )


async def dispatch(errand: Errand, deadline: Deadline, environ: Mapping[str, str], story: Story, pool: Pool) -> str:
    """Carry out a checked errand; what to print. Raises NetloomError."""

    def tell(what: str) -> None:
        story.doing = what

    logged_in = login(errand.envelope.details, environ)
    hosts = Hosts(logged_in, deadline, pool, tell, lambda line: note(line, environ))
    situation = Situation(
        scope_id=errand.scope_id,
        order=preferred_order(errand.scope_id.partition("-")[2], errand.envelope.details.candidates),
        stored=errand.stored.host,
    )
    if errand.call.command in TO_EVERYBODY:
        return await _everybody(errand, situation, hosts, story)
    return await _one(errand, situation, hosts, story)


async def _one(errand: Errand, situation: Situation, hosts: Hosts, story: Story) -> str:
    call, reply = errand.call, None
    if call.command != ENSURE and situation.stored in situation.order and hosts.is_open(situation.stored):
        reply, situation = await _at_once(call, situation, hosts, story)
    if reply is None:
        locate = msgspec.structs.replace(call, call_id=f"{call.call_id}-{LOCATE}", command=LOCATE, payload=b"{}")
        decision = await find(situation, hosts, locate)
        if isinstance(decision, Fail):
            raise decision.error
        if isinstance(decision, Unplaced) and row_of(call.command).kind == "removes":
            return ""  # nobody has it: there is nothing to take away
        story.host = decision.host
        if call.command == ENSURE:
            return ensured(errand.stored, decision.host, errand.scope_id)
        story.doing = f"waiting for {decision.host}"
        reply = await hosts.call(decision.host, call)  # guard: a-command-is-one-channel
    if error := failure(story.host, reply):
        raise error
    return printed(call.command, reply)


async def _at_once(call: Call, situation: Situation, hosts: Hosts, story: Story) -> tuple[Reply | None, Situation]:
    """The stored host's reply in one round trip; or none, and what was heard of it: it is not asked again.

    ``placement`` would name that host, a candidate, as soon as it answers, whatever it answers.
    """
    host = situation.stored
    story.host, story.doing = host, f"waiting for {host}"
    try:
        return await hosts.call(host, call), situation
    except HostUnreachable as error:
        if not hosts.deadline.remaining_s():
            raise
        return None, replace(situation, asked=frozenset((host,)), heard={host: Heard(failure=str(error))})


async def _everybody(errand: Errand, situation: Situation, hosts: Hosts, story: Story) -> str:
    decision, replies = await tell_all(situation, hosts, errand.call)
    story.host = ",".join(replies) or "-"
    failures = [error for host in replies if (error := failure(host, replies[host]))]
    if failures:
        raise failures[0]
    if isinstance(decision, Fail):
        raise HostUnreachable(decision.error.message, hint=decision.error.hint) from decision.error
    return ""
