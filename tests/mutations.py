"""Breaks the kernels and asks whether a test would notice.

    python -m tests.mutations --count 300 --seed 0 --targets sm_90 --json mutations.json

A mutant is one change (``mutants``): of one instruction of the PTX that a kernel was compiled to, or of one expression of its
source, which is then compiled. Seed and index determine it. The machine runs it in the place of the kernel, in
calls like those of the kernels' tests (``cases``). A mutant is

- *noticed* by a fault of the machine, or by the rule of the house for an output or a gradient, or because NaN in one patch
  reaches another one; a mutant of the source also by another one of `make test`'s tests that reads the source or interprets it
  (``TESTS``), in a copy of the tree;
- *equivalent* for a reason that holds for all inputs of finite numbers:

  - ``flow.normal`` is the same, so the same instructions store the same values;
  - its source compiles to the same code in all cases;
  - it stores what other threads store, too, or divides in another width, or is never run (``why_the_same``);
  - it has a barrier, a commit or a wait less, or later, the machine sees no race, and neither shared addresses nor branches
    depend on what was loaded. So they depend on the thread, the program and the sizes, and whatever the values are, the same
    accesses come in the same order. A turn differs from another in its stage at most, and one program does all of them here,
    more than there are stages: what had no conflict has none in more turns;
  - what one instruction writes, or one of its operands, is multiplied by a zero of the padding, or not chosen: huge values, of
    both signs, in all places where the mutant differs (and it does) leave every result the same to the bit, in calls of random
    values with tiles that are full, whose masks come of the thread and the sizes. In a result that depends on it they would
    show. A mask that is changed, of nothing but loads, changes what these give. Likewise ±60000 for what a load gives beyond
    its mask, in the source;
  - what an instruction writes is what it wrote before, in every thread and turn of all cases, also with other values of other
    magnitudes in every tensor (``varied``): zeros of the padding, in other places. With tiles that are full, and addresses that
    do not depend on data; not where the change is one of a mask or a guard, which come of the sizes;
  - its source narrows an integer to 32 bits, or does no longer, where intervals.py shows, of both, that no number of which an
    address or a mask is made leaves its bits: then either way these are the same numbers;
  - a number that is made of thread, program and sizes has one value whatever they are, or a comparison one result (sizes and
    counts are not negative, and at most MOST_ROWS; ``ranges``): the correction of a signed division of what is not negative;
    a shift by more than the width;

- *as accurate* where a branch of the source goes the other way, both ways compute the same, and with this one no output and no
  gradient of any case is farther from float64: an exact form for a fast one, which no test of the results may refuse;
- *missed* otherwise, also where what it changes may be too small for the rule.

The same mutant counts once. What is no program (the machine does not know it, the source does not compile) is drawn again. Not
drawn at all: leaving out .ftz, which changes what is smaller than 2^-126 and so below any rule of relative errors; roundings in
half precision (``IN_HALF``).
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does

from cases import (
    by_bits,
    embed_case,
    fold_tensors,
    growing,
    inner_tensors,
    one_by_one,
    outer_tensors,
    shrunk,
    spiked,
    with_fold,
)
from helpers import KernelPath, results, write_json
from mutants import DRAWS, FILES, TREE, Mutant, Program, draw_ptx, draw_source, mutated_tree
from ptx import machine
from ptx.compiler import TARGETS, Compiler, flat
from ptx.executor import Executor, running
from ptx.flow import depends_on_data, normal
from ptx.language import Unknown
from ptx.machine import Fault, Kernel, memory_of

from tnt_fast import kernels, reference

FORWARD = {"_inner_fwd_kernel", "_norm_add_kernel", "_pixel_embed_fwd_kernel"}
VARIED = 6  # draws of other values


# ---- cases ----


class Case(NamedTuple):
    """A call. ``tensors``: float64; ``far``: an axis of those whose values along it lie 2^31 places and more apart."""

    name: str
    operation: str
    precision: str
    tensors: dict[str, Tensor | None]
    others: dict[str, Any]
    gradients: bool | tuple[str, ...] = True  # of all tensors, or of those
    far: dict[str, int] = {}
    spoilt: bool = False  # its pixel 4 is NaN, and then nothing else may be


def cases() -> list[Case]:
    """Each with the first that runs a specialisation followed by others that run it, too, where one case does not show all."""
    torch.manual_seed(0)
    found = []

    def add(precisions: str, name: str, operation: str, tensors: dict, others: dict | None = None, **more) -> None:
        found.extend(Case(name, operation, p, tensors, others or {}, **more) for p in precisions.split())

    every, most = "bfloat16 float16 float32 tf32", "bfloat16 float16 float32"
    heads = dict(num_heads=4)
    outliers, sharp = inner_tensors(6, 16, 24, 96), inner_tensors(7, 16, 24, 96)
    outliers["pixel"][::2, 3, 5] = 300.0
    outliers["pixel"][1::2, 7] *= 50
    sharp["qk_weight"] *= 3
    scales = dict(attn_scale=torch.tensor([0, 2, 1, 0, 1.25, 1, 3]), mlp_scale=torch.tensor([2, 0, 1, 0, 1.25, 3, 1]))
    add(most, "inner S", "inner", inner_tensors(11, 16, 24, 96), heads)
    add(most, "inner S, outliers", "inner", outliers, heads, gradients=False)
    add(most, "inner S, sharp", "inner", sharp, heads)
    add("float32", "inner S, far from 0", "inner", inner_tensors(6, 16, 24, 96, mean=100.0), heads, gradients=False)
    add("bfloat16 float32", "inner S, NaN", "inner", inner_tensors(9, 16, 24, 96), heads, gradients=False, spoilt=True)
    add(most, "inner S9, drop path", "inner", inner_tensors(7, 9, 24, 96, True), heads | scales)
    add("bfloat16 float32", "inner S9, no eps", "inner", inner_tensors(7, 9, 24, 96), heads | dict(eps=0.0))
    add("bfloat16 float32", "inner S9, NaN", "inner", inner_tensors(9, 9, 24, 96), heads, gradients=False, spoilt=True)
    add("bfloat16 float16", "inner B", "inner", inner_tensors(13, 16, 40, 160, True), heads)
    add("bfloat16 float32", "inner Ti", "inner", inner_tensors(13, 16, 12, 48), dict(num_heads=2))
    add("bfloat16", "inner wide", "inner", inner_tensors(5, 4, 96, 384), heads, gradients=False)
    for name, precisions, size, number in (
        ("S", most, (11, 16, 24, 96), 4), ("S9", "bfloat16 float32", (7, 9, 24, 96), 4),
        ("B", "bfloat16 float16", (13, 16, 40, 160), 4), ("Ti", "bfloat16 float32", (13, 16, 12, 48), 2),
        ("wide", "bfloat16", (5, 4, 96, 384), 4),
    ):  # fmt: skip
        wide, others = name == "wide", dict(num_heads=number, eps=1e-6)
        bias = name == "B"
        add(
            precisions, f"inner {name}, one by one", "inner", one_by_one(inner_tensors(*size, bias)), others, gradients=not wide
        )
        steep = inner_tensors(*size, bias)
        steep["qk_weight"] *= 6
        add(precisions.replace("float32", ""), f"inner {name}, saturated", "inner", steep, heads | others, gradients=False)
        spiky = spiked(inner_tensors(*size, bias), 1e6)
        add("bfloat16", f"inner {name}, spiked", "inner", spiky, others, gradients=not wide)
        shifted = inner_tensors(*size, bias)
        shifted["norm2_bias"][5] = 1e6
        add("bfloat16", f"inner {name}, shifted", "inner", shifted, others, gradients=not wide)
    add("bfloat16 float32", "inner S, large eps", "inner", inner_tensors(5, 16, 24, 96), heads | dict(eps=0.5))
    for names in (("pixel",), ("norm1_weight", "v_weight", "fc1_weight")):
        add("bfloat16", f"inner S, gradients of {names[0]}", "inner", inner_tensors(5, 16, 24, 96), heads, gradients=names)
    add("bfloat16", "inner S, a patch", "inner", inner_tensors(1, 16, 24, 96), heads)
    rest = inner_tensors(5, 16, 24, 97)
    rest["fc2_weight"][:, -1] *= 1e6
    add("bfloat16", "inner S, a hidden channel more", "inner", rest, heads)
    lifted = inner_tensors(5, 16, 24, 96)
    lifted["fc1_bias"][5] = 1e6
    add("bfloat16", "inner S, a large bias", "inner", lifted, heads)

    def fold_of(B, N, S, C, E, legacy, **more):
        """Pixels grow along the patch, so that its parts have means of their own, and so do the rows of the second norm."""
        tensors = growing(fold_tensors(B, N, S, C, E, legacy, **more), 2)
        tensors["proj_weight"] += (S * C) ** -0.5
        return tensors

    near = fold_of(2, 35, 16, 24, 384, False)
    near["pixel"] = 1000 + 1e-3 * near["pixel"]
    stem = dict(proj_bias=torch.randn(24, dtype=torch.float64))
    level = fold_of(2, 35, 16, 12, 24, False) | dict(proj_bias=torch.full((24,), 777.7, dtype=torch.float64))
    level["proj_weight"] *= 0
    add(every, "fold S", "fold", fold_of(2, 37, 16, 24, 384, False))  # more rows than a program takes
    add("bfloat16 float32", "fold S, few rows", "fold", fold_of(2, 5, 16, 24, 384, False))
    add("bfloat16 float32", "fold S, NaN", "fold", fold_of(3, 3, 16, 24, 384, False), gradients=False, spoilt=True)
    add("float32", "fold S, nearly constant", "fold", near)
    add("float32", "fold S, far from 0", "fold", fold_of(2, 5, 16, 24, 384, False, mean=1000.0), gradients=False)
    for axis in (0, 1):
        add("bfloat16 float16", f"fold S, axis {axis} far", "fold", fold_of(3, 5, 16, 24, 384, False),
            far=dict(patch=axis, upstream=axis))  # fmt: skip
    add(most, "fold legacy", "fold", fold_of(2, 37, 16, 24, 192, True))
    add("bfloat16 float32", "fold E200", "fold", fold_of(2, 37, 5, 6, 200, False))
    add(most, "fold stem", "fold", fold_of(2, 35, 16, 12, 24, False) | stem)
    add("float32", "fold stem, level", "fold", level)
    for N in (5, 6, 7):  # as many rows more than whole tiles, less 4; of one row there is other code
        add(most, f"fold stem, {N} patches", "fold", fold_of(1, N, 16, 12, 24, False) | stem)
        add(most, f"fold S, {N} patches", "fold", fold_of(1, N, 16, 24, 384, False))
    add("bfloat16 float32", "fold E200, no eps", "fold", fold_of(1, 3, 5, 6, 200, False), dict(eps=0.0))
    add("bfloat16", "fold B", "fold", fold_of(2, 17, 16, 40, 640, False))
    for name, precisions, size, bias in (
        ("S", every, (2, 37, 16, 24, 384), {}), ("E200", "bfloat16 float32", (2, 37, 5, 6, 200), {}),
        ("stem", most, (2, 35, 16, 12, 24), stem), ("B", "bfloat16", (2, 17, 16, 40, 640), {}),
    ):  # fmt: skip
        halves = precisions.replace(" float32", "").replace(" tf32", "")
        large = fold_tensors(*size, False, mean=100.0) | bias
        add(halves, f"fold {name}, large mean", "fold", large, gradients=False)
        add(precisions, f"fold {name}, small", "fold", shrunk(fold_tensors(*size, False)) | bias)
        add(precisions, f"fold {name}, large eps", "fold", fold_of(*size, False) | bias, dict(eps=1e4))
        equal = fold_tensors(*size, False) | bias
        equal["pixel"] = (700 + 100 * torch.randn(len(equal["pixel"]), 1, 1, dtype=torch.float64)).expand_as(equal["pixel"])
        if "float32" in precisions:
            add("float32", f"fold {name}, equal pixels", "fold", equal, gradients=False)
    steep = growing(fold_tensors(2, 37, 16, 24, 192, True), 30)
    add(most, "fold legacy, steep", "fold", steep)
    add(
        "bfloat16 float16",
        "fold legacy, large mean",
        "fold",
        fold_tensors(2, 37, 16, 24, 192, True, mean=100.0),
        gradients=False,
    )

    for names in (("pixel",), ("norm1_weight", "proj_weight"), ("norm2_weight", "norm2_bias", "patch")):
        tensors = fold_of(1, 5, 16, 24, 384, False) | dict(proj_bias=20 + torch.randn(384, dtype=torch.float64))
        add("bfloat16", f"fold S, gradients of {names[0]}", "fold", tensors, gradients=names)
    add(
        "bfloat16",
        "fold S, no second norm",
        "fold",
        fold_of(2, 5, 16, 24, 384, False) | dict(norm2_weight=None, norm2_bias=None),
    )
    outer = dict(num_heads=6)
    drops = dict(attn_scale=torch.tensor([0, 2, 1.25]), mlp_scale=torch.tensor([2, 0, 1]))
    lifted = outer_tensors(3, 7, 384, 48, True)
    lifted["proj_bias"] *= 300  # in the rest, and not in what the MLP reads
    add(most, "outer S", "outer", lifted, outer, gradients=False)
    add("bfloat16 float32", "outer S, drop path", "outer", outer_tensors(3, 7, 384, 48), outer | drops)
    add("float32", "outer S, far from 0", "outer", outer_tensors(2, 5, 384, 48, mean=1000.0), outer, gradients=False)
    add("bfloat16 float32", "outer E90", "outer", outer_tensors(2, 33, 90, 300, True), outer | dict(eps=0.5))
    one = torch.eye(384, dtype=torch.float64)
    for legacy, precisions in ((False, most), (True, "bfloat16")):
        name = f"outer S of a fold{' legacy' * legacy}"
        folded = with_fold(3, 7, 16, 24, 384, 48, legacy, bias=True)
        add(precisions, name, "outer", folded | {"proj_bias": 300 * folded["proj_bias"]}, outer, gradients=False)
        folded = with_fold(3, 1, 16, 24, 384, 48, legacy, bias=True)  # whose result is what the first norm gives, or nearly so
        folded |= {x: 0.02 * folded[x] for x in ("patch", "proj_bias", "fc2_weight", "fc2_bias")}
        add(precisions, f"{name}, of one", "outer", folded | dict(v_weight=one, proj_weight=one), outer, gradients=False)
    small = outer_tensors(3, 1, 384, 384, True, mean=0.0, scale=0.02)
    small |= {x: 0.02 * small[x] for x in ("proj_bias", "fc2_bias")}
    add(most, "outer S, of one", "outer", small | dict(v_weight=one, proj_weight=one, fc2_weight=0.02 * one), outer,
        gradients=False)  # fmt: skip
    folded = with_fold(3, 5, 5, 6, 90, 50, False)
    add("bfloat16 float32", "outer E90 of a fold", "outer", folded, outer | drops | dict(eps=0.5), gradients=False)
    folded |= dict(fold_proj_bias=torch.randn(90, dtype=torch.float64))
    names = ("patch", "pixel", "qk_weight", "norm1_weight", "norm1_bias")
    names += ("fold_norm2_weight", "fold_norm2_bias", "fold_proj_bias", "fold_proj_weight")
    add("bfloat16 float32", "outer E90 of a fold, gradients", "outer", folded, outer, gradients=names)
    without = dict.fromkeys(("proj_bias", "fc2_bias", "norm1_bias", "norm2_bias"))
    add("bfloat16", "outer S, no biases", "outer", outer_tensors(2, 5, 384, 48) | without, outer)

    # below: values that decide, and rows that have their turn at every place of a tile
    more = one_by_one(inner_tensors(5, 16, 24, 97))
    add("bfloat16", "inner S, a hidden channel more, one by one", "inner", more, heads)
    for name, precisions, size, bias in (
        ("S", every, (3, 4, 16, 24, 384), {}), ("legacy", most, (5, 4, 16, 24, 192), {}),
        ("E200", "bfloat16 float32", (5, 4, 5, 6, 200), {}), ("stem", most, (33, 4, 16, 12, 24), stem),
    ):  # fmt: skip
        add(precisions, f"fold {name}, class tokens at all rows", "fold", fold_of(*size, name == "legacy") | bias)
    add(most, "fold stem, 37 patches", "fold", fold_of(1, 37, 16, 12, 24, False) | stem)
    for E, M, precisions in ((384, 384, most), (90, 90, "bfloat16 float32")):
        rows, itself = by_bits(9, E), torch.eye(E, dtype=torch.float64)
        tensors = outer_tensors(9, 1, E, M, True) | dict(patch=0.02 * rows[:, None], fc1_weight=itself, fc2_weight=itself)
        tensors |= {x: 0.02 * tensors[x] for x in ("proj_weight", "proj_bias", "fc2_bias", "v_weight")}
        add(precisions, f"outer E{E}, by bits", "outer", tensors, dict(num_heads=6), gradients=False)
    folded = with_fold(9, 1, 5, 6, 90, 50, False)
    folded |= {x: 0.02 * folded[x] for x in ("fold_norm2_weight", "fold_norm2_bias", "proj_bias", "fc2_bias", "fc2_weight")}
    itself, signs = torch.eye(90, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
    folded |= dict(patch=0.02 * by_bits(9, 90)[:, None] * signs, qk_weight=2 * itself.repeat(2, 1))  # each sees itself
    folded |= dict(v_weight=itself, proj_weight=itself)
    add("bfloat16 float32", "outer E90 of a fold, by bits", "outer", folded, outer | dict(eps=0.5), gradients=False)

    tensors, others = embed_case(2, 4, 32, 16, 40, (16, 16), 4, (16, 16), False)
    add("bfloat16 float32", "embed B, 4 channels", "pixel_embed", tensors, others)  # more than a program's sums take
    without = tensors | dict(bias=None, pixel_pos=None)
    add("bfloat16", "embed B, no bias", "pixel_embed", without, others, gradients=("weight",))

    for legacy in (False, True):
        name = " legacy" * legacy
        add(every if not legacy else most, f"embed S{name}", "pixel_embed",
            *embed_case(2, 3, 32, 48, 24, (16, 16), 4, (16, 16), legacy))  # fmt: skip
        for axis in (0, 1, 2, 3):
            add("bfloat16 float16" if axis == 0 else "float16", f"embed S{name}, axis {axis} far", "pixel_embed",
                *embed_case(3, 3, 32, 48, 24, (16, 16), 4, (16, 16), legacy), far=dict(image=axis))  # fmt: skip
        add("bfloat16 float32", f"embed overlap{name}", "pixel_embed",
            *embed_case(3, 1, 40, 24, 40, (16, 16), 4, (8, 8), legacy))  # fmt: skip
        add("bfloat16 float16", f"embed S{name}, ragged", "pixel_embed",
            *embed_case(3, 3, 16, 48, 24, (16, 16), 4, (16, 16), legacy))  # fmt: skip

    # of specialisations that few cases run: whole tiles, other rows at every place of one, biases that decide
    drops = dict.fromkeys(("attn_scale", "mlp_scale"), torch.ones(9, dtype=torch.float64))
    more = with_fold(9, 2, 5, 6, 90, 50, False)
    more |= {x: folded[x] for x in more if x not in ("pixel", "patch")}
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    more |= dict(patch=0.02 * by_bits(27, 90).view(9, 3, 90) * signs)
    add("bfloat16 float32", "outer E90 of a fold, by bits, drop path", "outer", more, outer | drops | dict(eps=0.5),
        gradients=False)  # fmt: skip
    add("bfloat16 float32", "fold E200, no eps, whole tiles", "fold", fold_of(1, 37, 5, 6, 200, False), dict(eps=0.0))
    for name, size, others in (
        ("S9, drop path", (7, 9, 24, 96, True), heads | scales),
        ("S, a hidden channel more", (5, 16, 24, 97), heads),
    ):
        tensors = inner_tensors(*size)
        large = torch.rand(tensors["fc1_bias"].shape) < 0.5  # which of neighbours, is random
        tensors["fc1_bias"] = tensors["fc1_bias"] * torch.where(large, 1e6, 1.0)
        add("bfloat16", f"inner {name}, large biases", "inner", tensors, others)
    return found


class Launches(Executor):
    """Runs a launch once: what it wrote is written again where the same code gets the same bits.

    ``replaced``: kernels by the digest of the code whose place they take. ``seen``: of all launches, digest and kernel.
    ``varied``: those run beside them instead, on other values; ``finite``: how often what they wrote was.
    """

    memory: dict[tuple, list[tuple[int, Tensor]]] = {}
    built: dict[str, tuple[str, Kernel]] = {}
    full: set[str] = set()  # digests of the code that was given a whole tile at least

    def __init__(self, target: str, **more):
        super().__init__(target, error=1, **more)
        self.replaced: dict[str, Kernel] = {}
        self.seen: dict[str, Kernel] = {}
        self.varied, self.finite = False, 0

    def launch(self, spec: Any, grid: int, arguments: tuple, options: dict) -> None:
        compiled = self.compile(spec.kernel, arguments, spec.constants, options)
        if compiled.key not in self.built:
            code = Kernel(compiled.ptx, compiled.shared, compiled.name)
            text = repr((compiled.name, [[ins.text for ins in block] for block in code.code.blocks]))  # no paths, no lines
            self.built[compiled.key] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), code
        digest, code = self.built[compiled.key]
        self.seen[digest] = code
        names = spec.kernel.arg_names
        Z, counts = spec.constants["Z"], [x for name, x in zip(names, arguments, strict=False) if name.startswith("n_")]
        if not counts or counts[0] >= (Z.G if hasattr(Z, "G") else Z.BLOCK):
            self.full.add(digest)
        given = [flat(arguments)[i] for i in compiled.parameters]
        storages = {x.untyped_storage().data_ptr(): memory_of(x) for x in given if isinstance(x, Tensor)}
        far = any(x.numel() >= 2**28 for x in storages.values())
        with torch.no_grad():
            if far or digest in self.replaced and not self.varied:
                self.replaced.get(digest, code).run(grid, given, self.error)
                return
            if digest in self.replaced:
                self._vary(self.replaced[digest], grid, given, list(storages.values()))
            number = {address: i for i, address in enumerate(storages)}
            key = [digest, grid, *(hashlib.blake2b(x.numpy()).digest() for x in storages.values())]
            for x in given:
                key.append((number[x.untyped_storage().data_ptr()], x.shape, x.stride()) if isinstance(x, Tensor) else x)
            key = tuple(key)
            if key in self.memory:
                for i, x in self.memory[key]:
                    list(storages.values())[i].copy_(x)
                return
            before = [x.clone() for x in storages.values()]
            code.run(grid, given, self.error)
            after = enumerate(zip(before, storages.values(), strict=True))
            self.memory[key] = [(i, new.clone()) for i, (old, new) in after if not torch.equal(old, new)]

    def _vary(self, kernel: Kernel, grid: int, given: list, storages: list[Tensor]) -> None:
        """Run a kernel with other values, each tensor's of a magnitude of its own; then everything is as it was."""
        before, dice = [x.clone() for x in storages], random.Random(grid)
        for _ in range(VARIED):
            numbers = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
            for x in numbers:
                x.copy_(torch.randn(x.shape) * 2.0 ** dice.choice((-12, -4, 0, 0, 4, 12)))
            kernel.run(grid, given, self.error)
            self.finite += all(x.isfinite().all() for x in numbers)
            for x, old in zip(storages, before, strict=True):
                x.copy_(old)


