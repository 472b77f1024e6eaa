"""What a call costs the host: of operations a forward, and a forward with its backward; of whole models an eager forward and a
training step; of a step's operations each alone, as compiled code calls it.

    python -m benchmarks.host [--profile inner]

One image, so that a GPU is done before the host is. Without a GPU Triton's launches run up to the compiled kernel, which does
nothing. Beside the time stand the launches: of Triton, and PyTorch's operations that launch something; with a GPU also the time
of all its kernels at batch 256: what is less than the host's is bound by the host. Models are as deep as TNT-S and DeiT-S, and
so narrow, in float32, that PyTorch's operations have next to nothing to compute where there is no GPU either.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import timm
import torch
import torch.nn.functional as F
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

import tnt_fast
from benchmarks import kernels as arguments
from benchmarks.measure import GPU
from benchmarks.test_operations import call
from tnt_fast import attention, kernels
from tnt_fast.kernels import operation

NO_LAUNCH = {
    "alias", "as_strided", "contiguous", "detach", "empty", "empty_like", "empty_strided", "expand", "numpy_T", "permute",
    "promote_types", "reshape", "resolve_conj", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to",
    "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


def aten_launches(run) -> list[str]:
    """PyTorch's operations of a call that launch something, by name: the outermost ones."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {id(event): event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")}
    found = {id(event): event for event in profile.events() if names.get(id(event), "view") not in NO_LAUNCH}

    def inner(event) -> bool:
        parent = event.cpu_parent
        return parent is not None and (id(parent) in found or inner(parent))

    return [names[key] for key, event in found.items() if not inner(event)]


class StandIn(operation.Gpu):
    """An H100 on which kernels do nothing."""

    on_cpu = True
    capability = staticmethod(lambda device=None: (9, 0))
    programs = staticmethod(lambda device, per_sm: 132 * per_sm)
    shared_memory = staticmethod(lambda device: 227 << 10)


def _attend_recorded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2).contiguous(), logsumexp.contiguous()


def _attend_backward(*given: torch.Tensor) -> list[torch.Tensor]:
    *heads, logsumexp = given
    heads = [x.transpose(1, 2) for x in heads]
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, logsumexp, 0.0, False)
    return [x.transpose(1, 2) for x in found]


def stand_in() -> None:
    """Have Triton's launches run here, up to the compiled kernel; attention is one call of PyTorch, as on a GPU."""
    operation.runner = StandIn()
    attention.attend_recorded, attention.attend_backward = _attend_recorded, _attend_backward
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    nothing = CompiledKernel.__new__(CompiledKernel)
    vars(nothing).update(name="nothing", src=None, _run=lambda *args: None, module=0, function=0, packed_metadata=None)

    def compiled(self, key, signature, device, *args):
        self.device_caches[device][0][key] = nothing
        return nothing

    triton.JITFunction._do_compile = compiled


def gpu_us(run) -> float:
    """Of a GPU's kernels in a call, whatever the host does meanwhile."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 10


def timed(*runs: Callable[[], Any], calls: int = 20) -> list[list[float]]:
    """Microseconds of each call in each of several rounds, in which they take turns; without a GPU, of this process's time."""
    clock, rounds = time.perf_counter if GPU else time.process_time, []
    for _ in range(40):
        rounds.append([])
        for run in runs:
            if GPU:
                torch.cuda.synchronize()
            start = clock()
            for _ in range(calls):
                run()
            rounds[-1].append((clock() - start) / calls * 1e6)
    return rounds


def least(run: Callable[[], Any]) -> float:
    """Of all rounds, since other work of the machine only ever adds."""
    return min(us for (us,) in timed(run))


def launches(run) -> tuple[str, list[str]]:
    """How many a call has, of Triton's and of PyTorch's, and the names of these."""
    launched, launch = [], operation.Gpu.launch
    operation.Gpu.launch = lambda *given: (launched.append(1), launch(*given))
    small = aten_launches(run)
    operation.Gpu.launch = launch
    return f"{len(launched)} launches of Triton, {len(small)} of PyTorch", small


def models(device: str) -> dict[str, torch.nn.Module]:
    """DeiT first, TNT fused, its copy for inference, timm's TNT."""
    wide = dict(img_size=32, embed_dim=64, depth=12, num_classes=10)
    tnt = dict(inner_dim=8, num_heads_inner=2, num_heads_outer=2)
    fused = tnt_fast.TNT(**wide, **tnt, backend="fused").to(device).eval()
    found = {
        "DeiT": timm.create_model("deit_small_patch16_224", num_heads=2, **wide),
        "TNT, fused": fused,
        "TNT, optimized": tnt_fast.optimize_for_inference(fused),
        "TNT, timm": timm.models.tnt.TNT(**wide, **tnt),
    }
    return {name: model.to(device).eval() for name, model in found.items()}


def step(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor, autocast: bool) -> None:
    """A training step without its optimizer."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(image), label)
    torch.autograd.grad(loss, list(model.parameters()))


def calls(device: str, way: str) -> dict[str, Callable[[], Any]]:
    """Eager calls of one image, by model: "forward", "step" or "step under autocast"."""
    image, found = torch.randn(1, 3, 32, 32, device=device), models(device)
    if way == "forward":
        return {name: torch.no_grad()(partial(model, image)) for name, model in found.items()}
    label, autocast = torch.tensor([0], device=device), way != "step"
    return {name: partial(step, model.train(), image, label, autocast) for name, model in found.items() if "opt" not in name}


def compare(device: str, way: str) -> None:
    runs = calls(device, way)
    for run in (*runs.values(),) * 3:  # a model is looked through in the first two
        run()
    took = [*zip(*timed(*runs.values(), calls=20 if way == "forward" else 3), strict=True)]
    for (name, run), us in zip(runs.items(), took, strict=True):
        ratio = statistics.median(ours / deit for ours, deit in zip(us, took[0], strict=True))
        print(f"{way:19s} {name:14s} {min(us):7.0f} us, {ratio:.2f} of DeiT; {launches(run)[0]}", flush=True)


class Nodes(TorchDispatchMode):
    """Keeps the last call of each operation of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Callable[[], Any]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tnt_fast":
            self.found[function._schema.name.split("::")[1]] = partial(function, *args)
        return function(*args, **(kwargs or {}))


def nodes(device: str) -> None:
    with Nodes() as seen:
        calls(device, "step under autocast")["TNT, fused"]()
    with torch.no_grad():
        for name, run in seen.found.items():
            print(f"{name:20s} {least(run):7.0f} us; {launches(run)[0]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", metavar="NAME", help="where the time of one operation goes, by function")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if GPU else "cpu"
    if not GPU:
        stand_in()
    for name, mode in product(kernels.OPERATIONS, ("forward", "backward")):

        def prepared(batch, name=name, mode=mode):
            given, others = arguments.arguments("s", name, batch, torch.bfloat16, device)
            function = kernels.OPERATIONS[name]
            upstream = torch.ones_like(arguments.call(function, given, others))
            return lambda: call(name, function, given, others, mode, upstream)

        run = prepared(1)
        run()
        if options.profile:
            if options.profile == name and mode == "backward":
                with cProfile.Profile() as profile:
                    for _ in range(200):
                        run()
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            continue
        count, small = launches(run)
        gpu = f", {gpu_us(prepared(256)):.0f} us of the GPU" if GPU else ""
        print(f"{name:12s} {mode:9s} {least(run):7.0f} us{gpu}; {count}: {' '.join(small)}", flush=True)
    if not options.profile:
        nodes(device)
        for way in ("forward", "step", "step under autocast"):
            compare(device, way)


if __name__ == "__main__":
    main()
