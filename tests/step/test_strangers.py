"""How strangers come by an optimizer: torch's names, its lists and dicts, its profilers."""

import contextlib
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from protocol_helpers import every_kind, fallback_is_expected, give_grads, make_ours
from torch.profiler import ExecutionTraceObserver

import fusedopt

pytestmark = fallback_is_expected
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])


def run(code):
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


@pytest.mark.parametrize("when", ["before", "after"])
def test_in_place_of_torchs_classes(when):
    """Frameworks that choose by name are switched over by putting ours under torch's names."""
    imports = "import fusedopt\n" if when == "after" else ""
    run(
        "import torch\n"
        + imports
        + """
names = "SGD", "Adam", "AdamW"
stock = [getattr(torch.optim, name) for name in names]
if not {"fusedopt"} <= set(globals()):
    for name in names:
        setattr(torch.optim, name, None)
import fusedopt
for name in names:
    setattr(torch.optim, name, fusedopt.FusedSGD if name == "SGD" else fusedopt.FusedAdamW)
plain = torch.amp.GradScaler("cpu")
torch.amp.GradScaler = fusedopt.GradScaler
p = torch.nn.Parameter(torch.ones(3))
for name, theirs in zip(names, stock):
    p.grad = torch.ones(3)
    opt = getattr(torch.optim, name)([p], lr=0.1)
    opt.step()
    assert opt.defaults.keys() - {"decoupled_weight_decay"} <= theirs([p], lr=0.1).defaults.keys()
fusedopt.fuse_scaler(plain)
torch.amp.GradScaler("cpu").scale(p.sum()).backward()
"""
    )


def test_the_first_step_imports_nothing():
    run(
        """
        import sys, torch, fusedopt
        for backend in ("auto", "reference"):
            p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64 if backend else torch.float32))
            p.grad = torch.ones_like(p)
            opt = fusedopt.FusedAdamW([p], max_grad_norm=1.0, backend=backend)
            before = set(sys.modules)
            opt.step()
            assert not set(sys.modules) - before, set(sys.modules) - before
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones_like(p)
        opt = fusedopt.FusedSGD([p], max_grad_norm=1.0)
        before = set(sys.modules)
        opt.step()
        assert not set(sys.modules) - before, set(sys.modules) - before
        """
    )


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


def as_tuple(opt):
    opt.param_groups = tuple(opt.param_groups)


def as_group(opt):
    opt.param_groups.append(3)


def as_params(opt):
    opt.param_groups[0]["params"] = None


def as_param(opt):
    opt.param_groups[0]["params"].append(3)


def as_state(opt):
    opt.state = None


REPLACED = {
    "optimizer.param_groups is a tuple, not a list": as_tuple,
    "param group 1 is no dict with a list of params": as_group,
    "param group 0 is no dict with a list of params": as_params,
    "param 3 of group 0 is a int, not a tensor": as_param,
    "optimizer.state is a NoneType, not a dict": as_state,
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