class Judge:
    """The cases of a target, with what the unchanged kernels and the reference make of them."""

    def __init__(self, target: str, names: set[str] | None = None):
        self.target = target
        self.cases = [c for c in cases() if names is None or f"{c.name}, {c.precision}" in names]
        self.expected: dict[int, tuple[dict, dict]] = {}  # of a case, the reference in its dtype and in float64
        self.made: dict[int, dict[str, Tensor]] = {}  # of the cases of the last verdict
        self.unchanged: list[dict[str, Tensor]] = []  # of every case, what the unchanged kernels make of it
        self.launched: list[list[str]] = []  # of every case, digests
        self.kernels: dict[str, Kernel] = {}  # by digest
        self.users: dict[str, list[int]] = {}  # of a digest, the cases that launch it
        self._programs: dict[str, Program] = {}
        for number in range(len(self.cases)):
            executor = Launches(target)
            self.unchanged.append(self.examine(number, executor))
            self.launched.append(list(executor.seen))
            for digest, kernel in executor.seen.items():
                self.kernels[digest] = kernel
                self.users.setdefault(digest, []).append(number)

    def call(self, case: Case, function: Callable, dtype: torch.dtype, kind: torch.dtype, gradients) -> dict[str, Tensor]:
        """Output and gradients of a function in ``kind``, of values that are rounded to ``dtype``."""
        far = case.far if kind == dtype else {}
        return results(function, case.tensors, case.others, dtype, kind, gradients=gradients, far=far)

    def examine(self, number: int, executor: Launches, gradients: bool = True) -> dict[str, Tensor]:
        """Output and gradients.

        Raises:
            AssertionError: a result breaks the rule. Fault: the machine's.
        """
        case = self.cases[number]
        path = KernelPath(self.target, case.precision)
        dtype = torch.float32 if path.tf32 else getattr(torch, case.precision)
        fused, plain = kernels.OPERATIONS[case.operation], getattr(reference, case.operation)
        gradients = gradients and case.gradients
        torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody wrote is NaN
        torch.backends.cuda.matmul.allow_tf32 = path.tf32
        try:
            if number not in self.expected:
                with path.as_reference() if path.tf32 else nullcontext():
                    same = self.call(case, plain, dtype, dtype, case.gradients)
                self.expected[number] = same, self.call(case, plain, dtype, torch.float64, case.gradients)
            with running(executor):
                found = self.call(case, fused, dtype, dtype, gradients)
                if case.spoilt:
                    spoilt = case.tensors["pixel"].clone()
                    spoilt[4, 1, 2] = float("nan")
                    bad = self.call(case._replace(tensors=case.tensors | {"pixel": spoilt}), fused, dtype, dtype, False)
                    _contained(case, found["output"], bad["output"])
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cuda.matmul.allow_tf32 = False
        same, exact = self.expected[number]
        for name, x in found.items():
            path.rule(f"{case.operation}, {name}", x, same[name], exact[name], dtype)
        return found

    def same_bits(self) -> bool:
        """Whether all of ``made`` is what the unchanged kernels make."""
        return all(torch.equal(x, self.unchanged[n][name]) for n, found in self.made.items() for name, x in found.items())

    def no_less_accurate(self) -> bool:
        """Whether no error of all of ``made`` is larger than that of the unchanged kernels."""

        def error(number: int, name: str, x: Tensor) -> float:
            return (x.double() - self.expected[number][1][name]).abs().max().item()

        return all(
            error(n, name, x) <= error(n, name, self.unchanged[n][name])
            for n, found in self.made.items()
            for name, x in found.items()
        )

    def changes_nothing(self, numbers: list[int], executor: Launches, gradients: bool = True) -> bool:
        """Whether all results are the same to the bit."""
        for number in numbers:
            try:
                found = self.examine(number, executor, gradients)
            except (Fault, AssertionError):
                return False
            if not all(torch.equal(x, self.unchanged[number][name]) for name, x in found.items()):
                return False
        return True

    def never_differs(self, digest: str, probe: Kernel, numbers: list[int], gradients: bool) -> bool:
        """Whether ``probe``, which faults where a mutant writes another value, does not, whatever the tensors hold."""
        executor = Launches(self.target)
        executor.replaced, executor.varied = {digest: probe}, True
        for number in numbers:
            try:
                self.examine(number, executor, gradients)
            except Fault:
                return False
        return executor.finite >= VARIED // 2

    def program(self, digest: str) -> "Program":
        if digest not in self._programs:
            self._programs[digest] = Program(self.kernels[digest])
        return self._programs[digest]

    def verdict(self, numbers: list[int], executor: Launches, gradients: bool = True) -> str | None:
        """What notices, or None; what the cases made is in ``made`` then."""
        self.made = {}
        for number in numbers:
            case = self.cases[number]
            try:
                self.made[number] = self.examine(number, executor, gradients)
            except Fault as fault:
                return f"fault in {case.name}, {case.precision}: {fault}"
            except AssertionError as error:
                return f"rule in {case.name}, {case.precision}: {error}"
        return None


