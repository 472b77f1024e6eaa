"""The four operations, forward and backward, of the fused kernels, of eager PyTorch and torch.compile; inner attention alone.

"backward" is the call that gives gradients: forward and backward. Each row has GB/s (activations read and written once) and
TFLOP/s, and the percent of the nearer roof, measured in the same run. "eager" is tnt_fast.reference, equal to timm's code.
A fused forward of one kernel has beside that the percent of its issue bound: what its static cost says it needs at least, at
the clock that was sampled while it ran.
"""

import importlib
import json
from functools import lru_cache
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernels as arguments
from benchmarks import measure
from benchmarks.measure import DEVICE, DTYPES, GPU, Case, Provider, Skipped
from tnt_fast import kernels, reference
from tnt_fast.dispatch import OPERATIONS

pytestmark = pytest.mark.benchmark(timer=measure.clock)
WHERE = {True: dict(batch=256, dtype="bf16"), False: dict(batch=1, dtype="fp32")}  # on a GPU, or not
SETS = 3  # of inputs, in turns


def call(operation: str, function, given: dict, others: dict, mode: str, upstream: Tensor) -> dict[str, Tensor]:
    """The result of an operation, and of "backward" the gradient of every tensor but the image, as in training."""
    if mode == "forward":
        with torch.no_grad():
            return {"result": arguments.call(function, given, others)}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None and name != "image"}
    out = arguments.call(function, given | leaves, others)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
    return {"result": out.detach(), **{f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}}


def operation_case(variant: str, operation: str, mode: str, provider: str, batch: int, dtype: str) -> Case:
    group = f"{operation}/{variant}/{mode}/{dtype}/{batch}"

    def build() -> Provider:
        if provider == "fused" and operation not in kernels.OPERATIONS:
            raise Skipped("this version has no fused kernel for it")
        if provider == "fused" and mode == "backward":
            sizes = timm.create_model(arguments.VARIANTS[variant], depth=1, device="meta").sizes()
            if reasons := kernels.OPERATIONS[operation].gradients_unsupported(sizes, DTYPES[dtype], torch.device(DEVICE)):
                raise Skipped("its gradients are not fused: " + "; ".join(reasons))
        given, others = arguments.arguments(variant, operation, batch, DTYPES[dtype], DEVICE)
        if (operation, mode) == ("outer", "backward"):  # without a fold, which has a row of its own
            given = {name: None if name == "pixel" or name.startswith("fold_") else x for name, x in given.items()}
        eager = getattr(reference, operation)
        function = kernels.OPERATIONS[operation] if provider == "fused" else eager
        if provider == "compiled":
            function = torch.compile(eager, dynamic=False)
        many = arguments.activations(operation)
        sets = [given | {name: torch.randn_like(given[name]) for name in list(given)[:many]} for _ in range(SETS)]
        upstream = torch.randn_like(arguments.call(eager, given, others))

        def run(function, given: dict) -> dict[str, Tensor]:
            return call(operation, function, given, others, mode, upstream)

        def check():
            exact = run(eager, {name: x if x is None else x.double() for name, x in given.items()})
            found, own = run(function, given), run(eager, given)
            return {name: measure.by_rule(found[name], exact[name], own[name]) for name in exact}

        own_bytes = sum(x.numel() * x.element_size() for x in given.values() if x is not None)
        slack = measure.FOREIGN if provider == "compiled" else 1.0
        return Provider(lambda i: run(function, sets[i % SETS]), check, own_bytes, slack, ahead=True)

    info = dict(suite="operations", operation=operation, variant=variant, mode=mode, provider=provider)
    return Case(f"{group}/{provider}", group, build, info | dict(dtype=dtype, batch=batch))


def work(info: dict) -> tuple[float, float]:
    """FLOP and bytes of one call; a backward has twice the products, and reads and writes as much again for the gradients."""
    given, others = arguments.arguments(info["variant"], info["operation"], 1, DTYPES[info["dtype"]], "meta")
    with FlopCounterMode(display=False) as counter:
        out = arguments.call(getattr(reference, info["operation"]), given, others)
    moved = arguments.bytes_moved(info["operation"], given, out)
    times = info["batch"] * (1 if info["mode"] == "forward" else 3)
    return times * counter.get_total_flops(), times * moved


