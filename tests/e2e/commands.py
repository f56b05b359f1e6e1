"""CloudStack's commands in the middle of what happens to the hosts of a network with a standby.

CloudStack forwards one port after the other to a VM, and takes each back a moment later. Each command changes one rule
only, so a command that was lost shows, whatever follows.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import pytest

from bed import payloads
from bed.cloudstack import Sent
from bed.lab import Host
from bed.machines import until
from bed.payloads import PortForwardRule
from bed.standby import FORWARDED, ScopeBed, StandbyBed
from e2e.networks import impatient
from meanwhile import meanwhile

TIMEOUT_S = 25
LATE_S = 3  # a call ends so long after its timeout at the latest, on a busy machine
PAUSE_S = 0.3  # a move needs a moment without changes
FIRST_PORT, LAST_PORT = 9000, 9999
CLOSED = {"timeout_s": 0.4}


class Commands:
    """``sent``: what CloudStack has sent so far."""

    def __init__(self, it: StandbyBed) -> None:
        self.it = it
        self.network = it.network
        self.sent: list[Sent] = []
        (self.address,) = [each for each in it.network.addresses if each.ip == FORWARDED]
        self._rules: dict[int, PortForwardRule] = {}  # by port; answered with success, and not taken back
        self._taken_back = 0  # the port that was taken back last
        self._first = FIRST_PORT
        self._first = max(self._on_disk(it.active), default=FIRST_PORT - 1) + 1  # a test that failed left some
        self._port = self._first
        self._adds = True
        self._count = 0

    def send(self) -> None:
        """Send the next command; one that has failed is repeated."""
        command = "add-port-forward" if self._adds else "delete-port-forward"
        port = self._port if self._adds else self._port - 2
        rule = PortForwardRule(port, self.address, str(port), self.it.nics[0].ip, str(port), "tcp")
        self.sent.append(self.network.ensure())
        sent = self.network.send(command, payloads.port_forward(self.network.facts, rule))
        self.sent.append(sent)
        if sent.ok:
            self._count += 1
            self._answered(rule)
        time.sleep(PAUSE_S)

    def _answered(self, rule: PortForwardRule) -> None:
        port = int(rule.public_ports)
        if self._adds:
            self._rules[port] = rule
            self._port += 1
            assert self._port <= LAST_PORT
            self._adds = port - 1 not in self._rules
        else:
            del self._rules[port]
            self._taken_back = port
            self._adds = True

    def go_on(self, *, seconds: float = 90.0) -> bool:
        """Whether two more rules are added, and two are taken back."""
        count = self._count
        return until(lambda: self._count >= count + 4, seconds=seconds)

    @property
    def failed(self) -> list[Sent]:
        """The commands that were not answered with success."""
        return [each for each in self.sent if not each.ok]

    def check_answers(self) -> None:
        """No command took longer than it may, and those that failed say in one line what to do."""
        for each in self.sent:
            assert each.execution.seconds < TIMEOUT_S + LATE_S, each
        for each in self.failed:
            assert each.output.endswith(")") and "\n" not in each.output, f"no remedy: {each.output}"

    def check_packets(self) -> None:
        """The host that serves now executed the last commands: a client connects, and another one does not."""
        ports = sorted(self._rules)
        with self.it.vm.serve_tcp(*ports, self._taken_back):
            for port in ports:
                assert self.it.internet.tcp(FORWARDED, port).ok, port
            assert not self.it.internet.tcp(FORWARDED, self._taken_back, **CLOSED).ok, self._taken_back

    def check_states(self) -> None:
        """Both hosts have the rules that were answered with success and no others, on the disk and in the kernel."""
        wanted = set(self._rules)
        for host in (self.it.active, self.it.standby):
            for look in (self._on_disk, self._in_kernel):
                assert until(partial(_is, wanted, look, host)), (host, look(host), wanted)

    def _on_disk(self, host: Host) -> set[int]:
        forwards = json.loads(self.it.state(host))["port_forwards"].values()
        return self._ours(it["public_ports"]["first"] for it in forwards)

    def _in_kernel(self, host: Host) -> set[int]:
        with host.within(self.it.network.namespace) as inside:
            return self._ours(re.findall(rf"{re.escape(FORWARDED)} \. ([0-9]+)", inside.sh("nft list ruleset")))

    def _ours(self, ports: Iterable[str | int]) -> set[int]:
        return {port for it in ports if self._first <= (port := int(it)) <= LAST_PORT}

    def end(self) -> None:
        """Take back what is left."""
        for rule in self._rules.values():
            assert self.network.send("delete-port-forward", payloads.port_forward(self.network.facts, rule)).ok


def _is(wanted: set[int], look: Callable[[Host], set[int]], host: Host) -> bool:
    return look(host) == wanted


@contextmanager
def commands(it: ScopeBed) -> Iterator[Commands]:
    """CloudStack sends commands all the time. At the end of the block they succeed, and have their effect."""
    assert isinstance(it, StandbyBed)
    sent = Commands(it)
    network = it.network
    rule = network.add_firewall_rule(sent.address, "tcp", FIRST_PORT, LAST_PORT)
    with impatient(it.cloud, timeout_s=TIMEOUT_S), meanwhile(sent.send):
        assert sent.go_on()
        yield sent
        assert sent.go_on(), f"commands do not succeed after the event: {[each.output for each in sent.failed[-4:]]}"
    if not sent.sent[-1].ok:  # it may have had its effect all the same
        sent.send()
    assert sent.sent[-1].ok, sent.sent[-1]
    sent.check_answers()
    sent.check_packets()
    it.make_ready()
    sent.check_states()
    sent.end()
    network.delete_firewall_rule(rule)
    network.failures.clear()


def amid(it: ScopeBed) -> AbstractContextManager[object]:
    """``commands``, if the test is one that ``with_commands`` repeats with them."""
    return commands(it) if it.has_commands else nullcontext()


@contextmanager
def ready(bed: StandbyBed, request: pytest.FixtureRequest) -> Iterator[StandbyBed]:
    """The bed for the fixture ``it``: every host is up, and the standby is not behind.

    ``with_commands`` repeats a test while CloudStack sends commands.
    """
    bed.make_ready()
    bed.has_commands = getattr(request, "param", "") == "commands"
    yield bed
    bed.settle()


with_commands = pytest.mark.parametrize(
    "it", ["", pytest.param("commands", marks=pytest.mark.long)], indirect=True, ids=["alone", "with commands"]
)
