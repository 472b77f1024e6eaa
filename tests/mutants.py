"""What breaks a kernel: a change of an instruction of its PTX (``PTX_KINDS``), or of an expression of its source (``Source``).

A mutant of PTX comes with what may show that it is equivalent: a reason that is seen in its text (``why_the_same``), kernels
with arbitrary values where it differs (``arbitrary``), and one that faults where it writes another value (``_probe``).
``mutations`` finds out whether a test would notice it.
"""

import ast
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ptx.flow import dominators, flow, known, loaded, registers
from ptx.language import Instruction, Unknown, ways
from ptx.machine import Kernel

if TYPE_CHECKING:
    from mutations import Judge

TREE = Path(__file__).resolve().parents[1]
DRAWS = 50  # of mutants that are no programs, before one is given up


# ---- mutations of PTX ----


class Program:
    """A kernel's instructions by their places, for what changes them."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.code = kernel, kernel.code
        self.flow = f = flow(kernel)
        self.places, self.instructions, self.written, self.definitions = f.places, f.instructions, f.written, f.definitions
        self.number = {place: at for at, place in enumerate(self.places)}
        self.dominators = dominators(self.code)
        self.targets = {b for b in range(len(self.code.blocks)) if ways(self.code).in_degree(b) > 1}
        self.types = {n: kernel.translator._declared(n) for n in kernel.translator.numbers}
        self.offsets = sorted({int(m) for i in self.instructions if "shared" in i.parts for m in _offsets(i)})
        self.pointers = self._pointers()

    def _pointers(self) -> set[str]:
        """64-bit registers that a pointer went into."""
        found: set[str] = set()
        for ins, written in zip(self.instructions, self.written, strict=True):
            load = ins.parts[:2] == ("ld", "param") and ins.type[1:] == "64"
            if load or any(x in found for x in registers(self.kernel, " ".join(ins.operands[1:]))):
                found |= {x for x in written if self.types[x] == "b64"}
        return found

    def before(self, at: int) -> list[str]:
        """Registers that are written once and surely before an instruction, the nearest last."""
        block, index = self.places[at]
        found = []
        for earlier in range(max(0, at - 300), at):
            b, i = self.places[earlier]
            if (b == block and i < index) or (b != block and b in self.dominators[block]):
                found += [x for x in self.written[earlier] if len(self.definitions[x]) == 1]
        return found

    def later(self, at: int, by: int) -> int | None:
        """The instruction ``by`` behind one, or the last before ways part or meet."""
        end = at
        while end + 1 < len(self.places) and end < at + by:
            following, block = self.instructions[end + 1], self.places[end + 1][0]
            if following.parts[0] in ("bra", "ret") or (block != self.places[end][0] and block in self.targets):
                break
            end += 1
        return end if end > at else None


Changes = dict[int, list[Instruction]]  # what takes the place of an instruction, by its number


class Kind(NamedTuple):
    name: str
    fits: Callable[[Instruction], bool]
    change: Callable[[Program, int, random.Random], Changes | None]


def changed(ins: Instruction, parts=None, operands=None, guard: str | None = "same") -> Instruction:
    parts, operands = tuple(parts or ins.parts), tuple(operands or ins.operands)
    guard = ins.guard if guard == "same" else guard
    text = f"{f'@{guard} ' if guard else ''}{'.'.join(parts)} {', '.join(operands)}"
    return Instruction(parts, operands, guard, text, ins.where)


def made(like: Instruction, text: str) -> Instruction:
    operation, _, operands = text.partition(" ")
    return Instruction(tuple(operation.split(".")), tuple(operands.split(", ")), like.guard, text, like.where)


def _offsets(ins: Instruction) -> list[str]:
    """Of the addresses in an instruction."""
    return [x for operand in ins.operands for x in re.findall(r"\[[^\]]*\+\s*(-?\d+)\s*\]", operand)]


def _list(text: str) -> list[str]:
    return [x.strip() for x in text.strip("{} ").split(",")]


def _braced(items: list[str]) -> str:
    return "{ " + ", ".join(items) + " }"


SPARE = {"pred": "%xp", "b16": "%xh", "b32": "%xr", "b64": "%xd"}  # registers that no kernel has, by their types


def _drop(p: Program, at: int, dice: random.Random) -> Changes | None:
    return {at: []}


def _delay(p: Program, at: int, dice: random.Random) -> Changes | None:
    end = p.later(at, dice.choice((1, 3, 10, 30)))
    return None if end is None else {at: [], end: [p.instructions[end], p.instructions[at]]}


def _wait(p: Program, at: int, dice: random.Random) -> Changes | None:
    ins = p.instructions[at]
    if ins.parts[2] == "wait_group" and dice.random() < 0.5:
        return {at: [changed(ins, operands=(str(int(ins.operands[0]) + 1),))]}
    return _drop(p, at, dice) if dice.random() < 0.5 else _delay(p, at, dice)


LOOSER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq", "ltu": "leu", "gtu": "geu"}


def _mask(p: Program, at: int, dice: random.Random) -> Changes | None:
    ins = p.instructions[at]
    if ins.parts[0] == "setp":
        parts = [LOOSER.get(x, x) if i == 1 else x for i, x in enumerate(ins.parts)]
        return {at: [changed(ins, parts)]} if tuple(parts) != ins.parts else None
    if ins.parts[0] in ("and", "or"):
        kept = dice.choice(ins.operands[1:])
        return {at: [changed(ins, operands=(ins.operands[0], kept, kept))]}
    if ins.parts[0] == "selp":
        kept = dice.choice(ins.operands[1:3])
        return {at: [changed(ins, operands=(ins.operands[0], kept, kept, ins.operands[3]))]}
    return {at: [changed(ins, guard=None)]}


def _is_mask(ins: Instruction) -> bool:
    return (
        ins.parts[0] in ("setp", "selp")
        or (ins.parts[0] in ("and", "or") and ins.type == "pred")
        or bool(ins.guard and ins.parts[0] in ("ld", "st", "cp"))
    )


SWAPPED = {"fma": (2, 3)}  # of others the first two that are read


def _swap(p: Program, at: int, dice: random.Random) -> Changes | None:
    ins = p.instructions[at]
    name, operands = ins.parts[0], list(ins.operands)
    if name == "mma" or "{" in " ".join(operands):
        which = dice.choice([i for i, x in enumerate(operands) if "{" in x and (name != "mma" or i in (1, 2))] or [0])
        items = _list(operands[which])
        if len(items) < 2:
            return None
        a, b = dice.sample(range(len(items)), 2)
        items[a], items[b] = items[b], items[a]
        operands[which] = _braced(items)
    else:
        a, b = SWAPPED.get(name, (1, 2))
        operands[a], operands[b] = operands[b], operands[a]
    return {at: [changed(ins, operands=operands)]} if tuple(operands) != ins.operands else None


def _is_ordered(ins: Instruction) -> bool:
    two = ins.parts[0] == "cvt" and len(ins.operands) == 3
    pack = ins.parts[0] == "mov" and "{" in "".join(ins.operands)
    compare = ins.parts[0] == "setp" and ins.parts[1] not in ("eq", "ne")
    return ins.parts[0] in ("sub", "div", "rem", "prmt", "selp", "fma", "mma") or two or pack or compare


def _narrow(p: Program, at: int, dice: random.Random) -> Changes | None:
    """An offset, not the pointer, through 32 bits."""
    ins, narrow, wide = p.instructions[at], "%xr1", "%xd1"
    target = ins.operands[0]
    if p.types.get(target) != "b64" or target in p.pointers or len(p.definitions[target]) > 1:
        return None
    back = "cvt.u64.u32" if dice.random() < 0.5 and ins.parts != ("cvt", "u64", "u32") else "cvt.s64.s32"
    whole = changed(ins, operands=(wide, *ins.operands[1:]))
    return {at: [whole, made(ins, f"cvt.u32.u64 {narrow}, {wide}"), made(ins, f"{back} {target}, {narrow}")]}


def _is_half(p: Program) -> bool:
    return any(x in ("bf16x2", "f16x2", "bf16", "f16", "tf32") for ins in p.instructions for x in ins.parts[1:])


def _round(p: Program, at: int, dice: random.Random, halves: bool = False) -> Changes | None:
    """A conversion truncates; or what is float32 loses all but half precision; or what a multiply-add multiplies does."""
    ins, spare, half = p.instructions[at], "%xr1", "%xh1"
    if _is_half(p) != halves:
        return None
    if ins.parts[0] == "cvt":
        if ins.parts[1] == "rna":
            return {at: [made(ins, f"mov.b32 {ins.operands[0]}, {ins.operands[1]}")]}
        which = dice.randrange(1, len(ins.operands))
        bits = "0xFFFF0000" if "bf16" in ins.parts[2] else "0xFFFFE000"
        operands = [spare if i == which else x for i, x in enumerate(ins.operands)]
        return {at: [made(ins, f"and.b32 {spare}, {ins.operands[which]}, {bits}"), changed(ins, operands=operands)]}
    kind = "bf16" if dice.random() < 0.7 else "f16"

    def rounded(x: str) -> list[Instruction]:
        return [made(ins, f"cvt.rn.{kind}.f32 {half}, {x}"), made(ins, f"cvt.f32.{kind} {x}, {half}")]

    target = ins.operands[0]
    if ins.parts[0] == "fma" and dice.random() < 0.5:
        _, a, b, c = ins.operands
        return {at: [made(ins, f"mul.f32 {spare}, {a}, {b}"), *rounded(spare), made(ins, f"add.f32 {target}, {spare}, {c}")]}
    return {at: [ins, *rounded(dice.choice(_list(target)))]}


def _is_rounded(ins: Instruction) -> bool:
    to_half = ins.parts[0] == "cvt" and ins.parts[1] in ("rn", "rna") and ins.type == "f32"
    return to_half or (ins.parts[0] in ("fma", "add", "sub", "mul", "mma", "ex2", "rsqrt") and ins.type == "f32")


def _stage(p: Program, at: int, dice: random.Random) -> Changes | None:
    """A shared address is off by what other accesses are apart."""
    ins = p.instructions[at]
    which = next(i for i, x in enumerate(ins.operands) if x.startswith("["))
    apart = sorted({b - a for a, b in zip(p.offsets, p.offsets[1:], strict=False)} | {16, 128, 1024, 4096})
    offset = int((_offsets(ins) or ["0"])[0]) + dice.choice((1, -1)) * dice.choice(apart)
    base = re.match(r"\[\s*([%\w@]+)", ins.operands[which])[1]
    operands = [f"[{base}+{offset}]" if i == which else x for i, x in enumerate(ins.operands)]
    return {at: [changed(ins, operands=operands)]}


NUMBER = r"-?\d+|0[fF][0-9A-Fa-f]{8}|0x[0-9A-Fa-f]+"


def _constant(p: Program, at: int, dice: random.Random) -> Changes | None:
    ins = p.instructions[at]
    places = [i for i, x in enumerate(ins.operands) if i and re.fullmatch(NUMBER, x)]
    if ins.parts[0] == "shfl":
        places = [2] if 2 in places else []
    if not places:
        return None
    which = dice.choice(places)
    old = ins.operands[which]
    if ins.parts[0] == "shfl" and old.isdigit():  # sums of other distances would only change the order
        new = dice.choice([x for x in ("0", "1", "2", "4", "8", "16") if x != old])
    elif old[:2] in ("0f", "0F"):
        bits = int(old[2:], 16)
        new = f"0f{bits ^ dice.choice((1 << 31, 1 << 23, 1 << 21)) if bits else 0x3F800000:08X}"
    else:
        new = str(int(old, 0) + dice.choice((1, -1)) if dice.random() < 0.5 else int(old, 0) ^ (1 << dice.randrange(5)))
    return {at: [changed(ins, operands=[new if i == which else x for i, x in enumerate(ins.operands)])]}


def _has_constant(ins: Instruction) -> bool:
    return ins.parts[0] not in ("bar", "cp", "bra") and any(re.fullmatch(NUMBER, x) for x in ins.operands[1:])


def _register(p: Program, at: int, dice: random.Random) -> Changes | None:
    ins = p.instructions[at]
    first = 0 if not p.written[at] else 1
    sources = [(i, x) for i in range(first, len(ins.operands)) for x in registers(p.kernel, ins.operands[i])]
    if not sources:
        return None
    which, old = dice.choice(sources)
    others = [x for x in p.before(at) if p.types[x] == p.types[old] and x != old and "@" not in x][-40:]
    if not others:
        return None
    operand = re.sub(rf"(?<![\w%]){re.escape(old)}\b", dice.choice(others), ins.operands[which], count=1)
    return {at: [changed(ins, operands=[operand if i == which else x for i, x in enumerate(ins.operands)])]}


def _negate(p: Program, at: int, dice: random.Random) -> Changes | None:
    ins = p.instructions[at]
    return {at: [changed(ins, guard=ins.guard[1:] if ins.guard.startswith("!") else f"!{ins.guard}")]}


def _is(*names: str) -> Callable[[Instruction], bool]:
    return lambda ins: ins.parts[0] in names


def _any(ins: Instruction) -> bool:
    return ins.parts[0] not in ("bra", "ret", "bar", "st", "stmatrix", "ld", "ldmatrix", "cp")


PTX_KINDS = [
    Kind("barrier dropped", _is("bar"), _drop),
    Kind("barrier later", _is("bar"), _delay),
    Kind("wait weakened", lambda ins: ins.parts[2:] in (("wait_group",), ("commit_group",)), _wait),
    Kind("mask weakened", _is_mask, _mask),
    Kind("predicate negated", lambda ins: bool(ins.guard), _negate),
    Kind("operands swapped", _is_ordered, _swap),
    Kind("address narrowed", lambda ins: ins.type in ("s64", "b64", "u64", "s32", "u32") and ins.parts[0] != "ld", _narrow),
    Kind("rounding changed", _is_rounded, _round),
    Kind("store skipped", lambda ins: ins.parts[0] in ("st", "stmatrix") or ins.parts[2:3] in (("ca",), ("cg",)), _drop),
    Kind("load skipped", lambda ins: ins.parts[0] in ("ld", "ldmatrix") and ins.parts[1] != "param", _drop),
    Kind("stage shifted", lambda ins: "shared" in ins.parts and any(x.startswith("[") for x in ins.operands), _stage),
    Kind("constant changed", lambda ins: ins.parts[0] == "shfl" or _has_constant(ins), _constant),
    Kind("register replaced", lambda ins: bool(ins.operands) and ins.parts[0] not in ("bar", "bra"), _register),
    Kind("instruction dropped", _any, _drop),
]
# PyTorch rounds in half precision wherever it stores, and the rule allows as much: not drawn unless it is asked for
IN_HALF = Kind("rounding changed in half or tf32", _is_rounded, partial(_round, halves=True))


class Mutant(NamedTuple):
    """``text``: what stood there, and what stands there now; ``digest``: of the code that was changed, of a source None."""

    index: int
    kind: str
    kernel: str
    where: str
    text: str
    digest: str | None
    code: Any
    reason: str | None = None  # of being equivalent, seen in the text
    others: tuple[tuple[Kernel | None, ...], ...] = ()  # with arbitrary values where the mutant's differ, see ``arbitrary``
    probe: Kernel | None = None  # faults where it writes another value


def apply(p: Program, changes: Changes) -> Kernel:
    """
    Raises:
        Unknown: that is no program.
    """
    blocks = [[] for _ in p.code.blocks]
    for at, (b, _) in enumerate(p.places):
        blocks[b] += changes.get(at, [p.instructions[at]])
    registers = p.code.registers | {name: type_ for type_, name in SPARE.items()}
    return Kernel(p.code._replace(blocks=blocks, registers=registers), p.kernel.shared, p.kernel.name)


ARBITRARY = {
    "b32": ("0x7149F2CA", "0xF149F2CA", "0x4144CCCD"),  # ±1e30, 12.3 as float32; likewise below
    "bf16": ("0x7149", "0xF149", "0x4145"),
    "f16": ("0x7AFF", "0xFAFF", "0x4A27"),
}


def arbitrary(p: Program, changes: Changes) -> list[tuple[Kernel, ...]]:
    """Kernels with huge values, of both signs, and another one in the registers that a mutant changes, where it changes them;
    or in what an instruction stores that a mutant leaves out; or in the operand that it replaces. Before each three of them
    one that faults where there is such a place.

    None, if a mutant changes more than that, or an address.
    """
    (at, after), *more = changes.items()
    ins, written = p.instructions[at], p.written[at]
    half = "bf16" if any("bf16" in part for x in p.instructions for part in x.parts) else "f16"
    fault = made(ins, "ld.global.b32 %xr1, [ %xd1 + 0 ]")
    groups: list[list[list[Instruction]]] = []
    if more:
        return []
    if ins.parts[0] in ("st", "stmatrix") and not after:
        wide = ins.parts[0] == "stmatrix" or ins.type != "b16"
        spare, values = ("%xr1", ARBITRARY["b32"]) if wide else ("%xh1", ARBITRARY[half])
        all_ = changed(ins, operands=(ins.operands[0], re.sub(r"%\w+", spare, ins.operands[1])))
        groups.append([[fault, ins], *([made(all_, f"mov.b{32 if wide else 16} {spare}, {v}"), all_] for v in values)])
    number = ins.parts[0] in ("selp", "mov", "ld", "ldmatrix") or "f" in ins.type  # not an address
    kinds = {p.types[x] for x in written}
    if number and written and kinds <= {"b16", "b32"}:
        if not after:  # as if other values had been there
            after = [made(ins, f"mov.{p.types[x]} {x}, 0x7E11") for x in written]
        groups.append([_where_they_differ(p, ins, after, v) for v in (None, *range(3))])
    if (number or ins.parts[0] == "stmatrix") and len(after) == 1 and not ins.guard and ins.parts[0] not in ("ld", "ldmatrix"):
        was, now = (" , ".join(x.operands[1:]) for x in (ins, after[0]))
        words = [re.split(r"(%?[\w@.]+)", x) for x in (was, now)]
        replaced = [i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b]
        old, new = (x[replaced[0]] if replaced else "" for x in words)
        if len(words[0]) == len(words[1]) and len(replaced) == 1 and p.types.get(old) == p.types.get(new) == "b32":
            differ = made(ins, f"setp.ne.b32 %xp1, {old}, {new}")._replace(guard=None)
            group = [[differ, changed(fault, guard="%xp1"), ins]]
            text = "".join("%xr1" if i == replaced[0] else x for i, x in enumerate(words[0]))
            for v in ARBITRARY["b32"]:
                operands = (ins.operands[0], *text.split(" , "))
                group.append([differ, made(ins, f"selp.b32 %xr1, {v}, {old}, %xp1"), changed(ins, operands=operands)])
            groups.append(group)
    found = []
    if written and p.types[written[0]] == "pred" and (masks := _beyond_masks(p, changes)):
        found.append(masks)
    for group in groups:
        with suppress(Unknown, KeyError):
            found.append(tuple(apply(p, {at: code}) for code in group))
    return found


def _beyond_masks(p: Program, changes: Changes) -> tuple[Kernel, ...]:
    """The same for a predicate of which nothing is made but masks of loads: there is what they give where the mutant's mask
    differs. Empty, if anything else is made of it."""
    (at, after), names = next(iter(changes.items())), {}
    if len(after) != 1 or after[0].guard or p.instructions[at].guard or len(p.written[at]) != 1:
        return ()
    names[p.written[at][0]] = "%xp100"
    codes: list[dict[int, list[Instruction]]] = [{} for _ in range(4)]
    ins = p.instructions[at]
    for code in codes:
        code[at] = [ins, changed(after[0], operands=("%xp100", *after[0].operands[1:]))]

    def of_mutant(text: str) -> str:
        return re.sub(r"%?[\w@]+", lambda m: names.get(m[0], m[0]), text)

    if len(p.definitions[p.written[at][0]]) > 1 or set(p.flow.read[at]) & set(p.written[at]):
        return ()
    for i, one in enumerate(p.instructions):
        if i == at or not set(p.flow.read[i]) & set(names):
            continue
        if i < at:
            return ()
        if one.parts[0] in ("and", "or", "not", "xor") and one.type == "pred" and not one.guard:
            target = p.written[i][0]
            if len(p.definitions[target]) > 1:
                return ()
            operands = (f"%xp{100 + len(names)}", *map(of_mutant, one.operands[1:]))
            names[target] = operands[0]
            for code in codes:
                code[i] = [one, changed(one, operands=operands)]
        elif (
            one.parts[:2] == ("ld", "global")
            and one.guard
            and not set(registers(p.kernel, " ".join(one.operands))) & set(names)
        ):
            free = one._replace(guard=None)
            plain = one.guard.lstrip("!")
            both = [one, made(free, f"xor.pred %xp1, {plain}, {names[plain]}")]
            half = "bf16" if any("bf16" in part for x in p.instructions for part in x.parts) else "f16"
            codes[0][i] = [*both, changed(made(free, "ld.global.b32 %xr1, [ %xd1 + 0 ]"), guard="%xp1")]
            for which, code in enumerate(codes[1:]):
                code[i] = list(both)
                for x in p.written[i]:
                    kind = p.types[x]
                    if kind not in ("b16", "b32"):
                        return ()
                    value = ARBITRARY["b32" if kind == "b32" else half][which]
                    code[i].append(made(free, f"selp.{kind} {x}, {value}, {x}, %xp1"))
        else:
            return ()
    with suppress(Unknown, KeyError):
        return tuple(apply(p, code) for code in codes)
    return ()


def _probe(p: Program, changes: Changes, kind: Kind) -> Kernel | None:
    """A kernel that faults where a mutant writes another number than it should, of data; None for masks, guards, addresses."""
    (at, after), *more = changes.items()
    ins, written = p.instructions[at], p.written[at]
    number = ins.parts[0] in ("mov", "ld", "ldmatrix") or "f" in ins.type
    guards = {x.guard for x in (ins, *after)}
    if more or not after or not written or not number or guards != {None} or kind.change in (_mask, _negate):
        return None
    if not {p.types[x] for x in written} <= {"b16", "b32"} or not set(written) <= loaded(p.flow):
        return None
    with suppress(Unknown, KeyError):
        return apply(p, {at: _where_they_differ(p, ins, after, None)})
    return None


def _where_they_differ(p: Program, ins: Instruction, after: list[Instruction], which: int | None) -> list[Instruction]:
    """An instruction, and a value of ``ARBITRARY`` in what it writes wherever ``after`` writes another; None: a fault there."""
    half = "bf16" if any("bf16" in part for x in p.instructions for part in x.parts) else "f16"
    free = ins._replace(guard=None)
    kept, old, code = {}, {}, []
    for i, x in enumerate(dict.fromkeys(p.written[p.instructions.index(ins)])):
        letter = "r" if p.types[x] == "b32" else "h"
        kept[x], old[x] = f"%x{letter}{10 + i}", f"%x{letter}{30 + i}"
    read = {r for one in (ins, *after) for r in registers(p.kernel, " ".join((*one.operands[1:], one.guard or "")))}
    before = [x for x in kept if x in read or ins.guard]
    code += [made(free, f"mov.{p.types[x]} {kept[x]}, {x}") for x in before]
    code += [ins, *(made(free, f"mov.{p.types[x]} {old[x]}, {x}") for x in old)]
    code += [made(free, f"mov.{p.types[x]} {x}, {kept[x]}") for x in before]
    code += after
    for x in old:
        short = p.types[x] == "b16"
        code.append(made(free, f"setp.ne.{'s16' if short else 'b32'} %xp1, {old[x]}, {x}"))
        if which is None:
            code.append(changed(made(free, "ld.global.b32 %xr1, [ %xd1 + 0 ]"), guard="%xp1"))
            code.append(made(free, f"mov.{p.types[x]} {x}, {old[x]}"))
        else:
            value = ARBITRARY[half if short else "b32"][which]
            code.append(made(free, f"selp.{p.types[x]} {x}, {value}, {old[x]}, %xp1"))
    return code


def reduced(p: Program, at: int, guard: str | None) -> bool:
    """Whether a guarded store into shared memory stores the same under another guard: the threads that may store to one
    address have the same value, a sum or maximum over them by butterfly shuffles, and no address is left out."""
    ins = p.instructions[at]
    if ins.parts[:2] != ("st", "shared") or not ins.guard:
        return False
    values = known(p.flow)
    base = next(registers(p.kernel, ins.operands[0]), None)
    names = [x.lstrip("!") for x in (ins.guard, guard) if x]
    if base not in values or not all(x in values for x in names):
        return False
    over, value = 0, ins.operands[1].strip("{} ")
    while len(p.definitions.get(value, ())) == 1:
        maker = p.instructions[p.definitions[value][0]]
        if maker.parts[0] == "mov":
            value = maker.operands[1]
            continue
        makers = {x: p.instructions[p.definitions[x][0]] for x in maker.operands[1:] if len(p.definitions.get(x, ())) == 1}
        pairs = [
            (x, y) for x in makers for y in makers if makers[y].parts[:3] == ("shfl", "sync", "bfly") and _from(p, makers[y], x)
        ]
        if maker.parts[0] not in ("add", "max", "min") or not pairs:
            break
        over |= int(makers[pairs[0][1]].operands[2])
        value = pairs[0][0]
    address, thread = values[base].astype(int), np.arange(len(values[base]))

    def stored(guard: str | None) -> set[tuple[int, int]]:
        on = np.ones(len(thread), bool) if guard is None else values[guard.lstrip("!")] ^ guard.startswith("!")
        return {(int(a), int(t) & ~over) for a, t in zip(address[on], thread[on], strict=True)}

    before, after = stored(ins.guard), stored(guard)
    return before == after and len({a for a, _ in after}) == len(after)


def _from(p: Program, shuffle: Instruction, register: str) -> bool:
    """Whether a shuffle is of a register, or of a copy of it."""
    source = shuffle.operands[1]
    while source != register and len(p.definitions.get(source, ())) == 1:
        maker = p.instructions[p.definitions[source][0]]
        if maker.parts[0] != "mov":
            return False
        source = maker.operands[1]
    return source == register


def divides(p: Program, at: int) -> bool:
    """Whether a predicate chooses between a division in 64 bits and one in 32, by the upper half of both numbers."""
    ins = p.instructions[at]
    if ins.parts[0] == "bra" and ins.guard:
        found = p.definitions.get(ins.guard.lstrip("!"), ())
        ins = p.instructions[found[0]] if len(found) == 1 else ins
    if ins.parts[0] != "setp" or ins.parts[1] not in ("eq", "ne") or ins.type not in ("b64", "s64", "u64"):
        return False
    found = p.definitions.get(ins.operands[1], ())
    upper = p.instructions[found[0]] if len(found) == 1 else ins
    return upper.parts[0] == "and" and upper.operands[2] == "-4294967296" and ins.operands[2] == "0"


def wide_division(p: Program, at: int) -> bool:
    """Whether an instruction is in the block that divides in 64 bits, to which only such a predicate's way leads."""
    block = p.places[at][0]
    while len(above := list(ways(p.code).predecessors(block))) == 1 and (code := p.code.blocks[above[0]]):
        last = code[-1]
        if last.parts[0] != "bra" or not last.guard:
            block = above[0]
            continue
        found = p.definitions.get(last.guard.lstrip("!"), ())
        if len(found) != 1 or not divides(p, p.number[above[0], len(code) - 1]):
            return False
        wide = (p.instructions[found[0]].parts[1] == "ne") != last.guard.startswith("!")
        return wide == (p.code.labels[last.operands[0]] == block)
    return False


