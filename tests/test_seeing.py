"""What is computed of a model and an image is what its formula says, by hand and by brute force."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import torch
from helpers import HERE, TINY, perturb
from PIL import Image

from tnt_fast import TNT, reference, seeing
from tnt_fast.seeing import Subject

DATA = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def subject(backend: str = "reference", **kwargs) -> Subject:
    model = perturb(TNT(**{**TINY, **kwargs}, backend=backend)).eval()
    return Subject(model, "tiny", "", "", DATA | {"input_size": (3, *model.pixel_embed.img_size)}, list("abcde"), [])


def picture(height: int = 32, width: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8))


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul(2).softmax(-1)


def test_rollout_is_the_product_of_half_attention_and_half_identity():
    outer = maps(3, 2, 5, 5)
    expected = np.eye(5)
    for layer in outer.numpy():
        expected = (0.5 * layer.mean(0) + 0.5 * np.eye(5)) @ expected
    found = seeing.rollout(outer)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(5))


@pytest.mark.parametrize("has_inner", [(True, True, True), (False, True, False), (False, False, False)])
def test_the_two_level_rollout_is_that_of_the_whole_graph(has_inner):
    """By brute force: what every token has of every pixel of the stem, forwards through each step of each block."""
    N, S = 4, 3
    inner, outer = maps(sum(has_inner), N, 2, S, S), maps(3, 2, 1 + N, 1 + N)
    pixel = np.eye(N * S)
    patch = np.zeros((1 + N, N * S))
    patch[1:] = pixel.reshape(N, S, N * S).mean(1)  # the stem's fold
    layers = iter(inner.numpy())
    for attention, has in zip(outer.numpy(), has_inner, strict=True):
        if has:
            for n, own in enumerate(next(layers)):
                rows = slice(n * S, (n + 1) * S)
                pixel[rows] = 0.5 * pixel[rows] + 0.5 * own.mean(0) @ pixel[rows]
            patch[1:] = 0.5 * patch[1:] + 0.5 * pixel.reshape(N, S, N * S).mean(1)
        patch = 0.5 * patch + 0.5 * attention.mean(0) @ patch
    found = seeing.two_level_rollout(inner, outer, has_inner)
    np.testing.assert_allclose(found.reshape(-1), patch[0], rtol=1e-4)
    if not any(has_inner):  # an ordinary ViT's rollout, the same for all pixels of a patch
        expected = seeing.rollout(outer)[0, 1:, None].expand(-1, S) / S
        torch.testing.assert_close(found, expected)


def test_with_what_the_class_token_keeps_of_itself_a_rollout_is_all():
    inner, outer = maps(2, 4, 2, 9, 9), maps(2, 2, 5, 5)
    outer[:, :, 1:, 0] = 0  # patches that take nothing of the class token pass nothing of it on
    outer /= outer.sum(-1, keepdim=True)
    kept = seeing.rollout(outer)[0, 0]
    torch.testing.assert_close(seeing.two_level_rollout(inner, outer, [True, True]).sum() + kept, torch.tensor(1.0))


def test_a_pixel_that_all_attend_to_has_the_larger_share():
    inner = torch.zeros(2, 4, 1, 9, 9)
    inner[..., 7] = 1
    found = seeing.two_level_rollout(inner, maps(2, 2, 5, 5), [True, True])
    assert (found.argmax(-1) == 7).all()


def test_distance_is_in_the_unit_of_the_places():
    places = torch.tensor([[0.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    itself, last = torch.eye(3), torch.tensor([0.0, 0.0, 0.2]).expand(3, 3)  # the rest goes to the class token
    found = seeing.distance(torch.stack([itself, last])[None, :, None], places)
    np.testing.assert_allclose(found, [[0, (4 + 5 + 0) / 3]])


def test_likeness_is_1_of_equal_rows_and_0_of_orthogonal_ones():
    assert seeing.similarity(torch.tensor([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]])) == pytest.approx(1)
    assert seeing.similarity(torch.eye(4)) == 0
    features = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    tokens, channels = seeing.similarities(features)
    rows = features.reshape(6, 8)
    cosines = np.abs(rows @ rows.T) / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
    assert tokens[0] == pytest.approx(cosines[~np.eye(6, dtype=bool)].mean(), rel=1e-5)
    correlations = np.abs(np.corrcoef(rows.T))
    assert channels[0] == pytest.approx(correlations[~np.eye(8, dtype=bool)].mean(), rel=1e-4)


@pytest.mark.parametrize("options", [{}, dict(patch_stride=8), dict(img_size=(32, 48), patch_size=(8, 16))], ids=str)
def test_pixels_lie_where_they_were_cut_from(options):
    model = subject(**options).model
    embed = model.pixel_embed
    whole = torch.randn(1, 1, *(side // embed.stride for side in embed.img_size))
    cut = reference.cut_patches(whole, embed.new_patch_size, embed.pixel_step).flatten(1)
    np.testing.assert_allclose(seeing.on_pixels(cut, model, mean=True), whole[0, 0], rtol=1e-6)
    assert seeing.on_pixels(cut.abs(), model).sum() == pytest.approx(cut.abs().sum().item(), rel=1e-5)


VARIANTS = [
    {}, dict(legacy=True, num_classes=0), dict(inner_blocks=(1,), use_patch_pos=False), dict(inner_blocks=()),
    dict(patch_stride=8, se_ratio=0.25, use_pixel_pos=False), dict(img_size=(16, 32), global_pool="avg"), dict(img_size=16),
    dict(dynamic_img_size=True, first_stride=8),
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_what_is_seen_of_each_variant_is_what_the_model_computes(options):
    looked = subject(**options)
    model, image = looked.model, picture(*looked.model.pixel_embed.img_size)
    seen, x = seeing.see(looked, image), looked.input(image)
    with torch.no_grad():
        tokens = model.norm(torch.from_numpy(seen.features[-1]).flatten(0, 1))
        torch.testing.assert_close(tokens, model.forward_features(x)[0, 1:])
        pixels = model.pixel_embed(x, model.pixel_pos).mean(-1)
        np.testing.assert_allclose(seen.pixels[0], seeing.on_pixels(pixels, model, mean=True), rtol=1e-5)
        if model.num_classes:
            np.testing.assert_allclose(seen.probabilities, model(x)[0].softmax(-1), rtol=1e-5)
    assert (seen.image == np.asarray(image)).all()
    grid, depth = model.pixel_embed.grid_size, len(model.blocks)
    assert seen.rollout.shape == grid
    assert seen.two_level_rollout.shape == tuple(side // model.pixel_embed.stride for side in model.pixel_embed.img_size)
    assert seen.outer_distance.shape == (depth, TINY["num_heads_outer"])
    assert all(np.isfinite(x).all() for x in seen)
    assert not any(module._forward_hooks for module in model.modules())
    positions = seeing.position_similarity(model)
    assert [x is None for x in positions] == [model.patch_pos is None, model.pixel_pos is None]
    assert all(np.diagonal(x) == pytest.approx(1) for x in positions if x is not None)


def test_the_fused_path_is_looked_into_on_the_fused_path(monkeypatch):
    fused, plain = (subject(backend, depth=1, img_size=16) for backend in ("fused", "reference"))
    expected = seeing.see(plain, picture(16, 16))
    fused.model.load_state_dict(plain.model.state_dict())
    fused.model.to(HERE.device)
    monkeypatch.setattr("tnt_fast.reference.attend", None)  # what the reference's attention calls
    for found, right in zip(seeing.see(fused, picture(16, 16)), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-3 if HERE.device == "cuda" else 1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 2, 24), (2, 2, 2), (3, 2, 5)])
def test_maps_are_spread_however_few_they_are(shape):
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    places, beside = seeing.spread(features, np.repeat(features, 2, 0))
    assert places.shape == beside.shape == (shape[-1], 2)
    assert np.isfinite([places, beside]).all()
