"""Reading files of weights that strangers wrote: what a file declares is held against its own size before anything is built.

PyTorch's files are a pickled program beside raw numbers. ``torch.load(weights_only=True)`` executes no foreign code, but it
builds what the program asks for: 4 GiB from a file of 300 bytes, tensors of 2^40 elements, tuples so deep that hashing one ends
the process. So the program is first run on stand-ins (``_outline``), with plain containers and declared tensors only, and
PyTorch reads what passed.
"""

import argparse
import json
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import safetensors.torch
import torch
from torch import Tensor

LONGEST_MESSAGE = 2000  # characters
MOST_STRUCTURE = 4 * 2**20  # bytes of what is not numbers; a TNT-B with optimizer and averages has 0.3 MiB
MOST_CONTAINERS = 250_000
DEEPEST = 50
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # as Hugging Face lays out a model, beside config.json


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or whose contents do not fit the model; at most 2,000 characters."""

    def __init__(self, message: str):
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - 503]} … {message[-500:]}"
        super().__init__(message)


def shown(name: Any) -> str:
    """A key or name of a file for a message: short, on one line, without control characters."""
    text = str(name) if isinstance(name, str | int) else type(name).__name__
    text = text if len(text) <= 80 else f"{text[:60]}…{text[-16:]} ({len(text):,} characters)"
    return text if text.isprintable() else repr(text)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of ``torch.save``, a safetensors file or a Hugging Face folder onto the CPU; nothing in it is executed.

    What comes back consists of plain dicts, lists, tuples, numbers, strings and tensors. It takes memory and time of a small
    multiple of the file's size, whatever the file declares.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        CheckpointError: truncated, of another format, without a dict at the top, of impossible sizes, or in need of executing
            pickled code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {str(path)!r}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        what = f"{str(path)!r} ({size:,} bytes)"
        try:
            start = file.read(9)
            file.seek(0)
            if path.suffix == ".safetensors" or (start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size):
                return _read_safetensors(path, start, size)
            _check_torch_file(file, start, size)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training checkpoints hold their arguments
                checkpoint = _plain(torch.load(file, map_location="cpu", weights_only=True), {})
        except _ForeignError as error:
            raise CheckpointError(
                f"{what} is refused: it holds more than weights ({error}), and loading it could execute code. tnt_fast reads "
                "weights only. From a source that you trust, load it yourself and save model.state_dict() to a new file."
            ) from error
        except _DeclaredError as error:
            raise CheckpointError(f"{what} is refused: {error}; no file of weights does that. Fetch it again.") from error
        except Exception as error:  # readers that are fed foreign bytes raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{what} is no readable file of torch.save or safetensors: {reason[:300]}. It may be truncated; fetch it again."
            ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(checkpoint).__name__}; expected a dict of tensors")
    return checkpoint


def _read_folder(path: Path) -> dict[str, Any]:
    found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no checkpoint file at {str(path)!r}: a folder, without {' or '.join(IN_FOLDERS)} in it")
    checkpoint = read_checkpoint(found[0])
    return (
        {"config": read_config(path / "config.json"), "state_dict": checkpoint}
        if (path / "config.json").is_file()
        else checkpoint
    )


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Hugging Face's config.json, which names the model.

    Raises:
        CheckpointError: it is none.
    """
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read(2**20))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is no readable config.json: {type(error).__name__}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(config).__name__}; expected the settings of a model by name")
    return config


def _read_safetensors(path: Path, start: bytes, size: int) -> dict[str, Any]:
    if size < 9:
        raise ValueError(f"a safetensors file has at least 9 bytes, not {size}")
    header = int.from_bytes(start[:8], "little")
    if header > min(size - 8, MOST_STRUCTURE):
        raise _DeclaredError(f"it declares a header of {header:,} bytes")
    return safetensors.torch.load_file(path)  # which holds shapes and offsets against the size


# ---- files of torch.save ----


class _ForeignError(Exception):
    """Something else than weights."""


class _DeclaredError(Exception):
    """Something that the file's size does not bear."""


class _Name(str):
    """A class or function that the program names."""


class _Open(dict):
    """An object that takes attributes."""


class _Storage(NamedTuple):
    elements: int
    itemsize: int


class _Declared(NamedTuple):
    """A tensor."""

    elements: int


def _refuse(text: str) -> NoReturn:
    raise _DeclaredError(text)


def _check_torch_file(file: BinaryIO, start: bytes, size: int) -> None:
    """Raise unless PyTorch can be let at the file."""
    if start.startswith(b"PK\x03\x04"):
        root, length = _outline_of_zip(file, size)
    elif start.startswith(b"\x80"):
        root, length = _outline_of_old_format(file, size)
    else:
        raise ValueError("it begins like neither")
    _check_structure(root, 10_000 + length)


