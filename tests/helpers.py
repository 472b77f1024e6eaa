"""What several test files share."""

import json
import math
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).parent

TINY = dict(img_size=32, embed_dim=24, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=3, num_classes=5)
"""A TNT of 4 patches with 16 pixels each."""


def perturb(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Move every parameter off its initial value, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# Where kernels run: Triton's interpreter; compiled for a target, their PTX on the CPU; compiled, on a GPU. In the interpreter
# products of bfloat16 are wrong.
PATHS = ("interpreter", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gpu")


def paths(
    interpreter: str = "float32 float16", compiled: str = "bfloat16 float16 float32 tf32", gpu: str | None = None
) -> pytest.MarkDecorator:
    """Parametrise a test with ``path``, inside of which it then runs, and ``dtype``; precisions by name, gpu's as compiled.

    Without --wide only a part of the compiled cases runs: sm_90 in bfloat16, which the interpreter has not; also one of other
    precisions, or of other targets, where a case has the marker ``everywhere``; nothing where it has the marker ``wide``.
    """
    precisions = dict.fromkeys(PATHS, compiled) | {"interpreter": interpreter, "gpu": compiled if gpu is None else gpu}
    cases = []
    for name in PATHS:
        for precision in precisions[name].split():
            dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
            marks = [pytest.mark.gpu] if name == "gpu" else []
            cases.append(pytest.param((name, precision), dtype, marks=marks, id=f"{name}-{precision}"))
    return pytest.mark.parametrize(("path", "dtype"), cases, indirect=["path"])


BEYOND = 1e9  # the ratio of an error that is not finite, or where none is allowed: JSON has no infinity


class KernelPath:
    """Where a test's kernels run, and how far they were from float64."""

    def __init__(self, name: str, precision: str):
        self.name, self.precision, self.tf32 = name, precision, precision == "tf32"
        self.device = "cuda" if name == "gpu" else "cpu"
        self.executor = None
        self.ratios: list[float] = []
        if name.startswith("sm_"):
            from ptx.executor import Executor  # only here, it needs Triton

            self.executor = Executor(name)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the operations' kernels run here."""
        if self.executor is None:
            yield
            return
        from ptx.executor import running

        with running(self.executor):
            yield

    def as_reference(self) -> AbstractContextManager:
        """Inside, PyTorch computes products in this precision, too: on a CPU it has no TF32."""
        return Tf32Products() if self.tf32 and self.device == "cpu" else nullcontext()

    def rule(self, name: str, fused: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
        """Assert the rule of the house for one tensor."""
        assert fused.shape == exact.shape, name
        error, own = ((x.double().cpu() - exact).abs().max().item() for x in (fused, same))
        # TF32 has float16's 10 bits of fraction, and with them its eps
        eps = 2**-10 if self.tf32 else torch.finfo(dtype).eps
        allowed = 2 * own + 4 * eps * exact.abs().max().item()
        if error != 0:
            self.ratios.append(error / allowed if allowed > 0 and math.isfinite(error) else BEYOND)
        assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's own {own:.3g}, allowed {allowed:.3g}"

    def summary(self) -> dict[str, Any]:
        """What was launched, and the largest error over the allowed one; None where the rule was not asked."""
        modules = {launched.module for launched in self.executor.launched}
        return {
            "operation": modules.pop() if len(modules) == 1 else "model" if modules else "none",
            "target": self.name,
            "precision": self.precision,
            "worst_ratio": max(self.ratios, default=None),
        }


HERE = KernelPath("gpu" if torch.cuda.is_available() else "interpreter", "float32")


class Tf32Products(TorchDispatchMode):
    """Rounds the factors of float32 products to 10 bits of fraction, to nearest, ties away from 0, as cvt.rna.tf32.f32 does."""

    aten = torch.ops.aten
    factors = {
        aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2),
        aten.convolution.default: (0, 1), aten.convolution_backward.default: (0, 1, 2),
    }  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args = list(args)
        for i in self.factors.get(function, ()):
            if args[i].dtype == torch.float32:
                rounded = ((args[i].view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
                args[i] = torch.where(args[i].isfinite(), rounded, args[i])
        return function(*args, **(kwargs or {}))


class ExactSoftmax(TorchDispatchMode):
    """The gradient of a float64 softmax, P·(dP − ΣP·dP), with dP less what it is where P is largest.

    That changes nothing but rounding: where that P is 1 up to 1e-16, the sum is dP there, and 1e-16 of it are all that is left
    of the difference, be it 0 or not. So dP's own differences are what cancels, and a float64 result has all of its digits.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        of_softmax = function is torch.ops.aten._softmax_backward_data.default
        if not of_softmax or args[0].dtype != torch.float64 or args[0].numel() == 0:
            return function(*args, **(kwargs or {}))
        gradient, p, dim = args[:3]
        gradient = gradient - gradient.gather(dim, p.argmax(dim, keepdim=True))
        return p * (gradient - (p * gradient).sum(dim, keepdim=True))


def lay(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
    """With an axis, its last place is 2^31 values and more behind its first, in memory that is taken where it is touched."""
    if axis is None:
        return tensor
    strides = list(tensor.contiguous().stride())
    strides[axis] = -(-(2**31) // (tensor.shape[axis] - 1) // 16) * 16
    size = strides[axis] * (tensor.shape[axis] - 1) + tensor.numel()
    if tensor.is_cuda:
        if torch.cuda.mem_get_info()[0] < 2 * size * tensor.element_size():
            pytest.skip(f"needs {2 * size * tensor.element_size() >> 30} GiB of free GPU memory")
        whole = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    else:
        whole = torch.frombuffer(mmap.mmap(-1, size * tensor.element_size()), dtype=tensor.dtype)
    return whole.as_strided(tensor.shape, strides).copy_(tensor)


def call(function: Callable[..., Any], **given: Any) -> torch.Tensor:
    """An operation of arguments by name, a transformer's weights among them by their own."""
    from tnt_fast.reference import in_records  # only here: conftest says first how Triton runs

    return joined(function(**in_records(given)))


def joined(found: Any) -> torch.Tensor:
    """An operation's result; several as one, the values of one behind those of the other."""
    return found if isinstance(found, torch.Tensor) else torch.cat([x.flatten() for x in found])


def results(
    function: Callable[..., torch.Tensor],
    tensors: Mapping[str, torch.Tensor | None],
    others: Mapping[str, Any],
    dtype: torch.dtype,
    kind: torch.dtype,
    device: str = "cpu",
    gradients: bool | Collection[str] = True,
    far: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """A function's output, or several, and its gradients by name, in ``kind``, of values that are rounded to ``dtype``.

    ``gradients``: of all tensors, of those that are named, or of none; ``others`` get none. ``far``: an axis by name, also of
    "upstream", the gradient of the output, as ``lay`` takes it.
    """
    from tnt_fast.reference import in_records  # only here: conftest says first how Triton runs

    far = far or {}
    given = {k: v if v is None else lay(v.to(dtype).to(device, kind), far.get(k)) for k, v in tensors.items()}
    wanted = [k for k, v in given.items() if v is not None and (gradients is True or (gradients and k in gradients))]
    given = {k: v if v is None else v.detach().requires_grad_(k in wanted) for k, v in given.items()}
    fixed = {k: v.to(device, kind) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
    with ExactSoftmax() if kind == torch.float64 else nullcontext():
        out = function(**in_records({**given, **fixed}))
        out = (out,) if isinstance(out, torch.Tensor) else out
        found = {f"output {i}" if i else "output": x.detach() for i, x in enumerate(out)}
        if wanted:
            generator = torch.Generator().manual_seed(9)
            upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype).to(device, kind) for x in out]
            upstream = [lay(x, far.get("upstream")) for x in upstream]
            of_wanted = torch.autograd.grad(out, [given[k] for k in wanted], upstream)
            found |= {f"gradient of {k}": g for k, g in zip(wanted, of_wanted, strict=True)}
    return found


def launchers() -> list[ModuleType]:
    """The files of kernels/ that launch a kernel, each by its own name for ``operation.launch``."""
    from tnt_fast.kernels import _modules  # only here, it needs Triton

    return [module for name, module in _modules.items() if name != "operation" and hasattr(module, "launch")]


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed: a reader never sees half a file."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    beside.replace(path)


def run_once(tmp_path_factory: pytest.TempPathFactory, name: str, script: str, *arguments: str) -> tuple[Path, dict[str, Any]]:
    """Run a script in a new folder, once for all workers of pytest-xdist: (the folder, how the script ended).

    Jit functions need a source file, and must not be made for Triton's interpreter.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "script.py").write_text(script)
            command = [sys.executable, "script.py", *arguments]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            ending = {"status": done.returncode, "out": done.stdout, "err": done.stderr}
            (folder / "ending.json").write_text(json.dumps(ending))
    return folder, json.loads((folder / "ending.json").read_text())


def write_images(root: Path, classes=("cat", "dog"), counts=(6, 2), seed=0) -> Path:
    """A folder to train on: ``root/{train,val}/CLASS/N.png``, so many a class, every other class brighter."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for part, count in zip(("train", "val"), counts, strict=True):
        for i, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(0, 120, (24, 20, 3)) + 100 * (i % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{j}.png")
    return root


def stop_in_second_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SIGTERM to this process, once, as a training run with mixup computes the loss of its second step.

    Returns:
        A list that has an entry for each step so far.
    """
    from timm.loss import SoftTargetCrossEntropy  # timm imports Triton, before conftest.py has told it to interpret

    calls: list[int] = []
    forward = SoftTargetCrossEntropy.forward

    def stopped(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(module, *args)

    monkeypatch.setattr(SoftTargetCrossEntropy, "forward", stopped)
    return calls
