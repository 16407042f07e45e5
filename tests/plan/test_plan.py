"""The plan: when it is kept and when rebuilt, and what its tables hold."""

import gc
import struct
import weakref
from types import SimpleNamespace

import pytest
import torch
from cases import transposed
from harness import randn
from protocol_helpers import build

import fusedopt
from fusedopt.backends import registry


def give_grads(params, step):
    for i, p in enumerate(params):
        p.grad = randn(tuple(p.shape), 1000 * step + i, p.dtype)


# When the plan is rebuilt


def fresh(backend, **options):
    params = [torch.nn.Parameter(randn(s, i)) for i, s in enumerate([(5, 3), (40,), ()])]
    opt = build(True, "sgd", params, backend=backend, dampening=0, **options)
    for step in range(2):
        give_grads(params, step)
        opt.step()
    return params, opt


def kept(params, opt):
    """What a plan goes on with, one after the other."""
    group, state = opt.param_groups[0], opt.state[params[0]]
    give_grads(params, 5)
    yield "new gradients"
    params[1].grad = None
    yield "no gradient of one"
    opt.zero_grad()
    yield "no gradients"
    give_grads(params, 6)
    params[0].grad = transposed(params[0].grad)
    yield "another layout of a gradient"
    group.update(lr=0.3, weight_decay=0.0, momentum=0.5, maximize=True, nesterov=True)
    yield "hyper-parameters"
    opt.max_grad_norm, opt.skip_nonfinite, opt.max_grad_value = 0.5, True, 0.1
    yield "options"
    with torch.no_grad():
        params[0].mul_(2.0)
        state["momentum_buffer"].zero_()
        state["step"].fill_(7.0)
    yield "writes in place"
    opt.state_dict()
    opt.memory_footprint()
    repr(opt)
    yield "looks at it"
    torch.optim.lr_scheduler.ExponentialLR(opt, 0.5).step()
    yield "a scheduler"
    params[0].grad[0, 0] = float("inf")
    yield "a skipped step"


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_plan_is_kept(backend):
    params, opt = fresh(backend)
    plan = opt._shared.plan
    for situation in kept(params, opt):
        for _ in range(2):
            opt.step()
            assert opt._shared.plan is plan, situation


def rebuilt(params, opt):
    """After which another plan is needed, one after the other."""
    opt.load_state_dict(opt.state_dict())
    yield "a checkpoint"
    group = opt.param_groups[0]  # the checkpoint's
    group["momentum"] = 0
    yield "no momentum"
    params[1].data = params[1].data.half()
    params[1].grad = params[1].grad.half()
    yield "another dtype"
    group["params"][1] = torch.nn.Parameter(torch.ones(4))
    yield "another param"
    group["params"].reverse()
    yield "another order"
    group["params"].pop()
    yield "fewer params"
    opt.add_param_group({"params": torch.nn.Parameter(torch.ones(4))})
    yield "another group"


def test_plan_is_rebuilt_once(backend):
    params, opt = fresh(backend)
    plan = opt._shared.plan
    for situation in rebuilt(params, opt):
        opt.step()
        former, plan = plan, opt._shared.plan
        assert plan is not former, situation
        opt.step()
        assert opt._shared.plan is plan, situation


def rebound(params, opt):
    """Only addresses move."""
    own = opt.state[params[1]]
    params[1].data = torch.ones(40)
    yield "other data"
    params[0].data = transposed(params[0].data)
    yield "other strides"
    own["momentum_buffer"] = torch.ones(40)
    yield "another state"
    own["momentum_buffer"].data = torch.ones(40)
    yield "other data of a state"
    own["step"] = torch.tensor(9.0)
    yield "another count"
    opt.state.clear()
    yield "no state"


def count_plans(monkeypatch, plan):
    """How many plans are made from now on by the backend of this one."""
    made, cls = [], type(registry.choose(plan.backend, []))
    real = cls.plan
    monkeypatch.setattr(cls, "plan", lambda *args: made.append(1) or real(*args))
    return made


