"""Options of a param group: what is refused, when it is made, added, and edited between steps."""

import copy

import numpy as np
import pytest
import torch
from checkpoint_helpers import refused_load
from protocol_helpers import INF, NAN, fallback_is_expected, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(*shape, dtype=dtype))


GLOBAL_OPTIONS = {
    "max_grad_norm": 1.0,
    "norm_type": INF,
    "max_grad_value": 1.0,
    "master_weights": False,
    "skip_nonfinite": True,
    "amp_scaling": False,
    "backend": "reference",
}


@every_class
@pytest.mark.parametrize("name", GLOBAL_OPTIONS)
def test_global_option_in_a_group(cls, name):
    value = GLOBAL_OPTIONS[name]
    words = rf"{name}={value!r} in param group 0: it holds for all groups"
    with pytest.raises(ValueError, match=words):
        cls([{"params": [param(3)], name: value}])
    opt = cls([param(3)])
    before = copy.deepcopy(opt.param_groups)
    with pytest.raises(ValueError, match=name):
        opt.add_param_group({"params": [param(4)], name: value})
    assert len(opt.param_groups) == 1 and set(opt.param_groups[0]) == set(before[0])
    opt.param_groups[0][name] = value
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=words):
        opt.step()
    assert opt.param_groups[0]["params"][0].eq(1).all() and not opt.state


@every_class
@pytest.mark.parametrize("name", GLOBAL_OPTIONS)
def test_global_option_in_a_group_that_is_the_optimizers_own(cls, name):
    """Wrappers pass their keyword arguments to the class and into the groups, at any time."""
    value = GLOBAL_OPTIONS[name]
    p, q = param(3), param(4)
    opt = cls([{"params": [p], name: value}], **{name: value})
    opt.add_param_group({"params": [q], name: value})
    opt.param_groups[0][name] = value
    p.grad, q.grad = torch.ones(3), torch.ones(4)
    opt.step()
    assert not p.eq(1).any() and not q.eq(1).any()
    assert all(name not in group for group in opt.param_groups)
    if name != "backend":
        assert getattr(opt, name) == value


