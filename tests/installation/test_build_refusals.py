"""The build where something is in its way: a setting, the disk, a compiler that is none.

Without a module nobody hears of it, since pip shows no line of an installation that succeeds. So
only a machine without a working compiler installs without.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
from build_stand_in import ENV, SOURCE, StandIn, Toolkit, first_on_path, needs_compiler, script

pytestmark = needs_compiler


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path / "project")


@pytest.fixture
def kernels(tmp_path):
    return StandIn(tmp_path / "project", ".cu", SOURCE)


def compiler_that(folder, does):
    """A c++ on PATH, found and not chosen: `does`, or what the real one does."""
    real = shutil.which("c++", path=ENV["PATH"])
    script(folder / "bin/c++", f'#!/bin/sh\n{does}\nexec {real} "$@"\n')
    return first_on_path(folder / "bin")


OFF = {"FUSEDOPT_STAND_IN": "0"}
OBSTACLES = [
    ({"PATH": ""}, r"no C\+\+ compiler on PATH \(looked for c\+\+"),
    ({"PATH": "", "CXXFLAGS": "-O2", "MAX_JOBS": "3"}, r"no C\+\+ compiler"),
    ({**OFF, "MAX_JOBS": "x", "CXX": "no-such-cxx"}, "FUSEDOPT_STAND_IN=0 was set"),
]


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


FOUND = [
    ("exit 3", "c.. does not work: `-dumpmachine` ends with exit status 3"),
    ("exit 0", "c.. is not gcc or clang: to `-dumpmachine` it says nothing"),
    ("echo hello; exit 0", "c.. is not gcc or clang: to `-dumpmachine` it says hello"),
    ('case "$*" in *.cpp*) echo "ld: fatal: no"; exit 1; esac', "compiling failed: ld: fatal: no"),
    ('case "$*" in *.cpp*) exit 0; esac', "cannot be imported: .* No such file"),
    ('case "$*" in *stand_in*) echo "error: no"; exit 1; esac', "compiling failed: error: no"),
]  # fmt: skip


@pytest.mark.parametrize(("does", "reason"), FOUND)
def test_without_a_compiler_that_works_it_is_left_out(stand_in, tmp_path, does, reason):
    path = compiler_that(tmp_path, does)
    record = stand_in.build(**path)
    assert not record.built
    assert re.search(reason, record.reason), record.reason


def test_flags_of_the_users_may_be_to_blame(stand_in, tmp_path):
    broken = compiler_that(tmp_path, 'case "$*" in *stand_in*) echo "error: no"; exit 1; esac')
    blame = "error: no .*; correct or unset CXXFLAGS='-O2'; FUSEDOPT_STAND_IN=0 installs"
    with pytest.raises(SystemExit, match=blame):
        stand_in.build(**broken, CXXFLAGS="-O2")
    assert not stand_in.build(**broken, CUDA_HOME="/no-such", MAX_JOBS="2").built


REFUSED = [
    ({"CXX": "no-such-cxx"}, "compiler CXX=no-such-cxx was not found; correct or unset it"),
    ({"CXX": "false"}, "CXX=false: false does not work: `-dumpmachine` ends with exit status 1"),
    ({"CXX": "true"}, "CXX=true: true is not gcc or clang: to `-dumpmachine` it says nothing"),
    ({"CXX": "ccache no-such-cxx"}, "CXX=ccache no-such-cxx"),
    ({"CXXFLAGS": "'-O2"}, "CXXFLAGS=.* cannot be read"),
    ({"CXXFLAGS": "-no-such-flag"}, "error: .*; correct or unset CXXFLAGS='-no-such-flag'; "),
    ({"LDFLAGS": "-lno_such"}, "-lno_such.*; correct or unset LDFLAGS='-lno_such'; "),
    ({"FUSEDOPT_SANITIZE": "soap"}, "error: .*; correct or unset FUSEDOPT_SANITIZE='soap'; "),
    ({"MAX_JOBS": "0"}, "MAX_JOBS='0' is not a number from 1 up; correct or unset it"),
    ({"MAX_JOBS": "1.5"}, "MAX_JOBS='1.5' is not a number from 1 up; correct or unset it"),
]  # fmt: skip


@pytest.mark.parametrize(("env", "reason"), REFUSED)
def test_a_wrong_setting_fails_the_build(stand_in, env, reason):
    """Else nobody hears of it: pip shows no line of a build that succeeds."""
    with pytest.raises(SystemExit, match=f"{reason}.*FUSEDOPT_STAND_IN=0 installs without it"):
        stand_in.build(**env)
    assert not stand_in.target.exists()


USES_THE_LIBRARY = SOURCE + "int* more() { return new int(VALUE); }\n"


def test_what_was_built_is_imported_before_anybody_gets_it(stand_in, tmp_path):
    stand_in.write(
        stand_in.source,
        SOURCE.replace("int value()", "int no_such(); int f = no_such(); int value()"),
    )
    record = stand_in.build()
    assert re.match(
        "it was compiled and cannot be imported: ImportError: .* undefined symbol: .*no_such",
        record.reason,
    )
    assert not stand_in.target.exists()
    with pytest.raises(
        SystemExit, match=r"FUSEDOPT_STAND_IN=1, .* cannot be imported: ImportError: "
    ):
        stand_in.build(FUSEDOPT_STAND_IN="1")
    stand_in.write(stand_in.source, SOURCE + "#include <cstdlib>\nint f = (abort(), 0);\n")
    assert "cannot be imported: exit status -6" in stand_in.build().reason


def test_a_compiler_of_c_alone(stand_in):
    c = "gcc" if shutil.which("gcc", path=ENV["PATH"]) else "clang"
    stand_in.write(stand_in.source, USES_THE_LIBRARY)
    with pytest.raises(SystemExit, match=f"CXX has to name a C.. compiler, .* unset CXX='{c}'; "):
        stand_in.build(CXX=c)


@pytest.mark.parametrize("where", ["build.ninja", "_stand_in.log", "lock"])
def test_a_full_disk_is_no_reason_to_do_without(stand_in, where):
    stand_in.folder.mkdir()
    (stand_in.folder / where).symlink_to("/dev/full" if where != "lock" else "/no/such/folder")
    with pytest.raises(SystemExit, match=r"_stand_in was not built: \[Errno (28|2)\] "):
        stand_in.build()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("probe", "cc.s: No space left on device"),
        ("stand_in", "Killed signal terminated"),
        ("-shared", "cc.s: No space left on device"),
    ],
)
def test_a_machine_without_room_is_no_reason_to_do_without(stand_in, tmp_path, what, says):
    """Nor to do without threads."""
    full = compiler_that(tmp_path, f'case "$*" in *{what}*) echo "c++: {says}"; exit 1; esac')
    with pytest.raises(SystemExit, match=f"_stand_in was not built: .*{says}"):
        stand_in.build(**full)


def test_half_a_copy_is_not_left(stand_in, tmp_path, monkeypatch):
    def copy(_, target):
        Path(target).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(SystemExit, match="No space left on device"):
        stand_in.build()
    assert not stand_in.target.exists()


@pytest.mark.parametrize("missing", ["ninja", "pybind11"])
def test_what_the_build_itself_needs(stand_in, tmp_path, monkeypatch, missing):
    """pip brings them, unless --no-build-isolation says that they are there."""
    find, which = importlib.util.find_spec, shutil.which
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else find(n))
    monkeypatch.setattr(shutil, "which", lambda n, **k: None if n == missing else which(n, **k))
    with pytest.raises(SystemExit, match=f"{missing} was not found; pip install {missing}, or "):
        stand_in.build()


def test_ninja_of_an_isolated_build(stand_in, monkeypatch):
    """Its package does not know where it is; it is on PATH."""
    ninja = pytest.importorskip("ninja")
    path = f"{ninja.BIN_DIR}{os.pathsep}{ENV['PATH']}"
    monkeypatch.setattr(ninja, "BIN_DIR", "")
    assert stand_in.build(PATH=path).built


def test_a_python_without_headers(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    record = stand_in.build()
    assert f"there is no Python.h in {tmp_path}; install this Python's headers" in record.reason


def test_a_sanitized_module_is_not_imported(stand_in):
    """Its runtimes would have to be preloaded."""
    stand_in.write(stand_in.source, SOURCE + "#include <cstdlib>\nint f = (abort(), 0);\n")
    assert stand_in.build(FUSEDOPT_SANITIZE="undefined").built


# ---- nvcc ---------------------------------------------------------------------------------------

FAKES = [
    ("", r"--version` it says nothing"),
    ("echo hello", r"--version` it says hello"),
    ("echo release 12.8", r"--list-gpu-code` it says release 12\.8"),
]


@pytest.mark.parametrize(("does", "said"), FAKES)
def test_what_is_called_nvcc_and_is_not(kernels, tmp_path, does, said):
    fake = script(tmp_path / "bin/nvcc", f"#!/bin/sh\n{does}\n")
    reason = f"{fake} is not nvcc: to `{said}"
    record = kernels.build(**first_on_path(fake.parent))
    assert re.fullmatch(reason, record.reason), record.reason
    with pytest.raises(SystemExit, match=f"{reason}; correct or unset CUDACXX='{fake}'; "):
        kernels.build(CUDACXX=str(fake))


REFUSED_BY_NVCC = [
    ({"CUDA_HOME": "/no-such"}, "no nvcc in CUDA_HOME=/no-such: .*; correct or unset CUDA_HOME; "),
    ({"CUDA_PATH": "/no-such"}, "no nvcc in CUDA_PATH=/no-such: .*; correct or unset CUDA_PATH; "),
    ({"CUDACXX": "no-nvcc"}, "CUDA compiler CUDACXX=no-nvcc was not found; correct or unset it; "),
    ({"CUDACXX": "false"}, "false does not work: `--version` ends .* unset CUDACXX='false'; "),
    ({"CUDACXX": "echo"}, "echo is not nvcc: to `--.*; correct or unset CUDACXX='echo'; "),
    ({"CXX": "no-such-cxx"}, "C.. compiler CXX=no-such-cxx was not found; correct or unset it; "),
    ({"TORCH_CUDA_ARCH_LIST": "6.1"}, "TORCH_CUDA_ARCH_LIST='6.1': .* makes no code for 6.1; "),
    ({"TORCH_CUDA_ARCH_LIST": "Ampere"}, "TORCH_CUDA_ARCH_LIST='Ampere': .* or unset it; "),
    ({"NVCC_APPEND_FLAGS": "'"}, "NVCC_APPEND_FLAGS=.* cannot be read: "),
    ({"NVCC_THREADS": "-1"}, "NVCC_THREADS='-1' is not a number from 0 up; correct or unset it; "),
    ({"NVCC_THREADS": "all"}, "NVCC_THREADS='all' is not a number from 0 up"),
    ({"MAX_JOBS": "0"}, "MAX_JOBS='0' is not a number from 1 up; correct or unset it; "),
]


@pytest.mark.parametrize(("env", "reason"), REFUSED_BY_NVCC)
def test_a_wrong_setting_for_nvcc_fails_the_build(kernels, tmp_path, env, reason):
    toolkit = Toolkit(tmp_path / "toolkit")
    with pytest.raises(SystemExit, match=f"{reason}.*FUSEDOPT_STAND_IN=0 installs without it"):
        kernels.build(**toolkit.on_path | env)
    assert not kernels.target.exists()


UNSUPPORTED = "host_config.h:143:2: error: #error -- unsupported GNU version!"


def test_a_toolkit_that_was_chosen_and_fails(kernels, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit", fails=UNSUPPORTED)
    with pytest.raises(SystemExit, match=f"{UNSUPPORTED} .*; correct or unset CUDA_HOME="):
        kernels.build(CUDA_HOME=str(toolkit.root))
