"""When the watcher repairs: debounce, back-off, and events during other work. Kernel and time are simulated."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

import pytest
from msgspec.structs import replace

from fakehost import FakeClock, FakeLog
from netloom.agent.host import watcher
from netloom.agent.host.watcher import ALL_REPAIRS_AT_ONCE, DEBOUNCE_S, FIREWALL_S, REPAIRS_AT_ONCE, Watcher
from netloom.agent.kernel import namespaces
from netloom.agent.kernel.addresses import AddressRow
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.nft_watch import NftWatch, Transaction
from netloom.agent.kernel.watch import Event, NamesWatch, Watch
from netloom.errors import HostRefused
from netloom.names import guest_link
from netloom.netobjects import Address
from netloom.render.scope import render
from unit.scopes import A1, A2, wish

SCOPE = "net-204"
WANT = render(wish(held=(A1, A2)))
LOST = "203.0.113.20/32"


def lost(cidr: str = LOST, *, back: bool = False) -> Event:
    """An address that somebody removed, or that is there again."""
    wanted = [it for it in WANT.addresses if it.cidr == cidr]
    address = wanted[0] if wanted else Address(link=guest_link("204"), cidr=cidr)
    return Event(kind="address", gone=bool(wanted) != back, row=AddressRow(address=address, link_local=False, scope=""))


class FakeWatch:
    """The events of the scope's namespace."""

    def __init__(self, namespace: str | None) -> None:
        self._fd = os.eventfd(0)
        self.events: list[Event] = []

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        os.close(self._fd)


class Host:
    """The watch of the host, for its names by index."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names

    def read(self) -> list[Event]:
        return []


class Scene:
    """A watcher that watches one scope; its handler records the repairs with their time."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.log = FakeLog()
        self.repairs: list[tuple[float, str]] = []
        self.tidied: list[float] = []
        self.followed: list[float] = []
        self.steps: int | None = 1
        self.working = False
        self.lost: list[tuple[str, frozenset[str]]] = []
        self.gates_closed = 0
        self.gates_fail = False
        self.watcher = Watcher(
            asyncio.get_running_loop(), self.clock, self.log, self, self.orphaned, self.keep_gates_closed
        )

    def busy(self, scope_id: str) -> bool:
        return self.working

    async def repair(self, scope_id: str, why: str) -> int | None:
        self.repairs.append((round(self.clock.time(), 2), why.removeprefix("watch: ")))
        self.watcher.work_done(scope_id)
        return self.steps

    def orphaned(self, bridge: str, links: frozenset[str]) -> None:
        self.lost.append((bridge, links))

    def keep_gates_closed(self) -> None:
        self.gates_closed += 1
        if self.gates_fail:
            raise HostRefused("nftables: no memory")

    def firewall_changed(self) -> None:
        self.followed.append(round(self.clock.time(), 2))

    def tidy_soon(self) -> None:
        self.tidied.append(round(self.clock.time(), 2))

    def told(self, *transactions: Transaction) -> None:
        """Let the kernel report these changes of the host's tables."""

        class Tables:
            def read(self) -> list[Transaction]:
                return [*transactions]

        self.watcher._tables = cast(NftWatch, Tables())
        self.watcher._read_tables()
        self.watcher._tables = None

    @contextlib.contextmanager
    def host_is_watched(self) -> Iterator[tuple[FakeWatch, FakeWatch]]:
        """Have a watch of the host's links, and one of the names of namespaces."""
        host, names = FakeWatch(None), FakeWatch(None)
        self.watcher._host, self.watcher._names = cast(Watch, host), cast(NamesWatch, names)
        try:
            yield host, names
        finally:
            self.watcher._host = self.watcher._names = None
            host.close()
            names.close()

    async def events(self, *events: Event) -> None:
        """Let the kernel report these events."""
        watched = self.watcher._watched[SCOPE].inside
        assert isinstance(watched, FakeWatch)
        watched.events += events
        os.eventfd_write(watched.fileno(), 1)
        await asyncio.sleep(0.001)  # the selector of the event loop sees it
        os.eventfd_read(watched.fileno())
        await self.clock.settle()


