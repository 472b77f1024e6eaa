"""pixel_embed: image to pixel tokens of every patch, in one launch and without an unfolded copy of the image.

    y[b·N + n, s, c] = bias[c] + pixel_pos[c, s] + Σ_{channel, ky, kx} weight[c, channel, ky, kx] · image[b, channel, iy, ix]

for the pixel s = (sy, sx) of patch n = (py, px), with iy = py·patch_stride + sy·stride − 3 + ky and ix alike. Outside of the
patch (legacy: of the image) the image counts as zero; that halo is all in which the two stems differ.

Shapes: image (B, channels, H, W) of any strides, weight (C, channels, 7, 7), result (B·N, S, C) contiguous. Bytes moved: the
image once (a token's 7×7 window overlaps its neighbours' in the L1 cache), the tokens once. Accumulation is float32.

A program takes BLOCK tokens a turn as an implicit matrix product of K = 7·8 (a row of the window padded by one) per channel;
the weights are loaded once. 32 rows keep Hopper on the synchronous mma instruction (see fold.py).

Backward, with g the gradient of y, from the inputs alone:

    dpixel_pos[c, s] = Σ_patch g[patch, s, c],  dbias[c] = Σ_s dpixel_pos[c, s]        sums by PyTorch, in float32
    dweight[c, channel, ky, kx] = Σ_token window[token, channel, ky, kx] · g[token, c]  the forward's product, turned round
    dimage[b, channel, iy, ix] = Σ over the windows on it of Σ_c weight[c, channel, ky, kx] · g[token, c]

A program sums dweight in float32 over all its turns and stores it once; one reduction adds the programs. The image's gradient,
which training does not ask for, is gathered: each of its pixels looks up the windows that cover it. No atomics: the same input
gives the same bits. Bytes moved: image and g once each for the weight, g and the weights from the caches for the image.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast.kernels.operation import (
    DTYPES,
    MOST_ROWS,
    Argument,
    Description,
    precision,
    programs,
    register,
    start,
)
from tnt_fast.kernels.tile import Launch, dot, dot_onto

# dtype: (tokens a turn, warps, programs a multiprocessor). Chosen by static cost for sm_90 on 2026-11-22, not yet timed.
CONFIGS = {
    "bf16": (32, 2, 8),
    "fp16": (32, 2, 8),
    "fp32": (16, 4, 4),
}
# The weight's gradient, likewise; in fp32 the products are no matrix instructions.
WEIGHT_CONFIGS = {
    "bf16": (32, 4, 2),
    "fp16": (32, 4, 2),
    "fp32": (16, 4, 4),
}
IMAGE_BLOCK = 32  # pixels of the image a program, for the image's gradient
WINDOW = 7
LONGEST_SIDE = 2**20


@triton.jit
def _window(
    token, k, n_tokens, n_patches, columns, height, width, stride_b, stride_h, stride_w, S: tl.constexpr, S_W: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, STRIDE: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    LEGACY: tl.constexpr,
):  # fmt: skip
    """Where the value k = 8·ky + kx of a token's window lies in a channel of the image, and whether it counts."""
    patch, s = (token // S).to(tl.int32), (token % S).to(tl.int32)
    image, n = patch // n_patches, patch % n_patches
    y0, x0 = s // S_W * STRIDE - 3, s % S_W * STRIDE - 3  # window's corner within the patch
    top, left = n // columns * STEP_H + y0, n % columns * STEP_W + x0  # and within the image
    ky, kx = k // 8, k % 8
    corner = image.to(tl.int64) * stride_b + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    at = corner + (ky.to(tl.int64) * stride_h + kx.to(tl.int64) * stride_w)  # one addition for each value of a tile
    # as unsigned numbers, those below zero are past every size
    if LEGACY:
        inside = ((top + ky).to(tl.uint32) < height) & ((left + kx).to(tl.uint32) < width)
    else:
        inside = ((y0 + ky).to(tl.uint32) < PATCH_H) & ((x0 + kx).to(tl.uint32) < PATCH_W)
    return at, inside & ((ky < 7) & (kx < 7)) & (token < n_tokens)


@triton.jit
def _channel_weight(weight_ptr, c, CHANNELS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, DTYPE: tl.constexpr):
    """The weight of a channel of the image, [64, C_PAD]: its window has 8 to a row, 7·8 of 64 are real."""
    k, ch = tl.arange(0, 64), tl.arange(0, C_PAD)
    real = (k // 8 < 7) & (k % 8 < 7)
    place = ch[None, :] * (CHANNELS * 49) + (c * 49 + k // 8 * 7 + k % 8)[:, None]
    return tl.load(weight_ptr + place, mask=real[:, None] & (ch < C)[None, :], other=0.0).to(DTYPE)


@triton.jit
def _pixel_embed_fwd_kernel(
    image_ptr, y_ptr, weight_ptr, bias_ptr, pixel_pos_ptr,
    n_tokens, n_patches, columns, height, width, stride_b, stride_c, stride_h, stride_w,
    CHANNELS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, S: tl.constexpr, S_W: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, STRIDE: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, LEGACY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POS: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = y_ptr.dtype.element_ty
    k = tl.arange(0, 64)  # a channel's window, 8 to a row: 7·8 of 64 are real
    ky, kx = k // 8, k % 8
    real = (ky < 7) & (kx < 7)
    ch = tl.arange(0, C_PAD)
    weights = ()
    if KEEP:
        for c in tl.static_range(CHANNELS):
            weights = weights + (_channel_weight(weight_ptr, c, CHANNELS, C, C_PAD, DT),)
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
            x = tl.load(image_ptr + tl.cast(c, tl.int64) * stride_c + at, mask=inside, other=0.0).to(DT)  # [BLOCK, 64]
            w = weights[c] if KEEP else _channel_weight(weight_ptr, c, CHANNELS, C, C_PAD, DT)
            acc = dot(x, w, PRECISION, acc)
        tl.store(y_ptr + token[:, None] * C + ch[None, :], acc.to(DT), mask=live[:, None] & (ch < C)[None, :])


@triton.jit
def _pixel_embed_weight_bwd_kernel(
    image_ptr, gradient_ptr, sums_ptr,
    n_tokens, n_patches, columns, height, width, stride_b, stride_c, stride_h, stride_w,
    CHANNELS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, S: tl.constexpr, S_W: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, STRIDE: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, LEGACY: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's sums of the weight's gradient over its tokens, for GROUP of the image's channels: [CHANNELS, 64, C] each."""
    GROUPS: tl.constexpr = (CHANNELS + GROUP - 1) // GROUP
    DT: tl.constexpr = gradient_ptr.dtype.element_ty
    workers = tl.num_programs(0) // GROUPS
    worker = tl.program_id(0) // GROUPS
    first = tl.program_id(0) % GROUPS * GROUP
    leader = tl.zeros((1, 1), tl.int32) + first  # for masks: a scalar in them is no boolean in Triton 3.9's interpreter
    k = tl.arange(0, 64)
    ch = tl.arange(0, C_PAD)
    sums = ()
    for _ in tl.static_range(GROUP):
        sums = sums + (tl.zeros((64, C_PAD), tl.float32),)
    turns = (n_tokens + BLOCK - 1) // BLOCK
    for turn in range(worker, turns, workers):
        token = tl.cast(turn, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at, inside = _window(
            token[:, None], k[None, :], n_tokens, n_patches, columns, height, width, stride_b, stride_h, stride_w,
            S, S_W, PATCH_H, PATCH_W, STRIDE, STEP_H, STEP_W, LEGACY,
        )  # fmt: skip
        mask = (token < n_tokens)[:, None] & (ch < C)[None, :]
        g = tl.load(gradient_ptr + token[:, None] * C + ch[None, :], mask=mask, other=0.0)  # [BLOCK, C_PAD]
        new = ()
        for c in tl.static_range(GROUP):
            channel = image_ptr + (first + c).to(tl.int64) * stride_c
            x = tl.load(channel + at, mask=inside & (leader + c < CHANNELS), other=0.0).to(DT)  # [BLOCK, 64]
            new = new + (dot_onto(sums[c], tl.trans(x), g, tl.float32 == DT, PRECISION),)
        sums = new
    for c in tl.static_range(GROUP):
        to = sums_ptr + ((worker.to(tl.int64) * CHANNELS + first + c) * 64 + k)[:, None] * C + ch[None, :]
        tl.store(to, sums[c], mask=(ch < C)[None, :] & (leader + c < CHANNELS))


@triton.jit
def _pixel_embed_image_bwd_kernel(
    weight_ptr, gradient_ptr, image_ptr,
    n_pixels, rows, columns, height, width,
    CHANNELS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, STRIDE: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, LEGACY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK pixels of the image, all channels; weight: [CHANNELS, 7, 7, C], image: contiguous.

    Were the tokens of all patches on one grid, every STRIDE pixels, then ceil(7 / STRIDE) of its rows have windows over an
    image row; and as patches overlap, a row of the grid is a row of up to S_H / (STEP_H / STRIDE), rounded up, of them.
    """
    DT: tl.constexpr = image_ptr.dtype.element_ty
    NEAR: tl.constexpr = (7 + STRIDE - 1) // STRIDE
    OVER_H: tl.constexpr = (S_H * STRIDE + STEP_H - 1) // STEP_H
    OVER_W: tl.constexpr = (S_W * STRIDE + STEP_W - 1) // STEP_W
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < n_pixels
    ix = (pixel % width).to(tl.int32)
    iy = (pixel // width % height).to(tl.int32)
    image = pixel // width // height
    ch = tl.arange(0, C_PAD)
    sums = ()
    for _ in tl.static_range(CHANNELS):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    for i in range(NEAR * OVER_H * NEAR * OVER_W):
        grid_y = (iy + 3) // STRIDE - i // (OVER_H * NEAR * OVER_W)  # may fall below 0: then so does sy
        grid_x = (ix + 3) // STRIDE - i // OVER_W % NEAR
        ky, kx = iy + 3 - grid_y * STRIDE, ix + 3 - grid_x * STRIDE
        py = grid_y * STRIDE // STEP_H - i // (NEAR * OVER_W) % OVER_H
        px = grid_x * STRIDE // STEP_W - i % OVER_W
        sy, sx = grid_y - py * (STEP_H // STRIDE), grid_x - px * (STEP_W // STRIDE)
        counts = live & (ky < 7) & (kx < 7) & (grid_y >= 0) & (grid_x >= 0) & (py >= 0) & (py < rows) & (px >= 0)
        counts = counts & (px < columns) & (sy < S_H) & (sx < S_W)
        if not LEGACY:  # the window sees its own patch only
            y, x = iy - py * STEP_H, ix - px * STEP_W
            counts = counts & (y >= 0) & (y < PATCH_H) & (x >= 0) & (x < PATCH_W)
        mask = counts[:, None] & (ch < C)[None, :]
        token = ((image * rows + py) * columns + px) * (S_H * S_W) + sy * S_W + sx
        g = tl.load(gradient_ptr + token[:, None] * C + ch[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK, C_PAD]
        new = ()
        for c in tl.static_range(CHANNELS):
            tap = (c * 49 + ky * 7 + kx)[:, None] * C + ch[None, :]
            w = tl.load(weight_ptr + tap, mask=mask, other=0.0).to(DT).to(tl.float32)  # [BLOCK, C_PAD]
            new = new + (sums[c] + tl.sum(g * w, 1),)
        sums = new
    for c in tl.static_range(CHANNELS):
        to = image_ptr + ((image * CHANNELS + c) * height + iy) * width + ix
        tl.store(to, sums[c].to(DT), mask=live)


def unsupported(sizes: dict[str, Any]) -> list[str]:
    """Reasons against sizes as ``TNT.sizes()`` gives them; an empty list if the kernel takes them."""
    reasons = []
    if not 1 <= sizes["C"] <= 128:
        reasons.append(f"C={sizes['C']} channels a pixel; accepted: 1 to 128")
    if not 1 <= sizes["channels"] <= 8:
        reasons.append(f"{sizes['channels']} channels of the image; accepted: 1 to 8")
    return reasons


def _numbers(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rows and columns of a patch's pixels, and reasons against the sizes and strides that set them."""
    numbers = {name: given[name] for name in ("patch_size", "patch_stride", "stride")}
    reasons = [
        f"{name}={value!r}; accepted: two positive integers, vertical and horizontal"
        for name, value in numbers.items()
        if name != "stride" and (not isinstance(value, (tuple, list)) or len(value) != 2 or min(value) < 1)
    ]
    stride = numbers["stride"]
    if not isinstance(stride, int) or stride < 1:
        reasons.append(f"stride={stride!r}; accepted: a positive integer")
    elif not reasons and any(size % stride for name in ("patch_size", "patch_stride") for size in numbers[name]):
        size, step = tuple(numbers["patch_size"]), tuple(numbers["patch_stride"])
        reasons.append(f"stride {stride} does not divide patch_size {size} and patch_stride {step}")
    if reasons:
        return {}, reasons
    return numbers | {"rows": given["patch_size"][0] // stride, "columns": given["patch_size"][1] // stride}, []


def _limits(sizes: dict[str, Any]) -> list[str]:
    """Reasons against the sizes of a call, by the letters of ``DESCRIPTION``; B, the images, may be unknown."""
    reasons = unsupported(sizes)
    longest = max(sizes["height"], sizes["width"])
    if longest > LONGEST_SIDE:
        reasons.append(f"the image has a side of {longest} pixels; accepted: up to {LONGEST_SIDE}")
    for side, size, step in zip((sizes["height"], sizes["width"]), sizes["patch_size"], sizes["patch_stride"], strict=True):
        if side < size or (side - size) % step:
            reasons.append(f"{side} pixels of the image are not covered by patches of {size} every {step}")
    if not reasons:
        grid = _grid(sizes["height"], sizes["width"], sizes["patch_size"], sizes["patch_stride"])
        tokens = sizes.get("B", 0) * prod(grid) * sizes["rows"] * sizes["columns"]
        if max(tokens, sizes.get("B", 0) * sizes["height"] * sizes["width"]) > MOST_ROWS:
            reasons.append(f"{sizes['B']} images have {tokens} pixel tokens; accepted: up to {MOST_ROWS}, and of image pixels")
    return reasons


DESCRIPTION = Description(
    "pixel_embed",
    (
        Argument("image", "B channels height width", activation=True), Argument("weight", "C channels 7 7"),
        Argument("bias", "C", optional=True), Argument("pixel_pos", "1 C rows columns", optional=True),
    ),
    _limits,
    numbers=_numbers,
)  # fmt: skip


def gradients_unsupported(sizes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> list[str]:
    """None: the backward takes what the forward takes."""
    return []


def _specialise(
    channels: int, C: int, patch_size: list[int], stride: int, patch_stride: list[int], legacy: bool, has_bias: bool,
    has_pos: bool, dtype: str, prec: str,
) -> Launch:  # fmt: skip
    block, warps, _ = CONFIGS[dtype]
    rows, columns = patch_size[0] // stride, patch_size[1] // stride
    c_pad = max(16, triton.next_power_of_2(C))
    keep = channels * 64 * c_pad * (4 if dtype == "fp32" else 2) <= 64 << 10  # else the weights do not fit on every chip
    constants = dict(
        CHANNELS=channels, C=C, C_PAD=c_pad, S=rows * columns, S_W=columns, PATCH_H=patch_size[0],
        PATCH_W=patch_size[1], STRIDE=stride, STEP_H=patch_stride[0], STEP_W=patch_stride[1], LEGACY=legacy, HAS_BIAS=has_bias,
        HAS_POS=has_pos, KEEP=keep, BLOCK=block, PRECISION=prec,
    )  # fmt: skip
    pointers = {name: dtype for name in ("image_ptr", "y_ptr", "weight_ptr", "bias_ptr", "pixel_pos_ptr")}
    integers = ("n_tokens", "n_patches", "columns", "height", "width", "stride_b", "stride_c", "stride_h", "stride_w")
    return Launch(_pixel_embed_fwd_kernel, pointers, integers, constants, warps, 1, block / (rows * columns))


def _specialise_weight_bwd(forward: Launch, dtype: str) -> Launch:
    block, warps, _ = WEIGHT_CONFIGS[dtype]
    constants = {name: value for name, value in forward.constants.items() if name not in ("HAS_BIAS", "HAS_POS", "KEEP")}
    # channels a program: what fits into registers, 96 of each thread
    group = max(1, min(constants["CHANNELS"], 192 // constants["C_PAD"]))
    constants |= dict(BLOCK=block, GROUP=group)
    pointers = {"image_ptr": dtype, "gradient_ptr": dtype, "sums_ptr": "fp32"}
    # 64 rows on 4 warps: Hopper would take the asynchronous matrix instruction with its left operand in registers
    return forward._replace(
        kernel=_pixel_embed_weight_bwd_kernel, pointers=pointers, constants=constants, num_warps=warps,
        patches=block / constants["S"] * group / constants["CHANNELS"], mma_arch="sm80",
    )  # fmt: skip


def _specialise_image_bwd(forward: Launch, dtype: str) -> Launch:
    constants = {
        name: value
        for name, value in forward.constants.items()
        if name not in ("HAS_BIAS", "HAS_POS", "KEEP", "S", "PRECISION")
    }
    constants |= dict(S_H=forward.constants["S"] // constants["S_W"], BLOCK=IMAGE_BLOCK)
    pointers = {"weight_ptr": dtype, "gradient_ptr": dtype, "image_ptr": dtype}
    integers = ("n_pixels", "rows", "columns", "height", "width")
    near = -(-WINDOW // constants["STRIDE"])
    over = -(-constants["PATCH_H"] // constants["STEP_H"]) * -(-constants["PATCH_W"] // constants["STEP_W"])
    return forward._replace(
        kernel=_pixel_embed_image_bwd_kernel, pointers=pointers, integers=integers, constants=constants, num_warps=2,
        patches=IMAGE_BLOCK / (constants["STEP_H"] * constants["STEP_W"]), turns=near * near * over,
    )  # fmt: skip


def launches() -> Iterable[tuple[str, str, Launch]]:
    """(variant, dtype, specialisation) of the named variants."""
    for variant, (C, legacy) in {"ti": (12, False), "s": (24, False), "s_legacy": (24, True), "b": (40, False)}.items():
        for dtype in CONFIGS:
            forward = _specialise(3, C, [16, 16], 4, [16, 16], legacy, True, True, dtype, "ieee")
            yield variant, dtype, forward
            yield variant, dtype, _specialise_weight_bwd(forward, dtype)
            yield variant, dtype, _specialise_image_bwd(forward, dtype)


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
    DESCRIPTION.check(locals())
    (B, channels, height, width), C = image.shape, weight.shape[0]
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


def _pixel_embed_backward(
    gradient: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixel_pos: Tensor | None,
    patch_size: list[int],
    stride: int,
    patch_stride: list[int],
    legacy: bool,
    needed: list[int],
) -> list[Tensor]:
    """All by the kernels and one sum by PyTorch; nothing falls back to the reference."""
    tensors = (image, weight, bias, pixel_pos)
    found: dict[int, Tensor] = {}
    if gradient.numel() == 0:
        found = {i: torch.zeros(tensors[i].shape, device=image.device) for i in needed}
    else:
        gradient = gradient.contiguous()
        (B, channels, height, width), C = image.shape, weight.shape[0]
        rows, columns = _grid(height, width, patch_size, patch_stride)
        dtype = DTYPES[image.dtype]
        forward = _specialise(
            channels, C, patch_size, stride, patch_stride, legacy, False, False, dtype, precision(image.dtype)
        )
        if 2 in needed or 3 in needed:
            position = gradient.sum(0, dtype=torch.float32)  # [S, C]
            if 2 in needed:
                found[2] = position.sum(0)
            if 3 in needed:
                found[3] = position.t().reshape(pixel_pos.shape)
        if 1 in needed:
            spec = _specialise_weight_bwd(forward, dtype)
            tokens = gradient.shape[0] * gradient.shape[1]
            groups = -(-channels // spec.constants["GROUP"])
            workers = programs(image.device, -(-tokens // spec.constants["BLOCK"]), WEIGHT_CONFIGS[dtype][2])
            sums = torch.empty((workers, channels, 8, 8, C), dtype=torch.float32, device=image.device)
            start(
                spec, workers * groups, image, gradient, sums, tokens, rows * columns, columns, height, width, *image.stride()
            )
            found[1] = sums.sum(0)[:, :WINDOW, :WINDOW].permute(3, 0, 1, 2)
        if 0 in needed:
            spec = _specialise_image_bwd(forward, dtype)
            found[0] = torch.empty(image.shape, dtype=image.dtype, device=image.device)
            pixels = B * height * width
            taps = weight.permute(1, 2, 3, 0).contiguous()  # a token's channels side by side, as in the gradient
            start(spec, -(-pixels // IMAGE_BLOCK), taps, gradient, found[0], pixels, rows, columns, height, width)
    return [found[i].to(tensors[i].dtype).contiguous() for i in needed]


_operation = register("pixel_embed", _pixel_embed, _empty, _multiply_adds, _pixel_embed_backward)


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
    reasons = _numbers({"patch_size": patch_size, "stride": stride, "patch_stride": patch_stride})[1]
    if reasons:  # before the schema of the operation, which wants lists, says less
        raise ValueError(f"pixel_embed: {'; '.join(reasons)}")
    tensors = DESCRIPTION.prepare(image, weight, bias, pixel_pos)
    return _operation(*tensors, list(patch_size), stride, list(patch_stride), legacy)
