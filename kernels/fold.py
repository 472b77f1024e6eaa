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
dh read twice, z, dz and h as often, each written once. Sums over rows are kept in float32 by a program over all its tiles and
reduced in one launch: no atomics, the same input gives the same bits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_fast import reference
from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Config, Launch, Operation, contiguous, derived, launch, programs, remembered
from tnt_fast.kernels.tile import accumulators, centred, dot, load

# Chunks are of K. Chosen by static cost for sm_90 on 2026-11-22, not yet timed on a GPU.
CONFIGS = {
    torch.bfloat16: Config(64, warps=8, chunk=64, stages=2),
    torch.float16: Config(64, warps=8, chunk=64, stages=2),
    torch.float32: Config(32, warps=8, chunk=32),
}
ROWS = 32
# backward's LayerNorms: values a tile, values a thread, programs a multiprocessor. Not yet timed, either.
NORM_VALUES, NORM_EACH, NORM_PER_SM = 2048, 16, 8
WIDEST = 2**20  # values of a patch: a weight's place is counted in 32 bits
NORM_WIDTH = 16384  # widest row of which a program holds several copies in registers
VARIANTS = {"ti": (12, 192, False), "s": (24, 384, False), "s_legacy": (24, 384, True), "b": (40, 640, False)}  # C, E, legacy


class Weights(NamedTuple):
    """A kernel's argument: pointers, or None."""

    norm1_weight: Any
    norm1_bias: Any
    proj_weight: Any
    proj_bias: Any
    norm2_weight: Any
    norm2_bias: Any


