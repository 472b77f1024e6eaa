"""What a fused operation is given: tensors and numbers by name, their shapes, dtypes and limits, and what is wrong with them.

One description for all who ask: the operation's own errors, the model's reasons against the kernels, warnings and fallbacks. It
knows the twin in reference.py, whose arguments these are, and nothing of how a GPU computes it.
"""

import inspect
from collections.abc import Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tnt_fast.reference import by_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# the types of operations' arguments, as PyTorch calls them
SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", tuple[int, int]: "SymInt[]", int: "SymInt", float: "float", bool: "bool",
          str: "str"}  # fmt: skip
NAMES = {  # what a size is called, or a product of sizes
    "C": "C={} channels a pixel",
    "S": "S={} pixels a patch",
    "E": "E={} channels a patch",
    "D": "{} channels a head",
    "M": "{} hidden channels of the inner MLP",
    "channels": "{} channels of the image",
    "height": "an image of {} pixels' height",
    "width": "an image of {} pixels' width",
    "B*height*width": "{} pixels of all images",
    "B*N*S": "{} pixel tokens",
    "S*C": "S·C={} values a patch",
    "P*S": "{} pixels of all patches",
    "B*T": "{} tokens",
}
_LAYERS = {"norm1": "{0}", "qk": "2*{0} {0}", "v": "{0} {0}", "proj": "{0} {0}", "norm2": "{0}", "fc1": "M {0}", "fc2": "{0} M"}


