"""Multiply-adds and bytes of every model, counted by PyTorch on the meta device, and equal to the paper's closed forms.

Bytes are what every kernel call reads and writes once (float16, batch 1): of eager PyTorch one call an ATen operation, of a
fused operation one call. Multiply-adds are those of matrix products, attention's included; fvcore's figures for ViT (4.608 G
for DeiT-S) count 5 more for each element of a LayerNorm, given beside. Also here: what the compiled kernels cost, statically.
"""

import json
import math
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.test_models import CONVNETS, DEITS, TNTS, bare, fuse, steps
from tnt_fast import flops, kernels

PUBLISHED = {"tnt_ti": 1.4, "tnt_s": 5.2, "tnt_b": 14.1, "deit_ti": 1.3, "deit_s": 4.6, "deit_b": 17.6}  # G, as in TNT, Table 3
PUBLISHED |= {"cnn_resnet50": 4.1, "cnn_regnety_4g": 4.0}
DEIT_WIDTH = {"deit_ti": 192, "deit_s": 384, "deit_b": 768}
DEPTH, N, S, CLASSES = 12, 196, 16, 1000


def closed_form(family: str) -> int:
    """The paper's formulas (Eq. 14, 15), with class token, stem and head, which it leaves out of them."""
    if family in CONVNETS:
        return of_layers(family)
    if family in DEITS:
        width = DEIT_WIDTH[family]
        return N * 3 * 16 * 16 * width + DEPTH * flops.standard_block(N + 1, width) + CLASSES * width
    arguments = TNTS[family]
    C, E = arguments["inner_dim"], arguments["embed_dim"]
    folded = N * S * C * E
    inner = len(arguments.get("inner_blocks", range(DEPTH)))
    block = N * flops.standard_block(S, C) + folded
    return N * S * C * 3 * 49 + folded + inner * block + DEPTH * flops.standard_block(N + 1, E) + CLASSES * E


def of_layers(family: str) -> int:
    """Of a CNN: weights times positions, over its convolutions and linear layers."""
    found = []

    def add(layer: torch.nn.Module, given: tuple, out: torch.Tensor) -> None:
        found.append(layer.weight.numel() * math.prod(out.shape[2:]))

    model = bare(family).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(add)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(found)


class Bytes(TorchDispatchMode):
    """Sums what every operation reads and writes; views move nothing."""

    moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and "_unsafe_view" not in str(function):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return out


def _of_norm(shape, *others, **more) -> int:
    return 2 * 5 * math.prod(shape)


def count(family: str, path: str) -> dict[str, int]:
    """Of one image: "macs", "macs_with_norms" and "bytes". ``path``: a step of the waterfall; "fused" is the last."""
    model = fuse(bare(family).half().eval(), (steps()[-1] if path == "fused" else path).split("+")[1:])
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # or 8% of DeiT's work goes uncounted on some devices
    image = torch.empty(1, 3, 224, 224, device="meta", dtype=torch.float16)
    with torch.no_grad(), patch.object(torch, "is_autocast_enabled", lambda *_: False):  # which does not know this device
        with FlopCounterMode(display=False) as products:
            model(image)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.native_layer_norm: _of_norm}) as all_of_it:
            model(image)
        with Bytes() as seen:
            model(image)
    found = {"macs": products.get_total_flops() // 2, "bytes": seen.moved}
    return found | ({"macs_with_norms": all_of_it.get_total_flops() // 2} if path == "eager" else {})


ROWS = [
    (family, path)
    for family in (*TNTS, *DEITS, *CONVNETS)
    for path in ("eager", *(steps()[1:] if family in ("tnt_s", "tnt_b") else ()), "fused")
    if path == "eager" or (family in TNTS and path != steps()[-1])
]


@pytest.mark.parametrize(("family", "path"), ROWS, ids=[f"{family}/{path}" for family, path in ROWS])
def test_flops(benchmark, family, path):
    if path != "eager" and not kernels.OPERATIONS:
        pytest.skip("Triton is not installed; no fused path to count")
    benchmark.group = "counted on the meta device; these times say nothing"
    found = benchmark.pedantic(count, (family, path))
    assert found["macs"] == closed_form(family), (
        f"{family}, {path}: counted {found['macs']}, the closed form says {closed_form(family)}"
    )
    assert abs(found["macs"] / 1e9 - PUBLISHED.get(family, found["macs"] / 1e9)) < 0.06  # they are rounded to a tenth
    parameters = sum(p.numel() for p in bare(family).parameters())
    benchmark.extra_info.update(suite="flops", id=f"{family}/{path}", model=family, path=path, parameters=parameters)
    benchmark.extra_info.update(found, flop_per_byte=round(2 * found["macs"] / found["bytes"], 1))


def test_static_cost(benchmark, tmp_path):
    """Registers, spills and instructions of the kernels of TNT-S in bf16 for sm_90, compiled ahead of time."""
    if not kernels.HAS_TRITON:
        pytest.skip("Triton is not installed; no kernels to compile")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    chosen = ["--variant", "s", "--dtype", "bf16", "--target", "sm_90", "--json", str(tmp_path / "cost.json")]
    command = [sys.executable, "-m", "benchmarks.static_cost", *chosen]
    benchmark.group = "compiled ahead of time; this time says nothing"
    done = benchmark.pedantic(subprocess.run, (command,), dict(env=environment, capture_output=True, text=True, timeout=400))
    if "No such file" in done.stderr:
        pytest.skip(f"Triton's disassembler is not at hand: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    keys = ("kernel", "function", "registers", "stack_bytes", "occupancy_warps", "warp_instructions_per_patch")
    rows = [{key: row[key] for key in keys} for row in json.loads((tmp_path / "cost.json").read_text())]
    benchmark.extra_info.update(suite="static_cost", id="static_cost/s/bf16/sm_90", rows=rows)