@dataclass(frozen=True, kw_only=True)
class Sizes(operation.Sizes):
    """Of the forward. A legacy fold walks over pixels, a chunk of C channels each, normalised by itself; else over chunks of
    all S·C values, of which the last may be shorter."""

    S: int
    C: int
    E: int
    LEGACY: bool
    BLOCK: int  # rows of a tile, in parts of ROWS
    BLOCK_E: int
    CHUNK: int  # of K, padded
    ROWS: int = ROWS

    K: int = derived(lambda Z: Z.S * Z.C)
    STEP: int = derived(lambda Z: Z.C if Z.LEGACY else Z.CHUNK)
    PARTS: int = derived(lambda Z: Z.BLOCK // Z.ROWS)
    N_E: int = derived(lambda Z: -(-Z.E // Z.BLOCK_E))


@dataclass(frozen=True, kw_only=True)
class NormSizes(operation.Sizes):
    """Of the backward's LayerNorms, over rows of W values; ``GROUPED``: those of the incoming gradient lie in groups."""

    W: int
    W_PAD: int
    BLOCK: int
    GROUPED: bool = False


@triton.jit
def _merge(x, real, mean, square, SEEN: tl.constexpr, NEW: tl.constexpr):
    """Mean and sum of squared deviations of each row after NEW more values (Chan et al. 1979): exact for large means."""
    chunk = tl.sum(x, 1) * (1.0 / NEW)
    x = tl.where(real, x - chunk[:, None], 0.0)
    delta = chunk - mean
    square += tl.sum(x * x, 1) + delta * delta * (SEEN * NEW / (SEEN + NEW))
    return mean + delta * (NEW / (SEEN + NEW)), square


@triton.jit
def _statistics(pixel_ptr, row, n_rows, eps, Z: tl.constexpr):
    """Of rows of K values: the mean, what its rounding left of it, and 1/σ; of no use where each pixel has its own (legacy)."""
    K: tl.constexpr = Z.K
    STEP: tl.constexpr = Z.STEP
    k = tl.arange(0, Z.CHUNK)
    mean = tl.full((Z.ROWS,), 0.0, tl.float32)
    rest = tl.full((Z.ROWS,), 0.0, tl.float32)
    square = tl.full((Z.ROWS,), 0.0, tl.float32)
    if not Z.LEGACY:  # chunk by chunk, means and squared deviations merged: exact for large means
        for k0 in tl.static_range(0, K, STEP):
            real = (k0 + k < K)[None, :]
            x = load(pixel_ptr + row[:, None] * K, (k0 + k)[None, :], (row < n_rows)[:, None] & real)  # [ROWS, CHUNK]
            mean, square = _merge(x, real, mean, square, k0, K - k0 if K - k0 < STEP else STEP)
        if Z.EXACT:  # once more around that mean: what its rounding left of mean and squares
            square = tl.full((Z.ROWS,), 0.0, tl.float32)
            for k0 in range(0, K, STEP):
                real = (k0 + k < K)[None, :]
                x = load(pixel_ptr + row[:, None] * K, (k0 + k)[None, :], (row < n_rows)[:, None] & real)
                x = tl.where(real, x - mean[:, None], 0.0)
                rest += tl.sum(x, 1)
                square += tl.sum(x * x, 1)
            rest *= 1.0 / K
            square = tl.maximum(square - K * rest * rest, 0.0)
    return mean, rest, tl.rsqrt(square * (1.0 / K) + eps)


@triton.jit
def _second_norm(outputs, w, eps, Z: tl.constexpr):
    """LN_E of rows that lie in N_E tiles [ROWS, BLOCK_E]; columns past E are zero."""
    N_E: tl.constexpr = Z.N_E
    e = tl.arange(0, Z.BLOCK_E)
    total = tl.full((Z.ROWS,), 0.0, tl.float32)
    rest = tl.full((Z.ROWS,), 0.0, tl.float32)
    square = tl.full((Z.ROWS,), 0.0, tl.float32)
    for i in tl.static_range(N_E):
        total += tl.sum(outputs[i], 1)
    mean = total * (1.0 / Z.E)
    if Z.EXACT:
        for i in tl.static_range(N_E):
            rest += tl.sum(tl.where((i * Z.BLOCK_E + e < Z.E)[None, :], outputs[i] - mean[:, None], 0.0), 1)
        rest *= 1.0 / Z.E
    for i in tl.static_range(N_E):
        d = tl.where((i * Z.BLOCK_E + e < Z.E)[None, :], outputs[i] - mean[:, None] - rest[:, None], 0.0)
        square += tl.sum(d * d, 1)
    rstd = tl.rsqrt(square * (1.0 / Z.E) + eps)
    result = ()
    for i in tl.static_range(N_E):
        out = i * Z.BLOCK_E + e
        gamma, beta = load(w.norm2_weight, out, out < Z.E), load(w.norm2_bias, out, out < Z.E)
        y = (outputs[i] - mean[:, None] - rest[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
        result = result + (y,)
    return result


@triton.jit
def _fold_fwd_kernel(
    pixel_ptr, patch_ptr, y_ptr, w, n_rows, n_patches, patch_stride_b, patch_stride_n, eps, Z: tl.constexpr
):  # fmt: skip
    K: tl.constexpr = Z.K
    STEP: tl.constexpr = Z.STEP
    N_E: tl.constexpr = Z.N_E
    PARTS: tl.constexpr = Z.PARTS
    first = tl.program_id(0).to(tl.int64) * Z.BLOCK
    k = tl.arange(0, Z.CHUNK)
    e = tl.arange(0, Z.BLOCK_E)
    rows, means, rests, rstds = (), (), (), ()
    for p in tl.static_range(PARTS):
        row = first + p * Z.ROWS + tl.arange(0, Z.ROWS)
        mean, rest, rstd = _statistics(pixel_ptr, row, n_rows, eps, Z)
        rows, means, rests, rstds = rows + (row,), means + (mean,), rests + (rest,), rstds + (rstd,)

    accs = accumulators(PARTS * N_E, Z.ROWS, Z.BLOCK_E)
    for k0 in range(0, K, STEP):
        at = k0 + k
        norm_at = k if Z.LEGACY else at
        real = (k < Z.C) if Z.LEGACY else (at < K)
        gamma, beta = load(w.norm1_weight, norm_at, real), load(w.norm1_bias, norm_at, real)
        hs = ()
        for p in tl.static_range(PARTS):
            mask = (rows[p] < n_rows)[:, None] & real[None, :]
            x = load(pixel_ptr + rows[p][:, None] * K, at[None, :], mask)  # [ROWS, CHUNK]
            if Z.LEGACY:
                x = centred(x, real, Z.C, Z.EXACT)
                x = x * tl.rsqrt(tl.sum(x * x, 1) * (1.0 / Z.C) + eps)[:, None]
            else:
                x = x - means[p][:, None]
                if Z.EXACT:
                    x -= rests[p][:, None]
                x = x * rstds[p][:, None]
            hs = hs + (tl.where(real[None, :], x * gamma[None, :] + beta[None, :], 0.0).to(Z.DTYPE),)
        new = ()
        for i in tl.static_range(N_E):  # one after another, so that all can lie in the same shared memory
            out = i * Z.BLOCK_E + e
            mask = (out < Z.E)[None, :] & real[:, None]
            wt = tl.load(w.proj_weight + out[None, :] * K + at[:, None], mask=mask, other=0.0).to(Z.DTYPE)  # [CHUNK, BLOCK_E]
            for p in tl.static_range(PARTS):
                new = new + (dot(hs[p], wt, Z, accs[i * PARTS + p]),)
        accs = new

    for p in tl.static_range(PARTS):
        row = rows[p]
        image = row // n_patches
        token = image * (n_patches + 1) + 1 + row % n_patches
        outputs = ()
        for i in tl.static_range(N_E):
            out = i * Z.BLOCK_E + e
            y = accs[i * PARTS + p]
            if w.proj_bias is not None:
                y += load(w.proj_bias, out, out < Z.E)[None, :]
            outputs = outputs + (y,)
        if w.norm2_weight is not None:
            outputs = _second_norm(outputs, w, eps, Z)
        for i in tl.static_range(N_E):
            out = i * Z.BLOCK_E + e
            mask = (row < n_rows)[:, None] & (out < Z.E)[None, :]
            source = image * patch_stride_b + (1 + row % n_patches) * patch_stride_n
            y = outputs[i] + load(patch_ptr + source[:, None], out[None, :], mask)
            tl.store(y_ptr + token[:, None] * Z.E + out[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
            # the class token goes along with its image's first patch
            mask = mask & (row % n_patches == 0)[:, None]
            cls = tl.load(patch_ptr + (image * patch_stride_b)[:, None] + out[None, :], mask=mask, other=0.0)
            tl.store(y_ptr + ((token - 1) * Z.E)[:, None] + out[None, :], cls.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalised(x_ptr, shift, row, n_rows, eps, Z: tl.constexpr):
    """Rows of W values plus ``shift``, normalised: x̂ [BLOCK, W_PAD], zero past their ends, 1/σ [BLOCK], and what is real.

    All are zero in rows past the last, and then so is all that the backward makes of them.
    """
    col = tl.arange(0, Z.W_PAD)
    mask = (row < n_rows)[:, None] & (col < Z.W)[None, :]
    x = load(x_ptr + row[:, None] * Z.W, col[None, :], mask) + shift[None, :]
    x = centred(x, col < Z.W, Z.W, Z.EXACT)
    rstd = tl.where(row < n_rows, tl.rsqrt(tl.sum(x * x, 1) * (1.0 / Z.W) + eps), 0.0)
    return x * rstd[:, None], rstd, mask


@triton.jit
def _fold_norm_kernel(x_ptr, y_ptr, weight_ptr, bias_ptr, n_rows, eps, Z: tl.constexpr):
    """y = LN(x), rows of W values."""
    row = tl.program_id(0).to(tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
    col = tl.arange(0, Z.W_PAD)
    gamma, beta = load(weight_ptr, col, col < Z.W), load(bias_ptr, col, col < Z.W)
    x, _, mask = _normalised(x_ptr, tl.zeros_like(gamma), row, n_rows, eps, Z)  # [BLOCK, W_PAD]
    y = x * gamma[None, :] + beta[None, :]
    tl.store(y_ptr + row[:, None] * Z.W + col[None, :], y.to(Z.DTYPE), mask=mask)


@triton.jit
def _fold_norm_bwd_kernel(
    x_ptr, shift_ptr, weight_ptr, gradient_ptr, dx_ptr, sums_ptr, n_rows, n_group, stride_group, stride_row, eps,
    Z: tl.constexpr,
):  # fmt: skip
    """Backward of LN(x + shift): dx, and a program's sums over its rows of g · x̂, g and dx.

    These are the gradients of weight, bias and shift. GROUPED: the rows of the incoming gradient lie in groups of
    ``n_group``, the patches of an image.
    """
    col = tl.arange(0, Z.W_PAD)
    gamma, shift = load(weight_ptr, col, col < Z.W), load(shift_ptr, col, col < Z.W)
    # whole tiles are summed, and their rows only at the end: no reduction between the warps in a tile
    d_weight = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    d_bias = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    d_shift = tl.full((Z.BLOCK, Z.W_PAD), 0.0, tl.float32)
    tiles = tl.cdiv(n_rows, Z.BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * Z.BLOCK + tl.arange(0, Z.BLOCK)
        x, rstd, mask = _normalised(x_ptr, shift, row, n_rows, eps, Z)  # [BLOCK, W_PAD], [BLOCK]
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
def _specialise(dtype: torch.dtype, S: int, C: int, E: int, legacy: bool) -> Launch:
    config = CONFIGS[dtype]
    block_e = min(128, max(16, triton.next_power_of_2(E)))
    if 4 * block_e < E:  # a wide row's outputs leave registers for one part of 32 rows, and shared memory for less of K
        config = config._replace(rows=ROWS, chunk=32)
    if legacy:
        config = config._replace(chunk=max(16, triton.next_power_of_2(C)))
        if config.chunk * -(-E // block_e) * block_e > 1 << 15:  # the next pixel's weights do not fit on the chip besides
            config = config._replace(stages=1)
    Z = Sizes.computed(dtype, S=S, C=C, E=E, LEGACY=legacy, BLOCK=config.rows, BLOCK_E=block_e, CHUNK=config.chunk)
    return Launch(_fold_fwd_kernel, {"Z": Z}, config, config.rows, turns=-(-Z.K // Z.STEP))


@remembered
def _specialise_norm(kernel: Any, dtype: torch.dtype, W: int, grouped: bool = False) -> Launch:
    pad = triton.next_power_of_2(W)
    block = max(1, NORM_VALUES // pad)
    config = Config(block, warps=min(16, max(1, block * pad // (32 * NORM_EACH))), per_sm=NORM_PER_SM)
    return Launch(kernel, {"Z": NormSizes.computed(dtype, W=W, W_PAD=pad, BLOCK=block, GROUPED=grouped)}, config, block)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of the rows of a contiguous matrix."""
    spec, y = _specialise_norm(_fold_norm_kernel, x.dtype, x.shape[1]), torch.empty_like(x)
    launch(spec, -(-x.shape[0] // spec.config.rows), x, y, contiguous(weight), contiguous(bias), x.shape[0], eps)
    return y


def _norm_backward(
    gradient: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, eps: float, has_dx: bool, has_sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and shift of LN(x + shift), where asked for; ``gradient``: (groups, rows each, W)."""
    rows, W = x.shape
    spec = _specialise_norm(_fold_norm_bwd_kernel, x.dtype, W, gradient.shape[0] > 1)
    grid = programs(x.device, -(-rows // spec.config.rows), spec.config.per_sm)
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    dx = torch.empty_like(x) if has_dx else None
    sums = torch.empty((grid, 3, W), dtype=torch.float32, device=x.device) if has_sums else None
    launch(
        spec, grid, x, contiguous(shift), contiguous(weight), gradient, dx, sums, rows, gradient.shape[1],
        *gradient.stride()[:2], eps,
    )  # fmt: skip
    return dx, *(sums.sum(0) if has_sums else (None, None, None))


class Fold(Operation):
    """The blocks' projection of pixels onto patches, and the stem's."""

    twin = staticmethod(reference.fold)
    activations = ("pixel", "patch")
    unread = "patch"
    shapes = dict(
        pixel="P S C", patch="B T E", norm1_weight="W", norm1_bias="W", proj_weight="E S*C", proj_bias="E", norm2_weight="E",
        norm2_bias="E",
    )  # fmt: skip

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["norm2_weight"] is None:
            given["norm2_bias"] = None  # the reference does not read it alone, either
        return super().prepare(given)

    def numbers(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        return {}, operation.wrong_eps(given)

    def unsupported(self, sizes: Mapping[str, Any]) -> list[str]:
        S, C, E = (sizes[letter] for letter in "SCE")
        reasons = []
        if not 1 <= C <= 128:
            reasons.append(f"C={C} channels a pixel; accepted: 1 to 128")
        if not 1 <= E <= 1024:
            reasons.append(f"E={E} channels a patch; accepted: 1 to 1024")
        if S < 1:
            reasons.append(f"S={S} pixels a patch; accepted: at least 1")
        if S * C > WIDEST:
            reasons.append(f"S·C={S * C} values a patch; accepted: up to {WIDEST}")
        if sizes.get("W", C) not in (C, S * C):
            reasons.append(f"norm1_weight has {sizes['W']} values; accepted: S·C={S * C}, or C={C} (legacy)")
        if "P" in sizes:
            P, B, T = (sizes[letter] for letter in "PBT")
            if T < 1 or P != B * (T - 1):
                reasons.append(f"pixel has {P} patches, patch has {B} images with {T - 1} each")
            if P * S > operation.MOST_ROWS:
                reasons.append(f"{P} patches of {S} pixels; accepted: up to {operation.MOST_ROWS} pixels in all")
        return reasons

    def gradients_unsupported(self, sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> list[str]:
        width = max(sizes["S"] * sizes["C"], sizes["E"])
        return [f"rows of {width} values (S·C, or E); the backward takes 1 to {NORM_WIDTH}"] if width > NORM_WIDTH else []

    def launches(self) -> Iterable[tuple[str, str, Launch]]:
        """The blocks' fold, of which the stem's differs by its bias."""
        for variant, (C, E, legacy) in VARIANTS.items():
            for dtype, name in operation.DTYPES.items():
                pointers = Weights(*[f"*{name}"] * 6)
                pointers = pointers._replace(**dict.fromkeys(("norm2_weight", "norm2_bias") if legacy else ("proj_bias",)))
                yield variant, name, _specialise(dtype, 16, C, E, legacy).shipped(dtype, w=pointers)
                width, rows = (C, 16) if legacy else (16 * C, 1)  # the first norm's, rows a patch
                norm, backward = (_specialise_norm(k, dtype, width) for k in (_fold_norm_kernel, _fold_norm_bwd_kernel))
                yield variant, name, norm._replace(patches=norm.patches / rows).shipped(dtype)
                backward = backward._replace(patches=backward.patches / rows)
                yield variant, name, backward.shipped(dtype, shift_ptr=None, sums_ptr="*fp32")
                if not legacy:
                    second = _specialise_norm(_fold_norm_bwd_kernel, dtype, E, True)
                    yield variant, name, second.shipped(dtype, shift_ptr=None, sums_ptr="*fp32")

    def multiply_adds(self, a: SimpleNamespace) -> int:
        P, S, C = a.pixel
        return P * S * C * a.patch[2]

    def empty(self, a: SimpleNamespace) -> Tensor:
        return torch.empty(a.patch.shape, dtype=torch.promote_types(a.pixel.dtype, a.patch.dtype), device=a.pixel.device)

    def forward(self, a: SimpleNamespace) -> Tensor:
        (P, S, C), (_, T, E) = a.pixel.shape, a.patch.shape
        out = self.empty(a)
        if P == 0:
            return out.copy_(a.patch)
        patch = a.patch if a.patch.stride(-1) == 1 else a.patch.contiguous()
        spec = _specialise(a.pixel.dtype, S, C, E, a.norm1_weight.shape[0] == C and S > 1)
        w = Weights(*(getattr(a, name) for name in Weights._fields))
        grid = -(-P // spec.config.rows)
        launch(spec, grid, a.pixel.contiguous(), patch, out, contiguous(w), P, T - 1, *patch.stride()[:2], a.eps)
        return out

    def backward(self, gradient: Tensor, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        """By the kernels, but for the sizes of ``gradients_unsupported``, which PyTorch takes."""
        (P, S, C), E = a.pixel.shape, a.patch.shape[2]
        if self.gradients_unsupported(dict(S=S, C=C, E=E), a.pixel.dtype, a.pixel.device):
            return self.recomputed(gradient, a, needed)
        found = {"patch": gradient.clone()} if "patch" in needed else {}
        if a.norm2_weight is None and "norm2_bias" in needed:
            found["norm2_bias"] = torch.zeros_like(a.norm2_bias)
        if P == 0:
            found |= {name: torch.zeros_like(getattr(a, name)) for name in needed - {"patch"}}
        elif needed - {"patch"}:
            found |= self._matrix_gradients(gradient[:, 1:], a, needed)
        return found

    def _matrix_gradients(self, gradient: Tensor, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        """Of all but the patch; ``gradient``: (B, N, E) of any strides, only read."""
        pixel, weight, eps = a.pixel.contiguous(), a.proj_weight.to(a.pixel.dtype), a.eps
        rows, E = pixel.shape[0], weight.shape[0]
        width = a.norm1_weight.shape[0]  # S·C, or legacy C: then a matrix of more, shorter rows
        of_first, of_second = {"norm1_weight", "norm1_bias"}, {"proj_bias", "norm2_weight", "norm2_bias"}
        found: dict[str, Any] = {}
        h = None
        if "proj_weight" in needed or a.norm2_weight is not None:
            h = _norm(pixel.view(-1, width), a.norm1_weight, a.norm1_bias, eps).view(rows, -1)
        if a.norm2_weight is None:
            dz = gradient.reshape(rows, E).to(pixel.dtype)
            if "proj_bias" in needed:
                found["proj_bias"] = dz.sum(0, dtype=torch.float32)
        else:
            z = torch.mm(h, weight.t())
            dz, found["norm2_weight"], found["norm2_bias"], found["proj_bias"] = _norm_backward(
                gradient, z, a.proj_bias, a.norm2_weight, eps, bool(needed - of_second - {"patch"}), bool(needed & of_second)
            )
            del z
        if "proj_weight" in needed:
            found["proj_weight"] = torch.mm(dz.t(), h)
        del h
        if needed & ({"pixel"} | of_first):
            dh = torch.mm(dz, weight).view(1, -1, width)
            found["pixel"], found["norm1_weight"], found["norm1_bias"], _ = _norm_backward(
                dh, pixel.view(-1, width), None, a.norm1_weight, eps, "pixel" in needed, bool(needed & of_first)
            )
            if "pixel" in needed:
                found["pixel"] = found["pixel"].view(pixel.shape)
        return found


fold = Fold()
"""``reference.fold``, fused; called like that."""
