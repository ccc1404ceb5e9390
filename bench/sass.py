"""Reads compiled code of an NVIDIA GPU, the text of `cuobjdump -sass`: its loops, and what a warp executes in each.

A loop is a natural loop of the control-flow graph: a branch back to a block that dominates it. So blocks that ptxas
moved out of line and that jump back are none. Loops that only wait for a barrier belong to what surrounds them. The
functions that code calls are the rare paths of divisions (denormals, dividends beyond 32 bits) and are not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
WAIT = 16  # instructions at most in a loop that waits for a barrier

# Functional units: the instructions that use them. What is in none takes an issue slot only.
XU = re.compile(r"MUFU|F2[FI]\.|I2F\.|FRND|POPC|FLO|BREV")  # special functions and conversions
FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)")
ALU = re.compile(
    r"(U?LOP3|U?SHF|U?PRMT|SEL|FSEL|U?ISETP|FSETP|HSETP2|IADD3|VIADD|VIMNMX|VIADDMNMX|FMNMX|LEA|IABS|PLOP3|P2R|R2P|"
    r"F2FP|I2FP|MOV|CS2R|SGXT|BMSK)(\.|$)"
)
SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "16832": (16, 8, 32), "16864": (16, 8, 64)}


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str  # with its suffixes, such as LDG.E.128
    operands: str

    @property
    def op(self) -> str:
        return self.name.partition(".")[0]

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or re.match(r"\s*!?U?P\d", self.operands) is not None

    @property
    def target(self) -> int:
        """The address that a branch goes to."""
        return int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)


@dataclass
class Loop:
    """A loop or, at the top, the program: what a warp executes in an iteration outside of the loops in it."""

    head: int  # address
    counts: Counter[str] = field(default_factory=Counter)
    inner: list[Loop] = field(default_factory=list)

    def all_inner(self) -> Iterator[Loop]:
        """The loops in this one, outer before inner, in the order of their addresses."""
        for loop in self.inner:
            yield loop
            yield from loop.all_inner()


def program(text: str) -> Loop:
    """The program of a kernel."""
    code = [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in LINE.finditer(text)]
    blocks, successors = _blocks(code)
    bodies = {head: body for head, body in _bodies(successors).items() if not _waits(code, blocks, body)}
    top = Loop(0)
    loops = {head: Loop(code[head].address) for head in bodies}
    for head in sorted(bodies):
        around = [other for other in bodies if other != head and head in bodies[other]]
        parent = loops[min(around, key=lambda other: len(bodies[other]))] if around else top
        parent.inner.append(loops[head])
    for block in successors:
        around = [head for head, body in bodies.items() if block in body]
        loop = loops[min(around, key=lambda head: len(bodies[head]))] if around else top
        for instruction in code[block : blocks[block]]:
            loop.counts.update(counts(instruction.name))
    return top


def counts(name: str) -> dict[str, int]:
    """What one instruction of a warp of 32 threads takes, by class.

    issue, alu, xu, fp64: instructions. flops: on tensor cores, in units of a bf16 FLOP: TF32 counts twice. hmma: those
    of them that are not of a warp group. read, written, shared: bytes. load, async: loads from global memory into
    registers and past them. atomic, barrier, local (to or from the stack): instructions.
    """
    op = name.partition(".")[0]
    if op == "NOP":
        return {}
    found = {"issue": 1}
    for unit, pattern in (("xu", XU), ("fp64", FP64), ("alu", ALU)):
        if pattern.match(name):
            found[unit] = 1
            break
    if op in ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA"):
        flops = _flops(name)
        found |= {"flops": flops, "hmma": 0 if "GMMA" in op else flops}
    elif op == "LDG":
        found |= {"load": 1, "read": 32 * _width(name)}
    elif op == "LDGSTS":
        found |= {"async": 1, "read": 32 * _width(name), "shared": 32 * _width(name)}
    elif op == "STG":
        found["written"] = 32 * _width(name)
    elif op in ("LDS", "STS"):
        found["shared"] = 32 * _width(name)
    elif op in ("LDSM", "STSM"):
        found["shared"] = 128 * int(name[-1]) if name[-2:-1] == "." else 128
    elif op in ("ATOMG", "ATOM", "RED", "REDG"):
        found |= {"atomic": 1, "read": 32}
    elif op == "BAR":
        found["barrier"] = 1
    elif op in ("LDL", "STL"):
        found["local"] = 1
    return found


def _width(name: str) -> int:
    """Bytes that a thread moves."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((sizes[suffix] for suffix in name.split(".")[1:] if suffix in sizes), 4)


def _flops(name: str) -> int:
    """FLOP of a tensor-core instruction for each warp: a quarter of a warp group's; TF32 counts twice."""
    suffix = name.split(".")[1]
    m, n, k = map(int, suffix.split("x")) if "x" in suffix else SHAPES[suffix]
    return 2 * m * n * k * (2 if "TF32" in name else 1) // (4 if "GMMA" in name else 1)


def _blocks(code: list[Instruction]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """The ends of basic blocks, and what follows each that can be reached; blocks are named by their start."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.op == "BRA":
            leaders |= {index[instruction.target], i + 1}
        elif instruction.op in ("EXIT", "RET"):
            leaders.add(i + 1)
    starts = sorted(leader for leader in leaders if leader < len(code))
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    successors: dict[int, list[int]] = {}
    waiting = [0]
    while waiting:
        start = waiting.pop()
        if start in successors:
            continue
        last, following = code[ends[start] - 1], []
        if last.op == "BRA":
            following.append(index[last.target])
        if last.op not in ("BRA", "EXIT", "RET") or last.conditional:
            following.append(ends[start])
        successors[start] = [block for block in following if block < len(code)]
        waiting += successors[start]
    return ends, successors


def _bodies(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """The blocks of each natural loop by its head; loops with the same head are one."""
    predecessors: dict[int, set[int]] = {block: set() for block in successors}
    for block, following in successors.items():
        for other in following:
            predecessors[other].add(block)
    dominators = {block: set(successors) for block in successors}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(set(successors) - {0}):
            found = {block} | set.intersection(*(dominators[other] for other in predecessors[block]))
            changed |= found != dominators[block]
            dominators[block] = found
    bodies: dict[int, set[int]] = {}
    for block, following in successors.items():
        for head in set(following) & dominators[block]:
            body, waiting = bodies.setdefault(head, {head}), [block]
            while waiting:
                if (inside := waiting.pop()) not in body:
                    body.add(inside)
                    waiting += predecessors[inside]
    return bodies


def _waits(code: list[Instruction], blocks: dict[int, int], body: set[int]) -> bool:
    """Whether a loop only waits for a barrier, or is the endless branch that ends a program."""
    inside = [code[i] for block in body for i in range(block, blocks[block])]
    return len(inside) == 1 or (len(inside) <= WAIT and any(i.op in ("SYNCS", "NANOSLEEP") for i in inside))
