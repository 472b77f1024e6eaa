"""The settings of a run: what is refused and in which words, what files say, what is filled in, and what they build."""

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")

import timm
import torch
from PIL import Image
from timm.optim import param_groups_layer_decay

from tnt_fast import dispatch, recipe
from tnt_fast.checkpoints import read_checkpoint
from tnt_fast.cli import main

TINY = {"img_size": 32, "embed_dim": 24, "inner_dim": 12, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2}
MODEL = ["--model", "tnt_ti_patch16_224", "--model-kwargs", *(f"{k}={v}" for k, v in TINY.items())]
PLAIN = ["--threads", "1", "--workers", "0", "--device", "cpu"]


def config(**changed) -> recipe.Config:
    return recipe.Config("data", model="tnt_ti_patch16_224", model_kwargs=dict(TINY), **changed)


# ---- out of range ----


@pytest.mark.parametrize("setting", fields(recipe.Config), ids=lambda setting: setting.name)
def test_every_setting_has_a_range_or_a_type_and_says_its_name(setting):
    within = setting.metadata["within"]
    wrong = [None, b"x", object(), [1, 2, 3], float("nan")]
    if within:
        low, high = (float(x) for x in within[1:-1].split(","))
        wrong += [True, "1", np.float64(high), float("inf"), -float("inf"), float(np.nextafter(low, -1.0)), -1]
        wrong += [float(np.nextafter(high, float("inf"))), int(high) + 1, 10**400]
        wrong += [low] if within[0] == "(" else []
        wrong += [high] if within[-1] == ")" else []
    for value in wrong:
        for each in [value, (value, value), (0.5,)] if setting.name in ("scale", "ratio") else [value]:
            with pytest.raises(ValueError, match=f"^{setting.name}=.* must be "):
                config_with(setting.name, each).check()
    config_with(setting.name, getattr(config(), setting.name)).check()


