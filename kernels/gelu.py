"""gelu: products of many rows in one launch with what is before or behind them: GELU, its gradient, LayerNorm.

    h = x Wᵀ + b, a = GELU(h)                                    W = fc1's (N, K); h where gradients are recorded
    a = GELU(h), dh = (d W) · GELU'(h), sums of dh over its rows      W = fc2's (K, N)
    y = LN(x) Wᵀ = 1/σ · (x (γW)ᵀ − mean · Σ γW) + Wβ           W = fold's (N, K), for its gradients; or in the place of x above
    x = x + a Wᵀ, moments of x                                      W = proj's (K, K), where LN(x) is what fc1 multiplies

A program has COLUMNS columns of the result and keeps its part of W on the chip; it takes tile after tile of BLOCK rows, of
which it loads a piece of CHUNK columns at a time, the first while the tile before ends. Two programs run on a multiprocessor,
so that one multiplies while the other waits or stores. That takes few bytes of the L2 cache, which bind such products: x is
read N / COLUMNS times, W once a program. What a product gives is rounded before it is rearranged, once for all that is
stored. Both operands are loaded to shared memory as they are; of LayerNorm W is multiplied by γ, once, and x as it is: rows are
normalised at the end. γW is rounded once, as LN(x) is elsewhere, and Σ γW is that of what was rounded, so that what a mean
adds is taken off again, but for float32's rounding. Statistics are made for every COLUMNS columns of a result anew: of fold's
in these programs; fc1's has too many, so the sum before it leaves the moments of its rows' parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, contiguous, derived, launch, remembered, sharing
from tnt_fast.kernels.tile import dot, gelu, gelu_gradient, load

CONFIG, COLUMNS, CHUNK = Config(64, warps=4, per_sm=2), 128, 128  # by simulation, of TNT-S on an H200
# Where the two launches for this one, the library's product and GELU's own kernel, were slower: on these architectures, at so
# many rows, and where the parts of W of two programs fit on a multiprocessor beside what they work on
CAPABILITIES, LEAST, WIDEST = ((9, 0),), 128 * 197, 384
NORMED_LEAST, NORMED_MOST = 192 * 196, 384  # rows, and columns of the result, of a product of LayerNorm's


class Weights(NamedTuple):
    """A matrix (N, K), and the LayerNorm of what it is multiplied by; the norm's bias may be None."""

    matrix: Any
    norm_weight: Any
    norm_bias: Any


class SumWeights(NamedTuple):
    """A matrix (N, K), what the rest is stored with, the next product's LayerNorm, its matrix (M, N) and bias; but matrices and
    the norm's weight may be None."""

    matrix: Any
    later: Any
    norm_weight: Any
    norm_bias: Any
    next_matrix: Any
    next_bias: Any


