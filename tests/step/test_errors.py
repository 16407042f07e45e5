"""Parameters: which are refused, in which words, and that nothing has moved; and which are left
alone: frozen ones without a gradient, whatever they are."""

import copy

import pytest
import torch
from protocol_helpers import every_class, fallback_is_expected, give_grads, on_every_backend, param

import fusedopt

pytestmark = [
    fallback_is_expected,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of layouts that torch calls new, or old
]
_every_backend = pytest.fixture(autouse=True)(on_every_backend)


# Types

REFUSED_DTYPES = [torch.complex64, torch.complex128, torch.int64, torch.int8, torch.bool]
REFUSED_DTYPES += [torch.float8_e4m3fn]


def assert_refused_as_a_parameter(cls, bad, words):
    with pytest.raises(TypeError, match=words):
        cls([param(2), bad])
    opt = cls([param(2)])
    with pytest.raises(TypeError, match=words):
        opt.add_param_group({"params": [param(4), bad]})
    assert len(opt.param_groups) == 1


@every_class
@pytest.mark.parametrize("dtype", REFUSED_DTYPES, ids=str)
def test_param_dtype(cls, dtype):
    bad = torch.zeros(3, dtype=dtype)
    good = param(2)
    opt = cls([good, bad])  # frozen: left alone
    if not (dtype.is_floating_point or dtype.is_complex):
        return
    bad.requires_grad_()
    good.grad, bad.grad = torch.ones(2), torch.ones_like(bad)
    with pytest.raises(RuntimeError, match=str(dtype)):
        opt.step()
    assert good.eq(1).all() and not opt.state
    assert_refused_as_a_parameter(cls, bad, str(dtype))


@every_class
def test_wrapper_subclass(cls):
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    bad = torch.nn.Parameter(two_tensor.TwoTensor(torch.ones(3), torch.ones(3)))
    assert_refused_as_a_parameter(cls, bad, "TwoTensor")

    class Marked(torch.nn.Parameter):
        """A subclass, and no wrapper."""

    p = Marked(torch.ones(3))
    p.grad = torch.ones(3)
    cls([p], lr=0.1).step()
    assert not p.eq(1).any()


@every_class
def test_dtensor(cls):
    dist = pytest.importorskip("torch.distributed")
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        assert_refused_as_a_parameter(cls, torch.nn.Parameter(partial), "partial sum")
        cls([whole], lr=0.1)
    finally:
        dist.destroy_process_group()


# Memory that is shared, and memory that only looks so

BUFFER = torch.arange(20.0)
SHARED = {
    "same": (BUFFER, BUFFER.view(-1)),
    "partly": (BUFFER[:12], BUFFER[11:]),
    "one-inside-the-other": (BUFFER, BUFFER[5:6]),
    "strided-over-dense": (BUFFER[::2], BUFFER[4:5]),
    "both-strided": (BUFFER[::2], BUFFER[::3]),
}
OVERLAPPING = [((4,), (0,)), ((3, 4), (0, 1)), ((5, 3), (1, 1)), ((3, 3), (2, 1))]
SHARED |= {f"itself-{s}": (torch.ones(2), BUFFER.as_strided(*s)) for s in OVERLAPPING}


@every_class
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("order", [1, -1])
def test_shared_memory_is_refused(cls, kind, order):
    params = [torch.nn.Parameter(v) for v in SHARED[kind][::order]]
    before = [p.detach().clone() for p in params]
    opt = cls(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(p.shape)
    with pytest.raises(RuntimeError, match="memory"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not opt.state


@every_class
@pytest.mark.parametrize("kind", ["columns", "even-odd", "neighbours", "empty"])
def test_memory_that_only_looks_shared_is_stepped(cls, kind):
    """Views of one buffer that have no element in common."""
    base = torch.ones(6, 8)
    views = {
        "columns": (base[:, :3], base[:, 3:]),
        "even-odd": (base.view(-1)[::2], base.view(-1)[1::2]),
        "neighbours": (base[:3], base[3:]),
        "empty": (base, base.view(-1)[5:5]),
    }[kind]
    params = [torch.nn.Parameter(v) for v in views]
    alone = [torch.nn.Parameter(v.clone()) for v in views]
    for group in (params, alone):
        opt = cls(group, lr=0.1)
        for step in range(2):
            give_grads(group, step)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))


# Served by nobody


@every_class
@pytest.mark.parametrize("stepped", [False, True])
def test_clipping_over_fsdp1_shards(cls, stepped):
    p, q = param(4), param(5)
    opt = cls([p, q], lr=0.1, max_grad_norm=None)
    p.grad, q.grad = torch.ones(4), torch.ones(5)
    q._fsdp_flattened = True
    if stepped:
        opt.step()
    opt.max_grad_norm = 1.0
    before = [p.detach().clone(), q.detach().clone()]
    with pytest.raises(RuntimeError, match="FSDP"):
        opt.step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])
    opt.max_grad_norm = None
    opt.step()
    assert not torch.equal(p, before[0])


def test_backend_by_name_that_cannot_serve():
    p = param(3, dtype=torch.float64)
    p.grad = torch.ones_like(p)
    opt = fusedopt.FusedAdamW([p], backend="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu'.*backend='reference'"):
        opt.step()
    assert p.eq(1).all() and not opt.state


