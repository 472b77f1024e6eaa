"""Which residual stream the error under autocast comes from, on the CPU.

    python -m benchmarks.residual [--variant s] [--images 2] [--seeds 4] [--depth 12]

Under autocast PyTorch's products round to half precision and its residual streams stay float32. The fused path rounds those:
the patches' after ``fold`` and after each branch of ``outer``, the pixels' once a block. Here the reference runs under autocast
in bfloat16 with none, one or both of its streams rounded at those places, and in float32 with one alone. Told is the root mean
square of the logits' error against float32, in percent of their standard deviation, of random images; by weights: as they are
initialised, and with matrices twice as large, other LayerNorms and biases.
"""

import argparse
from collections.abc import Callable
from statistics import mean

import torch
from torch import Tensor

import tnt_fast
from benchmarks.test_models import TNTS

HALF = torch.bfloat16
ROUNDED = {"none": (), "pixels": ("pixel",), "patches": ("patch",), "both": ("pixel", "patch")}


def forward(model: tnt_fast.TNT, image: Tensor, rounded: tuple[str, ...]) -> Tensor:
    """The reference's logits with streams that are rounded where the kernels store them."""

    def stored(name: str, x: Tensor) -> Tensor:
        return x.to(HALF).to(x.dtype) if name in rounded else x

    pixel = stored("pixel", model.pixel_embed(image, model.pixel_pos))
    patch = stored("patch", model._stem(pixel, False))
    for block in model.blocks:
        pixel = stored("pixel", block.inner(pixel))
        patch = stored("patch", block.fold(pixel, patch))
        patch = stored("patch", patch + block.attn_out(block.norm_out(patch)))
        patch = stored("patch", patch + block.mlp(block.norm_mlp(patch)))
    return model.forward_head(model.norm(patch))


def perturbed(model: tnt_fast.TNT) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.data *= 2
        elif "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.3 * torch.randn_like(p)
        elif p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)


@torch.no_grad()
def errors(model: tnt_fast.TNT, image: Tensor) -> dict[str, float]:
    """In percent, by what is rounded; with "alone" behind it: and nothing else."""
    exact = forward(model, image, ()).double()

    def off(given: Callable[[], Tensor]) -> float:
        return 100 * ((given().double() - exact).square().mean() / exact.var(correction=0)).sqrt().item()

    with torch.autocast("cpu", HALF):
        found = {name: off(lambda given=given: forward(model, image, given)) for name, given in ROUNDED.items()}
    for name in ("pixels", "patches"):
        found[f"{name} alone"] = off(lambda given=ROUNDED[name]: forward(model, image, given))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residual", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=("ti", "s", "b"), default="s")
    for name, default in (("images", 2), ("seeds", 4), ("depth", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, TNT-{o.variant.upper()}, depth {o.depth}, {o.images} images, {o.seeds} seeds; percent")
    for weights in ("initial", "perturbed"):
        table = []
        for seed in range(o.seeds):
            torch.manual_seed(seed)
            model = tnt_fast.TNT(**TNTS[f"tnt_{o.variant}"], depth=o.depth, backend="reference").eval()
            torch.nn.init.trunc_normal_(model.head.weight, std=0.02)
            if weights == "perturbed":
                perturbed(model)
            table.append(errors(model, torch.randn(o.images, 3, 224, 224)))
        for name in table[0]:
            each = [row[name] for row in table]
            print(f"{weights:10} {name:14} {mean(each):.2f}  ({', '.join(f'{x:.2f}' for x in each)})", flush=True)


if __name__ == "__main__":
    main()
