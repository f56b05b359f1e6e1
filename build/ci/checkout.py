"""Run a Python program of this checkout, or of a copy that all users and simulated hosts can read.

    .venv/bin/python build/ci/checkout.py -m bed.demo

Simulated hosts and VMs have a /root, /home, /run, /tmp and /var/tmp of their own. A checkout below one of these
directories is invisible to them, and one below a private directory is invisible to users without privileges. In these
cases the program runs in a copy of the checkout below /opt, which is deleted afterwards.

The arguments are those of the interpreter. The working directory is the checkout, and ``internal`` and ``tests`` are on
the module path. The exit status is the program's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOSTS_OWN = ("/home", "/root", "/run", "/tmp", "/var/tmp")
COPIES = "/opt"
LOOK_S = 0.05  # between two looks for a signal and for the end of the program
NOT_COPIED = (".git", ".mypy_cache", ".ruff_cache", "__pycache__")


def main(arguments: list[str]) -> int:
    """Run the program; its exit status, or 1 without root."""
    if os.geteuid() != 0:
        print("this creates network namespaces and needs root", file=sys.stderr)
        return 1
    return run_in_copy(arguments) if not is_visible(ROOT) else _run(ROOT, arguments)


def is_visible(directory: Path) -> bool:
    """Whether simulated hosts and users without privileges can read this directory."""
    if any(directory.is_relative_to(own) for own in HOSTS_OWN):
        return False
    passable = all(it.stat().st_mode & 0o001 for it in [directory, *directory.parents])
    return passable and (directory / "build/ci/checkout.py").stat().st_mode & 0o004 != 0


def run_in_copy(arguments: Sequence[str]) -> int:
    """Run the program in a copy that all can read; its exit status. Raises OSError when there is no room for a copy."""
    with tempfile.TemporaryDirectory(prefix="netloom-", dir=COPIES) as directory:
        copy = Path(directory, "netloom")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
        if not is_visible(copy):
            print(f"neither {ROOT} nor {COPIES} can be read by users without privileges", file=sys.stderr)
            return 1
        print(f"{ROOT} is not visible to all users and simulated hosts: running in a copy, {copy}", flush=True)
        return _run(copy, arguments)


def _run(root: Path, arguments: Sequence[str]) -> int:
    """Run the program; its exit status. SIGINT, SIGTERM and SIGHUP are passed on to it as SIGINT."""
    received: list[int] = []
    # Before the start, so that the program does not inherit an ignored SIGINT from a shell's background job.
    # The handler only notes the signal. An exception could arrive while the program is being started.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(number))
    command = [str(root / ".venv/bin/python"), *arguments]
    program = subprocess.Popen(command, cwd=root, env=_environment(root), start_new_session=True)
    while (status := program.poll()) is None:
        if received:
            received.pop()
            program.send_signal(signal.SIGINT)
        time.sleep(LOOK_S)
    return status if status >= 0 else 128 - status


def _environment(root: Path) -> Mapping[str, str]:
    return os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": f"{root}/internal:{root}/tests"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
