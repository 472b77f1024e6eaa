"""What is accepted fits on the chip: the extremes are compiled, for the GPUs with the least shared memory, and not run."""

import pytest
import torch
from cases import embed_case, fold_tensors, inner_tensors, with_fold
from helpers import call

pytest.importorskip("triton")

from ptx.compiler import Compiler
from ptx.executor import Executor, running

from tnt_fast import kernels

DTYPES = (torch.float32, torch.bfloat16)


SIZES = Compiler(only_sizes=True)


class Fits(Executor):
    """Compiles what is launched, which raises where a launch needs more than the target has."""

    def __init__(self, target: str):
        super().__init__(target)
        self.compiler = SIZES

    def launch(self, spec, grid, arguments, options):
        self.compile(spec.kernel, arguments, spec.constants, options)


def launch(operation: str, tensors: dict, others: dict, dtype: torch.dtype, target: str, gradients: bool = True) -> None:
    given = {k: v if v is None else v.to(dtype).requires_grad_(gradients) for k, v in tensors.items()}
    with running(Fits(target)):
        out = call(kernels.OPERATIONS[operation], **given, **others)
        if gradients:
            torch.autograd.grad(out, [v for v in given.values() if v is not None], torch.ones_like(out))


@pytest.mark.parametrize("target", ["sm_89"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.wide)], ids=str)
@pytest.mark.parametrize(
    ("S", "C", "H", "M"),
    [
        (4, 96, 4, 384), (64, 96, 96, 24), (64, 62, 2, 24), (64, 31, 1, 224),
        *(pytest.param(*sizes, marks=pytest.mark.wide) for sizes in ((64, 6, 6, 24), (16, 63, 63, 24), (64, 63, 7, 64))),
    ],
    ids=str,
)  # fmt: skip
def test_inner(S, C, H, M, dtype, target):
    launch("inner", inner_tensors(3, S, C, M), dict(num_heads=H), dtype, target, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C", "E", "H"), [(196, 24, 384, 6), (196, 40, 640, 10)], ids=str)
def test_outer_of_few_rows(N, C, E, H, dtype):
    launch("outer", with_fold(1, N, 16, C, E, 4 * E, False), dict(num_heads=H), dtype, "sm_89", gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("C", "H", "M"),
    [(31, 31, 256), *(pytest.param(*sizes, marks=pytest.mark.wide) for sizes in ((30, 6, 256), (31, 1, 256)))],
    ids=str,
)
def test_the_backward_of_inner(C, H, M, dtype):
    launch("inner", inner_tensors(3, 16, C, M), dict(num_heads=H), dtype, "sm_89")


def test_the_backward_of_inner_with_many_channels(monkeypatch):
    """TNT-B's fits into the 99 KiB of the smallest GPUs; what would not is told in KiB, and left to PyTorch."""
    inner = kernels.OPERATIONS["inner"]
    monkeypatch.setattr(inner, "recomputed", lambda *given: pytest.fail("by PyTorch"))
    launch("inner", inner_tensors(3, 16, 40, 160), dict(num_heads=4), torch.bfloat16, "sm_89")
    for C, H, M, most in ((40, 4, 160, 0), (40, 4, 192, 104), (40, 2, 64, 112), (63, 3, 128, 128)):
        with running(Fits("sm_89")):
            reasons = inner.gradients_unsupported(dict(S=16, C=C, H=H, M=M), torch.bfloat16, torch.device("cpu"))
        told = f"C={C} channels in torch.bfloat16 need up to {most} KiB of shared memory; this GPU has 99"
        assert reasons == ([told] if most else [])
        with running(Fits("sm_90")):
            assert inner.gradients_unsupported(dict(S=16, C=C, H=H, M=M), torch.bfloat16, torch.device("cpu")) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(("S", "C", "E"), [(16, 128, 1024), (16, 128, 512), (4, 65, 256)], ids=str)
def test_fold(S, C, E, legacy, dtype):
    launch("fold", fold_tensors(1, 2, S, C, E, legacy), {}, dtype, "sm_89")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "C"), [(8, 128), (3, 128), (1, 64)], ids=str)
def test_pixel_embed(channels, C, dtype):
    launch("pixel_embed", *embed_case(1, channels, 16, 16, C, (16, 16), 4, (16, 16), False), dtype, "sm_89")
