"""The named variants, registered with timm: what ``timm.create_model`` builds, and which hosted weights belong to it.

The model knows neither the registry nor files of weights; this file joins the three.
"""

from typing import Any, cast

import timm
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from tnt_fast.checkpoints import checkpoint_filter_fn
from tnt_fast.tnt import TNT

__all__: list[str] = []  # register_model adds the names


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.9, "interpolation": "bicubic",
        "fixed_input_size": True, "mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD,
        "first_conv": "pixel_embed.proj", "classifier": "head", "license": "apache-2.0",
        "paper_ids": "arXiv:2103.00112", "paper_name": "Transformer in Transformer", **kwargs,
    }  # fmt: skip


# before the decorated functions: timm reads it when they register. The weights are those that timm hosts.
default_cfgs = generate_default_cfgs({
    "tnt_fast_ti_patch16_224.untrained": _cfg(),
    "tnt_fast_s_patch16_224.in1k": _cfg(hf_hub_id="timm/tnt_s_patch16_224.in1k"),
    "tnt_fast_s_legacy_patch16_224.in1k": _cfg(hf_hub_id="timm/tnt_s_legacy_patch16_224.in1k"),
    "tnt_fast_b_patch16_224.in1k": _cfg(hf_hub_id="timm/tnt_b_patch16_224.in1k"),
})  # fmt: skip


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> TNT:
    return build_model_with_cfg(
        TNT, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **{**defaults, **kwargs},
    )  # fmt: skip


@register_model
def tnt_fast_ti_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-Ti: 12 × (12 | 192) channels, 6.1 M parameters, 1.4 GMACs. Nobody published weights."""
    return _create("tnt_fast_ti_patch16_224", pretrained, dict(
        embed_dim=192, inner_dim=12, depth=12, num_heads_inner=2, num_heads_outer=3), kwargs)  # fmt: skip


@register_model
def tnt_fast_s_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-S: 12 × (24 | 384) channels, 23.8 M parameters, 5.2 GMACs."""
    return _create("tnt_fast_s_patch16_224", pretrained, dict(
        embed_dim=384, inner_dim=24, depth=12, num_heads_inner=4, num_heads_outer=6), kwargs)  # fmt: skip


@register_model
def tnt_fast_s_legacy_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-S with timm's older stem and fold (the weights of timm's first port and of mmpretrain)."""
    return _create("tnt_fast_s_legacy_patch16_224", pretrained, dict(
        embed_dim=384, inner_dim=24, depth=12, num_heads_inner=4, num_heads_outer=6, legacy=True), kwargs)  # fmt: skip


@register_model
def tnt_fast_b_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-B: 12 × (40 | 640) channels, 65.4 M parameters, 14.0 GMACs."""
    return _create("tnt_fast_b_patch16_224", pretrained, dict(
        embed_dim=640, inner_dim=40, depth=12, num_heads_inner=4, num_heads_outer=10), kwargs)  # fmt: skip


def create_tnt(name: str, **kwargs: Any) -> TNT:
    """``timm.create_model``, for this project's TNT only: timm's names (``tnt_s_patch16_224``) mean ours."""
    if name.startswith("tnt_") and not name.startswith("tnt_fast_"):
        name = name.replace("tnt_", "tnt_fast_", 1)
    known = timm.list_models("tnt_fast_*")
    if name.split(".")[0] not in known:
        raise ValueError(f"model {name!r} is unknown; accepted: {', '.join(known)}")
    try:
        return cast(TNT, timm.create_model(name, **kwargs))
    except RuntimeError as error:
        if "Invalid pretrained tag" not in str(error):
            raise
        raise ValueError(
            f"model {name!r} is unknown; accepted tags: {', '.join(timm.list_pretrained('tnt_fast_*'))}"
        ) from error
