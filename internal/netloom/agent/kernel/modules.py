"""Load kernel modules, with modprobe(8)."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable

from netloom.agent.environment import PATH


def load(modules: Iterable[str]) -> None:
    """Load those of the modules that exist.

    Failures are ignored: the kernel may have them built in. If a feature is really missing, the operation that needs it
    reports it.
    """
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["modprobe", "--all", "--quiet", *modules],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": PATH},
            timeout=20,
            check=False,
        )
