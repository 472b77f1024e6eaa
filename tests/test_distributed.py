"""Several ranks make the steps of one; they stop together, whatever ends one of them, and go on on another number of ranks."""

import json
import os
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

from tnt_fast import runs
from tnt_fast.checkpoints import read_checkpoint
from tnt_fast.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.fixture(scope="module", params=["one", "ddp", "fsdp"])
def stopped(request, data, tmp_path_factory) -> Path:
    """A run that one of its ranks stopped, on a signal in the second step of the second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    more, size = (["--fsdp"] if request.param == "fsdp" else []), (1 if request.param == "one" else 2)
    losses = 12 // 2 // size  # a step
    acts = {size - 1: ["gets", int(signal.SIGTERM), 4 * losses + 1]}
    ended = launch(folder, arguments(data, folder / "run", *more), size, acts)
    assert ended.codes == [128 + signal.SIGTERM] * size, ended.err
    saved = read_checkpoint(folder / "run" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert ended.err[0].count("--resume") == 1
    assert [ended.err[rank] for rank in range(1, size)] == [""] * (size - 1)
    return folder / "run"


@pytest.mark.parametrize(("size", "more"), [(1, []), (3, []), (3, ["--fsdp"])], ids=["one", "three", "three-fsdp"])
def test_a_stopped_run_ends_the_same_on_another_number_of_ranks(data, whole, stopped, tmp_path, size, more):
    shutil.copytree(stopped, tmp_path / "run")
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
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    folder = runs.Folder(run, print)
    folder.read_last()
    with folder.locked():
        before = contents(run)
        ended = launch(tmp_path, resumed(data, run))
        assert_one_line(ended, f"RunError: {str(run)!r} is in use by 'process {os.getpid()} on ")
        assert contents(run) == before


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_in_30_seconds_with_a_message_and_one_rank_goes_on(data, whole, tmp_path, rank):
    run = tmp_path / "run"
    acts = {str(rank): ["gets", int(signal.SIGKILL), 4 * 3 + 1], "killed": []}
    started = time.monotonic()
    ended = torchrun(tmp_path, acts, arguments(data, run, "--workers", 1))
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith("tnt-fast: ")]
    assert len(lines) == 1, ended.stderr
    assert f"RankError: rank {rank} (process " in lines[0]
    assert "--resume" in lines[0]
    assert time.monotonic() - started < 30 + 15  # the beginning included
    deadline = time.monotonic() + 10  # readers look after the process that forked them every 5 seconds
    while (left := processes(str(run))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    saved = read_checkpoint(run / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 0)
    assert main(resumed(data, run)) == 0
    assert_same_run(whole, run)


def test_torchrun_starts_the_ranks_again_and_they_go_on(data, whole, tmp_path):
    acts = {"1": ["is_killed_once", 4 * 3 + 1]}
    ended = torchrun(tmp_path, acts, arguments(data, tmp_path / "run"), "--max-restarts", "1")
    assert ended.returncode == 0, ended.stderr
    assert "continuing at epoch 2, step 1" in ended.stdout
    assert_same_run(whole, tmp_path / "run")
