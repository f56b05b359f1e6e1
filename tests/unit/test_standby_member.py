"""A member does what is decided in the safe order: disk, kernel, network. Recorded messages change nothing."""

from __future__ import annotations

import errno

import pytest
from msgspec.structs import replace

from netloom.agent.standby.member import NANOSECONDS
from netloom.files import NotFlushed
from netloom.heartbeatwire import Echo, pack, unpack
from netloom.standby.decision import Local
from unit.standby_group import KEY, PAIR, SPEC, Group, Host, full_disk


def test_the_first_host_serves_and_all_know() -> None:
    group = Group().start()
    group.run(10)
    assert [(it.view.term, it.view.active) for it in group.hosts.values()] == [(0, "kvm1")] * 3
    assert group.first.view.serves and not group.second.view.serves
    assert 0.8 <= group.first.view.lease_s <= 1.0
    assert group.first.view.partner_ready
    assert set(group.second.view.heard) == {"kvm1", "kvm3"}
    assert max(group.second.view.heard.values()) <= 0.2
    assert group.first.log.with_("kvm2") == []  # nothing was lost


@pytest.mark.mutation("a-lease-that-is-over-ends")
def test_a_lease_that_the_kernel_did_not_count_while_the_machine_slept_is_ended() -> None:
    group = Group().start()
    for it in (group.second, group.witness):
        it.stop()
    group.now_ns += 3 * NANOSECONDS
    group.first.leases.until = {SPEC.mark: group.now + 0.5}
    assert group.first.member is not None
    group.first.member.tick(group.now)
    assert not group.first.lives
    group.second.start()
    group.run(2)
    assert group.serving == ["kvm1"]


def test_the_second_host_takes_over_when_the_first_is_dead_and_says_why() -> None:
    group = Group().start()
    group.first.stop()
    group.first.leases.until.clear()
    died = group.now
    while not group.second.lives:
        group.run(0.1)
        assert group.now < died + 2
    view = group.second.view
    assert (view.term, view.active, view.serves) == (1, "kvm2", True)
    assert view.last is not None
    assert view.last.reason.startswith("no heartbeat of kvm1 for 1.") and view.last.reason.endswith("kvm3 voted")
    assert view.last.outage_s is not None and 1.0 < view.last.outage_s <= 1.5
    group.run(3)
    assert len(group.second.log.with_("this host serves in term 1: no heartbeat of kvm1")) == 1
    assert len(group.second.log.with_("standby 0000002a: no heartbeat of kvm1 for")) == 1
    group.first.start()
    group.run(4)
    assert group.serving == ["kvm2"]
    assert len(group.second.log.with_("heartbeats of kvm1 again")) == 1


def test_a_turn_that_is_given_away_is_taken_at_once() -> None:
    group = Group().start()
    assert group.first.member is not None
    group.first.member.set_local(Local(gives_way=True), group.now)
    group.settle()
    assert group.serving == ["kvm2"]
    last = group.second.view.last
    assert last is not None and last.reason == "kvm1 gave its turn away"
    assert last.outage_s is not None and last.outage_s <= 0.1
    assert group.first.log.with_("kvm1 gives its turn away")


@pytest.mark.mutation("a-turn-is-over-before-it-is-told")
def test_a_turn_is_not_given_away_while_the_lease_cannot_be_ended() -> None:
    group = Group().start()
    assert group.first.member is not None
    group.first.leases.refuses = True
    group.first.member.set_local(Local(gives_way=True), group.now)
    group.settle()
    assert group.serving == ["kvm1"]
    group.run(3)  # never two
    assert group.serving == ["kvm2"]
    assert len(group.first.log.with_("its lease cannot be ended: no nftables today")) == 1


@pytest.mark.mutation("what-is-not-written-has-not-happened")
def test_a_host_that_cannot_write_its_file_takes_nothing_over() -> None:
    group = Group().start()
    group.second.refusal = full_disk()
    group.first.stop()
    group.run(10)
    assert group.serving == []
    assert group.second.view.term == 0
    assert not [it for it in group.beats_of("kvm2") if it.term or it.active == 1]
    assert len(group.second.log.with_("its file cannot be written: No space left on device")) == 1
    group.second.refusal = None
    group.run(2)
    assert group.serving == ["kvm2"]
    assert group.second.log.with_("its file can be written again")


@pytest.mark.mutation("only-what-had-its-effect-is-confirmed")
def test_a_vote_that_cannot_be_written_is_not_given_and_its_message_not_confirmed() -> None:
    group = Group().start()
    group.witness.refusal = full_disk()
    group.first.stop()
    group.run(10)
    assert group.serving == []
    wanting = {it.sent for it in group.beats_of("kvm2") if it.wants}
    confirmed = {it.heard[1].sent for it in group.beats_of("kvm3") if it.heard[1]}
    assert wanting
    assert not [it for it in group.beats_of("kvm3") if it.voted]
    # Some are heard while the promise to the first host lasts; those that would have been a vote are not.
    assert max(confirmed) < max(wanting) - 5_000_000_000
    group.witness.refusal = None
    group.run(2)
    assert group.serving == ["kvm2"]


