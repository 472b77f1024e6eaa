"""The fused operations against the reference in float64, by the one rule of the house:

    max|fused − ref64| <= 2·max|same-dtype reference − ref64| + 4·eps(dtype)·max|ref64|

On a GPU the compiled kernels run; without one Triton's interpreter runs them, and what they compile to runs on the CPU
(``helpers.paths``). Memory that a kernel does not write is NaN.
"""

import copy
import mmap
from contextlib import nullcontext

import pytest
import timm
import torch
from fuzz import DRAWS, off_by_rounding
from helpers import KernelPath, Tf32Products, call, lay, paths, perturb, results
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from tnt_fast import kernels, reference, why_not_fused
from tnt_fast.kernels.inner import Sizes
from tnt_fast.kernels.operation import Gpu, precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(
    path: KernelPath, operation: str, tensors: dict, others: dict, dtype: torch.dtype, gradients: bool = True, draws: tuple = ()
) -> None:
    """Output and every gradient of an operation, by the rule. ``tensors``: float64 on the CPU, or None; others get none.

    PyTorch's own error is the largest of its results and those with the weights off by rounding in ``draws`` ways.
    """
    fused, plain = kernels.OPERATIONS[operation], getattr(reference, operation)

    def off(draw: int) -> dict:
        rounded = {k: v if v is None else v.to(dtype) for k, v in tensors.items()}
        if draw:
            rounded |= {k: off_by_rounding(v, dtype, draw) for k, v in rounded.items() if v is not None and k != "pixel"}
        return rounded

    found = results(fused, tensors, others, dtype, dtype, path.device, gradients)
    with path.as_reference():
        own = [results(plain, off(draw), others, dtype, dtype, path.device, gradients) for draw in (0, *draws)]
    for name, exact in results(plain, tensors, others, dtype, torch.float64, gradients=gradients).items():
        same = max([x[name] for x in own], key=lambda x: (x.double().cpu() - exact).abs().max().item())
        path.rule(f"{operation}, {name}", found[name], same, exact, dtype)


def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale + mean


def fold_tensors(B, N, S, C, E, legacy, mean=0.5, scale=1.0):
    width = C if legacy else S * C
    return dict(
        pixel=normal(B * N, S, C, scale=scale, mean=mean), patch=normal(B, 1 + N, E),
        norm1_weight=normal(width, scale=0.3, mean=1), norm1_bias=normal(width, scale=0.3),
        proj_weight=normal(E, S * C, scale=(S * C) ** -0.5), proj_bias=normal(E) if legacy else None,
        norm2_weight=None if legacy else normal(E, scale=0.3, mean=1), norm2_bias=None if legacy else normal(E, scale=0.3),
    )  # fmt: skip


def inner_tensors(P, S, C, M, bias=False, mean=0.5, scale=1.0):
    return dict(
        pixel=normal(P, S, C, scale=scale, mean=mean),
        norm1_weight=normal(C, scale=0.3, mean=1), norm1_bias=normal(C, scale=0.3),
        qk_weight=normal(2 * C, C, scale=1.5 * C**-0.5), qk_bias=normal(2 * C, scale=0.3) if bias else None,
        v_weight=normal(C, C, scale=C**-0.5), v_bias=normal(C, scale=0.3) if bias else None,
        proj_weight=normal(C, C, scale=C**-0.5), proj_bias=normal(C, scale=0.3),
        norm2_weight=normal(C, scale=0.3, mean=1), norm2_bias=normal(C, scale=0.3),
        fc1_weight=normal(M, C, scale=C**-0.5), fc1_bias=normal(M, scale=0.3),
        fc2_weight=normal(C, M, scale=M**-0.5), fc2_bias=normal(C, scale=0.3),
    )  # fmt: skip


