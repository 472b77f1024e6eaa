"""How right, and how sure of it, a model is on labelled images: ``tnt-fast validate``.

Top-1 and top-5 are those of timm's ``validate.py`` for the same weights, to the last image: the same pixels, transform and
classes. Labels are the names of folders, of a CSV file, of shards or of ImageNet's ground truth; which output of the model a
name means is found once for all of them, so that a part of ImageNet's folders is counted right, too.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import natural_key
from torch import Tensor, nn
from tqdm import tqdm

from tnt_fast.check import find, in_shards
from tnt_fast.classify import Classifier
from tnt_fast.images import EXTENSIONS, NO_IMAGE, DataError, find_images, is_image_name, is_leftover
from tnt_fast.shards import Picture
from tnt_fast.terminal import nearest
from tnt_fast.writing import table, write

BINS = 15  # of the confidence, as Guo et al. 2017 (https://arxiv.org/abs/1706.04599) count the calibration error
KEPT = 5  # predictions an image
PARTS = ("val", "validation")  # where timm looks, too
ACCEPTED = (
    "DATA/val/CLASS/*.jpg, DATA/CLASS/*.jpg, a CSV file with the columns file,label, a folder and --ground-truth FILE, or of "
    "shards wds:PATH or hfds:PATH"
)


# ---- which images there are, and what they show ----


class Labelled(NamedTuple):
    """Images with the names of what they show."""

    files: Sequence[Path | Picture]
    labels: list[str]
    others: dict[Path, str]  # what was passed over, with the reason
    in_order: bool  # whether the order of the names may stand for that of the classes, as with folders


def labelled(data: str | Path, ground_truth: str | Path | None = None) -> Labelled:
    """The images of a folder ``[val/]CLASS/…``, of a CSV file ``file,label``, of a folder with a file of ground truth, or of
    shards, ``wds:PATH`` and ``hfds:PATH`` (of several parts the one that is held out).

    Raises:
        DataError: there are none, or nothing says what they show.
    """
    if in_shards(data):
        if ground_truth is not None:
            raise DataError(f"{str(data)!r} has its labels in it; --ground-truth is for a folder of images")
        shards = find(data)
        pictures = shards.parts.get("val") or shards.pictures
        others = {Path(name): why for name, why in shards.bad.items()}
        return Labelled(pictures, [picture.label for picture in pictures], others, not shards.order)
    root = Path(data)
    if root.is_file() and ground_truth is None:
        found = find(root)
        labels = [picture.label for picture in found.pictures]
        return Labelled([Path(p.path) for p in found.pictures], labels, {Path(k): v for k, v in found.bad.items()}, False)
    if not root.is_dir():
        raise DataError(f"no directory {str(root)!r}; expected {ACCEPTED}")
    for part in (root / name for name in PARTS):
        if part.is_dir() and (ground_truth is not None or any(entry.is_dir() for entry in part.iterdir())):
            root = part
            break
    if ground_truth is not None:
        files, others = find_images(root)
        if not files:
            raise DataError(f"{str(root)!r} holds no images; accepted: {' '.join(EXTENSIONS)}")
        return Labelled(files, _read_ground_truth(Path(ground_truth), files), others, False)
    files, labels, others, loose = [], [], {}, []
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not is_leftover(entry) and not entry.name.startswith("."):
            images, more = find_images(entry)
            files += images
            labels += [entry.name] * len(images)
            others |= more
        elif is_image_name(entry):
            loose.append(entry)
    if not files and loose:
        raise DataError(
            f"the {len(loose):,} images in {str(root)!r} lie in no class folder; say what they show with --ground-truth FILE: "
            "LOC_val_solution.csv, the devkit's ILSVRC2012_validation_ground_truth.txt, or NAME LABEL a line"
        )
    if not files:
        raise DataError(f"{str(root)!r} holds no images; accepted: {' '.join(EXTENSIONS)}, in {ACCEPTED}")
    return Labelled(files, labels, others | dict.fromkeys(loose, "in no class folder"), True)


def _read_ground_truth(path: Path, files: Sequence[Path]) -> list[str]:
    """The label of each file, by its name, with or without ending, or by the order of the names.

    Lines are ``NAME LABEL …`` (Kaggle's LOC_val_solution.csv, Caffe's val.txt), or labels alone: synsets, or the numbers of the
    devkit, whose meaning its meta.mat, beside the file, has. Where names end in a number of 8 digits, as ImageNet's do, it
    counts the lines, so that a part of the images suffices.
    """
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"the ground truth {str(path)!r} is no text in UTF-8: {error}; expected NAME LABEL a line") from error
    if lines and lines[0][0] == "ImageId":
        lines = lines[1:]
    widths = {min(len(fields), 2) for fields in lines}
    if len(widths) != 1:
        reason = "has lines with a label alone, and others with a name" if widths else "is empty"
        raise DataError(f"the ground truth {str(path)!r} {reason}; expected NAME LABEL a line, or a label a line")
    if widths == {2}:
        by_name = {PurePath(name).name: label for name, label, *_ in lines}
        found = [by_name.get(file.name, by_name.get(file.stem)) for file in files]
        unknown = [file.name for file, label in zip(files, found, strict=True) if label is None]
        if unknown:
            raise DataError(
                f"the ground truth {str(path)!r} does not name {len(unknown):,} of {len(files):,} images: {unknown[0]!r}, …"
            )
        return [label for label in found if label is not None]
    labels = [label for (label,) in lines]
    if all(label.isdecimal() for label in labels):
        synsets = _devkit(path)
        labels = [synsets.get(label, f"number {label}") for label in labels]
    numbers = [re.search(r"_(\d{8})$", file.stem) for file in files]
    places = [int(found[1]) for found in numbers if found]
    if len(places) < len(files):
        places = [1 + place for place in range(len(files))]
        if len(labels) != len(files):
            raise DataError(
                f"the ground truth {str(path)!r} has {len(labels):,} labels for {len(files):,} images; expected NAME LABEL a "
                "line, or a label for each in the order of their names"
            )
    beyond = [file.name for file, place in zip(files, places, strict=True) if not 1 <= place <= len(labels)]
    if beyond:
        raise DataError(f"the ground truth {str(path)!r} has {len(labels):,} labels, none for {beyond[0]!r}")
    return [labels[place - 1] for place in places]


def _devkit(path: Path) -> dict[str, str]:
    """ImageNet's number of a class, from 1 in an order of its own: its synset."""
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise DataError(
            f"the ground truth {str(path)!r} has numbers alone, whose order only the devkit's meta.mat says: put that beside "
            "it, or give a file with NAME LABEL or a synset (n01440764) a line"
        )
    try:
        from scipy.io import loadmat

        rows = loadmat(meta, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except ImportError as error:
        raise ImportError(f"{str(meta)!r} needs one more package ({error}): pip install scipy") from error
    except Exception as error:  # of a stranger's file
        raise DataError(f"{str(meta)!r} is not the devkit's: {str(error) or type(error).__name__}") from error


def indices(found: Labelled, classifier: Classifier) -> tuple[list[int], str]:
    """The index of each label among the model's outputs, and what the labels were taken for.

    They are names of the classes, synsets of the ImageNet that has as many classes, or numbers from 0; all of them one of
    these. Folders with other names, as many as the model has classes, count in their order, as timm counts them.

    Raises:
        DataError: they are none of these; the message has the nearest names.
    """
    names, count = sorted(set(found.labels), key=natural_key), classifier.model.num_classes
    often = Counter(classifier.classes)
    known = {"the names of classes": {name: i for i, name in enumerate(classifier.classes) if often[name] == 1}}
    if subset := infer_imagenet_subset({"num_classes": count}):
        known["ImageNet's synsets"] = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}
    known["numbers of classes"] = {str(i): i for i in range(count)}
    if found.in_order and not classifier.named and len(names) == count:
        known.setdefault("names in their order", {name: i for i, name in enumerate(names)})
    for kind, index in known.items():
        if all(name in index for name in names):
            return [index[label] for label in found.labels], kind
    kind, index = max(known.items(), key=lambda item: sum(name in item[1] for name in names))
    wrong = [name for name in names if name not in index]
    listed = ", ".join(map(repr, list(index)[:5])) + (", …" if count > 5 else "")
    raise DataError(
        f"{len(wrong):,} of {len(names):,} labels name none of the model's {count:,} classes, such as {wrong[0]!r}"
        f"{nearest(wrong[0], index)}; accepted: {kind}, {listed}"
    )


