"""Training on a folder of images, or on scikit-learn's handwritten digits: ``tnt-fast train``.

Data, transforms, optimizers, schedules, mixup and EMA are timm's and torchvision's. What is ours is that a run can be
stopped anywhere and continued to the same weights: every random draw follows from (seed, epoch, image) or from a state
that the checkpoint holds.
"""

import contextlib
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from timm.data import resolve_data_config
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import tnt_fast
from tnt_fast import distributed, metrics, plan
from tnt_fast.check import described, differences
from tnt_fast.checkpoints import FORMAT, CheckpointError, load_checkpoint
from tnt_fast.data import DataError, DataSet, Order, batches, readers_named
from tnt_fast.dispatch import settle
from tnt_fast.distributed import ALONE, Ranks, Share, is_launched, like, own, versions, whole
from tnt_fast.recipe import (
    DIGITS,
    Config,
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    continued,
    differing,
    written,
)
from tnt_fast.runs import LAST, PICTURE, Folder, first_not_finite, structure
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
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # there may be fewer GPUs here


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived; the run was saved and can be continued."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"interrupted; {str(checkpoint)!r} holds the run: continue it with --resume")
        self.exit_code = 128 + signum


class Run:
    """One training run in a directory (``tnt_fast.runs`` says what is in it).

    Args:
        config: what to train. out: directory of the run.
        resume: continue ``out/last.pt`` if it exists; the settings that it was begun with hold.
        given: settings in ``config`` to change in a run that is continued (``recipe.MAY_EXTEND``); others may be named, if
            they are as they were. ``data``, ``device`` and ``workers`` are always taken from ``config``.
        log: called with a line of text. progress: show a bar for the steps of an epoch (default: on a terminal).
        ranks: the processes that train together (``distributed.joined``); each makes its own run of the same arguments. The
            first alone logs and writes.

    Raises:
        ValueError, DataError, CheckpointError, RunError, RankError, ImportError: before anything was written.
        FileExistsError: ``out`` holds a run and ``resume`` is False.
    """

    def __init__(
        self,
        config: Config,
        out: str | os.PathLike,
        *,
        resume: bool = False,
        given: Collection[str] = (),
        log: Callable[[str], None] = say,
        progress: bool | None = None,
        ranks: Ranks = ALONE,
    ):
        if not ranks.first:
            log, progress = _unheard, False
        self.out, self.log, self.progress, self.ranks = Path(out), log, progress, ranks
        self.folder = Folder(out, log)
        self.last = self.folder.last
        if os.path.lexists(self.last) and not resume:
            raise FileExistsError(f"{str(self.last)!r} holds a run; continue it with --resume, or choose another --out")
        if ranks.first:
            self.folder.check_free()
        self.changed: list[str] = []  # settings, since the last epoch that the history has
        saved = self.folder.read_last()
        if saved:
            config = self._continued(saved, config, given)
        config.check()
        self.config = config = config.divided(ranks.size)
        ranks.check_sharding(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = ranks.device(config.device)
        settings = {
            name: value for name, value in asdict(config).items() if name not in ("data", "device", "workers", "threads")
        }
        ranks.compare({**versions(), **settings, LAST: saved and (saved["epoch"], saved["step"])})

        with ranks.in_turn():
            data = DataSet(config, self.out, log, progress)  # before the model is built
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        # what a saved run began with is in its checkpoint, or gone
        with ranks.in_turn():
            self.built = build_model(config, data.classes, saved)
        self.model = self.built.model.to(self.device)
        size = self.model.pixel_embed.img_size
        self.why_not_fused = settle(self.model)  # "fused" fails here, before anything is written
        self.data_config = resolve_data_config({"crop_pct": config.crop_pct or None}, model=self.model)
        self.data_config |= {k: v for k, v in self.built.data_config.items() if k in ("mean", "std", "interpolation")}
        self.data_config["input_size"] = (self.model.in_chans, *size)
        writes = config.data == DIGITS and ranks.first  # they are written there
        with ranks.in_turn(), self.folder.locked() if writes else contextlib.nullcontext():
            self.train_set, self.val_set = data.images(self.data_config)
        self.classes, self.fingerprint = data.classes, data.fingerprint
        ranks.compare(described(data.fingerprint))
        config = self.config = config.settled(len(self.train_set), ranks.size)
        self.steps = len(self.train_set) // self._images_a_step()
        if self.steps == 0:
            times = f" × accumulate={config.accumulate}" if config.accumulate > 1 else ""
            times += f" × {ranks.size} ranks" if ranks.several else ""
            raise DataError(
                f"batch_size={config.batch_size}{times} is more than the {len(self.train_set)} training images; lower it"
            )

        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=config.ema_warmup) if config.ema else None
        if saved and self.ema:
            with self._fitting():
                load_checkpoint(cast(Any, self.ema.module), {"state_dict": saved["state_dict_ema"]})
        if config.fsdp:
            for model in (self.model, *([self.ema.module] if self.ema else [])):
                ranks.shard(model)
        self.optimizer = build_optimizer(config, self.model)
        if config.fsdp and not type(self.optimizer).__module__.startswith("torch.optim"):
            raise ValueError(f"opt={config.opt!r} does not know divided weights; accepted with fsdp: adamw, adam, sgd, …")
        self.scheduler = build_schedule(config, self.optimizer, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")
        counts = np.bincount(self.train_set.targets, minlength=len(self.classes))
        self.mixup, criterion = build_loss(config, counts.tolist())
        self.criterion = criterion.to(self.device)
        metrics.check_packages(config)
        if config.compile:
            self.model.compile(mode=config.compile_mode)  # in place: parameters keep their names
        self._training = ranks.parallel(self.model)
        # where the run stands: the next step is `step` of `epoch`
        self.epoch, self.step, self.loss_sum = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # the row of the history that best.pt is of
        if saved:
            with self._fitting():
                self._restore(saved)

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """Where what was saved is put into what was built."""
        try:
            yield
        except CheckpointError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(  # of another version of us, timm or torch
                f"{str(self.last)!r} does not fit the run that it describes ({' '.join(str(error).split())[:300]}) and "
                f"cannot be continued; {self.folder.way_on(self.last)}"
            ) from error

    def _continued(self, saved: dict[str, Any], config: Config, given: Collection[str]) -> Config:
        """The settings to continue with."""
        try:
            begun, done, before = Config(**saved["config"]), saved["epoch"] + (saved["step"] > 0), list(saved["changed"])
            if type(done) is not int:
                raise TypeError(f"epoch {type(done).__name__}")
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{str(self.last)!r} has settings of another version ({reason}) and cannot be continued; "
                f"{self.folder.way_on(self.last)}"
            ) from error
        try:
            config, changed = continued(begun, config, given, self.ranks.size)
        except ValueError as error:
            raise ValueError(f"{str(self.last)!r} cannot be continued: {error}, or {self.folder.way_on(self.last)}") from error
        if config.epochs < done:
            raise ValueError(f"epochs={config.epochs} is less than the {done} that {str(self.last)!r} was trained for")
        self.changed = before + changed
        return config

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["classes"] != self.classes:
            gone, new = differing(saved["classes"], self.classes)
            raise CheckpointError(
                f"{str(self.last)!r} was trained on {len(saved['classes'])} classes, the data has {len(self.classes)}; "
                + (f"only in the run {gone or 'none'}, only in the data {new or 'none'}" if gone or new else "in another order")
            )
        changed = differences(saved["fingerprint"], self.fingerprint)
        if changed:
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            text = f"the data are not those that {str(self.last)!r} was trained on: {'; '.join(changed[:5])}{more}"
            if not self.config.allow_changed_data:
                raise CheckpointError(f"{text}; restore them, start anew in another --out, or go on with --allow-changed-data")
            self.log(f"{text}; going on from the start of epoch {saved['epoch'] + 1}")
        self._load_optimizer(saved)
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.loss_sum = saved["epoch"], saved["step"], saved["loss_sum"]
        if changed:  # another order
            self.step, self.loss_sum = 0, 0.0
            self.changed.append("other images")
        elif self.step and saved["images_a_step"] != self._images_a_step():  # from the last image that was seen, or before
            self.step = self.step * saved["images_a_step"] // self._images_a_step()
            self.loss_sum *= self.step / saved["step"]
        if saved.get("ranks", 1) != self.ranks.size:
            self.changed.append(f"ranks={self.ranks.size} (was {saved.get('ranks', 1)})")
        self.history = [{**row, "val_accuracy": float(row["val_accuracy"])} for row in saved["history"]]
        _set_random_state(saved["random"])

    def _images_a_step(self) -> int:
        return self.config.images_a_step(self.ranks.size)

    def _weights(self) -> dict[str, Any]:
        """What ``classify`` and ``load_checkpoint`` need."""
        return {
            "format": FORMAT,
            "model": self.built.name,
            "model_kwargs": self.built.sizes,
            "state_dict": whole(self.model.state_dict()),
            **({"state_dict_ema": whole(self.ema.module.state_dict())} if self.ema else {}),
            "classes": self.classes,
            "data_config": self.data_config,
            "grid_size": self.model.pixel_embed.grid_size,
            "version": tnt_fast.__version__,
        }

    def _save(self) -> None:
        checkpoint = {
            **self._weights(),
            "config": asdict(self.config),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "fingerprint": self.fingerprint,
            "images_a_step": self._images_a_step(),
            "ranks": self.ranks.size,
            "loss_sum": self.loss_sum,
            "history": self.history,
            "changed": self.changed,
            "random": _random_state(),
        }
        if not self.ranks.several:
            self.folder.save_last(checkpoint)
            self._save_recipe()
            return
        state = checkpoint["optimizer"]["state"]  # a timm optimizer may have numbers in it, too
        plain = {i: {k: v for k, v in values.items() if not isinstance(v, Tensor)} for i, values in state.items()}
        checkpoint["optimizer"] = {**checkpoint["optimizer"], "state": plain}
        moments = {
            f"optimizer/{name}/{key}": value
            for i, name in enumerate(self._names())
            for key, value in state.get(i, {}).items()
            if isinstance(value, Tensor)
        }
        self.folder.save_together(checkpoint, {**self._all_weights(), **moments}, self.ranks)
        if self.ranks.first:
            self._save_recipe()

    def _save_recipe(self) -> None:
        settings = replace(self.config, accumulate=1) if self.config.global_batch else self.config  # from which it follows
        self.folder.save_recipe(written(settings))

    def _all_weights(self) -> dict[str, Tensor]:
        """Sharded where they are."""
        models = {"model": self.model, **({"averaged": self.ema.module} if self.ema else {})}
        return {f"{which}/{name}": value for which, model in models.items() for name, value in model.state_dict().items()}

    def _names(self) -> list[str]:
        """Of the parameters, in the optimizer's order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _load_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Its state, and with it the weights, where several ranks saved them."""
        parameters = dict(self.model.named_parameters())
        names, optimizer = self._names(), saved["optimizer"]
        state = {i: dict(values) for i, values in optimizer["state"].items()}
        if shards := saved.get("shards"):
            folder, tensors = self.folder.check_shards(shards, self.ranks), self._all_weights()
            for path, (size, dtype) in distributed.sizes(folder).items():
                kind, _, rest = path.partition("/")
                name, _, key = rest.rpartition("/")
                if kind == "optimizer":
                    parameter = parameters[name].detach()
                    moment = size == parameter.shape  # else a number, such as that of the steps
                    value = torch.zeros_like(parameter, dtype=dtype) if moment else torch.zeros(size, dtype=dtype)
                    state.setdefault(names.index(name), {})[key] = tensors[path] = value
            distributed.load(folder, tensors)
        for i, values in state.items():
            parameter = parameters[names[i]]
            state[i] = {key: like(value, parameter) if isinstance(value, Tensor) else value for key, value in values.items()}
        self.optimizer.load_state_dict({**optimizer, "state": state})

    def _save_best(self, row: dict[str, Any]) -> None:
        weights = self._weights()
        if self.ranks.first:
            self.folder.save_best({**weights, "epoch": row["epoch"], "accuracy": row["val_accuracy"]})
        self.best = row

    def _find_best(self) -> None:
        """Hold best.pt against the history; make it again where it is damaged and can be."""
        self.best, problem = self.ranks.share(self._read_best() if self.ranks.first else (None, ""))
        if not problem:
            return
        best = max(self.history, key=lambda row: row["val_accuracy"])
        if (best["epoch"], 0) == (self.epoch, self.step):
            self._save_best(best)
            self.log(f"{problem} It is made again from {str(self.last)!r}, which is of the same epoch.")
        else:
            self.log(f"{problem} The weights of epoch {best['epoch']} are lost; it will be the best epoch from here on.")

    def _read_best(self) -> tuple[dict[str, Any] | None, str]:
        """The row of the history that best.pt is of; or what is wrong with it."""
        if not self.history:
            return None, ""
        try:
            found = self.folder.read_best()
            rows = [row for row in self.history if (row["epoch"], row["val_accuracy"]) == (found["epoch"], found["accuracy"])]
            same = found["classes"] == self.classes and structure(found["state_dict"]) == structure(self.model.state_dict())
            if rows and same:
                return rows[0], ""
            if same and found["epoch"] == self.epoch + 1:  # killed between its two files: this epoch is repeated
                return None, ""
            return None, f"{str(self.folder.best)!r} is of another run"
        except (CheckpointError, OSError, KeyError) as error:
            return None, str(error)

    def _autocast(self) -> torch.autocast:
        amp = self.config.amp
        return torch.autocast(self.device.type, None if amp == "off" else getattr(torch, amp), enabled=amp != "off")

    def _check_finite(self, what: str, value: float) -> None:
        if not np.isfinite(value):
            self._diverged(f"the {what} is {value}", min(self.step + 1, self.steps))

    def _check_weights(self) -> None:
        """What is not finite must never replace what is; one wait for the device, at a save."""
        state = {"weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}
        if self.ema:
            state["averaged weights"] = self.ema.module.state_dict()
        names = self.ranks.gather(first_not_finite(own(state)))
        if name := next(filter(None, names), None):
            self._diverged(f"{name} is not finite", self.step)

    @torch.no_grad()
    def _check_outputs(self, image: Tensor) -> None:
        """Finite weights may still be too large: at the end of an epoch the held-out loss says so, in the middle this."""
        self.model.eval()  # which draws nothing
        with self._autocast():
            outputs = self.model(image.to(self.device))
        if not all(self.ranks.gather(bool(outputs.isfinite().all()))):
            self._diverged("an output is not finite", self.step)

    def _diverged(self, what: str, step: int) -> NoReturn:
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        if self.last.exists():
            good = f"{str(self.last)!r} holds the last good state: {self.folder.way_on(self.last)}"
        else:
            good = "nothing was saved yet"
        raise FloatingPointError(
            f"{what} in epoch {self.epoch + 1}, step {step}, at a learning rate of {lr:.1e}; lower the learning rate (--lr), "
            f"clip gradients (--clip-grad 1) or change --amp; {good}"
        )

    def done(self) -> bool:
        """Whether all epochs are trained, or ``patience`` of them brought no better held-out accuracy."""
        accuracy = [row["val_accuracy"] for row in self.history]
        waited = len(accuracy) - 1 - accuracy.index(max(accuracy)) if accuracy else 0
        return self.epoch >= self.config.epochs or 0 < self.config.patience <= waited

    def train(self) -> list[dict[str, Any]]:
        """Train until ``done``, evaluating and saving after each epoch; returns the history.

        Raises:
            Interrupted: by SIGINT, SIGTERM or SIGHUP, after the step at hand and a save.
            RunError: another process trains in the directory. OSError: it cannot be written to, or has too little room; a save
            failed; the old file is whole.
            FloatingPointError: a loss, or weights, that are not finite; they are not saved.
        """
        recorded: Any = contextlib.nullcontext(lambda row: None)
        if self.ranks.first:
            recorded = metrics.recorded(self.config, self.out, self.epoch, self.log)
        with caught_signals(self.ranks.first) as caught, self._owned(), recorded as record:
            self._find_best()
            for line in self.changed:
                self.log(f"continuing with {line}")
            if self.ranks.first and self.history:
                self.folder.save_history(self.history)  # which a killed process may have left behind
            if self.ranks.first and not self.done():
                self.folder.check_room(*self._sizes())
                self._warn_of_memory()
            drawn, cost = time.perf_counter(), 1.0
            while not self.done():
                started = time.perf_counter()
                with readers_named():
                    rate = self._train_epoch(caught)
                    held_out = self.evaluate()
                self._end_epoch(time.perf_counter() - started, rate, *held_out)
                record(self.history[-1])
                if not self.done() and (stop := self._agreed(caught)):
                    raise Interrupted(stop, self.last)
                now = time.perf_counter()
                if now - drawn > 50 * cost:  # at most a fiftieth of the time
                    self._draw()
                    drawn = time.perf_counter()
                    cost = drawn - now
            if self.epoch < self.config.epochs:
                self.log(f"stopped early: {self.config.patience} epochs without a better held-out accuracy")
            self.log(self._draw())
        return self.history

    def _warn_of_memory(self) -> None:
        """Where the batch does not fit the GPU, by the plan."""
        if (gib := plan.memory_here(self.device)) is not None:
            config = replace(self.config, model=self.built.name, model_kwargs=self.built.sizes)
            fused = self.model.backend != "reference"
            if line := plan.too_large(config, self.model, len(self.classes), self.ranks.size, fused, gib):
                self.log(line)

    def _end_epoch(self, seconds: float, rate: float, loss: float, accuracy: float) -> None:
        self._check_finite("held-out loss", loss)
        self._check_weights()
        memory = self.ranks.gather(_peak_memory(self.device))  # by rank
        row = {
            "epoch": self.epoch + 1,
            "train_loss": self.loss_sum / self.steps,
            "val_loss": loss,
            "val_accuracy": accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "images_per_second": rate,
            "memory_mib": memory,
            **({"changed": "; ".join(self.changed)} if self.changed else {}),
        }
        self.history.append(row)
        self.changed = []
        self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
        if not self.best or accuracy > self.best["val_accuracy"]:  # before last.pt: a run killed in between repeats the epoch
            self._save_best(row)
        self._save()
        if self.ranks.first:
            self.folder.save_history(self.history)
        self.log(
            f"epoch {row['epoch']:3d}/{self.config.epochs}  loss {row['train_loss']:.4f}  "
            f"held out: loss {loss:.4f}, accuracy {accuracy:.2%}  ({seconds:.1f} s{self._time_left()})  "
            f"{rate:,.0f} img/s, {' | '.join(f'{mib:,}' for mib in memory)} MiB"
        )

    def _time_left(self) -> str:
        seconds = (self.config.epochs - self.epoch) * statistics.median(row["seconds"] for row in self.history[-5:])
        return f", {tqdm.format_interval(seconds)} left" if seconds else ""

    def _sizes(self) -> tuple[int, int]:
        """Bytes of last.pt and of best.pt."""
        weights = sum(value.nbytes for value in self.model.state_dict().values()) * (2 if self.ema else 1)
        moments = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        state = sum(value.nbytes for value in moments) or 2 * sum(value.nbytes for value in self.model.parameters())
        return weights + state, weights

    def _draw(self) -> str:
        from tnt_fast import visualize

        if not self.ranks.first:
            return ""
        try:
            title = f"{self.config.model} on {self.config.data}"
            return f"picture: {visualize.training_curve(self.history, self.out / PICTURE, title)}"
        except Exception as error:  # without matplotlib, say; no picture is worth a run
            return f"no picture: {error}"

    def _train_epoch(self, caught: list[int]) -> float:
        """Returns images a second, of all ranks together."""
        config, ranks = self.config, self.ranks
        started, first = time.perf_counter(), self.step
        order = Order(len(self.train_set), config.batch_size, config.seed, config.aug_repeats)
        self.train_set.epoch = order.epoch = self.epoch
        order.start = self.step * config.accumulate * ranks.size
        share = Share(order, ranks, config.accumulate) if ranks.several else order
        loader = self._loader(self.train_set, sampler=share, drop_last=True)
        self.model.train()
        steps = zip(*[batches(loader)] * config.accumulate, strict=False)  # the last, smaller one is dropped
        bar = _bar(steps, self.steps, self.step, f"epoch {self.epoch + 1}/{config.epochs}", self.progress)
        for parts in bar:
            self.scheduler.step_update(self.epoch * self.steps + self.step)
            self.optimizer.zero_grad(set_to_none=True)
            value, stop = self._agreed_loss(self._gradients(parts), caught)
            self._check_finite("loss", value)
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
            if stop:
                self._check_weights()
                self._check_outputs(parts[-1][0])
                self._save()
                raise Interrupted(self._agreed(caught), self.last)
        return (self.step - first) * self._images_a_step() / (time.perf_counter() - started)

    def _gradients(self, parts: Sequence[list[Tensor]]) -> Tensor:
        """Gradients of the mean loss over batches of one size, of all ranks; returns this rank's part of that mean."""
        total = torch.zeros((), device=self.device)
        for i, (image, target) in enumerate(parts):
            image, target = image.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
            if self.config.global_batch:
                self._seed(i)
            if self.mixup:
                image, target = self.mixup(image, target)
            with self.ranks.adding_up(self._training, last=i == len(parts) - 1):
                with self._autocast():
                    loss = self.criterion(self._training(image), target) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total / self.ranks.size if self.ranks.several else total

    def _seed(self, i: int) -> None:
        """What is drawn for the ith batch of this rank follows from its place in the step, whichever rank it is on."""
        place = i * self.ranks.size + self.ranks.rank
        numpy, torchs = np.random.SeedSequence([self.config.seed, self.epoch, self.step, place]).generate_state(2).tolist()
        np.random.seed(numpy)
        torch.manual_seed(torchs)

    def _agreed_loss(self, loss: Tensor, caught: list[int]) -> tuple[float, bool]:
        """The mean loss of all ranks, the one wait for the device in a step, and whether one of them is to stop."""
        if not self.ranks.several:
            return loss.item(), bool(caught)
        value, stop = self.ranks.add(torch.stack([loss, torch.full_like(loss, bool(caught))])).tolist()
        return value, stop > 0

    def _agreed(self, caught: list[int]) -> int:
        """The signal that stops all ranks; 0: none."""
        return next((signums[0] for signums in self.ranks.gather(caught) if signums), 0)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Cross-entropy (nats) and top-1 accuracy on the held-out images, of the averaged weights where there are any."""
        model = self.ema.module if self.ema else self.model
        model.eval()
        loss, right, count = 0.0, 0, len(self.val_set)
        mine = batches(self._loader(self.val_set, sampler=range(self.ranks.rank, count, self.ranks.size)))
        if self.config.fsdp:  # whose forwards all ranks make together
            mine = self._as_many(mine, -(-count // (self.config.batch_size * self.ranks.size)))
        for image, target in mine:
            image, target = image.to(self.device), target.to(self.device)
            with self._autocast():
                logits = model(image)
            loss += nn.functional.cross_entropy(logits.float(), target, reduction="sum").item()
            right += int((logits.argmax(1) == target).sum())
        loss, right = self.ranks.add(torch.tensor([loss, right], dtype=torch.float64)).tolist()
        return loss / count, right / count

    def _as_many(self, own: Iterator[list[Tensor]], count: int) -> Iterator[list[Tensor]]:
        """So many batches: behind those of this rank an image that cross-entropy leaves out."""
        nothing = [torch.zeros(1, *self.data_config["input_size"]), torch.tensor([-100])]
        for _ in range(count):
            yield next(own, nothing)

    def _loader(self, dataset: Dataset, **kwargs: Any) -> DataLoader:
        generator = torch.Generator().manual_seed(self.config.seed)  # else a loader draws from the run's own generator
        return DataLoader(
            dataset, batch_size=self.config.batch_size, num_workers=self.config.workers, generator=generator,
            pin_memory=self.device.type == "cuda", worker_init_fn=_leave_signals_to_the_run, **kwargs,
        )  # fmt: skip

    def _owned(self) -> contextlib.AbstractContextManager:
        """The folder, held by the first rank for all."""
        return self.folder.locked() if self.ranks.first else contextlib.nullcontext()


def _peak_memory(device: torch.device) -> int:
    """MiB of a GPU since the last call; on the CPU of this process, since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak >> 20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def _unheard(line: str) -> None:
    """The log of all ranks but the first."""


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _leave_signals_to_the_run(worker: int) -> None:
    """For a process that reads images: a terminal or torchrun sends its signals to all, but the run ends its readers itself."""
    if is_launched():
        os.setpgid(0, 0)
    for s in set(_SIGNALS) - {signal.SIGTERM}:
        signal.signal(s, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def caught_signals(say: bool = True) -> Iterator[list[int]]:
    """A list that SIGINT, SIGTERM and SIGHUP are added to; a second one acts at once. Only in the main thread.

    SIGHUP stays ignored under nohup.
    """
    caught: list[int] = []

    owner = os.getpid()

    def handle(signum: int, frame: Any) -> None:
        if os.getpid() != owner:  # a process that reads images, which has just been forked
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)
        with contextlib.suppress(OSError):  # the terminal is gone
            if not say:
                return
            os.write(2, b"\nstopping after this step (again: at once)\n")  # print is not safe in a handler

    try:
        hangup = getattr(signal, "SIGHUP", None)
        kept = [s for s in _SIGNALS if s == hangup and signal.getsignal(s) == signal.SIG_IGN]
        old = {s: signal.signal(s, handle) for s in _SIGNALS if s not in kept}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _bar(batches: Iterable, steps: int, start: int, text: str, progress: bool | None) -> Any:
    disable = None if progress is None else not progress  # None: only on a terminal
    return tqdm(batches, total=steps, initial=start, desc=text, disable=disable, leave=False, unit="step")


def summary(run: Run) -> str:
    """Lines for the end of a run."""
    final, best = run.history[-1], run.best
    named = f"best epoch: {best['epoch']}, {best['val_accuracy']:.2%}; checkpoint: {run.folder.best}\n" if best else ""
    return (
        f"held-out accuracy after epoch {final['epoch']}: {final['val_accuracy']:.2%} of {len(run.val_set)} images\n{named}"
        f"training took {sum(row['seconds'] for row in run.history):.0f} s; checkpoint: {run.last}"
    )
