"""The plan: when it is kept and when rebuilt, and what its tables hold."""

import gc
import struct
import weakref

import pytest
import torch
from cases import transposed
from plan_helpers import OPTIMIZERS, build, randn

import fusedopt
from fusedopt.backends import registry


def give_grads(params, step):
    for i, p in enumerate(params):
        p.grad = randn(p.shape, 1000 * step + i).to(p.dtype)


# When the plan is rebuilt


def fresh(backend, **options):
    params = [torch.nn.Parameter(randn(s, i)) for i, s in enumerate([(5, 3), (40,), ()])]
    opt = build("sgd", params, backend=backend, **options)
    for step in range(2):
        give_grads(params, step)
        opt.step()
    return params, opt


def new_gradients(params, opt):
    give_grads(params, 5)


def none_gradient(params, opt):
    params[1].grad = None


def zero_grad(params, opt):
    opt.zero_grad()
    give_grads(params, 6)


def other_layout(params, opt):
    params[0].grad = transposed(params[0].grad)


def hyper_parameters(params, opt):
    opt.param_groups[0].update(lr=0.3, weight_decay=0.0, momentum=0.5, maximize=True, nesterov=True)


def options(params, opt):
    opt.max_grad_norm, opt.skip_nonfinite, opt.max_grad_value = 0.5, True, 0.1


def in_place_writes(params, opt):
    with torch.no_grad():
        params[0].mul_(2.0)
        opt.state[params[0]]["momentum_buffer"].zero_()
        opt.state[params[0]]["step"].fill_(7.0)


def save(params, opt):
    opt.state_dict()
    opt.memory_footprint()
    repr(opt)


def skipped_step(params, opt):
    opt.skip_nonfinite = True
    params[0].grad[0, 0] = float("inf")


def scheduler(params, opt):
    torch.optim.lr_scheduler.ExponentialLR(opt, 0.5).step()


KEEP = [new_gradients, none_gradient, zero_grad, other_layout, hyper_parameters, options]
KEEP += [in_place_writes, save, skipped_step, scheduler]


