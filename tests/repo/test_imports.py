"""Tests share helpers through modules that are no test modules, and use no private names of other modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from repo.files import ROOT

TESTS = ROOT / "tests"
MODULES = sorted(TESTS.rglob("*.py"))
OWN = {"netloom", *(path.stem if path.suffix else path.name for path in TESTS.iterdir())}

# Private names of the program that tests may use. Any other private name is an error, and so is a name in this list
# that no test uses any more.
PRIVATE = {
    "_Broken",
    "_Calls",
    "_FINISH",
    "_STEPS",
    "_ENVIRONMENT",
    "_Peer",
    "_TESTS",
    "_ask",
    "_attempt",
    "_connect",
    "_decode_acknowledgement",
    "_decode_any",
    "_isolated",
    "_library_lock",
    "_netfilter",
    "_nft",
    "_programs",
    "_restore_states",
    "_take_over",
    "_vpc",
    "_with_ip6",
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


def test_nothing_is_imported_from_a_test_module() -> None:
    found = {
        f"{path.relative_to(TESTS)}: {module}.{name}".rstrip(".")
        for path in MODULES
        for module, name, _ in imported(ast.parse(path.read_text()))
        for part in (*module.split("."), name)
        if part.startswith("test_") or part == "conftest"
    }
    assert found == set()


def test_private_names_stay_in_their_modules() -> None:
    found = {
        name: str(path.relative_to(TESTS)) for path in MODULES for name in private_names(ast.parse(path.read_text()))
    }
    assert {name: path for name, path in found.items() if name not in PRIVATE} == {}
    assert found.keys() >= PRIVATE
