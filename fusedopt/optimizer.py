"""FusedOptimizer: everything that does not depend on the update rule.

``step()`` is unscale + inf/NaN check + global-norm clip + weight decay + update + low-precision
copy, as three verbs of a backend over a cached plan. All that can be refused is refused before
anything moves.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from . import checkpoint
from .amp import AmpAttributes
from .backends import Backend, choose, requested_backend
from .options import Options
from .plan import (
    CLIP_COEF,
    GRAD_NORM,
    N_STEP_SCALARS,
    OPTIONS_BYTES,
    SKIPPED_STEPS,
    Group,
    Plan,
    StepInputs,
)
from .rows import build_rows, check_param, label_of

# Stands in the options table for a number that is on the device: a NaN that nobody else uses, so
# that a table which holds a number again differs from it.
ON_DEVICE: float = struct.unpack("=d", struct.pack("=Q", 0x7FF8_0000_0F05_ED00))[0]


class FusedOptimizer(AmpAttributes, Optimizer):
    """Base class of the optimizers; see ``FusedAdamW`` and ``FusedSGD``.

    A subclass names its rule, says which states a group needs and packs its hyper-parameters.
    """

    rule: str

    # By parameter, once a checkpoint has brought its own names for the groups.
    _names_given: checkpoint.Names = MappingProxyType({})

    @_disable_dynamo
    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        _refuse_differentiable(defaults, type(self).__name__)
        self._options = options
        requested_backend(options.backend)  # refuses a bad FUSEDOPT_BACKEND here, not in the step
        with torch.inference_mode(False):  # for a step outside of it, too
            self._scalars = torch.zeros(N_STEP_SCALARS, dtype=torch.float32, device="cpu")
        self._measured = False
        self._options_table = bytearray()
        self._device_numbers: list[tuple[int, Tensor]] = []
        self._captured_plans: list[Plan] = []
        self._drop_plan()
        super().__init__(params, defaults)

    # ---- what a rule says about itself ----------------------------------------------------------

    @abstractmethod
    def _state_names(self, group: Group) -> tuple[str, ...]:
        """States of a parameter in ``group``, in the order the kernels know them by."""

    @abstractmethod
    def _pack_options(self, group: Group, table: bytearray, offset: int) -> None:
        """Write the group's hyper-parameters as the rule's ``Options`` (csrc/rules.h)."""

    def _check_loaded_groups(self, groups: list[Group]) -> None:
        """Warn of what the groups of a checkpoint, which will be loaded, change."""

    # ---- the step -------------------------------------------------------------------------------

    @_disable_dynamo  # the public torch.compiler.disable imports all of Dynamo right here
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Gradients are only read: afterwards ``.grad`` is as ``backward()`` left it. A parameter
        whose ``.grad`` is None keeps its value, its state and its step count.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: a gradient or a state cannot be used; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inputs = self._step_inputs()
        backend, plan = self._current_plan()
        plan.stage_params()
        if inputs.measured:
            backend.reduce(plan, inputs)
        backend.finalize(plan, inputs)
        self._amp_decided()
        backend.update(plan, inputs)
        plan.write_back()
        self._measured = inputs.measured
        self._amp_done()
        updated = plan.updated_params()
        if updated:
            increment_version(updated)
        return loss

    _own_step = step  # whatever becomes of `step`, in a subclass or here

    def _step_inputs(self) -> StepInputs:
        options = self._options
        clips = options.max_grad_norm is not None
        if clips and self._is_fsdp1_sharded():
            raise RuntimeError(
                f"max_grad_norm={options.max_grad_norm} cannot be honoured for FSDP1 shards: each "
                "rank sees only its part of the norm; pass max_grad_norm=None and call "
                "FullyShardedDataParallel.clip_grad_norm_"
            )
        device = self._flag_device(self._scalars.device)
        if self._scalars.device != device:
            with torch.inference_mode(False):
                self._scalars = self._scalars.to(device)
        if len(self._options_table) != OPTIONS_BYTES * len(self.param_groups):
            self._options_table = bytearray(OPTIONS_BYTES * len(self.param_groups))
        self._device_numbers.clear()
        for i, group in enumerate(self.param_groups):
            self._pack_options(group, self._options_table, i * OPTIONS_BYTES)
        amp = self._amp_inputs(device)
        return StepInputs(
            groups=self.param_groups,
            options=self._options_table,
            scalars=self._scalars,
            norm_type=options.norm_type,
            max_grad_norm=options.max_grad_norm,
            max_grad_value=options.max_grad_value,
            measured=clips or options.skip_nonfinite or amp.inf_flag is not None,
            skip_nonfinite=options.skip_nonfinite or amp.in_charge,
            grad_scale=amp.grad_scale,
            found_inf=amp.found_inf,
            inf_flag=amp.inf_flag,
            device_numbers=self._device_numbers,
        )

    def _number(self, value: Any, offset: int) -> float:
        """``value`` for the eight bytes at ``offset`` of the options table.

        A tensor on the parameters' own device is left there: the kernels read it, and nobody waits.
        """
        if not isinstance(value, Tensor) or not self._stays_on_device(value):
            return float(value)
        if value.numel() != 1:
            raise RuntimeError(
                f"an option of a param group is a tensor of shape {tuple(value.shape)}; use a "
                "number or a tensor of one element"
            )
        if value.dtype not in (torch.float32, torch.float64):
            value = value.double()
        self._device_numbers.append((offset // 8, value))
        return ON_DEVICE

    def _stays_on_device(self, value: Tensor) -> bool:
        return not value.is_cpu and not self._scalars.is_cpu

    # ---- the plan -------------------------------------------------------------------------------

    def _drop_plan(self) -> None:
        plan = self.__dict__.get("_plan")
        if plan is not None and plan.captured:
            self._captured_plans.append(plan)  # the graph may be replayed as long as we live
        self._plan: Plan | None = None
        self._backend: Backend | None = None

    def _layout(self) -> list[tuple[str, ...]]:
        return [self._state_names(group) for group in self.param_groups]

    def _current_plan(self) -> tuple[Backend, Plan]:
        plan, backend = self._plan, self._backend
        if plan is None or backend is None or plan.layout != self._layout():
            backend, plan = self._build_plan(every_param=False)
        elif plan.refresh(self.param_groups, self.state):
            return backend, plan
        else:
            backend, plan = self._build_plan(every_param=False)
        if not plan.refresh(self.param_groups, self.state):
            raise RuntimeError("parameters or gradients changed while step() was preparing")
        return backend, plan

    def _build_plan(self, every_param: bool) -> tuple[Backend, Plan]:
        """A plan for the optimizer as it is now; creates what state is missing."""
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self._build_plan_now(every_param)

    def _build_plan_now(self, every_param: bool) -> tuple[Backend, Plan]:
        self._drop_plan()
        groups, options = self.param_groups, self._options
        params = [p for group in groups for p in group["params"]]
        backend = choose(options.backend, params)
        # Here and not in the step, which may be the first and captured.
        self._scalars = self._scalars.to(self._flag_device(self._scalars.device))
        layout = self._layout()
        rows = build_rows(
            groups, self.state, layout, options.master_weights, every_param, self._names_given
        )
        plan = backend.plan(self.rule, rows, layout, groups, self.state)
        self._backend, self._plan = backend, plan
        return backend, plan

    def init_state(self) -> None:
        """Allocate the state of every parameter that requires grad now.

        Without it state is made in the first ``step()``; with it, running out of memory shows
        before a round of training. Masters are made from the parameters as they are at the time.

        Raises:
            RuntimeError: a parameter cannot be optimized, or there is not enough memory.
        """
        self._build_plan(every_param=True)

    # ---- what the last step found ---------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all unscaled gradients of the last step, before clipping: 0-dim fp32, a copy.

        None before the first step, and when the last step had no reason to measure it (no
        ``max_grad_norm``, no ``skip_nonfinite``, no ``fusedopt.GradScaler``);
        ``max_grad_norm=float("inf")`` measures without clipping. No host sync.
        """
        return self._scalars[GRAD_NORM].clone() if self._measured else None

    @property
    def clip_coef(self) -> Tensor:
        """What the last step multiplied the unscaled gradients by: 0-dim fp32, a copy."""
        if not self._measured:
            return torch.ones((), dtype=torch.float32, device=self._scalars.device)
        return self._scalars[CLIP_COEF].clone()

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped because of non-finite gradients: 0-dim int64, a copy. Not checkpointed."""
        return self._scalars[SKIPPED_STEPS].to(torch.int64)

    @property
    def backend(self) -> dict[str, str]:
        """Name of the backend that serves each device; empty before the first step."""
        if self._backend is None:
            return {}
        devices = {str(p.device) for group in self.param_groups for p in group["params"]}
        return dict.fromkeys(sorted(devices), self._backend.name)

    def memory_footprint(self) -> dict[str, int]:
        """Bytes by kind: ``param``, ``grad``, each state by its name, ``plan`` and ``total``."""
        sizes: dict[str, int] = {"param": 0, "grad": 0}
        for group in self.param_groups:
            for p in group["params"]:
                sizes["param"] += p.numel() * p.element_size()
                if p.grad is not None:
                    sizes["grad"] += p.grad.numel() * p.grad.element_size()
        for own in self.state.values():
            for name, value in own.items():
                if isinstance(value, Tensor):
                    n_bytes = value.numel() * value.element_size()
                    sizes[name] = sizes.get(name, 0) + n_bytes
        sizes["plan"] = self._plan.nbytes() if self._plan is not None else 0
        sizes["total"] = sum(sizes.values())
        return sizes

    # ---- options of the whole optimizer ---------------------------------------------------------

    def _option(name: str) -> property:  # type: ignore[misc]
        def read(self: FusedOptimizer) -> Any:
            return getattr(self._options, name)

        @_disable_dynamo  # which would lose what is written
        def write(self: FusedOptimizer, value: Any) -> None:
            self._options = self._options.changed(**{name: value})

        return property(read, write, doc=f"The option ``{name}``; assignment validates.")

    max_grad_norm = _option("max_grad_norm")
    norm_type = _option("norm_type")
    max_grad_value = _option("max_grad_value")
    skip_nonfinite = _option("skip_nonfinite")
    amp_scaling = _option("amp_scaling")
    del _option

    # ---- torch's Optimizer protocol -------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises before anything is changed, and refuses what no kernel can update."""
        if isinstance(param_group, dict):
            for name in Options.names():
                if name in param_group:
                    raise ValueError(
                        f"{name}={param_group[name]!r} in a param group: it holds for all groups "
                        f"together; pass {name} to {type(self).__name__}(...)"
                    )
            _refuse_differentiable(param_group, f"param group {len(self.param_groups)}")
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            for i, p in enumerate(self.param_groups[index]["params"]):
                check_param(label_of(self.param_groups[index], index, i), p)
        except TypeError:
            del self.param_groups[index]
            raise

    def __repr__(self) -> str:
        options = "".join(f"    {k}: {v}\n" for k, v in self._options.non_defaults().items())
        text = super().__repr__()
        return text if not options else text[:-1] + "\nAll Groups\n" + options + ")"

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_options": self._options, "_scalars": self._scalars, "_measured": self._measured}
        names = self._names_given
        kept["_names_given"] = [
            (p, names[p]) for group in self.param_groups for p in group["params"] if p in names
        ]
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self._names_given, list):  # as __getstate__ gave it
            self._names_given = WeakTensorKeyDictionary(self._names_given)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._options_table = bytearray()
        self._device_numbers = []
        self.__dict__.setdefault("_captured_plans", [])  # load_state_dict comes here, too
        self._drop_plan()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's SGD, Adam or AdamW. Everything is copied.

        Differs from torch in one respect: states keep (or get) fp32, whatever the parameter's
        dtype. ``max_grad_norm`` and the other options of the whole optimizer stay as constructed.
        A parameter without state in the checkpoint starts anew. Where nobody else can see the
        optimizer's own tensors they are written to, so that loading needs no second state.

        Raises:
            ValueError: the param groups do not match, or are those of another optimizer; a step
                count is no count.
            KeyError: a parameter's state is there in part, or is that of another optimizer.
            TypeError: a state is no plain tensor of floating-point numbers.
            RuntimeError: a group of the checkpoint has ``differentiable=True``; a state has no
                memory; there is not enough memory. Whatever is raised, nothing has been changed.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups = state_dict["param_groups"]
        for i, group in enumerate(groups):
            _refuse_differentiable(group, f"param group {i} of the state_dict")
        wanted = checkpoint.check(self, state_dict)
        self._check_loaded_groups(groups)
        self._drop_plan()
        with torch.inference_mode(False), torch.no_grad():
            checkpoint.load(self, state_dict, wanted)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _refuse_differentiable(group: dict[str, Any], label: str) -> None:
    if group.get("differentiable"):
        raise RuntimeError(
            f"{label}: differentiable=True is not supported: the fused step is not recorded by "
            "autograd; set it to False, or use torch.optim for a differentiable optimizer"
        )
