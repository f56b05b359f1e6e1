"""How a mutation finds the node of a guard comment and changes it: one row for each kind of node."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from mutants.marks import Mutation, NoNode, mutate

REMOVED = {
    "statement": ("call()  # guard: g\nafter()", "pass\nafter()"),
    "assignment": ("x = call(  # guard: g\n    1,\n    2,\n)", "pass"),
    "assignment by its last line": ("x = call(\n    1,\n    2,\n)  # guard: g", "pass"),
    "field of a class": ("class A:\n    x: int  # guard: g\n    y: int", "class A:\n    pass\n    y: int"),
    "raise": ("if x:\n    raise A(\n        b\n    )  # guard: g", "if x:\n    pass"),
    "yield": ("def f():\n    yield 1  # guard: g", "def f():\n    pass"),
    "after another comment": ("call()  # noqa: X1  # guard: g", "pass"),
    "after a wide character": ("f(\n    'ä', b,  # guard: other\n    'ö',  # guard: g\n)", "f('ä', b)"),
    "if": ("if x:  # guard: g\n    y()", "if False:\n    y()"),
    "if on several lines, first line": ("if (  # guard: g\n    x\n    or y\n):\n    z()", "if False:\n    z()"),
    "if on several lines, last line": ("if (\n    x\n    or y\n):  # guard: g\n    z()", "if False:\n    z()"),
    "elif": ("if x:\n    y()\nelif z:  # guard: g\n    y()", "if x:\n    y()\nelif False:\n    y()"),
    "while": ("while x:  # guard: g\n    y()", "while False:\n    y()"),
    "for": ("for x in y:  # guard: g\n    z()", "for x in ():\n    z()"),
    "async for": (
        "async def f():\n    async for x in y:  # guard: g\n        z()",
        "async def f():\n    async for x in ():\n        z()",
    ),
    "except": (
        "try:\n    x()\nexcept A as error:  # guard: g\n    y()",
        "try:\n    x()\nexcept A as error:\n    raise",
    ),
    "decorator": ("@a\n@b(1)  # guard: g\ndef f(): ...", "@a\ndef f(): ..."),
    "element of a list": ("x = [\n    a,  # guard: g\n    b,\n]", "x = [b]"),
    "element of a tuple": ("x = (\n    a,\n    b,  # guard: g\n)", "x = (a,)"),
    "element of a set": ("x = {\n    a,\n    b,  # guard: g\n}", "x = {a}"),
    "starred element": ("x = [\n    *a,  # guard: g\n    b,\n]", "x = [b]"),
    "the only element": ("x = [\n    a,  # guard: g\n]", "x = []"),
    "element on several lines, first line": ("x = [\n    f(  # guard: g\n        a\n    ),\n    b,\n]", "x = [b]"),
    "element on several lines, last line": ("x = [\n    f(\n        a\n    ),  # guard: g\n    b,\n]", "x = [b]"),
    "element that is an operator": ("x = [\n    a or b,  # guard: g\n    c,\n]", "x = [c]"),
    "item of a dict": ("x = {\n    a: b,  # guard: g\n    c: d,\n}", "x = {c: d}"),
    "dict in a dict": ("x = {\n    **a,  # guard: g\n    c: d,\n}", "x = {c: d}"),
    "argument": ("f(\n    a,  # guard: g\n    b,\n)", "f(b)"),
    "starred argument": ("f(\n    a,\n    *b,  # guard: g\n)", "f(a)"),
    "keyword argument": ("f(\n    a,\n    b=c,  # guard: g\n)", "f(a)"),
    "keyword arguments": ("f(\n    a,\n    **b,  # guard: g\n)", "f(a)"),
    "first operand": ("x = (\n    a  # guard: g\n    and b\n    and c\n)", "x = b and c"),
    "later operand": ("if (\n    a\n    or b  # guard: g\n):\n    y()", "if a:\n    y()"),
    "operand in parentheses": ("x = (\n    a\n    or (b and c)  # guard: g\n    or d\n)", "x = a or d"),
    "operand of an inner operator": (
        "x = (\n    a\n    and (\n        b  # guard: g\n        or c\n    )\n)",
        "x = a and c",
    ),
    "negated operand": ("x = (\n    a\n    and not b  # guard: g\n)", "x = a"),
    "condition of a comprehension": (
        "x = [\n    a\n    for a in b\n    if a or c  # guard: g\n]",
        "x = [a for a in b]",
    ),
    "operand of a comprehension's condition": (
        "x = [\n    a\n    for a in b\n    if c  # guard: g\n    or d\n]",
        "x = [a for a in b if d]",
    ),
    "for of a comprehension": ("x = [\n    a\n    for a in b  # guard: g\n]", "x = [a for a in ()]"),
    "condition of a conditional expression": (
        "x = (\n    a\n    if b  # guard: g\n    else c\n)",
        "x = a if False else c",
    ),
}

REPLACED = {
    "assignment": ("x = 1  # guard: g", "x = new"),
    "annotated assignment": ("x: int = 1  # guard: g", "x: int = new"),
    "annotation alone": ("x: int  # guard: g", "x: int = new"),
    "augmented assignment": ("x += 1  # guard: g", "x += new"),
    "return": ("def f():\n    return g(  # guard: g\n        1\n    )", "def f():\n    return new"),
    "yield": ("def f():\n    yield 1  # guard: g", "def f():\n    yield new"),
    "raise": ("raise A  # guard: g", "raise new"),
    "expression as a statement": ("call()  # guard: g", "new"),
    "if": ("if x:  # guard: g\n    y()", "if new:\n    y()"),
    "while": ("while x:  # guard: g\n    y()", "while new:\n    y()"),
    "for": ("for x in y:  # guard: g\n    z()", "for x in new:\n    z()"),
    "element": ("x = [\n    a,  # guard: g\n    b,\n]", "x = [new, b]"),
    "item of a dict": ("x = {\n    a: b,  # guard: g\n}", "x = {a: new}"),
    "keyword argument": ("f(\n    a=b,  # guard: g\n)", "f(a=new)"),
    "operand": ("x = (\n    a\n    or b  # guard: g\n)", "x = a or new"),
    "value in parentheses": ("x = (\n    a  # guard: g\n)", "x = new"),
    "element of a comprehension": ("x = [\n    a  # guard: g\n    for a in b\n]", "x = [new for a in b]"),
    "item of a dict comprehension": ("x = {\n    a: 1  # guard: g\n    for a in b\n}", "x = {a: new for a in b}"),
    "for of a comprehension": ("x = [\n    a\n    for a in b  # guard: g\n]", "x = [a for a in new]"),
    "condition of a comprehension": (
        "x = [\n    a\n    for a in b\n    if a  # guard: g\n]",
        "x = [a for a in b if new]",
    ),
    "first value of a conditional expression": (
        "x = (\n    a  # guard: g\n    if b\n    else c\n)",
        "x = new if b else c",
    ),
    "last value of a conditional expression": (
        "x = (\n    a\n    if b\n    else c  # guard: g\n)",
        "x = a if b else new",
    ),
    "operand of another operator": ("x = (\n    a\n    | b  # guard: g\n)", "x = a | new"),
}

REFUSED = {
    "no comment": "call()",
    "another comment": "call()  # guard: h",
    "text that is no comment": "x = '# guard: g'",
    "two comments": "x()  # guard: g\ny()  # guard: g",
    "line of its own": "# guard: g\ncall()",
    "else": "if x:\n    y()\nelse:  # guard: g\n    z()",
    "try": "try:  # guard: g\n    y()\nfinally:\n    z()",
    "function": "def f():  # guard: g\n    y()",
    "class": "class A:  # guard: g\n    y = 1",
    "with": "with (\n    x,\n):  # guard: g\n    y()",
    "inside a string": "x = '''\na\n''' + f(b)  # guard: g",
    "parameter": "def f(\n    a,  # guard: g\n): ...",
    "element of a comprehension": "x = [\n    a  # guard: g\n    for a in b\n]",
    "value in parentheses": "x = (\n    a  # guard: g\n)",
}


def _same(one: str, other: str) -> bool:
    return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


@pytest.mark.parametrize(("source", "left"), REMOVED.values(), ids=REMOVED)
def test_a_guard_is_removed(source: str, left: str) -> None:
    changed = mutate(source, [Mutation("g")])
    assert _same(changed, left), changed


@pytest.mark.parametrize(("source", "left"), REPLACED.values(), ids=REPLACED)
def test_the_value_of_a_guard_is_replaced(source: str, left: str) -> None:
    changed = mutate(source, [Mutation("g", "new")])
    assert _same(changed, left), changed


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_an_impossible_mutation_is_refused(source: str) -> None:
    with pytest.raises(NoNode):
        mutate(source, [Mutation("g")])


def test_several_mutations_of_a_file_are_applied_together() -> None:
    source = """
        x = f(
            a,  # guard: first
            b,
            c,  # guard: third
        )
        y = 1  # guard: y
    """
    changed = mutate(dedent(source), [Mutation("third"), Mutation("y", "2"), Mutation("first")])
    assert _same(changed, "x = f(b)\ny = 2")


def test_an_expression_that_loses_all_operands_is_refused() -> None:
    source = "x = (\n    a  # guard: a\n    or b  # guard: b\n)"
    with pytest.raises(NoNode):
        mutate(source, [Mutation("a"), Mutation("b")])


def test_formatting_does_not_matter() -> None:
    one = "x = f(a, g(b), c)  # guard: g"
    other = "x = f(\n    a,\n    g(b),\n    c,\n)  # guard: g"
    assert mutate(one, [Mutation("g", "1")]) == mutate(other, [Mutation("g", "1")])
