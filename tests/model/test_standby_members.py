"""Whatever fails, never two hosts have a lease: members with their files, kernels, boots and proofs, in lockstep.

The decision alone, with clocks that drift and networks that lose and delay: test_standby_decision.py.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from netloom.files import NotFlushed
from netloom.standby.decision import Local
from unit.standby_group import NAMES, PAIR, Group, Host, full_disk


def _stop(group: Group, host: Host, chance: random.Random) -> None:
    host.stop()


def _start(group: Group, host: Host, chance: random.Random) -> None:
    if host.member is None:
        host.start(chance.choice([None, Local(), Local(ready=False)]))


def _cut_power(group: Group, host: Host, chance: random.Random) -> None:
    host.cut_power(loses=chance.random() < 0.5)


def _freeze(group: Group, host: Host, chance: random.Random) -> None:
    host.freeze()


def _thaw(group: Group, host: Host, chance: random.Random) -> None:
    host.thaw()


def _cut_off(group: Group, host: Host, chance: random.Random) -> None:
    group.cut_off(host.name)


def _one_way(group: Group, host: Host, chance: random.Random) -> None:
    group.cut.add((host.name, chance.choice(NAMES)))


def _heal(group: Group, host: Host, chance: random.Random) -> None:
    group.cut.clear()


def _full(group: Group, host: Host, chance: random.Random) -> None:
    host.refusal = full_disk()


def _uncertain(group: Group, host: Host, chance: random.Random) -> None:
    host.refusal = NotFlushed(errno.EIO, "Input/output error")


def _writable(group: Group, host: Host, chance: random.Random) -> None:
    host.refusal = None


def _refuse_leases(group: Group, host: Host, chance: random.Random) -> None:
    host.leases.refuses = True


def _accept_leases(group: Group, host: Host, chance: random.Random) -> None:
    host.leases.refuses = False


def _replay(group: Group, host: Host, chance: random.Random) -> None:
    """Send recorded messages again to this host, in any order."""
    for sender, it in chance.sample(group.messages, min(100, len(group.messages))):
        if sender != host.name:
            host.hear(it)


def _give_way(group: Group, host: Host, chance: random.Random) -> None:
    if host.member is not None and host.is_awake:
        host.member.set_local(Local(gives_way=True), group.now)


def _be_ready(group: Group, host: Host, chance: random.Random) -> None:
    if host.member is not None and host.is_awake:
        host.member.set_local(Local(), group.now)


FAULTS: list[Callable[[Group, Host, random.Random], None]] = [
    _stop,
    _start,
    _cut_power,
    _freeze,
    _thaw,
    _cut_off,
    _one_way,
    _heal,
    _full,
    _uncertain,
    _writable,
    _refuse_leases,
    _accept_leases,
    _replay,
    _give_way,
    _be_ready,
]


Fault = tuple[Callable[[Group, Host, random.Random], None], str, int]  # what, where, for how many ticks it lasts


def play(group: Group, faults: list[Fault], seed: int) -> None:
    """Let the faults happen, and heal all. ``Group.run`` asserts after each tick that not two hosts have a lease.

    In the end one has.
    """
    chance = random.Random(seed)
    for fault, name, ticks in faults:
        fault(group, group.hosts[name], chance)
        group.settle()
        group.run(ticks / 10, each=lambda: _replay(group, chance.choice(list(group.hosts.values())), chance))
    for host in group.hosts.values():
        host.thaw()
        for what in (_writable, _accept_leases, _heal, _be_ready):
            what(group, host, chance)
        if host.member is None:
            host.start()
    group.upstream = {it.name for it in group.hosts.values()}
    group.run(8)
    assert len(group.serving) == 1, [it.member and it.view for it in group.hosts.values()]
    assert {it.view.active for it in group.hosts.values()} == set(group.serving)


@given(
    st.lists(st.tuples(st.sampled_from(FAULTS), st.sampled_from(NAMES), st.integers(0, 15)), max_size=25),
    st.integers(0, 1 << 32),
)
@settings(max_examples=150, deadline=None)
def test_never_two_hosts_have_a_lease_and_in_the_end_one_has(faults: list[Fault], seed: int) -> None:
    play(Group().start(), faults, seed)


def _reach_upstream(group: Group, host: Host, chance: random.Random) -> None:
    """Only this host reaches it from now on."""
    group.upstream = {host.name}


def _lose_upstream(group: Group, host: Host, chance: random.Random) -> None:
    group.upstream = set()


PAIR_FAULTS = [*FAULTS, _reach_upstream, _reach_upstream, _lose_upstream]


@given(
    st.lists(st.tuples(st.sampled_from(PAIR_FAULTS), st.sampled_from(NAMES[:2]), st.integers(0, 15)), max_size=25),
    st.integers(0, 1 << 32),
)
@settings(max_examples=150, deadline=None)
def test_without_a_witness_never_two_hosts_have_a_lease_while_the_upstream_answers_only_one(
    faults: list[Fault], seed: int
) -> None:
    group = Group(PAIR).start()
    group.upstream = set()
    play(group, faults, seed)
