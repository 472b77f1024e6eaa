"""The operations' arguments, their bytes, and one small call of each kernel for compute-sanitizer.

python -m benchmarks.kernels --call
"""

import argparse
import sys

import timm
import torch

from benchmarks import measure
from tnt_fast import kernels, reference
from tnt_fast.tnt import transformer_arguments

VARIANTS = {"s": "tnt_fast_s_patch16_224", "b": "tnt_fast_b_patch16_224"}


def arguments(variant: str, operation: str, batch: int, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Random arguments of an operation, with a block's own (perturbed) weights: its tensors by name, and the others."""
    torch.manual_seed(0)
    model = timm.create_model(VARIANTS[variant], depth=1, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model = model.to(dtype).requires_grad_(False)
    block, sizes, shapes = model.blocks[0], model.sizes(), {}
    if operation == "pixel_embed":
        shapes["image"] = (batch, 3, *model.pixel_embed.img_size)
    if operation in ("inner", "fold", "block"):
        shapes["pixel"] = (batch * sizes["N"], sizes["S"], sizes["C"])
    if operation in ("fold", "outer", "block"):
        shapes["patch"] = (batch, 1 + sizes["N"], sizes["E"])
    outer = transformer_arguments(block.norm_out, block.attn_out, block.norm_mlp, block.mlp)
    whole = {"outer": outer, "block": block.block_arguments(outer)}
    given = (model.fused_arguments() | block.fused_arguments() | whole)[operation]
    given = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()} | reference.by_name(given)
    others = {name: x for name, x in given.items() if x is not None and not isinstance(x, torch.Tensor)}
    return {name: x for name, x in given.items() if name not in others}, others


def call(function, given: dict, others: dict) -> torch.Tensor:
    """The result; several as one, the values of one behind those of the other."""
    found = function(**reference.in_records(given | others))
    return found if isinstance(found, torch.Tensor) else torch.cat([x.flatten() for x in found])


def activations(operation: str) -> int:
    """How many of an operation's arguments are activations, which come first; the others are weights."""
    return 2 if operation in ("fold", "block") else 1


def bytes_moved(operation: str, given: dict, out: torch.Tensor) -> int:
    """Activations read and written once, as the kernels' docstrings count them."""
    return sum(x.numel() * x.element_size() for x in (*list(given.values())[: activations(operation)], out))


def error(operation: str, given: dict, others: dict, fused: torch.Tensor) -> measure.Error:
    """Of a result against float64, by the rule of the house."""
    function = getattr(reference, operation)
    exact = call(function, {name: x if x is None else x.double() for name, x in given.items()}, others)
    return measure.by_rule(fused, exact, call(function, given, others))


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
                out = call(kernels.OPERATIONS[operation], given, others)
                found = error(operation, given, others, out)
                print(f"{variant} {operation} {dtype}: error {found.error:.3g}, allowed {found.allowed:.3g}")
                if not found.error <= found.allowed:
                    sys.exit(f"{operation} is wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
