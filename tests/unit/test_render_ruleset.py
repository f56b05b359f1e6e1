"""The text of a ruleset: the whole table, changed elements only, or rewritten rules."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from netloom.render import nft, ruleset
from netloom.render.ruleset import Chain, NftSet, Ruleset
from netloom.state import Nic
from unit.scopes import A1, A2, B1, VM1, VM2, admit, forward, static, wish

ONE = wish(admit(A1, "tcp", "22"), held=(A1, A2), forwards=[forward(A1, "22", VM1)])


def test_equal_rulesets_need_no_transaction() -> None:
    assert ruleset.swap(nft.ruleset(ONE), nft.ruleset(ONE)) == ""


def test_a_new_forward_is_one_element_and_the_marker() -> None:
    have = nft.ruleset(ONE)
    want = nft.ruleset(replace(ONE, port_forwards={**ONE.port_forwards, "x": forward(A2, "80", VM2)}))
    assert ruleset.swap(have, want) == (
        "add element inet netloom forwards_tcp { 203.0.113.21 . 80 : 10.1.1.12 . 80 }\n"
        f"add set inet netloom {want.marker} {{ type mark; }}\n"
        f"delete set inet netloom {have.marker}\n"
    )


def test_a_moved_forward_is_deleted_and_added_in_one_transaction() -> None:
    have = nft.ruleset(ONE)
    want = nft.ruleset(wish(admit(A1, "tcp", "22"), held=(A1, A2), forwards=[forward(A1, "22", VM2)]))
    assert ruleset.swap(have, want).splitlines()[:2] == [
        "delete element inet netloom forwards_tcp { 203.0.113.20 . 22 }",
        "add element inet netloom forwards_tcp { 203.0.113.20 . 22 : 10.1.1.12 . 22 }",
    ]


@pytest.mark.mutation("unchanged-chains-keep-their-rules")
def test_a_changed_rule_rewrites_its_chain_and_nothing_else() -> None:
    have = nft.ruleset(ONE)
    want = nft.ruleset(wish(admit(A1, "tcp", "80"), held=(A1, A2), forwards=[forward(A1, "22", VM1)]))
    assert ruleset.swap(have, want).splitlines() == [
        "add table inet netloom",
        "flush chain inet netloom at_203.0.113.20",
        f"delete set inet netloom {have.marker}",
        "add chain inet netloom at_203.0.113.20",
        f"add set inet netloom {want.marker} {{ type mark; }}",
        "table inet netloom {",
        "",
        "\tchain at_203.0.113.20 {",
        '\t\tiifname "pub-*" ct mark set 0x00000001',
        "\t\ttcp dport 80 accept",
        "\t\tdrop",
        "\t}",
        "}",
    ]


def test_a_set_of_another_type_rewrites_all_rules() -> None:
    have = nft.ruleset(ONE)
    want = replace(have, sets=tuple(replace(it, flags="interval") if it.name == "held" else it for it in have.sets))
    lines = ruleset.swap(have, want).splitlines()
    assert lines[:3] == ["add table inet netloom", "flush table inet netloom", "delete map inet netloom held"]
    assert sum("\tchain " in it for it in lines) == len(want.chains)


def test_a_removed_address_removes_its_chain_and_elements() -> None:
    have = nft.ruleset(wish(held=(A1, A2, B1), static=[static(B1, VM2)]))
    want = nft.ruleset(wish(held=(A1, A2)))
    lines = ruleset.swap(have, want).splitlines()
    assert "delete element inet netloom held { 198.51.100.20 }" in lines
    assert "delete element inet netloom static_exits { 10.1.1.12 }" in lines
    assert "delete chain inet netloom at_198.51.100.20" in lines
    assert "table arp netloom {" in lines  # it names the addresses of the device


def test_the_marker_depends_on_the_whole_text_and_names_lists_every_object() -> None:
    table = Ruleset(
        family="inet",
        table="t",
        chains=(Chain(name="c", rules=("accept",)),),
        sets=(NftSet(name="s", kind="set", type="mark"), NftSet(name="m", kind="map", type="mark : verdict")),
        counters=("n",),
    )
    marker = table.marker
    assert len(marker) == len("applied_") + 12
    assert ruleset.names(table) == {("chain", "c"), ("set", "s"), ("map", "m"), ("counter", "n"), ("set", marker)}
    other = replace(table, sets=(replace(table.sets[0], elements={"0x1": ""}), table.sets[1]))
    assert other.marker != marker
    assert marker in ruleset.fresh(table)


def test_fresh_contains_the_whole_table() -> None:
    table = Ruleset(
        family="inet",
        table="t",
        chains=(Chain(name="c", hook="type filter hook input priority 0; policy drop;", rules=("jump d",)),
                Chain(name="d", rules=("accept",))),
        sets=(NftSet(name="s", kind="set", type="ipv4_addr", flags="interval",
                     elements={"10.0.0.0/8": "", "1.2.3.4": ""}),),
        counters=("n",),
    )  # fmt: skip
    assert ruleset.fresh(table) == (
        "add table inet t\ndelete table inet t\ntable inet t {\n"
        f"\tset {table.marker} {{\n\t\ttype mark;\n\t}}\n"
        "\tcounter n {\n\t}\n"
        "\n\tset s {\n\t\ttype ipv4_addr;\n\t\tflags interval;\n"
        "\t\telements = {\n\t\t\t1.2.3.4,\n\t\t\t10.0.0.0/8\n\t\t};\n\t}\n"
        "\n\tchain c {\n\t\ttype filter hook input priority 0; policy drop;\n\t\tjump d\n\t}\n"
        "\n\tchain d {\n\t\taccept\n\t}\n"
        "}\n"
    )


def test_taking_over_deletes_unwanted_objects_and_creates_sets_again() -> None:
    want = nft.ruleset(ONE)
    present = {*ruleset.names(want), ("chain", "old"), ("map", "gone"), ("set", "applied_000000000000")}
    lines = ruleset.take_over(present - {("set", want.marker)}, want).splitlines()
    assert {"delete chain inet netloom old", "delete map inet netloom gone", "delete map inet netloom held",
            "delete set inet netloom applied_000000000000"} <= set(lines)  # fmt: skip
    assert lines.index("delete map inet netloom held") < lines.index("add map inet netloom held {")


@pytest.mark.mutation("sets-are-as-large-as-their-network", instead="65536")
def test_sets_of_vms_are_never_full_and_no_larger_than_needed() -> None:
    """The kernel allocates 2 MiB for a dynamic set with 65,535 places (measured, 6.18)."""
    network = ONE.networks["204"]
    for vms in (1, 100, 4000):
        nics = {str(at): Nic(mac=f"02:00:00:00:{at >> 8:02x}:{at & 255:02x}") for at in range(vms)}
        sets = nft.ruleset(replace(ONE, networks={"204": replace(network, nics=nics)})).sets
        sizes = [it.size for it in sets if "dynamic" in it.flags and not it.name.startswith(("unknown", "resets"))]
        assert sizes
        assert all(6 * vms <= size <= max(128, 32 * vms) for size in sizes)
