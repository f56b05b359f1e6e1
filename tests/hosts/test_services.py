"""A user with sudo, dnsmasq confined by AppArmor, and services that are missing."""

from __future__ import annotations

import pytest

from bed.cloudstack import Failed, FakeCloudStack
from bed.emulated import EmulatedBed, EmulatedHost
from bed.lab import Internet, Vm
from e2e.networks import Life, MakeLife
from hosts.scenario import carries, install, is_reached, live, whole_life

KINDS = ["apparmor"]

PROFILE = "/etc/apparmor.d/usr.sbin.dnsmasq"
OUR_DNSMASQ = "'[d]nsmasq --keep-in-foreground'"  # not the host's own one, and not this shell
DENIED = "dmesg | grep -c 'apparmor=\"DENIED\".*dnsmasq' || true"


@pytest.fixture(scope="module")
def cloud(bed: EmulatedBed) -> FakeCloudStack:
    """A CloudStack that logs in as a user with sudo."""
    return FakeCloudStack.on(bed.management).register(hosts=bed.hosts, **bed.login("netadmin", by="key"))


def test_without_nftables_all_missing_packages_are_named(host: EmulatedHost, make_life: MakeLife) -> None:
    """Nothing is installed on such a host."""
    needed = (
        "/usr/sbin/nft /usr/sbin/dnsmasq /usr/sbin/haproxy $(readlink -f /usr/lib/x86_64-linux-gnu/libnftables.so.1)"
    )
    host.sh(f"for it in {needed}; do mv $it $it.away; done")
    life = make_life()
    life.network.facts.state = "implementing"
    refused = life.network.ensure()
    host.sh("for it in /usr/sbin/*.away /usr/lib/x86_64-linux-gnu/*.away; do mv $it ${it%.away}; done")
    assert not refused.ok
    assert "apt-get install nftables dnsmasq-base haproxy" in refused.output
    assert host.run("systemctl", "cat", "netloom-agent", check=False).status != 0


def test_a_host_name_that_does_not_resolve_is_named(host: EmulatedHost, make_life: MakeLife, bed: EmulatedBed) -> None:
    """sudo looks it up each time."""
    hosts = host.read("/etc/hosts")
    host.write("/etc/hosts", "127.0.0.1 localhost\n")
    host.sh("systemctl stop dnsmasq")  # the host's own one, which knows the name
    life = make_life()
    install(life.network)
    host.write("/etc/hosts", hosts)
    host.sh("systemctl start dnsmasq")
    log = bed.management.sh("find / -path /proc -prune -o -name netloom.log -exec cat {} +")
    assert f"{host.address}: sudo needed " in log
    assert "put the host's own name into its /etc/hosts" in log


def test_dnsmasq_works_under_the_profile_of_the_distribution(
    host: EmulatedHost, make_life: MakeLife, internet: Internet
) -> None:
    host.sh(f"sed -i 's/complain,attach/attach/' {PROFILE}; apparmor_parser -r {PROFILE}")
    life = make_life()
    live(life, internet)
    assert "dnsmasq (enforce)" in host.sh("cat /proc/$(pgrep -xo -f '.*dnsmasq.*conf.*')/attr/current")
    assert host.sh(DENIED).strip() == "0"


def without_names(life: Life, vm: Vm, internet: Internet, reason: str) -> None:
    """What needs no dnsmasq works, and a VM that needs it fails with the reason."""
    (nic,) = life.network.nics
    address = life.network.associate(life.public(2))
    life.network.add_port_forward(address, 8080, nic, 80, open_firewall=True)
    assert life.network.failures == [], life.network.failures
    with vm.serve_tcp(80):
        assert is_reached(life.public(2), 8080, internet, vm.name)
    with pytest.raises(Failed, match=reason):
        life.network.deploy_vm(f"more-{life.number}", ip=f"{life.subnet}.46", mac="02:01:00:77:00:46")
    life.network.failures.clear()
    assert reason in life.network.custom_action("check")


def test_a_denied_dnsmasq_fails_only_calls_for_names(
    host: EmulatedHost, make_life: MakeLife, internet: Internet
) -> None:
    life = make_life()
    (vm,) = live(life, internet)
    local = "/etc/apparmor.d/local/usr.sbin.dnsmasq"
    host.sh(f"mkdir -p {local.rpartition('/')[0]}; echo 'deny /etc/dnsmasq.conf r,' > {local}")
    host.sh(f"apparmor_parser -r {PROFILE}; pkill -f {OUR_DNSMASQ}")
    without_names(life, vm, internet, "AppArmor")
    host.sh(f"rm {local}; touch {local}; apparmor_parser -r {PROFILE}")
    carries(life, vm, internet)


def test_missing_programs_fail_only_calls_that_need_them(
    host: EmulatedHost, make_life: MakeLife, internet: Internet
) -> None:
    life = make_life()
    (vm,) = live(life, internet)
    host.sh("for it in dnsmasq haproxy; do mv /usr/sbin/$it /usr/sbin/$it.away; done")
    host.sh(f"pkill -f {OUR_DNSMASQ}")
    without_names(life, vm, internet, "dnsmasq-base")
    host.sh("for it in dnsmasq haproxy; do mv /usr/sbin/$it.away /usr/sbin/$it; done")
    carries(life, vm, internet)


def test_life_of_a_user_with_sudo(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    whole_life(host, make_life, internet)
