"""Memory that the user takes away between two steps: freed at once, refused where it is missed."""

import collections
import functools
import weakref

import pytest
import torch
from fake_ranks import fake_ranks
from protocol_helpers import fallback_is_expected, give_grads, make_ours, on_every_backend, step_all
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


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


def shard(opt, param):
    if isinstance(param, DTensor):
        param._local_tensor = param._local_tensor.new_empty(0)
    else:
        param.data = param.data.new_empty(0)


@pytest.fixture(params=["plain", "dtensor"])
def spread(request):
    """Makes a parameter of a tensor. The rank is alone, so that its part is the whole."""
    if request.param == "plain":
        yield torch.nn.Parameter
        return
    with fake_ranks(1):
        mesh = init_device_mesh("cpu", (1,))
        yield lambda value: torch.nn.Parameter(
            distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        )


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_dropped_between_steps_is_freed(kind, dtype, spread):
    """At once, as with torch: a plan keeps neither parameters nor states of any size."""
    cls = {"adamw": fusedopt.FusedAdamW, "sgd": functools.partial(fusedopt.FusedSGD, momentum=0.9)}
    sizes = {}

    def train(drop):
        param = spread(torch.ones(100_000, dtype=dtype))
        param.grad = torch.ones_like(param)
        opt = cls[kind]([param])
        opt.step()
        sizes[keep] = 0
        sizes[shard] = param.nbytes
        sizes[clear] = sizes[replace] = sum(
            t.nbytes for t in opt.state[param].values() if t.dim() > 0
        )
        drop(opt, param)
        return param, opt

    kept = held(functools.partial(train, keep))
    assert min(sizes[clear], sizes[shard]) >= 100_000 * dtype.itemsize
    for drop in (clear, replace, shard):
        assert held(functools.partial(train, drop)) <= kept - sizes[drop], drop


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


# Memory that is gone


def _free(tensor):
    tensor.untyped_storage().resize_(0)


def _zero(tensor):
    tensor.data = torch._efficientzerotensor(tensor.shape)


@pytest.mark.parametrize("gone", [_free, _zero])
@pytest.mark.parametrize("what", ["param", "exp_avg", "step", "grad"])
def test_memory_that_is_gone_is_refused(what, gone):
    """Where torch's own kernels end the process, or write into nothing. Nothing has moved."""
    params, opt = make_ours("adamw")
    step_all([(params, opt)], 0)
    give_grads(params, 1)
    first = params[0].detach().clone()
    target = {"param": params[1], "grad": params[1].grad}.get(what)
    if target is None:
        target = opt.state[params[1]][what]
    saved = target.detach().clone()
    gone(target)
    if (what, gone) == ("grad", _zero):  # zeros can be read
        opt.step()
        return
    with pytest.raises(RuntimeError, match=r"has no memory|storage was resized to nothing"):
        opt.step()
    assert torch.equal(params[0], first) and opt.state[params[0]]["step"] == 1
    target.data = saved
    opt.step()
    assert not torch.equal(params[0], first) and opt.state[params[0]]["step"] == 2


# State that is no plain dict


class Detaching(dict):
    def __getitem__(self, name):
        return super().__getitem__(name).detach()


@pytest.mark.parametrize("mapping", [collections.UserDict, Detaching])
def test_state_that_is_no_dict_is_refused(mapping):
    """The plan compares what is in a dict; it would go on writing to memory that is not there."""
    params, opt = make_ours("adamw")
    step_all([(params, opt)], 0)
    own = opt.state[params[0]]
    opt.state[params[0]] = mapping(own)
    before = [p.detach().clone() for p in params]
    give_grads(params, 1)
    with pytest.raises(RuntimeError, match="not a dict with a dict's own access"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    opt.state[params[0]] = collections.OrderedDict(own)
    opt.step()
    assert opt.state[params[0]]["step"] == 2
