"""The bytes that `benchmarks/traffic.py` counts are the bytes that kernels and torch move."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_helpers import rows  # noqa: F401
from dispatched_bytes import Bytes
from torch import Tensor

import fusedopt
from benchmarks import param_sets, pipelines, registry, roofline
from benchmarks.traffic import MASTER, SCALERS, STATES, Options, memory_per_param, traffic

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUMEL = 8192 + 300  # a chunk and a part of one
ON_GPU = registry.gpu_kinds({"cuda": "cpu", "triton": "cpu"})
WANTED = list(itertools.product([False, True], SCALERS))

# ---- ours: what the kernels touch ---------------------------------------------------------------

OURS = [
    Options(optimizer, params, grads, masters, clip=True)
    for optimizer in STATES
    for params, grads, masters in [
        ("fp32", "", True),
        ("fp32", "bf16", True),
        ("bf16", "", True),
        ("bf16", "", False),
        ("fp16", "fp32", True),
        ("fp16", "", False),
    ]
]


class Verbs:
    """An optimizer past its first steps, and its verbs over arrays that can be set."""

    def __init__(self, options: Options) -> None:
        self.options = options
        param = torch.nn.Parameter(values(1, DTYPES[options.params]))
        common: dict[str, Any] = {
            "master_weights": options.masters,
            "max_grad_norm": float("inf") if options.clip else None,
            "backend": "cpu",
        }
        if options.optimizer.startswith("adamw"):
            amsgrad = options.optimizer.endswith("amsgrad")
            self._optimizer: Any = fusedopt.FusedAdamW(
                [param], lr=0.1, weight_decay=0.1, amsgrad=amsgrad, **common
            )
        else:
            momentum = 0.9 if options.optimizer == "sgd-momentum" else 0.0
            self._optimizer = fusedopt.FusedSGD([param], lr=0.1, momentum=momentum, **common)
        if options.grads:
            if not hasattr(param, "grad_dtype"):
                pytest.skip("this torch has no grad_dtype")
            param.grad_dtype = None
        for step in range(2):
            param.grad = values(step + 2, DTYPES[options.grads or options.params])
            self._optimizer.step()
        self._inputs = self._optimizer._step_inputs()
        self._plan = self._optimizer._current_plan(self._inputs)
        self._plan.begin(self._inputs)
        (row,) = self._plan.rows
        names = STATES[options.optimizer]
        self.arrays: dict[str, Tensor] = {"grad": param.grad, "param": row.dense.detach()}
        self.arrays |= dict(zip(names, row.states, strict=True))
        if row.master is not None:
            self.arrays[MASTER.name] = row.master
        if "max_exp_avg_sq" in self.arrays:  # so that either of the two is the larger in places
            self.arrays["max_exp_avg_sq"].copy_(self.arrays["exp_avg_sq"].flip(0))
        self._start = {name: array.clone() for name, array in self.arrays.items()}

    def reduce(self) -> None:
        self._plan.reduce()

    def update(self) -> None:
        self._plan.update()

    def finalize(self) -> None:
        self._plan.reduce()
        self._plan.finalize()

    def reset(self) -> None:
        for name, array in self.arrays.items():
            array.copy_(self._start[name])

    def words(self) -> Tensor:
        return self._plan._tables["words"].clone()


def values(seed: int, dtype: torch.dtype) -> Tensor:
    """Well away from zero and from each other."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(NUMEL, generator=generator) + 0.5).to(dtype)


def changed(before: Tensor, after: Tensor) -> float:
    """Share of the elements that are not the same bits."""
    return float((before != after).float().mean())


def written_by(verbs: Verbs) -> dict[str, Tensor]:
    """The arrays after an update from the start, copied."""
    verbs.update()
    after = {name: array.clone() for name, array in verbs.arrays.items()}
    verbs.reset()
    return after


@pytest.mark.parametrize("options", OURS, ids=str)
def test_the_update_reads_and_writes_what_is_counted(cpu_backend: str, options: Options) -> None:
    """An array is written if its bits change, and read if the bits written depend on it."""
    verbs = Verbs(options)
    verbs.finalize()
    start = {name: array.clone() for name, array in verbs.arrays.items()}
    after = written_by(verbs)
    written = {name for name in start if changed(start[name], after[name]) > 0.2}
    read = set()
    for name, array in verbs.arrays.items():
        array.mul_(1.5)
        other = written_by(verbs)
        if any(changed(after[to], other[to]) > 0.2 for to in written):
            read.add(name)
    (update,) = (sweep for sweep in traffic(options).sweeps if sweep.name == "update")
    assert written == {array.name for array in update.writes}
    assert read == {array.name for array in (*update.reads, *update.looks)}
    sizes = {name: array.element_size() for name, array in verbs.arrays.items()}
    assert update.total == sum(sizes[name] for name in (*read, *written))
    assert memory_per_param(options) == sum(sizes.values())


