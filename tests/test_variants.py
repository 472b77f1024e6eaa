"""What names and files may say about a model, and models with weights: from tags, hub and files."""

import json
import socket

import pytest
import torch
from helpers import TINY, perturb
from safetensors.torch import save_file

from tnt_fast import CheckpointError, variants
from tnt_fast.variants import check_sizes, create_tnt, load_tnt, variant

SIZES = {name: value for name, value in TINY.items() if name != "num_classes"}
NAME = "tnt_ti_patch16_224"


@pytest.fixture(autouse=True)
def requests(monkeypatch) -> list:
    """Every try to reach another machine, which fails."""
    made = []

    def connect(*address, **_):
        made.append(address)
        raise OSError("Name or service not known")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("HF_HUB_CACHE", "nowhere")
    return made


def tiny(**changed):
    return perturb(create_tnt(NAME, **{**SIZES, "num_classes": 5, **changed}, backend="reference"))


def run(**changed) -> dict:
    """What tnt-fast train writes."""
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    sizes = {**SIZES, "num_classes": 5}
    known = {"format": 1, "model": NAME, "model_kwargs": sizes, "classes": list("abcde"), "data_config": config}
    return {**known, "state_dict": tiny().state_dict(), **changed}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": True}, "pretrained is no argument of the model"),
        ({"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}, "pretrained_cfg_overlay is no argument"),
        ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path is no argument"),
        ({"features_only": True}, "features_only is no argument"),
        ({"embeddim": 3}, "; nearest: embed_dim"),
        ({"\x1b[2J": 3}, r"'\x1b[2J' is no argument"),
        ({"depth": 10**9}, "depth=1000000000 is not accepted; expected a whole number from 1 to 100"),
        ({"depth": True}, "depth=True is not accepted"),
        ({"depth": "3"}, "depth='3' is not accepted"),
        (
            {"img_size": (224, 10**6)},
            "img_size=(224, 1000000) is not accepted; expected a whole number from 1 to 16,384 or a pair",
        ),
        ({"img_size": [[[1]]]}, "img_size="),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan is not accepted"),
        ({"qkv_bias": 1}, "qkv_bias=1 is not accepted; expected one of True, False"),
        ({"global_pool": "x" * 10**6}, "global_pool="),
        ({"inner_blocks": [10**9]}, "inner_blocks=(1000000000) is not accepted"),
        ([1], "the model's arguments are a list"),
    ],
)
def test_arguments_are_the_models_own_in_their_ranges(given, message, requests):
    with pytest.raises(ValueError) as caught:
        check_sizes(given)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError, match="what it says about its model is refused"):
        load_tnt(None, run(model_kwargs=given))
    assert requests == []


def test_every_size_of_the_constructor_is_taken():
    given = {"img_size": [32, 64], "patch_stride": None, "mlp_ratio": 4, "inner_blocks": [0], "depth": 1, "drop_rate": 0.1}
    assert check_sizes(given) == {**given, "img_size": (32, 64), "inner_blocks": (0,)}


@pytest.mark.parametrize(
    "name", ["resnet50", "hf-hub:a/b", "local-dir:/etc", "tnt_s_patch16_224.evil", "", None, 3, "x" * 10**6]
)
def test_a_file_names_a_variant_of_ours(name, requests):
    with pytest.raises(CheckpointError, match="is unknown"):
        load_tnt(None, run(model=name))
    assert requests == []


def test_names_of_timm_and_tags_mean_our_variants():
    for name in ("tnt_s_patch16_224", "timm/tnt_s_patch16_224.in1k", "tnt_fast_s_patch16_224.in1k"):
        assert variant(name) == "tnt_fast_s_patch16_224"
    with pytest.raises(ValueError, match="'tnt_fast_s_patch16_244' is unknown; nearest: tnt_fast_s_patch16_224"):
        variant("tnt_s_patch16_244")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": None}, "'classes' is no list of names"),
        ({"classes": ["a"]}, "'classes' has 1 names, its head 5 classes"),
        ({"classes": [1, 2, 3, 4, 5]}, "no list of names"),
        ({"data_config": 3}, "'data_config' is a int"),
        ({"data_config": {"input_size": (3, 10**9, 1)}}, "'data_config' is refused"),
        ({"grid_size": "x"}, "'grid_size' is x; expected rows and columns"),
        ({"format": 7}, "of format 7"),
        ({"model_kwargs": {**SIZES, "depth": 100}}, "does not fit this model: missing: blocks.2"),
        ({"model_kwargs": {**SIZES, "embed_dim": 16384, "num_heads_outer": 1}}, "does not fit this model: other shapes"),
    ],
)
def test_entries_of_a_run_are_held_to_its_weights_before_a_model_is_built(monkeypatch, changed, message):
    contents, create = run(**changed), variants.create_tnt

    def only_sizes(*args, device=None, **kwargs):
        assert device == "meta", "numbers were made for a file that is refused"
        return create(*args, device=device, **kwargs)

    monkeypatch.setattr(variants, "create_tnt", only_sizes)
    with pytest.raises(CheckpointError, match=message):
        load_tnt(None, contents)


