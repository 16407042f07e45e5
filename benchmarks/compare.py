"""What got slower between two sets of rows, beyond the noise of either.

OLD and NEW are each a CSV or a commit (a prefix of at least seven digits) whose rows stand in
benchmarks/results or benchmarks/results/local. A figure is the speed against a reference that was
timed in the same run, so that a slower machine is not taken for a slower program; rows without one
are left out. So are rows of a commit that were measured with changes in the tree. Rows of different
machines or torch versions are never compared. Nor is a figure against the old stream, which did not
fetch ahead, compared with one against the new stream: the timestamps tell which is which.

Several runs of one commit are one figure, and benchmarks/pool.py works out its range. It counts as
slower where its whole range from p20 to p80 lies below the old one. If one of our figures does,
the exit status is 1. The range of one run is narrower than the distance between runs: repeat a run
before you believe it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pool import KEY, Figure, Key, Row, runs_by_key, spread
from benchmarks.row_files import RESULTS, every_file, read as read_rows

STREAM_SINCE = "2026-11-21T22"  # as it is now: from then on it fetches ahead
OLD_STREAM = " of old"
OURS = "fusedopt"
NEEDED = {*KEY, "timestamp", "commit", "dirty", "quiet", "ratio_p20", "ratio_p50", "ratio_p80"}

Runs = dict[Key, list[Row]]


@dataclass(frozen=True)
class Change:
    """Of reference time over pipeline time: above 1, the pipeline is faster."""

    key: Key
    old: Figure
    new: Figure
    runs: tuple[int, int]
    quiet: bool

    @classmethod
    def of(cls, key: Key, old: list[Row], new: list[Row]) -> Change:
        quiet = all(row["quiet"] == "1" for row in (*old, *new))
        return cls(key, spread(old, "ratio"), spread(new, "ratio"), (len(old), len(new)), quiet)

    @property
    def named(self) -> dict[str, str]:
        return dict(zip(KEY, self.key, strict=True))

    @property
    def verdict(self) -> str:
        if not self.quiet:
            return "disturbed"
        if self.new.p80 < self.old.p20:
            return "SLOWER"
        return "faster" if self.new.p20 > self.old.p80 else "same"


def read(source: str, results: Path = RESULTS) -> Runs:
    """For each key the newest runs of a CSV, or a commit's rows in all files of ``results``."""
    path = Path(source)
    if path.suffix == ".csv":
        if not path.exists():
            raise SystemExit(f"{source}: there is no such file")
        found = runs_by_key(_rows(path))
        if not found:
            raise SystemExit(f"{source}: no row with a ratio, a machine and a reference")
        return found
    commit = source if re.fullmatch(r"[0-9a-f]{7,40}", source) else _resolved(source)
    if not commit:
        raise SystemExit(f"{source}: neither a .csv nor a commit")
    rows = [row for path in every_file(results) for row in _rows(path)]
    own = [row for row in rows if row["commit"].startswith(commit)]
    if not own:
        raise SystemExit(f"{source}: {results} has no row of this commit")
    clean = [row for row in own if row["dirty"] == "0"]
    if not clean:
        raise SystemExit(f"{source}: its rows were measured with changes in the tree: commit them")
    return runs_by_key(clean)


def _resolved(name: str) -> str:
    """The commit that git knows under a name: HEAD, a branch, a tag."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    try:
        return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _rows(path: Path) -> list[Row]:
    """Those with a ratio."""
    rows = read_rows(path)
    if not rows or NEEDED - rows[0].keys():
        return []  # a GPU's, or figures that are no times
    return [row | {"reference": _reference(row)} for row in rows if row["ratio_p50"]]


def _reference(row: Row) -> str:
    """Two streams are two references."""
    old = row["reference"].startswith("stream") and row["timestamp"] < STREAM_SINCE
    return row["reference"] + OLD_STREAM if old else row["reference"]


def changes(old: Runs, new: Runs) -> list[Change]:
    return [Change.of(key, old[key], new[key]) for key in sorted(old.keys() & new.keys())]


def table(found: Sequence[Change]) -> str:
    lines = ["| figure | old | new | new / old | runs | |", "|---|---|---|---|---|---|"]
    for change in found:
        old, new = change.old, change.new
        what = "{case}, {pipeline} against {reference}, {grads} grads".format(**change.named)
        lines.append(
            f"| {what} | {old.p50:.2f}x [{old.p20:.2f}..{old.p80:.2f}] "
            f"| {new.p50:.2f}x [{new.p20:.2f}..{new.p80:.2f}] "
            f"| {new.p50 / old.p50:.2f} | {change.runs[0]}, {change.runs[1]} | {change.verdict} |"
        )
    return "\n".join(lines)


def nothing_in_common(old: Runs, new: Runs) -> str:
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
    slower = [change for change in found if change.verdict == "SLOWER"]
    ours = sum(change.named["pipeline"].startswith(OURS) for change in slower)
    print(
        f"\n{len(found)} figures in common, {len(slower)} slower beyond the noise, {ours} of ours"
    )
    if len({key[KEY.index("reference")].endswith(OLD_STREAM) for key in (*old, *new)}) > 1:
        print("the stream is another one since then, and figures against it are not compared")
    if left_out:
        print(f"{left_out} more are in only one of the two")
    return int(ours > 0)
