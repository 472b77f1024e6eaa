"""norm: LayerNorm over the rows of a matrix with what lies around it; what fold and outer have between the library's products.

    y = LN(x), rest = x + later                                forward: the next product's input, and what it is added to
    y[b, 0] = patch[b, 0], y[b, 1 + n] = patch[b, 1 + n] + LN(z[b·N + n] + shift)          add: of fold, with or without LN,
                                                          and then, for outer, LN(y) and y + later
    dx = rstd · (γg − mean(γg) − x̂ · mean(γg · x̂)), dγ = Σ g · x̂, dβ = Σ g, dshift = Σ dx             backward of LN(x + shift)

with x̂ a normalised row, g the gradient of y. Statistics are float32. Bytes moved: each tensor once. Sums over rows are kept in
float32 by a program over all its tiles and reduced in one launch: no atomics, the same input gives the same bits.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, contiguous, launch, programs, remembered
from tnt_fast.kernels.tile import centred, load

# values a tile, values a thread; of the backward also programs a multiprocessor. The best of 36 on an H200 for TNT-S and TNT-B
VALUES, EACH, PER_SM = 1024, 32, 8
WIDEST = 16384  # row of which a program holds several copies in registers


class AddWeights(NamedTuple):
    """An argument of ``add`` and its kernel: of LN(z + shift), of LN(y), and what y is stored with; any may be None."""

    shift: Any = None
    weight: Any = None
    bias: Any = None
    next_weight: Any = None
    next_bias: Any = None
    later: Any = None


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Rows of W values; ``GROUPED``: those of the backward's incoming gradient lie in groups."""

    W: int
    W_PAD: int
    BLOCK: int
    GROUPED: bool = False


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
    z_ptr, w, patch_ptr, y_ptr, h_ptr, n_rows, n_tokens, stride_image, stride_token, eps, Z: tl.constexpr
):  # fmt: skip
    """Rows are those of y; without ``w.weight`` z is added as it is; ``h_ptr``: for LN(y), where y is stored with ``later``."""
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
        h, _ = _standardised(tl.where(real[None, :], y, 0.0), eps, Z)  # known zeros
        h = h * load(w.next_weight, col, real)[None, :] + load(w.next_bias, col, real)[None, :]
        tl.store(h_ptr + at, h.to(Z.DTYPE), mask=mask)
        y += load(w.later, col, real)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_bwd_kernel(
    x_ptr, shift_ptr, weight_ptr, gradient_ptr, dx_ptr, sums_ptr, n_rows, n_group, stride_group, stride_row, eps,
    Z: tl.constexpr,
):  # fmt: skip
    """dx, and a program's sums over its rows of g · x̂, g and dx.

    GROUPED: the rows of the incoming gradient lie in groups of ``n_group``, the patches of an image.
    """
    col = tl.arange(0, Z.W_PAD)
    gamma, shift = load(weight_ptr, col, col < Z.W), load(shift_ptr, col, col < Z.W)
    # whole tiles are summed, and their rows only at the end: no reduction between the warps in a tile
    d_weight = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    d_bias = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    d_shift = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, Z.BLOCK), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        mask = (row < n_rows)[:, None] & (col < Z.W)[None, :]
        x = load(x_ptr + row[:, None] * Z.W, col[None, :], mask) + shift[None, :]
        # of rows past the last all is 0: their 1/σ has to be finite, without an eps, too
        x, rstd = _standardised(x, tl.where(row < n_rows, eps, 1.0), Z)  # [BLOCK, W_PAD], [BLOCK]
        if Z.GROUPED:
            patch = row.to(tl.int32)
            source = (patch // n_group).to(tl.int64) * stride_group + (patch % n_group).to(tl.int64) * stride_row
        else:
            source = row * stride_row
        g = load(gradient_ptr + source[:, None], col[None, :], mask)  # [BLOCK, W_PAD]
        if sums_ptr is not None:
            d_weight += g * x
            d_bias += g
        if dx_ptr is not None or shift_ptr is not None:
            g = g * gamma[None, :]
            along = tl.sum(g * x, 1) * (1.0 / Z.W)
            dx = (g - (tl.sum(g, 1) * (1.0 / Z.W))[:, None] - x * along[:, None]) * rstd[:, None]
            if shift_ptr is not None and sums_ptr is not None:
                d_shift += dx
            if dx_ptr is not None:
                tl.store(dx_ptr + row[:, None] * Z.W + col[None, :], dx.to(Z.DTYPE), mask=mask)
    if sums_ptr is not None:
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * (3 * Z.W) + col
        tl.store(sums, tl.sum(d_weight, 0), mask=col < Z.W)
        tl.store(sums + Z.W, tl.sum(d_bias, 0), mask=col < Z.W)
        tl.store(sums + 2 * Z.W, tl.sum(d_shift, 0), mask=col < Z.W)  # zero without a shift


# ---- on the host ----


@remembered
def specialise(kernel: Any, dtype: torch.dtype, W: int, grouped: bool = False) -> Launch:
    pad = triton.next_power_of_2(W)
    block = max(1, VALUES // pad)
    config = Config(block, warps=min(16, max(1, block * pad // (32 * EACH))), per_sm=PER_SM)
    return Launch(kernel, {"Z": Sizes.computed(dtype, W=W, W_PAD=pad, BLOCK=block, GROUPED=grouped)}, config, block)


def launch_of(what: str, dtype: torch.dtype, W: int, rows: int = 1, grouped: bool = False, plain: bool = False) -> Launch:
    """With types: "forward", "add", "add and norm" (``plain``: without LN) or "backward"; ``rows`` of it are a patch."""
    pointer = f"*{operation.DTYPES[dtype]}"
    if what.startswith("add"):
        types = AddWeights(*[pointer] * 6)._replace(shift=pointer if plain else None)
        types = types._replace(weight=None, bias=None) if plain else types
        absent = () if what == "add and norm" else ("h_ptr",)
        types = types._replace(next_weight=None, next_bias=None, later=None) if absent else types
        return specialise(_norm_add_kernel, dtype, W).shipped(dtype, w=types, **dict.fromkeys(absent))
    kernel, absent = (_norm_kernel, ("rest_ptr", "later_ptr")) if what == "forward" else (_norm_bwd_kernel, ("shift_ptr",))
    spec = specialise(kernel, dtype, W, grouped)
    return spec._replace(patches=spec.patches / rows).shipped(dtype, **{"sums_ptr": "*fp32"} | dict.fromkeys(absent))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rest: Tensor | None = None, later: Tensor | None = None
) -> Tensor:
    """LayerNorm of the rows of a contiguous matrix; ``rest``, which may be ``x``, becomes x + later."""
    spec, y = specialise(_norm_kernel, x.dtype, x.shape[1]), torch.empty_like(x)
    tiles = -(-x.shape[0] // spec.config.rows)
    launch(spec, tiles, x, y, contiguous(weight), contiguous(bias), rest, contiguous(later), x.shape[0], eps)
    return y


def add(z: Tensor, patch: Tensor, out: Tensor, weights: AddWeights, eps: float) -> Tensor | None:
    """Into ``out`` (B, T, W), contiguous: ``patch``, of any strides, with the LayerNorm of ``z`` (B·(T − 1), W).

    With weights of a next LayerNorm: that of it (B·T, W) comes back, and ``later`` is added to ``out``.
    """
    (B, T, W), patch = patch.shape, patch if patch.stride(-1) == 1 else patch.contiguous()
    spec, h = specialise(_norm_add_kernel, z.dtype, W), None if weights.next_weight is None else z.new_empty(B * T, W)
    tiles = -(-B * T // spec.config.rows)
    launch(spec, tiles, z, contiguous(weights), patch, out, h, B * T, T, *patch.stride()[:2], eps)
    return h


def backward(
    gradient: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, eps: float, has_dx: bool, has_sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and shift of LN(x + shift), where asked for; ``gradient``: (groups, rows each, W)."""
    rows, W = x.shape
    spec = specialise(_norm_bwd_kernel, x.dtype, W, gradient.shape[0] > 1)
    grid = programs(x.device, -(-rows // spec.config.rows), spec.config.per_sm)
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    dx = torch.empty_like(x) if has_dx else None
    sums = torch.empty((grid, 3, W), dtype=torch.float32, device=x.device) if has_sums else None
    launch(
        spec, grid, x, contiguous(shift), contiguous(weight), gradient, dx, sums, rows, gradient.shape[1],
        *gradient.stride()[:2], eps,
    )  # fmt: skip
    return dx, *(sums.sum(0) if has_sums else (None, None, None))
