"""What a whole scope wants to find on its host."""

from __future__ import annotations

from netloom import names
from netloom.netobjects import ANYWHERE, MAIN_TABLE, Address, Neighbour, Route, Rule
from netloom.render import ip6, nft, pbr, plain_network
from netloom.render.active import Active, Exit, active, subnet
from netloom.render.marks import EXIT_MASK, table
from netloom.render.want import Port, Segment, Want
from netloom.state import Scope, Uplinks


def render(scope: Scope | None) -> Want:
    """Everything that should stand for ``scope``: nothing at all while no network of it is implemented.

    Pure: the same scope is the same value, in whatever order it was told. Routes stand in an order in which they can be
    added, and sysctls in one in which they can be written.
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
        | ip6.sysctls(scope, now, [*guest_links, *public_links]),
        ruleset=nft.ruleset(scope),
        announce=(*guests, *publics),
    )


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
    """Every NIC with an address, running or not: what is sent to the address goes to its owner or to nobody.

    So a neighbour who answers ARP for another VM's address is not given that VM's metadata (``guest.peer``).
    """
    return tuple(
        sorted(
            Neighbour(link=names.guest_link(network.network_id), address=nic.ip, mac=nic.mac)
            for network in now.networks
            for nic in network.nics.values()
            if nic.ip
        )
    )


def _guest_segment(uplinks: Uplinks, vlan: str) -> Segment:
    """A number that no VLAN can have is a VXLAN's, whatever the registration says by now."""
    if vlan == names.UNTAGGED or (uplinks.isolation == "vlan" and int(vlan) <= names.VLAN_TAG_MAX):
        return _segment(uplinks.guest, vlan)
    return Segment(
        bridge=names.vxlan_bridge(vlan), nic=uplinks.guest, vlan=vlan, vlan_link=names.vxlan_link(vlan), kind="vxlan"
    )


def _segment(nic: str, vlan: str) -> Segment:
    return Segment(
        bridge=names.bridge(nic, vlan),
        nic=nic,
        vlan=vlan,
        vlan_link="" if vlan == names.UNTAGGED else names.vlan_link(nic, vlan),
    )


def _routes(now: Active) -> tuple[Route, ...]:
    """The main table knows the guests (by their addresses) and the default exit; each exit has a table of its own.

    Subnets of other exits are not in the main table: a guest's way there goes through the default exit's
    gateway, with the address that belongs to it, and not with a foreign address onto that subnet's wire.
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


def _exit_routes(way: Exit, into: int, source: str) -> list[Route]:
    link = names.public_link(way.vlan)
    on_link = list(way.subnets)
    if way.gateway and not any(_in(way.gateway, it) for it in on_link):
        # Some providers route a subnet through a gateway outside of it.
        on_link.append(f"{way.gateway}/32")
    routes = [Route(table=into, destination=it, link=link, source=source) for it in on_link]
    if way.gateway:
        routes.append(Route(table=into, destination=ANYWHERE, link=link, via=way.gateway, source=source))
    return routes


def _in(address: str, cidr: str) -> bool:
    return subnet(f"{address}/32").subnet_of(subnet(cidr))


def _sysctls(guest_links: list[str], public_links: list[str], *, forwarding: str) -> dict[str, str]:
    """Every setting that the rest relies on: a new namespace inherits what the host happened to have.

    ``ip_forward`` comes first, because writing it sets others back. Link names of ours have no dots.
    """
    links = [*guest_links, *public_links]
    wanted = {
        "net.ipv4.ip_forward": forwarding,
        "net.ipv4.icmp_echo_ignore_all": "0",
        "net.ipv4.icmp_echo_ignore_broadcasts": "1",
        "net.ipv4.ip_default_ttl": "64",
        # No mid-stream pick-up: the guest's next segment does not bring a revoked connection back.
        "net.netfilter.nf_conntrack_tcp_loose": "0",
        # Invalid packets are dropped here, so a window that conntrack has lost sight of would end a live connection.
        "net.netfilter.nf_conntrack_tcp_be_liberal": "1",
    }
    for where in ("all", "default", *links):
        conf = f"net.ipv4.conf.{where}"
        wanted |= {
            f"{conf}.forwarding": forwarding,
            # Ways are chosen by mark, which the reverse path check does not know; spoofing is dropped by rule.
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
        # A public link asks in the name of the packet's own address: with several subnets on one VLAN the kernel's
        # choice (2) would be an address that a strict gateway does not know. Guests are asked by their gateway.
        wanted[f"{conf}.arp_announce"] = "2" if where in guest_links else "0"
    return wanted
