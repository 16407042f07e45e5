"""The benchmark of the kernels alone measures what it says. No test asserts a time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bench_helpers import ROOT, read

from benchmarks import compare, kernels, measure, pipelines, rows as row_files, stream, verbs

BF16 = verbs.Workload("adamw", verbs.DTYPES["bfloat16"])


def run(folder: Path, *options: str) -> list[dict[str, str]]:
    out = folder / "rows.csv"
    assert kernels.main([*options, "--threads", "1", "--rounds", "1", "--out", str(out)]) == 0
    return read(out) if out.exists() else []


def test_a_row_for_every_kernel_backend_and_size(
    cpu_backend, restore_threads, tmp_path: Path
) -> None:
    options = ["--rules", "adamw", "sgd", "--dtypes", "float32"]
    rows = run(tmp_path, "--sizes", "10:12", *options)
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
        assert row["reference_bytes"] == row["bytes_per_param"] and row["figure"] == "call"
        assert (row["reference"], row["grads"], row["threads"]) == ("stream_huge", "kept", "1")
    assert len(compare.read(str(tmp_path / "rows.csv"))) == len(rows)  # it reads them


def test_the_stream_is_scaled_to_the_bytes_of_the_verb(cpu_backend, monkeypatch) -> None:
    def sandwich(reference, candidates, clock, rounds, attempts):
        ms = {"cpu reduce": 250.0, "cpu update": 2000.0}  # of all calls of a step
        trial = {n: (ms[n] * candidates[n].count,) for n in candidates}
        return {n: [measure.Trial(t, (8000.0 * reference.count,))] for n, t in trial.items()}

    monkeypatch.setattr(kernels, "sandwich", sandwich)
    report = row_files.Report(row_files.provenance(), None)
    kernels.measure_on_cpu(report, "x", BF16, [(1000,)], ["cpu"], verbs.VERBS, 1)
    reduce, update = report.figures()
    # 8 s for the 32 bytes of the stream are 0.5 s for 2, and 7.5 s for 30.
    for figure, ms, theirs in ((reduce, 250.0, 500.0), (update, 2000.0, 7500.0)):
        assert (figure.median(), figure.swapped().median()) == pytest.approx((ms, theirs))
    assert (reduce.ratio().median, update.ratio().median) == pytest.approx((2.0, 3.75))


def test_without_a_compiler_there_is_no_ceiling(
    cpu_backend, restore_threads, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(stream, "_compiled", lambda: None)
    for row in run(tmp_path, "--sizes", "10", "--rules", "sgd", "--backends", "cpu"):
        assert "not a ceiling" in row["note"] and row["ceiling_gb_s"] == ""


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
    timed = re.findall(r"fusedopt_(\w+):update:(\w+):float32", told)
    assert timed == [(backend, "sgd") for backend in backends]


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
    per_element = 2 * 12 + kernels.BESIDES_ON_CPU  # sgd-momentum
    monkeypatch.setattr(kernels, "available_bytes", lambda: per_element << 11)
    options = ["--rules", "sgd-momentum", "--verbs", "reduce", "--sizes", "10:12:1"]
    found = run(tmp_path, *options)
    assert {row["case"] for row in found} == {"kernel-2^10", "kernel-2^11"}
    assert "kernel-2^12, sgd-momentum:float32: needs 0.0 GiB more" in capsys.readouterr().out


def test_the_reference_is_not_waited_for_at_large_sizes(cpu_backend, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "LARGEST_OF_REFERENCE", 10)
    monkeypatch.setattr(kernels, "measure_on_cpu", lambda *given: asked.append(given[4]))
    asked: list[list[str]] = []
    kernels.main(["--quick", "--sizes", "10:12", "--rules", "sgd"])
    assert asked == [["cpu", "reference"], ["cpu"]]
    assert "reference: not measured above 2^10" in capsys.readouterr().out


def test_sizes_are_powers_of_two_with_both_ends() -> None:
    wanted = {"10:14": [10, 12, 14], "10:13": [10, 12], "10:12:1": [10, 11, 12], "20": [20]}
    assert {text: kernels.exponents(text) for text in wanted} == wanted


@pytest.mark.parametrize(
    "options",
    [
        *(["--sizes", text] for text in ("", "a:b", "12:10", "10:99", "10:12:0", "10:12:1:1")),
        *(["--backends", "cpu", "cuda"], ["--dry-run"], ["--rules", "lion"]),
    ],
)
def test_options_that_mean_nothing_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(options)


def test_rules_and_dtypes_are_combined() -> None:
    every = kernels.parse(["--rules", "all", "--dtypes", "all"]).workloads
    assert len(every) == len(set(map(str, every))) == len(verbs.RULES) * len(verbs.DTYPES) == 60
    assert kernels.parse(["--rules", "sgd"]).workloads == [verbs.Workload("sgd")]
    assert kernels.parse(["--dtypes", "bfloat16"]).workloads == [BF16]
    assert kernels.parse([]).workloads == kernels.DEFAULT


def test_the_stream_takes_one_thread_where_our_kernels_do() -> None:
    source = ROOT / "csrc" / "cpu" / "kernels.cpp"
    if not source.exists():
        pytest.skip("the sources are not here")
    shift = re.search(r"kSerialElements = 1 << (\d+);", source.read_text())
    assert shift is not None and 1 << int(shift[1]) == kernels.SERIAL_ELEMENTS