def embed_case(B, channels, H, W, C, patch, stride, step, legacy):
    tensors = dict(
        image=normal(B, channels, H, W, mean=0.3), weight=normal(C, channels, 7, 7, scale=(49 * channels) ** -0.5),
        bias=normal(C), pixel_pos=normal(1, C, patch[0] // stride, patch[1] // stride),
    )  # fmt: skip
    return tensors, dict(patch_size=patch, stride=stride, patch_stride=step, legacy=legacy)


def one_by_one(tensors, fc1=0.6):
    """``inner_tensors`` whose output is the hidden channels, each with few others: a mistake in any one of them decides it."""
    C, M = tensors["fc2_weight"].shape
    hidden = torch.eye(C, dtype=torch.float64).repeat(1, -(-M // C))[:, :M] * (-1.0) ** (torch.arange(M) // C)
    small = {name: 1e-2 * tensors[name] for name in ("pixel", "proj_weight", "proj_bias", "fc1_bias", "fc2_bias")}
    return tensors | small | dict(fc1_weight=fc1 * tensors["fc1_weight"], fc2_weight=hidden)


def spiked(tensors, factor):
    """``inner_tensors`` where a hidden channel has one weight so many times as large as the others, each in another column.

    Normalised pixels are about ±1 all over: hidden values far from 0, where their signs would be a matter of rounding.
    """
    weight = tensors["fc1_weight"].clone()
    row, channels = torch.arange(weight.shape[0]), weight.shape[1]
    weight[row, row * 7 % channels] *= factor
    level = torch.where(torch.arange(channels) % 2 == 0, 3.0, -3.0)
    return tensors | dict(fc1_weight=weight, pixel=level + 0.2 * tensors["pixel"], proj_weight=0.1 * tensors["proj_weight"])


def growing(tensors, by):
    """``fold_tensors`` whose pixels grow along the patch, so that its parts have means of their own."""
    return tensors | dict(pixel=tensors["pixel"] + by * torch.linspace(-1, 1, tensors["pixel"].shape[1])[:, None])


def shrunk(tensors):
    """``fold_tensors`` with small values before either norm: what is none of them outweighs them."""
    return tensors | {name: 0.02 * tensors[name] for name in ("pixel", "proj_weight")}


def case(operation: str):
    """Tensors and other arguments of a small call."""
    if operation == "pixel_embed":
        return embed_case(2, 3, 32, 32, 12, (16, 16), 4, (16, 16), False)
    if operation == "inner":
        return inner_tensors(3, 16, 12, 48, bias=True), dict(num_heads=2)
    return fold_tensors(2, 3, 16, 12, 24, False) | {"proj_bias": normal(24)}, {}


# ---- pixel_embed ----


@paths()
@pytest.mark.parametrize("legacy", [False, True], ids=["patches", "legacy"])
@pytest.mark.parametrize(
    ("B", "channels", "H", "W", "C", "patch", "stride", "step"),
    [
        pytest.param(2, 3, 32, 48, 24, (16, 16), 4, (16, 16), marks=everywhere),
        (1, 3, 32, 32, 6, (16, 16), 2, (16, 16)),
        (3, 3, 16, 32, 96, (16, 16), 8, (16, 16)),
        (1, 1, 40, 24, 40, (16, 16), 4, (8, 8)),
        (1, 4, 48, 24, 12, (24, 12), 4, (24, 12)),
        (1, 3, 16, 48, 24, (16, 16), 4, (16, 16)),
        (2, 4, 32, 16, 40, (16, 16), 4, (16, 16)),
    ],
    ids=["S", "stride2", "stride8", "overlap", "S18", "odd", "B4"],
)
def test_pixel_embed(B, channels, H, W, C, patch, stride, step, legacy, path, dtype):
    check(path, "pixel_embed", *embed_case(B, channels, H, W, C, patch, stride, step, legacy), dtype)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@paths("", "bfloat16 float16")
def test_pixel_embed_of_an_image_that_lies_far_apart(axis, path, dtype):
    tensors, others = embed_case(3, 3, 32, 48, 24, (16, 16), 4, (16, 16), False)
    tensors = {k: v.to(path.device, dtype) for k, v in tensors.items()}
    embed, results = kernels.OPERATIONS["pixel_embed"], []
    for image in (tensors["image"], lay(tensors["image"], axis)):
        given = tensors | {"image": image.requires_grad_(), "weight": tensors["weight"].requires_grad_()}
        out = embed(**given, **others)
        results.append((out, *torch.autograd.grad(out.square().sum(), (given["image"], given["weight"]))))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


@paths("float32", "bfloat16 float32")
def test_pixel_embed_takes_any_strides_and_no_bias_or_position(path, dtype):
    tensors, others = embed_case(2, 3, 32, 32, 24, (16, 16), 4, (16, 16), False)
    tensors |= {"bias": None, "pixel_pos": None}
    check(path, "pixel_embed", tensors, others, dtype)
    embed = kernels.OPERATIONS["pixel_embed"]
    image, weight = tensors["image"].to(path.device, dtype), tensors["weight"].to(path.device, dtype)
    expected = embed(image, weight, None, None, **others)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    wider = torch.randn(2, 3, 32, 80, device=path.device, dtype=dtype)
    wider[..., 5:69:2] = image
    assert torch.equal(embed(channels_last, weight, None, None, **others), expected)
    assert torch.equal(embed(wider[..., 5:69:2], weight, None, None, **others), expected)


# ---- fold ----


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


@pytest.mark.parametrize("eps", [1e-5, 1e4])
@pytest.mark.parametrize(("S", "C", "E"), [(5, 6, 200), (16, 24, 48)], ids=str)
@everywhere
@paths()
def test_fold_of_small_values(S, C, E, eps, path, dtype):
    check(path, "fold", shrunk(fold_tensors(2, 9, S, C, E, False)), dict(eps=eps), dtype)


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


# ---- inner ----


@paths()
@pytest.mark.parametrize("bias", [False, pytest.param(True, marks=wide)], ids=["", "qkv-bias"])
@pytest.mark.parametrize(
    ("P", "S", "C", "H", "M"),
    [
        pytest.param(11, 16, 24, 4, 96, marks=everywhere),
        (5, 16, 40, 4, 160), (9, 16, 12, 2, 48), (3, 64, 6, 2, 24), (7, 4, 96, 4, 384), (6, 16, 24, 8, 48),
        (5, 16, 32, 1, 64), (2, 16, 64, 4, 128), (1, 4, 24, 3, 96), (3, 9, 24, 4, 96),
    ],
    ids=lambda v: str(v),
)  # fmt: skip
def test_inner(P, S, C, H, M, bias, path, dtype):
    check(path, "inner", inner_tensors(P, S, C, M, bias), dict(num_heads=H), dtype)


@paths()
@pytest.mark.parametrize(
    ("P", "S", "C", "H", "fc1"), [(5, 16, 24, 4, 0.6), (5, 16, 40, 4, 2), (9, 16, 12, 2, 0.6), (4, 9, 24, 4, 2)], ids=str
)
def test_inner_where_each_hidden_channel_decides(P, S, C, H, fc1, path, dtype):
    check(path, "inner", one_by_one(inner_tensors(P, S, C, 4 * C), fc1), dict(num_heads=H, eps=1e-6), dtype)


@pytest.mark.parametrize(("mean", "scale"), [(1.0, 1.0), (0.0, 1e-3)], ids=["mean", "spread"])
@paths()
def test_inner_of_large_means_and_small_spread(mean, scale, path, dtype):
    mean *= 100 if dtype == torch.float32 else 10
    check(path, "inner", inner_tensors(6, 16, 24, 96, mean=mean, scale=scale), dict(num_heads=4), dtype, gradients=False)


@paths()
def test_inner_of_outliers(path, dtype):
    tensors = inner_tensors(6, 16, 24, 96)
    tensors["pixel"][::2, 3, 5] = 300.0
    tensors["pixel"][1::2, 7] *= 50
    check(path, "inner", tensors, dict(num_heads=4), dtype, gradients=False)


@everywhere
@paths(interpreter="", compiled="float32")
def test_weights_gradients_are_sums_of_many_turns(path, dtype):
    """A sum that goes on from turn to turn may be rounded at every turn, not at every row: which the compiler made of it."""
    check(path, "inner", inner_tensors(40, 16, 12, 48), dict(num_heads=2), dtype)


@paths()
@pytest.mark.parametrize("which", [("attn_scale", "mlp_scale"), ("attn_scale",), ("mlp_scale",)], ids="+".join)
def test_inner_with_drop_path(which, path, dtype):
    tensors = inner_tensors(5, 16, 24, 96)
    scales = dict(attn_scale=torch.tensor([0, 2, 1, 0, 1.25]), mlp_scale=torch.tensor([2, 0, 1, 0, 1.25]))
    check(path, "inner", tensors, dict(num_heads=4, **{name: scales[name] for name in which}), dtype)


@paths()
def test_dropped_branches_leave_the_input_and_its_gradient_as_they_are(path, dtype):
    given = {k: None if v is None else v.to(path.device, dtype) for k, v in inner_tensors(3, 16, 24, 96).items()}
    given["pixel"].requires_grad_()
    scale = torch.tensor([1.0, 0.0, 2.0], device=path.device, dtype=dtype)
    out = call(kernels.OPERATIONS["inner"], **given, num_heads=4, attn_scale=scale, mlp_scale=scale)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, given["pixel"], upstream)
    assert torch.equal(out[1], given["pixel"][1])
    assert torch.equal(gradient[1], upstream[1])
    assert not torch.equal(out[0], given["pixel"][0])


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


@pytest.mark.parametrize("absent", ["norm1_bias", "proj_bias", "norm2_bias", "fc1_bias", "fc2_bias", "all"])
@paths("float32", "bfloat16 float32")
def test_inner_without_biases(absent, path, dtype):
    every = ("norm1_bias", "proj_bias", "norm2_bias", "fc1_bias", "fc2_bias")
    tensors = inner_tensors(5, 16, 24, 96) | dict.fromkeys(every if absent == "all" else (absent,))
    check(path, "inner", tensors, dict(num_heads=4), dtype)


@pytest.mark.parametrize("operation", ["pixel_embed", "inner", "fold"])
@paths("float32", "bfloat16 float32")
def test_any_strides_of_any_tensor(operation, path, dtype):
    """Values between those of a tensor are NaN; expanded ones are the same throughout."""
    tensors, others = case(operation)
    given = {k: None if v is None else v.to(path.device, dtype) for k, v in tensors.items()}
    function = kernels.OPERATIONS[operation]

    def results(given):
        given = {k: v if v is None else v.detach().requires_grad_() for k, v in given.items()}
        out = call(function, **given, **others)
        return [out, *torch.autograd.grad(out.square().sum(), [v for v in given.values() if v is not None])]

    expected = results(given)
    for name, tensor in given.items():
        if tensor is None:
            continue
        wider = torch.full([2 * size + 3 for size in tensor.shape], float("nan"), device=path.device, dtype=dtype)
        gaps = wider[tuple(slice(3, None, 2) for _ in tensor.shape)]
        gaps.copy_(tensor)
        turned = tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
        for strided in (gaps, turned):
            for found, right in zip(results(given | {name: strided}), expected, strict=True):
                assert torch.equal(found, right), name
                assert found.is_contiguous(), name
        if tensor.ndim == 1:
            flat = tensor[:1].expand_as(tensor)
            for found, right in zip(results(given | {name: flat}), results(given | {name: flat.contiguous()}), strict=True):
                assert torch.equal(found, right), name


@paths()
@pytest.mark.parametrize(("S", "C", "H", "scale"), [(3, 63, 3, 45), (3, 24, 1, 20), (2, 12, 2, 30)], ids=str)
def test_gradients_of_saturated_attention(S, C, H, scale, path, dtype):
    """Where P is 1, what is taken off dP is dP itself. Few keys, or ties between two of them decide instead.

    Scores of thousands are off by several where q and k are rounded to bfloat16, and the gradient is e to their differences.
    So PyTorch's own error, from one seed to the next between 1e-34 and 1e3, is taken from several draws of such rounding.
    """
    tensors = inner_tensors(7, S, C, 4 * C)
    tensors["qk_weight"] *= scale / 1.5
    check(path, "inner", tensors, dict(num_heads=H), dtype, draws=DRAWS)


@paths()
@pytest.mark.parametrize(("P", "S"), [(5, 9), (7, 16), (3, 4), (1, 1)], ids=str)
def test_inner_without_an_eps(P, S, path, dtype):
    check(path, "inner", inner_tensors(P, S, 24, 96), dict(num_heads=4, eps=0.0), dtype)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3, 1e-1], ids=str)
