"""Checkpoints between CPU and GPU, and between torch's optimizers and ours; what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CHUNK, FLOATS, FULL_CASES, HALVES, PLAIN_CASES, OptimizerCase, parametrize
from gpu_helpers import backend, by_speed, device, module_of, only_on_a_gpu, real, runners
from gpu_twins import Twins, assert_pairs_agree, copies, everything, grads_like, values_of
from harness import FUSED, make_param, randn
from torch import Tensor

import fusedopt
from fusedopt.backends import registry

runner = runners()


def lengths() -> list[int]:
    return by_speed([17, 0, CHUNK + 5, 33], [17, 0, CHUNK + 5, 33], [17, 0, 33])


def saved_and_loaded(state_dict: dict[str, Any], map_location: Any = None) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, map_location=map_location, weights_only=True)
    return loaded


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "as_it_is": lambda state: state,
    "saved": saved_and_loaded,
    "saved_and_mapped": lambda state: saved_and_loaded(state, "cpu"),
}


# CPU and GPU


@pytest.mark.parametrize(("case", "way"), list(zip(FULL_CASES, WAYS, strict=True)), ids=str)
def test_checkpoints_change_sides(case: OptimizerCase, way: str) -> None:
    """What was the GPU's goes on on the CPU and the reverse: the same bits as if nobody moved."""
    values = [v for dtype in FLOATS for v in values_of(lengths(), dtype)]
    values = by_speed(values, values, values[::2])
    first, second = (Twins.of(case, values) for _ in range(2))
    first.run()
    for old, new in ((first.params, second.twin_params), (first.twin_params, second.params)):
        for source, target in zip(old, new, strict=True):
            target.data.copy_(source.detach())
    second.twin.load_state_dict(WAYS[way](first.opt.state_dict()))
    second.opt.load_state_dict(WAYS[way](first.twin.state_dict()))
    for step in range(3, 6):
        grads = grads_like(first.params, step)
        if step == 4:
            grads[0][-1] = torch.inf
        first.step(grads)
        second.step(grads)
    first.check()
    second.check()
    pairs = everything(first.opt, first.params, second.twin, second.twin_params)
    assert_pairs_agree(pairs)
    for param in second.params:
        state = second.opt.state[param]
        assert all(value.device == param.device for value in state.values())


@parametrize("dtype", HALVES)
def test_copies_and_pickles(dtype: torch.dtype) -> None:
    """A copied optimizer has a plan of its own, over its own params."""
    twins = Twins.of(PLAIN_CASES[0], values_of(lengths(), dtype), max_grad_norm=1.0)
    for step in range(2):
        twins.step(grads_like(twins.twin_params, step))
    for other in (copy.deepcopy(twins.opt), pickle.loads(pickle.dumps(twins.opt))):
        own = [p for group in other.param_groups for p in group["params"]]
        assert all(
            p.device == device() and p is not q for p, q in zip(own, twins.params, strict=True)
        )
        for step in range(2, 4):
            for param, grad in zip(own, grads_like(own, step), strict=True):
                param.grad = grad.to(device())
            other.step()
        assert own[0].grad is not None
        assert other.state[own[0]]["step"].item() == 4.0
    twins.check()
    for step in range(2, 4):
        twins.step(grads_like(twins.twin_params, step))
    twins.check()
    assert_pairs_agree(everything(other, own, twins.twin, twins.twin_params))


# torch's optimizers


def torchs(rule: str, params: list[Tensor], **hyper: Any) -> torch.optim.Optimizer:
    """torch's fastest, as it is used under CUDA graphs."""
    if rule == "adamw":
        return torch.optim.AdamW(params, fused=True, capturable=True, **hyper)
    return torch.optim.SGD(params, fused=True, momentum=0.9, **hyper)


def ours(rule: str, params: list[Tensor], **hyper: Any) -> Any:
    hyper |= {} if rule == "adamw" else {"momentum": 0.9, "decoupled_weight_decay": False}
    return FUSED[rule](params, backend=backend(), **hyper)


