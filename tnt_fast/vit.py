"""A TNT that begins as a ViT: ``from_vit``.

A ViT is a TNT's outer half. What a TNT has instead of the ViT's patch embedding, norm(W · norm(pixels)), cannot equal a linear
map, since norms take the scale away. So such a TNT keeps the ViT's embedding (``use_patch_embed``), and the folds add to it:

    patch = [cls; patch_embed(image)] + patch_pos + [0; stem fold]            ViT: the same without the fold
    patch = outer(patch + [0; fold(inner(pixel))])  in each block             ViT: outer(patch)

A fold ends in norm2_proj, whose weight and bias are 0 at first (a legacy block's ends in proj, which then is 0). Zeros in the
weights before that norm would not do: it makes their smallest first step as large as any. What else differs is carried over:
eps (1e-6 in timm's ViT), biases of q, k and v, LayerScale as a factor of the weights before it, the position of a class token
that has none (``no_embed_class``) as 0. timm's ViT normalises before pooling, as TNT does; one with ``fc_norm`` does not.
"""

import copy
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from tnt_fast.tnt import TNT

# parameters that no ViT has
_PIXELS = re.compile(r"(blocks\.\d+\.)?(pixel_|norm_in|attn_in|norm_mlp_in|mlp_in|norm[12]_proj|proj\.)")