def why_the_same(p: Program, changes: Changes) -> str | None:
    """A reason why a mutant does the same, seen in its text."""
    at, after = next(iter(changes.items()))
    if len(after) == 1 and after[0][:2] == p.instructions[at][:2] and reduced(p, at, after[0].guard):
        return "threads that store to one address have the same value, reduced over them; no address is left out"
    if all(wide_division(p, x) for x in changes):
        return "never run: a division in 64 bits of what stays below 2^32 (MOST_ROWS)"
    if len(after) == 1 and divides(p, at):
        return "both ways divide, in 32 or in 64 bits; what is divided stays below 2^32 (MOST_ROWS)"
    return None


def told(p: Program, changes: Changes) -> str:
    old, new = [p.instructions[at].text for at in changes], [ins.text for x in changes.values() for ins in x]
    return f"{'; '.join(old)}  ->  {'; '.join(new) or 'nothing'}"


def draw_ptx(judge: "Judge", seed: int, index: int, kinds: list[Kind] = PTX_KINDS) -> Mutant:
    """
    Raises:
        LookupError: no such kind has a place in any kernel.
    """
    dice = random.Random(f"ptx {seed} {index}")
    names = sorted({k.name for k in judge.kernels.values()})
    for _ in range(DRAWS):
        name = dice.choice(names)
        kind, digest = dice.choice(kinds), dice.choice([d for d, k in judge.kernels.items() if k.name == name])
        if kind.change is _narrow and not any(judge.cases[n].far for n in judge.users[digest]):
            continue
        p = judge.program(digest)
        places = [at for at, ins in enumerate(p.instructions) if kind.fits(ins)]
        if not places:
            continue
        at = dice.choice(places)
        changes = kind.change(p, at, dice)
        if changes is None:
            continue
        try:
            kernel = apply(p, changes)
        except (Unknown, KeyError):
            continue
        where, reason = p.instructions[at].where, why_the_same(p, changes)
        others, probe = tuple(arbitrary(p, changes)), _probe(p, changes, kind)
        return Mutant(index, kind.name, name, where, told(p, changes), digest, kernel, reason, others, probe)
    raise LookupError(f"no mutant in {DRAWS} draws of {', '.join(k.name for k in kinds)}")


