"""State is memory of torch's allocator, one allocation a tensor; loading writes to the optimizer's
own tensors where nobody else sees them, so that it needs no second state."""

import copy
import functools

import pytest
import torch
from checkpoint_helpers import assert_same_run, make, resumed, run, traced, trained
from protocol_helpers import fallback_is_expected, on_every_backend
from torch.utils._pytree import tree_leaves

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)

BODY, HEAD = 600_000, 1000  # of 2.3 MiB, where huge pages are asked for


def large(dtype=torch.float32, cls=fusedopt.FusedAdamW, **options):
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (BODY, HEAD, BODY)]
    return params, cls([{"params": [p]} for p in params], **options)


def tensors_of(opt):
    return [v for own in opt.state.values() for v in own.values()]


def addresses_of(opt):
    return [v.data_ptr() for v in tensors_of(opt) if v.dim() > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("made", ["step", "init_state", "load"])
def test_each_state_is_an_allocation_of_torchs(made, dtype):
    """Counted where torch counts, of its own size, and returned with its parameter's entry."""
    params, opt = large(dtype)
    for p in params:
        p.grad = torch.ones_like(p)
    other = large(dtype)[1]
    other.init_state()
    load = functools.partial(opt.load_state_dict, other.state_dict())
    peak, left = traced({"step": opt.step, "init_state": opt.init_state, "load": load}[made])
    states = tensors_of(opt)
    size = sum(v.nbytes for v in states)
    assert size <= left <= peak
    if made != "step":
        assert peak <= size + 20_000  # the plan, and small change
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in states)
    first = sum(v.nbytes for v in opt.state[params[0]].values() if v.dim() > 0)
    del states
    _, left = traced(lambda: opt.state.pop(params[0]))
    assert left <= -first <= -2 * 4 * BODY
    for value in tensors_of(opt):
        value.resize_(value.numel() + 5)  # as only memory of torch's can be


# Loading into memory that is there


def checkpoint_of(opt, dtype):
    saved = copy.deepcopy(opt.state_dict())
    for own in saved["state"].values():
        own.update({k: v.to(dtype or v.dtype) for k, v in own.items() if k != "step"})
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("saved_as", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "cls, options", [(fusedopt.FusedAdamW, {}), (fusedopt.FusedSGD, {"momentum": 0.9})]
)
def test_loading_over_a_state_needs_no_second_one(dtype, saved_as, cls, options):
    """At most one tensor, beside the state and the caller's checkpoint."""
    params, opt = large(dtype, cls, **options)
    opt.init_state()
    saved = checkpoint_of(opt, saved_as)
    for p in params:
        p.grad = torch.ones_like(p)
    for made in ("init_state", "load", "step"):
        if made == "step":
            opt.step()
            opt.step()
        addresses = addresses_of(opt)
        peak, left = traced(lambda: opt.load_state_dict(saved))
        assert peak <= 8 * BODY and left <= 5000, made
        assert addresses_of(opt) == addresses, made
        for own, p in zip(saved["state"].values(), params, strict=True):
            for name, value in own.items():
                assert torch.equal(opt.state[p][name], value.to(opt.state[p][name].dtype))


def test_loading_into_a_fresh_optimizer_makes_one_state():
    opt = large()[1]
    opt.init_state()
    saved = checkpoint_of(opt, torch.bfloat16)
    fresh = large()[1]
    peak, _ = traced(lambda: fresh.load_state_dict(saved))
    assert peak <= 2 * 4 * (2 * BODY + HEAD) + 4 * BODY


def test_loading_over_a_run_continues_as_a_fresh_one():
    params, opt, saved = trained("adamw", torch.bfloat16, 3)
    other, other_opt = make("adamw", torch.bfloat16)
    run(other, other_opt, range(5, 9))
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            q.copy_(p)
    other_opt.load_state_dict(saved)
    assert_same_run(range(3, 6), (params, opt), (other, other_opt), resumed("adamw", params, saved))


# Memory that somebody else sees

OWNERS = {
    "the dict": lambda opt: opt.state_dict(),
    "all state": lambda opt: opt.state,
    "tensors": tensors_of,
    "aliases": lambda opt: [v.detach() for v in tensors_of(opt)],
    "parts": lambda opt: [v[:1] for v in tensors_of(opt) if v.dim()],
    "storages": lambda opt: [v.untyped_storage() for v in tensors_of(opt)],
    "arrays": lambda opt: [v.numpy() for v in tensors_of(opt)],
    "a graph": lambda opt: [torch.ones_like(v, requires_grad=True) * v for v in tensors_of(opt)],
    "dlpack": lambda opt: [torch.utils.dlpack.to_dlpack(v) for v in tensors_of(opt)],
}


