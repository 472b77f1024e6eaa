"""What the fuzzer holds a call to: the one rule of the house, errors for what is documented as refused, no write outside.

PyTorch's own error, which the rule allows twice, is the largest of its ways to compute the same, each with what anybody has to
round, rounded in several ways.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from helpers import ExactSoftmax, joined
from torch import Tensor

from tnt_fast import attention, kernels, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

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


# ---- a call of an operation ----


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
        if draw and self.operation in (
            "inner",
            "outer",
            "block",
        ):  # whose biases are added onto the pixels or patches with all else
            finite = self.activation.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
            largest = finite.max().item() if finite.numel() else 0.0
        for i, (name, x) in enumerate(self.tensors.items()):
            if isinstance(x, Tensor):
                x = x.detach()
                if dtype not in (None, torch.float64) and (i == 0 or name == "patch" or not recomputed):
                    x = x.to(self.dtype)  # what is in half is of half's values
                x = x if dtype is None else x.to(dtype, copy=True)
                if draw and i > 0 and name != "patch":
                    x = off_by_rounding(x, self.dtype, draw, largest if name.endswith(("proj_bias", "fc2_bias")) else 0.0)
                x.requires_grad_(name in self.wanted)
            given[name] = x
        with on(0):
            out = joined(function(**reference.in_records(given | self.others)))
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
        if self.operation in ("outer", "block") and self.dtype in HALVES and DEVICE == "cuda":
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
