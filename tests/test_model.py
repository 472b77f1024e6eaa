"""The model as its users meet it: sizes, counts, the paper's options, compilers, bad input."""

import copy
import io
import re

import pytest
import timm
import torch
from helpers import TINY, perturb, relative_error
from torch.utils.flop_counter import FlopCounterMode

import tnt_fast
from tnt_fast import TNT, flops


def tiny(**kwargs) -> TNT:
    return perturb(TNT(**{**TINY, "backend": "reference", **kwargs})).eval()


# ---- counts ----


@pytest.mark.parametrize(
    ("variant", "parameters", "gmacs"),
    [("ti", 6_076_408, 1.404), ("s", 23_768_584, 5.217), ("s_legacy", 23_755_336, 5.217), ("b", 65_428_680, 14.049)],
)
def test_parameters_and_multiply_adds(variant, parameters, gmacs):
    model = timm.create_model(f"tnt_fast_{variant}_patch16_224", device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(flops.multiply_adds(model) / 1e9, 3) == gmacs


def test_multiply_adds_are_those_of_a_real_forward():
    model = tiny()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 3, 32, 32))
    assert counter.get_total_flops() == 3 * 2 * flops.multiply_adds(model)


def test_multiply_adds_of_deit_include_its_attention():
    deit = timm.create_model("deit_small_patch16_224", device="meta")
    assert (
        round(flops.multiply_adds(deit, (3, 224, 224)) / 1e9, 3) == 4.599
    )  # 12·(12·197·384² + 2·197²·384) + 196·768·384 + 384·1000


@pytest.mark.parametrize(
    ("blocks", "gmacs"), [(range(12), 5.217), ((0, 3, 7, 11), 4.793), ((0, 5, 11), 4.740), ((0, 5), 4.687), ((0,), 4.634)]
)
def test_inner_blocks_of_table_5(blocks, gmacs):
    model = timm.create_model("tnt_fast_s_patch16_224", device="meta", inner_blocks=blocks)
    assert round(flops.multiply_adds(model) / 1e9, 3) == gmacs
    assert [hasattr(b, "attn_in") for b in model.blocks] == [i in blocks for i in range(12)]


@pytest.mark.parametrize(
    ("stride", "width", "pixels", "parameters", "gmacs"),
    [(2, 6, 64, 23.69, 5.108), (4, 24, 16, 23.77, 5.217), (8, 96, 4, 25.03, 5.976)],
)
def test_strides_of_table_8(stride, width, pixels, parameters, gmacs):
    heads = 2 if width == 6 else 4
    model = timm.create_model(
        "tnt_fast_s_patch16_224", device="meta", first_stride=stride, inner_dim=width, num_heads_inner=heads
    )
    assert model.sizes()["S"] == pixels
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert round(flops.multiply_adds(model) / 1e9, 3) == gmacs


def test_squeeze_excite_of_table_12():
    model = timm.create_model("tnt_fast_s_patch16_224", device="meta", se_ratio=0.25)
    unused = 196 * 384  # outer_tokens of the authors' code, zeros that are never trained; their 24.74 M has them
    assert sum(p.numel() for p in model.parameters()) + unused == 24_743_560


def test_closed_forms_of_the_paper():
    assert round(flops.standard_block(196, 384) / 1e6) == 376
    assert round(flops.tnt_block(196, 16, 24, 384) / 1e6) == 429


