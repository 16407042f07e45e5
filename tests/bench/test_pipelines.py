"""The pipelines of the benchmarks compute the same step, and one that does not is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_helpers import SHAPES

import fusedopt
from benchmarks import param_sets, pipelines, registry
from benchmarks.rivals import Library, library

ENOUGH = [(3, 5, 7), (257,), (60, 65)]  # elements for scaled fp16 gradients to be finite
EXACT = {
    torch.float32: "adamw_foreach",
    torch.float16: "megatron_fp16",
    torch.bfloat16: "adamw_bf16_torch_ops",
}


def check_same_step(
    first: pipelines.Pipeline, second: pipelines.Pipeline, grads: Any, allowed: float = 1.0
) -> float:
    """One step per factor with two new pipelines: their largest difference, in tolerances."""
    start = [param.detach().clone() for param in first.params]
    for pipeline in (first, second):
        pipelines.take_checked_steps(pipeline, grads)
    return pipelines.compare_steps(start, first, second, allowed)


def adamw(params: list[torch.Tensor], **changes: object) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, **pipelines.ADAMW | changes)


class NoUnscale(pipelines.Pipeline):
    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, pipelines.MAX_GRAD_NORM)
        self.optimizer.step()


class NoClip(pipelines.Pipeline):
    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


class TailForgotten(pipelines.Pipeline):
    def step(self) -> None:
        kept = self.params[-1].detach()[-1:].clone()
        super().step()
        self.params[-1].data[-1:] = kept


class NanWritten(pipelines.Pipeline):
    def step(self) -> None:
        super().step()
        self.params[1].data[3] = float("nan")


def build(
    kind: type[pipelines.Pipeline], grads: param_sets.Gradients, **changes: object
) -> pipelines.Pipeline:
    dtype = torch.bfloat16 if issubclass(kind, pipelines.TorchOpsMasters) else torch.float32
    params = param_sets.make_params(SHAPES, dtype)
    return kind(params, grads, lambda p: adamw(p, **changes))


@pytest.fixture
def grads() -> param_sets.Gradients:
    return param_sets.Gradients(SHAPES, torch.float32)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (NoUnscale, {}),
        (NoClip, {}),
        (TailForgotten, {}),
        (NanWritten, {}),
        (pipelines.Pipeline, {"weight_decay": 0.0}),
        (pipelines.Pipeline, {"betas": (0.9, 0.95)}),
        (pipelines.Pipeline, {"lr": 1.01e-3}),
    ],
)
def test_a_different_step_is_noticed(
    kind: type[pipelines.Pipeline], changes: dict[str, object], grads: param_sets.Gradients
) -> None:
    right = build(pipelines.Pipeline, grads)
    wrong = build(kind, grads, **changes)
    with pytest.raises(pipelines.DifferentStep):
        check_same_step(right, wrong, grads)


def test_the_same_step_in_another_order_of_operations_agrees(grads: param_sets.Gradients) -> None:
    one = build(pipelines.Pipeline, grads, foreach=True)
    other = build(pipelines.Pipeline, grads, fused=True)
    assert check_same_step(one, other, grads) < 0.1


def test_steps_that_were_skipped_are_not_taken_for_the_same() -> None:
    shapes = [(40,), (7,)]  # so few that their scaled fp16 gradients overflow
    grads = param_sets.Gradients(shapes, torch.float16)
    one, other = (
        pipelines.TorchOpsMasters(param_sets.make_params(shapes, torch.float16), grads, adamw)
        for _ in range(2)
    )
    with pytest.raises(pipelines.DifferentStep, match="skipped"):
        check_same_step(one, other, grads)


def test_a_stale_half_param_is_noticed() -> None:
    class Stale(pipelines.TorchOpsMasters):
        def step(self) -> None:
            before = self.params[0].detach().clone()
            super().step()
            self.params[0].data.copy_(before)

    grads = param_sets.Gradients(SHAPES, torch.bfloat16)
    right, wrong = build(pipelines.TorchOpsMasters, grads), build(Stale, grads)
    with pytest.raises(pipelines.DifferentStep, match="master"):
        check_same_step(right, wrong, grads)


def test_params_rounded_to_bf16_pass_and_no_clipping_does_not() -> None:
    """That is where MEAN_TOLERANCE has to lie; a longer list, so that the mean is one."""
    shapes, dtype = [(512, 512), (4097,)], torch.bfloat16
    grads = param_sets.Gradients(shapes, dtype)

    def excess(kind: type[pipelines.Pipeline]) -> float:
        exact = registry.KINDS["adamw_bf16_torch_ops"].build(
            param_sets.make_params(shapes, dtype), grads
        )
        rounded = kind(param_sets.make_params(shapes, dtype), grads, adamw)
        return check_same_step(exact, rounded, grads, registry.BY_BF16_PARAMS)

    assert 1.0 < excess(pipelines.Pipeline) < registry.BY_BF16_PARAMS
    with pytest.raises(pipelines.DifferentStep, match="% of the move"):
        excess(NoClip)


def built(name: str, dtype: torch.dtype, grads: param_sets.Gradients) -> pipelines.Pipeline:
    kind = registry.KINDS[name]
    try:
        return kind.build(param_sets.make_params(ENOUGH, dtype), grads)
    except pipelines.Unavailable as error:
        if kind.module:
            pytest.skip(str(error))
        raise


NAMED = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, kind in registry.KINDS.items()
    if name not in registry.COMPILE_FIRST and not name.endswith((registry.TRITON, "_cuda"))
    for dtype in kind.dtypes
]


@pytest.mark.parametrize(("name", "dtype"), NAMED)
def test_every_named_pipeline_takes_the_same_step(
    name: str, dtype: torch.dtype, cpu_backend: str
) -> None:
    grads = param_sets.Gradients(ENOUGH, dtype)
    exact = built("sgd_foreach" if "sgd" in name else EXACT[dtype], dtype, grads)
    pipeline = built(name, dtype, grads)
    check_same_step(exact, pipeline, grads, registry.KINDS[name].allowed)
    if name.endswith("_reference"):
        assert pipeline.describe() == "backend reference"


OURS = [param for param in NAMED if param.id.startswith("fusedopt")]


@pytest.mark.parametrize(("name", "dtype"), OURS)
def test_the_name_tells_whose_scaler_it_is(name: str, dtype: torch.dtype, cpu_backend: str) -> None:
    """Either leaves unscaling to the step, whatever the default of `amp_scaling` is."""
    torchs = "_amp_scaling" in name
    label = registry.KINDS[name].label
    assert label.endswith(", torch's scaler, amp_scaling=True") is torchs
    pipeline = built(name, dtype, param_sets.Gradients(ENOUGH, dtype))
    assert type(pipeline.scaler) is (torch.amp.GradScaler if torchs else fusedopt.GradScaler)
    assert pipeline.optimizer.amp_scaling is (True if torchs else None)
    pipeline.prepare()
    scaled = [param.grad.clone() for param in pipeline.params]
    pipeline.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(pipeline.params, scaled, strict=True))


def test_a_backend_that_cannot_serve_is_named_and_the_reference_is_not_taken_for_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    grads = param_sets.Gradients(SHAPES, torch.float32)
    params = param_sets.make_params(SHAPES, torch.float32)
    for name, said in (("_cuda", r"CUDA|cuda"), ("", "python -m fusedopt")):
        with pytest.raises(pipelines.Unavailable, match=said):
            registry.KINDS[f"fusedopt_adamw{name}"].build(params, grads)


def test_only_ours_has_a_backend_to_choose() -> None:
    assert registry.on_backend("fusedopt_sgd", "reference") == "fusedopt_sgd_reference"
    assert registry.on_backend("fusedopt_adamw", "cpu") == "fusedopt_adamw"
    assert registry.on_backend("fusedopt_adamw", "auto") == "fusedopt_adamw"
    assert registry.on_backend("adamw_fused", "reference") == "adamw_fused"


def test_one_table_for_both_devices() -> None:
    gpu = registry.gpu_kinds({"cuda": "cpu", "triton": "cpu"})
    every = registry.base_kinds()
    assert {n for n in gpu if not n.endswith(registry.TRITON)} <= set(every)
    assert set(every) == {
        *registry.kinds("cpu", {"": "auto"}),
        *registry.kinds("cuda", {"": "cuda"}),
    }
    assert "te_fused_adam" not in registry.KINDS and "adamw_deepspeed" not in gpu
    assert set(registry.COMPILE_FIRST) <= set(registry.KINDS)


# Counted by hand, pipeline by pipeline; benchmarks/registry.py derives most of them.
BYTES = {
    "adamw_fused": 48,
    "adamw_foreach": 100,
    "adamw_deepspeed": 48,
    "sgd_fused": 40,
    "sgd_foreach": 64,
    "adamw_bf16_torch_ops": 60,
    "megatron_fp16": 60,
    "fusedopt_adamw": 32,
    "fusedopt_adamw_amp_scaling": 40,
    "fusedopt_adamw_exact": 32,
    "fusedopt_adamw_fp16": 32,
    "fusedopt_adamw_fp16_amp_scaling": 36,
    "fusedopt_adamw_bf16": 32,
    "fusedopt_adamw_8bit": 20 + 4 / 128,
    "fusedopt_adamw_bf16_8bit": 16 + 4 / 128,
    "fusedopt_sgd": 24,
}


def test_rows_carry_these_bytes() -> None:
    on_gpu = registry.gpu_kinds({"cuda": "cpu", "triton": "cpu"})
    for kinds in (registry.KINDS, on_gpu):
        known = BYTES.keys() & kinds.keys()
        assert {name: kinds[name].bytes_per_param for name in known} == {
            name: BYTES[name] for name in known
        }


def test_a_library_that_does_not_import_says_so() -> None:
    kind = pipelines.Kind("x", 1, lambda p, g: pytest.fail(), module="no_such_module")
    reasons = registry.unavailable({"x": kind})
    assert list(reasons) == ["no_such_module"] and "No module named" in reasons["no_such_module"]
    build = library(Library, "no_such_module", "AdamW")
    with pytest.raises(pipelines.Unavailable, match="No module named"):
        build([], param_sets.Gradients(SHAPES, torch.float32))


def test_fused_sgd_of_torch_is_not_used_with_half_params() -> None:
    params = param_sets.make_params(SHAPES, torch.bfloat16)
    grads = param_sets.Gradients(SHAPES, torch.bfloat16)
    with pytest.raises(ValueError, match="wrong"):
        registry.KINDS["sgd_fused"].build(params, grads)
