"""What the libraries make of the outer block's parts: its products with what follows them, and attention over 197 tokens.

On a GPU only. These rows decide what of the outer block is worth a kernel of ours: each is one way to have the same result.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure
from benchmarks.measure import DEVICE, DTYPES, GPU, Case, Provider
from tnt_fast import reference

pytestmark = pytest.mark.benchmark(timer=measure.clock)
WIDTHS = {"s": 384, "b": 640}
TOKENS, HEAD = 197, 64
SETS = 3  # of inputs, in turns


def _chain(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, after: str) -> Tensor:
    """As PyTorch runs a Linear and what follows it."""
    z = F.linear(x, w, b)
    return {"": lambda: z, "gelu": lambda: F.gelu(z), "add": lambda: y + z}[after]()


def _fused(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, after: str) -> Tensor:
    """The same, as one call of the library."""
    if after == "gelu":
        return torch._addmm_activation(b, x, w.t(), use_gelu=True)  # its tanh form
    return torch.addmm(y, x, w.t()) if after == "add" else torch.mm(x, w.t())


def _in_place(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, after: str) -> Tensor:
    return y.addmm_(x, w.t())


PRODUCTS = {  # inputs and outputs in widths, whether there is a bias, what follows, the ways
    "qkv": (1, 3, False, "", ("linear",)),
    "proj": (1, 1, True, "add", ("linear", "addmm", "addmm_")),
    "fc1": (1, 4, True, "gelu", ("linear", "addmm")),
    "fc2": (4, 1, True, "add", ("linear", "addmm", "addmm_")),
    "fold": (1, 1, False, "", ("linear",)),
}
WAYS = {"linear": _chain, "addmm": _fused, "addmm_": _in_place}


def product_case(size: str, name: str, way: str, batch: int, dtype: str) -> Case:
    """``addmm`` and ``addmm_`` add no bias where they add y: a kernel before them has to."""
    k, n, has_bias, after, _ = PRODUCTS[name]
    E, rows = WIDTHS[size], batch * (TOKENS - (name == "fold"))

    def build() -> Provider:
        torch.manual_seed(0)
        random = partial(torch.randn, device=DEVICE, dtype=DTYPES[dtype])
        sets = [(random(rows, k * E), random(rows, n * E if after == "add" else 0)) for _ in range(SETS)]
        weight = random(n * E, k * E) * (k * E) ** -0.5
        bias = random(n * E) * 0.1 if has_bias and (way == "linear" or after == "gelu") else None

        def check():
            x, y = sets[0][0], sets[0][1].clone()
            every = [x, weight, bias, y]
            exact = _chain(*(each if each is None else each.double() for each in every), after)
            own = _chain(*every, after)
            return {"result": measure.by_rule(WAYS[way](*every, after), exact, own)}

        def run(i: int) -> None:
            WAYS[way](sets[i % SETS][0], weight, bias, sets[i % SETS][1], after)

        return Provider(run, check, slack=measure.FOREIGN, ahead=True)

    info = dict(suite="library", operation=name, variant=size, mode="forward", provider=way, dtype=dtype, batch=batch)
    shape = dict(m=rows, n=n * E, k=k * E, after=after)
    group = f"{name}/{size}/forward/{dtype}/{batch}"
    return Case(f"library/{group}/{way}", f"library/{group}", build, info | shape)


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As reference.outer has it, behind its products."""
    B, T, H, D = q.shape
    weights = reference.attention_weights(torch.cat((q.flatten(2), k.flatten(2)), -1), H)
    return reference.attend(weights, v.reshape(B, T, H * D)).view(B, T, H, D)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


ATTENTIONS = {
    "eager": _reference,
    "flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
}


def attention_case(size: str, mode: str, way: str, batch: int, dtype: str) -> Case:
    """Queries, keys and values lie in one tensor (B, T, 3, H, D), as one product gives them."""
    H = WIDTHS[size] // HEAD

    def build() -> Provider:
        torch.manual_seed(0)
        shape = (batch, TOKENS, 3, H, HEAD)
        sets = [torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(SETS)]
        upstream = torch.randn(batch, TOKENS, H, HEAD, device=DEVICE, dtype=DTYPES[dtype])

        def run(attend, qkv: Tensor) -> dict[str, Tensor]:
            if mode == "forward":
                with torch.no_grad():
                    return {"result": attend(*qkv.unbind(2))}
            leaf = qkv.detach().requires_grad_()
            out = attend(*leaf.unbind(2))
            return {"result": out.detach(), "gradient": torch.autograd.grad(out, leaf, upstream[: len(qkv)].to(out))[0]}

        def check():
            few = sets[0][:2]
            exact, own, found = run(_reference, few.double()), run(_reference, few), run(ATTENTIONS[way], few)
            return {name: measure.by_rule(found[name], exact[name], own[name]) for name in exact}

        return Provider(lambda i: run(ATTENTIONS[way], sets[i % SETS]), check, slack=measure.FOREIGN, ahead=True)

    info = dict(suite="library", operation="attention", variant=size, mode=mode, provider=way, dtype=dtype, batch=batch)
    group = f"library/attention/{size}/{mode}/{dtype}/{batch}"
    return Case(f"{group}/{way}", group, build, info)


def library_cases() -> list[Case]:
    where = dict(batch=256, dtype="bf16")
    found = [product_case(s, name, way, **where) for s in WIDTHS for name, (*_, ways) in PRODUCTS.items() for way in ways]
    return found + [attention_case(s, m, way, **where) for s in WIDTHS for m in ("forward", "backward") for way in ATTENTIONS]


def work(info: dict) -> float:
    """FLOP of a call; of an attention's backward with its forward 3.5 times the forward's, as FlashAttention counts it."""
    if info["operation"] == "attention":
        forward = 4 * info["batch"] * TOKENS**2 * WIDTHS[info["variant"]]
        return forward * (1 if info["mode"] == "forward" else 3.5)
    return 2 * info["m"] * info["n"] * info["k"]


@measure.rows(library_cases() if GPU else [], "the outer block's products and its attention")
def test_library(take, case):
    done = take(case)
    if not done["benchmark"].disabled:
        done["benchmark"].extra_info.update(measure.rates(done["seconds"], case.info["dtype"], work(case.info)))
