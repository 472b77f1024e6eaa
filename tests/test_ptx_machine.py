"""The machine of ``ptx.machine`` itself: every class of instruction, every fault and every count, against what PTX defines."""

import itertools
import math
import operator
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import machine
from ptx.language import BOUNDS
from ptx.machine import Fault, Kernel, Unknown

REGISTER = {16: "%rs", 32: "%r", 64: "%rd"}


def build(code, parameters=("u64",) * 4, threads=32, shared=0):
    """A kernel of these lines, the n-th of them from case.py:n.

    Given to them: ``tid``; ``cta``; ``me``, a thread's number in the grid; ``p0`` to ``p3``, the pointers; ``smem``, the shared
    address of 4 bytes for each thread.
    """
    names = [f"case_param_{i}" for i in range(len(parameters))]
    start = ["mov.u32 tid, %tid.x;", "mov.u32 cta, %ctaid.x;", f"mad.lo.s32 me, cta, {threads}, tid;"]
    start += ["mov.b32 smem, global_smem;", "mad.lo.s32 smem, tid, 4, smem;"]
    start += [f"ld.param.b64 p{i}, [{name}];" for i, name in enumerate(names[:4]) if parameters[i] == "u64"]
    lines = [f"\t.loc\t1 {n} 9\t// case.py:{n}:9\n\t{line}" for n, line in enumerate(code.strip().splitlines(), 1)]
    ptx = f"""
.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry case(
{",".join(f"{chr(10)}.param .{type_} {name}" for type_, name in zip(parameters, names, strict=True))}
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<40>;
	.reg .b32 %r<90>, tid, cta, me, smem;
	.reg .b64 %rd<90>, p0, p1, p2, p3;
	{chr(10).join(start)}
{chr(10).join(lines)}
	ret;
}}
"""
    return Kernel(ptx, shared, "case.ptx")


def tensor(array):
    return torch.from_numpy(array.view(f"i{array.itemsize}"))