@pytest.mark.parametrize("legacy", [False, True], ids=["norms", "legacy"])
@pytest.mark.parametrize(("S", "C"), [(16, 12), (16, 24), (9, 5)], ids=str)
@wide
@paths("float32", "float32")
def test_rows_that_are_nearly_constant_far_from_zero(S, C, legacy, spread, path, dtype):
    pixel = 1000 + spread * normal(6, S, C)
    # of equal pixels that are no power of two, the gradient of q and k is 0 to the bit in PyTorch, and rounding here
    gradients = spread > 0 or S == 16
    check(path, "inner", inner_tensors(6, S, C, 4 * C) | {"pixel": pixel}, dict(num_heads=1), dtype, gradients)
    check(path, "fold", fold_tensors(2, 3, S, C, 20, legacy) | {"pixel": pixel}, {}, dtype)


@wide
@pytest.mark.parametrize("value", [1000.0, 777.7])
@paths("float32", "float32")
def test_folds_second_norm_of_rows_that_are_nearly_constant_far_from_zero(value, path, dtype):
    tensors = fold_tensors(2, 3, 16, 12, 24, False)
    tensors["proj_weight"] *= 0
    check(path, "fold", tensors | {"proj_bias": torch.full((24,), value, dtype=torch.float64)}, {}, dtype)


