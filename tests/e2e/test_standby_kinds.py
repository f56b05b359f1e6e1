"""VPCs and shared networks survive their host, as isolated networks do (test_standby.py), and leave nothing behind."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from bed import faults
from bed.lab import Host, Vm
from bed.machines import until
from bed.observer import Observer, never_two
from bed.payloads import AclItem
from bed.standby import OUTSIDE, OUTSIDE6, PUBLIC_VLAN, ROUTER6, ScopeBed
from bed.standby_kinds import (
    BALANCED_PORT,
    CLOSED_PORT,
    NEW_APP_PORT,
    NEW_WEB_PORT,
    KindsBed,
    SharedBed,
    VpcBed,
    kinds_bed,
)
from e2e.networks import impatient, lease
from e2e.takeovers import returns_as_standby, watched
from guestbed.dhcp import message as dhcp_message
from guestbed.packets import broadcast_frame
from meanwhile import meanwhile
from netloom.guest.dhcp import MessageType

CLOSED = {"timeout_s": 0.4}
ASK_DHCP_EVERY_S = 0.05
NEW_OUTWARD_PORT = 8010  # for connections beside the flows

Record = Callable[[str, object], None]


@dataclass
class Kinds:
    """A VPC and a shared network that live as long as the bed."""

    make: KindsBed
    vpc: VpcBed
    shared: SharedBed

    @property
    def all(self) -> list[ScopeBed]:
        return [self.vpc, self.shared]


@pytest.fixture(scope="module")
def the_kinds() -> Iterator[Kinds]:
    with kinds_bed() as make:
        it = Kinds(make, make.vpc(1), make.shared(1))
        it.vpc.build()
        it.shared.build()
        yield it


@pytest.fixture
def kinds(the_kinds: Kinds) -> Iterator[Kinds]:
    """Both are on one host, and their standby is ready."""
    _make_ready(the_kinds)
    if the_kinds.shared.active is not the_kinds.vpc.active:
        the_kinds.shared.serve_on(the_kinds.vpc.active)
        _make_ready(the_kinds)
    assert the_kinds.shared.standby is the_kinds.vpc.standby
    yield the_kinds
    for it in the_kinds.all:
        it.settle()


def _make_ready(kinds: Kinds) -> None:
    for it in kinds.all:
        it.make_ready()


# --- what a VPC does beside its flows


def check_rules(it: VpcBed) -> None:
    """New connections: source NAT, static NAT, a balanced port, IPv6, and what the ACLs allow and deny."""
    web, app, internet = it.web, it.app, it.internet
    source, static, forwarded = (address.ip for address in it.public)
    assert internet.tcp(forwarded, BALANCED_PORT).server == app.name
    with web.serve_tcp(NEW_WEB_PORT, CLOSED_PORT), app.serve_tcp(NEW_APP_PORT, CLOSED_PORT):
        assert internet.tcp(static, NEW_WEB_PORT).server == web.name
        assert web.tcp(app.ip, NEW_APP_PORT).saw == web.ip
        for client, address in ((internet, static), (web, app.ip), (app, web.ip)):
            assert not client.tcp(address, CLOSED_PORT, **CLOSED).ok, (client, address)
    with web.serve_tcp(NEW_WEB_PORT, CLOSED_PORT, address=it.web6):
        assert internet.tcp(it.web6, NEW_WEB_PORT).saw == ROUTER6
        assert app.tcp(it.web6, NEW_WEB_PORT).saw == it.app6
        for client in (internet, app):
            assert not client.tcp(it.web6, CLOSED_PORT, **CLOSED).ok, client
    with internet.serve_tcp(NEW_OUTWARD_PORT):
        assert web.tcp(OUTSIDE, NEW_OUTWARD_PORT).saw == static
        assert app.tcp(OUTSIDE, NEW_OUTWARD_PORT).saw == source
    with internet.serve_tcp(NEW_OUTWARD_PORT, address=OUTSIDE6):
        assert web.tcp(OUTSIDE6, NEW_OUTWARD_PORT).saw == it.web6


# --- DHCP answers


@dataclass
class DhcpAnswers:
    """Each request has its own number. ``hosts``: the names of the hosts that answered it, in the order of numbers."""

    hosts: list[list[str]] = field(default_factory=list)

    def never_two(self, *turns: Host) -> None:
        """Assert that no request had two answers, and that these hosts answered, one after the other."""
        assert all(len(it) <= 1 for it in self.hosts), [it for it in self.hosts if len(it) > 1]
        found = [name for name, _ in itertools.groupby(it[0] for it in self.hosts if it)]
        assert found == [it.name for it in turns], found


@contextmanager
def asking_dhcp(it: SharedBed, vm: Vm) -> Iterator[DhcpAnswers]:
    """A VM asks for a lease all the time. The answers are counted at the ports of the hosts, after the block."""
    answers = DhcpAnswers()
    names = {host.port("eth1", it.vlan): host.name for host in it.candidates}
    listening = it.bed.fabric.client.start("dhcp_answers", list).wait_ready()
    discover = dhcp_message(MessageType.DISCOVER, vm.mac)
    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1
        data = discover[:4] + asked.to_bytes(4) + discover[8:]
        vm.send_frame(broadcast_frame(vm.mac, data).hex())
        time.sleep(ASK_DHCP_EVERY_S)

    with meanwhile(ask):
        yield answers
    found: dict[int, list[str]] = {}
    for port, number in listening.stop():
        if port in names:
            found.setdefault(number, []).append(names[port])
    answers.hosts = [found.get(number, []) for number in range(1, asked + 1)]


# --- take-overs


def test_a_vpc_and_a_shared_network_survive_a_power_cut(kinds: Kinds, record_testsuite_property: Record) -> None:
    """One host has both. Their flows and services go on, and the old host stands by when it is back."""
    vpc, shared = kinds.vpc, kinds.shared
    before = vpc.served(), shared.served()
    active, standby = vpc.active, vpc.standby
    check_rules(vpc)
    with (
        asking_dhcp(shared, shared.vms[0]) as answers,
        watched(shared, "active", "standby", each=0, udp=0, over6=0) as services,
        watched(vpc, "active", "standby", each=3) as watch,
    ):
        active.power_cut()
        outages = [watch.takes_over(standby), services.takes_over(standby)]
        record_testsuite_property("outages_s", [round(each, 3) for each in outages])
        assert (vpc.served(), shared.served()) == before
        check_rules(vpc)
        faults.boot(active)
        for it in kinds.all:
            returns_as_standby(it, active, standby)
    answers.never_two(active, standby)


@pytest.mark.long
@pytest.mark.parametrize("what", ["the agent", "all"])
def test_a_frozen_host_and_the_standby_never_answer_both(kinds: Kinds, what: faults.What) -> None:
    vpc, shared = kinds.vpc, kinds.shared
    active, standby = vpc.active, vpc.standby
    with (
        asking_dhcp(shared, shared.vms[0]) as answers,
        watched(shared, "active", "standby", each=0, udp=0, over6=0) as services,
        watched(vpc, "active", "standby") as watch,
    ):
        with faults.frozen(active, what):
            watch.takes_over(standby)
            services.takes_over(standby)
        watch.goes_on(standby)
        for it in kinds.all:
            returns_as_standby(it, active, standby)
    answers.never_two(active, standby)


@pytest.mark.long
def test_a_host_that_is_cut_off_and_the_standby_never_answer_both(kinds: Kinds) -> None:
    vpc, shared = kinds.vpc, kinds.shared
    active, standby = vpc.active, vpc.standby
    with (
        asking_dhcp(shared, shared.vms[0]) as answers,
        watched(shared, "active", "standby", each=0, udp=0, over6=0) as services,
        watched(vpc, "active", "standby") as watch,
    ):
        active.partition("all")
        watch.takes_over(standby)
        services.takes_over(standby)
        active.heal()
        watch.goes_on(standby)
        for it in kinds.all:
            returns_as_standby(it, active, standby)
    answers.never_two(active, standby)


@pytest.mark.long
def test_a_vpc_and_a_shared_network_are_handed_over(kinds: Kinds) -> None:
    """And CloudStack's next commands go to the other host."""
    for it in kinds.all:
        active, standby = it.active, it.standby
        with it.observer() as observer, it.flows(2, udp=1, over6=1, every_s=0.1) as flows:
            flows.wait_open()
            time.sleep(2.5)
            it.operator.run("move", it.scope, "--to", standby.address, hosts=it.candidates)
            observer.wait_for(standby)
            assert flows.go_on(), flows.story()
            assert until(it.is_ready, seconds=60), it.shown()
            assert it.active is standby
        never_two(observer, active, standby)


