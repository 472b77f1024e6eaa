"""How the cost of a TNT grows with batch, image size, pixels a patch and depth; the report fits an exponent to each.

Without a GPU: TNT-Ti on the reference path, small. The guard holds every one of them to the reference in float64.
"""

import pytest
import timm
import torch

import tnt_fast
from benchmarks import measure
from benchmarks.measure import DEVICE, DTYPES, GPU, Case, Provider
from benchmarks.test_models import TNTS, filled, looked_at
from tnt_fast import flops

pytestmark = pytest.mark.benchmark(timer=measure.clock)


def sweeps(gpu: bool) -> dict[str, list[tuple[int, dict]]]:
    """By name: the size that grows, and the arguments that make it so."""
    images = ((192, 512), (224, 224), (384, 384), (512, 512)) if gpu else ((128, 256), (224, 224), (320, 320))
    return {
        "batch": [(batch, {}) for batch in ((1, 8, 64, 256, 1024) if gpu else (1, 2, 4))],
        "image": [(size[0] * size[1], dict(img_size=size)) for size in images],
        "pixels": [((16 // stride) ** 2, dict(first_stride=stride)) for stride in (8, 4, 2)],
        "depth": [(depth, dict(depth=depth)) for depth in ((3, 6, 12, 24) if gpu else (3, 6, 12))],
    }


def scaling_case(sweep: str, size: int, changes: dict, provider: str, gpu: bool) -> Case:
    """``provider``: a backend of ours, or timm, eager."""
    family, dtype = ("tnt_s", "bf16") if gpu else ("tnt_ti", "fp32")
    batch = size if sweep == "batch" else 64 if gpu else 1
    label = "x".join(map(str, changes["img_size"])) if sweep == "image" else str(size)
    arguments = TNTS[family] | changes

    def model(own: bool = True, **others) -> torch.nn.Module:
        with torch.device("meta"):
            found = tnt_fast.TNT(**arguments, **others) if own else timm.models.tnt.TNT(**arguments)
        return filled(found, DTYPES[dtype]).requires_grad_(False)

    def build() -> Provider:
        timed = model(own=False) if provider == "timm" else model(backend=provider)
        size = (batch, 3, *timed.pixel_embed.img_size)
        images = [torch.randn(size, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(3)]

        def check():
            reference, chosen = model(backend="reference"), looked_at(batch)
            own = reference(images[0][chosen])
            return {"output": measure.by_rule(timed(images[0])[chosen], reference.double()(images[0][chosen].double()), own)}

        own_bytes = sum(p.numel() * p.element_size() for p in timed.parameters())
        slack = measure.FOREIGN if provider == "timm" else 1.0
        return Provider(lambda i: timed(images[i % 3]), check, own_bytes, slack)

    info = dict(suite="scaling", sweep=sweep, size=size, label=label, model=family, mode="inference", dtype=dtype, batch=batch)
    return Case(f"{sweep}/{label}/{provider}", f"scaling/{sweep}", build, info | dict(provider=provider, arguments=arguments))


def scaling_cases(gpu: bool) -> list[Case]:
    return [
        scaling_case(sweep, *point, provider, gpu)
        for sweep, points in sweeps(gpu).items()
        for point in points
        for provider in (("fused", "timm") if gpu else ("reference",))
    ]


@measure.rows(scaling_cases(GPU), "TNT-S, fused and timm, bf16, batches up to 1024, images up to 512x512, depth 24")
def test_scaling(take, case):
    done = take(case)
    shadow = tnt_fast.TNT(**case.info["arguments"], backend="reference", device="meta")
    done["benchmark"].extra_info["gmacs"] = round(flops.multiply_adds(shadow) / 1e9, 3)
