"""product: products of few rows with the LayerNorm before them in one launch, for what outer computes of a few images.

    y = activation(LN(x) Wᵀ + b), rest = x + later                     GELU, the bias and the rest where they are asked for
    x[b, 0] = patch[b, 0], x[b, 1 + n] = patch[b, 1 + n] + LN(z[b·N + n] + shift)             as fold ends, where that is x

At few rows a launch waits: to begin, for memory, and for the launch of the LayerNorm before it. Here a program has BLOCK rows,
which it holds in registers in pieces of CHUNK columns, and COLUMNS columns of the result: it asks for all of its part of the
matrix before it looks at its rows. Programs of the same rows normalise them each for itself; those of the first columns store
``rest``. The matrix is read in its own dtype, under autocast float32, and may be two, the second of which has the last columns:
those of q and k, and that of v. Statistics are float32, of two passes, as norm.py's; one rounding, at the store.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, derived, launch, piece, remembered
from tnt_fast.kernels.tile import columns, dot, gelu, load, load_rows, load_vector, plus, plus_product, standardised, store_rows

# Tiles (rows, columns), of which the first is taken that makes no more programs than an H200 has multiprocessors, and their
# warps: by simulation of an image of TNT-Ti and TNT-S
TILES, PROGRAMS, WARPS = ((16, 32), (16, 64), (16, 128), (32, 64), (32, 128)), 132, 8
OTHER_BYTES = 40 << 10  # on the chip besides a program's part of the matrix, at most
LEAST_BYTES = 99 << 10  # that a GPU has there: sm_86, sm_89, sm_120
# rows, and values of a matrix, which the programs of every 16 or 32 rows read once more: where there are more of either the
# library's products are faster
MOST, LARGEST = 2 * 197, 384 * 1536


class Weights(NamedTuple):
    """The product's matrix and bias, in one or two parts, the norm before it, and of x its end as fold's; any may be None."""

    weight: Any
    bias: Any
    second_weight: Any
    second_bias: Any
    norm_weight: Any
    norm_bias: Any
    later: Any = None
    shift: Any = None
    sum_weight: Any = None
    sum_bias: Any = None


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Rows of W values to N, of which FIRST are the first matrix's, in GROUPS of columns, OWN of them the first's."""

    W: int
    N: int
    FIRST: int
    BLOCK: int
    COLUMNS: int
    CHUNK: int
    GELU: bool
    SUM: bool  # x is made of z and patches
    OWN: int = derived(lambda Z: -(-Z.FIRST // Z.COLUMNS))
    GROUPS: int = derived(lambda Z: Z.OWN + -(-(Z.N - Z.FIRST) // Z.COLUMNS))
    PIECES: int = derived(lambda Z: -(-Z.W // Z.CHUNK))


@triton.jit
def _normed(x, weight, bias, eps, Z: tl.constexpr):
    """LN of rows that are 0 past W, there 0, too."""
    x, _ = standardised(x, eps, Z)
    return plus_product(bias, x, weight, Z)


@triton.jit
def _product_kernel(
    x_ptr, w, y_ptr, patch_ptr, rest_ptr, n_rows, n_tokens, stride_image, stride_token, eps, Z: tl.constexpr
):  # fmt: skip
    """With SUM ``x_ptr`` is z, and ``patch_ptr`` has any strides."""
    PIECES: tl.constexpr = Z.PIECES
    group = tl.program_id(0) % Z.GROUPS
    row = (tl.program_id(0) // Z.GROUPS).to(tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
    alive = row < n_rows
    own = group < Z.OWN
    col = tl.where(own, group, group - Z.OWN) * Z.COLUMNS + tl.arange(0, Z.COLUMNS)  # of its matrix
    used = col < tl.where(own, Z.FIRST, Z.N - Z.FIRST)
    weight_ptr = w.weight if Z.FIRST == Z.N else tl.where(own, w.weight, w.second_weight)
    bias = load(w.bias, col, used & own) + load(w.second_bias, col, used & (group >= Z.OWN))
    matrix = ()
    for i in tl.static_range(PIECES):
        at, real = columns(i, Z)
        part = tl.load(weight_ptr + col[None, :] * Z.W + at[:, None], mask=real[:, None] & used[None, :], other=0.0)
        matrix = matrix + (part.to(Z.DTYPE),)

    norm_weight, norm_bias = load_vector(w.norm_weight, Z), load_vector(w.norm_bias, Z)
    if Z.SUM:
        sum_weight, sum_bias, shift = load_vector(w.sum_weight, Z), load_vector(w.sum_bias, Z), load_vector(w.shift, Z)
        image, token = (row.to(tl.int32) // n_tokens).to(tl.int64), row.to(tl.int32) % n_tokens
        folded = token > 0  # the class token has no pixels
        z = plus(load_rows(x_ptr, (row - image - 1) * Z.W, alive & folded, Z), shift, Z)
        x = load_rows(patch_ptr, image * stride_image + token.to(tl.int64) * stride_token, alive, Z)
        if w.sum_weight is not None:
            z = _normed(z, sum_weight, sum_bias, eps, Z)
        added = ()
        for i in tl.static_range(PIECES):
            added = added + (x[i] + tl.where(folded[:, None], z[i], 0.0),)
        x = added
    else:
        x = load_rows(x_ptr, row * Z.W, alive, Z)
    if rest_ptr is not None:
        rest = plus(x, load_vector(w.later, Z), Z)
        store_rows(rest_ptr, row * Z.W, alive & (group == 0), rest, Z)
    x = _normed(x, norm_weight, norm_bias, eps, Z)

    total = tl.full((Z.BLOCK, Z.COLUMNS), 0.0, tl.float32)
    for i in tl.static_range(PIECES):
        total += dot(x[i].to(Z.DTYPE), matrix[i], Z)
    total += bias[None, :]
    if Z.GELU:
        total = gelu(total, Z.FAST)
    out = tl.where(own, 0, Z.FIRST) + col
    tl.store(y_ptr + (row * Z.N)[:, None] + out[None, :], total.to(Z.DTYPE), mask=alive[:, None] & used[None, :])


# ---- on the host ----


def takes(rows: int, K: int, N: int, dtype: torch.dtype) -> bool:
    """Whether the product of (rows, K) to (rows, N) is faster here, and its smallest tile fits on every GPU."""
    fits = TILES[0][1] * K * dtype.itemsize <= LEAST_BYTES - OTHER_BYTES
    return fits and rows <= MOST and K * N <= LARGEST


@remembered
def specialise(dtype: torch.dtype, K: int, N: int, first: int, tile: tuple[int, int], gelu: bool, sums: bool) -> Launch:
    block, columns = tile
    of = dict(W=K, N=N, FIRST=first, BLOCK=block, COLUMNS=columns, CHUNK=piece(K))
    sizes = Sizes.computed(dtype, **of, GELU=gelu, SUM=sums)
    return Launch(_product_kernel, {"Z": sizes}, Config(block, warps=WARPS), block / sizes.GROUPS)


def _tile(rows: int, K: int, N: int, itemsize: int, device: torch.device) -> tuple[int, int]:
    shared = operation.runner.shared_memory(device) or 227 << 10
    shared = shared if operation.Gpu.nvidia else 64 << 10
    fitting = [tile for tile in TILES if tile[1] * K * itemsize <= shared - OTHER_BYTES] or [TILES[0]]
    return next((tile for tile in fitting if -(-rows // tile[0]) * -(-N // tile[1]) <= PROGRAMS), fitting[-1])


def prepared(
    rows: int, dtype: torch.dtype, weights: Weights, eps: float, gelu: bool = False, tokens: int = 0
) -> Callable[..., Tensor]:
    """The product of matrices of so many rows and a dtype, for a plan: contiguous weights like these are given first.

    ``tokens``: of an image, where a row is made of z (images · (tokens − 1), K) and of patches (images, tokens, K) of any
    strides.
    """
    first, K = weights.weight.shape
    N = first if weights.second_weight is None else first + len(weights.second_weight)
    spec = specialise(dtype, K, N, first, _tile(rows, K, N, dtype.itemsize, weights.weight.device), gelu, tokens > 0)
    grid = -(-rows // spec.config.rows) * spec.constants["Z"].GROUPS
    spec = spec.again()

    def product(weights: Weights, x: Tensor, rest: Tensor | None = None, patch: Tensor | None = None) -> Tensor:
        y = torch.empty(rows, N, dtype=dtype, device=x.device)
        image = token = 0
        if patch is not None:
            image, token, value = patch.stride()
            if value != 1:
                patch = patch.contiguous()
                image, token, _ = patch.stride()
        launch(spec, grid, x, weights, y, patch, rest, rows, tokens or rows, image, token, eps)
        return y

    return product
