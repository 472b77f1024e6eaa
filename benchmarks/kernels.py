"""Time of each fused operation on a GPU, beside eager PyTorch, torch.compile, and the machine's own limits.

    python -m benchmarks.kernels --json FILE        times; a provider whose result is wrong gets none, and the run fails
    python -m benchmarks.kernels --call             one small call of each kernel, for compute-sanitizer

The roofs (a large copy, a large matrix product) are measured in the same run. Providers take turns round by round; inputs are
random and rotate through more memory than the L2 cache has; each row keeps the median and the 20th and 80th percentile.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import triton

import tnt_fast
from tnt_fast import kernels, reference

VARIANTS = {"s": "tnt_fast_s_patch16_224", "b": "tnt_fast_b_patch16_224"}
ROUNDS = 30


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
    pixel = torch.randn(batch * N, S, C, device=device, dtype=dtype)
    if operation == "pixel_embed":
        image = torch.randn(batch, 3, *embed.img_size, device=device, dtype=dtype)
        given = (image, embed.proj.weight, embed.proj.bias, model.pixel_pos)
        return given, dict(patch_size=embed.patch_size, stride=embed.stride, patch_stride=embed.patch_stride)
    if operation == "inner":
        parts = (block.norm_in, block.attn_in.qk, block.attn_in.v, block.attn_in.proj, block.norm_mlp_in)
        weights = [t for part in (*parts, block.mlp_in.fc1, block.mlp_in.fc2) for t in (part.weight, part.bias)]
        return (pixel, *weights), dict(num_heads=block.attn_in.num_heads)
    patch = torch.randn(batch, 1 + N, E, device=device, dtype=dtype)
    norms = (block.norm1_proj.weight, block.norm1_proj.bias, block.proj.weight, block.proj.bias)
    return (pixel, patch, *norms, block.norm2_proj.weight, block.norm2_proj.bias), {}


def bytes_moved(operation: str, given: tuple, out: torch.Tensor) -> int:
    """Activations read and written once, as the kernels' docstrings count them."""
    read = given[:2] if operation == "fold" else given[:1]
    return sum(x.numel() * x.element_size() for x in (*read, out))


def error_and_bound(operation: str, given: tuple, others: dict, fused: torch.Tensor) -> tuple[float, float]:
    """Largest error of a result against float64, and what the rule of the house allows."""
    function = getattr(reference, operation)
    exact = function(*(x if x is None else x.double() for x in given), **others)
    own = (function(*given, **others).double() - exact).abs().max().item()
    error = (fused.double() - exact).abs().max().item()
    return error, 2 * own + 4 * torch.finfo(fused.dtype).eps * exact.abs().max().item()