# --- changes while the standby is there


@contextmanager
def built(it: VpcBed | SharedBed) -> Iterator[None]:
    """A network that is there within the block only."""
    it.build()
    try:
        yield
    finally:
        it.settle()
        it.delete()


@pytest.mark.long
def test_changes_of_a_vpc_reach_its_standby(kinds: Kinds) -> None:
    """A new tier with a VM, a rule of an ACL, a removed tier: each is there after the take-over."""
    it = kinds.make.vpc(2)
    with built(it):
        _vpc_changes(it)


def _vpc_changes(it: VpcBed) -> None:
    it.make_ready()
    assert until(it.is_ready, seconds=60)
    third, fourth = it.add_tier(3), it.add_tier(4)
    data = it.add_vm(third, "data-1")
    assert until(it.is_ready), it.shown()
    gone = it.add_vm(fourth, "gone-1")
    assert until(it.is_ready), it.shown()
    second = it.add_vm(third, "data-2", 46)
    assert until(it.is_ready), it.shown()
    third.replace_acl([AclItem(1, "allow", "ingress", "tcp", 5432), AclItem(2, "allow", "egress", "all")])
    assert until(it.is_ready), it.shown()
    gone.destroy()
    nic = fourth.nics[0]
    fourth.expunge_vm(nic)
    fourth.delete()
    it.vms.remove(gone)
    it.nics.remove(nic)
    assert until(it.is_ready), it.shown()
    before = it.served()
    links = _links(it, it.active)
    assert links == _links(it, it.standby), "the same tiers on both hosts"
    with watched(it, "active", "standby") as watch, data.serve_tcp(5432, CLOSED_PORT):
        kept = it.web.open(data.ip, 5432)
        time.sleep(2.5)
        watch.active.power_cut()
        watch.takes_over(watch.standby)
        assert kept.ask() == "answered"
        check_rules(it)
        assert it.web.tcp(data.ip, 5432).saw == it.web.ip
        assert not it.web.tcp(data.ip, CLOSED_PORT, **CLOSED).ok
        assert it.served() == before
        assert second.ping(third.facts.gateway).ok
        with it.internet.serve_tcp(NEW_OUTWARD_PORT):
            assert data.tcp(OUTSIDE, NEW_OUTWARD_PORT).saw == it.public[0].ip
        assert _links(it, watch.standby) == links
        # CloudStack's commands reach the new active host, while the other one is dead.
        with impatient(it.cloud, timeout_s=25):
            third.replace_acl([])
        assert not it.web.tcp(data.ip, 5432, **CLOSED).ok
        faults.boot(watch.active)
        returns_as_standby(it, watch.active, watch.standby)


