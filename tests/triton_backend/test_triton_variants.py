"""What the Triton backend compiles, whatever the values of a step are, and launches: which variant,
and with which inputs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import ALL_CASES, DTYPE_PAIRS, FULL_CASES, OptimizerCase, adamw, case_id
from gpu_twins import grads_like, values_of
from harness import FUSED, make_param, set_grad
from triton_interpreter import Interpreter

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from fusedopt.backends import triton as backend
from fusedopt.triton_kernels.variants import COUNTS, Variant, all_variants

DOCS = Path(__file__).parents[2] / "docs/triton.md"
NAMES = [variant.name for variant in all_variants()]


class FakeKernel:
    """A compiled kernel whose launch only looks at what it is given."""

    function, packed_metadata = 0xF00D, (4, 1, 0)

    def __init__(self, variant: Variant, launched: list[str]) -> None:
        self.src = SimpleNamespace(fn=variant.kernel)
        self._name = variant.name
        self._constants = variant.constants
        self._launched = launched

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        assert x >= 1 and y == z == 1
        no_hooks = (None, None, None)
        assert arguments[:6] == (0, self.function, self.packed_metadata, *no_hooks)
        for name, value in zip(self.src.fn.arg_names, arguments[6:], strict=True):
            assert type(value) is int, name
            limit = 1 if name in self._constants else 2**31 if name in COUNTS else 2**63
            assert 0 <= value < limit, (name, value)
        self._launched.append(self._name)


class Counting(Interpreter):
    """The driver's own way to a launch, up to the compiler and from the compiled kernel on."""

    launcher = backend.TritonDriver.launcher

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.names: list[str] = []  # of what was launched
        self.refused = ""

    def _load(self, key: backend.Key) -> Any:
        variant = Variant(*key)
        if variant.name == self.refused:
            raise RuntimeError("the compiler says no")
        self.asked.append(variant.name)
        return FakeKernel(variant, self.names)


def _not_so(*_: object, **__: object) -> None:
    raise AssertionError("a kernel was launched by the JIT, which compiles for values")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(JITFunction, "run", _not_so)
    monkeypatch.setattr(JITFunction, "__getitem__", _not_so)
    counting = Counting()
    monkeypatch.setattr(backend.driver, "made", counting)
    yield counting


def optimizer_of(case: OptimizerCase, lengths: list[int], dtype: torch.dtype = torch.float32):
    """An optimizer, and its params."""
    params = [make_param(values) for values in values_of(lengths, dtype)]
    group = {"params": params, **case.hyper}
    return FUSED[case.rule]([group], backend="triton", **case.common), params


def step(optimizer: Any, params: list[Any], grads: list[Any]) -> None:
    for param, grad in zip(params, grads, strict=True):
        set_grad(param, grad)
    optimizer.step()


def run(
    case: OptimizerCase,
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    steps: int = 2,
    **changes: Any,
) -> Any:
    """Steps, between which ``changes`` are made."""
    optimizer, params = optimizer_of(case, lengths, dtype)
    for k in range(steps):
        step(optimizer, params, grads_like(params, k, grad_dtype))
        optimizer.param_groups[0].update(changes)
    return optimizer


def expected(case: OptimizerCase, dtype: torch.dtype, grad_dtype: torch.dtype) -> set[str]:
    states = 3 if case.hyper.get("amsgrad") else max(1, FUSED[case.rule].rule.n_always)
    names = {f"reduce-{case.rule}", f"finalize-{case.rule}"}
    if dtype == torch.float32:  # known before there is a gradient
        names.add(f"update-{case.rule}-{states}-float32")
    if {dtype, grad_dtype} != {torch.float32}:
        names.add(f"update-{case.rule}-{states}-any")
    return names


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPE_PAIRS, ids=case_id)
@pytest.mark.parametrize("case", ALL_CASES, ids=case_id)
def test_options_and_dtypes_choose_among_the_variants(driver, case, dtype, grad_dtype):
    run(case, [5, 300], dtype, grad_dtype)
    assert set(driver.asked) == expected(case, dtype, grad_dtype) <= set(NAMES)
    assert len(driver.asked) == len(set(driver.asked))
    assert {name.partition("-")[0] for name in driver.names} >= {"update"}


