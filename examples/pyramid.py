"""What detection.py and segmentation.py share: a TNT as a feature pyramid, images with boxes and masks, a run that can stop."""

import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import tnt_fast
from tnt_fast.dispatch import find_device, settle
from tnt_fast.reading import read_checkpoint
from tnt_fast.variants import create_tnt
from tnt_fast.writing import replacing

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
UNKNOWN = 255  # in a mask: belongs to no class, and is not counted
DTYPES = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

# ---- the pyramid ----


class Pyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 (with patches of 16) from blocks 3, 6, 9 and 12, or so far into another depth.

    The maps are made as in ViTDet's simple feature pyramid (Li et al. 2022, https://arxiv.org/abs/2203.16527, section 3), by
    transposed convolutions and a pooling. There all come from the last block; here each has a block of its own, finer maps
    earlier ones, as a convolutional network has it.

    Args:
        model: loses its head, and the blocks behind the last one that is taken. channels: of every map.
    """

    def __init__(self, model: tnt_fast.TNT, channels: int):
        super().__init__()
        depth, E, patch = len(model.blocks), model.embed_dim, model.pixel_embed.patch_size[0]
        self.blocks = [max(1, round(depth * quarter / 4)) - 1 for quarter in (1, 2, 3, 4)]
        model.prune_intermediate_layers(sorted(set(self.blocks)), prune_norm=True)
        self.model, self.out_channels = model, channels
        self.strides = (patch // 4, patch // 2, patch, patch * 2)

        def up(width: int) -> nn.Module:
            return nn.ConvTranspose2d(width, width // 2, 2, stride=2)

        scales = (
            (E // 4, nn.Sequential(up(E), LayerNorm2d(E // 2), nn.GELU(), up(E // 2))),
            (E // 2, up(E)),
            (E, nn.Identity()),
            (E, nn.MaxPool2d(2)),
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                LayerNorm2d(E), scale, nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels),
            )
            for width, scale in scales
        )  # fmt: skip

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        """Normalised image ``(B, 3, H, W)`` → "0" … "3": maps ``(B, channels, H / stride, W / stride)``, the finest first."""
        taken = sorted(set(self.blocks))
        maps = self.model.forward_intermediates(image, taken, intermediates_only=True)
        of_block = dict(zip(taken, maps, strict=True))
        levels = zip(self.blocks, self.levels, strict=True)
        return OrderedDict((str(i), level(of_block[block])) for i, (block, level) in enumerate(levels))


class Backbone(NamedTuple):
    pyramid: Pyramid
    mean: tuple[float, ...]
    std: tuple[float, ...]
    said: str  # what its weights are


def backbone(args: argparse.Namespace, device: torch.device) -> Backbone:
    """The pyramid over the model that the command names, at its image size.

    Raises:
        ValueError: a size that it cannot have, an unknown model. CheckpointError, OSError: the weights.
    """
    sides = dict(img_size=tuple(args.size))
    if args.checkpoint or "." in args.model or ":" in args.model:
        loaded = tnt_fast.load_tnt(args.model or None, args.checkpoint, **sides)
        model, said, mean, std = loaded.model, loaded.said, loaded.data_config["mean"], loaded.data_config["std"]
    else:
        model, said = create_tnt(args.model or "tnt_fast_ti_patch16_224", **sides), "random"
        mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    model.to(device).requires_grad_(not args.freeze)
    settle(model)  # fused where it can be
    pyramid = Pyramid(model, args.channels).to(device)
    return Backbone(pyramid, tuple(mean), tuple(std), said)


# ---- images ----


class Canvases(Dataset):
    """Real handwritten digits (scikit-learn's, 8×8, UCI) in colours and sizes of their own on real photos.

    Digits that are held out are those that ``tnt-fast train digits`` holds out; held-out backgrounds are the right halves of
    scikit-learn's two photos, the others the left. Each canvas follows from its index alone.

    An item is an image ``(3, H, W)`` from 0 to 1 and its truth: "boxes" ``(n, 4)`` around the ink, "labels" ``(n,)``, and
    "mask" ``(H, W)``; 0 is the background, digit d has d + 1.
    """

    names = tuple("0123456789")

    def __init__(self, part: str, count: int, size: Sequence[int]):
        from sklearn.datasets import load_digits, load_sample_images
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, val = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
        self.part, self.count, self.size = part, count, tuple(size)
        kept = train if part == "train" else val
        self.digits, self.targets = digits.images[kept] / 16, digits.target[kept]
        photos = load_sample_images().images
        border = photos[0].shape[1] // 2
        self.photos = [photo[:, :border] if part == "train" else photo[:, border:] for photo in photos]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = np.random.default_rng((self.part == "train", index))
        height, width = self.size
        image, mask = self._background(draw), np.zeros(self.size, np.uint8)
        boxes: list[list[int]] = []
        labels: list[int] = []
        largest = min(80, height, width)
        for _ in range(int(draw.integers(2, 7))):
            i, side = int(draw.integers(len(self.digits))), int(draw.integers(min(28, largest), largest + 1))
            digit = Image.fromarray((self.digits[i] * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
            ink = np.asarray(digit, np.float32) / 255
            rows, columns = np.nonzero(ink.max(1) > 0.5)[0], np.nonzero(ink.max(0) > 0.5)[0]
            ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            y, x = (int(draw.integers(0, whole - part + 1)) for whole, part in zip(self.size, ink.shape, strict=True))
            box = [x, y, x + ink.shape[1], y + ink.shape[0]]
            if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
                continue  # no digit lies on another
            window = np.s_[box[1] : box[3], box[0] : box[2]]
            colour = 1 - draw.random(3, np.float32) * (0.6, 0.3, 0.6)
            image[window] += (colour - image[window]) * ink[..., None]
            mask[window][ink > 0.5] = self.targets[i] + 1
            boxes.append(box)
            labels.append(int(self.targets[i]) + 1)
        truth = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels),
            "mask": torch.from_numpy(mask).long(),
        }
        return torch.from_numpy(image).permute(2, 0, 1).contiguous().float(), truth

    def _background(self, draw: np.random.Generator) -> np.ndarray:
        """A piece of a photo of the canvas's shape, darkened so that ink shows, ``(H, W, 3)``."""
        photo = self.photos[int(draw.integers(len(self.photos)))]
        height, width = self.size
        scale = draw.uniform(0.4, 1) * min(photo.shape[0] / height, photo.shape[1] / width)
        rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
        y, x = int(draw.integers(0, photo.shape[0] - rows + 1)), int(draw.integers(0, photo.shape[1] - columns + 1))
        piece = Image.fromarray(photo[y : y + rows, x : x + columns]).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(piece, np.float32) / 255 * np.float32(draw.uniform(0.4, 0.8))


class Voc(Dataset):
    """Pascal VOC 2012 through torchvision, brought to one size; items as those of ``Canvases``, without the mask or the boxes.

    Args:
        root: the folder that has VOCdevkit/VOC2012. masks: the images with masks, else those with boxes.
    """

    names = VOC

    def __init__(self, root: str, part: str, size: Sequence[int], masks: bool):
        from torchvision import datasets

        kind = datasets.VOCSegmentation if masks else datasets.VOCDetection
        try:
            self.images = kind(root, year="2012", image_set=part)
        except RuntimeError as error:
            raise FileNotFoundError(f"no Pascal VOC 2012 in {root!r}; expected {Path(root, 'VOCdevkit/VOC2012')}") from error
        flip = [v2.RandomHorizontalFlip()] if part == "train" else []
        self.transform = v2.Compose([v2.Resize(list(size)), *flip, v2.ToDtype(torch.float32, scale=True)])
        self.masks = masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        picture, annotation = self.images[index]
        image = v2.functional.to_image(picture.convert("RGB"))
        truth: dict[str, Tensor]
        if self.masks:
            truth = {"mask": tv_tensors.Mask(np.array(annotation))}
        else:
            objects = annotation["annotation"]["object"]
            corners = [[float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for thing in objects]
            boxes = torch.tensor(corners) - torch.tensor([1.0, 1, 0, 0])  # VOC counts pixels from 1, and both ends
            shape = (picture.height, picture.width)
            truth = {
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=shape),
                "labels": torch.tensor([VOC.index(thing["name"]) + 1 for thing in objects]),
            }
        image, truth = self.transform(image, truth)
        plain = {name: value.as_subclass(Tensor) for name, value in truth.items()}
        return image.as_subclass(Tensor), plain | ({"mask": plain["mask"].long()} if self.masks else {})


def data(args: argparse.Namespace, masks: bool) -> tuple[Any, Any]:
    """What is trained on, and what is held out."""
    if args.voc:
        return Voc(args.voc, "train", args.size, masks), Voc(args.voc, "val", args.size, masks)
    return Canvases("train", args.images, args.size), Canvases("val", max(1, args.images // 4), args.size)


def _collated(items: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple:
    return tuple(zip(*items, strict=True))


def batches(dataset: Any, args: argparse.Namespace, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """Batches are pairs of a tuple of images and a tuple of truths."""
    return DataLoader(
        dataset, args.batch_size, shuffle=shuffle, num_workers=args.workers, collate_fn=_collated,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


# ---- a run ----


def parser(description: str, out: str, learning_rate: float) -> argparse.ArgumentParser:
    """The options of both commands."""
    command = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = command.add_argument
    add("--model", default="", help="a variant, random (TNT-Ti where there is no checkpoint); with a tag, its hosted weights")
    add("--checkpoint", help="weights to start from: of 'tnt-fast train', or of timm or the authors with --model")
    add("--voc", metavar="FOLDER", help="Pascal VOC 2012 below it, in place of handwritten digits on photos")
    add("--images", type=int, default=512, help="pictures of digits to train on; a quarter more are held out")
    add("--size", type=int, nargs=2, default=(192, 256), metavar=("H", "W"), help="of all images")
    add("--channels", type=int, default=128, help="of the pyramid, a multiple of 32")
    add("--freeze", action="store_true", help="train pyramid and head alone")
    add("--epochs", type=int, default=20, help="passes over the images")
    add("--batch-size", type=int, default=8, help="images a step")
    add("--lr", type=float, default=learning_rate, help="peak learning rate; of trained weights a tenth")
    add("--amp", choices=DTYPES, default="off", help="compute in this dtype where autocast does")
    add("--device", help="such as cpu, cuda:0; default: a GPU if there is one")
    add("--workers", type=int, default=0, help="processes that read images")
    add("--seed", type=int, default=0, help="of weights and order")
    add("--out", type=Path, default=Path(out), help="folder of the run: last.pt, result.json, picture.png")
    add("--resume", action="store_true", help="go on after the last whole epoch of the run in --out")
    return command


def started(args: argparse.Namespace) -> torch.device:
    """Check what argparse does not, prepare the folder; returns the device."""
    for name in ("images", "epochs", "batch_size", "channels"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if min(args.size) < 32 or any(side % 32 for side in args.size):
        raise ValueError(f"--size {args.size[0]} {args.size[1]}: both must be multiples of 32, the pyramid's coarsest stride")
    if args.channels % 32:
        raise ValueError(f"--channels {args.channels} must be a multiple of 32, for the head's group norms")
    device = find_device(args.device)
    if args.out.joinpath("last.pt").exists() and not args.resume:
        raise FileExistsError(f"{str(args.out)!r} has a run already: go on with --resume, or take another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    return device


def train(
    model: nn.Module, loss: Callable[[tuple, tuple], Tensor], dataset: Any, args: argparse.Namespace, device: torch.device
) -> None:
    """Train by AdamW with warm-up and cosine, and save after each epoch, for ``--resume``.

    Raises:
        ArithmeticError: a loss that is not finite.
    """
    trained = [p for name, p in model.named_parameters() if p.requires_grad and ".model." in f".{name}"]
    new = [p for name, p in model.named_parameters() if p.requires_grad and ".model." not in f".{name}"]
    of_trained = args.lr / 10 if args.checkpoint or "." in args.model or ":" in args.model else args.lr
    groups = [{"params": new, "lr": args.lr}] + ([{"params": trained, "lr": of_trained}] if trained else [])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    steps = args.epochs * len(batches(dataset, args))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], steps, pct_start=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    begin, file = 0, args.out / "last.pt"
    if args.resume and file.exists():
        saved = read_checkpoint(file)
        try:
            if saved["steps"] != steps:
                raise ValueError(f"{saved['steps']} steps there, {steps} here")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        except (KeyError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{str(file)!r} is of a run with other options ({why}); give those, or another --out") from error
        begin = saved["epoch"]
    for epoch in range(begin, args.epochs):
        model.train()
        torch.manual_seed(args.seed + epoch)  # so that a resumed run draws as one that was not stopped
        bar = tqdm(batches(dataset, args, True, args.seed + epoch), f"epoch {epoch + 1}/{args.epochs}", disable=None)
        for images, truths in bar:
            images = tuple(image.to(device) for image in images)
            truths = tuple({name: value.to(device) for name, value in truth.items()} for truth in truths)
            with torch.autocast(device.type, DTYPES[args.amp], enabled=args.amp != "off"):
                value = loss(images, truths)
            if not value.isfinite():
                raise ArithmeticError(f"the loss is {value.item()} in epoch {epoch + 1}; lower --lr {args.lr}")
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([*trained, *new], 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            bar.set_postfix(loss=f"{value.item():.3f}")
        with replacing(file) as target:
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch + 1, "steps": steps}, target)


def run(command: Callable[[argparse.Namespace], int], options: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, and end with one line where the input is at fault, or Ctrl-C came."""
    args = options.parse_args(argv)
    try:
        return command(args)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on after the last whole epoch", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        options.exit(2, f"{options.prog}: {type(error).__name__}: {error}\n")
