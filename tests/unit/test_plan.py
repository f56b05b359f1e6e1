"""Plans, applied to a simulated host that is a value. Laws are checked for many hosts and desired states."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fuzz.payload_grammar import Call, Place, walks
from fuzz.payload_laws import play
from netloom import names
from netloom.errors import ForeignScope, HostRefused
from netloom.netobjects import Address, Neighbour, Route, Rule
from netloom.plan.have import ASK_MAIN, Have, HostLink, InsideLink, Others
from netloom.plan.plan import alias_of, change, plan, sweep, sweep_gates, sweep_leases
from netloom.plan.steps import (
    AddAddress,
    AddRule,
    AdoptLink,
    AttachCarrier,
    AttachPort,
    CloseGate,
    CreateBridge,
    CreateNamespace,
    CreatePort,
    CreateVlanLink,
    CreateVxlanLink,
    GuardBridge,
    GuardOthers,
    LeasePorts,
    LoadRuleset,
    MarkPort,
    OpenGate,
    PutNeighbour,
    PutRoute,
    ReleasePorts,
    RemoveAddress,
    RemoveBridge,
    RemoveHostPort,
    RemoveNamespace,
    RemoveNeighbour,
    RemovePort,
    RemoveRoute,
    RemoveRule,
    RemoveVlanLink,
    SetCarrierMtu,
    SetHostLinkDown,
    SetHostLinkUp,
    SetLinkUp,
    SetMac,
    SetMtu,
    SetPortUp,
    SetSysctl,
    SilenceIpv6,
    Step,
    UnguardBridge,
)
from netloom.render.ruleset import Chain, Ruleset
from netloom.render.ruleset import names as names_in
from netloom.render.scope import render
from netloom.render.want import Port, Segment, Want

SCOPE = "net-204"
NOTHING = Want(namespace="")
NICS = {
    "eth1": HostLink(name="eth1", up=True, addresses=("192.0.2.11/24",)),
    "eth2": HostLink(name="eth2", up=True),
}
EMPTY = Have(scope_id=SCOPE, namespace="cs-net-204", host_links=NICS)


def segment(nic: str, vlan: str) -> Segment:
    if vlan.isdigit() and int(vlan) > names.VLAN_TAG_MAX:
        return Segment(
            bridge=names.vxlan_bridge(vlan), nic=nic, vlan=vlan, vlan_link=names.vxlan_link(vlan), kind="vxlan"
        )
    return Segment(
        bridge=names.bridge(nic, vlan),
        nic=nic,
        vlan=vlan,
        vlan_link="" if vlan == names.UNTAGGED else names.vlan_link(nic, vlan),
    )


def guest(vlan: str) -> Port:
    return Port(link="gst-204", host_link="vnetg204", mac="0a:00:00:00:00:01", segment=segment("eth1", vlan))


def public(vlan: str) -> Port:
    link = names.public_link(vlan)
    return Port(
        link=link,
        host_link=names.public_port(SCOPE, vlan),
        mac=names.mac("o", SCOPE, link),
        segment=segment("eth2", vlan),
    )


def wish(
    guest_vlan: str = "1204",
    publics: dict[str, list[int]] | None = None,
    rules: str = "accept",
    guests: dict[int, int] | None = None,
    policy: tuple[Route | Rule, ...] = (),
    gated: bool = False,
    gated_ports: frozenset[str] = frozenset(),
    lease: int = 0,
) -> Want:
    """A network with public addresses 203.0.113.x by VLAN, and one exit for each VLAN.

    ``guests`` maps the last octet of a guest's address to that of its MAC.
    """
    publics = {"101": [20]} if publics is None else publics
    ports = (guest(guest_vlan), *(public(vlan) for vlan in publics))
    held = tuple(
        Address(link=names.public_link(vlan), cidr=f"203.0.113.{number}/32")
        for vlan, numbers in publics.items()
        for number in numbers
    )
    exits = {vlan: 20001 + at for at, vlan in enumerate(publics)}
    return Want(
        namespace="cs-net-204",
        ports=ports,
        addresses=(Address(link="gst-204", cidr="10.10.1.1/24"), *held),
        routes=tuple(
            Route(table=table, destination="0.0.0.0/0", link=names.public_link(vlan), via="203.0.113.1")
            for vlan, table in exits.items()
        )
        + tuple(it for it in policy if isinstance(it, Route)),
        rules=tuple(Rule(priority=it, mark=it - 20000, mask=0xFFFF, table=it) for it in exits.values())
        + tuple(it for it in policy if isinstance(it, Rule)),
        neighbours=tuple(
            Neighbour(link="gst-204", address=f"10.10.1.{at}", mac=f"02:01:00:cc:00:{mac:02x}")
            for at, mac in (guests or {}).items()
        ),
        sysctls={"net.ipv4.ip_forward": "1"}
        | {f"net.ipv4.conf.{name}.rp_filter": "0" for name in ("all", *(port.link for port in ports))},
        ruleset=Ruleset(family="inet", table="netloom", chains=(Chain(name="a", rules=(rules,)),)),
        announce=held,
        gated=gated,
        gated_ports=gated_ports,
        lease=lease,
    )


def swept(have: Have, want: Want | None = None) -> Have:
    """The host after a tidy, when no scope claims a bridge, and scopes want the gates and leases of ``want``."""
    gated, leased = (want.closed_ends, want.leased_ends) if want is not None else (frozenset[str](), {})
    have = carry_out(have, sweep(have.host_links, frozenset(), have.guarded, have.others))
    have = carry_out(have, sweep_gates(have.closed, gated, have.closed & have.host_links.keys()))
    return carry_out(have, sweep_leases(have.leased, leased, frozenset(have.host_links)))


def carry_out(have: Have, steps: tuple[Step, ...]) -> Have:
    for step in steps:
        have = _after(have, step)
    return have


def _after(have: Have, step: Step) -> Have:
    """The host after the step. Asserts the conditions that the kernel would check."""
    host, inside = have.host_links, have.links
    match step:
        case CreateNamespace():
            assert not have.exists
            return replace(have, exists=True)
        case RemoveNamespace():
            assert have.exists
            return replace(
                EMPTY,
                host_links=host,
                claimed=have.claimed,
                guarded=have.guarded,
                others=have.others,
                closed=have.closed,
                leased=have.leased,
            )
        case SetSysctl(_, key, value):
            assert all(word in inside for word in key.split(".") if word.startswith(("gst-", "pub-")))
            return replace(have, sysctls={**have.sysctls, key: value})
        case RemoveRoute(_, route):
            assert route in have.routes
            return replace(have, routes=tuple(it for it in have.routes if it != route))
        case PutRoute(_, route):
            assert inside[route.link].up if route.link else route.kind == "blackhole"
            others = [it for it in have.routes if (it.table, it.destination) != (route.table, route.destination)]
            return replace(have, routes=(*others, route))
        case RemoveRule(_, rule):
            return replace(have, rules=tuple(it for it in have.rules if it != rule))
        case AddRule(_, rule) if rule == ASK_MAIN:
            assert not have.asks_main
            return replace(have, asks_main=True)
        case AddRule(_, rule):
            assert rule not in have.rules
            return replace(have, rules=(*have.rules, rule))
        case RemoveAddress(_, address):
            assert address in have.addresses
            kept = tuple(it for it in have.addresses if it != address)
            return replace(have, addresses=kept, cut_off=have.cut_off - {address})
        case AddAddress(_, address):
            assert address.link in inside
            assert address not in have.addresses
            return replace(have, addresses=(*have.addresses, address))
        case RemoveNeighbour(_, neighbour):
            assert neighbour in have.neighbours
            return replace(have, neighbours=tuple(it for it in have.neighbours if it != neighbour))
        case PutNeighbour(_, neighbour):
            assert inside[neighbour.link].up, "it would be forgotten when the link comes up"
            rest = [it for it in have.neighbours if (it.link, it.address) != (neighbour.link, neighbour.address)]
            return replace(have, neighbours=(*rest, neighbour))
        case LoadRuleset(_, want):
            assert have.exists
            return replace(have, marker=want.marker, ruleset=want, table=names_in(want))
        case RemovePort(_, link):
            have = _without_host_link(have, inside[link].host_link)
            return replace(
                have,
                links={name: it for name, it in inside.items() if name != link},
                addresses=tuple(it for it in have.addresses if it.link != link),
                cut_off=frozenset(it for it in have.cut_off if it.link != link),
                routes=tuple(it for it in have.routes if it.link != link),
                neighbours=tuple(it for it in have.neighbours if it.link != link),
                sysctls={key: value for key, value in have.sysctls.items() if link not in key.split(".")},
            )
        case RemoveHostPort(link) | RemoveVlanLink(link):
            assert host[link].ours or (link.startswith("eth1.") and not host[link].master)
            return _without_host_link(have, link)
        case RemoveBridge(link):
            assert host[link].ours or not {it for it in host[link].ports if not it.startswith("eth1.")}
            assert link not in have.claimed
            freed = {name: replace(it, master="") if it.master == link else it for name, it in host.items()}
            return _without_host_link(replace(have, host_links=freed), link)
        case CreateBridge(name, alias):
            assert name not in host
            return _with_host_link(have, HostLink(name=name, kind="bridge", alias=alias, ipv6=True))
        case CreateVlanLink(name, nic, vlan):
            assert name not in host
            mtu = host[nic].mtu
            made = HostLink(name=name, kind="vlan", parent=nic, vlan_id=vlan, alias="netloom", ipv6=True, mtu=mtu)
            return _with_host_link(have, made)
        case CreateVxlanLink(name, under, vni):
            assert name not in host
            assert host[under].addresses
            mtu = host[under].mtu - 50 if host[under].mtu else 0
            made = HostLink(name=name, kind="vxlan", vlan_id=vni, alias="netloom", ipv6=True, mtu=mtu)
            return _with_host_link(have, made)
        case GuardBridge(bridge):
            assert host[bridge].ours
            return replace(have, guarded=have.guarded | {bridge})
        case GuardOthers(others):
            assert others.bridges <= host.keys()
            return replace(have, others=others)
        case UnguardBridge(bridge, last):
            left = have.guarded - {bridge}
            assert bridge in have.guarded
            assert last == (not left and not have.others.bridges)
            return replace(have, guarded=left)
        case CloseGate(links):
            assert not have.closed & set(links)
            return replace(have, closed=have.closed | set(links))
        case OpenGate(links):
            assert have.closed >= set(links)
            return replace(have, closed=have.closed - set(links))
        case LeasePorts(links, mark):
            assert all(have.leased.get(it) != mark for it in links)
            return replace(have, leased=have.leased | dict.fromkeys(links, mark))
        case ReleasePorts(links):
            assert have.leased.keys() >= set(links)
            return replace(have, leased={it: mark for it, mark in have.leased.items() if it not in links})
        case AttachCarrier(link, bridge) | AttachPort(link, bridge):
            assert host[bridge].kind == "bridge"
            have = _with_host_link(have, replace(host[link], master=bridge))
            return _ported(have)
        case SetHostLinkUp(link) | SetPortUp(link):
            if host[link].kind == "vlan":
                assert host[host[link].parent].up
            if host[link].ours and host[link].kind == "bridge":
                assert link in have.guarded
            assert not (host[link].ours and host[link].ipv6), "the host would get an address on it"
            return _with_host_link(have, replace(host[link], up=True))
        case SetHostLinkDown(link):
            return _with_host_link(have, replace(host[link], up=False))
        case SilenceIpv6(link):
            return _with_host_link(have, replace(host[link], ipv6=False))
        case CreatePort(_, port, bridge, alias, mtu):
            assert have.marker, "a link before the rules"
            assert port.link not in inside
            assert port.host_link not in host
            assert host[bridge].kind == "bridge"
            inner = InsideLink(name=port.link, kind="veth", mac=port.mac, host_link=port.host_link, mtu=mtu)
            have = replace(have, links={**inside, port.link: inner})
            end = HostLink(name=port.host_link, kind="veth", master=bridge, alias=alias, ipv6=True, mtu=mtu)
            return _ported(_with_host_link(have, end))
        case SetMtu("", link, mtu) | SetCarrierMtu(link, mtu):
            if isinstance(step, SetCarrierMtu):
                assert host[link].ours
            return _with_host_link(have, replace(host[link], mtu=mtu))
        case SetMtu(_, link, mtu):
            return replace(have, links={**inside, link: replace(inside[link], mtu=mtu)})
        case MarkPort(link, alias) | AdoptLink(link, alias):
            return _with_host_link(have, replace(host[link], alias=alias))
        case SetMac(_, link, mac):
            rest = [it for it in have.neighbours if it.link != link]
            return replace(have, links={**inside, link: replace(inside[link], mac=mac)}, neighbours=tuple(rest))
        case SetLinkUp(_, "lo"):
            return replace(have, loopback_up=True)
        case SetLinkUp(_, link):
            return replace(have, links={**inside, link: replace(inside[link], up=True)})
    raise AssertionError(f"unknown step {step!r}")


def _with_host_link(have: Have, link: HostLink) -> Have:
    return replace(have, host_links={**have.host_links, link.name: link})


def _without_host_link(have: Have, name: str) -> Have:
    return _ported(replace(have, host_links={key: it for key, it in have.host_links.items() if key != name}))


def _ported(have: Have) -> Have:
    """Set the ports of each bridge to the links that name it as their master."""
    host = {
        name: replace(it, ports=tuple(sorted(p.name for p in have.host_links.values() if p.master == name)))
        for name, it in have.host_links.items()
    }
    return replace(have, host_links=host)


def built(want: Want, have: Have = EMPTY) -> Have:
    return carry_out(have, plan(have, want))


# ------------------------------------------------------------------------------------------------------------ laws

PUBLICS = st.dictionaries(
    st.sampled_from(["101", "102", "untagged"]), st.lists(st.integers(20, 29), max_size=4, unique=True), max_size=3
)
GUESTS = st.dictionaries(st.integers(11, 14), st.integers(1, 3), max_size=3)
POLICIES = st.lists(
    st.one_of(
        st.builds(Route, table=st.just(100), destination=st.just("192.0.2.0/24"), kind=st.just("blackhole")),
        st.builds(Route, table=st.just(101), destination=st.just("0.0.0.0/0"), link=st.just("gst-204")),
        st.builds(
            Rule,
            priority=st.integers(10000, 10002),
            mark=st.just(1 << 16),
            mask=st.just(1 << 16),
            table=st.sampled_from([100, 101]),
            source=st.sampled_from(["", "10.10.1.0/24"]),
            iif=st.sampled_from(["", "gst-204"]),
        ),
    ),
    max_size=3,
    unique=True,
).map(tuple)
WISHES = st.one_of(
    st.just(NOTHING),
    st.builds(
        wish,
        st.sampled_from(["1204", "1311", "16777215"]),
        PUBLICS,
        st.sampled_from(["accept", "drop"]),
        GUESTS,
        POLICIES,
        st.booleans(),
        st.sets(st.sampled_from(["vnetg204", "vnetpn204.101", "vnetpn204.102"])).map(frozenset),
        st.sampled_from([0, 7, 8]),
    ),
)
CONTENTS = st.tuples(
    st.lists(st.lists(st.integers(20, 29), max_size=4, unique=True), min_size=2, max_size=2),
    st.fixed_dictionaries({"rules": st.sampled_from(["accept", "drop"]), "guests": GUESTS, "policy": POLICIES}),
)
DAMAGES = st.lists(
    st.sampled_from(
        [
            "address",
            "route",
            "on-link route",
            "rule",
            "rule of the kernel",
            "neighbour",
            "port",
            "bridge",
            "master",
            "down",
            "mac",
            "alias",
            "namespace",
            "table",
            "gates",
            "gate",
            "leases",
            "lease",
        ]
    )
)


def damaged(have: Have, kinds: list[str]) -> Have:
    """The host after objects were removed or changed by hand."""
    for kind in kinds:
        ports = [it for it in have.links.values() if it.host_link]
        ours = [it.name for it in have.host_links.values() if it.kind == "bridge" and it.ours]
        match kind:
            case "address":
                have = replace(have, addresses=have.addresses[1:], cut_off=have.cut_off - {*have.addresses[:1]})
            case "route":
                have = replace(have, routes=have.routes[1:])
            case "on-link route":
                have = replace(have, cut_off=frozenset(it for it in have.addresses if it.on_link))
            case "rule of the kernel":
                have = replace(have, asks_main=not have.exists)
            case "rule":
                have = replace(have, rules=have.rules[1:])
            case "neighbour":
                have = replace(have, neighbours=have.neighbours[1:])
            case "alias" if ports:
                have = _with_host_link(have, replace(have.host_links[ports[0].host_link], alias=""))
            case "mac" if ports:
                have = _after(have, SetMac(have.namespace, ports[0].name, "02:00:00:00:00:99"))
            case "port" if ports:
                have = _after(have, RemovePort(have.namespace, ports[0].name))
            case "bridge" if ours:
                have = _after(replace(have, claimed=frozenset()), RemoveBridge(ours[0]))
            case "master" if ports:
                have = _with_host_link(have, replace(have.host_links[ports[-1].host_link], master=""))
                have = _ported(have)
            case "down" if ports:
                left = tuple(it for it in have.neighbours if it.link != ports[0].name)
                down = {**have.links, ports[0].name: replace(ports[0], up=False)}
                have = replace(have, links=down, neighbours=left)
            case "namespace" if have.exists:
                for link in ports:
                    have = _after(have, RemovePort(have.namespace, link.name))
                have = _after(have, RemoveNamespace(have.namespace))
            case "table":
                have = replace(have, marker="", ruleset=None, table=None)
            case "gates":
                have = replace(have, closed=frozenset())
            case "gate":
                have = replace(have, closed=frozenset(sorted(have.closed)[1:]))
            case "leases":
                have = replace(have, leased={})
            case "lease":
                have = replace(have, leased=dict(sorted(have.leased.items())[1:]))
    return have


@given(WISHES, DAMAGES, WISHES)
@settings(max_examples=300, deadline=None)
def test_one_plan_reaches_the_desired_state_and_the_next_is_empty(first: Want, harm: list[str], then: Want) -> None:
    have = damaged(built(first), harm)
    steps = plan(have, then)
    after = carry_out(have, steps)
    assert plan(after, then) == ()
    assert set(after.addresses) == set(then.addresses)
    assert not after.cut_off
    assert set(after.routes) == set(then.routes)
    assert set(after.rules) == set(then.rules)
    assert set(after.neighbours) == set(then.neighbours)
    assert set(after.links) == {port.link for port in then.ports}
    assert after.closed & after.host_links.keys() == then.closed_ends
    assert {it: mark for it, mark in after.leased.items() if it in after.host_links} == then.leased_ends
    assert swept(after, then).closed == then.closed_ends
    assert swept(after, then).leased == then.leased_ends


# A wish, and another one with the same ports, gates and lease.
CHANGES = st.builds(
    lambda base, *contents: tuple(
        wish(publics=dict(zip(("101", "102"), held, strict=True)), **base, **more) for held, more in contents
    ),
    st.fixed_dictionaries(
        {"guest_vlan": st.sampled_from(["1204", "16777215"]), "gated": st.booleans(), "lease": st.sampled_from([0, 7])}
    ),
    *2 * (CONTENTS,),
)


@given(CHANGES)
@settings(max_examples=300, deadline=None)
def test_a_change_of_what_has_converged_is_what_a_plan_would_do(wishes: tuple[Want, Want]) -> None:
    first, then = wishes
    have = built(first)
    assert change(first, then) == plan(have, then)


@given(WISHES, WISHES)
@settings(max_examples=300, deadline=None)
def test_what_takes_a_look_at_the_host_is_no_change(first: Want, then: Want) -> None:
    steps = change(first, then)
    same = [getattr(first, it) == getattr(then, it) for it in ("namespace", "ports", "gated", "gated_ports", "lease")]
    assert (steps is not None) == all(same)


def through(have: Have) -> set[str]:
    """The host ends of the scope that frames pass."""
    return {it.name for it in have.host_links.values() if it.alias == alias_of(SCOPE) and it.master} - have.closed


@pytest.mark.mutation("a-gate-closes-before-its-port-exists")
@given(WISHES, DAMAGES, WISHES)
@settings(max_examples=300, deadline=None)
def test_no_frame_passes_a_gated_scope_after_the_first_step(first: Want, harm: list[str], then: Want) -> None:
    then = replace(then, gated=True)
    have = damaged(built(first), harm)
    steps = plan(have, then)
    for number in range(min(1, len(steps)), len(steps) + 1):
        assert not through(carry_out(have, steps[:number])), steps


@given(WISHES, DAMAGES, WISHES)
@settings(max_examples=300, deadline=None)
def test_no_frame_passes_a_single_gated_port_after_the_first_step(first: Want, harm: list[str], then: Want) -> None:
    have = damaged(built(first), harm)
    steps = plan(have, then)
    for number in range(min(1, len(steps)), len(steps) + 1):
        assert not through(carry_out(have, steps[:number])) & then.closed_ends, steps


@given(WISHES, DAMAGES, WISHES)
@settings(max_examples=300, deadline=None)
def test_a_gate_opens_with_the_last_step(first: Want, harm: list[str], then: Want) -> None:
    have = damaged(built(replace(first, gated=True)), harm)
    steps = plan(have, replace(then, gated=False, gated_ports=frozenset()))
    assert not any(isinstance(step, CloseGate) for step in steps)
    assert not any(isinstance(step, OpenGate) for step in steps[:-1])
    for number in range(len(steps)):
        assert have.closed == carry_out(have, steps[:number]).closed


def without(have: Have, mark: int) -> set[str]:
    """The host ends of the scope that frames pass without the lease with this mark."""
    ports = {it.name for it in have.host_links.values() if it.alias == alias_of(SCOPE) and it.master}
    return {it for it in ports if have.leased.get(it) != mark}


@pytest.mark.mutation("a-port-needs-its-lease-before-it-exists")
@given(WISHES, DAMAGES, WISHES)
@settings(max_examples=300, deadline=None)
def test_no_frame_passes_without_the_lease_after_the_first_steps(first: Want, harm: list[str], then: Want) -> None:
    then = replace(then, lease=9)
    have = damaged(built(first), harm)
    steps = plan(have, then)
    begun = [it for it in range(len(steps)) if isinstance(steps[it], LeasePorts | CloseGate)]
    assert begun == list(range(len(begun)))
    for number in range(len(begun), len(steps) + 1):
        assert not without(carry_out(have, steps[:number]), 9), steps


@given(WISHES, DAMAGES, WISHES)
@settings(max_examples=300, deadline=None)
def test_ports_are_released_when_all_else_is_in_place(first: Want, harm: list[str], then: Want) -> None:
    have = damaged(built(replace(first, lease=9)), harm)
    steps = plan(have, replace(then, lease=0))
    assert not any(isinstance(step, LeasePorts) for step in steps)
    for number, step in enumerate(steps):
        assert have.leased == carry_out(have, steps[:number]).leased or isinstance(step, OpenGate)


def test_gates_of_other_scopes_are_left_alone() -> None:
    others = replace(EMPTY, closed=frozenset({"vnetg7"}))
    have = built(wish(gated=True), others)
    assert have.closed == {"vnetg7", "vnetg204", "vnetpn204.101"}
    assert built(wish(), have).closed == {"vnetg7"}
    assert built(NOTHING, have).closed == {"vnetg7"}
    others = replace(EMPTY, leased={"vnetg7": 5})
    have = built(wish(lease=6), others)
    assert have.leased == {"vnetg7": 5, "vnetg204": 6, "vnetpn204.101": 6}
    assert built(wish(), have).leased == {"vnetg7": 5}
    assert built(NOTHING, have).leased == {"vnetg7": 5}


def test_the_gates_of_ports_that_were_removed_by_earlier_steps_are_opened() -> None:
    have = replace(EMPTY, closed=frozenset({"vnetg7", "vnetg204"}), left=frozenset({"vnetg204", "vnetg205"}))
    assert plan(have, NOTHING) == (OpenGate(("vnetg204",)),)
    gated = wish(gated=True)
    assert plan(replace(built(gated), left=frozenset({"vnetg205"})), gated) == ()
    have = replace(EMPTY, leased={"vnetg7": 5, "vnetg204": 6}, left=frozenset({"vnetg204", "vnetg205"}))
    assert plan(have, NOTHING) == (ReleasePorts(("vnetg204",)),)


def test_a_tidy_closes_wanted_gates_and_forgets_those_of_links_that_are_gone() -> None:
    closed, wanted, existing = frozenset({"a", "b", "c"}), frozenset({"b", "d"}), frozenset({"a", "b"})
    assert sweep_gates(closed, wanted, existing) == (CloseGate(("d",)), OpenGate(("c",)))
    assert sweep_gates(wanted, wanted, existing) == ()


def test_a_tidy_restores_wanted_leases_and_forgets_those_of_links_that_are_gone() -> None:
    leased, wanted, existing = {"a": 1, "b": 1, "c": 2}, {"b": 2, "d": 1}, frozenset({"a", "b"})
    restored = (LeasePorts(("d",), 1), LeasePorts(("b",), 2), ReleasePorts(("c",)))
    assert sweep_leases(leased, wanted, existing) == restored
    assert sweep_leases(wanted, wanted, existing) == ()


@given(walks())
@settings(max_examples=50, deadline=None)
def test_one_plan_reaches_what_any_sequence_of_calls_wants(walk: tuple[str, list[tuple[Call, Place]]]) -> None:
    have = replace(EMPTY, scope_id=walk[0], namespace=f"cs-{walk[0]}")
    for scope in play(walk):
        try:
            steps = plan(have, render(scope))
        except HostRefused:  # a network without a VLAN on a NIC that the host itself uses
            continue
        have = carry_out(have, steps)
        assert plan(have, render(scope)) == ()


@given(WISHES, DAMAGES)
@settings(max_examples=200, deadline=None)
def test_removal_restores_the_original_host(want: Want, harm: list[str]) -> None:
    after = built(NOTHING, damaged(built(want), harm))
    # A scope no longer sees a bridge that lost our port by hand. The sweep sees the whole host.
    assert swept(after) == EMPTY


@given(WISHES, WISHES)
@settings(max_examples=200, deadline=None)
def test_the_ruleset_is_loaded_before_additions_and_after_removals(first: Want, then: Want) -> None:
    steps = plan(built(first), then)
    kinds = [type(step) for step in steps]
    if LoadRuleset in kinds:
        at = kinds.index(LoadRuleset)
        opening = (CreatePort, AddAddress, PutRoute, AddRule, SetLinkUp, AttachPort)
        closing = (RemovePort, RemoveAddress, RemoveRoute, RemoveRule)
        assert not any(kind in opening for kind in kinds[:at])
        assert not any(kind in closing for kind in kinds[at:])


@given(WISHES, WISHES)
@settings(max_examples=100, deadline=None)
def test_a_bridge_that_another_scope_wants_is_never_removed(first: Want, then: Want) -> None:
    have = built(first)
    bridges = frozenset(it.name for it in have.host_links.values() if it.kind == "bridge")
    steps = plan(replace(have, claimed=bridges), then)
    assert not any(isinstance(step, RemoveBridge) for step in steps)


@given(WISHES, WISHES)
@settings(max_examples=100, deadline=None)
def test_an_unchanged_neighbour_is_not_touched(first: Want, then: Want) -> None:
    have = built(first)
    stays = {it for it in first.neighbours if it in then.neighbours}
    touched = {it.neighbour for it in plan(have, then) if isinstance(it, PutNeighbour | RemoveNeighbour)}
    assert not touched & stays


# ------------------------------------------------------------------------------------------------------ cases by name


@pytest.mark.mutation("a-lost-port-comes-back-to-a-new-bridge")
@pytest.mark.parametrize("is_there", [False, True])
def test_the_ports_of_a_lost_bridge_come_back(is_there: bool) -> None:
    want, tap = wish(publics={}), HostLink(name="vnet9", kind="tun")
    have = built(want) if is_there else EMPTY
    have = replace(have, host_links={**have.host_links, "vnet9": tap}, orphans={"breth1-1204": frozenset({"vnet9"})})
    steps = plan(have, want)
    assert AttachPort("vnet9", "breth1-1204") in steps
    assert len(steps) == 1 or not is_there


def test_the_steps_of_a_new_network() -> None:
    assert [str(step) for step in plan(EMPTY, wish(publics={}))] == [
        "create namespace cs-net-204",
        "set net.ipv4.ip_forward = 1 in cs-net-204",
        "set net.ipv4.conf.all.rp_filter = 0 in cs-net-204",
        "load ruleset inet netloom of cs-net-204",
        "create VLAN link eth1.1204 on eth1",
        "create bridge breth1-1204, alias netloom raises eth1.1204",
        "set net.ipv6.conf.eth1.1204.disable_ipv6 = 1",
        "set net.ipv6.conf.breth1-1204.disable_ipv6 = 1",
        "guard the host's sockets from breth1-1204, and eth1.1204",
        "attach eth1.1204 to breth1-1204",
        "set eth1.1204 up",
        "set breth1-1204 up",
        "create vnetg204 on breth1-1204 with gst-204 in cs-net-204",
        "set net.ipv6.conf.vnetg204.disable_ipv6 = 1",
        "set net.ipv4.conf.gst-204.rp_filter = 0 in cs-net-204",
        "add address 10.10.1.1/24 to gst-204",
        "set lo up in cs-net-204",
        "set vnetg204 up",
        "set gst-204 up in cs-net-204",
    ]


@pytest.mark.parametrize(
    ("vlan", "nic_mtu", "mtu"),
    [("1204", 9000, 9000), ("1204", 1400, 1400), ("16777215", 9000, 8950), ("16777215", 1500, 1450)],
)
def test_ports_follow_the_mtu_of_the_nic_up_and_down(vlan: str, nic_mtu: int, mtu: int) -> None:
    def with_mtu(have: Have, mtu: int) -> Have:
        return _with_host_link(have, replace(have.host_links["eth1"], mtu=mtu))

    want = wish(vlan, {})
    for first in (1500, nic_mtu):
        have = with_mtu(built(want, with_mtu(EMPTY, first)), nic_mtu)
        after = built(want, have)
        carrier = next(it for it in after.host_links.values() if it.kind in ("vlan", "vxlan"))
        # The kernel itself lowers a VLAN link; the plan does not.
        lowered = vlan == "1204" and nic_mtu < first
        assert carrier.mtu == (first if lowered else mtu)
        assert {after.host_links["vnetg204"].mtu, after.links["gst-204"].mtu} == {carrier.mtu}
        assert plan(after, want) == ()


@pytest.mark.mutation("guests-set-no-mtu", instead="[it.mtu for it in ports]")
def test_ports_of_an_operators_bridge_follow_its_uplinks_and_not_its_other_ports() -> None:
    bridge = HostLink(name="br0", kind="bridge", up=True, mtu=1500, ports=("bond0", "tap1", "veth0a1", "vnetg9"))
    ports = (
        HostLink(name="bond0", kind="bond", up=True, master="br0", mtu=9000),
        HostLink(name="tap1", kind="tun", up=True, master="br0", mtu=1500),
        HostLink(name="veth0a1", kind="veth", elsewhere=True, up=True, master="br0", mtu=1500),
        HostLink(name="vnetg9", kind="veth", up=True, master="br0", mtu=1500, alias="netloom net-9"),
    )
    have = replace(EMPTY, host_links={it.name: it for it in (bridge, *ports)})
    port = replace(guest("untagged"), segment=segment("br0", "untagged"))
    after = built(replace(wish(publics={}), ports=(port,)), have)
    assert after.host_links["vnetg204"].mtu == after.links["gst-204"].mtu == 9000


def test_a_vlan_change_moves_the_guest_port_and_removes_the_old_bridge() -> None:
    have = built(wish("1204", {}))
    steps = [str(step) for step in plan(have, wish("1311", {}))]
    assert "attach vnetg204 to breth1-1311" in steps
    assert steps[-3:] == ["remove bridge breth1-1204", "remove VLAN link eth1.1204", "remove the guard of breth1-1204"]
    assert not any(step.startswith(("create vnetg", "remove link")) for step in steps)


@pytest.mark.mutation("a-new-prefix-length-leaves-no-gap")
@pytest.mark.parametrize("cidr", ["10.10.1.1/25", "10.10.1.1/16"])
def test_an_address_with_another_prefix_length_is_never_missing(cidr: str) -> None:
    want = wish()
    then = replace(want, addresses=(Address(link="gst-204", cidr=cidr), *want.addresses[1:]))
    assert [str(step) for step in plan(built(want), then)] == [
        f"add address {cidr} to gst-204",
        "remove address 10.10.1.1/24 from gst-204",
    ]


def test_a_bridge_with_a_vm_is_kept_when_the_network_is_removed() -> None:
    have = built(wish(publics={}))
    tap = HostLink(name="vnet7", kind="tun", master="breth1-1204")
    after = built(NOTHING, _ported(_with_host_link(have, tap)))
    assert "breth1-1204" in after.host_links
    assert "vnetg204" not in after.host_links
    gone = _without_host_link(after, "vnet7")
    assert carry_out(gone, sweep(gone.host_links, frozenset(), gone.guarded, gone.others)) == EMPTY


def test_an_existing_bridge_is_used_and_kept() -> None:
    nic = {
        **NICS,
        "eth1.1204": HostLink(name="eth1.1204", kind="vlan", parent="eth1", vlan_id=1204, master="breth1-1204"),
    }
    bridge = HostLink(name="breth1-1204", kind="bridge", up=True, addresses=("192.0.2.77/24",))
    theirs = _ported(replace(EMPTY, host_links={**nic, "breth1-1204": bridge}))
    have = built(wish(publics={}), theirs)
    assert have.host_links["vnetg204"].master == "breth1-1204"
    assert have.guarded == frozenset()
    assert built(NOTHING, have).host_links["breth1-1204"] == theirs.host_links["breth1-1204"]


def _made_by_kvm(*more: HostLink, **changes: object) -> Have:
    """A host with the network in a bridge of CloudStack's KVM agent, and the links ``more``."""
    bridge = HostLink(name="breth1-1204", kind="bridge", up=True)
    vlan = HostLink(name="eth1.1204", kind="vlan", parent="eth1", vlan_id=1204, master="breth1-1204", up=True)
    found = {it.name: it for it in (bridge, vlan, *more)}
    have = built(wish(publics={}), _ported(replace(EMPTY, host_links={**NICS, **found})))
    return _with_host_link(have, replace(have.host_links["breth1-1204"], **changes))


