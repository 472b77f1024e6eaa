"""The history of a run elsewhere: Weights & Biases, by a stand-in; TensorBoard's is in test_runs.py."""

import json
import sys
import types

import pytest

pytest.importorskip("torchvision")

from helpers import write_images

from tnt_fast import metrics, recipe
from tnt_fast.cli import main

TINY = ["img_size=32", "embed_dim=24", "inner_dim=12", "depth=1", "num_heads_outer=2", "num_heads_inner=2"]
QUICK = ["--epochs", "2", "--batch-size", "4", "--threads", "1", "--device", "cpu", "--workers", "0"]
NAMES = {"train_loss", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second", "memory_mib"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "data")


def arguments(data, out, *more) -> list[str]:
    options = ["--model", "tnt_ti_patch16_224", "--model-kwargs", *TINY, *QUICK, "--wandb", "mine"]
    return ["train", str(data), "--out", str(out), *options, *more]


class Wandb(types.ModuleType):
    """Takes note of what is asked of it."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.begun, self.rows, self.ended, self.fails = [], [], [], fails

    def init(self, **kwargs):
        if self.fails == "init":
            raise ConnectionError("api_key not configured\n(no-tty)")
        self.begun.append(kwargs)
        return self

    def log(self, values, step):
        if self.fails == "log":
            raise OSError("no room")
        self.rows.append((step, values))

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch, request):
    module = Wandb(getattr(request, "param", ""))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_without_the_package_the_run_is_refused_before_anything_is_written(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(arguments(data, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert said.startswith("tnt-fast: ImportError: --wandb needs one more package")
    assert said.endswith("pip install wandb\n")
    assert not (tmp_path / "run").exists()


def test_every_epoch_is_logged_and_a_continued_run_is_the_same_there(data, tmp_path, wandb):
    out = tmp_path / "run"
    assert main(arguments(data, out)) == 0
    assert main(arguments(data, out, "--resume", "--epochs", "3")) == 0
    first, second = wandb.begun
    assert first["config"] != second["config"]
    assert [(begun["project"], begun["name"], begun["dir"]) for begun in wandb.begun] == [("mine", "run", str(out))] * 2
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert json.loads(json.dumps(first["config"]))["epochs"] == 2
    history = json.loads((out / "history.json").read_text())
    of_one = [{**row, "memory_mib": max(row["memory_mib"])} for row in history]
    assert wandb.rows == [(row["epoch"], {name: row[name] for name in NAMES}) for row in of_one]
    assert wandb.ended == [0, 0]
    assert main(arguments(data, tmp_path / "other" / "run", "--epochs", "1")) == 0
    assert wandb.begun[2]["id"] != first["id"]


@pytest.mark.parametrize("wandb", ["init"], indirect=True)
def test_a_run_that_is_not_taken_is_told_in_a_line_and_does_not_begin(data, tmp_path, capsys, wandb):
    assert main(arguments(data, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "(api_key not configured (no-tty)); see 'wandb login', or set WANDB_MODE=offline" in said
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("wandb", ["log"], indirect=True)
def test_a_failure_in_the_middle_is_told_once_and_the_run_goes_on(data, tmp_path, capsys, wandb):
    assert main(arguments(data, tmp_path / "run")) == 0
    assert capsys.readouterr().out.count("--wandb failed in epoch 1 and gets no more of this run: no room") == 1
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 2


def test_a_run_that_fails_is_marked_as_failed(tmp_path, wandb):
    def begin():
        with metrics.recorded(recipe.Config("data", wandb="mine"), tmp_path, 0, print):
            raise KeyboardInterrupt

    pytest.raises(KeyboardInterrupt, begin)
    assert wandb.ended == [1]
