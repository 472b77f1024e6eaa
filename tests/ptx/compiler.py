"""Compiles kernels for NVIDIA GPUs, from a process in which Triton interprets them.

A second process, without TRITON_INTERPRET, is started at the first request and ends with this one. It launches the kernel as
Triton's launcher does, on a device that is described and not there, up to where the machine code would be loaded. So it is the
launcher that specialises: a pointer divisible by 16, an integer divisible by 16 or equal to 1, an integer of 64 bits.
"""

import atexit
import gc
import hashlib
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
TESTS = Path(__file__).resolve().parents[1]
KEPT = 64  # kernels


class Compiled(NamedTuple):
    """A kernel for a target: what runs it and what says which it is.

    ``parameters``: positions of the arguments that are parameters of the PTX, in their order, those in tuples counted one by
    one (``flat``); others became constants.
    ``key``: equal for equal specialisations.
    """

    ptx: str
    shared: int
    num_warps: int
    name: str
    target: str
    parameters: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Pointer:
    """A tensor as the launcher looks at it: its dtype and its address."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def flat(arguments: Sequence[Any]) -> list[Any]:
    """Arguments, those in tuples one by one."""
    return [x for given in arguments for x in (flat(given) if isinstance(given, tuple) else [given])]


def _each(arguments: Sequence[Any], change: Callable[[Any], Any]) -> tuple:
    """Changed one by one, in the same tuples."""
    found = [_each(x, change) if isinstance(x, tuple) else change(x) for x in arguments]
    return type(arguments)(*found) if hasattr(arguments, "_fields") else tuple(found)


class Compiler:
    """Compiles the kernels of a source tree, a folder with ``tnt_fast/`` and ``kernels/``, in a process of its own."""

    def __init__(self, tree: Path = TESTS.parent, quiet: bool = False, only_sizes: bool = False):
        """``quiet``: without what Triton prints of what it cannot compile, thousands of lines. ``only_sizes``: no PTX, which is
        half of the time; how much shared memory a program takes is known before."""
        self.tree, self.quiet, self.only_sizes = Path(tree), quiet, only_sizes
        self.process: subprocess.Popen | None = None
        self.known: dict[Any, Compiled] = {}

    def compile(
        self, kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], options: Mapping[str, Any], target: str
    ) -> Compiled:
        """What the launcher would start for these arguments, in the order of the kernel's.

        Raises:
            ValueError: a target that is not one of ``TARGETS``. RuntimeError: the compiler's error, with its traceback.
        """
        if target not in TARGETS:
            raise ValueError(f"target={target!r} cannot be compiled for here; accepted: {', '.join(TARGETS)}")
        given = _each(arguments, lambda x: Pointer(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x)
        function = kernel.fn
        request = (function.__module__, function.__qualname__, given, dict(constants), dict(options), int(target[3:]))
        key = repr(request)
        if key not in self.known:
            if len(self.known) >= KEPT:
                del self.known[next(iter(self.known))]  # the oldest; a whole release check has thousands
            self.known[key] = Compiled(*self._ask(request))
        return self.known[key]

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
            atexit.unregister(self.close)

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(self.tree), str(TESTS)])
        # the machine code is left out, so nobody else may find these kernels
        environment["TRITON_CACHE_DIR"] = triton.knobs.cache.dir.rstrip(os.sep) + ("-sizes" if self.only_sizes else "-ptx")
        command = [sys.executable, "-c", f"from ptx.compiler import serve; serve({self.only_sizes})"]
        self.process = subprocess.Popen(
            command, cwd=self.tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self.quiet else None,
        )  # fmt: skip
        atexit.register(self.close)

    def _ask(self, request: tuple) -> tuple:
        if self.process is None:
            self._start()
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            status = self.process.wait(timeout=10)
            self.close()
            raise RuntimeError(f"the process that compiles kernels ended, status {status}; its stderr says why") from error
        if isinstance(answer, str):
            raise RuntimeError(f"{request[0]}.{request[1]} does not compile for sm_{request[-1]}:\n{answer}")
        return answer


def compiler(tree: Path | None = None) -> Compiler:
    """The one of this process for a source tree; None: this checkout."""
    tree = TESTS.parent if tree is None else Path(tree).resolve()
    if tree not in _compilers:
        _compilers[tree] = Compiler(tree)
    return _compilers[tree]


_compilers: dict[Path, Compiler] = {}


# ---- in the other process ----


class Device:
    """What Triton's launcher asks of a driver; the number of the device is the target's."""

    arch = 0

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def serve(only_sizes: bool = False) -> None:
    """Answer requests from stdin on stdout: the fields of ``Compiled``, or the text of an error."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints is no answer
    device = Device()
    triton.runtime.driver.set_active(device)
    if hasattr(triton.knobs.runtime, "add_stages_inspection_hook"):
        triton.knobs.runtime.add_stages_inspection_hook = _without_code if only_sizes else _without_machine_code
    gc.freeze()  # what is there is no garbage: a tenth of the time of a compilation
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = _compile(device, *request)
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


def _without_machine_code(backend=None, stages=None, *rest):
    """ptxas takes as long as all before it, and nothing here reads what it makes."""
    if stages is None:  # newer versions ask for a key of their cache first
        return "without machine code", "without machine code"
    stages["cubin"] = lambda source, metadata: b""
    return None


def _without_code(backend=None, stages=None, *rest):
    """Nor LLVM's optimisations and the PTX: how much shared memory there is was settled before."""
    if stages is None:
        return "without code", "without code"
    nvidia.llvm.optimize_module = lambda *given: None
    stages["ptx"] = lambda source, metadata: metadata.update(name="") or ""
    return _without_machine_code(backend, stages)


def _compile(device: Device, module: str, name: str, given: tuple, constants: dict, options: dict, arch: int) -> tuple:
    device.arch = arch
    kernel = getattr(importlib.import_module(module), name)
    compiled = kernel.run(*given, grid=(1,), warmup=True, **constants, **options)
    kernel.device_caches.clear()  # of the memory only; files stay
    signature = flat(list(compiled.src.signature.values())[: len(given)])
    parameters = tuple(i for i, kind in enumerate(signature) if kind != "constexpr")
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    key = hashlib.sha256(ptx.encode()).hexdigest()
    return ptx, metadata.shared, metadata.num_warps, metadata.name, f"sm_{arch}", parameters, key
