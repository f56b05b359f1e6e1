"""Words that must not occur in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repo.files import ROOT, own_files

# Written in pieces, so that the test does not find this file.
ELSEWHERE = [
    "/wo" + "rk/",
    "/tmp/" + "v311",
    r"\.lib" + "rary/",
    r"\bsha" + r"red/(?:lab|payloads|[a-z-]+\.md)",
    r"\b(?:design|style|brief|field-notes|reference-notes|dataplane-notes|nuitka-notes|SEQUENCES|CLIENT-FACTS)"
    + r"\.md",
    "host" + "lab",
    "sub" + "-?agent",
    "(?:cla" + "ude|anth" + "ropic|chat" + "gpt|open" + "ai|lang" + "uage model)",
    r"\b(?:this|next|earlier|another|coding) ses" + r"sion\b",
]
REGISTRIES = [
    "py" + r"pi\.org",
    "python" + "hosted",
    "npm" + r"js\.",
    "deb" + r"ian\.org",
    "--(?:extra-)?index" + "-url [^ ]",
    "--find" + "-links ",
]

# Payloads are CloudStack's data and stay unchanged to the byte.
TEXTS = [path for path in own_files() if path.relative_to(ROOT).parts[:2] != ("tests", "payloads")]


def findings(pattern: str) -> list[str]:
    """Where the pattern occurs, as file:line."""
    wanted = re.compile(pattern, re.IGNORECASE)
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in TEXTS
        for number, line in enumerate(_text(path).splitlines(), 1)
        if wanted.search(line)
    ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_the_repository_speaks_of_the_project_alone(pattern: str) -> None:
    assert findings(pattern) == []


@pytest.mark.parametrize("pattern", REGISTRIES)
def test_no_package_registry_is_named(pattern: str) -> None:
    assert findings(pattern) == []


def test_no_test_is_skipped() -> None:
    """A skipped test proves nothing. Requirements of a test are installed, or its group refuses to start."""
    assert findings(r"pytest\.(?:mark\.)?(?:sk" + "ip|xf" + "ail|import" + "orskip)") == []