def _contained(case: Case, clean: Tensor, bad: Tensor) -> None:
    where = (4,) if case.operation == "inner" else (1, 2)
    assert bad[where].isnan().any(), "NaN is gone"
    bad = bad.clone()
    bad[where] = clean[where]
    assert torch.equal(bad, clean), "NaN of one patch reaches another"


# ---- judging ----


ORDER = {"barrier dropped", "barrier later", "wait weakened"}


def judge_ptx(judge: Judge, mutant: Mutant) -> tuple[str, str]:
    """(verdict, why)"""
    executor = Launches(judge.target)
    executor.replaced = {mutant.digest: mutant.code}
    users, gradients = judge.users[mutant.digest], mutant.kernel not in FORWARD
    before, machine.ENDLESS = machine.ENDLESS, 60 * len(mutant.code.code.blocks) + 1000
    try:
        noticed = judge.verdict(users, executor, gradients)
        if noticed:
            return "noticed", noticed
        same = judge.same_bits()
        if normal(mutant.code) == normal(judge.kernels[mutant.digest]):
            return "equivalent", "the same values are stored by the same instructions"
        if mutant.reason:
            return "equivalent", mutant.reason
        if mutant.kind in ORDER and depends_on_data(mutant.code) is None:
            executor.multiprocessors = 1
            if judge.verdict(users, executor, gradients) is None:
                return "equivalent", "no race in any turn, and neither shared addresses nor branches depend on data"
        whole = mutant.digest in executor.full  # a tile: in rows that are not there all is zero
        for group in mutant.others if same and whole and depends_on_data(mutant.code, branches=False) is None else ():
            unchanged = []  # the first has to fault: it does differ
            for kernel in group:
                executor.replaced = {mutant.digest: kernel}
                unchanged.append(judge.changes_nothing(users, executor, gradients))
                if unchanged[-1] != bool(unchanged[:-1]):
                    break
            else:
                return "equivalent", "what it changes is multiplied by zero or not chosen: huge values there change no bit"
        probe = mutant.probe if same and whole and depends_on_data(mutant.code, branches=False) is None else None
        if probe and judge.never_differs(mutant.digest, probe, users, gradients):
            return "equivalent", "it writes what it wrote before, in all cases and with tensors of other values and magnitudes"
    finally:
        machine.ENDLESS = before
    return "missed", "all cases give the same bits" if same else "all cases keep the rule"


