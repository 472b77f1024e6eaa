"""PTX as the machine reads it: its text taken apart, and each instruction as a line of NumPy.

A register is one array over all threads that run together, so that an instruction is an expression over arrays. What PTX
defines to the bit is computed to the bit: fused multiply-adds round once (through rounding to odd, Boldo and Melquiond 2008),
conversions to nearest even, min and max by their rules for NaN and signed zeros, subnormals kept or flushed as the instruction
says. What it does not define errs by the most that the PTX ISA allows, with the sign that a run asks for (``BOUNDS``).

An instruction, a modifier or a type that is not written here is an error, never a guess.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import networkx
import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

# The largest error of an approximate instruction (PTX ISA 8.7, "Floating Point Instructions"), relative or absolute.
BOUNDS = {
    ("ex2", "f32"): ("relative", 2.0**-22),  # 2 units in the last place; of 0 it is 1 to the bit, a special value
    ("rcp", "f32"): ("relative", 2.0**-23),  # 1 unit
    ("lg2", "f32"): ("either", 2.0**-22),  # absolute between 1/2 and 2, where the value is below 1; else relative
    ("rsqrt", "f32"): ("relative", 2.0**-22.9),
    ("sqrt", "f32"): ("relative", 2.0**-23),
    ("div", "f32"): ("relative", 2.0**-22),  # .full and .approx: 2 units
    ("tanh", "f32"): ("relative", 2.0**-11),
    ("tanh", "f16"): ("absolute", 2.0**-10.987),
    ("tanh", "bf16"): ("absolute", 2.0**-8),
}
FUNCTIONS = {"ex2": "np.exp2", "lg2": "np.log2", "rcp": "np.reciprocal", "rsqrt": "rsqrt", "sqrt": "np.sqrt", "tanh": "np.tanh"}


class Unknown(Exception):
    """PTX that the machine does not know."""


class Instruction(NamedTuple):
    """``parts``: the operation and its modifiers; ``where``: the line of the kernel's source that it was made from."""

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    text: str
    where: str

    @property
    def type(self) -> str:
        return self.parts[-1]


class Code(NamedTuple):
    """A kernel: parameters as (type, name), threads of a program, registers' types by family, blocks of straight-line code."""

    name: str
    target: str
    parameters: list[tuple[str, str]]
    threads: int
    registers: dict[str, str]
    blocks: list[list[Instruction]]
    labels: dict[str, int]


# ---- taking the text apart ----


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """(statement, source line) in order: instructions and register declarations without their ``;``, labels with ``:``.

    A register that is declared within braces is one of its own: its name gets the number of the scope.
    """
    where, open_, scopes = "?", "", 0
    names: list[tuple[int, set[str]]] = []  # of the scopes that are open: number, registers

    def renamed(statement: str) -> str:
        for scope, local in reversed(names):
            if local:
                statement = re.sub(rf"(?<![\w%$.@])({'|'.join(local)})\b(?!@)", rf"\1@{scope}", statement)
        return statement

    for raw in body.splitlines():
        text, _, comment = raw.partition("//")
        text = text.strip()
        if re.match(r"\.loc\s", text):
            seen = re.search(r"([\w.-]+:\d+):\d+", comment)
            where = seen[1] if seen else " ".join(text.split()[1:3])
            continue
        while text:
            if not open_ and text[0] in "{}":  # a scope, not a list of operands
                if text[0] == "{":
                    scopes += 1
                    names.append((scopes, set()))
                elif names:
                    names.pop()
                else:
                    raise Unknown(f"a brace that closes nothing ({where})")
                text = text[1:].strip()
                continue
            label = re.match(r"(\$\w+):", text) if not open_ else None
            if label:
                yield label[0], where
                text = text[label.end() :].strip()
                continue
            piece, end, text = text.partition(";")
            open_ = f"{open_} {piece}".strip()
            if not end:
                break
            statement, open_, text = " ".join(open_.split()), "", text.strip()
            if statement.startswith(".reg") and names:
                if "<" in statement:
                    raise Unknown(f"registers by number within braces, `{statement}` ({where})")
                names[-1][1].update(re.findall(r"[\w%]+", statement.split(maxsplit=2)[2]))
            yield renamed(statement), where
    if names or open_:
        raise Unknown(f"`{open_}`: an instruction without its end" if open_ else "a brace that is not closed")


