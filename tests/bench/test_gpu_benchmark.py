"""The GPU benchmark, as far as it goes without a GPU. No test asserts a time."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

pytest.importorskip("numpy")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import host_time, kernels, param_sets, registry, verbs  # noqa: E402
from benchmarks.gpu import (  # noqa: E402
    cases as gpu_cases,
    first_step as gpu_first_step,
    machine as gpu_machine,
    measure as gpu_measure,
    report as gpu_report,
    sanitize as gpu_sanitize,
    step as gpu_step,
    targets as gpu_targets,
)
from fusedopt.backends import triton  # noqa: E402

HEADER = (
    "timestamp,commit,dirty,gpu,driver,torch,cuda,triton,python,"
    "case,pipeline,params,tensors,dtype,grads,bytes_per_param,"
    "gpu_ms_p20,gpu_ms_p50,gpu_ms_p80,wall_ms_p20,wall_ms_p50,wall_ms_p80,"
    "host_us_p20,host_us_p50,host_us_p80,gpu_ratio_p20,gpu_ratio_p50,gpu_ratio_p80,"
    "wall_ratio_p20,wall_ratio_p50,wall_ratio_p80,"
    "gb_s,copy_gb_s,copy_fraction,dram_bytes_per_param,"
    "predicted_gpu_ms,predicted_wall_ms,launches,samples,note,measured_over_predicted"
)
CPU = {"cuda": "cpu", "triton": "cpu"}
SPREADS = ("gpu_ms", "wall_ms", "host_us", "gpu_ratio", "wall_ratio")
BANDWIDTH = "dry-run:bandwidth"
DRY_CASES = ["adamw-1M", "adamw-llama-1.24B", "fp16-llama-1.24B", "sgd-resnet50",
             "bf16-gpt2-124M", "adamw-gpt2-bucket"]  # fmt: skip


def numel(shapes: list[param_sets.Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("shapes", "total", "tensors"),
    [
        (param_sets.resnet50(), 25_557_032, 161),
        (param_sets.gpt2(), 124_439_808, 148),
        (param_sets.llama_3_2_1b(), 1_235_814_400, 146),
    ],
    ids=["resnet50", "gpt2", "llama"],
)
def test_models_have_their_published_sizes(shapes, total, tensors):
    assert (numel(shapes), len(shapes)) == (total, tensors)


def test_ragged_list_and_small_models():
    ragged = param_sets.ragged()
    assert len(ragged) == 2000 and ragged == param_sets.ragged()
    assert 1 <= min(ragged)[0] < 10 and 4990 < max(ragged)[0] <= 5000
    small = gpu_cases.gpu_cases()["adamw-1M"].shapes()
    assert numel(small) == 1_000_000 and len(small) >= 150
    assert len(gpu_cases.gpu_cases()["adamw-300x1k"].shapes()) == 300


def test_every_case_is_complete():
    cases, kinds = gpu_cases.gpu_cases(), registry.gpu_kinds(CPU)
    for case in cases.values():
        assert case.pipelines[0].startswith("fusedopt_")
        assert set(case.pipelines) <= set(kinds)
        assert set(case.pipelines) <= set(gpu_targets.PREDICTIONS)
    assert set(gpu_step.KERNELS) <= set(cases)
    assert {case.numel for case in cases.values()} >= {1_000_000, 10_000_000, 25_557_032}
    # Once the profiler has run the host may be slower, so small models come before all others.
    small = [c.numel <= gpu_measure.SMALL and not c.compiles for c in cases.values()]
    assert small == sorted(small, reverse=True)


def test_every_target_asks_for_what_is_measured():
    cases = gpu_cases.gpu_cases()
    asked = []

    def figures(case: str, pipeline: str, column: str) -> float:
        asked.append((case, pipeline, column))
        return 1.0

    for target in gpu_targets.TARGETS:
        assert target.figure(figures) is not None
        assert target.figure(lambda *_: None) is None
    for case, pipeline, column in asked:
        assert column in gpu_report.COLUMNS
        _, _, kernel = pipeline.partition(":")
        if case == gpu_targets.FIRST_STEP:
            assert pipeline.split(":")[1] in gpu_first_step.SAMPLES
        elif ":counters:" in pipeline:
            assert (case, kernel) == (gpu_step.COUNTED, f"counters:{gpu_step.ADAMW}")
        elif kernel:
            assert kernel in {gpu_step.KERNELS[case].kernel(verb) for verb in verbs.VERBS}
        else:
            assert pipeline in cases[case].pipelines


def test_targets_are_judged_in_the_right_direction():
    more, less = gpu_targets.TARGETS[0], gpu_targets.TARGETS[2]
    assert (more.met(0.96), more.met(0.94)) == (True, False)
    assert (less.met(1.05), less.met(1.07)) == (True, False)


def test_predictions_follow_the_bytes():
    kinds, case = registry.gpu_kinds(CPU), gpu_cases.gpu_cases()["adamw-llama-1.24B"]
    predicted = {
        name: gpu_targets.PREDICTIONS[name].gpu_ms(kinds[name], case) for name in case.pipelines
    }
    assert 9.2 < predicted["fusedopt_adamw"] < 10.1  # 32 B at 4.3 TB/s are 9.20 ms
    assert 17 < predicted["adamw_fused"] < 18


def test_header_is_stable():
    assert ",".join(gpu_report.COLUMNS) == HEADER
    of_figures = ("-profile", "-memory")
    for path in (ROOT / "benchmarks" / "results").glob("nvidia-*.csv"):
        if path.stem.endswith(of_figures):
            continue
        assert path.read_text().split("\n", 1)[0] == HEADER


def test_documentation_names_every_column_and_case():
    text = (ROOT / "docs" / "gpu_benchmark.md").read_text()
    spreads = {f"{name}_{p}" for name in SPREADS for p in ("p20", "p50", "p80")}
    names = [*(set(gpu_report.COLUMNS) - spreads), *(f"{name}_p50" for name in SPREADS)]
    assert [name for name in [*names, *gpu_cases.gpu_cases()] if f"`{name}`" not in text] == []


def run_in(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a dry run may install the shim as the CUDA backend's driver."""
    program = (
        "import fusedopt, sys; sys.path.append(sys.argv.pop(1)); "
        "from importlib import import_module as get; "
        f"sys.exit(get('benchmarks.{module}').main())"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("dry-run")
    options = ["--dry-run", "--goals", "--out", "rows.csv"]
    done = run_in(folder, "gpu.step", *options, "--cases", *DRY_CASES)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    with (folder / "rows.csv").open(newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def test_dry_run_has_well_formed_rows(cpu_backend, dry_run):
    output, rows = dry_run
    assert list(rows[0]) == gpu_report.COLUMNS
    by_name = {(row["case"].removeprefix("dry-run:"), row["pipeline"]): row for row in rows}
    assert len(by_name) == len(rows)
    absent = set(registry.unavailable_libraries())
    for name in DRY_CASES:
        for pipeline in gpu_cases.gpu_cases()[name].pipelines:
            row = by_name.pop((name, pipeline), None)
            if row is None:
                assert absent and f"{name}: {pipeline} not measured" in output
                continue
            for spread in SPREADS:
                p20, p50, p80 = (float(row[f"{spread}_p{n}"]) for n in (20, 50, 80))
                assert 0 < p20 <= p50 <= p80
            for column in ("bytes_per_param", "gb_s", "copy_gb_s", "copy_fraction", "launches",
                           "predicted_gpu_ms", "predicted_wall_ms", "samples"):  # fmt: skip
                assert float(row[column]) > 0, (name, pipeline, column)
            if pipeline == gpu_cases.gpu_cases()[name].ours:
                assert float(row["gpu_ratio_p50"]) == float(row["wall_ratio_p50"]) == 1.0
    kernels = {(case, pipeline) for case, pipeline in by_name if ":" in pipeline}
    timed = {
        "adamw-llama-1.24B": ("reduce:float32", "update:adamw:float32"),
        "fp16-llama-1.24B": ("reduce:float16", "update:adamw:float16"),
    }
    backends = ("cuda", "triton")
    wanted = {
        (case, f"fusedopt_{backend}:{kernel}")
        for case, both in timed.items()
        for kernel in both
        for backend in backends
    }
    counted = "counters:adamw:float32"
    wanted |= {(gpu_step.COUNTED, f"fusedopt_{backend}:{counted}") for backend in backends}
    wanted |= {("first-step", f"fusedopt_adamw_triton:{cache}") for cache in ("empty", "filled")}
    assert kernels == wanted
    streams = {pipeline for case, pipeline in by_name if case == "bandwidth"}
    assert streams == {"copy", "read", "step"}
    assert len(by_name) == len(kernels) + len(streams)


def test_nothing_in_a_dry_run_looks_like_a_measurement(cpu_backend, dry_run):
    output, rows = dry_run
    assert all(row["gpu"] == gpu_machine.DRY_RUN for row in rows)
    assert all(row["note"].startswith(gpu_machine.DRY_RUN) for row in rows)
    assert all(row["case"].startswith("dry-run:") for row in rows)
    assert output.count("DRY RUN, a tiny list") == len(DRY_CASES)
    verdicts = [line for line in output.splitlines() if line.startswith("| ") and "open" in line]
    assert len(verdicts) == len(gpu_targets.TARGETS)
    assert "MISSED |" not in output and "| met |" not in output
    assert gpu_report.GOALS_SAY in output


@pytest.mark.parametrize(
    ("command", "options"), [(gpu_step, []), (kernels, ["--backends", "cuda", "triton"])]
)
def test_dry_run_refuses_the_folder_of_results(command, options, capsys):
    out = ROOT / "benchmarks" / "results" / "nvidia-h200.csv"
    with pytest.raises(SystemExit):
        command.parse([*options, "--dry-run", "--out", str(out)])
    assert "measures nothing" in capsys.readouterr().err


def test_dry_sweep_of_the_kernels_has_rows_and_no_figures(cpu_backend, tmp_path):
    options = ["--backends", "cuda", "triton", "--dry-run", "--sizes", "10:12"]
    options += ["--rules", "adamw", "sgd", "--dtypes", "bfloat16"]
    done = run_in(tmp_path, "kernels", *options, "--out", "rows.csv")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["gpu"] == gpu_machine.DRY_RUN for row in rows)
    assert all(row["note"].startswith(gpu_machine.DRY_RUN) for row in rows)
    assert "GB/s" not in done.stdout and done.stdout.count("DRY RUN, no figures") == 3
    timed = {(row["case"], row["pipeline"]): row for row in rows if row["case"] != BANDWIDTH}
    # Reducing bf16 gradients is the same for both rules: measured once.
    kernels_of = {"reduce:bfloat16": 2, "update:adamw:bfloat16": 30, "update:sgd:bfloat16": 14}
    assert set(timed) == {
        (f"dry-run:kernel-2^{k}", f"fusedopt_{backend}:{kernel}")
        for k in (10, 12)
        for backend in ("cuda", "triton")
        for kernel in kernels_of
    }
    for (case, pipeline), row in timed.items():
        assert int(row["params"]) == 2 ** int(case[-2:])
        assert float(row["bytes_per_param"]) == kernels_of[pipeline.partition(":")[2]]
        product = float(row["copy_fraction"]) * float(row["measured_over_predicted"])
        assert product == pytest.approx(1.0, rel=1e-3)
        moved = float(row["bytes_per_param"]) * int(row["params"])
        assert float(row["gb_s"]) == pytest.approx(moved / float(row["gpu_ms_p50"]) / 1e6, rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu_step.main([])
    with pytest.raises(SystemExit, match="--dry-run"):
        kernels.main(["--backends", "cuda"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sanitized_program_takes_the_steps_of_the_cpu(backend, cpu_backend, tmp_path):
    done = run_in(tmp_path, "gpu.sanitize", backend, "--dry-run")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    assert done.stdout.count("same bits as the CPU backend") == len(gpu_sanitize.CASES)


@pytest.fixture
def uploads(monkeypatch):
    """Tables that were copied to the device."""
    seen = []
    run = triton._Upload.run
    monkeypatch.setattr(triton._Upload, "run", lambda self, c: seen.append(c) or run(self, c))
    monkeypatch.setattr(triton.driver, "made", host_time.NoLaunches())
    return seen


@pytest.mark.parametrize(("moved", "tables"), [("nothing", 0), ("lr", 3)])
def test_host_time_is_that_of_steps_that_launch_nothing(cpu_backend, uploads, moved, tables):
    pipeline = host_time.HostOnly(moved)
    before = [param.detach().clone() for param in pipeline.params]
    for _ in range(2):
        pipeline.prepare()
        pipeline.step()
    assert pipeline.backend() == "triton" and 1 <= len(uploads) <= 2
    uploads.clear()
    for _ in range(3):
        pipeline.prepare()
        pipeline.step()
    assert len(uploads) == tables
    assert all(torch.equal(a, b) for a, b in zip(before, pipeline.params, strict=True))


def test_host_time_writes_rows_only_where_it_is_told_to(cpu_backend, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    host_time.main(["--quick", "--rounds", "1", "--out", str(out)])
    assert triton.driver.made is None or type(triton.driver.made) is not host_time.NoLaunches
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["note"].split(";")[0] for row in rows] == [f"moved: {m}" for m in host_time.MOVED]
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert row["case"] == "host-300x1k" and int(row["tensors"]) == 300
        assert row["ratio_p50"] == row["reference"] == ""
    assert capsys.readouterr().out.count("\n") == 3 + len(rows)


def test_script_is_well_formed_bash():
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and "--dry-run" in done.stdout and "--record" in done.stdout
    command = ["bash", str(script), "--record", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "measures nothing" in done.stderr
