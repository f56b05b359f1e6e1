"""Mutation marks: guards that the source names, and tests that must fail without them.

A guard is named by a comment at the end of a line in ``internal/``, ``cmd/`` or ``build/``::

    if not packet_is_ours(packet):  # guard: foreign-packets
        return

A test names the guard: ``@pytest.mark.mutation("foreign-packets")``. The mutation removes the syntax node that has the
comment. The node is found in the syntax tree, so its file, its formatting and the names in it may change.

The node is the largest one that begins with the first word of the line. A leading ``and``, ``or``, ``|``, ``if``,
``else``, ``for``, ``**``, ``@`` or parenthesis is passed over if no node begins with it. Where the operands of an
operator are on several lines, the node of the first line is the first operand, not all of them. If the line begins
with a closing bracket, the node is the statement whose head ends there, or else the largest node that ends there.

=================================================================  ==================================================
node                                                               without ``instead``
=================================================================  ==================================================
simple statement                                                   becomes ``pass``
``if``, ``elif`` or ``while`` line                                 its condition becomes ``False``
``for`` line (of a statement or a comprehension)                   goes over nothing: ``()``
``except`` line                                                    the exception goes on: its body becomes ``raise``
decorator                                                          removed
element of a list, tuple, set or dict; argument of a call          removed
operand of ``and`` or ``or``                                       removed
condition of a comprehension                                       removed
any other expression                                               needs ``instead``
=================================================================  ==================================================

Where a removal makes no sense, the mark has ``instead="<expression>"``. It replaces the value of the node: what is
assigned, returned, yielded or raised, what a statement evaluates, the condition of ``if`` and ``while``, what ``for``
goes over, the value of a keyword argument or of a dict item, or the expression itself.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GUARDED = ("internal", "cmd", "build")

_GUARD = re.compile(r"(?:^|\s)# guard: ([a-z0-9]+(?:-[a-z0-9]+)*)$")
_PASSED_OVER = ("and", "or", "if", "else", "for", "async", "**", "|", "@", "(")
_PLACED = ast.stmt | ast.expr | ast.keyword | ast.ExceptHandler | ast.arg
_NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
_REMOVABLE = {
    ("List", "elts"),
    ("Tuple", "elts"),
    ("Set", "elts"),
    ("Call", "args"),
    ("Call", "keywords"),
    ("BoolOp", "values"),
    ("comprehension", "ifs"),
    ("FunctionDef", "decorator_list"),
    ("AsyncFunctionDef", "decorator_list"),
    ("ClassDef", "decorator_list"),
}
# Placeholder for a removed node in a list until all nodes are changed, so that the positions of the others stay valid.
_GONE = ast.Constant(value=None)


class Mutation(NamedTuple):
    """One guard, and the expression that replaces it; None: the guard is removed."""

    guard: str
    instead: str | None = None


class Mutant(NamedTuple):
    """The mutations that are applied together, and the test that must then fail."""

    test: str  # "tests/unit/test_a.py::test_b"
    mutations: list[Mutation]


class NoNode(Exception):
    """No guard has the name, no node has the comment, or the node cannot be changed as the mark demands."""


class _Slot(NamedTuple):
    """A node, and its place in its parent. ``position`` is None where the field is no list."""

    parent: ast.AST
    field: str
    position: int | None
    node: ast.AST


def mutants() -> Iterator[Mutant]:
    """Every test with a mutation mark. Several marks on one test are applied together."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text()
        if "mark.mutation(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                marks = [
                    _mutation(mark)
                    for mark in node.decorator_list
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.mutation"
                ]
                if marks:
                    yield Mutant(f"{path.relative_to(ROOT)}::{node.name}", marks)


def _mutation(mark: ast.Call) -> Mutation:
    return Mutation(
        *map(ast.literal_eval, mark.args), **{str(it.arg): ast.literal_eval(it.value) for it in mark.keywords}
    )


@functools.cache
def guards() -> tuple[tuple[str, Path], ...]:
    """Every guard comment: its name, and its file relative to the root."""
    found: list[tuple[str, Path]] = []
    for folder in GUARDED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text()
            if "# guard:" in source:
                found += [(name, path.relative_to(ROOT)) for name, _ in _named(source)]
    return tuple(found)


def mutated(mutations: Sequence[Mutation]) -> dict[Path, str]:
    """The files that change, relative to the root, with all mutations of one test. Raises NoNode."""
    files = dict(guards())
    if unknown := [it.guard for it in mutations if it.guard not in files]:
        raise NoNode(f"no comment names {unknown}")
    return {
        path: mutate((ROOT / path).read_text(), [it for it in mutations if files[it.guard] == path])
        for path in {files[it.guard] for it in mutations}
    }


def mutate(source: str, mutations: Sequence[Mutation]) -> str:
    """The program text after the mutations, without its comments. Raises NoNode."""
    tree = ast.parse(source)
    # All nodes are found before the first of them changes.
    slots = [_slot(source, tree, it.guard) for it in mutations]
    for slot, (guard, instead) in zip(slots, mutations, strict=True):
        if instead is None:
            _remove(slot, guard)
        else:
            _replace(slot, ast.parse(instead, mode="eval").body, guard)
    _leave_out_what_was_removed(tree)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


@functools.cache
def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def _named(source: str) -> list[tuple[str, int]]:
    """The guards that comments of the source name, each with its line."""
    comments = (it for it in _tokens(source) if it.type == tokenize.COMMENT)
    return [(match[1], it.start[0]) for it in comments if (match := _GUARD.search(it.string))]


