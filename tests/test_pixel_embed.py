"""pixel_embed against the reference in float64 (``cases.check``)."""

import pytest
import torch
from cases import check, embed_case
from helpers import lay, paths

pytest.importorskip("triton")

from tnt_fast import kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide


@paths()
@pytest.mark.parametrize("legacy", [False, True], ids=["patches", "legacy"])
@pytest.mark.parametrize(
    ("B", "channels", "H", "W", "C", "patch", "stride", "step"),
    [
        pytest.param(2, 3, 32, 48, 24, (16, 16), 4, (16, 16), marks=everywhere),
        pytest.param(1, 3, 16, 32, 6, (16, 16), 2, (16, 16), marks=wide),
        (3, 3, 16, 32, 96, (16, 16), 8, (16, 16)),
        (1, 1, 40, 24, 40, (16, 16), 4, (8, 8)),
        (1, 4, 48, 24, 12, (24, 12), 4, (24, 12)),
        pytest.param(1, 3, 16, 48, 24, (16, 16), 4, (16, 16), marks=wide),
        (2, 4, 32, 16, 40, (16, 16), 4, (16, 16)),
        (1, 2, 6, 4, 5, (4, 4), 1, (2, 4)),
        pytest.param(1, 3, 12, 6, 5, (6, 6), 3, (3, 6), marks=wide),
        (2, 5, 40, 20, 5, (10, 20), 10, (30, 20)),
    ],
    ids=["S", "stride2", "stride8", "overlap", "S18", "odd", "B4", "stride1", "stride3", "gaps"],
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
