"""Pictures of a run, of predictions, of what a model makes of an image; needs matplotlib (``tnt_fast[pictures]``)."""

import io
import math
import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnt_fast.images import DataError, open_image
from tnt_fast.terminal import printable
from tnt_fast.writing import write

CELL = 1.25  # inches of an image on a page
DPI = 130
MOST_NAMED, MOST_NUMBERED = 50, 20  # classes of a confusion with their names, with the counts
# Whichever of these is installed draws what matplotlib's own font cannot: Chinese, Japanese, Korean
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "PingFang SC", "Hiragino Sans GB", "Heiti TC", "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic",
    "Arial Unicode MS",
)  # fmt: skip


def _style() -> Any:
    """What a picture is drawn with: the text of strangers is text, neither mathematics nor TeX, in fonts that have it."""
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "tnt_fast[pictures]"') from error
    installed = set(font_manager.fontManager.get_font_names())
    family = ["DejaVu Sans", *(font for font in FONTS if font in installed)]
    return matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "font.family": family})


def _figure(**kwargs: Any) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(layout="constrained", **kwargs)


def _save(figure: Any, path: str | os.PathLike) -> Path:
    path = Path(path)
    buffer = io.BytesIO()  # drawn whole before the file is touched
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, dpi=DPI, format=path.suffix.lstrip(".") or "png")
    if any("missing from" in str(warning.message) for warning in caught):  # one warning a character
        warnings.warn(
            f"{str(path)!r} shows boxes for characters that no installed font has; install one, such as Noto Sans CJK",
            stacklevel=3,
        )
    write(path, buffer.getvalue())
    return path


def _label(text: str, width: int, keep_end: bool = False) -> str:
    """The text in one line of at most ``width`` columns (a Chinese character takes two), control characters escaped.

    With them an SVG file would be no XML.
    """
    shown = printable(text)
    columns = [1 + (unicodedata.east_asian_width(char) in "WF") for char in shown]
    if sum(columns) <= width:
        return shown
    if keep_end:
        return "…" + _fitting(shown[::-1], columns[::-1], width - 1)[::-1]
    return _fitting(shown, columns, width - 1) + "…"


def _fitting(text: str, columns: list[int], width: int) -> str:
    taken = 0
    for i, each in enumerate(columns):
        taken += each
        if taken > width:
            return text[:i]
    return text


def percent(probability: float) -> str:
    """``80%``, ``1.2%``, ``0.03%``: two digits where a whole number would have one or none."""
    return f"{probability:.0%}" if probability >= 0.0995 else f"{100 * probability:.2g}%"


def training_curve(history: Sequence[dict[str, Any]], path: str | os.PathLike, title: str = "") -> Path:
    """Loss and held-out accuracy over epochs, from the ``history`` that ``tnt-fast train`` keeps."""
    with _style():
        from matplotlib.ticker import MaxNLocator

        figure = _figure(figsize=(9, 3.6))
        loss, accuracy = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in history]
        how = {"marker": "o" if len(epochs) == 1 else None}  # a line through one point is nothing
        loss.plot(epochs, [row["train_loss"] for row in history], label="training", **how)
        loss.plot(epochs, [row["val_loss"] for row in history], label="held out", **how)
        loss.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
        loss.legend()
        values = [100 * row["val_accuracy"] for row in history]
        accuracy.plot(epochs, values, color="tab:green", **how)
        last = f", last {values[-1]:.1f}%" if values else ""
        accuracy.set(xlabel="epoch", ylabel="held-out accuracy (%)", title=f"Accuracy{last}")
        for axes in (loss, accuracy):
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.suptitle(_label(title, 100, keep_end=True))
        return _save(figure, path)


