"""A copy for inference has the model's outputs by the one rule, on every path; what it cannot keep, it refuses."""

import copy

import pytest
import torch
from helpers import TINY, perturb
from timm.layers import RmsNorm
from torch import nn

from tnt_fast import TNT, attention, optimize, optimize_for_inference
from tnt_fast.kernels.outer import joined

# TINY's depth is 2; of each kind the narrowest that still has it
MODELS = {
    "ti": dict(embed_dim=32, inner_dim=6, num_heads_outer=1),
    "s": {},
    "s_legacy": dict(legacy=True),
    "b": dict(embed_dim=40, inner_dim=20, num_heads_inner=4, num_heads_outer=5, qkv_bias=True),
    "overlapping": dict(patch_stride=8),
    "overlapping_legacy": dict(patch_stride=(8, 16), legacy=True, img_size=(32, 48)),
    "se": dict(se_ratio=0.25),
    "patch_embed": dict(use_patch_embed=True, patch_stride=8),
    "no_positions": dict(use_pixel_pos=False, use_patch_pos=False),
    "one_inner_block": dict(inner_blocks=(1,), inner_mlp_ratio=2.0, mlp_ratio=3.0),
    "stride": dict(first_stride=8, num_heads_inner=1),
    "features": dict(num_classes=0, global_pool="avg"),
    "tokens": dict(global_pool=""),
}


def made(backend="reference", **kwargs):
    return perturb(TNT(**{**TINY, **kwargs}, backend=backend), 0.2).eval()


def rule(found, model, image):
    """The one rule, for a result of ``model(image)``; float64 has nothing more exact beside it."""
    with torch.no_grad():
        own, exact = model(image).double(), copy.deepcopy(model).double()(image.double())
    assert found.dtype == image.dtype
    assert found.shape == exact.shape
    error, allowed = (found.double() - exact).abs().max(), 2 * (own - exact).abs().max()
    eps = 1e-13 if image.dtype == torch.float64 else torch.finfo(image.dtype).eps
    assert error <= allowed + 4 * eps * exact.abs().max()


def image_for(model, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, *model.pixel_embed.img_size, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_the_models_which_stays_as_it_is(kind, dtype):
    model = made(**MODELS[kind]).to(dtype)
    before = copy.deepcopy(model.state_dict())
    image = image_for(model, dtype=dtype)
    expected = model(image)
    fast = optimize_for_inference(model)
    found = fast(image)
    rule(found, model, image)
    assert torch.equal(found, fast(image))
    assert not fast.fused
    assert torch.equal(model(image), expected)
    assert [(k, v.dtype) for k, v in model.state_dict().items()] == [(k, v.dtype) for k, v in before.items()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(fast(image), found)  # nothing is shared


def test_features_heads_and_any_image_size():
    model = made(dynamic_img_size=True)
    fast = optimize_for_inference(model)
    for size in ((32, 32), (48, 64)):
        image = torch.randn(2, 3, *size)
        rule(fast(image), model, image)
        tokens = fast.forward_features(image)
        assert tokens.shape == model.forward_features(image).shape
        rule(fast.forward_head(tokens), model, image)
        assert fast.forward_head(tokens, pre_logits=True).shape == (2, 24)
    assert fast(torch.randn(0, 3, 32, 32)).shape == (0, 5)
    model.set_input_size((16, 48))
    image = torch.randn(1, 3, 16, 48)
    rule(optimize_for_inference(model)(image), model, image)


def test_a_large_batch_goes_in_pieces(monkeypatch):
    monkeypatch.setattr(optimize, "PIECE", 2)
    model = made()
    image = image_for(model, 5)
    rule(optimize_for_inference(model)(image), model, image)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [({}, True), (dict(qkv_bias=True), True), (dict(legacy=True), True), (dict(inner_blocks=(0,)), True),
     (dict(global_pool="avg"), False), (dict(global_pool=""), False), (dict(se_ratio=0.25), False)],
    ids=str,
)  # fmt: skip
def test_the_last_block_computes_what_the_logits_ask_for(kind, alone):
    model = made(**kind)
    fast, image, widths = optimize_for_inference(model), image_for(model), []
    for block in fast.blocks:
        block.outer.mlp.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    rule(fast(image), model, image)
    assert widths == [5, 1 if alone else 5]
    widths.clear()
    tokens = fast.forward_features(image)
    assert widths == [5, 5]
    assert (fast.forward_head(tokens) - fast(image)).abs().max() <= 1e-5


def test_another_dtype_and_autocast():
    model = made()
    image = image_for(model)
    fast = optimize_for_inference(model, torch.bfloat16)
    found = fast(image)
    assert found.dtype == fast.dtype == torch.bfloat16
    rule(found, copy.deepcopy(model).to(torch.bfloat16), image.to(torch.bfloat16))
    assert torch.equal(fast(image.to(torch.bfloat16)), found)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(image), found)
        assert optimize_for_inference(model)(image).dtype == torch.float32


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize(
    # of each block inner's and outer's four and fold's, stem; F.linear: q of the last, head; by MKL not the narrow with GELU
    ("library", "counts"), [("oneDNN", (2 * 9, 2, 0)), ("MKL", (2 * 2, 2 * 3 + 2, 2 * 4)), ("", (0, 2 * 9 + 2, 0))]
)  # fmt: skip
def test_whose_products_they_are(library, counts, monkeypatch):
    monkeypatch.setattr(attention, "mkl_is_fast", lambda: library == "MKL")
    model = made()
    image = image_for(model)
    if not library:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fast, given = optimize_for_inference(model), image.clone()
    with torch.profiler.profile() as profile:
        found = fast(image)
    rule(found, model, image)
    assert torch.equal(image, given)
    names = [event.name for event in profile.events()]
    assert tuple(map(names.count, ("mkldnn::_linear_pointwise", "aten::linear", "aten::addmm_"))) == counts