def test_each_variant_is_compiled_once(driver):
    for case in ALL_CASES:
        for dtype, grad_dtype in DTYPE_PAIRS:
            run(case, [7], dtype, grad_dtype, steps=1)
    for case in FULL_CASES:
        optimizer, params = optimizer_of(case, [7])
        for bits in ("exact", None, "exact"):
            optimizer.norm_bits = bits
            step(optimizer, params, grads_like(params, 0))
            assert driver.names[-2] == f"reduce{'_exactly' if bits else ''}-{case.rule}"
    for case in (*FULL_CASES, adamw("plain")):
        common = {**case.common, "state_dtype": "bf16"}
        run(OptimizerCase("coded", case.rule, case.hyper, common), [7], steps=1)
    assert sorted(driver.asked) == sorted(NAMES)
    assert set(driver.names) == set(NAMES)


# Whatever a number may be that a compiler could want to know: 0, 1, multiples of 16.
OF_BOTH: list[dict[str, Any]] = [
    {"lr": 0.0}, {"lr": 1.0}, {"lr": torch.tensor(0.5)}, {"weight_decay": 0.0},
    {"weight_decay": 1.0}, {"maximize": True}, {"decoupled_weight_decay": False},
]  # fmt: skip
CHANGES: dict[str, list[dict[str, Any]]] = {
    "adamw": [*OF_BOTH, {"lr": 16}, {"betas": (0.0, 0.0)}, {"eps": 1.0}],
    "sgd": [*OF_BOTH, {"momentum": 0.5}, {"dampening": 0.5}, {"momentum": 0.9, "nesterov": True}],
}
COMMON: list[dict[str, Any]] = [
    {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "norm_type": float("inf")},
    {"max_grad_value": 0.5}, {"skip_nonfinite": True},
]  # fmt: skip
LENGTHS = [[0], [1], [16], [17], [8192], [8193], [0, 1, 3], [16] * 20, [1] * 300, [100_000]]
ROWS = [
    *((OptimizerCase("any", rule), [40], change) for rule in CHANGES for change in CHANGES[rule]),
    *((OptimizerCase("clips", rule, {}, c), [40], {}) for c in COMMON for rule in CHANGES),
    *((case, lengths, {}) for lengths in LENGTHS for case in FULL_CASES),
]


@pytest.mark.parametrize(("case", "lengths", "change"), ROWS, ids=case_id)
def test_what_asks_for_nothing_new(driver, case, lengths, change):
    """A hyper-parameter, a way of clipping, lengths and numbers of tensors."""
    states = {"amsgrad": True} if case.hyper.get("amsgrad") else {}
    run(OptimizerCase("plain", case.rule, states), [40])
    before = list(driver.asked)
    run(case, lengths, steps=3, **change)
    assert driver.asked == before


def test_the_scaler_and_groups_ask_for_nothing_new(driver):
    run(adamw("plain"), [40])
    before = list(driver.asked)
    optimizer = run(adamw("plain"), [40, 3])
    optimizer.add_param_group({"params": [make_param(torch.ones(9))], "lr": 0.5})
    for scale in (1.0, 65536.0):
        for group in optimizer.param_groups:
            for param in group["params"]:
                set_grad(param, torch.ones_like(param))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
    assert driver.asked == before