@pytest.mark.parametrize("scales", [False, True], ids=["", "drop-path"])
@pytest.mark.parametrize(
    ("name", "factor", "gradients"),
    [
        ("fc2_weight", 1.0, True), ("fc2_weight", 2e4, False), ("fc2_weight", 1e-7, False), ("fc1_weight", 3e3, True),
        ("norm2_weight", 3e3, True), ("fc1_bias", 6e4, True),
    ],
    ids=str,
)  # fmt: skip
def test_gelu_in_pairs_takes_weights_of_any_size(name, factor, gradients, scales, monkeypatch):
    """What bfloat16 does on a GPU, here with float16 for it: its results have to stay in range, the weights need not."""
    inner, derive, set_ = kernels.OPERATIONS["inner"], Sizes.__post_init__, object.__setattr__
    tensors = {k: v if v is None else v.half().float() for k, v in inner_tensors(5, 16, 24, 96).items()}
    tensors[name] = tensors[name] * factor
    small = 1e-5 if name == "fc2_weight" and factor > 1 else 1.0  # hidden values of 1e-5, or the result overflows
    tensors |= {k: tensors[k] * small for k in ("norm2_weight", "norm2_bias", "fc1_bias")}
    if factor < 1:
        tensors |= {k: tensors[k] * 1e-4 for k in ("pixel", "proj_weight", "proj_bias", "fc2_bias")}
    others = dict(num_heads=4, eps=1e-12)
    if scales:
        others |= dict.fromkeys(("attn_scale", "mlp_scale"), torch.tensor([0, 2, 1, 0, 1.25]))
    results = []
    for function, device, kind in (
        (inner, DEVICE, torch.float32), (inner, DEVICE, torch.float32), (reference.inner, "cpu", torch.float64),
    ):  # fmt: skip
        monkeypatch.setattr(Sizes, "__post_init__", lambda Z, pairs=not results: (derive(Z), set_(Z, "PAIRS", pairs)))
        given = {k: v if v is None else v.to(device, kind).requires_grad_() for k, v in tensors.items()}
        fixed = {k: v.to(device, kind) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
        with torch.autocast(device, torch.float16, enabled=function is inner):  # float32 weights, float16 products
            out = call(function, **given, **fixed).to(kind)
        wanted = [v for v in given.values() if v is not None] if gradients else []
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        results.append([out.detach().cpu(), *(g.cpu() for g in (torch.autograd.grad(out, wanted, upstream) if wanted else ()))])
    for found, plain, exact in zip(*results, strict=True):
        assert found.isfinite().all()
        own = (plain.double() - exact).abs().max()  # without pairs: not finite where fc2's weights are not
        rounding = 4 * torch.finfo(torch.float16).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= (2 * own + rounding if own.isfinite() else 2 * rounding)


@pytest.mark.parametrize(
    ("factors", "others"),
    [
        ({"fc2_weight": 1e6}, {}), ({"fc2_weight": 1e30}, {}), ({"fc1_weight": 1e5}, {}), ({"fc1_bias": 1e6}, {}),
        ({"fc1_bias": 1e30}, {}), ({"norm2_weight": 1e7}, {}), ({"pixel": 1e18}, {}),
        (dict.fromkeys(("pixel", "fc2_weight", "fc2_bias", "proj_weight", "proj_bias"), 1e-8), {"eps": 1e-20}),
    ],
    ids=["fc2", "fc2-1e30", "fc1", "fc1-bias", "fc1-bias-1e30", "norm2", "pixel", "small"],
)  # fmt: skip
@paths("", "bfloat16")
def test_bfloat16_takes_tensors_of_any_size(factors, others, path, dtype):
    tensors = inner_tensors(5, 16, 24, 96)
    tensors |= {name: tensors[name] * factor for name, factor in factors.items()}
    check(path, "inner", tensors, dict(num_heads=4, **others), dtype)


@pytest.mark.parametrize(
    ("C", "M", "name", "factor"),
    [
        (24, 96, "fc1_weight", 1e6), (24, 96, "norm2_bias", 1e6), (24, 97, "fc2_weight", 1e6), (12, 48, "fc1_weight", 1e6),
        (40, 160, "fc1_weight", 1e6),
    ],
    ids=str,
)  # fmt: skip
@paths("", "bfloat16")
def test_bfloat16_takes_one_large_weight_a_channel(C, M, name, factor, path, dtype):
    tensors = inner_tensors(5, 16, C, M)
    if name == "fc2_weight":  # all that does not fit into float16 is the last hidden channel's, alone in its slice
        tensors[name][:, -1] *= factor
    elif name == "norm2_bias":
        tensors[name][5] = factor
    else:
        tensors = spiked(tensors, factor)
    check(path, "inner", tensors, dict(num_heads=2), dtype)


@paths("", "bfloat16 float16")
@pytest.mark.parametrize(("S", "C"), [(4, 96), (9, 24), (16, 12)], ids=str)
def test_saturated_attention(S, C, path, dtype):
    """Scores so far apart that a maximum over some of them only makes powers that are not finite."""
    tensors = inner_tensors(5, S, C, 4 * C)
    tensors["qk_weight"] *= 6
    check(path, "inner", tensors, dict(num_heads=4 if C > 12 else 2), dtype, gradients=False)


# ---- all ----


@pytest.mark.parametrize("operation", ["pixel_embed", "inner", "fold"])
def test_nothing_in_nothing_out(operation):
    if operation == "pixel_embed":
        tensors, others = embed_case(0, 3, 32, 32, 24, (16, 16), 4, (16, 16), False)
    elif operation == "inner":
        tensors, others = inner_tensors(0, 16, 24, 96), dict(num_heads=4)
    else:
        tensors, others = fold_tensors(0, 4, 16, 24, 48, False), {}
    given = {k: None if v is None else v.float().to(DEVICE) for k, v in tensors.items()}
    out = call(kernels.OPERATIONS[operation], **given, **others)
    assert out.shape == call(getattr(reference, operation), **given, **others).shape
    assert out.numel() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("S", [4, 16])
@paths("float32", "bfloat16 float32")
def test_nan_and_infinity_stay_in_their_patch(S, bad, path, dtype):
    inner, fold = (kernels.OPERATIONS[name] for name in ("inner", "fold"))
    tensors = {k: None if v is None else v.to(path.device, dtype) for k, v in inner_tensors(9, S, 24, 96).items()}
    clean = call(inner, **tensors, num_heads=4)
    tensors["pixel"] = tensors["pixel"].clone()
    tensors["pixel"][4, 1, 2] = bad
    out = call(inner, **tensors, num_heads=4)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(out[others], clean[others])
    assert torch.equal(out[4].isnan(), call(reference.inner, **tensors, num_heads=4)[4].isnan())
    tensors = {k: None if v is None else v.to(path.device, dtype) for k, v in fold_tensors(3, 3, S, 24, 48, False).items()}
    clean = fold(**tensors)
    tensors["pixel"] = tensors["pixel"].clone()
    tensors["pixel"][4, 1, 2] = bad
    out = fold(**tensors)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


@paths(compiled="", gpu="bfloat16 float16 float32 tf32")  # the machine cannot but give the same bits: it faults at a race
@pytest.mark.parametrize(("C", "E"), [(12, 192), (24, 384), (40, 640)], ids=["ti", "s", "b"])
@pytest.mark.parametrize("operation", ["pixel_embed", "inner", "fold"])
def test_the_same_bits_twice(operation, C, E, path, dtype):
    tensors, others = (
        embed_case(2, 3, 32, 48, C, (16, 16), 4, (16, 16), False) if operation == "pixel_embed"
        else (inner_tensors(13, 16, C, 4 * C), dict(num_heads=2)) if operation == "inner"
        else (fold_tensors(2, 7, 16, C, E, False), {})
    )  # fmt: skip
    given = {k: None if v is None else v.to(path.device, dtype) for k, v in tensors.items()}
    function = kernels.OPERATIONS[operation]
    assert torch.equal(call(function, **given, **others), call(function, **given, **others))


@pytest.mark.parametrize("operation", ["pixel_embed", "inner", "fold"])
def test_opcheck(operation):
    tensors, others = (
        embed_case(1, 3, 16, 32, 12, (16, 16), 4, (16, 16), False) if operation == "pixel_embed"
        else (inner_tensors(3, 16, 12, 48), dict(num_heads=2, eps=1e-5, a=None, m=None)) if operation == "inner"
        else (fold_tensors(1, 3, 16, 12, 24, False), dict(eps=1e-5))
    )  # fmt: skip
    given = [None if v is None else v.float().to(DEVICE).requires_grad_() for v in tensors.values()]
    others = [list(v) if isinstance(v, tuple) else v for v in others.values()]
    torch.library.opcheck(getattr(torch.ops.tnt_fast, operation).default, (*given, *others))


@paths()
@pytest.mark.parametrize("variant", ["ti", "s", "s_legacy", "b"])
def test_whole_models(variant, path, dtype):
    exact = perturb(timm.create_model(f"tnt_fast_{variant}_patch16_224", depth=2, img_size=(32, 48), num_classes=7)).eval()
    exact = exact.to(dtype)
    image = torch.randn(2, 3, 32, 48).to(dtype)
    outputs = []
    for backend in ("fused", "reference"):
        model = timm.create_model(
            f"tnt_fast_{variant}_patch16_224", depth=2, img_size=(32, 48), num_classes=7, backend=backend, dtype=dtype
        ).eval()
        model.load_state_dict(exact.state_dict())
        model.to(path.device)
        assert backend == "reference" or why_not_fused(model, image.to(path.device)) == []
        with torch.no_grad(), path.as_reference() if backend == "reference" else nullcontext():
            outputs.append(model(image.to(path.device)))
    exact.backend = "reference"
    path.rule(variant, *outputs, exact.double()(image.double()).detach(), dtype)


@paths("float16", "bfloat16 float16")
def test_autocast_with_float32_weights(path, dtype):
    model = perturb(timm.create_model("tnt_fast_ti_patch16_224", depth=2, img_size=32, num_classes=7)).to(path.device)
    image = torch.randn(2, 3, 32, 32, device=path.device)
    exact = reference_output = None
    for backend in ("reference", "fused"):
        model.backend = backend
        with torch.autocast(path.device, dtype):
            out = model(image)
            assert out.dtype == dtype
        if backend == "reference":
            reference_output = out.detach()
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    model.backend = "reference"
    exact = copy.deepcopy(model).double().cpu()(image.double().cpu()).detach()
    path.rule("autocast", out.detach(), reference_output, exact, dtype)


def test_fused_operations_count_as_many_flops_as_the_reference():
    model = timm.create_model("tnt_fast_ti_patch16_224", depth=2, img_size=32).eval().to(DEVICE)
    counts = []
    for backend in ("reference", "fused"):
        model.backend = backend
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(2, 3, 32, 32, device=DEVICE))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert {str(op) for op in counter.get_flop_counts()["Global"]} >= {
        f"tnt_fast.{n}" for n in ("pixel_embed", "inner", "fold")
    }


