"""What the rows of `python -m benchmarks fidelity` say: two tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from benchmarks.fidelity import MODES, WIDE
from benchmarks.rows import Figure, markdown
from benchmarks.traces import TRACES

TRAININGS = {"fidelity-characters": "characters", "fidelity-words": "words"}
COLOURS = {"ours": "#d1495b", "others": "#1f5f8b"}
MARKS = "osD^v<>P"  # of the modes of each colour


class Delta(NamedTuple):
    """Of the loss that a mode adds on text that was held out, in nats, over paired seeds."""

    mean: float
    error: float  # standard error of the mean
    in_seeds: float  # the mean, in standard deviations of fp32's loss over seeds
    error_in_seeds: float


def cells(known: Sequence[Figure], figure: str) -> dict[tuple[str, str], Figure]:
    """By case and pipeline."""
    return {(f["case"], f["pipeline"]): f for f in known if f["figure"] == figure}


def delta_of(delta: Figure, wide: Figure) -> Delta:
    own, n = delta.samples(), len(delta.samples())
    losses = wide.samples()
    mean = float(own.mean())
    error = float(own.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    sd = float(losses.std(ddof=1)) if len(losses) > 1 else float("nan")
    return Delta(mean, error, mean / sd, error / sd)


def deltas(known: Sequence[Figure], case: str) -> dict[str, Delta]:
    """By mode."""
    found, losses = cells(known, "loss_delta"), cells(known, "loss")
    return {
        mode: delta_of(found[case, mode], losses[case, WIDE])
        for mode in MODES
        if (case, mode) in found
    }


def traces_table(known: Sequence[Figure]) -> str:
    """The error of the update, and in brackets the largest one."""
    errors, largest = cells(known, "update_error"), cells(known, "largest_update")
    names = [name for name in TRACES if (f"fidelity-{name}", WIDE) in errors]
    if not names:
        return ""
    lines = [
        (MODES[mode].label, *(_cell(errors, largest, f"fidelity-{name}", mode) for name in names))
        for mode in MODES
        if any((f"fidelity-{name}", mode) in errors for name in names)
    ]
    note = errors[f"fidelity-{names[0]}", WIDE]["note"]
    header = ("states", *(name.replace("_", " ") for name in names))
    return f"*{note}.*\n\n{markdown(header, lines)}"


def _cell(errors: Any, largest: Any, case: str, mode: str) -> str:
    if (case, mode) not in errors:
        return "\u2013"
    return f"{short(errors[case, mode].median())} ({short(largest[case, mode].samples().max())})"


def short(value: float) -> str:
    """Two digits that count."""
    rounded = float(f"{value:.2g}")
    return (
        f"{rounded:,.0f}" if rounded >= 100 else "< 0.0001" if 0 < value < 1e-4 else f"{rounded:g}"
    )


def trainings_table(known: Sequence[Figure]) -> str:
    largest, far, n_bytes = (cells(known, f) for f in ("largest_update", "far_updates", "bytes"))
    lines, notes = [], []
    for case, name in TRAININGS.items():
        for number, (mode, found) in enumerate(deltas(known, case).items()):
            lines.append((
                "" if number else name, MODES[mode].label,
                f"{n_bytes[case, mode].median():.2f}",
                f"{found.mean:+.4f} \u00b1 {found.error:.4f}",
                f"{found.in_seeds:+.2f} \u00b1 {found.error_in_seeds:.2f}",
                short(largest[case, mode].samples().max()),
                f"{far[case, mode].samples().sum():.0f}",
            ))  # fmt: skip
            if not number:
                notes.append(f"{name}: {largest[case, mode]['note']}")
    if not lines:
        return ""
    header = ("model", "stored as", "bytes", "loss added, nats", "in sd of seeds",
              "largest update, lr", "updates over 10 lr, all seeds")  # fmt: skip
    return f"*{'; '.join(notes)}; means and standard errors.*\n\n{markdown(header, lines)}"


def picture(known: Sequence[Figure]) -> tuple[Any, object]:
    """What a mode adds to the loss, against its bytes a parameter."""
    n_bytes = cells(known, "bytes")
    cases = [case for case in TRAININGS if deltas(known, case)]
    figure = matplotlib.figure.Figure(figsize=(9.0, 1.5 + 2.4 * len(cases)), layout="constrained")
    said: list[object] = []
    own = [mode for mode in MODES if mode.startswith("fusedopt")]
    marks = {m: MARKS[(own.index(m) if m in own else list(MODES).index(m) - len(own))]
             for m in MODES}  # fmt: skip
    shown: dict[str, Any] = {}
    for axes, case in zip(np.atleast_1d(figure.subplots(len(cases), 1)), cases, strict=True):
        for mode, found in deltas(known, case).items():
            size = n_bytes[case, mode].median()
            said.append((case, mode, size, found.in_seeds, found.error_in_seeds))
            colour = COLOURS["ours" if mode.startswith("fusedopt") else "others"]
            beside = 0.03 * (MARKS.index(marks[mode]) - 4)  # several have the same bytes
            shown[mode] = axes.errorbar(size + beside, found.in_seeds, found.error_in_seeds,
                                        color=colour, marker=marks[mode], markersize=6, capsize=3,
                                        linestyle="none", label=MODES[mode].label)  # fmt: skip
        axes.axhline(0.0, color="#222222", linewidth=0.8)
        axes.set(xlabel="bytes a parameter, with its gradient", ylabel="loss added, sd of seeds")
        axes.set_title(TRAININGS[case], loc="left", fontsize=11)
    figure.legend(handles=[*shown.values()], loc="outside right upper", fontsize=8)
    return figure, said


def caption(known: Sequence[Figure]) -> str:
    first = next(f for f in known if f["case"] in TRAININGS)
    notes = "; ".join(
        f"{name}: {next(f['note'] for f in known if f['case'] == case)}"
        for case, name in TRAININGS.items()
        if any(f["case"] == case for f in known)
    )
    commit = first["commit"][:7]
    return f"{notes}; commit {commit}; python -m benchmarks fidelity"
