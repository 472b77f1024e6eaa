"""outer against the reference in float64 (``cases.check``)."""

import pytest
import torch
from cases import check, normal, outer_tensors, with_fold
from helpers import paths

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("poisoned_memory")
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide


@paths()
@pytest.mark.parametrize(
    ("B", "T", "E", "H", "M", "bias"),
    [
        pytest.param(2, 5, 384, 6, 96, False, marks=everywhere),
        (1, 197, 192, 3, 64, False),
        (2, 65, 64, 2, 256, True),
        (3, 2, 640, 10, 40, False),
        (2, 1, 48, 3, 12, True),
        pytest.param(1, 577, 64, 1, 32, False, marks=wide),
        pytest.param(1, 785, 64, 2, 32, False, marks=wide),
        pytest.param(2, 33, 90, 3, 50, True, marks=wide),
    ],
)
def test_outer(B, T, E, H, M, bias, path, dtype):
    check(path, "outer", outer_tensors(B, T, E, M, bias), dict(num_heads=H), dtype)


@paths("float32", "bfloat16 float32")
def test_outer_with_drop_path(path, dtype):
    scales = {name: torch.tensor([0.0, 1.25, 2.0], dtype=torch.float64)[order] for name, order in (
        ("attn_scale", [0, 1, 2]), ("mlp_scale", [2, 0, 1]))}  # fmt: skip
    check(path, "outer", outer_tensors(3, 7, 48, 96) | scales, dict(num_heads=3), dtype)


@pytest.mark.parametrize("absent", [("proj_bias",), ("fc1_bias",), ("fc2_bias", "norm1_bias", "norm2_bias")], ids="+".join)
@paths("float32", "bfloat16 float32")
def test_outer_without_biases(absent, path, dtype):
    check(path, "outer", outer_tensors(2, 9, 64, 128) | dict.fromkeys(absent), dict(num_heads=2), dtype)


@pytest.mark.parametrize("name", ["proj_bias", "fc2_bias"])
@paths()
def test_a_large_bias_of_a_branch_is_added_where_it_belongs(name, path, dtype):
    """fc2's lies in the rest while the MLP runs, but not in what the MLP reads."""
    tensors = outer_tensors(2, 9, 64, 128)
    check(path, "outer", tensors | {name: 300 * normal(64)}, dict(num_heads=2), dtype)


@paths()
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(
    ("B", "N", "S", "C", "E", "H"),
    [
        pytest.param(2, 5, 16, 24, 384, 6, marks=everywhere),
        (1, 33, 4, 10, 48, 3),
        pytest.param(3, 1, 16, 40, 640, 10, marks=wide),
        pytest.param(2, 9, 5, 6, 200, 2, marks=wide),
    ],
)
def test_outer_of_a_fold(B, N, S, C, E, H, legacy, path, dtype):
    check(path, "outer", with_fold(B, N, S, C, E, 64, legacy), dict(num_heads=H), dtype)


@paths("float32", "bfloat16 float32")
def test_outer_of_a_fold_with_drop_path_and_without_biases(path, dtype):
    tensors = with_fold(2, 5, 16, 12, 24, 48, False) | dict.fromkeys(("proj_bias", "norm1_bias", "fold_norm1_bias"))
    check(path, "outer", tensors, dict(num_heads=3), dtype)
    scales = dict(attn_scale=torch.tensor([0.0, 2.0]).double(), mlp_scale=torch.tensor([1.25, 0.0]).double())
    check(path, "outer", with_fold(2, 5, 16, 12, 24, 48, False) | scales, dict(num_heads=3), dtype)
