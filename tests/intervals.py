"""Proof that no address of a kernel overflows: interval analysis of Triton's IR, as its first stage leaves it.

Every integer that an address or a mask of a load or store is made of gets an interval that holds its value, from the ranges in
which the launchers pass their integers. Where the exact result of an operation leaves its type, the address may be wrong: a
finding. An operation without a rule here, a value carried round a loop, or an index out of memory is an error, never a guess.

Intervals know nothing of relations ("n_patches is rows · columns"). Those that matter are in the ranges instead: the extents
of a launch are cut into pieces, and for each piece the launcher's own arithmetic gives the ranges of what it passes.

Assumed: at most ROWS rows (tokens, pixels, patches) a launch and SIDE pixels along a side; tensors in storages of at most
STORAGE values, so that a stride along an extent of n is at most STORAGE / (n − 1); none of the counts is 0, with which nothing
is launched; at most as many programs as there are turns, and RESIDENT in a grid that stays. Addresses stay within 61 bits, for
values of up to 8 bytes.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROWS = 2**30
RESIDENT = 2**20
SIDE = 2**20
STORAGE = 2**44  # a hundred times the memory of a GPU of 2026
POINTER_BITS = 61
PIECE = 2**4  # an extent's pieces end where it is this many times as long as at their beginning


class Typed(NamedTuple):
    """A launch whose arguments are their types, by name, in Triton's spelling ("*bf16", "i32", …), None for what is absent."""

    kernel: Any
    constants: dict[str, Any]
    config: Any
    types: dict[str, Any]


class Interval(NamedTuple):
    low: int
    high: int


BOOLEAN = Interval(0, 1)


def _corners(operation: Callable[[int, int], int]) -> Callable[[Interval, Interval], Interval]:
    """The rule of an operation that is monotone in either operand while the other one stays."""

    def rule(a: Interval, b: Interval) -> Interval:
        values = [operation(x, y) for x in a for y in b]
        return Interval(min(values), max(values))

    return rule


def _quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def _divide(a: Interval, b: Interval) -> Interval:
    """Rounded towards zero; dividing by zero is undefined, so that the divisor is not."""
    signs = [Interval(max(b.low, 1), b.high), Interval(b.low, min(b.high, -1))]
    return _hull([_corners(_quotient)(a, part) for part in signs if part.low <= part.high])


def _remainder(a: Interval, b: Interval) -> Interval:
    """Of _divide: with the dividend's sign."""
    nearest = b.low if b.low > 0 else -b.high if b.high < 0 else 1
    if max(map(abs, a)) < nearest:
        return a
    most = max(map(abs, b)) - 1
    return Interval(max(a.low, -most) if a.low < 0 else 0, min(a.high, most) if a.high > 0 else 0)


def _hull(parts: Iterable[Interval]) -> Interval:
    lows, highs = zip(*parts, strict=True)
    return Interval(min(lows), max(highs))


def _same(a: Interval) -> Interval:
    return a


def _boolean(a: Interval, b: Interval) -> Interval:
    return BOOLEAN


def _bits(a: Interval, b: Interval) -> Interval:
    """And, or and exclusive or of numbers that are not negative."""
    if min(a.low, b.low) < 0:
        raise ValueError(f"bits of negative numbers, {a} and {b}")
    return Interval(0, 2 ** max(a.high.bit_length(), b.high.bit_length()) - 1)


def _unsigned(a: Interval) -> Interval:
    """Of at most 32 bits: those below zero become the largest."""
    return a if a.low >= 0 else Interval(0, 2**32 - 1)


def _induction(first: Interval, end: Interval, step: Interval) -> Interval:
    if step.low < 0:
        raise ValueError(f"a loop's step may be {step}")
    return Interval(first.low, max(first.low, end.high - 1))


