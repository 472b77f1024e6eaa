"""What a run would need of GPUs that are not here: memory by part, the largest batch, hours, cost: ``tnt-fast plan``.

Memory is counted: weights, gradients and the optimizer's state on the meta device; what autograd keeps by its own hooks, on
tensors without values, or for the fused operations by what kernels/ says that they keep. Hours come from few known times of one
GPU (plan.json, which ``python -m benchmarks.plan`` writes from committed results), by a rule for others: products go by the
peak of products, all else by bandwidth and by the bytes that autograd keeps. Every figure says how it is known: ``SOURCES``.
"""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tnt_fast import dispatch, flops, recipe
from tnt_fast.check import find
from tnt_fast.recipe import Config
from tnt_fast.reference import RECOMPUTE
from tnt_fast.tnt import TNT
from tnt_fast.variants import variant

TIMES = Path(__file__).with_name("plan.json")
IMAGENET = 1_281_167, 1000  # images to train on, and classes
GIB = 2**30


class Gpu(NamedTuple):
    """``memory`` in GiB; ``bandwidth`` of it and ``link`` to other GPUs, both ways together, in GB/s.

    TFLOP/s of products without sparsity, with float32 sums: ``half`` of 16-bit numbers, ``single`` of float32 without TF32.
    ``capability``: CUDA's.
    """

    title: str
    memory: float
    bandwidth: float
    half: float
    single: float
    capability: tuple[int, int]
    link: float


# NVIDIA's data sheets and whitepapers, of the SXM form where there is one; V100's and T4's products are of float16
GPUS = {
    "t4": Gpu("T4", 16, 320, 65, 8.1, (7, 5), 32),
    "v100": Gpu("V100 (32 GB)", 32, 900, 125, 15.7, (7, 0), 300),
    "v100-16gb": Gpu("V100 (16 GB)", 16, 900, 125, 15.7, (7, 0), 300),
    "a100": Gpu("A100 (80 GB)", 80, 2039, 312, 19.5, (8, 0), 600),
    "a100-40gb": Gpu("A100 (40 GB)", 40, 1555, 312, 19.5, (8, 0), 600),
    "l4": Gpu("L4", 24, 300, 121, 30.3, (8, 9), 64),
    "l40s": Gpu("L40S", 48, 864, 362, 91.6, (8, 9), 64),
    "h100": Gpu("H100 (80 GB)", 80, 3350, 989, 67, (9, 0), 900),
    "h200": Gpu("H200", 141, 4800, 989, 67, (9, 0), 900),
    "rtx3090": Gpu("RTX 3090", 24, 936, 71, 35.6, (8, 6), 64),
    "rtx4090": Gpu("RTX 4090", 24, 1008, 165, 82.6, (8, 9), 64),
    "rtx5090": Gpu("RTX 5090", 32, 1792, 209, 104.8, (12, 0), 128),
}

# What nobody has measured here
CONTEXT = 1.0  # GiB: CUDA's context, code, workspaces of cuBLAS and NCCL
IN_FLIGHT = 3  # hidden activations of an outer MLP: with gradients, at the largest moment of a backward
SLACK = 0.03  # of a GPU's memory: what the allocator cannot use, and the driver's part
LINKED = 0.4  # of a link's GB/s that an all-reduce reaches
MACHINE, BETWEEN = 8, 25.0  # GPUs of one machine; GB/s a GPU between machines
READ = 100.0  # images a second that one CPU core decodes and augments
BANDS = {"gpu": (0.7, 1.5), "model": (0.75, 1.35)}  # of a time that was scaled to another GPU or dtype; to another model
ASSUMED = (
    f"in flight are {IN_FLIGHT} hidden activations of an outer MLP; {CONTEXT:g} GiB are CUDA's and its libraries', {SLACK:.0%} "
    "of the memory the allocator's",
    "products go by the data sheet's peak, all else by its bandwidth and the bytes that autograd keeps of an image",
    f"an all-reduce reaches {LINKED:.0%} of the link, {BETWEEN:g} GB/s between machines of {MACHINE} GPUs, beside the backward",
    "checkpointing repeats the forward, a third of a step; evaluation, checkpoints and compilation are not in the hours",
)
SOURCES = {
    "weights": "counted", "gradients": "counted", "optimizer": "counted", "EMA": "counted", "gathered by FSDP": "assumed",
    "weights' casts": "counted", "activations": "counted", "images": "counted", "in flight": "assumed",
    "CUDA, allocator": "assumed",
}  # fmt: skip


