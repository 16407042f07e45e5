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


def words_of(node: ast.expr) -> str:
    """The message, with an ellipsis for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words_of, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def raised(*files: str) -> Iterator[str]:
    """By the package's files of these names, or by all of it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if files and path.name not in files:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in CALLS:
                yield words_of(node.args[0])
