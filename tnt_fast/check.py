"""The files of a data set: which there are, which cannot be trained on, which are held out. ``tnt-fast check``, and each run.

A data set is a folder ``CLASS/…/picture.png``, or a CSV file with the columns ``file,label``; or a folder with two of these,
``train`` and ``val``; or what ``tnt_fast.shards`` reads. Nothing here needs torch.
"""

import csv
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import PIL

import tnt_fast
from tnt_fast.images import EXTENSIONS, DataError, find_images, is_image_name, is_leftover, open_image
from tnt_fast.shards import Named, Picture, find_rows, find_tars
from tnt_fast.terminal import say
from tnt_fast.writing import write

PARTS = ("train", "val")
SHARDS = {"wds": find_tars, "hfds": find_rows}  # by what stands before a path, as with timm
SHOWN = 20  # bad files that an error names


@dataclass
class Files:
    """The files of a data set.

    Attributes:
        root: the data set's folder, or its CSV file.
        parts: its pictures under "train" and "val", or under "" where there is no such division yet.
        bad: file name: why it cannot be trained on.
        same: groups of names of files with the same content.
        order: the names of the classes, where the data set itself has them in an order.
    """

    root: Path
    parts: dict[str, list[Picture]]
    bad: dict[str, str]
    same: list[list[str]]
    order: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        return [picture for part in self.parts.values() for picture in part]

    @property
    def classes(self) -> list[str]:
        """Their names in their own order; or else sorted, as timm sorts them where all are numbers."""
        labels = {picture.label for picture in self.pictures}
        if self.order:
            return [label for label in self.order if label in labels]
        numbers = all(label.isascii() and label.isdecimal() for label in labels)
        return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))

    def counts(self) -> dict[str, dict[str, int]]:
        """Class: part: number of pictures."""
        counted = {part: Counter(picture.label for picture in pictures) for part, pictures in self.parts.items()}
        return {label: {part: count[label] for part, count in counted.items()} for label in self.classes}

    def fingerprint(self) -> dict[str, dict[str, list]]:
        """Part: class: [number of pictures, digest of their names and sizes]."""
        found: dict[str, dict[str, list]] = {}
        for part, pictures in self.parts.items():
            names = defaultdict(list)
            for picture in pictures:
                names[picture.label].append((picture.name, picture.size))
            found[part] = {label: [len(files), _digest(sorted(files))] for label, files in sorted(names.items())}
        return found


def described(fingerprint: dict[str, dict[str, list]]) -> dict[str, str]:
    """A fingerprint with a phrase for each part and class."""
    return {
        f"{part} {label!r}": f"{count:,} images (names and sizes: {digest[:8]})"
        for part, labels in fingerprint.items()
        for label, (count, digest) in labels.items()
    }


def differences(then: dict[str, dict[str, list]], now: dict[str, dict[str, list]]) -> list[str]:
    """What differs between two fingerprints, a phrase for each part and class."""
    found = []
    for part in sorted(then.keys() | now.keys()):
        old, new = then.get(part, {}), now.get(part, {})
        for label in sorted(old.keys() | new.keys()):
            (before, digest), (after, other) = old.get(label, [0, ""]), new.get(label, [0, ""])
            if before != after:
                found.append(f"{part} {label!r} had {before:,} images, now {after:,}")
            elif digest != other:
                found.append(f"{part} {label!r}: other names or sizes")
    return found


def _digest(values: Iterable[Any]) -> str:
    found = hashlib.blake2b(digest_size=12)
    for value in values:
        found.update(ascii(value).encode())  # names that are no UTF-8 have surrogates, which it escapes
    return found.hexdigest()


# ---- which files there are ----


