"""The plan: which tensors a step touches, in which order, and where their gradients are now.

Built once for a set of parameters. Before every step ``refresh`` checks that the optimizer is still
the one that the plan was built for; only gradients may have moved. Each backend decides how its
kernels get the rows (``fusedopt/backends``).
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codecs import BFLOAT16, DITHERED, FLOAT16, FLOAT32, FLOAT64, Codec
from ..options import Options
from ..rules.declaration import Group, Rule
from .checks import DTYPES, check_grad, is_of_inference, is_served
from .local import is_dtensor, local_of, reduced_alike

# Fields of StepScalars (csrc/records.h), eight fp32 values on the device.
GRAD_NORM, CLIP_COEF, GRAD_MULT, INV_SCALE, FOUND_INF, SKIP, SKIPPED_STEPS = range(7)
N_STEP_SCALARS = 8  # one is spare

KERNEL_DTYPES = tuple(dtype for dtype in DTYPES if dtype.itemsize <= 4)  # in order of their codecs
HALF_DTYPES = tuple(dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2)

# What each codec of params and gradients is, by dtype; fp64 is for the reference backend.
CODEC_OF = {codec.dtype: codec for codec in (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)}


class Kept(NamedTuple):
    """How the states of a group's parameters are kept."""

    names: tuple[str, ...]  # the rule's
    forms: tuple[str | None, ...]  # of each: "bf16", "8bit", or None for fp32


Layout = list[Kept]  # for each group


class Row:
    """One parameter in the plan.

    ``served`` is False for a frozen parameter without gradient. Until it has one, only its
    ``.grad`` is read, and the other attributes have no meaning.

    ``local`` is this rank's part of the parameter. ``dense`` is the tensor that the kernels update:
    the local part itself, or a copy without gaps that is written back after the update. ``states``
    are in the rule's order, and local, as stored; ``scales`` are those of each. ``codecs`` are
    those of the param, the master and each state. ``counted`` is False if another rank counts the
    gradient. ``first`` is the place of a shard's first element in the whole tensor.

    The optimizer owns the state. A row has weak references to state, and none to the parameter's
    memory. So memory that a user drops or moves between two steps is freed at once, as with torch.
    (The native watch keeps tensors of a page or less until the next step: csrc/watch/watch.h.)
    """

    def __init__(self, param: Tensor, label: str, group: int) -> None:
        self.param, self.label, self.group = param, label, group
        self.served = is_served(param)
        self.copy: Tensor | None = None if self.served else torch.empty(0, device="cpu")
        self.awaits_state, self.counted, self.first = False, True, 0
        self.set_state((), None, None)

    def set_state(
        self,
        states: Sequence[Tensor],
        master: Tensor | None,
        step: Tensor | None,
        scales: Sequence[Tensor | None] = (),
        codecs: Sequence[Codec] = (),
    ) -> None:
        """``scales``: of each state; ``codecs``: of the param, of the master (FLOAT32 where there
        is none) and of each state. Without them, all are as their dtypes say."""
        self._states = [weakref.ref(t) for t in states]
        self._master = None if master is None else weakref.ref(master)
        self._step = None if step is None else weakref.ref(step)
        self._scales = [
            None if t is None else weakref.ref(t) for t in scales or [None] * len(states)
        ]
        self._codecs = tuple(codecs)

    @property
    def local(self) -> Tensor:
        return local_of(self.param)

    @property
    def dense(self) -> Tensor:
        return self.local if self.copy is None else self.copy

    @property
    def states(self) -> tuple[Tensor, ...]:
        return tuple(local_of(_alive(ref)) for ref in self._states)

    @property
    def scales(self) -> tuple[Tensor | None, ...]:
        return tuple(None if ref is None else local_of(_alive(ref)) for ref in self._scales)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        if self._codecs:
            return self._codecs
        master = FLOAT32 if self._master is None else CODEC_OF[_alive(self._master).dtype]
        states = (CODEC_OF[state.dtype] for state in self.states)
        return (CODEC_OF[self.dense.dtype], master, *states)

    @property
    def is_coded(self) -> bool:
        """Whether a kernel for fp32 states and masters cannot update the row."""
        param, *others = self.codecs
        return param is DITHERED or any(codec is not FLOAT32 for codec in others)

    @property
    def master(self) -> Tensor | None:
        return None if self._master is None else local_of(_alive(self._master))

    @property
    def step(self) -> Tensor | None:
        return None if self._step is None else _alive(self._step)

    @property
    def staged(self) -> bool:
        return self.served and self.copy is not None

    def memory(self) -> list[Tensor]:
        """All tensors that a step on this row touches, for a caller that has to keep them alive."""
        return [self.local.detach(), self.dense.detach(), *map(local_of, self.own())]

    def own(self) -> list[Tensor]:
        """The tensors of its state that are still alive."""
        return [tensor for ref in self._refs() if (tensor := ref()) is not None]

    def is_in(self, state: dict[Tensor, Any]) -> bool:
        """Whether ``state`` still holds the row's state."""
        own = state.get(self.param, {})
        values = set(map(id, own.copy().values())) if isinstance(own, dict) else ()
        return all(ref() is not None and id(ref()) in values for ref in self._refs())

    def form(self) -> tuple[Any, ...]:
        """Everything that a plan's tables depend on, except addresses."""
        dense, states = self.dense, len(self._states)
        which = (self.served, self.awaits_state, self.group, states, self._master is None)
        return (*which, self.counted, self.first, self.codecs, dense.numel(), dense.device)

    def _refs(self) -> list[weakref.ref[Tensor]]:
        every = (*self._states, *self._scales, self._master, self._step)
        return [ref for ref in every if ref is not None]