def test_the_docs_list_the_variants():
    rows = re.findall(r"^\| `([a-z_]+-[\w-]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert rows == NAMES


@pytest.mark.parametrize("case", FULL_CASES, ids=case_id)
def test_the_variant_follows_the_gradients(driver, case):
    optimizer, params = optimizer_of(case, [5, 3])
    states = len(FUSED[case.rule].rule.states)
    full, half = grads_like(params, 0), grads_like(params, 0, torch.bfloat16)
    steps = [
        (full, "float32"),
        (full, "float32"),
        ([full[0], half[1]], "any"),
        ([full[0], half[1]], "any"),
        (full, "float32"),
        ([half[0].half(), full[1]], "any"),
        (half, "any"),
        ([None, full[1]], "float32"),
    ]
    for grads, streams in steps:
        step(optimizer, params, grads)
        assert driver.names[-1] == f"update-{case.rule}-{states}-{streams}"


CODED: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"state_dtype": "bf16"}),
    (torch.float32, {"state_dtype": "8bit", "min_8bit_size": 5}),
    (torch.float32, {"state_dtype": {"momentum_buffer": "bf16"}}),
    (torch.float16, {"master_weights": "remainder"}),
    *((torch.bfloat16, {"master_weights": w}) for w in ("remainder", "remainder8", "dither")),
]


@pytest.mark.parametrize(("dtype", "common"), CODED, ids=case_id)
def test_one_variant_serves_every_codec(driver, dtype, common):
    """Whatever the gradients are, and where only one row is coded."""
    case = OptimizerCase("coded", "sgd", {"momentum": 0.9}, common)
    for grad_dtype in (torch.float32, torch.float16):
        run(case, [5, 3], dtype, grad_dtype)
    assert driver.asked == ["reduce-sgd", "finalize-sgd", "update-sgd-1-coded"]


def test_small_tensors_need_no_codes(driver):
    case = OptimizerCase("small", "sgd", {"momentum": 0.9}, {"state_dtype": "8bit"})
    run(case, [5, 4095])
    assert driver.asked == ["reduce-sgd", "finalize-sgd", "update-sgd-1-float32"]


def test_a_variant_that_did_not_compile_is_tried_again(driver):
    """Rather than the other one used, which would misread the gradients."""
    optimizer, params = optimizer_of(FULL_CASES[1], [5, 3])
    step(optimizer, params, grads_like(params, 0))
    halves = grads_like(params, 1, torch.bfloat16)
    driver.refused = "update-sgd-1-any"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="says no"):
            step(optimizer, params, halves)
    driver.refused = ""
    step(optimizer, params, halves)
    assert driver.names[-1] == "update-sgd-1-any"


def test_loads_and_launches_are_on_the_device_of_the_tables(driver, monkeypatch):
    """Whichever is the current one."""
    current, used = [0], []

    @contextlib.contextmanager
    def on_device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(FakeKernel, "run", lambda *_: used.append(current[-1]))
    monkeypatch.setattr(driver, "index", lambda device: 1)
    load = driver._load

    def noted(key):
        used.append(current[-1])
        return load(key)

    monkeypatch.setattr(driver, "_load", noted)
    run(FULL_CASES[0], [5])
    assert len(used) > 4 and set(used) == {1} and current == [0]


def test_a_step_with_nothing_new_copies_nothing(driver, monkeypatch):
    optimizer, params = optimizer_of(FULL_CASES[0], [5, 3])
    copies = []
    run = backend._Upload.run

    def counted(self, capturing):
        copies.append(capturing)
        run(self, capturing)

    monkeypatch.setattr(backend._Upload, "run", counted)
    step(optimizer, params, grads_like(params, 0))
    optimizer.step()
    assert len(copies) == 1
    changes = [
        lambda: optimizer.param_groups[0].update(lr=0.123),
        lambda: setattr(params[0], "grad", params[0].grad.clone()),
        lambda: setattr(params[1], "grad", None),
        lambda: setattr(optimizer, "max_grad_norm", 0.5),
    ]
    for change in changes:
        copies.clear()
        change()
        optimizer.step()
        optimizer.step()
        assert copies == [False]
    monkeypatch.setattr(driver, "capturing", lambda device: True)
    optimizer.step()
    assert copies == [False, True]
