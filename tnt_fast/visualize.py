"""Pictures of a training run and of predictions; needs matplotlib (``pip install "tnt_fast[pictures]"``)."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _figure(**kwargs: Any) -> Any:
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state, no display
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "tnt_fast[pictures]"') from error
    return Figure(layout="constrained", **kwargs)


def _save(figure: Any, path: str | os.PathLike) -> Path:
    path = Path(path)
    buffer = io.BytesIO()  # drawn whole before the file is touched
    figure.savefig(buffer, dpi=130, format=path.suffix.lstrip(".") or "png")
    path.write_bytes(buffer.getvalue())
    return path


def training_curve(history: Sequence[dict[str, Any]], path: str | os.PathLike, title: str = "") -> Path:
    """Loss and held-out accuracy over epochs, from the ``history`` that ``tnt-fast train`` keeps."""
    figure = _figure(figsize=(9, 3.6))
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], label="training")
    loss.plot(epochs, [row["val_loss"] for row in history], label="held out")
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
    loss.legend()
    values = [100 * row["val_accuracy"] for row in history]
    accuracy.plot(epochs, values, color="tab:green")
    accuracy.set(xlabel="epoch", ylabel="held-out accuracy (%)", title=f"Accuracy, last {values[-1]:.1f}%")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return _save(figure, path)


def prediction_page(results: Sequence[dict[str, Any]], path: str | os.PathLike, title: str = "", most: int = 60) -> Path:
    """A page of images, each with its first prediction and probability, as ``tnt-fast classify`` returns them.

    Where an image lies in a folder named like one of the classes, that is taken for the truth: right answers are green,
    wrong ones red. Shows at most ``most`` images, wrong answers first, then the least certain.
    """
    from PIL import Image

    rows = [row for row in results if "predictions" in row]

    def order(row: dict[str, Any]) -> tuple[bool, float]:
        top = row["predictions"][0]
        return row.get("truth") in (None, top["class"]), top["probability"]

    count = len(rows)
    rows = sorted(rows, key=order)[:most]
    columns = max(1, min(10, len(rows)))
    lines = max(1, math.ceil(len(rows) / columns))
    figure = _figure(figsize=(1.25 * columns, 1.6 * lines + 0.5))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()  # not .flat, which is used up by one loop
    for axes in grid:
        axes.axis("off")
    for axes, row in zip(grid, rows, strict=False):
        with Image.open(row["file"]) as image:
            axes.imshow(image.convert("RGB"))
        top, truth = row["predictions"][0], row.get("truth")
        right = None if truth is None else truth == top["class"]
        wrong = "" if right in (None, True) else f" (is {truth})"
        color = {None: "black", True: "tab:green", False: "tab:red"}[right]
        label = top["class"] if len(top["class"]) <= 18 else top["class"][:17] + "…"
        axes.set_title(f"{label}{wrong}\n{top['probability']:.0%}", fontsize=8, color=color)
    figure.suptitle(title or (f"{count} images" if count == len(rows) else f"the hardest {len(rows)} of {count} images"))
    return _save(figure, path)
