"""The operations' arguments, their bytes, and one small call of each kernel for compute-sanitizer.

python -m benchmarks.kernels --call
"""

import argparse
import sys

import timm
import torch

from benchmarks import measure
from tnt_fast import kernels, reference

VARIANTS = {"s": "tnt_fast_s_patch16_224", "b": "tnt_fast_b_patch16_224"}


def arguments(variant: str, operation: str, batch: int, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Random arguments of an operation, with a block's own (perturbed) weights: positional ones and keywords."""
    torch.manual_seed(0)
    model = timm.create_model(VARIANTS[variant], depth=1, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model = model.to(dtype).requires_grad_(False)
    block, embed = model.blocks[0], model.pixel_embed
    N, S, C, E = model.num_patches, model.sizes()["S"], embed.in_dim, model.embed_dim
    if operation == "pixel_embed":
        image = torch.randn(batch, 3, *embed.img_size, device=device, dtype=dtype)
        given = (image, embed.proj.weight, embed.proj.bias, model.pixel_pos)
        return given, dict(patch_size=embed.patch_size, stride=embed.stride, patch_stride=embed.patch_stride)
    pixel = torch.randn(batch * N, S, C, device=device, dtype=dtype)
    patch = torch.randn(batch, 1 + N, E, device=device, dtype=dtype)
    if operation == "fold":
        norms = (block.norm1_proj.weight, block.norm1_proj.bias, block.proj.weight, block.proj.bias)
        return (pixel, patch, *norms, block.norm2_proj.weight, block.norm2_proj.bias), {}
    x, norm1, attn, norm2, mlp = {
        "inner": (pixel, block.norm_in, block.attn_in, block.norm_mlp_in, block.mlp_in),
        "outer": (patch, block.norm_out, block.attn_out, block.norm_mlp, block.mlp),
    }[operation]
    parts = (norm1, attn.qk, attn.v, attn.proj, norm2, mlp.fc1, mlp.fc2)
    return (x, *(t for part in parts for t in (part.weight, part.bias))), dict(num_heads=attn.num_heads)


def activations(operation: str) -> int:
    """How many of an operation's arguments are activations; the others are weights."""
    return 2 if operation == "fold" else 1


def bytes_moved(operation: str, given: tuple, out: torch.Tensor) -> int:
    """Activations read and written once, as the kernels' docstrings count them."""
    return sum(x.numel() * x.element_size() for x in (*given[: activations(operation)], out))


def error(operation: str, given: tuple, others: dict, fused: torch.Tensor) -> measure.Error:
    """Of a result against float64, by the rule of the house."""
    function = getattr(reference, operation)
    exact = function(*(x if x is None else x.double() for x in given), **others)
    return measure.by_rule(fused, exact, function(*given, **others))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", action="store_true", required=True, help="call each kernel and variant once, checked")
    parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels: torch sees no GPU (static costs need none: python -m benchmarks.static_cost)")
    for variant in VARIANTS:
        for operation in kernels.OPERATIONS:
            for dtype in (torch.bfloat16, torch.float32):
                given, others = arguments(variant, operation, 1, dtype, "cuda")
                out = getattr(kernels.OPERATIONS[operation], operation)(*given, **others)
                found = error(operation, given, others, out)
                print(f"{variant} {operation} {dtype}: error {found.error:.3g}, allowed {found.allowed:.3g}")
                if not found.error <= found.allowed:
                    sys.exit(f"{operation} is wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
