"""The approximations of the kernels, each over its whole input range: their mathematics, and their instructions."""

import inspect
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import paths

pytest.importorskip("triton")

import triton
import triton.language as tl

from tnt_fast.kernels import operation, tile
from tnt_fast.kernels.operation import Config, Launch


def erf_gelu(x: np.ndarray) -> np.ndarray:
    return F.gelu(torch.from_numpy(x.astype(np.float64))).numpy()


def test_the_polynomial_of_gelu_is_within_its_stated_error():
    source = inspect.getsource(tile.gelu.fn)
    first, second, third = map(float, re.search(r"x \* \(([\d.]+) \+ x2 \* \(([\d.]+) - ([\d.]+) \* x2\)\)", source).groups())
    x = np.concatenate([np.linspace(-40, 40, 2_000_001), [-1e30, 1e30, -1e-30, 0.0]])
    x2 = np.minimum(x * x, 36.0)
    value = 0.5 * x * (1 + np.tanh(x * (first + x2 * (second - third * x2))))
    assert np.abs(value - erf_gelu(x)).max() <= 2.6e-5


def test_the_gradient_of_gelu_is_that_of_the_same_polynomial():
    number = r"([\d.]+)"
    polynomial = rf"\* \({number} \+ x2 \* \({number} - {number} \* x2\)\)"
    (value,), (*values, slope) = (re.findall(polynomial, inspect.getsource(x.fn)) for x in (tile.gelu, tile.gelu_gradient))
    assert values == [value, slope, value]
    assert [float(x) for x in slope] == pytest.approx([float(x) * n for x, n in zip(value, (1, 3, 5), strict=True)], rel=1e-6)


def test_gelu_in_pairs_of_float16_over_every_float16():
    source = inspect.getsource(tile.gelu_pairs.fn)
    constants = {name: int(word, 16) for name, word in re.findall(r"mov\.b32 (\w+), 0x([0-9A-F]{8})", source)}
    assert all(word >> 16 == word & 0xFFFF for word in constants.values())  # the same in both halves
    c0, c1, c2 = (np.uint16(constants[n] & 0xFFFF).view(np.float16) for n in ("c0", "c1", "c2"))
    h = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    h = h[np.abs(h) <= 32752]  # what the kernels' halving leaves
    exact = erf_gelu(8 * h.astype(np.float64))

    def fma(a, b, c):  # one rounding, as the instruction
        return (a.astype(np.float64) * b.astype(np.float64) + np.float64(c)).astype(np.float16)

    with np.errstate(over="ignore"):
        q = np.clip(h * h, 0, 1)
        t = fma(q, c2.reshape(1), c1)
        t = (t.astype(np.float64) * q + np.float64(c0)).astype(np.float16)
        t = t * h
        for noise in (-(2.0**-10.987), 0.0, 2.0**-10.987):  # tanh.approx.f16x2: its largest absolute error (PTX ISA)
            tanh = np.clip(np.tanh(t.astype(np.float64)) + noise, -1, 1).astype(np.float16)
            value = 4 * (h.astype(np.float64) * tanh + h).astype(np.float16).astype(np.float64)
            error = np.abs(value - exact)
            near = np.abs(8 * h.astype(np.float64)) < 4
            assert error[near].max() <= 3.2e-3  # rounding the exact value to bfloat16: 7.8e-3
            assert (error <= 2**-8 * np.abs(exact) + 3.2e-3 + np.where(near, 0, 2**-9 * np.abs(8 * h))).all()
    assert np.abs(value[8 * h.astype(np.float64) > 8] / exact[8 * h.astype(np.float64) > 8] - 1).max() <= 2**-8


def test_gelu_in_pairs_is_no_worse_than_bfloat16_where_it_matters():
    x = torch.linspace(-4, 4, 100_001, dtype=torch.float64)
    rounding = (F.gelu(x).bfloat16().double() - F.gelu(x)).abs().max().item()
    assert rounding >= 3.2e-3  # the approximation's largest error there is below that of its result's dtype


