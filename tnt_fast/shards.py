"""Where the bytes of a data set's pictures lie: files, tar shards (``wds:PATH``), Hugging Face's tables (``hfds:PATH``).

All are read at random: a run's order follows from its seed, and it can be continued, and divided among ranks, at any step.
timm's reader of shards streams them, and its reader of tars by classes keeps one open file for all who read; so members are
listed here once, with their places, and read from there. timm's reader of tables opens what ``load_dataset`` does, which has
another function for what ``save_to_disk`` wrote; so both kinds are opened here, and their rows read as it reads them.
"""

import io
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tnt_fast.images import EXTENSIONS, MAX_BYTES, NO_IMAGE, DataError, is_image_name, is_leftover

T = TypeVar("T")

HELD_OUT = ("val", "validation", "valid", "test")  # names of the part to hold out; the first that is there
PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7zX": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # how such files begin


class Source(Protocol):
    """A file with many pictures in it."""

    def read(self, place: int, size: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a data set; ``name`` is its path from the data set's folder, with "/"."""

    name: str
    path: str  # of its file; or, for messages, of the file that it is in and its name there
    label: str
    size: int  # bytes
    changed: int  # ns
    source: Source | None = field(default=None, repr=False)  # None: a file of its own
    place: int = 0  # in the source

    def open(self) -> "str | Named":
        """What ``open_image`` takes. Raises OSError."""
        if self.source is None:
            return self.path
        return Named(self.source.read(self.place, min(self.size, MAX_BYTES + 1)), self.path)

    def __str__(self) -> str:
        return self.path


class Named(io.BytesIO):
    """Bytes with the name of the file that they would be."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


class Listing(NamedTuple):
    """What a data set has: as ``check.Files``, and its classes in their own order, if they have one."""

    parts: dict[str, list[Picture]]
    bad: dict[str, str]
    order: list[str]


def _divided(named: Mapping[str, T], root: Path) -> dict[str, T]:
    """What is there under "train" and "val", whatever the latter is called; or else the one part that is there under ""."""
    held_out = next((name for name in HELD_OUT if name in named), None)
    if "train" in named and held_out:
        return {"train": named["train"], "val": named[held_out]}
    if len(named) != 1:
        parts = ", ".join(sorted(named)) or "nothing"
        raise DataError(f"{str(root)!r} has the parts {parts}; expected train and {' or '.join(HELD_OUT)}, or one part alone")
    (part,) = named.values()
    return {"": part}


def _by_part(root: Path, ending: str) -> dict[str, list[Path]]:
    """The files of this ending, by the parts that their names, or those of their folders in ``root``, say.

    Raises:
        DataError: there are none; some belong to no part.
    """
    if root.is_file():
        return {"": [root]}
    named: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob(f"*{ending}") if path.is_file() and not is_leftover(path)):
        words = re.split(r"[^a-z]+", path.relative_to(root).as_posix().lower())
        named.setdefault(next((word for word in words if word in ("train", *HELD_OUT)), ""), []).append(path)
    if not named:
        raise DataError(f"{str(root)!r} holds no files *{ending}" if root.is_dir() else f"no file or directory {str(root)!r}")
    if len(named) > 1 and "" in named:
        raise DataError(
            f"{str(named[''][0])!r} is of no part; expected train or val in the name of each file, or of its folder, or in none"
        )
    return _divided(named, root)


# ---- tar shards ----


@dataclass(frozen=True, slots=True)
class Tar:
    """A tar file, whose members are read by the offsets of their bytes: no state, whichever process reads."""

    path: str

    def read(self, place: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(place)
            return file.read(size)


class _Member(NamedTuple):
    shard: Tar
    inside: str  # the shard's name within the data set
    name: str
    place: int
    size: int
    changed: int


def find_tars(root: Path) -> Listing:
    """The pictures of a tar file or a folder of them.

    WebDataset has ``KEY.cls``, the number or name of a class, beside ``KEY.jpg``. Where no member is called so, a picture's
    folder in the tar is its class, as for timm's reader.

    Raises:
        DataError: there are no shards, or one cannot be read at random.
    """
    shards = _by_part(root, ".tar")
    if root.is_dir() and (packed := [path for end in (".tar.gz", ".tgz") for path in root.rglob(f"*{end}")]):
        raise DataError(f"{str(packed[0])!r} is compressed, and cannot be read at random; unpack the shards (gunzip)")
    bad: dict[str, str] = {}
    members = {part: [m for path in paths for m in _members(path, root, bad)] for part, paths in shards.items()}
    by_key = any(member.name.endswith(".cls") for found in members.values() for member in found)
    label = _by_keys if by_key else _by_folders
    return Listing({part: list(label(found, bad)) for part, found in members.items()}, bad, [])


def _members(shard: Path, root: Path, bad: dict[str, str]) -> Iterator[_Member]:
    """The files in a shard whose bytes are all there; ``bad`` says where it is damaged."""
    where = shard.name if shard == root else shard.relative_to(root).as_posix()
    source, count, classes = Tar(str(shard)), 0, False
    try:
        status = shard.stat()
        with open(shard, "rb") as file:
            start = file.read(4)
            if packed := next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None):
                raise DataError(f"{str(shard)!r} is compressed ({packed}), and cannot be read at random; unpack it")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps a kilobyte of each
                    if member.isdir() or is_leftover(member.name):
                        continue
                    if not member.isfile() or member.issparse():
                        bad[f"{where}/{member.name}"] = "a link, or no plain file"
                    elif member.offset_data + member.size <= status.st_size:
                        count += 1
                        classes = classes or member.name.endswith(".cls")
                        if (
                            not classes or member.name.endswith(".cls") or is_image_name(member.name)
                        ):  # not what no one asks for
                            yield _Member(source, where, member.name, member.offset_data, member.size, status.st_mtime_ns)
                end = tar.offset  # where tarfile stopped, with or without a reason
            file.seek(end)
            if file.read(512) != bytes(512):
                bad[where] = f"truncated or damaged at byte {end:,}, after {count:,} files"
    except (tarfile.TarError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        bad[where] = f"truncated, or no tar file ({str(error).splitlines()[0][:100]}), after {count:,} files"


def _picture(member: _Member, label: str) -> Picture:
    shard, inside, name, place, size, changed = member
    return Picture(f"{inside}/{name}", f"{shard.path}/{name}", label, size, changed, shard, place)


def _by_folders(members: Iterable[_Member], bad: dict[str, str]) -> Iterator[Picture]:
    for member in members:
        label = os.path.basename(os.path.dirname(member.name))
        if not is_image_name(member.name):
            bad[f"{member.inside}/{member.name}"] = NO_IMAGE
        elif label in ("", "."):
            bad[f"{member.inside}/{member.name}"] = "no class: expected KEY.cls beside it, or a class folder around it"
        else:
            yield _picture(member, label)


def _by_keys(members: Iterable[_Member], bad: dict[str, str]) -> Iterator[Picture]:
    """Members of one name up to its first dot are a sample; those that are neither picture nor class are left alone."""
    samples: dict[tuple[str, str], tuple[list[_Member], list[_Member]]] = {}
    for member in members:
        if (is_class := member.name.endswith(".cls")) or is_image_name(member.name):
            folder, base = os.path.split(member.name)
            key = os.path.join(folder, base.partition(".")[0])
            samples.setdefault((member.inside, key), ([], []))[is_class].append(member)
    for (inside, key), (pictures, classes) in samples.items():
        if len(pictures) == len(classes) == 1:
            [picture], [cls] = pictures, classes
            label = cls.shard.read(cls.place, min(cls.size, 1000)).decode("utf-8", "replace").strip()
            if label and label.isprintable() and len(label) <= 200:
                yield _picture(picture, label)
            else:
                bad[f"{inside}/{cls.name}"] = f"no class, but {label!r:.60}; expected a number or a name"
        elif not classes:
            for picture in pictures:
                bad[f"{inside}/{picture.name}"] = f"no class: expected {os.path.basename(key)}.cls beside it"
        elif not pictures:
            bad[f"{inside}/{key}.cls"] = f"no picture beside it; accepted: {' '.join(EXTENSIONS)}"
        else:
            bad[f"{inside}/{key}"] = f"{len(pictures)} pictures and {len(classes)} classes; expected one of each"


# ---- Hugging Face's tables ----


class Rows:
    """The pictures in a column of a table of ``datasets``, as they are stored."""

    def __init__(self, table: Any, column: str):
        self.table, self.column = table, column

    def read(self, place: int, size: int) -> bytes:
        return self.table[place][self.column]["bytes"]


def find_rows(root: Path) -> Listing:
    """The rows of what ``datasets.save_to_disk`` wrote, or of a folder of parquet files.

    Raises:
        DataError: it is no such folder; no column, or several, may be the pictures or their classes.
        ImportError: ``datasets`` is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"hfds: needs one more package ({error}): pip install datasets") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not root.is_dir():
        raise DataError(f"no directory {str(root)!r}; expected what save_to_disk wrote, or a folder of parquet files")
    try:
        if (root / "dataset_dict.json").exists():
            tables = _divided(datasets.load_from_disk(str(root)), root)
        elif (root / "state.json").exists():
            tables = {"": datasets.load_from_disk(str(root))}
        else:  # by the packaged reader of parquet: nothing in the folder is executed
            files = {part or "train": list(map(str, paths)) for part, paths in _by_part(root, ".parquet").items()}
            found = datasets.load_dataset("parquet", data_files=files)
            tables = {part: found[part] for part in files} if len(files) > 1 else {"": found["train"]}
    except DataError as error:
        raise DataError(f"{error}; expected what save_to_disk wrote, or a folder of parquet files") from error
    except Exception as error:  # of whatever library it takes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"cannot read the tables in {str(root)!r}: {reason}") from error
    changed = max(path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file())
    bad: dict[str, str] = {}
    parts, orders = {}, Counter[tuple[str, ...]]()
    for part, table in tables.items():
        parts[part], order = _rows(root, part, table, changed, bad)
        orders[tuple(order)] += 1
    if len(orders) > 1:
        raise DataError(
            f"the parts of {str(root)!r} name their classes differently: {' and '.join(str(o[:5]) for o in orders)}"
        )
    return Listing(parts, bad, list(next(iter(orders))))