def gpu(name: str | None, **given: float | None) -> Gpu:
    """A GPU of the table, or one by its data sheet.

    Args:
        given: memory (GiB), tflops (of the run's dtype), bandwidth and link (GB/s), where they are not None, in place of the
            table's.

    Raises:
        ValueError: the name is unknown, a number is none; what would be accepted is named.
    """
    numbers: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, value in numbers.items():
        if not (math.isfinite(value) and 0 < value < 1e6):
            raise ValueError(f"--{key} {value:g} must be a number in (0, 1e6)")
    if name is not None:
        if name.lower() not in GPUS:
            raise recipe.unknown(
                "gpu", name, GPUS, f"{', '.join(GPUS)}; or --memory GB --tflops T --bandwidth GB/s for any other"
            )
        found = GPUS[name.lower()]
    elif missing := [key for key in ("memory", "tflops", "bandwidth") if key not in numbers]:
        raise ValueError(
            f"no GPU is named ({', '.join(f'--{key}' for key in missing)} missing); accepted: --gpu {', '.join(GPUS)}; or "
            "--memory GB --tflops T --bandwidth GB/s for any other"
        )
    else:
        found = Gpu("this GPU", 0, 0, 0, 0, (8, 0), 64)
    if "tflops" in numbers:
        numbers["half"] = numbers["single"] = numbers.pop("tflops")
    if "link" in numbers:
        numbers["link"] /= LINKED  # what an all-reduce reaches is told
    return found._replace(**numbers)


# ---- what autograd keeps ----


class Part(NamedTuple):
    """Bytes: what does not depend on the number of images, and what each of them adds."""

    fixed: int = 0
    image: int = 0


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a forward, besides the parameters; ``inputs``: what each block is given."""

    stem: Part
    blocks: tuple[Part, ...]
    inputs: tuple[Part, ...]
    head: Part

    def total(self, checkpointing: bool = False) -> Part:
        """With gradient checkpointing: of the blocks their inputs, and all of one."""
        blocks = (*self.inputs, max(self.blocks, key=lambda part: part.image)) if checkpointing else self.blocks
        parts = (self.stem, *blocks, self.head)
        return Part(sum(part.fixed for part in parts), sum(part.image for part in parts))


class _Keeper:
    """Bytes of tensors that are kept, each memory once, by steps. It holds them, so that no address is used twice."""

    def __init__(self, own: Sequence[Tensor]):
        self.seen = {x.untyped_storage()._cdata: x for x in own}
        self.sizes = [0]

    def keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = x
            self.sizes[-1] += storage.nbytes()
        return x

    def step(self) -> None:
        self.sizes.append(0)


class _Autocast(TorchFunctionMode):
    """CUDA's autocast as far as a TNT meets it, for the meta device: products in half precision, norms in float32."""

    HALF = (F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention)
    SINGLE = (F.layer_norm, torch.softmax, Tensor.softmax)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.casts: dict[Tensor, Tensor] = {}  # of weights, once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.HALF or func in self.SINGLE:
            to = self.dtype if func in self.HALF else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda x: self._cast(x, to), (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, x: Tensor, to: torch.dtype) -> Tensor:
        if x.dtype == to or not isinstance(x, nn.Parameter):
            return x.to(to)
        if x not in self.casts:
            self.casts[x] = x.to(to)
        return self.casts[x]