def is_watched() -> bool:
    """Whether somebody looks at what is called: a mode, a trace, a transform."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def transformer_shapes(width: str) -> dict[str, str]:
    """Of ``reference.TransformerWeights`` over so many channels; a bias has a value for each row of its weight."""
    found: dict[str, str] = {}
    for name, shape in _LAYERS.items():
        found |= {f"{name}_weight": shape.format(width), f"{name}_bias": shape.format(width).split()[0]}
    return found


# of the weights that pixels are folded by; W: values of the first LayerNorm, S·C, or C (legacy)
FOLD_SHAPES = dict(norm1_weight="W", norm1_bias="W", proj_weight="E S*C", proj_bias="E", norm2_weight="E", norm2_bias="E")


class Argument(NamedTuple):
    """A tensor that an operation reads.

    ``shape`` names the size of each axis, as in "P S C", "2*C C" or "1 C 7 7"; the first tensor with a letter alone on an axis
    sets it, all others are held to it. ``optional``: None may stand for it. ``activation``: autocast casts it; one behind the
    first may have any of ``DTYPES``.
    """

    name: str
    shape: str
    optional: bool
    activation: bool


class Arguments:
    """Those of an operation's twin, as a subclass describes them."""

    twin: Any  # the function of reference.py, whose arguments are the operation's
    shapes: Mapping[str, str]  # of its tensors, by name
    activations: tuple[str, ...]  # the first names dtype and device of the computation
    together: tuple[tuple[str, ...], ...] = ()  # tensors that are given or left out together
    limits: Mapping[str, int]  # the most that the kernels take of what ``NAMES`` has

    def __init__(self) -> None:
        self.__signature__ = inspect.signature(self.twin)
        parameters = self.__signature__.parameters
        self.name = self.twin.__name__
        self.needed = tuple(name for name, p in parameters.items() if p.default is p.empty)
        self.defaults = {name: None if p.default is p.empty else p.default for name, p in parameters.items()}
        self.records = {name: p.annotation for name, p in parameters.items() if hasattr(p.annotation, "_fields")}
        self.kinds = by_name({  # types, records taken apart
            name: self.records[name](**self.records[name].__annotations__) if name in self.records else p.annotation
            for name, p in parameters.items()
        })  # fmt: skip
        self.schema = ", ".join(f"{SCHEMA[kind]} {name}" for name, kind in self.kinds.items())
        self.arguments = tuple(
            Argument(name, self.shapes[name], kind != Tensor, name in self.activations)
            for name, kind in self.kinds.items()
            if name in self.shapes
        )

    def numbers(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The sizes that arguments set which are no tensors, and reasons against those; by itself of heads and eps."""
        sizes, reasons = {}, []
        if "eps" in given and not isinstance(given["eps"], (int, float)):
            reasons.append(f"eps={given['eps']!r}; accepted: a number")
        if "num_heads" in given:
            sizes["H"] = heads = given["num_heads"]
            if not isinstance(heads, int) or heads < 1:
                reasons.append(f"num_heads={heads!r}; accepted: a positive integer that divides the channels")
        return sizes, reasons

    def unsupported(self, sizes: Mapping[str, Any]) -> list[str]:
        """Reasons against sizes, as ``TNT.sizes()`` names them or ``shapes`` and ``numbers``; some may be unknown."""
        if "num_heads" in self.defaults:
            width, H = self.shapes[self.activations[0]].split()[-1], sizes["H"]
            if sizes[width] % H:
                return [f"{H} heads do not divide {width}={sizes[width]}"]
            sizes = {**sizes, "D": sizes[width] // H}
        return beyond(self.limits, sizes)

    def gradients_unsupported(self, sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> list[str]:
        """Reasons why PyTorch computes the gradients of sizes that the forward takes."""
        return []

    def multiply_adds(self, a: SimpleNamespace) -> int:
        """Of the forward, from arguments of which the tensors are shapes."""
        raise NotImplementedError

    def backward_multiply_adds(self, a: SimpleNamespace) -> int:
        """Of the gradients; by itself the forward again, and a product for each side of every product."""
        return 3 * self.multiply_adds(a)

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All of a call's arguments by name, records taken apart.

        Raises:
            TypeError: one that is missing or unknown. ValueError: a number that is not accepted.
        """
        given = dict(zip(self.defaults, args, strict=False)) | dict(kwargs)
        missing = [name for name in self.needed if name not in given]
        unknown = [name for name in given if name not in self.defaults]
        if missing or unknown or len(args) + len(kwargs) != len(given):
            raise TypeError(f"{self.name}: arguments {missing} are missing, {unknown} unknown; it takes {list(self.defaults)}")
        given = by_name({name: given.get(name, default) for name, default in self.defaults.items()})
        if reasons := self.numbers(given)[1]:  # before the operation's schema, which says less
            raise ValueError(f"{self.name}: {'; '.join(reasons)}")
        return given

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments as the operation takes them.

        Activations in autocast's dtype where it is on; weights as they are, the kernels round them on loading.

        Raises:
            TypeError: what is no tensor; autocast is off, and the dtypes differ. ValueError: a needed one is None.
            NotImplementedError: a tensor carries a tangent of forward-mode differentiation or is a torch.func transform's.
        """
        for argument in self.arguments:
            x = given[argument.name]
            if x is None and not argument.optional:
                raise ValueError(f"{self.name}: {argument.name} is None; it is needed")
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"{self.name}: {argument.name} is a {type(x).__name__}; accepted: torch.Tensor")
        if not torch.compiler.is_compiling():
            tensors = [x for x in given.values() if isinstance(x, Tensor)]
            dual = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
            if dual or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
                raise NotImplementedError(
                    f"{self.name}: the kernels have no forward-mode derivatives and no batching rule (dual tensors, "
                    f"torch.func); take tnt_fast.reference.{self.name}, or a model with backend='reference'"
                )
        first = given[self.activations[0]]
        if torch.is_autocast_enabled(first.device.type):
            dtype = torch.get_autocast_dtype(first.device.type)  # autocast leaves float64 as it is
            for name in self.activations:
                if given[name] is not None and given[name].dtype in DTYPES:
                    given[name] = given[name].to(dtype)
        elif found := self.wrong_types(given, first.dtype, False):
            raise TypeError(f"{self.name}: {'; '.join(found)}")
        return given

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise unless the kernels take these arguments, by name; the weights may be float32, as under autocast.

        Raises:
            TypeError: a dtype. ValueError: a device, a shape, a number, a tensor that is missing; each with what is accepted.
        """
        first = given[self.activations[0]]
        if first.dtype in DTYPES and (found := self.elsewhere(first.device)):
            raise ValueError(f"{self.name}: {'; '.join(found)}")
        if found := self.wrong_types(given, first.dtype, autocast=True):
            raise TypeError(f"{self.name}: {'; '.join(found)}")
        if found := self.wrong_values(given, first.device):
            raise ValueError(f"{self.name}: {'; '.join(found)}")

    def elsewhere(self, device: torch.device) -> list[str]:
        """Reasons against a device."""
        raise NotImplementedError

    def wrong_types(self, given: Mapping[str, Any], dtype: torch.dtype, autocast: bool) -> list[str]:
        """Reasons against the dtypes of those tensors that are given, for a computation in ``dtype``."""
        first = self.activations[0]
        if dtype not in DTYPES:
            return [f"{first} is {dtype}; accepted: {', '.join(map(str, DTYPES))}"]
        found = []
        for name, _, _, mixed in self.arguments:  # two activations of two dtypes give a result in the wider one
            taken = DTYPES if mixed else (dtype, torch.float32) if autocast else (dtype,)
            if (tensor := given.get(name)) is not None and tensor.dtype not in taken:
                accepted = ", ".join(map(str, DTYPES)) if mixed else f"{dtype}, or torch.float32 under autocast"
                found.append(f"{name} is {tensor.dtype}, {first} is {dtype}; accepted: {accepted}")
        return found

    def wrong_values(self, given: Mapping[str, Any], device: torch.device, sizes: Mapping[str, int] | None = None) -> list[str]:
        """Reasons against all else that is given; without the activations, ``sizes`` holds their sizes."""
        first = self.activations[0]
        numbers, found = self.numbers(given)
        if found:
            return found
        sizes = {**(sizes or {}), **numbers}
        known = True
        for name, shape, optional, _ in self.arguments:
            if name not in given:
                continue
            tensor = given[name]
            if tensor is None:
                if not optional:
                    found.append(f"{name} is None; it is needed")
                    known = False
                continue
            if tensor.device != device:
                found.append(f"{name} is on {str(tensor.device)!r}, {first} on {str(device)!r}; move one")
            if tensor.layout != torch.strided:
                found.append(f"{name} is laid out as {tensor.layout}; accepted: torch.strided")
            axes, actual = shape.split(), tuple(tensor.shape)
            known = known and len(axes) == len(actual)
            if len(axes) == len(actual):
                for axis, size in zip(axes, actual, strict=True):
                    if axis.isalpha():
                        sizes.setdefault(axis, size)
            expected = tuple([_size(axis, sizes) for axis in axes])
            if actual != expected:
                found.append(f"{name} has shape {actual}; expected ({', '.join(map(str, expected))}{',' * (len(axes) == 1)})")
        for names in self.together:
            if len({given.get(name) is None for name in names}) > 1:
                found.append(f"{' and '.join(names)} are given or left out together")
        return self.unsupported(sizes) + found if known else found

    def packed(self, flat: Sequence[Any]) -> SimpleNamespace:
        """Arguments by the twin's names, records in one piece, from their flat sequence."""
        found, at = {}, 0
        for name in self.defaults:
            record = self.records.get(name)
            if record is None:
                found[name], at = flat[at], at + 1
            else:
                found[name], at = record(*flat[at : at + len(record._fields)]), at + len(record._fields)
        return SimpleNamespace(**found)


def beyond(limits: Mapping[str, int], sizes: Mapping[str, Any], what: str = "; accepted:") -> list[str]:
    """Reasons against sizes that are not from 1 to their limit, and products above it; what is not known has none."""
    found = []
    for name, most in limits.items():
        size, product = _size(name, sizes), "*" in name
        if isinstance(size, int) and not (0 if product else 1) <= size <= most:
            found.append(f"{NAMES[name].format(size)}{what} {'up' if product else '1'} to {most}")
    return found


def _size(axis: str, sizes: Mapping[str, int]) -> int | str:
    """The size that "C", "7" or "2*C" stands for; the text itself where a size is not known."""
    if axis in sizes:  # most are a letter, and a call asks for dozens
        return sizes[axis]
    factors = [int(factor) if factor.isdigit() else sizes.get(factor) for factor in axis.split("*")]
    return axis if None in factors else prod(factors)  # type: ignore[arg-type]
