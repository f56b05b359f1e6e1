"""Hosts that die, are cut off, and return: never do two hosts answer for one address, and no network is lost.

The table of cases in docs/operators/moves.md names these tests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import asyncssh
import pytest

from bed import Bed
from bed.cloudstack import Failed
from bed.lab import Host, Internet, Vm, agent_command
from bed.machines import until
from bed.observer import Observer, Question
from bed.operator import Operator
from bed.payloads import Nic, PublicAddress
from e2e.networks import PUBLIC_VLAN, Life, impatient
from meanwhile import meanwhile
from netloom.claimwire import Claim, EvacuationClaim, PlacementClaim, payloads, signatures_in
from netloom.ethernet import ethernet_frame
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.proof import Credentials
from netloom.extension.ssh import Login
from netloom.secret import Secret

SOON = {"timeout_s": 0.5}
_LOG = "/var/log/netloom/agent.log"


@pytest.fixture
def operator(bed: Bed) -> Operator:
    return Operator(bed)


class Served:
    """A network with static NAT for a VM on the host that stays alive."""

    def __init__(self, life: Life, internet: Internet) -> None:
        self.life, self.internet = life, internet
        self.network = life.network
        self.scope = f"net-{life.network.facts.network_id}"
        self.vm: Vm
        self.nic: Nic
        life.network.implement()
        self.dead, self.alive = life.host, life.elsewhere
        self.vm, self.nic = life.vm("web-1", host=self.alive)
        self.address: PublicAddress = self.network.associate(life.public(1))
        self.network.enable_static_nat(self.address, self.nic)
        self.network.add_firewall_rule(self.address, "tcp", 22)
        state = self.dead.read(f"/var/lib/netloom/scopes/{self.scope}.json")
        self.owner: str = json.loads(state)["owner"]

    def answers(self) -> int:
        """How many answers one ARP request for the public address gets."""
        return len(self.internet.who_has(self.address.ip))

    def works(self) -> bool:
        return self.internet.tcp(self.address.ip, 22, **SOON).server == "web-1"

    def is_built_on(self, host: Host) -> bool:
        return f"cs-{self.scope}" in host.objects()["namespaces"]

    @contextmanager
    def never_two(self) -> Iterator[None]:
        """Ask all the time, and assert that no request gets two answers."""
        counts: list[int] = []
        # An answer that comes late counts for its own request.
        sources = itertools.cycle(f"203.0.113.{last}" for last in range(2, 10))

        def ask() -> None:
            counts.append(len(self.internet.who_has(self.address.ip, source=next(sources), timeout_s=0.05)))

        with meanwhile(ask):
            yield
        assert counts
        assert max(counts) <= 1


@pytest.fixture
def served(brisk_life: Life, internet: Internet) -> Iterator[Served]:
    it = Served(brisk_life, internet)
    yield it
    for host in it.life.bed.hosts:
        host.heal()
        if not host.running:
            host.boot()
    # A host that was evacuated may take networks again, and has no copy left.
    Operator(it.life.bed).run("undrain", it.dead.address, check=False)


def boot(host: Host) -> None:
    """Power on, and start the agent as the first call does: other tests compare what that leaves."""
    host.boot()
    host.sh(f"{agent_command()} connect </dev/null >/dev/null 2>&1 &")


@contextmanager
def without_arp(host: Host) -> Iterator[None]:
    """Let the management server send to this host without ARP, so that nothing tells it that the host is cut off."""
    management = host.bed.management
    mac = host.read("/sys/class/net/eth0/address").strip()
    management.links(f"neigh replace {host.address} dev eth0 lladdr {mac} nud permanent")
    try:
        yield
    finally:
        management.links(f"neigh delete {host.address} dev eth0")


def backup(operator: Operator, served: Served) -> list[str]:
    """Write an archive of the network; the options that name it."""
    operator.bed.management.write("/root/archive-password", "a password of the archive\n", mode=0o600)
    options = ["--archive-password-file", "/root/archive-password"]
    operator.run("export", "/root/backup", served.scope, *options)
    return ["--state", "/root/backup", *options]


def is_passive(host: Host, scope_id: str) -> bool:
    return f"scope={scope_id} warning: passive" in host.read(_LOG)


def test_a_network_goes_on_from_an_archive_and_its_old_host_stays_passive(served: Served, operator: Operator) -> None:
    with served.vm.serve_tcp(22):
        assert served.works()
        archive = backup(operator, served)
        served.dead.power_cut()
        operator.run("evacuate", served.dead.address, *archive)
        assert until(served.works)
        with impatient(served.life.cloud, timeout_s=25):  # 15 of them for an open connection to it
            assert served.network.ensure().ok
        assert served.network.host == served.alive.address
        assert served.network.details["epoch"] == 1
        with served.never_two():
            boot(served.dead)
            assert until(lambda: is_passive(served.dead, served.scope), seconds=60)
        assert until(lambda: not served.is_built_on(served.dead))
        assert served.works()
        told = operator.run("where", served.scope, check=False).out
        assert "passive" in told and served.dead.address in told
        operator.run("undrain", served.dead.address)
        assert "passive" not in operator.run("where", served.scope).out
        assert served.works()


def test_the_death_of_both_hosts_and_their_return_in_any_order(served: Served, operator: Operator) -> None:
    """The old host finds nobody and serves again; the one that replaced it finds the old one, and stays passive."""
    with served.vm.serve_tcp(22):
        archive = backup(operator, served)
        served.dead.power_cut()
        operator.run("evacuate", served.dead.address, *archive)
        assert until(served.works)
    served.alive.power_cut()
    with served.never_two():
        boot(served.dead)
        assert until(lambda: served.answers() == 1)
        boot(served.alive)
        assert until(lambda: is_passive(served.alive, served.scope), seconds=60)
    assert until(lambda: served.is_built_on(served.dead) and not served.is_built_on(served.alive))
    # An operator decides which one is right.
    operator.run("move", served.scope, "--to", served.alive.address)
    assert operator.where(served.scope) == [served.alive.address]


def test_two_hosts_that_boot_at_once_do_not_both_open(served: Served, operator: Operator) -> None:
    with served.vm.serve_tcp(22):
        archive = backup(operator, served)
        served.dead.power_cut()
        operator.run("evacuate", served.dead.address, *archive)
    served.alive.power_cut()
    with served.never_two():
        boot(served.dead)
        boot(served.alive)
        assert until(lambda: served.answers() == 1, seconds=60)
        assert until(
            lambda: [it for it in (served.dead, served.alive) if is_passive(it, served.scope)] != [], seconds=60
        )
    assert until(lambda: [served.is_built_on(it) for it in (served.dead, served.alive)].count(True) == 1)


def test_a_host_without_its_management_network_is_not_evacuated(served: Served, operator: Operator) -> None:
    """It serves its networks: whoever asks on their VLANs hears it."""
    with served.vm.serve_tcp(22):
        archive = backup(operator, served)
        served.dead.partition("mgmt")
        with without_arp(served.dead):
            refused = operator.run("evacuate", served.dead.address, *archive, check=False)
        assert refused.status != 0
        assert "is answered by" in refused.out + refused.err
        assert served.works()
        assert served.answers() == 1
        served.dead.heal()
        assert served.network.ensure().ok
        assert served.network.host == served.dead.address


def test_a_host_without_its_guest_networks_answers_and_is_not_evacuated(served: Served, operator: Operator) -> None:
    served.dead.partition("guest")
    refused = operator.run("evacuate", served.dead.address, check=False)
    assert refused.status != 0
    assert "netloom drain" in refused.err


@contextmanager
def talking(bed: Bed) -> Iterator[Internet]:
    """A machine of the public VLAN that sends all the time, so that no link is silent."""
    neighbour = bed.internet(vlan=PUBLIC_VLAN, address="203.0.113.2/24", name="neighbour")
    with meanwhile(lambda: neighbour.who_has("203.0.113.3", timeout_s=0.2)):
        yield neighbour


@pytest.mark.parametrize("copy", ["an archive", "no copy"])
def test_a_host_that_was_evacuated_and_lives_stops_when_its_links_come_back(
    copy: str, served: Served, operator: Operator
) -> None:
    """A part of the data centre is cut off from the rest. The host in it notices nothing: it has neighbours there."""
    bed, internet = served.life.bed, served.internet
    with served.vm.serve_tcp(22), talking(bed) as neighbour:
        archive = backup(operator, served) if copy == "an archive" else ["--owner", served.owner]
        served.dead.separate([served.alive, internet, bed.management])
        operator.run("evacuate", served.dead.address, "--fenced", *archive)
        if copy == "no copy":
            with impatient(served.life.cloud, timeout_s=20):
                served.network.restart(cleanup=True)
        assert until(served.works)
        assert neighbour.who_has(served.address.ip) != []
        with Observer(bed, [Question("eth2", PUBLIC_VLAN, served.address.ip)]) as observer:
            observer.wait_for(served.alive)
            observer.wait_for(served.dead)
            served.dead.heal()
            healed = time.monotonic()
            time.sleep(8)
            last = observer.answers(host=served.dead)[-1].at
            # 0.6 s on an idle machine. Of two seconds, one is that of the next claim.
            assert last - healed < 2, observer.story()
            assert observer.answers(host=served.alive)[-1].at > healed + 7
        assert is_passive(served.dead, served.scope)
        assert until(lambda: not served.is_built_on(served.dead))
        assert served.works()
        operator.run("undrain", served.dead.address)
        assert operator.where(served.scope) == [served.alive.address]


def frames(served: Served, claim: Claim, *, scope_id: str = "", key: str = "") -> list[str]:
    """The frames of a claim, signed with the key of the registration or another one, in hexadecimal."""
    login = Login(Trust((), KnownHosts("/nonexistent")), sshkey=Secret(key or served.life.bed.private_key))
    signatures = signatures_in(asyncio.run(Credentials(login).sign(claim)))
    some, _ = payloads(scope_id or served.scope, claim, signatures)
    return [ethernet_frame(bytes.fromhex("024c00000099"), 0, it).hex() for it in some]


def test_forged_claims_change_nothing(served: Served, operator: Operator) -> None:
    """The attacker answers ARP for the address, too. What a VM of the host sends is not heard, whatever it is."""
    host, attacker, owner, net = served.dead, served.internet, served.owner, served.scope
    me, other = host.address, served.alive.address
    soon = int(time.time()) + 3600
    stranger = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
    good = PlacementClaim(owner, net, 5, other)
    forged = {
        "wrong key": frames(served, good, key=stranger),
        "other owner": frames(served, replace(good, owner="netloom/other")),
        "lower epoch": frames(served, replace(good, epoch=0)),
        "another scope": frames(served, replace(good, scope_id="net-1")),
        "another host is dead": frames(served, EvacuationClaim(owner, other, soon, "192.0.2.1")),
        "over": frames(served, EvacuationClaim(owner, me, int(time.time()) - 1, other)),
        "damaged": [it[:-2] + ("00" if it[-2:] != "00" else "01") for it in frames(served, good)],
        "too long": [it + "00" * 1300 for it in frames(served, good)],
    }
    vm, _ = served.life.vm("web-2", 46, host=host)
    assert served.network.ensure().ok  # it brings the keys
    attacker.links(f"address add {served.address.ip}/32 dev lo")
    try:
        for _ in range(3):
            for frame in [it for some in forged.values() for it in some]:
                attacker.send_frame(frame, count=5)
            for frame in frames(served, good):
                vm.send_frame(frame, count=5)
            time.sleep(0.7)
        assert not is_passive(host, net)
        assert served.is_built_on(host)
        log = host.read(_LOG)
        assert f"scope={net} {other} claims it on" in log  # the wrong key
        for frame in frames(served, good):
            attacker.send_frame(frame)
        assert until(lambda: is_passive(host, net), seconds=5)
    finally:
        attacker.links(f"address delete {served.address.ip}/32 dev lo")


def test_a_network_without_a_copy_is_built_by_the_next_commands(served: Served, operator: Operator) -> None:
    with served.vm.serve_tcp(22):
        served.dead.power_cut()
        told = operator.run("evacuate", served.dead.address, "--owner", served.owner)
        assert "restart" in told.out
        with impatient(served.life.cloud, timeout_s=20):
            served.network.restart(cleanup=True)
        assert served.network.host == served.alive.address
        assert until(served.works)
        with served.never_two():
            boot(served.dead)
            assert until(lambda: is_passive(served.dead, served.scope), seconds=60)
        assert served.works()


@pytest.mark.mutation("gained-addresses-are-asked-for")
def test_a_host_that_counts_as_dead_and_answers_on_its_public_network_keeps_its_addresses(
    served: Served, operator: Operator
) -> None:
    """The guest gateway is free, so the network is built elsewhere; public addresses come with later commands."""
    served.dead.partition("all but public")
    operator.run("evacuate", served.dead.address, "--owner", served.owner)
    path = f"/var/lib/netloom/scopes/{served.scope}.json"
    with served.vm.serve_tcp(22), served.never_two():
        with impatient(served.life.cloud, timeout_s=20), pytest.raises(Failed) as failed:
            served.network.restart(cleanup=True)
        told = str(failed.value)
        assert re.search(rf"{re.escape(served.address.ip)} is answered by 0a(:[0-9a-f]{{2}}){{5}}", told), told
        assert f"power {served.dead.address} off" in told
        assert served.network.host == served.alive.address
        assert not json.loads(served.alive.read(path))["static_nats"]
        assert served.answers() == 1
        # What the network has is served: its gateway.
        gateway = served.network.facts.gateway
        assert until(lambda: served.vm.ping(gateway).ok)
        assert served.vm.who_has(gateway) != []
        # The host is powered off indeed.
        served.dead.power_cut()
        with impatient(served.life.cloud, timeout_s=20):
            served.network.restart(cleanup=True)
        assert until(served.works)


def is_fenced(host: Host) -> bool:
    """Whether an uplink of the host is fenced, for whatever reason."""
    return "netloom_fence" in host.run("nft", "list", "tables").out


def fences(host: Host) -> int:
    """How often the agent has fenced uplinks. Earlier tests on the same bed count."""
    return host.read(_LOG).count(" fenced: ")


def no_carrier(host: Host) -> None:
    """Pull all cables: every link of the host loses its carrier."""
    for port in host._ports("all"):
        host.bed.fabric.run("ip", "link", "set", port, "down")


def carrier(host: Host) -> None:
    for port in host._ports("all"):
        host.bed.fabric.run("ip", "link", "set", port, "up")


@pytest.mark.parametrize(
    ("cut", "heal"), [(Host.partition, Host.heal), (no_carrier, carrier)], ids=["silence", "no carrier"]
)
def test_a_host_that_is_cut_off_from_everything_gives_way_when_it_is_back(
    served: Served, operator: Operator, cut: Callable[[Host], None], heal: Callable[[Host], None]
) -> None:
    """It lives on and is not switched off; another host serves its network meanwhile."""
    with served.vm.serve_tcp(22):
        archive = backup(operator, served)
        before = fences(served.dead)
        cut(served.dead)
        assert until(lambda: fences(served.dead) > before and is_fenced(served.dead))
        operator.run("evacuate", served.dead.address, *archive)
        assert until(served.works)
        assert until(lambda: is_fenced(served.dead)), "it has been cut off for longer than a moment"
        with served.never_two():
            heal(served.dead)
            assert until(lambda: is_passive(served.dead, served.scope))
            assert until(lambda: not is_fenced(served.dead))
        assert until(lambda: not served.is_built_on(served.dead))
        assert served.works()
        with impatient(served.life.cloud):
            assert served.network.ensure().ok
        assert served.network.host == served.alive.address


@pytest.mark.parametrize(
    ("cut", "heal"), [(Host.partition, Host.heal), (no_carrier, carrier)], ids=["silence", "no carrier"]
)
def test_a_host_that_was_cut_off_and_not_replaced_goes_on(
    served: Served, cut: Callable[[Host], None], heal: Callable[[Host], None]
) -> None:
    with served.vm.serve_tcp(22):
        assert served.works()
        before = fences(served.dead)
        cut(served.dead)
        assert until(lambda: fences(served.dead) > before and is_fenced(served.dead))
        with served.never_two():
            heal(served.dead)
            assert until(served.works)
        assert until(lambda: not is_fenced(served.dead))
        assert not is_passive(served.dead, served.scope)
        assert served.network.ensure().ok
        assert served.network.host == served.dead.address