def watched(test: Callable[[Scene], Coroutine[Any, Any, None]]) -> Callable[[pytest.MonkeyPatch], None]:
    """A test that gets a scene as its argument."""

    async def run() -> None:
        scene = Scene()
        scene.watcher.watch(SCOPE, WANT)
        await scene.clock.settle()
        try:
            async with asyncio.timeout(60):
                await test(scene)
        finally:
            scene.watcher.stop()

    def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watcher, "Watch", FakeWatch)
        monkeypatch.setattr(namespaces, "exists", lambda name: True)
        monkeypatch.setattr(namespaces, "identity", lambda name: 1)
        asyncio.run(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@watched
async def test_events_within_the_debounce_time_cause_one_repair(scene: Scene) -> None:
    await scene.events(lost(), lost("203.0.113.21/32"))
    await scene.clock.advance(DEBOUNCE_S / 2)
    await scene.events(lost("10.1.1.1/24"))
    assert scene.repairs == []
    await scene.clock.advance(1)
    assert scene.repairs == [(DEBOUNCE_S, LOST)]


@watched
async def test_events_that_match_cause_no_repair(scene: Scene) -> None:
    await scene.events(lost(back=True))
    await scene.clock.advance(1)
    assert scene.repairs == []


@pytest.mark.mutation("what-is-repaired-is-looked-at")
@watched
async def test_a_scope_is_as_it_was_left_while_its_events_match(scene: Scene) -> None:
    with scene.host_is_watched():
        before = scene.watcher.unexpected(SCOPE)
        await scene.events(lost(back=True))
        assert scene.watcher.unexpected(SCOPE) == before
        await scene.events(lost())
        assert scene.watcher.unexpected(SCOPE) != before
        assert scene.watcher.unexpected(SCOPE) == scene.watcher.unexpected(SCOPE)


@pytest.mark.mutation("unread-events-are-unexpected")
@watched
async def test_events_that_nobody_has_read_may_not_match(scene: Scene) -> None:
    with scene.host_is_watched() as (host, names):
        inside = cast(FakeWatch, scene.watcher._watched[SCOPE].inside)
        for it in (host, names, inside):
            before = scene.watcher.unexpected(SCOPE)
            os.eventfd_write(it.fileno(), 1)
            assert scene.watcher.unexpected(SCOPE) != before
            os.eventfd_read(it.fileno())
            assert scene.watcher.unexpected(SCOPE) == scene.watcher.unexpected(SCOPE)
        before = scene.watcher.unexpected(SCOPE)
        scene.working = True
        await scene.events(lost(back=True))
        assert scene.watcher.unexpected(SCOPE) != before  # it is compared when the work is done


@watched
async def test_a_scope_that_is_not_watched_may_have_changed(scene: Scene) -> None:
    assert scene.watcher.unexpected(SCOPE) != scene.watcher.unexpected(SCOPE)  # the host is not watched
    with scene.host_is_watched():
        assert scene.watcher.unexpected(SCOPE) == scene.watcher.unexpected(SCOPE)
        assert scene.watcher.unexpected("net-205") != scene.watcher.unexpected("net-205")


@pytest.mark.mutation("a-new-namespace-is-unexpected")
@watched
async def test_another_namespace_of_the_name_is_no_longer_as_it_was_left(scene: Scene) -> None:
    with scene.host_is_watched(), pytest.MonkeyPatch.context() as patch:
        before = scene.watcher.unexpected(SCOPE)
        patch.setattr(namespaces, "identity", lambda name: 2)
        scene.watcher.watch(SCOPE, WANT)
        assert scene.watcher.unexpected(SCOPE) != before  # at once, before the event loop knows of it


@watched
async def test_repairs_of_the_same_object_back_off(scene: Scene) -> None:
    delays: list[float] = []
    for _ in range(REPAIRS_AT_ONCE + 6):
        before = scene.clock.time()
        await scene.events(lost())
        while len(scene.repairs) == len(delays):
            await scene.clock.advance(0.01)
        delays.append(round(scene.clock.time() - before, 2))
    assert delays == [DEBOUNCE_S] * REPAIRS_AT_ONCE + [1, 2, 4, 8, 16, 30]
    assert scene.log.lines[0].endswith(f"{LOST}: repaired 5 times, 5 in all recently; next repair in 1 s")
    # After a minute of peace the next repair comes at once.
    await scene.clock.advance(61)
    await scene.events(lost())
    await scene.clock.advance(DEBOUNCE_S)
    assert len(scene.repairs) == len(delays) + 1


FLUSHED = Transaction(lost=True, thread=1 << 22, process="nft")  # Linux numbers threads below this


@pytest.mark.mutation("own-changes-of-the-guard-are-no-loss", instead="it.overrun or it.lost")
@watched
async def test_only_losses_that_others_caused_are_restored(scene: Scene) -> None:
    own = replace(FLUSHED, thread=threading.get_native_id())
    scene.told(own, replace(FLUSHED, lost=False), Transaction(process="nft"))
    await scene.clock.advance(1)
    assert scene.tidied == []
    for it in (FLUSHED, Transaction(overrun=True)):
        scene.told(own, it, it)
        await scene.clock.advance(1)
    assert scene.tidied == [1, 2]
    assert scene.repairs == []


@pytest.mark.mutation("the-guard-is-back-at-once")
@watched
async def test_a_program_that_flushes_again_and_again_is_answered_more_slowly(scene: Scene) -> None:
    for _ in range(600):
        scene.told(FLUSHED)
        await scene.clock.advance(0.2)
    first = scene.tidied[:REPAIRS_AT_ONCE]
    assert first == [round(it * 0.2, 2) for it in range(REPAIRS_AT_ONCE)]
    assert REPAIRS_AT_ONCE < len(scene.tidied) < 30  # in two minutes
    assert "nft changed the tables of the host 5 times recently; check in 1 s" in scene.log.lines[0]


@pytest.mark.mutation("closed-gates-close-at-once")
@watched
async def test_gates_close_at_once_however_often_somebody_flushes(scene: Scene) -> None:
    for number in range(30):
        scene.gates_fail = number % 2 == 0
        scene.told(FLUSHED)
        assert scene.watcher._closing is not None
        await scene.watcher._closing
        assert scene.gates_closed == number + 1
    assert scene.log.lines.count("gates: nftables: no memory") == 15


@pytest.mark.mutation("a-new-firewall-is-followed")
@watched
async def test_another_firewall_is_followed_soon_and_less_often_when_it_keeps_changing(scene: Scene) -> None:
    scene.told(replace(FLUSHED, lost=False, thread=threading.get_native_id()))
    await scene.clock.advance(1)
    assert scene.followed == []
    for _ in range(600):
        scene.told(replace(FLUSHED, lost=False), replace(FLUSHED, lost=False))
        await scene.clock.advance(0.2)
    assert scene.followed[:1] == [1 + FIREWALL_S]
    assert REPAIRS_AT_ONCE < len(scene.followed) < 30  # in two minutes
    assert scene.tidied == []


@watched
async def test_repairs_of_many_objects_back_off_later(scene: Scene) -> None:
    for number in range(ALL_REPAIRS_AT_ONCE + 1):
        await scene.events(lost(f"192.0.2.{number}/32"))
        await scene.clock.advance(DEBOUNCE_S)
    assert len(scene.repairs) == ALL_REPAIRS_AT_ONCE
    await scene.clock.advance(1)
    assert len(scene.repairs) == ALL_REPAIRS_AT_ONCE + 1


@pytest.mark.parametrize("steps", [0, None])
def test_a_repair_that_changed_nothing_or_failed_is_not_counted(
    steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @watched
    async def scenario(scene: Scene) -> None:
        scene.steps = steps
        for _ in range(3 * REPAIRS_AT_ONCE):
            await scene.events(lost())
            await scene.clock.advance(DEBOUNCE_S)
        assert len(scene.repairs) == 3 * REPAIRS_AT_ONCE
        assert scene.log.lines == []

    scenario(monkeypatch)


@watched
async def test_of_events_during_other_work_the_last_one_about_each_object_counts(scene: Scene) -> None:
    scene.working = True
    await scene.events(lost(), lost(back=True), lost("203.0.113.21/32"), lost("192.0.2.9/32"))
    await scene.events(lost("192.0.2.9/32", back=True))
    await scene.clock.advance(10)
    assert scene.repairs == []
    scene.working = False
    scene.watcher.work_done(SCOPE)
    await scene.clock.advance(1)
    assert scene.repairs == [(10 + DEBOUNCE_S, "203.0.113.21/32")]


@watched
async def test_a_repair_waits_for_other_work(scene: Scene) -> None:
    await scene.events(lost())
    scene.working = True
    await scene.clock.advance(10)
    assert scene.repairs == []
    scene.working = False
    await scene.clock.advance(DEBOUNCE_S)
    assert [why for _, why in scene.repairs] == [LOST]


def host_link(name: str, index: int, kind: str, master_index: int | None = None) -> Link:
    return Link(
        index=index,
        name=name,
        kind=kind,
        mac="02:00:00:00:00:09",
        up=True,
        master_index=master_index,
        mtu=1500,
        alias="",
        vlan_id=None,
        parent_index=None,
        peer_netns=None,
        running=True,
    )


@pytest.mark.mutation("lost-ports-are-repaired")
@watched
async def test_a_bridge_that_is_lost_during_a_repair_is_repaired_once_more(scene: Scene) -> None:
    """The repair has made the bridge again before the watcher heard which ports the old one had."""
    bridge = WANT.ports[0].segment.bridge
    scene.working = True
    for gone, row in (
        (False, host_link("vnet9", 9, "tun", master_index=7)),
        (False, host_link("vnet9", 9, "tun")),
        (True, host_link(bridge, 7, "bridge")),
        (False, host_link(bridge, 8, "bridge")),
    ):
        scene.watcher._hear_host(Event(kind="link", gone=gone, row=row), row)
    await scene.clock.advance(1)
    assert (scene.lost, scene.repairs) == ([(bridge, frozenset({"vnet9"}))], [])
    scene.working = False
    scene.watcher.work_done(SCOPE)
    await scene.clock.advance(1)
    assert [why for _, why in scene.repairs] == [bridge]


def heard(scene: Scene, row: Link, *, gone: bool = False) -> None:
    scene.watcher._hear_host(Event(kind="link", gone=gone, row=row), row)


@pytest.mark.mutation("scopes-wait-for-their-nics")
@watched
async def test_all_scopes_on_a_nic_are_repaired_when_it_appears(scene: Scene) -> None:
    """Also if it appears during the work that fails without it, and however many of its events come."""
    for number in range(3):
        scene.watcher.watch(f"net-{number}", WANT)
    await scene.clock.settle()
    nic = host_link(WANT.ports[0].segment.nic, 9, "")
    for _ in range(2):
        scene.working = True
        for up in (False, True, True):
            heard(scene, replace(nic, up=up))
        await scene.clock.advance(1)
        assert scene.repairs == []
        scene.working = False
        await scene.clock.advance(1)
        assert len(scene.repairs) == 4
        heard(scene, nic, gone=True)
        scene.repairs.clear()
    # A new bridge or VLAN link of ours gets its alias later.
    segment = WANT.ports[0].segment
    scene.working = True
    for ours in (host_link(segment.bridge, 20, "bridge"), host_link(segment.vlan_link, 21, "vlan", master_index=20)):
        heard(scene, ours)
    await scene.clock.advance(1)
    scene.working = False
    scene.watcher.work_done(SCOPE)
    await scene.clock.advance(1)
    assert scene.repairs == []


@watched
async def test_a_scope_on_a_bridge_is_repaired_when_the_bridge_gets_its_nic(scene: Scene) -> None:
    """A tap of a VM is no NIC, and a bridge of ours leads to no NIC."""
    port = replace(WANT.ports[0], segment=replace(WANT.ports[0].segment, nic="cloudbr1"))
    scene.watcher.watch(SCOPE, replace(WANT, ports=(port,)))
    await scene.clock.settle()
    scene.watcher._host = cast(Watch, Host({7: "cloudbr1", 8: port.segment.bridge}))
    heard(scene, host_link("cloudbr1", 7, "bridge"))
    await scene.clock.advance(1)
    assert [why for _, why in scene.repairs] == ["cloudbr1"]
    heard(scene, host_link("vnet5", 20, "tun", master_index=7))
    heard(scene, host_link(port.segment.bridge, 8, "bridge"))  # ours; its alias comes later
    await scene.clock.advance(1)
    assert len(scene.repairs) == 1
    heard(scene, host_link("eth7", 21, ""))
    heard(scene, host_link("eth7", 21, "", master_index=8))
    await scene.clock.advance(1)
    assert len(scene.repairs) == 1
    for _ in range(2):
        heard(scene, host_link("eth7", 21, "", master_index=7))
    await scene.clock.advance(1)
    assert [why for _, why in scene.repairs] == ["cloudbr1", "eth7"]
    scene.watcher._host = None


@watched
async def test_a_scope_that_ends_is_not_repaired_any_more(scene: Scene) -> None:
    await scene.events(lost())
    scene.watcher.unwatch(SCOPE)
    await scene.clock.advance(10)
    assert scene.repairs == []


@watched
async def test_a_repair_that_waits_for_other_work_is_given_up_when_that_ends_the_scope(scene: Scene) -> None:
    await scene.events(lost())
    scene.working = True
    await scene.clock.advance(DEBOUNCE_S)
    scene.watcher.unwatch(SCOPE)
    scene.working = False
    await scene.clock.advance(10)
    assert scene.repairs == []