def examples(classifier: Classifier, data: str | Path, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of labelled images and of the indices of their classes, the images read as ``validate`` reads them.

    Raises:
        DataError: there are none, their labels are not the classifier's classes, or, on the way, one cannot be read.
    """
    found = labelled(data)
    truth, _ = indices(found, classifier)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        begin = 0
        for batch in classifier.read(found.files, batch_size, as_stored=not classifier.trained_here):
            images = []
            for _, image in batch:
                if isinstance(image, DataError):
                    raise image
                images.append(image)
            yield torch.stack(images), torch.tensor(truth[begin : (begin := begin + len(batch))])

    return batches()


# ---- what the model says ----


@dataclass
class Difference:
    """Between the fused path and the reference, on one image."""

    file: str
    fused: str
    reference: str


@dataclass
class Validation:
    """What ``validate`` found, of N images.

    Attributes:
        truth: (N,) index of the class. top: (N, 5 or fewer) indices, most probable first. probability: of each of them.
        loss: (N,) cross-entropy in nats. errors: file: why it was not counted.
        seconds: of all; model_seconds: of the forwards alone, without the first batch where there are more.
        model_images: in those. differences, largest: of the reference's top-1, and of its logits, where it was asked for.
    """

    classes: list[str]
    files: list[str]
    truth: np.ndarray
    top: np.ndarray
    probability: np.ndarray
    loss: np.ndarray
    errors: dict[str, str]
    seconds: float
    model_seconds: float
    model_images: int
    differences: list[Difference] | None = None
    largest: float = 0.0

    @property
    def right(self) -> np.ndarray:
        """(N,) whether the first prediction is right."""
        return self.top[:, 0] == self.truth

    @property
    def right_5(self) -> np.ndarray:
        return (self.top == self.truth[:, None]).any(1)

    def bins(self) -> list[dict[str, float]]:
        """Images, mean confidence and accuracy by bins of the confidence in the first prediction, without empty ones."""
        confidence = self.probability[:, 0]
        place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        rows = []
        for i in range(BINS):
            inside = place == i
            if inside.any():
                means = {"confidence": float(confidence[inside].mean()), "accuracy": float(self.right[inside].mean())}
                rows.append({"from": i / BINS, "to": (i + 1) / BINS, "images": int(inside.sum()), **means})
        return rows

    def figures(self) -> dict[str, Any]:
        """Top-1 and top-5 in percent, rounded as timm's ``validate.py`` does, the calibration error (ECE), images a second."""
        total = len(self.truth)
        ece = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in self.bins()) / total
        found = {
            "images": total,
            "right": int(self.right.sum()),
            "right_5": int(self.right_5.sum()),
            "top1": round(100 * float(self.right.mean()), 4),
            "top5": round(100 * float(self.right_5.mean()), 4),
            "loss": float(self.loss.mean()),
            "ece": float(ece),
            "confidence": float(self.probability[:, 0].mean()),
            "img_s": total / self.seconds,
            "img_s_model": self.model_images / self.model_seconds,
            "unreadable": len(self.errors),
        }
        if self.differences is not None:
            found |= {"differ_from_reference": len(self.differences), "largest_difference": self.largest}
        return found

    def confusion(self) -> tuple[np.ndarray, list[int]]:
        """Images by truth (rows) and first prediction (columns), of the classes that occur; and their indices."""
        occur, place = np.unique(np.concatenate([self.truth, self.top[:, 0]]), return_inverse=True)
        counts = np.zeros((len(occur), len(occur)), dtype=int)
        np.add.at(counts, tuple(place.reshape(2, -1)), 1)
        return counts, occur.tolist()

    def per_class(self) -> list[dict[str, Any]]:
        """A row for each class that occurs as a truth, the worst first."""
        counts, occur = self.confusion()
        rows = []
        for i, index in enumerate(occur):
            own = self.truth == index
            if not own.any():
                continue
            predicted, wrong = counts[:, i].sum(), counts[i].copy()
            wrong[i] = 0
            taken = int(wrong.argmax())
            rows.append(
                {
                    "class": self.classes[index],
                    "index": index,
                    "images": int(own.sum()),
                    "top1": float(self.right[own].mean()),
                    "top5": float(self.right_5[own].mean()),
                    "precision": counts[i, i] / predicted if predicted else None,
                    "taken_for": self.classes[occur[taken]] if wrong[taken] else "",
                    "so_often": int(wrong[taken]),
                }
            )
        return sorted(rows, key=lambda row: (row["top1"], -row["images"], row["index"]))


