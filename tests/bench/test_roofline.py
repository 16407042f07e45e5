"""The roofline's bytes and times; tests/docs/test_tables.py looks at the page that shows them."""

from __future__ import annotations

import re
from typing import Any

import bench_helpers  # noqa: F401
import pytest

from benchmarks import clocks, roofline, stream
from benchmarks.traffic import Options, memory_per_param, traffic
from fusedopt.backends import records

_BOTH: dict[str, Any] = {"clip": True, "scaler": "ours"}


@pytest.mark.parametrize(
    ("options", "ours", "norm_free", "fused", "foreach"),
    [
        (Options(**_BOTH), 32, 28, 48, 100),
        (Options("sgd-momentum", **_BOTH), 24, 20, 40, 64),
        (Options("sgd", **_BOTH), 16, 12, 32, 44),
        (Options(params="fp16", **_BOTH), 30, 28, 60, 112),
        (Options("sgd-momentum", "fp16", **_BOTH), 22, 20, 52, 76),
    ],
)
def test_floors(options: Options, ours: int, norm_free: int, fused: int, foreach: int) -> None:
    """Counted by hand from the sources, before this was written."""
    counted = traffic(options)
    update = counted.sweeps[-1]
    assert (counted.floor, update.floor) == (ours, norm_free)
    assert traffic(options, "torch fused").total == fused
    assert traffic(options, "torch foreach").total == foreach


def test_what_moves_the_bytes_of_adamw() -> None:
    """The stream; and, as the page of predictions says, bf16 params with masters."""
    assert traffic(roofline.PREDICTED).total == stream.BYTES_PER_PARAM
    half = Options(params="bf16", **_BOTH)
    for bytes_of in (lambda options: traffic(options).total, memory_per_param):
        assert bytes_of(half) == bytes_of(roofline.PREDICTED)


# ---- the time -----------------------------------------------------------------------------------


def test_bytes_over_bandwidth_and_what_is_fixed() -> None:
    assert roofline.predict_seconds(32, 10**9, 4e12) == pytest.approx(8e-3)
    assert roofline.predict_seconds(32, 10**9, 4e12, fixed_s=5e-6) == pytest.approx(8.005e-3)
    sharded = roofline.predict_seconds(32, 10**9, 4e12, ranks=8, alpha_s=1e-3)
    assert sharded == pytest.approx(1e-3 + 3e-3)
    assert roofline.predict_seconds(1, 9, 1.0, ranks=8, alpha_s=0.0) == 2  # the fullest rank
    ranks = [roofline.ranks_needed(numel, 16, 100_000.0) for numel in (1, 5_000, 5_001, 80_001)]
    assert ranks == [1, 1, 2, 32]  # the fewest with room


def test_a_message_goes_up_a_tree_and_down() -> None:
    inside = 6.8e-6 + 2 * 7 * 0.6e-6
    assert roofline.message_seconds(8, 1) == pytest.approx(inside)
    hop = 5e-6 + 192 / 50e9
    assert roofline.message_seconds(64, 8) == pytest.approx(inside + 2 * 3 * hop)
    assert roofline.message_seconds(4, 4) == pytest.approx(6.8e-6 + 2 * 2 * hop)
    assert roofline.message_seconds(100_000, 12_500) == pytest.approx(inside + 2 * 14 * hop)
    assert roofline.MESSAGE_BYTES == 8 * records.WORDS


def test_steps_of_many_ranks_by_hand() -> None:
    """The bytes of a shard over the bandwidth, the launches, and the messages."""
    table = roofline.many_ranks()
    assert table.startswith("**PREDICTED, not measured")
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in table.splitlines()}
    shard_ms = 1e3 * 32 * 8_030_261_248 / 64 / (0.85 * 3350e9)
    assert cells["| 64"][0] == f"{shard_ms + 0.005 + 0.045:.3g} ms (45 us)"
    whole_ms = 1e3 * 40 * 8_030_261_248 / 8 / (0.85 * 3350e9)
    assert cells["| 100,000"][3] == f"{whole_ms + 0.005 + 0.015:.3g} ms (15 us)"
    assert cells["| 8"][5] == cells["| 8"][1] + " |", "a mesh dimension of one rank has no message"


@pytest.mark.parametrize("flag", ["--bandwidth", "--numel"])
@pytest.mark.parametrize("value", ["0", "nan", "inf", "many"])
def test_numbers_that_make_no_sense_are_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        roofline.parse([flag, value])
    assert flag in capsys.readouterr().err


def test_the_ceiling_is_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([1000.0, 1.0, 2000.0, 0.5, 4.0])

    def sampler(self: object, pipeline: stream.Stream) -> clocks.Sampler:
        return lambda: (lambda ms: clocks.Sample((ms,), ms > 500))(next(taken))

    monkeypatch.setattr(clocks.HostClock, "sampler", sampler)
    monkeypatch.setattr(stream, "_compiled", lambda: lambda *arguments: 0.0)
    assert stream.ceiling_gb_s(100_000, rounds=5) == pytest.approx(3.2)
    monkeypatch.setattr(stream, "_compiled", lambda: None)
    assert stream.ceiling_gb_s(100_000) is None


# ---- the command ----------------------------------------------------------------------------


def test_predictions_are_marked() -> None:
    table = roofline.predictions()
    assert "**PREDICTED, not measured" in table
    rows = [line for line in table.splitlines() if re.match(r"\| 1?\d*[MBT] ", line)]
    assert all(line.count(" ms (") == len(roofline.GPUS) for line in rows)
    assert len(rows) % len(roofline.NUMELS) == 0 and rows


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    half = ["--params", "bf16", "--clip", "--scaler", "ours"]
    roofline.main([*half, "--bandwidth", "32", "--numel", "1e6"])
    out = capsys.readouterr().out
    assert "**32**, floor 30" in out and "16 bytes per parameter" in out
    assert "| fusedopt | 1 ms |" in out
    roofline.main(["--no-masters", "--params", "fp16", "--optimizer", "sgd"])
    assert "| fusedopt | update | grad 2, param 2 | param 2 | 6 |" in capsys.readouterr().out
    roofline.main(["--table"])
    assert capsys.readouterr().out == roofline.predictions() + "\n"
