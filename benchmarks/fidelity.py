"""How true AdamW stays to itself when its states and masters are stored in fewer bits.

python -m benchmarks fidelity                   traces, and both trainings as the study had them
python -m benchmarks fidelity --only traces     rows go to benchmarks/results/local
python -m benchmarks fidelity --quick           small and short, printed only

Traces are compared with float64: the error of the update over the last third, and the largest
update. Trainings start from the same seeds with every mode, and see the same text: a pair's
difference in the loss on text that was held out is the mode's. A lower loss is no merit: a state
that is too small makes a learning rate too high. docs/memory.md tells what the figures mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import fusedopt
from benchmarks import rows, traces
from benchmarks.codecs_of_others import FORMATS, RoundedAdamW
from benchmarks.words import make_training

MAX_GRAD_NORM = 1.0
PARTS = ("traces", "characters", "words")
WIDE = "fusedopt_fp32"  # what every other mode is compared with
FAR = 10.0  # in lr: an update beyond it comes from a second moment that is gone
SEEDS = {"traces": 1, "characters": 4, "words": 3}
STEPS = {"traces": traces.STEPS, "characters": 800, "words": 300}
QUICK_STEPS = {"traces": 60, "characters": 6, "words": 6}


class Mode(NamedTuple):
    """A way to store params, masters and states, and its bytes a parameter, gradient included."""

    label: str
    n_bytes: float
    make: Callable[..., Any]
    half: bool = False  # params are bf16


def ours(label: str, n_bytes: float, half: bool = False, **options: Any) -> Mode:
    make = partial(fusedopt.FusedAdamW, backend="cpu", **options)
    return Mode(label, n_bytes, make, half)


# As in docs/memory.md: fp32 params and gradients have 8 bytes, half ones 4; a log8 state 129 / 128.
_8, BIT8 = 2 * (1 + 1 / 128), {"state_dtype": "8bit"}
MODES: dict[str, Mode] = {
    WIDE: ours("fp32", 16),
    "fusedopt_bf16": ours("bf16 states, dithered", 12, state_dtype="bf16"),
    "fusedopt_8bit": ours("8-bit states", 8 + _8, **BIT8),
    "fusedopt_8bit_bf16": ours(
        "8-bit exp_avg, bf16 exp_avg_sq", 11 + 1 / 128,
        state_dtype={"exp_avg": "8bit", "exp_avg_sq": "bf16"},
    ),
    "fusedopt_remainder": ours(
        "bf16 params, remainder, 8-bit states", 6 + _8, True, master_weights="remainder", **BIT8
    ),
    "fusedopt_remainder8": ours(
        "bf16 params, remainder8, 8-bit states", 5 + _8, True, master_weights="remainder8", **BIT8
    ),
    "fusedopt_dither": ours(
        "bf16 params, dithered, 8-bit states", 4 + _8, True, master_weights="dither", **BIT8
    ),
    "fusedopt_nearest": ours("bf16 params to nearest, fp32 states", 12, True, master_weights=False),
    **{
        name: Mode(form.label, 8 + 2 * form.bytes_per_state, partial(RoundedAdamW, form=form))
        for name, form in FORMATS.items()
    },
}  # fmt: skip


# ---- traces --------------------------------------------------------------------------------------


def run_traces(report: rows.Report, args: Any, bar: tqdm[Any]) -> None:
    for name, trace in traces.TRACES.items():
        makes = {
            key: partial(MODES[key].make, **({"min_8bit_size": 0} if "fusedopt" in key else {}))
            for key in args.modes
            if not MODES[key].half
        }
        found: dict[str, list[traces.Outcome]] = {key: [] for key in makes}
        for seed in range(args.seeds["traces"]):
            setting = traces.Setting(args.elements, args.steps["traces"], seed)
            last = max(1, setting.steps // 3)
            for key, outcome in traces.follow(trace(setting), makes, setting, last=last).items():
                found[key].append(outcome)
            bar.update()
        note = f"{args.steps['traces']} steps of {args.elements} elements, seeds from 0"
        for key, outcomes in found.items():
            columns = {"case": f"fidelity-{name}", "pipeline": key, "note": note}
            columns |= {"params": args.elements, "dtype": "fp32"}
            report.add("update_error", "", [o.error for o in outcomes], **columns)
            report.add("largest_update", "lr", [o.largest for o in outcomes], **columns)


# ---- trainings -----------------------------------------------------------------------------------


class Trained(NamedTuple):
    loss: float  # on the text that was held out
    largest: float  # update in lr
    far: int  # updates beyond FAR
    numel: int


class Watched:
    """An optimizer of the model's fp32 weights, in whatever form it keeps them itself, that tells
    the largest update. The update is worked out from the states as they were read."""

    def __init__(self, mode: Mode, groups: list[dict[str, Any]], lr: float) -> None:
        self.weights = [p for group in groups for p in group["params"]]
        self.own = self.weights
        if mode.half:
            self.own = [torch.nn.Parameter(p.detach().bfloat16()) for p in self.weights]
            for param in self.own:
                param.grad_dtype = None  # the gradients stay fp32: only the storage is compared
            left = iter(self.own)
            groups = [{**group, "params": [next(left) for _ in group["params"]]}
                      for group in groups]  # fmt: skip
            self._show()
        options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
        self.optimizer = mode.make(groups, max_grad_norm=MAX_GRAD_NORM, **options)
        self.largest, self.far = 0.0, 0

    def _show(self) -> None:
        if self.own is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.own)

    @torch.no_grad()
    def step(self) -> None:
        for weight, own in zip(self.weights, self.own, strict=True):
            own.grad = weight.grad
        before = [self._moments(p) for p in self.own]
        self.optimizer.step()
        coef = float(getattr(self.optimizer, "clip_coef", 1.0))  # others clip in place
        betas = self.optimizer.param_groups[0]["betas"]
        for param, moments in zip(self.own, before, strict=True):
            self._look(param.grad * coef, moments, betas, self._step_of(param))
        self._show()

    def _step_of(self, param: Tensor) -> float:
        return float(self.optimizer.state[param]["step"])

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        own = self.optimizer.state.get(param, {})
        return _read(own, "exp_avg", param), _read(own, "exp_avg_sq", param)

    def _look(
        self, grad: Tensor, moments: tuple[Tensor, Tensor], betas: tuple[float, float], step: float
    ) -> None:
        mean = torch.lerp(moments[0], grad, 1 - betas[0]) / (1 - betas[0] ** step)
        squares = (moments[1] * betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        update = mean.abs_() / (squares / (1 - betas[1] ** step)).sqrt_().add_(1e-8)
        self.largest = max(self.largest, update.max().item())
        self.far += int((update > FAR).sum()) if self.largest > FAR else 0


def _read(own: dict[str, Any], name: str, param: Tensor) -> Tensor:
    from fusedopt import codecs

    if name in own:
        return own[name].float().clone()
    if f"{name}_log8" not in own:
        return torch.zeros(param.shape)
    codec = codecs.LOG8_POSITIVE if name == "exp_avg_sq" else codecs.LOG8
    return codecs.decode(codec, own[f"{name}_log8"], own[f"{name}_log8_scale"], None)


def train(part: str, mode: Mode, seed: int, steps: int) -> Trained:
    torch.manual_seed(seed)
    training = make_training(part, seed)
    groups = fusedopt.param_groups(training.model, 0.1, decay_embeddings=False)
    watched = Watched(mode, groups, training.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        watched.optimizer, max_lr=training.lr, total_steps=steps, cycle_momentum=False
    )
    for step in range(steps):
        training.loss(training.batch(step)).backward()
        watched.step()
        training.model.zero_grad()
        schedule.step()
    numel = sum(p.numel() for p in watched.weights)
    return Trained(training.held_out_loss(), watched.largest, watched.far, numel)


def run_training(report: rows.Report, part: str, args: Any, bar: tqdm[Any]) -> None:
    """Seed by seed, so that a run cut short has whole pairs; rows come at the end."""
    found: dict[str, list[Trained]] = {key: [] for key in args.modes}
    steps, seeds = args.steps[part], args.seeds[part]
    for seed in range(1, seeds + 1):
        for key in args.modes:
            found[key].append(train(part, MODES[key], seed, steps))
            bar.update()
    note = f"{steps} steps, paired seeds 1 to {seeds}"
    wide = [trained.loss for trained in found[WIDE]]
    for key, trained in found.items():
        columns = {"case": f"fidelity-{part}", "pipeline": key, "params": trained[0].numel,
                   "dtype": "bf16" if MODES[key].half else "fp32", "note": note}  # fmt: skip
        losses = [t.loss for t in trained]
        deltas = [own - other for own, other in zip(losses, wide, strict=True)]
        report.add("loss", "nats", losses, **columns)
        report.add("loss_delta", "nats", deltas, **columns)
        report.add("largest_update", "lr", [t.largest for t in trained], **columns)
        report.add("far_updates", "count", [t.far for t in trained], **columns)
        report.add("bytes", "B", [MODES[key].n_bytes], **columns)


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = rows.parser("fidelity", __doc__)
    add = options.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    add("--seeds", type=rows.positive, help=f"of each part (default: {SEEDS})")
    add("--steps", type=rows.positive, help=f"of each part (default: {STEPS})")
    add("--elements", type=rows.positive, help=f"of a trace, by 128 (default: {traces.N})")
    add("--threads", type=rows.positive, help="default: torch's, one for each core")
    rows.add_options(options, "few elements and steps, one seed")
    args = options.parse_args(arguments)
    args.modes = list(dict.fromkeys([WIDE, *args.modes]))
    args.steps = {
        part: args.steps or (QUICK_STEPS if args.quick else STEPS)[part] for part in PARTS
    }
    args.seeds = {part: args.seeds or (1 if args.quick else SEEDS[part]) for part in PARTS}
    args.elements = args.elements or (1024 if args.quick else traces.N)
    if args.elements % traces.COLUMNS:
        options.error(f"--elements {args.elements}: give a multiple of {traces.COLUMNS}")
    args.out = rows.destination(args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = rows.Report(rows.provenance(), args.out)
    amounts = {part: args.seeds[part] * len(args.modes) for part in PARTS}
    amounts["traces"] = args.seeds["traces"] * len(traces.TRACES)
    with tqdm(total=sum(amounts[part] for part in args.only), unit="run") as bar:
        if "traces" in args.only:
            run_traces(report, args, bar)
        for part in PARTS[1:]:
            if part in args.only:
                run_training(report, part, args, bar)
    print(rows.wide(report.figures(), ("update_error", "largest_update", "loss", "loss_delta",
                                       "far_updates", "bytes")))  # fmt: skip
    print(f"\n{rows.told(args.out)}")
    return 0
