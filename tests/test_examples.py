"""The programs of examples/, in small: what they compute, and that they stop, go on, and refuse bad input in one line."""

import asyncio
import io
import json
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import detection
import knn
import segmentation
import server
from fastapi.testclient import TestClient

import pyramid
from tnt_fast import classify, cli
from tnt_fast.variants import create_tnt

TINY = dict(embed_dim=24, inner_dim=12, num_heads_inner=2, num_heads_outer=3)
SMALL = "--size 64 96 --images 6 --channels 32 --batch-size 2 --device cpu"

pytestmark = pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data/{train,val}/{blue,green,red}/*.png and run/best.pt, which tells them apart."""
    root = tmp_path_factory.mktemp("trained")
    for part, count in (("train", 8), ("val", 3)):
        for channel, name in enumerate(("red", "green", "blue")):
            for i in range(count):
                pixels = np.random.default_rng((part == "val", channel, i)).integers(0, 80, (32, 40, 3))
                pixels[..., channel] += 170
                file = root / "data" / part / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    kwargs = [f"{name}={value}" for name, value in (TINY | dict(img_size=32, depth=4)).items()]
    options = "--epochs 4 --batch-size 8 --lr 0.01 --mixup 0 --cutmix 0 --color-jitter 0 --reprob 0 --workers 0 --device cpu"
    argv = ["train", str(root / "data"), "--out", str(root / "run"), "--auto-augment", "", "--model-kwargs", *kwargs]
    assert cli.main([*argv, *options.split(), "--smoothing", "0"]) == 0
    return root


@pytest.fixture
def checkpoint(trained) -> str:
    return str(trained / "run" / "best.pt")


# ---- the pyramid ----


def test_the_pyramid_has_strides_4_to_32_of_blocks_3_6_9_12_at_a_size_that_is_not_square():
    model = create_tnt("tnt_fast_s_patch16_224", img_size=(64, 96), depth=12, **TINY)
    _, maps = model.forward_intermediates(image := torch.randn(2, 3, 64, 96), [2, 5, 8, 11])
    levels = pyramid.Pyramid(model, 32)
    assert levels.blocks == [2, 5, 8, 11]
    assert levels.strides == (4, 8, 16, 32)
    found = levels(image)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        str(i): (2, 32, 64 // stride, 96 // stride) for i, stride in enumerate(levels.strides)
    }
    for of_block, level, x in zip(maps, levels.levels, found.values(), strict=True):
        assert torch.equal(level(of_block), x)
    sum(x.square().mean() for x in found.values()).backward()
    assert [name for name, p in levels.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("depth", "blocks"), [(1, [0, 0, 0, 0]), (3, [0, 1, 1, 2]), (4, [0, 1, 2, 3]), (24, [5, 11, 17, 23])])
def test_other_depths_give_four_levels_too(depth, blocks):
    levels = pyramid.Pyramid(create_tnt("tnt_fast_s_patch16_224", img_size=32, depth=depth, **TINY), 32)
    assert levels.blocks == blocks
    assert len(levels(torch.randn(1, 3, 32, 32))) == 4


# ---- images ----


def test_canvases_are_the_same_each_time_and_boxes_lie_around_the_ink_that_the_mask_has():
    canvases = pyramid.Canvases("train", 4, (64, 96))
    for i in range(4):
        image, truth = canvases[i]
        again, same = canvases[i]
        assert torch.equal(image, again)
        assert all(torch.equal(truth[name], same[name]) for name in truth)
        assert image.shape == (3, 64, 96)
        assert 0 <= image.min() <= image.max() <= 1
        assert len(truth["boxes"]) == len(truth["labels"]) > 0
        for (x0, y0, x1, y1), label in zip(truth["boxes"].int().tolist(), truth["labels"].tolist(), strict=True):
            ink = truth["mask"][y0:y1, x0:x1] == label
            assert ink[0].any()
            assert ink[-1].any()
            assert ink[:, 0].any()
            assert ink[:, -1].any()
            truth["mask"][y0:y1, x0:x1] = 0
        assert not truth["mask"].any()
    assert not torch.equal(canvases[0][0], pyramid.Canvases("val", 4, (64, 96))[0][0])


def test_no_digit_and_no_background_is_both_trained_on_and_held_out():
    parts = {part: pyramid.Canvases(part, 1, (64, 64)) for part in ("train", "val")}
    assert len(parts["train"].digits) + len(parts["val"].digits) == 1797
    halves = [np.concatenate([parts[part].photos[i] for part in ("train", "val")], 1) for i in range(2)]
    from sklearn.datasets import load_sample_images

    assert all(np.array_equal(half, photo) for half, photo in zip(halves, load_sample_images().images, strict=True))


def write_voc(folder: Path) -> None:
    """Pascal VOC 2012 of two images of 40 × 60, a box of 20 × 10 on each, an unknown pixel in the masks."""
    root = folder / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for part in ("train", "val"):
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(root / "JPEGImages" / f"{part}.jpg")
        box = "<xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>30</ymax>"
        objects = f"<object><name>bird</name><bndbox>{box}</bndbox></object>"
        (root / "Annotations" / f"{part}.xml").write_text(f"<annotation>{objects}</annotation>")
        mask = np.zeros((40, 60), np.uint8)
        mask[20:30, 10:30], mask[0, 0] = 3, 255
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{part}.png")
        for kind in ("Main", "Segmentation"):
            (root / "ImageSets" / kind / f"{part}.txt").write_text(part)


def test_pascal_voc_is_brought_to_the_size_with_its_boxes_and_masks(tmp_path):
    write_voc(tmp_path)
    voc = str(tmp_path)
    image, truth = pyramid.Voc(voc, "val", (80, 120), masks=False)[0]
    assert image.shape == (3, 80, 120)
    assert truth["boxes"].tolist() == [[20, 40, 60, 60]]
    assert truth["labels"].tolist() == [pyramid.VOC.index("bird") + 1]
    _, truth = pyramid.Voc(voc, "val", (80, 120), masks=True)[0]
    assert (truth["mask"][40:60, 20:60] == 3).all()
    assert (truth["mask"] == 3).sum() == 20 * 40
    assert (truth["mask"] == pyramid.UNKNOWN).sum() == 4


# ---- what is reported ----


def test_average_precision_is_the_area_under_precision_over_recall():
    square = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 33]])
    truths = [{"boxes": square[:2], "labels": torch.tensor([1, 1])}, {"boxes": square[:1], "labels": torch.tensor([2])}]
    found = [
        {"boxes": torch.cat([square[:1], square[:1], square[2:]]), "labels": torch.tensor([1, 1, 1])},
        {"boxes": square[:1], "labels": torch.tensor([1])},
    ]
    for of_image, scores in zip(found, ([0.9, 0.8, 0.6], [0.7]), strict=True):
        of_image["scores"] = torch.tensor(scores)
    # of label 1: found, found twice, in the wrong image, found with IoU 10/13; label 2 is never found
    assert detection.average_precision(found, truths) == pytest.approx({1: 0.5 * 1 + 0.5 * 2 / 4, 2: 0})
    assert detection.average_precision(found, truths, least=0.8) == pytest.approx({1: 0.5, 2: 0})


def test_intersection_over_union_is_by_class_and_a_class_that_is_nowhere_is_none():
    confusion = torch.tensor([[5, 1, 0], [2, 4, 0], [0, 0, 0]])
    found = segmentation.intersection_over_union(confusion).tolist()
    assert found[:2] == pytest.approx([5 / 8, 4 / 7])
    assert np.isnan(found[2])


# ---- runs ----


@pytest.mark.parametrize("example", [detection, segmentation])
def test_a_run_learns_from_a_checkpoint_and_leaves_a_picture_and_figures(example, checkpoint, tmp_path, capsys, monkeypatch):
    losses = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix", lambda self, loss, **_: losses.append(float(loss)))
    argv = [*SMALL.split(), "--checkpoint", checkpoint, "--epochs", "4", "--out", str(tmp_path / "run")]
    assert example.main(argv) == 0
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    figure = result["mAP@0.5"] if example is detection else result["mIoU"]
    assert 0 <= figure <= 1
    said = capsys.readouterr().out
    assert f"{figure:.3f} on 1 held-out images" in said
    assert "positions resampled to 4×6 patches" in said
    with Image.open(tmp_path / "run" / "picture.png") as image:
        assert image.width >= 96


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys):
    argv = f"{SMALL} --epochs 2".split()
    monkeypatch.setattr(pyramid, "create_tnt", lambda name, **sizes: create_tnt(name, depth=1, **sizes, **TINY))
    assert segmentation.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr("tqdm.tqdm.set_postfix", interrupt := Interrupt(after=4))
    assert segmentation.main([*argv, "--out", str(tmp_path / "cut")]) == 130
    assert "--resume" in capsys.readouterr().err
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["epoch"] == 1
    interrupt.left = 100
    assert segmentation.main([*argv, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole["model"].keys() == cut["model"].keys()
    assert all(torch.equal(weight, cut["model"][name]) for name, weight in whole["model"].items())
    assert cut["epoch"] == whole["epoch"] == 2


class Interrupt:
    """Ctrl-C after so many steps."""

    def __init__(self, after: int):
        self.left = after

    def __call__(self, **_) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size 60 96", "multiples of 32"),
        ("--channels 48", "multiple of 32"),
        ("--epochs 0", "at least 1"),
        ("--model tnt_x", "tnt_fast_s_patch16_224"),
        ("--voc nowhere", "VOCdevkit"),
        ("--checkpoint nowhere.pt", "nowhere.pt"),
        ("--device cuda:9", "accepted: cpu"),
    ],
)
def test_bad_options_end_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pyramid, "create_tnt", lambda name, **sizes: create_tnt(name, depth=1, **sizes, **TINY))
    with pytest.raises(SystemExit) as end:
        detection.main([*SMALL.split(), "--out", str(tmp_path / "run"), *options.split()])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", "", "go on with --resume"),
        (b"no checkpoint", "--resume", "last.pt"),
        ({"steps": 7}, "--resume", "7 steps there, 60 here"),
        ({"steps": 60, "model": {}}, "--resume", "run with other options"),
    ],
)
def test_a_folder_with_another_run_is_left_as_it_is(content, options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pyramid, "create_tnt", lambda name, **sizes: create_tnt(name, depth=1, **sizes, **TINY))
    file = tmp_path / "last.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        segmentation.main([*SMALL.split(), "--out", str(tmp_path), *options.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert file.read_bytes() == before


# ---- k-NN ----


def test_neighbours_name_held_out_and_new_images(trained, checkpoint, tmp_path, capsys):
    query = str(trained / "data" / "val" / "red")
    assert (
        knn.main([str(trained / "data"), "--checkpoint", checkpoint, "--query", query, "--out", str(tmp_path), "--k", "3"]) == 0
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] > 0.6
    assert [row["label"] for row in result["queries"]].count("red") >= 2
    saved = np.load(tmp_path / "features.npz")
    assert np.linalg.norm(saved["features"], axis=1) == pytest.approx(1, abs=1e-5)
    first = result["queries"][0]
    model = classify.Classifier(checkpoint, device="cpu")
    images = [model.transform(classify.open_image(file)) for file in (first["file"], first["nearest"][0]["file"])]
    with torch.no_grad():
        a, b = model.model.forward_head(model.model.forward_features(torch.stack(images)), pre_logits=True)
    assert torch.cosine_similarity(a, b, dim=0).item() == pytest.approx(first["nearest"][0]["cosine"], abs=1e-4)
    assert f"{result['accuracy']:.2%} of 9 held-out images" in capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_pictures_in_shards_have_the_features_of_their_files(trained, checkpoint, tmp_path):
    found = []
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            tar.add(trained / "data" / part, ".")
    for data, out in ((str(trained / "data"), tmp_path / "files"), (f"wds:{tmp_path}", tmp_path / "shards")):
        assert knn.main([data, "--checkpoint", checkpoint, "--out", str(out)]) == 0
        saved = np.load(out / "features.npz")
        order = np.argsort([f"{label}/{Path(file).name}" for file, label in zip(saved["files"], saved["labels"], strict=True)])
        found.append((saved["features"][order], saved["labels"][order], json.loads((out / "result.json").read_text())))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
    assert found[0][1].tolist() == found[1][1].tolist()
    assert found[0][2] == found[1][2]


def test_more_neighbours_than_images_are_refused(trained, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        knn.main([str(trained / "data"), "--checkpoint", checkpoint, "--out", str(tmp_path), "--k", "99"])
    assert "--k 99 of 24 images" in capsys.readouterr().err


# ---- the server ----


def bodies(trained: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(trained.glob("data/val/*/*.png"))]