def _outline_of_zip(file: BinaryIO, size: int) -> tuple[Any, int]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries.values())
        if not stored or len(entries) != len(archive.infolist()) or sum(e.file_size for e in entries.values()) > size:
            _refuse("its zip entries are compressed, doubled, or larger than the file")
        for entry in entries.values():
            if entry.CRC:  # 0: written without; torch.load does not look at them
                with archive.open(entry) as content:
                    while content.read(2**20):
                        pass
    programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise ValueError("it is a zip archive without data.pkl")
    entry, folder = entries[programs[0]], programs[0].removesuffix("data.pkl")
    if entry.file_size > MOST_STRUCTURE:
        _refuse(f"what it holds beside numbers takes {entry.file_size:,} bytes")
    file.seek(entry.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # past its name and extra field

    def stored_bytes(key: str) -> int:
        if (found := entries.get(f"{folder}data/{key}")) is None:
            raise ValueError(f"the numbers {shown(key)} are missing")
        return found.file_size

    return _outline(BytesIO(file.read(entry.file_size)), stored_bytes), entry.file_size


MAGIC = 0x1950A86A20F9469CFC6C


def _outline_of_old_format(file: BinaryIO, size: int) -> tuple[Any, int]:
    """Before PyTorch 1.6: a magic number, a version, the machine, the program, the keys of its storages, their numbers."""
    start = BytesIO(file.read(MOST_STRUCTURE))
    declared: dict[str, int] = {}
    if _outline(start, None) != MAGIC:
        raise ValueError("it is a pickled object, but none of torch.save")
    for _ in range(2):
        _outline(start, None)
    root = _outline(start, declared)
    keys = _outline(start, None)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(declared):
        raise ValueError("the numbers that it lists are not those that it uses")
    if start.tell() + sum(8 + length for length in declared.values()) > size:
        _refuse("it declares more numbers than it has bytes")
    return root, start.tell()


_ITEMSIZE = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip
_STORAGES = {f"torch {name}Storage": itemsize for name, itemsize in _ITEMSIZE.items()}
_DTYPES = {f"torch {name}" for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"
)}  # fmt: skip
_NOT_WEIGHTS = {
    "_rebuild_qtensor": "a quantised tensor", "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, without numbers", "_rebuild_tensor_v3": "a tensor of an uncommon dtype",
}  # fmt: skip
_ATOMS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 16 or not all(type(n) is int and n >= 0 for n in value):
        _refuse("a tensor has a shape or strides that are none")
    return value


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, more: Any = None
) -> _Declared:
    shape, stride = _sizes(shape), _sizes(stride)
    if not isinstance(storage, _Storage) or len(stride) != len(shape) or more:
        _refuse("a tensor is none")
    elements, last = 1, _sizes((offset,))[0]
    for length, step in zip(shape, stride, strict=True):
        elements *= length
        last += (length - 1) * step
    if elements and (elements > storage.elements or last >= storage.elements):
        _refuse(f"a tensor declares {elements:,} elements over {storage.elements:,} stored ones")
    return _Declared(elements)


def _parameter(data: Any, *rest: Any) -> Any:
    return data if isinstance(data, _Declared) else _refuse("a parameter is none")


def _mapping(pairs: Any = ()) -> _Open:
    found = _Open()
    _set_items(found, [x for pair in pairs for x in pair])
    return found


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "collections OrderedDict": _mapping,
    "collections Counter": lambda counts: _mapping(dict.items(counts)),  # of a list it would hash what is in it
    "torch Size": lambda sizes: tuple(sizes),
    "torch device": lambda *where: str(where),
    "_codecs encode": lambda text, encoding: text.encode("latin1") if encoding == "latin1" else _refuse("it encodes a text"),
    "__builtin__ set": lambda items: [x for x in items if _is_key(x) or _refuse("a set holds more than names")],
}
_NEW = {"argparse Namespace", "collections OrderedDict"}
_NAMES = {*_STORAGES, *_DTYPES, *_CALLS, *_NEW}


