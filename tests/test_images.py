"""Opening image files of strangers: the pixels are those taken; whatever is wrong ends one file, with its name and reason."""

import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tnt_fast.images import DataError, find_images, is_image_name, open_image

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def color(size=(24, 20)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


# ---- what is refused ----

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
REFUSED = {
    "eps.png": (EPS, "it looks like EPS; accepted: BMP, GIF, JPEG"),
    "psd.jpg": (b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(60), "it looks like PSD"),
    "dds.png": (b"DDS " + struct.pack("<I", 124) + bytes(120), "it looks like DDS"),
    "heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(20), "it looks like HEIC"),
    "text.png": (b"no", "no image format that is known here"),
    "empty.png": (b"", "the file is empty"),
    "bomb.png": (png(30000, 30000), "900000000 pixels"),
    "strip.png": (png(30000, 2), "30000 × 2 pixels; accepted: sides of 1 : 1000"),
    "text_chunks.png": (png(4, 4, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 65), "text"),
    "text_bomb.png": (png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22)))), "too large"),
    "cut.png": (png(40, 40), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_picture_ends_with_its_name_and_reason(tmp_path, monkeypatch, name):
    content, reason = REFUSED[name]
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: pytest.fail(f"a program was started: {args}"))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"a program was started: {args}"))
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")  # Ghostscript is there
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / name)
    assert str(caught.value).startswith(f"cannot read the image {str(tmp_path / name)!r}: ")
    assert reason.lower() in str(caught.value).lower()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("start", [b"x", b"BM", b"GIF89a", b"\xff\xd8", b"\x89PNG", b"II*\0", b"RIFF", b"P6 ", b"%!PS"])
def test_a_file_of_few_bytes_is_one_error(tmp_path, start):
    for length in range(1, 20):
        (tmp_path / "short.png").write_bytes((start + bytes(20))[:length])
        with pytest.raises(DataError, match="cannot read the image"):
            open_image(tmp_path / "short.png")


def test_what_is_no_file_is_said_to_be_so_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.symlink(tmp_path / "circle.png", tmp_path / "circle.png")
    (tmp_path / "folder.png").mkdir()
    with (tmp_path / "holes.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(2**36)
    for name, reason in (
        ("pipe.png", "a named pipe, not a file"), ("zero.png", "a device, not a file"), ("circle.png", "symbolic links"),
        ("folder.png", "a directory, not a file"), ("holes.webp", "64.0 GiB; accepted: 1 GiB"), ("no.png", "No such file"),
        ("zero\0.png", "null byte"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=reason):
            open_image(tmp_path / name)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a\nb"), struct.error("c"), KeyError("d"), AttributeError("e")])
def test_whatever_a_decoder_raises_is_one_error(tmp_path, monkeypatch, error):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(DataError, match=r"cannot read the image '.*a\.png': ('d'|MemoryError|[ace])$"):
        open_image(tmp_path / "a.png")


# ---- the pixels ----


def opened(image: Image.Image, path: Path, **how) -> np.ndarray:
    image.save(path, **how)
    found = open_image(path)
    assert found.mode == "RGB"
    return np.asarray(found)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_photo_stands_upright(tmp_path, orientation, suffix):
    image = Image.fromarray(color())
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if suffix == "webp" else {}
    found = opened(image, tmp_path / f"a.{suffix}", exif=exif, **how)
    with Image.open(tmp_path / f"a.{suffix}") as again:
        expected = np.asarray(ImageOps.exif_transpose(again))
    assert found.shape[:2] == ((24, 20) if orientation < 5 else (20, 24))
    assert (found == expected).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_do_not_lose_the_photo(tmp_path):
    found = opened(Image.fromarray(color()), tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert found.shape == (24, 20, 3)


def wide(dtype, factor) -> Image.Image:
    return Image.fromarray(GRAY.astype(dtype) * np.dtype(dtype).type(factor))


@pytest.mark.parametrize(
    ("dtype", "factor", "suffix"),
    [
        ("uint16", 257, "png"), ("uint16", 257, "tif"), ("int32", 257, "pgm"), ("int32", 257, "tif"),
        ("int32", 1, "tif"), ("int32", 8421504, "tif"), ("float32", 1 / 255, "tif"), ("float32", 1, "tif"),
        ("float32", 257, "tif"),
    ],
)  # fmt: skip
def test_gray_values_of_more_bits_are_scaled_and_not_cut_to_white(tmp_path, dtype, factor, suffix):
    found = opened(wide(dtype, factor), tmp_path / f"a.{suffix}")
    assert (found == GRAY[..., None]).all()


def tiff(values: np.ndarray, bits: int, kind: int, photometric: int = 1) -> bytes:
    """A TIFF of one strip, little-endian."""
    tags = [(256, 4, 16), (257, 4, 16), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 200), (277, 3, 1),
            (278, 4, 16), (279, 4, values.nbytes), (339, 3, kind)]  # fmt: skip
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, type_, 1, value) for tag, type_, value in tags)
    return (b"II*\0\x08\0\0\0" + ifd + bytes(4)).ljust(200, b"\0") + values.tobytes()


