"""Rows of `report.FIGURE_COLUMNS` as the tests of their commands read them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

Rows = list[dict[str, str]]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Commands set the number of threads of this process; small models gain nothing by a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert int(row["samples"]) >= 1
        assert len(row["commit"]) == 40 or row["commit"] == "none"
    return rows


def medians(rows: Rows, figure: str) -> dict[tuple[str, str], float]:
    return {
        (row["case"], row["pipeline"]): float(row["p50"]) for row in rows if row["figure"] == figure
    }
