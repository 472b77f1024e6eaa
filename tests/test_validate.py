"""Validating: the figures are timm's for the same weights, whatever says what the images show; bad input is said to be so."""

import csv
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import timm
import torch
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo, create_dataset, create_loader

from tnt_fast import validate
from tnt_fast.checkpoints import FORMAT, save_checkpoint
from tnt_fast.classify import Classifier
from tnt_fast.cli import main
from tnt_fast.data import evaluation_transform
from tnt_fast.images import open_image
from tnt_fast.shards import Picture, Tar
from tnt_fast.tnt import TNT

SIZES = dict(img_size=16, embed_dim=24, inner_dim=12, depth=1, num_heads_outer=2, num_heads_inner=2)
SYNSETS = ImageNetInfo().label_names()
COUNT = 24

pytestmark = pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path")


def write_image(path: Path, seed: int, mode: str = "RGB", orientation: int = 1) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (3, 3, 3)).astype(np.uint8)).resize((20, 26), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, exif=exif)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """A TNT with ImageNet's classes as timm saves it, and images in a part of ImageNet's folders: about half are right."""
    root = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(0)
    model = timm.create_model("tnt_s_patch16_224", **SIZES).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    torch.save(model.state_dict(), root / "tnt.pth")
    transform = timm.data.create_transform(
        (3, 16, 16), is_training=False, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9
    )
    for i in range(COUNT):
        path = root / f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        write_image(path, i, ("RGB", "L", "CMYK")[i % 3], 6 if i % 2 else 1)
        with torch.no_grad(), Image.open(path) as image:
            top = model(transform(image.convert("RGB"))[None])[0].topk(8).indices.tolist()
        folder = root / "data" / "val" / SYNSETS[top[(0, 0, 3, 7)[i // 2 % 4]]]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    return root


def run(imagenet: Path, *argv: object) -> int:
    kwargs = [f"{key}={value}" for key, value in SIZES.items()]
    model = ["--model", "tnt_s_patch16_224", "--model-kwargs", *kwargs, "--checkpoint", str(imagenet / "tnt.pth")]
    return main(["validate", *map(str, argv), *model, "--device", "cpu", "--batch-size", "7"])


def figures(imagenet: Path, capsys, *argv: object) -> dict:
    assert run(imagenet, *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_top1_and_top5_are_those_of_timm_to_the_last_image(imagenet, tmp_path, capsys):
    (tmp_path / "synsets.txt").write_text("\n".join(SYNSETS))
    dataset = create_dataset("", root=str(imagenet / "data"), split="validation", class_map=str(tmp_path / "synsets.txt"))
    loader = create_loader(
        dataset, (3, 16, 16), 7, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=0, crop_pct=0.9,
        crop_mode="center", device=torch.device("cpu"), use_prefetcher=False, persistent_workers=False,
    )  # fmt: skip
    model = timm.create_model("tnt_s_patch16_224", **SIZES).eval()
    model.load_state_dict(torch.load(imagenet / "tnt.pth"))
    with torch.no_grad():
        rows = [(model(image), target) for image, target in loader]
    output, target = map(torch.cat, zip(*rows, strict=True))
    top1, top5 = (float(accuracy) for accuracy in timm.utils.accuracy(output, target, topk=(1, 5)))
    assert 30 < top1 < 70 < top5 < 100
    found = figures(imagenet, capsys, imagenet / "data")
    assert found["images"] == COUNT
    assert (found["top1"], found["top5"]) == (pytest.approx(top1, abs=1e-4), pytest.approx(top5, abs=1e-4))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(output, target)), rel=1e-5)


def test_a_run_of_ours_sees_its_images_upright_and_its_classes_by_name(tmp_path, capsys):
    torch.manual_seed(0)
    model, classes = TNT(**SIZES, num_classes=3, backend="reference").eval(), ["ape", "bee", "cat"]
    config = {"input_size": (3, 16, 16), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    config["crop_mode"] = "squash"
    saved = {"format": FORMAT, "model": "tnt_fast_ti_patch16_224", "model_kwargs": {**SIZES, "num_classes": 3}}
    saved |= {"state_dict": model.state_dict(), "classes": classes, "data_config": config}
    save_checkpoint(saved, tmp_path / "best.pt")
    for i in range(6):
        write_image(tmp_path / "data" / classes[1 + i % 2] / f"{i}.png", i, orientation=6)
    files = sorted((tmp_path / "data").rglob("*.png"))
    transform = evaluation_transform(config)
    assert "Resize" in repr(transform)
    assert transform.transforms[0].size == (16, 16)  # squashed, not cropped
    with torch.no_grad():
        logits = model(torch.stack([transform(open_image(file)) for file in files]))
    truth = torch.tensor([classes.index(file.parent.name) for file in files])
    assert (
        main(["validate", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "best.pt"), "--device", "cpu", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, truth)), rel=1e-5)
    assert found["right"] == int((logits.argmax(1) == truth).sum())
    assert found["top5"] == 100
    assert {row["class"]: row["images"] for row in found["classes"]} == {"bee": 3, "cat": 3}


@pytest.mark.parametrize("kind", ["kaggle", "caffe", "synsets", "devkit"])
def test_a_file_of_ground_truth_says_what_a_folder_says(imagenet, kind, tmp_path, capsys):
    truth = {path.name: path.parent.name for path in (imagenet / "data").rglob("*.JPEG")}
    for path in (imagenet / "data").rglob("*.JPEG"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        if path.name != "ILSVRC2012_val_00000003.JPEG":  # a part suffices
            (tmp_path / "flat" / path.name).symlink_to(path)
    own = SYNSETS[::-1]  # the devkit counts in an order of its own
    lines = {
        "kaggle": ["ImageId,PredictionString", *(f"{Path(n).stem},{s} 1 2 3 4" for n, s in truth.items())],
        "caffe": [f"{n} {SYNSETS.index(s)}" for n, s in truth.items()],
        "synsets": [truth[n] for n in sorted(truth)],
        "devkit": [str(1 + own.index(truth[n])) for n in sorted(truth)],
    }[kind]
    if kind == "devkit":
        rows = [(1 + i, synset) for i, synset in enumerate(own)]
        savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, [("ILSVRC2012_ID", float), ("WNID", object)])})
    (tmp_path / "truth.txt").write_text("\n".join(lines) + "\n")
    found = figures(imagenet, capsys, tmp_path / "flat", "--ground-truth", tmp_path / "truth.txt")
    assert found["images"] == COUNT - 1
    expected = figures(imagenet, capsys, imagenet / "data")
    wrong = {row["class"]: row["images"] for row in expected["classes"]}
    assert sum(wrong.values()) == COUNT
    assert abs(found["right"] - expected["right"]) <= 1
    assert len(found["classes"]) >= len(expected["classes"]) - 1
    assert {row["class"] for row in found["classes"]} <= set(wrong)


