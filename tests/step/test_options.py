"""Options of an optimizer and of a group: which are taken, which refused, in which words, when."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from checkpoint_helpers import refused_load
from protocol_helpers import (
    INF,
    NAN,
    every_class,
    fallback_is_expected,
    on_every_backend,
    param,
)

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


def step_with_ones(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


# Of the whole optimizer

BAD_OPTIONS = {
    "max_grad_norm": [-1.0, NAN, "abc", [1], 1j, torch.ones(2), Fraction(10**400)],
    "norm_type": [1.0, 3, 0.0, -INF, NAN, "two", None, torch.ones(2)],
    "max_grad_value": [0.0, -2.0, NAN, "x", torch.ones(2), np.ones(2)],
    "master_weights": ["bf16", 2, torch.ones(2), np.ones(2)],
    "skip_nonfinite": [torch.ones(2), np.ones(2), None],
    "amp_scaling": [torch.ones(2), np.ones(2)],
    "backend": ["gpu", "", ["cpu"]],
    "norm_bits": ["Exact", "", 53, True, ["exact"], torch.ones(2)],
}


def assert_refused(name, value, call):
    """With the argument, its value, and what to pass instead."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert name in text
    assert repr(value) in text or (isinstance(value, int) and repr(float(value)) in text)
    rest = text.replace(name, "").replace(repr(value), "")
    assert any(word in rest for word in ("use ", "pass ", "must be ", "one of "))


@every_class
@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option(cls, name):
    opt = cls([param(3)], max_grad_norm=0.5, norm_type=INF, max_grad_value=0.25)
    before = getattr(opt, name)
    for value in BAD_OPTIONS[name]:
        assert_refused(name, value, lambda value=value: cls([param(3)], **{name: value}))
        if name in ("max_grad_norm", "norm_type", "max_grad_value", "norm_bits"):
            assert_refused(name, value, lambda value=value: setattr(opt, name, value))
            assert getattr(opt, name) == before


@every_class
def test_bad_environment(cls, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "nonsense")
    assert_refused("FUSEDOPT_BACKEND", "nonsense", lambda: cls([param(3)]))


@every_class
def test_good_options_at_the_edge(cls):
    opt = cls([param(3)], max_grad_norm=0, norm_type=2, max_grad_value=1e-30, master_weights=True)
    assert (opt.max_grad_norm, opt.norm_type, opt.max_grad_value) == (0.0, 2.0, 1e-30)
    opt = cls([param(3)], max_grad_norm=INF, norm_type=INF, backend="auto", amp_scaling=False)
    step_with_ones(opt)
    assert float(opt.grad_norm) == 1.0


@every_class
@pytest.mark.parametrize("one", [np.float32(1), np.array(1), torch.ones(()), torch.ones(1)])
def test_options_that_are_equal_to_a_number_or_a_bool(cls, one):
    opt = cls([param(3)], max_grad_norm=one, norm_type=2 * one, max_grad_value=one)
    opt.skip_nonfinite, opt.amp_scaling = one, one - 1
    kept = opt.max_grad_norm, opt.norm_type, opt.max_grad_value, opt.skip_nonfinite, opt.amp_scaling
    assert repr(kept) == "(1.0, 2.0, 1.0, True, False)"


@every_class
def test_masters_can_be_given_up_and_taken_on(cls):
    p = param(3, dtype=torch.bfloat16)
    opt = cls([p], lr=0.1)
    for wanted in (None, False, True, 0, np.False_, torch.tensor(False)):
        opt.master_weights = wanted
        step_with_ones(opt)
        assert ("master_param" in opt.state[p]) == (wanted in (None, True))
        assert opt.master_weights is (None if wanted is None else bool(wanted))
    with pytest.raises(AttributeError):
        opt.backend = "reference"


