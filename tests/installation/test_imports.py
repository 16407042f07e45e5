"""No module of the package imports one that imports it, by whatever way."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import fusedopt

PACKAGE = Path(fusedopt.__file__).parent


def modules() -> dict[str, Path]:
    """By dotted name; a package's is that of its folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("fusedopt", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What the file imports anywhere: at its head, inside of functions, under TYPE_CHECKING."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(above if node.level else ()), *([node.module] if node.module else ())]
            base = ".".join(parts)
            for alias in node.names:
                module = f"{base}.{alias.name}"
                yield module if module in known else base


def test_there_is_no_circle_of_imports() -> None:
    """Of import statements; what is imported by a name that is worked out is not seen."""
    known = modules()
    graph = {name: known.keys() & {*imported(name, path, known)} for name, path in known.items()}
    assert "fusedopt.optimizer" in graph["fusedopt.adamw"]
    assert "fusedopt.checkpoint" in graph["fusedopt.optimizer"], "from . import a module"
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the modules of a circle
