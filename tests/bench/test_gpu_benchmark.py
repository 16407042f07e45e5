"""The GPU benchmark, as far as it goes without a GPU. No test asserts a time."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from bench_helpers import ROOT, read

from benchmarks import cases, clocks, goals, host_time, kernels, param_sets, registry, verbs
from benchmarks.gpu import (
    first_step as gpu_first_step,
    machine as gpu_machine,
    sanitize as gpu_sanitize,
    step as gpu_step,
)
from fusedopt.backends import cuda, triton

CPU = {"cuda": "cpu", "triton": "cpu"}
DRY_CASES = ["fp16-llama-1.24B", "bf16-gpt2-124M", "adamw-gpt2-bucket"]
CASES = cases.gpu_cases()


def size(shapes: list[param_sets.Shape]) -> tuple[int, int]:
    return sum(map(math.prod, shapes)), len(shapes)


def test_models_have_their_published_sizes():
    assert size(param_sets.resnet50()) == (25_557_032, 161)
    assert size(param_sets.gpt2()) == (124_439_808, 148)
    assert size(param_sets.llama_3_2_1b()) == (1_235_814_400, 146)
    ragged = param_sets.ragged()
    assert len(ragged) == 2000 and ragged == param_sets.ragged()
    assert 1 <= min(ragged)[0] < 10 and 4990 < max(ragged)[0] <= 5000
    assert size(CASES["adamw-1M"].shapes()) == (1_000_000, 160)
    assert len(CASES["adamw-300x1k"].shapes()) == 300


def test_every_case_is_complete_and_documented():
    kinds = registry.gpu_kinds(CPU)
    for case in CASES.values():
        assert case.pipelines[0].startswith("fusedopt_")
        assert set(case.pipelines) <= set(kinds)
        assert {c.pipeline for c in case.comparisons} == {case.pipelines[0]}
    assert {*gpu_step.KERNELS, *cases.QUICK_GPU_CASES} <= set(CASES)
    assert CASES["adamw-gpt2-bucket"].grads == "bucket"
    text = (ROOT / "docs" / "gpu_benchmark.md").read_text()
    named = [*CASES, *clocks.EventClock.units, "launches", "dram_bytes_per_param"]
    assert [name for name in named if f"`{name}`" not in text] == []


def test_every_goal_asks_for_what_is_measured():
    for goal in goals.ON_GPU:
        _, _, kernel = goal.pipeline.partition(":")
        if goal.case == goals.FIRST_STEP:
            assert kernel in gpu_first_step.SAMPLES and goal.figure == "wall"
        elif goal.figure == "dram_deviation":
            assert kernel == str(gpu_step.ADAMW)
        elif kernel:
            assert kernel in {gpu_step.KERNELS[goal.case].kernel(verb) for verb in verbs.VERBS}
        else:
            assert {goal.pipeline, *filter(None, [goal.reference])} <= {*CASES[goal.case].pipelines}
            assert goal.figure in clocks.EventClock.units


def test_predictions_follow_the_bytes():
    kinds, case = registry.gpu_kinds(CPU), CASES["adamw-llama-1.24B"]
    predicted = {
        name: goals.predicted_ms(name, kinds[name].bytes_per_param, case)[0]
        for name in case.pipelines
    }
    assert 9.2 < predicted["fusedopt_adamw"] < 10.1  # 32 B at 4.3 TB/s are 9.20 ms
    assert 17 < predicted["adamw_fused"] < 18


# ---- dry runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patch():
    """The backends' drivers, for which a dry run makes others, and the threads are restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        for backend in (cuda, triton):
            patched.setattr(backend.driver, "made", backend.driver.made)
        patched.setattr(gpu_step.signal, "signal", lambda *_: None)
        yield patched
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dry_run(patch, tmp_path_factory):
    out = tmp_path_factory.mktemp("dry-run") / "rows.csv"
    options = ["--dry-run", "--goals", "--out", str(out), "--cases", *DRY_CASES]
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        say = lambda *words, **_: told.append(" ".join(map(str, words)))  # noqa: E731
        patched.setattr(gpu_step, "print", say, raising=False)
        assert gpu_step.main(options) == 0, told
    return "\n".join(told), read(out)


