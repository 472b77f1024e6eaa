"""inner: the inner transformer of every patch in one launch.

    x = pixel + attn_scale · proj(softmax(q kᵀ / √D) v),   q, k, v = linear(LN₁ pixel), H heads of D channels
    y = x + mlp_scale · fc2(GELU(fc1(LN₂ x)))

and, where a fold follows (block.py), its LayerNorm over all values of each patch of y, which is a warp's rows of a tile; and
copies of weights that what follows reads, before the tiles.

Shapes: pixel and result (P, S, C) contiguous, weights in nn.Linear's layout, in the pixels' dtype or float32. Bytes moved:
the pixels read once, written once, or twice; the weights stay on the chip over many patches. Statistics, softmax and
accumulation are float32.

A program takes tiles of G patches with T rows each (T: S, or for other S the power of two from 16 on, the rest masked). What
keeps the instructions few:

- LayerNorm's scale and shift are folded into the weights that follow, once per program; shift and bias ride in the row of a
  constant-one padding channel (hence C_PAD > C).
- x − mean is a matrix product: x·(C·I − 11ᵀ) is C times that, exact up to float32 accumulation, and has no reductions. So
  is x itself (x·I), which is the cheapest way to have it as an accumulator.
- HG heads are one product of W = HG·D_PAD channels: keys and values stacked below one another, each masked to its head.
- Softmax is normalised after P·V, by P times a matrix of ones, which has each head's sum where the head's output is.
- GELU in bfloat16 runs on pairs of float16, which have three bits more than the rounding to bfloat16 leaves.
- Columns of padding past three quarters of C_PAD are cut off the products where that helps (TRIM: TNT-B).

Backward: two halves that start again from the pixels, one launch, of TNT-B two. The first computes the attention once more and
does the MLP's half, the second updates its result by the attention's half. Every program keeps the sums of its weights'
gradients in float32 registers and writes them once; the next launch adds them up (totals.py), so the same input gives the same
bits. The sums belong to the weights with LayerNorm folded in, and that launch takes its scale and shift out of them again: a
program has all lanes of a channel, so that it needs nothing of another. By PyTorch that were 33 launches, which took the host
longer than both halves.

The products are synchronous mma instructions everywhere: two warps get them by themselves, four by compiling Hopper's code as
Ampere's (Config.mma_arch). The asynchronous ones with a left operand in registers, which the compiler would choose, are
known to come out wrong (triton issues 9433, 11781), and are no fewer instructions here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast import reference
from tnt_fast.arguments import beyond, transformer_shapes
from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Copy, Launch, Operation, derived, launch, programs, remembered
from tnt_fast.kernels.totals import CONFIG, Sums, added_up, columns, totalled, totals

from tnt_fast.kernels.tile import (  # isort: skip
    COPIED, LOG2_E, accumulators, centred, copied, dot, dot_onto, exp2, exponent, gelu_gradient, gelu_pairs, load, power_of_two,
    reciprocal, scaled, store,
)  # fmt: skip

# (C_PAD, half precision): of a tile, and hidden channels at once. In half precision those of TNT-S and TNT-B, 32 and 64, are
# the fastest of 60, 85, 10 and 6 on an H200 (benchmarks/results/2026-11-26-1929/sweep.txt; a third stage of TNT-B's forward is
# 4% faster, and more than the 99 KiB of sm_86, sm_89 and sm_120), all others chosen by static cost for sm_90. TNT-Ti has
# C_PAD 16; at 128, which no named model has, PyTorch computes the gradients.
CONFIGS = {
    "_inner_fwd_kernel": {
        (16, True): Config(64, warps=2, per_sm=7, chunk=16),
        (32, True): Config(64, warps=4, per_sm=4, chunk=32, stages=3, mma_arch="sm80"),
        (64, True): Config(64, warps=4, per_sm=2, chunk=32, stages=2, mma_arch="sm80"),
        (128, True): Config(16, warps=4, per_sm=2, chunk=32, mma_arch="sm80"),
        (16, False): Config(16, warps=2, per_sm=4, chunk=16),
        (32, False): Config(16, warps=4, per_sm=4, chunk=16),
        (64, False): Config(16, warps=4, per_sm=2, chunk=16),
        (128, False): Config(16, warps=4, per_sm=1, chunk=16),
    },
    "_inner_bwd_kernel": {
        (16, True): Config(32, warps=2, per_sm=5, chunk=16),
        (32, True): Config(32, warps=2, per_sm=4, chunk=32),
        (16, False): Config(16, warps=2, per_sm=4, chunk=16),
        (32, False): Config(16, warps=4, per_sm=2, chunk=16, mma_arch="sm80"),
    },
    "_inner_bwd_mlp_kernel": {(64, True): Config(128, warps=8, per_sm=1, chunk=32, mma_arch="sm80")},  # WIDE
}
CONFIGS["_inner_bwd_attention_kernel"] = CONFIGS["_inner_bwd_mlp_kernel"]
# C_PAD in half precision whose forward is faster with the LayerNorm behind it than with a launch for that, by simulation for an
# H200 and an A100, and with how many registers as many programs fit as without. Of TNT-Ti fewer would fit: it would take 28 µs
# more, twice as long as that launch
NORMS = {32: 128, 64: None}


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """What a kernel is compiled for: sizes by the paper's letters (M: hidden channels), then how they lie in a tile."""

    S: int
    C: int
    H: int
    M: int
    T: int  # rows that a patch takes of a tile: S, or the next power of two
    G: int  # patches a tile
    C_PAD: int
    D_PAD: int
    HG: int  # heads that are one product
    CHUNK: int  # hidden channels at once
    BACKWARD: bool  # then weights are centred, and all stay on the chip
    KEEP_HEADS: bool  # the attention's weights stay there
    MLP_FITS: bool
    RESIDENT: bool = derived(lambda Z: Z.BACKWARD or Z.MLP_FITS)
    # GELU in pairs of float16; where the weights do not stay, fc2 would be gone through twice a tile
    PAIRS: bool = derived(lambda Z: Z.FAST and tl.bfloat16 == Z.DTYPE and Z.MLP_FITS)
    WIDE: bool = derived(lambda Z: Z.BACKWARD and Z.C_PAD >= 64)  # sums transposed, three launches
    TRIM: bool = derived(lambda Z: not Z.BACKWARD and Z.C_PAD >= 64 and 4 * (Z.C + 1) <= 3 * Z.C_PAD)
    D: int = derived(lambda Z: Z.C // Z.H)
    ROWS: int = derived(lambda Z: Z.G * Z.T)
    W: int = derived(lambda Z: Z.HG * Z.D_PAD)
    HIDDEN: int = derived(lambda Z: -(-Z.M // Z.CHUNK) * Z.CHUNK)  # columns of the sums, of all chunks and of all products
    LANES: int = derived(lambda Z: -(-Z.H // Z.HG) * Z.W)
    UNIT: float = derived(lambda Z: Z.C / Z.C_PAD)  # what the products make of x − mean: C, a power of two apart
    BY_PRODUCT: bool = derived(lambda Z: Z.RESIDENT and not Z.EXACT)  # float32 products are slow


@dataclass(frozen=True, kw_only=True)
class SumSizes(Sizes):
    """And of the kernel that adds up what the backward's programs left: rows and columns of a tile, blocks of columns."""

    BLOCK: int
    COLUMNS: int
    FC2: int = derived(lambda Z: -(-Z.C * Z.HIDDEN // Z.COLUMNS) + -(-Z.C // Z.COLUMNS))
    PROJ: int = derived(lambda Z: -(-Z.C * Z.LANES // Z.COLUMNS) + -(-Z.C // Z.COLUMNS))
    PROGRAMS: int = derived(lambda Z: 2 * Z.C + Z.FC2 + Z.PROJ)


class Norm(NamedTuple):
    """Of the LayerNorm over all values of a patch of the result: where it goes, and its weights; None: it is not made."""

    ptr: Any = None
    weight: Any = None
    bias: Any = None


NO_NORM = Norm()


# ---- weights, once a program ----


@triton.jit
def _columns_of(weight_ptr, gamma_ptr, beta_ptr, ch, out, used, Z: tl.constexpr):
    """Columns ch of a weight in nn.Linear's layout, transposed; LayerNorm's scale on them, and what its shift gives."""
    real = ch < Z.C
    gamma, beta = load(gamma_ptr, ch, real), load(beta_ptr, ch, real)
    w = load(weight_ptr + out[None, :] * Z.C, ch[:, None], used[None, :] & real[:, None])
    return w * gamma[:, None], tl.sum(w * beta[:, None], 0)


@triton.jit
def _folded(weight_ptr, bias_ptr, gamma_ptr, beta_ptr, out, used, UNIT, Z: tl.constexpr):
    """UNIT·(rows C of a weight and bias after LayerNorm): a tuple of [C_PAD, len(out)], row C for the constant one.

    With TRIM the last quarter of the rows is left out, and the rest comes in two parts, as _columns has it. In the backward
    the mean over the channels is taken off: the same product with a normalised tile, whose channels sum to 0; the product of
    a gradient with its transpose then has no mean, as LayerNorm's backward wants it.
    """
    ch = tl.arange(0, Z.C_PAD // 2 if Z.TRIM else Z.C_PAD)
    w, shift = _columns_of(weight_ptr, gamma_ptr, beta_ptr, ch, out, used, Z)
    shift += load(bias_ptr, out, used)
    if Z.TRIM:
        more = Z.C_PAD // 2 + tl.arange(0, Z.C_PAD // 4)
        w_more, shift_more = _columns_of(weight_ptr, gamma_ptr, beta_ptr, more, out, used, Z)
        shift += shift_more
        w = tl.where((ch == Z.C)[:, None], shift[None, :], w)
        w_more = tl.where((more == Z.C)[:, None], shift[None, :], w_more)
        return (w * UNIT).to(Z.DTYPE), (w_more * UNIT).to(Z.DTYPE)
    else:
        if Z.BACKWARD:
            w = tl.where((ch < Z.C)[:, None], w - (tl.sum(w, 0) * (1.0 / Z.C))[None, :], 0.0)
        return ((tl.where((ch == Z.C)[:, None], shift[None, :], w) * UNIT).to(Z.DTYPE),)


@triton.jit
def _head_weights(head, w, Z: tl.constexpr):
    """Of HG heads: queries' (log2 e/√D, for exp2), keys' and values' weights, and the projection's, [W, C_PAD]."""
    ch = tl.arange(0, Z.C_PAD)
    lane = tl.arange(0, Z.W)
    out = (head + lane // Z.D_PAD) * Z.D + lane % Z.D_PAD  # the channel of the weights that lane stands for
    used = (lane % Z.D_PAD < Z.D) & (head + lane // Z.D_PAD < Z.H)
    wq = _folded(w.qk_weight, w.qk_bias, w.norm1_weight, w.norm1_bias, out, used, LOG2_E / Z.D**0.5, Z)
    wk = _folded(w.qk_weight, w.qk_bias, w.norm1_weight, w.norm1_bias, Z.C + out, used, 1.0, Z)
    wv = _folded(w.v_weight, w.v_bias, w.norm1_weight, w.norm1_bias, out, used, 1.0, Z)
    wp = load(w.proj_weight, ch[None, :] * Z.C + out[:, None], (ch < Z.C)[None, :] & used[:, None])
    return wq, wk, wv, wp.to(Z.DTYPE)


@triton.jit
def _kept_heads(w, Z: tl.constexpr):
    """A tuple of the weights of every HG heads; empty where they do not stay on the chip."""
    H: tl.constexpr = Z.H
    HG: tl.constexpr = Z.HG
    heads = ()
    if Z.KEEP_HEADS:
        for head in tl.static_range(0, H, HG):
            heads = heads + (_head_weights(head, w, Z),)
    return heads


@triton.jit
def _halvings(hid, used, w, Z: tl.constexpr):
    """How often hidden channels have to be halved for float16 (PAIRS): 0, but for weights that allow values above 65536.

    No normalised row is longer than √C, so |hidden| ≤ √C·Σ|weight| + |bias|. What GELU of a halved value, doubled again, is
    off by is 2e-6 of the values that made it necessary.
    """
    fc1, shift = _columns_of(w.fc1_weight, w.norm2_weight, w.norm2_bias, tl.arange(0, Z.C_PAD), hid, used, Z)
    shift += load(w.fc1_bias, hid, used)
    return tl.maximum(exponent(tl.sum(tl.abs(fc1), 0) * Z.C**0.5 + tl.abs(shift)) - 15, 0)


@triton.jit
def _units(hid, used, w, raised, Z: tl.constexpr):
    """What gelu_pairs wants hidden channels' weights multiplied by, fc1's and fc2's, the latter ``raised`` octaves more."""
    if Z.PAIRS:
        halvings = _halvings(hid, used, w, Z)
        return power_of_two(-3 - halvings), power_of_two(2 + halvings + raised)
    else:
        return tl.full((Z.CHUNK,), 1.0, tl.float32), tl.full((Z.CHUNK,), 1.0, tl.float32)


@triton.jit
def _octaves(w, Z: tl.constexpr):
    """How many octaves PAIRS raises fc2's weights by, that they are neither too large nor too small for float16; the sum that
    their product is added to goes up and down with them: as factors."""
    if Z.PAIRS:
        ch = tl.arange(0, Z.C_PAD)
        top = -127
        for start in range(0, Z.M, Z.CHUNK):  # not unrolled, for its registers
            hid = start + tl.arange(0, Z.CHUNK)
            used = hid < Z.M
            fc2 = load(w.fc2_weight, ch[None, :] * Z.M + hid[:, None], (ch < Z.C)[None, :] & used[:, None])
            octaves = exponent(tl.max(tl.abs(fc2), 1)) + _halvings(hid, used, w, Z) + 2
            top = tl.maximum(top, tl.max(octaves, 0))
        raised = tl.minimum(14 - top, 0) + tl.minimum(tl.maximum(-6 - top, 0), 60)
        raised = tl.where(top > -64, raised, 0)  # nothing of those is seen
        return raised, power_of_two(raised), power_of_two(-raised)
    else:
        return 0, 1.0, 1.0


@triton.jit
def _mlp_chunk(start: tl.constexpr, w, raised, Z: tl.constexpr):
    """The weights of CHUNK hidden channels, [C_PAD, CHUNK] and [CHUNK, C_PAD]."""
    ch = tl.arange(0, Z.C_PAD)
    hid = start + tl.arange(0, Z.CHUNK)
    used = hid < Z.M
    fc2 = load(w.fc2_weight, ch[None, :] * Z.M + hid[:, None], (ch < Z.C)[None, :] & used[:, None])
    unit1, unit2 = _units(hid, used, w, raised, Z)
    fc1 = _folded(w.fc1_weight, w.fc1_bias, w.norm2_weight, w.norm2_bias, hid, used, unit1[None, :], Z)
    return fc1, (fc2 * unit2[:, None]).to(tl.float16 if Z.PAIRS else Z.DTYPE)


@triton.jit
def _matrices(Z: tl.constexpr):
    """Constants: x·identity = x, x·negative = −x (one used twice would be kept in registers), x·centring = UNIT·(x − mean);
    which channels are a head's own, [1, HG, 1, W]; those as ones below one another for every row, [G, HG·T, W]."""
    ch = tl.arange(0, Z.C_PAD)
    real = ch < Z.C
    diagonal = (ch[:, None] == ch[None, :]) & real[:, None]
    identity = tl.where(diagonal, 1.0, 0.0).to(Z.DTYPE)
    negative = tl.where(diagonal, -1.0, 0.0).to(Z.DTYPE)
    centring = tl.where(diagonal, Z.C - 1.0, -1.0) * (1.0 / Z.C_PAD)  # a division may be approximate
    centring = tl.where(real[:, None] & real[None, :], centring, 0.0).to(Z.DTYPE)
    own = (tl.arange(0, Z.W)[None, :] // Z.D_PAD == tl.arange(0, Z.HG)[:, None])[None, :, None, :]
    if Z.HG == 1:
        ones = tl.full((Z.G, Z.T, Z.W), 1.0, Z.DTYPE)  # a constant needs no registers
    else:
        ones = tl.broadcast_to(tl.where(own, 1.0, 0.0), (Z.G, Z.HG, Z.T, Z.W))
        ones = tl.reshape(ones, (Z.G, Z.HG * Z.T, Z.W)).to(Z.DTYPE)
    return identity, negative, centring, own, ones


# ---- a tile ----


@triton.jit
def _layout(Z: tl.constexpr):
    """The rows of a tile: their patch, their token in it, and where their values lie behind the tile's first."""
    row = tl.arange(0, Z.ROWS)
    patch, token = row // Z.T, row % Z.T
    offset = (row if Z.T == Z.S else patch * Z.S + token)[:, None] * Z.C + tl.arange(0, Z.C_PAD)[None, :]
    return patch, token, offset


@triton.jit
def _place(tile, patch, token, n_patches, Z: tl.constexpr):
    """Where a tile begins, and which of its rows and of its values are real."""
    first = tl.cast(tile, tl.int64) * (Z.G * Z.S * Z.C)
    alive = patch < n_patches - tile * Z.G
    if Z.T > Z.S:
        alive = alive & (token < Z.S)
    return first, alive, alive[:, None] & (tl.arange(0, Z.C_PAD) < Z.C)[None, :]


@triton.jit
def _columns(h, Z: tl.constexpr):
    """[ROWS, C_PAD] as a tuple; with TRIM the first half and the third quarter of its columns."""
    if Z.TRIM:
        half, rest = tl.split(tl.permute(tl.reshape(h, (Z.ROWS, 2, Z.C_PAD // 2)), (0, 2, 1)))
        quarter, _ = tl.split(tl.permute(tl.reshape(rest, (Z.ROWS, 2, Z.C_PAD // 4)), (0, 2, 1)))
        return half, quarter
    else:
        return (h,)


@triton.jit
def _product(h, w, Z: tl.constexpr):
    total = dot(h[0], w[0], Z)
    for i in tl.static_range(1, len(w)):
        total = dot(h[i], w[i], Z, total)
    return total


@triton.jit
def _centre(x, Z: tl.constexpr):
    """x − mean, 0 in padding channels."""
    real = tl.arange(0, Z.C_PAD) < Z.C
    return centred(tl.where(real[None, :], x, 0.0), real, Z.C, Z.EXACT)  # known zeros: the compiler drops what computed them


@triton.jit
def _standardise(centred, alive, eps, UNIT: tl.constexpr, Z: tl.constexpr):
    """UNIT·(x − mean) -> (x − mean)/σ with the constant one in channel C, and 1/σ of every row.

    In rows that are not alive, where sums or other rows see them, both are 0, whatever eps is.
    """
    var = tl.sum(centred * centred, 1) * (1.0 / (Z.C * UNIT * UNIT))
    rstd = tl.rsqrt(var + eps)
    if Z.BACKWARD or Z.T > Z.S:
        rstd = tl.where(alive, rstd, 0.0)
    one = tl.arange(0, Z.C_PAD) == Z.C
    return tl.where(one[None, :], 1.0, centred * (rstd * (1.0 / UNIT))[:, None]).to(Z.DTYPE), rstd


@triton.jit
def _norm(tokens, alive, eps, matrices, Z: tl.constexpr):
    """Pixels as they were loaded -> in float32; normalised; 1/σ."""
    if Z.BY_PRODUCT:
        x = tl.where((tl.arange(0, Z.C_PAD) < Z.C)[None, :], tl.dot(tokens, matrices[2]), 0.0)
        h, rstd = _standardise(x, alive, eps, Z.UNIT, Z)
        x = tl.dot(tokens, matrices[0])
    else:
        x = tokens.to(tl.float32)
        h, rstd = _standardise(_centre(x, Z), alive, eps, 1, Z)
    return x, h, rstd


@triton.jit
def _heads(h, weights, matrices, Z: tl.constexpr):
    """Attention of HG heads: q [G, T, W], k and v [G, HG·T, W] stacked, P before its normalisation [G, T, HG·T] in float32,
    the output and the reciprocal of P's sums [G, T, W] in float32."""
    wq, wk, wv, _ = weights
    own, ones = matrices[3], matrices[4]
    q = tl.reshape(_product(h, wq, Z).to(Z.DTYPE), (Z.G, Z.T, Z.W))
    k = tl.reshape(_product(h, wk, Z).to(Z.DTYPE), (Z.G, 1, Z.T, Z.W))
    v = tl.reshape(_product(h, wv, Z).to(Z.DTYPE), (Z.G, 1, Z.T, Z.W))
    k = tl.reshape(tl.where(own, k, 0.0).to(Z.DTYPE), (Z.G, Z.HG * Z.T, Z.W))
    v = tl.reshape(tl.where(own, v, 0.0).to(Z.DTYPE), (Z.G, Z.HG * Z.T, Z.W))
    s = tl.reshape(dot(q, tl.permute(k, (0, 2, 1)), Z), (Z.G, Z.T, Z.HG, Z.T))
    if Z.T > Z.S:
        s = tl.where((tl.arange(0, Z.T) < Z.S)[None, None, None, :], s, float("-inf"))
    # the inner softmax; the largest is 1, to the bit
    p = tl.reshape(exp2(s - tl.max(s, 3)[:, :, :, None], Z.FAST), (Z.G, Z.T, Z.HG * Z.T))
    rounded = p.to(Z.DTYPE)
    o = dot(rounded, v, Z)
    inverse = reciprocal(dot(rounded, ones, Z), Z.FAST)
    return q, k, v, p, o * inverse, inverse


@triton.jit
def _add_heads(total, h, weights, matrices, Z: tl.constexpr):
    """total + the projection of what ``_heads`` gives."""
    o = _heads(h, weights, matrices, Z)[4]
    return dot(tl.reshape(o.to(Z.DTYPE), (Z.ROWS, Z.W)), weights[3], Z, total)


@triton.jit
def _onto(x, scale_ptr, Z: tl.constexpr):
    """What a branch is summed onto: x, where its sum is not scaled; float32 would see a large x rounded many times."""
    return tl.full((Z.ROWS, Z.C_PAD), 0.0, tl.float32) if scale_ptr is not None or Z.EXACT else x


@triton.jit
def _add_branch(x, branch, down, scale_ptr, patch, n_patches, Z: tl.constexpr):
    """x with a branch that began with ``_onto``, times ``down``."""
    if scale_ptr is not None:
        return x + branch * (tl.load(scale_ptr + patch, mask=patch < n_patches, other=0.0) * down)[:, None]
    elif Z.EXACT:
        return x + branch
    else:
        return branch * down


@triton.jit
def _attention(x, h, heads, bias, w, matrices, scale_ptr, patch, n_patches, Z: tl.constexpr):
    """x + attention of h = LN₁ x."""
    total = _onto(x, scale_ptr, Z) + bias[None, :]
    if Z.KEEP_HEADS:
        for i in tl.static_range(len(heads)):
            total = _add_heads(total, h, heads[i], matrices, Z)
    else:
        for head in range(0, Z.H, Z.HG):  # not unrolled, there may be many
            total = _add_heads(total, h, _head_weights(head, w, Z), matrices, Z)
    return _add_branch(x, total, 1.0, scale_ptr, patch, n_patches, Z)


@triton.jit
def _norm_gradient(dh, h, rstd, Z: tl.constexpr):
    """LayerNorm's backward; dh, the gradient of its result before scale and shift, has no mean already."""
    dh = tl.where((tl.arange(0, Z.C_PAD) < Z.C)[None, :], dh, 0.0)
    along = tl.sum(dh * h.to(tl.float32), 1) * (1.0 / Z.C)
    return (dh - h.to(tl.float32) * along[:, None]) * rstd[:, None]


@triton.jit
def _add_sum(total, a, b, n_patches, Z: tl.constexpr):
    """total + aᵀ·b, of one of ``accumulators``.

    Triton gives the warps of products that depend on one another rows of their own: of a sum, which has fewer than a tile,
    several warps would do the same. In a loop of one turn it depends on none.
    """
    if Z.WIDE:
        for _ in range(tl.minimum(n_patches, 1)):
            total = dot_onto(total, tl.trans(b), a, Z)
        return total
    else:
        return dot_onto(total, tl.trans(a), b, Z)


@triton.jit
def _upright(total, Z: tl.constexpr):
    return tl.trans(total) if Z.WIDE else total


@triton.jit
def _patch_weights(ptr, token, values, Z: tl.constexpr):
    """Weights of a LayerNorm over all values of a patch, as they are stored, for each row of a tile."""
    if ptr is None:
        return tl.full((Z.ROWS, Z.C_PAD), 0.0, Z.DTYPE)
    else:
        return tl.load(ptr + token[:, None] * Z.C + tl.arange(0, Z.C_PAD)[None, :], mask=values, other=0.0)


@triton.jit
def _patch_mean(x, Z: tl.constexpr):
    """A patch's mean in all of its rows, [ROWS, 1], of a tile that is 0 where it has no values."""
    mean = tl.sum(tl.reshape(tl.sum(x, 1), (Z.G, Z.T)), 1) * (1.0 / (Z.S * Z.C))
    return tl.reshape(tl.broadcast_to(mean[:, None], (Z.G, Z.T)), (Z.ROWS,))[:, None]


@triton.jit
def _patch_norm(x, weight, bias, real, eps, Z: tl.constexpr):
    """LayerNorm over all values of a patch."""
    x = tl.where(real, x, 0.0)
    x = tl.where(real, x - _patch_mean(x, Z), 0.0)
    x *= tl.rsqrt(_patch_mean(x * x, Z) + eps)
    return x * weight.to(tl.float32) + bias.to(tl.float32)


# ---- the kernels ----


@triton.jit
def _inner_fwd_kernel(x_ptr, y_ptr, w, attn_scale_ptr, mlp_scale_ptr, norm, copies, n_patches, eps, Z: tl.constexpr):
    """``norm``: a ``Norm``; ``copies``: what nobody reads in this launch, or None."""
    if copies is not None:  # behind the tiles they would keep registers of the loop
        copied(copies)
    M: tl.constexpr = Z.M
    CHUNK: tl.constexpr = Z.CHUNK
    ch = tl.arange(0, Z.C_PAD)
    real = ch < Z.C
    heads = _kept_heads(w, Z)
    proj_bias = load(w.proj_bias, ch, real)
    raised, up, down = _octaves(w, Z)
    mlp = ()
    if Z.RESIDENT:
        for start in tl.static_range(0, M, CHUNK):
            mlp = mlp + (_mlp_chunk(start, w, raised, Z),)
    fc2_bias = load(w.fc2_bias, ch, real) * up
    matrices = _matrices(Z)
    patch, token, offset = _layout(Z)
    if norm.ptr is not None:  # outside of the loop, which would have them on their way like pixels
        values = (token < Z.S)[:, None] & real[None, :]
        norm_weight, norm_bias = _patch_weights(norm.weight, token, values, Z), _patch_weights(norm.bias, token, values, Z)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_patches, Z.G), tl.num_programs(0), num_stages=Z.STAGES):
        first, alive, mask = _place(tile, patch, token, n_patches, Z)
        mine = tile * Z.G + patch
        tokens = tl.load(x_ptr + first + offset, mask=mask, other=0.0)  # [ROWS, C_PAD]
        x, h, _ = _norm(tokens, alive, eps, matrices, Z)
        x = _attention(x, _columns(h, Z), heads, proj_bias, w, matrices, attn_scale_ptr, mine, n_patches, Z)

        h, _ = _standardise(_centre(x, Z), alive, eps, 1, Z)
        h = _columns(h, Z)
        total = _onto(x * up, mlp_scale_ptr, Z) + fc2_bias[None, :]
        for start in tl.static_range(0, M, CHUNK):
            fc1, fc2 = mlp[start // Z.CHUNK] if Z.RESIDENT else _mlp_chunk(start, w, raised, Z)
            hidden = gelu_pairs(_product(h, fc1, Z), Z.FAST, Z.PAIRS).to(fc2.dtype)  # [ROWS, CHUNK]
            total = dot(hidden, fc2, Z, total)
        x = _add_branch(x, total, down, mlp_scale_ptr, mine, n_patches, Z)
        tl.store(y_ptr + first + offset, tl.where(real[None, :], x, 0.0).to(Z.DTYPE), mask=mask)
        if norm.ptr is not None:
            normed = _patch_norm(x, norm_weight, norm_bias, values, eps, Z)
            tl.store(norm.ptr + first + offset, normed.to(Z.DTYPE), mask=mask)


@triton.jit
def _inner_bwd_mlp_kernel(x_ptr, dy_ptr, dx_ptr, w, attn_scale_ptr, mlp_scale_ptr, sums_ptr, n_patches, eps, Z: tl.constexpr):
    """dx = gradient of what comes before the MLP; the sums a program: fc1, fc2 [2, C_PAD, HIDDEN], fc2's bias [C_PAD].

    All sums have the channels as their rows: Triton gives every warp rows of its own, and would do fewer rows several times.
    """
    M: tl.constexpr = Z.M
    CHUNK: tl.constexpr = Z.CHUNK
    ch = tl.arange(0, Z.C_PAD)
    heads = () if Z.WIDE else _kept_heads(w, Z)
    proj_bias = load(w.proj_bias, ch, ch < Z.C)
    w1, w2 = (), ()
    for start in tl.static_range(0, M, CHUNK):
        hid = start + tl.arange(0, Z.CHUNK)
        used = hid < Z.M
        unit1, unit2 = _units(hid, used, w, 0, Z)
        w1 = w1 + _folded(w.fc1_weight, w.fc1_bias, w.norm2_weight, w.norm2_bias, hid, used, unit1[None, :], Z)
        fc2 = load(w.fc2_weight, ch[:, None] * Z.M + hid[None, :], (ch < Z.C)[:, None] & used[None, :])
        w2 = w2 + ((fc2 * unit2[None, :]).to(Z.DTYPE),)  # [C_PAD, CHUNK]
    g1 = accumulators(len(w1), Z.C_PAD, Z.CHUNK, Z.WIDE)
    g2 = accumulators(len(w1), Z.C_PAD, Z.CHUNK, Z.WIDE)
    gb = accumulators(1, Z.C_PAD, 16, Z.WIDE)[0]
    matrices = _matrices(Z)
    patch, token, offset = _layout(Z)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_patches, Z.G), tl.num_programs(0), num_stages=Z.STAGES):
        first, alive, mask = _place(tile, patch, token, n_patches, Z)
        mine = tile * Z.G + patch
        tokens = tl.load(x_ptr + first + offset, mask=mask, other=0.0)  # [ROWS, C_PAD]
        dy = tl.load(dy_ptr + first + offset, mask=mask, other=0.0)
        x, h, rstd = _norm(tokens, alive, eps, matrices, Z)
        if not Z.WIDE:  # else x is behind the attention already
            x = _attention(x, (h,), heads, proj_bias, w, matrices, attn_scale_ptr, mine, n_patches, Z)
            h, rstd = _standardise(_centre(x, Z), alive, eps, 1, Z)
        dz = scaled(dy, mlp_scale_ptr, mine, n_patches)

        dh = tl.full((Z.ROWS, Z.C_PAD), 0.0, tl.float32)
        new1, new2 = (), ()
        for i in tl.static_range(len(w1)):
            hidden = dot(h, w1[i], Z)  # [ROWS, CHUNK]
            dhidden = dot(dz, w2[i], Z)
            hidden, dhidden = gelu_gradient(hidden, dhidden, Z.FAST, Z.PAIRS, Z.DTYPE)
            dh = dot(dhidden, tl.trans(w1[i]), Z, dh)
            if sums_ptr is not None:
                new1 = new1 + (_add_sum(g1[i], h, dhidden, n_patches, Z),)
                new2 = new2 + (_add_sum(g2[i], dz, hidden, n_patches, Z),)
        if sums_ptr is not None:
            g1, g2 = new1, new2
            gb = _add_sum(gb, dz, tl.full((Z.ROWS, 16), 1.0, Z.DTYPE), n_patches, Z)
        dx = _norm_gradient(dh, h, rstd, Z)
        if Z.WIDE:  # dy is loaded again, past L1, for the registers; another way, or it were kept after all
            dx += tl.load(dy_ptr + first + offset, mask=mask, other=0.0, cache_modifier=".cg")
        else:
            dx -= tl.dot(dy, matrices[1]) if Z.BY_PRODUCT else -dy
        tl.store(dx_ptr + first + offset, dx.to(Z.DTYPE), mask=mask)

    if sums_ptr is not None:
        sums = sums_ptr + tl.cast(tl.program_id(0), tl.int64) * ((2 * Z.HIDDEN + 1) * Z.C_PAD)
        for i in tl.static_range(len(w1)):
            hid = i * Z.CHUNK + tl.arange(0, Z.CHUNK)
            unit1, unit2 = _units(hid, hid < Z.M, w, 0, Z)
            tl.store(sums + ch[:, None] * Z.HIDDEN + hid[None, :], _upright(g1[i], Z) * unit1[None, :])
            tl.store(sums + Z.C_PAD * Z.HIDDEN + ch[:, None] * Z.HIDDEN + hid[None, :], _upright(g2[i], Z) * unit2[None, :])
        gb = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], _upright(gb, Z), 0.0), 1)  # its columns are alike
        tl.store(sums + 2 * Z.HIDDEN * Z.C_PAD + ch, gb)


@triton.jit
def _inner_bwd_attention_kernel(x_ptr, dx_ptr, w, attn_scale_ptr, sums_ptr, n_patches, eps, Z: tl.constexpr):
    """dx, in place: from the gradient of what comes behind the attention to that of its input.

    The sums a program: q, k, v and projection [4, C_PAD, LANES], the projection's bias [C_PAD].
    """
    ch = tl.arange(0, Z.C_PAD)
    heads = _kept_heads(w, Z)
    N: tl.constexpr = len(heads)
    g = accumulators(4 * N, Z.C_PAD, Z.W, Z.WIDE)  # of queries, keys, values and projections, N each
    gb = accumulators(1, Z.C_PAD, 16, Z.WIDE)[0]
    matrices = _matrices(Z)
    own = matrices[3]
    patch, token, offset = _layout(Z)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_patches, Z.G), tl.num_programs(0), num_stages=Z.STAGES):
        first, alive, mask = _place(tile, patch, token, n_patches, Z)
        tokens = tl.load(x_ptr + first + offset, mask=mask, other=0.0)  # [ROWS, C_PAD]
        dy = tl.load(dx_ptr + first + offset, mask=mask, other=0.0)
        _, h, rstd = _norm(tokens, alive, eps, matrices, Z)
        dz = scaled(dy, attn_scale_ptr, tile * Z.G + patch, n_patches)

        # q is log2 e times as large, for exp2; so are dk and what q and k give to dh. dv is made so, too: then dh and, by the
        # host, the sums are scaled back, which is less than scaling the gradient of every score
        dh = tl.full((Z.ROWS, Z.C_PAD), 0.0, tl.float32)
        newq, newk, newv, newp = (), (), (), ()
        for i in tl.static_range(N):
            wq, wk, wv, wp = heads[i]
            q, k, v, p, o, inverse = _heads((h,), heads[i], matrices, Z)
            do = tl.reshape(dot(dz, tl.trans(wp), Z), (Z.G, Z.T, Z.W))
            do = (do * inverse).to(Z.DTYPE)  # P's normalisation, which P itself then needs nowhere
            # the softmax's backward: dP minus its mean over P, in float32: where P is about 1, the two are large and cancel
            ds = tl.reshape(dot(do, tl.permute(v, (0, 2, 1)), Z), (Z.G, Z.T, Z.HG, Z.T))
            p4 = tl.reshape(p, (Z.G, Z.T, Z.HG, Z.T))
            mean, weight = tl.sum(p4 * ds, 3), tl.sum(p4, 3)
            if Z.EXACT:  # twice: what the first mean's rounding left, of a P near 1, is as large as what is sought
                ds -= tl.div_rn(mean, weight)[:, :, :, None]
                mean = tl.div_rn(tl.sum(p4 * ds, 3), weight)
            else:
                near = reciprocal(weight, Z.FAST)
                mean *= near + near * (1.0 - weight * near)  # a Newton step: of 1, the reciprocal is 1, to the bit
            ds = tl.reshape(p4 * (ds - mean[:, :, :, None]), (Z.G, Z.T, Z.HG * Z.T)).to(Z.DTYPE)
            dq = tl.reshape(dot(ds, k, Z).to(Z.DTYPE), (Z.ROWS, Z.W))
            dk = dot(tl.permute(ds, (0, 2, 1)), q, Z)  # [G, HG·T, W]
            dv = dot(tl.permute(p.to(Z.DTYPE), (0, 2, 1)), do, Z)
            dk = tl.sum(tl.where(own, tl.reshape(dk, (Z.G, Z.HG, Z.T, Z.W)), 0.0), 1)
            dv = tl.sum(tl.where(own, tl.reshape(dv, (Z.G, Z.HG, Z.T, Z.W)), 0.0), 1) * LOG2_E
            dk = tl.reshape(dk.to(Z.DTYPE), (Z.ROWS, Z.W))
            dv = tl.reshape(dv.to(Z.DTYPE), (Z.ROWS, Z.W))
            dh = dot(dq, tl.trans(wq[0]), Z, dh)
            dh = dot(dk, tl.trans(wk[0]), Z, dh)
            dh = dot(dv, tl.trans(wv[0]), Z, dh)
            if sums_ptr is not None:
                o = tl.reshape(o.to(Z.DTYPE), (Z.ROWS, Z.W))
                newq = newq + (_add_sum(g[i], h, dq, n_patches, Z),)
                newk = newk + (_add_sum(g[N + i], h, dk, n_patches, Z),)
                newv = newv + (_add_sum(g[2 * N + i], h, dv, n_patches, Z),)
                newp = newp + (_add_sum(g[3 * N + i], dz, o, n_patches, Z),)
        if sums_ptr is not None:
            g = newq + newk + newv + newp
            gb = _add_sum(gb, dz, tl.full((Z.ROWS, 16), 1.0, Z.DTYPE), n_patches, Z)
        dx = _norm_gradient(dh, h, rstd * 0.6931471805599453, Z)
        dx += tl.dot(dy, matrices[0]) if Z.BY_PRODUCT else dy
        tl.store(dx_ptr + first + offset, dx.to(Z.DTYPE), mask=mask)

    if sums_ptr is not None:
        sums = sums_ptr + tl.cast(tl.program_id(0), tl.int64) * ((4 * Z.LANES + 1) * Z.C_PAD)
        for i in tl.static_range(N):
            at = ch[:, None] * Z.LANES + (i * Z.W + tl.arange(0, Z.W))[None, :]
            for of in tl.static_range(4):
                tl.store(sums + of * Z.C_PAD * Z.LANES + at, _upright(g[of * N + i], Z))
        gb = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], _upright(gb, Z), 0.0), 1)  # its columns are alike
        tl.store(sums + 4 * Z.C_PAD * Z.LANES + ch, gb)


@triton.jit
def _inner_bwd_kernel(
    x_ptr, dy_ptr, dx_ptr, w, attn_scale_ptr, mlp_scale_ptr, mlp_sums_ptr, attention_sums_ptr, n_patches, eps, Z: tl.constexpr
):  # fmt: skip
    """Both halves, over the same tiles: what the second reads of dx, other threads of the same program have written.

    Every program has a tile. That it is asked keeps the compiler from having what both halves need, the weights, in registers
    throughout, which spill.
    """
    if tl.program_id(0) < n_patches:
        _inner_bwd_mlp_kernel(x_ptr, dy_ptr, dx_ptr, w, attn_scale_ptr, mlp_scale_ptr, mlp_sums_ptr, n_patches, eps, Z)
    tl.debug_barrier()
    if tl.program_id(0) < n_patches:
        _inner_bwd_attention_kernel(x_ptr, dx_ptr, w, attn_scale_ptr, attention_sums_ptr, n_patches, eps, Z)


@triton.jit
def _channel(lane, PAD: tl.constexpr, D: tl.constexpr, H: tl.constexpr):
    """Which one a lane stands for, of H times D that have PAD lanes each, and whether it stands for one."""
    return lane // PAD * D + lane % PAD, (lane % PAD < D) & (lane // PAD < H)


@triton.jit
def _unfolded(
    ch, left, norm, one, two, N: tl.constexpr, LANES: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    Z: tl.constexpr,
):  # fmt: skip
    """Of N linear(LN x): of channel ch the gradients of their weights and of LN's scale and shift; of the first, of all biases.

    The sums: the normalised x before scale and shift, and a one behind it, times the gradients of the results. ``norm``: scale
    and shift, and where their gradients go; ``one``, of q and k or fc1, and ``two``, of v: where the weight lies, and where the
    gradients of weight and bias go.
    """
    SUM: tl.constexpr = Z.C_PAD * LANES
    shift = tl.arange(0, 2)  # behind the channel's
    scales = load(norm[0], ch + 0 * shift, shift == 0) + load(norm[1], ch + 0 * shift, shift == 1)
    d_norm = tl.full((2,), 0.0, tl.float32)
    row = (shift * (Z.C - ch) * LANES)[:, None]
    for of in range(N):
        for begin in range(0, LANES, Z.COLUMNS):
            lane = begin + tl.arange(0, Z.COLUMNS)
            out, used = _channel(lane, PAD, D, H)
            at_one, first, second = of * Z.C + out, used & (of < (N + 1) // 2), used & (of >= (N + 1) // 2)
            weight = load(one[0], at_one * Z.C + ch, first) + load(two[0], out * Z.C + ch, second)
            real = tl.broadcast_to((lane < LANES)[None, :], (2, Z.COLUMNS))
            col = ch * LANES + row + lane[None, :]
            total = added_up(left[0] + of * SUM, left[1], ((N + 1) * LANES + 1) * Z.C_PAD, col, real, Z)
            if N == 3:  # q's weight had log2 e/√D, k and v are log2 e times as large themselves
                total *= tl.where(of == 0, 1.0 / Z.D**0.5, 0.6931471805599453)
            total = tl.where(used[None, :], total, 0.0)
            d_norm += tl.sum(total * weight[None, :], 1)
            d_weight = tl.sum(total * scales[:, None], 0)
            store(one[1], at_one * Z.C + ch, d_weight, first)
            store(two[1], out * Z.C + ch, d_weight, second)
            if ch == 0:
                d_bias = tl.sum(tl.where((shift == 1)[:, None], total, 0.0), 0)
                store(one[2], at_one, d_bias, first)
                store(two[2], out, d_bias, second)
    store(norm[2], ch + 0 * shift, d_norm, shift == 0)
    store(norm[3], ch + 0 * shift, d_norm, shift == 1)


@triton.jit
def _straight(
    block, left, weight_ptr, bias_ptr, N: tl.constexpr, LANES: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr,
    H: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """Of the linear whose sums are behind those of N others: gradients of its weight, and in the last blocks of its bias."""
    SUM: tl.constexpr = Z.C_PAD * LANES
    BLOCKS: tl.constexpr = (Z.C * LANES + Z.COLUMNS - 1) // Z.COLUMNS
    is_bias = block >= BLOCKS
    at = (block - tl.where(is_bias, BLOCKS, 0)) * Z.COLUMNS + tl.arange(0, Z.COLUMNS)[None, :]
    real = at < tl.where(is_bias, Z.C, Z.C * LANES)
    first = tl.where(is_bias, (N + 1) * SUM, N * SUM)
    total = added_up(left[0] + first, left[1], ((N + 1) * LANES + 1) * Z.C_PAD, at, real, Z)
    if is_bias:
        store(bias_ptr, at, total, real)
    else:
        out, used = _channel(at % LANES, PAD, D, H)
        store(weight_ptr, at // LANES * (D * H) + out, total, real & used)


@triton.jit
def _inner_totals_kernel(mlp_ptr, attention_ptr, n_mlp, n_attention, w, d, y_ptr, parts, Z: tl.constexpr):
    """Gradients ``d`` of the weights, from so many rows that the backward's programs left; behind them what ``totalled`` does.

    The longest programs first: a channel of the MLP's, of the attention's; then columns of fc2, of the projection.
    """
    FC2: tl.constexpr = Z.FC2
    PROJ: tl.constexpr = Z.PROJ
    program = tl.program_id(0)
    ch = program % Z.C
    block = tl.minimum(tl.maximum(program - 2 * Z.C, 0), FC2 + PROJ)  # what parts may have is more than 32 bits count
    mlp, attention = (mlp_ptr, n_mlp), (attention_ptr, n_attention)
    if program < Z.C:
        norm = w.norm2_weight, w.norm2_bias, d.norm2_weight, d.norm2_bias
        fc1 = w.fc1_weight, d.fc1_weight, d.fc1_bias
        _unfolded(ch, mlp, norm, fc1, (None, None, None), 1, Z.HIDDEN, Z.HIDDEN, Z.M, 1, Z)
    elif program < 2 * Z.C:
        norm = w.norm1_weight, w.norm1_bias, d.norm1_weight, d.norm1_bias
        qk, v = (w.qk_weight, d.qk_weight, d.qk_bias), (w.v_weight, d.v_weight, d.v_bias)
        _unfolded(ch, attention, norm, qk, v, 3, Z.LANES, Z.D_PAD, Z.D, Z.H, Z)
    elif block < FC2:
        _straight(block, mlp, d.fc2_weight, d.fc2_bias, 1, Z.HIDDEN, Z.HIDDEN, Z.M, 1, Z)
    elif block < FC2 + PROJ:
        _straight(block - FC2, attention, d.proj_weight, d.proj_bias, 3, Z.LANES, Z.D_PAD, Z.D, Z.H, Z)
    elif parts is not None:
        totalled(program.to(tl.int64) - Z.PROGRAMS, y_ptr, parts, Z)


# ---- on the host ----


@remembered
def _specialise(kernel: Any, dtype: torch.dtype, S: int, C: int, H: int, M: int) -> Launch:
    """One of the kernels for these sizes."""
    half = dtype != torch.float32
    T, c_pad = max(16, triton.next_power_of_2(S)), max(16, triton.next_power_of_2(C + 1))
    sums = kernel is _inner_totals_kernel  # of what the backward left, in its chunks
    backward = _inner_bwd_mlp_kernel if c_pad >= 64 else _inner_bwd_kernel
    config = CONFIGS[(backward if sums else kernel).__name__][c_pad, half]
    # up to 128 rows of keys and values: shared memory has no room for more in float32
    d_pad = max(triton.next_power_of_2(C // H), T // 8 if T > 16 else 1)
    hg = max(1, 16 // d_pad)
    # what is kept on the chip of the weights leaves 24 KiB for the rest, on the smallest GPUs with 99 KiB
    head_bytes, mlp_bytes = 4 * c_pad * -(-H // hg) * hg * d_pad * dtype.itemsize, 2 * c_pad * M * dtype.itemsize
    fit = head_bytes <= 64 << 10
    kind, more = (SumSizes, {"BLOCK": CONFIG.rows, "COLUMNS": columns()}) if sums else (Sizes, {})
    more["STAGES"] = (CONFIG if sums else config).stages
    sizes = kind.computed(
        dtype, S=S, C=C, H=H, M=M, T=T, G=max(1, config.rows // T), C_PAD=c_pad, D_PAD=d_pad, HG=hg, CHUNK=config.chunk,
        BACKWARD=kernel is not _inner_fwd_kernel, KEEP_HEADS=kernel is not _inner_fwd_kernel or fit,
        MLP_FITS=c_pad < (128 if half else 64) and M <= 256 and mlp_bytes + fit * head_bytes <= 72 << 10, **more,
    )  # fmt: skip
    if sums:  # as totals' it stands for a call of batch 256 with 196 patches an image
        return Launch(kernel, {"Z": sizes}, CONFIG, 256 * 196)
    return Launch(kernel, {"Z": sizes}, config, sizes.G, loops=2 if kernel is _inner_bwd_kernel else 1)


class Inner(Operation):
    """The inner transformer; its limits are those of registers and shared memory."""

    twin = staticmethod(reference.inner)
    activations = ("pixel",)
    factors = ("attn_scale", "mlp_scale")
    together = (("qk_bias", "v_bias"),)
    shapes = dict(pixel="P S C", attn_scale="P", mlp_scale="P") | transformer_shapes("C")
    limits = {"C": 96, "D": 32, "S": 64, "M": 384, "P*S": operation.MOST_ROWS}

    def gradients_unsupported(self, sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> list[str]:
        """Where the sums of the weights' gradients do not fit on the chip."""
        S, C, M = sizes["S"], sizes["C"], sizes["M"]
        reasons = beyond({"C": 31 if dtype == torch.float32 else 63}, sizes, f" in {dtype}; the backward takes")
        reasons += beyond({"S": 16, "M": 256}, sizes, "; the backward takes")
        if (C > 31 or (dtype == torch.float32 and C > 15 and M > 128)) and not reasons and not torch.compiler.is_compiling():
            shared, most = operation.runner.shared_memory(device), 115  # KiB, of any heads in float32
            if C > 31:  # TNT-B has 96; sm_86, sm_89 and sm_120 have 99
                Z = _specialise(_inner_bwd_mlp_kernel, dtype, S, C, sizes["H"], M).constants["Z"]
                most = max(Z.HIDDEN // 4 + 56, Z.LANES // 2 + (64 if Z.D_PAD == 16 else 80))
            if shared is not None and shared < most << 10:
                reasons.append(f"C={C} channels in {dtype} need up to {most} KiB of shared memory; this GPU has {shared >> 10}")
        return reasons

    def multiply_adds(self, a: SimpleNamespace) -> int:
        P, S, C = a.pixel
        return P * S * (4 * C * C + 2 * C * a.weights.fc1_weight[0] + 2 * S * C)

    def _launched(self, kernel: Any, a: SimpleNamespace, M: int, blocks: int = 0) -> tuple[Launch, int]:
        """A kernel over all patches, of a plan, and its grid; ``blocks``: of copies."""
        P, S, C = a.pixel.shape
        spec = _specialise(kernel, a.pixel.dtype, S, C, a.num_heads, M)
        return spec.again(), programs(a.pixel.device, max(-(-P // spec.patches), blocks), spec.config.per_sm)

    def prepared(self, a: SimpleNamespace, norms: bool = False) -> Callable[..., None]:
        """``norms``: what launches it is given a ``Norm``, too, where ``norms`` says so; and copies, of one dtype each way."""
        P, M = a.pixel.shape[0], a.weights.fc1_weight.shape[0]
        launches: dict[int, tuple[Launch, int]] = {}  # by how many copies: of calls that are alike some may need none

        def run(a: SimpleNamespace, out: Tensor, norm: Norm = NO_NORM, copies: Sequence[Copy] = ()) -> None:
            found = launches.get(len(copies))
            if found is None:
                blocks = sum([-(-copy.n // COPIED.value) for copy in copies])
                spec, grid = self._launched(_inner_fwd_kernel, a, M, blocks)
                if norms:
                    spec = spec._replace(config=spec.config._replace(registers=NORMS[spec.constants["Z"].C_PAD]))
                found = launches[len(copies)] = spec, grid
            launch(*found, a.pixel.contiguous(), out, a.weights, *_scales(a), norm, tuple(copies) or None, P, a.eps)

        return run

    def norms(self, a: SimpleNamespace) -> bool:
        """Whether what is ``prepared`` had better make the LayerNorm over each patch of the result, too: a ``Norm``."""
        (_, S, C), M = a.pixel.shape, a.weights.fc1_weight.shape[0]
        Z = _specialise(_inner_fwd_kernel, a.pixel.dtype, S, C, a.num_heads, M).constants["Z"]
        return Z.C_PAD in NORMS and Z.T == 16 and not Z.EXACT

    def graded(
        self, gradient: Tensor, a: SimpleNamespace, needed: set[str]
    ) -> Callable[[Tensor, SimpleNamespace], dict[str, Tensor]]:
        begun, finished = self.halves(a, needed)

        def run(gradient: Tensor, a: SimpleNamespace) -> dict[str, Tensor]:
            found, left = begun(gradient, a)
            return found | finished(a, left, {})[0]

        return run

    def halves(self, a: SimpleNamespace, needed: set[str]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What ``graded`` does: the pixels' gradient, and what its programs left; from that the weights', and beside them
        ``totals`` of parts in float32.

        By PyTorch, and all in the first half, for the sizes of ``gradients_unsupported``, and where the gradient of a scale is
        asked for.
        """
        (P, S, C), H, dtype = a.pixel.shape, a.num_heads, a.pixel.dtype
        M, has_sums = a.weights.fc1_weight.shape[0], needed != {"pixel"}
        reasons = self.gradients_unsupported(dict(S=S, C=C, H=H, M=M), dtype, a.pixel.device)
        if reasons or needed & {"attn_scale", "mlp_scale"}:
            return (
                lambda gradient, a: (self.recomputed(gradient, a, needed), None),
                lambda a, left, parts: ({}, totals(parts, torch.float32)),
            )
        of_weights = _specialise(_inner_totals_kernel, dtype, S, C, H, M).again()
        Z = of_weights.constants["Z"]
        if Z.WIDE:
            before, grid_before = self._launched(_inner_fwd_kernel, a, 0)
            mlp, grid = self._launched(_inner_bwd_mlp_kernel, a, M)
            attend, _ = self._launched(_inner_bwd_attention_kernel, a, M)
        else:
            both, grid = self._launched(_inner_bwd_kernel, a, M)

        def begun(gradient: Tensor, a: SimpleNamespace) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
            gradient, pixel, w, scales = gradient.to(dtype).contiguous(), a.pixel.contiguous(), a.weights, _scales(a)
            dx, of_mlp, of_attention = torch.empty_like(pixel), None, None
            if has_sums:  # a row of each program
                of_mlp = dx.new_empty((grid, (2 * Z.HIDDEN + 1) * Z.C_PAD), dtype=torch.float32)
                of_attention = dx.new_empty((grid, (4 * Z.LANES + 1) * Z.C_PAD), dtype=torch.float32)
            if Z.WIDE:  # the attention's weights have no room beside the MLP's: its result by a forward of no hidden channels
                none = w._replace(fc1_weight=w.fc1_weight[:0], fc2_bias=None)
                launch(before, grid_before, pixel, dx, none, scales[0], None, NO_NORM, None, P, a.eps)
                launch(mlp, grid, dx, gradient, dx, w, *scales, of_mlp, P, a.eps)
                launch(attend, grid, pixel, dx, w, scales[0], of_attention, P, a.eps)
            else:
                launch(both, grid, pixel, gradient, dx, w, *scales, of_mlp, of_attention, P, a.eps)
            return {"pixel": dx}, (of_mlp, of_attention)

        def finished(
            a: SimpleNamespace, left: tuple[Tensor, ...], parts: Mapping[tuple[str, ...], Tensor]
        ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            if not has_sums:
                return {}, totals(parts, torch.float32)
            w, sums = a.weights, Sums(parts, torch.float32)
            new = type(w)(*[None if x is None else torch.empty_like(x) for x in w])
            rows = [x.shape[0] for x in left]
            launch(of_weights, Z.PROGRAMS + sums.programs, *left, *rows, w, new, sums.result, sums.parts)
            return new._asdict(), sums.by_name()

        return begun, finished


def _scales(a: SimpleNamespace) -> list[Tensor | None]:
    """Of the residual branches, as the kernels read them."""
    return [None if x is None else x.float().contiguous() for x in (a.attn_scale, a.mlp_scale)]


inner = Inner()
"""``reference.inner``, fused; called like that."""
