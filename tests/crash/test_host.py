"""The host's side: agents, relays and their children are killed after each effect of every command.

One repeat of the command, or a restart of the agent, then makes the host exactly what it is without a kill. The network
beside keeps everything: its objects, processes and the generation of its ruleset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pytest

from crash.choice import EVERY, chosen, one_of_each
from crash.effects import Effect
from crash.points import Kill, Recovery, Scene, scene
from crash.sequences import ISOLATED, SHARED, VPC
from netloom.commands.table import TABLE

SEQUENCES = {"isolated": ISOLATED, "vpc": VPC, "shared": SHARED}
KINDS = {"conntrack", "file", "flush", "namespace", "netlink", "nft", "process", "sent", "signal", "sysctl"}
RESTORED = 21  # steps of the isolated network


@pytest.fixture(scope="module")
def scenes() -> Iterator[Callable[[str], Scene]]:
    """The scene of a sequence by name. Each is made once."""
    with ExitStack() as stack:
        made: dict[str, Scene] = {}

        def scene_of(name: str) -> Scene:
            if name not in made:
                made[name] = stack.enter_context(scene(SEQUENCES[name]))
            return made[name]

        yield scene_of


@pytest.fixture(params=SEQUENCES)
def carried_out(request: pytest.FixtureRequest, scenes: Callable[[str], Scene]) -> Scene:
    return scenes(request.param)


@pytest.fixture
def isolated(scenes: Callable[[str], Scene]) -> Scene:
    """The isolated network with all its services, addresses and rules."""
    it = scenes("isolated")
    it.rebuild(RESTORED)
    return it


def effects_of(carried_out: Scene) -> list[tuple[str, list[Effect]]]:
    """The name and the effects of each step without a kill."""
    steps = carried_out.sequence.steps
    return [(step.name, it.effects) for step, it in zip(steps, carried_out.moments[1:], strict=True)]


def walks(carried_out: Scene) -> Iterator[Mapping[int, Kill]]:
    """In which steps to kill, after how many effects. The ways to recover take turns."""
    turns: tuple[Recovery, Recovery] = ("repeat", "restart")
    steps = effects_of(carried_out)
    if not EVERY:
        numbers = one_of_each(steps)
        yield {step: Kill(number, turns[(step // 2 + number) % 2]) for step, number in numbers.items()}
        return
    for number in range(max(len(effects) for _, effects in steps) + 1):
        yield {
            step: Kill(number, turns[(step + number) % 2])
            for step, (_, effects) in enumerate(steps)
            if number <= len(effects)
        }


def test_every_command_of_a_host_is_in_a_sequence() -> None:
    """A new command needs a step in ``sequences.py``."""
    named = {step.name for it in SEQUENCES.values() for step in it.steps}
    assert named == {row.name for row in TABLE.values() if row.transition is not None}


def test_one_repeat_or_a_restart_after_a_kill_gives_the_desired_state(carried_out: Scene) -> None:
    for kills in walks(carried_out):
        struck = carried_out.walk(kills)
        assert any(struck.values())


def test_a_connection_that_is_cut_before_or_after_the_commit_loses_nothing(carried_out: Scene) -> None:
    """The commit is the rename of the state file. The call goes on, and its repeat gets the reply."""
    commits = {
        step: next(number for number, it in enumerate(effects) if it.what.startswith("rename /var/lib/netloom/scopes/"))
        for step, (_, effects) in enumerate(effects_of(carried_out))
        if any(it.what.startswith("rename /var/lib/netloom/scopes/") for it in effects)
    }
    assert len(commits) > len(carried_out.sequence.steps) / 2
    for after in (0, 1):
        kills = {step: Kill(number + after, "cut") for step, number in commits.items() if EVERY or step % 6 == after}
        assert any(carried_out.walk(kills).values())


def test_the_known_effects_are_seen(isolated: Scene) -> None:
    """Otherwise the other tests of this file would prove nothing."""
    effects = [it for _, effects in effects_of(isolated) for it in effects]
    assert {it.kind for it in effects} - {"packet"} == KINDS
    said = {it.what for it in effects}
    for what in (
        "rename /var/lib/netloom/scopes/.net-204.json.new",
        "fsync /var/lib/netloom/scopes",
        "write /proc/sys/net/ipv4/ip_forward",
        "execve /usr/sbin/dnsmasq",
        "execve /usr/sbin/haproxy",
        "mount",
        "kill 15",
    ):
        assert what in said
    few = [command for command, effects in effects_of(isolated) if len(effects) <= len(KINDS) / 2]
    assert few == ["save-userdata"], "it brings only what the network has already"


def test_a_start_that_is_killed_is_completed_by_the_next(isolated: Scene) -> None:
    """The host was booted, so the start builds everything."""
    assert isolated.kill_start(1 << 30) is None
    assert "nft" in {it.kind for it in isolated.started}
    for number in chosen(isolated.started):
        isolated.kill_start(number)


@pytest.mark.parametrize(
    "harm",
    [["ip", "link", "del", "vnetg204"], ["ip", "netns", "del", "cs-net-204"]],
    ids=["link", "namespace"],
)
def test_a_repair_that_is_killed_is_completed_by_the_next_start(isolated: Scene, harm: list[str]) -> None:
    isolated.kill_repair(1 << 30, *harm)
    for number in chosen(isolated.started, 4):
        isolated.kill_repair(number, *harm)
