"""Every public module, class, function and method has a docstring."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FILES = sorted(path for top in ("verl", "recipe", "server") for path in (ROOT / top).rglob("*.py"))


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, node) of the public classes, functions and methods of a module."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from definitions([*node.body, *node.orelse], prefix)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}{node.name}.")


def without_docstring(source: str) -> list[str]:
    """What lacks a docstring; an empty file needs none."""
    tree = ast.parse(source)
    if not tree.body:
        return []
    named = [("the module", tree), *definitions(tree.body)]
    return [name for name, node in named if not (ast.get_docstring(node) or "").strip()]


def test_the_check_finds_what_is_missing():
    source = '''
class A:
    """."""
    def f(self): pass
    def _g(self): pass
    def __init__(self): pass
    class B: pass
async def h():
    def inner(): pass
def i():
    """."""
'''
    assert without_docstring(source) == ["the module", "A.f", "A.B", "h"]
    assert without_docstring("") == []


def test_there_are_files():
    assert len(FILES) > 20


def test_the_server_names_its_modules_and_imports_none_of_them():
    init = ROOT / "server" / "math" / "__init__.py"
    docstring, *rest = ast.parse(init.read_text()).body
    assert rest == []
    named = re.findall(r"^ {4}(\w+) |`(\w+)`", docstring.value.value, re.MULTILINE)
    assert sorted(a or b for a, b in named) == sorted(
        path.stem for path in init.parent.glob("[a-z]*.py")
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings(path):
    assert without_docstring(path.read_text()) == []
