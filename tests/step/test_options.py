"""Arguments: which are taken, and of the refused ones type, words, and that nothing changed."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from protocol_helpers import INF, NAN, fallback_is_expected, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(*shape, dtype=dtype))


BAD_OPTIONS = [
    ("max_grad_norm", -1.0),
    ("max_grad_norm", NAN),
    ("norm_type", 1.0),
    ("norm_type", 3),
    ("norm_type", 0.0),
    ("norm_type", -INF),
    ("norm_type", NAN),
    ("max_grad_value", 0.0),
    ("max_grad_value", -2.0),
    ("max_grad_value", NAN),
    ("master_weights", "bf16"),
    ("master_weights", 2),
    ("backend", "gpu"),
    ("backend", ""),
    ("backend", ["cpu"]),
    # what Python, torch and numpy refuse in words of their own
    *(("max_grad_norm", value) for value in ("abc", [1], 1j, torch.ones(2), Fraction(10**400))),
    *(("norm_type", value) for value in ("two", None, torch.ones(2))),
    *(("max_grad_value", value) for value in ("x", torch.ones(2), np.ones(2))),
    *(("master_weights", value) for value in (torch.ones(2), np.ones(2))),
    *(("skip_nonfinite", value) for value in (torch.ones(2), np.ones(2), None)),
    *(("amp_scaling", value) for value in (torch.ones(2), np.ones(2))),
]


ASSIGNABLE = ("max_grad_norm", "norm_type", "max_grad_value")


def assert_names(error, name, value):
    """The argument, its value, and what to pass instead."""
    text = str(error)
    assert name in text
    assert repr(value) in text or (isinstance(value, int) and repr(float(value)) in text)
    rest = text.replace(name, "").replace(repr(value), "")
    assert any(word in rest for word in ("use ", "pass ", "must be ", "one of "))


@every_class
@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_option(cls, name, value):
    with pytest.raises(ValueError) as caught:
        cls([param(3)], **{name: value})
    assert_names(caught.value, name, value)


@every_class
@pytest.mark.parametrize("name, value", [case for case in BAD_OPTIONS if case[0] in ASSIGNABLE])
def test_bad_assignment_keeps_the_old_value(cls, name, value):
    opt = cls([param(3)], max_grad_norm=0.5, norm_type=INF, max_grad_value=0.25)
    before = getattr(opt, name)
    with pytest.raises(ValueError) as caught:
        setattr(opt, name, value)
    assert_names(caught.value, name, value)
    assert getattr(opt, name) == before


@every_class
def test_good_options_at_the_edge(cls):
    opt = cls([param(3)], max_grad_norm=0, norm_type=2, max_grad_value=1e-30, master_weights=True)
    assert (opt.max_grad_norm, opt.norm_type, opt.max_grad_value) == (0.0, 2.0, 1e-30)
    opt = cls([param(3)], max_grad_norm=INF, norm_type=INF, backend="auto", amp_scaling=False)
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    opt.step()
    assert float(opt.grad_norm) == 1.0


@every_class
@pytest.mark.parametrize("one", [np.float32(1), np.array(1), torch.ones(()), torch.ones(1)])
def test_options_that_are_equal_to_a_number_or_a_bool(cls, one):
    opt = cls([param(3)], max_grad_norm=one, norm_type=2 * one, max_grad_value=one)
    opt.skip_nonfinite, opt.amp_scaling = one, one - 1
    kept = opt.max_grad_norm, opt.norm_type, opt.max_grad_value, opt.skip_nonfinite, opt.amp_scaling
    assert repr(kept) == "(1.0, 2.0, 1.0, True, False)"


@every_class
@pytest.mark.parametrize("no", [False, 0, np.False_, torch.tensor(False)], ids=repr)
def test_every_form_of_no_masters(cls, no):
    p = param(3, dtype=torch.bfloat16)
    opt = cls([p], master_weights=no)
    opt.init_state()
    assert "master_param" not in opt.state.get(p, {})


@every_class
def test_max_grad_norm_of_zero_clips_everything(cls):
    p = param(5)
    opt = cls([p], lr=0.1, weight_decay=0.0, max_grad_norm=0.0)
    p.grad = torch.full((5,), 3.0)
    opt.step()
    assert torch.equal(p.detach(), torch.ones(5)) and float(opt.clip_coef) == 0.0


@every_class
def test_bad_environment(cls, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "nonsense")
    with pytest.raises(ValueError) as caught:
        cls([param(3)])
    assert_names(caught.value, "FUSEDOPT_BACKEND", "nonsense")


@every_class
def test_masters_can_be_given_up_and_taken_on(cls):
    p = param(3, dtype=torch.bfloat16)
    opt = cls([p], lr=0.1)
    for wanted in (None, False, True):
        opt.master_weights = wanted
        p.grad = torch.ones_like(p)
        opt.step()
        assert ("master_param" in opt.state[p]) == (wanted is not False)
        assert opt.master_weights is wanted
    with pytest.raises(AttributeError):
        opt.backend = "reference"


@every_class
def test_differentiable(cls):
    with pytest.raises(RuntimeError, match=r"differentiable=True .*torch\.optim"):
        cls([param(3)], differentiable=True)


@every_class
def test_differentiable_in_a_group(cls):
    words = r"param group 1: differentiable=True .*torch\.optim"
    with pytest.raises(RuntimeError, match=words):
        cls([{"params": [param(3)]}, {"params": [param(3)], "differentiable": True}])
    opt = cls([param(3)])
    with pytest.raises(RuntimeError, match=words):
        opt.add_param_group({"params": [param(4)], "differentiable": True})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [param(4)], "differentiable": False})


@every_class
def test_differentiable_in_a_checkpoint(cls):
    p = param(3)
    opt = cls([p], lr=0.1)
    p.grad = torch.ones(3)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(differentiable=True, lr=9.0)
    for state in saved["state"].values():
        state["step"] = 7
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match=r"state_dict: differentiable=True .*torch\.optim"):
        opt.load_state_dict(saved)
    assert str(opt.state_dict()) == str(before)


def test_positional_arguments_end_where_torchs_do():
    with pytest.raises(TypeError):
        fusedopt.FusedAdamW([param(3)], 1e-3, (0.9, 0.999), 1e-8, 0.0, False, True)
    with pytest.raises(TypeError):
        fusedopt.FusedSGD([param(3)], 1e-3, 0.0, 0.0, 0.0, False, True)
    with pytest.raises(TypeError, match="max_norm"):
        fusedopt.FusedSGD([param(3)], max_norm=1.0)
