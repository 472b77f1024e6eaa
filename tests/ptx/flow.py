"""What the instructions of a kernel need of one another: which of them may be changed and nothing else does.

A register is *known* if all that it is made of are constants and the number of the thread; then its values, one a thread, are
computed here. A register that is written once, by an instruction without effects, stands for the expression that was written.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import networkx
import numpy as np

from .language import Code, Instruction, ways
from .machine import Kernel, Memory, State

Place = tuple[int, int]  # (block, instruction in it)

WRITES_NOTHING = {"st", "stmatrix", "bar", "cp", "bra", "ret", "exit"}
READS_MEMORY = {"ld", "ldmatrix", "wgmma"}
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
        rest = ins.operands if not first or ins.parts[0] == "wgmma" else ins.operands[1:]  # which adds to its result
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


CTAS = (1 << 31) - 1
MOST = 1 << 30  # of what something is divided by: a size, or a number of rows (MOST_ROWS)


def ranges(f: Flow) -> dict[str, tuple[int, int]]:
    """Least and largest value, as unsigned numbers, of what depends on thread, program and sizes, whatever those are.

    The numbers of thread and program, 32-bit arguments (sizes, counts and strides are not negative), and what is made of them
    by operations that cannot overflow. A register of several definitions has a range if all of them have one.
    """
    found: dict[str, tuple[int, int]] = {}
    bits = {name: int(re.sub(r"\D", "", f.kernel.translator._declared(name)) or 1) for name in f.definitions}
    for name, value in known(f).items():
        if value.dtype != bool and value.dtype.kind in "iu" and int(value.min()) >= 0 and int(value.max()) < 1 << bits[name]:
            found[name] = int(value.min()), int(value.max())
    parts: dict[int, tuple[int, int]] = {}
    while True:
        before = len(found)
        for at, ins in enumerate(f.instructions):
            if at not in parts and len(f.written[at]) == 1:
                made = _range(ins, found)
                if made is not None and made[0] >= 0 and made[1] < 1 << bits[f.written[at][0]]:
                    parts[at] = made
        for name, places in f.definitions.items():
            if name not in found and all(at in parts for at in places):
                found[name] = min(parts[at][0] for at in places), max(parts[at][1] for at in places)
        if len(found) == before:
            return found


def _range(ins: Instruction, found: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    name, operands = ins.parts[0], ins.operands[1:]
    if name == "mov" and operands[0] in ("%ctaid.x", "%nctaid.x"):
        return 0, CTAS
    if ins.parts[:2] == ("ld", "param"):
        return (0, (1 << 31) - 1) if ins.type in ("s32", "b32", "u32") else None
    read = _numbers(operands, found)
    if name == "and" and any(read):  # whatever the other one is
        return 0, min(x[1] for x in read if x)
    width = int("0" + ins.type[1:]) if ins.type[0] in "usb" and ins.type[1:].isdigit() else 0
    if width < 32 or not all(read) or any(x[1] >= 1 << (width - (ins.type[0] == "s")) for x in read):
        return None
    if name in ("mov", "cvt") and len(read) == 1:
        narrow = int(ins.parts[1][1:]) if name == "cvt" else width
        return read[0] if read[0][1] < 1 << narrow else (0, (1 << narrow) - 1)
    if len(read) != 2 or "hi" in ins.parts:
        return None
    (least, most), (other, much) = read
    made = {
        "add": (least + other, most + much),
        "mul": (least * other, most * much),
        "or": (max(least, other), (1 << max(most, much).bit_length()) - 1),
        "shl": (least << min(other, 64), most << min(much, 64)),
        "shr": (least >> min(much, 64), most >> min(other, 64)),
        "div": (0, most),
        "rem": (0, min(most, min(much, MOST) - 1)),
    }
    return made.get(name)


def _numbers(operands: Sequence[str], found: dict[str, tuple[int, int]]) -> list[tuple[int, int] | None]:
    return [found.get(x) or ((int(x), int(x)) if x.isdigit() else None) for x in operands]


def decided(ins: Instruction, found: dict[str, tuple[int, int]]) -> bool | None:
    """What a comparison of numbers gives, if their ranges say it."""
    if ins.parts[0] != "setp" or len(ins.parts) != 3 or ins.type not in ("s32", "u32", "b32", "s64", "u64", "b64"):
        return None
    a, b = _numbers(ins.operands[1:3], found)
    sign = 1 << (int(ins.type[1:]) - 1)
    if a is None or b is None or ins.type[0] == "s" and max(a[1], b[1]) >= sign:
        return None
    (low, high), (least, most), how = a, b, ins.parts[1]
    always = dict(lt=high < least, le=high <= least, gt=low > most, ge=low >= most, ne=high < least or low > most)
    never = dict(lt=low >= most, le=low > most, gt=high <= least, ge=high < least, eq=always["ne"])
    always["eq"] = low == high == least == most
    never["ne"] = always["eq"]
    return True if always.get(how) else False if never.get(how) else None


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
    than once, if any of those needs it. For operands stand expressions: of known registers the values, and of those that have
    one value alone (``ranges``), for others how they were made, sorted where the order does not matter; of a matrix that is
    multiplied by zeros, nothing. Predicates that are known and alike in all threads are gone, and so is what exceeds the width
    in a shift's amount.
    """
    f = flow(kernel)
    values = known(f)
    zero = zeros(f, values)
    tokens = {name: _digest("known", str(v.dtype), v.tobytes()) for name, v in values.items()}
    same = {name: bool(v[0]) for name, v in values.items() if v.dtype == bool and (v == v[0]).all()}
    bounds = ranges(f)
    for name, (least, most) in bounds.items():
        if least == most and name not in tokens and len(f.definitions[name]) == 1:
            tokens[name] = _digest("one value", str(least))
    for at, ins in enumerate(f.instructions):
        if (always := decided(ins, bounds)) is not None and not ins.guard and len(f.definitions[f.written[at][0]]) == 1:
            same.setdefault(f.written[at][0], always)
            tokens.setdefault(f.written[at][0], _digest("one value", str(always)))
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
        if name in ("shl", "shr") and sources[1].isdigit():  # PTX clamps the amount; then only sign bits are left
            width = int(ins.type[1:])
            shown[1] = str(min(int(sources[1]), width - (ins.type[0] == "s")))
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


def loaded(f: Flow) -> set[str]:
    """Registers that are made of what was loaded."""
    found: set[str] = set()
    while True:
        before = len(found)
        for at, ins in enumerate(f.instructions):
            if ins.parts[0] in READS_MEMORY and ins.parts[1] != "param" or any(x in found for x in f.read[at]):
                found.update(f.written[at])
        if len(found) == before:
            return found


def depends_on_data(kernel: Kernel, branches: bool = True) -> Instruction | None:
    """The first shared access, barrier or, with ``branches``, branch whose address or condition comes of what was loaded."""
    f = flow(kernel)
    data = loaded(f)
    for ins in f.instructions:
        asked = (ins.guard or "") if branches or ins.parts[0] != "bra" else ""
        if "shared" in ins.parts:
            asked += " " + " ".join(x for x in ins.operands if x.startswith("["))
        if any(x in data for x in registers(kernel, asked)):
            return ins
    return None
