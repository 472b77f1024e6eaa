"""gelu: products of many rows with GELU, or its gradient, at their end in one launch, for outer where gradients are recorded.

    h = x Wᵀ + b, a = GELU(h)                                    W = fc1's (N, K)
    a = GELU(h), dh = (d W) · GELU'(h), sums of dh over its rows      W = fc2's (K, N)

A program has COLUMNS columns of the result and keeps its part of W on the chip; it takes tile after tile of BLOCK rows, of
which it loads a piece of CHUNK columns at a time, the first while the tile before ends. Two programs run on a multiprocessor,
so that one multiplies while the other waits or stores. That takes few bytes of the L2 cache, which bind such products: x is
read N / COLUMNS times, W once a program. What a product gives is rounded before GELU, as PyTorch's is: so it is rearranged
once for all that is stored. Both operands are loaded to shared memory as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, derived, launch, remembered, sharing
from tnt_fast.kernels.tile import dot, gelu, gelu_gradient

CONFIG, COLUMNS, CHUNK = Config(64, warps=4, per_sm=2), 128, 128  # by simulation, of TNT-S on an H200
# Where the two launches for this one, the library's product and GELU's own kernel, were slower: on these architectures, at so
# many rows, and where the parts of W of two programs fit on a multiprocessor beside what they work on
CAPABILITIES, LEAST, WIDEST = ((9, 0),), 128 * 197, 384


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Rows of K values to N, in GROUPS of columns; SUMS of a tile's rows have sums of their own until a program ends."""

    K: int
    N: int
    BLOCK: int
    COLUMNS: int
    CHUNK: int
    SUMS: int
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
def _gelu_product_kernel(x_ptr, w_ptr, bias_ptr, h_ptr, y_ptr, n_rows, Z: tl.constexpr):
    col, member, members = _place(Z)
    matrix = _matrix(w_ptr, 1, Z.K, col, Z)
    bias = tl.full((Z.COLUMNS,), 0.0, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col).to(tl.float32)
    begun = _piece(x_ptr, 0, member, n_rows, Z)
    for tile in tl.range(member, tl.cdiv(n_rows, Z.BLOCK), members):
        total = _product(x_ptr, begun, matrix, tile, n_rows, Z)
        begun = _piece(x_ptr, 0, tile + members, n_rows, Z)  # the next tile's, while this one ends
        first, row, alive = _tile(tile, n_rows, Z)
        h = (total + bias[None, :]).to(Z.DTYPE)
        at = row * Z.N + col[None, :]
        if h_ptr is not None:
            tl.store(h_ptr + first * Z.N + at, h, mask=alive)
        tl.store(y_ptr + first * Z.N + at, gelu(h.to(tl.float32), Z.FAST).to(Z.DTYPE), mask=alive)


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


@remembered
def _specialise(dtype: torch.dtype, K: int, N: int, backward: bool) -> Launch:
    chunk = CHUNK if K % CHUNK == 0 else CHUNK // 2
    same = CONFIG.warps * 32 * 8 // COLUMNS  # threads have 8 values of a row each
    sizes = Sizes.computed(dtype, K=K, N=N, BLOCK=CONFIG.rows, COLUMNS=COLUMNS, CHUNK=chunk, SUMS=same)
    kernel = _gelu_product_bwd_kernel if backward else _gelu_product_kernel
    return Launch(kernel, {"Z": sizes}, CONFIG, CONFIG.rows / sizes.GROUPS, l1=False)


def prepared(
    rows: int, K: int, N: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor | None, Tensor]]:
    """For a plan: of contiguous x (rows, K), W (N, K) and bias, h if it is asked for, and GELU(h)."""
    spec = _specialise(dtype, K, N, False)
    grid = sharing(spec, rows, device) * spec.constants["Z"].GROUPS
    spec = spec.again()

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, has_hidden: bool) -> tuple[Tensor | None, Tensor]:
        a = x.new_empty(rows, N)
        h = torch.empty_like(a) if has_hidden else None
        launch(spec, grid, x, weight, bias, h, a, rows)
        return h, a

    return product


def backward(
    d: Tensor, weight: Tensor, h: Tensor, has_result: bool, has_sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of contiguous d (rows, K) and W (K, N): the gradient of h; if asked for, GELU(h), and what ``totals`` adds up of it."""
    spec = _specialise(d.dtype, *weight.shape, True)
    each = sharing(spec, len(d), d.device)
    dh = torch.empty_like(h)
    a = torch.empty_like(h) if has_result else None
    sums = torch.empty(each, h.shape[1], dtype=torch.float32, device=h.device) if has_sums else None
    launch(spec, each * spec.constants["Z"].GROUPS, d, weight, h, dh, a, sums, len(d))
    return dh, a, sums
