"""``tnt-fast bench``: TNT against ViT on the user's own machine, in about a minute. The long form is in ``benchmarks/``."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import tnt_fast
from tnt_fast import flops, variants  # noqa: F401  registers the names that PAIRS has
from tnt_fast.dispatch import why_not_fused

PAIRS = {
    "ti": ("tnt_fast_ti_patch16_224", "deit_tiny_patch16_224"),
    "s": ("tnt_fast_s_patch16_224", "deit_small_patch16_224"),
    "b": ("tnt_fast_b_patch16_224", "deit_base_patch16_224"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def models(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """tnt_fast's TNT, on the fused path if that is possible here, its copy for inference, timm's TNT with the same weights,
    timm's ViT of that size."""
    ours = cast(tnt_fast.TNT, timm.create_model(PAIRS[size][0], backend="reference")).eval()
    blocks = dict(depth=len(ours.blocks), num_heads_inner=ours.sizes()["H"])
    theirs = timm.models.tnt.TNT(
        embed_dim=ours.embed_dim, inner_dim=ours.sizes()["C"], num_heads_outer=ours.embed_dim // 64, **blocks
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    vit = timm.create_model(PAIRS[size][1], depth=len(ours.blocks)).eval()
    found: dict[str, nn.Module] = {"TNT, tnt_fast": ours, "TNT, timm": theirs, "ViT, timm": vit}
    found = {name: model.to(device, dtype) for name, model in found.items()}
    ours.backend = "auto"
    ours.backend = "reference" if why_not_fused(ours, _images(1, device, dtype)) else "fused"
    return {"TNT, tnt_fast": ours, "TNT, optimized": tnt_fast.optimize_for_inference(ours), **found}


def _images(batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)


def agrees(call: Callable[..., Tensor], reference: nn.Module, images: Tensor, slack: float) -> bool:
    """Whether the first and the last result keep the rule of the kernels' tests, times ``slack``:
    max|x − ref64| <= 2 · max|reference − ref64| + 4 · eps · max|ref64|."""
    ends = images[[0, -1]]
    found, own = call(images)[[0, -1]].double(), reference(ends).double()
    exact = copy.deepcopy(reference).double()(ends.double())
    bound = 2 * (own - exact).abs().max() + 4 * torch.finfo(images.dtype).eps * exact.abs().max()
    return bool((found - exact).abs().max() <= slack * bound)


@torch.no_grad()
def bench(size: str, device: str, dtype: str, batch: int, seconds: float, compiled: bool = False) -> list[dict[str, Any]]:
    """Rows of the table: the models take turns for so many seconds; Ctrl-C ends that early.

    Args:
        size: of PAIRS. device, dtype: of weights and images. batch: images a call. compiled: through torch.compile.

    Raises:
        RuntimeError: a result breaks the rule (four times the rule, where others wrote or compiled the model); or the batch
            does not fit into memory.
    """
    from tqdm import tqdm

    where, kind = torch.device(device), DTYPES[dtype]
    with tqdm(total=round(seconds), leave=False, bar_format="{desc:24s} {bar} {n:.0f} of {total} s") as bar:
        bar.set_description_str("build the models")
        chosen = models(size, where, kind)
        ours: Any = chosen["TNT, tnt_fast"]
        images: list[Tensor] = []
        calls = {name: torch.compile(model) if compiled else model for name, model in chosen.items()}
        times: dict[str, list[float]] = {name: [] for name in chosen}
        peaks: dict[str, float] = {}
        try:
            images = [_images(batch, where, kind) for _ in range(3)]
            for name, call in calls.items():
                bar.set_description_str(f"{'compile' if compiled else 'warm up'} {name}")
                of_ours = name in ("TNT, tnt_fast", "TNT, optimized")
                plain: Any = copy.deepcopy(ours if of_ours else chosen[name])
                if of_ours:
                    plain.backend = "reference"
                if not agrees(call, plain, images[0], 1.0 if of_ours and not compiled else 4.0):
                    raise RuntimeError(f"{name}: the result does not match the reference in float64; it is not timed")
                del plain
                peaks |= _peak(name, call, images[1])
            bar.set_description_str("measure")
            begun, i = time.perf_counter(), 0
            while i < 3 or time.perf_counter() - begun < seconds:
                for name, call in calls.items():
                    times[name].append(_seconds(call, images[i % 3]))
                i += 1
                bar.n = min(time.perf_counter() - begun, bar.total)
                bar.refresh()
        except KeyboardInterrupt:
            if not all(times.values()):
                raise
        except RuntimeError as error:  # PyTorch has a class of its own for a GPU's memory, and none for the CPU's
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            raise RuntimeError(f"batch {batch} does not fit into the memory: {error}; take a smaller --batch-size") from error
    rows = []
    for name, model in chosen.items():
        path = f" ({model.backend})" if model is ours else ""
        median = statistics.median(times[name])
        row = {"model": name + path, "img_s": batch / median, "ms": median * 1e3, "rounds": len(times[name])}
        counted = ours if name == "TNT, optimized" else model
        rows.append(row | {"gmacs": flops.multiply_adds(counted, (3, 224, 224)) / 1e9, "peak_mib": peaks.get(name)})
    ours.backend = "auto"
    rows[0]["why_not_fused"] = why_not_fused(ours, images[0])
    return rows


def _peak(name: str, call: Callable[..., Tensor], image: Tensor) -> dict[str, float]:
    """MiB of a call above what was allocated before it; nothing without a GPU."""
    if not image.is_cuda:
        return {}
    before = torch.cuda.memory_allocated(image.device)
    torch.cuda.reset_peak_memory_stats(image.device)
    call(image)
    return {name: (torch.cuda.max_memory_allocated(image.device) - before) / 2**20}


def _seconds(call: Callable[..., Tensor], image: Tensor) -> float:
    start = time.perf_counter()
    call(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    vit = rows[-1]["img_s"]
    memory = any(row["peak_mib"] is not None for row in rows)
    lines = [f"{'model':28s} {'img/s':>10s} {'ms':>10s} {'of ViT':>8s} {'GMACs':>8s}" + f" {'peak MiB':>10s}" * memory]
    for row in rows:
        numbers = f"{row['img_s']:10.1f} {row['ms']:10.2f} {row['img_s'] / vit:7.2f}x {row['gmacs']:8.3f}"
        peak = "" if row["peak_mib"] is None else f" {row['peak_mib']:10.0f}"
        lines.append(f"{row['model']:28s} {numbers}{peak}")
    return "\n".join(lines)
