"""Replacing one ruleset by another: the kernel has exactly the new one, and no packet is affected in between."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from msgspec.structs import replace

from kernel.flood import Flood, swaps
from kernel.ruleset_lab import CLIENT, CLIENT2, STRANGER, Lab, Nft, echoes, run
from model.scope_strategies import scopes
from netloom.render import nft, ruleset
from netloom.render.ruleset import Chain, NftSet, Ruleset
from netloom.state import Scope
from unit.scopes import A1, A2, B1, GATEWAY, VM1, VM2, VM3, admit, egress, forward, static, wish


class Bench(Nft):
    """A namespace that contains only the table."""

    def __init__(self) -> None:
        self.name = f"rtest-{os.getpid()}-bench"
        run("ip", "netns", "add", self.name)
        super().__init__(self.name)

    def close(self) -> None:
        super().close()
        run("ip", "netns", "del", self.name)

    def listed(self) -> dict[tuple[str, str], Any]:
        """The objects of the table by kind and name, with rules in order and without handles."""
        text = run("ip", "netns", "exec", self.name, "nft", "-j", "list", "table", "inet", "netloom")
        found: dict[tuple[str, str], Any] = {}
        for item in json.loads(text)["nftables"]:
            for kind, it in item.items():
                it.pop("handle", None)
                if kind == "rule":
                    found.setdefault(("rules", it["chain"]), []).append(it["expr"])
                elif kind in ("chain", "set", "map", "counter"):
                    if "elem" in it:
                        it["elem"] = sorted(it["elem"], key=json.dumps)
                    found[kind, it["name"]] = it
        return found

    def names(self) -> set[tuple[str, str]]:
        return {key for key in self.listed() if key[0] != "rules"}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scopes(), scopes())
def test_a_swapped_ruleset_equals_a_fresh_one(bench: Bench, before: Scope, after: Scope) -> None:
    have, want = nft.ruleset(before), nft.ruleset(after)
    bench.load(ruleset.fresh(want))
    expected = bench.listed()
    bench.load(ruleset.fresh(have))
    bench.load(ruleset.swap(have, want))
    assert bench.listed() == expected
    assert set(ruleset.names(want)) == bench.names()
    bench.load(ruleset.fresh(have))
    bench.load(ruleset.take_over(bench.names(), want))
    assert bench.listed() == expected


def _steps(rng: random.Random, scope: Scope) -> Scope:
    """Apply one random change, as a command would."""
    addresses = (A1, A2, B1)
    at = rng.choice(addresses)
    guest = rng.choice((VM1, VM2, VM3))
    match rng.randrange(7):
        case 0:
            held = {**scope.public_ips}
            held.pop(at.address, None) or held.update({at.address: at})
            return replace(scope, public_ips=held)
        case 1:
            nat = static(rng.choice((A2, B1)), guest)
            nats = {**scope.static_nats}
            nats.pop(nat.public_ip, None) or nats.update({nat.public_ip: nat})
            return replace(scope, static_nats=nats)
        case 2 | 3 | 4:
            first = rng.randrange(1, 300)
            it = forward(at, f"{first}-{first + rng.choice((0, 0, 5))}", guest, protocol=rng.choice(("tcp", "udp")))
            forwards = {**scope.port_forwards}
            forwards.pop(it.key, None) or forwards.update({it.key: it})
            return replace(scope, port_forwards=forwards)
        case _:
            rules = [
                admit(rng.choice(addresses), rng.choice(("tcp", "udp")), str(rng.randrange(1, 400)),
                      f"10.{rng.randrange(99)}.0.0/16")
                for _ in range(rng.choice((0, 3, 3, 90)))
            ]  # fmt: skip
            return replace(scope, networks=wish(*rules, allow_egress=rng.random() < 0.5).networks)


def test_a_thousand_random_changes_leave_no_extra_objects(bench: Bench) -> None:
    rng = random.Random(204)
    scope = wish(held=(A1,))
    have = nft.ruleset(scope)
    bench.load(ruleset.fresh(have))
    deltas = 0
    for change in range(1, 1001):
        scope = _steps(rng, scope)
        want = nft.ruleset(scope)
        text = ruleset.swap(have, want)
        deltas += bool(text) and "flush" not in text
        bench.load(text)
        have = want
        if change % 100 == 0:
            assert bench.names() == set(ruleset.names(want))
    assert deltas > 100
    walked = bench.listed()
    bench.load(ruleset.fresh(have))
    assert bench.listed() == walked


def test_the_marker_identifies_the_loaded_ruleset(bench: Bench) -> None:
    one, two = nft.ruleset(wish()), nft.ruleset(wish(forwards=[forward(A1, "22", VM1)]))
    bench.load(ruleset.fresh(one))
    for have, want in ((one, two), (two, one)):
        bench.load(ruleset.swap(have, want))
        markers = {name for kind, name in bench.names() if kind == "set" and name.startswith(ruleset.MARKER_PREFIX)}
        assert markers == {want.marker}


def test_a_rejected_ruleset_changes_nothing(bench: Bench) -> None:
    have = nft.ruleset(wish(forwards=[forward(A1, "22", VM1)]))
    bench.load(ruleset.fresh(have))
    before = bench.listed()
    broken = replace(have, chains=(*have.chains, Chain(name="broken", rules=("jump nowhere",))))
    assert bench.refusal(ruleset.swap(have, broken))
    assert bench.refusal(ruleset.fresh(broken))
    assert bench.listed() == before


def _table(*chains: Chain, sets: tuple[NftSet, ...] = (), counters: tuple[str, ...] = ()) -> Ruleset:
    return Ruleset(family="inet", table="netloom", chains=chains, sets=sets, counters=counters)


HOOK = "type filter hook output priority {}; policy {};"


def test_hooks_policies_and_set_types_may_change(bench: Bench) -> None:
    a_set = NftSet(name="some", kind="set", type="ipv4_addr", elements={"10.0.0.1": ""})
    a_map = NftSet(name="some", kind="map", type="ipv4_addr : verdict", elements={"10.0.0.1": "goto side"})
    side = Chain(name="side", rules=("accept",))
    tables = [
        _table(Chain(name="out", hook=HOOK.format(0, "accept"), rules=("ip daddr @some accept",)), sets=(a_set,)),
        _table(Chain(name="out", hook=HOOK.format(0, "drop"), rules=("ip daddr vmap @some",)), side, sets=(a_map,)),
        _table(Chain(name="out", hook=HOOK.format(5, "drop"), rules=("ip daddr vmap @some",)), side, sets=(a_map,)),
        _table(Chain(name="out", rules=("accept",)), counters=("seen",)),
        _table(side, sets=(replace(a_set, flags="interval", elements={"10.0.0.0/8": "", "192.0.2.1-192.0.2.9": ""}),)),
        _table(side, sets=(replace(a_set, flags="dynamic,timeout", elements={}, size=9, timeout="1m"),)),
    ]
    for have in tables:
        for want in tables:
            bench.load(ruleset.fresh(want))
            expected = bench.listed()
            bench.load(ruleset.fresh(have))
            bench.load(ruleset.swap(have, want))
            assert bench.listed() == expected


def test_named_counters_keep_their_values_across_swaps(bench: Bench) -> None:
    def table(extra: str, element: str) -> Ruleset:
        return _table(
            Chain(name="out", hook=HOOK.format(0, "accept"), rules=('ip daddr 127.0.0.1 counter name "seen"', extra)),
            sets=(NftSet(name="some", kind="set", type="ipv4_addr", elements={element: ""}),),
            counters=("seen",),
        )

    run("ip", "-n", bench.name, "link", "set", "lo", "up")
    have = table("accept", "10.0.0.1")
    bench.load(ruleset.fresh(have))
    run("ip", "netns", "exec", bench.name, "ping", "-c", "1", "-W", "5", "127.0.0.1")
    packets = bench.listed()["counter", "seen"]["packets"]
    assert packets >= 2
    for want in (table("meta l4proto tcp accept", "10.0.0.1"), table("meta l4proto tcp accept", "10.0.0.2")):
        bench.load(ruleset.swap(have, want))
        have = want
        assert bench.listed()["counter", "seen"]["packets"] == packets


@pytest.mark.mutation("a-swap-keeps-what-both-have", instead="fresh(want)")
def test_defect_04_a_flood_sees_no_loss_and_no_gap_during_200_swaps() -> None:
    """Allowed and forbidden ports are all forwarded, so only the firewall blocks the forbidden ones."""
    both = [forward(A1, "6000-6001", VM1, protocol="udp")]
    fixed = [static(B1, VM3)]
    keep = [
        admit(A1, "udp", "6000"), admit(B1, "udp", "6000"), admit(B1, "udp", "30-40"), admit(A1, "udp", "5000-5010"),
        egress("udp", "6001"), egress("udp", "100-200"), egress("udp", "300", dests=("192.0.2.0/24", "10.0.0.0/8")),
    ]  # fmt: skip
    many = [admit(A1, "tcp", str(9000 + at), f"10.9.{at // 200}.{at % 200}/32") for at in range(60)]
    many += [admit(A1, "udp", str(20000 + at), f"10.9.0.{at}/32") for at in range(60)]
    denied = [egress("udp", str(30000 + 2 * at), dests=(f"10.{at}.0.0/16",)) for at in range(150)]
    wishes = [
        wish(*keep, held=(A1, A2, B1), forwards=both, static=fixed),
        wish(*keep, admit(A2, "tcp", "22"), held=(A1, A2, B1), forwards=both, static=fixed),
        wish(*keep, held=(A1, A2, B1), forwards=[*both, forward(A2, "80", VM2)], static=fixed),
        wish(*keep, held=(A1, B1), forwards=[*both, forward(A1, "80-90", VM2)], static=fixed),
        wish(*keep, *many, held=(A1, B1), forwards=both, static=fixed),
        wish(*keep, egress("tcp", "25"), held=(A1, A2, B1), forwards=both, static=[*fixed, static(A2, VM1)]),
        wish(*keep, *denied, held=(A1, A2, B1), forwards=both, static=fixed),
    ]
    # One VM of the flood opens more connections than its share.
    wishes = [replace(it, connections_max=1_000_000) for it in wishes]
    tables = [nft.ruleset(it) for it in wishes]
    floods: list[Flood] = []
    with Lab() as lab, contextlib.closing(Nft(lab.ns("dev"))) as device:
        lab.serve("dev", "tcp", 80)
        lab.renew(wishes[0])
        try:
            stays = lab.connect("vm3", GATEWAY, 80)
            floods = [
                Flood(lab, "inet", CLIENT, A1.address, ("vm1", VM1), CLIENT),
                Flood(lab, "inet", CLIENT2, B1.address, ("vm3", VM3), CLIENT2),
                Flood(lab, "vm2", VM2, STRANGER, ("inet", STRANGER), A1.address),
                Flood(lab, "vm3", VM3, CLIENT, ("inet", CLIENT), B1.address),
            ]
            for at, _ in enumerate(swaps(device, tables, floods, at_least=200), 1):
                if at % 20 == 0:
                    assert echoes(stays)
            results = [it.finish() for it in floods]
        finally:
            for it in floods:
                it.stop()
        stays.close()
    assert all(it.sent >= 1000 for it in results), results
    assert [it[1:] for it in results] == [(0, 0, 0)] * len(floods), results