def test_dry_run_has_well_formed_rows(cpu_backend, dry_run):
    output, rows = dry_run
    by_name = {(r["case"].removeprefix("dry-run:"), r["pipeline"], r["reference"], r["figure"]): r
               for r in rows}  # fmt: skip
    assert len(by_name) == len(rows)
    absent = set(registry.unavailable(registry.gpu_kinds(CPU)))
    for name in DRY_CASES:
        ours, *rivals = CASES[name].pipelines
        for rival in rivals:
            for figure, unit in clocks.EventClock.units.items():
                row = by_name.pop((name, ours, rival, figure), None)
                if row is None:
                    assert absent and f"{name}: {rival} not measured" in output
                    continue
                assert row["unit"] == unit and "predicted fusedopt" in row["note"]
                assert all(float(row[c]) > 0 for c in ("bytes_per_param", "reference_bytes",
                                                       "ceiling_gb_s", "params"))  # fmt: skip
        for pipeline in CASES[name].pipelines:
            launches = by_name.pop((name, pipeline, "", "launches"), {"values": "1"})
            assert int(launches["values"]) > 0
    wanted = {
        (case, f"fusedopt_{backend}:{kernel}", "", figure)
        for backend in ("cuda", "triton")
        for case, kernel, figure in (
            ("fp16-llama-1.24B", "reduce:float16", "gpu"),
            ("fp16-llama-1.24B", "update:adamw:float16", "gpu"),
            ("adamw-400M", "adamw:float32", "dram_bytes_per_param"),
            ("adamw-400M", "adamw:float32", "dram_deviation"),
        )
    }
    wanted |= {("first-step", f"fusedopt_adamw_triton:{cache}", "", "wall")
               for cache in ("empty", "filled")}  # fmt: skip
    wanted |= {("bandwidth", name, "", "gpu") for name in ("copy", "read", "step")}
    assert set(by_name) == wanted


def test_nothing_in_a_dry_run_looks_like_a_measurement(cpu_backend, dry_run):
    output, rows = dry_run
    assert all(row["machine"] == gpu_machine.DRY_RUN for row in rows)
    assert all(row["note"].startswith(gpu_machine.DRY_RUN) for row in rows)
    assert all(row["case"].startswith("dry-run:") for row in rows)
    assert output.count("DRY RUN, a tiny list") == len(DRY_CASES)
    assert output.count("| DRY RUN | open |") == len(goals.ON_GPU)
    assert "MISSED |" not in output and "| met |" not in output and goals.SAY in output


def test_dry_sweep_of_the_kernels_has_rows_and_no_figures(cpu_backend, patch, tmp_path, capsys):
    options = ["--backends", "cuda", "triton", "--dry-run", "--sizes", "10:12"]
    options += ["--rules", "adamw", "sgd", "--dtypes", "bfloat16"]
    assert kernels.main([*options, "--out", str(tmp_path / "rows.csv")]) == 0
    rows, told = read(tmp_path / "rows.csv"), capsys.readouterr().out
    assert all(row["machine"] == gpu_machine.DRY_RUN for row in rows)
    assert all(row["note"].startswith(gpu_machine.DRY_RUN) for row in rows)
    assert "GB/s" not in told and told.count("DRY RUN, no figures") == 1
    timed = {(r["case"], r["pipeline"]): r for r in rows if "bandwidth" not in r["case"]}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu_step.main([])
    with pytest.raises(SystemExit, match="--dry-run"):
        kernels.main(["--backends", "cuda"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sanitized_program_takes_the_steps_of_the_cpu(
    backend, cpu_backend, patch, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["sanitize", backend, "--dry-run"])
    assert gpu_sanitize.main() == 0
    said = capsys.readouterr().out
    assert said.count("same bits as the CPU backend") == len(gpu_sanitize.CASES)


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


def test_host_time_writes_rows_only_where_it_is_told_to(
    cpu_backend, restore_threads, tmp_path, capsys
):
    out = tmp_path / "rows.csv"
    host_time.main(["--quick", "--rounds", "1", "--out", str(out)])
    assert triton.driver.made is None or type(triton.driver.made) is not host_time.NoLaunches
    rows = read(out)
    assert {row["note"].split(";")[0] for row in rows} == {"moved: gradients", "moved: lr"}
    for row in rows:
        assert row["case"] == "host-300x1k" and int(row["tensors"]) == 300
        still = f"{host_time.PIPELINE}:nothing"
        assert (row["reference"], row["figure"], row["unit"]) == (still, "host", "us")
    assert capsys.readouterr().out.count("\n") == 3 + len(rows)


def test_script_is_well_formed_bash():
    script = str(ROOT / "benchmarks" / "gpu.sh")
    subprocess.run(["bash", "-n", script], check=True)
    for options, said in ((["--help"], "--dry-run    "), (["--record", "--dry-run"], "nothing")):
        done = subprocess.run(["bash", script, *options], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stdout + done.stderr
