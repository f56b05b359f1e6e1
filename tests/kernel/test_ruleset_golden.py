"""nft accepts the golden rulesets, and the kernel lists them as they were written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from golden.rendered import load, scenarios
from kernel.ruleset_lab import run
from netloom.render.scope import render


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"rtest-{os.getpid()}-golden"
    run("ip", "netns", "add", name)
    yield name
    run("ip", "netns", "del", name)


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda it: it.name)
def test_nft_accepts_each_golden_ruleset(namespace: str, scenario: Path) -> None:
    text = (scenario / "ruleset.nft").read_text()
    nft = ["ip", "netns", "exec", namespace, "nft"]
    checked = subprocess.run([*nft, "--check", "-f", "-"], input=text, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    run(*nft, "-f", "-", stdin=text)
    want = render(load(scenario)).ruleset
    if want is not None:
        assert f"set {want.marker} {{" in run(*nft, "list", "table", "inet", "netloom")
        # Loading the listing gives the same ruleset, so the text is unambiguous.
        listed = run(*nft, "list", "table", "inet", "netloom")
        run(*nft, "-f", "-", stdin=f"delete table inet netloom\n{listed}")
        assert run(*nft, "list", "table", "inet", "netloom") == listed
