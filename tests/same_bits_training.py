"""The training that same_bits.py compares: the table of its cases, and the process that runs them.

The process imports ``fusedopt`` from PYTHONPATH, and what drives the kernels of GPUs on a CPU from
the tests of that same checkout. Values come from torch's generator on the CPU, by seeds.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Pair = tuple[torch.dtype, torch.dtype]  # of a param and of its gradient
PAIRS: tuple[Pair, ...] = tuple(itertools.product(FLOATS, FLOATS))
DOUBLES: tuple[Pair, ...] = ((torch.float64, torch.float64), (torch.float64, torch.float32))
INF = math.inf


# ---- the table ----------------------------------------------------------------------------------


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
class Case:
    """One run: an optimizer of its own, over params of its own."""

    rule: str
    what: str  # one row of the printed table: all dtypes together
    groups: tuple[dict[str, Any], ...]  # each over params of every shape
    common: dict[str, Any] = field(default_factory=dict)
    scene: str = "steady"
    scaler: str | None = None
    size: str = "few"
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of params and of gradients
    alone: str = "same"  # dtypes with an optimizer to themselves: all pairs, equal ones, none
    resumed: str | None = None  # the form in which the old checkout has saved it halfway
    dtypes: tuple[Pair, ...] = PAIRS  # taken in turns by the params of a group
    masters: bool | None = True

    @property
    def dtype_names(self) -> str:
        names = ["mixed dtypes"]
        if len(self.dtypes) == 1:
            names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes[0]]
        return "/".join(names) + ("" if self.masters is not False else " without masters")

    @property
    def row(self) -> str:
        return f"{self.rule} {self.what}"

    @property
    def key(self) -> str:
        return f"{self.row}, {self.dtype_names}"

    def takes(self, pair: Pair) -> bool:
        """torch's own unscaling refuses gradients in fp16."""
        unscales = self.scaler == "torch" or self.scene == "unscaled"
        return not (unscales and pair[1] == torch.float16)

    @property
    def norm_bits(self) -> bool:
        """Whether the norm itself has to have the same bits, and not only its neighbour's."""
        return self.common.get("norm_type") == INF

    @property
    def clips(self) -> bool:
        """Whether the norm goes into the params, which then may differ."""
        return self.common.get("max_grad_norm", INF) < INF and not self.norm_bits