@pytest.mark.parametrize("fast", [True, False], ids=["MKL", "oneDNN"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_outputs_are_the_models_by_either_library(kind, fast, monkeypatch):
    monkeypatch.setattr(attention, "mkl_is_fast", lambda: fast)
    model = made(**MODELS[kind])
    copied = optimize_for_inference(model)
    for batch in (2, 1):
        image = image_for(model, batch)
        rule(copied(image), model, image)
        rule(copied.forward_head(copied.forward_features(image)), model, image)
        assert torch.equal(copied(image), copied(image))


@pytest.mark.parametrize(
    "kwargs", [{}, dict(legacy=True, se_ratio=0.25), dict(inner_blocks=())], ids=["s", "legacy_se", "outer"]
)
def test_the_fused_path_is_kept(kwargs):
    model = made(backend="fused", depth=1, img_size=16, **kwargs)
    image = image_for(model)
    fast = optimize_for_inference(model)
    assert fast.fused
    found = fast(image)
    model.backend = "reference"
    rule(found, model, image)


@pytest.mark.parametrize("kwargs", [{}, dict(qkv_bias=True), dict(inner_blocks=(0,)), dict(legacy=True)], ids=str)
def test_the_fused_last_block_computes_what_the_logits_of_many_images_ask_for(kwargs):
    model = made(backend="fused", img_size=(16, 32), **kwargs)
    fast, widths = optimize_for_inference(model), []
    assert fast.fused
    fast.blocks[-1].packed.mlp.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    for batch, asked in ((optimize.FEW + 1, [1]), (optimize.FEW, [])):
        widths.clear()
        image = image_for(model, batch)
        found = fast(image)
        assert widths == asked
        assert torch.equal(fast(image), found)
        widths.clear()
        tokens = fast.forward_features(image)
        assert widths == []
        assert tokens.shape == (batch, 3, 24)
        model.backend = "reference"
        rule(found, model, image)
        rule(fast.forward_head(tokens), model, image)
        model.backend = "fused"


@pytest.mark.parametrize("kwargs", [dict(se_ratio=0.25), dict(global_pool="avg")], ids=str)
def test_all_tokens_are_computed_where_all_are_asked_for(kwargs):
    model = made(backend="fused", img_size=16, **kwargs)
    fast, widths = optimize_for_inference(model), []
    assert fast.fused
    assert not fast.one_token
    for block in fast.blocks:
        if block.packed is not None:
            block.packed.mlp.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    image = image_for(model, optimize.FEW + 1)
    found = fast(image)
    assert widths == ([2, 2] if "se_ratio" in kwargs else [])  # an outer transformer with squeeze-and-excitation is not fused
    model.backend = "reference"
    rule(found, model, image)


def test_weights_one_behind_the_other_are_joined_without_a_copy():
    whole = torch.randn(6, 4)
    first, second = whole.split([4, 2])
    assert joined(first, second).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(first, second), whole)
    for pair in ((second, first), (first, second.clone()), (first.clone(), second)):
        assert torch.equal(joined(*pair), torch.cat(pair))
    given = optimize_for_inference(made(backend="fused", qkv_bias=True)).blocks[0].whole.given["weights"]
    assert joined(given.qk_weight, given.v_weight).data_ptr() == given.qk_weight.data_ptr()
    assert joined(given.qk_bias, given.v_bias).data_ptr() == given.qk_bias.data_ptr()


def test_it_compiles_in_one_graph_and_its_weights_go_to_a_twin():
    model = made(depth=1)
    image = image_for(model)
    fast = optimize_for_inference(model)
    rule(torch.compile(fast, fullgraph=True, backend="eager")(image), model, image)
    twin = optimize_for_inference(perturb(copy.deepcopy(model)))
    twin.load_state_dict(fast.state_dict())
    assert torch.equal(twin(image), fast(image))
    assert torch.equal(copy.deepcopy(fast)(image), fast(image))


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Other(TNT):
    pass


def _hook(module):
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.train(), "the model is in training mode.*model.eval"),
        (lambda m: m.blocks[1].mlp.train(), "blocks.1.mlp is in training mode"),
        (lambda m: _hook(m), "the model has hooks"),
        (lambda m: _hook(m.blocks[1]), "blocks.1 has hooks"),
        (lambda m: _hook(m.head), "head has hooks"),
        (lambda m: _hook(m.blocks[0].attn_out.attn_drop), r"blocks.0.attn_out.attn_drop has hooks"),
        (lambda m: setattr(m.blocks[0].attn_out, "v", Twice(24, 24).eval()), r"blocks.0.attn_out.v is a .*Twice"),
        (lambda m: setattr(m, "proj", nn.Identity().eval()), r"proj is a .*Identity"),
        (lambda m: setattr(m.blocks[0], "norm_mlp", RmsNorm(24).eval()), r"blocks.0.norm_mlp is a .*RmsNorm"),
        (lambda m: setattr(m, "pos_drop", nn.Tanh().eval()), r"pos_drop is a .*Tanh"),
        (lambda m: m.blocks.__setitem__(1, nn.Identity().eval()), r"blocks.1 is a .*Identity"),
        (lambda m: setattr(m.blocks[1], "fold", lambda *_: None), r"blocks.1.fold was replaced"),
        (lambda m: setattr(m, "forward_features", lambda x: x), r"forward_features was replaced"),
        (lambda m: setattr(m.blocks[0].mlp.act, "approximate", "tanh"), r"blocks.0.mlp.act approximates"),
        (lambda m: setattr(m.pixel_embed.proj, "padding", (0, 0)), r"pixel_embed.proj has other padding"),
    ],
)  # fmt: skip
def test_what_it_would_pass_over_is_refused(change, reason):
    model = made()
    change(model)
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        optimize_for_inference(model)


