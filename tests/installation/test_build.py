"""The build itself, on stand-in sources: what is rebuilt, and what happens when it cannot be."""

from __future__ import annotations

import fcntl
import re
import runpy
import shutil
import subprocess
import sys
import threading

import pytest
from build_stand_in import (
    ENV,
    ROOT,
    Project,
    StandIn,
    build_compilers,
    build_native,
    needs_compiler,
    table,
)

# ---- one module ---------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path)


@needs_compiler
def test_a_changed_header_is_compiled_again(stand_in):
    assert stand_in.build().built
    assert stand_in.value() == 1
    stand_in.write("value.h", "#define VALUE 2\n")
    assert stand_in.build().built
    assert stand_in.value() == 2


@needs_compiler
def test_a_changed_flag_is_compiled_again(stand_in):
    stand_in.build()
    assert stand_in.build(CXXFLAGS="-DEXTRA=10").built
    assert stand_in.value() == 11
    stand_in.build()
    assert stand_in.value() == 1


@needs_compiler
def test_nothing_changed_nothing_compiled(stand_in):
    stand_in.build()
    before = stand_in.object_time
    stand_in.build()
    assert stand_in.object_time == before


@needs_compiler
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


@needs_compiler
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast"])
def test_fast_math_does_not_come_in_through_the_environment(stand_in, flag):
    record = stand_in.build(CXXFLAGS=flag)
    assert record.built, record.reason


@needs_compiler
def test_the_numeric_flags_come_last(stand_in):
    """A compiler goes by the last of several."""
    theirs = ["-march=native", "-ffp-contract=off", "-ffp-contract=fast", "-fmath-errno"]
    flags = stand_in.build(CXXFLAGS=" ".join(theirs)).flags
    assert set(theirs) < set(flags)
    after = flags[flags.index("-fmath-errno") :]
    assert set(build_compilers.NUMERIC_FLAGS) < set(after)


@needs_compiler
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-funsafe-math-optimizations"])
@pytest.mark.parametrize("variable", ["LDFLAGS", "CXX"])
def test_loading_a_module_leaves_denormals_alone(stand_in, tmp_path, variable, flag):
    """gcc links code that flushes them in the whole process into whatever is linked with these."""
    target = tmp_path / "module.so"
    assert stand_in.build(target, **{variable: f"g++ {flag}" if variable == "CXX" else flag}).built
    program = f"import ctypes; ctypes.CDLL({str(target)!r}); print(5e-324 * 1.0 > 0.0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@needs_compiler
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


@needs_compiler
def test_a_failed_build_is_fatal_when_the_module_must_be_there(stand_in):
    stand_in.write("value.h", "#error this cannot be\n")
    with pytest.raises(SystemExit, match=r"FUSEDOPT_STAND_IN=1, but .* error: #error this cannot"):
        stand_in.build(FUSEDOPT_STAND_IN="1")


OBSTACLES = [
    pytest.param({"PATH": ""}, r"no C\+\+ compiler on PATH \(looked for c\+\+", id="no compiler"),
    pytest.param(
        {"PATH": "", "CXXFLAGS": "-O2", "MAX_JOBS": "3"}, r"no C\+\+ compiler", id="flags for none"
    ),
    pytest.param({"FUSEDOPT_STAND_IN": "0"}, "FUSEDOPT_STAND_IN=0 was set", id="switched off"),
    pytest.param(
        {"FUSEDOPT_STAND_IN": "0", "MAX_JOBS": "x", "CXX": "no-such-cxx"},
        "FUSEDOPT_STAND_IN=0 was set",
        id="settings of what is switched off",
    ),
]


@needs_compiler
@pytest.mark.parametrize(("env", "reason"), OBSTACLES)
def test_what_cannot_be_built_is_left_out_with_the_reason(stand_in, env, reason, capfd):
    record = stand_in.build(**env)
    assert not record.built
    assert not stand_in.target.exists()
    assert re.search(reason, record.reason), record.reason
    said = capfd.readouterr().err.splitlines()
    assert said == [f"fusedopt: installing without _stand_in: {record.reason}"]


