"""norm: LayerNorm over the rows of a matrix with what lies around it; what fold and outer have between the library's products.

    y = LN(x), rest = x + later                                forward: the next product's input, and what it is added to
    y[b, 0] = patch[b, 0], y[b, 1 + n] = patch[b, 1 + n] + LN(z[b·N + n] + shift)          add: of fold, with or without LN,
                                                          and then, for outer, LN(y) and y + later, or both sums
    dx = rstd · (γg − mean(γg) − x̂ · mean(γg · x̂)) + rest, dγ = Σ g · x̂, dβ = Σ g, Σ dx, Σ rest     backward of LN(x + shift)
    dx of LN(x), and of that, as g, dz of LN(z + shift), whose rows have no class tokens            both norms of add, backward

with x̂ a normalised row, g the gradient of y, rest that of what else reads x: of outer, the branch's and the residual's. Σ dx is
the gradient of shift, and of a bias that is added before. Statistics are float32. Bytes moved: each tensor once. Sums over rows
are kept in float32 by a program over all its tiles, for totals.py: no atomics, the same input gives the same bits.

Both norms of add backwards in one launch move seven tensors for eight: dx is not read again, and the second norm takes it
before it is rounded. A row lies there in pieces of powers of two: four sums of 384 values are 48 registers, of a row padded
to 512 64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, contiguous, derived, launch, piece, programs, remembered
from tnt_fast.kernels.tile import (
    accumulators,
    centred,
    columns,
    load,
    load_rows,
    load_vector,
    plus,
    plus_product,
    standardised,
    store_rows,
    sums_of_rows,
)

# Values a tile, values a thread; of the backward also programs a multiprocessor, and tiles on their way at once: with one it
# waits for memory half of its time. Among the best of 40 on an H200 for TNT-S and TNT-B (results/2026-11-26-1929/sweep.txt).
VALUES, EACH, PER_SM, STAGES = 1024, 32, 8, 3
WIDEST = 16384  # row of which a program holds several copies in registers
OF_BOTH = 512  # values a tile of two norms' backward, of a warp that has a row at least: 8 fit on a multiprocessor, 12 of TNT-S


class Weights(NamedTuple):
    """Of LN(z + shift), of LN(y), which ``add`` alone reads, and what y is stored with; any may be None."""

    shift: Any = None
    weight: Any = None
    bias: Any = None
    next_weight: Any = None
    next_bias: Any = None
    later: Any = None


class Gradients(NamedTuple):
    """What the backward writes: the gradient of x, LN(x) again, ``partial_sums``; of two norms that of z; any may be None."""

    dx: Any
    y: Any
    sums: Any
    dz: Any = None


class Added(NamedTuple):
    """What x = patch + LN(z + shift) was made with: z and its gradient, which may be None, (B·(T − 1), W), and that norm."""

    z: Tensor
    weight: Tensor
    shift: Tensor | None
    dz: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Rows of W values; of the backward: GROUPED, the gradient's lie in groups, SUMS, how many sums it makes."""

    W: int
    W_PAD: int
    BLOCK: int
    GROUPED: bool = False
    SUMS: int = 0


