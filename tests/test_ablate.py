"""Ablations: each value of an axis is a run that differs in that alone; killed, they go on; bad input is said to be so."""

import csv
import json
import multiprocessing
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import torch
from helpers import write_images
from PIL import Image

from tnt_fast import ablate, recipe
from tnt_fast.checkpoints import read_checkpoint
from tnt_fast.cli import main
from tnt_fast.train import Run

TINY = ["img_size=16", "patch_size=8", "embed_dim=12", "inner_dim=4", "depth=1", "num_heads_outer=2", "num_heads_inner=2"]

pytestmark = pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


def run(data: Path, out: Path, *argv: object, processes: int = 1, epochs: int = 2) -> int:
    model = ["--model-kwargs", *TINY, "--ema", "0", "--auto-augment", "", "--batch-size", "4"]
    options = ["--processes", processes, "--epochs", epochs, *argv]
    return main(["ablate", str(data), "--out", str(out), "--device", "cpu", *model, *map(str, options)])


def rows(out: Path) -> dict[str, dict]:
    found = json.loads((out / "ablation.json").read_text())["rows"]
    return {f"{row['axis']} {row['value']}".strip(): row for row in found}


def test_each_value_is_a_run_that_differs_in_it_alone(data, tmp_path, capsys):
    assert run(data, tmp_path, "--grid", "inner=none,all", "heads=1", "--seeds", "2", epochs=1) == 0
    found = rows(tmp_path)
    assert list(found) == ["base", "inner none", "inner all", "heads 1"]
    assert found["inner all"] == found["base"] | {"axis": "inner", "value": "all", "table": "5"}
    folders = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("last.pt"))
    assert folders == [f"{name}/seed-{seed}" for name in ("base", "heads-1", "inner-none") for seed in (0, 1)]
    differ = {"base": {}, "inner-none": {"inner_blocks": ()}, "heads-1": {"num_heads_inner": 1}}
    base = read_checkpoint(tmp_path / "base" / "seed-0" / "last.pt")["model_kwargs"]
    for name, changed in differ.items():
        saved = read_checkpoint(tmp_path / name / "seed-1" / "last.pt")
        assert saved["model_kwargs"] == base | changed
        assert saved["config"]["seed"] == 1
        row = found["base" if name == "base" else name.replace("-", " ")]
        assert row["parameters"] == sum(value.numel() for value in saved["state_dict"].values())
        last = [json.loads((tmp_path / name / f"seed-{i}" / "history.json").read_text())[-1] for i in (0, 1)]
        assert row["accuracies"] == [epoch["val_accuracy"] for epoch in last]
        assert row["accuracy"] == pytest.approx(statistics.fmean(row["accuracies"]))
        assert row["deviation"] == pytest.approx(statistics.stdev(row["accuracies"]))
        assert row["img_s"] > 0
    assert found["inner none"]["multiply_adds"] < found["base"]["multiply_adds"] == found["heads 1"]["multiply_adds"]
    with open(tmp_path / "ablation.csv", newline="") as file:
        assert [line["value"] for line in csv.DictReader(file)] == ["", "none", "all", "1"]
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 300
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [["inner", "none"], ["inner", "all"], ["heads", "1"]]


@pytest.mark.usefixtures("undrawn")
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(data, tmp_path, monkeypatch, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--grid", "inner=none", "--seeds", "1"]
    assert run(data, whole, *options) == 0
    evaluate, count = Run.evaluate, []

    def kill(self):
        count.append(self)
        if len(count) == 3:  # the first epoch of the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", kill)
        assert run(data, killed, *options) == 128 + signal.SIGTERM
    assert "continue it with --resume" in capsys.readouterr().err
    assert rows(killed)["base"] == rows(whole)["base"] | {"img_s": None}
    assert rows(killed)["inner none"]["runs"] == 0
    before = (killed / "base" / "seed-0" / "last.pt").stat().st_mtime_ns
    assert run(data, killed, *options, "--resume") == 0
    assert (killed / "base" / "seed-0" / "last.pt").stat().st_mtime_ns == before
    for name in ("base", "inner-none"):
        ends = [read_checkpoint(out / name / "seed-0" / "last.pt")["state_dict"] for out in (whole, killed)]
        assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    without = [{name: row | {"img_s": 0} for name, row in rows(out).items()} for out in (whole, killed)]
    assert without[0] == without[1]


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr(ablate.Ablation, "_draw", lambda self: "no picture")
    monkeypatch.setattr(Run, "_draw", lambda self: "no picture")


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import torch first."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    yield
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("forked", "undrawn")
def test_a_run_that_fails_or_dies_is_named_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    train_cell = ablate.train_cell

    def fails(config, folder):
        if folder.parent.name == "heads-1":
            os._exit(9)
        if folder.parent.name == "se-0.5":
            config.lr = 1e30
        return train_cell(config, folder)

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "train_cell", fails)
        assert run(data, tmp_path, "--grid", "heads=1,4", "se=0.5", "--seeds", "1", processes=2) == 1
    err = capsys.readouterr().err
    assert "heads-1, seed 0 failed: its process ended with status 9" in err
    assert "se-0.5, seed 0 failed: FloatingPointError" in err
    assert {name: row["runs"] for name, row in rows(tmp_path).items()} == {"base": 1, "heads 1": 0, "heads 4": 1, "se 0.5": 0}
    assert run(data, tmp_path, "--resume") == 0
    assert rows(tmp_path)["heads 1"]["runs"] == 1


