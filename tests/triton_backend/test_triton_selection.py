"""Which backend serves: the choice, what is said about it, and what stays unimported."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import FLOATS
from children import in_a_child
from harness import make_param, randn

import fusedopt
from fusedopt.backends import cpu as native, cuda, registry as backends, triton

NO_NVCC = "no CUDA compiler: nvcc is not on PATH"
OLD_DRIVER = "CUDA: the NVIDIA driver is too old for this CUDA runtime"
NO_TRITON = "Triton is not installed: pip install triton"
NO_CXX = "no C++ compiler on PATH"

CPU = "cpu" if importlib.util.find_spec("fusedopt._cpu") else "reference"


def tensor(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """As much of one as the choice looks at; there need be no such device."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


class Machine:
    """What a backend lacks here: nothing where the reason is None."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.delenv("FUSEDOPT_BACKEND", raising=False)
        patch.setattr(backends, "_announced", set())  # it is said once in a process

    def has(self, driver_problem: str | None = None, hip: str | None = None, **lacks: str) -> None:
        """``cuda_lacks``, ``triton_lacks`` and ``cpu_lacks``: why one is not available."""
        for name, module in {"cuda": cuda, "triton": triton, "cpu": native}.items():
            reason = lacks.get(f"{name}_lacks")
            self.patch.setattr(module, "unavailable_reason", lambda reason=reason: reason)
        for module in (cuda, triton):
            self.patch.setattr(module, "driver", lambda: SimpleNamespace(device_type="cuda"))
        self.patch.setattr(cuda, "driver_problem", lambda: driver_problem)
        self.patch.setattr(torch.version, "hip", hip)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def chosen(*params: Any, backend: str | None = None) -> tuple[str, str]:
    """Name of the backend, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        name = backends.choose(backend, params).name
    assert all(w.category is fusedopt.FusedOptFallbackWarning for w in said)
    return name, "".join(str(w.message) for w in said)


# Taken in silence

SILENT = [
    ({}, ["cuda"], "cuda"),
    ({}, ["cuda:0", "cuda:1"], "cuda"),
    ({"triton_lacks": NO_TRITON}, ["cuda"], "cuda"),
    ({"cpu_lacks": NO_CXX}, ["cuda"], "cuda"),
    ({"hip": "7.0", "cuda_lacks": NO_NVCC}, ["cuda"], "triton"),
    ({"hip": "7.0"}, ["cuda"], "triton"),
    ({}, ["cpu"], "cpu"),
    ({"cuda_lacks": NO_NVCC, "triton_lacks": NO_TRITON}, ["cpu"], "cpu"),
]


@pytest.mark.parametrize(("lacks", "devices", "backend"), SILENT, ids=str)
def test_what_was_to_be_expected_serves_in_silence(machine, lacks, devices, backend):
    machine.has(**lacks)
    for dtype in FLOATS:
        assert chosen(tensor(devices[-1], dtype), *map(tensor, devices)) == (backend, "")


@pytest.mark.parametrize("backend", [None, "cuda", "triton", "cpu"])
def test_no_params_need_no_backend(machine, backend):
    machine.has(cuda_lacks=NO_NVCC, triton_lacks=NO_TRITON)
    assert chosen(backend=backend) == ("cpu", "")
    machine.has(cpu_lacks=NO_CXX)
    assert chosen(backend=backend) == ("reference", "")


# Announced: what the machine lacks, the device, who serves, words of the reason and the remedy

ANNOUNCED = [
    ({"cuda_lacks": NO_NVCC}, "cuda", "triton", [f"CUDA backend is not available ({NO_NVCC})",
     "the Triton backend serves", "reinstall fusedopt with nvcc on PATH", "backend='triton'"]),
    ({"cuda_lacks": OLD_DRIVER, "driver_problem": OLD_DRIVER}, "cuda", "triton",
     [OLD_DRIVER, "the Triton backend serves", "update the driver", "backend='triton'"]),
    ({"cuda_lacks": NO_NVCC, "triton_lacks": NO_TRITON}, "cuda", "reference",
     [NO_NVCC, NO_TRITON, "plain torch", "with nvcc on PATH", "backend='reference'"]),
    ({"hip": "7.0", "cuda_lacks": NO_NVCC, "triton_lacks": NO_TRITON}, "cuda", "reference",
     [NO_TRITON, "plain torch", "backend='reference'"]),
    ({"cpu_lacks": NO_CXX}, "cpu", "reference",
     [NO_CXX, "plain torch", "with a C++ compiler on PATH", "backend='reference'"]),
]  # fmt: skip


