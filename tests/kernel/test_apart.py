"""Groups of tests that need root run at the same time, and see nothing of each other (build/ci/apart.py)."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from load.accounts import family
from repo.files import ROOT

LIMIT_S = 60
# Each waits until the other one has made the same names, too.
MEET = """
ip netns add same
ip link add same type veth peer name other
touch /run/netloom-same /run/netloom-left
touch {mine}
for i in $(seq 600); do test -e {other} && break; sleep 0.05; done
ip netns del same; rm /run/netloom-same
exit 3
"""


def start(left: Path, script: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "build/ci/apart.py"), str(left), "bash", "-ec", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_commands_use_the_same_names(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        start(tmp_path / "left-1", MEET.format(mine=one, other=two)) as first,
        start(tmp_path / "left-2", MEET.format(mine=two, other=one)) as second,
    ):
        assert (first.wait(LIMIT_S), second.wait(LIMIT_S)) == (3, 3)
    for name in ("left-1", "left-2"):
        left = (tmp_path / name).read_text().splitlines()
        assert left == ["/run/netloom-left", "link other", "link same"]
    assert not Path("/run/netloom-left").exists()


def test_a_signal_reaches_the_command_and_what_it_leaves_is_killed(tmp_path: Path) -> None:
    script = """
        trap 'echo interrupted; exit 5' INT
        sleep 600 &
        echo started
        while true; do sleep 0.05; done
    """
    with start(tmp_path / "left", script) as apart:
        assert apart.stdout is not None and apart.stdout.readline() == "started\n"
        inside = family(apart.pid) - {apart.pid}
        assert len(inside) >= 3  # the first process of the namespace, the shell, and what it runs
        apart.send_signal(signal.SIGINT)
        assert apart.stdout.read() == "interrupted\n"
        assert apart.wait(LIMIT_S) == 5
    assert not [pid for pid in inside if Path("/proc", str(pid)).exists()]
    assert (tmp_path / "left").read_text() == ""
