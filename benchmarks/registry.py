"""Every named pipeline: what `--pipelines` takes on the CPU, and the GPU's cases are made of.

Ours takes a backend. Under its plain name it runs on the one for its device, under a name that ends
in `_triton`, `_reference` or `_cuda` on that one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.param_sets import Gradients
from benchmarks.pipelines import (
    ADAMW,
    MAX_GRAD_NORM,
    SGD,
    Kind,
    Ours,
    Pipeline,
    TorchOpsMasters,
    Unavailable,
)
from benchmarks.rivals import Build, library, torch_adamw, torch_sgd
from benchmarks.traffic import Options, traffic

TRITON = "_triton"  # at the end of the names of pipelines and kernels of the Triton backend
# By the end of the name. None is what is chosen by itself, and never the reference.
BACKENDS: dict[str, str | None] = {"": None, TRITON: "triton", "_reference": "reference",
                                   "_cuda": "cuda"}  # fmt: skip
TITLES = {"": "", TRITON: ", Triton", "_reference": ", reference", "_cuda": ", CUDA"}
ONLY_REFERENCE = (  # it is for correctness; its times would only mislead
    "fusedopt has only its reference backend here; run `python -m fusedopt` to see why "
    "(a checkout needs `pip install -e .`)"
)

FP16, BF16 = torch.float16, torch.bfloat16
CPU, CUDA = ("cpu",), ("cuda",)

# Allowed differences from the exact step, in tolerances of `compare_steps`.
BY_BF16_GRADS = 20.0  # the clipped gradient was rounded to bf16
BY_BF16_PARAMS = 2000.0  # a param of 0.5 to 1 is known to 2e-3, which is how far AdamW moves it
BY_SMALL_STATES = 2000.0 + BY_BF16_PARAMS  # a small exp_avg_sq among large ones is lost

# They have compilers at work for up to a minute when they take their first step.
COMPILE_FIRST = ("adamw_deepspeed", "adamw_compiled", "adamw_torchao", "torchao_adamw8bit",
                 "torchao_adamwfp8")  # fmt: skip


def ours(name: str, backend: str | None, **options: Any) -> Build:
    """Under our scaler; with ``amp_scaling=True`` under torch's, and the step unscales."""

    def build(params: list[Tensor], grads: Gradients) -> Pipeline:
        try:
            fusedopt = importlib.import_module("fusedopt")
            backends = importlib.import_module("fusedopt.backends.registry")
            reason = backends.report().get(backend or "", {}).get("reason")
            chosen = "" if reason else backends.choose(backend, params).name
        except (ImportError, RuntimeError) as error:
            raise Unavailable(str(error)) from error
        if reason or chosen == "reference" != backend:
            raise Unavailable(reason or ONLY_REFERENCE)
        make = partial(getattr(fusedopt, name), max_grad_norm=MAX_GRAD_NORM, backend=backend)
        scaler = torch.amp.GradScaler if "amp_scaling" in options else fusedopt.GradScaler
        return Ours(params, grads, lambda p: make(p, **options), scaler)

    return build


