"""Pictures come from the rows alone, and those in docs/ are of the rows in benchmarks/results."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from bench_helpers import COMMIT, OLDER, ROOT, row, write

image = pytest.importorskip("matplotlib.image")
np = pytest.importorskip("numpy")

from benchmarks import plot, rows  # noqa: E402

SIZES = {"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}
SAME_PICTURE = 0.03  # root mean square, of 1: another matplotlib shades letters otherwise
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))


def steps(factor: float = 1.0, **more: object) -> list[rows.Row]:
    """The second half of the time at each size is the stream's, half as fast as ours."""
    return [
        row(
            f"{0.9 * ms:g} {ms:g} {1.2 * ms:g}", f"{1.8 * ms:g} {2 * ms:g} {2.4 * ms:g}",
            case=f"adamw-gpt-{size}", params=numel, reference=reference, **more,
        )
        for size, numel in SIZES.items()
        for ms in [factor * numel * 1e-6]
        for reference in ("adamw_fused", "stream_huge")
    ]  # fmt: skip


def drawn(path: Path) -> dict[str, dict[int, float]]:
    """By pipeline and size the medians in the picture of the step's time."""
    _, (lines, roof) = plot.step_time(plot.read_figures(path))
    found = {name: {n: p.median for n, p in points} for name, points in lines.items() if points}
    return found | {"roof": roof}


def text_chunks(png: Path) -> dict[str, str]:
    data, at, found = png.read_bytes(), 8, {}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"tEXt":
            key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
            found[key.decode()] = value.decode()
        at += 12 + length
    return found


def test_the_same_rows_give_the_same_file_and_others_another_checksum(tmp_path: Path) -> None:
    files = []
    for factor in (1.0, 1.0, 1.1):
        path = write(tmp_path / "rows.csv", *steps(factor))
        assert plot.main([str(path), "--out", str(tmp_path)]) == 0
        files.append({p.name: (p.read_bytes(), text_chunks(p)[plot.CHECKSUM])
                      for p in tmp_path.glob("*.png")})  # fmt: skip
    one, two, other = files
    assert one == two and one.keys() == {f"rows-{name}.png" for name in plot.PICTURE_OF}
    assert one["rows-step-time.png"][1] != other["rows-step-time.png"][1]


def test_step_time_draws_ours_the_rivals_and_the_roof(tmp_path: Path) -> None:
    model = row(case="adamw-resnet50", params=25_557_032)  # a GPU's sweep has it
    found = drawn(write(tmp_path / "rows.csv", *steps(), model))
    ours = {1_000_000: 1.0, 10_000_000: 10.0, 100_000_000: 100.0}
    twice = {numel: 2 * ms for numel, ms in ours.items()}
    assert found == {"fusedopt_adamw": ours, "adamw_fused": twice, "roof": twice}


@pytest.mark.parametrize(
    "left_out", [{"dirty": 1}, {"quiet": 0}, {"grads": "kept"}, {"commit": OLDER}]
)
def test_rows_that_are_not_drawn(tmp_path: Path, left_out: dict[str, object]) -> None:
    later = "2026-01-03T00:00:00+00:00" if "commit" not in left_out else "2026-01-01T00:00:00+00:00"
    found = drawn(write(tmp_path / "rows.csv", *steps(), *steps(9, timestamp=later, **left_out)))
    assert [*found["fusedopt_adamw"].values()] == [1.0, 10.0, 100.0]


def test_the_newest_commit_with_a_sweep_is_taken(tmp_path: Path) -> None:
    newer = row(commit=OLDER, timestamp="2026-02-01T00:00:00+00:00")
    path = write(tmp_path / "rows.csv", *steps(), newer)
    said = plot.caption(plot.read_figures(path))
    wanted = ("A CPU", "2 threads", COMMIT[:7], "python -m benchmarks")
    assert [word for word in wanted if word not in said] == []
    with pytest.raises(SystemExit, match="no commit has clean rows"):
        plot.read_figures(write(tmp_path / "short.csv", newer))


def test_rows_of_a_gpu(tmp_path: Path) -> None:
    found = [
        row("1 1", "2 2", case=case, params=1000 * n, machine="A GPU", figure="gpu",
            ceiling_gb_s="4000")
        for n, case in enumerate(plot.SWEEP_GPU, 1)
    ]  # fmt: skip
    path = write(tmp_path / "gpu.csv", *found)
    assert drawn(path)["roof"][1000] == pytest.approx(32 * 1000 / 4000e6)
    plot.draw("ratio-by-model", plot.read_figures(path), tmp_path / "picture.png")
    assert "A GPU" in plot.caption(plot.read_figures(path))


@pytest.mark.parametrize(
    ("options", "folder"), [([], "benchmarks/results/local"), (["--record"], "docs/pictures")]
)
def test_pictures_of_the_documents_are_drawn_on_request(
    options: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(plot, "draw", lambda name, known, path: drawn.append(path))
    assert plot.main([str(write(tmp_path / "rows.csv", *steps())), *options]) == 0
    assert {path.parent for path in drawn} == {ROOT / folder}


@pytest.mark.parametrize("picture", PICTURES, ids=[path.stem for path in PICTURES])
def test_pictures_are_of_the_rows(picture: Path, tmp_path: Path) -> None:
    names = (*plot.PICTURE_OF, plot.FIDELITY)
    name = next(name for name in names if picture.stem.endswith(f"-{name}"))
    found = ROOT / "benchmarks" / "results" / f"{picture.stem.removesuffix(f'-{name}')}.csv"
    drawn = tmp_path / "picture.png"
    read = plot.read_fidelity if name == plot.FIDELITY else plot.read_figures
    digest = plot.draw(name, read(found), drawn)
    assert text_chunks(picture)[plot.CHECKSUM] == digest
    if text_chunks(picture)["Software"] != text_chunks(drawn)["Software"]:
        return  # another matplotlib sets its text elsewhere
    committed, new = (image.imread(str(path)) for path in (picture, drawn))
    assert committed.shape == new.shape
    assert float(np.sqrt(np.mean((committed - new) ** 2))) < SAME_PICTURE
