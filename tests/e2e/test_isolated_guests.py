"""Guest services for VMs: DHCP, DNS, metadata, passwords and load balancing, tested with real clients."""

from __future__ import annotations

from collections import Counter

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES, FakeCloudStack
from bed.lab import Internet, Vm, agent_command
from bed.machines import until
from e2e.networks import OUTSIDE, Life, MakeLife, Traces, lease


@pytest.fixture(scope="module")
def full_cloud(bed: Bed, cloud: FakeCloudStack) -> FakeCloudStack:
    """A CloudStack that omits no execution. The ``cloud`` fixture has started the agents before."""
    return FakeCloudStack.on(bed.management, extension="full").register(hosts=bed.hosts, **bed.login("root", by="key"))


@pytest.fixture
def full_life(make_life: MakeLife, full_cloud: FakeCloudStack) -> Life:
    return make_life(offering=ALL_SERVICES, with_cloud=full_cloud, brisk=True)


def _get(vm: Vm, url: str, *options: str, wait_s: int = 20) -> str:
    return vm.run("curl", "-s", "-m", str(wait_s), *options, url, check=False).out


def _lookup(vm: Vm, server: str, name: str) -> str:
    return vm.run("busybox", "nslookup", name, server, check=False).out


def _resolves(vm: Vm, server: str, name: str, address: str) -> bool:
    """Whether the name gets this address. dnsmasq reads its files a moment after the command."""
    return until(lambda: address in _lookup(vm, server, name))


@pytest.mark.binary
def test_first_vm_of_a_network_with_all_services(make_life: MakeLife, full_cloud: FakeCloudStack) -> None:
    life = make_life(offering=ALL_SERVICES, with_cloud=full_cloud)
    before = len(full_cloud.history)
    vm, nic = life.vm("web-1")
    sent = [each for each in full_cloud.commands(before) if each != "ensure-network-device"]
    assert len(full_cloud.history) - before == 21
    assert sent == [
        "implement-network", "assign-ip", "apply-fw-rules", "restore-network", "prepare-nic", "config-dhcp-subnet",
        "add-dhcp-entry", "config-dns-subnet", "add-dns-entry", "save-vm-data",
    ]  # fmt: skip
    assert life.network.failures == []
    gateway = life.network.facts.gateway
    assert f"lease of {nic.ip} obtained from {gateway}" in lease(vm)
    assert _resolves(vm, gateway, f"web-1.{life.network.facts.domain}", nic.ip)
    assert _get(vm, f"http://{gateway}/latest/meta-data/local-hostname") == "web-1"


NIC_STARTS = [
    "prepare-nic",
    "config-dhcp-subnet",
    "add-dhcp-entry",
    "config-dns-subnet",
    "add-dns-entry",
    "save-vm-data",
]
LISTING = ["implement-network", "assign-ip", "apply-fw-rules", "restore-network"]


class SentCommands:
    """The commands sent since the construction. Asserts an ensure-network-device before each."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._from = len(life.cloud.history)

    def commands(self) -> list[str]:
        """The commands without ensure-network-device."""
        told = self._life.cloud.commands(self._from)
        commands = [it for it in told if it != "ensure-network-device"]
        assert len(told) - len(commands) in (len(commands), len(commands) + 1, len(commands) + 2), told
        return commands


@pytest.fixture
def strict_life(make_life: MakeLife, full_cloud: FakeCloudStack) -> Life:
    """A network with all services and the complete sequence of executions of CloudStack."""
    return make_life(offering=ALL_SERVICES, with_cloud=full_cloud)


def _meta(vm: Vm, life: Life, item: str, wait_s: int = 20) -> str:
    return _get(vm, f"http://{life.network.facts.gateway}/latest/{item}", wait_s=wait_s)


def _fetch(vm: Vm, life: Life, wait_s: int = 20) -> str:
    """Fetch the VM's password without acknowledging it."""
    url = f"http://{life.network.facts.gateway}:8080/"
    return _get(vm, url, "-H", "DomU_Request: send_my_password", wait_s=wait_s).strip()


