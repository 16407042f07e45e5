"""`python -m benchmarks fidelity` measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_helpers import read, row, write

pytest.importorskip("matplotlib")
from benchmarks import codecs_of_others, fidelity, fidelity_tables, plot, rows, traces, words

pytestmark = pytest.mark.usefixtures("restore_threads")
MODES = ["fusedopt_8bit", "fusedopt_remainder8", "linear_32"]


def test_quick_fidelity(cpu_backend: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    options = ["--quick", "--threads", "1", "--steps", "3", "--out", str(out)]
    assert fidelity.main([*options, "--modes", *MODES]) == 0
    found = read_deltas(out)
    cases = {f"fidelity-{name}" for name in (*traces.TRACES, "characters", "words")}
    assert {own["case"] for own in found} == cases
    assert {own["pipeline"] for own in found} == {fidelity.WIDE, *MODES}
    wide = [own for own in found if own["pipeline"] == fidelity.WIDE]
    assert {own["values"] for own in wide if own["figure"] == "loss_delta"} == {"0"}
    errors = [float(own["values"]) for own in wide if own["figure"] == "update_error"]
    assert len(errors) == len(traces.TRACES) and max(errors) < 1e-6


def read_deltas(out: Path) -> list[rows.Row]:
    """A delta may be below zero; the other rows are as all are."""
    found = rows.read(out)
    write(out, *(own for own in found if own["figure"] != "loss_delta"))
    return [*read(out), *(own for own in found if own["figure"] == "loss_delta")]


def test_the_defaults_are_the_studys() -> None:
    args = fidelity.parse([])
    assert args.steps == {"traces": 3000, "characters": 800, "words": 300}
    assert args.seeds == {"traces": 1, "characters": 4, "words": 3}
    assert args.elements == 16_384 and (words.LAYERS, words.WIDTH, words.ROWS) == (2, 128, 6000)


@pytest.mark.parametrize("name", codecs_of_others.FORMATS)
def test_formats_give_their_own_values_back(name: str) -> None:
    """What is read from memory is stored as it is; zero stays zero, and the largest is kept."""
    form = codecs_of_others.FORMATS[name]
    x = torch.randn(1000)
    for rounded, values in ((form.exp_avg, x), (form.exp_avg_sq, x.square())):
        once = rounded(values)
        assert once.shape == values.shape and not rounded(torch.zeros(77)).any()
        torch.testing.assert_close(rounded(once), once, rtol=2e-3, atol=0)
        torch.testing.assert_close(once.max(), values.max(), rtol=5e-3, atol=0)


def test_the_formats_step_is_adamws() -> None:
    """Without rounding; the largest update is told."""
    exact = codecs_of_others.Format("none", 4, torch.clone, torch.clone)
    ends = []
    for make in (lambda p: codecs_of_others.RoundedAdamW(
        p, exact, 1.0, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        param = torch.nn.Parameter(torch.ones(50))
        optimizer = make([param])
        for _ in range(5):
            param.grad = torch.randn(50, generator=generator)
            if isinstance(optimizer, torch.optim.AdamW):
                torch.nn.utils.clip_grad_norm_([param], 1.0)
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends)


def test_deltas_are_told_in_deviations_of_seeds(tmp_path: Path) -> None:
    case = {"case": "fidelity-words", "unit": "nats", "note": "9 steps", "reference": ""}
    found = [
        row("1 3", "", pipeline=fidelity.WIDE, figure="loss", **case),
        row("0 0", "", pipeline=fidelity.WIDE, figure="loss_delta", **case),
        row("1 2", "", pipeline="linear_32", figure="loss_delta", **case),
    ]
    for mode in (fidelity.WIDE, "linear_32"):
        for figure, values in (("largest_update", "3 40"), ("far_updates", "0 4"), ("bytes", "9")):
            found.append(row(values, "", pipeline=mode, figure=figure, **case))
    known = list(rows.figures(found).values())
    delta = fidelity_tables.deltas(known, "fidelity-words")["linear_32"]
    assert delta == pytest.approx((1.5, 0.5, 1.5 / 2**0.5, 0.5 / 2**0.5))
    table = fidelity_tables.trainings_table(known)
    assert "| linear, 32 | 9.00 | +1.5000 \u00b1 0.5000 | +1.06 \u00b1 0.35 | 40 | 4 |" in table
    path = write(tmp_path / "rows.csv", *found)
    assert plot.draw(plot.FIDELITY, plot.read_fidelity(path), tmp_path / "picture.png")
