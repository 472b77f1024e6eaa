"""Classifying files through the command: what is printed is what the model says, and bad input is said to be so."""

import csv
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import timm
import torch
from PIL import Image

from tnt_fast import classify, kernels, variants
from tnt_fast.checkpoints import load_checkpoint, read_checkpoint
from tnt_fast.cli import main
from tnt_fast.optimize import OptimizedTNT
from tnt_fast.tnt import TNT

TINY = ["img_size=32", "embed_dim=24", "inner_dim=12", "depth=1", "num_heads_outer=2", "num_heads_inner=2"]
CLASSES = ["cat", "dog", "eel"]

pytestmark = pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path")


def pixels(seed: int, size=(24, 20)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Directory of a tiny run: data/ and run/."""
    root = tmp_path_factory.mktemp("trained")
    for part, first, count in (("train", 0, 4), ("val", 100, 2)):
        for i, name in enumerate(CLASSES):
            (root / "data" / part / name).mkdir(parents=True)
            for j in range(count):
                Image.fromarray(pixels(first + 10 * i + j)).save(root / "data" / part / name / f"{j}.png")
    quick = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--lr", "0.01", "--ema", "0.5"]
    argv = ["train", str(root / "data"), "--out", str(root / "run"), "--model", "tnt_ti_patch16_224", "--model-kwargs", *TINY]
    assert main([*argv, *quick, "--threads", "1"]) == 0
    return root


@pytest.fixture(scope="module")
def checkpoint(trained) -> str:
    return str(trained / "run" / "last.pt")


@pytest.fixture
def images(tmp_path) -> Path:
    """A directory with images in several modes, out of alphabetical order by seed, two of them below."""
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    Image.fromarray(pixels(1)).save(root / "rgb.png")
    Image.fromarray(pixels(2)).convert("L").save(root / "gray.png")
    Image.fromarray(np.dstack([pixels(3), pixels(4)[..., :1]])).save(root / "rgba.png")
    Image.fromarray(pixels(5)).quantize(16).save(root / "palette.png")
    Image.fromarray(pixels(6)).save(root / "below" / "photo.JPG")
    Image.fromarray(pixels(7)).convert("1").save(root / "below" / "two.png")
    (root / "notes.txt").write_text("no image")
    return root


def run(*argv) -> int:
    return main(["classify", *map(str, argv), "--device", "cpu"])


def on_white(image: Image.Image) -> Image.Image:
    """As RGB, what is transparent on white."""
    pixels = np.asarray(image.convert("RGBA")).astype(int)
    alpha = pixels[..., 3:]
    return Image.fromarray(((pixels[..., :3] * alpha + 255 * (255 - alpha)) / 255).round().astype(np.uint8))


def by_hand(file: Path, checkpoint: str) -> torch.Tensor:
    """Probabilities from timm's transform and the model, without tnt_fast.classify."""
    saved = read_checkpoint(checkpoint)
    model = variants.create_tnt(saved["model"], **saved["model_kwargs"], backend="reference").eval()
    load_checkpoint(model, checkpoint)
    config = saved["data_config"]
    transform = timm.data.create_transform(
        input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=config["crop_pct"]
    )
    with Image.open(file) as image, torch.no_grad():
        logits = model(transform(on_white(image))[None])[0]
    return torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()


# ---- what is printed ----


def test_text_output_has_each_file_with_its_topk_classes_and_probabilities(checkpoint, images, capsys):
    files = [images / "rgba.png", images / "gray.png"]
    assert run(*files, "--checkpoint", checkpoint, "--topk", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, file in zip(lines, files, strict=True):
        values, indices = by_hand(file, checkpoint).topk(2)
        expected = [f"{p:6.2%} {CLASSES[i]}" for p, i in zip(values.tolist(), indices.tolist(), strict=True)]
        assert line == "  ".join([str(file), *expected])


def test_json_probabilities_are_the_softmax_computed_by_hand(checkpoint, images, capsys):
    files = sorted(images.glob("*.png"))
    assert run(*files, "--checkpoint", checkpoint, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row, file in zip(rows, files, strict=True):
        expected = by_hand(file, checkpoint)
        found = row["predictions"]
        assert sorted(p["index"] for p in found) == [0, 1, 2]
        assert all(p["class"] == CLASSES[p["index"]] for p in found)
        assert [p["probability"] for p in found] == sorted((p["probability"] for p in found), reverse=True)
        assert [p["probability"] for p in found] == pytest.approx([expected[p["index"]].item() for p in found], rel=1e-5)
        assert sum(p["probability"] for p in found) == pytest.approx(1, abs=1e-6)
        assert list(row) == ["file", "predictions"]
    tops = [tuple(p["probability"] for p in row["predictions"]) for row in rows]
    assert len(set(tops)) == len(tops)  # other images, other answers


def test_topk_limits_the_classes_and_probabilities_sum_to_less_than_one(checkpoint, images, capsys):
    assert run(images / "rgb.png", "--checkpoint", checkpoint, "--json", "--topk", 1) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert len(row["predictions"]) == 1
    assert 1 / 3 < row["predictions"][0]["probability"] < 1


def test_the_averaged_weights_are_used_in_evaluation_mode(checkpoint):
    saved = read_checkpoint(checkpoint)
    model = classify.Classifier(checkpoint, device="cpu").model
    assert not torch.equal(saved["state_dict"]["head.weight"], saved["state_dict_ema"]["head.weight"])
    assert torch.equal(model.head.weight, saved["state_dict_ema"]["head.weight"])
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cpu_computes_with_the_repacked_copy_unless_a_path_is_asked_for(checkpoint, images, capsys, backend):
    classifier = classify.Classifier(checkpoint, device="cpu", backend=backend)
    assert isinstance(classifier.compute, OptimizedTNT if backend == "auto" else TNT)
    assert run(images / "rgb.png", "--checkpoint", checkpoint, "--backend", backend) == 0
    assert ("; weights repacked for the CPU" in capsys.readouterr().err) == (backend == "auto")


def test_files_keep_the_order_given_and_directories_are_searched_in_sorted_order(checkpoint, images, capsys):
    assert run(images / "rgb.png", images, images / "gray.png", "--checkpoint", checkpoint, "--json", "--batch-size", 2) == 0
    names = [str(Path(row["file"]).relative_to(images)) for row in json.loads(capsys.readouterr().out)]
    inside = [os.path.join("below", "photo.JPG"), os.path.join("below", "two.png"), "gray.png", "palette.png", "rgb.png"]
    assert names == ["rgb.png", *inside, "rgba.png", "gray.png"]


def test_the_same_call_twice_prints_the_same(checkpoint, images, capsys):
    assert run(images, "--checkpoint", checkpoint, "--json") == 0
    first = capsys.readouterr().out
    assert run(images, "--checkpoint", checkpoint, "--json") == 0
    assert capsys.readouterr().out == first


def test_the_batch_size_does_not_change_the_predictions(checkpoint, images, capsys):
    answers = []
    for size in (1, 4, 64):
        assert run(images, "--checkpoint", checkpoint, "--json", "--batch-size", size) == 0
        rows = json.loads(capsys.readouterr().out)
        answers.append({(row["file"], p["class"]): p["probability"] for row in rows for p in row["predictions"]})
    assert len(answers[0]) == 18
    assert answers[0] == pytest.approx(answers[1], rel=1e-5)
    assert answers[0] == pytest.approx(answers[2], rel=1e-5)


@pytest.mark.parametrize("name", ["gray.png", "rgba.png", "palette.png", "below/two.png"])
def test_an_image_of_any_mode_is_classified_as_its_rgb_version(checkpoint, images, capsys, name):
    with Image.open(images / name) as image:
        assert image.mode != "RGB"
        on_white(image).save(images / "same.png")
    assert run(images / name, images / "same.png", "--checkpoint", checkpoint, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["predictions"] == second["predictions"]


def test_folders_named_like_classes_are_counted_as_the_truth(trained, checkpoint, capsys):
    assert run(trained / "data" / "val", "--checkpoint", checkpoint, "--json") == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert [row["truth"] for row in rows] == ["cat", "cat", "dog", "dog", "eel", "eel"]
    right = sum(row["truth"] == row["predictions"][0]["class"] for row in rows)
    assert f"{right} of 6 as their folders say ({right / 6:.2%})" in printed.err
    assert right / 6 == read_checkpoint(checkpoint)["history"][-1]["val_accuracy"]


# ---- corrupt images ----


def corrupt(root: Path) -> list[Path]:
    whole = (root / "rgb.png").read_bytes()
    checksum = bytearray(whole)
    checksum[20] ^= 1
    damaged = {"cut.png": whole[:300], "empty.png": b"", "text.png": b"no image", "checksum.png": bytes(checksum)}
    for name, content in damaged.items():
        (root / name).write_bytes(content)
    return [root / name for name in damaged]


def test_corrupt_images_are_reported_and_the_others_still_classified(checkpoint, images, capsys):
    bad = corrupt(images)
    files = [bad[0], images / "rgb.png", bad[1], bad[2], images / "gray.png", bad[3]]
    assert run(*files, "--checkpoint", checkpoint, "--batch-size", 2) == 1
    printed = capsys.readouterr()
    assert [line.split("  ")[0] for line in printed.out.splitlines()] == [str(files[1]), str(files[4])]
    for file in bad:
        assert f"{file}  cannot read the image {str(file)!r}: " in printed.err
    assert "Traceback" not in printed.err


def test_corrupt_images_have_an_error_in_json_and_the_others_their_own_answers(checkpoint, images, capsys):
    bad = corrupt(images)
    assert run(bad[0], images / "rgb.png", bad[1], images / "gray.png", "--checkpoint", checkpoint, "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert ["error" in row for row in rows] == [True, False, True, False]
    assert all("predictions" not in row for row in rows if "error" in row)
    for row, name in ((rows[1], "rgb.png"), (rows[3], "gray.png")):
        assert row["predictions"][0]["probability"] == pytest.approx(by_hand(images / name, checkpoint).max().item(), rel=1e-5)


def test_nothing_but_corrupt_images_exits_1(checkpoint, images, capsys):
    assert run(*corrupt(images), "--checkpoint", checkpoint, "--json") == 1
    assert ["error" in row for row in json.loads(capsys.readouterr().out)] == [True] * 4


# ---- bad input ----


def refused(capsys, kind: str, *named: str) -> None:
    """The last call printed one error of this kind that names all of these, and nothing else."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"tnt-fast: {kind}: ")
    assert [text for text in named if text not in printed.err] == []


def test_a_directory_without_images_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    assert run(tmp_path / "empty", "--checkpoint", checkpoint) == 2
    refused(capsys, "DataError", f"no images in the directory {str(tmp_path / 'empty')!r}", ".png", ".jpeg")


def test_a_missing_path_is_refused(checkpoint, images, tmp_path, capsys):
    assert run(images / "rgb.png", tmp_path / "nosuch.png", "--checkpoint", checkpoint) == 2
    refused(capsys, "FileNotFoundError", f"no file or directory {str(tmp_path / 'nosuch.png')!r}")


def test_a_missing_checkpoint_is_refused(images, tmp_path, capsys):
    assert run(images, "--checkpoint", tmp_path / "nosuch.pt") == 2
    refused(capsys, "FileNotFoundError", f"no checkpoint file at {str(tmp_path / 'nosuch.pt')!r}")


@pytest.mark.parametrize("keep", [0, 10, 5000, -30])
def test_a_truncated_checkpoint_is_refused(checkpoint, images, tmp_path, capsys, keep):
    path = tmp_path / "cut.pt"
    path.write_bytes(Path(checkpoint).read_bytes()[:keep])
    assert run(images, "--checkpoint", path) == 2
    refused(capsys, "CheckpointError", str(path), f"({path.stat().st_size:,} bytes)")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_checkpoint_is_not_executed(images, tmp_path, capsys, write):
    path, mark = tmp_path / "evil.pt", tmp_path / "executed"
    write({"model": "tnt_ti_patch16_224", "state_dict": {"a": torch.zeros(2)}, "classes": Malicious(mark)}, path)
    assert run(images, "--checkpoint", path) == 2
    refused(capsys, "CheckpointError", str(path), "could execute code")
    assert not mark.exists()
    with open(path, "rb") as file:  # it would have been: the test can fail
        loaded = torch.load(file, weights_only=False) if write is torch.save else pickle.load(file)
    assert mark.is_dir()
    assert loaded["classes"] is None


def test_neither_checkpoint_nor_model_is_refused(images, capsys):
    assert run(images) == 2
    refused(capsys, "ValueError", "nothing to classify with", "--checkpoint", "--model")


@pytest.mark.parametrize("name", ["resnet18", "tnt_x_patch16_224", "tnt_fast_nosuch"])
def test_an_unknown_model_is_refused(images, capsys, name):
    assert run(images, "--model", name) == 2
    refused(capsys, "ValueError", "is unknown", "; accepted: ", "tnt_fast_s_patch16_224")


def test_an_unknown_tag_of_a_model_is_refused_without_blaming_the_network(images, capsys):
    assert run(images, "--model", "tnt_s_patch16_224.nosuch") == 2
    refused(capsys, "ValueError", "tnt_fast_s_patch16_224.nosuch", "accepted tags: ", "tnt_fast_s_patch16_224.in1k")


@pytest.mark.parametrize(("option", "value"), [("--topk", 0), ("--topk", -1), ("--batch-size", 0)])
def test_a_count_below_one_is_refused(checkpoint, images, capsys, option, value):
    assert run(images, "--checkpoint", checkpoint, option, value) == 2
    refused(capsys, "ValueError", f"{option} {value}", "must be at least 1")


def test_the_classifier_itself_refuses_a_topk_below_one(checkpoint, images):
    with pytest.raises(ValueError, match="topk=0 must be at least 1"):
        list(classify.Classifier(checkpoint, device="cpu")([images / "rgb.png"], topk=0))


@pytest.mark.parametrize("name", ["page.gif", "page", "page.png.txt"])
def test_a_page_of_another_format_is_refused_and_not_written(checkpoint, images, tmp_path, capsys, name):
    assert run(images, "--checkpoint", checkpoint, "--page", tmp_path / name) == 2
    refused(capsys, "ValueError", f"--page {str(tmp_path / name)!r}", ".png, .svg or .pdf")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("backend", "named"),
    [("quick", ["'quick'", "'auto', 'fused', 'reference'"]), ("fused", ["cannot run: - ", "the image is on device 'cpu'"])],
)
def test_a_backend_that_cannot_be_taken_is_refused(checkpoint, images, capsys, monkeypatch, backend, named):
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    assert run(images, "--checkpoint", checkpoint, "--backend", backend) == 2
    refused(capsys, "ValueError" if backend == "quick" else "RuntimeError", *named)


# ---- checkpoints of others, hosted weights ----


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A plain state_dict of a TNT-Ti with 5 classes, as timm would save it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("foreign") / "tnt_ti.pth"
    torch.save(timm.create_model("tnt_fast_ti_patch16_224", num_classes=5).state_dict(), path)
    return path


def test_a_checkpoint_of_others_is_classified_with_when_the_model_is_named(foreign, images, capsys):
    assert run(images / "rgb.png", "--checkpoint", foreign, "--model", "tnt_ti_patch16_224", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    model = timm.create_model("tnt_fast_ti_patch16_224", num_classes=5, backend="reference").eval()
    model.load_state_dict(torch.load(foreign, weights_only=True))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with Image.open(images / "rgb.png") as image, torch.no_grad():
        expected = model(transform(image)[None])[0].softmax(0)
    assert [p["class"] for p in row["predictions"]] == [str(i) for i in expected.argsort(descending=True).tolist()]
    assert [p["probability"] for p in row["predictions"]] == pytest.approx(expected.sort(descending=True).values.tolist())


def test_a_checkpoint_of_others_without_a_model_names_the_remedy(foreign, images, capsys):
    assert run(images, "--checkpoint", foreign) == 2
    refused(capsys, "ValueError", str(foreign), "does not say which model", "--model tnt_s_patch16_224")


def test_a_checkpoint_of_another_variant_is_refused(foreign, images, capsys):
    path = foreign.with_name("part.pth")
    torch.save({"patch_pos": torch.zeros(1, 197, 192), "pixel_embed.proj.weight": torch.zeros(1)}, path)
    assert run(images, "--checkpoint", path, "--model", "tnt_ti_patch16_224") == 2
    refused(capsys, "CheckpointError", "part.pth", "does not fit this model", "missing: cls_token")


def test_weights_that_nobody_hosts_are_said_to_be_so(images, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(images, "--model", "tnt_ti_patch16_224") == 2
    refused(capsys, "ValueError", "nobody hosts weights of 'tnt_ti_patch16_224'", "checkpoint file")


def test_a_hosted_model_names_imagenet_classes(images, capsys, monkeypatch):
    torch.manual_seed(0)
    state = timm.create_model("tnt_fast_ti_patch16_224").state_dict()
    monkeypatch.setattr(variants, "_from_hub", lambda name: ({"state_dict": state}, "tnt_ti_patch16_224", name))
    assert run(images / "rgb.png", "--model", "tnt_ti_patch16_224", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    info = timm.data.ImageNetInfo()
    assert len(row["predictions"]) == 5
    assert all(p["class"] == info.index_to_description(p["index"]) for p in row["predictions"])


# ---- picture ----


def test_the_page_of_predictions_is_a_png(trained, checkpoint, images, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    corrupt(images)
    page = tmp_path / "page.png"
    assert run(trained / "data" / "val", images, "--checkpoint", checkpoint, "--page", page) == 1
    assert f"picture: {page}" in capsys.readouterr().err
    with Image.open(page) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert np.asarray(image.convert("L")).std() > 5  # there is something on it


def test_a_page_without_any_readable_image_is_still_written(checkpoint, images, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(*corrupt(images), "--checkpoint", checkpoint, "--page", tmp_path / "page.svg") == 1
    assert "<svg" in (tmp_path / "page.svg").read_text()


def test_a_page_shows_wrong_answers_first_and_at_most_so_many(images, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    from tnt_fast import visualize

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **kwargs: titles.append((text, kwargs["color"])))

    def row(name, probability, **truth):
        return {"file": str(images / "rgb.png"), "predictions": [{"class": name, "probability": probability}], **truth}

    rows = [row("cat", 0.9, truth="cat"), row("dog", 0.8, truth="cat"), row("eel", 0.5), {"file": "x", "error": "bad"}]
    visualize.prediction_page(rows, tmp_path / "page.png")
    assert titles == [("dog\n80% (is cat)", "tab:red"), ("eel\n50%", "black"), ("cat\n90%", "tab:green")]
    titles.clear()
    visualize.prediction_page(rows, tmp_path / "page.png", most=1)
    assert [text for text, _ in titles] == ["dog\n80% (is cat)"]


def test_the_images_themselves_are_on_the_page(images, tmp_path):
    pytest.importorskip("matplotlib")
    from tnt_fast import visualize

    Image.new("RGB", (24, 20), (250, 10, 200)).save(images / "pink.png")
    row = {"file": str(images / "pink.png"), "predictions": [{"class": "cat", "probability": 0.9}]}
    with Image.open(visualize.prediction_page([row], tmp_path / "page.png")) as image:
        shown = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (shown == (250, 10, 200)).all(1).mean() > 0.1


def test_a_moved_checkpoint_still_classifies(checkpoint, images, tmp_path, capsys):
    """It holds all that is needed: neither the data nor the run's directory is looked at."""
    shutil.copy(checkpoint, tmp_path / "alone.pt")
    assert run(images, "--checkpoint", checkpoint, "--json") == 0
    first = capsys.readouterr().out
    assert run(images, "--checkpoint", tmp_path / "alone.pt", "--json") == 0
    assert capsys.readouterr().out == first


# ---- results in files, lists, patterns, thresholds, names ----


def test_results_in_a_file_are_those_of_json(checkpoint, images, tmp_path, capsys):
    """Whatever the files are called: their bytes are kept."""
    odd = Path(os.fsdecode(os.fsencode(images) + b'/a\xff"\n,.png'))
    shutil.copy(images / "rgb.png", odd)
    bad = corrupt(images)[0]
    assert run(odd, images / "gray.png", bad, "--checkpoint", checkpoint, "--topk", 2, "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["file"] == str(odd)
    for name in ("a.json", "a.csv"):
        (tmp_path / name).write_text("older")
        assert run(odd, images / "gray.png", bad, "--checkpoint", checkpoint, "--topk", 2, "--out", tmp_path / name) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"results: {tmp_path / name}\n2 of 3 images classified\n" in printed.err
    assert json.loads((tmp_path / "a.json").read_text()) == rows
    with (tmp_path / "a.csv").open(errors="surrogateescape", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["file", "class_1", "probability_1", "class_2", "probability_2", "truth", "error"]
    for found, row in zip(table, rows, strict=True):
        assert (found["file"], found["error"]) == (row["file"], row.get("error", ""))
        for i, expected in enumerate(row.get("predictions", ()), 1):
            assert found[f"class_{i}"] == expected["class"]
            assert float(found[f"probability_{i}"]) == expected["probability"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "images"]


def test_a_list_on_standard_input_is_classified_and_what_is_not_there_ends_alone(checkpoint, images, capsys, monkeypatch):
    names = [images / "rgb.png", images / "nosuch.png", "", images / "below"]
    for separator in ("\n", "\0"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(separator.join(map(str, names)).encode())))
        assert run("-", images / "gray.png", "--checkpoint", checkpoint, "--json") == 1
        rows = json.loads(capsys.readouterr().out)
        found = [str(Path(row["file"]).relative_to(images)) for row in rows]
        assert found == ["rgb.png", "nosuch.png", "below/photo.JPG", "below/two.png", "gray.png"]
        assert [row.get("error", "").rpartition(": ")[2] for row in rows] == ["", "No such file or directory", "", "", ""]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert run("-", "--checkpoint", checkpoint) == 2
    refused(capsys, "DataError", "the list on standard input is empty")


def test_patterns_that_the_shell_left_are_followed_and_other_files_counted(checkpoint, images, capsys):
    (images / "below" / "._two.png").touch()
    assert run(images / "**" / "*", "--checkpoint", checkpoint, "--json") == 0
    printed = capsys.readouterr()
    found = [str(Path(row["file"]).relative_to(images)) for row in json.loads(printed.out)]
    assert found == ["below/photo.JPG", "below/two.png", "gray.png", "palette.png", "rgb.png", "rgba.png"]
    assert "6 of 6 images classified\n1 other files passed over: .txt 1\n" in printed.err
    assert run(images / "*.webp", "--checkpoint", checkpoint) == 2
    refused(capsys, "FileNotFoundError", "no image matches", "*.webp")


def test_classes_below_the_threshold_are_left_out(checkpoint, trained, images, tmp_path, capsys):
    val = trained / "data" / "val"
    assert run(val, "--checkpoint", checkpoint, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    tops = sorted(row["predictions"][0]["probability"] for row in rows)
    threshold = (tops[2] + tops[3]) / 2
    page = tmp_path / "page.png"
    assert run(val, "--checkpoint", checkpoint, "--json", "--threshold", threshold, "--page", page) == 0
    printed = capsys.readouterr()
    kept = json.loads(printed.out)
    for before, after in zip(rows, kept, strict=True):
        assert after["predictions"] == [p for p in before["predictions"] if p["probability"] >= threshold]
    assert "6 of 6 images classified, 3 of them with no class above the threshold" in printed.err
    right = sum(row["predictions"][0]["class"] == row["truth"] for row in kept if row["predictions"])
    assert f"{right} of 3 as their folders say" in printed.err
    assert run(images / "rgb.png", "--checkpoint", checkpoint, "--threshold", 1) == 0
    assert capsys.readouterr().out == f"{images / 'rgb.png'}  no class reaches 100.00%\n"
    for wrong in ("-0.1", "1.1", "nan"):
        assert run(images, "--checkpoint", checkpoint, f"--threshold={wrong}") == 2
        refused(capsys, "ValueError", f"--threshold {wrong}", "from 0 to 1")


def test_names_of_classes_come_from_a_file(foreign, checkpoint, images, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\ufeffStraße\n猫 \nc\nd\ne\n", "utf-8")
    argv = [images / "rgb.png", "--model", "tnt_ti_patch16_224", "--class-names", names]
    assert run(*argv, "--checkpoint", foreign, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {p["index"]: p["class"] for p in row["predictions"]} == dict(enumerate(["Straße", "猫", "c", "d", "e"]))
    assert run(images, "--class-names", names, "--checkpoint", checkpoint) == 2
    refused(capsys, "ValueError", "5 class names, but the model has 3 classes")
    for content, named in ((b"a\n\nb\n", "line 2"), (b"\xff\xfe", "one name a line, in UTF-8")):
        names.write_bytes(content)
        assert run(*argv, "--checkpoint", foreign) == 2
        refused(capsys, "ValueError", named, str(names))


def test_arguments_of_the_model_are_passed_on(images, tmp_path, capsys, checkpoint):
    kwargs = {"img_size": 32, "depth": 1, "num_classes": 2}
    torch.save(variants.create_tnt("tnt_ti_patch16_224", **kwargs).state_dict(), tmp_path / "small.pth")
    argv = [images / "rgb.png", "--model-kwargs", "img_size=32", "depth=1"]
    assert run(*argv, "--checkpoint", tmp_path / "small.pth", "--model", "tnt_ti_patch16_224", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)[0]["predictions"]) == 2
    assert run(images / "rgb.png", "--model-kwargs", "depth=2", "--checkpoint", checkpoint) == 2
    refused(capsys, "CheckpointError", checkpoint, "does not fit this model", "missing: blocks.1.")


@pytest.mark.parametrize("name", ["a.txt", "a", "nosuch/a.csv"])
def test_a_result_file_that_cannot_be_is_refused_before_any_work(checkpoint, images, tmp_path, capsys, name):
    assert run(images, "--checkpoint", checkpoint, "--out", tmp_path / name) == 2
    refused(capsys, "FileNotFoundError" if "nosuch" in name else "ValueError", "--out", name)


def test_a_bar_shows_on_terminals_alone(checkpoint, images, capsys, monkeypatch):
    assert run(images, "--checkpoint", checkpoint, "--json") == 0
    assert "image/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(images, "--checkpoint", checkpoint, "--json") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 6
    assert "/6 [" in printed.err


# ---- hostile files ----


def test_pictures_of_strangers_end_alone_and_start_no_program(checkpoint, images, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail(f"a program was started: {args}"))
    (images / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    (images / "psd.jpg").write_bytes(b"8BPS\0\1" + bytes(40))
    os.mkfifo(images / "pipe.png")
    os.symlink("circle.png", images / "circle.png")
    os.symlink(images, images / "below" / "up")
    bad = ("circle.png", "eps.png", "pipe.png", "psd.jpg")
    assert run(images, "--checkpoint", checkpoint, "--json", "--batch-size", 2) == 1
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert tuple(Path(row["file"]).name for row in rows if "error" in row) == bad
    assert "6 of 10 images classified" in printed.err
    for name in bad:
        assert f"{images / name}  cannot read the image" in printed.err


def changed(checkpoint: str, path: Path, **what) -> Path:
    torch.save({**read_checkpoint(checkpoint), **what}, path)
    return path


def test_weights_that_are_not_finite_are_an_error_that_names_the_first(checkpoint, images, tmp_path, capsys):
    saved = read_checkpoint(checkpoint)
    for name in ("blocks.0.mlp.fc1.bias", "head.weight"):
        saved["state_dict_ema"][name].flatten()[1] = float("nan")
    path = changed(checkpoint, tmp_path / "nan.pt", state_dict_ema=saved["state_dict_ema"])
    assert run(images, "--checkpoint", path, "--json") == 2
    refused(capsys, "CheckpointError", "blocks.0.mlp.fc1.bias")


def test_outputs_that_are_not_finite_end_one_image(checkpoint, images, capsys, monkeypatch):
    forward = OptimizedTNT.forward

    def overflow(model, image):
        logits = forward(model, image)
        logits[0, 1] = float("inf")
        return logits

    monkeypatch.setattr(OptimizedTNT, "forward", overflow)
    assert run(images / "rgb.png", images / "gray.png", "--checkpoint", checkpoint, "--json") == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["error"] == f"the model's outputs for {str(images / 'rgb.png')!r} are not finite"
    assert len(second["predictions"]) == 3


@pytest.mark.parametrize(
    "what",
    [
        {"data_config": {}}, {"data_config": 3}, {"classes": [1, 2, 3]}, {"classes": ["a"]}, {"model": None},
        *({"data_config": {name: value}} for name, value in (
            ("input_size", (3, 10**6, 10**6)), ("crop_pct", 1e-9), ("std", (0, 0, 0)), ("mean", "abc"), ("interpolation", "x"),
            ("mean", (float("nan"),) * 3),
        )),
    ],
)  # fmt: skip
def test_a_checkpoint_that_asks_for_the_impossible_is_refused(checkpoint, images, tmp_path, capsys, what):
    if isinstance(config := what.get("data_config"), dict):
        what = {"data_config": config and {**read_checkpoint(checkpoint)["data_config"], **config}}
    assert run(images, "--checkpoint", changed(checkpoint, tmp_path / "a.pt", **what)) == 2
    refused(capsys, "CheckpointError", "a.pt", *what)
