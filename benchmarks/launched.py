"""What an operation launches, with all its arguments, recorded without a GPU and without computing anything.

The operations run on tensors of the device "meta", which have shapes and no values, under a runner that describes a GPU and
keeps what it is asked to launch. So grids, integers and options are those of a real call: nobody keeps a list of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from benchmarks.measure import DTYPES
from tnt_fast import kernels as shipped
from tnt_fast import reference
from tnt_fast.kernels import operation
from tnt_fast.kernels.operation import Launch

VARIANTS = ("ti", "s", "s_legacy", "b")
BATCH, IMAGE, N = 256, 224, 196


class Launched(NamedTuple):
    """A launch as the runner gets it; ``arguments`` in the kernel's order, without its constants."""

    spec: Launch
    grid: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def kernel(self) -> Any:
        return self.spec.kernel

    @property
    def constants(self) -> dict[str, Any]:
        return self.spec.constants

    @property
    def code(self) -> tuple[Any, ...]:
        """What tells it apart from launches of other code: kernel, constants, and which arguments there are."""
        return self.kernel, tuple(self.constants.items()), _present(self.arguments)

    @property
    def bytes(self) -> int:
        """Of the tensors, each once."""

        def tensors(given: Any) -> Iterator[Tensor]:
            for each in given:
                if isinstance(each, Tensor):
                    yield each
                elif isinstance(each, tuple):
                    yield from tensors(each)

        return sum(x.numel() * x.element_size() for x in tensors(self.arguments))


def _present(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_present(x) if isinstance(x, tuple) else x is not None for x in arguments)


class Recorder:
    """In the place of ``operation.runner``: a GPU with so many multiprocessors, on which nothing runs.

    ``capability``: of CUDA's, None for AMD.
    """

    on_cpu = True

    def __init__(self, multiprocessors: int, capability: tuple[int, int] | None = None):
        self.multiprocessors, self._capability = multiprocessors, capability
        self.nvidia = True  # the constants are NVIDIA's; whoever compiles for another GPU changes them
        self.launched: list[Launched] = []

    def capability(self, device: torch.device | None = None) -> tuple[int, int] | None:
        return self._capability

    def programs(self, device: torch.device, per_sm: int) -> int:
        return per_sm * self.multiprocessors

    def shared_memory(self, device: torch.device) -> int | None:
        return None

    def launch(self, spec: Launch, grid: int, arguments: Any, options: dict) -> None:
        self.launched.append(Launched(spec, grid, tuple(arguments), options))

    @contextmanager
    def running(self) -> Iterator["Recorder"]:
        """Inside, the operations' kernels are recorded."""
        before, operation.runner = operation.runner, self
        try:
            yield self
        finally:
            operation.runner = before


def arguments(kernel: str, variant: str, dtype: torch.dtype, batch: int, image: int, device: str) -> dict[str, Any]:
    """Arguments of an operation by name, records taken apart: a first block's weights, and activations of random values."""
    with torch.device(device):
        model = timm.create_model(f"tnt_fast_{variant}_patch16_224", depth=1, img_size=image, dtype=dtype)
        block, sizes = model.blocks[0], model.sizes()
        shapes = {
            "image": (batch, 3, image, image),
            "pixel": (batch * sizes["N"], sizes["S"], sizes["C"]),
            "patch": (batch, 1 + sizes["N"], sizes["E"]),
        }
        folded = dict(zip(reference.FoldWeights._fields, block.fused_arguments()["fold"].values(), strict=False))
        outer = {"outer": block.outer_arguments() | {"fold_weights": reference.FoldWeights(**folded)}}
        whole = {"block": block.block_arguments(block.outer_arguments())}
        given = (model.fused_arguments() | block.fused_arguments() | outer | whole)[kernel]
        read = shipped.OPERATIONS[kernel].activations
        inputs = {name: torch.randn(shapes[name], dtype=dtype, requires_grad=True) for name in read}
        return inputs | reference.by_name(given)


def recorded(
    kernel: str, given: dict[str, Any], multiprocessors: int = 132, capability: tuple[int, int] | None = (9, 0)
) -> list[Launched]:
    """The launches of an operation, forward and backward with all gradients; ``given``: as ``arguments`` has it."""
    function, recorder = shipped.OPERATIONS[kernel], Recorder(multiprocessors, capability)
    with recorder.running(), torch.no_grad():
        for each, gradients in calls(kernel, given):
            packed = SimpleNamespace(**function.defaults | reference.in_records(each), kept={} if gradients else None)
            out = function.empty(packed)
            function.prepared(packed)(packed, out)
            if gradients:
                needed = {name for name, x in each.items() if isinstance(x, Tensor)}
                if several := isinstance(out, tuple):
                    packed.kept |= zip(function.reread, out, strict=False)
                gradient: Any = [*map(torch.empty_like, out)] if several else torch.empty_like(out)
                function.graded(gradient, packed, needed)(gradient, packed)
    return [found for found in recorder.launched if kernel != "block" or _is_own(found)]


def _is_own(found: Launched) -> bool:
    """Of a block's launches: whether neither inner nor outer alone has it, but for copies of weights."""
    within = any(isinstance(x, shipped.inner.Norm) and x.ptr is not None for x in found.arguments)
    return within or found.kernel in (shipped.norm._norms_bwd_kernel, shipped.inner._inner_totals_kernel)


def calls(kernel: str, given: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    """The arguments that an operation is called with, and whether it records gradients: outer has no fold, then, as a block
    has."""
    if kernel != "outer":
        return [(given, True)]
    return [(given, False), (given | {"pixel": None} | reference.NO_FOLD._asdict(), True)]


def launched(
    kernel: str, variant: str, dtype: torch.dtype, multiprocessors: int, capability: tuple[int, int] | None = None,
    images: int = BATCH,
) -> list[Launched]:  # fmt: skip
    """The launches of an operation of so many images of 224 × 224 pixels."""
    given = arguments(kernel, variant, dtype, images, IMAGE, "meta")
    return recorded(kernel, given, multiprocessors, capability)


@cache
def launches(kernel: str) -> list[tuple[str, str, Launched]]:
    """(variant, dtype, launch) of the named variants on an H200, each code of a variant once; not of a variant like another."""
    return [(variant, short, by_patch(each)) for variant, short, each in _distinct(kernel, BATCH)]


@cache
def launches_of_one(kernel: str) -> list[tuple[str, str, Launched]]:
    """The same of one image, where no image of many is launched so."""
    known = {str(each.code) for _, _, each in _distinct(kernel, BATCH)}
    return [found for found in _distinct(kernel, 1) if str(found[-1].code) not in known]


def _distinct(kernel: str, images: int) -> list[tuple[str, str, Launched]]:
    found, known = [], set()
    for variant in VARIANTS:
        for short, dtype in DTYPES.items():
            distinct: dict[tuple[Any, ...], Launched] = {}
            for each in launched(kernel, variant, dtype, 132, (9, 0), images):
                distinct.setdefault(each.code, each)
            if (codes := (short, *distinct)) not in known:
                found += [(variant, short, each) for each in distinct.values()]
            known.add(codes)
    return found


def by_patch(found: Launched) -> Launched:
    """With ``patches`` in patches where a norm counts rows, of which a patch may have several."""
    names = found.kernel.arg_names
    if "n_rows" not in names:
        return found
    rows = found.arguments[names.index("n_rows")] // (BATCH * N)
    return found._replace(spec=found.spec._replace(patches=found.spec.patches / max(1, rows)))
