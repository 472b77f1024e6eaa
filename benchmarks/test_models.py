"""Throughput of whole models: TNT against timm's TNT and DeiT of the same size, with multiply-adds beside.

A TNT that does not match timm's output is not timed. On a machine without a GPU the rows are small and on the CPU.
"""

import pytest
import timm
import torch

import tnt_fast
from tnt_fast import flops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64 if DEVICE == "cuda" else 2
BACKEND = "fused" if DEVICE == "cuda" else "reference"


def _model(name: str, provider: str, image: torch.Tensor) -> torch.nn.Module:
    model = timm.create_model(name).eval().to(DEVICE)
    if provider == "timm":
        return model
    ours = tnt_fast.from_timm(model, backend=BACKEND)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), model(image), rtol=1e-3, atol=1e-3)
    return ours


@pytest.mark.parametrize(
    ("name", "provider"),
    [("tnt_s_patch16_224", f"tnt_fast-{BACKEND}"), ("tnt_s_patch16_224", "timm"), ("deit_small_patch16_224", "timm")],
)
def test_inference(benchmark, name, provider):
    image = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    model = _model(name, provider, image)

    @torch.inference_mode()
    def forward():
        model(image)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(forward, rounds=5, warmup_rounds=1)
    gmacs = flops.multiply_adds(model, (3, 224, 224)) / 1e9
    benchmark.extra_info.update(batch=BATCH, device=DEVICE, dtype="float32", gmacs=round(gmacs, 3))
    if benchmark.stats:
        benchmark.extra_info["img_s"] = round(BATCH / benchmark.stats["median"], 2)