@torch.inference_mode()
def validate(
    classifier: Classifier, found: Labelled, truth: Sequence[int], *, batch_size: int = 64, amp: str = "off",
    reference: bool = False, progress: bool | None = None,
) -> Validation:  # fmt: skip
    """Run a model over labelled images.

    Images are read as the weights saw them: as timm reads them, or, of weights that ``tnt-fast train`` wrote, as it does
    (``images.open_image``).

    Args:
        truth: index of each image's class. amp: "off", "bfloat16" or "float16". reference: compare with that path, image by
            image. progress: show a bar (default: on a terminal).

    Raises:
        ValueError: the reference is to be compared with itself. DataError: no image can be read.
    """
    model, device = classifier.model, classifier.device
    if reference and model.backend == "reference":
        why = "; ".join(classifier.why_not_fused) or "it was asked for"
        raise ValueError(f"--reference compares the fused path with the reference, which the model takes itself here: {why}")
    autocast = partial(torch.autocast, device.type, None if amp == "off" else getattr(torch, amp), enabled=amp != "off")
    label = dict(zip(found.files, truth, strict=True))
    errors = {str(file): why for file, why in found.others.items() if why != NO_IMAGE}
    files: list[Path | Picture] = []
    tops, probabilities, losses = [], [], []
    times, sizes = [], []
    differences, largest = [], 0.0
    began = time.perf_counter()
    disable = None if progress is None else not progress  # None: only on a terminal
    with tqdm(total=len(found.files), unit="image", leave=False, disable=disable) as bar:
        for batch in classifier.read(found.files, batch_size, as_stored=not classifier.trained_here):
            bar.update(len(batch))
            readable = [(file, image) for file, image in batch if isinstance(image, Tensor)]
            errors |= {str(file): str(image) for file, image in batch if isinstance(image, DataError)}
            if not readable:
                continue
            images = torch.stack([image for _, image in readable]).to(device)
            start = time.perf_counter()
            with autocast():
                logits = model(images).float().cpu()  # waits for the device
            times.append(time.perf_counter() - start)
            sizes.append(len(readable))
            finite = logits.isfinite().all(1)
            errors |= {
                str(file): "the model's outputs are not finite"
                for (file, _), good in zip(readable, finite.tolist(), strict=True)
                if not good
            }
            names, logits = [file for file, _ in readable if str(file) not in errors], logits[finite]
            if reference and names:
                path, model.backend = model.backend, "reference"
                with autocast():
                    own = model(images).float().cpu()[finite]
                model.backend = path
                largest = max(largest, float((own - logits).abs().max()))
                for file, a, b in zip(names, logits.argmax(1).tolist(), own.argmax(1).tolist(), strict=True):
                    if a != b:
                        differences.append(Difference(str(file), classifier.classes[a], classifier.classes[b]))
            targets = torch.tensor([label[file] for file in names], dtype=torch.long)
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
            tops.append(logits.topk(min(KEPT, logits.shape[1])).indices)
            probabilities.append(logits.softmax(-1).gather(1, tops[-1]))
            files += names
    if not files:
        name, why = next(iter(errors.items()))
        raise DataError(f"none of {len(found.files):,} images could be counted; the first: {name!r}: {why}")
    seconds = time.perf_counter() - began
    warm = slice(1 if len(times) > 1 else 0, None)
    return Validation(
        classifier.classes, [str(file) for file in files], np.array([label[file] for file in files]), torch.cat(tops).numpy(),
        torch.cat(probabilities).numpy(), torch.cat(losses).numpy(), errors, seconds, sum(times[warm]), sum(sizes[warm]),
        differences if reference else None, largest,
    )  # fmt: skip