def _ours_on(backend: str | None, suffix: str) -> dict[str, Kind]:
    adamw = ours("FusedAdamW", backend, **ADAMW)
    by_torch = ours("FusedAdamW", backend, amp_scaling=True, **ADAMW)
    exact = ours("FusedAdamW", backend, norm_bits="exact", **ADAMW)
    sgd = ours("FusedSGD", backend, decoupled_weight_decay=False, **SGD)
    codes = ours("FusedAdamW", backend, state_dtype="8bit", **ADAMW)
    beside = {"state_dtype": "8bit", "master_weights": "remainder"}
    beside_8bit = ours("FusedAdamW", backend, **beside, **ADAMW)
    label, half = f"fusedopt{TITLES[suffix]}", _bytes(params="fp16")
    of_beside = _bytes(params="bf16", state_dtype="8bit", masters="remainder")
    named_beside = f"{label}, remainder, 8-bit states"
    under = f"{label}, torch's scaler, amp_scaling=True"
    half_by_torch = _bytes(params="fp16", scaler="torch")
    kinds = {
        "fusedopt_adamw": Kind(label, _bytes(), adamw),
        "fusedopt_adamw_amp_scaling": Kind(under, _bytes(scaler="torch"), by_torch),
        "fusedopt_adamw_exact": Kind(f"{label}, norm_bits='exact'", _bytes(), exact),
        "fusedopt_adamw_fp16": Kind(label, half, adamw, dtypes=(FP16,)),
        "fusedopt_adamw_fp16_amp_scaling": Kind(under, half_by_torch, by_torch, dtypes=(FP16,)),
        "fusedopt_adamw_bf16": Kind(label, half, adamw, dtypes=(BF16,)),
        "fusedopt_adamw_8bit": Kind(
            f"{label}, 8-bit states", _bytes(state_dtype="8bit"), codes, allowed=BY_SMALL_STATES
        ),
        "fusedopt_adamw_bf16_8bit": Kind(
            named_beside, of_beside, beside_8bit, dtypes=(BF16,), allowed=BY_SMALL_STATES
        ),
        "fusedopt_sgd": Kind(label, _bytes(optimizer="sgd-momentum"), sgd),
    }
    return {name + suffix: kind for name, kind in kinds.items()}


def _bytes(
    pipeline: str = "fusedopt", *, optimizer: str = "adamw", params: str = "fp32",
    scaler: str = "ours", masters: bool | str = True, state_dtype: str = "",
) -> float:  # fmt: skip
    options = Options(
        optimizer, params, masters=masters, clip=True, scaler=scaler, state_dtype=state_dtype
    )
    return traffic(options, pipeline).total


def _torch(compiler: str) -> dict[str, Kind]:
    """torch's own, and in torch operations what frameworks do."""

    def adamw(**flags: Any) -> Build:
        return lambda p, g: Pipeline(p, g, torch_adamw(**flags))

    def masters(p: list[Tensor], g: Gradients) -> Pipeline:
        return TorchOpsMasters(p, g, torch_adamw(fused=True))

    fused, foreach, half = "torch fused", "torch foreach", (FP16, BF16)
    sgd, with_masters = partial(_bytes, optimizer="sgd-momentum"), _bytes(fused, params="bf16")
    compiled = partial(rivals.Compiled, compiler=compiler)
    return {
        "adamw_fused": Kind(f"{fused}=True", _bytes(fused), adamw(fused=True)),
        "adamw_foreach": Kind(f"{foreach}=True", _bytes(foreach), adamw(foreach=True)),
        "adamw_compiled": Kind("torch.compile", 44, compiled),
        "sgd_fused": Kind(f"{fused}=True", sgd(fused), torch_sgd(fused=True)),
        "sgd_foreach": Kind(f"{foreach}=True", sgd(foreach), torch_sgd(foreach=True)),
        "adamw_bf16_torch_ops": Kind("torch ops", with_masters, masters, dtypes=(BF16, FP16)),
        "megatron_fp16": Kind("Megatron-style", 60, rivals.MegatronFp16, dtypes=half),
        "deepspeed_fp16": Kind("DeepSpeed-style", 70, rivals.DeepSpeedFp16, dtypes=half),
    }


