"""The CUDA module's build: which nvcc, for which architectures, and what happens without one.

Most of it with the stand-in nvcc of nvcc_stand_in.py, which needs no CUDA toolkit.
"""

from __future__ import annotations

import os
import re
import shutil

import pytest
from build_stand_in import (
    ENV,
    ROOT,
    SOURCE,
    Project,
    StandIn,
    build_compilers,
    build_native,
    needs_compiler,
    table,
)
from nvcc_stand_in import KNOWN, Toolkit

architectures = build_compilers.architectures


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
    for tool in ("c++", "ar", "ld", "as"):
        found = shutil.which(tool, path=ENV["PATH"])
        if found:
            (path / tool).symlink_to(found)
    return {"PATH": os.pathsep.join([str(path), *folders])}


# ---- architectures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ("", "sm_75 sm_80 sm_90 compute_90"),
        ("  ", "sm_75 sm_80 sm_90 compute_90"),
        ("8.0", "sm_80"),
        ("7.5;8.0+PTX", "sm_75 sm_80 compute_80"),
        ("7.5 8.0+PTX 9.0", "sm_75 sm_80 sm_90 compute_80"),
        ("8.0;8.0+PTX", "sm_80 compute_80"),
        ("5.0;9.0a+PTX", "sm_50 sm_90a compute_90a"),
    ],
)
def test_the_customary_list_of_architectures(asked, built):
    assert architectures(asked, KNOWN, "12.8") == built.split()


def test_ptx_is_for_the_newest_by_number():
    assert architectures("", {"90", "100", "120"}, "13.0")[-1] == "compute_120"


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
    with pytest.raises(build_compilers.NotBuilt, match=reason):
        architectures(asked, KNOWN, "12.8")


# ---- a stand-in nvcc ----------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_where_it_is_said_to_be(stand_in, no_nvcc, variable, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit")
    path = f"{toolkit.root}/bin{os.pathsep}{no_nvcc['PATH']}"
    place = {
        "CUDACXX": str(toolkit.root / "bin/nvcc"),
        "CUDA_HOME": str(toolkit.root),
        "CUDA_PATH": str(toolkit.root),
        "PATH": path,
    }
    record = stand_in.build(**no_nvcc | {variable: place[variable]})
    assert record.built, record.reason
    assert stand_in.value() == 1
    assert record.architectures == ["sm_75", "sm_80", "sm_90", "compute_90"]
    assert re.match(r"nvcc 12\.8 with \S+ .*\d", record.compiler)


