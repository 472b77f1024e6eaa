"""Several ranks make the steps of one; they stop together, whatever ends one of them, and go on on another number of ranks."""

import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import torch
from helpers import write_images
from ranks import Ended, launch

from tnt_fast import cli, distributed, recipe, runs, train
from tnt_fast.checkpoints import CheckpointError, read_checkpoint
from tnt_fast.cli import main
from tnt_fast.data import Order
from tnt_fast.distributed import Ranks, Share

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["--model", "tnt_ti_patch16_224", "--model-kwargs", "img_size=32", "embed_dim=24", "inner_dim=12", "depth=2"]
MODEL += ["num_heads_outer=2", "num_heads_inner=2"]
CPU = ["--device", "cpu", "--workers", "0", "--threads", "1", "--backend", "reference"]
# every source of randomness, and all that looks at gradients or weights
RANDOM = ["--drop-path", "0.5", "--mixup", "0.8", "--reprob", "0.5", "--ema", "0.9", "--clip-grad", "0.5"]
# 12 steps: 4 epochs of 3
SETTINGS = [*MODEL, *CPU, *RANDOM, "--lr", "0.01", "--epochs", "4", "--warmup-epochs", "1", "--global-batch", "12"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 images to train on, 5 held out, in 5 classes; not changed by any test."""
    return write_images(tmp_path_factory.mktemp("images") / "data", tuple("abcde"), (8, 1))


def arguments(data: Path, out: Path, *more, batch: int = 2) -> list[str]:
    return ["train", str(data), "--out", str(out), *SETTINGS, "--batch-size", str(batch), *map(str, more)]


def resumed(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(data), "--out", str(out), *CPU[:4], "--resume", *more]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights and figures of two runs, up to rounding."""
    a, b = read_checkpoint(first / "last.pt"), read_checkpoint(second / "last.pt")
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
    for kind in ("state_dict", "state_dict_ema"):
        assert a[kind].keys() == b[kind].keys()
        for name, value in a[kind].items():
            torch.testing.assert_close(b[kind][name], value, rtol=0, atol=1e-5, msg=f"{kind} {name}")
    for one, other in zip(a["history"], b["history"], strict=True):
        for name in ("train_loss", "val_loss", "val_accuracy", "lr"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of one rank, whose step has 6 batches."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(data, out)) == 0
    return out


# ---- the same steps ----


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_ranks_make_the_steps_of_one_with_accumulation(data, whole, tmp_path, more):
    ended = launch(tmp_path, arguments(data, tmp_path / "run", *more))
    assert ended.codes == [0, 0], ended.err
    assert_same_run(whole, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["config"]["accumulate"] == 3
    assert ended.out[1] == ended.err[1] == ""
    assert "batches of 2, 3 a step" in ended.out[0]


def test_two_ranks_make_the_steps_of_one_without_accumulation_and_read_in_processes_of_their_own(data, tmp_path):
    assert main(arguments(data, tmp_path / "one", batch=6)) == 0
    assert launch(tmp_path, arguments(data, tmp_path / "two", "--workers", 1, batch=6)).codes == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ---- stopped, and continued on another number of ranks ----


@pytest.fixture(scope="module")
def stopped_by(data, tmp_path_factory):
    """A run of one rank, of two, or of two with FSDP, that a signal to one of them stopped in the second epoch."""

    @functools.cache
    def stop(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        more, size = (["--fsdp"] if kind == "fsdp" else []), (1 if kind == "one" else 2)
        losses = 12 // 2 // size  # a step
        acts = {size - 1: ["gets", int(signal.SIGTERM), 4 * losses + 1]}
        ended = launch(folder, arguments(data, folder / "run", *more), size, acts)
        assert ended.codes == [128 + signal.SIGTERM] * size, ended.err
        saved = read_checkpoint(folder / "run" / "last.pt")
        assert (saved["epoch"], saved["step"]) == (1, 2)
        assert ended.err[0].count("--resume") == 1
        assert [ended.err[rank] for rank in range(1, size)] == [""] * (size - 1)
        return folder / "run"

    return stop


@pytest.fixture
def stopped(stopped_by, tmp_path) -> Path:
    """A copy of that of two ranks."""
    return Path(shutil.copytree(stopped_by("ddp"), tmp_path / "run"))


@pytest.mark.parametrize(
    ("before", "size", "more"),
    [("one", 3, []), ("one", 3, ["--fsdp"]), ("ddp", 1, []), ("ddp", 3, []), ("fsdp", 1, []), ("fsdp", 3, ["--fsdp"])],
    ids=lambda value: "".join(value) if isinstance(value, list) else str(value),
)
def test_a_stopped_run_ends_the_same_on_another_number_of_ranks(data, whole, stopped_by, tmp_path, before, size, more):
    shutil.copytree(stopped_by(before), tmp_path / "run")
    ended = launch(tmp_path, resumed(data, tmp_path / "run", *more), size)
    assert ended.codes == [0] * size, ended.err
    assert "continuing at epoch 2, step 3" in ended.out[0]
    assert_same_run(whole, tmp_path / "run")
    folders = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert len(folders) == (size > 1)
    assert not (tmp_path / "run" / ".lock").exists()


# ---- one line, whatever happens to a rank ----


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_one_line(ended: Ended, *texts: str) -> None:
    """All ranks ended, and the first printed one error, with all texts in it."""
    assert ended.seconds < 30
    assert set(ended.codes) == {2}, ended.codes
    lines = [line for line in ended.err[0].splitlines() if line.startswith("tnt-fast: ")]
    assert len(lines) == 1, ended.err
    assert [text for text in texts if text not in lines[0]] == [], lines[0]
    assert "tnt-fast" not in "".join(ended.err[1:] + ended.out[1:])


def test_ranks_that_see_other_data_end_before_anything_is_written(data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    (other / "train" / "c" / "3.png").unlink()
    run = tmp_path / "run"
    ended = launch(tmp_path, arguments(data, run), others={1: arguments(other, run)})
    assert_one_line(ended, "RankError: rank 1 has train 'c'='7 images ", "rank 0 '8 images ")
    assert not run.exists()


def test_ranks_of_other_versions_or_settings_end_before_anything_is_written(data, tmp_path):
    run = tmp_path / "run"
    assert_one_line(
        launch(tmp_path, arguments(data, run), acts={1: ["has_another_torch"]}),
        f"RankError: rank 1 has torch='0.0.1', rank 0 '{torch.__version__.partition('+')[0]}",
    )
    ended = launch(tmp_path, arguments(data, run), others={1: arguments(data, run, "--lr", 0.02)})
    assert_one_line(ended, "RankError: rank 1 has lr=0.02, rank 0 0.01")
    assert not run.exists()


def test_an_error_of_all_ranks_is_printed_once(data, tmp_path):
    ended = launch(tmp_path, arguments(data, tmp_path / "run", batch=10))
    assert_one_line(ended, "global_batch=12 must be a multiple of 20 (batch_size=10 × 2 ranks); nearest: 20")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_printed_by_the_first_and_all_end(data, tmp_path, rank):
    ended = launch(tmp_path, arguments(data, tmp_path / "run", "--workers", 1), acts={rank: ["fails", 5]})
    assert_one_line(ended, f"tnt-fast: {'rank 1: ' if rank else ''}ValueError: of this rank alone")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_loss_of_one_rank_that_is_not_finite_ends_all(data, tmp_path):
    ended = launch(tmp_path, arguments(data, tmp_path / "run"), acts={1: ["diverges", 3 * 3 + 1]})
    assert_one_line(ended, "FloatingPointError: the loss is nan in epoch 2, step 1")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("act", "rank", "named"), [("has_a_full_disk", 1, "last-"), ("cannot_commit", 0, "last.pt")], ids=["rank 1", "rank 0"]
)
def test_a_full_disk_at_a_checkpoint_leaves_the_last_one(data, whole, tmp_path, act, rank, named):
    run = tmp_path / "run"
    ended = launch(tmp_path, arguments(data, run), acts={rank: [act, 3 * 3 + 1]})
    assert_one_line(ended, f"OSError: cannot save {str(run / named)!r}"[:-1], "oom on the disk, then --resume")
    saved = read_checkpoint(run / "last.pt")
    assert saved["epoch"] == 1
    assert [path.name for path in run.iterdir() if path.is_dir()] == [saved["shards"]["folder"]]
    assert main(resumed(data, run)) == 0
    assert_same_run(whole, run)


def test_a_second_run_into_a_folder_is_refused(data, stopped, tmp_path):
    folder = runs.Folder(stopped, print)
    folder.read_last()
    with folder.locked():
        before = contents(stopped)
        ended = launch(tmp_path, resumed(data, stopped))
        assert_one_line(ended, f"RunError: {str(stopped)!r} is in use by 'process {os.getpid()} on ")
        assert contents(stopped) == before


# ---- a rank is killed ----


def torchrun(folder: Path, acts: dict[str, list], argv: list[str], *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += [str(ROOT / "tests" / "ranks.py"), json.dumps(acts), *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def processes(text: str) -> list[str]:
    """The command lines of processes with a text in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text().replace("\0", " ")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


def test_a_killed_rank_ends_the_job_in_30_seconds_with_a_message_and_one_rank_goes_on(data, whole, tmp_path):
    run = tmp_path / "run"
    started = time.monotonic()
    ended = torchrun(tmp_path, {"0": ["gets", int(signal.SIGKILL), 4 * 3 + 1]}, arguments(data, run, "--workers", 1))
    assert ended.returncode == 1
    assert_gone(0, ended.stderr)
    assert time.monotonic() - started < 30 + 15  # the beginning included
    deadline = time.monotonic() + 10  # readers look after the process that forked them every 5 seconds
    while (left := processes(str(run))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    saved = read_checkpoint(run / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 0)
    assert main(resumed(data, run)) == 0
    assert_same_run(whole, run)


def assert_gone(rank: int, said: str) -> None:
    """One line names the rank that is gone, and how to go on."""
    lines = [line for line in said.splitlines() if line.startswith("tnt-fast: ")]
    assert len(lines) == 1, said
    assert f"RankError: rank {rank} (process " in lines[0]
    assert "--resume" in lines[0]


def test_a_killed_rank_is_named_under_any_launcher(data, tmp_path):
    ended = launch(tmp_path, arguments(data, tmp_path / "run"), acts={1: ["gets", int(signal.SIGKILL), 4 * 3 + 1]})
    assert ended.codes == [1, -signal.SIGKILL]
    assert ended.seconds < 30
    assert_gone(1, ended.err[0])


def test_torchrun_starts_the_ranks_again_and_they_go_on(data, whole, tmp_path):
    acts = {"1": ["is_killed_once", 4 * 3 + 1]}
    ended = torchrun(tmp_path, acts, arguments(data, tmp_path / "run"), "--max-restarts", "1")
    assert ended.returncode == 0, ended.stderr
    assert_gone(1, ended.stderr)
    assert "continuing at epoch 2, step 1" in ended.stdout
    assert_same_run(whole, tmp_path / "run")


# ---- what can be said without ranks ----


@pytest.mark.parametrize(
    ("options", "size", "named"),
    [
        (["--fsdp"], 1, "fsdp divides a model among ranks, and there is one; start with torchrun"),
        (["--fsdp", "--amp", "float16"], 2, "accepted with it: off, bfloat16"),
        (["--fsdp", "--compile"], 2, "compile and fsdp"),
        (["--global-batch", "13"], 1, "global_batch=13 must be a multiple of 2 (batch_size=2); nearest: 12, 14"),
        (["--global-batch", "4"], 3, "global_batch=4 must be a multiple of 6 (batch_size=2 × 3 ranks); nearest: 6"),
        (["--global-batch", "13", "--batch-size", "0"], 3, "must be a multiple of 6 (2 images × 3 ranks); nearest: 12, 18"),
        (["--accumulate", "5"], 2, "accumulate=5 does not fit global_batch=12, which makes it 3"),
        (["--device", "cpu:0"], 2, "device='cpu:0' is not here"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_the_ranks_are_refused_before_the_data_are_read(tmp_path, options, size, named):
    args = cli._parsed(arguments(tmp_path / "nosuch", tmp_path / "run", *options))
    config = recipe.resolved(cli._given(args))[0]
    with pytest.raises(ValueError, match=re.escape(named)):
        train.Run(config, tmp_path / "run", ranks=Ranks(0, size), log=print)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_does_not_know_divided_weights_is_refused(data, tmp_path):
    ended = launch(tmp_path, arguments(data, tmp_path / "run", "--fsdp", "--opt", "lamb"))
    assert_one_line(ended, "opt='lamb' does not know divided weights; accepted with fsdp: adamw")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({"global_batch": 1024}, 1, (256, 4, 1024)),
        ({"global_batch": 1024}, 8, (128, 1, 1024)),
        ({"global_batch": 1024, "batch_size": 32}, 8, (32, 4, 1024)),
        ({"global_batch": 30, "mixup": 0.0, "cutmix": 0.0}, 2, (15, 1, 30)),
        ({"batch_size": 32, "accumulate": 2}, 4, (32, 2, 256)),
        ({"batch_size": 32, "accumulate": 2}, 1, (32, 2, 0)),
        ({}, 4, (128, 1, 512)),  # the images are enough for ten steps
    ],
    ids=str,
)
def test_a_step_is_divided_among_the_ranks_and_the_learning_rate_follows_it(settings, ranks, expected):
    config = recipe.Config("data", **settings).settled(5120, ranks)
    assert (config.batch_size, config.accumulate, config.global_batch) == expected
    assert config.lr == pytest.approx(max(1e-3 * config.images_a_step(ranks) / 1024, 2.5e-4))
    assert config.settled(5120, ranks) == config


@pytest.mark.parametrize(
    ("size", "batch", "accumulate", "ranks"), [(40, 2, 3, 2), (41, 3, 1, 4), (12, 2, 1, 3), (100, 4, 2, 1)]
)
def test_the_ranks_share_the_images_of_a_step_whatever_their_number(size, batch, accumulate, ranks):
    def read(rank: int, ranks: int, accumulate: int, start: int = 0) -> list[int]:
        order = Order(size, batch, seed=3)
        order.epoch, order.start = 1, start * accumulate * ranks
        share = Share(order, Ranks(rank, ranks), accumulate)
        images = list(share)
        assert len(images) == len(share)
        return images

    step = batch * accumulate * ranks
    whole = read(0, 1, accumulate * ranks)
    assert len(whole) == size // step * step
    parts = [read(rank, ranks, accumulate) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(whole) // ranks}
    for i in range(size // step):
        own = slice(i * step // ranks, (i + 1) * step // ranks)
        assert sorted(image for part in parts for image in part[own]) == sorted(whole[i * step : (i + 1) * step])
    assert [image for k in range(len(whole) // batch) for image in parts[k % ranks][k // ranks * batch :][:batch]] == whole
    if size // step > 1:
        assert read(ranks - 1, ranks, accumulate, start=1) == parts[-1][step // ranks :]


# ---- what several ranks saved ----


def cut(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (cut, ".distcp' is damaged"),
        (flip, ".distcp' is damaged"),
        (lambda folder: (folder / ".metadata").unlink(), "cannot be read (No such file"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "cannot be read (No such file"),
        (shutil.rmtree, "cannot be read (No such file"),
    ],
    ids=["cut", "a bit", "no list", "a file less", "gone"],
)
def test_a_damaged_folder_is_refused_in_one_line_with_the_way_on(data, stopped, capsys, spoil, named):
    spoil(next(path for path in stopped.iterdir() if path.is_dir()))
    before = contents(stopped)
    capsys.readouterr()
    assert main(resumed(data, stopped)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    assert f"--initial {str(stopped / 'last.pt')!r} --out NEW" in said
    assert contents(stopped) == before


def test_the_list_of_a_folder_executes_nothing(stopped, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    source = next(path for path in stopped.iterdir() if path.is_dir())
    assert "model/head.weight" in distributed.sizes(source)
    for content in (pickle.dumps(Evil()), pickle.dumps({"state_dict_metadata": {}}), b"no pickle", b""):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata' cannot be read: "):
            distributed.sizes(tmp_path)
    assert not (tmp_path / "executed").exists()
    # nor what a folder holds beside tensors, which PyTorch reads as pickles
    from torch.distributed import checkpoint

    with pytest.warns(UserWarning, match="single process"):
        checkpoint.save({"model/head.weight": Evil()}, checkpoint_id=tmp_path / "other")
    with pytest.raises(CheckpointError, match="it holds BytesStorageMetadata"):
        distributed.load(tmp_path / "other", {"model/head.weight": torch.zeros(1)})
    assert not (tmp_path / "executed").exists()


def test_what_several_ranks_saved_is_classified_with(stopped, data, capsys):
    capsys.readouterr()
    image = next((data / "val").rglob("*.png"))
    assert main(["classify", str(image), "--checkpoint", str(stopped / "last.pt"), "--device", "cpu"]) == 0
    assert str(image) in capsys.readouterr().out


def test_throughput_and_memory_of_each_rank_are_in_the_history_and_the_log(data, tmp_path):
    ended = launch(tmp_path, arguments(data, tmp_path / "run", "--epochs", 1))
    assert ended.codes == [0, 0]
    row = json.loads((tmp_path / "run" / "history.json").read_text())[0]
    assert row["images_per_second"] > 36 / row["seconds"]
    assert len(row["memory_mib"]) == 2
    assert min(row["memory_mib"]) > 50
    line = next(line for line in ended.out[0].splitlines() if line.startswith("epoch   1/1"))
    assert line.endswith(f"{row['images_per_second']:,.0f} img/s, {row['memory_mib'][0]:,} | {row['memory_mib'][1]:,} MiB")


def test_two_ranks_learn_the_digits(tmp_path):
    options = ["--preset", "small", "--batch-size", "16", "--epochs", "2", "--device", "cpu"]
    assert launch(tmp_path, ["train", "digits", "--out", str(tmp_path / "run"), *options]).codes == [0, 0]
    accuracy = [row["val_accuracy"] for row in json.loads((tmp_path / "run" / "history.json").read_text())]
    assert accuracy[1] > max(accuracy[0], 0.6)