class Stillborn(Exception):
    """A mutant that does not compile, or to what the machine does not know."""


class Run(NamedTuple):
    """What a source tree made of the cases: what noticed, or whether it compiles to the same code, gives the same bits, and is
    no less accurate."""

    noticed: str | None = None
    same_code: bool = True
    same_bits: bool = True
    no_less_accurate: bool = True


def _run(judge: Judge, tree: Path, numbers: list[int]) -> Run:
    """
    Raises:
        Stillborn
    """
    found = Run()
    before, machine.ENDLESS = machine.ENDLESS, 20_000
    compiler = Compiler(tree, quiet=True)
    try:
        for number in numbers:
            executor = Launches(judge.target)
            executor.compiler = compiler
            if noticed := judge.verdict([number], executor):
                return Run(noticed)
            was = judge.launched[number]
            same = len(was) == len(executor.seen) and all(
                a == b or normal(judge.kernels[a]) == normal(executor.seen[b]) for a, b in zip(was, executor.seen, strict=True)
            )
            accurate = found.no_less_accurate and judge.no_less_accurate()
            found = Run(None, found.same_code and same, found.same_bits and judge.same_bits(), accurate)
    except (RuntimeError, Unknown) as error:
        raise Stillborn(str(error).strip().splitlines()[-1]) from None
    finally:
        compiler.close()
        machine.ENDLESS = before
    return found


