"""fold against the reference in float64 (``cases.check``)."""

import pytest
import torch
from cases import check, fold_tensors, growing, normal, shrunk
from helpers import lay, paths

pytest.importorskip("triton")

from tnt_fast import kernels, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide


@paths()
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(
    ("B", "N", "S", "C", "E"),
    [
        pytest.param(2, 5, 16, 24, 384, marks=everywhere),
        (3, 37, 4, 96, 48),
        (1, 1, 16, 40, 640),
        (2, 33, 64, 6, 200),
        (2, 3, 16, 12, 192),
        (1, 70, 36, 3, 10),
    ],
)
def test_fold(B, N, S, C, E, legacy, path, dtype):
    check(path, "fold", fold_tensors(B, N, S, C, E, legacy), {}, dtype)


@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(("N", "C", "E"), [(3, 24, 64), (35, 12, 24)], ids=str)
@paths()
def test_fold_of_a_large_mean(N, C, E, legacy, path, dtype):
    mean = 1000.0 if dtype == torch.float32 else 100.0
    check(path, "fold", fold_tensors(2, N, 16, C, E, legacy, mean=mean), {}, dtype, gradients=False)


@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize("by", [2, 30])
@paths()
def test_fold_of_pixels_that_grow_along_the_patch(by, legacy, path, dtype):
    tensors = growing(fold_tensors(2, 35, 16, 12, 24, legacy), by)  # more rows than a program takes
    check(path, "fold", tensors | dict(proj_bias=normal(24)), {}, dtype)


@pytest.mark.parametrize("eps", [1e-5, pytest.param(1e4, marks=pytest.mark.wide)])
@pytest.mark.parametrize(("S", "C", "E"), [(5, 6, 200), (16, 24, 48)], ids=str)
@everywhere
@paths()
def test_fold_of_small_values(S, C, E, eps, path, dtype):
    check(path, "fold", shrunk(fold_tensors(2, 9, S, C, E, False)), dict(eps=eps), dtype)


@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@paths()
def test_fold_without_eps(legacy, path, dtype):
    """Of rows that are not there nothing is divided by 0."""
    check(path, "fold", fold_tensors(1, 5, 4, 6, 48, legacy), dict(eps=0.0), dtype)


@everywhere
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@paths("float32", "float32")
def test_fold_of_equal_pixels(legacy, path, dtype):
    """PyTorch finds their mean to the bit; the kernel's first sum of them is rounded."""
    tensors = fold_tensors(2, 5, 16, 24, 40, legacy)
    tensors["pixel"] = (700 + 100 * normal(10, 1, 1)).expand(10, 16, 24)
    check(path, "fold", tensors, {}, dtype, gradients=False)


@pytest.mark.parametrize("axis", [0, 1])
@paths("", "bfloat16 float16")
def test_fold_onto_a_patch_that_lies_far_apart(axis, path, dtype):
    tensors = fold_tensors(3, 5, 16, 12, 24, False)
    given = {k: v if v is None else v.to(path.device, dtype).requires_grad_() for k, v in tensors.items()}
    upstream, results = normal(3, 6, 24).to(path.device, dtype), []
    for far in (None, axis):
        given["patch"] = lay(given["patch"].detach(), far).requires_grad_()
        out = kernels.OPERATIONS["fold"](**given)
        wanted = [v for v in given.values() if v is not None]
        results.append((out, *torch.autograd.grad(out, wanted, lay(upstream, far))))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


@paths("float32", "bfloat16 float32")
def test_fold_onto_an_expanded_patch(path, dtype):
    tensors = {k: None if v is None else v.to(dtype) for k, v in fold_tensors(3, 4, 16, 12, 24, False).items()}
    given = {k: None if v is None else v.to(path.device) for k, v in tensors.items()}
    given["patch"] = given["patch"][:1].expand(3, -1, -1)
    assert given["patch"].stride(0) == 0
    exact = reference.fold(**{k: None if v is None else v.double().cpu() for k, v in given.items()})
    path.rule("fold", kernels.OPERATIONS["fold"](**given), reference.fold(**given), exact, dtype)


@pytest.mark.parametrize(
    "absent", [("norm1_bias",), ("norm2_bias",), ("proj_bias",), ("norm1_bias", "norm2_bias")], ids="+".join
)
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@paths("float32", "bfloat16 float32")
def test_fold_without_biases(absent, legacy, path, dtype):
    tensors = fold_tensors(2, 5, 16, 12, 40, legacy) | dict.fromkeys(absent)
    check(path, "fold", tensors, {}, dtype)


def test_folds_second_bias_alone_is_not_read():
    tensors = fold_tensors(2, 5, 16, 12, 40, False) | {"norm2_weight": None}
    given = {k: None if v is None else v.float().to(DEVICE).requires_grad_() for k, v in tensors.items()}
    fold = kernels.OPERATIONS["fold"]
    out = fold(**given)
    assert torch.equal(out, fold(**(given | {"norm2_bias": None})))
    assert torch.autograd.grad(out.sum(), given["norm2_bias"], allow_unused=True) == (None,)
    (found,) = torch.ops.tnt_fast.fold_backward(
        out.detach(), *(v if v is None else v.detach() for v in given.values()), 1e-5, [7]
    )
    assert torch.equal(found, torch.zeros(40, device=DEVICE))


@wide
@pytest.mark.parametrize("value", [1000.0, 777.7])
@paths("float32", "float32")
def test_folds_second_norm_of_rows_that_are_nearly_constant_far_from_zero(value, path, dtype):
    tensors = fold_tensors(2, 3, 16, 12, 24, False)
    tensors["proj_weight"] *= 0
    check(path, "fold", tensors | {"proj_bias": torch.full((24,), value, dtype=torch.float64)}, {}, dtype)
