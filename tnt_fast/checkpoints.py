"""Weights in and out: files of timm, of the authors' release and of mmpretrain, timm models, other image sizes.

Reading never executes what a file holds (``weights_only=True``, or safetensors). Writing never loses what was there: a new
file is written beside the old one and renamed over it when it is complete.
"""

import argparse
import copy
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm.models.tnt
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tnt_fast.tnt import TNT

FORMAT = 1  # of the checkpoints of tnt-fast train


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or whose contents do not fit the model."""


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write ``torch.save(checkpoint)`` to ``path`` so that ``path`` holds either the old file or the complete new one.

    A full disk, an interrupt or a crash on the way leaves the old file as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed run left is replaced by the next
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a ``.safetensors`` file or one of ``torch.save`` onto the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, of another format, without a dict at the top, or in need of executing pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {str(path)!r}")
    size = f"{path.stat().st_size:,} bytes"
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{str(path)!r} ({size}) is no readable safetensors file: {error}. It may be truncated; fetch it again."
            ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training checkpoints hold their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} ({size}) is refused: it is no file of torch.save, or it holds more than weights, and loading it "
            "could execute code. tnt_fast reads weights only. From a source that you trust, load it yourself and save "
            f"model.state_dict() to a new file. PyTorch says: {str(error).strip().splitlines()[0]}"
        ) from error
    except Exception as error:  # an unpickler that is fed foreign bytes raises anything
        raise CheckpointError(
            f"{str(path)!r} ({size}) is no readable file of torch.save: {error or type(error).__name__}. "
            "It may be truncated; fetch it again."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{str(path)!r} holds a {type(checkpoint).__name__}; expected a dict of tensors")
    return dict(checkpoint)


def load_checkpoint(
    model: TNT,
    path: str | os.PathLike,
    *,
    use_ema: bool = True,
    reset_head: bool = False,
    source_grid: tuple[int, int] | None = None,
) -> TNT:
    """Load the weights of a file into ``model``, whoever wrote it, and return the model.

    Files of timm, of the authors' release, of mmpretrain (legacy) and of ``tnt-fast train``; ``.pth``, ``.pth.tar``,
    ``.safetensors``; wrapped in ``state_dict``, ``state_dict_ema``, ``model`` or ``model_ema``, with ``module.``,
    ``_orig_mod.`` or ``backbone.`` prefixes. Patch positions are resampled (bicubic) to the model's grid. The model is
    changed only after everything was found to fit.

    Args:
        use_ema: prefer averaged weights where the file has both.
        reset_head: keep the model's own head, for another set of classes.
        source_grid: rows and columns of the file's patch grid; None: what the file says, else square.

    Raises:
        FileNotFoundError: no such file. CheckpointError: it cannot be read or does not fit; the message names the keys.
    """
    checkpoint = read_checkpoint(path)
    if source_grid is None and isinstance(checkpoint.get("grid_size"), (tuple, list)):
        source_grid = tuple(checkpoint["grid_size"])
    try:
        state = convert_state_dict(_unwrap(checkpoint, use_ema), model, source_grid=source_grid)
        if reset_head:
            state |= {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
        _check_fit(state, model)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r} does not fit this model: {error}") from error
    model.load_state_dict(state)
    return model


def head_classes(checkpoint: Any) -> int | None:
    """How many classes the head in a checkpoint of any origin has; None: it has no head."""
    for key, value in checkpoint.items():
        if isinstance(value, dict) and (found := head_classes(value)) is not None:
            return found
        if isinstance(value, Tensor) and str(key).endswith(("head.weight", "head.fc.weight")):
            return value.shape[0]
    return None


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
        shown = ", ".join(list(state)[:3]) or "no tensors"
        raise CheckpointError(f"it does not look like a TNT: no pixel_embed.* among its {len(state)} tensors ({shown}, …)")
    if "patch_pos" in state and model.patch_pos is not None:
        state["patch_pos"] = _resample(state["patch_pos"], model, source_grid)
    return state


def _unwrap(checkpoint: Mapping[str, Any], use_ema: bool) -> dict[str, Tensor]:
    names = ["state_dict_ema", "model_ema"] if use_ema else []
    for name in (*names, "state_dict", "model"):
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    prefix = re.compile(r"^(module\.|_orig_mod\.|backbone\.)+")
    return {prefix.sub("", key): value for key, value in checkpoint.items() if isinstance(key, str)}


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
        if key == "pixel_pos" and value.ndim == 3:  # (1, S, C), as the release has it
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
        if stem:  # (3E, E): queries and keys, then values
            split = value.shape[0] // 3 * 2
            out[f"{stem}.qk.{kind}"], out[f"{stem}.v.{kind}"] = value[:split], value[split:]
        else:
            out[key] = value
    return out


def _resample(patch_pos: Tensor, model: TNT, source_grid: tuple[int, int] | None) -> Tensor:
    """``(1, 1 + N', E)`` to the model's ``(1, 1 + N, E)``; the class token's position is kept."""
    count, grid = patch_pos.shape[1] - 1, tuple(model.pixel_embed.grid_size)
    square = (round(count**0.5),) * 2
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


def _check_fit(state: Mapping[str, Tensor], model: TNT) -> None:
    """Raise CheckpointError unless keys and shapes are exactly the model's."""
    own = model.state_dict()
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    legacy = any(re.fullmatch(r"blocks\.\d+\.proj\.bias", key) for key in state)
    folds = legacy or any(re.fullmatch(r"blocks\.\d+\.norm2_proj\.weight", key) for key in state)
    if folds and legacy != model.pixel_embed.legacy:
        kind = ("non-legacy", "legacy") if legacy else ("legacy", "non-legacy")
        raise CheckpointError(
            f"the model has the {kind[0]} stem and fold, the file holds a {kind[1]} TNT (by its keys "
            f"{'blocks.*.proj.bias' if legacy else 'blocks.*.norm2_proj.*'}); build the model with legacy={legacy}"
        )
    wrong = [
        f"{k} {tuple(state[k].shape)}, model {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if not (missing or unexpected or wrong):
        return
    parts = [_listing("missing", missing), _listing("unexpected", unexpected), _listing("other shapes", wrong)]
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
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
