"""The examples run, print what they promise, and notice a checkpoint that does not restore."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedopt

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"
# Half-precision training multiplies the last bits in which torch and fusedopt may differ.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
Table = list[dict[str, str]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Import an example afresh, as a script would find its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = (
        *("common", "characters", "curves"),
        *("train_digits", "train_char_transformer", "train_sharded"),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: a second thread gains nothing and may have to wait
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


@pytest.fixture
def run(load, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """What an example prints that is run on the CPU with these options."""

    def run(name: str, *options: str, status: int = 0, from_the_command_line: bool = False) -> str:
        argv = ["--device", "cpu", "--out", str(tmp_path), *options]
        if from_the_command_line:
            monkeypatch.setattr(sys, "argv", [name, *argv])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            assert ended.value.code == status
        else:
            assert load(name).main(argv) == status
        return "".join(capsys.readouterr())

    return run


def table(output: str) -> Table:
    """The rows under the line that begins with "run"; columns end where their titles end."""
    lines = output.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("run "))
    header = lines[start].split("  ")
    titles = [title.strip() for title in header if title.strip()]
    rows = []
    for line in lines[start + 1 :]:
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if len(cells) != len(titles):
            break
        rows.append(dict(zip(titles, cells, strict=True)))
    return rows


def assert_close(rows: Table, column: str, tolerance: float) -> None:
    first, *others = (float(row[column].rstrip("%")) for row in rows)
    for other in others:
        assert other == pytest.approx(first, rel=tolerance), column


def assert_png(path: Path) -> None:
    from matplotlib import image

    pixels = image.imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.05  # not an empty sheet


def assert_shares(rows: Table) -> None:
    assert rows[0]["ratio"] == "1.00x"
    for row in rows:
        optimizer, whole = row["optimizer ms"], row["iteration ms"]
        assert 0 < float(optimizer) < float(whole)
        (least, most), (shortest, longest) = as_printed(optimizer), as_printed(whole)
        share = as_printed(row["share"].rstrip("%"))
        assert 100 * least / longest <= share[1] and share[0] <= 100 * most / shortest


def as_printed(text: str) -> tuple[float, float]:
    """Between which numbers one lies that was rounded to ``text``."""
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    return float(text) - half, float(text) + half


def check_digits(output: str, out: Path, tolerance: float) -> None:
    rows = table(output)
    _, stock, ours = rows
    assert_shares(rows)
    assert_close(rows, "loss", tolerance)
    assert_close(rows, "grad norm", tolerance)
    assert {row["skipped"] for row in rows} == {"0"}
    for column in ("accuracy", "loss", "grad norm"):  # which scaler asks must not matter at all
        assert stock[column] == ours[column]
    assert "identical to the last bit" in output
    assert_png(out / "digits.png")


def test_digits_from_the_command_line(run, tmp_path) -> None:
    """In steps enough to learn something."""
    printed = run("train_digits", "--steps", "20", from_the_command_line=True)
    assert "20/20" in printed  # the progress bar
    check_digits(printed, tmp_path, TOLERANCE["bf16"])
    assert all(float(row["accuracy"].rstrip("%")) > 80 for row in table(printed))
    saved = torch.load(tmp_path / "digits.pt", weights_only=True)
    assert saved["steps"] == 10
    assert saved["scheduler"]["last_epoch"] == 10


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("fp32", ["--optimizer", "sgd", "--backend", "reference", "--seed", "3"]),
        ("fp32", ["--baseline", "foreach"]),
        ("fp16", ["--optimizer", "sgd"]),
    ],
)
def test_digits_options(run, load, dtype, options, tmp_path, monkeypatch) -> None:
    if dtype == "fp16":  # whose convolutions are slow on a CPU
        monkeypatch.setattr(load("train_digits"), "BATCH", 8)
    printed = run("train_digits", "--steps", "4", "--dtype", dtype, *options)
    check_digits(printed, tmp_path, TOLERANCE[dtype])
    baseline = "foreach" if "--baseline" in options else "fused"
    assert table(printed)[0]["run"] == f"torch.optim, {baseline}"
    saved = torch.load(tmp_path / "digits.pt", weights_only=True)
    for group in saved["optimizer"]["param_groups"]:  # the same mathematics as torch's
        assert group["decoupled_weight_decay"] is ("sgd" not in options)
    decays = [group["weight_decay"] > 0 for group in saved["optimizer"]["param_groups"]]
    assert decays == [True, False]


def test_digits_skip_the_same_steps(run, load, monkeypatch) -> None:
    """From a loss scale that overflows, all three come down by the same number of steps."""

    def from_the_top(scaler_class: type[torch.amp.GradScaler]) -> type[torch.amp.GradScaler]:
        class HighScaler(scaler_class):
            def __init__(self, device: str) -> None:
                super().__init__(device, init_scale=2.0**127)

        return HighScaler

    def steep(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 64 * torch.nn.functional.cross_entropy(logits, labels)

    monkeypatch.setattr(load("train_digits"), "F", SimpleNamespace(cross_entropy=steep))
    monkeypatch.setattr(torch.amp, "GradScaler", from_the_top(torch.amp.GradScaler))
    monkeypatch.setattr(fusedopt, "GradScaler", from_the_top(fusedopt.GradScaler))
    rows = table(run("train_digits", "--steps", "12"))
    (skipped,) = {int(row["skipped"]) for row in rows}
    assert 0 < skipped < 12
    assert_close(rows, "loss", TOLERANCE["bf16"])
    assert_close(rows, "grad norm", TOLERANCE["bf16"])


def test_digits_notice_what_a_checkpoint_forgot(run, load, monkeypatch) -> None:
    training = load("train_digits").Training
    restore = training.load_state_dict

    def forget_the_moments(self: object, state: dict[str, dict]) -> None:
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg"].zero_()
        restore(self, state)

    monkeypatch.setattr(training, "load_state_dict", forget_the_moments)
    assert "NOT identical" in run("train_digits", "--steps", "4", status=1)


def check_characters(output: str, out: Path, tolerance: float, batch: int = 4) -> None:
    rows = table(output)
    assert_shares(rows)
    assert_close(rows, "loss", tolerance)
    assert_close(rows, "grad norm", tolerance)
    for row in rows:
        per_ms = float(row["tokens/s"]) / 1e3
        assert per_ms == pytest.approx(32 * batch / float(row["iteration ms"]), rel=0.05)
    assert float(rows[-1]["loss"]) < 6.0
    assert "identical to the last bit" in output
    assert_png(out / "char_transformer.png")


def test_characters_from_the_command_line(run, tmp_path) -> None:
    printed = run("train_char_transformer", "--steps", "2", from_the_command_line=True)
    n_params = int(printed.split()[0].replace(",", ""))
    assert 10.5e6 < n_params < 11e6  # the alphabet, and so the embedding, differs between Pythons
    check_characters(printed, tmp_path, TOLERANCE["fp32"])


@pytest.mark.parametrize(
    ("optimizer", "dtype", "baseline", "batch"),
    [
        ("adamw", "fp32", "foreach", 2),
        ("adamw", "bf16", "fused", 4),
        ("adamw", "fp16", "fused", 4),
        ("sgd", "fp32", "foreach", 2),
        ("sgd", "fp16", "fused", 4),
    ],
)
def test_characters_options(run, load, optimizer, dtype, baseline, batch, tmp_path) -> None:
    options = ["--optimizer", optimizer, "--dtype", dtype, "--baseline", baseline]
    options += ["--steps", "6", "--batch", str(batch), "--layers", "1", "--width", "64"]
    printed = run("train_char_transformer", *options)
    check_characters(printed, tmp_path, TOLERANCE[dtype], batch)
    assert table(printed)[0]["run"] == f"torch.optim, {baseline}"
    saved = torch.load(tmp_path / "char_transformer.pt", weights_only=True)
    has_masters = ["master_param" in state for state in saved["optimizer"]["state"].values()]
    assert set(has_masters) == {dtype != "fp32"}
    example = load("train_char_transformer")
    inputs, targets = example.Text(example.parse_arguments(options)).batch(0)
    assert inputs.shape == targets.shape == (batch, example.CONTEXT)


# ---- on several ranks ----------------------------------------------------------------------------

SMALL = ["--layers", "1", "--width", "64", "--steps", "8", "--device", "cpu"]


def torchrun(ranks: int, script: Path, *options: str, status: int = 0) -> str:
    """What the script prints on so many ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), *options]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    # The installed package, before the checkout, in which the native module may be missing.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(
        command, env=environment, timeout=300, text=True, capture_output=True, check=False
    )
    printed = ended.stdout + ended.stderr
    assert (ended.returncode != 0) == (status != 0), printed
    return printed


