"""Settings for all tests. Groups that need root refuse to start with one line; tests are never skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

PRIVILEGED = {"kernel", "crash", "load", "ssh", "e2e", "mutants"}

# Tests share two cores with everything else that runs, so a slow example is no failure.
settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# For `make check`, which must be fast; `make test` uses the full number of examples.
settings.register_profile("quick", settings.get_profile("full"), max_examples=20)
settings.load_profile("full")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to start groups that need root without root. The order of tests is not changed."""
    tests = Path(__file__).parent
    privileged = {item.path.relative_to(tests).parts[0] for item in items} & PRIVILEGED
    if privileged and os.geteuid() != 0:
        names = ", ".join(f"tests/{name}" for name in sorted(privileged))
        pytest.exit(f"{names}: these tests make network namespaces and need root", returncode=1)
