"""The gradients of attention by a kernel of ours, of short rows: against products and a softmax in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ExactSoftmax, paths

pytest.importorskip("triton")

from tnt_fast import attention as libraries
from tnt_fast.kernels import attention, operation

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not attention.STAYS, reason="this version of Triton takes things out of loops"),
]
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide


def by_fused(qkv: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """The gradient by PyTorch's fused attention, which takes gradient · out, rounded, for ΣP·dP, too."""
    leaf = qkv.detach().requires_grad_()
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaf.unbind(2))).transpose(1, 2)
    return torch.autograd.grad(out, leaf, upstream)[0]


def by_softmax(qkv: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient, out, logsumexp) of attention."""
    leaf = qkv.detach().requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in leaf.unbind(2))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    return gradient, out.detach().contiguous(), scores.detach().float().logsumexp(-1)


@pytest.fixture(autouse=True)
def of_hopper(request):
    """With the older products it is proved for one target, too; others' have no room for it, or products of their own."""
    if "path" not in request.fixturenames:
        return
    name = request.getfixturevalue("path").name
    hopper = name == "gpu" and torch.cuda.get_device_capability()[0] == 9
    if not hopper and name not in ("interpreter", "sm_80", "sm_90"):
        pytest.skip("the kernel is not taken there")


def check(path, dtype, B, T, H, D, scale=1.0, mean=0.0, again=False):
    qkv, upstream = torch.randn(B, T, 3, H, D).double() * scale + mean, torch.randn(B, T, H, D).double()
    qkv, upstream = (x.to(dtype) for x in (qkv, upstream))
    with ExactSoftmax():
        exact = by_softmax(qkv.double(), upstream.double())[0]
    with path.as_reference():
        given = qkv.to(path.device), upstream.to(path.device)
        own = by_fused(*given) if mean else by_softmax(*given)[0]
    _, out, logsumexp = by_softmax(qkv.float(), upstream.float())
    given = [x.to(path.device) for x in (upstream, qkv, out.to(dtype), logsumexp.contiguous())]
    found = attention.backward(*given)
    assert (found.shape, found.dtype, found.is_contiguous()) == (qkv.shape, dtype, True)
    for at, name in enumerate("qkv"):
        path.rule(name, found[:, :, at], own[:, :, at], exact[:, :, at], dtype)
    if again:
        assert torch.equal(attention.backward(*given), found)


HALVES = dict(interpreter="float32 float16", compiled="bfloat16 float16")


@paths(**HALVES)
@pytest.mark.parametrize(
    ("B", "T", "H", "D"),
    [
        pytest.param(1, 65, 2, 64, marks=everywhere),
        (1, 197, 1, 64),
        (2, 64, 1, 64),
        pytest.param(2, 3, 3, 64, marks=wide),
        pytest.param(1, 33, 1, 32, marks=wide),
        pytest.param(1, 100, 1, 64, marks=wide),  # a tile of 64 for what is left, too
        pytest.param(1, attention.MOST, 1, 64, marks=wide),
    ],
)
def test_gradients(B, T, H, D, path, dtype):
    check(path, dtype, B, T, H, D, again=True)


@paths(interpreter="float16", compiled="bfloat16")
@pytest.mark.parametrize(("scale", "mean"), [(6.0, 0.0), (0.3, 2.0), (1e-3, 0.0)], ids=["one", "alike", "small"])
def test_probabilities_of_one_and_alike(scale, mean, path, dtype):
    check(path, dtype, 1, 70, 1, 64, scale, mean)


@paths(interpreter="float16", compiled="bfloat16")
def test_scores_far_below_zero_and_what_is_not_finite(path, dtype):
    """P of the rows behind the last token is at most 1, whatever logsumexp is; NaN reaches what it has to."""
    qkv, upstream = torch.randn(1, 65, 3, 1, 64).to(dtype), torch.randn(1, 65, 1, 64).to(dtype)
    qkv[:, :, 0], qkv[:, :, 1] = -12, 12
    _, out, logsumexp = by_softmax(qkv.float(), upstream.float())
    given = [x.to(path.device) for x in (upstream, qkv, out.to(dtype), logsumexp)]
    assert attention.backward(*given).isfinite().all()
    given[0][0, 7] = torch.nan
    found = attention.backward(*given)
    assert found[0, :, 1:].isnan().all()  # of all keys and values
    assert found[0, 7, 0].isnan().all()
    assert found[0, 8:, 0].isfinite().all()


# ---- where it is taken ----


@pytest.mark.parametrize(
    ("T", "D", "dtype", "capability", "taken"),
    [
        (197, 64, torch.bfloat16, (9, 0), True),
        (197, 64, torch.float16, (9, 0), True),
        (64, 64, torch.float16, (9, 0), True),
        (attention.MOST, 64, torch.float16, (9, 0), True),
        (attention.MOST + 1, 64, torch.float16, (9, 0), False),
        (63, 64, torch.float16, (9, 0), False),
        (197, 32, torch.float16, (9, 0), False),
        (197, 64, torch.float32, (9, 0), False),
        (197, 64, torch.bfloat16, (8, 0), False),
        (197, 64, torch.bfloat16, (10, 0), False),
        (197, 64, torch.bfloat16, None, False),
    ],
    ids=str,
)
def test_where_it_is_taken(T, D, dtype, capability, taken, monkeypatch):
    gpu = operation.Gpu()
    gpu.nvidia, gpu.capability = capability is not None, lambda device: capability
    monkeypatch.setattr(operation, "runner", gpu)
    assert attention.attends_backward(T, D, dtype, torch.device("cuda", 0)) == taken


@pytest.mark.parametrize("T", [63, 64])
def test_the_outer_backward_takes_it(T, monkeypatch):
    from cases import outer_tensors
    from helpers import call

    from tnt_fast import kernels

    if not operation.runner.on_cpu:
        pytest.skip("needs Triton's interpreter")
    called = []
    right, library = attention.backward, libraries.attend_backward
    monkeypatch.setattr(attention, "backward", lambda *given: called.append("ours") or right(*given))
    monkeypatch.setattr(libraries, "attend_backward", lambda *given: called.append("libraries") or library(*given))
    tensors = outer_tensors(1, T, 64, 32, False)
    given = {name: x if x is None else x.to(torch.float16).requires_grad_() for name, x in tensors.items()}
    out = call(kernels.OPERATIONS["outer"], **given, num_heads=1)
    out.sum().backward()
    assert called == ["ours" if T == 64 else "libraries"]
