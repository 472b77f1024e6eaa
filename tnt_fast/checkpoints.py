"""Weights in and out: files of timm, of the authors' release, of mmpretrain and of trainers around them; other image sizes.

What a file holds is read by ``reading.py``; here is what it means. Nothing is loaded before all of it was found to fit.
Writing never loses what was there: a new file is written beside the old one and renamed over it when it is complete.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import timm.models.tnt
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from tnt_fast.reading import CheckpointError, read_checkpoint, shown
from tnt_fast.tnt import TNT
from tnt_fast.writing import replacing

FORMAT = 1  # of the checkpoints of tnt-fast train


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write ``torch.save(checkpoint)`` to ``path`` so that ``path`` holds either the old file or the complete new one.

    A full disk, an interrupt or a crash on the way leaves the old file as it was.
    """
    with replacing(path) as file:
        torch.save(dict(checkpoint), file)


def load_checkpoint(
    model: TNT,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    use_ema: bool = True,
    reset_head: bool = False,
    source_grid: tuple[int, int] | None = None,
) -> TNT:
    """Load weights into ``model``, whoever wrote them, and return the model, which changes only if all of them fit.

    Names of timm, of the authors' release and of mmpretrain (legacy), at any depth of dicts and under any prefix
    (``state_dict``, ``net``; ``module.``, ``student.``, ``backbone.``): where they lie is found by the keys. Patch positions
    are resampled (bicubic) to the model's grid.

    Args:
        source: a ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file, a Hugging Face folder, or what such a file holds.
        use_ema: prefer averaged weights where there are both.
        reset_head: keep the model's own head, for another set of classes.
        source_grid: rows and columns of the file's patch grid; None: what the file says, else square.

    Raises:
        FileNotFoundError: no such file. CheckpointError: it cannot be read or does not fit; the message names the keys.
    """
    fitted = fit(model, source, use_ema=use_ema, reset_head=reset_head, source_grid=source_grid)
    model.load_state_dict({**model.state_dict(), **fitted.state})
    return model


class Fitted(NamedTuple):
    """Weights under a model's names and in its shapes, without a head that it keeps, and a sentence about what they are."""

    state: dict[str, Tensor]
    said: str
    has_head: bool = True


def fit(
    model: TNT,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    use_ema: bool = True,
    reset_head: bool = False,
    adapt: bool = False,
    source_grid: tuple[int, int] | None = None,
    what: str = "the checkpoint",
) -> Fitted:
    """As ``load_checkpoint``, without loading: ``model`` may be on the device "meta".

    Args:
        adapt: keep the model's own head where the numbers of classes differ, and adapt the stem to its input channels, as timm
            does with pretrained weights.
        what: a dict is called in messages.
    """
    if isinstance(source, Mapping):
        checkpoint: Mapping[str, Any] = source
    else:
        checkpoint, what = read_checkpoint(source), repr(os.fspath(source))
    try:
        found = _find_weights(checkpoint, use_ema)
        _check_kinds(found.state)
        state = convert_state_dict(found.state, model, source_grid=source_grid or _saved_grid(checkpoint))
        said = [f"loaded {len({key.split('.')[1] for key in state if key.startswith('blocks.')})} blocks{found.said}"]
        before = _classes(state)
        if adapt:
            reset_head = reset_head or before != model.num_classes
            stem, channels = state.get("pixel_embed.proj.weight"), model.in_chans
            if stem is not None and stem.ndim == 4 and stem.shape[1] != channels and stem.shape[1] == 3:
                state["pixel_embed.proj.weight"] = adapt_input_conv(channels, stem)
                said.append(f"input channels adapted: 3 → {channels}")
        if reset_head:
            state = {k: v for k, v in state.items() if not k.startswith("head.")}
            said.append(f"head replaced: {before:,} → {model.num_classes:,} classes" if before else "new head")
        if "patch_pos" in state and not any(state["patch_pos"] is value for value in found.state.values()):
            said.append("positions resampled to {}×{} patches".format(*model.pixel_embed.grid_size))
        _check_fit(state, model, reset_head)
        _check_finite(state, model)
    except CheckpointError as error:
        raise CheckpointError(f"{what} does not fit this model: {error}") from error
    return Fitted(state, ", ".join(said), not reset_head)


