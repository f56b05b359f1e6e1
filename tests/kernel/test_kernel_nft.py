"""nftables of a namespace through libnftables and through ``nft``: same results, same errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

import netloom
from kernel.agent_host import wait_until
from kernel.scratch import descriptors, scratch, tool
from netloom.agent.host.apply import apply
from netloom.agent.kernel import links, namespaces
from netloom.agent.kernel.nft import _ENVIRONMENT as NFT_ENVIRONMENT
from netloom.agent.kernel.nft import Nft, NftError, load_library
from netloom.agent.kernel.nft import _library_lock as library_lock
from netloom.plan.steps import LoadRuleset
from netloom.render.ruleset import Chain, Ruleset, names

TABLE = """
table inet t {
\tmap forwards {
\t\ttype ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
\t\telements = { 203.0.113.10 . tcp . 80 : 10.1.1.10 . 8080 }
\t}
\tchain input {
\t\ttype filter hook input priority filter; policy accept;
\t\tct state established,related counter accept
\t}
}
"""


@pytest.fixture
def ns() -> Iterator[str]:
    with scratch() as name:
        yield name


@pytest.fixture(params=["library", "program"])
def nft(request: pytest.FixtureRequest, ns: str) -> Iterator[Nft]:
    with Nft(ns, use=request.param) as it:
        yield it


def tables(nft: Nft) -> set[str]:
    return {it["table"]["name"] for it in nft.list_json("list tables")["nftables"] if "table" in it}


def test_nft_lists_a_loaded_script(nft: Nft, ns: str) -> None:
    nft.run(TABLE)
    listed = tool(ns, "nft", "list", "ruleset")
    assert "203.0.113.10 . tcp . 80 : 10.1.1.10 . 8080" in listed
    assert nft.list_json("list ruleset") == json.loads(tool(ns, "nft", "-j", "list", "ruleset"))
    assert tables(nft) == {"t"}


def test_a_script_is_one_transaction(nft: Nft) -> None:
    with pytest.raises(NftError):
        nft.run("add table inet good\nadd rule inet good nowhere accept\n")
    assert tables(nft) == set()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "add table inet t\nadd rule inet nowhere c accept\n",
            "nftables: Could not process rule: No such file or directory: add rule inet nowhere c accept",
        ),
        ("table inet t {\n\n\tchain c { junk }\n}", "nftables: syntax error, unexpected"),
        ("add table inet t\nadd chain inet t c { type filter hook inpt priority 0; }", "nftables: unknown chain hook"),
        ("delete table inet t\n", "nftables: Could not process rule: No such file or directory: delete table inet t"),
    ],
)
def test_an_error_is_one_line_and_quotes_the_faulty_line(nft: Nft, script: str, words: str) -> None:
    for call in (nft.run, nft.check):
        with pytest.raises(NftError) as caught:
            call(script)
        assert str(caught.value).startswith(words)
        assert caught.value.line
        assert caught.value.line in script
        assert "\n" not in str(caught.value)


def test_a_check_changes_nothing(nft: Nft) -> None:
    nft.check(TABLE)
    assert tables(nft) == set()
    nft.run(TABLE)
    nft.check("delete table inet t\n")
    assert tables(nft) == {"t"}


def test_a_large_script_is_loaded_completely(nft: Nft) -> None:
    elements = ", ".join(f"10.{i >> 8}.{i & 255}.1" for i in range(5000))
    nft.run(f"table inet t {{\n set s {{ type ipv4_addr; elements = {{ {elements} }}; }}\n}}\n")
    (listed,) = [it["set"] for it in nft.list_json("list set inet t s")["nftables"] if "set" in it]
    assert len(listed["elem"]) == 5000


def test_a_large_script_does_not_use_the_library_lock(ns: str) -> None:
    """Large scripts run in the ``nft`` program, so a network with 10,000 rules does not block other networks."""
    elements = ", ".join(f"10.{i >> 8}.{i & 255}.1" for i in range(15_000))
    with Nft(ns) as nft, ThreadPoolExecutor(1) as pool, library_lock:
        pool.submit(
            nft.run, f"table inet t {{\n set s {{ type ipv4_addr; elements = {{ {elements} }}; }}\n}}\n"
        ).result(120)
        assert len(pool.submit(nft.list_text, "list table inet t").result(120)) > 100_000


KILLED_ONCE = """#!/bin/sh
[ -e "$0.died" ] && exec /usr/sbin/nft "$@"
touch "$0.died"
kill -9 $$
"""


def test_a_table_is_recreated_only_when_the_script_is_rejected(
    ns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed ``nft`` (by the OOM killer, say) proves nothing about the table, so it keeps its counters."""
    hook = "type filter hook output priority 0; policy accept;"
    count = 'ip daddr 127.0.0.1 counter name "seen"'
    many = tuple(f"ip daddr 10.{at >> 8}.{at & 255}.1 tcp dport {at + 1} accept" for at in range(4000))
    have, want = (
        Ruleset(
            family="inet",
            table="netloom",
            chains=(Chain(name="out", hook=hook, rules=(count, *rules)),),
            counters=("seen",),
        )
        for rules in (many, many[1:])
    )

    def counted() -> int:
        with Nft(ns, use="library") as nft:
            (found,) = nft.list_json("list counters table inet netloom")["nftables"][1:]
            return int(found["counter"]["packets"])

    apply([LoadRuleset(ns, have)])
    tool(ns, "ping", "-c", "1", "-W", "5", "127.0.0.1")
    assert (packets := counted()) > 0
    (tmp_path / "nft").write_text(KILLED_ONCE)
    (tmp_path / "nft").chmod(0o755)
    monkeypatch.setitem(NFT_ENVIRONMENT, "PATH", f"{tmp_path}:{NFT_ENVIRONMENT['PATH']}")
    swap = LoadRuleset(ns, want, have, names(have))
    with pytest.raises(NftError, match="the program nft was killed by signal 9"):
        apply([swap])
    apply([swap])
    assert counted() == packets
    # After a manual removal of the counter and its rule the swap fails, and the table is recreated.
    tool(ns, "nft", "flush table inet netloom; delete counter inet netloom seen")
    other = msgspec.structs.replace(have, chains=(Chain(name="out", hook=hook, rules=many),), counters=())
    apply([LoadRuleset(ns, other, want, names(want))])
    with Nft(ns) as nft:
        assert other.marker in nft.list_text("list table inet netloom")