def test_a_bridge_of_the_kvm_agent_is_removed_with_our_port_if_it_was_the_last() -> None:
    """When the last VM goes, the KVM agent keeps a bridge that has our port, and never checks it again."""
    assert swept(built(NOTHING, _made_by_kvm())) == EMPTY
    moved = built(wish("1311", {}), _made_by_kvm())
    assert not {"breth1-1204", "eth1.1204"} & moved.host_links.keys()


def _with_bridge(*ports: HostLink, **changes: object) -> Others:
    """The guard of an operator's bridge with an uplink, a VM, a container, and a veth to another bridge."""
    nic = HostLink(name="eth1", up=True, master="cloudbr0")
    more = (
        HostLink(name="vnet7", kind="tun", master="cloudbr0"),
        HostLink(name="veth0a1", kind="veth", master="cloudbr0", elsewhere=True),
        HostLink(name="to-br7", kind="veth", master="cloudbr0"),
    )
    bridge = replace(HostLink(name="cloudbr0", kind="bridge", up=True), **changes)
    there = {it.name: it for it in (nic, bridge, *more, *ports)}
    have = built(wish("untagged", {}), _ported(replace(EMPTY, host_links={**NICS, **there})))
    assert sweep(have.host_links, frozenset({"cloudbr0"}), have.guarded, have.others) == ()
    assert plan(have, wish("untagged", {})) == ()
    assert swept(built(NOTHING, have)).others == Others()
    return have.others