def _alive(ref: weakref.ref[Tensor]) -> Tensor:
    tensor = ref()
    if tensor is None:  # not after refresh(): the step holds all state
        raise RuntimeError("parameters or gradients changed while step() was preparing")
    return tensor


# The objects that a step owns while it runs: the gradient of each row, or None, and then the
# state's tensors. Another thread may drop any of them meanwhile.
Held = list[Any]


@dataclass(slots=True)
class StepInputs:
    """Everything one step needs besides the plan; the options are re-read from the groups."""

    groups: list[Group]
    table: bytearray  # the rule's Options table, 64 bytes a group
    options: Options  # of the whole optimizer
    scalars: Tensor  # StepScalars
    measured: bool
    skip_nonfinite: bool
    grad_scale: Tensor | None  # fp32, one element; gradients are divided by it
    found_inf: Tensor | None  # fp32, one element; non-zero: some gradient is not finite
    inf_flag: Tensor | None  # fp32; the flag that our own GradScaler reads
    # Options that the user keeps on the device: index of the double in the options table, tensor.
    device_numbers: list[tuple[int, Tensor]]
    held: Held | None = None  # once the plan has been refreshed
    ranks: Any = None  # plan.exchange.Ranks; those that share the norm with this process
    fingerprint: int = 0  # of the options, for the ranks to compare

    @property
    def norm_is_exact(self) -> bool:
        """The squares of all elements are added up exactly, not the sums of chunks."""
        return self.options.norm_bits == "exact" and self.options.norm_type != math.inf

    def grad(self, row: int) -> Tensor | None:
        """The gradient of the plan's row in this step; ``None``: takes no part in it."""
        assert self.held is not None
        grad: Tensor | None = self.held[row]
        return grad


# Rows whose gradient needs care, rows without one, and the objects that the step has to hold.
Look = tuple[Sequence[int], Sequence[int], Held]


