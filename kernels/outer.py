"""outer: the outer transformer, an ordinary ViT block over the class token and the patches.

    patch = fold(pixel, patch)                             where pixels are given
    x = patch + attn_scale · proj(softmax(q kᵀ / √D) v),   q, k, v = linear(LN₁ patch), H heads of D channels
    y = x + mlp_scale · fc2(GELU(fc1(LN₂ x)))

Shapes: patch and result (B, T, E), T = 1 + N tokens. The products and the attention are large and the libraries': what is left
between them is two LayerNorms, of which fold's last launch does the first. Eight launches, ten with fold: each LayerNorm also
writes what the branch behind it is added to, with the biases of that branch, so that the product that ends it adds in place;
q, k and v are one product; GELU belongs to fc1's.

GELU in bfloat16 is cuBLAS's, of the tanh form: at most 4.7e-4 off the erf form, where rounding values near 1 to bfloat16
makes 3.9e-3; in float16 and float32 it is PyTorch's own.

The gradients are PyTorch's, through the reference, which starts again from the inputs. A model that trains keeps more instead,
and takes the submodules (``tnt.Block.outer``).
"""

from collections.abc import Iterable, Mapping
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_fast import attention, reference
from tnt_fast.kernels import norm, operation
from tnt_fast.kernels.fold import fold, product
from tnt_fast.kernels.operation import Launch, Operation, contiguous


class Outer(Operation):
    """The outer transformer; its limits are those of a LayerNorm's row."""

    twin = staticmethod(reference.outer)
    activations = ("patch", "pixel")
    together = ("qk_bias", "v_bias")
    shapes = dict(
        patch="B T E", norm1_weight="E", norm1_bias="E", qk_weight="2*E E", qk_bias="2*E", v_weight="E E", v_bias="E",
        proj_weight="E E", proj_bias="E", norm2_weight="E", norm2_bias="E", fc1_weight="M E", fc1_bias="M", fc2_weight="E M",
        fc2_bias="E", attn_scale="B", mlp_scale="B", pixel="P S C", fold_norm1_weight="W", fold_norm1_bias="W",
        fold_proj_weight="E S*C", fold_proj_bias="E", fold_norm2_weight="E", fold_norm2_bias="E",
    )  # fmt: skip
    limits = {"E": norm.WIDEST, "B*T": operation.MOST_ROWS}
    variants = {"ti": (192,), "s": (384,), "b": (640,)}  # E

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["pixel"] is None:  # the reference reads none of these, then
            given |= dict.fromkeys(reference.FoldWeights._fields)
        if given["fold_norm2_weight"] is None:
            given["fold_norm2_bias"] = None
        return super().prepare(given)

    def unsupported(self, sizes: Mapping[str, Any]) -> list[str]:
        of_fold = fold.unsupported(sizes) if "P" in sizes else []
        return super().unsupported(sizes) + [reason.replace("norm1_weight", "fold_norm1_weight") for reason in of_fold]

    def wrong_values(self, given: Mapping[str, Any], device: torch.device, sizes: Mapping[str, int] | None = None) -> list[str]:
        needed = ("fold_norm1_weight", "fold_proj_weight") if given.get("pixel") is not None else ()
        missing = [f"{name} is None; it is needed" for name in needed if given[name] is None]
        return missing or super().wrong_values(given, device, sizes)

    def shipped(self, dtype: torch.dtype, E: int) -> Iterable[Launch]:
        """The LayerNorm before the MLP, and fold's last launch with the one before the attention."""
        yield norm.specialise(norm._norm_kernel, dtype, E).shipped(dtype)
        yield norm.launch_of("add and norm", dtype, E)

    def multiply_adds(self, a: SimpleNamespace) -> int:
        B, T, E = a.patch
        return B * T * (4 * E * E + 2 * E * a.weights.fc1_weight[0] + 2 * T * E) + (0 if a.pixel is None else E * prod(a.pixel))

    def forward(self, a: SimpleNamespace, out: Tensor) -> None:
        (B, T, E), H, w = a.patch.shape, a.num_heads, operation.cast(contiguous(a.weights), a.patch.dtype)
        rest = out.view(B * T, E)

        def begin(x: Tensor, weight: Tensor, bias: Tensor | None, later: Tensor | None, scale: Tensor | None) -> Tensor:
            """LN(x); the rest is x and, where the branch is not scaled, its last bias."""
            return norm.forward(x, weight, bias, a.eps, rest, later if scale is None else None)

        def end(h: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
            if scale is None:
                rest.addmm_(h, weight.t())
            else:
                out.addcmul_(F.linear(h, weight, bias).view(B, T, E), scale.to(out.dtype).view(B, 1, 1))

        f = a.fold_weights
        if a.pixel is None or a.pixel.shape[0] == 0:
            h = begin(a.patch.contiguous().view(B * T, E), w.norm1_weight, w.norm1_bias, w.proj_bias, a.attn_scale)
        else:
            z = product(a.pixel.to(out.dtype), f.fold_norm1_weight, f.fold_norm1_bias, f.fold_proj_weight, a.eps)
            later = w.proj_bias if a.attn_scale is None else None
            second = f.fold_proj_bias, f.fold_norm2_weight, f.fold_norm2_bias
            h = norm.add(z, a.patch, out, norm.AddWeights(*second, w.norm1_weight, w.norm1_bias, later), a.eps)
        bias = None if w.qk_bias is None else operation.joined(w.qk_bias, w.v_bias)
        qkv = F.linear(h, operation.joined(w.qk_weight, w.v_weight), bias).view(B, T, 3, H, E // H)
        h = attention.attend(*qkv.unbind(2)).reshape(B * T, E)
        end(h, w.proj_weight, w.proj_bias, a.attn_scale)

        h = begin(rest, w.norm2_weight, w.norm2_bias, w.fc2_bias, a.mlp_scale)
        if h.dtype == torch.bfloat16 and w.fc1_bias is not None:
            h = torch._addmm_activation(w.fc1_bias, h, w.fc1_weight.t(), use_gelu=True)
        else:
            h = F.gelu(F.linear(h, w.fc1_weight, w.fc1_bias))
        end(h, w.fc2_weight, w.fc2_bias, a.mlp_scale)


outer = Outer()
"""``reference.outer``, fused; called like that."""
