"""The desired state of a scope on its host: links, addresses, routes, rules, neighbours, sysctls and the ruleset."""

from __future__ import annotations

from netloom import names
from netloom.netobjects import ANYWHERE, MAIN_TABLE, Address, Neighbour, Route, Rule
from netloom.render import ip6, nft, pbr, plain_network, share
from netloom.render.active import Active, Exit, active, subnet, within
from netloom.render.marks import EXIT_MASK, table
from netloom.render.want import Port, Segment, Want
from netloom.state import Scope, Uplinks


def render(scope: Scope | None) -> Want:
    """The desired state of ``scope``. It is empty as long as no network is active and no VPC is implemented.

    The same scope gives the same value, in whatever order CloudStack sent its commands.
    """
    now = active(scope)
    if scope is None or not now.exists:
        return Want(namespace="")
    ports = _ports(scope, now)
    guests = tuple(
        Address(link=names.guest_link(it.network_id), cidr=f"{it.device_ip}/{subnet(it.cidr).prefixlen}")
        for it in now.networks
    )
    guest_links = [names.guest_link(it.network_id) for it in now.networks]
    public_links = sorted({names.public_link(it.vlan) for it in now.held})
    publics = tuple(Address(link=names.public_link(it.vlan), cidr=f"{it.address}/32") for it in now.held)
    return Want(
        namespace=names.namespace(scope.scope_id),
        ports=ports,
        addresses=(*guests, *publics, *ip6.addresses(scope, now)),
        routes=(*_routes(now), *pbr.routes(scope.pbr, now), *ip6.routes(scope, now)),
        rules=(
            *pbr.rules(scope.pbr),
            *(
                Rule(priority=table(it.number), mark=it.number, mask=EXIT_MASK, table=table(it.number))
                for it in now.exits
            ),
        ),
        neighbours=_neighbours(now),
        sysctls=_sysctls(
            guest_links,
            public_links,
            forwarding="0" if now.plain else "1",  # guard: no-forwarding-in-a-plain-network
        )
        | ip6.sysctls(scope, now, [*guest_links, *public_links])
        | {"net.ipv6.icmp.ratemask": share.RATEMASK6},
        ruleset=nft.ruleset(scope),
        announce=(*guests, *publics),
    )


def outline(scope: Scope | None) -> Want:
    """The namespace and the ports of ``render``: what a scope uses of the host. It costs a tenth of all."""
    now = active(scope)
    if scope is None or not now.exists:
        return Want(namespace="")
    return Want(namespace=names.namespace(scope.scope_id), ports=_ports(scope, now))


def guest_bridges(scope: Scope | None) -> frozenset[str]:
    """The bridges that the scope's VMs are plugged into, as far as the registration tells."""
    if scope is None:
        return frozenset()
    return frozenset(_guest_segment(scope.uplinks, it.vlan).bridge for it in scope.networks.values() if it.vlan)


def _ports(scope: Scope, now: Active) -> tuple[Port, ...]:
    ports = []
    for network in now.networks:
        link = names.guest_link(network.network_id)
        ports.append(
            Port(
                link=link,
                host_link=names.guest_port(network.network_id),
                mac=names.mac(scope.owner, scope.scope_id, link),
                segment=_guest_segment(scope.uplinks, network.vlan),
            )
        )
    for vlan in sorted({it.vlan for it in now.held}):
        link = names.public_link(vlan)
        ports.append(
            Port(
                link=link,
                host_link=names.public_port(scope.scope_id, vlan),
                mac=names.mac(scope.owner, scope.scope_id, link),
                segment=_segment(scope.uplinks.public, vlan),
            )
        )
    return tuple(ports)


def _neighbours(now: Active) -> tuple[Neighbour, ...]:
    """A permanent neighbour for each address of a NIC, whether its VM runs or not.

    So a VM that answers ARP requests for another VM's address does not get that VM's metadata (``guest.peer``), and
    replies to a VM that does not resolve do not wait in the kernel (``share``).
    """
    found = []
    for network in now.networks:
        link = names.guest_link(network.network_id)
        for nic in network.nics.values():
            addresses = [nic.ip] if nic.ip else []
            if network.has_ip6:
                addresses += ip6.nic_addresses(nic)  # guard: neighbours-with-ip6-are-permanent
            found += [Neighbour(link=link, address=it, mac=nic.mac) for it in addresses]
    return tuple(sorted(found))


def _guest_segment(uplinks: Uplinks, vlan: str) -> Segment:
    """The segment of a guest network: VXLAN if its number is too high for a VLAN or the registration says so.

    The registration may have changed since the network was created.
    """
    number = vlan.removeprefix(names.VXLAN)
    if vlan == names.UNTAGGED or (uplinks.isolation == "vlan" and int(number) <= names.VLAN_TAG_MAX):
        return _segment(uplinks.guest, vlan)
    return _segment(uplinks.guest, f"{names.VXLAN}{number}")


def _segment(nic: str, vlan: str) -> Segment:
    """The segment of a tag, ``untagged``, or a VXLAN (``vx1000``)."""
    if vlan.startswith(names.VXLAN):
        vni = vlan.removeprefix(names.VXLAN)
        return Segment(bridge=names.vxlan_bridge(vni), nic=nic, vlan=vni, vlan_link=names.vxlan_link(vni), kind="vxlan")
    return Segment(
        bridge=names.bridge(nic, vlan),
        nic=nic,
        vlan=vlan,
        vlan_link="" if vlan == names.UNTAGGED else names.vlan_link(nic, vlan),
    )