@needs_compiler
def test_what_nvcc_is_told(stand_in, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit")
    flags = {
        "CXXFLAGS": "-DEXTRA=10 -Ofast -Wl,-z,now",
        "NVCC_PREPEND_FLAGS": "--use_fast_math -lineinfo",
        "NVCC_APPEND_FLAGS": "-fmad=true",
        "TORCH_CUDA_ARCH_LIST": "8.0+PTX",
        "MAX_JOBS": "3",
    }
    record = stand_in.build(**toolkit.on_path, **flags)
    assert record.built, record.reason
    assert stand_in.value() == 11
    words = toolkit.compilation
    assert "NVCC_" not in toolkit.log.read_text()  # else nvcc would put them behind ours
    assert not any("use_fast_math" in word for word in words)
    assert words.index("-fmad=true") < words.index("-fmad=false")
    assert "-Xcompiler=-Ofast" not in words
    assert "-Xcompiler=-fno-fast-math" in words
    assert {"-lineinfo", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"} < set(words)
    assert "-Xcompiler=-fvisibility=hidden" in words
    assert "--threads=3" in words
    assert [word for word in words if "-gencode" in word] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]


@needs_compiler
@pytest.mark.parametrize("release", ["11.8", "12.8"])
def test_machine_code_is_packed_so_that_old_drivers_can_read_it(stand_in, tmp_path, release):
    toolkit = Toolkit(tmp_path / "toolkit", release=release)
    assert stand_in.build(**toolkit.on_path).built
    words = toolkit.compilation
    assert "-Xfatbin=-compress-all" in words
    assert ("-compress-mode=speed" in words) == (release == "12.8")  # no such option before


@needs_compiler
def test_a_cpp_file_beside_it_finds_the_toolkits_headers(stand_in, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit")
    (toolkit.root / "include/stand_in_runtime.h").write_text("#define RUNTIME 40\n")
    stand_in.module = build_native.Module(
        "_stand_in",
        "FUSEDOPT_STAND_IN",
        (*stand_in.module.units, build_native.Unit("csrc/beside.cpp")),
    )
    stand_in.write("beside.cpp", "#include <stand_in_runtime.h>\nint beside = RUNTIME;\n")
    record = stand_in.build(**toolkit.on_path)
    assert record.built, record.reason


@needs_compiler
def test_a_changed_header_is_compiled_again(stand_in, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit")
    stand_in.build(**toolkit.on_path)
    before = stand_in.object_time
    stand_in.build(**toolkit.on_path)
    assert stand_in.object_time == before
    stand_in.write("value.h", "#define VALUE 2\n")
    stand_in.build(**toolkit.on_path)
    assert stand_in.value() == 2
    stand_in.build(**toolkit.on_path, TORCH_CUDA_ARCH_LIST="9.0")
    assert "-gencode=arch=compute_90,code=sm_90" in toolkit.compilation


FAILS = "host_config.h:143:2: error: #error -- unsupported GNU version!"
OBSTACLES = [
    pytest.param({}, {"FUSEDOPT_SANITIZE": "address"}, "FUSEDOPT_SANITIZE is set", id="sanitized"),
    pytest.param({"release": "11.4"}, {}, "nvcc 11.4 is too old: .* CUDA 11.8", id="too old"),
    pytest.param({"codes": ["35", "50"]}, {}, "none of the architectures 75, 80,", id="old archs"),
    pytest.param({"fails": FAILS}, {}, f"compiling failed: {FAILS}", id="host compiler too new"),
    pytest.param(
        {"fails": "nvcc fatal   : Unsupported gpu architecture"},
        {},
        "compiling failed: nvcc fatal   : Unsupported gpu architecture",
        id="fails half-way",
    ),
]


@needs_compiler
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


@needs_compiler
def test_settings_for_a_compiler_that_is_not_there(stand_in, no_nvcc):
    """They may stand in a profile that several machines share."""
    record = stand_in.build(**no_nvcc, TORCH_CUDA_ARCH_LIST="9.0", NVCC_THREADS="4")
    assert record.reason.startswith("no CUDA compiler: ")


@needs_compiler
def test_no_nvcc_anywhere(stand_in, no_nvcc):
    record = stand_in.build(**no_nvcc)
    assert record.reason.startswith("no CUDA compiler: nvcc is neither on PATH nor in ")


@needs_compiler
def test_a_toolkit_without_the_static_runtime(stand_in, tmp_path):
    toolkit = Toolkit(tmp_path / "toolkit")
    (toolkit.root / "lib/libcudart_static.a").unlink()
    (toolkit.root / "lib/libcudart.so").touch()
    assert "cannot find -lcudart_static" in stand_in.build(**toolkit.on_path).reason


@needs_compiler
def test_after_a_failure_the_next_build_is_whole(stand_in, tmp_path):
    broken = Toolkit(tmp_path / "broken", fails="nvcc fatal   : no")
    assert not stand_in.build(**broken.on_path).built
    assert stand_in.build(**Toolkit(tmp_path / "toolkit").on_path).built
    assert stand_in.value() == 1


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


def _nvcc_missing() -> str:
    try:
        build_compilers.find_nvcc(os.environ, build_compilers.find_cxx(ENV))
    except build_compilers.NotBuilt as problem:
        return str(problem)
    return ""


needs_nvcc = pytest.mark.skipif(bool(_nvcc_missing()), reason=_nvcc_missing())


@pytest.fixture
def real():
    chosen = {name: os.environ[name] for name in build_compilers.VARIABLES if name in os.environ}
    return chosen | {"TORCH_CUDA_ARCH_LIST": "8.0", "NVCC_APPEND_FLAGS": "--use_fast_math"}


@needs_nvcc
def test_a_changed_header_is_compiled_again_by_nvcc(tmp_path, real):
    stand_in = StandIn(tmp_path, ".cu", KERNEL)
    record = stand_in.build(**real)
    assert record.built, record.reason
    assert stand_in.value() == 1
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


# ---- the whole package --------------------------------------------------------------------------


def test_the_table_has_every_file():
    cuda = next(module for module in table() if module.name == "_cuda")
    assert cuda.switch == "FUSEDOPT_CUDA"
    sources = {unit.source for unit in cuda.units}
    files = [*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
    assert {file.relative_to(ROOT).as_posix() for file in files} == sources


@needs_compiler
def test_a_wheel_has_what_could_be_built(tmp_path):
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", table())
    auto = {"FUSEDOPT_CUDA": "auto", "FUSEDOPT_CPU": "0"}
    tags, names, records = project.wheel(**Toolkit(tmp_path / "toolkit").on_path | auto)
    assert records["_cuda"]["built"], records["_cuda"]["reason"]
    assert records["_cuda"]["architectures"] == ["sm_75", "sm_80", "sm_90", "compute_90"]
    assert any(name.startswith("fusedopt/_cuda.") for name in names)
    assert "-none-any" not in tags

    broken = Toolkit(tmp_path / "broken", fails="nvcc fatal   : no")
    tags, names, records = project.wheel(**broken.on_path | auto)
    assert "nvcc fatal   : no" in records["_cuda"]["reason"]
    assert not any(name.startswith("fusedopt/_cuda.") for name in names)
    assert tags == "py3-none-any"
