"""The Python of docs/distributed.md runs, block after block, on four ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_blocks(rank: int, blocks: list[str], folder: str) -> None:
    os.chdir(folder)
    torch.manual_seed(rank)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
        assert_norms_are_one(names["opt"])


def assert_norms_are_one(optimizer: object) -> None:
    norms: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(norms, float(optimizer.grad_norm))  # type: ignore[attr-defined]
    assert len({str(norm) for norm in norms}) == 1, norms


@pytest.mark.skipif(not PAGE.is_file(), reason="the documents are not here")
def test_the_blocks_of_the_page_run(tmp_path: Path) -> None:
    blocks = [code.replace('"cuda"', '"cpu"') for code in CODE.findall(PAGE.read_text())]
    assert len(blocks) >= 9
    ranks.run(4, run_blocks, blocks, str(tmp_path))