def _libraries(on_cpu: bool) -> dict[str, Kind]:
    """Optimizers of other packages: of fp32 params under torch's scaler, of bf16 params after
    clipping as Megatron does it.

    torchao's 4-bit AdamW is not among them: it is off by a fifth of the mean move, which is more
    than for a step without clipping.
    """
    te, apex = "transformer_engine.pytorch.optimizers", "apex.optimizers"
    masters: dict[str, Any] = {"adam_w_mode": True, "master_weights": True}
    as_torch: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}  # optimi has other defaults
    small, rounded, grads = BY_SMALL_STATES, BY_BF16_PARAMS, BY_BF16_GRADS
    fused, bnb, ao = "FusedAdam", "bitsandbytes.optim", "torchao.optim"
    kahan = 64 if on_cpu else 24
    return {
        # It compiles itself at the first use, for about a minute.
        "adamw_deepspeed": _fp32("DeepSpeedCPUAdam", 48, "deepspeed.ops.adam", "DeepSpeedCPUAdam",
                                 CPU, adamw_mode=True),
        "adamw_torchao": _fp32("torchao", 48, ao, "_AdamW"),
        # In one kernel with Triton; in seven sweeps without a GPU, eleven with Kahan summation.
        "adamw_optimi": _fp32("optimi", 92 if on_cpu else 48, "optimi", "AdamW", **as_torch),
        "optimi_adamw": _bf16("optimi, Kahan", kahan, "optimi", "AdamW", rounded, **as_torch),
        "te_fused_adam": _bf16(f"TransformerEngine {fused}", 34, te, fused, grads, CUDA, **masters),
        "apex_fused_adam": _bf16(
            f"Apex {fused}", 34, apex, fused, grads, CUDA, capturable=True, **masters
        ),
        "flashoptim_adamw": _bf16("FlashOptim", 18, "flashoptim", "FlashAdamW", rounded, CUDA),
        "bitsandbytes_adamw8bit": _bf16("bitsandbytes 8-bit", 16, bnb, "AdamW8bit", small),
        "torchao_adamw8bit": _bf16("torchao 8-bit", 16, ao, "AdamW8bit", small),
        "torchao_adamwfp8": _bf16("torchao fp8", 16, ao, "AdamWFp8", small),
    }  # fmt: skip


def _fp32(
    label: str, n_bytes: float, module: str, name: str, devices: tuple[str, ...] = CPU + CUDA,
    **options: Any,
) -> Kind:  # fmt: skip
    build = library(rivals.Library, module, name, **options)
    return Kind(label, n_bytes, build, devices=devices, module=module)


def _bf16(
    label: str, n_bytes: float, module: str, name: str, allowed: float,
    devices: tuple[str, ...] = CPU + CUDA, **options: Any,
) -> Kind:  # fmt: skip
    build = library(rivals.ClipThenLibraryStep, module, name, **options)
    return Kind(label, n_bytes, build, allowed, (BF16,), devices, module)


def on_backend(name: str, backend: str) -> str:
    """The name of the same pipeline on ``backend``; what is not ours has none to choose."""
    suffixes = {chosen: suffix for suffix, chosen in BACKENDS.items()}
    return name + suffixes.get(backend, "") if name in _ours_on(backend, "") else name


def kinds(
    device: str, backends: Mapping[str, str | None], compiler: str = "inductor"
) -> dict[str, Kind]:
    """The pipelines for params on ``device``, ours on each backend, given by the name's end."""
    every: dict[str, Kind] = {}
    for suffix, backend in backends.items():
        every |= _ours_on(backend, suffix)
    every |= _torch(compiler) | _libraries(device == "cpu")
    return {name: kind for name, kind in every.items() if device in kind.devices}


def gpu_kinds(backends: Mapping[str, str]) -> dict[str, Kind]:
    """All for a GPU, ours on what serves as the backends `cuda` and `triton`."""
    # Where the CPU stands in, only what Dynamo does is of interest, not minutes of C++ compiler.
    compiler = "inductor" if backends["cuda"] == "cuda" else "eager"
    return kinds("cuda", {"": backends["cuda"], TRITON: backends["triton"]}, compiler)


KINDS = kinds("cpu", BACKENDS)


def base_kinds() -> dict[str, Kind]:
    """All for any device, ours once: on the backend that is chosen by itself."""
    return kinds("cuda", {"": None}) | kinds("cpu", {"": None})


def unavailable(kinds: Mapping[str, Kind]) -> dict[str, str]:
    """The modules of pipelines that do not import, and why."""
    reasons = {}
    for module in dict.fromkeys(kind.module for kind in kinds.values() if kind.module):
        try:
            importlib.import_module(module)
        except Exception as error:  # compiled extensions fail to load in many ways
            reasons[module] = f"{type(error).__name__}: {error}".splitlines()[0]
    return reasons