def find(data: str | os.PathLike) -> Files:
    """The files of a data set, by their names alone; none is opened.

    Raises:
        DataError: no data set is there, one without classes, with one class alone, or whose parts have different classes.
    """
    if in_shards(data):
        kind, _, path = os.fspath(data).partition(":")
        root = Path(path)
        files = Files(root, same=[], **SHARDS[kind](root)._asdict())
        _check_classes(files)
        return files
    root = Path(data)
    files = Files(root, {}, {}, [])
    parts = {part: source for part in PARTS if (source := _part(root, part))}
    if len(parts) == 1 and not _is_class(next(iter(parts.values()))):
        there, missing = (*parts, *(part for part in PARTS if part not in parts))
        raise DataError(
            f"no directory {str(root / missing)!r}; expected {root}/train/CLASS and {root}/val/CLASS, or one folder of classes "
            f"and --val-fraction ({str(root / there)!r} with --val-fraction 0.2 holds a fifth of it out), or {_as_shards(root)}"
        )
    if len(parts) != len(PARTS):
        if not (root.is_dir() or root.is_file()):
            raise DataError(
                f"no directory {str(root)!r}; expected {root}/train/CLASS and {root}/val/CLASS with images in them, "
                f"{root}/CLASS, or a CSV file with the columns file,label; of shards, wds:PATH or hfds:PATH"
            )
        parts = {"": root}
    for part, source in parts.items():
        files.parts[part] = (_listed if source.is_file() else _in_folders)(files, source, root)
    twice = sorted(set.intersection(*({picture.name for picture in pictures} for pictures in files.parts.values())))
    if len(parts) > 1 and twice:  # as only CSV files can say
        raise DataError(f"{len(twice):,} files are to be trained on and held out: {', '.join(map(repr, twice[:5]))}")
    _check_classes(files)
    return files


def in_shards(data: str | os.PathLike) -> bool:
    """Whether a data set is named as one of shards, ``wds:PATH`` or ``hfds:PATH``."""
    kind, _, path = os.fspath(data).partition(":")
    return kind in SHARDS and bool(path)


def _part(root: Path, part: str) -> Path | None:
    return next((source for source in (root / part, root / f"{part}.csv") if source.exists()), None)


def _as_shards(folder: Path) -> str:
    """How what is no folder of pictures may be read: shards."""
    tables = any((folder / name).exists() for name in ("dataset_dict.json", "state.json")) or any(folder.glob("*.parquet"))
    kinds = [kind for kind, there in (("wds", any(folder.glob("*.tar"))), ("hfds", tables)) if there]
    return f"{' or '.join(f'{kind}:{folder}' for kind in kinds or SHARDS)} to read shards"


def _is_class(folder: Path) -> bool:
    """A class of things that are called train or val, with its pictures directly inside."""
    return folder.is_dir() and any(map(is_image_name, folder.iterdir()))


def _in_folders(files: Files, source: Path, root: Path) -> list[Picture]:
    """The pictures of a folder of class folders."""
    found, classes = [], []
    for entry in sorted(source.iterdir()):
        if is_leftover(entry) or entry.name.startswith("."):  # such as .git
            continue
        if not entry.is_dir():
            if is_image_name(entry):
                files.bad[_name(entry, root)] = "in no class folder"
            continue
        classes.append(entry.name)
        images, others = find_images(entry)
        files.bad |= {_name(path, root): reason for path, reason in others.items()}
        found += [picture for path in images if (picture := _picture(files, path, root, entry.name))]
    if not classes:
        raise DataError(
            f"{str(source)!r} has no class folder; expected {source}/CLASS with images in each, or {_as_shards(source)}"
        )
    empty = sorted(set(classes) - {picture.label for picture in found})
    if empty:
        raise DataError(
            f"{str(source)!r} holds no images of the classes {', '.join(empty[:SHOWN])}; accepted: {' '.join(EXTENSIONS)}. "
            "Remove a folder that is no class"
        )
    return found