def compute(code, out, *inputs, error=0, shared=0):
    """What ``code`` leaves in %r0 (%rs0, %rd0 by the width of ``out``), with the inputs' elements in %r1, %r2, …"""
    count = len(inputs[0])
    arrays = [np.resize(np.asarray(x), -(-count // 32) * 32) for x in inputs]
    arrays.append(np.zeros(len(arrays[0]), out))
    before, size = [], [a.itemsize for a in arrays]
    for i, each in enumerate(size):
        before.append(f"mad.wide.u32 p{i}, me, {each}, p{i};")
        if i < len(inputs):
            before.append(f"ld.global.b{8 * each} {REGISTER[8 * each]}{i + 1}, [p{i}];")
    last = f"st.global.b{8 * size[-1]} [p{len(inputs)}], {REGISTER[8 * size[-1]]}0;"
    kernel = build("\n".join([*before, code, last]), shared=shared)
    kernel.run(len(arrays[0]) // 32, [*map(tensor, arrays), *[0] * (3 - len(inputs))], error)
    return arrays[-1][:count]


def same(got, want):
    """To the bit, but for the payload of NaN."""
    got, want = np.asarray(got), np.asarray(want)
    wrong = got != want
    if got.dtype.kind == "f":
        wrong = ~((~wrong & (np.signbit(got) == np.signbit(want))) | (np.isnan(got) & np.isnan(want)))
    assert not wrong.any(), [(i, got[i], want[i]) for i in np.flatnonzero(wrong)[:5]]


def pairs(values, count=2):
    """Every combination, as one array for each operand."""
    return [np.array(column, np.asarray(values).dtype) for column in zip(*itertools.product(values, repeat=count), strict=True)]


# ---- integers ----


def edges(type_):
    info = np.iinfo(np.dtype(f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}"))
    values = {0, 1, 2, 3, 7, info.max, info.max - 1, info.max // 3, info.min, info.min + 1}
    return np.array(sorted(values | ({-1, -2, -7} if info.min else set())), info.dtype)


def wrap(values, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([v % (1 << bits) for v in values], f"u{bits // 8}").view(dtype)


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max}
ARITHMETIC |= {"div": quotient, "rem": lambda a, b: a - quotient(a, b) * b}


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_arithmetic(type_):
    a, b = pairs(edges(type_))
    c, r = a[::-1].copy(), REGISTER[int(type_[1:])]
    for name, formula in ARITHMETIC.items():
        some = b != 0 if name in ("div", "rem") else np.full(len(b), True)
        want = wrap(itertools.starmap(formula, zip(a[some].tolist(), b[some].tolist(), strict=True)), a.dtype)
        same(compute(f"{name}.{type_} {r}0, {r}1, {r}2;", a.dtype, a[some], b[some]), want)
    both = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    same(compute(f"mad.lo.{type_} {r}0, {r}1, {r}2, {r}3;", a.dtype, a, b, c), wrap((x * y + z for x, y, z in both), a.dtype))
    if type_[0] == "s":
        for name, formula in (("neg", operator.neg), ("abs", abs)):
            same(compute(f"{name}.{type_} {r}0, {r}1;", a.dtype, a), wrap(map(formula, a.tolist()), a.dtype))
    bits = int(type_[1:])
    high = wrap((x * y >> bits for x, y, _ in both), a.dtype)
    same(compute(f"mul.hi.{type_} {r}0, {r}1, {r}2;", a.dtype, a, b), high)
    high = wrap(((x * y >> bits) + z for x, y, z in both), a.dtype)
    same(compute(f"mad.hi.{type_} {r}0, {r}1, {r}2, {r}3;", a.dtype, a, b, c), high)
    if bits == 64:
        return
    wide, w = np.dtype(f"{a.dtype.kind}{bits // 4}"), REGISTER[2 * bits]
    same(compute(f"mul.wide.{type_} {w}0, {r}1, {r}2;", wide, a, b), wrap((x * y for x, y, _ in both), wide))
    got = compute(f"mad.wide.{type_} {w}0, {r}1, {r}2, {w}3;", wide, a, b, c.astype(wide) << bits)
    same(got, wrap((x * y + (z << bits) for x, y, z in both), wide))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits(bits):
    a, b = pairs(edges(f"u{bits}"))
    r = REGISTER[bits]
    for name, formula in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        same(compute(f"{name}.b{bits} {r}0, {r}1, {r}2;", a.dtype, a, b), formula)
    same(compute(f"not.b{bits} {r}0, {r}1;", a.dtype, a), ~a)
    amounts = [0, 1, bits // 2, bits - 1, bits, bits + 1, 100, 2**32 - 1]  # beyond the width: by the width
    a, by = np.repeat(edges(f"u{bits}"), len(amounts)), np.tile(np.array(amounts, np.uint32), len(edges(f"u{bits}")))
    signed = a.view(f"i{bits // 8}")
    at = [(x, min(n, bits)) for x, n in zip(a.tolist(), by.tolist(), strict=True)]
    at_signed = [(x, n) for x, (_, n) in zip(signed.tolist(), at, strict=True)]
    same(compute(f"shl.b{bits} {r}0, {r}1, %r2;", a.dtype, a, by), wrap((x << n for x, n in at), a.dtype))
    same(compute(f"shr.u{bits} {r}0, {r}1, %r2;", a.dtype, a, by), wrap((x >> n for x, n in at), a.dtype))
    same(compute(f"shr.s{bits} {r}0, {r}1, %r2;", signed.dtype, a, by), wrap((x >> n for x, n in at_signed), signed.dtype))


def test_fields_and_bytes():
    narrow, wide = ((0, 1), (0, 32), (5, 7), (31, 1), (12, 20)), ((0, 1), (16, 16), (31, 2), (63, 1), (0, 64))
    for bits, r, fields in ((32, "%r", narrow), (64, "%rd", wide)):
        unsigned, signed = np.dtype(f"uint{bits}").type, np.dtype(f"int{bits}").type
        a, b = (np.random.default_rng(seed).integers(0, 2**bits, 64, unsigned) for seed in (1, 2))
        for at, length in fields:
            field = [x >> at & (1 << length) - 1 for x in a.tolist()]
            same(compute(f"bfe.u{bits} {r}0, {r}1, {at}, {length};", unsigned, a), wrap(field, unsigned))
            extended = [x - (x >> length - 1 << length) for x in field]
            same(compute(f"bfe.s{bits} {r}0, {r}1, {at}, {length};", signed, a), wrap(extended, signed))
            mask = (1 << length) - 1 << at
            want = [(y & ~mask) | (x << at & mask) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
            same(compute(f"bfi.b{bits} {r}0, {r}1, {r}2, {at}, {length};", unsigned, a, b), wrap(want, unsigned))
    a = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)
    b = a[::-1].copy()
    for selector in (0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0x7777, 0xBA98, 0xF0C3):
        want = []
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            bytes_ = (y << 32 | x).to_bytes(8, "little")
            chosen = [selector >> 4 * i & 15 for i in range(4)]
            want.append(int.from_bytes([255 * (bytes_[c & 7] >> 7) if c & 8 else bytes_[c] for c in chosen], "little"))
        same(compute(f"prmt.b32 %r0, %r1, %r2, {selector:#x}U;", np.uint32, a, b), wrap(want, np.uint32))
        same(compute("prmt.b32 %r0, %r1, %r2, %r3;", np.uint32, a, b, np.full(64, selector, np.uint32)), wrap(want, np.uint32))
    want = (a.view(np.uint16) + b.view(np.uint16)).view(np.uint32)
    same(compute("add.s16x2 %r0, %r1, %r2;", np.uint32, a, b), want)


# ---- floating point, against fractions ----

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}  # bits of a mantissa, exponents
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
UNSIGNED = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32}


def nearest(x, type_):
    """A fraction to nearest even."""
    precision, low, high = FORMATS[type_]
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, low) - precision + 1)
    value = round(x / unit) * unit
    return math.copysign(float(value) if abs(value) < Fraction(2) ** (high + 1) else math.inf, x)


def exact(formula, type_, *operands):
    """``formula`` rounded once; what is not finite, and the sign of zero, as float64 has it."""
    want = []
    with np.errstate(all="ignore"):
        for values in zip(*operands, strict=True):
            finite = all(map(math.isfinite, values)) and formula(*map(Fraction, map(float, values)))
            want.append(nearest(finite, type_) if finite else formula(*map(np.float64, values)))
    return np.array(want)


def values(bits, type_):
    return tensor(bits).view(TORCH[type_]).double().numpy()


def encode(numbers, type_):
    """Numbers that the type holds, as its bits."""
    return (
        torch.tensor(np.asarray(numbers))
        .to(TORCH[type_])
        .view(torch.int32 if type_ == "f32" else torch.int16)
        .numpy()
        .view(UNSIGNED[type_])
    )


def special(type_):
    precision, low, high = FORMATS[type_]
    unit = 2.0 ** (1 - precision)
    tiny = [2.0**low * unit, 2.0**low * (1 - unit), 2.0**low, 2.0**low * (1 + unit)]
    some = [0.0, *tiny, 1 - unit / 2, 1.0, 1 + unit, 1.5, 3.0, 2.0**high, 2.0**high * (2 - unit), math.inf]
    return encode([*some, *(-x for x in some), math.nan], type_)


def numbers(type_, count, size=1500):
    """Bits for each operand: specials with each other, anything, and exponents near each other."""
    rng, dtype = np.random.default_rng(0), UNSIGNED[type_]
    groups = pairs(special(type_), 2)
    groups = [*groups, groups[0][::-1]][:count]
    anything = rng.integers(0, np.iinfo(dtype).max, (count, size), dtype, endpoint=True)
    near = encode(rng.standard_normal((count, size)) * 2.0 ** rng.integers(-3, 4, (count, size)), type_)
    return [np.concatenate(parts) for parts in zip(groups, anything, near, strict=True)]


def fused(a, b, c):
    return a * b + c


def traps(type_):
    """a·b is a tie between two numbers, and c, far below, decides."""
    half = FORMATS[type_][0]
    one, other = 1 + 2.0 ** -(half // 2), 1 + 2.0 ** -(half - half // 2)
    tiny = 2.0 ** (-24 if type_ == "f16" else -126)
    products = [(x, other, s * c) for x in (one, -one) for s in (1, -1) for c in (0.0, tiny)]
    return [encode(column, type_) for column in zip(*products, strict=True)]


FLOATING = [("add", operator.add, 2), ("sub", operator.sub, 2), ("mul", operator.mul, 2), ("fma.rn", fused, 3)]


@pytest.mark.parametrize(("name", "formula", "count"), FLOATING)
@pytest.mark.parametrize("type_", FORMATS)
def test_rounded_once(type_, name, formula, count):
    bits = numbers(type_, count)
    if name == "fma.rn":
        bits = [np.concatenate(parts) for parts in zip(traps(type_), bits, strict=True)]
    else:  # a tie, a bit more than one, and ties to odd numbers
        unit = 2.0 ** -FORMATS[type_][0]
        more = encode([1.0, 1.0, 1 + 2 * unit, 1 + 2 * unit], type_), encode([unit, unit * (1 + 2 * unit), unit, -unit], type_)
        bits = [np.concatenate(parts) for parts in zip(more, bits, strict=True)]
    want = exact(formula, type_, *(values(x, type_) for x in bits))
    r = "%r" if type_ == "f32" else "%rs"
    operands = ", ".join(f"{r}{i}" for i in range(count + 1))
    same(values(compute(f"{name}.{type_} {operands};", bits[0].dtype, *bits), type_), want)
    if type_ != "f32":  # two at a time
        half = len(want) // 2
        pairs_ = [np.ascontiguousarray(x[: 2 * half]).view(np.uint32) for x in bits]
        operands = operands.replace("%rs", "%r")
        got = compute(f"{name}.{type_}x2 {operands};", np.uint32, *pairs_).view(np.uint16)
        same(values(got, type_), want[: 2 * half])
        if name == "mul" and type_ == "f16":
            got = compute("mul.sat.f16x2 %r0, %r1, %r2;", np.uint32, *pairs_).view(np.uint16)
            same(values(got, type_), saturated(want[: 2 * half]))
        return
    wide = [x[: len(x) // 2 * 2].copy().view(np.uint64) for x in bits]
    operands = operands.replace("%r", "%rd")
    got = compute(f"{name}.f32x2 {operands};", np.uint64, *wide).view(np.uint32)
    same(values(got, type_), want[: 2 * len(wide[0])])
    flushed = [flush(values(x, type_)) for x in bits]
    want = flush(exact(formula, type_, *flushed))
    operands = operands.replace("%rd", "%r")
    same(values(compute(f"{name}.ftz.f32 {operands};", np.uint32, *bits), type_), want)
    same(values(compute(f"{name}.ftz.sat.f32 {operands};", np.uint32, *bits), type_), saturated(want))


def flush(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


def saturated(x):
    return np.where(np.isnan(x), 0.0, np.clip(x, 0, 1) + 0.0)


def larger(a, b, nan):
    if math.isnan(a) or math.isnan(b):
        return math.nan if nan else b if math.isnan(a) else a
    return max(a, b, key=lambda x: (x, math.copysign(1, x)))  # −0 is below +0


def smaller(a, b, nan):
    return -larger(-a, -b, nan)


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "f16x2", "bf16x2"])
def test_extremes_and_signs(type_):
    kind = type_.removesuffix("x2")
    a, b = pairs(special(kind))
    r, out = "%rs" if type_ in ("f16", "bf16") else "%r", np.uint32 if type_.endswith("x2") else a.dtype
    if type_.endswith("x2"):
        a, b = (np.append(x, x[-1:]).view(np.uint32) for x in (a, b))
    x, y = (values(v.view(UNSIGNED[kind]), kind) for v in (a, b))
    for name, formula in (("min", smaller), ("max", larger)):
        for nan in ("", ".NaN"):
            got = compute(f"{name}{nan}.{type_} {r}0, {r}1, {r}2;", out, a, b).view(UNSIGNED[kind])
            same(values(got, kind), np.array([formula(*v, bool(nan)) for v in zip(x, y, strict=True)]))
    got = compute(f"neg.{type_} {r}0, {r}1;", out, a).view(UNSIGNED[kind])
    same(values(got, kind), -x)
    got = compute(f"abs.{type_} {r}0, {r}1;", out, a).view(UNSIGNED[kind])
    same(values(got, kind), np.abs(x))
    if type_ == "f32":
        same(values(compute("abs.ftz.f32 %r0, %r1;", out, a), kind), np.abs(flush(x)))
        got = values(compute("max.ftz.f32 %r0, %r1, %r2;", out, a, b), kind)
        same(got, np.array([larger(*v, False) for v in zip(flush(x), flush(y), strict=True)]))


def test_correctly_rounded_functions():
    a, b = numbers("f32", 2)
    x, y = values(a, "f32"), values(b, "f32")
    finite = np.isfinite(x) & np.isfinite(y) & (x != 0) & (y != 0)
    a, b = a[finite], b[finite]
    want = exact(operator.truediv, "f32", x[finite], y[finite])
    same(values(compute("div.rn.f32 %r0, %r1, %r2;", np.uint32, a, b), "f32"), want)
    same(values(compute("rcp.rn.f32 %r0, %r1;", np.uint32, a), "f32"), exact(lambda x: 1 / x, "f32", x[finite]))
    root = values(compute("sqrt.rn.f32 %r0, %r1;", np.uint32, a & np.uint32(0x7FFFFFFF)), "f32")
    for number, square in zip(root.tolist(), np.abs(x[finite]).tolist(), strict=True):
        below, above = (float(np.nextafter(np.float32(number), np.float32(to))) for to in (0, math.inf))
        assert ((Fraction(below) + Fraction(number)) / 2) ** 2 <= Fraction(square)
        assert Fraction(square) <= ((Fraction(above) + Fraction(number)) / 2) ** 2
    special_ = encode([0.0, -0.0, math.inf, -math.inf, math.nan], "f32")
    same(values(compute("rcp.approx.ftz.f32 %r0, %r1;", np.uint32, special_), "f32"), [math.inf, -math.inf, 0, -0.0, math.nan])
    want = [math.inf, -math.inf, 0, math.nan, math.nan]
    same(values(compute("rsqrt.approx.ftz.f32 %r0, %r1;", np.uint32, special_), "f32"), want)
    for error in (-1, 0, 1):
        found = compute("ex2.approx.ftz.f32 %r0, %r1;", np.uint32, special_, error=error)
        same(values(found, "f32"), [1, 1, math.inf, 0, math.nan])


def test_double():
    a, b = np.random.default_rng(0).standard_normal((2, 64))
    for name, want in (("add", a + b), ("sub", a - b), ("mul", a * b), ("min", np.minimum(a, b)), ("max", np.maximum(a, b))):
        same(compute(f"{name}.f64 %rd0, %rd1, %rd2;", np.float64, a, b), want)


APPROXIMATE = {
    "ex2.approx.f32": (lambda x: 2.0**x, -100, 100),
    "ex2.approx.ftz.f32": (lambda x: 2.0**x, -100, 100),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, 0.01, 100),
    "rsqrt.approx.ftz.f32": (lambda x: 1 / np.sqrt(x), 0.01, 100),
    "sqrt.approx.f32": (np.sqrt, 0.01, 100),
    "div.full.f32": (lambda x, y: x / y, 0.01, 100),
    "tanh.approx.f32": (np.tanh, -4, 4),
    "tanh.approx.f16": (np.tanh, -4, 4),
    "tanh.approx.bf16": (np.tanh, -4, 4),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_err_by_their_bound(name):
    function, low, high = APPROXIMATE[name]
    op, type_ = name.split(".")[0], name.split(".")[-1]
    kind, bound = BOUNDS[op, type_]
    rng = np.random.default_rng(0)
    bits = [encode(rng.uniform(low, high, 512), type_) for _ in range(function.__code__.co_argcount if op == "div" else 1)]
    want = function(*(values(x, type_) for x in bits))
    r = "%r" if type_ == "f32" else "%rs"
    half = 2.0 ** -FORMATS[type_][0]  # the result is rounded
    operands = ", ".join(f"{r}{i}" for i in range(len(bits) + 1))
    for error in (-1, 0, 1):
        got = values(compute(f"{name} {operands};", bits[0].dtype, *bits, error=error), type_)
        off = (got - want) / (want if kind == "relative" else 1)
        if error == 0:
            same(got, exact(lambda x: x, type_, want))
        free = np.abs(got) < 1 if op == "tanh" else np.full(len(got), True)
        assert free.mean() > 0.3
        assert (np.abs(off - error * bound)[free] <= half).all()
        assert (np.abs(off) <= bound + half).all()
        assert op != "tanh" or (np.abs(got) <= 1).all()
    with pytest.raises(ValueError, match="accepted: -1, 0, 1"):
        compute(f"{name} {operands};", bits[0].dtype, *bits, error=2)


# ---- conversions ----


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_halves(type_):
    all_ = np.arange(1 << 16, dtype=np.uint16)
    same(compute(f"cvt.f32.{type_} %r0, %rs1;", np.float32, all_).astype(np.float64), values(all_, type_))
    bits = numbers("f32", 1)[0]
    between = (values(all_[:-1], type_) + values(all_[1:], type_)) / 2  # ties, and both sides of them
    ties = between[np.isfinite(between)].astype(np.float32)[:: 37 if type_ == "f16" else 41]
    near = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    nans = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    x = np.concatenate([bits.view(np.float32), nans, *near])
    want = exact(lambda x: x, type_, x)
    same(values(compute(f"cvt.rn.{type_}.f32 %rs0, %r1;", np.uint16, x), type_), want)
    packed = compute(f"cvt.rn.{type_}x2.f32 %r0, %r1, %r2;", np.uint32, x, x[::-1].copy())
    same(values((packed >> 16).astype(np.uint16), type_), want)  # the first is the high half
    same(values((packed & 0xFFFF).astype(np.uint16), type_), want[::-1])
    same(torch.tensor(x).to(TORCH[type_]).double().numpy(), want)


INTEGERS = [sign + bits for sign in "su" for bits in ("8", "16", "32", "64")]


@pytest.mark.parametrize(("to", "source"), list(itertools.permutations(INTEGERS, 2)))
def test_integer_conversions(to, source):
    """A narrow source is the low bits of a wider register; a narrow result is extended by its own sign."""
    width, wide = (max(16, int(x[1:])) for x in (source, to))
    bits = np.random.default_rng(0).integers(0, 2**63, 64, np.uint64) * np.uint64(2) + np.uint64(1)
    held = bits.astype(f"u{width // 8}")
    number = bits.astype(f"u{int(source[1:]) // 8}").view(f"{source[0].replace('s', 'i')}{int(source[1:]) // 8}")
    want = wrap(number.tolist(), f"{to[0].replace('s', 'i')}{int(to[1:]) // 8}")
    want = wrap(want.tolist(), f"u{wide // 8}")
    same(compute(f"cvt.{to}.{source} {REGISTER[wide]}0, {REGISTER[width]}1;", f"u{wide // 8}", held), want)


def test_conversions_between_integers_and_floats():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 2.75, -2.75, 127, 3e9, -3e9, 1e20, -1e20, np.inf, -np.inf, np.nan, -0.0])
    x = np.append(x, 2.0**31 - np.arange(-300, 300, 64)).astype(np.float32)
    towards = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}
    for how, to in itertools.product(towards, ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")):
        kind = np.dtype(f"{to[0].replace('s', 'i')}{int(to[1:]) // 8}")
        info, wide = np.iinfo(kind), max(16, int(to[1:]))
        whole = [
            0 if math.isnan(v) else towards[how](v) if math.isfinite(v) else int(math.copysign(2**70, v)) for v in x.tolist()
        ]
        want = wrap([min(max(v, info.min), info.max) for v in whole], f"u{wide // 8}")
        same(compute(f"cvt.{how}.{to}.f32 {REGISTER[wide]}0, %r1;", f"u{wide // 8}", x), want)
    for type_, how in itertools.product(("f16", "bf16"), towards):
        half = np.arange(0, 1 << 16, 61, dtype=np.uint16)
        got = compute(f"cvt.{how}.s32.{type_} %r0, %rs1;", np.int32, half)
        y = [min(max(v, -(2.0**31)), 2.0**31) if v == v else 0 for v in values(half, type_).tolist()]
        same(got, np.array([min(towards[how](v), 2**31 - 1) for v in y], np.int32))
    for how, function in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        same(compute(f"cvt.{how}.f32.f32 %r0, %r1;", np.float32, x), function(x))
    for source in ("s16", "u16", "s32", "u32", "s64", "u64"):
        a = np.append(edges(source), (edges(source) // 128) * 129)
        r = REGISTER[int(source[1:])]
        for type_ in FORMATS if "64" not in source else ["f32"]:
            want = np.array([nearest(Fraction(v), type_) if v else 0.0 for v in a.tolist()])
            to = "%r" if type_ == "f32" else "%rs"
            same(values(compute(f"cvt.rn.{type_}.{source} {to}0, {r}1;", UNSIGNED[type_], a), type_), want)
    trap = np.array([(1 << 62) + (1 << 38) + s for s in (-1, 0, 1)], np.int64)  # a tie, and what float64 does not hold
    want = [nearest(Fraction(v), "f32") for v in trap.tolist()]
    same(values(compute("cvt.rn.f32.s64 %r0, %rd1;", np.uint32, trap), "f32"), want)
    double = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e300, 1e-310, -math.inf])
    same(compute("cvt.rn.f32.f64 %r0, %rd1;", np.float32, double), exact(lambda x: x, "f32", double))
    same(compute("cvt.f64.f32 %rd0, %r1;", np.float64, x), x.astype(np.float64))


def test_tf32():
    bits = numbers("f32", 1)[0]
    x = bits.view(np.float32)
    x = np.append(x[np.isfinite(x)], np.array([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11, np.inf], np.float32))  # ties
    unit = np.ldexp(1.0, np.maximum(np.frexp(x.astype(np.float64))[1] - 1, -126) - 10)
    want = np.copysign(np.floor(np.abs(x.astype(np.float64)) / unit + 0.5) * unit, x)
    want = np.where(np.isinf(x), x, np.where(np.abs(want) >= 2.0**128, np.copysign(np.inf, x), want))
    got = compute("cvt.rna.tf32.f32 %r0, %r1;", np.uint32, x)
    assert not (got & 0x1FFF).any()
    same(values(got, "f32"), want)


# ---- predicates, moves ----

ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


@pytest.mark.parametrize("type_", ["s16", "u16", "b16", "s32", "u32", "b32", "s64", "u64", "b64", "f16", "bf16", "f32"])
def test_comparisons(type_):
    if "f" in type_:
        a, b = pairs(special(type_))
        x, y = values(a, type_), values(b, type_)
    else:
        a, b = x, y = pairs(edges(type_))
    r = REGISTER[8 * a.itemsize]
    neither = np.isnan(x) | np.isnan(y)
    cases = {name: formula(x, y) & ~neither for name, formula in ORDERED.items() if type_[0] != "b" or type_ == "bf16"}
    cases |= {name: ORDERED[name](x, y) & ~neither for name in ("eq", "ne")}
    if type_[0] == "u":
        cases |= {name: cases[as_] for name, as_ in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge"))}
    if "f" in type_:
        cases |= {f"{name}u": formula(x, y) | neither for name, formula in ORDERED.items()}
        cases |= {"num": ~neither, "nan": neither}
    for name, want in cases.items():
        same(compute(f"setp.{name}.{type_} %p1, {r}1, {r}2;\nselp.b32 %r0, 7, 9, %p1;", np.uint32, a, b), np.where(want, 7, 9))
    if type_ == "f32":
        flushed = compute("setp.gt.ftz.f32 %p1, %r1, %r2;\nselp.b32 %r0, 1, 0, %p1;", np.uint32, a, b)
        same(flushed, flush(x) > flush(y))


def test_predicates():
    a, b = pairs(np.array([0, 1], np.uint32))
    first = "setp.ne.b32 %p1, %r1, 0;\nsetp.ne.b32 %p2, %r2, 0;\n"
    last = "\nselp.b32 %r0, 1, 0, %p3;"
    for name, want in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        same(compute(f"{first}{name}.pred %p3, %p1, %p2;{last}", np.uint32, a, b), want)
        same(compute(f"{first}setp.eq.{name}.s32 %p3, %r1, 1, %p2;{last}", np.uint32, a, b), want)
        inverted = {"and": a & ~b, "or": a | (1 - b), "xor": a ^ (1 - b)}[name] & 1
        same(compute(f"{first}setp.eq.{name}.s32 %p3, %r1, 1, !%p2;{last}", np.uint32, a, b), inverted)
    same(compute(f"{first}not.pred %p3, %p1;{last}", np.uint32, a, b), 1 - a)
    same(compute(f"mov.pred %p3, -1;{last}", np.uint32, a), np.ones_like(a))
    same(compute(f"mov.pred %p3, 0;{last}", np.uint32, a), np.zeros_like(a))
    same(compute(f"{first}mov.pred %p3, %p2;{last}", np.uint32, a, b), b)
    code = "mov.b32 %r0, 5;\n@%p1 mov.b32 %r0, 6;\n@!%p2 add.s32 %r0, %r0, 10;"
    same(compute(first + code, np.uint32, a, b), 5 + a + 10 * (1 - b))
    x, y = (v.astype(np.float32) - 0.5 for v in (a, b))
    same(compute("setp.gt.f32 %p1, %r1, %r2;\nselp.f32 %r0, %r1, %r2, %p1;", np.float32, x, y), np.maximum(x, y))
    for bits, r in ((16, "%rs"), (64, "%rd")):
        one = np.arange(4).astype(f"u{bits // 8}")
        code = f"setp.eq.b32 %p1, %r3, 0;\nselp.b{bits} {r}0, {r}1, {r}2, %p1;"
        same(compute(code, one.dtype, one, one + one.dtype.type(9), a), np.where(a == 0, one, one + one.dtype.type(9)))


def test_moves():
    a, b = np.random.default_rng(0).integers(0, 2**63, (2, 64), np.uint64)
    small = a.astype(np.uint32)
    cases = {
        "mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r0, {%rs2, %rs1};": (small, small >> 16 | small << 16),
        "mov.b32 {%rs1, _}, %r1;\nmov.b32 {_, %rs2}, %r1;\nmov.b32 %r0, {%rs1, %rs2};": (small, small),
        "mov.b32 %r0, %r1;": (small, small),
        "mov.u32 %r0, 0x7FC00001;": (small, np.full_like(small, 0x7FC00001)),
        "mov.b32 %r0, -2;": (small, np.full_like(small, 2**32 - 2)),
        "mov.f32 %r0, 0fBF800000;": (small, np.full_like(small, 0xBF800000)),
        "mov.b64 {%r1, %r2}, %rd1;\nmov.b64 %rd0, {%r2, %r1};": (a, a >> 32 | a << 32),
        "mov.b64 {%rs1, %rs2, %rs3, %rs4}, %rd1;\nmov.b64 %rd0, {%rs4, %rs3, %rs2, %rs1};": (
            a,
            a.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64)[:, 0],
        ),
        "mov.b64 %rd0, 0d3FF0000000000000;": (a, np.full_like(a, 0x3FF << 52)),
        # a register of the braces is not the one outside of them, nor that of other braces
        "{\n.reg .b32 x, %r1;\nmov.b32 x, 1; mov.b32 %r1, x;\n{ .reg .b32 x; mov.b32 x, 2; add.s32 %r5, x, %r1; }\n"
        "add.s32 %r6, x, %r5;\n}\nadd.s32 %r0, %r1, %r6;": (small, small + np.uint32(4)),
    }
    for code, (given, want) in cases.items():
        same(compute(code, want.dtype, given), want)
    nan = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC12345], np.uint32)  # through a register of floats, as it is
    same(compute("mov.f32 %r2, %r1;\nselp.f32 %r3, %r2, 0f00000000, 1;\nmov.b32 %r0, %r3;", np.uint32, nan), nan)


def test_special_registers_and_parameters():
    out = torch.zeros(3, 64, 6, dtype=torch.int32)
    code = """
    mad.wide.u32 p0, me, 24, p0; mov.u32 %r1, %ntid.x; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %laneid; mov.u32 %r4, %ctaid.y;
    ld.param.b32 %r5, [case_param_1]; ld.param.s32 %rd1, [case_param_2]; ld.param.u32 %rd2, [case_param_2];
    shr.s64 %rd1, %rd1, 32; cvt.u32.u64 %r7, %rd1; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r8, %rd2; add.s32 %r4, %r4, %r8;
    st.global.v2.b32 [p0], {%r1, %r2}; st.global.v2.b32 [ p0 + 8 ], {%r3, %r4}; st.global.v2.b32 [p0+16], {%r5, %r7};"""
    build(code, ("u64", "f32", "u32"), 64).run(3, [out, 1.5, -7])
    want = torch.tensor([64, 3, 0, 0, 0x3FC00000, -1], dtype=torch.int32).repeat(3, 64, 1)
    want[..., 2] = torch.arange(64) % 32
    assert torch.equal(out, want)


# ---- between threads ----


def test_shuffles():
    lane = np.arange(64, dtype=np.uint32)
    at = lane % 32
    by = np.array([0, 1, 5, 31, 33] * 13, np.uint32)[:64]
    for mode, count, clamp in itertools.product(
        ("bfly", "idx", "up", "down"), (1, 2, 16, 31, 33), (31, 0, 0x1C03, 0x1000, 0x100F)
    ):
        keep = clamp >> 8 & 31
        want = []
        for i in at.tolist():
            first, last = i & keep, (i & keep) | (clamp & 31 & ~keep)
            b = count & 31
            j = {"up": i - b, "down": i + b, "bfly": i ^ b, "idx": first | (b & ~keep)}[mode]
            want.append(j if (j >= last if mode == "up" else j <= last) else i)
        want = lane - at + np.array(want, np.uint32)
        same(compute(f"shfl.sync.{mode}.b32 %r0, %r1, {count}, {clamp}, -1;", np.uint32, lane), want)
    same(compute("shfl.sync.idx.b32 %r0, %r1, %r2, 31, -1;", np.uint32, lane, by), lane - at + by % 32)


@pytest.mark.parametrize("how", ["add", "min", "max", "and", "or", "xor"])
def test_reductions_of_a_warp(how):
    rng = np.random.default_rng(0)
    for type_, dtype in (("b32", np.uint32),) if how in ("and", "or", "xor") else (("u32", np.uint32), ("s32", np.int32)):
        x = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 64, dtype, endpoint=True)
        want = []
        for warp in x.reshape(2, 32).tolist():
            total = warp[0]
            for value in warp[1:]:
                total = {"add": total + value, "min": min(total, value), "max": max(total, value), "and": total & value,
                         "or": total | value, "xor": total ^ value}[how]  # fmt: skip
            want += [total % 2**32] * 32
        code = f"mov.b32 %r2, -1;\nredux.sync.{how}.{type_} %r0, %r1, %r2;"
        same(compute(code, np.uint32, x.view(np.uint32)), np.array(want, np.uint32))


