"""What the instructions of a kernel need of one another: which of them may be changed and nothing else does.

A register is *known* if all that it is made of are constants and the number of the thread; then its values, one a thread, are
computed here. A register that is written once, by an instruction without effects, stands for the expression that was written.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import networkx
import numpy as np

from .language import Code, Instruction, ways
from .machine import Kernel, Memory, State

Place = tuple[int, int]  # (block, instruction in it)

WRITES_NOTHING = {"st", "stmatrix", "bar", "cp", "bra", "ret", "exit"}
READS_MEMORY = {"ld", "ldmatrix"}
COMMUTATIVE = {"add", "mul", "and", "or", "xor", "min", "max", "fma", "mad"}  # in their first two operands


class Flow(NamedTuple):
    """A kernel's instructions in the order of its text, and what they write and read."""

    kernel: Kernel
    places: list[Place]
    instructions: list[Instruction]
    written: list[tuple[str, ...]]
    read: list[tuple[str, ...]]
    definitions: dict[str, list[int]]


def flow(kernel: Kernel) -> Flow:
    places = [(b, i) for b, block in enumerate(kernel.code.blocks) for i in range(len(block))]
    instructions = [kernel.code.blocks[b][i] for b, i in places]
    written, read = [], []
    definitions: dict[str, list[int]] = {}
    for at, ins in enumerate(instructions):
        first = () if ins.parts[0] in WRITES_NOTHING else ins.operands[:1]
        rest = ins.operands if not first else ins.operands[1:]
        written.append(tuple(registers(kernel, " ".join(first))))
        read.append(tuple(registers(kernel, " ".join((*rest, ins.guard or "")))))
        for name in written[-1]:
            definitions.setdefault(name, []).append(at)
    return Flow(kernel, places, instructions, written, read, definitions)


def registers(kernel: Kernel, text: str) -> Iterator[str]:
    return (name for name in re.findall(r"%?[A-Za-z_][\w@]*", text) if name in kernel.translator.numbers)


def dominators(code: Code) -> list[set[int]]:
    """Of every block those, itself among them, through which all ways to it lead."""
    above = networkx.immediate_dominators(ways(code), 0)
    found = []
    for block in range(len(code.blocks)):
        chain = {block}
        while block in above and above[block] not in (None, block):
            block = above[block]
            chain.add(block)
        found.append(chain)
    return found


