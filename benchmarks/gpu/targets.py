"""What was predicted before anything was measured, and what is to be reached.

Predictions: bytes over the bandwidth assumed for a copy on an H200, times the share of it that such
kernels are expected to reach; and the host's time per step, fixed and per tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.cases import GpuCase
from benchmarks.pipelines import Kind

H200_COPY = 4.3e12  # bytes/s, read and written


@dataclass(frozen=True)
class Prediction:
    efficiency: float  # of the copy's bandwidth
    host_us: float  # per step
    host_us_per_tensor: float
    waits: bool = False  # for the GPU within the step: host and GPU do not overlap

    def gpu_ms(self, kind: Kind, case: GpuCase) -> float:
        return 1e3 * kind.bytes_per_param * case.numel / (self.efficiency * H200_COPY) + 0.005

    def wall_ms(self, kind: Kind, case: GpuCase) -> float:
        gpu, host = self.gpu_ms(kind, case), 1e-3 * self.enqueue_us(case)
        return gpu + 0.5 * host if self.waits else max(gpu, host) + 0.01

    def enqueue_us(self, case: GpuCase) -> float:
        return self.host_us + self.host_us_per_tensor * len(case.shapes())


_OURS = Prediction(0.96, 12, 0.04)
_OURS_TRITON = Prediction(0.93, 60, 0.04)  # the copy of the table and an event are in it
_OURS_BY_TORCH = Prediction(0.92, 70, 0.13)
_FUSED = Prediction(0.80, 150, 2.9)
PREDICTIONS: dict[str, Prediction] = {
    "fusedopt_adamw": _OURS,
    "fusedopt_adamw_amp_scaling": _OURS_BY_TORCH,
    "fusedopt_adamw_fp16": _OURS,
    "fusedopt_adamw_fp16_amp_scaling": _OURS_BY_TORCH,
    "fusedopt_adamw_bf16": _OURS,
    "fusedopt_sgd": _OURS,
    "fusedopt_adamw_triton": _OURS_TRITON,
    "fusedopt_adamw_fp16_triton": _OURS_TRITON,
    "fusedopt_adamw_bf16_triton": _OURS_TRITON,
    "fusedopt_sgd_triton": _OURS_TRITON,
    "adamw_fused": _FUSED,
    "adamw_foreach": Prediction(0.80, 300, 4.0, waits=True),
    "adamw_compiled": Prediction(0.85, 250, 4.0, waits=True),
    "adamw_bf16_torch_ops": Prediction(0.75, 180, 3.5),
    "sgd_fused": _FUSED,
    "sgd_foreach": Prediction(0.80, 200, 3.0, waits=True),
    "megatron_fp16": Prediction(0.78, 200, 8.0, waits=True),
    "deepspeed_fp16": Prediction(0.75, 200, 25.0, waits=True),
    "te_fused_adam": Prediction(0.65, 200, 4.0),
    "apex_fused_adam": Prediction(0.65, 200, 4.0),
    "flashoptim_adamw": Prediction(0.50, 200, 40.0),
    "bitsandbytes_adamw8bit": Prediction(0.40, 200, 30.0),
}


# Of a process with Triton, by what is in Triton's cache: three kernels to compile, one launcher.
FIRST_STEP = "first-step"
FIRST_STEP_MS = {"empty": 6000.0, "filled": 900.0}


@dataclass(frozen=True)
class Target:
    """`figure` takes the lookup of a run's figures and gives None where one is missing."""

    label: str
    at_least: bool
    value: float
    figure: Callable[[Lookup], float | None]
    unit: str = ""

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.at_least else measured <= self.value


# Of a case and a pipeline, or a kernel: the p50 under a name, if it was measured.
Lookup = Callable[[str, str, str], "float | None"]


def _p50(case: str, pipeline: str, name: str) -> Callable[[Lookup], float | None]:
    return lambda figures: figures(case, pipeline, name)


def _floors(case: str, pipeline: str) -> Callable[[Lookup], float | None]:
    def times(figures: Lookup) -> float | None:
        fraction = figures(case, pipeline, "copy_fraction")
        return None if fraction is None else 1.0 / fraction

    return times


def _seconds(case: str, pipeline: str) -> Callable[[Lookup], float | None]:
    def first(figures: Lookup) -> float | None:
        ms = figures(case, pipeline, "wall_ms_p50")
        return None if ms is None else ms / 1e3

    return first