# Of `make test`, what else reads the kernels of a file, or interprets them.
TESTS = {
    "inner": "test_inner or nearly_constant",
    "norm": "test_fold or test_outer or nearly_constant",
    "pixel_embed": "test_pixel_embed",
    "totals": "test_totals",
}
TESTED = ("pixel_embed", "fold", "inner", "outer", "short_attention", "totals", "kernels")
TEST_FILES = [f"tests/test_{name}.py" for name in TESTED]
LIMIT_S = 180  # of a run of tests


def _tests(mutant: Mutant, tree: Path) -> str | None:
    """The first of those tests that fails in a mutated tree."""
    shutil.copytree(TREE / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TREE / "pyproject.toml", tree)
    chosen = TESTS.get(mutant.code.file.removesuffix(".py"), " or ".join(TESTS[x] for x in ("inner", "norm")))
    runs = [["tests/test_approximations.py"]] if mutant.code.file in ("tile.py", "inner.py") else []
    if mutant.kind == "source: cast dropped":
        runs.append(["tests/test_addresses.py", "-k", "TestShipped"])
    runs.append([*TEST_FILES, "--paths", "interpreter", "-k", chosen])
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    for run in runs:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *run]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
            if done.returncode:
                failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
                return f"tests in {failed[1] if failed else run[0]}"
    return None


