"""FusedOptimizer: everything that does not depend on the update rule.

``step()`` is unscale + inf/NaN check + global-norm clip + weight decay + update + low-precision
copy, as three verbs of a backend over a cached plan. All that can be refused is refused before
anything moves.
"""

from __future__ import annotations

import struct
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

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
from .state import loaded

# Stands in the options table for a number that is on the device: a NaN that nobody else uses, so
# that a table which holds a number again differs from it.
ON_DEVICE: float = struct.unpack("=d", struct.pack("=Q", 0x7FF8_0000_0F05_ED00))[0]


# Another thread may change gradients and states while a plan is being built.
BUILDS = 8


class FusedOptimizer(AmpAttributes, Optimizer):
    """Base class of the optimizers; see ``FusedAdamW`` and ``FusedSGD``.

    A subclass names its rule, says which states a group needs and packs its hyper-parameters.
    """

    rule: str

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
        self._turn = threading.RLock()  # of the threads that step this optimizer
        self._drop_plan()
        super().__init__(params, defaults)

    # ---- what a rule says about itself ----------------------------------------------------------

    @abstractmethod
    def _state_names(self, group: Group) -> tuple[str, ...]:
        """States of a parameter in ``group``, in the order the kernels know them by."""

    @abstractmethod
    def _pack_options(self, group: Group, table: bytearray, offset: int) -> None:
        """Write the group's hyper-parameters as the rule's ``Options`` (csrc/rules.h)."""

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
        with self._turn:
            grad_mode = torch.is_grad_enabled()
            inputs = self._step_inputs()
            try:
                self._take(*self._current_plan(inputs), inputs)
            except BaseException:
                torch.set_grad_enabled(grad_mode)  # a signal may cut short torch.no_grad's exit
                raise
            finally:
                inputs.held = None  # frees what nobody else has any more
        return loss

    _own_step = step  # whatever becomes of `step`, in a subclass or here

    def _take(self, backend: Backend, plan: Plan, inputs: StepInputs) -> None:
        """All or nothing: a signal's handler may raise anywhere, but inside of a native call."""
        plan.stage_params()
        if inputs.measured:
            backend.reduce(plan, inputs)
        backend.finalize(plan, inputs)
        self._amp_decided()
        try:
            backend.update(plan, inputs)
            self._settle(plan, inputs)
        except BaseException:
            self._settle(plan, inputs)  # whether there was an update or not
            raise

    def _settle(self, plan: Plan, inputs: StepInputs) -> None:
        """What is left to do after the update. Done twice, it changes no more."""
        plan.write_back()
        self._measured = inputs.measured
        self._amp_done()
        updated = plan.updated_params()
        if updated:
            increment_version(updated)

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

    def _current_plan(self, inputs: StepInputs) -> tuple[Backend, Plan]:
        plan, backend = self._plan, self._backend
        if plan is not None and backend is not None and plan.layout == self._layout():
            inputs.held = plan.refresh(self.param_groups, self.state)
            if inputs.held is not None:
                return backend, plan
        for _ in range(BUILDS):
            backend, plan = self._build_plan(every_param=False)
            inputs.held = plan.refresh(self.param_groups, self.state)
            if inputs.held is not None:
                return backend, plan
        raise RuntimeError("parameters or gradients changed while step() was preparing")

    def _build_plan(self, every_param: bool) -> tuple[Backend, Plan]:
        """A plan for the optimizer as it is now; creates what state is missing."""
        # What is made in inference mode could not be written to outside of it.
        inference = torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.no_grad():
            return self._build_plan_now(every_param, inference)

    def _build_plan_now(self, every_param: bool, inference: bool) -> tuple[Backend, Plan]:
        self._drop_plan()
        groups, options = self.param_groups, self._options
        params = [p for group in groups for p in group["params"]]
        backend = choose(options.backend, params)
        # Here and not in the step, which may be the first and captured.
        self._scalars = self._scalars.to(self._flag_device(self._scalars.device))
        layout = self._layout()
        rows = build_rows(
            groups, self.state, layout, options.master_weights, every_param, inference
        )
        kept = [row.own() for row in rows]  # another thread may drop some of it meanwhile
        plan = backend.plan(self.rule, rows, layout, groups, self.state)
        del kept
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
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._options_table = bytearray()
        self._device_numbers = []
        self.__dict__.setdefault("_captured_plans", [])  # load_state_dict comes here, too
        self.__dict__.setdefault("_turn", threading.RLock())
        self._drop_plan()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's SGD, Adam or AdamW. Everything is copied.

        Differs from torch in one respect: states keep (or get) fp32, whatever the parameter's
        dtype. ``max_grad_norm`` and the other options of the whole optimizer stay as constructed.

        Raises:
            ValueError: the param groups do not match.
            RuntimeError: a group of the checkpoint has ``differentiable=True``.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        for i, group in enumerate(state_dict["param_groups"]):
            _refuse_differentiable(group, f"param group {i} of the state_dict")
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        param_of = dict(zip(ids, params, strict=False))  # torch refuses unequal lengths below
        with torch.inference_mode(False), torch.no_grad():
            state_dict["state"] = {
                key: _Held(loaded(param_of[key], value)) if key in param_of else deepcopy(value)
                for key, value in state_dict["state"].items()
            }
        hooks = (
            self._optimizer_load_state_dict_pre_hooks,
            self._optimizer_load_state_dict_post_hooks,
        )
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks[0]
            self._optimizer_load_state_dict_post_hooks = hooks[1]
        for key, value in self.state.items():
            if isinstance(value, _Held):
                self.state[key] = value.state
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _refuse_differentiable(group: dict[str, Any], label: str) -> None:
    if group.get("differentiable"):
        raise RuntimeError(
            f"{label}: differentiable=True is not supported: the fused step is not recorded by "
            "autograd; set it to False, or use torch.optim for a differentiable optimizer"
        )


class _Held:
    """Carries converted state past torch's ``load_state_dict``, which would cast it to half."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
