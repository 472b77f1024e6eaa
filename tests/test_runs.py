"""The folder of a run: one owner, files whole or not at all, whatever is damaged told in one line; how a run is extended."""

import csv
import errno
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import torch
from helpers import write_images
from timm.loss import SoftTargetCrossEntropy

from tnt_fast import recipe, runs, train
from tnt_fast.checkpoints import read_checkpoint, save_checkpoint
from tnt_fast.cli import main

TINY = {"img_size": 32, "embed_dim": 24, "inner_dim": 12, "depth": 1, "num_heads_outer": 2, "num_heads_inner": 2}
MODEL = ["--model", "tnt_ti_patch16_224", "--model-kwargs", *(f"{key}={value}" for key, value in TINY.items())]
CPU = ["--device", "cpu", "--workers", "0"]
PLAIN = ["--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--auto-augment", "", "--reprob", "0", "--hflip", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """12 images to train on, 4 held out, 2 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "data")


def arguments(data, out, *more) -> list[str]:
    quick = ["--epochs", "2", "--batch-size", "4", "--lr", "0.001", "--warmup-epochs", "0", *CPU, "--threads", "1"]
    return ["train", str(data), "--out", str(out), *MODEL, *quick, *map(str, more)]


def resume(data, out, *more) -> int:
    return main(["train", str(data), "--out", str(out), *CPU, "--resume", *map(str, more)])


def at_step(monkeypatch, n: int, act) -> None:
    """Call ``act`` before the nth loss from now on; what it returns multiplies the loss."""
    forward, calls = SoftTargetCrossEntropy.forward, []

    def wrapped(module, x, target):
        calls.append(1)
        changed = act() if len(calls) == n else None
        return forward(module, x, target) * (1 if changed is None else changed)

    monkeypatch.setattr(SoftTargetCrossEntropy, "forward", wrapped)


@pytest.fixture(scope="module")
def _stopped(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments(data, out)) == 143
    return out


@pytest.fixture
def stopped(_stopped, tmp_path) -> Path:
    """A copy of a run that was stopped after the first of three steps of its second and last epoch."""
    return Path(shutil.copytree(_stopped, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(capsys, *texts: str) -> str:
    """The error that was printed: one line with all texts in it."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("stopping after")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("tnt-fast: ")
    assert [text for text in texts if text not in lines[0]] == [], lines[0]
    return lines[0]


# ---- nothing is saved that was not checked ----


@pytest.mark.parametrize("lr", [1e30, float("inf")])
def test_a_signal_in_a_diverging_step_leaves_the_last_good_checkpoint(data, stopped, monkeypatch, lr):
    before = contents(stopped)
    run = train.Run(recipe.Config(str(data), device="cpu", workers=0), stopped, resume=True, log=lambda line: None)

    def diverge():
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_step(patch, 1, diverge)
        with pytest.raises(FloatingPointError) as error:
            run.train()
    said = str(error.value)
    assert f"epoch 2, step 2, at a learning rate of {lr:.1e}" in said
    assert f"{str(stopped / 'last.pt')!r} holds the last good state: --initial {str(stopped / 'last.pt')!r} --out NEW" in said
    assert "(--lr)" in said
    assert "--clip-grad 1" in said
    assert contents(stopped) == before
    assert resume(data, stopped) == 0


def test_moments_of_the_optimizer_that_overflow_are_not_saved(data, stopped, capsys, monkeypatch):
    before = contents(stopped)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: 1e30)  # whose square is not finite
        assert resume(data, stopped) == 2
    one_line(capsys, "exp_avg_sq is not finite in epoch 2, step 3", "holds the last good state")
    assert contents(stopped) == before


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_the_terminal_stops_a_run_as_sigterm_does_unless_it_is_ignored(data, tmp_path, monkeypatch, ignored):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
            assert main(arguments(data, tmp_path, "--epochs", 1)) == (0 if ignored else 129)
    finally:
        signal.signal(signal.SIGHUP, old)
    saved = read_checkpoint(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"]) == ((1, 0) if ignored else (0, 2))


# ---- one owner ----


def test_a_second_run_in_a_folder_is_refused_and_told_who_is_there(data, tmp_path, capsys, monkeypatch):
    codes = []
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: codes.append(main(arguments(data, tmp_path / "run", "--epochs", 1, "--resume"))))
        assert main(arguments(data, tmp_path / "run", "--epochs", 1)) == 0
    assert codes == [2]
    one_line(capsys, f"{str(tmp_path / 'run')!r} is in use by 'process {os.getpid()} on ", "choose another --out")
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_lock_of_a_killed_process_is_taken_over_and_that_is_said(data, stopped, capsys):
    (stopped / ".lock").write_text("process 7 on elsewhere, since then")
    assert resume(data, stopped) == 0
    assert "'process 7 on elsewhere, since then', which ended without giving it back" in capsys.readouterr().out
    assert not (stopped / ".lock").exists()


