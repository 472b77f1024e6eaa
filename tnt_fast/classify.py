"""Classify image files with a checkpoint or with weights that timm hosts: ``tnt-fast classify``."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo, resolve_data_config
from torch import Tensor

from tnt_fast.checkpoints import FORMAT, CheckpointError, from_timm, head_classes, load_checkpoint, read_checkpoint
from tnt_fast.data import DataError, evaluation_transform
from tnt_fast.dispatch import choose, why_not_fused
from tnt_fast.tnt import TNT
from tnt_fast.variants import create_tnt

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Classifier:
    """A TNT in evaluation mode with its transform and the names of its classes.

    Args:
        checkpoint: file of ``tnt-fast train``, or any that ``load_checkpoint`` reads if ``model`` names the variant.
        model: a name (``tnt_s_patch16_224``) or a timm hub tag (``tnt_s_patch16_224.in1k``, ``hf-hub:timm/…``), whose hosted
            weights are taken where there is no checkpoint.
        device: such as "cpu" or "cuda:0"; None: a GPU if there is one.

    Raises:
        ValueError: neither is given, or the model is unknown. CheckpointError, FileNotFoundError: the file.
        ConnectionError: hosted weights that are not at hand cannot be fetched.
    """

    def __init__(
        self, checkpoint: str | os.PathLike | None = None, model: str | None = None, device: str | None = None,
        backend: str = "auto",
    ):  # fmt: skip
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.classes: list[str] = []
        if checkpoint is not None:
            self.model, self.data_config = self._from_file(checkpoint, model)
        elif model is not None:
            self.model = _hosted(model)
            self.data_config = resolve_data_config({}, model=self.model)
        else:
            raise ValueError(
                "nothing to classify with: give a checkpoint (--checkpoint), or a model whose weights timm hosts (--model)"
            )
        if self.model.num_classes < 1:
            raise CheckpointError("the model has no classes, so it cannot classify")
        self.model.to(self.device).eval()
        self.model.backend = backend
        image = torch.empty(1, self.model.in_chans, *self.model.pixel_embed.img_size, device=self.device)
        self.why_not_fused = [] if backend == "reference" else why_not_fused(self.model, image)
        if not choose(self.model, image, warn=False):  # "fused" fails here
            self.model.backend = "reference"  # whoever shows the results says so, instead of a warning
        if not self.classes:
            self.classes = _imagenet_classes(self.model.num_classes)
        self.transform = evaluation_transform(self.data_config)

    def _from_file(self, path: str | os.PathLike, name: str | None) -> tuple[TNT, dict[str, Any]]:
        saved = read_checkpoint(path)
        if saved.get("format") == FORMAT:  # of tnt-fast train
            model = create_tnt(saved["model"], **saved["model_kwargs"])
            self.classes = list(saved["classes"])
            return load_checkpoint(model, path), saved["data_config"]
        if name is None:
            raise ValueError(
                f"{str(path)!r} does not say which model it is for: name it with model (--model tnt_s_patch16_224)"
            )
        classes = head_classes(saved)
        model = create_tnt(name, **({} if classes is None else {"num_classes": classes}))
        return load_checkpoint(model, path), resolve_data_config({}, model=model)

    @torch.inference_mode()
    def __call__(self, files: Iterable[Path], topk: int = 5, batch_size: int = 64) -> Iterator[dict[str, Any]]:
        """Yield, for each file in order, ``{"file", "predictions": [{"class", "index", "probability"}, …]}``.

        A file that cannot be read gives ``{"file", "error"}`` instead. If the file's folder is named like a class, that
        name is added as ``"truth"``.
        """
        if topk < 1:
            raise ValueError(f"topk={topk} must be at least 1")
        files = list(files)
        for start in range(0, len(files), batch_size):
            rows, images = [], []
            for file in files[start : start + batch_size]:
                row: dict[str, Any] = {"file": str(file)}
                try:
                    images.append(self.transform(_open(file)))
                except DataError as error:
                    row["error"] = str(error)
                rows.append(row)
            probabilities: Iterator[Tensor] = iter(())
            if images:
                probabilities = iter(self.model(torch.stack(images).to(self.device)).float().softmax(-1).cpu())
            for row in rows:
                if "error" not in row:
                    top = next(probabilities).topk(min(topk, len(self.classes)))
                    row["predictions"] = [
                        {"class": self.classes[i], "index": i, "probability": p}
                        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                    ]
                    if (folder := Path(row["file"]).parent.name) in self.classes:
                        row["truth"] = folder
                yield row


def find_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Image files among ``paths``; directories are searched through, in sorted order.

    Raises:
        FileNotFoundError: no such path. DataError: a directory without images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise DataError(f"no images in the directory {str(path)!r}; accepted: {' '.join(EXTENSIONS)}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no file or directory {str(path)!r}")
    return found


def _open(file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {str(file)!r}: {error}") from error


def _hosted(name: str) -> TNT:
    try:
        if name.startswith(("hf-hub:", "hf_hub:")):
            return from_timm(cast(Any, timm.create_model(name, pretrained=True)))  # which refuses another model
        return create_tnt(name.removeprefix("timm/"), pretrained=True)
    except (OSError, RuntimeError) as error:
        if "No pretrained weights exist" in str(error):
            raise ValueError(f"nobody hosts weights of {name!r}; give a checkpoint file (--checkpoint)") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"cannot fetch the weights of {name!r} ({reason}). Without a network, download the file elsewhere and pass it as "
            "the checkpoint, with this model (--checkpoint FILE --model NAME)"
        ) from error


def _imagenet_classes(count: int) -> list[str]:
    info = ImageNetInfo()
    if count == info.num_classes():
        return [info.index_to_description(i) for i in range(count)]
    return [str(i) for i in range(count)]
