"""Images for training: no draw of the augmentation and no process that reads ends a run for good."""

import multiprocessing
import os
import random
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")

import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader

from tnt_fast import data
from tnt_fast.recipe import POLICIES, Config
from tnt_fast.shards import Picture

DATA_CONFIG = {
    "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "input_size": (3, 32, 32), "crop_pct": 0.9
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Picture]:
    root = tmp_path_factory.mktemp("pictures")
    found = []
    for i in range(4):
        path = root / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 36, 3)).astype(np.uint8)).save(path)
        found.append(Picture(path.name, str(path), "ab"[i % 2], path.stat().st_size, 0))
    return found


def transform(policy: str):
    return data.training_transform(Config("data", auto_augment=policy), DATA_CONFIG)


@pytest.mark.parametrize("policy", [*POLICIES, "rand-m30-mmax40-n3-mstd9-inc1", "rand-m0-n3", "original-mstd0.5", "v0-mstd9"])
def test_each_operation_of_a_policy_works_at_each_magnitude(policy):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8))
    steps = transform(policy).transforms
    ops = [op for step in steps for op in vars(step).get("ops", [])]
    ops += [op for step in steps for policy in vars(step).get("policy", []) for op in policy]
    assert policy == "3a" or [op for op in ops if "Posterize" in op.name]
    random.seed(0)
    for op in ops:
        assert isinstance(op, AugmentOp)
        op.prob, op.magnitude_std = 1.0, 0
        for magnitude in (0, 0.5, 5, 9, 9.99, 10, 20, 40):
            op.magnitude = magnitude
            op(image)


def test_one_bit_is_kept_where_timm_asks_for_none():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    [op] = [op for step in transform("rand-m10-inc1").transforms for op in vars(step).get("ops", []) if "Posterize" in op.name]
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert np.unique(np.asarray(op(image))).tolist() == [0, 128]


class Breaks:
    """A transform that fails for some draws."""

    def __init__(self, error: Exception):
        self.error = error

    def __call__(self, image):
        if random.random() < 0.5:
            raise self.error
        return torch.ones(3, 32, 32)


def loaded(dataset, workers):
    loader = DataLoader(dataset, batch_size=1, num_workers=workers)
    return torch.cat([image for image, _ in data.batches(loader)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_that_fails_becomes_the_plain_crop_each_time_and_is_said_once(pictures, workers, capfd, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", lambda message, *where: os.write(2, f"{message}\n".encode()))
    monkeypatch.setattr(warnings, "filters", [("always", None, RuntimeWarning, None, 0)])
    plain = data.evaluation_transform(DATA_CONFIG)

    def images():
        dataset = data.Images(pictures, ["a", "b"], Breaks(ValueError("bits must be 1 to 8")), 6, plain)
        dataset.epoch = 7
        return dataset

    dataset = images()
    first = loaded(dataset, workers)
    assert torch.equal(first, loaded(dataset, workers))
    said = capfd.readouterr().err
    assert torch.equal(first, loaded(images(), 0))
    replaced = [i for i in range(4) if torch.equal(first[i], plain(data.open_image(pictures[i].path)))]
    assert replaced == [0, 2]
    assert bool((first[[1, 3]] == 1).all())
    assert said.count("augmentation of") == 1
    assert "ValueError: bits must be 1 to 8" in said
    assert any(f"{pictures[i].path!r} in epoch 8 (draw 6, 7, {i})" in said for i in replaced)


def test_a_held_out_image_that_cannot_be_transformed_is_named(pictures):
    dataset = data.Images(pictures, ["a", "b"], Breaks(ValueError("too small")))
    with pytest.raises(data.DataError, match=r"cannot transform the image '.*\.png' .*: ValueError: too small"):
        loaded(dataset, 0)


def test_a_transform_that_fails_for_any_image_is_refused_at_the_start(tmp_path, monkeypatch):
    def fails(image):
        raise ValueError("no such mode")

    config = Config("digits", auto_augment="v0")
    monkeypatch.setattr(data, "training_transform", lambda *_: fails)
    with pytest.raises(ValueError, match="auto_augment='v0' fails on a plain image: no such mode"):
        data.DataSet(config, tmp_path).images(DATA_CONFIG)
    assert list(tmp_path.iterdir()) == []
    data._try(Breaks(ValueError("no such mode")), config)  # one that fails for some draws is not


def test_too_little_memory_is_no_matter_of_the_draw(pictures):
    dataset = data.Images(pictures, ["a", "b"], Breaks(MemoryError()), plain=lambda image: image)
    with pytest.raises(MemoryError):
        loaded(dataset, 0)


# ---- the order ----


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_has_the_order_of_timms_sampler(repeats, monkeypatch):
    order = data.Order(512, 4, 1)
    plain = list(order)
    order = data.Order(512, 4, 1, repeats)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", lambda size, generator: torch.tensor(plain))
        theirs = list(RepeatAugSampler(range(512), num_replicas=1, rank=0, num_repeats=repeats))
    assert [draw % 512 for draw in order] == theirs
    assert len(set(order)) == len(order) == 512  # no augmentation is drawn twice
    whole = list(order)
    order.start = 5
    assert list(order) == whole[20:]
    order.epoch = 1
    assert list(order) != whole[20:]


def test_each_repeat_of_a_picture_is_augmented_anew_and_the_first_as_without_repeats(pictures):
    images = data.Images(pictures, ["a", "b"], transform("rand-m9-mstd0.5-inc1"), seed=3)
    first, second = images[1], images[1 + len(images)]
    assert first[1] == second[1] == images.targets[1]
    assert not torch.equal(first[0], second[0])
    assert torch.equal(images[1 + len(images)][0], second[0])


def kill(image):
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(1)


def test_a_killed_process_that_reads_asks_for_memory_and_says_how_to_go_on(pictures):
    dataset = data.Images(pictures, ["a", "b"], kill)
    with (
        pytest.raises(RuntimeError, match=r"Out of memory\? Continue with --resume and fewer --workers \(0: "),
        data.readers_named(),
    ):
        loaded(dataset, 1)


def test_a_process_that_reads_and_finds_no_memory_does_the_same(pictures):
    dataset = data.Images(pictures, ["a", "b"], Breaks(MemoryError()), seed=6)
    with pytest.raises(RuntimeError, match=r"Caught MemoryError .* Out of memory\?"), data.readers_named():
        loaded(dataset, 1)


def test_other_errors_of_a_run_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes$"), data.readers_named():
        raise RuntimeError("shapes")


def test_the_digits_are_written_only_when_all_else_is_known(tmp_path: Path):
    found = data.DataSet(Config("digits"), tmp_path)
    assert found.classes == [str(digit) for digit in range(10)]
    assert list(tmp_path.iterdir()) == []
