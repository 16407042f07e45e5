"""Tables of the optimizers' state: its names in docs/state.md, its bytes in the README."""

import re
from pathlib import Path

import pytest
import torch
from harness import FUSED

import fusedopt

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not here")


def rule_table():
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


def test_the_table_of_rules_is_that_of_the_declarations():
    page = (ROOT / "docs" / "state.md").read_text()
    (found,) = re.findall(r"<!-- rules -->\n(.*?)\n?<!-- /rules -->", page, re.DOTALL)
    assert found == rule_table(), f"the table should be\n{rule_table()}"


ROWS = {
    "fp32": (torch.float32, None),
    "fp16, bf16": (torch.bfloat16, None),
    "fp16, bf16, `master_weights=False`": (torch.bfloat16, False),
}
N = 1000


def state_bytes(make, dtype):
    param = torch.nn.Parameter(torch.ones(N, dtype=dtype))
    param.grad = torch.ones_like(param)
    opt = make([param])
    opt.step()
    sizes = {k: v.nbytes for k, v in opt.state[param].items() if k != "step"}
    return sum(sizes.values()) // N


def test_bytes_of_state():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("<!-- table: state bytes -->") :].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[3:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        found[name] = [int(re.sub(r"\D", "", cell)) for cell in cells]
    expected = {}
    for name, (dtype, masters) in ROWS.items():
        makers = (
            lambda p, m=masters: fusedopt.FusedAdamW(p, master_weights=m),
            lambda p, m=masters: fusedopt.FusedAdamW(p, amsgrad=True, master_weights=m),
            lambda p, m=masters: fusedopt.FusedSGD(p, momentum=0.9, master_weights=m),
            lambda p: torch.optim.AdamW(p),
        )
        expected[name] = [state_bytes(make, dtype) for make in makers]
    assert found == expected