def prediction_page(results: Sequence[dict[str, Any]], path: str | os.PathLike, title: str = "", most: int = 60) -> Path:
    """A page of images, each with its name, first prediction and probability, as ``tnt-fast classify`` returns them.

    Where an image lies in a folder named like one of the classes, that is taken for the truth: right answers are green,
    wrong ones red. Shows at most ``most`` images, wrong answers first, then the least certain.
    """
    rows = [row for row in results if "predictions" in row]

    def top(row: dict[str, Any]) -> dict[str, Any]:  # with a threshold there may be none
        return row["predictions"][0] if row["predictions"] else {"class": "", "probability": 0.0}

    def order(row: dict[str, Any]) -> tuple[bool, float]:
        return row.get("truth") in (None, top(row)["class"]), top(row)["probability"]

    count = len(rows)
    rows = sorted(rows, key=order)[:most]
    columns = max(1, min(10, len(rows)))
    lines = max(1, math.ceil(len(rows) / columns))
    with _style():
        figure = _figure(figsize=(CELL * columns, (CELL + 0.6) * lines + 0.5))
        grid = figure.subplots(lines, columns, squeeze=False).ravel()  # not .flat, which is used up by one loop
        for axes in grid:
            axes.axis("off")
        for axes, row in zip(grid, rows, strict=False):
            try:
                axes.imshow(open_image(row["file"], at_most=round(2 * CELL * DPI)))
            except DataError:  # it was there a moment ago
                axes.text(0.5, 0.5, "gone", ha="center", transform=axes.transAxes)
            found, truth = top(row), row.get("truth")
            right = None if truth is None else truth == found["class"]
            color = {None: "black", True: "tab:green", False: "tab:red"}[right]
            text = percent(found["probability"]) if row["predictions"] else "no class"
            if truth is not None and not right:
                text += f" (is {_label(truth, 13 - len(text))})"
            axes.set_title(f"{_label(found['class'], 19)}\n{text}", fontsize=7, color=color)
            name = _label(os.path.basename(row["file"]), 28, keep_end=True)
            axes.text(0.5, -0.05, name, fontsize=5, color="gray", ha="center", va="top", transform=axes.transAxes)
        shown = f"{count} image{'s' * (count != 1)}" if count == len(rows) else f"the hardest {len(rows)} of {count} images"
        figure.suptitle(_label(title, 20 * columns) or shown)
        return _save(figure, path)


def confusion(counts: np.ndarray, names: Sequence[str], path: str | os.PathLike, title: str = "") -> Path:
    """Images by truth (rows) and prediction (columns) ``(K, K)``, coloured as a share of their row."""
    with _style():
        size = min(16.0, max(5.0, 0.3 * len(names) + 2))
        figure = _figure(figsize=(size, size))
        axes = figure.subplots()
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        figure.colorbar(axes.imshow(share, cmap="Blues", vmin=0, vmax=1), label="share of the truth's images", shrink=0.7)
        if len(names) <= MOST_NAMED:
            labels = [_label(name, 20) for name in names]
            axes.set_xticks(range(len(names)), labels, rotation=90)
            axes.set_yticks(range(len(names)), labels)
        if len(names) <= MOST_NUMBERED:
            for (i, j), count in np.ndenumerate(counts):
                if count:
                    axes.text(
                        j, i, count, ha="center", va="center", fontsize=7, color="white" if share[i, j] > 0.5 else "black"
                    )
        axes.set(xlabel="predicted", ylabel="truth", title=_label(title, 100))
        return _save(figure, path)


def calibration(bins: Sequence[dict[str, float]], ece: float, path: str | os.PathLike) -> Path:
    """Accuracy over confidence, by the bins that ``tnt-fast validate`` counts, and how many images each has."""
    with _style():
        figure = _figure(figsize=(5, 5.5))
        accuracy, count = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        edges, widths = [row["from"] for row in bins], [row["to"] - row["from"] for row in bins]
        accuracy.bar(edges, [row["accuracy"] for row in bins], widths, align="edge", edgecolor="white", label="accuracy")
        accuracy.plot([0, 1], [0, 1], color="black", linestyle=":", label="calibrated")
        accuracy.plot(
            [row["confidence"] for row in bins], [row["accuracy"] for row in bins], "o", color="tab:red", markersize=3
        )
        accuracy.set(ylabel="accuracy", title=f"calibration error (ECE) {100 * ece:.2f}%", xlim=(0, 1), ylim=(0, 1))
        accuracy.legend(loc="upper left")
        count.bar(edges, [row["images"] for row in bins], widths, align="edge", edgecolor="white", color="gray")
        count.set(xlabel="confidence", ylabel="images")
        return _save(figure, path)


def colors(name: str) -> np.ndarray:
    """One of matplotlib's maps of colours as ``(256, 3)``, 0 to 255."""
    with _style():
        from matplotlib import colormaps

        return colormaps[name](np.arange(256), bytes=True)[:, :3]