# Frozen


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


def nested(**options):
    return frozen(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], **options))


class Packed(torch.nn.Parameter):
    """As bitsandbytes packs 4-bit weights: a subclass, with two numbers in a byte."""

    def __new__(cls):
        return torch.Tensor._make_subclass(cls, torch.zeros(8, 1, dtype=torch.uint8), False)


FROZEN = {
    "uint8": lambda: frozen(torch.ones(3, dtype=torch.uint8)),
    "int8": lambda: frozen(torch.ones(3, dtype=torch.int8)),
    "int4-packed": Packed,
    "float8": lambda: frozen(torch.ones(3).to(torch.float8_e4m3fn)),
    "float64": lambda: frozen(torch.ones(3, dtype=torch.float64)),
    "complex": lambda: frozen(torch.ones(3, dtype=torch.complex64)),
    "sparse": lambda: frozen(torch.eye(3).to_sparse()),
    "sparse-csr": lambda: frozen(torch.eye(3).to_sparse_csr()),
    "nested": nested,
    "nested-jagged": lambda: nested(layout=torch.jagged),
    "quantized": quantized,
    "meta": lambda: frozen(torch.ones(3, device="meta")),
    "freed": freed,
    "zero-tensor": lambda: frozen(torch._efficientzerotensor(3)),
    "shared": lambda: frozen(BUFFER[:12]),
    "shared-too": lambda: frozen(BUFFER[11:]),
    "expanded": lambda: frozen(torch.ones(1).expand(5)),
    "lazy": lambda: torch.nn.parameter.UninitializedParameter(requires_grad=False),
    "two-tensor": two_tensor,
    "inference": lambda: frozen(torch.inference_mode()(torch.ones)(3)),
}
MOMENTUM = {fusedopt.FusedAdamW: {}, fusedopt.FusedSGD: {"momentum": 0.9}}


@every_class
@pytest.mark.parametrize("kind", [*FROZEN, "all"])
def test_frozen_is_left_alone(cls, kind):
    """First, in the middle and last; in the constructor, by add_param_group, in a checkpoint."""
    makers = FROZEN.values() if kind == "all" else [FROZEN[kind]]
    alone, p, q = param(7), param(7), param(7)
    odd = [make() for make in makers]
    options = {"lr": 0.1, "max_grad_norm": 1.0, **MOMENTUM[cls]}
    opt, again = [cls([*odd[:1], one, *odd[1:]], **options) for one in (p, q)]
    for optimizer in (opt, again):
        optimizer.add_param_group({"params": [make() for make in makers]})
    bare = cls([alone], **options)
    plans = set()
    for step in range(3):
        for one, optimizer in ((p, opt), (alone, bare)):
            give_grads([one], step)
            optimizer.step()
        plans.add(opt._shared.plan)
        assert torch.equal(p, alone) and torch.equal(opt.grad_norm, bare.grad_norm)
    assert len(plans) == 1, "a steady step builds no plan"
    opt.init_state()
    assert list(opt.state) == [p]
    assert opt.backend == bare.backend and "FusedOpt" not in str(opt)
    assert opt.memory_footprint()["exp_avg" if cls is fusedopt.FusedAdamW else "momentum_buffer"]
    q.data.copy_(p)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, optimizer in ((p, opt), (q, again)):
        give_grads([one], 7)
        optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_in_a_model_that_was_trained(kind):
    """Weights are quantised after a first training, say: the checkpoint has their old state."""
    model = torch.nn.Linear(2, 3)
    model.odd = FROZEN[kind]()
    groups = fusedopt.param_groups(model, 0.1)
    order = [p for group in groups for p in group["params"]]
    (index,) = (i for i, p in enumerate(order) if p is model.odd)
    opt = fusedopt.FusedAdamW(groups)
    saved = opt.state_dict()
    moments = {name: torch.ones(3, 3) for name in ("exp_avg", "exp_avg_sq")}
    saved["state"] = {index: {"step": 3.0, **moments}}
    opt.load_state_dict(saved)
    give_grads([model.weight, model.bias], 0)
    opt.step()
    assert opt.state[model.odd]["exp_avg"].shape == (3, 3)
    assert float(opt.state[model.weight]["step"]) == 1


@every_class
def test_all_frozen(cls):
    opt = cls([make() for make in FROZEN.values()], max_grad_norm=1.0)
    opt.init_state()
    opt.step()
    assert not opt.state and float(opt.grad_norm) == 0.0


@every_class
@pytest.mark.parametrize("kind", ["float8", "complex", "shared", "expanded"])
def test_frozen_that_cannot_be_updated_is_refused_once_it_is_trained(cls, kind):
    p, odd = param(7), FROZEN[kind]()
    shared = FROZEN["shared-too"]().requires_grad_()
    opt = cls([p, odd, shared], lr=0.1)
    give_grads([p], 0)
    opt.step()
    before = p.detach().clone()
    odd.requires_grad_()
    odd.grad = torch.ones_like(odd)
    with pytest.raises(RuntimeError, match="param 1 of group 0"):
        opt.step()
    assert torch.equal(p, before)