# ---- options ----


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 12])
def test_any_number_of_inner_heads_of_table_7(heads):
    assert tiny(num_heads_inner=heads)(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_position_encodings_of_table_6_are_optional():
    with_both = tiny()
    image = torch.randn(2, 3, 32, 32)
    for option, name in (("use_pixel_pos", "pixel_pos"), ("use_patch_pos", "patch_pos")):
        without = tiny(**{option: False})
        assert name not in without.state_dict()
        zeroed = copy.deepcopy(with_both)
        torch.nn.init.zeros_(getattr(zeroed, name))
        missing, unexpected = without.load_state_dict(with_both.state_dict(), strict=False)
        assert (missing, unexpected) == ([], [name])
        assert torch.equal(without(image), zeroed(image))


def test_a_block_without_inner_transformer_leaves_the_pixels_alone():
    model = tiny(inner_blocks=(1,))
    pixel, patch = torch.randn(8, 16, 12), torch.randn(2, 5, 24)
    same, changed = model.blocks[0](pixel, patch)
    assert same is pixel
    assert relative_error(changed, model.blocks[0].outer(patch)) == 0
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert not any(key.startswith(("blocks.0.proj", "blocks.0.norm_in")) for key in model.state_dict())


def test_squeeze_excite_acts_on_the_outer_mlp():
    model = tiny(se_ratio=0.25)
    block, patch = model.blocks[0], torch.randn(2, 5, 24)
    x = patch + block.attn_out(block.norm_out(patch))
    mlp = block.mlp(block.norm_mlp(x))
    expected = x + mlp + torch.tanh(block.se_layer.fc[:4](mlp.mean(1, keepdim=True))) * mlp
    assert relative_error(block.outer(patch), expected) <= 1e-6


def test_inner_mlp_ratio():
    assert tiny(inner_mlp_ratio=2.0).blocks[0].mlp_in.fc1.out_features == 24
    assert tiny(mlp_ratio=2.0).blocks[0].mlp_in.fc1.out_features == 48  # timm's 4, whatever mlp_ratio


@pytest.mark.parametrize("legacy", [False, True])
def test_overlapping_patches_share_pixels(legacy):
    model = tiny(patch_stride=8, legacy=legacy)
    assert model.pixel_embed.grid_size == (3, 3)
    image = torch.randn(2, 3, 32, 32)
    assert model(image).shape == (2, 5)
    pixel = model.pixel_embed(image, None).reshape(2, 3, 3, 4, 4, 12)
    # patch (0, 1) begins 8 image pixels = 2 tokens right of patch (0, 0); away from borders they hold the same tokens
    same = relative_error(pixel[:, 0, 0, 1:, 3:], pixel[:, 0, 1, 1:, 1:2])
    assert same <= 1e-6
    touching = tiny(patch_stride=16, legacy=legacy)
    touching.load_state_dict({k: v for k, v in model.state_dict().items() if k != "patch_pos"}, strict=False)
    assert torch.equal(touching.pixel_embed(image, None).reshape(2, 2, 2, 4, 4, 12), pixel[:, ::2, ::2])


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (48, 16)])
@pytest.mark.parametrize("legacy", [False, True])
def test_sizes_that_are_not_square(size, legacy):
    model = tiny(img_size=size, legacy=legacy)
    assert model.patch_pos.shape[1] == 1 + size[0] * size[1] // 256
    image = torch.randn(2, 3, *size)
    assert model(image).shape == (2, 5)
    maps = model.forward_intermediates(image, intermediates_only=True)
    assert maps[0].shape == (2, 24, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (48, 80), (16, 16)])