def maps(groups: Mapping[str, Mapping[str, np.ndarray]], path: str | os.PathLike) -> Path:
    """Groups of maps ``(height, width)``, those of a group of one shape, with their names, each map on a scale of its own."""
    columns = min(12, max(len(group) for group in groups.values()))
    lines = [math.ceil(len(group) / columns) for group in groups.values()]
    with _style():
        figure = _figure(figsize=(max(0.8 * columns, 4.4), sum(lines) + 0.4 * len(groups)))
        grid = figure.subplots(len(groups), 1, squeeze=False, height_ratios=lines).ravel()
        for axes, (title, group), count in zip(grid, groups.items(), lines, strict=True):
            height, width = next(iter(group.values())).shape
            down, across = height / width + 0.25, 1.08  # with the gaps; axes of their own for each map take matplotlib seconds
            for i, (name, values) in enumerate(group.items()):
                x, y = across * (i % columns), down * (i // columns)
                axes.imshow(values, cmap="magma", extent=(x, x + 1, y + height / width, y), interpolation="nearest")
                axes.text(x + 0.5, y - 0.03, name, fontsize=7, ha="center")
            axes.set(xlim=(0, across * columns), ylim=(down * count, -0.2), title=title)
            axes.title.set_fontsize(8)
            axes.axis("off")
        return _save(figure, path)


def overlay(image: np.ndarray, layers: Mapping[str, np.ndarray], path: str | os.PathLike) -> Path:
    """A picture ``(height, width, 3)``, and maps over it, each on a scale of its own."""
    with _style():
        figure = _figure(figsize=(2.6 * (1 + len(layers)), 2.9))
        first, *others = figure.subplots(1, 1 + len(layers))
        first.imshow(image)
        extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        for axes, (name, values) in zip(others, layers.items(), strict=True):
            axes.imshow(image.mean(-1), cmap="gray", extent=extent)
            axes.imshow(values, cmap="magma", alpha=0.7, extent=extent)
            axes.set_title(name, fontsize=8)
        for axes in (first, *others):
            axes.axis("off")
        return _save(figure, path)


def mosaic(tiles: np.ndarray, grid: tuple[int, int], path: str | os.PathLike, title: str) -> Path:
    """Cosines, a tile for each cell of a grid, which has the whole grid in it: ``(rows², columns²)``."""
    with _style():
        figure = _figure(figsize=(5.4, 4.6))
        axes = figure.subplots()
        shown = axes.imshow(tiles, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_xticks([grid[1] * i - 0.5 for i in range(grid[1] + 1)], labels=[])
        axes.set_yticks([grid[0] * i - 0.5 for i in range(grid[0] + 1)], labels=[])
        axes.grid(color="white", linewidth=0.8)
        axes.tick_params(length=0)
        figure.colorbar(shown, shrink=0.8)
        figure.suptitle(title, fontsize=9)
        return _save(figure, path)


def by_block(series: Mapping[str, tuple[Sequence[int], np.ndarray]], path: str | os.PathLike, title: str, unit: str) -> Path:
    """Values by block: ``(blocks,)`` as a line, ``(blocks, heads)`` as a point a head with a line through their means."""
    with _style():
        from matplotlib.ticker import MaxNLocator

        figure = _figure(figsize=(4.6, 3))
        axes = figure.subplots()
        for i, (name, (blocks, values)) in enumerate(series.items()):
            if values.size == 0:
                continue
            means = values.reshape(len(values), -1).mean(1)
            axes.plot(blocks, means, color=f"C{i}", marker="o", markersize=3, label=_label(name, 40))
            if values.ndim == 2:
                axes.plot(np.repeat(blocks, values.shape[1]), values.ravel(), ".", color=f"C{i}", alpha=0.4)
        axes.set(xlabel="block", ylabel=unit, title=title, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return _save(figure, path)


def points(groups: Mapping[str, np.ndarray], path: str | os.PathLike, title: str) -> Path:
    """Points ``(count, 2)`` of one plane, by group."""
    with _style():
        figure = _figure(figsize=(4.6, 4))
        axes = figure.subplots()
        for name, places in groups.items():
            axes.scatter(*places.T, s=10, alpha=0.7, label=_label(name, 40))
        axes.set(xticks=[], yticks=[], title=title)
        axes.legend(fontsize=8)
        return _save(figure, path)


def ablation(rows: Sequence[dict[str, Any]], path: str | os.PathLike) -> Path:
    """Held-out accuracy by axis and value, as ``tnt-fast ablate`` has them: each run, mean ± deviation, the base as a line."""
    axes_of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        axes_of.setdefault(row["axis"], []).append(row)
    base = axes_of.pop("base")[0]["accuracy"]
    with _style():
        figure = _figure(figsize=(2.6 * max(len(axes_of), 1), 3.4))
        grid = figure.subplots(1, max(len(axes_of), 1), sharey=True, squeeze=False)[0]
        for axes, (name, own) in zip(grid, axes_of.items(), strict=False):
            for i, row in enumerate(own):
                color = "black" if row["is_base"] else "tab:blue"
                axes.plot([i] * len(row["accuracies"]), [100 * x for x in row["accuracies"]], ".", color=color, alpha=0.4)
                if row["accuracy"] is not None:
                    axes.errorbar(i, 100 * row["accuracy"], 100 * (row["deviation"] or 0), fmt="o", color=color, capsize=4)
            if base is not None:
                axes.axhline(100 * base, color="black", linestyle=":", linewidth=1)
            axes.set_xticks(range(len(own)), [_label(row["value"], 12) for row in own])
            axes.set(title=name + (f" (Table {own[0]['table']})" if own[0]["table"] else ""))
            axes.margins(x=0.2)
            axes.grid(alpha=0.3, axis="y")
        grid[0].set(ylabel="held-out accuracy (%)")
        return _save(figure, path)
