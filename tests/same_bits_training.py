"""What same_bits.py trains, as a table; and the process in which one checkout trains it.

``fusedopt`` comes from PYTHONPATH, and what drives the kernels of GPUs on a CPU from the tests of
that same checkout. All else is this folder's, so that both do the same.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import itertools
import json
import math
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cases import (
    ALL_CASES,
    DTYPE_PAIRS,
    FLOATS,
    FULL_CASES,
    LAYOUT_SHAPE,
    LAYOUTS,
    NONFINITE,
    OptimizerCase,
    adamw,
    dtype_name,
    sgd,
)
from harness import FUSED, make_param, randn
from torch import Tensor

import fusedopt

Pair = tuple[torch.dtype, torch.dtype]  # of a param and of its gradient
EXTREME_CASES = [
    adamw("betas_near_one", betas=(1 - 1e-5, 1 - 1e-7)),
    adamw("betas_that_round_to_one", betas=(1 - 1e-9, 1 - 1e-9), weight_decay=0.1),
    adamw("zero_eps", lr=0.02, eps=0.0, weight_decay=0.1),
    adamw("zero_lr", lr=0.0, weight_decay=0.1),
    adamw("tensors", lr=torch.tensor(0.02), betas=tuple(torch.tensor([0.9, 0.99]))),
    adamw("clip_to_zero", {"max_grad_norm": 0.0}),
    sgd("zero_lr", lr=0.0, momentum=0.9, weight_decay=0.1),
    sgd("tensors", lr=torch.tensor(0.02), weight_decay=torch.tensor(0.1)),
    sgd("measure", {"max_grad_norm": math.inf}, lr=0.1),
]
SCALERS: dict[str, dict[str, Any]] = {
    "fusedopt": {},
    "torch": {},
    "subclass": {},
    "fusedopt, amp_scaling": {"amp_scaling": True},
    "torch, amp_scaling": {"amp_scaling": True},
}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "few": [(n,) for n in (0, 1, 7, 300, 5, 2, 33, 1, 4, 40)],
    "sizes": [(n,) for n in (0, 1, 7, 255, 256, 8191, 8192, 8193, 20000)],
    "many": [(1 + n % 13,) for n in range(300)],
    "layouts": [LAYOUT_SHAPE, *[(n, 3, 2, 4) for n in range(1, 10)]],
}
SLOW = {**SHAPES, "many": SHAPES["many"][:40], "sizes": [(n,) for n in (0, 1, 255, 256, 40, 8193)]}


@dataclass(frozen=True)
class Setting:
    """A way to run a backend."""

    backend: str
    threads: int = 1
    simd: str | None = None
    quick: bool = False  # only with all dtypes in one optimizer

    def __str__(self) -> str:
        if self.backend != "cpu":
            return self.backend
        return f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, {self.simd or 'widest'}"


@dataclass(frozen=True)
class Training:
    """One run: an optimizer of its own, over params of its own."""

    what: str  # one row of the printed table: all dtypes together
    rule: str
    groups: tuple[dict[str, Any], ...]  # each over params of every shape
    common: dict[str, Any] = field(default_factory=dict)
    scene: str = "steady"
    scaler: str | None = None
    size: str = "few"
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of params and of gradients
    resumed: str | None = None  # the form in which the old checkout has saved it halfway
    dtypes: tuple[Pair, ...] = tuple(DTYPE_PAIRS)  # taken in turns by the params of a group
    masters: bool | None = True

    @property
    def key(self) -> str:
        names = "-".join(map(dtype_name, self.dtypes[0])) if len(self.dtypes) == 1 else "mixed"
        return f"{self.what}, {names}{', no masters' * (self.masters is False)}"

    def takes(self, pair: Pair) -> bool:
        """torch does not unscale gradients of float16."""
        return pair[1] != torch.float16 or (self.scaler != "torch" and self.scene != "unscaled")


def rows() -> Iterator[Training]:
    """What is trained, for params of any dtype."""
    for case in ALL_CASES + EXTREME_CASES:
        yield Training(str(case), case.rule, (case.hyper,), case.common)
    for full in FULL_CASES:
        groups = tuple(case.hyper for case in ALL_CASES if case.rule == full.rule)
        yield Training(f"{full}, a group for each case", full.rule, groups)
        for what, changed in variants(full):
            common = {**full.common, **changed.pop("common", {})}
            yield Training(f"{full}, {what}", full.rule, (full.hyper,), common, **changed)


def variants(full: OptimizerCase) -> Iterator[tuple[str, dict[str, Any]]]:
    for scene in SCENES:
        yield f"scene {scene}", {"scene": scene}
        unclipped = {"max_grad_norm": math.inf, "skip_nonfinite": False}
        yield f"scene {scene}, unclipped", {"scene": scene, "common": unclipped}
    for norm_type, scene in itertools.product((2.0, math.inf), ("nonfinite", "extreme")):
        common = {"norm_type": norm_type, "max_grad_norm": 0.7}
        yield f"norm {norm_type}, {scene}", {"scene": scene, "size": "sizes", "common": common}
    for scaler, scene in itertools.product(SCALERS, ("steady", "nonfinite", "unscaled")):
        common = SCALERS[scaler]
        changed = {"scaler": scaler, "scene": scene, "common": common}
        yield f"scaler {scaler}, {scene}", changed
    for size in ("sizes", "many"):
        yield size, {"size": size}
    for of_param, of_grad in itertools.product(LAYOUTS, LAYOUTS):
        if "contiguous" in (of_param, of_grad) or of_param == of_grad:
            changed = {"size": "layouts", "layouts": (of_param, of_grad)}
            yield f"layouts {of_param}, {of_grad}", changed
    for form, scaler in itertools.product(("state_dict", "pickle"), ("fusedopt", "subclass")):
        yield f"resumed from {form}, {scaler}", {"resumed": form, "scaler": scaler}


def trainings(setting: Setting, match: str) -> Iterator[Training]:
    """Those with ``match`` in their row."""
    for row in (row for row in rows() if match in row.what):
        if setting.threads > 1 and row.size == "few":
            row = replace(row, size="sizes")  # there are too few elements for two threads
        mixed = replace(row, dtypes=tuple(filter(row.takes, DTYPE_PAIRS)))
        yield mixed
        if setting.quick or setting.backend == "triton":  # interpreted, a step takes long
            continue
        yield replace(mixed, masters=False)
        if setting.threads == 1 and setting.simd is None and row.size != "layouts":
            for pair in mixed.dtypes:
                for masters in (None, False) if pair[0].itemsize == 2 else (None,):
                    yield replace(row, dtypes=(pair,), masters=masters)


# ---- a run --------------------------------------------------------------------------------------


# Of a tensor, in a form of which thousands are read in no time: dtype, shape, strides and bytes.
Packed = tuple[torch.dtype, torch.Size, tuple[int, ...], bytes]
Results = dict[str, dict[str, Packed]]  # of every run, by its key


def packed(tensor: Tensor) -> Packed:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tensor.shape, tensor.clone().stride(), data


def unpacked(values: Packed) -> Tensor:
    return torch.frombuffer(bytearray(values[3]), dtype=values[0]).view(values[1])


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


class ScalerOfAFramework(torch.amp.GradScaler):
    """Is made ours by fuse_scaler; its pickle says so."""


class Run:
    """The optimizer of a training, its params and its scaler."""

    def __init__(self, training: Training, setting: Setting) -> None:
        self.training = training
        self.shapes = (SHAPES if setting.backend == "cpu" else SLOW)[training.size]
        groups = [
            {**copy.deepcopy(hyper), "params": self.make_params(index)}
            for index, hyper in enumerate(training.groups)
        ]
        options = {"master_weights": training.masters, "backend": setting.backend}
        self.opt: Any = FUSED[training.rule](groups, **options, **training.common)
        self.scaler: Any = None
        self.log: dict[str, list[Tensor]] = {}
        if training.scaler is not None:
            kind = training.scaler.partition(",")[0]
            made_by = {"fusedopt": fusedopt.GradScaler, "torch": torch.amp.GradScaler}
            make = made_by.get(kind, ScalerOfAFramework)
            self.scaler = make("cpu", init_scale=12.34, growth_interval=3)
            if kind == "subclass":
                fusedopt.fuse_scaler(self.scaler)

    @property
    def params(self) -> list[Any]:
        return [param for group in self.opt.param_groups for param in group["params"]]

    def values(self, seed: int, of_grads: bool, scale: float = 1.0) -> list[Tensor]:
        lay_out, dtypes = LAYOUTS[self.training.layouts[of_grads]], self.training.dtypes
        return [
            lay_out(rounded(values, dtypes[index % len(dtypes)][of_grads]))
            for index, shape in enumerate(self.shapes)
            for values in [randn(shape, 1000 * seed + index, torch.float64, scale)]
        ]

    def make_params(self, seed: int) -> list[torch.nn.Parameter]:
        return [make_param(values) for values in self.values(seed, of_grads=False)]

    def give_grads(self, step: int) -> None:
        """Of a size that changes from step to step, scaled as ``backward()`` would leave them."""
        scale = (1.0, 0.02, 5.0, 0.3)[step % 4]
        if self.scaler is not None:
            scale *= self.scaler.scale(torch.ones(())).item()
        for number, group in enumerate(self.opt.param_groups):
            grads = self.values(100 + 100 * step + number, True, scale)
            for param, grad in zip(group["params"], grads, strict=True):
                param.grad_dtype = None  # a pickle does not keep it
                param.grad = grad

    def take(self, steps: range) -> None:
        for step in steps:
            try:
                self.step(step)
            except Exception as error:
                raise RuntimeError(f"{self.training.key}, step {step}: {error}") from error

    def step(self, step: int) -> None:
        self.give_grads(step)
        SCENES[self.training.scene](self, step)
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)
            self.scaler.update()
            self.note("scale", torch.tensor(self.scaler.get_scale()))
        for name in ("grad_norm", "clip_coef", "found_inf", "skipped_steps"):
            value = getattr(self.opt, name)
            self.note(name, torch.tensor(-1.0) if value is None else value)

    def note(self, name: str, value: Tensor) -> None:
        self.log.setdefault(name, []).append(value.detach().reshape(()).float())

    def save(self) -> bytes:
        """In the form that the training names."""
        if self.training.resumed == "pickle":
            return pickle.dumps((self.opt, self.scaler))
        values, file = [param.detach() for param in self.params], io.BytesIO()
        torch.save((values, self.opt.state_dict(), self.scaler.state_dict()), file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        if self.training.resumed == "pickle":
            self.opt, self.scaler = pickle.loads(saved)
            return
        values, state, of_scaler = torch.load(io.BytesIO(saved), weights_only=False)
        for param, value in zip(self.params, values, strict=True):
            param.data.copy_(value)
        self.opt.load_state_dict(state)
        self.scaler.load_state_dict(of_scaler)

    def result(self) -> dict[str, Packed]:
        """Everything that a user can see, by name."""
        tensors = {name: torch.stack(values) for name, values in self.log.items()}
        groups = repr(self.opt.state_dict()["param_groups"]).encode()
        tensors["repr of the param_groups"] = torch.frombuffer(bytearray(groups), dtype=torch.uint8)
        for index, param in enumerate(self.params):
            tensors[f"param {index}"] = param
            if param.grad is not None:
                tensors[f"grad {index}"] = param.grad
            for name, value in self.opt.state.get(param, {}).items():
                tensors[f"{name} of param {index}"] = value
        return {name: packed(tensor) for name, tensor in tensors.items()}


# ---- what happens before a step -----------------------------------------------------------------


def steady(run: Run, step: int) -> None:
    pass


def nonfinite(run: Run, step: int) -> None:
    if step % 5 == 2:
        for param, value in zip(run.params[3:6], NONFINITE, strict=True):
            param.grad[-1] = value


def unscaled(run: Run, step: int) -> None:
    """The user unscales."""
    if run.scaler is not None:
        run.scaler.unscale_(run.opt)


def extreme(run: Run, step: int) -> None:
    """Huge and denormal gradients, by turns and in one tensor."""
    for index, param in enumerate(run.params):
        scale = (1e30, 1e-41, 1.0, 1e-25)[(step + index) % 4]
        grad = param.grad.double() * scale
        grad[::3] *= 1e-30
        param.grad = rounded(grad, param.grad.dtype)


def schedule(run: Run, step: int) -> None:
    for group in run.opt.param_groups:
        if step == 2:
            group["lr"] = torch.tensor(group["lr"])
        group["lr"] *= 0.9
        group["weight_decay"] = 0.1 * (step % 3)


def grads_come_and_go(run: Run, step: int) -> None:
    """In other dtypes, too."""
    for index, param in enumerate(run.params):
        param.grad = param.grad.to(FLOATS[(step + index) % 3])
        if (step + index) % 3 == 0 or step == 3:
            param.grad = None


def switches(run: Run, step: int) -> None:
    """Terms of the rule come and go, with their states."""
    changed = {
        "maximize": step % 2 == 0,
        "decoupled_weight_decay": step % 3 == 0,
        "amsgrad": step % 4 >= 2,
        "betas": (0.9 * (step % 2), 0.99),
        "momentum": 0.9 * (step % 4 != 3),
        "nesterov": False,
    }
    for group in run.opt.param_groups:
        group.update({name: value for name, value in changed.items() if name in group})


def writes(run: Run, step: int) -> None:
    """To params, also where nobody counts versions: masters follow."""
    for param in run.params[step % 3 :: 3]:
        param.data[::7] = 0.125
        param.data.clamp_(-1.0, 1.0)
    with torch.no_grad():
        run.params[2 + step % 2].mul_(1.5)


def groups_and_states_are_added(run: Run, step: int) -> None:
    if step == 0:
        run.opt.init_state()
    if step == 2:
        run.opt.add_param_group({"params": run.make_params(77), "lr": 0.3})
        run.give_grads(step)


def reloads(run: Run, step: int) -> None:
    if step % 2 == 1:
        run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))


SCENES = {
    function.__name__: function
    for function in (
        steady, nonfinite, unscaled, extreme, schedule, grads_come_and_go, switches, writes,
        groups_and_states_are_added, reloads,
    )
}  # fmt: skip


# ---- the process --------------------------------------------------------------------------------


@contextlib.contextmanager
def served(backend: str, tests: Path) -> Iterator[None]:
    """CPU tensors are served by ``backend``."""
    helper = {"cuda": "cuda_shim", "triton": "triton_interpreter"}.get(backend)
    if helper is None:
        yield
        return
    # Last: a folder named triton is not to hide the package.
    sys.path += sorted({str(path.parent) for path in tests.rglob("*.py")})
    with importlib.import_module(helper).installed():
        yield


def train(setting: Setting, steps: int, match: str, saved_file: Path) -> Results:
    """The file holds the runs to be resumed, halfway; it is written where it is missing."""
    halfway, results, saved = steps // 2, {}, {}
    resumes_others = saved_file.exists()
    if resumes_others:
        saved = pickle.loads(saved_file.read_bytes())
    for training in trainings(setting, match):
        run = Run(training, setting)
        if training.resumed is None:
            run.take(range(halfway))
        else:
            if not resumes_others:
                run.take(range(halfway))
                saved[training.key] = run.save()
                run = Run(training, setting)
            run.load(saved[training.key])
        run.take(range(halfway, steps))
        results[training.key] = run.result()
    saved_file.write_bytes(pickle.dumps(saved))
    return results


def main() -> None:
    checkout, setting, steps, match, saved, out = json.loads(sys.argv[1])
    if Path(fusedopt.__file__).resolve().parent.parent != Path(checkout):
        raise SystemExit(f"fusedopt comes from {fusedopt.__file__}, not from {checkout}")
    sys.path.append(sys.path.pop(0))  # what is imported from here on is the checkout's own
    setting = Setting(**setting)
    torch.set_num_threads(setting.threads)
    with served(setting.backend, Path(checkout, "tests")):
        results = train(setting, steps, match, Path(saved))
    Path(out).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