def from_vit(
    vit: VisionTransformer, *, inner_dim: int | None = None, num_heads_inner: int | None = None, first_stride: int = 4,
    inner_blocks: Iterable[int] | None = None, legacy: bool = False, backend: str = "auto",
) -> TNT:  # fmt: skip
    """A TNT to fine-tune, which at first computes what a ViT or DeiT of timm computes, up to rounding.

    Its outer transformers, embedding, positions, norm and head are copies of the ViT's; the pixels' part is new, random, and
    adds nothing before it is trained. With ``inner_blocks=()`` it is the ViT itself behind an idle stem. Dtype, device, mode,
    drop rates and pretrained_cfg are the ViT's, so also mean, deviation and crop.

    Args:
        vit: of ``timm.create_model("deit_small_patch16_224", pretrained=True)`` and its like.
        inner_dim: C; None: a sixteenth of the ViT's width, as in the paper. num_heads_inner: None: 4, or 2 or 1 for heads of
            at least 6 channels.
        first_stride, inner_blocks, legacy, backend: as for ``TNT``.

    Raises:
        TypeError: not a timm VisionTransformer. ValueError: it computes what a TNT cannot (registers, qk_norm, another
            activation, fc_norm, …), or sizes that do not fit; the message names it.
    """
    if type(vit) is not VisionTransformer:
        raise TypeError(f"from_vit takes a timm VisionTransformer, got {type(vit).__module__}.{type(vit).__name__}")
    if reasons := _reasons(vit):
        raise ValueError(f"a TNT cannot compute what this ViT does: {'; '.join(reasons)}; take one like deit_small_patch16_224")
    first: Any = vit.blocks[0]
    last: Any = vit.blocks[-1]
    embed: Any = vit.patch_embed
    like: Any = vit.cls_token
    E, hidden = vit.embed_dim, first.mlp.fc1.out_features
    C = max(1, E // 16) if inner_dim is None else inner_dim
    heads = next(h for h in (4, 2, 1) if h == 1 or (C % h == 0 and 6 * h <= C)) if num_heads_inner is None else num_heads_inner
    ours = TNT(
        embed.img_size, embed.patch_size, embed.proj.in_channels, vit.num_classes, vit.global_pool,
        embed_dim=E, inner_dim=C, depth=len(vit.blocks), num_heads_inner=heads, num_heads_outer=first.attn.num_heads,
        mlp_ratio=(hidden + 0.5) / E,  # which TNT rounds down to that width again
        qkv_bias=first.attn.qkv.bias is not None, drop_rate=vit.head_drop.p, pos_drop_rate=vit.pos_drop.p,
        proj_drop_rate=first.attn.proj_drop.p, attn_drop_rate=first.attn.attn_drop.p,
        drop_path_rate=getattr(last.drop_path1, "drop_prob", 0.0), norm_layer=partial(nn.LayerNorm, eps=first.norm1.eps),
        first_stride=first_stride, legacy=legacy, device=like.device, dtype=like.dtype,
        backend=backend, inner_blocks=inner_blocks, use_patch_embed=True,
        dynamic_img_size=vit.dynamic_img_size,
    )  # fmt: skip
    state, own = _renamed(vit.state_dict(), vit.no_embed_class), ours.state_dict()
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    wrong += [name for name in own if name not in state and not _PIXELS.match(name)]
    if wrong:
        raise ValueError(
            f"a TNT cannot compute what this ViT does with {', '.join(wrong[:5])}; take one like deit_small_patch16_224"
        )
    ours.load_state_dict({**own, **state})
    folds: list[Any] = [ours, *(block for block in ours.blocks if block.has_inner)]
    with torch.no_grad():
        for fold in folds:
            for p in (fold.proj if fold.norm2_proj is None else fold.norm2_proj).parameters():
                p.zero_()
    ours.train(vit.training)
    ours.grad_checkpointing = vit.grad_checkpointing
    for name in ("pretrained_cfg", "default_cfg"):
        if hasattr(vit, name):
            setattr(ours, name, copy.deepcopy(getattr(vit, name)))
    return ours


def _reasons(vit: Any) -> list[str]:
    """What its parameters do not show; a module that has other parameters is found by their names."""
    kinds = {"patch_embed": (vit.patch_embed, PatchEmbed), "patch_drop": (vit.patch_drop, nn.Identity)}
    for i, block in enumerate(vit.blocks):
        kinds[f"blocks.{i}"] = (block, Block)
        for name, kind in (("attn", Attention), ("mlp", Mlp)):
            kinds[f"blocks.{i}.{name}"] = (getattr(block, name, None), kind)
    found = [f"{name} is a {type(module).__name__}" for name, (module, kind) in kinds.items() if type(module) is not kind]
    if found:
        return found
    if vit.cls_token is None:
        found.append("it has no class token")
    if vit.pos_embed is None:
        found.append("it has no positions")  # timm 1.0.24 loses the class token, too, then
    if vit.global_pool not in ("", "token", "avg") or getattr(vit, "pool_include_prefix", False):
        found.append(f"global_pool={vit.global_pool!r}" + " with the class token" * (vit.global_pool == "avg"))
    if vit.patch_embed.dynamic_img_pad:
        found.append("dynamic_img_pad")
    acts = {(type(block.mlp.act).__name__, getattr(block.mlp.act, "approximate", "none")) for block in vit.blocks}
    found += [f"the activation {name} ({how})" for name, how in acts if (name, how) != ("GELU", "none")]
    eps = {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) != 1:
        found.append(f"LayerNorms with eps of {sorted(eps)}" if eps else "no LayerNorm")
    return found


_NAMES = (
    (r"^pos_embed$", "patch_pos"), (r"^patch_embed\.proj\.", "patch_embed."), (r"\.norm1\.", ".norm_out."),
    (r"\.norm2\.", ".norm_mlp."), (r"\.attn\.", ".attn_out."),
)  # fmt: skip


def _renamed(state: dict[str, Tensor], no_embed_class: bool) -> dict[str, Tensor]:
    """A ViT's weights under TNT's names; those that it does not know stay."""
    state = dict(state)
    for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        layer, gamma = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2"), state.pop(name)
        state |= {f"{layer}.weight": gamma[:, None] * state[f"{layer}.weight"], f"{layer}.bias": gamma * state[f"{layer}.bias"]}
    if no_embed_class:
        state["pos_embed"] = nn.functional.pad(state["pos_embed"], (0, 0, 1, 0))
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        before, qkv, kind = name.partition("qkv.")
        if qkv:  # (3E, E): queries and keys, then values
            split = value.shape[0] // 3 * 2
            found |= {f"{before}qk.{kind}": value[:split], f"{before}v.{kind}": value[split:]}
        else:
            found[name] = value
    return found
