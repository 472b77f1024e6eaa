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
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast import reference
from tnt_fast.kernels.operation import DTYPES, check_shape, check_tensors, precision, register, start, under_autocast
from tnt_fast.kernels.tile import Launch

# dtype: (rows per program, K chunk, warps, stages). Chosen by static cost for sm_90 on 2026-11-22, not yet timed on a GPU.
CONFIGS = {
    "bf16": (64, 64, 8, 2),
    "fp16": (64, 64, 8, 2),
    "fp32": (32, 32, 8, 1),
}
ROWS = 32


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
    K: tl.constexpr = S * C
    PARTS: tl.constexpr = BLOCK // ROWS
    first = tl.program_id(0).to(tl.int64) * BLOCK
    r = tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    # LEGACY walks over pixels, a chunk of C channels (padded) each, normalised by itself; else over chunks of all S·C values
    STEP: tl.constexpr = C if LEGACY else BLOCK_K
    WIDTH: tl.constexpr = C_PAD if LEGACY else BLOCK_K
    k = tl.arange(0, WIDTH)

    mean, rstd = (), ()
    for p in tl.static_range(PARTS):
        row = first + p * ROWS + r
        mean_p = tl.zeros((ROWS,), tl.float32)
        square_p = tl.zeros((ROWS,), tl.float32)
        if not LEGACY:  # chunk by chunk, means and squared deviations merged: exact for large means
            for k0 in tl.static_range(0, K, STEP):
                at = k0 + k
                x = tl.load(
                    pixel_ptr + row[:, None] * K + at[None, :], mask=(row < n_rows)[:, None] & (at < K)[None, :], other=0.0
                ).to(tl.float32)  # [ROWS, BLOCK_K]
                mean_p, square_p = _merge(x, (at < K)[None, :], mean_p, square_p, k0, K - k0 if K - k0 < STEP else STEP)
        mean = mean + (mean_p,)
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
        weights = ()
        for i in tl.static_range(N_E):
            out = i * BLOCK_E + e
            w = tl.load(
                proj_weight_ptr + out[None, :] * K + at[:, None], mask=(out < E)[None, :] & real[:, None], other=0.0
            )  # [WIDTH, BLOCK_E]
            weights = weights + (w.to(DT),)
        new = ()
        for p in tl.static_range(PARTS):
            row = first + p * ROWS + r
            x = tl.load(pixel_ptr + row[:, None] * K + at[None, :], mask=(row < n_rows)[:, None] & real[None, :], other=0.0).to(
                tl.float32
            )  # [ROWS, WIDTH]
            if LEGACY:
                m = tl.sum(x, 1) * (1.0 / C)
                x = tl.where(real[None, :], x - m[:, None], 0.0)
                x = x * tl.rsqrt(tl.sum(x * x, 1) * (1.0 / C) + eps)[:, None]
            else:
                x = (x - mean[p][:, None]) * rstd[p][:, None]
            h = tl.where(real[None, :], x * gamma[None, :] + beta[None, :], 0.0).to(DT)
            for i in tl.static_range(N_E):
                new = new + (tl.dot(h, weights[i], accs[p * N_E + i], input_precision=PRECISION),)
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
            y = accs[p * N_E + i]
            if HAS_BIAS:
                y += tl.load(proj_bias_ptr + out, mask=out < E, other=0.0).to(tl.float32)[None, :]
            biased = biased + (y,)
            total += tl.sum(y, 1)  # columns past E are zero
        m = total * (1.0 / E)
        square = tl.zeros((ROWS,), tl.float32)
        if HAS_NORM2:
            for i in tl.static_range(N_E):
                d = tl.where((i * BLOCK_E + e < E)[None, :], biased[i] - m[:, None], 0.0)
                square += tl.sum(d * d, 1)
        s = tl.rsqrt(square * (1.0 / E) + eps)
        for i in tl.static_range(N_E):
            out = i * BLOCK_E + e
            y = biased[i]
            if HAS_NORM2:
                gamma = tl.load(norm2_weight_ptr + out, mask=out < E, other=0.0).to(tl.float32)
                beta = tl.load(norm2_bias_ptr + out, mask=out < E, other=0.0).to(tl.float32)
                y = (y - m[:, None]) * s[:, None] * gamma[None, :] + beta[None, :]
            mask = live[:, None] & (out < E)[None, :]
            source = image * patch_stride_b + (1 + row % n_patches) * patch_stride_n
            y += tl.load(patch_ptr + source[:, None] + out[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + token[:, None] * E + out[None, :], y.to(DT), mask=mask)
            # the class token goes along with its image's first patch
            mask = mask & (row % n_patches == 0)[:, None]
            cls = tl.load(patch_ptr + (image * patch_stride_b)[:, None] + out[None, :], mask=mask, other=0.0)
            tl.store(y_ptr + ((token - 1) * E)[:, None] + out[None, :], cls.to(DT), mask=mask)


def unsupported(sizes: dict[str, Any]) -> list[str]:
    """Reasons against sizes as ``TNT.sizes()`` gives them; an empty list if the kernel takes them."""
    reasons = []
    if not 1 <= sizes["C"] <= 128:
        reasons.append(f"C={sizes['C']} channels a pixel; accepted: 1 to 128")
    if not 1 <= sizes["E"] <= 1024:
        reasons.append(f"E={sizes['E']} channels a patch; accepted: 1 to 1024")
    return reasons


def _specialise(S: int, C: int, E: int, legacy: bool, has_bias: bool, has_norm2: bool, dtype: str, prec: str) -> Launch:
    block, block_k, warps, stages = CONFIGS[dtype]
    block_e = min(128, max(16, triton.next_power_of_2(E)))
    if 4 * block_e < E:  # a wide row's outputs leave registers for one part of 32 rows, and shared memory for less of K
        block, block_k = ROWS, 32
    weights = ("norm1_weight", "norm1_bias", "proj_weight", "proj_bias", "norm2_weight", "norm2_bias")
    constants = dict(
        S=S, C=C, C_PAD=max(16, triton.next_power_of_2(C)), E=E, BLOCK_E=block_e, N_E=-(-E // block_e), BLOCK=block, ROWS=ROWS,
        BLOCK_K=block_k, LEGACY=legacy, HAS_BIAS=has_bias, HAS_NORM2=has_norm2, PRECISION=prec,
    )  # fmt: skip
    pointers = {name: dtype for name in ("pixel_ptr", "patch_ptr", "y_ptr", *(f"{w}_ptr" for w in weights))}
    integers = ("n_rows", "n_patches", "patch_stride_b", "patch_stride_n")
    turns = S if legacy else -(-S * C // block_k)
    return Launch(_fold_fwd_kernel, pointers, integers, constants, warps, stages, block, floats=("eps",), turns=turns)


def launches() -> Iterable[tuple[str, str, Launch]]:
    """(variant, dtype, specialisation) of the named variants; the blocks' fold, of which the stem's differs by its bias."""
    for variant, (C, E, legacy) in {"ti": (12, 192, False), "s": (24, 384, False), "s_legacy": (24, 384, True),
                                    "b": (40, 640, False)}.items():  # fmt: skip
        for dtype in CONFIGS:
            yield variant, dtype, _specialise(16, C, E, legacy, legacy, not legacy, dtype, "ieee")


def _fold(
    pixel: Tensor,
    patch: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    eps: float,
) -> Tensor:
    check_tensors(
        "fold", pixel=pixel, patch=patch, norm1_weight=norm1_weight, norm1_bias=norm1_bias, proj_weight=proj_weight,
        proj_bias=proj_bias, norm2_weight=norm2_weight, norm2_bias=norm2_bias,
    )  # fmt: skip
    batch, tokens, E = _check_shapes(pixel, patch, norm1_weight, norm1_bias, proj_weight, proj_bias, norm2_weight, norm2_bias)
    pixel = pixel.contiguous()
    patch = patch.to(pixel.dtype)
    patch = patch if patch.stride(-1) == 1 else patch.contiguous()
    out = torch.empty((batch, tokens, E), dtype=pixel.dtype, device=pixel.device)
    rows, S, C = pixel.shape
    if out.numel() == 0 or rows == 0:
        return out.copy_(patch)
    legacy = norm1_weight.shape[0] == C and S > 1
    spec = _specialise(
        S, C, E, legacy, proj_bias is not None, norm2_weight is not None, DTYPES[pixel.dtype], precision(pixel.dtype)
    )
    absent = norm1_weight  # never read
    start(
        spec, -(-rows // spec.constants["BLOCK"]), pixel, patch, out, norm1_weight.contiguous(), norm1_bias.contiguous(),
        proj_weight.contiguous(), absent if proj_bias is None else proj_bias, absent if norm2_weight is None else norm2_weight,
        absent if norm2_bias is None else norm2_bias, rows, tokens - 1, patch.stride(0), patch.stride(1), eps,
    )  # fmt: skip
    return out


def _check_shapes(pixel, patch, norm1_weight, norm1_bias, proj_weight, proj_bias, norm2_weight, norm2_bias):
    if pixel.ndim != 3 or patch.ndim != 3:
        raise ValueError(
            f"fold: pixel {tuple(pixel.shape)}, patch {tuple(patch.shape)}; expected (B·N, S, C) and (B, 1 + N, E)"
        )
    (rows, S, C), (batch, tokens, E) = pixel.shape, patch.shape
    if rows != batch * (tokens - 1):
        raise ValueError(f"fold: pixel has {rows} patches, patch has {batch} images with {tokens - 1} each")
    width = norm1_weight.shape[0]
    if width not in (C, S * C):
        raise ValueError(f"fold: norm1_weight has {width} values; accepted: S·C={S * C}, or C={C} (legacy)")
    check_shape("fold", "norm1_weight", norm1_weight, width)
    check_shape("fold", "norm1_bias", norm1_bias, width)
    check_shape("fold", "proj_weight", proj_weight, E, S * C)
    for name, tensor in (("proj_bias", proj_bias), ("norm2_weight", norm2_weight), ("norm2_bias", norm2_bias)):
        check_shape("fold", name, tensor, E)
    return batch, tokens, E


def _empty(pixel, patch, *args):
    return torch.empty(patch.shape, dtype=pixel.dtype, device=pixel.device)


def _multiply_adds(pixel, patch, *args) -> int:
    return pixel[0] * pixel[1] * pixel[2] * patch[2]


_operation = register("fold", _fold, _empty, reference.fold, _multiply_adds)


def fold(
    pixel: Tensor,
    patch: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
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
    pixel, patch = under_autocast(pixel, patch)
    return _operation(
        pixel, patch, norm1_weight, norm1_bias, proj_weight, proj_bias, norm2_weight, norm2_bias, eps
    )  # fmt: skip