def head_classes(checkpoint: Mapping[str, Any]) -> int | None:
    """How many classes the head in a checkpoint of any origin has; None: it has no head, or is none of a TNT."""
    try:
        state = _find_weights(checkpoint, use_ema=True).state
    except CheckpointError:
        return None
    return _classes(state) or None


def _classes(state: Mapping[str, Tensor]) -> int:
    head = state.get("head.weight", state.get("head.fc.weight"))
    return head.shape[0] if head is not None and head.ndim == 2 and head.shape[1] else 0


def _saved_grid(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    grid = checkpoint.get("grid_size")
    if grid is None:
        return None
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        raise CheckpointError(f"its entry 'grid_size' is {shown(grid)}; expected rows and columns of patches")
    return (grid[0], grid[1])


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: TNT) -> dict[str, Tensor]:
    """timm's hook for pretrained weights: names and positions; timm itself adapts head and input channels."""
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    grid = model.pixel_embed.dynamic_feat_size(size[1:]) if size else None
    count = state_dict["patch_pos"].shape[1] - 1 if "patch_pos" in state_dict else None
    return convert_state_dict(state_dict, model, source_grid=grid if grid and grid[0] * grid[1] == count else None)


def convert_state_dict(
    state_dict: Mapping[str, Tensor], model: TNT, *, source_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Rename the keys of any known origin to timm's and resample the patch positions to the model's grid.

    Raises:
        CheckpointError: not a TNT, or its positions cannot be placed on a grid.
    """
    state = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if any(".inner_block." in key for key in state):
        state = _from_mmpretrain(state)
    elif any("inner_attn" in key or key in ("outer_pos", "inner_pos") for key in state):
        state = _from_authors(state)
    if not any(key.startswith("pixel_embed.") for key in state):
        raise CheckpointError(_no_tnt(state))
    if "patch_pos" in state and model.patch_pos is not None:
        state["patch_pos"] = _resample(state["patch_pos"], model, source_grid)
    return state


# ---- where the weights lie ----

_STEM = "pixel_embed.proj.weight"  # of timm and mmpretrain; the authors call it as ViTs do
_AUTHORS_STEM, _AUTHORS_NORM = "patch_embed.proj.weight", "proj_norm1.weight"
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averag\w*)(?![a-z])")
_DEEPEST = 6  # dicts in dicts


class _Weights(NamedTuple):
    state: dict[str, Tensor]
    said: str


def _find_weights(checkpoint: Mapping[str, Any], use_ema: bool) -> _Weights:
    """The one TNT in nested dicts: by the key of its stem, what stands before it is the prefix of all its keys."""
    places = {(id(mapping), prefix): (name, mapping, prefix) for name, mapping, prefix in _places(checkpoint, "")}.values()
    if not places:
        raise CheckpointError(_no_tnt(dict(_tensors(checkpoint))))
    averaged, plain = (
        [place for place in places if bool(_AVERAGED.search(place[0].lower())) is wanted] for wanted in (True, False)
    )
    chosen = averaged if averaged and (use_ema or not plain) else plain
    _, mapping, prefix = chosen[0]
    if len(chosen) > 1:
        names = ", ".join(repr(shown(place[0])) for place in chosen[:4])
        raise CheckpointError(
            f"it holds the weights of {len(chosen)} TNTs, at {names}; take the dict of one: load_checkpoint(model, dict)"
        )
    state = {key[len(prefix) :]: value for key, value in mapping.items() if isinstance(key, str) and key.startswith(prefix)}
    beside = prefix[: prefix.rfind(".", 0, -1) + 1] + "head."  # mmpretrain's head is beside its backbone
    if prefix and not any(key.startswith("head.") for key in state):
        found = {key: value for key, value in mapping.items() if isinstance(key, str) and key.startswith(beside)}
        state |= {key[len(beside) - len("head.") :]: value for key, value in found.items()}
    said = ""
    if averaged and plain:
        said = f" ({'the averaged' if chosen is averaged else 'not the averaged'} weights of the two that it holds)"
    return _Weights({key: value for key, value in state.items() if isinstance(value, Tensor)}, said)


def _places(value: Mapping[Any, Any], path: str, depth: int = 0) -> Iterator[tuple[str, Mapping[Any, Any], str]]:
    """(name, dict, prefix) of each TNT."""
    for key, inner in value.items():
        if not isinstance(key, str):
            continue
        if isinstance(inner, Mapping) and depth < _DEEPEST:
            yield from _places(inner, f"{path}{key}.", depth + 1)
        for stem in (_STEM, _AUTHORS_STEM):
            prefix = key.removesuffix(stem)
            whole = prefix != key and (not prefix or prefix.endswith(".")) and isinstance(inner, Tensor)
            if whole and (stem == _STEM or f"{prefix}{_AUTHORS_NORM}" in value):
                yield path + prefix, value, prefix


def _tensors(value: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for key, inner in value.items():
        if isinstance(inner, Tensor):
            yield f"{path}{key}", inner
        elif isinstance(inner, Mapping) and depth < _DEEPEST:
            yield from _tensors(inner, f"{path}{key}.", depth + 1)


def _no_tnt(state: Mapping[str, Tensor]) -> str:
    names = ", ".join(shown(key) for key in list(state)[:3]) or "no tensors"
    return f"it does not look like a TNT: no {_STEM} among its {len(state)} tensors ({names}, …)"


# ---- what the weights are called ----

_AUTHORS = (  # in this order: proj_norm and inner_norm before the shorter names
    ("outer_pos", "patch_pos"), ("inner_pos", "pixel_pos"), ("patch_embed", "pixel_embed"),
    ("proj_norm1", "norm1_proj"), ("proj_norm2", "norm2_proj"), ("inner_norm1", "norm_in"), ("inner_attn", "attn_in"),
    ("inner_norm2", "norm_mlp_in"), ("inner_mlp", "mlp_in"), ("outer_norm1", "norm_out"), ("outer_attn", "attn_out"),
    ("outer_norm2", "norm_mlp"), ("outer_mlp", "mlp"),
)  # fmt: skip


def _from_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        if key == "outer_tokens":  # zeros that are never trained
            continue
        for old, new in _AUTHORS:
            key = key.replace(old, new)
        if key == "pixel_pos" and value.ndim == 3 and value.shape[0] == 1:  # (1, S, C), as the release has it
            side = round(value.shape[1] ** 0.5)
            if side * side != value.shape[1]:
                raise CheckpointError(f"inner_pos has {value.shape[1]} positions, which form no square")
            value = value.permute(0, 2, 1).reshape(1, value.shape[2], side, side)
        out[key] = value
    return out


_MMPRETRAIN = (
    (r"^projection\.", "proj."), (r"^head\.fc\.", "head."), (r"^layers\.", "blocks."),
    (r"\.norm_proj\.", ".norm1_proj."), (r"\.projection\.", ".proj."),
    (r"\.inner_block\.norm_attn\.", ".norm_in."), (r"\.inner_block\.norm_ffn\.", ".norm_mlp_in."),
    (r"\.inner_block\.attn\.attn\.", ".attn_in."), (r"\.inner_block\.ffn\.", ".mlp_in."),
    (r"\.outer_block\.norm_attn\.", ".norm_out."), (r"\.outer_block\.norm_ffn\.", ".norm_mlp."),
    (r"\.outer_block\.attn\.attn\.", ".attn_out."), (r"\.outer_block\.ffn\.", ".mlp."),
    (r"\.layers\.0\.0\.", ".fc1."), (r"\.layers\.1\.", ".fc2."), (r"\.out_proj\.", ".proj."),
)  # fmt: skip


def _from_mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        for pattern, new in _MMPRETRAIN:
            key = re.sub(pattern, new, key)
        stem, _, kind = key.rpartition(".in_proj_")
        if stem and value.ndim:  # (3E, E): queries and keys, then values
            split = value.shape[0] // 3 * 2
            out[f"{stem}.qk.{kind}"], out[f"{stem}.v.{kind}"] = value[:split], value[split:]
        else:
            out[key] = value
    return out


def _resample(patch_pos: Tensor, model: TNT, source_grid: tuple[int, int] | None) -> Tensor:
    """``(1, 1 + N', E)`` to the model's ``(1, 1 + N, E)``; the class token's position is kept."""
    shape = tuple(patch_pos.shape)
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or shape[2] != model.embed_dim:
        return patch_pos  # which _check_fit then names
    count, grid, side = shape[1] - 1, model.pixel_embed.grid_size, round((shape[1] - 1) ** 0.5)
    square = (side, side)
    if source_grid is None and square[0] * square[1] == count:
        if count == grid[0] * grid[1] and square != grid:
            raise CheckpointError(
                f"patch_pos has {count} positions, which may be a grid of {square[0]}×{square[1]} or the model's own "
                f"{grid[0]}×{grid[1]}; say which with source_grid={square} or source_grid={grid}"
            )
        source_grid = square
    elif source_grid is None:
        if count != grid[0] * grid[1]:
            raise CheckpointError(
                f"patch_pos has {count} positions, which form no square, and the model's grid is {grid[0]}×{grid[1]}; "
                "say how they lie with source_grid=(rows, columns)"
            )
        source_grid = grid
    if source_grid[0] * source_grid[1] != count:
        raise CheckpointError(
            f"patch_pos has {count} positions, source_grid={tuple(source_grid)} has {source_grid[0] * source_grid[1]}"
        )
    if tuple(source_grid) == grid:
        return patch_pos
    if grid[0] == grid[1] and count == grid[0] * grid[1]:  # timm leaves an equal count on a square grid as it is
        head, tail = patch_pos[:, :1], patch_pos[:, 1:]
        tail = tail.reshape(1, *source_grid, -1).permute(0, 3, 1, 2)
        tail = nn.functional.interpolate(tail.float(), size=grid, mode="bicubic", antialias=True).to(patch_pos.dtype)
        return torch.cat([head, tail.flatten(2).transpose(1, 2)], dim=1)
    return resample_abs_pos_embed(patch_pos, new_size=list(grid), old_size=list(source_grid), num_prefix_tokens=1)


def _check_kinds(state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors that are no numbers to compute with, or larger than what is stored of them."""
    wrong = [f"{shown(key)} is {kind}" for key, value in state.items() if (kind := _wrong_kind(value))]
    if wrong:
        raise CheckpointError(
            f"{_listing('not weights', wrong)}. Weights are dense tensors of {', '.join(map(_dtype, WEIGHTS))}"
        )


WEIGHTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrong_kind(value: Tensor) -> str:
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_nested or value.layout != torch.strided:
        return f"laid out as {value.layout}"
    if value.is_quantized or value.dtype not in WEIGHTS:
        return _dtype(value.dtype)
    if value.is_meta:
        return "on the device 'meta', without numbers"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"{_size(tuple(value.shape))}, expanded from less"
    return ""


def _size(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} dimensions"


def _check_finite(state: Mapping[str, Tensor], model: TNT) -> None:
    for name, own in model.state_dict().items():
        value = state.get(name)
        if value is None or bool(torch.isfinite(value.to(own.dtype)).all()):
            continue
        where = f"as {_dtype(own.dtype)} " if bool(torch.isfinite(value).all()) else ""
        raise CheckpointError(
            f"{name} holds values that are {where}not finite (NaN or infinite); what wrote it had diverged: "
            "take an earlier checkpoint"
        )


def _check_fit(state: Mapping[str, Tensor], model: TNT, reset_head: bool) -> None:
    """Raise CheckpointError unless keys and shapes are exactly the model's."""
    own = {k: v for k, v in model.state_dict().items() if not (reset_head and k.startswith("head."))}
    missing, unexpected = [k for k in own if k not in state], [shown(k) for k in state if k not in own]
    legacy = any(re.fullmatch(r"blocks\.\d+\.proj\.bias", key) for key in state)
    folds = legacy or any(re.fullmatch(r"blocks\.\d+\.norm2_proj\.weight", key) for key in state)
    if folds and legacy != model.pixel_embed.legacy:
        kind = ("non-legacy", "legacy") if legacy else ("legacy", "non-legacy")
        raise CheckpointError(
            f"the model has the {kind[0]} stem and fold, the file holds a {kind[1]} TNT (by its keys "
            f"{'blocks.*.proj.bias' if legacy else 'blocks.*.norm2_proj.*'}); build the model with legacy={legacy}"
        )
    wrong = [
        f"{k} {_size(tuple(state[k].shape))}, model {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if not (missing or unexpected or wrong):
        return
    parts = [_listing("missing", missing), _listing("unexpected", unexpected), _listing("other shapes", wrong)]
    classes = _classes(state)
    if classes != model.num_classes and all("head." in text for text in (*missing, *unexpected, *wrong)):
        remedy = f"the file has {classes or 'no'} classes, the model {model.num_classes or 'none'}: build the model with "
        remedy += f"num_classes={classes}, or keep the model's own head with reset_head=True"
    else:
        remedy = "build the model with the sizes that the file was trained with"
    raise CheckpointError("; ".join(part for part in parts if part) + f". {remedy[0].upper()}{remedy[1:]}")


def _listing(what: str, items: list[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return f"{what}: {', '.join(items[:4])}{more}" if items else ""


_CONTAINERS = (
    timm.models.tnt.TNT, timm.models.tnt.Block, timm.models.tnt.Attention, timm.models.tnt.PixelEmbed, timm.layers.Mlp,
    nn.ModuleList,
)  # fmt: skip


def from_timm(model: timm.models.tnt.TNT, *, backend: str = "auto") -> TNT:
    """A ``tnt_fast.TNT`` with a copy of a timm TNT's weights, dtypes, device, mode, rates and pretrained_cfg.

    Every leaf module (Linear, LayerNorm, Dropout, what may have replaced them) is copied as it is, hooks included, so the
    result computes what ``model`` computes. The way back is ``timm_model.load_state_dict(ours.state_dict())``.

    Raises:
        TypeError: not a timm TNT. ValueError: a module that holds others has hooks, which cannot move along.
    """
    if type(model) is not timm.models.tnt.TNT:
        hint = "; pass its .model" if isinstance(getattr(model, "model", None), timm.models.tnt.TNT) else ""
        raise TypeError(f"from_timm takes a timm.models.tnt.TNT, got {type(model).__module__}.{type(model).__name__}{hint}")
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if isinstance(module, _CONTAINERS) and any(hooks):
            raise ValueError(f"{name or 'the model'} has hooks; remove them, and add them to the model that from_timm returns")
    embed = model.pixel_embed
    block: Any = model.blocks[0]
    ours = TNT(
        img_size=embed.img_size,
        patch_size=embed.patch_size,
        in_chans=embed.proj.in_channels,  # timm's oldest TNT has no in_chans
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        embed_dim=model.embed_dim,
        inner_dim=embed.in_dim,
        depth=len(model.blocks),
        num_heads_inner=block.attn_in.num_heads,
        num_heads_outer=block.attn_out.num_heads,
        qkv_bias=block.attn_in.qk.bias is not None,
        first_stride=embed.proj.stride[0],
        legacy=embed.legacy,
        device="meta",
        backend=backend,
    )
    memo: dict[int, Any] = {}  # one memo: what was shared stays shared
    copied: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _CONTAINERS) or any(name.startswith(f"{done}.") for done in copied):
            continue
        copied.append(name)
        if not isinstance(module, nn.Unfold):  # ours cuts patches with a function
            ours.set_submodule(name, copy.deepcopy(module, memo))
    for name in ("cls_token", "patch_pos", "pixel_pos"):
        setattr(ours, name, copy.deepcopy(getattr(model, name), memo))
    for name, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            ours.get_submodule(name).training = module.training
    ours.grad_checkpointing = model.grad_checkpointing
    for name in ("pretrained_cfg", "default_cfg"):
        if hasattr(model, name):
            setattr(ours, name, copy.deepcopy(getattr(model, name)))
    return ours
