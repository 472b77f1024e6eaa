"""fold: pixels of each patch, normalised, projected and added onto the patch's token.

    y[b, 0]     = patch[b, 0]
    y[b, 1 + n] = patch[b, 1 + n] + LN_E(W · LN(pixel[b·N + n]) + bias)

LN is over all S·C values of a patch, or (legacy) over the C channels of each pixel; LN_E and the bias are optional. The same
operation is the stem, where ``patch`` is ``[cls; 0] + patch_pos``, expanded over the batch (its row stride may be 0).

Shapes: pixel (B·N, S, C) contiguous, patch (B, 1 + N, E), result contiguous like patch. Three launches: LN, the product, which
is large and square and so the BLAS library's, and what follows it (norm.py). One kernel for all of it, with every row's E
outputs in a program so that LN_E sees them, reads all weights in each program: it took 134 µs on an H200 for TNT-S at batch
256, of which the product alone takes 31 there (benchmarks/results, 2026-11-26-0600).

Backward, from the inputs alone (nothing else is saved), with g the gradient of y[:, 1:]:

    h = LN(pixel),  z = h · Wᵀ + bias                  recomputed; z in one launch where gelu.py says so, h then, as
                                                       without LN_E, by LN's backward
    dz = LN_E's backward of g (or g),  dbias = Σ dz
    dW = dzᵀ · h,  dh = dz · W
    dpixel = LN's backward of dh

The patch's gradient is that of y. Where outer has the norm behind the fold, and asks for both, LN_E's backward lies in that
norm's launch. What programs leave of the sums is added up in one launch (totals.py). Bytes moved at most: pixel and dh read
twice, z, dz and h as often, each written once.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tnt_fast import reference
from tnt_fast.arguments import FOLD_SHAPES, beyond
from tnt_fast.kernels import gelu as many
from tnt_fast.kernels import norm, operation
from tnt_fast.kernels.operation import Operation, contiguous, of_matrix
from tnt_fast.kernels.totals import totals


def product(shape: tuple[int, ...], width: int, dtype: torch.dtype, eps: float) -> Callable[..., Tensor]:
    """W · LN(pixel), a row a patch, of pixels of a shape and a dtype, and W in that, too; LN of ``width`` values."""
    P, S, C = shape
    normed = norm.prepared(P * S * C // width, width, dtype, again=True)

    def projected(pixel: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor) -> Tensor:
        h = normed(pixel.contiguous().view(-1, width), norm_weight, norm_bias, eps)
        return torch.mm(h.view(P, -1), weight.t())

    return projected


class Fold(Operation):
    """The blocks' projection of pixels onto patches, and the stem's."""

    twin = staticmethod(reference.fold)
    activations = ("pixel", "patch")
    passes = "patch"
    shapes = dict(pixel="P S C", patch="B T E") | FOLD_SHAPES
    limits = {"C": 128, "E": 1024, "S": norm.WIDEST, "S*C": norm.WIDEST, "P*S": operation.MOST_ROWS, "B*T": operation.MOST_ROWS}

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["norm2_weight"] is None:
            given["norm2_bias"] = None  # the reference does not read it alone, either
        return super().prepare(given)

    def unsupported(self, sizes: Mapping[str, Any]) -> list[str]:
        S, C, reasons = sizes["S"], sizes["C"], beyond(self.limits, sizes)
        if sizes.get("W", C) not in (C, S * C):
            reasons.append(f"norm1_weight has {sizes['W']} values; accepted: S·C={S * C}, or C={C} (legacy)")
        if "P" in sizes:
            P, B, T = (sizes[letter] for letter in "PBT")
            if T < 1 or P != B * (T - 1):
                reasons.append(f"pixel has {P} patches, patch has {B} images with {T - 1} each")
        return reasons

    def multiply_adds(self, a: SimpleNamespace) -> int:
        P, S, C = a.pixel
        return P * S * C * a.patch[2]

    def empty(self, a: SimpleNamespace) -> Tensor:
        return torch.empty(a.patch.shape, dtype=torch.promote_types(a.pixel.dtype, a.patch.dtype), device=a.pixel.device)

    def prepared(self, a: SimpleNamespace) -> Callable[[SimpleNamespace, Tensor], None]:
        if a.pixel.shape[0] == 0:
            return lambda a, out: out.copy_(a.patch)
        dtype, eps = a.pixel.dtype, a.eps
        projected = product(a.pixel.shape, a.norm1_weight.shape[0], dtype, eps)
        added = norm.adding(a.patch.shape, dtype, eps)

        def run(a: SimpleNamespace, out: Tensor) -> None:
            z = projected(a.pixel, a.norm1_weight, a.norm1_bias, a.proj_weight.to(dtype))
            added(z, norm.Weights(a.proj_bias, a.norm2_weight, a.norm2_bias), a.patch, out)

        return run

    def backward(self, gradient: Tensor, a: SimpleNamespace, needed: set[str]) -> dict[str, Tensor]:
        parts: dict[tuple[str, ...], Tensor] = {}
        found = {"patch": gradient.clone()} if "patch" in needed else {}
        found |= self.begun(gradient, a, needed - {"patch"}, a.proj_weight.dtype, parts)
        return found | totals(parts, a.norm1_weight.dtype)

    def begun(
        self,
        gradient: Tensor,
        a: SimpleNamespace,
        needed: set[str],
        dtype: torch.dtype,
        parts: dict[tuple[str, ...], Tensor],
        rest: Tensor | None = None,
        behind: Callable[[norm.Added, tuple[str, ...]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Of all but the patch; some of them ``totals`` finds in what is left in ``parts``.

        ``gradient``: of any strides, only read. ``dtype``: of the matrix, which ``a`` may have in another one. ``rest``: a
        gradient of the pixels that theirs is added to. ``behind``: launches LN_E's backward with that of the norm behind the
        fold, given the names of its sums; called once, if something is needed and LN_E is there.
        """
        if a.pixel.shape[0] == 0:
            return {name: torch.zeros_like(getattr(a, name)) for name in needed}
        found: dict[str, Any] = {}
        if a.norm2_weight is None and "norm2_bias" in needed:
            found["norm2_bias"] = torch.zeros_like(a.norm2_bias)
            needed = needed - {"norm2_bias"}
        if not needed:
            return found
        gradient = gradient[:, 1:]  # (B, N, E)
        # in one layout, whatever the caller's: for another one the library may take another product, with other bits
        pixel, weight, eps = a.pixel.contiguous(), contiguous(a.proj_weight).to(a.pixel.dtype), a.eps
        rows, E = pixel.shape[0], weight.shape[0]
        width = a.norm1_weight.shape[0]  # S·C, or legacy C: then a matrix of more, shorter rows
        of_first, of_second = {"norm1_weight", "norm1_bias"}, {"proj_bias", "norm2_weight", "norm2_bias"}
        deeper, h = needed & ({"pixel"} | of_first), None
        merged = width == pixel[0].numel() and deeper and many.takes_norm(rows, width, E, pixel.dtype, pixel.device)
        if (a.norm2_weight is not None and not merged) or ("proj_weight" in needed and not deeper):
            h = norm.forward(pixel.view(-1, width), a.norm1_weight, a.norm1_bias, eps).view(rows, -1)
        if a.norm2_weight is None:
            dz = gradient.reshape(rows, E).to(pixel.dtype).contiguous()
            if "proj_bias" in needed:
                found["proj_bias"] = dz.sum(0, dtype=torch.float32)
        else:
            if merged:
                z = many.normed(pixel.view(rows, width), weight, a.norm1_weight, a.norm1_bias, eps)
            else:
                z = torch.mm(h, weight.t())
            dz = torch.empty_like(z) if needed - of_second else None
            summed = ("norm2_weight", "norm2_bias") if a.proj_bias is None else ("norm2_weight", "norm2_bias", "proj_bias")
            if behind is not None:
                behind(norm.Added(z, a.norm2_weight, a.proj_bias, dz), summed)
            else:
                sums = norm.partial_sums(z, len(summed)) if needed & of_second else None
                norm.backward(gradient, z, a.norm2_weight, eps, dz, sums, shift=a.proj_bias)
                if sums is not None:
                    parts[summed] = sums
            del z
        y, x = None, pixel.view(-1, width)
        if "proj_weight" in needed:
            if h is None:  # it is made again below
                y = torch.empty_like(x)
            else:
                found["proj_weight"] = of_matrix(dz, h, dtype)
        del h
        if deeper:
            dh = torch.mm(dz, weight).view(1, -1, width)
            found["pixel"] = torch.empty_like(pixel) if "pixel" in needed else None
            sums = norm.partial_sums(x, 2) if needed & of_first else None
            rest = None if rest is None else rest.contiguous().view(-1, width)
            norm.backward(dh, x, a.norm1_weight, eps, found["pixel"], sums, rest=rest, y=y, bias=a.norm1_bias)
            if y is not None:
                found["proj_weight"] = of_matrix(dz, y.view(rows, -1), dtype)
            if sums is not None:
                parts["norm1_weight", "norm1_bias"] = sums
        return found


fold = Fold()
"""``reference.fold``, fused; called like that."""
