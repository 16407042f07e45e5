"""What `cuobjdump` says about the kernels in a binary: resources, and the loops of their SASS."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # architecture and mangled name of a kernel


def find_tools() -> Path | None:
    """A folder with `cuobjdump` and `nvdisasm`: a CUDA toolkit's, or the one in triton's wheel."""
    candidates = [os.environ.get(name, "") + "/bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates += [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")  # does not import it
    for place in triton.submodule_search_locations or [] if triton else []:
        candidates.append(place + "/backends/nvidia/bin")
    for folder in candidates:
        if all(shutil.which(tool, path=folder) for tool in ("cuobjdump", "nvdisasm")):
            return Path(folder)
    return None


def cuobjdump(tools: Path, *words: str) -> str:
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [str(tools / "cuobjdump"), *words], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse_resources(text: str) -> dict[Key, dict[str, int]]:
    """Of `cuobjdump -res-usage`: registers, stack and so on by kernel."""
    found: dict[Key, dict[str, int]] = {}
    arch = name = ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[arch, name] = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.EF.128
    operands: tuple[str, ...]

    @property
    def is_load(self) -> bool:
        """From global memory."""
        return self.opcode.startswith("LDG.")

    @property
    def is_store(self) -> bool:
        return self.opcode.startswith("STG.")

    @property
    def is_generic_or_local(self) -> bool:
        """Through an address that may lie anywhere, or in spilled registers."""
        return re.match(r"(LD|ST|LDL|STL)(\.|$)", self.opcode) is not None

    @property
    def bits(self) -> int:
        """Width of a load or store."""
        widths = re.findall(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(widths[-1]) if widths else 32

    @property
    def is_wide(self) -> bool:
        """Of 16 bytes a thread."""
        return self.bits == 128

    def reads(self) -> set[int]:
        written = 0  # so many operands in front are results; the first may be a predicate's
        if not self.opcode.startswith(("ST", "RED", "BRA", "CALL")) and self.operands:
            written = 2 if re.match(r"!?U?P[\dT]", self.operands[0]) else 1
        text = " ".join(self.operands[written:])
        return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}

    def loaded(self) -> set[int]:
        """Registers that this load fills."""
        first = re.match(r"R(\d+)", self.operands[0])
        if not first:
            return set()
        return {int(first[1]) + i for i in range(max(1, self.bits // 32))}


def parse_code(lines: Iterable[str]) -> dict[Key, list[Instruction]]:
    """Of `cuobjdump -sass`."""
    found: dict[Key, list[Instruction]] = {}
    arch = ""
    code: list[Instruction] = []
    for line in lines:
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            code = found.setdefault((arch, match[1]), [])
        elif match := re.match(
            r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[\dT]\s+)?(\S+)\s*(.*?)\s*;", line
        ):
            operands = tuple(word.strip() for word in match[3].split(",")) if match[3] else ()
            code.append(Instruction(int(match[1], 16), match[2], operands))
    return found


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a branch back and its target, where nothing in it does the same."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for i, instruction in enumerate(code):
        if instruction.opcode.startswith("BRA") and instruction.operands:
            target = re.search(r"0x([0-9a-f]+)", instruction.operands[-1])
            if target and place.get(int(target[1], 16), i) < i:
                spans.append((place[int(target[1], 16)], i))
    return [
        code[first : last + 1]
        for first, last in spans
        if not any(o != (first, last) and first <= o[0] and o[1] <= last for o in spans)
    ]


def batches(loop: list[Instruction]) -> list[list[Instruction]]:
    """The loop, cut where it loads again after a store: each part loads, computes and stores."""
    parts: list[list[Instruction]] = [[]]
    stored = False
    for instruction in loop:
        if instruction.is_load and stored:
            parts.append([])
            stored = False
        stored = stored or instruction.is_store
        parts[-1].append(instruction)
    return parts


def late_loads(batch: Iterable[Any]) -> list[Any]:
    """Wide loads that stand behind the first use of a loaded value: they start too late.

    Of these instructions, or of those of amdgcn.py.
    """
    waiting: set[Any] = set()
    used = False
    late = []
    for instruction in batch:
        used = used or bool(waiting & instruction.reads())
        if instruction.is_load:
            late += [instruction] if used and instruction.is_wide else []
            waiting |= instruction.loaded()
    return late