def _links(it: ScopeBed, host: Host) -> list[str]:
    """The links in the namespace of the scope, with their addresses."""
    with host.within(it.device.namespace) as inside:
        told = inside.sh("ip -4 -o addr show")
    return sorted(" ".join(line.split()[1:4]) for line in told.splitlines())


@pytest.mark.long
def test_changes_of_a_shared_network_reach_its_standby(kinds: Kinds) -> None:
    """A new VM, an expunged one, a password: the other host answers accordingly after the take-over."""
    it = kinds.make.shared(2)
    with built(it):
        _shared_changes(it)


def _shared_changes(it: SharedBed) -> None:
    it.make_ready()
    third = it.add_vm("sh-2-3", 63)
    assert until(it.is_ready), it.shown()
    first, second = it.network.nics[:2]
    it.network.reset_password(first, "correct horse")
    it.network.expunge_vm(second)
    expunged = it.vms[1]
    it.vms.remove(expunged)
    assert until(it.is_ready), it.shown()
    before = it.served()
    ask = ["curl", "-s", "-m", "20", "-H", "DomU_Request: send_my_password", f"http://{it.device_ip}:8080/"]
    with asking_dhcp(it, third) as answers, watched(it, "active", "standby", each=0, udp=0, over6=0) as watch:
        watch.active.power_cut()
        watch.takes_over(watch.standby)
        assert it.served() == before
        assert it.vms[0].run(*ask).out == "correct horse"
        assert "lease of" not in lease(expunged, tries=2)
        with impatient(it.cloud, timeout_s=25):
            added = it.add_vm("sh-2-4", 64)
        assert "lease of" in lease(added)
        faults.boot(watch.active)
        returns_as_standby(it, watch.active, watch.standby)
    answers.never_two(watch.active, watch.standby)
    expunged.destroy()