DECAY = {"lr": 0.02, "weight_decay": 0.1}
NESTEROV = {**DECAY, "momentum": 0.7, "nesterov": True}
COUPLED = {"decoupled_weight_decay": False}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {
        "defaults": {},
        "no decay": {"lr": 0.02, "weight_decay": 0.0},
        "decoupled decay": DECAY,
        "coupled decay": {**DECAY, **COUPLED},
        "maximize": {**DECAY, "maximize": True},
        "maximize, coupled": {**DECAY, **COUPLED, "maximize": True},
        "amsgrad": {**DECAY, "betas": (0.8, 0.9), "amsgrad": True},
        "amsgrad, coupled": {**DECAY, **COUPLED, "betas": (0.6, 0.9), "amsgrad": True},
        "beta1 = 0": {**DECAY, "betas": (0.0, 0.99)},
        "beta1 = 0.3": {**DECAY, "betas": (0.3, 0.99)},
        "beta1 = 0.5": {**DECAY, "betas": (0.5, 0.95), "eps": 1e-3},
        "both betas 0": {**DECAY, "betas": (0.0, 0.0)},
        "betas near 1": {**DECAY, "betas": (1 - 1e-5, 1 - 1e-7)},
        "betas that round to 1": {**DECAY, "betas": (1 - 1e-9, 1 - 1e-9)},
        "eps = 0": {**DECAY, "eps": 0.0},
        "large eps": {"lr": 0.5, "eps": 0.1, "weight_decay": 0.05},
        "lr = 0": {**DECAY, "lr": 0.0},
        "options in tensors": {"lr": torch.tensor(0.02), "betas": tuple(torch.tensor([0.9, 0.99]))},
    },
    "sgd": {
        "defaults": {},
        "decoupled decay": DECAY,
        "coupled decay": {**DECAY, **COUPLED},
        "maximize": {**DECAY, "maximize": True},
        "maximize, coupled": {**DECAY, **COUPLED, "maximize": True},
        "momentum": {**DECAY, "momentum": 0.9},
        "momentum, coupled": {**DECAY, **COUPLED, "momentum": 0.9},
        "dampening": {**DECAY, "momentum": 0.8, "dampening": 0.4},
        "dampening = 1": {**DECAY, "momentum": 0.9, "dampening": 1.0},
        "nesterov": NESTEROV,
        "nesterov, coupled, maximize": {**NESTEROV, **COUPLED, "maximize": True},
        "lr = 0": {**DECAY, "momentum": 0.9, "lr": 0.0},
        "options in tensors": {"lr": torch.tensor(0.02), "weight_decay": torch.tensor(0.1)},
    },
}  # fmt: skip
FULL: dict[str, dict[str, Any]] = {
    "adamw": {**DECAY, "betas": (0.7, 0.8), "eps": 1e-4, "amsgrad": True, "maximize": True},
    "sgd": {**DECAY, "momentum": 0.6, "dampening": 0.3, "maximize": True},
}
NORMS: dict[str, dict[str, Any]] = {
    "clip by norm 2": {"max_grad_norm": 0.7},
    "clip by norm 2, then value": {"max_grad_norm": 9.0, "max_grad_value": 0.1},
    "clip by norm inf": {"max_grad_norm": 0.5, "norm_type": INF},
    "clip by norm 0": {"max_grad_norm": 0.0},
    "measure norm 2": {"max_grad_norm": INF},
    "measure norm inf": {"max_grad_norm": INF, "norm_type": INF},
}
SCALERS: dict[str, dict[str, Any]] = {
    "fusedopt": {},
    "torch": {},
    "subclass": {},
    "fusedopt, amp_scaling": {"amp_scaling": True},
    "torch, amp_scaling": {"amp_scaling": True},
}


def rows() -> Iterator[Case]:
    """What is trained, for params of any dtype."""
    for rule, table in OPTIONS.items():
        full = (FULL[rule],)
        for name, hyper in table.items():
            yield Case(rule, name, (hyper,), alone="all")
        yield Case(rule, "every option, a group each", tuple(table.values()))
        for scene in (name for name in SCENES if name != "unscaled"):
            clips = {"max_grad_value": 2.0}
            yield Case(rule, f"scene: {scene}", full, clips, scene, alone="all")
        skips = {"skip_nonfinite": True}
        yield Case(rule, "nonfinite, skipped", full, skips, "nonfinite")
        yield Case(rule, "clip by value", full, {"max_grad_value": 0.3}, alone="all")
        yield Case(rule, "clip by value, else plain", ({},), {"max_grad_value": 0.3}, alone="all")
        for name, common in SCALERS.items():
            for scene in ("steady", "nonfinite", "unscaled"):
                yield Case(rule, f"scaler: {name}, {scene}", full, common, scene, name)
        for size in ("all", "many"):
            yield Case(rule, f"sizes: {size}", full, size=size, alone="all")
            yield Case(rule, f"sizes: {size}, plain", ({},), skips, size=size)
        for of_param, of_grad in itertools.product(LAYOUTS, LAYOUTS):
            if "contiguous" not in (of_param, of_grad) and of_param != of_grad:
                continue
            what = f"layouts: {of_param}, grads {of_grad}"
            yield Case(rule, what, full, {}, size="layout", layouts=(of_param, of_grad))
        for name, common in NORMS.items():
            for scene in ("steady", "nonfinite", "extreme"):
                yield Case(rule, f"{name}: {scene}", full, common, scene)
            yield Case(rule, f"{name}: sizes", full, common, size="all")
            yield Case(rule, f"{name}: scaler", full, common, "nonfinite", "fusedopt")
        for form in ("state_dict", "pickle", "torch.save"):
            for scaler in ("fusedopt", "subclass"):
                what = f"resumed from {form}, scaler {scaler}"
                yield Case(rule, what, full, scaler=scaler, resumed=form)


