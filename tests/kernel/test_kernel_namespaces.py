"""Network namespaces are created, entered and deleted, from threads, after crashes, and together with ``ip netns``."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernel.scratch import descriptors, scratch, tool
from netloom.agent.kernel import namespaces
from netloom.agent.kernel.namespaces import NETNS_DIR, NamespaceError, inside


def current_namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a namespace that does not exist before and after the test."""
    name = f"ktest-{os.getpid()}-new"
    namespaces.delete(name)
    yield name
    namespaces.delete(name)


def test_ip_netns_lists_a_created_namespace(name: str) -> None:
    home = current_namespace()
    namespaces.create(name)
    assert current_namespace() == home
    assert namespaces.exists(name)
    assert name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    assert "lo" in tool(name, "ip", "-o", "link")
    with inside(name):
        assert current_namespace() == os.stat(f"{NETNS_DIR}/{name}").st_ino != home
    assert current_namespace() == home


def test_creating_and_deleting_are_idempotent(name: str) -> None:
    namespaces.create(name)
    first = os.stat(f"{NETNS_DIR}/{name}").st_ino
    namespaces.create(name)
    assert os.stat(f"{NETNS_DIR}/{name}").st_ino == first
    namespaces.delete(name)
    assert not os.path.lexists(f"{NETNS_DIR}/{name}")
    namespaces.delete(name)
    assert not namespaces.exists(name)


def test_a_plain_file_left_by_a_crash_becomes_a_namespace(name: str) -> None:
    Path(NETNS_DIR, name).touch()
    assert not namespaces.exists(name)
    with pytest.raises(NamespaceError, match="is not a namespace"), inside(name):
        pass
    namespaces.create(name)
    assert namespaces.exists(name)
    assert "lo" in tool(name, "ip", "-o", "link")


def test_a_plain_file_left_by_a_crash_is_deleted(name: str) -> None:
    Path(NETNS_DIR, name).touch()
    namespaces.delete(name)
    assert not os.path.lexists(f"{NETNS_DIR}/{name}")


def test_a_namespace_made_by_ip_netns_can_be_used_and_deleted(name: str) -> None:
    subprocess.run(["ip", "netns", "add", name], check=True)
    namespaces.create(name)
    with inside(name):
        assert current_namespace() == os.stat(f"{NETNS_DIR}/{name}").st_ino
    namespaces.delete(name)
    assert name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_concurrent_creation_of_one_name_makes_one_namespace(name: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(namespaces.create, [name] * 32))
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert mounts.count(f"{NETNS_DIR}/{name}") == 1


def test_the_name_is_visible_in_an_earlier_mount_namespace(name: str) -> None:
    with scratch():  # so that /run/netns is already a mount
        script = f"echo ready; read go; nsenter --net={NETNS_DIR}/{name} ip -o link show lo"
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdin
            assert other.stdout
            assert other.stdout.readline() == "ready\n"
            namespaces.create(name)
            printed, _ = other.communicate("go\n", timeout=30)
    assert "lo:" in printed


def test_entering_a_namespace_affects_only_the_calling_thread() -> None:
    entered, looked = threading.Event(), threading.Event()
    home = current_namespace()
    with scratch() as name, ThreadPoolExecutor(1) as pool:

        def stay() -> int:
            with inside(name):
                entered.set()
                assert looked.wait(30)
                return current_namespace()

        there = pool.submit(stay)
        assert entered.wait(30)
        assert current_namespace() == home
        looked.set()
        assert there.result(30) == os.stat(f"{NETNS_DIR}/{name}").st_ino
        assert pool.submit(current_namespace).result(30) == home


def test_inside_blocks_may_be_nested_and_left_by_exceptions() -> None:
    home = current_namespace()
    with scratch() as outer, scratch() as inner:
        with inside(outer):
            at_outer = current_namespace()
            with pytest.raises(ZeroDivisionError), inside(inner):
                _ = 1 / (current_namespace() in (home, at_outer))
            assert current_namespace() == at_outer
            with inside(None), inside(""):
                assert current_namespace() == at_outer
        assert current_namespace() == home


def test_a_missing_namespace_is_named_in_the_error() -> None:
    with pytest.raises(NamespaceError, match="ktest-missing: No such file") as caught, inside("ktest-missing"):
        pass
    assert caught.value.errno == errno.ENOENT


def test_a_thread_that_cannot_leave_a_namespace_is_not_used_again() -> None:
    """Leaving needs CAP_SYS_ADMIN, which the thread drops inside. Capabilities are per thread."""
    home = current_namespace()

    def fail_to_leave(there: str) -> list[str]:
        said = []
        with pytest.raises(NamespaceError) as caught, inside(there):
            _drop_capabilities()
        said.append(str(caught.value))
        for again in (there, None):
            with pytest.raises(NamespaceError) as caught, inside(again):
                pass
            said.append(str(caught.value))
        return said

    with scratch() as there, ThreadPoolExecutor(1) as pool:
        leaving, *later = pool.submit(fail_to_leave, there).result(30)
    assert leaving == f"leave {there}: Operation not permitted (the agent must be restarted)"
    assert later == [f"this thread could not leave {there}; it can no longer be used"] * 2
    assert current_namespace() == home


def _drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, the calling thread
    assert libc.capset(header, (ctypes.c_uint32 * 6)()) == 0


def test_no_file_descriptor_or_mount_leaks(name: str) -> None:
    namespaces.create(name)
    namespaces.delete(name)
    before = descriptors(), len(Path("/proc/self/mountinfo").read_text().splitlines())
    for _ in range(50):
        namespaces.create(name)
        with inside(name):
            pass
        with pytest.raises(ZeroDivisionError), inside(name):
            _ = 1 / 0
        namespaces.delete(name)
        with pytest.raises(NamespaceError), inside(name):
            pass
    assert (descriptors(), len(Path("/proc/self/mountinfo").read_text().splitlines())) == before
