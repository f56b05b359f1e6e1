"""A host that is cut off fences its uplinks, and gives up what another host serves before it lifts the fence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest

from fakehost import Agent, simulated
from netloom.agent.host.occupied import Occupied
from netloom.agent.host.outside import Answer
from netloom.agent.scopes.isolation import SILENT_ROUNDS, Isolation
from netloom.render.want import Want

GUEST, OTHER_GUEST, PUBLIC = "eth1.1204", "eth1.1205", "eth2.101"  # uplinks, by the VLANs of Agent.live
UPLINKS = {"net-204": {GUEST, PUBLIC}, "net-205": {OTHER_GUEST, PUBLIC}}


class FakeOutside:
    """What is behind the ways out. ``owners``: who answers, by scope. ``fence_``: the kernel's; it outlives agents."""

    def __init__(self) -> None:
        self.alive = True
        self.fence_: set[str] = set()
        self.owners: dict[str, str] = {}
        self.probing: dict[str, str] = {}
        self.down: set[str] = set()
        self.is_lately = True  # what is heard comes on a way where something came last
        self.before = False  # something had come on another way before the silence
        self.has_neighbours = False
        self.looked = self.found_uplinks = 0
        self.called = self.called_neighbours = 0
        self.meanwhile: Callable[[], None] = lambda: None  # happens while the fence is changed
        self.asked: list[frozenset[str]] = []

    def watch(self, wants: dict[str, Want]) -> None:
        pass

    def heard_lately(self) -> bool:
        return self.alive and self.is_lately

    def heard(self) -> bool:
        self.looked += 1
        heard, self.before = self.alive or self.before, False
        return heard

    def call_neighbours(self) -> bool:
        self.called_neighbours += 1
        return self.has_neighbours

    def call(self, wants: dict[str, Want]) -> None:
        self.called += 1

    def uplinks(self, wants: dict[str, Want]) -> frozenset[str]:
        self.found_uplinks += 1
        return frozenset().union(*(UPLINKS[it] for it in wants))

    def unused(self, wants: dict[str, Want], links: Iterable[str]) -> frozenset[str]:
        return frozenset(links) - self.uplinks(wants)

    def fenced(self) -> frozenset[str]:
        return frozenset(self.fence_)

    def fence(self, links: Iterable[str]) -> None:
        self.fence_ |= set(links)
        self._happens()

    def lift(self, links: Iterable[str]) -> None:
        self.fence_ -= set(links)
        self._happens()

    def _happens(self) -> None:
        happens, self.meanwhile = self.meanwhile, lambda: None
        happens()

    def ask(
        self, wants: dict[str, Want], links: frozenset[str], timeout_s: float, claim: Callable[[str], bytes]
    ) -> list[Answer]:
        self.asked.append(links)
        answers = []
        for scope_id, want in wants.items():
            for link in sorted(UPLINKS[scope_id] & links):
                address = want.announce[0].ip
                found = Occupied(
                    {address: self.owners[scope_id]} if scope_id in self.owners else {},
                    {address: self.probing[scope_id]} if scope_id in self.probing else {},
                    {address: "no link"} if link in self.down else {},
                )
                answers.append(Answer(link, scope_id, found))
        return answers


