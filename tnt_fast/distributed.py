"""One run on several processes, as torchrun starts them: who they are, how they wait, and how they end.

A rank that fails must not leave the others waiting for it. So each has a thread beside its run that tells the others, through
the store at which they met, that it lives, and hears from them. The first to fail says why; the first rank prints it, whoever
failed, and all end.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import Sampler

import tnt_fast
from tnt_fast.checkpoints import CheckpointError
from tnt_fast.dispatch import find_device
from tnt_fast.recipe import Config
from tnt_fast.terminal import say

BEAT = 1.0  # seconds between two signs of life
SILENT = 10  # beats without one, after which a rank is taken for dead;
SUSPECT = 5  # where a collective has failed, which it does if one is
GRACE = 5.0  # seconds that a rank has to end by itself, once one has failed
TIMEOUT = timedelta(hours=2)  # of a collective; data may be read for long by the first rank, while the others wait

T = TypeVar("T")


class RankError(RuntimeError):
    """Ranks that do not fit together, or one that is gone."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together; by default one alone, for which all of this does nothing."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among those of this machine

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def device(self, name: str) -> torch.device:
        """The device of a setting; of several GPUs each rank has its own.

        Raises:
            ValueError: there is none for this rank, or one was named for all.
        """
        device = find_device(name)
        if not self.several or device.type == "cpu":
            return device
        if device.index is not None:
            raise ValueError(f"device={name!r} is one for {self.size} ranks; leave its number out: each takes its own")
        if device.type != "cuda":
            raise ValueError(f"device={name!r} does not work with several ranks; accepted: cuda, cpu")
        count = torch.cuda.device_count()
        if self.local >= count:
            raise ValueError(
                f"rank {self.rank} is number {self.local + 1} on a machine with {count} GPUs; start with --nproc-per-node "
                f"{count}, or take --device cpu"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """The value of each rank."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def share(self, value: T) -> T:
        """The first rank's value."""
        if not self.several:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def add(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        if self.several:
            dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank goes through a block before the others: what it fetches, or finds out, is there for them."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    def compare(self, about: Mapping[str, Any]) -> None:
        """Raise RankError where a rank has another value than the first, by name, rank and value."""
        first, *others = self.gather(dict(about))
        for rank, values in enumerate(others, 1):
            for name in sorted(first.keys() | values.keys()):
                if first.get(name) != values.get(name):
                    raise RankError(
                        f"rank {rank} has {name}={values.get(name)!r:.200}, rank 0 {first.get(name)!r:.200}: "
                        "they must be the same"
                    )

    def check_sharding(self, config: Config) -> None:
        """Raise ValueError where ``fsdp`` does not go with the other settings."""
        if not config.fsdp:
            return
        if not self.several:
            raise ValueError("fsdp divides a model among ranks, and there is one; start with torchrun --nproc-per-node N")
        if config.amp == "float16":
            raise ValueError("amp='float16' scales the loss, which fsdp does not do; accepted with it: off, bfloat16")
        if config.compile:
            raise ValueError("compile and fsdp do not go together; leave one out")

    def shard(self, model: Any) -> None:
        """Keep a part of each weight on each rank (FSDP2), block by block; a block has all of its own while it computes."""
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)

    def parallel(self, model: nn.Module) -> nn.Module:
        """What to call in training in place of ``model``: gradients are averages over the ranks after a backward."""
        if is_sharded(model):
            return model
        # the class token's gradient is a slice
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        return DDP(model, gradient_as_bucket_view=True) if self.several else model

    def adding_up(self, parallel: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        """Where a step's backwards run: only the last one's gradients, which hold those before, are averaged."""
        if is_sharded(parallel):
            cast(Any, parallel).set_requires_gradient_sync(last)
        return parallel.no_sync() if isinstance(parallel, DDP) and not last else contextlib.nullcontext()


ALONE = Ranks()


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def own(tensors: Any) -> Any:
    """Of sharded tensors in nested dicts what this rank has."""
    if isinstance(tensors, Mapping):
        return {key: own(value) for key, value in tensors.items()}
    return tensors.to_local() if isinstance(tensors, DTensor) else tensors


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with its sharded tensors put together, on the CPU; all ranks take part."""
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in state.items()}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of a parameter's shape, sharded as that is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def versions() -> dict[str, str]:
    """What all ranks must have the same of."""
    return {package: metadata.version(package) for package in ("torch", "timm")} | {"tnt_fast": tnt_fast.__version__}


class Share(Sampler):
    """What a rank reads of an order of images: of batches in turn each its own, as many as all ranks have, in whole steps.

    Args:
        order: of all images, from ``order.start`` batches on. accumulate: batches of a rank in a step.
    """

    def __init__(self, order: Any, ranks: Ranks, accumulate: int):
        self.order, self.ranks, self.accumulate = order, ranks, accumulate

    def __iter__(self) -> Iterator[int]:
        size, images = self.order.batch_size, list(self.order)
        for start in range(self.ranks.rank * size, len(self) * self.ranks.size, self.ranks.size * size):
            yield from images[start : start + size]

    def __len__(self) -> int:
        step = self.order.batch_size * self.accumulate
        return len(self.order) // (step * self.ranks.size) * step


# ---- what all ranks save together ----


def save(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list]:
    """Write tensors, sharded or the same on all ranks, into a new folder (torch.distributed.checkpoint), each rank a part.

    Returns:
        Name: [bytes, digest] of each of its files.

    Raises:
        OSError, RuntimeError: on all ranks, where one could not write.
    """
    from torch.distributed import checkpoint

    try:
        checkpoint.save(dict(tensors), storage_writer=checkpoint.FileSystemWriter(folder))
    except checkpoint.CheckpointException as failed:
        raise _cause(failed) from None
    return digests(folder, ranks.share(sorted(path.name for path in folder.iterdir())), ranks)


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read what ``save`` wrote into tensors of the same names and sizes, however they are sharded now; executes no pickle.

    Raises:
        CheckpointError: it is damaged, or does not hold them.
    """
    from torch.distributed import checkpoint

    sizes(folder)  # else its errors are lost
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a process alone is told so
            checkpoint.load(dict(tensors), storage_reader=_reader(folder), no_dist=not dist.is_initialized())
    except checkpoint.CheckpointException as failed:
        error = _cause(failed)
        raise CheckpointError(f"{str(folder)!r} cannot be read: {str(error) or type(error).__name__:.300}") from None


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Of all tensors in such a folder. Raises CheckpointError."""
    found = _reader(folder).read_metadata().state_dict_metadata
    return {name: (about.size, about.properties.dtype) for name, about in found.items()}


def digests(folder: Path, names: Iterable[str], ranks: Ranks) -> dict[str, list]:
    """Name: [bytes, digest] of files, of which each rank reads some. Raises OSError."""
    mine = {}
    for name in list(names)[ranks.rank :: ranks.size]:
        digest = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while part := file.read(2**24):
                digest.update(part)
            mine[name] = [file.tell(), digest.hexdigest()]
    return {name: about for some in ranks.gather(mine) for name, about in some.items()}


def _cause(failed: Any) -> BaseException:
    """The first rank's error of PyTorch's exception for all."""
    return min(failed.failures.items())[1][0]


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader, Metadata
    from torch.distributed.checkpoint import metadata as kinds

    class Unpickler(pickle.Unpickler):
        """PyTorch pickles the list of what is in a folder; this makes that list, and nothing else."""

        def find_class(self, module: str, name: str) -> Any:
            known = {
                "torch": ("Size",),
                "torch.serialization": ("_get_layout",),
                "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
                "torch.distributed.checkpoint.metadata": (*kinds.__all__, "_MEM_FORMAT_ENCODING"),
                "pathlib": ("PosixPath", "WindowsPath"),
                "pathlib._local": ("PosixPath", "WindowsPath"),
            }
            if name in known.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
                return super().find_class(module, name)
            raise CheckpointError(f"it names {module}.{name}, which a list of tensors does not")

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            try:
                with open(folder / ".metadata", "rb") as file:
                    found = Unpickler(file).load()
                wrong = {type(about).__name__ for about in found.state_dict_metadata.values()} - {"TensorStorageMetadata"}
                if not isinstance(found, Metadata) or wrong:  # a pickle, say, which PyTorch would execute
                    raise CheckpointError(f"it holds {', '.join(wrong) or type(found).__name__}")
                found.storage_meta = found.storage_meta or kinds.StorageMeta()
                found.storage_meta.load_id = self.load_id
                return found
            except Exception as error:
                raise CheckpointError(f"{str(folder / '.metadata')!r} cannot be read: {str(error):.300}") from error

    return Reader(folder)


# ---- beginning and end ----


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several ranks."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"


def is_restarted() -> bool:
    """Whether torchrun started the ranks again, after one had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextlib.contextmanager
def joined(told: Callable[[BaseException, str], tuple[list[str], int]]) -> Iterator[Ranks]:
    """The ranks that a launcher started, this process among them; without one this process alone.

    Within, only the first rank's output is seen. Where a rank fails, the first one prints why, whichever it was, and all end
    with SystemExit; so they do where a rank was killed. Alone, errors are raised as ever.

    Args:
        told: of an error, and of a rank in words: the lines to print, and the exit status.

    Raises:
        RankError: they could not meet.
    """
    if not is_launched():
        yield ALONE
        return
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {ranks.rank} cannot reach the others: {str(error).splitlines()[0]}") from error
    store = dist.PrefixStore(f"tnt_fast/{restarts}", store)
    watch = _Watch(cast(Any, store).clone(), ranks)
    try:
        with _muted(not ranks.first):
            # on the CPU, too: for what the ranks say to each other, whatever they train on
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=TIMEOUT)
            watch.all_there = True
            yield ranks
            ranks.barrier()
    except (Exception, KeyboardInterrupt) as error:
        for signum in (signal.SIGTERM, signal.SIGINT):  # torchrun's, after a rank was killed: first it is said which
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signum, signal.SIG_IGN)
        raise SystemExit(watch.failed(error, *told(error, "" if ranks.first else f"rank {ranks.rank}: "))) from error
    watch.end()
    dist.destroy_process_group()


