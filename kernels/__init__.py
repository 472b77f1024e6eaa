"""Fused Triton operations of TNT, imported as ``tnt_fast.kernels`` only.

One file an operation: forward, backward, limits, launches, in an ``operation.Operation`` of the file's name, which is called
as its twin in ``tnt_fast.reference`` is. ``OPERATIONS`` has them by name. Adding one is adding a file: what checks, chooses,
counts, compiles and measures walks over ``OPERATIONS``. Nothing here knows the model.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

import torch

if (
    __name__ != "tnt_fast.kernels"
):  # in a checkout transformers finds this in place of another package, and lives with an empty one
    __path__ = []

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"the folder kernels/ of tnt_fast was imported as {__name__!r}; import it as 'tnt_fast.kernels'")


def _without_triton() -> str:
    """Why there is no Triton here; empty where there is."""
    if find_spec("triton") is None:
        return "Triton is not installed; the kernels need it (Linux: pip install triton)"
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        sys.modules["triton"] = None  # torchvision, by way of torch, asks next, and lives with an ImportError alone
        told = f"{type(error).__name__}: {error}"
        return f"Triton is installed and does not import ({told}); install the one that belongs to torch {torch.__version__}"
    return ""


WITHOUT_TRITON = _without_triton()
HAS_TRITON = not WITHOUT_TRITON
OPERATIONS: dict[str, Any] = {}  # Operation, which needs Triton, by name


def on_cpu() -> bool:
    """Whether the kernels run on the CPU here, slowly, to test them: in Triton's interpreter (TRITON_INTERPRET=1)."""
    return HAS_TRITON and operation.runner.on_cpu


if HAS_TRITON and __name__ == "tnt_fast.kernels":
    from tnt_fast.kernels import operation

    _modules = {name: import_module(f"{__name__}.{name}") for _, name, _ in iter_modules(__path__)}
    _found = {name: getattr(module, name, None) for name, module in _modules.items()}
    _found = {name: x for name, x in _found.items() if isinstance(x, operation.Operation)}
    # in the order of reference.py, which is that of the flow
    OPERATIONS.update(sorted(_found.items(), key=lambda item: item[1].twin.__code__.co_firstlineno))