def test_an_active_host_that_cannot_write_its_file_goes_on_and_keeps_its_turn() -> None:
    group = Group().start()
    group.first.refusal = full_disk()
    assert group.first.member is not None
    group.first.member.set_local(Local(gives_way=True), group.now)
    for _ in range(50):
        group.run(0.1)
        assert group.serving == ["kvm1"]
    assert len(group.first.log.with_("cannot be written")) == 1
    group.first.refusal = None
    group.run(2)
    assert group.serving == ["kvm2"]


@pytest.mark.mutation("an-uncertain-file-promises-nothing")
def test_a_host_whose_file_may_be_either_says_nothing_until_it_is_written() -> None:
    group = Group().start()
    group.second.refusal = NotFlushed(errno.EIO, "Input/output error")
    group.first.stop()
    while not group.second.log.with_("cannot be written"):
        group.run(0.1)
    count = len(group.beats_of("kvm2"))
    group.first.start()
    group.run(5)
    assert len(group.beats_of("kvm2")) == count
    assert group.serving == ["kvm1"]  # the witness confirms it
    group.second.refusal = None
    group.run(2)
    assert len(group.beats_of("kvm2")) > count
    assert group.serving == ["kvm1"]


@pytest.mark.mutation("a-new-agent-keeps-its-turn", instead="self._local or Local(ready=False)")
def test_a_new_agent_goes_on_with_what_is_left_of_the_lease() -> None:
    group = Group().start()
    group.first.stop()
    group.run(0.3)
    group.first.start(local=None)
    assert group.first.view.serves
    for _ in range(30):
        group.run(0.1)
        assert group.serving == ["kvm1"]
    assert group.first.view.term == 0
    assert group.first.log.with_("lease of this host has run out") == []


def test_a_new_agent_whose_turn_is_over_ends_what_is_left() -> None:
    group = Group().start()
    group.first.stop()
    group.first.disk = replace(group.first.disk, kept=replace(group.first.disk.kept, released=True))
    assert group.first.lives
    group.first.start()
    assert not group.first.lives


@pytest.mark.mutation("a-confirmation-is-of-this-boot", instead="heard is not None")
def test_a_confirmation_of_an_earlier_boot_renews_nothing() -> None:
    group = Group().start()
    beat = group.beats_of("kvm2")[-1]
    assert beat.grants == 0
    for it in group.hosts.values():
        it.stop()
    group.run(1.5)  # the lease is over
    group.first.start()
    echo = Echo(b"kvm1%04d" % group.first.boots, group.now_ns)
    later = replace(
        beat,
        seq=beat.seq + 100,
        heard=(Echo(b"kvm10001", group.now_ns - 1), None, None),
        greeting=(echo, None, None),
        voted=0,
        wants=0,
    )
    group.first.hear(pack(later, KEY))
    assert not group.first.lives
    again = replace(later, seq=later.seq + 1, heard=(Echo(echo.boot, group.now_ns - 1), None, None))
    group.first.hear(pack(again, KEY))
    assert group.first.lives


def test_recorded_messages_neither_prolong_a_promise_nor_are_heard() -> None:
    """The first host dies, and whoever has recorded it sends all of its messages again, without end."""
    group = Group().start()
    recorded = [it for sender, it in group.messages if sender == "kvm1"]
    group.first.stop()
    died = group.now

    def replay() -> None:
        for it in recorded[-50:]:
            group.second.hear(it)
            group.witness.hear(it)

    while not group.second.lives:
        group.run(0.1, each=replay)
        assert group.now < died + 2
    assert group.second.view.heard["kvm1"] > 1.0


def test_recorded_messages_are_not_heard_by_agents_that_have_just_started() -> None:
    """They know no numbers, but nothing that was recorded repeats a clock of their boot."""
    group = Group().start()
    recorded = list(group.messages)
    group.first.stop()
    for it in (group.second, group.witness):
        it.stop()
        it.start()

    def replay() -> None:
        for sender, it in recorded[-100:]:
            for host in (group.second, group.witness):
                if host.name != sender:
                    host.hear(it)

    started = group.now
    while not group.second.lives:
        group.run(0.1, each=replay)
        assert group.now < started + 4
    assert group.second.view.heard["kvm1"] == float("inf")
    assert group.witness.view.heard["kvm1"] == float("inf")
    # The other members prove themselves meanwhile.
    assert group.second.view.heard["kvm3"] < 0.3


