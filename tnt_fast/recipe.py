"""What a training run depends on: its settings, and the model, optimizer, schedule and loss that they name.

The settings are the options of ``tnt-fast train``, whose --help does not wait for torch: only functions import it here.
"""

from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.scheduler.scheduler import Scheduler
    from torch import nn
    from torch.optim import Optimizer

    from tnt_fast.tnt import TNT

DIGITS = "digits"  # the name of scikit-learn's handwritten digits, in place of a directory
MAY_CHANGE = ("data", "device", "workers")  # settings that a resumed run takes anew
AMP = ("off", "bfloat16", "float16")


def _field(group: str, text: str, default: Any = MISSING, **more: Any) -> Any:
    """A setting, in its group of ``tnt-fast train --help``."""
    return field(metadata={"group": group, "help": text}, **({} if default is MISSING else {"default": default}), **more)


@dataclass
class Config:
    """Everything that a run depends on; kept in its checkpoint. The defaults follow DeiT's recipe, as the TNT paper does."""

    data: str = _field("data", f"a directory with train/CLASS/*.png and val/CLASS/*.png, or '{DIGITS}'")

    model: str = _field("model", "a timm model name", "tnt_fast_s_patch16_224")
    model_kwargs: dict[str, Any] = _field("model", "its arguments, as key=value …", default_factory=dict)
    backend: str = _field("model", "auto, fused or reference", "auto")
    initial: str = _field("model", "checkpoint to start from (its head is kept if the classes agree in number)", "")

    epochs: int = _field("optimization", "passes over the training images", 300)
    batch_size: int = _field("optimization", "images a step", 256)
    opt: str = _field("optimization", "a timm optimizer", "adamw")
    weight_decay: float = _field("optimization", "not applied to biases, norms and positions", 0.05)
    clip_grad: float = _field("optimization", "largest gradient norm; 0: off", 0.0)
    ema: float = _field("optimization", "decay of averaged weights, which are then what is evaluated; 0: off", 0.0)

    lr: float = _field("learning rate", "peak learning rate; 0: 1e-3 · batch / 1024", 0.0)
    sched: str = _field("learning rate", "a timm schedule", "cosine")
    warmup_epochs: float = _field("learning rate", "linear warm-up", 5)
    min_lr: float = _field("learning rate", "learning rate at the end", 1e-5)

    smoothing: float = _field("regularization", "label smoothing", 0.1)
    mixup: float = _field("regularization", "mixup alpha; 0: off", 0.8)
    cutmix: float = _field("regularization", "cutmix alpha; 0: off", 1.0)
    drop_path: float = _field("regularization", "stochastic depth", 0.1)

    scale: tuple[float, float] = _field("augmentation", "area of random crops", (0.08, 1.0))
    ratio: tuple[float, float] = _field("augmentation", "aspect ratio of random crops", (3 / 4, 4 / 3))
    hflip: float = _field("augmentation", "probability of a horizontal flip", 0.5)
    color_jitter: float = _field("augmentation", "colour jitter, where auto-augment is off", 0.3)
    auto_augment: str = _field("augmentation", "timm's name of a policy; '' : off", "rand-m9-mstd0.5-inc1")
    reprob: float = _field("augmentation", "probability of random erasing", 0.25)
    crop_pct: float = _field("augmentation", "evaluation crop; 0: the model's", 0.0)

    seed: int = _field("machine", "of weights, order, augmentation, dropout", 0)
    amp: str = _field("machine", "off, bfloat16 or float16 (with loss scaling)", "off")
    device: str = _field("machine", "such as cpu, cuda:0; default: a GPU if there is one", "")
    workers: int = _field("machine", "processes that read images; 0: none", 2)
    threads: int = _field("machine", "CPU threads of PyTorch; 0: its default. Tiny models are fastest with 1", 0)

    def check(self) -> None:
        """Raise ValueError for values out of range, before anything is read or written."""
        for name, low in (("epochs", 1), ("batch_size", 1), ("workers", 0), ("threads", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        for name in ("lr", "weight_decay", "warmup_epochs", "min_lr", "clip_grad", "mixup", "cutmix", "color_jitter"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number from 0 up")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**32 - 1")
        for name in ("smoothing", "ema", "drop_path", "hflip", "reprob", "crop_pct"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if self.sched in ("none", "plateau"):  # timm's schedules that have no value for a single step
            raise ValueError(f"sched={self.sched!r} does not go by steps; accepted: cosine, tanh, step, poly, constant, …")
        if self.amp not in AMP:
            raise ValueError(f"amp={self.amp!r} is unknown; accepted: {', '.join(AMP)}")
        if not 0 < self.scale[0] <= self.scale[1] or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"scale={self.scale} and ratio={self.ratio} must each be two positive numbers, the smaller first")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even for mixup and cutmix (set both to 0 to turn them off)")


DIGITS_RECIPE: dict[str, Any] = {
    "model": "tnt_fast_ti_patch16_224",
    "model_kwargs": {"img_size": 32, "embed_dim": 96, "inner_dim": 12, "depth": 3},
    "epochs": 40, "batch_size": 32, "lr": 2e-3, "warmup_epochs": 3, "clip_grad": 1.0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.99,
    "scale": (0.7, 1.0), "ratio": (0.85, 1.18), "hflip": 0.0, "color_jitter": 0.0, "reprob": 0.0,
    "auto_augment": "rand-m3-n1-mstd0.5-tweights", "crop_pct": 1.0, "drop_path": 0.0, "workers": 0, "threads": 1,
}  # fmt: skip


def build_model(config: Config, num_classes: int) -> "TNT":
    """The TNT that a config names, with a head for ``num_classes``, from its initial checkpoint where it has one."""
    from tnt_fast.checkpoints import head_classes, load_checkpoint, read_checkpoint
    from tnt_fast.data import DataError
    from tnt_fast.variants import create_tnt

    given = config.model_kwargs.get("num_classes", num_classes)
    if given != num_classes:
        raise DataError(f"model_kwargs says num_classes={given}, the data has {num_classes} classes; leave it out")
    kwargs = {"drop_path_rate": config.drop_path, **config.model_kwargs, "num_classes": num_classes, "backend": config.backend}
    model = create_tnt(config.model, **kwargs)
    if config.initial:
        classes = head_classes(read_checkpoint(config.initial))
        load_checkpoint(model, config.initial, reset_head=classes != num_classes)
    return model


def build_optimizer(config: Config, model: "nn.Module") -> "Optimizer":
    from timm.optim import create_optimizer_v2

    lr = config.lr or 1e-3 * config.batch_size / 1024
    return create_optimizer_v2(model, opt=config.opt, lr=lr, weight_decay=config.weight_decay)


def build_schedule(config: Config, optimizer: "Optimizer", steps: int) -> "Scheduler":
    """timm's schedule, by steps, of which an epoch has ``steps``."""
    from timm.scheduler import create_scheduler_v2

    warmup: Any = config.warmup_epochs  # timm takes fractions of an epoch, which its annotation forgets
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=config.epochs, warmup_epochs=warmup,
        warmup_lr=1e-6, min_lr=config.min_lr, step_on_epochs=False, updates_per_epoch=steps, warmup_prefix=False,
    )  # fmt: skip
    if scheduler is None:
        raise ValueError(f"sched={config.sched!r} is no schedule of timm; accepted: cosine, tanh, step, poly, constant, …")
    return scheduler


def build_loss(config: Config, num_classes: int) -> "tuple[Mixup | None, nn.Module]":
    """What mixes a batch, if anything does, and the loss of ``(logits, targets)``."""
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if config.mixup > 0 or config.cutmix > 0:
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(config.smoothing)
