"""What the compiled kernels execute for one patch: their PTX, run on the CPU and counted; needs no GPU.

    python -m benchmarks.dynamic_cost --kernel fold --variant s --dtype bf16 --target sm_90 [--all]

lists the accesses to memory that wait for banks or touch more sectors than they fill, by line of the source (--all: every one).

An operation of a named variant goes forward and backward at 64 patches an image, once with two images and once with three, on
as many programs, by what is launched for many: the difference, over 64, is what a patch costs, whatever the loops.
Instructions are those of PTX, a warp's each; copies between registers, which the assembler leaves out, are not counted. ptxas
makes other instructions of them, so the static counts, of machine code, differ; what is executed, and how memory is accessed,
it leaves as it is.

- ``instructions``: by kind. ``bytes`` of global memory that were asked for, ``sectors`` of 32 bytes that were touched for them.
- ``wavefronts``: turns that shared memory needs for the accesses; ``conflicts``: those of them that equal banks make necessary.
"""

import argparse
import re
import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.launched import VARIANTS, arguments, calls
from benchmarks.measure import DTYPES
from tnt_fast import kernels as shipped
from tnt_fast import reference
from tnt_fast.kernels import gelu, product

IMAGE, PATCHES = 128, 64
KINDS = {
    "matrix": r"(wg)?mma",
    "special": r"ex2|tanh|rcp|rsqrt|sqrt|lg2|sin|cos",
    "shuffle": r"shfl|redux",
    "shared": r"(ld|st)\.shared|(ld|st)matrix",
    "global": r"(ld|st)\.global|cp\.async\.c[ag]",
    "sync": r"bar|cp\.async\.(commit|wait)\w*|fence|membar",
    "convert": r"cvt|prmt",
    "float": r"\w+\..*\b(f32|f64|f16|bf16|f16x2|bf16x2|f32x2)",
    "move": r"mov",
}


def kind(parts: tuple[str, ...]) -> str:
    """The first of ``KINDS`` that an instruction is, else "other"."""
    name = ".".join(parts)
    return next((kind for kind, form in KINDS.items() if re.match(rf"({form})(\.|$)", name)), "other")


def _count(costs: list[Any]) -> Counter:
    total = Counter()
    for cost in costs:
        total[kind(cost.instruction.parts)] += cost.warps
        total += Counter(wavefronts=cost.wavefronts, conflicts=cost.wavefronts - cost.least, sectors=cost.sectors)
        total["bytes"] += cost.bytes
    return total


def _launched(kernel: str, variant: str, dtype: str, target: str, images: int) -> list[Any]:
    """The launches of an operation, forward and backward, counted."""
    from tests.ptx.executor import Executor, running  # a checkout's, not a part of the package

    given = arguments(kernel, variant, DTYPES[dtype], images, IMAGE, "cpu")
    executor = Executor(target, count=True)
    with running(executor), mock.patch.object(product, "MOST", 0), mock.patch.object(gelu, "LEAST", 0):
        for each, recorded in calls(kernel, given):
            with torch.set_grad_enabled(recorded):
                out = shipped.OPERATIONS[kernel](**reference.in_records(each))
            if recorded:
                leaves = [x for x in each.values() if isinstance(x, Tensor) and x.requires_grad]
                results = out if isinstance(out, tuple) else (out,)
                torch.autograd.grad(results, leaves, [*map(torch.randn_like, results)])
    return executor.launched


def costs(kernel: str, variant: str, dtype: str, target: str) -> list[dict[str, Any]]:
    """What each launch of an operation, forward and backward, executes for one patch.

    One entry a launch: its ``function`` and ``constants``, as in ``Launch``, and the counts that the module's text names.
    """
    found = [
        [(launch, _count(launch.costs)) for launch in _launched(kernel, variant, dtype, target, images)] for images in (2, 3)
    ]
    rows = []
    for (launch, one), (_, two) in zip(*found, strict=True):
        each = {name: round((two[name] - one[name]) / PATCHES, 2) for name in two}
        instructions = {name: each.get(name, 0.0) for name in (*KINDS, "other") if name != "move"}
        memory = {name: each.get(name, 0.0) for name in ("wavefronts", "conflicts", "sectors", "bytes")}
        row = {"function": launch.name, "constants": launch.constants, "instructions": round(sum(instructions.values()), 1)}
        rows.append(row | {"instructions_by_kind": instructions} | memory)
    return rows


def accesses(launch: Any, every: bool = False) -> list[list[str]]:
    """By line and instruction: how many there are, warps, turns of banks and the least, sectors touched and filled."""
    found: dict[tuple[str, str], Counter] = {}
    for cost in launch.costs:
        if cost.wavefronts > cost.least or 32 * cost.sectors > cost.bytes or (every and cost.wavefronts + cost.sectors):
            total = found.setdefault((cost.instruction.where, ".".join(cost.instruction.parts)), Counter())
            total.update(instructions=1, warps=cost.warps, turns=cost.wavefronts, least=cost.least)
            total.update(sectors=cost.sectors, filled=-(-cost.bytes // 32))
    return [[*name, *map(str, total.values())] for name, total in found.items()]


def aligned(lines: list[list[str]], words: int) -> str:
    """Plain text, columns aligned; the first so many are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    from tests.ptx.compiler import TARGETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=list(shipped.OPERATIONS), default="inner")
    parser.add_argument("--variant", choices=VARIANTS, default="s")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--all", action="store_true", help="every access, not only those that could be cheaper")
    options = parser.parse_args(arguments)
    for launch in _launched(options.kernel, options.variant, options.dtype, options.target, 2):
        rows = accesses(launch, options.all)
        print(f"{launch.name}: {'' if rows else 'no '}accesses{'' if options.all else ' that could be cheaper'}")
        if rows:
            print(aligned([["line", "access", "instructions", "warps", "turns", "least", "sectors", "filled"], *rows], 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
