"""The reader of AMD's assembler text, amdgcn.py, on a short one."""

from __future__ import annotations

import amdgcn
from amdgcn import Instruction

LISTING = """
	.globl	k
k:                                      ; @k
; %bb.0:
	s_load_dwordx4 s[0:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_4
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v[20:21], off
	s_cbranch_scc1 .LBB0_3
; %bb.2:                                ;   in Loop: Header=BB0_1 Depth=1
	global_load_dwordx4 v[4:7], v[22:23], off offset:16
	s_branch .LBB0_5
.LBB0_3:                                ;   in Loop: Header=BB0_1 Depth=1
	global_load_dwordx3 v[4:6], v[22:23], off
	s_waitcnt vmcnt(0)
	v_mov_b32_e32 v7, v6
.LBB0_5:                                ;   in Loop: Header=BB0_1 Depth=1
	global_load_dwordx2 v[30:31], v29, s[2:3]
	v_dual_fmac_f32 v8, v0, v9 :: v_dual_mul_f32 v4, v4, v11
	global_store_dwordx4 v[24:25], v[0:3], off
	s_cbranch_scc0 .LBB0_1
.LBB0_4:
	s_endpgm
.Lfunc_end0:
	.amdhsa_float_denorm_mode_32 3
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 0
    .vgpr_count:     96
"""


def test_reading_resources_and_modes():
    found = amdgcn.parse_resources(LISTING)
    assert found == {"agpr_count": 0, "private_segment_fixed_size": 0, "vgpr_count": 96}
    assert amdgcn.parse_modes(LISTING) == {"float_denorm_mode_32": 3}


def test_reading_blocks():
    blocks = amdgcn.parse_code(LISTING)
    names = ["entry", "%bb.0", "BB0_1", "%bb.2", "BB0_3", "BB0_5", "BB0_4"]
    assert [block.name for block in blocks] == names
    assert [block.targets for block in blocks[2:]] == [["BB0_3"], ["BB0_5"], [], ["BB0_1"], []]
    assert [b.name for b in blocks if not b.falls_through] == ["%bb.2", "BB0_4"]
    assert [b.name for b in amdgcn.loops(blocks)["BB0_1"]] == ["BB0_1", "%bb.2", "BB0_3", "BB0_5"]


def test_reading_instructions():
    _, _, header, _, _, last, _ = amdgcn.parse_code(LISTING)
    load, record, fma, mul, store = header.code[0], *last.code[:4]
    assert load == Instruction("global_load_dwordx4", ("v[0:3]", "v[20:21]", "off"))
    assert load.is_load and load.is_wide and load.loaded() == {"v0", "v1", "v2", "v3"}
    assert load.reads() == {"v20", "v21"}
    assert not record.is_load and not record.is_store  # the same for all threads
    assert (fma.opcode, fma.reads()) == ("v_dual_fmac_f32", {"v0", "v9"})
    assert (mul.opcode, mul.reads()) == ("v_dual_mul_f32", {"v4", "v11"})
    assert store.is_store and store.is_wide
    assert store.reads() == {"v24", "v25", "v0", "v1", "v2", "v3"}


def test_the_widest_way_has_no_narrow_load():
    way = amdgcn.widest_way(amdgcn.parse_code(LISTING), "BB0_1")
    assert [i.is_wide for i in way if i.is_load or i.is_store] == [True, True, True]
    assert not [i for i in way if i.opcode == "v_mov_b32_e32"]
    assert amdgcn.late_loads(way) == []


def test_a_load_after_a_use_is_late():
    way = amdgcn.widest_way(amdgcn.parse_code(LISTING), "BB0_1")
    use = Instruction("v_mul_f32_e32", ("v9", "v10", "v3"))
    assert amdgcn.late_loads([way[0], use, *way[1:]]) == [way[2]]
    other = Instruction("v_mul_f32_e32", ("v3", "v10", "v9"))  # reads nothing that was loaded
    assert amdgcn.late_loads([way[0], other, *way[1:]]) == []


def test_accesses_between_threads():
    for opcode in ("ds_write_b128", "ds_bpermute_b32", "s_barrier", "s_barrier_signal"):
        assert Instruction(opcode, ("v0",)).between_threads
    assert not Instruction("s_waitcnt", ("vmcnt(0)",)).between_threads


def test_widths():
    for opcode in ("global_load_dwordx4", "global_store_b128"):
        assert Instruction(opcode, ("v[0:3]", "v[4:5]", "off")).is_wide
    for opcode in ("global_load_dwordx3", "global_load_b32", "global_load_ushort"):
        assert not Instruction(opcode, ("v0", "v[4:5]", "off")).is_wide
