"""Runs on several ranks without the seconds that each would take to import PyTorch: they are forked from one that has."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = ["tnt_fast.cli", "tnt_fast.kernels", "tnt_fast.train", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
PRELOADED += ["matplotlib.figure", "matplotlib.backends.backend_agg", "sklearn.datasets", "sklearn.model_selection"]
TIMEOUT = 120  # seconds, after which a rank is killed


@dataclass
class Ended:
    """How the ranks of a run ended: exit codes, what each printed, and the seconds that it took."""

    codes: list[int | None]
    out: list[str]
    err: list[str]
    seconds: float


def launch(
    folder: Path,
    argv: Sequence[str],
    size: int = 2,
    acts: Mapping[int, Sequence[Any]] | None = None,
    others: Mapping[int, Sequence[str]] | None = None,
) -> Ended:
    """``tnt-fast`` with these arguments on so many ranks, as a launcher starts them.

    Args:
        folder: for what they print.
        acts: rank: one of the functions below, by name, and its arguments; it is called first.
        others: rank: its arguments, where they are others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    acts, others = acts or {}, others or {}
    processes = [
        context.Process(target=_rank, args=(folder, list(others.get(rank, argv)), size, rank, port, acts.get(rank)))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, started + TIMEOUT - time.monotonic()))
    seconds = time.monotonic() - started
    for process in processes:
        process.kill()
        process.join()
    printed = {kind: [(folder / f"{kind}-{rank}").read_text() for rank in range(size)] for kind in ("out", "err")}
    return Ended([process.exitcode for process in processes], printed["out"], printed["err"], seconds)


def _rank(folder: Path, argv: list[str], size: int, rank: int, port: int, act: Sequence[Any] | None) -> None:
    for kind, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{kind}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    multiprocessing.set_start_method("fork", force=True)  # of readers, as where a launcher starts a rank
    sys.exit(run(argv, act))


def run(argv: list[str], act: Sequence[Any] | None) -> int:
    import torch

    from tnt_fast.cli import main

    torch.set_num_threads(1)
    if act:
        name, *arguments = act
        ACTS[name](*arguments)
    return main(argv)


# ---- what happens to a rank ----


def _at_loss(n: int, act: Callable[[], Any]) -> None:
    """``act`` before the nth loss; what it returns multiplies the loss."""
    from timm.loss import SoftTargetCrossEntropy

    forward, calls = SoftTargetCrossEntropy.forward, []

    def wrapped(module: Any, x: Any, target: Any) -> Any:
        calls.append(1)
        factor = act() if len(calls) == n else None
        return forward(module, x, target) * (1 if factor is None else factor)

    SoftTargetCrossEntropy.forward = wrapped  # type: ignore[method-assign]


def gets(signum: int, n: int) -> None:
    _at_loss(n, lambda: os.kill(os.getpid(), signum))


def is_killed_once(n: int) -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        gets(signal.SIGKILL, n)


def diverges(n: int) -> None:
    _at_loss(n, lambda: float("nan"))


def has_another_torch() -> None:
    from tnt_fast import distributed, train

    other = {**distributed.versions(), "torch": "0.0.1"}
    train.versions = lambda: other  # type: ignore[attr-defined]


def has_a_full_disk(n: int) -> None:
    """From the nth loss on: no file may be larger."""
    import resource

    limit = 1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    _at_loss(n, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


def cannot_commit(n: int) -> None:
    """From the nth loss on: what all ranks wrote is there, and then there is no room for last.pt."""
    from tnt_fast import runs

    save = runs.save_checkpoint

    def full(checkpoint: Any, path: Path) -> None:
        if path.name == "last.pt":
            raise OSError(28, "No space left on device", str(path))
        save(checkpoint, path)

    _at_loss(n, lambda: setattr(runs, "save_checkpoint", full))


def fails(n: int) -> None:
    def fail() -> None:
        raise ValueError("of this rank alone")

    _at_loss(n, fail)


def calls(module: str, function: str) -> None:
    getattr(importlib.import_module(module), function)()


ACTS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (calls, gets, is_killed_once, diverges, has_another_torch, has_a_full_disk, cannot_commit, fails)
}


if __name__ == "__main__":  # as torchrun starts it: rank: act, then the arguments
    acts, *arguments = sys.argv[1:]
    sys.exit(run(arguments, json.loads(acts).get(os.environ["RANK"])))
