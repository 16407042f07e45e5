"""The build itself, on stand-in sources: what is rebuilt, and what is shipped."""

from __future__ import annotations

import fcntl
import re
import runpy
import subprocess
import sys
import threading

import pytest
from build_stand_in import (
    ENV,
    ROOT,
    Project,
    StandIn,
    Toolkit,
    build_compilers,
    build_native,
    needs_compiler,
    script,
    table,
)

pytestmark = needs_compiler

# ---- one module ---------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path)


def test_what_changed_is_compiled_again_and_nothing_else(stand_in):
    assert stand_in.build().built
    assert stand_in.value() == 1
    before = stand_in.object_time
    stand_in.build()
    assert stand_in.object_time == before
    stand_in.write("value.h", "#define VALUE 2\n")
    stand_in.build()
    assert stand_in.value() == 2
    assert stand_in.build(CXXFLAGS="-DEXTRA=10").built
    assert stand_in.value() == 12
    stand_in.build()
    assert stand_in.value() == 2


def test_two_builds_take_turns(stand_in):
    stand_in.folder.mkdir()
    waiting = threading.Thread(target=stand_in.build)
    with open(stand_in.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert not (stand_in.folder / "build.ninja").exists()
    waiting.join()
    assert stand_in.value() == 1


def test_fast_math_does_not_come_in_through_the_environment(stand_in):
    """A compiler goes by the last of several flags; the stand-in's source refuses fast-math."""
    theirs = ["-march=native", "-ffp-contract=off", "-ffp-contract=fast", "-fmath-errno"]
    record = stand_in.build(CXXFLAGS=" ".join(["-ffast-math", "-Ofast", *theirs]))
    assert record.built, record.reason
    assert not {"-ffast-math", "-Ofast"} & set(record.flags)
    assert set(theirs) < set(record.flags)
    after = record.flags[record.flags.index("-fmath-errno") :]
    assert set(build_compilers.NUMERIC_FLAGS) < set(after)


@pytest.mark.parametrize("variable", ["LDFLAGS", "CXX"])
def test_loading_a_module_leaves_denormals_alone(stand_in, tmp_path, variable):
    """gcc links code that flushes them in the whole process into whatever is linked with these."""
    target, flags = tmp_path / "module.so", "-ffast-math -Ofast -funsafe-math-optimizations"
    assert stand_in.build(target, **{variable: f"{'g++ ' * (variable == 'CXX')}{flags}"}).built
    program = f"import ctypes; ctypes.CDLL({str(target)!r}); print(5e-324 * 1.0 > 0.0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_failed_build_leaves_no_earlier_module_behind(stand_in, tmp_path, capfd):
    target = tmp_path / "module.so"
    assert stand_in.build(target).built
    stand_in.write("value.h", "#error this cannot be\n")
    record = stand_in.build(target)
    assert not target.exists()
    assert not record.built
    assert "csrc/value.h:1:2: error: #error this cannot be" in record.reason
    assert "_stand_in.log" in record.reason
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line.startswith("fusedopt: installing without _stand_in: compiling failed: csrc/")
    with pytest.raises(SystemExit, match=r"FUSEDOPT_STAND_IN=1, but .* error: #error this cannot"):
        stand_in.build(FUSEDOPT_STAND_IN="1")


def test_a_compiler_without_openmp_builds_for_one_thread(stand_in, tmp_path, capfd):
    does = 'case " $* " in *" -fopenmp "*) exit 1;; esac\nexec c++ "$@"'
    compiler = script(tmp_path / "compiler", f"#!/bin/sh\n{does}\n")
    record = stand_in.build(CXX=str(compiler))
    assert record.built, record.reason
    assert not record.openmp
    assert "-fopenmp-simd" in record.flags
    assert "uses one thread: no OpenMP" in capfd.readouterr().err


def test_everything_that_shapes_the_build_names_its_directory(stand_in):
    shapes = [
        {}, {"CXXFLAGS": "-O1"}, {"LDFLAGS": "-s"}, {"CXX": "no-such-cxx"}, {"PATH": ""},
        {"FUSEDOPT_SANITIZE": "address"}, {"FUSEDOPT_STAND_IN": "0"}, {"CUDACXX": "no-such-nvcc"},
        {"CUDA_HOME": "/no-such"}, {"CUDA_PATH": "/no-such"}, {"TORCH_CUDA_ARCH_LIST": "9.0"},
        {"NVCC_PREPEND_FLAGS": "-lineinfo"}, {"NVCC_APPEND_FLAGS": "-lineinfo"},
    ]  # fmt: skip
    keys = [build_native.build_key([stand_in.module], ENV | env) for env in shapes]
    assert len(set(keys)) == len(shapes)
    assert keys[0] == build_native.build_key([stand_in.module], ENV | {"HOME": "/elsewhere"})


# ---- the whole package --------------------------------------------------------------------------

MODULES = {module.name: module for module in table()}


def test_the_table_names_the_files_that_exist():
    named = {unit.source for module in MODULES.values() for unit in module.units}
    files = [path for end in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{end}")]
    assert named == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.parametrize(
    ("machine", "levels"),
    [("x86_64", ["generic", "avx2", "avx512"]), ("aarch64", ["generic"])],
)
def test_instruction_sets_by_machine(machine, levels, tmp_path):
    tool = build_native.Tool(["c++"], "", machine)
    text = build_native.ninja_text(MODULES["_cpu"], tool, tmp_path)
    assert re.findall(r"-DFUSEDOPT_SIMD=(\w+)", text) == levels
    for level in ("AVX2", "AVX512"):
        assert (f"-DFUSEDOPT_HAVE_{level}" in text) == (level.lower() in levels)
        assert (f"-m{level.lower()}" in text) == (level.lower() in levels)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path, MODULES.values())


def test_no_wheel_ships_what_another_build_made(project):
    toolkit = Toolkit(project.root / "toolkit")
    tags, names, records = project.wheel(**toolkit.on_path, FUSEDOPT_CUDA="auto")
    assert "-none-any" not in tags
    for name, record in records.items():
        assert record["built"], record["reason"]
        assert record["compiler"]
        assert any(file.startswith(f"fusedopt/{name}.") for file in names)
    assert records["_cuda"]["architectures"] == ["sm_75", "sm_80", "sm_90", "compute_90"]

    def assert_pure(tags, names):
        assert tags == "py3-none-any"
        assert not any(name.startswith("fusedopt/_c") for name in names)

    broken = Toolkit(project.root / "broken", fails="nvcc fatal   : no").on_path
    tags, names, records = project.wheel(**broken, FUSEDOPT_CUDA="auto", FUSEDOPT_CPU="0")
    assert_pure(tags, names)
    assert not records["_cpu"]["built"]
    assert "nvcc fatal   : no" in records["_cuda"]["reason"]
    assert len(list((project.root / "build").iterdir())) == 2  # a directory for each

    (project.root / "fusedopt/gone.py").touch()
    assert "fusedopt/gone.py" in project.wheel()[1]
    (project.root / "fusedopt/gone.py").unlink()
    project.sources[0].write_text("#error this cannot be")
    tags, names, records = project.wheel()
    assert_pure(tags, names)
    assert "#error this cannot be" in records["_cpu"]["reason"]
    assert "fusedopt/gone.py" not in names


def test_in_place_and_then_not(project):
    build = ("setup.py", "-q", "build_ext", "--inplace")
    assert project.run(*build).returncode == 0
    assert len(project.native_in_tree) == 1
    done = project.run(*build, PATH="")
    assert "installing without _cpu: no C++ compiler on PATH" in done.stderr
    assert project.native_in_tree == []
    done = project.run(*build, PATH="", FUSEDOPT_CPU="1")
    assert done.returncode != 0
    assert "FUSEDOPT_CPU=1, but _cpu was not built: no C++ compiler" in done.stderr


def test_pip_installs_without_a_compiler(project):
    pip = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target=out", "."]
    done = project.run(*pip, PATH="")
    assert done.returncode == 0, done.stderr
    config = runpy.run_path(str(project.root / "out/fusedopt/_build_config.py"))["BUILD_CONFIG"]
    assert config["version"] == "0.1.0"
    assert "no C++ compiler" in config["modules"]["_cpu"]["reason"]