def test_the_guard_of_an_operators_bridge_leaves_what_the_host_itself_needs() -> None:
    bridge = frozenset({"cloudbr0"})
    guests, uplinks = frozenset({"vnet7", "veth0a1"}), frozenset({"eth1", "to-br7"})
    assert _with_bridge() == Others(bridges=bridge, closed=bridge, ports=guests, uplinks=uplinks)
    served = Others(bridges=bridge, ports=guests, uplinks=uplinks)
    assert _with_bridge(addresses=("192.0.2.77/24",)) == served
    assert _with_bridge(above=True) == served
    assert _with_bridge(vlan_filtering=True) == Others(bridges=bridge, closed=bridge, ports=guests, trunks=uplinks)
    odd = HostLink(name="vnet@8", kind="tun", master="cloudbr0")  # not a word of nftables
    assert _with_bridge(odd) == Others(bridges=bridge, closed=bridge, ports=guests, uplinks=uplinks)


def test_a_network_that_moves_or_a_bridge_that_gets_an_address_changes_the_guard() -> None:
    have = _made_by_kvm(HostLink(name="vnet7", kind="tun", master="breth1-1204"))
    moved = swept(built(wish("1311", {}), have))
    assert moved.others == Others()
    served = _with_host_link(have, replace(have.host_links["breth1-1204"], addresses=("192.0.2.77/24",)))
    assert swept(served).others == replace(have.others, closed=frozenset())