@pytest.mark.parametrize(
    ("rule", "options"), [("adamw", {}), ("adamw", {"amsgrad": True}), ("sgd", {})], ids=str
)
@pytest.mark.parametrize("to_ours", [True, False])
def test_checkpoints_of_torchs_fused_optimizers(
    rule: str, options: dict[str, Any], to_ours: bool
) -> None:
    hyper = {"lr": 0.05, "weight_decay": 0.1, **options}
    params = [
        make_param(randn(n, n).to(device())) for n in (17, by_speed(CHUNK + 5, CHUNK + 5, 35))
    ]
    build_first, build_second = (torchs, ours) if to_ours else (ours, torchs)
    first = build_first(rule, params, **hyper)
    step_with(first, params, range(3))
    others = list(copies(params))
    second = build_second(rule, others, **hyper)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for param, other in zip(params, others, strict=True):
        for name, value in second.state[other].items():
            if name in first.state[param]:
                assert torch.equal(value, first.state[param][name]), name
    for optimizer, own in ((first, params), (second, others)):
        step_with(optimizer, own, range(3, 8))
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
        if rule == "adamw":  # torch's SGD keeps no count
            assert first.state[param]["step"] == second.state[other]["step"] == 8


def step_with(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, grads_like(params, step), strict=True):
            param.grad = grad.to(param.device)
        optimizer.step()


# What is refused, and that a refusal leaves everything as it was


def test_gradient_on_another_device_is_refused() -> None:
    only_on_a_gpu()
    param = make_param(randn(17, 1).to(device()))
    param.grad = torch.zeros(17, device=device())
    opt = fusedopt.FusedAdamW([param])
    opt.step()
    param.data = param.data.cpu()  # .grad stays behind
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"on cuda:0.*on cpu"):
        opt.step()
    assert torch.equal(param, before)
    param.data = param.data.to(device())
    opt.step()


def test_cpu_backend_does_not_take_cuda_tensors() -> None:
    only_on_a_gpu()
    param = make_param(torch.zeros(3, device=device()))
    param.grad = torch.ones(3, device=device())
    opt = fusedopt.FusedAdamW([param], backend="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu'.*cuda"):
        opt.step()
    assert not param.any() and not opt.state


def test_float64_goes_to_the_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    only_on_a_gpu()
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_announced", set())  # it is said once in a process
    param = make_param(torch.zeros(3, device=device(), dtype=torch.float64))
    param.grad = torch.ones_like(param)
    opt = fusedopt.FusedAdamW([param])
    with pytest.warns(fusedopt.FusedOptFallbackWarning, match="float64"):
        opt.step()
    assert bool(param.any())
    opt = fusedopt.FusedAdamW([param], backend=backend())
    with pytest.raises(RuntimeError, match=rf"'{backend()}'.*float64"):
        opt.step()


@pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")
def test_gpu_tensors_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what is missing; what then serves is right, or the message says what to do."""
    only_on_a_gpu()
    monkeypatch.setattr(module_of(backend()), "unavailable_reason", lambda: "it was not found")
    values = randn(17, 1)
    param = make_param(values.to(device()))
    param.grad = torch.ones(17, device=device())
    opt = fusedopt.FusedAdamW([param], backend=backend())
    with pytest.raises(RuntimeError, match=rf"'{backend()}'.*it was not found"):
        opt.step()
    assert torch.equal(param.cpu(), values) and not opt.state
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    opt = fusedopt.FusedAdamW([param])
    try:
        opt.step()
    except RuntimeError as error:
        assert "it was not found" in str(error) and "backend=" in str(error)
    else:
        assert opt.backend != {str(device()): backend()}
        assert not torch.equal(param.cpu(), values)


def test_a_failed_step_leaves_the_optimizer_usable() -> None:
    """A gradient that cannot be used, found after the plan was built."""
    twins = Twins.of(PLAIN_CASES[0], values_of([17, 300]), max_grad_norm=1.0)
    twins.step(grads_like(twins.twin_params, 0))
    twins.params[1].grad = torch.zeros(300, device=device()).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        twins.opt.step()
    for step in range(1, 3):
        twins.step(grads_like(twins.twin_params, step))
        twins.check()


def test_what_the_optimizer_says_about_itself() -> None:
    twins = Twins.of(PLAIN_CASES[0], values_of(lengths(), torch.float16), max_grad_norm=1.0)
    twins.step(grads_like(twins.twin_params, 0))
    assert twins.opt.backend == {str(twins.params[0].device): backend()}
    sizes, expected = twins.opt.memory_footprint(), twins.twin.memory_footprint()
    assert {k: v for k, v in sizes.items() if k not in ("plan", "total")} == {
        k: v for k, v in expected.items() if k not in ("plan", "total")
    }
    assert sizes["plan"] > 0
    for scalar in ("grad_norm", "clip_coef", "found_inf", "skipped_steps"):
        assert getattr(twins.opt, scalar).device == device(), scalar
    assert not real() or all(v.is_cuda for s in twins.opt.state.values() for v in s.values())
