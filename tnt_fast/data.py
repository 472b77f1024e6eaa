"""Images for training: folders of them, their order, their transforms; scikit-learn's handwritten digits as such a folder.

Every random draw follows from (seed, epoch, image), whoever loads it and when.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tnt_fast.images import DataError


def write_digits(root: Path) -> None:
    """Write scikit-learn's 1,797 handwritten digits (8×8, UCI) as PNG files: ``root/{train,val}/0…9``, a fifth held out.

    The split is stratified and fixed. A folder that is complete already is left as it is.
    """
    done = root / "complete"
    if done.exists():
        return
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "tnt_fast[train]"') from error
    from PIL import Image

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(np.arange(len(pixels)), test_size=0.2, random_state=0, stratify=digits.target)
    for part, indices in zip(("train", "val"), parts, strict=True):
        for i in sorted(indices.tolist()):
            folder = root / part / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(folder / f"{i:04d}.png")
    done.touch()


@contextlib.contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Run a block with all CPU generators seeded from ``numbers``, then put them back."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU as well
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class Images(Dataset):
    """An ImageFolder whose augmentation of an image depends on (seed, epoch, image) alone, whoever loads it and when."""

    def __init__(self, root: Path, transform: Callable[[Any], Tensor], seed: int):
        from torchvision.datasets import ImageFolder

        if not root.is_dir():
            raise DataError(f"no directory {str(root)!r}; expected one folder a class, with images in it")
        try:
            self.folder = ImageFolder(root, transform)
        except FileNotFoundError as error:
            raise DataError(f"{str(root)!r} holds no images in class folders: {error}") from error
        self.seed, self.epoch = seed, 0
        self.classes = self.folder.classes

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with _seeded(self.seed, self.epoch, index):
            try:
                return self.folder[index]
            except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNG files
                raise DataError(
                    f"cannot read the image {self.folder.samples[index][0]!r}: {error}; repair or remove it"
                ) from error


class Order(Sampler):
    """A permutation from (seed, epoch), from batch ``start`` on."""

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        return iter(order[self.start * self.batch_size :].tolist())

    def __len__(self) -> int:
        return self.size - self.start * self.batch_size


def training_transform(config: Any, data_config: dict[str, Any]) -> Any:
    jitter: Any = config.color_jitter or None  # timm takes None for none, which its annotation forgets
    try:
        return create_transform(
            data_config["input_size"], is_training=True, scale=config.scale, ratio=config.ratio, hflip=config.hflip,
            color_jitter=jitter, auto_augment=config.auto_augment or None, re_prob=config.reprob,
            interpolation=data_config["interpolation"], mean=data_config["mean"], std=data_config["std"],
        )  # fmt: skip
    except AssertionError as error:  # timm's way to refuse a policy
        raise ValueError(f"auto_augment={config.auto_augment!r} is no policy of timm ({error}); '' turns it off") from error


def evaluation_transform(data_config: dict[str, Any]) -> Any:
    """timm's transform for evaluation from a data config (input_size, interpolation, mean, std, crop_pct)."""
    return create_transform(
        tuple(data_config["input_size"]), is_training=False, interpolation=data_config["interpolation"],
        mean=tuple(data_config["mean"]), std=tuple(data_config["std"]), crop_pct=data_config["crop_pct"],
    )  # fmt: skip


def batches(loader: DataLoader) -> Iterator[list[Tensor]]:
    """The batches; a DataError of a worker process without the traceback that PyTorch puts before its message."""
    try:
        yield from loader
    except DataError as error:
        text = str(error).rstrip().rpartition("DataError: ")[2]
        raise DataError(text) from error.with_traceback(None)  # which holds the workers, in a cycle