def test_an_interrupted_bridge_adoption_is_finished_by_the_next_plan() -> None:
    steps = plan(_made_by_kvm(), NOTHING)
    assert [str(it) for it in steps][:3] == [
        "adopt eth1.1204, alias netloom",
        "adopt breth1-1204, alias netloom carries eth1.1204",
        "remove link gst-204 of cs-net-204",
    ]
    for done in range(len(steps)):
        after = carry_out(_made_by_kvm(), steps[:done])
        # Without its port the scope no longer sees the bridge. The sweep sees the whole host.
        after = carry_out(after, sweep(after.host_links, frozenset(), after.guarded, after.others))
        assert after.links or "breth1-1204" not in after.host_links
        assert swept(built(NOTHING, after)) == EMPTY


@pytest.mark.parametrize(
    "kept",
    [
        _made_by_kvm(HostLink(name="vnet7", kind="tun", master="breth1-1204")),
        _made_by_kvm(HostLink(name="vnetg205", kind="veth", master="breth1-1204", alias="netloom net-205")),
        _made_by_kvm(addresses=("192.0.2.77/24",)),
        _made_by_kvm(alias="the storage people's"),
        replace(_made_by_kvm(), claimed=frozenset({"breth1-1204"})),
    ],
    ids=["a-vm", "another-network", "an-address", "an-alias", "claimed"],
)
def test_a_bridge_in_use_by_others_is_kept(kept: Have) -> None:
    after = built(NOTHING, kept)
    assert {"breth1-1204", "eth1.1204"} <= after.host_links.keys()
    assert "vnetg204" not in after.host_links