def check_sharded(output: str, title: str, skipped: int = 0) -> None:
    rows = table(output)
    assert [row["run"] for row in rows] == ["one process", "one process, smaller parts", title]
    assert {row["skipped"] for row in rows} == {str(skipped)}
    assert_close(rows, "loss", 1e-3)
    assert_close(rows, "grad norm", 1e-2)
    assert float(rows[0]["loss off"]) == float(rows[0]["norm off"]) == 0
    assert f"{title}: agrees with one process" in output


def test_sharded_on_two_ranks_and_resumed_on_three(tmp_path) -> None:
    """fp16 with a scaler; and from FSDP2's checkpoint to DDP."""
    options = [*SMALL, "--out", str(tmp_path), "--dtype", "fp16"]
    script = EXAMPLES / "train_sharded.py"
    printed = torchrun(2, script, *options)
    check_sharded(printed, "2 ranks, FSDP2")
    assert "saved after step 6, loaded into fresh objects, run to 8: identical" in printed
    resumed = torchrun(3, script, *options, "--resume", "--ddp")
    check_sharded(resumed, "3 ranks, DDP")
    assert "resumed after step 6, which 2 ranks had saved" in resumed


def test_sharded_in_one_process(run, load, tmp_path, capsys) -> None:
    options = [*SMALL, "--dtype", "bf16", "--optimizer", "sgd"]
    printed = run("train_sharded", *options)
    assert "on two ranks: torchrun" in printed
    check_sharded(printed, "1 rank, FSDP2")
    assert "identical to the last bit" in printed
    resumed = run("train_sharded", *options, "--resume")
    check_sharded(resumed, "1 rank, FSDP2")
    other = [*options, "--out", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit, match="saved with other options; resume with `--seed 0`"):
        load("train_sharded").main([*other, "--seed", "1"])
    for wrong, message in (
        (["--out", str(tmp_path / "empty")], "--resume: no checkpoint in"),
        (["--accumulate", "5"], "--batch 12 is no multiple of --accumulate 5"),
    ):
        with pytest.raises(SystemExit):
            load("train_sharded").main([*other, *wrong])
        assert message in capsys.readouterr().err


