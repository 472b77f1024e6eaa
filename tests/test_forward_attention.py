"""``TNT.forward_attention`` returns what hooks see on the reference, on either path, and takes the memory of its maps."""

import pytest
import torch
from helpers import HERE, TINY, paths, perturb
from torch import nn

from tnt_fast import TNT

VARIANTS = [
    {}, dict(legacy=True), dict(patch_stride=8), dict(inner_blocks=(1,)), dict(inner_blocks=()), dict(se_ratio=0.25),
    dict(use_pixel_pos=False, use_patch_pos=False), dict(first_stride=8), dict(qkv_bias=True, global_pool="avg"),
    dict(dynamic_img_size=True), dict(patch_size=(8, 16), img_size=(16, 32)),
]  # fmt: skip


def tiny(backend: str = "reference", **kwargs) -> TNT:
    return perturb(TNT(**{**TINY, **kwargs}, backend=backend)).eval()


def image_for(model: TNT, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.pixel_embed.img_size)


@torch.no_grad()
def seen_by_hooks(model: TNT, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The probabilities that pass ``attn_drop`` in each block of the reference: inner, outer."""
    inner: list[torch.Tensor] = []
    outer: list[torch.Tensor] = []
    handles = [
        attn.attn_drop.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        for block in model.blocks
        for seen, attn in ((inner, getattr(block, "attn_in", None)), (outer, block.attn_out))
        if attn is not None
    ]
    model(image)
    for handle in handles:
        handle.remove()
    return inner, outer


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_reference_returns_what_hooks_see(options):
    model = tiny(**options)
    image = image_for(model)
    if options.get("dynamic_img_size"):
        image = torch.randn(2, 3, 48, 32)
    inner, outer = model.forward_attention(image)
    seen_inner, seen_outer = seen_by_hooks(model, image)
    batch, patches, pixels = 2, outer.shape[-1] - 1, inner.shape[-1]
    assert inner.shape == (len(seen_inner), batch, patches, inner.shape[3], pixels, pixels)
    assert outer.shape == (len(seen_outer), batch, TINY["num_heads_outer"], 1 + patches, 1 + patches)
    for found, seen in zip([*inner.flatten(1, 2), *outer], [*seen_inner, *seen_outer], strict=True):
        torch.testing.assert_close(found, seen, rtol=1e-5, atol=1e-7)  # products over one image and over all: order of sums
    for maps in (inner, outer):
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


@paths()
def test_the_fused_path_returns_what_hooks_see_on_the_reference(path, dtype):
    sizes = dict(depth=1 if path.name.startswith("sm_") else 2, img_size=(16, 32))
    model, reference = tiny("fused", **sizes).to(path.device, dtype), tiny(**sizes)
    with torch.no_grad():  # the same rounded weights
        image = image_for(reference, 1).to(dtype)
        reference.load_state_dict({name: weight.cpu().float() for name, weight in model.state_dict().items()})
        found = model.forward_attention(image.to(path.device))
        with path.as_reference():
            same = seen_by_hooks(reference.to(dtype), image)
        exact = seen_by_hooks(reference.double(), image.double())
    for level in (0, 1):
        for maps, own, right in zip(found[level].flatten(1, 2 - level), same[level], exact[level], strict=True):
            path.rule(("inner", "outer")[level], maps, own, right, dtype)


def test_fused_is_fused_and_neither_model_nor_path_change(monkeypatch):
    model = tiny("fused", img_size=(16, 32), depth=1).to(HERE.device)
    image = image_for(model, 1).to(HERE.device)
    before, features = str(model.__dict__), model.forward_features(image)
    monkeypatch.setattr("tnt_fast.reference.attend", None)  # what any other attention calls
    model.forward_attention(image, [0])
    assert str(model.__dict__) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.forward_features(image), features)


def test_blocks_choose_and_the_forward_ends_after_the_last_of_them(monkeypatch):
    model, image = tiny(depth=3, inner_blocks=(0, 2)), torch.randn(2, 3, 32, 32)
    every = model.forward_attention(image)
    for blocks, inner_at, outer_at in [([-1, 0, 2], [0, 1], [0, 2]), ((1,), [], [1]), (range(2), [0], [0, 1])]:
        some = model.forward_attention(image, blocks)
        assert torch.equal(some.inner, every.inner[inner_at])
        assert torch.equal(some.outer, every.outer[outer_at])
    monkeypatch.setattr(model.blocks[2], "forward", None)
    model.forward_attention(image, [0, 1])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([0, 2], r"blocks=\[0, 2\] names 2; accepted: indices from 0 to 1, or from -1 back to -2"),
        ([-3], "names -3; accepted"),
        ([0.5], "names 0.5; accepted"),
        ([], "names none; accepted"),
        (1, "blocks=1 is no list of indices"),
    ],
)
def test_a_block_that_is_not_there_is_one_error_before_any_work(blocks, message):
    with pytest.raises(ValueError, match=message):
        tiny().forward_attention(torch.empty(0), blocks)


def test_an_attention_of_another_class_is_an_error():
    model = tiny()
    model.blocks[1].attn_out = nn.Identity()
    with pytest.raises(ValueError, match="the attention of block 1 is a Identity"):
        model.forward_attention(torch.randn(1, 3, 32, 32))


def test_no_images_have_no_attention():
    assert [maps.shape[1] for maps in tiny().forward_attention(torch.empty(0, 3, 32, 32))] == [0, 0]


def test_in_training_maps_are_those_before_dropout_and_activations_are_dropped():
    model, image = tiny(attn_drop_rate=0.5, proj_drop_rate=0.3, drop_path_rate=0.5).train(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    found = model.forward_attention(image)
    torch.manual_seed(1)
    inner, outer = seen_by_hooks(model, image)
    for maps, seen in zip([*found.inner.flatten(1, 2), *found.outer], [*inner, *outer], strict=True):
        torch.testing.assert_close(maps, seen, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found.outer[1], model.forward_attention(image).outer[1])
    assert model.training


def peak(run) -> int:
    """The most bytes that PyTorch holds at a time for what ``run`` allocates on the CPU."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    held, most = 0, 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_the_memory_for_one_block_is_that_blocks():
    model, image = tiny(img_size=64, depth=4, patch_size=8, num_heads_outer=12), torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        features = peak(lambda: model.forward_features(image))
    one, maps = peak(lambda: model.forward_attention(image, [0])), model.forward_attention(image, [0])
    size = sum(level.numel() * level.element_size() for level in maps)
    every = peak(lambda: model.forward_attention(image))
    assert one < features + 1.3 * size
    assert 2.5 * size < every - one < 4.5 * size


@pytest.mark.gpu
def test_on_a_gpu_the_memory_for_one_block_is_that_blocks():
    model = TNT(embed_dim=384, inner_dim=24, num_heads_outer=6, depth=12, backend="fused", device="cuda", dtype=torch.bfloat16)
    image = torch.randn(16, 3, 224, 224, device="cuda", dtype=torch.bfloat16)

    def most(run) -> int:
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    with torch.no_grad():
        features = most(lambda: model.eval().forward_features(image))
    size = sum(level.numel() * level.element_size() for level in model.forward_attention(image, [5]))
    assert most(lambda: model.forward_attention(image, [5])) < features + 1.5 * size
