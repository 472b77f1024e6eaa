"""Images for training: their order, their transforms; scikit-learn's handwritten digits as a folder of them.

Every random draw follows from (seed, epoch, image), whoever loads it and when.
"""

import contextlib
import multiprocessing
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tnt_fast.check import Files, training_files
from tnt_fast.images import DataError, open_image
from tnt_fast.recipe import DIGITS, Config
from tnt_fast.shards import Picture
from tnt_fast.terminal import say


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
    """Pictures and their classes' indices. The augmentation of one depends on (seed, epoch, index) alone, whoever loads it.

    Index ``i + k · len`` is picture ``i`` again, with the augmentation of its repeat ``k``.

    Args:
        transform: RGB image to tensor.
        plain: taken where ``transform`` raises, which is said once. The draw would fail again in each resumed run.
    """

    def __init__(
        self, pictures: Sequence[Picture], classes: Sequence[str], transform: Callable[[Any], Tensor], seed: int = 0,
        plain: Callable[[Any], Tensor] | None = None,
    ):  # fmt: skip
        self.pictures, self.classes = list(pictures), list(classes)
        self.transform, self.plain = transform, plain
        self.seed, self.epoch = seed, 0
        index = {label: i for i, label in enumerate(self.classes)}
        self.targets = [index[picture.label] for picture in self.pictures]
        self._said = multiprocessing.Value("b", False)  # for all processes that read

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: int) -> tuple[Tensor, int]:
        index = draw % len(self)
        image = open_image(self.pictures[index].open())
        try:
            with _seeded(self.seed, self.epoch, draw):
                return self.transform(image), self.targets[index]
        except MemoryError:
            raise
        except Exception as error:
            named = f"{self.pictures[index].path!r} in epoch {self.epoch + 1} (draw {self.seed}, {self.epoch}, {draw})"
            reason = f"{type(error).__name__}: {error}"
            if self.plain is None:
                raise DataError(f"cannot transform the image {named}: {reason}; remove it") from error
            with self._said.get_lock():
                first, self._said.value = not self._said.value, True
            if first:
                warnings.warn(
                    f"the augmentation of {named} failed: {reason}. Its plain crop is taken; so it is for others, which are "
                    "not named. Another --auto-augment may avoid it",
                    RuntimeWarning,
                    stacklevel=1,
                )
            return self.plain(image), self.targets[index]


class DataSet:
    """The images of a run: those to train on and those held out, examined before anything else is built.

    Attributes:
        classes: their names.

    Raises:
        DataError: as ``check.training_files``.
    """

    def __init__(self, config: Config, out: Path, log: Callable[[str], None] = say, progress: bool | None = None):
        self._config, self._log, self._progress = config, log, progress
        self._digits = out / "data" if config.data == DIGITS else None
        self._found = None if self._digits else self._files(config.data)
        if self._found:
            config.check_step(len(self._found.parts["train"]))
        self.classes = self._found.classes if self._found else [str(digit) for digit in range(10)]

    def _files(self, data: str | Path) -> Files:
        config = self._config
        return training_files(data, config.val_fraction, config.seed, config.skip_bad, self._log, self._progress)

    def images(self, data_config: dict[str, Any]) -> tuple[Images, Images]:
        """Training set, augmented, and held-out set. The digits are written here, not before all else is known to be right."""
        config = self._config
        augment, plain = training_transform(config, data_config), evaluation_transform(data_config)
        _try(augment, config)
        if self._digits:
            write_digits(self._digits)
            self._found = self._files(self._digits)
        assert self._found is not None
        self.fingerprint = self._found.fingerprint()
        train, val = self._found.parts["train"], self._found.parts["val"]
        return Images(train, self.classes, augment, config.seed, plain), Images(val, self.classes, plain, config.seed)


def _try(augment: Callable[[Any], Tensor], config: Config) -> None:
    """Refuse an augmentation that fails for every image; one that fails for some draws is no reason not to begin."""
    failed: Exception | None = None
    for draw in range(8):
        try:
            with _seeded(config.seed, draw):
                augment(Image.new("RGB", (64, 48)))
            return
        except Exception as error:
            failed = error
    raise ValueError(f"auto_augment={config.auto_augment!r} fails on a plain image: {failed}; '' turns it off") from failed


class Order(Sampler):
    """A permutation from (seed, epoch), from batch ``start`` on, of indices into ``Images``.

    Args:
        repeats: above 1, repeated augmentation (https://arxiv.org/abs/1901.09335) as timm's RepeatAugSampler has it: an epoch
            is as long, but of the first pictures of the permutation alone, each so often, side by side.
    """

    def __init__(self, size: int, batch_size: int, seed: int, repeats: int = 1):
        self.size, self.batch_size, self.seed, self.repeats = size, batch_size, seed, repeats
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[int]:
        pictures = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        picture, repeat = np.divmod(np.arange(self.start * self.batch_size, self.size), self.repeats)
        return iter((pictures[picture] + repeat * self.size).tolist())

    def __len__(self) -> int:
        return self.size - self.start * self.batch_size


def _posterize(image: Any, bits: int, **kwargs: Any) -> Any:
    return posterize(image, max(bits, 1), **kwargs)


def training_transform(config: Config, data_config: dict[str, Any]) -> Any:
    jitter: Any = config.color_jitter or None  # timm takes None for none, which its annotation forgets
    transform = create_transform(
        data_config["input_size"], is_training=True, scale=config.scale, ratio=config.ratio, hflip=config.hflip,
        color_jitter=jitter, auto_augment=config.auto_augment or None, re_prob=config.reprob,
        interpolation=data_config["interpolation"], mean=data_config["mean"], std=data_config["std"],
    )  # fmt: skip
    # At full magnitude timm (to 1.0.31) posterizes to 0 bits, a black image, which Pillow 13 refuses: one bit is kept
    for step in transform.transforms:
        for op in [*getattr(step, "ops", ()), *(op for policy in getattr(step, "policy", ()) for op in policy)]:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    return transform


def evaluation_transform(data_config: dict[str, Any]) -> Any:
    """timm's transform for evaluation from a data config (input_size, interpolation, mean, std, crop_pct, crop_mode)."""
    return create_transform(
        tuple(data_config["input_size"]), is_training=False, interpolation=data_config["interpolation"],
        mean=tuple(data_config["mean"]), std=tuple(data_config["std"]), crop_pct=data_config["crop_pct"],
        crop_mode=data_config.get("crop_mode"),
    )  # fmt: skip


def batches(loader: DataLoader) -> Iterator[list[Tensor]]:
    """The batches; a DataError of a worker process without the traceback that PyTorch puts before its message."""
    try:
        yield from loader
    except DataError as error:
        text = str(error).rstrip().rpartition("DataError: ")[2]
        raise DataError(text) from error.with_traceback(None)  # which holds the workers, in a cycle


@contextlib.contextmanager
def readers_named() -> Iterator[None]:
    """Say of a killed process that reads images how to go on. PyTorch raises its error wherever the run happens to be."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not str(error).startswith(("DataLoader worker", "Caught MemoryError in DataLoader worker")):
            raise
        raise RuntimeError(
            f"a process that reads images has ended: {str(error).strip().splitlines()[0]} Out of memory? "
            "Continue with --resume and fewer --workers (0: the run reads them itself)"
        ) from error