def cases(setting: Setting, match: str = "") -> Iterator[Case]:
    """Those whose row has ``match`` in its name."""
    same = [pair for pair in PAIRS if pair[0] == pair[1]]
    pairs = {"all": list(PAIRS), "same": same}
    if setting.backend == "reference":
        pairs = {"all": [*same, *DOUBLES], "same": [*same, *DOUBLES]}
    if setting.backend == "triton":  # interpreted, a step takes long
        pairs = {"all": same[:1], "same": []}
    for row in (row for row in rows() if match in row.row):
        if setting.threads > 1 and row.size == "few":
            row = replace(row, size="all")  # there are too few elements for two threads
        mixed = replace(row, dtypes=tuple(filter(row.takes, PAIRS)))
        yield mixed
        if setting.quick:
            continue
        if row.alone == "all" or setting.backend != "triton":
            yield replace(mixed, masters=False)
        if setting.threads > 1 or setting.simd is not None or row.size == "layout":
            continue
        for pair in filter(row.takes, pairs[row.alone]):
            for masters in (None, False) if pair[0].itemsize == 2 else (None,):
                yield replace(row, dtypes=(pair,), masters=masters)


# ---- params and gradients -----------------------------------------------------------------------

Shapes = dict[str, list[tuple[int, ...]]]
SHAPES: Shapes = {
    "few": [(n,) for n in (0, 1, 7, 300, 5, 2, 33, 1, 4, 40)],
    "all": [(n,) for n in (0, 1, 7, 255, 256, 8191, 8192, 8193, 20000)],
    "many": [(1 + n % 13,) for n in range(600)],
    "layout": [(3, 6, 5, 7), *[(n, 3, 2, 4) for n in range(1, 10)]],
}
# Where a step takes long.
SMALL: Shapes = {
    **SHAPES,
    "many": SHAPES["many"][:40],
    "all": [(n,) for n in (0, 1, 255, 256, 8193)],
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "transposed": lambda values: values.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda values: torch.stack([values, values], -1)[..., 0],
    "odd offset": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
}


def draw(shapes: list[tuple[int, ...]], seed: int, scale: float) -> list[Tensor]:
    """fp64 values in every shape."""
    lengths = [math.prod(shape) for shape in shapes]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64) * scale
    parts = torch.split(values, lengths)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


# ---- what happens before a step ------------------------------------------------------------------


def steady(run: Run, step: int) -> None:
    pass


def nonfinite(run: Run, step: int) -> None:
    if step % 5 == 2:
        for grad, value in zip(run.params[3:6], (math.nan, INF, -INF), strict=True):
            assert grad.grad is not None
            grad.grad[-1] = value


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
        group["lr"] *= 0.9
        group["weight_decay"] = 0.1 * (step % 3)


def lr_tensor(run: Run, step: int) -> None:
    for group in run.opt.param_groups:
        if step == 0:
            group["lr"] = torch.tensor(0.05)
        group["lr"].mul_(0.9)


def absent_grads(run: Run, step: int) -> None:
    for index, param in enumerate(run.params):
        if (step + index) % 3 == 0 or step == 3:
            param.grad = None


def dtypes_of_grads(run: Run, step: int) -> None:
    for index, param in enumerate(run.params):
        param.grad = param.grad.to(FLOATS[(step + index) % 3])


def switches(run: Run, step: int) -> None:
    """Terms of the rule come and go, with their states."""
    for group in run.opt.param_groups:
        group.update(maximize=step % 2 == 0, decoupled_weight_decay=step % 3 == 0)
        if "amsgrad" in group:
            group.update(amsgrad=step % 4 >= 2, betas=(0.9 * (step % 2), 0.99))
        else:
            group.update(momentum=0.9 * (step % 4 != 3), nesterov=False)


def amsgrad_later(run: Run, step: int) -> None:
    for group in run.opt.param_groups:
        if "amsgrad" in group:
            group["amsgrad"] = step >= 2