@pytest.mark.binary
def test_second_vm(strict_life: Life) -> None:
    one, first = strict_life.vm("web-1")
    assert f"lease of {first.ip} obtained" in lease(one)
    sent = SentCommands(strict_life)
    two, second = strict_life.vm("web-2", 46)
    assert sent.commands() == NIC_STARTS
    gateway, domain = strict_life.network.facts.gateway, strict_life.network.facts.domain
    for vm, nic, name, other in ((one, first, "web-1", second), (two, second, "web-2", first)):
        assert f"lease of {nic.ip} obtained" in lease(vm)
        assert _meta(vm, strict_life, "meta-data/local-hostname") == name
        assert _resolves(vm, gateway, f"{other.vm.name}.{domain}", other.ip)
        assert vm.ping(other.ip).ok


@pytest.mark.binary
def test_vm_stopped_and_started_again(strict_life: Life) -> None:
    other, _ = strict_life.vm("web-2", 46)
    nic = strict_life.network.deploy_vm(
        "web-1", ip=f"{strict_life.subnet}.45", mac="02:01:00:fe:00:45", password="first"
    )
    vm = strict_life.plug(nic)
    gateway, name = strict_life.network.facts.gateway, f"web-1.{strict_life.network.facts.domain}"
    sent = SentCommands(strict_life)
    strict_life.network.stop_vm(nic)
    assert sent.commands() == ["release-nic"]
    # The namespace of the stopped VM still exists, so the test can check that its requests would be answered.
    assert _resolves(other, gateway, name, nic.ip)
    assert f"lease of {nic.ip} obtained" in lease(vm)
    sent = SentCommands(strict_life)
    strict_life.network.start_vm(nic)
    assert sent.commands() == NIC_STARTS
    assert f"lease of {nic.ip} obtained" in lease(vm)
    assert _meta(vm, strict_life, "meta-data/local-hostname") == "web-1"
    assert _fetch(vm, strict_life) == "first", "a later start sends no password and removes none"
    assert _fetch(other, strict_life) == "saved_password"


def test_a_start_without_a_stop_before(strict_life: Life) -> None:
    """HA starts the VM on another host after its host has died."""
    vm, nic = strict_life.vm("web-1")
    vm.destroy()
    sent = SentCommands(strict_life)
    strict_life.network.start_vm(nic)
    assert sent.commands() == NIC_STARTS
    vm = strict_life.plug(nic, host=strict_life.elsewhere)
    assert until(lambda: f"lease of {nic.ip} obtained" in lease(vm))
    assert _meta(vm, strict_life, "meta-data/local-hostname") == "web-1"


@pytest.mark.binary
def test_second_nic(strict_life: Life) -> None:
    one, first = strict_life.vm("dual-1")
    sent = SentCommands(strict_life)
    second = strict_life.network.deploy_vm(
        "dual-1", ip=f"{strict_life.subnet}.77", mac="02:01:00:fe:00:77", vm=first.vm, device_id=1
    )
    assert sent.commands() == NIC_STARTS
    # The second NIC of the same VM. A separate namespace is enough to test its DHCP answer.
    other = strict_life.host.vm(
        "dual-1b",
        vlan=strict_life.network.facts.vlan,
        mac=second.mac,
        ip=f"{second.ip}/24",
        gateway=strict_life.network.facts.gateway,
    )
    strict_life.vms.append(other)
    about = {"router", "dns", "domain", "search", "ip"}
    told = []
    for vm in (one, other):
        variables = dict(it.split("=", 1) for it in lease(vm, options=["search"]).splitlines() if "=" in it)
        told.append({name: value for name, value in variables.items() if name in about})
    gateway = strict_life.network.facts.gateway
    assert (told[0]["router"], told[0]["dns"].split()[0]) == (gateway, gateway), told
    assert told[1] == {"ip": second.ip}
    assert _meta(other, strict_life, "meta-data/local-ipv4") == second.ip
    assert _meta(one, strict_life, "meta-data/local-ipv4") == first.ip
    strict_life.network.expunge_vm(second)
    assert "obtained" not in lease(other, tries=3)
    assert f"lease of {first.ip} obtained" in lease(one)


