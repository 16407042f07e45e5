"""What loading a checkpoint does to param groups: the decay of torch's SGD, and names."""

import copy
import warnings

import pytest
import torch
from checkpoint_helpers import make, make_params, refused_load, remedy_in, run, run_all
from protocol_helpers import fallback_is_expected, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Decay of torch's SGD

DECAYING = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def torch_sgd_checkpoint(**kwargs):
    params = make_params()
    opt = torch.optim.SGD(params, **{**DECAYING, **kwargs})
    run(params, opt, range(2))
    return copy.deepcopy(opt.state_dict())


def test_coupled_decay_that_would_become_decoupled_is_warned_of():
    saved = torch_sgd_checkpoint()
    _, opt = make("sgd")
    with pytest.warns(UserWarning, match="decoupled_weight_decay=False") as warned:
        opt.load_state_dict(saved)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert "weight_decay=0.0005" in str(warned[0].message)
    exec(remedy_in(str(warned[0].message)), {"state_dict": saved})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)


@pytest.mark.filterwarnings("error")
def test_no_warning_where_nothing_changes():
    make("sgd", decoupled_weight_decay=False)[1].load_state_dict(torch_sgd_checkpoint())
    for same in ({"weight_decay": 0}, {"momentum": 0}):
        make("sgd")[1].load_state_dict(torch_sgd_checkpoint(**same))
    opt = make("sgd")[1]
    make("sgd")[1].load_state_dict(opt.state_dict())
    saved = torch_sgd_checkpoint()
    saved["param_groups"][0]["decoupled_weight_decay"] = True
    opt.load_state_dict(saved)


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_changes_nothing():
    params, opt = make("sgd")
    run(params, opt, range(1))
    refused_load(opt, params, torch_sgd_checkpoint(), UserWarning, "no decoupled_weight_decay")


@pytest.mark.parametrize("decoupled, left", [(True, 0.9950), (False, 0.9553)])
def test_how_much_weaker_decoupled_decay_is(decoupled, left):
    """What docs/differences.md says: after 100 steps of decay alone."""
    param = torch.nn.Parameter(torch.ones(()))
    opt = fusedopt.FusedSGD([param], **DECAYING, decoupled_weight_decay=decoupled)
    for _ in range(100):
        param.grad = torch.zeros(())
        opt.step()
    assert param.item() == pytest.approx(left, abs=5e-5)


# Names


def named(params, names, **options):
    return fusedopt.FusedAdamW(list(zip(names, params, strict=True)), **options)


@pytest.mark.parametrize("copier", [lambda opt: opt, copy.deepcopy])
@pytest.mark.parametrize("saved_names", [["b", "a"], None])
def test_errors_name_the_parameter_and_not_the_checkpoints(saved_names, copier):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = named(params, ["a", "b"])
    others = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    theirs = named(others, saved_names) if saved_names else fusedopt.FusedAdamW(others)
    run_all(theirs)
    for _ in range(2):
        opt.load_state_dict(theirs.state_dict())
    opt = copier(opt)
    assert opt.param_groups[0]["param_names"] == (saved_names or ["a", "b"])  # as in torch
    opt.param_groups[0]["params"][1].grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"param 1 of group 0 \('b'\)"):
        opt.step()


def test_an_optimizer_without_names_takes_none_from_a_checkpoint():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    theirs, opt = named(params, ["a", "b"]), fusedopt.FusedAdamW(params)
    opt.load_state_dict(theirs.state_dict())
    params[1].grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"param 1 of group 0: "):
        opt.step()
