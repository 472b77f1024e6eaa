"""block against the reference in float64 (``cases.check``): what inner and outer, which have tests of their own, do as one."""

from types import SimpleNamespace

import pytest
import torch
from cases import block_tensors, case, check, growing, normal
from helpers import TINY, call, paths, perturb

pytest.importorskip("triton")

from tnt_fast import TNT, kernels, reference
from tnt_fast.kernels import block, inner, product

pytestmark = pytest.mark.usefixtures("poisoned_memory")
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide
OF_S, OF_B = (2, 5, 16, 24, 48, 96, 64), (1, 7, 16, 40, 64, 160, 64)  # B, N, S, C, E, M, F


@pytest.fixture
def of_many(monkeypatch):
    """As of many patches: product.py takes a few."""
    monkeypatch.setattr(product, "takes", lambda *given: False)
    monkeypatch.setattr(kernels.OPERATIONS["block"], "_plans", {})


@paths(compiled="bfloat16 float16")
@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=wide)], ids=["", "legacy"])
@pytest.mark.parametrize(
    "sizes",
    [
        OF_S, pytest.param(OF_B, marks=wide), pytest.param((1, 1, 9, 24, 36, 40, 48), marks=wide),
        pytest.param((3, 4, 16, 12, 24, 48, 48), marks=wide),
    ],
    ids=str,
)  # fmt: skip
def test_block(sizes, legacy, path, dtype):
    check(path, "block", block_tensors(*sizes, legacy, bias=True), dict(inner_heads=2, num_heads=2), dtype)


@paths("float16", "bfloat16 float16")
@pytest.mark.parametrize(
    "what", ["grow", pytest.param("means", marks=everywhere), "spread", pytest.param("no biases", marks=wide)]
)
@pytest.mark.parametrize(
    "sizes", [OF_S, pytest.param(OF_B, marks=wide), pytest.param((1, 3, 9, 24, 36, 40, 48), marks=wide)], ids=str
)
def test_the_layernorm_within_inners_launch(sizes, what, path, dtype, of_many):
    """Of pixels that branches of small weights hand on: rows that differ, means that are large beside them."""
    tensors = block_tensors(*sizes, False)
    tensors |= {
        name: 0.02 * tensors[name] for name in ("inner_proj_weight", "inner_proj_bias", "inner_fc2_weight", "inner_fc2_bias")
    }
    if what == "grow":
        tensors = growing(tensors, 3.0)
    elif what == "means":
        tensors["pixel"] = tensors["pixel"] + 10.0 * normal(tensors["pixel"].shape[0], 1, 1)
    elif what == "spread":
        tensors["pixel"] = tensors["pixel"] * 10.0 ** torch.arange(-2, 2).repeat(99)[: len(tensors["pixel"]), None, None]
    else:
        tensors |= dict.fromkeys(("fold_norm1_bias", "inner_norm1_bias", "norm1_bias"))
    check(path, "block", tensors, dict(inner_heads=2, num_heads=2), dtype, gradients=False)


@paths("float32", "")
def test_block_with_drop_path(path, dtype):
    scales = dict(inner_attn_scale=torch.tensor([0, 2, 1, 0, 1.25] * 2), inner_mlp_scale=torch.tensor([2, 0, 1, 0, 1.25] * 2))
    scales |= dict(attn_scale=torch.tensor([0, 1.5]), mlp_scale=torch.tensor([2, 1.25]))
    check(path, "block", block_tensors(*OF_S, False), dict(inner_heads=4, num_heads=3, **scales), dtype)


@pytest.mark.parametrize("recompute", ["mlp", "all"])
@paths("float32", "")
def test_block_that_keeps_less(recompute, path, dtype):
    check(path, "block", block_tensors(*OF_S, False), dict(inner_heads=4, num_heads=3, recompute=recompute), dtype)


def test_gradients_of_scales_and_of_sizes_that_pytorch_takes():
    """By PyTorch, within the operation: of inner alone, of outer alone."""
    scales = {"inner_attn_scale": 10, "inner_mlp_scale": 10, "attn_scale": 2, "mlp_scale": 2}
    for sizes, wanted in ((OF_S, [*scales][:2]), (OF_S, [*scales][2:]), ((2, 3, 25, 12, 24, 48, 48), [])):
        tensors = block_tensors(*sizes, False) | {name: 1 + 0.3 * normal(scales[name]) for name in wanted}
        given = {name: x if x is None else x.float().requires_grad_() for name, x in tensors.items()}
        leaves, found = [x for x in given.values() if x is not None], []
        for function in (kernels.OPERATIONS["block"], reference.block):
            out = call(function, **given, inner_heads=2, num_heads=3)
            found.append(torch.autograd.grad(out.sin().sum(), leaves))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("result", [0, 1], ids=["pixel", "patch"])
