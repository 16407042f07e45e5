"""What got slower between two sets of rows, beyond the noise of either.

OLD and NEW are each a CSV or a commit (a prefix of at least seven digits) whose rows stand in
benchmarks/results or benchmarks/results/local. A figure is the speed against a reference that was
timed in the same run, so that a slower machine is not taken for a slower program; rows without one
are left out. So are rows of a commit that were measured with changes in the tree. Rows of different
machines or torch versions are never compared.

Several runs of one commit are one figure. It counts as slower where all of its 95 % interval lies
below the old one's. If one of our figures does, the exit status is 1. Runs lie further apart than
the samples of one tell: repeat a run before you believe it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import arguments as args_of, rows as files
from benchmarks.rows import KEY, RESULTS, Estimate, Figure, Key, figures, shown

OURS = "fusedopt"


@dataclass(frozen=True)
class Change:
    """Of reference time over pipeline time: above 1, the pipeline is faster."""

    figure: Figure
    old: Estimate
    new: Estimate
    runs: tuple[int, int]
    quiet: bool

    @classmethod
    def of(cls, old: Figure, new: Figure) -> Change:
        runs = (len(old.rows), len(new.rows))
        return cls(new, old.ratio(), new.ratio(), runs, old.quiet() and new.quiet())

    @property
    def verdict(self) -> str:
        if not self.quiet:
            return "disturbed"
        if self.new.high < self.old.low:
            return "SLOWER"
        return "faster" if self.new.low > self.old.high else "same"


def read(source: str, results: Path = RESULTS) -> dict[Key, Figure]:
    """For each key the newest runs of a CSV, or a commit's rows in all files of ``results``."""
    path = Path(source)
    if path.suffix == ".csv":
        if not path.exists():
            raise SystemExit(f"{source}: there is no such file")
        found = figures(_rows(path))
        if not found:
            raise SystemExit(f"{source}: no row with a ratio, a machine and a reference")
        return found
    commit = source if re.fullmatch(r"[0-9a-f]{7,40}", source) else _resolved(source)
    if not commit:
        raise SystemExit(f"{source}: neither a .csv nor a commit")
    rows = [row for path in files.every_file(results) for row in _rows(path)]
    own = [row for row in rows if row["commit"].startswith(commit)]
    if not own:
        raise SystemExit(f"{source}: {results} has no row of this commit")
    clean = [row for row in own if row["dirty"] == "0"]
    if not clean:
        raise SystemExit(f"{source}: its rows were measured with changes in the tree: commit them")
    return figures(clean)


def _resolved(name: str) -> str:
    """The commit that git knows under a name: HEAD, a branch, a tag."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    try:
        return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _rows(path: Path) -> list[files.Row]:
    """Those with a reference."""
    return [row for row in files.read(path) if row.get("reference_values")]


def changes(old: Mapping[Key, Figure], new: Mapping[Key, Figure]) -> list[Change]:
    return [Change.of(old[key], new[key]) for key in sorted(old.keys() & new.keys())]


def table(found: Sequence[Change]) -> str:
    what = "{case}, {pipeline} against {reference}, {figure}, {grads} grads"
    lines = (
        (what.format(**change.figure.rows[-1]), shown(change.old, "x"), shown(change.new, "x"),
         f"{change.new.median / change.old.median:.2f}", "{}, {}".format(*change.runs),
         change.verdict)
        for change in found
    )  # fmt: skip
    return files.markdown(("figure", "old", "new", "new / old", "runs", ""), lines)


def nothing_in_common(old: Mapping[Key, Figure], new: Mapping[Key, Figure]) -> str:
    """Why there is nothing to compare."""
    for part, name in enumerate(KEY):
        ours, theirs = ({key[part] for key in found} for found in (old, new))
        if not ours & theirs:
            lists = (", ".join(sorted(values)) for values in (ours, theirs))
            return f"nothing is comparable: {name} is {' in OLD and '.join(lists)} in NEW"
    return f"nothing is comparable: no figure has the same {', '.join(KEY)} in both"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = args_of.parser("compare", __doc__)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    options = parser.parse_args(arguments)
    files.need_intervals()
    old, new = read(options.old), read(options.new)
    found = changes(old, new)
    if not found:
        raise SystemExit(nothing_in_common(old, new))
    print(table(found))
    slower = [change for change in found if change.verdict == "SLOWER"]
    ours = sum(change.figure["pipeline"].startswith(OURS) for change in slower)
    print(
        f"\n{len(found)} figures in common, {len(slower)} slower beyond the noise, {ours} of ours"
    )
    left_out = len(old.keys() ^ new.keys())
    if left_out:
        print(f"{left_out} more are in only one of the two")
    return int(ours > 0)