# ---- what is shown of it ----


def summary(result: Validation, worst: int = 5) -> list[str]:
    """Lines for the end."""
    f = result.figures()
    lines = [
        f"top-1 {f['top1']:.3f}% ({f['right']:,} of {f['images']:,})   top-5 {f['top5']:.3f}% ({f['right_5']:,})   "
        f"cross-entropy {f['loss']:.4f}",
        f"calibration: error (ECE, {BINS} bins) {100 * f['ece']:.2f}%; mean confidence {100 * f['confidence']:.2f}%",
        f"throughput: {f['img_s']:.1f} img/s with reading, {f['img_s_model']:.1f} img/s of the model alone",
    ]
    rows = [row for row in result.per_class() if row["so_often"]][:worst]
    for row in rows:
        taken = f", taken for {row['taken_for']} {row['so_often']} times"
        lines.append(f"worst classes: {row['class']} {100 * row['top1']:.1f}% of {row['images']}{taken}")
    if result.differences is not None:
        lines.append(
            f"fused against reference: {len(result.differences)} of {f['images']:,} first predictions differ; "
            f"logits by at most {result.largest:.2g}"
        )
        lines += [f"  {d.file}: fused {d.fused}, reference {d.reference}" for d in result.differences[:20]]
    return lines


def save(result: Validation, folder: Path) -> list[Path]:
    """Write classes.csv, predictions.csv, confusion.csv, confusion.png and calibration.png; returns their paths."""
    from tnt_fast import visualize

    folder.mkdir(parents=True, exist_ok=True)
    counts, occur = result.confusion()
    names = [result.classes[i] for i in occur]
    predictions = [
        {"file": file, "truth": result.classes[truth], "loss": float(loss)}
        | {f"class_{i}": result.classes[index] for i, index in enumerate(top, 1)}
        | {f"probability_{i}": float(p) for i, p in enumerate(probability, 1)}
        for file, truth, top, probability, loss in zip(
            result.files, result.truth, result.top, result.probability, result.loss, strict=True
        )
    ]
    title = f"top-1 {result.figures()['top1']:.2f}% of {len(result.files):,} images"
    written = [
        _write_csv(folder / "classes.csv", result.per_class()),
        _write_csv(folder / "predictions.csv", predictions),
        _write_csv(
            folder / "confusion.csv",
            ({"truth": name, **{f"{i} {n}": c for i, n, c in zip(occur, names, row, strict=True)}}
             for name, row in zip(names, counts.tolist(), strict=True)),
        ),
    ]  # fmt: skip
    pictures = (
        visualize.confusion(counts, names, folder / "confusion.png", title),
        visualize.calibration(result.bins(), result.figures()["ece"], folder / "calibration.png"),
    )
    return [*written, *pictures]


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    rows = list(rows)
    write(path, table(rows, list(rows[0])))
    return path