def writes(run: Run, step: int) -> None:
    """To params, also where nobody counts versions: masters follow."""
    for param in run.params[step % 3 :: 3]:
        param.data[::7] = 0.125
        param.data.clamp_(-1.0, 1.0)
    with torch.no_grad():
        run.params[2 + step % 2].mul_(1.5)


def added_group(run: Run, step: int) -> None:
    if step == 2:
        run.opt.add_param_group({"params": run.make_params(77), "lr": 0.3})
        run.give_grads(step)


def early_state(run: Run, step: int) -> None:
    if step == 0:
        run.opt.init_state()


def reloads(run: Run, step: int) -> None:
    if step % 2 == 1:
        run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))


SCENES: dict[str, Callable[[Run, int], None]] = {
    function.__name__: function
    for function in (
        steady, nonfinite, unscaled, extreme, schedule, lr_tensor, absent_grads, dtypes_of_grads,
        switches, amsgrad_later, writes, added_group, early_state, reloads,
    )
}  # fmt: skip


class Packed(NamedTuple):
    """A tensor, in a form of which thousands are read in no time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        flat = tensor.detach().contiguous().view(-1)
        data: bytes = flat.view(torch.uint8).numpy().tobytes()
        return cls(tensor.dtype, tuple(tensor.shape), tensor.clone().stride(), data)

    def tensor(self) -> Tensor:
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)


Results = dict[str, dict[str, Packed]]  # of every run, by its key


# ---- a run --------------------------------------------------------------------------------------


class ScalerOfAFramework(torch.amp.GradScaler):
    """Is made ours by fuse_scaler; its pickle says so."""


class Run:
    """The optimizer of a case, its params and its scaler."""

    def __init__(self, case: Case, setting: Setting) -> None:
        import fusedopt

        self.case = case
        self.shapes = (SHAPES if setting.backend == "cpu" else SMALL)[case.size]
        groups = [
            {**copy.deepcopy(hyper), "params": self.make_params(index)}
            for index, hyper in enumerate(case.groups)
        ]
        rule = fusedopt.FusedAdamW if case.rule == "adamw" else fusedopt.FusedSGD
        options = {"master_weights": case.masters, "backend": setting.backend, **case.common}
        self.opt: Any = rule(groups, **options)
        self.scaler: Any = None
        self.log: dict[str, list[Tensor]] = {}
        if case.scaler is not None:
            kind = case.scaler.partition(",")[0]
            made_by = {"fusedopt": fusedopt.GradScaler, "torch": torch.amp.GradScaler}
            make = made_by.get(kind, ScalerOfAFramework)
            self.scaler = make("cpu", init_scale=12.34, growth_interval=3)
            if kind == "subclass":
                fusedopt.fuse_scaler(self.scaler)

    @property
    def params(self) -> list[Any]:
        return [param for group in self.opt.param_groups for param in group["params"]]

    def make_params(self, seed: int) -> list[torch.nn.Parameter]:
        made = []
        for index, values in enumerate(draw(self.shapes, seed, 1.0)):
            dtype = self.case.dtypes[index % len(self.case.dtypes)][0]
            lay_out = LAYOUTS[self.case.layouts[0]]
            made.append(torch.nn.Parameter(lay_out(rounded(values, dtype))))
        return made

    def give_grads(self, step: int) -> None:
        """Of a size that changes from step to step, scaled as ``backward()`` would leave them."""
        scale = (1.0, 0.02, 5.0, 0.3)[step % 4]
        if self.scaler is not None:
            scale *= self.scaler.scale(torch.ones(())).item()
        lay_out, dtypes = LAYOUTS[self.case.layouts[1]], self.case.dtypes
        n = len(self.shapes)
        for number in range(len(self.params) // n):
            drawn = draw(self.shapes, 1000 + 100 * step + number, scale)
            params = self.params[number * n : (number + 1) * n]
            for index, (param, values) in enumerate(zip(params, drawn, strict=True)):
                param.grad_dtype = None  # any
                param.grad = lay_out(rounded(values, dtypes[index % len(dtypes)][1]))

    def take(self, steps: range) -> None:
        for step in steps:
            try:
                self.step(step)
            except Exception as error:
                raise RuntimeError(f"{self.case.key}, step {step}: {error}") from error

    def step(self, step: int) -> None:
        self.give_grads(step)
        SCENES[self.case.scene](self, step)
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)
            self.scaler.update()
            self._note("scale", torch.tensor(self.scaler.get_scale()))
        for name in ("grad_norm", "clip_coef", "found_inf", "skipped_steps"):
            value = getattr(self.opt, name)
            self._note(name, torch.tensor(-1.0) if value is None else value)

    def _note(self, name: str, value: Tensor) -> None:
        self.log.setdefault(name, []).append(value.detach().reshape(()).float())

    def save(self) -> bytes:
        """In the form that the case names."""
        if self.case.resumed == "pickle":
            return pickle.dumps((self.opt, self.scaler))
        values = [param.detach() for param in self.params]
        states = (values, self.opt.state_dict(), self.scaler.state_dict())
        whole = (self.opt, self.scaler)
        file = io.BytesIO()
        torch.save(whole if self.case.resumed == "torch.save" else states, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        if self.case.resumed == "pickle":
            self.opt, self.scaler = pickle.loads(saved)
            return
        loaded = torch.load(io.BytesIO(saved), weights_only=False)
        if self.case.resumed == "torch.save":
            self.opt, self.scaler = loaded
            return
        values, state, of_scaler = loaded
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
        return {name: Packed.of(tensor) for name, tensor in tensors.items()}


# ---- the process --------------------------------------------------------------------------------


@contextlib.contextmanager
def served(backend: str) -> Iterator[None]:
    """CPU tensors are served by ``backend``; the checkout is the one ``fusedopt`` comes from."""
    import fusedopt

    helper = {"cuda": "cuda_shim", "triton": "triton_interpreter"}.get(backend)
    if helper is None:
        yield
        return
    tests = Path(fusedopt.__file__).parent.parent / "tests"
    if not list(tests.rglob(f"{helper}.py")):
        raise SystemExit(f"no {helper}.py below {tests}")
    # Last: a folder named triton is not to hide the package.
    sys.path += sorted({str(path.parent) for path in tests.rglob("*.py")})
    with importlib.import_module(helper).installed():
        yield


@dataclass(frozen=True)
class Job:
    """What the process is told, as JSON."""

    checkout: str
    verb: str  # "save" the runs that are to be resumed, halfway; or "train" all
    setting: Setting
    steps: int
    match: str
    saved: str
    out: str


def save(job: Job) -> None:
    saved: dict[str, bytes] = {}
    for case in cases(job.setting, job.match):
        if case.resumed is not None:
            run = Run(case, job.setting)
            run.take(range(job.steps // 2))
            saved[case.key] = run.save()
    Path(job.saved).write_bytes(pickle.dumps(saved))


def train(job: Job) -> None:
    saved: dict[str, bytes] = pickle.loads(Path(job.saved).read_bytes())
    results: Results = {}
    for case in cases(job.setting, job.match):
        run = Run(case, job.setting)
        first = 0
        if case.resumed is not None:
            run.load(saved[case.key])
            first = job.steps // 2
        run.take(range(first, job.steps))
        results[case.key] = run.result()
    Path(job.out).write_bytes(pickle.dumps(results))


def main() -> None:
    told = json.loads(sys.argv[1])
    job = Job(**{**told, "setting": Setting(**told["setting"])})
    sys.path.pop(0)  # this folder: helpers are those of the checkout
    import fusedopt

    if Path(fusedopt.__file__).resolve().parent.parent != Path(job.checkout).resolve():
        raise SystemExit(f"fusedopt comes from {fusedopt.__file__}, not from {job.checkout}")
    torch.set_num_threads(job.setting.threads)
    with served(job.setting.backend):
        save(job) if job.verb == "save" else train(job)


if __name__ == "__main__":
    main()
