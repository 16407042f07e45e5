"""The CUDA module's build: which nvcc, for which architectures, and what happens without one.

Most of it with a stand-in for nvcc, which needs no CUDA toolkit.
"""

from __future__ import annotations

import os
import re
import shutil

import pytest
from build_stand_in import (
    ENV,
    SOURCE,
    StandIn,
    Toolkit,
    build_compilers,
    needs_compiler,
    problem_of,
)

pytestmark = needs_compiler
KNOWN = {"50", "75", "80", "90"}


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path / "project", ".cu", SOURCE)


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """The variables for a machine that has none."""
    monkeypatch.setattr(build_compilers, "CUDA_FALLBACK", str(tmp_path / "cuda"))
    folders = [f for f in ENV["PATH"].split(os.pathsep) if not os.path.exists(f"{f}/nvcc")]
    path = tmp_path / "path"  # compilers may lie in the folder of nvcc
    path.mkdir()
    for tool in ("c++", "ld", "as"):
        found = shutil.which(tool, path=ENV["PATH"])
        if found:
            (path / tool).symlink_to(found)
    return {"PATH": os.pathsep.join([str(path), *folders])}


def find_nvcc(**env):
    return build_compilers.find_nvcc(ENV | env, build_compilers.find_cxx(ENV))


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ("  ", "sm_75 sm_80 sm_90 compute_90"),
        ("8.0", "sm_80"),
        ("7.5 8.0+PTX;9.0", "sm_75 sm_80 sm_90 compute_80"),
        ("8.0;8.0+PTX", "sm_80 compute_80"),
        ("5.0;9.0a+PTX", "sm_50 sm_90a compute_90a"),
    ],
)
def test_the_customary_list_of_architectures(asked, built):
    assert build_compilers.architectures(asked, KNOWN, "12.8") == built.split()


def test_ptx_is_for_the_newest_by_number():
    assert build_compilers.architectures("", {"90", "100", "120"}, "13.0")[-1] == "compute_120"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("Turing", r"TORCH_CUDA_ARCH_LIST='Turing': 'Turing' is not .* '7.5;8.0;9.0\+PTX'"),
        ("75", "'75' is not understood"),
        ("8.0;sm_90", "'sm_90' is not understood"),
        ("8.0+ptx", r"'8.0\+ptx' is not understood"),
        ("8.0;12.0", "nvcc 12.8 makes no code for 12.0"),
    ],
)
def test_a_wrong_list_of_architectures(asked, reason):
    with pytest.raises(build_compilers.Refused, match=reason):
        build_compilers.architectures(asked, KNOWN, "12.8")


# ---- a stand-in nvcc ----------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_where_it_is_said_to_be(no_nvcc, variable, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit")
    path = f"{toolkit.root}/bin{os.pathsep}{no_nvcc['PATH']}"
    places = {"CUDACXX": f"{toolkit.root}/bin/nvcc", "PATH": path}
    tool = find_nvcc(**no_nvcc | {variable: places.get(variable, str(toolkit.root))})
    assert tool.command == [f"{toolkit.root}/bin/nvcc"]
    assert re.match(r"nvcc 12\.8 with \S+ .*\d", tool.version)


