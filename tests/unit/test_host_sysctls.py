"""Sysctls of the host: raised for networks, and restored by the uninstall unless somebody else changed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from netloom.agent.host import host_sysctls
from netloom.agent.kernel import sysctl

LIMIT, OTHER = "fs/inotify/max_user_instances", "net/ipv4/neigh/default/gc_thresh3"


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The sysctls of a simulated host."""
    values = {LIMIT: "128", OTHER: "1024"}

    def read(namespace: str | None, names: Iterable[str]) -> dict[str, str | None]:
        return {name: values.get(name) for name in names}

    def write(namespace: str | None, written: Mapping[str, str]) -> None:
        values.update(written)

    monkeypatch.setattr(sysctl, "read", read)
    monkeypatch.setattr(sysctl, "write", write)
    return values


def test_former_values_are_restored(values: dict[str, str], tmp_path: Path) -> None:
    record = tmp_path / "sysctls.json"
    host_sysctls.raise_to({LIMIT: "8192"}, record)
    host_sysctls.raise_to({OTHER: "2048"}, record)
    host_sysctls.raise_to({OTHER: "4096"}, record)
    assert values == {LIMIT: "8192", OTHER: "4096"}
    host_sysctls.restore(record)
    assert values == {LIMIT: "128", OTHER: "1024"}
    assert not record.exists()


@pytest.mark.mutation("another-hand-set-this-sysctl", instead="True")
def test_a_value_that_somebody_else_has_set_stays(values: dict[str, str], tmp_path: Path) -> None:
    record = tmp_path / "sysctls.json"
    host_sysctls.raise_to({LIMIT: "8192"}, record)
    values[LIMIT] = "10000"
    host_sysctls.restore(record)
    assert values[LIMIT] == "10000"


def test_the_value_after_a_reboot_is_the_former_one(values: dict[str, str], tmp_path: Path) -> None:
    record = tmp_path / "sysctls.json"
    host_sysctls.raise_to({LIMIT: "8192"}, record)
    values[LIMIT] = "256"
    host_sysctls.raise_to({LIMIT: "8192"}, record)
    host_sysctls.restore(record)
    assert values[LIMIT] == "256"


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"fs/inotify/max_user_instances": 5}'])
def test_without_a_readable_record_nothing_is_restored(
    text: str | None, values: dict[str, str], tmp_path: Path
) -> None:
    record = tmp_path / "sysctls.json"
    if text is not None:
        record.write_text(text)
    host_sysctls.restore(record)
    assert values == {LIMIT: "128", OTHER: "1024"}
