"""The table of rules in docs/state.md is what fusedopt/rules declares."""

from __future__ import annotations

import re
from pathlib import Path

from harness import FUSED

PAGE = Path(__file__).parents[2] / "docs" / "state.md"


def table() -> str:
    lines = ["| optimizer | options of a group | states of a parameter |", "|---|---|---|"]
    for name, cls in sorted(FUSED.items()):
        rule = cls.rule
        assert rule.name == name
        options = ", ".join(f"`{key}`" for key in (*rule.number_keys, *rule.flag_keys))
        always = [f"`{state.name}`" for state in rule.states if state.when is None]
        others = [f"with `{s.when}` `{s.name}`" for s in rule.states if s.when is not None]
        states = ", ".join([*(["`step`", *always] if always else []), *others])
        if not always:
            states += " and `step`"
        lines.append(f"| `{cls.__name__}` | {options} | {states} |")
    return "\n".join(lines)


def test_the_table_is_that_of_the_declarations() -> None:
    (found,) = re.findall(r"<!-- rules -->\n(.*?)\n?<!-- /rules -->", PAGE.read_text(), re.DOTALL)
    assert found == table(), f"the table should be\n{table()}"