def fragments(matrix, place, count):
    """[32, count] of a matrix' elements, by the place (row, column) of each lane's i-th."""
    return torch.stack([torch.stack([matrix[place(lane // 4, lane % 4, i)] for i in range(count)]) for lane in range(32)])


# PTX ISA 9.7.14, "Matrix fragments": where the i-th element of the thread t of a group g lies
HALVES = (
    lambda g, t, i: (g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)),
    lambda g, t, i: (2 * t + i % 2 + 8 * (i // 2), g),
)
SINGLES = (lambda g, t, i: (g + 8 * (i % 2), t + 4 * (i // 2)), lambda g, t, i: (t + 4 * i, g))
SHAPES = {("m16n8k16", "f16"): HALVES, ("m16n8k16", "bf16"): HALVES, ("m16n8k8", "tf32"): SINGLES}


@pytest.mark.parametrize(("shape", "type_"), SHAPES)
def test_matrix_products(shape, type_):
    k = int(shape.rpartition("k")[2])
    dtype = TORCH.get(type_, torch.float32)
    of_a, of_b = SHAPES[shape, type_]
    a, b, c, d = (f"{{{', '.join(f'%r{i}' for i in r)}}}" for r in (range(4), range(4, 6), range(6, 10), range(10, 14)))
    code = f"""
    mad.wide.u32 p0, tid, 16, p0; mad.wide.u32 p1, tid, 8, p1; mad.wide.u32 p2, tid, 16, p2; mad.wide.u32 p3, tid, 16, p3;
    ld.global.v4.b32 {a}, [p0]; ld.global.v2.b32 {b}, [p1]; ld.global.v4.b32 {c}, [p2];
    mma.sync.aligned.{shape}.row.col.f32.{type_}.{type_}.f32 {d}, {a}, {b}, {c};
    st.global.v4.b32 [p3], {d};"""
    kernel = build(code)

    def product(a, b, c):
        c, out = fragments(c, of_c, 4), torch.empty(32, 4)
        a, b = fragments(a.to(dtype), of_a, k // 2), fragments(b.to(dtype), of_b, k // 4)
        if type_ == "tf32":  # the low bits of a float32 are not read
            a, b = ((x.contiguous().view(torch.int32) | 0x1ABC).view(torch.float32) for x in (a, b))
        kernel.run(1, [a.contiguous(), b.contiguous(), c, out])
        return out

    def of_c(g, t, i):
        return g + 8 * (i // 2), 2 * t + i % 2

    a, b, c = (torch.randint(-9, 10, shape_).float() for shape_ in ((16, k), (k, 8), (16, 8)))
    assert torch.equal(product(a, b, c), fragments(torch.matmul(a, b) + c, of_c, 4))  # whole numbers: exact
    a, b, c = ((torch.randn(x.shape).view(torch.int32) & -8192).view(torch.float32).to(dtype).float() for x in (a, b, c))
    want = fragments(torch.matmul(a.double(), b.double()) + c.double(), of_c, 4)
    got = product(a, b, c).double()
    assert ((want - got).abs() <= 2.0**-23 * want.abs()).all()
    assert (got.abs() <= want.abs()).all()  # truncated
    a[3, 5], b[7, 2] = math.inf, math.nan
    want = fragments(torch.matmul(a, b) + c, of_c, 4)
    got = product(a, b, c)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


def operand(matrix, transposed, bits):
    """[rows, 16] halves as an asynchronous product reads them in 8 KiB, and the descriptor of that, less where it begins.

    PTX ISA 9.7.15.5, "Strides" and "Swizzling modes": of 16 << ``bits`` bytes a row, whose pieces are exchanged.
    """
    memory, row = np.zeros(4096, np.uint16), 8 << bits
    stride = 8 * row if bits else 16 * row
    leading = 8 * row if not bits else 16 * row if transposed else 0
    for (m, k), value in np.ndenumerate(matrix):
        if not transposed:
            at = m % 8 * row + m // 8 * stride + (k // 8 * leading if bits == 0 else k // 8 * 8) + k % 8
        elif bits:
            at = m % row + m // row * leading + k % 8 * row + k // 8 * stride
        else:
            at = m % 8 + m // 8 * stride + k % 8 * 8 + k // 8 * leading
        piece = at // 8
        memory[(piece ^ (piece >> 3 & (1 << bits) - 1)) * 8 + at % 8] = value
    mode = {0: 0, 1: 3, 2: 2, 3: 1}[bits]
    return memory, mode << 62 | stride * 2 >> 4 << 32 | leading * 2 >> 4 << 16


def asynchronous(type_, left, right, sum_, before="fence.proxy.async.shared::cta;\nbar.sync 0;", after=None):
    """Code of a product of 64 rows by 16 columns, with descriptors: of p0, 16 KiB; sums of the threads are in p1."""
    sums = f"{{{', '.join(f'%r{i}' for i in range(8))}}}"
    copies = "mad.wide.u32 %rd1, tid, 16, p0; shl.b32 %r60, tid, 4; mad.wide.u32 %rd2, tid, 32, p1;\n"
    for at in range(0, 16384, 2048):
        copies += f"ld.global.v4.b32 {{%r40, %r41, %r42, %r43}}, [%rd1+{at}]; "
        copies += f"st.shared.v4.b32 [%r60+{at}], {{%r40, %r41, %r42, %r43}};\n"
    for half in (0, 4):
        copies += f"ld.global.v4.b32 {{{', '.join(f'%r{half + i}' for i in range(4))}}}, [%rd2+{4 * half}];\n"
    (a, of_a), (b, of_b) = left, right
    product = f"wgmma.fence.sync.aligned;\nmov.b64 %rd3, {a}; mov.b64 %rd4, {b | 8192 >> 4};\n"
    product += f"wgmma.mma_async.sync.aligned.m64n16k16.f32.{type_}.{type_} {sums}, %rd3, %rd4, {sum_}, 1, 1, {of_a}, {of_b};\n"
    product += "wgmma.commit_group.sync.aligned;\n" + ("wgmma.wait_group.sync.aligned 0;" if after is None else after)
    for half in (0, 4):
        product += f"\nst.global.v4.b32 [%rd2+{4 * half}], {{{', '.join(f'%r{half + i}' for i in range(4))}}};"
    return f"{copies}{before}\n{product}"


@pytest.mark.parametrize("bits", range(4))
@pytest.mark.parametrize(("of_a", "of_b"), list(itertools.product((0, 1), (0, 1))))
def test_asynchronous_products(of_a, of_b, bits):
    for type_, has_sum in (("bf16", 1), ("f16", 0)):
        a, b = (torch.randint(-9, 10, (rows, 16)).to(TORCH[type_]) for rows in (64, 16))
        placed = [operand(x.view(torch.int16).numpy().view(np.uint16), way, bits) for x, way in ((a, of_a), (b, of_b))]
        shared = torch.from_numpy(np.concatenate([memory for memory, _ in placed]).view(np.int16))
        sums = torch.randint(-9, 10, (128, 8)).float()
        warp, lane, i = torch.arange(128)[:, None] // 32, torch.arange(128)[:, None] % 32, torch.arange(8)
        place = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)
        want = (a.double() @ b.double().t())[place] + has_sum * sums
        code = asynchronous(type_, (placed[0][1], of_a), (placed[1][1], of_b), has_sum)
        build(code, threads=128, shared=16384).run(1, [shared, sums, 0, 0])
        assert torch.equal(sums.double(), want)


def test_asynchronous_products_are_waited_for():
    code = [asynchronous("f16", (8 << 32, 0), (8 << 32, 0), 0, **given) for given in (
        dict(before="bar.sync 0;"), dict(before="fence.proxy.async.shared::cta;"),
        dict(after="st.shared.b32 [%r60], %r40;\nwgmma.wait_group.sync.aligned 0;"), dict(after=""))]  # fmt: skip
    given = torch.zeros(8192, dtype=torch.int16), torch.zeros(128, 8)
    for each, said in zip(code, ("no fence and barrier", "no fence and barrier", "another thread read"), strict=False):
        with pytest.raises(Fault, match=said):
            build(each, threads=128, shared=16384).run(1, [*given, 0, 0])
    build(code[3], threads=128, shared=16384).run(1, [*given, 0, 0])
    assert given[1].isnan().all()


@pytest.mark.parametrize(("count", "trans"), list(itertools.product((1, 2, 4), ("", ".trans"))))
def test_matrix_loads_and_stores(count, trans):
    tiles = torch.arange(count * 64, dtype=torch.int16).reshape(count, 8, 8)
    memory = torch.empty(8 * count, 8, dtype=torch.int16)  # row i lies at 5 i, modulo the rows
    memory[torch.arange(8 * count) * 5 % (8 * count)] = tiles.reshape(-1, 8)
    names, row = [f"%r{i + 1}" for i in range(count)], "{%r60, %r61, %r62, %r63}"
    form, some = f"sync.aligned.m8n8.x{count}{trans}.shared.b16", f"{{{', '.join(names)}}}"
    address = f"""
    rem.u32 %r50, tid, {8 * count}; shl.b32 %r51, %r50, 4; setp.lt.u32 %p1, tid, {8 * count};
    mul.lo.u32 %r52, %r50, 5; rem.u32 %r52, %r52, {8 * count}; shl.b32 %r52, %r52, 4;
    mad.wide.u32 %rd1, %r50, 16, p0; mad.wide.u32 p1, tid, {4 * count}, p1;
    """
    load = f"@%p1 ld.global.v4.b32 {row}, [%rd1]; @%p1 st.shared.v4.b32 [%r51], {row};\nbar.sync 0;\n"
    load += f"ldmatrix.{form} {some}, [%r52];\n"
    load += " ".join(f"st.global.b32 [p1+{4 * i}], {name};" for i, name in enumerate(names))
    got = torch.empty(32, count, 2, dtype=torch.int16)
    build(address + load, shared=512).run(1, [memory, got, 0, 0])
    lane, pair = torch.arange(32)[:, None, None], torch.arange(2)
    given = tiles.transpose(1, 2) if trans else tiles
    assert torch.equal(got, given[torch.arange(count)[:, None], lane // 4, 2 * (lane % 4) + pair])
    store = " ".join(f"ld.global.b32 {name}, [p1+{4 * i}];" for i, name in enumerate(names))
    store += f"\nstmatrix.{form} [%r52], {some};\nbar.sync 0;\n"
    store += f"@%p1 ld.shared.v4.b32 {row}, [%r51]; @%p1 st.global.v4.b32 [%rd1], {row};"
    back = torch.empty_like(memory)
    build(address + store, shared=512).run(1, [back, got, 0, 0])
    assert torch.equal(back, memory)


# ---- memory ----


@pytest.mark.parametrize(("bits", "vector"), [(16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2)])
def test_accesses(bits, vector):
    size = bits // 8 * vector
    x = torch.randint(0, 255, (64, size), dtype=torch.uint8)
    r = [f"{REGISTER[bits]}{i + 1}" for i in range(vector)]
    some = f"{{{', '.join(r)}}}" if vector > 1 else r[0]
    form = f"v{vector}.b{bits}" if vector > 1 else f"b{bits}"
    code = f"""
    mad.wide.u32 p0, me, {size}, p0; mad.wide.u32 p1, me, {size}, p1; mul.lo.u32 %r10, tid, {size};
    ld.global.{form} {some}, [p0]; st.shared.{form} [%r10+{size}], {some};
    {" ".join(f"mov.b{bits} {x}, 0;" for x in r)} ld.shared.{form} {some}, [%r10+{size}];
    setp.ne.u32 %p1, tid, 3;
    @%p1 st.global.{form} [ p1 + 0 ], {some};"""
    out = torch.zeros_like(x)
    build(code, shared=32 * size + size).run(2, [x, out, 0, 0])
    x[3::32] = 0
    assert torch.equal(out, x)


def test_narrow_accesses_and_guards():
    x = np.array([0x8001FFFE] * 32, np.uint32)
    same(compute("ld.global.u16 %r0, [p0];", np.uint32, x), x & 0xFFFF)  # zero extended
    same(compute("st.shared.b32 [smem], %r1;\nld.shared.b16 %r0, [smem+2];", np.uint32, x, shared=128), x >> 16)
    # what a guard keeps off is not read, and its register stays
    x = np.arange(32, dtype=np.uint32)
    code = "setp.lt.u32 %p1, %r1, 5;\nmov.b32 %r0, 77;\n@%p1 ld.global.b32 %r0, [p0];\nmov.u64 %rd1, 0;\n"
    same(compute(f"{code}@!%p1 add.s64 p0, %rd1, 0;\n@%p1 ld.global.b32 %r0, [p0];", np.uint32, x), np.where(x < 5, x, 77))


@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_asynchronous_copies(cache, size):
    x = torch.randint(1, 255, (32, size), dtype=torch.uint8)
    wanted = torch.arange(32, dtype=torch.int32) % (size // 4 + 1) * 4
    code = f"""
    mad.wide.u32 p0, tid, {size}, p0; mad.wide.u32 p1, tid, 4, p1; mad.wide.u32 p2, tid, {size}, p2;
    mul.lo.u32 %r2, tid, {size}; ld.global.b32 %r1, [p1]; setp.eq.b32 %p1, %r1, 0; @%p1 add.s64 p0, p0, 1099511627776;
    cp.async.{cache}.shared.global [ %r2 + 0 ], [ p0 + 0 ], {size:#x}, %r1;
    cp.async.commit_group; cp.async.wait_group 0;"""
    for i in range(size // 4):
        code += f"\nld.shared.b32 %r3, [%r2+{4 * i}];\nst.global.b32 [p2+{4 * i}], %r3;"
    out = torch.empty_like(x)
    build(code, shared=32 * size).run(1, [x, wanted, out, 0])  # an address of which nothing is wanted may be anything
    assert torch.equal(out, x * (torch.arange(size) < wanted[:, None]))


def test_groups_of_copies():
    """The one before the last group has come, the last one has not."""
    code = """
    mad.wide.u32 p0, tid, 4, p0; mad.wide.u32 p1, tid, 4, p1;
    cp.async.ca.shared.global [smem], [p0], 4; cp.async.commit_group;
    cp.async.ca.shared.global [smem+128], [p0], 4; cp.async.commit_group; cp.async.wait_group 1;
    ld.shared.b32 %r1, [smem+{}]; st.global.b32 [p1], %r1;"""
    x, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    build(code.format(0), shared=256).run(1, [x, out, 0, 0])
    assert torch.equal(out, x)
    with pytest.raises(Fault, match="has not delivered"):
        build(code.format(128), shared=256).run(1, [x, out, 0, 0])


def test_far_addresses_cost_nothing():
    far = torch.empty(3 << 30, dtype=torch.int16)  # 6 GiB that nobody touches
    far[-64:] = torch.arange(64, dtype=torch.int16)
    code = f"""
    mul.wide.s32 %rd1, me, 2; add.s64 %rd2, p0, {2 * (far.numel() - 64)}; add.s64 %rd3, %rd2, %rd1;
    ld.global.b16 %rs1, [%rd3]; add.s16 %rs1, %rs1, 1; st.global.b16 [%rd3], %rs1;"""
    build(code).run(2, [far, 0, 0, 0])
    assert torch.equal(far[-64:], torch.arange(1, 65, dtype=torch.int16))
    with pytest.raises(Fault, match="byte 6442450944 is outside"):
        build(code).run(3, [far, 0, 0, 0])


# ---- control flow ----

JOIN = "bar.sync 0; shfl.sync.bfly.b32 %r2, %r0, 16, 31, -1; add.s32 %r0, %r0, %r2;"
BRANCHES = f"""
setp.lt.u32 %p1, %r1, 7; @%p1 bra $L_then;
add.s32 %r0, %r1, 100; bra.uni $L_join;
$L_then: mul.lo.s32 %r0, %r1, 3;
$L_join: {JOIN}"""
JOIN_FIRST = f"""
bra.uni $L_entry;
$L_join: {JOIN} bra.uni $L_end;
$L_then: mul.lo.s32 %r0, %r1, 3; bra.uni $L_join;
$L_entry: setp.ge.u32 %p1, %r1, 7; @!%p1 bra $L_then;
add.s32 %r0, %r1, 100; bra.uni $L_join;
$L_end:"""


IN_A_LOOP = f"""
mov.b32 %r3, 0;
$L_loop: {BRANCHES}
mov.b32 %r1, %r0; add.s32 %r3, %r3, 1; setp.le.u32 %p2, %r3, cta; @%p2 bra $L_loop;"""


@pytest.mark.parametrize("code", [BRANCHES, JOIN_FIRST, IN_A_LOOP])
def test_branches_meet_again(code):
    x, want = np.arange(64, dtype=np.uint32).reshape(2, 32), []
    for program in range(2):
        y = x[program]
        for _ in range(1 + program * (code is IN_A_LOOP)):
            y = np.where(y < 7, 3 * y, y + 100)
            y = y + np.roll(y, 16)
        want.append(y)
    same(compute(code, np.uint32, x.reshape(-1)), np.concatenate(want))


def test_loops():
    x = np.random.default_rng(0).integers(0, 9, 96, np.uint32)
    code = """
    mov.b32 %r0, 0; mov.b32 %r2, 0; setp.eq.b32 %p1, %r1, 0; @%p1 bra $L_end;
    $L_outer: mov.b32 %r3, 0;
    $L_inner: add.s32 %r3, %r3, 1; add.s32 %r0, %r0, %r3; setp.le.u32 %p2, %r3, %r2; @%p2 bra $L_inner;
    add.s32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, %r1; @%p3 bra $L_outer;
    $L_end: bar.warp.sync -1; bar.sync 0;"""
    want = [sum(i * (i + 1) // 2 for i in range(1, n + 1)) for n in x.tolist()]
    same(compute(code, np.uint32, x), np.array(want, np.uint32))
    by_program = code.replace("%r1;", "cta;").replace("%r1,", "cta,")  # a barrier in the loop: its trips are the program's
    by_program = by_program.replace("$L_inner:", "$L_inner: bar.sync 0;")
    want = [sum(i * (i + 1) // 2 for i in range(1, n + 1)) for n in np.arange(96) // 32]
    same(compute(by_program, np.uint32, x), np.array(want, np.uint32))


def test_threads_that_return_early():
    out = torch.zeros(64, dtype=torch.int32)
    code = "setp.lt.u32 %p1, me, 40;\n@%p1 bra $L_on;\nret;\n$L_on:\nmad.wide.u32 p0, me, 4, p0;\nst.global.b32 [p0], me;"
    build(code).run(2, [out, 0, 0, 0])
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) * (torch.arange(64) < 40))


# ---- faults ----

AT = "mad.wide.u32 %rd1, me, 4, p0;\nmad.wide.u32 %rd2, me, 4, p1;\nxor.b32 %r9, smem, {};"
LOAD, STORE = "ld.global.b32 %r1, [%rd1];", "st.global.b32 [%rd2], me;"
READ, WRITE = "ld.shared.b32 %r1, [smem];", "st.shared.b32 [smem], tid;"
OTHER, OVER = "ld.shared.b32 %r2, [%r9];", "st.shared.b32 [%r9], 7;"  # what belongs to another thread
COPY, COMMIT, WAIT = "cp.async.ca.shared.global [smem], [%rd1], 4;", "cp.async.commit_group;", "cp.async.wait_group 0;"
FIRST = "setp.eq.u32 %p1, tid, 0;\n@%p1 bra $L_some;\nbra.uni $L_end;\n$L_some:\n"
WARP, PROGRAM = "not all threads of a warp", "not all threads of a program"
MMA = (
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
    "{%r1, %r1, %r1, %r1}, {%r2, %r2, %r2, %r2}, {%r2, %r2}, {%r3, %r3, %r3, %r3};"
)

# what goes before, the line that faults, what is said, and of which thread and program where it is not the first
FAULTS = {
    "global, out of bounds": ("add.s64 %rd1, %rd1, 4;", LOAD, "byte 512 is outside", 63, 1),
    "global, before": ("add.s64 %rd2, %rd2, -4;", STORE, "byte -4 is outside"),
    "global, unaligned": ("add.s64 %rd1, %rd1, 2;", LOAD, "not aligned to 4"),
    "global, unaligned vector": ("", "ld.global.v2.b32 {%r1, %r2}, [%rd1];", "not aligned to 8", 1),
    "global, nowhere": ("mov.b64 %rd1, 64;", LOAD, "in no tensor"),
    "global, two tensors": ("setp.eq.u32 %p1, tid, 5;\nselp.b64 %rd1, %rd2, %rd1, %p1;", LOAD, "two tensors", 5),
    "shared, out of bounds": ("", "ld.shared.b32 %r1, [smem+256];", "shared address 256 of 256"),
    "shared, before": ("", "st.shared.b32 [smem+-4], 1;", "shared address"),
    "shared, unaligned": (WRITE, "ld.shared.b32 %r1, [global_smem+2];", "not aligned to 4"),
    "shared, never written": (f"setp.ne.u32 %p1, tid, 9;\n@%p1 {WRITE}", READ, "nobody wrote", 9),
    "copy, not committed": (f"{COPY}\n{WAIT}", READ, "has not delivered"),
    "copy, not waited for": (f"{COPY}\n{COMMIT}", READ, "has not delivered"),
    "copy, written over": (f"{COPY}\n{COMMIT}", WRITE, "where an asynchronous copy writes"),
    "copy, twice": (COPY, COPY, "copies over where an asynchronous copy writes"),
    "copy, unaligned": ("add.s64 %rd1, %rd1, 2;", COPY, "not aligned to 4"),
    "copy, out of bounds": ("add.s64 %rd1, %rd1, 4;", COPY, "byte 512 is outside", 63, 1),
    "read and copy": (f"{WRITE}\nbar.sync 0;\n{OTHER}", COPY, "copies over what another thread read"),
    "write and copy": (f"{WRITE}\nmov.b32 smem, %r9;", COPY, "copies over what another thread wrote"),
    "one place": ("mov.b32 smem, 8;", WRITE, "different values to one place"),
    "programs, write and write": ("", "st.global.b32 [p1], cta;", "two programs write to one place"),
    "barrier": (FIRST, "bar.sync 0;", PROGRAM, 1),
    "barrier of a warp": (FIRST, "bar.warp.sync -1;", WARP, 1),
    "wait": (FIRST, WAIT, PROGRAM, 1),
    "shuffle": (FIRST, "shfl.sync.idx.b32 %r1, tid, 0, 31, -1;", WARP, 1),
    "reduction": (FIRST, "redux.sync.max.s32 %r1, %r2, -1;", WARP, 1),
    "reduction of some": ("", "redux.sync.max.s32 %r1, %r2, 15;", "reduces over some threads of a warp"),
    "guarded shuffle": ("setp.ne.u32 %p1, tid, 7;", "@%p1 shfl.sync.idx.b32 %r1, tid, 0, 31, -1;", WARP, 7),
    "matrix load": (FIRST, "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [global_smem];", WARP, 1),
    "matrix store": (FIRST, "stmatrix.sync.aligned.m8n8.x1.shared.b16 [global_smem], {%r1};", WARP, 1),
    "product": (FIRST, MMA, WARP, 1),
}


def launch(code, apart=4, threads=64, programs=2, **options):
    """Two programs of two warps. %rd1, %rd2: a word for each thread of two tensors; %r9: the shared word of another thread."""
    x = torch.arange(threads * programs, dtype=torch.int32)
    build(f"{AT.format(apart)}\n{code}", threads=threads, shared=4 * threads).run(programs, [x, x.clone(), 0, 0], **options)


def faults(before, line, what, thread=0, program=0, **options):
    end = "\n$L_end:" if "$L_end" in before else ""
    code = f"{before}\n{line}{end}".removeprefix("\n")
    number = len(f"{AT}\n{code.removesuffix(end)}".split("\n"))
    with pytest.raises(Fault) as caught:
        launch(code, **options)
    said = str(caught.value)
    assert said.startswith(f"case.ptx, case.py:{number}, program {program}, thread {thread}: "), said
    assert what in said, said
    assert said.endswith(f": `{line.rstrip(';')}`"), said


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    faults(*FAULTS[name])


@pytest.mark.parametrize("apart", [4, 128], ids=["within a warp", "between warps"])
def test_barriers_between_threads(apart):
    """A barrier of the program orders all; one of a warp only the warp's own threads; nothing else does."""
    orders = {"": False, "bar.sync 0;": True, "bar.warp.sync -1;": apart == 4}
    copied = f"{COPY}\n{COMMIT}\n{WAIT}"
    sequences = [(WRITE, OTHER), (f"{WRITE}\nbar.sync 0;\n{READ}", OVER), (WRITE, OVER), (copied, OTHER)]
    for (first, second), (barrier, fine) in itertools.product(sequences, orders.items()):
        if fine:
            launch(f"{first}\n{barrier}\n{second}", apart)
        else:
            what = {OTHER: "reads what another thread wrote", OVER: "overwrites what another thread"}[second]
            faults(f"{first}\n{barrier}".rstrip("\n"), second, what, apart=apart)
    launch(f"{WRITE}\n{READ}\n{WRITE}\n{READ}")  # a thread's own needs none
    launch("st.shared.b32 [smem], 7;\nst.shared.b32 [%r9], 7;")  # nor does the same value


def test_readers_are_all_remembered():
    """Both warps read a word, in either order or at once: then neither overwrites it, with no more than a barrier of a warp."""
    read, over = "ld.shared.b32 %r1, [global_smem];", "@%p1 st.shared.b32 [global_smem], 7;"
    for first, last in ((0, 32), (32, 0)):
        who = f"setp.eq.u32 %p1, tid, {last};\nsetp.eq.u32 %p2, tid, {first};"
        for reads in (read, f"@%p2 {read}\n@%p1 {read}"):
            before = f"{WRITE}\n{who}\nbar.sync 0;\n{reads}\nbar.warp.sync -1;"
            faults(before, over, "overwrites what another thread read", last)
            launch(f"{before}\nbar.sync 0;\n{over}")
    for lane in (0, 31):  # a whole warp reads it
        who = f"setp.lt.u32 %p2, tid, 32;\nsetp.eq.u32 %p1, tid, {lane};"
        before = f"{WRITE}\n{who}\nbar.sync 0;\n@%p2 {read}"
        faults(before, over, "overwrites what another thread read", lane)
        launch(f"{before}\nbar.warp.sync -1;\n{over}")


def test_programs_at_one_place():
    """One after the other, in the instruction or in another, run together or not."""
    own, first = "mad.wide.u32 %rd2, me, 4, p1;", "st.global.b32 [%rd2], tid;"
    shift = "xor.b32 %r1, me, 64;\nmad.wide.u32 %rd3, %r1, 4, p1;"
    faults(f"{own}\n{first}\n{shift}", "ld.global.b32 %r2, [%rd3];", "reads what another program wrote")
    faults(f"{own}\n{first}\n{shift}", "st.global.b32 [%rd3], tid;", "overwrites what another program wrote")
    faults(
        f"{own}\nld.global.b32 %r2, [%rd2];\n{shift}", "st.global.b32 [%rd3], 1;", "overwrites what another program read", 0, 0
    )
    all_ = "ld.global.b32 %r2, [p1];"
    for program in (0, 1):
        before = f"setp.eq.u32 %p1, cta, {program};\n{all_}"
        faults(before, "@%p1 st.global.b32 [p1], 1;", "overwrites what another program read", 0, program)
    launch(f"{own}\n{first}\nld.global.b32 %r2, [%rd2];\n{first}\n{all_.replace('p1', 'p0')}")
    with pytest.raises(Fault, match="program 80, thread 0: overwrites what another program wrote"):  # 64 run together
        launch("rem.u32 %r1, cta, 80;\nmad.wide.u32 %rd1, %r1, 256, p0;\nst.global.b32 [%rd1], 1;", programs=81)


def test_gaps_of_views():
    x = torch.arange(32 * 8, dtype=torch.int32).reshape(32, 8)
    code = "mad.wide.u32 p0, tid, 32, p0;\nmad.wide.u32 p1, tid, 4, p1;\nld.global.v2.b32 {{%r1, %r2}}, [p0+{}];\n"
    code += "st.global.b32 [p1], %r2;"
    out = torch.empty(32, dtype=torch.int32)
    build(code.format(0)).run(1, [x[:, 2:5], out, 0, 0])
    assert torch.equal(out, x[:, 3])
    build(code.format(0)).run(1, [x.T[2:4], out, 0, 0])
    with pytest.raises(Fault, match="thread 0: byte 8 is outside of the tensors"):  # the first half is inside
        build(code.format(0)).run(1, [x[:, 2:3], out, 0, 0])
    for outside in (-8, 8):
        with pytest.raises(Fault, match=f"thread 0: byte {8 + outside} is outside of the tensors"):
            build(code.format(outside)).run(1, [x[:, 2:4], out, 0, 0])


def test_runs_that_cannot_be(monkeypatch):
    kernel = build("add.s32 %r1, tid, 1;", ("u64", "u64", "u32", "f32", "u64", "u64"))
    kernel.run(1, [torch.zeros(1), 0, 1, 2.0])  # the two that Triton adds
    for arguments in ([0, 0, 0], [0] * 7):
        with pytest.raises(ValueError, match=f"case.ptx has 6 parameters, given are {len(arguments)}"):
            kernel.run(1, arguments)
    for programs in ([2], [-1, 0]):
        with pytest.raises(ValueError, match="of a grid of 2"):
            kernel.run(2, [0] * 6, programs=programs)
    out = torch.zeros(96, dtype=torch.int32)
    build("mad.wide.u32 p0, me, 4, p0;\nst.global.b32 [p0], 1;").run(3, [out, 0, 0, 0], programs=[0, 2])
    assert out.tolist() == [1] * 32 + [0] * 32 + [1] * 32
    monkeypatch.setattr(machine, "ENDLESS", 100)
    with pytest.raises(Fault, match=r"case\.ptx.* does not end"):
        build("$L_loop:\nadd.s32 %r1, %r1, 1;\nbra.uni $L_loop;").run(1, [0] * 4)


UNKNOWN = [
    "popc.b32 %r1, tid;", "add.cc.u32 %r1, tid, 1;", "add.rz.f32 %r1, %r2, %r3;", "add.sat.s32 %r1, %r2, %r3;",
    "mad.hi.sat.s32 %r1, %r2, %r3, %r4;", "mul.wide.s64 %rd1, %rd2, %rd3;", "add.f128 %rd1, %rd2, %rd3;",
    "max.f32 %r1, %r2, %r3, %r4;", "add.ftz.f16x2 %r1, %r2, %r3;", "div.approx.f32 %r1, %r2, %r3;", "sin.approx.f32 %r1, %r2;",
    "ex2.approx.f16 %rs1, %rs2;", "bfe.s32 %r1, %r2, 30, 4;", "bfe.u32 %r1, %r2, 3, 0;", "bfi.b32 %r1, %r2, %r3, 32, 1;",
    "bfe.u32 %r1, %r2, tid, 3;", "cvt.rz.f16.f32 %rs1, %r1;", "cvt.rn.tf32.f32 %r1, %r2;", "cvt.s32.f32 %r1, %r2;",
    "cvt.rn.s32.f32 %r1, %r2;", "cvt.rn.bf16.s64 %rs1, %rd1;", "cvt.sat.s8.s32 %r1, %r2;",
    "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;", "setp.lt.f32 %p1|%p2, %r1, %r2;", "prmt.b32.f4e %r1, %r2, %r3, %r4;",
    "redux.sync.max.f32 %r1, %r2, -1;", "redux.sync.and.s32 %r1, %r2, -1;",
    "shfl.sync.idx.b32 %r1, %r2, 0, 31, 15;", "shfl.sync.idx.b32 %r1|%p1, %r2, 0, 31, -1;", "bar.sync 1;", "bar.sync 0, 32;",
    "barrier.sync 0;", "bar.warp.sync 1;", "ld.volatile.global.b32 %r1, [p0];", "ld.global.nc.b32 %r1, [p0];",
    "ld.global.b8 %rs1, [p0];", "ld.local.b32 %r1, [smem];", "ld.global.v2.b32 %r1, [p0];",
    "ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [p0];", "ld.param.b32 %r1, [case_param_9];",
    "ld.param.v2.b32 {%r1, %r2}, [case_param_0];", "ld.global.b32 %r1, [p0-4];", "atom.global.add.u32 %r1, [p0], 1;",
    "red.global.add.f32 [p0], %r1;", "st.global.wt.b32 [p0], %r1;", "cp.async.bulk.commit_group;",
    "cp.async.mbarrier.arrive.b64 [smem];", "ldmatrix.sync.aligned.m8n8.x4.shared.b8 {%r1, %r2, %r3, %r4}, [smem];",
    "membar.cta;", "fence.proxy.async;", "call foo;", "wgmma.wait_group.sync 0;",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, {%r5, %r6, %r7, %r8}, %rd1, 1, 1, 1, 0;",
    "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1;",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2};",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1, %r2}, {%r1, %r2}, {%r5, %r6}, {%r1, %r2};", "bra $L_nowhere;",
    "mov.u32 %r1, %clock;", "add.s32 %r1, %q1, 1;", "@%p1 ret;", "@%p1 bar.sync 0;", ".local .b8 x[4];", "{ .reg .b32 %x<3>; }",
    "mov.u64 %r1, %rd1;", "add.s64 %rd1, %r1, %rd2;",
]  # fmt: skip


@pytest.mark.parametrize("line", UNKNOWN)
def test_unknown_is_an_error(line):
    with pytest.raises(Unknown) as caught:
        build(f"add.s32 %r1, tid, 1;\n{line}")
    said = str(caught.value)
    assert said.startswith("case.ptx: ")
    assert f"`{line.removeprefix('{ ').partition(';')[0]}` (case.py:2)" in said


def test_texts_that_are_no_kernel():
    one = ".target sm_90\n.visible .entry one(\n.param .u32 a\n)\n.reqntid 32\n{\nret;\n}\n"
    Kernel(one, 0, "this.ptx").run(1, [0])
    wrong = {
        one + one.replace("one", "two"): "2 kernels",
        one.replace(".reqntid 32\n", ""): "threads None",
        one.replace(".reqntid 32", ".reqntid 8, 8"): "threads",
        one.replace(".reqntid 32", ".reqntid 48"): "threads 48",
        "": "0 kernels",
        one.replace("sm_90", "sm_75"): "target sm_75; accepted: sm_80",
        one.replace("ret;", "{\n.reg .b32 a;\n}\n}\nret;"): "brace",
        one.replace("ret;", "{\nret;"): "brace",
        one.replace("ret;", "ret"): "`ret`",
    }
    for text, what in wrong.items():
        with pytest.raises(Unknown, match=rf"^this\.ptx: .*{what}"):
            Kernel(text, 0, "this.ptx")


# ---- costs ----


def costs(before, line, after="", threads=32, programs=1):
    """Of one line. p0: a tensor at the beginning of a sector."""
    x = torch.zeros(1 << 16, dtype=torch.int32)
    x = x[-x.data_ptr() % 32 // 4 :]
    kernel = build(f"{before}\n{line}\n{after}", threads=threads, shared=1 << 14)
    (found,) = (c for c in kernel.run(programs, [x, 0, 0, 0], count=True) if c.instruction.text == line.rstrip(";"))
    return found


def test_counts_of_warps():
    add = "add.s32 %r1, tid, 1;"
    assert costs("", add, threads=96, programs=3).warps == 9
    some = "setp.lt.u32 %p1, tid, 40;\n@%p1 bra $L_on;\nbra.uni $L_end;\n$L_on:"
    assert costs(some, f"{add}", "$L_end:", threads=96).warps == 2
    trips = "shr.u32 %r2, tid, 5;\nmov.b32 %r3, 0;\n$L_loop:"
    more = "add.s32 %r3, %r3, 1;\nsetp.le.u32 %p1, %r3, %r2;\n@%p1 bra $L_loop;"
    assert costs(trips, add, more, threads=96).warps == 1 + 2 + 3


VECTORS = {2: ("b16", "%rs1"), 4: ("b32", "%r1"), 8: ("v2.b32", "{%r1, %r1}"), 16: ("v4.b32", "{%r1, %r1, %r1, %r1}")}
BANKS = [(4, 1, 1), (4, 2, 2), (4, 32, 32), (4, 33, 1), (4, 0, 1)]
BANKS += [(8, 2, 2), (8, 4, 4), (8, 32, 32), (16, 4, 4), (16, 8, 8), (16, 32, 32), (16, 36, 4)]


@pytest.mark.parametrize(("size", "stride", "wavefronts"), BANKS)
def test_counts_of_bank_conflicts(size, stride, wavefronts):
    """Strides in words. A turn serves 32 banks; a wide access takes 2 or 4 turns at least."""
    vector, registers = VECTORS[size]
    code = f"mul.lo.u32 %r9, tid, {4 * stride};\nmov.b32 %r1, 0;"
    write = f"st.shared.{vector} [%r9], {registers};"
    read = f"ld.shared.{vector} {registers.replace('1', '2')}, [%r9];"
    found = costs(code, write)
    assert (found.warps, found.wavefronts, found.least) == (1, wavefronts, size // 4)
    found = costs(f"{code}\n{write}\nbar.sync 0;", read)
    assert (found.warps, found.wavefronts, found.least) == (1, wavefronts, size // 4)


ROWS = [(1, 16, 1), (2, 16, 2), (4, 16, 4), (4, 80, 4), (4, 32, 8), (4, 128, 32)]


@pytest.mark.parametrize(("count", "stride", "wavefronts"), ROWS)
def test_counts_of_matrix_loads(count, stride, wavefronts):
    """Strides of rows in bytes; 8 rows of 16 bytes are a turn."""
    before = f"mov.b32 %r1, 0;\nmul.lo.u32 %r9, tid, {stride};\nst.shared.v4.b32 [%r9], {{%r1, %r1, %r1, %r1}};\nbar.sync 0;"
    form, registers = f"matrix.sync.aligned.m8n8.x{count}.shared.b16", ", ".join(["%r1"] * count)
    for line in (f"ld{form} {{{registers}}}, [%r9];", f"st{form} [%r9], {{{registers}}};"):
        found = costs(before, line)
        assert (found.wavefronts, found.least) == (wavefronts, count)


SECTORS = [(2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16), (4, 8, 8), (4, 32, 32), (16, 64, 32), (4, 0, 1)]


@pytest.mark.parametrize(("size", "stride", "sectors"), SECTORS)
def test_counts_of_global_accesses(size, stride, sectors):
    """Strides in bytes; two programs of two warps."""
    form, registers = VECTORS[size]
    before = f"mad.wide.u32 %rd1, me, {stride}, p0;"
    read = f"ld.global.{form} {registers}, [%rd1];"
    found = costs(before, read, threads=64, programs=2)
    bytes_ = 32 * size if stride else size
    assert (found.warps, found.sectors, found.bytes) == (4, 4 * sectors, 4 * bytes_)
    if stride:
        found = costs(f"{before}\n{read}", f"st.global.{form} [%rd1], {registers};", threads=64, programs=2)
        assert (found.warps, found.sectors, found.bytes) == (4, 4 * sectors, 4 * bytes_)
    guarded = f"{before}\nsetp.lt.u32 %p1, tid, 8;"
    found = costs(guarded, f"@%p1 {read}", threads=64, programs=2)
    assert found.bytes == 2 * bytes_ / (4 if stride else 1)
