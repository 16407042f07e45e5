"""The reader of kernel listings, sass.py, on short ones."""

from __future__ import annotations

import pytest
import sass
from sass import Instruction

LISTING = """
Fatbin elf code:
arch = sm_90
	code for sm_90
		Function : _ZN1a13reduce_kernelE
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/              @!P0 EXIT ;                               /* 0x000000000000094d */
        /*0020*/                   LDG.E.EF.128 R8, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/                   LDG.E.EF.128 R12, desc[UR4][R4.64+0x200] ;
        /*0040*/                   FADD R0, R9, R0 ;
        /*0050*/              @P1  BRA 0x70 ;
        /*0060*/                   FFMA R16, R8.reuse, R12, RZ ;
        /*0070*/                   STG.E.EF.128 desc[UR4][R2.64], R16 ;
        /*0080*/               @P2 BRA 0x20 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def listing(*changes: tuple[str, str]) -> list[Instruction]:
    text = LISTING
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (kernel,) = sass.parse_code(text.splitlines()).values()
    return kernel


def test_reading_a_listing():
    kernel = listing()
    assert [i.address for i in kernel] == list(range(0, 0xB0, 0x10))
    assert kernel[2] == Instruction(0x20, "LDG.E.EF.128", ("R8", "desc[UR4][R2.64]"))
    assert kernel[1].opcode == "EXIT" and kernel[1].predicated
    assert kernel[2].loaded() == {8, 9, 10, 11}
    assert kernel[2].reads() == {2}
    assert kernel[6].reads() == {8, 12}
    assert kernel[7].reads() == {2, 16}
    assert list(sass.parse_code(LISTING.splitlines())) == [("sm_90", "_ZN1a13reduce_kernelE")]


def test_reading_loops():
    (loop,) = sass.innermost_loops(listing())  # the branch to itself at the end is padding
    assert [i.address for i in loop] == list(range(0x20, 0x90, 0x10))


def test_only_innermost_loops_count():
    nested = listing(("@P1  BRA 0x70", "@P1  BRA 0x40"))
    (inner,) = sass.innermost_loops(nested)
    assert [i.address for i in inner] == [0x40, 0x50]


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E.EF.128.SYS", 128),
        ("LDG.E.128.STRONG.GPU", 128),
        ("STG.E.EF.64", 64),
        ("LDG.E.EF", 32),
        ("LDG.E.EF.U16", 16),
        ("STG.E.ENL2.256", 256),
    ],
)
def test_widths(opcode, bits):
    assert Instruction(0, opcode, ("R0",)).bits == bits


@pytest.mark.parametrize("opcode", ["LD.E", "ST.E.128", "LDL.64", "STL"])
def test_generic_and_local_accesses(opcode):
    assert Instruction(0, opcode, ("R0",)).is_generic_or_local
    assert not Instruction(0, "LDG.E", ("R0",)).is_generic_or_local
    assert not Instruction(0, "LDS.128", ("R0",)).is_generic_or_local


def test_a_load_after_a_use_is_late():
    (loop,) = sass.innermost_loops(listing())
    assert sass.late_loads(loop) == []
    used = Instruction(0x28, "FADD", ("R0", "R9", "R0"))
    assert sass.late_loads([loop[0], used, *loop[1:]]) == [loop[1]]
    other = Instruction(0x28, "FADD", ("R9", "R7", "R0"))  # reads nothing that was loaded
    assert sass.late_loads([loop[0], other, *loop[1:]]) == []


def test_loads_after_a_store_are_another_batch():
    (loop,) = sass.innermost_loops(listing())
    again = [*loop, *loop]
    assert [len(batch) for batch in sass.batches(again)] == [len(loop), len(loop)]
    assert [sass.late_loads(batch) for batch in sass.batches(again)] == [[], []]


RESOURCES = """
Fatbin elf code:
arch = sm_75
Resource usage:
 Common:
  GLOBAL:0
 Function _Z3foov:
  REG:18 STACK:8 SHARED:112 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_reading_resources():
    ((key, used),) = sass.parse_resources(RESOURCES).items()
    assert key == ("sm_75", "_Z3foov")
    assert (used["REG"], used["STACK"], used["LOCAL"]) == (18, 8, 0)
