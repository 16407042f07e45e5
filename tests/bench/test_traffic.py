"""The bytes that `benchmarks/traffic.py` counts are the bytes that kernels and torch move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_helpers import rows  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedopt
from benchmarks import param_sets, pipelines, registry, roofline, verbs
from benchmarks.traffic import MASTER, SCALERS, STATES, Options, traffic

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUMEL = 8192 + 300  # a chunk and a part of one
ON_GPU = registry.gpu_kinds({"cuda": "cpu", "triton": "cpu"})
WANTED = list(itertools.product([False, True], SCALERS))

# ---- ours: what the kernels touch ---------------------------------------------------------------

OURS = [
    verbs.Workload(rule, verbs.DTYPES[dtypes])
    for rule in STATES
    for dtypes in ("float32", "float32-bfloat16", "bfloat16", "bfloat16-no_masters",
                   "float16-float32", "float16-no_masters")
]  # fmt: skip


class Watched:
    """An optimizer past its first step, and its verbs over arrays that can be set."""

    def __init__(self, workload: verbs.Workload) -> None:
        if "-" in str(workload.dtypes) and not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this torch has no grad_dtype")
        self.verbs = verbs.Verbs(workload, [(NUMEL,)], "cpu")
        (row,) = self.verbs._plan.rows
        self.arrays = {"grad": self.verbs.params[0].grad, "param": row.dense.detach()}
        self.arrays |= dict(zip(STATES[workload.rule], row.states, strict=True))
        if row.master is not None:
            self.arrays[MASTER.name] = row.master
        for seed, array in enumerate(self.arrays.values()):
            array.copy_(values(seed, array.dtype))
        self.arrays["grad"].mul_(2.0**14)  # of a scale of 2^16: so that it counts
        if row.master is not None:
            self.arrays["param"].copy_(row.master)  # else others wrote to it
        self.start = {name: array.clone() for name, array in self.arrays.items()}

    def reduced(self) -> Tensor:
        """What the norm has found, as it is kept."""
        self.verbs._plan.begin(self.verbs._inputs)
        self.verbs._plan.reduce()
        return self.verbs._plan._tables["words"].clone()

    def updated(self) -> dict[str, Tensor]:
        """The arrays after an update, copied; they are as they were at the start again."""
        self.verbs.update()
        after = {name: array.clone() for name, array in self.arrays.items()}
        for name, array in self.arrays.items():
            array.copy_(self.start[name])
        return after


def values(seed: int, dtype: torch.dtype) -> Tensor:
    """Well away from zero and from each other."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(NUMEL, generator=generator) + 0.5).to(dtype)


def changed(before: Tensor, after: Tensor) -> bool:
    """A good part of the elements has other bits."""
    return float((before != after).float().mean()) > 0.2


@pytest.mark.parametrize("workload", OURS, ids=str)
def test_the_verbs_read_and_write_what_is_counted(
    cpu_backend: str, workload: verbs.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array is written if its bits change, and read if the bits written depend on it."""
    make, options = verbs.RULES[workload.rule]
    monkeypatch.setitem(verbs.RULES, workload.rule, (make, {**options, "lr": 1.0}))
    watched = Watched(workload)
    arrays, start = watched.arrays, watched.start
    norm = watched.reduced()
    assert all(torch.equal(array, start[name]) for name, array in arrays.items())
    watched.verbs.reduce()
    after = watched.updated()
    written = {name for name in start if changed(start[name], after[name])}
    read, in_norm = set(), set()
    for name, array in arrays.items():
        array.mul_(1.5)
        other = watched.updated()
        if any(changed(after[to], other[to]) for to in written):
            read.add(name)
    for name, array in arrays.items():
        array.mul_(1.5)
        if not torch.equal(watched.reduced(), norm):
            in_norm.add(name)
        array.copy_(start[name])
    reduce, update = workload.traffic().sweeps
    assert (reduce.name, update.name) == ("reduce", "update")
    assert written == {array.name for array in update.writes}
    assert read == {array.name for array in (*update.reads, *update.looks)}
    assert in_norm == {array.name for array in reduce.reads} == {"grad"} and not reduce.writes
    sizes = {name: array.element_size() for name, array in arrays.items()}
    assert reduce.total == sizes["grad"]
    assert update.total == sum(sizes[name] for name in (*read, *written))
    assert workload.memory_per_param() == sum(sizes.values())


# ---- torch: what its operations read and write, by their schemas ---------------------------------

WRITE_ONLY = ("aten::copy_", "aten::_foreach_copy_")


class Bytes(TorchDispatchMode):
    """Adds up what operations read and write of tensors of at least ``least`` elements.

    What an operation is given it reads, but for the target of a copy, and once where it is given
    it twice; it writes its results and what its schema says. The schema of the fused optimizers
    does not say whether gradients are written: there it counts whether bits have changed.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.total, self._least = 0, least

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = self._arguments(func, args, kwargs or {})
        before = [[tensor.clone() for tensor in tensors] for _, tensors in given]
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        name, known = func._schema.name, set()
        for (argument, tensors), old in zip(given, before, strict=True):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if not (is_written and name in WRITE_ONLY):
                self.total += sum(size(t) for t in tensors if t.data_ptr() not in known)
            if is_written and name.startswith("aten::_fused"):
                is_written = not all(map(torch.equal, tensors, old))
            if is_written:
                self.total += sum(map(size, tensors))
            known |= {tensor.data_ptr() for tensor in tensors}
        if "empty" not in name:
            new = [tensor for tensor in self._large(result) if tensor.data_ptr() not in known]
            self.total += sum(map(size, new))
        return result

    def _arguments(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
        """The arguments of the schema that are tensors or lists of them."""
        schema = func._schema.arguments
        values = [
            kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in enumerate(schema)
        ]
        return [(a, list(self._large(v))) for a, v in zip(schema, values, strict=True)]

    def _large(self, tree: Any) -> Iterator[Tensor]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.numel() >= self._least:
                yield leaf


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
