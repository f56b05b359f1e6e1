"""The standby of a scope: which hosts form its group, and the commands that let it join the group, or leave it.

``ensure-network-device`` does this for a scope that its host serves and that has no standby yet (standbywire.py)::

    all candidates   locate       who answers, and is not drained
    active           set-group    the group to use: a new one, or the one that it has with these hosts
    others           set-group    the same group
    active           join-group   with the proofs for both hosts that may serve the scope from now on

A scope that has a standby costs no question. A failure fails the call only if the registration requires a standby; else
it is noted in the log, and the next attempt comes a minute later.

Two hosts form a group without a witness if the registration says so (``standby.alone=gateway``), and if no third one
answers. It ends when the registration does not say so any more, and with a third host a group with a witness follows.

A standby or a witness that its active host has not heard for ``REPLACE_AFTER_S`` is *lost*. If enough other hosts are
left, the scope leaves its group, and joins one without the lost host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from netloom.claimwire import StandbyClaim
from netloom.errors import HostRefused, HostUnreachable, NetloomError
from netloom.extension.hosts import Hosts, Inquiry
from netloom.extension.outcome import error_in
from netloom.extension.placement import HostAnswer, Situation, Use
from netloom.extension.record import CallRecord
from netloom.extension.request import Request
from netloom.secret import Secret
from netloom.standbywire import (
    GROUP_ID_CHARACTERS,
    JOIN_GROUP,
    LEAVE_GROUP,
    SET_GROUP,
    GroupAnswer,
    GroupHost,
    GroupSpec,
    JoinGroup,
    LeaveGroup,
    SetGroup,
    packed,
    unpacked,
)

REPLACE_AFTER_S = 60  # a host that reboots is back by then

# Of the time that a call has left: the command that follows needs the rest.
_SHARE = 0.5
_SECRET_BYTES = 32
_GROUP_ID = re.compile(rf"[0-9a-f]{{{GROUP_ID_CHARACTERS}}}\Z")
_SECRET = re.compile(rf"[0-9a-f]{{{2 * _SECRET_BYTES}}}\Z")


@dataclass(frozen=True)
class Chosen:
    """The other hosts of a group: the one that stands by, and the witness; empty: there is none."""

    standby: str
    witness: str


class TooFewHosts(HostUnreachable):
    """There are not enough other hosts for a group."""


def choose(
    order: Sequence[str],
    active: str,
    answers: Mapping[str, HostAnswer],
    *,
    standby: str = "",
    lost: Collection[str] = (),
    as_pair: bool = False,
) -> Chosen:
    """The standby and the witness of a scope that ``active`` serves. Raises TooFewHosts.

    ``order``: the candidates of the scope. They are taken from the active host on, as in a circle, which is the same
    for all scopes: so the scopes of one host share one group. A drained host can be the witness: it serves nothing.
    ``standby``: the host that stands by now; it is kept if possible. ``lost``: hosts that ``active`` does not hear.
    ``as_pair``: without a witness if only one host is left.
    """
    if active not in order:
        raise TooFewHosts(f"{active} is not registered", hint="add it to the registration detail hosts")
    at = order.index(active)
    circle = [*order[at + 1 :], *order[:at]]
    others = [
        host
        for host in circle
        if host in answers and answers[host].answered and host not in lost  # guard: a-lost-host-is-not-chosen-again
    ]
    if len(others) < (needed := 1 if as_pair else 2):
        silent = [_silence(it, active, answers, lost) for it in circle if it not in others]
        takes = "two" if as_pair else "three"
        few = f"{len(others) + 1} of {len(order)} hosts answer, and a standby takes {takes}"
        missing = f"register {takes} hosts, or standby=off"
        raise TooFewHosts(
            "; ".join([few, *silent]),
            hint="bring them back" if len(order) > needed else missing,
        )
    ready = [
        host
        for host in others
        if not answers[host].drained  # guard: a-drained-host-stands-by-for-none
    ]
    if not ready:
        raise TooFewHosts(
            f"all hosts but {active} are drained: {', '.join(others)}", hint=f"netloom undrain {others[0]}"
        )
    first = standby if standby in ready else ready[0]
    return Chosen(first, next((host for host in others if host != first), ""))


def _silence(host: str, active: str, answers: Mapping[str, HostAnswer], lost: Collection[str]) -> str:
    answer = answers.get(host)
    if answer is None or (answer.answered and host not in lost):
        return f"{host}: no answer in time"
    return answer.failure or f"{host}: {active} has not heard it for a minute"


async def with_standby(
    request: Request, placed: Use, situation: Situation, inquiry: Inquiry, hosts: Hosts, record: CallRecord
) -> tuple[Use, str]:
    """The placement of a scope that was found, and the host that stands by for it; empty: none.

    Sets the standby up, or removes it, if the registration wants that. Raises NetloomError if a standby is required
    and there is none.
    """
    answer = inquiry.answers.get(placed.host)
    if answer is None or not answer.serves or answer.about_to_move:  # guard: a-move-is-not-disturbed-by-a-standby
        return placed, ""
    group, policy = answer.standby, request.details.standby
    # A group with a host that is not registered any more, or that is lost, is replaced.
    standby, witness = map(situation.registered, (group.host, group.witness)) if group else ("", "")
    is_pair = group is not None and not group.witness
    has_group = bool(standby and (witness or is_pair))
    silent = _silent(standby, witness, answer)
    lost = _lost(request.call.registration.owner, placed.host, silent, situation, hosts)
    with_pairs = request.details.standby_alone == "gateway"
    more = len({*situation.order} - lost) > 2
    # A lost host of a pair cannot be replaced: nobody else can say that it does not serve.
    is_replaced = more and (not silent if is_pair else bool(silent))  # guard: a-lost-host-is-replaced-if-possible
    too_few = policy == "auto" and len(situation.order) < (2 if with_pairs else 3)  # guard: two-hosts-need-no-note
    is_off = policy == "off" or (is_pair and not with_pairs)  # guard: a-pair-ends-with-its-registration
    is_as_wanted = group is None if is_off or too_few else has_group and not is_replaced
    if is_as_wanted or request.ends:
        return placed, standby  # guard: a-standby-costs-no-question
    scope = (request.call.registration.owner, request.scope_id)
    shortage = (request.call.registration.owner, frozenset(situation.order))
    must = policy == "required" and not has_group
    if not must and not hosts.standby_retries.may_try(scope, shortage):  # guard: a-failed-standby-waits
        return placed, standby
    setup = _Setup(request, placed, standby, situation, inquiry, hosts, record, lost)
    within_s = hosts.deadline.remaining_s() * _SHARE
    try:
        async with asyncio.timeout(within_s):
            if not is_off:
                await setup.join(group.group_id if group else "", as_pair=with_pairs and not (is_pair and has_group))
            elif group is not None:
                await setup.leave(group.group_id)
        return setup.placed, setup.standby
    except TimeoutError:
        error: NetloomError = HostUnreachable(f"not done within {within_s:.0f} s: still {record.doing}")
    except NetloomError as failed:
        error = failed
    if must:
        raise HostUnreachable(
            f"{request.scope_id} has no standby, which is required: {error.message}",
            hint=error.hint or "repeat the command, or register standby=auto",
        ) from error
    hosts.standby_retries.failed(shortage if isinstance(error, TooFewHosts) else scope)
    what = "has no standby"
    if setup.standby:
        dead = " and ".join(sorted(silent))
        how = f"though {placed.host} does not hear {dead}" if dead else "with a witness that is not registered"
        how = "without a witness" if is_pair else how
        what = "still has a standby" if is_off else f"keeps its standby, {how}"
    record.note = f"{request.scope_id} {what}: {error}"  # guard: a-missing-standby-is-logged
    return setup.placed, setup.standby


def _silent(standby: str, witness: str, answer: HostAnswer) -> set[str]:
    """The standby and the witness, if their active host has not heard them for long."""
    group = answer.standby
    if group is None:
        return set()
    members = ((standby, group.standby_silent_s), (witness, group.witness_silent_s))
    return {host for host, silent_s in members if host and silent_s >= REPLACE_AFTER_S}


def _lost(owner: str, active: str, silent: Collection[str], situation: Situation, hosts: Hosts) -> set[str]:
    """The candidates that are in no new group with this active host: the silent ones, and those that were it of late.

    They may answer us all the same, if a firewall is between the two.
    """
    for host in silent:
        hosts.standby_losses.failed((owner, active, host))
    return {it for it in situation.order if not hosts.standby_losses.may_try((owner, active, it))}


class _Setup:
    """The commands of one call about the standby of its scope.

    ``placed``, ``standby``: the placement of the scope now, and the host that stands by for it; empty: none. ``lost``:
    hosts that are not to be in its group.
    """

    def __init__(
        self,
        request: Request,
        placed: Use,
        standby: str,
        situation: Situation,
        inquiry: Inquiry,
        hosts: Hosts,
        record: CallRecord,
        lost: Collection[str],
    ) -> None:
        self.placed = placed
        self.standby = standby
        self._request = request
        self._situation = situation
        self._inquiry = inquiry
        self._hosts = hosts
        self._record = record
        self._lost = lost

    async def join(self, leaving: str = "", *, as_pair: bool = False) -> None:
        """Let the scope join a group. Raises NetloomError.

        ``leaving``: the group that it has; it leaves that one as late as possible. ``as_pair``: see ``choose``.
        """
        active = self.placed.host
        self._record.doing = f"asking which hosts can stand by for {active}"
        await self._ask_all()
        answers = self._inquiry.answers
        order = self._situation.order
        chosen = choose(order, active, answers, standby=self.standby, lost=self._lost, as_pair=as_pair)
        self._record.doing = f"setting up {chosen.standby} as a standby for {active}"
        group, is_new = await self._group(active, chosen)
        try:
            await self._set_groups(chosen, group, exists=not is_new)
        except HostRefused:
            if is_new:
                raise
            # A member was installed anew, or an earlier attempt ended before it was told.
            group, _ = await self._group(active, chosen, reuses=False)
            await self._set_groups(chosen, group)
        if leaving:
            await self.leave(leaving)
        try:
            await self._join(group, active, chosen)
        except NetloomError:
            answer = await self._look()  # another call has done it, or the reply was lost
            if not self.standby and not answer.about_to_move:
                raise

    async def leave(self, group_id: str) -> None:
        """Let the scope leave its group. Raises NetloomError."""
        self._record.doing = f"ending the standby of {self._request.scope_id}"
        active, scope_id = self.placed.host, self._request.scope_id
        try:
            await self._tell(active, LEAVE_GROUP, LeaveGroup(group_id=group_id), scope_id)
        except HostRefused:
            if not await self._standby_lacks_it():
                raise
            await self._tell(active, LEAVE_GROUP, LeaveGroup(group_id=group_id, is_forgotten=True), scope_id)
        await self._look()

    async def _standby_lacks_it(self) -> bool:
        """Whether the standby of a group without a witness says that it does not have the scope: it was installed anew.

        With a witness, the group is dissolved.
        """
        group = self._inquiry.answers[self.placed.host].standby
        if group is None or group.witness or not self.standby:
            return False
        answer = await self._inquiry.look(self._situation, self.standby)
        return answer.answered and not answer.holds and not answer.moved_to  # guard: a-standby-says-what-it-has

    async def _look(self) -> HostAnswer:
        """What the host of the scope says about it now. Raises HostUnreachable."""
        answer = await self._inquiry.look(self._situation, self.placed.host)
        self.placed = replace(self.placed, epoch=max(self.placed.epoch, answer.epoch))
        self.standby = self._situation.registered(answer.standby.host) if answer.standby else ""
        return answer

    async def _ask_all(self) -> None:
        """Ask the candidates that were not asked yet. Slow ones are not waited for."""

        async def ask(host: str) -> None:
            try:
                await self._inquiry.look(self._situation, host)
            except HostUnreachable as error:
                self._inquiry.answers[host] = HostAnswer(failure=str(error))

        tasks = [asyncio.ensure_future(ask(it)) for it in self._situation.order if it not in self._inquiry.answers]
        if not tasks:
            return
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._hosts.deadline.grace_s())
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()

    async def _group(self, active: str, chosen: Chosen, *, reuses: bool = True) -> tuple[GroupSpec, bool]:
        """The group to use: one that the active host has already with these hosts, or a new one; whether it is new."""
        witness = self._member(chosen.witness) if chosen.witness else None
        new = GroupSpec(
            group_id=f"{1 + int.from_bytes(os.urandom(4)) % 0xFFFFFFFF:0{GROUP_ID_CHARACTERS}x}",
            owner=self._request.call.registration.owner,
            first=self._member(active),
            second=self._member(chosen.standby),
            witness=witness,
            secret=Secret(os.urandom(_SECRET_BYTES).hex()),
        )
        data = await self._tell(active, SET_GROUP, SetGroup(host=active, group=new, reuses=reuses))
        try:
            group = unpacked(data, GroupAnswer).group
        except HostRefused as error:
            raise HostRefused(f"{active}: {error.message}", hint=error.hint) from error
        if not is_as_chosen(group, new):
            raise HostRefused(f"{active}: its group has other hosts than {new.names}", hint="are all builds the same?")
        return group, group.group_id == new.group_id

    def _member(self, host: str) -> GroupHost:
        return member(host, self._hosts.address(host), int(self._request.details.standby_port))

    async def _set_groups(self, chosen: Chosen, group: GroupSpec, *, exists: bool = False) -> None:
        await asyncio.gather(
            *(
                self._tell(host, SET_GROUP, SetGroup(host=host, group=group, exists=exists))
                for host in (chosen.standby, chosen.witness)
                if host
            )
        )

    async def _join(self, group: GroupSpec, active: str, chosen: Chosen) -> None:
        call, epoch = self._request.call, self.placed.epoch + 1
        proofs = [
            await self._hosts.credentials.sign(StandbyClaim(call.registration.owner, call.scope_id, epoch, host))
            for host in (active, chosen.standby)
        ]
        message = JoinGroup(group_id=group.group_id, epoch=epoch, proof=proofs[0], standby_proof=proofs[1])
        await self._tell(active, JOIN_GROUP, message, call.scope_id)
        self.placed, self.standby = replace(self.placed, epoch=epoch), chosen.standby

    async def _tell(self, host: str, command: str, message: msgspec.Struct, scope_id: str = "") -> bytes:
        """The data of the host's reply. Raises NetloomError. Nothing is installed there."""
        call = msgspec.structs.replace(
            self._request.call,
            call_id=f"{self._request.call.call_id}-{command}",
            command=command,
            scope_id=scope_id,
            payload=packed(message),
        )
        reply = await self._hosts.call(host, call, installs=False)
        if reply.status == 1:
            raise HostRefused(
                f"{host}: its agent is older and knows no standby", hint=f"netloom agent install --hosts {host}"
            )
        if error := error_in(host, reply):
            raise error
        return reply.data


def member(host: str, address: str, port: int) -> GroupHost:
    """A host of a group. ``address``: where this server reaches it. Raises HostRefused if other hosts cannot."""
    it = ipaddress.ip_address(address)
    if it.is_loopback or it.is_link_local:  # guard: a-group-has-addresses-for-all
        raise HostRefused(
            f"{host}: this server reaches it at {address}, where no other host does",
            hint="register an address of the management network",
        )
    return GroupHost(name=host, address=str(it), port=port)


def is_as_chosen(group: GroupSpec, asked: GroupSpec) -> bool:
    """Whether the group that a host names has exactly the hosts that were chosen. The two may have changed places.

    The other hosts get its secret, and send to the addresses in it.
    """
    return (
        {group.first, group.second} == {asked.first, asked.second}
        and (group.witness, group.owner, group.lease_ms) == (asked.witness, asked.owner, asked.lease_ms)
        and _GROUP_ID.match(group.group_id) is not None
        and group.mark != 0
        and _SECRET.match(group.secret.reveal()) is not None
    )  # guard: a-group-has-the-chosen-hosts
