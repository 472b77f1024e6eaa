"""pixel_embed: image to pixel tokens of every patch, in one launch and without an unfolded copy of the image.

    y[b·N + n, s, c] = bias[c] + pixel_pos[c, s] + Σ_{channel, ky, kx} weight[c, channel, ky, kx] · image[b, channel, iy, ix]

for the pixel s = (sy, sx) of patch n = (py, px), with iy = py·patch_stride + sy·stride − 3 + ky and ix alike. Outside of the
patch (legacy: of the image) the image counts as zero; that halo is all in which the two stems differ.

Shapes: image (B, channels, H, W) of any strides, weight (C, channels, 7, 7), result (B·N, S, C) contiguous. Bytes moved: the
image once (a token's 7×7 window overlaps its neighbours' in the L1 cache), the tokens once. Accumulation is float32.

A program takes tiles of BLOCK tokens as an implicit matrix product of K = 7·8 (a row of the window padded by one) per channel;
the weights are loaded once. 32 rows keep Hopper on the synchronous mma instruction (see fold.py).

Backward, with g the gradient of y, from the inputs alone:

    dpixel_pos[c, s] = Σ_patch g[patch, s, c],  dbias[c] = Σ_s dpixel_pos[c, s]        sums by PyTorch, in float32
    dweight[c, channel, ky, kx] = Σ_token window[token, channel, ky, kx] · g[token, c]  the forward's product, turned round
    dimage[b, channel, iy, ix] = Σ over the windows on it of Σ_c weight[c, channel, ky, kx] · g[token, c]

A program sums dweight in float32 over all its tiles and stores it once; one reduction adds the programs. The image's gradient,
which training does not ask for, is gathered by cells of stride × stride pixels: few tokens have windows over a cell, 2 × 2 for
stride 4, and the sum of their products with what their windows have there is all of it, in float32, in one launch. No atomics:
the same input gives the same bits. Bytes moved: image and g once each for the weight; for the image its gradient once, and g
once, as often as tokens are near from the caches. A product and a col2im would keep columns in memory, 49 / stride² times as
large as the image where patches touch; here it is one copy of the weight, of at most max(9, 2·stride) rows and columns.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast import reference
from tnt_fast.arguments import beyond
from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, Operation, derived, launch, programs, remembered
from tnt_fast.kernels.tile import accumulators, dot, dot_onto, load

# Chosen for sm_90. Swept on an H200 (benchmarks/results/2026-11-26-0640/tune.txt) the forward is as fast as any. The weight's
# gradient took 244 and 208 µs on 64 rows (TNT-S and B), 329 and 264 on 32; as it is now, simulated (tune-h200.json), 202 for
# 293, though TNT-S's spills 64 bytes. In float32 the weight's products are no matrix instructions; on 4 warps Hopper would take
# the asynchronous one with its left operand in registers.
CONFIGS = {  # of half precision, or not
    "_pixel_embed_fwd_kernel": {True: Config(32, warps=2, per_sm=8), False: Config(16, warps=4, per_sm=4)},
    "_pixel_embed_weight_bwd_kernel": {
        True: Config(64, warps=4, per_sm=2, mma_arch="sm80"),
        False: Config(16, warps=4, per_sm=4, mma_arch="sm80"),
    },
    "_pixel_embed_image_bwd_kernel": dict.fromkeys((True, False), Config(32, warps=2)),  # rows: cells of the image
}
WINDOW = 7


# a kernel's argument: the image and what says where its values are
Image = namedtuple("Image", "ptr height width stride_b stride_c stride_h stride_w")


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """What all three kernels are compiled for: a patch of S_H × S_W pixels with C channels, every STRIDE of the image's."""

    CHANNELS: int
    C: int
    C_PAD: int
    S_H: int
    S_W: int
    STRIDE: int
    STEP_H: int  # from patch to patch, in pixels of the image
    STEP_W: int
    LEGACY: bool
    BLOCK: int
    KEEP: bool = True  # the forward's weights stay on the chip
    GROUP: int  # what a program takes: channels of the image, of the image's gradient values of a cell
    GROUPS: int

    S: int = derived(lambda Z: Z.S_H * Z.S_W)
    PATCH_H: int = derived(lambda Z: Z.S_H * Z.STRIDE)
    PATCH_W: int = derived(lambda Z: Z.S_W * Z.STRIDE)
    # the image's gradient: values of a cell; tokens with a window over it, NEAR in each direction, of which the last is AHEAD
    # cells behind it; cells from patch to patch, and patches that a cell is in
    VALUES: int = derived(lambda Z: Z.CHANNELS * Z.STRIDE * Z.STRIDE)
    AHEAD: int = derived(lambda Z: (Z.STRIDE + 2) // Z.STRIDE)
    NEAR: int = derived(lambda Z: Z.AHEAD + 3 // Z.STRIDE + 1)
    EVERY_H: int = derived(lambda Z: Z.STEP_H // Z.STRIDE)
    EVERY_W: int = derived(lambda Z: Z.STEP_W // Z.STRIDE)
    OVER_H: int = derived(lambda Z: -(-Z.S_H // Z.EVERY_H))
    OVER_W: int = derived(lambda Z: -(-Z.S_W // Z.EVERY_W))


@triton.jit
def _window(token, k, image, n_tokens, n_patches, columns, Z: tl.constexpr):
    """Where the value k = 8·ky + kx of a token's window lies in a channel of the image, and whether it counts."""
    patch, s = (token // Z.S).to(tl.int32), (token % Z.S).to(tl.int32)
    b, n = patch // n_patches, patch % n_patches
    y0, x0 = s // Z.S_W * Z.STRIDE - 3, s % Z.S_W * Z.STRIDE - 3  # window's corner within the patch
    top, left = n // columns * Z.STEP_H + y0, n % columns * Z.STEP_W + x0  # and within the image
    ky, kx = k // 8, k % 8
    corner = b.to(tl.int64) * image.stride_b + top.to(tl.int64) * image.stride_h + left.to(tl.int64) * image.stride_w
    at = corner + (ky.to(tl.int64) * image.stride_h + kx.to(tl.int64) * image.stride_w)  # one addition a value of a tile
    # as unsigned numbers, those below zero are past every size
    if Z.LEGACY:
        inside = ((top + ky).to(tl.uint32) < image.height) & ((left + kx).to(tl.uint32) < image.width)
    else:
        inside = ((y0 + ky).to(tl.uint32) < Z.PATCH_H) & ((x0 + kx).to(tl.uint32) < Z.PATCH_W)
    return at, inside & ((ky < 7) & (kx < 7)) & (token < n_tokens)


@triton.jit
def _channel_weight(weight_ptr, c, Z: tl.constexpr):
    """The weight of a channel of the image, [64, C_PAD]: its window has 8 to a row, 7·8 of 64 are real."""
    k, ch = tl.arange(0, 64), tl.arange(0, Z.C_PAD)
    real = (k // 8 < 7) & (k % 8 < 7)
    place = ch[None, :] * (Z.CHANNELS * 49) + (c * 49 + k // 8 * 7 + k % 8)[:, None]
    return tl.load(weight_ptr + place, mask=real[:, None] & (ch < Z.C)[None, :], other=0.0).to(Z.DTYPE)


@triton.jit
def _pixel_embed_fwd_kernel(
    y_ptr, image, weight_ptr, bias_ptr, pixel_pos_ptr, n_tokens, n_patches, columns, Z: tl.constexpr
):  # fmt: skip
    CHANNELS: tl.constexpr = Z.CHANNELS
    k, ch = tl.arange(0, 64), tl.arange(0, Z.C_PAD)
    weights = ()
    if Z.KEEP:
        for c in tl.static_range(CHANNELS):
            weights = weights + (_channel_weight(weight_ptr, c, Z),)
    bias = load(bias_ptr, ch, ch < Z.C)
    for tile in range(tl.program_id(0), tl.cdiv(n_tokens, Z.BLOCK), tl.num_programs(0)):
        token = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        at, inside = _window(token[:, None], k[None, :], image, n_tokens, n_patches, columns, Z)
        mask = (token < n_tokens)[:, None] & (ch < Z.C)[None, :]
        total = tl.full((Z.BLOCK, Z.C_PAD), 0.0, tl.float32)
        if not Z.EXACT:
            total += bias[None, :]
            total += load(pixel_pos_ptr, ch[None, :] * Z.S + (token % Z.S).to(tl.int32)[:, None], mask)
        for c in tl.static_range(CHANNELS):
            channel = image.ptr + tl.cast(c, tl.int64) * image.stride_c
            x = tl.load(channel + at, mask=inside, other=0.0).to(Z.DTYPE)  # [BLOCK, 64]
            total = dot(x, weights[c] if Z.KEEP else _channel_weight(weight_ptr, c, Z), Z, total)
        if Z.EXACT:  # last: onto them, each product's addition would round at their size
            total += bias[None, :]
            total += load(pixel_pos_ptr, ch[None, :] * Z.S + (token % Z.S).to(tl.int32)[:, None], mask)
        tl.store(y_ptr + token[:, None] * Z.C + ch[None, :], total.to(Z.DTYPE), mask=mask)


@triton.jit
def _pixel_embed_weight_bwd_kernel(gradient_ptr, image, sums_ptr, n_tokens, n_patches, columns, Z: tl.constexpr):
    """A program's sums of the weight's gradient over its tokens, for GROUP of the image's channels: [CHANNELS, 64, C] each."""
    GROUP: tl.constexpr = Z.GROUP
    workers = tl.num_programs(0) // Z.GROUPS
    worker = tl.program_id(0) // Z.GROUPS
    first = tl.program_id(0) % Z.GROUPS * GROUP
    leader = tl.zeros((1, 1), tl.int32) + first  # for masks: a scalar in them is no boolean in Triton 3.9's interpreter
    k = tl.arange(0, 64)
    ch = tl.arange(0, Z.C_PAD)
    sums = accumulators(GROUP, 64, Z.C_PAD)
    for tile in range(worker, tl.cdiv(n_tokens, Z.BLOCK), workers):
        token = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        at, inside = _window(token[:, None], k[None, :], image, n_tokens, n_patches, columns, Z)
        mask = (token < n_tokens)[:, None] & (ch < Z.C)[None, :]
        g = tl.load(gradient_ptr + token[:, None] * Z.C + ch[None, :], mask=mask, other=0.0)  # [BLOCK, C_PAD]
        new = ()
        for c in tl.static_range(GROUP):
            channel = image.ptr + (first + c).to(tl.int64) * image.stride_c
            x = tl.load(channel + at, mask=inside & (leader + c < Z.CHANNELS), other=0.0).to(Z.DTYPE)  # [BLOCK, 64]
            new = new + (dot_onto(sums[c], tl.trans(x), g, Z),)
        sums = new
    for c in tl.static_range(GROUP):
        to = sums_ptr + ((worker.to(tl.int64) * Z.CHANNELS + first + c) * 64 + k)[:, None] * Z.C + ch[None, :]
        tl.store(to, sums[c], mask=(ch < Z.C)[None, :] & (leader + c < Z.CHANNELS))


@triton.jit
def _pixel_embed_image_bwd_kernel(dimage_ptr, taps_ptr, gradient_ptr, n_cells, rows, columns, Z: tl.constexpr):
    """Gradient of BLOCK cells of the image, as many values of each as a program takes.

    ``taps``: [NEAR, NEAR, C, VALUES], what the window of the token so many cells before the last has over a cell; ``dimage``:
    contiguous. Were the tokens of all patches on one grid, each would have a cell of it. As patches overlap, it is one of up to
    OVER_H × OVER_W of them.
    """
    across, down = (columns - 1) * Z.EVERY_W + Z.S_W, (rows - 1) * Z.EVERY_H + Z.S_H  # cells of an image
    cell = tl.program_id(0) // Z.GROUPS * Z.BLOCK + tl.arange(0, Z.BLOCK)
    x, y, b = cell % across, cell // across % down, (cell // across // down).to(tl.int64)
    ch = tl.arange(0, Z.C_PAD)
    value = tl.program_id(0) % Z.GROUPS * Z.GROUP + tl.arange(0, Z.GROUP)  # channel, row, column
    total = tl.full((Z.BLOCK, Z.GROUP), 0.0, tl.float32)
    for i in range(Z.NEAR * Z.NEAR * Z.OVER_H * Z.OVER_W):
        near, over = i // (Z.OVER_H * Z.OVER_W), i % (Z.OVER_H * Z.OVER_W)
        ty, tx = y + Z.AHEAD - near // Z.NEAR, x + Z.AHEAD - near % Z.NEAR  # on the grid of tokens
        py, px = ty // Z.EVERY_H - over // Z.OVER_W, tx // Z.EVERY_W - over % Z.OVER_W
        top, left = py * Z.EVERY_H, px * Z.EVERY_W
        # as unsigned numbers, those below zero are past every size
        counts = (cell < n_cells) & (py.to(tl.uint32) < rows) & (px.to(tl.uint32) < columns)
        counts = counts & ((ty - top).to(tl.uint32) < Z.S_H) & ((tx - left).to(tl.uint32) < Z.S_W)
        if not Z.LEGACY:  # the window sees its own patch only
            counts = counts & ((y - top).to(tl.uint32) < Z.S_H) & ((x - left).to(tl.uint32) < Z.S_W)
        token = ((b * rows + py) * columns + px) * Z.S + (ty - top) * Z.S_W + (tx - left)
        mask = counts[:, None] & (ch < Z.C)[None, :]
        g = tl.load(gradient_ptr + token[:, None] * Z.C + ch[None, :], mask=mask, other=0.0)  # [BLOCK, C_PAD]
        taps = taps_ptr + tl.cast(near, tl.int64) * (Z.C * Z.VALUES) + ch[:, None] * Z.VALUES + value[None, :]
        w = tl.load(taps, mask=(ch < Z.C)[:, None] & (value < Z.VALUES)[None, :], other=0.0)  # [C_PAD, GROUP]
        total = dot(g, w, Z, total)
    channel, row, column = value // (Z.STRIDE * Z.STRIDE), value // Z.STRIDE % Z.STRIDE, value % Z.STRIDE
    width = tl.cast(across, tl.int64) * Z.STRIDE
    size = down * Z.STRIDE * width  # of a channel
    to = dimage_ptr + b * Z.CHANNELS * size + y * Z.STRIDE * width + x * Z.STRIDE
    to = to[:, None] + (channel * size + row * width + column)[None, :]
    tl.store(to, total.to(Z.DTYPE), mask=(cell < n_cells)[:, None] & (value < Z.VALUES)[None, :])


# ---- on the host ----


@remembered
def _specialise(
    kernel: Any, dtype: torch.dtype, channels: int, C: int, patch_size: Any, stride: int, patch_stride: Any, legacy: bool
) -> Launch:  # fmt: skip
    config, c_pad = CONFIGS[kernel.__name__][dtype != torch.float32], max(16, triton.next_power_of_2(C))
    whole = group = channels
    if kernel is _pixel_embed_weight_bwd_kernel:  # all, or what fits into registers, 96 of each thread
        group = max(1, min(channels, 192 // c_pad))
    elif kernel is _pixel_embed_image_bwd_kernel:
        whole = channels * stride * stride
        group = min(64, max(16, triton.next_power_of_2(whole)))
    Z = Sizes.computed(
        dtype, CHANNELS=channels, C=C, C_PAD=c_pad, S_H=patch_size[0] // stride, S_W=patch_size[1] // stride, STRIDE=stride,
        STEP_H=patch_stride[0], STEP_W=patch_stride[1], LEGACY=legacy, BLOCK=config.rows, GROUP=group,
        GROUPS=-(-whole // group),
        KEEP=channels * 64 * c_pad * dtype.itemsize <= 64 << 10,  # else the weights do not fit on every chip
    )  # fmt: skip
    patches, turns = config.rows / Z.S * min(1, group / whole), 1
    if kernel is _pixel_embed_image_bwd_kernel:
        patches, turns = patches * Z.S / (Z.EVERY_H * Z.EVERY_W), Z.NEAR * Z.NEAR * Z.OVER_H * Z.OVER_W
    return Launch(kernel, {"Z": Z}, config, patches, turns)


def _grid(height: int, width: int, patch_size: Any, patch_stride: Any) -> tuple[int, int]:
    return (height - patch_size[0]) // patch_stride[0] + 1, (width - patch_size[1]) // patch_stride[1] + 1


class PixelEmbed(Operation):
    """The stem's convolution over patches that were never cut out."""

    twin = staticmethod(reference.pixel_embed)
    activations = ("image",)
    shapes = dict(image="B channels height width", weight="C channels 7 7", bias="C", pixel_pos="1 C rows columns")
    limits = {"C": 128, "channels": 8, "height": 2**20, "width": 2**20, "B*height*width": operation.MOST_ROWS}
    limits |= {"B*N*S": operation.MOST_ROWS}

    def numbers(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Rows and columns of a patch's pixels, and reasons against the sizes and strides that set them."""
        pairs, stride = {name: given[name] for name in ("patch_size", "patch_stride")}, given["stride"]
        reasons = [
            f"{name}={value!r}; accepted: two positive integers, vertical and horizontal"
            for name, value in pairs.items()
            if not isinstance(value, (tuple, list)) or len(value) != 2 or min(value) < 1
        ]
        if not isinstance(stride, int) or stride < 1:
            reasons.append(f"stride={stride!r}; accepted: a positive integer")
        elif not reasons and any(size % stride for pair in pairs.values() for size in pair):
            reasons.append(f"stride {stride} does not divide " + " and ".join(f"{k} {tuple(v)}" for k, v in pairs.items()))
        if reasons:
            return {}, reasons
        rows, columns = (size // stride for size in pairs["patch_size"])
        return pairs | {"stride": stride, "rows": rows, "columns": columns}, []

    def unsupported(self, sizes: Mapping[str, Any]) -> list[str]:
        reasons = []
        if "height" in sizes:
            sides, size, step = (sizes["height"], sizes["width"]), sizes["patch_size"], sizes["patch_stride"]
            for side, patch, every in zip(sides, size, step, strict=True):
                if side < patch or (side - patch) % every:
                    reasons.append(f"{side} pixels of the image are not covered by patches of {patch} every {every}")
            sizes = {**sizes, "N": prod(_grid(*sides, size, step)), "S": sizes["rows"] * sizes["columns"]}
        return beyond(self.limits, sizes) + reasons

    def _shape(self, a: SimpleNamespace, image: Any, C: int) -> tuple[int, int, int]:
        """(B·N, S, C), from the shape of the image."""
        patches = image[0] * prod(_grid(image[2], image[3], a.patch_size, a.patch_stride))
        return patches, (a.patch_size[0] // a.stride) * (a.patch_size[1] // a.stride), C

    def multiply_adds(self, a: SimpleNamespace) -> int:
        return prod(self._shape(a, a.image, a.weight[0])) * prod(a.weight[1:])

    def empty(self, a: SimpleNamespace) -> Tensor:
        return torch.empty(self._shape(a, a.image.shape, a.weight.shape[0]), dtype=a.image.dtype, device=a.image.device)

    def _launch(self, kernel: Any, a: SimpleNamespace) -> tuple[Launch, Image, tuple[int, ...]]:
        """A kernel's launch, the image as it reads it, and the grid of patches."""
        (_, channels, height, width), C = a.image.shape, a.weight.shape[0]
        spec = _specialise(kernel, a.image.dtype, channels, C, tuple(a.patch_size), a.stride, tuple(a.patch_stride), a.legacy)
        return spec, Image(a.image, height, width, *a.image.stride()), _grid(height, width, a.patch_size, a.patch_stride)

    def prepared(self, a: SimpleNamespace) -> Callable[[SimpleNamespace, Tensor], None]:
        spec, (_, *read), (rows, columns) = self._launch(_pixel_embed_fwd_kernel, a)
        patches, S, _ = self._shape(a, a.image.shape, a.weight.shape[0])
        spec, tokens = spec.again(), patches * S
        grid = programs(a.image.device, -(-tokens // spec.config.rows), spec.config.per_sm)

        def run(a: SimpleNamespace, out: Tensor) -> None:
            launch(spec, grid, out, Image(a.image, *read), a.weight, a.bias, a.pixel_pos, tokens, rows * columns, columns)

        return run

    def backward(self, gradient: Tensor, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        """All by the kernels and one sum by PyTorch; nothing falls back to the reference."""
        gradient, found = gradient.contiguous(), {}
        if needed & {"bias", "pixel_pos"}:
            position = gradient.sum(0, dtype=torch.float32)  # [S, C]
            found["bias"] = position.sum(0)
            if a.pixel_pos is not None:
                found["pixel_pos"] = position.t().reshape(a.pixel_pos.shape)
        if "weight" in needed:
            spec, image, (rows, columns) = self._launch(_pixel_embed_weight_bwd_kernel, a)
            Z, tokens = spec.constants["Z"], gradient.shape[0] * gradient.shape[1]
            workers = programs(gradient.device, -(-tokens // Z.BLOCK), spec.config.per_sm)
            sums = torch.empty((workers, Z.CHANNELS, 8, 8, Z.C), dtype=torch.float32, device=gradient.device)
            launch(spec, workers * Z.GROUPS, gradient, image, sums, tokens, rows * columns, columns)
            found["weight"] = sums.sum(0)[:, :WINDOW, :WINDOW].permute(3, 0, 1, 2)
        if "image" in needed:
            spec, image, grid = self._launch(_pixel_embed_image_bwd_kernel, a)
            found["image"] = torch.empty(a.image.shape, dtype=a.image.dtype, device=a.image.device)
            Z = spec.constants["Z"]
            cells, first = found["image"].numel() // Z.VALUES, Z.AHEAD * Z.STRIDE - 3
            taps = F.pad(a.weight.to(a.image.dtype), 2 * (first, Z.NEAR * Z.STRIDE - WINDOW - first))
            taps = taps.view(Z.C, Z.CHANNELS, Z.NEAR, Z.STRIDE, Z.NEAR, Z.STRIDE).permute(2, 4, 0, 1, 3, 5).contiguous()
            launch(spec, -(-cells // Z.BLOCK) * Z.GROUPS, found["image"], taps, gradient, cells, *grid)
        return found


pixel_embed = PixelEmbed()
"""``reference.pixel_embed``, fused; called like that."""
