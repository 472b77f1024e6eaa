"""What runs the kernels in the place of ``tnt_fast.kernels.operation.runner``: their compiled code, on the CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnt_fast.kernels import operation

from .compiler import KEPT, Compiled, compiler, flat
from .machine import Cost, Kernel

# bytes of shared memory that a program can have (CUDA C++ Programming Guide, technical specifications by compute capability)
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}

_machines: dict[str, Kernel] = {}


class Launched(NamedTuple):
    """A launch: the kernel's name, that of the file it is in, the key of its specialisation, the size of its grid.

    ``constants``: its constexprs; ``costs``: what each instruction cost, where that was counted.
    """

    name: str
    module: str
    key: str
    grid: int
    constants: dict[str, Any]
    costs: list[Cost] | None


class Executor:
    """Compiles what is launched for ``target`` and runs it on CPU tensors.

    Args:
        multiprocessors: how many programs run "at once": a few, so that they take several turns.
        error: -1, 0 or 1, the sign of the largest error that approximate instructions are allowed.
        programs: those of every grid to run, as a slice; None: all.
        tree: another source tree whose kernels are compiled, with ``tnt_fast/`` and ``kernels/``; None: this checkout.
        count: keep what each instruction cost.
    """

    on_cpu = True
    nvidia = True

    def __init__(
        self,
        target: str,
        multiprocessors: int = 2,
        error: int = 0,
        programs: slice | None = None,
        tree: Path | None = None,
        count: bool = False,
    ):
        self.target, self.multiprocessors, self.error, self.chosen = target, multiprocessors, error, programs
        self.compiler = compiler(tree)
        self.count = count
        self.launched: list[Launched] = []

    def capability(self, device: torch.device | None = None) -> tuple[int, int]:
        return divmod(int(self.target[3:]), 10)

    def programs(self, device: torch.device, per_sm: int) -> int:
        return self.multiprocessors

    def shared_memory(self, device: torch.device) -> int:
        return SHARED_MEMORY[self.target]

    def compile(self, kernel: Any, arguments: Sequence[Any], constants: dict, options: dict) -> Compiled:
        """
        Raises:
            RuntimeError: it does not compile, or needs more shared memory than there is.
        """
        compiled = self.compiler.compile(kernel, arguments, constants, options, self.target)
        if compiled.shared > (most := SHARED_MEMORY[self.target]):
            raise RuntimeError(f"{compiled.name} needs {compiled.shared} bytes of shared memory; {self.target} has {most}")
        return compiled

    def launch(self, spec: Any, grid: int, arguments: Sequence[Any], options: dict) -> None:
        compiled = self.compile(spec.kernel, arguments, spec.constants, options)
        programs = None if self.chosen is None else range(grid)[self.chosen]
        with torch.no_grad():
            given = flat(arguments)
            costs = _machine(compiled).run(grid, [given[i] for i in compiled.parameters], self.error, programs, self.count)
        module = spec.kernel.fn.__module__.rpartition(".")[2]
        self.launched.append(Launched(compiled.name, module, compiled.key, grid, spec.constants, costs))


def _machine(compiled: Compiled) -> Kernel:
    if compiled.key not in _machines:
        if len(_machines) >= KEPT:
            del _machines[next(iter(_machines))]
        _machines[compiled.key] = Kernel(compiled.ptx, compiled.shared, compiled.name)
    return _machines[compiled.key]


@contextmanager
def running(executor: Executor) -> Iterator[Executor]:
    """Inside, the operations' kernels run on ``executor``."""
    before, operation.runner = operation.runner, executor
    try:
        yield executor
    finally:
        operation.runner = before