def test_what_is_no_tnt_is_refused():
    for other in (nn.Linear(2, 2), Other(**TINY).eval()):
        with pytest.raises(TypeError, match=r"takes a tnt_fast\.TNT, got a .*(Linear|Other).*from_timm"):
            optimize_for_inference(other)
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(TypeError, match=rf"dtype={dtype} is not accepted; accepted: torch.float32"):
            optimize_for_inference(made(), dtype)


def test_a_copy_is_not_trained_moved_or_asked_for_gradients():
    model = made()
    fast = optimize_for_inference(model)
    for ask in (fast.train, fast.requires_grad_):
        with pytest.raises(RuntimeError, match=r"only infers.*Train the model that it was made of, and optimise that"):
            ask()
    assert not fast.eval().training
    assert not any(p.requires_grad for p in fast.parameters())
    assert fast.to("cpu").float() is fast
    for move in (fast.half, lambda: fast.to("meta")):
        with pytest.raises(RuntimeError, match=r"stays where it was made \(cpu, torch.float32\).*optimise that"):
            move()
    image = image_for(model)
    with pytest.raises(RuntimeError, match="the image requires gradients"):
        fast(image.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(fast(image.clone().requires_grad_()), fast(image))
    for wrong in (image[:, :1], image[..., :16], image[0]):
        with pytest.raises(ValueError, match=r"this copy takes \(batch, 3, 32, 32\)"):
            fast(wrong)
    with pytest.raises(TypeError, match="scale it"):
        fast(image.to(torch.uint8))
    with pytest.raises(ValueError, match="the image is on 'meta'"):
        fast(image.to("meta"))
    with pytest.raises(ValueError, match="do not cover"):
        optimize_for_inference(made(dynamic_img_size=True))(torch.randn(1, 3, 40, 32))