@every_class
def test_differentiable(cls):
    with pytest.raises(RuntimeError, match=r"differentiable=True .*torch\.optim"):
        cls([param(3)], differentiable=True)
    words = r"param group 1: differentiable=True .*torch\.optim"
    with pytest.raises(RuntimeError, match=words):
        cls([{"params": [param(3)]}, {"params": [param(3)], "differentiable": True}])
    params = [param(3)]
    opt = cls(params, lr=0.1)
    with pytest.raises(RuntimeError, match=words):
        opt.add_param_group({"params": [param(4)], "differentiable": True})
    assert len(opt.param_groups) == 1
    step_with_ones(opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(differentiable=True, lr=9.0)
    for state in saved["state"].values():
        state["step"] = 7
    refused_load(opt, params, saved, RuntimeError, r"state_dict: differentiable=True .*torch\.opt")
    opt.add_param_group({"params": [param(4)], "differentiable": False})


# Of the whole optimizer, in a group

GLOBAL_OPTIONS = {
    "max_grad_norm": 1.0,
    "norm_type": INF,
    "max_grad_value": 1.0,
    "master_weights": False,
    "skip_nonfinite": True,
    "amp_scaling": False,
    "backend": "reference",
    "norm_bits": "exact",
}


@every_class
@pytest.mark.parametrize("name", GLOBAL_OPTIONS)
def test_global_option_in_a_group(cls, name):
    value = GLOBAL_OPTIONS[name]
    words = rf"{name}={value!r} in param group 0: it holds for all groups"
    with pytest.raises(ValueError, match=words):
        cls([{"params": [param(3)], name: value}])
    p = param(3)
    opt = cls([p])
    before = opt.param_groups[0].keys()
    with pytest.raises(ValueError, match=name):
        opt.add_param_group({"params": [param(4)], name: value})
    assert len(opt.param_groups) == 1 and opt.param_groups[0].keys() == before
    opt.param_groups[0][name] = value
    with pytest.raises(RuntimeError, match=words):
        step_with_ones(opt)
    assert p.eq(1).all() and not opt.state


@every_class
@pytest.mark.parametrize("name", GLOBAL_OPTIONS)
def test_global_option_in_a_group_that_is_the_optimizers_own(cls, name):
    """Wrappers (SAM's) pass their keyword arguments to the class and into the groups, any time."""
    value = GLOBAL_OPTIONS[name]
    p, q = param(3), param(4)
    opt = cls([{"params": [p], name: value}], **{name: value})
    opt.add_param_group({"params": [q], name: value})
    opt.param_groups[0][name] = value
    step_with_ones(opt)
    assert not p.eq(1).any() and not q.eq(1).any()
    assert all(name not in group for group in opt.param_groups)
    if name != "backend":
        assert getattr(opt, name) == value


# Of a group

# Of length two, and of no order or not of numbers.
NO_PAIRS = [{0: 0.9, 1: 0.99}, {0.9: 0, 0.99: 0}, {"a": 0.9, "b": 0.99}, {0.9, 0.99}, "ab", b"ab"]
NO_PAIRS += [frozenset({0.9, 0.99}), {0.9: 0, 0.99: 0}.values(), torch.ones(2, 0)]
NO_BETAS = [(0.9,), (0.9, 0.9, 0.9), (0.9, None), (0.9, "0.9"), (0.9, NAN), (NAN, 0.9)]
NO_BETAS += [(torch.ones(2), 0.9), (0.9, torch.ones(2)), *NO_PAIRS]
NO_NUMBERS = [None, "x", "0.1", NAN, torch.tensor(NAN)]


@every_class
def test_arguments_that_are_no_numbers(cls):
    """torch compares them with a number, or lets them pass; in a group it never looks."""
    words = {"lr": "lr|learning rate", "betas": "beta"}
    for name in cls.rule.number_keys:
        in_a_group = rf"Invalid {name} value: .* in param group 1"
        for bad in (*NO_NUMBERS, *(NO_BETAS if name == "betas" else [(0.9, 0.999)])):
            with pytest.raises(ValueError, match=words.get(name, name)):
                cls([param(3)], **{name: bad})
            with pytest.raises(ValueError, match=in_a_group):
                cls([{"params": [param(3)]}, {"params": [param(3)], name: bad}])
            opt = cls([param(3)])
            with pytest.raises(ValueError, match=in_a_group):
                opt.add_param_group({"params": [param(3)], name: bad})
            assert len(opt.param_groups) == 1
    for name in cls.rule.flag_keys:
        momentum = {"momentum": 0.9} if name == "nesterov" else {}
        with pytest.raises(ValueError, match=f"Invalid {name} value: 'yes'"):
            cls([param(3)], **momentum, **{name: "yes"})


@every_class
def test_groups_are_checked_at_every_step(cls):
    p = param(3)
    opt = cls([{"params": [p]}])
    group = opt.param_groups[0]
    p.grad = torch.ones(3)
    for name in (*cls.rule.number_keys, *(k for k in group if k in cls.rule.flag_keys)):
        good = group[name]
        no_value = NAN if name in cls.rule.number_keys else 2
        for bad in (None, "0.1", torch.ones(3), no_value, *NO_BETAS):
            group[name] = bad
            for call in (opt.step, opt.init_state):
                words = rf"Invalid {name} value: .* in param group 0"
                with pytest.raises(RuntimeError, match=words):
                    call()
        del group[name]
        with pytest.raises(RuntimeError, match=f"param group 0 has no option '{name}'"):
            opt.step()
        group[name] = good
    group["differentiable"] = True
    with pytest.raises(RuntimeError, match="param group 0: differentiable=True"):
        opt.step()
    assert p.eq(1).all() and not opt.state
    group["differentiable"] = False
    opt.step()
    assert not p.eq(1).any()


BAD_DEFAULTS = {"lr": None, "weight_decay": "0.1", "maximize": "yes"}
BAD_DEFAULTS |= {"differentiable": True, "max_grad_norm": 1.0}


@every_class
@pytest.mark.parametrize("name", BAD_DEFAULTS)
def test_a_group_is_refused_for_what_edited_defaults_add_to_it(cls, name):
    opt = cls([param(3)])
    good = opt.defaults.get(name)
    opt.defaults[name] = BAD_DEFAULTS[name]
    group = {"params": [param(3)]}
    error = RuntimeError if name == "differentiable" else ValueError
    with pytest.raises(error, match=f"{name}.*param group 1|param group 1: {name}"):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1 and group.keys() == {"params"}
    opt.add_param_group({**group, name: good})  # its own value overrules the default


def test_what_is_no_pair_is_refused_in_a_checkpoint():
    params = [param(3)]
    opt = fusedopt.FusedAdamW(params)
    for betas in NO_PAIRS:
        saved = opt.state_dict()
        saved["param_groups"][0]["betas"] = betas
        words = r"Invalid betas value: .* in param group 0 of the"
        refused_load(opt, params, saved, ValueError, words)


PAIRS = [(0.9, 0.99), [0.9, 0.99], np.array([0.9, 0.99]), torch.tensor([0.9, 0.99])]


@pytest.mark.parametrize("betas", PAIRS, ids=repr)
def test_pairs_that_torch_takes(betas):
    results = []
    for cls in (fusedopt.FusedAdamW, torch.optim.AdamW):
        p = param(3)
        opt = cls([p], lr=0.1, betas=betas)
        for grad in (1.0, -0.5):
            p.grad = torch.full((3,), grad)
            opt.step()
        opt.load_state_dict(opt.state_dict())
        results.append(p.detach())
    torch.testing.assert_close(*results)


@every_class
@pytest.mark.parametrize("value", [np.True_, np.False_, 1, 0, 1.0, -0.0, np.float64(1)], ids=repr)
def test_a_flag_may_be_whatever_is_equal_to_true_or_false(cls, value):
    """As with torch; only then is it the same step as with True and False themselves."""
    results = []
    for maximize in (value, bool(value)):
        p = param(3)
        opt = cls([p], lr=0.5)
        opt.param_groups[0]["maximize"] = maximize
        step_with_ones(opt)
        results.append(p)
    assert torch.equal(*results) and not results[0].eq(1).any()


@every_class
def test_a_parameter_twice_in_a_group(cls, recwarn):
    p, q = param(3), param(4)
    for group in ([p, q, p], [("a", p), ("b", q), ("a2", p)], [{"params": [p, q, p]}]):
        with pytest.raises(ValueError, match="param 2 of param group 0 is param 0 again"):
            cls(group)
    opt = cls(iter([p]))
    with pytest.raises(ValueError, match="param 1 of param group 1 is param 0 again"):
        opt.add_param_group({"params": iter([q, q])})
    assert len(opt.param_groups) == 1 and not recwarn.list
    opt.add_param_group({"params": iter([q])})