@pytest.mark.parametrize("entry", ["model", "model_kwargs", "classes", "data_config"])
def test_a_missing_entry_of_a_run_is_named(entry):
    contents = run()
    del contents[entry]
    with pytest.raises(CheckpointError, match=f"its entry '{entry}' is missing"):
        load_tnt(None, contents)


def test_weights_of_a_file_are_adapted_and_it_is_said(tmp_path):
    source = tiny()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    given = {**SIZES, "img_size": (32, 64), "in_chans": 1}
    model, said, *_ = load_tnt(NAME, tmp_path / "a.pth", num_classes=2, **given)
    assert said == (
        "loaded 2 blocks, input channels adapted: 3 → 1, head replaced: 5 → 2 classes, positions resampled to 2×4 patches "
        f"from {str(tmp_path / 'a.pth')!r}"
    )
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.allclose(model.pixel_embed.proj.weight, source.pixel_embed.proj.weight.sum(1, keepdim=True), atol=1e-6)
    assert model.head.out_features == 2


def test_the_model_is_named_by_the_file_of_timm_or_of_hugging_face(tmp_path):
    source = tiny()
    contents = {"arch": NAME, "args": {"model_kwargs": SIZES}, "state_dict": source.state_dict()}
    loaded = load_tnt(None, contents)
    assert (loaded.name, loaded.model.num_classes) == ("tnt_fast_ti_patch16_224", 5)
    config = {"architecture": NAME, "model_args": SIZES, "num_classes": 5, "label_names": list("abcde"),
              "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.8}}  # fmt: skip
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_tnt(None, tmp_path)
    assert loaded.classes == list("abcde")
    assert (loaded.data_config["mean"], loaded.data_config["crop_pct"]) == ((0.1, 0.2, 0.3), 0.8)
    with pytest.raises(ValueError, match="does not say which model it is for"):
        load_tnt(None, {"state_dict": source.state_dict()})
    with pytest.raises(CheckpointError, match="it is of the model .*, not of tnt_b"):
        load_tnt("tnt_b_patch16_224", contents)


@pytest.mark.parametrize("name", ["tnt_s_patch16_224.in1k", "tnt_s_patch16_224", "hf-hub:timm/tnt_s_patch16_224.in1k"])
def test_hosted_weights_without_a_network_name_the_remedy_at_once(name, monkeypatch, requests):
    monkeypatch.setattr(variants, "hf_hub_download", offline := Offline())
    with pytest.raises(ConnectionError) as caught:
        load_tnt(name)
    assert f"cannot fetch the weights of {name!r} (no connection to " in str(caught.value)
    assert "in training --initial FILE" in str(caught.value)
    assert offline.online == 0
    assert len(requests) <= 2


class Offline:
    """The hub's client with an empty cache; it would try for minutes."""

    online = 0

    def __call__(self, *_, local_files_only=False, **__):
        self.online += not local_files_only
        raise FileNotFoundError("not in the cache")


def test_hosted_weights_are_taken_from_the_cache_without_a_request(tmp_path, monkeypatch, requests):
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, "model_args": SIZES}))
    monkeypatch.setattr(variants, "hf_hub_download", lambda repository, name, **_: str(tmp_path / name))
    loaded = load_tnt("hf-hub:somebody/model@main", num_classes=2)
    assert loaded.said == "loaded 2 blocks, head replaced: 5 → 2 classes from somebody/model@main"
    assert requests == []


def test_weights_that_nobody_hosts_are_said_to_be_so(requests):
    with pytest.raises(ValueError, match=r"nobody hosts weights of 'tnt_ti_patch16_224'"):
        load_tnt(NAME)
    assert requests == []
