"""Triton's interpreter without what it does anew at every call of a function: of kernels of many small ones, most of the time.

It computes the same. These are its own parts, of no public interface: where one is not there, it stays as it is.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from triton.language import core
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


def hasten() -> None:
    """For this process, from now on."""
    for module, name, change in (
        (interpreter, "_patch_lang", _patched_once),
        (interpreter, "_get_np_dtype", _by_name),
        (core, "_unwrap_shape", _directly),
        (core, "_type_for_tuple_values", _remembered),
    ):
        if hasattr(module, name) and not hasattr(getattr(module, name), "__wrapped__"):
            setattr(module, name, change(getattr(module, name)))
