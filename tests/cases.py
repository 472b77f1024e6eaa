"""Calls of the operations that tests share, and the one rule of the house for them:

    max|fused − ref64| <= 2·max|same-dtype reference − ref64| + 4·eps(dtype)·max|ref64|

On a GPU the compiled kernels run; without one Triton's interpreter runs them, and what they compile to runs on the CPU
(``helpers.paths``). Memory that a kernel does not write is NaN.
"""

import torch
from fuzz_rule import off_by_rounding
from helpers import KernelPath, results

from tnt_fast import kernels, reference


def check(
    path: KernelPath, operation: str, tensors: dict, others: dict, dtype: torch.dtype, gradients: bool = True, draws: tuple = ()
) -> None:
    """Output and every gradient of an operation, by the rule. ``tensors``: float64 on the CPU, or None; others get none.

    PyTorch's own error is the largest of its results and those with the weights off by rounding in ``draws`` ways: by TF32's,
    where that is asked. It may take it or leave it, and does where a product is small.
    """
    fused, plain = kernels.OPERATIONS[operation], getattr(reference, operation)

    def off(draw: int) -> dict:
        rounded = {k: v if v is None else v.to(dtype) for k, v in tensors.items()}
        if draw:
            eps_of = torch.float16 if path.tf32 else dtype  # of TF32's fraction
            rounded |= {k: off_by_rounding(v, eps_of, draw) for k, v in rounded.items() if v is not None and k != "pixel"}
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


def outer_tensors(B, T, E, M, bias=False, mean=0.5, scale=1.0):
    tensors = inner_tensors(1, 1, E, M, bias)
    return {"patch": normal(B, T, E, scale=scale, mean=mean)} | {k: v for k, v in tensors.items() if k != "pixel"}


def with_fold(B, N, S, C, E, M, legacy, **more):
    """``outer_tensors`` of a fold."""
    folded = fold_tensors(B, N, S, C, E, legacy)
    tensors = outer_tensors(B, 1 + N, E, M, **more) | {"pixel": folded.pop("pixel"), "patch": folded.pop("patch")}
    return tensors | {f"fold_{name}": x for name, x in folded.items()}


def block_tensors(B, N, S, C, E, M, F, legacy, **more):
    """Of M hidden channels inside and F outside."""
    of_inner = inner_tensors(B * N, S, C, M, **more)
    tensors = {"pixel": of_inner.pop("pixel")} | with_fold(B, N, S, C, E, F, legacy, **more)
    return tensors | {f"inner_{name}": x for name, x in of_inner.items()}


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


def by_bits(rows, width):
    """Rows whose values grow with the bits that are set in their column: a sum that misses any half of the columns is off."""
    bits = torch.tensor([column.bit_count() for column in range(width)], dtype=torch.float64)
    return 1.4**bits * (1 + 0.1 * torch.randn(rows, width, dtype=torch.float64))


def shrunk(tensors):
    """``fold_tensors`` with small values before either norm: what is none of them outweighs them."""
    return tensors | {name: 0.02 * tensors[name] for name in ("pixel", "proj_weight")}


def case(operation: str):
    """Tensors and other arguments of a small call."""
    if operation == "pixel_embed":
        return embed_case(2, 3, 32, 32, 12, (16, 16), 4, (16, 16), False)
    if operation == "inner":
        return inner_tensors(3, 16, 12, 48, bias=True), dict(num_heads=2)
    if operation == "outer":
        return with_fold(2, 4, 16, 12, 24, 48, False, bias=True), dict(num_heads=3)
    if operation == "block":
        return block_tensors(2, 4, 16, 12, 24, 48, 48, False, bias=True), dict(inner_heads=2, num_heads=3)
    return fold_tensors(2, 3, 16, 12, 24, False) | {"proj_bias": normal(24)}, {}