@triton.jit
def _apply(x_ptr, y_ptr, n, WHICH: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=1.0)
    if WHICH == "gelu":
        y = tile.gelu(x, FAST)
    elif WHICH == "pairs":
        y = tile.gelu_pairs(x * 0.125, FAST, True).to(tl.float32) * 4.0
    elif WHICH == "exp2":
        y = tile.exp2(x, FAST)
    elif WHICH == "log2":
        y = tile.log2(x, FAST)
    else:
        y = tile.reciprocal(x, FAST)
    tl.store(y_ptr + at, y, mask=at < n)


def apply(x: torch.Tensor, which: str, fast: bool) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    constants = dict(WHICH=which, FAST=fast, BLOCK=1024)
    operation.launch(Launch(_apply, constants, Config(1024, 4), 1), triton.cdiv(len(x), 1024), x, y, len(x))
    return y


@pytest.mark.everywhere
@paths("", "float32")
@pytest.mark.parametrize(
    ("which", "low", "high", "absolute", "relative"),
    [
        ("gelu", -40, 40, 2.6e-5, 2**-10),
        ("pairs", -4, 4, 3.2e-3, 0),
        ("pairs", 4, 260_000, 0, 2**-8),
        ("exp2", -126, 0, 0, 2**-21),
        ("log2", 1, 256, 2**-22, 2**-22),
        ("reciprocal", 1, 256, 0, 2**-22),
    ],
)
def test_the_fast_forms(which, low, high, absolute, relative, path, dtype):
    x = torch.linspace(low, high, 1_000_003 if path.device == "cuda" else 20_011, device=path.device)
    x = x[1:] if which == "exp2" else x  # the smallest normal number itself may be flushed to 0
    y = apply(x, which, fast=True)
    exact = {"gelu": F.gelu, "pairs": F.gelu, "exp2": torch.exp2, "log2": torch.log2, "reciprocal": torch.reciprocal}[which](
        x.double()
    )
    allowed = absolute + relative * exact.abs()
    if path.executor and which == "gelu":
        allowed += 2**-12 * x.abs()  # by the PTX manual tanh.approx errs by 2^-11 where it is 1, too; a GPU's does not
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.everywhere
@pytest.mark.parametrize("which", ["gelu", "exp2", "reciprocal"])
@paths("float32", "float32")
def test_the_plain_forms(which, path, dtype):
    x = torch.linspace(-30, -0.5, 2001, device=path.device)
    y = apply(x, which, fast=False)
    exact = {"gelu": F.gelu, "exp2": torch.exp2, "reciprocal": torch.reciprocal}[which](x.double())
    assert (y.double() - exact).abs().max().item() <= 1e-6


@triton.jit
def _centre(x_ptr, y_ptr, SIZE: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr):
    row, col = tl.arange(0, 4), tl.arange(0, WIDE)
    at = row[:, None] * WIDE + col[None, :]
    tl.store(y_ptr + at, tile.centred(tl.load(x_ptr + at), col < SIZE, SIZE, EXACT))


@pytest.mark.everywhere
@pytest.mark.parametrize("exact", [False, True])
@paths("float32", "float32")
def test_centred_rows(exact, path, dtype):
    """Columns of padding stay 0; what is left of a large mean is a rounding of the values, EXACT of what was left of them."""
    x = torch.zeros(4, 32, device=path.device)
    x[:, :24] = torch.tensor([[0.0], [777.7], [-1e5], [3e7]], device=path.device) + torch.randn(4, 24, device=path.device)
    y = torch.full_like(x, float("nan"))
    operation.launch(Launch(_centre, dict(SIZE=24, WIDE=32, EXACT=exact), Config(4, 4), 1), 1, x, y)
    assert (y[:, 24:] == 0).all()
    right = x[:, :24].double() - x[:, :24].double().mean(1, keepdim=True)
    rounding = 2**-22 * (right if exact else x.double()).abs().amax(1, keepdim=True)
    assert ((y[:, :24].double() - right).abs() <= rounding).all()