def test_plan_is_kept_where_only_addresses_move(backend, monkeypatch):
    """As one that is made anew, and the steps are the same."""
    params, opt = fresh(backend)
    twins, twin = fresh(backend)
    made = count_plans(monkeypatch, opt._shared.plan)
    situations = zip(rebound(params, opt), rebound(twins, twin), strict=True)
    for step, (situation, _) in enumerate(situations, 1):
        twin._shared.drop_plans()
        for pair in ((params, opt), (twins, twin)):
            give_grads(pair[0], step)
            pair[1].step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True)), situation
        assert len(made) == step, situation  # the twin's
        opt.step()
        twin.step()
        assert opt._shared.plan.holds_only(opt.state), situation


def by_groups(opt):
    """As DeepSpeed's ZeRO steps: one group at a time, each in a list of its own."""
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups


def two_groups(backend, n=30):
    params = [torch.nn.Parameter(randn((size,), size)) for size in (n, n + 1, n - 1)]
    return params, build(
        True, "adamw", [{"params": params[:1]}, {"params": params[1:]}], backend=backend
    )


def test_groups_that_take_turns_have_a_plan_each(backend, monkeypatch):
    (params, opt), (twins, twin) = two_groups(backend), two_groups(backend)
    for step in range(6):
        give_grads(params, step)
        give_grads(twins, step)
        by_groups(opt)
        twin.step()
        if step == 2:
            made = count_plans(monkeypatch, opt._shared.plan)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert made == []


def test_plans_set_aside_keep_nothing_alive(backend):
    params, opt = two_groups(backend, 20_000)  # see SecondOwner in csrc/watch/watch.h
    for step in range(3):
        give_grads(params, step)
        by_groups(opt)
    assert opt._shared.aside
    alive = [weakref.ref(params[0]), weakref.ref(opt.state[params[0]]["exp_avg"])]
    del opt.state[params[0]], opt.param_groups[0], params[0]
    assert alive[1]() is None
    give_grads(params, 5)
    opt.step()
    gc.collect()
    assert alive[0]() is None


def test_first_gradient_of_a_param_rebuilds_the_plan_once(backend):
    params = [torch.nn.Parameter(randn((n,), n)) for n in (3, 4)]
    opt = build(True, "sgd", params, backend=backend)
    plans = []
    for step in range(6):
        give_grads(params, step)
        if step < 2:
            params[1].grad = None
        opt.step()
        plans.append(opt._shared.plan)
    assert plans[0] is plans[1] is not plans[2]
    assert all(plan is plans[2] for plan in plans[2:])


def test_dropped_optimizer_frees_everything(backend):
    """No cycle keeps the states of a dropped optimizer alive."""
    gc.collect()
    params, opt = fresh(backend)
    alive = [weakref.ref(opt.state[p]["momentum_buffer"]) for p in params]
    plan = weakref.ref(opt._shared.plan)
    del opt
    gc.collect()
    assert plan() is None and all(ref() is None for ref in alive)
    assert all(p.isfinite().all() for p in params)


# The tables of the CPU backend


def test_records_are_those_of_the_native_module(cpu_backend):
    from fusedopt import _cpu
    from fusedopt.backends import modules, records

    modules.check_mirrors(_cpu)
    assert struct.calcsize("=5QQqiI5Q24x") == records.ROW.size == 128
    assert struct.calcsize("=Qii") == records.GRAD.size == 16
    assert struct.calcsize("=iiq") == records.CHUNK.size
    assert records.CHUNK_ELEMENTS == _cpu.CHUNK_ELEMENTS == 8192


def told(**changed):
    """What is said of a module that is ours but for these attributes."""
    from fusedopt import _cpu
    from fusedopt.backends import modules

    with pytest.raises(ImportError, match=r"fusedopt\._cpu was built from other sources") as error:
        modules.check_mirrors(SimpleNamespace(**{**vars(_cpu), **changed}))
    return str(error.value)