def test_a_switch_has_three_values(stand_in):
    with pytest.raises(SystemExit, match="FUSEDOPT_STAND_IN='yes': use 0, 1 or auto"):
        stand_in.build(FUSEDOPT_STAND_IN="yes")


@needs_compiler
def test_a_compiler_without_openmp_builds_for_one_thread(stand_in, tmp_path, capfd):
    compiler = tmp_path / "compiler"
    real = shutil.which("c++")
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1;; esac\n{real} "$@"\n')
    compiler.chmod(0o755)
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


@pytest.fixture(scope="module")
def modules():
    return table()


def test_the_table_names_files_that_exist(modules):
    missing = [u.source for m in modules for u in m.units if not (ROOT / u.source).is_file()]
    assert not missing


@pytest.mark.parametrize(
    ("machine", "levels"),
    [("x86_64", ["generic", "avx2", "avx512"]), ("aarch64", ["generic"])],
)
def test_instruction_sets_by_machine(modules, machine, levels, tmp_path):
    cpu = next(module for module in modules if module.name == "_cpu")
    tool = build_native.Tool(["c++"], "", machine)
    text = build_native.ninja_text(cpu, tool, tool, tmp_path)
    assert re.findall(r"-DFUSEDOPT_SIMD=(\w+)", text) == levels
    for level in ("AVX2", "AVX512"):
        assert (f"-DFUSEDOPT_HAVE_{level}" in text) == (level.lower() in levels)
        assert (f"-m{level.lower()}" in text) == (level.lower() in levels)


@pytest.fixture
def project(tmp_path, modules):
    return Project(tmp_path, modules)


@needs_compiler
def test_no_wheel_ships_what_another_build_made(project):
    def cpu_wheel(**env):
        tags, names, records = project.wheel(**env)
        return tags, names, records["_cpu"]

    tags, names, record = cpu_wheel()
    assert record["built"], record["reason"]
    assert record["compiler"]
    assert any(name.startswith("fusedopt/_cpu.") for name in names)
    assert "-none-any" not in tags

    tags, names, record = cpu_wheel(FUSEDOPT_CPU="0")
    assert not record["built"]
    assert not any(name.startswith("fusedopt/_cpu.") for name in names)
    assert tags == "py3-none-any"
    assert len(list((project.root / "build").iterdir())) == 2  # a directory for each

    (project.root / "fusedopt/gone.py").touch()
    assert "fusedopt/gone.py" in cpu_wheel()[1]
    (project.root / "fusedopt/gone.py").unlink()
    project.sources[0].write_text("#error this cannot be")
    tags, names, record = cpu_wheel()
    assert "#error this cannot be" in record["reason"]
    assert not any(name.startswith(("fusedopt/_cpu.", "fusedopt/gone")) for name in names)
    assert tags == "py3-none-any"


@needs_compiler
def test_in_place_and_then_not(project):
    assert project.run("setup.py", "-q", "build_ext", "--inplace").returncode == 0
    assert len(project.native_in_tree) == 1
    done = project.run("setup.py", "-q", "build_ext", "--inplace", PATH="")
    assert "installing without _cpu: no C++ compiler on PATH" in done.stderr
    assert project.native_in_tree == []


def test_pip_installs_without_a_compiler(project):
    pip = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target=out", "."]
    done = project.run(*pip, PATH="")
    assert done.returncode == 0, done.stderr
    config = runpy.run_path(str(project.root / "out/fusedopt/_build_config.py"))["BUILD_CONFIG"]
    assert config["version"] == "0.1.0"
    assert "no C++ compiler" in config["modules"]["_cpu"]["reason"]

    done = project.run(*pip, PATH="", FUSEDOPT_CPU="1")
    assert done.returncode != 0
    assert "FUSEDOPT_CPU=1, but _cpu was not built: no C++ compiler" in done.stderr
