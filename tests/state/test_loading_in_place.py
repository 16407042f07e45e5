"""Loading writes to the optimizer's own tensors, where nobody else sees them."""

import copy

import pytest
import torch
from checkpoint_helpers import assert_same_bits, clone_params, make, run
from protocol_helpers import fallback_is_expected, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def addresses_of(opt):
    return {
        (p, k): v.data_ptr() for p, own in opt.state.items() for k, v in own.items() if v.dim() > 0
    }


def owner_of_the_dict(opt, param):
    return opt.state_dict()


def owner_of_all_state(opt, param):
    return opt.state


def owner_of_the_tensors(opt, param):
    return [v for own in opt.state.values() for v in own.values()]


def owner_of_an_alias(opt, param):
    return [v.detach() for own in opt.state.values() for v in own.values()]


def owner_of_a_part(opt, param):
    return [v[:1] for own in opt.state.values() for v in own.values() if v.dim()]


def owner_of_the_storage(opt, param):
    return [v.untyped_storage() for own in opt.state.values() for v in own.values()]


def owner_of_an_array(opt, param):
    return [v.numpy() for own in opt.state.values() for v in own.values()]


def owner_behind_dlpack(opt, param):
    return [torch.utils.dlpack.to_dlpack(v) for own in opt.state.values() for v in own.values()]


OWNERS = [owner_of_the_dict, owner_of_all_state, owner_of_the_tensors, owner_of_an_alias]
OWNERS += [owner_of_a_part, owner_of_the_storage, owner_of_an_array, owner_behind_dlpack]


@pytest.mark.parametrize("owner", OWNERS, ids=lambda f: f.__name__)
def test_what_somebody_else_sees_does_not_change_under_him(owner):
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    for own in saved["state"].values():
        own["exp_avg"] += 1
    held = owner(opt, params[0])
    addresses, before = addresses_of(opt), values_of(opt)
    opt.load_state_dict(saved)
    assert not set(addresses.values()) & set(addresses_of(opt).values())
    if owner in (owner_of_the_dict, owner_of_all_state):
        own_of_all = held["state"] if owner is owner_of_the_dict else held
        held = [v for own in own_of_all.values() for v in own.values()]
    if owner in (owner_of_the_dict, owner_of_all_state, owner_of_the_tensors, owner_of_an_alias):
        assert len(held) == len(before) and all(map(torch.equal, held, before))
    for p, own in zip(params, saved["state"].values(), strict=True):
        assert torch.equal(opt.state[p]["exp_avg"], own["exp_avg"])


def values_of(opt):
    return [v.clone() for own in opt.state.values() for v in own.values()]


def test_a_state_saved_for_backward_is_left_alone():
    params, opt = make("adamw")
    run(params, opt, range(2))
    weight = torch.ones(5, 3, requires_grad=True)
    loss = (weight * opt.state[params[0]]["exp_avg"]).sum()
    expected = opt.state[params[0]]["exp_avg"].clone()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] += 1
    opt.load_state_dict(saved)
    loss.backward()
    assert torch.equal(weight.grad, expected)


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
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
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
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg_sq"]
    opt.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(opt.state[params[0]][name], saved["state"][0][name])


def test_states_exchanged_between_parameters():
    """The checkpoint is made of the optimizer's own tensors, in other places."""
    params = [torch.nn.Parameter(torch.ones(7) * i) for i in range(2)]
    opt = fusedopt.FusedAdamW(params)
    run_pair = [torch.ones(7), torch.full((7,), 2.0)]
    for p, grad in zip(params, run_pair, strict=True):
        p.grad = grad
    opt.step()
    saved = opt.state_dict()
    expected = copy.deepcopy([saved["state"][1], saved["state"][0]])
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    opt.load_state_dict(saved)
    for p, own in zip(params, expected, strict=True):
        assert all(torch.equal(opt.state[p][k], v) for k, v in own.items())


def test_loading_over_a_run_continues_as_a_fresh_one():
    (params, opt), (other, other_opt) = make("adamw", torch.bfloat16), make("adamw", torch.bfloat16)
    run(params, opt, range(3))
    run(other, other_opt, range(5, 9))
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            q.copy_(p)
    other_opt.load_state_dict(opt.state_dict())
    fresh = clone_params(params)
    _, fresh_opt = make("adamw", params=fresh)
    fresh_opt.load_state_dict(opt.state_dict())
    for p, o in ((params, opt), (other, other_opt), (fresh, fresh_opt)):
        run(p, o, range(3, 6))
    assert_same_bits((params, opt), (other, other_opt))
    assert_same_bits((params, opt), (fresh, fresh_opt))


def test_state_made_in_inference_mode_is_replaced():
    params, opt = make("adamw")
    run(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    with torch.inference_mode():
        opt.state[params[0]]["exp_avg"] = torch.zeros(5, 3)
        opt.load_state_dict(saved)
    run(params, opt, [2])
    assert not opt.state[params[0]]["exp_avg"].is_inference()


@pytest.mark.parametrize("after", [0, 3])
def test_no_memory_while_loading_changes_nothing(after, monkeypatch):
    params, opt = make("adamw", torch.bfloat16)
    run(params, opt, range(2))
    source = make("adamw", torch.bfloat16)[1]
    source.init_state()
    saved, snapshot = source.state_dict(), opt.state_dict()  # somebody else sees it: no reuse
    before, left, real = values_of(opt), [after], torch.Tensor.resize_

    def no_memory(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("not enough memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "resize_", no_memory)
        with pytest.raises(RuntimeError, match="not enough memory"):
            opt.load_state_dict(saved)
    assert all(map(torch.equal, before, values_of(opt)))
    assert [*snapshot["state"].values()] == [*opt.state.values()]
    opt.load_state_dict(saved)
