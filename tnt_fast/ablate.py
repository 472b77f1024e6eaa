"""Small TNTs trained over a grid, as in the paper's ablations: ``tnt-fast ablate``.

Around one model, the base, each axis changes one thing, as Tables 5 to 8 and 12 of arXiv:2103.00112 do, for several seeds. Each
run is a folder of ``tnt-fast train`` that is continued where it stopped, and the table is made of what these folders hold:

====================  ================================================================================
ablation.json         settings, grid, and a row for each value; ablation.csv has the rows as a table
ablation.png          the same as a picture
AXIS-VALUE/seed-N/    a run; result.json says that it is finished. base/ is the model that all share
data/                 the digits
====================  ================================================================================
"""

import json
import math
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from tnt_fast import kernels  # noqa: F401  first, as in the command: a process of its own begins here, too

# isort: split
import torch

from tnt_fast import flops
from tnt_fast.check import training_files
from tnt_fast.data import write_digits
from tnt_fast.dispatch import find_device, settle
from tnt_fast.recipe import DIGITS, MAY_CHANGE, Config, preset, unknown
from tnt_fast.runs import RunError
from tnt_fast.terminal import say
from tnt_fast.tnt import TNT
from tnt_fast.train import Interrupted, Run, caught_signals
from tnt_fast.variants import create_tnt
from tnt_fast.writing import table, write

BASES: dict[str, dict[str, Any]] = {  # by the kind of data; a smaller TNT-Ti in both
    "digits": {**preset("small"), "epochs": 12},
    "images": {
        "model": "tnt_fast_ti_patch16_224", "model_kwargs": {"img_size": 64, "embed_dim": 96, "inner_dim": 12, "depth": 4},
        "epochs": 30, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "scale": (0.3, 1.0), "workers": 0, "threads": 1,
    },
}  # fmt: skip
SEEDS = 3
TIMED = 32  # images a call


class Axis(NamedTuple):
    """What one table of the paper varies.

    Attributes:
        values: for a base, unless others are given. base: the base's own. sizes: the arguments that a value changes.
    """

    table: str
    text: str
    values: Callable[[TNT], list[str]]
    base: Callable[[TNT], str]
    sizes: Callable[[TNT, str], dict[str, Any]]


def _inner(model: TNT, value: str) -> dict[str, Any]:
    if value in ("all", "none"):
        return {"inner_blocks": None if value == "all" else ()}
    return {"inner_blocks": tuple(int(index) for index in value.split("+"))}


def _base_inner(model: TNT) -> str:
    having = [str(i) for i, block in enumerate(model.blocks) if getattr(block, "has_inner", False)]
    return "all" if len(having) == len(model.blocks) else "+".join(having) or "none"


_POSITIONS = {"none": (False, False), "pixel": (True, False), "patch": (False, True), "both": (True, True)}


def _positions(model: TNT, value: str) -> dict[str, Any]:
    pixel, patch = _POSITIONS[value]
    return {"use_pixel_pos": pixel, "use_patch_pos": patch}


def _base_positions(model: TNT) -> str:
    return next(name for name, has in _POSITIONS.items() if has == (model.pixel_pos is not None, model.patch_pos is not None))


def _stride(model: TNT, value: str) -> dict[str, Any]:
    stride, sizes = int(value), model.sizes()
    channels, rest = divmod(sizes["C"] * stride**2, sizes["stride"] ** 2)
    if stride < 1 or rest or not channels:
        raise ValueError(f"inner_dim={sizes['C']} at stride {sizes['stride']} leaves no whole number of channels at {value}")
    return {"first_stride": stride, "inner_dim": channels, "num_heads_inner": math.gcd(sizes["H"], channels)}


def _strides(model: TNT) -> list[str]:
    sizes, patch = model.sizes(), math.gcd(*model.pixel_embed.patch_size)
    return [str(s) for s in (2, 4, 8) if patch % s == 0 and sizes["C"] * s**2 % sizes["stride"] ** 2 == 0]


