"""The recipes of docs/gradients.md, as they stand there, on both paths; and the maps that they ask the model for."""

import re
from pathlib import Path

import pytest
import torch
from helpers import TINY, perturb

from tnt_fast import TNT

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gradients.md"
RECIPES = dict(
    zip(
        ("saliency", "captum", "patches", "pixels"),
        re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S),
        strict=True,
    )
)
PATHS = pytest.mark.parametrize("backend", ["reference", "fused"])


def model_of(backend: str) -> TNT:
    if backend == "fused":
        pytest.importorskip("triton", reason="the kernels need Triton")
    torch.manual_seed(0)
    return perturb(TNT(**{**TINY, "depth": 1}, backend=backend)).eval()


def after(backend: str, *recipes: str, **changed) -> dict:
    """What names are bound to after these recipes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    names = {
        "torch": torch,
        "model": model_of(backend).to(device),
        "image": torch.randn(2, 3, 32, 32, generator=generator).to(device),
        "target": torch.tensor([1, 3], device=device),
    }
    for recipe in recipes:
        code = RECIPES[recipe]
        for old, new in changed.items():
            code = code.replace(f"{old}=32", f"{old}={new}")
        exec(code, names)
    return names


@PATHS
def test_saliency(backend):
    found = after(backend, "saliency")
    image = found["image"].detach().double().requires_grad_()
    model = model_of("reference").to(image.device).double()
    (exact,) = torch.autograd.grad(model(image).gather(1, found["target"][:, None]).sum(), image)
    torch.testing.assert_close(found["saliency"].double(), exact.abs().amax(1), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in found["model"].parameters())
    assert torch.equal(after(backend, "saliency")["saliency"], found["saliency"])  # bit for bit


@PATHS
def test_integrated_gradients_add_up(backend):
    pytest.importorskip("captum", reason="captum is not installed")
    found = after(backend, "captum", n_steps=8)
    assert found["attributions"].shape == found["image"].shape
    with torch.no_grad():
        logits = (found["model"](x).gather(1, found["target"][:, None])[:, 0] for x in (found["image"], 0 * found["image"]))
        change = next(logits) - next(logits)
    torch.testing.assert_close(found["attributions"].flatten(1).sum(1).float(), change, rtol=0.1, atol=0.02)
    assert found["delta"].abs().max() < 0.02 + 0.1 * change.abs().max()


@PATHS
def test_grad_cam(backend):
    pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam (grad-cam) is not installed")
    found = after(backend, "patches", "pixels")
    for name in ("of_patches", "of_pixels"):
        assert found[name].shape == (2, 32, 32)
        assert found[name].min() >= 0
        assert 0.9 < found[name].max() <= 1
    assert not found["model"].blocks[-1].norm_out._forward_hooks


def test_what_grad_cam_reads_is_the_same_on_both_paths():
    """Without it: the activations of the recipes' layers and their gradients, as maps."""
    found = []
    for backend in ("reference", "fused"):
        model, kept = model_of(backend), {}
        for name, layer in {"patches": model.blocks[-1].norm_out, "pixels": model.pixel_embed}.items():
            layer.register_forward_hook(lambda module, given, out, name=name, kept=kept: kept.update({name: out}))
        model.to(device := "cuda" if torch.cuda.is_available() else "cpu")
        image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        model(image)[:, 1].sum().backward(inputs=list(kept.values()))
        found.append({name: (model.as_maps(x), model.as_maps(x.grad)) for name, x in kept.items()})
    assert {name: maps[0].shape for name, maps in found[0].items()} == {"pixels": (2, 12, 8, 8), "patches": (2, 24, 2, 2)}
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_maps_have_every_token_where_the_image_has_it():
    model = TNT(**{**TINY, "img_size": (32, 48), "depth": 1}, backend="reference")
    rows, columns = model.pixel_embed.grid_size
    y, x = torch.meshgrid(torch.arange(rows * 4.0), torch.arange(columns * 4.0), indexing="ij")
    pixel = (100 * y + x).reshape(rows, 4, columns, 4).permute(0, 2, 1, 3).reshape(1, -1, 16, 1).expand(2, -1, -1, 12)
    assert torch.equal(model.as_maps(pixel.flatten(0, 1)), (100 * y + x).expand(2, 12, -1, -1))
    patch = torch.arange(1.0 + rows * columns)[None, :, None].expand(2, -1, 24)
    assert torch.equal(model.as_maps(patch), torch.arange(1.0, 1 + rows * columns).reshape(rows, columns).expand(2, 24, -1, -1))


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 4, 24), (3, 16, 12), (2, 24, 2, 2)], ids=str)
def test_what_are_no_tokens_is_named(shape):
    model = TNT(**{**TINY, "depth": 1}, backend="reference")
    with pytest.raises(ValueError, match=r"tokens have shape .*; accepted: patches \(B, 5, 24\), pixels \(B·4, 16, 12\)"):
        model.as_maps(torch.zeros(shape))