def judge_source(judge: Judge, mutant: Mutant) -> tuple[str, str]:
    """(verdict, why)

    Raises:
        Stillborn
    """
    edit = mutant.code
    operations = [name for name, file in FILES.items() if file == edit.file] or ["inner", "fold", "outer"]
    numbers = [n for n, c in enumerate(judge.cases) if c.operation in operations]
    far = mutant.kind == "source: cast dropped"
    numbers.sort(key=lambda n: (bool(judge.cases[n].far) != far, judge.cases[n].precision not in WIDEST, n))
    with tempfile.TemporaryDirectory() as folder:
        tree = mutated_tree(edit, Path(folder) / "mutant")
        found = _run(judge, tree, numbers)
        if found.noticed:
            return "noticed", found.noticed
        if found.same_code:
            return "equivalent", "compiles to the same code in all cases"
        if noticed := _tests(mutant, tree):
            return "noticed", noticed
        if mutant.kind == "source: other changed" and found.same_bits:
            trees = [mutated_tree(edit._replace(new=x), Path(folder) / x) for x in ("6e4", "-6e4")]
            if all(run.same_bits and not run.noticed for run in (_run(judge, x, numbers) for x in trees)):
                return "equivalent", "what lies beyond the mask reaches no result: ±60000 there change no bit"
    if found.same_bits and (TREE / "kernels" / edit.file).read_bytes()[edit.start : edit.end].endswith(b".to(tl.int32)"):
        return "equivalent", "no number of which an address or a mask is made leaves 32 bits (intervals.py)"
    if mutant.kind == "source: branch forced" and found.no_less_accurate:
        return "as accurate", "both ways compute the same, and with this one no result of any case is farther from float64"
    return "missed", "all cases give the same bits" if found.same_bits else "all cases keep the rule"


