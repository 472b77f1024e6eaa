"""TNT's four operations, and a block of three, in plain PyTorch. This file is the specification: the kernels are held to it.

Every operation is a pure function of tensors, in any floating dtype, on any device, differentiable, and equal to timm's
TNT (1.0.31) bit for bit. Sizes are the paper's (Han et al. 2021, arXiv:2103.00112): B images, N patches an image, S
pixels ("words") a patch, C pixel channels, E patch channels, H heads, D = C / H (or E / H) channels a head.
The model in ``tnt.py`` composes the same pieces from its submodules; a test holds the two together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TransformerWeights(NamedTuple):
    """Of a pre-norm transformer block over C channels, inside (E outside) with M hidden ones, in nn.Linear's layout.

    ``norm*``: LayerNorms, ``(C,)``. ``qk_weight``, ``qk_bias``: ``(2C, C)``, queries before keys, and ``(2C,)``; ``v_*``:
    ``(C, C)`` and ``(C,)``. ``proj_*``, ``fc1_*``, ``fc2_*``: ``(C, C)``, ``(M, C)``, ``(C, M)`` with their biases; GELU (erf)
    between fc1 and fc2. Any bias may be None.
    """

    norm1_weight: Tensor
    norm1_bias: Tensor | None
    qk_weight: Tensor
    qk_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


class FoldWeights(NamedTuple):
    """What ``fold`` adds pixels to patches by, as ``outer`` is given it; all None: nothing."""

    fold_norm1_weight: Tensor | None = None
    fold_norm1_bias: Tensor | None = None
    fold_proj_weight: Tensor | None = None
    fold_proj_bias: Tensor | None = None
    fold_norm2_weight: Tensor | None = None
    fold_norm2_bias: Tensor | None = None


class InnerWeights(NamedTuple):
    """``TransformerWeights`` of the inner transformer, as ``block`` is given them."""

    inner_norm1_weight: Tensor
    inner_norm1_bias: Tensor | None
    inner_qk_weight: Tensor
    inner_qk_bias: Tensor | None
    inner_v_weight: Tensor
    inner_v_bias: Tensor | None
    inner_proj_weight: Tensor
    inner_proj_bias: Tensor | None
    inner_norm2_weight: Tensor
    inner_norm2_bias: Tensor | None
    inner_fc1_weight: Tensor
    inner_fc1_bias: Tensor | None
    inner_fc2_weight: Tensor
    inner_fc2_bias: Tensor | None


NO_FOLD = FoldWeights()
RECOMPUTE = ("none", "mlp", "all")  # what ``outer`` may be told to compute again for its gradients


def by_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an operation with the weights of its records under their own names, in order."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, (TransformerWeights, FoldWeights, InnerWeights)):  # in forms that torch 2.8 compiles
            found.update(zip(type(value)._fields, value, strict=True))
        else:
            found[name] = value
    return found


def in_records(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``by_name``: arguments as the operation takes them."""
    found = dict(given)
    for name, record in (("weights", TransformerWeights), ("fold_weights", FoldWeights), ("inner_weights", InnerWeights)):
        if given.keys() >= set(record._fields):
            found[name] = record(*(found.pop(field) for field in record._fields))
    return found


def gradients(operation: Callable, given: Mapping[str, Any], wanted: Sequence[str], upstream: Tensor) -> dict[str, Tensor]:
    """Of an operation of this file, by PyTorch: of the tensors ``wanted``, by name; ``given``: as ``by_name`` has it."""

    def of_wanted(*tensors: Tensor) -> Tensor:
        return operation(**in_records({**given, **dict(zip(wanted, tensors, strict=True))}))

    _, pull = torch.func.vjp(of_wanted, *(given[name] for name in wanted))  # type: ignore[misc]
    return dict(zip(wanted, pull(upstream), strict=True))


