"""Features of a folder of images, and k-NN with them: no training, no head.

python examples/knn.py photos/ --checkpoint runs/mine/best.pt --query new/ --out runs/knn
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL.Image import Image
from sklearn.manifold import TSNE
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

import tnt_fast
from tnt_fast.check import find
from tnt_fast.data import evaluation_transform, write_digits
from tnt_fast.dispatch import find_device, settle
from tnt_fast.images import named_images, open_image
from tnt_fast.optimize import optimize_for_inference
from tnt_fast.shards import Picture
from tnt_fast.writing import replacing

THUMBNAILS = 400  # at most so many images in the picture, those of one class among each other in the data's order


def opened(file: Path | Picture, at_most: int | None = None) -> Image:
    return open_image(file.open() if isinstance(file, Picture) else file, at_most)


class Embedder:
    """Files → features ``(n, E)`` of length 1: what the head of the model would see."""

    def __init__(self, args: argparse.Namespace):
        loaded = tnt_fast.load_tnt(args.model, args.checkpoint)
        self.device, self.said = find_device(args.device), loaded.said
        model = loaded.model.to(self.device).eval()
        settle(model)
        self.model = optimize_for_inference(model)
        self.transform, self.batch_size = evaluation_transform(loaded.data_config), args.batch_size

    @torch.inference_mode()
    def __call__(self, files: Sequence[Path | Picture]) -> np.ndarray:
        """Raises: DataError: a file that cannot be read; it is named."""
        features = []
        for start in tqdm(range(0, len(files), self.batch_size), "features", disable=None):
            images = torch.stack([self.transform(opened(file)) for file in files[start : start + self.batch_size]])
            tokens = self.model.forward_features(images.to(self.device))
            features.append(self.model.forward_head(tokens, pre_logits=True).float().cpu())
        return torch.nn.functional.normalize(torch.cat(features), dim=-1).numpy()


def picture(features: np.ndarray, files: Sequence[Picture], labels: Sequence[str], path: Path) -> None:
    """t-SNE (van der Maaten and Hinton 2008) of the features by scikit-learn, each image where its feature is."""
    chosen = np.unique(np.linspace(0, len(files) - 1, THUMBNAILS).astype(int))
    perplexity = min(30.0, (len(files) - 1) / 3)
    places = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(features)
    figure, axes = plt.subplots(figsize=(12, 9), layout="constrained")
    classes = sorted(set(labels))
    colors = plt.get_cmap("tab10" if len(classes) <= 10 else "hsv")(np.linspace(0, 1, max(len(classes), 10)))
    of_label = dict(zip(classes, colors, strict=False))
    axes.scatter(*places.T, c=[of_label[label] for label in labels], s=60, alpha=0.6, linewidths=0)
    for i in chosen:
        image = OffsetImage(np.asarray(opened(files[i], at_most=48).resize((24, 24))), zoom=1)
        frame = dict(edgecolor=of_label[labels[i]], linewidth=1.5)
        axes.add_artist(AnnotationBbox(image, places[i], pad=0.1, bboxprops=frame))
    if len(classes) <= 30:
        for label in classes:
            axes.scatter([], [], color=of_label[label], label=label)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.axis("off")
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110)
    plt.close(figure)


def knn(args: argparse.Namespace) -> int:
    if args.k < 1 or args.batch_size < 1:
        raise ValueError(f"--k {args.k} and --batch-size {args.batch_size} must be at least 1")
    data = args.data
    if data == "digits":
        write_digits(args.out / "data")
        data = args.out / "data"
    parts = find(data).parts
    train, val = (parts.get(name, []) for name in ("train", "val"))
    train = train or parts[""]
    queries = named_images(args.query)[0] if args.query else []
    if len(train) - (not val) < args.k:
        raise ValueError(f"--k {args.k} of {len(train)} images; take fewer neighbours")
    embed = Embedder(args)
    print(f"weights: {embed.said}")

    labels = [picture.label for picture in train]
    features = embed(train)
    neighbours = KNeighborsClassifier(args.k, metric="cosine", algorithm="brute", weights="distance")
    if val:
        answers = neighbours.fit(features, labels).predict(embed(val))
        truth, how = [picture.label for picture in val], "held-out images"
    else:
        answers = cross_val_predict(neighbours, features, labels, cv=LeaveOneOut())
        truth, how = labels, "images, each by all others"
    accuracy = float(np.mean(answers == np.array(truth)))
    rows = []
    if queries:
        of_queries = embed(queries)
        neighbours.fit(features, labels)
        distances, nearest = neighbours.kneighbors(of_queries)
        for file, name, d, near in zip(queries, neighbours.predict(of_queries), distances, nearest, strict=True):
            like = [{"file": str(train[i]), "label": labels[i], "cosine": 1 - float(x)} for i, x in zip(near, d, strict=True)]
            rows.append({"file": str(file), "label": str(name), "nearest": like})
            print(f"{file}: {name} (nearest {like[0]['file']}, cosine {like[0]['cosine']:.3f})")

    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / "features.npz") as file:
        np.savez(file, features=features, labels=labels, files=[str(file) for file in train])
    with replacing(args.out / "result.json") as file:
        file.write(json.dumps({"k": args.k, "accuracy": accuracy, "queries": rows}, indent=1).encode())
    picture(features, train, labels, args.out / "picture.png")
    print(f"{args.k}-NN: {accuracy:.2%} of {len(truth)} {how}; {args.out / 'picture.png'}, {args.out / 'features.npz'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = command.add_argument
    add("data", help="folders of classes, a CSV file, wds:PATH, hfds:PATH or 'digits', as 'tnt-fast train' takes them")
    add("--checkpoint", help="file of 'tnt-fast train', or of timm or the authors with --model")
    add("--model", help="such as tnt_s_patch16_224.in1k, whose hosted weights are taken where there is no checkpoint")
    add("--query", nargs="+", metavar="PATH", help="images, folders or patterns to name by their nearest neighbours")
    add("--k", type=int, default=5, help="neighbours that vote, each by its nearness")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--device", help="such as cpu, cuda:0; default: a GPU if there is one")
    add("--out", type=Path, default=Path("runs/knn"), help="folder for picture.png, features.npz, result.json")
    args = command.parse_args(argv)
    try:
        return knn(args)
    except (ValueError, OSError) as error:
        command.exit(2, f"{command.prog}: {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