# ---- mutations of the source ----


class Edit(NamedTuple):
    """Bytes ``start`` to ``end`` of a file of kernels/ become ``new``."""

    kind: str
    file: str
    function: str
    line: int
    start: int
    end: int
    new: str


SHAPES = {"arange", "reshape", "permute", "zeros", "full", "broadcast_to", "static_range", "inline_asm_elementwise"}
OTHER = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!="}
OTHER |= {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Mod: "//", ast.FloorDiv: "%"}
FILES = {"inner": "inner.py", "fold": "norm.py", "outer": "norm.py", "pixel_embed": "pixel_embed.py"}
ALSO = ("attention.py", "outer.py", "product.py", "tile.py", "totals.py")  # with kernels of outer's alone, and what all call
READ = tuple(dict.fromkeys((*FILES.values(), *ALSO)))


class Source:
    """A file of kernels/, and all edits of it that can be drawn."""

    def __init__(self, name: str):
        self.name, self.text = name, (TREE / "kernels" / name).read_bytes()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.edits: list[Edit] = []
        for function in ast.parse(self.text).body:
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                self._walk(function)

    def _walk(self, function: ast.FunctionDef) -> None:
        nodes = [n for statement in function.body for n in ast.walk(statement)]
        names = {n.id for n in nodes if isinstance(n, ast.Name)} | {a.arg for a in function.args.args}
        shapes = {id(x) for n in nodes if _called(n) in SHAPES for x in ast.walk(n)}
        shapes |= {id(x) for n in nodes if isinstance(n, ast.Subscript) for x in ast.walk(n.slice)}
        for node in nodes:
            edits = [*self._structure(node), *(() if id(node) in shapes else self._values(node, names))]
            for kind, at, new in edits:
                self.edits.append(Edit(kind, self.name, function.name, at.lineno, *self._span(at), new))

    def _span(self, node: ast.expr) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _of(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self.text[start:end].decode()

    def _structure(self, node: ast.AST) -> Iterator[tuple[str, ast.expr, str]]:
        """(kind, what is replaced, by what): masks, casts, loops, branches, sums."""
        call = _called(node)
        for keyword in node.keywords if call in ("load", "store") else ():
            if keyword.arg == "mask":
                yield "mask dropped", keyword.value, f"({self._of(keyword.value)}) == ({self._of(keyword.value)})"
            if keyword.arg == "other":
                yield "other changed", keyword.value, "1.0"
        if call == "load" and len(node.args) == 3:  # tile.load
            yield "mask dropped", node.args[2], f"({self._of(node.args[2])}) == ({self._of(node.args[2])})"
        if call == "where":
            yield "where dropped", node.args[0], f"({self._of(node.args[0])}) == ({self._of(node.args[0])})"
        if call == "trans":
            yield "transposition dropped", node, self._of(node.args[0])
        if call == "cast":
            yield "cast dropped", node, self._of(node.args[0])
        if call == "to" and not any(x.arg == "bitcast" for x in node.keywords):
            yield "cast dropped", node, self._of(node.func.value)
        if isinstance(node, ast.For) and _called(node.iter) == "range":
            first, last = (*node.iter.args, *node.iter.args)[:2]
            yield "range changed", first, f"{self._of(first)} + 1" if first is not last else f"1, {self._of(first)}"
            yield "range changed", last, f"{self._of(last)} - 1"
        if isinstance(node, ast.AugAssign):
            yield "accumulation dropped", node, f"{self._of(node.target)} = {self._of(node.target)}"
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, (ast.Compare, ast.BoolOp)):
            yield "branch forced", node.value, "True"
            yield "branch forced", node.value, "False"
        if isinstance(node, ast.If):
            yield "branch forced", node.test, f"not ({self._of(node.test)})"

    def _values(self, node: ast.AST, names: set[str]) -> Iterator[tuple[str, ast.expr, str]]:
        """The same for what is computed."""
        if isinstance(node, ast.BinOp):
            left, right = self._of(node.left), self._of(node.right)
            if isinstance(node.op, ast.BitAnd):
                yield "mask loosened", node, left
                yield "mask loosened", node, f"({right})"
            if isinstance(node.op, ast.Sub):
                yield "operands swapped", node, f"(({right}) - ({left}))"
            if type(node.op) in OTHER:
                yield "operator changed", node, f"(({left}) {OTHER[type(node.op)]} ({right}))"
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OTHER:
            yield (
                "comparison changed",
                node,
                f"({self._of(node.left)} {OTHER[type(node.ops[0])]} {self._of(node.comparators[0])})",
            )
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            other = node.value + 1 if isinstance(node.value, int) else node.value * 1.25 + (node.value == 0)
            yield "constant changed", node, repr(other)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            for name in sorted(names):
                if len(name) == len(node.id) and sum(a != b for a, b in zip(name, node.id, strict=True)) == 1:
                    yield "name replaced", node, name


def _called(node: ast.AST) -> str | None:
    """The last part of a call's name."""
    if not isinstance(node, ast.Call):
        return None
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def draw_source(seed: int, index: int, attempt: int = 0) -> Mutant:
    dice = random.Random(f"source {seed} {index} {attempt}")
    edits = [e for name in READ for e in Source(name).edits]
    kind = dice.choice(sorted({e.kind for e in edits}))
    file = dice.choice(sorted({e.file for e in edits if e.kind == kind}))
    edit = dice.choice([e for e in edits if e.kind == kind and e.file == file])
    old = (TREE / "kernels" / edit.file).read_bytes()[edit.start : edit.end].decode()
    text = f"{' '.join(old.split())}  ->  {' '.join(edit.new.split())}"
    return Mutant(index, f"source: {kind}", edit.function, f"{edit.file}:{edit.line}", text, None, edit)


def mutated_tree(edit: Edit, folder: Path) -> Path:
    """A source tree with the edit in it."""
    for part in ("tnt_fast", "kernels"):
        shutil.copytree(TREE / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "kernels" / edit.file
    text = path.read_bytes()
    path.write_bytes(text[: edit.start] + edit.new.encode() + text[edit.end :])
    return folder