def kept(model: TNT, dtype: torch.dtype, fused: bool = False) -> Kept:
    """What autograd keeps of a training step's forward on a GPU, under autocast to ``dtype`` where that is not float32.

    Nothing is computed: of the reference autograd's own hooks tell it, of the fused operations what they keep is known.

    Args:
        model: of the meta device; its ``train()``, ``requires_grad`` and ``recompute`` count.
    """
    found = []
    for images in (1, 2):
        keeper = _Keeper([*model.parameters()])
        autocast = nullcontext() if dtype == torch.float32 else _Autocast(dtype)
        with autocast, torch.autograd.graph.saved_tensors_hooks(keeper.keep, lambda x: x):
            image = torch.empty(images, model.in_chans, *model.pixel_embed.img_size, device="meta")
            inputs = (_fused if fused else _reference)(model, image, keeper, dtype)
        found.append([*keeper.sizes, *inputs])
    one, two = found
    parts = [Part(2 * a - b, b - a) for a, b in zip(one, two, strict=True)]
    depth = len(model.blocks)
    return Kept(parts[0], tuple(parts[1 : depth + 1]), tuple(parts[depth + 2 :]), parts[depth + 1])


def _reference(model: TNT, image: Tensor, keeper: _Keeper, dtype: torch.dtype) -> list[int]:
    pixel = model.pixel_embed(image, model.pixel_pos)
    patch = model._stem(pixel, False, image)
    inputs, before = [], None
    for i, block in enumerate(model.blocks):
        keeper.step()
        inputs.append(pixel.nbytes + patch.nbytes)
        kind = _kind(block, pixel, patch)
        if kind == before and i > 1:  # of the first block's input the stem keeps a part
            keeper.sizes[-1] = keeper.sizes[-2]
        else:
            pixel, patch = block(pixel, patch)
        before = kind
    keeper.step()
    model.forward_head(model.norm(patch))
    return inputs


def _kind(block: Any, pixel: Tensor, patch: Tensor) -> tuple[Any, ...]:
    """What blocks have in common that keep as much."""
    weights = [(name, p.shape, p.requires_grad) for name, p in block.named_parameters()]
    drops = getattr(block.drop_path, "drop_prob", 0.0) > 0
    return weights, drops, block.attn_out.attn_backend, pixel.requires_grad, patch.requires_grad


def _fused(model: TNT, image: Tensor, keeper: _Keeper, dtype: torch.dtype) -> list[int]:
    """Each operation keeps its first activation and drop-path's factors; outer, which folds, more: see kernels/outer.py."""
    sizes = model.sizes(image)
    B, N, S, C, E = len(image), *(int(sizes[letter]) for letter in ("N", "S", "C", "E"))

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=image.device)

    def result(like: Tensor, module: nn.Module, *before: Tensor) -> Tensor:
        """A tensor with gradients where something that it is made of has some."""
        live = any(x.requires_grad for x in (*before, *module.parameters()))
        return torch.empty_like(like).requires_grad_(live)

    def scales(block: Any, rows: int) -> None:
        if getattr(block.drop_path, "drop_prob", 0.0) and block.training:
            keeper.keep(new(rows))
            keeper.keep(new(rows))

    pixel = result(new(B * N, S, C), model.pixel_embed)
    if pixel.requires_grad:
        keeper.keep(image.to(dtype))
        keeper.keep(pixel)
    patch = new(B, N + 1, E).requires_grad_(model.cls_token.requires_grad or pixel.requires_grad)
    if model.patch_embed is not None:
        model.patch_embed(image)
    patch = model.pos_drop(patch)
    inputs = []
    for block in cast(Any, model.blocks):
        keeper.step()
        inputs.append(pixel.nbytes + patch.nbytes)
        if block.has_inner:
            made = result(pixel, block, pixel)
            if made.requires_grad:
                scales(block, B * N)
                keeper.keep(pixel)
                keeper.keep(made)
            pixel = made
            patch = result(patch, block, patch, pixel)
        if dispatch.why_not_fused_outer(block, image):
            patch = block.outer(patch)  # its modules, whose attention may keep less
            continue
        made = result(patch, block, patch)
        if made.requires_grad:
            scales(block, B)
            keeper.keep(patch)
            if block.has_inner:
                keeper.keep(pixel)
            _keep_outer(block, B, N + 1, E, keeper, new)
        patch = made
    keeper.step()
    model.forward_head(model.norm(patch))
    return inputs


