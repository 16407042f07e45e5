"""What AMD's assembler text says about a kernel: resources, and the way through a loop.

Streams are read through an address of every thread's own (``off``), records through one that all of
them share (``s[2:3]``).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WORDS = {"dwordx2": 2, "dwordx3": 3, "dwordx4": 4, "b64": 2, "b96": 3, "b128": 4}


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]

    @property
    def of_stream(self) -> bool:
        return self.opcode.startswith("global_") and "off" in self.operands[-1].split()

    @property
    def is_load(self) -> bool:
        return self.opcode.startswith("global_load") and self.of_stream

    @property
    def is_store(self) -> bool:
        return self.opcode.startswith("global_store") and self.of_stream

    @property
    def is_wide(self) -> bool:
        """Of 16 bytes a thread."""
        return WORDS.get(self.opcode.rpartition("_")[2]) == 4

    @property
    def between_threads(self) -> bool:
        """A barrier, or an access to shared memory."""
        return self.opcode.startswith(("ds_", "s_barrier"))

    def reads(self) -> set[str]:
        first = 0 if "store" in self.opcode else 1
        return {name for operand in self.operands[first:] for name in registers(operand)}

    def loaded(self) -> set[str]:
        """Registers that this load fills."""
        return set(registers(self.operands[0]))


def registers(operand: str) -> Iterator[str]:
    for single, first, last in re.findall(r"\bv(?:(\d+)\b|\[(\d+):(\d+)\])", operand):
        yield from (f"v{i}" for i in range(int(first or single), int(last or single) + 1))


@dataclass
class Block:
    """What runs without a branch into it."""

    name: str
    loop: str = ""  # the header of the innermost loop that it belongs to
    code: list[Instruction] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        branches = [i for i in self.code if re.match(r"s_c?branch", i.opcode)]
        return [branch.operands[0].removeprefix(".L") for branch in branches]

    @property
    def falls_through(self) -> bool:
        return not self.code or self.code[-1].opcode not in ("s_branch", "s_endpgm")


def parse_resources(text: str) -> dict[str, int]:
    """From the metadata that the loader reads."""
    return {k: int(v) for k, v in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}


def parse_modes(text: str) -> dict[str, int]:
    """How the hardware is set up for the kernel: rounding, denormals and so on."""
    return {k: int(v) for k, v in re.findall(r"^\s*\.amdhsa_(\w+) (\d+)$", text, re.MULTILINE)}


def parse_code(text: str) -> list[Block]:
    blocks = [Block("entry")]
    for line in text.partition(".Lfunc_end0:")[0].splitlines():
        code, _, comment = line.partition(";")
        if start := re.match(r"\s*(?:\.L(BB\d+_\d+):|; (%bb\.\d+):)", line):
            blocks.append(Block(start[1] or start[2]))
        if header := re.search(r"in Loop: Header=(BB\d+_\d+)", comment):
            blocks[-1].loop = header[1]
        elif "This Inner Loop Header" in comment:
            blocks[-1].loop = blocks[-1].name
        for part in code.split("::"):  # two issued as one
            if match := re.match(r"\s+([a-z]\w+)(?:\s+(.*?))?\s*$", part):
                operands = tuple(word.strip() for word in (match[2] or "").split(","))
                blocks[-1].code.append(Instruction(match[1], operands))
    return blocks


def loops(blocks: list[Block]) -> dict[str, list[Block]]:
    """Those without a loop in them, by header."""
    headers = {block.loop for block in blocks if block.loop == block.name}
    return {name: [block for block in blocks if block.loop == name] for name in headers}


def widest_way(blocks: list[Block], header: str) -> list[Instruction]:
    """Once through a loop: the way with the most wide accesses and no narrow one, if there is."""
    after = {b.name: n.name for b, n in itertools.pairwise(blocks) if b.falls_through}
    inside = {block.name: block for block in blocks if block.loop == header}

    def worth(block: Block) -> int:
        streams = [i for i in block.code if i.is_load or i.is_store]
        return sum(1 if i.is_wide else -100 for i in streams)

    @functools.cache
    def best(name: str) -> tuple[int, tuple[str, ...]]:
        block = inside[name]
        follow = [*block.targets, *([after[name]] if name in after else [])]
        ways = [best(n) for n in follow if n in inside and n != header]
        points, way = max(ways, default=(0, ()))
        return points + worth(block), (name, *way)

    return [i for name in best(header)[1] for i in inside[name].code]
