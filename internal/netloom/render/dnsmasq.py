"""The DNS resolver of a network: one dnsmasq that watches a directory of hosts files.

dnsmasq serves DNS and router advertisements, but no DHCP leases. It gets no signals, because SIGHUP may end it (up to
2.90). It notices changes in its ``hostsdir`` by inotify (dnsmasq(8), --hostsdir). So a new VM is a new file, a removed
VM a removed file, and the process restarts only when its configuration changes. Versions before 2.88 read new files
but do not forget removed ones; such a dnsmasq is restarted when a name is removed.
"""

from __future__ import annotations

import msgspec

from netloom import names
from netloom.render import dns_names, dns_zones
from netloom.render.service import Probe, Service, directory_of
from netloom.state import Network, Scope
from netloom.state.served import Served

HOSTS = "hosts"

# Where dnsmasq finds its files, in a root directory of its own. The profile of the distributions for AppArmor
# (usr.sbin.dnsmasq) allows it these paths, and none below /run/netloom.
_PLACES = {"dnsmasq.conf": "/etc/dnsmasq.conf", HOSTS: "/etc/dnsmasq.d", "log": "/var/log/dnsmasq.log"}

# Questions to other resolvers at the same time. One VM has up to 1,500 (``senders``).
FORWARDS_MAX = 8000
# TCP connections at the same time; each needs a process. One VM has up to ``senders.DNS_CONNECTIONS``.
_CONNECTIONS_MAX = 100


class Build(msgspec.Struct, frozen=True):
    """The dnsmasq of a host. ``forgets``: version 2.88 or later.

    ``no_ident``, ``tcp_limit``: it has the options no-ident and max-tcp-connections.
    """

    forgets: bool = True
    no_ident: bool = True
    tcp_limit: bool = True


DEBIAN_12 = Build()


def service(scope_id: str, network: Network, build: Build = DEBIAN_12, vpc: Scope | None = None) -> Service:
    """The dnsmasq of ``network``. It listens on the device's address.

    ``vpc``: the VPC that the network is a tier of. The resolver also knows the names of the other tiers, whatever their
    access control lists say. Names are files in the watched directory, so a change in one tier restarts no resolver.
    The configuration depends on another tier only if that tier has another domain, which CloudStack does not allow.
    """
    active = (it for it in vpc.networks.values() if it.is_active) if vpc is not None else ()
    tiers = [it for it in active if it.network_id != network.network_id]  # guard: tiers-know-each-others-names
    name = f"dns-{network.network_id}"
    directory = directory_of(scope_id, name)
    return Service(
        name=name,
        directory=directory,
        argv=("dnsmasq", "--keep-in-foreground", f"--conf-file={directory}/dnsmasq.conf"),
        config={"dnsmasq.conf": _configuration(directory, network, build, tiers, vpc)},
        watched_directory=HOSTS,
        watched_files=dns_names.hosts_files(network, tiers),
        forgets=build.forgets,
        # To send router advertisements, dnsmasq needs a raw socket. It also demands CAP_NET_ADMIN, which it needs only
        # for DHCP over IPv4, and does not start without it. With it, it could change the links of the host.
        capabilities=("net_bind_service", "net_raw") if network.has_ip6 else ("net_bind_service",),
        demanded=("net_admin",) if network.has_ip6 else (),
        listens=(("udp", 53), ("tcp", 53)) if network.dns else (),
        probe=Probe("dns", network.device_ip) if network.dns else None,
        places=_PLACES,  # guard: files-of-a-resolver-are-where-its-profile-allows-them
        serves=_served(network),
        network_id=network.network_id,
    )


def _served(network: Network) -> frozenset[Served]:
    names: frozenset[Served] = frozenset({"dns"}) if network.dns else frozenset()
    prefix: frozenset[Served] = frozenset({"advertisements"}) if network.has_ip6 else frozenset()
    return names | prefix


def _configuration(directory: str, network: Network, build: Build, tiers: list[Network], vpc: Scope | None) -> str:
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
        f"dns-forward-max={FORWARDS_MAX}",  # guard: resolver-has-places-for-many-vms
        "pid-file=",
        # Names can change at any time. A guest caches a name for this many seconds.
        "local-ttl=10",
    ]
    if build.tcp_limit:
        lines.append(f"max-tcp-connections={_CONNECTIONS_MAX}")
    if build.no_ident:
        lines.append("no-ident")  # guard: resolver-does-not-tell-its-version
    if vpc is not None:
        lines.append("localise-queries")  # the names of the own tier come first, see dns_names
    if network.domain:
        lines.append(f"domain={network.domain}")
    lines += [f"local=/{domain}/" for domain in sorted({it.domain for it in (network, *tiers)} - {""})]
    # The subnets of all tiers are parts of the VPC's prefixes.
    prefixes = vpc.vpc_cidr.split(",") if vpc is not None else []
    own = [*(it.cidr for it in network.ranges), network.ip6_cidr, *prefixes]
    lines += dns_zones.reverse_options(filter(None, own), network.resolvers)  # guard: reverse-zones-are-answered-here
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