AXES = {
    "inner": Axis(
        "5", "blocks with an inner transformer: all, none (a ViT behind TNT's stem), or their numbers from 0, as 0+2",
        lambda model: ["none", "0", "all"], _base_inner, _inner,
    ),
    "positions": Axis(
        "6", "position encodings: none, pixel, patch, both",
        lambda model: [*_POSITIONS], _base_positions, _positions,
    ),
    "heads": Axis(
        "7", "heads of the inner transformers",
        lambda model: [str(h) for h in (1, 2, 4, 6, 8) if model.sizes()["C"] % h == 0],
        lambda model: str(model.sizes()["H"]), lambda model, value: {"num_heads_inner": int(value)},
    ),
    "stride": Axis(
        "8", "stride of the stem; S = (patch / stride)² pixels, with channels so that S · C stays as it is",
        _strides, lambda model: str(model.sizes()["stride"]), _stride,
    ),
    "overlap": Axis(
        "", "distance of neighbouring patches in image pixels; below the patch they overlap",
        lambda model: [str(model.pixel_embed.patch_size[0]), str(model.pixel_embed.patch_size[0] // 2)],
        lambda model: str(model.pixel_embed.patch_stride[0]), lambda model, value: {"patch_stride": int(value)},
    ),
    "se": Axis(
        "12", "squeeze-and-excitation after the outer MLP, its ratio; 0: none",
        lambda model: ["0", "0.25"], lambda model: f"{_se_ratio(model):g}", lambda model, value: {"se_ratio": float(value)},
    ),
}  # fmt: skip


def _se_ratio(model: TNT) -> float:
    layer: Any = getattr(model.blocks[0], "se_layer", None)
    return layer.fc[1].out_features / model.embed_dim if layer else 0.0


Grid = dict[str, list[str]]


def read_grid(words: Iterable[str], model: TNT) -> Grid:
    """``heads=1,2 stride se`` as the values of each axis; those of an axis without "=" are its own for this base.

    Raises:
        ValueError: no such axis, or a value that it does not take; the message has the nearest name and what is accepted.
    """
    grid: Grid = {}
    for word in words:
        name, equals, listed = word.partition("=")
        if name not in AXES:
            raise unknown("grid", name, AXES)
        given = [value.strip() for value in listed.split(",") if value.strip()]
        if equals and not given:
            raise ValueError(f"grid={word!r:.100} names no value; accepted for {name}: {AXES[name].text}")
        grid.setdefault(name, []).extend(given or AXES[name].values(model))
    for name, values in grid.items():
        for value in values:
            _sizes(name, value, model)
    return {name: list(dict.fromkeys(values)) for name, values in grid.items()}


def _sizes(name: str, value: str, model: TNT) -> dict[str, Any]:
    """The arguments that a value changes; none for the base's own."""
    axis = AXES[name]
    if value == axis.base(model):
        return {}
    try:
        return axis.sizes(model, value)
    except (ValueError, KeyError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) and "channels" in str(error) else ""
        raise ValueError(
            f"grid {name}={value!r:.60} is not accepted{reason}; {name} is {axis.text}; here: {', '.join(axis.values(model))}"
        ) from error


class Cell(NamedTuple):
    """One run: a value of an axis, or the base, with a seed."""

    name: str
    seed: int
    config: Config


class Ablation:
    """All runs of a grid in a folder.

    Args:
        config: of the base; its seed is the first. out: the folder. grid: words, as ``read_grid`` takes them; none: all axes.
        seeds: how many; None: 3, or as many as before. resume: continue what is in ``out``; its settings hold, the grid and the
            seeds may grow.
        given: names of settings that were asked for; they must be as they were in an ablation that is continued.

    Raises:
        ValueError, DataError: settings, grid or data, before anything is written.
        FileExistsError: ``out`` holds an ablation and ``resume`` is False.
    """

    def __init__(
        self, config: Config, out: str | os.PathLike, *, grid: Sequence[str] = (), seeds: int | None = None,
        resume: bool = False, given: Collection[str] = (), log: Callable[[str], None] = say,
    ):  # fmt: skip
        self.out, self.log = Path(out), log
        self.file = self.out / "ablation.json"
        if seeds is not None and seeds < 1:
            raise ValueError(f"--seeds {seeds} must be at least 1")
        before: Grid = {}
        had = 0
        if self.file.exists():
            if not resume:
                raise FileExistsError(
                    f"{str(self.file)!r} is of an ablation; continue it with --resume, or choose another --out"
                )
            config, before, had = self._continued(config, given)
        config.check()
        find_device(config.device)
        self.config, self.seeds = config, max(seeds or (had or SEEDS), had)
        self.base = _model(config)
        chosen = read_grid(grid or ([] if before else AXES), self.base)
        self.grid = {name: [*dict.fromkeys([*before.get(name, []), *chosen.get(name, [])])] for name in {**before, **chosen}}
        self.configs = {"base": config}
        for name, value in ((name, value) for name, values in self.grid.items() for value in values):
            if changed := _sizes(name, value, self.base):
                self.configs[f"{name}-{value}"] = replace(config, model_kwargs={**config.model_kwargs, **changed})
                try:
                    _model(self.configs[f"{name}-{value}"])
                except ValueError as error:
                    raise ValueError(f"grid {name}={value}: {error}") from error
        classes = 10
        if config.data != DIGITS:
            classes = len(training_files(config.data, config.val_fraction, config.seed, config.skip_bad, log).classes)
        self.models = {name: _model(own, num_classes=classes) for name, own in self.configs.items()}
        self.counts = {
            name: {"parameters": sum(p.numel() for p in model.parameters()), "multiply_adds": flops.multiply_adds(model)}
            for name, model in self.models.items()
        }
        self.failed: dict[str, str] = {}
        self.speeds: dict[str, float] = {}

    def _continued(self, config: Config, given: Collection[str]) -> tuple[Config, Grid, int]:
        """Settings, grid and seeds that it was begun with."""
        try:
            found: dict[str, Any] = json.loads(self.file.read_text("utf-8"))
            settings: dict[str, Any] = {k: tuple(v) if k in ("scale", "ratio") else v for k, v in found["settings"].items()}
            begun, grid, count = Config(**settings), dict(found["grid"]), int(found["seeds"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{str(self.file)!r} is damaged or of another version ({error}); put it back, or choose another --out"
            ) from error
        asked = json.loads(json.dumps(asdict(config)))  # lists for tuples, as in the file
        differ = [name for name in given if name not in MAY_CHANGE and found["settings"].get(name) != asked[name]]
        if differ:
            was = ", ".join(f"{name}={getattr(begun, name)!r} (now {getattr(config, name)!r})" for name in differ)
            raise ValueError(
                f"the ablation in {str(self.out)!r} was begun with {was}; leave that out to continue it, or take another --out"
            )
        anew = {name: getattr(config, name) for name in MAY_CHANGE if name in given}
        return replace(begun, **anew), grid, count

    # ---- its runs ----

    def cells(self) -> list[Cell]:
        """All of them, seed by seed, so that a part of them is a part of every row."""
        seeds = range(self.config.seed, self.config.seed + self.seeds)
        return [Cell(name, seed, replace(config, seed=seed)) for seed in seeds for name, config in self.configs.items()]

    def folder(self, cell: Cell) -> Path:
        return self.out / cell.name / f"seed-{cell.seed}"

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished run says of itself."""
        try:
            found = json.loads((self.folder(cell) / "result.json").read_text("utf-8"))
            return found if 0 <= found["accuracy"] <= 1 else None
        except (OSError, ValueError, KeyError, TypeError):  # not finished; a damaged one is trained to its end again
            return None

    def run(self, processes: int) -> None:
        """Train what is not finished yet, in so many processes (one: this one), and write table and picture.

        A run that fails is in ``failed``; the others go on.

        Raises:
            Interrupted: every run was saved, and the table written.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.save()
        if self.config.data == DIGITS:
            write_digits(self.out / "data")
        cells = self.cells()
        pending = [cell for cell in cells if self.result(cell) is None]
        if len(pending) < len(cells):
            self.log(f"{len(cells) - len(pending)} of {len(cells)} runs are finished")
        began = time.perf_counter()
        try:
            for i, (cell, failure) in enumerate(self._trained(pending, min(processes, len(pending))), 1):
                left = (time.perf_counter() - began) / i * (len(pending) - i)
                done = self.result(cell)
                if done is None:
                    self.failed[f"{cell.name}, seed {cell.seed}"] = failure
                    shown = f"failed: {failure}"
                else:
                    shown = f"held-out accuracy {done['accuracy']:.2%}"
                self.log(f"{cell.name}, seed {cell.seed}: {shown} ({i} of {len(pending)}, {left / 60:.0f} min left)")
                self.save()
        except (Interrupted, KeyboardInterrupt):
            self.save()
            raise
        self.speeds = speeds(self.models, self.config)
        self.save()
        self.log(self._draw())

    def _jobs(self, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Config, Path]]:
        for cell in cells:
            data = str(self.out / "data") if self.config.data == DIGITS else self.config.data
            yield cell, replace(cell.config, data=data), self.folder(cell)

    def _trained(self, cells: Sequence[Cell], processes: int) -> Iterator[tuple[Cell, str]]:
        """Each cell when it is finished, and why it is not where it failed."""
        if processes > 1:
            yield from self._in_processes(cells, processes)
            return
        for cell, config, folder in self._jobs(cells):
            yield cell, train_cell(config, folder)

    def _in_processes(self, cells: Sequence[Cell], processes: int) -> Iterator[tuple[Cell, str]]:
        context = multiprocessing.get_context("spawn")
        jobs = self._jobs(cells)
        at_work: dict[Any, tuple[Any, Cell]] = {}
        begun: list[Any] = []

        def begin(pipe: Any = None, process: Any = None) -> None:
            """Give a process, or a new one, the next run; where there is none, end it."""
            job = next(jobs, None)
            if job is not None:
                if process is None:
                    pipe, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs,))
                    process.start()
                    begun.append(process)
                    theirs.close()
                pipe.send(job[1:])
                at_work[pipe] = process, job[0]
            elif pipe is not None:
                pipe.send(None)

        with caught_signals() as caught:
            try:
                for _ in range(processes):
                    begin()
                while at_work and not caught:
                    ready: list[Any] = connection.wait(list(at_work), timeout=1)
                    for pipe in ready:
                        process, cell = at_work.pop(pipe)
                        try:
                            failure = pipe.recv()
                        except EOFError:
                            process.join()
                            failure = f"its process ended with status {process.exitcode}; out of memory? Fewer --processes"
                            begin()
                        else:
                            begin(pipe, process)
                        yield cell, failure
            finally:
                for process, _ in at_work.values():
                    process.terminate()  # it saves its run first
                for process in begun:
                    process.join()
            if caught:
                raise Interrupted(caught[0], self.file)

    # ---- what they say ----

    def rows(self) -> list[dict[str, Any]]:
        """For the base and each value of each axis: parameters, multiply-adds, accuracies of finished runs, images a second."""
        seeds = range(self.config.seed, self.config.seed + self.seeds)
        found = {}
        for name, config in self.configs.items():
            results = [self.result(Cell(name, seed, config)) for seed in seeds]
            accuracies = [result["accuracy"] for result in results if result]
            found[name] = {
                **self.counts[name],
                "runs": len(accuracies),
                "accuracy": statistics.fmean(accuracies) if accuracies else None,
                "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "accuracies": accuracies,
                "img_s": self.speeds.get(name),
            }
        rows = [{"axis": "base", "value": "", "table": "", "is_base": True, **found["base"]}]
        for name, values in self.grid.items():
            for value in values:
                is_base = not _sizes(name, value, self.base)
                own = found["base" if is_base else f"{name}-{value}"]
                rows.append({"axis": name, "value": value, "table": AXES[name].table, "is_base": is_base, **own})
        return rows

    def save(self) -> None:
        rows = self.rows()
        found = {"settings": asdict(self.config), "grid": self.grid, "seeds": self.seeds, "rows": rows, "failed": self.failed}
        write(self.file, (json.dumps(found, indent=1) + "\n").encode())
        columns = [column for column in rows[0] if column != "accuracies"]
        write(self.out / "ablation.csv", table(({column: row[column] for column in columns} for row in rows), columns))

    def _draw(self) -> str:
        from tnt_fast import visualize

        try:
            return f"picture: {visualize.ablation(self.rows(), self.out / 'ablation.png')}"
        except Exception as error:  # without matplotlib, say
            return f"no picture: {error}"

    def table(self) -> list[str]:
        """Lines."""
        lines = [
            f"{'axis':10s} {'value':>8s} {'table':>6s} {'parameters':>11s} {'M mult-adds':>12s} {'accuracy, %':>14s} "
            f"{'runs':>5s} {'img/s':>8s}"
        ]
        for row in self.rows():
            spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
            accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}"
            own = " =" if row["is_base"] and row["axis"] != "base" else ""
            speed = "" if row["img_s"] is None else f"{row['img_s']:,.0f}"
            lines.append(
                f"{row['axis']:10s} {row['value'] + own:>8s} {row['table']:>6s} {row['parameters']:11,} "
                f"{row['multiply_adds'] / 1e6:12.2f} {accuracy:>14s} {row['runs']:5d} {speed:>8s}"
            )
        return lines


