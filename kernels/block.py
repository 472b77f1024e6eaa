"""block: a block of TNT, inner's kernels and behind them outer's with its fold, as one operation of two results.

    pixel' = inner(pixel),   patch' = outer(patch + fold(pixel'))

Shapes: pixel (B·N, S, C), patch (B, 1 + N, E), results like these. What it launches is theirs, and what it keeps, outer's; its
pixels are kept anyway, by the next block. One operation, because what lies between them then needs no launch of its own:

- LN of pixel', with which the fold begins, is made where pixel' still is on the chip (where ``inner.norms`` says so);
- outer's weights are cast, and q's, k's and v's matrices joined, by inner's programs, which are more than PyTorch takes;
- pixel' has two gradients, that of the next block's pixels and that of the fold, whose last launch adds up the two;
- the sums that all launches of the backward leave behind are added up in one, inner's last;
- the host calls one operation for two.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tnt_fast import reference
from tnt_fast.arguments import transformer_shapes
from tnt_fast.kernels.inner import NO_NORM, Norm, inner
from tnt_fast.kernels.outer import SCALES, Outer, outer
from tnt_fast.kernels.totals import totals

INNER = "inner_"  # what the arguments of inner begin with


class Block(Outer):
    """Inner and outer transformer; its limits are theirs."""

    twin: Any = staticmethod(reference.block)
    activations = ("pixel", "patch")
    factors = (f"{INNER}attn_scale", f"{INNER}mlp_scale", *SCALES)
    together = (("inner_qk_bias", "inner_v_bias"), ("qk_bias", "v_bias"))
    shapes = Outer.shapes | {INNER + name: shape for name, shape in transformer_shapes("C").items()}
    shapes |= {name: shape.replace("M", "F") for name, shape in transformer_shapes("E").items()}
    shapes |= {f"{INNER}attn_scale": "P", f"{INNER}mlp_scale": "P"}
    limits = {**inner.limits, **Outer.limits}
    results = 2
    reread = ("made",)

    def numbers(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """H: heads outside; ``inner_heads``."""
        sizes, reasons = super().numbers(given)
        if "inner_heads" in given:
            of_inner, more = inner.numbers({"num_heads": given["inner_heads"]})
            sizes["inner_heads"] = of_inner["H"]
            reasons += [reason.replace("num_heads", "inner_heads") for reason in more]
        return sizes, reasons

    def unsupported(self, sizes: Mapping[str, Any]) -> list[str]:
        return inner.unsupported({**sizes, "H": sizes["inner_heads"]}) + outer.unsupported(sizes)

    def multiply_adds(self, a: SimpleNamespace) -> int:
        return inner.multiply_adds(_of_inner(a)) + super().multiply_adds(a)

    def backward_multiply_adds(self, a: SimpleNamespace) -> int:
        return inner.backward_multiply_adds(_of_inner(a)) + super().backward_multiply_adds(a)

    def empty(self, a: SimpleNamespace) -> tuple[Tensor, Tensor]:
        return inner.empty(a), torch.empty_like(a.patch, memory_format=torch.contiguous_format)

    def prepared(self, a: SimpleNamespace) -> Callable[[SimpleNamespace, Any], None]:
        norms = outer.takes_normed(a) and inner.norms(_of_inner(a))
        first = inner.prepared(_of_inner(a), norms) if a.pixel.numel() else None
        read, behind = outer.halves(a, norms)

        def run(a: SimpleNamespace, out: tuple[Tensor, Tensor]) -> None:
            pixel, f, norm = out[0], a.fold_weights, NO_NORM
            found, copies = read(a, first is not None)
            if norms:
                pixel = torch.empty_like(pixel)
                norm = Norm(pixel, f.fold_norm1_weight, f.fold_norm1_bias)
            if first is not None:
                first(_of_inner(a), out[0], norm, copies)
            behind(_behind(a, pixel), out[1], found)

        return run

    def graded(
        self, gradient: Any, a: SimpleNamespace, needed: set[str]
    ) -> Callable[[Any, SimpleNamespace], dict[str, Tensor]]:
        """By PyTorch what inner and outer have by PyTorch."""
        of_inner = {name.removeprefix(INNER) for name in needed if name == "pixel" or name.startswith(INNER)}
        of_outer = {name for name in needed if name != "pixel" and not name.startswith(INNER)}
        of_outer |= {"pixel"} if of_inner else set()
        if of_inner and a.pixel.numel():
            begun, finished = inner.halves(_of_inner(a), of_inner)

        def run(gradient: list[Tensor], a: SimpleNamespace) -> dict[str, Tensor]:
            (d_pixel, d_patch), after = gradient, _behind(a, a.kept["made"])
            parts: dict[tuple[str, ...], Tensor] = {}
            if not of_outer & {*SCALES}:
                found = outer.begun(d_patch, after, of_outer, parts, d_pixel)
            else:
                found = outer.recomputed(d_patch, after, of_outer)
                if of_inner:
                    found["pixel"] = found["pixel"] + d_pixel
            before = _of_inner(a)
            if of_inner and a.pixel.numel():
                behind, left = begun(found.pop("pixel"), before)
                of_weights, summed = finished(before, left, parts)
                behind |= of_weights
            else:
                flat, summed = reference.by_name(vars(before)), totals(parts, torch.float32)
                behind = {name: torch.zeros_like(flat[name]) for name in of_inner}
            # what is found goes before what is summed
            return summed | found | {name if name == "pixel" else INNER + name: x for name, x in behind.items()}

        return run


def _of_inner(a: SimpleNamespace) -> SimpleNamespace:
    """The arguments of the inner transformer."""
    return SimpleNamespace(
        pixel=a.pixel, weights=reference.TransformerWeights(*a.inner_weights), num_heads=a.inner_heads, eps=a.eps,
        attn_scale=a.inner_attn_scale, mlp_scale=a.inner_mlp_scale,
    )  # fmt: skip


def _behind(a: SimpleNamespace, pixel: Tensor) -> SimpleNamespace:
    """The arguments of the outer transformer, of pixels that the inner one has made."""
    return SimpleNamespace(**vars(a) | {"pixel": pixel})


block = Block()
"""``reference.block``, fused; called like that."""
