"""Whole models: TNT against timm's TNT and DeiT of the same size; eager, compiled, in CUDA graphs; inference and train step.

The groups that tell most come first; ``--minutes`` bounds the time on a GPU. On a CPU: small batches of the reference.
A train step is forward, loss, backward and AdamW, in bf16 and fp16 by autocast, fp16 with loss scaling; the row says in which
precision what the blocks add to comes out of them ("residual"). Its guard, as that of inference, looks at the first and the
last image: at their output and, by name, at the gradients of their loss. A CUDA graph's time includes copying the images in.

DeiT is measured in four more ways: with cuDNN's attention, on our outer kernels, and both models as compiled with
max-autotune-no-cudagraphs ("tuned"). "graphed" is compiled with reduce-overhead: PyTorch captures what a call launches, forward
and backward, and replays it, so the host is out of the way at any batch size.
"""

import contextlib
from collections.abc import Collection
from functools import lru_cache, partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tnt_fast
from benchmarks import measure
from benchmarks.compare import is_control
from benchmarks.measure import DEVICE, DTYPES, GPU, Case, Provider
from tnt_fast import flops, kernels, reference
from tnt_fast.dispatch import OPERATIONS
from tnt_fast.tnt import Block, PixelEmbed

pytestmark = pytest.mark.benchmark(timer=measure.clock)

_S = dict(embed_dim=384, inner_dim=24, num_heads_inner=4, num_heads_outer=6)
TNTS = {
    "tnt_ti": dict(embed_dim=192, inner_dim=12, num_heads_inner=2, num_heads_outer=3),
    "tnt_s": _S,
    "tnt_b": dict(embed_dim=640, inner_dim=40, num_heads_inner=4, num_heads_outer=10),
    "tnt_s_legacy": dict(_S, legacy=True),
    "tnt_s_inner4": dict(_S, inner_blocks=(0, 3, 7, 11)),  # paper, Table 5; timm has no such model
}
DEITS = {"deit_ti": "deit_tiny_patch16_224", "deit_s": "deit_small_patch16_224", "deit_b": "deit_base_patch16_224"}
CONVNETS = {"cnn_resnet50": "resnet50", "cnn_regnety_4g": "regnety_040"}  # which the paper's Table 3 has, too
TIMMS = {**DEITS, **CONVNETS}
SETS = 3  # of images, in turns
COMPILED = {"compiled": None, "tuned": "max-autotune-no-cudagraphs", "graphed": "reduce-overhead"}  # mode of torch.compile


def bare(family: str, own: bool = True, **others) -> nn.Module:
    """A model without values, on the meta device: timm's DeiT or CNN, a TNT of ours, or (``own`` False) of timm's."""
    with torch.device("meta"):
        if family in TIMMS:
            return timm.create_model(TIMMS[family])
        if own:
            return tnt_fast.TNT(**TNTS[family], **{"backend": "reference", **others})
        return timm.models.tnt.TNT(**TNTS[family])


def filled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model of the meta device with random weights on DEVICE, the same for the same names: nothing is 0 or 1."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    found = {}
    for name, p in sorted(model.named_parameters()):
        scale = 0.05 if p.ndim == 1 else min(0.05, p[0].numel() ** -0.5)
        x = scale * torch.randn(p.shape, device=DEVICE, generator=generator) + (p.ndim == 1 and "weight" in name)
        found[name] = x.to(dtype)
    for name, x in sorted(model.named_buffers()):  # of BatchNorm: means, and variances above 0
        if x.is_floating_point():
            values = 0.05 * torch.randn(x.shape, device=DEVICE, generator=generator)
            found[name] = (1 + values.abs() if "var" in name else values).to(dtype)
        else:
            found[name] = torch.zeros_like(x, device=DEVICE)
    model.load_state_dict(found, assign=True)
    return model.eval()


@lru_cache
def gmacs(family: str) -> float:
    return round(flops.multiply_adds(bare(family), (3, 224, 224)) / 1e9, 3)


def fuse(model: nn.Module, operations: Collection[str]) -> nn.Module:
    """Send some operations of a model on the reference path through their kernels: the steps of the waterfall."""
    if "pixel_embed" in operations:
        model.pixel_embed.forward = lambda x, pos, fused=False: PixelEmbed.forward(model.pixel_embed, x, pos, True)
    if "fold" in operations:
        model._stem = lambda pixel, fused=False, image=None: tnt_fast.TNT._stem(model, pixel, True, image)
    for block in model.blocks if operations else ():
        for name in {"inner", "fold", "outer"} & set(operations):
            method = getattr(Block, name)
            setattr(block, name, lambda *given, block=block, method=method: method(block, *given[:-1], True))
    return model


