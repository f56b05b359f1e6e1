"""What is installed is what was read: every package pinned, every file hashed."""

from __future__ import annotations

import re

import pytest

from repo.files import ROOT

REQUIREMENTS = ROOT / "build" / "requirements"
PINNED = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*( ; [^\\]+)?( --hash=sha256:[0-9a-f]{64})+")


def pins(name: str) -> dict[str, str]:
    """The packages of a requirement file, and the whole entry of each."""
    text = (REQUIREMENTS / name).read_text().replace("\\\n", "")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {line.split("==")[0]: line for line in lines}


@pytest.mark.parametrize("name", ["runtime.txt", "dev.txt", "build.txt", "release.txt", "docs.txt", "lock.txt"])
def test_every_requirement_is_pinned_and_hashed(name: str) -> None:
    entries = pins(name)
    assert entries
    assert [entry for entry in entries.values() if not PINNED.fullmatch(entry)] == []


def test_the_program_needs_few_packages() -> None:
    """rich and pydantic cost more at every start, and in the compiled file, than they give."""
    assert sorted(pins("runtime.txt")) == [
        "asyncssh",
        "cffi",
        "click",
        "cryptography",
        "h11",
        "msgspec",
        "pycparser",
        "typer-slim",
        "typing-extensions",
    ]


@pytest.mark.parametrize("name", ["dev.txt", "build.txt", "release.txt", "docs.txt"])
def test_all_use_the_same_versions_as_the_program(name: str) -> None:
    runtime, other = pins("runtime.txt"), pins(name)
    both = runtime.keys() & other.keys()
    assert {name: other[name] for name in both} == {name: runtime[name] for name in both}
