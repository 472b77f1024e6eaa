"""pixel_embed: image to pixel tokens of every patch, in one launch and without an unfolded copy of the image.

    y[b·N + n, s, c] = bias[c] + pixel_pos[c, s] + Σ_{channel, ky, kx} weight[c, channel, ky, kx] · image[b, channel, iy, ix]

for the pixel s = (sy, sx) of patch n = (py, px), with iy = py·patch_stride + sy·stride − 3 + ky and ix alike. Outside of the
patch (legacy: of the image) the image counts as zero; that halo is all in which the two stems differ.

Shapes: image (B, channels, H, W) of any strides, weight (C, channels, 7, 7), result (B·N, S, C) contiguous. Bytes moved: the
image once (a token's 7×7 window overlaps its neighbours' in the L1 cache), the tokens once. Accumulation is float32.

A program takes BLOCK tokens a turn as an implicit matrix product of K = 7·8 (a row of the window padded by one) per channel;
the weights are loaded once. 32 rows keep Hopper on the synchronous mma instruction (see fold.py).
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
    check_shape,
    check_tensors,
    precision,
    programs,
    register,
    start,
    under_autocast,
)
from tnt_fast.kernels.tile import Launch

# dtype: (tokens a turn, warps, programs a multiprocessor). Chosen by static cost for sm_90 on 2026-11-22, not yet timed.
CONFIGS = {
    "bf16": (32, 2, 8),
    "fp16": (32, 2, 8),
    "fp32": (16, 4, 4),
}
WINDOW = 7


@triton.jit
def _pixel_embed_fwd_kernel(
    image_ptr, y_ptr, weight_ptr, bias_ptr, pixel_pos_ptr,
    n_tokens, n_patches, columns, height, width, stride_b, stride_c, stride_h, stride_w,
    CHANNELS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, S: tl.constexpr, S_W: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, STRIDE: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, LEGACY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = y_ptr.dtype.element_ty
    k = tl.arange(0, 64)  # a channel's window, 8 to a row: 7·8 of 64 are real
    ky, kx = k // 8, k % 8
    real = (ky < 7) & (kx < 7)
    ch = tl.arange(0, C_PAD)
    weights = ()
    for c in tl.static_range(CHANNELS):
        place = ch[None, :] * (CHANNELS * 49) + (c * 49 + ky * 7 + kx)[:, None]
        w = tl.load(weight_ptr + place, mask=real[:, None] & (ch < C)[None, :], other=0.0)  # [64, C_PAD]
        weights = weights + (w.to(DT),)
    bias = tl.zeros((C_PAD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + ch, mask=ch < C, other=0.0).to(tl.float32)

    turns = (n_tokens + BLOCK - 1) // BLOCK
    for turn in range(tl.program_id(0), turns, tl.num_programs(0)):
        token = tl.cast(turn, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = token < n_tokens
        patch, s = token // S, (token % S).to(tl.int32)
        image, n = patch // n_patches, (patch % n_patches).to(tl.int32)
        y0 = s // S_W * STRIDE - 3  # window's corner within the patch
        x0 = s % S_W * STRIDE - 3
        top, left = n // columns * STEP_H, n % columns * STEP_W
        iy, ix = y0[:, None] + ky[None, :], x0[:, None] + kx[None, :]  # [BLOCK, 64]
        if LEGACY:
            inside = (top[:, None] + iy >= 0) & (top[:, None] + iy < height)
            inside = inside & (left[:, None] + ix >= 0) & (left[:, None] + ix < width)
        else:
            inside = (iy >= 0) & (iy < PATCH_H) & (ix >= 0) & (ix < PATCH_W)
        inside = inside & real[None, :] & live[:, None]
        at = (
            (image * stride_b)[:, None]
            + (top[:, None] + iy).to(tl.int64) * stride_h
            + (left[:, None] + ix).to(tl.int64) * stride_w
        )
        acc = tl.zeros((BLOCK, C_PAD), tl.float32) + bias[None, :]
        if HAS_POS:
            mask = live[:, None] & (ch < C)[None, :]
            acc += tl.load(pixel_pos_ptr + ch[None, :] * S + s[:, None], mask=mask, other=0.0).to(tl.float32)
        for c in tl.static_range(CHANNELS):
            x = tl.load(image_ptr + c * stride_c + at, mask=inside, other=0.0).to(DT)  # [BLOCK, 64]
            acc = tl.dot(x, weights[c], acc, input_precision=PRECISION)
        tl.store(y_ptr + token[:, None] * C + ch[None, :], acc.to(DT), mask=live[:, None] & (ch < C)[None, :])


def unsupported(sizes: dict[str, Any]) -> list[str]:
    """Reasons against sizes as ``TNT.sizes()`` gives them; an empty list if the kernel takes them."""
    reasons = []
    if not 1 <= sizes["C"] <= 128:
        reasons.append(f"C={sizes['C']} channels a pixel; accepted: 1 to 128")
    if not 1 <= sizes["channels"] <= 8:
        reasons.append(f"{sizes['channels']} channels of the image; accepted: 1 to 8")
    if sizes["kernel"] != WINDOW:
        reasons.append(f"a {sizes['kernel']}×{sizes['kernel']} convolution; accepted: {WINDOW}×{WINDOW}")
    return reasons


def _specialise(
    channels: int, C: int, patch_size: list[int], stride: int, patch_stride: list[int], legacy: bool, has_bias: bool,
    has_pos: bool, dtype: str, prec: str,
) -> Launch:  # fmt: skip
    block, warps, _ = CONFIGS[dtype]
    rows, columns = patch_size[0] // stride, patch_size[1] // stride
    constants = dict(
        CHANNELS=channels, C=C, C_PAD=max(16, triton.next_power_of_2(C)), S=rows * columns, S_W=columns, PATCH_H=patch_size[0],
        PATCH_W=patch_size[1], STRIDE=stride, STEP_H=patch_stride[0], STEP_W=patch_stride[1], LEGACY=legacy, HAS_BIAS=has_bias,
        HAS_POS=has_pos, BLOCK=block, PRECISION=prec,
    )  # fmt: skip
    pointers = {name: dtype for name in ("image_ptr", "y_ptr", "weight_ptr", "bias_ptr", "pixel_pos_ptr")}
    integers = ("n_tokens", "n_patches", "columns", "height", "width", "stride_b", "stride_c", "stride_h", "stride_w")
    return Launch(_pixel_embed_fwd_kernel, pointers, integers, constants, warps, 1, block / (rows * columns))


def launches() -> Iterable[tuple[str, str, Launch]]:
    """(variant, dtype, specialisation) of the named variants."""
    for variant, (C, legacy) in {"ti": (12, False), "s": (24, False), "s_legacy": (24, True), "b": (40, False)}.items():
        for dtype in CONFIGS:
            yield variant, dtype, _specialise(3, C, [16, 16], 4, [16, 16], legacy, True, True, dtype, "ieee")


def _grid(height: int, width: int, patch_size: list[int], patch_stride: list[int]) -> tuple[int, int]:
    return (height - patch_size[0]) // patch_stride[0] + 1, (width - patch_size[1]) // patch_stride[1] + 1


def _pixel_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixel_pos: Tensor | None,
    patch_size: list[int],
    stride: int,
    patch_stride: list[int],
    legacy: bool,
) -> Tensor:
    check_tensors("pixel_embed", image=image, weight=weight, bias=bias, pixel_pos=pixel_pos)
    if image.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"pixel_embed: image {tuple(image.shape)}, weight {tuple(weight.shape)}; expected (B, channels, H, W) "
            "and (C, channels, 7, 7)"
        )
    (B, channels, height, width), C = image.shape, weight.shape[0]
    check_shape("pixel_embed", "weight", weight, C, channels, WINDOW, WINDOW)
    check_shape("pixel_embed", "bias", bias, C)
    for size, step in zip(patch_size, patch_stride, strict=True):
        if size % stride or step % stride:
            raise ValueError(
                f"pixel_embed: stride {stride} does not divide patch_size {patch_size} and patch_stride {patch_stride}"
            )
    check_shape("pixel_embed", "pixel_pos", pixel_pos, 1, C, patch_size[0] // stride, patch_size[1] // stride)
    rows, columns = _grid(height, width, patch_size, patch_stride)
    spec = _specialise(
        channels, C, patch_size, stride, patch_stride, legacy, bias is not None, pixel_pos is not None, DTYPES[image.dtype],
        precision(image.dtype),
    )  # fmt: skip
    S = spec.constants["S"]
    out = torch.empty((B * rows * columns, S, C), dtype=image.dtype, device=image.device)
    tokens = out.shape[0] * S
    if tokens == 0:
        return out
    grid = programs(image.device, -(-tokens // spec.constants["BLOCK"]), CONFIGS[DTYPES[image.dtype]][2])
    weight = weight.contiguous()
    start(
        spec, grid, image, out, weight, weight if bias is None else bias.contiguous(),
        weight if pixel_pos is None else pixel_pos.contiguous(),
        tokens, rows * columns, columns, height, width, *image.stride(),
    )  # fmt: skip
    return out


def _empty(image, weight, bias, pixel_pos, patch_size, stride, patch_stride, legacy):
    rows, columns = _grid(image.shape[2], image.shape[3], patch_size, patch_stride)
    S = patch_size[0] // stride * (patch_size[1] // stride)
    return torch.empty((image.shape[0] * rows * columns, S, weight.shape[0]), dtype=image.dtype, device=image.device)


def _multiply_adds(image, weight, bias, pixel_pos, patch_size, stride, patch_stride, legacy) -> int:
    rows, columns = _grid(image[2], image[3], patch_size, patch_stride)
    tokens = image[0] * rows * columns * (patch_size[0] // stride) * (patch_size[1] // stride)
    return tokens * weight[0] * weight[1] * weight[2] * weight[3]


_operation = register("pixel_embed", _pixel_embed, _empty, reference.pixel_embed, _multiply_adds)


def pixel_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixel_pos: Tensor | None,
    patch_size: tuple[int, int],
    stride: int,
    patch_stride: tuple[int, int],
    legacy: bool = False,
) -> Tensor:
    """``reference.pixel_embed``, fused: float32, float16 or bfloat16, weights in the same dtype (or float32 under autocast).

    Raises:
        TypeError, ValueError: a tensor of another dtype, device or shape; named, with what is accepted.
    """
    (image,) = under_autocast(image)
    return _operation(image, weight, bias, pixel_pos, list(patch_size), stride, list(patch_stride), legacy)
