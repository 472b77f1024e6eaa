"""Files that are written whole or not at all."""

import contextlib
import csv
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file beside ``path``, open for writing, which takes its place at the end, or is removed where anything fails.

    No two writers share the name, and where ``path`` is a link, the link is replaced, not what it points to.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write(path: str | os.PathLike, content: bytes) -> None:
    """As ``replacing``, where all of it is there."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing_by_path(path: str | os.PathLike) -> Iterator[Path]:
    """As ``replacing``, for a library that takes a path: a free one of the same name, for a file or for a folder of files."""
    path = Path(path)
    beside = path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name}")
    new, old = beside / path.name, beside / "replaced"
    try:
        beside.mkdir()
        yield new
        for written in [file for file in new.rglob("*") if file.is_file()] if new.is_dir() else [new]:
            with open(written, "rb") as file:
                os.fsync(file.fileno())
        if new.is_dir() and path.exists():  # no call replaces a folder that holds something
            os.rename(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Rows as a CSV file. Names of files keep their bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
