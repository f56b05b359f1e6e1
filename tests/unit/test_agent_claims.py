"""Claims of other hosts, as one agent hears them: what changes something, and how little all the rest costs."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import asyncssh
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakehost import REGISTRATION, Agent, looks, simulated
from netloom.agent import signatures
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.scopes import claims
from netloom.claimwire import Claim, EvacuationClaim, PlacementClaim, decode, payloads, signatures_in
from netloom.errors import HostRefused
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.proof import Credentials
from netloom.extension.ssh import Login
from netloom.placementwire import SET_EVACUATED, SetEvacuated, packed
from netloom.secret import Secret
from netloom.state import Placement
from netloom.wire import Call, Evacuated, Signers

NET, ADDRESS, OWNER = "net-204", "203.0.113.20", REGISTRATION.owner
PUBLIC, GUEST = ClaimWire("eth2101", 1, "02:00:00:00:00:01"), ClaimWire("eth11204", 1, "02:00:00:00:00:01")
LATER = int(time.time()) + 3600
MAC = "02:00:00:00:00:99"


def credentials() -> Credentials:
    key = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
    return Credentials(Login(Trust((), KnownHosts("/nonexistent")), sshkey=Secret(key)))


RIGHT, WRONG = credentials(), credentials()
SIGNERS = asyncio.run(RIGHT.signers(OWNER, "kvm1"))
NEW = PlacementClaim(OWNER, NET, 1, "kvm2")
DEAD = EvacuationClaim(OWNER, "KVM1", LATER, "kvm2")
_proofs: dict[tuple[Credentials, Claim], str] = {}


def proof(claim: Claim, by: Credentials = RIGHT) -> str:
    """Made before an event loop runs, or in another one."""
    return _proofs[by, claim]


def prepare(*claims_of: Claim) -> None:
    for claim in claims_of:
        for by in (RIGHT, WRONG):
            _proofs[by, claim] = asyncio.run(by.sign(claim))


def frame(claim: Claim, *, scope_id: str = NET, signed: Claim | None = None, by: Credentials = RIGHT) -> bytes:
    """The payload of a claim. ``signed``: what the signature is of, if it is something else."""
    some, _ = payloads(scope_id, claim, signatures_in(proof(signed or claim, by)))
    return some[0]


async def serving(agent: Agent, *, known: bool = True) -> None:
    """The agent serves the network, knows the keys and its own name, and somebody else answers for an address."""
    await agent.live()
    if known:
        await learn(agent)
    agent.start(agent.claims.run(looks()))
    await agent.clock.advance(2.5)
    agent.host.owners[ADDRESS] = MAC
    agent.forget()


async def learn(agent: Agent, signers: Signers | None = SIGNERS) -> None:
    await agent.claims.learn(
        Call(call_id="k", command="locate", scope_id=NET, registration=REGISTRATION, signers=signers)
    )


async def heard(agent: Agent, payload: bytes, wire: ClaimWire = PUBLIC) -> str:
    """What the gate is some time after the frame came."""
    agent.sockets.heard(wire, payload)
    await agent.clock.advance(0.5)
    return agent.store.files[NET].placement.gate


def asked(agent: Agent) -> int:
    return agent.did.count(f"ask {NET}")


prepare(NEW, DEAD)


@pytest.mark.parametrize("wire", [PUBLIC, GUEST], ids=["public", "guest"])
@pytest.mark.parametrize("claim", [NEW, DEAD], ids=["placement", "evacuation"])
@simulated
async def test_a_right_claim_and_an_answer_to_arp_make_the_scope_passive(
    agent: Agent, claim: Claim, wire: ClaimWire
) -> None:
    await serving(agent)
    assert await heard(agent, frame(claim), wire) == "passive"
    assert agent.host.present[NET].gated
    await agent.clock.advance(claims.REMOVE_AFTER_S)
    assert NET not in agent.host.present
    assert agent.did.index(f"ask {NET}") < agent.did.index(f"close {NET}") < agent.did.index(f"save {NET}")
    why = agent.store.files[NET].placement.why
    assert why == f"{ADDRESS} is answered by {MAC}; kvm2 has a proof that it serves {NET} now"
    assert f"scope={NET} warning: passive: {why}" in agent.log.lines
    agent.forget()
    assert await heard(agent, frame(claim), wire) == "passive"
    assert agent.did == []


@pytest.mark.mutation("a-claim-alone-changes-nothing")
@simulated
async def test_a_claim_without_an_answer_to_arp_changes_nothing_and_is_logged_rarely(agent: Agent) -> None:
    await serving(agent)
    agent.host.owners.clear()
    for _ in range(30):
        assert await heard(agent, frame(NEW)) == "open"
    assert len(agent.log.lines) == 1
    assert agent.log.lines[0].startswith(f"scope={NET} kvm2 claims it with a proof, but nobody else answers")
    assert {it for it in agent.did if not it.startswith(("ask", "tidy"))} == set()
    await agent.clock.advance(claims.LOG_EVERY_S)
    agent.host.unknown[ADDRESS] = "eth2.101 has no link"
    assert await heard(agent, frame(NEW)) == "open"
    assert "nobody can be asked for 203.0.113.20: eth2.101 has no link" in agent.log.lines[-1]


@pytest.mark.mutation("questions-after-claims-are-bounded")
@simulated
async def test_questions_are_bounded(agent: Agent) -> None:
    await serving(agent)
    agent.host.owners.clear()
    for _ in range(100):
        agent.sockets.heard(PUBLIC, frame(NEW))
        agent.sockets.heard(GUEST, frame(NEW))
        await agent.clock.advance(0.1)
    assert 8 <= asked(agent) <= 11


FORGED: dict[str, tuple[Claim, dict[str, Any]]] = {
    "the wrong key": (NEW, {"by": WRONG}),
    "the epoch that is served here": (replace(NEW, epoch=0), {}),
    "an old epoch with the number of a new one": (NEW, {"signed": replace(NEW, epoch=0)}),
    "a placement of another scope": (NEW, {"signed": replace(NEW, scope_id="net-205")}),
    "a claim of a scope that is not here": (replace(NEW, scope_id="net-205"), {"scope_id": "net-205"}),
    "another owner": (replace(NEW, owner="other"), {}),
    "another owner's signature": (NEW, {"signed": replace(NEW, owner="other")}),
    "another host's placement": (NEW, {"signed": replace(NEW, host="kvm3")}),
    "its own placement": (replace(NEW, host="kvm1"), {}),
    "the evacuation of another host": (replace(DEAD, dead="kvm3"), {}),
    "that under its own name": (DEAD, {"signed": replace(DEAD, dead="kvm3")}),
    "an evacuation that is over": (replace(DEAD, until=int(time.time()) - 1), {}),
    "that with a new time": (DEAD, {"signed": replace(DEAD, until=int(time.time()) - 1)}),
    "a placement as an evacuation": (DEAD, {"signed": NEW}),
    "an evacuation as a placement": (NEW, {"signed": DEAD}),
    "a field with NUL": (replace(NEW, host="kvm2\0"), {"signed": NEW}),
}
for _claim, _how in FORGED.values():
    with_nul = isinstance(_claim, PlacementClaim) and "\0" in _claim.host
    prepare(*([] if with_nul else [_claim]), *([_how["signed"]] if "signed" in _how else []))


async def changes_nothing(agent: Agent, name: str) -> None:
    await serving(agent)
    claim, how = FORGED[name]
    payload = frame(claim, **how)
    for _ in range(20):
        assert await heard(agent, payload) == "open"
    assert asked(agent) == 0
    assert len(agent.log.lines) <= 1
    assert await heard(agent, frame(NEW)) == "passive"  # the right one is heard nevertheless


@pytest.mark.mutation("an-older-claim-changes-nothing", instead="True")
@simulated
async def test_a_claim_with_the_epoch_that_is_served_here_changes_nothing(agent: Agent) -> None:
    await changes_nothing(agent, "the epoch that is served here")


@pytest.mark.mutation("an-evacuation-claim-names-this-host")
@simulated
async def test_the_evacuation_of_another_host_changes_nothing(agent: Agent) -> None:
    await changes_nothing(agent, "the evacuation of another host")


@pytest.mark.mutation("an-evacuation-claim-ends")
@simulated
async def test_an_evacuation_that_is_over_changes_nothing(agent: Agent) -> None:
    await changes_nothing(agent, "an evacuation that is over")


@pytest.mark.mutation("a-host-that-is-back-is-not-evacuated")
@simulated
async def test_an_evacuation_that_an_operator_has_ended_changes_nothing(agent: Agent) -> None:
    await serving(agent)
    await agent.scopes.change_record(lambda it: msgspec.structs.replace(it, over=LATER))
    assert await heard(agent, frame(DEAD)) == "open"
    assert asked(agent) == 0
    await agent.scopes.change_record(lambda it: msgspec.structs.replace(it, over=LATER - 1))
    assert await heard(agent, frame(DEAD)) == "passive"


@pytest.mark.mutation("a-claim-without-a-signature-changes-nothing")
@pytest.mark.parametrize("name", FORGED)
@simulated
async def test_forged_claims_change_nothing_and_nobody_is_asked(agent: Agent, name: str) -> None:
    await changes_nothing(agent, name)


@pytest.mark.mutation("a-claim-is-heard-on-its-own-networks", instead="slot is None")
@simulated
async def test_a_claim_counts_on_the_networks_of_its_scope_only(agent: Agent) -> None:
    await serving(agent)
    assert await heard(agent, frame(NEW), ClaimWire("eth1.999", 7, MAC)) == "open"
    assert await heard(agent, frame(NEW), replace_wire(PUBLIC, tag=7)) == "open"
    assert asked(agent) == 0


def replace_wire(wire: ClaimWire, *, tag: int) -> ClaimWire:
    return msgspec.structs.replace(wire, tag=tag)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=12))
def test_any_damage_makes_a_claim_none(at: int, data: bytes) -> None:
    payload = frame(NEW)
    damaged = payload[: at % len(payload)] + data + payload[at % len(payload) + len(data) :]

    @simulated
    async def hears(agent: Agent) -> None:
        await serving(agent)
        # Neither padding nor upper and lower case in the name of the host is signed.
        read, sent = decode(damaged), decode(payload)
        same = read and sent and (read.scope_id, read.claim.text) == (sent.scope_id, sent.claim.text)
        valid = bool(same and read and sent and read.signatures == sent.signatures)
        assert await heard(agent, damaged) == ("passive" if valid else "open")

    hears()


@simulated
async def test_a_copy_that_is_not_served_here_hears_nothing(agent: Agent) -> None:
    await serving(agent)
    slot = agent.scopes.slot(NET)
    for gate in ("incoming", "closed", "passive"):
        agent.scopes.placements.place(slot, Placement(gate=gate))
        agent.sockets.heard(PUBLIC, frame(NEW))
        await agent.clock.settle()
    agent.scopes.placements.place(slot, Placement())
    slot.unproved = True
    agent.sockets.heard(PUBLIC, frame(NEW))
    await agent.clock.settle()
    assert asked(agent) == 0


@simulated
async def test_a_scope_that_was_placed_here_again_meanwhile_stays(agent: Agent) -> None:
    """It changes between the verification and the question."""
    await serving(agent)
    agent.workers.hold()
    agent.sockets.heard(PUBLIC, frame(NEW))
    await agent.clock.settle()
    await agent.workers.step()
    slot = agent.scopes.slot(NET)
    agent.scopes.placements.place(slot, Placement(epoch=1))
    await agent.workers.release()
    assert agent.store.files[NET].placement.gate == "open"
    assert asked(agent) == 0


# --- what it costs


@pytest.mark.mutation("verifications-are-bounded")
@simulated
async def test_verifications_are_bounded_and_a_flood_on_one_network_stops_no_claim_on_another(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serving(agent)
    verified = 0
    is_signed = signatures.is_signed

    def counted(*arguments: bytes) -> bool:
        nonlocal verified
        verified += 1
        return is_signed(*arguments)

    monkeypatch.setattr(signatures, "is_signed", counted)
    (some, *_), _ = payloads(NET, NEW, signatures_in(proof(NEW, WRONG)) * 16)
    for _ in range(50):
        agent.sockets.heard(PUBLIC, some)
        await agent.clock.settle()
    assert verified == claims.OF_SCOPE
    assert await heard(agent, frame(NEW), GUEST) == "passive"
    assert verified == claims.OF_SCOPE + 1
    assert len(agent.log.lines) <= 4


@simulated
async def test_a_claim_that_was_verified_is_not_verified_again(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    await serving(agent)
    agent.host.owners.clear()
    assert await heard(agent, frame(NEW)) == "open"
    monkeypatch.setattr(signatures, "is_signed", lambda *_: pytest.fail("verified again"))
    agent.host.owners[ADDRESS] = MAC
    await agent.clock.advance(1)
    assert await heard(agent, frame(NEW)) == "passive"


@pytest.mark.mutation("a-scope-has-a-budget-of-its-own")
def test_a_scope_does_not_use_up_the_budget_of_a_link() -> None:
    @simulated
    async def spend(agent: Agent) -> None:
        budget = claims.Budget(agent.clock)
        assert sum(budget.takes(PUBLIC, NET) for _ in range(1000)) == claims.OF_SCOPE
        assert budget.takes(PUBLIC, "net-205")

    spend()


def test_the_budget_of_all_scopes_and_links_is_bounded() -> None:
    @simulated
    async def spend(agent: Agent) -> None:
        budget = claims.Budget(agent.clock)
        wires = [ClaimWire(f"eth{it}", it, MAC) for it in range(10)]
        taken = [sum(budget.takes(wire, f"net-{it}") for it in range(200) for _ in range(2)) for wire in wires]
        assert taken[0] == claims.OF_LINK
        assert sum(taken) == claims.OF_ALL
        await agent.clock.advance(1)
        assert budget.takes(wires[0], "net-1")

    spend()


# --- the end of the service here


@simulated
async def test_a_gate_that_cannot_be_saved_as_passive_stays_closed(agent: Agent) -> None:
    await serving(agent)
    agent.store.full = True
    agent.sockets.heard(PUBLIC, frame(NEW))
    await agent.clock.advance(30)
    assert agent.host.present[NET].gated
    agent.store.full = False
    await agent.clock.advance(70)
    assert agent.store.files[NET].placement.gate == "passive"
    assert NET not in agent.host.present


@simulated
async def test_an_error_of_the_question_changes_nothing(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    await serving(agent)

    def failing(*_: object) -> object:
        raise HostRefused("the kernel lists no links")

    monkeypatch.setattr(agent.host, "occupied", failing)
    assert await heard(agent, frame(NEW)) == "open"
    assert f"scope={NET} claimed by kvm2: the kernel lists no links" in agent.log.lines
    monkeypatch.undo()
    await agent.clock.advance(1)
    assert await heard(agent, frame(NEW)) == "passive"


# --- the keys


@simulated
async def test_without_keys_a_claim_is_logged_and_the_next_call_brings_them(agent: Agent) -> None:
    await serving(agent, known=False)
    for _ in range(5):
        assert await heard(agent, frame(NEW)) == "open"
    assert agent.log.lines == [f"scope={NET} kvm2 claims it, but no call has brought the keys to verify that"]
    await learn(agent, None)
    assert await heard(agent, frame(NEW)) == "open"
    await learn(agent)
    assert agent.store.record.signers == {OWNER: SIGNERS}
    assert await heard(agent, frame(NEW)) == "passive"


@simulated
async def test_keys_are_saved_once_and_replaced_by_others(agent: Agent) -> None:
    await serving(agent)
    before = agent.scopes.placements.host_record
    await learn(agent)
    assert agent.scopes.placements.host_record is before
    other = msgspec.structs.replace(SIGNERS, keys=(b"x",))
    await learn(agent, other)
    assert agent.store.record.signers == {OWNER: other}
    assert await heard(agent, frame(NEW)) == "open"
    agent.restart()
    assert agent.scopes.placements.host_record.signers == {OWNER: other}


@simulated
async def test_keys_that_cannot_be_saved_fail_no_call(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(record: object) -> None:
        raise HostRefused("no space left")

    monkeypatch.setattr(agent.store, "save_host_record", full)
    for _ in range(3):
        await learn(agent)
    assert agent.log.lines == [f"the keys of {OWNER} were not saved: no space left"]


@simulated
async def test_the_keys_of_a_bounded_number_of_owners_are_kept(agent: Agent) -> None:
    for number in range(100):
        registration = msgspec.structs.replace(REGISTRATION, owner=f"o{number}")
        await agent.claims.learn(
            Call(call_id="k", command="locate", scope_id=NET, registration=registration, signers=SIGNERS)
        )
    assert list(agent.store.record.signers) == [f"o{it}" for it in range(36, 100)]


# --- what this host claims


async def taken(agent: Agent, *numbers: str, **placement: object) -> None:
    """These networks were taken from kvm0, which was declared dead; their claims are sent."""
    await agent.live(*numbers)
    await learn(agent)
    for number in numbers:
        slot = agent.scopes.slot(f"net-{number}")
        given = {"epoch": 1, "host": "kvm1", "proof": proof(NEW), "taken_from": ("kvm0",), **placement}
        agent.scopes.placements.place(slot, Placement(**given))  # type: ignore[arg-type]
    agent.start(agent.claims.run(looks()))
    await agent.clock.advance(3)
    agent.sockets.sent.clear()


@simulated
async def test_a_scope_is_claimed_once_a_second_on_each_of_its_links_and_not_all_at_once(agent: Agent) -> None:
    times: list[float] = []
    await taken(agent, *(str(it) for it in range(200, 240)))
    agent.sockets.on_send = lambda wire, payload: times.append(agent.clock.time())
    await agent.clock.advance(10)
    assert 40 * 2 * 9 <= len(agent.sockets.sent) <= 40 * 2 * 11
    assert max(times.count(it) for it in times) <= 20
    assert {wire.link for wire, _ in agent.sockets.sent} >= {"eth2101", "eth11204"}


@pytest.mark.mutation("only-who-serves-claims", instead="bool(taken)")
@simulated
async def test_who_does_not_serve_claims_nothing(agent: Agent) -> None:
    await taken(agent, "204")
    slot = agent.scopes.slot(NET)
    assert slot.scope is not None
    placement = slot.scope.placement
    while not agent.sockets.sent:
        await agent.clock.advance(0.01)
    await agent.clock.advance(0.94)  # the next claim is due in a moment
    for gate in ("incoming", "closed", "passive"):
        agent.scopes.placements.place(slot, msgspec.structs.replace(placement, gate=gate))
        agent.sockets.sent.clear()
        await agent.clock.advance(3)
        assert agent.sockets.sent == []


@simulated
async def test_a_scope_that_was_built_under_a_record_is_claimed_with_it(agent: Agent) -> None:
    await agent.live("300")
    await learn(agent)
    claim = EvacuationClaim(OWNER, "kvm0", LATER, "kvm1")
    ended = Evacuated(host="kvm9", until=1, proof="x", owner=OWNER)
    strange = Evacuated(host="kvm8", until=LATER, proof="x", owner="other")
    await agent.scopes.change_record(
        lambda it: msgspec.structs.replace(
            it, evacuated=(Evacuated(host="kvm0", until=LATER, proof="key:AAAA", owner=OWNER), ended, strange)
        )
    )
    agent.start(agent.claims.run(looks()))
    assert (await agent.call("020", "implement-network", epoch=3)).status == 0
    placement = agent.store.files[NET].placement
    assert (placement.epoch, placement.taken_from) == (3, ("kvm0",))
    assert agent.store.files["net-300"].placement.taken_from == ()
    await agent.clock.advance(5)
    assert {payload for _, payload in agent.sockets.sent} == set(payloads(NET, claim, [b"\0\0\0"])[0])
    # The end of the record is the end of the claim.
    await agent.moves.execute(set_evacuated("kvm0"))
    assert agent.store.files[NET].placement.taken_from == ()
    agent.sockets.sent.clear()
    await agent.clock.advance(5)
    assert agent.sockets.sent == []


def set_evacuated(host: str, **more: str) -> Call:
    return Call(
        call_id=f"e{host}",
        command=SET_EVACUATED,
        scope_id="",
        registration=msgspec.structs.replace(REGISTRATION, owner=""),
        payload=packed(SetEvacuated(host=host, **more)),  # type: ignore[arg-type]
    )


@simulated
async def test_a_signature_that_is_too_long_is_logged_once(agent: Agent) -> None:
    long = "key:" + base64.b64encode(bytes(2000)).decode()
    await taken(agent, "204", proof=f"{long},key:AAAA")
    await agent.clock.advance(200)
    assert {payload for _, payload in agent.sockets.sent} == set(
        payloads(NET, replace(NEW, host="kvm1"), [b"\0\0\0"])[0]
    )
    assert [it for it in agent.log.lines if "broadcast" in it] == [
        f"scope={NET} 1 signatures do not fit into a frame; they are not broadcast"
    ]


@simulated
async def test_links_are_looked_for_again_when_they_change_and_rarely_otherwise(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serving(agent)
    looked: list[float] = []
    links = agent.host.claim_wires

    def noted(scope_id: str, want: object) -> frozenset[ClaimWire]:
        looked.append(agent.clock.time())
        return links(scope_id, want)  # type: ignore[arg-type]

    monkeypatch.setattr(agent.host, "claim_wires", noted)
    await agent.clock.advance(2 * claims.LOOK_EVERY_S)
    assert len(looked) == 2
    await agent.call("050", "assign-ip")  # it has no further port
    await agent.clock.advance(5)
    assert len(looked) == 2
    agent.sockets.lost(PUBLIC)
    await agent.clock.advance(3)
    assert len(looked) == 3

    def failing(*_: object) -> frozenset[ClaimWire]:
        raise HostRefused("busy")

    followed = agent.sockets.followed
    monkeypatch.setattr(agent.host, "claim_wires", failing)
    agent.sockets.lost(PUBLIC)
    await agent.clock.advance(3)
    assert agent.sockets.followed == followed


@pytest.mark.mutation("links-that-are-built-are-looked-for-again", instead="True")
@pytest.mark.parametrize("why", ["a call works on the scope", "links cannot be listed"])
@simulated
async def test_links_that_are_not_there_yet_are_found_soon(
    agent: Agent, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serving(agent)
    slot = agent.scopes.get(NET)
    assert slot is not None

    def some(*_: object) -> frozenset[ClaimWire]:
        if why == "links cannot be listed":
            raise HostRefused("busy")
        return frozenset([GUEST])

    with monkeypatch.context() as building:
        building.setattr(agent.host, "claim_wires", some)
        async with agent.scopes.turn(slot, "a call"):
            agent.sockets.lost(PUBLIC)
            await agent.clock.advance(3)
    await agent.clock.advance(3)
    assert agent.sockets.followed == {PUBLIC, GUEST}
    assert await heard(agent, frame(NEW)) == "passive"


@simulated
async def test_a_bug_does_not_end_the_loop(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    await serving(agent)
    monkeypatch.setattr(agent.sockets, "follow", lambda wires: 1 // 0)
    agent.sockets.lost(PUBLIC)
    await agent.clock.advance(3)
    assert any("ZeroDivisionError" in it for it in agent.log.lines)
    monkeypatch.undo()
    await agent.clock.advance(3)
    assert await heard(agent, frame(NEW)) == "passive"


@pytest.mark.mutation("a-link-that-could-not-be-heard-is-tried-again", instead="True")
@simulated
async def test_links_are_followed_when_they_change_and_while_one_cannot_be_heard(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serving(agent)
    await agent.clock.advance(3)
    asked: list[list[str]] = []
    results = [["claims cannot be heard on eth1.1204: Too many open files"]] * 2

    def follow(wires: Iterable[ClaimWire]) -> list[str]:
        asked.append(sorted(it.link for it in wires))
        return results.pop() if results else []

    monkeypatch.setattr(agent.sockets, "follow", follow)
    await agent.clock.advance(10)
    assert asked == []
    agent.sockets.lost(PUBLIC)
    await agent.clock.advance(10)
    assert asked == [sorted([PUBLIC.link, GUEST.link])] * 3
