"""State is memory of torch's allocator, one allocation a tensor; loading needs no second state."""

import copy

import pytest
import torch
from protocol_helpers import fallback_is_expected, on_every_backend
from torch.profiler import ProfilerActivity, profile

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)

BODY, HEAD = 600_000, 1000  # of 2.3 MiB, where huge pages are asked for


def traced(call):
    """Bytes that `call` held at most, and those it left behind, of what it allocated itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def large(dtype=torch.float32, cls=fusedopt.FusedAdamW, **options):
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (BODY, HEAD, BODY)]
    return params, cls([{"params": [p]} for p in params], **options)


def test_peaks_are_seen():
    """What the assertions below rest on."""

    def call():
        a = torch.ones(1000)
        b = torch.ones(1000)
        del a
        return b

    assert traced(call) == (8000, 0)


# Each tensor's memory is its own


def delete_state(opt, param):
    del opt.state[param]


def clear_own(opt, param):
    opt.state[param].clear()


def drop_group(opt, param):
    del opt.state[param], opt.param_groups[0]


def replace_tensors(opt, param):
    for name in opt.state[param]:
        opt.state[param][name] = torch.empty(0)


def free_storages(opt, param):
    for value in opt.state[param].values():
        value.untyped_storage().resize_(0)


DROPS = [delete_state, clear_own, drop_group, replace_tensors, free_storages]


@pytest.mark.parametrize("drop", DROPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("made", ["step", "init_state", "load"])
def test_the_memory_of_one_parameter_returns_alone(dtype, made, drop):
    saved = large(dtype)[1]
    saved.init_state()
    sizes, kept = [], []

    def train(what):
        params, opt = large(dtype)
        kept.append((params, opt))
        for p in params:
            p.grad = torch.ones_like(p)
        if made == "load":
            opt.load_state_dict(saved.state_dict())
        else:
            getattr(opt, made)()
        sizes.append(sum(v.nbytes for v in opt.state[params[0]].values() if v.dim() > 0))
        what(opt, params[0])

    _, without = traced(lambda: train(lambda *_: None))
    _, left = traced(lambda: train(drop))
    assert left <= without - sizes[0]  # the plan may keep the count, of four bytes
    assert sizes[0] >= 2 * 4 * BODY


@pytest.mark.parametrize("made", ["init_state", "load"])
def test_states_are_allocated_where_torch_counts(made):
    opt = large(torch.bfloat16)[1]
    other = large(torch.bfloat16)[1]
    other.init_state()
    make_state = {
        "init_state": opt.init_state,
        "load": lambda: opt.load_state_dict(other.state_dict()),
    }[made]
    peak, left = traced(make_state)
    state = sum(v.nbytes for own in opt.state.values() for v in own.values())
    assert state <= left <= peak <= state + 20_000  # the plan, and small change


def test_states_can_be_resized():
    params, opt = large()
    opt.init_state()
    for value in opt.state[params[0]].values():
        value.resize_(value.numel() + 5)


# Loading


def checkpoint_of(opt, dtype=None):
    saved = copy.deepcopy(opt.state_dict())
    for own in saved["state"].values():
        for name in own:
            if dtype is not None and name != "step":
                own[name] = own[name].to(dtype)
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("saved_as", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "cls, options", [(fusedopt.FusedAdamW, {}), (fusedopt.FusedSGD, {"momentum": 0.9})]
)
@pytest.mark.parametrize("stepped", ["stepped", "init_state", "loaded"])
def test_loading_over_a_state_needs_no_second_one(dtype, saved_as, cls, options, stepped):
    """At most one tensor, beside the state and the caller's checkpoint."""
    params, opt = large(dtype, cls, **options)
    opt.init_state()
    saved = checkpoint_of(opt, saved_as)
    if stepped == "stepped":
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        opt.step()
    if stepped == "loaded":
        opt.load_state_dict(saved)
    addresses = addresses_of(opt)
    peak, left = traced(lambda: opt.load_state_dict(saved))
    assert peak <= 8 * BODY and left <= 5000
    assert addresses_of(opt) == addresses
    for own, p in zip(saved["state"].values(), params, strict=True):
        for name, value in own.items():
            assert torch.equal(opt.state[p][name], value.to(opt.state[p][name].dtype))


def addresses_of(opt):
    return {
        (p, k): v.data_ptr() for p, own in opt.state.items() for k, v in own.items() if v.dim() > 0
    }


def test_loading_into_a_fresh_optimizer_makes_one_state():
    opt = large()[1]
    opt.init_state()
    saved = checkpoint_of(opt, torch.bfloat16)
    fresh = large()[1]
    peak, _ = traced(lambda: fresh.load_state_dict(saved))
    assert peak <= 2 * 4 * (2 * BODY + HEAD) + 4 * BODY
