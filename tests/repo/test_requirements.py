"""The requirement files pin every package to a version and every file to a hash."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from package.carried import LEFT_OUT, canonical
from repo.files import ROOT

REQUIREMENTS = ROOT / "build" / "requirements"
PINNED = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*( ; [^\\]+)?( --hash=sha256:[0-9a-f]{64})+")


def pins(name: str) -> dict[str, str]:
    """The whole entry of each package in a requirement file, by its name."""
    text = (REQUIREMENTS / name).read_text().replace("\\\n", "")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {line.split("==")[0]: line for line in lines}


@pytest.mark.parametrize("name", ["runtime", "dev", "build", "release", "docs", "fuzz", "bench", "lock"])
def test_every_requirement_is_pinned_and_hashed(name: str) -> None:
    entries = pins(f"{name}.txt")
    assert entries
    assert [entry for entry in entries.values() if not PINNED.fullmatch(entry)] == []


def test_the_runtime_packages_are_exactly_these() -> None:
    """pydantic is left out because it slows every start and enlarges the one file. rich is not in the one file."""
    assert sorted(pins("runtime.txt")) == [
        "annotated-doc",
        "asyncssh",
        "cffi",
        "cryptography",
        "h11",
        "markdown-it-py",
        "mdurl",
        "msgspec",
        "pycparser",
        "pygments",
        "rich",
        "shellingham",
        "typer",
        "typing-extensions",
    ]


def test_the_one_file_and_its_bill_omit_the_same_packages() -> None:
    modules = {"markdown-it-py": "markdown_it"}
    build = (ROOT / "build" / "nuitka" / "build").read_text()
    listed = set(re.findall(r'^left_out="([^"]+)"', build, re.MULTILINE)[0].split())
    assert {modules.get(name, name) for name in LEFT_OUT} <= listed
    assert "pydantic" in listed
    kept = {canonical(name) for name in pins("runtime.txt").keys() - LEFT_OUT}
    assert kept & {canonical(name) for name in listed} <= {"cffi"}  # only the C module of cffi is used


@pytest.mark.parametrize("name", ["dev.txt", "build.txt", "release.txt", "docs.txt"])
def test_every_list_pins_the_runtime_versions(name: str) -> None:
    runtime, other = pins("runtime.txt"), pins(name)
    both = runtime.keys() & other.keys()
    assert {name: other[name] for name in both} == {name: runtime[name] for name in both}


def asked_for() -> dict[str, list[Requirement]]:
    """The requirements in pyproject.toml, by the name of the list that pins them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = {"runtime": project["project"]["dependencies"], **project["dependency-groups"]}
    return {name: list(map(Requirement, lines)) for name, lines in groups.items()}


ASKED_FOR = asked_for()


def test_each_list_is_made_from_pyproject() -> None:
    assert {path.stem for path in REQUIREMENTS.iterdir()} == ASKED_FOR.keys()
    assert {path.suffix for path in REQUIREMENTS.iterdir()} == {".txt"}


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_list_satisfies_pyproject(name: str) -> None:
    """Each version is allowed by pyproject.toml, and each package is a direct or indirect requirement of it."""
    pinned = {name: re.match(r"\S+==(\S+)", entry) for name, entry in pins(f"{name}.txt").items()}
    for wanted in ASKED_FOR[name]:
        found = pinned[canonical(wanted.name)]
        assert found is not None
        assert wanted.specifier.contains(found[1]), wanted
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    entries = re.findall(r"^([a-z0-9._-]+)==(?:.*\n)(?: .*\n)*", text + "\n", re.MULTILINE)
    assert entries == list(pinned)
    named = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    direct = {part.partition("==")[0] for part in named if f"pyproject.toml ({name})" in part}
    assert direct == {canonical(it.name) for it in ASKED_FOR[name]}


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_list_names_no_registry(name: str) -> None:
    assert re.findall(r"https?:|--\w*index|--find-links|--trusted", (REQUIREMENTS / f"{name}.txt").read_text()) == []


def test_the_build_back_end_is_pinned_for_development() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (wanted,) = map(Requirement, project["build-system"]["requires"])
    assert wanted in ASKED_FOR["dev"]