@pytest.mark.parametrize("legacy", [False, True])
def test_another_size_is_set_once_or_taken_in_each_forward(size, legacy):
    model = perturb(tiny(legacy=legacy))
    dynamic = tiny(legacy=legacy, dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    model.patch_pos.requires_grad_(False)
    expected = timm.layers.resample_abs_pos_embed(model.patch_pos, [size[0] // 16, size[1] // 16], [2, 2])
    model.set_input_size(size)
    assert torch.equal(model.patch_pos, expected)
    assert not model.patch_pos.requires_grad
    assert (model.num_patches, model.pixel_embed.grid_size) == (size[0] * size[1] // 256, (size[0] // 16, size[1] // 16))
    built = tiny(legacy=legacy, img_size=size)
    built.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, *size)
    assert torch.equal(model(image), built(image))
    assert relative_error(dynamic(image), built(image)) <= 1e-6
    assert dynamic.forward_intermediates(image, intermediates_only=True)[0].shape == (2, 24, size[0] // 16, size[1] // 16)
    assert dynamic.sizes(image)["N"] == built.sizes()["N"]


def test_dynamic_sizes_compile_to_one_graph_and_as_a_script():
    dynamic = tiny(dynamic_img_size=True, depth=1)
    image = torch.randn(2, 3, 64, 32)
    assert relative_error(torch.jit.script(dynamic)(image), dynamic(image)) <= 1e-6
    compiled = torch.compile(dynamic, fullgraph=True, backend="eager")
    for size in ((32, 32), (64, 32), (48, 80)):
        image = torch.randn(2, 3, *size)
        assert relative_error(compiled(image), dynamic(image)) <= 1e-6


def test_a_size_that_cannot_be_set_changes_nothing():
    model = tiny()
    for given, message in (
        (dict(img_size=(40, 32)), "img_size 40 (height) is not covered by patches of 16 every 16; accepted near it: 32, 48"),
        (dict(patch_size=8), "patch_size=8 cannot be changed"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.set_input_size(**given)
    assert model.pixel_embed.img_size == (32, 32)
    assert model.patch_pos.shape[1] == 5
    with pytest.raises(ValueError, match=re.escape("img_size 40 (height) is not covered")):
        tiny(dynamic_img_size=True)(torch.randn(1, 3, 40, 32))


# ---- what users do with a model ----


def test_the_named_variants_are_registered_with_timm():
    names = timm.list_models("tnt_fast_*")
    assert sorted(names) == sorted(f"tnt_fast_{v}_patch16_224" for v in ("ti", "s", "s_legacy", "b"))
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.mean == cfg.std == (0.5, 0.5, 0.5)
        assert (cfg.crop_pct, cfg.interpolation, cfg.input_size) == (0.9, "bicubic", (3, 224, 224))
    hosted = {name: timm.get_pretrained_cfg(name).hf_hub_id for name in names}
    assert hosted["tnt_fast_s_patch16_224"] == "timm/tnt_s_patch16_224.in1k"
    assert hosted["tnt_fast_ti_patch16_224"] is None


def test_pretrained_weights_load_through_timm(tmp_path):
    theirs = timm.create_model("tnt_s_patch16_224", depth=2)
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)
    ours = timm.create_model(
        "tnt_fast_s_patch16_224", pretrained=True, depth=2, img_size=(32, 64), in_chans=1, num_classes=3,
        pretrained_cfg_overlay=dict(file=str(file)),
    )  # fmt: skip
    assert torch.equal(ours.blocks[1].mlp_in.fc1.weight, theirs.blocks[1].mlp_in.fc1.weight)
    assert ours.patch_pos.shape == (1, 9, 384)
    assert ours.pixel_embed.proj.weight.shape[1] == 1
    assert ours.head.weight.shape[0] == 3


def test_features_only():
    model = timm.create_model("tnt_fast_ti_patch16_224", features_only=True, depth=4, img_size=32, out_indices=(1, 3))
    assert [f.shape for f in model(torch.randn(2, 3, 32, 32))] == [(2, 192, 2, 2)] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    image, start = torch.randn(2, 3, 32, 32), tiny().train()
    gradients = []
    timm.layers.set_reentrant_ckpt(use_reentrant)
    try:
        for enable in (False, True):
            model = copy.deepcopy(start)
            model.set_grad_checkpointing(enable)
            model(image).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
    finally:
        timm.layers.set_reentrant_ckpt(False)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("legacy", [False, True])
def test_compiles_without_a_graph_break(legacy, backend):
    model, image = tiny(legacy=legacy), torch.randn(2, 3, 32, 32)
    expected = model(image)
    model.backend = backend
    torch._dynamo.reset()
    assert relative_error(torch.compile(model, fullgraph=True, backend="aot_eager")(image), expected) <= 1e-6


def test_exports_with_any_batch():
    model = tiny()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    image = torch.randn(7, 3, 32, 32)
    assert relative_error(program.module()(image), model(image)) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [{}, {"legacy": True}, {"inner_blocks": (1,)}, {"se_ratio": 0.5}, {"use_pixel_pos": False, "use_patch_pos": False}],
    ids=str,
)
def test_scripts_and_traces(options):
    model, image = tiny(**options), torch.randn(2, 3, 32, 32)
    expected = model(image)
    assert torch.equal(torch.jit.script(model)(image), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(image), expected)


def test_forwards_are_deterministic_bit_for_bit():
    model, image = tiny(), torch.randn(5, 3, 32, 32)
    assert torch.equal(model(image), model(image))


def test_no_images_give_no_logits():
    for legacy in (False, True):
        assert tiny(legacy=legacy)(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


def test_layout_of_the_image_does_not_matter():
    model, image = tiny(), torch.randn(2, 3, 32, 32)
    strided = torch.randn(2, 32, 32, 6)[..., ::2].permute(0, 3, 1, 2)
    assert relative_error(model(image.contiguous(memory_format=torch.channels_last)), model(image)) <= 1e-6
    assert relative_error(model(strided), model(strided.contiguous())) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype_arguments(dtype):
    model = TNT(**TINY, dtype=dtype, backend="reference")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype
    model.reset_classifier(3)
    assert model.head.weight.dtype == dtype
    assert {p.device.type for p in TNT(**TINY, device="meta").parameters()} == {"meta"}


def test_autocast():
    model, image = tiny(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(image)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, model(image)) < 0.1


def test_models_can_be_copied_and_saved_whole():
    model, image = tiny(), torch.randn(1, 3, 32, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(image), model(image))
        assert other.backend == "reference"


def test_the_assertions_of_timms_tests_on_gradients():
    model = timm.create_model("tnt_fast_ti_patch16_224", num_classes=42, depth=2, img_size=32).train()
    out = model(torch.randn(2, 3, 32, 32))
    out.mean().backward()
    assert out.shape == (2, 42)
    assert not out.isnan().any()
    assert all(p.grad is not None for p in model.parameters())


# ---- bad input ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads_inner=5), "num_heads_inner=5 does not divide inner_dim=12; accepted: 1, 2, 3, 4, 6, 12"),
        (dict(num_heads_outer=5), "num_heads_outer=5 does not divide embed_dim=24; accepted: 1, 2, 3, 4, 6, 8, 12, 24"),
        (dict(num_heads_inner=0), "num_heads_inner=0 does not divide"),
        (dict(first_stride=3), "first_stride=3 does not divide the patch height 16; accepted: 1, 2, 4, 8, 16"),
        (dict(first_stride=0), "first_stride=0 does not divide"),
        (dict(patch_stride=6), "patch_stride 6 (height) must be a multiple of first_stride=4, at most the patch height 16"),
        (dict(patch_stride=32), "patch_stride 32 (height) must be"),
        (dict(patch_stride=0), "patch_stride 0 (height) must be"),
        (dict(img_size=(32, 40)), "img_size 40 (width) is not covered by patches of 16 every 16; accepted near it: 32, 48"),
        (dict(img_size=8), "img_size 8 (height) is not covered by patches of 16 every 16; accepted near it: 16, 32"),
        (dict(patch_size=0), "patch_size 0 (height) is not positive"),
        (dict(backend="fast"), "backend='fast' is unknown; accepted: 'auto', 'fused', 'reference'"),
        (dict(global_pool="max"), "global_pool='max' is unknown; accepted: '', 'token', 'avg'"),
        (dict(inner_blocks=(0, 2)), "inner_blocks=[0, 2] names blocks outside 0 to 1 (they count from 0, the paper from 1)"),
        (dict(drop_path_rate=1.0), "drop_path_rate=1.0 must be in [0, 1)"),
        (dict(attn_drop_rate=-0.1), "attn_drop_rate=-0.1 must be in [0, 1)"),
        (dict(mlp_ratio=0.01), "mlp_ratio=0.01 leaves no hidden channel at a width of 24"),
        (dict(inner_mlp_ratio=0), "inner_mlp_ratio=0 leaves no hidden channel at a width of 12"),
        (dict(se_ratio=0.01), "se_ratio=0.01 leaves no hidden channel"),
        (dict(depth=0), "depth=0 must be at least 1"),
        (dict(in_chans=0), "in_chans=0 must be at least 1"),
        (dict(num_classes=-1), "num_classes=-1 must be 0 (no head) or more"),
    ],
)
def test_arguments_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TNT(**{**TINY, **kwargs})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, 3, 32, 48),
            "the image is 32×48 (height×width); this model takes 32×32: resize the image, or call model.set_input_size",
        ),
        ((2, 1, 32, 32), "the image has 1 channels (shape (2, 1, 32, 32)); this model takes (batch, 3, 32, 32)"),
        ((3, 32, 32), "the image has shape (3, 32, 32); this model takes (batch, 3, 32, 32)"),
    ],
)
def test_images_of_another_shape(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny()(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16])
def test_images_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=re.escape(f"the image is {dtype}, the weights are torch.float32: cast it")):
        tiny()(torch.ones(1, 3, 32, 32).to(dtype))


def test_a_backend_set_later_is_checked():
    model = tiny()
    model.backend = "fsat"
    with pytest.raises(ValueError, match="backend='fsat' is unknown"):
        model(torch.randn(1, 3, 32, 32))


def test_reset_classifier_checks_before_it_changes():
    model = tiny()
    with pytest.raises(ValueError, match="global_pool='sum' is unknown"):
        model.reset_classifier(3, "sum")
    with pytest.raises(ValueError, match="num_classes=-3"):
        model.reset_classifier(-3)
    assert model.head.out_features == model.num_classes == 5


def test_nan_stays_in_its_image():
    model, image = tiny(), torch.randn(2, 3, 32, 32)
    expected = model(image)
    image[0, 0, 3, 3] = torch.nan
    out = model(image)
    assert out[0].isnan().all()
    assert relative_error(out[1], expected[1]) <= 1e-6


def test_the_package_says_its_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", tnt_fast.__version__)
