"""What a training run depends on: its settings, and the model that they name."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tnt_fast.checkpoints import head_classes, load_checkpoint, read_checkpoint
from tnt_fast.data import DIGITS, DataError
from tnt_fast.tnt import TNT
from tnt_fast.variants import create_tnt

MAY_CHANGE = ("data", "device", "workers")  # settings that a resumed run takes anew
AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Config:
    """Everything that a run depends on; kept in its checkpoint. The defaults follow DeiT's recipe, as the TNT paper does."""

    data: str = field(metadata={"help": f"a directory with train/CLASS/*.png and val/CLASS/*.png, or '{DIGITS}'"})
    model: str = field(default="tnt_fast_s_patch16_224", metadata={"help": "a timm model name"})
    model_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "its arguments, as key=value …"})
    backend: str = field(default="auto", metadata={"help": "auto, fused or reference"})
    initial: str = field(
        default="", metadata={"help": "checkpoint to start from (its head is kept if the classes agree in number)"}
    )
    epochs: int = field(default=300, metadata={"help": "passes over the training images"})
    batch_size: int = field(default=256, metadata={"help": "images a step"})
    opt: str = field(default="adamw", metadata={"help": "a timm optimizer"})
    lr: float = field(default=0.0, metadata={"help": "peak learning rate; 0: 1e-3 · batch / 1024"})
    weight_decay: float = field(default=0.05, metadata={"help": "not applied to biases, norms and positions"})
    sched: str = field(default="cosine", metadata={"help": "a timm schedule"})
    warmup_epochs: float = field(default=5, metadata={"help": "linear warm-up"})
    min_lr: float = field(default=1e-5, metadata={"help": "learning rate at the end"})
    clip_grad: float = field(default=0.0, metadata={"help": "largest gradient norm; 0: off"})
    smoothing: float = field(default=0.1, metadata={"help": "label smoothing"})
    mixup: float = field(default=0.8, metadata={"help": "mixup alpha; 0: off"})
    cutmix: float = field(default=1.0, metadata={"help": "cutmix alpha; 0: off"})
    ema: float = field(default=0.0, metadata={"help": "decay of averaged weights, which are then what is evaluated; 0: off"})
    drop_path: float = field(default=0.1, metadata={"help": "stochastic depth"})
    scale: tuple[float, float] = field(default=(0.08, 1.0), metadata={"help": "area of random crops"})
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), metadata={"help": "aspect ratio of random crops"})
    hflip: float = field(default=0.5, metadata={"help": "probability of a horizontal flip"})
    color_jitter: float = field(default=0.3, metadata={"help": "colour jitter, where auto-augment is off"})
    auto_augment: str = field(default="rand-m9-mstd0.5-inc1", metadata={"help": "timm's name of a policy; '' : off"})
    reprob: float = field(default=0.25, metadata={"help": "probability of random erasing"})
    crop_pct: float = field(default=0.0, metadata={"help": "evaluation crop; 0: the model's"})
    seed: int = field(default=0, metadata={"help": "of weights, order, augmentation, dropout"})
    amp: str = field(default="off", metadata={"help": "off, bfloat16 or float16 (with loss scaling)"})
    device: str = field(default="", metadata={"help": "such as cpu, cuda:0; default: a GPU if there is one"})
    workers: int = field(default=2, metadata={"help": "processes that read images; 0: none"})
    threads: int = field(default=0, metadata={"help": "CPU threads of PyTorch; 0: its default. Tiny models are fastest with 1"})

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


def build_model(config: Config, num_classes: int) -> TNT:
    """The TNT that a config names, with a head for ``num_classes``, from its initial checkpoint where it has one."""
    given = config.model_kwargs.get("num_classes", num_classes)
    if given != num_classes:
        raise DataError(f"model_kwargs says num_classes={given}, the data has {num_classes} classes; leave it out")
    kwargs = {"drop_path_rate": config.drop_path, **config.model_kwargs, "num_classes": num_classes, "backend": config.backend}
    model = create_tnt(config.model, **kwargs)
    if config.initial:
        classes = head_classes(read_checkpoint(config.initial))
        load_checkpoint(model, config.initial, reset_head=classes != num_classes)
    return model