def test_requests_that_come_together_are_answered_as_each_alone(trained, checkpoint):
    app = server.server(classify.Classifier(checkpoint, device="cpu"), largest=4, wait=0.2)
    files = sorted(trained.glob("data/val/*/*.png"))
    with TestClient(app) as client, ThreadPoolExecutor(len(files)) as pool:
        together = list(pool.map(lambda body: client.post("/classify?topk=2", content=body).json(), bodies(trained)))
        metrics = client.get("/metrics").json()
    alone = list(classify.Classifier(checkpoint, device="cpu")(files, topk=2, batch_size=1))
    for answer, row in zip(together, alone, strict=True):
        assert [p["class"] for p in answer["predictions"]] == [p["class"] for p in row["predictions"]]
        expected = [p["probability"] for p in row["predictions"]]
        assert [p["probability"] for p in answer["predictions"]] == pytest.approx(expected, rel=1e-4)
    sizes = {int(size): count for size, count in metrics["batches"].items()}
    assert sum(size * count for size, count in sizes.items()) == len(files)
    assert max(sizes) > 1
    assert max(sizes) <= 4
    assert metrics["requests"] == {"answered": len(files), "bad": 0, "refused": 0, "failed": 0}
    assert 0 < metrics["latency_ms"]["p50"] <= metrics["latency_ms"]["p99"]
    assert metrics["inside"] == 0