def test_messages_of_the_boot_before_are_not_accepted_after_a_restart_of_the_sender() -> None:
    group = Group().start()
    group.cut |= {("kvm1", "kvm2")}  # these are recorded, and did not arrive
    group.run(0.3)
    recorded = [it for sender, it in group.messages[-12:] if sender == "kvm1"]
    group.cut.clear()
    group.first.stop()
    group.first.start()
    group.run(0.5)
    heard = group.beats_of("kvm2")[-1].heard[0]
    assert heard is not None and heard.boot == b"kvm10002"
    for it in recorded:
        group.second.hear(it)
    assert group.second.member is not None
    message = group.second.member.message(group.now_ns)
    beat = unpack(message, KEY) if message else None
    assert beat is not None and beat.heard[0] == heard


def test_a_member_ignores_its_own_messages() -> None:
    group = Group().start()
    for sender, it in list(group.messages):
        group.hosts[sender].hear(it)
    group.run(1)
    assert group.serving == ["kvm1"]


def test_a_lost_witness_is_logged_once_and_changes_nothing() -> None:
    group = Group().start()
    group.cut_off("kvm3")
    group.run(5)
    assert group.serving == ["kvm1"]
    assert len(group.first.log.with_("no heartbeat of kvm3")) == 1
    for _ in range(10):  # some come through, with gaps
        group.cut.clear()
        group.run(0.2)
        group.cut_off("kvm3")
        group.run(0.8)
    assert len(group.first.log.with_("no heartbeat of kvm3")) == 1
    assert group.first.log.with_("kvm3 again") == []
    group.cut.clear()
    group.run(3)
    assert len(group.first.log.with_("heartbeats of kvm3 again")) == 1
    assert group.serving == ["kvm1"]


def test_a_host_that_nobody_confirms_says_so() -> None:
    group = Group().start()
    group.cut_off("kvm1")
    group.run(3)
    assert group.first.log.with_("the lease of this host has run out")
    assert group.serving == ["kvm2"]
    group.cut.clear()
    group.run(2)
    assert group.serving == ["kvm2"]
    assert group.first.view.term == 1
    assert group.first.log.with_("kvm2 begins term 1")


# --- a dead VLAN


@pytest.mark.mutation("a-host-with-a-dead-vlan-is-not-ready")
def test_an_active_host_whose_vlan_is_dead_gives_its_turn_away() -> None:
    group = Group().start()
    group.cut_off_vlan = {"kvm1"}
    group.run(0.3)
    assert group.serving == ["kvm1"]
    group.run(0.4)
    assert group.serving == ["kvm2"]
    last = group.second.view.last
    assert last is not None and last.reason == "kvm1 gave its turn away: nobody answers it on a VLAN"
    assert group.first.view.dead and not group.second.view.dead
    # Healed, it stands by; it is no reason to go back when the other VLAN dies a moment later.
    group.cut_off_vlan = set()
    group.run(1)
    assert group.first.view.silent == frozenset()
    group.cut_off_vlan = {"kvm2"}
    group.run(1)
    assert group.serving == ["kvm2"]
    group.run(2.5)
    assert group.serving == ["kvm1"], "it has been ready for some seconds"


def test_a_standby_whose_vlan_is_dead_changes_nothing() -> None:
    group = Group().start()
    group.cut_off_vlan = {"kvm2"}
    group.run(5)
    assert group.serving == ["kvm1"]
    assert not group.first.view.partner_ready
    group.cut_off_vlan = set()
    group.run(4)
    assert group.serving == ["kvm1"] and group.first.view.partner_ready


@pytest.mark.parametrize("dead", [{"kvm1"}, {"kvm1", "kvm2"}])
def test_where_nobody_else_is_on_the_vlan_nothing_changes(dead: set[str]) -> None:
    group = Group().start()
    group.neighbours = False
    group.cut_off_vlan = dead
    group.run(5)
    assert group.serving == ["kvm1"]
    assert group.first.view.partner_ready


def test_a_standby_with_a_dead_vlan_takes_over_from_a_dead_host() -> None:
    """Nobody else can, and the neighbours may be those that are silent."""
    group = Group().start()
    group.cut_off_vlan = {"kvm2"}
    group.run(5)
    assert group.second.view.dead
    group.first.cut_power(loses=False)
    group.run(4)
    assert group.serving == ["kvm2"]


def test_a_vlan_that_comes_and_goes_moves_the_turn_rarely() -> None:
    group = Group().start()
    for at in range(20):
        group.cut_off_vlan = {"kvm1"} if at % 2 else {"kvm2"}
        group.run(1)
    assert group.first.view.term <= 2


# --- the end of a group


def dissolve(host: Host) -> None:
    assert host.member is not None
    host.member.dissolve()


