"""Which backend serves: the choice, what is said about it, and what stays unimported."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_interpreter
from children import in_a_child
from harness import make_param, randn
from test_cuda_host import refusal

import fusedopt
from fusedopt.backends import cpu as native, cuda, registry as backends, triton

NO_NVCC = "no CUDA compiler: nvcc is not on PATH"
OLD_DRIVER = "CUDA: the NVIDIA driver is too old for this CUDA runtime"
NO_TRITON = "Triton is not installed: pip install triton"
NO_CXX = "no C++ compiler on PATH"

FLOATS = torch.float32, torch.float16, torch.bfloat16


def tensor(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """As much of one as the choice looks at; there need be no such device."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


class Machine:
    """What a backend lacks here: nothing where the reason is None."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.delenv("FUSEDOPT_BACKEND", raising=False)
        patch.setattr(backends, "_announced", set())  # it is said once in a process

    def has(
        self,
        cuda_lacks: str | None = None,
        triton_lacks: str | None = None,
        cpu_lacks: str | None = None,
        driver_problem: str | None = None,
        hip: str | None = None,
    ) -> None:
        on_gpu = SimpleNamespace(device_type="cuda")
        for module, reason in ((cuda, cuda_lacks), (triton, triton_lacks), (native, cpu_lacks)):
            self.patch.setattr(module, "unavailable_reason", lambda reason=reason: reason)
        self.patch.setattr(cuda, "driver_problem", lambda: driver_problem)
        self.patch.setattr(cuda, "driver", lambda: on_gpu)
        self.patch.setattr(triton, "driver", lambda: on_gpu)
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

SILENT: list[tuple[dict[str, str], str, str]] = [
    ({}, "cuda", "cuda"),
    ({"triton_lacks": NO_TRITON}, "cuda", "cuda"),
    ({"cpu_lacks": NO_CXX}, "cuda", "cuda"),
    ({"hip": "7.0", "cuda_lacks": NO_NVCC}, "cuda", "triton"),
    ({"hip": "7.0"}, "cuda", "triton"),
    ({}, "cpu", "cpu"),
    ({"cuda_lacks": NO_NVCC, "triton_lacks": NO_TRITON}, "cpu", "cpu"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("lacks", "device", "backend"), SILENT)
def test_what_was_to_be_expected_serves_in_silence(
    machine: Machine, lacks: dict[str, str], device: str, backend: str, dtype: torch.dtype
) -> None:
    machine.has(**lacks)
    assert chosen(tensor(device, dtype), tensor(device)) == (backend, "")


# Announced: what the machine lacks, the device, who serves, words of the reason and the remedy

ANNOUNCED: list[tuple[dict[str, str], str, str, list[str]]] = [
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
def test_a_fall_back_is_announced_once(
    machine: Machine, lacks: dict[str, str], device: str, backend: str, words: list[str]
) -> None:
    machine.has(**lacks)
    name, said = chosen(tensor(device))
    assert name == backend
    assert all(word in said for word in words), said
    assert "python -m fusedopt" in said
    assert chosen(tensor(device)) == (backend, "")


def test_each_reason_is_announced(machine: Machine) -> None:
    machine.has(cuda_lacks=NO_NVCC)
    assert NO_NVCC in chosen(tensor("cuda"))[1]
    machine.has(cuda_lacks="built from other sources")
    assert "other sources" in chosen(tensor("cuda"))[1]


def test_rocm_says_nothing_about_cuda(machine: Machine) -> None:
    machine.has(hip="7.0", cuda_lacks=NO_NVCC, triton_lacks=NO_TRITON)
    said = chosen(tensor("cuda"))[1]
    assert "CUDA" not in said and "nvcc" not in said


@pytest.mark.parametrize("hip", [None, "7.0"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float64_is_for_the_reference_backend(
    machine: Machine, device: str, hip: str | None
) -> None:
    machine.has(hip=hip, cuda_lacks=NO_NVCC)
    name, said = chosen(tensor(device), tensor(device, torch.float64))
    assert name == "reference" and "float64" in said
    assert "not available" not in said, "that is not the reason"


def test_devices_of_two_types_are_for_the_reference_backend(machine: Machine) -> None:
    machine.has()
    name, said = chosen(tensor("cpu"), tensor("cuda"))
    assert name == "reference" and "on cpu" in said
    name, said = chosen(tensor("xpu"))
    assert name == "reference" and "on xpu" in said
    assert chosen(tensor("cuda:0"), tensor("cuda:1")) == ("cuda", "")


@pytest.mark.parametrize("lacks", [{}, {"cpu_lacks": NO_CXX}])
@pytest.mark.parametrize("backend", [None, "cuda", "triton", "cpu"])
def test_no_params_need_no_backend(
    machine: Machine, lacks: dict[str, str], backend: str | None
) -> None:
    machine.has(cuda_lacks=NO_NVCC, triton_lacks=NO_TRITON, **lacks)
    assert chosen(backend=backend) == ("reference" if lacks else "cpu", "")


def test_a_cuda_module_without_its_driver_is_an_error(machine: Machine) -> None:
    """Nobody builds it to be served by plain torch operations."""
    machine.has(cuda_lacks=OLD_DRIVER, driver_problem=OLD_DRIVER, triton_lacks=NO_TRITON)
    with pytest.raises(RuntimeError) as caught:
        chosen(tensor("cuda"))
    for words in (OLD_DRIVER, "update the driver", "backend='reference'", NO_TRITON):
        assert words in str(caught.value)
    assert chosen(tensor("cuda"), backend="reference") == ("reference", "")


# Asked for by name

BY_NAME = [
    ("cuda", {"cuda_lacks": NO_NVCC}, "cuda", torch.float32, [NO_NVCC]),
    ("triton", {"triton_lacks": NO_TRITON}, "cuda", torch.float32, [NO_TRITON]),
    ("cpu", {"cpu_lacks": NO_CXX}, "cpu", torch.float32, [NO_CXX]),
    ("cuda", {}, "cpu", torch.float32, ["on cpu"]),
    ("triton", {}, "cpu", torch.float32, ["on cpu"]),
    ("cpu", {}, "cuda", torch.float32, ["on cuda"]),
    ("triton", {}, "cuda", torch.float64, ["float64"]),
    ("cuda", {}, "cuda", torch.float64, ["float64"]),
]


@pytest.mark.parametrize(("backend", "lacks", "device", "dtype", "words"), BY_NAME)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_backend_by_name_serves_or_says_why_not(
    machine: Machine, backend: str, lacks: Any, device: str, dtype: Any, words: Any, by: str
) -> None:
    machine.has(**lacks)
    if by == "environment":
        machine.patch.setenv("FUSEDOPT_BACKEND", backend)
    with pytest.raises(RuntimeError) as caught:
        chosen(tensor(device, dtype), backend=backend if by == "argument" else None)
    for expected in (*words, repr(backend), "backend='reference'"):
        assert expected in str(caught.value)
    machine.has()
    fitting = "cpu" if backend == "cpu" else "cuda"
    assert chosen(tensor(fitting), backend=backend) == (backend, "")


def test_triton_for_a_cpu_tensor_changes_nothing() -> None:
    param = make_param(randn(5, 1))
    param.grad = torch.ones(5)
    message = refusal(param, "triton")
    reason = triton.unavailable_reason()
    assert "'triton'" in message and "backend='reference'" in message
    assert (reason and reason in message) or " cpu" in message


# Versions of Triton, and installations that are broken

VERSIONS = {
    "3.6.0": True, "3.6.0+git1234abc": True, "3.6": True, "3.6rc1": True, "3.7.1.post2": True,
    "3.10.0a1": True, "4.0": True, "10.0.0": True,
    "3.5.1": False, "3.5.1+rocm7.1.0": False, "2.9.9": False, "3": False, "main": False, "": False,
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = triton.unavailable_reason()
    if VERSIONS[version]:
        assert reason == "torch sees no GPU"
    else:
        assert reason == f"Triton {version} is too old: upgrade it to 3.6 or newer"
    assert triton.details() == {"version": version}


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0"])
def test_on_amd_one_release_more(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton.is_supported(version) == (version == "3.7.0")


BROKEN = {
    "raise ModuleNotFoundError('No module', name='triton')": NO_TRITON,
    "raise OSError('libtriton.so:\\n wrong ELF class')": "OSError: libtriton.so: wrong ELF class",
    "import no_such_module_of_tritons": "No module named 'no_such_module_of_tritons'",
    "": "no attribute '__version__'",
    "__version__ = '3.5.1'": "Triton 3.5.1 is too old: upgrade it to 3.6 or newer",
}


@pytest.mark.parametrize("content", BROKEN)
def test_the_report_survives_a_broken_triton(tmp_path: Path, content: str) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(content)  # ahead of the real one
    code = "import sys, fusedopt.__main__ as report; sys.exit(report.main(['--json']))"
    done = in_a_child(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)["backends"]["triton"]
    assert told["available"] is False
    assert BROKEN[content] in told["reason"] and "\n" not in told["reason"]


def test_the_report_names_version_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.driver, "made", None)
    monkeypatch.setattr(triton, "_target", lambda: SimpleNamespace(backend="hip", arch="gfx942"))
    told = backends.report()["triton"]
    assert told["available"] is True and told["reason"] == ""
    assert told["version"] == sys.modules["triton"].__version__
    assert told["target"] == "hip gfx942"


def test_a_gpu_that_triton_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def target() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "_target", target)
    told = backends.report()["triton"]
    assert told["available"] is False and "target" not in told
    assert told["reason"].endswith("RuntimeError: Failed to find C compiler. Please specify via CC")


def test_the_report_with_triton_in_use() -> None:
    """A driver that is installed counts as available, even the interpreter."""
    pytest.importorskip("triton")
    with triton_interpreter.installed():
        assert backends.report()["triton"]["available"] is True


# What is not needed is not imported


def test_neither_import_nor_cpu_steps_import_triton(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "by_torch = 'triton' in sys.modules\n"
        "import fusedopt\n"
        "assert by_torch or 'triton' not in sys.modules\n"
        "p = torch.nn.Parameter(torch.ones(9)); p.grad = torch.ones(9)\n"
        "opt = fusedopt.FusedAdamW([p], max_grad_norm=1.0); opt.step(); opt.step()\n"
        # torch's own optimizers import Dynamo when they are made, and that Triton
        "ours = [m for m in sys.modules if m.startswith('fusedopt.') and 'triton' in m]\n"
        "assert not ours, ours\n"
        "print(opt.backend['cpu'])\n"
    )
    done = in_a_child(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("cpu", "reference")
