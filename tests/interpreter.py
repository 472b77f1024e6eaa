"""Triton's interpreter without what it does anew at every call of a function: of kernels of many small ones, most of the time.

It computes the same. These are its own parts, of no public interface: where one is not there, it stays as it is.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from triton.language import core, semantic
from triton.runtime import interpreter


class _Kept:
    """What is patched once stays so; no kernel is compiled in a process that interprets them."""

    def restore(self) -> None:
        pass


def _patched_once(patch: Callable) -> Callable:
    """``patch`` looks at every member of the language, of what a function's globals see of it, and gives it another meaning."""
    known: dict[int, dict] = {}  # the globals themselves: their addresses are not used again

    @wraps(patch)
    def once(function: Any) -> _Kept:
        scope = function.__globals__
        if id(scope) not in known:
            patch(function)
            known[id(scope)] = scope
        return _Kept()

    return once


def _by_name(get: Callable) -> Callable:
    """``get`` makes a table of all types for each type that is looked up in it."""
    known: dict[str, Any] = {}

    @wraps(get)
    def found(type_: Any) -> Any:
        if type_.name not in known:
            known[type_.name] = get(type_)
        return known[type_.name]

    return found


def _directly(unwrap: Callable) -> Callable:
    """``unwrap`` makes a tuple first, which names the types of its values."""

    @wraps(unwrap)
    def sizes(shape: Any) -> list:
        shape = shape.value if isinstance(shape, core.constexpr) else shape
        return [size.value if isinstance(size, core.constexpr) else size for size in shape]

    return sizes


def _remembered(make: Callable) -> Callable:
    """``make`` names the types of a shape's sizes, of which there are few."""
    known: dict[tuple, Any] = {}

    @wraps(make)
    def found(values: Any, *fields: Any) -> Any:
        if fields or not all(type(x) is core.constexpr and type(x.value) is int for x in values):
            return make(values, *fields)
        sizes = tuple(x.value for x in values)
        if sizes not in known:
            known[sizes] = make(values)
        return known[sizes]

    return found


def _by_sizes(init: Callable) -> Callable:
    """Of a tensor: ``init`` makes the same two of each shape."""
    known: dict[tuple, tuple] = {}

    @wraps(init)
    def made(self: Any, handle: Any, type: Any) -> None:
        sizes = (*type.shape,) if type.is_block() else ()
        if sizes in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = known[sizes]
            return
        init(self, handle, type)
        if {*vars(self)} == {"handle", "type", "dtype", "numel", "shape"}:
            known[sizes] = self.numel, self.shape

    return made


def _by_element(init: Callable) -> Callable:
    """Of a block's type: ``init`` writes its name and looks at its sizes."""
    known: dict[tuple, dict] = {}

    @wraps(init)
    def made(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        key = type(element_ty), element_ty.name, getattr(element_ty, "address_space", None), sizes
        if key not in known:
            init(self, element_ty, shape)
            known[key] = {**vars(self)}
        vars(self).update(known[key])

    return made


def _at_once(unwrap: Callable) -> Callable:
    """``unwrap`` asks first for what is rare."""
    rare = (list, tuple, core.tuple) if hasattr(core, "tuple") else (list, tuple)

    @wraps(unwrap)
    def unwrapped(x: Any) -> Any:
        if isinstance(x, core.constexpr):
            return x.value
        return unwrap(x) if isinstance(x, rare) else x

    return unwrapped


def _itself_first(equal: Callable) -> Callable:
    @wraps(equal)
    def compared(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    return compared


def _where_shapes_differ(broadcast: Callable) -> Callable:
    @wraps(broadcast)
    def together(self: Any, lhs: Any, rhs: Any) -> tuple:
        is_block = lhs.type.is_block()
        if is_block == rhs.type.is_block() and (not is_block or [*lhs.type.shape] == [*rhs.type.shape]):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return together


def _where_it_is_asserted(check: Callable) -> Callable:
    """``check`` computes whole numbers once more, and whether they are in range: for an assertion that is off."""

    @wraps(check)
    def checked(self: Any, *given: Any) -> None:
        if getattr(self.builder.options, "debug", True):
            check(self, *given)

    return checked


def hasten() -> None:
    """For this process, from now on."""
    for owner, name, change in CHANGES:
        if hasattr(owner, name) and not hasattr(getattr(owner, name), "__wrapped__"):
            setattr(owner, name, change(getattr(owner, name)))


OF_TENSORS = getattr(semantic, "TritonSemantic", None)  # functions of the module in older versions
CHANGES = (
    (interpreter, "_patch_lang", _patched_once),
    (interpreter, "_get_np_dtype", _by_name),
    (core, "_unwrap_shape", _directly),
    (core, "_unwrap_if_constexpr", _at_once),
    (core, "_type_for_tuple_values", _remembered),
    (core.tensor, "__init__", _by_sizes),
    (core.block_type, "__init__", _by_element),
    (core.dtype, "__eq__", _itself_first),
    (OF_TENSORS, "broadcast_impl_value", _where_shapes_differ),
    (OF_TENSORS, "binary_op_sanitize_overflow_impl", _where_it_is_asserted),
)
