"""Pieces that several kernels use: fast elementary functions, LayerNorm of a tile, and how a launch is described.

Approximations, each with its largest error; all far below one rounding of float16 and bfloat16, and used (FAST) only when
the kernel computes in those, compiled for an NVIDIA GPU. In float32 and in the interpreter the plain forms run.

- exp2: ex2.approx, 2 units in the last place of float32 over the whole range (PTX ISA), denormals flushed to 0.
- reciprocal: rcp.approx, 1 unit in the last place.
- gelu: x·(1 + tanh u)/2 with u = x·(0.7975079 + 0.0370056 x² − 0.0003515 x⁴), x² clamped at 36: 2.6e-5 against the erf form,
  and tanh.approx, 2^-11 relative (PTX ISA), on top.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Launch(NamedTuple):
    """One specialisation of a kernel: what the launcher starts and what benchmarks/static_cost.py compiles.

    ``pointers`` maps each pointer argument to its element type in Triton's spelling ("bf16", "fp32", …), ``integers`` names the
    run-time integers (i32), ``floats`` the run-time float32s, ``constants`` holds the constexprs; ``patches``: how many
    patches one turn of a program's main loop completes; where that loop walks over parts of patches instead, how many the
    program completes in ``turns`` of it. ``mma_arch``: from sm_90 on, the older
    architecture whose matrix instructions are taken.
    """

    kernel: Any
    pointers: dict[str, str]
    integers: tuple[str, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    patches: float
    floats: tuple[str, ...] = ()
    turns: int = 1
    mma_arch: str | None = None


@triton.jit
def _asm(x, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    return _asm(x, "ex2.approx.ftz.f32 $0, $1;") if FAST else tl.exp2(x)


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
def centred(x, real, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """x − mean of each row of SIZE values, 0 in the columns that are not ``real``, with which x is zero.

    EXACT, for float32 input: the rounding of a large mean is seen there, so what it left is taken off, too.
    """
    x = tl.where(real[None, :], x - (tl.sum(x, 1) * (1.0 / SIZE))[:, None], 0.0)
    if EXACT:
        x = tl.where(real[None, :], x - (tl.sum(x, 1) * (1.0 / SIZE))[:, None], 0.0)
    return x


@triton.jit
def _factor(x, PRECISION: tl.constexpr):
    """x as a product takes it: rounded to TF32, where that is asked, because the instructions cut; half the error, no bias."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, bits + 0x1000, bits).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, total=None):
    """a·b, or total + a·b as one running sum."""
    return tl.dot(_factor(a, PRECISION), _factor(b, PRECISION), total, input_precision=PRECISION)


@triton.jit
def dot_onto(total, a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a·b, for sums that run over many turns.

    EXACT, for float32 input: the product is summed by itself, so that a large total is rounded once a turn, not once a row.
    Where max_num_imprecise_acc is 0, as it is by itself, the compiler makes one sum of both again; else it means nothing here.
    """
    if EXACT:
        a = _factor(a, PRECISION)
        b = _factor(b, PRECISION)
        return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return dot(a, b, PRECISION, total)
