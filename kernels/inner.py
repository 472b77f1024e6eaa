"""inner: the inner transformer of every patch in one launch.

    x = pixel + attn_scale · proj(softmax(q kᵀ / √D) v),   q, k, v = linear(LN₁ pixel), H heads of D channels
    y = x + mlp_scale · fc2(GELU(fc1(LN₂ x)))

Shapes: pixel and result (P, S, C) contiguous, weights in nn.Linear's layout, in the pixels' dtype or float32. Bytes moved:
the pixels read once, written once; the weights stay on the chip over many patches. Statistics, softmax and accumulation are
float32.

A program takes G patches of T rows a turn (T: S, or for other S the power of two from 16 on, the rest masked). What keeps the
instructions few:

- LayerNorm's scale and shift are folded into the weights that follow, once per program; shift and bias ride in the row of a
  constant-one padding channel (hence C_PAD > C).
- x − mean is a matrix product: x·(C·I − 11ᵀ) is C times that, exact up to float32 accumulation, and has no reductions. So
  is x itself (x·I), which is the cheapest way to have it as an accumulator.
- HG heads are one product of W = HG·D_PAD channels: keys and values stacked below one another, each masked to its head.
- Softmax is normalised after P·V, by P times a matrix of ones, which has each head's sum where the head's output is.
- GELU in bfloat16 runs on pairs of float16, which have three bits more than the rounding to bfloat16 leaves.
- Columns of padding past three quarters of C_PAD are cut off the products where that helps (TRIM: TNT-B).

Backward: two launches that start again from the pixels. The first computes the attention once more and does the MLP's half, the
second updates its result by the attention's half. Every program keeps the sums of its weights' gradients in float32 registers
and writes them once; they are added in one reduction, so the same input gives the same bits. The sums belong to the weights
with LayerNorm folded in; ``_unfold`` takes LayerNorm's scale and shift out of them again.

The products are synchronous mma instructions everywhere: two warps get them by themselves, four by compiling Hopper's code as
Ampere's (Launch.mma_arch). The asynchronous ones with a left operand in registers, which the compiler would choose, are
known to come out wrong (triton issues 9433, 11781), and are no fewer instructions here.
"""

from collections.abc import Iterable, Mapping
from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast import reference
from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import (
    DTYPES,
    MOST_ROWS,
    Argument,
    Description,
    is_fast,
    precision,
    programs,
    recomputed,
    register,
    start,
    wrong_eps,
    zeros_for_none,
)
from tnt_fast.kernels.tile import Launch, centred, dot, dot_onto, exp2, gelu, reciprocal, tanh

# (C_PAD, half precision): (rows of a turn, warps, hidden channels at once, stages, programs a multiprocessor, mma_arch).
# Chosen by static cost for sm_90 on 2026-11-22, not yet timed on a GPU. TNT-Ti, S and B have C_PAD 16, 32 and 64.
CONFIGS = {
    (16, True): (64, 2, 16, 1, 7, None),
    (32, True): (32, 2, 32, 2, 7, None),
    (64, True): (64, 4, 32, 1, 2, "sm80"),
    (128, True): (16, 4, 32, 1, 2, "sm80"),
    (16, False): (16, 2, 16, 1, 4, None),
    (32, False): (16, 4, 16, 1, 4, None),
    (64, False): (16, 4, 16, 1, 2, None),
    (128, False): (16, 4, 16, 1, 1, None),
}

# The same of the two halves of the backward; TNT has no C_PAD of 128 but at a stride of 8, which PyTorch does.
MLP_CONFIGS = {
    (16, True): (32, 2, 16, 1, 5, None),
    (32, True): (32, 2, 32, 1, 4, None),
    (64, True): (64, 4, 32, 1, 2, "sm80"),
    (16, False): (16, 2, 16, 1, 4, None),
    (32, False): (16, 4, 16, 1, 2, "sm80"),
    (64, False): (16, 4, 16, 1, 1, "sm80"),
}
ATTENTION_CONFIGS = {
    (16, True): (32, 2, 0, 1, 5, None),
    (32, True): (32, 2, 0, 1, 4, None),
    (64, True): (64, 4, 0, 2, 2, "sm80"),
    (16, False): (16, 2, 0, 1, 4, None),
    (32, False): (16, 4, 0, 1, 2, "sm80"),
    (64, False): (16, 4, 0, 1, 1, "sm80"),
}


@triton.jit
def _gelu(x, FAST: tl.constexpr, PAIRS: tl.constexpr):
    """GELU; with PAIRS GELU(8x)/4 in float16: the caller scales the weights around it by 1/8 and 4, which is exact.

    The polynomial of tile.gelu in x²/64, which the saturating product clamps at 1. Largest error 3e-3 for |8x| below 4, where
    rounding the exact value to bfloat16 makes 7.8e-3. |x| has to stay below 32752 (see _halvings), so that 2x is finite.
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
def _exponent(x):
    """floor(log2 x) of normal float32 x ≥ 0; −127 of smaller ones, 128 of infinity and NaN."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _power(exponent):
    """2 to an integer exponent between −126 and 127, to which it is clamped."""
    return ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rows(weight_ptr, gamma_ptr, beta_ptr, ch, out, used, C: tl.constexpr):
    """Rows ch of a weight in nn.Linear's layout, transposed; LayerNorm's scale on them, and what its shift gives."""
    real = ch < C
    gamma = tl.load(gamma_ptr + ch, mask=real, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + ch, mask=real, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + out[None, :] * C + ch[:, None], mask=used[None, :] & real[:, None], other=0.0).to(tl.float32)
    return w * gamma[:, None], tl.sum(w * beta[:, None], 0)


