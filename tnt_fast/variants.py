"""The named variants, registered with timm: what ``timm.create_model`` builds, and which hosted weights belong to it.

The model knows neither the registry nor files of weights; this file joins the three.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import timm
from huggingface_hub import get_session, hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import EntryNotFoundError
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, resolve_data_config
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from tnt_fast import attention
from tnt_fast.checkpoints import FORMAT, checkpoint_filter_fn, fit, head_classes
from tnt_fast.reading import IN_FOLDERS, CheckpointError, read_checkpoint, read_config, shown
from tnt_fast.reference import RECOMPUTE
from tnt_fast.terminal import nearest
from tnt_fast.tnt import TNT

__all__: list[str] = []  # register_model adds the names


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.9, "interpolation": "bicubic",
        "fixed_input_size": True, "mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD,
        "first_conv": "pixel_embed.proj", "classifier": "head", "license": "apache-2.0",
        "paper_ids": "arXiv:2103.00112", "paper_name": "Transformer in Transformer", **kwargs,
    }  # fmt: skip


# before the decorated functions: timm reads it when they register. The weights are those that timm hosts.
default_cfgs = generate_default_cfgs({
    "tnt_fast_ti_patch16_224.untrained": _cfg(),
    "tnt_fast_s_patch16_224.in1k": _cfg(hf_hub_id="timm/tnt_s_patch16_224.in1k"),
    "tnt_fast_s_legacy_patch16_224.in1k": _cfg(hf_hub_id="timm/tnt_s_legacy_patch16_224.in1k"),
    "tnt_fast_b_patch16_224.in1k": _cfg(hf_hub_id="timm/tnt_b_patch16_224.in1k"),
})  # fmt: skip


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> TNT:
    return build_model_with_cfg(
        TNT, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **{**defaults, **kwargs},
    )  # fmt: skip


@register_model
def tnt_fast_ti_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-Ti: 12 × (12 | 192) channels, 6.1 M parameters, 1.4 GMACs. Nobody published weights."""
    return _create("tnt_fast_ti_patch16_224", pretrained, dict(
        embed_dim=192, inner_dim=12, depth=12, num_heads_inner=2, num_heads_outer=3), kwargs)  # fmt: skip


@register_model
def tnt_fast_s_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-S: 12 × (24 | 384) channels, 23.8 M parameters, 5.2 GMACs."""
    return _create("tnt_fast_s_patch16_224", pretrained, dict(
        embed_dim=384, inner_dim=24, depth=12, num_heads_inner=4, num_heads_outer=6), kwargs)  # fmt: skip


@register_model
def tnt_fast_s_legacy_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-S with timm's older stem and fold (the weights of timm's first port and of mmpretrain)."""
    return _create("tnt_fast_s_legacy_patch16_224", pretrained, dict(
        embed_dim=384, inner_dim=24, depth=12, num_heads_inner=4, num_heads_outer=6, legacy=True), kwargs)  # fmt: skip


@register_model
def tnt_fast_b_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """TNT-B: 12 × (40 | 640) channels, 65.4 M parameters, 14.0 GMACs."""
    return _create("tnt_fast_b_patch16_224", pretrained, dict(
        embed_dim=640, inner_dim=40, depth=12, num_heads_inner=4, num_heads_outer=10), kwargs)  # fmt: skip


# ---- what may be said about a model: by files, by --model-kwargs ----


class _Number(NamedTuple):
    kind: type
    low: float
    high: float
    pair: bool = False  # also (vertical, horizontal)
    or_none: bool = False

    def __str__(self) -> str:
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} from {self.low:,} to {self.high:,}" + " or a pair of them" * self.pair + " or None" * self.or_none

    def __call__(self, value: Any) -> Any:
        if value is None and self.or_none:
            return None
        if self.pair and isinstance(value, list | tuple) and len(value) == 2:
            return tuple(self._one(side) for side in value)
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if type(value) not in (self.kind, int) or not self.low <= value <= self.high:
            raise ValueError
        return value


class _OneOf(NamedTuple):
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"

    def __call__(self, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in self.values):
            raise ValueError
        return value


class _Blocks(NamedTuple):
    def __str__(self) -> str:
        return "indices of blocks, such as (0, 3), or None"

    def __call__(self, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) > 256 or not all(type(i) is int and 0 <= i < 256 for i in value):
            raise ValueError
        return tuple(value)


