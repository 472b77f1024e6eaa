"""How wrong simulated times are: kernels whose time on a named GPU is known, ours and others'.

    python -m benchmarks.simulation_checks [--only NAME] [--json benchmarks/results/simulation.json]

Measured rows are ours, on one H200: profiles (kernels-train.txt), sweeps (tune.txt) and library rows of results/2026-11-26-*,
of the kernels as they are now: those of pixel_embed and inner are what ran, norm's have got a division since. Published ones
are FlashAttention-2's, whose machine code is in PyTorch's own library, by the charts of the FlashAttention-3 paper (arXiv
2407.08608, 16k tokens, 2048 channels, bf16, not causal; the backward without its two small kernels), and Liger's LayerNorm
(linkedin/Liger-Kernel, benchmark/data/a100_all_benchmark_data.csv), which `pip install --no-deps liger-kernel` brings: what is
compiled is the version that is there. To those 5 µs of an empty call are added, which the file's smallest rows suggest. What is
not installed is left out, and said.

Left out, too: the sweep of norm's backward (61.6 and 100.2 µs), which seems to time the sum behind it as well: the profile has
52.1, and 9.1 for such a sum; and inner's forward with 168 registers (107.8 µs), which no entry of its table can ask for.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import machine_code, simulate
from benchmarks.dynamic_cost import aligned
from benchmarks.launched import Launched, launched
from benchmarks.static_cost import TARGETS, compile_launch, digest, occupancy, read_nvidia, write_json
from tnt_fast.kernels.operation import Config, Launch

SWEEP = "results/2026-11-26-0640/tune.txt"
PROFILE = "results/2026-11-26-0640/kernels-train.txt"
LIBRARY = "results/2026-11-26-0600/benchmarks.json"
CHARTS = "FlashAttention-3, arXiv 2407.08608, figures 5 and 6"
LIGER = "Liger-Kernel, benchmark/data/a100_all_benchmark_data.csv, version 0.2.1"
EMPTY_CALL_US = 5.0  # in Liger's times: in the same folder 2048 rows of 128 bfloat16 values, 1 MB, take 6.3
PATCHES = 256 * 196


def model() -> str:
    """A digest of the simulation's code: results are of one."""
    return digest(simulate, machine_code)


def timed(found: Launched, gpu: simulate.Gpu, tiles: int, loops: int = 0) -> simulate.Time:
    """The simulated time of a launch; ``tiles``: turns of the main loop in all programs, or ``loops`` of each."""
    target = TARGETS[gpu.target]
    compiled = compile_launch(found, target)
    about = read_nvidia(compiled, target.arch)
    code = machine_code.parts(machine_code.decode(machine_code.disassembly(compiled.asm["cubin"])), loops=found.spec.loops)
    warps = found.options["num_warps"]
    resident, _ = occupancy(gpu.target, warps, about["registers"], compiled.metadata.shared)
    return simulate.simulate(
        code, gpu, warps=warps, resident=resident, grid=found.grid, bytes=found.bytes, tiles=tiles, loops=loops
    )


def _ours(operation: str, variant: str, function: str, which: int = 0) -> Launched:
    every = launched(operation, variant, torch.bfloat16, 132, (9, 0))
    return [found for found in every if found.kernel.__name__ == function][which]


def _configured(operation: str, function: str, key: Any, config: Config, variant: str) -> Launched:
    """A launch with another entry in its file's table."""
    module = importlib.import_module(f"tnt_fast.kernels.{operation}")
    table = module.CONFIGS[function]
    before, table[key] = table[key], config
    module._specialise.forget()
    try:
        return _ours(operation, variant, function)
    finally:
        table[key] = before
        module._specialise.forget()


