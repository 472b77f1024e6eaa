"""Semantic segmentation with a TNT: torchvision's FCN head on the sum of a feature pyramid of strides 4 to 32.

python examples/segmentation.py --checkpoint runs/digits/best.pt --out runs/segmentation
"""

import argparse
import colorsys
import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import draw_segmentation_masks, save_image
from tqdm import tqdm

import pyramid
from tnt_fast.writing import write


class Summed(nn.Module):
    """All levels of the pyramid, brought to the finest and added, as in Panoptic FPN (Kirillov et al. 2019,
    https://arxiv.org/abs/1901.02446, section 3.1)."""

    def __init__(self, levels: pyramid.Pyramid):
        super().__init__()
        self.levels = levels

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        finest, *others = self.levels(image).values()
        for level in others:
            finest = finest + interpolate(level, finest.shape[-2:], mode="bilinear")
        return {"out": finest}


def build(backbone: pyramid.Backbone, classes: int) -> FCN:
    """FCN (Long et al. 2015, https://arxiv.org/abs/1411.4038); class 0 is the background."""
    return FCN(Summed(backbone.pyramid), FCNHead(backbone.pyramid.out_channels, classes + 1))


def intersection_over_union(confusion: Tensor) -> Tensor:
    """By class, from pixels counted by truth (rows) and answer (columns); NaN where a class is in neither."""
    right = confusion.diag().double()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def painted(image: Tensor, mask: Tensor, classes: int) -> Tensor:
    hues = [colorsys.hsv_to_rgb(i / classes, 0.85, 1) for i in range(classes)]
    colors = [tuple(round(255 * part) for part in hue) for hue in hues]
    layers = torch.stack([mask == label for label in range(1, classes + 1)])
    return draw_segmentation_masks((image * 255).byte(), layers, alpha=0.7, colors=colors) / 255


def segmentation(args: argparse.Namespace) -> int:
    device = pyramid.started(args)
    backbone = pyramid.backbone(args, device)
    train_set, val_set = pyramid.data(args, masks=True)
    classes = len(train_set.names)
    model = build(backbone, classes).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; weights of the backbone: {backbone.said}")
    print(f"images: {len(train_set)} to train on, {len(val_set)} held out")

    def logits(images: Sequence[Tensor]) -> Tensor:
        return model(normalize(torch.stack(list(images)), backbone.mean, backbone.std))["out"]

    def loss(images: tuple, truths: tuple) -> Tensor:
        return cross_entropy(logits(images), torch.stack([truth["mask"] for truth in truths]), ignore_index=pyramid.UNKNOWN)

    pyramid.train(model, loss, train_set, args, device)
    model.eval()
    confusion, shown = torch.zeros(classes + 1, classes + 1, dtype=torch.long), []
    for images, truths in tqdm(pyramid.batches(val_set, args), "held out", disable=None):
        with torch.no_grad(), torch.autocast(device.type, pyramid.DTYPES[args.amp], enabled=args.amp != "off"):
            answers = logits([image.to(device) for image in images]).argmax(1).cpu()
        for image, truth, answer in zip(images, truths, answers, strict=True):
            known = truth["mask"] != pyramid.UNKNOWN
            pairs = truth["mask"][known] * (classes + 1) + answer[known]
            confusion += torch.bincount(pairs, minlength=confusion.numel()).view_as(confusion)
            if len(shown) < 9:
                shown += [image, painted(image, truth["mask"], classes), painted(image, answer, classes)]
    by_class = intersection_over_union(confusion)
    there = ~by_class.isnan()
    named = zip(("background", *train_set.names), by_class.tolist(), there.tolist(), strict=True)
    result = {"mIoU": by_class[there].mean().item(), "IoU": {name: value for name, value, is_there in named if is_there}}
    write(args.out / "result.json", json.dumps(result, indent=1).encode())
    save_image(shown, args.out / "picture.png", nrow=3)
    print("IoU: " + "  ".join(f"{name} {value:.2f}" for name, value in result["IoU"].items()))
    print(f"mIoU: {result['mIoU']:.3f} on {len(val_set)} held-out images; {args.out / 'picture.png'} (image, truth, answer)")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return pyramid.run(segmentation, pyramid.parser(__doc__.splitlines()[0], "runs/segmentation", 2e-3), argv)


if __name__ == "__main__":
    sys.exit(main())