def test_a_vlan_link_with_an_address_is_kept() -> None:
    have = _made_by_kvm()
    have = _with_host_link(have, replace(have.host_links["eth1.1204"], addresses=("192.0.2.77/24",)))
    after = built(NOTHING, have)
    assert "eth1.1204" in after.host_links
    assert "breth1-1204" not in after.host_links


def test_a_vlan_link_is_found_by_its_tag_under_any_name() -> None:
    other = HostLink(name="vlan1204", kind="vlan", parent="eth1", vlan_id=1204, master="cloudbr7", up=True)
    bridge = HostLink(name="cloudbr7", kind="bridge", up=True)
    have = built(wish(publics={}), _ported(replace(EMPTY, host_links={**NICS, "vlan1204": other, "cloudbr7": bridge})))
    assert have.host_links["vnetg204"].master == "cloudbr7"
    assert "breth1-1204" not in have.host_links


def test_an_existing_tunnel_is_used_under_any_name_and_kept() -> None:
    other = HostLink(name="vni-5001", kind="vxlan", vlan_id=5001, master="brvx-5001", up=True)
    bridge = HostLink(name="brvx-5001", kind="bridge", up=True)
    bare = {nic: replace(link, addresses=()) for nic, link in NICS.items()}
    theirs = _ported(replace(EMPTY, host_links={**bare, "vni-5001": other, "brvx-5001": bridge}))
    have = built(wish("5001", {}), theirs)
    assert have.host_links["vnetg204"].master == "brvx-5001"
    assert swept(built(NOTHING, have)) == theirs