def _is_key(value: Any) -> bool:
    """Others are slow to hash on purpose, or so deep that hashing them overflows the stack."""
    return value is None or (isinstance(value, str | int | bytes) and not isinstance(value, _Name))


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        _refuse("a dict is none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not _is_key(key):
            _refuse(f"a dict has a {type(key).__name__} as a key")
        target[key] = value


def _call(function: Any, args: Any) -> Any:
    if function not in _CALLS or not isinstance(args, tuple):
        raise _ForeignError(f"a call of {shown(function)}")
    return _CALLS[function](*args)


def _outline(program: BinaryIO, storages: Callable[[str], int] | dict[str, int] | None) -> Any:
    """Run a program of pickle, as far as ``torch.save`` uses the language, on stand-ins.

    Args:
        storages: how many bytes those of a key have; a dict to collect what is declared; None: there are none.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    containers = 0
    argument: Any
    for op, argument, _ in pickletools.genops(program):
        name = op.name
        if name in _ATOMS:
            if name == "LONG1" and argument.bit_length() > 64 and argument != MAGIC:
                _refuse("it holds a number of more than 64 bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            if argument not in _NAMES:
                raise _ForeignError(_NOT_WEIGHTS.get(argument.split()[-1], shown(argument.replace(" ", "."))))
            stack.append(_Name(argument))
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, below.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "APPENDS":
                cast(list, stack[-1]).extend(items)
            else:
                _set_items(stack[-1], items)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "SETITEM":
            items = stack[-2:]
            del stack[-2:]
            _set_items(stack[-1], items)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else [] if name == "EMPTY_LIST" else ())
        elif name == "REDUCE":
            args = stack.pop()
            stack[-1] = _call(stack[-1], args)
        elif name == "NEWOBJ":
            args = stack.pop()
            if stack[-1] not in _NEW or args != ():
                raise _ForeignError(f"an object of {shown(stack[-1])}")
            stack[-1] = _Open()
        elif name == "BUILD":  # attributes: of a Namespace its values; of a state dict its versions, which are left out
            state = stack.pop()
            if not isinstance(stack[-1], _Open) or not isinstance(state, dict):
                raise _ForeignError(f"the state of a {type(stack[-1]).__name__}")
            _set_items(stack[-1], [x for pair in state.items() for x in pair])
        elif name == "BINPERSID":
            stack[-1] = _storage(stack[-1], storages)
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO" or argument != 2:
            raise _ForeignError(f"pickle's {name}")
        containers += name in ("EMPTY_DICT", "EMPTY_LIST", "TUPLE", "REDUCE", "NEWOBJ", "MARK") or name in _TUPLES
        if containers > MOST_CONTAINERS or program.tell() > MOST_STRUCTURE:
            _refuse(
                f"what it holds beside numbers is more than {MOST_CONTAINERS:,} lists and dicts, or {MOST_STRUCTURE:,} bytes"
            )
    raise ValueError("it ends too early")


def _storage(declared: Any, storages: Callable[[str], int] | dict[str, int] | None) -> _Storage:
    if storages is None or not isinstance(declared, tuple) or len(declared) not in (5, 6) or any(declared[5:]):
        raise ValueError("its numbers are not where they belong")
    kind, dtype, key, location, elements = declared[:5]
    if kind != "storage" or dtype not in _STORAGES or not isinstance(key, str) or not isinstance(location, str):
        raise ValueError("its numbers are of no known kind")
    storage = _Storage(_sizes((elements,))[0], _STORAGES[dtype])
    length = storage.elements * storage.itemsize
    if (storages.setdefault(key, length) if isinstance(storages, dict) else storages(key)) != length:
        _refuse(f"the numbers {shown(key)} are said to take {length:,} bytes and do not")
    return storage


def _check_structure(root: Any, most: int) -> None:
    """Raise where a container holds itself, is very deep, or stands, written out, for much more than the program."""
    found: dict[int, tuple[int, int]] = {}  # of each container, by identity: entries written out, depth
    inside: set[int] = set()

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if isinstance(value, _Declared) or not isinstance(value, dict | list | tuple):
            return 1, 0
        name = id(value)
        if name not in found:
            if name in inside or depth > DEEPEST:
                _refuse(f"a dict or list in it holds itself, or is more than {DEEPEST} deep")
            inside.add(name)
            parts = [measure(x, depth + 1) for x in (value.values() if isinstance(value, dict) else value)]
            inside.discard(name)
            found[name] = 1 + sum(entries for entries, _ in parts), 1 + max((below for _, below in parts), default=0)
        return found[name]

    entries, depth = measure(root, 0)
    if depth > DEEPEST or entries > most:
        _refuse(f"its lists and dicts stand for {entries:,} entries, {depth} deep")


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Without the classes and attributes that a file may give to containers and tensors."""
    if isinstance(value, Tensor):
        return Tensor.detach(value)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {key: _plain(x, done) for key, x in dict.items(value)}
        else:
            items = [_plain(x, done) for x in value]
            done[id(value)] = tuple(items) if isinstance(value, tuple) else items
    return done[id(value)]
