"""What got slower between two sets of rows, beyond the noise of either.

OLD and NEW are each a CSV of benchmarks/results or a commit (a prefix of at least seven digits)
whose rows stand there. A figure is the speed against a reference that was timed in the same run,
so that a slower machine is not taken for a slower program; rows without one are left out, and
rows of different machines are never compared. It counts as slower where the whole range from p20 to
p80 lies below the old one; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KEY = ("machine", "threads", "case", "params", "dtype", "pipeline", "reference", "grads")

Key = tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """Reference time over pipeline time: above 1, the pipeline is faster."""

    p20: float
    p50: float
    p80: float
    quiet: bool

    @classmethod
    def of(cls, row: dict[str, str]) -> Figure:
        p20, p50, p80 = (float(row[f"ratio_{p}"]) for p in ("p20", "p50", "p80"))
        return cls(p20, p50, p80, row["quiet"] == "1")


@dataclass(frozen=True)
class Change:
    key: Key
    old: Figure
    new: Figure

    @property
    def verdict(self) -> str:
        if not (self.old.quiet and self.new.quiet):
            return "disturbed"
        if self.new.p80 < self.old.p20:
            return "SLOWER"
        return "faster" if self.new.p20 > self.old.p80 else "same"


def read(source: str, results: Path = RESULTS) -> dict[Key, Figure]:
    """The latest figure for each key of a CSV, or of a commit's rows in any CSV of ``results``."""
    path = Path(source)
    if path.suffix == ".csv":
        if not path.exists():
            raise SystemExit(f"{source}: there is no such file")
        found = latest(_rows(path))
        if not found:
            raise SystemExit(f"{source}: no row with a ratio, a machine and a reference")
        return found
    commit = source if re.fullmatch(r"[0-9a-f]{7,40}", source) else _resolved(source)
    if not commit:
        raise SystemExit(f"{source}: neither a .csv nor a commit")
    rows = [row for path in sorted(results.glob("*.csv")) for row in _rows(path)]
    found = latest(row for row in rows if row["commit"].startswith(commit))
    if not found:
        raise SystemExit(f"{source}: {results} has no row of this commit")
    return found


def _resolved(name: str) -> str:
    """The commit that git knows under a name: HEAD, a branch, a tag."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    try:
        return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {*KEY, "commit", "quiet", "ratio_p50"} - {*(reader.fieldnames or [])}
        return [] if missing else list(reader)  # a GPU's, or figures that are no times


def latest(rows: Iterable[dict[str, str]]) -> dict[Key, Figure]:
    ordered = sorted(rows, key=lambda row: row["timestamp"])
    return {tuple(row[k] for k in KEY): Figure.of(row) for row in ordered if row["ratio_p50"]}


def changes(old: dict[Key, Figure], new: dict[Key, Figure]) -> list[Change]:
    return [Change(key, old[key], new[key]) for key in sorted(old.keys() & new.keys())]


def table(found: Sequence[Change]) -> str:
    lines = ["| figure | old | new | new / old | |", "|---|---|---|---|---|"]
    for change in found:
        _, _, case, _, _, pipeline, reference, grads = change.key
        old, new = change.old, change.new
        lines.append(
            f"| {case}, {pipeline} against {reference}, {grads} grads "
            f"| {old.p50:.2f}x [{old.p20:.2f}..{old.p80:.2f}] "
            f"| {new.p50:.2f}x [{new.p20:.2f}..{new.p80:.2f}] "
            f"| {new.p50 / old.p50:.2f} | {change.verdict} |"
        )
    return "\n".join(lines)


def nothing_in_common(old: dict[Key, Figure], new: dict[Key, Figure]) -> str:
    """Why there is nothing to compare."""
    for part, name in enumerate(KEY):
        ours, theirs = ({key[part] for key in figures} for figures in (old, new))
        if not ours & theirs:
            lists = (", ".join(sorted(values)) for values in (ours, theirs))
            return f"nothing is comparable: {name} is {' in OLD and '.join(lists)} in NEW"
    return f"nothing is comparable: no figure has the same {', '.join(KEY)} in both"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    left_out = len(old.keys() ^ new.keys())
    found = changes(old, new)
    if not found:
        raise SystemExit(nothing_in_common(old, new))
    print(table(found))
    slower = sum(change.verdict == "SLOWER" for change in found)
    print(f"\n{len(found)} figures in common, {slower} slower beyond the noise")
    if left_out:
        print(f"{left_out} more are in only one of the two")
    return 1 if slower else 0