def test_a_tunnel_uses_the_link_that_has_the_address() -> None:
    bridge = HostLink(name="cloudbr1", kind="bridge", up=True, addresses=("192.0.2.11/24",))
    plugged = {**NICS, "eth1": HostLink(name="eth1", up=True, master="cloudbr1"), "cloudbr1": bridge}
    steps = plan(_ported(replace(EMPTY, host_links=plugged)), wish("5001", {}))
    assert "create VXLAN link vxlan5001 over cloudbr1" in map(str, steps)
    assert "create VXLAN link vxlan5001 over eth1" in map(str, plan(EMPTY, wish("5001", {})))
    plugged["cloudbr1"] = replace(bridge, addresses=("2001:db8::11/64",))
    with pytest.raises(HostRefused, match=r"cloudbr1 has no IPv4 address for VXLAN.*guest\.network\.device"):
        plan(_ported(replace(EMPTY, host_links=plugged)), wish("5001", {}))


def test_untagged_uses_the_bridge_of_the_nic() -> None:
    in_bridge = {
        "eth2": HostLink(name="eth2", up=True, master="cloudbr1"),
        "cloudbr1": HostLink(name="cloudbr1", kind="bridge", up=True),
    }
    have = built(wish(publics={"untagged": [20]}), _ported(replace(EMPTY, host_links={**NICS, **in_bridge})))
    assert have.host_links["vnetpn204.0"].master == "cloudbr1"


