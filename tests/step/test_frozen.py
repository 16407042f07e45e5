"""Frozen parameters without a gradient are left alone, whatever they are."""

import copy

import pytest
import torch
from protocol_helpers import fallback_is_expected, give_grads, on_every_backend

import fusedopt

pytestmark = [
    fallback_is_expected,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of layouts that torch calls new, or old
]
_every_backend = pytest.fixture(autouse=True)(on_every_backend)
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])


def frozen(data):
    return torch.nn.Parameter(data, requires_grad=False)


def freed():
    param = frozen(torch.ones(4))
    param.untyped_storage().resize_(0)
    return param


def two_tensor():
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    return frozen(two.TwoTensor(torch.ones(3), torch.ones(3)))


def quantized():
    if not hasattr(torch, "quantize_per_tensor"):
        pytest.skip("torch has no quantized tensors any more")
    return frozen(torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8))


class Packed(torch.nn.Parameter):
    """As bitsandbytes packs 4-bit weights: a subclass, with two numbers in a byte."""

    def __new__(cls):
        return torch.Tensor._make_subclass(cls, torch.zeros(8, 1, dtype=torch.uint8), False)


OVERLAPPING = torch.arange(20.0)
KINDS = {
    "uint8": lambda: frozen(torch.ones(3, dtype=torch.uint8)),
    "int8": lambda: frozen(torch.ones(3, dtype=torch.int8)),
    "int4-packed": Packed,
    "float8": lambda: frozen(torch.ones(3).to(torch.float8_e4m3fn)),
    "float64": lambda: frozen(torch.ones(3, dtype=torch.float64)),
    "complex": lambda: frozen(torch.ones(3, dtype=torch.complex64)),
    "sparse": lambda: frozen(torch.eye(3).to_sparse()),
    "sparse-csr": lambda: frozen(torch.eye(3).to_sparse_csr()),
    "nested": lambda: frozen(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])),
    "nested-jagged": lambda: frozen(
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    ),
    "quantized": quantized,
    "meta": lambda: frozen(torch.ones(3, device="meta")),
    "freed": freed,
    "zero-tensor": lambda: frozen(torch._efficientzerotensor(3)),
    "shared": lambda: frozen(OVERLAPPING[:12]),
    "shared-too": lambda: frozen(OVERLAPPING[11:]),
    "expanded": lambda: frozen(torch.ones(1).expand(5)),
    "lazy": lambda: torch.nn.parameter.UninitializedParameter(requires_grad=False),
    "two-tensor": two_tensor,
    "inference": lambda: frozen(torch.inference_mode()(torch.ones)(3)),
}


def trained(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(7, generator=generator))


@every_class
@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_left_alone(cls, kind):
    """First, in the middle and last; in the constructor, by add_param_group, in a checkpoint."""
    makers = KINDS.values() if kind == "all" else [KINDS[kind]]
    alone, p, q = (trained() for _ in range(3))
    odd = [make() for make in makers]
    opt = cls([*odd[:1], p, *odd[1:]], lr=0.1, max_grad_norm=1.0, **extra(cls))
    opt.add_param_group({"params": [make() for make in makers]})
    bare = cls([alone], lr=0.1, max_grad_norm=1.0, **extra(cls))
    for step in range(3):
        give_grads([p], step)
        give_grads([alone], step)
        opt.step()
        bare.step()
        opt.init_state()
        assert torch.equal(p, alone) and torch.equal(opt.grad_norm, bare.grad_norm)
    assert list(opt.state) == [p]
    assert opt.backend == bare.backend and "FusedOpt" not in str(opt)
    assert opt.memory_footprint()["exp_avg" if cls is fusedopt.FusedAdamW else "momentum_buffer"]
    again = cls([*odd[:1], q, *odd[1:]], lr=0.1, max_grad_norm=1.0, **extra(cls))
    again.add_param_group({"params": [make() for make in makers]})
    with torch.no_grad():
        q.copy_(p)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for optimizer, param in ((opt, p), (again, q)):
        give_grads([param], 7)
        optimizer.step()
    assert torch.equal(p, q)


def extra(cls):
    return {"momentum": 0.9} if cls is fusedopt.FusedSGD else {}


@pytest.mark.parametrize("kind", KINDS)
def test_param_groups_of_a_model_that_has_one(kind):
    model = torch.nn.Linear(2, 3)
    model.odd = KINDS[kind]()
    groups = fusedopt.param_groups(model, 0.1)
    assert sum(p is model.odd for group in groups for p in group["params"]) == 1
    opt = fusedopt.FusedAdamW(groups)
    give_grads([model.weight, model.bias], 0)
    opt.step()


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_a_time_when_it_was_trained(kind):
    """Weights are quantised after a first training, say: the checkpoint has their old state."""
    p, odd = trained(), KINDS[kind]()
    opt = fusedopt.FusedAdamW([p, odd])
    saved = opt.state_dict()
    moments = {name: torch.ones(3, 3) for name in ("exp_avg", "exp_avg_sq")}
    saved["state"] = {1: {"step": 3.0, **moments}}
    opt.load_state_dict(saved)
    give_grads([p], 0)
    opt.step()
    assert opt.state[odd]["exp_avg"].shape == (3, 3) and float(opt.state[p]["step"]) == 1


@every_class
def test_a_steady_step_builds_no_plan(cls):
    odd = [make() for make in KINDS.values()]
    p = trained()
    opt = cls([*odd, p])
    give_grads([p], 0)
    opt.step()
    plan = opt._shared.plan
    odd[0].data = torch.zeros(5, dtype=torch.uint8)  # nobody looks
    give_grads([p], 1)
    opt.step()
    assert opt._shared.plan is plan


@every_class
def test_thawed(cls):
    p, q = trained(0), trained(1)
    q.requires_grad_(False)
    opt = cls([p, q], lr=0.1, **extra(cls))
    before = q.detach().clone()
    give_grads([p], 0)
    opt.step()
    assert torch.equal(q, before) and q not in opt.state
    q.requires_grad_()
    give_grads([p, q], 1)
    opt.step()
    assert not torch.equal(q, before) and float(opt.state[q]["step"]) == 1
    q.grad = None
    q.requires_grad_(False)
    before = q.detach().clone()
    give_grads([p], 2)
    opt.step()
    assert torch.equal(q, before) and float(opt.state[q]["step"]) == 1


@every_class
@pytest.mark.parametrize("kind", ["float8", "complex", "shared", "expanded"])
def test_what_cannot_be_updated_is_refused_once_it_is_trained(cls, kind):
    p, odd = trained(), KINDS[kind]()
    shared = KINDS["shared-too"]().requires_grad_()
    opt = cls([p, odd, shared], lr=0.1)
    give_grads([p], 0)
    opt.step()
    before = p.detach().clone()
    odd.requires_grad_()
    odd.grad = torch.ones_like(odd)
    with pytest.raises(RuntimeError, match="param 1 of group 0"):
        opt.step()
    assert torch.equal(p, before)


@every_class
def test_on_another_device_than_the_trained(cls):
    """What is frozen has no say in where the step runs, or who serves."""
    p = trained()
    opt = cls([frozen(torch.ones(3, device="meta")), frozen(torch.ones(3).double()), p])
    give_grads([p], 0)
    opt.step()
    assert [*opt.backend] == ["cpu"] and opt._shared.scalars.device.type == "cpu"


@every_class
def test_all_frozen(cls):
    opt = cls([make() for make in KINDS.values()], max_grad_norm=1.0)
    opt.init_state()
    opt.step()
    assert not opt.state and float(opt.grad_norm) == 0.0
