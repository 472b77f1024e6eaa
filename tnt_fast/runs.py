"""The folder of a training run: one owner at a time, files that are written whole or not at all, and read back with checks.

=============  ==========================================================================================
last.pt        the whole state of the run: to continue it, or to classify with
last-…         a folder: weights and moments as several ranks save them together; last.pt then has the rest, and its name
best.pt        the weights of the epoch with the best held-out accuracy; ``epoch`` and ``accuracy`` say which
recipe.yaml    the settings, which --config reads
history.json   a row for each epoch, of its memory a number for each rank; history.csv is the same as a table
training.png   the same as a picture
.lock          while a process trains here: which, and on what host
=============  ==========================================================================================
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnt_fast import distributed
from tnt_fast.checkpoints import FORMAT, CheckpointError, read_checkpoint, save_checkpoint
from tnt_fast.distributed import ALONE, Ranks
from tnt_fast.writing import table, write

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

LAST, BEST, RECIPE, PICTURE, SHARDS = "last.pt", "best.pt", "recipe.yaml", "training.png", "last-"
NAMES = (LAST, BEST, RECIPE, "history.json", "history.csv", PICTURE)
COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second", "memory_mib", "changed")


class RunError(ValueError):
    """A folder that is no place for this run: another process trains there, or what it holds is in the way."""


class Folder:
    """The files of one run.

    Args:
        path: need not exist. log: called with a line of text.
    """

    def __init__(self, path: str | os.PathLike, log: Callable[[str], None]):
        self.path, self.log = Path(path), log
        self.last, self.best, self._lock = self.path / LAST, self.path / BEST, self.path / ".lock"
        self._known: tuple[int, ...] | None = None  # the last.pt that this process has read or written,
        self._shards: str | None = None  # and the folder that it names

    # ---- one owner at a time ----

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, see that files can be written there, and hold it alone.

        The lock is the system's (flock): it ends with its process, however that ends.

        Raises:
            RunError: another process trains here, or has written since ``read_last``; something is in the way.
            OSError: it cannot be written to.
        """
        self._look_for_obstacles()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = self._acquire(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise _failed(f"write in {str(self.path)!r}", error) from error
        _held.add(handle)
        try:
            if former := _owner(handle):
                self.log(f"taking over {str(self.path)!r} from {former!r}, which ended without giving it back")
            os.ftruncate(handle, 0)
            owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            os.pwrite(handle, owner.encode("utf-8", "replace"), 0)
            if self._stamp() != self._known:
                raise RunError(f"another run has written {str(self.last)!r} since it was read here; start again")
            for pattern in (f".tmp-*-{name}" for name in NAMES):  # a process was killed as it saved
                for left in self.path.glob(pattern):
                    left.unlink()
            self._remove_other_shards()
            yield
        finally:
            with contextlib.suppress(OSError):
                if self._is_lock(handle):
                    self._lock.unlink()
            _held.discard(handle)
            os.close(handle)

    def check_free(self) -> None:
        """Raise RunError if another process trains here; writes nothing."""
        self._look_for_obstacles()
        with contextlib.suppress(OSError):  # no lock, or none that may be opened, which locked() says better
            os.close(self._acquire(os.O_RDWR))

    def _look_for_obstacles(self) -> None:
        for name in NAMES:
            if (self.path / name).is_dir() and not (self.path / name).is_symlink():
                raise RunError(f"{str(self.path / name)!r} is a directory, where the run keeps a file; choose another --out")
        if os.path.lexists(self._lock) and (self._lock.is_symlink() or not self._lock.is_file()):
            raise RunError(f"{str(self._lock)!r} is no plain file, as the lock of a run is; remove it")

    def _acquire(self, flags: int) -> int:
        owner = ""
        for _ in range(4):  # another process may just be looking, or ending
            handle = os.open(self._lock, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
            if self._flock(handle) and self._is_lock(handle):
                return handle
            owner = _owner(handle)
            os.close(handle)
            time.sleep(0.05)
        raise RunError(
            f"{str(self.path)!r} is in use by {owner or 'another process'!r}: wait until it ends, or choose another --out"
        )

    def _flock(self, handle: int) -> bool:
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # a file system without locks
            self.log(f"{str(self.path)!r} cannot be locked ({error.strerror}); see that no other run writes there")
        return True

    def _is_lock(self, handle: int) -> bool:
        """Whether an open file still is the lock file, which its owner removes at its end."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._lock, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.last, follow_symlinks=False)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    # ---- writing ----

    def check_room(self, last: int, best: int) -> None:
        """Raise OSError unless both files, of so many bytes, can be replaced one after the other."""
        usage = shutil.disk_usage(self.path)
        need = 2 * last + best
        free = usage.free + sum(path.stat().st_size for path in (self.last, self.best) if path.is_file())
        if usage.total and free < need:
            raise OSError(
                f"{str(self.path)!r} has {free / 1e6:,.0f} MB for checkpoints that take {need / 1e6:,.0f} MB "
                "(a new one is written beside the old one); make room on the disk, or choose another --out"
            )

    def save_last(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises OSError; what was there before is whole then."""
        seals = {name: structure(value) for name, value in checkpoint.items()}
        try:
            self._write(LAST, lambda path: save_checkpoint({**checkpoint, "seals": seals}, path))
            self._known, self._shards = self._stamp(), checkpoint.get("shards", {}).get("folder")
        finally:
            self._remove_other_shards()

    def save_together(self, checkpoint: Mapping[str, Any], tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        """As ``save_last``, by several ranks: ``tensors`` go to a new folder. What last.pt names is there, and whole."""
        name = ranks.share(f"{SHARDS}{secrets.token_hex(6)}")
        try:
            shards = {"folder": name, "files": distributed.save(self.path / name, tensors, ranks)}
        except (OSError, RuntimeError) as error:
            if ranks.first:
                self._remove_other_shards()
            raise _failed(f"save {str(self.path / name)!r}", error, " What was there before is whole.") from error
        if ranks.first:
            self.save_last({**checkpoint, "shards": shards})

    def _remove_other_shards(self) -> None:
        for left in self.path.glob(f"{SHARDS}{'[0-9a-f]' * 12}"):
            if left.name != self._shards and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)

    def save_best(self, checkpoint: Mapping[str, Any]) -> None:
        """``checkpoint`` says of which ``epoch`` it is and how good (``accuracy``). Raises OSError, as ``save_last``."""
        self._write(BEST, lambda path: save_checkpoint(checkpoint, path))

    def save_recipe(self, text: str) -> None:
        """recipe.yaml. Raises OSError."""
        self._write(RECIPE, partial(write, content=text.encode("utf-8", "surrogateescape")))

    def save_history(self, history: Sequence[Mapping[str, Any]]) -> None:
        """history.json and history.csv. Raises OSError."""
        text = json.dumps(history, indent=1) + "\n"
        rows = [{**row, "memory_mib": " ".join(map(str, row.get("memory_mib", [])))} for row in history]
        for name, content in (("history.json", text.encode("utf-8")), ("history.csv", table(rows, COLUMNS))):
            self._write(name, partial(write, content=content))

    def _write(self, name: str, saving: Callable[[Path], Any]) -> None:
        try:
            saving(self.path / name)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError where a disk is full
            raise _failed(f"save {str(self.path / name)!r}", error, " What was there before is whole.") from error

    # ---- reading ----

    def read_last(self) -> dict[str, Any] | None:
        """The state that ``save_last`` wrote; None: there is none.

        Raises:
            CheckpointError: it is damaged, was changed since, or is no such file; the message has the way on.
            RunError: it was removed, and its best.pt is still there.
        """
        self._known = self._stamp()
        if not os.path.lexists(self.last):
            self._check_no_run_is_lost()
            return None
        if not self.last.is_file():
            raise CheckpointError(f"{str(self.last)!r} is a link to nothing, or no file; put it back, or choose another --out")
        try:
            saved = read_checkpoint(self.last)
        except CheckpointError as error:
            raise CheckpointError(f"{str(error).rstrip('.')}; it cannot be continued; {self.way_on(self.best)}") from error
        seals = saved.pop("seals", None)
        if saved.get("format") != FORMAT or not isinstance(seals, dict):
            raise CheckpointError(
                f"{str(self.last)!r} was not written by this version's 'tnt-fast train' and cannot be continued; "
                f"{self.way_on(self.last)}"
            )
        changed = sorted(str(name) for name in seals.keys() | saved.keys() if seals.get(name) != structure(saved.get(name)))
        if changed:
            raise CheckpointError(
                f"{str(self.last)!r} was changed since it was saved, in {', '.join(map(repr, changed[:5]))}, and cannot be "
                f"continued; {self.way_on(self.last)}"
            )
        if name := first_not_finite(saved):
            raise CheckpointError(
                f"{str(self.last)!r} is not finite in {name} and cannot be continued; {self.way_on(self.best)}"
            )
        self._shards = saved.get("shards", {}).get("folder")
        return saved

    def check_shards(self, shards: Mapping[str, Any], ranks: Ranks = ALONE) -> Path:
        """The folder that ``save_together`` wrote, its files held against what last.pt says of them.

        Raises:
            CheckpointError: it is gone or damaged.
        """
        folder = self.path / shards["folder"]
        try:
            found = distributed.digests(folder, sorted(shards["files"]), ranks)
        except OSError as error:
            raise CheckpointError(
                f"{str(folder)!r}, which {str(self.last)!r} names, cannot be read ({error.strerror}: {error.filename!r}); "
                f"put it back, or {self.way_on(self.last)}"
            ) from error
        if damaged := [name for name, about in shards["files"].items() if found[name] != list(about)]:
            raise CheckpointError(
                f"{str(folder / damaged[0])!r} is damaged and cannot be continued with; {self.way_on(self.last)}"
            )
        return folder

    def read_best(self) -> dict[str, Any]:
        """What ``save_best`` wrote.

        Raises:
            CheckpointError, FileNotFoundError: it is damaged, no such file, or gone.
        """
        saved = read_checkpoint(self.best)
        epoch, accuracy, state = (saved.get(name) for name in ("epoch", "accuracy", "state_dict"))
        if not isinstance(epoch, int) or not isinstance(accuracy, float) or not isinstance(state, Mapping):
            raise CheckpointError(f"{str(self.best)!r} does not say of which epoch it is, and how good")
        if name := first_not_finite(state):
            raise CheckpointError(f"{str(self.best)!r} is not finite in {name}")
        return saved

    def _check_no_run_is_lost(self) -> None:
        """Raise RunError where a run that begins would replace the best weights of another."""
        if not os.path.lexists(self.best):
            return
        with contextlib.suppress(CheckpointError, OSError):
            if self.read_best()["epoch"] == 1 and not (self.path / "history.json").exists():
                return  # of a run that was killed between its first two files
        raise RunError(
            f"{str(self.path)!r} holds the {BEST} of a run, but not its {LAST}, to continue it with; put it back, or "
            f"choose another --out ({self.way_on(self.best)})"
        )

    def way_on(self, weights: Path) -> str:
        """What to do where a run cannot be continued."""
        return f"--initial {str(weights)!r} --out NEW starts anew from {'its' if weights == self.last else 'the best'} weights"


# ---- a lock ends with the process that took it, not with the processes that it forked to read images ----

_held: set[int] = set()


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _owner(handle: int) -> str:
    return os.pread(handle, 200, 0).decode("utf-8", "replace")


# ---- damage ----


def structure(value: Any) -> str:
    """A digest of all keys, types and plain values of an entry of last.pt, and of the shapes and types of its tensors.

    It finds what is missing or was exchanged; read_checkpoint looks at the checksums of what the tensors hold.
    """

    def leaves(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, Tensor):
            yield f"{path}: {tuple(value.shape)} {value.dtype} {value.layout}"
        elif isinstance(value, Mapping):
            yield f"{path}: mapping"
            for key in sorted(value, key=repr):
                yield from leaves(value[key], f"{path}/{key!r}")
        elif isinstance(value, (list, tuple)):
            yield f"{path}: {type(value).__name__}"
            for i, item in enumerate(value):
                yield from leaves(item, f"{path}/{i}")
        else:
            yield f"{path}: {type(value).__name__} {value!r}"

    return hashlib.sha256("\n".join(map(ascii, leaves(value, ""))).encode()).hexdigest()


def first_not_finite(tensors: Any) -> str | None:
    """The name of the first tensor in nested dicts that holds a NaN or an infinity; one answer is waited for on each device."""
    named = dict(_floats(tensors, ""))
    for device in {value.device for value in named.values()}:
        names = [name for name, value in named.items() if value.device == device]
        finite = torch.stack([named[name].isfinite().all() for name in names])
        if not finite.all():
            return names[int(finite.int().argmin())]
    return None


def _floats(value: Any, path: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _floats(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield path, value


# ---- files ----


_MAY_NOT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _failed(what: str, error: BaseException, more: str = "") -> OSError:
    """The error for the user, with the remedy for its cause."""
    cause: BaseException | None = error
    while cause and not (isinstance(cause, OSError) and cause.errno):  # PyTorch's writer hides it
        cause = cause.__context__
    number = cause.errno if isinstance(cause, OSError) else errno.ENOSPC
    if number in _MAY_NOT:
        remedy = "This process may not write there: change the permissions, or choose another --out"
    elif number in _NO_ROOM:
        remedy = "Make room on the disk, then --resume"
    else:
        remedy = "When that is mended, --resume"
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
    kind = PermissionError if number in _MAY_NOT else OSError
    return kind(f"cannot {what}: {reason}.{more} {remedy}")