def on_outer(model: nn.Module) -> nn.Module:
    """timm's DeiT with our outer operation for each block: what the kernels are worth to a plain ViT."""
    for block in model.blocks:
        attn, mlp, E = block.attn, block.mlp, block.attn.qkv.in_features

        def forward(x: torch.Tensor, block=block, attn=attn, mlp=mlp, E=E) -> torch.Tensor:
            weight, bias = attn.qkv.weight, attn.qkv.bias
            layers = (block.norm1, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
            norm1, *others = [(layer.weight, layer.bias) for layer in layers]
            given = (
                *norm1,
                weight[: 2 * E],
                bias[: 2 * E],
                weight[2 * E :],
                bias[2 * E :],
                *(w for pair in others for w in pair),
            )
            return kernels.OPERATIONS["outer"](x, reference.TransformerWeights(*given), attn.num_heads, block.norm1.eps)

        block.forward = forward
    return model


def residual(model: nn.Module, images: torch.Tensor, dtype: str) -> str:
    """The precision in which the last block hands on what all blocks add to, in a train step."""
    seen: list[torch.dtype] = []
    hook = model.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.autocast(DEVICE, DTYPES[dtype], enabled=dtype != "fp32"):
        model(images)
    hook.remove()
    return next(name for name, kind in DTYPES.items() if kind == seen[0])


def with_cudnn(call):
    """What scaled_dot_product_attention takes inside, too, where it is compiled."""

    def run(images: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return call(images)

    return run


def steps() -> list[str]:
    """The providers of the waterfall: one more operation fused in each."""
    names = [name for name in OPERATIONS if name in kernels.OPERATIONS]
    return ["+".join(["eager", *names[:i]]) for i in range(len(names) + 1)]


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, dtype: str):
    with torch.autocast(DEVICE, DTYPES[dtype], enabled=dtype != "fp32" and images.dtype != torch.float64):
        out = model(images)
    each = F.cross_entropy(out if out.dtype == torch.float64 else out.float(), labels, reduction="none")
    return out, (each * weight).sum()


def looked_at(batch: int) -> list[int]:
    """The images that the guard compares: the first and the last, for which kernels take other turns."""
    return sorted({0, batch - 1})


def outputs(
    call: nn.Module, raw: nn.Module, images, labels, mode: str, dtype: str, chosen: list[int]
) -> dict[str, torch.Tensor]:
    """What the guard compares, of the chosen images: the output and, of a train step, the gradients by name."""
    if mode != "train":
        with torch.no_grad():
            return {"output": call(images)[chosen]}
    scale = 1024.0 if dtype == "fp16" else 1.0  # or small gradients underflow, which a train step prevents in the same way
    weight = torch.zeros(len(images), device=DEVICE, dtype=torch.float64 if images.dtype == torch.float64 else torch.float32)
    weight[chosen] = scale / len(chosen)
    out, loss = loss_of(call, images, labels, weight, dtype)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad / scale for name, p in raw.named_parameters()}
    raw.zero_grad(set_to_none=True)
    return {"output": out[chosen].detach(), **gradients}


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], own: dict[str, torch.Tensor], dtype: str):
    """By name: the output by the rule, gradients by their norms."""
    rows = {"output": measure.by_rule(*(each["output"] for each in (found, exact, own)))}
    for name in exact.keys() - rows.keys():
        rows[name] = measure.by_norm(found[name], exact[name], own[name], DTYPES[dtype])
    return rows