def interleaved(providers: dict[str, Callable[[int], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of each provider, in turns; a provider takes the number of the round, to rotate its inputs."""
    for function in providers.values():
        for i in range(3):
            function(i)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(rounds):
        for name, function in providers.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function(i)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def summary(times: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(times, n=5)
    return {"ms": round(statistics.median(times), 4), "ms_p20": round(low, 4), "ms_p80": round(high, 4)}


def roofs() -> dict[str, float]:
    """Bytes per second of a large copy (read and written) and FLOP per second of a large bf16 matrix product."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"copy": lambda i: target.copy_(source), "product": lambda i: a @ b})
    copy, product = (statistics.median(times[name]) / 1e3 for name in ("copy", "product"))
    return {"bytes_per_s": 2 * source.numel() * 2 / copy, "flop_per_s": 2 * 8192**3 / product}


def machine() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tnt_fast": tnt_fast.__version__,
        "commit": commit,
    }


def time_operation(variant: str, operation: str, batch: int, roof: dict[str, float], dtype=torch.bfloat16) -> list[dict]:
    """Rows of one operation: eager, compiled, fused; a provider that breaks the rule has "error" instead of a time."""
    sets = [arguments(variant, operation, batch, dtype, "cuda") for _ in range(3)]
    sets = [((torch.randn_like(given[0]), *given[1:]), others) for given, others in sets]
    functions = {
        "eager": getattr(reference, operation),
        "compiled": torch.compile(getattr(reference, operation)),
        "fused": getattr(kernels.OPERATIONS[operation], operation),
    }
    small, others = arguments(variant, operation, 2, dtype, "cuda")
    providers, wrong = {}, {}
    for name, function in functions.items():
        error, bound = error_and_bound(operation, small, others, function(*small, **others))
        if error > bound:
            wrong[name] = f"error {error:.3g}, allowed {bound:.3g}"
        else:
            providers[name] = lambda i, function=function: function(*sets[i % 3][0], **sets[i % 3][1])
    times = interleaved(providers)
    out = getattr(reference, operation)(*sets[0][0], **others)
    moved = bytes_moved(operation, sets[0][0], out)
    rows = []
    for name in functions:
        row = {"operation": operation, "variant": variant, "batch": batch, "dtype": "bf16", "provider": name}
        if name in wrong:
            rows.append(row | {"error": wrong[name]})
            continue
        row |= summary(times[name])
        row["percent_of_copy_roof"] = round(100 * moved / (row["ms"] / 1e3) / roof["bytes_per_s"], 1)
        rows.append(row)
    return rows


def time_pixel_path(variant: str, batch: int, depth: int = 12) -> list[dict]:
    """pixel_embed and depth × (inner, fold): what this project fuses, against the same parts of timm's model, compiled."""
    model = timm.create_model(VARIANTS[variant], depth=depth, device="cuda").to(torch.bfloat16).eval().requires_grad_(False)
    images = [torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def path(image: torch.Tensor, fused: bool) -> torch.Tensor:
        pixel = model.pixel_embed(image, model.pixel_pos, fused=fused)
        patch = model._stem(pixel, fused)
        for block in model.blocks:
            pixel = block.inner(pixel, fused)
            patch = block.fold(pixel, patch, fused)
        return patch

    compiled = torch.compile(path)
    times = interleaved({
        "compiled": lambda i: compiled(images[i % 3], False),
        "fused": lambda i: path(images[i % 3], True),
    }, rounds=15)  # fmt: skip
    row = {"operation": f"pixel_embed + {depth} × (inner + fold)", "variant": variant, "batch": batch, "dtype": "bf16"}
    return [row | {"provider": name} | summary(found) for name, found in times.items()]


def call_each_kernel() -> None:
    """One small call of each kernel and variant, checked: what compute-sanitizer watches."""
    for variant in VARIANTS:
        for operation in kernels.OPERATIONS:
            for dtype in (torch.bfloat16, torch.float32):
                given, others = arguments(variant, operation, 1, dtype, "cuda")
                out = getattr(kernels.OPERATIONS[operation], operation)(*given, **others)
                error, bound = error_and_bound(operation, given, others, out)
                print(f"{variant} {operation} {dtype}: error {error:.3g}, allowed {bound:.3g}")
                if not error <= bound:
                    sys.exit(f"{operation} is wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--call", action="store_true", help="call each kernel once instead of timing it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.kernels: torch sees no GPU; times are taken on one (static costs: python -m benchmarks.static_cost)"
        )
    if args.call:
        call_each_kernel()
        return 0
    report = {"machine": machine(), "roofs": roofs(), "rows": []}
    for variant in VARIANTS:
        for operation in kernels.OPERATIONS:
            report["rows"] += time_operation(variant, operation, args.batch, report["roofs"])
        report["rows"] += time_pixel_path(variant, args.batch)
        if args.json:  # after each variant: an interrupt leaves what was measured
            temporary = args.json.with_suffix(".tmp")
            temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
            os.replace(temporary, args.json)
    for row in report["rows"]:
        print(*(f"{value}" for value in row.values()), sep="\t")
    return 1 if any("error" in row for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
