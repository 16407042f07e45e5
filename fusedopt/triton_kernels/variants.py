"""Which binaries there are, and how they are compiled: ahead of a step, never by its values.

``reduce`` and ``finalize`` come in one variant a rule, ``update`` in two: ``float32``, for plans
whose params and gradients are all fp32, and ``any``. What else a step may be (dtypes, masters,
lengths, alignment, clipping, decay, momentum) is read from tables at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import kernels

RULES = ("adamw", "amsgrad", "sgd")
THREADS = 128  # of update
BLOCK = 8 * THREADS  # elements: 16 bytes of 16-bit values a thread
COUNTS = ("n_rows", "n_chunks", "n_totals", "own_total", "finalizes")


@dataclass(frozen=True)
class Variant:
    """A kernel with the constants that tell it from its siblings."""

    verb: str  # reduce, finalize or update
    rule: str
    halves: bool = False  # update only

    @property
    def name(self) -> str:
        streams = f"-{'any' if self.halves else 'float32'}" if self.verb == "update" else ""
        return f"{self.verb}-{self.rule}{streams}"

    @property
    def kernel(self) -> Any:
        return getattr(kernels, f"{self.verb}_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        if self.verb != "update":
            return {"RULE": self.rule}
        return {"RULE": self.rule, "HALVES": self.halves, "BLOCK": BLOCK}

    def options(self, target: GPUTarget) -> dict[str, Any]:
        """How it is compiled. Rounding is the numeric contract's, whatever Triton's default."""
        threads = THREADS if self.verb == "update" else target.warp_size
        options = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
        if target.backend == "cuda":
            options["maxnreg"] = 80  # six blocks of update a multiprocessor
        elif target.warp_size == 32:
            options["waves_per_eu"] = 16  # on RDNA, 96 registers
        return options


def all_variants() -> list[Variant]:
    shared = [
        Variant(verb, rule)
        for verb in ("reduce", "finalize")
        for rule in RULES
        if rule != "amsgrad"  # AdamW's own until the update
    ]
    updates = [Variant("update", rule, halves) for rule in RULES for halves in (False, True)]
    return shared + updates


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """The variant's ``triton.compiler.CompiledKernel``, from Triton's cache if it is there."""
    names = variant.kernel.arg_names
    constants = variant.constants
    types = {name: "i32" if name in COUNTS else "i64" for name in names}
    source = ASTSource(
        variant.kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    return triton.compile(source, target=target, options=variant.options(target))