# --- deletion


Make = Callable[[KindsBed, int], VpcBed | SharedBed]
KINDS: list[Make] = [KindsBed.vpc, KindsBed.shared]
# What is looked at. Its names have the number of the scope, of a network or of a VLAN in them.
LEFT = ("namespaces", "links", "files", "mounts", "processes", "nftables", "addresses", "routes", "rules")


def traces(it: VpcBed | SharedBed, host: Host) -> set[tuple[str, str]]:
    """What the host has of the network, as (category, name)."""
    numbers = {it.scope.rpartition("-")[2]}
    for question in it.questions():
        numbers |= {str(question.vlan)} - {str(PUBLIC_VLAN)}
    if isinstance(it, VpcBed):
        numbers |= {tier.facts.network_id for tier in it.tiers}
    named = re.compile(rf"(?<![0-9.:])({'|'.join(sorted(numbers))})(?![0-9])")
    found = host.objects()
    return {(kind, name) for kind in LEFT for name in found[kind] if named.search(name)}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=["vpc", "shared"])
@pytest.mark.parametrize("dead", ["", "standby", "witness", "active"])
def test_a_deleted_network_leaves_nothing_on_any_host(kinds: Kinds, kind: Make, dead: str) -> None:
    """Also if one of the three is dead then, and comes back later. Its copy serves nobody when it is back."""
    it = kind(kinds.make, 3)
    it.build()
    it.make_ready()
    hosts = {"active": it.active, "standby": it.standby, "witness": it.witness}
    told = it.questions()
    for name in ("active", "standby"):
        found = traces(it, hosts[name])
        assert {category for category, _ in found} >= {"namespaces", "links", "nftables", "processes"}
        assert ("files", f"/var/lib/netloom/scopes/{it.scope}.json") in found
    assert traces(it, hosts["witness"]) == set()
    with Observer(it.bed, told, hosts=it.candidates) as observer:
        observer.wait_for(hosts["active"])
        if dead:
            hosts[dead].power_cut()
        if dead == "active":
            observer.wait_for(hosts["standby"])
        with impatient(it.cloud, timeout_s=25):
            it.delete()
        assert until(lambda: observer.serving() == set()), observer.story()
        if dead:
            faults.boot(hosts[dead])
        left: dict[str, set[tuple[str, str]]] = {}

        def is_gone() -> bool:
            left.clear()
            left.update({host.name: found for host in it.candidates if (found := traces(it, host))})
            return not left and all(faults.agents_of(host) for host in it.candidates)

        assert until(is_gone, seconds=60, pause_s=0.5), left
        assert observer.serving() == set()
    never_two(observer, *([hosts["active"], hosts["standby"]] if dead == "active" else [hosts["active"]]))
