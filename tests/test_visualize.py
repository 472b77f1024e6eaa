"""Pictures of what strangers named: they are drawn whatever the names are, small, and in well-formed files."""

import os
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.axes import Axes

from tnt_fast import visualize

FOREIGN = ["$\\frac{1$", "a\x07b\x1b[31m", "line\nbreak\x00", "\u202egnp.exe", "\udcff\udc80", "\uffff", "<b>&--", "100% $"]
HISTORY = [{"epoch": i, "train_loss": 1 / i, "val_loss": 2 / i, "val_accuracy": i / 4} for i in (1, 2, 3)]


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def row(file, name: str, probability: float = 0.5, **truth) -> dict:
    return {"file": str(file), "predictions": [{"class": name, "index": 0, "probability": probability}], **truth}


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """The titles and names on a page that is drawn, from first to last."""
    found: list[str] = []
    for name, position in (("set_title", 0), ("text", 2)):
        draw = getattr(Axes, name)

        def drawn(axes, *args, draw=draw, position=position, **kwargs):
            found.append(args[position])
            return draw(axes, *args, **kwargs)

        monkeypatch.setattr(Axes, name, drawn)
    return found


def test_foreign_names_lose_no_picture_and_leave_svg_well_formed(tmp_path, photo):
    rows = []
    for i, name in enumerate(FOREIGN):
        file = os.fsencode(tmp_path) + b"/%d\xff$\\frac{\x1b.png" % i
        os.link(photo, file)
        rows.append(row(os.fsdecode(file), name, truth=FOREIGN[i - 1]))
    with matplotlib.rc_context({"text.usetex": True}), warnings.catch_warnings():
        warnings.simplefilter("error")  # the replacement for what is no character is in the font
        page = visualize.prediction_page(rows, tmp_path / "page.svg", title="$\\frac{\x00")
        curve = visualize.training_curve(HISTORY, tmp_path / "curve.svg", "".join(FOREIGN))
    for file in (page, curve):
        ElementTree.parse(file)
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["curve.svg", "page.svg"]


def test_a_page_has_the_names_of_classes_and_files_at_a_length_that_fits(tmp_path, photo, texts, monkeypatch):
    names = ["photo_of_a_" + "very_" * 20 + "long_name.png", "猫" * 40 + ".png", "strip.png"]
    os.link(photo, tmp_path / names[0])
    os.link(photo, tmp_path / names[1])
    Image.new("RGB", (2000, 3)).save(tmp_path / names[2])
    rows = [row(tmp_path / names[0], "n" * 75, 0.4), row(tmp_path / names[1], "狗" * 75, 0.3, truth="猫" * 75)]
    rows += [row(tmp_path / names[2], "eel", 0.00031), {"file": str(photo), "predictions": []}]
    monkeypatch.setattr(visualize, "FONTS", ())
    with pytest.warns(match="page.png' shows boxes for characters that no installed font has") as told:
        visualize.prediction_page(rows, tmp_path / "page.png")
    assert len(told) == 1
    assert texts == [
        "狗" * 9 + "…\n30% (is 猫猫猫猫…)", "…" + "猫" * 11 + ".png",
        "\nno class", "photo.png",
        "eel\n0.031%", "strip.png",
        "n" * 18 + "…\n40%", "…ery_very_very_long_name.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("probability", "shown"),
    [
        (1, "100%"),
        (0.8, "80%"),
        (0.1, "10%"),
        (0.0996, "10%"),
        (0.0123, "1.2%"),
        (0.001, "0.1%"),
        (0.00031, "0.031%"),
        (0, "0%"),
    ],
)
def test_small_percentages_are_not_zero(probability, shown):
    assert visualize.percent(probability) == shown


def test_a_page_takes_thumbnails_of_large_photos(tmp_path, monkeypatch):
    Image.new("RGB", (3200, 2400), (250, 10, 200)).save(tmp_path / "large.jpg")
    sizes, show = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, image: sizes.append(image.size) or show(axes, image))
    visualize.prediction_page([row(tmp_path / "large.jpg", "cat")], tmp_path / "page.png")
    assert sizes == [(325, 244)]


def test_a_file_that_is_gone_loses_no_page(tmp_path, photo, texts):
    visualize.prediction_page([row(tmp_path / "gone.png", "cat"), row(photo, "dog")], tmp_path / "page.png")
    assert texts == ["gone", "cat\n50%", "gone.png", "dog\n50%", "photo.png"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_curve_of_a_run_shows_each_epoch(tmp_path, monkeypatch, count):
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *args, **kwargs: lines.extend(plot(axes, *args, **kwargs)) or lines[-1:])
    visualize.training_curve(HISTORY[:count], tmp_path / "curve.png", "/long/path" * 100)
    assert [len(line.get_xdata()) for line in lines] == [count] * 3
    assert all(line.get_marker() == ("o" if count == 1 else "None") for line in lines)
    assert all(float(tick).is_integer() for line in lines for tick in line.axes.get_xticks())
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width == pytest.approx(9 * visualize.DPI, abs=2)
