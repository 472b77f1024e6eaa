"""Training: a run that is stopped anywhere ends as one that is not; bad input is refused before anything is written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import torch
from helpers import write_images
from PIL import Image
from timm.loss import SoftTargetCrossEntropy

from tnt_fast import data as images_of
from tnt_fast import kernels, recipe, runs, train, variants
from tnt_fast.checkpoints import read_checkpoint
from tnt_fast.cli import main

ROOT = Path(__file__).resolve().parents[1]
TINY = ["img_size=32", "embed_dim=24", "inner_dim=12", "depth=1", "num_heads_outer=2", "num_heads_inner=2"]
MODEL = ["--model", "tnt_ti_patch16_224", "--model-kwargs", *TINY]
QUICK = ["--epochs", "2", "--batch-size", "4", "--threads", "1", "--device", "cpu", "--workers", "0", "--warmup-epochs", "1"]
# every source of randomness there is
RANDOM = ["--drop-path", "0.5", "--mixup", "0.8", "--reprob", "0.5", "--ema", "0.9", "--lr", "0.01", "--hflip", "0.5"]
DEEP = ["--model", "tnt_ti_patch16_224", "--model-kwargs", *TINY[:3], "depth=2", *TINY[4:]]  # drop-path spares the first block


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """12 images to train on, 4 held out, 2 classes; not changed by any test."""
    return write_images(tmp_path_factory.mktemp("images") / "data")


def arguments(data, out, *more, model=MODEL) -> list[str]:
    return ["train", str(data), "--out", str(out), *model, *QUICK, *map(str, more)]


def flat(value, name="") -> dict:
    """A checkpoint as {path: leaf}."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}/{i}").items()}
    return {name: value}


def differing(first: Path, second: Path) -> list[str]:
    """What differs, bit for bit, between two checkpoints; times and where data are loaded are left aside."""
    a, b = flat(read_checkpoint(first)), flat(read_checkpoint(second))
    aside = ("/seconds", "/images_per_second", "/memory_mib/0", "config/workers", "/seals/history", "/seals/config")
    names = [name for name in sorted(a.keys() | b.keys()) if not name.endswith(aside)]
    assert any(name.startswith("/state_dict/") for name in names)

    def same(x, y):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()
        return type(x) is type(y) and x == y

    return [name for name in names if name not in a or name not in b or not same(a[name], b[name])]


class AtStep:
    """Wraps a criterion's forward: at the nth call from now on, ``act`` is called first."""

    def __init__(self, monkeypatch, n: int, act, criterion=SoftTargetCrossEntropy):
        self.calls, forward = 0, criterion.forward

        def wrapped(module, x, target):
            self.calls += 1
            if self.calls == n:
                changed = act()
                if changed is not None:
                    return forward(module, x, target) * changed
            return forward(module, x, target)

        monkeypatch.setattr(criterion, "forward", wrapped)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The checkpoint of a run of 2 epochs of 3 steps, with all randomness, that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(data, out, *RANDOM, model=DEEP)) == 0
    return out / "last.pt"


def test_the_mode_of_compiling_is_handed_on(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **how: asked.append(how))
    assert main(arguments(data, tmp_path, "--epochs", 1, "--compile", "--compile-mode", "reduce-overhead")) == 0
    assert asked == [{"mode": "reduce-overhead"}]
    with pytest.raises(ValueError, match="compile_mode='reduce-overhead' is torch.compile's: set compile, too"):
        recipe.Config("digits", compile_mode="reduce-overhead").check()


# ---- interrupted and continued ----


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_a_signal_saves_says_how_to_continue_and_ends_the_same(
    data, whole, tmp_path, capfd, monkeypatch, step, signum
):
    with monkeypatch.context() as patch:
        AtStep(patch, step, lambda: os.kill(os.getpid(), signum))
        assert main(arguments(data, tmp_path / "run", *RANDOM, model=DEEP)) == 128 + signum
    said = capfd.readouterr().err
    assert "stopping after this step" in said
    assert "--resume" in said
    assert str(tmp_path / "run" / "last.pt") in said
    saved = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (saved["epoch"], saved["step"]) == ((step - 1) // 3, (step - 1) % 3 + 1)
    assert differing(whole, tmp_path / "run" / "last.pt") != []
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)

    assert main(arguments(data, tmp_path / "run", *RANDOM, "--resume", model=DEEP)) == 0
    assert f"continuing at epoch {saved['epoch'] + 1}, step {saved['step'] + 1}" in capfd.readouterr().out
    assert differing(whole, tmp_path / "run" / "last.pt") == []


