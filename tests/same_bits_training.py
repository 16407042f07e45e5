"""The process that same_bits.py starts: all runs of one checkout.

It imports ``fusedopt`` from PYTHONPATH, and what drives the kernels of GPUs on a CPU from
the tests of that same checkout. Values come from torch's generator on the CPU, by seeds.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import math
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from same_bits_cases import LAYOUTS, SHAPES, SMALL, Case, Setting, cases
from same_bits_scenes import SCENES, rounded
from torch import Tensor


def draw(shapes: list[tuple[int, ...]], seed: int, scale: float) -> list[Tensor]:
    """fp64 values in every shape."""
    lengths = [math.prod(shape) for shape in shapes]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64) * scale
    parts = torch.split(values, lengths)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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
    if not [*tests.rglob(f"{helper}.py"), *tests.rglob(f"{helper}/__init__.py")]:
        raise SystemExit(f"no module {helper} below {tests}")
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