# ---- many of them ----


VERDICTS = ("noticed", "equivalent", "as accurate", "missed", "error")  # error: of this program
ENOUGH = 0.95  # of those that change what the kernels do
WIDEST = ("bfloat16", "float32")  # the code of them differs most: the first that a source mutant meets
EVERY = 5  # every so-many-th mutant is one of the source
_judges: dict[str, Judge] = {}


def examine(seed: int, target: str, index: int) -> dict[str, Any]:
    """What is reported of one mutant."""
    if target not in _judges:
        _judges[target] = Judge(target)
    judge, source = _judges[target], index % EVERY == EVERY - 1
    for attempt in range(DRAWS):
        mutant = draw_source(seed, index, attempt) if source else draw_ptx(judge, seed, index)
        with suppress(Stillborn):
            verdict, why = judge_source(judge, mutant) if source else judge_ptx(judge, mutant)
            break
    else:
        raise LookupError(f"mutant {index}: {DRAWS} of {DRAWS} draws do not compile")
    users = [] if source else [f"{judge.cases[n].name}, {judge.cases[n].precision}" for n in judge.users[mutant.digest]]
    return dict(
        index=index, target=target, kind=mutant.kind, kernel=mutant.kernel, where=mutant.where, text=mutant.text,
        verdict=verdict, why=why, cases=users,
    )  # fmt: skip