@pytest.mark.binary
def test_vm_expunged(strict_life: Life) -> None:
    nic = strict_life.network.deploy_vm(
        "web-1", ip=f"{strict_life.subnet}.45", mac="02:01:00:fe:00:45", password="first"
    )
    vm = strict_life.plug(nic)
    other, _ = strict_life.vm("web-2", 46)
    gateway, name = strict_life.network.facts.gateway, f"web-1.{strict_life.network.facts.domain}"
    assert _resolves(other, gateway, name, nic.ip)
    strict_life.network.stop_vm(nic)
    sent = SentCommands(strict_life)
    strict_life.network.expunge_vm(nic)
    assert sent.commands() == ["remove-dhcp-entry"]
    assert "obtained" not in lease(vm, tries=3), "requests of an expunged VM are ignored"
    assert until(lambda: nic.ip not in _lookup(other, gateway, name))
    assert _meta(vm, strict_life, "meta-data/local-hostname", wait_s=3) == ""
    assert _fetch(vm, strict_life, wait_s=3) == ""
    state = strict_life.host.read(f"/var/lib/netloom/scopes/net-{strict_life.network.facts.network_id}.json")
    assert nic.mac not in state
    assert "first" not in state
    # Another VM gets its address and its name.
    again = strict_life.network.deploy_vm("web-1", ip=nic.ip, mac="02:01:00:fe:00:99")
    assert f"lease of {nic.ip} obtained" in lease(strict_life.plug(again))


def test_vm_expunged_in_a_network_that_is_shut_down(strict_life: Life) -> None:
    vm, nic = strict_life.vm("web-1")
    host = strict_life.host
    strict_life.network.stop_vm(nic)
    strict_life.network.garbage_collect()
    vm.destroy()
    strict_life.vms.clear()
    # The bridge is deleted with its last VM, and a moment later its guard in the netdev table.
    assert until(lambda: not any(vm.bridge in row for rows in host.objects().values() for row in rows), seconds=30)
    before = Traces(strict_life.bed)
    sent = SentCommands(strict_life)
    strict_life.network.expunge_vm(nic)
    assert sent.commands() == ["remove-dhcp-entry"]
    assert strict_life.network.failures == []

    def kinds() -> set[str]:
        return {kind for changes in before.differences().values() for kind in changes}

    assert until(lambda: kinds() <= {"files"}), "the command creates nothing"
    other, second = strict_life.vm("web-2", 46)
    assert f"lease of {second.ip} obtained" in lease(other)
    assert nic.ip not in _lookup(other, strict_life.network.facts.gateway, f"web-1.{strict_life.network.facts.domain}")


@pytest.mark.binary
def test_key_and_user_data_reset(strict_life: Life) -> None:
    vm, nic = strict_life.vm("web-1")
    other, _ = strict_life.vm("web-2", 46)
    before = _meta(other, strict_life, "meta-data/public-keys"), _meta(other, strict_life, "user-data")
    sent = SentCommands(strict_life)
    strict_life.network.reset_ssh_key(nic, "ssh-ed25519 AAAAnew one\nssh-ed25519 AAAAnew two")
    strict_life.network.reset_user_data(nic, "#!/bin/sh\necho caf\u00e9\n\n")
    assert sent.commands() == ["save-sshkey", "save-userdata"]
    assert _meta(vm, strict_life, "meta-data/public-keys") == "ssh-ed25519 AAAAnew one\nssh-ed25519 AAAAnew two"
    assert _meta(vm, strict_life, "user-data") == "#!/bin/sh\necho caf\u00e9\n\n"
    assert (_meta(other, strict_life, "meta-data/public-keys"), _meta(other, strict_life, "user-data")) == before


