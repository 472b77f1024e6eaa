"""Products of many rows with GELU, or its gradient, at their end, against float64; and outer, which takes them."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from cases import check, fold_tensors, normal, outer_tensors, with_fold
from helpers import KernelPath, paths

pytest.importorskip("triton")

from tnt_fast.kernels import OPERATIONS, gelu, operation

outer_kernels = import_module("tnt_fast.kernels.outer")  # tnt_fast.kernels.outer is the operation

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BLOCK = gelu.CONFIG.rows
# the machine for PTX wants all programs at their products together: as many tiles of each
SIZES = [(1, 64, 128), (2 * BLOCK + 1, 192, 256), (6 * BLOCK - 1, 384, 128)]
half = paths("float16", "float16 bfloat16")
everywhere = pytest.mark.everywhere


@pytest.fixture
def known(path):
    if path.name in ("sm_89", "sm_100", "sm_120"):
        pytest.skip(
            "not launched there (gelu.CAPABILITIES): too little shared memory, or instructions the machine does not know"
        )


ALL = {"_gelu_product_kernel", "_gelu_product_bwd_kernel", "_norm_product_kernel", "_sum_product_kernel"}


def exactly(x, weight, bias, dtype):
    """(h, GELU(h)) in float64, and as PyTorch has them in a dtype, of values that are rounded to it."""
    results = []
    for kind in (torch.float64, dtype):
        h = F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        results.append((h, F.gelu(h)))
    return results


@half
@everywhere
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("rows", "K", "N"), SIZES)
def test_a_product_that_ends_in_gelu(rows, K, N, path: KernelPath, dtype):
    x, weight, bias = normal(rows, K), normal(N, K, scale=2 * K**-0.5), None if rows == 1 else normal(N)
    given = [None if each is None else each.to(dtype) for each in (x, weight, bias)]
    exact, same = exactly(*given, dtype)
    given = [None if each is None else each.to(path.device) for each in given]
    product = gelu.prepared(rows, K, N, dtype, given[0].device)
    h, a = product(*given, True)
    nothing, alone = product(*given, False)  # of h that is not rounded
    assert nothing is None
    for name, each, own, known in zip(
        ("h", "GELU(h)", "GELU(h)"), (h, a, alone), (*same, same[1]), (*exact, exact[1]), strict=True
    ):
        path.rule(name, each, own, known, dtype)
    assert all(map(torch.equal, product(*given, True), (h, a)))
    assert torch.equal(product(*given, False)[1], alone)


def rows_of(kind, rows, K):
    x = normal(rows, K)
    if kind == "far from 0":
        return x + 30
    if kind == "outliers":  # a value of a row is most of its variance, the first, about which others are summed, or another
        x[:, 0] += 40 * (torch.arange(rows) % 2)
        x[:, K - 1] += 40
        return x
    if kind == "alike":  # a third of them all but for a value
        x = normal(rows, 1).expand(rows, K).clone()
        x[::3, 5] *= 1.01
    return x


def scales(K):
    """Of a LayerNorm: values that are 0, and values of several orders."""
    return normal(K) * 10 ** torch.linspace(-2, 0, K, dtype=torch.float64) * (torch.arange(K) % 5 > 0)


@half
@everywhere
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("rows", "K", "N", "kind"),
    [
        (2 * BLOCK + 1, 384, 256, "normal"),
        (BLOCK, 192, 128, "outliers"),
        (BLOCK + 3, 384, 128, "far from 0"),
        (3, 128, 128, "alike"),
    ],
)
def test_a_product_of_a_layer_norm(rows, K, N, kind, path: KernelPath, dtype):
    x, weight, shift = rows_of(kind, rows, K), normal(N, K, scale=K**-0.5), None if K == 192 else normal(K)
    scale = scales(K)
    x, weight = x.to(dtype), weight.to(dtype)
    of_norm = [None if each is None else each.float() for each in (scale, shift)]

    def by_pytorch(kind):
        each = [v if v is None else v.to(kind) for v in of_norm]
        return F.linear(F.layer_norm(x.to(kind), (K,), *each, 1e-5), weight.to(kind))

    given = [v if v is None else v.to(path.device) for v in (x, weight, *of_norm)]
    found = gelu.normed(*given, 1e-5)
    path.rule("LN(x) Wᵀ", found, by_pytorch(dtype), by_pytorch(torch.float64), dtype)
    assert torch.equal(gelu.normed(*given, 1e-5), found)


@half
@everywhere
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("rows", "K", "N"), SIZES)
def test_a_product_that_ends_in_the_gradient_of_gelu(rows, K, N, path: KernelPath, dtype):
    d, weight, h = (x.to(dtype) for x in (normal(rows, K), normal(K, N, scale=K**-0.5), normal(rows, N, scale=2.0)))

    def by_pytorch(kind):
        leaf = h.to(kind).requires_grad_()
        a = F.gelu(leaf)
        (dh,) = torch.autograd.grad(a, leaf, d.to(kind) @ weight.to(kind))
        return dh, a.detach(), dh.sum(0)

    exact, same = by_pytorch(torch.float64), by_pytorch(dtype)
    given = [x.to(path.device) for x in (d, weight, h)]
    found = gelu.backward(*given, True, True)
    found = *found[:2], found[2].sum(0)
    for name, each, own, known in zip(("dh", "GELU(h)", "sums"), found, same, exact, strict=True):
        path.rule(name, each, own, known, dtype)
    alone, nothing, neither = gelu.backward(*given, False, False)
    assert nothing is neither is None
    assert torch.equal(alone, found[0])
    assert torch.equal(gelu.backward(*given, True, True)[2].sum(0), found[2])


@half
@everywhere
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("rows", "E", "M", "kind"), [(6 * BLOCK - 1, 384, 128, "far from 0"), (7, 128, 256, "alike")])
def test_a_sum_and_the_product_of_its_layer_norm(rows, E, M, kind, path: KernelPath, dtype):
    y, x, matrix = rows_of(kind, rows, E), normal(rows, E), normal(E, E, scale=E**-0.5) * (kind != "alike")
    next_matrix, next_bias, scale, shift = normal(M, E, scale=2 * E**-0.5), normal(M), scales(E), normal(E)
    y, x, matrix, next_matrix, next_bias = (v.to(dtype) for v in (y, x, matrix, next_matrix, next_bias))
    later, scale, shift = (v.float() for v in (normal(E), scale, shift))

    product = gelu.summed(rows, E, M, dtype, torch.device(path.device), 1e-5)
    weights = gelu.SumWeights(*(v.to(path.device) for v in (matrix, later, scale, shift, next_matrix, next_bias)))
    onto, rest, x = y.clone().to(path.device), torch.empty_like(y, device=path.device), x.to(path.device)
    h, a = product(x, onto, rest, weights, True)
    stored = onto.cpu()  # which is what is normalised: a sum that is rounded to the other side is another row

    def by_pytorch(kind):
        total = y.to(kind) + F.linear(x.cpu().to(kind), matrix.to(kind))
        h = F.layer_norm(stored.to(kind), (E,), scale.to(kind), shift.to(kind), 1e-5)
        h = F.linear(h, next_matrix.to(kind), next_bias.to(kind))
        return total, stored.to(kind) + later.to(kind), h, F.gelu(h)

    names = "the sum", "the rest", "h", "GELU(h)"
    for name, *each in zip(names, (onto, rest, h, a), by_pytorch(dtype), by_pytorch(torch.float64), strict=True):
        path.rule(name, *each, dtype)
    onto = y.clone().to(path.device)
    assert all(map(torch.equal, product(x, onto, rest, weights, True), (h, a)))


@half
def test_the_gradient_of_gelu_alone(path: KernelPath, dtype):
    """Of what is far from 0, too, where the derivative is 1 or 0 but for its last bits."""
    h, d = (x.to(dtype) for x in (normal(193, 256, scale=3.0), normal(193, 256)))

    def by_pytorch(kind):
        leaf = h.to(kind).requires_grad_()
        a = F.gelu(leaf)
        return torch.autograd.grad(a, leaf, d.to(kind))[0], a.detach()

    found = d.to(path.device).clone()
    a, sums = outer_kernels._gelu_backward(h.to(path.device), found, True, True)
    for name, each, own, known in zip(("dh", "GELU(h)"), (found, a), *map(by_pytorch, (dtype, torch.float64)), strict=True):
        path.rule(name, each, own, known, dtype)
    assert sums.shape[1] == 256


@pytest.fixture
def taken(monkeypatch, known):
    """Of few rows, and wherever the kernels run."""
    monkeypatch.setattr(OPERATIONS["outer"], "_plans", {})
    monkeypatch.setattr(gelu, "LEAST", 0)
    monkeypatch.setattr(gelu, "NORMED_LEAST", 0)
    monkeypatch.setattr(gelu, "CAPABILITIES", ((8, 0), (8, 9), (9, 0), (12, 0), None))
    launched: list[str] = []
    launch = gelu.launch
    monkeypatch.setattr(gelu, "launch", lambda spec, *given: launched.append(spec.kernel.__name__) or launch(spec, *given))
    yield launched
    assert {*launched} <= ALL


@half
@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
def test_outer_with_them(recompute, taken, path, dtype):
    check(path, "outer", outer_tensors(2, 37, 64, 128), dict(num_heads=2, recompute=recompute), dtype)
    assert {*taken} == {"_gelu_product_kernel", "_gelu_product_bwd_kernel"}


@half
def test_outer_with_them_and_drop_path_without_biases(taken, path, dtype):
    tensors = outer_tensors(3, 23, 64, 256) | dict.fromkeys(("fc1_bias", "fc2_bias"))
    scales = dict(attn_scale=torch.tensor([0.0, 1.25, 2.0]).double(), mlp_scale=torch.tensor([2.0, 0.0, 1.25]).double())
    check(path, "outer", tensors, dict(num_heads=2) | scales, dtype)


@paths("", "bfloat16")
def test_folds_gradients_with_one(taken, path, dtype):
    check(path, "fold", fold_tensors(2, 35, 16, 12, 128, False), {}, dtype)
    assert taken == ["_norm_product_kernel"]


@half
def test_outer_with_one_where_nothing_is_recorded(taken, path, dtype):
    """More rows than are few."""
    check(path, "outer", outer_tensors(2, 230, 64, 128), dict(num_heads=2), dtype, gradients=False)
    assert taken == ["_gelu_product_kernel"]


@paths("", "bfloat16")
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_outer_whose_first_branch_ends_in_one(recompute, taken, path, dtype):
    """And a fold, and what nobody records."""
    tensors, others = with_fold(2, 37, 16, 12, 128, 256, False), dict(num_heads=2, recompute=recompute)
    check(path, "outer", tensors, others, dtype)
    forward = ["_sum_product_kernel", "_gelu_product_kernel"]
    assert taken == [*forward, "_gelu_product_bwd_kernel", "_norm_product_kernel"]
    if recompute == "none":
        taken.clear()
        check(path, "outer", outer_tensors(2, 230, 128, 256), dict(num_heads=2), dtype, gradients=False)
        assert taken == forward


def test_where_they_are_taken(monkeypatch):
    class Gpu(operation.Gpu):
        def capability(self, device=None):
            return device

    monkeypatch.setattr(operation, "runner", Gpu())
    known, hopper = (256 * 197, 384, 1536, torch.bfloat16), (9, 0)

    def takes(rows=known[0], K=known[1], N=known[2], dtype=known[3], device=hopper):
        return gelu.takes(rows, K, N, dtype, device)

    assert takes()
    assert takes(dtype=torch.float16)
    assert takes(K=192, N=768)
    assert not takes(dtype=torch.float32)
    assert not takes(rows=197)
    assert not takes(K=640, N=2560)  # whose parts of W do not fit twice
    assert not takes(K=200)
    assert not takes(N=1000)
    assert not any(takes(device=device) for device in ((8, 0), (8, 9), (10, 0), (12, 0), None))

    def takes_norm(rows=256 * 196, K=384, N=384, dtype=torch.bfloat16, device=hopper):
        return gelu.takes_norm(rows, K, N, dtype, device)

    assert takes_norm()
    assert not takes_norm(rows=128 * 196)
    assert not takes_norm(N=1536)  # each 128 columns of which would make the statistics again
    assert not takes_norm(dtype=torch.float16)
    assert not takes_norm(device=(8, 0))