@pytest.mark.parametrize(("lacks", "device", "backend", "words"), ANNOUNCED)
def test_what_was_not_to_be_expected_is_announced_once(machine, lacks, device, backend, words):
    machine.has(**lacks)
    name, said = chosen(tensor(device))
    assert name == backend
    assert all(word in said for word in (*words, "python -m fusedopt")), said
    assert "hip" not in lacks or ("CUDA" not in said and "nvcc" not in said), said
    assert chosen(tensor(device)) == (backend, "")


def test_each_reason_is_announced(machine):
    machine.has(cuda_lacks=NO_NVCC)
    assert NO_NVCC in chosen(tensor("cuda"))[1]
    machine.has(cuda_lacks="built from other sources")
    assert "other sources" in chosen(tensor("cuda"))[1]


@pytest.mark.parametrize("hip", [None, "7.0"])
@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([tensor("cpu"), tensor("cpu", torch.float64)], "float64"),
        ([tensor("cuda"), tensor("cuda", torch.float64)], "float64"),
        ([tensor("cpu"), tensor("cuda")], "on cpu"),
        ([tensor("xpu")], "on xpu"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_for_the_reference_backend(machine, params, words, hip):
    machine.has(hip=hip, cuda_lacks=NO_NVCC)
    name, said = chosen(*params)
    assert name == "reference" and words in said
    assert "not available" not in said, "that is not the reason"


def test_a_cuda_module_without_its_driver_is_an_error(machine):
    """Nobody builds it to be served by plain torch operations."""
    machine.has(cuda_lacks=OLD_DRIVER, driver_problem=OLD_DRIVER, triton_lacks=NO_TRITON)
    with pytest.raises(RuntimeError) as caught:
        chosen(tensor("cuda"))
    for words in (OLD_DRIVER, "update the driver", "backend='reference'", NO_TRITON):
        assert words in str(caught.value)
    assert chosen(tensor("cuda"), backend="reference") == ("reference", "")


# Asked for by name

BY_NAME = [
    ("cuda", {"cuda_lacks": NO_NVCC}, "cuda", torch.float32, NO_NVCC),
    ("triton", {"triton_lacks": NO_TRITON}, "cuda", torch.float32, NO_TRITON),
    ("cpu", {"cpu_lacks": NO_CXX}, "cpu", torch.float32, NO_CXX),
    ("cuda", {}, "cpu", torch.float32, "on cpu"),
    ("triton", {}, "cpu", torch.float32, "on cpu"),
    ("cpu", {}, "cuda", torch.float32, "on cuda"),
    ("triton", {}, "cuda", torch.float64, "float64"),
    ("cuda", {}, "cuda", torch.float64, "float64"),
]


@pytest.mark.parametrize(("backend", "lacks", "device", "dtype", "words"), BY_NAME)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_backend_by_name_serves_or_says_why_not(
    machine, backend, lacks, device, dtype, words, by
):
    """By argument, whatever the environment says."""
    machine.has(**lacks)
    machine.patch.setenv("FUSEDOPT_BACKEND", "reference" if by == "argument" else backend)
    argument = backend if by == "argument" else None
    with pytest.raises(RuntimeError) as caught:
        chosen(tensor(device, dtype), backend=argument)
    for expected in (words, repr(backend), "backend='reference'"):
        assert expected in str(caught.value)
    machine.has()
    fitting = "cpu" if backend == "cpu" else "cuda"
    assert chosen(tensor(fitting), backend=argument) == (backend, "")


@pytest.mark.parametrize("module", [cuda, triton])
def test_a_refused_step_changes_nothing(module):
    param = make_param(randn(5, 1))
    param.grad = torch.ones(5)
    before = param.detach().clone()
    name = module.__name__.rpartition(".")[2]
    opt = fusedopt.FusedAdamW([param], backend=name)
    with pytest.raises(RuntimeError, match=f"'{name}'.*backend='reference'") as caught:
        opt.step()
    assert torch.equal(param, before) and not opt.state
    reason = module.unavailable_reason()
    assert (reason and reason in str(caught.value)) or " cpu" in str(caught.value)


# Versions of Triton, and installations that are broken

VERSIONS = {
    "3.6.0": True, "3.6.0+git1234abc": True, "3.6": True, "3.6rc1": True, "3.7.1.post2": True,
    "3.10.0a1": True, "4.0": True, "10.0.0": True,
    "3.5.1": False, "3.5.1+rocm7.1.0": False, "2.9.9": False, "3": False, "main": False, "": False,
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_versions(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = triton.unavailable_reason()
    if VERSIONS[version]:
        assert reason == "torch sees no GPU"
    else:
        assert reason == f"Triton {version} is too old: upgrade it to 3.6 or newer"
    assert triton.details() == {"version": version}


def test_on_amd_one_release_more(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton.is_supported("3.7.0") and not triton.is_supported("3.6.0")


BROKEN = {
    "raise OSError('libtriton.so:\\n wrong ELF class')": "OSError: libtriton.so: wrong ELF class",
    "raise ModuleNotFoundError('No module', name='triton')": NO_TRITON,
    "import no_such_module_of_tritons": "No module named 'no_such_module_of_tritons'",
    "": "no attribute '__version__'",
    "__version__ = '3.5.1'": "Triton 3.5.1 is too old: upgrade it to 3.6 or newer",
}


def broken_triton(folder, content):
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text(content)
    return str(folder)  # to be found ahead of the real one


@pytest.mark.parametrize("content", BROKEN)
def test_the_reason_of_a_broken_triton(monkeypatch, tmp_path, content):
    monkeypatch.setitem(sys.modules, "triton", None)
    del sys.modules["triton"]  # until the end of the test
    monkeypatch.syspath_prepend(broken_triton(tmp_path, content))
    told = backends.report()["triton"]
    assert told["available"] is False
    assert BROKEN[content] in told["reason"] and "\n" not in told["reason"]


def test_the_report_survives_a_broken_triton(tmp_path):
    content = next(iter(BROKEN))
    code = "import sys, fusedopt.__main__ as report; sys.exit(report.main(['--json']))"
    done = in_a_child(code, tmp_path, PYTHONPATH=broken_triton(tmp_path, content))
    assert "Traceback" not in done.stderr, done.stderr
    assert BROKEN[content] in json.loads(done.stdout)["backends"]["triton"]["reason"]


def test_the_report_says_whether_triton_can_use_the_gpu(monkeypatch):
    pytest.importorskip("triton")

    def no_target():
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.driver, "made", None)
    monkeypatch.setattr(triton, "_target", lambda: SimpleNamespace(backend="hip", arch="gfx942"))
    told = backends.report()["triton"]
    assert told["available"] is True and told["reason"] == ""
    assert told["version"] == sys.modules["triton"].__version__
    assert told["target"] == "hip gfx942"
    monkeypatch.setattr(triton, "_target", no_target)
    told = backends.report()["triton"]
    assert told["available"] is False and "target" not in told
    assert told["reason"].endswith("RuntimeError: Failed to find C compiler. Please specify via CC")
    with triton_interpreter.installed():  # a driver that is in use counts, even the interpreter
        assert backends.report()["triton"]["available"] is True


# What is not needed is not imported


def test_import_and_cpu_steps_touch_neither_triton_nor_cuda(tmp_path):
    named = None if CPU == "cpu" else CPU  # nobody warns of a backend that was asked for
    code = (
        "import json, sys, warnings; warnings.simplefilter('error')\n"
        "import torch\n"
        "by_torch = 'triton' in sys.modules\n"
        "import fusedopt\n"
        "assert by_torch or 'triton' not in sys.modules\n"
        "p = torch.nn.Parameter(torch.ones(9)); p.grad = torch.ones(9)\n"
        f"opt = fusedopt.FusedAdamW([p], max_grad_norm=1.0, backend={named!r})\n"
        "opt.step(); opt.step()\n"
        # torch's own optimizers import Dynamo when they are made, and that Triton
        "ours = [m for m in sys.modules if m.startswith('fusedopt.') and 'triton' in m]\n"
        "import fusedopt.backends.cuda as cuda\n"
        "reason = cuda.unavailable_reason()\n"
        "print(json.dumps([opt.backend, ours, bool(reason), torch.cuda.is_initialized()]))\n"
    )
    done = in_a_child(code, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{"cpu": CPU}, [], True, False]