@pytest.mark.binary
@pytest.mark.parametrize("how", ["without-cleanup", "rolling", "shut-down-first"])
def test_restart(strict_life: Life, how: str) -> None:
    nic = strict_life.network.deploy_vm(
        "web-1", ip=f"{strict_life.subnet}.45", mac="02:01:00:fe:00:45", password="first"
    )
    vm = strict_life.plug(nic)
    _, second = strict_life.vm("web-2", 46)
    sent = SentCommands(strict_life)
    strict_life.network.restart(cleanup=how != "without-cleanup", rolling=how == "rolling")
    assert (
        sent.commands()
        == {
            "without-cleanup": LISTING,
            "rolling": ["implement-network", "assign-ip", *LISTING],
            "shut-down-first": ["apply-fw-rules", "release-ip", "shutdown-network", *LISTING],
        }[how]
    )
    assert strict_life.network.failures == []
    assert f"lease of {nic.ip} obtained" in lease(vm)
    name = f"web-2.{strict_life.network.facts.domain}"
    assert _resolves(vm, strict_life.network.facts.gateway, name, second.ip)
    assert _meta(vm, strict_life, "meta-data/local-hostname") == "web-1"
    # restore-network contains no passwords and removes none. shutdown-network deletes the data of all VMs.
    assert _fetch(vm, strict_life) == ("saved_password" if how == "shut-down-first" else "first")


@pytest.mark.binary
def test_password_reset(full_life: Life) -> None:
    vm, nic = full_life.vm("web-1")
    other, _ = full_life.vm("web-2", 46)
    url = f"http://{full_life.network.facts.gateway}:8080/"
    full_life.network.reset_password(nic, "n3w $ecret")
    assert _get(other, url, "-H", "DomU_Request: send_my_password") == "saved_password", (
        "a VM can read only its own password"
    )
    assert _get(vm, url, "-H", "DomU_Request: send_my_password").strip() == "n3w $ecret"
    state = f"/var/lib/netloom/scopes/net-{full_life.network.facts.network_id}.json"
    assert "n3w $ecret" in full_life.host.read(state)
    _get(vm, url, "-H", "DomU_Request: saved_password")
    assert until(lambda: "n3w $ecret" not in full_life.host.read(state)), (
        "the password is erased after its acknowledgement"
    )
    assert _get(vm, url, "-H", "DomU_Request: send_my_password") == "saved_password"


@pytest.mark.binary
def test_balanced_load(full_life: Life, internet: Internet) -> None:
    one, first = full_life.vm("web-1")
    two, second = full_life.vm("web-2", 46)
    network, address = full_life.network, full_life.network.associate(full_life.public(1))
    with one.serve_tcp(8080), two.serve_tcp(8080):
        rule = network.add_lb_rule(address, "web", 80, 8080, [first, second])
        assert internet.tcp(address.ip, 80, timeout_s=0.5).outcome == "timeout", "closed without a firewall rule"
        network.add_firewall_rule(address, "tcp", 80)
        told = Counter(internet.tcp(address.ip, 80).server for _ in range(6))
        assert told == {"web-1": 3, "web-2": 3}
        with internet.open(address.ip, 80) as kept:
            network.delete_lb_rule(rule)
            assert kept.ask(timeout_s=1.0) != "answered", "revoking the rule ends the connections it allowed"
        assert not internet.tcp(address.ip, 80, timeout_s=0.5).ok
    assert until(lambda: not any("haproxy" in it for it in full_life.host.objects()["processes"])), (
        "haproxy is stopped with the last rule"
    )


@pytest.mark.mutation("a-restore-lists-all-vms")
def test_an_expunged_vm_whose_removal_failed_goes_at_the_restore(full_life: Life) -> None:
    """CloudStack does not repeat remove-dhcp-entry: the VM leaves its database only."""
    network, gateway = full_life.network, full_life.network.facts.gateway
    vm, _ = full_life.vm("web-1")
    gone, old = full_life.vm("db", 46)
    kept, stays = full_life.vm("app", 47)
    network.nics.remove(old)
    name = f"db.{network.facts.domain}"
    assert _resolves(vm, gateway, name, old.ip)
    new = network.deploy_vm("db", ip=f"{full_life.subnet}.48", mac=f"02:01:00:{full_life.number:02x}:00:48")

    def new_vm_has_the_name() -> bool:
        told = _lookup(vm, gateway, name)
        return new.ip in told and old.ip not in told

    assert until(new_vm_has_the_name)
    assert f"lease of {old.ip} obtained" in lease(gone), "it may live: only the restore lists all VMs"
    network.restart()
    assert "obtained" not in lease(gone, tries=5)
    assert f"lease of {stays.ip} obtained" in lease(kept)
    assert until(new_vm_has_the_name)
    assert _get(gone, f"http://{gateway}/latest/meta-data/local-hostname", wait_s=3) != "db"
    assert _get(kept, f"http://{gateway}/latest/meta-data/local-hostname") == "app"


