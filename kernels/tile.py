"""Pieces of kernels: fast elementary functions, GELU and its derivative, LayerNorm of a tile, loads and stores, products.

Every kernel's last argument ``Z`` is its sizes: what it is compiled for, an ``operation.Sizes``.

Approximations, each with its largest error; all far below one rounding of float16 and bfloat16, and used (FAST) only when
the kernel computes in those, compiled for an NVIDIA GPU. In float32 and in the interpreter the plain forms run.

- exp2: ex2.approx, 2 units in the last place of float32 over the whole range (PTX ISA), denormals flushed to 0.
- log2: lg2.approx, 2^-22 absolute between 1/2 and 2, relative elsewhere (PTX ISA).
- reciprocal: rcp.approx, 1 unit in the last place.
- gelu: x·(1 + tanh u)/2 with u = x·(0.7975079 + 0.0370056 x² − 0.0003515 x⁴), x² clamped at 36: 2.6e-5 against the erf form,
  and tanh.approx, 2^-11 relative (PTX ISA), on top.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
COPIED = tl.constexpr(2048)  # values that a program of ``copied`` has at once


@triton.jit
def _asm(x, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    return _asm(x, "ex2.approx.ftz.f32 $0, $1;") if FAST else tl.exp2(x)


@triton.jit
def log2(x, FAST: tl.constexpr):
    return _asm(x, "lg2.approx.ftz.f32 $0, $1;") if FAST else tl.log2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return _asm(x, "rcp.approx.ftz.f32 $0, $1;")
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)  # a plain / may be off by 2 units, PyTorch's is not


@triton.jit
def tanh(x):
    return _asm(x, "tanh.approx.f32 $0, $1;")


@triton.jit
def exponent(x):
    """floor(log2 x) of normal float32 x ≥ 0; −127 of smaller ones, 128 of infinity and NaN."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def power_of_two(n):
    """2 to an integer exponent between −126 and 127, to which it is clamped."""
    return ((tl.minimum(tl.maximum(n, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gelu(x, FAST: tl.constexpr):
    """x·Φ(x), Φ the normal distribution's cumulative function."""
    if FAST:
        x2 = tl.minimum(x * x, 36.0)
        u = x * (0.7975079 + x2 * (0.0370056 - 0.0003515 * x2))
        half = 0.5 * x
        return half * _asm(u, "tanh.approx.f32 $0, $1;") + half
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_pairs(x, FAST: tl.constexpr, PAIRS: tl.constexpr):
    """GELU; with PAIRS GELU(8x)/4 in float16: the caller scales the weights around it by 1/8 and 4, which is exact.

    The polynomial of gelu in x²/64, which the saturating product clamps at 1. Largest error 3e-3 for |8x| below 4, where
    rounding the exact value to bfloat16 makes 7.8e-3. |x| has to stay below 32752 (see inner._halvings), so that 2x is finite.
    """
    if PAIRS and FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h, q, t, c0, c1, c2;
            mov.b32 c0, 0x46614661;   // 8 * 0.7975079, twice
            mov.b32 c1, 0x4CBD4CBD;   // 8 * 64 * 0.0370056
            mov.b32 c2, 0xC9C2C9C2;   // 8 * 64 * 64 * -0.0003515
            cvt.rn.f16x2.f32 h, $2, $1;
            mul.sat.f16x2 q, h, h;
            fma.rn.f16x2 t, q, c2, c1;
            fma.rn.f16x2 t, t, q, c0;
            mul.f16x2 t, t, h;
            tanh.approx.f16x2 t, t;
            fma.rn.f16x2 $0, h, t, h;
            }""",
            "=r,f,f",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif PAIRS:
        return (gelu(8.0 * x, FAST) * 0.25).to(tl.float16)
    else:
        return gelu(x, FAST)


@triton.jit
def gelu_gradient(x, da, FAST: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr, FINE: tl.constexpr = False):
    """GELU(x), and its derivative times da; with PAIRS GELU(8x)/4 and twice the derivative at 8x times da.

    The polynomial of gelu and its derivative. Pairs of float16 as in gelu_pairs, but for the product with da, which may be
    too small for them. x·(1 − t²) is of an x clamped where 1 − t² is 0, but for what tanh.approx may be off there. FINE, for
    results in float16: t is 1 − 2r, r = 1/(1 + exp(2u)), so that 1 − t² = 4·r·(1 − r) is not what rounding leaves of 1 − 1.
    """
    if PAIRS and FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h, q, t, n, e, u, g, c0, c1, c2, d1, d2, one, less;
            .reg .b16 lo, hi;
            .reg .f32 a, b;
            mov.b32 c0, 0x46614661;   // 8 * 0.7975079, twice
            mov.b32 c1, 0x4CBD4CBD;   // 8 * 64 * 0.0370056
            mov.b32 c2, 0xC9C2C9C2;   // 8 * 64 * 64 * -0.0003515
            mov.b32 d1, 0x531B531B;   // 3 * 8 * 64 * 0.0370056
            mov.b32 d2, 0xD333D333;   // 5 * 8 * 64 * 64 * -0.0003515
            mov.b32 one, 0x3C003C00;
            mov.b32 less, 0xBC00BC00; // -1
            cvt.rn.f16x2.f32 h, $3, $2;
            mul.sat.f16x2 q, h, h;
            fma.rn.f16x2 t, q, c2, c1;
            fma.rn.f16x2 t, t, q, c0;
            mul.f16x2 t, t, h;
            tanh.approx.f16x2 t, t;
            fma.rn.f16x2 g, h, t, h;
            neg.f16x2 n, t;
            fma.rn.f16x2 e, n, t, one;
            min.NaN.f16x2 n, h, one;
            max.NaN.f16x2 n, n, less;
            mul.f16x2 e, e, n;
            fma.rn.f16x2 u, q, d2, d1;
            fma.rn.f16x2 u, u, q, c0;
            add.f16x2 t, t, one;
            fma.rn.f16x2 u, e, u, t;
            mov.b32 {lo, hi}, g;
            cvt.f32.f16 a, lo;
            cvt.f32.f16 b, hi;
            cvt.rn.bf16x2.f32 $0, b, a;
            mov.b32 {lo, hi}, u;
            cvt.f32.f16 a, lo;
            cvt.f32.f16 b, hi;
            mul.f32 a, a, $4;
            mul.f32 b, b, $5;
            cvt.rn.bf16x2.f32 $1, b, a;
            }""",
            "=r,=r,f,f,f,f",
            [x, da],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif FAST and FINE:
        x2 = tl.minimum(x * x, 36.0)
        u = x * (0.7975079 + x2 * (0.0370056 - 0.0003515 * x2))
        r = reciprocal(1.0 + exp2(u * 2.8853900817779268, FAST), FAST)
        value = x * (1.0 - r)
        slope = (1.0 - r) + 2.0 * r * value * (0.7975079 + x2 * (0.1110168 - 0.0017575 * x2))
        return value.to(DTYPE), (da * slope).to(DTYPE)
    elif FAST:
        x2 = tl.minimum(x * x, 36.0)
        t = tanh(x * (0.7975079 + x2 * (0.0370056 - 0.0003515 * x2)))
        half = 0.5 * x
        slope = 0.5 * t + 0.5 + (half - half * t * t) * (0.7975079 + x2 * (0.1110168 - 0.0017575 * x2))
        return (half * t + half).to(DTYPE), (da * slope).to(DTYPE)
    elif PAIRS:
        value, slope = gelu_gradient(8.0 * x, 2.0 * da, FAST, False, tl.float32)
        return (value * 0.25).to(DTYPE), slope.to(DTYPE)
    else:
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = phi + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
        return (x * phi).to(DTYPE), (da * slope).to(DTYPE)


@triton.jit
def centred(x, real, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """x − mean of each row of SIZE values, 0 in the columns that are not ``real``, with which x is zero.

    EXACT, for float32 input: the rounding of a large mean is seen there, so what it left is taken off, too. Of equal values
    0 is left, to the bit: the first mean is theirs but for a few units in the last place, SIZE of which add up without
    rounding, and a quotient that is a float32 is found by a rounded division, not by a product with 1/SIZE.
    """
    if EXACT:
        size = tl.full((x.shape[0],), SIZE, tl.float32)
        x = tl.where(real[None, :], x - tl.div_rn(tl.sum(x, 1), size)[:, None], 0.0)
        return tl.where(real[None, :], x - tl.div_rn(tl.sum(x, 1), size)[:, None], 0.0)
    else:
        return tl.where(real[None, :], x - (tl.sum(x, 1) * (1.0 / SIZE))[:, None], 0.0)


@triton.jit
def load(ptr, at, mask):
    """Values in float32, 0 where they are masked or there are none at all, with ptr None.

    ``at`` has the narrow part of an address, ``ptr`` what needs 64 bits: added up before, every value would need them.
    """
    if ptr is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, at, x, mask):
    """Nothing with ptr None."""
    if ptr is not None:
        tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask)


# Rows in pieces: tuples of PIECES, [BLOCK, CHUNK] each, of W columns, so that rows of 384 values have no 128 of padding.


@triton.jit
def columns(i: tl.constexpr, Z: tl.constexpr):
    """Those of a piece, and which of them are real."""
    col = i * Z.CHUNK + tl.arange(0, Z.CHUNK)
    return col, col < Z.W


@triton.jit
def load_rows(ptr, start, alive, Z: tl.constexpr):
    """Rows that begin at ``start``, in float32, 0 past W and in rows not alive."""
    PIECES: tl.constexpr = Z.PIECES
    found = ()
    for i in tl.static_range(PIECES):
        col, real = columns(i, Z)
        found = found + (load(ptr + start[:, None], col[None, :], alive[:, None] & real[None, :]),)
    return found


@triton.jit
def load_vector(ptr, Z: tl.constexpr):
    """W values, in pieces of [1, CHUNK]; 0 with ptr None."""
    PIECES: tl.constexpr = Z.PIECES
    found = ()
    for i in tl.static_range(PIECES):
        col, real = columns(i, Z)
        found = found + (load(ptr, col, real)[None, :],)
    return found


@triton.jit
def store_rows(ptr, start, alive, x, Z: tl.constexpr):
    """Nothing with ptr None."""
    PIECES: tl.constexpr = Z.PIECES
    for i in tl.static_range(PIECES):
        col, real = columns(i, Z)
        if ptr is not None:
            tl.store(ptr + start[:, None] + col[None, :], x[i].to(Z.DTYPE), mask=alive[:, None] & real[None, :])


@triton.jit
def plus(x, y, Z: tl.constexpr):
    """x + y, piece by piece."""
    PIECES: tl.constexpr = Z.PIECES
    found = ()
    for i in tl.static_range(PIECES):
        found = found + (x[i] + y[i],)
    return found


@triton.jit
def plus_product(total, x, y, Z: tl.constexpr):
    """total + x · y, piece by piece."""
    PIECES: tl.constexpr = Z.PIECES
    found = ()
    for i in tl.static_range(PIECES):
        found = found + (x[i] * y[i] + total[i],)
    return found


@triton.jit
def sums_of_rows(x, y, Z: tl.constexpr):
    """[BLOCK]: of x, and of x · y."""
    PIECES: tl.constexpr = Z.PIECES
    plain, weighted = x[0], x[0] * y[0]
    for i in tl.static_range(1, PIECES):
        plain += x[i]
        weighted += x[i] * y[i]
    return tl.sum(plain, 1), tl.sum(weighted, 1)


@triton.jit
def _centred(x, Z: tl.constexpr):
    """x less the mean of its rows, 0 past W; by a rounded division, as ``centred`` says."""
    PIECES: tl.constexpr = Z.PIECES
    total = x[0]
    for i in tl.static_range(1, PIECES):
        total += x[i]
    mean = tl.div_rn(tl.sum(total, 1), tl.full((Z.BLOCK,), Z.W, tl.float32))
    found = ()
    for i in tl.static_range(PIECES):
        _, real = columns(i, Z)
        found = found + (tl.where(real[None, :], x[i] - mean[:, None], 0.0),)
    return found


@triton.jit
def standardised(x, eps, Z: tl.constexpr):
    """Of rows that are 0 past W x̂, there 0, too, and 1/σ [BLOCK]; in float32 they are centred twice."""
    PIECES: tl.constexpr = Z.PIECES
    x = _centred(x, Z)
    if Z.EXACT:
        x = _centred(x, Z)
    total = x[0] * x[0]
    for i in tl.static_range(1, PIECES):
        total += x[i] * x[i]
    rstd = tl.rsqrt(tl.sum(total, 1) * (1.0 / Z.W) + eps)
    found = ()
    for i in tl.static_range(PIECES):
        found = found + (x[i] * rstd[:, None],)
    return found, rstd


@triton.jit
def scaled(dy, scale_ptr, patch, n_patches):
    """The gradient of a branch from that of its scaled result."""
    if scale_ptr is None:
        return dy
    else:
        scale = tl.load(scale_ptr + patch, mask=patch < n_patches, other=0.0)
        return (dy.to(tl.float32) * scale[:, None]).to(dy.dtype)


@triton.jit
def accumulators(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """A tuple of COUNT sums."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((COLUMNS, ROWS) if TRANSPOSED else (ROWS, COLUMNS), tl.float32),)
    return sums


@triton.jit
def _factor(x, Z: tl.constexpr):
    """x as a product takes it: rounded to TF32, where that is asked, because the instructions cut; half the error, no bias."""
    if Z.PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, bits + 0x1000, bits).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def dot(a, b, Z: tl.constexpr, total=None):
    """a·b, or total + a·b as one running sum."""
    return tl.dot(_factor(a, Z), _factor(b, Z), total, input_precision=Z.PRECISION)


@triton.jit
def dot_onto(total, a, b, Z: tl.constexpr):
    """total + a·b, for sums that run over many tiles.

    In float32 the product is summed by itself, so that a large total is rounded once a tile, not once a row. Where
    max_num_imprecise_acc is 0, as it is by itself, the compiler makes one sum of both again; else it means nothing here.
    """
    if Z.EXACT:
        return total + tl.dot(_factor(a, Z), _factor(b, Z), input_precision=Z.PRECISION, max_num_imprecise_acc=1)
    else:
        return dot(a, b, Z, total)


@triton.jit
def copied(copies):
    """All programs of a launch make copies, each an ``operation.Copy``, their sources of one dtype, and what they are copied to
    of one. They take turns at blocks of them, whose order is that of the copies."""
    blocks = 0
    for i in tl.static_range(len(copies)):
        blocks += tl.cdiv(copies[i].n, COPIED)
    for turn in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block, source_ptr, ptr, n = turn, copies[0].source, copies[0].ptr, copies[0].n
        for i in tl.static_range(1, len(copies)):
            left = block - tl.cdiv(n, COPIED)  # below 0, too, for what comes behind the one that is sought
            there, copy = left >= 0, copies[i]
            block, n = tl.where(there, left, block), tl.where(there, copy.n, n)
            source_ptr, ptr = tl.where(there, copy.source, source_ptr), tl.where(there, copy.ptr, ptr)
        at = tl.cast(block, tl.int64) * COPIED + tl.arange(0, COPIED)
        tl.store(ptr + at, tl.load(source_ptr + at, mask=at < n).to(ptr.dtype.element_ty), mask=at < n)