def test_sharded_notices_what_a_checkpoint_forgot(run, load, monkeypatch) -> None:
    sharded = load("train_sharded").Sharded
    restore = sharded.load_state_dict

    def forget_the_moments(self: object, state: dict[str, dict]) -> None:
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg"].zero_()
        restore(self, state)

    monkeypatch.setattr(sharded, "load_state_dict", forget_the_moments)
    printed = run("train_sharded", *SMALL, "--batch", "2", status=1)
    assert "NOT identical" in printed
    assert "1 rank, FSDP2: agrees with one process" in printed


ALONE = """
import sys
import fusedopt.optimizer
import train_sharded

fusedopt.optimizer.ranks_of = lambda *arguments: None
sys.exit(train_sharded.main())
"""


def test_sharded_notices_ranks_that_clip_by_norms_of_their_own(tmp_path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{ALONE}")
    printed = torchrun(2, script, *SMALL, "--out", str(tmp_path), "--batch", "4", status=1)
    assert "2 ranks, FSDP2: does NOT agree with one process" in printed
    norm, bound = (float(row["norm off"]) for row in table(printed)[:0:-1])
    assert norm > 1e4 * bound


def test_agreement_is_judged_by_losses_and_norms(load, capsys) -> None:
    curves = load("curves")

    def judge(loss: float, norm: float) -> int:
        first = curves.Curve("first", [2.0, 4.0], [1.0, float("inf")], 1, 1.0, 1.0)
        second = curves.Curve("second", [2.0, 4.0002], [1.001, float("inf")], 1, 1.0, 1.0)
        ours = curves.Curve("ours", [loss], [norm], 1, 1.0, 1.0)  # of the last step alone
        status = curves.report_agreement([first, second, ours])
        assert ("does NOT agree" in capsys.readouterr().out) == (status == 1)
        return status

    inf = float("inf")
    assert judge(4.0, inf) == judge(4.0019, inf) == judge(3.9981, inf) == 0
    assert judge(4.0021, inf) == judge(4.0, 1.0) == judge(4.0, float("nan")) == 1
    assert judge(float("nan"), inf) == 1


def test_one_step_is_refused(load, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        load("train_digits").main(["--steps", "1", "--out", str(tmp_path)])
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err


def test_differences_sees_bits_not_values(load) -> None:
    common = load("common")

    def found(left: object, right: object) -> list[str]:
        return list(common.differences({"x": [left]}, {"x": [right]}))

    nan, half = torch.tensor(float("nan")), torch.ones(2, dtype=torch.bfloat16)
    assert found(nan, nan.clone()) == []
    assert found(half, half.clone()) == []
    assert found(1.5, 1.5) == []
    assert found(torch.tensor(0.0), torch.tensor(-0.0)) == ["/x/0"]
    assert found(half, half.float()) == ["/x/0"]
    assert found(torch.ones(2), torch.ones(3)) == ["/x/0"]
    assert found(torch.ones(2), None) == ["/x/0"]
    assert list(common.differences({"x": 1}, {"y": 1})) != []
    assert list(common.differences([1], [1, 2])) == [""]
