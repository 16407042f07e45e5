"""FusedOptimizer: everything that does not depend on the update rule.

``step()`` is unscale + inf/NaN check + global-norm clip + weight decay + update + low-precision
copy, as the verbs of a cached plan. Every refusal comes before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from . import checkpoint
from .agreement import AgreeingOptimizer
from .backends.registry import choose, prepare
from .callers import is_called_by
from .modes import durable, marked_untraced, refuse_tracing, untraced
from .options import OPTION_NAMES, Options
from .plan.checks import check_param, is_served, served_params
from .plan.exchange import REPLICATED, Ranks, ranks_of, refuse, refuse_late, uncounted
from .plan.groups import (
    check_containers,
    check_group,
    copies,
    refuse_differentiable,
    refuse_duplicates,
    take_out_options,
    torch_defaults,
)
from .plan.kept import check_masters, check_precision, kept_of
from .plan.options_table import Line, pack
from .plan.plan import N_STEP_SCALARS, Layout, Plan, StepInputs
from .plan.rows import checked_rows, complete_rows, label_of
from .plan.shards import has_fsdp1_shards, made_by_zero, refuse_own_norm
from .rules.declaration import Group
from .scaler.attributes import ours
from .shared import Shared
from .sizes import advice

# Attempts to build a plan: another thread may change gradients and states meanwhile.
BUILDS = 8


class FusedOptimizer(AgreeingOptimizer):
    """Base class of the optimizers, such as ``FusedAdamW``.

    A subclass names its rule, and torch's class with the same arguments. Otherwise it is a
    signature and a docstring.
    """

    twin: type[Optimizer]  # torch's class, which checks the arguments that it knows

    @untraced
    def __init__(self, params: Any, arguments: dict[str, Any]) -> None:
        """``arguments``: the locals of the subclass's own ``__init__``."""
        own = {k: v for k, v in arguments.items() if k not in ("self", "params", "__class__")}
        given = {name: own.pop(name) for name in OPTION_NAMES}
        defaults = torch_defaults(self.twin, self.rule, own)
        options = Options(**given)
        refuse_differentiable(defaults, type(self).__name__)
        with durable():
            scalars = torch.zeros(N_STEP_SCALARS, dtype=torch.float32, device="cpu")
        self._shared = Shared(options, scalars, Line(self.rule), made_by_zero=made_by_zero())
        super().__init__(params, defaults)
        check_masters(self.param_groups, options)
        prepare(options.backend, list(served_params(self.param_groups)))

    # ---- the step -------------------------------------------------------------------------------

    @ours
    @marked_untraced  # inside the wrapper that runs hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Gradients are only read: afterwards ``.grad`` is as ``backward()`` left it. A parameter
        whose ``.grad`` is None keeps its value, its state and its step count.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: a gradient or a state cannot be used, or another rank refuses the step;
                nothing has been changed, on any rank that shares the norm.
        """
        shared = self._shared
        if not self.state and self._only_inits_state():
            self.init_state()
            return None
        loss = None
        shared.begun = True
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with shared.turn:
            grad_mode = torch.is_grad_enabled()
            inputs = None
            try:
                if shared.plan is None or shared.ranks is not None:
                    self._begin_message()
                inputs = self._step_inputs()
                plan = self._current_plan(inputs)
                if shared.ranks is not None:
                    self._join(inputs)
                self._take(plan, inputs)
            except BaseException:
                torch.set_grad_enabled(grad_mode)  # a signal may interrupt torch.no_grad's exit
                self._abort_message(inputs)
                raise
            finally:
                if inputs is not None:
                    inputs.held = None  # frees gradients and states that others have dropped
        return loss

    def _only_inits_state(self) -> bool:
        """Whether ``torch.distributed.checkpoint`` calls, which wants state to load into, or to
        save. Its way is a step with lr=0 on gradients of zero, which would count as the first."""
        return is_called_by("_init_optim_state", checkpoint.OF_TORCH)

    # ---- the verbs -------------------------------------------------------------------------------

    def _take(self, plan: Plan, inputs: StepInputs) -> None:
        """All or nothing: a signal's handler may raise anywhere except inside a native call."""
        plan.stage_params()
        plan.begin(inputs)
        if inputs.measured:
            plan.reduce()
            plan.exchange()
        plan.finalize()
        if inputs.ranks is not None and not plan.answers_late:
            refuse(plan.refusal())
        self._shared.amp.due = None  # the flag holds this step's answer
        try:
            plan.update()
            self._settle(plan, inputs)
        except BaseException:
            self._settle(plan, inputs)  # whether there was an update or not
            raise
        if inputs.ranks is not None and plan.answers_late:
            refuse_late(plan.refusal())

    def _settle(self, plan: Plan, inputs: StepInputs) -> None:
        """Finish the step after the update. A second call changes nothing more."""
        plan.write_back()
        self._shared.measured, self._shared.amp.answered = inputs.measured, True
        updated = plan.updated_params()
        if updated:
            increment_version(updated)

    def _step_inputs(self) -> StepInputs:
        refuse_tracing()
        shared = self._shared
        options = shared.options
        clips = options.max_grad_norm is not None
        try:
            if options.norm_group is None and (clips or options.skip_nonfinite):
                is_fsdp1 = self._is_fsdp1_sharded()
                if is_fsdp1 or shared.made_by_zero:
                    refuse_own_norm(options, is_fsdp1)
            device = self._flag_device(shared.scalars.device)
            if shared.scalars.device != device:
                with durable():
                    shared.scalars = shared.scalars.to(device)
            # The step reads the groups only once, here: another thread may change them.
            groups = [group.copy() for group in self.param_groups]
            if not isinstance(self.param_groups, list):
                raise TypeError
            table, numbers = pack(groups, shared.line, self._stays_on_device, self._check_options)
        except (AttributeError, KeyError, TypeError):  # others have replaced lists or dicts
            check_containers(self.param_groups, self.state)
            raise
        grad_scale, found_inf, inf_flag, in_charge = self._amp_inputs(device)
        return StepInputs(  # positional: keywords would cost as much as the rest of the call
            groups,
            table,
            options,
            shared.scalars,
            clips or options.skip_nonfinite or inf_flag is not None,  # measured
            options.skip_nonfinite or in_charge,
            grad_scale,
            found_inf,
            inf_flag,
            numbers,
        )

    def _check_options(self, index: int, group: Group) -> None:
        check_containers(self.param_groups, self.state)
        where = f"param group {index}"
        for name in (*self.rule.number_keys, *self.defaults):
            if name not in group:
                raise RuntimeError(
                    f"{where} has no option {name!r}; set it: "
                    f"`optimizer.param_groups[{index}][{name!r}] = optimizer.defaults[{name!r}]`"
                )
        check_group(group, self.rule, f" in {where}", RuntimeError)
        refuse_differentiable(group, where)
        self._take_out(self.param_groups[index], where, RuntimeError)

    def _stays_on_device(self, value: Tensor) -> bool:
        return not value.is_cpu and not self._shared.scalars.is_cpu

    # ---- the plan -------------------------------------------------------------------------------

    def _current_plan(self, inputs: StepInputs) -> Plan:
        shared = self._shared
        layout = self._layout(inputs.groups)
        former = shared.plan
        if former is not None and former.layout == layout:
            inputs.held = former.refresh(inputs.groups, self.state)
            if inputs.held is not None:
                return former
        for plan in shared.aside:
            if plan.layout == layout:
                inputs.held = plan.refresh(inputs.groups, self.state)
                if inputs.held is not None:
                    shared.set_aside(self.state)
                    shared.take_up(plan)
                    return plan
        for _ in range(BUILDS):
            groups, state = copies(inputs.groups, self.state)
            plan = self._build_plan(groups, state, every_param=False)
            inputs.held = plan.refresh(inputs.groups, self.state)
            if inputs.held is None:  # another thread changes them: use the copies
                plan.look_at(groups, state)
                inputs.held = plan.refresh(groups, state)
            if inputs.held is not None:
                return plan
        raise RuntimeError("parameters or gradients changed while step() was preparing")

    def _layout(self, groups: list[Group]) -> Layout:
        shared = self._shared
        names, options = shared.line.state_names, shared.options
        return [kept_of(self.rule, names, options, group) for group in groups]

    def _build_plan(self, groups: list[Group], state: dict[Tensor, Any], every_param: bool) -> Plan:
        """Make a plan for copies of the optimizer's groups and state; create missing state."""
        shared, options = self._shared, self._shared.options
        layout = self._layout(groups)
        rows = checked_rows(groups, state, layout, shared.names)
        ranks = ranks_of(groups, options, shared.names)
        for index in uncounted(ranks):
            rows[index].counted = False
        with durable(), torch.no_grad():
            plan = shared.plan
            shared.set_aside(self.state)
            backend = choose(options.backend, [row.param for row in rows if row.served])
            # Moved here, too: the first step may run under graph capture.
            shared.scalars = shared.scalars.to(self._flag_device(shared.scalars.device))
            try:
                new = complete_rows(rows, state, layout, options, every_param)
            except RuntimeError as error:
                advised = self._with_advice(error, groups)
                if advised is None:
                    raise
                raise advised from error
            self.state.update({param: dict(own) for param, own in new.items()})
            wanted = (backend.name, layout)
            if plan is None or (plan.backend, plan.layout) != wanted or not plan.rebind(rows):
                plan = backend.plan(self.rule, rows, layout)
                plan.backend = backend.name
            plan.ranks, plan.fsdp1_sharded = ranks, has_fsdp1_shards(groups)
            shared.replicated = [group.get(REPLICATED) for group in groups]
            if isinstance(ranks, Ranks):
                plan.hear(shared.told)
                shared.told = plan.told
        try:
            plan.look_at(self.param_groups, self.state)
        except (RuntimeError, TypeError):  # another thread changes them
            plan.look_at(groups, state)
        shared.take_up(plan)
        return plan

    def _with_advice(self, error: RuntimeError, groups: list[Group]) -> RuntimeError | None:
        """If memory has run out, the same error with what would take less."""
        text = str(error)
        of_cpu = "not enough memory" in text or "can't allocate memory" in text
        if not of_cpu and not isinstance(error, torch.OutOfMemoryError):
            return None
        with suppress(ValueError, RuntimeError):  # params of other dtypes than the options are for
            added = advice(type(self).__name__, self.rule, groups, self._shared.options)
            return type(error)(f"{text}; {added}")
        return None

    @untraced
    def init_state(self) -> None:
        """Allocate now the state of every parameter that requires grad.

        Otherwise state is allocated in the first ``step()``. Called before training, this shows at
        once if memory runs out. Masters are copied from the parameters at the time of the call.

        Raises:
            RuntimeError: a parameter cannot be optimized, or there is not enough memory.
        """
        with self._shared.turn:
            groups = self._step_inputs().groups  # refuses what the step would refuse
            self._build_plan(*copies(groups, self.state), every_param=True)

    # ---- torch's Optimizer protocol -------------------------------------------------------------

    @untraced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but refuses parameters that no backend can update. An error changes nothing.

        Raises:
            ValueError: an option is no number, or NaN; a parameter is there twice; an option of the
                whole optimizer differs from the optimizer's own (an equal one is removed).
            TypeError: a parameter that requires grad cannot be updated.
            RuntimeError: ``differentiable=True``.
        """
        index = len(self.param_groups)
        if isinstance(param_group, dict):
            where = f"param group {index}"
            filled_in = {**self.defaults, **param_group}  # the defaults may have been edited
            check_group(filled_in, self.rule, f" in {where}")
            refuse_differentiable(filled_in, where)
            for group in (filled_in, param_group):
                self._take_out(group, where, ValueError)
            refuse_duplicates(param_group, where)
        super().add_param_group(param_group)
        try:
            for i, p in enumerate(self.param_groups[index]["params"]):
                if is_served(p):
                    check_param(label_of(self.param_groups[index], index, i, {}), p)
            names, options = self._shared.line.state_names, self._shared.options
            check_precision(self.rule, names, options, self.param_groups[index])
        except (TypeError, ValueError):
            del self.param_groups[index]
            raise

    def _take_out(self, group: Group, where: str, error: type[Exception]) -> None:
        take_out_options(group, where, type(self).__name__, self._shared.options, error)

    def __repr__(self) -> str:
        non_defaults = self._shared.options.non_defaults()
        options = "".join(f"    {k}: {v}\n" for k, v in non_defaults.items())
        text = super().__repr__()
        return text if not options else text[:-1] + "\nAll Groups\n" + options + ")"

    @untraced
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's SGD, Adam or AdamW.

        Everything is copied, except tensors that are the optimizer's own already, which is how
        torch.distributed.checkpoint loads. A parameter that is a DTensor takes its part of a tensor
        with all elements, or a DTensor of the same mesh.

        Differs from torch in one respect: states keep (or get) fp32, whatever the parameter's
        dtype. ``max_grad_norm`` and the other options of the whole optimizer stay as constructed.
        A parameter without state in the checkpoint starts anew. The optimizer's own tensors are
        overwritten if nobody else refers to them, so that loading needs no second state.

        Raises:
            ValueError: the param groups do not match, or are those of another optimizer; a step
                count is not a number of steps.
            KeyError: a parameter's state is incomplete, or is that of another optimizer.
            TypeError: a state is no plain tensor of floating-point numbers, and no DTensor of the
                parameter's mesh.
            RuntimeError: a group of the checkpoint has ``differentiable=True``; a state has no
                memory, or another shape than its parameter; there is not enough memory. Whatever is
                raised, nothing has been changed.
        """
        checkpoint.load(self, state_dict)