class Plan(ABC):
    """Rows of one parameter set, and the verbs of a step over them.

    ``begin`` packs all that a step needs from the host; ``reduce`` turns gradients into the words
    of their norm; ``exchange`` adds up the words of devices and ranks; ``finalize`` turns
    words into ``StepScalars``; ``update`` is one pass over params and states, and counts the step.
    Except in the reference backend, none of them reads anything back to the host. Without a norm or
    a check to compute, ``reduce`` and ``exchange`` are left out.

    A plan keeps no gradient alive: it has addresses, and copies where needed.
    """

    backend: str  # the name of its backend
    answers_late = False  # the host does not wait for ``refusal``
    ranks: Any = None  # plan.exchange.Ranks, or its Refusal
    fsdp1_sharded = False  # of FSDP1, while its groups were looked at
    told: Tensor  # int32 of the host; where kernels write why a rank refuses a step

    def __init__(self, rule: Rule, rows: Sequence[Row], layout: Layout) -> None:
        self.rule = rule
        self.layout = layout
        self._captured: list[Tensor] = []
        self._take(rows)

    def _take(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.first = next((row for row in self.rows if row.served), None)
        self._staged_grads: dict[int, Tensor] = {}
        self._staged_params = [row for row in self.rows if row.staged]
        self._absent: Sequence[int] = ()  # rows without a gradient in this step
        self._confirmed = False
        tensors = enumerate((row.param, *row.own()) for row in self.rows)
        self._of_inference = [i for i, each in tensors if any(map(is_of_inference, each))]

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds addresses of this plan's tables and of the tensors in them."""
        return bool(self._captured)

    def capture(self) -> None:
        """From now on the plan keeps all memory alive that its tables name."""
        self._captured = [tensor for row in self.rows for tensor in row.memory()]

    def rebind(self, rows: Sequence[Row]) -> bool:
        """Use this plan for ``rows`` if they differ from its own only in addresses; its tables and
        buffers stay. False if more differs, or if a CUDA graph uses the tables."""
        same = [row.form() for row in rows] == [row.form() for row in self.rows]
        if not same or self.captured or any(row.staged for row in (*rows, *self.rows)):
            return False
        self._take(rows)
        self._write_rows()
        return True

    @abstractmethod
    def begin(self, step: StepInputs) -> None: ...

    @abstractmethod
    def reduce(self) -> None: ...

    def exchange(self) -> None:  # noqa: B027  # few plans share a norm
        pass

    @abstractmethod
    def finalize(self) -> None: ...

    def refusal(self) -> int:
        """Why a rank refuses the step that is being done, as in csrc/scalars.h; zero if none does.

        If ``answers_late``: or why one has refused a step before. The next call does not repeat it.
        """
        return 0

    def hear(self, told: Tensor | None) -> None:
        """Prepare for ``refusal``; ``told`` is that of the optimizer's former plan."""
        self.told = torch.zeros(1, dtype=torch.int32, device="cpu") if told is None else told

    @abstractmethod
    def update(self) -> None: ...

    @abstractmethod
    def _write_rows(self) -> None:
        """Write the addresses of other rows into the tables."""

    @abstractmethod
    def look_at(self, groups: list[Group], state: dict[Tensor, Any]) -> None:
        """Compare these from now on; the rows are the params of ``groups``.

        Raises:
            RuntimeError: they are not.
        """

    def holds_only(self, state: dict[Tensor, Any]) -> bool:
        """Whether everything that the plan keeps alive is in ``state``, too."""
        return all(row.param in state and row.is_in(state) for row in self.rows if row.served)

    def refresh(self, groups: list[Group], state: dict[Tensor, Any]) -> Held | None:
        """Note where the gradients are; ``None`` when the plan has to be rebuilt.

        Returns:
            The objects that the step has to hold until it is over.

        Raises:
            RuntimeError: a gradient cannot be used (sparse, complex, of another shape or device).
        """
        # Another thread may have replaced states between the making of the rows and of the watch.
        self._confirmed = self._confirmed or all(row.is_in(state) for row in self.rows)
        look = self._look(groups, state) if self._confirmed else None
        if look is None:
            return None
        odd, self._absent, held = look
        if self._of_inference and self._forbids(held):
            return None
        if odd:
            try:
                self._use_grads(odd, held)
            except BaseException:
                held.clear()  # the error's frames would keep them alive
                raise
        return held

    def _use_grads(self, odd: Sequence[int], held: Held) -> None:
        """Check gradients that need care, and prepare for them."""
        for index in odd:
            check_grad(self.rows[index].label, self.rows[index].param, held[index])
        sharded = [index for index in odd if is_dtensor(held[index])]
        if sharded:
            params = [self.rows[index].param for index in sharded]
            parts = reduced_alike(params, [held[index] for index in sharded])
            for index, part in zip(sharded, parts, strict=True):
                held[index] = part
        for index in odd:
            self._use_grad(index, held[index])

    def _forbids(self, held: Held) -> bool:
        """Whether inference tensors may not be written to now; a new plan then refuses by name."""
        grads = (held[index] for index in self._of_inference)
        return not torch.is_inference_mode_enabled() and any(grad is not None for grad in grads)

    @abstractmethod
    def _look(self, groups: list[Group], state: dict[Tensor, Any]) -> Look | None:
        """Fill in the gradients that need no care; ``None`` when the plan has to be rebuilt."""

    @abstractmethod
    def _use_grad(self, index: int, grad: Tensor) -> None:
        """Prepare for a gradient that needs care; it has been checked."""

    def updated_params(self) -> list[Tensor]:
        """The parameters that had a gradient when the step began."""
        absent = set(self._absent)
        return [row.param for i, row in enumerate(self.rows) if i not in absent]

    @abstractmethod
    def nbytes(self) -> int:
        """Memory the plan itself holds, in bytes."""

    def stage_params(self) -> None:
        """Copy parameters with gaps into the dense tensors that the kernels update."""
        for row in self._staged_params:
            row.dense.copy_(row.local.detach())

    def write_back(self) -> None:
        """Copy back the tensors of ``stage_params``; may be called twice."""
        if rows := self._staged_params:
            copy_all([row.local.detach() for row in rows], [row.dense for row in rows])

    def _dense_grad(self, index: int, grad: Tensor) -> Tensor:
        """``grad`` laid out like the row's ``dense`` tensor, in a buffer kept for the next step."""
        dense = self.rows[index].dense
        staged = self._staged_grads.get(index)
        if staged is None or staged.dtype != grad.dtype:
            with torch.inference_mode(False):  # usable outside of it, too
                staged = torch.empty_like(dense, dtype=grad.dtype)
            self._staged_grads[index] = staged
        return staged.copy_(grad.detach())

    def staging_nbytes(self) -> int:
        staged = [*self._staged_grads.values(), *(row.dense for row in self._staged_params)]
        return sum(tensor.nbytes for tensor in staged)


def copy_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy all or none: the loop runs in C, where no signal's handler can interrupt it."""
    deque(map(Tensor.copy_, targets, values), maxlen=0)