@lru_cache
def static_cost(operation: str, variant: str, dtype: str) -> float | None:
    """Warp instructions a patch of the forward kernel on this GPU, as results/static_cost.json has them."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    wanted = dict(function=f"_{operation}_fwd_kernel", variant=variant, dtype=dtype, target=target)
    found = json.loads((Path(__file__).parent / "results" / "static_cost.json").read_text("utf-8"))
    rows = [row for row in found if wanted.items() <= row.items() and row["error"] is None]
    return rows[0]["warp_instructions_per_patch"] if rows else None


def issue(info: dict, seconds: float, megahertz: float | None) -> dict[str, float]:
    """The percent of its issue bound that a fused forward reaches on a GPU at its clock; nothing for others."""
    if not GPU or torch.version.hip or (info["provider"], info["mode"]) != ("fused", "forward"):
        return {}
    cost = static_cost(info["operation"], info["variant"], info["dtype"])
    if not cost or not megahertz:
        return {}
    bound = measure.issue_seconds(cost * info["batch"] * 196, megahertz)
    return {"issue_bound_ms": round(bound * 1e3, 4), "percent_of_issue": round(100 * bound / seconds, 1)}


def operation_cases(gpu: bool) -> list[Case]:
    providers = ["eager", "compiled", "fused"] if gpu else ["eager", "fused"] if kernels.on_cpu() else ["eager"]
    return [
        operation_case(variant, operation, mode, provider, **WHERE[gpu])
        for variant in (("s", "b") if gpu else ("s",))
        for operation in OPERATIONS
        for mode in ("forward", "backward")
        for provider in providers
        if gpu or provider == "eager" or operation in kernels.OPERATIONS
    ]


@measure.rows(operation_cases(GPU), "fused kernels, torch.compile, TNT-B, bf16, batch 256")
def test_operation(take, case):
    done, info = take(case), case.info
    if not done["benchmark"].disabled:
        rates = measure.rates(done["seconds"], info["dtype"], *work(info))
        clock = done.get("clock", {}).get("sm_mhz", [None] * 3)[1]
        done["benchmark"].extra_info.update(rates, **issue(info, done["seconds"], clock))


# ---- inner attention alone ----


def _eager(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v).transpose(1, 2)


def _sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _xformers(patches: int, S: int, D: int):
    """All patches in one sequence, with a mask that keeps each to itself; of inputs whose heads are padded to 8 channels."""
    ops = importlib.import_module("xformers.ops")
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens([S] * patches)

    def attend(q, k, v):
        q, k, v = (x.reshape(1, patches * S, *x.shape[2:]) for x in (q, k, v))
        out = ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=D**-0.5)
        return out.reshape(patches, S, *out.shape[2:])

    return attend


def attention_case(variant: str, provider: str, batch: int, dtype: str) -> Case:
    """Queries, keys and values are (patches, S, heads, channels), as the projections give them."""
    group = f"inner_attention/{variant}/forward/{dtype}/{batch}"
    shape = patches, S, H, D = (batch * 196, 16, 4, {"s": 6, "b": 10}[variant])

    def build() -> Provider:
        torch.manual_seed(0)
        plain = [[torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(3)] for _ in range(SETS)]
        sets, function = plain, {"eager": _eager, "sdpa": _sdpa}.get(provider)
        if provider == "xformers":
            sets = [[F.pad(x, (0, -D % 8)) for x in each] for each in plain]
            try:
                function = _xformers(patches, S, D)
                function(*sets[0])
            except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
                if measure.out_of_memory(error):
                    raise
                raise Skipped(f"xformers does not run this here: {(str(error).splitlines() or ['?'])[0]}") from error

        def check():
            exact = _eager(*(x.double() for x in plain[0]))
            return {"result": measure.by_rule(function(*sets[0])[..., :D], exact, _eager(*plain[0]))}

        return Provider(lambda i: function(*sets[i % SETS]), check, slack=measure.FOREIGN, ahead=True)

    info = dict(suite="operations", operation="inner_attention", variant=variant, mode="forward", provider=provider)
    return Case(f"{group}/{provider}", group, build, info | dict(dtype=dtype, batch=batch, shape=shape))


def attention_cases(gpu: bool) -> list[Case]:
    variants = ("s", "b") if gpu else ("s",)
    return [attention_case(v, p, **WHERE[gpu]) for v in variants for p in ("eager", "sdpa", "xformers")]


@measure.rows(attention_cases(GPU), "TNT-B, bf16, batch 256, xformers' operators")
def test_inner_attention(take, case):
    with torch.no_grad():
        done = take(case)
    patches, S, H, D = case.info["shape"]
    dtype = case.info["dtype"]
    if not done["benchmark"].disabled:
        moved = 4 * patches * H * S * D * DTYPES[dtype].itemsize
        done["benchmark"].extra_info.update(measure.rates(done["seconds"], dtype, 4 * patches * H * S * S * D, moved))
