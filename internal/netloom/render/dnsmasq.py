"""The resolver of a network: one dnsmasq, fed through a directory of hosts files that it watches.

dnsmasq serves DNS here and nothing else. It is never signalled: up to 2.90 a SIGHUP may end it, and the files of
its ``hostsdir`` are read, changed and forgotten by inotify (dnsmasq(8), --hostsdir). So a VM that comes or goes is a
file that comes or goes, and the process restarts only when its own configuration changes. An older one reads and does
not forget: there it is started anew when a name goes.
"""

from __future__ import annotations

import msgspec

from netloom import names
from netloom.render.service import Probe, Service, directory_of
from netloom.state import Network, Nic

HOSTS = "hosts"

# One name that cloud-init asks for first (its CloudStack data source); CloudStack's virtual router answers it too.
# No VM has it, whatever its name is: it would hand its neighbours their user data.
DATA_SERVER = "data-server"


class Build(msgspec.Struct, frozen=True):
    """What the dnsmasq of a host is like: what nobody's group is called there, and whether it forgets (since 2.88)."""

    group: str = "nogroup"
    forgets: bool = True


DEBIAN_12 = Build()


def service(scope_id: str, network: Network, build: Build = DEBIAN_12) -> Service:
    """The dnsmasq of ``network``, at the device's address."""
    name = f"dns-{network.network_id}"
    directory = directory_of(scope_id, name)
    return Service(
        name=name,
        directory=directory,
        argv=("dnsmasq", "--keep-in-foreground", f"--conf-file={directory}/dnsmasq.conf"),
        config={"dnsmasq.conf": _configuration(directory, network, build.group)},
        watched_directory=HOSTS,
        watched_files=_hosts(network),
        forgets=build.forgets,
        listens=(("udp", 53), ("tcp", 53)) if network.dns else (),
        probe=Probe("dns", network.device_ip) if network.dns else None,
    )


def _configuration(directory: str, network: Network, group: str) -> str:
    address = network.device_ip
    lines = [
        f"# netloom: the resolver of network {network.network_id}",
        "user=nobody",
        f"group={group}",
        f"interface={names.guest_link(network.network_id)}",
        f"listen-address={address}",
        "except-interface=lo",
        "bind-interfaces",
        # Nothing of the host: neither its names nor its resolvers.
        "no-hosts",  # guard: resolver-reads-no-hosts-file
        "no-resolv",
        "no-poll",
        f"hostsdir={directory}/{HOSTS}",
        "domain-needed",
        "cache-size=1000",
        "pid-file=",
        # The names are ours to change at any moment; a guest that cached one would keep it for this long.
        "local-ttl=10",
    ]
    if network.domain:
        lines += [f"domain={network.domain}", "expand-hosts", f"local=/{network.domain}/"]
    lines += [f"server={resolver}" for resolver in network.resolvers]
    if not network.dns:
        lines.append("port=0")
    if network.speaks_ip6:
        lines += _advertised(network)
    return "\n".join(lines) + "\n"


def _advertised(network: Network) -> list[str]:
    """Router advertisements: the prefix to make an address from, the resolver and its domain (RFC 4861, RFC 8106).

    The default route is told whether or not there is a way out: who goes nowhere is told so at once.
    """
    prefix, _, length = network.ip6_cidr.partition("/")
    lines = [
        f"listen-address={network.ip6_gateway}",
        "enable-ra",
        "quiet-ra",
        f"dhcp-range={prefix},ra-only,{length}",
    ]
    if network.dns:
        lines.append(f"dhcp-option=option6:dns-server,[{network.ip6_gateway}]")
        lines += [f"dhcp-option=option6:domain-search,{network.domain}"] if network.domain else []
    return lines


def _hosts(network: Network) -> dict[str, str]:
    """File name to text. One file a NIC, so that a VM is one file; sorted, so that the same wish is the same text."""
    device = network.device_ip
    files = {"device": _entry(device, [DATA_SERVER])}
    for key, nic in sorted(network.nics.items()):
        if nic.named and nic.hostname and nic.hostname.lower() != DATA_SERVER:
            files[f"nic-{key}"] = "".join(_entry(address, [nic.hostname]) for address in _addresses(nic))
    return files


def _addresses(nic: Nic) -> list[str]:
    return [
        address
        for address in (
            nic.ip,
            nic.ip6,  # guard: names-have-both-addresses
        )
        if address
    ]


def _entry(address: str, hosts: list[str]) -> str:
    return f"{address} {' '.join(hosts)}\n"
