"""fold: pixels of each patch, normalised, projected and added onto the patch's token, in one launch.

    y[b, 0]     = patch[b, 0]
    y[b, 1 + n] = patch[b, 1 + n] + LN_E(W · LN(pixel[b·N + n]) + bias)

LN is over all S·C values of a patch, or (legacy) over the C channels of each pixel; LN_E and the bias are optional. The same
kernel is the stem, where ``patch`` is ``[cls; 0] + patch_pos``, expanded over the batch (its row stride may be 0).

Shapes: pixel (B·N, S, C) contiguous, patch (B, 1 + N, E), result contiguous like patch. Bytes moved: pixel and patch read once,
result written once, the weights from the L2 cache once per program. Statistics and accumulation are float32.

A program takes BLOCK rows (patches) and all E outputs, so that LN_E sees whole rows: E lies in N_E chunks of BLOCK_E. Rows go
through the matrix units 32 at a time: Hopper then takes the synchronous mma instruction, which the compilers known to mix up
registers of the asynchronous one cannot break; the weights are loaded once for all of them.

Backward, from the inputs alone (nothing else is saved), with g the gradient of y[:, 1:] and x̂ a normalised row:

    h = LN(pixel),  z = h · Wᵀ + bias                  recomputed
    dz = LN_E's backward of g (or g),  dbias = Σ dz    LN's backward: dx = rstd · (γg − mean(γg) − x̂ · mean(γg · x̂)),
    dW = dzᵀ · h,  dh = dz · W                                        dγ = Σ g · x̂,  dβ = Σ g
    dpixel = LN's backward of dh

The patch's gradient is that of y. Both LayerNorms, the legacy one per pixel, are one over the rows of a matrix: one kernel
normalises, one goes backward, and the three products, large and square, are the BLAS library's. Bytes moved at most: pixel and
dh read twice, z, dz and h as often, each written once. Sums over rows are kept in float32 by a program over all its turns and
reduced in one launch: no atomics, the same input gives the same bits.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast import reference
from tnt_fast.kernels.operation import (
    DTYPES,
    MOST_ROWS,
    Argument,
    Description,
    precision,
    programs,
    recomputed,
    register,
    start,
    wrong_eps,
    zeros_for_none,
)
from tnt_fast.kernels.tile import Launch, centred, dot

# dtype: (rows per program, K chunk, warps, stages). Chosen by static cost for sm_90 on 2026-11-22, not yet timed on a GPU.
CONFIGS = {
    "bf16": (64, 64, 8, 2),
    "fp16": (64, 64, 8, 2),
    "fp32": (32, 32, 8, 1),
}
ROWS = 32
# backward's LayerNorms: (values a turn, values a thread, programs a multiprocessor). Not yet timed, either.
NORM_CONFIG = (2048, 16, 8)
WIDEST = 2**20  # values of a patch: a weight's place is counted in 32 bits
NORM_WIDTH = 16384  # widest row of which a program holds several copies in registers


@triton.jit
def _merge(x, real, mean, square, SEEN: tl.constexpr, NEW: tl.constexpr):
    """Mean and sum of squared deviations of each row after NEW more values (Chan et al. 1979): exact for large means."""
    chunk = tl.sum(x, 1) * (1.0 / NEW)
    x = tl.where(real, x - chunk[:, None], 0.0)
    delta = chunk - mean
    square += tl.sum(x * x, 1) + delta * delta * (SEEN * NEW / (SEEN + NEW))
    return mean + delta * (NEW / (SEEN + NEW)), square


@triton.jit
def _fold_fwd_kernel(
    pixel_ptr, patch_ptr, y_ptr,
    norm1_weight_ptr, norm1_bias_ptr, proj_weight_ptr, proj_bias_ptr, norm2_weight_ptr, norm2_bias_ptr,
    n_rows, n_patches, patch_stride_b, patch_stride_n, eps,
    S: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, N_E: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, LEGACY: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = pixel_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DT  # as in tile.centred
    K: tl.constexpr = S * C
    PARTS: tl.constexpr = BLOCK // ROWS
    first = tl.program_id(0).to(tl.int64) * BLOCK
    r = tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    # LEGACY walks over pixels, a chunk of C channels (padded) each, normalised by itself; else over chunks of all S·C values
    STEP: tl.constexpr = C if LEGACY else BLOCK_K
    WIDTH: tl.constexpr = C_PAD if LEGACY else BLOCK_K
    k = tl.arange(0, WIDTH)

    mean, rest, rstd = (), (), ()
    for p in tl.static_range(PARTS):
        row = first + p * ROWS + r
        mean_p = tl.zeros((ROWS,), tl.float32)
        rest_p = tl.zeros((ROWS,), tl.float32)
        square_p = tl.zeros((ROWS,), tl.float32)
        if not LEGACY:  # chunk by chunk, means and squared deviations merged: exact for large means
            for k0 in tl.static_range(0, K, STEP):
                at = k0 + k
                x = tl.load(
                    pixel_ptr + row[:, None] * K + at[None, :], mask=(row < n_rows)[:, None] & (at < K)[None, :], other=0.0
                ).to(tl.float32)  # [ROWS, BLOCK_K]
                mean_p, square_p = _merge(x, (at < K)[None, :], mean_p, square_p, k0, K - k0 if K - k0 < STEP else STEP)
            if EXACT:  # once more around that mean: what its rounding left of mean and squares
                square_p = tl.zeros((ROWS,), tl.float32)
                for k0 in range(0, K, STEP):
                    at = k0 + k
                    mask = (row < n_rows)[:, None] & (at < K)[None, :]
                    x = tl.load(pixel_ptr + row[:, None] * K + at[None, :], mask=mask, other=0.0)
                    x = tl.where((at < K)[None, :], x - mean_p[:, None], 0.0)
                    rest_p += tl.sum(x, 1)
                    square_p += tl.sum(x * x, 1)
                rest_p *= 1.0 / K
                square_p = tl.maximum(square_p - K * rest_p * rest_p, 0.0)
        mean = mean + (mean_p,)
        rest = rest + (rest_p,)
        rstd = rstd + (tl.rsqrt(square_p * (1.0 / K) + eps),)

    accs = ()
    for _ in tl.static_range(PARTS * N_E):
        accs = accs + (tl.zeros((ROWS, BLOCK_E), tl.float32),)
    for k0 in range(0, K, STEP):
        at = k0 + k
        real = (k < C) if LEGACY else (at < K)
        norm_at = k if LEGACY else at
        gamma = tl.load(norm1_weight_ptr + norm_at, mask=real, other=0.0).to(tl.float32)
        beta = tl.load(norm1_bias_ptr + norm_at, mask=real, other=0.0).to(tl.float32)
        rows = ()
        for p in tl.static_range(PARTS):
            row = first + p * ROWS + r
            x = tl.load(pixel_ptr + row[:, None] * K + at[None, :], mask=(row < n_rows)[:, None] & real[None, :], other=0.0).to(
                tl.float32
            )  # [ROWS, WIDTH]
            if LEGACY:
                x = centred(x, real, C, EXACT)
                x = x * tl.rsqrt(tl.sum(x * x, 1) * (1.0 / C) + eps)[:, None]
            else:
                x = x - mean[p][:, None]
                if EXACT:
                    x -= rest[p][:, None]
                x = x * rstd[p][:, None]
            rows = rows + (tl.where(real[None, :], x * gamma[None, :] + beta[None, :], 0.0).to(DT),)
        new = ()
        for i in tl.static_range(N_E):  # one after another, so that all can lie in the same shared memory
            out = i * BLOCK_E + e
            w = tl.load(
                proj_weight_ptr + out[None, :] * K + at[:, None], mask=(out < E)[None, :] & real[:, None], other=0.0
            )  # [WIDTH, BLOCK_E]
            w = w.to(DT)
            for p in tl.static_range(PARTS):
                new = new + (dot(rows[p], w, PRECISION, accs[i * PARTS + p]),)
        accs = new

    for p in tl.static_range(PARTS):
        row = first + p * ROWS + r
        live = row < n_rows
        image = row // n_patches
        token = image * (n_patches + 1) + 1 + row % n_patches
        total = tl.zeros((ROWS,), tl.float32)
        biased = ()
        for i in tl.static_range(N_E):
            out = i * BLOCK_E + e
            y = accs[i * PARTS + p]
            if HAS_BIAS:
                y += tl.load(proj_bias_ptr + out, mask=out < E, other=0.0).to(tl.float32)[None, :]
            biased = biased + (y,)
            total += tl.sum(y, 1)  # columns past E are zero
        m = total * (1.0 / E)
        rest_p = tl.zeros((ROWS,), tl.float32)
        square = tl.zeros((ROWS,), tl.float32)
        if HAS_NORM2:
            if EXACT:
                for i in tl.static_range(N_E):
                    rest_p += tl.sum(tl.where((i * BLOCK_E + e < E)[None, :], biased[i] - m[:, None], 0.0), 1)
                rest_p *= 1.0 / E
            for i in tl.static_range(N_E):
                d = tl.where((i * BLOCK_E + e < E)[None, :], biased[i] - m[:, None] - rest_p[:, None], 0.0)
                square += tl.sum(d * d, 1)
        s = tl.rsqrt(square * (1.0 / E) + eps)
        for i in tl.static_range(N_E):
            out = i * BLOCK_E + e
            y = biased[i]
            if HAS_NORM2:
                gamma = tl.load(norm2_weight_ptr + out, mask=out < E, other=0.0).to(tl.float32)
                beta = tl.load(norm2_bias_ptr + out, mask=out < E, other=0.0).to(tl.float32)
                y = (y - m[:, None] - rest_p[:, None]) * s[:, None] * gamma[None, :] + beta[None, :]
            mask = live[:, None] & (out < E)[None, :]
            source = image * patch_stride_b + (1 + row % n_patches) * patch_stride_n
            y += tl.load(patch_ptr + source[:, None] + out[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + token[:, None] * E + out[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
            # the class token goes along with its image's first patch
            mask = mask & (row % n_patches == 0)[:, None]
            cls = tl.load(patch_ptr + (image * patch_stride_b)[:, None] + out[None, :], mask=mask, other=0.0)
            tl.store(y_ptr + ((token - 1) * E)[:, None] + out[None, :], cls.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalised(x_ptr, row, live, shift, eps, W: tl.constexpr, W_PAD: tl.constexpr):
    """Rows of W values plus ``shift``, normalised: x̂ [BLOCK, W_PAD], zero past their ends, and 1 / deviation [BLOCK].

    Both are zero in rows that are not live, and then so is all that the backward makes of them.
    """
    col = tl.arange(0, W_PAD)
    mask = live[:, None] & (col < W)[None, :]
    x = tl.load(x_ptr + row[:, None] * W + col[None, :], mask=mask, other=0.0).to(tl.float32) + shift[None, :]
    x = centred(x, col < W, W, x_ptr.dtype.element_ty == tl.float32)
    rstd = tl.where(live, tl.rsqrt(tl.sum(x * x, 1) * (1.0 / W) + eps), 0.0)
    return x * rstd[:, None], rstd


@triton.jit
def _fold_norm_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, n_rows, eps, W: tl.constexpr, W_PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = LN(x), rows of W values."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    col = tl.arange(0, W_PAD)
    gamma = tl.load(weight_ptr + col, mask=col < W, other=0.0).to(tl.float32)
    beta = tl.load(bias_ptr + col, mask=col < W, other=0.0).to(tl.float32)
    x, _ = _normalised(x_ptr, row, row < n_rows, tl.zeros((W_PAD,), tl.float32), eps, W, W_PAD)  # [BLOCK, W_PAD]
    y = x * gamma[None, :] + beta[None, :]
    mask = (row < n_rows)[:, None] & (col < W)[None, :]
    tl.store(y_ptr + row[:, None] * W + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fold_norm_bwd_kernel(
    x_ptr, shift_ptr, weight_ptr, gradient_ptr, dx_ptr, sums_ptr,
    n_rows, n_group, stride_group, stride_row, eps,
    W: tl.constexpr, W_PAD: tl.constexpr, BLOCK: tl.constexpr, HAS_SHIFT: tl.constexpr, GROUPED: tl.constexpr,
    HAS_DX: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Backward of LN(x + shift): dx, and a program's sums over its rows of g · x̂, g and dx.

    These are the gradients of weight, bias and shift. GROUPED: the rows of the incoming gradient lie in groups of
    ``n_group``, the patches of an image.
    """
    col = tl.arange(0, W_PAD)
    gamma = tl.load(weight_ptr + col, mask=col < W, other=0.0).to(tl.float32)
    shift = tl.zeros((W_PAD,), tl.float32)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + col, mask=col < W, other=0.0).to(tl.float32)
    # whole tiles are summed, and their rows only at the end: no reduction between the warps in a turn
    d_weight = tl.zeros((BLOCK, W_PAD), tl.float32)
    d_bias = tl.zeros((BLOCK, W_PAD), tl.float32)
    d_shift = tl.zeros((BLOCK, W_PAD), tl.float32)
    turns = (n_rows + BLOCK - 1) // BLOCK
    for turn in range(tl.program_id(0), turns, tl.num_programs(0)):
        row = tl.cast(turn, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = row < n_rows
        mask = live[:, None] & (col < W)[None, :]
        x, rstd = _normalised(x_ptr, row, live, shift, eps, W, W_PAD)  # [BLOCK, W_PAD], [BLOCK]
        if GROUPED:
            patch = row.to(tl.int32)
            source = (patch // n_group).to(tl.int64) * stride_group + (patch % n_group).to(tl.int64) * stride_row
        else:
            source = row * stride_row
        g = tl.load(gradient_ptr + source[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK, W_PAD]
        if HAS_SUMS:
            d_weight += g * x
            d_bias += g
        if HAS_DX or HAS_SHIFT:
            g = g * gamma[None, :]
            along = tl.sum(g * x, 1) * (1.0 / W)
            dx = (g - (tl.sum(g, 1) * (1.0 / W))[:, None] - x * along[:, None]) * rstd[:, None]
            if HAS_SHIFT and HAS_SUMS:
                d_shift += dx
            if HAS_DX:
                tl.store(dx_ptr + row[:, None] * W + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_SUMS:
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * (3 * W) + col
        tl.store(sums, tl.sum(d_weight, 0), mask=col < W)
        tl.store(sums + W, tl.sum(d_bias, 0), mask=col < W)
        tl.store(sums + 2 * W, tl.sum(d_shift, 0), mask=col < W)  # zero without a shift


def unsupported(sizes: dict[str, Any]) -> list[str]:
    """Reasons against sizes as ``TNT.sizes()`` gives them; an empty list if the kernel takes them."""
    reasons = []
    if not 1 <= sizes["C"] <= 128:
        reasons.append(f"C={sizes['C']} channels a pixel; accepted: 1 to 128")
    if not 1 <= sizes["E"] <= 1024:
        reasons.append(f"E={sizes['E']} channels a patch; accepted: 1 to 1024")
    if sizes["S"] < 1:
        reasons.append(f"S={sizes['S']} pixels a patch; accepted: at least 1")
    if sizes["S"] * sizes["C"] > WIDEST:
        reasons.append(f"S·C={sizes['S'] * sizes['C']} values a patch; accepted: up to {WIDEST}")
    return reasons


def _limits(sizes: dict[str, Any]) -> list[str]:
    """Reasons against the sizes of a call, by the letters of ``DESCRIPTION``; those of the activations may be unknown."""
    reasons = unsupported(sizes)
    width, S, C = sizes["W"], sizes["S"], sizes["C"]
    if width not in (C, S * C):
        reasons.append(f"norm1_weight has {width} values; accepted: S·C={S * C}, or C={C} (legacy)")
    if "P" in sizes:
        P, B, T = sizes["P"], sizes["B"], sizes["T"]
        if T < 1 or P != B * (T - 1):
            reasons.append(f"pixel has {P} patches, patch has {B} images with {T - 1} each")
        if P * S > MOST_ROWS:
            reasons.append(f"{P} patches of {S} pixels; accepted: up to {MOST_ROWS} pixels in all")
    return reasons


DESCRIPTION = Description(
    "fold",
    (
        Argument("pixel", "P S C", activation=True), Argument("patch", "B T E", activation=True),
        Argument("norm1_weight", "W"), Argument("norm1_bias", "W", optional=True),
        Argument("proj_weight", "E S*C"), Argument("proj_bias", "E", optional=True),
        Argument("norm2_weight", "E", optional=True), Argument("norm2_bias", "E", optional=True),
    ),
    _limits,
    numbers=lambda given: ({}, wrong_eps(given)),
)  # fmt: skip


def gradients_unsupported(sizes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Reasons why PyTorch computes the gradients of sizes that the forward takes."""
    width = max(sizes["S"] * sizes["C"], sizes["E"])
    return [f"rows of {width} values (S·C, or E); the backward takes 1 to {NORM_WIDTH}"] if width > NORM_WIDTH else []


def _specialise(S: int, C: int, E: int, legacy: bool, has_bias: bool, has_norm2: bool, dtype: str, prec: str) -> Launch:
    block, block_k, warps, stages = CONFIGS[dtype]
    block_e = min(128, max(16, triton.next_power_of_2(E)))
    if 4 * block_e < E:  # a wide row's outputs leave registers for one part of 32 rows, and shared memory for less of K
        block, block_k = ROWS, 32
    c_pad = max(16, triton.next_power_of_2(C))
    if legacy and c_pad * -(-E // block_e) * block_e > 1 << 15:  # the next pixel's weights do not fit on the chip besides
        stages = 1
    weights = ("norm1_weight", "norm1_bias", "proj_weight", "proj_bias", "norm2_weight", "norm2_bias")
    constants = dict(
        S=S, C=C, C_PAD=c_pad, E=E, BLOCK_E=block_e, N_E=-(-E // block_e), BLOCK=block, ROWS=ROWS,
        BLOCK_K=block_k, LEGACY=legacy, HAS_BIAS=has_bias, HAS_NORM2=has_norm2, PRECISION=prec,
    )  # fmt: skip
    pointers = {name: dtype for name in ("pixel_ptr", "patch_ptr", "y_ptr", *(f"{w}_ptr" for w in weights))}
    integers = ("n_rows", "n_patches", "patch_stride_b", "patch_stride_n")
    turns = S if legacy else -(-S * C // block_k)
    return Launch(_fold_fwd_kernel, pointers, integers, constants, warps, stages, block, floats=("eps",), turns=turns)


def _specialise_norm(W: int, dtype: str) -> Launch:
    values, each, _ = NORM_CONFIG
    pad = triton.next_power_of_2(W)
    block = max(1, values // pad)
    constants = dict(W=W, W_PAD=pad, BLOCK=block)
    pointers = {name: dtype for name in ("x_ptr", "y_ptr", "weight_ptr", "bias_ptr")}
    warps = min(16, max(1, block * pad // (32 * each)))
    return Launch(_fold_norm_kernel, pointers, ("n_rows",), constants, warps, 1, block, floats=("eps",))


def _specialise_norm_bwd(W: int, has_shift: bool, grouped: bool, has_dx: bool, has_sums: bool, dtype: str) -> Launch:
    norm = _specialise_norm(W, dtype)
    constants = norm.constants | dict(HAS_SHIFT=has_shift, GROUPED=grouped, HAS_DX=has_dx, HAS_SUMS=has_sums)
    pointers = {name: dtype for name in ("x_ptr", "shift_ptr", "weight_ptr", "gradient_ptr", "dx_ptr")} | {"sums_ptr": "fp32"}
    integers = ("n_rows", "n_group", "stride_group", "stride_row")
    return norm._replace(kernel=_fold_norm_bwd_kernel, pointers=pointers, integers=integers, constants=constants)


def launches() -> Iterable[tuple[str, str, Launch]]:
    """(variant, dtype, specialisation) of the named variants; the blocks' fold, of which the stem's differs by its bias."""
    for variant, (C, E, legacy) in {"ti": (12, 192, False), "s": (24, 384, False), "s_legacy": (24, 384, True),
                                    "b": (40, 640, False)}.items():  # fmt: skip
        for dtype in CONFIGS:
            yield variant, dtype, _specialise(16, C, E, legacy, legacy, not legacy, dtype, "ieee")
            width, rows = (C, 16) if legacy else (16 * C, 1)  # the first norm's, rows a patch
            backward = [_specialise_norm(width, dtype), _specialise_norm_bwd(width, False, False, True, True, dtype)]
            for launch in backward:
                yield variant, dtype, launch._replace(patches=launch.patches / rows)
            if not legacy:
                yield variant, dtype, _specialise_norm_bwd(E, False, True, True, True, dtype)


def _fold(
    pixel: Tensor,
    patch: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    eps: float,
) -> Tensor:
    DESCRIPTION.check(locals())
    (rows, S, C), (batch, tokens, E) = pixel.shape, patch.shape
    pixel = pixel.contiguous()
    patch = patch if patch.stride(-1) == 1 else patch.contiguous()
    out = torch.empty((batch, tokens, E), dtype=torch.promote_types(pixel.dtype, patch.dtype), device=pixel.device)
    if rows == 0:
        return out.copy_(patch)
    legacy = norm1_weight.shape[0] == C and S > 1
    spec = _specialise(
        S, C, E, legacy, proj_bias is not None, norm2_weight is not None, DTYPES[pixel.dtype], precision(pixel.dtype)
    )
    unread = norm1_weight  # stands for what the specialisation does not read
    second = (unread, unread) if norm2_weight is None else (norm2_weight.contiguous(), zeros_for_none(norm2_bias, norm2_weight))
    start(
        spec, -(-rows // spec.constants["BLOCK"]), pixel, patch, out, norm1_weight.contiguous(),
        zeros_for_none(norm1_bias, norm1_weight), proj_weight.contiguous(),
        unread if proj_bias is None else proj_bias.contiguous(), *second, rows, tokens - 1, *patch.stride()[:2], eps,
    )  # fmt: skip
    return out


def _empty(pixel, patch, *args):
    return torch.empty(patch.shape, dtype=torch.promote_types(pixel.dtype, patch.dtype), device=pixel.device)


def _multiply_adds(pixel, patch, *args) -> int:
    return pixel[0] * pixel[1] * pixel[2] * patch[2]


def _fold_backward(
    gradient: Tensor,
    pixel: Tensor,
    patch: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    eps: float,
    needed: list[int],
) -> list[Tensor]:
    """By the kernels, but for the sizes of ``gradients_unsupported``, which PyTorch takes."""
    _, S, C = pixel.shape
    batch, tokens, E = patch.shape
    if gradients_unsupported({"S": S, "C": C, "E": E}, pixel.dtype, pixel.device):
        arguments = (pixel, patch, norm1_weight, norm1_bias, proj_weight, proj_bias, norm2_weight, norm2_bias, eps)
        return recomputed(reference.fold, gradient, arguments, needed)
    rows, wanted = pixel.shape[0], set(needed)
    tensors = (pixel, patch, norm1_weight, norm1_bias, proj_weight, proj_bias, norm2_weight, norm2_bias)
    found: dict[int, Tensor] = {}
    if 1 in wanted:
        found[1] = torch.empty(patch.shape, dtype=patch.dtype, device=patch.device).copy_(gradient)
    if norm2_weight is None and 7 in wanted:  # not read alone
        found[7] = torch.zeros_like(norm2_bias, memory_format=torch.contiguous_format)
    if rows == 0:
        found |= {i: torch.zeros_like(tensors[i], memory_format=torch.contiguous_format) for i in wanted - {1}}
    elif wanted - {1}:
        found |= _matrix_gradients(
            gradient[:, 1:], pixel.contiguous(), norm1_weight, norm1_bias, proj_weight.to(pixel.dtype), proj_bias,
            norm2_weight, eps, wanted,
        )  # fmt: skip
    return [found[i].to(tensors[i].dtype).contiguous() for i in needed]


def _matrix_gradients(
    gradient: Tensor,
    pixel: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm2_weight: Tensor | None,
    eps: float,
    wanted: set[int],
) -> dict[int, Tensor]:
    """Gradients of all but the patch, by the position of the argument; ``gradient``: (B, N, E) of any strides, only read."""
    rows, E = pixel.shape[0], weight.shape[0]
    width = norm1_weight.shape[0]  # S·C, or legacy C: then a matrix of more, shorter rows
    found: dict[int, Tensor] = {}
    h = None
    if 4 in wanted or norm2_weight is not None:
        h = _norm(pixel.view(-1, width), norm1_weight, norm1_bias, eps).view(rows, -1)
    if norm2_weight is None:
        dz = gradient.reshape(rows, E).to(pixel.dtype)
        if 5 in wanted:
            found[5] = dz.sum(0, dtype=torch.float32)
    else:
        z = torch.mm(h, weight.t())
        dz, found[6], found[7], found[5] = _norm_backward(
            gradient, z, bias, norm2_weight, eps, bool(wanted & {0, 2, 3, 4}), bool(wanted & {5, 6, 7})
        )
        del z
    if 4 in wanted:
        found[4] = torch.mm(dz.t(), h)
    del h
    if wanted & {0, 2, 3}:
        dh = torch.mm(dz, weight).view(1, -1, width)
        found[0], found[2], found[3], _ = _norm_backward(
            dh, pixel.view(-1, width), None, norm1_weight, eps, 0 in wanted, bool(wanted & {2, 3})
        )
        if 0 in wanted:
            found[0] = found[0].view(pixel.shape)
    return found


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of the rows of a contiguous matrix."""
    spec = _specialise_norm(x.shape[1], DTYPES[x.dtype])
    y = torch.empty_like(x)
    grid = -(-x.shape[0] // spec.constants["BLOCK"])
    start(spec, grid, x, y, weight.contiguous(), zeros_for_none(bias, weight), x.shape[0], eps)
    return y


def _norm_backward(
    gradient: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, eps: float, has_dx: bool, has_sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and shift of LN(x + shift), where asked for; ``gradient``: (groups, rows each, W)."""
    rows, W = x.shape
    spec = _specialise_norm_bwd(W, shift is not None, gradient.shape[0] > 1, has_dx, has_sums, DTYPES[x.dtype])
    grid = programs(x.device, -(-rows // spec.constants["BLOCK"]), NORM_CONFIG[2])
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    dx = torch.empty_like(x) if has_dx else None
    sums = torch.empty((grid, 3, W), dtype=torch.float32, device=x.device) if has_sums else None
    start(
        spec, grid, x, x if shift is None else shift.contiguous(), weight.contiguous(), gradient, dx if has_dx else x,
        sums if has_sums else x, rows, gradient.shape[1], *gradient.stride()[:2], eps,
    )  # fmt: skip
    if not has_sums:
        return dx, None, None, None
    d_weight, d_bias, d_shift = (x.to(weight.dtype, copy=True) for x in sums.sum(0))  # results may not share memory
    return dx, d_weight, d_bias, d_shift


_operation = register("fold", _fold, _empty, _multiply_adds, _fold_backward, like_gradient=1)


def fold(
    pixel: Tensor,
    patch: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor | None = None,
    norm2_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``reference.fold``, fused: float32, float16 or bfloat16, the weights in the same dtype (or float32 under autocast).

    Raises:
        TypeError, ValueError: a tensor of another dtype, device or shape; named, with what is accepted.
    """
    if norm2_weight is None:
        norm2_bias = None  # the reference does not read it alone, either
    tensors = (pixel, patch, norm1_weight, norm1_bias, proj_weight, proj_bias, norm2_weight, norm2_bias)
    return _operation(*DESCRIPTION.prepare(*tensors), eps)