def test_bad_uploads_are_the_senders_fault_and_said_in_a_line(checkpoint, monkeypatch):
    monkeypatch.setattr(server, "MAX_BYTES", 2**20)
    png = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, "png")
    app = server.server(classify.Classifier(checkpoint, device="cpu"))
    with TestClient(app) as client:
        for body, query, status, message in (
            (b"", "", 400, "the file is empty"),
            (b"no image at all", "", 400, "no image format that is known here"),
            (png.getvalue()[:40], "", 400, "cannot read the image"),
            (bytes(2**20 + 1), "", 413, "more than 1 MiB"),
            (png.getvalue(), "?topk=0", 422, "greater than or equal to 1"),
        ):
            answer = client.post("/classify" + query, content=body)
            assert answer.status_code == status
            assert message in str(answer.json()["detail"])
            assert "/tmp" not in answer.text
        assert client.get("/classify").status_code == 405
        assert client.get("/health").json()["status"] == "ok"
        assert client.post("/classify?topk=99", content=png.getvalue()).status_code == 200
        assert client.get("/metrics").json()["requests"] == {"answered": 1, "bad": 4, "refused": 0, "failed": 0}


def test_too_many_requests_are_told_to_come_again_and_those_inside_are_answered(trained, checkpoint, monkeypatch):
    go, begun = threading.Event(), threading.Event()
    compute = server.computation

    def slow(*args):
        fast = compute(*args)

        def computed(images):
            begun.set()
            assert go.wait(30)
            return fast(images)

        return computed

    monkeypatch.setattr(server, "computation", slow)
    app = server.server(classify.Classifier(checkpoint, device="cpu"), largest=1, wait=0, limit=3)
    body = bodies(trained)[0]
    with TestClient(app) as client, ThreadPoolExecutor(3) as pool:
        inside = [pool.submit(client.post, "/classify", content=body) for _ in range(3)]
        assert begun.wait(30)
        until = time.monotonic() + 30
        while client.get("/metrics").json()["inside"] < 3 and time.monotonic() < until:
            time.sleep(0.01)
        refused = client.post("/classify", content=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        go.set()
        assert [answer.result().status_code for answer in inside] == [200, 200, 200]
        assert client.get("/metrics").json()["requests"] == {"answered": 3, "bad": 0, "refused": 1, "failed": 0}


def test_at_the_end_what_waits_is_answered():
    async def ended() -> list[Tensor]:
        batcher = server.Batcher(lambda images: images + 1, largest=2, wait=60)
        answers = [asyncio.create_task(batcher(torch.full((1,), float(i)))) for i in range(3)]
        await asyncio.sleep(0)
        batcher.close()
        await asyncio.wait_for(batcher.run(), 30)
        assert batcher.sizes == {2: 1, 1: 1}
        return [await answer for answer in answers]

    assert [x.item() for x in asyncio.run(ended())] == [1, 2, 3]


def test_a_batch_that_fails_answers_its_requests_and_the_next_ones_are_served(trained, checkpoint, monkeypatch):
    compute, calls = server.computation, []

    def failing(*args):
        fast = compute(*args)

        def computed(images):
            calls.append(len(images))
            if len(calls) == 1:
                raise RuntimeError("CUDA error")
            return fast(images)

        return computed

    monkeypatch.setattr(server, "computation", failing)
    with TestClient(server.server(classify.Classifier(checkpoint, device="cpu"))) as client:
        assert [client.post("/classify", content=bodies(trained)[0]).status_code for _ in range(2)] == [500, 200]
        assert client.get("/metrics").json()["requests"]["failed"] == 1


@pytest.mark.gpu
def test_graphs_answer_as_the_model(checkpoint):
    classifier = classify.Classifier(checkpoint, device="cuda")
    compute = server.computation(classifier, 6)
    for count in (1, 2, 3, 5, 6):
        images = torch.randn(count, 3, *classifier.model.pixel_embed.img_size)
        with torch.no_grad():
            expected = classifier.model(images.cuda()).cpu()
        torch.testing.assert_close(compute(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--checkpoint"),
        ("--checkpoint nowhere.pt", "nowhere.pt"),
        ("--max-batch 0", "at least 1"),
        ("--max-wait -1", "0 to 10,000"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        server.main([*options.split(), "--device", "cpu"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