@pytest.mark.mutation("alone-needs-no-grant", instead="member.lease_until")
def test_a_group_whose_standby_is_dead_is_dissolved_and_its_active_host_needs_nobody() -> None:
    group = Group().start()
    group.second.stop()
    group.run(1)
    assert group.first.view.silent_s["kvm2"] >= 1
    dissolve(group.first)
    group.run(0.2)
    assert group.first.view.alone and group.witness.view.dissolved and not group.witness.view.alone
    assert group.first.log.with_("the group is dissolved: only kvm1 serves from now on")
    group.witness.stop()
    group.run(5)
    assert group.serving == ["kvm1"]
    assert group.first.view.serves
    group.first.stop()
    group.run(1)
    group.first.start()
    group.run(1)
    assert group.serving == ["kvm1"]  # its disk says so
    group.second.start()
    group.run(5)
    group.first.cut_power(loses=False)
    group.witness.start()
    group.run(10)
    assert group.serving == []  # the standby has heard of it


def test_a_standby_that_returns_hears_of_the_end_from_the_witness() -> None:
    group = Group().start()
    group.second.stop()
    dissolve(group.first)
    group.run(0.5)
    group.first.cut_power(loses=False)
    group.second.start()
    group.run(10)
    assert group.serving == [] and group.second.view.dissolved


def test_nobody_is_alone_without_a_promise() -> None:
    group = Group().start()
    for it in (group.second, group.witness):
        it.stop()
    dissolve(group.first)
    group.run(5)
    assert group.serving == [] and not group.first.view.alone
    group.witness.start()
    group.run(1)
    assert group.serving == ["kvm1"] and group.first.view.alone


# --- two hosts without a witness


def test_without_a_witness_the_second_host_takes_over_when_the_gateway_answers_it() -> None:
    group = Group(PAIR).start()
    group.first.cut_power(loses=False)
    died = group.now
    while not group.second.lives:
        group.run(0.1)
        assert group.now < died + 2
    last = group.second.view.last
    assert last is not None
    assert last.reason.startswith("no heartbeat of kvm1 for 1.") and last.reason.endswith(
        "the gateway answers this host"
    )
    assert last.outage_s is not None and 1.0 < last.outage_s <= 1.5
    group.first.start()
    group.run(4)
    assert group.serving == ["kvm2"] and group.first.view.active == "kvm2"


def test_without_a_witness_and_without_the_gateway_nobody_takes_over() -> None:
    group = Group(PAIR).start()
    group.upstream = set()
    group.run(5)
    assert group.serving == ["kvm1"]  # it is not needed while the hosts hear each other
    assert group.first.view.upstream_s > 4
    group.first.cut_power(loses=False)
    group.run(10)
    assert group.serving == []
    assert len(group.second.log.with_("no gateway answers this host")) == 1
    group.upstream = {"kvm2"}
    group.run(1.5)
    assert group.serving == ["kvm2"]
    assert group.second.log.with_("the gateway answers this host")


def test_without_a_witness_an_active_host_that_the_gateway_answers_goes_on_alone() -> None:
    group = Group(PAIR).start()
    group.second.stop()
    for _ in range(50):
        group.run(0.1)
        assert group.serving == ["kvm1"]
    group.upstream = set()
    group.run(1.2)
    assert group.serving == []
    assert group.first.log.with_("the lease of this host has run out: nobody answers it")
    group.upstream = {"kvm1"}
    group.run(1.5)
    assert (group.serving, group.first.view.term) == (["kvm1"], 0)


def test_without_a_witness_a_host_that_is_cut_off_from_all_stops() -> None:
    group = Group(PAIR).start()
    group.cut_off("kvm1")
    group.upstream = {"kvm2"}
    group.run(3)
    assert group.serving == ["kvm2"]
    group.cut.clear()
    group.upstream = {"kvm1", "kvm2"}
    group.run(3)
    assert (group.serving, group.first.view.active) == (["kvm2"], "kvm2")


def test_without_a_witness_a_term_that_cannot_be_written_is_not_begun() -> None:
    group = Group(PAIR).start()
    group.second.refusal = full_disk()
    group.first.cut_power(loses=False)
    group.run(5)
    assert group.serving == [] and group.second.view.term == 0
    group.second.refusal = None
    group.run(2)
    assert (group.serving, group.second.view.term) == (["kvm2"], 1)


def test_messages_of_a_witness_that_does_not_exist_are_ignored() -> None:
    """Whoever has the key of the group is one of its hosts, so this is a bug of the other one."""
    group = Group(PAIR).start()
    beat = replace(group.beats_of("kvm2")[-1], sender=2, heard=(None, None, None), greeting=(None, None, None))
    group.first.hear(pack(beat, KEY))
    group.run(1)
    assert group.serving == ["kvm1"]
