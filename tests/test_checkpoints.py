"""Weights in and out: every known origin, positions on other grids, files that do not fit or mean harm."""

import argparse
import math
import os
import re

import pytest
import torch
from helpers import TINY, perturb, relative_error
from safetensors.torch import save_file
from timm.models.tnt import TNT as TimmTNT

from tnt_fast import TNT, CheckpointError, load_checkpoint, save_checkpoint
from tnt_fast.checkpoints import convert_state_dict, fit, read_checkpoint


def tiny(**kwargs) -> TNT:
    return TNT(**{**TINY, "backend": "reference", **kwargs}).eval()


def as_authors(state):
    """timm's names → those of the authors' release, written against its source."""
    inner = {"norm_in": "inner_norm1", "attn_in": "inner_attn", "norm_mlp_in": "inner_norm2", "mlp_in": "inner_mlp"}
    outer = {"norm_out": "outer_norm1", "attn_out": "outer_attn", "norm_mlp": "outer_norm2", "mlp": "outer_mlp"}
    rest = {"norm1_proj": "proj_norm1", "norm2_proj": "proj_norm2", "pixel_embed": "patch_embed"}
    names = inner | outer | rest | {"patch_pos": "outer_pos", "pixel_pos": "inner_pos"}
    out = {"outer_tokens": torch.zeros(1, state["patch_pos"].shape[1] - 1, state["patch_pos"].shape[2])}
    for key, value in state.items():
        if key == "pixel_pos":
            value = value.flatten(2).transpose(1, 2)
        out[".".join(names.get(part, part) for part in key.split("."))] = value
    return out


