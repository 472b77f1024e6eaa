"""What a TNT makes of one image, as arrays: the figures of the paper, attention on both levels and what follows from it.

Attention comes from ``TNT.forward_attention``, tokens from hooks on the stem and the blocks, which either path calls.
Sizes are the paper's letters (``reference.py``), L blocks, and h × w the grid of all pixels: 56 × 56 of an image of 224.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_data_config
from timm.models import VisionTransformer
from torch import Tensor, nn

from tnt_fast.checkpoints import CheckpointError
from tnt_fast.classify import class_names_of
from tnt_fast.data import evaluation_transform
from tnt_fast.dispatch import find_device, settle
from tnt_fast.reading import read_checkpoint
from tnt_fast.tnt import TNT
from tnt_fast.variants import check_sizes, load_tnt

Array = np.ndarray


class Subject(NamedTuple):
    """A model in evaluation mode and how it is shown an image."""

    model: Any
    name: str
    said: str  # about its weights
    source: str  # of its weights: the name of their file, or of the model
    data_config: dict[str, Any]
    classes: list[str]  # their names; empty: it has none
    why_not_fused: list[str]

    def input(self, image: Image.Image) -> Tensor:
        """``(1, 3, H, W)``, as the model takes it."""
        like = next(self.model.parameters())
        return evaluation_transform(self.data_config)(image)[None].to(like)


def load(
    checkpoint: str | os.PathLike | None, model: str | None, device: str | None = None, backend: str = "auto",
    sizes: dict[str, Any] | None = None, class_names: Sequence[str] | None = None,
) -> Subject:  # fmt: skip
    """A TNT of a file of weights, or of those that a name means on the Hugging Face hub.

    Raises:
        ValueError: neither is given. CheckpointError, FileNotFoundError, ConnectionError: as ``load_tnt``.
    """
    if checkpoint is None and model is None:
        raise ValueError(
            "nothing to look into: give a checkpoint (--checkpoint), or a model whose weights timm hosts (--model)"
        )
    where = find_device(device)
    loaded = load_tnt(model, checkpoint, **check_sizes(sizes or {}))
    if loaded.model.in_chans != 3:
        raise CheckpointError(f"the model takes images of {loaded.model.in_chans} channels; those of files have 3")
    classes = list(class_names or loaded.classes or class_names_of(loaded.model.num_classes))
    if class_names is not None and len(classes) != loaded.model.num_classes:
        raise ValueError(f"{len(classes)} class names, but the model has {loaded.model.num_classes} classes")
    tnt = loaded.model.to(where).eval()
    tnt.backend = backend
    return Subject(tnt, loaded.name, loaded.said, _source(checkpoint, model), loaded.data_config, classes, settle(tnt))


def load_beside(checkpoint: str | os.PathLike | None, model: str | None, device: str | None = None) -> Subject:
    """What is shown beside: another TNT, as ``load``, or one of timm's ViTs by name, with a file of its weights or hosted ones.

    Raises:
        ValueError: the name is neither. CheckpointError: the weights do not fit. ConnectionError: they cannot be fetched.
    """
    if model is None or model.startswith(("tnt_", "hf-hub:", "hf_hub:", "timm/tnt_")):
        return load(checkpoint, model, device)
    if not timm.is_model(model):
        raise ValueError(
            f"--beside-model {model!r:.100} is unknown; accepted: ViTs of timm, such as deit_small_patch16_224, and TNTs"
        )
    vit: Any = timm.create_model(model)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"--beside-model {model!r} is a {type(vit).__name__}; accepted: timm's VisionTransformer, and TNTs")
    if checkpoint is None:
        try:
            vit = timm.create_model(model, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(
                f"cannot fetch the weights of {model!r} ({str(error).splitlines()[0]:.200}); without a network, give a file "
                "of them with --beside-checkpoint"
            ) from error
    if checkpoint is not None:
        weights: Any = read_checkpoint(checkpoint)
        weights = weights.get("model", weights.get("state_dict", weights))
        try:
            vit.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{os.fspath(checkpoint)!r} does not fit {model}: {reason:.300}") from error
    said = f"weights of {model} from {'timm' if checkpoint is None else repr(os.fspath(checkpoint))}"
    return Subject(
        vit.to(find_device(device)).eval(), model, said, _source(checkpoint, model), resolve_data_config({}, model=vit), [], []
    )


def _source(checkpoint: str | os.PathLike | None, model: str | None) -> str:
    return str(model) if checkpoint is None else os.path.basename(checkpoint)


class Seen(NamedTuple):
    """All of one image. Grids lie as in the image; probabilities are float32."""

    image: Array
    """``(H, W, 3)``, 0 to 255: the crop that the model is shown."""
    features: Array
    """Patch tokens after each block, ``(L, rows, columns, E)``."""
    pixels: Array
    """Pixel embeddings averaged over their channels, of the stem and after each block: ``(1 + L, h, w)`` (paper, Fig. 5)."""
    inner: Array
    """Inner attention, ``(blocks with an inner transformer, N, H, S, S)``."""
    outer: Array
    """Outer attention, ``(L, H, 1 + N, 1 + N)``, class token first."""
    rollout: Array
    """``(rows, columns)``: what the class token has of each patch, by the outer attention alone."""
    two_level_rollout: Array
    """``(h, w)``: what it has of each pixel, by both."""
    inner_distance: Array
    """``(blocks with an inner transformer, H)`` in image pixels."""
    outer_distance: Array
    """``(L, H)`` in image pixels."""
    patch_similarity: Array
    """Between patches, by block: ``(L,)``; see ``similarity``."""
    map_similarity: Array
    """Between feature maps, by block: ``(L,)``."""
    probabilities: Array
    """Of the classes; none where the model has none."""


def see(subject: Subject, image: Image.Image) -> Seen:
    """Look at what a TNT makes of an image."""
    model: TNT = subject.model
    x = subject.input(image)
    pixels, patches, logits = _tokens(model, x)
    inner, outer = (maps[:, 0].float().cpu() for maps in model.forward_attention(x))
    embed = model.pixel_embed
    rows, columns = embed.grid_size
    has_inner = [bool(block.has_inner) for block in model.blocks]
    features = torch.stack([patch[0, 1:] for patch in patches]).float().cpu()
    mean, std = (torch.tensor(subject.data_config[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    shown = (x[0].float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    share = two_level_rollout(inner, outer, has_inner)
    alike = similarities(features.unflatten(1, (rows, columns)).numpy())
    return Seen(
        image=shown.permute(1, 2, 0).numpy(),
        features=features.unflatten(1, (rows, columns)).numpy(),
        pixels=np.stack([on_pixels(pixel.float().cpu().mean(-1), model, mean=True) for pixel in pixels]),
        inner=inner.numpy(),
        outer=outer.numpy(),
        rollout=rollout(outer)[0, 1:].reshape(rows, columns).numpy(),
        two_level_rollout=on_pixels(share, model),
        inner_distance=distance(inner.transpose(1, 2), _places(embed.new_patch_size, (embed.stride, embed.stride))),
        outer_distance=distance(outer[:, :, None, 1:, 1:], _places((rows, columns), embed.patch_stride)),
        patch_similarity=alike[0],
        map_similarity=alike[1],
        probabilities=logits.softmax(-1).numpy() if model.num_classes else np.empty(0, np.float32),
    )


@torch.inference_mode()
def _tokens(model: TNT, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Pixel tokens of the stem and after each block, patch tokens after each, and the logits of one image."""
    pixels: list[Tensor] = []
    patches: list[Tensor] = []

    def after(_: nn.Module, __: Any, out: tuple[Tensor, Tensor]) -> None:
        pixels.append(out[0])
        patches.append(out[1])

    handles = [model.pixel_embed.register_forward_hook(lambda _, __, out: pixels.append(out))]
    handles += [block.register_forward_hook(after) for block in model.blocks]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return pixels, patches, logits.reshape(-1).float().cpu()