@contextlib.contextmanager
def _muted(yes: bool) -> Iterator[None]:
    if not yes:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


# what collectives raise where another rank is gone
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed out|[Ss]ocket")


class _Watch(threading.Thread):
    """A thread beside the run. It tells the other ranks that this one lives, and ends this one where another has failed."""

    def __init__(self, store: Any, ranks: Ranks):
        super().__init__(daemon=True, name="watch")
        self.all_there = False  # before, silence means nothing
        self._store, self._ranks, self._stderr = store, ranks, sys.stderr
        self._ended, self._telling = threading.Event(), threading.Lock()
        self._beats, self._silence = 0, SILENT
        self._heard = {rank: ("", 0) for rank in (range(1, ranks.size) if ranks.first else (0,))}  # last beat, looks since
        self._told: dict[str, Any] | None = None  # the failure that ends all, once it is printed
        store.set(f"who/{ranks.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._beat()
        self.start()

    def end(self) -> None:
        """This rank is done, and well."""
        self._ended.set()
        self.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"beat/{self._ranks.rank}", "done")

    def failed(self, error: BaseException, lines: list[str], status: int) -> int:
        """The exit status, once the first of all failures is printed. From there the process has ``GRACE`` seconds to end."""
        if _LOST.search(str(error)):  # another rank is gone; one of those that look will know which
            self._silence = SUSPECT
            self._waited((SILENT + 4) * BEAT, self._cause)
        elif not self._ranks.first:
            time.sleep(BEAT / 2)  # where all have the same error, it is the first one's
        return self._tell({"lines": lines, "status": status})["status"]

    def run(self) -> None:
        cause = None
        while not cause and not self._ended.wait(BEAT):
            try:
                self._beat()
                cause = self._cause() or (self._silent() if self.all_there else None)
            except RuntimeError as error:
                text = f"rank {self._ranks.rank} lost the place where the ranks meet: {str(error).splitlines()[0]}"
                cause = {"lines": [f"tnt-fast: RankError: {text}"], "status": 1}
        if cause and not self._ended.is_set():
            status = self._tell(cause)["status"]
            if not self._ended.wait(GRACE):  # blocked in a collective, say
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(status)

    def _tell(self, cause: dict[str, Any]) -> dict[str, Any]:
        """See that the first failure of any rank is printed, by the first rank; if that does not, by another. Returns it."""
        with self._telling:
            if self._told:
                return self._told
            me = str(self._ranks.rank)
            try:
                cause = json.loads(self._store.compare_set("failed", "", json.dumps(cause)))
                mine = self._ranks.first or not self._waited(3 * BEAT, lambda: self._store.check(["told"]))
                mine = mine and self._store.compare_set("told", "", me).decode() == me
            except RuntimeError:  # the store is gone, and whoever had it
                mine = True
            if mine:
                with contextlib.redirect_stderr(self._stderr):
                    for line in cause["lines"]:
                        say(line, error=True)
            self._told = cause
            with contextlib.suppress(RuntimeError):
                self._store.set(f"left/{me}", "1")
                if self._ranks.first:  # where this process has the store, the others still ask there
                    self._waited(2 * BEAT, lambda: self._store.check([f"left/{rank}" for rank in range(self._ranks.size)]))
            return cause

    def _cause(self) -> dict[str, Any] | None:
        """The first failure of any rank."""
        return self._told or (json.loads(self._store.get("failed")) if self._store.check(["failed"]) else None)

    def _waited(self, seconds: float, whether: Callable[[], Any]) -> bool:
        deadline = time.monotonic() + seconds
        while not (found := whether()) and time.monotonic() < deadline:
            time.sleep(BEAT / 10)
        return bool(found)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._ranks.rank}", str(self._beats))

    def _silent(self) -> dict[str, Any] | None:
        """A failure that this rank found: another gives no sign of life."""
        for rank, (last, looks) in self._heard.items():
            beat = self._store.get(f"beat/{rank}").decode()
            self._heard[rank] = (beat, looks + 1 if beat == last != "done" else 0)
            if looks >= self._silence:
                who = self._store.get(f"who/{rank}").decode()
                text = f"rank {rank} ({who}) is gone: killed, perhaps for want of memory; continue with --resume"
                return {"lines": [f"tnt-fast: RankError: {text}"], "status": 1}
        return None
