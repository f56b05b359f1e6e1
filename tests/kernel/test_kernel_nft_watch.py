"""nftables events of one namespace: who changed the rulesets, and whether our tables have lost something."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from kernel.scratch import readable, scratch, tool
from netloom.agent.kernel import netlink, nft_netlink
from netloom.agent.kernel.netlink import Message
from netloom.agent.kernel.nft import Nft
from netloom.agent.kernel.nft_watch import NftWatch, Transaction

TABLE = """
table netdev netloom { chain breth1-5 { }; }
table bridge netloom { set guarded { type ifname; elements = { "breth1-5" }; }; chain input { accept; }; }
table inet netloom2 { chain a { accept; }; }
"""


@pytest.fixture
def ns() -> Iterator[str]:
    with scratch() as name:
        yield name


def until(watch: NftWatch, enough: Callable[[list[Transaction]], object]) -> list[Transaction]:
    found: list[Transaction] = []
    while not enough(found):
        assert readable(watch), found
        found += watch.read()
    return found


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ("flush ruleset", True),
        ("delete table netdev netloom", True),
        ("flush table bridge netloom", True),
        ("delete chain netdev netloom breth1-5", True),
        ('delete element bridge netloom guarded { "breth1-5" }', True),
        ("delete table inet netloom2", False),
        ("add rule bridge netloom input drop", False),
        ("add table inet theirs", False),
    ],
)
def test_a_transaction_says_whether_our_tables_lost_something(ns: str, change: str, lost: bool) -> None:
    with Nft(ns) as nft:
        nft.run(TABLE)
        with NftWatch(ns, "netloom") as watch:
            tool(ns, "nft", change)
            (told,) = until(watch, len)
            assert (told.lost, told.overrun, told.process, told.own) == (lost, False, "nft", False)
            nft.run("flush ruleset\n" + TABLE)
            nft.run("flush ruleset\n")
            # Whether it is known as our own depends on the pid namespace: the kernel's numbers are the outermost.
            own = until(watch, lambda seen: len(seen) == 2)[1]
            assert own.lost
            assert own.thread != told.thread


@pytest.mark.mutation("a-renewed-lease-is-no-loss", instead="(0x15, 1, 1, 0)")
def test_renewals_of_leases_are_not_reported_and_other_changes_of_their_sets_are(ns: str) -> None:
    def put(mark: int) -> list[Message]:
        return nft_netlink.put_lives("bridge", "netloom", "alive", {mark: 10_000})

    with Nft(ns) as nft:
        nft.run(TABLE)
        nft.run("add set bridge netloom alive { type mark; flags timeout; }\n")
        with (
            netlink.marked_socket(netlink.NETLINK_NETFILTER, ns, netlink.OF_LEASES) as renewals,
            netlink.marked_socket(netlink.NETLINK_NETFILTER, ns, netlink.OF_LEASES) as of_another_agent,
            NftWatch(ns, "netloom") as watch,
        ):
            for number in range(20):
                nft_netlink.change(renewals, put(number))
                nft_netlink.change(of_another_agent, nft_netlink.end_lives("bridge", "netloom", "alive", [number]))
            nft.run("add table inet theirs\n")
            nft_netlink.change(renewals, put(5))
            nft.run("flush set bridge netloom alive\n")
            told = until(watch, lambda seen: len(seen) >= 2)
            assert [it.lost for it in told] == [False, True]


def test_a_ruleset_with_thousands_of_elements_costs_little(ns: str) -> None:
    ports = ", ".join(map(str, range(1, 30001, 2)))
    with Nft(ns) as nft, NftWatch(ns, "netloom") as watch:
        nft.run("add table inet theirs\nadd set inet theirs big { type inet_service; }\n")
        until(watch, len)
        begun = time.process_time()
        nft.run(f"add element inet theirs big {{ {ports} }}\n")
        changed_s = time.process_time() - begun
        begun = time.process_time()
        assert [it.lost for it in until(watch, len)] == [False]
        assert time.process_time() - begun < changed_s / 2 + 0.01


def test_an_overrun_is_reported_and_the_next_transaction_is_read(ns: str) -> None:
    elements = ", ".join(f'"link{i}"' for i in range(9000))
    with Nft(ns) as nft, NftWatch(ns, "netloom") as watch:
        nft.run("add table bridge netloom\nadd set bridge netloom uplinks { type ifname; }\n")
        for _ in range(12):
            nft.run(f"add element bridge netloom uplinks {{ {elements} }}\nflush set bridge netloom uplinks\n")
        assert any(it.overrun for it in until(watch, lambda seen: any(it.overrun for it in seen)))
        watch.read()
        nft.run("delete table bridge netloom\n")
        assert until(watch, len)[-1].lost
