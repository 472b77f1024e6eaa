"""The page of ``tnt-fast visualize``: whole, true to the model, without a network; a browser opens it where there is one."""

import base64
import json
import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import browser
import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import timm
import torch
from helpers import TINY, perturb
from PIL import Image

from tnt_fast import TNT, images, page, seeing, visualize
from tnt_fast.cli import main

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path")


def weights(path: Path, **kwargs) -> str:
    """A file as timm's training writes it, of a tiny model."""
    model = perturb(TNT(**{**TINY, **kwargs}))
    kwargs = {name: value for name, value in {**TINY, **kwargs}.items() if name != "num_classes"}
    torch.save({"arch": "tnt_ti_patch16_224", "args": {"model_kwargs": kwargs}, "state_dict": model.state_dict()}, path)
    return str(path)


def picture(path: Path, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with files of weights, two pictures, and ``page``, made of them."""
    root = tmp_path_factory.mktemp("made")
    files = [str(picture(root / name, i)) for i, name in enumerate(("cat.png", "dog.png"))]
    beside = weights(root / "vit.pt", inner_blocks=())
    argv = ["--checkpoint", weights(root / "tnt.pt"), "--beside-checkpoint", beside, "--device", "cpu"]
    assert main(["visualize", *files, *argv, "--out", str(root / "page")]) == 0
    return root


def data_of(index: Path) -> dict:
    text = index.read_text("utf-8")
    assert text.count("</script>") == 2  # nothing in the data ends it
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S).group(1))


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


def test_the_page_has_the_attention_that_the_model_has(made):
    shown = data_of(made / "page" / "index.html")
    subject = seeing.load(made / "tnt.pt", None, "cpu")
    for image, name in zip(shown["images"], ("cat", "dog"), strict=True):
        seen = seeing.see(subject, images.open_image(made / f"{name}.png"))
        for level in ("inner", "outer"):
            maps, item = getattr(seen, level), image[level]
            most = np.frombuffer(base64.b64decode(item["most"]), "<f4").reshape(*maps.shape[:-1], 1)
            np.testing.assert_allclose(as_bytes(item["bytes"]).reshape(maps.shape) / 255 * most, maps, atol=most.max() / 500)
        low, high = image["twoLevel"]["low"], image["twoLevel"]["high"]
        shares = low + as_bytes(image["twoLevel"]["bytes"]) / 255 * (high - low)
        np.testing.assert_allclose(shares, seen.two_level_rollout.ravel(), atol=(high - low) / 500)
        assert f"{visualize.percent(seen.probabilities.max())}" in image["prediction"]
        with np.load(made / "page" / name / "arrays.npz") as arrays:
            for field, values in seen._asdict().items():
                np.testing.assert_array_equal(arrays[field], values)
            assert arrays["features_beside"].shape == seen.features.shape
            assert arrays["spread_0"].shape == arrays["spread_1"].shape == (TINY["embed_dim"], 2)


def test_pictures_lie_beside_the_page_and_are_whole(made):
    expected = {"features.png", "pixels.png", "attention.png", "rollout.png", "distance.svg", "patch-similarity.svg"}
    expected |= {"map-similarity.svg", "spread.svg", "arrays.npz"}
    for name in ("cat", "dog"):
        assert {path.name for path in (made / "page" / name).iterdir()} == expected
    assert {path.name for path in (made / "page").glob("*.*")} == {"index.html", "patch-positions.png", "pixel-positions.png"}
    for path in (made / "page").rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    for path in (made / "page").rglob("*.svg"):
        ElementTree.parse(path)


def test_the_page_names_no_address_that_a_browser_would_ask(made):
    text = (made / "page" / "index.html").read_text("utf-8")
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}  # the name of a format
    assert not re.findall(r"\b(?:src|href)=[\"'](?!data:)", text)


def test_a_browser_opens_it_clicks_and_the_pictures_change_without_a_request(made, tmp_path):
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium is installed here")
    index = made / "page" / "index.html"
    with browser.opened(path, tmp_path) as tab:
        tab.open(index)
        tab.run("new Promise(r => { const f = () => document.body.dataset.ready ? r() : setTimeout(f, 20); f() })")

        def drawn() -> dict[str, str]:
            return tab.run("Object.fromEntries([...document.querySelectorAll('canvas[id]')].map(c => [c.id, c.toDataURL()]))")

        def changed(selector: str, x: float = 0.5, y: float = 0.5) -> set[str]:
            before = drawn()
            tab.click(selector, x, y)
            return {name for name, content in drawn().items() if content != before[name]}

        assert changed("#picture", 0.1, 0.1) == {"picture", "patches", "inside", "patch-positions"}
        assert "row 1, column 1" in tab.run("document.querySelector('#picture-says').textContent")
        expected = seeing.see(seeing.load(made / "tnt.pt", None, "cpu"), images.open_image(made / "cat.png"))
        row = tab.run("[...outerRow(2, 1), ...innerRow(2, 0, state.pixel)]")
        own = [expected.outer[1].mean(0)[1], expected.inner[1, 0].mean(0)[tab.run("state.pixel")]]
        np.testing.assert_allclose(row, np.concatenate(own), atol=0.004)
        assert changed("#inside", 0.9, 0.1) == {"inside", "pixel-positions"}
        assert "row 1, column 4" in tab.run("document.querySelector('#inside-says').textContent")
        assert changed("#patches", 0.9, 0.9) >= {"picture", "patches", "inside"}
        assert changed("#images button:nth-child(2)") >= {"picture", "rollout", "two-level", "spread-map"}
        assert changed("#class-strip button:nth-child(1)") >= {"patches", "class"}
        assert tab.errors == []
        assert {address for address in tab.requests if not address.startswith("data:")} == {index.resolve().as_uri()}


def refused(capsys, argv: list[str], *named: str) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for text in named:
        assert text in error


def test_bad_input_is_one_line_and_nothing_is_written(made, tmp_path, capsys):
    cat, out = str(made / "cat.png"), str(tmp_path / "out")
    model, to = ["--checkpoint", str(made / "tnt.pt")], ["--out", out]
    (tmp_path / "torn.png").write_bytes(picture(tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "many").mkdir()
    for i in range(page.MOST_IMAGES + 1):
        (tmp_path / "many" / f"{i}.png").touch()
    refused(capsys, ["visualize", cat, str(tmp_path / "torn.png"), *model, *to], "cannot read the image", "torn.png")
    refused(capsys, ["visualize", cat, str(tmp_path / "gone.png"), *model, *to], "no file or directory", "gone.png")
    refused(capsys, ["visualize", str(tmp_path / "many"), *model, *to], "17 images", "16 at most")
    refused(capsys, ["visualize", cat, *model, *to, "--blocks", "1", "3"], "--blocks 3", "blocks 1 to 2")
    refused(capsys, ["visualize", cat, *model, *to, "--blocks", "0"], "--blocks 0", "blocks 1 to 2")
    refused(capsys, ["visualize", cat, *to], "--checkpoint", "--model")
    refused(capsys, ["visualize", cat, *model, "--out", f"{out}/deep"], "there is no directory", "make it first")
    refused(capsys, ["visualize", cat, *model, "--out", cat], "cat.png' is a file", "accepted: a folder")
    refused(
        capsys,
        ["visualize", cat, *model, *to, "--beside-model", "deit_smal"],
        "'deit_smal' is unknown",
        "deit_small_patch16_224",
    )
    refused(
        capsys, ["visualize", cat, *model, *to, "--beside-model", "resnet18", "--beside-checkpoint", "x"], "ResNet", "accepted"
    )
    vit = ["--beside-model", "vit_tiny_patch16_224", "--beside-checkpoint", str(made / "vit.pt")]
    refused(capsys, ["visualize", cat, *model, *to, *vit], "vit.pt' does not fit vit_tiny_patch16_224")
    assert not Path(out).exists()


def test_what_is_not_finite_is_named_and_makes_no_page(made, tmp_path, capsys, monkeypatch):
    see = seeing.see
    monkeypatch.setattr(seeing, "see", lambda *args: see(*args)._replace(rollout=np.array([[np.nan]])))
    argv = ["visualize", str(made / "cat.png"), "--checkpoint", str(made / "tnt.pt"), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "cat.png' is not finite (rollout)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.html").exists()


def test_weights_that_cannot_be_fetched_leave_a_remedy(monkeypatch):
    create = timm.create_model

    def offline(name: str, pretrained: bool = False) -> torch.nn.Module:
        if pretrained:
            raise OSError("no network here\nand more")
        return create(name, depth=1)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match=r"'vit_tiny_patch16_224' \(no network here\);.*--beside-checkpoint"):
        seeing.load_beside(None, "vit_tiny_patch16_224")


def test_a_vit_of_timm_with_a_file_of_weights_stands_beside(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224")
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pt")
    beside = seeing.load_beside(tmp_path / "vit.pt", "vit_tiny_patch16_224", "cpu")
    image = images.open_image(picture(tmp_path / "cat.png"))
    features = seeing.features_beside(beside, image)
    assert features.shape == (12, 14, 14, 192)
    with torch.no_grad():
        tokens = beside.model.norm(torch.from_numpy(features[-1]).flatten(0, 1))
        torch.testing.assert_close(tokens, vit.eval().forward_features(beside.input(image))[0, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(num_classes=0), dict(inner_blocks=(), use_patch_pos=False)], ids=str)
def test_a_page_is_made_of_models_without_classes_or_inner_transformers(tmp_path, options, monkeypatch):
    monkeypatch.setattr(page, "_write_pictures", lambda *_: [])
    files = []
    for i, name in enumerate(("<script>'&.png", "a.png", "A.PNG", "\u202e猫.png")):
        (tmp_path / str(i)).mkdir()
        files.append(str(picture(tmp_path / str(i) / name)))
    subject = seeing.load(weights(tmp_path / "tnt.pt", depth=1, **options), None, "cpu")
    written = page.write_page(subject, [Path(f) for f in files], [images.open_image(f) for f in files], tmp_path / "out")
    shown = data_of(written.page)
    assert [image["name"] for image in shown["images"]] == ["<script>'&.png", "a.png", "A.PNG", "\\u202e猫.png"]
    assert shown["model"]["hasInner"] == [options.get("inner_blocks") != ()]
    assert all((image["prediction"] is None) == (subject.model.num_classes == 0) for image in shown["images"])
    assert page._folders([Path(f) for f in files]) == ["script", "a", "A-2", "image"]


def test_above_its_size_a_page_has_the_mean_of_the_heads(monkeypatch):
    maps = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)
    assert page._rows(maps)["heads"] == 3
    monkeypatch.setattr(page, "MOST_VALUES", maps.size - 1)
    item = page._rows(maps)
    most = np.frombuffer(base64.b64decode(item["most"]), "<f4").reshape(2, 1, 4, 1)
    assert item["heads"] == 1
    np.testing.assert_allclose(
        as_bytes(item["bytes"]).reshape(2, 1, 4, 4) / 255 * most, maps.mean(1, keepdims=True), atol=0.003
    )


def test_every_command_of_the_page_about_seeing_runs(made, tmp_path, monkeypatch):
    """With tiny models in place of those that are named, which are not at hand."""
    text = (ROOT / "docs" / "seeing.md").read_text("utf-8")
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ").splitlines()
    assert len(commands) == 4
    load, deep = seeing.load, weights(tmp_path / "deep.pt", depth=12, img_size=16)
    monkeypatch.setattr(seeing, "load", lambda file, model, *more: load(deep if model else file, None, *more))
    monkeypatch.setattr(seeing, "load_beside", lambda file, model, *more: load(deep if model else file, None, *more))
    monkeypatch.setattr(page, "_write_pictures", lambda *_: [])  # what other tests are for
    monkeypatch.chdir(tmp_path)
    for command in commands:
        name, *arguments = shlex.split(command)
        for path in map(Path, arguments):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".jpg", ".png"):
                picture(path)
            elif path.suffix == ".pt":
                shutil.copy(made / "tnt.pt", path)
        assert name == "tnt-fast"
        assert main(arguments) == 0
        out = Path(arguments[arguments.index("--out") + 1])
        assert len(data_of(out / "index.html")["images"]) == sum(argument.endswith((".jpg", ".png")) for argument in arguments)
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(example, {})


def test_the_pictures_of_the_page_about_seeing_are_there_and_small():
    text = (ROOT / "docs" / "seeing.md").read_text("utf-8")
    named = {ROOT / "docs" / name for name in re.findall(r"!\[.*?\]\((.*?)\)", text)}
    assert named == set((ROOT / "docs" / "seeing").iterdir())
    assert sum(path.stat().st_size for path in named) < 300_000