@triton.jit
def _folded(weight_ptr, gamma_ptr, beta_ptr, bias_ptr, out, used, HAS_BIAS: tl.constexpr, UNIT, C: tl.constexpr,
            C_PAD: tl.constexpr, TRIM: tl.constexpr, CENTRED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """UNIT·(rows C of a weight and bias after LayerNorm): a tuple of [C_PAD, len(out)], row C for the constant one.

    With TRIM the last quarter of the rows is left out, and the rest comes in two parts, as _columns has it. With CENTRED, for
    the backward, which has no TRIM, the mean over the channels is taken off: the same product with a normalised tile, whose
    channels sum to 0; the product of a gradient with its transpose then has no mean, as LayerNorm's backward wants it.
    """
    ch = tl.arange(0, C_PAD // 2 if TRIM else C_PAD)
    w, shift = _rows(weight_ptr, gamma_ptr, beta_ptr, ch, out, used, C)
    if HAS_BIAS:
        shift += tl.load(bias_ptr + out, mask=used, other=0.0).to(tl.float32)
    if TRIM:
        more = C_PAD // 2 + tl.arange(0, C_PAD // 4)
        w_more, shift_more = _rows(weight_ptr, gamma_ptr, beta_ptr, more, out, used, C)
        shift += shift_more
        w = tl.where((ch == C)[:, None], shift[None, :], w)
        w_more = tl.where((more == C)[:, None], shift[None, :], w_more)
        return (w * UNIT).to(DTYPE), (w_more * UNIT).to(DTYPE)
    else:
        if CENTRED:
            w = tl.where((ch < C)[:, None], w - (tl.sum(w, 0) * (1.0 / C))[None, :], 0.0)
        return ((tl.where((ch == C)[:, None], shift[None, :], w) * UNIT).to(DTYPE),)


@triton.jit
def _halvings(weight_ptr, gamma_ptr, beta_ptr, bias_ptr, out, used, C: tl.constexpr, C_PAD: tl.constexpr):
    """How often hidden channels have to be halved for float16 (PAIRS): 0, but for weights that allow values above 65536.

    No normalised row is longer than √C, so |hidden| ≤ √C·Σ|weight| + |bias|. What GELU of a halved value, doubled again, is
    off by is 2e-6 of the values that made it necessary.
    """
    w, shift = _rows(weight_ptr, gamma_ptr, beta_ptr, tl.arange(0, C_PAD), out, used, C)
    shift += tl.load(bias_ptr + out, mask=used, other=0.0).to(tl.float32)
    return tl.maximum(_exponent(tl.sum(tl.abs(w), 0) * C**0.5 + tl.abs(shift)) - 15, 0)


@triton.jit
def _mlp_exponent(start, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, gamma_ptr, beta_ptr, C: tl.constexpr,
                  C_PAD: tl.constexpr, MLP: tl.constexpr, SLICE: tl.constexpr):  # fmt: skip
    """Of the largest weight of fc2 for SLICE hidden channels, as PAIRS wants them scaled."""
    ch = tl.arange(0, C_PAD)
    hid = start + tl.arange(0, SLICE)
    used = hid < MLP
    mask = (ch < C)[None, :] & used[:, None]
    fc2 = tl.load(fc2_weight_ptr + ch[None, :] * MLP + hid[:, None], mask=mask, other=0.0).to(tl.float32)
    halvings = _halvings(fc1_weight_ptr, gamma_ptr, beta_ptr, fc1_bias_ptr, hid, used, C, C_PAD)
    return tl.max(_exponent(tl.max(tl.abs(fc2), 1)) + halvings + 2, 0)


@triton.jit
def _mlp_slice(start: tl.constexpr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, gamma_ptr, beta_ptr, raised,
               C: tl.constexpr, C_PAD: tl.constexpr, MLP: tl.constexpr, SLICE: tl.constexpr, TRIM: tl.constexpr,
               PAIRS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The weights of SLICE hidden channels, [C_PAD, SLICE] and [SLICE, C_PAD], scaled as _gelu wants them.

    With PAIRS fc2's are float16, ``raised`` octaves up, so that they are neither too large nor too small for that.
    """
    ch = tl.arange(0, C_PAD)
    hid = start + tl.arange(0, SLICE)
    used = hid < MLP
    at = ch[None, :] * MLP + hid[:, None]
    fc2 = tl.load(fc2_weight_ptr + at, mask=(ch < C)[None, :] & used[:, None], other=0.0).to(tl.float32)
    if PAIRS:
        halvings = _halvings(fc1_weight_ptr, gamma_ptr, beta_ptr, fc1_bias_ptr, hid, used, C, C_PAD)
        unit = _power(-3 - halvings)[None, :]
        fc2 = (fc2 * _power(2 + halvings + raised)[:, None]).to(tl.float16)
    else:
        unit = 1.0
        fc2 = fc2.to(DTYPE)
    fc1 = _folded(fc1_weight_ptr, gamma_ptr, beta_ptr, fc1_bias_ptr, hid, used, True, unit, C, C_PAD, TRIM, False, DTYPE)
    return fc1, fc2


@triton.jit
def _columns(h, M: tl.constexpr, C_PAD: tl.constexpr, TRIM: tl.constexpr):
    """[M, C_PAD] as a tuple; with TRIM the first half and the third quarter of its columns."""
    if TRIM:
        half, rest = tl.split(tl.permute(tl.reshape(h, (M, 2, C_PAD // 2)), (0, 2, 1)))
        quarter, _ = tl.split(tl.permute(tl.reshape(rest, (M, 2, C_PAD // 4)), (0, 2, 1)))
        return half, quarter
    else:
        return (h,)


@triton.jit
def _dot(h, w, PRECISION: tl.constexpr):
    total = dot(h[0], w[0], PRECISION)
    for i in tl.static_range(1, len(w)):
        total = dot(h[i], w[i], PRECISION, total)
    return total


@triton.jit
def _centre(x, real, C: tl.constexpr, EXACT: tl.constexpr):
    """x − mean, 0 in padding channels."""
    return centred(tl.where(real[None, :], x, 0.0), real, C, EXACT)  # known zeros: the compiler drops what computed them


@triton.jit
def _normalise(centred, one, eps, C: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr):
    """UNIT·(x − mean) -> (x − mean)/σ, with the constant one."""
    var = tl.sum(centred * centred, 1) * (1.0 / (C * UNIT * UNIT))
    return tl.where(one[None, :], 1.0, centred * (tl.rsqrt(var + eps) * (1.0 / UNIT))[:, None]).to(DTYPE)


@triton.jit
def _head_weights(head, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr,
                  proj_weight_ptr, HAS_BIAS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, HEADS: tl.constexpr,
                  D: tl.constexpr, D_PAD: tl.constexpr, HG: tl.constexpr, TRIM: tl.constexpr, CENTRED: tl.constexpr,
                  DTYPE: tl.constexpr):  # fmt: skip
    """Queries' (log2 e/√D, for exp2), keys' and values' weights of HG heads, and the projection's, [W, C_PAD]."""
    ch = tl.arange(0, C_PAD)
    lane = tl.arange(0, HG * D_PAD)
    out = (head + lane // D_PAD) * D + lane % D_PAD  # the channel of the weights that lane stands for
    used = (lane % D_PAD < D) & (head + lane // D_PAD < HEADS)
    wq = _folded(
        qk_weight_ptr, norm1_weight_ptr, norm1_bias_ptr, qk_bias_ptr, out, used, HAS_BIAS, 1.4426950408889634 / D**0.5, C,
        C_PAD, TRIM, CENTRED, DTYPE,
    )  # fmt: skip
    wk = _folded(
        qk_weight_ptr, norm1_weight_ptr, norm1_bias_ptr, qk_bias_ptr, C + out, used, HAS_BIAS, 1.0, C, C_PAD, TRIM, CENTRED,
        DTYPE,
    )  # fmt: skip
    wv = _folded(
        v_weight_ptr, norm1_weight_ptr, norm1_bias_ptr, v_bias_ptr, out, used, HAS_BIAS, 1.0, C, C_PAD, TRIM, CENTRED, DTYPE
    )
    at = ch[None, :] * C + out[:, None]
    wp = tl.load(proj_weight_ptr + at, mask=(ch < C)[None, :] & used[:, None], other=0.0).to(DTYPE)
    return wq, wk, wv, wp


@triton.jit
def _heads(h, wq, wk, wv, own, ones, S: tl.constexpr, T: tl.constexpr, G: tl.constexpr, HG: tl.constexpr, W: tl.constexpr,
           FAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Attention of HG heads: q [G, T, W], k and v [G, HG·T, W] stacked, P before its normalisation [G, T, HG·T] in float32,
    the output and the reciprocal of P's sums [G, T, W] in float32."""
    DTYPE: tl.constexpr = h[0].dtype
    q = tl.reshape(_dot(h, wq, PRECISION).to(DTYPE), (G, T, W))
    k = tl.reshape(_dot(h, wk, PRECISION).to(DTYPE), (G, 1, T, W))
    v = tl.reshape(_dot(h, wv, PRECISION).to(DTYPE), (G, 1, T, W))
    k = tl.reshape(tl.where(own, k, 0.0).to(DTYPE), (G, HG * T, W))
    v = tl.reshape(tl.where(own, v, 0.0).to(DTYPE), (G, HG * T, W))
    s = tl.reshape(dot(q, tl.permute(k, (0, 2, 1)), PRECISION), (G, T, HG, T))
    if T > S:
        s = tl.where((tl.arange(0, T) < S)[None, None, None, :], s, float("-inf"))
    p = tl.reshape(exp2(s - tl.max(s, 3)[:, :, :, None], FAST), (G, T, HG * T))  # the largest is 1, to the bit
    rounded = p.to(DTYPE)
    o = dot(rounded, v, PRECISION)
    inverse = reciprocal(dot(rounded, ones, PRECISION), FAST)
    return q, k, v, p, o * inverse, inverse


@triton.jit
def _own(G: tl.constexpr, T: tl.constexpr, HG: tl.constexpr, D_PAD: tl.constexpr, DTYPE: tl.constexpr):
    """Which channels are a head's own, [1, HG, 1, W]; and as ones below one another for every row, [G, HG·T, W]."""
    W: tl.constexpr = HG * D_PAD
    own = (tl.arange(0, W)[None, :] // D_PAD == tl.arange(0, HG)[:, None])[None, :, None, :]
    if HG == 1:
        return own, tl.full((G, T, W), 1.0, DTYPE)  # a constant needs no registers
    else:
        ones = tl.broadcast_to(tl.where(own, 1.0, 0.0), (G, HG, T, W))
        return own, tl.reshape(ones, (G, HG * T, W)).to(DTYPE)


@triton.jit
def _inner_fwd_kernel(
    x_ptr, y_ptr, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr, proj_weight_ptr,
    proj_bias_ptr, norm2_weight_ptr, norm2_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr,
    attn_scale_ptr, mlp_scale_ptr, n_patches, eps,
    C: tl.constexpr, C_PAD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HG: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, MLP: tl.constexpr, SLICE: tl.constexpr, G: tl.constexpr,
    HAS_QKV_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP_HEADS: tl.constexpr, RESIDENT: tl.constexpr,
    FAST: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    APART: tl.constexpr = HAS_SCALE or EXACT  # float32 would see what is summed onto a large x rounded many times
    BY_PRODUCT: tl.constexpr = RESIDENT and not EXACT  # float32 products are slow
    UNIT: tl.constexpr = C / C_PAD  # a power of two apart, what the products make of x − mean
    M: tl.constexpr = G * T
    W: tl.constexpr = HG * D_PAD
    TRIM: tl.constexpr = C_PAD >= 64 and 4 * (C + 1) <= 3 * C_PAD
    ch = tl.arange(0, C_PAD)
    real = ch < C
    one = ch == C

    heads = ()
    if KEEP_HEADS:
        for head in tl.static_range(0, HEADS, HG):
            heads = heads + (
                _head_weights(
                    head, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr,
                    proj_weight_ptr, HAS_QKV_BIAS, C, C_PAD, HEADS, D, D_PAD, HG, TRIM, False, DTYPE,
                ),
            )  # fmt: skip
    proj_bias = tl.load(proj_bias_ptr + ch, mask=real, other=0.0).to(tl.float32)
    # octaves that PAIRS raises fc2's weights by, and with them the sum that their product is added to
    raised, up, down = 0, 1.0, 1.0
    if PAIRS:
        top = -127
        for start in range(0, MLP, SLICE):  # not unrolled, for its registers
            exponent = _mlp_exponent(
                start, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, norm2_weight_ptr, norm2_bias_ptr, C, C_PAD, MLP, SLICE
            )
            top = tl.maximum(top, exponent)
        raised = tl.minimum(14 - top, 0) + tl.minimum(tl.maximum(-6 - top, 0), 60)
        raised = tl.where(top > -64, raised, 0)  # nothing of those is seen
        up, down = _power(raised), _power(-raised)
    w1, w2 = (), ()
    if RESIDENT:
        for start in tl.static_range(0, MLP, SLICE):
            fc1, fc2 = _mlp_slice(
                start,
                fc1_weight_ptr,
                fc1_bias_ptr,
                fc2_weight_ptr,
                norm2_weight_ptr,
                norm2_bias_ptr,
                raised,
                C,
                C_PAD,
                MLP,
                SLICE,
                TRIM,
                PAIRS,
                DTYPE,
            )
            w1 = w1 + (fc1,)
            w2 = w2 + (fc2,)
    fc2_bias = tl.load(fc2_bias_ptr + ch, mask=real, other=0.0).to(tl.float32) * up

    diagonal = (ch[:, None] == ch[None, :]) & real[:, None]
    identity = tl.where(diagonal, 1.0, 0.0).to(DTYPE)
    centring = tl.where(real[:, None] & real[None, :], tl.where(diagonal, C - 1.0, -1.0) / C_PAD, 0.0).to(DTYPE)
    own, ones = _own(G, T, HG, D_PAD, DTYPE)

    row = tl.arange(0, M)
    patch, token = row // T, row % T
    offset = (row if T == S else patch * S + token)[:, None] * C + ch[None, :]
    for turn in range(tl.program_id(0), tl.cdiv(n_patches, G), tl.num_programs(0)):
        first = tl.cast(turn, tl.int64) * (G * S * C)
        live = (row < tl.maximum(tl.minimum(n_patches - turn * G, G), 0) * T)[:, None] & real[None, :]
        if T > S:
            live = live & (token < S)[:, None]
        tokens = tl.load(x_ptr + first + offset, mask=live, other=0.0)  # [M, C_PAD]
        if BY_PRODUCT:
            centred = tl.where(real[None, :], tl.dot(tokens, centring), 0.0)
            h = _normalise(centred, one, eps, C, UNIT, DTYPE)
            x = tl.dot(tokens, identity)
        else:
            x = tokens.to(tl.float32)
            h = _normalise(_centre(x, real, C, EXACT), one, eps, C, 1, DTYPE)

        if T > S:  # without an eps, rows of padding are not finite, and keys and values of their patch
            h = tl.where((token < S)[:, None], h, 0.0).to(DTYPE)
        h = _columns(h, M, C_PAD, TRIM)
        total = tl.zeros((M, C_PAD), tl.float32) if APART else x
        total += proj_bias[None, :]
        if KEEP_HEADS:
            for i in tl.static_range(len(heads)):
                wq, wk, wv, wp = heads[i]
                _, _, _, _, o, _ = _heads(h, wq, wk, wv, own, ones, S, T, G, HG, W, FAST, PRECISION)
                total = dot(tl.reshape(o.to(DTYPE), (M, W)), wp, PRECISION, total)
        else:
            for head in range(0, HEADS, HG):  # not unrolled, there may be many
                wq, wk, wv, wp = _head_weights(
                    head, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr,
                    proj_weight_ptr, HAS_QKV_BIAS, C, C_PAD, HEADS, D, D_PAD, HG, TRIM, False, DTYPE,
                )  # fmt: skip
                _, _, _, _, o, _ = _heads(h, wq, wk, wv, own, ones, S, T, G, HG, W, FAST, PRECISION)
                total = dot(tl.reshape(o.to(DTYPE), (M, W)), wp, PRECISION, total)
        if HAS_SCALE:
            mine = turn * G + patch
            x += total * tl.load(attn_scale_ptr + mine, mask=mine < n_patches, other=0.0)[:, None]
        else:
            x = x + total if APART else total

        h = _normalise(_centre(x, real, C, EXACT), one, eps, C, 1, DTYPE)
        h = _columns(h, M, C_PAD, TRIM)
        total = tl.zeros((M, C_PAD), tl.float32) if APART else x * up
        total += fc2_bias[None, :]
        for start in tl.static_range(0, MLP, SLICE):
            if RESIDENT:
                fc1, fc2 = w1[start // SLICE], w2[start // SLICE]
            else:
                fc1, fc2 = _mlp_slice(
                    start,
                    fc1_weight_ptr,
                    fc1_bias_ptr,
                    fc2_weight_ptr,
                    norm2_weight_ptr,
                    norm2_bias_ptr,
                    raised,
                    C,
                    C_PAD,
                    MLP,
                    SLICE,
                    TRIM,
                    PAIRS,
                    DTYPE,
                )
            hidden = _gelu(_dot(h, fc1, PRECISION), FAST, PAIRS).to(fc2.dtype)  # [M, SLICE]
            total = dot(hidden, fc2, PRECISION, total)
        if HAS_SCALE:
            mine = turn * G + patch
            x += total * (tl.load(mlp_scale_ptr + mine, mask=mine < n_patches, other=0.0) * down)[:, None]
        else:
            x = x + total if APART else total * down
        tl.store(y_ptr + first + offset, tl.where(real[None, :], x, 0.0).to(DTYPE), mask=live)


@triton.jit
def _standardise(centred, alive, eps, C: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr):
    """UNIT·(x − mean) -> (x − mean)/σ with the constant one in channel C, and 1/σ of every row.

    Both are 0 in rows that are not alive, and so is all that the sums get of them, whatever eps is.
    """
    ch = tl.arange(0, centred.shape[1])
    var = tl.sum(centred * centred, 1) * (1.0 / (C * UNIT * UNIT))
    inverse = tl.where(alive, tl.rsqrt(var + eps), 0.0)
    return tl.where((ch == C)[None, :], 1.0, centred * (inverse * (1.0 / UNIT))[:, None]).to(DTYPE), inverse


@triton.jit
def _norm_gradient(dh, h, inverse, real, C: tl.constexpr):
    """LayerNorm's backward; dh, the gradient of its result before scale and shift, has no mean already."""
    dh = tl.where(real[None, :], dh, 0.0)
    along = tl.sum(dh * h.to(tl.float32), 1) * (1.0 / C)
    return (dh - h.to(tl.float32) * along[:, None]) * inverse[:, None]


@triton.jit
def _gelu_gradient(x, da, FAST: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr):
    """GELU(x), and its derivative times da; with PAIRS GELU(8x)/4 and twice the derivative at 8x times da.

    The polynomial of tile.gelu and its derivative. Pairs of float16 as in _gelu, but for the product with da, which may be
    too small for them. x·(1 − t²) is of an x clamped where 1 − t² is 0, but for what tanh.approx may be off there.
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
    elif FAST:
        x2 = tl.minimum(x * x, 36.0)
        t = tanh(x * (0.7975079 + x2 * (0.0370056 - 0.0003515 * x2)))
        half = 0.5 * x
        slope = 0.5 * t + 0.5 + (half - half * t * t) * (0.7975079 + x2 * (0.1110168 - 0.0017575 * x2))
        return (half * t + half).to(DTYPE), (da * slope).to(DTYPE)
    elif PAIRS:
        value, slope = _gelu_gradient(8.0 * x, 2.0 * da, FAST, False, tl.float32)
        return (value * 0.25).to(DTYPE), slope.to(DTYPE)
    else:
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = phi + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
        return (x * phi).to(DTYPE), (da * slope).to(DTYPE)


@triton.jit
def _mlp_units(hid, used, fc1_weight_ptr, gamma_ptr, beta_ptr, fc1_bias_ptr, C: tl.constexpr, C_PAD: tl.constexpr,
               SLICE: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """What _gelu_gradient wants fc1 and fc2 multiplied by, [1, SLICE] each; their gradients then make up for it."""
    if PAIRS:
        halvings = _halvings(fc1_weight_ptr, gamma_ptr, beta_ptr, fc1_bias_ptr, hid, used, C, C_PAD)
        return _power(-3 - halvings)[None, :], _power(2 + halvings)[None, :]
    else:
        return tl.full((1, SLICE), 1.0, tl.float32), tl.full((1, SLICE), 1.0, tl.float32)


@triton.jit
def _inner_bwd_mlp_kernel(
    x_ptr, dy_ptr, dx_ptr, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr,
    proj_weight_ptr, proj_bias_ptr, norm2_weight_ptr, norm2_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
    attn_scale_ptr, mlp_scale_ptr, sums_ptr, n_patches, eps,
    C: tl.constexpr, C_PAD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HG: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, MLP: tl.constexpr, SLICE: tl.constexpr, G: tl.constexpr,
    HAS_QKV_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, FAST: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dx = gradient of what comes before the MLP; the sums a program: fc1, fc2 [2, C_PAD, HIDDEN], fc2's bias [C_PAD].

    All sums have the channels as their rows: Triton gives every warp rows of its own, and would do fewer rows several times.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    APART: tl.constexpr = HAS_SCALE or EXACT
    UNIT: tl.constexpr = C / C_PAD
    M: tl.constexpr = G * T
    W: tl.constexpr = HG * D_PAD
    ch = tl.arange(0, C_PAD)
    real = ch < C

    heads = ()
    for head in tl.static_range(0, HEADS, HG):
        heads = heads + (
            _head_weights(
                head, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr,
                proj_weight_ptr, HAS_QKV_BIAS, C, C_PAD, HEADS, D, D_PAD, HG, False, True, DTYPE,
            ),
        )  # fmt: skip
    proj_bias = tl.load(proj_bias_ptr + ch, mask=real, other=0.0).to(tl.float32)
    w1, w2, g1, g2 = (), (), (), ()
    for base in tl.static_range(0, MLP, SLICE):
        hid = base + tl.arange(0, SLICE)
        used = hid < MLP
        unit, out = _mlp_units(
            hid, used, fc1_weight_ptr, norm2_weight_ptr, norm2_bias_ptr, fc1_bias_ptr, C, C_PAD, SLICE, PAIRS
        )
        fc1 = _folded(
            fc1_weight_ptr, norm2_weight_ptr, norm2_bias_ptr, fc1_bias_ptr, hid, used, True, unit, C, C_PAD, False, True, DTYPE
        )
        at = ch[:, None] * MLP + hid[None, :]
        fc2 = tl.load(fc2_weight_ptr + at, mask=real[:, None] & used[None, :], other=0.0).to(tl.float32)
        w1 = w1 + fc1
        w2 = w2 + ((fc2 * out).to(DTYPE),)  # [C_PAD, SLICE]
        g1 = g1 + (tl.zeros((C_PAD, SLICE), tl.float32),)
        g2 = g2 + (tl.zeros((C_PAD, SLICE), tl.float32),)
    gb = tl.zeros((C_PAD, 16), tl.float32)
    diagonal = (ch[:, None] == ch[None, :]) & real[:, None]
    identity = tl.where(diagonal, 1.0, 0.0).to(DTYPE)
    negative = tl.where(diagonal, -1.0, 0.0).to(DTYPE)  # one matrix used twice would be kept in registers
    centring = tl.where(real[:, None] & real[None, :], tl.where(diagonal, C - 1.0, -1.0) / C_PAD, 0.0).to(DTYPE)
    own, ones = _own(G, T, HG, D_PAD, DTYPE)

    row = tl.arange(0, M)
    patch, token = row // T, row % T
    offset = (row if T == S else patch * S + token)[:, None] * C + ch[None, :]
    for turn in range(tl.program_id(0), tl.cdiv(n_patches, G), tl.num_programs(0)):
        first = tl.cast(turn, tl.int64) * (G * S * C)
        alive = patch < n_patches - turn * G
        if T > S:
            alive = alive & (token < S)
        live = alive[:, None] & real[None, :]
        tokens = tl.load(x_ptr + first + offset, mask=live, other=0.0)  # [M, C_PAD]
        dy = tl.load(dy_ptr + first + offset, mask=live, other=0.0)
        if not EXACT:
            centred = tl.where(real[None, :], tl.dot(tokens, centring), 0.0)
            h, _ = _standardise(centred, alive, eps, C, UNIT, DTYPE)
            x = tl.dot(tokens, identity)
        else:
            x = tokens.to(tl.float32)
            h, _ = _standardise(_centre(x, real, C, EXACT), alive, eps, C, 1, DTYPE)
        total = tl.zeros((M, C_PAD), tl.float32) if APART else x
        total += proj_bias[None, :]
        for i in tl.static_range(len(heads)):
            wq, wk, wv, wp = heads[i]
            _, _, _, _, o, _ = _heads((h,), wq, wk, wv, own, ones, S, T, G, HG, W, FAST, PRECISION)
            total = dot(tl.reshape(o.to(DTYPE), (M, W)), wp, PRECISION, total)
        mine = turn * G + patch
        if HAS_SCALE:
            x += total * tl.load(attn_scale_ptr + mine, mask=mine < n_patches, other=0.0)[:, None]
            scale = tl.load(mlp_scale_ptr + mine, mask=mine < n_patches, other=0.0)
            dz = (dy.to(tl.float32) * scale[:, None]).to(DTYPE)
        else:
            x = x + total if APART else total
            dz = dy

        h, inverse = _standardise(_centre(x, real, C, EXACT), alive, eps, C, 1, DTYPE)
        dh = tl.zeros((M, C_PAD), tl.float32)
        new1, new2 = (), ()
        for i in tl.static_range(len(w1)):
            hidden = dot(h, w1[i], PRECISION)  # [M, SLICE]
            dhidden = dot(dz, w2[i], PRECISION)
            hidden, dhidden = _gelu_gradient(hidden, dhidden, FAST, PAIRS, DTYPE)
            dh = dot(dhidden, tl.trans(w1[i]), PRECISION, dh)
            if NEED_WEIGHTS:
                new1 = new1 + (dot_onto(g1[i], tl.trans(h), dhidden, EXACT, PRECISION),)
                new2 = new2 + (dot_onto(g2[i], tl.trans(dz), hidden, EXACT, PRECISION),)
        if NEED_WEIGHTS:
            g1, g2 = new1, new2
            gb = dot_onto(gb, tl.trans(dz), tl.full((M, 16), 1.0, DTYPE), EXACT, PRECISION)
        dx = _norm_gradient(dh, h, inverse, real, C)
        dx -= tl.dot(dy, negative) if not EXACT else -dy
        tl.store(dx_ptr + first + offset, dx.to(DTYPE), mask=live)

    if NEED_WEIGHTS:
        HIDDEN: tl.constexpr = len(w1) * SLICE
        sums = sums_ptr + tl.cast(tl.program_id(0), tl.int64) * ((2 * HIDDEN + 1) * C_PAD)
        hid = tl.arange(0, SLICE)
        for i in tl.static_range(len(w1)):
            at = ch[:, None] * HIDDEN + (i * SLICE + hid)[None, :]
            unit, out = _mlp_units(
                i * SLICE + hid, i * SLICE + hid < MLP, fc1_weight_ptr, norm2_weight_ptr, norm2_bias_ptr, fc1_bias_ptr, C,
                C_PAD, SLICE, PAIRS,
            )  # fmt: skip
            tl.store(sums + at, g1[i] * unit)
            tl.store(sums + C_PAD * HIDDEN + at, g2[i] * out)
        gb = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], gb, 0.0), 1)  # its columns are alike
        tl.store(sums + 2 * HIDDEN * C_PAD + ch, gb)


@triton.jit
def _inner_bwd_attention_kernel(
    x_ptr, dx_ptr, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr,
    proj_weight_ptr, attn_scale_ptr, sums_ptr, n_patches, eps,
    C: tl.constexpr, C_PAD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HG: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    HAS_QKV_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dx, in place: from the gradient of what comes behind the attention to that of its input.

    The sums a program: q, k, v and projection [4, C_PAD, LANES], the projection's bias [C_PAD].
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    UNIT: tl.constexpr = C / C_PAD
    M: tl.constexpr = G * T
    W: tl.constexpr = HG * D_PAD
    ch = tl.arange(0, C_PAD)
    real = ch < C

    heads, gq, gk, gv, gp = (), (), (), (), ()
    for head in tl.static_range(0, HEADS, HG):
        heads = heads + (
            _head_weights(
                head, norm1_weight_ptr, norm1_bias_ptr, qk_weight_ptr, qk_bias_ptr, v_weight_ptr, v_bias_ptr,
                proj_weight_ptr, HAS_QKV_BIAS, C, C_PAD, HEADS, D, D_PAD, HG, False, True, DTYPE,
            ),
        )  # fmt: skip
        gq = gq + (tl.zeros((C_PAD, W), tl.float32),)
        gk = gk + (tl.zeros((C_PAD, W), tl.float32),)
        gv = gv + (tl.zeros((C_PAD, W), tl.float32),)
        gp = gp + (tl.zeros((C_PAD, W), tl.float32),)
    gb = tl.zeros((C_PAD, 16), tl.float32)
    diagonal = (ch[:, None] == ch[None, :]) & real[:, None]
    identity = tl.where(diagonal, 1.0, 0.0).to(DTYPE)
    centring = tl.where(real[:, None] & real[None, :], tl.where(diagonal, C - 1.0, -1.0) / C_PAD, 0.0).to(DTYPE)
    own, ones = _own(G, T, HG, D_PAD, DTYPE)

    row = tl.arange(0, M)
    patch, token = row // T, row % T
    offset = (row if T == S else patch * S + token)[:, None] * C + ch[None, :]
    for turn in range(tl.program_id(0), tl.cdiv(n_patches, G), tl.num_programs(0)):
        first = tl.cast(turn, tl.int64) * (G * S * C)
        alive = patch < n_patches - turn * G
        if T > S:
            alive = alive & (token < S)
        live = alive[:, None] & real[None, :]
        tokens = tl.load(x_ptr + first + offset, mask=live, other=0.0)  # [M, C_PAD]
        dy = tl.load(dx_ptr + first + offset, mask=live, other=0.0)
        if not EXACT:
            centred = tl.where(real[None, :], tl.dot(tokens, centring), 0.0)
            h, inverse = _standardise(centred, alive, eps, C, UNIT, DTYPE)
        else:
            h, inverse = _standardise(_centre(tokens.to(tl.float32), real, C, EXACT), alive, eps, C, 1, DTYPE)
        if HAS_SCALE:
            mine = turn * G + patch
            scale = tl.load(attn_scale_ptr + mine, mask=mine < n_patches, other=0.0)
            dz = (dy.to(tl.float32) * scale[:, None]).to(DTYPE)
        else:
            dz = dy

        # q is log2 e times as large, for exp2; so are dk and what q and k give to dh. dv is made so, too: then dh and, by the
        # host, the sums are scaled back, which is less than scaling the gradient of every score
        dh = tl.zeros((M, C_PAD), tl.float32)
        newq, newk, newv, newp = (), (), (), ()
        for i in tl.static_range(len(heads)):
            wq, wk, wv, wp = heads[i]
            q, k, v, p, o, sums = _heads((h,), wq, wk, wv, own, ones, S, T, G, HG, W, FAST, PRECISION)
            do = tl.reshape(dot(dz, tl.trans(wp), PRECISION), (G, T, W))
            do = do * sums  # P's normalisation, which P itself then needs nowhere
            do = do.to(DTYPE)
            # dP minus its mean over P, in float32: where P is about 1, the two are large and cancel
            ds = tl.reshape(dot(do, tl.permute(v, (0, 2, 1)), PRECISION), (G, T, HG, T))
            p4 = tl.reshape(p, (G, T, HG, T))
            mean, weight = tl.sum(p4 * ds, 3), tl.sum(p4, 3)
            if EXACT:
                mean = tl.div_rn(mean, weight)
            else:
                near = reciprocal(weight, FAST)
                mean *= near + near * (1.0 - weight * near)  # a Newton step: of 1, the reciprocal is 1, to the bit
            ds = tl.reshape(p4 * (ds - mean[:, :, :, None]), (G, T, HG * T)).to(DTYPE)
            dq = tl.reshape(dot(ds, k, PRECISION).to(DTYPE), (M, W))
            dk = dot(tl.permute(ds, (0, 2, 1)), q, PRECISION)  # [G, HG·T, W]
            dv = dot(tl.permute(p.to(DTYPE), (0, 2, 1)), do, PRECISION)
            dk = tl.sum(tl.where(own, tl.reshape(dk, (G, HG, T, W)), 0.0), 1)
            dv = tl.sum(tl.where(own, tl.reshape(dv, (G, HG, T, W)), 0.0), 1) * 1.4426950408889634
            dk = tl.reshape(dk.to(DTYPE), (M, W))
            dv = tl.reshape(dv.to(DTYPE), (M, W))
            dh = dot(dq, tl.trans(wq[0]), PRECISION, dh)
            dh = dot(dk, tl.trans(wk[0]), PRECISION, dh)
            dh = dot(dv, tl.trans(wv[0]), PRECISION, dh)
            if NEED_WEIGHTS:
                o = tl.reshape(o.to(DTYPE), (M, W))
                newq = newq + (dot_onto(gq[i], tl.trans(h), dq, EXACT, PRECISION),)
                newk = newk + (dot_onto(gk[i], tl.trans(h), dk, EXACT, PRECISION),)
                newv = newv + (dot_onto(gv[i], tl.trans(h), dv, EXACT, PRECISION),)
                newp = newp + (dot_onto(gp[i], tl.trans(dz), o, EXACT, PRECISION),)
        if NEED_WEIGHTS:
            gq, gk, gv, gp = newq, newk, newv, newp
            gb = dot_onto(gb, tl.trans(dz), tl.full((M, 16), 1.0, DTYPE), EXACT, PRECISION)
        dx = _norm_gradient(dh, h, inverse * 0.6931471805599453, real, C)
        dx += tl.dot(dy, identity) if not EXACT else dy
        tl.store(dx_ptr + first + offset, dx.to(DTYPE), mask=live)

    if NEED_WEIGHTS:
        LANES: tl.constexpr = len(heads) * W
        mine = sums_ptr + tl.cast(tl.program_id(0), tl.int64) * ((4 * LANES + 1) * C_PAD)
        lane = tl.arange(0, W)
        for i in tl.static_range(len(heads)):
            at = ch[:, None] * LANES + (i * W + lane)[None, :]
            tl.store(mine + at, gq[i])
            tl.store(mine + C_PAD * LANES + at, gk[i])
            tl.store(mine + 2 * C_PAD * LANES + at, gv[i])
            tl.store(mine + 3 * C_PAD * LANES + at, gp[i])
        gb = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], gb, 0.0), 1)  # its columns are alike
        tl.store(mine + 4 * C_PAD * LANES + ch, gb)


def unsupported(sizes: dict[str, Any]) -> list[str]:
    """Reasons against sizes as ``TNT.sizes()`` gives them; an empty list if the kernel takes them."""
    reasons = []
    if not 1 <= sizes["C"] <= 96:
        reasons.append(f"C={sizes['C']} channels a pixel; accepted: 1 to 96")
    if sizes["C"] // sizes["H"] > 32:
        reasons.append(f"{sizes['C'] // sizes['H']} channels a head; accepted: 1 to 32")
    if not 1 <= sizes["S"] <= 64:
        reasons.append(f"S={sizes['S']} pixels a patch; accepted: 1 to 64")
    if not 1 <= sizes["M"] <= 384:
        reasons.append(f"{sizes['M']} hidden channels of the inner MLP; accepted: 1 to 384")
    return reasons


def _numbers(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The heads, and reasons against what is no number of them, and no eps."""
    heads, reasons = given["num_heads"], wrong_eps(given)
    if not isinstance(heads, int) or heads < 1:
        reasons.append(f"num_heads={heads!r}; accepted: a positive integer that divides C")
    return {"H": heads}, reasons


def _limits(sizes: dict[str, Any]) -> list[str]:
    """Reasons against the sizes of a call, by the letters of ``DESCRIPTION``; P, the patches, may be unknown."""
    if sizes["C"] % sizes["H"]:
        return [f"{sizes['H']} heads do not divide C={sizes['C']}"]
    pixels = sizes.get("P", 0) * sizes["S"]
    many = [f"{pixels} pixels of all patches; accepted: up to {MOST_ROWS}"] if pixels > MOST_ROWS else []
    return unsupported(sizes) + many


DESCRIPTION = Description(
    "inner",
    (
        Argument("pixel", "P S C", activation=True),
        Argument("norm1_weight", "C"), Argument("norm1_bias", "C", optional=True),
        Argument("qk_weight", "2*C C"), Argument("qk_bias", "2*C", optional=True),
        Argument("v_weight", "C C"), Argument("v_bias", "C", optional=True),
        Argument("proj_weight", "C C"), Argument("proj_bias", "C", optional=True),
        Argument("norm2_weight", "C"), Argument("norm2_bias", "C", optional=True),
        Argument("fc1_weight", "M C"), Argument("fc1_bias", "M", optional=True),
        Argument("fc2_weight", "C M"), Argument("fc2_bias", "C", optional=True),
        Argument("attn_scale", "P", optional=True), Argument("mlp_scale", "P", optional=True),
    ),
    _limits,
    numbers=_numbers,
    together=("qk_bias", "v_bias"),
)  # fmt: skip


def gradients_unsupported(sizes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Reasons why PyTorch computes the gradients of sizes that the forward takes: their sums do not fit on the chip."""
    reasons = []
    widest = 31 if dtype == torch.float32 else 63
    if sizes["C"] > widest:
        reasons.append(f"C={sizes['C']} channels a pixel in {dtype}; the backward takes 1 to {widest}")
    if sizes["S"] > 16:
        reasons.append(f"S={sizes['S']} pixels a patch; the backward takes 1 to 16")
    if sizes["M"] > 256:
        reasons.append(f"{sizes['M']} hidden channels of the inner MLP; the backward takes 1 to 256")
    large = sizes["C"] > 31 or (dtype == torch.float32 and sizes["C"] > 15 and sizes["M"] > 128)
    if large and not torch.compiler.is_compiling():  # which cannot trace the question
        shared = operation.runner.shared_memory(device)
        most = 160 if sizes["C"] > 31 else 115  # KiB, of any heads and hidden channels; TNT-B has 112
        if shared is not None and shared < 112 << 10:  # sm_86, sm_89 and sm_120
            reasons.append(
                f"C={sizes['C']} channels in {dtype} need up to {most} KiB of shared memory; this GPU has {shared >> 10}"
            )
    return reasons


def _specialise(
    S: int, C: int, H: int, M: int, has_qkv_bias: bool, has_scale: bool, dtype: str, prec: str, fast: bool
) -> Launch:  # fmt: skip
    D = C // H
    d_pad = triton.next_power_of_2(D)
    c_pad = max(16, triton.next_power_of_2(C + 1))
    rows, warps, hidden, stages, _, mma_arch = CONFIGS[c_pad, dtype != "fp32"]
    T = max(16, triton.next_power_of_2(S))
    if T > 16:
        d_pad = max(d_pad, T // 8)  # up to 128 rows of keys and values: shared memory has no room for more in float32
    hg = max(1, 16 // d_pad)
    # what is kept on the chip of the weights leaves 24 KiB for the rest, on the smallest GPUs with 99 KiB
    size = 4 if dtype == "fp32" else 2
    head_bytes, mlp_bytes = 4 * c_pad * -(-H // hg) * hg * d_pad * size, 2 * c_pad * M * size
    keep = head_bytes <= 64 << 10
    resident = c_pad < (64 if dtype == "fp32" else 128) and M <= 256 and keep * head_bytes + mlp_bytes <= 72 << 10
    constants = dict(
        C=C, C_PAD=c_pad, HEADS=H, D=D, D_PAD=d_pad, HG=hg, S=S, T=T, MLP=M, SLICE=hidden, G=max(1, rows // T),
        HAS_QKV_BIAS=has_qkv_bias, HAS_SCALE=has_scale, KEEP_HEADS=keep, RESIDENT=resident,
        FAST=fast, PRECISION=prec,
    )  # fmt: skip
    constants["PAIRS"] = fast and dtype == "bf16" and constants["RESIDENT"]  # else fc2 would be gone through twice a turn
    weights = (
        "norm1_weight", "norm1_bias", "qk_weight", "qk_bias", "v_weight", "v_bias", "proj_weight", "proj_bias",
        "norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
    )  # fmt: skip
    pointers = {name: dtype for name in ("x_ptr", "y_ptr", *(f"{w}_ptr" for w in weights))}
    pointers |= {"attn_scale_ptr": "fp32", "mlp_scale_ptr": "fp32"}
    return Launch(
        _inner_fwd_kernel, pointers, ("n_patches",), constants, warps, stages, constants["G"], floats=("eps",),
        mma_arch=mma_arch,
    )  # fmt: skip


def _specialise_backward(spec: Launch, weights: bool) -> tuple[Launch, Launch]:
    """The two launches of the backward that belongs to a forward."""
    dtype = spec.pointers["x_ptr"]
    mlps = ("KEEP_HEADS", "RESIDENT", "SLICE", "MLP", "PAIRS")
    common = {k: v for k, v in spec.constants.items() if k not in mlps} | {"NEED_WEIGHTS": weights}
    halves = []
    for kernel, configs in ((_inner_bwd_mlp_kernel, MLP_CONFIGS), (_inner_bwd_attention_kernel, ATTENTION_CONFIGS)):
        rows, warps, hidden, stages, _, mma_arch = configs[common["C_PAD"], dtype != "fp32"]
        constants = common | {"G": max(1, rows // common["T"])}
        if kernel is _inner_bwd_mlp_kernel:
            constants |= {"MLP": spec.constants["MLP"], "SLICE": hidden, "PAIRS": spec.constants["PAIRS"]}
        pointers = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")}
        pointers |= {name: "fp32" for name in ("attn_scale_ptr", "mlp_scale_ptr", "sums_ptr") if name in pointers}
        halves.append(
            Launch(kernel, pointers, ("n_patches",), constants, warps, stages, constants["G"], ("eps",), mma_arch=mma_arch)
        )
    return tuple(halves)


def _unfold(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of norm.weight, norm.bias, weight and bias, float32, where out = linear(LN x).

    ``sums`` (C + 1, outputs): the normalised x before scale and shift, and a one behind it, times the gradient of out.
    """
    gamma, beta, weight = norm_weight.float(), norm_bias.float(), weight.float()
    product, bias = sums[:-1].T, sums[-1]  # (outputs, C), (outputs,)
    return (product * weight).sum(0), bias @ weight, product * gamma + bias[:, None] * beta, bias


def _per_sm(spec: Launch) -> int:
    return CONFIGS[spec.constants["C_PAD"], spec.pointers["x_ptr"] != "fp32"][4]


def launches() -> Iterable[tuple[str, str, Launch]]:
    """(variant, dtype, specialisation) of the named variants; S-legacy has the inner transformer of S."""
    for variant, (C, H) in {"ti": (12, 2), "s": (24, 4), "b": (40, 4)}.items():
        for dtype in ("bf16", "fp16", "fp32"):
            forward = _specialise(16, C, H, 4 * C, False, False, dtype, "ieee", dtype != "fp32")
            yield variant, dtype, forward
            if C <= 31 or dtype != "fp32":  # as _inner_backward has it
                for half in _specialise_backward(forward, True):
                    yield variant, dtype, half


def _inner(
    pixel: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    num_heads: int,
    eps: float,
    attn_scale: Tensor | None,
    mlp_scale: Tensor | None,
) -> Tensor:
    DESCRIPTION.check(locals())
    (P, S, C), M = pixel.shape, fc1_weight.shape[0]
    pixel = pixel.contiguous()
    out = torch.empty_like(pixel)
    if out.numel() == 0:
        return out
    has_scale = attn_scale is not None or mlp_scale is not None
    spec = _specialise(
        S, C, num_heads, M, qk_bias is not None, has_scale, DTYPES[pixel.dtype], precision(pixel.dtype), is_fast(pixel.dtype)
    )  # fmt: skip
    grid = programs(pixel.device, -(-P // spec.patches), _per_sm(spec))
    given = _given(
        P, norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, attn_scale, mlp_scale,
    )  # fmt: skip
    start(spec, grid, pixel, out, *given, P, eps)
    return out


def _given(
    P, norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, attn_scale, mlp_scale,
) -> list[Tensor]:  # fmt: skip
    """Weights and scales as the kernels read them: contiguous; a bias that is None as zeros, a scale as ones.

    Where there are no biases of q, k and v at all, or no scales, a specialisation does not read them, and any tensor does.
    """
    if attn_scale is not None or mlp_scale is not None:
        one = torch.ones(P, dtype=torch.float32, device=norm1_weight.device)
        attn_scale, mlp_scale = (one if scale is None else scale.float() for scale in (attn_scale, mlp_scale))
    unread = norm1_weight
    given = (
        norm1_weight, zeros_for_none(norm1_bias, norm1_weight), qk_weight, qk_bias, v_weight, v_bias,
        proj_weight, zeros_for_none(proj_bias, norm1_weight), norm2_weight, zeros_for_none(norm2_bias, norm2_weight),
        fc1_weight, zeros_for_none(fc1_bias, fc1_weight[:, 0]), fc2_weight, zeros_for_none(fc2_bias, norm1_weight),
        attn_scale, mlp_scale,
    )  # fmt: skip
    return [(unread if x is None else x).contiguous() for x in given]


def _empty(pixel, *args):
    return torch.empty_like(pixel, memory_format=torch.contiguous_format)


def _multiply_adds(pixel, norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
                   norm2_weight, norm2_bias, fc1_weight, *args) -> int:  # fmt: skip
    P, S, C = pixel
    return P * S * (4 * C * C + 2 * C * fc1_weight[0] + 2 * S * C)


def _inner_backward(
    gradient: Tensor,
    pixel: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    num_heads: int,
    eps: float,
    attn_scale: Tensor | None,
    mlp_scale: Tensor | None,
    needed: list[int],
) -> list[Tensor]:
    """Two launches: the MLP's half with the attention computed again, then the attention's half.

    PyTorch does it for the sizes of ``gradients_unsupported``, and where the gradient of a scale is asked for.
    """
    arguments = (
        pixel, norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias, norm2_weight,
        norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, num_heads, eps, attn_scale, mlp_scale,
    )  # fmt: skip
    (P, S, C), M = pixel.shape, fc1_weight.shape[0]
    reasons = gradients_unsupported({"C": C, "S": S, "M": M}, pixel.dtype, pixel.device)
    if reasons or 17 in needed or 18 in needed or pixel.numel() == 0:
        return recomputed(reference.inner, gradient, arguments, needed)
    weights = any(i > 0 for i in needed)
    has_scale = attn_scale is not None or mlp_scale is not None
    pixel = pixel.contiguous()
    gradient = gradient.to(pixel.dtype).contiguous()
    forward = _specialise(
        S, C, num_heads, M, qk_bias is not None, has_scale, DTYPES[pixel.dtype], precision(pixel.dtype), is_fast(pixel.dtype)
    )  # fmt: skip
    mlp, attention = _specialise_backward(forward, weights)
    c_pad, d_pad = (forward.constants[name] for name in ("C_PAD", "D_PAD"))
    group = forward.constants["HG"]
    lanes = -(-num_heads // group) * group * d_pad
    hidden = -(-M // mlp.constants["SLICE"]) * mlp.constants["SLICE"]
    dx = torch.empty_like(pixel)
    given = _given(P, *arguments[1:15], attn_scale, mlp_scale)

    def run(spec: Launch, configs: dict[Any, Any], size: int, *tensors: Tensor) -> Tensor | None:
        per_sm = configs[c_pad, pixel.dtype != torch.float32][4]
        grid = programs(pixel.device, -(-P // spec.patches), per_sm)
        sums = torch.empty(grid if weights else 1, size, dtype=torch.float32, device=pixel.device)
        start(spec, grid, *tensors, sums, P, eps)
        return sums.sum(0) if weights else None

    found_mlp = run(mlp, MLP_CONFIGS, (2 * hidden + 1) * c_pad, pixel, gradient, dx, *given[:13], *given[14:])
    found = run(attention, ATTENTION_CONFIGS, (4 * lanes + 1) * c_pad, pixel, dx, *given[:7], given[14])
    if not weights:
        return [dx]

    gradients: dict[int, Tensor] = {0: dx}
    fc1, fc2, fc2_bias_sum = found_mlp.split((c_pad * hidden, hidden * c_pad, c_pad))
    parts = _unfold(given[8], given[9], given[10], fc1.view(c_pad, hidden)[: C + 1, :M])
    gradients |= dict(zip((9, 10, 11, 12), parts, strict=True))
    gradients |= {13: fc2.view(c_pad, hidden)[:C, :M], 14: fc2_bias_sum[:C]}

    size = c_pad * lanes
    qkv, proj, proj_bias_sum = found.split((3 * size, size, c_pad))
    qkv = qkv.view(3, c_pad, -1, d_pad)[:, : C + 1, :num_heads, : C // num_heads]  # without padding
    qkv = qkv.permute(1, 0, 2, 3).reshape(C + 1, 3, C)
    qkv = torch.cat((qkv[:, 0] * (C // num_heads) ** -0.5, qkv[:, 1:].flatten(1) * log(2)), 1)
    norm_weight, norm_bias, weight, bias = _unfold(given[0], given[1], torch.cat((given[2], given[4])), qkv)
    gradients |= {1: norm_weight, 2: norm_bias, 3: weight[: 2 * C], 4: bias[: 2 * C], 5: weight[2 * C :], 6: bias[2 * C :]}
    proj = proj.view(c_pad, -1, d_pad)[:C, :num_heads, : C // num_heads].reshape(C, C)
    gradients |= {7: proj, 8: proj_bias_sum[:C]}
    return [
        dx if i == 0 else torch.empty_like(arguments[i], memory_format=torch.contiguous_format).copy_(gradients[i])
        for i in needed
    ]


_operation = register("inner", _inner, _empty, _multiply_adds, _inner_backward)


def inner(
    pixel: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-5,
    attn_scale: Tensor | None = None,
    mlp_scale: Tensor | None = None,
) -> Tensor:
    """``reference.inner``, fused: float32, float16 or bfloat16, the weights in the same dtype (or float32 under autocast).

    Raises:
        TypeError, ValueError: a tensor of another dtype, device or shape; named, with what is accepted.
    """
    *tensors, attn_scale, mlp_scale = DESCRIPTION.prepare(
        pixel, norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias, norm2_weight,
        norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, attn_scale, mlp_scale,
    )  # fmt: skip
    return _operation(*tensors, num_heads, eps, attn_scale, mlp_scale)
