"""The reference backend: the verbs in plain torch operations.

Slow and obvious. Serves where no kernel does (no compiler, float64, devices without a backend) and
shows what the kernels compute. It rounds where torch's operations round, so it agrees with the
kernels within the tolerance policy, not to the bit; and it reads the skip flag on the host.

All new values are worked out before the first is written, and then all are written at once: a
step that runs out of memory, or is interrupted by a signal, has moved nothing. So while it runs
there is one more copy of the updated params and their states.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..codecs import FLOAT32, Codec, decode, dither, encode
from ..plan.local import dtensor_type, local_of
from ..plan.memory import state_dtype
from ..plan.plan import (
    CLIP_COEF,
    FOUND_INF,
    GRAD_MULT,
    GRAD_NORM,
    INV_SCALE,
    SKIP,
    SKIPPED_STEPS,
    Layout,
    Look,
    Plan,
    Row,
    StepInputs,
    copy_all,
)
from ..rules.declaration import Group, Rule
from . import records
from .squares import LARGEST_SUM, UNIT, digits_of, root_of, sum_of_squares
from .watch import PythonWatch, row_kind

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_


class ReferencePlan(Plan):
    """A plan without tables: the operations take tensors."""

    def __init__(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> None:
        super().__init__(rule, rows, layout)
        # One for each row that has a gradient; reduce computes them for finalize.
        self.norms = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.finite = torch.zeros(0, dtype=torch.bool, device="cpu")
        self.squares = 0  # with norm_bits="exact": the sum over all that is counted
        self._refused = 0

    def _write_rows(self) -> None:
        """There are no tables."""

    def look_at(self, groups: list[Group], state: dict[Tensor, Any]) -> None:
        self._watch = PythonWatch(groups, state, list(map(row_kind, self.rows)), dtensor_type())

    def _look(self, groups: list[Group], state: dict[Tensor, Any]) -> Look | None:
        return self._watch.refresh(groups, state, address=0)

    def _use_grad(self, index: int, grad: Tensor) -> None:
        """torch's operations take any layout."""

    def active(self) -> list[tuple[Row, Tensor]]:
        pairs = [(row, self._step.grad(i)) for i, row in enumerate(self.rows)]
        return [(row, local_of(grad).detach()) for row, grad in pairs if grad is not None]

    def nbytes(self) -> int:
        return self.norms.nbytes + self.staging_nbytes()

    def begin(self, step: StepInputs) -> None:
        self._step = step
        one = torch.ones((), dtype=torch.float32, device=step.scalars.device)
        scale = one if step.grad_scale is None else step.grad_scale.detach().reshape(())
        self._inv_scale = scale.double().reciprocal().float()  # fp64, as GradScaler does

    @torch.no_grad()
    def reduce(self) -> None:
        step, active = self._step, self.active()
        self.norms = torch.zeros(len(active), dtype=torch.float64, device=step.scalars.device)
        self.finite, self.squares = torch.zeros_like(self.norms, dtype=torch.bool), 0
        for i, (row, grad) in enumerate(active):
            x = grad.to(state_dtype(row.param)) * self._inv_scale.to(grad.device)
            self.norms[i] = vector_norm(x, step.options.norm_type)
            self.finite[i] = x.isfinite().all()
            if step.norm_is_exact and (step.ranks is None or row.counted):
                self.squares += sum_of_squares(x)

    @torch.no_grad()
    def exchange(self) -> None:
        step = self._step
        if step.ranks is None:
            return
        flags = [row.counted for row, _ in self.active()]
        counted = torch.tensor(flags, dtype=torch.bool, device="cpu")
        words = self._own_words(counted.to(self.norms.device))
        step.ranks.add_up(words, step.options.norm_type)
        self._take_words([int(word) for word in words])

    def _own_words(self, counted: Tensor) -> Tensor:
        """The message of csrc/words.h; the sum of squares is a whole number of its last digits."""
        step, words = self._step, [0] * records.WORDS
        words[records.INF_CHUNKS] = int(self.norms.isinf().sum())
        words[records.NAN_CHUNKS] = int(self.norms.isnan().sum())
        if step.options.norm_type == math.inf:
            largest = vector_norm(self.norms, math.inf).float()  # an inf is counted above
            words[records.LARGEST] = int(largest.view(torch.int32)) & 0x7FFFFFFF  # a NaN's sign
            words[records.DIGITS - 2 : records.DIGITS] = (
                step.fingerprint,
                records.FINGERPRINTS - step.fingerprint,
            )
        else:
            if not step.norm_is_exact:
                squares = self.norms[counted & self.finite].square().sum().item()
                self.squares = int(Fraction(min(squares, LARGEST_SUM)) * 2**-UNIT)
            words[: records.DIGITS] = digits_of(self.squares)
            words[records.LARGEST] = records.FINGERPRINTS * 256 + step.fingerprint
        if step.found_inf is not None and step.found_inf.reshape(()) != 0:
            words[records.VOTES] += records.FOUND_INF
        if not self._inv_scale.isfinite():
            words[records.VOTES] += records.BAD_SCALE
        return torch.tensor(words, dtype=torch.int64, device=step.scalars.device)

    def _take_words(self, words: Sequence[int]) -> None:
        """What all ranks have found; or, where one refuses the step, only that."""
        step, of_rank = self._step, records.FINGERPRINTS * 256 + self._step.fingerprint
        if step.options.norm_type == math.inf:
            alike = (
                words[records.LARGEST]
                < records.FINGERPRINTS
                == words[records.DIGITS - 2] + words[records.DIGITS - 1]
            )
        else:
            alike = words[records.LARGEST] == step.ranks.size * of_rank
        self._refused = (
            records.BY_ABORT
            if words[records.VOTES] >= records.ABORT
            else 0
            if alike
            else records.BY_OPTIONS
        )
        if self._refused:
            return
        if step.options.norm_type == math.inf:
            norm = struct.unpack("=f", struct.pack("=I", words[records.LARGEST]))[0]
        else:
            norm = math.sqrt(
                sum(words[d] << 32 * d for d in range(records.DIGITS)) / 2**-records.LOWEST
            )
        norm = (
            math.nan
            if words[records.NAN_CHUNKS]
            else math.inf
            if words[records.INF_CHUNKS]
            else norm
        )
        votes = words[records.VOTES]
        self._agreed = norm, votes % records.BAD_SCALE != 0, votes // records.BAD_SCALE != 0

    @torch.no_grad()
    def finalize(self) -> None:
        step = self._step
        scalars = step.scalars
        if step.ranks is not None and self._refused:
            return
        clip_coef = torch.ones((), dtype=torch.float64, device=scalars.device)
        bad_scale = ~self._inv_scale.isfinite()
        norm, bad = clip_coef * math.nan, torch.zeros_like(bad_scale)
        if step.measured:
            norm = vector_norm(self.norms, step.options.norm_type)
            bad = ~self.finite.all()
            if step.norm_is_exact and not bad:
                norm = clip_coef * root_of(self.squares)
        if step.found_inf is not None:
            bad = bad | (step.found_inf.reshape(()) != 0)
        if step.ranks is not None:
            agreed, found_inf, bad_scale_somewhere = self._agreed
            norm = clip_coef * agreed
            bad, bad_scale = ~norm.isfinite() | found_inf, bad_scale | bad_scale_somewhere
        if step.measured and step.options.max_grad_norm is not None:
            clip_coef = (step.options.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        bad = bad | bad_scale
        self.grad_mult = clip_coef * self._inv_scale
        scalars[GRAD_NORM] = norm
        scalars[CLIP_COEF] = clip_coef
        scalars[GRAD_MULT] = self.grad_mult
        scalars[INV_SCALE] = self._inv_scale
        scalars[FOUND_INF] = bad
        scalars[SKIP] = bad_scale | (bad & step.skip_nonfinite)
        if step.inf_flag is not None:
            step.inf_flag.copy_(scalars[FOUND_INF])

    def refusal(self) -> int:
        return self._refused

    @torch.no_grad()
    def update(self) -> None:
        step = self._step
        if step.scalars[SKIP] != 0:
            step.scalars[SKIPPED_STEPS].add_(1)
            return
        new: list[tuple[Tensor, Tensor]] = []
        for row, grad in self.active():
            new += self._updated(row, grad)
        copy_all([target for target, _ in new], [value for _, value in new])

    def _updated(self, row: Row, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every tensor of the row that changes, and its new value."""
        step = self._step
        group = step.groups[row.group]
        dtype = state_dtype(row.param)
        grad = grad.to(dtype) * self.grad_mult.to(grad.device, dtype)
        most = step.options.max_grad_value
        if most is not None:
            grad = grad.clamp(-most, most)
        if group["maximize"]:
            grad = -grad
        own, of_master, *of_states = row.codecs
        p = row.dense.to(dtype)
        if row.master is not None and of_master is not FLOAT32:
            p = decode(of_master, row.master, None, row.dense)
        elif row.master is not None:
            unwritten = row.dense == row.master.to(row.dense.dtype)
            p = torch.where(unwritten, row.master, p)
        stored = list(zip(of_states, row.states, row.scales, strict=True))
        states = [
            data.clone() if codec.dtype == dtype else decode(codec, data, scales, None)
            for codec, data, scales in stored
        ]
        count = 0 if row.step is None else int((row.step + 1).item())
        p = self.rule.reference(p, grad, states, group, count)
        new: list[tuple[Tensor, Tensor]] = []
        for k, ((codec, data, scales), value) in enumerate(zip(stored, states, strict=True), 1):
            new += encoded(codec, value, (data, scales, None), row, count, stream=k)
        if row.master is not None and of_master is not FLOAT32:
            new += encoded(of_master, p, (row.master, None, row.dense), row, count, stream=0)
        else:
            new += encoded(own, p, (row.dense, None, None), row, count, stream=0)
            if row.master is not None:
                new.append((row.master, p))
        if row.step is not None:
            new.append((row.step, row.step + 1))
        return new


def encoded(
    codec: Codec,
    value: Tensor,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    row: Row,
    step: int,
    stream: int,
) -> list[tuple[Tensor, Tensor]]:
    """A stream's data, scales and param, as far as it has them, each with its new value."""
    data = tensors[0]
    if codec.dtype.is_floating_point and not codec.dithers:
        return [(data, value.to(data.dtype))]
    t = dither(data.numel(), data.device, row.first, step, stream) if codec.dithers else None
    new = [None if tensor is None else torch.empty_like(tensor) for tensor in tensors]
    encode(codec, value, new[0], new[1], new[2], t)  # type: ignore[arg-type]
    pairs = zip(tensors, new, strict=True)
    return [(old, now) for old, now in pairs if old is not None and now is not None]


def vector_norm(x: Tensor, norm_type: float) -> Tensor:
    """fp64 norm of ``x`` that neither over- nor underflows for finite ``x``."""
    x = x.double()
    if x.numel() == 0:
        return x.new_zeros(())
    largest = x.abs().max()
    if norm_type == math.inf:
        return largest
    usable = (largest > 0) & largest.isfinite()
    scale = torch.where(usable, largest, torch.ones_like(largest))
    return scale * (x / scale).square().sum().sqrt()


class ReferenceBackend:
    """Plain torch operations, for any device and floating-point dtype."""

    name = "reference"

    def plan(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> Plan:
        return ReferencePlan(rule, rows, layout)
