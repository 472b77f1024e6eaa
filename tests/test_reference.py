"""The functions of reference.py compute what the model's modules compute, bit for bit, on every option they have."""

import pytest
import torch
from helpers import TINY, perturb, relative_error

from tnt_fast import TNT, reference
from tnt_fast.tnt import Attention


def attention_by_loops(qk, v, heads):
    """softmax(q kᵀ / √D) v, a head and a query at a time."""
    batch, tokens, width = v.shape
    head_dim = width // heads
    out = torch.empty_like(v)
    for b in range(batch):
        for h in range(heads):
            at = slice(h * head_dim, (h + 1) * head_dim)
            q, k = qk[b, :, :width][:, at], qk[b, :, width:][:, at]
            for t in range(tokens):
                score = torch.exp(k @ q[t] / head_dim**0.5)
                out[b, t, at] = (score / score.sum()) @ v[b, :, at]
    return out


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_the_papers_equation(heads):
    qk, v = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    out = reference.attend(reference.attention_weights(qk, heads), v)
    assert relative_error(out, attention_by_loops(qk, v, heads)) <= 1e-12
    attention = Attention(12, 12, heads, qkv_bias=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = attention.proj(attention_by_loops(attention.qk(x), attention.v(x), heads))
    assert relative_error(attention(x), expected) <= 1e-12


def test_cut_patches_goes_row_by_row():
    x = torch.arange(2 * 3 * 8 * 12, dtype=torch.float64).reshape(2, 3, 8, 12)
    cut = reference.cut_patches(x, (4, 6), (2, 3)).reshape(2, 3, 3, 3, 4, 6)
    for row in range(3):
        for column in range(3):
            assert torch.equal(cut[:, row, column], x[:, :, 2 * row : 2 * row + 4, 3 * column : 3 * column + 6])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_functions_equal_modules(stride, qkv_bias, legacy):
    model = TNT(**TINY, legacy=legacy, qkv_bias=qkv_bias, first_stride=stride, backend="reference")
    model = perturb(model, 0.2).double().eval()
    embed, block = model.pixel_embed, model.blocks[0]
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    pixel = reference.pixel_embed(
        image, embed.proj.weight, embed.proj.bias, model.pixel_pos, embed.patch_size, embed.stride, embed.patch_stride, legacy
    )
    assert torch.equal(pixel, embed(image, model.pixel_pos))

    def weights(norm1, attn, norm2, mlp):
        parts = (norm1, attn.qk, attn.v, attn.proj, norm2, mlp.fc1, mlp.fc2)
        return reference.TransformerWeights(*(tensor for part in parts for tensor in (part.weight, part.bias)))

    inner = weights(block.norm_in, block.attn_in, block.norm_mlp_in, block.mlp_in)
    assert torch.equal(reference.inner(pixel, inner, num_heads=2), block.inner(pixel))
    patch = torch.randn(3, 5, 24, dtype=torch.float64)
    second = () if legacy else (block.norm2_proj.weight, block.norm2_proj.bias)
    fold = (block.norm1_proj.weight, block.norm1_proj.bias, block.proj.weight, block.proj.bias)
    folded = reference.fold(pixel, patch, *fold, *second)
    assert torch.equal(folded, block.fold(pixel, patch))
    assert torch.equal(folded[:, 0], patch[:, 0])
    outer = weights(block.norm_out, block.attn_out, block.norm_mlp, block.mlp)
    assert torch.equal(reference.outer(patch, outer, num_heads=3), block.outer(patch))
    base = model.patch_pos.expand(3, -1, -1) + torch.cat([model.cls_token, torch.zeros_like(model.patch_pos[:, 1:])], 1)
    stem = (model.norm1_proj.weight, model.norm1_proj.bias, model.proj.weight, model.proj.bias)
    stem = reference.fold(pixel, base, *stem, model.norm2_proj.weight, model.norm2_proj.bias)
    assert relative_error(stem, model._stem(pixel)) <= 1e-15


def test_drop_path_scales_the_branches():
    block = perturb(TNT(**TINY, backend="reference"), 0.2).double().eval().blocks[0]
    pixel = torch.randn(4, 16, 12, dtype=torch.float64)
    parts = (block.norm_in, block.attn_in.qk, block.attn_in.v, block.attn_in.proj, block.norm_mlp_in)
    tensors = [t for part in (*parts, block.mlp_in.fc1, block.mlp_in.fc2) for t in (part.weight, part.bias)]
    attn_scale, mlp_scale = torch.tensor([0, 1, 2, 0.5]).double(), torch.tensor([1, 0, 0.5, 2]).double()
    weights = reference.TransformerWeights(*tensors)
    out = reference.inner(pixel, weights, num_heads=2, attn_scale=attn_scale, mlp_scale=mlp_scale)
    x = pixel + attn_scale[:, None, None] * block.attn_in(block.norm_in(pixel))
    x = x + mlp_scale[:, None, None] * block.mlp_in(block.norm_mlp_in(x))
    assert relative_error(out, x) <= 1e-14
