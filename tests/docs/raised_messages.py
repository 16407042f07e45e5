"""What the package raises and warns of, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fusedopt

PACKAGE = Path(fusedopt.__file__).parent
CALLS = {
    *("ValueError", "TypeError", "RuntimeError", "KeyError", "ImportError", "warnings.warn"),
    "error",  # where the type is an argument
}


def words_of(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """The message, with an ellipsis for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(value, constants) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words_of(node.left, constants) + words_of(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return words_of(constants[node.id], {})
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def raised(*files: str) -> Iterator[str]:
    """By the package's files of these names, or by all of it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if files and path.name not in files:
            continue
        tree = ast.parse(path.read_text())
        assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
        constants = {ast.unparse(node.targets[0]): node.value for node in assigned}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in CALLS:
                what = node.args[0]
                either = [what.body, what.orelse] if isinstance(what, ast.IfExp) else [what]
                yield from (words_of(each, constants) for each in either)