_SIDE, _RATIO, _RATE, _FLAG = (
    _Number(int, 1, 2**14, pair=True),
    _Number(float, 0, 64),
    _Number(float, 0, 1),
    _OneOf((True, False)),
)
SIZES: dict[str, Any] = {
    "img_size": _SIDE, "patch_size": _SIDE, "patch_stride": _SIDE._replace(or_none=True),
    "first_stride": _Number(int, 1, 2**14), "in_chans": _Number(int, 1, 1024), "num_classes": _Number(int, 0, 10**6),
    "global_pool": _OneOf(("", "token", "avg")), "embed_dim": _Number(int, 1, 2**14), "inner_dim": _Number(int, 1, 2**12),
    "depth": _Number(int, 1, 100), "num_heads_inner": _Number(int, 1, 2**12), "num_heads_outer": _Number(int, 1, 2**14),
    "mlp_ratio": _RATIO, "inner_mlp_ratio": _RATIO, "se_ratio": _RATIO, "qkv_bias": _FLAG, "legacy": _FLAG,
    "inner_blocks": _Blocks(), "use_pixel_pos": _FLAG, "use_patch_pos": _FLAG, "use_patch_embed": _FLAG,
    "dynamic_img_size": _FLAG, "drop_rate": _RATE, "pos_drop_rate": _RATE, "proj_drop_rate": _RATE,
    "attn_drop_rate": _RATE, "drop_path_rate": _RATE, "attn_backend": _OneOf(attention.BACKENDS),
    "recompute": _OneOf(RECOMPUTE),
}  # fmt: skip
"""What a file or ``--model-kwargs`` may say about a model, and what is accepted; the constructor checks how sizes fit."""


def check_sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model as its constructor takes them.

    Raises:
        ValueError: one is unknown, or of another type or range; the message has the nearest name, or what is accepted.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"the model's arguments are a {type(given).__name__}; expected names and values")
    found = {}
    for name, value in given.items():
        if name not in SIZES:
            listed = nearest(name, SIZES) or f"; accepted: {', '.join(SIZES)}"
            raise ValueError(f"{shown(name)} is no argument of the model that can be set here{listed}")
        try:
            found[name] = SIZES[name](value)
        except ValueError:
            raise ValueError(f"{name}={_short(value)} is not accepted; expected {SIZES[name]}") from None
    return found


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, str | float | bool) or (isinstance(value, int) and abs(value) < 10**30)
    if isinstance(value, list | tuple) and len(value) <= 4:
        return (
            f"({', '.join(map(_short, value))})" if not any(isinstance(x, list | tuple) for x in value) else "a list of lists"
        )
    return shown(repr(value)) if plain else f"a {type(value).__name__}"


def variant(name: str) -> str:
    """The registered name of one of our variants, of which ``tnt_s_patch16_224.in1k`` is one; its tag is checked and left out.

    Raises:
        ValueError: it is none of them; the message has the nearest name.
    """
    name = name.removeprefix("timm/") if isinstance(name, str) else shown(name)
    if name.startswith("tnt_") and not name.startswith("tnt_fast_"):
        name = name.replace("tnt_", "tnt_fast_", 1)
    base, _, tag = name.partition(".")
    known = timm.list_models("tnt_fast_*")
    if base not in known:
        raise ValueError(f"model {shown(name)!r} is unknown{nearest(base, known)}; accepted: {', '.join(known)}")
    if tag and f"{base}.{tag}" not in _tags():
        raise ValueError(f"model {shown(name)!r} is unknown; accepted tags: {', '.join(_tags())}")
    return base


def _tags() -> list[str]:
    return [f"{name}.{tag}" for name, cfg in default_cfgs.items() for tag in cfg.tags]


def create_tnt(name: str, *, backend: str = "auto", device: Any = None, **sizes: Any) -> TNT:
    """One of our variants with random weights, whatever its name's tag; timm's names (``tnt_s_patch16_224``) mean ours.

    Raises:
        ValueError: the name or an argument is none of ours.
    """
    return cast(TNT, timm.create_model(variant(name), backend=backend, device=device, **check_sizes(sizes)))


# ---- models with weights ----


class Loaded(NamedTuple):
    """A model with its weights, a sentence about them, and what else came with them."""

    model: TNT
    said: str
    name: str  # of the variant
    sizes: dict[str, Any]  # its arguments
    classes: list[str]  # their names; empty: unknown
    data_config: dict[str, Any]  # as timm.data.resolve_data_config gives it
    has_head: bool = True  # of the weights; else it is new
    trained_here: bool = False  # by 'tnt-fast train', which saw images as open_image gives them
    trained_on: tuple[str, ...] = ()  # the names of the weights' own classes, also where the head is new; empty: unknown
    accuracy: float | None = None  # of best.pt, top-1 of what its run held out


