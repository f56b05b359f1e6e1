"""Sockets that stay open for a moment after their use."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernel.agent_host import wait_until
from kernel.scratch import scratch
from netloom.agent.host.apply import apply
from netloom.agent.kernel import kept, links, namespaces, nft_netlink
from netloom.agent.kernel.kept import Lender
from netloom.agent.kernel.nft import NftRefused
from netloom.plan.steps import CreateNamespace, RemoveNamespace


class Opened:
    """Something that is open in a namespace."""

    count = 0

    def __init__(self, namespace: str | None) -> None:
        Opened.count += 1
        self.number = Opened.count
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_the_next_user_gets_the_same_one() -> None:
    keeper = Lender(Opened)
    with keeper.lent(None) as first:
        pass
    with keeper.lent(None) as second:
        assert second is first
        assert not first.closed


def test_two_users_at_once_get_two() -> None:
    keeper = Lender(Opened)
    with keeper.lent(None) as first, keeper.lent(None) as second:
        assert first is not second
    with keeper.lent(None) as third, keeper.lent(None) as fourth:
        assert {third, fourth} == {first, second}


def test_what_is_not_used_again_is_closed_later() -> None:
    keeper = Lender(Opened, 0.1, reuse=False)
    with keeper.lent(None) as first:
        pass
    with keeper.lent(None) as second:
        assert second is not first
    wait_until(lambda: first.closed and second.closed)


def test_many_threads_never_share_one() -> None:
    keeper = Lender(Opened)
    in_use: set[int] = set()

    def use(_: int) -> None:
        with keeper.lent(None) as it:
            assert it.number not in in_use
            in_use.add(it.number)
            os.sched_yield()
            in_use.remove(it.number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(2000)))


def test_after_an_exception_it_is_closed() -> None:
    keeper = Lender(Opened)
    with pytest.raises(ZeroDivisionError), keeper.lent(None) as first:
        raise ZeroDivisionError
    assert first.closed
    with keeper.lent(None) as second:
        assert second is not first


def test_one_that_nobody_uses_is_closed() -> None:
    keeper = Lender(Opened)
    with keeper.lent(None) as first:
        pass
    wait_until(lambda: first.closed)
    with keeper.lent(None) as second:
        assert second is not first


def test_not_more_than_a_few_are_kept() -> None:
    keeper = Lender(Opened)
    used = []
    for at in range(100):
        with keeper.lent(f"missing-{at}") as it:
            used.append(it)
    assert sum(not it.closed for it in used) <= 64


@pytest.mark.mutation("a-new-namespace-gets-a-new-socket", instead="had.namespace == namespace")
def test_a_new_namespace_of_the_same_name_gets_a_new_one() -> None:
    with scratch() as name:
        with kept.netfilter(name) as first, kept.nft(name) as nft:
            nft.run("add table inet old")
            assert nft_netlink.generation(first) > 0
        namespaces.delete(name)
        namespaces.create(name)
        with kept.netfilter(name) as second, kept.nft(name) as nft:
            assert second is not first
            assert nft.list_text("list tables") == ""
        kept.forget(name)


def test_a_deleted_namespace_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as nothing keeps it, the kernel deletes the link in it, and so the other end of that link."""
    monkeypatch.setattr(kept._netfilter, "_kept_s", 600.0)
    monkeypatch.setattr(kept._nft, "_kept_s", 600.0)
    name = f"kept-{os.getpid()}"
    apply([CreateNamespace(name)])
    with scratch() as outside:
        with namespaces.descriptor(name) as fd:
            links.change(outside, [links.make_veth("end", "", "inside", "0a:00:00:00:09:02", 0, fd)])
        with kept.netfilter(name) as socket, kept.nft(name) as nft:
            assert nft_netlink.generation(socket) > 0
            assert nft.list_text("list tables") == ""
        assert links.find_links(outside, ["end"])
        apply([RemoveNamespace(name)])
        wait_until(lambda: not links.find_links(outside, ["end"]))


def test_a_refused_script_is_followed_by_another() -> None:
    with scratch() as name:
        with pytest.raises(NftRefused), kept.nft(name) as first:
            first.run("add rule inet missing missing accept")
        with kept.nft(name) as second:
            second.run("add table inet t")
            assert "table inet t" in second.list_text("list tables")
        kept.forget(name)
