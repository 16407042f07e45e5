"""Does compiled code round as the kernels say? Of PTX and of AMD's assembler text."""

from __future__ import annotations

import re
from collections import Counter

import amdgcn

ARITHMETIC = ("add", "sub", "mul", "fma", "div", "sqrt")


def float_opcodes(ptx: str) -> Counter[str]:
    """Arithmetic on floating-point numbers: not moves, comparisons, changes of sign."""
    found = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]*\.b?f(?:16|32|64)\w*)\s", ptx, re.M)
    silent = ("mov.", "ld.", "st.", "setp.", "selp.", "neg.", "abs.", "min.", "max.", "cvt.")
    found = [opcode for opcode in found if not opcode.startswith(silent)]
    found += [opcode for opcode in found if opcode.endswith("x2")]  # one of them is two
    return Counter(opcode.removesuffix("x2") for opcode in found)


def unfaithful(ptx: str) -> list[str]:
    """Instructions that round otherwise than once to the nearest, or may be made to."""
    approximate = re.findall(r"\S*\.(?:approx|ftz|full)\S*", ptx)
    faithful = {f"{name}.rn.{kind}" for name in ARITHMETIC for kind in ("f32", "f64")}
    return approximate + sorted(set(float_opcodes(ptx)) - faithful)


def fused(name: str, ptx: str) -> bool:
    """By the compiler: in fp64, and in finalize, the kernels themselves fuse nothing."""
    found = float_opcodes(ptx)
    return bool(found["fma.rn.f64"] or (name.startswith("finalize") and found["fma.rn.f32"]))


def opcodes(text: str) -> Counter[str]:
    """Of AMD, without their encodings."""
    code = [i for block in amdgcn.parse_code(text) for i in block.code]
    return Counter(re.sub(r"_(e32|e64|sdwa|dpp)$", "", i.opcode) for i in code)


def unfaithful_for_amd(text: str) -> list[str]:
    """What is set up or computed otherwise than it has to be."""
    wrong = []
    modes = amdgcn.parse_modes(text)
    for kind in ("32", "16_64"):
        if modes[f"float_denorm_mode_{kind}"] != 3:
            wrong.append(f"denormals of {kind} are flushed")
        if modes[f"float_round_mode_{kind}"] != 0:
            wrong.append(f"{kind} are not rounded to the nearest, ties to even")
    found = opcodes(text)
    for kind in ("f32", "f64"):
        # a reciprocal only ever begins a division
        steps = [found[f"v_{step}_{kind}"] for step in ("rcp", "div_fmas", "div_fixup")]
        if len({*steps, found[f"v_div_scale_{kind}"] / 2}) != 1:
            wrong.append(f"a division of {kind} is not refined")
    # the first of a root of fp64, of which the rest mends special values
    roots = found["v_sqrt_f32"] + found["v_rsq_f64"]
    if found["v_cmp_class_f32"] + found["v_cmp_class_f64"] < roots:
        wrong.append("a root is not refined")
    never = r"s_setreg|s_denorm|v_rsq_f32|v_sqrt_f64|v_rcp_iflag"
    return wrong + [opcode for opcode in found if re.match(never, opcode)]


def fused_for_amd(text: str) -> bool:
    """By the compiler, in fp64: more than divisions and roots consist of."""
    found = opcodes(text)
    fused = sum(n for opcode, n in found.items() if re.match(r"v_fma(c|mk|ak)?_f64", opcode))
    return fused != 5 * found["v_div_fixup_f64"] + 7 * found["v_rsq_f64"]
