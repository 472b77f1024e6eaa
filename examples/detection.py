"""Object detection with a TNT: torchvision's FCOS on a feature pyramid of strides 4 to 32.

python examples/detection.py --checkpoint runs/digits/best.pt --out runs/detection
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

import pyramid
from tnt_fast.writing import write

COLORS = ("tomato", "gold", "limegreen", "deepskyblue", "orchid", "orange", "aqua", "hotpink", "yellowgreen", "white")


def build(backbone: pyramid.Backbone, classes: int, size: Sequence[int]) -> FCOS:
    """FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355), whose class 0 is never asked for: labels count from 1."""
    anchors = AnchorGenerator(tuple((stride,) for stride in backbone.pyramid.strides), ((1.0,),) * 4)  # as FCOS wants them
    height, width = size
    return FCOS(
        backbone.pyramid, classes + 1, anchor_generator=anchors, image_mean=list(backbone.mean), image_std=list(backbone.std),
        fixed_size=(width, height), score_thresh=0.05,
    )  # fmt: skip


def average_precision(found: Iterable[dict], truths: Iterable[dict], least: float = 0.5) -> dict[int, float]:
    """The area under precision over recall, by label that is there: each truth is found once, by the surest box of IoU ≥ least.

    Precision is taken as it is, where VOC and COCO take its running maximum: the same or a little less than theirs.
    """
    hits: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    there: dict[int, int] = defaultdict(int)
    for of_image, truth in zip(found, truths, strict=True):
        for label in truth["labels"].tolist():
            there[label] += 1
        free = torch.ones(len(truth["boxes"]), dtype=torch.bool)
        overlap = box_iou(of_image["boxes"], truth["boxes"].reshape(-1, 4))
        for i in of_image["scores"].argsort(descending=True).tolist():
            label = int(of_image["labels"][i])
            fitting = torch.where(free & (truth["labels"] == label), overlap[i], 0.0)
            best = int(fitting.argmax()) if len(fitting) else -1
            hit = best >= 0 and bool(fitting[best] >= least)
            if hit:
                free[best] = False
            hits[label].append((float(of_image["scores"][i]), hit))
    result = {}
    for label, count in sorted(there.items()):
        scores, right = np.array(hits[label] or [(0, 0)]).T
        # scikit-learn's recall is that among the boxes; truths that no box found are not among them
        result[label] = float(average_precision_score(right, scores) * right.sum() / count) if right.any() else 0.0
    return result


@torch.no_grad()
def detect(model: FCOS, images: Sequence[Tensor], args: argparse.Namespace, device: torch.device) -> list[dict[str, Tensor]]:
    model.eval()
    with torch.autocast(device.type, pyramid.DTYPES[args.amp], enabled=args.amp != "off"):
        answers = model([image.to(device) for image in images])
    return [{name: value.float().cpu() if name != "labels" else value.cpu() for name, value in a.items()} for a in answers]


def picture(images: Sequence[Tensor], found: Sequence[dict], names: Sequence[str], least: float = 0.4) -> list[Tensor]:
    """The images with the boxes of at least this score, and what is in them."""
    drawn = []
    for image, of_image in zip(images, found, strict=True):
        sure = of_image["scores"] >= least
        labels, scores = of_image["labels"][sure].tolist(), of_image["scores"][sure].tolist()
        texts = [f"{names[label - 1]} {score:.0%}" for label, score in zip(labels, scores, strict=True)]
        colors = [COLORS[label % len(COLORS)] for label in labels]
        pixels, boxes = (image * 255).byte(), of_image["boxes"][sure]
        drawn.append(draw_bounding_boxes(pixels, boxes, texts, colors=colors, width=2) / 255 if texts else image)
    return drawn


def detection(args: argparse.Namespace) -> int:
    device = pyramid.started(args)
    backbone = pyramid.backbone(args, device)
    train_set, val_set = pyramid.data(args, masks=False)
    model = build(backbone, len(train_set.names), args.size).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; weights of the backbone: {backbone.said}")
    print(f"images: {len(train_set)} to train on, {len(val_set)} held out")

    def loss(images: tuple, truths: tuple) -> Tensor:
        return torch.stack(list(model(list(images), list(truths)).values())).sum()

    pyramid.train(model, loss, train_set, args, device)
    found, truths = [], []
    for images, of_batch in tqdm(pyramid.batches(val_set, args), "held out", disable=None):
        found += detect(model, images, args, device)
        truths += of_batch
    by_label = average_precision(found, truths)
    result = {"mAP@0.5": float(np.mean(list(by_label.values()))), "AP@0.5": {}}
    result["AP@0.5"] = {train_set.names[label - 1]: value for label, value in by_label.items()}
    write(args.out / "result.json", json.dumps(result, indent=1).encode())
    shown = [val_set[i][0] for i in range(min(6, len(val_set)))]
    save_image(picture(shown, found[: len(shown)], train_set.names), args.out / "picture.png", nrow=3)
    print("AP@0.5: " + "  ".join(f"{name} {value:.2f}" for name, value in result["AP@0.5"].items()))
    print(f"mAP@0.5: {result['mAP@0.5']:.3f} on {len(val_set)} held-out images; {args.out / 'picture.png'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return pyramid.run(detection, pyramid.parser(__doc__.splitlines()[0], "runs/detection", 1e-3), argv)


if __name__ == "__main__":
    sys.exit(main())
