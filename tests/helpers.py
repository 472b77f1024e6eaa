"""What several test files share."""

import torch
from torch import nn

TINY = dict(img_size=32, embed_dim=24, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=3, num_classes=5)
"""A TNT of 4 patches with 16 pixels each."""


def perturb(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Move every parameter off its initial value, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
