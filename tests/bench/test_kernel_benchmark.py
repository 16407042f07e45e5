"""The benchmark of the kernels alone measures what it says. No test asserts a time."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

pytest.importorskip("numpy")
pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import compare, kernels, pipelines, report, stream, timing, verbs  # noqa: E402

BF16 = verbs.Workload("adamw", verbs.DTYPES["bfloat16"])


def run(folder: Path, *options: str) -> list[dict[str, str]]:
    out = folder / "rows.csv"
    assert kernels.main([*options, "--threads", "1", "--rounds", "1", "--out", str(out)]) == 0
    if not out.exists():
        return []
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Iterator[list[dict[str, str]]]:
    pytest.importorskip("fusedopt._cpu")
    threads = torch.get_num_threads()
    yield run(folder, "--sizes", "10:12", "--rules", "adamw", "sgd", "--dtypes", "float32")
    torch.set_num_threads(threads)


def test_a_row_for_every_kernel_backend_and_size(rows: list[dict[str, str]]) -> None:
    assert list(rows[0]) == report.COLUMNS
    bytes_of = {"reduce:float32": 4, "update:adamw:float32": 28, "update:sgd:float32": 12}
    found = {(row["case"], row["pipeline"]): row for row in rows}
    assert set(found) == {
        (f"kernel-2^{k}", f"fusedopt_{backend}:{kernel}")
        for k in (10, 12)
        for backend in ("cpu", "reference")
        for kernel in bytes_of
    }
    assert len(found) == len(rows)
    for (case, pipeline), row in found.items():
        assert int(row["params"]) == 2 ** int(case[-2:])
        assert int(row["bytes_per_param"]) == bytes_of[pipeline.partition(":")[2]]
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert (row["reference"], row["grads"], row["threads"]) == ("stream_huge", "kept", "1")


def test_figures_of_a_row_agree_with_each_other(rows: list[dict[str, str]]) -> None:
    for row in rows:
        moved = int(row["bytes_per_param"]) * int(row["params"]) / 1e6
        ms, predicted_ms = float(row["ms_p50"]), float(row["predicted_ms"])
        assert float(row["gb_s"]) == pytest.approx(moved / ms, rel=0.02, abs=1e-3)
        ceiling = pytest.approx(moved / predicted_ms, rel=0.02, abs=1e-3)
        assert float(row["ceiling_gb_s"]) == ceiling
        over = float(row["measured_over_predicted"])
        assert over == pytest.approx(ms / predicted_ms, rel=0.02, abs=1e-3)
        assert 0 < float(row["ratio_p20"]) <= float(row["ratio_p50"]) <= float(row["ratio_p80"])
        assert row["ceiling_fraction"] == row["ratio_p50"]


def test_compare_reads_the_rows(rows: list[dict[str, str]], folder: Path) -> None:
    figures = compare.read(str(folder / "rows.csv"))
    assert len(figures) == len(rows)
    assert {key[compare.KEY.index("reference")] for key in figures} == {"stream_huge"}


def test_the_stream_is_scaled_to_the_bytes_of_the_verb(cpu_backend, monkeypatch) -> None:
    def sandwich(reference, candidates, rounds, attempts):
        seconds = {"cpu reduce": 0.25, "cpu update": 2.0}  # of all calls of a step
        trial = {n: seconds[n] * candidates[n].count for n in candidates}
        return {n: [timing.Trial(s, 8.0 * reference.count, False)] for n, s in trial.items()}

    monkeypatch.setattr(kernels, "sandwich", sandwich)
    found, _ = kernels.measure(BF16, verbs.VERBS, ["cpu"], 1000, 1)
    reduce, update = found["cpu", "reduce"], found["cpu", "update"]
    # 8 s for the 32 bytes of the stream are 0.5 s for 2, and 7.5 s for 30.
    assert (reduce.reference_ms.p50, reduce.ratio.p50) == pytest.approx((500.0, 2.0))
    assert (update.reference_ms.p50, update.ratio.p50) == pytest.approx((7500.0, 3.75))


def test_without_a_compiler_there_is_no_ceiling(
    cpu_backend, restore_threads, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(stream, "_compiled", lambda: None)
    for row in run(tmp_path, "--sizes", "10", "--rules", "sgd", "--backends", "cpu"):
        assert "not a ceiling" in row["note"] and float(row["gb_s"]) > 0
        assert row["ceiling_fraction"] == row["ceiling_gb_s"] == row["predicted_ms"] == ""
        assert row["measured_over_predicted"] == ""


def test_short_calls_are_timed_together() -> None:
    called = []
    calls = kernels.Calls(lambda: called.append(1))
    assert 1 < calls.count <= kernels.MAX_CALLS
    called.clear()
    calls.prepare()
    calls.step()
    assert len(called) == calls.count


@pytest.mark.parametrize("rule", verbs.RULES)
@pytest.mark.parametrize("dtypes", verbs.DTYPES.values(), ids=str)
def test_backends_take_the_same_step_in_every_pairing(cpu_backend, rule, dtypes) -> None:
    if dtypes.params != dtypes.grads and not hasattr(torch.Tensor, "grad_dtype"):
        with pytest.raises(pipelines.Unavailable):
            verbs.Verbs(verbs.Workload(rule, dtypes), [(5,)], "cpu")
        return
    verbs.check_same_step(verbs.Workload(rule, dtypes), ["cpu", "reference"], torch.device("cpu"))


@pytest.mark.parametrize("backends", [["cpu", "reference"], ["cpu"]])
def test_a_backend_with_another_step_is_not_timed(
    backends: list[str], cpu_backend, restore_threads, monkeypatch, capsys
) -> None:
    """Also where it is alone: then the reference is looked at, and not timed."""
    make, options = verbs.RULES["adamw"]
    rates = {"cpu": 1e-3, "reference": 2e-3}
    wrong = lambda params, **o: make(params, **{**o, "lr": rates[o["backend"]]})  # noqa: E731
    monkeypatch.setitem(verbs.RULES, "adamw", (wrong, options))
    options = ["--quick", "--sizes", "10", "--rules", "adamw", "sgd", "--backends", *backends]
    assert kernels.main(options) == 1
    told = capsys.readouterr().out
    assert "adamw:float32: not measured: the two pipelines take different steps" in told
    sgd = told.partition("update:sgd:float32")[2].splitlines()
    assert sgd[1].count("GB/s") == len(backends) and "-" not in sgd[2].partition("2^10")[2]


def test_disturbed_figures_are_marked() -> None:
    table = kernels.Benchmark("update:adamw:float32", [10], ["cpu"])
    row = {"case": "kernel-2^10", "pipeline": "fusedopt_cpu:update:adamw:float32", "gb_s": "7",
           "ceiling_fraction": "0.5", "bytes_per_param": 28}  # fmt: skip
    assert table.table([row | {"quiet": 1}]).endswith("0.50")
    assert table.table([row | {"quiet": 0}]).endswith("0.50 ?")


def test_a_skipped_step_is_not_timed(cpu_backend, monkeypatch) -> None:
    fp16 = verbs.Workload("adamw", verbs.DTYPES["float16"])
    verbs.Verbs(fp16, [(1024,)], "cpu")
    monkeypatch.setattr(verbs, "_LARGEST_STD", 1e6)  # inf, in fp16
    with pytest.raises(RuntimeError, match="skipped"):
        verbs.Verbs(fp16, [(1024,)], "cpu")


def test_verbs_move_params_at_every_update(cpu_backend) -> None:
    own = verbs.Verbs(BF16, [(300,)], "cpu")
    for _ in range(2):
        before = own.updated()[0].clone()
        own.reduce()
        assert torch.equal(own.updated()[0], before)
        own.update()
        assert (own.updated()[0] != before).all()


def test_sizes_without_memory_are_named(
    cpu_backend, restore_threads, monkeypatch, tmp_path, capsys
):
    per_element = 16 + 2 * 12 + kernels.STREAM_BYTES + kernels.TEMPORARY_BYTES  # sgd-momentum
    monkeypatch.setattr(kernels, "available_bytes", lambda: (per_element - 16) << 11)
    options = ["--rules", "sgd-momentum", "--verbs", "reduce", "--sizes", "10:12:1"]
    found = run(tmp_path, *options)
    assert {row["case"] for row in found} == {"kernel-2^10", "kernel-2^11"}
    assert "2^12, sgd-momentum:float32: needs 0.0 GiB more" in capsys.readouterr().out


def test_the_reference_is_not_waited_for_at_large_sizes(cpu_backend, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "LARGEST_OF_REFERENCE", 10)
    monkeypatch.setattr(kernels, "measure", lambda w, v, backends, *_: ({}, asked.append(backends)))
    asked: list[list[str]] = []
    kernels.main(["--quick", "--sizes", "10:12", "--rules", "sgd"])
    assert asked == [["cpu", "reference"], ["cpu"]]
    assert "reference: not measured above 2^10" in capsys.readouterr().out


def test_table_has_a_line_for_each_size_and_a_column_for_each_provider() -> None:
    row = {"case": "dry-run:kernel-2^12", "pipeline": "fusedopt_cpu:update:sgd:float32"}
    row |= {"gb_s": "12.25", "ceiling_fraction": "0.5", "bytes_per_param": "12"}
    table = kernels.Benchmark("update:sgd:float32", [10, 12], ["cpu", "reference"]).table([row])
    title, head, *lines = table.splitlines()
    assert title == "update:sgd:float32, 12 bytes per param:"
    assert head.split("  ")[-1].strip() == "of ceiling" and "reference (GB/s)" in head
    assert [line.split() for line in lines] == [
        ["2^10", "-", "-", "-", "-"],
        ["2^12", "12.25", "0.50", "-", "-"],
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("10:14", [10, 12, 14]), ("10:13", [10, 12]), ("10:12:1", [10, 11, 12]), ("20", [20])],
)
def test_sizes_are_powers_of_two_with_both_ends(text: str, wanted: list[int]) -> None:
    assert kernels.exponents(text) == wanted


@pytest.mark.parametrize("text", ["", "a:b", "12:10", "10:99", "10:12:0", "10:12:1:1"])
def test_sizes_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        kernels.exponents(text)


@pytest.mark.parametrize(
    "options", [["--backends", "cpu", "cuda"], ["--dry-run"], ["--rules", "lion"]]
)
def test_options_that_do_not_go_together_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(options)


def test_rules_and_dtypes_are_combined() -> None:
    every = kernels.parse(["--rules", "all", "--dtypes", "all"]).workloads
    assert len(every) == len(set(map(str, every))) == len(verbs.RULES) * len(verbs.DTYPES) == 60
    assert kernels.parse(["--rules", "sgd"]).workloads == [verbs.Workload("sgd")]
    assert kernels.parse(["--dtypes", "bfloat16"]).workloads == [BF16]
    assert kernels.parse([]).workloads == kernels.DEFAULT


def test_a_row_is_of_the_medians() -> None:
    spread = timing.Spread
    summary = timing.Summary(spread(1.0, 2.0, 4.0), spread(3.0, 5.0, 7.0), spread(1.5, 2.5, 3.5),
                             samples=9, disturbed=0, quiet=True)  # fmt: skip
    row = kernels.row(BF16, "cpu", "update", 20, summary, "")
    moved = BF16.bytes_per_param("update") * 2**20 / 1e6
    assert row["gb_s"] == f"{moved / 2.0:.3f}"
    if stream.is_ceiling():
        assert row["ceiling_gb_s"] == f"{moved / 5.0:.3f}"
        assert (row["predicted_ms"], row["measured_over_predicted"]) == ("5.000000", "0.4000")


def test_the_stream_takes_one_thread_where_our_kernels_do() -> None:
    source = ROOT / "csrc" / "cpu" / "kernels.cpp"
    if not source.exists():
        pytest.skip("the sources are not here")
    shift = re.search(r"kSerialElements = 1 << (\d+);", source.read_text())
    assert shift is not None and 1 << int(shift[1]) == kernels.SERIAL_ELEMENTS