def test_untagged_is_refused_on_a_nic_with_the_address_of_the_host() -> None:
    addressed = replace(
        EMPTY, host_links={**NICS, "eth2": HostLink(name="eth2", up=True, addresses=("192.0.2.11/24",))}
    )
    with pytest.raises(HostRefused, match=r"eth2 carries the host's address 192.0.2.11/24.*public\.network\.device"):
        plan(addressed, wish(publics={"untagged": [20]}))


@pytest.mark.parametrize(("nic", "detail"), [("eth1", "guest.network.device"), ("eth2", "public.network.device")])
def test_a_missing_nic_names_the_detail_to_check(nic: str, detail: str) -> None:
    have = replace(EMPTY, host_links={name: link for name, link in NICS.items() if name != nic})
    with pytest.raises(HostRefused, match=rf"NIC {nic} does not exist on this host.*{detail}"):
        plan(have, wish())


def test_a_foreign_namespace_is_refused_and_never_removed() -> None:
    theirs = replace(EMPTY, exists=True, foreign="link wg0 is in it")
    with pytest.raises(ForeignScope, match=r"cs-net-204 is there already and is not ours: link wg0 is in it"):
        plan(theirs, wish())
    assert plan(theirs, NOTHING) == ()


def test_a_foreign_link_with_the_name_of_our_port_is_not_removed() -> None:
    stranger = replace(EMPTY, host_links={**NICS, "vnetg204": HostLink(name="vnetg204", kind="tun")})
    with pytest.raises(HostRefused, match="vnetg204 is there already and is not ours"):
        plan(stranger, wish())
