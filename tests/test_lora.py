"""The recipe for adapters: what trains, what stays, and that the merged weights are a plain TNT's."""

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("torchvision")

import lora
import timm
import torch
from helpers import write_images

import tnt_fast
from tnt_fast.checkpoints import read_checkpoint
from tnt_fast.cli import main
from tnt_fast.variants import create_tnt

pytestmark = pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path")

SIZES = dict(img_size=32, embed_dim=24, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=2)
INNER = {
    f"{part}.{linear}" for part, linears in (("attn_in", "qk v proj"), ("mlp_in", "fc1 fc2")) for linear in linears.split()
}
OUTER = {name.replace("attn_in", "attn_out").replace("mlp_in", "mlp") for name in INNER}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights of timm's TNT with 5 classes, and 12 images to train on of 2 others, 4 held out."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    torch.save(timm.create_model("tnt_s_patch16_224", num_classes=5, **SIZES).state_dict(), root / "timm.pth")
    return root / "timm.pth", write_images(root / "data")


@pytest.mark.parametrize("only_outer", [False, True])
def test_only_the_adapters_and_the_head_train_and_the_reasons_against_the_kernels_name_the_inner_ones(only_outer):
    torch.manual_seed(0)
    model = create_tnt("tnt_s_patch16_224", num_classes=3, **SIZES)
    image = torch.randn(2, 3, 32, 32)
    expected = model(image)
    adapted = lora.adapted(model, 4, only_outer)
    assert torch.equal(adapted(image), expected)  # adapters begin at zero
    names = {name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad}
    wrapped = {f"blocks.{i}.{name}" for i in range(2) for name in (OUTER if only_outer else INNER | OUTER)}
    assert names == {f"{name}.lora_{x}.default.weight" for name in wrapped for x in "AB"} | {
        f"head.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    adapted(image).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    found = {reason.split(" ")[0] for reason in tnt_fast.why_not_fused(model, gradients=True) if reason.startswith("blocks.")}
    assert found == (set() if only_outer else {f"blocks.{i}.{name}" for i in range(2) for name in INNER})
    merged = adapted.merge_and_unload()
    assert merged is model
    assert not [reason for reason in tnt_fast.why_not_fused(merged) if reason.startswith("blocks.")]


def test_what_was_learnt_is_merged_into_weights_that_plain_models_read(start, tmp_path, capsys):
    weights, data = start
    out = tmp_path / "run"
    sizes = ["--checkpoint", str(tmp_path / "first.pt")]
    first = {"state_dict": torch.load(weights), "arch": "tnt_s_patch16_224", "args": {"model_kwargs": SIZES}}
    torch.save(first, tmp_path / "first.pt")
    quick = ["--epochs", "2", "--batch-size", "4", "--lr", "0.02", "--device", "cpu", "--workers", "0", "--out", str(out)]
    assert lora.main([str(data), *sizes, *quick]) == 0
    said = capsys.readouterr().out
    assert "head replaced: 5 → 2 classes" in said
    apart = float(said.partition("differ by at most ")[2].split()[0])
    assert apart < 1e-5
    saved = read_checkpoint(out / "merged.pt")
    learnt, before = saved["state_dict"], first["state_dict"]
    changed = {name for name in before if not name.startswith("head.") and not torch.equal(learnt[name], before[name])}
    assert changed == {f"blocks.{i}.{name}.weight" for i in range(2) for name in INNER | OUTER}
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32))
    answers = []
    for name in ("tnt_fast_s_patch16_224", "tnt_s_patch16_224"):  # ours, and timm's own
        plain = timm.create_model(name, num_classes=2, **SIZES).eval()
        plain.load_state_dict(learnt)
        answers.append(plain(image))
    torch.testing.assert_close(*answers)
    picture = next((data / "val").rglob("*.png"))
    assert main(["classify", str(picture), "--checkpoint", str(out / "merged.pt"), "--device", "cpu"]) == 0


def test_without_weights_it_says_what_to_name(start, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        lora.main([str(start[1]), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "no weights to start from are named; give --checkpoint FILE" in capsys.readouterr().err
