"""``tnt-fast visualize``: a page that shows what a TNT makes of images, with pictures and arrays beside it.

The page is one file, ``page.html`` with its data inside: it opens without a network, and asks for nothing.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tnt_fast import seeing, visualize
from tnt_fast.images import DataError, open_image
from tnt_fast.seeing import Seen, Subject
from tnt_fast.terminal import printable
from tnt_fast.writing import replacing, write

MOST_IMAGES = 16
MOST_VALUES = 12_000_000  # of an image's attention on the page, a byte each; above, the mean of its heads
MAPS = 24  # feature maps of a block that are shown
TEMPLATE = Path(__file__).with_name("page.html")


class Page(NamedTuple):
    """Where everything was written."""

    page: Path
    others: list[Path]


def check(files: Sequence[Path], folder: Path) -> list[Image.Image]:
    """The pictures of these files, all of them read before anything is computed or written.

    Raises:
        DataError: one cannot be read, or there are too many for a page. FileNotFoundError, NotADirectoryError: the folder.
    """
    if len(files) > MOST_IMAGES:
        raise DataError(f"{len(files):,} images are named; a page takes {MOST_IMAGES} at most")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {str(folder)!r} is a file; accepted: a folder, or a name that is free")
    if not folder.exists() and not folder.parent.is_dir():
        raise FileNotFoundError(f"--out {str(folder)!r}: there is no directory {str(folder.parent)!r}; make it first")
    return [open_image(file) for file in files]


def chosen(blocks: Sequence[int] | None, depth: int) -> list[int]:
    """The blocks whose feature maps are shown, counted from 1 as in the paper; None: the first, the middle, the last.

    Raises:
        ValueError: one is not there.
    """
    if blocks is None:
        return sorted({1, (depth + 1) // 2, depth})
    if wrong := [block for block in blocks if not 1 <= block <= depth]:
        named = ", ".join(map(str, wrong))
        raise ValueError(f"--blocks {named}: this model has blocks 1 to {depth}, counted from 1 as in the paper")
    return sorted(set(blocks))


def write_page(
    subject: Subject, files: Sequence[Path], images: Sequence[Image.Image], folder: Path, blocks: Sequence[int] | None = None,
    beside: Subject | None = None, step: Callable[[Any], Any] = iter,
) -> Page:  # fmt: skip
    """Look at the images, and write ``index.html``, with a folder for each image: pictures and ``arrays.npz``.

    Args:
        images: those of ``files``. blocks: as ``chosen``. beside: whose feature maps are shown beside the TNT's.
        step: goes over the images, for a progress bar.
    """
    blocks = chosen(blocks, len(subject.model.blocks))
    folder.mkdir(exist_ok=True)
    positions = seeing.position_similarity(subject.model)
    others, shown = _write_positions(subject, positions, folder), []
    names = _folders(files)
    for file, image, name in step(list(zip(files, images, names, strict=True))):
        seen = seeing.see(subject, image)
        if wrong := [field for field, values in seen._asdict().items() if not np.isfinite(values).all()]:
            raise DataError(
                f"what the model makes of {str(file)!r} is not finite ({', '.join(wrong)}); other weights may do better"
            )
        features = None if beside is None else seeing.features_beside(beside, image)
        maps = [seen.features[-1], *([] if features is None else [features[-1]])]
        places = seeing.spread(*maps)
        others += _write_pictures(subject, beside, seen, features, places, blocks, folder / name)
        shown.append({"name": printable(file.name, 80), **_shown(subject, seen, features, places, blocks)})
    data = {
        "model": _described(subject, beside, blocks),
        "colors": {name: _bytes(visualize.colors(name)) for name in ("magma", "RdBu_r")},
        "positions": [None if x is None else _bytes((np.clip(x, -1, 1) + 1) * 127.5) for x in positions],
        "images": shown,
    }
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no name in it ends the script
    page = TEMPLATE.read_text("utf-8").replace("/*DATA*/", text, 1)
    write(folder / "index.html", page.encode("utf-8"))
    return Page(folder / "index.html", others)


def _folders(files: Sequence[Path]) -> list[str]:
    """A name for each image's folder: its own as far as any system takes it, and each once."""
    names: list[str] = []
    for file in files:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", file.stem).strip("._")[:60] or "image"
        name, count = stem, 1
        while name.lower() in {other.lower() for other in names}:
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


# ---- the data of the page ----