def _off_by(case: str, kernels: str) -> Callable[[Lookup], float | None]:
    def share(figures: Lookup) -> float | None:
        measured = figures(case, kernels, "dram_bytes_per_param")
        predicted = figures(case, kernels, "bytes_per_param")
        return None if not measured or not predicted else 100 * abs(measured / predicted - 1)

    return share


_LLAMA, _FP16_LLAMA, _SGD_LLAMA = "adamw-llama-1.24B", "fp16-llama-1.24B", "sgd-llama-1.24B"
_GPT2 = "adamw-gpt2-124M"
TARGETS = [
    Target("update kernel / copy bandwidth, 1.24B", True, 0.95,
           _p50(_LLAMA, "fusedopt_cuda:update:adamw:float32", "copy_fraction")),
    Target("norm kernel / copy bandwidth, 1.24B", True, 1.0,
           _p50(_LLAMA, "fusedopt_cuda:reduce:float32", "copy_fraction")),
    Target("whole step / its byte floor, 1.24B", False, 1.06,
           _floors(_LLAMA, "fusedopt_adamw")),
    Target("whole step / its byte floor, 124M", False, 1.06,
           _floors(_GPT2, "fusedopt_adamw")),
    Target("AdamW fp32, 1.24B, against fused=True", True, 1.75,
           _p50(_LLAMA, "adamw_fused", "gpu_ratio_p50"), "x"),
    Target("SGD momentum, 1.24B, against fused=True", True, 1.9,
           _p50(_SGD_LLAMA, "sgd_fused", "gpu_ratio_p50"), "x"),
    Target("AdamW fp32, 1.24B, against foreach", True, 3.5,
           _p50(_LLAMA, "adamw_foreach", "gpu_ratio_p50"), "x"),
    Target("fp16 with masters, 1.24B, against Megatron-style", True, 2.3,
           _p50(_FP16_LLAMA, "megatron_fp16", "gpu_ratio_p50"), "x"),
    Target("fp16 with masters, 1.24B, against DeepSpeed-style", True, 3.0,
           _p50(_FP16_LLAMA, "deepspeed_fp16", "gpu_ratio_p50"), "x"),
    Target("wall time, ResNet-50, against fused=True", True, 4.0,
           _p50("adamw-resnet50", "adamw_fused", "wall_ratio_p50"), "x"),
    Target("wall time, 1M in 160 tensors, against fused=True", True, 15.0,
           _p50("adamw-1M", "adamw_fused", "wall_ratio_p50"), "x"),
    Target("host time, 300 tensors, our scaler", False, 25.0,
           _p50("adamw-300x1k", "fusedopt_adamw", "host_us_p50"), " us"),
    Target("host time, 300 tensors, torch's scaler, amp_scaling=True", False, 110.0,
           _p50("adamw-300x1k", "fusedopt_adamw_amp_scaling", "host_us_p50"), " us"),
    Target("DRAM bytes off the counters, deviation, 400M", False, 3.0,
           _off_by("adamw-400M", "fusedopt_cuda:counters:adamw:float32"), " %"),
    Target("Triton: update kernel / copy bandwidth, 1.24B", True, 0.92,
           _p50(_LLAMA, "fusedopt_triton:update:adamw:float32", "copy_fraction")),
    Target("Triton: update kernel / copy bandwidth, 124M", True, 0.92,
           _p50(_GPT2, "fusedopt_triton:update:adamw:float32", "copy_fraction")),
    Target("Triton: update kernel / copy bandwidth, fp16 with masters, 1.24B", True, 0.92,
           _p50(_FP16_LLAMA, "fusedopt_triton:update:adamw:float16", "copy_fraction")),
    Target("Triton: update kernel / copy bandwidth, SGD, 1.24B", True, 0.92,
           _p50(_SGD_LLAMA, "fusedopt_triton:update:sgd-momentum:float32", "copy_fraction")),
    Target("Triton: whole step / its byte floor, 1.24B", False, 1.10,
           _floors(_LLAMA, "fusedopt_adamw_triton")),
    Target("Triton: whole step / its byte floor, 124M", False, 1.10,
           _floors(_GPT2, "fusedopt_adamw_triton")),
    Target("Triton: host time, 300 tensors, our scaler", False, 120.0,
           _p50("adamw-300x1k", "fusedopt_adamw_triton", "host_us_p50"), " us"),
    Target("Triton: first step of a process, nothing compiled yet", False, 20.0,
           _seconds(FIRST_STEP, "fusedopt_adamw_triton:empty"), " s"),
    Target("Triton: first step of a process, from the cache", False, 3.0,
           _seconds(FIRST_STEP, "fusedopt_adamw_triton:filled"), " s"),
]  # fmt: skip
