"""The files that tell NetworkManager and systemd-networkd which links are not theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from netloom.agent.host import unmanaged


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in place of /run, in which no program runs. A reload adds a line to ``reloads``."""
    programs = [
        replace(
            it,
            place=it.place.replace("/run", str(tmp_path)),
            runs=it.runs.replace("/run", str(tmp_path)),
            file=it.file.replace("/run", str(tmp_path)),
            reload=("sh", "-c", f"echo {it.reload[0]} >> {tmp_path}/reloads"),
        )
        for it in unmanaged.PROGRAMS
    ]
    monkeypatch.setattr(unmanaged, "PROGRAMS", programs)
    before = os.umask(0o077)
    yield tmp_path
    os.umask(before)


def reloads(run: Path) -> list[str]:
    return (run / "reloads").read_text().split() if (run / "reloads").exists() else []


@pytest.mark.mutation("taps-of-vms-are-left-alone")
def test_the_files_name_the_taps_of_vms_and_our_links(run: Path) -> None:
    (run / "NetworkManager").mkdir()
    (run / "systemd" / "netif").mkdir(parents=True)
    (run / "systemd" / "netif" / "state").touch()
    unmanaged.mark({"eth1.101", "breth1-101", "eth2 ", "a;b", "x*"})
    files = [run / "NetworkManager/conf.d/netloom.conf", run / "systemd/network/00-netloom.network"]
    told = [[line for line in it.read_text().splitlines() if line and line[0] != "#"] for it in files]
    listed = "interface-name:vnet*;interface-name:brvx-*;interface-name:breth1-101;interface-name:eth1.101"
    assert told == [
        [
            "[keyfile]",
            f"unmanaged-devices+={listed}",
            "[device-netloom]",
            f"match-device={listed}",
            "managed=0",
        ],
        ["[Match]", "Name=vnet* brvx-* breth1-101 eth1.101", "[Link]", "Unmanaged=yes"],
    ]
    # networkd reads its file as a user of its own.
    assert [it.stat().st_mode & 0o777 for it in files] == [0o644] * 2
    assert [it.parent.stat().st_mode & 0o777 for it in files] == [0o755] * 2
    assert reloads(run) == ["nmcli", "networkctl"]
    unmanaged.mark({"breth1-101", "eth1.101"})
    assert reloads(run) == ["nmcli", "networkctl"]
    unmanaged.mark({"breth1-102"})
    assert "breth1-101" not in files[0].read_text()
    unmanaged.release()
    assert reloads(run) == ["nmcli", "networkctl"] * 3
    assert not any(it.exists() for it in files)
    unmanaged.release()
    assert len(reloads(run)) == 6


def test_nothing_is_written_where_neither_runs_and_nothing_fails(run: Path) -> None:
    unmanaged.mark({"breth1-101"})
    unmanaged.release()
    assert list(run.iterdir()) == []
    (run / "NetworkManager").mkdir()
    (run / "NetworkManager" / "conf.d").write_text("not a directory")
    unmanaged.mark({"breth1-101"})


def test_networkd_is_not_started_where_it_never_ran(run: Path) -> None:
    """The file waits for its first start. Its directory is there on every host with systemd."""
    (run / "systemd" / "netif").mkdir(parents=True)
    unmanaged.mark({"breth1-101"})
    assert (run / "systemd/network/00-netloom.network").exists()
    assert reloads(run) == []