def _keep_outer(block: Any, B: int, T: int, E: int, keeper: _Keeper, new: Any) -> None:
    """The result and logsumexp of the attention, x, q, k and v, fc1's result; matrices that were joined or cast."""
    M, H = block.mlp.fc1.weight.shape[0], block.attn_out.num_heads
    keeper.keep(new(B * T, E))
    keeper.keep(new(B, H, T, kind=torch.float32))
    if block.recompute != "all":
        keeper.keep(new(B * T, E))
        keeper.keep(new(B * T, 3 * E))
    if block.recompute == "none":
        keeper.keep(new(B * T, M))
    keeper.keep(new(3 * E, E))
    if new(0).dtype != block.mlp.fc1.weight.dtype:
        matrices = [block.attn_out.proj, block.mlp.fc1, block.mlp.fc2, *([block.proj] if block.has_inner else [])]
        for layer in matrices:
            keeper.keep(new(*layer.weight.shape))


# ---- a model, its weights and its optimizer ----


@dataclass
class Shape:
    """A model without values, and bytes of what a run has of it; ``config``: its settings."""

    config: Config
    model: TNT
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    block: int  # the weights of the largest
    macs: int  # of an image's forward
    dtype: torch.dtype


def shape(config: Config, classes: int) -> Shape:
    """What a config's model and optimizer are made of, on the meta device.

    Raises:
        ValueError: the model is none of ours, its sizes do not fit, or the optimizer does not work without values.
    """
    config.check()
    bare = replace(config, model=variant(config.model), pretrained=False, initial="", backend="reference")
    with torch.device("meta"):
        model = recipe.build_model(bare, classes).model.train()
    parameters = [*model.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("all of the model is frozen; nothing would be trained")
    return Shape(
        config, model,
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.nbytes for p in trained),
        optimizer=_state_bytes(config, model),
        buffers=sum(x.nbytes for x in model.buffers()),
        block=max(sum(p.nbytes for p in block.parameters()) for block in model.blocks),
        macs=flops.multiply_adds(model),
        dtype=torch.float32 if config.amp == "off" else getattr(torch, config.amp),
    )  # fmt: skip


def _state_bytes(config: Config, model: TNT) -> int:
    """Of the optimizer's state on the device of the weights, after a step."""
    optimizer: Any = recipe.build_optimizer(config, model)
    for p in model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    try:
        optimizer.step()
    except Exception as error:  # whatever asks a tensor for its values
        raise ValueError(
            f"opt={config.opt!r} cannot be counted without values ({' '.join(str(error).split())[:100]}); accepted: adamw, "
            "sgd, lamb, …"
        ) from error
    state: Any = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    model.zero_grad(set_to_none=True)
    return sum(value.nbytes for value in state if value.device.type == "meta")


def counted(config: Config) -> tuple[int, int]:
    """Images to train on, and classes, of a config's data by the names of its files; of none ImageNet's.

    Raises:
        DataError: no data set is there.
    """
    if not config.data:
        return IMAGENET[0], config.model_kwargs.get("num_classes", IMAGENET[1])
    if config.data == recipe.DIGITS:
        return 1437, 10  # four fifths of scikit-learn's 1,797
    files = find(config.data)
    whole = len(files.parts.get("", ()))
    return len(files.parts.get("train", ())) + round(whole * (1 - config.val_fraction)), len(files.classes)


# ---- memory ----


class Way(NamedTuple):
    """One way to run a recipe."""

    title: str
    fsdp: bool = False
    checkpointing: bool = False
    recompute: str = "none"