RULES: dict[str, Callable[..., Interval]] = {
    "arith.addi": _corners(lambda x, y: x + y),
    "arith.subi": _corners(lambda x, y: x - y),
    "arith.muli": _corners(lambda x, y: x * y),
    "arith.divsi": _divide,
    "arith.remsi": _remainder,
    "arith.minsi": _corners(min),
    "arith.maxsi": _corners(max),
    "arith.andi": _bits,
    "arith.ori": _bits,
    "arith.xori": _bits,
    "arith.cmpi": _boolean,
    "arith.select": lambda condition, a, b: _hull([a, b]),
    "arith.extsi": _same,
    "arith.extui": _unsigned,
    "arith.trunci": _same,  # what does not fit is a finding, as after every operation
    "tt.addptr": _corners(lambda x, y: x + y),  # a pointer counts from where its argument points
    "tt.splat": _same,
    "tt.broadcast": _same,
    "tt.expand_dims": _same,
    "tt.reshape": _same,
    "tt.trans": _same,
}
NUMERIC = {f"arith.{name}" for name in ("addi", "subi", "muli", "divsi", "remsi", "minsi", "maxsi", "trunci")}  # of no boolean
PROGRAMS = {"tt.get_program_id": "program_id", "tt.get_num_programs": "num_programs"}  # in the ranges, like arguments
MASKS = {"tt.load": 1, "tt.store": 2}  # operand 0 is the address

OPERATION = re.compile(r"\s*(?:(?P<result>%[\w$.-]+)(?::\d+)? = )?\"?(?P<name>(?:[a-z]\w*\.)+\w+)\"?(?P<rest>.*)")
VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
LOCATION = re.compile(r"\s*loc\((?P<text>#loc\d*|unknown)\)$")


class Step(NamedTuple):
    """How one value comes about; where ``rule`` is None, ``name`` is that of an argument. ``where``: file and line."""

    value: str
    name: str
    rule: Callable[..., Interval] | None
    operands: tuple[str, ...]
    bits: int
    where: str


class Finding(NamedTuple):
    """A value that its type may not hold."""

    where: str
    name: str
    bits: int
    interval: Interval

    def __str__(self) -> str:
        return f"{self.where}: {self.name} gives {self.interval.low} to {self.interval.high} in {self.bits} bits"


def _type_bits(text: str) -> int:
    """Width of the result of an operation, from the types behind it."""
    result = re.split(r" -> | to ", text.rsplit(" : ", 1)[-1])[-1]
    if "!tt.ptr" in result:
        return POINTER_BITS
    return int(re.findall(r"(?:\b|x)i(\d+)\b", result)[-1])


def _constant(text: str) -> Interval:
    values = re.fullmatch(r" (?:dense<)?(true|false|-?\d+|\[[-\d, \[\]]+\])>?(?: : .*)?", text)
    if not values:
        raise ValueError(f"a constant that is no integer:{text}")
    numbers = [int(x) for x in re.findall(r"-?\d+", values[1])] or [int(values[1] == "true")]
    return Interval(min(numbers), max(numbers))