def load_tnt(
    name: str | None = None, weights: str | os.PathLike | Mapping[str, Any] | None = None, *, backend: str = "auto",
    num_classes: int | None = None, use_ema: bool = True, **sizes: Any,
) -> Loaded:  # fmt: skip
    """A variant with weights: of a file or dict, or, without one, those that the name means on the Hugging Face hub.

    The model is built after the weights were found to fit it. Its head, its input channels and its grid of patches may differ
    from theirs: the head is then new, the rest adapted, and the sentence says so.

    Args:
        name: a variant, a timm tag (``tnt_s_patch16_224.in1k``) or ``hf-hub:owner/model``; None: what the file says.
        num_classes: of the head; None: as many as the weights have. use_ema: prefer averaged weights where there are both.
        sizes: arguments of the model; they come before those of the file.

    Returns:
        The ``model``; ``said``, a sentence about its weights; ``classes``, their names as far as the file has them;
        ``data_config``, how its images are to be read, for ``timm.data.create_transform``; ``name`` and ``sizes``.

    Raises:
        ValueError: no name, or none of ours. CheckpointError: the weights do not fit. FileNotFoundError: no such file.
        ConnectionError: hosted weights that are not at hand cannot be fetched.
    """
    if weights is None:
        if name is None:
            raise ValueError("neither a model nor a file of weights is named")
        weights, name, where = _from_hub(name)
    elif isinstance(weights, Mapping):
        where = "the checkpoint"
    else:
        where, weights = repr(os.fspath(weights)), read_checkpoint(weights)
    sizes = check_sizes(sizes if num_classes is None else {**sizes, "num_classes": num_classes})
    try:
        told = _told(weights)
        if name is not None and told.name is not None and variant(name) != variant(told.name):
            raise CheckpointError(f"it is of the model {shown(told.name)}, not of {name}")
        if (chosen := name or told.name) is None:
            raise ValueError(f"{where} does not say which model it is for: name it with model (--model tnt_s_patch16_224)")
        chosen = variant(chosen)
        classes = head_classes(weights)
        saved = {**({} if classes is None else {"num_classes": classes}), **told.sizes}
        sizes = {**saved, **sizes}
        shape = create_tnt(chosen, device="meta", **sizes)
        data_config = _data_config(told.data_config, shape, whole="format" in weights)
        names = [] if told.classes is None and "format" not in weights else _class_names(told.classes, classes)
    except CheckpointError as error:
        raise CheckpointError(f"{where} is refused: {error}") from error
    fitted = fit(shape, weights, use_ema=use_ema, adapt=True, what=where)
    model = create_tnt(chosen, backend=backend, **sizes)
    model.load_state_dict({**model.state_dict(), **fitted.state})
    said, own = f"{fitted.said} from {where}", names if shape.num_classes == classes else []
    here, accuracy = "format" in weights, weights.get("accuracy")
    accuracy = accuracy if here and sizes == saved and type(accuracy) is float and 0 <= accuracy <= 1 else None
    return Loaded(model, said, chosen, sizes, own, data_config, fitted.has_head, here, tuple(names), accuracy)


# ---- what files say beside their weights ----


class _Told(NamedTuple):
    name: str | None
    sizes: dict[str, Any]
    classes: Any
    data_config: Any


def _told(checkpoint: Mapping[str, Any]) -> _Told:
    """Of ``tnt-fast train``, of Hugging Face's config.json, or of timm's training, which has ``arch`` and ``args``."""
    version = checkpoint.get("format")
    if type(version) is int:
        if version != FORMAT:
            raise CheckpointError(f"it is of format {version} of 'tnt-fast train'; this version reads {FORMAT}")
        for entry in ("model", "model_kwargs", "classes", "data_config"):
            if entry not in checkpoint:
                raise CheckpointError(f"its entry {entry!r} is missing; 'tnt-fast train' writes it")
        return _Told(
            *_declared(checkpoint["model"], checkpoint["model_kwargs"]), checkpoint["classes"], checkpoint["data_config"]
        )
    config, args = checkpoint.get("config"), checkpoint.get("args")
    if isinstance(config, Mapping) and isinstance(config.get("architecture"), str):
        own = config.get("pretrained_cfg", config)
        names = config.get("label_names", own.get("label_names") if isinstance(own, Mapping) else None)
        return _Told(*_declared(config["architecture"], config.get("model_args") or {}), names, own)
    arch = checkpoint.get("arch")
    if not isinstance(arch, str):
        return _Told(None, {}, None, None)
    args = args if isinstance(args, Mapping) else {}
    kwargs = args.get("model_kwargs") or {}
    if isinstance(kwargs, Mapping) and isinstance(args.get("img_size"), int):
        kwargs = {"img_size": args["img_size"], **kwargs}
    return _Told(*_declared(arch, kwargs), None, None)