def memory(shape: Shape, kept: Kept, way: Way, images: int, ranks: int, gpu_gib: float) -> dict[str, int]:
    """Bytes of a rank by part, with so many images at a time. DDP's buckets are the gradients themselves."""
    among = ranks if way.fsdp else 1
    found = {
        "weights": shape.weights // among + shape.buffers,
        "gradients": shape.gradients // among,
        "optimizer": shape.optimizer // among,
    }
    if shape.config.ema:
        found["EMA"] = found["weights"]
    if way.fsdp:  # two blocks' weights, of which one is on its way, their gradients, and what lies outside of the blocks
        outside = shape.weights - sum(sum(p.nbytes for p in block.parameters()) for block in shape.model.blocks)
        found["gathered by FSDP"] = 4 * shape.block + 2 * outside
    fixed, image = kept.total(way.checkpointing)
    tokens, hidden = (
        int(shape.model.sizes()["N"]) + 1,
        max(block.mlp.fc1.out_features for block in cast(Any, shape.model.blocks)),
    )
    size = math.prod((shape.model.in_chans, *shape.model.pixel_embed.img_size)) * 4
    return found | {
        "weights' casts": fixed,
        "activations": image * images,
        "images": size * images,
        "in flight": IN_FLIGHT * tokens * hidden * shape.dtype.itemsize * images,
        "CUDA, allocator": int((CONTEXT + SLACK * gpu_gib) * GIB),
    }