@pytest.mark.parametrize("change", KEEP, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_plan_is_kept(change, backend):
    params, opt = fresh(backend)
    plan = opt._shared.plan
    for _ in range(3):
        change(params, opt)
        opt.step()
    assert opt._shared.plan is plan


def new_data(params, opt):
    params[1].data = torch.ones(40)


def new_dtype(params, opt):
    params[1].data = params[1].data.half()
    params[1].grad = None
    give_grads(params, 5)


def new_strides(params, opt):
    params[0].data = transposed(params[0].data)


def new_param(params, opt):
    opt.param_groups[0]["params"][1] = torch.nn.Parameter(torch.ones(4))


def fewer_params(params, opt):
    opt.param_groups[0]["params"].pop()


def other_order(params, opt):
    opt.param_groups[0]["params"].reverse()


def new_group(params, opt):
    opt.add_param_group({"params": torch.nn.Parameter(torch.ones(4))})


def new_state_tensor(params, opt):
    opt.state[params[1]]["momentum_buffer"] = torch.ones(40)


def new_state_data(params, opt):
    opt.state[params[1]]["momentum_buffer"].data = torch.ones(40)


def new_step(params, opt):
    opt.state[params[1]]["step"] = torch.tensor(9.0)


def no_state(params, opt):
    opt.state.clear()


def loaded(params, opt):
    opt.load_state_dict(opt.state_dict())


def no_momentum(params, opt):
    opt.param_groups[0]["momentum"] = 0


REBUILD = [new_dtype, new_param, fewer_params, other_order, new_group, loaded, no_momentum]


@pytest.mark.parametrize("change", REBUILD, ids=lambda f: f.__name__)
def test_plan_is_rebuilt_once(change, backend):
    params, opt = fresh(backend)
    plan = opt._shared.plan
    change(params, opt)
    opt.step()
    rebuilt = opt._shared.plan
    assert rebuilt is not plan
    opt.step()
    assert opt._shared.plan is rebuilt


REBIND = [new_data, new_strides, new_state_tensor, new_state_data, new_step, no_state]


def count_plans(monkeypatch, plan):
    """How many plans are made from now on by the backend of this one."""
    made, cls = [], type(registry.choose(plan.backend, []))
    real = cls.plan
    monkeypatch.setattr(cls, "plan", lambda *args: made.append(1) or real(*args))
    return made


@pytest.mark.parametrize("change", REBIND, ids=lambda f: f.__name__)
def test_plan_is_kept_where_only_addresses_move(change, backend, monkeypatch):
    params, opt = fresh(backend)
    twins, twin = fresh(backend)
    made = count_plans(monkeypatch, opt._shared.plan)
    for step in range(3):
        change(params, opt)
        change(twins, twin)
        twin._shared.drop_plans()
        give_grads(params, step)
        give_grads(twins, step)
        opt.step()
        twin.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert len(made) == 3  # the twin's
    opt.step()
    assert opt._shared.plan.holds_only(opt.state)


def by_groups(opt):
    """As DeepSpeed's ZeRO steps: one group at a time, each in a list of its own."""
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups


def two_groups(backend, n=30):
    params = [torch.nn.Parameter(randn((size,), size)) for size in (n, n + 1, n - 1)]
    return params, build("adamw", [{"params": params[:1]}, {"params": params[1:]}], backend=backend)


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
    opt = build("sgd", params, backend=backend)
    plans = []
    for step in range(6):
        give_grads(params, step)
        if step < 2:
            params[1].grad = None
        opt.step()
        plans.append(opt._shared.plan)
    assert plans[0] is plans[1] is not plans[2]
    assert all(plan is plans[2] for plan in plans[2:])


def test_freed_gradients_are_not_read(backend):
    """A raw address is only as good as the tensor behind it."""
    params = [torch.nn.Parameter(randn((50_000,), n)) for n in range(4)]
    opt = build("sgd", params, backend=backend, max_grad_norm=1.0)
    give_grads(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]
    opt.zero_grad()
    gc.collect()
    garbage = [torch.full((50_000,), float("nan")) for _ in range(8)]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert len(garbage) == 8


def test_dropped_optimizer_frees_everything(backend):
    """No cycle keeps the states of a dropped optimizer alive."""
    import weakref

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


def swapped(fields, one, other):
    """The fields of a record or a rule where two have changed places."""
    names = {one: other, other: one}
    return [(names.get(name, name), *rest) for name, *rest in fields]


@pytest.mark.parametrize(
    "where, one, other",
    [
        *(("adamw options", "beta1", "eps"), ("adamw options", "decoupled", "maximize")),
        *(("sgd options", "lr", "momentum"), ("sgd hyper", "minus_lr", "decay")),
        *(
            ("adamw hyper", "step_size", "eps"),
            ("Row", "step", "numel"),
            ("Grad", "codec", "present"),
        ),
        *(("StepRecord", "found_inf", "inf_flag"), ("StepScalars", "skip", "found_inf")),
    ],
)
def test_two_fields_that_change_places_are_named(cpu_backend, monkeypatch, where, one, other):
    """Sizes alone would not tell: most fields have eight bytes."""
    from fusedopt import _cpu
    from fusedopt.backends import modules

    name, _, part = where.partition(" ")
    if part:
        rule = {**_cpu.RULES[name], part: swapped(_cpu.RULES[name][part], one, other)}
        monkeypatch.setattr(_cpu, "RULES", {**_cpu.RULES, name: rule})
    else:
        fields = swapped(_cpu.RECORDS[name], one, other)
        monkeypatch.setattr(_cpu, "RECORDS", {**_cpu.RECORDS, name: fields})
    with pytest.raises(ImportError) as error:
        modules.check_mirrors(_cpu)
    message = str(error.value)
    assert "fusedopt._cpu was built from other sources than this package" in message
    assert one in message and other in message and name in message


@pytest.mark.parametrize(
    "name, value",
    [("FLOAT16", 2), ("CODEC_BITS", 8), ("OPTIONS_BYTES", 128), ("FROZEN", 2), ("LOWEST", -320)],
)
def test_a_constant_that_differs_is_named(cpu_backend, monkeypatch, name, value):
    from fusedopt import _cpu
    from fusedopt.backends import modules

    monkeypatch.setattr(_cpu, name, value)
    with pytest.raises(ImportError, match=f"the module has {name} {value}, fusedopt has {name}"):
        modules.check_mirrors(_cpu)


def test_a_dtype_that_the_module_lacks_is_named(cpu_backend, monkeypatch):
    from fusedopt import _cpu
    from fusedopt.backends import modules, records

    monkeypatch.setitem(records.CODECS, torch.float8_e5m2, 3)
    with pytest.raises(ImportError, match="the module has FLOAT8_E5M2 None, fusedopt has FLOAT8"):
        modules.check_mirrors(_cpu)


@pytest.mark.parametrize("change", ["less", "more", "absent"])
def test_a_rule_that_differs_is_named(cpu_backend, monkeypatch, change):
    """A module that was built before a rule was added, after one was, or with another text."""
    from fusedopt import _cpu
    from fusedopt.backends import modules

    rules = {**_cpu.RULES, "other": _cpu.RULES["sgd"]}
    if change == "less":
        rules = {name: _cpu.RULES[name] for name in ("adamw", "sgd")}
    elif change == "absent":
        rules = {**_cpu.RULES, "adamw": {**_cpu.RULES["adamw"], "absent": [0.0]}}
    monkeypatch.setattr(_cpu, "RULES", rules)
    name = {"less": "lion", "more": "other", "absent": "rule adamw"}[change]
    with pytest.raises(ImportError, match=f"built from other sources.*{name}"):
        modules.check_mirrors(_cpu)


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
    params = [torch.nn.Parameter(randn((n,), n).to(d)) for n, d in dtypes.items()]
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
        assert row == (*expected, p.numel(), i // 2, codes[p.dtype], *[0] * 5)
        if p.grad is None:
            assert grad[2] == 0
        elif p.numel():
            assert grad == (p.grad.data_ptr(), codes[p.grad.dtype], 1)


def test_options_table_fits_the_rules(cpu_backend):
    """One line per group."""
    for kind in OPTIMIZERS:
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        opt = build(kind, [{"params": [p]} for p in params], backend="cpu")
        give_grads(params, 0)
        opt.step()
        assert len(opt._step_inputs().table) == 3 * 64