def _declared(name: Any, sizes: Any) -> tuple[str, dict[str, Any]]:
    """The name and arguments of a model by a file, which may choose among ours, never what is fetched."""
    try:
        return variant(name), check_sizes(sizes)
    except ValueError as error:
        raise CheckpointError(f"what it says about its model is refused: {error}") from error


def _class_names(names: Any, count: int | None) -> list[str]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and len(name) <= 1000 for name in names):
        raise CheckpointError("its entry 'classes' is no list of names of at most 1,000 characters")
    if len(names) != count:
        raise CheckpointError(f"its entry 'classes' has {len(names):,} names, its head {count or 0:,} classes")
    return list(names)


_DATA: dict[str, Any] = {
    "interpolation": _OneOf(("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")),
    "crop_pct": _Number(float, 0.1, 2),
    "crop_mode": _OneOf(("center", "squash", "border")),
}


def _data_config(given: Any, model: TNT, whole: bool) -> dict[str, Any]:
    """timm's data config for a model by what a file says about its images; ``whole``: it has to say all."""
    size = (model.in_chans, *model.pixel_embed.img_size)
    known = ("input_size", "mean", "std", *_DATA)
    config = resolve_data_config({}, model=model) | {"input_size": size}
    if given is None and not whole:
        return config
    if not isinstance(given, Mapping):
        raise CheckpointError(f"its entry 'data_config' is a {type(given).__name__}; expected {', '.join(known)}")
    try:
        if whole and not given.keys() >= {"input_size", "mean", "std", "interpolation", "crop_pct"}:
            raise ValueError
        if whole and (len(given["input_size"]) != 3 or not all(_SIDE(side) for side in given["input_size"])):
            raise ValueError
        config |= {name: check(given[name]) for name, check in _DATA.items() if given.get(name) is not None}
        for name, low in (("mean", -1e4), ("std", 1e-6)):
            if given.get(name) is not None:
                one, values = _Number(float, low, 1e4), given[name]
                if not isinstance(values, list | tuple) or len(values) not in (1, model.in_chans):
                    raise ValueError
                config[name] = tuple(one(value) for value in values)
    except (ValueError, TypeError):
        wanted = "; ".join(f"{key}: {check}" for key, check in _DATA.items())
        raise CheckpointError(
            f"its entry 'data_config' is refused; expected input_size; {wanted}; mean, std: a number a channel"
        ) from None
    return config


# ---- hosted weights ----

HUB = ("hf-hub:", "hf_hub:")  # a model's name with this in front is a repository of Hugging Face


def _from_hub(name: str) -> tuple[dict[str, Any], str | None, str]:
    """(checkpoint, model, where) of a hosted name, from the cache of Hugging Face or its hub."""
    if name.startswith(HUB):
        model, repository = None, name.partition(":")[2]
    else:
        model = variant(name)
        tag = name.partition(".")[2]
        cfg = default_cfgs[model].cfgs[tag] if tag else default_cfgs[model].default
        if not (repository := cfg.hf_hub_id or ""):
            raise ValueError(f"nobody hosts weights of {name!r}; give a checkpoint file (--checkpoint, in training --initial)")
    try:
        weights = _fetch(repository, *IN_FOLDERS)
        config = _fetch(repository, "config.json") if model is None else None
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"cannot fetch the weights of {name!r} ({reason}). Without a network, download the file elsewhere and pass it as "
            "the checkpoint, with this model (--checkpoint FILE --model NAME, in training --initial FILE)"
        ) from error
    checkpoint: dict[str, Any] = {"state_dict": read_checkpoint(weights)}
    if config is not None:
        checkpoint["config"] = read_config(config)
    return checkpoint, model, repository


def _fetch(repository: str, *names: str) -> str:
    """The path of the first of these files that a repository of the hub has; what is in the cache is taken from there."""
    repository, _, revision = repository.partition("@")
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            return hf_hub_download(repository, name, revision=revision or None, local_files_only=True)
    try:
        get_session().head(ENDPOINT, timeout=5)  # once: hf_hub_download would try for minutes
    except Exception as error:  # of whatever library it takes
        raise ConnectionError(f"no connection to {ENDPOINT}: {str(error).strip() or type(error).__name__}") from error
    for name in names[:-1]:
        with contextlib.suppress(EntryNotFoundError):
            return hf_hub_download(repository, name, revision=revision or None)
    return hf_hub_download(repository, names[-1], revision=revision or None)