# Of length two, and of no order or not of numbers.
NO_PAIRS = [{0: 0.9, 1: 0.99}, {0.9: 0, 0.99: 0}, {"a": 0.9, "b": 0.99}, {0.9, 0.99}, "ab", b"ab"]
NO_PAIRS += [frozenset({0.9, 0.99}), {0.9: 0, 0.99: 0}.values(), torch.ones(2, 0)]
BAD_DEFAULTS = [("lr", NAN), ("lr", None), ("weight_decay", "0.1"), ("maximize", "yes")]
PAIRS = [(0.9, 0.99), [0.9, 0.99], np.array([0.9, 0.99]), torch.tensor([0.9, 0.99])]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization: its groups hold what belongs to the base optimizer, too."""

    def __init__(self, params, base, **kwargs):
        super().__init__(params, dict(rho=0.05, **kwargs))
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    def step(self):
        self.base.step()


@every_class
def test_sam_passes_its_arguments_to_groups(cls):
    p = param(3)
    opt = SAM([p], cls, lr=1.0, max_grad_norm=1.0, skip_nonfinite=True)
    p.grad = torch.full((3,), 10.0)
    opt.step()
    assert float(opt.base.clip_coef) == pytest.approx(1 / 300**0.5)


@every_class
def test_groups_are_checked_at_every_step(cls):
    p = param(3)
    opt = cls([{"params": [p]}])
    p.grad = torch.ones(3)
    numbers = {name: opt.param_groups[0][name] for name in cls.rule.number_keys}
    flags = {k: v for k, v in opt.param_groups[0].items() if k in cls.rule.flag_keys}
    for name, good in {**numbers, **flags}.items():
        bads = [None, "0.1", torch.ones(3), NAN if name in numbers else 2]
        bads += [(0.9,), (0.9, 0.9, 0.9), (0.9, None), (0.9, "0.9"), (NAN, 0.9), *NO_PAIRS]
        for bad in bads:
            opt.param_groups[0][name] = bad
            for call in (opt.step, opt.init_state):
                words = rf"Invalid {name} value: .* in param group 0"
                with pytest.raises(RuntimeError, match=words):
                    call()
        del opt.param_groups[0][name]
        with pytest.raises(RuntimeError, match=f"param group 0 has no option '{name}'"):
            opt.step()
        opt.param_groups[0][name] = good
    assert p.eq(1).all() and not opt.state
    opt.param_groups[0]["differentiable"] = True
    with pytest.raises(RuntimeError, match="param group 0: differentiable=True"):
        opt.step()
    opt.param_groups[0]["differentiable"] = False
    opt.step()
    assert not p.eq(1).any()


@every_class
def test_arguments_that_are_no_numbers(cls):
    """torch compares them with a number, or lets them pass; in a group it never looks."""
    pair = (0.9, 0.999)
    for name in cls.rule.number_keys:
        bads = [None, "x", "0.1", NAN, torch.tensor(NAN)]
        bads += [(0.9,), (*pair, 0.9), (0.9, None), (0.9, NAN)] if name == "betas" else [pair]
        bads += [(torch.ones(2), 0.9), (0.9, torch.ones(2)), *NO_PAIRS] if name == "betas" else []
        for bad in bads:
            with pytest.raises(
                ValueError, match={"lr": "lr|learning rate", "betas": "beta"}.get(name, name)
            ):
                cls([param(3)], **{name: bad})
            with pytest.raises(ValueError, match=rf"Invalid {name} value: .* in param group 1"):
                cls([{"params": [param(3)]}, {"params": [param(3)], name: bad}])
            opt = cls([param(3)])
            with pytest.raises(ValueError, match=rf"Invalid {name} value: .* in param group 1"):
                opt.add_param_group({"params": [param(3)], name: bad})
            assert len(opt.param_groups) == 1
    for name in cls.rule.flag_keys:
        with pytest.raises(ValueError, match=f"Invalid {name} value: 'yes'"):
            momentum = {"momentum": 0.9} if name == "nesterov" else {}
            cls([param(3)], **momentum, **{name: "yes"})


@every_class
@pytest.mark.parametrize("edit", [("differentiable", True), ("max_grad_norm", 1.0), *BAD_DEFAULTS])
def test_a_group_is_refused_for_what_edited_defaults_add_to_it(cls, edit):
    name, bad = edit
    opt = cls([param(3)])
    good = opt.defaults.get(name)
    opt.defaults[name] = bad
    group = {"params": [param(3)]}
    error = RuntimeError if name == "differentiable" else ValueError
    with pytest.raises(error, match=f"{name}.*param group 1|param group 1: {name}"):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1 and group.keys() == {"params"}
    opt.add_param_group({**group, name: good})


@every_class
def test_a_group_may_differ_from_edited_defaults(cls):
    opt = cls([param(3)], max_grad_norm=1.0)
    opt.defaults.update(lr=None, max_grad_norm=1.0)
    opt.add_param_group({"params": [param(3)], "lr": 0.5})
    for group in opt.param_groups:
        group["params"][0].grad = torch.ones(3)
    opt.step()
    assert opt.param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize("betas", NO_PAIRS, ids=repr)
def test_what_is_no_pair_is_refused_in_a_checkpoint(betas):
    params = [param(3)]
    opt = fusedopt.FusedAdamW(params)
    saved = opt.state_dict()
    saved["param_groups"][0]["betas"] = betas
    refused_load(opt, params, saved, ValueError, r"Invalid betas value: .* in param group 0 of the")


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
def test_a_parameter_twice_in_a_group(cls, recwarn):
    p, q = param(3), param(4)
    for group in ([p, q, p], [("a", p), ("b", q), ("a2", p)], {"params": [p, q, p]}):
        group = [group] if isinstance(group, dict) else group
        with pytest.raises(ValueError, match="param 2 of param group 0 is param 0 again"):
            cls(group)
    opt = cls(iter([p]))
    with pytest.raises(ValueError, match="param 1 of param group 1 is param 0 again"):
        opt.add_param_group({"params": iter([q, q])})
    assert len(opt.param_groups) == 1 and not recwarn.list
    opt.add_param_group({"params": iter([q])})


@every_class
@pytest.mark.parametrize("value", [np.True_, np.False_, 1, 0, 1.0, -0.0, np.float64(1)], ids=repr)
def test_a_flag_may_be_whatever_is_equal_to_true_or_false(cls, value):
    """As with torch; only then is it the same step as with True and False themselves."""
    results = []
    for maximize in (value, bool(value)):
        p = param(3)
        opt = cls([p], lr=0.5)
        opt.param_groups[0]["maximize"] = maximize
        p.grad = torch.ones(3)
        opt.step()
        results.append(p)
    assert torch.equal(*results) and not results[0].eq(1).any()