def _start() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends these


def _examine(work: tuple[int, str, int]) -> dict[str, Any]:
    try:
        return examine(*work)
    except Exception as error:
        row = dict.fromkeys(("kind", "kernel", "where", "text"), "?") | {"cases": []}
        return row | dict(index=work[2], target=work[1], verdict="error", why=f"{type(error).__name__}: {error}")


def run(seed: int, count: int, targets: list[str], processes: int) -> Iterator[dict[str, Any]]:
    """Different mutants as they come: where one is drawn again, another one comes after the last."""
    seen: dict[tuple, int] = {}
    with multiprocessing.get_context("spawn").Pool(processes, _start) as pool:  # forked, torch's threads are lost
        following = 0
        while missing := count - len(seen):
            work = [(seed, targets[i % len(targets)], i) for i in range(following, following + missing)]
            following += missing
            for row in pool.imap(_examine, work):  # in their order, so that it is always the same ones that count
                which = tuple(row[x] for x in ("target", "kind", "kernel", "where", "text")) + tuple(row["cases"])
                if row["verdict"] == "error" or which not in seen:
                    seen[which if row["verdict"] != "error" else (row["index"],)] = row["index"]
                    yield row


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    def share(rows: list[dict[str, Any]]) -> dict[str, Any]:
        counts = Counter(row["verdict"] for row in rows)
        changing = counts["noticed"] + counts["missed"]
        every = changing + counts["as accurate"]
        return {v: counts[v] for v in VERDICTS} | {
            "share_noticed": round(counts["noticed"] / changing, 4) if changing else None,
            "share_noticed_of_all": round(counts["noticed"] / every, 4) if every else None,
        }

    def by(key: str) -> dict[str, Any]:
        return {value: share([r for r in found if r[key] == value]) for value in sorted({r[key] for r in found})}

    listed = {v: sorted((r for r in found if r["verdict"] == v), key=lambda r: r["index"]) for v in VERDICTS}
    return share(found) | {
        "by_kind": by("kind"),
        "by_kernel": by("kernel"),
        "noticed_by": dict(Counter(r["why"].split(" in ")[0] for r in listed["noticed"])),
        "missed_mutants": listed["missed"],
        "as_accurate_mutants": listed["as accurate"],
        "equivalent_mutants": listed["equivalent"],
        "errors": listed["error"],
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':34}{'noticed':>9}{'equivalent':>12}{'as accurate':>13}{'missed':>8}{'share':>8}"]
    for name, row in [*result["by_kind"].items(), *result["by_kernel"].items(), ("all", result)]:
        share = "" if row["share_noticed"] is None else f"{row['share_noticed']:.1%}"
        lines.append(f"{name:34}{row['noticed']:9}{row['equivalent']:12}{row['as accurate']:13}{row['missed']:8}{share:>8}")
    return "\n".join(lines)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def target_list(text: str) -> list[str]:
    if wrong := set(text.split(",")) - set(TARGETS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: unknown; accepted: {', '.join(TARGETS)}")
    return text.split(",")


def main(arguments: list[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Break the kernels; would a test notice?")
    parser.add_argument("--count", type=positive, default=300, help="mutants (%(default)s), a fifth of them of the source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", type=target_list, default=["sm_90"], help="by commas, in turn (sm_90)")
    parser.add_argument("--processes", type=positive, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--mutant", type=int, metavar="INDEX", help="one of them, in this process, told in full")
    args = parser.parse_args(arguments)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: no folder {args.json.parent}")
    if args.mutant is not None:
        print(json.dumps(examine(args.seed, args.targets[args.mutant % len(args.targets)], args.mutant), indent=1))
        return 0
    found, began, stopped = [], time.monotonic(), False
    results = run(args.seed, args.count, args.targets, args.processes)
    try:
        for one in tqdm(results, total=args.count, unit="mutant", disable=None):
            found.append(one)
            if one["verdict"] == "missed":
                tqdm.write(f"missed {one['index']}: {one['kind']}, {one['kernel']}, {one['where']}: {one['text'][:150]}")
    except KeyboardInterrupt:
        stopped = True
        results.close()
    result = {"seed": args.seed, "count": len(found), "asked": args.count, "targets": args.targets} | summary(found)
    result["seconds"] = round(time.monotonic() - began)
    print(table(result))
    if args.json:
        write_json(args.json, result)
    return 130 if stopped else int(bool(result["errors"]) or (result["share_noticed"] or 0) < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
