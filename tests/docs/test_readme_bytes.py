"""The README's table of the state's bytes, against what the optimizers allocate."""

import re
from pathlib import Path

import pytest
import torch

import fusedopt

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="the documents are not here")

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
    text = README.read_text()
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
