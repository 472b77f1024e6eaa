"""Where a run's history goes, epoch by epoch, beside its own folder: TensorBoard, Weights & Biases."""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnt_fast.recipe import Config
from tnt_fast.writing import write

Row = Mapping[str, Any]


def check_packages(config: Config) -> None:
    """Raise ImportError where what the settings ask for is not installed."""
    try:
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        if config.wandb:
            import wandb  # noqa: F401
    except ImportError as error:
        name = "wandb" if "wandb" in str(error) else "tensorboard"
        raise ImportError(f"--{name} needs one more package ({error}): pip install {name}") from error


@contextlib.contextmanager
def recorded(config: Config, out: Path, epochs: int, log: Callable[[str], None]) -> Iterator[Callable[[Row], None]]:
    """What takes a row of the history, of a run that has trained so many epochs before.

    One that fails is told and gets no more; it ends no run.

    Raises:
        RuntimeError: Weights & Biases does not take the run, before its first epoch.
    """
    with contextlib.ExitStack() as stack:
        receivers: dict[str, Callable[[dict[str, float], int], None]] = {}
        if config.tensorboard:
            receivers["tensorboard"] = stack.enter_context(_tensorboard(out, epochs))
        if config.wandb:
            receivers["wandb"] = stack.enter_context(_wandb(config, out))

        def record(row: Row) -> None:
            values = {name: value for name, value in row.items() if name not in ("epoch", "changed")}
            values["memory_mib"] = max(row["memory_mib"])  # of the rank that has most
            for name, receive in list(receivers.items()):
                try:
                    receive(values, row["epoch"])
                except Exception as error:  # of whatever library it takes
                    del receivers[name]
                    log(f"--{name} failed in epoch {row['epoch']} and gets no more of this run: {error}")

        yield record


@contextlib.contextmanager
def _tensorboard(out: Path, epochs: int) -> Iterator[Callable[[dict[str, float], int], None]]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard"), purge_step=epochs + 1) as events:

        def receive(values: dict[str, float], epoch: int) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, epoch)
            events.flush()

        yield receive


@contextlib.contextmanager
def _wandb(config: Config, out: Path) -> Iterator[Callable[[dict[str, float], int], None]]:
    import wandb

    folder = out / "wandb"  # its own name for where it keeps what it has not sent
    folder.mkdir(exist_ok=True)
    if not (folder / "id").exists():
        write(folder / "id", secrets.token_hex(4).encode())
    name = (folder / "id").read_text("utf-8").strip()
    try:
        run = wandb.init(project=config.wandb, dir=str(out), name=out.name, id=name, resume="allow", config=asdict(config))
    except Exception as error:  # no key, no network, no such project
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"--wandb {config.wandb}: Weights & Biases does not take the run ({reason}); see 'wandb login', or set "
            "WANDB_MODE=offline and 'wandb sync' it later"
        ) from error
    ended = 1
    try:
        yield lambda values, epoch: run.log(values, step=epoch)
        ended = 0
    finally:
        run.finish(exit_code=ended)