@torch.inference_mode()
def features_beside(subject: Subject, image: Image.Image) -> Array:
    """Patch tokens after each block of a TNT or of timm's ViT, ``(L, rows, columns, E)``."""
    maps: Any = subject.model.forward_intermediates(subject.input(image), intermediates_only=True)
    return torch.cat(maps).permute(0, 2, 3, 1).float().cpu().numpy()


def on_pixels(values: Tensor, model: TNT, mean: bool = False) -> Array:
    """Values of the pixels of each patch, ``(N, S)``, in the image's grid of pixels, ``(h, w)``.

    Pixels that overlapping patches share get the sum of theirs, or the mean.
    """
    embed = model.pixel_embed
    size = (embed.img_size[0] // embed.stride, embed.img_size[1] // embed.stride)

    def fold(x: Tensor) -> Tensor:
        return F.fold(x.T[None], size, embed.new_patch_size, stride=embed.pixel_step)[0, 0]

    total = fold(values)
    return (total / fold(torch.ones_like(values)) if mean else total).numpy()


# ---- rollouts ----


def _mixed(maps: Tensor) -> Tensor:
    """A layer as attention rollout takes it: half what its heads attend to on the average, half what it had."""
    return (maps.mean(-3) + torch.eye(maps.shape[-1])) / 2


def rollout(outer: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): what tokens have of the first block's tokens.

    ``(L, H, T, T)`` → ``(T, T)``, whose rows sum to one.
    """
    total = torch.eye(outer.shape[-1])
    for layer in _mixed(outer):
        total = layer @ total
    return total


def two_level_rollout(inner: Tensor, outer: Tensor, has_inner: Sequence[bool]) -> Tensor:
    """What the class token has of each pixel of the stem: outer rollout × inner rollout, summed over the folds.

    Attention rollout along every path that leads from the pixels to the class token. A pixel's token is half what it attends to
    in its patch, half what it was; a fold makes a patch's token half the mean of its pixels, half what it was; the stem's fold,
    onto nothing, all of it. So a fold passes on the outer rollout from its block to the last, times the inner rollout up to it.

    Args:
        inner: ``(blocks with an inner transformer, N, H, S, S)``. outer: ``(L, H, 1 + N, 1 + N)``.
        has_inner: for each of the L blocks.

    Returns:
        ``(N, S)``; with what the class token keeps of itself, which is what the outer rollout says, the sum is one.
    """
    patches, pixels = outer.shape[-1] - 1, inner.shape[-1]
    of_pixels = torch.eye(pixels).expand(patches, -1, -1)
    folded = [of_pixels.mean(1)]  # (N, S) for each fold, the stem's first: its patches' pixels
    for layer in _mixed(inner):
        of_pixels = layer @ of_pixels
        folded.append(of_pixels.mean(1))
    taken = torch.zeros(1 + patches)
    taken[0] = 1
    total = torch.zeros(patches, pixels)
    for layer, fold in zip(reversed(_mixed(outer)), reversed(has_inner), strict=True):
        taken = taken @ layer
        if fold:
            taken[1:] /= 2
            total += taken[1:, None] * folded.pop()
    return total + taken[1:, None] * folded.pop()


# ---- numbers of one block ----


def _places(grid: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """Where the cells of a grid lie, in image pixels: ``(cells, 2)``."""
    return torch.cartesian_prod(torch.arange(grid[0]) * step[0], torch.arange(grid[1]) * step[1]).float()


def distance(maps: Tensor, places: Tensor) -> Array:
    """How far off the tokens lie that a head attends to, on the average (ViT, Dosovitskiy et al. 2021, Fig. 7).

    ``(L, H, rows, T, T)`` and the ``(T, 2)`` places of the tokens → ``(L, H)``, in the unit of the places. Probabilities are
    taken as shares: what goes to the class token, which lies nowhere, does not count.
    """
    far = (maps * torch.cdist(places, places)).sum(-1) / maps.sum(-1).clamp_min(torch.finfo(maps.dtype).tiny)
    return far.mean((-1, -2)).numpy()


def centred(maps: Tensor) -> Tensor:
    """Feature maps ``(E, N)`` less their means: their cosines are correlations."""
    return maps - maps.mean(-1, keepdim=True)


def similarity(rows: Tensor) -> float:
    """Mean |cosine| of all pairs of rows (Gong et al. 2021, arXiv:2104.12753): 0 diverse, 1 all alike, as is a single row."""
    cosines = (F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).T).abs()
    count = len(rows)
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))) if count > 1 else 1.0


def similarities(features: Array) -> tuple[Array, Array]:
    """``similarity`` of the patches' tokens and of the feature maps, by block: ``(L, rows, columns, E)`` → ``(L,)`` twice."""
    tokens = torch.from_numpy(features).flatten(1, 2)
    return np.array([similarity(x) for x in tokens]), np.array([similarity(centred(x.T)) for x in tokens])


def position_similarity(model: TNT) -> tuple[Array | None, Array | None]:
    """Cosines of the position encodings: of patches ``(N, N)``, of the pixels in one ``(S, S)``; None where there are none."""

    def cosines(rows: Tensor) -> Array:
        rows = F.normalize(rows.detach().float().cpu(), dim=-1)
        return (rows @ rows.T).numpy()

    patch = None if model.patch_pos is None else cosines(model.patch_pos[0, 1:])
    pixel = None if model.pixel_pos is None else cosines(model.pixel_pos[0].flatten(1).T)
    return patch, pixel


def spread(*features: Array) -> list[Array]:
    """t-SNE of the feature maps of one block, of one model or several in one plane: ``(E, 2)`` each.

    A map is a point: its values at all patches, centred and of length one. The nearer two points, the more alike the maps.

    Args:
        features: ``(rows, columns, E)``, resampled to the grid of the first.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    grid = features[0].shape[:2]
    maps = [F.interpolate(torch.from_numpy(x).permute(2, 0, 1)[:, None], grid, mode="bilinear").flatten(1) for x in features]
    points = torch.cat([F.normalize(centred(x), dim=-1) for x in maps]).numpy()
    count = len(points)
    if count < 3 or np.ptp(points) == 0:
        places = np.zeros((count, 2), np.float32)
    else:
        start = "pca" if min(points.shape) > 1 and np.linalg.matrix_rank(points) > 1 else "random"
        with threadpool_limits(1):  # on a busy machine threads would wait for each other; and the picture is the same each time
            places = TSNE(perplexity=min(30, (count - 1) / 3), init=start, random_state=0).fit_transform(points)
    return np.split(places, np.cumsum([len(x) for x in maps])[:-1])
