"""Random configurations and orders of calls against the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from cases import FLOATS, LAYOUTS, NONFINITE
from harness import Trio, make_param, randn
from hypothesis import given, settings
from torch import Tensor

SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.integers(0, 80).map(lambda n: (n,)),
    st.sampled_from([(8191,), (8193,), (257,), (3, 100)]),
)
SCALES = st.sampled_from([1e-4, 0.1, 1.0, 30.0])
Draw = st.DataObject


@st.composite
def hyper_parameters(draw: st.DrawFn, rule: str) -> dict[str, Any]:
    hyper: dict[str, Any] = {
        "lr": draw(st.sampled_from([0.0, 1e-4, 0.01, 0.1])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "maximize": draw(st.booleans()),
        "decoupled_weight_decay": draw(st.booleans()),
    }
    if rule == "adamw":
        hyper["betas"] = draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0), (0.7, 0.8)]))
        hyper["eps"] = draw(st.sampled_from([1e-2, 0.1]))
        hyper["amsgrad"] = draw(st.booleans())
    else:
        hyper["momentum"] = draw(st.sampled_from([0.0, 0.5, 0.9]))
        hyper["nesterov"] = hyper["momentum"] > 0 and draw(st.booleans())
        damped = hyper["momentum"] > 0 and not hyper["nesterov"]
        hyper["dampening"] = draw(st.sampled_from([0.0, 0.3, 1.0])) if damped else 0.0
    return hyper


@st.composite
def common_options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "max_grad_norm": draw(st.sampled_from([None, 0.0, 0.5, 20.0, math.inf])),
        "norm_type": draw(st.sampled_from([2.0, math.inf])),
        "max_grad_value": draw(st.sampled_from([None, 0.2])),
        "master_weights": draw(st.sampled_from([None, True, False])),
        "skip_nonfinite": draw(st.booleans()),
    }


@dataclass(frozen=True)
class ParamSpec:
    """What a param is made of; short to print when an example fails."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    seed: int

    def make(self) -> Tensor:
        values = randn(self.shape, self.seed, self.dtype)
        return make_param(LAYOUTS[self.layout](values) if values.dim() > 1 else values)


PARAM_SPECS = st.builds(
    ParamSpec,
    SHAPES,
    st.sampled_from(FLOATS),
    st.sampled_from(["contiguous", "with_gaps", "transposed", "sliced"]),
    st.integers(0, 999),
)


class Session:
    """A user: one method per thing they may do next."""

    def __init__(self, data: Draw, backend: str) -> None:
        self.data = data
        self.rule = data.draw(st.sampled_from(["adamw", "sgd"]), label="rule")
        groups = [self.group() for _ in range(data.draw(st.integers(1, 2), label="groups"))]
        self.trio = Trio(self.rule, groups, backend, **data.draw(common_options(), label="common"))

    def group(self) -> dict[str, Any]:
        hyper = self.data.draw(hyper_parameters(self.rule), label="hyper")
        specs = self.data.draw(st.lists(PARAM_SPECS, max_size=3), label="params")
        # Enough elements of each dtype to say what error is normal.
        specs += [ParamSpec((900,), dtype, "contiguous", 5) for dtype in FLOATS]
        return {"params": [spec.make() for spec in specs], **hyper}

    def grads(self) -> list[Tensor | None]:
        scale, seed = self.data.draw(SCALES), self.data.draw(st.integers(0, 9999), label="seed")
        missing = self.data.draw(
            st.sets(st.integers(0, len(self.trio.params) - 1), max_size=3), label="missing"
        )
        return [
            randn(tuple(param.shape), seed + index, FLOATS[(seed + index) % 3], scale)
            if param.requires_grad and index not in missing
            else None
            for index, param in enumerate(self.trio.params)
        ]

    def step(self) -> None:
        grad_scale = self.data.draw(st.sampled_from([None, 1.0, 128.0, 1000.0]), label="grad_scale")
        self.trio.step(self.grads(), grad_scale=grad_scale)
        self.trio.check()

    def skipped_step(self) -> None:
        grads = self.grads()
        hit = [g for g in grads if g is not None and g.numel() > 0]
        if hit:
            bad = hit[self.data.draw(st.integers(0, len(hit) - 1), label="hit")]
            place = self.data.draw(st.integers(0, bad.numel() - 1), label="place")
            bad.view(-1)[place] = self.data.draw(st.sampled_from(NONFINITE))
        before = self.trio.snapshot()
        self.trio.step(grads, grad_scale=4.0, found_inf=self.data.draw(st.sampled_from([1.0, 2.0])))
        self.trio.assert_unmoved(before)

    def freeze_or_thaw(self) -> None:
        param = self.trio.params[self.data.draw(st.integers(0, len(self.trio.params) - 1))]
        param.requires_grad_(not param.requires_grad)

    def add_param_group(self) -> None:
        if len(self.trio.params) < 20:
            self.trio.add_param_group(self.group())

    def edit(self) -> None:
        index = self.data.draw(st.integers(0, len(self.trio.params) - 1), label="edited")
        with self.trio.writing(index) as param, torch.no_grad():
            if param.numel() > 0:
                stride = self.data.draw(st.integers(1, 9), label="every")
                values = param.detach().clone().flatten()
                values[::stride] = values[::stride] * 1.25 + 0.5
                param.copy_(values.view(param.shape))

    def change_lr(self) -> None:
        group = self.data.draw(st.integers(0, len(self.trio.opt.param_groups) - 1))
        self.trio.set(group, lr=self.data.draw(st.sampled_from([0.0, 1e-3, 0.05, 0.2])))

    def reload(self) -> None:
        self.trio.reload()
        self.trio.check()


ACTIONS = ["step", "step", "step", "skipped_step", "freeze_or_thaw", "add_param_group", "edit",
           "change_lr", "reload"]  # fmt: skip


# Named, since torch.testing loads a profile of its own.
@settings(settings.get_profile("fusedopt"), max_examples=60)
@given(data=st.data())
def test_any_session(backend: str, data: Draw) -> None:
    session = Session(data, backend)
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), min_size=2, max_size=9)):
        getattr(session, action)()
    session.step()