@dataclass(frozen=True, kw_only=True)
class SizesOfBoth(operation.Sizes):
    """Rows of W values in pieces of CHUNK; SUMS, how many sums there are."""

    W: int
    BLOCK: int
    CHUNK: int
    SUMS: int
    PIECES: int = derived(lambda Z: -(-Z.W // Z.CHUNK))


@triton.jit
def _standardised(x, eps, Z: tl.constexpr):
    """Rows that are zero past W, x̂ [BLOCK, W_PAD], zero there, too, and 1/σ [BLOCK]."""
    real = tl.arange(0, Z.W_PAD) < Z.W
    if Z.EXACT:
        x = centred(x, real, Z.W, Z.EXACT)
    else:  # of equal values in half precision 0 is left, to the bit: their sum is exact, and so is its rounded division
        mean = tl.div_rn(tl.sum(x, 1), tl.full((Z.BLOCK,), Z.W, tl.float32))
        x = tl.where(real[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / Z.W) + eps)
    return x * rstd[:, None], rstd


@triton.jit
def _norm_kernel(x_ptr, y_ptr, weight_ptr, bias_ptr, rest_ptr, later_ptr, n_rows, eps, Z: tl.constexpr):
    """``rest_ptr`` may be ``x_ptr``."""
    row = tl.program_id(0).to(tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
    col = tl.arange(0, Z.W_PAD)
    real = col < Z.W
    mask = (row < n_rows)[:, None] & real[None, :]
    at = row[:, None] * Z.W + col[None, :]
    values = load(x_ptr + row[:, None] * Z.W, col[None, :], mask)  # [BLOCK, W_PAD]
    x, _ = _standardised(values, eps, Z)
    y = x * load(weight_ptr, col, real)[None, :] + load(bias_ptr, col, real)[None, :]
    tl.store(y_ptr + at, y.to(Z.DTYPE), mask=mask)
    if rest_ptr is not None:
        tl.store(rest_ptr + at, (values + load(later_ptr, col, real)[None, :]).to(Z.DTYPE), mask=mask)


@triton.jit
def _norm_add_kernel(
    z_ptr, w, patch_ptr, y_ptr, h_ptr, rest_ptr, n_rows, n_tokens, stride_image, stride_token, eps, Z: tl.constexpr
):  # fmt: skip
    """Rows are those of y; without ``w.weight`` z is added as it is; ``h_ptr``: for LN(y), and then y + later in its place, or
    beside it in ``rest_ptr``."""
    row = tl.program_id(0).to(tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
    col = tl.arange(0, Z.W_PAD)
    real = col < Z.W
    mask = (row < n_rows)[:, None] & real[None, :]
    image, token = (row.to(tl.int32) // n_tokens).to(tl.int64), row.to(tl.int32) % n_tokens
    folded = mask & (token > 0)[:, None]  # the class token has no pixels
    z = load(z_ptr + (row - image - 1)[:, None] * Z.W, col[None, :], folded) + load(w.shift, col, real)[None, :]
    if w.weight is not None:
        z, _ = _standardised(z, eps, Z)  # [BLOCK, W_PAD]
        z = z * load(w.weight, col, real)[None, :] + load(w.bias, col, real)[None, :]
    patch = load(patch_ptr + (image * stride_image + token.to(tl.int64) * stride_token)[:, None], col[None, :], mask)
    y = patch + tl.where((token > 0)[:, None], z, 0.0)
    at = row[:, None] * Z.W + col[None, :]
    if h_ptr is not None:
        if rest_ptr is not None:
            y = y.to(Z.DTYPE).to(tl.float32)  # what is kept, from which the backward makes LN(y) again
        h, _ = _standardised(tl.where(real[None, :], y, 0.0), eps, Z)  # known zeros
        h = h * load(w.next_weight, col, real)[None, :] + load(w.next_bias, col, real)[None, :]
        tl.store(h_ptr + at, h.to(Z.DTYPE), mask=mask)
        rest = y + load(w.later, col, real)[None, :]
        if rest_ptr is None:
            y = rest
        else:
            tl.store(rest_ptr + at, rest.to(Z.DTYPE), mask=mask)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_bwd_kernel(
    x_ptr, w, gradient_ptr, rest_ptr, out, n_rows, n_group, stride_group, stride_row, eps, Z: tl.constexpr
):  # fmt: skip
    """dx, which may lie where the rest does, LN(x) again, and a program's sums over its rows.

    GROUPED: the rows of the incoming gradient lie in groups of ``n_group``, the patches of an image.
    """
    col = tl.arange(0, Z.W_PAD)
    real = col < Z.W
    gamma, beta, shift = load(w.weight, col, real), load(w.bias, col, real), load(w.shift, col, real)
    # whole tiles are summed, and their rows only at the end: no reduction between the warps in a tile
    d_weight = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    d_bias = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    d_x = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    d_rest = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, Z.BLOCK), tl.num_programs(0), num_stages=Z.STAGES):
        row = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        mask = (row < n_rows)[:, None] & real[None, :]
        start = row[:, None] * Z.W
        x = load(x_ptr + start, col[None, :], mask) + shift[None, :]
        # of rows past the last all is 0: their 1/σ has to be finite, without an eps, too
        x, rstd = _standardised(x, tl.where(row < n_rows, eps, 1.0), Z)  # [BLOCK, W_PAD], [BLOCK]
        if out.y is not None:
            y = x * gamma[None, :] + beta[None, :]
            tl.store(out.y + start + col[None, :], y.to(Z.DTYPE), mask=mask)
        if Z.GROUPED:
            patch = row.to(tl.int32)
            source = (patch // n_group).to(tl.int64) * stride_group + (patch % n_group).to(tl.int64) * stride_row
        else:
            source = row * stride_row
        g = load(gradient_ptr + source[:, None], col[None, :], mask)  # [BLOCK, W_PAD]
        if Z.SUMS > 0:
            d_weight += g * x
            d_bias += g
        if out.dx is not None or Z.SUMS > 2:
            g = g * gamma[None, :]
            along = tl.sum(g * x, 1) * (1.0 / Z.W)
            dx = (g - (tl.sum(g, 1) * (1.0 / Z.W))[:, None] - x * along[:, None]) * rstd[:, None]
            if rest_ptr is not None:
                rest = load(rest_ptr + start, col[None, :], mask)
                dx += rest
                if Z.SUMS > 3:
                    d_rest += rest
            if Z.SUMS > 2:
                d_x += dx
            if out.dx is not None:
                tl.store(out.dx + start + col[None, :], dx.to(Z.DTYPE), mask=mask)
    if Z.SUMS > 0:
        sums = out.sums + tl.program_id(0).to(tl.int64) * (Z.SUMS * Z.W) + col
        tl.store(sums, tl.sum(d_weight, 0), mask=real)
        tl.store(sums + Z.W, tl.sum(d_bias, 0), mask=real)
        if Z.SUMS > 2:
            tl.store(sums + 2 * Z.W, tl.sum(d_x, 0), mask=real)
        if Z.SUMS > 3:
            tl.store(sums + 3 * Z.W, tl.sum(d_rest, 0), mask=real)


@triton.jit
def _gradient(g, x, rstd, gamma, Z: tl.constexpr):
    """Of what a norm reads, from that of what it makes: x in pieces."""
    PIECES: tl.constexpr = Z.PIECES
    scaled = ()
    for i in tl.static_range(PIECES):
        scaled = scaled + (g[i] * gamma[i],)
    mean, along = sums_of_rows(scaled, x, Z)
    mean, along = (mean * (1.0 / Z.W))[:, None], (along * (1.0 / Z.W))[:, None]
    found = ()
    for i in tl.static_range(PIECES):
        found = found + ((scaled[i] - mean - x[i] * along) * rstd[:, None],)
    return found


@triton.jit
def _store_sums(ptr, total, Z: tl.constexpr):
    PIECES: tl.constexpr = Z.PIECES
    for i in tl.static_range(PIECES):
        col, real = columns(i, Z)
        tl.store(ptr + col, tl.sum(total[i], 0), mask=real)


@triton.jit
def _norms_bwd_kernel(x_ptr, w, gradient_ptr, rest_ptr, z_ptr, out, n_rows, n_tokens, eps, Z: tl.constexpr):
    """What ``_norm_add_kernel`` with ``h_ptr`` does, backwards: rows are those of x, and the norm of z reads dx before it is
    rounded. dx may lie where the rest does. Sums of the norm of x, then of that of z."""
    PIECES: tl.constexpr = Z.PIECES
    gamma, beta = load_vector(w.next_weight, Z), load_vector(w.next_bias, Z)
    gamma_z, shift = load_vector(w.weight, Z), load_vector(w.shift, Z)
    nothing = accumulators(PIECES, Z.BLOCK, Z.CHUNK)
    d_weight, d_bias, d_weight_z, d_bias_z, d_shift = nothing, nothing, nothing, nothing, nothing
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, Z.BLOCK), tl.num_programs(0), num_stages=Z.STAGES):
        row = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        alive, start = row < n_rows, row * Z.W
        image, token = (row.to(tl.int32) // n_tokens).to(tl.int64), row.to(tl.int32) % n_tokens
        folded, start_z = alive & (token > 0), (row - image - 1) * Z.W  # the class token has no pixels
        # of rows that are not there all is 0: their 1/σ has to be finite, without an eps, too
        x, rstd = standardised(load_rows(x_ptr, start, alive, Z), tl.where(alive, eps, 1.0), Z)
        if out.y is not None:
            store_rows(out.y, start, alive, plus_product(beta, x, gamma, Z), Z)
        g = load_rows(gradient_ptr, start, alive, Z)
        d_weight, d_bias = plus_product(d_weight, g, x, Z), plus(d_bias, g, Z)
        dx = plus(_gradient(g, x, rstd, gamma, Z), load_rows(rest_ptr, start, alive, Z), Z)
        store_rows(out.dx, start, alive, dx, Z)

        z = plus(load_rows(z_ptr, start_z, folded, Z), shift, Z)
        z, rstd = standardised(z, tl.where(folded, eps, 1.0), Z)
        g = ()
        for i in tl.static_range(PIECES):
            g = g + (tl.where(folded[:, None], dx[i], 0.0),)
        d_weight_z, d_bias_z = plus_product(d_weight_z, g, z, Z), plus(d_bias_z, g, Z)
        if out.dz is not None or Z.SUMS > 4:
            dz = _gradient(g, z, rstd, gamma_z, Z)
            store_rows(out.dz, start_z, folded, dz, Z)
            if Z.SUMS > 4:
                d_shift = plus(d_shift, dz, Z)
    sums = out.sums + tl.program_id(0).to(tl.int64) * (Z.SUMS * Z.W)
    _store_sums(sums, d_weight, Z)
    _store_sums(sums + Z.W, d_bias, Z)
    _store_sums(sums + 2 * Z.W, d_weight_z, Z)
    _store_sums(sums + 3 * Z.W, d_bias_z, Z)
    if Z.SUMS > 4:
        _store_sums(sums + 4 * Z.W, d_shift, Z)


# ---- on the host ----


@remembered
def specialise(kernel: Any, dtype: torch.dtype, W: int, grouped: bool = False, sums: int = 0) -> Launch:
    if kernel is _norms_bwd_kernel:
        chunk = piece(W)
        block = max(1, OF_BOTH // (-(-W // chunk) * chunk))
        both = SizesOfBoth.computed(dtype, W=W, BLOCK=block, CHUNK=chunk, STAGES=STAGES, SUMS=sums)
        return Launch(kernel, {"Z": both}, Config(block, warps=1, per_sm=PER_SM, stages=STAGES), block)
    pad = triton.next_power_of_2(W)
    block = max(1, VALUES // pad)
    per_sm, stages = (PER_SM, STAGES) if kernel is _norm_bwd_kernel else (0, 1)  # the others take one tile a program
    config = Config(block, warps=min(16, max(1, block * pad // (32 * EACH))), per_sm=per_sm, stages=stages)
    sizes = Sizes.computed(dtype, W=W, W_PAD=pad, BLOCK=block, STAGES=stages, GROUPED=grouped, SUMS=sums)
    return Launch(kernel, {"Z": sizes}, config, block)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rest: Tensor | None = None, later: Tensor | None = None
) -> Tensor:
    """LayerNorm of the rows of a contiguous matrix; ``rest``, which may be ``x``, becomes x + later."""
    return prepared(*x.shape, x.dtype)(x, contiguous(weight), contiguous(bias), eps, rest, contiguous(later))


def prepared(rows: int, W: int, dtype: torch.dtype, again: bool = False) -> Callable[..., Tensor]:
    """``forward`` of matrices of a shape and a dtype, and contiguous weights; ``again``: of ever the same ones."""
    spec = specialise(_norm_kernel, dtype, W)
    spec = spec.again() if again else spec
    tiles = -(-rows // spec.config.rows)

    def normed(
        x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rest: Tensor | None = None, later: Tensor | None = None
    ) -> Tensor:
        y = torch.empty_like(x)
        launch(spec, tiles, x, y, weight, bias, rest, later, rows, eps)
        return y

    return normed


def adding(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> Callable[..., Tensor | None]:
    """Of z (B·(T − 1), W) of a dtype, and patches of a shape (B, T, W) and any strides: their sum, contiguous, into ``out``.

    z with its LayerNorm; with weights of a next LayerNorm that of the sum (B·T, W) comes back, and ``later`` is added to
    ``out``, or beside it to ``rest`` (B·T, W). The weights are contiguous.
    """
    (B, T, W), spec = shape, specialise(_norm_add_kernel, dtype, shape[2]).again()
    rows = B * T
    tiles = -(-rows // spec.config.rows)

    def added(z: Tensor, weights: Weights, patch: Tensor, out: Tensor, rest: Tensor | None = None) -> Tensor | None:
        h = None if weights.next_weight is None else z.new_empty((rows, W))
        image, token, value = patch.stride()
        if value != 1:
            patch = patch.contiguous()
            image, token, _ = patch.stride()
        launch(spec, tiles, z, weights, patch, out, h, rest, rows, T, image, token, eps)
        return h

    return added


def _of_backward(x: Tensor, grouped: bool = False, sums: int = 0, both: bool = False) -> tuple[Launch, int]:
    """What is launched for the rows of x, and on how many programs."""
    spec = specialise(_norms_bwd_kernel if both else _norm_bwd_kernel, x.dtype, x.shape[1], grouped, sums)
    return spec, programs(x.device, -(-x.shape[0] // spec.config.rows), PER_SM)


def partial_sums(x: Tensor, count: int, both: bool = False) -> Tensor:
    """For ``backward`` of the rows of x: (programs, ``count`` · W) in float32, whose rows ``totals`` adds up. ``both``: with
    ``added``."""
    return x.new_empty((_of_backward(x, sums=count, both=both)[1], count * x.shape[1]), dtype=torch.float32)


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor | None, sums: Tensor | None,
    shift: Tensor | None = None, rest: Tensor | None = None, y: Tensor | None = None, bias: Tensor | None = None,
    added: Added | None = None,
) -> None:  # fmt: skip
    """Of y = LN(x + shift) with ``gradient`` (groups, rows each, W), into what is given.

    Args:
        dx: like x; may be ``rest``. sums: ``partial_sums`` of dγ, dβ and, where there is room, Σ dx and Σ rest.
        rest: a gradient like x that is added to dx. y: like x; LN(x + shift) again, for which ``bias`` is read.
        added: where x is patch + LN(z + shift): the backward of that norm, too. Then ``gradient`` is one contiguous group, x
            has no shift, dx, rest and sums are there, and behind dγ and dβ these have those of that norm, and Σ dz of a shift.
    """
    count = 0 if sums is None else sums.shape[1] // x.shape[1]
    rows, grouped = x.shape[0], gradient.shape[0] > 1
    spec, grid = _of_backward(x, grouped, count, added is not None)
    if added is not None:
        weights, out = contiguous(Weights(added.shift, added.weight, None, weight, bias)), Gradients(dx, y, sums, added.dz)
        tokens = rows // (rows - added.z.shape[0])
        launch(spec, grid, x, weights, gradient, rest, added.z, out, rows, tokens, eps)
    else:
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        weights, out = contiguous(Weights(shift, weight, bias)), Gradients(dx, y, sums)
        launch(spec, grid, x, weights, gradient, rest, out, rows, gradient.shape[1], *gradient.stride()[:2], eps)
