"""Throughput of whole models: TNT against timm's TNT and DeiT of the same size, with multiply-adds beside.

A TNT that does not match timm's output is not timed. On a machine without a GPU the rows are small and on the CPU.
"""

import pytest
import timm
import torch

import tnt_fast
from tnt_fast import flops

BATCH = 64 if torch.cuda.is_available() else 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _guarded(name: str, image: torch.Tensor) -> torch.nn.Module:
    model = timm.create_model(name).eval().to(DEVICE)
    if name.startswith("tnt_s"):
        ours = tnt_fast.from_timm(model, backend="reference")
        torch.testing.assert_close(ours(image), model(image), rtol=1e-4, atol=1e-4)
    return model


@pytest.mark.parametrize("provider", ["tnt_fast-reference", "timm"])
@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "deit_small_patch16_224"])
@torch.inference_mode()
def test_inference(benchmark, name, provider):
    if name.startswith("deit") and provider != "timm":
        pytest.skip("DeiT is timm's")
    image = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    model = _guarded(name, image)
    if provider != "timm":
        model = tnt_fast.from_timm(model, backend="reference")

    def forward():
        model(image)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(forward, rounds=5, warmup_rounds=1)
    gmacs = flops.multiply_adds(model, (3, 224, 224)) / 1e9
    benchmark.extra_info.update(
        batch=BATCH, device=DEVICE, dtype="float32", gmacs=round(gmacs, 3), img_s=round(BATCH / benchmark.stats["median"], 2)
    )