def known(f: Flow) -> dict[str, np.ndarray]:
    """Values of the registers that depend on the thread alone."""
    kernel = f.kernel
    state = State(kernel, Memory(2), {}, np.arange(1), 1, 0, None)
    scope = kernel.translator.scope | {"P": state, "R": state.registers}
    found: dict[str, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for at, ins in enumerate(f.instructions):
            impure = ins.parts[0] in WRITES_NOTHING | READS_MEMORY or "%ctaid" in ins.text or "%nctaid" in ins.text
            if impure or ins.guard or "global_smem" in ins.text and ins.parts[0] != "mov":
                continue
            if all(name in found for name in f.read[at]) and all(len(f.definitions[name]) == 1 for name in f.written[at]):
                exec("\n".join(kernel.translator.statements(ins, at, False)), scope)
                for name in f.written[at]:
                    value = state.registers[kernel.translator.numbers[name]]
                    found[name] = np.broadcast_to(value, state.lanes)
    return found


def zeros(f: Flow, values: dict[str, np.ndarray]) -> set[str]:
    """Registers that are 0, whatever the data: what is multiplied by 0, or not chosen; of finite numbers."""
    found = {name for name, value in values.items() if not value.any()}
    for at, ins in enumerate(f.instructions):
        if ins.guard or not f.written[at] or any(len(f.definitions[name]) > 1 for name in f.written[at]):
            continue
        name, operands = ins.parts[0], list(ins.operands[1:])
        if name == "selp":
            chosen = values.get(operands.pop())
            operands = (
                operands if chosen is None else [x for x, any_ in zip(operands, (chosen, ~chosen), strict=True) if any_.any()]
            )
        zero = [x in found or x.lower() in ("0", "0f00000000") for x in re.findall(r"[%\w@.]+", " ".join(operands))]
        if (name == "mul" and any(zero)) or (name in ("cvt", "mov", "selp") and all(zero)):
            found.update(f.written[at])
    return found


def normal(kernel: Kernel) -> tuple[tuple, ...]:
    """Two kernels for which this is equal do the same.

    It is the list of instructions with effects: stores, copies, barriers, branches, and what loads and what is written more
    than once, if any of those needs it. For operands stand expressions: of known registers the values, for others how they
    were made, sorted where the order does not matter; of a matrix that is multiplied by zeros, nothing. Predicates that are
    known and alike in all threads are gone.
    """
    f = flow(kernel)
    values = known(f)
    zero = zeros(f, values)
    tokens = {name: _digest("known", str(v.dtype), v.tobytes()) for name, v in values.items()}
    same = {name: bool(v[0]) for name, v in values.items() if v.dtype == bool and (v == v[0]).all()}
    needs: dict[str, set[str]] = {name: set() for name in tokens}
    kept: list[tuple[tuple[str, ...], set[str], tuple]] = []  # (registers written, read, entry)
    early: set[str] = set()  # registers that stand in an expression before the text comes to what they stand for

    def stands(text: str) -> str:
        return re.sub(r"%?[A-Za-z_][\w@]*", lambda m: tokens.get(m[0], m[0]), text)

    for at, ins in enumerate(f.instructions):
        if f.written[at] and all(name in tokens for name in f.written[at]):
            continue
        guard, dropped = ins.guard, False
        if guard and guard.lstrip("!") in same:
            dropped = same[guard.lstrip("!")] == guard.startswith("!")
            guard = None
        if dropped and ins.parts[0] != "bra":
            continue
        name, operands = ins.parts[0], list(ins.operands)
        if name == "selp" and operands[3] in same:
            name, operands = "mov", [operands[0], operands[1 if same[operands[3]] else 2]]
        elif name in ("and", "or") and ins.type == "pred" and any(x in same for x in operands[1:]):
            fixed, other = operands[1:] if operands[1] in same else reversed(operands[1:])
            name, operands = "mov", [operands[0], other if same[fixed] == (name == "and") else fixed]
        pure = name not in WRITES_NOTHING | READS_MEMORY and not guard
        once = bool(f.written[at]) and all(len(f.definitions[x]) == 1 for x in f.written[at])
        sources = operands[1:] if f.written[at] else operands
        shown = [stands(x) for x in sources]
        if name in COMMUTATIVE or (name == "setp" and ins.parts[1] in ("eq", "ne")):
            shown[:2] = sorted(shown[:2])
        if name == "mma":
            for one, other in ((0, 1), (1, 0)):
                if all(x in zero for x in registers(kernel, sources[one])):
                    shown[other], sources[other] = "any", ""
        reads = set(registers(kernel, " ".join(sources)))
        early |= {x for x in reads if x not in tokens}
        if pure and once:
            for i, x in enumerate(f.written[at]):
                copy = name == "mov" and len(f.written[at]) == 1 and re.fullmatch(r"%?[A-Za-z_][\w@]*", sources[0])
                tokens[x] = shown[0] if copy else _digest(name, *ins.parts[1:], *shown, str(i))
                needs[x] = reads
            continue
        reads |= set(registers(kernel, guard or ""))
        head = () if name == "mov" else ins.parts
        entry = (f.places[at][0], name, dropped, *head, stands(guard or ""), *f.written[at], *shown)
        kept.append((f.written[at], reads, entry))

    needed: set[str] = set()
    waiting = [x for written, reads, _ in kept if not written for x in reads]
    makers: dict[str, set[str]] = {}
    for written, reads, _ in kept:
        for x in written:
            makers.setdefault(x, set()).update(reads)
    while waiting:
        if (x := waiting.pop()) not in needed:
            needed.add(x)
            waiting += [*needs.get(x, ()), *makers.get(x, ())]
    found = [entry for written, _, entry in kept if not written or any(x in needed for x in written)]
    return (*found, *((x, tokens[x]) for x in sorted(early) if x in tokens))


def _digest(*parts: str | bytes) -> str:
    whole = b"\0".join(p if isinstance(p, bytes) else p.encode() for p in parts)
    return "@" + hashlib.blake2b(whole, digest_size=12).hexdigest()


def depends_on_data(kernel: Kernel, branches: bool = True) -> Instruction | None:
    """The first shared access, barrier or, with ``branches``, branch whose address or condition comes of what was loaded."""
    f = flow(kernel)
    loaded: set[str] = set()
    for _ in range(len(f.instructions)):
        before = len(loaded)
        for at, ins in enumerate(f.instructions):
            if ins.parts[0] in READS_MEMORY and ins.parts[1] != "param" or any(x in loaded for x in f.read[at]):
                loaded.update(f.written[at])
        if len(loaded) == before:
            break
    for ins in f.instructions:
        asked = (ins.guard or "") if branches or ins.parts[0] != "bra" else ""
        if "shared" in ins.parts:
            asked += " " + " ".join(x for x in ins.operands if x.startswith("["))
        if any(x in loaded for x in registers(kernel, asked)):
            return ins
    return None