def test_fused_is_fused(monkeypatch):
    """The reference's pieces raise, but for the outer transformer, which has no kernel; the fused path still answers."""
    model = timm.create_model("tnt_fast_ti_patch16_224", depth=2, img_size=32, backend="fused").eval().to(DEVICE)
    image = torch.randn(1, 3, 32, 32, device=DEVICE)
    expected = model(image)
    attention_weights, cat = reference.attention_weights, torch.cat

    def forbidden(*args, **kwargs):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "cut_patches", forbidden)
    monkeypatch.setattr(reference, "as_pixels", forbidden)
    monkeypatch.setattr(
        reference, "attention_weights", lambda qk, heads: forbidden() if qk.shape[1] == 16 else attention_weights(qk, heads)
    )
    monkeypatch.setattr(torch, "cat", lambda tensors, dim=0: forbidden() if tensors[0].ndim == 3 else cat(tensors, dim))
    assert torch.equal(model(image), expected)
    model.backend = "reference"
    with pytest.raises(AssertionError, match="the reference was called"):
        model(image)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_fused_model_trains_compiles_and_exports(legacy):
    kwargs = dict(img_size=32, embed_dim=24, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=3, num_classes=5)
    from tnt_fast import TNT

    fused = perturb(TNT(**kwargs, legacy=legacy, backend="fused")).to(DEVICE)
    image = torch.randn(2, 3, 32, 32, device=DEVICE, requires_grad=True)
    gradients = []
    for backend in ("fused", "reference"):
        fused.backend = backend
        gradients.append(torch.autograd.grad(fused(image).square().sum(), [image, *fused.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    fused.backend = "fused"
    expected = fused(image)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    out = compiled(image)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), [image, *fused.parameters()])
    for a, b in zip(found, gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    program = torch.export.export(fused.eval(), (image.detach(),))
    assert any("tnt_fast.inner" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(image.detach()), expected)


def test_float32_products_follow_pytorchs_settings(monkeypatch):
    monkeypatch.setattr("tnt_fast.kernels.operation.runner", Gpu())
    assert precision(torch.float32) == "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        matmul.allow_tf32 = True
        assert precision(torch.float32) == "tf32"
        assert precision(torch.float16) == "ieee"
        matmul.allow_tf32 = False
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "tf32"
            assert precision(torch.float32) == "tf32"
    finally:
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "none"
        matmul.allow_tf32 = False
    assert precision(torch.float32) == "ieee"


# ---- what only a GPU can show ----


@paths("", "", "bfloat16 float16 float32")
@pytest.mark.parametrize(("C", "H"), [(12, 2), (24, 4), (40, 4)], ids=["ti", "s", "b"])
def test_inner_at_full_size_over_many_seeds(C, H, path, dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        check(path, "inner", inner_tensors(1571, 16, C, 4 * C), dict(num_heads=H), dtype, gradients=False)


@paths("", "", "bfloat16 float16 float32")
@pytest.mark.parametrize(("C", "E", "legacy"), [(12, 192, False), (24, 384, False), (24, 384, True), (40, 640, False)])
def test_fold_and_pixel_embed_at_full_size_over_many_seeds(C, E, legacy, path, dtype):
    for seed in range(10):
        torch.manual_seed(seed)
        check(path, "fold", fold_tensors(3, 196, 16, C, E, legacy), {}, dtype, gradients=False)
        check(path, "pixel_embed", *embed_case(3, 3, 224, 224, C, (16, 16), 4, (16, 16), legacy), dtype, gradients=False)


@wide
@paths("", "bfloat16 float16", "bfloat16")
def test_addresses_past_two_to_the_31(path, dtype, monkeypatch):
    """Compiled, the last programs run; of the pixels only theirs take memory."""
    S, C, P = 16, 40, 2**31 // 640 + 37
    if path.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", path.device == "cuda")
    weights = {k: None if v is None else v.to(path.device, dtype) for k, v in inner_tensors(1, S, C, 160).items()}
    del weights["pixel"]
    inner, tail = kernels.OPERATIONS["inner"], torch.randn(50, S, C).to(path.device, dtype)
    expected = inner(tail, **weights, num_heads=4)
    if path.executor:
        pixel = torch.frombuffer(mmap.mmap(-1, 2 * P * S * C), dtype=dtype).view(P, S, C)
        monkeypatch.setattr(path.executor, "multiprocessors", 2**31)  # a turn for each program
        monkeypatch.setattr(path.executor, "chosen", slice(-4, None))
    else:
        pixel = torch.zeros(P, S, C, device=path.device, dtype=dtype)
    pixel[-50:] = tail
    last = 12 if path.executor else 48
    assert torch.equal(inner(pixel, **weights, num_heads=4)[-last:], expected[-last:])
    monkeypatch.undo()


def test_the_references_tf32_rounds_the_factors_of_products():
    x = torch.tensor([[1 + 2**-11], [-1 - 2**-11], [1 + 2**-12], [float("inf")]])
    rounded = torch.tensor([[1 + 2**-10], [-1 - 2**-10], [1.0], [float("inf")]])  # to nearest, ties away from 0
    bias, one = torch.tensor([2.0**-20]), torch.ones(1, 1, requires_grad=True)
    with Tf32Products():
        out = torch.nn.functional.linear(x, one, bias)
        (gradient,) = torch.autograd.grad(torch.nn.functional.linear(x[:3], one).sum(), one)
    assert torch.equal(out, rounded + bias)
    assert gradient.item() == 1
    with Tf32Products():
        assert torch.equal(torch.nn.functional.conv1d(x[:3, None], one[None]), rounded[:3, None])
        assert torch.equal(x[None, :3] @ one, rounded[None, :3])
        assert torch.equal(x.double() @ one.double(), x.double())


# ---- bad input ----


@pytest.mark.parametrize("operation", ["pixel_embed", "inner", "fold"])
def test_a_tensor_on_the_cpu_is_refused_outside_the_interpreter(operation, monkeypatch):
    monkeypatch.setattr("tnt_fast.kernels.operation.runner", Gpu())
    tensors, others = (
        embed_case(1, 3, 16, 16, 24, (16, 16), 4, (16, 16), False) if operation == "pixel_embed"
        else (inner_tensors(1, 16, 24, 96), dict(num_heads=4)) if operation == "inner"
        else (fold_tensors(1, 1, 16, 24, 48, False), {})
    )  # fmt: skip
    given = {k: None if v is None else v.float() for k, v in tensors.items()}
    with pytest.raises(
        ValueError, match=rf"{operation}: \w+ is on device 'cpu'; the kernel takes CUDA tensors .*TRITON_INTERPRET=1"
    ):
        call(kernels.OPERATIONS[operation], **given, **others)


def test_what_an_operation_does_not_take_is_named():
    inner, fold, embed = (kernels.OPERATIONS[name] for name in ("inner", "fold", "pixel_embed"))
    good = {k: None if v is None else v.float().to(DEVICE) for k, v in inner_tensors(3, 16, 24, 96).items()}
    with pytest.raises(TypeError, match=r"inner: pixel is torch\.float64; accepted: torch\.bfloat16"):
        call(inner, **{**good, "pixel": good["pixel"].double()}, num_heads=4)
    with pytest.raises(TypeError, match=r"inner: v_weight is torch\.float16, pixel is torch\.float32"):
        call(inner, **{**good, "v_weight": good["v_weight"].half()}, num_heads=4)
    with pytest.raises(ValueError, match=r"inner: fc1_weight has shape \(96, 20\); expected \(96, 24\)"):
        call(inner, **{**good, "fc1_weight": good["fc1_weight"][:, :20]}, num_heads=4)
    with pytest.raises(ValueError, match=r"inner: 5 heads do not divide C=24"):
        call(inner, **good, num_heads=5)
    good = {k: None if v is None else v.float().to(DEVICE) for k, v in fold_tensors(2, 3, 16, 12, 24, False).items()}
    with pytest.raises(ValueError, match="fold: pixel has 6 patches, patch has 2 images with 2 each"):
        fold(**{**good, "patch": good["patch"][:, 1:]})
    with pytest.raises(ValueError, match=r"fold: norm1_weight has 20 values; accepted: S·C=192, or C=12"):
        fold(**{**good, "norm1_weight": good["norm1_weight"][:20]})
    with pytest.raises(ValueError, match=r"pixel_embed: weight has shape \(24, 3, 5, 5\); expected \(24, 3, 7, 7\)"):
        embed(
            torch.zeros(1, 3, 16, 16, device=DEVICE), torch.zeros(24, 3, 5, 5, device=DEVICE), None, None, (16, 16), 4, (16, 16)
        )
    if DEVICE == "cuda":
        good = {k: v if v is None else v.float() for k, v in inner_tensors(3, 16, 24, 96).items()}
        good["pixel"] = good["pixel"].cuda()
        with pytest.raises(ValueError, match="inner: norm1_weight is on 'cpu', pixel on 'cuda:0'"):
            call(inner, **good, num_heads=4)
