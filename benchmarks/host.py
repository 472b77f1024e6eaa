"""What a call costs the host: an operation's forward, and its forward and backward, with as little as possible to compute.

    python -m benchmarks.host [--profile inner]

One image, so that a GPU is done before the host is. Without a GPU Triton's launches run up to the compiled kernel, which does
nothing. Beside the time stand the launches: of Triton, and PyTorch's operations that launch something on a GPU.
"""

import argparse
import cProfile
import pstats
import time
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import kernels as arguments
from benchmarks.measure import GPU
from benchmarks.test_operations import call
from tnt_fast import kernels
from tnt_fast.kernels import operation

NO_LAUNCH = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


def aten_launches(run) -> list[str]:
    """PyTorch's operations of a call that launch something, by name: those that call no other, but for views."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    found = [event for event in profile.events() if event.name.startswith("aten::")]
    calling = {id(event.cpu_parent) for event in found if event.cpu_parent is not None}
    names = [event.name.removeprefix("aten::") for event in found if id(event) not in calling]
    return [name for name in names if name not in NO_LAUNCH]


class StandIn(operation.Gpu):
    """An H100 on which kernels do nothing."""

    on_cpu = True
    capability = staticmethod(lambda device=None: (9, 0))
    programs = staticmethod(lambda device, per_sm: 132 * per_sm)
    shared_memory = staticmethod(lambda device: 227 << 10)


def stand_in() -> None:
    """Have Triton's launches run here, up to the compiled kernel."""
    operation.runner = StandIn()
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    nothing = SimpleNamespace(
        run=lambda *args: None, function=None, packed_metadata=None, launch_metadata=lambda grid, stream, *args: None
    )

    def compiled(self, key, signature, device, *args):
        self.device_caches[device][0][key] = nothing
        return nothing

    triton.JITFunction._do_compile = compiled


def timed(run) -> float:
    """Microseconds of a call: the least of several means, since other work of the machine only ever adds."""
    rounds = []
    for _ in range(30):
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            run()
        rounds.append((time.perf_counter() - start) / 20 * 1e6)
    return min(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", metavar="NAME", help="where the time of one operation goes, by function")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if GPU else "cpu"
    if not GPU:
        stand_in()
    launched = []
    launch = operation.Gpu.launch
    for name, function in kernels.OPERATIONS.items():
        given, others = arguments.arguments("s", name, 1, torch.bfloat16, device)
        upstream = torch.ones((), device=device).expand(arguments.call(function, given, others).shape).contiguous()
        upstream = upstream.to(torch.bfloat16)
        for mode in ("forward", "backward"):

            def run(mode=mode, function=function, given=given, others=others, upstream=upstream, name=name):
                call(name, function, given, others, mode, upstream)

            run()
            if options.profile:
                if options.profile == name and mode == "backward":
                    with cProfile.Profile() as profile:
                        for _ in range(200):
                            run()
                    pstats.Stats(profile).sort_stats("tottime").print_stats(45)
                continue
            launched.clear()
            operation.Gpu.launch = lambda *args: (launched.append(args[1]), launch(*args))
            small = aten_launches(run)
            operation.Gpu.launch = launch
            text = f"{len(launched)} of Triton, {len(small)} of PyTorch"
            print(f"{name:12s} {mode:9s} {timed(run):7.0f} us   launches: {text} ({' '.join(small)})")


if __name__ == "__main__":
    main()
