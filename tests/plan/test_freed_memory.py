"""Memory that the user takes away between two steps."""

import collections
import functools
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fusedopt

OPTIMIZERS = {
    "adamw": (fusedopt.FusedAdamW, {"weight_decay": 0.1}),
    "sgd": (fusedopt.FusedSGD, {"momentum": 0.9}),
}


def held(call):
    """Bytes that were allocated in `call` and not freed by its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return sum(e.nbytes() for e in events)


def keep(opt, param):
    pass


def clear(opt, param):
    opt.state.clear()


def replace(opt, param):
    opt.state = collections.defaultdict(dict)


def offload(opt, param):
    for name in opt.state[param]:
        opt.state[param][name] = torch.empty(0)  # as if on another device


def shard(opt, param):
    param.data = param.data.new_empty(0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("drop", [clear, replace, offload, shard])
@pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning")
def test_what_is_dropped_between_steps_is_freed(kind, dtype, drop, backend, monkeypatch):
    """At once, as with torch: a plan keeps neither parameters nor states of any size."""
    monkeypatch.setenv("FUSEDOPT_BACKEND", "auto" if backend == "cpu" else backend)
    cls, kwargs = OPTIMIZERS[kind]
    sizes = {}

    def train(what=drop):
        param = torch.nn.Parameter(torch.ones(100_000, dtype=dtype))
        param.grad = torch.ones_like(param)
        opt = cls([param], **kwargs)
        opt.step()
        sizes["param"] = param.nbytes
        sizes["state"] = sum(t.nbytes for t in opt.state[param].values() if t.dim() > 0)
        what(opt, param)
        return param, opt

    train(keep)
    freed = sizes["param" if drop is shard else "state"]
    assert freed >= 100_000 * dtype.itemsize
    assert held(train) <= held(functools.partial(train, keep)) - freed


@pytest.mark.parametrize("numel, left", [(1025, 0), (1024, 8 << 20)])
def test_small_states_are_freed_at_once(numel, left, backend):
    """All that take more than a page. The native watch may keep 8 MiB of the others."""
    params = [torch.nn.Parameter(torch.ones(numel)) for _ in range(1500)]
    opt = fusedopt.FusedAdamW(params, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    opt.step()
    states = [t for own in opt.state.values() for t in own.values() if t.dim() > 0]
    n_bytes = sum(t.nbytes for t in states)
    alive = [weakref.ref(t) for t in states]
    del states
    opt.state.clear()
    kept = sum(t.nbytes for ref in alive if (t := ref()) is not None)
    assert n_bytes > 11 << 20
    assert kept <= left
