"""Pictures come from the rows alone, and those in docs/ are of the rows in benchmarks/results."""

from __future__ import annotations

import csv
import struct
import sys
from pathlib import Path

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

image = pytest.importorskip("matplotlib.image")
np = pytest.importorskip("numpy")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import plot, report  # noqa: E402
from benchmarks.gpu import report as gpu_report  # noqa: E402
from benchmarks.plot_rows import SWEEP_GPU  # noqa: E402

COMMIT, OLDER = "a" * 40, "b" * 40
SIZES = {"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}
SAME_PICTURE = (
    0.03  # root mean square, of 1: another release of matplotlib shades letters otherwise
)
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))


def row(case: str, pipeline: str, reference: str, ms: float, **more: object) -> dict[str, object]:
    values: dict[str, object] = dict.fromkeys(report.COLUMNS, "") | {
        "timestamp": "2026-01-02T00:00:00+00:00",
        "commit": COMMIT,
        "dirty": 0,
        "machine": "A CPU",
        "threads": 2,
        "torch": "2.13.0",
        "case": case,
        "pipeline": pipeline,
        "reference": reference,
        "params": SIZES[case.rsplit("-", 1)[1]],
        "dtype": "float32",
        "grads": "new",
        "bytes_per_param": 32,
        "quiet": 1,
    }
    values |= {f"ms_{p}": ms * f for p, f in (("p20", 0.9), ("p50", 1.0), ("p80", 1.2))}
    values |= {f"ratio_{p}": 2.0 for p in ("p20", "p50", "p80")} | {"reference_ms_p50": 2 * ms}
    return values | more


def steps(**more: object) -> list[dict[str, object]]:
    return [
        row(f"adamw-gpt-{size}", "fusedopt_adamw", reference, numel * 1e-6, **more)
        for size, numel in SIZES.items()
        for reference in ("adamw_fused", "stream_huge")
    ]


def write(path: Path, rows: list[dict[str, object]], columns: list[str] = report.COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def text_chunks(png: Path) -> dict[str, str]:
    data, at, found = png.read_bytes(), 8, {}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"tEXt":
            key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
            found[key.decode()] = value.decode()
        at += 12 + length
    return found


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", steps())
    for folder in ("one", "two"):
        assert plot.main([str(path), "--out", str(tmp_path / folder)]) == 0
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert names == {f"rows-{name}.png" for name in plot.PICTURE_OF}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_other_figures_give_another_checksum(tmp_path: Path) -> None:
    before = plot.draw("step-time", plot.read(write(tmp_path / "a.csv", steps())), tmp_path / "a")
    rows = steps()
    rows[3]["ms_p50"] = 11.0
    assert before != plot.draw(
        "step-time", plot.read(write(tmp_path / "b.csv", rows)), tmp_path / "b"
    )


def test_step_time_draws_medians_spread_and_roof(tmp_path: Path) -> None:
    rows = plot.read(write(tmp_path / "rows.csv", steps()))
    _, figures = plot.step_time(rows)
    assert isinstance(figures, dict)
    assert figures["lines"]["fusedopt_adamw"][0] == (1_000_000, 1.0, 0.9, 1.2)
    assert figures["lines"]["adamw_fused"][-1] == (100_000_000, 200.0, 200.0, 200.0)
    assert figures["roof"] == [(1_000_000, 2.0), (10_000_000, 20.0), (100_000_000, 200.0)]
    assert figures["bytes_per_param"] == 32.0


@pytest.mark.parametrize(
    "left_out", [{"dirty": 1}, {"quiet": 0}, {"grads": "kept"}, {"commit": OLDER}]
)
def test_rows_that_are_not_drawn(tmp_path: Path, left_out: dict[str, object]) -> None:
    later = "2026-01-03T00:00:00+00:00" if "commit" not in left_out else "2026-01-01T00:00:00+00:00"
    rows = steps() + steps(timestamp=later, ms_p50=5.0, **left_out)
    _, figures = plot.step_time(plot.read(write(tmp_path / "rows.csv", rows)))
    assert isinstance(figures, dict)
    assert [point[1] for point in figures["lines"]["fusedopt_adamw"]] == [1.0, 10.0, 100.0]


def test_the_newest_commit_with_a_sweep_is_taken(tmp_path: Path) -> None:
    newer = [row("adamw-gpt-1M", "fusedopt_adamw", "adamw_fused", 7.0, commit=OLDER,
                 timestamp="2026-02-01T00:00:00+00:00")]  # fmt: skip
    path = write(tmp_path / "rows.csv", steps() + newer)
    assert COMMIT[:7] in plot.read(path).caption
    with pytest.raises(SystemExit, match="no commit has clean rows"):
        plot.read(write(tmp_path / "short.csv", newer))


def test_caption_names_machine_commit_and_command(tmp_path: Path) -> None:
    caption = plot.read(write(tmp_path / "rows.csv", steps())).caption
    assert all(
        word in caption for word in ("A CPU", "2 threads", "aaaaaaa", "python -m benchmarks")
    )


def test_rows_of_a_gpu(tmp_path: Path) -> None:
    rows = []
    for case in SWEEP_GPU:
        for pipeline, ms in (("fusedopt_adamw", 1.0), ("adamw_fused", 2.0)):
            rows.append(dict.fromkeys(gpu_report.COLUMNS, "") | {
                "timestamp": "2026-01-02T00:00:00+00:00", "commit": COMMIT, "dirty": 0,
                "gpu": "A GPU", "torch": "2.11", "case": case, "pipeline": pipeline,
                "params": 1000 * (1 + len(rows)), "dtype": "float32", "grads": "new",
                "bytes_per_param": 32, "copy_gb_s": 4000.0, "gpu_ms_p20": ms, "gpu_ms_p50": ms,
                "gpu_ms_p80": ms, "wall_ratio_p20": ms, "wall_ratio_p50": ms, "wall_ratio_p80": ms,
            })  # fmt: skip
    path = write(tmp_path / "gpu.csv", rows, gpu_report.COLUMNS)
    assert plot.main([str(path), "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("gpu-*.png"))) == len(plot.PICTURE_OF)
    assert "A GPU" in plot.read(path).caption


@pytest.mark.parametrize(
    ("options", "folder"), [([], "benchmarks/results/local"), (["--record"], "docs/pictures")]
)
def test_pictures_of_the_documents_are_drawn_on_request(
    options: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(plot, "draw", lambda name, rows, path: drawn.append(path))
    assert plot.main([str(write(tmp_path / "rows.csv", steps())), *options]) == 0
    assert {path.parent for path in drawn} == {ROOT / folder}


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not here")
def test_there_are_pictures() -> None:
    assert len(PICTURES) >= len(plot.PICTURE_OF)


@pytest.mark.parametrize("picture", PICTURES, ids=[path.stem for path in PICTURES])
def test_pictures_are_of_the_rows(picture: Path, tmp_path: Path) -> None:
    name = next(name for name in plot.PICTURE_OF if picture.stem.endswith(f"-{name}"))
    rows = ROOT / "benchmarks" / "results" / f"{picture.stem.removesuffix(f'-{name}')}.csv"
    drawn = tmp_path / "picture.png"
    digest = plot.draw(name, plot.read(rows), drawn)
    assert text_chunks(picture)[plot.CHECKSUM] == digest
    if text_chunks(picture)["Software"] != text_chunks(drawn)["Software"]:
        return  # another matplotlib sets its text elsewhere
    committed, new = (image.imread(str(path)) for path in (picture, drawn))
    assert committed.shape == new.shape
    assert float(np.sqrt(np.mean((committed - new) ** 2))) < SAME_PICTURE