def _bytes(values: Any) -> str:
    """Values of 0 to 255, rounded, in base64."""
    return base64.b64encode(np.rint(values).astype(np.uint8).tobytes()).decode()


def _scaled(values: np.ndarray) -> dict[str, Any]:
    """A byte a value between the smallest and the largest of all."""
    low, high = float(values.min()), float(values.max())
    return {"bytes": _bytes((values - low) * (255 / ((high - low) or 1))), "low": low, "high": high}


def _rows(maps: np.ndarray) -> dict[str, Any]:
    """Attention on the page: a byte a value, as a part of the largest of its row, which stands beside them as a float32."""
    if maps.size > MOST_VALUES:
        maps = maps.mean(-3, keepdims=True)
    most = maps.max(-1, keepdims=True, initial=np.finfo(np.float32).tiny)
    return {
        "heads": maps.shape[-3],
        "bytes": _bytes(maps * (255 / most)),
        "most": base64.b64encode(most.astype("<f4").tobytes()).decode(),
    }


def _described(subject: Subject, beside: Subject | None, blocks: list[int]) -> dict[str, Any]:
    model = subject.model
    embed = model.pixel_embed
    return {
        "name": subject.name,
        "beside": None if beside is None else _name_beside(subject, beside),
        "weights": printable(subject.source, 80),
        "parameters": sum(p.numel() for p in model.parameters()),
        "depth": len(model.blocks),
        "hasInner": [block.has_inner for block in model.blocks],
        "grid": embed.grid_size,
        "patch": embed.patch_size,
        "step": embed.patch_stride,
        "inside": embed.new_patch_size,
        "pixels": [side // embed.stride for side in embed.img_size],
        "size": embed.img_size,
        "blocks": blocks,
        "heads": [int(model.blocks[0].attn_out.num_heads), int(model.sizes()["H"])],
    }


def _name_beside(subject: Subject, beside: Subject) -> str:
    """The other's name, with what tells it from a subject of the same."""
    if beside.name != subject.name:
        return beside.name
    inner = any(getattr(block, "has_inner", False) for block in beside.model.blocks)
    return f"{beside.name} ({printable(beside.source, 40) if inner else 'no inner transformers'})"


def _shown(
    subject: Subject, seen: Seen, features: np.ndarray | None, places: list[np.ndarray], blocks: list[int]
) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(seen.image).save(buffer, "PNG")
    both = [seen.features[-1], *([] if features is None else [features[-1]])]
    return {
        "picture": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "prediction": _prediction(subject, seen),
        "inner": _rows(seen.inner),
        "outer": _rows(seen.outer),
        "rollout": _scaled(seen.rollout),
        "twoLevel": _scaled(seen.two_level_rollout),
        "pixels": [_scaled(pixels) for pixels in seen.pixels],
        "features": [
            [{"channel": channel, **_scaled(x)} for channel, x in _some(seen.features[block - 1]).items()] for block in blocks
        ],
        "distance": [_rounded(seen.outer_distance), _rounded(seen.inner_distance)],
        "similarity": _similarity(seen, features),
        "spread": [
            {"places": _rounded(place), "grid": x.shape[:2], "maps": [_scaled(one)["bytes"] for one in np.moveaxis(x, -1, 0)]}
            for place, x in zip(places, both, strict=True)
        ],
    }


def _prediction(subject: Subject, seen: Seen) -> str | None:
    if not seen.probabilities.size:
        return None
    best = int(seen.probabilities.argmax())
    return f"{printable(subject.classes[best], 60)}, {visualize.percent(float(seen.probabilities[best]))}"


def _some(features: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the feature maps ``(rows, columns, E)`` of a block, evenly spread over its channels, by the channel's number."""
    channels = np.linspace(0, features.shape[-1] - 1, min(MAPS, features.shape[-1])).astype(int)
    return {str(channel): features[..., channel] for channel in channels}


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values.astype(float), 4).tolist()


def _similarity(seen: Seen, features: np.ndarray | None) -> dict[str, list[list[float]]]:
    """By block, of the TNT and of what is beside it: between patches, and between feature maps."""
    patches, maps = [seen.patch_similarity], [seen.map_similarity]
    if features is not None:
        found = seeing.similarities(features)
        patches, maps = [*patches, found[0]], [*maps, found[1]]
    return {"patches": [_rounded(x) for x in patches], "maps": [_rounded(x) for x in maps]}


# ---- pictures and arrays ----


def _write_positions(subject: Subject, positions: tuple[np.ndarray | None, np.ndarray | None], folder: Path) -> list[Path]:
    embed = subject.model.pixel_embed
    found = []
    for what, similarity, grid in zip(("patch", "pixel"), positions, (embed.grid_size, embed.new_patch_size), strict=True):
        if similarity is not None:
            title = f"Cosine of each {what}'s position encoding with all others', tile by tile"
            found.append(visualize.mosaic(_tiles(similarity, grid), grid, folder / f"{what}-positions.png", title))
    return found


def _attention(subject: Subject, seen: Seen) -> dict[str, dict[str, np.ndarray]]:
    """By block, mean of the heads: of the class token, and on both levels of the patch that its rollout has most of."""
    rows, columns = seen.rollout.shape
    patch = int(seen.rollout.argmax())
    outer, inner = seen.outer.mean(1)[:, :, 1:], seen.inner.mean(2)
    after = [f"block {i}" for i in range(1, len(outer) + 1)]
    with_inner = [name for name, block in zip(after, subject.model.blocks, strict=True) if block.has_inner]
    here = f"the patch in row {patch // columns + 1}, column {patch % columns + 1}"
    found = {
        "What the class token attends to": dict(zip(after, outer[:, 0].reshape(-1, rows, columns), strict=True)),
        f"What {here} attends to": dict(zip(after, outer[:, 1 + patch].reshape(-1, rows, columns), strict=True)),
    }
    if with_inner:
        tiles = [_tiles(x[patch], subject.model.pixel_embed.new_patch_size) for x in inner]
        found[f"Inner attention of {here}: a tile for each of its pixels"] = dict(zip(with_inner, tiles, strict=True))
    return found


def _tiles(rows: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Rows over the cells of a grid, one for each cell, ``(cells, cells)``, as a grid of grids."""
    return rows.reshape(*grid, *grid).transpose(0, 2, 1, 3).reshape(grid[0] ** 2, grid[1] ** 2)


def _write_pictures(
    subject: Subject, beside: Subject | None, seen: Seen, features: np.ndarray | None, places: list[np.ndarray],
    blocks: list[int], folder: Path,
) -> list[Path]:  # fmt: skip
    folder.mkdir(exist_ok=True)
    depth, names = len(seen.features), [subject.name] + ([] if beside is None else [_name_beside(subject, beside)])
    after = [f"block {i}" for i in range(1, depth + 1)]
    with_inner = [i for i, block in enumerate(subject.model.blocks, 1) if block.has_inner]
    found = [
        visualize.maps(
            {f"Patch feature maps after block {i}, some of the channels": _some(seen.features[i - 1]) for i in blocks},
            folder / "features.png",
        ),
        visualize.maps(
            {"Pixel embeddings, averaged over their channels": dict(zip(["stem", *after], seen.pixels, strict=True))},
            folder / "pixels.png",
        ),
        visualize.maps(_attention(subject, seen), folder / "attention.png"),
        visualize.overlay(
            seen.image, {"outer rollout": seen.rollout, "two-level rollout": seen.two_level_rollout}, folder / "rollout.png"
        ),
        visualize.by_block(
            {"patches, by head": (range(1, depth + 1), seen.outer_distance),
             "pixels in a patch, by head": (with_inner, seen.inner_distance)},
            folder / "distance.svg", "Attention distance", "image pixels",
        ),
    ]  # fmt: skip
    similarity = _similarity(seen, features)
    for what, file in (("patches", "patch-similarity.svg"), ("maps", "map-similarity.svg")):
        series = {name: (range(1, len(x) + 1), np.array(x)) for name, x in zip(names, similarity[what], strict=True)}
        of = {"patches": "patches", "maps": "feature maps"}[what]
        found.append(visualize.by_block(series, folder / file, f"How alike the {of} are", "mean |cosine| of pairs"))
    found.append(
        visualize.points(dict(zip(names, places, strict=True)), folder / "spread.svg", "t-SNE of the last feature maps")
    )
    arrays = {name: x for name, x in seen._asdict().items()}
    arrays |= {f"spread_{i}": x for i, x in enumerate(places)} | ({} if features is None else {"features_beside": features})
    with replacing(folder / "arrays.npz") as file_of_arrays:
        np.savez(file_of_arrays, **arrays)
    return [*found, folder / "arrays.npz"]
