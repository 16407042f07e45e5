"""How strangers come by an optimizer: torch's names, wrappers, lists and dicts, profilers."""

import contextlib
import inspect
import json
import textwrap
import warnings

import pytest
import torch
from children import in_a_child
from protocol_helpers import every_class, every_kind, fallback_is_expected, give_grads, make_ours
from torch.profiler import ExecutionTraceObserver

import fusedopt
from fusedopt.backends import registry

pytestmark = fallback_is_expected


def run(code, folder):
    done = in_a_child(textwrap.dedent(code), folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["torch", "fusedopt"])
def test_in_place_of_torchs_classes(first, tmp_path):
    """Frameworks that choose by name are switched over by putting ours under torch's names."""
    code = """
        names = "SGD", "Adam", "AdamW"
        stock = [getattr(torch.optim, name) for name in names]
        if "fusedopt" not in globals():
            for name in names:
                setattr(torch.optim, name, None)
        import fusedopt
        for name in names:
            ours = fusedopt.FusedSGD if name == "SGD" else fusedopt.FusedAdamW
            setattr(torch.optim, name, ours)
        plain = torch.amp.GradScaler("cpu")
        torch.amp.GradScaler = fusedopt.GradScaler
        p = torch.nn.Parameter(torch.ones(3))
        for name, theirs in zip(names, stock):
            p.grad = torch.ones(3)
            opt = getattr(torch.optim, name)([p], lr=0.1)
            opt.step()
            own = opt.defaults.keys() - {"decoupled_weight_decay"}
            assert own <= theirs([p], lr=0.1).defaults.keys()
        fusedopt.fuse_scaler(plain)
        torch.amp.GradScaler("cpu").scale(p.sum()).backward()
    """
    run(f"import {first}, torch" + textwrap.dedent(code), tmp_path)


def test_the_first_step_imports_nothing(tmp_path):
    run(
        """
        import sys, torch, fusedopt
        for backend, dtype in (("auto", torch.float64), ("reference", torch.float64), (None, None)):
            p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
            p.grad = torch.ones_like(p)
            cls = fusedopt.FusedAdamW if backend else fusedopt.FusedSGD
            opt = cls([p], max_grad_norm=1.0, backend=backend)
            before = set(sys.modules)
            opt.step()
            assert not set(sys.modules) - before, set(sys.modules) - before
        """,
        tmp_path,
    )


# A warning names the user's line, by whatever way the step was reached


def by_step(opt):
    opt.step()  # here


def by_init_state(opt):
    opt.init_state()  # here


def by_what_torch_wraps_around_it(opt):
    torch.optim.lr_scheduler.StepLR(opt, 1)
    opt.register_step_pre_hook(lambda *_: None)
    with torch.profiler.profile():
        torch.no_grad()(opt.step)()  # here


def by_torchs_scaler(opt):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(opt)  # here


def by_our_scaler(opt):
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(opt)  # here


def by_a_hook_in_backward(opt):
    def step(_):
        opt.step()  # here

    param = opt.param_groups[0]["params"][0]
    param.register_post_accumulate_grad_hook(step)
    param.sum().backward()


WAYS = [by_step, by_init_state, by_what_torch_wraps_around_it, by_torchs_scaler, by_our_scaler,
        by_a_hook_in_backward]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_fallback_names_the_users_line(way, monkeypatch):
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_announced", set())  # it is said once in a process
    param = torch.ones(3, dtype=torch.float64, requires_grad=True)
    param.grad = torch.ones_like(param)
    opt = fusedopt.FusedSGD([param], lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", fusedopt.FusedOptFallbackWarning)
        way(opt)
    (warning,) = [w for w in said if w.category is fusedopt.FusedOptFallbackWarning]
    lines, start = inspect.getsourcelines(way)
    (here,) = (at for at, line in enumerate(lines, start) if line.endswith("  # here\n"))
    assert (warning.filename, warning.lineno) == (__file__, here)


# Profilers


@contextlib.contextmanager
def execution_trace(folder):
    """The nodes, filled in at the end. No profiler that Python knows of is on."""
    nodes, path = [], folder / "trace.json"
    observer = ExecutionTraceObserver().register_callback(str(path))
    observer.start()
    yield nodes
    observer.stop()
    observer.unregister_callback()
    nodes += json.loads(path.read_text())["nodes"]


@every_kind
@pytest.mark.parametrize("hooked", [False, True])
def test_the_range_of_the_step_in_an_execution_trace(kind, hooked, tmp_path):
    """There is one, once."""
    params, opt = make_ours(kind)
    if hooked:
        opt.register_step_post_hook(lambda *_: None)
    give_grads(params, 0)
    with execution_trace(tmp_path) as nodes:
        opt.step()
    name = f"Optimizer.step#{type(opt).__name__}.step"
    assert [node["name"] for node in nodes if "Optimizer.step" in node["name"]] == [name]


def test_the_range_ends_with_an_error(tmp_path):
    """While somebody holds the traceback, too, and with it the step's local variables."""
    params, opt = make_ours()
    give_grads(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    with execution_trace(tmp_path) as nodes:
        with pytest.raises(RuntimeError, match="sparse") as raised:
            opt.step()
        torch.ones(3)
    assert raised.traceback
    names = {node["id"]: node["name"] for node in nodes}
    (after,) = (node for node in nodes if node["name"] == "aten::ones")
    assert "Optimizer.step" in "".join(names.values())
    assert "Optimizer.step" not in names[after["ctrl_deps"]]


# Lists and dicts of torch's protocol, replaced by something else


REPLACED = {
    "optimizer.param_groups is a tuple, not a list": (
        lambda opt: setattr(opt, "param_groups", tuple(opt.param_groups))
    ),
    "param group 1 is no dict with a list of params": lambda opt: opt.param_groups.append(3),
    "param group 0 is no dict with a list of params": (
        lambda opt: opt.param_groups[0].update(params=None)
    ),
    "param 3 of group 0 is a int, not a tensor": (
        lambda opt: opt.param_groups[0]["params"].append(3)
    ),
    "optimizer.state is a NoneType, not a dict": lambda opt: setattr(opt, "state", None),
}


@every_kind
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("words", REPLACED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_no_list_or_dict_is_refused_by_name(kind, stepped, words, backend):
    params, opt = make_ours(kind, backend=backend)
    give_grads(params, 0)
    if stepped:
        opt.step()
    before = [p.detach().clone() for p in params]
    REPLACED[words](opt)
    for call in (opt.step, opt.init_state):
        with pytest.raises(RuntimeError, match=words):
            call()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@every_class
def test_state_that_belongs_to_no_parameter(cls):
    p = torch.nn.Parameter(torch.ones(4))
    opt = cls([p])
    p.grad = torch.ones(4)
    before = opt.memory_footprint()
    opt.state["global_step"] = 7
    opt.state["ema"] = torch.zeros(10)
    opt.state["more"] = {"a": torch.zeros(2), "b": [1], "c": None}
    expected = {**before, "ema": 40, "a": 8, "total": before["total"] + 48}
    assert opt.memory_footprint() == expected
    opt.step()
    loaded = cls([torch.nn.Parameter(torch.ones(4))])
    loaded.load_state_dict(opt.state_dict())
    assert loaded.state["global_step"] == 7 and loaded.state["more"]["b"] == [1]
    assert loaded.memory_footprint()["ema"] == 40


@every_class
def test_one_message(cls, recwarn):
    """What is refused is not announced first as served by a slower backend."""
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        cls([p]).init_state()
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.ones(3, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        cls([p]).step()
    assert not [w for w in recwarn.list if w.category is fusedopt.FusedOptFallbackWarning]
