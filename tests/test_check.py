"""The files of a data set: all that cannot be trained on are found before a run, and what is held out follows from the seed."""

import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("torchvision")

from helpers import stop_in_second_step
from PIL import Image

from tnt_fast import check
from tnt_fast.cli import main
from tnt_fast.images import DataError


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3)).astype(np.uint8)).save(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(check, "_cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def divided(tmp_path):
    """train/ and val/ with 3 and 1 images of each of 2 classes."""
    for i, name in enumerate(("cat", "dog")):
        for j in range(4):
            picture(tmp_path / "data" / ("val" if j == 3 else "train") / name / f"{j}.png", 10 * i + j)
    return tmp_path / "data"


@pytest.fixture
def whole(tmp_path):
    """One folder with 10 images of each of 3 classes."""
    for i, name in enumerate(("ant", "bee", "cow")):
        for j in range(10):
            picture(tmp_path / "whole" / name / f"{j}.png", 100 * i + j)
    return tmp_path / "whole"


def spoil(data):
    """Bad files of every kind, and leftovers; returns the bad ones' names with words of the reason."""
    cat = data / "train" / "cat"
    content = (cat / "0.png").read_bytes()
    (cat / "cut.png").write_bytes(content[: len(content) // 2])
    (cat / "empty.jpg").write_bytes(b"")
    (cat / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (cat / "notes.txt").write_text("no image")
    (cat / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(cat / "pipe.png")
    (cat / "round").symlink_to(cat)
    (cat / "deep").mkdir()
    shutil.copy(data / "val" / "dog" / "3.png", cat / "deep" / "again.png")
    shutil.copy(cat / "0.png", data / "train" / "stray.png")
    (data / "train" / ".git").mkdir()
    for leftover in ("._0.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png"):
        for folder in (cat, data / "train", data):
            (folder / leftover).parent.mkdir(exist_ok=True)
            (folder / leftover).write_bytes(b"left over")
    return {
        "train/cat/cut.png": "truncated", "train/cat/empty.jpg": "empty", "train/cat/page.png": "EPS",
        "train/cat/notes.txt": "not an image by its name", "train/cat/gone.png": "no such file", "train/cat/pipe.png": "pipe",
        "train/cat/round": "searched already", "train/cat/deep/again.png": "same picture as 'val/dog/3.png', which is held out",
        "train/stray.png": "in no class folder",
    }  # fmt: skip


def settings(data, out):
    tiny = ["img_size=32", "embed_dim=24", "inner_dim=12", "depth=1", "num_heads_outer=2", "num_heads_inner=2"]
    quick = ["--epochs", "1", "--batch-size", "2", "--threads", "1", "--device", "cpu", "--workers", "0"]
    return ["train", str(data), "--out", str(out), "--model", "tnt_ti_patch16_224", "--model-kwargs", *tiny, *quick]


# ---- bad files ----


def test_check_lists_all_bad_files_with_reasons_and_its_status_says_so(divided, capsys):
    assert main(["check", str(divided)]) == 0
    assert capsys.readouterr().out == "8 images in 2 classes of 4 to 4\n0 bad files\n"
    expected = spoil(divided)
    assert main(["check", str(divided)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected) + 2
    for name, reason in expected.items():
        assert any(line.startswith(f"{name}: ") and reason in line for line in lines), name
    assert main(["check", str(divided), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {row["file"] for row in report["bad"]} == set(expected)
    assert report["classes"]["dog"] == {"train": 3, "val": 1}


def test_a_run_names_all_bad_files_before_it_begins_and_skips_them_where_asked_to(divided, tmp_path, capsys):
    expected = spoil(divided)
    out = tmp_path / "run"
    assert main(settings(divided, out)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"9 of {9 + 8} files" in said
    assert "--skip-bad" in said
    assert [name for name in expected if repr(name) not in said] == []
    assert not out.exists()

    assert main([*settings(divided, out), "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert f"left out: 9 of {9 + 8} files" in said
    assert "images: 6 to train on, 2 held out" in said
    # a run that cannot go on as it was
    assert main([*settings(divided, out), "--resume"]) == 2
    assert "--skip-bad" in capsys.readouterr().err
    assert main([*settings(divided, out), "--resume", "--skip-bad"]) == 0
    assert "already trained" in capsys.readouterr().out


def test_a_long_list_is_cut_in_an_error_and_counted(divided):
    for i in range(30):
        (divided / "train" / "cat" / f"bad{i:02}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"30 of 38 files .*'train/cat/bad19.png': .*; and 10 more"):
        check.training_files(divided)


def test_a_class_of_which_only_bad_files_are_there_is_named(divided):
    for file in (divided / "val" / "dog").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"val has no images of \['dog'\]"):
        check.training_files(divided, skip_bad=True)


def test_what_was_examined_is_not_examined_again_until_a_file_changes(divided, cache, monkeypatch):
    opened = []
    real = check.open_image
    monkeypatch.setattr(check, "open_image", lambda path, **kwargs: opened.append(path) or real(path, **kwargs))

    def look():
        opened.clear()
        files = check.find(divided)
        check.examine(files)
        return len(opened), list(files.bad)

    assert look() == (8, [])
    assert look() == (0, [])
    file = divided / "train" / "cat" / "0.png"
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))  # of the same name and size
    os.utime(file, ns=(1, 1))
    assert look() == (8, ["train/cat/0.png"])
    assert look() == (0, ["train/cat/0.png"])
    for kept in cache.iterdir():
        kept.write_text('{"bad": 3')
    assert look() == (8, ["train/cat/0.png"])


def test_the_same_files_from_elsewhere_have_other_names(whole, tmp_path):
    (whole / "ant" / "bad.png").write_bytes(b"no image")
    rows = "".join(f"{file},{file.parent.name}\n" for file in sorted(whole.glob("*/*")))
    (tmp_path / "all.csv").write_text("file,label\n" + rows)
    for data, name in ((whole, "ant/bad.png"), (tmp_path / "all.csv", f"{whole.name}/ant/bad.png")):
        files = check.find(data)
        check.examine(files)
        assert list(files.bad) == [name]


def test_a_cache_that_cannot_be_written_is_done_without(divided, cache):
    cache.write_text("a file where a folder should be")
    files = check.find(divided)
    check.examine(files)
    assert files.bad == {}


# ---- what a data set is ----


def single(root):
    shutil.rmtree(root / "train" / "dog")
    shutil.rmtree(root / "val" / "dog")


def none_held_out(root):
    shutil.rmtree(root / "val")


def flat(root):
    for part in ("train", "val"):
        for file in [*(root / part).rglob("*.png")]:
            file.rename(root / part / f"{file.parent.name}{file.name}")
        for folder in (root / part).glob("*/"):
            folder.rmdir()


@pytest.mark.parametrize(
    ("change", "fraction", "named"),
    [
        (single, 0.0, "one class alone, 'cat', so there is nothing to tell apart"),
        (none_held_out, 0.0, "with --val-fraction 0.2 holds a fifth of it out"),
        (flat, 0.0, "has no class folder"),
        (lambda root: None, 0.2, "has a val/ of its own; leave --val-fraction 0.2 out"),
        (lambda root: shutil.rmtree(root), 0.2, "expected .*/train/CLASS and .*/val/CLASS .*/CLASS, or a CSV file"),
    ],
)
def test_what_is_no_data_set_is_refused_with_what_would_be(divided, change, fraction, named):
    change(divided)
    with pytest.raises(DataError, match=named):
        check.training_files(divided, fraction)


def test_one_folder_without_a_fraction_to_hold_out_names_the_option(whole):
    with pytest.raises(DataError, match="hold a part of it out with --val-fraction 0.2"):
        check.training_files(whole)


def test_classes_may_be_called_train_or_val(tmp_path):
    for i, name in enumerate(("car", "train")):
        for j in range(3):
            picture(tmp_path / "vehicles" / name / f"{j}.png", 10 * i + j)
    files = check.training_files(tmp_path / "vehicles", 0.3)
    assert files.classes == ["car", "train"]
    assert [len(files.parts[part]) for part in check.PARTS] == [4, 2]


# ---- a part held out ----


def names(files, part):
    return {p.name for p in files.parts[part]}


def test_a_fraction_of_each_class_is_held_out_by_the_seed(whole):
    files = check.training_files(whole, 0.2)
    assert Counter(p.label for p in files.parts["val"]) == {"ant": 2, "bee": 2, "cow": 2}
    assert Counter(p.label for p in files.parts["train"]) == {"ant": 8, "bee": 8, "cow": 8}
    assert names(files, "train").isdisjoint(names(files, "val"))
    assert names(check.training_files(whole, 0.2), "val") == names(files, "val")
    assert names(check.training_files(whole, 0.2, seed=1), "val") != names(files, "val")
    assert len(check.training_files(whole, 0.001).parts["val"]) == 3  # one of each at least
    assert len(check.training_files(whole, 0.999).parts["train"]) == 3
    picture(whole / "ant" / "new.png", 77)
    again = check.training_files(whole, 0.2)
    assert names(again, "train") - names(files, "train") <= {"ant/new.png"} | names(files, "val")
    assert len(names(again, "val") - names(files, "val")) <= 1


def test_copies_of_a_picture_are_not_on_both_sides(whole):
    for j in range(10):
        shutil.copy(whole / "ant" / f"{j}.png", whole / "ant" / f"copy of {j}.png")
    files = check.training_files(whole, 0.3)
    assert files.bad == {}
    held_out = names(files, "val")
    assert {f"ant/{j}.png" in held_out for j in range(10)} == {True, False}
    assert all((f"ant/{j}.png" in held_out) == (f"ant/copy of {j}.png" in held_out) for j in range(10))


def test_a_class_of_one_picture_cannot_be_divided(whole):
    picture(whole / "dog" / "only.png", 5)
    with pytest.raises(DataError, match="the class 'dog' has 1 image; to hold one out it needs 2"):
        check.training_files(whole, 0.2)


# ---- labels in a CSV file ----


def test_a_csv_file_gives_the_labels(whole, tmp_path):
    rows = [f"whole/{name}/{j}.png,{name} of all" for name in ("ant", "cow") for j in range(5)]
    (tmp_path / "labels.csv").write_text("﻿file,label\n" + "\n".join(rows) + "\n", "utf-8")
    files = check.training_files(tmp_path / "labels.csv", 0.2)
    assert files.classes == ["ant of all", "cow of all"]
    assert [len(files.parts[part]) for part in check.PARTS] == [8, 2]
    for part, numbers in (("train", range(3)), ("val", range(3, 5))):
        lines = [f"{whole}/{name}/{j}.png,{name},{j}" for name in ("ant", "cow") for j in numbers]
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / f"{part}.csv").write_text("file,label,more\n" + "\n".join(lines))
    files = check.training_files(tmp_path / "two")
    assert files.counts() == {name: {"train": 3, "val": 2} for name in ("ant", "cow")}
    shutil.copy(tmp_path / "two" / "val.csv", tmp_path / "two" / "train.csv")
    with pytest.raises(DataError, match="4 files are to be trained on and held out: '.*ant/3.png'"):
        check.find(tmp_path / "two")


def test_a_run_holds_out_a_part_of_what_a_csv_file_lists(whole, tmp_path, capsys):
    rows = "".join(f"{file},{file.parent.name}\n" for file in sorted(whole.glob("*/*")))
    (tmp_path / "labels.csv").write_text("file,label\n" + rows)
    argv = [*settings(tmp_path / "labels.csv", tmp_path / "run"), "--val-fraction", "0.2"]
    assert main(argv) == 0
    assert "images: 24 to train on, 6 held out" in capsys.readouterr().out
    assert main([*argv, "--resume"]) == 0
    assert "already trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the first line of .* is ''; expected file,label"),
        (b"file;label\na;b\n", "is 'file;label'; expected file,label"),
        (b"file,label\nant/0.png,\n", "line 2: expected file,label"),
        (b"file,label\nant/0.png\n", "line 2: expected file,label"),
        (b"file,label\nant/\xff.png,ant\n", "no CSV file in UTF-8"),
        (b"file,label\nant/0.png,ant\nant/0.png,bee\nbee/0.png,bee\n", "'ant/0.png': two labels: 'ant' and 'bee'"),
        (b"file,label\nant/99.png,ant\nbee/0.png,bee\nant/0.png,ant\n", "'ant/99.png': there is no such file"),
        (b"file,label\nant/0.png,ant\nant/1.png,ant\n", "one class alone, 'ant'"),
    ],
)
def test_a_csv_file_that_gives_no_labels_is_refused(whole, content, named):
    (whole / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=named):
        check.training_files(whole / "labels.csv", 0.5)


# ---- data that change ----


def test_a_fingerprint_tells_which_class_changed(divided):
    def fingerprint():
        return check.find(divided).fingerprint()

    before = fingerprint()
    divided.rename(divided.with_name("moved"))
    assert check.find(divided.with_name("moved")).fingerprint() == before
    divided.with_name("moved").rename(divided)
    (divided / "val" / "dog" / "3.png").rename(divided / "val" / "dog" / "4.png")
    shutil.copy(divided / "train" / "cat" / "0.png", divided / "train" / "cat" / "5.png")
    with open(divided / "train" / "dog" / "0.png", "ab") as file:
        file.write(b"more")
    assert check.differences(before, fingerprint()) == [
        "train 'cat' had 3 images, now 4", "train 'dog': other names or sizes", "val 'dog': other names or sizes"
    ]  # fmt: skip


def test_a_run_whose_data_changed_goes_on_only_where_that_is_allowed(divided, tmp_path, capsys, monkeypatch):
    argv = settings(divided, tmp_path / "run")
    calls = stop_in_second_step(monkeypatch)  # of 3
    assert main(argv) == 143
    (divided / "train" / "cat" / "0.png").unlink()
    (divided / "val" / "dog" / "3.png").rename(divided / "val" / "dog" / "new.png")
    assert main([*argv, "--resume"]) == 2
    said = capsys.readouterr().err
    changes = "train 'cat' had 3 images, now 2; val 'dog': other names or sizes"
    assert changes in said
    assert "--allow-changed-data" in said
    assert main([*argv, "--resume", "--allow-changed-data"]) == 0
    assert f"{changes}; going on from the start of epoch 1" in capsys.readouterr().out
    assert len(calls) == 2 + 2  # an epoch of 5 images has 2 steps
    assert main([*argv, "--resume"]) == 0  # with these, it is their run