class Followed:
    """An agent with two networks whose ways out are simulated."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.outside = FakeOutside()
        self.start()

    def start(self) -> None:
        agent = self.agent
        self.isolation = Isolation(agent.scopes, agent.upkeep, self.outside, agent.log, agent.clock)
        agent.start(self.isolation.run())

    async def cut_off(self) -> None:
        self.outside.alive = False
        await self.agent.clock.advance(SILENT_ROUNDS + 1)
        assert self.outside.fence_ == {GUEST, OTHER_GUEST, PUBLIC}

    async def hear(self, *links: str) -> None:
        for link in links:
            self.isolation.hear(link)
        await self.agent.clock.advance(0.3)

    def gate(self, scope_id: str) -> str:
        slot = self.agent.scopes.get(scope_id)
        assert slot is not None
        return slot.gate


async def followed(agent: Agent) -> Followed:
    await agent.live("204", "205")
    return Followed(agent)


@pytest.mark.mutation("a-silent-host-fences-its-uplinks")
@simulated
async def test_a_host_that_hears_nobody_asks_for_a_sign_of_life_and_then_fences_its_uplinks(agent: Agent) -> None:
    it = await followed(agent)
    await agent.clock.advance(10)
    assert it.outside.called == 0
    it.outside.alive = False
    await agent.clock.advance(SILENT_ROUNDS - 1)
    assert it.outside.called == SILENT_ROUNDS - 1
    assert it.outside.fence_ == set()
    await agent.clock.advance(1)
    assert it.outside.fence_ == {GUEST, OTHER_GUEST, PUBLIC}
    assert "fenced: nobody is heard" in agent.log.lines[-1]
    await agent.clock.advance(60)
    assert sum("fenced" in line for line in agent.log.lines) == 1
    assert it.outside.called > 50  # the first answer shows that somebody is there again
    assert [it.gate(scope) for scope in UPLINKS] == ["open", "open"]  # VMs on this host are served


@simulated
async def test_a_sign_of_life_in_time_is_enough(agent: Agent) -> None:
    it = await followed(agent)
    for _ in range(5):
        it.outside.alive = False
        await agent.clock.advance(SILENT_ROUNDS - 1.5)
        it.outside.alive = True
        await agent.clock.advance(1.5)
    assert it.outside.fence_ == set()


@pytest.mark.mutation("what-came-before-the-silence-does-not-end-it", instead="heard")
@simulated
async def test_frames_that_came_before_the_silence_do_not_delay_the_fence(agent: Agent) -> None:
    it = await followed(agent)
    await agent.clock.advance(10)
    it.outside.alive, it.outside.before = False, True
    await agent.clock.advance(SILENT_ROUNDS)
    assert it.outside.fence_ == {GUEST, OTHER_GUEST, PUBLIC}


@simulated
async def test_a_host_that_is_heard_looks_at_few_links(agent: Agent) -> None:
    it = await followed(agent)
    await agent.clock.advance(100)
    assert (it.outside.looked, it.outside.called_neighbours, it.outside.called) == (0, 0, 0)


@simulated
async def test_a_host_whose_neighbours_answer_looks_at_few_links(agent: Agent) -> None:
    """Nothing comes by itself."""
    it = await followed(agent)
    it.outside.has_neighbours, it.outside.alive = True, False
    asked = it.outside.call_neighbours

    def call_neighbours() -> bool:
        it.outside.alive = True
        return asked()

    def heard_lately() -> bool:
        alive, it.outside.alive = it.outside.alive, False
        return alive

    it.outside.call_neighbours = call_neighbours  # type: ignore[method-assign]
    it.outside.heard_lately = heard_lately  # type: ignore[method-assign]
    await agent.clock.advance(100)
    assert it.outside.fence_ == set()
    assert it.outside.called_neighbours == pytest.approx(50, abs=1)
    assert (it.outside.looked, it.outside.called) == (0, 0)


@simulated
async def test_frames_on_a_link_where_none_came_for_long_are_a_sign_of_life(agent: Agent) -> None:
    it = await followed(agent)
    it.outside.is_lately, it.outside.has_neighbours = False, True
    await agent.clock.advance(100)
    assert it.outside.fence_ == set()
    assert it.outside.called > 0  # machines behind all ways out


@simulated
async def test_an_uplink_is_asked_about_when_it_hears_somebody_and_serves_again(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    await it.hear(GUEST)
    assert it.outside.asked == [{GUEST}]
    assert it.outside.fence_ == {OTHER_GUEST, PUBLIC}
    await it.hear(PUBLIC, OTHER_GUEST)
    assert it.outside.asked[1:] == [{PUBLIC, OTHER_GUEST}]
    assert it.outside.fence_ == set()
    assert [it.gate(scope) for scope in UPLINKS] == ["open", "open"]


@pytest.mark.mutation("a-scope-that-was-taken-over-is-given-up")
@simulated
async def test_what_another_host_serves_is_given_up_before_the_fence_is_lifted(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    it.outside.owners["net-204"] = "02:00:00:00:00:99"
    gates: list[str] = []
    lift = it.outside.lift

    def noted(links: Iterable[str]) -> None:
        gates.append(it.gate("net-204"))
        lift(links)

    it.outside.lift = noted  # type: ignore[method-assign]
    await it.hear(GUEST, PUBLIC)
    assert gates == ["passive"]
    assert it.outside.fence_ == {OTHER_GUEST}
    assert it.gate("net-205") == "open"
    assert "net-204" not in agent.host.present
    assert any("passive: 10.10.1.1 is answered by 02:00:00:00:00:99" in line for line in agent.log.lines)


@simulated
async def test_an_uplink_stays_fenced_until_what_another_host_serves_is_given_up(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    it.outside.owners["net-204"] = "02:00:00:00:00:99"
    agent.store.full = True
    await it.hear(GUEST)
    await agent.clock.advance(5)
    assert GUEST in it.outside.fence_
    agent.store.full = False
    await agent.clock.advance(1)
    assert it.outside.fence_ == {OTHER_GUEST, PUBLIC}
    assert it.gate("net-204") == "passive"


@simulated
async def test_of_two_hosts_that_come_back_at_once_the_stronger_claim_goes_first(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    it.outside.probing["net-204"] = "02:00:00:00:00:99"
    await it.hear(GUEST)
    await agent.clock.advance(2)
    assert GUEST in it.outside.fence_
    it.outside.owners = it.outside.probing
    await agent.clock.advance(1)
    assert it.gate("net-204") == "passive"


@simulated
async def test_an_uplink_that_is_down_again_is_asked_about_when_it_hears_somebody(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    it.outside.down.add(GUEST)
    await it.hear(GUEST)
    await agent.clock.advance(30)
    assert GUEST in it.outside.fence_
    assert len(it.outside.asked) == 1
    it.outside.down.clear()
    await it.hear(GUEST)
    assert GUEST not in it.outside.fence_


@simulated
async def test_an_uplink_without_a_carrier_is_fenced_and_asked_about_unless_it_was_for_a_moment(agent: Agent) -> None:
    it = await followed(agent)
    await agent.clock.advance(1)
    it.isolation.uplink_changed(GUEST, False)
    it.isolation.uplink_changed("vnet7", False)  # no uplink of a network
    await agent.clock.advance(0.1)
    assert it.outside.fence_ == {GUEST}
    it.isolation.uplink_changed(GUEST, True)
    await agent.clock.advance(0.1)
    assert it.outside.fence_ == set()
    assert it.outside.asked == []
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(5)
    it.isolation.uplink_changed(GUEST, True)
    await agent.clock.advance(0.1)
    assert it.outside.fence_ == {GUEST}
    await it.hear(GUEST)
    assert it.outside.fence_ == set()
    assert it.outside.asked == [{GUEST}]


@simulated
async def test_a_carrier_that_comes_back_while_its_uplink_is_fenced_is_noticed(agent: Agent) -> None:
    it = await followed(agent)
    await agent.clock.advance(1)
    it.outside.meanwhile = lambda: it.isolation.uplink_changed(GUEST, True)
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(0.1)
    assert it.outside.fence_ == set()
    assert it.outside.asked == []


@simulated
async def test_a_carrier_that_goes_while_the_fence_is_lifted_is_noticed(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    it.outside.meanwhile = lambda: it.isolation.uplink_changed(GUEST, False)
    await it.hear(GUEST)
    await agent.clock.advance(1)
    assert GUEST in it.outside.fence_


@simulated
async def test_an_uplink_without_a_carrier_stays_fenced_whatever_was_heard(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    it.isolation.uplink_changed(GUEST, False)
    await it.hear(GUEST, PUBLIC)
    assert it.outside.fence_ == {GUEST, OTHER_GUEST}


async def stays_fenced_until_it_was_asked_about(it: Followed) -> None:
    await it.agent.clock.advance(0.5)
    assert GUEST in it.outside.fence_
    await it.hear(GUEST)
    assert GUEST not in it.outside.fence_
    assert it.outside.asked == [{GUEST}]


@pytest.mark.mutation("a-silent-uplink-is-asked-about-after-a-moment-without-carrier")
@simulated
async def test_an_uplink_that_was_silent_before_its_carrier_went_for_a_moment_is_asked_about(agent: Agent) -> None:
    """As when the switch starts again that has cut the host off."""
    it = await followed(agent)
    await agent.clock.advance(1.5)
    it.outside.alive = False
    await agent.clock.advance(SILENT_ROUNDS - 1)
    assert it.outside.fence_ == set()
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(1)
    assert it.outside.fence_ == {GUEST, OTHER_GUEST, PUBLIC}
    it.isolation.uplink_changed(GUEST, True)
    it.outside.alive = True
    await stays_fenced_until_it_was_asked_about(it)


@pytest.mark.mutation("a-long-absence-is-asked-about-after-another-moment")
@simulated
async def test_an_uplink_that_was_away_for_long_is_asked_about_after_another_moment(agent: Agent) -> None:
    it = await followed(agent)
    await agent.clock.advance(1)
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(5)
    it.isolation.uplink_changed(GUEST, True)
    await agent.clock.advance(5)
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(0.5)
    it.isolation.uplink_changed(GUEST, True)
    await stays_fenced_until_it_was_asked_about(it)


@pytest.mark.mutation("a-new-agent-keeps-the-fence")
@simulated
async def test_a_new_agent_asks_about_what_an_earlier_one_has_fenced(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    agent.restart()
    it.outside.alive = True
    it.start()
    await agent.clock.advance(30)
    assert it.outside.fence_ == {GUEST, OTHER_GUEST, PUBLIC}
    await it.hear(*it.outside.fence_)
    assert it.outside.fence_ == set()
    assert it.outside.asked


@simulated
async def test_a_host_without_networks_has_no_fence(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    for network_id in ("204", "205"):
        assert (await agent.call("131", "destroy-network", network_id=network_id)).status == 0
    await agent.clock.advance(2)
    assert it.outside.fence_ == set()
    await agent.clock.advance(60)
    assert it.outside.fence_ == set()


@simulated
async def test_an_uplink_that_no_network_uses_any_more_is_not_fenced(agent: Agent) -> None:
    it = await followed(agent)
    await agent.clock.advance(1)
    it.isolation.uplink_changed(OTHER_GUEST, False)
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(5)
    assert it.outside.fence_ == {GUEST, OTHER_GUEST}
    assert (await agent.call("131", "destroy-network", network_id="205")).status == 0
    await agent.clock.advance(2)
    assert it.outside.fence_ == {GUEST}


@pytest.mark.mutation("a-fence-stays-until-its-networks-are-known", instead="self._fenced")
@simulated
async def test_a_fence_stays_while_an_agent_that_starts_does_not_know_all_networks(agent: Agent) -> None:
    it = await followed(agent)
    await it.cut_off()
    agent.restart()
    slot = agent.scopes.get("net-205")
    assert slot is not None
    rendered, slot.rendered = slot.rendered, None
    it.outside.alive = True
    it.start()
    await agent.clock.advance(5)
    assert OTHER_GUEST in it.outside.fence_
    slot.rendered = rendered


@simulated
async def test_an_error_of_the_kernel_ends_no_round(agent: Agent) -> None:
    it = await followed(agent)
    heard = it.outside.heard_lately

    def fails() -> bool:
        raise RuntimeError("a bug")

    it.outside.heard_lately = fails  # type: ignore[method-assign]
    await agent.clock.advance(3)
    it.outside.heard_lately = heard  # type: ignore[method-assign]
    await it.cut_off()
    await asyncio.sleep(0)


@pytest.mark.mutation("a-carrier-that-is-back-needs-no-look", instead="True")
@simulated
async def test_a_host_that_builds_many_networks_does_not_look_for_its_uplinks_each_time(agent: Agent) -> None:
    it = await followed(agent)
    for at in range(100):  # new links in bridges, which have a carrier a moment later
        it.isolation.uplink_changed(f"eth1.{2000 + at}", False)
        it.isolation.uplink_changed(f"eth1.{2000 + at}", True)
        await agent.clock.advance(0.03)
    await agent.clock.advance(1)
    assert it.outside.found_uplinks == 0
    for at in range(100):
        it.isolation.uplink_changed(f"eth1.{2000 + at}", False)
    it.isolation.uplink_changed(PUBLIC, False)
    await agent.clock.advance(0.1)
    assert it.outside.found_uplinks == 1
    assert it.outside.fence_ == {PUBLIC}
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(0.1)
    assert it.outside.fence_ == {GUEST, PUBLIC}


@simulated
async def test_an_uplink_is_fenced_although_the_kernel_did_not_list_the_links_before(agent: Agent) -> None:
    it = await followed(agent)
    uplinks = it.outside.uplinks

    def fails(wants: dict[str, Want]) -> frozenset[str]:
        it.isolation.uplink_changed(PUBLIC, False)
        it.outside.uplinks = uplinks  # type: ignore[method-assign]
        raise RuntimeError("a bug")

    it.outside.uplinks = fails  # type: ignore[method-assign]
    it.isolation.uplink_changed(GUEST, False)
    await agent.clock.advance(0.2)
    assert it.outside.fence_ == {GUEST, PUBLIC}