def cut_patches(x: Tensor, size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Cut ``(B, C, H, W)`` into windows of ``size`` every ``stride``: ``(B·N, C, *size)``, row by row."""
    x = x.unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])  # a view, and one copy below; F.unfold takes longer
    return x.permute(0, 2, 3, 1, 4, 5).reshape(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1], size[0], size[1])


def as_pixels(x: Tensor) -> Tensor:
    """Feature maps of patches, ``(B·N, C, h, w)``, as pixel tokens ``(B·N, S, C)`` with S = h·w.

    Contiguous: what is added onto them keeps their layout, and every LayerNorm would copy another one.
    """
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]).transpose(1, 2).contiguous()


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
    """Pixel tokens of every patch: cut, convolve, add the pixel position (paper, Eq. 4 to 6).

    Args:
        image: ``(B, channels, height, width)``.
        weight, bias: of the stem convolution, ``(C, channels, K, K)`` with odd K (TNT: 7) and ``(C,)``; padding K // 2.
        pixel_pos: ``(1, C, h, w)`` with h = patch height / stride, or None.
        patch_size, patch_stride: in image pixels, (vertical, horizontal). TNT's patches touch: stride = size.
        stride: of the convolution; it divides the patch.
        legacy: False: ``conv(cut(image))``, zeros around every patch (the authors' release, timm's default). True:
            ``cut(conv(image))``, zeros around the image only, so pixels see their neighbours (timm's legacy, mmpretrain).

    Returns:
        ``(B·N, S, C)``.
    """
    padding = weight.shape[-1] // 2
    if legacy:
        x = F.conv2d(image, weight, bias, stride=stride, padding=padding)
        pixels = (patch_size[0] // stride, patch_size[1] // stride)
        x = cut_patches(x, pixels, (patch_stride[0] // stride, patch_stride[1] // stride))
    else:
        x = F.conv2d(cut_patches(image, patch_size, patch_stride), weight, bias, stride=stride, padding=padding)
    if pixel_pos is not None:
        x = x + pixel_pos
    return as_pixels(x)


def attention_weights(qk: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √D) of ``(B, T, 2·H·D)``, queries before keys: ``(B, H, T, T)`` (paper, Eq. 1)."""
    batch, tokens, width = qk.shape
    head_dim = width // 2 // num_heads
    q, k = qk.reshape(batch, tokens, 2, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return (q @ k.transpose(-2, -1)).mul_(head_dim**-0.5).softmax(dim=-1)


def attend(weights: Tensor, v: Tensor) -> Tensor:
    """Sum ``v`` ``(B, T, H·D)`` by the weights ``(B, H, T, T)`` of each head: ``(B, T, H·D)``."""
    batch, tokens, width = v.shape
    num_heads = weights.shape[1]
    v = v.reshape(batch, tokens, num_heads, width // num_heads).permute(0, 2, 1, 3)
    return (weights @ v).transpose(1, 2).reshape(batch, tokens, width)


def _transformer(
    x: Tensor,
    w: TransformerWeights,
    num_heads: int,
    eps: float,
    attn_scale: Tensor | None,
    mlp_scale: Tensor | None,
) -> Tensor:
    """x + MSA(LN(x)), then x + MLP(LN(x)): the pre-norm transformer block that TNT uses inside and outside."""
    h = F.layer_norm(x, w.norm1_weight.shape, w.norm1_weight, w.norm1_bias, eps)
    probabilities = attention_weights(F.linear(h, w.qk_weight, w.qk_bias), num_heads)
    h = F.linear(attend(probabilities, F.linear(h, w.v_weight, w.v_bias)), w.proj_weight, w.proj_bias)
    x = x + (h if attn_scale is None else h * attn_scale.reshape(-1, 1, 1))
    h = F.layer_norm(x, w.norm2_weight.shape, w.norm2_weight, w.norm2_bias, eps)
    h = F.linear(F.gelu(F.linear(h, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias)
    return x + (h if mlp_scale is None else h * mlp_scale.reshape(-1, 1, 1))


def inner(
    pixel: Tensor,
    weights: TransformerWeights,
    num_heads: int,
    eps: float = 1e-5,
    attn_scale: Tensor | None = None,
    mlp_scale: Tensor | None = None,
) -> Tensor:
    """Inner transformer: every patch's pixels attend to each other (paper, Eq. 5 and 6).

    Args:
        pixel: ``(P, S, C)``, P = B·N patches.
        weights: of C channels.
        num_heads: H, divides C. eps: of both LayerNorms.
        attn_scale, mlp_scale: ``(P,)`` factors of the two residual branches (drop-path: 0 or 1 / keep), or None.

    Returns:
        ``(P, S, C)``.
    """
    return _transformer(pixel, weights, num_heads, eps, attn_scale, mlp_scale)


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
    """Project the pixels of each patch to its token and add them there (paper, Eq. 7); the class token is untouched.

    One function serves the blocks and the stem (paper, Eq. 8, where ``patch`` is ``[cls; 0] + patch_pos``). The code of
    the authors and of timm has norms that the paper's equations leave out; they are here.

    Args:
        pixel: ``(B·N, S, C)``.
        patch: ``(B, 1 + N, E)``, class token first.
        norm1_*: first LayerNorm: over all S·C values of a patch ``(S·C,)``, or over each pixel's channels ``(C,)`` (legacy).
        proj_weight, proj_bias: ``(E, S·C)`` and ``(E,)`` or None.
        norm2_*: second LayerNorm, ``(E,)``, or None (legacy).
        eps: of both LayerNorms.

    Returns:
        ``(B, 1 + N, E)``.
    """
    batch, patches = patch.shape[0], patch.shape[1] - 1
    flat = (batch, patches, pixel.shape[1] * pixel.shape[2])
    if norm1_weight.shape[0] == pixel.shape[2]:
        x = F.layer_norm(pixel, norm1_weight.shape, norm1_weight, norm1_bias, eps).reshape(flat)
    else:
        x = F.layer_norm(pixel.reshape(flat), norm1_weight.shape, norm1_weight, norm1_bias, eps)
    x = F.linear(x, proj_weight, proj_bias)
    if norm2_weight is not None:
        x = F.layer_norm(x, norm2_weight.shape, norm2_weight, norm2_bias, eps)
    return torch.cat([patch[:, :1], patch[:, 1:] + x], dim=1)


def outer(
    patch: Tensor,
    weights: TransformerWeights,
    num_heads: int,
    eps: float = 1e-5,
    attn_scale: Tensor | None = None,
    mlp_scale: Tensor | None = None,
    pixel: Tensor | None = None,
    fold_weights: FoldWeights = NO_FOLD,
    recompute: str = "none",
) -> Tensor:
    """Outer transformer: an ordinary ViT block over class token and patches (paper, Eq. 9 and 10).

    As ``inner``, with ``patch`` ``(B, 1 + N, E)``, E channels, and drop-path factors ``(B,)``, one an image. Of ``pixel``,
    where there is one, and ``patch`` it is ``fold``, with the same eps, that the transformer is given. ``recompute`` changes no
    number: it says what the fused operation computes again for the gradients instead of keeping it: "none"; "mlp", what GELU is
    given; "all" but the attention.
    """
    if pixel is not None:
        patch = fold(pixel, patch, *fold_weights, eps)  # type: ignore[arg-type]
    return _transformer(patch, weights, num_heads, eps, attn_scale, mlp_scale)


def block(  # noqa: PLR0913  of two operations
    pixel: Tensor,
    patch: Tensor,
    inner_weights: InnerWeights,
    inner_heads: int,
    weights: TransformerWeights,
    num_heads: int,
    fold_weights: FoldWeights,
    eps: float = 1e-5,
    inner_attn_scale: Tensor | None = None,
    inner_mlp_scale: Tensor | None = None,
    attn_scale: Tensor | None = None,
    mlp_scale: Tensor | None = None,
    recompute: str = "none",
) -> tuple[Tensor, Tensor]:
    """``inner`` of the pixels, then ``outer`` of the patches, onto which those are folded: a block of TNT.

    The arguments are theirs, with the same eps: those that begin with ``inner`` of the first, the others of the second.

    Returns:
        Pixels ``(B·N, S, C)`` and patches ``(B, 1 + N, E)``.
    """
    of_inner = TransformerWeights(*inner_weights)
    pixel = inner(pixel, of_inner, inner_heads, eps, inner_attn_scale, inner_mlp_scale)
    return pixel, outer(patch, weights, num_heads, eps, attn_scale, mlp_scale, pixel, fold_weights, recompute)
