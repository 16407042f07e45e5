"""What ptxas made of the CUDA kernels, read from the built module: no GPU needed.

With FUSEDOPT_REQUIRE_CUDA_BUILD=1 what would be skipped fails.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import sass
from sass import Instruction, Key

from fusedopt.rules.declaration import declared

REGISTERS = 64  # with more, no four blocks of 256 threads fit on a multiprocessor
REGISTERS_OF_EXACT = 80  # three blocks


def _skip(reason: str) -> None:
    if os.environ.get("FUSEDOPT_REQUIRE_CUDA_BUILD") == "1":
        pytest.fail(f"{reason} and FUSEDOPT_REQUIRE_CUDA_BUILD=1", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def binary() -> Path:
    spec = importlib.util.find_spec("fusedopt._cuda")
    if spec is None or spec.origin is None:
        _skip("the native module fusedopt._cuda is not built")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def tools(binary: Path) -> Path:
    folder = sass.find_tools()
    if folder is None:
        _skip("no cuobjdump and nvdisasm: neither a CUDA toolkit nor the triton package has them")
    return folder


@pytest.fixture(scope="module")
def code(binary: Path, tools: Path) -> dict[Key, list[Instruction]]:
    return hot(sass.parse_code(sass.cuobjdump(tools, "-sass", str(binary)).splitlines()))


class Kind(NamedTuple):
    """What a kernel was compiled for; ``states`` is -1 of the two that reduce."""

    rule: str
    states: int = -1
    coded: bool = False


REDUCE, EXACT = Kind(""), Kind("exact")


def expected_kinds() -> set[Kind]:
    """Of every rule in the module: a kernel for each number of states that a tensor may have."""
    kinds = {REDUCE, EXACT}
    for name in importlib.import_module("fusedopt._cuda").RULES:
        for n in range(declared(name).fewest_states, len(declared(name).states) + 1):
            kinds |= {Kind(name, n, coded) for coded in (False, True)}
    return kinds


def hot(kernels: dict) -> dict:
    """Those that see every element: reduce, its exact variant and the variants of update."""
    found = {key: value for key, value in kernels.items() if kind(key)}
    for arch in {arch for arch, _ in kernels}:
        assert {kind(key) for key in found if key[0] == arch} == expected_kinds(), arch
    return found


def of_floats(code: dict[Key, list[Instruction]]) -> dict[Key, list[Instruction]]:
    """Those whose states and masters are fp32."""
    return {key: kernel for key, kernel in code.items() if not kind(key).coded}


def accesses(kind: Kind) -> tuple[int, int, int]:
    """One pass of a thread through the loop over fp32 tensors: loads and stores of 16 bytes, and
    how many times it waits for loads. More than four streams do not fit in registers at once."""
    if kind in (REDUCE, EXACT):
        return 8, 0, 1
    return 2 * (kind.states + 2), 2 * (kind.states + 1), 1 if kind.states < 3 else 2


def kind(key: Key) -> Kind | None:
    if "reduce_kernel" in key[1]:
        return REDUCE
    if "reduce_exactly_kernel" in key[1]:
        return EXACT
    update = re.search(r"update_kernelINS_\d+([A-Za-z]\w*?)ELi(\d+)ELb([01])", key[1])
    return Kind(update[1].lower(), int(update[2]), update[3] == "1") if update else None


def vector_loops(kernel: list[Instruction]) -> list[list[Instruction]]:
    """The loops that load and store 16 bytes at a time."""
    loops = sass.innermost_loops(kernel)
    return [x for x in loops if any(i.is_load and i.is_wide for i in x)]


def test_the_binary_holds_what_the_build_recorded(binary, tools):
    from fusedopt._build_config import BUILD_CONFIG

    recorded = BUILD_CONFIG["modules"]["_cuda"]["architectures"]
    code = re.findall(r"\.(sm_\w+)\.cubin", sass.cuobjdump(tools, "-lelf", str(binary)))
    ptx = re.findall(r"\.sm_(\w+)\.ptx", sass.cuobjdump(tools, "-lptx", str(binary)))
    assert set(code) | {f"compute_{n}" for n in ptx} == set(recorded)


def test_registers_and_no_spills(binary, tools, code):
    resources = sass.parse_resources(sass.cuobjdump(tools, "-res-usage", str(binary)))
    for key, used in hot(resources).items():
        most = REGISTERS_OF_EXACT if kind(key) == EXACT else REGISTERS
        assert used["REG"] <= most, (key, used)
        assert used["STACK"] == used["LOCAL"] == 0, (key, used)
        assert not [i for i in code[key] if re.match(r"(LDL|STL)\b", i.opcode)], key


def test_fp32_tensors_go_16_bytes_at_a_time(code):
    for key, kernel in of_floats(code).items():
        shapes = set()
        for loop in vector_loops(kernel):
            loads, stores = [i for i in loop if i.is_load], [i for i in loop if i.is_store]
            parts = sass.batches(loop)
            assert all(i.is_wide for i in stores), key
            # every stream that is stored was loaded wide; of the rest a loop has its gradient
            assert sum(i.is_wide for i in loads) >= len(stores), key
            at = [hex(i.address) for batch in parts for i in sass.late_loads(batch)]
            # an exact sum has so much arithmetic that ptxas loads halves one after the other
            halves = kind(key) == EXACT and len(loads) == 4
            assert halves or not at, f"{key}: {kind(key)} starts loads late at {at}"
            if all(i.is_wide for i in loads):  # the gradient, too, is on a 16-byte boundary
                assert not [i for i in loop if i.is_generic_or_local], key
                waits = sum(any(i.is_load for i in part) for part in parts)
                shapes.add((len(loads), len(stores), waits))
        assert accesses(kind(key)) in shapes, (key, shapes)


def test_coded_streams_go_four_elements_at_a_time(code):
    """By a thread: a warp's access is one run of memory, whatever the codec. What is left over of a
    row, and streams off their boundaries, have a loop of their own. Codes are 4 bytes then, and
    their scale one byte, which one thread writes."""
    for key in code.keys() - of_floats(code).keys():
        states = kind(key).states
        whole, single = [], []
        for loop in sass.innermost_loops(code[key]):
            (whole if any(i.is_store and i.is_wide for i in loop) else single).append(loop)
        (loop,) = whole
        assert not [i for i in loop if i.is_generic_or_local], key
        stores = Counter(i.bits for i in loop if i.is_store)
        # param, master and states, whatever the width of each; and each state's scale
        streams = 2 + states
        assert stores == {128: streams, 64: streams, 32: streams, 8: 2 * states}, (key, stores)
        loads = Counter(i.bits for i in loop if i.is_load)
        assert loads[128] == loads[64] == streams + 1, (key, loads)  # the gradient, too
        assert any(i.is_store and i.bits == 8 for part in single for i in part), key


def test_old_drivers_can_unpack_it(binary):
    """Zstandard, which nvcc 13 uses unasked, is unknown to drivers before 550."""
    content, zstandard, kinds = binary.read_bytes(), 0x8000, set()
    start = 0
    while (start := content.find(struct.pack("<IH", 0xBA55ED50, 1), start)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", content, start)
        entry, start = start + header, start + header + size
        while entry < start:
            _, _, entry_header, entry_size = struct.unpack_from("<HHIQ", content, entry)
            (flags,) = struct.unpack_from("<Q", content, entry + 40)
            kinds.add(flags & 0xF000)
            entry += entry_header + entry_size
    assert kinds
    assert zstandard not in kinds, kinds


def test_the_cuda_runtime_inside_is_hidden(binary):
    """torch brings another one; the dynamic linker must mix up neither's functions."""
    if not shutil.which("nm"):
        _skip("no nm: binutils is not installed")
    listed = subprocess.run(["nm", "-D", str(binary)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "PyInit__cuda" in names
    assert not [name for name in names if re.match(r"_*(cuda|cu[A-Z])", name)]
