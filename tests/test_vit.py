"""A TNT that begins as a ViT computes what the ViT does, and learns from there."""

import pytest
import timm
import torch
from helpers import perturb, relative_error
from timm.models.vision_transformer import VisionTransformer

import tnt_fast
from tnt_fast.variants import create_tnt, load_tnt

TINY = dict(img_size=(16, 24), patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=2)
INNER = dict(inner_dim=12, backend="reference")

VITS = {
    "deit": {},
    "no biases of q, k, v": {"qkv_bias": False},
    "deit3": {"init_values": 0.5, "no_embed_class": True},
    "average": {"global_pool": "avg", "fc_norm": False},
    "no head": {"num_classes": 0, "mlp_ratio": 3},
}


def tiny(**changed) -> VisionTransformer:
    return perturb(VisionTransformer(**{**TINY, **changed}).double(), 0.2).eval()


def image(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("inner", [{"inner_blocks": ()}, {}, {"legacy": True}], ids=["no inner", "all inner", "legacy"])
@pytest.mark.parametrize("vit", VITS)
def test_at_first_a_tnt_is_the_vit_with_the_same_weights(vit, inner):
    theirs = tiny(**VITS[vit])
    ours = tnt_fast.from_vit(theirs, **INNER, **inner)
    found, expected = image().requires_grad_(), image().requires_grad_()
    out, right = ours(found), theirs(expected)
    assert relative_error(out, right) < 1e-12
    for outputs in (out, right):
        outputs.square().sum().backward()
    assert relative_error(found.grad, expected.grad) < 1e-12
    assert relative_error(ours.patch_embed.weight.grad, theirs.patch_embed.proj.weight.grad) < 1e-12
    qk = theirs.blocks[1].attn.qkv.weight.grad[:48]
    assert relative_error(ours.blocks[1].attn_out.qk.weight.grad, qk) < 1e-12


@pytest.mark.parametrize("legacy", [False, True])
def test_the_new_part_learns(legacy):
    ours = tnt_fast.from_vit(tiny(), **INNER, legacy=legacy)
    before = ours(image())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for _ in range(3):  # first what ends the folds, then what is before it
        optimizer.zero_grad()
        ours(image()).square().sum().backward()
        optimizer.step()
    assert [name for name, p in ours.named_parameters() if not p.grad.any()] == []
    assert relative_error(ours(image()), before) > 1e-3


def test_the_fused_path_has_the_patch_embedding_too():
    ours, picture = perturb(tnt_fast.from_vit(tiny(depth=1).float(), **INNER)), image(1).float()
    with torch.no_grad():
        expected = ours(picture)
        ours.backend = "fused"
        assert relative_error(ours(picture), expected) < 1e-5
        ours.backend = "reference"
        ours.patch_embed.weight.zero_()
        assert relative_error(ours(picture), expected) > 1e-3


def test_it_is_scripted_and_compiled():
    ours, picture = tnt_fast.from_vit(tiny(depth=1), **INNER), image()
    expected = ours(picture)
    assert torch.equal(torch.jit.script(ours)(picture), expected)
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="eager")(picture), expected)


def test_it_has_the_vits_settings_and_its_weights_go_through_a_file(tmp_path):
    vit = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.1, drop_rate=0.2).train()
    ours = tnt_fast.from_vit(vit, backend="reference")
    assert (ours.sizes()["C"], ours.sizes()["H"]) == (12, 2)  # as the paper's TNT-Ti
    assert ours.training
    assert (ours.head_drop.p, ours.blocks[1].drop_path.drop_prob) == (0.2, pytest.approx(0.1))
    assert {m.eps for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert ours.pretrained_cfg["mean"] == vit.pretrained_cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    torch.save(ours.state_dict(), tmp_path / "tnt.pt")
    sizes = dict(img_size=32, depth=2, qkv_bias=True, use_patch_embed=True)
    again = load_tnt("tnt_ti_patch16_224", tmp_path / "tnt.pt", **sizes).model
    assert torch.equal(again.patch_embed.weight, vit.patch_embed.proj.weight)
    with pytest.raises(tnt_fast.CheckpointError, match="unexpected: .*patch_embed"):
        load_tnt("tnt_ti_patch16_224", tmp_path / "tnt.pt", **{**sizes, "use_patch_embed": False})


def test_overlapping_patches_of_any_size_are_embedded_where_they_lie():
    sizes = dict(img_size=32, embed_dim=24, depth=1, num_heads_outer=2, num_classes=3, patch_stride=8, dynamic_img_size=True)
    model = create_tnt("tnt_ti_patch16_224", **sizes, use_patch_embed=True, backend="reference")
    picture = torch.zeros(1, 3, 48, 32)
    picture[:, :, 40:, :8] = 1  # the last row's first patch alone
    with torch.no_grad():
        model.patch_embed.bias.zero_()
        model.blocks = torch.nn.ModuleList()
        model.norm = torch.nn.Identity()
        both = model.forward_features(picture)
        model.patch_embed = None
        tokens = (both - model.forward_features(picture)).abs().amax(2)[0, 1:].reshape(5, 3)
    assert tokens.nonzero().tolist() == [[4, 0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reg_tokens": 2}, "reg_token"),
        ({"qk_norm": True}, "q_norm"),
        ({"pre_norm": True}, "norm_pre"),
        ({"global_pool": "avg"}, "fc_norm"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"pos_embed": "none"}, "no positions"),
        ({"act_layer": "quick_gelu"}, "the activation QuickGELU"),
        ({"mlp_layer": timm.layers.SwiGLU}, "mlp"),
        ({"patch_drop_rate": 0.1}, "patch_drop is a PatchDropout"),
    ],
    ids=str,
)
def test_a_vit_that_a_tnt_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        tnt_fast.from_vit(VisionTransformer(**{**TINY, **changed}), **INNER)


def test_what_is_no_vit_of_timm_is_refused():
    with pytest.raises(TypeError, match="takes a timm VisionTransformer, got timm.models.deit.VisionTransformerDistilled"):
        tnt_fast.from_vit(timm.create_model("deit_tiny_distilled_patch16_224", device="meta"))
    with pytest.raises(ValueError, match="num_heads_inner=5 does not divide inner_dim=12"):
        tnt_fast.from_vit(VisionTransformer(**TINY), inner_dim=12, num_heads_inner=5)
