"""Same weights, same outputs, same gradients as timm's TNT; weights go both ways; the same seeds draw the same numbers."""

import copy

import pytest
import timm
import torch
from helpers import TINY, perturb, relative_error
from timm.models.tnt import TNT as TimmTNT
from torch import nn

import tnt_fast

VARIANTS = {"s": "tnt_s", "s_legacy": "tnt_s_legacy", "b": "tnt_b"}


def pair(variant: str, **kwargs):
    theirs = perturb(timm.create_model(f"{VARIANTS[variant]}_patch16_224", **kwargs))
    ours = timm.create_model(f"tnt_fast_{variant}_patch16_224", backend="reference", **kwargs)
    result = ours.load_state_dict(theirs.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize(("size", "batch"), [(224, 1), ((64, 96), 1), ((64, 96), 5)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients(variant, size, batch, dtype, tolerance):
    ours, theirs = pair(variant, img_size=size, depth=3 if variant == "b" else 12)  # its blocks are s's, and larger
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    image = torch.randn(batch, 3, *ours.pixel_embed.img_size, dtype=dtype)
    seed_gradient = torch.randn(batch, 1000, dtype=dtype)
    images, outputs = [], []
    for model in (ours, theirs):
        images.append(image.clone().requires_grad_())
        outputs.append(model(images[-1]))
        outputs[-1].backward(seed_gradient)
    assert relative_error(outputs[0], outputs[1]) <= tolerance
    assert relative_error(images[0].grad, images[1].grad) <= tolerance
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, expected[name].grad) <= tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_go_back_to_timm(variant):
    ours = perturb(timm.create_model(f"tnt_fast_{variant}_patch16_224", depth=2), scale=0.1)
    theirs = timm.create_model(f"{VARIANTS[variant]}_patch16_224", depth=2)
    result = theirs.load_state_dict(ours.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(theirs.state_dict()) == list(ours.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_seed_initialises_the_same_weights(legacy):
    models = []
    for cls in (tnt_fast.TNT, TimmTNT):
        torch.manual_seed(3)
        models.append(cls(**TINY, legacy=legacy, qkv_bias=True))
    for (name, ours), (_, theirs) in zip(models[0].state_dict().items(), models[1].state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_dropout_and_drop_path_draw_the_same_numbers_in_training():
    rates = dict(drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.5)
    ours, theirs = tnt_fast.TNT(**TINY, **rates, backend="reference"), TimmTNT(**TINY, **rates)
    ours.load_state_dict(perturb(theirs).state_dict())
    image = torch.randn(3, 3, 32, 32)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        outputs.append([model(image) for _ in range(3)])
    for a, b in zip(*outputs, strict=True):
        assert relative_error(a, b) <= 1e-5
    assert not torch.equal(outputs[0][0], outputs[0][1])


@pytest.mark.parametrize("pool", ["token", "avg", ""])
@pytest.mark.parametrize("classes", [0, 5])
def test_pooling_and_head(pool, classes):
    kwargs = {**TINY, "global_pool": pool, "num_classes": classes}
    ours, theirs = tnt_fast.TNT(**kwargs, backend="reference").eval(), TimmTNT(**kwargs).eval()
    theirs.load_state_dict(perturb(ours).state_dict())
    image = torch.randn(2, 3, 32, 32)
    assert relative_error(ours(image), theirs(image)) <= 1e-5
    tokens = theirs.forward_features(image)
    assert relative_error(ours.forward_head(tokens, pre_logits=True), theirs.forward_head(tokens, pre_logits=True)) <= 1e-5


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("indices", [None, 2, [0, 2]])
def test_forward_intermediates(indices, output_fmt):
    kwargs = {**TINY, "depth": 3, "img_size": (32, 64)}
    ours, theirs = tnt_fast.TNT(**kwargs, backend="reference").eval(), TimmTNT(**kwargs).eval()
    theirs.load_state_dict(perturb(ours).state_dict())
    image = torch.randn(2, 3, 32, 64)
    options = dict(indices=indices, output_fmt=output_fmt, return_prefix_tokens=True, norm=True)
    (ours_final, ours_found), (theirs_final, theirs_found) = (m.forward_intermediates(image, **options) for m in (ours, theirs))
    assert relative_error(ours_final, theirs_final) <= 1e-5
    assert len(ours_found) == len(theirs_found) > 0
    for (a, a_cls), (b, b_cls) in zip(ours_found, theirs_found, strict=True):
        assert relative_error(a, b) <= 1e-5
        assert relative_error(a_cls, b_cls) <= 1e-5
    only = ours.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True, output_fmt=output_fmt)
    expected = theirs.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True, output_fmt=output_fmt)
    assert relative_error(only[0], expected[0]) <= 1e-5


def test_prune_reset_and_groups_as_timm():
    for model in (tnt_fast.TNT(**{**TINY, "depth": 4}), TimmTNT(**{**TINY, "depth": 4})):
        assert model.no_weight_decay() == {"patch_pos", "pixel_pos", "cls_token"}
        groups = timm.models.group_parameters(model, model.group_matcher())
        assert len(groups) == 6  # stem, four blocks of which the last takes the norm, head
        assert groups[4][-2:] == ["norm.weight", "norm.bias"]
        assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
        assert len(model.blocks) == 2
        assert isinstance(model.norm, nn.Identity)
        assert isinstance(model.get_classifier(), nn.Identity)
        model.reset_classifier(7, "avg")
        assert model.get_classifier().out_features == model.num_classes == 7
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
        assert [f["num_chs"] for f in model.feature_info] == [24] * 4
        assert {f["reduction"] for f in model.feature_info} == {16}


@pytest.mark.parametrize("legacy", [False, True])
def test_from_timm_keeps_weights_mode_and_settings(legacy):
    theirs = perturb(
        timm.create_model("tnt_s_patch16_224", depth=3, img_size=(32, 64), num_classes=4, legacy=legacy, drop_path_rate=0.2)
    )
    theirs.prune_intermediate_layers([1], prune_head=False)
    theirs.set_grad_checkpointing()
    theirs.pixel_embed.proj.requires_grad_(False)
    theirs.train()
    theirs.blocks[0].eval()
    ours = tnt_fast.from_timm(theirs, backend="reference")
    assert isinstance(ours, tnt_fast.TNT)
    assert ours.grad_checkpointing
    assert ours.backend == "reference"
    assert {n: m.training for n, m in theirs.named_modules() if "unfold" not in n} == {
        n: m.training for n, m in ours.named_modules()
    }
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert ours.blocks[1].drop_path.drop_prob == theirs.blocks[1].drop_path.drop_prob > 0
    assert ours.pretrained_cfg == theirs.pretrained_cfg
    image = torch.randn(2, 3, 32, 64)
    assert relative_error(ours.eval()(image), theirs.eval()(image)) <= 1e-6
    with torch.no_grad():
        theirs.cls_token.add_(1)
    assert not torch.equal(ours.cls_token, theirs.cls_token)  # a copy
    theirs.load_state_dict(ours.state_dict())


def test_from_timm_keeps_replaced_modules_and_dtypes():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    theirs = TimmTNT(**TINY).eval().double()
    theirs.blocks[1].attn_in.v = Doubled(12, 12, bias=False).double()
    ours = tnt_fast.from_timm(theirs, backend="reference")
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(ours(image), theirs(image))
    assert isinstance(ours.blocks[1].attn_in.v, Doubled)


def test_from_timm_refuses_what_it_cannot_keep():
    with pytest.raises(TypeError, match=r"takes a timm\.models\.tnt\.TNT, got timm.*VisionTransformer"):
        tnt_fast.from_timm(timm.create_model("vit_tiny_patch16_224", depth=1))
    with pytest.raises(TypeError, match=r"pass its \.model"):
        tnt_fast.from_timm(timm.create_model("tnt_s_patch16_224", depth=4, features_only=True))
    theirs = TimmTNT(**TINY)
    theirs.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.0 has hooks"):
        tnt_fast.from_timm(theirs)


def test_hooks_and_replaced_modules_work_as_on_timm():
    ours = tnt_fast.TNT(**TINY, backend="reference").eval()
    seen = []
    ours.blocks[0].attn_in.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    ours.blocks[1].register_forward_hook(lambda m, i, o: seen.append(len(i)))
    ours(torch.randn(2, 3, 32, 32))
    assert seen == [(8, 2, 16, 16), 2]  # attention of 2·4 patches, 2 heads; a block gets (pixel, patch)
    before = ours(torch.ones(1, 3, 32, 32))
    changed = copy.deepcopy(ours)
    nn.init.zeros_(changed.blocks[0].mlp_in.fc2.weight)
    assert not torch.equal(changed(torch.ones(1, 3, 32, 32)), before)