@pytest.mark.parametrize(
    "where, one, other",
    [
        ("adamw options", "beta1", "eps"),
        ("adamw options", "decoupled", "maximize"),
        ("sgd options", "lr", "momentum"),
        ("sgd hyper", "minus_lr", "decay"),
        ("adamw hyper", "step_size", "eps"),
        ("Row", "step", "numel"),
        ("Grad", "codec", "present"),
        ("StepRecord", "found_inf", "inf_flag"),
        ("StepScalars", "skip", "found_inf"),
    ],
)
def test_two_fields_that_change_places_are_named(cpu_backend, where, one, other):
    """Sizes alone would not tell: most fields have eight bytes."""
    from fusedopt import _cpu

    def swapped(fields):
        names = {one: other, other: one}
        return [(names.get(name, name), *rest) for name, *rest in fields]

    name, _, part = where.partition(" ")
    if part:
        rule = {**_cpu.RULES[name], part: swapped(_cpu.RULES[name][part])}
        message = told(RULES={**_cpu.RULES, name: rule})
    else:
        message = told(RECORDS={**_cpu.RECORDS, name: swapped(_cpu.RECORDS[name])})
    assert one in message and other in message and name in message


def test_constants_and_rules_that_differ_are_named(cpu_backend, monkeypatch):
    from fusedopt import _cpu, codecs
    from fusedopt.backends import modules

    sizes = {"CODEC_BITS": 8, "OPTIONS_BYTES": 128, "LOWEST": -320}
    for name, value in {"FLOAT16": 2, "FROZEN": 2, **sizes}.items():
        assert f"module has {name} {value}, fusedopt has {name} " in told(**{name: value})
    rules = _cpu.RULES
    assert "lion" in told(RULES={name: rules[name] for name in ("adamw", "sgd")})
    assert "other" in told(RULES={**rules, "other": rules["sgd"]})
    other_text = {**rules["adamw"], "absent": [0.0]}
    assert "rule adamw" in told(RULES={**rules, "adamw": other_text})
    strange = codecs.Codec(15, "FLOAT8", torch.float8_e5m2)
    monkeypatch.setattr(modules, "CODECS", (*codecs.CODECS, strange))
    assert "the module has FLOAT8 None, fusedopt has FLOAT8 15" in told()


@pytest.mark.parametrize(
    "numels", [[1], [8192], [8193], [0], [5, 0, 8191, 20000], [3] * 50, [16384, 1]], ids=str
)
def test_chunk_table(cpu_backend, numels):
    from fusedopt.backends.records import chunk_table

    expected, position = [], 0
    for row, numel in enumerate(numels):
        for index in range(-(-numel // 8192)):
            expected.append((row, index, position + index * 8192))
        position += numel
    packed = b"".join(struct.pack("=iiq", *chunk) for chunk in expected)
    table = chunk_table(numels)
    assert bytes(table.contiguous().view(torch.uint8).flatten().tolist()) == packed


def test_rows_hold_the_addresses_of_the_tensors(cpu_backend):
    from fusedopt.backends.records import GRAD, ROW

    dtypes = {3: torch.float16, 0: torch.bfloat16, 90: torch.float32, 4: torch.float32}
    params = [torch.nn.Parameter(randn((n,), n, d)) for n, d in dtypes.items()]
    opt = fusedopt.FusedAdamW(
        [{"params": params[:2]}, {"params": params[2:], "amsgrad": True}], backend="cpu"
    )
    give_grads(params, 0)
    opt.step()
    params[3].grad = None
    opt.step()
    plan = opt._shared.plan
    rows = list(struct.iter_unpack(ROW.format, bytes(plan._tables["rows"].tolist())))
    grads = list(struct.iter_unpack(GRAD.format, plan._inputs[plan.grads_at :]))
    codes = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for i, (p, row, grad) in enumerate(zip(params, rows, grads, strict=True)):
        state = opt.state[p]
        address = [state[n].data_ptr() if n in state else 0 for n in names]
        master = state["master_param"].data_ptr() if "master_param" in state else 0
        expected = (p.data_ptr(), master, *address, state["step"].data_ptr())
        assert row == (*expected, p.numel(), i // 2, codes[p.dtype], *[0] * 5, 0, 0)
        if p.grad is None:
            assert grad[2] == 0
        elif p.numel():
            assert grad == (p.grad.data_ptr(), codes[p.grad.dtype], 1)
