"""The CUDA kernels for states and masters in fewer bits than fp32: the bits of the CPU backend, of
every tensor of a step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import CHUNK, FLOATS, KERNEL_CASES, OptimizerCase, adamw, parametrize, sgd
from gpu_helpers import real, runners
from gpu_twins import Twins, grads_like, shifted
from harness import randn
from tolerances import same_bits
from torch import Tensor

from fusedopt.plan import rows

runner = runners("shim", "cuda")

# Around a thread's elements, a block that shares a scale, two of them, and a chunk.
EDGES = (0, 1, 3, 127, 128, 129, 255, 256, 257, 300)
LONG = (CHUNK - 1, CHUNK, CHUNK + 1, 20000)
STATES: tuple[Any, ...] = (None, "bf16", "8bit")
MASTERS = (None, False, "remainder", "remainder8", "dither")
OF_ADAMW = [
    {"exp_avg": "8bit", "exp_avg_sq": "bf16"},
    {"exp_avg": "bf16"},
    {"exp_avg_sq": "8bit"},
]
CASES = [*KERNEL_CASES, adamw("tiny_eps", lr=0.02, eps=1e-8), sgd("momentum", lr=0.1, momentum=0.9)]
# How a stream is stored does not depend on the case: everything with one of each rule and number of
# states, and a third of it with the others.
WHOLE = {case.rule + str(case.hyper.get("amsgrad")): case for case in reversed(CASES)}
BY_NAME = {str(case): case for case in CASES}


def forms_of(case: OptimizerCase) -> list[Any]:
    """Every ``state_dtype`` of the case."""
    if case.hyper.get("amsgrad"):
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return [None, "bf16", *({name: "bf16"} for name in names)]
    return [*STATES, *(OF_ADAMW if case.rule == "adamw" else ())]


def dtypes_of(master: object) -> list[torch.dtype]:
    """Of params beside such masters."""
    if master in ("remainder8", "dither"):
        return [torch.float32, torch.bfloat16]
    return FLOATS


def twins_of(
    case: OptimizerCase, values: list[Tensor], form: object, master: object, **common: Any
) -> Twins:
    """With some state in fewer bits whatever the size."""
    common = {"min_8bit_size": 1, **common}
    return Twins.of(case, values, state_dtype=form, master_weights=master, **common)


STRANGE = (1e30, -1e30, 1e-30, -1e-30, 1e-44, 3e38, 0.0, -0.0, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("master", ["remainder", "remainder8", "dither", None])
@parametrize("case", [*WHOLE.values()])
def test_strange_numbers(case: OptimizerCase, master: object) -> None:
    """States that are huge, tiny, denormal, inf and NaN, alone in a block and beside others."""
    lengths = (1, 127, 128, 129, 300, 700)
    own = list(itertools.product(lengths, dtypes_of(master)))
    forms = [form for form in forms_of(case) if form is not None]
    for form in forms:
        twins = twins_of(case, [randn(n, n, p) for n, p in own], form, master, max_grad_norm=None)
        twins.opt.skip_nonfinite = twins.twin.skip_nonfinite = False
        for step in range(4):
            grads = grads_like(twins.params, step, torch.float32)
            for k, grad in enumerate(grads):
                some = STRANGE if step < 3 else STRANGE[:8]
                for j, value in enumerate(some[k % 3 :: 1 + k % 2]):
                    if step in (1, 2):
                        grad[(37 * j + 11 * k + step) % len(grad)] = value
            twins.step(grads)
            twins.check()


MODES = [
    (case, form, master)
    for case in CASES
    for form, master in itertools.product(forms_of(case), MASTERS)
    if form is not None or isinstance(master, str)
]
MODES = [
    mode for k, mode in enumerate(MODES) if any(mode[0] is c for c in WHOLE.values()) or k % 3 == 0
]


@pytest.mark.parametrize("case, form, master", MODES, ids=str)
def test_every_mode(case: OptimizerCase, form: Any, master: object, runner: Any) -> None:
    """All lengths and dtypes of params and of gradients in one plan, which has rows without a coded
    stream, too."""
    pairs = list(itertools.product(dtypes_of(master), FLOATS))
    own = list(zip(EDGES * 2, itertools.cycle(pairs), strict=False))
    own += zip(LONG, itertools.cycle(pairs[2:]), strict=False)
    twins = twins_of(case, [randn(n, k, p) for k, (n, (p, _)) in enumerate(own)], form, master)
    if real():
        return twins.run([g for _, (_, g) in own])
    runner.reset()
    twins.run([g for _, (_, g) in own], steps=2)
    has_states = any(state.keys() - {"step", "master_param"} for state in twins.opt.state.values())
    coded = isinstance(master, str) or has_states
    updates = [e.kernel for e in runner.launches() if e.kernel.startswith("update_kernel")]
    assert [kernel.endswith("true>") for kernel in updates] == [coded] * 2, updates


def shift_states(twins: Twins, by: int) -> None:
    """Every state and master `by` elements off a boundary; scales stay."""
    for optimizer, params in twins.both:
        for param in params:
            state = optimizer.state[param]
            for name in state.keys() - {"step"}:
                if not name.endswith("_scale"):
                    state[name] = shifted(state[name], by)


@pytest.mark.parametrize("param_at, grad_at, states_at", [
    (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 4), (4, 4, 4), (2, 4, 8), (3, 2, 1),
    (8, 8, 4),
])  # fmt: skip
@pytest.mark.parametrize("form, master", [
    ("8bit", "remainder"), ("8bit", "remainder8"), ("bf16", "dither"), ("bf16", None),
    ({"exp_avg": "8bit"}, False),
], ids=str)  # fmt: skip
def test_alignment(form: Any, master: object, param_at: int, grad_at: int, states_at: int) -> None:
    """Of each kind of stream apart from the others, and of all."""
    pairs = list(itertools.product(dtypes_of(master), FLOATS))
    own = list(itertools.product((5, 128, 300), pairs))
    own.append((CHUNK + 200, pairs[-1]))
    values = [shifted(randn(n, n, p), param_at) for n, (p, _) in own]
    twins = twins_of(BY_NAME["adamw-plain"], values, form, master)
    for step in range(3):
        grads = grads_like(twins.params, step, [g for _, (_, g) in own])
        for _, params in twins.both:
            for param, grad in zip(params, grads, strict=True):
                param.grad = shifted(grad, grad_at).to(param.device)
        twins.step()
        twins.check()
        if step == 0:
            shift_states(twins, states_at)


def bytes_of(twins: Twins) -> list[Tensor]:
    tensors = [p.detach() for p in twins.params]
    tensors += [t for p in twins.params for t in twins.opt.state[p].values()]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("form, master", [("8bit", "remainder"), ("bf16", "dither"),
                                          ("8bit", "remainder8")])  # fmt: skip
@parametrize("case", CASES)
def test_a_skipped_step_moves_no_byte(case: OptimizerCase, form: Any, master: object) -> None:
    """Of no code, scale, remainder, param or count; and the next one is right."""
    form = "bf16" if case.hyper.get("amsgrad") else form
    dtype = torch.bfloat16
    values = [randn(n, n, dtype) for n in (*EDGES, CHUNK + 300)]
    twins = twins_of(case, values, form, master)
    twins.step(grads_like(twins.params, 0), grad_scale=8.0, found_inf=0.0)
    twins.check()
    before = bytes_of(twins)
    grads = grads_like(twins.params, 1)
    grads[-1][-1] = math.inf
    twins.step(grads, grad_scale=8.0, found_inf=1.0)
    assert all(map(same_bits, bytes_of(twins), before))
    twins.check()
    twins.step(grads_like(twins.params, 2), grad_scale=8.0, found_inf=0.0)
    twins.check()
    assert not all(map(same_bits, bytes_of(twins), before))


def test_blocks_of_zeros_and_of_one_value() -> None:
    """The scale is that of the block, whatever lies beside it."""
    case = BY_NAME["adamw-plain"]
    twins = twins_of(case, [randn(n, n, torch.bfloat16) for n in (128, 1000)], "8bit", "remainder")
    for step in range(4):
        grads = grads_like(twins.params, step, torch.float32)
        for grad in grads:
            grad[:128] = 0.0
            grad[128:256] *= 1e-20
            grad[256:384] *= 1e18
            grad[-3:] *= 1e10
        twins.step(grads)
        twins.check()


@pytest.mark.parametrize("schedule", [
    dict(threads_descending=1), dict(blocks_descending=1), dict(host_threads=3),
], ids=lambda schedule: next(iter(schedule)))  # fmt: skip
def test_grid_and_schedule_leave_no_trace(schedule: dict[str, int], runner: Any) -> None:
    if real():
        pytest.skip("only the shim has a schedule")
    modes = itertools.product(("8bit", "bf16"), ("remainder", "remainder8", "dither"))
    for grid, (form, master) in zip(itertools.cycle([(1, 1), (1, 3), (7, 1)]), modes, strict=False):
        runner.reset()
        runner.set(processors=grid[0], blocks_per_processor=grid[1], **schedule)
        values = [randn(n, n, torch.bfloat16) for n in (*EDGES, CHUNK + 300, 3 * CHUNK)]
        twins_of(BY_NAME["adamw-plain"], values, form, master).run(steps=2)


@pytest.mark.parametrize("first", [1, 12345, 2**32 + 77])
def test_a_shard_is_dithered_by_its_place_in_the_tensor(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "first_element", lambda param: first)
    for form, master in (("8bit", "remainder8"), ("bf16", "dither")):
        values = [randn(n, n, torch.bfloat16) for n in (300, CHUNK + 300)]
        twins_of(BY_NAME["adamw-plain"], values, form, master).run()


def test_writes_to_params_are_followed() -> None:
    """A write to the param: fp32 masters follow it, and remainders join whatever is there."""
    case = BY_NAME["adamw-plain"]
    for master in (None, "remainder", "remainder8", "dither"):
        values = [randn(n, n, torch.bfloat16) for n in (5, 300, 700)]
        twins = twins_of(case, values, "8bit", master)
        twins.run(steps=2)
        with torch.no_grad():
            for _, params in twins.both:
                for param in params:
                    param[::3] *= 1.5
        twins.run(steps=2, first=2)