@pytest.mark.parametrize("owner", OWNERS)
def test_what_somebody_else_sees_does_not_change_under_him(owner):
    params, opt, saved = trained()
    for own in saved["state"].values():
        own["exp_avg"] += 1
    held = OWNERS[owner](opt)
    addresses = addresses_of(opt)
    before = [leaf.clone() for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]
    opt.load_state_dict(saved)
    assert not set(addresses) & set(addresses_of(opt))
    after = [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]
    assert len(after) == len(before) and all(map(torch.equal, after, before))
    for p, own in zip(params, saved["state"].values(), strict=True):
        assert torch.equal(opt.state[p]["exp_avg"], own["exp_avg"])


def of_numpy(value):
    array = value.numpy().copy()
    return torch.from_numpy(array), lambda: torch.from_numpy(array.copy())


def of_shared_memory(value):
    shared = value.clone().share_memory_()
    return shared, lambda: None


def of_a_longer_one(value):
    longer = torch.cat([value.flatten(), value.flatten()])
    return longer[: value.numel()].view(value.shape), lambda: None


@pytest.mark.parametrize("source", [of_numpy, of_shared_memory, of_a_longer_one])
def test_memory_that_torch_did_not_allocate_for_it_is_not_reused(source):
    params, opt, saved = trained()
    value, read = source(opt.state[params[1]]["exp_avg"])
    opt.state[params[1]]["exp_avg"] = value
    address, before = value.data_ptr(), read()
    del value
    saved["state"][1]["exp_avg"] += 1
    opt.load_state_dict(saved)
    assert opt.state[params[1]]["exp_avg"].data_ptr() != address or source is of_a_longer_one
    assert opt.state[params[1]]["exp_avg"].untyped_storage().nbytes() == 4 * 37
    assert before is None or torch.equal(read(), before)


def test_one_tensor_for_two_states_is_taken_apart():
    params, opt, saved = trained()
    opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg_sq"]
    opt.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(opt.state[params[0]][name], saved["state"][0][name])


def test_states_exchanged_between_parameters():
    """The checkpoint is made of the optimizer's own tensors, in other places."""
    params, opt = make("adamw", params=[torch.nn.Parameter(torch.ones(7)) for _ in range(2)])
    run(params, opt, range(2))
    saved = opt.state_dict()
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    expected = copy.deepcopy(list(saved["state"].values()))
    opt.load_state_dict(saved)
    for p, own in zip(params, expected, strict=True):
        assert all(torch.equal(opt.state[p][k], v) for k, v in own.items())


def test_state_made_in_inference_mode_is_replaced():
    params, opt, saved = trained()
    with torch.inference_mode():
        opt.state[params[0]]["exp_avg"] = torch.zeros(5, 3)
        opt.load_state_dict(saved)
    run(params, opt, [2])
    assert not opt.state[params[0]]["exp_avg"].is_inference()


@pytest.mark.parametrize("after", [0, 3])
def test_no_memory_while_loading_changes_nothing(after, monkeypatch):
    _, opt, _ = trained("adamw", torch.bfloat16)
    source = make("adamw", torch.bfloat16)[1]
    source.init_state()
    saved, snapshot = source.state_dict(), opt.state_dict()  # somebody else sees it: no reuse
    before, left, real = [v.clone() for v in tensors_of(opt)], [after], torch.Tensor.resize_

    def no_memory(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("not enough memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "resize_", no_memory)
        with pytest.raises(RuntimeError, match="not enough memory"):
            opt.load_state_dict(saved)
    assert all(map(torch.equal, before, tensors_of(opt)))
    assert [*snapshot["state"].values()] == [*opt.state.values()]
    opt.load_state_dict(saved)


def test_loading_its_own_tensors_takes_no_memory():
    """torch.distributed.checkpoint reads a file into them, and then has them loaded."""
    params, opt = large()
    opt.init_state()
    saved, tensors = opt.state_dict(), tensors_of(opt)
    for value in tensors:
        value.fill_(3.0)
    peak, _ = traced(lambda: opt.load_state_dict(saved))
    assert peak <= 5000
    assert {id(v) for v in tensors if v.dim()} == {id(v) for v in tensors_of(opt) if v.dim()}
    for p in params:
        assert all(bool((value == 3.0).all()) for value in opt.state[p].values())