def measured() -> Iterator[tuple[str, str, float, Callable[[], simulate.Time]]]:
    """Ours: name, source, microseconds on the H200, and what simulates it."""
    h200 = simulate.gpu("h200")
    sweep = {
        (64, 4, 4, 32, 1, "sm80"): 107.3, (32, 2, 8, 16, 1, None): 110.1, (32, 2, 6, 32, 2, None): 110.7,
        (32, 2, 7, 32, 2, None): 114.1, (32, 2, 7, 32, 1, None): 116.4, (64, 4, 3, 32, 1, "sm80"): 117.2,
        (32, 2, 8, 32, 1, None): 105.4,
    }  # fmt: skip
    for config, us in sweep.items():

        def inner(config=config):
            found = _configured("inner", "_inner_fwd_kernel", (32, True), Config(*config), "s")
            return timed(found, h200, PATCHES * 16 // config[0])

        yield f"inner forward, TNT-S, {config}", SWEEP, us, inner
    both = 226.8 + 156.8  # as two launches, one after the other
    yield "inner backward, TNT-S", PROFILE, both, lambda: timed(_ours("inner", "s", "_inner_bwd_kernel"), h200, PATCHES // 2)
    for function, sweeps in (
        ("_pixel_embed_fwd_kernel", {(32, 2, 4, 0, 1, None): 194.0, (64, 4, 4, 0, 1, "sm80"): 240.5}),
        ("_pixel_embed_weight_bwd_kernel", {(32, 2, 4, 0, 1, "sm80"): 213.1, (32, 4, 2, 0, 1, "sm80"): 328.5}),
    ):
        for config, us in sweeps.items():

            def pixels(function=function, config=config):
                rows, warps, per_sm, chunk, stages, arch = config
                found = _configured("pixel_embed", function, True, Config(rows, warps, per_sm, chunk, stages, arch), "s")
                return timed(found, h200, PATCHES * 16 // config[0])

            yield f"{function.strip('_')}, TNT-S, {config}", SWEEP, us, pixels
    norms = (("fold", "_norm_kernel", "forward", 0), ("outer", "_norm_kernel", "forward with rest", 1))
    norms += (("fold", "_norm_add_kernel", "add", 0),)
    times = {"forward": (23.6, 36.2), "forward with rest": (33.0, 51.3), "add": (33.1, 51.2)}
    for operation, function, what, which in norms:
        for variant, us in zip("sb", times[what], strict=True):

            def norm(operation=operation, variant=variant, function=function, which=which):
                found = _ours(operation, variant, function, which)
                return timed(found, h200, PATCHES // max(1, 1024 // (512 if variant == "s" else 1024)))

            yield f"norm {what}, TNT-{variant.upper()}", SWEEP, us, norm
    for which in (0, 1):  # the profile has the mean of both
        yield (
            f"norm backward {which + 1}, TNT-S",
            PROFILE,
            52.1,
            lambda which=which: timed(_ours("fold", "s", "_norm_bwd_kernel", which), h200, PATCHES // 2),
        )
    for heads, us in ((6, 129.8), (10, 204.8)):

        def short(heads=heads):
            return _flash("fwd", 64, h200, 2 * 256 * heads, 1, 4 * 256 * 197 * heads * 128, even=0)

        yield f"FlashAttention-2 forward, 197 tokens, {heads} heads of 64, batch 256", LIBRARY, us, short


FLASH = {
    ("fwd", 64): ("flash_fwd_kernelI23Flash_fwd_kernel_traitsILi64ELi128ELi128ELi4ELb0ELb0E", 4, 2, 0),
    ("fwd", 128): ("flash_fwd_kernelI23Flash_fwd_kernel_traitsILi128ELi128ELi64ELi4ELb0ELb0E", 4, 2, 0),
    ("bwd", 64): ("seqk_parallel_kernelI23Flash_bwd_kernel_traitsILi64ELi128ELi128ELi8ELi4ELi4ELi4ELb0ELb0E", 8, 1, 1),
}
"""FlashAttention-2's kernels: of their names, warps, programs on a multiprocessor, which of their loops is the main one."""


@lru_cache
def _flash_code() -> dict[tuple[str, int, int], machine_code.Parts]:
    """Those of them in bfloat16, without dropout and masks, from PyTorch's library; the last number: whole tiles alone."""
    library, found = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so", {}
    if not library.exists():
        raise FileNotFoundError("PyTorch has no libtorch_cuda.so here")
    with tempfile.TemporaryDirectory() as folder:
        command = [triton.knobs.nvidia.cuobjdump.path, "-arch", "sm_90", "-xelf", "all", str(library)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for file in Path(folder).iterdir():
            code = file.read_bytes()
            file.unlink()
            for (way, width), (name, _, _, loop) in FLASH.items():
                for even in (0, 1):
                    # Is_causal, Is_local (Has_alibi), Is_even_MN, Is_even_K, Is_softcap, Return_softmax
                    flags = f"ELb0ELb0ELb0ELb0ELb{even}ELb1ELb0" + ("ELb0" if way == "fwd" else "")
                    form = rf"_ZN\w*{name}\w*bfloat16_t\w*ES3_E{flags}EEEv\w+".encode()
                    if match := re.search(form, code):
                        text = machine_code.disassembly(code, match[0].decode())
                        found[way, width, even] = machine_code.parts(machine_code.decode(text), loop)
    return found


def _flash(way: str, width: int, gpu: simulate.Gpu, grid: int, loops: int, bytes: float, even: int = 1) -> simulate.Time:
    _, warps, resident, _ = FLASH[way, width]
    code = _flash_code()[way, width, even]
    return simulate.simulate(code, gpu, warps=warps, resident=resident, grid=grid, bytes=bytes, loops=loops)


def _liger_norm(width: int) -> simulate.Time:
    from liger_kernel.ops.layer_norm import _layer_norm_forward_kernel
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(width)
    x, y = (torch.empty(4096, width, device="meta") for _ in range(2))
    weight, bias = (torch.empty(width, device="meta") for _ in range(2))
    mean, rstd = (torch.empty(4096, device="meta") for _ in range(2))
    given = [z for each in (y, x, weight, bias, mean, rstd) for z in (each, each.stride(0))]
    constants, options = {"BLOCK_SIZE": block}, {"num_warps": warps}
    spec = Launch(_layer_norm_forward_kernel, constants, Config(1, warps), 1)
    found = Launched(spec, 4096, (*given, width, 1e-6), options)
    time = timed(found, simulate.gpu("a100"), 0)
    return time._replace(us=time.us + EMPTY_CALL_US)


def published() -> Iterator[tuple[str, str, str, float, Callable[[], simulate.Time]]]:
    """Others': name, GPU, source, microseconds, and what simulates it."""
    tokens, h100 = 16384, simulate.gpu("h100")
    for way, width, tflops in (("fwd", 64, 324), ("fwd", 128, 370), ("bwd", 64, 291)):
        heads = 2048 // width
        work = (4 if way == "fwd" else 10) * tokens**2 * 2048
        tile = 64 if width == 128 else 128  # keys or queries that a turn takes

        def flash(way=way, width=width, heads=heads, tile=tile):
            return _flash(way, width, h100, tokens // 128 * heads, tokens // tile, 8 * tokens * 2048)

        name = f"FlashAttention-2 {'forward' if way == 'fwd' else 'backward'}, heads of {width}, 16k tokens"
        yield name, "h100", CHARTS, work / tflops / 1e6, flash
    for width, us in ((2048, 49.92), (4096, 88.16), (8192, 165.2), (16384, 322.3)):
        yield f"Liger LayerNorm forward, 4096 × {width}, fp32", "a100", LIGER, us, lambda width=width: _liger_norm(width)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation_checks", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="NAME", default="", help="rows whose name has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args(arguments)
    cases = [(name, "h200", source, us, run, "measured") for name, source, us, run in measured()]
    cases += [(name, gpu, source, us, run, "published") for name, gpu, source, us, run in published()]
    rows: list[dict[str, Any]] = []
    for name, gpu, source, us, run, kind in cases:
        if options.only not in name:
            continue
        try:
            time = run()
        except (ImportError, FileNotFoundError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        error = round(100 * (time.us / us - 1), 1)
        rows.append(
            dict(name=name, kind=kind, gpu=gpu, source=source, us=round(us, 1), simulated_us=time.us, error_percent=error)
        )
        rows[-1] |= dict(binds=time.binds, busy=time.busy, waits=time.waits)
        print(name, us, time.us, f"{error:+.1f}%", file=sys.stderr, flush=True)
    lines = [["kernel", "gpu", "is", "µs", "simulated", "error"]]
    lines += [
        [r["name"], r["gpu"], r["kind"], f"{r['us']:.1f}", f"{r['simulated_us']:.1f}", f"{r['error_percent']:+.1f}%"]
        for r in rows
    ]
    print(aligned(lines, 3))
    if options.json:
        write_json(options.json, {"model": model(), "triton": triton.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