def as_mmpretrain(state):
    """timm's legacy names → those of mmpretrain, written against its source."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "head":
            out[f"head.fc.{parts[1]}"] = value
            continue
        if parts[0] == "proj":
            key = f"projection.{parts[1]}"
        if parts[0] == "blocks":
            layer, module, leaf = f"layers.{parts[1]}", parts[2], parts[-1]
            side = "inner_block" if module.endswith("_in") else "outer_block"
            if module in ("norm1_proj", "proj"):
                key = f"{layer}.{'norm_proj' if module == 'norm1_proj' else 'projection'}.{leaf}"
            elif module.startswith("norm"):
                key = f"{layer}.{side}.{'norm_ffn' if 'mlp' in module else 'norm_attn'}.{leaf}"
            elif module.startswith("attn"):
                if parts[3] == "v":
                    continue
                if parts[3] == "qk":
                    value = torch.cat([value, state[key.replace(".qk.", ".v.")]])
                    key = f"{layer}.{side}.attn.attn.in_proj_{leaf}"
                else:
                    key = f"{layer}.{side}.attn.attn.out_proj.{leaf}"
            else:
                key = f"{layer}.{side}.ffn.layers.{'0.0' if parts[3] == 'fc1' else '1'}.{leaf}"
        out[f"backbone.{key}"] = value
    return out


WRAPPINGS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "model": lambda s: {"model": s},
    "ema before plain": lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
    "DistributedDataParallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize(
    ("wrapping", "ending"), [(w, ".pth") for w in WRAPPINGS] + [("state_dict", ".pth.tar"), ("bare", ".safetensors")]
)
@pytest.mark.parametrize("origin", ["timm", "timm legacy", "authors", "mmpretrain", "mmpretrain with biases"])
def test_files_of_every_origin_give_the_same_outputs(tmp_path, origin, wrapping, ending):
    legacy = origin not in ("timm", "authors")
    kwargs = {**TINY, "legacy": legacy, "qkv_bias": "biases" in origin}
    theirs = perturb(TimmTNT(**kwargs)).eval()
    state = theirs.state_dict()
    if origin == "authors":
        state = as_authors(state)
        assert "blocks.0.inner_attn.qk.weight" in state
    if origin.startswith("mmpretrain"):
        state = as_mmpretrain(state)
        assert "backbone.layers.0.inner_block.ffn.layers.0.0.weight" in state
    file = tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        torch.save(WRAPPINGS[wrapping](state), file)
    ours = load_checkpoint(tiny(legacy=legacy, qkv_bias="biases" in origin), file)
    image = torch.randn(2, 3, 32, 32)
    assert relative_error(ours(image), theirs(image)) <= 1e-5
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_averaged_weights_are_a_choice(tmp_path):
    plain, averaged = perturb(tiny(), 0.1).state_dict(), perturb(tiny(), 0.2).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "a.pth")
    assert torch.equal(load_checkpoint(tiny(), tmp_path / "a.pth").cls_token, averaged["cls_token"])
    assert torch.equal(load_checkpoint(tiny(), tmp_path / "a.pth", use_ema=False).cls_token, plain["cls_token"])


def test_squeeze_excite_weights_of_the_authors(tmp_path):
    theirs = perturb(tiny(se_ratio=0.25))
    torch.save(as_authors(theirs.state_dict()), tmp_path / "se.pth")
    assert "blocks.0.se_layer.fc.1.weight" in theirs.state_dict()
    ours = load_checkpoint(tiny(se_ratio=0.25), tmp_path / "se.pth")
    assert torch.equal(ours.blocks[1].se_layer.fc[3].weight, theirs.blocks[1].se_layer.fc[3].weight)


# ---- positions ----


def plane(rows: int, columns: int, width: int = 24) -> torch.Tensor:
    """Positions that are linear over the unit square, with a class position of sevens: resampling keeps such a plane inside."""
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    grid = (2 * y[:, None] + 3 * x[None, :]).reshape(1, rows * columns, 1).expand(-1, -1, width)
    return torch.cat([torch.full((1, 1, width), 7.0), grid], 1)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ((8, 8), (12, 12), False),
        ((8, 8), (8, 16), False),
        ((8, 8), (4, 16), True),  # an equal count on another grid
        ((4, 16), (8, 8), True),
        ((8, 16), (16, 8), True),
        ((6, 10), (12, 10), True),
        ((6, 10), (6, 10), False),
    ],
)
def test_positions_are_resampled_to_the_grid(tmp_path, source, target, said):
    state = tiny(img_size=(source[0] * 16, source[1] * 16)).state_dict()
    state["patch_pos"] = plane(*source)
    torch.save(state, tmp_path / "a.pth")
    model = tiny(img_size=(target[0] * 16, target[1] * 16))
    load_checkpoint(model, tmp_path / "a.pth", source_grid=source if said else None)
    expected = plane(*target)
    assert torch.equal(model.patch_pos[:, 0], expected[:, 0])
    inside = (slice(None), slice(2, -2), slice(2, -2)) if min(target) > 4 else (slice(None), slice(1, -1), slice(3, -3))
    found = model.patch_pos[:, 1:].detach().reshape(1, *target, 24)[inside]
    wanted = expected[:, 1:].reshape(1, *target, 24)[inside]
    assert (found - wanted).abs().max() < 0.08
    if source == target:
        assert torch.equal(model.patch_pos, state["patch_pos"])


def test_a_grid_that_cannot_be_known_is_asked_for(tmp_path):
    state = tiny(img_size=128).state_dict()
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=re.escape("64 positions, which may be a grid of 8×8 or the model's own 4×16")):
        load_checkpoint(tiny(img_size=(64, 256)), tmp_path / "a.pth")
    torch.save({"state_dict": state, "grid_size": (8, 8)}, tmp_path / "b.pth")  # as tnt-fast train writes it
    assert load_checkpoint(tiny(img_size=(64, 256)), tmp_path / "b.pth").patch_pos.shape == (1, 65, 24)
    state["patch_pos"] = torch.zeros(1, 61, 24)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"60 positions, which form no square.*source_grid=\(rows, columns\)"):
        load_checkpoint(tiny(img_size=128), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"has 60 positions, source_grid=\(5, 5\) has 25"):
        load_checkpoint(tiny(img_size=128), tmp_path / "c.pth", source_grid=(5, 5))


def test_resampling_keeps_the_dtype():
    state = tiny(img_size=64, dtype=torch.bfloat16).state_dict()
    assert convert_state_dict(state, tiny(img_size=128))["patch_pos"].dtype == torch.bfloat16


# ---- files that do not fit ----


def unchanged(model: TNT, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("file_options", "model_options", "message"),
    [
        ({"legacy": True}, {}, r"the model has the non-legacy stem and fold, the file holds a legacy TNT.*legacy=True"),
        ({}, {"legacy": True}, r"the model has the legacy stem and fold, the file holds a non-legacy TNT.*legacy=False"),
        ({"num_classes": 7}, {}, r"other shapes: head\.weight \(7, 24\), model \(5, 24\).*num_classes=7.*reset_head=True"),
        ({"num_classes": 0}, {}, r"missing: head\.weight, head\.bias\. The file has no classes, the model 5.*reset_head=True"),
        ({"depth": 3}, {}, r"unexpected: blocks\.2\.\S+.* and \d+ more"),
        ({}, {"depth": 3}, r"missing: blocks\.2\.\S+.* and \d+ more"),
        ({"embed_dim": 48}, {}, r"other shapes: cls_token \(1, 1, 48\), model \(1, 1, 24\)"),
        ({"first_stride": 2}, {}, r"other shapes: pixel_pos \(1, 12, 8, 8\), model \(1, 12, 4, 4\)"),
        ({"use_patch_pos": False}, {}, r"missing: patch_pos"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, file_options, model_options, message):
    torch.save(tiny(**file_options).state_dict(), tmp_path / "a.pth")
    model = perturb(tiny(**model_options))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(model, tmp_path / "a.pth")
    assert "a.pth' does not fit this model" in str(caught.value)
    assert unchanged(model, before)


def test_a_legacy_file_of_mmpretrain_names_the_stem(tmp_path):
    torch.save(as_mmpretrain(tiny(legacy=True).state_dict()), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="build the model with legacy=True"):
        load_checkpoint(tiny(), tmp_path / "a.pth")


def test_the_head_can_be_kept(tmp_path):
    theirs = perturb(tiny(num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    model = tiny()
    head = model.head.weight.clone()
    load_checkpoint(model, tmp_path / "a.pth", reset_head=True)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.cls_token, theirs.cls_token)


def test_foreign_files_are_refused(tmp_path):
    file = tmp_path / "a.pth"
    for contents, message in (
        ({"conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(1)}, r"does not look like a TNT.*2 tensors \(conv1\.weight"),
        ({"epoch": 3}, r"does not look like a TNT.*0 tensors \(no tensors"),
        ([1, 2], r"holds a list; expected a dict of tensors"),
        (torch.zeros(3), r"holds a Tensor; expected a dict of tensors"),
    ):
        torch.save(contents, file)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tiny(), file)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*absent\.pth"):
        load_checkpoint(tiny(), tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        load_checkpoint(tiny(), tmp_path)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.99])
def test_truncated_files_are_refused(tmp_path, ending, keep):
    file = tmp_path / f"a{ending}"
    state = tiny().state_dict()
    save_file(state, file) if ending == ".safetensors" else torch.save(state, file)
    data = file.read_bytes()
    file.write_bytes(data[: math.floor(len(data) * keep)])
    with pytest.raises(CheckpointError, match=rf"a\{ending}' \([\d,]+ bytes\) is"):
        load_checkpoint(tiny(), file)


@pytest.mark.parametrize("junk", [b"GIF89a", b"\x80\x02}q\x00.", b"<html>not found</html>", bytes(4096)])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_files_of_another_format_are_refused(tmp_path, ending, junk):
    file = tmp_path / f"a{ending}"
    file.write_bytes(junk)
    with pytest.raises(CheckpointError):
        load_checkpoint(tiny(), file)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy_format", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, legacy_format):
    file, trace = tmp_path / "a.pth", tmp_path / "harm"
    contents = {"state_dict": tiny().state_dict(), "extra": Harm(str(trace))}
    torch.save(contents, file, _use_new_zipfile_serialization=not legacy_format)
    with pytest.raises(CheckpointError, match=r"is refused.*could execute code.*tnt_fast reads weights only"):
        load_checkpoint(tiny(), file)
    assert not trace.exists()


# ---- weights that are none ----


def expanded(t):
    return t.flatten()[0].clone().expand(t.shape)


def odd_positions(t):
    return torch.zeros(1, 0, 24)


ODD = {
    "integers": (lambda t: t.long(), r"not weights: NAME is int64"),
    "booleans": (lambda t: t > 0, r"not weights: NAME is bool"),
    "complex numbers": (lambda t: t.to(torch.complex64), r"not weights: NAME is complex64"),
    "a meta tensor": (lambda t: t.to("meta"), r"on the device 'meta'"),
    "a sparse tensor": (lambda t: t.to_sparse(), r"laid out as torch\.sparse_coo"),
    "a quantised tensor": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), r"NAME is qint8"),
    "less than it seems": (expanded, r"expanded from less"),
    "one number": (lambda t: t.flatten()[0].clone(), r"other shapes: NAME \(\)"),
    "a flat tensor": (lambda t: t.flatten(), r"other shapes: NAME \(\d+,\)"),
    "nothing": (odd_positions, r"other shapes: NAME \(1, 0, 24\)"),
    "NaN": (lambda t: t * torch.nan, r"NAME holds values that are not finite"),
    "infinity": (lambda t: t / 0, r"NAME holds values that are not finite"),
    "too large for float32": (lambda t: t.double() * 1e300, r"NAME holds values that are as float32 not finite"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["patch_pos", "head.weight"])
def test_what_is_no_weight_is_named_and_changes_nothing(kind, name):
    change, message = ODD[kind]
    state = perturb(tiny(), 0.3).state_dict()
    model = perturb(tiny())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message.replace("NAME", re.escape(name))):
        load_checkpoint(model, {**state, name: change(state[name])})
    assert unchanged(model, before)


@pytest.mark.parametrize("origin", [as_authors, as_mmpretrain])
def test_odd_tensors_of_other_origins_are_no_other_error(origin):
    model = tiny(legacy=origin is as_mmpretrain, depth=1)
    state = origin(model.state_dict())
    state.pop("outer_tokens", None)  # which is not read
    for key in state:
        changed = [{**state, key: odd} for odd in (torch.zeros(()), torch.zeros(0), torch.zeros(1, 2, 3, 4, 5))]
        for contents in (*changed, {k: v for k, v in state.items() if k != key}):
            with pytest.raises(CheckpointError):
                load_checkpoint(model, contents)


def test_a_key_of_a_million_characters_is_shown_short():
    with pytest.raises(CheckpointError, match=r"unexpected: x+…x+ \(1,000,000 characters\)") as caught:
        load_checkpoint(tiny(), {**tiny().state_dict(), "x" * 10**6: torch.zeros(1)})
    assert len(str(caught.value)) < 500


# ---- checkpoints of the world ----


PREFIXES = ["model.", "net.", "student.", "timm_model.", "base_model.model.", "module._orig_mod.", "any.thing.at.all."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("origin", ["timm", "authors", "mmpretrain"])
def test_the_prefix_is_found_by_the_keys(prefix, origin):
    theirs = perturb(tiny(legacy=origin == "mmpretrain"))
    state = {"timm": dict, "authors": as_authors, "mmpretrain": as_mmpretrain}[origin](theirs.state_dict())
    state = {f"{prefix}{key}": value for key, value in state.items()} | {"criterion.weight": torch.ones(5)}
    ours = load_checkpoint(tiny(legacy=origin == "mmpretrain"), state)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("place", ["model_state_dict", "net", "weights", "params", "module", "trainer.state.model"])
def test_the_dict_is_found_by_the_keys(place):
    theirs = perturb(tiny())
    contents = theirs.state_dict()
    for key in reversed(place.split(".")):
        contents = {key: contents, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    assert torch.equal(load_checkpoint(tiny(), contents).cls_token, theirs.cls_token)


@pytest.mark.parametrize("name", ["averaged", "ema", "model_ema", "ema_state_dict", "swa_model", "averaging_state"])
def test_averaged_weights_are_preferred_and_it_is_said(name):
    plain, averaged = perturb(tiny(), 0.1), perturb(tiny(), 0.2).state_dict()
    contents = {
        "model": plain.state_dict(),
        name: {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in averaged.items()},
    }
    fitted = fit(tiny(), contents)
    assert torch.equal(fitted.state["cls_token"], averaged["cls_token"])
    assert fitted.said == "loaded 2 blocks (the averaged weights of the two that it holds)"
    fitted = fit(tiny(), contents, use_ema=False)
    assert torch.equal(fitted.state["cls_token"], plain.cls_token)
    assert fitted.said == "loaded 2 blocks (not the averaged weights of the two that it holds)"


def test_several_models_are_asked_about():
    state = tiny().state_dict()
    contents = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"weights of 2 TNTs, at 'student\.', 'teacher\.'"):
        load_checkpoint(tiny(), contents)


def test_a_dict_that_holds_itself_ends():
    contents: dict = {"state_dict": {"conv.weight": torch.zeros(1)}}
    contents["me"] = contents
    with pytest.raises(CheckpointError, match="does not look like a TNT"):
        load_checkpoint(tiny(), contents)


# ---- saving ----


def test_saving_replaces_the_file_whole(tmp_path):
    file = tmp_path / "a.pt"
    save_checkpoint({"value": torch.arange(3)}, file)
    save_checkpoint({"value": torch.arange(4)}, file)
    assert torch.equal(read_checkpoint(file)["value"], torch.arange(4))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, error):
    file = tmp_path / "a.pt"
    save_checkpoint({"value": torch.arange(3)}, file)
    old = file.read_bytes()

    def partly(obj, target):
        target.write(b"half a file")
        raise error

    monkeypatch.setattr(torch, "save", partly)
    with pytest.raises(type(error)):
        save_checkpoint({"value": torch.arange(4)}, file)
    assert file.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_file_that_the_system_does_not_let_grow(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "a.pt"
    save_checkpoint({"value": torch.arange(3)}, file)
    old, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint({"value": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_saving_where_nothing_can_be_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_checkpoint({}, tmp_path / "absent" / "a.pt")