def _listed(files: Files, source: Path, root: Path) -> list[Picture]:
    """The pictures of a CSV file, whose paths start at its folder."""
    found: dict[str, Picture] = {}
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or ()
            if not {"file", "label"} <= {*columns}:
                raise DataError(
                    f"the first line of {str(source)!r} is {','.join(columns)[:200]!r}; expected file,label (with a comma), "
                    "then a picture a line"
                )
            for row in rows:
                name, label = row["file"] or "", (row["label"] or "").strip()
                if not name or not label:
                    raise DataError(f"{str(source)!r}, line {rows.line_num}: expected file,label, found {str(row)[:200]}")
                picture = _picture(files, source.parent / name, root if root.is_dir() else source.parent, label)
                if picture and found.setdefault(picture.name, picture) != picture:
                    files.bad[picture.name] = f"two labels: {found[picture.name].label!r} and {label!r}"
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(source)!r} is no CSV file in UTF-8: {error}; expected the columns file,label") from error
    return list(found.values())


def _picture(files: Files, path: Path, root: Path, label: str) -> Picture | None:
    """None: there is none; ``files.bad`` says why."""
    name = _name(path, root)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        files.bad[name] = "there is no such file" if isinstance(error, FileNotFoundError) else str(reason)
        return None
    return Picture(name, str(path), label, status.st_size, status.st_mtime_ns)


def _name(path: Path, root: Path) -> str:
    return str(path).removeprefix(f"{root}{os.sep}").replace(os.sep, "/")


def _check_classes(files: Files) -> None:
    by_part = {part: {picture.label for picture in pictures} for part, pictures in files.parts.items()}
    if len({frozenset(labels) for labels in by_part.values()}) > 1:
        ours, theirs = by_part["train"], by_part["val"]
        raise DataError(
            f"train/ has {len(ours)} classes, val/ has {len(theirs)}; only in train: {sorted(ours - theirs)[:5]}, "
            f"only in val: {sorted(theirs - ours)[:5]}"
        )
    if not files.classes:
        raise DataError(f"{str(files.root)!r} holds no images; accepted: {' '.join(EXTENSIONS)}")
    if len(files.classes) == 1:
        raise DataError(
            f"{str(files.root)!r} has one class alone, {files.classes[0]!r}, so there is nothing to tell apart; "
            "add pictures of something else as a class of their own"
        )


# ---- which of them cannot be trained on ----


def examine(files: Files, progress: bool | None = None) -> None:
    """Read every picture whole, in parallel; fills ``files.bad`` and ``files.same``.

    What was found is kept in the user's cache under the list of names, sizes and times: the second time takes no time.

    Args:
        progress: show a bar (default: on a terminal).
    """
    from tqdm import tqdm

    pictures = [picture for picture in files.pictures if picture.name not in files.bad]
    about = (tnt_fast.__version__, PIL.__version__, str(files.root.absolute()))
    cache = _cache_folder() / f"{_digest([about, *((p.name, p.size, p.changed) for p in pictures)])}.json"
    found = _cached(cache)
    if found is None:
        sizes = Counter(picture.size for picture in pictures)
        bad, contents = {}, defaultdict(list)

        def read(picture: Picture) -> tuple[str, str]:
            fault = _fault(picture)
            return fault, _content(picture) if not fault and sizes[picture.size] > 1 else ""

        disable = None if progress is None else not progress  # None: only on a terminal
        bar = tqdm(total=len(pictures), desc="checking", unit="file", leave=False, disable=disable)
        with bar, ThreadPool(min(16, os.cpu_count() or 1)) as pool:  # Pillow decodes without Python's lock
            for picture, (fault, content) in zip(pictures, pool.imap(read, pictures, chunksize=8), strict=True):
                if fault:
                    bad[picture.name] = fault
                elif content:
                    contents[content].append(picture.name)
                bar.update()
        found = {"bad": bad, "same": [names for names in contents.values() if len(names) > 1]}
        _keep(found, cache)
    files.bad |= found["bad"]
    files.same = found["same"]
    held_out = {picture.name for picture in files.parts.get("val", [])}
    for names in files.same:
        twins = [name for name in names if name in held_out]
        for name in names:
            if twins and name not in held_out:
                files.bad[name] = f"the same picture as {twins[0]!r}, which is held out"
    files.bad = dict(sorted(files.bad.items()))


