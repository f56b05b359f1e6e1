"""The management server's side: the executable and its helper are killed after each of their effects.

A call whose process is killed is repeated once, as CloudStack does. A call whose helper is killed succeeds.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import processes
from crash.choice import chosen
from crash.effects import LAUNCH, Effect, Tracer
from crash.points import Strike
from ssh.lab import KEYS, MANAGEMENT, PYTHON, REPO, Caller, CallResult, SshLab, run, running_lab

# Compiled modules are no files of ours.
TRACED = ["env", "PYTHONDONTWRITEBYTECODE=1", *LAUNCH, PYTHON, str(REPO / "cmd" / "netloom" / "main.py")]
STORED = {"host": "10.99.0.11", "namespace": "cs-net-42"}
SETTLE_S = 20.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshLab]:
    with running_lab(tmp_path_factory.mktemp("stest")) as lab:
        yield lab


@pytest.fixture
def tracer(lab: SshLab) -> Iterator[Tracer]:
    it = Tracer()
    try:
        yield it
    finally:
        end_helpers()
        it.close()


class Scene:
    """One call of a management server that has nothing yet, or of one whose helper is connected to the host."""

    def __init__(self, lab: SshLab, tracer: Tracer, directory: Path, *, connected: bool) -> None:
        self.lab = lab
        self.tracer = tracer
        self.directory = directory
        self.connected = connected

    def kill(self, after: int) -> tuple[Effect | None, list[Effect]]:
        """Kill whoever is about to have another effect after so many. Returns that effect, and those before it."""
        end_helpers()
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self.lab.h1.set_behaviour()
        caller = Caller(self.lab, self.directory)
        caller.helper = "60"
        details = caller.details(sshkey=self.lab.key("good"), port=KEYS)
        if self.connected:
            assert self._call(caller, details).output == ""
        strike = Strike(after)
        path = caller.payload(details, STORED, {"vlan": "1204"})
        process = caller.start("implement-network", str(path), "60", executable=TRACED)
        with self.tracer.watching(strike) as effects:
            self.tracer.adopt(process)
            ended = caller.finish(process, time.monotonic())
        if strike.effect is not None and strike.effect.pid == process.pid:
            assert ended.status in (0, -signal.SIGKILL)
        else:
            assert ended.output == "", f"after {after} effects, before {strike.effect}"
        began = time.monotonic()
        again = caller.finish(caller.start("implement-network", str(path), "60"), began)
        assert again.output == ""
        assert again.took_s < SETTLE_S
        self._check_calls()
        assert not list(caller.home.glob(".*")), "a temporary file is left"
        return strike.effect, effects

    def _call(self, caller: Caller, details: dict[str, Any]) -> CallResult:
        path = caller.payload(details, STORED, {"vlan": "1204"})
        process = caller.start("implement-network", str(path), "60", executable=TRACED)
        self.tracer.adopt(process)
        return caller.finish(process, time.monotonic())

    def _check_calls(self) -> None:
        """Every call that arrived is complete. The last one is that of the repeat."""
        calls = self.lab.h1.calls_received()
        assert {json.loads(it["payload"])["vlan"] for it in calls} == {"1204"}
        ids = [it["call_id"] for it in calls]
        assert len(set(ids)) <= 2 + self.connected
        assert ids.count(ids[-1]) == 1


def end_helpers() -> None:
    for pid in helpers():
        processes.kill(pid)
    until = time.monotonic() + SETTLE_S
    while helpers():
        assert time.monotonic() < until
        time.sleep(0.01)


def helpers() -> list[int]:
    found = []
    for pid in map(int, run("ip", "netns", "pids", MANAGEMENT).split()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        except OSError:
            continue
        if words[-1:] == [b"helper"]:
            found.append(pid)
    return found


@pytest.mark.parametrize("connected", [False, True], ids=["first call", "connected helper"])
def test_a_call_survives_the_kill_of_its_helper_and_its_repeat_that_of_itself(
    lab: SshLab, tracer: Tracer, tmp_path: Path, connected: bool
) -> None:
    scene = Scene(lab, tracer, tmp_path / "m", connected=connected)
    _, undisturbed = scene.kill(1 << 30)
    assert {"process", "sent", *([] if connected else ["file"])} <= {it.kind for it in undisturbed}
    for after in chosen(undisturbed):
        scene.kill(after)