class Kernel:
    """A kernel's IR, cut down to what addresses and masks are made of; ``arguments``: those of run time, by name, in order."""

    def __init__(self, text: str, arguments: list[str]) -> None:
        # value: operation, operands, what stands behind it, location
        self._definitions: dict[str, tuple[str, list[str], str, str]] = {}
        self._locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
        self.steps: dict[str, Step] = {}
        self.accesses = 0
        sinks, loops = [], []
        scopes: list[dict[str, str]] = [{}]  # names come again in other regions: values are told apart by their lines
        for number, line in enumerate(text.splitlines()):
            at = LOCATION.search(line)
            where = at["text"] if at else ""
            line = line[: at.start()] if at else line
            if line.lstrip().startswith("}"):
                scopes.pop()
                if loop := loops.pop():  # a loop's location stands behind it
                    self._definitions[loop] = (*self._definitions[loop][:3], where)
            operation = OPERATION.fullmatch(line)
            name, rest = (operation["name"], operation["rest"]) if operation else ("", "")
            operands = [next((scope[v] for scope in reversed(scopes) if v in scope), v) for v in VALUE.findall(rest)]
            if operation and operation["result"] and name != "scf.for":
                value = scopes[-1][operation["result"]] = f"{operation['result']} of line {number}"
                self._definitions[value] = (name, operands, rest, where)
            if line.endswith("{"):
                scopes.append({})
                loops.append(None)
            if name == "tt.func":
                if self.steps:
                    raise ValueError("a kernel of several functions")
                given = re.findall(r"(%[\w$.-]+): ([^\s,)]+)", rest)
                for (value, kind), argument in zip(given, arguments, strict=True):
                    scopes[-1][value] = value
                    bits = 0 if re.match(r"f\d|bf16", kind) else _type_bits(kind)
                    self.steps[value] = Step(value, argument, None, (), bits, where)
            elif name == "scf.for":
                variable = VALUE.search(rest)[0]
                value = scopes[-1][variable] = loops[-1] = f"{variable} of line {number}"
                self._definitions[value] = (name, operands[1:4], rest, where)
            elif name in MASKS:
                sinks += operands[:1] + operands[MASKS[name] : MASKS[name] + 1]
                self.accesses += 1
            if ("!tt.ptr" in rest or "desc" in rest) and name not in RULES and name not in MASKS and name != "tt.func":
                raise ValueError(f"no rule for addresses in {name}{rest}")
        if self.accesses != len(re.findall(r"\b(?:tt\.load|tt\.store)\b", text)):
            raise ValueError("loads or stores were not recognised")
        for value in sinks:
            self._visit(value)

    def _where(self, location: str) -> str:
        """File and line, of the innermost of several calls."""
        while location in self._locations:
            text = self._locations[location]
            if place := re.search(r'"([^"]+)":(\d+):\d+', text):
                return f"{Path(place[1]).name}:{place[2]}"
            location = (re.findall(r"#loc\d*", text) or [""])[0]
        return "somewhere"

    def _visit(self, value: str) -> None:
        """Append the steps to a value, operands first."""
        if value in self.steps:
            return
        if value not in self._definitions:
            raise ValueError(f"no rule for {value}: it comes out of a loop or a branch")
        name, operands, rest, location = self._definitions[value]
        where = self._where(location)
        if name == "scf.for" and not rest.startswith(" unsigned"):
            rule, bits = _induction, int(re.findall(r": i(\d+) \{$", rest)[0])
        elif name in RULES:
            rule, bits = RULES[name], _type_bits(rest)
            if (bits == 1 and name in NUMERIC) or (name == "arith.extsi" and re.search(r"\b(?:\d+x)*i1\b", rest)):
                raise ValueError(f"{where}: no rule for {name} of booleans, of which an address is made")
        elif name == "tt.make_range":
            ends = {key: int(n) for key, n in re.findall(r"(start|end) = (\d+)", rest)}
            rule, bits = (lambda: Interval(ends["start"], ends["end"] - 1)), 32
        elif name == "arith.constant":
            constant = _constant(rest)
            rule, bits = (lambda: constant), 64
        elif name in PROGRAMS:
            name, rule, bits = PROGRAMS[name], None, 32
        else:
            raise ValueError(f"{where}: no rule for {name}, of which an address is made")
        for operand in operands:
            self._visit(operand)
        self.steps[value] = Step(value, name, rule, tuple(operands), bits, where)
        if name == "scf.for":  # it is computed once more than the loop runs
            self.steps[f"{value} + step"] = Step(
                f"{value} + step", name, RULES["arith.addi"], (value, operands[2]), bits, where
            )

    def findings(self, ranges: Iterable[dict[str, Interval]]) -> list[Finding]:
        """What may overflow in one of several pieces of the ranges of the run-time integers and of the programs."""
        constant, changing = [], []
        varied = set()
        for step in self.steps.values():
            varies = step.rule is None or not varied.isdisjoint(step.operands)
            varied |= {step.value} if varies else set()
            (changing if varies else constant).append(step)
        found: dict[str, Interval] = {}
        fixed: dict[str, Interval] = {}
        self._follow(constant, {}, fixed, found)
        for piece in ranges:
            self._follow(changing, piece, dict(fixed), found)
        return [Finding(self.steps[v].where, self.steps[v].name, self.steps[v].bits, x) for v, x in found.items()]

    @staticmethod
    def _follow(steps: list[Step], ranges: dict[str, Interval], known: dict[str, Interval], found: dict[str, Interval]) -> None:
        for value, name, rule, operands, bits, _ in steps:
            if rule is not None:
                interval = rule(*[known[operand] for operand in operands])
            else:
                interval = Interval(0, 0) if bits in (0, POINTER_BITS) else ranges[name]  # floats, pointers
            least, most = -(1 << bits - 1) if bits else 0, (1 << bits - 1) - 1 if bits else 0
            if bits > 1 and not least <= interval.low <= interval.high <= most:
                found[value] = _hull([found.get(value, interval), interval])
                # what comes after it is not reported for the same cause
                interval = Interval(min(max(interval.low, least), most), max(min(interval.high, most), least))
            known[value] = interval