@pytest.mark.usefixtures("forked", "undrawn")
def test_a_signal_saves_the_runs_of_all_processes(data, tmp_path, capsys):
    def kill_when_both_train():
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*/*/last.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill_when_both_train).start()
    assert run(data, tmp_path, "--grid", "inner=none", "--seeds", "1", processes=2, epochs=100_000) == 128 + signal.SIGTERM
    assert "continue it with --resume" in capsys.readouterr().err
    for name in ("base", "inner-none"):
        saved = read_checkpoint(tmp_path / name / "seed-0" / "last.pt")
        assert 0 < saved["epoch"] < 100_000
        assert not (tmp_path / name / "seed-0" / ".lock").exists()  # it has ended by itself


@pytest.mark.usefixtures("undrawn")
def test_an_ablation_grows_and_keeps_its_settings(data, tmp_path, capsys):
    assert run(data, tmp_path, "--grid", "inner=none", "--seeds", "1", epochs=1) == 0
    assert run(data, tmp_path, "--grid", "inner=none", epochs=1) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert run(data, tmp_path, "--resume", "--lr", "0.5", epochs=1) == 2
    assert "was begun with lr=0.0 (now 0.5)" in capsys.readouterr().err
    assert run(data, tmp_path, "--resume", "--grid", "heads=1", "--seeds", "1", epochs=1) == 0
    assert list(rows(tmp_path)) == ["base", "inner none", "heads 1"]
    assert "2 of 3 runs are finished" in capsys.readouterr().out
    (tmp_path / "ablation.json").write_text("{")
    assert run(data, tmp_path, "--resume", epochs=1) == 2
    assert "is damaged or of another version" in capsys.readouterr().err


def test_the_default_grid_has_the_papers_tables(tmp_path):
    config = recipe.Config(data=recipe.DIGITS, **ablate.BASES["digits"])
    found = ablate.Ablation(config, tmp_path / "none")
    assert {row["table"] for row in found.rows()} == {"", "5", "6", "7", "8", "12"}
    assert set(found.grid) == set(ablate.AXES)
    assert len(found.cells()) == 3 * len(found.configs) == 39
    assert [cell.seed for cell in found.cells()[:13]] == [0] * 13
    sizes = [found.models[name].sizes() for name in ("base", "stride-2", "stride-8")]
    assert {size["S"] * size["C"] for size in sizes} == {16 * 12}
    assert [size["S"] for size in sizes] == [16, 64, 4]
    assert found.models["overlap-8"].num_patches > found.models["base"].num_patches
    counts = found.counts
    assert counts["se-0.25"]["parameters"] > counts["base"]["parameters"] > counts["inner-none"]["parameters"]
    assert counts["positions-none"]["parameters"] == counts["base"]["parameters"] - 12 * 16 - 5 * 96
    assert not (tmp_path / "none").exists()


BAD = {
    "an axis": (["--grid", "haeds"], "grid='haeds' is unknown; nearest: heads; accepted: inner, positions, heads,"),
    "no value": (["--grid", "heads="], "names no value"),
    "heads": (["--grid", "heads=3"], "grid heads=3: num_heads_inner=3 does not divide inner_dim=4; accepted: 1, 2, 4"),
    "a text": (
        ["--grid", "heads=two"],
        "grid heads='two' is not accepted; heads is heads of the inner transformers; here: 1, 2, 4",
    ),
    "a block": (["--grid", "inner=3"], "inner_blocks=[3] names blocks outside 0 to 0"),
    "a stride": (["--grid", "stride=3"], "grid stride='3' is not accepted (inner_dim=4 at stride 4 leaves no whole number"),
    "positions": (["--grid", "positions=bth"], "is not accepted; positions is position encodings: none, pixel, patch, both"),
    "seeds": (["--seeds", "0"], "--seeds 0 must be at least 1"),
    "processes": (["--processes", "0"], "--processes 0 must be at least 1"),
    "a setting": (["--opt", "adamv"], "opt='adamv' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_is_written(case, data, tmp_path, capsys):
    argv, message = BAD[case]
    assert run(data, tmp_path / "out", *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures_is_one_line(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / "data" / part / "cat").mkdir(parents=True)
    assert run(tmp_path / "data", tmp_path / "out") == 2
    assert "holds no images of the classes cat; accepted: .bmp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
