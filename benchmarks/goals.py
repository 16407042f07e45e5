"""What the project works towards on its own machines, and what it predicted before it measured.

Predictions are for an H200: bytes over the bandwidth assumed for a copy, times the share of it that
such kernels are expected to reach; and the host's time per step, fixed and per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.cases import Case
from benchmarks.rows import Figure, find, markdown

SAY = """\
goals: what the project works towards on its own machines (2 threads of an Intel Xeon and an AMD
EPYC; an H200, before anything was measured there). MISSED is a result and no failure; on another
machine it says little. open: not measured, or disturbed."""


class Goal(NamedTuple):
    case: str
    pipeline: str
    of: str  # `ratio` against the reference, `share` of the ceiling, `floors` (its inverse), `time`
    at_least: bool
    value: float
    reference: str = ""
    figure: str = "step"

    def measured(self, known: Sequence[Figure]) -> float | None:
        named = {"case": self.case, "pipeline": self.pipeline, "figure": self.figure}
        against = {"reference": self.reference} if self.reference else {}
        found = find((figure for figure in known if figure.quiet()), **named, **against)
        if found is None or (self.of in _AT_CEILING and not found.predicted()):
            return None
        if self.of == "ratio":
            return found.ratio().median
        if self.of in _AT_CEILING:
            over = found.over_predicted().median
            return over if self.of == "floors" else 1.0 / over
        return found.median()

    def line(self, known: Sequence[Figure], dry: bool) -> tuple[str, ...]:
        against = f" against {self.reference}" if self.reference else ""
        unit = _UNITS.get(self.figure if self.of == "time" else self.of, f" {self.of}")
        wanted = f"{'>=' if self.at_least else '<='} {self.value:g}{unit}"
        what = f"{self.case}: {self.pipeline}{against}, {self.figure}"
        measured = None if dry else self.measured(known)
        if measured is None:
            return what, wanted, "DRY RUN" if dry else "not measured", "open"
        met = measured >= self.value if self.at_least else measured <= self.value
        return what, wanted, f"{measured:.3g}", "met" if met else "MISSED"


_AT_CEILING = ("share", "floors")
_UNITS = {"ratio": "x", "host": " us", "wall": " ms", "dram_deviation": " %"}


def _ratio(case: str, pipeline: str, reference: str, value: float, figure: str = "step") -> Goal:
    return Goal(case, pipeline, "ratio", True, value, reference, figure)


OURS = "fusedopt_adamw"
ON_CPU = (
    _ratio("adamw-gpt-1M", OURS, "adamw_fused", 10.0),
    _ratio("adamw-one-1M", OURS, "adamw_fused", 3.5),
    _ratio("adamw-gpt-10M", OURS, "adamw_fused", 2.4),
    _ratio("adamw-one-10M", OURS, "adamw_fused", 1.7),
    _ratio("adamw-gpt-100M", OURS, "adamw_fused", 1.7),
    _ratio("adamw-gpt-100M", OURS, "adamw_foreach", 4.0),
    _ratio("adamw-gpt-100M", OURS, "adamw_deepspeed", 1.7),
    _ratio("adamw-gpt-100M", OURS, "stream_huge", 0.95),
    _ratio("sgd-gpt-100M", "fusedopt_sgd", "sgd_fused", 1.65),
    _ratio("bf16-gpt-100M", "fusedopt_adamw_bf16", "adamw_bf16_torch_ops", 2.0),
    _ratio("adamw-tiny", OURS, "adamw_fused", 25.0),
)
_LLAMA, _FP16_LLAMA, _SGD_LLAMA = "adamw-llama-1.24B", "fp16-llama-1.24B", "sgd-llama-1.24B"
_GPT2, _TRITON = "adamw-gpt2-124M", "fusedopt_adamw_triton"
FIRST_STEP = "first-step"
ON_GPU = (
    Goal(_LLAMA, "fusedopt_cuda:update:adamw:float32", "share", True, 0.95, figure="gpu"),
    Goal(_LLAMA, "fusedopt_cuda:reduce:float32", "share", True, 1.0, figure="gpu"),
    Goal(_LLAMA, OURS, "floors", False, 1.06, figure="gpu"),
    Goal(_GPT2, OURS, "floors", False, 1.06, figure="gpu"),
    _ratio(_LLAMA, OURS, "adamw_fused", 1.75, "gpu"),
    _ratio(_SGD_LLAMA, "fusedopt_sgd", "sgd_fused", 1.9, "gpu"),
    _ratio(_LLAMA, OURS, "adamw_foreach", 3.5, "gpu"),
    _ratio(_FP16_LLAMA, "fusedopt_adamw_fp16", "megatron_fp16", 2.3, "gpu"),
    _ratio(_FP16_LLAMA, "fusedopt_adamw_fp16", "deepspeed_fp16", 3.0, "gpu"),
    _ratio("adamw-resnet50", OURS, "adamw_fused", 4.0, "wall"),
    _ratio("adamw-1M", OURS, "adamw_fused", 15.0, "wall"),
    Goal("adamw-300x1k", OURS, "time", False, 25.0, figure="host"),
    Goal("adamw-300x1k", f"{OURS}_amp_scaling", "time", False, 110.0, figure="host"),
    Goal("adamw-400M", "fusedopt_cuda:adamw:float32", "time", False, 3.0, figure="dram_deviation"),
    Goal(_LLAMA, "fusedopt_triton:update:adamw:float32", "share", True, 0.92, figure="gpu"),
    Goal(_GPT2, "fusedopt_triton:update:adamw:float32", "share", True, 0.92, figure="gpu"),
    Goal(_FP16_LLAMA, "fusedopt_triton:update:adamw:float16", "share", True, 0.92, figure="gpu"),
    Goal(_SGD_LLAMA, "fusedopt_triton:update:sgd-momentum:float32", "share", True, 0.92,
         figure="gpu"),
    Goal(_LLAMA, _TRITON, "floors", False, 1.10, figure="gpu"),
    Goal(_GPT2, _TRITON, "floors", False, 1.10, figure="gpu"),
    Goal("adamw-300x1k", _TRITON, "time", False, 120.0, figure="host"),
    Goal(FIRST_STEP, f"{_TRITON}:empty", "time", False, 20_000.0, figure="wall"),
    Goal(FIRST_STEP, f"{_TRITON}:filled", "time", False, 3_000.0, figure="wall"),
)  # fmt: skip


def table(goals: Sequence[Goal], known: Sequence[Figure], dry: bool = False) -> str:
    lines = [goal.line(known, dry) for goal in goals]
    return f"{SAY}\n\n" + markdown(("goal", "wanted", "measured", ""), lines)


# ---- predictions ---------------------------------------------------------------------------------

H200_COPY = 4.3e12  # bytes/s, read and written: assumed for a copy
LAUNCHES_MS = 0.005
# Of the copy's bandwidth the share that is expected: of ours, ours on Triton or under torch's
# scaler; of the others 0.80 where nothing else stands here. And the host's microseconds per step
# and per tensor, and whether it waits for the GPU within the step.
EFFICIENCY = {"megatron_fp16": 0.78, "deepspeed_fp16": 0.75, "adamw_bf16_torch_ops": 0.75,
              "te_fused_adam": 0.65, "apex_fused_adam": 0.65, "flashoptim_adamw": 0.50,
              "bitsandbytes_adamw8bit": 0.40, "adamw_compiled": 0.85}  # fmt: skip
HOST_US = {"adamw_fused": (150, 2.9), "sgd_fused": (150, 2.9), "adamw_foreach": (300, 4.0),
           "adamw_compiled": (250, 4.0), "adamw_bf16_torch_ops": (180, 3.5),
           "sgd_foreach": (200, 3.0), "megatron_fp16": (200, 8.0), "deepspeed_fp16": (200, 25.0),
           "flashoptim_adamw": (200, 40.0), "bitsandbytes_adamw8bit": (200, 30.0)}  # fmt: skip
# Of a process with Triton, by what is in Triton's cache: three kernels to compile, one launcher.
FIRST_STEP_MS = {"empty": 6000.0, "filled": 900.0}
WAIT = ("adamw_foreach", "adamw_compiled", "sgd_foreach", "megatron_fp16", "deepspeed_fp16")


def predicted_ms(pipeline: str, bytes_per_param: float, case: Case) -> tuple[float, float]:
    """The GPU's time and the wall's, on an H200."""
    efficiency, host_us = EFFICIENCY.get(pipeline, 0.80), HOST_US.get(pipeline, (200, 4.0))
    if pipeline.startswith("fusedopt_"):
        efficiency, host_us = 0.96, (12, 0.04)
        if pipeline.endswith("_triton"):  # the copy of the table and an event are in it
            efficiency, host_us = 0.93, (60, 0.04)
        elif pipeline.endswith("_amp_scaling"):
            efficiency, host_us = 0.92, (70, 0.13)
    gpu = 1e3 * bytes_per_param * case.numel / (efficiency * H200_COPY) + LAUNCHES_MS
    host = 1e-3 * (host_us[0] + host_us[1] * len(case.shapes()))
    return gpu, gpu + 0.5 * host if pipeline in WAIT else max(gpu, host) + 0.01