def _routes(now: Active) -> tuple[Route, ...]:
    """The routes of the default exit in the main table, and the routes of each exit in a table of its own.

    The kernel adds the routes to guests itself, with the device's addresses. Subnets of other exits are not in the main
    table: a guest reaches them through the gateway of the default exit, with an address of the default exit. Otherwise
    the packet would enter the other VLAN with an address that does not belong there.
    """
    if now.plain:
        return plain_network.routes(now.networks[0])
    routes: list[Route] = []
    default = now.default_exit
    if default is not None:
        routes += _exit_routes(default, MAIN_TABLE, now.source_nat.address if now.source_nat else default.addresses[0])
    for it in now.exits:
        routes += _exit_routes(it, table(it.number), it.addresses[0])
    return tuple(routes)


def _exit_routes(exit_: Exit, into_table: int, source: str) -> list[Route]:
    link = names.public_link(exit_.vlan)
    on_link = list(exit_.subnets)
    if exit_.gateway and not any(within(exit_.gateway, it) for it in on_link):
        # Some providers route a subnet through a gateway outside of it.
        on_link.append(f"{exit_.gateway}/32")
    routes = [Route(table=into_table, destination=it, link=link, source=source) for it in on_link]
    if exit_.gateway:
        routes.append(Route(table=into_table, destination=ANYWHERE, link=link, via=exit_.gateway, source=source))
    return routes


def _sysctls(guest_links: list[str], public_links: list[str], *, forwarding: str) -> dict[str, str]:
    """All IPv4 settings that the rest relies on, because a new namespace inherits settings of the host.

    ``ip_forward`` comes first, because writing it resets others. The names of our links contain no dots, so they can be
    part of a sysctl name.
    """
    links = [*guest_links, *public_links]
    wanted = {
        "net.ipv4.ip_forward": forwarding,
        "net.ipv4.icmp_echo_ignore_all": "0",
        "net.ipv4.icmp_echo_ignore_broadcasts": "1",
        "net.ipv4.ip_default_ttl": "64",
        "net.ipv4.icmp_ratemask": share.RATEMASK,
        # haproxy asks for keepalive probes. A peer that has gone is noticed after two minutes (tcp(7)).
        "net.ipv4.tcp_keepalive_time": "60",
        "net.ipv4.tcp_keepalive_intvl": "10",
        "net.ipv4.tcp_keepalive_probes": "6",
        # A connection that the client does not complete is forgotten after 3 seconds instead of 63 (tcp(7)).
        "net.ipv4.tcp_synack_retries": "1",
        # The buffers of haproxy's connections: memory for TCP is shared by the whole host (tcp(7)).
        "net.ipv4.tcp_rmem": "4096\t131072\t1048576",
        "net.ipv4.tcp_wmem": "4096\t16384\t1048576",
        "net.ipv4.tcp_max_tw_buckets": "32768",
        # Conntrack does not pick up a TCP connection in the middle. So the next segment does not revive a revoked one.
        # Its sender gets a reset (``lost``).
        "net.netfilter.nf_conntrack_tcp_loose": "0",
        # Packets outside the TCP window count as valid. Otherwise the ruleset would drop them as invalid, and cut off a
        # connection whose window conntrack has lost track of.
        "net.netfilter.nf_conntrack_tcp_be_liberal": "1",
        # Entries of half-open connections last for the longest pause between the first five attempts (RFC 6298), closed
        # ones for some repetitions of the last segment. ``connections`` does not count closed ones.
        "net.netfilter.nf_conntrack_tcp_timeout_syn_sent": "30",
        "net.netfilter.nf_conntrack_tcp_timeout_syn_recv": "30",
        "net.netfilter.nf_conntrack_tcp_timeout_time_wait": "30",
        "net.netfilter.nf_conntrack_tcp_timeout_close": "2",  # guard: closed-connections-are-soon-forgotten
        # Longer than dnsmasq keeps a TCP connection (150 s). Until then ``senders`` counts one that the VM has closed.
        "net.netfilter.nf_conntrack_tcp_timeout_close_wait": "180",  # guard: a-half-closed-connection-counts
    }
    # Fragments that wait for the rest of their packet, in bytes. The low mark comes first: it is at most the high one.
    for key in ("net.ipv4.ipfrag", "net.ipv6.ip6frag", "net.netfilter.nf_conntrack_frag6"):
        wanted |= {f"{key}_low_thresh": "393216", f"{key}_high_thresh": "524288"}  # guard: fragments-have-a-bound
    for where in ("all", "default", *links):
        conf = f"net.ipv4.conf.{where}"
        wanted |= {
            f"{conf}.forwarding": forwarding,
            # Off, because the check does not know the marks that select routes. Rules drop spoofed source addresses.
            f"{conf}.rp_filter": "0",
            f"{conf}.arp_ignore": "1",
            f"{conf}.arp_filter": "0",
            f"{conf}.proxy_arp": "0",
            f"{conf}.accept_redirects": "0",
            f"{conf}.send_redirects": "0",  # guard: guests-get-no-redirects
            f"{conf}.accept_source_route": "0",
            f"{conf}.accept_local": "0",
            f"{conf}.route_localnet": "0",
            f"{conf}.log_martians": "0",
        }
        if where in links:
            # Packets that wait for the answer of a neighbour; the default is 208 KiB for each neighbour.
            wanted[f"net.ipv4.neigh.{where}.unres_qlen_bytes"] = "8192"
        # The sender address of ARP requests. Public links: the packet's own source address (0). With several subnets on
        # one VLAN, mode 2 could choose an address that a strict gateway does not answer. Guest links: the gateway (2).
        wanted[f"{conf}.arp_announce"] = "2" if where in guest_links else "0"
    return wanted
