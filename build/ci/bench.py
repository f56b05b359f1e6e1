"""Run every script of tests/bench, also after one has failed. The last line names the failed ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """The exit status: 1 when a script failed."""
    failed = []
    for script in sorted((ROOT / "tests" / "bench").glob("bench_*.py")):
        print(f"== {script.relative_to(ROOT)}", flush=True)
        if subprocess.run([sys.executable, script], check=False).returncode != 0:
            failed.append(script.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
