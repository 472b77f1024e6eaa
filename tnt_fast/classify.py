"""Classify image files with a checkpoint or with weights that timm hosts: ``tnt-fast classify``."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from tnt_fast import writing
from tnt_fast.checkpoints import CheckpointError
from tnt_fast.data import evaluation_transform
from tnt_fast.dispatch import find_device, settle
from tnt_fast.images import DataError, open_image
from tnt_fast.optimize import optimize_for_inference
from tnt_fast.shards import Picture
from tnt_fast.variants import check_sizes, load_tnt

F = TypeVar("F", bound=Path | Picture)

READERS = min(8, os.cpu_count() or 1)  # threads that decode; Pillow lets the others run meanwhile


class Classifier:
    """A TNT in evaluation mode with its transform and the names of its classes.

    Attributes:
        named: whether the checkpoint or the caller names the classes; else ``classes`` are ImageNet's, or numbers.
        trained_here: whether 'tnt-fast train' wrote the weights. accuracy: as ``variants.Loaded`` has it.

    Args:
        checkpoint: file of ``tnt-fast train``, or any that ``load_checkpoint`` reads if ``model`` names the variant.
        model: a name (``tnt_s_patch16_224``) or a timm hub tag (``tnt_s_patch16_224.in1k``, ``hf-hub:timm/…``), whose hosted
            weights are taken where there is no checkpoint.
        device: such as "cpu" or "cuda:0"; None: a GPU if there is one.
        class_names: in place of those that the checkpoint or ImageNet gives.
        model_kwargs: arguments of ``model``.

    Raises:
        ValueError: neither is given, or the model is unknown. CheckpointError, FileNotFoundError: the file.
        ConnectionError: hosted weights that are not at hand cannot be fetched.
    """

    def __init__(
        self, checkpoint: str | os.PathLike | None = None, model: str | None = None, device: str | None = None,
        backend: str = "auto", class_names: Sequence[str] | None = None, model_kwargs: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.device = find_device(device)
        if checkpoint is None and model is None:
            raise ValueError(
                "nothing to classify with: give a checkpoint (--checkpoint), or a model whose weights timm hosts (--model)"
            )
        loaded = load_tnt(model, checkpoint, **check_sizes(model_kwargs or {}))
        self.model, self.weights, self.classes, self.data_config = loaded.model, loaded.said, loaded.classes, loaded.data_config
        self.trained_here, self.named = loaded.trained_here, bool(loaded.classes or class_names)
        self.accuracy = loaded.accuracy
        if self.model.num_classes < 1:
            raise CheckpointError("the model has no classes, so it cannot classify")
        if not loaded.has_head:
            raise CheckpointError(
                f"the weights have no head for the model's {self.model.num_classes:,} classes ({loaded.said}), so it cannot "
                "classify; take weights with one, or train it: tnt-fast train DATA --initial FILE"
            )
        if self.model.in_chans != 3:
            raise CheckpointError(f"the model takes images of {self.model.in_chans} channels; those of files have 3")
        self.model.to(self.device).eval()
        self.model.backend = backend
        self.why_not_fused = settle(self.model)  # "fused" fails here
        self.repacked = backend == "auto" and self.device.type == "cpu"
        if class_names is not None:
            self.classes = list(class_names)
        elif not self.classes:
            self.classes = class_names_of(self.model.num_classes)
        if len(self.classes) != self.model.num_classes:
            raise ValueError(f"{len(self.classes)} class names, but the model has {self.model.num_classes} classes")
        self.transform = evaluation_transform(self.data_config)

    @cached_property
    def compute(self) -> Callable[[Tensor], Tensor]:
        """The model; on a CPU, unless a path was asked for, its copy that has the same outputs in less time."""
        return optimize_for_inference(self.model) if self.repacked else self.model

    @torch.inference_mode()
    def __call__(
        self, files: Iterable[Path], topk: int = 5, batch_size: int = 64, threshold: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """Yield, for each file in order, ``{"file", "predictions": [{"class", "index", "probability"}, …]}``.

        Predictions below the threshold are left out, so there may be none. A file that cannot be read, or whose outputs are
        not finite, gives ``{"file", "error"}`` instead. If the file's folder is named like a class, that name is added as
        ``"truth"``.
        """
        if topk < 1:
            raise ValueError(f"topk={topk} must be at least 1")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} must be a probability from 0 to 1")
        for batch in self.read(list(files), batch_size):
            images = [image for _, image in batch if isinstance(image, Tensor)]
            logits: Iterator[Tensor] = iter(())
            if images:
                logits = iter(self.compute(torch.stack(images).to(self.device)).float().cpu())
            for file, image in batch:
                row: dict[str, Any] = {"file": str(file)}
                if isinstance(image, DataError):
                    row["error"] = str(image)
                elif not (logit := next(logits)).isfinite().all():
                    row["error"] = f"the model's outputs for {str(file)!r} are not finite"
                else:
                    top = logit.softmax(-1).topk(min(topk, len(self.classes)))
                    row["predictions"] = [
                        {"class": self.classes[i], "index": i, "probability": p}
                        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                        if p >= threshold
                    ]
                    if file.parent.name in self.classes:
                        row["truth"] = file.parent.name
                yield row

    def read(
        self, files: Sequence[F], batch_size: int, as_stored: bool = False
    ) -> Iterator[list[tuple[F, Tensor | DataError]]]:
        """Batches of files with their inputs, or why there are none; the next batch is read while one is computed with.

        ``as_stored``: as ``open_image`` has it.
        """

        def read(file: F) -> Tensor | DataError:
            try:
                opened = file.open() if isinstance(file, Picture) else file
                return self.transform(open_image(opened, as_stored=as_stored))
            except DataError as error:
                return error
            except OSError as error:  # of the shard that a picture lies in
                return DataError(f"cannot read the image {str(file)!r}: {error.strerror or error}")

        pool = ThreadPoolExecutor(READERS)
        try:
            ahead: list[tuple[F, Future]] = []
            for start in range(0, len(files) + batch_size, batch_size):
                batch, ahead = ahead, [(file, pool.submit(read, file)) for file in files[start : start + batch_size]]
                if batch:
                    yield [(file, future.result()) for file, future in batch]
        finally:
            pool.shutdown(cancel_futures=True)


def read_class_names(path: str | os.PathLike) -> list[str]:
    """The names in a text file, one a line, in the order of the model's classes.

    Raises:
        ValueError: not UTF-8, or an empty line among them. OSError: the file.
    """
    try:
        names = Path(path).read_text("utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read the class names in {str(path)!r}: {error}; expected one name a line, in UTF-8"
        ) from error
    for line, name in enumerate(names, 1):
        if not name.strip():
            raise ValueError(f"line {line} of the class names in {str(path)!r} is empty; expected one name a line")
    return [name.strip() for name in names]


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """With columns for the file, each prediction, the truth and the error."""
    most = max((len(row.get("predictions", ())) for row in rows), default=0)
    columns = [column for i in range(1, most + 1) for column in (f"class_{i}", f"probability_{i}")]
    flat = []
    for row in rows:
        cells: dict[str, Any] = {name: row[name] for name in ("file", "truth", "error") if name in row}
        for i, prediction in enumerate(row.get("predictions", ()), 1):
            cells |= {f"class_{i}": prediction["class"], f"probability_{i}": prediction["probability"]}
        flat.append(cells)
    return writing.table(flat, ["file", *columns, "truth", "error"])


def write(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the rows to a .csv or .json file, beside an older one and then over it. Names of files keep their bytes."""
    is_csv = path.suffix == ".csv"
    content = _csv(rows) if is_csv else json.dumps(rows, indent=1, allow_nan=False).encode("utf-8", "surrogateescape")
    writing.write(path, content)
    return path


def summary(rows: Sequence[dict[str, Any]], others: Mapping[Path, str]) -> list[str]:
    """Lines: how many images were classified, how many files passed over, and how many answers are as the folders say."""
    well = [row for row in rows if "error" not in row]
    lines = [f"{len(well)} of {len(rows)} images classified"]
    if unsure := sum(not row["predictions"] for row in well):
        lines[0] += f", {unsure} of them with no class above the threshold"
    if others:
        kinds = Counter(path.suffix.lower() or "without ending" for path in others).most_common(5)
        lines.append(f"{len(others)} other files passed over: " + ", ".join(f"{kind} {count}" for kind, count in kinds))
    judged = [row for row in well if "truth" in row and row["predictions"]]
    if judged:
        right = sum(row["truth"] == row["predictions"][0]["class"] for row in judged)
        lines.append(f"{right} of {len(judged)} as their folders say ({right / len(judged):.2%})")
    return lines


def class_names_of(count: int) -> list[str]:
    """The names of a model's classes where nobody says them: ImageNet's, of as many as it has, or their numbers."""
    info = ImageNetInfo()
    if count == info.num_classes():
        return [info.index_to_description(i) for i in range(count)]
    return [str(i) for i in range(count)]
