"""`make bench` runs every script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from repo.files import ROOT


def run(checkout: Path, **scripts: str) -> subprocess.CompletedProcess[str]:
    """Run the bench runner in a checkout that has these scripts."""
    runner = checkout / "build/ci/bench.py"
    runner.parent.mkdir(parents=True)
    shutil.copy(ROOT / "build/ci/bench.py", runner)
    (checkout / "tests/bench").mkdir(parents=True)
    for name, text in scripts.items():
        (checkout / f"tests/bench/{name}.py").write_text(text)
    return subprocess.run([sys.executable, runner], capture_output=True, text=True)


def test_a_failing_script_does_not_stop_the_others(tmp_path: Path) -> None:
    done = run(tmp_path, bench_a="raise OSError(3, 'gone')", bench_b="print('measured')", bench_c="raise SystemExit(2)")
    assert [line for line in done.stdout.splitlines() if line == "measured"]
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "failed: bench_a.py, bench_c.py"


def test_without_a_failure_the_status_is_0(tmp_path: Path) -> None:
    done = run(tmp_path, bench_a="print('measured')", other="raise OSError")
    assert (done.returncode, done.stdout, done.stderr) == (0, "== tests/bench/bench_a.py\nmeasured\n", "")