def _split(text: str) -> tuple[str, ...]:
    """Operands at the commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append(text[start:at].strip())
            start = at + 1
    return tuple(part for part in (*parts, text[start:].strip()) if part)


def parse(ptx: str) -> Code:
    """
    Raises:
        Unknown: a text that is no PTX of one kernel with a fixed number of threads, whole warps.
    """
    entries = re.findall(r"\.entry\s+(\w+)\s*\(", ptx)
    target = re.search(r"^\.target\s+(\w+)", ptx, re.M)
    threads = re.search(r"^\.(?:reqntid|maxntid)\s+(\d+)\s*(?:,\s*1\s*)*$", ptx, re.M)
    if len(entries) != 1 or not target or not threads or int(threads[1]) % 32:
        found = f"{len(entries)} kernels, target {target and target[1]}, threads {threads and threads[1]}"
        raise Unknown(f"not the PTX of one kernel with a fixed number of threads: {found}")
    if not re.fullmatch(r"sm_(80|86|89|90|100|120)a?", target[1]):
        raise Unknown(f"target {target[1]}; accepted: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120")
    head, _, rest = ptx[ptx.index(".entry") :].partition("{")
    body = rest[: re.search(r"^\}", rest, re.M).start()]
    parameters = re.findall(r"\.param\s+\.(\w+)\b[^,)]*?(\w+)\s*(?=[,)\n])", head)
    registers: dict[str, str] = {}
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement, where in _statements(body):
        if statement.endswith(":"):
            if blocks[-1]:
                blocks.append([])
            labels[statement[:-1]] = len(blocks) - 1
        elif statement.startswith(".reg"):
            _, type_, names = statement.split(maxsplit=2)
            for name in names.split(","):
                registers[re.sub(r"<\d+>$", "", name.strip())] = type_[1:]
        elif statement.startswith("."):
            if statement.split()[0] != ".pragma":
                raise Unknown(f"directive `{statement}` ({where})")
        else:
            guard, bare = "", statement
            if statement.startswith("@"):
                guard, _, bare = statement.partition(" ")
            op, _, operands = bare.strip().partition(" ")
            instruction = Instruction(tuple(op.split(".")), _split(operands), guard[1:] or None, statement, where)
            blocks[-1].append(instruction)
            if instruction.parts[0] in ("bra", "ret", "exit"):
                blocks.append([])
    return Code(entries[0], target[1], parameters, int(threads[1]), registers, blocks, labels)


def ways(code: Code) -> networkx.DiGraph:
    """From which block to which."""
    graph = networkx.DiGraph()
    for i, block in enumerate(code.blocks):
        graph.add_node(i)
        last = block[-1] if block else None
        if last and last.parts[0] == "bra":
            graph.add_edge(i, code.labels[last.operands[0]])
        if i + 1 < len(code.blocks) and not (last and last.parts[0] in ("bra", "ret", "exit") and not last.guard):
            graph.add_edge(i, i + 1)
    return graph


# ---- arithmetic ----


def odd(rounded: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """``rounded`` (to nearest) made round-to-odd, given what rounding left: rounded once more to less, nothing is lost."""
    integer = np.int32 if rounded.dtype == np.float32 else np.int64
    bits = rounded.view(integer)
    wrong = (rest != 0) & ((bits & 1) == 0) & np.isfinite(rest) & np.isfinite(rounded)
    if not wrong.any():
        return rounded
    outwards = np.where((rest > 0) == (rounded > 0), integer(1), integer(-1))
    zero = rounded == 0  # below the smallest subnormal: away from zero on the side of what is left
    smallest = np.copysign(np.ones(1, integer).view(rounded.dtype), rest.astype(rounded.dtype)).view(integer)
    moved = np.where(zero, smallest, bits + outwards)
    return np.where(wrong, moved, bits).view(rounded.dtype)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c as float64, rounded to odd; a and b have at most 24 bits, so that their product is exact."""
    product = a * b
    total = product + c
    back = total - product
    return odd(total, (product - (total - back)) + (c - back))


def plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b as float64, rounded to odd."""
    total = a + b
    back = total - a
    return odd(total, (a - (total - back)) + (b - back))


def from_half(bits: np.ndarray, type_: str) -> np.ndarray:
    """float16 or bfloat16, as their bits, to float64."""
    if type_ == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def to_half(x: np.ndarray, type_: str) -> np.ndarray:
    """float64 to the bits of float16 or bfloat16, to nearest even."""
    if type_ == "f16":
        bits = x.astype(np.float16).view(np.uint16)
    else:
        narrow = x.astype(np.float32)
        narrow = odd(narrow, x - narrow.astype(np.float64))
        bits = narrow.view(np.uint32)
        bits = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of tf32, to nearest, ties away from zero (cvt.rna)."""
    return np.where(np.isfinite(x), (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000), x.view(np.uint32))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def minimum(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    return np.where((a == 0) & (b == 0), -(-a - b), np.minimum(a, b) if nan else np.fmin(a, b))


def maximum(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    return np.where((a == 0) & (b == 0), a + b, np.maximum(a, b) if nan else np.fmax(a, b))


def saturate(x: np.ndarray) -> np.ndarray:
    """Between 0 and 1; NaN is 0."""
    return np.where(np.isnan(x), 0.0, np.clip(x, 0.0, 1.0) + 0.0)


def rsqrt(x: np.ndarray) -> np.ndarray:
    return 1.0 / np.sqrt(x)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero."""
    if a.dtype.kind == "u":
        return a // b
    whole = a // b
    return np.where((a - whole * b != 0) & ((a < 0) != (b < 0)), whole + 1, whole).astype(a.dtype)


def upper_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of integers."""
    width = 8 * a.dtype.itemsize
    half, low = (np.uint64(x) for x in (width // 2, (1 << width // 2) - 1))
    x, y = (v.view(UNSIGNED[width]).astype(np.uint64) for v in (a, b))
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    upper = (x >> half) * (y >> half) + (middle >> half) + ((x & low) * (y >> half) + (middle & low) >> half)
    if a.dtype.kind == "i":
        upper = upper - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return upper.astype(UNSIGNED[width]).view(a.dtype)


def to_integer(x: np.ndarray, type_: str) -> np.ndarray:
    """A whole number in floating point to an integer, clamped to its range; NaN is 0."""
    info = np.iinfo(_numpy(type_))
    x = x.astype(np.float64)
    inside = np.clip(np.nan_to_num(x, nan=0.0), float(info.min), float(info.max))
    whole = np.where(inside >= 2.0**63, 0.0, inside).astype(np.int64 if type_ != "u64" else np.uint64)
    return np.where(x >= float(info.max), info.max, np.where(x <= float(info.min), info.min, whole)).astype(_numpy(type_))


def permute(a: np.ndarray, b: np.ndarray, select: np.ndarray) -> np.ndarray:
    """prmt: each byte of the result is one of the eight bytes of a and b, or (bit 3 of its selector) that byte's sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(a.shape, select.shape), np.uint32)
    for byte in range(4):
        chosen = (select >> np.uint32(4 * byte)) & np.uint32(15)
        value = ((both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        value = np.where(chosen > 7, np.where(value > 127, np.uint32(255), np.uint32(0)), value)
        out = out | (value << np.uint32(8 * byte))
    return out


_CALLED = (
    odd, fma, plus, from_half, to_half, to_tf32, flush, minimum, maximum, saturate, rsqrt, quotient,
    upper_half, to_integer, permute,
)  # fmt: skip
SCOPE = {"np": np} | {function.__name__: function for function in _CALLED}


def _numpy(type_: str) -> type:
    """The NumPy type that holds a PTX type; halves are their bits."""
    kind, bits = re.match(r"(bf|[a-z])(\d+)", type_).groups()
    if kind == "f" and bits in ("32", "64"):
        return {"32": np.float32, "64": np.float64}[bits]
    return np.dtype(f"i{int(bits) // 8}" if kind == "s" else f"u{int(bits) // 8}").type


# ---- translation ----

SPECIAL = ("%tid", "%ctaid", "%nctaid", "%ntid", "%laneid")
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
ROUNDING = {"rn", "ftz", "sat", "approx", "full", "NaN", "lo", "hi", "wide", "rna", "rni", "rzi", "rmi", "rpi"}
COUNT = {"mad": 3, "fma": 3, "bfe": 3, "bfi": 4, "not": 1, "neg": 1, "abs": 1}  # operands that are read, where not 2
WHOLE = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
LOGIC = {"and": "&", "or": "|", "xor": "^"}
REDUCTIONS = ("add", "min", "max")  # redux, besides LOGIC


class Translator:
    """Turns the instructions of one kernel into Python statements over arrays.

    Names in them: ``R`` the registers, ``P`` the state of the run (memory, barriers, shuffles), ``M`` the threads that take
    part in a block (only with ``masked``), ``k0``, ``k1``, … constants, which ``scope`` holds.
    """

    def __init__(self, code: Code):
        self.code, self.scope = code, dict(SCOPE)
        self.numbers: dict[str, int] = {}
        self.storage: list[type] = []  # of each register
        self._constants: dict[tuple, str] = {}
        for name, type_ in self._storages().items():
            self.numbers[name] = len(self.storage)
            self.storage.append(type_)

    def _declared(self, name: str) -> str | None:
        family = re.sub(r"\d+$", "", name) if name.startswith("%") else name
        return self.code.registers.get(family, self.code.registers.get(name))

    def _storages(self) -> dict[str, type]:
        """Each register's type: float32 where all that is written to it is, else unsigned integers."""
        found: dict[str, type] = {}
        writes: dict[str, list[str]] = {}  # 32-bit registers: "f32", another type, or the register that is copied
        for block in self.code.blocks:
            for ins in block:
                for at, operand in enumerate(ins.operands):
                    for name in re.findall(r"%?[A-Za-z_][\w@]*", operand):
                        declared = self._declared(name)
                        if declared is None:
                            if name.startswith("%") and name not in SPECIAL:
                                raise Unknown(f"register {name} of `{ins.text}` ({ins.where}) is not declared")
                            continue
                        found[name] = np.bool_ if declared == "pred" else UNSIGNED[int(declared[1:])]
                        if at == 0 and declared == "b32" and ins.parts[0] not in ("st", "stmatrix", "cp"):
                            copied = ins.parts[0] == "mov" and len(ins.operands) == 2 and ins.operands[1]
                            kind = copied if copied and not copied.startswith("{") else ins.type
                            kind = ins.parts[-2] if ins.parts[0] == "cvt" else kind
                            kind = "f32" if ins.parts[0] == "mma" or re.match(r"0[fF]", kind) else kind
                            writes.setdefault(name, []).append(kind if ins.parts[0] not in ("setp", "ld") else "b32")
        floats, changed = {n for n, kinds in writes.items() if any(k == "f32" or k in writes for k in kinds)}, True
        while changed:
            keep = {n for n in floats if all(k == "f32" or k in floats for k in writes[n])}
            changed, floats = keep != floats, keep
        return found | dict.fromkeys(floats, np.float32)

    # operands

    def _constant(self, value, dtype: type) -> str:
        key = (dtype, np.asarray(value, dtype).tobytes())
        if key not in self._constants:
            self._constants[key] = f"k{len(self._constants)}"
            self.scope[self._constants[key]] = dtype(value) if dtype is not np.float32 else np.asarray(value, dtype)[()]
        return self._constants[key]

    def value(self, text: str, type_: str) -> str:
        """An expression for an operand, as the NumPy type of ``type_``."""
        dtype = _numpy(type_)
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
            bits = np.uint32(int(match[1], 16)) if match[1] else np.uint64(int(match[2], 16))
            return self._constant(bits.view(dtype), dtype)
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            bits = UNSIGNED[np.dtype(dtype).itemsize * 8](int(text.rstrip("U"), 0) % (1 << (8 * np.dtype(dtype).itemsize)))
            return self._constant(bits.view(dtype), dtype)
        if text.split(".")[0] in SPECIAL:
            return self._as(f"P.special[{text!r}]", np.uint32, dtype)
        if text == "global_smem":
            return self._constant(0, dtype)
        if text not in self.numbers:
            raise Unknown(f"operand {text}")
        return self._as(f"R[{self.numbers[text]}]", self.storage[self.numbers[text]], dtype)

    @staticmethod
    def _as(expression: str, have: type, want: type) -> str:
        if have is want:
            return expression
        wide, narrow = np.dtype(have).itemsize, np.dtype(want).itemsize
        if narrow < wide:  # a narrow value in a wide register
            return f"{expression}.astype(np.{np.dtype(f'u{narrow}').name}).view(np.{np.dtype(want).name})"
        if narrow > wide:
            raise Unknown(f"an operand of {8 * wide} bits as one of {8 * narrow}")
        return f"{expression}.view(np.{np.dtype(want).name})"

    def predicate(self, text: str) -> str:
        if text.startswith("!"):
            return f"~{self.predicate(text[1:])}"
        if re.fullmatch(r"-?\d+", text):
            return f"P.full(np.bool_({text != '0'}))"
        if text not in self.numbers or self.storage[self.numbers[text]] is not np.bool_:
            raise Unknown(f"{text} as a predicate")
        return f"R[{self.numbers[text]}]"

    @staticmethod
    def _list(text: str) -> list[str]:
        return [part.strip() for part in text.strip("{} ").split(",")]

    def address(self, text: str, type_: str) -> str:
        match = re.fullmatch(r"\[\s*([%\w@]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not match:
            raise Unknown(f"address {text}")
        base, plus_ = match[1], int(match[2] or 0)
        if base == "global_smem":
            return f"P.full({self._constant(plus_, _numpy(type_))})"
        value = self.value(base, type_)
        dtype = _numpy(type_)
        return f"({value} + {self._constant(plus_ % (1 << np.dtype(dtype).itemsize * 8), dtype)})" if plus_ else value

    # statements

    def statements(self, ins: Instruction, number: int, masked: bool) -> list[str]:
        """Python for one instruction; ``number`` is how the run names it in a fault."""
        try:
            return _Statement(self, ins, number, masked).lines()
        except Unknown as error:
            raise Unknown(f"`{ins.text}` ({ins.where}): {error}") from None


class _Statement:
    def __init__(self, translator: Translator, ins: Instruction, number: int, masked: bool):
        self.t, self.ins, self.number, self.name = translator, ins, number, ins.parts[0]
        self.guard = translator.predicate(ins.guard) if ins.guard else None
        self.on = " & ".join(x for x in ("M" if masked else None, self.guard) if x) or None
        self.modifiers = set(ins.parts[1:-1])

    def lines(self) -> list[str]:
        ins = self.ins
        if method := getattr(self, f"_{self.name}", None):
            return method()
        if self.name in ("and", "or", "xor", "not") and ins.type == "pred":
            return self._logic()
        if unknown := self.modifiers - ROUNDING:
            raise Unknown(f"modifier {', '.join(sorted(unknown))}")
        type_ = ins.type
        if len(ins.operands) != 1 + COUNT.get(self.name, 1 if self.name in FUNCTIONS else 2):
            raise Unknown(f"{len(ins.operands)} operands")
        if type_ in ("f16x2", "bf16x2", "f16", "bf16"):
            return self._half(type_.removesuffix("x2"), type_.endswith("x2"))
        if type_ in ("f32", "f64", "f32x2"):
            return self._float("f32" if type_ == "f32x2" else type_, type_ == "f32x2")
        if re.fullmatch(r"[sub](16|32|64)(x2)?", type_):
            return self._integer(type_.removesuffix("x2"), type_.endswith("x2"))
        raise Unknown(f"type {type_}")

    def write(self, target: str, expression: str, type_: str) -> list[str]:
        """Assign a register an expression of the NumPy type of ``type_``."""
        if target == "_":
            return []
        number = self.t.numbers[target]
        have, want = (np.bool_ if type_ == "pred" else _numpy(type_)), self.t.storage[number]
        if have is not want:
            if np.dtype(have).itemsize != np.dtype(want).itemsize:
                raise Unknown(f"a result of {type_} in {target}")
            expression = f"({expression}).view(np.{np.dtype(want).name})"
        if self.on:
            expression = f"np.where({self.on}, {expression}, R[{number}])"
        return [f"R[{number}] = {expression}"]

    def value(self, at: int, type_: str | None = None) -> str:
        return self.t.value(self.ins.operands[at], type_ or self.ins.type)

    def _take(self, *allowed: str) -> None:
        if unknown := set(self.ins.parts[1:]) - set(allowed):
            raise Unknown(f"modifier {', '.join(sorted(unknown))}")

    # control

    def _ret(self):
        if self.guard:
            raise Unknown("a return with a guard")
        return ["return 'ret'"]

    _exit = _ret

    def _bra(self):
        self._take("uni")
        if self.ins.operands[0] not in self.t.code.labels:
            raise Unknown(f"label {self.ins.operands[0]}")
        target = self.t.code.labels[self.ins.operands[0]]
        if not self.guard:
            return [f"return {target}"]
        return [f"return {target}, {self.guard}"]

    def _bar(self):
        if self.guard or self.ins.parts not in (("bar", "sync"), ("bar", "warp", "sync")):
            raise Unknown("this barrier")
        if self.ins.operands != (("0",) if self.ins.parts[1] == "sync" else ("-1",)):
            raise Unknown("a barrier of some threads")
        return [f"P.{'barrier' if self.ins.parts[1] == 'sync' else 'warp_barrier'}({self.mask()}, {self.number})"]

    def mask(self) -> str:
        return self.on or "None"

    # memory

    def _cp(self):
        if self.ins.parts[1] != "async":
            raise Unknown("this copy")
        kind = self.ins.parts[2]
        if kind == "commit_group":
            return [f"P.commit({self.mask()}, {self.number})"]
        if kind == "wait_group":
            return [f"P.wait({int(self.ins.operands[0])}, {self.mask()}, {self.number})"]
        if kind not in ("ca", "cg") or self.ins.parts[3:] != ("shared", "global"):
            raise Unknown("this copy")
        target, source, size, *read = self.ins.operands
        read = f"P.full({self.t.value(read[0], 'b32')})" if read else "None"
        addresses = f"{self.t.address(target, 'b32')}, {self.t.address(source, 'b64')}"
        return [f"P.copy({addresses}, {int(size, 0)}, {read}, {self.mask()}, {self.number})"]

    def _ld(self):
        space, *modifiers = self.ins.parts[1:-1]
        type_ = self.ins.type
        if space == "param":
            target, name = self.ins.operands[0], self.ins.operands[1].strip("[]")
            if modifiers or name not in [n for _, n in self.t.code.parameters]:
                raise Unknown("this parameter")
            wide, width = np.dtype(self.t.storage[self.t.numbers[target]]).itemsize * 8, int(type_[1:])
            value = f"P.parameters[{name!r}].astype(np.uint{width})"
            if wide > width:  # sign or zero extended
                value += f".view(np.{np.dtype(_numpy(type_)).name}).astype(np.{'' if type_[0] == 's' else 'u'}int{wide})"
            return self.write(target, value, f"{'s' if type_[0] == 's' else 'b'}{wide}")
        targets = self._access(space, modifiers, self.ins.operands[0])
        address = self.t.address(self.ins.operands[1], "b32" if space == "shared" else "b64")
        out = [f"t = P.load_{space}({address}, {int(type_[1:])}, {len(targets)}, {self.mask()}, {self.number})"]
        for i, target in enumerate(targets):
            wide = 8 * np.dtype(self.t.storage[self.t.numbers[target]]).itemsize
            if wide > int(type_[1:]) and type_[0] != "s":  # zero extended
                out += self.write(target, f"t[{i}].astype(np.uint{wide})", f"b{wide}")
            else:
                out += self.write(target, f"t[{i}]", "b" + type_[1:])
        return out

    def _access(self, space: str, modifiers: list[str], operand: str) -> list[str]:
        registers = self.t._list(operand)
        vector = [m for m in modifiers if re.fullmatch(r"v[24]", m)]
        if (
            space not in ("shared", "global")
            or set(modifiers) - {*vector, "cg"}  # past L1: the same values
            or not re.fullmatch(r"[bsuf](16|32|64)", self.ins.type)
        ):
            raise Unknown("this access")
        if len(registers) != (int(vector[0][1]) if vector else 1):
            raise Unknown("another number of registers")
        return registers

    def _st(self):
        space, *modifiers = self.ins.parts[1:-1]
        type_ = "b" + self.ins.type[1:]
        values = [f"P.full({self.t.value(v, type_)})" for v in self._access(space, modifiers, self.ins.operands[1])]
        address = self.t.address(self.ins.operands[0], "b32" if space == "shared" else "b64")
        return [f"P.store_{space}({address}, [{', '.join(values)}], {self.mask()}, {self.number})"]

    def _matrix(self) -> int:
        rest = [p for p in self.ins.parts[1:] if p != "trans"]
        if self.guard or rest[:3] != ["sync", "aligned", "m8n8"] or rest[4:] != ["shared", "b16"]:
            raise Unknown("this form")
        return int(rest[3][1:])

    def _ldmatrix(self):
        count, trans = self._matrix(), "trans" in self.ins.parts
        address = self.t.address(self.ins.operands[1], "b32")
        out = [f"t = P.ldmatrix({address}, {count}, {trans}, {self.mask()}, {self.number})"]
        return out + [
            line for i, r in enumerate(self.t._list(self.ins.operands[0])) for line in self.write(r, f"t[{i}]", "b32")
        ]

    def _stmatrix(self):
        self._matrix()
        values = ", ".join(f"P.full({self.t.value(v, 'b32')})" for v in self.t._list(self.ins.operands[1]))
        address = self.t.address(self.ins.operands[0], "b32")
        return [f"P.stmatrix({address}, [{values}], {'trans' in self.ins.parts}, {self.mask()}, {self.number})"]

    # between threads

    def _mma(self):
        shape, types = self.ins.parts[3], self.ins.parts[6:]
        known = {"m16n8k16": ("f16", "bf16"), "m16n8k8": ("f16", "bf16", "tf32")}.get(shape, ())
        if self.guard or self.ins.parts[1:3] != ("sync", "aligned") or self.ins.parts[4:6] != ("row", "col"):
            raise Unknown("this form")
        if types != ("f32", types[1], types[1], "f32") or types[1] not in known:
            raise Unknown("these types")
        d, a, b, c = (self.t._list(x) for x in self.ins.operands)
        a, b = (", ".join(self.t.value(v, "b32") for v in x) for x in (a, b))
        c = ", ".join(f"P.full({self.t.value(v, 'f32')})" for v in c)
        out = [f"t = P.mma({types[1]!r}, [{a}], [{b}], [{c}], {self.mask()}, {self.number})"]
        return out + [line for i, r in enumerate(d) for line in self.write(r, f"t[{i}]", "f32")]

    def _wgmma(self):
        """Asynchronous: of operands in shared memory, which descriptors describe."""
        kind, mask = self.ins.parts[1], self.mask()
        if self.guard or self.ins.parts[2:4] != ("sync", "aligned"):
            raise Unknown("this form")
        if kind == "fence" and not self.ins.operands:
            return []  # of registers: what a product has not delivered is NaN here
        if kind == "commit_group":
            return [f"P.commit_products({mask}, {self.number})"]
        if kind == "wait_group":
            return [f"P.wait_products({int(self.ins.operands[0])}, {mask}, {self.number})"]
        shape, types = re.fullmatch(r"m64n(\d+)k16", self.ins.parts[4]), self.ins.parts[5:]
        if kind != "mma_async" or not shape or types not in (("f32", "f16", "f16"), ("f32", "bf16", "bf16")):
            raise Unknown("these types")
        d, a, b, has_sum, *ways = self.ins.operands
        results = [self.t.numbers[name] for name in self.t._list(d)]
        if a.startswith("{") or ways[:2] != ["1", "1"] or len(results) != int(shape[1]) // 2:
            raise Unknown("these operands")
        left, right = (f"P.full({self.t.value(x, 'b64')})" for x in (a, b))
        transposed = tuple(way == "1" for way in ways[2:])
        total = (
            f"P.full({self.t.predicate(has_sum)})" if has_sum.startswith(("%", "!")) else f"P.full(np.bool_({has_sum != '0'}))"
        )
        return [f"P.wgmma({types[1]!r}, {results}, {left}, {right}, {total}, {transposed}, {mask}, {self.number})"]

    def _fence(self):
        if self.guard or self.ins.parts[1:] != ("proxy", "async", "shared::cta"):
            raise Unknown("this fence")
        return [f"P.proxy_fence({self.mask()}, {self.number})"]

    def _shfl(self):
        mode = self.ins.parts[2]
        if self.ins.parts[1] != "sync" or mode not in ("bfly", "idx", "up", "down") or self.ins.type != "b32":
            raise Unknown("this form")
        if "|" in self.ins.operands[0] or self.ins.operands[4] != "-1":
            raise Unknown("a shuffle of some threads")
        value, by, clamp = (f"P.full({self.value(i, 'b32')})" for i in (1, 2, 3))
        return self.write(
            self.ins.operands[0], f"P.shuffle({mode!r}, {value}, {by}, {clamp}, {self.mask()}, {self.number})", "b32"
        )

    def _redux(self):
        how, type_ = self.ins.parts[2], self.ins.type
        types = ("b32",) if how in LOGIC else ("u32", "s32") if how in REDUCTIONS else ()
        if self.ins.parts[1] != "sync" or len(self.ins.parts) != 4 or type_ not in types:
            raise Unknown("this form")
        value, members = f"P.full({self.value(1, type_)})", f"P.full({self.value(2, 'b32')})"
        return self.write(self.ins.operands[0], f"P.reduce({how!r}, {value}, {members}, {self.mask()}, {self.number})", type_)

    # moving

    def _mov(self):
        self._take(self.ins.type)
        target, source = self.ins.operands
        if self.ins.type == "pred":
            return self.write(target, self.t.predicate(source), "pred")
        width = int(self.ins.type[1:])
        if target.startswith("{"):
            parts = self.t._list(target)
            each = width // len(parts)
            out = [f"t = P.full({self.value(1, f'b{width}')}).view(np.uint{each}).reshape(-1, {len(parts)})"]
            return out + [x for i, r in enumerate(parts) for x in self.write(r, f"np.ascontiguousarray(t[:, {i}])", f"b{each}")]
        if source.startswith("{"):
            parts = self.t._list(source)
            each = width // len(parts)
            values = ", ".join(f"P.full({self.t.value(p, f'b{each}')})" for p in parts)
            return self.write(target, f"np.stack([{values}], 1).view(np.uint{width}).reshape(-1)", f"b{width}")
        type_ = "f32" if width == 32 and self.t.storage[self.t.numbers[target]] is np.float32 else f"b{width}"
        if source in self.t.numbers:
            return self.write(target, self.t.value(source, type_), type_)
        return self.write(target, f"P.full({self.t.value(source, type_)})", type_)

    def _logic(self):
        self._take("pred")
        first, *rest = (self.t.predicate(x) for x in self.ins.operands[1:])
        if self.name == "not":
            return self.write(self.ins.operands[0], f"~{first}", "pred")
        return self.write(self.ins.operands[0], f"({first} {LOGIC[self.name]} {rest[0]})", "pred")

    def _setp(self):
        compare, *more = self.ins.parts[1:-1]
        type_ = self.ins.type
        if set(more) - {"and", "or", "xor", "ftz"} or "|" in self.ins.operands[0]:
            raise Unknown("this form")
        if type_ in ("f16", "bf16"):
            a, b = (f"from_half({self.value(i, type_)}, {type_!r})" for i in (1, 2))
        else:
            a, b = (self.value(i) for i in (1, 2))
        if "ftz" in more:
            a, b = f"flush({a})", f"flush({b})"
        if compare in ("num", "nan"):
            expression = f"(np.isnan({a}) | np.isnan({b}))"
            expression = f"~{expression}" if compare == "num" else expression
        elif compare in COMPARE:
            expression = f"({a} {COMPARE[compare]} {b})"
            if compare == "ne" and "f" in type_:  # ordered
                expression = f"({expression} & ~np.isnan({a}) & ~np.isnan({b}))"
        elif compare[:-1] in COMPARE and compare[-1] == "u":  # unordered
            expression = f"(({a} {COMPARE[compare[:-1]]} {b}) | np.isnan({a}) | np.isnan({b}))"
        else:
            raise Unknown(f"comparison {compare}")
        if len(self.ins.operands) > 3:
            expression = f"({expression} {LOGIC[next(m for m in more if m in LOGIC)]} {self.t.predicate(self.ins.operands[3])})"
        return self.write(self.ins.operands[0], f"P.full({expression})", "pred")

    def _selp(self):
        type_ = self.ins.type
        expression = f"np.where({self.t.predicate(self.ins.operands[3])}, {self.value(1)}, {self.value(2)})"
        return self.write(self.ins.operands[0], expression, type_)

    def _prmt(self):
        self._take("b32")
        a, b, select = (f"P.full({self.value(i, 'b32')})" for i in (1, 2, 3))
        return self.write(self.ins.operands[0], f"permute({a}, {b}, {select})", "b32")

    # integers

    def _integer(self, type_: str, packed: bool):
        name, width, signed = self.name, int(type_[1:]), type_[0] == "s"
        if packed:
            if name not in ("add",) or width != 16:
                raise Unknown("packed integers")
            a, b = (f"P.full({self.value(i, 'b32')}).view(np.uint16)" for i in (1, 2))
            return self.write(self.ins.operands[0], f"({a} + {b}).view(np.uint32)", "b32")
        wide = "wide" in self.modifiers
        high = "hi" in self.modifiers
        if name in ("mul", "mad"):
            if self.modifiers - {"lo", "hi", "wide"} or (wide and width == 64):
                raise Unknown("this form")
            if high:
                e = f"upper_half({self.value(1)}, {self.value(2)})"
            elif wide:
                type_ = f"{type_[0]}{2 * width}"
                a, b = (f"{self.value(i)}.astype(np.{np.dtype(_numpy(type_)).name})" for i in (1, 2))
                e = f"({a} * {b})"
            else:
                e = f"({self.value(1)} * {self.value(2)})"
            if name == "mad":
                e = f"({e} + {self.value(3, type_)})"
            return self._result(e, type_)
        if name in ("shl", "shr"):
            a, by = self.value(1), self.value(2, "b32")
            most = self.t._constant(width - 1, np.uint32)
            by_ = f"np.minimum({by}, {most}).astype(np.{np.dtype(_numpy(type_)).name})"
            e = f"({a} {'<<' if name == 'shl' else '>>'} {by_})"
            if not (name == "shr" and signed):
                e = f"np.where({by} > {most}, {self.t._constant(0, _numpy(type_))}, {e})"
            return self._result(e, type_)
        if name == "bfe":
            at, length = self._field(2)
            bits = int(type_[1:])
            up, down = (self.t._constant(x, _numpy(type_)) for x in (bits - at - length, bits - length))
            return self._result(f"(({self.value(1)} << {up}) >> {down})", type_)
        if name == "bfi":
            at, length = self._field(3)
            field, up = (self.t._constant(x, _numpy(type_)) for x in (((1 << length) - 1) << at, at))
            e = f"(({self.value(2)} & ~{field}) | (({self.value(1)} << {up}) & {field}))"
            return self._result(e, type_)
        if self.modifiers:
            raise Unknown(f"modifier {', '.join(sorted(self.modifiers))}")
        if name in ("not", "neg", "abs"):
            a = self.value(1)
            return self._result({"not": f"(~{a})", "neg": f"(-{a})", "abs": f"np.abs({a})"}[name], type_)
        a, b = self.value(1), self.value(2)
        signs = {"add": "+", "sub": "-", **LOGIC}
        calls = {"min": "np.minimum", "max": "np.maximum", "div": "quotient"}
        if name in signs:
            return self._result(f"({a} {signs[name]} {b})", type_)
        if name in calls:
            return self._result(f"{calls[name]}({a}, {b})", type_)
        if name == "rem":
            return self._result(f"({a} - quotient({a}, {b}) * {b})", type_)
        raise Unknown("this instruction")

    def _field(self, first: int) -> tuple[int, int]:
        bits = int(self.ins.type[1:])
        at, length = (int(x) if x.isdecimal() else bits for x in self.ins.operands[first:])
        if not 0 < length <= bits - at:
            raise Unknown(f"a field that is not constant, or not within {bits} bits")
        return at, length

    def _result(self, expression: str, type_: str) -> list[str]:
        return self.write(self.ins.operands[0], f"P.full({expression})", type_)

    # floating point

    def _approximate(self, value: str, type_: str) -> str:
        """An approximate function's value, off by what is allowed."""
        if (self.name, type_) not in BOUNDS:
            raise Unknown("an approximation whose error is not known here")
        kind, bound = BOUNDS[self.name, type_]
        off = f"{value} * (1.0 + P.error * {bound!r})" if kind == "relative" else f"({value} + P.error * {bound!r})"
        if kind == "either":
            off = f"({value} + P.error * {bound!r} * np.maximum(1.0, np.abs({value})))"
        return f"np.clip({off}, -1.0, 1.0)" if self.name == "tanh" else off

    def _half(self, type_: str, packed: bool):
        name, width = self.name, 32 if packed else 16
        if "ftz" in self.modifiers:
            raise Unknown("modifier ftz")
        bits = [f"P.full({self.value(i, f'b{width}')}).view(np.uint16)" for i in range(1, len(self.ins.operands))]
        a = [f"from_half({x}, {type_!r})" for x in bits]
        if name in ("neg", "abs"):
            sign = self.t._constant(0x8000 if name == "neg" else 0x7FFF, np.uint16)
            e = f"({bits[0]} {'^' if name == 'neg' else '&'} {sign})"
        else:
            if name == "mul":
                e = f"({a[0]} * {a[1]})"  # exact
            elif name in ("add", "sub"):
                e = f"plus({a[0]}, {'-' * (name == 'sub')}{a[1]})"
            elif name == "fma":
                e = f"fma({', '.join(a)})"
            elif name in ("min", "max"):
                e = f"{name}imum({a[0]}, {a[1]}, {'NaN' in self.modifiers})"
            elif name in FUNCTIONS and "approx" in self.modifiers:
                e = self._approximate(f"{FUNCTIONS[name]}({a[0]})", type_)
            else:
                raise Unknown("this instruction")
            e = f"to_half({'saturate(' * ('sat' in self.modifiers)}{e}{')' * ('sat' in self.modifiers)}, {type_!r})"
        return self.write(self.ins.operands[0], f"({e}).view(np.uint{width})", f"b{width}")

    def _float(self, type_: str, packed: bool):
        name, ftz = self.name, "ftz" in self.modifiers
        if packed:
            a = [f"P.full({self.value(i, 'b64')}).view(np.float32)" for i in range(1, len(self.ins.operands))]
        else:
            a = [self.value(i, type_) for i in range(1, len(self.ins.operands))]
        if ftz:
            a = [f"flush({x})" for x in a]
        if name in ("add", "sub", "mul"):
            e = f"({a[0]} {dict(add='+', sub='-', mul='*')[name]} {a[1]})"
        elif name == "fma" and type_ == "f32":
            e = f"fma({', '.join(f'{x}.astype(np.float64)' for x in a)}).astype(np.float32)"
        elif name in ("min", "max"):
            e = f"{name}imum({a[0]}, {a[1]}, {'NaN' in self.modifiers})"
        elif name == "neg":
            e = f"(-{a[0]})"
        elif name == "abs":
            e = f"np.abs({a[0]})"
        elif name == "div" and type_ == "f32" and self.modifiers & {"rn", "full"}:
            value = f"({a[0]}.astype(np.float64) / {a[1]})"
            e = f"({value if 'rn' in self.modifiers else self._approximate(value, type_)}).astype(np.float32)"
        elif name in FUNCTIONS and type_ == "f32":
            value = f"{FUNCTIONS[name]}({a[0]}.astype(np.float64))"
            if "approx" in self.modifiers:
                value = self._approximate(value, type_)
                value = f"np.where({a[0]} == 0, 1.0, {value})" if name == "ex2" else value
            e = f"({value}).astype(np.float32)"
        else:
            raise Unknown("this instruction")
        if "sat" in self.modifiers:
            e = f"saturate({e}).astype(np.float32)"
        if ftz:
            e = f"flush({e})"
        if packed:
            return self.write(self.ins.operands[0], f"np.ascontiguousarray({e}).view(np.uint64)", "b64")
        return self._result(e, type_)

    def _cvt(self):
        types = [p for p in self.ins.parts[1:] if re.fullmatch(r"(bf|tf|[fsu])\d+(x2)?", p)]
        modifiers = set(self.ins.parts[1:]) - set(types)
        if len(types) != 2 or len(modifiers) > 1 or modifiers - {"rn", "rna", *WHOLE}:
            raise Unknown("this conversion")
        to, source = types
        how = next(iter(modifiers), None)
        floats = [x[0] not in "su" for x in types]
        if (how == "rna") != (to == "tf32") or (how in WHOLE) > floats[1] or (floats == [False, True] and how not in WHOLE):
            raise Unknown("this rounding")
        target, *operands = self.ins.operands
        if to in ("f16x2", "bf16x2"):
            high, low = (f"np.broadcast_to({self.t.value(x, 'f32')}.astype(np.float64), P.lanes)" for x in operands)
            e = f"np.stack([to_half({low}, {to[:-2]!r}), to_half({high}, {to[:-2]!r})], 1).view(np.uint32).reshape(-1)"
            return self.write(target, e, "b32")
        if source[0] in "su":
            value = self._narrow(operands[0], source)
        elif source in ("f16", "bf16"):
            value = f"from_half({self.t.value(operands[0], source)}, {source!r})"
        else:
            value = self.t.value(operands[0], source)
        if to in ("f16", "bf16"):
            if source in ("s64", "u64"):  # float64 does not hold them
                raise Unknown("this conversion")
            return self._result(f"to_half({WHOLE.get(how, '')}({value}.astype(np.float64)), {to!r})", to)
        if to == "tf32":
            return self._result(f"to_tf32({value})", "b32")
        if to in ("f32", "f64"):
            return self._result(f"{WHOLE.get(how, '')}({value}).astype(np.{np.dtype(_numpy(to)).name})", to)
        if source[0] not in "su":
            value = f"to_integer({WHOLE[how]}({value}), {to!r})"
        # an integer narrower than its register is extended into it, by the sign of the type it was converted to
        register = np.dtype(self.t.storage[self.t.numbers[target]]).itemsize * 8
        e = f"{value}.astype(np.{np.dtype(_numpy(to)).name}).astype(np.{'' if to[0] == 's' else 'u'}int{register})"
        return self._result(e, f"{to[0]}{register}")

    def _narrow(self, text: str, type_: str) -> str:
        """An integer operand, which may lie in a wider register."""
        if text in self.t.numbers:
            width = np.dtype(self.t.storage[self.t.numbers[text]]).itemsize * 8
            return f"{self.t.value(text, f'b{width}')}.astype(np.uint{type_[1:]}).view(np.{np.dtype(_numpy(type_)).name})"
        return self.t.value(text, type_)
