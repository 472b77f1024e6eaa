"""What the fuzzer tries: seed, kind and index determine a call of an operation, a whole model, or one after surgery."""

import copy
import math
import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import timm
import torch
from fuzz_rule import DEVICE, DRAWS, HALVES, Call, Guard, Wrong, compare, off_by_rounding, rounded_softmax
from helpers import ExactSoftmax
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tnt_fast import TNT, kernels, why_not_fused

# ---- operations ----


class Dice:
    """Everything random of a case, and the tensors drawn so far."""

    def __init__(self, seed: int, kind: str, index: int):
        self.random = random.Random(f"{seed}:{kind}:{index}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        torch.manual_seed(self.random.getrandbits(60))  # what new modules draw
        self.guard = Guard()

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def upto(self, most: int) -> int:
        """1 to ``most``, small ones more often."""
        return self.pick(
            self.random.randint(1, most), self.random.randint(1, min(most, 8)), self.random.randint(1, min(most, 24))
        )

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator) * scale + mean

    def place(self, name: str, value: Tensor, dtype: torch.dtype, calm: bool = False, expand: bool = True) -> Tensor:
        """With random strides, or (``calm``) contiguous ones; ``expand``: also strides of 0."""
        order, strides, expanded = list(range(value.ndim)), [0] * value.ndim, []
        if not calm and self.chance(0.3):
            self.random.shuffle(order)
        if not calm and value.ndim == 4 and self.chance(0.3):
            order = [0, 2, 3, 1]
        step = 1
        for d in reversed(order):
            step *= 1 if calm or self.chance(0.8) else self.pick(2, 3)
            strides[d] = step
            step *= max(1, value.shape[d])
            if expand and not calm and value.shape[d] and self.chance(0.05):
                expanded.append(d)
        x = self.guard.place(name, value, dtype, strides, self.random.randint(16, 99), expanded)
        return x.expand(value.shape)


