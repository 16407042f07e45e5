"""The binaries, and how they are compiled: ahead of a step, whatever its values.

``reduce``, ``reduce_exactly`` (for ``norm_bits="exact"``) and ``finalize`` have one variant for
each rule. ``update`` has three for each number of states: ``float32`` for plans of fp32 params,
gradients and states, ``any`` for plans of fp32 states and masters, and ``coded``. All else
that differs between steps (codecs, masters, lengths, alignment, clipping, decay, a rule's own
variants) is read from tables at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedopt.rules.declaration import declared

from . import kernels
from .rules import TEXTS

THREADS = 128  # of update
BLOCK = 8 * THREADS  # elements: 16 bytes of 16-bit values a thread
SHARED = ("reduce", "reduce_exactly", "finalize")
STREAMS = ("float32", "any", "coded")
COUNTS = ("n_rows", "n_chunks", "n_devices", "own_number")


@dataclass(frozen=True)
class Variant:
    """A kernel and the constants that it is compiled with."""

    verb: str  # one of SHARED, or update
    rule: str
    states: int = 0  # update only: most states of a tensor; kinds of streams
    streams: str = ""

    @property
    def name(self) -> str:
        own = f"-{self.states}-{self.streams}" if self.verb == "update" else ""
        return f"{self.verb}-{self.rule}{own}"

    @property
    def kernel(self) -> Any:
        return getattr(kernels, f"{self.verb}_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        rule = {"RULE": TEXTS[self.rule]}
        if self.verb != "update":
            return rule
        return {
            **rule,
            "STATES": self.states,
            "STREAMS": self.streams,
            "BLOCK": BLOCK // 2 if self.streams == "coded" else BLOCK,
        }

    def options(self, target: GPUTarget) -> dict[str, Any]:
        """Compiler options. Rounding is the numeric contract's, whatever Triton's default."""
        threads = THREADS if self.verb == "update" else target.warp_size
        options = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
        if target.backend == "cuda":
            # 80 registers: six blocks of update on a multiprocessor; 96: five
            options["maxnreg"] = 96 if self.streams == "coded" else 80
        elif target.warp_size == 32:
            options["waves_per_eu"] = 16  # on RDNA, 96 registers
        return options


def all_variants() -> list[Variant]:
    shared = [Variant(verb, rule) for verb in SHARED for rule in TEXTS]
    updates = [
        Variant("update", rule, states, streams)
        for rule in TEXTS
        for states in range(declared(rule).fewest_states, len(declared(rule).states) + 1)
        for streams in STREAMS
    ]
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