def _fault(picture: Picture) -> str:
    try:
        open_image(picture.open(), at_most=256)  # reads it to the end, a JPEG faster than at its full size
    except (DataError, OSError) as error:
        return str(error).removeprefix(f"cannot read the image {picture.path!r}: ")
    return ""


def _content(picture: Picture) -> str:
    try:
        opened = picture.open()
        content = opened.getvalue() if isinstance(opened, Named) else Path(opened).read_bytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    except OSError:
        return ""


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tnt_fast" / "checked"


def _cached(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        return {"bad": dict(found["bad"]), "same": list(found["same"])}
    except (OSError, ValueError, KeyError, TypeError):  # none, or spoilt: look again
        return None


def _keep(found: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(found).encode())
    except OSError:  # it only saves time
        pass


# ---- what is trained on ----


def training_files(
    data: str | os.PathLike, val_fraction: float = 0.0, seed: int = 0, skip_bad: bool = False,
    log: Callable[[str], None] = say, progress: bool | None = None,
) -> Files:  # fmt: skip
    """The files of a data set, examined, in the parts "train" and "val".

    Args:
        val_fraction: of each class to hold out, where the data set is not divided yet. seed: of that choice.
        skip_bad: go on without the files that cannot be trained on; ``log`` gets a line that counts them.

    Raises:
        DataError: there are such files, all in one list; or the data set as a whole cannot be trained on.
    """
    files = find(data)
    if "" in files.parts and not val_fraction:
        raise DataError(
            f"{str(files.root)!r} has no train/ and val/; hold a part of it out with --val-fraction 0.2, "
            f"or expected {data}/train/CLASS and {data}/val/CLASS"
        )
    if "" not in files.parts and val_fraction:
        raise DataError(f"{str(files.root)!r} has a val/ of its own; leave --val-fraction {val_fraction} out")
    examine(files, progress)
    if files.bad:
        total = len({picture.name for picture in files.pictures} | files.bad.keys())
        text = f"{len(files.bad):,} of {total:,} files in {str(data)!r} cannot be trained on: {_shown(files.bad)}"
        if not skip_bad:
            raise DataError(f"{text}; repair or remove them, or leave them out with --skip-bad")
        log(f"left out: {text}")
        classes = set(files.classes)
        files.parts = {part: [p for p in pictures if p.name not in files.bad] for part, pictures in files.parts.items()}
        for part, pictures in files.parts.items():
            if gone := sorted(classes - {picture.label for picture in pictures}):
                raise DataError(f"without the bad files {part or 'the data'} has no images of {gone[:5]}; repair or add some")
    if "" in files.parts:
        files.parts = _split(files, val_fraction, seed)
    return files


def _shown(bad: dict[str, str]) -> str:
    items = [f"{name!r}: {reason}" for name, reason in bad.items()]
    more = f"; and {len(items) - SHOWN:,} more, which 'tnt-fast check' lists" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


def _split(files: Files, fraction: float, seed: int) -> dict[str, list[Picture]]:
    """Hold out a fraction of each class, at least one picture; pictures with the same content stay together.

    What is chosen follows from seed and name, so that a picture more or less leaves nearly all of the others where they are.
    """
    first = {name: group[0] for group in files.same for name in group}
    parts: dict[str, list[Picture]] = {part: [] for part in PARTS}
    held_out: set[str] = set()
    by_class = defaultdict(list)
    for picture in files.parts[""]:
        by_class[picture.label].append(picture)
    for label, pictures in by_class.items():
        units = sorted({first.get(p.name, p.name) for p in pictures}, key=lambda unit: _digest((seed, unit)))
        if len(units) < 2:
            raise DataError(f"the class {label!r} has {len(units)} image; to hold one out it needs 2 different ones")
        held_out |= {*units[: min(max(1, round(fraction * len(units))), len(units) - 1)]}
    for picture in files.parts[""]:
        parts["val" if first.get(picture.name, picture.name) in held_out else "train"].append(picture)
    return parts