def largest_batch(shape: Shape, kept: Kept, way: Way, ranks: int, gpu_gib: float) -> int:
    """Images at a time that fit on a GPU; a multiple of 2 where images are mixed."""
    none, one = (sum(memory(shape, kept, way, images, ranks, gpu_gib).values()) for images in (0, 1))
    most = max(0, int((gpu_gib * GIB - none) // (one - none)))
    return most - most % _multiple(shape.config)


def _multiple(config: Config) -> int:
    return 2 if config.mixup > 0 or config.cutmix > 0 else 1


# ---- time ----


def times() -> dict[str, Any]:
    """The known times of a training step, and where they are from."""
    return cast(dict[str, Any], json.loads(TIMES.read_text("utf-8")))


class Step(NamedTuple):
    """Seconds of a batch's forward and backward, and how they are known."""

    low: float
    nominal: float
    high: float
    source: str


def step(
    shape: Shape, kept_image: int, way: Way, images: int, on: Gpu, fused: bool, known: dict[str, Any] | None = None
) -> Step:
    """The time of a batch, by the known one whose model is nearest.

    Args:
        kept_image: bytes that autograd keeps of an image where nothing is computed again.
    """
    known = known or times()
    config, base = shape.config, GPUS[known["gpu"]]
    path = "fused" if fused else "reference"
    gmacs = shape.macs / 1e9
    rows = [row for row in known["rows"] if row["path"] == path and row["compiled"] == config.compile]
    row = min(rows, key=lambda row: abs(math.log(row["gmacs"] / gmacs)))
    reached = known["reached"]
    peak = on.half if shape.dtype != torch.float32 else on.single

    def products(gmacs: float, images: int, peak: float) -> float:
        return 6 * gmacs * images / (reached * peak) / 1e3

    rest = row["gpu_ms"] / 1e3 - products(row["gmacs"], row["batch"], base.half)
    rest *= kept_image / (row["kept_mb"] * 1e6) * images / row["batch"] * base.bandwidth / on.bandwidth
    again = 4 / 3 if way.checkpointing else 1.0
    seconds = again * (products(gmacs, images, peak) + rest) + products(_recomputed(shape.model, way) / 3e9, images, peak)
    late = max(each["host_ms"] or 0.0 for each in known["rows"] if each["path"] == path) / 1e3 * again  # launches as many
    late *= len(shape.model.blocks) / known["depth"]
    same = abs(row["gmacs"] / gmacs - 1) < 0.01
    bands = [BANDS["model"]] * (not same) + [BANDS["gpu"]] * (on != base or str(shape.dtype) != f"torch.{known['dtype']}")
    low, high = row["low"] / row["ms"], row["high"] / row["ms"]
    for band in bands:
        low, high = low * band[0], high * band[1]
    nominal = max(seconds, late)
    scaled = "".join([f", scaled from {row['model']}"] * (not same) + [f", scaled from {base.title}"] * (on != base))
    bound = "; the host binds" if late > seconds else ""
    return Step(nominal * low, nominal, nominal * high, f"{row['kind']}{scaled}{bound} ({row['source']})")


def _recomputed(model: TNT, way: Way) -> float:
    """Multiply-adds of an image that the fused outer transformers compute again."""
    N, E = int(model.sizes()["N"]), model.embed_dim
    hidden = sum(block.mlp.fc1.weight.shape[0] for block in cast(Any, model.blocks))
    return {"none": 0, "mlp": hidden * E, "all": (hidden + 4 * E * len(model.blocks)) * E}[way.recompute] * (N + 1)


def _exchange(shape: Shape, way: Way, ranks: int, on: Gpu) -> float:
    """Seconds in which the ranks' gradients, and with FSDP their weights twice, go over the links."""
    rate = min(on.link * LINKED, BETWEEN) if ranks > MACHINE else on.link * LINKED
    moved = 2 * shape.weights + shape.gradients if way.fsdp else 2 * shape.gradients
    return (ranks - 1) / ranks * moved / rate / 1e9


# ---- the plan ----


def ways(config: Config, ranks: int, fused: bool) -> list[Way]:
    """The recipe's own way first, then those that differ from it in one thing, for less memory."""
    own = Way("", config.fsdp, config.grad_checkpointing, config.model_kwargs.get("recompute", "none"))
    found = [own._replace(title="FSDP" if own.fsdp else "DDP" if ranks > 1 else "as it is")]
    if ranks > 1:
        found.append(own._replace(title="DDP" if own.fsdp else "FSDP", fsdp=not own.fsdp))
    if fused:
        later = RECOMPUTE[RECOMPUTE.index(own.recompute) + 1 :]
        found += [own._replace(title=f"recompute {what}", recompute=what) for what in later]
    if not own.checkpointing:
        found.append(own._replace(title="checkpointing", checkpointing=True))
    return found


def plan(config: Config, on: Gpu, ranks: int, images: int, classes: int, price: float | None = None) -> dict[str, Any]:
    """Memory, batches, hours and cost of a recipe on so many GPUs, by ways to run it; all that ``tnt-fast plan`` prints.

    Raises:
        ValueError: a setting, or a number that does not fit the others.
    """
    for name, value, most in (("--count", ranks, 100_000), ("--images", images, 10**12)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} {value} must be a whole number in [1, {most}]")
    if price is not None and not 0 <= price < 1e6:
        raise ValueError(f"--price {price:g} must be a number in [0, 1e6)")
    config.check()
    if config.global_batch:  # which the plan divides itself
        config = replace(config, batch_size=0, accumulate=1)
    config = config.settled(images, ranks)
    whole = config.global_batch or config.images_a_step(ranks)
    if whole > images:
        raise ValueError(f"{whole} images a step are more than the {images} to train on; lower the batch")
    about = shape(config, classes)
    notes = []
    if about.dtype == torch.bfloat16 and on.capability < (8, 0):
        about.dtype = torch.float16
        notes.append(f"{on.title} has no products of bfloat16: float16 is planned (--amp float16)")
    if about.dtype == torch.float32:
        notes.append("products are of float32: with --amp bfloat16, or float16, a run needs less memory and time")
    reasons = _why_not_fused(about, on)
    fused = config.backend != "reference" and not reasons
    if reasons and config.backend == "fused":
        raise ValueError(f"backend='fused' cannot run on {on.title}: {'; '.join(reasons)}; take backend='auto'")
    counted = {what: _counted(about, fused, what) for what in RECOMPUTE} if fused else {}
    plain = counted.get("none") or _counted(about, fused, "none")
    known = times()
    found: dict[str, Any] = {}
    for way in ways(config, ranks, fused):
        keeps = counted.get(way.recompute, plain)
        most = largest_batch(about, keeps, way, ranks, on.memory)
        batch, repeats = _divided(whole // ranks, most, _multiple(config))
        parts = memory(about, keeps, way, batch or whole // ranks, ranks, on.memory)
        row: dict[str, Any] = {"memory": parts, "total": sum(parts.values()), "largest_batch": most}
        row |= {"batch": batch, "accumulate": repeats}
        if batch:
            row |= _hours(about, plain, way, batch, repeats, on, ranks, fused, images // whole, price, known)
        found[way.title] = row
    small = about.model.pixel_embed.img_size
    first = next(iter(found.values()))
    return {
        "model": variant(config.model),
        "parameters": sum(p.numel() for p in about.model.parameters()),
        "gmacs": about.macs / 1e9,
        "image_size": list(small),
        "gpu": on._asdict(),
        "count": ranks,
        "path": "fused" if fused else "reference",
        "why_not_fused": reasons if config.backend != "reference" else ["as asked for"],
        "dtype": str(about.dtype).removeprefix("torch."),
        "compiled": config.compile,
        "images": images,
        "epochs": config.epochs,
        "images_a_step": whole,
        "steps": config.epochs * (images // whole),
        "ways": found,
        "sources": SOURCES | {"time": first.get("source", "")},
        "notes": notes,
        "assumed": [*ASSUMED, *_more(first, ranks, config)],
    }


def _why_not_fused(about: Shape, on: Gpu) -> list[str]:
    image = torch.empty(1, about.model.in_chans, *about.model.pixel_embed.img_size, device="meta")
    return dispatch.why_not_fused_on(about.model, image, on.title, on.capability)


def _counted(about: Shape, fused: bool, recompute: str) -> Kept:
    about.model.set_recompute(recompute)
    return kept(about.model, about.dtype, fused)


def _divided(share: int, most: int, multiple: int) -> tuple[int, int]:
    """A rank's images of a step as few equal batches as fit: (batch, how many of them); (0, 0): none do."""
    largest = min(share, most)
    batches = range(largest - largest % multiple, 0, -multiple)
    return next(((batch, share // batch) for batch in batches if share % batch == 0), (0, 0))


def _hours(
    about: Shape, plain: Kept, way: Way, batch: int, repeats: int, on: Gpu, ranks: int, fused: bool, steps: int,
    price: float | None, known: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    one = step(about, plain.total().image, way, batch, on, fused, known)
    exchange = _exchange(about, way, ranks, on) * (repeats if way.fsdp else 1)
    hidden = 1.0 * repeats if way.fsdp else 2 / 3  # of the steps' time, beside which the links work
    seconds = [repeats * each + max(0.0, exchange - hidden * each) for each in one[:3]]
    hours = [each * steps * about.config.epochs / 3600 for each in seconds]
    found: dict[str, Any] = {"step_ms": [1e3 * each for each in seconds], "hours": hours, "source": one.source}
    found["images_per_s"] = batch * repeats * ranks / seconds[1]
    return found if price is None else found | {"cost": [price * ranks * each for each in hours]}


def _more(row: dict[str, Any], ranks: int, config: Config) -> list[str]:
    """What is assumed of this plan beside ``ASSUMED``."""
    found = []
    if config.compile:
        found.append("compiled, autograd keeps at most what it keeps otherwise")
    if "images_per_s" in row:
        cores = math.ceil(row["images_per_s"] / READ / ranks)
        found.append(
            f"images are there in time: a core reads {READ:g} a second, each GPU needs {cores} (--workers {cores}; here "
            f"{config.workers})"
        )
    return found


def too_large(config: Config, model: nn.Module, classes: int, ranks: int, fused: bool, gib: float) -> str:
    """A line for a run whose batch does not fit a GPU's memory by this plan; "" where it fits, or is not known.

    Args:
        config: settled. model: the run's, of which it counts what is frozen. gib: of memory.
    """
    try:
        about = shape(config, classes)
        for p, q in zip(about.model.parameters(), model.parameters(), strict=True):
            p.requires_grad_(q.requires_grad)
        own = ways(config, ranks, fused)[0]
        keeps = _counted(about, fused, own.recompute)
    except Exception:  # what cannot be planned may well run
        return ""
    needed = sum(memory(about, keeps, own, config.batch_size, ranks, gib).values()) / GIB
    if needed <= gib:
        return ""
    most = largest_batch(about, keeps, own, ranks, gib)
    way = f"--batch-size {most} would" if most else "no batch would; take --grad-checkpointing"
    return (
        f"batches of {config.batch_size} need {needed:.1f} GiB by 'tnt-fast plan', the GPU has {gib:.1f}: it may run out of "
        f"memory; {way}"
    )


def memory_here(device: torch.device) -> float | None:
    """GiB of a GPU that this process may have; None where that is not told."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free / GIB + CONTEXT  # which it has already


def table(found: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    g, columns = found["gpu"], found["ways"]
    own = next(iter(columns.values()))
    how = f"{found['path']}, {found['dtype']}{', compiled' if found['compiled'] else ''}"
    lines = [
        f"{found['model']}, {found['parameters'] / 1e6:.2f} M parameters, {'×'.join(map(str, found['image_size']))}; "
        f"{found['count']} × {g['title']}; {how}",
        f"{found['epochs']} epochs of {found['images']:,} images, {found['images_a_step']:,} a step: {found['steps']:,} steps",
    ]
    if found["path"] == "reference":
        lines.append(f"not fused: {'; '.join(found['why_not_fused'])}")
    lines += found["notes"]
    width = [max(9, len(title)) for title in columns]

    def line(name: str, cells: Sequence[str], source: str = "") -> str:
        return f"{name:18s}" + "".join(f"  {cell:>{w}s}" for cell, w in zip(cells, width, strict=True)) + f"  {source}".rstrip()

    lines += ["", line("GiB a GPU", list(columns), "how it is known")]
    for part in dict.fromkeys(part for row in columns.values() for part in row["memory"]):
        shares = [f"{row['memory'][part] / GIB:.2f}" if part in row["memory"] else "" for row in columns.values()]
        lines.append(line(part, shares, found["sources"][part]))
    lines.append(line("sum", [f"{row['total'] / GIB:.2f}" for row in columns.values()], f"of {g['memory']:g}"))
    batches = [f"{row['accumulate']} × {row['batch']}" if row["batch"] else "none fits" for row in columns.values()]
    advice = f"--batch-size {own['batch']}" if own["batch"] else ""
    lines.append(line("batches a step", batches, advice))
    lines.append(line("largest batch", [f"{row['largest_batch']:,}" for row in columns.values()], "that fits a GPU"))
    lines.append("")

    def cells(key: str, form: str, which: int | None = None) -> list[str]:
        values = [row.get(key) for row in columns.values()]
        return ["–" if value is None else format(value if which is None else value[which], form) for value in values]

    lines.append(line("ms a step", cells("step_ms", ".0f", 1), own.get("source", "").partition(" (")[0]))
    lines.append(line("images a second", cells("images_per_s", ",.0f")))
    lines.append(line("hours", cells("hours", ",.1f", 1)))
    lines.append(line("  low", cells("hours", ",.1f", 0)))
    lines.append(line("  high", cells("hours", ",.1f", 2)))
    if any("cost" in row for row in columns.values()):
        lines.append(line("cost", cells("cost", ",.0f", 1)))
    lines.append("")
    if "source" in own:
        lines.append(f"time: {own['source']}; GPUs: NVIDIA's data sheets, looked up")
    lines += [f"assumed: {text}" for text in found["assumed"]]
    return lines
