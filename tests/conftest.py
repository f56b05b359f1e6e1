"""What holds for every test: groups that need root say so in one line instead of being skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

PRIVILEGED = {"kernel", "ssh", "e2e", "mutants"}

# Two cores are shared with everything else that runs, so a slow example is no finding; speed is never asserted here.
settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# For `make check`, which is to be short; `make test` takes the full number.
settings.register_profile("quick", settings.get_profile("full"), max_examples=20)
settings.load_profile("full")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to start what cannot work, and order nothing: a group runs as its files stand."""
    tests = Path(__file__).parent
    privileged = {item.path.relative_to(tests).parts[0] for item in items} & PRIVILEGED
    if privileged and os.geteuid() != 0:
        names = ", ".join(f"tests/{name}" for name in sorted(privileged))
        pytest.exit(f"{names}: these tests make network namespaces and need root", returncode=1)
