"""What Triton makes of its kernels, for GPUs that are not here, compiled ahead.

With another GPU's binary nobody notices a spill or a narrow load but by the clock, so both are read
from the machine code: SASS for NVIDIA, the assembler text for AMD.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import amdgcn
import pytest
import sass

pytest.importorskip("triton")

import triton
from triton_compile import AMD, KERNELS, NVIDIA, TARGETS, VARIANTS, kernel

from fusedopt.triton_kernels.rules import TEXTS
from fusedopt.triton_kernels.variants import Variant

REGISTERS = 96  # five blocks of update on a multiprocessor

# For AMD older releases are looked at by test_triton_versions.py alone: before 3.8 one variant
# takes 97 or 100 registers.
FOR_AMD = AMD if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else {}

HYPER = 7  # numbers of a tensor, at most


def each(targets: Collection[str], verb: str = "") -> pytest.MarkDecorator:
    """Every kernel of this verb that is compiled for these GPUs."""
    found = [(n, target) for n, target in KERNELS if target in targets and n.startswith(verb)]
    return pytest.mark.parametrize(("name", "target"), found)


def elements(variant: Variant, target: str) -> int:
    """Of a thread, in a whole block of update."""
    block: int = variant.constants["BLOCK"]
    return block // (TARGETS[target].warp_size * kernel(variant.name, target).metadata.num_warps)


def wide_accesses(variant: Variant, target: str) -> tuple[Counter[int], Counter[int]]:
    """Loads and stores that the whole blocks of update consist of, by their bits.

    The param and the states, and to read the gradient. All of them lie in memory as fp32 or as 16
    bits; where a variant serves both it has instructions for both.
    """
    n = elements(variant, target)
    read, written = variant.states + 2, variant.states + 1
    loads, stores = Counter({128: read * n // 4}), Counter({128: written * n // 4})
    if variant.streams == "any":  # besides: the gradient and the param; the param
        return loads + Counter({128: 2 * n // 8}), stores + Counter({128: n // 8})
    if variant.streams == "coded":  # n is four
        # 16 bits: and a half param beside its master. Codes: of a master, and of states but a
        # maximum over steps; with a scale for each block of them.
        states = sum(code != 0 for code in TEXTS[variant.rule].codes[: variant.states])
        codes = Counter({8 * n: states + 1, 8: states})
        return (
            loads + Counter({16 * n: read + 1}) + codes,
            stores + Counter({16 * n: written + 1}) + codes,
        )
    return loads, stores


@each({**NVIDIA, **FOR_AMD})
def test_what_a_launch_must_not_need(name, target):
    """The driver hands over no buffers, and asks for no launch of a special kind."""
    metadata = kernel(name, target).metadata
    for size in ("global_scratch_size", "profile_scratch_size"):
        assert getattr(metadata, size, 0) == 0, size  # older ones have none for AMD
    assert not metadata.launch_cooperative_grid
    assert metadata.num_ctas == 1
    assert metadata.shared <= 48 << 10  # more has to be asked for


# ---- NVIDIA -------------------------------------------------------------------------------------


def wide_loops(code: list[sass.Instruction]) -> list[list[sass.Instruction]]:
    loops = sass.innermost_loops(code)
    return [x for x in loops if any(i.is_load and i.is_wide for i in x)]


@each(NVIDIA)
def test_no_spills_and_accesses_of_16_bytes(name, target):
    group = kernel(name, target).metadata_group
    (path,) = (path for file, path in group.items() if file.endswith(".cubin"))
    # with Triton's own tools: older ones do not know the newest GPUs
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    listing = sass.cuobjdump(tools, "-sass", "-res-usage", str(path))
    (used,) = sass.parse_resources(listing).values()
    assert used["REG"] <= REGISTERS and used["STACK"] == used["LOCAL"] == 0, used
    (code,) = sass.parse_code(listing.splitlines()).values()
    if name.startswith("update"):
        assert_update_is_wide(VARIANTS[name], target, wide_loops(code))
    if name.startswith("reduce-"):
        assert_reduce_is_wide(wide_loops(code))
    if name.startswith("reduce_exactly-"):
        assert_reduce_exactly_is_wide(wide_loops(code))


def assert_update_is_wide(
    variant: Variant, target: str, loops: list[list[sass.Instruction]]
) -> None:
    n = elements(variant, target)
    expected, stores = wide_accesses(variant, target)
    widest = 0
    if variant.streams == "coded":
        return assert_coded_is_wide(loops, expected, stores)
    for loop in loops:
        loads = Counter(i.bits for i in loop if i.is_load)
        assert Counter(i.bits for i in loop if i.is_store) == stores
        widest = max(widest, loads.pop(128))
        assert loads.pop(64, 0) == expected[64]
        # left are the numbers of the tensor, and a gradient that is not aligned
        assert loads.pop(16, 0) <= (n if variant.streams == "any" else 0)
        assert loads.pop(32, 0) <= n + HYPER
        assert not loads
        assert not [i for i in loop if i.is_generic_or_local]
        if variant.streams != "any":
            # all loads are on their way before a value is used, and threads go their own ways
            assert len(sass.batches(loop)) == 1 and not sass.late_loads(loop)
            assert not [i for i in loop if re.match(r"(BAR|LDS|STS|SHFL)\b", i.opcode)]
    assert widest == expected[128]
    assert variant.streams == "any" or kernel(variant.name, target).metadata.shared == 0


def assert_coded_is_wide(
    loops: list[list[sass.Instruction]], expected: Counter[int], stores: Counter[int]
) -> None:
    """All loads of streams are on their way before a value is used, by threads of their own.

    What is read beside streams, and in their time again, are the records of the tensor.
    """
    (loop,) = loops
    loop = [i for i in loop if not i.is_load or ".EF" in i.opcode]  # streams are evicted first
    assert Counter(i.bits for i in loop if i.is_load) == expected
    assert Counter(i.bits for i in loop if i.is_store) == stores
    assert len(sass.batches(loop)) == 1 and not sass.late_loads(loop)
    assert not [i for i in loop if i.is_generic_or_local]
    # the largest of a block of scales is found in a warp
    assert not [i for i in loop if re.match(r"(BAR|LDS|STS)\b", i.opcode)]


def assert_reduce_is_wide(loops: list[list[sass.Instruction]]) -> None:
    loops = [x for x in loops if any(i.opcode.startswith("FFMA") for i in x)]  # not of partials
    assert len(loops) == 2  # the second scales
    for loop in loops:
        assert all(i.is_wide for i in loop if i.is_load)
        # 512 elements of a warp: fp32, and in the other branch of 16 bits
        assert sum(i.is_load for i in loop) == 4 + 2
        assert not [i for i in loop if i.is_generic_or_local or i.is_store]


def assert_reduce_exactly_is_wide(loops: list[list[sass.Instruction]]) -> None:
    assert len(loops) == 1
    for loop in loops:
        # 128 elements of a warp: fp32, and in the other branch of 16 bits
        assert sorted(i.bits for i in loop if i.is_load) == [64, 128]
        assert not [i for i in loop if i.is_generic_or_local or i.is_store]


@each(NVIDIA, "reduce")
def test_the_ticket_publishes_the_words(name, target):
    """The program that draws the last ticket reads what others wrote; no interpreter shows that."""
    lines = [line.strip() for line in kernel(name, target).asm["ptx"].splitlines()]
    adds = [i for i, line in enumerate(lines) if re.search(r"\bred\.", line)]
    (ticket,) = [i for i, line in enumerate(lines) if re.search(r"\batom\.", line)]
    found = [re.search(r"red\.global\.gpu\.relaxed\.(\w+\.\w+)", lines[i])[1] for i in adds]
    assert found == ["add.u64", "max.s64"]
    assert re.search(r"atom\.global\.gpu\.acq_rel\.add", lines[ticket])
    assert any(line.startswith("bar.sync") for line in lines[adds[-1] : ticket])
    after = lines[ticket:]
    (read,) = [i for i, line in enumerate(after) if re.search(r"ld\.global\S*\.cg\S*\.b64", line)]
    assert any(line.startswith("bar.sync") for line in after[:read])
    zeroed = next(i for i, line in enumerate(after) if "st.global" in line and ".b64" in line)
    assert any(line.startswith("bar.sync") for line in after[read:zeroed])


# ---- AMD ----------------------------------------------------------------------------------------


@each(FOR_AMD)
def test_no_spills_and_accesses_of_16_bytes_on_amd(name, target):
    text = kernel(name, target).asm["amdgcn"]
    used = amdgcn.parse_resources(text)
    # vgpr_count is of the accumulation registers, too, where there are any
    assert used["vgpr_count"] <= REGISTERS and used["private_segment_fixed_size"] == 0, used
    assert used["vgpr_spill_count"] == used["sgpr_spill_count"] == 0, used
    assert used.get("agpr_count", 0) == 0, used  # a spill by another name
    if name.startswith("update"):
        assert_update_is_wide_on_amd(VARIANTS[name], target, amdgcn.parse_code(text))
    if name.startswith("reduce-"):
        assert_reduce_is_wide_on_amd(target, amdgcn.parse_code(text))


def amd_bits(instruction: amdgcn.Instruction) -> int:
    """Width of a load."""
    narrow = {"ubyte": 8, "u8": 8, "ushort": 16, "b16": 16, "dword": 32, "b32": 32}
    name = instruction.opcode.rpartition("_")[2]
    return narrow.get(name) or 32 * amdgcn.WORDS[name]


def widest_ways(blocks: list[amdgcn.Block]) -> dict[str, list[amdgcn.Instruction]]:
    """Through the loops that read streams 16 bytes at a time."""
    ways = {header: amdgcn.widest_way(blocks, header) for header in amdgcn.loops(blocks)}
    return {h: way for h, way in ways.items() if any(i.is_load and i.is_wide for i in way)}


def assert_update_is_wide_on_amd(variant: Variant, target: str, blocks: list[amdgcn.Block]) -> None:
    loads, stores = wide_accesses(variant, target)
    widest, most = 0, 0
    for header, way in widest_ways(blocks).items():
        loop = [i for block in amdgcn.loops(blocks)[header] for i in block.code]
        if not any(i.is_store for i in loop):
            continue
        assert sum(i.is_store for i in loop) == stores.total()
        assert sum(i.is_wide for i in loop if i.is_store) == stores[128]
        widest = max(widest, sum(i.is_load and i.is_wide for i in way))
        most = max(most, sum(i.is_load and i.is_wide for i in loop))
        if variant.streams == "coded":
            assert Counter(amd_bits(i) for i in loop if i.is_load) == loads
            assert not [i for i in loop if i.opcode.startswith("s_barrier")]
        if variant.streams == "float32":
            assert not sass.late_loads(way)
            assert not [i for i in way if i.between_threads]
    if variant.streams == "any":  # no step takes the ways of an fp32 gradient and of a 16-bit one
        assert most >= loads[128]
    elif variant.streams == "coded":
        assert most == loads[128]
    else:
        assert widest == loads[128]
        assert kernel(variant.name, target).metadata.shared == 0


def assert_reduce_is_wide_on_amd(target: str, blocks: list[amdgcn.Block]) -> None:
    ways = widest_ways(blocks).items()
    # not of partials, which are fp64
    headers = [h for h, way in ways if any(re.search("_fma.*_f32", i.opcode) for i in way)]
    assert len(headers) == 2  # the second scales
    a_thread = 512 // TARGETS[target].warp_size
    for header in headers:
        loads = [i for b in amdgcn.loops(blocks)[header] for i in b.code if i.is_load]
        assert all(i.is_wide for i in loads)
        assert len(loads) == a_thread // 4 + a_thread // 8


@each(["gfx942"], "reduce")
def test_the_ticket_publishes_the_words_on_amd(name, target):
    lines = kernel(name, target).asm["amdgcn"].splitlines()
    atomics = [i for i, line in enumerate(lines) if "_atomic_" in line]
    *adds, ticket = atomics
    found = [re.match(r"\s*\w+_atomic_(\w+)", lines[i])[1] for i in adds]
    assert found == ["add_x2", "smax_x2"]
    assert "global_atomic_add" in lines[ticket]
    # a program is one wavefront: what it has added is over when the count of its accesses is zero
    assert any("buffer_wbl2 sc1" in line for line in lines[ticket - 8 : ticket])
    assert any("s_waitcnt vmcnt(0)" in line for line in lines[ticket - 4 : ticket])
    assert any("buffer_inv sc1" in line for line in lines[ticket : ticket + 8])
