"""The readers of listings, sass.py and amdgcn.py, must be able to see what no kernel may have."""

from __future__ import annotations

import amdgcn
import pytest
import sass

NVIDIA = """
		Function : _ZN1a13reduce_kernelE
        /*0020*/                   LDG.E.EF.128 R8, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/               @P1 LDG.E.EF.128 R12, desc[UR4][R4.64+0x200] ;
        /*0040*/                   FADD R0, R9, R0 ;
        /*0060*/                   FFMA R16, R8.reuse, R12, RZ ;
        /*0070*/                   STG.E.EF.128 desc[UR4][R2.64], R16 ;
        /*0080*/               @P2 BRA 0x20 ;
        /*0090*/                   EXIT ;
"""
AMD = """
k:                                      ; @k
; %bb.0:
	s_load_dwordx4 s[0:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_4
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[8:11], v[20:21], off
	s_cbranch_scc1 .LBB0_3
; %bb.2:                                ;   in Loop: Header=BB0_1 Depth=1
	global_load_dwordx4 v[12:15], v[22:23], off offset:16
	s_branch .LBB0_5
.LBB0_3:                                ;   in Loop: Header=BB0_1 Depth=1
	global_load_dwordx3 v[12:14], v[22:23], off
.LBB0_5:                                ;   in Loop: Header=BB0_1 Depth=1
	global_load_dwordx2 v[30:31], v29, s[2:3]
	v_dual_fmac_f32 v8, v0, v9 :: v_dual_mul_f32 v4, v4, v12
	global_store_dwordx4 v[24:25], v[8:11], off
	s_cbranch_scc0 .LBB0_1
.LBB0_4:
	s_endpgm
.Lfunc_end0:
"""


def loop_of(text: str) -> list:
    if text.startswith(AMD[:8]):
        return amdgcn.widest_way(amdgcn.parse_code(text), "BB0_1")
    (code,) = sass.parse_code(text.splitlines()).values()
    (loop,) = sass.innermost_loops(code)
    return loop


SASS_LINE, AMD_LINE = "        /*0028*/                   {} ;\n", "\t{}\n"


@pytest.mark.parametrize(
    ("text", "second", "line", "late"),
    [
        (NVIDIA, "        /*0030*/", SASS_LINE.format("FADD R0, R11, R0"), True),
        (NVIDIA, "        /*0030*/", SASS_LINE.format("STG.E [R2], R8"), True),
        (NVIDIA, "        /*0030*/", SASS_LINE.format("FADD R11, R7, R0"), False),
        (AMD, "\tglobal_load_dwordx4 v[12", AMD_LINE.format("v_mul_f32_e32 v3, v0, v11"), True),
        (AMD, "\tglobal_load_dwordx4 v[12", AMD_LINE.format("v_mul_f32_e32 v11, v0, v3"), False),
    ],
)
def test_a_load_after_a_use_is_late(text, second, line, late):
    """And one after what uses other registers is not."""
    loop = loop_of(text)
    assert [i.is_wide for i in loop if i.is_load or i.is_store] == [True, True, True]
    assert sass.late_loads(loop) == []
    changed = loop_of(text.replace(second, line + second))
    assert len(changed) == len(loop) + 1
    assert len(sass.late_loads(changed)) == late


def test_loads_after_a_store_are_another_batch():
    loop = loop_of(NVIDIA)
    assert sass.batches([*loop, *loop]) == [loop, loop]


@pytest.mark.parametrize(
    ("opcode", "bits", "generic"),
    [
        ("LDG.E.EF.128.SYS", 128, False), ("LDG.E.128.STRONG.GPU", 128, False),
        ("STG.E.EF.64", 64, False), ("LDG.E.EF", 32, False), ("LDG.E.EF.U16", 16, False),
        ("STG.E.ENL2.256", 256, False), ("LDS.128", 128, False), ("LD.E", 32, True),
        ("ST.E.128", 128, True), ("LDL.64", 64, True), ("STL", 32, True),
    ],
)  # fmt: skip
def test_accesses(opcode, bits, generic):
    instruction = sass.Instruction(0, opcode, ("R0",))
    assert (instruction.bits, instruction.is_generic_or_local) == (bits, generic)


@pytest.mark.parametrize(
    ("opcode", "between"),
    [("ds_write_b128", True), ("ds_bpermute_b32", True), ("s_barrier_signal", True),
     ("s_waitcnt", False)],
)  # fmt: skip
def test_accesses_between_threads(opcode, between):
    assert amdgcn.Instruction(opcode, ("v0",)).between_threads is between
