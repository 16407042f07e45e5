"""`python -m fusedopt`: what it says is so, and what is wrong is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import fusedopt
import fusedopt.__main__ as report
from fusedopt import installation
from fusedopt.backends import cpu, modules, registry as backends

MAPS = """\
7f00-7f01 r-xp 0000 08:01 11 /venv/torch/lib/libgomp.so.1
7f01-7f02 r--p 0000 08:01 11 /venv/torch/lib/libgomp.so.1
7f02-7f03 r-xp 0000 08:01 12 /venv/torch/lib/libtorch.so
7f03-7f04 rw-p 0000 00:00 0  [heap]
"""
TWO_POOLS = MAPS + "7f04-7f05 r-xp 0 08:01 13 /venv/x.libs/libgomp-24e2ab19.so.1.0.0\n"


def test_the_command(tmp_path):
    # from another directory: `-m` puts the current one on sys.path, before what is installed
    environ = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDOPT_")}
    environ["FUSEDOPT_BACKEND"] = "reference"
    command = [sys.executable, "-m", "fusedopt", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fusedopt"] == fusedopt.__version__
    assert told["torch"] == torch.__version__
    assert told["environment"] == {"FUSEDOPT_BACKEND": "reference"}
    assert told["devices"]["cpu"]["backend"] == "reference"
    assert told["devices"]["cpu"]["self_test"] == "ok"
    assert told["backends"]["reference"]["available"] is True
    assert list(told["backends"]) == ["cuda", "triton", "cpu", "reference"]
    for name in ("cuda", "triton", "cpu"):
        available, reason = told["backends"][name]["available"], told["backends"][name]["reason"]
        assert available is (reason == ""), f"{name}: {reason}"
    assert told["threads"] >= 1


def test_text_names_every_backend_and_device(cpu_backend, monkeypatch, capsys):
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    assert report.main([]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, facts in backends.report().items():
        available = "available" if facts["available"] else "not available"
        assert lines[f"backend {name}"].split("  ")[-1].strip().startswith(available)
    assert lines["cpu"].endswith(f": {cpu_backend}, self-test ok")
    assert fusedopt.__version__ in lines["fusedopt"]


def test_the_build_record_is_told(monkeypatch, capsys):
    module = {"built": True, "reason": "", "compiler": "c++ 12.2", "flags": [], "simd": ["generic"]}
    cuda = module | {"simd": [], "architectures": ["sm_75", "compute_75"], "compiler": "nvcc 13.0"}
    other = {"built": False, "reason": "no nvcc", "compiler": "", "flags": [], "simd": []}
    modules = {"_cpu": module, "_cuda": cuda, "_x": other}
    record = {"version": "0", "commit": "0123abc", "modules": modules}
    monkeypatch.setattr(installation, "build_config", lambda: record)
    report.main([])
    out = capsys.readouterr().out
    assert "commit 0123abc" in out
    assert "generic; built with c++ 12.2" in out
    assert "sm_75, compute_75; built with nvcc 13.0" in out
    assert "not built: no nvcc" in out


@pytest.mark.parametrize(("maps", "count"), [("", 0), (MAPS, 1), (TWO_POOLS, 2)])
def test_openmp_libraries(maps, count):
    assert len(report.openmp_libraries(maps)) == count


def test_two_thread_pools_are_a_warning(monkeypatch, tmp_path, capsys):
    maps = tmp_path / "maps"
    monkeypatch.setattr(report, "MAPS", maps)
    maps.write_text(MAPS)
    assert report.main([]) == 0
    assert "several OpenMP runtimes" not in capsys.readouterr().err
    maps.write_text(TWO_POOLS)
    assert report.main([]) == 0
    assert "warning: several OpenMP runtimes" in capsys.readouterr().err


def raising_step(self, closure=None):
    raise RuntimeError("no kernel for this machine")


@pytest.mark.parametrize(
    ("step", "message"),
    [(lambda self: None, "off by"), (raising_step, "RuntimeError: no kernel for this machine")],
)
def test_a_wrong_step_is_told(monkeypatch, capsys, step, message):
    monkeypatch.setattr(fusedopt.FusedAdamW, "step", step)
    assert report.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert message in told["devices"]["cpu"]["self_test"]
    assert any("self-test failed on cpu" in warning for warning in told["warnings"])


@pytest.fixture
def native(cpu_backend):
    native = modules.load("_cpu")[0]
    level = native.simd()
    yield native
    native.set_simd(level)


def test_the_simd_level_is_the_one_in_use(native, monkeypatch):
    for level in native.simd_levels():
        monkeypatch.setenv("FUSEDOPT_SIMD", level)
        assert modules.load.__wrapped__("_cpu") == (native, None)
        assert backends.report()["cpu"]["simd"] == level


def test_a_simd_level_that_is_not_there(native, monkeypatch, capsys):
    """The report comes all the same: the message sends people to it."""
    monkeypatch.setenv("FUSEDOPT_SIMD", "avx9")
    monkeypatch.setattr(cpu, "_reason", modules.load.__wrapped__("_cpu")[1])
    assert report.main(["--json"]) == 1
    reason = json.loads(capsys.readouterr().out)["backends"]["cpu"]["reason"]
    assert "FUSEDOPT_SIMD='avx9' is not in this build or not on this CPU; use " in reason
    assert "generic" in reason


def test_a_module_of_other_sources(native, monkeypatch):
    monkeypatch.setattr(native, "CHUNK_ELEMENTS", 1)
    with pytest.raises(ImportError, match="was built from other sources than this package"):
        modules.check_mirrors(native)