def random_images(batch: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    sets = [torch.randn(batch, 3, 224, 224, device=DEVICE, generator=generator).to(dtype) for _ in range(SETS)]
    return sets, torch.randint(1000, (batch,), device=DEVICE, generator=generator)


@lru_cache(maxsize=2)
def expected(family: str, mode: str, dtype: str, batch: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The results in float64, and those of the same model, eager, in the same dtype, of the images that are looked at."""
    kind = torch.float32 if mode == "train" else DTYPES[dtype]
    (images, *_), labels = random_images(batch, kind)
    images, labels = images[looked_at(batch)], labels[looked_at(batch)]
    every = list(range(len(images)))
    own_model = filled(bare(family), kind)
    own = outputs(own_model, own_model, images, labels, mode, dtype, every)
    exact_model = own_model.double()  # of the rounded weights
    return outputs(exact_model, exact_model, images.double(), labels, mode, dtype, every), own


def _graph(model: nn.Module, image: torch.Tensor):
    """A function that copies an image into a captured graph and replays it."""
    static = image.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = model(static)

    def call(images: torch.Tensor) -> torch.Tensor:
        static.copy_(images)
        graph.replay()
        return out

    return call


def model_case(family: str, provider: str, mode: str, dtype: str, batch: int, group: str) -> Case:
    """``provider``: timm, fused, reference or optimized (the copy for inference), of a DeiT also cudnn or outer, then -eager,
    -compiled, -tuned or -graphed; or eager+OPERATION+..., a step of the waterfall."""

    def build() -> Provider:
        kind = torch.float32 if mode == "train" else DTYPES[dtype]
        path, _, way = provider.partition("-")
        others = {"backend": "fused"} if path == "fused" or (path == "optimized" and GPU) else {}
        raw = fuse(filled(bare(family, path != "timm", **others), kind), path.split("+")[1:])
        if path == "fused" and mode == "train":
            with torch.autocast(DEVICE, DTYPES[dtype], enabled=dtype != "fp32"):
                reasons = tnt_fast.why_not_fused(raw, torch.empty(1, 3, 224, 224, device=DEVICE), gradients=True)
            if reasons:
                raise measure.Skipped("not fused: " + "; ".join(reasons))
        if path == "outer":
            raw = on_outer(raw)
        if path == "optimized":
            raw = tnt_fast.optimize_for_inference(raw)
        call = raw if way not in COMPILED else torch.compile(raw, dynamic=False, mode=COMPILED[way])
        if path == "cudnn":
            call = with_cudnn(call)
        sets, labels = random_images(batch, kind)
        own_bytes = sum(x.numel() * x.element_size() for x in (*raw.parameters(), *raw.buffers()))
        if mode == "latency_graph":
            call = _graph(call, sets[0])
        if mode == "train":
            optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-5, fused=True)
            own_bytes *= 3
            weight = torch.full((batch,), 1 / batch, device=DEVICE)
            scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == "fp16")

            def run(i: int) -> None:
                scaler.scale(loss_of(call, sets[i % SETS], labels, weight, dtype)[1]).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

        else:

            def run(i: int) -> None:
                with torch.no_grad():
                    call(sets[i % SETS])

        def check():
            found = outputs(call, raw, sets[0], labels, mode, dtype, looked_at(batch))
            return errors(found, *expected(family, "train" if mode == "train" else "inference", dtype, batch), dtype)

        slack = measure.FOREIGN if is_control(info) else 1.0
        about = {"residual": residual(raw, sets[0], dtype)} if mode == "train" else {}
        peak = mode != "latency_graph" and way != "graphed"  # whose graphs keep memory for themselves
        return Provider(run, check, own_bytes, slack, peak, energy=batch == 256, about=about)

    info = dict(suite="models", model=family, mode=mode, dtype=dtype, batch=batch, provider=provider)
    return Case(f"{family}/{mode}/{dtype}/{batch}/{provider}", group, build, info)


def group_cases(
    size: str, mode: str, dtype: str, batch: int, own: str, ways=("eager", "compiled"), more=False, peers=()
) -> list[Case]:
    """TNT of ours (``own``: the paths) and of timm, and DeiT, of one size; ``more``: the legacy TNT and one of Table 5, too;
    ``peers``: other paths of DeiT."""
    group = f"{size}/{mode}/{dtype}/{batch}" + ("" if len(ways) > 1 else f"/{ways[0]}")
    case = partial(model_case, mode=mode, dtype=dtype, batch=batch, group=group)
    paths = own.split()
    models = [*((f"tnt_{size}", path) for path in (*paths, "timm")), *((f"deit_{size}", path) for path in ("timm", *peers))]
    found = [case(family, f"{path}-{way}") for family, path in models for way in ways]
    if more:
        models = [("tnt_s_legacy", paths[0]), ("tnt_s_legacy", "timm"), ("tnt_s_inner4", paths[0])]
        found += [case(family, f"{path}-eager") for family, path in models]
    return found


def convnets(dtype: str, batch: int, ways: Collection[str]) -> list[Case]:
    group = f"cnn/inference/{dtype}/{batch}"
    return [model_case(family, f"timm-{way}", "inference", dtype, batch, group) for family in CONVNETS for way in ways]


def waterfall(size: str) -> list[Case]:
    group = f"waterfall/{size}/inference/bf16/256"
    return [model_case(f"tnt_{size}", provider, "inference", "bf16", 256, group) for provider in steps()]


def tuned(size: str, mode: str) -> list[Case]:
    """What torch.compile finds by trying, of ours, timm's TNT and DeiT, that with cuDNN's attention, too."""
    group = f"{size}/{mode}/bf16/256/tuned"
    models = [(f"tnt_{size}", "fused"), (f"tnt_{size}", "timm"), (f"deit_{size}", "timm"), (f"deit_{size}", "cudnn")]
    return [model_case(family, f"{path}-tuned", mode, "bf16", 256, group) for family, path in models]


def graphed(size: str, mode: str) -> list[Case]:
    """Ours and DeiT, each in CUDA graphs of torch.compile's."""
    group = f"{size}/{mode}/bf16/256/graphed"
    return [
        model_case(family, f"{path}-graphed", mode, "bf16", 256, group)
        for family, path in ((f"tnt_{size}", "fused"), (f"deit_{size}", "timm"))
    ]


def gpu_cases() -> list[Case]:
    """What tells most first; then everything eager; compiled last, since compiling takes most of the time."""
    cases = partial(group_cases, own="fused")
    found = [*cases("s", "inference", "bf16", 256, more=True, peers=("cudnn", "outer"))]
    found += [
        *cases("b", "inference", "bf16", 256, peers=("cudnn", "outer")),
        *cases("s", "train", "bf16", 256, peers=("cudnn",)),
        *graphed("s", "train"),
        *graphed("s", "inference"),
    ]
    found += [case for size in ("s", "b") for case in cases(size, "latency_graph", "bf16", 1, peers=("cudnn", "outer"))]
    found += [*cases("s", "inference", "bf16", 1), *cases("b", "inference", "bf16", 1)]
    found += [*cases("b", "train", "bf16", 256, peers=("cudnn",)), *cases("s", "train", "bf16", 1)]
    found += [*tuned("s", "inference"), *tuned("s", "train"), *tuned("b", "inference")]
    found += [*graphed("b", "inference"), *graphed("b", "train"), *waterfall("s"), *waterfall("b")]
    found += cases("s", "latency_graph", "bf16", 256)  # what the GPU alone takes
    found += convnets("bf16", 256, ("eager", "compiled"))
    sizes, dtypes, batches = ("s", "b", "ti"), ("bf16", "fp16", "fp32"), (256, 1, 8, 64, 1024)
    plan = [(size, mode, "bf16", batch) for batch in batches for mode in ("inference", "train") for size in sizes]
    plan += [(size, "latency_graph", "bf16", batch) for size in sizes for batch in (1, 8, 64)]
    plan += [(size, "inference", dtype, batch) for dtype in dtypes[1:] for batch in batches for size in sizes]
    plan += [(size, "train", dtype, 256) for dtype in dtypes[1:] for size in sizes]
    known = {case.group for case in found}
    for ways in (("eager",), ("compiled",)):
        for one in plan:
            if "/".join(map(str, one)) not in known:
                found += cases(*one, ways=ways)
    return found


def cpu_cases() -> list[Case]:
    cases = partial(group_cases, ways=("eager",))
    inference = partial(cases, mode="inference", own="reference optimized")
    found = [*inference("s", dtype="fp32", batch=1, more=True), *cases("s", "train", "fp32", 2, own="reference")]
    rest = (("b", "fp32", 1), ("s", "fp32", 8), ("s", "bf16", 8), ("ti", "fp32", 1))
    found += convnets("fp32", 1, ("eager",))
    return [*found, *(case for size, dtype, batch in rest for case in inference(size, dtype=dtype, batch=batch))]


LEFT_OUT = "fused, compiled and CUDA-graph rows, the waterfall, most in bf16, fp16, batches up to 1024, memory, energy"


@measure.rows(gpu_cases() if GPU else cpu_cases(), LEFT_OUT)
def test_model(take, case):
    info = case.info
    with torch.enable_grad() if info["mode"] == "train" else contextlib.nullcontext():
        done = take(case)
    if not done["benchmark"].disabled:
        work = 2e9 * gmacs(info["model"]) * info["batch"] * (3 if info["mode"] == "train" else 1)
        rates = measure.rates(done["seconds"], info["dtype"], work)
        img_s = {"img_s": round(info["batch"] / done["seconds"], 2)}
        if "sustained_ms" in done:
            img_s["sustained_img_s"] = round(info["batch"] / done["sustained_ms"] * 1e3, 2)
        done["benchmark"].extra_info.update(img_s, gmacs=gmacs(info["model"]), **rates)
