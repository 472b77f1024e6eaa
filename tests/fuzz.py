"""A seeded fuzzer: the fused operations and the fused model against the reference, by the one rule of the house.

    python -m tests.fuzz --count 10000 --processes 4 --json fuzz.json
    python -m tests.fuzz --seed 0 --case inner:123              (one of them again, told in full)

Seed, kind and index determine a case: ``pixel_embed``, ``inner``, ``fold``, ``outer`` are calls of an operation, ``model``
whole models, ``surgery`` models that somebody did something to. Every tensor, and whatever the operations allocate, lies inside
of NaN that has to be the same bits afterwards. Without a GPU Triton's interpreter runs the kernels, and never in bfloat16.

A case is *right*; or a *named error* of an operation for one of ``RESTRICTIONS``; or a *reason* of dispatch; or the *reference
raises too*. Anything else is wrong: another answer, a NaN of its own, an answer where the reference has none, a bare exception,
a write outside, a process that dies, a case that does not end.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy
import timm
import triton
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does

from helpers import ExactSoftmax
from interpreter import hasten

from tnt_fast import TNT, attention, kernels, reference, why_not_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    hasten()
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
KINDS = {"pixel_embed": 4, "inner": 7, "fold": 5, "outer": 3, "model": 1, "surgery": 4}
LIMIT_S = 120.0  # seconds for a case; the slowest takes a tenth of that on a busy machine
VERDICTS = ("right", "named error", "reason", "reference raises too", "wrong")

# What an operation may refuse by name although the reference takes it. A case that has none of these has to be computed.
RESTRICTIONS = {
    "dtype": "the kernels take float32, float16 and bfloat16, one dtype a call, and float32 weights beside half activations",
    "size": "`unsupported` names the sizes that fit on the chip",
    "window": "pixel_embed is a 7×7 convolution with patches that its stride divides and that cover the image",
    "shape": "the reference broadcasts what has a shape of its own; an operation takes the documented shapes only",
    "absent": "inner takes None for qk_bias and v_bias together, and for the scales",
}


DRAWS = (1, 2, 3, 4)  # of what rounds alike; one alone may be lucky


class Wrong(Exception):
    """A finding: the message says what."""


# ---- tensors inside of NaN ----


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


class Guard:
    """Tensors in larger buffers of NaN; ``check`` says which was written to. As a context, also what ``torch.empty`` gives."""

    def __init__(self):
        self.inputs: list[tuple[str, Tensor, Tensor]] = []
        self.allocated: list[tuple[Tensor, int, int]] = []

    def place(self, name: str, value: Tensor, dtype: torch.dtype, strides: list[int], band: int, expanded: list[int]) -> Tensor:
        """A tensor of these values and strides, ``band`` NaNs before and after it; along ``expanded`` its stride is 0."""
        for d in expanded:
            value = value.narrow(d, 0, 1)
        size = sum((n - 1) * s for n, s in zip(value.shape, strides, strict=True)) + 1 if value.numel() else 0
        storage = torch.full((size + 2 * band,), math.nan, dtype=dtype)
        storage.as_strided(value.shape, strides, band).copy_(value)
        storage = storage.to(DEVICE)
        self.inputs.append((name, storage, storage.clone()))
        return storage.as_strided(value.shape, strides, band)

    def __enter__(self) -> None:
        # a mode of torch does not see what is called inside of a custom operation
        self.originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}
        for name, function in self.originals.items():
            setattr(torch, name, partial(self._allocate, function))

    def __exit__(self, *exception) -> None:
        for name, function in self.originals.items():
            setattr(torch, name, function)

    def _allocate(self, function: Callable[..., Tensor], *args, **kwargs) -> Tensor:
        x = function(*args, **kwargs)
        if not x.is_floating_point() or not x.is_contiguous() or x.is_meta:
            return x
        band = 64
        storage = torch.full((x.numel() + 2 * band,), math.nan, dtype=x.dtype, device=x.device)
        self.allocated.append((storage, band, x.numel()))
        return storage.as_strided(x.shape, x.stride(), band)

    def check(self) -> None:
        for name, storage, before in self.inputs:
            if not torch.equal(bits(storage), bits(before)):
                raise Wrong(f"{name}, or the memory around it, was written to")
        for storage, band, size in self.allocated:
            if not (storage[:band].isnan().all() and storage[band + size :].isnan().all()):
                raise Wrong(f"written outside of an allocated tensor of {size} values")


# ---- the rule ----


def compare(name: str, fused: Tensor, own: list[Tensor], exact: Tensor, dtype: torch.dtype, terms: int = 0) -> None:
    """Raise Wrong unless max|fused − exact| <= 2·max|own − exact| + 4·eps·max|exact|, where these are finite.

    Where the exact value is not finite, the fused one has to be none either. Where PyTorch's own (any of ``own``) is not, or
    where the exact value is so near the end of the dtype that an allowed error reaches it, both are right. ``terms``: of a sum
    in one float32 accumulator, rounded as often; the errors add as the root. PyTorch on the CPU sums in short blocks.
    """
    if fused.shape != exact.shape:
        raise Wrong(f"{name} has shape {tuple(fused.shape)}, the reference's has {tuple(exact.shape)}")
    fused, exact, own = fused.detach().double().cpu(), exact.detach().double().cpu(), [x.detach().double().cpu() for x in own]
    finite = exact.isfinite()
    if fused.isfinite()[~finite].any():
        raise Wrong(f"{name} is finite in places where the reference is not")
    for x in own:
        finite &= x.isfinite()
    if not finite.any():
        return
    fused, exact = fused[finite], exact[finite]
    largest = exact.abs().max().item()
    error_of_own = max([(x[finite] - exact).abs().max().item() for x in own], default=0.0)
    allowed = terms**0.5 * torch.finfo(torch.float32).eps / 2 * largest
    allowed += 2 * error_of_own + 4 * torch.finfo(dtype).eps * largest + torch.finfo(dtype).smallest_normal
    overflows = exact.abs() + allowed >= torch.finfo(dtype).max
    if not (fused.isfinite() | overflows).all():
        count = (~(fused.isfinite() | overflows)).sum().item()
        raise Wrong(f"{name}: {count} of {fused.numel()} values are not finite where the reference's are")
    error = torch.where(fused.isfinite(), (fused - exact).abs(), 0.0).max().item()
    if error > allowed:
        raise Wrong(
            f"{name}: error {error:.3g} of {largest:.3g}, PyTorch's own {error_of_own:.3g}, allowed {allowed:.3g} "
            f"({error / allowed:.1f} × the rule)"
        )


class RoundedSoftmax(torch.autograd.Function):
    """An exact softmax whose gradient, P·(dP − ΣP·dP), sees dP rounded to a dtype and the sum, the mean of dP, to float32.

    Where the two cancel, because all pixels are alike or one P is 1, PyTorch's own error may be 0 by luck. This is what has to
    be rounded by anybody, and no more: in half precision, too, PyTorch sums in float32, and the mean is not off by half's eps.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, dtype: torch.dtype) -> Tensor:
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(p)
        ctx.eps = torch.finfo(dtype).eps
        return p

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        noise = torch.rand(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
        gradient = gradient * (1 + ctx.eps * noise.to(gradient))
        mean = (p * gradient).sum(-1, keepdim=True) * (1 + torch.finfo(torch.float32).eps)  # alike rows are off alike
        return p * (gradient - mean), None


@contextmanager
def rounded_softmax(dtype: torch.dtype) -> Iterator[None]:
    Tensor.softmax = lambda scores, dim: RoundedSoftmax.apply(scores, dtype)
    try:
        yield
    finally:
        del Tensor.softmax  # of TensorBase, which is as it was


@contextmanager
def fused_attention() -> Iterator[None]:
    """The reference with PyTorch's fused attention: PyTorch's own error is that of its kernels, too.

    Outer takes them on a GPU in half precision, and a module that is called beside kernels takes them in float32, too. Their
    backwards have P = exp(score − logsumexp), off by eps·|logsumexp|, and gradient·out for ΣP·dP, off by a rounding of ``out``.
    Where the errors of a softmax cancel, of large scores or of values that are alike, these do not.
    """

    def as_heads(qk: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        return qk.unflatten(-1, (2, num_heads, -1)).unbind(2)

    def attend(heads: tuple[Tensor, ...], v: Tensor) -> Tensor:
        q, k = heads
        return attention.attend(q, k, v.view(q.shape)).flatten(2)

    right = reference.attention_weights, reference.attend
    reference.attention_weights, reference.attend = as_heads, attend  # type: ignore[assignment]
    try:
        yield
    finally:
        reference.attention_weights, reference.attend = right


def off_by_rounding(x: Tensor, dtype: torch.dtype, draw: int, beside: float = 0.0) -> Tensor:
    """A weight, or what flows back, off by eps, up or down: two roundings, as the terms of a sum of products have them.

    ``beside``: the largest value that it is added to, and rounded with.

    Of a few values, or where large terms cancel, PyTorch's own error may be small by luck; the largest of several ``DRAWS`` is
    what is due to the terms. Activations are as exact as given.
    """
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(draw)) * 2 - 1
    off = torch.finfo(dtype).eps * signs.to(x.device)
    return (x.double() * (1 + off) + beside / 2 * off).to(x.dtype)


# ---- operations ----


@dataclass
class Call:
    """A call of an operation. ``restrictions``: for which of ``RESTRICTIONS`` it may be refused. ``about``: what is unusual."""

    operation: str
    tensors: dict[str, Tensor | None]
    others: dict[str, Any]
    wanted: list[str]
    guard: Guard
    upstream: Callable[[torch.Size, torch.dtype], Tensor]
    autocast: tuple[bool, bool] = (False, False)  # around the forward, around the backward
    half: torch.dtype = torch.float16
    restrictions: set[str] = field(default_factory=set)
    about: list[str] = field(default_factory=list)

    def describe(self) -> str:
        lines = [f"{self.operation}: {', '.join(self.about) or 'plain'}", f"  {self.others}, gradients of {self.wanted}"]
        for name, x in self.tensors.items():
            if not isinstance(x, Tensor):
                lines.append(f"  {name}: {x}")
            else:
                lines.append(
                    f"  {name}: {tuple(x.shape)} strides {x.stride()} {x.dtype}, to {x.abs().max() if x.numel() else 0:.4g}"
                )
        return "\n".join(lines)

    @property
    def activation(self) -> Tensor:
        return next(iter(self.tensors.values()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return self.half if self.autocast[0] else self.activation.dtype

    def compute(
        self,
        function: Callable[..., Tensor],
        dtype: torch.dtype | None = None,
        fused: bool = False,
        draw: int = 0,
        recomputed: bool = False,
    ) -> dict[str, Tensor]:
        """Output and gradients; ``dtype``: of all tensors, exact or cast before (None: their own); ``draw``: of rounding.

        ``recomputed``: the weights are not rounded to half before, as in the gradients that PyTorch computes for the kernels.
        """

        def on(where: int):
            on = self.autocast[where] and dtype is None and (fused or where == 0)
            return torch.autocast(DEVICE, self.half) if on else nullcontext()

        given, largest = {}, 0.0
        if draw and self.operation in ("inner", "outer"):  # whose biases are added onto the pixels or patches with all else
            finite = self.activation.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
            largest = finite.max().item() if finite.numel() else 0.0
        for i, (name, x) in enumerate(self.tensors.items()):
            if isinstance(x, Tensor):
                x = x.detach()
                if dtype not in (None, torch.float64) and (i == 0 or name == "patch" or not recomputed):
                    x = x.to(self.dtype)  # what is in half is of half's values
                x = x if dtype is None else x.to(dtype, copy=True)
                if draw and i > 0 and name != "patch":
                    x = off_by_rounding(x, self.dtype, draw, largest if name in ("proj_bias", "fc2_bias") else 0.0)
                x.requires_grad_(name in self.wanted)
            given[name] = x
        with on(0):
            out = function(**reference.in_records(given | self.others))
        found = {"output": out}
        leaves = {name: given[name] for name in self.wanted}
        if leaves:
            upstream = self.upstream(out.shape, out.dtype)
            upstream = off_by_rounding(upstream, self.dtype, draw) if draw else upstream
            with on(1):
                gradients = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
            for (name, x), g in zip(leaves.items(), gradients, strict=True):
                found[f"gradient of {name}"] = torch.zeros_like(x) if g is None else g
                passed = name == kernels.OPERATIONS[self.operation].passes  # it is upstream itself
                whole = g is None or g.is_contiguous() or passed
                if fused and g is not None and (g.dtype != x.dtype or g.shape != x.shape or not whole):
                    raise Wrong(f"gradient of {name} is {g.dtype} {tuple(g.shape)} with strides {g.stride()}")
        return found

    def own(self) -> list[dict[str, Tensor]]:
        """PyTorch in the same dtype. Under autocast also with what comes in cast before, as the operations do it (in a model it
        comes from a half-precision operation). In float32, too, as the gradients are that PyTorch computes."""
        function = getattr(reference, self.operation)
        casts = [None] + [self.half] * self.autocast[0] + [torch.float32] * (self.dtype in HALVES)
        found = [self.compute(function, cast, draw=draw) for draw in (0, *DRAWS) for cast in casts]
        found += [self.compute(function, cast, recomputed=True) for cast in casts if cast == torch.float32]
        if self.operation == "outer" and self.dtype in HALVES and DEVICE == "cuda":
            with fused_attention():
                found += [self.compute(function, cast) for cast in casts if cast != torch.float32]
        with rounded_softmax(self.dtype):
            return [*found, *(self.compute(function, torch.float64, draw=draw) for draw in DRAWS)]

    def judge(self) -> str:
        own, refusal = None, None
        try:
            own = self.own()
        except Exception as error:  # whatever it is, the fused operation must not answer
            refusal = error
        operation = kernels.OPERATIONS[self.operation]
        try:
            with self.guard:
                fused = self.compute(operation, fused=True)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            self.guard.check()
            text = str(error)
            if refusal is None and not self.restrictions:
                raise Wrong(f"refuses what the reference computes: {type(error).__name__}: {text}") from error
            if not text.startswith(f"{self.operation}: ") and f"{self.operation}()" not in text:  # torch.library's own
                raise Wrong(f"an error without the operation's name: {type(error).__name__}: {text}") from error
            return "named error" if refusal is None else "reference raises too"
        self.guard.check()
        if refusal is not None:
            mixed = self.autocast[0] or self.restrictions == {"dtype"}  # of which PyTorch takes some on a GPU only
            if not mixed or not self._halves_beside_float32():
                raise Wrong(f"answers where the reference raises {type(refusal).__name__}: {refusal}")
            own = [self.compute(getattr(reference, self.operation), self.dtype)]
        if not self.autocast[0] and fused["output"].dtype != own[0]["output"].dtype:
            raise Wrong(f"output is {fused['output'].dtype}, the reference's {own[0]['output'].dtype}")
        with ExactSoftmax():
            exact = self.compute(getattr(reference, self.operation), torch.float64)
        for name, x in exact.items():
            terms = self.tensors["weight"][0].numel() if name == "output" and self.operation == "pixel_embed" else 0
            compare(name, fused[name], [same[name] for same in own], x, self.dtype, terms)
        return "right"

    def _halves_beside_float32(self) -> bool:
        """What `RESTRICTIONS["dtype"]` documents as taken, whether autocast is on or not."""
        dtypes = {x.dtype for x in self.tensors.values() if isinstance(x, Tensor)}
        return self.dtype in HALVES and dtypes <= {self.dtype, torch.float32}


class Dice:
    """Everything random of a case, and the tensors drawn so far."""

    def __init__(self, seed: int, kind: str, index: int):
        self.random = random.Random(f"{seed}:{kind}:{index}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        torch.manual_seed(self.random.getrandbits(60))  # what new modules draw
        self.guard = Guard()

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def upto(self, most: int) -> int:
        """1 to ``most``, small ones more often."""
        return self.pick(
            self.random.randint(1, most), self.random.randint(1, min(most, 8)), self.random.randint(1, min(most, 24))
        )

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator) * scale + mean

    def place(self, name: str, value: Tensor, dtype: torch.dtype, calm: bool = False, expand: bool = True) -> Tensor:
        """With random strides, or (``calm``) contiguous ones; ``expand``: also strides of 0."""
        order, strides, expanded = list(range(value.ndim)), [0] * value.ndim, []
        if not calm and self.chance(0.3):
            self.random.shuffle(order)
        if not calm and value.ndim == 4 and self.chance(0.3):
            order = [0, 2, 3, 1]
        step = 1
        for d in reversed(order):
            step *= 1 if calm or self.chance(0.8) else self.pick(2, 3)
            strides[d] = step
            step *= max(1, value.shape[d])
            if expand and not calm and value.shape[d] and self.chance(0.05):
                expanded.append(d)
        x = self.guard.place(name, value, dtype, strides, self.random.randint(16, 99), expanded)
        return x.expand(value.shape)


def pixel_embed_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    stride, legacy, restrictions = dice.pick(1, 2, 3, 4, 4, 8), dice.chance(0.4), set()
    per_side = max(1, min(8, 24 // stride))
    patch = [stride * dice.random.randint(1, per_side) for _ in "hw"]
    step = [p if dice.chance(0.6) else stride * dice.random.randint(1, p // stride) for p in patch]
    sides = [p + s * dice.pick(0, 0, 1, 2) for p, s in zip(patch, step, strict=True)]
    if dice.chance(0.05):
        sides[1] += 1
        restrictions.add("window")
    B, channels, C = dice.pick(0, 1, 1, 2, 3), dice.pick(1, 2, 3, 3, 4, 8), dice.upto(96 if dice.chance(0.2) else 24)
    while B * sides[0] * sides[1] * channels > 2500 and (B > 1 or channels > 1):
        B, channels = max(1, B - 1), max(1, channels - 1)
    window = 7
    if dice.chance(0.03):
        window = dice.pick(1, 3, 5)
        restrictions.add("window")
    tensors = dict(
        image=dice.normal(B, channels, *sides, mean=0.3),
        weight=dice.normal(C, channels, window, window, scale=(49 * channels) ** -0.5),
        bias=dice.normal(C), pixel_pos=dice.normal(1, C, patch[0] // stride, patch[1] // stride),
    )  # fmt: skip
    others = dict(patch_size=tuple(patch), stride=stride, patch_stride=tuple(step), legacy=legacy)
    return tensors, others, restrictions, dict(channels=channels, C=C, kernel=window)


def interpreted_turns(image: Tensor, others: dict[str, Any]) -> float:
    """How often the loop of the image's gradient runs; in the interpreter each turn takes about 10 ms."""
    patch, stride, step = (others[name] for name in ("patch_size", "stride", "patch_stride"))
    if DEVICE == "cuda" or not isinstance(image, Tensor) or image.ndim != 4 or not isinstance(patch, tuple):
        return 0
    if stride < 1 or min(step) < 1:
        return 0
    over = math.prod([-(-p // s) for p, s in zip(patch, step, strict=False)])
    return image[:, :1].numel() / stride**2 / 32 * (3 // stride + (stride + 2) // stride + 1) ** 2 * over


def inner_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    S = dice.random.randint(1, 64) if dice.chance(0.15) else dice.pick(1, 2, 3, 4, 5, 7, 9, 12, 15, 16, 16, 16)
    C = dice.upto(96 if dice.chance(0.15) else 40)
    heads = dice.pick(*[h for h in range(1, C + 1) if C % h == 0 and C // h <= 32 and h <= 12] or [C])
    M, P = dice.pick(4 * C, dice.upto(2 * C), C), dice.pick(0, 1, 2, 3, 5, 9)
    if S * C > 800:
        P = min(P, 3)
    return transformer_values(dice, dict(pixel=dice.normal(P, S, C, mean=0.5)), M, heads, dict(C=C, H=heads, S=S, M=M))


def outer_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    heads = dice.pick(1, 2, 3, 4, 6)
    E = heads * dice.random.randint(1, 32 if dice.chance(0.2) else 12)
    M, B, T = dice.pick(4 * E, dice.upto(2 * E), E), dice.pick(0, 1, 2, 3), dice.pick(1, 2, 5, 17, dice.upto(200))
    values = transformer_values(dice, dict(patch=dice.normal(B, T, E, mean=0.5)), M, heads, dict(C=E, E=E, H=heads))
    if T > 1 and dice.chance(0.5):
        S, C, legacy = dice.pick(1, 3, 4, 9, 16), dice.random.randint(3, 24), dice.chance(0.4)
        width = C if legacy else S * C
        values[0].update(
            pixel=dice.normal(B * (T - 1), S, C, mean=0.5), fold_norm1_weight=dice.normal(width, scale=0.3, mean=1),
            fold_norm1_bias=dice.normal(width, scale=0.3), fold_proj_weight=dice.normal(E, S * C, scale=(S * C) ** -0.5),
            fold_proj_bias=dice.normal(E) if dice.chance(0.5) else None,
            fold_norm2_weight=None if legacy else dice.normal(E, scale=0.3, mean=1),
            fold_norm2_bias=None if legacy else dice.normal(E, scale=0.3),
        )  # fmt: skip
    return values


def transformer_values(dice: Dice, activation: dict, M: int, heads: int, sizes: dict) -> tuple[dict, dict, set, dict]:
    C, P = sizes["C"], len(next(iter(activation.values())))
    tensors = activation | dict(
        norm1_weight=dice.normal(C, scale=0.3, mean=1), norm1_bias=dice.normal(C, scale=0.3),
        qk_weight=dice.normal(2 * C, C, scale=1.5 * C**-0.5), qk_bias=dice.normal(2 * C, scale=0.3),
        v_weight=dice.normal(C, C, scale=C**-0.5), v_bias=dice.normal(C, scale=0.3),
        proj_weight=dice.normal(C, C, scale=C**-0.5), proj_bias=dice.normal(C, scale=0.3),
        norm2_weight=dice.normal(C, scale=0.3, mean=1), norm2_bias=dice.normal(C, scale=0.3),
        fc1_weight=dice.normal(M, C, scale=C**-0.5), fc1_bias=dice.normal(M, scale=0.3),
        fc2_weight=dice.normal(C, M, scale=M**-0.5), fc2_bias=dice.normal(C, scale=0.3), attn_scale=None, mlp_scale=None,
    )  # fmt: skip
    if dice.chance(0.5):
        tensors |= dict(qk_bias=None, v_bias=None)
    for name in ("attn_scale", "mlp_scale"):
        if dice.chance(0.25):
            keep = dice.pick(0.25, 0.5, 0.9)
            tensors[name] = torch.tensor([dice.pick(0.0, 1 / keep, 1 / keep) for _ in range(P)], dtype=torch.float64)
    return tensors, dict(num_heads=heads), set(), sizes


def fold_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    B, N, legacy = dice.pick(0, 1, 1, 2, 3), dice.pick(1, 1, 2, 3, 5, 17), dice.chance(0.4)
    S = dice.pick(1, 2, 3, 4, 9, 16, 16, 36, 64)
    C, E = dice.upto(96 if dice.chance(0.1) else 24), dice.pick(dice.upto(48), dice.upto(200))
    width = C if legacy else S * C
    tensors = dict(
        pixel=dice.normal(B * N, S, C, mean=0.5), patch=dice.normal(B, 1 + N, E),
        norm1_weight=dice.normal(width, scale=0.3, mean=1), norm1_bias=dice.normal(width, scale=0.3),
        proj_weight=dice.normal(E, S * C, scale=(S * C) ** -0.5), proj_bias=dice.normal(E),
        norm2_weight=dice.normal(E, scale=0.3, mean=1), norm2_bias=dice.normal(E, scale=0.3),
    )  # fmt: skip
    if dice.chance(0.5):
        tensors["proj_bias"] = None
    if dice.chance(0.9 if legacy else 0.1):
        tensors |= dict(norm2_weight=None, norm2_bias=None)
    return tensors, {}, set(), dict(C=C, E=E, S=S)


def unusual_values(dice: Dice, tensors: dict, half: bool) -> str:
    """Replace the values of the activation, or scale those of a weight; returns what was done."""
    name, x = next(iter(tensors.items()))
    what = dice.pick("saturated", "constant", "far mean", "tiny", "huge", "outliers", "bad", "large weight", "zero weight")
    others = [n for n, w in tensors.items() if w is not None and n != name and not n.endswith("scale")]
    if what == "saturated" and "qk_weight" in tensors:
        tensors["qk_weight"] = tensors["qk_weight"] * 30
    elif what == "constant":
        tensors[name] = x[..., :1].expand(x.shape).clone()
    elif what == "far mean":
        tensors[name] = (100 if half else 1000) * dice.pick(1, -1) + x * dice.pick(1e-2, 0.1, 1.0)
    elif what in ("tiny", "huge"):
        tensors[name] = x * (dice.pick(1e-2, 1e-4, 1e-6) if what == "tiny" else 100.0 if half else dice.pick(1e3, 1e6))
    elif what == "outliers":
        mask = torch.rand(x.shape, generator=dice.generator) < 0.02
        tensors[name] = torch.where(mask, x * 100, x)
    elif what == "bad" and x.numel():
        x.view(-1)[dice.random.randrange(x.numel())] = dice.pick(math.nan, math.inf, -math.inf)
    elif what in ("large weight", "zero weight"):
        chosen = dice.pick(*others)
        tensors[chosen] = tensors[chosen] * (0.0 if what == "zero weight" else dice.pick(10.0, 30.0 if half else 1000.0))
        what += f" {chosen}"
    return what


def spoil(dice: Dice, tensors: dict, others: dict, operation: str) -> tuple[str, set[str]]:
    """Give one argument a shape, number or type that is not the documented one."""
    name = dice.pick(*[n for n, x in tensors.items() if x is not None])
    x = tensors[name]
    numbers = {
        "pixel_embed": [("stride", 0), ("stride", -1), ("patch_size", 8), ("patch_size", (4,)), ("patch_size", (0, 4)),
                        ("patch_stride", (0, 0))],
        "inner": [("num_heads", 0), ("num_heads", -2), ("num_heads", 5), ("num_heads", 7), ("eps", -1.0)],
        "fold": [("eps", -1.0)],
    }["inner" if operation == "outer" else operation]  # fmt: skip
    what = dice.pick("number", "longer", "shorter", "0-d", "more dimensions", "fewer dimensions", "list")
    if what == "number":
        key, value = dice.pick(*numbers)
        others[key] = value
        return f"{key}={value}", {"window"} if operation == "pixel_embed" else {"size"}  # which no patches at all fit
    d = dice.random.randrange(x.ndim)
    if what == "list":
        tensors[name] = [1.0, 2.0]
        return f"{name} is a list", {"dtype"}
    tensors[name] = (
        torch.cat([x, x.narrow(d, 0, min(1, x.shape[d]))], d) if what == "longer"
        else x.narrow(d, 0, max(0, x.shape[d] - 1)) if what == "shorter"
        else torch.tensor(0.5, dtype=torch.float64) if what == "0-d"
        else x.unsqueeze(0) if what == "more dimensions" else x.flatten(0, 1) if x.ndim > 1 else x[:1]
    )  # fmt: skip
    return f"{name} {what}", {"shape"}


def draw_call(operation: str, dice: Dice) -> Call:
    values = globals()[f"{operation}_values"]
    tensors, others, restrictions, sizes = values(dice)
    dtype, about, autocast = dice.pick(torch.float32, torch.float32, *HALVES), [], (False, False)
    half, weights = dice.pick(*HALVES), dtype
    if dice.chance(0.2):
        autocast = dice.pick((True, False), (False, True), (True, True))
        weights = torch.float32 if autocast[0] else dtype
        about.append("autocast " + "+".join([n for n, on in zip(("forward", "backward"), autocast, strict=True) if on]))
    narrow = dtype in HALVES or autocast[0]
    if dice.chance(0.35):
        about.append(unusual_values(dice, tensors, narrow))
    ordinary = not about and sizes["C"] > 2 and sizes.get("E", 3) > 2  # no row is constant: then eps = 0 is 0 / 0
    if operation != "pixel_embed" and dice.chance(0.4):
        others["eps"] = dice.pick(1e-6, 1e-2, *([1e-12, 0.0] if ordinary else []))
    expand = others.get("eps", 1) > 1e-9
    if dice.chance(0.1):
        for name in dice.random.sample(sorted(tensors), dice.pick(1, 1, 2)):
            if name != next(iter(tensors)):
                tensors[name] = None
                about.append(f"{name}=None")
        if operation in ("inner", "outer"):
            restrictions.add("absent")
    if dice.chance(0.05):
        what, more = spoil(dice, tensors, others, operation)
        about.append(what)
        restrictions |= more
    if kernels.OPERATIONS[operation].unsupported(sizes):
        restrictions.add("size")
    dtypes = {
        name: dtype if i == 0 or name in ("patch", "pixel", "attn_scale", "mlp_scale") else weights
        for i, name in enumerate(tensors)
    }
    if dice.chance(0.06):
        name = dice.pick(*tensors, *[n for n in ("patch", "pixel_pos", "attn_scale", "mlp_scale") if n in tensors])
        dtypes[name] = dice.pick(torch.float16, torch.float32, torch.float64)
        if dtypes[name] != dtype:
            restrictions.add("dtype")
            about.append(f"{name} is {dtypes[name]}")
    given = [name for name, x in tensors.items() if isinstance(x, Tensor)]
    wanted = dice.pick([], given, given, [n for n in given if dice.chance(0.5)], [dice.pick(*given)])
    if operation == "pixel_embed" and interpreted_turns(tensors["image"], others) > (400 if dice.chance(0.03) else 60):
        wanted = [n for n in wanted if n != "image"]
    if 2 in (sizes["C"], sizes.get("E")):  # a norm of two values is their sign: what flows back is 0, but for rounding
        wanted = []
    calm, placed = dice.chance(0.3), dict(tensors)
    for name in given:  # behind a matrix of rank one and a norm, what flows back cancels; so it has rank one in a forward only
        expanded = expand and not (wanted and tensors[name].ndim == 2)
        placed[name] = dice.place(name, tensors[name], dtypes[name], calm, expanded)
    seed, calm = dice.random.getrandbits(60), dice.chance(0.5)

    def upstream(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        again = Dice(seed, "upstream", 0)
        again.guard = dice.guard
        rounded = again.normal(*shape).to(HALVES[-1] if narrow else torch.float32).double()
        return again.place("the upstream gradient", rounded, dtype, calm)

    return Call(operation, placed, others, wanted, dice.guard, upstream, autocast, half, restrictions, about)


# ---- whole models ----


def draw_tnt(dice: Dice, dtype: torch.dtype, narrowest: int = 3) -> tuple[TNT, dict[str, Any], tuple[int, ...]]:
    """A small TNT with every parameter off its initial value, its options, and the shape of its images."""
    stride = dice.pick(2, 4, 4, 8)
    patch = stride * dice.pick(*[k for k in (1, 2, 3, 4) if k * stride <= 16])
    step = patch if dice.chance(0.7) else stride * dice.random.randint(1, patch // stride)
    sides = [patch + step * k for k in dice.pick((0, 0), (1, 0), (1, 1), (0, 2))]
    heads, heads_outer, depth = dice.pick(1, 2, 4), dice.pick(1, 2, 3), dice.pick(1, 1, 2)
    options = dict(
        img_size=tuple(sides), patch_size=patch, patch_stride=step, first_stride=stride, in_chans=dice.pick(1, 3, 3, 4),
        inner_dim=heads * dice.random.randint(narrowest, 8), num_heads_inner=heads,
        embed_dim=heads_outer * dice.random.randint(6, 12),
        num_heads_outer=heads_outer, depth=depth, num_classes=dice.pick(0, 3), legacy=dice.chance(0.4),
        qkv_bias=dice.chance(0.4), se_ratio=dice.pick(0.0, 0.0, 0.5), inner_mlp_ratio=dice.pick(4.0, 1.5, 2.0),
        use_pixel_pos=dice.chance(0.7), use_patch_pos=dice.chance(0.7), global_pool=dice.pick("token", "avg", ""),
        inner_blocks=None if dice.chance(0.7) else dice.pick((), (0,), (depth - 1,)),
    )  # fmt: skip
    model = TNT(**options).double()
    with torch.no_grad():
        for p in model.parameters():
            p += dice.normal(*p.shape, scale=0.1)
    return model.to(DEVICE, dtype), options, (dice.pick(1, 2, 3), options["in_chans"], *sides)


def call_model(
    model: TNT, backend: str, image: Tensor, gradients: bool, seed: int, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output and gradients by name, in the given mode of the model; whatever it draws follows ``seed``."""
    model.backend = backend
    image = image.detach().requires_grad_(image.requires_grad)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(gradients), torch.autocast(DEVICE, autocast) if autocast else nullcontext():
        out = model(image)
    found = {"output": out.detach()}
    if gradients and out.requires_grad:
        generator = torch.Generator().manual_seed(seed)
        out.backward(torch.randn(out.shape, generator=generator).to(HALVES[-1]).to(out))
        leaves = {"image": image, **dict(model.named_parameters())}
        found |= {
            f"gradient of {n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items() if p.requires_grad
        }
    return found


class Model:
    """A whole model, fused, by the rule."""

    def __init__(self, dice: Dice):
        self.dtype, self.autocast = dice.pick((torch.float32, None), (HALVES[0], None), (torch.float32, dice.pick(*HALVES)))
        self.model, self.options, shape = draw_tnt(dice, self.dtype)
        if dice.chance(0.4) and DEVICE == "cpu":  # a GPU draws other numbers for other dtypes
            for block in self.model.blocks:
                block.drop_path = timm.layers.DropPath(dice.pick(0.3, 0.9))
        self.model.train(dice.chance(0.5))
        self.gradients, self.seed = dice.chance(0.5), dice.random.getrandbits(40)
        self.guard = dice.guard
        self.image = dice.place("image", dice.normal(*shape), self.dtype).requires_grad_(dice.chance(0.1))

    def describe(self) -> str:
        mode = (
            f"{'train' if self.model.training else 'eval'}, {self.dtype}, autocast {self.autocast}, gradients {self.gradients}"
        )
        return f"model: {self.options}, image {tuple(self.image.shape)} {self.image.stride()}, {mode}"

    def judge(self) -> str:
        given = (self.gradients, self.seed)
        own = [call_model(self.model, "reference", self.image, *given, self.autocast)]
        model, image = copy.deepcopy(self.model).double(), self.image.detach().double().requires_grad_(self.image.requires_grad)
        with ExactSoftmax():
            exact = call_model(model, "reference", image, *given)
        for draw in DRAWS:
            for dtype in (self.dtype, torch.float64):
                model, image = copy.deepcopy(self.model), self.image.detach().to(dtype).requires_grad_(self.image.requires_grad)
                with torch.no_grad():
                    for p in model.parameters():
                        p.copy_(off_by_rounding(p, self.autocast or self.dtype, draw))
                model = model.to(dtype)
                with rounded_softmax(self.autocast or self.dtype) if dtype == torch.float64 else nullcontext():
                    own.append(call_model(model, "reference", image, *given, None if dtype == torch.float64 else self.autocast))
        self.model.backend = "fused"
        reasons = why_not_fused(self.model, self.image)
        if reasons:
            raise Wrong(f"an ordinary model is not fused: {reasons}")
        with self.guard:
            fused = call_model(self.model, "fused", self.image, *given, self.autocast)
        self.guard.check()
        for name, x in exact.items():
            if self.autocast is None and fused[name].dtype != own[0][name].dtype:
                raise Wrong(f"{name} is {fused[name].dtype}, the reference's {own[0][name].dtype}")
            compare(name, fused[name], [same[name] for same in own], x, self.autocast or self.dtype)
        return "right"


# ---- surgery ----


class Times(nn.Module):
    """A parametrisation, or an owner of a wrapped module."""

    def forward(self, x):
        return 1.5 * x


def times(x: Any) -> Any:
    """What hooks and replaced functions do to a result, so that to leave them out shows."""
    return tuple(map(times, x)) if isinstance(x, tuple) else 1.5 * x if isinstance(x, Tensor) else x


def changed(dice: Dice, value: Any) -> Any:
    """Another value of the same type; the value itself where there is none at hand."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.pick(value + 1, value * 2, 0, value // 2)
    if isinstance(value, float):
        return dice.pick(value + 0.5, value * 1000, 0.0)  # an effect far above any rounding
    if isinstance(value, (tuple, list)) and value:
        one = dice.random.randrange(len(value))
        every = dice.chance(0.5)
        return type(value)([changed(dice, v) if every or i == one else v for i, v in enumerate(value)])
    strings = ("reflect", "circular", "replicate", "tanh", "none", "avg", "token", "", "same", "valid")
    return dice.pick(*strings) if isinstance(value, str) else value


def change_attribute(dice: Dice, model: TNT) -> str:
    inherited = {"_reversed_padding_repeated_twice"}  # Conv2d keeps its padding twice
    # what raises inside of PyTorch's checkpoint leaves its hooks on saved tensors, for all that follows
    left = ("backend", "training", "grad_checkpointing")
    found = [
        (path, module, key) for path, module in model.named_modules() for key, value in vars(module).items()
        if (key[0] != "_" or key in inherited) and key not in left and changed(dice, value) is not value
    ]  # fmt: skip
    path, module, key = dice.pick(*found)
    value = changed(dice, getattr(module, key))
    before = getattr(module, key)
    setattr(module, key, value)
    return f"{path}.{key} = {value!r} (was {before!r})"


def change_parameter(dice: Dice, model: TNT) -> str:
    path, module, key = dice.pick(
        *[(p, m, k) for p, m in model.named_modules() for k, x in m._parameters.items() if x is not None]
    )
    x = getattr(module, key).detach()
    how = dice.pick(
        "None", "None", "half", "double", "one value", "scalar", "longer", "transposed", "plain", "subclass", "buffer", "frozen"
    )
    if how == "None":
        setattr(module, key, None)
    elif how in ("plain", "buffer"):
        delattr(module, key)
        if how == "plain":
            setattr(module, key, x * 2)
        else:
            module.register_buffer(key, x * 2)
    elif how == "frozen":
        getattr(module, key).requires_grad_(False)
    elif how == "subclass":
        setattr(module, key, type("Foreign", (nn.Parameter,), {})(x * 2))
    else:
        new = {
            "half": lambda: x.half(), "double": lambda: x.double(), "one value": lambda: x.flatten()[:1].clone(),
            "scalar": lambda: x.flatten()[0].clone(), "longer": lambda: torch.cat([x, x]),
            "transposed": lambda: x.transpose(0, -1),
        }[how]()  # fmt: skip
        setattr(module, key, nn.Parameter(new))
    return f"{path}.{key}: {how}"


def children(model: TNT) -> list[tuple[str, nn.Module, str, nn.Module]]:
    return [(f"{p}.{k}", m, k, c) for p, m in model.named_modules() for k, c in m._modules.items() if c is not None]


def replace_module(dice: Dice, model: TNT) -> str:
    path, parent, key, old = dice.pick(*children(model))
    like = next(iter(old.parameters()), model.cls_token)
    choices: dict[str, Callable[[], nn.Module | None]] = {
        "Identity": nn.Identity, "None": lambda: None, "Sequential": lambda: nn.Sequential(old), "ReLU": nn.ReLU,
        "Sequential of two": lambda: nn.Sequential(old, Times()), "Dropout": lambda: nn.Dropout(0.5),
        "tanh GELU": lambda: nn.GELU("tanh"),
        "ModuleList": lambda: nn.ModuleList([old]),
    }  # fmt: skip
    if isinstance(old, nn.Linear):
        i, o = old.in_features, old.out_features
        choices |= {
            "without bias": lambda: nn.Linear(i, o, bias=False), "with bias": lambda: nn.Linear(i, o),
            "Bilinear": lambda: nn.Bilinear(i, i, o), "one more in": lambda: nn.Linear(i + 1, o),
            "one more out": lambda: nn.Linear(i, o + 1), "one output": lambda: nn.Linear(i, 1),
            "LazyLinear": lambda: nn.LazyLinear(o),
        }  # fmt: skip
    elif isinstance(old, nn.LayerNorm):
        (n,) = old.normalized_shape
        choices |= {
            "eps": lambda: nn.LayerNorm(n, eps=0.5), "not affine": lambda: nn.LayerNorm(n, elementwise_affine=False),
            "no bias": lambda: nn.LayerNorm(n, bias=False), "two dimensions": lambda: nn.LayerNorm((1, n)),
            "RMSNorm": lambda: nn.RMSNorm(n),
            "S and C": lambda: nn.LayerNorm((n // model.pixel_embed.in_dim, model.pixel_embed.in_dim)),
            "one": lambda: nn.LayerNorm(1),
            "C only": lambda: nn.LayerNorm(model.pixel_embed.in_dim), "timm's": lambda: timm.layers.LayerNorm(n),
        }  # fmt: skip
    elif isinstance(old, nn.Conv2d):
        i, o, k, s, p = old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding
        more = dict(kernel_size=dice.pick(k, 5, (7, 5)), stride=dice.pick(s, 1, (s[0], 1)), padding=dice.pick(p, 2, 0, "valid"),
                    dilation=dice.pick(1, 2), bias=dice.chance(0.5),
                    padding_mode=dice.pick("zeros", "zeros", "reflect", "circular"))  # fmt: skip
        choices |= {f"Conv2d {more}": lambda: nn.Conv2d(i, o, **more)} | {
            f"Conv2d {n}": lambda: nn.Conv2d(i, o, 7, s, 3) for n in range(2)
        }
    what = dice.pick(*choices)
    new = choices[what]()
    setattr(parent, key, new if new is None or what.startswith("Sequential") else new.to(like.device, like.dtype))
    return f"{path}: replaced by {what}"


def hook(dice: Dice, model: TNT) -> str:
    path, module = dice.pick(*list(model.named_modules()))
    kind = dice.pick("forward", "forward pre", "full backward", "full backward pre", "parameter", "accumulated")
    if kind in ("parameter", "accumulated"):
        path, p = dice.pick(*list(model.named_parameters()))
        p.register_hook(times) if kind == "parameter" else p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(1.5))
    elif kind == "forward":
        module.register_forward_hook(lambda m, args, out: times(out))
    elif kind == "forward pre":
        module.register_forward_pre_hook(lambda m, args: times(args))
    elif kind == "full backward":
        module.register_full_backward_hook(lambda m, inputs, outputs: times(inputs))
    else:
        module.register_full_backward_pre_hook(lambda m, outputs: times(outputs))
    return f"{path}: a {kind} hook"


def parametrise(dice: Dice, model: TNT) -> str:
    path, module, key = dice.pick(
        *[(p, m, k) for p, m in model.named_modules() for k, x in m._parameters.items() if x is not None]
    )
    choices = {
        "weight_norm": lambda: parametrizations.weight_norm(module, key),
        "pruned": lambda: prune.random_unstructured(module, key, 0.5),
        "spectral_norm": lambda: parametrizations.spectral_norm(module, key),
        "old weight_norm": lambda: nn.utils.weight_norm(module, key),
        "old spectral_norm": lambda: nn.utils.spectral_norm(module, key),
        "1.5 ×": lambda: parametrize.register_parametrization(module, key, Times()),
    }  # fmt: skip
    what = dice.pick(*choices)
    with suppress(ValueError, RuntimeError, IndexError):  # e.g. of a vector; then nothing was done
        choices[what]()
    return f"{path}.{key}: {what}"


def replace_function(dice: Dice, model: TNT) -> str:
    path, module = dice.pick(*list(model.named_modules()))
    if dice.chance(0.3):
        forward = type(module).forward
        module.__class__ = type(
            "Foreign", (type(module),), {"forward": lambda self, *args, **kw: times(forward(self, *args, **kw))}
        )
        return f"{path}: another class"
    key = dice.pick(
        "forward", "forward", *[k for k in ("inner", "fold", "outer", "forward_features", "sizes") if hasattr(module, k)]
    )
    function = getattr(module, key)
    setattr(module, key, lambda *args, **kw: times(function(*args, **kw)))
    return f"{path}.{key}: replaced"


def cast(dice: Dice, model: TNT) -> str:
    path, module = dice.pick(*list(model.named_modules()))
    dtype = dice.pick(torch.float16, torch.float64)
    module.to(dtype)
    return f"{path}: {dtype}"


class Surgery:
    """Something was done to a model. Its fused path gives the reference's answer, or a reason."""

    ACTIONS = (change_attribute,) * 4 + (
        change_parameter,
        replace_module,
        replace_module,
        hook,
        parametrise,
        replace_function,
        cast,
    )
    # Far above what float32 rounds, even through a softmax that surgery saturated; far below what surgery does: scale by 1.5 or
    # more, or take something away whose values are about 0.1.
    TOLERANCE = 1e-3

    def __init__(self, dice: Dice):
        self.model, self.options, shape = draw_tnt(dice, torch.float32, 6)
        if dice.chance(0.1):
            for block in self.model.blocks:
                block.drop_path = timm.layers.DropPath(0.5)
        self.model.train(dice.chance(0.3))
        self.image = dice.place("image", dice.normal(*shape), torch.float32).requires_grad_(dice.chance(0.1))
        self.gradients, self.seed, self.guard = dice.chance(0.5), dice.random.getrandbits(40), dice.guard
        self.about = [dice.pick(*self.ACTIONS)(dice, self.model) for _ in range(dice.pick(1, 1, 1, 2))]

    def describe(self) -> str:
        mode = f"{'train' if self.model.training else 'eval'}, gradients {self.gradients}"
        return f"surgery: {'; '.join(self.about)}\n  {self.options}, image {tuple(self.image.shape)}, {mode}"

    def judge(self) -> str:
        expected, refusal = None, None
        lazy = any(map(nn.parameter.is_lazy, self.model.parameters()))
        self.states = {name: x.clone() for name, x in self.model.named_buffers()}
        try:
            for _ in range(1 + lazy):  # LazyLinear draws its weights in its first call, and what is drawn after them is other
                expected = self.answer("reference")
        except Exception as error:  # whatever it is, the fused path must not answer
            refusal = error
        self.model.backend = "fused"
        reasons = why_not_fused(self.model, self.image)
        try:
            with self.guard:
                fused = self.answer("fused")
        except Exception as error:
            self.guard.check()
            named = isinstance(error, RuntimeError) and "backend='fused' cannot run" in str(error)
            if refusal is not None:
                return "reference raises too"
            if not named:
                raise Wrong(f"{type(error).__name__} inside of the fused path: {error}") from error
            if not reasons:
                raise Wrong(f"why_not_fused has no reason, the fused path has: {error}") from error
            return "reason"
        self.guard.check()
        if refusal is not None:
            raise Wrong(f"answers where the reference raises {type(refusal).__name__}: {refusal}")
        if reasons:
            raise Wrong(f"runs although why_not_fused says {reasons}")
        try:
            self.compare(expected, fused, expected)
        except Wrong:
            for block in self.model.blocks:  # whose modules are called with PyTorch's fused attention: see ``fused_attention``
                if hasattr(getattr(block, "attn_out", None), "attn_backend"):
                    block.attn_out.attn_backend = "sdpa"
            self.compare(expected, fused, self.answer("reference"))
        return "right"

    def answer(self, backend: str) -> dict[str, Tensor]:
        """``call_model``, from the buffers at the beginning: spectral_norm's change at each call."""
        for name, x in self.model.named_buffers():
            if name in self.states:
                x.copy_(self.states[name])
        return call_model(self.model, backend, self.image, self.gradients, self.seed)

    def compare(self, expected: dict[str, Tensor], fused: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        """Raise Wrong where these differ by more than rounding; ``own``: as ``expected``, rounded in another way."""
        largest = max([x.abs().nan_to_num().max().item() for x in expected.values() if x.numel()], default=0.0)
        for name, x in expected.items():
            y = fused[name]
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                raise Wrong(f"{name} is {y.dtype} {tuple(y.shape)}, the reference's {x.dtype} {tuple(x.shape)}")
            if not torch.equal(x.isfinite(), y.isfinite()):
                raise Wrong(f"{name} is finite in other places than the reference's")
            x, y, z = x[x.isfinite()], y[x.isfinite()], own[name][x.isfinite()]
            allowed = self.TOLERANCE * x.abs() + 1e-6 * largest + 2 * (x - z).abs().nan_to_num()  # or 0, but for rounding
            if x.numel() and (x - y).abs().max() > allowed.max():
                raise Wrong(f"{name}: off by {(x - y).abs().max():.3g} of {x.abs().max():.3g}")


# ---- running ----


def draw(seed: int, kind: str, index: int) -> Call | Model | Surgery:
    """The case that these three determine."""
    dice = Dice(seed, kind, index)
    return Model(dice) if kind == "model" else Surgery(dice) if kind == "surgery" else draw_call(kind, dice)


def kind_of(seed: int, index: int) -> str:
    return random.Random(f"{seed}:{index}").choices(list(KINDS), list(KINDS.values()))[0]


def examine(seed: int, kind: str, index: int) -> tuple[str, str]:
    """Verdict and, where it is "wrong", what and of which case."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    case = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = draw(seed, kind, index)
            about = case.describe()  # before the call, which may end this process
            return case.judge(), ""
        except Wrong as wrong:
            return "wrong", f"{wrong}\n{about}"
        except Exception as error:
            told = about if case else "while it was drawn"
            return "wrong", f"{type(error).__name__}: {error}\n{told}\n{traceback.format_exc().strip()}"
        finally:
            torch.use_deterministic_algorithms(False)


def replay(seed: int, kind: str, index: int) -> str:
    return f"python -m tests.fuzz --seed {seed} --case {kind}:{index}"


def _work(pipe, seed: int, work: Callable[[int, str, int], tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends these
    try:
        pipe.send("ready")
        while True:
            pipe.send(work(seed, *pipe.recv()))
    except (EOFError, BrokenPipeError):
        return


def run(
    seed: int, cases: list[tuple[str, int]], processes: int, limit: float = LIMIT_S, work: Callable = examine
) -> Iterator[tuple[str, int, str, str]]:
    """(kind, index, verdict, what) as they come. A process that dies or does not end a case is replaced; the case is wrong."""
    context = multiprocessing.get_context("spawn")  # forked, torch's threads are lost
    waiting, busy = deque(cases), {}  # busy: of every pipe its process, the case, None while it starts, and the end of its time

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, seed, work), daemon=True)
        process.start()
        theirs.close()
        busy[ours] = process, None, math.inf

    try:
        for _ in range(min(processes, len(waiting))):
            start()
        while busy:
            ready = wait(list(busy), timeout=1.0)
            late = [pipe for pipe, (_, _, end) in busy.items() if pipe not in ready and time.monotonic() > end]
            for pipe in [*ready, *late]:
                process, case, _ = busy.pop(pipe)
                try:
                    if pipe in late:
                        process.kill()
                        raise EOFError(f"not done after {limit:.0f} s")
                    result = pipe.recv()
                except (EOFError, OSError) as error:
                    process.join()
                    if case is None:
                        raise RuntimeError(f"a process ended at its start, with exit code {process.exitcode}") from error
                    result = "wrong", str(error) or f"its process ended with exit code {process.exitcode}"
                    if waiting:
                        start()
                else:
                    if waiting:
                        following = waiting.popleft()
                        pipe.send(following)
                        busy[pipe] = process, following, time.monotonic() + limit
                    else:
                        pipe.close()  # at which the process ends
                if case is not None:
                    yield *case, *result
    finally:
        for process, _, _ in busy.values():
            process.kill()


def main(arguments: list[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the fused operations and the fused model.")
    parser.add_argument("--count", type=int, default=300, help="cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", choices=KINDS, help="one kind of cases")
    parser.add_argument("--case", metavar="KIND:INDEX", help="one case, in this process, told in full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only the wrong cases of a result, of which it writes anew")
    args = parser.parse_args(arguments)
    if args.case:
        kind, _, index = args.case.partition(":")
        if kind not in KINDS or not index.isdigit():
            parser.error(f"--case {args.case!r} is not KIND:INDEX; kinds: {', '.join(KINDS)}")
        verdict, what = examine(args.seed, kind, int(index))
        print(f"{verdict}: {what or draw(args.seed, kind, int(index)).describe()}")
        return int(verdict == "wrong")
    cases = [(args.only or kind_of(args.seed, i), i) for i in range(args.count)]
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    before: dict[str, Any] = {}
    if args.again:  # after a mend that no other case can have become wrong by; the file says which were judged again
        args.json, before = args.again, json.loads(args.again.read_text("utf-8"))
        args.seed, judged = before["seed"], [w["case"].split(":") for w in before["wrong"]]
        cases = [(kind, int(index)) for kind, index in judged]
        counts |= {kind: Counter(row) for kind, row in before["counts"].items()}
        for kind, _ in cases:
            counts[kind]["wrong"] -= 1
    wrong, began, stopped = [], time.monotonic(), False
    results = run(args.seed, cases, args.processes)
    try:
        for kind, index, verdict, what in tqdm(results, total=len(cases), unit="case", disable=None):
            counts[kind][verdict] += 1
            if verdict == "wrong":
                wrong.append({"case": f"{kind}:{index}", "replay": replay(args.seed, kind, index), "what": what})
                tqdm.write(f"{replay(args.seed, kind, index)}\n  " + "\n  ".join(what.splitlines()[:2]))
    except KeyboardInterrupt:
        stopped = True
        results.close()
    done = sum(sum(c.values()) for c in counts.values())
    table = {kind: {v: c[v] for v in VERDICTS} for kind, c in counts.items() if c}
    asked = before.get("asked", len(cases))
    print(f"{done} of {asked} cases, {len(wrong)} wrong, seed {args.seed}, {time.monotonic() - began:.0f} s")
    for kind, row in table.items():
        print(f"  {kind}: " + ", ".join([f"{n} {v}" for v, n in row.items() if n]))
    if args.json:
        versions = {m.__name__: m.__version__ for m in (torch, triton, timm, numpy)} | {"python": platform.python_version()}
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "Triton's interpreter on the CPU"
        result = {
            "seed": args.seed, "count": done, "asked": asked, "device": device, "versions": versions,
            "seconds": round(time.monotonic() - began) + before.get("seconds", 0), "counts": table, "wrong": wrong,
            "judged_again": before.get("judged_again", []) + [f"{kind}:{i}" for kind, i in cases] * bool(args.again),
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        beside = args.json.with_name(args.json.name + ".part")
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        beside.replace(args.json)
    return 130 if stopped else int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