def test_listing_a_missing_table_is_an_error(nft: Nft) -> None:
    with pytest.raises(NftError, match="No such file or directory"):
        nft.list_json("list table inet nowhere")
    assert nft.list_json("list tables")["nftables"][1:] == []


def test_a_script_with_a_zero_byte_is_refused(nft: Nft) -> None:
    with pytest.raises(NftError, match="zero byte"):
        nft.run("add table inet t\n\0add table inet u\n")
    assert tables(nft) == set()


def test_threads_use_separate_or_shared_namespaces_safely() -> None:
    with scratch() as one, scratch() as two, Nft(one) as nft_one, Nft(two) as nft_two, ThreadPoolExecutor(8) as pool:

        def work(number: int) -> None:
            nft = (nft_one, nft_two)[number % 2]
            nft.run(f"add table inet t{number}\n")
            assert f"t{number}" in tables(nft)
            assert {int(name[1:]) % 2 for name in tables(nft)} == {number % 2}

        list(pool.map(work, range(60)))
        assert tables(nft_one) == {f"t{i}" for i in range(0, 60, 2)}
        assert tables(nft_two) == {f"t{i}" for i in range(1, 60, 2)}


def test_a_link_name_resolves_in_the_namespace_of_the_rule() -> None:
    """libnftables caches link indexes for all contexts and threads together, and a rule contains the index."""

    def work(nft: Nft, index: int) -> None:
        for _ in range(100):
            nft.run(f"{anew}table inet t {{\n chain c {{ iif same accept; }}\n}}\n")
            nft.run(f"{anew}table inet t {{\n chain c {{ meta iif . oif {{ same . same }} accept; }}\n}}\n")
            nft.run(f"{anew}table inet t {{\n chain c {{ iif {index} accept; }}\n chain d {{ iif same accept; }}\n}}\n")
            rules = [it["rule"]["expr"] for it in nft.list_json("list ruleset")["nftables"] if "rule" in it]
            assert rules[0] == rules[1]

    anew = "table inet t\ndelete table inet t\n"
    with scratch() as one, scratch() as two, Nft(one) as nft_one, Nft(two) as nft_two, ThreadPoolExecutor(2) as pool:
        links.change(one, [links.make_bridge("same")])
        links.change(two, [links.make_bridge("other"), links.make_bridge("same")])
        (first,), (second,) = (links.find_links(name, ["same"]) for name in (one, two))
        assert first.index != second.index
        for done in [pool.submit(work, nft_one, first.index), pool.submit(work, nft_two, second.index)]:
            done.result(120)