def test_a_run_stopped_after_every_step_ends_the_same(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    codes = []
    for _ in range(6):
        with monkeypatch.context() as patch:
            AtStep(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            codes.append(main(arguments(data, out, *RANDOM, "--resume", model=DEEP)))
    assert codes == [143] * 6
    assert main(arguments(data, out, *RANDOM, "--resume", model=DEEP)) == 0
    assert differing(whole, out / "last.pt") == []


def test_worker_processes_change_nothing_in_a_stopped_and_continued_run(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        AtStep(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(arguments(data, tmp_path, *RANDOM, "--workers", "2", model=DEEP)) == 130
    assert main(arguments(data, tmp_path, *RANDOM, "--workers", "1", "--resume", model=DEEP)) == 0
    assert differing(whole, tmp_path / "last.pt") == []


def in_a_process(step: int, signum: int, argv: list[str]) -> subprocess.CompletedProcess:
    """``main(argv)`` in a process of its own that gets a signal at a step."""
    code = (
        "import os, sys\n"
        "from timm.loss import SoftTargetCrossEntropy\nfrom tnt_fast import cli\n"
        "forward, calls = SoftTargetCrossEntropy.forward, []\n"
        "def wrapped(module, x, target):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {step}:\n"
        f"        os.kill(os.getpid(), {int(signum)})\n"
        "    return forward(module, x, target)\n"
        "SoftTargetCrossEntropy.forward = wrapped\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_run_killed_in_the_middle_of_an_epoch_continues_from_the_last_one_and_ends_the_same(data, whole, tmp_path, capsys):
    killed = in_a_process(5, signal.SIGKILL, arguments(data, tmp_path, *RANDOM, model=DEEP))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = read_checkpoint(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"], len(saved["history"])) == (1, 0, 1)
    assert main(arguments(data, tmp_path, *RANDOM, "--resume", model=DEEP)) == 0
    assert "continuing at epoch 2, step 1" in capsys.readouterr().out
    assert differing(whole, tmp_path / "last.pt") == []


def test_a_process_that_gets_sigterm_exits_143_without_a_traceback(data, whole, tmp_path):
    stopped = in_a_process(2, signal.SIGTERM, arguments(data, tmp_path, *RANDOM, model=DEEP))
    assert stopped.returncode == 143, stopped.stderr
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert main(arguments(data, tmp_path, *RANDOM, "--resume", model=DEEP)) == 0
    assert differing(whole, tmp_path / "last.pt") == []


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    AtStep(monkeypatch, 5, twice)
    assert main(arguments(data, tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt", "recipe.yaml", "history.json", "history.csv"}


def test_a_run_killed_between_its_two_files_still_gets_its_best(data, whole, tmp_path, monkeypatch):
    real = runs.save_checkpoint

    def first_only(checkpoint, path):
        real(checkpoint, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", first_only)
        assert main(arguments(data, tmp_path, *RANDOM, model=DEEP)) == 130
    assert main(arguments(data, tmp_path, *RANDOM, "--resume", model=DEEP)) == 0
    assert differing(whole, tmp_path / "last.pt") == []
    assert differing(whole.with_name("best.pt"), tmp_path / "best.pt") == []


# ---- seeds, precision ----


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["state_dict"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(data, whole, tmp_path):
    assert main(arguments(data, tmp_path / "again", *RANDOM, model=DEEP)) == 0
    assert main(arguments(data, tmp_path / "other", *RANDOM, "--seed", "1", model=DEEP)) == 0
    assert differing(whole, tmp_path / "again" / "last.pt") == []
    one, other = weights(whole), weights(tmp_path / "other" / "last.pt")
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert not torch.equal(one["cls_token"], other["cls_token"])


def test_the_augmentation_of_an_image_follows_from_seed_epoch_and_image_alone(data):
    def images(seed, epoch):
        config = recipe.Config(str(data), seed=seed)
        mean_std = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "input_size": (3, 32, 32), "crop_pct": 1}
        dataset = images_of.DataSet(config, data).images(mean_std)[0]
        dataset.epoch = epoch
        return dataset

    state = torch.get_rng_state()
    forwards = [images(0, 1)[i][0] for i in range(6)]
    dataset = images(0, 1)
    backwards = [dataset[i][0] for i in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(images(0, 2)[i][0], forwards[i]) for i in range(6))
    assert not any(torch.equal(images(1, 1)[i][0], forwards[i]) for i in range(6))


def test_bfloat16_trains_and_its_checkpoint_continues_to_the_same_end(data, tmp_path, monkeypatch):
    amp = [*RANDOM, "--amp", "bfloat16"]
    assert main(arguments(data, tmp_path / "whole", *amp, model=DEEP)) == 0
    history = json.loads((tmp_path / "whole" / "history.json").read_text())
    assert all(np.isfinite(row["train_loss"]) and np.isfinite(row["val_loss"]) for row in history)
    trained = weights(tmp_path / "whole" / "last.pt")
    assert all(value.dtype == torch.float32 for value in trained.values())
    torch.manual_seed(0)
    fresh = variants.create_tnt("tnt_ti_patch16_224", **train_kwargs(depth=2), num_classes=2, drop_path_rate=0.5).state_dict()
    assert not any(torch.equal(trained[name], fresh[name]) for name in trained if name.endswith("weight"))
    with monkeypatch.context() as patch:
        AtStep(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments(data, tmp_path / "run", *amp, model=DEEP)) == 143
    assert main(arguments(data, tmp_path / "run", *amp, "--resume", model=DEEP)) == 0
    assert differing(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt") == []


def test_bfloat16_and_float16_differ_from_float32(data, tmp_path):
    losses = {}
    for amp in ("off", "bfloat16", "float16"):
        assert main(arguments(data, tmp_path / amp, "--amp", amp, "--epochs", "1")) == 0
        losses[amp] = json.loads((tmp_path / amp / "history.json").read_text())[0]["train_loss"]
    assert len(set(losses.values())) == 3
    assert losses["bfloat16"] == pytest.approx(losses["off"], abs=0.05)
    assert losses["float16"] == pytest.approx(losses["off"], abs=0.05)
    assert read_checkpoint(tmp_path / "float16" / "last.pt")["scaler"]["scale"] > 1
    assert read_checkpoint(tmp_path / "off" / "last.pt")["scaler"] == {}


def test_the_averaged_weights_are_the_ones_evaluated(data, whole):
    saved = read_checkpoint(whole)
    ema, plain = saved["state_dict_ema"], saved["state_dict"]
    assert ema.keys() == plain.keys()
    assert not torch.equal(ema["head.weight"], plain["head.weight"])
    run = train.Run(recipe.Config(str(data), device="cpu", workers=0), whole.parent, resume=True, log=lambda _: None)
    loss, accuracy = run.evaluate()
    assert loss == saved["history"][-1]["val_loss"]
    assert accuracy == saved["history"][-1]["val_accuracy"]
    run.ema.module.load_state_dict(plain)
    assert run.evaluate()[0] != loss


def train_kwargs(**changed) -> dict:
    return {key: int(value) for key, value in (item.split("=") for item in TINY)} | changed


# ---- saves that fail ----


@pytest.fixture
def begun(data, tmp_path, monkeypatch) -> Path:
    """The directory of a run that stopped in its second epoch."""
    with monkeypatch.context() as patch:
        AtStep(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments(data, tmp_path / "run")) == 143
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fail_in_save(monkeypatch, error):
    def save(checkpoint, file):
        file.write(b"x" * 1000)
        raise error

    monkeypatch.setattr(torch, "save", save)


def fail_in_fsync(monkeypatch, error):
    def fsync(handle):
        raise error

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("where", [fail_in_save, fail_in_fsync])
def test_a_full_disk_leaves_the_old_files_and_nothing_else(data, begun, capsys, monkeypatch, where):
    before = contents(begun)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        where(patch, OSError(28, "No space left on device"))
        assert main(arguments(data, begun, "--resume")) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(begun) in said
    assert "--resume" in said
    assert contents(begun) == before
    assert main(arguments(data, begun, "--resume")) == 0


def test_a_limit_on_file_size_is_reported_as_a_failed_save(data, begun, capsys):
    """A real write that fails, in PyTorch's own writer."""
    before = contents(begun)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = main(arguments(data, begun, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert f"cannot save {str(begun / 'last.pt')!r}" in capsys.readouterr().err
    assert contents(begun) == before


def test_a_full_disk_at_the_first_save_leaves_no_file(data, tmp_path, capsys, monkeypatch):
    fail_in_save(monkeypatch, OSError(28, "No space left on device"))
    assert main(arguments(data, tmp_path / "run")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def test_an_interrupt_while_saving_leaves_the_old_files_and_nothing_else(data, begun, capsys, monkeypatch):
    before = contents(begun)
    fail_in_save(monkeypatch, KeyboardInterrupt())
    assert main(arguments(data, begun, "--resume")) == 130
    assert "interrupted" in capsys.readouterr().err
    assert contents(begun) == before


# ---- existing runs ----


def test_an_existing_run_is_refused_without_resume(data, begun, capsys):
    before = contents(begun)
    assert main(arguments(data, begun)) == 2
    said = capsys.readouterr().err
    assert str(begun / "last.pt") in said
    assert "--resume" in said
    assert "--out" in said
    assert contents(begun) == before


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--lr", "0.5", "lr=0.00025"), ("--opt", "sgd", "opt='adamw'"), ("--mixup", "0", "mixup=0.8"), ("--seed", "3", "seed=0")],
)
def test_resume_with_another_setting_is_refused(data, begun, capsys, option, value, named):
    before = contents(begun)
    assert main(arguments(data, begun, "--resume", option, value)) == 2
    said = capsys.readouterr().err
    assert f"begun with {named} (now " in said
    assert contents(begun) == before


def test_resume_takes_its_settings_from_the_run(data, begun):
    assert main(["train", str(data), "--out", str(begun), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    saved = read_checkpoint(begun / "last.pt")
    assert saved["epoch"] == 2
    assert saved["config"]["model_kwargs"] == train_kwargs()


def test_resume_of_a_finished_run_changes_nothing_and_says_so(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path)) == 0
    before = {name: value for name, value in contents(tmp_path).items() if name != "training.png"}
    capsys.readouterr()
    assert main(arguments(data, tmp_path, "--resume")) == 0
    said = capsys.readouterr().out
    assert "already trained" in said
    assert "epoch   1" not in said
    assert {name: value for name, value in contents(tmp_path).items() if name != "training.png"} == before


def test_resume_in_an_empty_directory_starts(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path, "--resume", "--epochs", "1")) == 0
    said = capsys.readouterr().out
    assert "epoch   1/1" in said
    assert "continuing" not in said
    assert read_checkpoint(tmp_path / "last.pt")["epoch"] == 1


def test_resume_is_refused_when_the_classes_changed(tmp_path, capsys):
    data = write_images(tmp_path / "data")
    assert main(arguments(data, tmp_path / "run", "--epochs", "1")) == 0
    before = contents(tmp_path / "run")
    for part in ("train", "val"):
        (data / part / "dog").rename(data / part / "eel")
    assert main(arguments(data, tmp_path / "run", "--epochs", "1", "--resume")) == 2
    said = capsys.readouterr().err
    assert "only in the run 'dog', only in the data 'eel'" in said
    for part in ("train", "val"):
        shutil.copytree(data / part / "cat", data / part / "ant")
    assert main(arguments(data, tmp_path / "run", "--epochs", "1", "--resume")) == 2
    said = capsys.readouterr().err
    assert "trained on 2 classes" in said
    assert "the data has 3" in said
    assert contents(tmp_path / "run") == before


def test_resume_is_refused_when_the_number_of_images_changed(tmp_path, capsys):
    data = write_images(tmp_path / "data")
    assert main(arguments(data, tmp_path / "run", "--epochs", "1")) == 0
    before = contents(tmp_path / "run")
    shutil.copy(data / "train" / "cat" / "0.png", data / "train" / "cat" / "more.png")
    assert main(arguments(data, tmp_path / "run", "--epochs", "1", "--resume")) == 2
    assert "train 'cat' had 6 images, now 7; restore them" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_foreign_last_checkpoint_is_not_continued(data, tmp_path, capsys):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "last.pt")
    before = contents(tmp_path)
    assert main(arguments(data, tmp_path, "--resume")) == 2
    assert "cannot be continued" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_truncated_last_checkpoint_is_refused_and_kept(data, begun, capsys):
    path = begun / "last.pt"
    path.write_bytes(path.read_bytes()[:3000])
    before = contents(begun)
    assert main(arguments(data, begun, "--resume")) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert "3,000 bytes" in said
    assert contents(begun) == before


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--batch-size", "50"], ["batch_size=50", "12 training images", "lower it"]),
        (["--model", "resnet18"], ["'resnet18'", "accepted: ", "tnt_fast_s_patch16_224"]),
        (["--model", "tnt_s_patch16_224.nosuch"], ["tnt_fast_s_patch16_224.nosuch", "tnt_fast_s_patch16_224.in1k"]),
        (["--backend", "fused"], ["backend='fused' cannot run: - ", "the image is on device 'cpu'", "'reference'"]),
        (["--initial", "nosuch.pt"], ["nosuch.pt"]),
        (["--model-kwargs", "depth"], ["--model-kwargs 'depth'", "KEY=VALUE"]),
        (["--model-kwargs", "=3"], ["--model-kwargs '=3'", "KEY=VALUE"]),
        (["--model-kwargs", "nosuch=3"], ["nosuch"]),
        (["--model-kwargs", "num_classes=7"], ["num_classes=7", "2 classes", "leave it out"]),
        (["--model-kwargs", "num_heads_outer=5"], ["num_heads_outer=5", "embed_dim=192", "accepted: 1, 2, 3"]),
        (["--model-kwargs", "inner_dim=12", "num_heads_inner=5"], ["num_heads_inner=5", "inner_dim=12", "1, 2, 3, 4, 6, 12"]),
        (["--model-kwargs", "first_stride=3"], ["first_stride=3", "patch height 16", "accepted: 1, 2, 4, 8, 16"]),
        (["--model-kwargs", "img_size=30"], ["img_size 30", "16, 32"]),
    ],
    ids=lambda value: "_".join(value) if value and value[0].startswith("--") else "",
)
def test_a_bad_setting_is_refused_before_anything_is_written(data, tmp_path, capsys, monkeypatch, options, named):
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    assert main(arguments(data, tmp_path / "run", *options)) == 2
    said = capsys.readouterr().err
    assert said.startswith("tnt-fast: ")
    assert [text for text in named if text not in said] == []
    assert list(tmp_path.iterdir()) == []


def no_data(root):
    return [f"no directory {str(root)!r}", f"{root}/train/CLASS", f"{root}/val/CLASS"]


def no_val(root):
    write_images(root)
    shutil.rmtree(root / "val")
    return [f"no directory {str(root / 'val')!r}", f"{root}/val/CLASS", f"{str(root / 'train')!r} with --val-fraction"]


def other_classes(root):
    write_images(root)
    (root / "val" / "dog").rename(root / "val" / "eel")
    return ["train/ has 2 classes, val/ has 2", "only in train: ['dog']", "only in val: ['eel']"]


def fewer_classes(root):
    write_images(root)
    shutil.rmtree(root / "val" / "dog")
    return ["train/ has 2 classes, val/ has 1", "only in train: ['dog']", "only in val: []"]


def an_empty_class(root):
    write_images(root)
    (root / "train" / "eel").mkdir()
    (root / "val" / "eel").mkdir()
    return [str(root / "train"), "classes eel", ".png"]


def no_classes(root):
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    return [str(root / "train"), "class folder"]


def no_images(root):
    for part in ("train", "val"):
        (root / part / "cat").mkdir(parents=True)
        (root / part / "cat" / "notes.txt").write_text("no image")
    return [str(root / "train"), "classes cat", ".png"]


@pytest.mark.parametrize(
    "make", [no_data, no_val, other_classes, fewer_classes, an_empty_class, no_classes, no_images], ids=lambda f: f.__name__
)
def test_data_that_cannot_be_trained_on_are_refused_before_anything_is_written(tmp_path, capsys, make):
    named = make(tmp_path / "data")
    assert main(arguments(tmp_path / "data", tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert said.startswith("tnt-fast: DataError: ")
    assert [text for text in named if text not in said] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_breaks_during_a_run_is_named_and_nothing_is_saved(tmp_path, part, workers):
    data = write_images(tmp_path / "data")
    kwargs = {"epochs": 1, "batch_size": 4, "threads": 1, "device": "cpu", "workers": workers}
    config = recipe.Config(str(data), model="tnt_ti_patch16_224", model_kwargs=train_kwargs(), **kwargs)
    run = train.Run(config, tmp_path / "run", log=lambda _: None)
    bad = data / part / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(images_of.DataError) as raised:
        run.train()
    assert str(raised.value).startswith(f"cannot read the image {str(bad)!r}: ")
    assert contents(tmp_path / "run") == {}


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stays_the_last_good_one(
    data, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        AtStep(patch, 5, lambda: float("nan"))
        assert main(arguments(data, tmp_path)) == 2
    said = capsys.readouterr().err
    assert "FloatingPointError: the loss is nan in epoch 2, step 2, at a learning rate of " in said
    assert "; lower the learning rate (--lr), clip gradients (--clip-grad 1)" in said
    assert f"{str(tmp_path / 'last.pt')!r} holds the last good state: --initial" in said
    saved = read_checkpoint(tmp_path / "last.pt")
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert main(arguments(data, tmp_path, "--resume")) == 0


def test_a_loss_that_is_not_finite_before_any_save_claims_no_checkpoint(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path, "--lr", "1e30")) == 2
    said = capsys.readouterr().err
    assert "the loss is nan in epoch 1" in said
    assert "nothing was saved yet" in said
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_last_step_of_an_epoch_ruined_are_not_saved(data, tmp_path, capsys):
    """One step an epoch: the loss before it is finite, the weights after it are not."""
    assert main(arguments(data, tmp_path, "--lr", "1e30", "--warmup-epochs", "0", "--batch-size", "12")) == 2
    said = capsys.readouterr().err
    assert "the held-out loss is nan in epoch 1, step 1, at a learning rate of 1.0e+30;" in said
    assert list(tmp_path.iterdir()) == []


# ---- what a run writes ----


def test_a_run_writes_its_picture_history_and_checkpoints(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "deep" / "run")) == 0
    out = tmp_path / "deep" / "run"
    names = ["best.pt", "history.csv", "history.json", "last.pt", "recipe.yaml", "training.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with Image.open(out / "training.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    history = json.loads((out / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2]
    names = ["epoch", "train_loss", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second", "memory_mib"]
    assert list(history[0]) == names
    assert history[0]["images_per_second"] > 12 / history[0]["seconds"]
    assert history[0]["memory_mib"][0] > 100  # what Python and PyTorch take
    saved, best = read_checkpoint(out / "last.pt"), read_checkpoint(out / "best.pt")
    assert saved["classes"] == best["classes"] == ["cat", "dog"]
    assert saved["history"] == history
    assert "optimizer" not in best
    said = capsys.readouterr().out
    assert "12 to train on, 4 held out" in said
    assert f"{history[-1]['val_accuracy']:.2%} of 4 images" in said
    assert "path: reference, because" in said


def test_training_learns_to_tell_dark_from_bright(data, tmp_path):
    plain = ["--mixup", "0", "--cutmix", "0", "--reprob", "0", "--auto-augment", "", "--color-jitter", "0", "--drop-path", "0"]
    assert main(arguments(data, tmp_path, *plain, "--epochs", "12", "--lr", "0.005")) == 0
    history = json.loads((tmp_path / "history.json").read_text())
    assert history[-1]["val_accuracy"] == 1.0
    assert history[-1]["val_loss"] < 0.5 * history[0]["val_loss"]
    best = max(row["val_accuracy"] for row in history)
    first = next(row for row in history if row["val_accuracy"] == best)
    assert first["epoch"] <= 12


def test_the_training_curve_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    from tnt_fast.visualize import training_curve

    history = [{"epoch": i, "train_loss": 1 / i, "val_loss": 2 / i, "val_accuracy": i / 4} for i in (1, 2, 3)]
    path = training_curve(history, tmp_path / "curve.png", "a title")
    assert path == tmp_path / "curve.png"
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG"


def test_write_digits_writes_a_stratified_split_once(tmp_path):
    images_of.write_digits(tmp_path)
    counts = {
        part: [len(list((tmp_path / part / str(digit)).glob("*.png"))) for digit in range(10)] for part in ("train", "val")
    }
    assert sum(counts["train"]) == 1437
    assert sum(counts["val"]) == 360
    for a, b in zip(counts["train"], counts["val"], strict=True):
        assert abs(b - (a + b) * 360 / 1797) < 1
    names = [path.name for path in tmp_path.rglob("*.png")]
    assert len(set(names)) == 1797  # no digit on both sides
    from sklearn.datasets import load_digits

    file = next((tmp_path / "val" / "7").iterdir())
    with Image.open(file) as image:
        pixels = np.asarray(image)
    assert np.array_equal(np.round(pixels / (255 / 16)), load_digits().images[int(file.stem)])
    assert load_digits().target[int(file.stem)] == 7

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = times()
    images_of.write_digits(tmp_path)
    assert times() == before


def test_write_digits_completes_a_folder_that_was_left_half_written(tmp_path):
    images_of.write_digits(tmp_path)
    (tmp_path / "complete").unlink()
    file = next((tmp_path / "train" / "3").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:10])
    images_of.write_digits(tmp_path)
    assert file.read_bytes() == content
    assert (tmp_path / "complete").exists()


# ---- starting from a checkpoint ----


def begin(data, out, initial) -> torch.nn.Module:
    config = recipe.Config(
        str(data),
        model="tnt_ti_patch16_224",
        model_kwargs=train_kwargs(),
        initial=str(initial),
        batch_size=4,
        device="cpu",
        workers=0,
        threads=1,
    )
    return train.Run(config, out, log=lambda _: None).model


@pytest.mark.parametrize("origin", ["train", "state_dict"])
def test_initial_weights_keep_their_head_when_the_classes_agree_in_number(data, tmp_path, origin):
    assert main(arguments(data, tmp_path / "first", "--epochs", "1")) == 0
    source = tmp_path / "first" / "last.pt"
    state = weights(source)
    if origin == "state_dict":
        source = tmp_path / "plain.pt"
        torch.save(state, source)
    model = begin(data, tmp_path / "second", source)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("origin", ["train", "state_dict"])
def test_initial_weights_lose_their_head_when_the_classes_differ_in_number(data, tmp_path, origin):
    assert main(arguments(data, tmp_path / "first", "--epochs", "1")) == 0
    source = tmp_path / "first" / "last.pt"
    state = weights(source)
    if origin == "state_dict":
        source = tmp_path / "plain.pt"
        torch.save(state, source)
    three = write_images(tmp_path / "three", ("a", "b", "c"), (2, 1))
    got = begin(three, tmp_path / "second", source).state_dict()
    assert got["head.weight"].shape == (3, 24)
    assert all(torch.equal(value, state[name]) for name, value in got.items() if not name.startswith("head."))


def test_initial_weights_that_do_not_fit_are_refused(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "first", "--epochs", "1")) == 0
    initial = tmp_path / "first" / "last.pt"
    capsys.readouterr()
    assert main(arguments(data, tmp_path / "second", "--initial", initial, model=DEEP)) == 2
    said = capsys.readouterr().err
    assert f"{str(initial)!r} does not fit this model" in said
    assert "blocks.1." in said
    assert not (tmp_path / "second").exists()


def test_a_run_continues_without_the_checkpoint_that_it_started_from(data, tmp_path, monkeypatch):
    assert main(arguments(data, tmp_path / "first", "--epochs", "1")) == 0
    initial = tmp_path / "initial.pt"
    shutil.copy(tmp_path / "first" / "last.pt", initial)
    assert main(arguments(data, tmp_path / "whole", "--initial", initial)) == 0
    with monkeypatch.context() as patch:
        AtStep(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments(data, tmp_path / "run", "--initial", initial)) == 143
    initial.unlink()
    assert main(arguments(data, tmp_path / "run", "--initial", initial, "--resume")) == 0
    assert differing(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt") == []
