"""What a kernel's machine code says: its main loop, the instructions there, whether a loop waits for local memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)([^;]*);")
LABEL = re.compile(r"^\s*(\.L_\w+):")


@dataclass(frozen=True)
class Loop:
    """The work of one warp in an iteration of a loop: instructions, tensor core products and their FLOP (None if the
    instruction does not state its size), exponentials, bytes read and written."""

    instructions: int
    products: int
    flop: int | None
    exponentials: int
    bytes: int


def main_loop(machine: str) -> Loop:
    """The loop in which the kernel spends its time, see the docstring of this file."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in machine.splitlines():
        label, instruction = LABEL.match(line), INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(code)
        elif instruction and instruction[1] != "NOP":
            code.append((instruction[1], instruction[2]))
            target = re.search(r"`\((\.L_\w+)\)", instruction[2])
            # A branch to itself marks the end of the program.
            if instruction[1].startswith("BRA") and target and labels.get(target[1], len(code)) < len(code) - 1:
                loops.append((labels[target[1]], len(code)))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counted = [counts([name for name, _ in code[start:end]]) for start, end in innermost]
    return max(counted, key=lambda loop: (loop.products, loop.bytes)) if counted else counts([name for name, _ in code])


PRODUCTS_OF = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "QGMMA", "UTCQMMA")


def counts(names: list[str]) -> Loop:
    """The counts of a sequence of instructions."""
    flop: int | None = 0
    products = moved = 0
    for name in names:
        opcode = name.split(".")[0]
        if opcode in PRODUCTS_OF:
            products += 1
            product_flop = _flop(name)
            flop = None if flop is None or product_flop is None else flop + product_flop
        elif opcode in ("LDG", "STG", "LDGSTS"):
            width = re.search(r"\.[US]?(8|16|64|128)\b", name)
            moved += 32 * int(width[1] if width else 32) // 8
    return Loop(len(names), products, flop, sum(name.startswith("MUFU.EX2") for name in names), moved)


def _flop(name: str) -> int | None:
    """The FLOP of one warp in a product: HMMA.16816 is 16 x 8 x 16; four warps share an HGMMA.64xNx16.

    Those of fp8 (QMMA, QGMMA) count half: they take half the time.
    """
    group = re.match(r"(H|Q)GMMA\.(\d+)x(\d+)x(\d+)", name)
    if group:
        return 2 * int(group[2]) * int(group[3]) * int(group[4]) // (8 if group[1] == "Q" else 4)
    sizes = {"HMMA.16816": 2 * 16 * 8 * 16, "HMMA.1688": 2 * 16 * 8 * 8, "QMMA.16832": 16 * 8 * 32}
    return next((value for start, value in sizes.items() if name.startswith(start)), None)


def spills_in_a_loop(machine: str) -> bool:
    """Whether local memory is accessed between a label and a later branch to it.

    What is never read was not spilled: under Triton 3.6 each TMA copy of sm_120 has a branch to another block of a
    cluster, which is never taken; it would call a function, with an argument of 8 bytes in local memory.
    """
    if not re.search(r"\bLDL\b", machine):
        return False
    labels: dict[str, int] = {}
    accesses: list[int] = []
    for i, line in enumerate(machine.splitlines()):
        label = LABEL.match(line)
        target = re.search(r"\bBRA[.\w]* .*`\((\.L_\w+)\)", line)
        if label:
            labels[label[1]] = i
        elif re.search(r"\b(?:LDL|STL)\b", line):
            accesses.append(i)
        elif target and any(labels.get(target[1], i) < access for access in accesses):
            return True
    return False