def test_a_recreated_namespace_of_the_same_name_is_detected() -> None:
    with scratch() as name, Nft(name) as nft:
        nft.run(TABLE)
        namespaces.delete(name)
        namespaces.create(name)
        with pytest.raises(NftError, match="was replaced by another since it was opened"):
            nft.run(TABLE)
        with Nft(name) as fresh:
            assert tables(fresh) == set()


def test_closing_releases_a_deleted_namespace_and_its_links(ns: str) -> None:
    with scratch() as inner:
        with namespaces.descriptor(inner) as fd:
            links.change(ns, [links.make_veth("here", "", "there", "", 0, fd)])
        with Nft(inner) as nft:
            nft.run(TABLE)
        namespaces.delete(inner)
    wait_until(lambda: links.find_links(ns, ["here"]) == [], seconds=60)  # the kernel removes one namespace at a time


def test_no_file_descriptor_leaks(ns: str) -> None:
    for use in ("library", "program"):
        before = descriptors()
        for _ in range(20):
            with Nft(ns, use=use) as nft:
                nft.check(TABLE)
                with pytest.raises(NftError):
                    nft.run("junk")
        assert descriptors() == before
        nft.close()
        if use == "library":
            with pytest.raises(NftError, match="after it was closed"):
                nft.run(TABLE)


WITHOUT_DESCRIPTORS = """
import os, resource, sys
from netloom.agent.kernel.nft import Nft, NftError
early = Nft(sys.argv[1], use="library")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/", os.O_RDONLY))
except OSError:
    pass
for _ in range(8):
    os.close(held.pop())
for attempt in (lambda: Nft(sys.argv[1], use="library"), lambda: early.run("add table inet t")):
    try:
        attempt()
    except NftError as error:
        print(error)
for fd in held:
    os.close(fd)
early.run("add table inet t")
print("alive")
"""


def test_a_lack_of_file_descriptors_is_an_error_and_no_exit(ns: str) -> None:
    """libnftables exits the process when it cannot open a socket (tried: exit status 3)."""
    assert load_library() is not None
    source = Path(netloom.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS, ns], capture_output=True, text=True, env=environment, timeout=60
    )
    words = "nftables: fewer than 16 file descriptors are free: Too many open files (raise LimitNOFILE)"
    assert (done.stdout.splitlines(), done.stderr) == ([words, words, "alive"], "")


WITH_MANY_DESCRIPTORS = """
import os, resource, sys
from netloom.agent.kernel.nft import Nft
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
for _ in range(1100):
    os.open("/", os.O_RDONLY)
with Nft(sys.argv[1]) as nft:
    nft.run("add table inet many")
print("alive")
"""


@pytest.mark.mutation("libnftables-gets-low-descriptors")
def test_a_process_with_more_than_a_thousand_descriptors_loads_rulesets(ns: str) -> None:
    """libnftables waits with select(2), and glibc aborts a process that passes a number above 1023 to it."""
    assert load_library() is not None
    environment = os.environ | {"PYTHONPATH": str(Path(netloom.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WITH_MANY_DESCRIPTORS, ns], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("alive\n", "", 0)
    assert "table inet many" in tool(ns, "nft", "list", "tables")
