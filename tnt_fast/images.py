"""Image files of strangers: which there are, and the pixels of one as it was taken.

Training, the check of data, classification and pictures open every image here, so that all of them see the same pixels and
refuse the same files.
"""

import contextlib
import glob
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

# Raster formats whose decoders run inside Pillow. Of others, some start programs (EPS: Ghostscript), many are hardly tried.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = (
    ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip
NO_IMAGE = "not an image by its name"
MAX_RATIO = 1000  # of the sides: a transform scales the short one up, and the long one with it. Pillow limits the pixels
MAX_BYTES = 2**30  # of a file; a file with holes costs its sender nothing

LEFTOVERS = (".DS_Store", ".ipynb_checkpoints", "Thumbs.db", "__MACOSX")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation. ImageOps.exif_transpose writes the EXIF data anew as well, and so fails for more of them


class DataError(ValueError):
    """Images that cannot be trained on or classified."""


def is_leftover(path: str | os.PathLike) -> bool:
    """Whether a file or folder of this name is what macOS, Windows or a notebook left behind, and nobody's image or class."""
    name = os.path.basename(os.fspath(path))
    return name in LEFTOVERS or name.startswith("._")


def is_image_name(path: str | os.PathLike) -> bool:
    """Whether a file of this name is taken for an image."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS and not is_leftover(path)


def find_images(folder: str | os.PathLike) -> tuple[list[Path], dict[Path, str]]:
    """What lies in a folder and below it: the images by their names, sorted, and all else with the reason why not.

    Links are followed, but no folder is searched twice, so links in a circle come to an end. Leftovers are in neither.
    """
    images: list[Path] = []
    others: dict[Path, str] = {}
    seen = set()

    def unlisted(error: OSError) -> None:
        others[Path(error.filename)] = f"cannot be listed: {error.strerror}"

    for root, folders, names in os.walk(Path(folder), onerror=unlisted, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            others[Path(root)] = "a link to a folder that was searched already"
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        for name in names:
            if is_image_name(name):
                images.append(Path(root, name))
            elif not is_leftover(name):
                others[Path(root, name)] = NO_IMAGE
    return sorted(images), others


def named_images(paths: Iterable[str | os.PathLike]) -> tuple[list[Path], dict[Path, str]]:
    """The images that the arguments of a command name, in their order, and what was passed over, with the reason.

    An argument is a file, a folder, a pattern that the shell left as it is (``photos/**/*.jpg``), or ``-`` for a list of files
    and folders on standard input, one a line or, where it holds any, between NUL characters.

    Raises:
        FileNotFoundError: no such path. DataError: a folder or list without images.
    """
    images: list[Path] = []
    others: dict[Path, str] = {}
    for argument in paths:
        name = os.fspath(argument)
        listed = name == "-"
        for path in _listed() if listed else _named(name, others):
            if not path.is_dir():
                images.append(path)  # whatever it is: opening it says so
                continue
            inside, outside = find_images(path)
            if not inside and not listed:
                raise DataError(f"no images in the directory {str(path)!r}; accepted: {' '.join(EXTENSIONS)}")
            images += inside
            others |= outside
    return images, others


def _listed() -> list[Path]:
    text = sys.stdin.buffer.read()
    found = [Path(os.fsdecode(name)) for name in (text.split(b"\0") if b"\0" in text else text.splitlines()) if name.strip()]
    if not found:
        raise DataError("the list on standard input is empty; expected a file or folder a line")
    return found


def _named(name: str, others: dict[Path, str]) -> list[Path]:
    if os.path.lexists(name):
        return [Path(name)]
    if not glob.has_magic(name):
        raise FileNotFoundError(f"no file or directory {name!r}")
    found = []
    for path in map(Path, sorted(glob.iglob(name, recursive=True))):
        if is_image_name(path) or (path.is_dir() and "**" not in name and not is_leftover(path)):
            found.append(path)
        elif not path.is_dir() and not is_leftover(path):
            others[path] = NO_IMAGE
    if not found:
        raise FileNotFoundError(f"no image matches {name!r}; accepted: {' '.join(EXTENSIONS)}")
    return found


def open_image(file: str | os.PathLike | BinaryIO, at_most: int | None = None, as_stored: bool = False) -> Image.Image:
    """The first picture of a file as RGB with 8 bits a channel, upright as its EXIF orientation says.

    Gray values of more bits are scaled: 16 bits from their whole range; 32-bit integers from the first of 0…255, 0…65,535 and
    the whole range that holds them all; floats from the first of 0…1, 0…255 and 0…65,535. What is transparent is seen on white.

    Args:
        file: its path, or its bytes, open and with a ``name``.
        at_most: longest side in pixels, of a thumbnail; a JPEG is then decoded at a fraction of its size.
        as_stored: as timm and torchvision read it: Pillow's ``convert("RGB")``, neither turned nor scaled nor laid on white.

    Raises:
        DataError: names the file and why it cannot be read, whatever is wrong with it.
    """
    try:
        _refuse_unread(file)
        with Image.open(file, formats=FORMATS) as image:
            if max(image.size) > MAX_RATIO * min(image.size):
                raise ValueError(f"{image.width} × {image.height} pixels; accepted: sides of 1 : {MAX_RATIO} at most")
            if at_most is not None:
                image.draft(None, (at_most, at_most))
            image.load()
            rgb = image.convert("RGB") if as_stored else _rgb(image)
            turn = None if as_stored else _TURNS.get(_orientation(image))
        if at_most is not None:
            rgb.thumbnail((at_most, at_most))
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # a decoder may raise anything for what a stranger made: DecompressionBombError, struct.error …
        name = os.fspath(file) if isinstance(file, str | os.PathLike) else file.name
        raise DataError(f"cannot read the image {name!r}: {_reason(file, error)}") from error


def _refuse_unread(file: str | os.PathLike | BinaryIO) -> None:
    if isinstance(file, str | os.PathLike):
        status = os.stat(file)
        kinds = (
            (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
            (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
        )  # fmt: skip
        for is_kind, kind in kinds:
            if is_kind(status.st_mode):
                raise ValueError(f"{kind}, not a file")
        size = status.st_size
    else:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    if size > MAX_BYTES:
        raise ValueError(f"{size / 2**30:.1f} GiB; accepted: {MAX_BYTES / 2**30:.0f} GiB at most")
    if size == 0:
        raise ValueError("the file is empty")


def _reason(file: str | os.PathLike | BinaryIO, error: Exception) -> str:
    """One line; what an unknown format is, as far as Pillow knows, instead of "cannot identify"."""
    if isinstance(error, Image.UnidentifiedImageError):
        named = _format(file)
        known = f"it looks like {named}" if named else "no image format that is known here, or its beginning is broken"
        return f"{known}; accepted: {', '.join(FORMATS)}"
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]


def _format(file: str | os.PathLike | BinaryIO) -> str | None:
    """The format that a file's first bytes belong to, asked of Pillow without decoding."""
    with open(file, "rb") if isinstance(file, str | os.PathLike) else contextlib.nullcontext(file) as opened:
        opened.seek(0)
        prefix = opened.read(16).ljust(16, b"\0")  # some of Pillow's tests expect that many
    if prefix[4:8] == b"ftyp" and prefix[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "HEIC"
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        if name not in FORMATS and accepts and accepts(prefix) is True:
            return name
    return None


def _orientation(image: Any) -> int:
    """1 to 8 as EXIF counts; 1, upright, where there is none that can be read."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF data beside sound pixels
        return 1


def _rgb(image: Any) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(image))
    if "transparency" in image.info or image.getbands()[-1] in ("A", "a"):
        if image.mode in ("La", "PA"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _eight_bits(image: Any) -> np.ndarray:
    """Gray values of more bits, scaled to 0…255."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF, which alone says how many bits, with which sign
    bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]
    if values.dtype == np.int32 and bits == 32 and kind == 1:
        values = values.view(np.uint32)
    low, high = values.min(), values.max()
    if not (low >= 0 and np.isfinite(high)):
        raise ValueError(f"its gray values reach from {low} to {high}; accepted: finite ones that are not negative")
    if image.mode == "F":
        tops = [1, 255, 65535]
    elif bits < 32:
        tops = [2 ** (bits - (kind == 2)) - 1]
    else:
        tops = [255, 65535, np.iinfo(values.dtype).max]
    fitting = [top for top in tops if high <= top]
    if not fitting:
        raise ValueError(f"its gray values reach {high}; accepted: 0 to 1, to 255 or to 65535")
    scaled = values * np.float32(255 / fitting[0])
    if tags.get(262) == 0 and image.mode != "I":  # white is zero, which Pillow turns for 8 bits alone
        scaled = 255 - scaled
    return np.rint(scaled).astype(np.uint8)