@pytest.mark.parametrize("options", OURS, ids=str)
def test_the_norm_reads_the_gradients_alone(cpu_backend: str, options: Options) -> None:
    verbs = Verbs(options)
    verbs.reduce()
    before, arrays = verbs.words(), {n: a.clone() for n, a in verbs.arrays.items()}
    read = set()
    for name, array in verbs.arrays.items():
        array.mul_(1.5)
        verbs.reduce()
        if not torch.equal(verbs.words(), before):
            read.add(name)
        verbs.reset()
    (norm,) = (sweep for sweep in traffic(options).sweeps if sweep.name == "reduce")
    assert read == {array.name for array in norm.reads} == {"grad"}
    assert norm.writes == () and norm.total == verbs.arrays["grad"].element_size()
    assert all(torch.equal(arrays[name], array) for name, array in verbs.arrays.items())


# ---- torch: what its operations touch -----------------------------------------------------------

SHAPES = [(40, 50), (3000,)]


def bytes_of_a_step(
    build: Callable[[list[Tensor], Any], pipelines.Pipeline], dtype: torch.dtype
) -> float:
    """Per parameter, of the second step, when all states are there."""
    params = param_sets.make_params(SHAPES, dtype)
    pipeline = build(params, param_sets.Gradients(SHAPES, dtype))
    pipeline.prepare()
    pipeline.step()
    pipeline.prepare()
    with Bytes(1000) as counted:
        pipeline.step()
    return counted.total / 5000


class Torch(pipelines.Pipeline):
    """unscale_ and clip_grad_norm_ as far as the options want them."""

    options = Options()

    def step(self) -> None:
        if self.options.scaler == "none":
            if self.options.clip:
                torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            return
        if self.options.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def torch_optimizer(options: Options, flag: str) -> Callable[[list[Tensor]], Any]:
    if options.optimizer.startswith("adamw"):
        amsgrad = options.optimizer.endswith("amsgrad")
        return lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=amsgrad, **{flag: True})
    momentum = 0.9 if options.optimizer == "sgd-momentum" else 0.0
    kwargs: dict[str, Any] = {"momentum": momentum, "weight_decay": 0.1, flag: True}
    return lambda p: torch.optim.SGD(p, lr=0.1, **kwargs)


@pytest.mark.parametrize("amp_scaling", [None, True])
@pytest.mark.parametrize(("clip", "scaler"), WANTED)
def test_the_norm_is_read_where_it_is_counted(
    cpu_backend: str, clip: bool, scaler: str, amp_scaling: bool | None
) -> None:
    """And torch's scaler goes over the gradients where it is counted, whoever unscales."""
    options = Options(clip=clip, scaler=scaler)
    param = torch.nn.Parameter(values(1, torch.float32))
    norm = 1.0 if clip else None
    opt = fusedopt.FusedAdamW([param], max_grad_norm=norm, amp_scaling=amp_scaling, backend="cpu")
    param.grad = values(2, torch.float32)
    opt.init_state()
    make = fusedopt.GradScaler if scaler == "ours" else torch.amp.GradScaler
    grad_scaler = make("cpu", enabled=scaler != "none")
    grad_scaler.scale(torch.ones(()))
    with Bytes(1000) as in_torch_operations:
        grad_scaler.step(opt)
    parts = traffic(options).parts()
    assert ("reduce" in parts) == (opt.grad_norm is not None)
    assert parts.get("unscale", 0) == in_torch_operations.total / NUMEL


@pytest.mark.parametrize("pipeline", ["torch fused", "torch foreach"])
@pytest.mark.parametrize("case", roofline.CASES)
def test_torchs_operations_move_what_is_counted(case: str, pipeline: str) -> None:
    options = roofline.CASES[case]
    make = torch_optimizer(options, pipeline.split()[1])

    def build(params: list[Tensor], grads: Any) -> pipelines.Pipeline:
        if options.has_master:
            return pipelines.TorchOpsMasters(params, grads, make)
        built = Torch(params, grads, make)
        built.options = options
        return built

    moved = bytes_of_a_step(build, DTYPES[options.params])
    assert moved == traffic(options, pipeline).total == traffic(options, pipeline).floor


@pytest.mark.parametrize(
    "name", ["adamw_fused", "adamw_foreach", "sgd_foreach", "adamw_bf16_torch_ops",
             "megatron_fp16", "deepspeed_fp16"]
)  # fmt: skip
def test_the_rivals_operations_move_the_bytes_of_their_rows(name: str) -> None:
    kind = ON_GPU[name]
    half = torch.float16 if "fp16" in name else torch.bfloat16
    dtype = half if "16" in name else torch.float32
    assert bytes_of_a_step(kind.build, dtype) == kind.bytes_per_param