def test_tables_and_pictures_hold_each_image(imagenet, tmp_path, capsys):
    found = figures(imagenet, capsys, imagenet / "data", "--out", tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report" / "predictions.csv").read_text().splitlines()))
    assert len(rows) == COUNT
    assert sum(row["truth"] == row["class_1"] for row in rows) == found["right"]
    confusion = list(csv.reader((tmp_path / "report" / "confusion.csv").read_text().splitlines()))
    assert sum(int(cell) for row in confusion[1:] for cell in row[1:]) == COUNT
    assert sum(int(row[i + 1]) for i, row in enumerate(confusion[1:])) == found["right"]
    assert sum(row["images"] for row in found["classes"]) == sum(row["images"] for row in found["bins"]) == COUNT
    for name in ("confusion.png", "calibration.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


def test_the_calibration_error_by_hand():
    """Ten images said with 0.95, of which six are right; ten with 0.55, all of them right: (0.35 + 0.45) / 2."""
    confidence = np.repeat([0.95, 0.55], 10)
    right = np.repeat([1, 0, 1], [6, 4, 10])
    result = validate.Validation(
        ["a", "b"], ["x"] * 20, np.zeros(20, int), np.stack([1 - right, right], 1), np.stack([confidence, 1 - confidence], 1),
        np.zeros(20), {}, 1.0, 1.0, 20,
    )  # fmt: skip
    assert result.figures()["ece"] == pytest.approx(0.4)
    assert [(row["images"], row["accuracy"]) for row in result.bins()] == [(10, 1.0), (10, 0.6)]


def test_the_reference_is_compared_image_by_image(imagenet, tmp_path, monkeypatch, capsys):
    files = sorted((imagenet / "data").rglob("*.JPEG"))[:3]
    for file in files:
        (tmp_path / "few" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "few" / file.parent.name / file.name).symlink_to(file)
    found = figures(imagenet, capsys, tmp_path / "few", "--reference", "--backend", "fused")
    assert found["differ_from_reference"] == 0
    assert 0 < found["largest_difference"] < 1e-3
    forward_head = TNT.forward_head

    def wrong(self, x):
        logits = forward_head(self, x)
        return torch.cat([logits[:2], logits[2:].roll(1, 1)]) if self.backend == "fused" else logits

    monkeypatch.setattr(TNT, "forward_head", wrong)
    found = figures(imagenet, capsys, tmp_path / "few", "--reference", "--backend", "fused")
    assert [Path(row["file"]).name for row in found["differences"]] == [files[2].name]
    assert found["differences"][0]["fused"] != found["differences"][0]["reference"]


def test_a_broken_picture_is_named_and_the_others_count(imagenet, tmp_path, capsys):
    for name in SYNSETS[:3]:
        write_image(tmp_path / "val" / name / "x.png", 0)
    (tmp_path / "val" / SYNSETS[0] / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "val" / SYNSETS[0] / "notes.txt").write_text("no image")
    assert run(imagenet, tmp_path) == 1
    out, err = capsys.readouterr()
    assert "of 3)" in out
    assert "broken.jpg" in err
    assert "notes.txt" not in err


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_shards_have_the_figures_of_the_files_in_them(kind, imagenet, tmp_path, capsys):
    root, shards = imagenet / "data" / "val", tmp_path / "shards"
    if kind == "wds":
        shards.mkdir()
        with tarfile.open(shards / "val.tar", "w") as tar:
            tar.add(root, ".")
    else:
        datasets = pytest.importorskip("datasets")
        files = sorted(root.rglob("*.JPEG"))
        names = sorted({file.parent.name for file in files}, reverse=True)  # its classes are in an order of their own
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "label": [names.index(file.parent.name) for file in files],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict(rows, features).save_to_disk(str(shards))
    expected, found = (figures(imagenet, capsys, data) for data in (root, f"{kind}:{shards}"))
    assert found["images"] == COUNT
    assert {name: found[name] for name in ("top1", "top5", "classes")} == {
        name: expected[name] for name in ("top1", "top5", "classes")
    }
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_shard_that_is_gone_is_named_with_its_picture():
    picture = Picture("a.png", "gone.tar/a.png", "a", 1, 0, Tar("gone.tar"))
    (((named, error),),) = Classifier.read(SimpleNamespace(transform=None), [picture], 1)
    assert named is picture
    assert str(error) == "cannot read the image 'gone.tar/a.png': No such file or directory"


BAD = {
    "no such folder": ([], "no directory 'data'; expected DATA/val/CLASS/*.jpg"),
    "no pictures": (["data/n01440764/notes.txt"], "'data' holds no images; accepted: .bmp"),
    "no class folders": (["data/a.png"], "lie in no class folder; say what they show with --ground-truth FILE"),
    "a folder with a typo": (["data/n01440764/a.png", "data/n0144O764/b.png"], "such as 'n0144O764'; nearest: n01440764"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_one_line(imagenet, case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files, message = BAD[case]
    for file in files:
        if file.endswith(".png"):
            write_image(Path(file), 0)
        else:
            Path(file).parent.mkdir(parents=True)
            Path(file).write_text("no image")
    refused(imagenet, capsys, message, "data")


TRUTHS = {
    "empty": ("", "is empty; expected NAME LABEL a line"),
    "mixed": ("a.png 1\n2\n", "has lines with a label alone, and others with a name"),
    "numbers alone": ("1\n2\n", "put that beside it, or give a file with NAME LABEL or a synset"),
    "too few": ("n01440764\n", "has 1 labels for 2 images"),
    "one is missing": ("a.png 3\n", "does not name 1 of 2 images: 'b.png'"),
    "no such class": ("a.png 3\nb.png 1000\n", "1 of 2 labels name none of the model's 1,000 classes, such as '1000'"),
}


@pytest.mark.parametrize("case", TRUTHS)
def test_bad_ground_truth_is_one_line(imagenet, case, tmp_path, capsys):
    text, message = TRUTHS[case]
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "data" / name, 0)
    (tmp_path / "truth.txt").write_text(text)
    refused(imagenet, capsys, message, tmp_path / "data", "--ground-truth", tmp_path / "truth.txt")


def refused(imagenet: Path, capsys, message: str, *argv: object) -> None:
    assert run(imagenet, *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]


def test_what_cannot_be_compared_or_named_is_one_line(imagenet, tmp_path, capsys):
    refused(imagenet, capsys, "no file or directory 'nowhere'", "wds:nowhere")
    refused(imagenet, capsys, "'wds:nowhere' has its labels in it", "wds:nowhere", "--ground-truth", "truth.txt")
    refused(imagenet, capsys, "--amp 'float15' is unknown; nearest: float16", imagenet / "data", "--amp", "float15")
    options = ["--reference", "--backend", "reference"]
    refused(imagenet, capsys, "compares the fused path with the reference", imagenet / "data", *options)
    model = TNT(**SIZES, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "headless.pth")
    kwargs = [f"{key}={value}" for key, value in SIZES.items()]
    argv = ["--model", "tnt_s_patch16_224", "--model-kwargs", *kwargs, "--checkpoint", str(tmp_path / "headless.pth")]
    assert main(["validate", str(imagenet / "data"), *argv, "--device", "cpu"]) == 2
    assert "the weights have no head for the model's 1,000 classes" in capsys.readouterr().err
