"""The selftest tries every nftables feature that rulesets use."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from netloom.agent.setup import selftest
from netloom.agent.setup.selftest import Finding
from netloom.render import ruleset
from netloom.render.scope import render

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_selftest_uses_every_keyword_of_the_golden_rulesets() -> None:
    def words(text: str) -> set[str]:
        text = re.sub(r'"[^"]*"|#.*|\S*(?:[0-9]|::)\S*|@\S+', " ", text)
        return {word for line in text.splitlines() for word in re.findall(r"[a-z_]+", line) if not _names(line)}

    def _names(line: str) -> bool:
        return bool(re.match(r"\s*(?:chain|set|map|delete|add) ", line))

    tried = set()
    plain = selftest._isolated(), selftest._vpc()
    for scope in (*plain, *map(selftest._with_ip6, plain)):
        found = render(scope).ruleset
        assert found is not None
        tried |= words(ruleset.fresh(found))
    golden = {word for file in GOLDEN.glob("*/ruleset.nft") for word in words(file.read_text())}
    assert golden - tried == set()


REFUSED = Finding(
    what="networks and their rulesets", ok=False, needed=True, says="nftables: datatype mismatch: type ipv4_addr"
)


@pytest.mark.mutation("an-old-nft-is-named")
@pytest.mark.parametrize(
    ("nft", "linux", "says", "remedy"),
    [
        ((0, 9, 3), "5.4.0-216-generic", "nftables 0.9.3 is too old, the oldest that works is 0.9.8", "nftables 0.9.8"),
        ((1, 0, 4), "4.18.0-553.el8", "Linux 4.18.0-553.el8 is too old, the oldest that works is 5.10", "Linux 5.10"),
        ((0, 9, 8), "5.10.0-32-amd64", "nftables: datatype mismatch", ""),
        ((), "6.1.0", "nftables: datatype mismatch", ""),
    ],
)
def test_a_version_that_is_too_old_is_named_with_the_oldest_that_works(
    nft: tuple[int, ...], linux: str, says: str, remedy: str
) -> None:
    found = selftest.explained(REFUSED, nft, linux)
    assert says in found.says
    assert "datatype mismatch" in found.says
    assert remedy in found.remedy
    assert bool(remedy) == bool(found.remedy)


def test_a_module_that_the_kernel_lacks_is_named() -> None:
    line = "nftables: Could not process rule: No such file or directory: numgen random mod 64 != 0 accept"
    found = selftest.explained(msgspec.structs.replace(REFUSED, says=line), (1, 0, 6), "6.1.0")
    assert found.remedy == "load the module nft_numgen, or boot a kernel that has it"
    passed = msgspec.structs.replace(REFUSED, ok=True, says="")
    other = msgspec.structs.replace(REFUSED, what="veth links")
    assert [selftest.explained(it, (0, 9, 3), "4.18") for it in (passed, other)] == [passed, other]