@pytest.mark.parametrize(
    ("values", "bits", "kind", "photometric"),
    [
        (GRAY.astype("<u4") * 0x01010101, 32, 1, 1),  # above 2^31, which Pillow reads as negative
        ((GRAY.astype("<i2") << 7) | (GRAY >> 1), 16, 2, 1),
        (65535 - GRAY.astype("<u2") * 257, 16, 1, 0),  # white is zero
        (1 - GRAY.astype("<f4") / 255, 32, 3, 0),
    ],
)
def test_a_tiff_is_read_by_its_tags(tmp_path, values, bits, kind, photometric):
    (tmp_path / "a.tif").write_bytes(tiff(values, bits, kind, photometric))
    assert (np.asarray(open_image(tmp_path / "a.tif")) == GRAY[..., None]).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (GRAY.astype("float32") - 9, "reach from -9.0 to 246.0; accepted: finite ones that are not negative"),
        (np.where(GRAY == 7, np.nan, GRAY).astype("float32"), "reach from nan to nan"),
        (GRAY.astype("float32") * 1e9, "reach 2550000.*; accepted: 0 to 1"),
        (GRAY.astype("int32") - 9, "reach from -9 to 246"),
    ],
)
def test_gray_values_without_a_range_are_refused(tmp_path, values, reason):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=reason):
        open_image(tmp_path / "a.tif")


def test_what_is_transparent_is_seen_on_white(tmp_path):
    half = np.dstack([np.zeros((16, 16, 3), np.uint8), GRAY])
    expected = 255 - GRAY[..., None].astype(int)
    assert abs(opened(Image.fromarray(half), tmp_path / "rgba.png") - expected).max() <= 1
    assert abs(opened(Image.fromarray(half[..., 2:]), tmp_path / "la.png") - expected).max() <= 1
    palette = Image.fromarray(GRAY // 128, "P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    found = opened(palette, tmp_path / "palette.png", transparency=0)
    assert (found[:8] == 255).all()
    assert (found[8:] == (10, 20, 30)).all()
    assert (opened(palette, tmp_path / "palette.gif")[8:] == (10, 20, 30)).all()


def test_cmyk_is_as_its_rgb(tmp_path):
    pixels = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    cmyk = Image.fromarray(pixels).convert("CMYK")
    assert (opened(cmyk, tmp_path / "a.tif") == pixels).all()
    assert abs(opened(cmyk, tmp_path / "a.jpg", quality=100).astype(int) - pixels).max() <= 3


def test_a_thumbnail_of_a_photo_is_decoded_small_and_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1600, 800), (250, 10, 200)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    thumbnail = open_image(tmp_path / "a.jpg", at_most=100)
    assert thumbnail.size == (50, 100)
    assert abs(np.asarray(thumbnail).astype(int) - (250, 10, 200)).max() <= 3


# ---- which files ----


def test_leftovers_are_no_images_and_links_in_a_circle_end(tmp_path):
    for name in ("b.JPG", "a.png", "._a.png", ".DS_Store", "Thumbs.db", "notes.txt", "below/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    os.symlink(tmp_path, tmp_path / "below" / "up")
    os.symlink("circle.png", tmp_path / "circle.png")
    images, others = find_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in images] == ["a.png", "b.JPG", "below/c.webp", "circle.png"]
    assert set(others) == {tmp_path / "notes.txt", tmp_path / "below" / "up"}
    assert "searched already" in others[tmp_path / "below" / "up"]
    assert "not an image by its name" in others[tmp_path / "notes.txt"]
    assert not is_image_name("._a.png")


def test_all_that_torchvision_takes_for_an_image_is_one():
    folder = pytest.importorskip("torchvision.datasets.folder")
    assert [name for name in folder.IMG_EXTENSIONS if not is_image_name("a" + name.upper())] == []
