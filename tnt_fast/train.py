"""Training on a folder of images, or on scikit-learn's handwritten digits: ``tnt-fast train``.

Data, transforms, optimizers, schedules, mixup and EMA are timm's and torchvision's. What is ours is that a run can be
stopped anywhere and continued to the same weights: every random draw follows from (seed, epoch, image) or from a state
that the checkpoint holds.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.data import resolve_data_config
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import tnt_fast
from tnt_fast.check import differences
from tnt_fast.checkpoints import FORMAT, CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from tnt_fast.data import DataError, DataSet, Order, batches, readers_named
from tnt_fast.dispatch import choose, find_device
from tnt_fast.recipe import Config, build_loss, build_model, build_optimizer, build_schedule
from tnt_fast.terminal import say


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state())  # of the old kind, no dict
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run was saved and can be continued."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"interrupted; {str(checkpoint)!r} holds the run: continue it with --resume")
        self.exit_code = 128 + signum


class Run:
    """One training run in a directory: ``last.pt`` (to continue or classify with), ``best.pt``, ``history.json``.

    Args:
        config: what to train. out: directory of the run.
        resume: continue ``out/last.pt`` if it exists; its config holds, but for ``device`` and ``workers``.
        log: called with a line of text. progress: show a bar for the steps of an epoch (default: on a terminal).

    Raises:
        ValueError, DataError, CheckpointError: before anything was written.
        FileExistsError: ``out`` holds a run and ``resume`` is False.
    """

    def __init__(
        self,
        config: Config,
        out: str | os.PathLike,
        *,
        resume: bool = False,
        log: Callable[[str], None] = say,
        progress: bool | None = None,
    ):
        self.out, self.log, self.progress = Path(out), log, progress
        self.last = self.out / "last.pt"
        saved = None
        if self.last.exists():
            if not resume:
                raise FileExistsError(f"{str(self.last)!r} holds a run; continue it with --resume, or choose another --out")
            saved = read_checkpoint(self.last)
            if saved.get("format") != FORMAT:
                raise CheckpointError(
                    f"{str(self.last)!r} was not written by this version's 'tnt-fast train' and cannot be continued; "
                    "take another --out (--initial starts from its weights)"
                )
            config = Config.of_checkpoint(saved["config"], config)
        config.check()
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = find_device(config.device)

        data = DataSet(config, self.out, log, progress)  # before the model is built
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        # what a saved run began with is in its checkpoint, or gone
        self.built = build_model(config, len(data.classes), saved)
        self.model = self.built.model.to(self.device)
        size = self.model.pixel_embed.img_size
        image = torch.empty(1, self.model.in_chans, *size, device=self.device)
        self.why_not_fused = [] if config.backend == "reference" else tnt_fast.why_not_fused(self.model, image)
        if not choose(self.model, image, warn=False):  # "fused" fails here, before anything is written
            self.model.backend = "reference"  # whoever shows the run says so, instead of a warning
        self.data_config = resolve_data_config({"crop_pct": config.crop_pct or None}, model=self.model)
        self.data_config |= {k: v for k, v in self.built.data_config.items() if k in ("mean", "std", "interpolation")}
        self.data_config["input_size"] = (self.model.in_chans, *size)
        self.train_set, self.val_set = data.images(self.data_config)
        self.classes, self.fingerprint = data.classes, data.fingerprint
        config = self.config = config.settled(len(self.train_set))
        self.steps = len(self.train_set) // config.batch_size
        if self.steps == 0:
            raise DataError(f"batch_size={config.batch_size} is more than the {len(self.train_set)} training images; lower it")

        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_schedule(config, self.optimizer, self.steps)
        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")
        counts = np.bincount(self.train_set.targets, minlength=len(self.classes))
        self.mixup, criterion = build_loss(config, counts.tolist())
        self.criterion = criterion.to(self.device)
        # where the run stands: the next step is `step` of `epoch`
        self.epoch, self.step, self.loss_sum = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        if saved:
            self._restore(saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["classes"] != self.classes:
            raise CheckpointError(
                f"{str(self.last)!r} was trained on {len(saved['classes'])} classes ({saved['classes'][:3]} …), the data has "
                f"{len(self.classes)} ({self.classes[:3]} …)"
            )
        changed = differences(saved["fingerprint"], self.fingerprint)
        if changed:
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            text = f"the data are not those that {str(self.last)!r} was trained on: {'; '.join(changed[:5])}{more}"
            if not self.config.allow_changed_data:
                raise CheckpointError(f"{text}; restore them, start anew in another --out, or go on with --allow-changed-data")
            self.log(f"{text}; going on from the start of epoch {saved['epoch'] + 1}")
        self.optimizer.load_state_dict(saved["optimizer"])
        if not changed:  # else the epochs may have another number of steps
            self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema:
            load_checkpoint(cast(Any, self.ema.module), {"state_dict": saved["state_dict_ema"]})
        self.epoch, self.step, self.loss_sum = saved["epoch"], saved["step"], saved["loss_sum"]
        if changed:  # another order
            self.step, self.loss_sum = 0, 0.0
        self.history = saved["history"]
        _set_random_state(saved["random"])

    def _weights(self) -> dict[str, Any]:
        """What ``classify`` and ``load_checkpoint`` need."""
        return {
            "format": FORMAT,
            "model": self.built.name,
            "model_kwargs": self.built.sizes,
            "state_dict": self.model.state_dict(),
            **({"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}),
            "classes": self.classes,
            "data_config": self.data_config,
            "grid_size": self.model.pixel_embed.grid_size,
            "version": tnt_fast.__version__,
        }

    def _save(self) -> None:
        self._write(
            {
                **self._weights(),
                "config": asdict(self.config),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "fingerprint": self.fingerprint,
                "loss_sum": self.loss_sum,
                "history": self.history,
                "random": _random_state(),
            },
            self.last,
        )

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError where a disk is full
            raise OSError(
                f"cannot save {str(path)!r}: {error}. What was there before is whole; make room on the disk, then --resume"
            ) from error

    def _autocast(self) -> torch.autocast:
        amp = self.config.amp
        return torch.autocast(self.device.type, None if amp == "off" else getattr(torch, amp), enabled=amp != "off")

    def _check_finite(self, what: str, value: float) -> None:
        if not np.isfinite(value):
            good = f"{str(self.last)!r} holds the last good state" if self.last.exists() else "nothing was saved yet"
            raise FloatingPointError(
                f"the {what} is {value} in epoch {self.epoch + 1}, step {min(self.step + 1, self.steps)}; lower the "
                f"learning rate, clip gradients (--clip-grad 1) or change --amp; {good}"
            )

    def train(self) -> list[dict[str, Any]]:
        """Train to the end of the last epoch, evaluating and saving at each; returns the history.

        Raises:
            Interrupted: by SIGINT or SIGTERM, after the step at hand and a save. OSError: a save failed; the old file is whole.
            FloatingPointError: a loss that is not finite; it is not saved.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with _caught_signals() as caught:
            while self.epoch < self.config.epochs:
                started = time.perf_counter()
                with readers_named():
                    self._train_epoch(caught)
                    loss, accuracy = self.evaluate()
                self._check_finite("held-out loss", loss)
                row = {
                    "epoch": self.epoch + 1,
                    "train_loss": self.loss_sum / self.steps,
                    "val_loss": loss,
                    "val_accuracy": accuracy,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "seconds": time.perf_counter() - started,
                }
                best = all(accuracy > old["val_accuracy"] for old in self.history)
                self.history.append(row)
                self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
                if best:  # before last.pt: a run killed in between repeats the epoch
                    self._write(self._weights(), self.out / "best.pt")
                self._save()
                self.log(
                    f"epoch {row['epoch']:3d}/{self.config.epochs}  loss {row['train_loss']:.4f}  "
                    f"held out: loss {loss:.4f}, accuracy {accuracy:.2%}  ({row['seconds']:.1f} s)"
                )
        (self.out / "history.json").write_text(json.dumps(self.history, indent=1) + "\n", "utf-8")
        return self.history

    def _train_epoch(self, caught: list[int]) -> None:
        config = self.config
        order = Order(len(self.train_set), config.batch_size, config.seed)
        self.train_set.epoch = order.epoch = self.epoch
        order.start = self.step
        loader = self._loader(self.train_set, sampler=order, drop_last=True)
        self.model.train()
        bar = _bar(batches(loader), self.steps, self.step, f"epoch {self.epoch + 1}", self.progress)
        for image, target in bar:
            image, target = image.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
            if self.mixup:
                image, target = self.mixup(image, target)
            self.scheduler.step_update(self.epoch * self.steps + self.step)
            with self._autocast():
                loss = self.criterion(self.model(image), target)
            value = loss.item()
            self._check_finite("loss", value)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            if config.clip_grad:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            self.loss_sum += value
            if self.ema:
                self.ema.update(self.model, self.epoch * self.steps + self.step)
            bar.set_postfix(loss=f"{value:.3f}", lr=f"{self.optimizer.param_groups[0]['lr']:.1e}")
            if caught:
                self._save()
                raise Interrupted(caught[0], self.last)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Cross-entropy (nats) and top-1 accuracy on the held-out images, of the averaged weights where there are any."""
        model = self.ema.module if self.ema else self.model
        model.eval()
        loss, right = 0.0, 0
        for image, target in batches(self._loader(self.val_set, shuffle=False)):
            image, target = image.to(self.device), target.to(self.device)
            with self._autocast():
                logits = model(image)
            loss += nn.functional.cross_entropy(logits.float(), target, reduction="sum").item()
            right += int((logits.argmax(1) == target).sum())
        return loss / len(self.val_set), right / len(self.val_set)

    def _loader(self, dataset: Dataset, **kwargs: Any) -> DataLoader:
        generator = torch.Generator().manual_seed(self.config.seed)  # else a loader draws from the run's own generator
        return DataLoader(
            dataset, batch_size=self.config.batch_size, num_workers=self.config.workers, generator=generator,
            pin_memory=self.device.type == "cuda", **kwargs,
        )  # fmt: skip


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to; a second one acts at once. Only in the main thread."""
    caught: list[int] = []

    owner = os.getpid()

    def handle(signum: int, frame: Any) -> None:
        if os.getpid() != owner:  # a process that reads images: the run tells it when to end
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)
        os.write(2, b"\nstopping after this step (again: at once)\n")  # print is not safe in a handler

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _bar(batches: Iterator[list[Tensor]], steps: int, start: int, text: str, progress: bool | None) -> Any:
    from tqdm import tqdm

    disable = None if progress is None else not progress  # None: only on a terminal
    return tqdm(batches, total=steps, initial=start, desc=text, disable=disable, leave=False, unit="step")


def summary(run: Run) -> str:
    """Two lines for the end of a run."""
    final = run.history[-1]
    return (
        f"held-out accuracy after epoch {final['epoch']}: {final['val_accuracy']:.2%} of {len(run.val_set)} images\n"
        f"training took {sum(row['seconds'] for row in run.history):.0f} s; checkpoint: {run.last}"
    )
