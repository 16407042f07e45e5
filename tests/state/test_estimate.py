"""What `estimate_memory` and `python -m fusedopt memory` say is what `memory_footprint()` finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt import memory_report, sizes
from fusedopt.__main__ import main

MODELS = {
    "fp32": lambda: nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200), nn.Linear(200, 77)),
    "fp16": lambda: nn.Sequential(nn.Conv2d(3, 70, 5), nn.Linear(200, 77)).half(),
    "bf16": lambda: nn.TransformerEncoderLayer(64, 4, 200).bfloat16(),
}
OPTIMIZERS = {
    "adamw": (fusedopt.FusedAdamW, {}),
    "amsgrad": (fusedopt.FusedAdamW, {"amsgrad": True}),
    "sgd": (fusedopt.FusedSGD, {"momentum": 0.9}),
    "plain": (fusedopt.FusedSGD, {}),
    "lion": (fusedopt.FusedLion, {}),
}


def model_for_tests() -> nn.Module:
    return nn.Linear(64, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_optimizer(cpu_backend: str, name: str, kind: str) -> None:
    cls, options = OPTIMIZERS[kind]
    model = MODELS[name]()
    next(model.parameters()).requires_grad_(False)
    options = {**options, "max_grad_norm": 1.0}
    modes = fusedopt.estimate_memory(model, cls, activations=5, **options).modes
    assert len(modes) >= 2
    for mode in modes:
        opt = cls(model.parameters(), backend="cpu", **options, **mode.arguments)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        opt.step()
        found = opt.memory_footprint()
        wanted = {"param": mode.param, "grad": mode.grad, **mode.state}
        assert found == {**wanted, "plan": mode.plan, "total": mode.peak - 5}, mode.name


def test_gaps_are_staged_with_their_gradients(cpu_backend: str) -> None:
    param = nn.Parameter(torch.randn(100, 200)[:, :100])
    (param**2).sum().backward()
    opt = fusedopt.FusedAdamW([param], backend="cpu")
    opt.step()
    (mode,) = fusedopt.estimate_memory([param]).modes[:1]
    assert opt.memory_footprint()["plan"] == mode.plan + mode.staging


def test_modes_that_would_be_refused_are_left_out() -> None:
    params = [nn.Parameter(torch.ones(9, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    assert [mode.arguments for mode in fusedopt.estimate_memory(params).modes] == [{}]
    with pytest.raises(ValueError, match="some parameters are fp16"):
        half = nn.Parameter(torch.ones(9, dtype=torch.float16))
        fusedopt.estimate_memory([half], master_weights="remainder8")


def test_what_is_asked_for_comes_first_and_budgets_decide() -> None:
    whole = torch.empty(10_000_000, dtype=torch.bfloat16, device="meta", requires_grad=True)
    estimate = fusedopt.estimate_memory([whole], state_dtype="bf16", budget=145_000_000)
    first, *others = estimate.modes
    assert first.arguments == {"state_dtype": "bf16"} and first.fits
    assert [mode.fits for mode in others[:2]] == [False, True]
    assert estimate.best() is first and "state_dtype='bf16'" in str(estimate).splitlines()[1]
    assert others[0].arguments == {} and others[0].traffic == pytest.approx(30)
    none = fusedopt.estimate_memory([whole], budget=1)
    assert none.best() is None and not any(mode.fits for mode in none.modes)
    small = fusedopt.estimate_memory(whole, max_grad_norm=1.0).modes[3]
    assert small.traffic == pytest.approx(16 + 4 / 128)
    assert small.peak - small.plan == pytest.approx((8 + 2 / 128) * whole.numel(), rel=1e-6)


def test_groups_and_names_are_taken() -> None:
    groups = [{"params": [("a", torch.ones(5000))]}, {"params": torch.ones(4), "state_dtype": None}]
    for group in groups:
        entry = group["params"][0]
        (entry[1] if isinstance(entry, tuple) else group["params"]).requires_grad_()
    estimate = fusedopt.estimate_memory(groups, state_dtype="8bit")
    assert estimate.modes[0].state["exp_avg_log8"] == 5000
    assert estimate.modes[0].state["exp_avg"] == 16


def test_bad_options_are_refused_as_by_the_optimizer() -> None:
    with pytest.raises(ValueError, match="Invalid state_dtype value: '4bit'"):
        fusedopt.estimate_memory(nn.Linear(2, 2), state_dtype="4bit")
    with pytest.raises(ValueError, match="with amsgrad=True"):
        fusedopt.estimate_memory(nn.Linear(2, 2), state_dtype="8bit", amsgrad=True)


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n"), [("350M", 350e6), ("1.5B", 1.5e9), ("7", 7), ("2k", 2000)], ids=str
)
def test_counts(text: str, n: float) -> None:
    assert memory_report.count(text) == n


@pytest.mark.parametrize(("text", "n"), [("8G", 8 << 30), ("8GiB", 8 << 30), ("1.5m", 3 << 19)])
def test_byte_sizes(text: str, n: int) -> None:
    assert memory_report.size(text) == n


@pytest.mark.parametrize("text", ["", "G", "8X", "-1", "0"])
def test_what_is_no_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "--params", "1M", f"--budget={text}"])
    assert "is not a size, such as 8G" in capsys.readouterr().err


def test_the_table_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--params", "400M", "--dtype", "fp16", "--budget", "5.5G"]) == 0
    text = capsys.readouterr().out
    line = "FusedAdamW(params, max_grad_norm=1.0, master_weights='remainder')"
    assert text.rstrip().endswith(line)
    assert main(["memory", "--params", "9B", "--optimizer", "sgd", "--budget", "8G"]) == 1
    assert "none of these fits" in capsys.readouterr().out


def test_json_has_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--params", "1M", "--dtype", "bf16", "--json"]) == 0
    modes = json.loads(capsys.readouterr().out)
    assert modes[0]["param"] == 2_000_000 and modes[0]["state"]["exp_avg"] == 4_000_000


def test_files_and_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "model.pt"
    model = nn.Linear(64, 64)
    torch.save(model.state_dict(), saved)
    header = {"w": {"dtype": "BF16", "shape": [64, 65], "data_offsets": [0, 8320]}}
    text = json.dumps({"__metadata__": {}, **header}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    for what, n_bytes in ((saved, 4 * 4160), (file, 2 * 4160)):
        assert main(["memory", str(what), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["param"] == n_bytes
    command = [
        sys.executable,
        "-m",
        "fusedopt",
        "memory",
        "test_estimate:model_for_tests",
        "--json",
    ]
    told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)[0]["param"] == 2 * 4160


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt", "module.pt"])
def test_files_that_hold_no_tensors_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(range(1, 101)))
    if name == "module.pt":
        torch.save(nn.Linear(2, 2), path)
    with pytest.raises(SystemExit, match="cannot be read as tensors"):
        main(["memory", str(path)])


def test_whole_checkpoints_are_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("model", "state_dict", "model_state_dict"):
        torch.save({key: nn.Linear(64, 64).state_dict(), "epoch": 3}, tmp_path / "c.pt")
        assert main(["memory", str(tmp_path / "c.pt"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["param"] == 4 * 4160


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no-such-file", "is no file; name a file, or module:function"),
        ("no_such_module:f", "cannot be imported"),
        ("torch:ones", "cannot make|is no|made a|missing|arguments"),
    ],
)
def test_what_is_no_model_is_refused(name: str, match: str) -> None:
    with pytest.raises((SystemExit, TypeError), match=match):
        main(["memory", name])


# ---- no room -------------------------------------------------------------------------------------


def test_when_there_is_no_room_the_error_says_what_takes_less(
    cpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedopt.plan import state

    def fails(likes: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(state, "unfilled_state", fails)
    param = nn.Parameter(torch.ones(1 << 20, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    opt = fusedopt.FusedAdamW([param])
    with pytest.raises(torch.OutOfMemoryError) as error:
        opt.step()
    told = str(error.value)
    assert told.startswith(
        "CUDA out of memory. Tried to allocate 2.00 MiB; the state of FusedAdamW"
    )
    assert "takes 12.00 MiB; pass `master_weights='dither', state_dtype='8bit'`" in told
    assert not opt.state and torch.equal(param.detach(), torch.ones_like(param))
    opt = fusedopt.FusedAdamW([param], master_weights="dither", state_dtype="8bit")
    with pytest.raises(torch.OutOfMemoryError, match="and there is no smaller one"):
        opt.init_state()
    param.grad, param.data = None, param.data.float()  # "dither" has no meaning for it: no advice
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 MiB$") as error:
        opt.init_state()
    assert error.value.__cause__ is not error.value


@pytest.mark.parametrize(("n", "text"), [(5, "5 B"), (2048, "2.00 KiB"), (3 << 40, "3.00 TiB")])
def test_sizes_are_readable(n: int, text: str) -> None:
    assert sizes.readable(n) == text
