"""Test modules share helpers through lab modules with plain names, and use no private names of other modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from repo.files import ROOT

TESTS = ROOT / "tests"
MODULES = sorted(TESTS.rglob("*.py"))
OWN = {"netloom", *(path.stem if path.suffix else path.name for path in TESTS.iterdir())}

# Tests of internals that the program does not offer under a public name. A private name that is not listed here is an
# error, and so is a listed one that is used no more.
PRIVATE = {
    ("kernel/test_agent_selftest.py", "_TRIALS"),
    ("kernel/test_agent_selftest.py", "_family"),
    ("kernel/test_agent_selftest.py", "_isolated"),
    ("kernel/test_agent_selftest.py", "_programs"),
    ("kernel/test_agent_supervise.py", "_start_time"),
    ("kernel/test_kernel_netlink.py", "_ask"),
    ("kernel/test_kernel_nft.py", "_ENVIRONMENT"),
    ("kernel/test_kernel_nft.py", "_library_lock"),
    ("unit/test_agent_selftest.py", "_isolated"),
    ("unit/test_agent_selftest.py", "_vpc"),
    ("unit/test_agent_selftest.py", "_with_ip6"),
    ("unit/test_netlink_codec.py", "_decode_acknowledgement"),
    ("unit/test_netlink_codec.py", "_decode_any"),
}


def imported(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Every import: the module, the name taken from it (empty for ``import module``), and the name it has here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((it.name, "", it.asname or it.name.partition(".")[0]) for it in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", it.name, it.asname or it.name) for it in node.names)


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names of the project's own modules that are imported, or read as attributes of an imported name."""
    own = [(name, here) for module, name, here in imported(tree) if module.partition(".")[0] in OWN]
    here = {it for _, it in own}
    names = [name for name, _ in own]
    names += [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in here
    ]
    return (it for it in names if it.startswith("_") and not it.startswith("__"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_is_imported_from_a_test_module(path: Path) -> None:
    parts = {part for module, name, _ in imported(ast.parse(path.read_text())) for part in (*module.split("."), name)}
    assert [it for it in parts if it.startswith("test_") or it == "conftest"] == []


def test_private_names_stay_in_their_modules() -> None:
    found = {
        (str(path.relative_to(TESTS)), name) for path in MODULES for name in private_names(ast.parse(path.read_text()))
    }
    assert found == PRIVATE
