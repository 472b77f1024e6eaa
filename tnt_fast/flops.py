"""Counts of work: what PyTorch's FlopCounterMode sees of a model, and the closed forms of the paper.

A multiply-add (MAC) is what the TNT and ViT papers call a FLOP; FlopCounterMode counts two for it.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> int:
    """Multiply-adds of one image's forward, counted on the meta device: nothing is computed, the model stays as it is.

    Args:
        model: a ``tnt_fast.TNT`` or any model of timm; its attention is counted, too.
        input_size: (channels, height, width); None: what a ``tnt_fast.TNT`` takes.
    """
    shadow: Any = copy.deepcopy(model).to("meta").eval()
    if input_size is None:
        input_size = (shadow.in_chans, *shadow.pixel_embed.img_size)
    for module in shadow.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # timm's ViT: FlopCounterMode does not see the fused attention on every device
    image = torch.empty(1, *input_size, device="meta", dtype=next(shadow.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(image)
    return counter.get_total_flops() // 2


def standard_block(tokens: int, width: int, mlp_ratio: float = 4.0) -> int:
    """Multiply-adds of an ordinary transformer block, 2nd(6d + n) with r = 4 (paper, Eq. 14)."""
    hidden = int(width * mlp_ratio)
    return tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width


def tnt_block(patches: int, pixels: int, inner_width: int, width: int, mlp_ratio: float = 4.0) -> int:
    """Multiply-adds of a TNT block as the paper counts it, without the class token (paper, Eq. 15)."""
    inner = patches * standard_block(pixels, inner_width, mlp_ratio)
    return inner + patches * pixels * inner_width * width + standard_block(patches, width, mlp_ratio)
