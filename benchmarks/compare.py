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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import rows as files
from benchmarks.rows import KEY, RESULTS, Estimate, Figure, Key, figures, shown

OURS = "fusedopt"


class Change(NamedTuple):
    """Of reference time over pipeline time: above 1, the pipeline is faster."""

    figure: Figure
    old: Estimate
    new: Estimate
    runs: tuple[int, int]
    verdict: str

    @classmethod
    def of(cls, old: Figure, new: Figure) -> Change:
        was, now = old.ratio(), new.ratio()
        verdict = "faster" if now.low > was.high else "SLOWER" if now.high < was.low else "same"
        verdict = verdict if old.quiet() and new.quiet() else "disturbed"
        return cls(new, was, now, (len(old.rows), len(new.rows)), verdict)


def read(source: str, results: Path = RESULTS) -> dict[Key, Figure]:
    """For each key the newest runs of a CSV, or a commit's rows in all files of ``results``."""
    is_file, commit = source.endswith(".csv"), ""
    if is_file and not Path(source).exists():
        raise SystemExit(f"{source}: there is no such file")
    if not is_file:
        is_commit = re.fullmatch(r"[0-9a-f]{7,40}", source)
        commit = source if is_commit else files.git("rev-parse", "--verify", f"{source}^{{commit}}")
        if not commit:
            raise SystemExit(f"{source}: neither a .csv nor a commit")
    paths = [Path(source)] if is_file else files.every_file(results)
    rows = [row for path in paths for row in files.read(path) if row.get("reference_values")]
    own = [row for row in rows if row["commit"].startswith(commit)]
    if not own:
        where = "no row with a reference" if is_file else f"{results} has no row of this commit"
        raise SystemExit(f"{source}: {where}")
    clean = [row for row in own if is_file or row["dirty"] == "0"]
    if not clean:
        raise SystemExit(f"{source}: its rows were measured with changes in the tree: commit them")
    return figures(clean)


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
    parser = files.parser("compare", __doc__)
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
    common = f"{len(found)} figures in common"
    print(f"\n{common}, {len(slower)} slower beyond the noise, {ours} of ours")
    left_out = len(old.keys() ^ new.keys())
    print(f"{left_out} more are in only one of the two" if left_out else "")
    return int(ours > 0)
