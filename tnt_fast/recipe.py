"""What a training run depends on: its settings, and the model, optimizer, schedule and loss that they name.

The settings are the options of ``tnt-fast train``, whose --help does not wait for torch: only functions import it here. YAML
files hold them, too: the package's presets, and a user's.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_origin

from tnt_fast.terminal import nearest

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.scheduler.scheduler import Scheduler
    from torch import nn
    from torch.optim import Optimizer

    from tnt_fast.tnt import TNT
    from tnt_fast.variants import Loaded

PRESETS = Path(__file__).parent / "presets"
DIGITS = "digits"  # the name of scikit-learn's handwritten digits, in place of a directory
MAY_CHANGE = (
    "data",
    "skip_bad",
    "allow_changed_data",
    "grad_checkpointing",
    "device",
    "fsdp",
    "workers",
)  # settings that a resumed run takes anew
AUTOMATIC = ("batch_size", "global_batch", "lr")  # settings whose 0 `settled` replaces
MAY_EXTEND = (
    "epochs",
    "patience",
    "batch_size",
    "accumulate",
    "global_batch",
    "amp",
    "threads",
    "compile",
    "compile_mode",
    "tensorboard",
    "wandb",
)  # if it is told to
AMP = ("off", "bfloat16", "float16")
SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep", "constant", "wsd", "rsqrt")  # those of timm that go by steps
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_CHOICES = {"amp": AMP, "compile_mode": COMPILE_MODES, "class_weights": ("off", "balanced"), "sched": SCHEDULES}
POLICIES = ("rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "3a", "original", "originalr", "v0", "v0r")


def _field(group: str, text: str, default: Any = MISSING, within: str = "", **more: Any) -> Any:
    """A setting, in its group of ``tnt-fast train --help``; its numbers lie in the interval ``within``."""
    metadata = {"group": group, "help": text, "within": within}
    return field(metadata=metadata, **({} if default is MISSING else {"default": default}), **more)


@dataclass
class Config:
    """Everything that a run depends on; kept in its checkpoint. The defaults follow DeiT's recipe, as the TNT paper does."""

    data: str = _field(
        "data",
        f"a directory with train/CLASS/*.png and val/CLASS/*.png, or '{DIGITS}'; with --val-fraction one with CLASS/*.png, "
        "or a CSV file with the columns file,label; wds:PATH of WebDataset's tar shards, hfds:PATH of a Hugging Face data set",
    )
    val_fraction: float = _field("data", "part of each class to hold out, of data that are not divided yet", 0.0, "[0, 1)")
    skip_bad: bool = _field("data", "go on without the files that cannot be trained on", False)
    allow_changed_data: bool = _field("data", "continue a run although its images are others than before", False)

    model: str = _field(
        "model",
        "tnt_{ti,s,s_legacy,b}_patch16_224 or tnt_fast_…, the same; with a tag (tnt_s_patch16_224.in1k) or as "
        "hf-hub:OWNER/NAME, it starts from those weights",
        "tnt_fast_s_patch16_224",
    )
    model_kwargs: dict[str, Any] = _field("model", "its arguments, as key=value …", default_factory=dict)
    backend: str = _field("model", "auto, fused or reference", "auto")
    pretrained: bool = _field("model", "start from the weights that timm hosts for the model", False)
    initial: str = _field("model", "checkpoint to start from (its head is kept if the classes agree in number)", "")
    freeze_blocks: int = _field("model", "keep the stem and so many blocks, from the first, as they are", 0, "[0, 1000]")
    grad_checkpointing: bool = _field("model", "compute activations twice instead of keeping them: less memory", False)

    epochs: int = _field("optimization", "passes over the training images", 300, "[1, 1000000]")
    patience: int = _field(
        "optimization", "epochs without a better held-out accuracy after which to stop; 0: off", 0, "[0, 1000000]"
    )
    batch_size: int = _field(
        "optimization", "images at a time; 0: 256, or less where an epoch would have fewer than 10 steps", 0, "[0, 1000000]"
    )
    accumulate: int = _field("optimization", "batches a step, whose gradients are averaged", 1, "[1, 1000000]")
    global_batch: int = _field(
        "optimization",
        "images a step, of all ranks together, from which --accumulate follows: the same steps, whatever the number of ranks; "
        "0: batch size × accumulate × ranks",
        0,
        "[0, 1000000000]",
    )
    opt: str = _field("optimization", "a timm optimizer", "adamw")
    weight_decay: float = _field("optimization", "not applied to biases, norms and positions", 0.05, "[0, 10]")
    clip_grad: float = _field("optimization", "largest gradient norm; 0: off", 0.0, "[0, 1e30]")
    ema: float = _field("optimization", "decay of averaged weights, which are then what is evaluated; 0: off", 0.0, "[0, 1)")
    ema_warmup: bool = _field("optimization", "average over less at first: the decay is at most 1 − step^(−2/3)", True)

    lr: float = _field(
        "learning rate",
        "peak learning rate; 0: 1e-3 · batch / 1024, at least 2.5e-4; from trained weights 1e-4 · batch / 1024, at least 5e-5",
        0.0,
        "[0, 1e30]",
    )
    sched: str = _field("learning rate", "a timm schedule: cosine, tanh, poly, step, constant, …", "cosine")
    warmup_epochs: float = _field("learning rate", "linear warm-up; at most half of the run", 5, "[0, 1000000]")
    min_lr: float = _field("learning rate", "learning rate at the end, as a fraction of the peak", 0.01, "[0, 1]")
    layer_decay: float = _field(
        "learning rate", "factor of the learning rate from each block to the one before it, such as 0.75; 0: off", 0.0, "[0, 1]"
    )

    smoothing: float = _field("regularization", "label smoothing", 0.1, "[0, 1)")
    class_weights: str = _field("regularization", "off, or balanced: a rare class counts as much as a frequent one", "off")
    mixup: float = _field("regularization", "mixup alpha; 0: off", 0.8, "[0, 100]")
    cutmix: float = _field("regularization", "cutmix alpha; 0: off", 1.0, "[0, 100]")
    drop_path: float = _field("regularization", "stochastic depth", 0.1, "[0, 1)")

    scale: tuple[float, float] = _field("augmentation", "area of random crops", (0.08, 1.0), "(0, 1]")
    ratio: tuple[float, float] = _field("augmentation", "aspect ratio of random crops", (3 / 4, 4 / 3), "[0.01, 100]")
    hflip: float = _field("augmentation", "probability of a horizontal flip", 0.5, "[0, 1]")
    color_jitter: float = _field("augmentation", "colour jitter, where auto-augment is off", 0.3, "[0, 10]")
    auto_augment: str = _field("augmentation", "timm's name of a policy; '' : off", "rand-m9-mstd0.5-inc1")
    reprob: float = _field("augmentation", "probability of random erasing", 0.25, "[0, 1]")
    aug_repeats: int = _field(
        "augmentation", "repeated augmentation: an epoch has fewer images, each so often, augmented anew; 1: off", 1, "[1, 100]"
    )
    crop_pct: float = _field("augmentation", "evaluation crop, from 0.1; 0: the model's", 0.0, "[0, 1]")

    seed: int = _field("machine", "of weights, order, augmentation, dropout", 0, f"[0, {2**32 - 1}]")
    amp: str = _field("machine", "off, bfloat16 or float16 (with loss scaling)", "off")
    device: str = _field("machine", "such as cpu, cuda:0; default: a GPU if there is one", "")
    fsdp: bool = _field("machine", "divide weights, gradients and moments among the ranks of torchrun, too (FSDP2)", False)
    workers: int = _field("machine", "processes that read images, for each rank; 0: none", 2, "[0, 512]")
    threads: int = _field("machine", "CPU threads of PyTorch; 0: its default. Tiny models are fastest with 1", 0, "[0, 1024]")
    compile: bool = _field("machine", "through torch.compile", False)
    compile_mode: str = _field(
        "machine",
        "of torch.compile; reduce-overhead replays CUDA graphs, which pays where the GPU waits for the host",
        "default",
    )
    tensorboard: bool = _field("machine", "write the history for TensorBoard, too", False)
    wandb: str = _field("machine", "project of Weights & Biases that gets the history, too", "")

    def check(self) -> None:
        """Raise ValueError, which names the setting, for a value out of range, before anything is read or written."""
        for setting in fields(self):
            _check_value(setting, getattr(self, setting.name))
        for setting in fields(self):
            _check_meaning(setting.name, getattr(self, setting.name))
        if self._multiple > 1:
            text = f"batch_size={self.batch_size} must be even for mixup and cutmix (set both to 0 to turn them off)"
            _require(self.batch_size % 2 == 0, text)
        _require(
            self.compile or self.compile_mode == "default",
            f"compile_mode={self.compile_mode!r} is torch.compile's: set compile, too",
        )
        _require(not (self.pretrained and self.initial), "pretrained and initial both name weights to start from; give one")
        # what TNT takes, and a run on colour images with one label each does not
        channels, pool = self.model_kwargs.get("in_chans", 3), self.model_kwargs.get("global_pool", "token")
        _require(channels == 3, f"model_kwargs says in_chans={channels!r}; images are read with 3 channels: leave it out")
        _require(pool != "", "model_kwargs says global_pool='', which gives no logits; accepted: 'token', 'avg'")

    def settled(self, images: int, ranks: int = 1) -> "Config":
        """With batch sizes and learning rate for so many training images where they are 0; ``divided`` among the ranks.

        The learning rate is DeiT's (https://arxiv.org/abs/2012.12877): 1e-3 · images a step / 1024. From trained weights it
        is a tenth of that, as DeiT's fine-tuning on iNaturalist (https://github.com/facebookresearch/deit/issues/105). Neither
        falls below what AdamW bears at a small batch: that of batch 256, and 5e-5, the default of Hugging Face's Trainer.
        """
        config = self
        if not self.batch_size and not self.global_batch:
            few = min(8, max(2, images // ranks // 2 * 2))
            batch = next((b for b in (256, 128, 64, 32, 16) if 10 * b * ranks <= images), few)
            config = replace(self, batch_size=batch)
        config = config.divided(ranks)
        step = config.images_a_step(ranks)
        lr = self.lr or (max(1e-4 * step / 1024, 5e-5) if self.has_weights else max(1e-3 * step / 1024, 2.5e-4))
        return replace(config, lr=lr)

    def images_a_step(self, ranks: int) -> int:
        return self.batch_size * self.accumulate * ranks

    def divided(self, ranks: int) -> "Config":
        """With ``accumulate`` such that a step of all ranks has ``global_batch`` images, and with those of several ranks noted.

        Raises:
            ValueError: the ranks' batches do not make such a step; the message has the nearest that they do.
        """
        whole, batch = self.global_batch, self.batch_size
        if not whole:
            return self if ranks == 1 or not batch else replace(self, global_batch=self.images_a_step(ranks))
        even = self._multiple
        unit = (batch or even) * ranks
        if whole % unit:
            of = " × ".join([f"batch_size={batch}" if batch else f"{even} images", *([f"{ranks} ranks"] if ranks > 1 else [])])
            near = ", ".join(str(n * unit) for n in (whole // unit, whole // unit + 1) if n)
            raise ValueError(f"global_batch={whole} must be a multiple of {unit} ({of}); nearest: {near}")
        batch = batch or _largest(whole // ranks, 256, even)
        accumulate = whole // (batch * ranks)
        _require(
            self.accumulate in (1, accumulate),
            f"accumulate={self.accumulate} does not fit global_batch={whole}, which makes it {accumulate}; leave one out",
        )
        return replace(self, batch_size=batch, accumulate=accumulate)

    @property
    def _multiple(self) -> int:
        """Of what a batch must be a multiple: timm mixes an image with another."""
        return 2 if self.mixup > 0 or self.cutmix > 0 else 1

    def check_step(self, images: int) -> None:
        """Raise DataError where one step would take more than all of so many training images."""
        from tnt_fast.images import DataError

        step = self.global_batch or self.batch_size * self.accumulate
        if step > images:
            times = f" × accumulate={self.accumulate}" if self.accumulate > 1 else ""
            what = f"global_batch={step}" if self.global_batch else f"batch_size={self.batch_size}{times}"
            raise DataError(
                f"a step of {step:,} images ({what}) is more than the {images:,} training images; lower it, or let it follow "
                "the data: --batch-size 0 --accumulate 1 --global-batch 0"
            )

    @property
    def has_weights(self) -> bool:
        """Whether the run starts from trained weights."""
        from tnt_fast.variants import HUB

        tag = self.model.partition(".")[2]
        hosted = tag not in ("", "untrained") or self.model.startswith(HUB)
        return bool(self.initial or self.pretrained or hosted)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up: a run that only warms up never reaches its learning rate."""
        return min(self.warmup_epochs, self.epochs / 2)

    def remarks(self, images: int) -> list[str]:
        """What a user should know of settled settings on so many training images, a line each."""
        steps, left = divmod(images, self.global_batch or self.batch_size * self.accumulate)
        dropped = f", {left} of {images} images left out of each (others each time)" if left else ""
        times = f", {self.accumulate} a step" if self.accumulate > 1 else ""
        lines = [f"batches of {self.batch_size}{times}: {steps} steps an epoch{dropped}; learning rate up to {self.lr:.3g}"]
        if steps < 5:
            lines.append(f"an epoch has few steps ({steps}): with a smaller --batch-size a run learns more from as many epochs")
        if self.warmup < self.warmup_epochs:
            lines.append(f"warm-up cut from {self.warmup_epochs:g} to {self.warmup:g} epochs, half of the run")
        if self.freeze_blocks and not self.has_weights:
            lines.append("what is frozen keeps its random weights; --pretrained or --initial gives it trained ones")
        return lines


def _largest(images: int, most: int, multiple: int) -> int:
    """The largest batch that divides so many images evenly; 0: there is none."""
    return next((b for b in range(min(images, most) // multiple * multiple, 0, -multiple) if images % b == 0), 0)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_value(setting: "Field[Any]", value: Any) -> None:
    """One setting's type and range."""
    kind, within = setting.type, setting.metadata["within"]
    if not within:
        right = type(value) is kind or (kind not in (str, bool) and isinstance(value, dict))
        what = {str: "a text", bool: "True or False"}.get(cast(type, kind), "a dictionary")
        _require(right, f"{setting.name}={value!r:.100} must be {what}")
        return
    pair = get_origin(kind) is tuple
    accepted = (int,) if kind is int else (int, float)  # of Python: what a checkpoint may hold
    numbers = value if pair and isinstance(value, (tuple, list)) else (value,)
    low, high = map(float, within[1:-1].split(","))
    right = len(numbers) == 1 + pair
    for x in numbers:
        right = (
            right
            and type(x) in accepted
            and low <= x <= high
            and not (within[0] == "(" and x == low)
            and not (within[-1] == ")" and x == high)
        )
    what = "two numbers, each" if pair else "a whole number" if kind is int else "a number"
    _require(right, f"{setting.name}={value!r:.100} must be {what} in {within}")


def _check_meaning(name: str, value: Any) -> None:
    """What one setting's type and range do not say, whatever the others are."""
    from tnt_fast.dispatch import check_backend
    from tnt_fast.variants import HUB, check_sizes, variant

    if name in _CHOICES and value not in _CHOICES[name]:
        raise unknown(name, value, _CHOICES[name])
    if name in ("scale", "ratio"):
        _require(value[0] <= value[1], f"{name}={tuple(value)} must have the smaller number first")
    elif name == "crop_pct":
        _require(not 0 < value < 0.1, f"crop_pct={value} must be 0 (the model's) or in [0.1, 1]")
    elif name == "backend":
        check_backend(value)
    elif name == "opt":
        _check_optimizer(value)
    elif name == "auto_augment":
        _check_policy(value)
    elif name == "model_kwargs":
        check_sizes(value)
    elif name == "model" and not value.startswith(HUB):
        variant(value)


def unknown(what: str, name: str, known: Collection[str], see: str = "") -> ValueError:
    """Few accepted values are all named; of many the nearest, and where the rest stands."""
    return ValueError(f"{what}={name!r:.100} is unknown{nearest(name, known)}; accepted: {see or ', '.join(known)}")


def _check_optimizer(name: str) -> None:
    from timm.optim import list_optimizers

    known = cast(list[str], list_optimizers(exclude_filters=["adahessian"]))  # which wants gradients of gradients
    if name.lower().removeprefix("lookahead_") not in known:
        raise unknown("opt", name, known, "adamw, sgd, lamb, … (all: timm.optim.list_optimizers())")


def _check_policy(name: str) -> None:
    from timm.data.transforms_factory import transforms_imagenet_train

    kinds = {policy.split("-")[0] for policy in POLICIES}
    try:
        _require(not name or name.split("-")[0] in kinds, "no such policy")
        transforms_imagenet_train(auto_augment=name or None)
    except (AssertionError, ValueError, KeyError) as error:  # timm's ways to refuse one
        raise ValueError(
            f"auto_augment={name!r:.100} is no policy of timm ({error}){nearest(name.split('-')[0], kinds)}; accepted: "
            f"{', '.join(POLICIES)}, their numbers as you like; '' turns it off"
        ) from error


def continued(begun: Config, asked: Config, given: Collection[str], ranks: int = 1) -> tuple[Config, list[str]]:
    """The settings to go on with in a run that was begun with ``begun``, and in words what of them changed.

    Args:
        given: names of those settings in ``asked`` that were asked for, not left as they are by default.
        ranks: on how many the run goes on; a step keeps its number of images.

    Raises:
        ValueError: one was asked for that a run cannot change, or the ranks cannot divide a step.
    """
    taken = [name for name in given if name not in MAY_CHANGE and (getattr(asked, name) or name not in AUTOMATIC)]
    differ = [name for name in taken if getattr(asked, name) != getattr(begun, name)]
    if fixed := [name for name in differ if name not in MAY_EXTEND]:
        was = ", ".join(f"{name}={getattr(begun, name)!r} (now {getattr(asked, name)!r})" for name in fixed)
        raise ValueError(f"the run was begun with {was}; leave that out to continue it (it may change {', '.join(MAY_EXTEND)})")
    config = replace(begun, **{name: getattr(asked, name) for name in (*MAY_CHANGE, *differ)})
    changed = [f"{name}={getattr(asked, name)!r} (was {getattr(begun, name)!r})" for name in differ]
    if ranks == 1 and not config.global_batch:
        return config, changed
    if not config.global_batch and not {"batch_size", "accumulate"} & {*taken}:
        config = replace(config, global_batch=begun.images_a_step(1))
    if config.global_batch and "accumulate" not in taken:
        config = replace(config, accumulate=1)
    if config.global_batch and "batch_size" not in taken:
        config = replace(config, batch_size=_largest(config.global_batch // ranks, begun.batch_size, config._multiple))
    return config.divided(ranks), changed


# ---- settings in files ----


def presets() -> dict[str, str]:
    """The package's recipes, and what each is for: its first line."""
    files = sorted(PRESETS.glob("*.yaml"))
    return {path.stem: path.read_text("utf-8").partition("\n")[0].removeprefix("# ") for path in files}


def preset(name: str) -> dict[str, Any]:
    """The settings of one of the package's recipes; "": none."""
    if not name:
        return {}
    if name not in presets():
        raise unknown("preset", name, presets())
    own = read_settings(PRESETS / f"{name}.yaml")
    return over(preset(own.pop("preset", "")), own)


def over(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a layer over those of others: ``model_kwargs`` key by key, and weights to start from once."""
    found = {**base, **layer}
    for one, other in (("initial", "pretrained"), ("pretrained", "initial")):
        if layer.get(one) and not layer.get(other):
            found.pop(other, None)
    if "model_kwargs" in layer:
        found["model_kwargs"] = {**base.get("model_kwargs", {}), **layer["model_kwargs"]}
    return found


def resolved(
    given: Mapping[str, Any], name: str | None = None, file: str | os.PathLike | None = None
) -> tuple[Config, set[str]]:
    """The settings of a run, and the names of those that were asked for.

    Args:
        given: goes over what ``file`` says, and that over the preset ``name``, and that over the defaults. Without a name it is
            what ``file`` names as its ``preset``; for the digits, where no preset is named, ``small``.

    Raises:
        ValueError: names the file, the key and what would be accepted. OSError: the file cannot be read.
    """
    own = read_settings(file) if file else {}
    named = own.pop("preset", None) if name is None else name
    own.pop("preset", None)
    asked = over(over(preset(named or ""), own), given)
    _require("data" in asked, f"no data are named; expected a directory, a CSV file, or {DIGITS!r}")
    base = preset("small") if named is None and asked["data"] == DIGITS else {}
    return Config(**over(base, asked)), set(asked)


def read_settings(file: str | os.PathLike) -> dict[str, Any]:
    """The settings that a YAML file has, and the ``preset`` that it may name; each is checked for itself.

    Raises:
        ValueError: names the file, the key and what would be accepted. OSError: it cannot be read.
    """
    where = repr(os.fspath(file))
    found = _parsed(file, where)
    known = {setting.name: setting for setting in fields(Config)}
    for name, value in found.items():
        if name == "preset":
            if value != "" and value not in presets():
                raise ValueError(f"{where}: {unknown('preset', str(value), presets())}")
            continue
        if name not in known:
            see = "preset and the options of 'tnt-fast train', with _ for -"
            raise ValueError(f"{where}: {unknown('setting', str(name), ['preset', *known], see)}")
        try:
            _check_value(known[name], value)
            _check_meaning(name, value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if get_origin(known[name].type) is tuple:
            found[name] = tuple(value)
    return found


def _parsed(file: str | os.PathLike, where: str) -> dict[Any, Any]:
    """A YAML file's keys and values, none of them twice."""
    import yaml

    try:
        found = yaml.load(Path(file).read_text("utf-8"), _yaml()[0])  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML file of settings: {' '.join(str(error).split())[:300]}") from error
    if not (found is None or isinstance(found, dict)):
        raise ValueError(f"{where} is no YAML file of settings, but {found!r:.100}; expected lines such as 'epochs: 100'")
    return found or {}


def written(config: Config) -> str:
    """All settings as a YAML file, which ``read_settings`` reads."""
    import yaml

    lines, group = ["# tnt-fast train --config THIS --out NEW repeats the run", "preset: ''  # all settings are here"], ""
    for setting in fields(config):
        if group != setting.metadata["group"]:
            group = setting.metadata["group"]
            lines += ["", f"# {group}"]
        pair = {setting.name: getattr(config, setting.name)}
        text = yaml.dump(pair, Dumper=_yaml()[1], default_flow_style=True, allow_unicode=True, width=100_000)
        lines.append(text.strip()[1:-1])  # without its braces
    return "\n".join(lines) + "\n"


@cache
def _yaml() -> tuple[Any, Any]:
    """PyYAML's safe loader and dumper with the types of YAML 1.2, where 1e-3 is a number and off a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[Any, Any] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"{twice[0]!r:.100} is there twice")
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):  # quotes what YAML 1.1 takes for another type, too
        pass

    number = r"\.[0-9]+|[0-9]+(\.[0-9]*)?"
    for kind, pattern, first in (
        ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", rf"[-+]?({number})([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
    ):
        for user in (Loader, Dumper):
            user.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)
    return Loader, Dumper


# ---- what they build ----


def build_model(config: Config, classes: int | Sequence[str], saved: Mapping[str, Any] | None = None) -> "Loaded":
    """The TNT that a config names, with a head for the data's ``classes``, and its weights: those of ``saved``, which the run
    wrote and which then says what the model is, of the initial checkpoint, those that the name means, or random ones.
    """
    from timm.utils import freeze

    from tnt_fast.images import DataError
    from tnt_fast.variants import Loaded, check_sizes, create_tnt, load_tnt, variant

    names, num_classes = ([], classes) if isinstance(classes, int) else (list(classes), len(classes))
    given = config.model_kwargs.get("num_classes", num_classes)
    if given != num_classes:
        raise DataError(f"model_kwargs says num_classes={given}, the data has {num_classes} classes; leave it out")
    if saved is not None:
        built = load_tnt(None, saved, backend=config.backend, use_ema=False)
    else:
        sizes = check_sizes({"drop_path_rate": config.drop_path, **config.model_kwargs, "num_classes": num_classes})
        if config.has_weights:
            built = _matched(load_tnt(config.model, config.initial or None, backend=config.backend, **sizes), names)
        else:
            model = create_tnt(config.model, backend=config.backend, **sizes)
            built = Loaded(model, "random", variant(config.model), sizes, [], {})
    model = built.model
    model.set_grad_checkpointing(config.grad_checkpointing)
    depth, frozen = len(model.blocks), config.freeze_blocks
    _require(frozen <= depth, f"freeze_blocks={frozen} must be at most {depth}, the model's depth")
    if frozen:
        stem = ["pixel_embed", "norm1_proj", "proj", "norm2_proj", *(["patch_embed"] if model.patch_embed is not None else [])]
        freeze(model, [*stem, *(f"blocks.{i}" for i in range(frozen))])
        for name in model.no_weight_decay():  # class token and positions
            if (parameter := getattr(model, name)) is not None:
                parameter.requires_grad_(False)
    return built


def _matched(built: "Loaded", classes: list[str]) -> "Loaded":
    """With the head's rows in the order of the data's classes, or with what of the classes differs said."""
    import torch

    theirs = list(built.trained_on)
    if not theirs or not classes or theirs == classes:
        return built
    gone, new = differing(theirs, classes)
    if built.has_head and not (gone or new):
        rows = [theirs.index(name) for name in classes]
        with torch.no_grad():
            for parameter in built.model.head.parameters():
                parameter.copy_(parameter[rows])
        return built._replace(said=f"{built.said}, head put in the order of the data's classes", classes=classes)
    apart = f"only in the weights {gone or 'none'}, only in the data {new or 'none'}"
    kept = "; the head is kept in its order" if built.has_head else ""
    return built._replace(said=f"{built.said}; their classes are not the data's: {apart}{kept}")


def differing(theirs: Sequence[str], ours: Sequence[str]) -> tuple[str, str]:
    """What is in the one list of classes alone, and what in the other, in words; "": nothing."""

    def but(some: Sequence[str], others: Collection[str]) -> str:
        left = [name for name in some if name not in others]
        return ", ".join(map(repr, left[:5])) + (f" and {len(left) - 5:,} more" if len(left) > 5 else "")

    return but(theirs, {*ours}), but(ours, {*theirs})


def build_optimizer(config: Config, model: "TNT") -> "Optimizer":
    """timm's, for what is not frozen."""
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay or None
        )
    except (AssertionError, ImportError) as error:  # of one that needs another package, or a GPU
        raise ValueError(f"opt={config.opt!r} does not work here ({error}); accepted: adamw, sgd, lamb, …") from error


def build_schedule(config: Config, optimizer: "Optimizer", steps: int) -> "Scheduler":
    """timm's schedule, by steps, of which an epoch has ``steps``. It warms up from 1e-3 of the peak, as DeiT's does."""
    from timm.scheduler import create_scheduler_v2

    warmup: Any = config.warmup  # timm takes fractions of an epoch, which its annotation forgets
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=config.epochs, warmup_epochs=warmup, warmup_lr=1e-3 * config.lr,
        min_lr=config.min_lr * config.lr, step_on_epochs=False, updates_per_epoch=steps, warmup_prefix=False,
    )  # fmt: skip
    _require(scheduler is not None, f"sched={config.sched!r} is not in this version of timm; take cosine, tanh, poly or step")
    return cast("Scheduler", scheduler)


def build_loss(config: Config, counts: Sequence[int]) -> "tuple[Mixup | None, nn.Module]":
    """What mixes a batch, if anything does, and the loss of ``(logits, targets)``, for so many training images a class."""
    import torch
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    mixup = None
    if config.mixup > 0 or config.cutmix > 0:
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(counts))
    if config.class_weights == "balanced":  # as scikit-learn's: 1 on average over the images
        number = torch.tensor(counts, dtype=torch.float32)
        weight = number.sum() / (len(counts) * number)
        return mixup, torch.nn.CrossEntropyLoss(weight, label_smoothing=0.0 if mixup else config.smoothing)
    return mixup, SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(config.smoothing)
