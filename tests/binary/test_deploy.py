"""The one file on a host: upgrade from an older build, rollback, upgrade again, and uninstall without residue."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES
from bed.lab import Host, difference
from bed.machines import until
from binary.onefile import build_id, one_file
from ssh.deploy_lab import LIBEXEC, SETTLE_S, Server, current, deploying, running_agents, succeeded
from ssh.onefile import OneFiles

pytestmark = pytest.mark.binary

OLDER = "0.0.1-1-older"
FILES = ["/usr/local", "/var/lib/netloom", "/var/log/netloom", "/run/netloom", "/root", "/var/cache/netloom", "/tmp"]


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Bed, OneFiles, Path]]:
    with deploying(hosts=1) as (bed, files):
        file = Path(shutil.copy(one_file(), files.directory / "one-file"))
        for machine in (bed.hosts[0], bed.management):
            machine.sh("rm -rf /root/.cache /var/cache/netloom")
        yield bed, files, file


def answering(host: Host) -> list[str]:
    """The builds of the running guest processes."""
    lines = host.sh("ps -A -o args=").splitlines()
    return [line.split()[-1] for line in lines if " guest --control " in line]


def test_a_host_without_space_to_unpack_is_reported(place: tuple[Bed, OneFiles, Path]) -> None:
    bed, _, file = place
    host = bed.hosts[0]
    places = "/root/.cache /var/cache /var/tmp"
    host.sh(f"mkdir -p /root/.cache; for d in {places}; do mount -t tmpfs -o size=20m none $d; done")
    ended = Server(bed, file).ask()
    assert ended.status == 2
    assert "the agent does not start: no directory to unpack this program into" in ended.output
    assert "MB free, 80 needed" in ended.output
    assert "glibc" not in ended.output
    host.sh(f"umount {places}; rmdir /root/.cache; rm -r /usr/local/libexec")


def test_the_one_file_upgrades_rolls_back_and_uninstalls_without_residue(
    place: tuple[Bed, OneFiles, Path],
) -> None:
    bed, files, file = place
    host, build = bed.hosts[0], build_id()
    bed.add_segments([("eth1", "1204")])
    before = host.objects(files=FILES)
    server = Server(bed, files.make(OLDER))
    net = server.cloud.isolated_network(
        204, vlan=1204, cidr="10.10.1.0/24", offering=ALL_SERVICES, public_vlan=101, source_nat="203.0.113.20"
    )
    net.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:00:00:45")
    assert until(lambda: running_agents(host) == [OLDER], seconds=SETTLE_S)
    resolvers = host.sh("ps -A -o pid=,args= | grep '[d]nsmasq'")
    # The operator replaces the old file with the new one.
    server.replace(file)
    assert succeeded(server.ask())
    assert until(lambda: current(host) == build and running_agents(host) == [build], seconds=SETTLE_S)
    assert host.sh(f"sha256sum <{LIBEXEC}/{build}/netloom").split()[0] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert until(lambda: answering(host) == [build], seconds=SETTLE_S)
    assert host.sh("ps -A -o pid=,args= | grep '[d]nsmasq'") == resolvers
    net.restart()
    assert net.failures == []
    # An operator rolls back, and installs the new build again.
    agent = f"{LIBEXEC}/{build}/netloom"
    host.run(agent, "agent", "rollback")
    assert until(lambda: running_agents(host) == [OLDER], seconds=SETTLE_S)
    assert succeeded(server.ask())
    assert running_agents(host) == [OLDER]
    host.run(agent, "agent", "install")
    assert until(lambda: running_agents(host) == [build], seconds=SETTLE_S)
    # An operator queries all hosts, and uninstalls.
    bed.management.write("/root/key", bed.private_key, mode=0o600)
    login = ["--hosts", host.address, "--sshkey", "/root/key"]
    assert build in bed.management.run(str(file), "agent", "status", *login, HOME="/root").out
    assert "can carry networks" in bed.management.run(str(file), "agent", "selftest", *login, HOME="/root").out
    net.delete()
    assert "removed" in bed.management.run(str(file), "agent", "uninstall", *login, HOME="/root").out
    assert until(lambda: difference(before, host.objects(files=FILES)) == {}, seconds=SETTLE_S), difference(
        before, host.objects(files=FILES)
    )
