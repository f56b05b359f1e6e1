"""The DNS resolver of a network: one dnsmasq that watches a directory of hosts files.

dnsmasq serves DNS and router advertisements, but no DHCP leases. It gets no signals, because SIGHUP may end it (up to
2.90). It notices changes in its ``hostsdir`` by inotify (dnsmasq(8), --hostsdir). So a new VM is a new file, a removed
VM a removed file, and the process restarts only when its configuration changes. Versions before 2.88 read new files
but do not forget removed ones; such a dnsmasq is restarted when a name is removed.
"""

from __future__ import annotations

import msgspec

from netloom import names
from netloom.render.service import Probe, Service, directory_of
from netloom.state import Network, Nic

HOSTS = "hosts"

# The name that cloud-init's CloudStack data source looks up first; CloudStack's virtual router resolves it, too. A VM
# never gets this name: it could serve user data to its neighbours.
DATA_SERVER = "data-server"


class Build(msgspec.Struct, frozen=True):
    """The dnsmasq of a host. ``forgets``: version 2.88 or later."""

    forgets: bool = True


DEBIAN_12 = Build()


def service(scope_id: str, network: Network, build: Build = DEBIAN_12) -> Service:
    """The dnsmasq of ``network``. It listens on the device's address."""
    name = f"dns-{network.network_id}"
    directory = directory_of(scope_id, name)
    return Service(
        name=name,
        directory=directory,
        argv=("dnsmasq", "--keep-in-foreground", f"--conf-file={directory}/dnsmasq.conf"),
        config={"dnsmasq.conf": _configuration(directory, network)},
        watched_directory=HOSTS,
        watched_files=_hosts(network),
        forgets=build.forgets,
        # To send router advertisements, dnsmasq demands both, and does not start without them.
        capabilities=("net_admin", "net_bind_service", "net_raw") if network.has_ip6 else ("net_bind_service",),
        listens=(("udp", 53), ("tcp", 53)) if network.dns else (),
        probe=Probe("dns", network.device_ip) if network.dns else None,
    )


def _configuration(directory: str, network: Network) -> str:
    address = network.device_ip
    lines = [
        f"# netloom: the resolver of network {network.network_id}",
        # It is started as this user (netloom/confine.py), and refuses to start when there is none of the name.
        "user=netloom",
        "group=netloom",
        # To stderr, which is the log in its directory.
        "log-facility=-",
        f"interface={names.guest_link(network.network_id)}",
        f"listen-address={address}",
        "except-interface=lo",
        "bind-interfaces",
        # Use neither the hosts file nor the resolvers of the host.
        "no-hosts",  # guard: resolver-reads-no-hosts-file
        "no-resolv",
        "no-poll",
        f"hostsdir={directory}/{HOSTS}",
        "domain-needed",
        "cache-size=1000",
        # Answers that fit into every path (DNS flag day 2020). Before 2.86, dnsmasq's default is 4096 bytes.
        "edns-packet-max=1232",
        "pid-file=",
        # Names can change at any time. A guest caches a name for this many seconds.
        "local-ttl=10",
    ]
    if network.domain:
        lines += [f"domain={network.domain}", "expand-hosts", f"local=/{network.domain}/"]
    lines += [f"server={resolver}" for resolver in network.resolvers]
    if not network.dns:
        lines.append("port=0")
    if network.has_ip6:
        lines += _advertised(network)
    return "\n".join(lines) + "\n"


def _advertised(network: Network) -> list[str]:
    """Router advertisements: the prefix for the guests' addresses, the resolver and its domain (RFC 4861, RFC 8106).

    The device is advertised as default router even if it has no default route itself. It then rejects packets to the
    outside at once.
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
    """File names and texts: one file for each NIC. They are sorted, so that the same state gives the same text."""
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