def _fields(types: Any) -> dict[str, Any]:
    if type(types) is tuple:
        return {str(at): kind for at, kind in enumerate(types)}
    return types._asdict() if hasattr(types, "_asdict") else types


def named(types: Any, prefix: str = "") -> dict[str, Any]:
    """The types of a launch's arguments by name, those in a tuple by its name, a dot and their own, or their number."""
    found = {}
    for name, kind in _fields(types).items():
        found |= named(kind, f"{prefix}{name}.") if isinstance(kind, tuple) else {f"{prefix}{name}": kind}
    return found


def changed(types: Any, kinds: dict[str, Any], prefix: str = "") -> Any:
    """The types with some of them, by name as in ``named``, exchanged."""
    found = {
        name: changed(kind, kinds, f"{prefix}{name}.") if isinstance(kind, tuple) else kinds.get(f"{prefix}{name}", kind)
        for name, kind in _fields(types).items()
    }
    return tuple(found.values()) if type(types) is tuple else type(types)(**found)


def typed(launch: Any) -> Typed:
    """Of a launch that was recorded (benchmarks.launched)."""

    def kind(x: Any) -> Any:
        if isinstance(x, tuple):
            return type(x)(*map(kind, x)) if hasattr(x, "_fields") else tuple(map(kind, x))
        if isinstance(x, torch.Tensor):
            return {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[x.dtype]
        return {int: "i32", float: "fp32", type(None): None}[type(x)]

    types = dict(zip(launch.kernel.arg_names, map(kind, launch.arguments), strict=False))
    return Typed(launch.kernel, launch.constants, launch.spec.config, types)


def integers(launch: Any) -> list[str]:
    return [name for name, kind in named(launch.types).items() if kind == "i32"]


def described(types: Any, place: tuple[int, ...] = ()) -> tuple[Any, dict[tuple[int, ...], Any]]:
    """A kernel's signature from its arguments' types, tuples among them; what is constant in it."""
    if isinstance(types, tuple):
        parts = [described(each, (*place, i)) for i, each in enumerate(types)]
        signature, constants = [part[0] for part in parts], {k: v for part in parts for k, v in part[1].items()}
        return type(types)(*signature) if hasattr(types, "_fields") else tuple(signature), constants
    if types is None or isinstance(types, int):
        return "constexpr", {place: types}
    return types, {}


def compiled(launch: Any, kinds: dict[str, Any]) -> Kernel:
    """The IR of a launch after Triton's first stage, with each integer as "i32", as "i64" or as the constant 1.

    Launches that differ in nothing of that have one. Only for jit functions that were not made for the interpreter.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    types, names = changed(launch.types, kinds), launch.kernel.arg_names
    known = (launch.kernel, repr(types), repr(launch.constants), launch.config.warps, launch.config.stages)
    if known in _compiled:
        return _compiled[known]
    signature, constants = described(tuple(types.get(name, "constexpr") for name in names))
    constants |= {(names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, dict(zip(names, signature, strict=True)), constants, {})
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": launch.config.warps, "num_stages": launch.config.stages})
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    given = {
        "target": target,
        "options": options,
        "codegen_fns": backend.get_codegen_implementation(options),
        "module_map": backend.get_module_map(),
        "context": context,
    }
    # newer Tritons want the target, too
    module = source.make_ir(*(given[name] for name in inspect.signature(source.make_ir).parameters))
    text = str(stages["ttir"](module, {}))
    _compiled[known] = Kernel(text, [name for name, kind in named(types).items() if isinstance(kind, str)])
    return _compiled[known]


_compiled: dict[Any, Kernel] = {}


def _pieces(most: int) -> Iterator[Interval]:
    yield Interval(1, 1)  # by itself, for what is a constant then
    low = 2
    while low <= most:
        yield Interval(low, min(most, low * PIECE - 1))
        low *= PIECE


def _product(*factors: Interval | int) -> Interval:
    """Of numbers that are not negative."""
    factors = [Interval(x, x) if isinstance(x, int) else x for x in factors]
    return Interval(prod(x.low for x in factors), prod(x.high for x in factors))


def _stride(extent: Interval | int) -> Interval:
    """Of a tensor's dimension: its last value is in the storage. Where there is only one, the stride may be anything."""
    low = extent if isinstance(extent, int) else extent.low
    return Interval(0, STORAGE // max(1, low - 1))


def _of_pixel_embed(launch: Any) -> Iterator[dict[str, Interval]]:
    Z = launch.constants["Z"]
    for batch, rows, columns in product(_pieces(ROWS), _pieces(SIDE), _pieces(SIDE)):
        height, width = (
            Interval(*((n - 1) * step + patch for n in grid))
            for step, patch, grid in ((Z.STEP_H, Z.PATCH_H, rows), (Z.STEP_W, Z.PATCH_W, columns))
        )
        yield {
            "n_tokens": _product(batch, rows, columns, Z.S),
            "n_cells": _product(batch, *(Interval(x.low // Z.STRIDE, x.high // Z.STRIDE) for x in (height, width))),
            "n_patches": _product(rows, columns),
            "rows": rows,
            "columns": columns,
            "height": height,
            "width": width,
            "stride_b": _stride(batch),
            "stride_c": _stride(Z.CHANNELS),
            "stride_h": _stride(height),
            "stride_w": _stride(width),
        }


def _of_inner(launch: Any) -> Iterator[dict[str, Any]]:
    copies = any(name.startswith("copies") for name in integers(launch))  # there may be more blocks of them than tiles
    yield {"n_patches": Interval(1, ROWS), "n": Interval(1, ROWS)} | ({"programs": RESIDENT} if copies else {})


def _of_norm(launch: Any) -> Iterator[dict[str, Interval]]:
    """Of the rows of a matrix; what is added to them lies in images, and their gradient in groups, or it does not."""
    grouped = "n_tokens" in integers(launch) or getattr(launch.constants["Z"], "GROUPED", False)
    for groups, each in product(_pieces(ROWS) if grouped else [Interval(1, 1)], _pieces(ROWS)):
        yield {
            "n_rows": _product(groups, each),
            "n_tokens": each,
            "n_group": each,
            "stride_image": _stride(groups),
            "stride_token": _stride(each),
            "stride_group": _stride(groups),
            "stride_row": _stride(each),
        }


def _of_block(launch: Any) -> Iterator[dict[str, Any]]:
    """Of inner's kernels, and of what comes between outer's products."""
    return _of_norm(launch) if "n_rows" in integers(launch) else _of_inner(launch)


def _of_totals(launch: Any) -> Iterator[dict[str, Any]]:
    """Of what programs leave: a row each; as many columns as gradients, of a matrix at most, in each part as it likes."""
    parts = sum(name.endswith("n_columns") for name in integers(launch))
    Z = launch.constants["Z"]
    rows = dict.fromkeys(("n_rows", "n_mlp", "n_attention"), Interval(1, RESIDENT))
    yield rows | {"n_columns": Interval(1, ROWS), "programs": getattr(Z, "PROGRAMS", 0) + parts * -(-ROWS // Z.COLUMNS)}


def _of_attention(launch: Any) -> Iterator[dict[str, Any]]:
    """Its programs have a head of an image each, or a part of one."""
    Z = launch.constants["Z"]
    yield {"programs": ROWS // Z.T * Z.H}


COUNTS = ("n_rows", "n_tokens", "n_cells", "n_patches")  # what a kernel's tiles are cut from: the first that it has
OPTIONAL = {
    "pixel_embed": {"bias_ptr", "pixel_pos_ptr"},
    "inner": {"qk_bias", "v_bias", "attn_scale_ptr", "mlp_scale_ptr", "sums_ptr", "mlp_sums_ptr", "attention_sums_ptr"},
    "fold": {"bias_ptr", "shift", "bias", "dx", "y"},
    "outer": {
        "a_ptr", "bias_ptr", "rest_ptr", "later_ptr", "shift", "bias", "next_bias", "later", "dx", "y", "second_bias",
        "norm_bias", "sum_bias", "sums_ptr", "moments_ptr", "hidden_ptr",
    },
    "block": {"qk_bias", "v_bias", "attn_scale_ptr", "mlp_scale_ptr", "bias", "shift", "next_bias", "y", "dz"},
}  # fmt: skip
PASSED = {"pixel_embed": _of_pixel_embed, "inner": _of_inner, "fold": _of_norm, "outer": _of_norm, "block": _of_block}
LIMITS = {"n_tokens": ROWS, "n_cells": ROWS, "n_patches": ROWS, "n_rows": ROWS, "n_group": ROWS, "height": SIDE, "width": SIDE}


def ranges(operation: str, launch: Any, kinds: dict[str, Any]) -> Iterator[dict[str, Interval]]:
    """The ranges of a launch's integers, in pieces, where each has the type that ``compiled`` gave it."""
    if operation not in PASSED:
        raise ValueError(f"say in tests/intervals.py in what ranges the launchers of {operation} pass their integers")
    Z, passed = launch.constants["Z"], integers(launch)
    count = next((name for name in COUNTS if name in passed), None)
    own = {"parts": _of_totals, "logsumexp_ptr": _of_attention}  # of kernels of several operations, or without a count
    for piece in next((own[name] for name in own if name in launch.kernel.arg_names), PASSED[operation])(launch):
        programs = piece.pop("programs", None)
        piece = {name: piece[name.rpartition(".")[2]] for name in passed}
        for name, kind in kinds.items():
            low, high = piece[name]
            if kind == 1:
                piece[name] = Interval(max(low, 1), min(high, 1))
            else:
                most = LIMITS.get(name.rpartition(".")[2], high)
                piece[name] = Interval(low, min(high, most, 2**31 - 1 if kind == "i32" else high))
        if all(low <= high for low, high in piece.values()):
            high = piece[count].high if count else 1
            programs = programs or -(-high // getattr(Z, "BLOCK", getattr(Z, "G", None)))
            if launch.config.per_sm:
                programs = min(programs, RESIDENT)
            programs *= getattr(Z, "GROUPS", 1)
            yield piece | {"program_id": Interval(0, programs - 1), "num_programs": Interval(1, programs)}


def specialisations(operation: str, variant: str, dtype: str, launch: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A launch, and the types with which Triton may be asked for it: it passes 2^31 and above as i64, and makes 1 a constant.

    TNT-S in bfloat16 stands for all that a launch may have or not have, and for the 1s.
    """
    passed = integers(launch)
    small = dict.fromkeys(passed, "i32")
    kinds = [small]
    if dtype != "fp16":  # its blocks are those of bfloat16
        far = small | {name: "i64" for name in passed if "stride" in name}
        kinds += [kind for kind in (far, dict.fromkeys(passed, "i64")) if kind != small]
    if dtype == "bf16" and variant.startswith("s"):
        kinds += [small | {name: 1} for name in passed]
        Z, optional = launch.constants["Z"], [n for n in named(launch.types) if n.rpartition(".")[2] in OPTIONAL[operation]]
        for has in (True, False):
            types = changed(launch.types, dict.fromkeys(optional, "*fp32" if has else None))
            sizes = replace(Z, GROUPED=has) if hasattr(Z, "GROUPED") else Z
            yield launch._replace(constants={"Z": sizes}, types=types), small
    yield from ((launch, kind) for kind in kinds)


def prove(operation: str, launch: Any, kinds: dict[str, Any]) -> tuple[int, list[str]]:
    """How many loads and stores a launch has, and what was found in their addresses and masks."""
    kernel, pieces = compiled(launch, kinds), list(ranges(operation, launch, kinds))
    if not pieces and 1 not in kinds.values():  # an image of one column may be none
        raise ValueError(f"no launch of {launch.kernel.__name__} with {launch.constants} is in the ranges")
    return kernel.accesses, [str(finding) for finding in kernel.findings(pieces)]


def proofs() -> Iterator[tuple[str, int, list[str]]]:
    """Of each shipped launch: its name, how many loads and stores were looked at, and what was found."""
    from benchmarks.launched import launches, launches_of_one
    from tnt_fast.kernels import OPERATIONS

    for name in OPERATIONS:
        for variant, dtype, found in launches(name) + launches_of_one(name):
            shipped = typed(found)
            results = [prove(name, *each) for each in specialisations(name, variant, dtype, shipped)]
            found = dict.fromkeys(text for _, texts in results for text in texts)
            yield f"{name} {shipped.kernel.__name__} {variant} {dtype}", sum(n for n, _ in results), list(found)
