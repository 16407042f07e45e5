"""Refused parameters and memory: type, words, and that nothing has moved."""

import pytest
import torch
from protocol_helpers import fallback_is_expected, give_grads, on_every_backend

import fusedopt

pytestmark = fallback_is_expected
_every_backend = pytest.fixture(autouse=True)(on_every_backend)
every_class = pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(*shape, dtype=dtype))


# Parameters

REFUSED_DTYPES = [torch.complex64, torch.complex128, torch.int64, torch.int8, torch.bool]
REFUSED_DTYPES += [torch.float8_e4m3fn]


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
    with pytest.raises(TypeError, match=str(dtype)):
        cls([param(2), bad])
    opt = cls([param(2)])
    with pytest.raises(TypeError, match=str(dtype)):
        opt.add_param_group({"params": [param(4), bad]})
    assert len(opt.param_groups) == 1


@every_class
def test_wrapper_subclass(cls):
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    bad = torch.nn.Parameter(two_tensor.TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(TypeError, match="TwoTensor"):
        cls([bad])


@every_class
def test_dtensor(cls):
    dist = pytest.importorskip("torch.distributed")
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        bad = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        with pytest.raises(TypeError, match="DTensor"):
            cls([param(2), bad])
        opt = cls([param(2)])
        with pytest.raises(TypeError, match="DTensor"):
            opt.add_param_group({"params": bad})
        assert len(opt.param_groups) == 1
    finally:
        dist.destroy_process_group()


@every_class
def test_plain_subclass_is_no_wrapper(cls):
    class Marked(torch.nn.Parameter):
        pass

    p = Marked(torch.ones(3))
    opt = cls([p], lr=0.1)
    p.grad = torch.ones(3)
    opt.step()
    assert not torch.equal(p.detach(), torch.ones(3))


# Memory that is shared, and memory that only looks so


def shared_pair(kind):
    base = torch.arange(20.0)
    if kind == "same":
        return base.view(-1), base.view(-1)
    if kind == "partly":
        return base[:12], base[11:]
    if kind == "one-inside-the-other":
        return base, base[5:6]
    if kind == "strided-over-dense":
        return base[::2], base[4:5]
    return base[::2], base[::3]


@every_class
@pytest.mark.parametrize(
    "kind", ["same", "partly", "one-inside-the-other", "strided-over-dense", "both-strided"]
)
@pytest.mark.parametrize("swap", [False, True])
def test_shared_memory_is_refused(cls, kind, swap):
    params = [torch.nn.Parameter(v) for v in shared_pair(kind)]
    params = params[::-1] if swap else params
    before = [p.detach().clone() for p in params]
    opt = cls(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(p.shape)
    with pytest.raises(RuntimeError, match="memory"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not opt.state


@every_class
@pytest.mark.parametrize(
    "shape, stride", [((4,), (0,)), ((3, 4), (0, 1)), ((5, 3), (1, 1)), ((3, 3), (2, 1))]
)
def test_param_that_overlaps_itself_is_refused(cls, shape, stride):
    p = torch.nn.Parameter(torch.zeros(20).as_strided(shape, stride))
    p.grad = torch.ones(shape)
    opt = cls([param(2), p], lr=0.1)
    with pytest.raises(RuntimeError, match="memory"):
        opt.step()
    assert not p.any()


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
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)


@every_class
def test_tied_parameter_object_is_stepped_once(cls):
    """The same object in two modules reaches the optimizer once, through model.parameters()."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    opt = cls(model.parameters(), lr=0.1)
    give_grads(list(model.parameters()), 0)
    opt.step()
    assert len(opt.param_groups[0]["params"]) == 3


# Sharded by FSDP1


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
    assert torch.equal(p.detach(), before[0]) and torch.equal(q.detach(), before[1])
    opt.max_grad_norm = None
    opt.step()
    assert not torch.equal(p.detach(), before[0])


# A backend that cannot serve


def test_backend_by_name_that_cannot_serve():
    p = param(3, dtype=torch.float64)
    p.grad = torch.ones_like(p)
    opt = fusedopt.FusedAdamW([p], backend="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu'.*backend='reference'"):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3, dtype=torch.float64)) and not opt.state


def test_meta_parameters_are_refused_until_materialized():
    model = torch.nn.Linear(3, 2, device="meta")
    opt = fusedopt.FusedAdamW(model.parameters())
    with pytest.raises((RuntimeError, TypeError), match="meta"):
        opt.init_state()
    assert not opt.state