def _slot(source: str, tree: ast.AST, guard: str) -> _Slot:
    """The node that has the guard's comment. Raises NoNode."""
    rows = [row for name, row in _named(source) if name == guard]
    if len(rows) != 1:
        raise NoNode(f"{guard}: {len(rows)} comments name this guard")
    row = rows[0]
    line = source.split("\n")[row - 1]
    code = [it for it in _tokens(source) if it.type not in _NOT_CODE and it.start[0] == it.end[0] == row]
    slots = list(_slots(tree))
    if code and code[0].string in (")", "]", "}"):
        last = next((it for it in reversed(code) if it.string != ","), code[0])
        found = _headed(slots, row) if last.string == ":" else _ended(slots, (row, len(line[: last.end[1]].encode())))
        if found is not None:
            return found
    for token in code:
        at = (row, len(line[: token.start[1]].encode()))
        for slot in slots:
            if _start(slot.node) == at and not _continued(slot.node):
                return slot
        if token.string not in _PASSED_OVER:
            break
    raise NoNode(f"{guard}: line {row} has no node that could be changed")


def _slots(tree: ast.AST) -> Iterator[_Slot]:
    """Every node but the root; a node comes before those in it."""
    for field, value in ast.iter_fields(tree):
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for position, child in children:
            if isinstance(child, ast.AST):
                yield _Slot(tree, field, position, child)
                yield from _slots(child)


def _start(node: ast.AST) -> tuple[int, int] | None:
    if isinstance(node, ast.comprehension):
        return _start(node.target)
    return (node.lineno, node.col_offset) if isinstance(node, _PLACED) else None


def _continued(node: ast.AST) -> bool:
    """Whether the node is an operator whose second operand starts on a later line than the first one ends."""
    match node:
        case ast.BoolOp(values=[first, second, *_]):
            return _apart(first, second)
        case ast.BinOp(left=first, right=second) | ast.Compare(left=first, comparators=[second, *_]):
            return _apart(first, second)
        case ast.IfExp(body=first, test=second):
            return _apart(first, second)
    return False


def _apart(first: ast.expr, second: ast.expr) -> bool:
    return first.end_lineno is not None and first.end_lineno < second.lineno


def _headed(slots: list[_Slot], row: int) -> _Slot | None:
    """The compound statement whose head contains this line and starts on an earlier one."""
    for slot in slots:
        body = getattr(slot.node, "body", None)
        if isinstance(slot.node, ast.stmt) and body and slot.node.lineno < row < body[0].lineno:
            return slot
    return None


def _ended(slots: list[_Slot], at: tuple[int, int]) -> _Slot | None:
    """The largest node that ends there, but no compound statement: that ends with its last inner statement."""
    for slot in slots:
        node = slot.node
        compound = isinstance(getattr(node, "body", None), list)
        if not compound and (getattr(node, "end_lineno", None), getattr(node, "end_col_offset", None)) == at:
            return slot
    return None


def _remove(slot: _Slot, guard: str) -> None:
    parent, node = slot.parent, slot.node
    siblings: list[ast.AST | None] = getattr(parent, slot.field) if slot.position is not None else []
    match node:
        case ast.If() | ast.While():
            node.test = ast.Constant(value=False)
        case ast.For() | ast.AsyncFor() | ast.comprehension():
            node.iter = ast.Tuple(elts=[], ctx=ast.Load())
        case ast.ExceptHandler():
            node.body = [ast.Raise()]
        case _ if slot.field == "test" and isinstance(parent, ast.IfExp):
            parent.test = ast.Constant(value=False)
        case ast.stmt() if slot.position is not None and not hasattr(node, "body"):
            siblings[slot.position] = ast.Pass()
        case _ if isinstance(parent, ast.Dict) and slot.position is not None:
            # Both lists must keep the same length.
            parent.keys[slot.position] = _GONE
            parent.values[slot.position] = _GONE
        case _ if slot.position is not None and (type(parent).__name__, slot.field) in _REMOVABLE:
            siblings[slot.position] = _GONE
        case _:
            raise NoNode(f"{guard}: {ast.unparse(node)!r} cannot be removed; the mark needs instead=...")


def _leave_out_what_was_removed(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and any(it is _GONE for it in value):
                setattr(node, field, [it for it in value if it is not _GONE])
                if isinstance(node, ast.BoolOp) and not node.values:
                    raise NoNode("every operand of an expression is removed")


def _replace(slot: _Slot, instead: ast.expr, guard: str) -> None:
    parent, node = slot.parent, slot.node
    match node:
        case ast.If() | ast.While():
            node.test = instead
        case ast.For() | ast.AsyncFor() | ast.comprehension():
            node.iter = instead
        case ast.Expr(value=ast.Yield() as yielding):
            yielding.value = instead
        case ast.Raise():
            node.exc = instead
        case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Return() | ast.Expr() | ast.keyword():
            node.value = instead
        case _ if isinstance(parent, ast.Dict) and slot.position is not None:
            parent.values[slot.position] = instead
        case _ if isinstance(parent, ast.DictComp):
            parent.value = instead
        case ast.expr() if slot.position is not None:
            getattr(parent, slot.field)[slot.position] = instead
        case ast.expr():
            setattr(parent, slot.field, instead)
        case _:
            raise NoNode(f"{guard}: this node has no value that could be replaced: {ast.unparse(node)[:80]!r}")