class Normed(NamedTuple):
    """For the product of LayerNorm's result: γW (M, N), Wβ + b and Σ γW (M,), moments of rows."""

    matrix: Any
    offset: Any
    sums: Any
    moments: Any


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Rows of K values to N, in GROUPS of columns; SUMS of a tile's rows have sums of their own until a program ends."""

    K: int
    N: int
    BLOCK: int
    COLUMNS: int
    CHUNK: int
    SUMS: int
    HIDDEN: int = 0  # rows of the matrix behind a LayerNorm that a sum's launch scales
    GROUPS: int = derived(lambda Z: Z.N // Z.COLUMNS)
    PIECES: int = derived(lambda Z: Z.K // Z.CHUNK)


@triton.jit
def _place(Z: tl.constexpr):
    """A program's columns, which of those that share them it is, and how many these are."""
    col = tl.program_id(0) % Z.GROUPS * Z.COLUMNS + tl.arange(0, Z.COLUMNS)
    return col, tl.program_id(0) // Z.GROUPS, tl.num_programs(0) // Z.GROUPS


@triton.jit
def _matrix(w_ptr, stride_k, stride_n, col, Z: tl.constexpr):
    """Columns of a matrix (K, N), a tuple of PIECES, [CHUNK, COLUMNS] each."""
    PIECES: tl.constexpr = Z.PIECES
    found = ()
    for i in tl.static_range(PIECES):
        at = i * Z.CHUNK + tl.arange(0, Z.CHUNK)
        found = found + (tl.load(w_ptr + at[:, None] * stride_k + col[None, :] * stride_n),)
    return found


@triton.jit
def _tile(tile, n_rows, Z: tl.constexpr):
    """Where its first row is, its rows from there, and which of them are real."""
    row = tl.arange(0, Z.BLOCK)
    return tl.cast(tile, tl.int64) * Z.BLOCK, row[:, None], (row < n_rows - tile * Z.BLOCK)[:, None]


@triton.jit
def _piece(x_ptr, i: tl.constexpr, tile, n_rows, Z: tl.constexpr):
    first, row, alive = _tile(tile, n_rows, Z)
    at = i * Z.CHUNK + tl.arange(0, Z.CHUNK)
    return tl.load(x_ptr + first * Z.K + row * Z.K + at[None, :], mask=alive, other=0.0)


@triton.jit
def _product(x_ptr, begun, matrix, tile, n_rows, Z: tl.constexpr):
    """Of a tile, whose first piece is here."""
    PIECES: tl.constexpr = Z.PIECES
    total = dot(begun, matrix[0], Z, tl.full((Z.BLOCK, Z.COLUMNS), 0.0, tl.float32))
    for i in tl.static_range(1, PIECES):
        total = dot(_piece(x_ptr, i, tile, n_rows, Z), matrix[i], Z, total)
    return total


@triton.jit
def _moments(moments_ptr, tile, Z: tl.constexpr):
    """What ``_sum_product_kernel`` leaves of the parts of a tile's rows: a tuple of means, one of sums of squares."""
    PARTS: tl.constexpr = Z.K // Z.COLUMNS
    at = moments_ptr + tl.cast(tile, tl.int64) * (2 * PARTS * Z.BLOCK) + tl.arange(0, Z.BLOCK)
    means, squares = (), ()
    for i in tl.static_range(PARTS):
        means = means + (tl.load(at + 2 * i * Z.BLOCK),)
        squares = squares + (tl.load(at + (2 * i + 1) * Z.BLOCK),)
    return means, squares


@triton.jit
def _combined(means, squares, eps, Z: tl.constexpr):
    """Mean and 1/σ of rows."""
    PARTS: tl.constexpr = Z.K // Z.COLUMNS
    mean, square = means[0] * (1.0 / PARTS), squares[0]
    for i in tl.static_range(1, PARTS):
        mean += means[i] * (1.0 / PARTS)
        square += squares[i]
    for i in tl.static_range(PARTS):
        square += Z.COLUMNS * (means[i] - mean) * (means[i] - mean)
    return mean, tl.rsqrt(square * (1.0 / Z.K) + eps)


@triton.jit
def _normalised(total, mean, rstd, sums, bias, Z: tl.constexpr):
    """1/σ · (total − mean · sums) + bias."""
    shape: tl.constexpr = (Z.BLOCK, Z.COLUMNS)
    # one operation, for which Triton brings both vectors, not their product, to where the total lies
    total = tl.fma(tl.broadcast_to(mean[:, None], shape), tl.broadcast_to(-sums[None, :], shape), total)
    return total * rstd[:, None] + bias[None, :]


@triton.jit
def _gelu_product_kernel(x_ptr, w_ptr, bias_ptr, sums_ptr, moments_ptr, hidden_ptr, y_ptr, n_rows, eps, Z: tl.constexpr):
    """h, where it is asked for, and GELU of it as it is stored; else of what is not rounded.

    With ``moments_ptr`` of LN(x): W is γW then, ``sums_ptr`` has its sums, and the bias Wβ, too.
    """
    NORM: tl.constexpr = moments_ptr is not None
    col, member, members = _place(Z)
    matrix = _matrix(w_ptr, 1, Z.K, col, Z)
    bias = load(bias_ptr, col, col < Z.N)
    begun = _piece(x_ptr, 0, member, n_rows, Z)
    n_tiles = tl.cdiv(n_rows, Z.BLOCK)
    if NORM:
        sums = tl.load(sums_ptr + col)
        means, squares = _moments(moments_ptr, member, Z)
    for tile in tl.range(member, n_tiles, members):
        total = _product(x_ptr, begun, matrix, tile, n_rows, Z)
        if NORM:
            mean, rstd = _combined(means, squares, eps, Z)
            means, squares = _moments(moments_ptr, tl.minimum(tile + members, n_tiles - 1), Z)
        begun = _piece(x_ptr, 0, tile + members, n_rows, Z)  # the next tile's, while this one ends
        h = _normalised(total, mean, rstd, sums, bias, Z) if NORM else total + bias[None, :]
        first, row, alive = _tile(tile, n_rows, Z)
        at = row * Z.N + col[None, :]
        if hidden_ptr is not None:
            h = h.to(Z.DTYPE)
            tl.store(hidden_ptr + first * Z.N + at, h, mask=alive)
        tl.store(y_ptr + first * Z.N + at, gelu(h.to(tl.float32), Z.FAST).to(Z.DTYPE), mask=alive)


@triton.jit
def _scale(w, out, Z: tl.constexpr):
    """γW of a matrix (HIDDEN, N), rounded, its sums, and Wβ + b: 8 rows of it a program at a time."""
    PIECES: tl.constexpr = Z.N // Z.COLUMNS
    for each in tl.range(tl.program_id(0), Z.HIDDEN // 8, tl.num_programs(0)):
        row = each * 8 + tl.arange(0, 8)
        bias = load(w.next_bias, row, row < Z.HIDDEN)
        parts, scales, shifts = (), (), ()
        for i in tl.static_range(PIECES):  # all on their way before any is waited for
            col = i * Z.COLUMNS + tl.arange(0, Z.COLUMNS)
            parts = parts + (tl.load(w.next_matrix + row[:, None] * Z.N + col[None, :]),)
            scales = scales + (tl.load(w.norm_weight + col).to(tl.float32),)
            shifts = shifts + (load(w.norm_bias, col, col < Z.N),)
        sums = tl.full((8, Z.COLUMNS), 0.0, tl.float32)
        shifted = sums
        for i in tl.static_range(PIECES):
            col = i * Z.COLUMNS + tl.arange(0, Z.COLUMNS)
            part = parts[i].to(tl.float32)
            shifted += part * shifts[i][None, :]
            part = (part * scales[i][None, :]).to(Z.DTYPE)
            tl.store(out.matrix + row[:, None] * Z.N + col[None, :], part)
            sums += part.to(tl.float32)
        tl.store(out.offset + row, tl.sum(shifted, 1) + bias)
        tl.store(out.sums + row, tl.sum(sums, 1))


@triton.jit
def _sum_product_kernel(x_ptr, w, y_ptr, onto_ptr, out, n_rows, Z: tl.constexpr):
    """y + x Wᵀ in the place of y, that + later in ``onto_ptr``, and the moments of its rows' parts, (GROUPS, 2, BLOCK) a tile:
    their means, and sums of squares about these; and what the product of LN(y) reads, by ``_scale``."""
    PIECES: tl.constexpr = Z.PIECES
    col, member, members = _place(Z)
    _scale(w, out, Z)
    matrix = _matrix(w.matrix, 1, Z.K, col, Z)
    later = load(w.later, col, col < Z.N)
    moments_ptr = out.moments + tl.program_id(0) % Z.GROUPS * (2 * Z.BLOCK) + tl.arange(0, Z.BLOCK)
    begun = _piece(x_ptr, 0, member, n_rows, Z)
    for tile in tl.range(member, tl.cdiv(n_rows, Z.BLOCK), members):
        first, row, alive = _tile(tile, n_rows, Z)
        at = row * Z.N + col[None, :]
        total = tl.full((Z.BLOCK, Z.COLUMNS), 0.0, tl.float32)
        piece = begun
        for i in tl.static_range(PIECES):
            if i > 0:
                piece = _piece(x_ptr, i, tile, n_rows, Z)
            if i + 1 == PIECES:
                y = tl.load(y_ptr + first * Z.N + at, mask=alive, other=0.0)
            total = dot(piece, matrix[i], Z, total)
        y = (total + y.to(tl.float32)).to(Z.DTYPE)
        begun = _piece(x_ptr, 0, tile + members, n_rows, Z)
        tl.store(y_ptr + first * Z.N + at, y, mask=alive)
        y = y.to(tl.float32)
        mean = tl.sum(y, 1) * (1.0 / Z.COLUMNS)
        apart = y - mean[:, None]
        at_moments = moments_ptr + first * (2 * Z.GROUPS)
        tl.store(at_moments, mean)
        tl.store(at_moments + Z.BLOCK, tl.sum(apart * apart, 1))
        tl.store(onto_ptr + first * Z.N + at, (y + later[None, :]).to(Z.DTYPE), mask=alive)


@triton.jit
def _normed_matrix(w, col, Z: tl.constexpr):
    """γW, rounded, as ``_matrix`` has W; its sums over K, and Wβ, [COLUMNS] each."""
    PIECES: tl.constexpr = Z.PIECES
    found = ()
    sums = tl.full((Z.COLUMNS,), 0.0, tl.float32)
    bias = tl.full((Z.COLUMNS,), 0.0, tl.float32)
    for i in tl.static_range(PIECES):
        k = i * Z.CHUNK + tl.arange(0, Z.CHUNK)
        part = tl.load(w.matrix + k[:, None] + col[None, :] * Z.K).to(tl.float32)
        if w.norm_bias is not None:
            bias += tl.sum(part * tl.load(w.norm_bias + k).to(tl.float32)[:, None], 0)
        part = (part * tl.load(w.norm_weight + k).to(tl.float32)[:, None]).to(Z.DTYPE)
        sums += tl.sum(part.to(tl.float32), 0)
        found = found + (part,)
    return found, sums, bias


@triton.jit
def _pivot(piece, Z: tl.constexpr):
    """The first of each 8 values of a row, which a thread has: [BLOCK, CHUNK / 8]."""
    values = tl.reshape(piece, (Z.BLOCK, Z.CHUNK // 8, 4, 2))
    values, _ = tl.split(values)
    values, _ = tl.split(tl.reshape(values, (Z.BLOCK, Z.CHUNK // 8, 2, 2)))
    values, _ = tl.split(values)
    return values.to(tl.float32)


@triton.jit
def _add_moments(total, square, piece, pivot, Z: tl.constexpr):
    """Sums of x − pivot and of its square, [BLOCK, CHUNK / 8], with those of a piece."""
    x = tl.reshape(piece, (Z.BLOCK, Z.CHUNK // 8, 8)).to(tl.float32) - pivot[:, :, None]
    return total + tl.sum(x, 2), square + tl.sum(x * x, 2)


@triton.jit
def _statistics(pivot, part, square, eps, Z: tl.constexpr):
    """Mean and 1/σ of rows, of such sums over all pieces."""
    COUNT: tl.constexpr = Z.PIECES * 8
    own = pivot + part * (1.0 / COUNT)  # means of what a thread has
    mean = tl.sum(own, 1) * (8.0 / Z.CHUNK)
    own -= mean[:, None]
    square += COUNT * own * own - part * part * (1.0 / COUNT)
    return mean, tl.rsqrt(tl.sum(square, 1) * (1.0 / Z.K) + eps)


@triton.jit
def _norm_product_kernel(x_ptr, w, y_ptr, n_rows, eps, Z: tl.constexpr):
    """1/σ · (x (γW)ᵀ − mean · Σ γW) + Wβ, with mean and σ of what passes through registers.

    What a thread has of a row is summed about the first of it, and only those sums are brought together: of equal values σ² is
    0, to the bit, and a large mean cancels in none of them.
    """
    PIECES: tl.constexpr = Z.PIECES
    PARTS: tl.constexpr = Z.CHUNK // 8
    col, member, members = _place(Z)
    matrix, sums, bias = _normed_matrix(w, col, Z)
    begun = _piece(x_ptr, 0, member, n_rows, Z)
    for tile in tl.range(member, tl.cdiv(n_rows, Z.BLOCK), members):
        pivot = _pivot(begun, Z)
        part = tl.full((Z.BLOCK, PARTS), 0.0, tl.float32)
        square = part
        total = tl.full((Z.BLOCK, Z.COLUMNS), 0.0, tl.float32)
        piece = begun
        for i in tl.static_range(PIECES):
            if i > 0:
                piece = _piece(x_ptr, i, tile, n_rows, Z)
            part, square = _add_moments(part, square, piece, pivot, Z)
            total = dot(piece, matrix[i], Z, total)
        begun = _piece(x_ptr, 0, tile + members, n_rows, Z)
        mean, rstd = _statistics(pivot, part, square, eps, Z)
        first, row, alive = _tile(tile, n_rows, Z)
        y = _normalised(total, mean, rstd, sums, bias, Z)
        tl.store(y_ptr + first * Z.N + row * Z.N + col[None, :], y.to(Z.DTYPE), mask=alive)


@triton.jit
def _gelu_product_bwd_kernel(d_ptr, w_ptr, h_ptr, dh_ptr, a_ptr, sums_ptr, n_rows, Z: tl.constexpr):
    """GELU(h), and the gradient of h with a program's sums of it over its rows."""
    col, member, members = _place(Z)
    matrix = _matrix(w_ptr, Z.N, 1, col, Z)
    total = tl.full((Z.SUMS, Z.COLUMNS), 0.0, tl.float32)
    begun = _piece(d_ptr, 0, member, n_rows, Z)
    for tile in tl.range(member, tl.cdiv(n_rows, Z.BLOCK), members):
        da = _product(d_ptr, begun, matrix, tile, n_rows, Z).to(Z.DTYPE)
        begun = _piece(d_ptr, 0, tile + members, n_rows, Z)
        first, row, alive = _tile(tile, n_rows, Z)
        at = row * Z.N + col[None, :]
        h = tl.load(h_ptr + first * Z.N + at, mask=alive, other=0.0).to(tl.float32)
        a, dh = gelu_gradient(h, da.to(tl.float32), Z.FAST, False, tl.float32, tl.float16 == Z.DTYPE)
        if sums_ptr is not None:  # of rows that lie in the same threads, which add them up without one another
            total += tl.sum(tl.reshape(dh, (Z.BLOCK // Z.SUMS, Z.SUMS, Z.COLUMNS)), 0)
        tl.store(dh_ptr + first * Z.N + at, dh.to(Z.DTYPE), mask=alive)
        if a_ptr is not None:
            tl.store(a_ptr + first * Z.N + at, a.to(Z.DTYPE), mask=alive)
    if sums_ptr is not None:
        tl.store(sums_ptr + member * Z.N + col, tl.sum(total, 0))


# ---- on the host ----


def takes(rows: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the product of (rows, K) to (rows, N) with GELU is faster here than two launches; of whole pieces alone."""
    if dtype == torch.float32 or rows < LEAST or K > WIDEST or K % (CHUNK // 2) or N % COLUMNS:
        return False
    return operation.runner.capability(device) in CAPABILITIES


def takes_norm(rows: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the product of LN(x), x of (rows, K), to (rows, N) is faster here than LayerNorm and the library's product.

    Every COLUMNS columns make the rows' statistics once more. γW is rounded, for which float16 has too narrow a range.
    """
    suits = dtype == torch.bfloat16 and rows >= NORMED_LEAST and N <= NORMED_MOST
    return suits and takes(rows, K, N, dtype, device)


def takes_sum(rows: int, E: int, M: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a sum, its LayerNorm, and the product of that with GELU are two launches here, not three; likewise."""
    return dtype == torch.bfloat16 and takes(rows, E, E, dtype, device) and takes(rows, E, M, dtype, device)


@remembered
def _specialise(kernel: Any, dtype: torch.dtype, K: int, N: int, hidden: int = 0) -> Launch:
    chunk = CHUNK if K % CHUNK == 0 else CHUNK // 2
    same = CONFIG.warps * 32 * 8 // COLUMNS  # threads have 8 values of a row each
    sizes = Sizes.computed(dtype, K=K, N=N, BLOCK=CONFIG.rows, COLUMNS=COLUMNS, CHUNK=chunk, SUMS=same, HIDDEN=hidden)
    return Launch(kernel, {"Z": sizes}, CONFIG, CONFIG.rows / sizes.GROUPS, l1=False)


def prepared(
    rows: int, K: int, N: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor | None, Tensor]]:
    """For a plan: of contiguous x (rows, K), W (N, K) and bias, h if it is asked for, and GELU(h)."""
    spec = _specialise(_gelu_product_kernel, dtype, K, N)
    grid = sharing(spec, rows, device) * spec.constants["Z"].GROUPS
    spec = spec.again()

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, has_hidden: bool) -> tuple[Tensor | None, Tensor]:
        a = x.new_empty(rows, N)
        h = torch.empty_like(a) if has_hidden else None
        launch(spec, grid, x, weight, bias, None, None, h, a, rows, 0.0)
        return h, a

    return product


def summed(
    rows: int, E: int, M: int, dtype: torch.dtype, device: torch.device, eps: float
) -> Callable[[Tensor, Tensor, Tensor, SumWeights, bool], tuple[Tensor | None, Tensor]]:
    """For a plan, in two launches: y + x Wᵀ in the place of y, that + later, and of LN(y) what ``prepared`` has of x.

    x, y (rows, E) and W (E, E) contiguous; M hidden channels.
    """
    first, second = _specialise(_sum_product_kernel, dtype, E, E, M), _specialise(_gelu_product_kernel, dtype, E, M)
    grids = [sharing(each, rows, device) * each.constants["Z"].GROUPS for each in (first, second)]
    first, second = first.again(), second.again()
    n_moments = 2 * first.constants["Z"].GROUPS * -(-rows // first.config.rows) * first.config.rows  # of whole tiles

    def product(x: Tensor, y: Tensor, rest: Tensor, weights: SumWeights, has_hidden: bool) -> tuple[Tensor | None, Tensor]:
        floats = torch.empty(n_moments + 2 * M, dtype=torch.float32, device=x.device)
        moments, bias, sums = floats.split_with_sizes((n_moments, M, M))
        normed = Normed(x.new_empty(M, E), bias, sums, moments)
        launch(first, grids[0], x, weights, y, rest, normed, rows)
        a = x.new_empty(rows, M)
        h = torch.empty_like(a) if has_hidden else None
        launch(second, grids[1], y, normed.matrix, bias, sums, moments, h, a, rows, eps)
        return h, a

    return product


def normed(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float) -> Tensor:
    """LN(x) Wᵀ of contiguous x (rows, K) and W (N, K)."""
    (rows, K), N = x.shape, len(weight)
    spec = _specialise(_norm_product_kernel, x.dtype, K, N)
    y = x.new_empty(rows, N)
    weights = contiguous(Weights(weight, norm_weight, norm_bias))
    launch(spec, sharing(spec, rows, x.device) * spec.constants["Z"].GROUPS, x, weights, y, rows, eps)
    return y


def backward(
    d: Tensor, weight: Tensor, h: Tensor, has_result: bool, has_sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of contiguous d (rows, K) and W (K, N): the gradient of h; if asked for, GELU(h), and what ``totals`` adds up of it."""
    spec = _specialise(_gelu_product_bwd_kernel, d.dtype, *weight.shape)
    each = sharing(spec, len(d), d.device)
    dh = torch.empty_like(h)
    a = torch.empty_like(h) if has_result else None
    sums = torch.empty(each, h.shape[1], dtype=torch.float32, device=h.device) if has_sums else None
    launch(spec, each * spec.constants["Z"].GROUPS, d, weight, h, dh, a, sums, len(d))
    return dh, a, sums