def _model(config: Config, **others: Any) -> TNT:
    return create_tnt(config.model, device="meta", backend=config.backend, **{**config.model_kwargs, **others})


def speeds(models: Mapping[str, TNT], config: Config, rounds: int = 10) -> dict[str, float]:
    """Images a second in inference, of models (without values yet) that take turns: medians of their rounds."""
    device, threads = find_device(config.device), torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        times: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            model.to_empty(device=device).eval()
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.02)
            settle(model)
        with torch.inference_mode():
            for i in range(1 + rounds):
                for name, model in models.items():
                    image = torch.randn(TIMED, model.in_chans, *model.pixel_embed.img_size, device=device)
                    began = time.perf_counter()
                    model(image).sum().item()  # waits for the device
                    if i:
                        times[name].append(time.perf_counter() - began)
        return {name: TIMED / statistics.median(own) for name, own in times.items()}
    finally:
        torch.set_num_threads(threads)


def free_cores() -> int:
    """Those that this process may use, less those that are busy; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, cores - round(load))


# ---- one run, here or in a process of its own ----


def train_cell(config: Config, folder: Path) -> str:
    """Train one run to its end, from wherever it stands; returns why it failed, or nothing.

    Raises:
        Interrupted: it was saved.
    """
    try:
        run = Run(config, folder, resume=True, log=lambda line: None, progress=False)
        history = run.train()
        last = history[-1]
        found = {"accuracy": last["val_accuracy"], "epoch": last["epoch"], "seconds": sum(row["seconds"] for row in history)}
        write(folder / "result.json", json.dumps(found).encode())
        return ""
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError, MemoryError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _serve(pipe: Any) -> None:
    """Train what comes through the pipe, until that is None, or the process that began this one ends."""
    if hasattr(os, "setsid"):
        os.setsid()  # a terminal's Ctrl-C goes to the process that began this one, which then ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    ended = parent.sentinel

    def watch() -> None:
        connection.wait([ended])
        os.kill(os.getpid(), signal.SIGTERM)  # the run saves itself

    threading.Thread(target=watch, daemon=True).start()
    for config, folder in iter(pipe.recv, None):
        try:
            pipe.send(train_cell(config, folder))
        except Interrupted:
            return