def config_with(name: str, value) -> recipe.Config:
    made = config()
    setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--smoothing", "1"], ["smoothing=1.0 must be a number in [0, 1)"]),
        (["--crop-pct", "1e-3"], ["crop_pct=0.001 must be 0", "[0.1, 1]"]),
        (["--threads", "100000"], ["threads=100000 must be a whole number in [0, 1024]"]),
        (["--workers", "-1"], ["workers=-1 must be a whole number in [0, 512]"]),
        (["--epochs", "-3"], ["epochs=-3", "[1, 1000000]"]),
        (["--batch-size", "-2"], ["batch_size=-2", "[0, 1000000]"]),
        (["--batch-size", "3"], ["batch_size=3", "even", "set both to 0"]),
        (["--lr", "nan"], ["lr=nan must be a number in [0, 1e30]"]),
        (["--clip-grad", "inf"], ["clip_grad=inf"]),
        (["--ema", "1"], ["ema=1.0", "[0, 1)"]),
        (["--drop-path", "1"], ["drop_path=1.0", "[0, 1)"]),
        (["--scale", "0.5", "1.5"], ["scale=(0.5, 1.5) must be two numbers, each in (0, 1]"]),
        (["--scale", "0.9", "0.2"], ["scale=(0.9, 0.2)", "smaller number first"]),
        (["--ratio", "2", "1"], ["ratio=(2.0, 1.0)", "smaller number first"]),
        (["--amp", "int8"], ["amp='int8' is unknown", "accepted: off, bfloat16, float16"]),
        (["--amp", "bfloat"], ["amp='bfloat'", "nearest: bfloat16"]),
        (["--class-weights", "balance"], ["class_weights='balance'", "nearest: balanced"]),
        (["--backend", "quick"], ["backend='quick'", "'auto', 'fused', 'reference'"]),
        (["--opt", "adamv"], ["opt='adamv' is unknown", "nearest: ", "adamw", "timm.optim.list_optimizers()"]),
        (["--opt", "adahessian"], ["opt='adahessian' is unknown"]),
        (["--sched", "cosin"], ["sched='cosin' is unknown", "nearest: cosine", "constant"]),
        (["--sched", "plateau"], ["sched='plateau' is unknown", "accepted: cosine"]),
        (["--auto-augment", "ran-m9"], ["auto_augment='ran-m9'", "nearest: rand; accepted: rand-m9", "'' turns it off"]),
        (["--auto-augment", "rand-m9-q3"], ["auto_augment='rand-m9-q3'", "rand-m9-mstd0.5-inc1"]),
        (["--model-kwargs", "features_only=True"], ["features_only is no argument of the model"]),
        (["--model-kwargs", "dept=1"], ["dept is no argument of the model", "depth"]),
        (["--model", "tnt_x_patch16_224"], ["x_patch16_224' is unknown", "tnt_fast_s_patch16_224"]),
        (["--pretrained", "--initial", "x.pt"], ["pretrained and initial", "give one"]),
        (["--model-kwargs", "in_chans=1"], ["in_chans=1", "3 channels", "leave it out"]),
        (["--model-kwargs", "global_pool="], ["global_pool=''", "'token', 'avg'"]),
    ],
    ids=lambda value: "_".join(value) if value[0].startswith("--") else "",
)
def test_a_setting_out_of_range_is_refused_before_data_are_looked_for(tmp_path, capsys, options, named):
    assert main(["train", str(tmp_path / "nosuch"), "--out", str(tmp_path / "run"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tnt-fast: ValueError: ")
    assert said.count("\n") == 1
    assert [text for text in named if text not in said] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cpuu", "cuda:99", "gpu", "meta", "cpu:1", "mps:7"], ids=str.upper)
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=f"^device='{name}' is not here; accepted: cpu"):
        dispatch.find_device(name)
    assert dispatch.find_device("cpu").type == "cpu"
    assert dispatch.find_device("") == dispatch.find_device(None)


# ---- settings in files ----

DIGITS = {
    "model": "tnt_fast_ti_patch16_224", "model_kwargs": {"img_size": 32, "embed_dim": 96, "inner_dim": 12, "depth": 3},
    "epochs": 40, "global_batch": 32, "lr": 2e-3, "min_lr": 0.005, "warmup_epochs": 3, "clip_grad": 1.0,
    "mixup": 0.0, "cutmix": 0.0, "ema": 0.99,
    "scale": (0.7, 1.0), "ratio": (0.85, 1.18), "hflip": 0.0, "color_jitter": 0.0, "reprob": 0.0,
    "auto_augment": "rand-m3-n1-mstd0.5-tweights", "crop_pct": 1.0, "drop_path": 0.0, "workers": 0, "threads": 1,
}  # fmt: skip


def test_the_presets_are_the_published_recipes():
    def preset(name, **given):
        settings = recipe.resolved({"data": "images", **given}, name)[0]
        settings.check()
        return settings

    paper = preset("paper")
    assert (paper.epochs, paper.opt, paper.lr, paper.sched, paper.min_lr) == (300, "adamw", 1e-3, "cosine", 0.01)
    assert paper.global_batch == 1024
    for ranks, batch in ((1, 256), (2, 256), (8, 128), (16, 64)):
        settled = paper.settled(1_281_167, ranks)
        assert (settled.batch_size, settled.images_a_step(ranks), settled.lr) == (batch, 1024, 1e-3)
    assert (paper.weight_decay, paper.warmup_epochs, paper.smoothing, paper.drop_path) == (0.05, 5, 0.1, 0.1)
    assert (paper.mixup, paper.cutmix, paper.auto_augment, paper.reprob) == (0.8, 1.0, "rand-m9-mstd0.5-inc1", 0.25)
    assert (paper.aug_repeats, paper.ema, paper.ema_warmup) == (3, 0.99996, False)
    assert preset("deit") == replace(paper, ema=0.0, crop_pct=0.875)
    fine = preset("finetune-384")
    assert fine.has_weights
    assert fine.model_kwargs == {"img_size": 384}
    assert (fine.epochs, fine.lr, fine.min_lr, fine.weight_decay) == (30, 5e-6, 1.0, 1e-8)
    assert fine.global_batch == fine.divided(1).images_a_step(1) == 512
    from_file = preset("finetune-384", initial="x.pt", model_kwargs={"depth": 2})
    assert from_file == replace(fine, pretrained=False, initial="x.pt", model_kwargs={"img_size": 384, "depth": 2})
    assert preset("small") == recipe.Config("images", **DIGITS)
    assert set(recipe.presets()) == {"paper", "deit", "finetune-384", "small"}


def test_options_go_over_a_file_over_a_preset_over_the_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 20\nlr: 1e-4\namp: off\nmodel_kwargs: {depth: 2, inner_blocks: [0]}\nscale: [0.5, 1]\n")
    given = {"data": "images", "epochs": 7, "model_kwargs": {"depth": 3}}
    assert recipe.resolved(given) == (recipe.Config(**given), {*given})
    settings, asked = recipe.resolved(given, file=file)
    assert settings == recipe.Config(
        "images", epochs=7, lr=1e-4, model_kwargs={"depth": 3, "inner_blocks": [0]}, scale=(0.5, 1)
    )
    assert asked == {"data", "epochs", "lr", "amp", "model_kwargs", "scale"}
    settings = recipe.resolved(given, "small", file)[0]
    more = {"model_kwargs": {**DIGITS["model_kwargs"], "depth": 3, "inner_blocks": [0]}, "scale": (0.5, 1), "lr": 1e-4}
    assert settings == recipe.Config("images", **{**DIGITS, **more, "epochs": 7})
    file.write_text("preset: small\nepochs: 20\n")
    assert recipe.resolved({"data": "images"}, file=file)[0] == recipe.Config("images", **{**DIGITS, "epochs": 20})
    assert recipe.resolved({"data": "images"}, "", file)[0] == recipe.Config("images", epochs=20)
    file.write_text("# nothing\n")
    assert recipe.resolved({"data": "digits"}, file=file) == (recipe.Config("digits", **DIGITS), {"data"})
    assert recipe.resolved({"data": "digits"}, "")[0] == recipe.Config("digits")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("batchsize: 4", ["setting='batchsize' is unknown; nearest: batch_size", "options of 'tnt-fast train'"]),
        ("batch-size: 4", ["setting='batch-size' is unknown; nearest: batch_size"]),
        ("3: 4", ["setting='3' is unknown"]),
        ("lr: fast", ["lr='fast' must be a number in [0, 1e30]"]),
        ("epochs: 3.5", ["epochs=3.5 must be a whole number"]),
        ("epochs:", ["epochs=None must be a whole number"]),
        ("compile: yes", ["compile='yes' must be True or False"]),
        ("compile: true\ncompile_mode: fast", ["compile_mode='fast' is unknown", "accepted: default, reduce-overhead"]),
        ("smoothing: 1", ["smoothing=1 must be a number in [0, 1)"]),
        ("scale: [0.9, 0.2]", ["scale=(0.9, 0.2)", "smaller number first"]),
        ("amp: bf16", ["amp='bf16' is unknown", "accepted: off, bfloat16"]),
        ("opt: adamv", ["opt='adamv' is unknown", "nearest: "]),
        ("model: tnt_x_patch16_224", ["x_patch16_224' is unknown"]),
        ("model_kwargs: {dept: 1}", ["dept is no argument of the model", "depth"]),
        ("preset: papr", ["preset='papr' is unknown; nearest: paper"]),
        ("lr: 1\nlr: 2", ["no YAML file of settings: 'lr' is there twice"]),
        ("model_kwargs:\n  depth: 1\n  depth: 2", ["'depth' is there twice"]),
        ("- lr", ["but ['lr']; expected lines such as 'epochs: 100'"]),
        ("lr: [1", ["is no YAML file of settings", "line 1"]),
        ("{[]: 1}", ["is no YAML file of settings", "unhashable"]),
        ("lr: !!python/object/apply:os.getpid []", ["is no YAML file of settings", "python/object"]),
        ("[" * 2000, ["is no YAML file of settings"]),
        ("epochs: " + "9" * 5000, ["is no YAML file of settings", "digit"]),
    ],
    ids=lambda value: value[:12].split(":")[0] if isinstance(value, str) else "",
)
def test_a_file_of_settings_that_is_wrong_is_refused_with_its_name_and_the_key(tmp_path, capsys, text, named):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert main(["train", "nosuch", "--out", str(tmp_path / "run"), "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tnt-fast: ValueError: {str(file)!r}")
    assert said.count("\n") == 1
    assert [text for text in named if text not in said] == []
    assert not (tmp_path / "run").exists()


def test_a_preset_or_a_file_that_is_not_there_and_data_that_are_not_named(tmp_path, capsys):
    for options, said in (
        (["nosuch", "--preset", "papers"], "preset='papers' is unknown; nearest: paper; accepted: deit, finetune-384, "),
        (["nosuch", "--config", str(tmp_path / "mine.yaml")], "No such file or directory"),
        (["--preset", "paper"], "no data are named; expected a directory"),
    ):
        assert main(["train", *options, "--out", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_again_whatever_it_holds(tmp_path):
    texts = ["", "off", "1e5", "~", "a: b # c", "{x", "ü\u2028\n'\"\\", "0x10", "true", "<<", "2026-01-01", "\udcff"]
    for text in texts:
        settings = config(initial=text, lr=1e-5, scale=(0.1, 1 / 3), hflip=1)
        settings.model_kwargs["inner_blocks"] = (0, 1)
        (tmp_path / "a.yaml").write_text(recipe.written(settings), "utf-8")
        found = recipe.read_settings(tmp_path / "a.yaml")
        assert found.pop("preset") == ""
        assert found.pop("model_kwargs") == {**TINY, "inner_blocks": [0, 1]}
        assert found == {name: value for name, value in asdict(settings).items() if name != "model_kwargs"}


def test_the_resolved_recipe_lies_beside_the_run_and_repeats_it(few, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(f"data: {few}\npreset: small\nepochs: 1\nglobal_batch: 2\n")
    runs = [tmp_path / "first", tmp_path / "second"]
    assert main(["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(runs[0]), *MODEL, "--device", "cpu"]) == 0
    assert main(["train", "--config", str(runs[0] / "recipe.yaml"), "--out", str(runs[1])]) == 0
    assert (runs[0] / "recipe.yaml").read_bytes() == (runs[1] / "recipe.yaml").read_bytes()
    first, second = (read_checkpoint(run / "last.pt") for run in runs)
    assert first["config"] == second["config"]
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    assert main(["train", "--config", str(runs[0] / "recipe.yaml"), "--out", str(runs[0]), "--resume", "--epochs", "2"]) == 0
    assert recipe.read_settings(runs[0] / "recipe.yaml")["epochs"] == 2
    (tmp_path / "mine.yaml").write_text("lr: 0.5\n")
    assert main(["train", str(few), "--config", str(tmp_path / "mine.yaml"), "--out", str(runs[0]), "--resume"]) == 2
    assert "begun with lr=0.002 (now 0.5)" in capsys.readouterr().err


def test_help_names_each_preset_in_a_line(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.partition("\npresets:\n")[2].splitlines()
    assert [re.match(r"  (\S+)  +\S.* \S+$", line)[1] for line in lines] == sorted(recipe.presets())


# ---- what is filled in ----


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 2), (3, 2), (7, 6), (60, 8), (159, 8), (160, 16), (1437, 128), (2560, 256), (1_281_167, 256)]
)
def test_the_batch_leaves_ten_steps_an_epoch_where_it_can(images, batch):
    assert config().settled(images).batch_size == batch
    assert config(batch_size=64).settled(images).batch_size == 64


@pytest.mark.parametrize(
    ("changed", "lr"),
    [
        ({"batch_size": 8}, 2.5e-4), ({"batch_size": 256}, 2.5e-4), ({"batch_size": 1024}, 1e-3), ({"lr": 0.5}, 0.5),
        ({"batch_size": 8, "initial": "x.pt"}, 5e-5), ({"batch_size": 1024, "pretrained": True}, 1e-4),
    ],
)  # fmt: skip
def test_the_learning_rate_follows_the_batch_down_to_a_floor(changed, lr):
    assert config(**changed).settled(60).lr == pytest.approx(lr)


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("tnt_s_patch16_224.in1k", 5e-5), ("hf-hub:timm/tnt_s_patch16_224.in1k", 5e-5), ("tnt_s_patch16_224", 2.5e-4),
        ("tnt_fast_ti_patch16_224.untrained", 2.5e-4),
    ],
)  # fmt: skip
def test_a_model_whose_name_means_weights_is_fine_tuned(name, lr):
    assert recipe.Config("data", model=name).settled(1000).lr == pytest.approx(lr)


def rates(settings: recipe.Config, images: int) -> list[float]:
    """The learning rate of each step of a run."""
    settings = settings.settled(images)
    steps = images // settings.batch_size
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    schedule = recipe.build_schedule(settings, optimizer, steps)
    found = []
    for step in range(settings.epochs * steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("epochs", [1, 2, 3, 30])
@pytest.mark.parametrize("batch", [2, 8, 32])
@pytest.mark.parametrize("sched", ["cosine", "tanh"])
def test_the_learning_rate_rises_then_falls_whatever_the_batch_and_however_short_the_run(epochs, batch, sched):
    settings = config(epochs=epochs, batch_size=batch, sched=sched).settled(64)
    found = rates(settings, 64)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert top <= len(found) / 2
    assert max(found) <= settings.lr * (1 + 1e-9)
    assert max(found) >= 0.45 * settings.lr  # where half of a run warms up, the curve behind it begins in its middle
    assert found[-1] >= 0.01 * settings.lr * (1 - 1e-9)
    if epochs == 30:
        assert found[-1] < 0.1 * settings.lr


@pytest.mark.parametrize(
    ("changed", "images", "said"),
    [
        ({}, 60, ["batches of 8: 7 steps an epoch, 4 of 60 images left out of each", "up to 0.00025"]),
        ({}, 64, ["batches of 8: 8 steps an epoch; learning rate"]),
        ({"batch_size": 30}, 60, ["an epoch has few steps (2)", "smaller --batch-size"]),
        ({"epochs": 4}, 64, ["warm-up cut from 5 to 2 epochs"]),
        ({"freeze_blocks": 1}, 64, ["random weights", "--pretrained"]),
    ],
)
def test_what_is_unusual_in_a_run_is_said(changed, images, said):
    lines = config(**changed).settled(images).remarks(images)
    assert [text for text in said if text not in "\n".join(lines)] == []
    assert len(lines) == (1 if not changed else 2)


# ---- what is built ----


def test_frozen_blocks_and_the_stem_stay_as_they_are():
    settings = config(freeze_blocks=1).settled(64)
    model = recipe.build_model(settings, 2).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = recipe.build_optimizer(settings, model)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if not name.startswith(("blocks.1.", "norm.", "head."))}
    with pytest.raises(ValueError, match="freeze_blocks=3 must be at most 2"):
        recipe.build_model(config(freeze_blocks=3), 2)


def test_layer_decay_scales_the_learning_rate_from_the_head_back():
    settings = config(layer_decay=0.5, lr=1.0, batch_size=8, warmup_epochs=0)
    model = recipe.build_model(settings, 2).model
    optimizer = recipe.build_optimizer(settings, model)
    recipe.build_schedule(settings, optimizer, 8).step_update(0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert found["head.weight"] == 1.0
    assert found["norm.weight"] == found["blocks.1.mlp.fc1.weight"] == 0.5
    assert found["blocks.0.proj.weight"] == found["blocks.0.norm1_proj.weight"] == 0.25
    assert found["cls_token"] == found["patch_pos"] == found["proj.weight"] == found["pixel_embed.proj.weight"] == 0.125
    assert decay[id(model.patch_pos)] == decay[id(model.head.bias)] == 0
    assert decay[id(model.head.weight)] == 0.05


def test_layer_decay_is_timms_with_frozen_blocks_left_out():
    settings = config(layer_decay=0.75, lr=1.0, batch_size=8, freeze_blocks=1)
    model = recipe.build_model(settings, 2).model
    ours = recipe.build_optimizer(settings, model).param_groups
    theirs = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.75)

    def by_parameter(groups):
        return {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert by_parameter(ours) == by_parameter(theirs)
    assert {*by_parameter(ours)} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("mixing", [0.0, 0.8])
def test_balanced_weights_make_a_rare_class_count_as_much(mixing):
    logits, target = torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])
    settings = config(class_weights="balanced", smoothing=0.0, mixup=mixing, cutmix=0.0)
    loss = recipe.build_loss(settings, [3, 1])[1]
    given = torch.nn.functional.one_hot(target).float() if mixing else target
    gradient = torch.func.grad(lambda x: loss(x, given))(logits).abs().sum(1)
    assert gradient[:3].sum() == pytest.approx(gradient[3].item())
    even = recipe.build_loss(config(smoothing=0.0, mixup=mixing, cutmix=0.0), [3, 1])[1]
    gradient = torch.func.grad(lambda x: even(x, given))(logits).abs().sum(1)
    assert gradient[:3].sum() == pytest.approx(3 * gradient[3].item())


def test_an_optimizer_that_needs_another_package_is_refused(monkeypatch):
    settings = config(opt="fusedadam")
    with pytest.raises(ValueError, match="opt='fusedadam' does not work here .*APEX"):
        recipe.build_optimizer(settings, recipe.build_model(settings, 2).model)


# ---- a small set ----


def two_classes(root: Path, draw, counts=(30, 10)) -> Path:
    """``counts`` images a class; ``draw(class, number)`` gives pixels."""
    for part, first, count in (("train", 0, counts[0]), ("val", counts[0], counts[1])):
        for kind in (0, 1):
            folder = root / part / str(kind)
            folder.mkdir(parents=True)
            for i in range(first, first + count):
                Image.fromarray(draw(kind, i)).save(folder / f"{i}.png")
    return root


def made(kind: int, i: int) -> np.ndarray:
    """Noise on a red or a blue ground."""
    noise = np.random.default_rng([kind, i]).integers(0, 60, (36, 36, 3))
    return (noise + np.array(((90, 20, 20), (20, 20, 90))[kind])).astype(np.uint8)


def digit(kind: int, i: int) -> np.ndarray:
    """scikit-learn's zeros and ones."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    image = digits.images[digits.target == kind][i]
    return np.repeat((image * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize(("draw", "epochs", "accuracy"), [(made, 12, 1.0), (digit, 20, 0.9)], ids=["made", "digits"])
def test_the_defaults_learn_sixty_images_of_two_classes(tmp_path, capsys, draw, epochs, accuracy):
    data = two_classes(tmp_path / "data", draw)
    assert main(["train", str(data), "--out", str(tmp_path / "run"), *MODEL, *PLAIN, "--epochs", str(epochs)]) == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history[-1]["val_accuracy"] >= accuracy
    said = capsys.readouterr().out
    assert "batches of 8: 7 steps an epoch, 4 of 60 images left out of each" in said
    assert "path: reference, because the kernels need a GPU\n" in said


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """8 images to train on, 2 held out."""
    return two_classes(tmp_path_factory.mktemp("few"), made, (4, 1))


# ---- starting from trained weights ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """The file and the weights of a model for ant, bee and cow at 32 pixels."""
    root = tmp_path_factory.mktemp("trained")
    for name in ("ant", "bee", "cow"):
        for part, count in (("train", 2), ("val", 1)):
            (root / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([ord(name[0]), i, count]).integers(0, 255, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / "data" / part / name / f"{i}.png")
    argv = ["train", str(root / "data"), "--out", str(root / "run"), *MODEL, *PLAIN, "--epochs", "1", "--batch-size", "2"]
    assert main([*argv, "--ema", "0.5"]) == 0
    return root / "run" / "last.pt", read_checkpoint(root / "run" / "last.pt")["state_dict_ema"]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["ant", "bee", "cow"], "from '"),
        (["cow", "ant", "bee"], "head put in the order of the data's classes"),
        (["ant", "cow", "eel"], "only in the weights 'bee', only in the data 'eel'; the head is kept in its order"),
        (["ant", "cow"], "head replaced: 3 → 2 classes"),
        (["ant", "cow"], "their classes are not the data's: only in the weights 'bee', only in the data none"),
        (
            ["a", "b", "c", "d", "e", "f", "g"],
            "in the weights 'ant', 'bee', 'cow', only in the data 'a', 'b', 'c', 'd', 'e' and 2 more",
        ),
        (3, "from '"),
    ],
)
def test_weights_of_other_classes_are_told_and_of_the_same_put_in_order(trained, classes, said):
    file, weights = trained
    built = recipe.build_model(config(initial=str(file)), classes)
    assert said in built.said
    assert ("classes are not the data's" in built.said) == bool(
        isinstance(classes, list) and {*classes} ^ {"ant", "bee", "cow"}
    )
    found = built.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.items() if not name.startswith("head."))
    if len(found["head.bias"]) == 3:
        rows = [2, 0, 1] if said.startswith("head put") else [0, 1, 2]
        assert torch.equal(found["head.weight"], weights["head.weight"][rows])
        assert torch.equal(found["head.bias"], weights["head.bias"][rows])


def test_trained_weights_go_on_at_another_size_and_with_other_classes(trained, few, tmp_path, capsys):
    file, weights = trained
    options = ["--initial", str(file), "--model", "tnt_ti_patch16_224", "--model-kwargs", "img_size=48", *PLAIN]
    frozen = ["--freeze-blocks", "1", "--layer-decay", "0.75", "--epochs", "1", "--ema", "0.9"]
    assert main(["train", str(few), "--out", str(tmp_path / "run"), *options, *frozen]) == 0
    said = capsys.readouterr().out
    assert "positions resampled to 3×3 patches" in said
    assert "head replaced: 3 → 2 classes" in said
    assert "only in the weights 'ant', 'bee', 'cow', only in the data '0', '1'" in said
    saved = read_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["state_dict"]["patch_pos"].shape == (1, 1 + 9, 24)
    same = {name for name, value in saved["state_dict"].items() if torch.equal(value, weights.get(name, value[:0]))}
    stem = {"cls_token", "pixel_pos", "norm1_proj.weight", "pixel_embed.proj.weight", "proj.weight"}
    assert stem | {"blocks.0.mlp.fc1.weight"} <= same
    assert not [name for name in same if name.startswith(("blocks.1.", "norm.", "head."))]


def test_a_preset_that_does_not_fit_the_data_is_refused_before_weights_are_looked_for(few, tmp_path, capsys):
    argv = ["train", str(few), "--out", str(tmp_path / "run")]
    assert main([*argv, "--preset", "finetune-384", "--initial", "nosuch.pt"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tnt-fast: DataError: a step of 512 images (global_batch=512) is more than the 8 training images")
    assert said.endswith("--global-batch 0\n")
    assert main([*argv, *MODEL, *PLAIN, "--preset", "paper", "--global-batch", "0", "--epochs", "1"]) == 0
    assert "batches of 8: 1 steps an epoch" in capsys.readouterr().out


def test_a_preset_that_fine_tunes_takes_weights_of_a_file(trained, few, tmp_path, capsys):
    tiny = ["--model", "tnt_ti_patch16_224", "--global-batch", "4", "--batch-size", "2", "--epochs", "1"]
    argv = ["train", str(few), "--out", str(tmp_path / "run"), "--preset", "finetune-384", "--initial", str(trained[0]), *tiny]
    assert main([*argv, "--model-kwargs", "img_size=64", *PLAIN]) == 0
    said = capsys.readouterr().out
    assert "positions resampled to 4×4 patches" in said
    assert "learning rate up to 5e-06" in said


ALL = ["--freeze-blocks", "1", "--layer-decay", "0.7", "--class-weights", "balanced", "--epochs", "1", "--drop-path", "0.5"]


def test_gradient_checkpointing_changes_no_bit_and_new_settings_train(few, tmp_path):
    found = []
    for name, more in (("plain", []), ("checkpointing", ["--grad-checkpointing"])):
        assert main(["train", str(few), "--out", str(tmp_path / name), *MODEL, *PLAIN, *ALL, *more]) == 0
        found.append(read_checkpoint(tmp_path / name / "last.pt"))
    plain, checkpointing = (saved["state_dict"] for saved in found)
    assert found[1]["config"]["grad_checkpointing"]
    assert all(torch.equal(value, checkpointing[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "library", "Python"],
)
def test_too_little_memory_is_one_line_that_says_what_takes_less(few, tmp_path, capsys, monkeypatch, error):
    def step(*args):
        raise error

    monkeypatch.setattr(timm.loss.SoftTargetCrossEntropy, "forward", step)
    assert main(["train", str(few), "--out", str(tmp_path / "run"), *MODEL, *PLAIN, "--epochs", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("; to need less memory, lower --batch-size, or take --grad-checkpointing or --amp bfloat16\n")
    assert str(error)[:60] in said