def _rows(root: Path, part: str, table: Any, changed: int, bad: dict[str, str]) -> tuple[list[Picture], list[str]]:
    import datasets
    import pyarrow.compute as pc

    column, label = _columns(root, table)
    names: list[str] = list(getattr(table.features[label], "names", []))
    classes = table.select_columns([label])[:][label]
    table = table.cast_column(column, datasets.Image(decode=False))
    stored = table.select_columns([column]).with_format("arrow")[:].column(0)
    sizes = pc.binary_length(pc.struct_field(stored, "bytes")).to_pylist()
    rows, found = Rows(table, column), []
    for row, (value, size) in enumerate(zip(classes, sizes, strict=True)):
        name = f"{part or 'rows'}[{row}]"
        if size is None:
            bad[name] = "no picture in its row"
        elif value is None or value == "" or (isinstance(value, int) and value < 0):
            bad[name] = f"no class: its {label} is {value!r}"
        elif names and value >= len(names):
            bad[name] = f"no class: its {label} is {value}, of {len(names)} that are named"
        else:
            text = names[value] if names else str(value)
            found.append(Picture(name, f"{root}/{name}", text, size, changed, rows, row))
    return found, names


def _columns(root: Path, table: Any) -> tuple[str, str]:
    """Those of the pictures and of the classes."""
    import datasets

    features = dict(table.features)
    kinds = {name: getattr(feature, "dtype", "") for name, feature in features.items()}
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    pictures = pictures or [name for name in features if name in ("image", "img")]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [
        name for name in ("label", "labels", "class") if kinds.get(name, "").startswith(("int", "uint", "string"))
    ]
    for what, found, usual in (("pictures", pictures, ("image",)), ("classes", labels, ("label",))):
        if len(found) != 1 and usual[0] not in found:
            raise DataError(
                f"{str(root)!r} has {len(found) or 'no'} columns that may be the {what}, of {', '.join(features)}; expected "
                f"one, or one called {usual[0]!r}"
            )
    return (
        "image" if "image" in pictures else pictures[0],
        "label" if "label" in labels else labels[0],
    )