def test_either_result_alone_has_gradients(result):
    tensors, others = case("block")
    given = {name: x if x is None else x.float().requires_grad_() for name, x in tensors.items()}
    leaves, found = [x for x in given.values() if x is not None], []
    for function in (kernels.OPERATIONS["block"], reference.block):
        out = function(**reference.in_records({**given, **others}))[result]
        found.append(torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@paths("float16", "bfloat16")
def test_the_layernorm_is_made_where_it_is_said(path, dtype, of_many, monkeypatch):
    """By inner's launch for many patches in half precision; else, and of legacy blocks, as before."""
    launched = []

    def launch(spec, grid, *arguments):
        launched.append(next((x.ptr is not None for x in arguments if isinstance(x, inner.Norm)), None))
        kernels.operation.launch(spec, grid, *arguments)

    monkeypatch.setattr(inner, "launch", launch)
    for kind, legacy, expected in ((dtype, False, True), (dtype, True, False), (torch.float32, False, False)):
        monkeypatch.setattr(kernels.OPERATIONS["block"], "_plans", {})
        launched.clear()
        tensors = block_tensors(3, 3, 16, 24, 36, 48, 48, legacy)
        given = {name: x if x is None else x.to(path.device, kind) for name, x in tensors.items()}
        call(kernels.OPERATIONS["block"], **given, inner_heads=2, num_heads=3)
        assert launched == [expected]


@paths("float16", "bfloat16 float16")
@pytest.mark.parametrize("E", [48, 45], ids=["", "unaligned"])
def test_weights_are_cast_on_inners_way(E, path, dtype):
    """To the bit as PyTorch does: halfway, beyond the largest, subnormal, not finite; of several blocks, and of parts."""
    weights = block_tensors(2, 5, 16, 12, E, 48, 64, False)
    given = {name: x if x is None else x.to(path.device, torch.float32) for name, x in weights.items()}
    given |= {name: given[name].to(dtype) for name in ("pixel", "patch")}
    for name in ("qk_weight", "v_weight", "proj_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fold_proj_weight"):
        x = given[name].view(-1)
        x[::3] = (x[::3].view(torch.int32) & -(2**12) | 2**12 * (E == 48)).view(torch.float32)  # of float16 halfway
        x[1::3] = (x[1::3].view(torch.int32) & -(2**16) | 2**15).view(torch.float32)  # of bfloat16
        x[-9:] = torch.tensor([0.0, -0.0, 1e-7, -3e-39, 65519.0, 65520.0, 3.4e38, torch.inf, torch.nan])
    a = SimpleNamespace(**reference.in_records(given), inner_heads=2, num_heads=3, eps=1e-5, recompute="none", kept={})
    a = SimpleNamespace(**dict.fromkeys(kernels.OPERATIONS["block"].defaults) | vars(a))
    read, _ = kernels.OPERATIONS["outer"].halves(a)
    found, copies = read(a, later=True)
    assert [copy.source.shape for copy in copies] == [given[name].shape for name in (
        "qk_weight", "v_weight", "proj_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fold_proj_weight")]  # fmt: skip
    of_inner = block._of_inner(a)
    kernels.inner.inner.prepared(of_inner)(of_inner, torch.empty_like(a.pixel), copies=copies)
    for copy, x in zip(copies, [*found[0].split((2 * E, E)), *found[1:]], strict=True):
        cast = copy.source.to(dtype)
        assert torch.equal(x.isnan(), cast.isnan())
        assert torch.equal(x.nan_to_num(7.0).view(torch.int16), cast.nan_to_num(7.0).view(torch.int16))


def test_what_is_copied_on_inners_way(monkeypatch):
    """As often as there is something to copy, of calls of one plan, too: not of q, k and v in one memory, nor of two dtypes."""
    launched = []

    def launch(spec, grid, *arguments):
        launched.append(next((len(x) for x in arguments if type(x) is tuple), 0))
        kernels.operation.launch(spec, grid, *arguments)

    monkeypatch.setattr(inner, "launch", launch)
    device, function = "cuda" if torch.cuda.is_available() else "cpu", kernels.OPERATIONS["block"]
    given = {
        name: x if x is None else x.float().to(device) for name, x in block_tensors(8, 64, 16, 12, 24, 48, 48, False).items()
    }
    whole = torch.cat((given["qk_weight"], given["v_weight"]))
    together = given | dict(zip(("qk_weight", "v_weight"), whole.split((48, 24)), strict=True))
    results = [call(function, **x, inner_heads=2, num_heads=3) for x in (given, together, given)]
    assert launched == [2, 0, 2]
    assert all(torch.equal(results[0], x) for x in results)
    some = {name: x if x is None or name != "fc1_weight" else x.bfloat16() for name, x in given.items()}
    few = {name: x if x is None else x[: len(x) // 8] for name, x in given.items() if name in ("pixel", "patch")}
    with torch.autocast(device, torch.bfloat16):
        launched.clear()
        for x in (given, some, given | few, {name: x if x is None else x.bfloat16() for name, x in (given | few).items()}):
            call(function, **x, inner_heads=2, num_heads=3)
        assert launched == [7, 6, 2, 0]
        a = {name: x if x is None else x.bfloat16() for name, x in given.items()} | {"v_weight": given["v_weight"]}
        call(function, **a, inner_heads=2, num_heads=3)
    assert launched[4:] == [0]


def test_a_model_of_blocks_is_that_of_inner_fold_and_outer(monkeypatch):
    """Their gradients, too; as one operation only where the three have one eps, and nobody replaced one of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, image = perturb(TNT(**TINY, backend="fused")).to(device), torch.randn(2, 3, 32, 32, device=device)
    calls, block = [], kernels.OPERATIONS["block"]
    for way in ("prepared", "graded"):
        find = getattr(block, way)
        monkeypatch.setattr(block, way, lambda *given, _find=find, _way=way: calls.append(_way) or _find(*given))
    monkeypatch.setattr(block, "_plans", {})

    def found():
        calls.clear()
        out = model(image)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    whole = found()
    assert calls == ["prepared", "graded"]  # once for blocks that are alike
    for each in model.blocks:
        each.fold = each.fold  # on the instance
    for a, b in zip(whole, found(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not calls
