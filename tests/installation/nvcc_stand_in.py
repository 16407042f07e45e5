"""A CUDA toolkit for tests of the build: its nvcc hands the source to the C++ compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from build_stand_in import ENV

KNOWN = {"50", "75", "80", "90"}

# What the build asks nvcc for, and a compilation by the C++ compiler. argv is logged.
NVCC = """\
#!{python}
import json, os, subprocess, sys
words = sys.argv[1:]
with open({folder!r} + "/log", "a") as log:
    log.write(json.dumps([words, sorted(k for k in os.environ if k.startswith("NVCC_"))]) + "\\n")
if "--version" in words:
    sys.exit(print("Cuda compilation tools, release {release}, V{release}.0"))
if "--list-gpu-code" in words:
    sys.exit(print("\\n".join(f"sm_{{n}}" for n in {codes!r})))
if "--dryrun" in words:
    print('#$ INCLUDES="-I{folder}/include"  ', file=sys.stderr)
    print('#$ LIBRARIES=  "-L{folder}/lib/stubs" "-L{folder}/lib"', file=sys.stderr)
    sys.exit()
if {fails!r}:
    open(words[words.index("-o") + 1], "w").write("half an object")
    sys.exit({fails!r})
passed = []
for word in words:
    if word.startswith("-Xcompiler="):
        passed.append(word.partition("=")[2].replace("\\\\,", ","))
    elif word in ("-MMD", "-MF", "-c", "-o") or not word.startswith("-"):
        passed.append(word)
sys.exit(subprocess.call(["c++", "-x", "c++", "-I{folder}/include", *passed]))
"""


class Toolkit:
    """A folder laid out as a CUDA toolkit, with the nvcc above."""

    def __init__(self, root, release="12.8", codes=KNOWN, fails=""):
        self.root, self.log = root, root / "log"  # argv of each call, and NVCC_ variables it saw
        for name in ("bin", "include", "lib"):
            (root / name).mkdir(parents=True)
        nvcc = root / "bin/nvcc"
        values = {"release": release, "codes": sorted(codes), "fails": fails}
        nvcc.write_text(NVCC.format(python=sys.executable, folder=str(root), **values))
        nvcc.chmod(0o755)
        subprocess.run(["ar", "rc", root / "lib/libcudart_static.a"], check=True)

    @property
    def on_path(self) -> dict[str, str]:
        return {"PATH": f"{self.root}/bin{os.pathsep}{ENV['PATH']}"}

    @property
    def compilation(self) -> list[str]:
        """argv of the last compilation."""
        return json.loads(self.log.read_text().splitlines()[-1])[0]