def test_what_nvcc_is_told(stand_in, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit")
    flags = {
        "CXXFLAGS": "-DEXTRA=10 -Ofast -Wl,-z,now",
        "LDFLAGS": "-Wl,-z,relro",
        "NVCC_PREPEND_FLAGS": "--use_fast_math -lineinfo",
        "NVCC_APPEND_FLAGS": "-fmad=true",
        "TORCH_CUDA_ARCH_LIST": "8.0+PTX",
        "MAX_JOBS": "3",
    }
    record = stand_in.build(**toolkit.on_path, **flags)
    assert record.built, record.reason
    assert record.architectures == ["sm_80", "compute_80"]
    assert stand_in.value() == 11
    words, linking = toolkit.called("csrc/stand_in.cu"), toolkit.called("-shared")
    assert "NVCC_" not in toolkit.log.read_text()  # else nvcc would put them behind ours
    assert not any("use_fast_math" in word for word in words)
    assert words.index("-fmad=true") < words.index("-fmad=false")
    assert "-Xcompiler=-Ofast" not in words
    assert "-Xcompiler=-fno-fast-math" in words
    assert {"-lineinfo", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"} < set(words)
    assert "-Xcompiler=-fvisibility=hidden" in words
    assert "--threads=3" in words
    for call in (words, linking):
        assert [word for word in call if "-gencode" in word] == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_80,code=compute_80",
        ]
    assert {"-cudart=static", r"-Xcompiler=-Wl\,-z\,relro"} < set(linking)


@pytest.mark.parametrize("release", ["11.8", "12.8"])
def test_machine_code_is_packed_so_that_old_drivers_can_read_it(tmp_path, release):
    flags = find_nvcc(**Toolkit(tmp_path / "toolkit", release=release).on_path).compile_flags
    assert "-Xfatbin=-compress-all" in flags
    assert ("-compress-mode=speed" in flags) == (release == "12.8")  # no such option before


FAILS = "host_config.h:143:2: error: #error -- unsupported GNU version!"
FATAL = "nvcc fatal   : Unsupported gpu architecture"
OBSTACLES = [
    pytest.param({}, {"FUSEDOPT_SANITIZE": "address"}, "FUSEDOPT_SANITIZE is set", id="sanitized"),
    pytest.param({"release": "11.4"}, {}, "nvcc 11.4 is too old: .* CUDA 11.8", id="too old"),
    pytest.param({"codes": ["35", "50"]}, {}, "none of the architectures 75, 80,", id="old archs"),
    pytest.param({"fails": FAILS}, {}, f"compiling failed: {FAILS}", id="host compiler too new"),
    pytest.param({"fails": FATAL}, {}, f"compiling failed: {FATAL}", id="fails half-way"),
]


@pytest.mark.parametrize(("toolkit", "env", "reason"), OBSTACLES)
def test_without_a_working_nvcc_it_is_left_out(stand_in, tmp_path, toolkit, env, reason, capfd):
    env = Toolkit(tmp_path / "toolkit", **toolkit).on_path | env
    record = stand_in.build(**env)
    assert not record.built
    assert not stand_in.target.exists()
    assert re.search(reason, record.reason), record.reason
    assert "\n" not in record.reason
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == f"fusedopt: installing without _stand_in: {record.reason}"
    with pytest.raises(SystemExit, match="FUSEDOPT_STAND_IN=1, but _stand_in was not built: "):
        stand_in.build(**env, FUSEDOPT_STAND_IN="1")


def test_after_a_failure_the_next_build_is_whole(stand_in, tmp_path):
    """Half an object was left."""
    assert not stand_in.build(**Toolkit(tmp_path / "broken", fails=FATAL).on_path).built
    assert stand_in.build(**Toolkit(tmp_path / "toolkit").on_path).built
    assert stand_in.value() == 1


def test_no_nvcc_anywhere(stand_in, no_nvcc):
    """Settings for it may stand in a profile that several machines share."""
    record = stand_in.build(**no_nvcc, TORCH_CUDA_ARCH_LIST="9.0", NVCC_THREADS="4")
    assert record.reason.startswith("no CUDA compiler: nvcc is neither on PATH nor in ")


# ---- the real one -------------------------------------------------------------------------------

KERNEL = """
#include "value.h"
#ifdef __USE_FAST_MATH__
#error fast-math came through
#endif
__global__ void store(int* p) { *p = VALUE; }
extern "C" __attribute__((visibility("default"))) int value() {
  cudaGetLastError();
  return VALUE;
}
"""
NO_NVCC = problem_of(lambda: find_nvcc(**os.environ))  # where CUDA_HOME may name one
needs_nvcc = pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)


@pytest.fixture
def real():
    chosen = {name: os.environ[name] for name in build_compilers.VARIABLES if name in os.environ}
    return chosen | {"TORCH_CUDA_ARCH_LIST": "8.0", "NVCC_APPEND_FLAGS": "--use_fast_math"}


@needs_nvcc
def test_a_changed_header_is_compiled_again_by_nvcc(tmp_path, real):
    stand_in = StandIn(tmp_path, ".cu", KERNEL)
    headers = "#include <cuda_runtime.h>\n"  # in a C++ file, too
    stand_in.write("init.cpp", headers + (tmp_path / "csrc/init.cpp").read_text())
    record = stand_in.build(**real)
    assert record.built, record.reason
    assert stand_in.value() == 1
    assert b"libcudart.so" not in stand_in.target.read_bytes()
    before = stand_in.object_time
    stand_in.build(**real)
    assert stand_in.object_time == before
    stand_in.write("value.h", "#define VALUE 2\n")
    stand_in.build(**real)
    assert stand_in.value() == 2


@needs_nvcc
def test_an_error_in_a_kernel_is_the_reason(tmp_path, real):
    stand_in = StandIn(tmp_path, ".cu", KERNEL.replace("*p", "no_such_name"))
    with pytest.raises(SystemExit, match='error: identifier "no_such_name" is undefined'):
        stand_in.build(**real)