def pixel_embed_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    stride, legacy, restrictions = dice.pick(1, 2, 3, 4, 4, 8), dice.chance(0.4), set()
    per_side = max(1, min(8, 24 // stride))
    patch = [stride * dice.random.randint(1, per_side) for _ in "hw"]
    step = [p if dice.chance(0.6) else stride * dice.random.randint(1, p // stride) for p in patch]
    sides = [p + s * dice.pick(0, 0, 1, 2) for p, s in zip(patch, step, strict=True)]
    if dice.chance(0.05):
        sides[1] += 1
        restrictions.add("window")
    B, channels, C = dice.pick(0, 1, 1, 2, 3), dice.pick(1, 2, 3, 3, 4, 8), dice.upto(96 if dice.chance(0.2) else 24)
    while B * sides[0] * sides[1] * channels > 2500 and (B > 1 or channels > 1):
        B, channels = max(1, B - 1), max(1, channels - 1)
    window = 7
    if dice.chance(0.03):
        window = dice.pick(1, 3, 5)
        restrictions.add("window")
    tensors = dict(
        image=dice.normal(B, channels, *sides, mean=0.3),
        weight=dice.normal(C, channels, window, window, scale=(49 * channels) ** -0.5),
        bias=dice.normal(C), pixel_pos=dice.normal(1, C, patch[0] // stride, patch[1] // stride),
    )  # fmt: skip
    others = dict(patch_size=tuple(patch), stride=stride, patch_stride=tuple(step), legacy=legacy)
    return tensors, others, restrictions, dict(channels=channels, C=C, kernel=window)


def interpreted_turns(image: Tensor, others: dict[str, Any]) -> float:
    """How often the loop of the image's gradient runs; in the interpreter each turn takes about 10 ms."""
    patch, stride, step = (others[name] for name in ("patch_size", "stride", "patch_stride"))
    if DEVICE == "cuda" or not isinstance(image, Tensor) or image.ndim != 4 or not isinstance(patch, tuple):
        return 0
    if stride < 1 or min(step) < 1:
        return 0
    over = math.prod([-(-p // s) for p, s in zip(patch, step, strict=False)])
    return image[:, :1].numel() / stride**2 / 32 * (3 // stride + (stride + 2) // stride + 1) ** 2 * over


def inner_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    S = dice.random.randint(1, 64) if dice.chance(0.15) else dice.pick(1, 2, 3, 4, 5, 7, 9, 12, 15, 16, 16, 16)
    C = dice.upto(96 if dice.chance(0.15) else 40)
    heads = dice.pick(*[h for h in range(1, C + 1) if C % h == 0 and C // h <= 32 and h <= 12] or [C])
    M, P = dice.pick(4 * C, dice.upto(2 * C), C), dice.pick(0, 1, 2, 3, 5, 9)
    if S * C > 800:
        P = min(P, 3)
    return transformer_values(dice, dict(pixel=dice.normal(P, S, C, mean=0.5)), M, heads, dict(C=C, H=heads, S=S, M=M))


def outer_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    heads = dice.pick(1, 2, 3, 4, 6)
    E = heads * dice.random.randint(1, 32 if dice.chance(0.2) else 12)
    M, B, T = dice.pick(4 * E, dice.upto(2 * E), E), dice.pick(0, 1, 2, 3), dice.pick(1, 2, 5, 17, dice.upto(200))
    values = transformer_values(dice, dict(patch=dice.normal(B, T, E, mean=0.5)), M, heads, dict(C=E, E=E, H=heads))
    if T > 1 and dice.chance(0.5):
        S, C, legacy = dice.pick(1, 3, 4, 9, 16), dice.random.randint(3, 24), dice.chance(0.4)
        values[0].update(pixel=dice.normal(B * (T - 1), S, C, mean=0.5), **folding(dice, S, C, E, legacy))
    return values


def block_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    of_inner, inner_others, restrictions, sizes = inner_values(dice)
    (P, S, C), heads = of_inner.pop("pixel").shape, dice.pick(1, 2, 3)
    N = dice.pick(*[n for n in range(1, max(P, 1) + 1) if P % n == 0])
    B, E, legacy = P // N, heads * dice.random.randint(3, 12), dice.chance(0.3)
    activations = dict(pixel=dice.normal(P, S, C, mean=0.5), patch=dice.normal(B, 1 + N, E, mean=0.5))
    tensors, others, _, _ = transformer_values(dice, activations, dice.upto(2 * E), heads, dict(C=E))
    tensors |= folding(dice, S, C, E, legacy) | {f"inner_{name}": x for name, x in of_inner.items()}
    return tensors, others | dict(inner_heads=inner_others["num_heads"]), restrictions, sizes | dict(
        H=heads, inner_heads=sizes["H"], E=E
    )  # fmt: skip


def folding(dice: Dice, S: int, C: int, E: int, legacy: bool) -> dict[str, Tensor | None]:
    width = C if legacy else S * C
    return dict(
        fold_norm1_weight=dice.normal(width, scale=0.3, mean=1), fold_norm1_bias=dice.normal(width, scale=0.3),
        fold_proj_weight=dice.normal(E, S * C, scale=(S * C) ** -0.5),
        fold_proj_bias=dice.normal(E) if dice.chance(0.5) else None,
        fold_norm2_weight=None if legacy else dice.normal(E, scale=0.3, mean=1),
        fold_norm2_bias=None if legacy else dice.normal(E, scale=0.3),
    )  # fmt: skip


def transformer_values(dice: Dice, activation: dict, M: int, heads: int, sizes: dict) -> tuple[dict, dict, set, dict]:
    C, P = sizes["C"], len([*activation.values()][-1])
    tensors = activation | dict(
        norm1_weight=dice.normal(C, scale=0.3, mean=1), norm1_bias=dice.normal(C, scale=0.3),
        qk_weight=dice.normal(2 * C, C, scale=1.5 * C**-0.5), qk_bias=dice.normal(2 * C, scale=0.3),
        v_weight=dice.normal(C, C, scale=C**-0.5), v_bias=dice.normal(C, scale=0.3),
        proj_weight=dice.normal(C, C, scale=C**-0.5), proj_bias=dice.normal(C, scale=0.3),
        norm2_weight=dice.normal(C, scale=0.3, mean=1), norm2_bias=dice.normal(C, scale=0.3),
        fc1_weight=dice.normal(M, C, scale=C**-0.5), fc1_bias=dice.normal(M, scale=0.3),
        fc2_weight=dice.normal(C, M, scale=M**-0.5), fc2_bias=dice.normal(C, scale=0.3), attn_scale=None, mlp_scale=None,
    )  # fmt: skip
    if dice.chance(0.5):
        tensors |= dict(qk_bias=None, v_bias=None)
    for name in ("attn_scale", "mlp_scale"):
        if dice.chance(0.25):
            keep = dice.pick(0.25, 0.5, 0.9)
            tensors[name] = torch.tensor([dice.pick(0.0, 1 / keep, 1 / keep) for _ in range(P)], dtype=torch.float64)
    return tensors, dict(num_heads=heads), set(), sizes


def fold_values(dice: Dice) -> tuple[dict, dict, set, dict]:
    B, N, legacy = dice.pick(0, 1, 1, 2, 3), dice.pick(1, 1, 2, 3, 5, 17), dice.chance(0.4)
    S = dice.pick(1, 2, 3, 4, 9, 16, 16, 36, 64)
    C, E = dice.upto(96 if dice.chance(0.1) else 24), dice.pick(dice.upto(48), dice.upto(200))
    width = C if legacy else S * C
    tensors = dict(
        pixel=dice.normal(B * N, S, C, mean=0.5), patch=dice.normal(B, 1 + N, E),
        norm1_weight=dice.normal(width, scale=0.3, mean=1), norm1_bias=dice.normal(width, scale=0.3),
        proj_weight=dice.normal(E, S * C, scale=(S * C) ** -0.5), proj_bias=dice.normal(E),
        norm2_weight=dice.normal(E, scale=0.3, mean=1), norm2_bias=dice.normal(E, scale=0.3),
    )  # fmt: skip
    if dice.chance(0.5):
        tensors["proj_bias"] = None
    if dice.chance(0.9 if legacy else 0.1):
        tensors |= dict(norm2_weight=None, norm2_bias=None)
    return tensors, {}, set(), dict(C=C, E=E, S=S)


def unusual_values(dice: Dice, tensors: dict, half: bool) -> str:
    """Replace the values of the activation, or scale those of a weight; returns what was done."""
    name, x = next(iter(tensors.items()))
    what = dice.pick("saturated", "constant", "far mean", "tiny", "huge", "outliers", "bad", "large weight", "zero weight")
    others = [n for n, w in tensors.items() if w is not None and n != name and not n.endswith("scale")]
    if what == "saturated" and "qk_weight" in tensors:
        tensors["qk_weight"] = tensors["qk_weight"] * 30
    elif what == "constant":
        tensors[name] = x[..., :1].expand(x.shape).clone()
    elif what == "far mean":
        tensors[name] = (100 if half else 1000) * dice.pick(1, -1) + x * dice.pick(1e-2, 0.1, 1.0)
    elif what in ("tiny", "huge"):
        tensors[name] = x * (dice.pick(1e-2, 1e-4, 1e-6) if what == "tiny" else 100.0 if half else dice.pick(1e3, 1e6))
    elif what == "outliers":
        mask = torch.rand(x.shape, generator=dice.generator) < 0.02
        tensors[name] = torch.where(mask, x * 100, x)
    elif what == "bad" and x.numel():
        x.view(-1)[dice.random.randrange(x.numel())] = dice.pick(math.nan, math.inf, -math.inf)
    elif what in ("large weight", "zero weight"):
        chosen = dice.pick(*others)
        tensors[chosen] = tensors[chosen] * (0.0 if what == "zero weight" else dice.pick(10.0, 30.0 if half else 1000.0))
        what += f" {chosen}"
    return what


def spoil(dice: Dice, tensors: dict, others: dict, operation: str) -> tuple[str, set[str]]:
    """Give one argument a shape, number or type that is not the documented one."""
    name = dice.pick(*[n for n, x in tensors.items() if x is not None])
    x = tensors[name]
    numbers = {
        "pixel_embed": [("stride", 0), ("stride", -1), ("patch_size", 8), ("patch_size", (4,)), ("patch_size", (0, 4)),
                        ("patch_stride", (0, 0))],
        "inner": [("num_heads", 0), ("num_heads", -2), ("num_heads", 5), ("num_heads", 7), ("eps", -1.0)],
        "fold": [("eps", -1.0)],
    }["inner" if operation in ("outer", "block") else operation]  # fmt: skip
    what = dice.pick("number", "longer", "shorter", "0-d", "more dimensions", "fewer dimensions", "list")
    if what == "number":
        key, value = dice.pick(*numbers)
        others[key] = value
        return f"{key}={value}", {"window"} if operation == "pixel_embed" else {"size"}  # which no patches at all fit
    d = dice.random.randrange(x.ndim)
    if what == "list":
        tensors[name] = [1.0, 2.0]
        return f"{name} is a list", {"dtype"}
    tensors[name] = (
        torch.cat([x, x.narrow(d, 0, min(1, x.shape[d]))], d) if what == "longer"
        else x.narrow(d, 0, max(0, x.shape[d] - 1)) if what == "shorter"
        else torch.tensor(0.5, dtype=torch.float64) if what == "0-d"
        else x.unsqueeze(0) if what == "more dimensions" else x.flatten(0, 1) if x.ndim > 1 else x[:1]
    )  # fmt: skip
    return f"{name} {what}", {"shape"}


def draw_call(operation: str, dice: Dice) -> Call:
    values = globals()[f"{operation}_values"]
    tensors, others, restrictions, sizes = values(dice)
    dtype, about, autocast = dice.pick(torch.float32, torch.float32, *HALVES), [], (False, False)
    half, weights = dice.pick(*HALVES), dtype
    if dice.chance(0.2):
        autocast = dice.pick((True, False), (False, True), (True, True))
        weights = torch.float32 if autocast[0] else dtype
        about.append("autocast " + "+".join([n for n, on in zip(("forward", "backward"), autocast, strict=True) if on]))
    narrow = dtype in HALVES or autocast[0]
    if dice.chance(0.35):
        about.append(unusual_values(dice, tensors, narrow))
    ordinary = not about and sizes["C"] > 2 and sizes.get("E", 3) > 2  # no row is constant: then eps = 0 is 0 / 0
    if operation != "pixel_embed" and dice.chance(0.4):
        others["eps"] = dice.pick(1e-6, 1e-2, *([1e-12, 0.0] if ordinary else []))
    expand = others.get("eps", 1) > 1e-9
    if dice.chance(0.1):
        for name in dice.random.sample(sorted(tensors), dice.pick(1, 1, 2)):
            if name != next(iter(tensors)):
                tensors[name] = None
                about.append(f"{name}=None")
        if operation in ("inner", "outer", "block"):
            restrictions.add("absent")
    if dice.chance(0.05):
        what, more = spoil(dice, tensors, others, operation)
        about.append(what)
        restrictions |= more
    if kernels.OPERATIONS[operation].unsupported(sizes):
        restrictions.add("size")
    dtypes = {
        name: dtype if i == 0 or name in ("patch", "pixel") or name.endswith("_scale") else weights
        for i, name in enumerate(tensors)
    }
    if dice.chance(0.06):
        name = dice.pick(*tensors, *[n for n in ("patch", "pixel_pos", "attn_scale", "mlp_scale") if n in tensors])
        dtypes[name] = dice.pick(torch.float16, torch.float32, torch.float64)
        if dtypes[name] != dtype:
            restrictions.add("dtype")
            about.append(f"{name} is {dtypes[name]}")
    given = [name for name, x in tensors.items() if isinstance(x, Tensor)]
    wanted = dice.pick([], given, given, [n for n in given if dice.chance(0.5)], [dice.pick(*given)])
    if operation == "pixel_embed" and interpreted_turns(tensors["image"], others) > (400 if dice.chance(0.03) else 60):
        wanted = [n for n in wanted if n != "image"]
    if 2 in (sizes["C"], sizes.get("E")):  # a norm of two values is their sign: what flows back is 0, but for rounding
        wanted = []
    calm, placed = dice.chance(0.3), dict(tensors)
    for name in given:  # behind a matrix of rank one and a norm, what flows back cancels; so it has rank one in a forward only
        expanded = expand and not (wanted and tensors[name].ndim == 2)
        placed[name] = dice.place(name, tensors[name], dtypes[name], calm, expanded)
    seed, calm = dice.random.getrandbits(60), dice.chance(0.5)

    def upstream(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        again = Dice(seed, "upstream", 0)
        again.guard = dice.guard
        rounded = again.normal(*shape).to(HALVES[-1] if narrow else torch.float32).double()
        return again.place("the upstream gradient", rounded, dtype, calm)

    return Call(operation, placed, others, wanted, dice.guard, upstream, autocast, half, restrictions, about)


# ---- whole models ----


def draw_tnt(dice: Dice, dtype: torch.dtype, narrowest: int = 3) -> tuple[TNT, dict[str, Any], tuple[int, ...]]:
    """A small TNT with every parameter off its initial value, its options, and the shape of its images."""
    stride = dice.pick(2, 4, 4, 8)
    patch = stride * dice.pick(*[k for k in (1, 2, 3, 4) if k * stride <= 16])
    step = patch if dice.chance(0.7) else stride * dice.random.randint(1, patch // stride)
    sides = [patch + step * k for k in dice.pick((0, 0), (1, 0), (1, 1), (0, 2))]
    heads, heads_outer, depth = dice.pick(1, 2, 4), dice.pick(1, 2, 3), dice.pick(1, 1, 2)
    options = dict(
        img_size=tuple(sides), patch_size=patch, patch_stride=step, first_stride=stride, in_chans=dice.pick(1, 3, 3, 4),
        inner_dim=heads * dice.random.randint(narrowest, 8), num_heads_inner=heads,
        embed_dim=heads_outer * dice.random.randint(6, 12),
        num_heads_outer=heads_outer, depth=depth, num_classes=dice.pick(0, 3), legacy=dice.chance(0.4),
        qkv_bias=dice.chance(0.4), se_ratio=dice.pick(0.0, 0.0, 0.5), inner_mlp_ratio=dice.pick(4.0, 1.5, 2.0),
        use_pixel_pos=dice.chance(0.7), use_patch_pos=dice.chance(0.7), global_pool=dice.pick("token", "avg", ""),
        inner_blocks=None if dice.chance(0.7) else dice.pick((), (0,), (depth - 1,)),
    )  # fmt: skip
    model = TNT(**options).double()
    with torch.no_grad():
        for p in model.parameters():
            p += dice.normal(*p.shape, scale=0.1)
    return model.to(DEVICE, dtype), options, (dice.pick(1, 2, 3), options["in_chans"], *sides)


def call_model(
    model: TNT, backend: str, image: Tensor, gradients: bool, seed: int, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output and gradients by name, in the given mode of the model; whatever it draws follows ``seed``."""
    model.backend = backend
    image = image.detach().requires_grad_(image.requires_grad)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(gradients), torch.autocast(DEVICE, autocast) if autocast else nullcontext():
        out = model(image)
    found = {"output": out.detach()}
    if gradients and out.requires_grad:
        generator = torch.Generator().manual_seed(seed)
        out.backward(torch.randn(out.shape, generator=generator).to(HALVES[-1]).to(out))
        leaves = {"image": image, **dict(model.named_parameters())}
        found |= {
            f"gradient of {n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items() if p.requires_grad
        }
    return found


class Model:
    """A whole model, fused, by the rule."""

    def __init__(self, dice: Dice):
        self.dtype, self.autocast = dice.pick((torch.float32, None), (HALVES[0], None), (torch.float32, dice.pick(*HALVES)))
        self.model, self.options, shape = draw_tnt(dice, self.dtype)
        if dice.chance(0.4) and DEVICE == "cpu":  # a GPU draws other numbers for other dtypes
            for block in self.model.blocks:
                block.drop_path = timm.layers.DropPath(dice.pick(0.3, 0.9))
        self.model.train(dice.chance(0.5))
        self.gradients, self.seed = dice.chance(0.5), dice.random.getrandbits(40)
        self.guard = dice.guard
        self.image = dice.place("image", dice.normal(*shape), self.dtype).requires_grad_(dice.chance(0.1))

    def describe(self) -> str:
        mode = (
            f"{'train' if self.model.training else 'eval'}, {self.dtype}, autocast {self.autocast}, gradients {self.gradients}"
        )
        return f"model: {self.options}, image {tuple(self.image.shape)} {self.image.stride()}, {mode}"

    def judge(self) -> str:
        given = (self.gradients, self.seed)
        own = [call_model(self.model, "reference", self.image, *given, self.autocast)]
        model, image = copy.deepcopy(self.model).double(), self.image.detach().double().requires_grad_(self.image.requires_grad)
        with ExactSoftmax():
            exact = call_model(model, "reference", image, *given)
        for draw in DRAWS:
            for dtype in (self.dtype, torch.float64):
                model, image = copy.deepcopy(self.model), self.image.detach().to(dtype).requires_grad_(self.image.requires_grad)
                with torch.no_grad():
                    for p in model.parameters():
                        p.copy_(off_by_rounding(p, self.autocast or self.dtype, draw))
                model = model.to(dtype)
                with rounded_softmax(self.autocast or self.dtype) if dtype == torch.float64 else nullcontext():
                    own.append(call_model(model, "reference", image, *given, None if dtype == torch.float64 else self.autocast))
        self.model.backend = "fused"
        reasons = why_not_fused(self.model, self.image)
        if reasons:
            raise Wrong(f"an ordinary model is not fused: {reasons}")
        with self.guard:
            fused = call_model(self.model, "fused", self.image, *given, self.autocast)
        self.guard.check()
        for name, x in exact.items():
            if self.autocast is None and fused[name].dtype != own[0][name].dtype:
                raise Wrong(f"{name} is {fused[name].dtype}, the reference's {own[0][name].dtype}")
            compare(name, fused[name], [same[name] for same in own], x, self.autocast or self.dtype)
        return "right"


# ---- surgery ----


class Times(nn.Module):
    """A parametrisation, or an owner of a wrapped module."""

    def forward(self, x):
        return 1.5 * x


def times(x: Any) -> Any:
    """What hooks and replaced functions do to a result, so that to leave them out shows."""
    return tuple(map(times, x)) if isinstance(x, tuple) else 1.5 * x if isinstance(x, Tensor) else x


def changed(dice: Dice, value: Any) -> Any:
    """Another value of the same type; the value itself where there is none at hand."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.pick(value + 1, value * 2, 0, value // 2)
    if isinstance(value, float):
        return dice.pick(value + 0.5, value * 1000, 0.0)  # an effect far above any rounding
    if isinstance(value, (tuple, list)) and value:
        one = dice.random.randrange(len(value))
        every = dice.chance(0.5)
        return type(value)([changed(dice, v) if every or i == one else v for i, v in enumerate(value)])
    strings = ("reflect", "circular", "replicate", "tanh", "none", "avg", "token", "", "same", "valid")
    return dice.pick(*strings) if isinstance(value, str) else value


def change_attribute(dice: Dice, model: TNT) -> str:
    inherited = {"_reversed_padding_repeated_twice"}  # Conv2d keeps its padding twice
    # what raises inside of PyTorch's checkpoint leaves its hooks on saved tensors, for all that follows
    left = ("backend", "training", "grad_checkpointing")
    found = [
        (path, module, key) for path, module in model.named_modules() for key, value in vars(module).items()
        if (key[0] != "_" or key in inherited) and key not in left and changed(dice, value) is not value
    ]  # fmt: skip
    path, module, key = dice.pick(*found)
    value = changed(dice, getattr(module, key))
    before = getattr(module, key)
    setattr(module, key, value)
    return f"{path}.{key} = {value!r} (was {before!r})"


def change_parameter(dice: Dice, model: TNT) -> str:
    path, module, key = dice.pick(
        *[(p, m, k) for p, m in model.named_modules() for k, x in m._parameters.items() if x is not None]
    )
    x = getattr(module, key).detach()
    how = dice.pick(
        "None", "None", "half", "double", "one value", "scalar", "longer", "transposed", "plain", "subclass", "buffer", "frozen"
    )
    if how == "None":
        setattr(module, key, None)
    elif how in ("plain", "buffer"):
        delattr(module, key)
        if how == "plain":
            setattr(module, key, x * 2)
        else:
            module.register_buffer(key, x * 2)
    elif how == "frozen":
        getattr(module, key).requires_grad_(False)
    elif how == "subclass":
        setattr(module, key, type("Foreign", (nn.Parameter,), {})(x * 2))
    else:
        new = {
            "half": lambda: x.half(), "double": lambda: x.double(), "one value": lambda: x.flatten()[:1].clone(),
            "scalar": lambda: x.flatten()[0].clone(), "longer": lambda: torch.cat([x, x]),
            "transposed": lambda: x.transpose(0, -1),
        }[how]()  # fmt: skip
        setattr(module, key, nn.Parameter(new))
    return f"{path}.{key}: {how}"


def children(model: TNT) -> list[tuple[str, nn.Module, str, nn.Module]]:
    return [(f"{p}.{k}", m, k, c) for p, m in model.named_modules() for k, c in m._modules.items() if c is not None]


def replace_module(dice: Dice, model: TNT) -> str:
    path, parent, key, old = dice.pick(*children(model))
    like = next(iter(old.parameters()), model.cls_token)
    choices: dict[str, Callable[[], nn.Module | None]] = {
        "Identity": nn.Identity, "None": lambda: None, "Sequential": lambda: nn.Sequential(old), "ReLU": nn.ReLU,
        "Sequential of two": lambda: nn.Sequential(old, Times()), "Dropout": lambda: nn.Dropout(0.5),
        "tanh GELU": lambda: nn.GELU("tanh"),
        "ModuleList": lambda: nn.ModuleList([old]),
    }  # fmt: skip
    if isinstance(old, nn.Linear):
        i, o = old.in_features, old.out_features
        choices |= {
            "without bias": lambda: nn.Linear(i, o, bias=False), "with bias": lambda: nn.Linear(i, o),
            "Bilinear": lambda: nn.Bilinear(i, i, o), "one more in": lambda: nn.Linear(i + 1, o),
            "one more out": lambda: nn.Linear(i, o + 1), "one output": lambda: nn.Linear(i, 1),
            "LazyLinear": lambda: nn.LazyLinear(o),
        }  # fmt: skip
    elif isinstance(old, nn.LayerNorm):
        (n,) = old.normalized_shape
        choices |= {
            "eps": lambda: nn.LayerNorm(n, eps=0.5), "not affine": lambda: nn.LayerNorm(n, elementwise_affine=False),
            "no bias": lambda: nn.LayerNorm(n, bias=False), "two dimensions": lambda: nn.LayerNorm((1, n)),
            "RMSNorm": lambda: nn.RMSNorm(n),
            "S and C": lambda: nn.LayerNorm((n // model.pixel_embed.in_dim, model.pixel_embed.in_dim)),
            "one": lambda: nn.LayerNorm(1),
            "C only": lambda: nn.LayerNorm(model.pixel_embed.in_dim), "timm's": lambda: timm.layers.LayerNorm(n),
        }  # fmt: skip
    elif isinstance(old, nn.Conv2d):
        i, o, k, s, p = old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding
        more = dict(kernel_size=dice.pick(k, 5, (7, 5)), stride=dice.pick(s, 1, (s[0], 1)), padding=dice.pick(p, 2, 0, "valid"),
                    dilation=dice.pick(1, 2), bias=dice.chance(0.5),
                    padding_mode=dice.pick("zeros", "zeros", "reflect", "circular"))  # fmt: skip
        choices |= {f"Conv2d {more}": lambda: nn.Conv2d(i, o, **more)} | {
            f"Conv2d {n}": lambda: nn.Conv2d(i, o, 7, s, 3) for n in range(2)
        }
    what = dice.pick(*choices)
    new = choices[what]()
    setattr(parent, key, new if new is None or what.startswith("Sequential") else new.to(like.device, like.dtype))
    return f"{path}: replaced by {what}"


def hook(dice: Dice, model: TNT) -> str:
    path, module = dice.pick(*list(model.named_modules()))
    kind = dice.pick("forward", "forward pre", "full backward", "full backward pre", "parameter", "accumulated")
    if kind in ("parameter", "accumulated"):
        path, p = dice.pick(*list(model.named_parameters()))
        p.register_hook(times) if kind == "parameter" else p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(1.5))
    elif kind == "forward":
        module.register_forward_hook(lambda m, args, out: times(out))
    elif kind == "forward pre":
        module.register_forward_pre_hook(lambda m, args: times(args))
    elif kind == "full backward":
        module.register_full_backward_hook(lambda m, inputs, outputs: times(inputs))
    else:
        module.register_full_backward_pre_hook(lambda m, outputs: times(outputs))
    return f"{path}: a {kind} hook"


def parametrise(dice: Dice, model: TNT) -> str:
    path, module, key = dice.pick(
        *[(p, m, k) for p, m in model.named_modules() for k, x in m._parameters.items() if x is not None]
    )
    choices = {
        "weight_norm": lambda: parametrizations.weight_norm(module, key),
        "pruned": lambda: prune.random_unstructured(module, key, 0.5),
        "spectral_norm": lambda: parametrizations.spectral_norm(module, key),
        "old weight_norm": lambda: nn.utils.weight_norm(module, key),
        "old spectral_norm": lambda: nn.utils.spectral_norm(module, key),
        "1.5 ×": lambda: parametrize.register_parametrization(module, key, Times()),
    }  # fmt: skip
    what = dice.pick(*choices)
    with suppress(ValueError, RuntimeError, IndexError):  # e.g. of a vector; then nothing was done
        choices[what]()
    return f"{path}.{key}: {what}"


def replace_function(dice: Dice, model: TNT) -> str:
    path, module = dice.pick(*list(model.named_modules()))
    if dice.chance(0.3):
        forward = type(module).forward
        module.__class__ = type(
            "Foreign", (type(module),), {"forward": lambda self, *args, **kw: times(forward(self, *args, **kw))}
        )
        return f"{path}: another class"
    key = dice.pick(
        "forward", "forward", *[k for k in ("inner", "fold", "outer", "forward_features", "sizes") if hasattr(module, k)]
    )
    function = getattr(module, key)
    setattr(module, key, lambda *args, **kw: times(function(*args, **kw)))
    return f"{path}.{key}: replaced"


def cast(dice: Dice, model: TNT) -> str:
    path, module = dice.pick(*list(model.named_modules()))
    dtype = dice.pick(torch.float16, torch.float64)
    module.to(dtype)
    return f"{path}: {dtype}"


class Surgery:
    """Something was done to a model. Its fused path gives the reference's answer, or a reason."""

    ACTIONS = (change_attribute,) * 4 + (
        change_parameter,
        replace_module,
        replace_module,
        hook,
        parametrise,
        replace_function,
        cast,
    )
    # Far above what float32 rounds, even through a softmax that surgery saturated; far below what surgery does: scale by 1.5 or
    # more, or take something away whose values are about 0.1.
    TOLERANCE = 1e-3

    def __init__(self, dice: Dice):
        self.model, self.options, shape = draw_tnt(dice, torch.float32, 6)
        if dice.chance(0.1):
            for block in self.model.blocks:
                block.drop_path = timm.layers.DropPath(0.5)
        self.model.train(dice.chance(0.3))
        self.image = dice.place("image", dice.normal(*shape), torch.float32).requires_grad_(dice.chance(0.1))
        self.gradients, self.seed, self.guard = dice.chance(0.5), dice.random.getrandbits(40), dice.guard
        self.about = [dice.pick(*self.ACTIONS)(dice, self.model) for _ in range(dice.pick(1, 1, 1, 2))]

    def describe(self) -> str:
        mode = f"{'train' if self.model.training else 'eval'}, gradients {self.gradients}"
        return f"surgery: {'; '.join(self.about)}\n  {self.options}, image {tuple(self.image.shape)}, {mode}"

    def judge(self) -> str:
        expected, refusal = None, None
        lazy = any(map(nn.parameter.is_lazy, self.model.parameters()))
        self.states = {name: x.clone() for name, x in self.model.named_buffers()}
        try:
            for _ in range(1 + lazy):  # LazyLinear draws its weights in its first call, and what is drawn after them is other
                expected = self.answer("reference")
        except Exception as error:  # whatever it is, the fused path must not answer
            refusal = error
        self.model.backend = "fused"
        reasons = why_not_fused(self.model, self.image)
        try:
            with self.guard:
                fused = self.answer("fused")
        except Exception as error:
            self.guard.check()
            named = isinstance(error, RuntimeError) and "backend='fused' cannot run" in str(error)
            if refusal is not None:
                return "reference raises too"
            if not named:
                raise Wrong(f"{type(error).__name__} inside of the fused path: {error}") from error
            if not reasons:
                raise Wrong(f"why_not_fused has no reason, the fused path has: {error}") from error
            return "reason"
        self.guard.check()
        if refusal is not None:
            raise Wrong(f"answers where the reference raises {type(refusal).__name__}: {refusal}")
        if reasons:
            raise Wrong(f"runs although why_not_fused says {reasons}")
        try:
            self.compare(expected, fused, expected)
        except Wrong:
            for block in self.model.blocks:  # whose modules are called with PyTorch's fused attention: see ``fused_attention``
                if hasattr(getattr(block, "attn_out", None), "attn_backend"):
                    block.attn_out.attn_backend = "sdpa"
            self.compare(expected, fused, self.answer("reference"))
        return "right"

    def answer(self, backend: str) -> dict[str, Tensor]:
        """``call_model``, from the buffers at the beginning: spectral_norm's change at each call."""
        for name, x in self.model.named_buffers():
            if name in self.states:
                x.copy_(self.states[name])
        return call_model(self.model, backend, self.image, self.gradients, self.seed)

    def compare(self, expected: dict[str, Tensor], fused: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        """Raise Wrong where these differ by more than rounding; ``own``: as ``expected``, rounded in another way."""
        largest = max([x.abs().nan_to_num().max().item() for x in expected.values() if x.numel()], default=0.0)
        for name, x in expected.items():
            y = fused[name]
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                raise Wrong(f"{name} is {y.dtype} {tuple(y.shape)}, the reference's {x.dtype} {tuple(x.shape)}")
            if not torch.equal(x.isfinite(), y.isfinite()):
                raise Wrong(f"{name} is finite in other places than the reference's")
            x, y, z = x[x.isfinite()], y[x.isfinite()], own[name][x.isfinite()]
            allowed = self.TOLERANCE * x.abs() + 1e-6 * largest + 2 * (x - z).abs().nan_to_num()  # or 0, but for rounding
            if x.numel() and (x - y).abs().max() > allowed.max():
                raise Wrong(f"{name}: off by {(x - y).abs().max():.3g} of {x.abs().max():.3g}")


def draw(seed: int, kind: str, index: int) -> Call | Model | Surgery:
    """The case that these three determine."""
    dice = Dice(seed, kind, index)
    return Model(dice) if kind == "model" else Surgery(dice) if kind == "surgery" else draw_call(kind, dice)
