"""The selftest tries every nftables feature that rulesets use."""

from __future__ import annotations

import re
from pathlib import Path

from netloom.agent.setup import selftest
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