def test_restart_and_deletion_leave_nothing(make_life: MakeLife, full_cloud: FakeCloudStack, bed: Bed) -> None:
    life = make_life(offering=ALL_SERVICES, with_cloud=full_cloud, brisk=True)
    before = Traces(bed)
    vm, nic = life.vm("web-1")
    life.network.restart(cleanup=True, rolling=False)
    assert f"lease of {nic.ip} obtained" in lease(vm), "restore-network restores everything"
    assert _get(vm, f"http://{life.network.facts.gateway}/latest/meta-data/local-hostname") == "web-1"
    vm.destroy()
    life.network.delete()
    assert until(lambda: before.differences() == {}), before.differences()


def test_a_smaller_uplink_mtu_is_sent_to_vms_and_mss_is_clamped(full_life: Life, internet: Internet) -> None:
    for host in full_life.bed.hosts:
        host.links(f"link set eth1.{full_life.network.next_vlan} mtu 1400")
    vm, nic = full_life.vm("web-1")
    assert "mtu=1400\n" in lease(vm, options=["mtu"])
    address = full_life.network.associate(full_life.public(1))
    with vm.serve_tcp(22):
        full_life.network.add_port_forward(address, 22, nic, open_firewall=True)
        # The VM still uses MTU 1500, so the device must clamp the MSS of segments sent to it.
        capture = vm.capture("eth0", seconds=60)
        assert internet.tcp(address.ip, 22).ok
        opening = [bytes.fromhex(frame) for frame in capture.stop()]
    sizes = [size for frame in opening if (size := _mss(frame))]
    assert sizes and max(sizes) <= 1360, sizes


def _mss(frame: bytes) -> int:
    """The MSS option of a TCP SYN frame, if it is the first option (RFC 9293 section 3.7.1); else 0."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return 0
    tcp = frame[14 + (frame[14] & 15) * 4 :]
    return int.from_bytes(tcp[22:24], "big") if tcp[13] & 2 and tcp[20:22] == b"\x02\x04" and not tcp[13] & 16 else 0


def test_guest_services_are_restored_after_a_power_cut_without_cloudstack() -> None:
    """Uses its own bed, because other tests compare the processes of a host before and after."""
    with Bed(hosts=1, vlans=[1204], public_vlans=[101]) as bed:
        internet = bed.internet(vlan=101, address="203.0.113.1/24", also=[f"{OUTSIDE}/32"])
        cloud = FakeCloudStack.on(bed.management).register(hosts=bed.hosts, **bed.login("netadmin", by="password"))
        network = cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", source_nat="203.0.113.20")
        nic = network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
        calls = len(cloud.history)
        (host,) = bed.hosts
        host.power_cut()
        host.boot()
        # The VM boots faster than the host. Its client starts before the service exists and gets an answer in time.
        vm = host.vm("web-1", vlan=1204, mac=nic.mac, ip=f"{nic.ip}/24", gateway="10.10.1.1")
        vm.sh("busybox udhcpc -f -q -n -t 100 -T 1 -i eth0 -s /bin/true </dev/null >/tmp/asked 2>&1 &")
        assert until(lambda: "discover" in vm.read("/tmp/asked"))
        host.sh(f"{agent_command()} serve </dev/null >/dev/null 2>&1 &")
        assert until(lambda: f"lease of {nic.ip} obtained" in vm.read("/tmp/asked"), seconds=90), vm.read("/tmp/asked")
        assert until(lambda: _get(vm, "http://10.10.1.1/latest/meta-data/local-hostname") == "web-1")
        with internet.serve_tcp(80):
            assert until(lambda: vm.tcp(OUTSIDE, 80).saw == "203.0.113.20")
        assert len(cloud.history) == calls, "CloudStack sent no command"