def test_a_lock_ends_with_the_process_that_took_it_though_its_readers_live(tmp_path):
    wait, done = os.pipe()
    owner = os.fork()
    if not owner:
        with runs.Folder(tmp_path, print).locked():
            if not os.fork():
                os.close(done)
                os.read(wait, 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.waitpid(owner, 0)
        assert f"process {owner} on " in (tmp_path / ".lock").read_text()
        runs.Folder(tmp_path, print).check_free()
        with runs.Folder(tmp_path, print).locked(), pytest.raises(runs.RunError, match=f"process {os.getpid()} on "):
            runs.Folder(tmp_path, print).check_free()
    finally:
        os.close(done)
        os.close(wait)


def test_a_checkpoint_that_another_process_wrote_since_it_was_read_is_not_replaced(data, stopped):
    run = train.Run(recipe.Config(str(data), device="cpu", workers=0), stopped, resume=True, log=lambda line: None)
    assert resume(data, stopped) == 0
    before = contents(stopped)
    with pytest.raises(runs.RunError, match=r"another run has written .*last\.pt.* since it was read"):
        run.train()
    assert contents(stopped) == before


def test_links_in_the_folder_are_replaced_and_what_they_point_to_stays(data, stopped, tmp_path):
    names = ("last.pt", "best.pt", "history.json", "history.csv", "training.png")
    (stopped / "training.png").write_text("no picture")
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in names:
        (stopped / name).rename(outside / name)
        (stopped / name).symlink_to(outside / name)
    before = contents(outside)
    assert resume(data, stopped, "--epochs", "3") == 0
    assert contents(outside) == before
    assert [name for name in names if name != "best.pt" and (stopped / name).is_symlink()] == []


def test_two_writers_of_one_checkpoint_share_no_temporary_file(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: names.append(file.name))
    for _ in range(2):
        save_checkpoint({}, tmp_path / "last.pt")
    assert names[0] != names[1]


def test_what_a_killed_process_left_half_written_is_removed(data, stopped):
    (stopped / ".tmp-0123456789ab-last.pt").write_bytes(b"half")
    (stopped / ".tmp-0123456789ab-training.png").write_bytes(b"half")
    (stopped / "notes.tmp").write_bytes(b"mine")
    assert resume(data, stopped) == 0
    assert [path.name for path in stopped.iterdir() if path.name.startswith(".")] == []
    assert (stopped / "notes.tmp").exists()


# ---- damage ----


def changed(change):
    """Spoils last.pt: ``change`` gets what it holds."""

    def spoil(folder: Path):
        saved = torch.load(folder / "last.pt", weights_only=True)
        change(saved)
        torch.save(saved, folder / "last.pt")

    return spoil


def cut(length: int):
    return lambda folder: os.truncate(folder / "last.pt", length % (1 + os.stat(folder / "last.pt").st_size))


def flip(name: str):
    """One bit in the numbers of the last tensor."""

    def spoil(folder: Path):
        content = bytearray((folder / name).read_bytes())
        value = torch.load(folder / name, weights_only=True)["state_dict"]["head.weight"].numpy().tobytes()
        content[content.index(value) + 5] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def replaced(make):
    def spoil(folder: Path):
        (folder / "last.pt").unlink()
        make(folder / "last.pt")

    return spoil


def nan(value: torch.Tensor):
    value.view(-1)[-1] = float("nan")


def wider(saved):
    for moments in saved["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(*moments["exp_avg"].shape[:-1], moments["exp_avg"].shape[-1] + 1)


SPOILT = {
    "empty": (cut(0), "'last.pt'"),
    "one byte": (cut(1), "'last.pt'"),
    "cut short": (cut(3000), "3,000 bytes"),
    "without its last byte": (cut(-2), "'last.pt'"),
    "one bit": (flip("last.pt"), "Bad CRC-32"),
    "text": (replaced(lambda path: path.write_text("notes")), "'last.pt'"),
    "a directory": (replaced(Path.mkdir), "is a directory"),
    "a pipe": (replaced(os.mkfifo), "last.pt"),
    "a link to nothing": (replaced(lambda path: path.symlink_to("gone")), "last.pt"),
    "gone": (replaced(lambda path: None), "not its last.pt"),
    "the best": (replaced(lambda path: shutil.copy(path.with_name("best.pt"), path)), "not written by this version's"),
    "a list": (replaced(lambda path: torch.save([1], path)), "'last.pt'"),
    "another version": (changed(lambda saved: saved.update(format=99)), "not written by this version's"),
    "without seals": (changed(lambda saved: saved.pop("seals")), "not written by this version's"),
    "no moments": (changed(lambda saved: saved["optimizer"]["state"].clear()), "changed since it was saved, in 'optimizer'"),
    "a moment less": (changed(lambda saved: saved["optimizer"]["state"][3].pop("exp_avg")), "'optimizer'"),
    "other moments": (changed(wider), "'optimizer'"),
    "another rate": (changed(lambda saved: saved["optimizer"]["param_groups"][0].update(initial_lr=9.0)), "'optimizer'"),
    "another setting": (changed(lambda saved: saved["config"].update(lr=0.5)), "'config'"),
    "a setting less": (changed(lambda saved: saved["config"].pop("sched")), "'config'"),
    "half a history": (changed(lambda saved: saved["history"].clear()), "'history'"),
    "a wrong row": (changed(lambda saved: saved["history"][0].update(seconds="long")), "'history'"),
    "another epoch": (changed(lambda saved: saved.update(epoch=-1)), "'epoch'"),
    "a step of text": (changed(lambda saved: saved.update(step="one")), "'step'"),
    "half a random state": (changed(lambda saved: saved["random"].pop("numpy")), "'random'"),
    "more entries": (changed(lambda saved: saved.update(more=1)), "'more'"),
    "other weights": (changed(lambda saved: saved["state_dict"].update({"head.weight": torch.zeros(3, 3)})), "'state_dict'"),
    "NaN weights": (changed(lambda saved: nan(saved["state_dict"]["head.weight"])), "state_dict.head.weight"),
    "NaN moments": (changed(lambda saved: nan(saved["optimizer"]["state"][3]["exp_avg"])), "optimizer.state.3.exp_avg"),
}


@pytest.mark.parametrize(("spoil", "named"), SPOILT.values(), ids=SPOILT)
def test_a_last_checkpoint_that_is_damaged_is_refused_in_one_line_with_the_way_on(data, stopped, capsys, spoil, named):
    spoil(stopped)
    before = contents(stopped) if (stopped / "last.pt").is_file() else {}
    capsys.readouterr()
    assert resume(data, stopped) == 2
    said = one_line(capsys, named if "'last.pt'" not in named else str(stopped / "last.pt"))
    assert "--out" in said
    assert before in ({}, contents(stopped))


def test_every_entry_of_a_last_checkpoint_is_missed_and_none_may_be_of_another_type(stopped):
    saved = torch.load(stopped / "last.pt", weights_only=True)
    for name in saved:
        rest = {key: value for key, value in saved.items() if key != name}
        for spoilt in (rest, {**rest, name: "text"}):
            torch.save(spoilt, stopped / "last.pt")
            with pytest.raises(ValueError, match=r"cannot be continued; --initial .* --out NEW") as error:
                runs.Folder(stopped, print).read_last()
            assert name in ("format", "seals") or repr(name) in str(error.value)


BROKEN = {
    "gone": lambda path: path.unlink(),
    "cut short": lambda path: os.truncate(path, 3000),
    "one bit": lambda path: flip("best.pt")(path.parent),
    "of another run": lambda path: torch.save({**torch.load(path), "accuracy": 0.123}, path),
    "without its epoch": lambda path: torch.save({k: v for k, v in torch.load(path).items() if k != "epoch"}, path),
}


@pytest.fixture(scope="module")
def _first(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    assert main(arguments(data, out, "--epochs", 1)) == 0
    return out


@pytest.fixture
def first(_first, tmp_path) -> Path:
    """A copy of a finished run of one epoch."""
    return Path(shutil.copytree(_first, tmp_path / "run"))


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_best_checkpoint_that_is_damaged_is_made_again_from_the_last_of_the_same_epoch(data, first, capsys, spoil):
    before = torch.load(first / "best.pt", weights_only=True)
    spoil(first / "best.pt")
    assert resume(data, first) == 0
    assert "It is made again" in capsys.readouterr().out
    after = torch.load(first / "best.pt", weights_only=True)
    assert runs.structure(after) == runs.structure(before)
    assert all(torch.equal(value, before["state_dict"][name]) for name, value in after["state_dict"].items())


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_best_checkpoint_that_is_damaged_and_cannot_be_made_again_is_told_and_the_next_epoch_replaces_it(
    data, stopped, capsys, spoil
):
    spoil(stopped / "best.pt")
    assert resume(data, stopped) == 0
    assert "The weights of epoch 1 are lost" in capsys.readouterr().out
    assert read_checkpoint(stopped / "best.pt")["epoch"] == 2


@pytest.mark.parametrize("name", ["history.json", "history.csv"])
def test_a_damaged_history_is_written_anew(data, first, name):
    before = contents(first)
    (first / name).write_bytes(b"\xff{")
    assert resume(data, first) == 0
    assert contents(first)[name] == before[name]


@pytest.mark.parametrize("extra", [[], ["--resume"]])
def test_a_run_does_not_begin_where_the_best_weights_of_another_lie(data, first, capsys, extra):
    (first / "last.pt").unlink()
    before = contents(first)
    assert main(arguments(data, first, *extra)) == 2
    one_line(capsys, "best.pt", f"--initial {str(first / 'best.pt')!r}", "choose another --out")
    assert contents(first) == before


@pytest.mark.parametrize("name", ["best.pt", "history.json", "history.csv", "training.png", ".lock"])
def test_what_is_in_the_way_is_named_before_the_first_epoch(data, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert main(arguments(data, tmp_path)) == 2
    one_line(capsys, str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ---- the folder is tried before the first epoch ----


def no_steps(monkeypatch):
    at_step(monkeypatch, 1, lambda: pytest.fail("an epoch was begun"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_to_is_refused_before_the_first_epoch(data, tmp_path, capsys, monkeypatch, number):
    no_steps(monkeypatch)
    real = os.open

    def refuse(path, flags, *mode, **where):
        if str(path).endswith(".lock"):
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *mode, **where)

    monkeypatch.setattr(os, "open", refuse)
    assert main(arguments(data, tmp_path / "run")) == 2
    assert "oom on the disk" not in one_line(capsys, str(tmp_path / "run"), os.strerror(number), "choose another --out")


def test_an_out_that_is_a_file_is_refused_before_the_first_epoch(data, tmp_path, capsys, monkeypatch):
    no_steps(monkeypatch)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(arguments(data, out)) == 2
        one_line(capsys, str(out))
    assert (tmp_path / "file").read_text() == "mine"


def test_too_little_room_for_two_checkpoints_is_told_before_the_first_epoch(data, tmp_path, capsys, monkeypatch):
    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr(runs.Folder, "check_room", lambda folder, *needed: sizes.append(needed))
        assert main(arguments(data, tmp_path / "whole", "--ema", "0.9")) == 0
    for name, size in zip(("last.pt", "best.pt"), sizes[0], strict=True):
        assert 0.5 < size / (tmp_path / "whole" / name).stat().st_size <= 1
    no_steps(monkeypatch)
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=10**9, free=2 * sizes[0][0]))
    assert main(arguments(data, tmp_path / "run", "--ema", "0.9")) == 2
    one_line(capsys, str(tmp_path / "run"), "make room on the disk, or choose another --out")


def test_a_save_without_permission_is_not_told_to_make_room(data, stopped, capsys, monkeypatch):
    before = contents(stopped)

    def save(checkpoint, file):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "save", save)
    assert resume(data, stopped) == 2
    assert "ake room" not in one_line(capsys, "Permission denied", "change the permissions", str(stopped / "last.pt"))
    assert contents(stopped) == before


# ---- a run is extended ----


def test_a_finished_run_goes_on_with_more_epochs_another_batch_and_precision_and_its_history_says_so(data, first, capsys):
    more = ["--epochs", 3, "--batch-size", 2, "--accumulate", 3, "--amp", "bfloat16"]
    assert resume(data, first, *more) == 0
    said = capsys.readouterr().out
    history = json.loads((first / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3]
    told = ["epochs=3 (was 1)", "batch_size=2 (was 4)", "accumulate=3 (was 1)", "amp='bfloat16' (was 'off')"]
    assert [text for text in told if text not in history[1]["changed"] or f"continuing with {text}" not in said] == []
    assert "changed" not in history[0]
    assert "changed" not in history[2]
    with open(first / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["changed"] for row in rows] == ["", history[1]["changed"], ""]
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in history]
    settings = read_checkpoint(first / "last.pt")["config"]
    assert (settings["epochs"], settings["batch_size"], settings["lr"]) == (3, 2, 0.001)


def test_another_batch_size_in_the_middle_of_an_epoch_goes_on_at_the_same_image(data, stopped, capsys):
    assert resume(data, stopped, "--batch-size", 2) == 0
    assert "continuing at epoch 2, step 3" in capsys.readouterr().out
    history = json.loads((stopped / "history.json").read_text())
    assert history[1]["train_loss"] == pytest.approx(history[0]["train_loss"], rel=0.2)


def test_a_setting_that_a_run_cannot_change_is_refused_with_the_way_to_have_it(data, stopped, capsys):
    before = contents(stopped)
    assert resume(data, stopped, "--epochs", 5, "--lr", 0.5) == 2
    one_line(capsys, "begun with lr=0.001 (now 0.5)", f"--initial {str(stopped / 'last.pt')!r} --out NEW", "may change epochs")
    assert resume(data, stopped, "--epochs", 1) == 2
    one_line(capsys, "epochs=1 is less than the 2")
    assert contents(stopped) == before


# ---- a run is watched ----


def test_the_history_is_there_after_every_epoch_and_the_best_epoch_is_named(data, tmp_path, capsys, monkeypatch):
    seen = []
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: seen.extend((tmp_path / f"history.{kind}").read_text() for kind in ("json", "csv")))
        assert main(arguments(data, tmp_path)) == 0
    assert [row["epoch"] for row in json.loads(seen[0])] == [1]
    assert seen[1].splitlines()[0] == "epoch,train_loss,val_loss,val_accuracy,lr,seconds,images_per_second,memory_mib,changed"
    history, best = json.loads((tmp_path / "history.json").read_text()), read_checkpoint(tmp_path / "best.pt")
    top = max(row["val_accuracy"] for row in history)
    assert best["accuracy"] == top
    assert best["epoch"] == next(row["epoch"] for row in history if row["val_accuracy"] == top)
    said = capsys.readouterr().out
    assert f"best epoch: {best['epoch']}, {top:.2%}; checkpoint: {tmp_path / 'best.pt'}" in said
    assert " left)" in said.splitlines()[[line.startswith("epoch   1/2") for line in said.splitlines()].index(True)]


def test_the_picture_is_drawn_while_a_run_goes_on_and_its_failure_costs_nothing(data, tmp_path, capsys, monkeypatch):
    drawn = []
    clock = iter(range(0, 10**6, 100))
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "perf_counter", lambda: next(clock))
        patch.setattr(train.Run, "_draw", lambda run: drawn.append(run.epoch) or "picture: somewhere")
        assert main(arguments(data, tmp_path / "slow")) == 0
    assert drawn[0] == 1
    monkeypatch.setattr("tnt_fast.visualize.training_curve", lambda *args: 1 / 0)
    assert main(arguments(data, tmp_path / "run")) == 0
    assert "no picture: division by zero" in capsys.readouterr().out


def test_tensorboard_gets_every_epoch_or_is_refused_with_what_to_install(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(arguments(data, tmp_path / "run", "--tensorboard")) == 2
    one_line(capsys, "--tensorboard", "pip install tensorboard")
    assert not (tmp_path / "run").exists()
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert main(arguments(data, tmp_path / "run", "--tensorboard")) == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    names = ("train_loss", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second")
    assert written[0] == (str(tmp_path / "run" / "tensorboard"), 1)
    assert [x for x in written[1:] if x[0] != "memory_mib"] == [
        (name, row[name], row["epoch"]) for row in history for name in names
    ]
    assert ("memory_mib", *history[0]["memory_mib"], 1) in written


# ---- the loop ----


def test_accumulated_batches_make_the_step_of_a_batch_as_large(data, tmp_path):
    common = [*PLAIN, "--opt", "sgd", "--lr", 0.01]
    assert main(arguments(data, tmp_path / "whole", *common)) == 0
    assert main(arguments(data, tmp_path / "parts", *common, "--batch-size", 2, "--accumulate", 2)) == 0
    whole, parts = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    assert parts["history"][1]["train_loss"] == pytest.approx(whole["history"][1]["train_loss"], rel=1e-5)
    assert parts["history"][1]["lr"] == whole["history"][1]["lr"]


def test_a_run_of_accumulated_batches_that_is_stopped_ends_the_same(data, tmp_path, monkeypatch):
    often = ["--batch-size", 2, "--accumulate", 2, "--drop-path", "0.5"]
    assert main(arguments(data, tmp_path / "whole", *often)) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))  # in the first half of a step
        assert main(arguments(data, tmp_path / "run", *often)) == 143
    assert resume(data, tmp_path / "run") == 0
    whole, run = (read_checkpoint(tmp_path / name / "last.pt")["state_dict"] for name in ("whole", "run"))
    assert all(torch.equal(value, run[name]) for name, value in whole.items())


def test_a_run_without_progress_stops_early_stays_so_and_goes_on_if_it_is_told_to(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path, "--epochs", 9, "--patience", 2, "--lr", 1e-9)) == 0
    assert "stopped early: 2 epochs without a better held-out accuracy" in capsys.readouterr().out
    assert [row["epoch"] for row in json.loads((tmp_path / "history.json").read_text())] == [1, 2, 3]
    assert resume(data, tmp_path) == 0
    assert "already trained" in capsys.readouterr().out
    assert resume(data, tmp_path, "--patience", 3) == 0
    assert [row["epoch"] for row in json.loads((tmp_path / "history.json").read_text())] == [1, 2, 3, 4]


def test_a_compiled_run_saves_the_names_of_a_plain_one(data, tmp_path, monkeypatch):
    compiled, compile_ = [], torch.nn.Module.compile

    def eagerly(module, mode):  # traced as ever, and run without a compiler, which takes a minute
        compiled.append(module)
        compile_(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    assert main(arguments(data, tmp_path / "compiled", *PLAIN, "--epochs", 1, "--compile")) == 0
    assert main(arguments(data, tmp_path / "plain", *PLAIN, "--epochs", 1)) == 0
    assert len(compiled) == 1
    first, second = (read_checkpoint(tmp_path / name / "best.pt")["state_dict"] for name in ("compiled", "plain"))
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name])
